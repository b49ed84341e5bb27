// One step of an optimizer over flat parameters.
#include "quant.h"
#include "simd.h"
#include "table.h"

// Runs the body for each part of sixteen elements; the last may be shorter.
#define FOR_PARTS(i, n) for (size_t i = 0; i < (n); i += LANES)
#define GET(p) v_load_part((p) + i, n - i, TYPE_F32)
#define PUT(p, x) v_store_part((p) + i, x, n - i, TYPE_F32)

// One AdamW step of sixteen elements.
INLINE vf adamw_part(vf p, vf g, vf *m, vf *v, const struct adamw_args *step) {
    g = vf_mul(g, vf_set1(step->grad_scale));
    p = vf_mul(p, vf_set1(step->decay));
    *m = vf_fma(vf_set1(step->beta1), *m, vf_mul(vf_set1(step->one_minus_beta1), g));
    *v = vf_fma(vf_set1(step->beta2), *v, vf_mul(vf_mul(vf_set1(step->one_minus_beta2), g), g));
    vf denominator = vf_add(vf_div(vf_sqrt(*v), vf_set1(step->bias_correction2_sqrt)), vf_set1(step->epsilon));
    return vf_fma(vf_neg(vf_set1(step->step_size)), vf_div(*m, denominator), p);
}

static void adamw(float *p, const float *g, float *m, float *v, size_t n, const struct adamw_args *step) {
    FOR_PARTS(i, n) {
        vf mi = GET(m), vi_ = GET(v);
        PUT(p, adamw_part(GET(p), GET(g), &mi, &vi_, step));
        PUT(m, mi);
        PUT(v, vi_);
    }
}

#define BLOCK 256

// The number of midpoints below x: the nearest code, ties to the lower.
INLINE vi nearest_code(const float *midpoints, vf x) {
    vi code = vi_set1(0);
    for (int half = BLOCK / 2; half > 0; half /= 2) {
        vi probe = vi_add(code, vi_set1(half - 1));
        code = vi_select(vf_lt(vf_gather(midpoints, probe), x), vi_add(probe, vi_set1(1)), code);
    }
    return code;
}

static void encode_moments(uint8_t *codes, float *absmax, const float x[BLOCK], vf most, size_t n,
                           const float *midpoints) {
    *absmax = vf_max_lane(most);
    vf inverse = vf_set1(1.0f / (*absmax > 1e-38f ? *absmax : 1e-38f));
    FOR_PARTS(i, n) {
        int32_t code[LANES];
        vi_store(code, nearest_code(midpoints, vf_mul(vf_load(x + i), inverse)));
        for (size_t j = 0; j < LANES && i + j < n; j++) codes[i + j] = (uint8_t)code[j];
    }
}

INLINE vf decoded_moments(const uint8_t *codes, const float *map, float absmax, size_t left) {
    uint8_t t[LANES] = {0};
    memcpy(t, codes, left < LANES ? left : LANES);
    return vf_mul(vf_gather(map, vi_load_u8(t)), vf_set1(absmax));
}

static void adamw_8bit(float *p, const float *g, const struct moments_8bit *moments, size_t total, size_t first,
                       size_t last, const struct adamw_args *step) {
    for (size_t block = first; block < last; block++) {
        size_t start = block * BLOCK, n = total - start < BLOCK ? total - start : BLOCK;
        float m[BLOCK], v[BLOCK], *pb = p + start;
        const float *gb = g + start;
        uint8_t *mc = moments->m + start, *vc = moments->v + start;
        float *m_absmax = moments->m_absmax + block, *v_absmax = moments->v_absmax + block;
        vf m_most = vf_zero(), v_most = vf_zero();
        FOR_PARTS(i, n) {
            vf mi = decoded_moments(mc + i, moments->m_map, *m_absmax, n - i);
            vf vi_ = decoded_moments(vc + i, moments->v_map, *v_absmax, n - i);
            vf pi = adamw_part(v_load_part(pb + i, n - i, TYPE_F32), v_load_part(gb + i, n - i, TYPE_F32), &mi, &vi_, step);
            v_store_part(pb + i, pi, n - i, TYPE_F32);
            vf_store(m + i, mi);
            vf_store(v + i, vi_);
            // Lanes beyond the end hold what a code of zero decodes to; they do not count.
            float valid[LANES];
            for (int j = 0; j < LANES; j++) valid[j] = i + (size_t)j < n ? 1.0f : 0.0f;
            m_most = vf_max(vf_mul(vf_abs(mi), vf_load(valid)), m_most);
            v_most = vf_max(vf_mul(vi_, vf_load(valid)), v_most);
        }
        encode_moments(mc, m_absmax, m, m_most, n, moments->m_midpoints);
        encode_moments(vc, v_absmax, v, v_most, n, moments->v_midpoints);
    }
}

static void lion(float *p, const float *g, float *m, size_t n, const struct adamw_args *step) {
    vf rate = vf_set1(step->step_size), zero = vf_zero();
    FOR_PARTS(i, n) {
        vf gi = vf_mul(GET(g), vf_set1(step->grad_scale)), mi = GET(m);
        vf u = vf_fma(vf_set1(step->beta1), mi, vf_mul(vf_set1(step->one_minus_beta1), gi));
        vf move = vf_select(vf_lt(zero, u), rate, vf_select(vf_lt(u, zero), vf_neg(rate), zero));
        PUT(p, vf_sub(vf_mul(GET(p), vf_set1(step->decay)), move));
        PUT(m, vf_fma(vf_set1(step->beta2), mi, vf_mul(vf_set1(step->one_minus_beta2), gi)));
    }
}

static void sgd(float *p, const float *g, size_t n, const struct adamw_args *step) {
    FOR_PARTS(i, n) {
        vf gi = vf_mul(GET(g), vf_set1(step->grad_scale)), pi = GET(p);
        gi = vf_fma(vf_set1(step->weight_decay), pi, gi);
        PUT(p, vf_fma(vf_neg(vf_set1(step->step_size)), gi, pi));
    }
}

void TABLE_FN(optimizer)(struct kernel_table *table) {
    table->adamw = adamw;
    table->adamw_8bit = adamw_8bit;
    table->lion = lion;
    table->sgd = sgd;
}
