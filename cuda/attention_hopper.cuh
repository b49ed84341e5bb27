// What attention's kernels for sm_90a share: tiles that TMA brings, their products by wgmma, and the treatment of
// values that are not finite. Heads of 64 or 128, every row of a head at a multiple of 16 bytes.
//
// A tile is 64 rows of a head, in pieces of 64 columns: [D / 64][64][LINE], swizzled. A block has two warpgroups that
// multiply, with 64 rows each, and one of which a warp keeps rings of tiles full.
#ifndef LOWRANK_ATTENTION_HOPPER_CUH
#define LOWRANK_ATTENTION_HOPPER_CUH

#include "attention.cuh"
#include "hopper.cuh"

#define TILE_ROWS 64
#define GROUPS 2
#define CONSUMERS (128 * GROUPS)
#define THREADS (CONSUMERS + 128)
#define LINE 128 // bytes
#define PIECE (TILE_ROWS * LINE)

// Bytes of a tile.
template <int D> constexpr unsigned tile_bytes = D / 64 * PIECE;

// The tile of 64 rows from `row` on. Rows behind a sequence's end are those of its neighbours.
template <int D>
__device__ __forceinline__ void load_tile(unsigned char *to, const tensor_map &map, uint64_t *barrier, int column,
                                          int row) {
#pragma unroll
    for (int i = 0; i < D / 64; i++) tma_load_2d(to + i * PIECE, &map, barrier, column + 64 * i, row);
}

// Starts s = a b^T of tiles; wgmma_wait says when it is there.
template <int D>
__device__ __forceinline__ void start_rows(float (&s)[TILE_ROWS / 2], const unsigned char *a, const unsigned char *b) {
    uint64_t left = wgmma_descriptor(a, 0, 8 * LINE, WGMMA_SWIZZLE_128);
    uint64_t right = wgmma_descriptor(b, 0, 8 * LINE, WGMMA_SWIZZLE_128);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        unsigned bytes = step / 4 * PIECE + step % 4 * 32;
        wgmma_bf16<TILE_ROWS>(s, wgmma_advance(left, bytes), wgmma_advance(right, bytes), step > 0);
    }
    wgmma_commit();
}

// The same of rows in registers.
template <int D>
__device__ __forceinline__ void start_rows(float (&s)[TILE_ROWS / 2], const uint32_t (&a)[D / 16][4],
                                           const unsigned char *b) {
    uint64_t right = wgmma_descriptor(b, 0, 8 * LINE, WGMMA_SWIZZLE_128);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < D / 16; step++)
        wgmma_bf16<TILE_ROWS>(s, a[step], wgmma_advance(right, step / 4 * PIECE + step % 4 * 32), step > 0);
    wgmma_commit();
}

// A warp's rows of a tile, as start_rows takes them.
template <int D> __device__ __forceinline__ void load_rows(uint32_t (&a)[D / 16][4], const unsigned char *tile) {
    unsigned row = warp_index() % 4 * 16 + lane_index() % 16;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        unsigned chunk = step % 4 * 2 + lane_index() / 16;
        ldmatrix_x4(a[step], tile + step / 4 * PIECE + row * LINE + (chunk ^ row % 8) * 16);
    }
}

// Starts x = left b, or x += left b.
template <int D>
__device__ __forceinline__ void start_product(float (&x)[D / 2], const Left<bf16, 1, TILE_ROWS> &left,
                                              const unsigned char *b, bool accumulate) {
    uint64_t right = wgmma_descriptor(b, PIECE, 8 * LINE, WGMMA_SWIZZLE_128);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < TILE_ROWS / 16; step++)
        wgmma_bf16<D, 1>(x, left.a[0][step], wgmma_advance(right, step * 16 * LINE), accumulate || step > 0);
    wgmma_commit();
}

// The accumulators of wgmma, [64, 2 N] over a warpgroup, as attention.cuh has them.
template <int N> __device__ __forceinline__ float (&accumulators(float (&x)[1][N][4]))[4 * N] {
    return reinterpret_cast<float(&)[4 * N]>(x);
}

// As find_not_finite, of a tile in pieces that is there for all consumers, by all of them. Their barrier must follow.
template <int D>
__device__ __forceinline__ void find_not_finite_in_pieces(unsigned char *tile, uint32_t *bad, bool clear) {
    for (unsigned i = threadIdx.x; i < tile_bytes<D> / 16; i += CONSUMERS) {
        unsigned row = i * 16 / LINE % TILE_ROWS;
        if (has_not_finite((bf16 *)(tile + i * 16), clear)) atomicOr(bad + row / 32, 1u << row % 32);
    }
}

// What is found in a tile, WORDS words of flags, zero at first. There are three of them, for scans in turn: after the
// barrier that ends a scan, everybody has read what the last one found, and the next but one isn't made before the
// next barrier.
template <int WORDS> struct Scans {
    uint32_t *bad; // [3 * WORDS]
    unsigned count;

    __device__ __forceinline__ uint32_t *here() const { return bad + count % 3 * WORDS; }
    // Ends a scan; its flags stay to be read until the next one has ended.
    __device__ __forceinline__ void end() {
        barrier_sync(1, CONSUMERS);
        if (threadIdx.x < WORDS) bad[(count + 2) % 3 * WORDS + threadIdx.x] = 0;
        count++;
    }
};

#endif
