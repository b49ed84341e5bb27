// Codes of four bits as mma's (or wgmma's) A of 16 rows, of a matrix whose rows are contracted: a quad of lanes decodes a
// tile's TILE_K of the rows g and g + 8, of which lane t has k 2t, 2t + 1, 2t + 8 and 2t + 9 of every 16.
#ifndef LOWRANK_DECODE_QUADS_CUH
#define LOWRANK_DECODE_QUADS_CUH

#include "decode.cuh"

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
template <bool WITH_MINIMUMS> struct QuadScales {
    float scale[2][2], zero[2][2]; // of rows g and g + 8, of each run
    Shift shift;

    // Lane t reads the constants of the run t % 2 of `row`, or of the row 8 further if t is 2 or 3.
    static __device__ __forceinline__ BlockConstants load(const quantized_matrix &q, uint64_t row, uint64_t rows,
                                                          uint64_t k) {
        unsigned t = lane_index() % 4;
        uint64_t at = k + t % 2 * RUN;
        row += t / 2 * 8;
        if (row >= rows || at >= q.cols) return BlockConstants{0.0f, 0.0f, ~0u};
        return load_constants<WITH_MINIMUMS>(q, block_of(q, row, at));
    }

    __device__ __forceinline__ explicit QuadScales(Shift shift) : shift(shift) {}

    __device__ __forceinline__ QuadScales(const quantized_matrix &q, const BlockConstants &constants, const float *map)
        : QuadScales(shift_of<WITH_MINIMUMS>(q)) {
        float own = own_scale(q, constants, map), own_zero = own_shift(q, constants, map);
#pragma unroll
        for (int r = 0; r < 2; r++) share(r, own, own_zero);
    }

    static __device__ __forceinline__ float own_scale(const quantized_matrix &q, const BlockConstants &constants,
                                                      const float *map) {
        return constants.nested == ~0u ? 0.0f : scale_of(q, constants, map);
    }
    static __device__ __forceinline__ float own_shift(const quantized_matrix &q, const BlockConstants &constants,
                                                      const float *map) {
        return WITH_MINIMUMS ? zero_of(q, constants, map) : constants.zero;
    }
    // Row r's, from the lanes that have them.
    __device__ __forceinline__ void share(int r, float own_scale, float own_zero) {
#pragma unroll
        for (int run = 0; run < 2; run++) {
            scale[r][run] = __shfl_sync(0xffffffffu, own_scale, 2 * r + run, 4);
            zero[r][run] = shift != NO_SHIFT ? __shfl_sync(0xffffffffu, own_zero, 2 * r + run, 4) : 0.0f;
        }
    }
};

// Codes of four bits that a lane turns into that A. The four lanes of a quad read 16 k each; mma wants k 2t, 2t + 1,
// 2t + 8 and 2t + 9 of every 16 in lane t, so the bytes change lanes by two shuffles a row.
struct QuadCodes : QuadScales<false> {
    uint2 bytes[2];

    // `codes`: this lane's eight bytes of each row.
    __device__ __forceinline__ QuadCodes(const quantized_matrix &q, const Exchange &exchange, const uint2 (&codes)[2],
                                         const BlockConstants &constants, const float *map)
        : QuadScales(shift_of<false>(q)) {
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
            a[i] = decode_pair<false>(level, shift, scale[r][run], zero[r][run]);
        }
    }
};

// ---- Codes in registers, moved by the tensor core ----
//
// Of two tiles a lane reads 16 bytes of row g and 16 of g + 8: those of the steps 2t and 2t + 1, eight bytes each, of
// which lane t of the quad needs bytes t and t + 4 of every step. As A of m16n8k32 a row's 16 bytes, four a register, are
// matrices of 16 x 32 bytes, and a B with one number in each column gives every lane the bytes that it asks for times that
// number: no shuffles, which are accesses to shared memory, and an address at once.
//
// A's row g has the first and the third word of a quad's lanes (columns 0 to 15 and from 16 on), which are the first
// halves of an even and an odd step, its row g + 8 the second halves.

// B that asks for the words of lane `owner`: `even` times the byte of its even step in the columns of one parity, `odd`
// times that of its odd step.
__device__ __forceinline__ void ask_for(uint32_t (&b)[2], unsigned owner, unsigned parity, uint32_t even,
                                        uint32_t odd) {
    unsigned g = lane_index() / 4, t = lane_index() % 4, byte = g / 2;
    if (t == owner && g % 2 == parity) b[0] += even << 8 * byte, b[1] += odd << 8 * byte;
    keep(b[0]), keep(b[1]);
}

using LaneScales = QuadScales<true>;

// The pairs of levels of each byte.
struct PairMover {
    const PairTable &table;
    uint32_t b[4][2]; // of two steps each, columns of a lane
    // Bytes in front of the copy of a pair that a lane reads; another one each, so that the compiler keeps all four.
    uint32_t copy[4];

    __device__ __forceinline__ explicit PairMover(const PairTable &table) : table(table) {
        uint32_t size = (uint32_t)sizeof(float2) << table.copies; // at most 128
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
            b[i][0] = b[i][1] = 0;
            ask_for(b[i], i, 0, size, 0);
            ask_for(b[i], i, 1, 0, size);
            copy[i] = ((lane_index() + i) & ((1u << table.copies) - 1)) * sizeof(float2);
            keep(copy[i]);
        }
    }

    // mma's A of the steps 2 i and 2 i + 1 of a tile of the two.
    __device__ __forceinline__ void decode(uint32_t (&a)[2][4], const uint4 (&codes)[2], const LaneScales &scales,
                                           int tile, int i) const {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint32_t bytes[4] = {codes[r].x, codes[r].y, codes[r].z, codes[r].w};
            uint32_t at[4]; // in the table: of the first half of both steps, of the second
            mma_u8(at, bytes, b[2 * tile + i], copy);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float2 level = *(const float2 *)((const char *)table.pairs + at[j]);
                a[j % 2][r + j / 2 * 2] = decode_pair(level, scales.shift, scales.scale[r][i], scales.zero[r][i]);
            }
        }
    }
};

// The codes of two steps at the same place, as 16 bits.
struct CodeMover {
    uint32_t part[2][2], rest[2][2]; // of a tile each

    // A factor of 256 is the sum of two.
    __device__ __forceinline__ CodeMover() {
#pragma unroll
        for (unsigned tile = 0; tile < 2; tile++) {
            part[tile][0] = part[tile][1] = rest[tile][0] = rest[tile][1] = 0;
#pragma unroll
            for (unsigned parity = 0; parity < 2; parity++) {
                ask_for(part[tile], 2 * tile + parity, parity, 0, 128);
                ask_for(rest[tile], 2 * tile + parity, parity, 1, 128);
            }
        }
    }

    // Of a tile's steps 0 and 1, and 2 and 3: of their first halves, then of their second ones.
    __device__ __forceinline__ void move(uint32_t (&to)[4], const uint4 &codes, int tile) const {
        const uint32_t a[4] = {codes.x, codes.y, codes.z, codes.w}, zero[4] = {0, 0, 0, 0};
        uint32_t half[4];
        mma_u8(half, a, part[tile], zero);
        mma_u8(to, a, rest[tile], half);
    }
};

// The elements of one scale for all sixteen codes.
struct ScaledLevels {
    uint32_t low[4], high[4]; // their bytes

    __device__ __forceinline__ ScaledLevels(const float *levels, float scale) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t first = pack_bf16(levels[4 * i] * scale, levels[4 * i + 1] * scale);
            uint32_t second = pack_bf16(levels[4 * i + 2] * scale, levels[4 * i + 3] * scale);
            low[i] = prmt(first, second, 0x6420);
            high[i] = prmt(first, second, 0x7531);
        }
    }

    // The pairs of two bytes of codes. A permutation takes a byte of eight, by three bits of a code; of which eight says
    // the fourth.
    __device__ __forceinline__ void decode(uint32_t &first, uint32_t &second, uint32_t codes) const {
        uint32_t flipped = codes ^ 0x8888; // so that codes from 8 on count from 0
        // Bytes of ones where a code is 8 or more: the signs of bytes with its highest bit in front.
        uint32_t upper = prmt(codes, codes << 4, 0x9d8c);
        auto choose = [&](const uint32_t (&bytes)[4]) {
            return lop3<0xca>(upper, prmt(bytes[2], bytes[3], flipped), prmt(bytes[0], bytes[1], codes));
        };
        uint32_t l = choose(low), h = choose(high);
        // The upper four bits of a byte are its first element.
        first = prmt(l, h, 0x4051);
        second = prmt(l, h, 0x6273);
    }
};

// A tile with one scale in each row, decoded by permutations of bytes: instructions instead of shared memory.
struct PermutedTile {
    const ScaledLevels scaled[2]; // of each row
    uint32_t codes[2][4];

    __device__ __forceinline__ PermutedTile(const CodeMover &mover, const uint4 (&codes)[2], const float *levels,
                                            const LaneScales &scales, int tile)
        : scaled{{levels, scales.scale[0][0]}, {levels, scales.scale[1][0]}} {
#pragma unroll
        for (int r = 0; r < 2; r++) mover.move(this->codes[r], codes[r], tile);
    }

    __device__ __forceinline__ void decode(uint32_t (&a)[2][4], int i) const {
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                scaled[r].decode(a[0][r + 2 * half], a[1][r + 2 * half], codes[r][i + 2 * half]);
    }
};

// Scales tile after tile, those of the next one read ahead. Behind the end they are 0, so that elements are.
struct TileScales {
    const quantized_matrix &q;
    const float *const map;
    const unsigned row, rows, end; // g's, how many there are, and tiles
    BlockConstants ahead;

    __device__ __forceinline__ TileScales(const quantized_matrix &q, const float *map, unsigned row, unsigned rows,
                                          unsigned from, unsigned end)
        : q(q), map(map), row(row), rows(rows), end(end) {
        load(from);
    }

    __device__ __forceinline__ void load(unsigned tile) {
        ahead = LaneScales::load(q, row, rows, tile < end ? (uint64_t)tile * TILE_K : q.cols);
    }

    __device__ __forceinline__ void turn(unsigned) {}

    __device__ __forceinline__ LaneScales of(unsigned first, int i) {
        const BlockConstants now = ahead;
        load(first + i + 1);
        return LaneScales(q, now, map);
    }
};

// The same where a row begins a block, a tile of it lies in one, and nothing is added: each lane of a quad reads those of
// one of QUAD_TILES tiles. Behind the last row they are that one's.
#define QUAD_TILES 4
struct PlainTileScales {
    const quantized_matrix &q;
    const float *const map;
    const unsigned last;
    uint32_t shift;          // log2 of the tiles of a block
    unsigned first_block[2]; // of each row
    float ahead[2], scale[2];
    uint32_t codes[2];

    static __device__ __forceinline__ bool serve(const quantized_matrix &q) {
        bool whole = q.cols % TILE_K == 0 && q.block_cols_shift >= 6;
        return shift_of(q) == NO_SHIFT && whole && (q.block_rows != 0 || q.cols % (1ull << q.block_cols_shift) == 0);
    }

    __device__ __forceinline__ PlainTileScales(const quantized_matrix &q, const float *map, unsigned row, unsigned rows,
                                               unsigned from, unsigned end)
        : q(q), map(map), last(end - 1), shift(min(q.block_cols_shift - 6, 31)) {
        static_assert(TILE_K == 1 << 6, "");
        keep(shift);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            first_block[r] = (unsigned)block_of(q, min(row + 8 * (unsigned)r, rows - 1), 0);
        }
        load(from);
    }

    __device__ __forceinline__ void load(unsigned first) {
        unsigned tile = min(first + lane_index() % QUAD_TILES, last);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            unsigned block = first_block[r] + (tile >> shift);
            if (q.scales) ahead[r] = q.scales[block];
            else codes[r] = q.nested[block], ahead[r] = q.nested_absmax[block >> q.nested_shift];
        }
    }

    // Goes on to the tiles that were read, and reads those after them.
    __device__ __forceinline__ void turn(unsigned first) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float there = q.scales ? ahead[r] : map[codes[r]] * ahead[r] + q.nested_offset;
            scale[r] = first + lane_index() % QUAD_TILES <= last ? there : 0.0f;
        }
        load(first + QUAD_TILES);
    }

    __device__ __forceinline__ LaneScales of(unsigned, int i) const {
        LaneScales tile(NO_SHIFT);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            tile.scale[r][0] = tile.scale[r][1] = __shfl_sync(0xffffffffu, scale[r], i, QUAD_TILES);
            tile.zero[r][0] = tile.zero[r][1] = 0.0f;
        }
        return tile;
    }
};

#endif
