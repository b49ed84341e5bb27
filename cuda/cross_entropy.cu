// Softmax cross-entropy of rows of logits and its gradient, with the bits of cpu/cross_entropy.c.
#include "kernel.cuh"

#include "lanes.cuh"
#include "math.cuh"

template <class T> __device__ __forceinline__ void cross_entropy(const cross_entropy_params &p) {
    lane_place at = place_of(p.rows);
    const float *x = p.logits + at.row * p.vocabulary;
    int32_t target = p.targets[at.row];
    float top = __uint_as_float(0xff800000u); // minus infinity
#pragma unroll 4
    for (uint32_t j = at.lane; j < p.vocabulary; j += LANES) top = x[j] > top ? x[j] : top;
    float shift = lane_max(top), sum = 0.0f;
#pragma unroll 4
    for (uint32_t j = at.lane; j < p.vocabulary; j += LANES) sum += exp_f32(x[j] - shift);
    float total = lane_sum(sum);
    if (!at.valid) return;
    if (target < 0 || (uint32_t)target >= p.vocabulary) {
        atomicOr(p.faults, FAULT_CROSS_ENTROPY);
        return;
    }
    if (at.lane == 0) p.losses[at.row] = (shift + log_f32(total)) - x[target];
    if (!p.dlogits) return;
    T *dx = (T *)p.dlogits + at.row * p.vocabulary;
    float factor = p.grad_scale / total;
#pragma unroll 4
    for (uint32_t j = at.lane; j < p.vocabulary; j += LANES) {
        float g = exp_f32(x[j] - shift) * factor;
        dx[j] = from_float<T>(j == (uint32_t)target ? g - p.grad_scale : g);
    }
}
KERNEL(cross_entropy_f32, cross_entropy_params, ROW_THREADS) { cross_entropy<float>(p); }
KERNEL(cross_entropy_bf16, cross_entropy_params, ROW_THREADS) { cross_entropy<bf16>(p); }
