// Decoding quantized matrices to bf16 many elements at a time, with the bits of quant.cuh.
#ifndef LOWRANK_DECODE_CUH
#define LOWRANK_DECODE_CUH

#include "pack.cuh"
#include "ptx.cuh"
#include "quant.cuh"
#include "tile.cuh"

// What a block's scale and its zero point or minimum are made of, read ahead of their use.
struct BlockConstants {
    float scale;     // nested: of the block's scale
    float zero;      // or minimum; nested: of the minimum
    uint32_t nested; // codes of the scale and, from bit 8 on, of the minimum, or of the next block's scale
};

__device__ __forceinline__ bool has_minimums(const quantized_matrix &q) { return q.minimums || q.minimum_codes; }

// WITH_MINIMUMS: whether q may have them.
template <bool WITH_MINIMUMS = true>
__device__ __forceinline__ BlockConstants load_constants(const quantized_matrix &q, uint64_t block) {
    BlockConstants c;
    c.nested = q.scales ? 0 : q.nested[block];
    c.scale = q.scales ? q.scales[block] : q.nested_absmax[block >> q.nested_shift];
    c.zero = q.zeros ? (float)q.zeros[block] : 0.0f;
    if (WITH_MINIMUMS && q.minimums) c.zero = q.minimums[block];
    if (WITH_MINIMUMS && q.minimum_codes) {
        c.nested |= (uint32_t)q.minimum_codes[block] << 8;
        c.zero = q.minimum_factors[block >> q.nested_shift];
    }
    return c;
}

// `map`: the nested map, where it is quick to read.
__device__ __forceinline__ float scale_of(const quantized_matrix &q, const BlockConstants &c, const float *map) {
    return q.scales ? c.scale : map[c.nested & 255] * c.scale + q.nested_offset;
}

// The zero point or the minimum.
__device__ __forceinline__ float zero_of(const quantized_matrix &q, const BlockConstants &c, const float *map) {
    return q.minimum_codes ? map[c.nested >> 8 & 255] * c.zero : c.zero;
}

// Both levels of each byte of four-bit codes, 2^copies times, so that lanes meet in few banks: the copies of a byte's
// pair lie side by side, and a lane reads the one of its number.
struct PairTable {
    const float2 *pairs;
    unsigned copies; // log2

    static __device__ __forceinline__ unsigned bytes(unsigned copies) { return 256 * sizeof(float2) << copies; }

    static __device__ __forceinline__ void fill(float2 *pairs, unsigned copies, const quantized_matrix &q,
                                                unsigned thread, unsigned threads) {
        for (unsigned i = thread; i < 256u << copies; i += threads) {
            unsigned byte = i >> copies;
            pairs[i] = make_float2(q.levels[byte >> 4], q.levels[byte & 15]);
        }
    }

    __device__ __forceinline__ float2 operator()(uint32_t byte) const {
        return pairs[byte << copies | (lane_index() & ((1u << copies) - 1))];
    }
};

// Elements whose codes a thread decodes at once: neighbours in a row, all of one block, or, of six bits, of two.
#define RUN 32

// Four neighbours' codes of eight bits as two pairs of bf16.
__device__ __forceinline__ void decode_bytes(uint32_t out[2], uint32_t codes, int format, float scale) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = level_of_byte(codes >> 8 * i & 255, format) * scale;
    out[0] = pack_bf16(x[0], x[1]);
    out[1] = pack_bf16(x[2], x[3]);
}

// What is added to a level or to an element.
enum Shift { NO_SHIFT, ZERO_POINTS, MINIMUMS };

template <bool WITH_MINIMUMS = true> __device__ __forceinline__ Shift shift_of(const quantized_matrix &q) {
    return WITH_MINIMUMS && has_minimums(q) ? MINIMUMS : q.zeros ? ZERO_POINTS : NO_SHIFT;
}

// The elements of two levels as a pair of bf16.
template <bool WITH_MINIMUMS = true>
__device__ __forceinline__ uint32_t decode_pair(float2 level, Shift shift, float scale, float zero) {
    if (shift == ZERO_POINTS) level = make_float2(level.x - zero, level.y - zero);
    float x = level.x * scale, y = level.y * scale;
    if (WITH_MINIMUMS && shift == MINIMUMS) x = x + zero, y = y + zero;
    return pack_bf16(x, y);
}

// Eight neighbours' codes of four bits as four pairs of bf16.
template <Shift SHIFT>
__device__ __forceinline__ void decode_nibbles(uint32_t out[4], uint32_t codes, const PairTable &table, float scale,
                                               float zero) {
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = decode_pair(table(codes >> 8 * i & 255), SHIFT, scale, zero);
}

// The same of six bits, the upper two in `high`.
__device__ __forceinline__ void decode_six_bits(uint32_t out[4], uint32_t codes, uint32_t high, float scale) {
    high = prmt(high, 0, 0x1100); // each byte for two pairs
    // The codes of the first and of the second elements of pairs.
    uint32_t first = (codes >> 4 & 0x0f0f0f0f) | (high << 4 & 0x00300030) | (high & 0x30003000);
    uint32_t second = (codes & 0x0f0f0f0f) | (high << 2 & 0x00300030) | (high >> 2 & 0x30003000);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        // 2^23 and the code, as the bits of a float.
        float x = __uint_as_float(prmt(first, 0x4b000000u, 0x7650 | i)) - 8388640.0f;
        float y = __uint_as_float(prmt(second, 0x4b000000u, 0x7650 | i)) - 8388640.0f;
        out[i] = pack_bf16(x * scale, y * scale);
    }
}

// Decodes the run at `codes`, chunk j of eight elements to store(j, four pairs); of six bits `high` has the upper two.
template <class Store>
__device__ __forceinline__ void decode_run(const unsigned char *codes, const unsigned char *high,
                                           const quantized_matrix &q, const PairTable &table, const float *map,
                                           const BlockConstants &constants, Store store) {
    const uint4 *words = (const uint4 *)codes;
    uint4 first = words[0];
    uint32_t c[4] = {first.x, first.y, first.z, first.w}, out[4];
    float scale = scale_of(q, constants, map);
    if (q.format == CODES_4BIT) {
        float zero = zero_of(q, constants, map);
        Shift shift = shift_of(q);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (shift == ZERO_POINTS) decode_nibbles<ZERO_POINTS>(out, c[j], table, scale, zero);
            else if (shift == MINIMUMS) decode_nibbles<MINIMUMS>(out, c[j], table, scale, zero);
            else decode_nibbles<NO_SHIFT>(out, c[j], table, scale, zero);
            store(j, out);
        }
        return;
    }
    if (q.format == CODES_6BIT) {
        // Two blocks, whose scales have one factor.
        BlockConstants second = constants;
        second.nested >>= 8;
        float scales[2] = {scale, scale_of(q, second, map)};
        uint2 upper = *(const uint2 *)high;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            decode_six_bits(out, c[j], (j < 2 ? upper.x : upper.y) >> 16 * (j % 2), scales[j / 2]);
            store(j, out);
        }
        return;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (half) {
            uint4 second = words[1];
            c[0] = second.x, c[1] = second.y, c[2] = second.z, c[3] = second.w;
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            decode_bytes(out, c[2 * j], q.format, scale);
            decode_bytes(out + 2, c[2 * j + 1], q.format, scale);
            store(2 * half + j, out);
        }
    }
}

// The same for a run of other floats than bf16.
template <class T, class Store> __device__ __forceinline__ void convert_run(const unsigned char *run, Store store) {
#pragma unroll
    for (int j = 0; j < RUN / 8; j++) {
        float x[8];
        load_pack(x, (const T *)run + 8 * j, 8);
        uint32_t out[4];
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
        store(j, out);
    }
}

#endif
