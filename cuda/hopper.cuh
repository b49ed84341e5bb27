// Wrappers for sm_90a (Hopper): mbarriers, TMA, wgmma, clusters, each with its host twin (cuda/host/hopper.h). A
// kernel that uses them is for sm_90a alone: it compiles for other chips too, and traps there.
//
// Asynchronous operations land as late as is legal on the host: a TMA copy when no thread can go on without it, a
// wgmma when its warp waits for it, its accumulators being NaN meanwhile. With threads in random order copies also
// land at once. A missing fence_proxy_async between ordinary writes to shared memory and TMA or wgmma shows where no
// thread at all has fenced; the host doesn't see which of them did.
#ifndef LOWRANK_HOPPER_CUH
#define LOWRANK_HOPPER_CUH

#include "ptx.cuh"
#include "tensor_map.h"

#ifdef LOWRANK_HOST
#include "host/hopper.h"
#define HOPPER_PTX(...)
#define HOPPER_CHIP 1
#elif !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER_PTX(...) asm volatile(__VA_ARGS__)
#define HOPPER_CHIP 1
#else
// Compiled for another chip, a kernel over these wrappers exists and traps: no one may launch it there.
#define HOPPER_PTX(...) __trap()
#define HOPPER_CHIP 0
#endif

// ---- mbarriers: 8 bytes of shared memory, 8-byte aligned ----
// A phase ends when `count` arrivals have come and as many bytes as were expected; phases have parity 0, 1, 0, ...

__device__ __forceinline__ void mbarrier_init(uint64_t *barrier, unsigned count) {
    HOPPER_PTX("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
    HOST(host::mbarrier_init(barrier, count));
}
// Makes initialised barriers visible to TMA and to the cluster; a barrier of the threads must follow.
__device__ __forceinline__ void fence_mbarrier_init() {
    HOPPER_PTX("fence.mbarrier_init.release.cluster;" :: : "memory");
    HOST(host::fence_mbarrier_init());
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t *barrier) {
    HOPPER_PTX("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
    HOST(host::mbarrier_arrive(barrier, 0, host::own_block));
}
// Arrives, and lets the phase wait for `bytes` more, which TMA brings.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t *barrier, unsigned bytes) {
    HOPPER_PTX("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes) : "memory");
    HOST(host::mbarrier_arrive(barrier, bytes, host::own_block));
}
// Arrives at the same barrier of block `rank` of the cluster, behind what this thread and its wgmmas have read: a copy that
// is started because of it may overwrite that. Ordinary writes it orders within the own block alone, as CUTLASS's
// ClusterBarrier::arrive does: release at the cluster's scope is a fence of the whole device's memory (MEMBAR.GPU).
__device__ __forceinline__ void mbarrier_arrive_remote(uint64_t *barrier, unsigned rank) {
    HOPPER_PTX("{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
        "}" ::"r"(shared_address(barrier)), "r"(rank) : "memory");
    HOST(host::mbarrier_arrive(barrier, 0, rank));
}
// Waits for the end of the phase of this parity; a new barrier counts as one whose phase of parity 1 has ended.
__device__ __forceinline__ void mbarrier_wait(uint64_t *barrier, unsigned parity SITE) {
    HOPPER_PTX("{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
    HOST(host::mbarrier_wait(barrier, parity, site));
}

// Where in the ring a thread is.
struct Stage {
    unsigned stages, slot = 0, parity = 0;

    __device__ __forceinline__ explicit Stage(unsigned stages) : stages(stages) {}
    __device__ __forceinline__ void advance() {
        if (++slot == stages) slot = 0, parity ^= 1;
    }
    __device__ __forceinline__ unsigned slot_before() const { return (slot ? slot : stages) - 1; }
};

// ---- TMA: one thread starts a copy of a box ---- Coordinates are of the box's first element, innermost dimension
// first; elements outside of the tensor are read as zeros and not written. In shared memory a box is dense,
// innermost first, 128-byte aligned; with a swizzle of 32, 64 or 128 bytes its innermost dimension has just that
// size and 16-byte chunks change places: address bits 4 to 4 + n are those of the dense box xor bits 7 to 7 + n (n
// = 1, 2, 3 bits). Start boxes at multiples of 1024 bytes then.

// The tensor's box to shared memory; its bytes are counted by the mbarrier.
__device__ __forceinline__ void tma_load_2d(void *shared, const tensor_map *map, uint64_t *barrier, int x, int y) {
    HOPPER_PTX(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
            "r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y) : "memory");
    HOST(host::tma_load(shared, map, barrier, 0, {x, y}));
}
__device__ __forceinline__ void tma_load_3d(void *shared, const tensor_map *map, uint64_t *barrier, int x, int y,
                                            int z) {
    HOPPER_PTX("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
               "%5}], [%2];" ::"r"(shared_address(shared)),
               "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z) : "memory");
    HOST(host::tma_load(shared, map, barrier, 0, {x, y, z}));
}
// To the same place in every block of the cluster whose rank is a bit of `blocks`, counted by each one's own barrier.
__device__ __forceinline__ void tma_load_2d_multicast(void *shared, const tensor_map *map, uint64_t *barrier, int x,
                                                      int y, uint16_t blocks) {
    HOPPER_PTX("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(blocks)
        : "memory");
    HOST(host::tma_load(shared, map, barrier, blocks, {x, y}));
}
// `bytes` contiguous ones, a multiple of 16, both addresses 16-byte aligned.
__device__ __forceinline__ void bulk_load(void *shared, const void *global, unsigned bytes, uint64_t *barrier) {
    HOPPER_PTX("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
    HOST(host::bulk_load(shared, global, bytes, barrier));
}
// Shared memory to the tensor's box; threads that wrote it fence_proxy_async() first.
__device__ __forceinline__ void tma_store_2d(const tensor_map *map, const void *shared, int x, int y) {
    HOPPER_PTX("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
        "r"(shared_address(shared)), "r"(x), "r"(y)
        : "memory");
    HOST(host::tma_store(map, shared, {x, y}));
}
__device__ __forceinline__ void tma_store_3d(const tensor_map *map, const void *shared, int x, int y, int z) {
    HOPPER_PTX("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
        "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z)
        : "memory");
    HOST(host::tma_store(map, shared, {x, y, z}));
}
// Ends a group of this thread's stores, and waits until at most the N latest groups still read shared memory.
__device__ __forceinline__ void tma_store_commit() {
    HOPPER_PTX("cp.async.bulk.commit_group;" ::: "memory");
    HOST(host::tma_store_commit());
}
template <int N> __device__ __forceinline__ void tma_store_wait() {
    HOPPER_PTX("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
    HOST(host::tma_store_wait(N));
}
__device__ __forceinline__ void tma_prefetch([[maybe_unused]] const tensor_map *map) {
    HOPPER_PTX("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Orders this thread's ordinary accesses to shared memory before TMA's and wgmma's that follow a barrier.
__device__ __forceinline__ void fence_proxy_async() {
    HOPPER_PTX("fence.proxy.async.shared::cta;" ::: "memory");
    HOST(host::fence_proxy_async());
}

// ---- Clusters ----
__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank = 0;
    HOPPER_PTX("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    HOST(rank = host::cluster_rank());
    return rank;
}
__device__ __forceinline__ unsigned cluster_blocks() {
    unsigned blocks = 0;
    HOPPER_PTX("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    HOST(blocks = host::cluster_blocks());
    return blocks;
}
// All threads of the cluster: arrive, and wait for the others.
__device__ __forceinline__ void cluster_arrive() {
    HOPPER_PTX("barrier.cluster.arrive.release.aligned;" ::: "memory");
    HOST(host::cluster_arrive());
}
__device__ __forceinline__ void cluster_wait(SITE_ALONE) {
    HOPPER_PTX("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    HOST(host::cluster_wait(site));
}
// 16 bytes from the same place in shared memory of block `rank` of the cluster.
__device__ __forceinline__ float4 load_remote(const float4 *shared, unsigned rank) {
    float4 v;
    HOPPER_PTX("{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n"
        "}" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(shared_address(shared)), "r"(rank) : "memory");
    HOST(v = host::load_remote(shared, rank));
    return v;
}

// ---- Warps ----
// True in one lane of the warp.
__device__ __forceinline__ bool elect_one(SITE_ALONE) {
    uint32_t elected = 0;
    HOPPER_PTX("{\n"
        ".reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(elected)::"memory");
    HOST(elected = host::elect_one(site));
    return elected != 0;
}
// Registers of a thread from here on, all four warps of a warpgroup together; a multiple of 8.
template <int registers> __device__ __forceinline__ void more_registers(SITE_ALONE) {
    static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256, "24 to 256 in steps of 8");
    HOPPER_PTX("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
    HOST(host::set_registers(registers, true, site));
}
template <int registers> __device__ __forceinline__ void fewer_registers(SITE_ALONE) {
    static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256, "24 to 256 in steps of 8");
    HOPPER_PTX("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
    HOST(host::set_registers(registers, false, site));
}
// The reverse of ldmatrix_x4: stores four 8 x 8 matrices to the rows that the lanes name.
__device__ __forceinline__ void stmatrix_x4(void *row, const uint32_t r[4] SITE) {
    HOPPER_PTX("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
    HOST(host::stmatrix("stmatrix_x4", row, r, false, site));
}
__device__ __forceinline__ void stmatrix_x4_trans(void *row, const uint32_t r[4] SITE) {
    HOPPER_PTX("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
    HOST(host::stmatrix("stmatrix_x4_trans", row, r, true, site));
}

#include "wgmma.cuh"

#endif
