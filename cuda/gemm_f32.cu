// Matrix products in f32 arithmetic, with the CPU's bits: one accumulator an element, k ascending, fused.
#include "gemm.cuh"

#define TILE 64  // rows and columns of a block's result
#define DEPTH 16 // of the contraction at a time
#define SIDE 4   // rows and columns of a thread's result
#define THREADS ((TILE / SIDE) * (TILE / SIDE))
#define STRIDE (TILE + 4)

// x[k][row] for TILE rows and DEPTH of k; elements outside are not written.
__device__ __forceinline__ void load_tile(float *x, const gemm_operand &o, const quantized_matrix &q, bool k_major,
                                          uint64_t first_row, uint64_t rows, uint64_t first_k, uint64_t depth) {
#pragma unroll
    for (int i = 0; i < TILE * DEPTH / THREADS; i++) {
        unsigned index = threadIdx.x + i * THREADS;
        unsigned r = k_major ? index / DEPTH : index % TILE, k = k_major ? index % DEPTH : index / TILE;
        uint64_t row = first_row + r, at = first_k + k;
        if (row < rows && at < depth)
            x[k * STRIDE + r] = stored_element(o, q, k_major ? row : at, k_major ? at : row);
    }
}

template <class Out> __device__ __forceinline__ float initial(const gemm_problem &problem, uint64_t row, uint64_t column) {
    if (!problem.accumulate || row >= problem.m || column >= problem.n) return 0.0f;
    return to_float(((const Out *)problem.out)[row * problem.n + column]);
}

template <class Out>
__device__ __forceinline__ void finish(const gemm_problem &problem, uint64_t row, uint64_t column, float sum) {
    if (row >= problem.m || column >= problem.n) return;
    float x = problem.scale * sum;
    if (problem.bias != nullptr) {
        gemm_operand bias = {problem.bias, 0, problem.bias_type, 0};
        x = x + stored_element(bias, problem.terms[0].quantized, 0, column);
    }
    ((Out *)problem.out)[row * problem.n + column] = from_float<Out>(x);
}

KERNEL(gemm_f32, gemm_params, THREADS, 2) {
    SHARED(float, a, DEPTH * STRIDE);
    SHARED(float, b, DEPTH * STRIDE);
    Place place = Place::of(p, TILE, TILE);
    const gemm_problem &problem = place.problem;
    // A thread's rows and columns lie TILE / SIDE apart, so that a warp's reads and writes are of neighbours.
    unsigned r = threadIdx.x / (TILE / SIDE), c = threadIdx.x % (TILE / SIDE);
    auto row_of = [&](int i) { return place.row + r + i * (TILE / SIDE); };
    auto column_of = [&](int j) { return place.column + c + j * (TILE / SIDE); };
    bool f32 = problem.out_type == TYPE_F32;
    float sum[SIDE][SIDE];
#pragma unroll
    for (int i = 0; i < SIDE; i++)
#pragma unroll
        for (int j = 0; j < SIDE; j++)
            sum[i][j] = f32 ? initial<float>(problem, row_of(i), column_of(j)) : initial<bf16>(problem, row_of(i), column_of(j));
    for (unsigned t = 0; t < problem.n_terms; t++) {
        const gemm_term &term = problem.terms[t];
        for (uint64_t k = 0; k < term.k; k += DEPTH) {
            load_tile(a, term.a, term.quantized, !term.a.transposed, place.row, problem.m, k, term.k);
            load_tile(b, term.b, term.quantized, term.b.transposed, place.column, problem.n, k, term.k);
            __syncthreads();
            // Not beyond the end: adding a product of zeros would make a zero of -0.
            unsigned depth = (unsigned)min(term.k - k, (uint64_t)DEPTH);
            for (unsigned l = 0; l < depth; l++) {
                float x[SIDE], w[SIDE];
#pragma unroll
                for (int i = 0; i < SIDE; i++) x[i] = a[l * STRIDE + r + i * (TILE / SIDE)];
#pragma unroll
                for (int j = 0; j < SIDE; j++) w[j] = b[l * STRIDE + c + j * (TILE / SIDE)];
#pragma unroll
                for (int i = 0; i < SIDE; i++)
#pragma unroll
                    for (int j = 0; j < SIDE; j++) sum[i][j] = fmaf(x[i], w[j], sum[i][j]);
            }
            __syncthreads();
        }
    }
#pragma unroll
    for (int i = 0; i < SIDE; i++)
#pragma unroll
        for (int j = 0; j < SIDE; j++) {
            if (f32) finish<float>(problem, row_of(i), column_of(j), sum[i][j]);
            else finish<bf16>(problem, row_of(i), column_of(j), sum[i][j]);
        }
}
