// Sums over rows in the CPU's order: sixteen lanes by index mod 16, each ascending, joined by one tree. Half a warp has
// a row.
#ifndef LOWRANK_LANES_CUH
#define LOWRANK_LANES_CUH

#include "kernel.cuh"

#define LANES 16
#define ROW_THREADS 128
#define ROWS_PER_BLOCK (ROW_THREADS / LANES)

// The row of this thread and its lane. Rows behind the end are computed as the last one and not stored, as all threads
// of a warp take part in sums.
struct lane_place {
    uint64_t row;
    uint32_t lane;
    bool valid;
};

__device__ __forceinline__ lane_place place_of(uint64_t rows) {
    uint64_t row = (uint64_t)blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / LANES;
    return {row < rows ? row : rows - 1, threadIdx.x % LANES, row < rows};
}

__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
    for (int d = LANES / 2; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

__device__ __forceinline__ float lane_max(float x) {
#pragma unroll
    for (int d = LANES / 2; d > 0; d /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, x, d);
        x = other > x ? other : x;
    }
    return x;
}

#endif
