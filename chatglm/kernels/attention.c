/* attention_decode: softmax(query . keys * scaling) . values for one query per head, in one pass over keys and values.
 *   query, y    float32 [batch, heads, head_dim], y contiguous;  batch and head strides of query are given
 *   key, value  [batch, heads, kv_len, head_dim] in kv_type, any strides but 1 for the last
 *   mask        [batch, kv_len], 1 = visible, 0 = not read at all;  NULL = everything is visible
 *   strides     in elements: query batch, head;  key batch, head, position;  value batch, head, position
 * A row of the mask without a visible key weighs all keys alike.  The result does not depend on the number of threads.
 * Truth: eager_attention_forward in modeling_chatglm.py, to float32 rounding.   Why C: torch converts a float16 cache
 * to float32 first, and its attention with one query reads memory at a fraction of the bandwidth.
 * Source: "Online normalizer calculation for softmax" (arXiv 1805.02867), algorithm 3, in blocks of KEYS positions. */
#include "kernels.h"

enum { KEYS = 64 };

/* One head; steps are the bytes from one position to the next. */
typedef struct {
    const float *query;
    const char *key, *value;
    int64_t key_step, value_step, dim;
    float scaling;
    float *y;
} Head;

/* A form of the three inner loops for one instruction set and one kv_type.  index: the visible positions of a block.
 *   score   score[i] = query . key[index[i]] * scaling, returns the largest
 *   weigh   score[i] = exp(score[i] - largest), returns their sum
 *   mix     y += sum over i of score[i] * value[index[i]] */
typedef struct {
    float (*score)(const Head *head, const int64_t *index, int count, float *score);
    float (*weigh)(float *score, int count, float largest);
    void (*mix)(const Head *head, const int64_t *index, int count, const float *score);
} Form;

INLINE float load(const void *row, int64_t i, int type) {
    if (type == TYPE_FLOAT32) return ((const float *)row)[i];
#ifdef __ARM_FP16_FORMAT_IEEE
    if (type == TYPE_FLOAT16) return ((const __fp16 *)row)[i];
#endif
    uint16_t bits = ((const uint16_t *)row)[i];
    return type == TYPE_FLOAT16 ? half_to_float(bits) : bf16_to_float(bits);
}

INLINE int64_t size_of(int64_t dim, int type) { return dim * (type == TYPE_FLOAT32 ? 4 : 2); }

/* Into second-level cache.  While keys are read the values of their block are fetched, and then the keys of the next:
 * 1.2 to 1.7 times as fast, as memory and arithmetic would wait for each other.  Beyond the last row it is harmless. */
INLINE void fetch(const char *base, int64_t offset, int64_t size) {
    uintptr_t start = (uintptr_t)base + (uintptr_t)offset; /* not a pointer: it may lie outside of the tensor */
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch((const void *)(start + (uintptr_t)i), 0, 2);
}

INLINE float weigh(float *score, int count, float largest) {
    float sums[16] = {0};
    for (int i = count; i < (count + 15) / 16 * 16; i++) score[i] = -INFINITY;
    for (int i = 0; i < count; i += 16)
        for (int lane = 0; lane < 16; lane++) {
            score[i + lane] = exp_negative(score[i + lane] - largest);
            sums[lane] += score[i + lane];
        }
    float sum = 0;
    for (int lane = 0; lane < 16; lane++) sum += sums[lane];
    return sum;
}

/* Plain C ---------------------------------------------------------------------------------------------------------- */

/* Four floats are a register of SSE2 and NEON; compilers that have neither split them. */
typedef float Four __attribute__((vector_size(16)));

INLINE Four load4(const void *row, int64_t i, int type) {
    Four four;
    if (type == TYPE_FLOAT32)
        memcpy(&four, (const float *)row + i, sizeof four);
    else
        four = (Four){load(row, i, type), load(row, i + 1, type), load(row, i + 2, type), load(row, i + 3, type)};
    return four;
}

INLINE float score_plain(const Head *head, const int64_t *index, int count, float *score, int type) {
    const float *query = head->query;
    float largest = -INFINITY;
    for (int i = 0; i < count; i++) {
        const void *row = head->key + index[i] * head->key_step;
        Four even = {0}, odd = {0};
        int64_t d = 0;
        for (; d + 8 <= head->dim; d += 8) {
            even += load4(query, d, TYPE_FLOAT32) * load4(row, d, type);
            odd += load4(query, d + 4, TYPE_FLOAT32) * load4(row, d + 4, type);
        }
        even += odd;
        float sum = (even[0] + even[1]) + (even[2] + even[3]);
        for (; d < head->dim; d++) sum += query[d] * load(row, d, type);
        score[i] = sum * head->scaling;
        largest = score[i] > largest ? score[i] : largest;
    }
    return largest;
}

static float weigh_plain(float *score, int count, float largest) { return weigh(score, count, largest); }

/* From the entry `first` of each row on. */
INLINE void mix_from(const Head *head, const int64_t *index, int count, const float *score, int64_t first, int type) {
    float *restrict y = head->y;
    for (int i = 0; i < count; i++) {
        const void *row = head->value + index[i] * head->value_step;
        for (int64_t d = first; d < head->dim; d++) y[d] += score[i] * load(row, d, type);
    }
}

INLINE void mix_plain(const Head *head, const int64_t *index, int count, const float *score, int type) {
    mix_from(head, index, count, score, 0, type);
}

#ifdef KERNELS_X86
/* AVX2: 8 lanes ---------------------------------------------------------------------------------------------------- */

INLINE TARGET_AVX2 __m256 load8(const void *row, int64_t i, int type) {
    if (type == TYPE_FLOAT32) return _mm256_loadu_ps((const float *)row + i);
    __m128i bits = _mm_loadu_si128((const __m128i *)((const uint16_t *)row + i));
    if (type == TYPE_FLOAT16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

INLINE TARGET_AVX2 float score_avx2(const Head *head, const int64_t *index, int count, float *score, int type) {
    const float *query = head->query;
    float largest = -INFINITY;
    for (int i = 0; i < count; i++) {
        const void *row = head->key + index[i] * head->key_step;
        fetch(head->value, index[i] * head->value_step, size_of(head->dim, type));
        __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
        int64_t d = 0;
        for (; d + 16 <= head->dim; d += 16) {
            even = _mm256_fmadd_ps(_mm256_loadu_ps(query + d), load8(row, d, type), even);
            odd = _mm256_fmadd_ps(_mm256_loadu_ps(query + d + 8), load8(row, d + 8, type), odd);
        }
        even = _mm256_add_ps(even, odd);
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(even), _mm256_extractf128_ps(even, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        float sum = _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
        for (; d < head->dim; d++) sum += query[d] * load(row, d, type);
        score[i] = sum * head->scaling;
        largest = score[i] > largest ? score[i] : largest;
    }
    return largest;
}

static TARGET_AVX2 float weigh_avx2(float *score, int count, float largest) { return weigh(score, count, largest); }

/* 4 * 8 entries of y stay in registers while the positions pass by. */
INLINE TARGET_AVX2 void mix_avx2(const Head *head, const int64_t *index, int count, const float *score, int type) {
    int64_t d = 0;
    for (; d + 32 <= head->dim; d += 32) {
        float *y = head->y + d;
        __m256 sums[4];
        for (int j = 0; j < 4; j++) sums[j] = _mm256_loadu_ps(y + 8 * j);
        for (int i = 0; i < count; i++) {
            const void *row = head->value + index[i] * head->value_step;
            if (d == 0) fetch(head->key, (index[i] + KEYS) * head->key_step, size_of(head->dim, type));
            for (int j = 0; j < 4; j++)
                sums[j] = _mm256_fmadd_ps(_mm256_set1_ps(score[i]), load8(row, d + 8 * j, type), sums[j]);
        }
        for (int j = 0; j < 4; j++) _mm256_storeu_ps(y + 8 * j, sums[j]);
    }
    if (d < head->dim) mix_from(head, index, count, score, d, type);
}

/* AVX-512: 16 lanes, the last ones masked -------------------------------------------------------------------------- */

INLINE TARGET_AVX512 __mmask16 lanes_left(int64_t left) {
    return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
}

INLINE TARGET_AVX512 __m512 load16(const void *row, int64_t i, __mmask16 lanes, int type) {
    if (type == TYPE_FLOAT32) return _mm512_maskz_loadu_ps(lanes, (const float *)row + i);
    __m256i bits = _mm256_maskz_loadu_epi16(lanes, (const uint16_t *)row + i);
    if (type == TYPE_FLOAT16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* The usual width: the query, or y, stays in registers.  As fast as that, the processor's own prefetching serves better
 * than `fetch`: 1.3 times as fast as the loops for other widths. */
enum { WIDTH = 128, VECTORS = WIDTH / 16 };

INLINE TARGET_AVX512 float score_of_width(const Head *head, const int64_t *index, int count, float *score, int type) {
    __m512 query[VECTORS];
    float largest = -INFINITY;
    UNROLL for (int j = 0; j < VECTORS; j++) query[j] = _mm512_loadu_ps(head->query + 16 * j);
    for (int i = 0; i < count; i++) {
        const void *row = head->key + index[i] * head->key_step;
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        UNROLL for (int j = 0; j < VECTORS; j += 2) {
            even = _mm512_fmadd_ps(query[j], load16(row, 16 * j, 0xffff, type), even);
            odd = _mm512_fmadd_ps(query[j + 1], load16(row, 16 * j + 16, 0xffff, type), odd);
        }
        score[i] = _mm512_reduce_add_ps(_mm512_add_ps(even, odd)) * head->scaling;
        largest = score[i] > largest ? score[i] : largest;
    }
    return largest;
}

INLINE TARGET_AVX512 void mix_of_width(const Head *head, const int64_t *index, int count, const float *score, int type) {
    __m512 sums[VECTORS];
    UNROLL for (int j = 0; j < VECTORS; j++) sums[j] = _mm512_loadu_ps(head->y + 16 * j);
    for (int i = 0; i < count; i++) {
        const void *row = head->value + index[i] * head->value_step;
        const __m512 weight = _mm512_set1_ps(score[i]);
        UNROLL for (int j = 0; j < VECTORS; j++)
            sums[j] = _mm512_fmadd_ps(weight, load16(row, 16 * j, 0xffff, type), sums[j]);
    }
    UNROLL for (int j = 0; j < VECTORS; j++) _mm512_storeu_ps(head->y + 16 * j, sums[j]);
}

INLINE TARGET_AVX512 float score_avx512(const Head *head, const int64_t *index, int count, float *score, int type) {
    if (head->dim == WIDTH) return score_of_width(head, index, count, score, type);
    const float *query = head->query;
    float largest = -INFINITY;
    for (int i = 0; i < count; i++) {
        const void *row = head->key + index[i] * head->key_step;
        fetch(head->value, index[i] * head->value_step, size_of(head->dim, type));
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        int64_t d = 0;
        for (; d + 32 <= head->dim; d += 32) {
            even = _mm512_fmadd_ps(_mm512_loadu_ps(query + d), load16(row, d, 0xffff, type), even);
            odd = _mm512_fmadd_ps(_mm512_loadu_ps(query + d + 16), load16(row, d + 16, 0xffff, type), odd);
        }
        for (; d < head->dim; d += 16) {
            __mmask16 lanes = lanes_left(head->dim - d);
            even = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(lanes, query + d), load16(row, d, lanes, type), even);
        }
        score[i] = _mm512_reduce_add_ps(_mm512_add_ps(even, odd)) * head->scaling;
        largest = score[i] > largest ? score[i] : largest;
    }
    return largest;
}

static TARGET_AVX512 float weigh_avx512(float *score, int count, float largest) {
    return weigh(score, count, largest);
}

/* 4 * 16 entries of y stay in registers while the positions pass by. */
INLINE TARGET_AVX512 void mix_avx512(const Head *head, const int64_t *index, int count, const float *score, int type) {
    int64_t d = 0;
    if (head->dim == WIDTH) {
        mix_of_width(head, index, count, score, type);
        d = WIDTH;
    }
    for (; d + 64 <= head->dim; d += 64) {
        float *y = head->y + d;
        __m512 sums[4];
        for (int j = 0; j < 4; j++) sums[j] = _mm512_loadu_ps(y + 16 * j);
        for (int i = 0; i < count; i++) {
            const void *row = head->value + index[i] * head->value_step;
            if (d == 0) fetch(head->key, (index[i] + KEYS) * head->key_step, size_of(head->dim, type));
            for (int j = 0; j < 4; j++)
                sums[j] = _mm512_fmadd_ps(_mm512_set1_ps(score[i]), load16(row, d + 16 * j, 0xffff, type), sums[j]);
        }
        for (int j = 0; j < 4; j++) _mm512_storeu_ps(y + 16 * j, sums[j]);
    }
    for (; d < head->dim; d += 16) {
        __mmask16 lanes = lanes_left(head->dim - d);
        __m512 sum = _mm512_maskz_loadu_ps(lanes, head->y + d);
        for (int i = 0; i < count; i++) {
            const void *row = head->value + index[i] * head->value_step;
            sum = _mm512_fmadd_ps(_mm512_set1_ps(score[i]), load16(row, d, lanes, type), sum);
        }
        _mm512_mask_storeu_ps(head->y + d, lanes, sum);
    }
}
#endif

/* The forms -------------------------------------------------------------------------------------------------------- */

#define FORM(name, target, type)                                                                                    \
    static target float score_##name##_##type(const Head *head, const int64_t *index, int count, float *score) {    \
        return score_##name(head, index, count, score, type);                                                       \
    }                                                                                                               \
    static target void mix_##name##_##type(const Head *head, const int64_t *index, int count, const float *score) { \
        mix_##name(head, index, count, score, type);                                                                \
    }
#define FORMS(name, target)                                                                         \
    FORM(name, target, TYPE_FLOAT32)                                                                \
    FORM(name, target, TYPE_FLOAT16)                                                                \
    FORM(name, target, TYPE_BFLOAT16)                                                               \
    static const Form forms_##name[] = {                                                            \
        [TYPE_FLOAT32] = {score_##name##_TYPE_FLOAT32, weigh_##name, mix_##name##_TYPE_FLOAT32},    \
        [TYPE_FLOAT16] = {score_##name##_TYPE_FLOAT16, weigh_##name, mix_##name##_TYPE_FLOAT16},    \
        [TYPE_BFLOAT16] = {score_##name##_TYPE_BFLOAT16, weigh_##name, mix_##name##_TYPE_BFLOAT16}, \
    };

FORMS(plain, )
#ifdef KERNELS_X86
FORMS(avx2, TARGET_AVX2)
FORMS(avx512, TARGET_AVX512)
#endif

static const Form *form_for(int type) {
#ifdef KERNELS_X86
    if (kernels_level() >= LEVEL_AVX512) return &forms_avx512[type];
    if (kernels_level() >= LEVEL_AVX2) return &forms_avx2[type];
#endif
    return &forms_plain[type];
}

static void attend(const Form *form, const Head *head, const uint8_t *mask, int64_t kv_len) {
    int blind = mask != NULL && memchr(mask, 1, (size_t)kv_len) == NULL;
    float largest = -INFINITY, total = 0;
    for (int64_t d = 0; d < head->dim; d++) head->y[d] = 0;
    for (int64_t start = 0; start < kv_len; start += KEYS) {
        int64_t index[KEYS];
        float score[KEYS] = {0};
        int count = 0;
        for (int64_t i = start; i < kv_len && i < start + KEYS; i++)
            if (mask == NULL || blind || mask[i]) index[count++] = i;
        if (count == 0) continue;
        float block = blind ? 0 : form->score(head, index, count, score);
        if (block > largest) {
            float shrink = expf(largest - block); /* 0 for the first block */
            for (int64_t d = 0; d < head->dim; d++) head->y[d] *= shrink;
            total *= shrink;
            largest = block;
        }
        total += form->weigh(score, count, largest);
        form->mix(head, index, count, score);
    }
    for (int64_t d = 0; d < head->dim; d++) head->y[d] /= total;
}

void attention_decode(const float *query, const void *key, const void *value, int kv_type, const uint8_t *mask,
                      float *y, int64_t batch, int64_t heads, int64_t kv_len, int64_t head_dim, const int64_t *strides,
                      float scaling, int threads) {
    const Form *form = form_for(kv_type);
    (void)threads; /* unused without OpenMP */
    OMP(omp parallel for num_threads(threads))
    for (int64_t i = 0; i < batch * heads; i++) {
        int64_t row = i / heads, column = i % heads;
        Head head = {
            .query = query + row * strides[0] + column * strides[1],
            .key = (const char *)key + size_of(row * strides[2] + column * strides[3], kv_type),
            .value = (const char *)value + size_of(row * strides[5] + column * strides[6], kv_type),
            .key_step = size_of(strides[4], kv_type),
            .value_step = size_of(strides[7], kv_type),
            .dim = head_dim,
            .scaling = scaling,
            .y = y + i * head_dim,
        };
        attend(form, &head, mask == NULL ? NULL : mask + row * kv_len, kv_len);
    }
}
