/* Every function of the kernels on odd shapes, in buffers without a spare byte, for AddressSanitizer, UBSan and valgrind.
 *   usage: sanitize_driver VARIANT...    prints the variants that ran; a variant that the processor lacks is left out
 * Results are compared with plain loops in double, within the bound that the rounding of the activations allows. */
#include <stdio.h>

#include "kernels.h"

static uint64_t state = 1;

static uint32_t draw(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

/* Memory that ends where its last value ends and starts at the loosest alignment that its type has. */
static void *buffer(size_t count, size_t size) {
    char *start = malloc(count * size + size);
    if (!start) exit(2);
    for (size_t i = 0; i < count * size + size; i++) start[i] = (char)draw();
    return start + size;
}

static void release(void *memory, size_t size) { free((char *)memory - size); }

static float *floats(size_t count) {
    float *values = buffer(count, 4);
    for (size_t i = 0; i < count; i++) values[i] = (float)((int)(draw() % 2001) - 1000) / 500;
    return values;
}

static void check(int right, const char *what, int64_t a, int64_t b, int64_t c, int bits) {
    if (right) return;
    printf("%s: %s is wrong for %lld %lld %lld, %d\n", kernels_variant(), what, (long long)a, (long long)b, (long long)c, bits);
    exit(1);
}

static int weight_at(const int8_t *weight, int64_t row, int64_t column, int64_t in, int bits) {
    if (bits == 8) return weight[row * in + column];
    int byte = (uint8_t)weight[(row * in + column) / 2], digit = column % 2 ? byte & 15 : byte >> 4;
    return digit < 8 ? digit : digit - 16;
}

static double scale_at(const void *scale, int64_t row, int type) {
    return type == TYPE_FLOAT32 ? ((const float *)scale)[row] : half_to_float(((const uint16_t *)scale)[row]);
}

static void *scales(int64_t out, int type) {
    if (type == TYPE_FLOAT32) return floats((size_t)out);
    uint16_t *half = buffer((size_t)out, 2);
    for (int64_t i = 0; i < out; i++) half[i] = (uint16_t)((half[i] & 0x83ff) | 0x2800);
    return half;
}

static void run_linear(int64_t rows, int64_t in, int64_t out, int bits, int threads) {
    const size_t bytes = (size_t)(out * in * bits / 8), groups = (size_t)(in + 127) / 128;
    int8_t *weight = buffer(bytes, 1), *tiles = buffer(bytes, 1), *again = buffer(bytes, 1);
    float *x = floats((size_t)(rows * in)), *bias = floats((size_t)out), *y = floats((size_t)(rows * out));
    double *largest = malloc(groups * sizeof *largest);
    if (!largest) exit(2);
    weight_pack(weight, tiles, out, in, bits, threads);
    weight_unpack(tiles, again, out, in, bits, threads);
    check(!memcmp(weight, again, bytes), "unpack", out, in, 0, bits);
    for (int type = TYPE_FLOAT32; type <= TYPE_FLOAT16; type++) {
        void *scale = scales(out, type);
        for (int activations = 0; activations < 3; activations++) {
            const float *some_bias = (type + activations) % 2 ? bias : NULL;
            if (linear(x, tiles, scale, type, some_bias, y, rows, in, out, bits, activations, threads)) exit(2);
            for (int64_t row = 0; row < rows; row++) {
                for (size_t g = 0; g < groups; g++) largest[g] = 0;
                for (int64_t i = 0; i < in; i++) largest[i / 128] = fmax(largest[i / 128], fabsf(x[row * in + i]));
                for (int64_t o = 0; o < out; o++) {
                    double sum = 0, bound = 0, size = 0;
                    for (int64_t i = 0; i < in; i++) {
                        double value = x[row * in + i], w = weight_at(weight, o, i, in, bits);
                        sum += value * w;
                        size += fabs(value * w);
                        double step[] = {largest[i / 128] / 127, fabs(value) / 128, largest[i / 128] / (127 * 254)};
                        bound += fabs(w) * step[activations] / 2;
                    }
                    double s = scale_at(scale, o, type), start = some_bias ? some_bias[o] : 0;
                    double error = fabs(y[row * out + o] - (sum * s + start));
                    check(error <= fabs(s) * (bound + 1e-5 * size) + 1e-5 * (fabs(start) + 1), "linear", rows, in, out, bits);
                }
            }
        }
        float *grad = floats((size_t)(rows * out)), *back = floats((size_t)(rows * in));
        if (linear_back(grad, tiles, back, rows, in, out, bits, threads)) exit(2);
        for (int64_t i = 0; i < rows * in; i++) {
            double sum = 0, size = 0;
            for (int64_t o = 0; o < out; o++) {
                double product = (double)grad[i / in * out + o] * weight_at(weight, o, i % in, in, bits);
                sum += product, size += fabs(product);
            }
            check(fabs(back[i] - sum) <= size / 256 + 1e-6, "linear_back", rows, in, out, bits);
        }
        release(grad, 4), release(back, 4);
        int64_t *ids = buffer((size_t)rows, 8);
        float *table = floats((size_t)(rows * in));
        for (int64_t i = 0; i < rows; i++) ids[i] = (int64_t)(draw() % (uint32_t)out);
        embedding(ids, rows, tiles, scale, type, table, out, in, bits, threads);
        for (int64_t i = 0; i < rows * in; i++) {
            double expected = scale_at(scale, ids[i / in], type) * weight_at(weight, ids[i / in], i % in, in, bits);
            check(fabs(table[i] - expected) <= 1e-6 * fabs(expected), "embedding", rows, in, out, bits);
        }
        release(ids, 8), release(table, 4), release(scale, type == TYPE_FLOAT32 ? 4 : 2);
    }
    release(weight, 1), release(tiles, 1), release(again, 1), release(x, 4), release(bias, 4), release(y, 4);
    free(largest);
}

static double number_at(const void *values, int64_t i, int type) {
    if (type == TYPE_FLOAT32) return ((const float *)values)[i];
    uint16_t bits = ((const uint16_t *)values)[i];
    return type == TYPE_FLOAT16 ? half_to_float(bits) : bf16_to_float(bits);
}

static void *numbers(size_t count, int type) {
    if (type == TYPE_FLOAT32) return floats(count);
    uint16_t *values = buffer(count, 2);
    for (size_t i = 0; i < count; i++) /* sign and fraction at random, exponent of 0.5 to 1 */
        values[i] = (uint16_t)(type == TYPE_FLOAT16 ? (values[i] & 0x83ff) | 0x3800 : (values[i] & 0x807f) | 0x3f00);
    return values;
}

/* visible: 0 = no mask, 1 = about half of the keys, 2 = none in the first row of the batch */
static void run_attention(int64_t heads, int64_t length, int64_t dim, int type, int visible, int threads) {
    const int64_t batch = 2, room = length + 3; /* a cache that is not full */
    const int64_t strides[8] = {heads * dim, dim, heads * room * dim, room * dim, dim, room * heads * dim, dim, heads * dim};
    const size_t used = (size_t)(batch * heads * room * dim), size = type == TYPE_FLOAT32 ? 4 : 2;
    float *query = floats((size_t)(batch * heads * dim)), *y = floats((size_t)(batch * heads * dim));
    void *key = numbers(used, type), *value = numbers(used, type);
    uint8_t *mask = buffer((size_t)(batch * length), 1);
    double *weight = malloc((size_t)length * sizeof *weight);
    if (!weight) exit(2);
    for (int64_t i = 0; i < batch * length; i++) mask[i] = visible == 2 ? i >= length : draw() % 2;
    const float scaling = 0.3f;
    attention_decode(query, key, value, type, visible ? mask : NULL, y, batch, heads, length, dim, strides, scaling, threads);
    for (int64_t row = 0; row < batch; row++)
        for (int64_t head = 0; head < heads; head++) {
            double top = -INFINITY, total = 0;
            int blind = visible != 0;
            for (int64_t i = 0; visible && i < length; i++) blind = blind && !mask[row * length + i];
            for (int64_t i = 0; i < length; i++) {
                double score = 0;
                for (int64_t d = 0; d < dim; d++)
                    score += query[row * strides[0] + head * strides[1] + d] *
                             number_at(key, row * strides[2] + head * strides[3] + i * strides[4] + d, type);
                weight[i] = blind ? 0 : visible && !mask[row * length + i] ? -INFINITY : score * scaling;
                top = fmax(top, weight[i]);
            }
            for (int64_t i = 0; i < length; i++) total += weight[i] = exp(weight[i] - top);
            for (int64_t d = 0; d < dim; d++) {
                double expected = 0;
                for (int64_t i = 0; i < length; i++)
                    expected += weight[i] / total *
                                number_at(value, row * strides[5] + head * strides[6] + i * strides[7] + d, type);
                check(fabs(y[(row * heads + head) * dim + d] - expected) < 1e-4, "attention", heads, length, dim, type);
            }
        }
    release(query, 4), release(y, 4), release(key, size), release(value, size), release(mask, 1);
    free(weight);
}

/* Widths, of the states and inside. */
typedef struct {
    int64_t width, heads, dim, inner;
} Shape;

/* Weights that keep the size of what they multiply. */
static Matrix matrix(int64_t out, int64_t in, int bits, int activations, int scale_type, int has_bias) {
    int8_t *weight = buffer((size_t)(out * in * bits / 8), 1), *tiles = buffer((size_t)(out * in * bits / 8), 1);
    weight_pack(weight, tiles, out, in, bits, 2);
    release(weight, 1);
    void *scale = buffer((size_t)out, scale_type == TYPE_FLOAT32 ? 4 : 2);
    for (int64_t i = 0; i < out; i++) {
        float value = (float)(0.5 + draw() % 100 / 100.0) / (sqrtf((float)in) * (bits == 4 ? 5 : 74));
        if (scale_type == TYPE_FLOAT32)
            ((float *)scale)[i] = value;
        else
            ((uint16_t *)scale)[i] = float_to_half(value);
    }
    return (Matrix){tiles, scale, has_bias ? floats((size_t)out) : NULL, out, in, scale_type, bits, activations};
}

static void release_matrix(Matrix *m) {
    release((void *)m->tiles, 1), release((void *)m->scale, m->scale_type == TYPE_FLOAT32 ? 4 : 2);
    if (m->bias) release((void *)m->bias, 4);
}

static float *product(const Matrix *m, const float *x, int64_t rows) {
    float *y = floats((size_t)(rows * m->out));
    if (linear(x, m->tiles, m->scale, m->scale_type, m->bias, y, rows, m->in, m->out, m->bits, m->activations, 1)) exit(2);
    return y;
}

/* y = norm(x + alpha * added), in double; added may be NULL */
static void norm_row(const float *x, const float *added, double alpha, const Norm *norm, double *y, int64_t n) {
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < n; i++) mean += (y[i] = x[i] + (added ? alpha * added[i] : 0)) / (double)n;
    for (int64_t i = 0; i < n; i++) variance += (y[i] - mean) * (y[i] - mean) / (double)n;
    for (int64_t i = 0; i < n; i++) y[i] = (y[i] - mean) / sqrt(variance + norm->epsilon) * norm->weight[i] + norm->bias[i];
}

static void check_start(const Layer *layer, const float *x, const float *cos, const float *sin, int64_t part,
                        const float *normed, const float *mixed, int64_t rows) {
    const int64_t width = layer->query_key_value.in, out = layer->query_key_value.out, dim = out / layer->heads / 3;
    float *plain = product(&layer->query_key_value, normed, rows);
    double *expected = malloc((size_t)width * sizeof *expected);
    if (!expected) exit(2);
    for (int64_t row = 0; row < rows; row++) {
        norm_row(x + row * width, NULL, 0, &layer->input_norm, expected, width);
        for (int64_t i = 0; i < width; i++)
            check(fabs(normed[row * width + i] - expected[i]) < 1e-5, "norm", rows, width, i, 0);
        for (int64_t i = 0; i < out; i++) {
            const int64_t place = i % dim, pair = (place % part) < part / 2 ? i + part / 2 : i - part / 2;
            double value = plain[row * out + i];
            if (i / dim % 3 < 2 && part > 1) {
                double other = plain[row * out + pair] * (double)sin[row * dim + place];
                value = value * cos[row * dim + place] + (pair > i ? -other : other);
            }
            check(fabs(mixed[row * out + i] - value) <= 1e-6 * (fabs(value) + 8), "start", rows, width, i, 0);
        }
    }
    release(plain, 4), free(expected);
}

static void check_finish(const Layer *layer, const float *attended, const float *normed, const float *y, int64_t rows) {
    const int64_t width = layer->dense.out, inner = layer->up.out;
    float *dense = product(&layer->dense, attended, rows), *states = floats((size_t)(rows * width));
    double *state = malloc((size_t)(rows * width) * sizeof *state);
    if (!state) exit(2);
    for (int64_t row = 0; row < rows; row++)
        norm_row(dense + row * width, normed + row * width, layer->alpha, &layer->post_attention_norm, state + row * width, width);
    for (int64_t i = 0; i < rows * width; i++) states[i] = (float)state[i];
    float *wide = product(&layer->up, states, rows);
    for (int64_t i = 0; i < rows * inner; i++) {
        double u = 0.7978845608028654 * (wide[i] + 0.044715 * pow(wide[i], 3));
        wide[i] = (float)(0.5 * wide[i] * (1 + tanh(u)));
    }
    float *down = product(&layer->down, wide, rows);
    for (int64_t i = 0; i < rows * width; i++) { /* a number of the products may be rounded to the step beside */
        double expected = down[i] + layer->alpha * state[i];
        check(fabs(y[i] - expected) < 0.02 * (fabs(expected) + 5), "finish", rows, width, i, layer->up.activations);
    }
    release(dense, 4), release(states, 4), release(wide, 4), release(down, 4), free(state);
}

/* The step in one call, and in its parts: the same bits. */
static void check_step(const Layer *layer, const float *x, const float *cos, const float *sin, int64_t part, int64_t batch,
                       int64_t length, int64_t room, int type, int masked, int threads) {
    const int64_t width = layer->dense.out, heads = layer->heads, inside = layer->dense.in, dim = inside / heads;
    const int64_t strides[] = {heads * room * dim, room * dim, dim, room * heads * dim, dim, heads * dim};
    const int64_t all[] = {3 * inside, 3 * dim, strides[0], strides[1], strides[2], strides[3], strides[4], strides[5]};
    const size_t used = (size_t)(batch * heads * room * dim), size = type == TYPE_FLOAT32 ? 4 : 2;
    void *key = numbers(used, type), *value = numbers(used, type), *keys = buffer(used, size), *values = buffer(used, size);
    memcpy(keys, key, used * size), memcpy(values, value, used * size);
    uint8_t *mask = buffer((size_t)(batch * length), 1);
    for (int64_t i = 0; i < batch * length; i++) mask[i] = draw() % 2;
    float *normed = floats((size_t)(batch * width)), *mixed = floats((size_t)(batch * 3 * inside));
    float *attended = floats((size_t)(batch * inside)), *y = floats((size_t)(batch * width));
    if (layer_step(layer, x, cos, sin, part, keys, values, type, masked ? mask : NULL, strides, y, batch, length, threads)) exit(2);
    if (layer_start(layer, x, cos, sin, part, normed, mixed, batch, 1)) exit(2);
    for (int64_t i = 0; i < batch * inside; i++) {
        const int64_t row = i / inside, head = i / dim % heads, d = i % dim;
        for (int kind = 1; kind < 3; kind++) {
            const int64_t *stride = strides + 3 * (kind - 1);
            const int64_t place = row * stride[0] + head * stride[1] + (length - 1) * stride[2] + d;
            const float number = mixed[row * 3 * inside + (3 * head + kind) * dim + d];
            void *to = kind == 1 ? key : value;
            if (type == TYPE_FLOAT32)
                ((float *)to)[place] = number;
            else
                ((uint16_t *)to)[place] = type == TYPE_FLOAT16 ? float_to_half(number) : float_to_bf16(number);
        }
    }
    attention_decode(mixed, key, value, type, masked ? mask : NULL, attended, batch, heads, length, dim, all, layer->scaling, 1);
    if (layer_finish(layer, attended, normed, normed, batch, 1)) exit(2);
    check(!memcmp(keys, key, used * size) && !memcmp(values, value, used * size), "store", batch, length, dim, type);
    check(!memcmp(y, normed, (size_t)(batch * width) * 4), "step", batch, length, dim, type);
    release(key, size), release(value, size), release(keys, size), release(values, size), release(mask, 1);
    release(normed, 4), release(mixed, 4), release(attended, 4), release(y, 4);
}

static void run_layer(Shape shape, int64_t rows, int bits, int turn) {
    const int64_t width = shape.width, inside = shape.heads * shape.dim, dim = shape.dim;
    const int activations = turn % 3, scale_type = turn / 2 % 2, has_bias = turn % 2, threads = 1 + turn % 2;
    const int64_t part = dim % 4 == 0 && turn % 5 < 3 ? dim / 2 : dim;
    const size_t states = (size_t)(rows * width);
    Layer layer = {
        {floats((size_t)width), floats((size_t)width), 1e-5f},
        {floats((size_t)width), floats((size_t)width), 1e-5f},
        matrix(3 * inside, width, bits, activations, scale_type, has_bias),
        matrix(width, inside, bits, activations, scale_type, has_bias),
        matrix(shape.inner, width, bits, activations, scale_type, has_bias),
        matrix(width, shape.inner, bits, activations, scale_type, has_bias),
        shape.heads, 7.5f, 0.3f,
    };
    float *x = floats(states), *normed = floats(states), *mixed = floats(states / (size_t)width * (size_t)(3 * inside));
    float *cos = floats((size_t)(rows * dim)), *sin = floats((size_t)(rows * dim)), *y = floats(states);
    float *attended = floats((size_t)(rows * inside));
    if (layer_start(&layer, x, cos, sin, part, normed, mixed, rows, threads)) exit(2);
    check_start(&layer, x, cos, sin, part, normed, mixed, rows);
    if (layer_finish(&layer, attended, normed, y, rows, threads)) exit(2);
    check_finish(&layer, attended, normed, y, rows);
    if (layer_finish(&layer, attended, normed, normed, rows, threads)) exit(2);
    check(!memcmp(normed, y, states * 4), "finish in place", rows, width, 0, bits);
    if (rows <= 3)
        for (int type = TYPE_FLOAT32; type <= TYPE_BFLOAT16; type++) {
            const int64_t length = type == turn % 3 ? 1 : 60 + turn % 10; /* in a full cache, or in one with room */
            check_step(&layer, x, cos, sin, part, rows, length, length + turn % 2 * 3, type, turn % 4 > 1, threads);
        }
    release(x, 4), release(normed, 4), release(mixed, 4), release(cos, 4), release(sin, 4), release(y, 4), release(attended, 4);
    for (const Norm *norm = &layer.input_norm; norm <= &layer.post_attention_norm; norm++)
        release((void *)norm->weight, 4), release((void *)norm->bias, 4);
    for (Matrix *m = &layer.query_key_value; m <= &layer.down; m++) release_matrix(m);
}

/* Double holds every float, every half, and every quotient by a power of two. */
static void check_half(float value) {
    const uint16_t half = float_to_half(value);
    const uint32_t bits = bits_from_float(value);
    check(half >> 15 == bits >> 31, "sign of half", bits, half, 0, 0);
    if (isnan(value)) {
        check((half & 0x7fff) > 0x7c00, "NaN as half", bits, half, 0, 0);
        return;
    }
    double size = fabs(value), rounded = INFINITY;
    if (size < 65520) { /* halfway from the largest half to the one that would follow */
        double step = ldexp(1, (size < ldexp(1, -14) ? -14 : ilogb(size)) - 10);
        rounded = nearbyint(size / step) * step; /* to even */
    }
    check(fabs(half_to_float(half)) == rounded, "half", bits, half, 0, 0);
}

static void run_half(void) {
    for (uint64_t bits = 0; bits < 1ull << 32; bits += 99991) check_half(float_from_bits((uint32_t)bits));
    for (int half = 0; half < 0x10000; half++) {
        const float value = half_to_float((uint16_t)half);
        check_half(value);
        if (isnan(value)) continue;
        check(float_to_half(value) == half, "half and back", half, 0, 0, 0);
        /* The middle between it and the next one: exact in float, which has 13 bits more; and the floats beside. */
        const uint32_t middle = bits_from_float((float)((value + (double)half_to_float((uint16_t)(half + 1))) / 2));
        for (uint32_t bits = middle - 1; bits != middle + 2; bits++) check_half(float_from_bits(bits));
    }
    for (uint32_t bits = 0x477fefff; bits < 0x477ff002; bits++) check_half(float_from_bits(bits)); /* about 65520 */
}

int main(int count, char **names) {
    static const int widths[] = {1, 2, 3, 5, 7, 8, 10, 31, 34, 64, 66, 126, 128, 130, 254, 264, 391};
    static const int outs[] = {1, 2, 15, 16, 17, 33, 50}, batches[] = {1, 2, 3, 4, 7, 13};
    static const int lengths[] = {1, 2, 15, 17, 63, 64, 65, 130}, dims[] = {1, 2, 7, 8, 16, 24, 33, 64, 128};
#define EACH(name, list) for (size_t name = 0; name < sizeof list / sizeof *list; name++)
    static const Shape shapes[] = {{6, 1, 4, 10}, {2, 1, 2, 2}, {36, 3, 20, 100}, {130, 2, 8, 50}, {34, 1, 128, 264}, {17, 1, 4, 33}};
    static const int row_counts[] = {1, 2, 3, 5, 14};
    run_half();
    for (int n = 1; n < count; n++) {
        if (kernels_set_variant(names[n])) continue;
        int turn = 0;
        for (int bits = 4; bits <= 8; bits += 4) {
            EACH(w, widths) EACH(o, outs) {
                if (bits == 4 && widths[w] % 2) continue;
                EACH(b, batches) if (batches[b] == 1 || turn++ % 3 == 0) /* a third of the combinations of three */
                    run_linear(batches[b], widths[w], outs[o], bits, 1 + turn % 3);
            }
            run_linear(250, 34, 17, bits, 2); /* more rows than are prepared at once */
        }
        EACH(l, lengths) EACH(d, dims)
            for (int type = TYPE_FLOAT32; type <= TYPE_BFLOAT16; type++, turn++)
                run_attention(1 + turn % 4, lengths[l], dims[d], type, turn % 5 % 3, 1 + turn % 2);
        turn = 0;
        for (int bits = 4; bits <= 8; bits += 4) EACH(i, shapes) {
            if (bits == 4 && shapes[i].width % 2) continue;
            EACH(r, row_counts)
                for (int repeat = 0; repeat < 2; repeat++) run_layer(shapes[i], row_counts[r], bits, turn++);
        }
        run_layer(shapes[2], 300, 4, turn); /* more rows than are worked on together */
        printf("%s\n", names[n]);
    }
    return 0;
}
