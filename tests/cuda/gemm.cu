// D = A B^T by mma.sync, A [m, k] and B [n, k] in bf16 copied by cp.async into two stages; any m, n; k in whole steps of 32.
#include "ptx.cuh"

struct test_gemm_params {
    const bf16 *a, *b;
    float *d;
    uint32_t m, n, k;
};

constexpr int ROWS = 64, COLUMNS = 64, STEP = 32; // of a block, one step of k
constexpr int STRIDE = STEP + 8;                  // rows of a tile in shared memory, so that ldmatrix meets all banks

// Starts the copy of 64 rows, those past `rows` as zeros.
__device__ __forceinline__ void copy_tile(bf16 *tile, const bf16 *from, uint32_t first, uint32_t rows, uint32_t ld,
                                          uint32_t k) {
    for (uint32_t i = threadIdx.x; i < ROWS * STEP / 8; i += blockDim.x) {
        uint32_t row = i / (STEP / 8), column = i % (STEP / 8) * 8;
        bool inside = first + row < rows;
        cp_async16(tile + row * STRIDE + column, from + (inside ? (size_t)(first + row) * ld + k + column : 0),
                   inside ? 16 : 0);
    }
}

KERNEL(gemm, test_gemm_params, 128) {
    DYNAMIC_SHARED(memory);
    bf16 *tiles = reinterpret_cast<bf16 *>(memory); // [2][A, B][64][STRIDE]
    constexpr int tile = ROWS * STRIDE;
    uint32_t first_row = blockIdx.y * ROWS, first_column = blockIdx.x * COLUMNS, steps = p.k / STEP;
    uint32_t lane = lane_index(), warp = warp_index(); // a warp has 16 rows
    float sums[COLUMNS / 8][4] = {};

    auto copy = [&](uint32_t step) {
        bf16 *stage = tiles + step % 2 * 2 * tile;
        copy_tile(stage, p.a, first_row, p.m, p.k, step * STEP);
        copy_tile(stage + tile, p.b, first_column, p.n, p.k, step * STEP);
        cp_async_commit();
    };
    copy(0);
    for (uint32_t step = 0; step < steps; step++) {
        if (step + 1 < steps) copy(step + 1);
        else cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const bf16 *a = tiles + step % 2 * 2 * tile, *b = a + tile;
        for (int k = 0; k < STEP; k += 16) {
            uint32_t fragment[4];
            ldmatrix_x4(fragment, a + (warp * 16 + lane % 16) * STRIDE + k + lane / 16 * 8);
            for (int column = 0; column < COLUMNS; column += 8) {
                uint32_t other[2];
                ldmatrix_x2(other, b + (column + lane % 8) * STRIDE + k + lane / 8 % 2 * 8);
                mma_bf16(sums[column / 8], fragment, other);
            }
        }
        __syncthreads(); // before this stage is filled again
    }
    for (int i = 0; i < COLUMNS / 8; i++)
        for (int j = 0; j < 4; j++) {
            uint32_t row = first_row + warp * 16 + lane / 4 + j / 2 * 8,
                     column = first_column + i * 8 + lane % 4 * 2 + j % 2;
            if (row < p.m && column < p.n) p.d[(size_t)row * p.n + column] = sums[i][j];
        }
}
