// Causal attention with grouped heads, forward.
//
// Keys come in tiles that begin at multiples of a fixed number, counted from the sequence's first key. A row's result is
// defined by these tiles: each has its maximum, its sum of exponentials and its product with v, all from nothing, and
// they are folded into the row's state one after the other. So it does not matter who computes a tile: one block that
// goes over all of them (attention_*), or one block for each, whose parts another kernel folds (attention_split_*,
// attention_join_*; few queries, many keys). A row has the same bits in both, in any launch.
#include "kernel.cuh"

#include "attention_forward.cuh"

template <class T, int D> struct Forward {
    static constexpr bool F32 = sizeof(T) == 4;
    static constexpr int KEYS = D > 128 ? 16 : F32 ? 32 : 64;
    static constexpr int MT = F32 || D > 64 ? 1 : 2, WARPS = F32 ? (D > 128 ? 2 : 4) : (D > 64 ? 8 : 4);
    static constexpr int ROWS = 16 * MT * WARPS;
    // Columns of a tile's product that are folded at a time.
    static constexpr int COLUMNS = F32 ? 32 : 16;
};

// Grid: tiles of queries, the last of a sequence first as it has most keys; heads; sequences.
template <class T, int D> __device__ __forceinline__ void attention(const attention_params &p) {
    using F = Forward<T, D>;
    constexpr int KEYS = F::KEYS, MT = F::MT, ROWS = F::ROWS, THREADS = 32 * F::WARPS, NT = F::COLUMNS / 8;
    DYNAMIC_SHARED(memory);
    SHARED(uint32_t, bad, 4); // of even tiles and of odd ones
    T *q = reinterpret_cast<T *>(memory), *k = q + ROWS * stride<T, D>, *v = k + KEYS * stride<T, D>;
    float *left_memory = reinterpret_cast<float *>(v + KEYS * stride<T, D>);
    left_memory += warp_index() * Left<T, MT, KEYS>::SHARED_FLOATS;
    attention_sequence s = p.sequences[blockIdx.z];
    int n_tiles = ((int)s.q_len + ROWS - 1) / ROWS, head = blockIdx.y, kv_head = head / (p.n_heads / p.n_kv_heads);
    if ((int)blockIdx.x >= n_tiles) return;
    int first_row = (n_tiles - 1 - (int)blockIdx.x) * ROWS, past = s.k_len - s.q_len;
    int last_row = min(first_row + ROWS, (int)s.q_len) - 1;
    int first_tile = max(0, first_row + past - p.window + 1) / KEYS, last_tile = (last_row + past) / KEYS;
    int head_dim = p.head_dim, warp_row = first_row + (int)warp_index() * 16 * MT + (int)lane_index() / 4;
    bool aligned = p.aligned;

    size_t ld = (size_t)p.n_heads * head_dim, start = (s.q_start + first_row) * ld + (size_t)head * head_dim;
    copy_tile<T, D, ROWS, THREADS>(q, Rows<T>{(const T *)p.q + start, ld, (int)s.q_len - first_row}, head_dim, aligned);
    copy_tile<T, D, KEYS, THREADS>(k, key_rows<T>(p.k, p, s, kv_head, first_tile * KEYS), head_dim, aligned);
    cp_async_commit();
    if (threadIdx.x < 4) bad[threadIdx.x] = 0;

    float o[MT][D / 8][4] = {};
    Softmax rows[MT][2];
    auto position = [&](int m, int half) { return warp_row + past + 16 * m + 8 * half; };
#pragma unroll
    for (int m = 0; m < MT; m++) rows[m][0] = rows[m][1] = {-INFINITY, 0.0f};
    for (int tile = first_tile; tile <= last_tile; tile++) {
        int first_key = tile * KEYS;
        bool hidden = first_key + KEYS - 1 > first_row + past || first_key <= last_row + past - p.window;
        cp_async_wait<0>();
        __syncthreads(); // the keys are here, and no one reads the last values
        copy_tile<T, D, KEYS, THREADS>(v, key_rows<T>(p.v, p, s, kv_head, first_key), head_dim, aligned);
        cp_async_commit();
        float x[MT][KEYS / 8][4], alpha[MT][2], beta[MT][2];
        multiply_rows<D, MT, KEYS>(x, q + warp_index() * 16 * MT * stride<T, D>, k);
        scores<T, MT, KEYS>(x, p, first_key, position, hidden);
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float top, sum = exponentials<T, KEYS>(x[m], half, top);
                rows[m][half].template fold<T>(top, sum, alpha[m][half], beta[m][half]);
            }
        Left<T, MT, KEYS> left;
        left.set(x, left_memory);
        cp_async_wait<0>();
        uint32_t *bad_here = bad + tile % 2 * 2;
        if (hidden) find_not_finite<T, D, KEYS, THREADS>(v, bad_here, true);
        __syncthreads(); // the values are here, and no one reads these keys any more
        if (tile < last_tile)
            copy_tile<T, D, KEYS, THREADS>(k, key_rows<T>(p.k, p, s, kv_head, first_key + KEYS), head_dim, aligned);
        cp_async_commit();
        if (threadIdx.x < 2) bad[(tile + 1) % 2 * 2 + threadIdx.x] = 0;
        rescale(o, alpha);
#pragma unroll
        for (int c = 0; c < D / 8; c += NT) {
            float product[MT][NT][4] = {};
            multiply_add<D, MT, KEYS, NT>(product, left, v, 8 * c);
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        o[m][c + n][e] = fmaf(product[m][n][e], beta[m][e / 2], o[m][c + n][e]);
        }
        if (hidden && (bad_here[0] | bad_here[1]) != 0) {
            auto sees = [&](int m, int half, int key) {
                return is_visible(first_key + key, position(m, half), p.window);
            };
            add_not_finite<T>(o, left, beta, bad_here, key_rows<T>(p.v, p, s, kv_head, first_key), 0, head_dim, sees);
        }
    }
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = warp_row + 16 * m + 8 * half;
            if (row > last_row) continue;
            float share = 1.0f / rows[m][half].sum;
            T *out = (T *)p.out + (s.q_start + row) * ld + (size_t)head * head_dim;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                // A tile that a row doesn't see may make -0 +0; so + 0.
                float pair[2] = {o[m][n][2 * half] + 0.0f, o[m][n][2 * half + 1] + 0.0f};
                store_pair(out, 8 * n + lane_index() % 4 * 2, head_dim, aligned, pair[0] * share, pair[1] * share);
            }
            if (lane_index() % 4 == 0) p.lse[(s.q_start + row) * (size_t)p.n_heads + head] = log_sum<T>(rows[m][half]);
        }
}

// The part of a query's first tile.
__device__ __forceinline__ size_t first_part(const attention_sequence &s, int head, int query, int keys) {
    return s.part_start + ((size_t)head * s.q_len + query) * ((s.k_len + keys - 1) / keys);
}

// Grid: tiles of keys; for each key head, sixteens of (query, head of its group); sequences. All warps have the same
// rows and share the columns of v.
template <class T, int D> __device__ __forceinline__ void attention_split(const attention_params &p) {
    constexpr int KEYS = Forward<T, D>::KEYS, WARPS = 4, THREADS = 32 * WARPS;
    DYNAMIC_SHARED(memory);
    SHARED(uint32_t, bad, 2);
    T *q = reinterpret_cast<T *>(memory), *k = q + 16 * stride<T, D>, *v = k + KEYS * stride<T, D>;
    float *left_memory = reinterpret_cast<float *>(v + KEYS * stride<T, D>);
    left_memory += warp_index() * Left<T, 1, KEYS>::SHARED_FLOATS;
    attention_sequence s = p.sequences[blockIdx.z];
    int group = p.n_heads / p.n_kv_heads, sixteens = ((int)p.max_queries * group + 15) / 16, head_dim = p.head_dim;
    int kv_head = blockIdx.y / sixteens, first = blockIdx.y % sixteens * 16, n_rows = (int)s.q_len * group - first;
    if (n_rows <= 0) return;
    int first_row = first / group, last_row = min(first + 15, (int)s.q_len * group - 1) / group;
    int past = s.k_len - s.q_len, first_key = blockIdx.x * KEYS;
    if (first_key > last_row + past || first_key + KEYS - 1 <= first_row + past - p.window) return;
    bool aligned = p.aligned;
    bool hidden = first_key + KEYS - 1 > first_row + past || first_key <= last_row + past - p.window;

    auto query = [&](int row) { return (first + row) / group; };
    auto head_of = [&](int row) { return kv_head * group + (first + row) % group; };
    auto query_at = [&](int row) {
        size_t at = (s.q_start + query(row)) * (size_t)p.n_heads + head_of(row);
        return row < n_rows ? (const T *)p.q + at * head_dim : nullptr;
    };
    copy_tile<T, D, 16, THREADS>(q, query_at, head_dim, aligned);
    copy_tile<T, D, KEYS, THREADS>(k, key_rows<T>(p.k, p, s, kv_head, first_key), head_dim, aligned);
    cp_async_commit();
    copy_tile<T, D, KEYS, THREADS>(v, key_rows<T>(p.v, p, s, kv_head, first_key), head_dim, aligned);
    cp_async_commit();
    if (threadIdx.x < 2) bad[threadIdx.x] = 0;
    int row = lane_index() / 4;
    auto position = [&](int, int half) { return query(row + 8 * half) + past; };
    cp_async_wait<1>();
    __syncthreads();
    float x[1][KEYS / 8][4], top[2], sum[2];
    multiply_rows<D, 1, KEYS>(x, q, k);
    scores<T, 1, KEYS>(x, p, first_key, position, hidden);
#pragma unroll
    for (int half = 0; half < 2; half++) sum[half] = exponentials<T, KEYS>(x[0], half, top[half]);
    Left<T, 1, KEYS> left;
    left.set(x, left_memory);
    cp_async_wait<0>();
    if (hidden) find_not_finite<T, D, KEYS, THREADS>(v, bad, true);
    __syncthreads();
    size_t part[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        part[half] = first_part(s, head_of(row + 8 * half), query(row + 8 * half), KEYS) + blockIdx.x;
        if (threadIdx.x % 4 != 0 || warp_index() != 0 || row + 8 * half >= n_rows) continue;
        p.part_stats[2 * part[half]] = top[half];
        p.part_stats[2 * part[half] + 1] = sum[half];
    }
#pragma unroll 1
    for (int column = warp_index() * 16; column < head_dim; column += WARPS * 16) {
        float product[1][2][4] = {}, one[1][2] = {{1.0f, 1.0f}};
        multiply_add<D, 1, KEYS, 2>(product, left, v, column);
        if (hidden && (bad[0] | bad[1]) != 0) {
            auto sees = [&](int m, int half, int key) {
                return is_visible(first_key + key, position(m, half), p.window);
            };
            auto values = key_rows<T>(p.v, p, s, kv_head, first_key);
            add_not_finite<T>(product, left, one, bad, values, column, head_dim, sees);
        }
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (row + 8 * half >= n_rows) continue;
                int c = column + 8 * n + lane_index() % 4 * 2;
                const float *pair = product[0][n] + 2 * half;
                store_pair(p.parts + part[half] * head_dim, c, head_dim, aligned, pair[0], pair[1]);
            }
    }
}

// Grid: queries; heads; sequences. A thread has one column.
template <class T, int D> __device__ __forceinline__ void attention_join(const attention_params &p) {
    constexpr int KEYS = Forward<T, D>::KEYS;
    attention_sequence s = p.sequences[blockIdx.z];
    int query = blockIdx.x, head = blockIdx.y, past = s.k_len - s.q_len, head_dim = p.head_dim;
    if (query >= (int)s.q_len) return;
    int first_tile = max(0, query + past - p.window + 1) / KEYS, last_tile = (query + past) / KEYS;
    size_t part = first_part(s, head, query, KEYS);
    int column = threadIdx.x;
    bool inside = column < head_dim;
    Softmax state{-INFINITY, 0.0f};
    float o = 0.0f;
    for (int first = first_tile; first <= last_tile; first += 32) {
        // A lane has one tile's factors: maxima are joined over the warp, as in any order they are the same.
        int tile = first + (int)lane_index(), count = min(32, last_tile + 1 - first);
        bool has_tile = tile <= last_tile;
        const float *stats = p.part_stats + 2 * (part + (has_tile ? tile : first));
        float top = has_tile ? stats[0] : -INFINITY, tile_sum = has_tile ? stats[1] : 0.0f;
        float joint = fmaxf(state.top, top);
#pragma unroll
        for (int delta = 1; delta < 32; delta *= 2) {
            float other = __shfl_up_sync(ALL_LANES, joint, delta);
            if ((int)lane_index() >= delta) joint = fmaxf(joint, other);
        }
        float before = __shfl_up_sync(ALL_LANES, joint, 1), alpha, beta, ignored = 0.0f;
        Softmax lane{lane_index() == 0 ? state.top : before, ignored};
        lane.fold<T>(top, tile_sum, alpha, beta);
        for (int i = 0; i < count; i++) {
            float a = __shfl_sync(ALL_LANES, alpha, i), b = __shfl_sync(ALL_LANES, beta, i);
            state.sum = fmaf(__shfl_sync(ALL_LANES, tile_sum, i), b, state.sum * a);
            if (inside) o = fmaf(p.parts[(part + first + i) * head_dim + column], b, o * a);
        }
        state.top = __shfl_sync(ALL_LANES, joint, 31);
    }
    size_t row = (s.q_start + query) * (size_t)p.n_heads + head;
    if (inside) ((T *)p.out)[row * head_dim + column] = from_float<T>((o + 0.0f) * (1.0f / state.sum));
    if (column == 0) p.lse[row] = log_sum<T>(state);
}

#define KERNELS(T, D)                                                                                                  \
    KERNEL(attention_##T##_##D, attention_params, 32 * Forward<T##_type, D>::WARPS, 1) { attention<T##_type, D>(p); }  \
    KERNEL(attention_split_##T##_##D, attention_params, 128, 1) { attention_split<T##_type, D>(p); }                   \
    KERNEL(attention_join_##T##_##D, attention_params, 256) { attention_join<T##_type, D>(p); }
typedef float f32_type;
typedef bf16 bf16_type;
KERNELS(bf16, 64)
KERNELS(bf16, 96)
KERNELS(bf16, 128)
KERNELS(bf16, 256)
KERNELS(f32, 64)
KERNELS(f32, 128)
KERNELS(f32, 256)
