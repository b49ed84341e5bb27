// Single wrappers of hopper.cuh and wgmma.cuh.
#include "hopper.cuh"

struct wgmma_params {
    const bf16 *a, *b; // [64, 32], [N, 32]
    float *d;          // [64, N], written transposed: [N, 64]
};

// Where an element of a tile in shared memory lies, from the words of wgmma.cuh: SWIZZLE bytes, 16 for none.
template <int SWIZZLE, bool MN_MAJOR>
__device__ __forceinline__ unsigned place(unsigned row, unsigned k, unsigned leading, unsigned stride) {
    constexpr unsigned WIDTH = SWIZZLE / 2; // elements of an atom's line
    unsigned line = MN_MAJOR ? k : row, along = MN_MAJOR ? row : k;
    unsigned in_line = line % 8 * SWIZZLE + along % WIDTH * 2;
    // The distances change places for a tile that is MN-major and not swizzled.
    bool changed = MN_MAJOR && SWIZZLE == 16;
    unsigned at = line / 8 * (changed ? leading : stride) + along / WIDTH * (changed ? stride : leading) + in_line;
    return SWIZZLE == 16 ? at : at ^ (at / 128 % 8 * 16 & (SWIZZLE - 1));
}

// D = A B^T of depth 32 from tiles that threads write.
template <int N, int SWIZZLE, bool A_MN_MAJOR, bool B_MN_MAJOR>
__device__ __forceinline__ void wgmma_once(const wgmma_params &p) {
    constexpr int K = 32;
    constexpr wgmma_swizzle swizzle = SWIZZLE == 128 ? WGMMA_SWIZZLE_128
        : SWIZZLE == 64                              ? WGMMA_SWIZZLE_64
        : SWIZZLE == 32                              ? WGMMA_SWIZZLE_32
                                                     : WGMMA_SWIZZLE_NONE;
    DYNAMIC_SHARED(tiles);
    unsigned char *a = tiles, *b = tiles + 16384;
    // Distances that leave gaps: of atoms' lines, and from one atom to the next along them.
    constexpr unsigned STRIDE = 8 * SWIZZLE, A_LEADING = A_MN_MAJOR && SWIZZLE > 16 ? K / 8 * STRIDE : 64 / 8 * STRIDE;
    constexpr unsigned B_LEADING = B_MN_MAJOR && SWIZZLE > 16 ? K / 8 * STRIDE : N / 8 * STRIDE;
    for (unsigned i = threadIdx.x; i < 64 * K; i += 128)
        *(bf16 *)(a + place<SWIZZLE, A_MN_MAJOR>(i / K, i % K, A_LEADING, STRIDE)) = p.a[i];
    for (unsigned i = threadIdx.x; i < N * K; i += 128)
        *(bf16 *)(b + place<SWIZZLE, B_MN_MAJOR>(i / K, i % K, B_LEADING, STRIDE)) = p.b[i];
    fence_proxy_async();
    __syncthreads();
    float sums[N / 2];
    wgmma_fence();
    for (unsigned k = 0; k < K; k += 16) {
        uint64_t a_now = wgmma_descriptor(a + place<SWIZZLE, A_MN_MAJOR>(0, k, A_LEADING, STRIDE), A_LEADING, STRIDE, swizzle);
        uint64_t b_now = wgmma_descriptor(b + place<SWIZZLE, B_MN_MAJOR>(0, k, B_LEADING, STRIDE), B_LEADING, STRIDE, swizzle);
        wgmma_bf16<N, A_MN_MAJOR, B_MN_MAJOR>(sums, a_now, b_now, k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    unsigned lane = lane_index(), row = warp_index() * 16 + lane / 4;
    for (int i = 0; i < N / 2; i++)
        p.d[(i / 4 * 8 + lane % 4 * 2 + i % 2) * 64 + row + i / 2 % 2 * 8] = sums[i];
}
#define WGMMA_ONCE(name, ...)                                                                                          \
    KERNEL(name, wgmma_params, 128) { wgmma_once<__VA_ARGS__>(p); }
WGMMA_ONCE(wgmma_8_128, 8, 128, false, false)
WGMMA_ONCE(wgmma_24_none, 24, 16, false, false)
WGMMA_ONCE(wgmma_256_none, 256, 16, false, false)
WGMMA_ONCE(wgmma_64_none_a, 64, 16, true, false)
WGMMA_ONCE(wgmma_40_none_b, 40, 16, false, true)
WGMMA_ONCE(wgmma_192_128_a, 192, 128, true, false)
WGMMA_ONCE(wgmma_192_128_ab, 192, 128, true, true)
WGMMA_ONCE(wgmma_96_64_ab, 96, 64, true, true)
WGMMA_ONCE(wgmma_176_32_ab, 176, 32, true, true)
WGMMA_ONCE(wgmma_200_64, 200, 64, false, false)

struct store_matrices_params {
    uint32_t *out; // [2][4][8][4]: the four matrices of either wrapper, rows of eight 16-bit elements
};

// Registers go from the third warpgroup to the others.
KERNEL(registers, store_matrices_params, 384, 1) {
    if (threadIdx.x >= 256) fewer_registers<40>();
    else more_registers<232>();
    if (threadIdx.x == 0) p.out[0] = 1;
}

struct copies_params {
    tensor_map x, y; // boxes [2, 4, 8] f32, the last innermost
    const float *added; // [64]
    int32_t at[3];      // of the box, the first innermost
};

// A box of x plus a vector to the same box of y.
KERNEL(copies, copies_params, 64) {
    SHARED(uint64_t, barrier, 1);
    DYNAMIC_SHARED(memory);
    float *box = (float *)memory, *added = box + 64;
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect(barrier, 512);
        tma_load_3d(box, &p.x, barrier, p.at[0], p.at[1], p.at[2]);
        bulk_load(added, p.added, 256, barrier);
    }
    __syncthreads();
    mbarrier_wait(barrier, 0);
    box[threadIdx.x] += added[threadIdx.x];
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        tma_store_3d(&p.y, box, p.at[0], p.at[1], p.at[2]);
        tma_store_commit();
        tma_store_wait<0>();
    }
}

// Register i of lane l has 512 i + 2 l and the next number in its halves.
KERNEL(store_matrices, store_matrices_params, 32) {
    SHARED(uint32_t, matrices, 256);
    unsigned lane = lane_index();
    uint32_t r[4];
    for (uint32_t i = 0; i < 4; i++) r[i] = (512 * i + 2 * lane) | (512 * i + 2 * lane + 1) << 16;
    stmatrix_x4(matrices + lane * 4, r);
    stmatrix_x4_trans(matrices + 128 + lane * 4, r);
    __syncwarp();
    for (unsigned i = lane; i < 256; i += 32) p.out[i] = matrices[i];
}
