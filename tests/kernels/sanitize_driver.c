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

int main(int count, char **names) {
    static const int widths[] = {1, 2, 3, 5, 7, 8, 10, 31, 34, 64, 66, 126, 128, 130, 254, 264, 391};
    static const int outs[] = {1, 2, 15, 16, 17, 33, 50}, batches[] = {1, 2, 3, 4, 7, 13};
    static const int lengths[] = {1, 2, 15, 17, 63, 64, 65, 130}, dims[] = {1, 2, 7, 8, 16, 24, 33, 64};
#define EACH(name, list) for (size_t name = 0; name < sizeof list / sizeof *list; name++)
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
        printf("%s\n", names[n]);
    }
    return 0;
}
