// CUDA's names for g++: included before each .cu file when kernels are compiled for the host (LOWRANK_HOST).
// A name that is missing here is missing on purpose (floats have no atomics) or not needed yet.
#ifndef LOWRANK_HOST_CUDA_H
#define LOWRANK_HOST_CUDA_H
#define LOWRANK_HOST 1

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <type_traits>

#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) alignas(n)

// Vector types, aligned as CUDA's.
#define VECTOR_TYPES(element, name, alignment2, alignment4)                                                        \
    struct alignas(alignment2) name##2 { element x, y; };                                                          \
    struct name##3 { element x, y, z; };                                                                           \
    struct alignas(alignment4) name##4 { element x, y, z, w; };                                                    \
    inline constexpr name##2 make_##name##2(element x, element y) { return {x, y}; }                               \
    inline constexpr name##3 make_##name##3(element x, element y, element z) { return {x, y, z}; }                 \
    inline constexpr name##4 make_##name##4(element x, element y, element z, element w) { return {x, y, z, w}; }
VECTOR_TYPES(float, float, 8, 16)
VECTOR_TYPES(int, int, 8, 16)
VECTOR_TYPES(unsigned, uint, 8, 16)
VECTOR_TYPES(unsigned short, ushort, 4, 8)
VECTOR_TYPES(unsigned char, uchar, 2, 4)
#undef VECTOR_TYPES
struct dim3 {
    unsigned x, y, z;
};

namespace host {
// Where in a kernel's source an operation is.
struct Site {
    const char *file;
    int line;
    static constexpr Site here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

// What a thread can ask about itself. `self` is null outside of kernels.
struct BlockView {
    uint3 index;
    dim3 dim, grid;
};
struct ThreadView {
    uint3 index;
    unsigned lane; // in its warp
    const BlockView *block;
};
extern thread_local ThreadView *self __attribute__((tls_model("initial-exec")));

struct Registration {
    Registration(const char *name, size_t params_bytes, void (*run)(const void *), unsigned threads,
                 unsigned blocks = 0);
};

void *shared(const void *key, const char *name, size_t bytes);
unsigned char *dynamic_shared();

// Ends the launch with this message, the kernel, the block and the thread.
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

// An operation of the lanes in `mask`: each leaves a pointer, the last to come runs `compute` on all (null where
// there is no lane), then all go on.
typedef void (*Compute)(uint32_t mask, void *const *deposits);
void collective(const char *operation, uint32_t mask, void *deposit, Compute compute, Site site);

// Barrier `id` of the block: waits (or only arrives) for `threads` threads. 0 threads: all of the block.
void barrier(const char *operation, unsigned id, unsigned threads, bool wait, Site site);

struct Shuffle {
    uint64_t value, result;
    int source; // lane
};
void shuffle(const char *operation, uint32_t mask, Shuffle &shuffle, Site site);
uint32_t ballot(const char *operation, uint32_t mask, bool predicate, Site site);
int64_t reduce_add(uint32_t mask, int64_t value, Site site);

template <typename T>
T shuffle_from(const char *operation, uint32_t mask, T value, int source, Site site) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles take 32 or 64 bits");
    Shuffle shuffled{0, 0, source};
    memcpy(&shuffled.value, &value, sizeof(T));
    shuffle(operation, mask, shuffled, site);
    T result;
    memcpy(&result, &shuffled.result, sizeof(T));
    return result;
}
} // namespace host

#define threadIdx (::host::self->index)
#define blockIdx (::host::self->block->index)
#define blockDim (::host::self->block->dim)
#define gridDim (::host::self->block->grid)
#define warpSize 32

// Barriers.
inline void __syncthreads(host::Site site = host::Site::here()) { host::barrier("__syncthreads", 0, 0, true, site); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, host::Site site = host::Site::here()) {
    host::collective("__syncwarp", mask, nullptr, nullptr, site);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Warp shuffles: `width` splits the warp into segments; a lane out of its segment gives the own value.
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, host::Site site = host::Site::here()) {
    int lane = (int)host::self->lane;
    return host::shuffle_from("__shfl_sync", mask, value, (lane & -width) | (source & (width - 1)), site);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, host::Site site = host::Site::here()) {
    int lane = (int)host::self->lane, source = lane - (int)delta;
    return host::shuffle_from("__shfl_up_sync", mask, value, source < (lane & -width) ? lane : source, site);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, host::Site site = host::Site::here()) {
    int lane = (int)host::self->lane, source = lane + (int)delta;
    return host::shuffle_from("__shfl_down_sync", mask, value, source > (lane | (width - 1)) ? lane : source, site);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, host::Site site = host::Site::here()) {
    int lane = (int)host::self->lane, source = lane ^ lanes;
    return host::shuffle_from("__shfl_xor_sync", mask, value, source > (lane | (width - 1)) ? lane : source, site);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, host::Site site = host::Site::here()) {
    return host::ballot("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(uint32_t mask, int predicate, host::Site site = host::Site::here()) {
    return host::ballot("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, host::Site site = host::Site::here()) {
    return host::ballot("__all_sync", mask, predicate == 0, site) == 0;
}
inline int __reduce_add_sync(uint32_t mask, int value, host::Site site = host::Site::here()) {
    return (int)host::reduce_add(mask, value, site);
}
inline unsigned __reduce_add_sync(uint32_t mask, unsigned value, host::Site site = host::Site::here()) {
    return (unsigned)host::reduce_add(mask, value, site);
}

// Bits and integers.
inline uint32_t __float_as_uint(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
inline float __uint_as_float(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}
inline double __longlong_as_double(long long i) {
    double x;
    memcpy(&x, &i, 8);
    return x;
}
inline int __float_as_int(float x) { return (int)__float_as_uint(x); }
inline float __int_as_float(int i) { return __uint_as_float((uint32_t)i); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
inline int __mulhi(int a, int b) { return (int)((int64_t)a * b >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return (uint64_t)((unsigned __int128)a * b >> 64); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz((unsigned)x); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll((unsigned long long)x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
    return (uint32_t)((((uint64_t)high << 32 | low) << (shift & 31)) >> 32);
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return (uint32_t)(((uint64_t)high << 32 | low) >> (shift & 31));
}

// Floats, each operation rounded to nearest; conversions clamp, and NaN becomes 0, as on the device.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __int2float_rn(int i) { return (float)i; }
inline float __uint2float_rn(unsigned i) { return (float)i; }
inline int __float2int_rz(float x) {
    return x != x ? 0 : x >= 0x1p31f ? INT32_MAX : x <= -0x1p31f ? INT32_MIN : (int)x;
}
inline int __float2int_rn(float x) { return __float2int_rz(rintf(x)); }
inline int __float2int_rd(float x) { return __float2int_rz(floorf(x)); }
inline unsigned __float2uint_rz(float x) { return !(x > 0) ? 0 : x >= 0x1p32f ? UINT32_MAX : (unsigned)x; }
inline unsigned __float2uint_rn(float x) { return __float2uint_rz(rintf(x)); }
inline float __saturatef(float x) { return !(x > 0) ? 0.0f : x < 1 ? x : 1.0f; }

template <typename A, typename B> constexpr std::common_type_t<A, B> min(A a, B b) {
    typedef std::common_type_t<A, B> T;
    if constexpr (std::is_floating_point_v<T>) return (T)fmin((T)a, (T)b);
    else return (T)b < (T)a ? (T)b : (T)a;
}
template <typename A, typename B> constexpr std::common_type_t<A, B> max(A a, B b) {
    typedef std::common_type_t<A, B> T;
    if constexpr (std::is_floating_point_v<T>) return (T)fmax((T)a, (T)b);
    else return (T)a < (T)b ? (T)b : (T)a;
}

template <typename T> T __ldg(const T *p) { return *p; }
template <typename T> T __ldcs(const T *p) { return *p; }
template <typename T> void __stcs(T *p, T value) { *p = value; }
[[noreturn]] inline void __trap() { host::fail("__trap"); }

// Atomics on integers.
#define INTEGERS(T) std::enable_if_t<std::is_integral_v<T>, T>
template <typename T> INTEGERS(T) atomicAdd(T *p, std::common_type_t<T> x) {
    return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}
template <typename T> INTEGERS(T) atomicOr(T *p, std::common_type_t<T> x) {
    return __atomic_fetch_or(p, x, __ATOMIC_RELAXED);
}
template <typename T> INTEGERS(T) atomicAnd(T *p, std::common_type_t<T> x) {
    return __atomic_fetch_and(p, x, __ATOMIC_RELAXED);
}
template <typename T> INTEGERS(T) atomicExch(T *p, std::common_type_t<T> x) {
    return __atomic_exchange_n(p, x, __ATOMIC_RELAXED);
}
template <typename T> INTEGERS(T) atomicCAS(T *p, std::common_type_t<T> expected, std::common_type_t<T> x) {
    __atomic_compare_exchange_n(p, &expected, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}
template <typename T> INTEGERS(T) atomicMax(T *p, std::common_type_t<T> x) {
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (old < x && !__atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}
template <typename T> INTEGERS(T) atomicMin(T *p, std::common_type_t<T> x) {
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (x < old && !__atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}
#undef INTEGERS

#endif
