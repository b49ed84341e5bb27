// What the wrappers of ptx.cuh do on the host.
#ifndef LOWRANK_HOST_PTX_H
#define LOWRANK_HOST_PTX_H

#include "../kernel.cuh"

namespace host {
// A thread's asynchronous copies. They land when the thread waits for them, as late as is legal; with threads in
// random order some land at once, which is legal too.
void cp_async(void *shared, const void *global, unsigned bytes, unsigned valid_bytes);
void cp_async_commit();
void cp_async_wait(unsigned groups);

void ldmatrix(const char *operation, uint32_t *r, unsigned matrices, const void *row, bool transposed, Site site);
void mma_bf16(float *d, const uint32_t *a, const uint32_t *b, Site site);
void mma_f16(float *d, const uint32_t *a, const uint32_t *b, Site site);
void mma_tf32(float *d, const uint32_t *a, const uint32_t *b, Site site);
void mma_u8(uint32_t *d, const uint32_t *a, const uint32_t *b, const uint32_t *c, Site site);

template <typename T> uint32_t pack(float low, float high) {
    uint32_t l = low == low ? from_float<T>(low).bits : 0x7fff, h = high == high ? from_float<T>(high).bits : 0x7fff;
    return h << 16 | l;
}
inline uint32_t tf32_bits(float x) {
    uint32_t u = __float_as_uint(x);
    if (x != x) return 0x7fffffff;
    return (u & 0x7fffffff) >= 0x7f800000 ? u : (u + 0x1000) & ~0x1fffu;
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t source = (uint64_t)b << 32 | a;
    uint32_t bytes = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t nibble = selector >> 4 * i & 15, byte = (uint32_t)(source >> 8 * (nibble & 7)) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0;
        bytes |= byte << 8 * i;
    }
    return bytes;
}
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, int table) {
    uint32_t word = 0;
    for (int i = 0; i < 8; i++)
        if (table >> i & 1) word |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return word;
}
inline void check_aligned(const void *p, unsigned bytes) {
    if ((uintptr_t)p % bytes) fail("address %p is not aligned to %u bytes", p, bytes);
}
inline uint4 load128(const void *global) {
    check_aligned(global, 16);
    return *static_cast<const uint4 *>(global);
}
inline void store128(void *global, uint4 v) {
    check_aligned(global, 16);
    *static_cast<uint4 *>(global) = v;
}
} // namespace host

#endif
