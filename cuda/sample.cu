// Choosing tokens by their scores, with the bits of src/backend/sampling.rs.
#include "kernel.cuh"

#include "math.cuh"

#define SAMPLE_THREADS 512
#define WEIGHT_THREADS 256
#define GROUP 64 // of weights that are added up first, and of such sums

__device__ __forceinline__ float warp_most(float x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}

// The block's least number, by way of `parts`, which has room for one of each warp.
__device__ __forceinline__ uint32_t block_least(uint32_t x, uint32_t *parts) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
        uint32_t other = __shfl_xor_sync(0xffffffffu, x, d);
        x = other < x ? other : x;
    }
    if (lane_index() == 0) parts[warp_index()] = x;
    __syncthreads();
    x = parts[0];
    for (int w = 1; w < SAMPLE_THREADS / 32; w++) x = parts[w] < x ? parts[w] : x;
    __syncthreads();
    return x;
}

// A block has a row: penalties, and the likeliest token, which is the row's if it is greedy.
KERNEL(sample_prepare, sample_params, SAMPLE_THREADS) {
    SHARED(uint32_t, parts, SAMPLE_THREADS / 32);
    SHARED(float, tops, SAMPLE_THREADS / 32);
    const sample_row &row = p.rows[blockIdx.x];
    float *scores = p.scores + (uint64_t)blockIdx.x * p.vocabulary;
    for (uint32_t i = threadIdx.x; i < row.n_seen; i += SAMPLE_THREADS) {
        uint32_t id = p.ids[row.first_id + i];
        if (id >= p.vocabulary) continue;
        float score = scores[id];
        scores[id] = score < 0.0f ? score * row.penalty : score / row.penalty;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < row.n_banned; i += SAMPLE_THREADS) {
        uint32_t id = p.ids[row.first_id + row.n_seen + i];
        if (id < p.vocabulary) scores[id] = -INFINITY;
    }
    __syncthreads();
    float top = -INFINITY;
    uint32_t numbers = 1; // 0: some is not a number
    for (uint32_t id = threadIdx.x; id < p.vocabulary; id += SAMPLE_THREADS) {
        numbers = scores[id] == scores[id] ? numbers : 0;
        top = fmaxf(top, scores[id]);
    }
    top = warp_most(top);
    if (lane_index() == 0) tops[warp_index()] = top;
    numbers = block_least(numbers, parts);
    for (int w = 0; w < SAMPLE_THREADS / 32; w++) top = fmaxf(top, tops[w]);
    uint32_t best = SAMPLE_NONE;
    for (uint32_t id = threadIdx.x; id < p.vocabulary; id += SAMPLE_THREADS)
        if (scores[id] == top && best == SAMPLE_NONE) best = id;
    best = block_least(best, parts);
    if (threadIdx.x == 0) {
        p.tops[blockIdx.x] = top;
        p.tokens[blockIdx.x] = numbers ? best : SAMPLE_NONE;
    }
}

// Weights of the tokens of rows that are not greedy.
KERNEL(sample_weights, sample_params, WEIGHT_THREADS) {
    uint32_t id = blockIdx.x * WEIGHT_THREADS + threadIdx.x;
    float temperature = p.rows[blockIdx.y].temperature;
    if (id >= p.vocabulary || temperature == 0.0f) return;
    uint64_t i = (uint64_t)blockIdx.y * p.vocabulary + id;
    p.weights[i] = exp_f64(((double)p.scores[i] - (double)p.tops[blockIdx.y]) / (double)temperature);
}

// The place of a token among all, the best first: by score, then by number.
__device__ __forceinline__ uint64_t rank_key(float score, uint32_t id) {
    uint32_t u = __float_as_uint(score);
    uint32_t ascending = u >> 31 ? ~u : u | 0x80000000u;
    return (uint64_t)~ascending << 32 | id;
}

// A row's weights, of those tokens whose key is at most `cutoff`.
struct Weights {
    const float *scores;
    const double *weights;
    double *blocks, *groups; // sums of 64 weights, and of 64 of those
    uint32_t n, n_blocks, n_groups;
    uint64_t cutoff;

    __device__ __forceinline__ double at(uint32_t id) const {
        return rank_key(scores[id], id) <= cutoff ? weights[id] : 0.0;
    }

    // Their sum: of 64 each, of 64 such sums each, and of those, ascending. All threads get it.
    __device__ __forceinline__ double sum(double *total) const {
        for (uint32_t b = threadIdx.x; b < n_blocks; b += SAMPLE_THREADS) {
            double s = 0.0;
            for (uint32_t id = b * GROUP; id < n && id < (b + 1) * GROUP; id++) s += at(id);
            blocks[b] = s;
        }
        __syncthreads();
        for (uint32_t g = threadIdx.x; g < n_groups; g += SAMPLE_THREADS) {
            double s = 0.0;
            for (uint32_t b = g * GROUP; b < n_blocks && b < (g + 1) * GROUP; b++) s += blocks[b];
            groups[g] = s;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            double s = 0.0;
            for (uint32_t g = 0; g < n_groups; g++) s += groups[g];
            *total = s;
        }
        __syncthreads();
        double s = *total;
        __syncthreads();
        return s;
    }

    // The first token with which the weights so far exceed `target`, by the sums of the last `sum`.
    __device__ __forceinline__ uint32_t draw(double target, uint32_t best) const {
        double before = 0.0, in_group = 0.0, inside = 0.0;
        uint32_t g = 0;
        for (; g < n_groups && !(before + groups[g] > target); g++) before += groups[g];
        uint32_t b = g * GROUP, last = b + GROUP < n_blocks ? b + GROUP : n_blocks;
        for (; b < last && !(before + (in_group + blocks[b]) > target); b++) in_group += blocks[b];
        if (b < last) {
            for (uint32_t id = b * GROUP; id < n && id < (b + 1) * GROUP; id++) {
                inside += at(id);
                if (before + (in_group + inside) > target) return id;
            }
        }
        for (uint32_t id = n; id-- > 0;)
            if (at(id) > 0.0) return id;
        return best;
    }
};

// How many tokens have keys up to `cutoff`; all threads get it.
__device__ __forceinline__ uint32_t count_up_to(const Weights &w, uint64_t cutoff, uint32_t *parts) {
    uint32_t count = 0;
    for (uint32_t id = threadIdx.x; id < w.n; id += SAMPLE_THREADS) count += rank_key(w.scores[id], id) <= cutoff;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) count += __shfl_xor_sync(0xffffffffu, count, d);
    if (lane_index() == 0) parts[warp_index()] = count;
    __syncthreads();
    count = 0;
    for (int i = 0; i < SAMPLE_THREADS / 32; i++) count += parts[i];
    __syncthreads();
    return count;
}

// A block has a row that is not greedy: top-k, top-p, and the draw.
KERNEL(sample_choose, sample_params, SAMPLE_THREADS) {
    SHARED(uint32_t, parts, SAMPLE_THREADS / 32);
    SHARED(double, total, 1);
    const sample_row &row = p.rows[blockIdx.x];
    uint32_t best = p.tokens[blockIdx.x];
    if (row.temperature == 0.0f || best == SAMPLE_NONE) return; // of a whole block
    Weights w;
    w.n = p.vocabulary;
    w.n_blocks = (w.n + GROUP - 1) / GROUP;
    w.n_groups = (w.n_blocks + GROUP - 1) / GROUP;
    w.scores = p.scores + (uint64_t)blockIdx.x * w.n;
    w.weights = p.weights + (uint64_t)blockIdx.x * w.n;
    w.blocks = p.sums + (uint64_t)blockIdx.x * (w.n_blocks + w.n_groups);
    w.groups = w.blocks + w.n_blocks;
    w.cutoff = ~0ull;
    if (row.top_k > 0 && row.top_k < w.n) {
        uint64_t low = 0, high = ~0ull;
        while (low < high) {
            uint64_t middle = low + (high - low) / 2;
            if (count_up_to(w, middle, parts) >= row.top_k) high = middle;
            else low = middle + 1;
        }
        w.cutoff = low;
    }
    double all = w.sum(total);
    if (row.top_p < 1.0f) {
        uint64_t low = 0, high = w.cutoff;
        while (low < high) {
            w.cutoff = low + (high - low) / 2;
            if (w.sum(total) / all >= (double)row.top_p) high = w.cutoff;
            else low = w.cutoff + 1;
        }
        w.cutoff = low;
        all = w.sum(total);
    }
    if (threadIdx.x == 0) p.tokens[blockIdx.x] = w.draw((double)row.uniform * all, best);
}
