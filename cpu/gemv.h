// Products of a few rows with a matrix in bf16 or in codes of four or eight bits, which goes from memory to registers and no
// further: what decoding a text needs. Accumulators see k ascending, each element rounded to bf16, as everywhere.
#ifndef LOWRANK_GEMV_H
#define LOWRANK_GEMV_H

#include "gemm_kernel.h"

// Rows of A that are taken at once at most.
#define GEMV_ROWS 4
// Rows from which on it pays to pack B first; without kernels of their own for few rows, packing twice never does.
#if defined(LOWRANK_AVX512BF16)
#define MANY_ROWS (2 * GEMV_ROWS + 1)
#else
#define MANY_ROWS (GEMV_ROWS + 1)
#endif

#if defined(LOWRANK_AVX512BF16)
// Sixteen columns are a group, and the groups of a panel are taken at once: that hides the latency of an accumulator's
// chain.
#define GROUPS NV

// Blocks of a row whose constants are prepared at a time.
#define GEMV_BLOCKS 16

// Constants of sixteen rows' blocks, each row's twice side by side: the layout of decoded pairs.
struct gemv_constants {
    float scale[GEMV_BLOCKS][2][LANES];
    float zero[GEMV_BLOCKS][2][LANES];
};

// map[code] for sixteen codes below 256: by the low five bits in each eighth of the map, then by the others.
INLINE vf lookup256(const float *map, vi code) {
    vf x[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        x[i] = _mm512_permutex2var_ps(vf_load(map + 32 * i), code, vf_load(map + 32 * i + 16));
#pragma GCC unroll 3
    for (int bit = 5, n = 4; n > 0; bit++, n /= 2) {
        __mmask16 odd = _mm512_test_epi32_mask(code, vi_set1(1 << bit));
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) x[i] = _mm512_mask_blend_ps(odd, x[2 * i], x[2 * i + 1]);
    }
    return x[0];
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

INLINE void store_twice(float to[GEMV_BLOCKS][2][LANES], vi r[LANES], size_t count) {
    transpose16(r);
    for (size_t b = 0; b < count; b++) {
        for (int h = 0; h < 2; h++) vf_store(to[b][h], vi_as_vf(each_twice(r[b], h)));
    }
}

// Constants of sixteen rows, `count` blocks from `block` on of each; whether scales are safe in hardware.
static int prepare_constants(struct gemv_constants *to, const struct quantized *q, size_t row, size_t block,
                             size_t count) {
    size_t per_row = q->cols / q->block_cols;
    __mmask16 present = first_lanes((int)count), tiny = 0;
    vi r[LANES];
    float all[LANES * LANES + LANES];
    // Short rows' constants are neighbours: sixteen at a time, whatever row they are of.
    int together = per_row <= LANES && count == per_row;
    size_t steps = together ? per_row : LANES;
    for (size_t i = 0; i < steps; i++) {
        size_t from = together ? row * per_row + i * LANES : (row + i) * per_row + block;
        vf scale = scales_of_row(q, from, together ? LANES : count), magnitude = vf_abs(scale);
        __mmask16 small = vf_lt(magnitude, vf_set1(NORMAL_SCALE)) & _mm512_cmp_ps_mask(magnitude, vf_zero(), _CMP_NEQ_OQ);
        tiny |= together ? small : present & small;
        if (together) vf_store(all + i * LANES, scale);
        else r[i] = vf_as_vi(scale);
    }
    if (tiny) return 0;
    if (together)
        for (size_t i = 0; i < LANES; i++) r[i] = vf_as_vi(vf_load(all + i * per_row));
    store_twice(to->scale, r, count);
    if (q->zeros) {
        for (size_t i = 0; i < LANES; i++) {
            __m128i zero = _mm_maskz_loadu_epi8(present, q->zeros + (row + i) * per_row + block);
            r[i] = vf_as_vi(vi_to_vf(_mm512_cvtepu8_epi32(zero)));
        }
        store_twice(to->zero, r, count);
    }
    return 1;
}

// What to ask the cache for while `used` bytes of each of a panel's lines, `row_bytes` apart, are read: the next panel's
// memory in its order, or its part of each line, or, of lines so long that it would be gone again, what comes next in each.
struct ahead {
    const char *from;
    size_t step, per_group;
};

INLINE struct ahead ahead_of(const void *data, size_t row, size_t row_bytes, size_t used) {
    const char *line = (const char *)data + row * row_bytes;
    size_t next = used > 8192 ? 512 : used < row_bytes ? NR * row_bytes : 0;
    if (next) return (struct ahead){line + next, row_bytes, 64 - GROUPS * LANES * row_bytes};
    return (struct ahead){line + NR * row_bytes, 64, 0};
}

INLINE void ask(struct ahead *ahead) {
    __builtin_prefetch(ahead->from, 0, 2);
    ahead->from += ahead->step;
}

// The codes of a group's sixteen rows, `bytes` of each from `byte` on: eight elements of a row in a lane.
INLINE void load_codes(vi r[LANES], const struct quantized *q, size_t row, size_t byte, size_t bytes,
                       struct ahead *ahead) {
    __mmask64 present = bytes == 64 ? ~0ull : (1ull << bytes) - 1;
    size_t stride = q->cols / 2;
    const uint8_t *from = q->codes + row * stride + byte;
#pragma GCC unroll 16
    for (size_t i = 0; i < LANES; i++) {
        ask(ahead);
        r[i] = _mm512_maskz_loadu_epi8(present, from + i * stride);
    }
    transpose16(r);
}

// Four pairs of k: eight elements of each of sixteen rows.
INLINE void add_eight(vf *acc, const int m, vi codes, const uint32_t *a, const struct gemv_constants *constants,
                      size_t block, vf table, const int zeros) {
    vi code[2] = {each_twice(codes, 0), each_twice(codes, 1)};
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

// The accumulators of a panel, [m][ldc] in memory.
INLINE void load_accumulators(vf acc[GROUPS][GEMV_ROWS], const int m, const float *c, size_t ldc, int first) {
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++)
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) acc[g][i] = first ? vf_zero() : vf_load(c + (size_t)i * ldc + g * LANES);
}

INLINE void store_accumulators(vf acc[GROUPS][GEMV_ROWS], const int m, float *c, size_t ldc) {
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++)
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) vf_store(c + (size_t)i * ldc + g * LANES, acc[g][i]);
}

// c (+)= A B for the panel of B that is q's rows from `row` on. Returns the units of k that were done, all of them
// unless a scale is too small.
INLINE size_t gemv_4bit(const int m, const int zeros, const struct quantized *q, size_t row, const uint32_t *a, size_t k,
                        float *c, size_t ldc, int first) {
    const vf table = vf_load(q->levels);
    const int shift = __builtin_ctzll(q->block_cols);
    size_t span = GEMV_BLOCKS * q->block_cols, done = 0;
    struct ahead ahead = ahead_of(q->codes, row, q->cols / 2, q->cols / 2);
    struct gemv_constants constants[GROUPS];
    vi codes[GROUPS][LANES];
    vf acc[GROUPS][GEMV_ROWS];
    load_accumulators(acc, m, c, ldc, first);
    for (; done < k; done += span) {
        size_t left = k - done < span ? k - done : span;
        size_t blocks = (left + q->block_cols - 1) / q->block_cols;
        int safe = 1;
        for (int g = 0; g < GROUPS; g++)
            safe &= prepare_constants(&constants[g], q, row + (size_t)g * LANES, done / q->block_cols, blocks);
        if (!safe) break;
        for (size_t at = 0; at < left; at += 8 * LANES, ahead.from += ahead.per_group) {
            size_t bytes = (left - at < 8 * LANES ? left - at : 8 * LANES) / 2;
            for (int g = 0; g < GROUPS; g++)
                load_codes(codes[g], q, row + (size_t)g * LANES, (done + at) / 2, bytes, &ahead);
            const uint32_t *units_of_a = a + (done + at) / 2 * (size_t)m;
            for (size_t j = 0; j < bytes / 4; j++, units_of_a += 4 * m) {
                size_t block = (at + 8 * j) >> shift;
#pragma GCC unroll 4
                for (int g = 0; g < GROUPS; g++)
                    add_eight(acc[g], m, codes[g][j], units_of_a, &constants[g], block, table, zeros);
            }
        }
    }
    store_accumulators(acc, m, c, ldc);
    return (done < k ? done : k) / 2;
}

// What comes 4 KiB after these bytes of a stream.
INLINE void ask_further(const uint8_t *from, const size_t bytes) {
#pragma GCC unroll 8
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + 4096 + line, 0, 3);
}

// The same for a matrix in panels (panels.h).
INLINE size_t gemv_panel_4bit(const int m, const enum panel_kind kind, const struct quantized *q, size_t row, const uint32_t *a, size_t k,
                         float *c, size_t ldc, int first) {
    const vf table = vf_load(q->levels);
    const uint8_t *from = q->codes + panel_byte(q, row, 0);
    size_t block = panel_block(q, row, 0);
    vf acc[GROUPS][GEMV_ROWS];
    load_accumulators(acc, m, c, ldc, first);
    for (size_t done = 0; done < k; done += q->block_cols, block += PANEL_ROWS) {
        struct panel_levels levels[GROUPS];
#pragma GCC unroll 2
        for (size_t g = 0; g < GROUPS; g++) scale_levels(&levels[g], q, block + g * LANES, table, kind);
        for (size_t col = 0; col < q->block_cols; col += PANEL_COLS) {
            vi codes[GROUPS][4], numbered[GROUPS][4];
#pragma GCC unroll 2
            for (size_t g = 0; g < GROUPS; g++, from += PANEL_4BIT) {
                ask_further(from, PANEL_4BIT);
                load_panel_4bit(codes[g], from);
            }
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++, a += 4 * m)
#pragma GCC unroll 2
                for (int g = 0; g < GROUPS; g++) {
                    vi pairs[4];
                    if (s % 2 == 0) number_rows(numbered[g], codes[g], s / 2);
                    panel_units(pairs, numbered[g], &levels[g], s);
#pragma GCC unroll 4
                    for (int p = 0; p < 4; p++)
#pragma GCC unroll 4
                        for (int i = 0; i < m; i++) acc[g][i] = step_bf16(acc[g][i], a[p * m + i], pairs[p]);
                }
        }
    }
    store_accumulators(acc, m, c, ldc);
    return k / 2;
}

// The same for codes of eight bits.
INLINE size_t gemv_panel_8bit(const int m, const int32_t format, const struct quantized *q, size_t row,
                              const uint32_t *a, size_t k, float *c, size_t ldc, int first) {
    const uint8_t *from = q->codes + panel_byte(q, row, 0);
    size_t block = panel_block(q, row, 0);
    vf acc[GROUPS][GEMV_ROWS];
    load_accumulators(acc, m, c, ldc, first);
    for (size_t col = 0, end; col < k; block += PANEL_ROWS) {
        vf scale[GROUPS][2];
#pragma GCC unroll 2
        for (size_t g = 0; g < GROUPS; g++) panel_scales(scale[g], q, block + g * LANES, format);
        end = k - col < q->block_cols ? k : col + q->block_cols;
        for (; col < end; col += PANEL_COLS, from += GROUPS * PANEL_8BIT) {
#pragma GCC unroll 2
            for (size_t g = 0; g < GROUPS; g++) ask_further(from + g * PANEL_8BIT, PANEL_8BIT);
            for (size_t u = 0; u < PANEL_COLS / 2; u++, a += m)
#pragma GCC unroll 2
                for (size_t g = 0; g < GROUPS; g++) {
                    vi pair = panel_pair(from + g * PANEL_8BIT + 32 * u, scale[g], format);
#pragma GCC unroll 4
                    for (int i = 0; i < m; i++) acc[g][i] = step_bf16(acc[g][i], a[i], pair);
                }
        }
    }
    store_accumulators(acc, m, c, ldc);
    return k / 2;
}

// Scales of sixteen rows at a column, each row's twice side by side; whether they are safe in hardware.
INLINE int scales_twice(vf scale[2], const struct quantized *q, size_t row, size_t col) {
    float s[LANES];
    for (size_t i = 0, run; i < LANES; i++) s[i] = scale_of(q, block_of(q, row + i, col, &run));
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) scale[h] = floats_twice(vf_load(s), h);
    return all_normal(vf_load(s));
}

// The same for a matrix in codes of eight bits, of which 64 of each row are taken at a time, four in a lane.
INLINE size_t gemv_8bit(const int m, const int32_t format, const struct quantized *q, size_t row, const uint32_t *a,
                        size_t k, float *c, size_t ldc, int first) {
    struct ahead ahead = ahead_of(q->codes, row, q->cols, k);
    size_t col = 0, next = 0;
    vi codes[GROUPS][LANES];
    vf scale[GROUPS][2], acc[GROUPS][GEMV_ROWS];
    load_accumulators(acc, m, c, ldc, first);
    for (; col < k; col += 4, a += 2 * m) {
        if (col == next) { // of a block
            int safe = 1;
            for (size_t g = 0; g < GROUPS; g++) safe &= scales_twice(scale[g], q, row + g * LANES, col);
            if (!safe) break;
            next += q->block_cols;
        }
        if (col % 64 == 0) {
            __mmask64 present = k - col < 64 ? (1ull << (k - col)) - 1 : ~0ull;
            for (size_t g = 0; g < GROUPS; g++) {
                const uint8_t *from = q->codes + (row + g * LANES) * q->cols + col;
#pragma GCC unroll 16
                for (size_t i = 0; i < LANES; i++) {
                    ask(&ahead);
                    codes[g][i] = _mm512_maskz_loadu_epi8(present, from + i * q->cols);
                }
                transpose16(codes[g]);
            }
            ahead.from += ahead.per_group;
        }
#pragma GCC unroll 2
        for (int g = 0; g < GROUPS; g++) {
            vi four = codes[g][col % 64 / 4];
            vi code[2] = {each_twice(four, 0), each_twice(four, 1)};
#pragma GCC unroll 2
            for (int p = 0; p < 2; p++) {
                // Even lanes get the later element of a pair: the low half of a unit.
                vi shift = _mm512_set1_epi64((long long)(16 * p) << 32 | (16 * p + 8));
                vf x[2];
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++)
                    x[h] = vf_mul(levels_of_bytes(format, _mm512_srlv_epi32(code[h], shift)), scale[g][h]);
                vi pair = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]);
#pragma GCC unroll 4
                for (int i = 0; i < m; i++) acc[g][i] = step_bf16(acc[g][i], a[p * m + i], pair);
            }
        }
    }
    store_accumulators(acc, m, c, ldc);
    return col / 2;
}

INLINE size_t gemv_bytes(const int m, const int32_t format, const struct quantized *q, size_t row, const uint32_t *a,
                         size_t k, float *c, size_t ldc, int first) {
    if (q->panels) return gemv_panel_8bit(m, format, q, row, a, k, c, ldc, first);
    return gemv_8bit(m, format, q, row, a, k, c, ldc, first);
}

// The same for a matrix in bf16, of which 32 elements of each row are taken at a time.
INLINE size_t gemv_bf16(const int m, const struct gemm_operand *b, size_t row, const uint32_t *a, size_t k, float *c,
                        size_t ldc, int first) {
    size_t row_bytes = b->ld * sizeof(uint16_t), ku = units(k, 1);
    struct ahead ahead = ahead_of(b->data, row, row_bytes, k * sizeof(uint16_t));
    vi pairs[GROUPS][LANES];
    vf acc[GROUPS][GEMV_ROWS];
    load_accumulators(acc, m, c, ldc, first);
    for (size_t u = 0; u < ku; u += LANES, a += LANES * m, ahead.from += ahead.per_group) {
        size_t left = k - 2 * u;
        for (int g = 0; g < GROUPS; g++) {
            const char *from = (const char *)b->data + (row + (size_t)g * LANES) * row_bytes + 2 * u * sizeof(uint16_t);
#pragma GCC unroll 16
            for (size_t i = 0; i < LANES; i++, from += row_bytes) {
                ask(&ahead);
                pairs[g][i] = units_of_row(from, left < 2 * LANES ? left : 2 * LANES, TYPE_BF16, 1);
            }
            transpose16(pairs[g]);
        }
        size_t count = ku - u < LANES ? ku - u : LANES;
        for (size_t j = 0; j < count; j++)
#pragma GCC unroll 4
            for (int g = 0; g < GROUPS; g++)
#pragma GCC unroll 4
                for (int i = 0; i < m; i++) acc[g][i] = step_bf16(acc[g][i], a[j * m + i], pairs[g][j]);
    }
    store_accumulators(acc, m, c, ldc);
    return ku;
}

#define GEMV(m)                                                                                                      \
    static size_t gemv_##m(const struct gemm_operand *b, size_t row, const uint32_t *a, size_t k, float *c, size_t ldc, \
                           int first) {                                                                              \
        const struct quantized *q = b->quantized;                                                                    \
        if (!q) return gemv_bf16(m, b, row, a, k, c, ldc, first);                                                    \
        if (q->format == CODES_INT8) return gemv_bytes(m, CODES_INT8, q, row, a, k, c, ldc, first);                  \
        if (q->format == CODES_E4M3) return gemv_bytes(m, CODES_E4M3, q, row, a, k, c, ldc, first);                  \
        if (q->format == CODES_E5M2) return gemv_bytes(m, CODES_E5M2, q, row, a, k, c, ldc, first);                  \
        if (q->panels) switch (panel_kind_of(q)) {                                                                   \
            case PANEL_ZEROS: return gemv_panel_4bit(m, PANEL_ZEROS, q, row, a, k, c, ldc, first);                        \
            case PANEL_MINIMUMS: return gemv_panel_4bit(m, PANEL_MINIMUMS, q, row, a, k, c, ldc, first);                  \
            default: return gemv_panel_4bit(m, PANEL_PLAIN, q, row, a, k, c, ldc, first);                                 \
            }                                                                                                        \
        return q->zeros ? gemv_4bit(m, 1, q, row, a, k, c, ldc, first) : gemv_4bit(m, 0, q, row, a, k, c, ldc, first); \
    }
GEMV(1)
GEMV(2)
GEMV(3)
GEMV(4)

// Units of k that were done for the panel from `column` on, 0 if it can't be done so. Rows of c are ldc apart.
INLINE size_t few_rows(const struct gemm_operand *b, size_t column, size_t columns, size_t m, const uint32_t *a, size_t k,
                       float *c, size_t ldc, int first) {
    typedef size_t (*kernel)(const struct gemm_operand *, size_t, const uint32_t *, size_t, float *, size_t, int);
    static const kernel kernels[GEMV_ROWS] = {gemv_1, gemv_2, gemv_3, gemv_4};
    const struct quantized *q = b->quantized;
    if (m > GEMV_ROWS || !b->transposed || column + NR > columns) return 0;
    if (!q && b->type != TYPE_BF16) return 0;
    if (q && q->block_rows == 0 && q->cols % q->block_cols != 0) return 0;
    if (q && q->format == CODES_4BIT) {
        // Other constants in GGUF's forms are taken panel by panel.
        if (q->block_rows > 1 || (!q->panels && (has_minimums(q) || (q->nested && q->nested_shift < 4)))) return 0;
    } else if (q) {
        if (q->format == CODES_6BIT || has_minimums(q) || q->cols % 4 != 0 || q->block_cols % 4 != 0) return 0;
    }
    return kernels[m - 1](b, column, a, k, c, ldc, first);
}

// c = A B for 32 `groups` columns of a B in bf16 whose columns are contiguous, from b on: k rows, ld elements apart.
INLINE void gemv_columns(const int m, const int groups, const uint16_t *b, size_t ld, const uint32_t *a, size_t k,
                         float *c, size_t ldc) {
    vf acc[2][2][GEMV_ROWS]; // [group][columns 0 to 3 of each eight, 4 to 7][row]
#pragma GCC unroll 2
    for (int g = 0; g < groups; g++)
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) acc[g][0][i] = acc[g][1][i] = vf_zero();
    for (size_t u = 0; u < units(k, 1); u++, a += m, b += 2 * ld) {
#pragma GCC unroll 2
        for (int g = 0; g < groups; g++) {
            vi first = vi_load(b + 32 * g), second = 2 * u + 1 < k ? vi_load(b + ld + 32 * g) : vi_set1(0);
            vi low = _mm512_unpacklo_epi16(second, first), high = _mm512_unpackhi_epi16(second, first);
#pragma GCC unroll 4
            for (int i = 0; i < m; i++) {
                acc[g][0][i] = step_bf16(acc[g][0][i], a[i], low);
                acc[g][1][i] = step_bf16(acc[g][1][i], a[i], high);
            }
        }
    }
    const vi order = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
#pragma GCC unroll 2
    for (int g = 0; g < groups; g++)
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) {
            float *to = c + (size_t)i * ldc + 32 * g;
            vf_store(to, _mm512_permutex2var_ps(acc[g][0][i], order, acc[g][1][i]));
            vf_store(to + LANES,
                     _mm512_permutex2var_ps(acc[g][0][i], _mm512_or_epi32(order, vi_set1(8)), acc[g][1][i]));
        }
}

#define GEMV_COLUMNS(m)                                                                                              \
    static void gemv_columns_##m(const uint16_t *b, size_t ld, size_t n, const uint32_t *a, size_t k, float *c,      \
                                 size_t ldc) {                                                                       \
        size_t col = 0;                                                                                              \
        for (; col + 64 <= n; col += 64) gemv_columns(m, 2, b + col, ld, a, k, c + col, ldc);                        \
        if (col < n) gemv_columns(m, 1, b + col, ld, a, k, c + col, ldc);                                            \
    }
GEMV_COLUMNS(1)
GEMV_COLUMNS(2)
GEMV_COLUMNS(3)
GEMV_COLUMNS(4)

// c = A B for few rows and a B in bf16 as gemv_columns takes it, of n columns; whether it was done.
INLINE int few_rows_of_columns(const struct gemm_operand *b, size_t n, size_t m, const uint32_t *a, size_t k, float *c,
                               size_t ldc) {
    typedef void (*kernel)(const uint16_t *, size_t, size_t, const uint32_t *, size_t, float *, size_t);
    static const kernel kernels[GEMV_ROWS] = {gemv_columns_1, gemv_columns_2, gemv_columns_3, gemv_columns_4};
    if (m > GEMV_ROWS || b->transposed || b->quantized || b->type != TYPE_BF16 || n % 32 != 0) return 0;
    kernels[m - 1](b->data, b->ld, n, a, k, c, ldc);
    return 1;
}
#else
INLINE int few_rows_of_columns(const struct gemm_operand *b, size_t n, size_t m, const uint32_t *a, size_t k, float *c,
                               size_t ldc) {
    (void)b, (void)n, (void)m, (void)a, (void)k, (void)c, (void)ldc;
    return 0;
}
INLINE size_t few_rows(const struct gemm_operand *b, size_t column, size_t columns, size_t m, const uint32_t *a, size_t k,
                       float *c, size_t ldc, int first) {
    (void)b, (void)column, (void)columns, (void)m, (void)a, (void)k, (void)c, (void)ldc, (void)first;
    return 0;
}
#endif

#endif
