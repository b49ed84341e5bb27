// exp, log, tanh and erf over 16 lanes: polynomials of our own evaluation order, a few units in the last
// place, NaN in NaN out. The coefficients are those of the Cephes library's single-precision functions
// (S. Moshier, public domain).
#ifndef LOWRANK_VMATH_H
#define LOWRANK_VMATH_H

#include "simd.h"

#define POLY_STEP(sum, x, c) vf_fma(sum, x, vf_set1(c))

INLINE vf v_exp(vf x) {
    vf clamped = vf_min(vf_max(x, vf_set1(-87.4f)), vf_set1(88.8f));
    vi n = vf_round(vf_mul(clamped, vf_set1(1.44269504088896341f)));
    vf nf = vi_to_vf(n);
    vf r = vf_fma(nf, vf_set1(-0.693359375f), clamped);
    r = vf_fma(nf, vf_set1(2.12194440e-4f), r);
    vf p = vf_set1(1.9875691500e-4f);
    p = POLY_STEP(p, r, 1.3981999507e-3f);
    p = POLY_STEP(p, r, 8.3334519073e-3f);
    p = POLY_STEP(p, r, 4.1665795894e-2f);
    p = POLY_STEP(p, r, 1.6666665459e-1f);
    p = POLY_STEP(p, r, 5.0000001201e-1f);
    p = vf_add(vf_fma(vf_mul(r, r), p, r), vf_set1(1.0f));
    // 2^n in two factors, since n may be 128.
    vi half = vi_sra(n, 1);
    vi rest = vi_sub(n, half);
    vf scale1 = vi_as_vf(vi_sll(vi_add(half, vi_set1(127)), 23));
    vf scale2 = vi_as_vf(vi_sll(vi_add(rest, vi_set1(127)), 23));
    vf y = vf_mul(vf_mul(p, scale1), scale2);
    y = vf_select(vf_lt(x, vf_set1(-87.3f)), vf_zero(), y);
    return vf_select(vf_is_nan(x), x, y);
}

// Natural logarithm of a positive normal number.
INLINE vf v_log(vf x) {
    vi bits = vf_as_vi(x);
    vi e = vi_sub(vi_sra(bits, 23), vi_set1(126));
    vf m = vi_as_vf(vi_or(vi_and(bits, vi_set1(0x007fffff)), vi_set1(0x3f000000)));
    vm small = vf_lt(m, vf_set1(0.707106781186547524f));
    e = vi_select(small, vi_sub(e, vi_set1(1)), e);
    m = vf_sub(vf_select(small, vf_add(m, m), m), vf_set1(1.0f));
    vf z = vf_mul(m, m);
    vf p = vf_set1(7.0376836292e-2f);
    p = POLY_STEP(p, m, -1.1514610310e-1f);
    p = POLY_STEP(p, m, 1.1676998740e-1f);
    p = POLY_STEP(p, m, -1.2420140846e-1f);
    p = POLY_STEP(p, m, 1.4249322787e-1f);
    p = POLY_STEP(p, m, -1.6668057665e-1f);
    p = POLY_STEP(p, m, 2.0000714765e-1f);
    p = POLY_STEP(p, m, -2.4999993993e-1f);
    p = POLY_STEP(p, m, 3.3333331174e-1f);
    vf ef = vi_to_vf(e);
    vf y = vf_mul(vf_mul(m, z), p);
    y = vf_fma(ef, vf_set1(-2.12194440e-4f), y);
    y = vf_fma(z, vf_set1(-0.5f), y);
    return vf_fma(ef, vf_set1(0.693359375f), vf_add(m, y));
}

INLINE float s_log(float x) {
    float t[LANES];
    vf_store(t, v_log(vf_set1(x)));
    return t[0];
}

INLINE vf v_sigmoid(vf x) {
    return vf_div(vf_set1(1.0f), vf_add(vf_set1(1.0f), v_exp(vf_neg(x))));
}

INLINE vf v_copy_sign(vf magnitude, vf sign) {
    return vi_as_vf(vi_or(vf_as_vi(magnitude), vi_and(vf_as_vi(sign), vi_set1(INT32_MIN))));
}

INLINE vf v_tanh(vf x) {
    vf a = vf_abs(x), z = vf_mul(x, x);
    vf p = vf_set1(-5.70498872745e-3f);
    p = POLY_STEP(p, z, 2.06390887954e-2f);
    p = POLY_STEP(p, z, -5.37397155531e-2f);
    p = POLY_STEP(p, z, 1.33314422036e-1f);
    p = POLY_STEP(p, z, -3.33332819422e-1f);
    vf near = vf_fma(vf_mul(p, z), x, x);
    vf e = v_exp(vf_add(a, a));
    vf far = vf_sub(vf_set1(1.0f), vf_div(vf_set1(2.0f), vf_add(e, vf_set1(1.0f))));
    vf y = vf_select(vf_lt(a, vf_set1(0.625f)), near, v_copy_sign(far, x));
    return vf_select(vf_is_nan(x), x, y);
}

INLINE vf v_erf(vf x) {
    vf a = vf_abs(x), z = vf_mul(x, x);
    vf p = vf_set1(7.853861353153693e-5f);
    p = POLY_STEP(p, z, -8.010193625184903e-4f);
    p = POLY_STEP(p, z, 5.188327685732524e-3f);
    p = POLY_STEP(p, z, -2.685381193529856e-2f);
    p = POLY_STEP(p, z, 1.128358514861418e-1f);
    p = POLY_STEP(p, z, -3.761262582423300e-1f);
    p = POLY_STEP(p, z, 1.128379165726710e+0f);
    vf near = vf_mul(x, p);
    // erfc(a) = exp(-a^2) / a * q(1 / a^2)
    vf inverse = vf_div(vf_set1(1.0f), vf_max(a, vf_set1(0.5f)));
    vf y = vf_mul(inverse, inverse);
    vf q = vf_set1(2.326819970068386e-2f);
    q = POLY_STEP(q, y, -1.387039388740657e-1f);
    q = POLY_STEP(q, y, 3.687424674597105e-1f);
    q = POLY_STEP(q, y, -5.824733027278666e-1f);
    q = POLY_STEP(q, y, 6.210004621745983e-1f);
    q = POLY_STEP(q, y, -4.944515323274145e-1f);
    q = POLY_STEP(q, y, 3.404879937665872e-1f);
    q = POLY_STEP(q, y, -2.741127028184656e-1f);
    q = POLY_STEP(q, y, 5.638259427386472e-1f);
    vf r = vf_set1(-1.047766399936249e+1f);
    r = POLY_STEP(r, y, 1.297719955372516e+1f);
    r = POLY_STEP(r, y, -7.495518717768503e+0f);
    r = POLY_STEP(r, y, 2.921019019210786e+0f);
    r = POLY_STEP(r, y, -1.015265279202700e+0f);
    r = POLY_STEP(r, y, 4.218463358204948e-1f);
    r = POLY_STEP(r, y, -2.820767439740514e-1f);
    r = POLY_STEP(r, y, 5.641895067754075e-1f);
    vf tail = vf_mul(vf_mul(v_exp(vf_neg(z)), inverse), vf_select(vf_lt(a, vf_set1(2.0f)), q, r));
    vf far = v_copy_sign(vf_sub(vf_set1(1.0f), tail), x);
    vf result = vf_select(vf_lt(a, vf_set1(1.0f)), near, far);
    return vf_select(vf_is_nan(x), x, result);
}

#endif
