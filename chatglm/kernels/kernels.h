/* What linear.c, attention.c and layer.c share: which instructions may be used, threads, 16-bit floats.
 *
 * One library serves every processor of an architecture.  No -march flag is needed: each form of a kernel carries a
 * target attribute (TARGET_...), and kernels_level() says at run time which one to use.  Elsewhere than on x86-64 only
 * the plain C form exists.  gcc and clang compile this; with OpenMP (-fopenmp) or, single-threaded, without it.
 */
#ifndef CHATGLM_KERNELS_H
#define CHATGLM_KERNELS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#define OMP(text) _Pragma(#text) /* OMP(omp parallel for num_threads(threads)) */
#else
#define OMP(text)
#endif

static inline size_t thread_index(void) {
#ifdef _OPENMP
    return (size_t)omp_get_thread_num();
#else
    return 0;
#endif
}

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#define HIDDEN
#else
#define EXPORT __attribute__((visibility("default")))
#define HIDDEN __attribute__((visibility("hidden")))
#endif

/* A template: calls with constant arguments give a specialised copy each.  Its caller's target must include its own. */
#define INLINE static inline __attribute__((always_inline))

#define UNROLL _Pragma("GCC unroll 16")

#if defined(__x86_64__)
#define KERNELS_X86 1
#include <immintrin.h>
#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define TARGET_AVX512_BF16 \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")))
#endif

/* Each level may use everything that the levels below it may. */
enum { LEVEL_PLAIN, LEVEL_AVX2, LEVEL_AVX512, LEVEL_AVX512_BF16 };

/* The best level of this processor, or what kernels_set_variant chose. */
HIDDEN int kernels_level(void);

/* kernels_variant: "avx512_vnni", "avx2" or "plain".  kernels_set_variant takes these, and "avx512_vnni_float": AVX-512
 * without its bf16 instructions, as some processors are; 0 = done, -1 = unknown or not on this processor. */
EXPORT const char *kernels_variant(void);
EXPORT int kernels_set_variant(const char *name);
EXPORT int kernels_openmp(void); /* 1 = compiled with OpenMP */

/* A matrix as weight_pack lays it out, and what linear takes beside it. */
typedef struct {
    const int8_t *tiles;
    const void *scale;
    const float *bias; /* or NULL */
    int64_t out, in;
    int scale_type, bits, activations;
} Matrix;

/* A layer norm: weight and bias, float32 [width]. */
typedef struct {
    const float *weight, *bias;
    float epsilon;
} Norm;

EXPORT void weight_pack(const int8_t *weight, int8_t *tiles, int64_t out, int64_t in, int bits, int threads);
EXPORT void weight_unpack(const int8_t *tiles, int8_t *weight, int64_t out, int64_t in, int bits, int threads);
EXPORT int linear(const float *x, const int8_t *tiles, const void *scale, int scale_type, const float *bias, float *y,
                  int64_t rows, int64_t in, int64_t out, int bits, int activations, int threads);
EXPORT int linear_back(const float *x, const int8_t *tiles, float *y, int64_t rows, int64_t in, int64_t out, int bits,
                       int threads);
EXPORT void embedding(const int64_t *ids, int64_t count, const int8_t *tiles, const void *scale, int scale_type,
                      float *y, int64_t out, int64_t in, int bits, int threads);
EXPORT void attention_decode(const float *query, const void *key, const void *value, int kv_type, const uint8_t *mask,
                             float *y, int64_t batch, int64_t heads, int64_t kv_len, int64_t head_dim,
                             const int64_t *strides, float scaling, int threads);

/* A layer of the network. */
typedef struct {
    Norm input_norm, post_attention_norm;
    Matrix query_key_value, dense, up, down;
    int64_t heads;
    float alpha, scaling; /* of the residuals; of the attention scores */
} Layer;

EXPORT int layer_start(const Layer *layer, const float *x, const float *cos, const float *sin, int64_t part,
                       float *normed, float *mixed, int64_t rows, int threads);
EXPORT int layer_finish(const Layer *layer, const float *attended, const float *normed, float *y, int64_t rows,
                        int threads);
EXPORT int layer_step(const Layer *layer, const float *x, const float *cos, const float *sin, int64_t part, void *key,
                      void *value, int kv_type, const uint8_t *mask, const int64_t *strides, float *y, int64_t batch,
                      int64_t kv_len, int threads);

/* Rows of a long prompt that are worked on together: 22 blocks of 12 in linear.c; they stay in cache while the weights
 * pass.  A few rows take microseconds: less than waking the other threads. */
enum { ROWS_AT_ONCE = 264, FEW_ROWS = 4 };

enum { TYPE_FLOAT32, TYPE_FLOAT16, TYPE_BFLOAT16 };

INLINE float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_from_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* IEEE half -> float, exact; subnormals, infinities and NaN included. */
INLINE float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    /* Half's exponent moved to float's place and scaled by 2^112 = 2^(127 - 15): right for subnormals too. */
    float value = float_from_bits(magnitude << 13) * float_from_bits(0x77800000);
    uint32_t bits = magnitude >= 0x7c00 ? magnitude << 13 | 0x7f800000 : bits_from_float(value);
    return float_from_bits(bits | sign);
}

INLINE float bf16_to_float(uint16_t bf16) { return float_from_bits((uint32_t)bf16 << 16); }

/* float -> IEEE half, round half to even; what is too large becomes infinite, NaN stays NaN. */
INLINE uint16_t float_to_half(float value) {
    uint32_t bits = bits_from_float(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) { /* subnormal: the addition rounds at 2^-24, half's smallest step */
        return (uint16_t)(sign | (bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000));
    }
    return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

/* float -> bf16, round half to even; NaN stays NaN. */
INLINE uint16_t float_to_bf16(float value) {
    uint32_t bits = bits_from_float(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

/* exp(x) for x <= 0 to 2 units in the last place, without a branch so that compilers make vectors of it; NaN stays NaN
 * and what is below float32's normal numbers becomes 0. */
INLINE float exp_negative(float x) {
    float clamped = x < -87.0f ? -87.0f : x;
    float shifted = clamped * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum is rounded to a whole number */
    float whole = shifted - 12582912.0f;
    float rest = clamped - whole * 0.693359375f + whole * 2.12194440e-4f; /* ln 2 in two parts */
    float series = 1.0f / 5040;
    series = series * rest + 1.0f / 720;
    series = series * rest + 1.0f / 120;
    series = series * rest + 1.0f / 24;
    series = series * rest + 1.0f / 6;
    series = series * rest + 0.5f;
    series = series * rest + 1.0f;
    series = series * rest + 1.0f;
    float power = float_from_bits((bits_from_float(shifted) + 127) << 23); /* 2^whole; the rest of shifted drops out */
    return x < -87.0f ? 0.0f : series * power;
}

#endif
