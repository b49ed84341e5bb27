// Decoding quantized matrices: an element is (level of its code - zero point) * scale of its block, or
// level * scale + minimum, in f32.
#ifndef LOWRANK_QUANT_H
#define LOWRANK_QUANT_H

#include "kernels.h"
#include "panels.h"
#include "simd.h"

// Scales below it may give products that are not normal numbers, which hardware and software round apart.
#define NORMAL_SCALE 0x1p-100f

// ---- lanes ----------------------------------------------------------------------------------------------

#if defined(LOWRANK_AVX512)
// table[index mod 16]
INLINE vf vf_lookup16(const float *table, vi index) { return _mm512_permutexvar_ps(index, vf_load(table)); }
INLINE vi vi_load_u8(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
// Sixteen codes of four bits, the even element in the high half of a byte; higher bits are anything.
INLINE vi vi_load_nibbles(const uint8_t *p) {
    __m128i bytes = _mm_loadl_epi64((const __m128i *)p);
    vi twice = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
    return _mm512_srlv_epi32(twice, _mm512_set1_epi64(4));
}
// Sixteen codes of two bits, four in a byte.
INLINE vi vi_load_crumbs(const uint8_t *p) {
    int32_t word;
    memcpy(&word, p, 4);
    const __m512i shift = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return vi_and(_mm512_srlv_epi32(vi_set1(word), shift), vi_set1(3));
}
#elif defined(LOWRANK_AVX2)
INLINE __m256 lookup16_half(const float *table, __m256i index) {
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
INLINE vf vf_lookup16(const float *table, vi index) {
    return PAIR(vf, lookup16_half(table, index.a), lookup16_half(table, index.b));
}
INLINE vi vi_load_u8(const uint8_t *p) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    return PAIR(vi, _mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)));
}
INLINE vi vi_load_nibbles(const uint8_t *p) {
    __m128i bytes = _mm_loadl_epi64((const __m128i *)p);
    __m128i twice = _mm_unpacklo_epi8(bytes, bytes);
    __m256i shift = _mm256_set1_epi64x(4);
    return PAIR(vi, _mm256_srlv_epi32(_mm256_cvtepu8_epi32(twice), shift),
                _mm256_srlv_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(twice, 8)), shift));
}
INLINE vi vi_load_crumbs(const uint8_t *p) {
    int32_t word;
    memcpy(&word, p, 4);
    __m256i all = _mm256_set1_epi32(word), shift = _mm256_set_epi32(14, 12, 10, 8, 6, 4, 2, 0);
    vi x = PAIR(vi, _mm256_srlv_epi32(all, shift), _mm256_srlv_epi32(all, _mm256_add_epi32(shift, _mm256_set1_epi32(16))));
    return vi_and(x, vi_set1(3));
}
#else
INLINE vi vi_load_crumbs(const uint8_t *p) { MAP(vi, p[i / 4] >> (2 * (i % 4)) & 3); }
INLINE vf vf_lookup16(const float *table, vi index) { MAP(vf, table[index.v[i] & 15]); }
INLINE vi vi_load_u8(const uint8_t *p) { MAP(vi, p[i]); }
INLINE vi vi_load_nibbles(const uint8_t *p) { MAP(vi, i % 2 ? p[i / 2] & 15 : p[i / 2] >> 4); }
#endif

// ---- codes to levels ------------------------------------------------------------------------------------

// A small float with `fraction` bits of fraction as f32: its bits moved in place and the exponent's bias
// corrected by an exact multiplication. NaN codes give some number; they are never made.
INLINE vf small_float(vi code, int fraction, float bias) {
    vi magnitude = vi_sll(vi_and(code, vi_set1(0x7f)), 23 - fraction);
    vi sign = vi_sll(vi_and(code, vi_set1(0x80)), 24);
    return vi_as_vf(vi_or(sign, vf_as_vi(vf_mul(vi_as_vf(magnitude), vf_set1(bias)))));
}

// Levels of codes of eight bits; higher bits are anything.
INLINE vf levels_of_bytes(int32_t format, vi code) {
    if (format == CODES_INT8) return vi_to_vf(vi_sra(vi_sll(code, 24), 24));
    return format == CODES_E4M3 ? small_float(code, 3, E4M3_BIAS) : small_float(code, 2, E5M2_BIAS);
}

// The high two bits of six-bit codes follow the low four of all.
INLINE const uint8_t *high_bits(const struct quantized *q, size_t element) {
    return q->codes + q->rows * q->cols / 2 + element / 4;
}

INLINE float level_of_byte(int32_t format, uint8_t code) {
    float t[LANES];
    vf_store(t, levels_of_bytes(format, vi_set1(code)));
    return t[0];
}

INLINE float level_of(const struct quantized *q, size_t element) {
    if (q->format == CODES_4BIT || q->format == CODES_6BIT) {
        uint8_t pair = q->codes[element / 2];
        int code = element % 2 ? pair & 15 : pair >> 4;
        if (q->format == CODES_4BIT) return q->levels[code];
        return (float)((code | (*high_bits(q, element) >> (2 * (element % 4)) & 3) << 4) - 32);
    }
    return level_of_byte(q->format, q->codes[element]);
}

// Sixteen codes are read at once from elements that are multiples of this.
INLINE size_t code_step(const struct quantized *q) {
    return q->format == CODES_4BIT ? 2 : q->format == CODES_6BIT ? 4 : 1;
}

// ---- blocks ---------------------------------------------------------------------------------------------

INLINE float scale_of(const struct quantized *q, size_t block) {
    if (q->scales) return q->scales[block];
    float absmax = q->nested_absmax[block >> q->nested_shift];
    return q->nested_map[q->nested[block]] * absmax + q->nested_offset;
}

INLINE int has_minimums(const struct quantized *q) { return q->minimums || q->minimum_codes; }

// The zero point of a block, or its minimum.
INLINE float zero_of(const struct quantized *q, size_t block) {
    if (q->minimums) return q->minimums[block];
    if (q->minimum_codes) return q->nested_map[q->minimum_codes[block]] * q->minimum_factors[block >> q->nested_shift];
    return q->zeros ? (float)q->zeros[block] : 0.0f;
}

// The block of an element, and how many elements of its row from it on share the block.
INLINE size_t block_of(const struct quantized *q, size_t row, size_t col, size_t *run) {
    if (q->block_rows == 0) {
        size_t element = row * q->cols + col;
        *run = q->block_cols - element % q->block_cols;
        return element / q->block_cols;
    }
    *run = q->block_cols - col % q->block_cols;
    return row / q->block_rows * q->blocks_per_row + col / q->block_cols;
}

INLINE vf decoded(vf level, const struct quantized *q, float scale, float zero) {
    if (q->zeros) level = vf_sub(level, vf_set1(zero));
    vf x = vf_mul(level, vf_set1(scale));
    return has_minimums(q) ? vf_add(x, vf_set1(zero)) : x;
}

INLINE float decoded_one(const struct quantized *q, size_t element, float scale, float zero) {
    float level = level_of(q, element);
    return has_minimums(q) ? level * scale + zero : (level - zero) * scale;
}

// Sixteen levels from `element` on, which is a multiple of code_step.
INLINE vf levels16(const struct quantized *q, size_t element) {
    if (q->format == CODES_4BIT) return vf_lookup16(q->levels, vi_load_nibbles(q->codes + element / 2));
    if (q->format == CODES_6BIT) {
        vi low = vi_and(vi_load_nibbles(q->codes + element / 2), vi_set1(15));
        return vi_to_vf(vi_sub(vi_or(low, vi_sll(vi_load_crumbs(high_bits(q, element)), 4)), vi_set1(32)));
    }
    return levels_of_bytes(q->format, vi_load_u8(q->codes + element));
}

// Columns [col, col + n) of a row as floats; reads no code beyond the last.
INLINE void decode_row(const struct quantized *q, size_t row, size_t col, size_t n, float *out) {
    if (q->panels) {
        for (size_t i = 0; i < n; i++) {
            size_t block = panel_block(q, row, col + i);
            uint8_t code = panel_code(q, row, col + i);
            float level = q->format == CODES_4BIT ? q->levels[code] : level_of_byte(q->format, code), zero = zero_of(q, block);
            out[i] = has_minimums(q) ? level * q->scales[block] + zero : (level - zero) * q->scales[block];
        }
        return;
    }
    while (n > 0) {
        size_t run, element = row * q->cols + col, block = block_of(q, row, col, &run);
        float scale = scale_of(q, block), zero = zero_of(q, block);
        if (run > n) run = n;
        size_t i = 0, step = code_step(q);
        for (; i < run && (element + i) % step; i++) out[i] = decoded_one(q, element + i, scale, zero);
        for (; i + LANES <= run; i += LANES) vf_store(out + i, decoded(levels16(q, element + i), q, scale, zero));
        for (; i < run; i++) out[i] = decoded_one(q, element + i, scale, zero);
        out += run;
        col += run;
        n -= run;
    }
}

// Sixteen columns from `col` on as floats, zeros from `left` on.
INLINE vf decode_columns(const struct quantized *q, size_t row, size_t col, size_t left) {
    size_t run, block = block_of(q, row, col, &run), element = row * q->cols + col;
    if (!q->panels && left >= LANES && run >= LANES && element % code_step(q) == 0)
        return decoded(levels16(q, element), q, scale_of(q, block), zero_of(q, block));
    float t[LANES] = {0};
    decode_row(q, row, col, left < LANES ? left : LANES, t);
    return vf_load(t);
}

#endif
