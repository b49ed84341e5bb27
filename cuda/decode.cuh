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

// A lane's share of the exchange within its quad.
struct Exchange {
    bool upper;                         // lanes 2 and 3
    uint32_t keep, send, even, odd;     // selectors

    __device__ __forceinline__ Exchange() {
        unsigned t = lane_index() % 4;
        upper = t >= 2;
        keep = t % 2 ? 0x7632 : 0x5410;
        send = t % 2 ? 0x5410 : 0x7632;
        // Of (own, received): steps t, t ^ 2 and t ^ 1, t ^ 3 in their halves.
        uint32_t own = t >= 2 ? 0x1032 : 0x3210, received = t >= 2 ? 0x5476 : 0x7654;
        even = t % 2 ? received : own;
        odd = t % 2 ? own : received;
    }

    // From the eight bytes of 16 k, of which this lane's are those of step t: this lane's two bytes (k 2t and 2t + 8) of
    // steps 0 and 2 (halves of the first result) and 1 and 3.
    __device__ __forceinline__ uint2 operator()(uint2 bytes) const {
        uint32_t low = prmt(bytes.x, bytes.y, 0x5140), high = prmt(bytes.x, bytes.y, 0x7362);
        uint32_t stays = upper ? high : low;
        uint32_t comes = __shfl_xor_sync(0xffffffffu, upper ? low : high, 2);
        uint32_t own = prmt(stays, comes, keep);
        uint32_t received = __shfl_xor_sync(0xffffffffu, prmt(stays, comes, send), 1);
        return make_uint2(prmt(own, received, even), prmt(own, received, odd));
    }
};

// Scales of a matrix whose rows are contracted, in mma's (or wgmma's) A of 16 rows: of a tile's TILE_K of the rows g and
// g + 8, which four lanes have in common.
struct QuadScales {
    float scale[2][2], zero[2][2]; // of rows g and g + 8, of each run
    bool zeros;

    // Lane t reads the constants of the run t % 2 of `row`, or of the row 8 further if t is 2 or 3.
    static __device__ __forceinline__ BlockConstants load(const quantized_matrix &q, uint64_t row, uint64_t rows,
                                                          uint64_t k) {
        unsigned t = lane_index() % 4;
        uint64_t at = k + t % 2 * RUN;
        row += t / 2 * 8;
        if (row >= rows || at >= q.cols) return BlockConstants{0.0f, 0.0f, ~0u};
        return load_constants(q, block_of(q, row, at));
    }

    __device__ __forceinline__ explicit QuadScales(const quantized_matrix &q) : zeros(q.zeros != nullptr) {}

    __device__ __forceinline__ QuadScales(const quantized_matrix &q, const BlockConstants &constants, const float *map)
        : QuadScales(q) {
        float own = own_scale(q, constants, map);
#pragma unroll
        for (int r = 0; r < 2; r++) share(r, own, constants.zero);
    }

    static __device__ __forceinline__ float own_scale(const quantized_matrix &q, const BlockConstants &constants,
                                                      const float *map) {
        return constants.nested == ~0u ? 0.0f : scale_of(q, constants, map);
    }
    // Row r's, from the lanes that have them.
    __device__ __forceinline__ void share(int r, float own_scale, float own_zero) {
#pragma unroll
        for (int run = 0; run < 2; run++) {
            scale[r][run] = __shfl_sync(0xffffffffu, own_scale, 2 * r + run, 4);
            zero[r][run] = zeros ? __shfl_sync(0xffffffffu, own_zero, 2 * r + run, 4) : 0.0f;
        }
    }
};

// Codes of four bits that a lane turns into that A. The four lanes of a quad read 16 k each; mma wants k 2t, 2t + 1,
// 2t + 8 and 2t + 9 of every 16 in lane t, so the bytes change lanes by two shuffles a row.
struct QuadCodes : QuadScales {
    uint2 bytes[2];

    // `codes`: this lane's eight bytes of each row.
    __device__ __forceinline__ QuadCodes(const quantized_matrix &q, const Exchange &exchange, const uint2 (&codes)[2],
                                         const BlockConstants &constants, const float *map)
        : QuadScales(q) {
        float own = own_scale(q, constants, map);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            bytes[r] = exchange(codes[r]);
            share(r, own, constants.zero);
        }
    }

    // The step-th 16 k.
    __device__ __forceinline__ void decode(uint32_t (&a)[4], const PairTable &table, int step) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int r = i % 2, half = i / 2, run = step / 2;
            uint32_t word = step % 2 ? bytes[r].y : bytes[r].x;
            float2 level = table(word >> (run * 16 + half * 8) & 255);
            if (zeros) level = make_float2(level.x - zero[r][run], level.y - zero[r][run]);
            a[i] = pack_bf16(level.x * scale[r][run], level.y * scale[r][run]);
        }
    }
};

#endif
