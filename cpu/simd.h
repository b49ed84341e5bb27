// Sixteen virtual lanes with one meaning on every instruction set.
//
// A kernel is written once over `vf` (16 floats), `vi` (16 int32) and `vm` (16 conditions) and compiled per
// ISA: scalar (arrays and loops), AVX2 (two registers), AVX-512 (one). Every operation here is exactly
// rounded or exact, so the same source gives the same bits everywhere. Compile with -ffp-contract=off.
#ifndef LOWRANK_SIMD_H
#define LOWRANK_SIMD_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#if defined(LOWRANK_AVX512) || defined(LOWRANK_AVX2)
#define INLINE static inline __attribute__((always_inline))
#else
// Sixteen-float structures inlined everywhere would take the compiler most of a minute.
#define INLINE static inline
#endif

INLINE float bits_as_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

INLINE uint32_t float_as_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

INLINE float bf16_to_float(uint16_t h) { return bits_as_float((uint32_t)h << 16); }

// Round to nearest even; a NaN stays a (quiet) NaN.
INLINE uint16_t float_to_bf16(float f) {
    uint32_t u = float_as_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40);
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

INLINE float f16_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff;
    if (exponent == 31) return bits_as_float(sign | 0x7f800000u | fraction << 13 | (fraction ? 0x400000u : 0));
    if (exponent != 0) return bits_as_float(sign | (exponent + 112) << 23 | fraction << 13);
    float magnitude = (float)fraction * 0x1p-24f;
    return sign ? -magnitude : magnitude;
}

#if defined(LOWRANK_AVX512)
#include <immintrin.h>

typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;

INLINE vm first_lanes(int n) { return (vm)((1u << n) - 1); }
INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE vf vf_load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
INLINE void vf_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
INLINE void vf_store_n(float *p, vf x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf vf_sqrt(vf a) { return _mm512_sqrt_ps(a); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vm vf_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE vm vf_is_nan(vf a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
INLINE vf vf_select(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
INLINE vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE void vi_store(void *p, vi x) { _mm512_storeu_si512(p, x); }
INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
INLINE vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
// Low halves of the unsigned products with m; the high halves go to *high.
INLINE vi vi_mul_wide(vi a, uint32_t m, vi *high) {
    __m512i b = _mm512_set1_epi32((int32_t)m);
    __m512i even = _mm512_mul_epu32(a, b), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
    *high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    return _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}
INLINE vi vi_sll(vi a, int n) { return _mm512_slli_epi32(a, (unsigned)n); }
INLINE vi vi_srl(vi a, int n) { return _mm512_srli_epi32(a, (unsigned)n); }
INLINE vi vi_sra(vi a, int n) { return _mm512_srai_epi32(a, (unsigned)n); }
INLINE vm vi_gt(vi a, vi b) { return _mm512_cmpgt_epi32_mask(a, b); }
INLINE vi vi_select(vm m, vi a, vi b) { return _mm512_mask_blend_epi32(m, b, a); }
INLINE vi vf_as_vi(vf a) { return _mm512_castps_si512(a); }
INLINE vf vi_as_vf(vi a) { return _mm512_castsi512_ps(a); }
// table[index], sixteen at once.
INLINE vf vf_gather(const float *table, vi index) { return _mm512_i32gather_ps(index, table, 4); }
INLINE vi vf_round(vf a) { return _mm512_cvt_roundps_epi32(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf vi_to_vf(vi a) { return _mm512_cvtepi32_ps(a); }
INLINE vi vi_load_u16(const uint16_t *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void vi_store_u16(uint16_t *p, vi x) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(x)); }
INLINE vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE float vf_sum(vf a) {
    __m256 x = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 z = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_shuffle_ps(z, z, 1)));
}
// The first eight lanes, or the last, each twice side by side: the layout in which pairs of bf16 are decoded.
INLINE vi each_twice(vi x, const int last) {
    const vi first = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return _mm512_permutexvar_epi32(last ? _mm512_add_epi32(first, vi_set1(8)) : first, x);
}
INLINE vf floats_twice(vf x, const int last) { return vi_as_vf(each_twice(vf_as_vi(x), last)); }

#elif defined(LOWRANK_AVX2)
#include <immintrin.h>

typedef struct { __m256 a, b; } vf;
typedef struct { __m256i a, b; } vi;
typedef struct { __m256 a, b; } vm;

#define PAIR(type, first, second) ((type){(first), (second)})
INLINE vf vf_set1(float x) { return PAIR(vf, _mm256_set1_ps(x), _mm256_set1_ps(x)); }
INLINE vf vf_load(const float *p) { return PAIR(vf, _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
INLINE void vf_store(float *p, vf x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
INLINE vf vf_load_n(const float *p, int n) {
    float t[LANES] = {0};
    memcpy(t, p, (size_t)n * 4);
    return vf_load(t);
}
INLINE void vf_store_n(float *p, vf x, int n) {
    float t[LANES];
    vf_store(t, x);
    memcpy(p, t, (size_t)n * 4);
}
INLINE vf vf_add(vf x, vf y) { return PAIR(vf, _mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
INLINE vf vf_sub(vf x, vf y) { return PAIR(vf, _mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
INLINE vf vf_mul(vf x, vf y) { return PAIR(vf, _mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
INLINE vf vf_div(vf x, vf y) { return PAIR(vf, _mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
INLINE vf vf_sqrt(vf x) { return PAIR(vf, _mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)); }
INLINE vf vf_fma(vf x, vf y, vf z) { return PAIR(vf, _mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)); }
INLINE vf vf_max(vf x, vf y) { return PAIR(vf, _mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
INLINE vf vf_min(vf x, vf y) { return PAIR(vf, _mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }
INLINE vm vf_lt(vf x, vf y) { return PAIR(vm, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)); }
INLINE vm vf_is_nan(vf x) { return PAIR(vm, _mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q), _mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q)); }
INLINE vf vf_select(vm m, vf x, vf y) { return PAIR(vf, _mm256_blendv_ps(y.a, x.a, m.a), _mm256_blendv_ps(y.b, x.b, m.b)); }
INLINE vi vi_set1(int32_t x) { return PAIR(vi, _mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
INLINE vi vi_load(const void *p) {
    return PAIR(vi, _mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1));
}
INLINE void vi_store(void *p, vi x) {
    _mm256_storeu_si256((__m256i *)p, x.a);
    _mm256_storeu_si256((__m256i *)p + 1, x.b);
}
INLINE vi vi_add(vi x, vi y) { return PAIR(vi, _mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)); }
INLINE vi vi_sub(vi x, vi y) { return PAIR(vi, _mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)); }
INLINE vi vi_and(vi x, vi y) { return PAIR(vi, _mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)); }
INLINE vi vi_or(vi x, vi y) { return PAIR(vi, _mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)); }
INLINE vi vi_xor(vi x, vi y) { return PAIR(vi, _mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)); }
INLINE __m256i mul_wide_half(__m256i a, uint32_t m, __m256i *high) {
    __m256i b = _mm256_set1_epi32((int32_t)m);
    __m256i even = _mm256_mul_epu32(a, b), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
    *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
// Low halves of the unsigned products with m; the high halves go to *high.
INLINE vi vi_mul_wide(vi x, uint32_t m, vi *high) {
    vi low;
    low.a = mul_wide_half(x.a, m, &high->a);
    low.b = mul_wide_half(x.b, m, &high->b);
    return low;
}
INLINE vi vi_sll(vi x, int n) { return PAIR(vi, _mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)); }
INLINE vi vi_srl(vi x, int n) { return PAIR(vi, _mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)); }
INLINE vi vi_sra(vi x, int n) { return PAIR(vi, _mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)); }
INLINE vi vf_as_vi(vf x) { return PAIR(vi, _mm256_castps_si256(x.a), _mm256_castps_si256(x.b)); }
INLINE vf vi_as_vf(vi x) { return PAIR(vf, _mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)); }
INLINE vm vi_gt(vi x, vi y) {
    vi m = PAIR(vi, _mm256_cmpgt_epi32(x.a, y.a), _mm256_cmpgt_epi32(x.b, y.b));
    return PAIR(vm, _mm256_castsi256_ps(m.a), _mm256_castsi256_ps(m.b));
}
INLINE vi vi_select(vm m, vi x, vi y) { return vf_as_vi(vf_select(m, vi_as_vf(x), vi_as_vf(y))); }
INLINE vf vf_gather(const float *t, vi i) { return PAIR(vf, _mm256_i32gather_ps(t, i.a, 4), _mm256_i32gather_ps(t, i.b, 4)); }
INLINE vi vf_round(vf x) { return PAIR(vi, _mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)); }
INLINE vf vi_to_vf(vi x) { return PAIR(vf, _mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)); }
INLINE vi vi_load_u16(const uint16_t *p) {
    return PAIR(vi, _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p + 1)));
}
INLINE void vi_store_u16(uint16_t *p, vi x) {
    __m256i low = _mm256_set1_epi32(0xffff);
    __m256i packed = _mm256_packus_epi32(_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
INLINE vf vf_load_f16(const uint16_t *p) {
    return PAIR(vf, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + 1)));
}
INLINE float vf_sum(vf v) {
    __m256 x = _mm256_add_ps(v.a, v.b);
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 z = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_shuffle_ps(z, z, 1)));
}

#else  // scalar

typedef struct { float v[LANES]; } vf;
typedef struct { int32_t v[LANES]; } vi;
typedef struct { int32_t v[LANES]; } vm;

#define EACH for (int i = 0; i < LANES; i++)
#define MAP(type, expression) type r; EACH r.v[i] = (expression); return r
INLINE vf vf_set1(float x) { MAP(vf, x); }
INLINE vf vf_load(const float *p) { MAP(vf, p[i]); }
INLINE vf vf_load_n(const float *p, int n) { MAP(vf, i < n ? p[i] : 0.0f); }
INLINE void vf_store(float *p, vf x) { EACH p[i] = x.v[i]; }
INLINE void vf_store_n(float *p, vf x, int n) { for (int i = 0; i < n; i++) p[i] = x.v[i]; }
INLINE vf vf_add(vf a, vf b) { MAP(vf, a.v[i] + b.v[i]); }
INLINE vf vf_sub(vf a, vf b) { MAP(vf, a.v[i] - b.v[i]); }
INLINE vf vf_mul(vf a, vf b) { MAP(vf, a.v[i] * b.v[i]); }
INLINE vf vf_div(vf a, vf b) { MAP(vf, a.v[i] / b.v[i]); }
INLINE vf vf_sqrt(vf a) { MAP(vf, sqrtf(a.v[i])); }
INLINE vf vf_fma(vf a, vf b, vf c) { MAP(vf, fmaf(a.v[i], b.v[i], c.v[i])); }
INLINE vf vf_max(vf a, vf b) { MAP(vf, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
INLINE vf vf_min(vf a, vf b) { MAP(vf, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
INLINE vm vf_lt(vf a, vf b) { MAP(vm, a.v[i] < b.v[i]); }
INLINE vm vf_is_nan(vf a) { MAP(vm, a.v[i] != a.v[i]); }
INLINE vf vf_select(vm m, vf a, vf b) { MAP(vf, m.v[i] ? a.v[i] : b.v[i]); }
INLINE vi vi_set1(int32_t x) { MAP(vi, x); }
INLINE vi vi_load(const void *p) {
    vi r;
    memcpy(&r, p, sizeof r);
    return r;
}
INLINE void vi_store(void *p, vi x) { memcpy(p, &x, sizeof x); }
INLINE vi vi_add(vi a, vi b) { MAP(vi, (int32_t)((uint32_t)a.v[i] + (uint32_t)b.v[i])); }
INLINE vi vi_sub(vi a, vi b) { MAP(vi, (int32_t)((uint32_t)a.v[i] - (uint32_t)b.v[i])); }
INLINE vi vi_and(vi a, vi b) { MAP(vi, a.v[i] & b.v[i]); }
INLINE vi vi_or(vi a, vi b) { MAP(vi, a.v[i] | b.v[i]); }
INLINE vi vi_xor(vi a, vi b) { MAP(vi, a.v[i] ^ b.v[i]); }
// Low halves of the unsigned products with m; the high halves go to *high.
INLINE vi vi_mul_wide(vi a, uint32_t m, vi *high) {
    EACH high->v[i] = (int32_t)(((uint64_t)(uint32_t)a.v[i] * m) >> 32);
    MAP(vi, (int32_t)((uint32_t)a.v[i] * m));
}
INLINE vi vi_sll(vi a, int n) { MAP(vi, (int32_t)((uint32_t)a.v[i] << n)); }
INLINE vi vi_srl(vi a, int n) { MAP(vi, (int32_t)((uint32_t)a.v[i] >> n)); }
INLINE vi vi_sra(vi a, int n) { MAP(vi, a.v[i] >> n); }
INLINE vm vi_gt(vi a, vi b) { MAP(vm, a.v[i] > b.v[i]); }
INLINE vi vi_select(vm m, vi a, vi b) { MAP(vi, m.v[i] ? a.v[i] : b.v[i]); }
INLINE vi vf_as_vi(vf a) { MAP(vi, (int32_t)float_as_bits(a.v[i])); }
INLINE vf vi_as_vf(vi a) { MAP(vf, bits_as_float((uint32_t)a.v[i])); }
INLINE vf vf_gather(const float *table, vi index) { MAP(vf, table[index.v[i]]); }
// Outside the range of int32, and for NaN, the instruction gives INT32_MIN.
INLINE vi vf_round(vf a) { MAP(vi, fabsf(a.v[i]) < 2147483648.0f ? (int32_t)rintf(a.v[i]) : INT32_MIN); }
INLINE vf vi_to_vf(vi a) { MAP(vf, (float)a.v[i]); }
INLINE vi vi_load_u16(const uint16_t *p) { MAP(vi, p[i]); }
INLINE void vi_store_u16(uint16_t *p, vi x) { EACH p[i] = (uint16_t)x.v[i]; }
INLINE vf vf_load_f16(const uint16_t *p) { MAP(vf, f16_to_float(p[i])); }
INLINE float vf_sum(vf a) {
    for (int step = 8; step > 0; step /= 2)
        for (int i = 0; i < step; i++) a.v[i] += a.v[i + step];
    return a.v[0];
}
#endif

INLINE vf vf_zero(void) { return vf_set1(0.0f); }
INLINE vf vf_neg(vf a) { return vi_as_vf(vi_sub(vf_as_vi(a), vi_set1(INT32_MIN))); }
INLINE vf vf_abs(vf a) { return vi_as_vf(vi_and(vf_as_vi(a), vi_set1(0x7fffffff))); }
// The largest lane; lanes must not be NaN.
INLINE float vf_max_lane(vf a) {
    float t[LANES], m;
    vf_store(t, a);
    m = t[0];
    for (int i = 1; i < LANES; i++) m = t[i] > m ? t[i] : m;
    return m;
}

INLINE vf vf_load_bf16(const uint16_t *p) { return vi_as_vf(vi_sll(vi_load_u16(p), 16)); }
// The bits of the nearest bf16, ties to even; a NaN stays a (quiet) NaN.
INLINE vi vf_bf16_bits(vf x) {
    vi u = vf_as_vi(x);
    vi odd = vi_and(vi_srl(u, 16), vi_set1(1));
    vi rounded = vi_srl(vi_add(u, vi_add(odd, vi_set1(0x7fff))), 16);
    vi nan = vi_or(vi_srl(u, 16), vi_set1(0x40));
    return vi_select(vi_gt(vi_and(u, vi_set1(0x7fffffff)), vi_set1(0x7f800000)), nan, rounded);
}
INLINE void vf_store_bf16(uint16_t *p, vf x) { vi_store_u16(p, vf_bf16_bits(x)); }

// Element types, as the header numbers them.
enum { TYPE_F32 = 0, TYPE_BF16 = 1, TYPE_F16 = 2 };

INLINE size_t type_size(int type) { return type == TYPE_F32 ? 4 : 2; }
INLINE const void *at(const void *p, size_t index, int type) { return (const char *)p + index * type_size(type); }
INLINE void *at_mut(void *p, size_t index, int type) { return (char *)p + index * type_size(type); }

// Sixteen elements of any type as floats, and back (f32 and bf16).
INLINE vf v_load(const void *p, int type) {
    return type == TYPE_F32 ? vf_load(p) : type == TYPE_BF16 ? vf_load_bf16(p) : vf_load_f16(p);
}
INLINE void v_store(void *p, vf x, int type) {
    if (type == TYPE_F32) vf_store(p, x);
    else vf_store_bf16(p, x);
}
// The first n elements, zeros after them.
INLINE vf v_load_n(const void *p, int n, int type) {
    if (type == TYPE_F32) return vf_load_n(p, n);
    uint16_t t[LANES] = {0};
    memcpy(t, p, (size_t)n * 2);
    return v_load(t, type);
}
INLINE void v_store_n(void *p, vf x, int n, int type) {
    if (type == TYPE_F32) {
        vf_store_n(p, x, n);
        return;
    }
    uint16_t t[LANES];
    vf_store_bf16(t, x);
    memcpy(p, t, (size_t)n * 2);
}
// Sixteen elements, or the n that are left.
INLINE vf v_load_part(const void *p, size_t left, int type) {
    return left >= LANES ? v_load(p, type) : v_load_n(p, (int)left, type);
}
INLINE void v_store_part(void *p, vf x, size_t left, int type) {
    if (left >= LANES) v_store(p, x, type);
    else v_store_n(p, x, (int)left, type);
}
INLINE float load_one(const void *p, int type) {
    if (type == TYPE_F32) {
        float f;
        memcpy(&f, p, 4);
        return f;
    }
    uint16_t h;
    memcpy(&h, p, 2);
    return type == TYPE_BF16 ? bf16_to_float(h) : f16_to_float(h);
}

#endif
