// Quantizing blocks and dequantizing matrices, with the bits of cpu/quant.c.
#include "kernel.cuh"

#include "pack.cuh"
#include "quant.cuh"

#define QUANTIZE_THREADS 128 // a warp for each block of the matrix
#define LEAST_SCALE 1e-38f

// Where a block lies; flat blocks are one long row.
struct extent {
    uint64_t element, stride;
    uint32_t rows, cols;
};

__device__ __forceinline__ extent extent_of(const quantized_matrix &q, uint64_t block) {
    if (q.block_rows == 0) {
        uint64_t first = block * q.block_cols, left = q.rows * q.cols - first;
        return {first, 0, 1, (uint32_t)(left < q.block_cols ? left : q.block_cols)};
    }
    uint64_t row = block / q.blocks_per_row * q.block_rows, col = block % q.blocks_per_row * q.block_cols;
    uint64_t rows = q.rows - row < q.block_rows ? q.rows - row : q.block_rows;
    uint64_t cols = q.cols - col < q.block_cols ? q.cols - col : q.block_cols;
    return {row * q.cols + col, q.cols, (uint32_t)rows, (uint32_t)cols};
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, x, d);
        x = other > x ? other : x;
    }
    return x;
}

__device__ __forceinline__ float clamped(float x, float low, float high) { return fminf(fmaxf(x, low), high); }

// The nearest float of `fraction` bits of fraction, ties to even, saturating at `max`; see cpu/quant.c.
__device__ __forceinline__ uint32_t small_code(float x, int fraction, int bias, float least, float steps, int max) {
    uint32_t sign = (__float_as_uint(x) >> 24) & 0x80, u = __float_as_uint(fabsf(x));
    int drop = 23 - fraction;
    int normal = (int)((u + ((u >> drop) & 1) + ((1u << (drop - 1)) - 1)) >> drop) - ((127 - bias) << fraction);
    int code = fabsf(x) < least ? __float2int_rn(fabsf(x) * steps) : normal;
    return sign | (uint32_t)(code > max ? max : code);
}

__device__ __forceinline__ uint32_t code_of(const quantize_params &p, float x, float zero) {
    switch (p.q.format) {
    case CODES_4BIT: {
        if (!p.has_thresholds) return (uint32_t)clamped((float)__float2int_rn(x) + zero, 0.0f, 15.0f);
        uint32_t rank = 0;
#pragma unroll
        for (int i = 0; i < 15; i++) rank += p.thresholds[i] < x;
        return p.ranks[rank];
    }
    case CODES_INT8: return (uint32_t)(int)clamped((float)__float2int_rn(x), -127.0f, 127.0f) & 0xff;
    case CODES_E4M3: return small_code(x, 3, 7, 0x1p-6f, 0x1p9f, 0x7e);
    default: return small_code(x, 2, 15, 0x1p-14f, 0x1p16f, 0x7b);
    }
}

template <class T> __device__ __forceinline__ void quantize(const quantize_params &p) {
    const quantized_matrix &q = p.q;
    uint64_t block = (uint64_t)blockIdx.x * (QUANTIZE_THREADS / 32) + warp_index();
    uint32_t lane = lane_index();
    if (block >= p.blocks) return; // of a whole warp
    extent e = extent_of(q, block);
    const T *x = (const T *)p.x + e.element;
    float low = 0.0f, high = 0.0f;
    bool finite = true;
    for (uint32_t r = 0; r < e.rows; r++)
        for (uint32_t c = lane; c < e.cols; c += 32) {
            float v = to_float(x[r * e.stride + c]);
            finite = finite && v * 0.0f == 0.0f;
            low = v < low ? v : low;
            high = v > high ? v : high;
        }
    if (!__all_sync(0xffffffffu, finite)) {
        if (lane == 0) atomicOr(p.faults, FAULT_QUANTIZE);
        return;
    }
    float most = warp_max(high), least = -warp_max(-low);
    float absmax = fabsf(most > -least ? most : least);
    float scale = (q.zeros ? most - least : absmax) / p.max_level;
    float inverse = 1.0f / (scale > LEAST_SCALE ? scale : LEAST_SCALE);
    float zero = q.format == CODES_4BIT ? 8.0f : 0.0f;
    if (q.zeros) zero = (float)__float2int_rn(-least * inverse);
    if (lane == 0) {
        q.scales[block] = scale;
        if (q.zeros) q.zeros[block] = (uint8_t)zero;
    }
    // Two neighbours at a time: in formats of four bits they share a byte, and blocks begin at even elements.
    for (uint32_t r = 0; r < e.rows; r++)
        for (uint32_t c = 2 * lane; c < e.cols; c += 64) {
            uint64_t at = r * e.stride + c, element = e.element + at;
            bool both = c + 1 < e.cols;
            uint32_t first = code_of(p, to_float(x[at]) * inverse, zero);
            uint32_t second = code_of(p, (both ? to_float(x[at + 1]) : 0.0f) * inverse, zero);
            if (q.format == CODES_4BIT) {
                q.codes[element / 2] = (uint8_t)(first << 4 | second);
            } else {
                q.codes[element] = (uint8_t)first;
                if (both) q.codes[element + 1] = (uint8_t)second;
            }
        }
}
KERNEL(quantize_f32, quantize_params, QUANTIZE_THREADS) { quantize<float>(p); }
KERNEL(quantize_bf16, quantize_params, QUANTIZE_THREADS) { quantize<bf16>(p); }
KERNEL(quantize_f16, quantize_params, QUANTIZE_THREADS) { quantize<f16>(p); }

template <class T> __device__ __forceinline__ void dequantize(const dequantize_params &p) {
    uint64_t i = pack_start(), n = p.q.rows * p.q.cols;
    if (i >= n) return;
    uint64_t row = i / p.q.cols, col = i % p.q.cols;
    float x[PACK];
#pragma unroll
    for (int j = 0; j < PACK; j++) {
        x[j] = i + j < n ? decode_element(p.q, row, col) : 0.0f;
        if (++col == p.q.cols) {
            col = 0;
            row++;
        }
    }
    store_pack((T *)p.out + i, x, n - i);
}
KERNEL(dequantize_f32, dequantize_params, ELEMENT_THREADS) { dequantize<float>(p); }
KERNEL(dequantize_bf16, dequantize_params, ELEMENT_THREADS) { dequantize<bf16>(p); }
KERNEL(dequantize_f16, dequantize_params, ELEMENT_THREADS) { dequantize<f16>(p); }
