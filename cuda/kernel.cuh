// What every kernel includes first: how a kernel is declared, shared memory, and the 16-bit float types.
//
// A .cu file compiles twice: with nvcc, and with g++ for the executor that runs kernels on the host, in tests
// (cuda/host/, LOWRANK_HOST defined). It uses CUDA's own names (threadIdx, __syncthreads(), __shfl_xor_sync(), ...),
// the macros below instead of __global__ and __shared__, and the wrappers of ptx.cuh and hopper.cuh instead of
// inline assembly. Functions in headers are __forceinline__ or templates.
#ifndef LOWRANK_KERNEL_CUH
#define LOWRANK_KERNEL_CUH

#include <stdint.h>

#include "params.h"

// KERNEL(name, params_type, threads) { ... uses p ... }: a kernel with at most `threads` threads in a block and one
// argument, `const params_type p`. A fourth argument is the least number of blocks on a multiprocessor.
//
// SHARED(type, name, count); is a static shared array, 16-byte aligned.
// DYNAMIC_SHARED(name); is the launch's dynamic shared memory as unsigned char *, 1024-byte aligned.
// Both have undefined contents at first.
#ifdef LOWRANK_HOST
#define KERNEL(name, params_type, ...)                                                                             \
    static void name(const params_type &p);                                                                        \
    static const ::host::Registration registration_of_##name(                                                      \
        #name, sizeof(params_type), [](const void *p) { name(*static_cast<const params_type *>(p)); },             \
        __VA_ARGS__);                                                                                              \
    static void name([[maybe_unused]] const params_type &p)
#define SHARED(type, name, count)                                                                                  \
    static const char key_of_##name = 0;                                                                           \
    auto &name = *static_cast<type(*)[count]>(::host::shared(&key_of_##name, #name, sizeof(type) * (count)))
#define DYNAMIC_SHARED(name) unsigned char *const name = ::host::dynamic_shared()
#else
#define KERNEL(name, params_type, ...)                                                                             \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name(const __grid_constant__ params_type p)
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define DYNAMIC_SHARED(name)                                                                                       \
    extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];                                       \
    unsigned char *const name = dynamic_shared_memory
#endif

// The index of a thread in its block, of its warp, and of its lane in the warp.
__device__ __forceinline__ unsigned thread_index() {
    return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
__device__ __forceinline__ unsigned warp_index() { return thread_index() / 32; }
__device__ __forceinline__ unsigned lane_index() { return thread_index() % 32; }

// Sixteen-bit floats as they lie in memory.
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
__device__ __forceinline__ float to_float(f16 x) {
    uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, fraction = x.bits & 0x3ff;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13 | (fraction ? 0x400000u : 0));
    // Read as an f32 with the same bits of exponent, the value is 2^-112 of the true one: exact, zeros and
    // denormals too.
    return __uint_as_float(sign | exponent << 23 | fraction << 13) * 0x1p112f;
}

// The nearest value of a type, ties to even; a NaN stays a (quiet) NaN with its sign and upper bits.
template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    uint32_t u = __float_as_uint(x);
    uint32_t nan = (u >> 16) | 0x40, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return bf16{(uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}
template <> __device__ __forceinline__ f16 from_float<f16>(float x) {
    uint32_t u = __float_as_uint(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffffu, half;
    if (magnitude > 0x7f800000u) half = 0x7e00 | ((magnitude >> 13) & 0x3ff);
    else if (magnitude >= 0x477ff000u) half = 0x7c00; // 65520 and above
    else if (magnitude < 0x38800000u) {               // below 2^-14: the addition rounds to a multiple of 2^-24
        half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    } else half = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    return f16{(uint16_t)(sign | half)};
}

#endif
