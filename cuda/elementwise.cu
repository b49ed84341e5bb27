// Operations on elements by themselves: filling, conversion, addition, activations, rotary embedding, dropout. They have
// the bits of cpu/elementwise.c. A thread takes a pack of eight neighbours.
#include "kernel.cuh"

#include "math.cuh"
#include "pack.cuh"
#include "philox.cuh"

#define SQRT_2_OVER_PI 0.7978845608028654f
#define GELU_CUBIC 0.044715f

__device__ __forceinline__ float activate(float x, int kind) {
    switch (kind) {
    case ACTIVATION_SILU: return x * sigmoid_f32(x);
    case ACTIVATION_GELU: return 0.5f * x * (1.0f + erf_f32(x * 0.7071067811865476f));
    case ACTIVATION_GELU_TANH: return 0.5f * x * (1.0f + tanh_f32(SQRT_2_OVER_PI * fmaf(GELU_CUBIC, x * x * x, x)));
    case ACTIVATION_TANH: return tanh_f32(x);
    case ACTIVATION_SIGMOID: return sigmoid_f32(x);
    default: return x < 0.0f ? 0.0f : x;
    }
}

__device__ __forceinline__ float derivative(float x, int kind) {
    switch (kind) {
    case ACTIVATION_SILU: {
        float s = sigmoid_f32(x);
        return s * fmaf(x, 1.0f - s, 1.0f);
    }
    case ACTIVATION_GELU: {
        float cdf = 0.5f * (1.0f + erf_f32(x * 0.7071067811865476f));
        float density = exp_f32(x * x * -0.5f) * 0.3989422804014327f;
        return fmaf(x, density, cdf);
    }
    case ACTIVATION_GELU_TANH: {
        float square = x * x;
        float t = tanh_f32(SQRT_2_OVER_PI * fmaf(GELU_CUBIC, square * x, x));
        float du = SQRT_2_OVER_PI * fmaf(3.0f * GELU_CUBIC, square, 1.0f);
        return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * du;
    }
    case ACTIVATION_TANH: {
        float t = tanh_f32(x);
        return 1.0f - t * t;
    }
    case ACTIVATION_SIGMOID: {
        float s = sigmoid_f32(x);
        return s * (1.0f - s);
    }
    default: return 0.0f < x ? 1.0f : 0.0f;
    }
}

// The pack of an operand of type T, and where it begins; `i` and `left` are the enclosing kernel's.
#define LOAD(name, from) \
    float name[PACK];    \
    load_pack(name, (const T *)(from) + i, left)
#define STORE(to, name) store_pack((T *)(to) + i, name, left)
#define EACH(j) _Pragma("unroll") for (int j = 0; j < PACK; j++)

// Declares the kernels of one operation, whose body is a function of element type T and the pack's place.
#define ELEMENT_KERNEL(name, params, T) \
    KERNEL(name, params, ELEMENT_THREADS) { \
        uint64_t i = pack_start(); \
        if (i < p.n) run<T>(p, i, p.n - i); \
    }
#define ACTIVATION_KERNELS(name) \
    ELEMENT_KERNEL(name##_f32, name##_params, float) \
    ELEMENT_KERNEL(name##_bf16, name##_params, bf16)

template <class T> __device__ __forceinline__ void run(const fill_params &p, uint64_t i, uint64_t left) {
    float x[PACK];
    EACH(j) x[j] = p.value;
    STORE(p.out, x);
}
ACTIVATION_KERNELS(fill)
ELEMENT_KERNEL(fill_f16, fill_params, f16)

template <class T, class From> __device__ __forceinline__ void run_cast(const cast_params &p) {
    uint64_t i = pack_start();
    if (i >= p.n) return;
    float x[PACK];
    load_pack(x, (const From *)p.x + i, p.n - i);
    store_pack((T *)p.out + i, x, p.n - i);
}
#define CAST_KERNEL(from, From, to, T) \
    KERNEL(cast_##from##_##to, cast_params, ELEMENT_THREADS) { run_cast<T, From>(p); }
CAST_KERNEL(f32, float, bf16, bf16)
CAST_KERNEL(f32, float, f16, f16)
CAST_KERNEL(bf16, bf16, f32, float)
CAST_KERNEL(bf16, bf16, f16, f16)
CAST_KERNEL(f16, f16, f32, float)
CAST_KERNEL(f16, f16, bf16, bf16)

template <class T> __device__ __forceinline__ void run(const add_params &p, uint64_t i, uint64_t left) {
    LOAD(a, p.a);
    LOAD(b, p.b);
    EACH(j) a[j] += b[j];
    STORE(p.out, a);
}
ACTIVATION_KERNELS(add)

template <class T> __device__ __forceinline__ void run(const scale_params &p, uint64_t i, uint64_t left) {
    LOAD(x, p.x);
    EACH(j) x[j] *= p.factor;
    STORE(p.x, x);
}
ACTIVATION_KERNELS(scale)

template <class T> __device__ __forceinline__ void run(const activation_params &p, uint64_t i, uint64_t left) {
    LOAD(x, p.x);
    EACH(j) x[j] = activate(x[j], p.kind);
    STORE(p.y, x);
}
ACTIVATION_KERNELS(activation)

template <class T> __device__ __forceinline__ void run(const activation_backward_params &p, uint64_t i, uint64_t left) {
    LOAD(dy, p.dy);
    LOAD(x, p.x);
    EACH(j) dy[j] *= derivative(x[j], p.kind);
    STORE(p.dx, dy);
}
ACTIVATION_KERNELS(activation_backward)

template <class T> __device__ __forceinline__ void run(const gated_params &p, uint64_t i, uint64_t left) {
    LOAD(gate, p.gate);
    LOAD(up, p.up);
    EACH(j) up[j] *= activate(gate[j], p.kind);
    STORE(p.y, up);
}
ACTIVATION_KERNELS(gated)

template <class T> __device__ __forceinline__ void run(const gated_backward_params &p, uint64_t i, uint64_t left) {
    LOAD(dy, p.dy);
    LOAD(gate, p.gate);
    LOAD(up, p.up);
    EACH(j) {
        float d = dy[j], g = gate[j];
        gate[j] = d * up[j] * derivative(g, p.kind);
        up[j] = d * activate(g, p.kind);
    }
    STORE(p.dup, up);
    STORE(p.dgate, gate);
}
ACTIVATION_KERNELS(gated_backward)

template <class T> __device__ __forceinline__ void run(const softcap_params &p, uint64_t i, uint64_t left) {
    LOAD(x, p.x);
    EACH(j) x[j] = p.cap * tanh_f32(x[j] / p.cap);
    STORE(p.x, x);
}
ELEMENT_KERNEL(softcap_f32, softcap_params, float)

template <class T> __device__ __forceinline__ void run(const softcap_backward_params &p, uint64_t i, uint64_t left) {
    float y[PACK];
    load_pack(y, p.y + i, left);
    LOAD(dx, p.dx);
    EACH(j) {
        float t = y[j] / p.cap;
        dx[j] *= 1.0f - t * t;
    }
    STORE(p.dx, dx);
}
ACTIVATION_KERNELS(softcap_backward)

template <class T> __device__ __forceinline__ void run(const rsqrt_params &p, uint64_t i, uint64_t left) {
    LOAD(x, p.x);
    EACH(j) x[j] = 1.0f / sqrtf(x[j]);
    STORE(p.out, x);
}
ELEMENT_KERNEL(rsqrt_f32, rsqrt_params, float)

template <class T> __device__ __forceinline__ void run(const dropout_params &p, uint64_t i, uint64_t left) {
    LOAD(x, p.x);
    float keep_scale = 1.0f / (1.0f - p.p);
    uint64_t first = p.first_element + i;
    uint32_t skip = (uint32_t)(first % 4), word[3][4]; // words of twelve elements from the one before `first` that 4 divides
#pragma unroll
    for (int k = 0; k < 3; k++) philox(word[k], first / 4 + k, p.key[0], p.key[1]);
    EACH(j) {
        uint32_t w = 0;
#pragma unroll
        for (int k = 0; k < 4; k++) w = skip == (uint32_t)k ? word[(j + k) / 4][(j + k) % 4] : w;
        x[j] = (float)(w >> 8) * 0x1p-24f < p.p ? 0.0f : x[j] * keep_scale;
    }
    if (p.accumulate) {
        LOAD(y, p.y);
        EACH(j) x[j] = y[j] + x[j];
    }
    STORE(p.y, x);
}
ACTIVATION_KERNELS(dropout)

// Pairs (a, b) by angles of which c are the cosines and s the sines.
__device__ __forceinline__ void turn(float (&a)[PACK], float (&b)[PACK], const float (&c)[PACK], const float (&s)[PACK],
                                     bool inverse) {
    EACH(j) {
        float x = a[j], y = b[j], sine = s[j] * (inverse ? -1.0f : 1.0f);
        a[j] = fmaf(-y, sine, x * c[j]);
        b[j] = fmaf(x, sine, y * c[j]);
    }
}

// A thread has a pack of neighbouring pairs of one head.
template <class T> __device__ __forceinline__ void rotate(const rope_params &p) {
    uint32_t n_heads = p.n_heads[blockIdx.y];
    uint32_t half = p.rotary_dim / 2, packs = (half + PACK - 1) / PACK, per_row = n_heads * packs;
    uint64_t i = (uint64_t)blockIdx.x * ELEMENT_THREADS + threadIdx.x;
    if (i >= p.rows * per_row) return;
    uint64_t row = i / per_row;
    uint32_t inside = (uint32_t)(i - row * per_row), head = inside / packs, pair = inside % packs * PACK, left = half - pair;
    int32_t position = p.positions[row];
    if (position < 0 || (uint32_t)position >= p.table_rows) {
        atomicOr(p.faults, FAULT_ROPE);
        return;
    }
    const float *table = p.table + (uint64_t)position * p.rotary_dim;
    float c[PACK], s[PACK], a[PACK], b[PACK];
    load_pack(c, table + pair, left);
    load_pack(s, table + half + pair, left);
    T *x = (T *)p.x[blockIdx.y] + (row * n_heads + head) * p.head_dim;
    if (p.interleaved) {
        float low[PACK], high[PACK] = {}; // pairs next to each other
        T *pairs = x + 2 * pair;
        uint32_t after = 2 * left > PACK ? 2 * left - PACK : 0;
        load_pack(low, pairs, 2 * left);
        if (after > 0) load_pack(high, pairs + PACK, after);
        EACH(j) {
            a[j] = j < PACK / 2 ? low[2 * j % PACK] : high[2 * j % PACK];
            b[j] = j < PACK / 2 ? low[2 * j % PACK + 1] : high[2 * j % PACK + 1];
        }
        turn(a, b, c, s, p.inverse);
        EACH(j) {
            if (j < PACK / 2) low[2 * j % PACK] = a[j], low[2 * j % PACK + 1] = b[j];
            else high[2 * j % PACK] = a[j], high[2 * j % PACK + 1] = b[j];
        }
        store_pack(pairs, low, 2 * left);
        if (after > 0) store_pack(pairs + PACK, high, after);
        return;
    }
    load_pack(a, x + pair, left);
    load_pack(b, x + half + pair, left);
    turn(a, b, c, s, p.inverse);
    store_pack(x + pair, a, left);
    store_pack(x + half + pair, b, left);
}
KERNEL(rope_f32, rope_params, ELEMENT_THREADS) { rotate<float>(p); }
KERNEL(rope_bf16, rope_params, ELEMENT_THREADS) { rotate<bf16>(p); }
