// D = A B^T by wgmma over TMA: one warp produces, a warpgroup multiplies tiles of 64 x 64; any m, n, k that TMA takes.
#include "hopper.cuh"

struct hopper_gemm_params {
    tensor_map a, b, d; // boxes of A [64, step]; of B [64, step] or, MN-major, [step, 64]; of D [64, 64] f32
    const bf16 *a_rows; // A itself, [m, k]
    uint32_t m, k;
};

constexpr int STAGES = 3, TILE = 64, CONSUMERS = 128;

// SWIZZLE: bytes of a tile's rows, so a step has SWIZZLE / 2 of k. With a cluster of two blocks, one above the other, each
// brings half of B to both.
template <int SWIZZLE, bool MN_MAJOR, bool A_IN_REGISTERS, int CLUSTER>
__device__ __forceinline__ void hopper_gemm(const hopper_gemm_params &p) {
    constexpr int STEP = SWIZZLE / 2, A_BYTES = TILE * SWIZZLE, STAGE = 2 * A_BYTES;
    constexpr wgmma_swizzle swizzle =
        SWIZZLE == 128 ? WGMMA_SWIZZLE_128 : SWIZZLE == 64 ? WGMMA_SWIZZLE_64 : WGMMA_SWIZZLE_32;
    DYNAMIC_SHARED(tiles); // [STAGES][A, B], then D
    SHARED(uint64_t, full, STAGES);
    SHARED(uint64_t, empty, STAGES);
    unsigned warp = warp_index(), lane = lane_index(), steps = (p.k + STEP - 1) / STEP;
    int row = blockIdx.y * TILE, column = blockIdx.x * TILE;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            mbarrier_init(&full[s], 1);
            mbarrier_init(&empty[s], CLUSTER * (CONSUMERS / 32));
        }
        fence_mbarrier_init();
    }
    if constexpr (CLUSTER > 1) {
        cluster_arrive();
        cluster_wait();
    } else __syncthreads();

    if (warp == CONSUMERS / 32) {
        for (unsigned step = 0; step < steps && lane == 0; step++) {
            unsigned s = step % STAGES;
            unsigned char *a = tiles + s * STAGE, *b = a + A_BYTES;
            mbarrier_wait(&empty[s], step / STAGES % 2 ^ 1);
            mbarrier_arrive_expect(&full[s], STAGE);
            tma_load_2d(a, &p.a, &full[s], step * STEP, row);
            if constexpr (CLUSTER > 1) {
                unsigned half = cluster_rank() * (TILE / 2);
                tma_load_2d_multicast(b + half * SWIZZLE, &p.b, &full[s], step * STEP, column + half, 3);
            } else if constexpr (MN_MAJOR) tma_load_2d(b, &p.b, &full[s], column, step * STEP);
            else tma_load_2d(b, &p.b, &full[s], step * STEP, column);
        }
    } else {
        float sums[TILE / 2];
        for (unsigned step = 0; step < steps; step++) {
            unsigned s = step % STAGES;
            unsigned char *a = tiles + s * STAGE, *b = a + A_BYTES;
            mbarrier_wait(&full[s], step / STAGES % 2);
            uint64_t a_tile = wgmma_descriptor(a, 16, 8 * SWIZZLE, swizzle);
            uint64_t b_tile = wgmma_descriptor(b, 16, 8 * SWIZZLE, swizzle);
            uint32_t fragments[STEP / 16][4];
            if constexpr (A_IN_REGISTERS) {
                for (int k = 0; k < STEP; k += 16)
                    for (int i = 0; i < 4; i++) {
                        uint32_t r = row + warp * 16 + lane / 4 + i % 2 * 8,
                                 c = step * STEP + k + lane % 4 * 2 + i / 2 * 8;
                        bool inside = r < p.m && c < p.k;
                        fragments[k / 16][i] = inside ? *(const uint32_t *)(p.a_rows + (size_t)r * p.k + c) : 0;
                    }
            }
            wgmma_fence();
            for (int k = 0; k < STEP; k += 16) {
                bool accumulate = step > 0 || k > 0;
                uint64_t b_now = wgmma_advance(b_tile, MN_MAJOR ? k * SWIZZLE : 2 * k);
                if constexpr (A_IN_REGISTERS) wgmma_bf16<TILE, MN_MAJOR>(sums, fragments[k / 16], b_now, accumulate);
                else wgmma_bf16<TILE, 0, MN_MAJOR>(sums, wgmma_advance(a_tile, 2 * k), b_now, accumulate);
            }
            wgmma_commit();
            wgmma_wait<0>();
            if (lane == 0)
                for (unsigned rank = 0; rank < CLUSTER; rank++) {
                    if constexpr (CLUSTER > 1) mbarrier_arrive_remote(&empty[s], rank);
                    else mbarrier_arrive(&empty[s]);
                }
        }
        float *d = reinterpret_cast<float *>(tiles + STAGES * STAGE); // [64][64]
        for (int j = 0; j < TILE / 2; j++)
            d[(warp * 16 + lane / 4 + j % 4 / 2 * 8) * TILE + j / 4 * 8 + lane % 4 * 2 + j % 2] = sums[j];
        fence_proxy_async();
        barrier_sync(1, CONSUMERS);
        if (threadIdx.x == 0) {
            tma_store_2d(&p.d, d, column, row);
            tma_store_commit();
            tma_store_wait<0>();
        }
    }
    // No block leaves while another one still brings it tiles.
    if constexpr (CLUSTER > 1) {
        __syncwarp();
        cluster_arrive();
        cluster_wait();
    }
}

KERNEL(hopper_gemm_128, hopper_gemm_params, CONSUMERS + 32, 1) { hopper_gemm<128, false, false, 1>(p); }
KERNEL(hopper_gemm_64, hopper_gemm_params, CONSUMERS + 32, 1) { hopper_gemm<64, false, false, 1>(p); }
KERNEL(hopper_gemm_32, hopper_gemm_params, CONSUMERS + 32, 1) { hopper_gemm<32, false, false, 1>(p); }
KERNEL(hopper_gemm_mn, hopper_gemm_params, CONSUMERS + 32, 1) { hopper_gemm<128, true, false, 1>(p); }
KERNEL(hopper_gemm_registers, hopper_gemm_params, CONSUMERS + 32, 1) { hopper_gemm<64, false, true, 1>(p); }
KERNEL(hopper_gemm_cluster, hopper_gemm_params, CONSUMERS + 32, 1) { hopper_gemm<128, false, false, 2>(p); }
