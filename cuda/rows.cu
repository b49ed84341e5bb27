// Moving rows and columns: embedding lookup and its gradient, parts of fused projections.
#include "kernel.cuh"

#include "pack.cuh"

#define COLUMN_THREADS 64

// A thread takes a pack of a row's columns.
template <class From, class T> __device__ __forceinline__ void gather_rows(const gather_rows_params &p) {
    uint64_t per_row = (p.cols + PACK - 1) / PACK, i = (uint64_t)blockIdx.x * ELEMENT_THREADS + threadIdx.x;
    if (i >= p.n * per_row) return;
    uint64_t row = i / per_row, col = i % per_row * PACK, left = p.cols - col;
    int32_t index = p.indices[row];
    if (index < 0 || (uint64_t)index >= p.x_rows) {
        atomicOr(p.faults, FAULT_GATHER_ROWS);
        return;
    }
    float x[PACK];
    load_pack(x, (const From *)p.x + (uint64_t)index * p.cols + col, left);
    store_pack((T *)p.out + row * p.cols + col, x, left);
}
#define GATHER_KERNEL(from, From, to, T) \
    KERNEL(gather_rows_##from##_##to, gather_rows_params, ELEMENT_THREADS) { gather_rows<From, T>(p); }
GATHER_KERNEL(f32, float, f32, float)
GATHER_KERNEL(f32, float, bf16, bf16)
GATHER_KERNEL(f32, float, f16, f16)
GATHER_KERNEL(bf16, bf16, f32, float)
GATHER_KERNEL(bf16, bf16, bf16, bf16)
GATHER_KERNEL(bf16, bf16, f16, f16)
GATHER_KERNEL(f16, f16, f32, float)
GATHER_KERNEL(f16, f16, bf16, bf16)
GATHER_KERNEL(f16, f16, f16, f16)

// A thread has a column and takes the rows in order, as equal indices are added to one row.
template <class From, class T> __device__ __forceinline__ void scatter_add_rows(const scatter_add_rows_params &p) {
    uint32_t j = blockIdx.x * COLUMN_THREADS + threadIdx.x;
    if (j >= p.cols) return;
    for (uint64_t i = 0; i < p.n; i++) {
        int32_t index = p.indices[i];
        if (index < 0 || (uint64_t)index >= p.out_rows) {
            atomicOr(p.faults, FAULT_SCATTER_ADD_ROWS);
            continue;
        }
        T *to = (T *)p.out + (uint64_t)index * p.cols + j;
        *to = from_float<T>(to_float(*to) + to_float(((const From *)p.x)[i * p.cols + j]));
    }
}
#define SCATTER_KERNEL(from, From, to, T) \
    KERNEL(scatter_add_rows_##from##_##to, scatter_add_rows_params, COLUMN_THREADS) { scatter_add_rows<From, T>(p); }
SCATTER_KERNEL(f32, float, f32, float)
SCATTER_KERNEL(bf16, bf16, bf16, bf16)
SCATTER_KERNEL(bf16, bf16, f32, float)

template <class T> __device__ __forceinline__ void copy_columns(const copy_columns_params &p) {
    uint64_t per_row = (p.cols + PACK - 1) / PACK, i = (uint64_t)blockIdx.x * ELEMENT_THREADS + threadIdx.x;
    if (i >= p.rows * per_row) return;
    uint64_t row = i / per_row, col = i % per_row * PACK, left = p.cols - col;
    T *to = (T *)p.out + row * p.out_cols + p.out_col + col;
    float x[PACK];
    load_pack(x, (const T *)p.x + row * p.x_cols + p.x_col + col, left);
    if (p.accumulate) {
        float y[PACK];
        load_pack(y, (const T *)to, left);
#pragma unroll
        for (int j = 0; j < PACK; j++) x[j] = y[j] + x[j];
    }
    store_pack(to, x, left);
}
KERNEL(copy_columns_f32, copy_columns_params, ELEMENT_THREADS) { copy_columns<float>(p); }
KERNEL(copy_columns_bf16, copy_columns_params, ELEMENT_THREADS) { copy_columns<bf16>(p); }
