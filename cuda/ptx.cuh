// Inline assembly for sm_80 and up (hopper.cuh has sm_90a's): all of it is here, each wrapper with its host twin
// (cuda/host/ptx.h), so a kernel that keeps to these wrappers also runs on the host.
//
// Fragments of a warp's matrices (PTX ISA, "Matrix Fragments"). With g = lane / 4 and t = lane % 4, a 32-bit register
// of 16-bit elements holds two neighbours, the lower index in the lower half:
//   m16n8k16  A [16, 16]  a[0] = (g, 2t..2t+1)  a[1] = (g + 8, 2t..)  a[2] = (g, 2t + 8..)  a[3] = (g + 8, 2t + 8..)
//             B [16, 8]   b[0] = (k = 2t..2t+1, n = g)  b[1] = (k = 2t + 8.., n = g)
//   m16n8k8   A [16, 8]   a[0] = (g, t)  a[1] = (g + 8, t)  a[2] = (g, t + 4)  a[3] = (g + 8, t + 4)  (tf32)
//             B [8, 8]    b[0] = (k = t, n = g)  b[1] = (k = t + 4, n = g)
//   m16n8k32  A [16, 32]  a[0] = (g, 4t..4t+3)  a[1] = (g + 8, 4t..)  a[2] = (g, 4t + 16..)  a[3] = (g + 8, 4t + 16..)
//             B [32, 8]   b[0] = (k = 4t..4t+3, n = g)  b[1] = (k = 4t + 16.., n = g)  (bytes)
//   all       D [16, 8]   d[0..1] = (g, 2t..2t+1)  d[2..3] = (g + 8, 2t..2t+1)
// ldmatrix loads 8 x 8 matrices of 16-bit elements, whose rows are 16 bytes: lane l gives the address of row l % 8 of
// matrix l / 8, and r[i] gets (g, 2t..2t+1) of matrix i, or, transposed, (2t..2t+1, g). So the four matrices
//   [0..8, 0..8], [8..16, 0..8], [0..8, 8..16], [8..16, 8..16]  of a row-major A are m16n8k16's A,
//   [n, 0..8], [n, 8..16]                                       of a B stored [n, k] are its B,
//   [0..8, n], [8..16, n], transposed                           of a B stored [k, n] are its B.
#ifndef LOWRANK_PTX_CUH
#define LOWRANK_PTX_CUH

#include "kernel.cuh"

#ifdef LOWRANK_HOST
#include "host/ptx.h"
#define PTX(...)
#define PURE_PTX(...)
#define HOST(...) __VA_ARGS__
// The place in the kernel's source, for messages: the last parameter of what a thread can wait at.
#define SITE , SITE_ALONE
#define SITE_ALONE host::Site site = host::Site::here()
#else
#define PTX(...) asm volatile(__VA_ARGS__)
#define PURE_PTX(...) asm(__VA_ARGS__)
#define HOST(...)
#define SITE
#define SITE_ALONE
// The 32-bit address of shared memory.
__device__ __forceinline__ uint32_t shared_address(const void *shared) {
    return (uint32_t)__cvta_generic_to_shared(shared);
}
#endif

// Starts a copy of 16 bytes (both addresses 16-byte aligned) past L1; of them valid_bytes are read, the others
// become 0. It has happened for this thread when cp_async_wait says so, for others after a barrier that follows.
__device__ __forceinline__ void cp_async16(void *shared, const void *global, unsigned valid_bytes = 16) {
    PTX("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid_bytes)
        : "memory");
    HOST(host::cp_async(shared, global, 16, valid_bytes));
}
// The same for 8 and for 4 bytes, for rows that are not 16-byte aligned.
__device__ __forceinline__ void cp_async8(void *shared, const void *global, unsigned valid_bytes = 8) {
    PTX("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid_bytes)
        : "memory");
    HOST(host::cp_async(shared, global, 8, valid_bytes));
}
__device__ __forceinline__ void cp_async4(void *shared, const void *global, unsigned valid_bytes = 4) {
    PTX("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid_bytes)
        : "memory");
    HOST(host::cp_async(shared, global, 4, valid_bytes));
}
// Ends a group of copies.
__device__ __forceinline__ void cp_async_commit() {
    PTX("cp.async.commit_group;" ::: "memory");
    HOST(host::cp_async_commit());
}
// Waits until at most the N latest groups of this thread are under way.
template <int N> __device__ __forceinline__ void cp_async_wait() {
    PTX("cp.async.wait_group %0;" ::"n"(N) : "memory");
    HOST(host::cp_async_wait(N));
}

// 8 x 8 matrices from shared memory (above); every lane of the warp takes part. With fewer than four matrices the
// addresses of the first 8 or 16 lanes count; the others must be valid too.
__device__ __forceinline__ void ldmatrix_x4(uint32_t r[4], const void *row SITE) {
    PTX("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(shared_address(row))
        : "memory");
    HOST(host::ldmatrix("ldmatrix_x4", r, 4, row, false, site));
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t r[4], const void *row SITE) {
    PTX("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(shared_address(row))
        : "memory");
    HOST(host::ldmatrix("ldmatrix_x4_trans", r, 4, row, true, site));
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t r[2], const void *row SITE) {
    PTX("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
        : "=r"(r[0]), "=r"(r[1])
        : "r"(shared_address(row))
        : "memory");
    HOST(host::ldmatrix("ldmatrix_x2", r, 2, row, false, site));
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t r[2], const void *row SITE) {
    PTX("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
        : "=r"(r[0]), "=r"(r[1])
        : "r"(shared_address(row))
        : "memory");
    HOST(host::ldmatrix("ldmatrix_x2_trans", r, 2, row, true, site));
}

// d += a b over the warp, products exact, f32 accumulators. tf32 ignores the lower 13 bits of its f32 inputs.
__device__ __forceinline__ void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2] SITE) {
    PURE_PTX("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    HOST(host::mma_bf16(d, a, b, site));
}
__device__ __forceinline__ void mma_f16(float d[4], const uint32_t a[4], const uint32_t b[2] SITE) {
    PURE_PTX("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    HOST(host::mma_f16(d, a, b, site));
}
__device__ __forceinline__ void mma_tf32(float d[4], const uint32_t a[4], const uint32_t b[2] SITE) {
    PURE_PTX("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    HOST(host::mma_tf32(d, a, b, site));
}
// d = a b + c in whole numbers, of bytes without sign: a [16, 32], b [32, 8].
__device__ __forceinline__ void mma_u8(uint32_t d[4], const uint32_t a[4], const uint32_t b[2],
                                       const uint32_t c[4] SITE) {
    PURE_PTX("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
    HOST(host::mma_u8(d, a, b, c, site));
}

// Two floats rounded to nearest even, `low` in the lower half. A NaN becomes 0x7fff (from_float keeps its bits).
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    PURE_PTX("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    HOST(packed = host::pack<bf16>(low, high));
    return packed;
}
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
    uint32_t packed;
    PURE_PTX("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    HOST(packed = host::pack<f16>(low, high));
    return packed;
}
// The float's bits with the fraction rounded to tf32's 10 bits, ties away from zero.
__device__ __forceinline__ uint32_t tf32_bits(float x) {
    uint32_t bits;
    PURE_PTX("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    HOST(bits = host::tf32_bits(x));
    return bits;
}

// 2^x within two units in the last place; 0 for results below 2^-126. Chips may differ in the last bits.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    PURE_PTX("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    HOST(y = exp2f(x));
    return y;
}
// 1 / x within one unit in the last place; 0 for results below 2^-126.
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    PURE_PTX("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    HOST(y = 1.0f / x);
    return y;
}

// Hides where a number comes from, so that it stays in a register rather than being computed again at each use.
__device__ __forceinline__ void keep(uint32_t &x) {
    PTX("" : "+r"(x));
    HOST((void)x);
}

// Four bytes chosen from the eight of a (0 to 3) and b (4 to 7): each nibble of `selector`, lowest first, names one;
// a nibble with its bit 3 set replicates the sign of that byte instead.
__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t bytes;
    PURE_PTX("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
    HOST(bytes = host::prmt(a, b, selector));
    return bytes;
}
// Any bitwise function of three words: bit 4 a + 2 b + c of `table` is its value, so (0xf0 & 0xcc) | 0xaa is a & b
// | c.
template <int table> __device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t word;
    PURE_PTX("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(word) : "r"(a), "r"(b), "r"(c), "n"(table));
    HOST(word = host::lop3(a, b, c, table));
    return word;
}

// 16 bytes of memory that no one writes while the kernel runs, read once: they don't stay in L1, and, with
// evict_first, leave L2 before others.
__device__ __forceinline__ uint4 load128_once(const void *global) {
    uint4 v;
    PTX("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(global));
    HOST(v = host::load128(global));
    return v;
}
__device__ __forceinline__ uint64_t evict_first_policy() {
    uint64_t policy;
    PURE_PTX("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    HOST(policy = 0);
    return policy;
}
__device__ __forceinline__ uint4 load128_evict_first(const void *global, [[maybe_unused]] uint64_t policy) {
    uint4 v;
    PTX("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(global), "l"(policy));
    HOST(v = host::load128(global));
    return v;
}
// 16 bytes that stay in the caches, and 16 that are not read again soon.
__device__ __forceinline__ void store128(void *global, uint4 v) {
    PTX("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
    HOST(host::store128(global, v));
}
__device__ __forceinline__ void store128_once(void *global, uint4 v) {
    PTX("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.x), "r"(v.y), "r"(v.z),
        "r"(v.w) : "memory");
    HOST(host::store128(global, v));
}

// Named barriers, id 1 to 15 (0 is __syncthreads): `threads`, a multiple of 32, is how many come, those that only
// arrive included.
__device__ __forceinline__ void barrier_sync(unsigned id, unsigned threads SITE) {
    PTX("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
    HOST(host::barrier("barrier_sync", id, threads, true, site));
}
__device__ __forceinline__ void barrier_arrive(unsigned id, unsigned threads SITE) {
    PTX("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
    HOST(host::barrier("barrier_arrive", id, threads, false, site));
}

#endif
