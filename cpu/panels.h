// Matrices of four-bit codes laid out for products with few rows: in the order in which a product reads them.
//
// Thirty-two rows are a panel, and 32 columns of it are 512 contiguous bytes; a panel's lie one after the other, so a
// product is one stream. They are two halves of sixteen rows, each four registers of 32 words. Nibble panel_nibble(s) of
// the word 8 g + 2 p + h in register d is the code of row 4 g + d and column 8 s + 2 p + 1 - h: of words beside each
// other, the high one has the earlier column, as a unit of bf16. Constants lie [panel][block of a row][half][16 rows].
#ifndef LOWRANK_PANELS_H
#define LOWRANK_PANELS_H

#include "kernels.h"
#include "simd.h"

#define PANEL_ROWS 32
#define PANEL_COLS 32
// Bytes of a half's 32 columns.
#define PANEL_BYTES 256

// The codes of a row's 32 columns from `col` on begin here; those of d are 64 bytes apart.
INLINE size_t panel_byte(const struct quantized *q, size_t row, size_t col) {
    size_t part = row / PANEL_ROWS * (q->cols / PANEL_COLS) + col / PANEL_COLS;
    return (2 * part + row / LANES % 2) * PANEL_BYTES + row % 4 * 64 + row % LANES / 4 * 16;
}

// The nibble of a word that has columns 8 s to 8 s + 7.
INLINE size_t panel_nibble(size_t s) { return s % 2 * 2 + s / 2; }

INLINE uint8_t panel_code(const struct quantized *q, size_t row, size_t col) {
    size_t c = col % PANEL_COLS, nibble = panel_nibble(c / 8), byte = c / 2 % 4 * 4 + (1 - c % 2) * 2 + nibble / 2;
    return q->codes[panel_byte(q, row, col) + byte] >> nibble % 2 * 4 & 15;
}

// The place of an element's constants.
INLINE size_t panel_block(const struct quantized *q, size_t row, size_t col) {
    size_t part = row / PANEL_ROWS * (q->cols / q->block_cols) + col / q->block_cols;
    return (2 * part + row / LANES % 2) * LANES + row % LANES;
}

// What blocks have besides scales.
enum panel_kind { PANEL_PLAIN, PANEL_ZEROS, PANEL_MINIMUMS };

INLINE enum panel_kind panel_kind_of(const struct quantized *q) {
    return q->zeros ? PANEL_ZEROS : q->minimums ? PANEL_MINIMUMS : PANEL_PLAIN;
}

#if defined(LOWRANK_AVX512BF16)
// The levels of sixteen rows in a block, rounded to bf16 after scaling: those of rows d and 4 + d, then 8 + d and 12 + d.
struct panel_levels {
    vi row[4][2];
};

INLINE void scale_levels(struct panel_levels *to, const struct quantized *q, size_t block, vf levels,
                         const enum panel_kind kind) {
#pragma GCC unroll 4
    for (size_t d = 0; d < 4; d++)
#pragma GCC unroll 2
        for (size_t h = 0; h < 2; h++) {
            vf x[2];
#pragma GCC unroll 2
            for (size_t i = 0; i < 2; i++) {
                size_t row = block + 8 * h + 4 * i + d;
                x[i] = kind == PANEL_ZEROS ? vf_sub(levels, vf_set1((float)q->zeros[row])) : levels;
                x[i] = vf_mul(x[i], vf_set1(q->scales[row]));
                if (kind == PANEL_MINIMUMS) x[i] = vf_add(x[i], vf_set1(q->minimums[row]));
            }
            to->row[d][h] = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]);
        }
}

// The codes of units 8 `half` to 8 `half` + 7, each with its row's number in the two bits above it: in its neighbour's
// place, so that one operation does it for two codes of a word.
INLINE void number_rows(vi to[4], const vi codes[4], const int half) {
    const vi rows = _mm512_set_epi64(0x3333333333333333, 0x3333333333333333, 0x2222222222222222, 0x2222222222222222,
                                     0x1111111111111111, 0x1111111111111111, 0, 0);
    const vi where = _mm512_set1_epi16(half ? 0x0303 : 0x3030);
#pragma GCC unroll 4
    for (int d = 0; d < 4; d++) to[d] = _mm512_ternarylogic_epi32(codes[d], where, rows, 0xb8);
}

// Codes of units 4 s to 4 s + 3 and their rows in the low six bits of each word, of what number_rows made of s / 2.
INLINE vi panel_index(vi codes, const int s) {
    switch (s) {
    case 0: return codes;
    case 1: return _mm512_mulhi_epu16(codes, _mm512_set1_epi16(1 << 8)); // a shift, where the other shifts are not done
    case 2: return _mm512_srli_epi16(codes, 4);
    default: return _mm512_ror_epi32(codes, 12); // the row of a word's last code is in the other word
    }
}

// Units of k 4 s to 4 s + 3 of sixteen rows: four rows' elements are looked up at once, and 4 x 4 units transposed.
INLINE void panel_units(vi out[4], const vi codes[4], const struct panel_levels *levels, const int s) {
    vi x[4];
#pragma GCC unroll 4
    for (int d = 0; d < 4; d++)
        x[d] = _mm512_permutex2var_epi16(levels->row[d][0], panel_index(codes[d], s), levels->row[d][1]);
    vi low01 = _mm512_unpacklo_epi32(x[0], x[1]), high01 = _mm512_unpackhi_epi32(x[0], x[1]);
    vi low23 = _mm512_unpacklo_epi32(x[2], x[3]), high23 = _mm512_unpackhi_epi32(x[2], x[3]);
    out[0] = _mm512_unpacklo_epi64(low01, low23);
    out[1] = _mm512_unpackhi_epi64(low01, low23);
    out[2] = _mm512_unpacklo_epi64(high01, high23);
    out[3] = _mm512_unpackhi_epi64(high01, high23);
}

INLINE void load_panel(vi codes[4], const uint8_t *from) {
#pragma GCC unroll 4
    for (size_t d = 0; d < 4; d++) codes[d] = vi_load(from + 64 * d);
}

// The panel from row `row` on, columns [col, col + k), as units of bf16 [k / 2][32]; both are multiples of 32.
INLINE void pack_panel(uint32_t *dst, const struct quantized *q, size_t row, size_t col, size_t k,
                       const enum panel_kind kind) {
    const vf table = vf_load(q->levels);
    for (size_t half = 0; half < 2; half++, dst += LANES, row += LANES) {
        struct panel_levels levels;
        for (size_t c = 0; c < k; c += PANEL_COLS) {
            if (c == 0 || (col + c) % q->block_cols == 0)
                scale_levels(&levels, q, panel_block(q, row, col + c), table, kind);
            vi codes[4], numbered[4], out[4];
            load_panel(codes, q->codes + panel_byte(q, row, col + c));
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++) {
                if (s % 2 == 0) number_rows(numbered, codes, s / 2);
                panel_units(out, numbered, &levels, s);
                for (size_t p = 0; p < 4; p++) vi_store(dst + (c / 2 + 4 * (size_t)s + p) * PANEL_ROWS, out[p]);
            }
        }
    }
}
#endif

#endif
