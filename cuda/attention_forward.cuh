// What the kernels of attention's forward share: scores, and the state of a row that tiles are folded into.
#ifndef LOWRANK_ATTENTION_FORWARD_CUH
#define LOWRANK_ATTENTION_FORWARD_CUH

#include "attention.cuh"

// The state of a row, and how a tile changes it: o = alpha o + beta (tile's product). One of the factors is 1. A tile of
// which the row sees nothing changes no bit.
struct Softmax {
    float top, sum;
    template <class T> __device__ __forceinline__ void fold(float tile_top, float tile_sum, float &alpha, float &beta) {
        float joint = fmaxf(top, tile_top);
        alpha = top == joint ? 1.0f : exponential<T>(top - joint);
        beta = tile_top == joint ? 1.0f : exponential<T>(tile_top - joint);
        sum = fmaf(tile_sum, beta, sum * alpha);
        top = joint;
    }
};

// Turns products of one tile into scores, minus infinity where a row does not see the key, if there may be such
// (`hidden`). `position(m, half)` is a row's.
template <class T, int MT, int N, class Position>
__device__ __forceinline__ void scores(float (&s)[MT][N / 8][4], const attention_params &p, int first_key,
                                       Position position, bool hidden) {
    int column = first_key + lane_index() % 4 * 2;
#define EACH(statement)                                                                                                \
    _Pragma("unroll") for (int m = 0; m < MT; m++) _Pragma("unroll") for (int n = 0; n < N / 8; n++)                    \
        _Pragma("unroll") for (int e = 0; e < 4; e++) statement
    if (p.softcap > 0.0f) {
        float inverse = p.scale / p.softcap, cap = p.softcap * log_base<T>();
        EACH(s[m][n][e] = cap * tanh_approx(s[m][n][e] * inverse));
    } else {
        float factor = p.scale * log_base<T>();
        EACH(s[m][n][e] *= factor);
    }
    if (hidden) EACH(if (!is_visible(column + 8 * n + e % 2, position(m, e / 2), p.window)) s[m][n][e] = -INFINITY);
#undef EACH
}

// Turns a row's scores into exponentials over their maximum, `top`, and gives their sum.
template <class T, int N> __device__ __forceinline__ float exponentials(float (&s)[N / 8][4], int half, float &top) {
    top = -INFINITY;
#pragma unroll
    for (int n = 0; n < N / 8; n++) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
    top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
    float base = top == -INFINITY ? 0.0f : top, sum = 0.0f;
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) sum += s[n][e] = exponential<T>(s[n][e] - base);
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    return sum + __shfl_xor_sync(ALL_LANES, sum, 2);
}

// o *= alpha, which is 1 for all rows in most tiles.
template <int MT, int NT> __device__ __forceinline__ void rescale(float (&o)[MT][NT][4], const float (&alpha)[MT][2]) {
    bool any = false;
#pragma unroll
    for (int m = 0; m < MT; m++) any |= alpha[m][0] != 1.0f || alpha[m][1] != 1.0f;
    if (!__any_sync(ALL_LANES, any)) return;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) o[m][n][e] *= alpha[m][e / 2];
}

// lse of a row, whose exponents have base log_base.
template <class T> __device__ __forceinline__ float log_sum(const Softmax &row) {
    return row.top * (1.0f / log_base<T>()) + log_f32(row.sum);
}

// Keys or values of a tile.
template <class T>
__device__ __forceinline__ Rows<T> key_rows(const void *of, const attention_params &p, const attention_sequence &s,
                                            int kv_head, int first) {
    size_t ld = (size_t)p.n_kv_heads * p.head_dim;
    return {(const T *)of + (s.k_start + first) * ld + (size_t)kv_head * p.head_dim, ld, (int)s.k_len - first};
}

#endif
