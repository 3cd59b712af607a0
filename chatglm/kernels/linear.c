/* Linear layers and embeddings with INT4 or INT8 weights.  Truth: chatglm/quantization.py.
 *
 * linear        y[m][o] = scale[o] * sum_i x[m][i] * w[o][i] + bias[o], w small integers
 * Why C         one row (decode) runs as fast as memory delivers the weights, many rows (prefill) near the processor's
 *               peak for 8-bit products; dequantise-and-matmul moves many times the bytes (benchmarks/README.md).
 * linear_back   y[m][i] = sum_o x[m][o] * w[o][i], the way of a gradient: from the same tiles, so that a model that is
 *               trained holds its weights once
 *
 * Tiles         weight_pack rearranges the published bytes, same size for every shape, so that 16 output rows are 16
 *               lanes of one vector, there is never a sum across lanes, and a tile is one stream of memory:
 *                 step    64 bytes = 16 rows x 4 bytes.  INT4: 8 columns, byte b = (w[b] + 8) | (w[4 + b] + 8) << 4.
 *                         INT8: 4 columns, byte b = w[b] + 128.  (Without sign, as the 8-bit instructions want it.)
 *                 tile    16 rows: as many whole steps as fit, then the remaining columns row by row as published.
 *                 matrix  the tiles, then the rows beyond the last whole tile as published.
 *               Odd parts are completed with zeros in a scratch tile, so the kernels below see whole steps only.
 *
 * Activations   int8: groups of 128 columns of one row share a scale, max|x| / 127; x / scale rounds half to even.
 *               Sums within a group are exact integers in every form.  Errors: tests/kernels/test_linear.py.
 *               int16: x = high + low, high as int8 stands for it and low the rest, which is rounded in the same way:
 *               two rows instead of one, and 1/254 of the error.
 *               bf16: x rounds to bf16, products are exact, sums are float32.
 *               A NaN or an infinity in x makes all outputs of its row NaN or infinite, and touches no other row.
 *
 * Forms         AVX-512 (VNNI; BF16 where present), AVX2, and one in plain C with GNU vectors, which is also the bf16
 *               form of AVX2 and of AVX-512 without BF16.  Rows of x are stored in blocks of a few tokens, interleaved
 *               so that the innermost loop reads them forwards.  Tiles are shared out among threads; each output is
 *               computed by one thread in one order, so the number of threads never changes a result.
 */
#include "kernels.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "these kernels expect a little-endian processor"
#endif

enum {
    LANES = 16,         /* rows of a tile */
    STEP_BYTES = 64,    /* 4 bytes of each of them */
    GROUP = 128,        /* columns that share a scale */
    PREFETCH = 2048,    /* bytes ahead, measured: helps where arithmetic takes as long as memory, slows one INT4 row */
};

/* ---- Which form -------------------------------------------------------------------------------------------------- */

static int chosen_level = -1; /* -1 = not yet looked */

static int best_level(void) {
#ifdef KERNELS_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return LEVEL_PLAIN; /* f16c is older */
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vnni"))
        return LEVEL_AVX2;
    return __builtin_cpu_supports("avx512bf16") ? LEVEL_AVX512_BF16 : LEVEL_AVX512;
#else
    return LEVEL_PLAIN;
#endif
}

int kernels_level(void) {
    int level = __atomic_load_n(&chosen_level, __ATOMIC_RELAXED);
    if (level < 0) {
        level = best_level();
        __atomic_store_n(&chosen_level, level, __ATOMIC_RELAXED);
    }
    return level;
}

const char *kernels_variant(void) {
    static const char *const names[] = {"plain", "avx2", "avx512_vnni", "avx512_vnni"};
    return names[kernels_level()];
}

int kernels_set_variant(const char *name) {
    int best = best_level(), level = -1;
    if (!strcmp(name, "plain")) level = LEVEL_PLAIN;
    if (!strcmp(name, "avx2")) level = LEVEL_AVX2;
    if (!strcmp(name, "avx512_vnni_float")) level = LEVEL_AVX512;
    if (!strcmp(name, "avx512_vnni")) level = best > LEVEL_AVX512 ? best : LEVEL_AVX512;
    if (level < 0 || level > best) return -1;
    __atomic_store_n(&chosen_level, level, __ATOMIC_RELAXED);
    return 0;
}

int kernels_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* ---- Tiles ------------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t out, in;
    int bits, columns;           /* columns of one step: 8 (INT4) or 4 (INT8) */
    int64_t steps, whole_steps;  /* of a row, counting a last incomplete one; complete ones only */
    int64_t row_bytes, whole_tiles;
} Layout;

static Layout layout_of(int64_t out, int64_t in, int bits) {
    int columns = 32 / bits;
    return (Layout){out, in, bits, columns, (in + columns - 1) / columns, in / columns, in * bits / 8, out / LANES};
}

/* 4 published bytes of one row <-> its 4 bytes of a step. */
INLINE void pack_lane(const uint8_t *published, uint8_t *lane, int bits) {
    uint32_t p, even, odd;
    memcpy(&p, published, 4);
    if (bits == 8) {
        p ^= 0x80808080;
    } else {
        p ^= 0x88888888;             /* + 8 in each nibble; the high one is the even column */
        even = p >> 4 & 0x0f0f0f0f;  /* bytes w0 w2 w4 w6 */
        odd = p & 0x0f0f0f0f;        /* bytes w1 w3 w5 w7 */
        even |= even >> 12;          /* lower bytes: w0 | w4 << 4, w2 | w6 << 4 */
        odd |= odd >> 12;
        p = (even & 0xff) | (odd & 0xff) << 8 | (even & 0xff00) << 8 | (odd & 0xff00) << 16;
    }
    memcpy(lane, &p, 4);
}

INLINE void unpack_lane(const uint8_t *lane, uint8_t *published, int bits) {
    uint32_t p, even, odd;
    memcpy(&p, lane, 4);
    if (bits == 8) {
        p ^= 0x80808080;
    } else {
        even = (p & 0xff) | (p >> 8 & 0xff00); /* w0 | w4 << 4, w2 | w6 << 4 */
        odd = (p >> 8 & 0xff) | (p >> 16 & 0xff00);
        even = (even & 0x0f0f) | (even & 0xf0f0) << 12; /* bytes w0 w2 w4 w6 */
        odd = (odd & 0x0f0f) | (odd & 0xf0f0) << 12;
        p = (even << 4 | odd) ^ 0x88888888;
    }
    memcpy(published, &p, 4);
}

/* One tile, from published order to its own (packing) or back. */
INLINE void reorder_tile(const Layout *layout, const uint8_t *from, uint8_t *to, const int bits, const int packing) {
    int64_t steps = layout->whole_steps, tail = layout->row_bytes - 4 * steps;
    /* A cache line of a row at a time: its rows, thousands of bytes apart, would push each other out of the cache. */
    for (int64_t first = 0; first < steps; first += 16) {
        int64_t end = first + 16 < steps ? first + 16 : steps;
        for (int lane = 0; lane < LANES; lane++)
            for (int64_t step = first; step < end; step++) {
                int64_t published = lane * layout->row_bytes + 4 * step, place = step * STEP_BYTES + 4 * lane;
                if (packing)
                    pack_lane(from + published, to + place, bits);
                else
                    unpack_lane(from + place, to + published, bits);
            }
    }
    for (int lane = 0; lane < LANES; lane++) {
        int64_t published = lane * layout->row_bytes + 4 * steps, place = steps * STEP_BYTES + lane * tail;
        memcpy(to + (packing ? place : published), from + (packing ? published : place), (size_t)tail);
    }
}

static void reorder(const int8_t *from, int8_t *to, int64_t out, int64_t in, int bits, int threads, int packing) {
    Layout layout = layout_of(out, in, bits);
    int64_t tile_bytes = LANES * layout.row_bytes, whole = layout.whole_tiles * tile_bytes;
    (void)threads;
    OMP(omp parallel for num_threads(threads))
    for (int64_t tile = 0; tile < layout.whole_tiles; tile++) {
        const uint8_t *source = (const uint8_t *)from + tile * tile_bytes;
        uint8_t *target = (uint8_t *)to + tile * tile_bytes;
        switch (bits + packing) {
            case 4: reorder_tile(&layout, source, target, 4, 0); break;
            case 5: reorder_tile(&layout, source, target, 4, 1); break;
            case 8: reorder_tile(&layout, source, target, 8, 0); break;
            case 9: reorder_tile(&layout, source, target, 8, 1); break;
        }
    }
    memcpy(to + whole, from + whole, (size_t)(out * layout.row_bytes - whole));
}

/* Ask for pages of 2 MB, before the memory is first written: reading is then about a quarter faster.  Only where whole
 * ones fit, so that no memory is added; a system that has none ignores it. */
static void prefer_huge_pages(int8_t *memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t huge = 2 << 20, start = ((uintptr_t)memory + huge - 1) / huge * huge;
    const uintptr_t end = ((uintptr_t)memory + (uintptr_t)bytes) / huge * huge;
    if (start < end) (void)madvise((void *)start, end - start, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

/* weight_pack: published bytes -> tiles, for use by linear and embedding; weight_unpack: back, exact.
 *   weight, tiles [out, in * bits / 8] int8, not overlapping; bits 4 (in even) or 8 */
void weight_pack(const int8_t *weight, int8_t *tiles, int64_t out, int64_t in, int bits, int threads) {
    prefer_huge_pages(tiles, out * in * bits / 8);
    reorder(weight, tiles, out, in, bits, threads, 1);
}

void weight_unpack(const int8_t *tiles, int8_t *weight, int64_t out, int64_t in, int bits, int threads) {
    reorder(tiles, weight, out, in, bits, threads, 0);
}

/* The steps of one tile; where bytes of it are as published, a completed copy in scratch [steps * 64]. */
static const uint8_t *whole_steps(const Layout *layout, const uint8_t *tiles, int64_t tile, uint8_t *scratch) {
    const uint8_t *start = tiles + tile * LANES * layout->row_bytes;
    int64_t whole = layout->whole_steps, tail = layout->row_bytes - 4 * whole;
    if (tile < layout->whole_tiles && tail == 0) return start;
    if (tile < layout->whole_tiles) {
        memcpy(scratch, start, (size_t)(whole * STEP_BYTES));
        for (int lane = 0; lane < LANES; lane++) {
            uint8_t padded[4] = {0};
            memcpy(padded, start + whole * STEP_BYTES + lane * tail, (size_t)tail);
            pack_lane(padded, scratch + whole * STEP_BYTES + 4 * lane, layout->bits);
        }
        return scratch;
    }
    memset(scratch, 0, (size_t)(layout->steps * STEP_BYTES)); /* lanes beyond the last row: any value, never stored */
    for (int64_t row = tile * LANES; row < layout->out; row++)
        for (int64_t step = 0; step < layout->steps; step++) {
            uint8_t padded[4] = {0};
            int64_t left = layout->row_bytes - 4 * step;
            memcpy(padded, tiles + row * layout->row_bytes + 4 * step, (size_t)(left < 4 ? left : 4));
            pack_lane(padded, scratch + step * STEP_BYTES + 4 * (row % LANES), layout->bits);
        }
    return scratch;
}

INLINE float scale_of(const void *scale, int scale_type, int64_t row) {
    return scale_type == TYPE_FLOAT16 ? half_to_float(((const uint16_t *)scale)[row]) : ((const float *)scale)[row];
}

/* embedding: rows of the dequantised matrix.
 *   ids [count] in 0..out-1 (the caller checks);  tiles, scale as in linear;  y [count, in] float32 = w * scale */
void embedding(const int64_t *ids, int64_t count, const int8_t *tiles, const void *scale, int scale_type, float *y,
               int64_t out, int64_t in, int bits, int threads) {
    Layout layout = layout_of(out, in, bits);
    (void)threads;
    OMP(omp parallel for num_threads(threads) if (count >= 16))
    for (int64_t i = 0; i < count; i++) {
        int64_t tile = ids[i] / LANES, lane = ids[i] % LANES, tail = layout.row_bytes - 4 * layout.whole_steps;
        const uint8_t *start = (const uint8_t *)tiles + tile * LANES * layout.row_bytes;
        float factor = scale_of(scale, scale_type, ids[i]);
        for (int64_t step = 0; step < layout.steps; step++) {
            uint8_t bytes[4] = {0};
            if (tile == layout.whole_tiles) { /* beyond the tiles: published order */
                int64_t left = layout.row_bytes - 4 * step;
                memcpy(bytes, start + lane * layout.row_bytes + 4 * step, (size_t)(left < 4 ? left : 4));
            } else if (step == layout.whole_steps) {
                memcpy(bytes, start + step * STEP_BYTES + lane * tail, (size_t)tail);
            } else {
                unpack_lane(start + step * STEP_BYTES + 4 * lane, bytes, bits);
            }
            for (int column = 0; column < layout.columns && step * layout.columns + column < in; column++) {
                int value = bits == 8 ? (int8_t)bytes[column]
                                      : ((bytes[column / 2] >> (column % 2 ? 0 : 4) & 15) ^ 8) - 8; /* sign-extended */
                y[i * in + step * layout.columns + column] = (float)value * factor;
            }
        }
    }
}

/* ---- Activations ------------------------------------------------------------------------------------------------- */

/* One call of linear, as its kernels see it. */
typedef struct {
    Layout layout;
    const uint8_t *tiles;
    const void *scale;
    int scale_type;
    const float *bias;
    float *y;               /* of the first of the rows below */
    int64_t rows, groups;   /* rows of x now prepared (at most ROWS_AT_ONCE); groups of 128 columns in a row */
    int tokens;             /* rows of x in a block */
    int64_t block_values;   /* values of x in a block: tokens * columns, rounded up to whole steps */
    void *x;                /* blocks; order of values within: see the form that reads them */
    float *group_scale;     /* [block][group][token] */
    int32_t *group_start;   /* same: where sums start, minus the offset of weights (8 or 128) times sum(q) */
} Job;

static int steps_of_group(const Job *job, int64_t group) {
    int most = GROUP / job->layout.columns;
    int64_t left = job->layout.steps - group * most;
    return left < most ? (int)left : most;
}

#define TINY 1e-36f /* 127 / max|x| must not pass float32's range: smaller groups count as zero */

/* Largest |x| of a group -> its scale and the factor to quantise with; 0 = all quantised values are zero. */
INLINE float scale_for(float largest, float *factor) {
    if (!isfinite(largest)) {
        *factor = 0;
        return NAN; /* reaches every output of the row: NaN times any sum */
    }
    *factor = largest > TINY ? 127.0f / largest : 0;
    return largest > TINY ? largest / 127.0f : 0;
}

/* x [128] -> q [128] = round(x / scale); returns scale, sets sum of q.  The bits of |x| are compared as integers, which
 * orders NaN above infinity above the rest. */
static float quantise_plain(const float *x, int8_t *q, int32_t *sum) {
    uint32_t most = 0;
    float factor, scale;
    *sum = 0;
    for (int i = 0; i < GROUP; i++) {
        uint32_t bits = bits_from_float(x[i]) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    scale = scale_for(float_from_bits(most), &factor);
    for (int i = 0; i < GROUP; i++) {
        q[i] = factor > 0 ? (int8_t)lrintf(x[i] * factor) : 0;
        *sum += q[i];
    }
    return scale;
}

#ifdef KERNELS_X86
static TARGET_AVX2 float quantise_avx2(const float *x, int8_t *q, int32_t *sum) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    /* packs works within 128-bit halves; this puts the dwords of four vectors back in order */
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i most = _mm256_setzero_si256(), total = most;
    uint32_t lanes[8], largest = 0;
    int32_t sums[8];
    float factor, scale;
    for (int i = 0; i < GROUP; i += 8)
        most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_loadu_si256((const void *)(x + i)), magnitude));
    _mm256_storeu_si256((void *)lanes, most);
    for (int i = 0; i < 8; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    scale = scale_for(float_from_bits(largest), &factor);
    *sum = 0;
    memset(q, 0, GROUP);
    if (factor == 0) return scale;
    for (int i = 0; i < GROUP; i += 32) {
        __m256i v[4];
        UNROLL for (int j = 0; j < 4; j++) {
            v[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), _mm256_set1_ps(factor)));
            total = _mm256_add_epi32(total, v[j]);
        }
        __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
        _mm256_storeu_si256((void *)(q + i), _mm256_permutevar8x32_epi32(bytes, order));
    }
    _mm256_storeu_si256((void *)sums, total);
    for (int i = 0; i < 8; i++) *sum += sums[i];
    return scale;
}

static TARGET_AVX512 float quantise_avx512(const float *x, int8_t *q, int32_t *sum) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512(), total = most;
    float factor, scale;
    for (int i = 0; i < GROUP; i += 16)
        most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
    scale = scale_for(float_from_bits(_mm512_reduce_max_epu32(most)), &factor);
    *sum = 0;
    memset(q, 0, GROUP);
    if (factor == 0) return scale;
    for (int i = 0; i < GROUP; i += 16) {
        __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(factor)));
        total = _mm512_add_epi32(total, v);
        _mm_storeu_si128((void *)(q + i), _mm512_cvtepi32_epi8(v));
    }
    *sum = _mm512_reduce_add_epi32(total);
    return scale;
}
#endif

/* Prepare row `row` of x (NULL: a row of zeros, to fill the last block) in its block, [columns / 4][tokens][4] int8,
 * or [columns][tokens] float for the plain form. */
static void store_int8(const Job *job, const float *x, int64_t row, int level) {
    int64_t block = row / job->tokens, token = row % job->tokens, in = job->layout.in;
    int offset = job->layout.bits == 4 ? 8 : 128;
    for (int64_t group = 0; group < job->groups; group++) {
        int64_t first = group * GROUP, columns = (int64_t)steps_of_group(job, group) * job->layout.columns;
        int64_t place = (block * job->groups + group) * job->tokens + token;
        const float *values = x ? x + first : NULL;
        float padded[GROUP] = {0};
        int8_t q[GROUP];
        int32_t sum;
        if (values && in - first < GROUP) memcpy(padded, values, (size_t)(in - first) * sizeof *padded);
        if (!values || in - first < GROUP) values = padded;
#ifdef KERNELS_X86
        if (level >= LEVEL_AVX512)
            job->group_scale[place] = quantise_avx512(values, q, &sum);
        else if (level == LEVEL_AVX2)
            job->group_scale[place] = quantise_avx2(values, q, &sum);
        else
#endif
            job->group_scale[place] = quantise_plain(values, q, &sum);
        job->group_start[place] = -offset * sum;
        if (level == LEVEL_PLAIN) {
            float *to = (float *)job->x + block * job->block_values + first * job->tokens + token;
            for (int i = 0; i < columns; i++) to[i * job->tokens] = q[i];
        } else {
            int8_t *to = (int8_t *)job->x + block * job->block_values + first * job->tokens + 4 * token;
            for (int i = 0; i < columns; i += 4) memcpy(to + i * job->tokens, q + i, 4);
        }
    }
}

/* The same for bf16: [columns / 2][tokens][2] bf16, columns in the order in which the weights of a step come out of
 * bf16_pairs; or [columns][tokens] float for the plain form. */
static void store_bf16(const Job *job, const float *x, int64_t row, int level) {
    static const int order_int4[8] = {0, 2, 4, 6, 1, 3, 5, 7}, order_int8[4] = {0, 1, 2, 3};
    const int *order = job->layout.bits == 4 ? order_int4 : order_int8;
    int64_t block = row / job->tokens, token = row % job->tokens, in = job->layout.in;
    int columns = job->layout.columns, tokens = job->tokens;
    float *as_float = (float *)job->x + block * job->block_values + token;
    uint16_t *pairs = (uint16_t *)job->x + block * job->block_values + 2 * token;
    for (int64_t first = 0; first < job->layout.steps * columns; first += columns) {
        uint16_t value[8] = {0};
        for (int i = 0; i < columns && x && first + i < in; i++) value[i] = float_to_bf16(x[first + i]);
        for (int i = 0; i < columns; i++) {
            if (level == LEVEL_AVX512_BF16)
                pairs[(first + i - i % 2) * tokens + i % 2] = value[order[i]];
            else
                as_float[(first + i) * tokens] = bf16_to_float(value[i]);
        }
    }
}

/* What turns sums of one tile into outputs.  Lanes beyond the last row: zeros. */
typedef struct {
    float scale[LANES], bias[LANES];
    int valid;
} Outputs;

INLINE Outputs outputs_of(const Job *job, int64_t tile) {
    Outputs outputs = {{0}, {0}, LANES};
    int64_t first = tile * LANES, left = job->layout.out - first;
    if (left >= LANES) { /* its own loops, because their length is known */
        for (int lane = 0; lane < LANES; lane++)
            outputs.scale[lane] = scale_of(job->scale, job->scale_type, first + lane);
        if (job->bias) memcpy(outputs.bias, job->bias + first, sizeof outputs.bias);
        return outputs;
    }
    outputs.valid = (int)left;
    for (int lane = 0; lane < left; lane++) outputs.scale[lane] = scale_of(job->scale, job->scale_type, first + lane);
    if (job->bias) memcpy(outputs.bias, job->bias + first, (size_t)left * sizeof(float));
    return outputs;
}

INLINE void store_outputs(const Job *job, const Outputs *outputs, int64_t tile, int64_t row, const float *sums) {
    float *y = job->y + row * job->layout.out + tile * LANES, values[LANES];
    for (int lane = 0; lane < LANES; lane++) values[lane] = sums[lane] * outputs->scale[lane] + outputs->bias[lane];
    if (outputs->valid == LANES)
        memcpy(y, values, sizeof values);
    else
        memcpy(y, values, (size_t)outputs->valid * sizeof *values);
}

/* ---- Plain C form ------------------------------------------------------------------------------------------------ */

enum { FLOAT_TOKENS = 8 };

/* For one target, `width` rows of a tile in one of its registers:
 *   name_unpack   weights of `steps` steps as float, panel [columns][16]
 *   name_dot      sums [tokens][16] += scale [tokens] (NULL: 1) * panel [columns][16] times x [columns][tokens];
 *                 tokens 1 or 8 */
#define DEFINE_FLOAT_FORM(name, target, width)                                                                         \
    typedef float name##_vector __attribute__((vector_size(4 * (width))));                                             \
    typedef int32_t name##_integers __attribute__((vector_size(4 * (width))));                                         \
    INLINE target void name##_unpack_of(const uint8_t *w, int steps, const int bits, float *panel) {                   \
        for (int step = 0; step < steps; step++, w += STEP_BYTES, panel += 32 / bits * LANES)                          \
            for (int first = 0; first < LANES; first += (width)) {                                                     \
                name##_integers bytes, value;                                                                          \
                memcpy(&bytes, w + 4 * first, sizeof bytes);                                                           \
                UNROLL for (int column = 0; column < 32 / bits; column++) {                                            \
                    value = bytes >> (8 * (column % 4) + column / 4 * 4);                                              \
                    value = (value & (bits == 8 ? 255 : 15)) - (bits == 8 ? 128 : 8);                                  \
                    name##_vector converted = __builtin_convertvector(value, name##_vector);                           \
                    memcpy(panel + column * LANES + first, &converted, sizeof converted);                              \
                }                                                                                                      \
            }                                                                                                          \
    }                                                                                                                  \
    static target void name##_unpack(const uint8_t *w, int steps, int bits, float *panel) {                            \
        if (bits == 4)                                                                                                 \
            name##_unpack_of(w, steps, 4, panel);                                                                      \
        else                                                                                                           \
            name##_unpack_of(w, steps, 8, panel);                                                                      \
    }                                                                                                                  \
    INLINE target void name##_dot_of(const float *panel, const float *x, int columns, const int tokens,                \
                                     const float *scale, float *sums) {                                                \
        const int chains = FLOAT_TOKENS / tokens; /* one sum alone would wait for each addition */                     \
        for (int first = 0; first < LANES; first += (width)) {                                                         \
            name##_vector sum[FLOAT_TOKENS] = {{0}}, v;                                                                \
            for (int column = 0; column < columns; column += chains)                                                   \
                UNROLL for (int i = 0; i < FLOAT_TOKENS; i++) {                                                        \
                    memcpy(&v, panel + (column + i / tokens) * LANES + first, sizeof v);                               \
                    sum[i] += v * x[column * tokens + i];                                                              \
                }                                                                                                      \
            if (tokens == 1)                                                                                           \
                sum[0] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));            \
            UNROLL for (int i = 0; i < tokens; i++) {                                                                  \
                memcpy(&v, sums + i * LANES + first, sizeof v);                                                        \
                v += scale ? sum[i] * scale[i] : sum[i];                                                               \
                memcpy(sums + i * LANES + first, &v, sizeof v);                                                        \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    static target void name##_dot(const float *panel, const float *x, int columns, int tokens, const float *scale,     \
                                  float *sums) {                                                                       \
        if (tokens == 1)                                                                                               \
            name##_dot_of(panel, x, columns, 1, scale, sums);                                                          \
        else                                                                                                           \
            name##_dot_of(panel, x, columns, FLOAT_TOKENS, scale, sums);                                               \
    }

DEFINE_FLOAT_FORM(plain, , 4)
#ifdef KERNELS_X86
DEFINE_FLOAT_FORM(avx2, TARGET_AVX2, 8)
DEFINE_FLOAT_FORM(avx512, TARGET_AVX512, 16)
#endif

/* One tile and all prepared rows.  The 128 columns of a group become floats in first-level cache and meet every block
 * of tokens.  Quantised activations come as floats too: sums of 128 products stay below 2^24, so they are exact. */
static void float_tile(const Job *job, int64_t tile, const uint8_t *w, int level) {
    float panel[GROUP * LANES], sums[ROWS_AT_ONCE * LANES];
    Outputs outputs;
    int tokens = job->tokens, most = GROUP / job->layout.columns;
    int64_t blocks = (job->rows + tokens - 1) / tokens;
    (void)level;
    memset(sums, 0, (size_t)(blocks * tokens) * LANES * sizeof *sums);
    for (int64_t group = 0; group < job->groups; group++) {
        int steps = steps_of_group(job, group), columns = (steps * job->layout.columns + 7) / 8 * 8;
        const uint8_t *from = w + group * most * STEP_BYTES;
        if (steps < most) memset(panel, 0, sizeof panel);
#ifdef KERNELS_X86
        if (level >= LEVEL_AVX512)
            avx512_unpack(from, steps, job->layout.bits, panel);
        else if (level == LEVEL_AVX2)
            avx2_unpack(from, steps, job->layout.bits, panel);
        else
#endif
            plain_unpack(from, steps, job->layout.bits, panel);
        for (int64_t block = 0; block < blocks; block++) {
            const float *x = (const float *)job->x + block * job->block_values + group * GROUP * tokens;
            const float *factors = job->group_scale ? job->group_scale + (block * job->groups + group) * tokens : NULL;
            float *to = sums + block * tokens * LANES;
#ifdef KERNELS_X86
            if (level >= LEVEL_AVX512)
                avx512_dot(panel, x, columns, tokens, factors, to);
            else if (level == LEVEL_AVX2)
                avx2_dot(panel, x, columns, tokens, factors, to);
            else
#endif
                plain_dot(panel, x, columns, tokens, factors, to);
        }
    }
    outputs = outputs_of(job, tile);
    for (int64_t row = 0; row < job->rows; row++) store_outputs(job, &outputs, tile, row, sums + row * LANES);
}

#ifdef KERNELS_X86

/* 4 bytes of activations in every lane. */
INLINE TARGET_AVX2 __m256i broadcast_avx2(const void *x) {
    int32_t value;
    memcpy(&value, x, sizeof value);
    return _mm256_set1_epi32(value);
}

INLINE TARGET_AVX512 __m512i broadcast_avx512(const void *x) {
    int32_t value;
    memcpy(&value, x, sizeof value);
    return _mm512_set1_epi32(value);
}

/* ---- AVX2, 8-bit activations ------------------------------------------------------------------------------------- */

/* One tile and all prepared rows, in two halves of 8 lanes.  vpmaddubsw adds pairs of products unsigned * signed in
 * 16 bits.  INT4: 0..15 times -127..127; the pairs of 4 steps, 8 * 2 * 15 * 127 = 30480, fit before they are widened.
 * INT8: |w| times x with the sign of w; 2 * 128 * 127 = 32512 fits, w + 128 as in the tile (2 * 255 * 127) not. */
INLINE TARGET_AVX2 void avx2_tile_of(const Job *job, int64_t tile, const uint8_t *w, const int bits, const int tokens) {
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15), flip = _mm256_set1_epi8((char)0x80);
    const Outputs outputs = outputs_of(job, tile);
    for (int64_t first = 0; first < job->rows; first += tokens) {
        const int8_t *block = (const int8_t *)job->x + first / tokens * job->block_values;
        __m256 total[2][4];
        float sums[4][LANES];
        UNROLL for (int i = 0; i < tokens; i++) total[0][i] = total[1][i] = _mm256_setzero_ps();
        for (int64_t group = 0; group < job->groups; group++) {
            int steps = steps_of_group(job, group);
            int64_t place = (first / tokens * job->groups + group) * tokens;
            UNROLL for (int half = 0; half < 2; half++) {
                const uint8_t *from = w + group * (GROUP * bits / 32) * STEP_BYTES + half * 32;
                const int8_t *x = block + group * GROUP * tokens;
                __m256i sum[4];
                UNROLL for (int i = 0; i < tokens; i++)
                    sum[i] = _mm256_set1_epi32(bits == 4 ? job->group_start[place + i] : 0);
                for (int step = 0; step < steps;) {
                    __m256i narrow[4];
                    UNROLL for (int i = 0; i < tokens; i++) narrow[i] = _mm256_setzero_si256();
                    for (int end = bits == 8 || step + 4 > steps ? step + 1 : step + 4; step < end; step++) {
                        __m256i v = _mm256_loadu_si256((const void *)from), x4;
                        from += STEP_BYTES;
                        if (bits == 4) {
                            __m256i even = _mm256_and_si256(v, low);
                            __m256i odd = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
                            UNROLL for (int i = 0; i < tokens; i++) {
                                x4 = _mm256_maddubs_epi16(even, broadcast_avx2(x + 4 * i));
                                narrow[i] = _mm256_add_epi16(narrow[i], x4);
                                x4 = _mm256_maddubs_epi16(odd, broadcast_avx2(x + 4 * (tokens + i)));
                                narrow[i] = _mm256_add_epi16(narrow[i], x4);
                            }
                            x += 8 * tokens;
                        } else {
                            __m256i value = _mm256_xor_si256(v, flip), size = _mm256_abs_epi8(value);
                            UNROLL for (int i = 0; i < tokens; i++) {
                                x4 = _mm256_sign_epi8(broadcast_avx2(x + 4 * i), value);
                                narrow[i] = _mm256_maddubs_epi16(size, x4);
                            }
                            x += 4 * tokens;
                        }
                    }
                    UNROLL for (int i = 0; i < tokens; i++)
                        sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(narrow[i], ones));
                }
                UNROLL for (int i = 0; i < tokens; i++)
                    total[half][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i]),
                                                     _mm256_set1_ps(job->group_scale[place + i]), total[half][i]);
            }
        }
        UNROLL for (int i = 0; i < tokens; i++) {
            if (first + i >= job->rows) break;
            _mm256_storeu_ps(sums[i], total[0][i]);
            _mm256_storeu_ps(sums[i] + 8, total[1][i]);
            store_outputs(job, &outputs, tile, first + i, sums[i]);
        }
    }
}

static TARGET_AVX2 void avx2_tile(const Job *job, int64_t tile, const uint8_t *w) {
    if (job->layout.bits == 4 && job->tokens == 1) avx2_tile_of(job, tile, w, 4, 1);
    if (job->layout.bits == 4 && job->tokens == 4) avx2_tile_of(job, tile, w, 4, 4);
    if (job->layout.bits == 8 && job->tokens == 1) avx2_tile_of(job, tile, w, 8, 1);
    if (job->layout.bits == 8 && job->tokens == 4) avx2_tile_of(job, tile, w, 8, 4);
}

/* ---- AVX-512 ----------------------------------------------------------------------------------------------------- */

/* As instructions, because GCC 12 spills arrays of accumulators around the intrinsics.
 *   int8: sum lane += 4 unsigned bytes of w times 4 signed bytes of x;  bf16: sum lane += 2 bf16 of w times 2 of x */
#define DOT_INT8(sum, w, x) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x))
#define DOT_BF16(sum, w, x) __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x))

/* One tile and one block of 1, 2 or 4 rows: memory-bound, the weights are used as they come. */
INLINE TARGET_AVX512 void int8_tile_of(const Job *job, int64_t tile, const uint8_t *w, const int bits,
                                       const int tokens) {
    const __m512i low = _mm512_set1_epi8(15);
    const int8_t *x = job->x;
    float sums[4][LANES];
    __m512 total[4];
    UNROLL for (int i = 0; i < tokens; i++) total[i] = _mm512_setzero_ps();
    for (int64_t group = 0; group < job->groups; group++) {
        __m512i sum[4], other[4]; /* two, so that one need not wait for the other */
        UNROLL for (int i = 0; i < tokens; i++) {
            sum[i] = _mm512_set1_epi32(job->group_start[group * tokens + i]);
            other[i] = _mm512_setzero_si512();
        }
        for (int step = steps_of_group(job, group); step > 0; step--, w += STEP_BYTES) {
            __m512i v = _mm512_loadu_si512(w);
            if (tokens == 4) _mm_prefetch((const char *)w + PREFETCH, _MM_HINT_T0);
            if (bits == 4) {
                __m512i even = _mm512_and_si512(v, low), odd = _mm512_and_si512(_mm512_srli_epi16(v, 4), low);
                UNROLL for (int i = 0; i < tokens; i++) {
                    DOT_INT8(sum[i], even, broadcast_avx512(x + 4 * i));
                    DOT_INT8(other[i], odd, broadcast_avx512(x + 4 * (tokens + i)));
                }
                x += 8 * tokens;
            } else {
                UNROLL for (int i = 0; i < tokens; i++) DOT_INT8(sum[i], v, broadcast_avx512(x + 4 * i));
                x += 4 * tokens;
            }
        }
        UNROLL for (int i = 0; i < tokens; i++)
            total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(sum[i], other[i])),
                                       _mm512_set1_ps(job->group_scale[group * tokens + i]), total[i]);
    }
    const Outputs outputs = outputs_of(job, tile);
    for (int i = 0; i < tokens && i < job->rows; i++) {
        _mm512_storeu_ps(sums[i], total[i]);
        store_outputs(job, &outputs, tile, i, sums[i]);
    }
}

static TARGET_AVX512 void int8_tile(const Job *job, int64_t tile, const uint8_t *w) {
    switch (job->layout.bits * 16 + job->tokens) {
        case 4 * 16 + 1: int8_tile_of(job, tile, w, 4, 1); break;
        case 4 * 16 + 2: int8_tile_of(job, tile, w, 4, 2); break;
        case 4 * 16 + 4: int8_tile_of(job, tile, w, 4, 4); break;
        case 8 * 16 + 1: int8_tile_of(job, tile, w, 8, 1); break;
        case 8 * 16 + 2: int8_tile_of(job, tile, w, 8, 2); break;
        case 8 * 16 + 4: int8_tile_of(job, tile, w, 8, 4); break;
    }
}

enum { BLOCK = 12, PANEL_COLUMNS = 512 }; /* 12 tokens x 2 tiles of sums fill 24 of the 32 registers */

/* Two tiles of one group in steps of 4 columns, times a block of tokens;
 * sums [tokens][2][16] += scale * (start + product). */
static TARGET_AVX512 void int8_block(const uint8_t *w0, const uint8_t *w1, const int8_t *x, int steps,
                                     const float *scale, const int32_t *start, float *sums) {
    __m512i sum0[BLOCK], sum1[BLOCK];
    UNROLL for (int i = 0; i < BLOCK; i++) sum0[i] = sum1[i] = _mm512_set1_epi32(start[i]);
    for (int step = 0; step < steps; step++, x += 4 * BLOCK) {
        __m512i v0 = _mm512_loadu_si512(w0 + step * STEP_BYTES), v1 = _mm512_loadu_si512(w1 + step * STEP_BYTES);
        UNROLL for (int i = 0; i < BLOCK; i++) {
            __m512i value = broadcast_avx512(x + 4 * i);
            DOT_INT8(sum0[i], v0, value);
            DOT_INT8(sum1[i], v1, value);
        }
    }
    UNROLL for (int i = 0; i < BLOCK; i++, sums += 2 * LANES) {
        __m512 factor = _mm512_set1_ps(scale[i]);
        _mm512_storeu_ps(sums, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum0[i]), factor, _mm512_loadu_ps(sums)));
        _mm512_storeu_ps(sums + LANES,
                         _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum1[i]), factor, _mm512_loadu_ps(sums + LANES)));
    }
}

static TARGET_AVX512 void store_pair(const Job *job, int64_t tile, const float *sums) {
    for (int64_t half = 0; half < 2 && (tile + half) * LANES < job->layout.out; half++) {
        const Outputs outputs = outputs_of(job, tile + half);
        for (int64_t row = 0; row < job->rows; row++)
            store_outputs(job, &outputs, tile + half, row, sums + (2 * row + half) * LANES);
    }
}

/* Two tiles (w [2]) and all prepared rows: 512 columns at a time, INT4 widened to bytes in first-level cache. */
static TARGET_AVX512 void int8_pair(const Job *job, int64_t tile, const uint8_t *const *w) {
    const __m512i low = _mm512_set1_epi8(15);
    const int columns = job->layout.columns, groups_at_once = PANEL_COLUMNS / GROUP;
    uint8_t panel[2][PANEL_COLUMNS * LANES];
    float sums[ROWS_AT_ONCE * 2 * LANES];
    int64_t blocks = (job->rows + BLOCK - 1) / BLOCK;
    memset(sums, 0, (size_t)(blocks * BLOCK) * 2 * LANES * sizeof *sums);
    for (int64_t first = 0; first < job->groups; first += groups_at_once) {
        int64_t end = first + groups_at_once < job->groups ? first + groups_at_once : job->groups;
        const uint8_t *bytes[2];
        for (int half = 0; half < 2; half++) {
            const uint8_t *from = w[half] + first * (GROUP / columns) * STEP_BYTES;
            bytes[half] = from;
            if (columns == 4) continue; /* INT8 needs no widening */
            bytes[half] = panel[half];
            int64_t last = end * (GROUP / columns) < job->layout.steps ? end * (GROUP / columns) : job->layout.steps;
            for (int64_t step = 0; step < last - first * (GROUP / columns); step++) {
                __m512i v = _mm512_loadu_si512(from + step * STEP_BYTES);
                _mm_prefetch((const char *)from + (PANEL_COLUMNS / 8 + step) * STEP_BYTES, _MM_HINT_T1);
                _mm512_storeu_si512(panel[half] + 2 * step * STEP_BYTES, _mm512_and_si512(v, low));
                _mm512_storeu_si512(panel[half] + (2 * step + 1) * STEP_BYTES,
                                    _mm512_and_si512(_mm512_srli_epi16(v, 4), low));
            }
        }
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t group = first; group < end; group++) {
                int64_t place = (block * job->groups + group) * BLOCK, skip = (group - first) * GROUP / 4 * STEP_BYTES;
                const int8_t *x = (const int8_t *)job->x + block * job->block_values + group * GROUP * BLOCK;
                int8_block(bytes[0] + skip, bytes[1] + skip, x, steps_of_group(job, group) * columns / 4,
                           job->group_scale + place, job->group_start + place, sums + block * BLOCK * 2 * LANES);
            }
    }
    store_pair(job, tile, sums);
}

/* Weights of one step as pairs of bf16, exact; pairs of columns: INT4 (0,2) (4,6) (1,3) (5,7), INT8 (0,1) (2,3). */
INLINE TARGET_AVX512_BF16 void bf16_pairs(__m512i bytes, const int bits, __m512i table, __m512i *pairs) {
    if (bits == 4) { /* every nibble looks up its value by bits 0..4; the table repeats, so bit 4 does not matter */
        UNROLL for (int i = 0; i < 4; i++) pairs[i] = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4 * i), table);
    } else { /* an integer of 8 bits as float has nothing below bit 16 */
        __m512i v = _mm512_xor_si512(bytes, _mm512_set1_epi8((char)0x80)), f[4];
        UNROLL for (int i = 0; i < 4; i++)
            f[i] = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * i), 24)));
        UNROLL for (int i = 0; i < 2; i++)
            pairs[i] = _mm512_mask_mov_epi16(_mm512_srli_epi32(f[2 * i], 16), 0xaaaaaaaa, f[2 * i + 1]);
    }
}

static TARGET_AVX512_BF16 __m512i nibble_table(void) {
    uint16_t values[32];
    for (int i = 0; i < 32; i++) values[i] = float_to_bf16((float)((i & 15) - 8));
    return _mm512_loadu_si512(values);
}

/* One tile and one block of 1, 2 or 4 rows. */
INLINE TARGET_AVX512_BF16 void bf16_tile_of(const Job *job, int64_t tile, const uint8_t *w, const int bits,
                                            const int tokens) {
    const __m512i table = nibble_table();
    const uint16_t *x = job->x;
    float sums[4][LANES];
    __m512 sum[4][4]; /* four sums for each token: the instruction takes long to answer */
    UNROLL for (int i = 0; i < 4 * tokens; i++) sum[i / 4][i % 4] = _mm512_setzero_ps();
    for (int64_t step = 0; step < job->layout.steps; step++) {
        __m512i pairs[4];
        _mm_prefetch((const char *)w + step * STEP_BYTES + PREFETCH, _MM_HINT_T0);
        bf16_pairs(_mm512_loadu_si512(w + step * STEP_BYTES), bits, table, pairs);
        UNROLL for (int pair = 0; pair < 16 / bits; pair++, x += 2 * tokens)
            UNROLL for (int i = 0; i < tokens; i++) DOT_BF16(sum[i][pair], pairs[pair], broadcast_avx512(x + 2 * i));
    }
    const Outputs outputs = outputs_of(job, tile);
    for (int i = 0; i < tokens && i < job->rows; i++) {
        __m512 first = _mm512_add_ps(sum[i][0], sum[i][1]), second = _mm512_add_ps(sum[i][2], sum[i][3]);
        _mm512_storeu_ps(sums[i], _mm512_add_ps(first, second));
        store_outputs(job, &outputs, tile, i, sums[i]);
    }
}

static TARGET_AVX512_BF16 void bf16_tile(const Job *job, int64_t tile, const uint8_t *w) {
    switch (job->layout.bits * 16 + job->tokens) {
        case 4 * 16 + 1: bf16_tile_of(job, tile, w, 4, 1); break;
        case 4 * 16 + 2: bf16_tile_of(job, tile, w, 4, 2); break;
        case 4 * 16 + 4: bf16_tile_of(job, tile, w, 4, 4); break;
        case 8 * 16 + 1: bf16_tile_of(job, tile, w, 8, 1); break;
        case 8 * 16 + 2: bf16_tile_of(job, tile, w, 8, 2); break;
        case 8 * 16 + 4: bf16_tile_of(job, tile, w, 8, 4); break;
    }
}

/* Two panels of weights as pairs of bf16 [pairs][16][2], times a block of tokens; sums [tokens][2][16] += product. */
static TARGET_AVX512_BF16 void bf16_block(const uint16_t *w0, const uint16_t *w1, const uint16_t *x, int pairs,
                                          float *sums) {
    __m512 sum0[BLOCK], sum1[BLOCK];
    UNROLL for (int i = 0; i < BLOCK; i++) {
        sum0[i] = _mm512_loadu_ps(sums + 2 * i * LANES);
        sum1[i] = _mm512_loadu_ps(sums + (2 * i + 1) * LANES);
    }
    for (int pair = 0; pair < pairs; pair++, x += 2 * BLOCK) {
        __m512i v0 = _mm512_loadu_si512(w0 + pair * 2 * LANES), v1 = _mm512_loadu_si512(w1 + pair * 2 * LANES);
        UNROLL for (int i = 0; i < BLOCK; i++) {
            __m512i value = broadcast_avx512(x + 2 * i);
            DOT_BF16(sum0[i], v0, value);
            DOT_BF16(sum1[i], v1, value);
        }
    }
    UNROLL for (int i = 0; i < BLOCK; i++) {
        _mm512_storeu_ps(sums + 2 * i * LANES, sum0[i]);
        _mm512_storeu_ps(sums + (2 * i + 1) * LANES, sum1[i]);
    }
}

INLINE TARGET_AVX512_BF16 void bf16_pair_of(const Job *job, int64_t tile, const uint8_t *const *w, const int bits) {
    enum { COLUMNS = 256 };
    const __m512i table = nibble_table();
    uint16_t panel[2][COLUMNS * LANES];
    float sums[ROWS_AT_ONCE * 2 * LANES];
    int64_t blocks = (job->rows + BLOCK - 1) / BLOCK, most = COLUMNS * bits / 32;
    memset(sums, 0, (size_t)(blocks * BLOCK) * 2 * LANES * sizeof *sums);
    for (int64_t first = 0; first < job->layout.steps; first += most) {
        int64_t steps = job->layout.steps - first < most ? job->layout.steps - first : most;
        for (int half = 0; half < 2; half++)
            for (int64_t step = 0; step < steps; step++) {
                const uint8_t *from = w[half] + (first + step) * STEP_BYTES;
                __m512i pairs[4];
                _mm_prefetch((const char *)from + most * STEP_BYTES, _MM_HINT_T1);
                bf16_pairs(_mm512_loadu_si512(from), bits, table, pairs);
                UNROLL for (int i = 0; i < 16 / bits; i++)
                    _mm512_storeu_si512(panel[half] + (step * (16 / bits) + i) * 2 * LANES, pairs[i]);
            }
        for (int64_t block = 0; block < blocks; block++)
            bf16_block(panel[0], panel[1],
                       (const uint16_t *)job->x + block * job->block_values + first * (32 / bits) * BLOCK,
                       (int)steps * (16 / bits), sums + block * BLOCK * 2 * LANES);
    }
    store_pair(job, tile, sums);
}

static TARGET_AVX512_BF16 void bf16_pair(const Job *job, int64_t tile, const uint8_t *const *w) {
    if (job->layout.bits == 4)
        bf16_pair_of(job, tile, w, 4);
    else
        bf16_pair_of(job, tile, w, 8);
}

#endif

/* ---- linear ------------------------------------------------------------------------------------------------------ */

static int has_own_form(int level, int is_int8) {
    return is_int8 ? level >= LEVEL_AVX2 : level == LEVEL_AVX512_BF16;
}

/* Rows of x in a block: what the forms above have copies for. */
static int block_tokens(int64_t rows, int level, int is_int8) {
    if (rows == 1) return 1;
    if (!has_own_form(level, is_int8)) return FLOAT_TOKENS;
    if (level == LEVEL_AVX2) return 4;
    return rows == 2 ? 2 : rows <= 4 ? 4 : 12;
}

/* Tiles first and first + 1, all prepared rows.  scratch: two tiles. */
static void two_tiles(const Job *job, int64_t first, int level, int is_int8, uint8_t *scratch) {
    int64_t tiles = (job->layout.out + LANES - 1) / LANES;
    const uint8_t *w[2];
    for (int64_t tile = first; tile < first + 2; tile++) {
        uint8_t *own_scratch = scratch + (tile - first) * job->layout.steps * STEP_BYTES;
        if (tile == tiles) { /* an odd number of tiles: the last one takes both places, and is stored once */
            w[1] = w[0];
            break;
        }
        w[tile - first] = whole_steps(&job->layout, job->tiles, tile, own_scratch);
#ifdef KERNELS_X86
        if (has_own_form(level, is_int8)) {
            if (level == LEVEL_AVX2)
                avx2_tile(job, tile, w[tile - first]);
            else if (job->tokens <= 4 && is_int8)
                int8_tile(job, tile, w[tile - first]);
            else if (job->tokens <= 4)
                bf16_tile(job, tile, w[tile - first]);
            continue;
        }
#endif
        float_tile(job, tile, w[tile - first], level);
    }
#ifdef KERNELS_X86
    if (has_own_form(level, is_int8) && job->tokens > 4) {
        if (is_int8)
            int8_pair(job, first, w);
        else
            bf16_pair(job, first, w);
    }
#else
    (void)is_int8;
#endif
}

/* int8 and bf16 activations; arguments as in linear. */
static int linear_direct(const float *x, const int8_t *tiles, const void *scale, int scale_type, const float *bias,
                         float *y, int64_t rows, int64_t in, int64_t out, int bits, int activations, int threads) {
    const int level = kernels_level(), is_int8 = activations == 0, tokens = block_tokens(rows, level, is_int8);
    const int64_t most = rows < ROWS_AT_ONCE ? rows : ROWS_AT_ONCE, blocks = (most + tokens - 1) / tokens;
    const int64_t groups = (in + GROUP - 1) / GROUP, pairs = (out + 2 * LANES - 1) / (2 * LANES);
    const size_t value_bytes = !has_own_form(level, is_int8) ? 4 : is_int8 ? 1 : 2;
    Job job = {.layout = layout_of(out, in, bits), .tiles = (const uint8_t *)tiles, .scale = scale,
               .scale_type = scale_type, .bias = bias, .groups = groups, .tokens = tokens,
               .block_values = tokens * ((in + 7) / 8 * 8)};
    /* One allocation: x, then for int8 scales and starts of its groups, then two scratch tiles for each thread. */
    const size_t x_bytes = ((size_t)(blocks * job.block_values) * value_bytes + 63) / 64 * 64;
    const size_t group_bytes = is_int8 ? (size_t)(blocks * groups * tokens) * 4 : 0;
    const size_t scratch_bytes = (size_t)(2 * job.layout.steps * STEP_BYTES);
    const int has_scratch = out % LANES || in % job.layout.columns;
    uint8_t *memory = calloc(64 + x_bytes + 2 * group_bytes + (has_scratch ? (size_t)threads * scratch_bytes : 0), 1);
    if (!memory) return -1;
    job.x = memory;
    job.group_scale = is_int8 ? (float *)(memory + x_bytes) : NULL;
    job.group_start = (int32_t *)(memory + x_bytes + group_bytes);

    for (int64_t first = 0; first < rows; first += most) {
        job.rows = rows - first < most ? rows - first : most;
        job.y = y + first * out;
        const int64_t filled = (job.rows + tokens - 1) / tokens * tokens;
        OMP(omp parallel for num_threads(threads) if (filled > FEW_ROWS))
        for (int64_t row = 0; row < filled; row++) {
            const float *values = row < job.rows ? x + (first + row) * in : NULL;
            if (is_int8)
                store_int8(&job, values, row, level);
            else
                store_bf16(&job, values, row, level);
        }
        int run = (int)(pairs / (8 * threads)); /* of pairs of tiles that a thread takes */
        run = run < 4 ? 4 : run < 16 ? run : 16;
        (void)run; /* unused without OpenMP */
        OMP(omp parallel num_threads(threads))
        {
            uint8_t *scratch = memory + x_bytes + 2 * group_bytes + (has_scratch ? thread_index() * scratch_bytes : 0);
            /* Shared out as threads come free: cores differ in speed, or have other work.  Long runs, up to 1 MB of
             * INT4, are read a few percent faster. */
            OMP(omp for schedule(dynamic, run) nowait)
            for (int64_t pair = 0; pair < pairs; pair++) two_tiles(&job, 2 * pair, level, is_int8, scratch);
        }
    }
    free(memory);
    return 0;
}

/* One row of x = high + low: high is what int8 activations stand for.  It will be rounded once more, to the same
 * integers with a scale that differs by a unit in the last place at most. */
static void split_row(const float *x, float *high, float *low, int64_t in) {
    for (int64_t first = 0; first < in; first += GROUP) {
        int64_t end = first + GROUP < in ? first + GROUP : in;
        uint32_t most = 0;
        for (int64_t i = first; i < end; i++) {
            uint32_t bits = bits_from_float(x[i]) & 0x7fffffff;
            most = bits > most ? bits : most;
        }
        float factor, scale = scale_for(float_from_bits(most), &factor);
        for (int64_t i = first; i < end; i++) {
            high[i] = rintf(x[i] * factor) * scale;
            low[i] = x[i] - high[i];
        }
    }
}

/* int16 activations: the two terms of a row of x are two rows for linear_direct. */
static int linear_two_terms(const float *x, const int8_t *tiles, const void *scale, int scale_type, const float *bias,
                            float *y, int64_t rows, int64_t in, int64_t out, int bits, int threads) {
    const int64_t most = rows < ROWS_AT_ONCE / 2 ? rows : ROWS_AT_ONCE / 2;
    float *terms = malloc((size_t)(2 * most * (in + out)) * sizeof *terms + 1);
    int failed = !terms;
    for (int64_t first = 0; first < rows && !failed; first += most) {
        const int64_t count = rows - first < most ? rows - first : most;
        float *products = terms + 2 * count * in;
        OMP(omp parallel for num_threads(threads) if (count > FEW_ROWS))
        for (int64_t row = 0; row < count; row++)
            split_row(x + (first + row) * in, terms + 2 * row * in, terms + (2 * row + 1) * in, in);
        failed = linear_direct(terms, tiles, scale, scale_type, NULL, products, 2 * count, in, out, bits, 0, threads);
        if (failed) break;
        OMP(omp parallel for num_threads(threads) if (count > FEW_ROWS))
        for (int64_t row = 0; row < count; row++)
            for (int64_t i = 0; i < out; i++)
                y[(first + row) * out + i] =
                    products[2 * row * out + i] + products[(2 * row + 1) * out + i] + (bias ? bias[i] : 0);
    }
    free(terms);
    return failed ? -1 : 0;
}

/* linear: y = x @ (w * scale).T + bias.
 *   x [rows, in] float32;  tiles: weight_pack's, [out, in * bits / 8];  scale [out] of scale_type;  bias [out] or NULL;
 *   y [rows, out] float32, not overlapping x;  bits 4 or 8;  activations 0 = int8, 1 = bf16, 2 = int16
 * Returns 0, or -1 if there is no memory (y is not complete then). */
int linear(const float *x, const int8_t *tiles, const void *scale, int scale_type, const float *bias, float *y,
           int64_t rows, int64_t in, int64_t out, int bits, int activations, int threads) {
    if (activations == 2)
        return linear_two_terms(x, tiles, scale, scale_type, bias, y, rows, in, out, bits, threads);
    return linear_direct(x, tiles, scale, scale_type, bias, y, rows, in, out, bits, activations, threads);
}

/* ---- linear_back ------------------------------------------------------------------------------------------------- */

/* Here a lane is a column of w, and sums go over its rows.  A strip is 32 columns, two vectors; where one tile crosses
 * one of them, 16 rows and 16 columns, lie 2 (INT4) or 4 (INT8) steps. */

/* Those steps of a tile w; where the matrix ends before them, completed in scratch: such columns are not stored. */
static const uint8_t *crossing(const Layout *layout, const uint8_t *w, int64_t column, uint8_t *scratch) {
    int64_t first = column / layout->columns, left = layout->steps - first, steps = LANES / layout->columns;
    if (left >= steps) return w + first * STEP_BYTES;
    memset(scratch, 0, (size_t)(steps * STEP_BYTES));
    if (left > 0) memcpy(scratch, w + first * STEP_BYTES, (size_t)(left * STEP_BYTES));
    return scratch;
}

/* A crossing as floats, panel [16 rows][16 columns]. */
INLINE void crossing_floats_of(const uint8_t *w, const int bits, float *panel) {
    for (int step = 0; step < bits / 2; step++)
        for (int row = 0; row < LANES; row++)
            for (int i = 0; i < 32 / bits; i++) {
                int byte = w[step * STEP_BYTES + 4 * row + i % 4], value = bits == 8 ? byte : byte >> i / 4 * 4 & 15;
                panel[row * LANES + step * (32 / bits) + i] = (float)(value - (bits == 8 ? 128 : 8));
            }
}

static void crossing_floats(const uint8_t *w, int bits, float *panel) {
    if (bits == 4)
        crossing_floats_of(w, 4, panel);
    else
        crossing_floats_of(w, 8, panel);
}

#ifdef KERNELS_X86

/* A crossing as pairs of bf16, panel [8 pairs of rows][16 columns][2], exact. */
INLINE TARGET_AVX512_BF16 void crossing_pairs(const uint8_t *w, const int bits, __m512i table, uint16_t *panel) {
    const __m128i flip = _mm_set1_epi8((char)0x80);
    /* 8 bytes of each of two steps, two rows in each: their low nibbles are columns 0..3, the high ones 4..7 */
    const __m512i words = _mm512_set_epi64(
        (int64_t)0x800f800b800e800a, (int64_t)0x800d8009800c8008, (int64_t)0x800f800b800e800a, (int64_t)0x800d8009800c8008,
        (int64_t)0x8007800380068002, (int64_t)0x8005800180048000, (int64_t)0x8007800380068002, (int64_t)0x8005800180048000);
    const __m512i high = _mm512_set_epi64(0x0004000400040004, 0x0004000400040004, 0, 0, 0x0004000400040004,
                                          0x0004000400040004, 0, 0);
    const __m128i bytes = _mm_set_epi64x(0x0f0b0e0a0d090c08, 0x0703060205010400);
    UNROLL for (int pair = 0; pair < LANES / 2; pair++, w += 8) {
        __m128i q[2];
        UNROLL for (int i = 0; i < bits / 4; i++) {
            const uint8_t *from = w + 2 * i * STEP_BYTES;
            q[i] = _mm_unpacklo_epi64(_mm_loadl_epi64((const void *)from),
                                      _mm_loadl_epi64((const void *)(from + STEP_BYTES)));
        }
        __m512i v;
        if (bits == 4) {
            v = _mm512_srlv_epi16(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(q[0]), words), high);
            v = _mm512_permutexvar_epi16(v, table);
        } else {
            __m512 f[2];
            UNROLL for (int i = 0; i < 2; i++)
                f[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_shuffle_epi8(_mm_xor_si128(q[i], flip), bytes)));
            v = (__m512i)_mm512_cvtne2ps_pbh(f[1], f[0]);
        }
        _mm512_storeu_si512(panel + pair * 2 * LANES, v);
    }
}

/* 32 columns and all prepared rows; sums [rows][32].  256 rows of the matrix at a time become bf16 in first-level cache
 * and meet every block of tokens.  scratch: one tile. */
static TARGET_AVX512_BF16 void bf16_strip(const Job *job, const Layout *layout, int64_t column, uint8_t *scratch,
                                          float *sums) {
    enum { TILES = 16 };
    const __m512i table = nibble_table();
    const int64_t blocks = (job->rows + BLOCK - 1) / BLOCK, tiles = (layout->out + LANES - 1) / LANES;
    uint16_t panel[2][TILES * LANES * LANES];
    uint8_t ends[4 * STEP_BYTES];
    for (int64_t first = 0; first < tiles; first += TILES) {
        int64_t count = tiles - first < TILES ? tiles - first : TILES;
        for (int64_t i = 0; i < count; i++) {
            const uint8_t *w = whole_steps(layout, job->tiles, first + i, scratch);
            for (int half = 0; half < 2; half++) {
                const uint8_t *from = crossing(layout, w, column + half * LANES, ends);
                if (layout->bits == 4)
                    crossing_pairs(from, 4, table, panel[half] + i * LANES * LANES);
                else
                    crossing_pairs(from, 8, table, panel[half] + i * LANES * LANES);
            }
        }
        for (int64_t block = 0; block < blocks; block++)
            bf16_block(panel[0], panel[1], (const uint16_t *)job->x + block * job->block_values + first * LANES * BLOCK,
                       (int)count * LANES / 2, sums + block * BLOCK * 2 * LANES);
    }
}

#endif

/* 16 columns, in the same way as floats; sums [rows][16]. */
static void float_strip(const Job *job, const Layout *layout, int64_t column, int level, uint8_t *scratch,
                        float *sums) {
    enum { TILES = GROUP / LANES };
    const int64_t blocks = (job->rows + FLOAT_TOKENS - 1) / FLOAT_TOKENS, tiles = (layout->out + LANES - 1) / LANES;
    float panel[TILES * LANES * LANES];
    uint8_t ends[4 * STEP_BYTES];
    (void)level;
    for (int64_t first = 0; first < tiles; first += TILES) {
        int64_t count = tiles - first < TILES ? tiles - first : TILES;
        for (int64_t i = 0; i < count; i++) {
            const uint8_t *w = whole_steps(layout, job->tiles, first + i, scratch);
            crossing_floats(crossing(layout, w, column, ends), layout->bits, panel + i * LANES * LANES);
        }
        for (int64_t block = 0; block < blocks; block++) {
            const float *x = (const float *)job->x + block * job->block_values + first * LANES * FLOAT_TOKENS;
            float *to = sums + block * FLOAT_TOKENS * LANES;
            int rows = (int)count * LANES;
#ifdef KERNELS_X86
            if (level >= LEVEL_AVX512)
                avx512_dot(panel, x, rows, FLOAT_TOKENS, NULL, to);
            else if (level == LEVEL_AVX2)
                avx2_dot(panel, x, rows, FLOAT_TOKENS, NULL, to);
            else
#endif
                plain_dot(panel, x, rows, FLOAT_TOKENS, NULL, to);
        }
    }
}

/* linear_back: y = x @ w, where linear is x @ (w * scale).T: the caller has multiplied x by the scales.
 *   x [rows, out] float32, rounded to bf16;  tiles, bits as in linear;  y [rows, in] float32, not overlapping x
 * Returns 0, or -1 if there is no memory (y is not complete then). */
int linear_back(const float *x, const int8_t *tiles, float *y, int64_t rows, int64_t in, int64_t out, int bits,
                int threads) {
    const Layout layout = layout_of(out, in, bits);
    const int level = kernels_level(), is_bf16 = level == LEVEL_AVX512_BF16;
    const int tokens = is_bf16 ? BLOCK : FLOAT_TOKENS, width = is_bf16 ? 2 * LANES : LANES;
    const int64_t most = rows < ROWS_AT_ONCE ? rows : ROWS_AT_ONCE, blocks = (most + tokens - 1) / tokens;
    const int64_t strips = (in + width - 1) / width;
    /* For store_bf16, the rows of w are the columns of the matrix. */
    Job job = {.layout = layout_of(in, out, 8), .tiles = (const uint8_t *)tiles, .tokens = tokens,
               .block_values = tokens * ((out + LANES - 1) / LANES * LANES)};
    const size_t x_bytes = ((size_t)(blocks * job.block_values) * (is_bf16 ? 2 : 4) + 63) / 64 * 64;
    const size_t scratch_bytes = (size_t)(layout.steps * STEP_BYTES);
    uint8_t *memory = calloc(64 + x_bytes + (size_t)threads * scratch_bytes, 1);
    if (!memory) return -1;
    job.x = memory;
    for (int64_t first = 0; first < rows; first += most) {
        job.rows = rows - first < most ? rows - first : most;
        const int64_t filled = (job.rows + tokens - 1) / tokens * tokens;
        OMP(omp parallel for num_threads(threads))
        for (int64_t row = 0; row < filled; row++)
            store_bf16(&job, row < job.rows ? x + (first + row) * out : NULL, row, level);
        OMP(omp parallel for num_threads(threads) schedule(dynamic, 4))
        for (int64_t strip = 0; strip < strips; strip++) {
            const int64_t column = strip * width, left = in - column < width ? in - column : width;
            uint8_t *scratch = memory + x_bytes + thread_index() * scratch_bytes;
            float sums[ROWS_AT_ONCE * 2 * LANES];
            memset(sums, 0, (size_t)(filled * width) * sizeof *sums);
#ifdef KERNELS_X86
            if (is_bf16)
                bf16_strip(&job, &layout, column, scratch, sums);
            else
#endif
                float_strip(&job, &layout, column, level, scratch, sums);
            for (int64_t row = 0; row < job.rows; row++)
                memcpy(y + (first + row) * in + column, sums + row * width, (size_t)left * sizeof *sums);
        }
    }
    free(memory);
    return 0;
}
