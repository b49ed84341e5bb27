// Tiles of bf16 matrices in shared memory, and what a warp does with them.
//
// A tile is `ROWS` rows (of a result's rows or columns) by TILE_K of the contraction, in 16-byte chunks of eight
// elements. It lies as its matrix does in memory: k-major, a line of TILE_K elements for each row, or row-major, a line
// of ROWS elements for each k. Chunks of a line are permuted by its number so that the eight lines of an 8 x 8 matrix
// lie in different banks, for every number of chunks that a line has.
#ifndef LOWRANK_TILE_CUH
#define LOWRANK_TILE_CUH

#include "ptx.cuh"

#define TILE_K 64

template <int ROWS, bool K_MAJOR> struct Tile {
    static constexpr int BYTES = ROWS * TILE_K * 2;
    static constexpr int LINES = K_MAJOR ? ROWS : TILE_K;
    static constexpr int CHUNKS = K_MAJOR ? TILE_K / 8 : ROWS / 8;

    static __device__ __forceinline__ unsigned offset(unsigned line, unsigned chunk) {
        unsigned spread = CHUNKS >= 8 ? line & 7 : line / (8 / CHUNKS) & (CHUNKS - 1);
        return (line * CHUNKS + (chunk ^ spread)) * 16;
    }

    // Starts copies of the rows from `row` and the k from `k` on of a stored matrix, zeros outside of it. Its lines are
    // 16-byte aligned. THREADS threads take part, this one is the `thread`-th.
    template <int THREADS>
    static __device__ __forceinline__ void load(unsigned char *tile, const bf16 *data, uint64_t ld, uint64_t row,
                                                uint64_t rows, uint64_t k, uint64_t depth, unsigned thread) {
        static_assert(LINES * CHUNKS % THREADS == 0, "each thread has as many chunks");
        uint64_t first_line = K_MAJOR ? row : k, lines = K_MAJOR ? rows : depth;
        uint64_t first_column = K_MAJOR ? k : row, columns = K_MAJOR ? depth : rows;
#pragma unroll
        for (int i = 0; i < LINES * CHUNKS / THREADS; i++) {
            unsigned index = thread + i * THREADS, line = index / CHUNKS, chunk = index % CHUNKS;
            uint64_t l = first_line + line, c = first_column + chunk * 8;
            bool inside = l < lines && c < columns;
            unsigned bytes = !inside ? 0 : columns - c < 8 ? (unsigned)(columns - c) * 2 : 16;
            cp_async16(tile + offset(line, chunk), inside ? data + l * ld + c : data, bytes);
        }
    }

    // mma's A [16 rows from `row`, k from 16 step on].
    static __device__ __forceinline__ void load_a(uint32_t a[4], const unsigned char *tile, unsigned row, int step) {
        unsigned lane = lane_index(), matrix = lane / 8;
        if constexpr (K_MAJOR) ldmatrix_x4(a, tile + offset(row + lane % 8 + matrix % 2 * 8, 2 * step + matrix / 2));
        else ldmatrix_x4_trans(a, tile + offset(16 * step + lane % 8 + matrix / 2 * 8, row / 8 + matrix % 2));
    }

    // mma's B twice: [k from 16 step on, rows from `row` on], eight rows and the eight after them.
    static __device__ __forceinline__ void load_b(uint32_t b[4], const unsigned char *tile, unsigned row, int step) {
        unsigned lane = lane_index(), matrix = lane / 8;
        if constexpr (K_MAJOR) ldmatrix_x4(b, tile + offset(row + lane % 8 + matrix / 2 * 8, 2 * step + matrix % 2));
        else ldmatrix_x4_trans(b, tile + offset(16 * step + lane % 8 + matrix % 2 * 8, row / 8 + matrix / 2));
    }
};

#endif
