// exp, log, tanh, erf and what is made of them: the polynomials of cpu/vmath.h, operation for operation, so that
// results have the same bits on every device. Compile with -fmad=false.
#ifndef LOWRANK_MATH_CUH
#define LOWRANK_MATH_CUH

#include "kernel.cuh"

__device__ __forceinline__ float exp_f32(float x) {
    float clamped = fminf(fmaxf(x, -87.4f), 88.8f);
    int n = __float2int_rn(clamped * 1.44269504088896341f);
    float nf = (float)n;
    float r = fmaf(nf, -0.693359375f, clamped);
    r = fmaf(nf, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = fmaf(p, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    p = fmaf(r * r, p, r) + 1.0f;
    // 2^n in two factors, since n may be 128.
    int half = n >> 1, rest = n - half;
    float y = p * __uint_as_float((uint32_t)(half + 127) << 23) * __uint_as_float((uint32_t)(rest + 127) << 23);
    y = x < -87.3f ? 0.0f : y;
    return x != x ? x : y;
}

// e^x in f64, with the bits of src/math: from basic operations alone.
__device__ __forceinline__ double exp_f64(double x) {
    if (x != x) return x;
    if (x > 709.78) return INFINITY;
    if (x < -708.0) return 0.0;
    double n = round(x / 0.693147180559945309417232121458);
    double r = (x - n * 6.931471803691238e-1) - n * 1.9082149292705877e-10, series = 1.0;
#pragma unroll
    for (int i = 14; i > 0; i--) series = 1.0 + series * r / (double)i;
    return series * __longlong_as_double(((long long)n + 1023) << 52);
}

// Natural logarithm of a positive normal number.
__device__ __forceinline__ float log_f32(float x) {
    int bits = (int)__float_as_uint(x), e = (bits >> 23) - 126;
    float m = __uint_as_float(((uint32_t)bits & 0x007fffffu) | 0x3f000000u);
    bool small = m < 0.707106781186547524f;
    e = small ? e - 1 : e;
    m = (small ? m + m : m) - 1.0f;
    float z = m * m;
    float p = 7.0376836292e-2f;
    p = fmaf(p, m, -1.1514610310e-1f);
    p = fmaf(p, m, 1.1676998740e-1f);
    p = fmaf(p, m, -1.2420140846e-1f);
    p = fmaf(p, m, 1.4249322787e-1f);
    p = fmaf(p, m, -1.6668057665e-1f);
    p = fmaf(p, m, 2.0000714765e-1f);
    p = fmaf(p, m, -2.4999993993e-1f);
    p = fmaf(p, m, 3.3333331174e-1f);
    float ef = (float)e;
    float y = m * z * p;
    y = fmaf(ef, -2.12194440e-4f, y);
    y = fmaf(z, -0.5f, y);
    return fmaf(ef, 0.693359375f, m + y);
}

__device__ __forceinline__ float sigmoid_f32(float x) { return 1.0f / (1.0f + exp_f32(-x)); }

__device__ __forceinline__ float copy_sign(float magnitude, float sign) {
    return __uint_as_float(__float_as_uint(magnitude) | (__float_as_uint(sign) & 0x80000000u));
}

// Below 0.625.
__device__ __forceinline__ float tanh_near(float x) {
    float z = x * x;
    float p = -5.70498872745e-3f;
    p = fmaf(p, z, 2.06390887954e-2f);
    p = fmaf(p, z, -5.37397155531e-2f);
    p = fmaf(p, z, 1.33314422036e-1f);
    p = fmaf(p, z, -3.33332819422e-1f);
    return fmaf(p * z, x, x);
}

__device__ __forceinline__ float tanh_f32(float x) {
    float a = fabsf(x), near = tanh_near(x);
    float far = 1.0f - 2.0f / (exp_f32(a + a) + 1.0f);
    float y = a < 0.625f ? near : copy_sign(far, x);
    return x != x ? x : y;
}

__device__ __forceinline__ float erf_f32(float x) {
    float a = fabsf(x), z = x * x;
    float p = 7.853861353153693e-5f;
    p = fmaf(p, z, -8.010193625184903e-4f);
    p = fmaf(p, z, 5.188327685732524e-3f);
    p = fmaf(p, z, -2.685381193529856e-2f);
    p = fmaf(p, z, 1.128358514861418e-1f);
    p = fmaf(p, z, -3.761262582423300e-1f);
    p = fmaf(p, z, 1.128379165726710e+0f);
    float near = x * p;
    // erfc(a) = exp(-a^2) / a * q(1 / a^2)
    float inverse = 1.0f / fmaxf(a, 0.5f), y = inverse * inverse;
    float q = 2.326819970068386e-2f;
    q = fmaf(q, y, -1.387039388740657e-1f);
    q = fmaf(q, y, 3.687424674597105e-1f);
    q = fmaf(q, y, -5.824733027278666e-1f);
    q = fmaf(q, y, 6.210004621745983e-1f);
    q = fmaf(q, y, -4.944515323274145e-1f);
    q = fmaf(q, y, 3.404879937665872e-1f);
    q = fmaf(q, y, -2.741127028184656e-1f);
    q = fmaf(q, y, 5.638259427386472e-1f);
    float r = -1.047766399936249e+1f;
    r = fmaf(r, y, 1.297719955372516e+1f);
    r = fmaf(r, y, -7.495518717768503e+0f);
    r = fmaf(r, y, 2.921019019210786e+0f);
    r = fmaf(r, y, -1.015265279202700e+0f);
    r = fmaf(r, y, 4.218463358204948e-1f);
    r = fmaf(r, y, -2.820767439740514e-1f);
    r = fmaf(r, y, 5.641895067754075e-1f);
    float tail = exp_f32(-z) * inverse * (a < 2.0f ? q : r);
    float result = a < 1.0f ? near : copy_sign(1.0f - tail, x);
    return x != x ? x : result;
}

#endif
