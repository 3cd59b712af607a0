/* What linear.c and attention.c share: which instructions may be used, threads, 16-bit floats.
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

EXPORT void weight_pack(const int8_t *weight, int8_t *tiles, int64_t out, int64_t in, int bits, int threads);
EXPORT void weight_unpack(const int8_t *tiles, int8_t *weight, int64_t out, int64_t in, int bits, int threads);
EXPORT int linear(const float *x, const int8_t *tiles, const void *scale, int scale_type, const float *bias, float *y,
                  int64_t rows, int64_t in, int64_t out, int bits, int activations, int threads);
EXPORT void embedding(const int64_t *ids, int64_t count, const int8_t *tiles, const void *scale, int scale_type,
                      float *y, int64_t out, int64_t in, int bits, int threads);
EXPORT void attention_decode(const float *query, const void *key, const void *value, int kv_type, const uint8_t *mask,
                             float *y, int64_t batch, int64_t heads, int64_t kv_len, int64_t head_dim,
                             const int64_t *strides, float scaling, int threads);

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

/* float -> bf16, round half to even; NaN stays NaN. */
INLINE uint16_t float_to_bf16(float value) {
    uint32_t bits = bits_from_float(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

#endif
