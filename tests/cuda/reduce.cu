// Sums of rows: shuffles in a warp, shared memory between warps.
#include "kernel.cuh"

struct reduce_params {
    const float *x; // [blocks, columns]
    float *sums;    // [blocks]
    uint32_t columns;
};

__device__ __forceinline__ float warp_sum(float x) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

KERNEL(reduce, reduce_params, 256) {
    SHARED(float, partial, 8);
    const float *row = p.x + (size_t)blockIdx.x * p.columns;
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < p.columns; i += blockDim.x) sum += row[i];
    sum = warp_sum(sum);
    if (lane_index() == 0) partial[warp_index()] = sum;
    __syncthreads();
    if (warp_index() == 0) {
        sum = warp_sum(lane_index() < blockDim.x / 32 ? partial[lane_index()] : 0.0f);
        if (lane_index() == 0) p.sums[blockIdx.x] = sum;
    }
}
