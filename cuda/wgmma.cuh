// wgmma for sm_90a: a warpgroup (four warps, the first one's index a multiple of 4) multiplies matrices in shared
// memory.
//
//   wgmma_bf16<N, trans_a, trans_b>(d, a, b, accumulate)   D [64, N] (+)= A [64, 16] B [16, N], N = 8, 16, ..., 256
//
// d [N / 2] of a thread: with w the warp in its group, g = lane / 4, t = lane % 4, d[4 j + i] is (row 16 w + g + 8
// (i / 2), column 8 j + 2 t + i % 2). a is a descriptor, or four registers laid out as mma_bf16's A with rows 16 w
// + g. b is a descriptor. The operation is asynchronous: wgmma_fence() before the first one after anything else
// touched d or a, wgmma_commit() after a group of them, wgmma_wait<n>() until at most the n latest groups are under
// way; before that d is not to be read.
//
// Descriptors (PTX ISA, "Matrix Descriptor"; "row" is an index of M or N). A tile is made of atoms of 8 rows, with
// the swizzle of TMA (see hopper.cuh), at multiples of 1024 bytes:
//   K-major (trans 0, k contiguous): a row of an atom has 32, 64 or 128 bytes (the swizzle); `stride` is the
//     distance of 8 rows and `leading` is ignored. Without a swizzle an atom is 8 rows of 16 bytes, and `leading`
//     is the distance from one such atom to that of the next 8 k. The next 16 k are 32 bytes further: advance the
//     address.
//   MN-major (trans 1, rows contiguous): a line of k has 16, 32 or 64 rows in its 32, 64 or 128 bytes, 8 lines make
//     an atom; `stride` is the distance to the next 8 k, `leading` that to the next 16, 32 or 64 rows. Without a
//     swizzle an atom is 8 lines of 16 bytes, `leading` is the distance to the next 8 k and `stride` that to the
//     next 8 rows.
#ifndef LOWRANK_WGMMA_CUH
#define LOWRANK_WGMMA_CUH

#include "hopper.cuh"

enum wgmma_swizzle { WGMMA_SWIZZLE_NONE, WGMMA_SWIZZLE_128, WGMMA_SWIZZLE_64, WGMMA_SWIZZLE_32 };

// A tile in shared memory, 16-byte aligned; distances in bytes, multiples of 16.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void *shared, unsigned leading, unsigned stride,
                                                     wgmma_swizzle swizzle) {
    return (shared_address(shared) & 0x3ffff) >> 4 | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 |
        (uint64_t)swizzle << 62;
}
// The same tile `bytes` further.
__device__ __forceinline__ uint64_t wgmma_advance(uint64_t descriptor, unsigned bytes) {
    return descriptor + (bytes >> 4);
}

__device__ __forceinline__ void wgmma_fence(SITE_ALONE) {
    HOPPER_PTX("wgmma.fence.sync.aligned;" ::: "memory");
    HOST(host::wgmma_fence(site));
}
__device__ __forceinline__ void wgmma_commit(SITE_ALONE) {
    HOPPER_PTX("wgmma.commit_group.sync.aligned;" ::: "memory");
    HOST(host::wgmma_commit(site));
}
template <int N> __device__ __forceinline__ void wgmma_wait(SITE_ALONE) {
    HOPPER_PTX("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
    HOST(host::wgmma_wait(N, site));
}

#ifdef LOWRANK_HOST
template <int N, int trans_a = 0, int trans_b = 0>
void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate SITE) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "N is a multiple of 8 up to 256");
    host::wgmma({N, trans_a != 0, trans_b != 0, accumulate, false, a, b, {}}, d, site);
}
template <int N, int trans_b = 0>
void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate SITE) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "N is a multiple of 8 up to 256");
    host::wgmma({N, false, trans_b != 0, accumulate, true, 0, b, {a[0], a[1], a[2], a[3]}}, d, site);
}
#else
// One shape each. Operands: %0 b, %1 accumulate, %2 to %5 a (a descriptor and three that are not used, or four
// registers), %6 and on d; only d changes, "+" of the others puts them before d, so that their numbers are the same
// for every shape.
template <int N> struct Wgmma;
#define WGMMA_R8 "%6, %7, %8, %9"
#define WGMMA_R16 WGMMA_R8 ", %10, %11, %12, %13"
#define WGMMA_R24 WGMMA_R16 ", %14, %15, %16, %17"
#define WGMMA_R32 WGMMA_R24 ", %18, %19, %20, %21"
#define WGMMA_R40 WGMMA_R32 ", %22, %23, %24, %25"
#define WGMMA_R48 WGMMA_R40 ", %26, %27, %28, %29"
#define WGMMA_R56 WGMMA_R48 ", %30, %31, %32, %33"
#define WGMMA_R64 WGMMA_R56 ", %34, %35, %36, %37"
#define WGMMA_R72 WGMMA_R64 ", %38, %39, %40, %41"
#define WGMMA_R80 WGMMA_R72 ", %42, %43, %44, %45"
#define WGMMA_R88 WGMMA_R80 ", %46, %47, %48, %49"
#define WGMMA_R96 WGMMA_R88 ", %50, %51, %52, %53"
#define WGMMA_R104 WGMMA_R96 ", %54, %55, %56, %57"
#define WGMMA_R112 WGMMA_R104 ", %58, %59, %60, %61"
#define WGMMA_R120 WGMMA_R112 ", %62, %63, %64, %65"
#define WGMMA_R128 WGMMA_R120 ", %66, %67, %68, %69"
#define WGMMA_R136 WGMMA_R128 ", %70, %71, %72, %73"
#define WGMMA_R144 WGMMA_R136 ", %74, %75, %76, %77"
#define WGMMA_R152 WGMMA_R144 ", %78, %79, %80, %81"
#define WGMMA_R160 WGMMA_R152 ", %82, %83, %84, %85"
#define WGMMA_R168 WGMMA_R160 ", %86, %87, %88, %89"
#define WGMMA_R176 WGMMA_R168 ", %90, %91, %92, %93"
#define WGMMA_R184 WGMMA_R176 ", %94, %95, %96, %97"
#define WGMMA_R192 WGMMA_R184 ", %98, %99, %100, %101"
#define WGMMA_R200 WGMMA_R192 ", %102, %103, %104, %105"
#define WGMMA_R208 WGMMA_R200 ", %106, %107, %108, %109"
#define WGMMA_R216 WGMMA_R208 ", %110, %111, %112, %113"
#define WGMMA_R224 WGMMA_R216 ", %114, %115, %116, %117"
#define WGMMA_R232 WGMMA_R224 ", %118, %119, %120, %121"
#define WGMMA_R240 WGMMA_R232 ", %122, %123, %124, %125"
#define WGMMA_R248 WGMMA_R240 ", %126, %127, %128, %129"
#define WGMMA_R256 WGMMA_R248 ", %130, %131, %132, %133"
#define WGMMA_D8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define WGMMA_D16 WGMMA_D8, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define WGMMA_D24 WGMMA_D16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define WGMMA_D32 WGMMA_D24, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define WGMMA_D40 WGMMA_D32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define WGMMA_D48 WGMMA_D40, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define WGMMA_D56 WGMMA_D48, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define WGMMA_D64 WGMMA_D56, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define WGMMA_D72 WGMMA_D64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define WGMMA_D80 WGMMA_D72, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define WGMMA_D88 WGMMA_D80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define WGMMA_D96 WGMMA_D88, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define WGMMA_D104 WGMMA_D96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define WGMMA_D112 WGMMA_D104, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define WGMMA_D120 WGMMA_D112, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define WGMMA_D128 WGMMA_D120, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define WGMMA_D136 WGMMA_D128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define WGMMA_D144 WGMMA_D136, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define WGMMA_D152 WGMMA_D144, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define WGMMA_D160 WGMMA_D152, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define WGMMA_D168 WGMMA_D160, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define WGMMA_D176 WGMMA_D168, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define WGMMA_D184 WGMMA_D176, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define WGMMA_D192 WGMMA_D184, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define WGMMA_D200 WGMMA_D192, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define WGMMA_D208 WGMMA_D200, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define WGMMA_D216 WGMMA_D208, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define WGMMA_D224 WGMMA_D216, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define WGMMA_D232 WGMMA_D224, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define WGMMA_D240 WGMMA_D232, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define WGMMA_D248 WGMMA_D240, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define WGMMA_D256 WGMMA_D248, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

#define WGMMA_SHAPE(N)                                                                                                 \
    template <> struct Wgmma<N> {                                                                                      \
        template <int trans_a, int trans_b>                                                                            \
        static __device__ __forceinline__ void shared(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {     \
            [[maybe_unused]] uint32_t x = 0, y = 0, z = 0;                                                             \
            if constexpr (trans_a == 0 && trans_b == 0) WGMMA_SHARED(N, "0", "0");                                     \
            else if constexpr (trans_a == 0) WGMMA_SHARED(N, "0", "1");                                                \
            else if constexpr (trans_b == 0) WGMMA_SHARED(N, "1", "0");                                                \
            else WGMMA_SHARED(N, "1", "1");                                                                            \
        }                                                                                                              \
        template <int trans_b>                                                                                         \
        static __device__ __forceinline__ void registers(float (&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2,     \
                                                         uint32_t a3, uint64_t b, int accumulate) {                    \
            if constexpr (trans_b == 0) WGMMA_REGISTERS(N, "0");                                                       \
            else WGMMA_REGISTERS(N, "1");                                                                              \
        }                                                                                                              \
    };
#define WGMMA_SHARED(N, TRANS_A, TRANS_B)                                                                              \
    HOPPER_PTX("{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n"                                                           \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_R##N "}, %2, %0, p, 1, 1, " TRANS_A  \
                 ", " TRANS_B ";\n}"                                                                                   \
                 : "+l"(b), "+r"(accumulate), "+l"(a), "+r"(x), "+r"(y), "+r"(z), WGMMA_D##N)
#define WGMMA_REGISTERS(N, TRANS_B)                                                                                    \
    HOPPER_PTX("{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n"                                                           \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_R##N                                 \
                 "}, {%2, %3, %4, %5}, %0, p, 1, 1, " TRANS_B ";\n}"                                                   \
                 : "+l"(b), "+r"(accumulate), "+r"(a0), "+r"(a1), "+r"(a2), "+r"(a3), WGMMA_D##N)
WGMMA_SHAPE(8) WGMMA_SHAPE(16) WGMMA_SHAPE(24) WGMMA_SHAPE(32) WGMMA_SHAPE(40) WGMMA_SHAPE(48) WGMMA_SHAPE(56) WGMMA_SHAPE(64)
WGMMA_SHAPE(72) WGMMA_SHAPE(80) WGMMA_SHAPE(88) WGMMA_SHAPE(96) WGMMA_SHAPE(104) WGMMA_SHAPE(112) WGMMA_SHAPE(120) WGMMA_SHAPE(128)
WGMMA_SHAPE(136) WGMMA_SHAPE(144) WGMMA_SHAPE(152) WGMMA_SHAPE(160) WGMMA_SHAPE(168) WGMMA_SHAPE(176) WGMMA_SHAPE(184) WGMMA_SHAPE(192)
WGMMA_SHAPE(200) WGMMA_SHAPE(208) WGMMA_SHAPE(216) WGMMA_SHAPE(224) WGMMA_SHAPE(232) WGMMA_SHAPE(240) WGMMA_SHAPE(248) WGMMA_SHAPE(256)

template <int N, int trans_a = 0, int trans_b = 0>
__device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    Wgmma<N>::template shared<trans_a, trans_b>(d, a, b, accumulate);
}
template <int N, int trans_b = 0>
__device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    Wgmma<N>::template registers<trans_b>(d, a[0], a[1], a[2], a[3], b, accumulate);
}
#endif

#endif
