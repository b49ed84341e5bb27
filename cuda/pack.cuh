// Eight elements at a time: how kernels on elements by themselves read and write.
#ifndef LOWRANK_PACK_CUH
#define LOWRANK_PACK_CUH

#include "kernel.cuh"

// Elements that a thread takes, and threads of a block that works on elements.
#define PACK 8
#define ELEMENT_THREADS 256

struct alignas(16) quad {
    uint32_t word[4];
};

__device__ __forceinline__ bool is_aligned16(const void *p) { return ((uintptr_t)p & 15) == 0; }

// x[j] = p[j] for j < left, else 0.
__device__ __forceinline__ void load_pack(float (&x)[PACK], const float *p, uint64_t left) {
    if (left >= PACK && is_aligned16(p)) {
        quad q[2] = {((const quad *)p)[0], ((const quad *)p)[1]};
#pragma unroll
        for (int j = 0; j < PACK; j++) x[j] = __uint_as_float(q[j / 4].word[j % 4]);
        return;
    }
#pragma unroll
    for (int j = 0; j < PACK; j++) x[j] = (uint64_t)j < left ? p[j] : 0.0f;
}

template <class T> __device__ __forceinline__ void load_pack(float (&x)[PACK], const T *p, uint64_t left) {
    if (left >= PACK && is_aligned16(p)) {
        quad q = *(const quad *)p;
#pragma unroll
        for (int j = 0; j < PACK; j++) x[j] = to_float(T{(uint16_t)(q.word[j / 2] >> (j % 2 * 16))});
        return;
    }
#pragma unroll
    for (int j = 0; j < PACK; j++) x[j] = (uint64_t)j < left ? to_float(p[j]) : 0.0f;
}

// The same from element `first` on of an array of this element_type.
__device__ __forceinline__ void load_pack_of(float (&x)[PACK], const void *p, uint64_t first, uint64_t left, int type) {
    if (type == TYPE_F32) load_pack(x, (const float *)p + first, left);
    else if (type == TYPE_BF16) load_pack(x, (const bf16 *)p + first, left);
    else load_pack(x, (const f16 *)p + first, left);
}

// p[j] = x[j] for j < left.
__device__ __forceinline__ void store_pack(float *p, const float (&x)[PACK], uint64_t left) {
    if (left >= PACK && is_aligned16(p)) {
        quad q[2];
#pragma unroll
        for (int j = 0; j < PACK; j++) q[j / 4].word[j % 4] = __float_as_uint(x[j]);
        ((quad *)p)[0] = q[0];
        ((quad *)p)[1] = q[1];
        return;
    }
#pragma unroll
    for (int j = 0; j < PACK; j++)
        if ((uint64_t)j < left) p[j] = x[j];
}

template <class T> __device__ __forceinline__ void store_pack(T *p, const float (&x)[PACK], uint64_t left) {
    if (left >= PACK && is_aligned16(p)) {
        quad q;
#pragma unroll
        for (int j = 0; j < PACK; j += 2)
            q.word[j / 2] = from_float<T>(x[j]).bits | (uint32_t)from_float<T>(x[j + 1]).bits << 16;
        *(quad *)p = q;
        return;
    }
#pragma unroll
    for (int j = 0; j < PACK; j++)
        if ((uint64_t)j < left) p[j] = from_float<T>(x[j]);
}

// The first element of this thread's pack.
__device__ __forceinline__ uint64_t pack_start() { return ((uint64_t)blockIdx.x * ELEMENT_THREADS + threadIdx.x) * PACK; }

#endif
