// The inner part of all matrix products: packing and micro-kernels, shared by gemm.c and attention.c.
//
// Both operands are packed in units of 32 bits: an f32, or a pair of bf16 with the earlier k in the high
// half, since vdpbf16ps multiplies the odd (high) element first. So an accumulator sees k ascending in both
// arithmetics. An odd number of bf16 is padded with a zero on both sides.
//   A: [ku][mr]   the mr rows of a tile side by side
//   B: [ku][NR]   the NR columns of a panel side by side, zeros beyond the matrix
#ifndef LOWRANK_GEMM_KERNEL_H
#define LOWRANK_GEMM_KERNEL_H

#include "kernels.h"
#include "quant.h"
#include "simd.h"

#if defined(LOWRANK_AVX512)
#define MR 14  // rows of a tile: 28 accumulators and two columns of B in 32 registers
#define NV 2   // vectors of 16 columns in a panel
#elif defined(LOWRANK_AVX2)
#define MR 6
#define NV 1
#else
#define MR 4
#define NV 1
#endif
#define NR (NV * LANES)

INLINE size_t units(size_t k, int bf16) { return bf16 ? (k + 1) / 2 : k; }

// ---- 16 x 16 transposition of 32-bit units -------------------------------------------------------------

#if defined(LOWRANK_AVX512)
INLINE void transpose16(vi r[16]) {
    __m512i t[16], u[16];
#pragma GCC unroll 16
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(u[i], u[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(u[i], u[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}
#else
INLINE void transpose16(vi r[16]) {
    int32_t t[16][16];
    for (int i = 0; i < 16; i++) vi_store(t[i], r[i]);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < i; j++) {
            int32_t x = t[i][j];
            t[i][j] = t[j][i];
            t[j][i] = x;
        }
    for (int i = 0; i < 16; i++) r[i] = vi_load(t[i]);
}
#endif

INLINE vi swap_halves(vi x) { return vi_or(vi_sll(x, 16), vi_srl(x, 16)); }

// Sixteen units along k of one row of elements; `left` elements remain.
INLINE vi units_of_row(const void *p, size_t left, int type, int bf16) {
    if (!bf16) return vf_as_vi(v_load_part(p, left, type));
    if (left >= 2 * LANES) return swap_halves(vi_load(p));
    uint16_t t[2 * LANES] = {0};
    memcpy(t, p, left * 2);
    return swap_halves(vi_load(t));
}

// Sixteen columns of a unit of k, of elements whose columns are contiguous: row k, or rows k and k + 1.
INLINE vi units_of_columns(const void *row0, const void *row1, size_t left, int type, int bf16) {
    if (!bf16) return vf_as_vi(v_load_part(row0, left, type));
    uint16_t t[2][LANES] = {{0}};
    const uint16_t *p0 = row0, *p1 = row1;
    if (left < LANES) {
        memcpy(t[0], row0, left * 2);
        if (row1) memcpy(t[1], row1, left * 2);
        p0 = t[0];
        p1 = t[1];
    }
    vi high = vi_sll(vi_load_u16(p0), 16);
    return p1 ? vi_or(high, vi_load_u16(p1)) : high;
}

// Packs up to sixteen lines of `k` elements, each line contiguous, into [ku] rows of `store` units, `width`
// apart; zeros for lines beyond.
INLINE void pack_16_lines(uint32_t *dst, size_t width, size_t store, const char *src, size_t stride, int type,
                          size_t lines, size_t k, int bf16) {
    size_t per_unit = bf16 ? 2 : 1, ku = units(k, bf16);
    for (size_t u = 0; u < ku; u += LANES) {
        vi r[LANES];
        size_t left = k - u * per_unit;
        const char *from = at(src, u * per_unit, type);
        if (lines == LANES && left >= LANES * per_unit) {
#pragma GCC unroll 16
            for (size_t i = 0; i < LANES; i++) r[i] = units_of_row(from + i * stride, LANES * 2, type, bf16);
        } else {
            for (size_t i = 0; i < LANES; i++)
                r[i] = i < lines ? units_of_row(from + i * stride, left, type, bf16) : vi_set1(0);
        }
        transpose16(r);
        size_t rows = ku - u < LANES ? ku - u : LANES;
        for (size_t j = 0; j < rows; j++) {
            float *to = (float *)(dst + (u + j) * width);
            if (store == LANES) vf_store(to, vi_as_vf(r[j]));
            else vf_store_n(to, vi_as_vf(r[j]), (int)store);
        }
    }
}

// Packs `count` lines of `k` elements, each line contiguous, into [ku][width], zeros for lines beyond.
INLINE void pack_lines(uint32_t *dst, size_t width, const void *src, size_t ld, int type, size_t count,
                       size_t k, int bf16) {
    if (width == 1) { // nothing to interleave
        size_t per_unit = bf16 ? 2 : 1, ku = units(k, bf16);
        for (size_t u = 0; u < ku; u += LANES) {
            vi x = count ? units_of_row(at(src, u * per_unit, type), k - u * per_unit, type, bf16) : vi_set1(0);
            vf_store_n((float *)dst + u, vi_as_vf(x), ku - u < LANES ? (int)(ku - u) : LANES);
        }
        return;
    }
    for (size_t line = 0; line < width; line += LANES) {
        size_t lines = count > line ? count - line : 0, store = width - line;
        pack_16_lines(dst + line, width, store < LANES ? store : LANES, at(src, line * ld, type), ld * type_size(type),
                      type, lines < LANES ? lines : LANES, k, bf16);
    }
}

// Packs `count` columns of `k` rows, columns contiguous, into [ku][width], zeros for columns beyond.
INLINE void pack_columns(uint32_t *dst, size_t width, const void *src, size_t ld, int type, size_t count,
                         size_t k, int bf16) {
    size_t per_unit = bf16 ? 2 : 1, ku = units(k, bf16);
    for (size_t u = 0; u < ku; u++) {
        const void *row0 = at(src, u * per_unit * ld, type);
        const void *row1 = bf16 && 2 * u + 1 < k ? at(src, (2 * u + 1) * ld, type) : NULL;
        for (size_t c = 0; c < width; c += LANES) {
            size_t left = count > c ? count - c : 0;
            vi x = left ? units_of_columns(at(row0, c, type), row1 ? at(row1, c, type) : NULL, left, type, bf16)
                        : vi_set1(0);
            float *to = (float *)(dst + u * width + c);
            if (width - c >= LANES) vf_store(to, vi_as_vf(x));
            else vf_store_n(to, vi_as_vf(x), (int)(width - c));
        }
    }
}

// ---- quantized operands ---------------------------------------------------------------------------------

// The chunks of k that are packed at a time have at most this many 32-bit units.
#define KC 256

#if defined(LOWRANK_AVX512BF16)
INLINE int all_normal(vf x) {
    vf magnitude = vf_abs(x);
    return vf_lt(magnitude, vf_set1(NORMAL_SCALE)) == _mm512_cmp_ps_mask(magnitude, vf_zero(), _CMP_EQ_OQ);
}

// Scales and zero points (or minimums) of sixteen rows' blocks; whether all are safe to multiply by in hardware.
INLINE int scales16(const struct quantized *q, size_t row, size_t col, float scale[LANES], float zero[LANES]) {
    size_t run, block = block_of(q, row, col, &run);
    size_t step = q->block_rows == 0 ? q->cols / q->block_cols : q->blocks_per_row;
    for (int i = 0; i < LANES; i++, block += step) {
        scale[i] = scale_of(q, block);
        zero[i] = zero_of(q, block);
    }
    return all_normal(vf_load(scale)) && (!has_minimums(q) || all_normal(vf_load(zero)));
}

// Four-bit codes of sixteen rows from `row` on, columns [col, col + k), packed as bf16: the codes are transposed
// while they are small, eight of a row in a lane. Blocks begin at multiples of eight columns in every row.
// Returns 0 if it can't be done so.
INLINE int pack_16_rows_4bit(uint32_t *dst, const struct quantized *q, size_t row, size_t col, size_t k) {
    const vf table = vf_load(q->levels);
    vf scale[2], zero[2];
    for (size_t c = 0; c < k; c += 8 * LANES) {
        vi r[LANES];
        size_t bytes = (k - c < 8 * LANES ? k - c : 8 * LANES) / 2;
        __mmask64 present = bytes == 64 ? ~0ull : (1ull << bytes) - 1;
#pragma GCC unroll 16
        for (size_t i = 0; i < LANES; i++)
            r[i] = _mm512_maskz_loadu_epi8(present, q->codes + ((row + i) * q->cols + col + c) / 2);
        transpose16(r);
        for (size_t j = 0; j < bytes / 4; j++) {
            size_t first = c + 8 * j;
            if (first == 0 || (col + first) % q->block_cols == 0) {
                float s[LANES], z[LANES];
                if (!scales16(q, row, col + first, s, z)) return 0;
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) scale[h] = floats_twice(vf_load(s), h), zero[h] = floats_twice(vf_load(z), h);
            }
            // Even lanes get the later element of a pair: the low half of a unit.
            vi code[2] = {each_twice(r[j], 0), each_twice(r[j], 1)};
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) {
                vi shift = _mm512_set1_epi64((long long)(8 * p + 4) << 32 | 8 * p);
                vf x[2];
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    x[h] = _mm512_permutexvar_ps(_mm512_srlv_epi32(code[h], shift), table);
                    if (q->zeros) x[h] = vf_sub(x[h], zero[h]);
                    x[h] = vf_mul(x[h], scale[h]);
                    if (has_minimums(q)) x[h] = vf_add(x[h], zero[h]);
                }
                vi_store(dst + (first / 2 + (size_t)p) * NR, (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]));
            }
        }
    }
    return 1;
}

INLINE int takes_fast_path(const struct quantized *q, size_t col0, size_t k0, size_t k, int bf16) {
    int blocks = q->block_rows == 0 ? q->cols % q->block_cols == 0 : q->block_rows == 1;
    return bf16 && !q->panels && q->format == CODES_4BIT && blocks && q->block_cols % 8 == 0 && q->cols % 8 == 0 && k0 % 8 == 0 &&
           k % 8 == 0 && col0 + LANES <= q->rows;
}

// Returns 0 if the matrix does not lie in panels or less than a panel is asked for.
INLINE int pack_whole_panel(uint32_t *dst, const struct quantized *q, size_t col0, size_t count, size_t k0, size_t k,
                            int bf16) {
    if (!q->panels || !bf16 || count != PANEL_ROWS || k0 % PANEL_COLS != 0 || k % PANEL_COLS != 0) return 0;
    switch (q->format) {
    case CODES_INT8: pack_panel_8bit(dst, q, col0, k0, k, CODES_INT8); return 1;
    case CODES_E4M3: pack_panel_8bit(dst, q, col0, k0, k, CODES_E4M3); return 1;
    case CODES_E5M2: pack_panel_8bit(dst, q, col0, k0, k, CODES_E5M2); return 1;
    }
    switch (panel_kind_of(q)) {
    case PANEL_ZEROS: pack_panel_4bit(dst, q, col0, k0, k, PANEL_ZEROS); break;
    case PANEL_MINIMUMS: pack_panel_4bit(dst, q, col0, k0, k, PANEL_MINIMUMS); break;
    default: pack_panel_4bit(dst, q, col0, k0, k, PANEL_PLAIN);
    }
    return 1;
}
#else
INLINE int pack_whole_panel(uint32_t *dst, const struct quantized *q, size_t col0, size_t count, size_t k0, size_t k,
                            int bf16) {
    (void)dst, (void)q, (void)col0, (void)count, (void)k0, (void)k, (void)bf16;
    return 0;
}
INLINE int pack_16_rows_4bit(uint32_t *dst, const struct quantized *q, size_t row, size_t col, size_t k) {
    (void)dst, (void)q, (void)row, (void)col, (void)k;
    return 0;
}
INLINE int takes_fast_path(const struct quantized *q, size_t col0, size_t k0, size_t k, int bf16) {
    (void)q, (void)col0, (void)k0, (void)k, (void)bf16;
    return 0;
}
#endif

// Rows [col0, col0 + count) of q as columns of B: k along q's rows.
static void pack_quantized_lines(uint32_t *dst, const struct quantized *q, size_t col0, size_t count, size_t k0,
                                 size_t k, int bf16) {
    float line[2 * KC];
    uint32_t tile[LANES * KC];
    size_t stride = bf16 ? 2 * KC * sizeof(uint16_t) : KC * sizeof(float);
    if (pack_whole_panel(dst, q, col0, count, k0, k, bf16)) return;
    for (size_t first = 0; first < NR; first += LANES) {
        size_t lines = count > first ? count - first : 0;
        if (lines > LANES) lines = LANES;
        if (lines == LANES && takes_fast_path(q, col0 + first, k0, k, bf16) &&
            pack_16_rows_4bit(dst + first, q, col0 + first, k0, k))
            continue;
        for (size_t i = 0; i < lines; i++) {
            char *to = (char *)tile + i * stride;
            decode_row(q, col0 + first + i, k0, k, bf16 ? line : (float *)(void *)to);
            if (bf16)
                for (size_t c = 0; c < k; c += LANES) v_store_part(to + 2 * c, vf_load(line + c), k - c, TYPE_BF16);
        }
        pack_16_lines(dst + first, NR, LANES, (const char *)tile, stride, bf16 ? TYPE_BF16 : TYPE_F32, lines, k, bf16);
    }
}

// Columns [col0, col0 + count) of q as columns of B: k along q's columns.
static void pack_quantized_columns(uint32_t *dst, const struct quantized *q, size_t col0, size_t count, size_t k0,
                                   size_t k, int bf16) {
    size_t per_unit = bf16 ? 2 : 1, ku = units(k, bf16);
    for (size_t u = 0; u < ku; u++) {
        size_t row = k0 + u * per_unit;
        for (size_t c = 0; c < NR; c += LANES) {
            size_t left = count > c ? count - c : 0;
            vi x = vi_set1(0);
            if (left && !bf16) x = vf_as_vi(decode_columns(q, row, col0 + c, left));
            if (left && bf16) {
                x = vi_sll(vf_bf16_bits(decode_columns(q, row, col0 + c, left)), 16);
                if (2 * u + 1 < k) x = vi_or(x, vf_bf16_bits(decode_columns(q, row + 1, col0 + c, left)));
            }
            vi_store(dst + u * NR + c, x);
        }
    }
}

// Rows row0.. (mr of them) of the logical A[m, k], k-range [k0, k0 + k).
INLINE void pack_a_tile(uint32_t *dst, const struct gemm_operand *a, size_t row0, size_t mr, size_t k0,
                        size_t k, int bf16) {
    if (a->transposed)
        pack_columns(dst, mr, at(a->data, k0 * a->ld + row0, a->type), a->ld, a->type, mr, k, bf16);
    else
        pack_lines(dst, mr, at(a->data, row0 * a->ld + k0, a->type), a->ld, a->type, mr, k, bf16);
}

// Columns col0.. (count of them, the rest zeros) of the logical B[k, n], k-range [k0, k0 + k).
INLINE void pack_b_panel(uint32_t *dst, size_t width, const struct gemm_operand *b, size_t col0, size_t count,
                         size_t k0, size_t k, int bf16) {
    if (b->transposed)
        pack_lines(dst, width, at(b->data, col0 * b->ld + k0, b->type), b->ld, b->type, count, k, bf16);
    else
        pack_columns(dst, width, at(b->data, k0 * b->ld + col0, b->type), b->ld, b->type, count, k, bf16);
}

// Asks for part `part` of `parts` of the cache lines that packing a panel will read with these arguments.
INLINE void prefetch_b_panel(const struct gemm_operand *b, size_t col0, size_t count, size_t k0, size_t k,
                             size_t part, size_t parts) {
    const struct quantized *q = b->quantized;
    const char *data = q ? (const char *)q->codes : b->data;
    size_t bits = q ? (q->format == CODES_4BIT || q->format == CODES_6BIT ? 4 : 8) : 8 * type_size(b->type), ld = q ? q->cols : b->ld;
    if (q && q->panels) { // they are one stream
        const uint8_t *p = q->codes + panel_byte(q, b->transposed ? col0 : k0, b->transposed ? k0 : col0);
        size_t bytes = b->transposed ? count * k * bits / 8 : 0;
        for (size_t byte = bytes * part / parts; byte < bytes * (part + 1) / parts; byte += 64)
            __builtin_prefetch(p + byte, 0, 2);
        return;
    }
    size_t row0 = b->transposed ? col0 : k0, rows = b->transposed ? count : k;
    size_t first = b->transposed ? k0 : col0, width = b->transposed ? k : count;
    for (size_t r = rows * part / parts; r < rows * (part + 1) / parts; r++) {
        const char *p = data + ((row0 + r) * ld + first) * bits / 8;
        for (size_t byte = 0; byte < width * bits / 8; byte += 64) __builtin_prefetch(p + byte, 0, 2);
    }
}

// ---- micro-kernels --------------------------------------------------------------------------------------

#if defined(LOWRANK_AVX512)
typedef vf acc_t;
#define acc_load vf_load
#define acc_store vf_store
INLINE acc_t step_f32(acc_t acc, uint32_t a, vi b) {
    return vf_fma(vf_set1(bits_as_float(a)), vi_as_vf(b), acc);
}
#if defined(LOWRANK_AVX512BF16)
INLINE acc_t step_bf16(acc_t acc, uint32_t a, vi b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32((int32_t)a), (__m512bh)b);
}
#define FLUSH_BEGIN
#define FLUSH_END
#else
INLINE acc_t step_bf16(acc_t acc, uint32_t a, vi b) {
    vi high = vi_set1((int32_t)0xffff0000);
    acc = vf_fma(vf_set1(bits_as_float(a & 0xffff0000u)), vi_as_vf(vi_and(b, high)), acc);
    return vf_fma(vf_set1(bits_as_float(a << 16)), vi_as_vf(vi_sll(b, 16)), acc);
}
// Denormal operands and results count as zero, as in vdpbf16ps.
#define FLUSH_BEGIN unsigned mxcsr = _mm_getcsr(); _mm_setcsr(mxcsr | 0x8040)
#define FLUSH_END _mm_setcsr(mxcsr)
#endif
#elif defined(LOWRANK_AVX2)
INLINE vf step_f32(vf acc, uint32_t a, vi b) { return vf_fma(vf_set1(bits_as_float(a)), vi_as_vf(b), acc); }
INLINE vf step_bf16(vf acc, uint32_t a, vi b) {
    vi high = vi_set1((int32_t)0xffff0000);
    acc = vf_fma(vf_set1(bits_as_float(a & 0xffff0000u)), vi_as_vf(vi_and(b, high)), acc);
    return vf_fma(vf_set1(bits_as_float(a << 16)), vi_as_vf(vi_sll(b, 16)), acc);
}
#define FLUSH_BEGIN unsigned mxcsr = _mm_getcsr(); _mm_setcsr(mxcsr | 0x8040)
#define FLUSH_END _mm_setcsr(mxcsr)
#else
INLINE float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
// Hardware asks whether the result rounded to 24 bits with no least exponent is tiny, so what is below
// 2^-126 - 2^-151 is flushed even where it rounds up to 2^-126. The sum of doubles is exact around there.
INLINE float fma_flushed(float a, float b, float c) {
    float x = fmaf(a, b, c);
    int tiny = fabsf(x) == 0x1p-126f && fabs((double)a * b + c) < 0x1.ffffffp-127;
    return tiny ? copysignf(0.0f, x) : flushed(x);
}
INLINE vf step_f32(vf acc, uint32_t a, vi b) { return vf_fma(vf_set1(bits_as_float(a)), vi_as_vf(b), acc); }
INLINE vf step_bf16(vf acc, uint32_t a, vi b) {
    float a0 = flushed(bits_as_float(a & 0xffff0000u)), a1 = flushed(bits_as_float(a << 16));
    for (int i = 0; i < LANES; i++) {
        uint32_t u = (uint32_t)b.v[i];
        float x = fma_flushed(a0, flushed(bits_as_float(u & 0xffff0000u)), flushed(acc.v[i]));
        acc.v[i] = fma_flushed(a1, flushed(bits_as_float(u << 16)), x);
    }
    return acc;
}
#define FLUSH_BEGIN
#define FLUSH_END
#endif

// c[mr][nv * 16] (+)= A B over ku units; c starts from zero if `first`.
INLINE void tile_product(const int mr, const int nv, size_t ku, const uint32_t *a, const uint32_t *b, float *c,
                         size_t ldc, int first, const int bf16) {
    vf acc[MR][NV];
#pragma GCC unroll 14
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) acc[i][j] = first ? vf_zero() : vf_load(c + (size_t)i * ldc + j * LANES);
    for (size_t u = 0; u < ku; u++) {
        vi column[NV];
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) column[j] = vi_load(b + j * LANES);
#pragma GCC unroll 14
        for (int i = 0; i < mr; i++)
#pragma GCC unroll 2
            for (int j = 0; j < nv; j++)
                acc[i][j] = bf16 ? step_bf16(acc[i][j], a[i], column[j]) : step_f32(acc[i][j], a[i], column[j]);
        a += mr;
        b += NR;
    }
#pragma GCC unroll 14
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) vf_store(c + (size_t)i * ldc + j * LANES, acc[i][j]);
}

typedef void (*tile_kernel)(size_t ku, const uint32_t *a, const uint32_t *b, float *c, size_t ldc, int first);

#define TILE(mr, nv)                                                                                        \
    static void tile_f32_##mr##x##nv(size_t ku, const uint32_t *a, const uint32_t *b, float *c, size_t ldc, \
                                     int first) {                                                           \
        tile_product(mr, nv, ku, a, b, c, ldc, first, 0);                                                   \
    }                                                                                                       \
    static void tile_bf16_##mr##x##nv(size_t ku, const uint32_t *a, const uint32_t *b, float *c,            \
                                      size_t ldc, int first) {                                              \
        FLUSH_BEGIN;                                                                                        \
        tile_product(mr, nv, ku, a, b, c, ldc, first, 1);                                                   \
        FLUSH_END;                                                                                          \
    }
#if MR == 14
#define FOR_EACH_ROWS(F, nv) \
    F(1, nv) F(2, nv) F(3, nv) F(4, nv) F(5, nv) F(6, nv) F(7, nv) F(8, nv) F(9, nv) F(10, nv) F(11, nv) F(12, nv) F(13, nv) F(14, nv)
#elif MR == 6
#define FOR_EACH_ROWS(F, nv) F(1, nv) F(2, nv) F(3, nv) F(4, nv) F(5, nv) F(6, nv)
#else
#define FOR_EACH_ROWS(F, nv) F(1, nv) F(2, nv) F(3, nv) F(4, nv)
#endif
#define NAME_F32(mr, nv) tile_f32_##mr##x##nv,
#define NAME_BF16(mr, nv) tile_bf16_##mr##x##nv,
FOR_EACH_ROWS(TILE, 1)
#if NV == 2
FOR_EACH_ROWS(TILE, 2)
#endif
// [bf16][vectors - 1][rows - 1]
static const tile_kernel TILES[2][NV][MR] = {
    {{FOR_EACH_ROWS(NAME_F32, 1)},
#if NV == 2
     {FOR_EACH_ROWS(NAME_F32, 2)},
#endif
    },
    {{FOR_EACH_ROWS(NAME_BF16, 1)},
#if NV == 2
     {FOR_EACH_ROWS(NAME_BF16, 2)},
#endif
    }};

INLINE tile_kernel tile_for(size_t mr, size_t columns, int bf16) {
    int nv = columns > LANES ? NV : 1;
    return TILES[bf16][nv - 1][mr - 1];
}

// Rows per tile for m rows: as few tiles as fit, as even as can be.
INLINE size_t tile_rows(size_t m) {
    size_t tiles = (m + MR - 1) / MR;
    return tiles ? (m + tiles - 1) / tiles : 1;
}

#endif
