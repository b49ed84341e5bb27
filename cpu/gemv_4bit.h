// Products of a few rows with a matrix of four-bit codes, decoded in registers: what decoding a text needs runs at
// the speed of memory. Accumulators see k ascending, each element rounded to bf16, as everywhere.
#ifndef LOWRANK_GEMV_4BIT_H
#define LOWRANK_GEMV_4BIT_H

#include "gemm_kernel.h"

// Rows of A that are taken at once at most.
#define GEMV_ROWS 4

#if defined(LOWRANK_AVX512BF16)
// Blocks of a row whose constants are prepared at a time.
#define GEMV_BLOCKS 16

// Constants of sixteen rows' blocks, each row's twice side by side: the layout of decoded pairs.
struct gemv_constants {
    float scale[GEMV_BLOCKS][2][LANES];
    float zero[GEMV_BLOCKS][2][LANES];
};

// map[code] for sixteen codes below 256.
INLINE vf lookup256(const float *map, vi code) {
    vi part = vi_srl(code, 5);
    vf x = _mm512_permutex2var_ps(vf_load(map), code, vf_load(map + 16));
#pragma GCC unroll 8
    for (int i = 1; i < 8; i++) {
        __mmask16 here = _mm512_cmpeq_epi32_mask(part, vi_set1(i));
        x = _mm512_mask_blend_ps(here, x, _mm512_permutex2var_ps(vf_load(map + 32 * i), code, vf_load(map + 32 * i + 16)));
    }
    return x;
}

// Scales of `count` blocks from `block` on.
INLINE vf scales_of_row(const struct quantized *q, size_t block, size_t count) {
    __mmask16 present = first_lanes((int)count);
    if (q->scales) return _mm512_maskz_loadu_ps(present, q->scales + block);
    vi code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(present, q->nested + block));
    size_t first = block >> q->nested_shift, last = (block + count - 1) >> q->nested_shift;
    // Sixteen neighbours lie in two blocks of constants at most.
    size_t left = ((first + 1) << q->nested_shift) - block;
    vf absmax = vf_set1(q->nested_absmax[first]);
    if (last != first) absmax = vf_select(first_lanes((int)left), absmax, vf_set1(q->nested_absmax[last]));
    return vf_add(vf_mul(lookup256(q->nested_map, code), absmax), vf_set1(q->nested_offset));
}

INLINE void store_twice(float to[GEMV_BLOCKS][2][LANES], vi r[LANES]) {
    const __m512i low_half = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i high_half = _mm512_add_epi32(low_half, _mm512_set1_epi32(8));
    transpose16(r);
    for (int b = 0; b < GEMV_BLOCKS; b++) {
        vf_store(to[b][0], vi_as_vf(_mm512_permutexvar_epi32(low_half, r[b])));
        vf_store(to[b][1], vi_as_vf(_mm512_permutexvar_epi32(high_half, r[b])));
    }
}

// Constants of sixteen rows, `count` blocks from `block` on of each; whether scales are safe in hardware.
static int prepare_constants(struct gemv_constants *to, const struct quantized *q, size_t row, size_t block,
                             size_t count) {
    size_t per_row = q->cols / q->block_cols;
    __mmask16 present = first_lanes((int)count), tiny = 0;
    vi r[LANES];
    for (size_t i = 0; i < LANES; i++) {
        vf scale = scales_of_row(q, (row + i) * per_row + block, count), magnitude = vf_abs(scale);
        tiny |= present & vf_lt(magnitude, vf_set1(NORMAL_SCALE)) & _mm512_cmp_ps_mask(magnitude, vf_zero(), _CMP_NEQ_OQ);
        r[i] = vf_as_vi(scale);
    }
    if (tiny) return 0;
    store_twice(to->scale, r);
    if (q->zeros) {
        for (size_t i = 0; i < LANES; i++) {
            __m128i zero = _mm_maskz_loadu_epi8(present, q->zeros + (row + i) * per_row + block);
            r[i] = vf_as_vi(vi_to_vf(_mm512_cvtepu8_epi32(zero)));
        }
        store_twice(to->zero, r);
    }
    return 1;
}

// The codes of a group's sixteen rows, `bytes` of each from `byte` on: eight elements of a row in a lane.
INLINE void load_codes(vi r[LANES], const struct quantized *q, size_t row, size_t byte, size_t bytes, size_t ahead) {
    __mmask64 present = bytes == 64 ? ~0ull : (1ull << bytes) - 1;
    size_t stride = q->cols / 2;
    const uint8_t *from = q->codes + row * stride + byte;
#pragma GCC unroll 16
    for (size_t i = 0; i < LANES; i++) {
        __builtin_prefetch(from + i * stride + ahead, 0, 3);
        r[i] = _mm512_maskz_loadu_epi8(present, from + i * stride);
    }
    transpose16(r);
}

// Four pairs of k: eight elements of each of sixteen rows.
INLINE void add_eight(vf *acc, const int m, vi codes, const uint32_t *a, const struct gemv_constants *constants,
                      size_t block, vf table, const int zeros) {
    const __m512i low_half = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i high_half = _mm512_add_epi32(low_half, _mm512_set1_epi32(8));
    vi code[2] = {_mm512_permutexvar_epi32(low_half, codes), _mm512_permutexvar_epi32(high_half, codes)};
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
        vi shift = _mm512_set1_epi64((long long)(8 * p + 4) << 32 | 8 * p);
        vf x[2];
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            x[h] = _mm512_permutexvar_ps(_mm512_srlv_epi32(code[h], shift), table);
            if (zeros) x[h] = vf_sub(x[h], vf_load(constants->zero[block][h]));
            x[h] = vf_mul(x[h], vf_load(constants->scale[block][h]));
        }
        vi pair = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]);
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) acc[i] = step_bf16(acc[i], a[p * m + i], pair);
    }
}

// c[m][NR] (+)= A B for the NR columns of B that are q's rows from `row` on; returns the units of k that were done,
// all of them unless a scale is too small.
INLINE size_t gemv_4bit(const int m, const int zeros, const struct quantized *q, size_t row, const uint32_t *a,
                        size_t k, float *c, int first) {
    const vf table = vf_load(q->levels);
    const int shift = __builtin_ctzll(q->block_cols);
    size_t span = GEMV_BLOCKS * q->block_cols, done = 0;
    // Rows that are short are followed by the next group's; long ones are asked for within themselves.
    size_t ahead = q->cols / 2 <= 1024 ? NR * q->cols / 2 : 512;
    struct gemv_constants constants[NV];
    vi codes[NV][LANES];
    vf acc[NV][GEMV_ROWS];
#pragma GCC unroll 2
    for (int g = 0; g < NV; g++)
#pragma GCC unroll 4
        for (int i = 0; i < m; i++)
            acc[g][i] = first ? vf_zero() : vf_load(c + i * NR + g * LANES);
    for (; done < k; done += span) {
        size_t left = k - done < span ? k - done : span;
        size_t blocks = (left + q->block_cols - 1) / q->block_cols;
        int safe = 1;
        for (int g = 0; g < NV; g++)
            safe &= prepare_constants(&constants[g], q, row + (size_t)g * LANES, done / q->block_cols, blocks);
        if (!safe) break;
        for (size_t at = 0; at < left; at += 8 * LANES) {
            size_t bytes = (left - at < 8 * LANES ? left - at : 8 * LANES) / 2;
            for (int g = 0; g < NV; g++)
                load_codes(codes[g], q, row + (size_t)g * LANES, (done + at) / 2, bytes, ahead);
            const uint32_t *units_of_a = a + (done + at) / 2 * (size_t)m;
            for (size_t j = 0; j < bytes / 4; j++, units_of_a += 4 * m) {
                size_t block = (at + 8 * j) >> shift;
#pragma GCC unroll 2
                for (int g = 0; g < NV; g++)
                    add_eight(acc[g], m, codes[g][j], units_of_a, &constants[g], block, table, zeros);
            }
        }
    }
#pragma GCC unroll 2
    for (int g = 0; g < NV; g++)
#pragma GCC unroll 4
        for (int i = 0; i < m; i++)
            vf_store(c + i * NR + g * LANES, acc[g][i]);
    return (done < k ? done : k) / 2;
}

#define GEMV(m)                                                                                                 \
    static size_t gemv_4bit_##m(const struct quantized *q, size_t row, const uint32_t *a, size_t k, float *c,   \
                                int first) {                                                                    \
        return q->zeros ? gemv_4bit(m, 1, q, row, a, k, c, first) : gemv_4bit(m, 0, q, row, a, k, c, first);    \
    }
GEMV(1)
GEMV(2)
GEMV(3)
GEMV(4)

// Units of k that were done, 0 if it can't be done so.
static size_t few_rows_4bit(const struct quantized *q, size_t column, size_t m, const uint32_t *a, size_t k, float *c,
                            int first) {
    static size_t (*const kernels[GEMV_ROWS])(const struct quantized *, size_t, const uint32_t *, size_t, float *,
                                              int) = {gemv_4bit_1, gemv_4bit_2, gemv_4bit_3, gemv_4bit_4};
    int whole_blocks = q->block_rows <= 1 && q->cols % q->block_cols == 0;
    if (m > GEMV_ROWS || q->format != CODES_4BIT || !whole_blocks || column + NR > q->rows) return 0;
    return kernels[m - 1](q, column, a, k, c, first);
}
#else
static size_t few_rows_4bit(const struct quantized *q, size_t column, size_t m, const uint32_t *a, size_t k, float *c,
                            int first) {
    (void)q, (void)column, (void)m, (void)a, (void)k, (void)c, (void)first;
    return 0;
}
#endif

#endif
