/* One layer of the network, whole for one new token, and in two parts around the attention for a prompt.
 *
 * layer_start   normed = norm(x);  mixed = query_key_value(normed), queries and keys rotated to their positions
 * layer_finish  normed' = norm(dense(attended) + alpha * normed);  y = down(gelu(up(normed'))) + alpha * normed'
 * layer_step    both, and between them the new keys and values go to the end of the cache, and attention_decode
 *
 * Truth         ChatGLMBlock in modeling_chatglm.py, to float32 rounding and what the activations of linear.c round
 * Why C         beside INT4 products the small operations of torch, and Python between them, take a fifth of a step of
 *               one token; for a long prompt they write every intermediate result to memory, where here a few hundred
 *               rows at a time stay in cache and nothing is held for the rest (benchmarks/README.md)
 *
 * Each row is computed by one thread in one order, so the number of threads never changes a result. */
#include "kernels.h"

enum { WIDTH = 16 }; /* partial sums, which make vectors of a sum */

/* The loops over one row, compiled for each instruction set.
 *   norm    y = (x + alpha * added - mean) / sqrt(variance + epsilon) * weight + bias; added may be NULL, y may be x
 *   rotate  channel i of each part of the head turns with channel i + part / 2; cos, sin [dim]
 *   gelu    x = 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))      Source: GELU (arXiv 1606.08415), section 2
 *   add     y += alpha * x
 *   store   x rounded to kv_type */
typedef struct {
    void (*norm)(const float *x, const float *added, float alpha, const Norm *norm, float *y, int64_t n);
    void (*rotate)(float *head, const float *cos, const float *sin, int64_t dim, int64_t part);
    void (*gelu)(float *x, int64_t n);
    void (*add)(float *y, const float *x, float alpha, int64_t n);
    void (*store)(const float *x, void *y, int64_t n, int type);
} Form;

INLINE float total(const float *sums) {
    float sum = 0;
    for (int lane = 0; lane < WIDTH; lane++) sum += sums[lane];
    return sum;
}

INLINE void norm_of(const float *x, const float *added, float alpha, const Norm *norm, float *y, int64_t n) {
    float sums[WIDTH] = {0}, squares[WIDTH] = {0};
    int64_t whole = n / WIDTH * WIDTH;
    for (int64_t i = 0; i < n; i++) y[i] = added ? x[i] + alpha * added[i] : x[i];
    for (int64_t i = 0; i < whole; i += WIDTH)
        for (int lane = 0; lane < WIDTH; lane++) sums[lane] += y[i + lane];
    for (int64_t i = whole; i < n; i++) sums[i - whole] += y[i];
    const float mean = total(sums) / (float)n;
    for (int64_t i = 0; i < whole; i += WIDTH)
        for (int lane = 0; lane < WIDTH; lane++) squares[lane] += (y[i + lane] - mean) * (y[i + lane] - mean);
    for (int64_t i = whole; i < n; i++) squares[i - whole] += (y[i] - mean) * (y[i] - mean);
    const float scale = 1 / sqrtf(total(squares) / (float)n + norm->epsilon);
    for (int64_t i = 0; i < n; i++) y[i] = (y[i] - mean) * scale * norm->weight[i] + norm->bias[i];
}

INLINE void rotate_of(float *restrict head, const float *cos, const float *sin, int64_t dim, int64_t part) {
    const int64_t half = part / 2;
    for (int64_t start = 0; start < dim; start += part)
        for (int64_t i = start; i < start + half; i++) {
            float first = head[i], second = head[i + half];
            head[i] = first * cos[i] - second * sin[i];
            head[i + half] = second * cos[i + half] + first * sin[i + half];
        }
}

/* x / (1 + exp(-2u)) is the same as 0.5 x (1 + tanh(u)). */
INLINE void gelu_of(float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float value = x[i], twice = value * (1.59576912f + 0.07135481f * value * value);
        float power = exp_negative(-fabsf(twice)), factor = twice < 0 ? power : 1;
        x[i] = value * factor / (1 + power);
    }
}

INLINE void add_of(float *restrict y, const float *x, float alpha, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] += alpha * x[i];
}

INLINE void store_from(const float *x, void *y, int64_t first, int64_t n, int type) {
    for (int64_t i = first; i < n; i++) {
        if (type == TYPE_FLOAT32)
            ((float *)y)[i] = x[i];
        else
            ((uint16_t *)y)[i] = type == TYPE_FLOAT16 ? float_to_half(x[i]) : float_to_bf16(x[i]);
    }
}

static void store_plain(const float *x, void *y, int64_t n, int type) { store_from(x, y, 0, n, type); }

#ifdef KERNELS_X86
static TARGET_AVX2 void store_avx2(const float *x, void *y, int64_t n, int type) {
    int64_t whole = type == TYPE_FLOAT16 ? n / 8 * 8 : 0;
    for (int64_t i = 0; i < whole; i += 8)
        _mm_storeu_si128((__m128i *)((uint16_t *)y + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    store_from(x, y, whole, n, type);
}
#endif

#define FORM(name, target, store)                                                                                      \
    static target void norm_##name(const float *x, const float *added, float alpha, const Norm *norm, float *y, \
                                   int64_t n) {                                                                 \
        norm_of(x, added, alpha, norm, y, n);                                                                   \
    }                                                                                                           \
    static target void rotate_##name(float *head, const float *cos, const float *sin, int64_t dim, int64_t part) { \
        rotate_of(head, cos, sin, dim, part);                                                                   \
    }                                                                                                           \
    static target void gelu_##name(float *x, int64_t n) { gelu_of(x, n); }                                      \
    static target void add_##name(float *y, const float *x, float alpha, int64_t n) { add_of(y, x, alpha, n); } \
    static const Form form_##name = {norm_##name, rotate_##name, gelu_##name, add_##name, store};

FORM(plain, , store_plain)
#ifdef KERNELS_X86
FORM(avx2, TARGET_AVX2, store_avx2)
FORM(avx512, TARGET_AVX512, store_avx2)
#endif

static const Form *form_for_level(void) {
#ifdef KERNELS_X86
    if (kernels_level() >= LEVEL_AVX512) return &form_avx512;
    if (kernels_level() >= LEVEL_AVX2) return &form_avx2;
#endif
    return &form_plain;
}

static int multiply(const Matrix *matrix, const float *x, float *y, int64_t rows, int threads) {
    return linear(x, matrix->tiles, matrix->scale, matrix->scale_type, matrix->bias, y, rows, matrix->in, matrix->out,
                  matrix->bits, matrix->activations, threads);
}

/* layer_start
 *   x, normed  float32 [rows, hidden_size], not overlapping
 *   mixed      float32 [rows, heads, 3, head_dim]: query, key and value of each head
 *   cos, sin   float32 [rows, head_dim]; channels i and i + part / 2 of each `part` of them turn together
 * Returns 0, or -1 if there is no memory. */
int layer_start(const Layer *layer, const float *x, const float *cos, const float *sin, int64_t part, float *normed,
                float *mixed, int64_t rows, int threads) {
    const Form *form = form_for_level();
    const int64_t in = layer->query_key_value.in, out = layer->query_key_value.out, dim = out / layer->heads / 3;
    OMP(omp parallel for num_threads(threads) if (rows > FEW_ROWS))
    for (int64_t row = 0; row < rows; row++)
        form->norm(x + row * in, NULL, 0, &layer->input_norm, normed + row * in, in);
    if (multiply(&layer->query_key_value, normed, mixed, rows, threads)) return -1;
    OMP(omp parallel for num_threads(threads) if (rows > FEW_ROWS))
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < layer->heads; head++)
            for (int64_t kind = 0; kind < 2; kind++) /* query, key */
                form->rotate(mixed + row * out + (3 * head + kind) * dim, cos + row * dim, sin + row * dim, dim, part);
    return 0;
}

/* layer_finish
 *   attended   float32 [rows, dense.in];  normed float32 [rows, hidden_size], from layer_start
 *   y          float32 [rows, hidden_size], may be normed but not attended
 * Returns 0, or -1 if there is no memory (y is not complete then). */
int layer_finish(const Layer *layer, const float *attended, const float *normed, float *y, int64_t rows, int threads) {
    const Form *form = form_for_level();
    const int64_t width = layer->dense.out, inner = layer->up.out, most = rows < ROWS_AT_ONCE ? rows : ROWS_AT_ONCE;
    float *states = malloc((size_t)(most * (width + inner)) * sizeof *states + 1), *wide = states + most * width;
    int failed = !states;
    for (int64_t first = 0; first < rows && !failed; first += most) {
        const int64_t count = rows - first < most ? rows - first : most;
        const float *residual = normed + first * width;
        float *result = y + first * width;
        if ((failed = multiply(&layer->dense, attended + first * layer->dense.in, states, count, threads))) break;
        OMP(omp parallel for num_threads(threads) if (count > FEW_ROWS))
        for (int64_t row = 0; row < count; row++) {
            float *state = states + row * width;
            form->norm(state, residual + row * width, layer->alpha, &layer->post_attention_norm, state, width);
        }
        if ((failed = multiply(&layer->up, states, wide, count, threads))) break;
        OMP(omp parallel for num_threads(threads) if (count > FEW_ROWS))
        for (int64_t row = 0; row < count; row++) form->gelu(wide + row * inner, inner);
        if ((failed = multiply(&layer->down, wide, result, count, threads))) break;
        OMP(omp parallel for num_threads(threads) if (count > FEW_ROWS))
        for (int64_t row = 0; row < count; row++)
            form->add(result + row * width, states + row * width, layer->alpha, width);
    }
    free(states);
    return failed ? -1 : 0;
}

/* layer_step
 *   x, y, cos, sin, part   as above, one row for each sequence of the batch; y may be x
 *   key, value, mask       as in attention_decode, kv_len counts the new token; its place, the last, is written here
 *   strides                in elements: key batch, head, position;  value batch, head, position
 * Returns 0, or -1 if there is no memory. */
int layer_step(const Layer *layer, const float *x, const float *cos, const float *sin, int64_t part, void *key,
               void *value, int kv_type, const uint8_t *mask, const int64_t *strides, float *y, int64_t batch,
               int64_t kv_len, int threads) {
    const Form *form = form_for_level();
    const int64_t width = layer->query_key_value.in, out = layer->query_key_value.out, heads = layer->heads;
    const int64_t dim = out / heads / 3, bytes = kv_type == TYPE_FLOAT32 ? 4 : 2;
    float *normed = malloc((size_t)(batch * (width + out + out / 3)) * sizeof *normed + 1);
    if (!normed) return -1;
    float *mixed = normed + batch * width, *attended = mixed + batch * out;
    int failed = layer_start(layer, x, cos, sin, part, normed, mixed, batch, threads);
    if (!failed) {
        for (int64_t row = 0; row < batch; row++)
            for (int64_t head = 0; head < heads; head++) {
                const float *states = mixed + row * out + 3 * head * dim;
                int64_t place = row * strides[0] + head * strides[1] + (kv_len - 1) * strides[2];
                form->store(states + dim, (char *)key + place * bytes, dim, kv_type);
                place = row * strides[3] + head * strides[4] + (kv_len - 1) * strides[5];
                form->store(states + 2 * dim, (char *)value + place * bytes, dim, kv_type);
            }
        const int64_t all_strides[] = {out,        3 * dim,    strides[0], strides[1],
                                       strides[2], strides[3], strides[4], strides[5]};
        attention_decode(mixed, key, value, kv_type, mask, attended, batch, heads, kv_len, dim, all_strides,
                         layer->scaling, threads);
        failed = layer_finish(layer, attended, normed, y, batch, threads);
    }
    free(normed);
    return failed;
}
