// Decoding quantized matrices: an element is (level of its code - zero point) * scale of its block, or
// level * scale + minimum, in f32; see cpu/quant.h.
#ifndef LOWRANK_QUANT_CUH
#define LOWRANK_QUANT_CUH

#include "kernel.cuh"

enum { CODES_4BIT = 0, CODES_INT8 = 1, CODES_E4M3 = 2, CODES_E5M2 = 3, CODES_6BIT = 4 };

// A small float with `fraction` bits of fraction as f32: its bits moved in place and the exponent's bias corrected by an
// exact multiplication.
__device__ __forceinline__ float small_float(uint32_t code, int fraction, float bias) {
    float magnitude = __uint_as_float((code & 0x7f) << (23 - fraction)) * bias;
    return __uint_as_float((code & 0x80) << 24 | __float_as_uint(magnitude));
}

// The level of a code of eight bits.
__device__ __forceinline__ float level_of_byte(uint32_t code, int format) {
    if (format == CODES_E4M3) return small_float(code, 3, 0x1p120f);
    if (format == CODES_E5M2) return small_float(code, 2, 0x1p112f);
    // 2^23 + 128 + the number, as the bits of a float.
    return __uint_as_float(0x4b000000u | (code ^ 0x80)) - 8388736.0f;
}

// The level of an element of the flat matrix.
__device__ __forceinline__ float level_of(const quantized_matrix &q, uint64_t element) {
    if (q.format != CODES_4BIT && q.format != CODES_6BIT) return level_of_byte(q.codes[element], q.format);
    uint32_t pair = q.codes[element / 2], code = element % 2 ? pair & 15 : pair >> 4;
    if (q.format == CODES_4BIT) return q.levels[code];
    // The high two bits follow the low four of all, four in a byte.
    uint32_t high = q.codes[q.rows * q.cols / 2 + element / 4] >> (2 * (element % 4)) & 3;
    return (float)((int)(code | high << 4) - 32);
}

// The level of a nested code: of a scale or a minimum.
__device__ __forceinline__ float nested_level(const quantized_matrix &q, uint8_t code) {
    return q.nested_map ? q.nested_map[code] : (float)(int8_t)code;
}

__device__ __forceinline__ float scale_of(const quantized_matrix &q, uint64_t block) {
    if (q.scales) return q.scales[block];
    return nested_level(q, q.nested[block]) * q.nested_absmax[block >> q.nested_shift] + q.nested_offset;
}

__device__ __forceinline__ float minimum_of(const quantized_matrix &q, uint64_t block) {
    if (q.minimums) return q.minimums[block];
    return nested_level(q, q.minimum_codes[block]) * q.minimum_factors[block >> q.nested_shift];
}

__device__ __forceinline__ uint64_t block_of(const quantized_matrix &q, uint64_t row, uint64_t col) {
    if (q.block_rows == 0) return (row * q.cols + col) >> q.block_cols_shift;
    return (row >> q.block_rows_shift) * q.blocks_per_row + (col >> q.block_cols_shift);
}

// One element as f32.
__device__ __forceinline__ float decode_element(const quantized_matrix &q, uint64_t row, uint64_t col) {
    uint64_t block = block_of(q, row, col);
    float level = level_of(q, row * q.cols + col);
    if (q.zeros) level -= (float)q.zeros[block];
    float x = level * scale_of(q, block);
    return q.minimums || q.minimum_codes ? x + minimum_of(q, block) : x;
}

#endif
