// What the wrappers of hopper.cuh and wgmma.cuh do on the host.
#ifndef LOWRANK_HOST_HOPPER_H
#define LOWRANK_HOST_HOPPER_H

#include <initializer_list>

#include "../kernel.cuh"
#include "../tensor_map.h"

// Shared memory has 32-bit addresses of its own in descriptors.
uint32_t shared_address(const void *shared);

namespace host {
constexpr unsigned own_block = ~0u;

void mbarrier_init(uint64_t *barrier, unsigned count);
void fence_mbarrier_init();
void mbarrier_arrive(uint64_t *barrier, unsigned expected_bytes, unsigned rank);
void mbarrier_wait(uint64_t *barrier, unsigned parity, Site site);

// `blocks` is a mask of ranks, or 0 for the own block.
void tma_load(void *shared, const tensor_map *map, uint64_t *barrier, uint16_t blocks, std::initializer_list<int> at);
void bulk_load(void *shared, const void *global, unsigned bytes, uint64_t *barrier);
void tma_store(const tensor_map *map, const void *shared, std::initializer_list<int> at);
void tma_store_commit();
void tma_store_wait(unsigned groups);

void fence_proxy_async();

unsigned cluster_rank();
unsigned cluster_blocks();
void cluster_arrive();
void cluster_wait(Site site);
float4 load_remote(const float4 *shared, unsigned rank);

bool elect_one(Site site);
void set_registers(unsigned count, bool more, Site site);
void stmatrix(const char *operation, void *row, const uint32_t *r, bool transposed, Site site);

struct Wgmma {
    int n;
    bool trans_a, trans_b, accumulate, a_in_registers;
    uint64_t a, b; // descriptors
    uint32_t registers[4];
};
void wgmma_fence(Site site);
void wgmma(const Wgmma &operation, float *d, Site site);
void wgmma_commit(Site site);
void wgmma_wait(unsigned groups, Site site);
} // namespace host

#endif
