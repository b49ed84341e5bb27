// Gradients of causal attention. With p = exp(s - lse) and delta = rowsum(dout out):
//
//   dv = p^T dout,   ds = p (dout v^T - delta) ds/d(q k^T),   dk = ds^T q,   dq = ds k
//
// Two kernels recompute p and ds, each summing in its own registers, in a fixed order and without atomics: one has the
// rows of a tile of keys (dk and dv, over the heads of the group and the tiles of queries), the other those of a tile
// of queries (dq, over the tiles of keys). They are one template: resident rows, and tiles of the others that stream by.
#include "kernel.cuh"

#include "attention.cuh"

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

// lse and delta of the queries that a lane's elements belong to.
struct RowScalars {
    float lse[2], delta[2];
};

// Turns products s = q k^T and dp = dout v^T into p and ds. Rows are keys or queries, as OF_KEYS says.
template <class T, bool OF_KEYS, int N>
__device__ __forceinline__ void score_gradients(float (&s)[1][N / 8][4], float (&dp)[1][N / 8][4],
                                                const attention_backward_params &p, const RowScalars &rows,
                                                const float *column_lse, const float *column_delta,
                                                const int (&row)[2], int first_column, bool hidden) {
    int lane_column = lane_index() % 4 * 2;
    auto scalars = [&](int n, int e, float &lse, float &delta) {
        int column = lane_column + 8 * n + e % 2;
        lse = (OF_KEYS ? column_lse[column] : rows.lse[e / 2]) * log_base<T>();
        delta = OF_KEYS ? column_delta[column] : rows.delta[e / 2];
    };
    if (p.softcap > 0.0f) {
        float inverse = p.scale / p.softcap, cap = p.softcap * log_base<T>();
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float lse, delta, t = tanh_approx(s[0][n][e] * inverse);
                scalars(n, e, lse, delta);
                s[0][n][e] = exponential<T>(fmaf(t, cap, -lse));
                dp[0][n][e] = s[0][n][e] * (dp[0][n][e] - delta) * p.scale * (1.0f - t * t);
            }
    } else {
        float factor = p.scale * log_base<T>();
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float lse, delta;
                scalars(n, e, lse, delta);
                s[0][n][e] = exponential<T>(fmaf(s[0][n][e], factor, -lse));
                dp[0][n][e] = s[0][n][e] * (dp[0][n][e] - delta) * p.scale;
            }
    }
    if (!hidden) return;
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int streamed = first_column + lane_column + 8 * n + e % 2;
            int key = OF_KEYS ? row[e / 2] : streamed, position = OF_KEYS ? streamed : row[e / 2];
            if (!is_visible(key, position, p.window)) s[0][n][e] = dp[0][n][e] = 0.0f;
        }
}

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
    attention_sequence s = p.sequences[blockIdx.z];
    int n_heads = p.n_heads, n_kv_heads = p.n_kv_heads, group = n_heads / n_kv_heads, head_dim = p.head_dim;
    int n_rows = OF_KEYS ? s.k_len : s.q_len, past = s.k_len - s.q_len, n_tiles = (n_rows + ROWS - 1) / ROWS;
    if ((int)blockIdx.x >= n_tiles) return;
    // The tiles with most work first: early keys, late queries.
    int first_row = (OF_KEYS ? (int)blockIdx.x : n_tiles - 1 - (int)blockIdx.x) * ROWS;
    int last_row = min(first_row + ROWS, n_rows) - 1;
    int first_head = OF_KEYS ? blockIdx.y * group : blockIdx.y, kv_head = OF_KEYS ? blockIdx.y : blockIdx.y / group;
    bool aligned = p.aligned;
    size_t q_ld = (size_t)n_heads * head_dim, k_ld = (size_t)n_kv_heads * head_dim;
    auto query_start = [&](int head, int row) { return (s.q_start + row) * q_ld + (size_t)head * head_dim; };
    auto key_start = [&](int row) { return (s.k_start + row) * k_ld + (size_t)kv_head * head_dim; };
    auto queries = [&](const void *of, int head, int first) {
        return Rows<T>{(const T *)of + query_start(head, first), q_ld, (int)s.q_len - first};
    };
    auto keys = [&](const void *of, int first) {
        return Rows<T>{(const T *)of + key_start(first), k_ld, (int)s.k_len - first};
    };

    // The others that rows see, and the steps: for each head of the group (OF_KEYS), each tile.
    int first_seen = OF_KEYS ? max(0, first_row - past) : max(0, first_row + past - p.window + 1);
    int last_seen = OF_KEYS ? (int)min((int64_t)s.q_len - 1, (int64_t)last_row - past + p.window - 1) : last_row + past;
    int first_tile = first_seen / STREAM, tiles = last_seen < first_seen ? 0 : last_seen / STREAM - first_tile + 1;
    int steps = tiles * (OF_KEYS ? group : 1);
    auto first_of = [&](int step) { return (first_tile + step % tiles) * STREAM; };
    auto first_streamed = [&](int step) {
        return OF_KEYS ? queries(p.q, first_head + step / tiles, first_of(step)) : keys(p.k, first_of(step));
    };
    auto second_streamed = [&](int step) {
        return OF_KEYS ? queries(p.dout, first_head + step / tiles, first_of(step)) : keys(p.v, first_of(step));
    };
    auto copy = [&](int step) {
        T *to = streamed + step % STAGES * 2 * STREAM * LD;
        copy_tile<T, D, STREAM, THREADS>(to, first_streamed(step), head_dim, aligned);
        copy_tile<T, D, STREAM, THREADS>(to + STREAM * LD, second_streamed(step), head_dim, aligned);
        if (OF_KEYS && threadIdx.x < STREAM) {
            int query = first_of(step) + (int)threadIdx.x;
            bool inside = query < (int)s.q_len;
            size_t at = inside ? (s.q_start + query) * (size_t)n_heads + first_head + step / tiles : 0;
            float *scalar = scalars + step % STAGES * 2 * STREAM + threadIdx.x;
            cp_async4(scalar, p.lse + at, inside ? 4 : 0);
            cp_async4(scalar + STREAM, p.delta + at, inside ? 4 : 0);
        }
        cp_async_commit();
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
    RowScalars row_scalars{};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        row[half] = first_row + warp_rows + (int)lane_index() / 4 + 8 * half;
        place[half] = OF_KEYS ? row[half] : min(row[half], last_row) + past;
        if (OF_KEYS) continue;
        size_t at = (s.q_start + min(row[half], last_row)) * (size_t)n_heads + first_head;
        row_scalars.lse[half] = p.lse[at];
        row_scalars.delta[half] = p.delta[at];
    }
    // dk or dq, and dv.
    float first_gradient[1][NT][4] = {}, second_gradient[1][OF_KEYS ? NT : 2][4] = {};
    for (int step = 0; step < steps; step++) {
        if (STAGES == 2 && step + 1 < steps) copy(step + 1);
        else cp_async_commit();
        cp_async_wait<STAGES == 2 ? 1 : 0>();
        T *x1 = streamed + step % STAGES * 2 * STREAM * LD, *x2 = x1 + STREAM * LD;
        int first = first_of(step), first_place = OF_KEYS ? first + past : first;
        // Whether there may be a pair of a query and a key that it doesn't see.
        int last_place = first_place + STREAM - 1;
        bool hidden = OF_KEYS ? first_row + ROWS - 1 > first_place || first_row <= last_place - p.window
                              : last_place > first_row + past || first_place <= last_row + past - p.window;
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
        const float *lse = scalars + step % STAGES * 2 * STREAM;
        score_gradients<T, OF_KEYS, STREAM>(x, dx, p, row_scalars, lse, lse + STREAM, place, first_place, hidden);
        bool any_bad = hidden && (bad_here[0] | bad_here[1]) != 0;
        if (any_bad) {
            __syncthreads(); // all have their scores
            uint32_t *found = bad_here;
            find_not_finite<T, D, STREAM, THREADS>(x1, found, true);
            if (OF_KEYS) find_not_finite<T, D, STREAM, THREADS>(x2, found + 1, true);
            __syncthreads();
        }
        constexpr float ONE[1][2] = {{1.0f, 1.0f}};
        auto sees = [&](int, int half, int other) {
            other += first_place;
            int key = OF_KEYS ? place[half] : other, position = OF_KEYS ? other : place[half];
            return is_visible(key, position, p.window);
        };
        Left<T, 1, STREAM> left, second_left;
        left.set(dx, left_memory);
        if constexpr (OF_KEYS) {
            second_left.set(x, left_memory + LEFT_FLOATS);
            multiply_add<D, 1, STREAM, NT>(second_gradient, second_left, x2, column);
            if (any_bad)
                add_not_finite<T>(second_gradient, second_left, ONE, bad_here + 1, second_streamed(step), column, head_dim,
                                  sees);
        }
        multiply_add<D, 1, STREAM, NT>(first_gradient, left, x1, column);
        if (any_bad)
            add_not_finite<T>(first_gradient, left, ONE, bad_here, first_streamed(step), column, head_dim, sees);
        __syncthreads(); // before this stage is filled again
        if (STAGES == 1 && step + 1 < steps) copy(step + 1);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (row[half] > last_row) continue;
        size_t at = OF_KEYS ? key_start(row[half]) : query_start(first_head, row[half]);
        T *first_out = (T *)(OF_KEYS ? p.dk : p.dq) + at, *second_out = (T *)p.dv + at;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            int c = column + 8 * n + lane_index() % 4 * 2;
            // + 0: a tile of which nothing is seen may make -0 +0.
            const float *pair = first_gradient[0][n] + 2 * half;
            store_pair(first_out, c, head_dim, aligned, pair[0] + 0.0f, pair[1] + 0.0f);
            if constexpr (OF_KEYS) {
                pair = second_gradient[0][n] + 2 * half;
                store_pair(second_out, c, head_dim, aligned, pair[0] + 0.0f, pair[1] + 0.0f);
            }
        }
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
