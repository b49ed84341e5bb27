// Operations on elements by themselves: activations, rotary embedding, dropout, addition, conversion.
#include "table.h"
#include "vmath.h"

enum { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, TANH = 4, SIGMOID = 5 };

#define SQRT_2_OVER_PI 0.7978845608028654f
#define GELU_CUBIC 0.044715f

INLINE vf activate(vf x, int kind) {
    vf half = vf_set1(0.5f), one = vf_set1(1.0f);
    switch (kind) {
    case SILU: return vf_mul(x, v_sigmoid(x));
    case GELU: return vf_mul(vf_mul(half, x), vf_add(one, v_erf(vf_mul(x, vf_set1(0.7071067811865476f)))));
    case GELU_TANH: {
        vf cubic = vf_mul(vf_mul(x, x), x);
        vf u = vf_mul(vf_set1(SQRT_2_OVER_PI), vf_fma(vf_set1(GELU_CUBIC), cubic, x));
        return vf_mul(vf_mul(half, x), vf_add(one, v_tanh(u)));
    }
    case TANH: return v_tanh(x);
    case SIGMOID: return v_sigmoid(x);
    default: return vf_select(vf_lt(x, vf_zero()), vf_zero(), x);
    }
}

INLINE vf derivative(vf x, int kind) {
    vf half = vf_set1(0.5f), one = vf_set1(1.0f);
    switch (kind) {
    case SILU: {
        vf s = v_sigmoid(x);
        return vf_mul(s, vf_fma(x, vf_sub(one, s), one));
    }
    case GELU: {
        vf cdf = vf_mul(half, vf_add(one, v_erf(vf_mul(x, vf_set1(0.7071067811865476f)))));
        vf density = vf_mul(v_exp(vf_mul(vf_mul(x, x), vf_set1(-0.5f))), vf_set1(0.3989422804014327f));
        return vf_fma(x, density, cdf);
    }
    case GELU_TANH: {
        vf square = vf_mul(x, x);
        vf u = vf_mul(vf_set1(SQRT_2_OVER_PI), vf_fma(vf_set1(GELU_CUBIC), vf_mul(square, x), x));
        vf t = v_tanh(u);
        vf du = vf_mul(vf_set1(SQRT_2_OVER_PI), vf_fma(vf_set1(3.0f * GELU_CUBIC), square, one));
        vf slope = vf_mul(vf_mul(vf_mul(half, x), vf_sub(one, vf_mul(t, t))), du);
        return vf_add(vf_mul(half, vf_add(one, t)), slope);
    }
    case TANH: {
        vf t = v_tanh(x);
        return vf_sub(one, vf_mul(t, t));
    }
    case SIGMOID: {
        vf s = v_sigmoid(x);
        return vf_mul(s, vf_sub(one, s));
    }
    default: return vf_select(vf_lt(vf_zero(), x), one, vf_zero());
    }
}

#define FOR_PARTS(i, n) for (size_t i = 0, left = (n); i < (n); i += LANES, left = (n) - i)
#define GET(p) v_load_part(at(p, i, type), left, type)
#define PUT(p, x) v_store_part(at_mut(p, i, type), x, left, type)

static void activation(void *y, const void *x, size_t n, int32_t kind, int32_t type) {
    FOR_PARTS(i, n) PUT(y, activate(GET(x), kind));
}

static void activation_backward(void *dx, const void *dy, const void *x, size_t n, int32_t kind, int32_t type) {
    FOR_PARTS(i, n) PUT(dx, vf_mul(GET(dy), derivative(GET(x), kind)));
}

static void gated(void *y, const void *gate, const void *up, size_t n, int32_t kind, int32_t type) {
    FOR_PARTS(i, n) PUT(y, vf_mul(activate(GET(gate), kind), GET(up)));
}

static void gated_backward(void *dgate, void *dup, const void *dy, const void *gate, const void *up, size_t n,
                           int32_t kind, int32_t type) {
    FOR_PARTS(i, n) {
        vf g = GET(gate), u = GET(up), d = GET(dy);
        PUT(dup, vf_mul(d, activate(g, kind)));
        PUT(dgate, vf_mul(vf_mul(d, u), derivative(g, kind)));
    }
}

static void add(void *out, const void *a, const void *b, size_t n, int32_t type) {
    FOR_PARTS(i, n) PUT(out, vf_add(GET(a), GET(b)));
}

static void softcap(float *x, size_t n, float cap) {
    FOR_PARTS(i, n) {
        vf v = v_load_part(x + i, left, TYPE_F32);
        v_store_part(x + i, vf_mul(vf_set1(cap), v_tanh(vf_div(v, vf_set1(cap)))), left, TYPE_F32);
    }
}

static void softcap_backward(void *dx, const float *y, size_t n, float cap, int32_t type) {
    FOR_PARTS(i, n) {
        vf t = vf_div(v_load_part(y + i, left, TYPE_F32), vf_set1(cap));
        PUT(dx, vf_mul(GET(dx), vf_sub(vf_set1(1.0f), vf_mul(t, t))));
    }
}

static void scale(void *out, size_t n, float factor, int32_t type) {
    FOR_PARTS(i, n) PUT(out, vf_mul(GET(out), vf_set1(factor)));
}

static void cast(void *out, int32_t out_type, const void *x, int32_t type, size_t n) {
    FOR_PARTS(i, n) v_store_part(at_mut(out, i, out_type), GET(x), left, out_type);
}

static void rope_pairs(char *x, const float *table, size_t half, int interleaved, float sign, int type) {
    if (!interleaved) {
        FOR_PARTS(i, half) {
            void *first = at_mut(x, i, type), *second = at_mut(x, half + i, type);
            vf c = v_load_part(table + i, left, TYPE_F32);
            vf s = vf_mul(v_load_part(table + half + i, left, TYPE_F32), vf_set1(sign));
            vf a = v_load_part(first, left, type), b = v_load_part(second, left, type);
            v_store_part(first, vf_fma(vf_neg(b), s, vf_mul(a, c)), left, type);
            v_store_part(second, vf_fma(a, s, vf_mul(b, c)), left, type);
        }
        return;
    }
    for (size_t i = 0; i < half; i++) {
        float c = table[i], s = table[half + i] * sign;
        float a = load_one(at(x, 2 * i, type), type), b = load_one(at(x, 2 * i + 1, type), type);
        float r[2] = {fmaf(-b, s, a * c), fmaf(a, s, b * c)};
        for (int j = 0; j < 2; j++) {
            if (type == TYPE_F32) ((float *)x)[2 * i + j] = r[j];
            else ((uint16_t *)x)[2 * i + j] = float_to_bf16(r[j]);
        }
    }
}

static void rope(const struct rope_args *g) {
    for (size_t row = 0; row < g->rows; row++) {
        const float *table = g->table + (size_t)g->positions[row] * g->rotary_dim;
        for (size_t h = 0; h < g->n_heads; h++) {
            char *x = at_mut(g->x, (row * g->n_heads + h) * g->head_dim, g->type);
            rope_pairs(x, table, g->rotary_dim / 2, g->interleaved, g->inverse ? -1.0f : 1.0f, g->type);
        }
    }
}

// The four words of Philox4x32-10 at each of 16 counters.
INLINE void philox(vi c[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
        vi a_high, a_low = vi_mul_wide(c[0], 0xD2511F53u, &a_high);
        vi b_high, b_low = vi_mul_wide(c[2], 0xCD9E8D57u, &b_high);
        c[0] = vi_xor(vi_xor(b_high, c[1]), vi_set1((int32_t)key0));
        c[2] = vi_xor(vi_xor(a_high, c[3]), vi_set1((int32_t)key1));
        c[1] = b_low;
        c[3] = a_low;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// Random words of the 64 elements that start at a multiple of four: words[element].
static void philox_words(int32_t words[4 * LANES], uint64_t counter, uint32_t key0, uint32_t key1) {
    int32_t low[LANES], high[LANES], w[4][LANES];
    for (int i = 0; i < LANES; i++) {
        low[i] = (int32_t)(uint32_t)(counter + (uint64_t)i);
        high[i] = (int32_t)(uint32_t)((counter + (uint64_t)i) >> 32);
    }
    vi c[4] = {vi_load(low), vi_load(high), vi_set1(0), vi_set1(0)};
    philox(c, key0, key1);
    for (int j = 0; j < 4; j++) vi_store(w[j], c[j]);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 4; j++) words[4 * i + j] = w[j][i];
}

static void dropout(void *y, const void *x, size_t n, uint64_t first_element, float p, uint32_t key0,
                    uint32_t key1, int32_t accumulate, int32_t type) {
    vf keep_scale = vf_set1(1.0f / (1.0f - p)), limit = vf_set1(p), unit = vf_set1(0x1p-24f);
    int32_t words[4 * LANES + LANES];
    uint64_t block = first_element / 4;
    size_t skip = (size_t)(first_element % 4), have = 0, used = 0;
    FOR_PARTS(i, n) {
        int32_t w[LANES];
        size_t need = left < LANES ? left : LANES;
        for (size_t got = 0; got < need;) {
            if (used == have) {
                philox_words(words, block, key0, key1);
                block += LANES;
                used = skip;
                have = 4 * LANES;
                skip = 0;
            }
            size_t take = have - used < need - got ? have - used : need - got;
            memcpy(w + got, words + used, take * 4);
            got += take;
            used += take;
        }
        for (size_t j = need; j < LANES; j++) w[j] = 0;
        vf u = vf_mul(vi_to_vf(vi_srl(vi_load(w), 8)), unit);
        vf v = vf_select(vf_lt(u, limit), vf_zero(), vf_mul(GET(x), keep_scale));
        if (accumulate) v = vf_add(GET(y), v);
        PUT(y, v);
    }
}

void TABLE_FN(elementwise)(struct kernel_table *table) {
    table->activation = activation;
    table->activation_backward = activation_backward;
    table->gated = gated;
    table->gated_backward = gated_backward;
    table->add = add;
    table->softcap = softcap;
    table->softcap_backward = softcap_backward;
    table->scale = scale;
    table->cast = cast;
    table->rope = rope;
    table->dropout = dropout;
}
