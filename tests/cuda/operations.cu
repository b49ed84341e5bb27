// Each operation by itself, for comparison with what it should give.
#include "ptx.cuh"

struct conversions_params {
    const float *x;
    uint16_t *as_bf16, *as_f16;
    float *from_f16; // of every 16-bit pattern
    uint32_t *packed;
    uint32_t n;
};

KERNEL(conversions, conversions_params, 256) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < 65536) p.from_f16[i] = to_float(f16{(uint16_t)i});
    if (i >= p.n) return;
    p.as_bf16[i] = from_float<bf16>(p.x[i]).bits;
    p.as_f16[i] = from_float<f16>(p.x[i]).bits;
    p.packed[2 * i] = pack_bf16(p.x[i], 1.0f);
    p.packed[2 * i + 1] = pack_f16(1.0f, p.x[i]);
}

struct warp_params {
    uint32_t *out; // [10][threads]
};

KERNEL(warp_operations, warp_params, 1024) {
    uint32_t thread = thread_index(), lane = lane_index(), all = 0xffffffffu;
    uint32_t threads = blockDim.x * blockDim.y, value = thread * 3;
    auto write = [&](int row, uint32_t x) { p.out[row * threads + thread] = x; };
    write(0, __shfl_sync(all, value, 5));
    write(1, __shfl_sync(all, value, (int)lane + 1, 8));
    write(2, __shfl_up_sync(all, value, 3));
    write(3, __shfl_down_sync(all, value, 3, 16));
    write(4, __shfl_xor_sync(all, value, 9));
    write(5, __ballot_sync(all, lane % 3 == 0));
    write(6, (uint32_t)__any_sync(all, thread == 40) * 2 + (uint32_t)__all_sync(all, thread < 40));
    write(7, __reduce_add_sync(all, value));
    write(8, prmt(0x83828180u + lane, 0x07060504u, 0x3c51u) ^ lop3<0xe8>(thread, lane, 0x55u));
    // Two halves of a warp apart.
    uint32_t half = lane < 16 ? 0xffffu : 0xffff0000u, sum = value;
    if (lane < 16) sum = __shfl_xor_sync(half, sum, 1);
    else sum = __shfl_xor_sync(half, sum, 2);
    __syncwarp();
    write(9, sum);
}

struct matrix_params {
    const uint16_t *a, *b; // [16, 16] and [8, 16]: d = a b^T
    const float *fa, *fb;  // [16, 8] and [8, 8]
    float *d;              // [5][16, 8]: bf16, b through a transposed load, f16, tf32, bytes of a [16, 32] and b [8, 32]
};

__device__ __forceinline__ void write_d(float *out, const float d[4]) {
    uint32_t g = lane_index() / 4, t = lane_index() % 4;
    for (uint32_t i = 0; i < 4; i++) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

KERNEL(matrix_operations, matrix_params, 32) {
    SHARED(uint16_t, a, 256);
    SHARED(uint16_t, b, 128);
    SHARED(uint16_t, b_transposed, 128); // [16, 8]
    uint32_t lane = lane_index(), g = lane / 4, t = lane % 4, fragment[4], other[2];
    for (uint32_t i = lane; i < 32; i += 32) {
        cp_async16(a + i * 8, p.a + i * 8);
        cp_async8(b + i * 4, p.b + i * 4);
    }
    for (uint32_t i = lane; i < 128; i += 32) b_transposed[i % 16 * 8 + i / 16] = p.b[i];
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    ldmatrix_x4(fragment, a + lane % 16 * 16 + lane / 16 * 8);
    ldmatrix_x2(other, b + lane % 8 * 16 + lane / 8 % 2 * 8);
    float d[4] = {};
    mma_bf16(d, fragment, other);
    write_d(p.d, d);
    uint32_t through[2];
    ldmatrix_x2_trans(through, b_transposed + lane % 16 * 8);
    float e[4] = {};
    mma_bf16(e, fragment, through);
    write_d(p.d + 128, e);
    float f[4] = {1, 1, 1, 1};
    mma_f16(f, fragment, other);
    write_d(p.d + 256, f);
    for (uint32_t i = 0; i < 4; i++) fragment[i] = tf32_bits(p.fa[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
    for (uint32_t i = 0; i < 2; i++) other[i] = tf32_bits(p.fb[g * 8 + t + i * 4]);
    float h[4] = {};
    mma_tf32(h, fragment, other);
    write_d(p.d + 384, h);
    const uint32_t *left = (const uint32_t *)p.a, *right = (const uint32_t *)p.b, c[4] = {1, 1, 1, 1};
    for (uint32_t i = 0; i < 4; i++) fragment[i] = left[(g + i % 2 * 8) * 8 + t + i / 2 * 4];
    for (uint32_t i = 0; i < 2; i++) other[i] = right[g * 8 + t + i * 4];
    uint32_t sums[4];
    mma_u8(sums, fragment, other, c);
    for (uint32_t i = 0; i < 4; i++) h[i] = (float)sums[i];
    write_d(p.d + 512, h);
}

struct sum_params {
    const uint16_t *a, *b; // [16, 16], [8, 16]
    float *d;              // [16, 8]
};

// d += a b^T.
KERNEL(sum, sum_params, 32) {
    uint32_t g = lane_index() / 4, t = lane_index() % 4, a[4], b[2];
    for (uint32_t i = 0; i < 4; i++) a[i] = *(const uint32_t *)(p.a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8);
    for (uint32_t i = 0; i < 2; i++) b[i] = *(const uint32_t *)(p.b + g * 16 + 2 * t + i * 8);
    float d[4];
    for (uint32_t i = 0; i < 4; i++) d[i] = p.d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    mma_bf16(d, a, b);
    write_d(p.d, d);
}

struct queue_params {
    const float *x; // [rounds, 32]
    float *y;
    uint32_t rounds;
};

// A warp that produces and one that consumes, over two slots and named barriers.
KERNEL(queue, queue_params, 64) {
    SHARED(float, slots, 64);
    uint32_t lane = lane_index();
    if (warp_index() == 0) {
        for (uint32_t round = 0; round < p.rounds; round++) {
            uint32_t slot = round % 2;
            if (round >= 2) barrier_sync(1 + slot, 64); // it was read
            slots[slot * 32 + lane] = p.x[round * 32 + lane];
            barrier_arrive(3 + slot, 64); // it is full
        }
    } else {
        for (uint32_t round = 0; round < p.rounds; round++) {
            uint32_t slot = round % 2;
            barrier_sync(3 + slot, 64);
            p.y[round * 32 + lane] = slots[slot * 32 + 31 - lane];
            if (round + 2 < p.rounds) barrier_arrive(1 + slot, 64);
        }
    }
}

struct deep_params {
    uint32_t *out;
    uint32_t depth;
};

KERNEL(divide, deep_params, 32) { p.out[threadIdx.x] = 100 / p.depth; }
