// What the kernels of attention's backward share (attention_backward.cu says what they compute): who computes what, and
// how products become p and ds.
#ifndef LOWRANK_ATTENTION_BACKWARD_CUH
#define LOWRANK_ATTENTION_BACKWARD_CUH

#include "attention.cuh"

// A block has ROWS rows, keys of one key head (OF_KEYS) or queries of one head, and goes step by step through tiles of
// STREAM rows of the others: queries of each head of the group, or keys. "Places" are positions as keys are counted.
template <bool OF_KEYS, int ROWS, int STREAM> struct BackwardBlock {
    attention_sequence s;
    int first_row, last_row, past, window;
    int first_head, kv_head;
    int first_streamed, end_streamed, steps;
    bool exists;

    // Where a step is: the first row of its tile, and the head of queries.
    struct Step {
        int first, head;
    };

    // The block of a tile of rows, those with most work first (early keys, late queries), of a key head or head.
    __device__ __forceinline__ BackwardBlock(const attention_backward_params &p, int tile, int head)
        : s(p.sequences[blockIdx.z]), past(s.k_len - s.q_len), window(p.window) {
        int n_rows = OF_KEYS ? s.k_len : s.q_len, n_tiles = (n_rows + ROWS - 1) / ROWS;
        int group = p.n_heads / p.n_kv_heads;
        exists = tile < n_tiles;
        first_row = (OF_KEYS ? tile : n_tiles - 1 - tile) * ROWS, last_row = min(first_row + ROWS, n_rows) - 1;
        first_head = OF_KEYS ? head * group : head, kv_head = OF_KEYS ? head : head / group;
        int first = OF_KEYS ? max(0, first_row - past) : max(0, first_row + past - window + 1);
        int last = OF_KEYS ? (int)min((int64_t)s.q_len - 1, (int64_t)last_row - past + window - 1) : last_row + past;
        first_streamed = first / STREAM * STREAM;
        end_streamed = last < first ? first_streamed : (last / STREAM + 1) * STREAM;
        steps = (end_streamed - first_streamed) / STREAM * (OF_KEYS ? group : 1);
    }
    __device__ __forceinline__ Step first_step() const { return {first_streamed, first_head}; }
    __device__ __forceinline__ void advance(Step &at) const {
        at.first += STREAM;
        if (at.first == end_streamed) at.first = first_streamed, at.head++;
    }
    // The place of the first row.
    __device__ __forceinline__ int place_of(const Step &at) const { return OF_KEYS ? at.first + past : at.first; }
    // Whether a tile from `place` on may have a row that one of the block's doesn't see, or that is not the sequence's.
    __device__ __forceinline__ bool hides(int place) const {
        int last = place + STREAM - 1;
        return OF_KEYS ? first_row + ROWS - 1 > place || first_row <= last - window || last >= (int)s.k_len
                       : last > first_row + past || place <= last_row + past - window;
    }
    // Whether a pair of a row of the block and of one that streams by counts.
    __device__ __forceinline__ bool sees(int own, int streamed) const {
        if (OF_KEYS) return is_visible(own, streamed, window) && streamed < (int)s.k_len;
        return is_visible(streamed, own, window);
    }
};

// For each element of an accumulator [16, N] of a warp.
#define EACH_ELEMENT(statement)                                                                                        \
    _Pragma("unroll") for (int n = 0; n < N / 8; n++) _Pragma("unroll") for (int e = 0; e < 4; e++) statement

// p from s = q k^T. `lse(n, e)` is that of an element's query, times log_base.
template <class T, int N, class Lse>
__device__ __forceinline__ void probabilities(float (&s)[1][N / 8][4], const attention_backward_params &p, Lse lse) {
    float factor = p.scale * log_base<T>();
    EACH_ELEMENT(s[0][n][e] = exponential<T>(fmaf(s[0][n][e], factor, -lse(n, e))));
}

// ds from p and dp = dout v^T.
template <int N, class Delta>
__device__ __forceinline__ void score_gradients(const float (&s)[1][N / 8][4], float (&dp)[1][N / 8][4],
                                                const attention_backward_params &p, Delta delta) {
    EACH_ELEMENT(dp[0][n][e] = s[0][n][e] * (dp[0][n][e] - delta(n, e)) * p.scale);
}

// Both where scores are capped.
template <class T, int N, class Lse, class Delta>
__device__ __forceinline__ void capped_gradients(float (&s)[1][N / 8][4], float (&dp)[1][N / 8][4],
                                                 const attention_backward_params &p, Lse lse, Delta delta) {
    float inverse = p.scale / p.softcap, cap = p.softcap * log_base<T>();
    // In passes, for the sake of registers.
    EACH_ELEMENT(s[0][n][e] = tanh_approx(s[0][n][e] * inverse));
    EACH_ELEMENT(dp[0][n][e] = (dp[0][n][e] - delta(n, e)) * p.scale * (1.0f - s[0][n][e] * s[0][n][e]));
    EACH_ELEMENT({
        s[0][n][e] = exponential<T>(fmaf(s[0][n][e], cap, -lse(n, e)));
        dp[0][n][e] *= s[0][n][e];
    });
}

// Makes elements zero whose pair doesn't count; `own` are places of rows, `first` that of the first column.
template <int N, class Block>
__device__ __forceinline__ void hide(float (&x)[1][N / 8][4], const Block &block, const int (&own)[2], int first) {
    first += lane_index() % 4 * 2;
    EACH_ELEMENT(if (!block.sees(own[e / 2], first + 8 * n + e % 2)) x[0][n][e] = 0.0f);
}

// A row of a gradient, from `column` on, from a lane's elements of an accumulator.
template <class T, int NT>
__device__ __forceinline__ void store_gradient(T *row, const float (&x)[NT][4], int half, int column, int head_dim,
                                               bool aligned) {
    // + 0: a tile of which nothing is seen may make -0 +0.
#pragma unroll
    for (int n = 0; n < NT; n++)
        store_pair(row, column + 8 * n + lane_index() % 4 * 2, head_dim, aligned, x[n][2 * half] + 0.0f,
                   x[n][2 * half + 1] + 0.0f);
}

#endif
