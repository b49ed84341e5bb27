// One step of an optimizer over flat parameters, with the bits of cpu/optimizer.c.
#include "kernel.cuh"

#include "pack.cuh"

// Whether nothing must change, as this step or one before it was not finite.
__device__ __forceinline__ bool is_forbidden(const optimizer_params &p) { return p.verdict && p.verdict[0] != 0.0f; }

__device__ __forceinline__ float grad_scale_of(const optimizer_params &p) {
    return p.verdict ? p.verdict[2] : p.grad_scale;
}

// AdamW on one element; the gradient is scaled already.
__device__ __forceinline__ float adamw_element(const optimizer_params &s, float p, float g, float &m, float &v) {
    p *= s.decay;
    m = fmaf(s.beta1, m, s.one_minus_beta1 * g);
    v = fmaf(s.beta2, v, s.one_minus_beta2 * g * g);
    float denominator = sqrtf(v) / s.bias_correction2_sqrt + s.epsilon;
    return fmaf(-s.step_size, m / denominator, p);
}

#define LOAD(name, from) \
    float name[PACK];    \
    load_pack(name, (const float *)(from) + i, left)
#define EACH(j) _Pragma("unroll") for (int j = 0; j < PACK; j++)

// One block. Threads that find the same write the same.
KERNEL(judge_losses, judge_losses_params, ELEMENT_THREADS) {
    bool is_finite = true;
    for (uint64_t i = threadIdx.x; i < p.n; i += ELEMENT_THREADS) is_finite = is_finite && p.losses[i] - p.losses[i] == 0.0f;
    if (!is_finite && p.verdict[0] == 0.0f) {
        p.verdict[1] = 1.0f;
        p.verdict[0] = p.step;
    }
}

// One block, whose first thread adds in the host's order, with the arithmetic of clip_scale in src/optim/optimizer.rs.
KERNEL(judge_gradients, judge_gradients_params, ELEMENT_THREADS) {
    SHARED(float, sums, ELEMENT_THREADS);
    double squares = 0.0;
    for (uint64_t start = 0; start < p.n; start += ELEMENT_THREADS) {
        uint64_t left = p.n - start;
        if (threadIdx.x < left) sums[threadIdx.x] = p.sums[start + threadIdx.x];
        __syncthreads();
        if (threadIdx.x == 0)
            for (uint32_t i = 0; i < ELEMENT_THREADS && i < left; i++) squares += (double)sums[i];
        __syncthreads();
    }
    if (threadIdx.x != 0) return;
    double norm = sqrt(squares), scale = p.max_grad_norm / (norm + 1e-6);
    p.verdict[2] = (float)(scale < 1.0 ? scale : 1.0);
    if (!(norm - norm == 0.0) && p.verdict[0] == 0.0f) p.verdict[0] = p.step;
}

KERNEL(adamw, optimizer_params, ELEMENT_THREADS) {
    uint64_t i = pack_start(), left = p.n - i;
    if (i >= p.n || is_forbidden(p)) return;
    LOAD(x, p.p);
    LOAD(g, p.g);
    LOAD(m, p.m);
    LOAD(v, p.v);
    float grad_scale = grad_scale_of(p);
    EACH(j) x[j] = adamw_element(p, x[j], g[j] * grad_scale, m[j], v[j]);
    store_pack(p.p + i, x, left);
    store_pack(p.m + i, m, left);
    store_pack(p.v + i, v, left);
}

KERNEL(lion, optimizer_params, ELEMENT_THREADS) {
    uint64_t i = pack_start(), left = p.n - i;
    if (i >= p.n || is_forbidden(p)) return;
    LOAD(x, p.p);
    LOAD(g, p.g);
    LOAD(m, p.m);
    float grad_scale = grad_scale_of(p);
    EACH(j) {
        float gj = g[j] * grad_scale, u = fmaf(p.beta1, m[j], p.one_minus_beta1 * gj);
        x[j] = x[j] * p.decay - (0.0f < u ? p.step_size : u < 0.0f ? -p.step_size : 0.0f);
        m[j] = fmaf(p.beta2, m[j], p.one_minus_beta2 * gj);
    }
    store_pack(p.p + i, x, left);
    store_pack(p.m + i, m, left);
}

KERNEL(sgd, optimizer_params, ELEMENT_THREADS) {
    uint64_t i = pack_start(), left = p.n - i;
    if (i >= p.n || is_forbidden(p)) return;
    LOAD(x, p.p);
    LOAD(g, p.g);
    float grad_scale = grad_scale_of(p);
    EACH(j) {
        float gj = fmaf(p.weight_decay, x[j], g[j] * grad_scale);
        x[j] = fmaf(-p.step_size, gj, x[j]);
    }
    store_pack(p.p + i, x, left);
}

#define MOMENTS_BLOCK 256

// The number of midpoints below x: the nearest code, ties to the lower.
__device__ __forceinline__ uint32_t nearest_code(const float *midpoints, float x) {
    uint32_t code = 0;
#pragma unroll
    for (uint32_t half = MOMENTS_BLOCK / 2; half > 0; half /= 2) code = midpoints[code + half - 1] < x ? code + half : code;
    return code;
}

// The largest of the block's numbers, which are not negative; `warp_most` has room for one of each warp.
__device__ __forceinline__ float block_max(float x, float *warp_most) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    if (threadIdx.x % 32 == 0) warp_most[threadIdx.x / 32] = x;
    __syncthreads();
    x = warp_most[0];
#pragma unroll
    for (int w = 1; w < MOMENTS_BLOCK / 32; w++) x = fmaxf(x, warp_most[w]);
    return x;
}

// A block of threads has a block of elements.
KERNEL(adamw_8bit, adamw_8bit_params, MOMENTS_BLOCK) {
    SHARED(float, m_most, MOMENTS_BLOCK / 32);
    SHARED(float, v_most, MOMENTS_BLOCK / 32);
    uint64_t i = (uint64_t)blockIdx.x * MOMENTS_BLOCK + threadIdx.x;
    if (is_forbidden(p.step)) return; // all threads
    bool valid = i < p.step.n;
    float m = 0.0f, v = 0.0f;
    if (valid) {
        m = p.m_map[p.m[i]] * p.m_absmax[blockIdx.x];
        v = p.v_map[p.v[i]] * p.v_absmax[blockIdx.x];
        p.step.p[i] = adamw_element(p.step, p.step.p[i], p.step.g[i] * grad_scale_of(p.step), m, v);
    }
    float m_absmax = block_max(fabsf(m), m_most), v_absmax = block_max(v, v_most);
    if (valid) {
        p.m[i] = (uint8_t)nearest_code(p.m_midpoints, m * (1.0f / (m_absmax > 1e-38f ? m_absmax : 1e-38f)));
        p.v[i] = (uint8_t)nearest_code(p.v_midpoints, v * (1.0f / (v_absmax > 1e-38f ? v_absmax : 1e-38f)));
    }
    if (threadIdx.x == 0) {
        p.m_absmax[blockIdx.x] = m_absmax;
        p.v_absmax[blockIdx.x] = v_absmax;
    }
}
