// Softmax cross-entropy and its gradient: of whole rows of logits, with the bits of cpu/cross_entropy.c, and of the
// columns of a vocabulary part by part, where logits of all of it are never in memory.
#include "gemm.cuh"
#include "lanes.cuh"
#include "math.cuh"

#define MINUS_INFINITY __uint_as_float(0xff800000u)

template <class T> __device__ __forceinline__ void cross_entropy(const cross_entropy_params &p) {
    lane_place at = place_of(p.rows);
    const float *x = p.logits + at.row * p.vocabulary;
    int32_t target = p.targets[at.row];
    float top = MINUS_INFINITY;
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

// ---- by parts of the vocabulary ----
// With m the largest logit so far, s = sum of exp(logit - m) and z = sum of exp(logit - m) W[token] over all tokens but the
// target go from part to part, s and z times exp(old m - new m) where m grows. In the end the loss is m + log s - logit[target]
// and the gradient z / s + (exp(logit[target] - m) / s - 1) W[target]. The target stays out of z since its two parts
// all but cancel where it is likely.

#define PART_THREADS 256

// One value of all threads of a block, in an order that is always the same.
template <class Join> __device__ __forceinline__ float block_join(float x, float *of_warps, Join join) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x = join(x, __shfl_xor_sync(0xffffffffu, x, d));
    if (lane_index() == 0) of_warps[warp_index()] = x;
    __syncthreads();
    x = of_warps[0];
#pragma unroll
    for (int i = 1; i < PART_THREADS / 32; i++) x = join(x, of_warps[i]);
    return x;
}

__device__ __forceinline__ float capped(float x, float cap) { return cap == 0.0f ? x : cap * tanh_f32(x / cap); }

// The derivative of the cap where it gave y.
__device__ __forceinline__ float slope_of_cap(float y, float cap) {
    float t = cap == 0.0f ? 0.0f : y / cap;
    return 1.0f - t * t;
}

template <class T> __device__ __forceinline__ void cross_entropy_columns(const cross_entropy_columns_params &p) {
    SHARED(float, tops, PART_THREADS / 32);
    SHARED(float, totals, PART_THREADS / 32);
    uint64_t row = blockIdx.x;
    const float *x = p.logits + row * p.columns;
    int64_t target = (int64_t)p.targets[row] - p.first;
    cross_entropy_stats before = {MINUS_INFINITY, 0.0f, 0.0f};
    if (p.first > 0) before = p.stats[row];

    // The cap changes no order, so the largest is looked for before it.
    auto larger = [](float a, float b) { return b > a ? b : a; };
    float largest = MINUS_INFINITY;
    for (uint32_t j = threadIdx.x * PACK; j < p.columns; j += PART_THREADS * PACK) {
        float v[PACK];
        load_pack(v, x + j, p.columns - j);
#pragma unroll
        for (int i = 0; i < PACK; i++)
            if (i < (int64_t)p.columns - j) largest = larger(largest, v[i]);
    }
    float top = larger(before.top, capped(block_join(largest, tops, larger), p.softcap));
    float shift = top == MINUS_INFINITY ? 0.0f : top; // so far all are

    float sum = 0.0f;
    T *weights = p.weights ? (T *)p.weights + row * p.columns : nullptr;
    for (uint32_t j = threadIdx.x * PACK; j < p.columns; j += PART_THREADS * PACK) {
        float v[PACK];
        load_pack(v, x + j, p.columns - j);
#pragma unroll
        for (int i = 0; i < PACK; i++) {
            float y = capped(v[i], p.softcap), e = exp_f32(y - shift);
            if (i < (int64_t)p.columns - j) sum += e;
            v[i] = j + i == target ? 0.0f : e * slope_of_cap(y, p.softcap);
        }
        if (weights) store_pack(weights + j, v, p.columns - j);
    }
    float factor = exp_f32(before.top - shift), total = block_join(sum, totals, [](float a, float b) { return a + b; });
    if (threadIdx.x == 0) {
        bool here = target >= 0 && target < p.columns;
        p.stats[row] = {top, before.sum * factor + total, here ? capped(x[target], p.softcap) : before.target};
    }
    if (!p.sums || p.first == 0 || factor == 1.0f) return;
    float *sums = p.sums + row * p.hidden;
    for (uint32_t j = threadIdx.x * PACK; j < p.hidden; j += PART_THREADS * PACK) {
        float v[PACK];
        load_pack(v, sums + j, p.hidden - j);
#pragma unroll
        for (int i = 0; i < PACK; i++) v[i] *= factor;
        store_pack(sums + j, v, p.hidden - j);
    }
}
KERNEL(cross_entropy_columns_f32, cross_entropy_columns_params, PART_THREADS) { cross_entropy_columns<float>(p); }
KERNEL(cross_entropy_columns_bf16, cross_entropy_columns_params, PART_THREADS) { cross_entropy_columns<bf16>(p); }

template <class T> __device__ __forceinline__ void cross_entropy_finish(const cross_entropy_finish_params &p) {
    uint64_t row = blockIdx.x;
    int32_t target = p.targets[row];
    if (target < 0 || (uint32_t)target >= p.vocabulary) {
        if (threadIdx.x == 0) atomicOr(p.faults, FAULT_CROSS_ENTROPY);
        return;
    }
    cross_entropy_stats stats = p.stats[row];
    if (threadIdx.x == 0) p.losses[row] = (stats.top + log_f32(stats.sum)) - stats.target;
    if (!p.dx) return;
    float factor = p.grad_scale / stats.sum;
    float own = (exp_f32(stats.target - stats.top) * factor - p.grad_scale) * slope_of_cap(stats.target, p.softcap);
    T *dx = (T *)p.dx + row * p.hidden;
    const float *sums = p.sums + row * p.hidden;
    for (uint32_t j = threadIdx.x; j < p.hidden; j += PART_THREADS)
        dx[j] = from_float<T>(fmaf(own, stored_element(p.head, p.quantized, target, j), sums[j] * factor));
}
KERNEL(cross_entropy_finish_f32, cross_entropy_finish_params, PART_THREADS) { cross_entropy_finish<float>(p); }
KERNEL(cross_entropy_finish_bf16, cross_entropy_finish_params, PART_THREADS) { cross_entropy_finish<bf16>(p); }
