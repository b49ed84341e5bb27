// What the kernels of matrix products share: which part of which product a block computes, the order of sums, tables,
// single elements of any operand, and how results are written.
#ifndef LOWRANK_GEMM_CUH
#define LOWRANK_GEMM_CUH

#include "decode.cuh"
#include "pack.cuh"
#include "tile.cuh"

// Neighbouring blocks take this many tiles of columns, then the next tile of rows, so that those that run at the same
// time share operands in L2.
#define COLUMNS_TOGETHER 8

// The tile of a block.
struct Place {
    const gemm_problem &problem;
    uint64_t row, column; // of its first element

    // Tile `number` of all problems, in an order in which neighbours share operands.
    static __device__ __forceinline__ Place at(const gemm_params &p, unsigned number, unsigned tile_rows,
                                               unsigned tile_columns) {
        unsigned index = 0;
        while (index + 1 < p.n_problems && number >= p.problems[index + 1].first_block) index++;
        const gemm_problem &problem = p.problems[index];
        unsigned block = number - problem.first_block;
        unsigned rows = (problem.m + tile_rows - 1) / tile_rows;
        unsigned columns = (problem.n + tile_columns - 1) / tile_columns;
        unsigned band = block / (COLUMNS_TOGETHER * rows), inside = block % (COLUMNS_TOGETHER * rows);
        unsigned width = min(columns - band * COLUMNS_TOGETHER, (unsigned)COLUMNS_TOGETHER);
        return {problem, (uint64_t)(inside / width) * tile_rows,
                (uint64_t)(band * COLUMNS_TOGETHER + inside % width) * tile_columns};
    }
    static __device__ __forceinline__ Place of(const gemm_params &p, unsigned tile_rows, unsigned tile_columns) {
        return at(p, blockIdx.x, tile_rows, tile_columns);
    }
};

__device__ __forceinline__ unsigned tiles_of(const gemm_term &term) { return (unsigned)((term.k + TILE_K - 1) / TILE_K); }

// Where tile `index` of all terms is.
struct Cursor {
    const gemm_problem &problem;
    unsigned term, k;

    __device__ __forceinline__ const gemm_term &here() const { return problem.terms[term]; }
    __device__ __forceinline__ void advance() {
        k += TILE_K;
        if (k >= here().k) term++, k = 0;
    }
};

__device__ __forceinline__ Cursor cursor_at(const gemm_problem &problem, unsigned index) {
    unsigned term = 0;
    while (term < problem.n_terms && index >= tiles_of(problem.terms[term])) index -= tiles_of(problem.terms[term++]);
    return {problem, term, index * TILE_K};
}

// The order of a sum in bf16 arithmetic is one for all kernels, so that an element's bits depend neither on the size of
// the result nor on where operands lie. The tiles of TILE_K of all terms, one after the other, are cut into four parts, as
// equal as whole tiles allow. A part is a chain of mma of 16 k each, ascending, from zero; the columns of the result are
// mma's rows. The result is ((part 0 + part 1) + part 2) + part 3.
//
// Results of few rows have their parts computed side by side, as one chain of dependent mma through a long contraction
// takes longer than reading the weights; large ones compute them in turn.
#define PARTS 4
struct Parts {
    unsigned tiles;

    __device__ __forceinline__ Parts(const gemm_problem &problem) : tiles(0) {
        for (unsigned i = 0; i < problem.n_terms; i++) tiles += tiles_of(problem.terms[i]);
    }
    __device__ __forceinline__ unsigned begin(unsigned part) const { return (unsigned)((uint64_t)part * tiles / PARTS); }
    // The end of the part that holds a tile; others may be empty.
    __device__ __forceinline__ unsigned end_of(unsigned tile) const {
        unsigned part = 1;
        while (begin(part) <= tile && part < PARTS) part++;
        return begin(part);
    }
};

// Fills the tables for decoding in shared memory, of pairs and the nested map; thread `thread` of `threads`.
__device__ __forceinline__ void fill_tables(float2 *pairs, float *map, unsigned pair_copies, const gemm_problem &problem,
                                            unsigned thread, unsigned threads) {
    for (unsigned i = 0; i < problem.n_terms; i++) {
        const quantized_matrix &q = problem.terms[i].quantized;
        if (problem.terms[i].b.type != TYPE_QUANTIZED) continue;
        if (q.format == CODES_4BIT) PairTable::fill(pairs, pair_copies, q, thread, threads);
        if (q.scales == nullptr)
            for (unsigned j = thread; j < 256; j += threads) map[j] = nested_level(q, (uint8_t)j);
    }
}

// The same by all of a block.
__device__ __forceinline__ void load_tables(float2 *pairs, float *map, const gemm_params &p, const gemm_problem &problem,
                                            unsigned threads) {
    fill_tables(pairs, map, p.pair_copies, problem, threadIdx.x, threads);
    __syncthreads();
}

// The element (row, col) of a stored operand.
__device__ __forceinline__ float stored_element(const gemm_operand &o, const quantized_matrix &q, uint64_t row,
                                                uint64_t col) {
    uint64_t i = row * o.ld + col;
    switch (o.type) {
    case TYPE_F32: return ((const float *)o.data)[i];
    case TYPE_BF16: return to_float(((const bf16 *)o.data)[i]);
    case TYPE_F16: return to_float(((const f16 *)o.data)[i]);
    default: return decode_element(q, row, col);
    }
}

// Writes up to eight neighbours of a result's row from their sums.
template <class Out>
__device__ __forceinline__ void finish_pack(const gemm_problem &problem, uint64_t row, uint64_t column,
                                            float (&sum)[PACK]) {
    uint64_t left = problem.n - column;
    Out *out = (Out *)problem.out + row * problem.n + column;
    if (problem.accumulate) {
        float init[PACK];
        load_pack(init, out, left);
#pragma unroll
        for (int j = 0; j < PACK; j++) sum[j] = init[j] + sum[j];
    }
#pragma unroll
    for (int j = 0; j < PACK; j++) sum[j] = problem.scale * sum[j];
    if (problem.bias != nullptr) {
        float bias[PACK];
        load_pack_of(bias, problem.bias, column, left, problem.bias_type);
#pragma unroll
        for (int j = 0; j < PACK; j++) sum[j] = sum[j] + bias[j];
    }
    store_pack(out, sum, left);
}

// Writes a block's tile [ROWS, COLUMNS] from sums in shared memory, GROUPS of them an element, each with rows of STRIDE.
template <int GROUPS, int ROWS, int COLUMNS, int STRIDE, int THREADS>
__device__ __forceinline__ void finish_tile(const Place &place, const float *staged) {
    const gemm_problem &problem = place.problem;
    constexpr unsigned PACKS = COLUMNS / PACK;
    for (unsigned index = threadIdx.x; index < ROWS * PACKS; index += THREADS) {
        unsigned r = index / PACKS, c = index % PACKS * PACK;
        if (place.row + r >= problem.m || place.column + c >= problem.n) continue;
        float x[PACK];
#pragma unroll
        for (int j = 0; j < PACK; j++) x[j] = 0.0f;
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
#pragma unroll
            for (int j = 0; j < PACK; j++) x[j] = x[j] + staged[(g * ROWS + r) * STRIDE + c + j];
        if (problem.out_type == TYPE_F32) finish_pack<float>(problem, place.row + r, place.column + c, x);
        else finish_pack<bf16>(problem, place.row + r, place.column + c, x);
    }
}

#endif
