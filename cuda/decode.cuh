// Decoding quantized matrices to bf16 many elements at a time, with the bits of quant.cuh.
#ifndef LOWRANK_DECODE_CUH
#define LOWRANK_DECODE_CUH

#include "pack.cuh"
#include "ptx.cuh"
#include "quant.cuh"
#include "tile.cuh"

// What a block's scale and zero point are made of, read ahead of their use.
struct BlockConstants {
    float scale; // nested: of the block's scale
    float zero;
    uint32_t nested; // code of the scale
};

__device__ __forceinline__ BlockConstants load_constants(const quantized_matrix &q, uint64_t block) {
    BlockConstants c;
    c.nested = q.scales ? 0 : q.nested[block];
    c.scale = q.scales ? q.scales[block] : q.nested_absmax[block >> q.nested_shift];
    c.zero = q.zeros ? (float)q.zeros[block] : 0.0f;
    return c;
}

// `map`: the nested map, where it is quick to read.
__device__ __forceinline__ float scale_of(const quantized_matrix &q, const BlockConstants &c, const float *map) {
    return q.scales ? c.scale : map[c.nested] * c.scale + q.nested_offset;
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

// Elements whose codes a thread decodes at once: neighbours in a row, all of one block.
#define RUN 32

// Four neighbours' codes of eight bits as two pairs of bf16.
__device__ __forceinline__ void decode_bytes(uint32_t out[2], uint32_t codes, int format, float scale) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = level_of_byte(codes >> 8 * i & 255, format) * scale;
    out[0] = pack_bf16(x[0], x[1]);
    out[1] = pack_bf16(x[2], x[3]);
}

// Eight neighbours' codes of four bits as four pairs of bf16.
template <bool ZEROS>
__device__ __forceinline__ void decode_nibbles(uint32_t out[4], uint32_t codes, const PairTable &table, float scale,
                                               float zero) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 level = table(codes >> 8 * i & 255);
        if (ZEROS) level = make_float2(level.x - zero, level.y - zero);
        out[i] = pack_bf16(level.x * scale, level.y * scale);
    }
}

// Decodes the run at `codes`, chunk j of eight elements to store(j, four pairs).
template <class Store>
__device__ __forceinline__ void decode_run(const unsigned char *codes, const quantized_matrix &q, const PairTable &table,
                                           float scale, float zero, Store store) {
    const uint4 *words = (const uint4 *)codes;
    uint4 first = words[0];
    uint32_t c[4] = {first.x, first.y, first.z, first.w}, out[4];
    if (q.format == CODES_4BIT) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (q.zeros) decode_nibbles<true>(out, c[j], table, scale, zero);
            else decode_nibbles<false>(out, c[j], table, scale, zero);
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
