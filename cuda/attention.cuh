// What the forward and the backward of attention share: tiles in shared memory, products of tiles over a warp, scores,
// and the treatment of values that are not finite.
//
// A warp has 16 MT rows of a product. An accumulator x[MT][N / 8][4] of [16 MT, N] is spread over the lanes as mma's D
// (ptx.cuh), in f32 too, so the code around the products is one: with g = lane / 4 and t = lane % 4, x[m][n][e] is at
// row 16 m + g + 8 (e / 2), column 8 n + 2 t + e % 2.
#ifndef LOWRANK_ATTENTION_CUH
#define LOWRANK_ATTENTION_CUH

#include "kernel.cuh"

#include "math.cuh"
#include "ptx.cuh"

#define ALL_LANES 0xffffffffu

// Elements of 16 bytes, and those of a tile's row in shared memory: one chunk more than D, so that the eight rows that
// are read at a time lie in different banks.
template <class T> constexpr int chunk = 16 / (int)sizeof(T);
template <class T, int D> constexpr int stride = D + chunk<T>;

// Rows of one head in global memory: row i < count begins at base + i * ld; those behind it are zeros.
template <class T> struct Rows {
    const T *base;
    size_t ld;
    int count;
    __device__ __forceinline__ const T *operator()(int row) const { return row < count ? base + row * ld : nullptr; }
};

// Starts the copy of ROWS rows into a tile of D columns, zeros from head_dim on. `row_at(i)` is row i or null.
template <class T, int D, int ROWS, int THREADS, class RowAt>
__device__ __forceinline__ void copy_tile(T *tile, RowAt row_at, int head_dim, bool aligned) {
    constexpr int CHUNK = chunk<T>, CHUNKS = D / CHUNK, STEP = THREADS / CHUNKS;
    int column = threadIdx.x % CHUNKS * CHUNK;
#pragma unroll 2
    for (int row = threadIdx.x / CHUNKS; row < ROWS && threadIdx.x < STEP * CHUNKS; row += STEP) {
        const T *from = row_at(row);
        T *to = tile + row * stride<T, D> + column;
        int left = from == nullptr ? 0 : head_dim - column;
        if (aligned) cp_async16(to, left > 0 ? from + column : nullptr, left > 0 ? 16 : 0);
        else
            for (int j = 0; j < CHUNK; j++) to[j] = j < left ? from[column + j] : T{};
    }
}

// Whether 16 bytes of elements have one that is not finite; makes these zero if `clear`.
template <class T> __device__ __forceinline__ bool has_not_finite(T *chunk_of_16, bool clear) {
    constexpr uint32_t EXPONENT = sizeof(T) == 2 ? 0x7f807f80u : 0x7f800000u;
    constexpr uint32_t ONE = EXPONENT & (EXPONENT ^ EXPONENT << 1); // its lowest bit
    const uint32_t *words = reinterpret_cast<const uint32_t *>(chunk_of_16);
    uint32_t found = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) found |= (words[j] & EXPONENT) + ONE;
    if ((found & ~EXPONENT & EXPONENT << 1) == 0) return false;
    for (int j = 0; clear && j < chunk<T>; j++)
        if (!(fabsf(to_float(chunk_of_16[j])) <= 3.402823466e38f)) chunk_of_16[j] = T{};
    return true;
}

// Marks in `bad` the rows of a tile that have elements which are not finite, and makes these zero if `clear`. Each
// thread looks at what it copied itself, so no barrier is needed before, but `bad` has to be zero.
template <class T, int D, int ROWS, int THREADS>
__device__ __forceinline__ void find_not_finite(T *tile, uint32_t *bad, bool clear) {
    constexpr int CHUNKS = D / chunk<T>, STEP = THREADS / CHUNKS;
    for (int row = threadIdx.x / CHUNKS; row < ROWS && threadIdx.x < STEP * CHUNKS; row += STEP)
        if (has_not_finite(tile + row * stride<T, D> + threadIdx.x % CHUNKS * chunk<T>, clear))
            atomicOr(bad + row / 32, 1u << row % 32);
}

// s = a b^T over D columns: `a` at this warp's first row, N rows of b. Fused multiply-adds in f32.
template <int D, int MT, int N>
__device__ __forceinline__ void multiply_rows(float (&s)[MT][N / 8][4], const bf16 *a, const bf16 *b) {
    constexpr int LD = stride<bf16, D>;
    int lane = lane_index();
    const bf16 *a_row = a + lane % 16 * LD + lane / 16 * 8;
    const bf16 *b_row = b + (lane / 16 * 8 + lane % 8) * LD + lane / 8 % 2 * 8;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[m][n][e] = 0.0f;
#pragma unroll
    for (int k = 0; k < D; k += 16) {
        uint32_t left[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) ldmatrix_x4(left[m], a_row + m * 16 * LD + k);
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            uint32_t right[4];
            ldmatrix_x4(right, b_row + n * 16 * LD + k);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma_bf16(s[m][2 * n], left[m], right);
                mma_bf16(s[m][2 * n + 1], left[m], right + 2);
            }
        }
    }
}
template <int D, int MT, int N>
__device__ __forceinline__ void multiply_rows(float (&s)[MT][N / 8][4], const float *a, const float *b) {
    static_assert(MT == 1, "f32 has 16 rows a warp");
    constexpr int LD = stride<float, D>;
    const float *a_row = a + lane_index() / 4 * LD, *b_row = b + lane_index() % 4 * 2 * LD;
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[0][n][e] = 0.0f;
#pragma unroll 1
    for (int k = 0; k < D; k += 4) {
        float4 left[2] = {*(const float4 *)(a_row + k), *(const float4 *)(a_row + 8 * LD + k)};
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float4 right = *(const float4 *)(b_row + (8 * n + e) * LD + k);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float &sum = s[0][n][2 * half + e];
                    sum = fmaf(left[half].x, right.x, sum);
                    sum = fmaf(left[half].y, right.y, sum);
                    sum = fmaf(left[half].z, right.z, sum);
                    sum = fmaf(left[half].w, right.w, sum);
                }
            }
    }
}

// The left operand [16 MT, K] of a product, made of an accumulator: bf16 fragments in registers, or f32 in shared memory
// that this warp alone uses.
template <class T, int MT, int K> struct Left;
template <int MT, int K> struct Left<bf16, MT, K> {
    static constexpr int SHARED_FLOATS = 0; // a warp's
    uint32_t a[MT][K / 16][4];

    __device__ __forceinline__ void set(const float (&x)[MT][K / 8][4], float *) {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int k = 0; k < K / 16; k++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float *pair = &x[m][2 * k + i / 2][i % 2 * 2];
                    a[m][k][i] = pack_bf16(pair[0], pair[1]);
                }
    }
    // The element at row 16 m + g + 8 half, the same column for the whole warp.
    __device__ __forceinline__ float at(int m, int half, int column) const {
        uint32_t word = 0;
#pragma unroll
        for (int i = 0; i < K / 8; i++)
            word = lop3<0xea>(i == column / 8 ? ~0u : 0u, a[m][i / 2][i % 2 * 2 + half], word); // a & b | c
        word = __shfl_sync(ALL_LANES, word, (lane_index() & 28) | (column % 8 / 2));
        return to_float(bf16{(uint16_t)(column % 2 ? word >> 16 : word)});
    }
};
template <int K> struct Left<float, 1, K> {
    static constexpr int LD = K + 4, SHARED_FLOATS = 16 * LD;
    const float *rows;

    __device__ __forceinline__ void set(const float (&x)[1][K / 8][4], float *shared) {
        int lane = lane_index();
        __syncwarp(); // others may still read the last one
#pragma unroll
        for (int n = 0; n < K / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) shared[(lane / 4 + e / 2 * 8) * LD + 8 * n + lane % 4 * 2 + e % 2] = x[0][n][e];
        __syncwarp();
        rows = shared + lane / 4 * LD;
    }
    __device__ __forceinline__ float at(int, int half, int column) const { return rows[half * 8 * LD + column]; }
};

// x += left b, where b is columns `column` and on of a tile of K rows.
template <int D, int MT, int K, int NT>
__device__ __forceinline__ void multiply_add(float (&x)[MT][NT][4], const Left<bf16, MT, K> &left, const bf16 *tile,
                                             int column) {
    constexpr int LD = stride<bf16, D>;
    const bf16 *row = tile + lane_index() % 16 * LD + column + lane_index() / 16 * 8;
#pragma unroll
    for (int k = 0; k < K / 16; k++)
#pragma unroll
        for (int n = 0; n < NT / 2; n++) {
            uint32_t right[4];
            ldmatrix_x4_trans(right, row + k * 16 * LD + n * 16);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma_bf16(x[m][2 * n], left.a[m][k], right);
                mma_bf16(x[m][2 * n + 1], left.a[m][k], right + 2);
            }
        }
}
template <int D, int MT, int K, int NT>
__device__ __forceinline__ void multiply_add(float (&x)[MT][NT][4], const Left<float, MT, K> &left, const float *tile,
                                             int column) {
    constexpr int LD = stride<float, D>;
    const float *row = tile + column + lane_index() % 4 * 2;
#pragma unroll 1
    for (int k = 0; k < K; k++) {
        float a[2] = {left.rows[k], left.rows[8 * left.LD + k]};
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float2 b = *(const float2 *)(row + k * LD + 8 * n);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                x[0][n][2 * half] = fmaf(a[half], b.x, x[0][n][2 * half]);
                x[0][n][2 * half + 1] = fmaf(a[half], b.y, x[0][n][2 * half + 1]);
            }
        }
    }
}

// x += factor left b for the elements of b that find_not_finite took out of the tile; b's rows are those of `row_at`,
// and x's column 0 is b's `column`. `sees(m, half, k)`: whether x's row may see b's row k, of which the tile knows nothing.
template <class T, int MT, int K, int NT, class RowAt, class Sees>
__device__ __forceinline__ void add_not_finite(float (&x)[MT][NT][4], const Left<T, MT, K> &left,
                                               const float (&factor)[MT][2], const uint32_t *bad, RowAt row_at,
                                               int column, int head_dim, Sees sees) {
    int lane = lane_index();
    for (int k = 0; k < K; k++) {
        if (!(bad[k / 32] >> k % 32 & 1)) continue;
        const T *row = row_at(k);
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float a = left.at(m, half, k);
                bool seen = sees(m, half, k);
                // Through a shuffle, lest the compiler keep every column's address in a register all the time.
                int first = __shfl_sync(ALL_LANES, column + lane % 4 * 2, lane);
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    __syncwarp(); // and not all columns' loads are under way at once
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        int c = first + 8 * n + e;
                        float b = seen && c < head_dim ? to_float(row[c]) : 0.0f;
                        if (!(fabsf(b) <= 3.402823466e38f)) x[m][n][2 * half + e] += factor[m][half] * (a * b);
                    }
                }
            }
    }
}

// Scores are exponents of this base: 2 in bf16, where the chip's own 2^x is exact enough, e in f32.
template <class T> __device__ constexpr float log_base() { return sizeof(T) == 2 ? 1.44269504088896341f : 1.0f; }
template <class T> __device__ __forceinline__ float exponential(float x) {
    return sizeof(T) == 2 ? exp2_approx(x) : exp_f32(x);
}

// tanh within a few units in the last place: tanh_f32 without its division, whose code is long.
__device__ __forceinline__ float tanh_approx(float x) {
    float a = fabsf(x), near = tanh_near(x);
    float far = fmaf(reciprocal_approx(exp2_approx(a * 2.88539008177792681f) + 1.0f), -2.0f, 1.0f);
    return a < 0.625f ? near : copy_sign(far, x);
}

// Whether the query at `position`, counted as the keys are, sees a key.
__device__ __forceinline__ bool is_visible(int key, int position, int window) {
    return key <= position && key > position - window;
}

// Two neighbouring elements of a row of a head.
template <class T>
__device__ __forceinline__ void store_pair(T *row, int column, int head_dim, bool aligned, float low, float high) {
    if (aligned) {
        if (column >= head_dim) return;
        if constexpr (sizeof(T) == 2) {
            uint32_t bits = from_float<T>(high).bits;
            *(uint32_t *)(row + column) = bits << 16 | from_float<T>(low).bits;
        } else *(float2 *)(row + column) = make_float2(low, high);
        return;
    }
    if (column < head_dim) row[column] = from_float<T>(low);
    if (column + 1 < head_dim) row[column + 1] = from_float<T>(high);
}

#endif
