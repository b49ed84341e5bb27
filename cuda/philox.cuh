// Philox4x32-10, the crate's source of random words; see src/rng.rs.
#ifndef LOWRANK_PHILOX_CUH
#define LOWRANK_PHILOX_CUH

#include "kernel.cuh"

// The four words of a key at a counter.
__device__ __forceinline__ void philox(uint32_t (&word)[4], uint64_t counter, uint32_t key0, uint32_t key1) {
    word[0] = (uint32_t)counter;
    word[1] = (uint32_t)(counter >> 32);
    word[2] = word[3] = 0;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)word[0] * 0xD2511F53u, b = (uint64_t)word[2] * 0xCD9E8D57u;
        word[0] = (uint32_t)(b >> 32) ^ word[1] ^ key0;
        word[2] = (uint32_t)(a >> 32) ^ word[3] ^ key1;
        word[1] = (uint32_t)b;
        word[3] = (uint32_t)a;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

#endif
