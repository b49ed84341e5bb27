// Gradients of causal attention. With p = exp(s - lse) and delta = rowsum(dout out):
//
//   dv = p^T dout,   ds = p (dout v^T - delta) ds/d(q k^T),   dk = ds^T q,   dq = ds k
//
// Two kernels recompute p and ds, each summing in its own registers, in a fixed order and without atomics: one has the
// rows of a tile of keys (dk and dv, over the heads of the group and the tiles of queries), the other those of a tile
// of queries (dq, over the tiles of keys). They are one template: resident rows, and tiles of the others that stream by.
#include "attention_backward.cuh"

// delta[row], a row being one head of one token. A warp a row.
template <class T> __device__ __forceinline__ void attention_delta(const attention_delta_params &p) {
    uint64_t row = (uint64_t)blockIdx.x * 8 + warp_index();
    if (row >= p.rows) return;
    const T *dout = (const T *)p.dout + row * p.head_dim, *out = (const T *)p.out + row * p.head_dim;
    float sum = 0.0f;
    for (uint32_t i = lane_index(); i < p.head_dim; i += 32) sum = fmaf(to_float(dout[i]), to_float(out[i]), sum);
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
    if (lane_index() == 0) p.delta[row] = sum;
}

template <class T, int D> struct Backward {
    static constexpr bool F32 = sizeof(T) == 4;
    // Warps with the same rows share the columns of the gradients; each computes their scores.
    static constexpr int COLUMN_GROUPS = D > 128 ? 2 : 1, COLUMNS = D / COLUMN_GROUPS;
    static constexpr int ROW_GROUPS = (F32 ? 2 : 4) / COLUMN_GROUPS, ROWS = 16 * ROW_GROUPS;
    static constexpr int THREADS = 32 * ROW_GROUPS * COLUMN_GROUPS;
    static constexpr int STREAM = F32 || D > 128 ? 16 : 32; // rows of a tile that streams by
    static constexpr int STAGES = F32 ? 1 : 2;
};

// Grid: tiles of resident rows; key heads, or query heads; sequences.
template <class T, int D, bool OF_KEYS>
__device__ __forceinline__ void attention_backward(const attention_backward_params &p) {
    using B = Backward<T, D>;
    constexpr int ROWS = B::ROWS, STREAM = B::STREAM, STAGES = B::STAGES, THREADS = B::THREADS, LD = stride<T, D>;
    constexpr int NT = B::COLUMNS / 8, LEFT_FLOATS = Left<T, 1, STREAM>::SHARED_FLOATS;
    DYNAMIC_SHARED(memory);
    SHARED(uint32_t, bad, 4);           // of even steps and of odd ones: rows of the first streamed tensor, of the other
    SHARED(float, scalars, 4 * STREAM); // OF_KEYS: lse and delta of the queries, two stages
    T *resident = reinterpret_cast<T *>(memory), *streamed = resident + 2 * ROWS * LD;
    float *left_memory = reinterpret_cast<float *>(streamed + STAGES * 2 * STREAM * LD);
    left_memory += 2 * LEFT_FLOATS * warp_index();
    BackwardBlock<OF_KEYS, ROWS, STREAM> block(p, blockIdx.x, blockIdx.y);
    if (!block.exists) return;
    const attention_sequence &s = block.s;
    int n_heads = p.n_heads, head_dim = p.head_dim, first_row = block.first_row, last_row = block.last_row;
    int first_head = block.first_head, steps = block.steps;
    bool aligned = p.aligned;
    size_t q_ld = (size_t)n_heads * head_dim, k_ld = (size_t)p.n_kv_heads * head_dim;
    auto query_start = [&](int head, int row) { return (s.q_start + row) * q_ld + (size_t)head * head_dim; };
    auto key_start = [&](int row) { return (s.k_start + row) * k_ld + (size_t)block.kv_head * head_dim; };
    auto queries = [&](const void *of, int head, int first) {
        return Rows<T>{(const T *)of + query_start(head, first), q_ld, (int)s.q_len - first};
    };
    auto keys = [&](const void *of, int first) {
        return Rows<T>{(const T *)of + key_start(first), k_ld, (int)s.k_len - first};
    };

    using Step = typename BackwardBlock<OF_KEYS, ROWS, STREAM>::Step;
    auto first_streamed = [&](const Step &at) {
        return OF_KEYS ? queries(p.q, at.head, at.first) : keys(p.k, at.first);
    };
    auto second_streamed = [&](const Step &at) {
        return OF_KEYS ? queries(p.dout, at.head, at.first) : keys(p.v, at.first);
    };
    Step at = block.first_step(), next = at; // to compute with, and to copy
    auto copy = [&](int step) {
        T *to = streamed + step % STAGES * 2 * STREAM * LD;
        copy_tile<T, D, STREAM, THREADS>(to, first_streamed(next), head_dim, aligned);
        copy_tile<T, D, STREAM, THREADS>(to + STREAM * LD, second_streamed(next), head_dim, aligned);
        if (OF_KEYS && threadIdx.x < STREAM) {
            int query = next.first + (int)threadIdx.x;
            bool inside = query < (int)s.q_len;
            size_t of_query = inside ? (s.q_start + query) * (size_t)n_heads + next.head : 0;
            float *scalar = scalars + step % STAGES * 2 * STREAM + threadIdx.x;
            cp_async4(scalar, p.lse + of_query, inside ? 4 : 0);
            cp_async4(scalar + STREAM, p.delta + of_query, inside ? 4 : 0);
        }
        cp_async_commit();
        block.advance(next);
    };
    if (OF_KEYS) {
        copy_tile<T, D, ROWS, THREADS>(resident, keys(p.k, first_row), head_dim, aligned);
        copy_tile<T, D, ROWS, THREADS>(resident + ROWS * LD, keys(p.v, first_row), head_dim, aligned);
    } else {
        copy_tile<T, D, ROWS, THREADS>(resident, queries(p.q, first_head, first_row), head_dim, aligned);
        copy_tile<T, D, ROWS, THREADS>(resident + ROWS * LD, queries(p.dout, first_head, first_row), head_dim, aligned);
    }
    if (steps > 0) copy(0);
    if (threadIdx.x < 4) bad[threadIdx.x] = 0;
    __syncthreads();

    int warp_rows = (int)warp_index() % B::ROW_GROUPS * 16, column = (int)warp_index() / B::ROW_GROUPS * B::COLUMNS;
    int row[2], place[2]; // in the sequence, and as keys are counted
    float row_lse[2] = {}, row_delta[2] = {}; // of queries
#pragma unroll
    for (int half = 0; half < 2; half++) {
        row[half] = first_row + warp_rows + (int)lane_index() / 4 + 8 * half;
        place[half] = OF_KEYS ? row[half] : min(row[half], last_row) + block.past;
        if (OF_KEYS) continue;
        size_t of_row = (s.q_start + min(row[half], last_row)) * (size_t)n_heads + first_head;
        row_lse[half] = p.lse[of_row] * log_base<T>();
        row_delta[half] = p.delta[of_row];
    }
    // dk or dq, and dv.
    float first_gradient[1][NT][4] = {}, second_gradient[1][OF_KEYS ? NT : 2][4] = {};
    for (int step = 0; step < steps; step++) {
        if (STAGES == 2 && step + 1 < steps) copy(step + 1);
        else cp_async_commit();
        cp_async_wait<STAGES == 2 ? 1 : 0>();
        T *x1 = streamed + step % STAGES * 2 * STREAM * LD, *x2 = x1 + STREAM * LD;
        int first_place = block.place_of(at);
        bool hidden = block.hides(first_place);
        uint32_t *bad_here = bad + step % 2 * 2;
        if (hidden) {
            find_not_finite<T, D, STREAM, THREADS>(x1, bad_here, false);
            if (OF_KEYS) find_not_finite<T, D, STREAM, THREADS>(x2, bad_here + 1, false);
        }
        __syncthreads(); // the tile is here
        if (threadIdx.x < 2) bad[(step + 1) % 2 * 2 + threadIdx.x] = 0;
        float x[1][STREAM / 8][4], dx[1][STREAM / 8][4];
        multiply_rows<D, 1, STREAM>(x, resident + warp_rows * LD, x1);
        multiply_rows<D, 1, STREAM>(dx, resident + (ROWS + warp_rows) * LD, x2);
        const float *of_columns = scalars + step % STAGES * 2 * STREAM + lane_index() % 4 * 2;
        auto lse = [&](int n, int e) { return OF_KEYS ? of_columns[8 * n + e % 2] * log_base<T>() : row_lse[e / 2]; };
        auto delta = [&](int n, int e) { return OF_KEYS ? of_columns[STREAM + 8 * n + e % 2] : row_delta[e / 2]; };
        if (p.softcap > 0.0f) capped_gradients<T, STREAM>(x, dx, p, lse, delta);
        else {
            probabilities<T, STREAM>(x, p, lse);
            score_gradients<STREAM>(x, dx, p, delta);
        }
        if (hidden) {
            hide<STREAM>(x, block, place, first_place);
            hide<STREAM>(dx, block, place, first_place);
        }
        bool any_bad = hidden && (bad_here[0] | bad_here[1]) != 0;
        if (any_bad) {
            __syncthreads(); // all have their scores
            uint32_t *found = bad_here;
            find_not_finite<T, D, STREAM, THREADS>(x1, found, true);
            if (OF_KEYS) find_not_finite<T, D, STREAM, THREADS>(x2, found + 1, true);
            __syncthreads();
        }
        constexpr float ONE[1][2] = {{1.0f, 1.0f}};
        auto sees = [&](int, int half, int other) { return block.sees(place[half], first_place + other); };
        Left<T, 1, STREAM> left, second_left;
        left.set(dx, left_memory);
        if constexpr (OF_KEYS) {
            second_left.set(x, left_memory + LEFT_FLOATS);
            multiply_add<D, 1, STREAM, NT>(second_gradient, second_left, x2, column);
            if (any_bad)
                add_not_finite<T>(second_gradient, second_left, ONE, bad_here + 1, second_streamed(at), column, head_dim,
                                  sees);
        }
        multiply_add<D, 1, STREAM, NT>(first_gradient, left, x1, column);
        if (any_bad)
            add_not_finite<T>(first_gradient, left, ONE, bad_here, first_streamed(at), column, head_dim, sees);
        block.advance(at);
        __syncthreads(); // before this stage is filled again
        if (STAGES == 1 && step + 1 < steps) copy(step + 1);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (row[half] > last_row) continue;
        size_t start = OF_KEYS ? key_start(row[half]) : query_start(first_head, row[half]);
        T *first_out = (T *)(OF_KEYS ? p.dk : p.dq) + start, *second_out = (T *)p.dv + start;
        store_gradient(first_out, first_gradient[0], half, column, head_dim, aligned);
        if constexpr (OF_KEYS) store_gradient(second_out, second_gradient[0], half, column, head_dim, aligned);
    }
}

typedef float f32_type;
typedef bf16 bf16_type;
KERNEL(attention_delta_f32, attention_delta_params, 256) { attention_delta<float>(p); }
KERNEL(attention_delta_bf16, attention_delta_params, 256) { attention_delta<bf16>(p); }

#define KERNELS(T, D)                                                                                                  \
    KERNEL(attention_backward_keys_##T##_##D, attention_backward_params, Backward<T##_type, D>::THREADS, 1) {          \
        attention_backward<T##_type, D, true>(p);                                                                      \
    }                                                                                                                  \
    KERNEL(attention_backward_queries_##T##_##D, attention_backward_params, Backward<T##_type, D>::THREADS, 1) {       \
        attention_backward<T##_type, D, false>(p);                                                                     \
    }
KERNELS(bf16, 64)
KERNELS(bf16, 96)
KERNELS(bf16, 128)
KERNELS(bf16, 256)
KERNELS(f32, 64)
KERNELS(f32, 128)
KERNELS(f32, 256)
