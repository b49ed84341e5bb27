// RMSNorm, LayerNorm and sums over rows, with the bits of cpu/norm.c.
#include "kernel.cuh"

#include "lanes.cuh"
#include "pack.cuh"

#define COLUMN_THREADS 64

__device__ __forceinline__ float weight_at(const void *weight, uint32_t j, int type) {
    if (type == TYPE_F32) return ((const float *)weight)[j];
    if (type == TYPE_BF16) return to_float(((const bf16 *)weight)[j]);
    return to_float(((const f16 *)weight)[j]);
}

// x as type T holds it.
template <class T> __device__ __forceinline__ float rounded(float x) { return to_float(from_float<T>(x)); }

template <class T> __device__ __forceinline__ void rms_norm(const norm_params &p) {
    lane_place at = place_of(p.rows);
    const T *x = (const T *)p.x + at.row * p.cols;
    T *y = (T *)p.y + at.row * p.cols;
    float squares = 0.0f;
#pragma unroll 4
    for (uint32_t j = at.lane; j < p.cols; j += LANES) {
        float v = to_float(x[j]);
        squares = fmaf(v, v, squares);
    }
    float r = 1.0f / sqrtf(lane_sum(squares) / (float)p.cols + p.eps);
    if (!at.valid) return;
    if (at.lane == 0) p.stats[at.row] = r;
#pragma unroll 4
    for (uint32_t j = at.lane; j < p.cols; j += LANES)
        y[j] = from_float<T>(rounded<T>(to_float(x[j]) * r) * weight_at(p.weight, j, p.weight_type));
}
KERNEL(rms_norm_f32, norm_params, ROW_THREADS) { rms_norm<float>(p); }
KERNEL(rms_norm_bf16, norm_params, ROW_THREADS) { rms_norm<bf16>(p); }

template <class T> __device__ __forceinline__ void layer_norm(const norm_params &p) {
    lane_place at = place_of(p.rows);
    const T *x = (const T *)p.x + at.row * p.cols;
    T *y = (T *)p.y + at.row * p.cols;
    float sum = 0.0f, squares = 0.0f;
#pragma unroll 4
    for (uint32_t j = at.lane; j < p.cols; j += LANES) sum += to_float(x[j]);
    float mean = lane_sum(sum) / (float)p.cols;
#pragma unroll 4
    for (uint32_t j = at.lane; j < p.cols; j += LANES) {
        float v = to_float(x[j]) - mean;
        squares = fmaf(v, v, squares);
    }
    float r = 1.0f / sqrtf(lane_sum(squares) / (float)p.cols + p.eps);
    if (!at.valid) return;
    if (at.lane == 0) {
        p.stats[2 * at.row] = mean;
        p.stats[2 * at.row + 1] = r;
    }
#pragma unroll 4
    for (uint32_t j = at.lane; j < p.cols; j += LANES) {
        float v = (to_float(x[j]) - mean) * r * weight_at(p.weight, j, p.weight_type);
        if (p.bias) v += weight_at(p.bias, j, p.weight_type);
        y[j] = from_float<T>(v);
    }
}
KERNEL(layer_norm_f32, norm_params, ROW_THREADS) { layer_norm<float>(p); }
KERNEL(layer_norm_bf16, norm_params, ROW_THREADS) { layer_norm<bf16>(p); }

// Long rows have a block each: all of its threads bring the row to shared memory and write the results, and sixteen sum, from
// there, so that a chain waits for no memory. The bits are those of short rows.
#define LONG_THREADS 128

// f(j) for the packs of a row.
template <class F> __device__ __forceinline__ void each_pack(uint32_t cols, F f) {
    for (uint32_t j = threadIdx.x * PACK; j < cols; j += LONG_THREADS * PACK) f(j, cols - j);
}

// The sums of a row by the half warps of the first warp, each with sum = next(j, sum, half) for its lanes' elements; all
// threads get both.
template <class F> __device__ __forceinline__ void row_sums(float (&sums)[2], uint32_t cols, F next) {
    __syncthreads();
    if (threadIdx.x < 2 * LANES) {
        float sum = 0.0f;
        uint32_t half = threadIdx.x / LANES;
#pragma unroll 8
        for (uint32_t j = threadIdx.x % LANES; j < cols; j += LANES) sum = next(j, sum, half);
        sum = lane_sum(sum);
        if (threadIdx.x % LANES == 0) sums[half] = sum;
    }
    __syncthreads();
}

// RMSNorm, and LayerNorm with a center.
template <class T, bool CENTER> __device__ __forceinline__ void long_norm(const norm_params &p) {
    DYNAMIC_SHARED(memory);
    SHARED(float, sums, 2);
    float *row = (float *)memory; // [cols]
    uint64_t start = (uint64_t)blockIdx.x * p.cols;
    each_pack(p.cols, [&](uint32_t j, uint32_t left) {
        float x[PACK], added[PACK];
        load_pack(x, (const T *)p.x + start + j, left);
        if (p.added) {
            load_pack(added, (const T *)p.added + start + j, left);
#pragma unroll
            for (int i = 0; i < PACK; i++) x[i] = rounded<T>(x[i] + added[i]);
            store_pack((T *)p.sum + start + j, x, left);
        }
        store_pack(row + j, x, left);
    });
    float mean = 0.0f;
    if constexpr (CENTER) {
        row_sums(sums, p.cols, [&](uint32_t j, float sum, uint32_t) { return sum + row[j]; });
        mean = sums[0] / (float)p.cols;
    }
    row_sums(sums, p.cols, [&](uint32_t j, float squares, uint32_t) {
        float v = CENTER ? row[j] - mean : row[j];
        return fmaf(v, v, squares);
    });
    float r = 1.0f / sqrtf(sums[0] / (float)p.cols + p.eps);
    if (threadIdx.x == 0) {
        if (CENTER) p.stats[2 * blockIdx.x] = mean;
        p.stats[CENTER ? 2 * blockIdx.x + 1 : blockIdx.x] = r;
    }
    each_pack(p.cols, [&](uint32_t j, uint32_t left) {
        float x[PACK], w[PACK], bias[PACK] = {};
        load_pack(x, row + j, left);
        load_pack_of(w, p.weight, j, left, p.weight_type);
        if (CENTER && p.bias) load_pack_of(bias, p.bias, j, left, p.weight_type);
#pragma unroll
        for (int i = 0; i < PACK; i++) {
            if (!CENTER) x[i] = rounded<T>(x[i] * r) * w[i];
            else {
                x[i] = (x[i] - mean) * r * w[i];
                if (p.bias) x[i] += bias[i];
            }
        }
        store_pack((T *)p.y + start + j, x, left);
    });
}
KERNEL(rms_norm_long_f32, norm_params, LONG_THREADS) { long_norm<float, false>(p); }
KERNEL(rms_norm_long_bf16, norm_params, LONG_THREADS) { long_norm<bf16, false>(p); }
KERNEL(layer_norm_long_f32, norm_params, LONG_THREADS) { long_norm<float, true>(p); }
KERNEL(layer_norm_long_bf16, norm_params, LONG_THREADS) { long_norm<bf16, true>(p); }

// dx = rstd (g - mean(g) - n mean(g n)) with g = weight dy and n the normalized row; RMSNorm has no mean(g).
template <class T, bool CENTER> __device__ __forceinline__ void norm_dx(const norm_dx_params &p) {
    lane_place at = place_of(p.rows);
    uint64_t start = at.row * p.cols;
    const T *x = (const T *)p.x + start, *dy = (const T *)p.dy + start;
    T *dx = (T *)p.dx + start;
    float mean = CENTER ? p.stats[2 * at.row] : 0.0f, r = CENTER ? p.stats[2 * at.row + 1] : p.stats[at.row];
    float sum = 0.0f, dot = 0.0f;
#pragma unroll 4
    for (uint32_t j = at.lane; j < p.cols; j += LANES) {
        float g = weight_at(p.weight, j, p.weight_type) * to_float(dy[j]);
        sum += g;
        dot = fmaf(g, (to_float(x[j]) - mean) * r, dot);
    }
    float total = lane_sum(sum), mean_g = CENTER ? total / (float)p.cols : 0.0f;
    float mean_gn = lane_sum(dot) / (float)p.cols;
    if (!at.valid) return;
#pragma unroll 4
    for (uint32_t j = at.lane; j < p.cols; j += LANES) {
        float g = weight_at(p.weight, j, p.weight_type) * to_float(dy[j]);
        float n = (to_float(x[j]) - mean) * r;
        float v = fmaf(-n, mean_gn, g - mean_g) * r;
        if (p.accumulate) v = to_float(dx[j]) + v;
        dx[j] = from_float<T>(v);
    }
}
KERNEL(rms_norm_dx_f32, norm_dx_params, ROW_THREADS) { norm_dx<float, false>(p); }
KERNEL(rms_norm_dx_bf16, norm_dx_params, ROW_THREADS) { norm_dx<bf16, false>(p); }
KERNEL(layer_norm_dx_f32, norm_dx_params, ROW_THREADS) { norm_dx<float, true>(p); }
KERNEL(layer_norm_dx_bf16, norm_dx_params, ROW_THREADS) { norm_dx<bf16, true>(p); }

template <class T, bool CENTER> __device__ __forceinline__ void long_norm_dx(const norm_dx_params &p) {
    DYNAMIC_SHARED(memory);
    SHARED(float, sums, 2);
    float *gs = (float *)memory, *ns = gs + (p.cols + PACK - 1) / PACK * PACK; // [cols] each
    uint64_t start = (uint64_t)blockIdx.x * p.cols;
    float mean = CENTER ? p.stats[2 * blockIdx.x] : 0.0f, r = p.stats[CENTER ? 2 * blockIdx.x + 1 : blockIdx.x];
    each_pack(p.cols, [&](uint32_t j, uint32_t left) {
        float g[PACK], n[PACK], w[PACK];
        load_pack(g, (const T *)p.dy + start + j, left);
        load_pack(n, (const T *)p.x + start + j, left);
        load_pack_of(w, p.weight, j, left, p.weight_type);
#pragma unroll
        for (int i = 0; i < PACK; i++) {
            g[i] = w[i] * g[i];
            n[i] = (n[i] - mean) * r;
        }
        store_pack(gs + j, g, left);
        store_pack(ns + j, n, left);
    });
    // Of g, which is the same as with a factor of one, and of g n.
    row_sums(sums, p.cols, [&](uint32_t j, float sum, uint32_t half) { return fmaf(gs[j], half ? ns[j] : 1.0f, sum); });
    float mean_g = CENTER ? sums[0] / (float)p.cols : 0.0f, mean_gn = sums[1] / (float)p.cols;
    each_pack(p.cols, [&](uint32_t j, uint32_t left) {
        float g[PACK], n[PACK], dx[PACK] = {};
        load_pack(g, gs + j, left);
        load_pack(n, ns + j, left);
        if (p.accumulate) load_pack(dx, (const T *)p.dx + start + j, left);
#pragma unroll
        for (int i = 0; i < PACK; i++) {
            float v = fmaf(-n[i], mean_gn, g[i] - mean_g) * r;
            dx[i] = p.accumulate ? dx[i] + v : v;
        }
        store_pack((T *)p.dx + start + j, dx, left);
    });
}
KERNEL(rms_norm_dx_long_f32, norm_dx_params, LONG_THREADS) { long_norm_dx<float, false>(p); }
KERNEL(rms_norm_dx_long_bf16, norm_dx_params, LONG_THREADS) { long_norm_dx<bf16, false>(p); }
KERNEL(layer_norm_dx_long_f32, norm_dx_params, LONG_THREADS) { long_norm_dx<float, true>(p); }
KERNEL(layer_norm_dx_long_bf16, norm_dx_params, LONG_THREADS) { long_norm_dx<bf16, true>(p); }

// Sums over rows: a thread has a column, rows ascending.
__device__ __forceinline__ uint32_t column_of() { return blockIdx.x * COLUMN_THREADS + threadIdx.x; }

template <class T, bool CENTER> __device__ __forceinline__ void norm_dweight(const norm_dweight_params &p) {
    uint32_t j = column_of();
    if (j >= p.cols) return;
    float sum = p.dweight[j];
#pragma unroll 4
    for (uint64_t i = 0; i < p.rows; i++) {
        float x = to_float(((const T *)p.x)[i * p.cols + j]), dy = to_float(((const T *)p.dy)[i * p.cols + j]);
        float n = CENTER ? (x - p.stats[2 * i]) * p.stats[2 * i + 1] : rounded<T>(x * p.stats[i]);
        sum = fmaf(dy, n, sum);
    }
    p.dweight[j] = sum;
}
KERNEL(rms_norm_dweight_f32, norm_dweight_params, COLUMN_THREADS) { norm_dweight<float, false>(p); }
KERNEL(rms_norm_dweight_bf16, norm_dweight_params, COLUMN_THREADS) { norm_dweight<bf16, false>(p); }
KERNEL(layer_norm_dweight_f32, norm_dweight_params, COLUMN_THREADS) { norm_dweight<float, true>(p); }
KERNEL(layer_norm_dweight_bf16, norm_dweight_params, COLUMN_THREADS) { norm_dweight<bf16, true>(p); }

template <class T, bool PRODUCT> __device__ __forceinline__ void column_sums(const column_sums_params &p) {
    uint32_t j = column_of();
    if (j >= p.cols) return;
    float sum = p.out[j];
#pragma unroll 4
    for (uint64_t i = 0; i < p.rows; i++) {
        float a = to_float(((const T *)p.a)[i * p.cols + j]);
        sum = PRODUCT ? fmaf(a, to_float(((const T *)p.b)[i * p.cols + j]), sum) : sum + a;
    }
    p.out[j] = sum;
}
KERNEL(column_sums_f32, column_sums_params, COLUMN_THREADS) { column_sums<float, false>(p); }
KERNEL(column_sums_bf16, column_sums_params, COLUMN_THREADS) { column_sums<bf16, false>(p); }
KERNEL(column_products_f32, column_sums_params, COLUMN_THREADS) { column_sums<float, true>(p); }
KERNEL(column_products_bf16, column_sums_params, COLUMN_THREADS) { column_sums<bf16, true>(p); }

template <class T> __device__ __forceinline__ void scale_columns(const scale_columns_params &p) {
    uint64_t i = pack_start();
    if (i >= p.n) return;
    float x[PACK];
    load_pack(x, (const T *)p.x + i, p.n - i);
    uint32_t col = (uint32_t)(i % p.cols);
#pragma unroll
    for (int j = 0; j < PACK; j++) {
        x[j] = p.bias ? fmaf(x[j], p.factors[col], p.bias[col]) : x[j] * p.factors[col];
        col = col + 1 == p.cols ? 0 : col + 1;
    }
    store_pack((T *)p.out + i, x, p.n - i);
}
KERNEL(scale_columns_f32, scale_columns_params, ELEMENT_THREADS) { scale_columns<float>(p); }
KERNEL(scale_columns_bf16, scale_columns_params, ELEMENT_THREADS) { scale_columns<bf16>(p); }

KERNEL(sum_squares, sum_squares_params, ROW_THREADS) {
    lane_place at = place_of((p.n + SUM_BLOCK - 1) / SUM_BLOCK);
    uint64_t start = at.row * SUM_BLOCK, left = p.n - start;
    uint32_t count = left < SUM_BLOCK ? (uint32_t)left : SUM_BLOCK;
    float sum = 0.0f;
#pragma unroll 4
    for (uint32_t j = at.lane; j < count; j += LANES) {
        float v = p.x[start + j];
        sum = fmaf(v, v, sum);
    }
    sum = lane_sum(sum);
    if (at.valid && at.lane == 0) p.sums[at.row] = sum;
}
