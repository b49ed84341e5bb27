// Matrices of four-bit and eight-bit codes laid out for products with few rows: in the order in which a product reads them.
//
// Thirty-two rows are a panel, and 32 columns of it are 512 or 1024 contiguous bytes; a panel's lie one after the other, so
// a product is one stream. They are two halves of sixteen rows. Constants lie [panel][block of a row][half][16 rows]; where
// several rows share a block, each has its copy.
//
// Four bits: a half is four registers of 32 words. Nibble panel_nibble(s) of the word 8 g + 2 p + h in register d is the
// code of row 4 g + d and column 8 s + 2 p + 1 - h: of words beside each other, the high one has the earlier column, as a
// unit of bf16.
//
// Eight bits: byte 32 u + 2 r + h of a half is the code of row r and column 2 u + 1 - h.
#ifndef LOWRANK_PANELS_H
#define LOWRANK_PANELS_H

#include "kernels.h"
#include "simd.h"

#define PANEL_ROWS 32
#define PANEL_COLS 32

enum { CODES_4BIT = 0, CODES_INT8 = 1, CODES_E4M3 = 2, CODES_E5M2 = 3, CODES_6BIT = 4 };

// By what a small float is too small whose bits are those of its code, moved into place.
#define E4M3_BIAS 0x1p120f
#define E5M2_BIAS 0x1p112f
// Scales of small floats in panels are below it, so that they can be multiplied by that.
#define MOST_SMALL_FLOAT_SCALE 0x1p7f

// Bytes of a half's 32 columns.
#define PANEL_4BIT 256
#define PANEL_8BIT 512
INLINE size_t panel_bytes(const struct quantized *q) { return q->format == CODES_4BIT ? PANEL_4BIT : PANEL_8BIT; }

// Where the codes of a row's half of a panel begin, those of the 32 columns that `col` is one of.
INLINE size_t panel_byte(const struct quantized *q, size_t row, size_t col) {
    size_t part = row / PANEL_ROWS * (q->cols / PANEL_COLS) + col / PANEL_COLS;
    return (2 * part + row / LANES % 2) * panel_bytes(q);
}

// The nibble of a word that has columns 8 s to 8 s + 7.
INLINE size_t panel_nibble(size_t s) { return s % 2 * 2 + s / 2; }

// Where a row's 32 columns of four-bit codes begin.
INLINE size_t panel_word(const struct quantized *q, size_t row, size_t col) {
    return panel_byte(q, row, col) + row % 4 * 64 + row % LANES / 4 * 16;
}

// The byte in which an element's code is.
INLINE size_t panel_code_byte(const struct quantized *q, size_t row, size_t col) {
    size_t c = col % PANEL_COLS, earlier = 1 - c % 2;
    if (q->format != CODES_4BIT) return panel_byte(q, row, col) + c / 2 * 32 + row % LANES * 2 + earlier;
    return panel_word(q, row, col) + c / 2 % 4 * 4 + earlier * 2 + panel_nibble(c / 8) / 2;
}

INLINE uint8_t panel_code(const struct quantized *q, size_t row, size_t col) {
    uint8_t byte = q->codes[panel_code_byte(q, row, col)];
    if (q->format != CODES_4BIT) return byte;
    return byte >> panel_nibble(col % PANEL_COLS / 8) % 2 * 4 & 15;
}

// The place of an element's constants.
INLINE size_t panel_block(const struct quantized *q, size_t row, size_t col) {
    size_t blocks = (q->cols + q->block_cols - 1) / q->block_cols;
    size_t part = row / PANEL_ROWS * blocks + col / q->block_cols;
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

INLINE void load_panel_4bit(vi codes[4], const uint8_t *from) {
#pragma GCC unroll 4
    for (size_t d = 0; d < 4; d++) codes[d] = vi_load(from + 64 * d);
}

// Sixteen rows' scales in a block as panel_pair takes them. Small floats' exponents have their bias in it.
INLINE void panel_scales(vf scale[2], const struct quantized *q, size_t block, const int32_t format) {
    float bias = format == CODES_INT8 ? 1.0f : format == CODES_E4M3 ? E4M3_BIAS : E5M2_BIAS;
    vf x = vf_mul(vf_load(q->scales + block), vf_set1(bias));
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) scale[h] = floats_twice(x, h);
}

// The unit of sixteen rows that 32 bytes of codes are.
INLINE vi panel_pair(const uint8_t *codes, const vf scale[2], const int32_t format) {
    vf x[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        vi code = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + 16 * h)));
        if (format == CODES_INT8) {
            x[h] = vi_to_vf(code);
        } else {
            // Sign, exponent and fraction in their places.
            int fraction = format == CODES_E4M3 ? 3 : 2;
            x[h] = vi_as_vf(vi_and(vi_sll(code, 23 - fraction), vi_set1((int32_t)(0x80000000u | 0x7fu << (23 - fraction)))));
        }
        x[h] = vf_mul(x[h], scale[h]);
    }
    return (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]);
}

// The panel from row `row` on, columns [col, col + k), as units of bf16 [k / 2][32]; all are multiples of 32.
INLINE void pack_panel_8bit(uint32_t *dst, const struct quantized *q, size_t row, size_t col, size_t k,
                            const int32_t format) {
    for (size_t half = 0; half < 2; half++, row += LANES) {
        uint32_t *to = dst + half * LANES;
        for (size_t c = col, end; c < col + k;) {
            vf scale[2];
            panel_scales(scale, q, panel_block(q, row, c), format);
            end = c / q->block_cols * q->block_cols + q->block_cols;
            for (; c < end && c < col + k; c += PANEL_COLS) {
                const uint8_t *codes = q->codes + panel_byte(q, row, c);
                for (size_t u = 0; u < PANEL_COLS / 2; u++, to += PANEL_ROWS)
                    vi_store(to, panel_pair(codes + 32 * u, scale, format));
            }
        }
    }
}

// The panel from row `row` on, columns [col, col + k), as units of bf16 [k / 2][32]; both are multiples of 32.
INLINE void pack_panel_4bit(uint32_t *dst, const struct quantized *q, size_t row, size_t col, size_t k,
                       const enum panel_kind kind) {
    const vf table = vf_load(q->levels);
    for (size_t half = 0; half < 2; half++, dst += LANES, row += LANES) {
        struct panel_levels levels;
        for (size_t c = 0; c < k; c += PANEL_COLS) {
            if (c == 0 || (col + c) % q->block_cols == 0)
                scale_levels(&levels, q, panel_block(q, row, col + c), table, kind);
            vi codes[4], numbered[4], out[4];
            load_panel_4bit(codes, q->codes + panel_byte(q, row, col + c));
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
