// Causal attention of one head of one sequence. Scores of a block of queries are held whole, so there is no
// running rescaling: a row's bits depend on that row and the keys it sees alone.
//
//   s = scale q k^T (soft-capped: cap tanh(s / cap)),  m = max s,  e = exp(s - m),  l = sum e,  out = (e v) / l,  lse = m + log l
//
// In bf16 arithmetic e is rounded to bf16 before it meets v, as are p and ds in the backward.
#include "gemm_kernel.h"
#include "gemv.h"
#include "table.h"
#include "vmath.h"

// Queries per block of the backward: deep enough to amortize the accumulators of dk and dv.
#define QUERY_BLOCK 56

INLINE size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
INLINE size_t min_size(size_t a, size_t b) { return a < b ? a : b; }

// All panels of B: [panel][ku][NR].
static void pack_b(uint32_t *dst, struct gemm_operand b, size_t n, size_t k, int bf16) {
    size_t ku = units(k, bf16);
    for (size_t c = 0; c < n; c += NR) pack_b_panel(dst + c * ku, NR, &b, c, min_size(NR, n - c), 0, k, bf16);
}

// c[m][ldc] (+)= A B with B packed by pack_b for `b_ku` units, of which the first k elements count.
static void product(float *c, size_t ldc, size_t m, size_t n, size_t k, struct gemm_operand a,
                    const uint32_t *b, size_t b_ku, int first, int bf16, uint32_t *a_buffer) {
    for (size_t row = 0; row < m; row += MR) {
        size_t mr = min_size(MR, m - row);
        pack_a_tile(a_buffer, &a, row, mr, 0, k, bf16);
        for (size_t col = 0; col < n; col += NR)
            tile_for(mr, n - col, bf16)(units(k, bf16), a_buffer, b + col * b_ku, c + row * ldc + col, ldc, first);
    }
}

// Rows of floats rounded to bf16 in place: row i of the result starts where row i of the floats does.
static void round_rows(float *rows, size_t m, size_t ld, size_t n) {
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j += LANES) {
            vf x = vf_load(rows + i * ld + j);
            vf_store_bf16((uint16_t *)(rows + i * ld) + j, x);
        }
}

// An operand over rows of floats, or of bf16 made by round_rows.
INLINE struct gemm_operand rows_operand(const float *rows, size_t ld, int bf16, int transposed) {
    return (struct gemm_operand){rows, NULL, bf16 ? 2 * ld : ld, bf16 ? TYPE_BF16 : TYPE_F32, transposed};
}

INLINE struct gemm_operand operand(const void *data, size_t ld, int type, int transposed) {
    return (struct gemm_operand){data, NULL, ld, type, transposed};
}

// Scores as the softmax takes them.
INLINE vf score(vf product, const struct attention_args *g) {
    vf x = vf_mul(product, vf_set1(g->scale));
    return g->softcap > 0 ? vf_mul(vf_set1(g->softcap), v_tanh(vf_div(x, vf_set1(g->softcap)))) : x;
}

// The first key that a query with so many keys before and at it sees.
INLINE size_t first_seen(const struct attention_args *g, size_t visible) {
    return g->window && visible > g->window ? visible - g->window : 0;
}

// The keys before and at a query.
INLINE size_t visible_to(const struct attention_args *g, size_t query) {
    return g->one_token ? g->k_len : query + 1 + g->k_len - g->q_len;
}

// Keys beyond a window are left out by so many at a time, whatever the instruction set: a multiple of every NR.
#define KEY_BLOCK 32

// The first key that is computed with for a block of queries, the first of which has so many keys before and at it. What
// is left out would add zeros.
INLINE size_t first_needed(const struct attention_args *g, size_t visible) {
    return first_seen(g, visible) / KEY_BLOCK * KEY_BLOCK;
}

// exp(s - m) over the keys seen of the first `visible`, zeros elsewhere in [from, end); returns the sum.
static float softmax_row(const struct attention_args *g, float *s, size_t visible, size_t from, size_t end,
                         float *max_out) {
    vf top = vf_set1(-INFINITY), sum = vf_zero();
    size_t unseen = first_seen(g, visible);
    for (size_t j = from; j < visible; j += LANES) {
        vf x = score(vf_load(s + j), g);
        vf_store(s + j, x);
        if (j < unseen) {
            for (size_t i = j; i < unseen && i < j + LANES; i++) s[i] = -INFINITY;
            x = vf_load(s + j);
        }
        if (visible - j < LANES) {
            float t[LANES];
            for (int i = 0; i < LANES; i++) t[i] = (size_t)i < visible - j ? s[j + i] : -INFINITY;
            x = vf_load(t);
        }
        top = vf_max(top, x);
    }
    float m = vf_max_lane(top);
    for (size_t j = from; j < end; j += LANES) {
        vf e = vf_zero();
        if (j < visible) {
            e = v_exp(vf_sub(vf_load(s + j), vf_set1(m)));
            if (visible - j < LANES) {
                float t[LANES];
                vf_store(t, e);
                e = vf_load_n(t, (int)(visible - j));
            }
            sum = vf_add(sum, e);
        }
        vf_store(s + j, e);
    }
    *max_out = m;
    return vf_sum(sum);
}

static size_t scratch_floats(size_t q_len, size_t k_len, size_t head_dim, int32_t backward) {
    size_t keys = round_up(k_len, NR), dim = round_up(head_dim, NR);
    size_t a_buffer = MR * (keys > dim ? keys : dim);
    if (!backward) return keys * dim + (keys + 1) * dim + MR * keys + a_buffer + MR * dim;
    size_t block = min_size(round_up(q_len, MR), QUERY_BLOCK);
    return 3 * (keys + 1) * dim + 2 * block * keys + a_buffer + 3 * block * dim + q_len;
}

static int all_finite(const float *x, size_t ld, size_t rows, size_t cols) {
    vf bad = vf_zero();
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j += LANES) bad = vf_add(bad, vf_mul(vf_load(x + i * ld + j), vf_zero()));
    return vf_sum(bad) == 0.0f;
}

INLINE struct gemm_operand keys_from(const struct attention_args *g, size_t key) {
    return operand(at(g->k, key * g->k_ld, g->type), g->k_ld, g->type, 1);
}

INLINE struct gemm_operand values_from(const struct attention_args *g, size_t key) {
    return operand(at(g->v, key * g->k_ld, g->type), g->k_ld, g->type, 0);
}

// o = e v for m queries from `row` on, each of the values that it sees alone: what is not finite must not get through a
// probability of zero. e begins at key `from`. Leaves `packed` with other content.
static void product_by_rows(const struct attention_args *g, float *o, size_t dim, size_t row, size_t m, const float *e,
                            size_t e_ld, size_t from, uint32_t *packed, uint32_t *a_buffer) {
    int bf16 = g->type == TYPE_BF16;
    size_t d = g->head_dim;
    for (size_t i = 0; i < m; i++) {
        size_t visible = visible_to(g, row + i), unseen = first_seen(g, visible), n = visible - unseen;
        pack_b(packed, values_from(g, unseen), d, n, bf16);
        product(o + i * dim, dim, 1, d, n, operand(at(e + i * e_ld, unseen - from, g->type), n, g->type, 0), packed,
                units(n, bf16), 1, bf16, a_buffer);
    }
}

// c = A B for few rows straight from B; what can't be done so is packed first.
static void product_of_few(float *c, size_t ldc, size_t m, size_t n, size_t k, struct gemm_operand a,
                           struct gemm_operand b, int bf16, uint32_t *packed, uint32_t *a_buffer) {
    pack_a_tile(a_buffer, &a, 0, m, 0, k, bf16);
    if (few_rows_of_columns(&b, n, m, a_buffer, k, c, ldc)) return;
    for (size_t col = 0; col < n; col += NR) {
        if (few_rows(&b, col, n, m, a_buffer, k, c + col, ldc, 1)) continue;
        pack_b_panel(packed, NR, &b, col, min_size(NR, n - col), 0, k, bf16);
        tile_for(m, n - col, bf16)(units(k, bf16), a_buffer, packed, c + col, ldc, 1);
    }
}

static void attention(const struct attention_args *g, size_t first, size_t last, float *scratch) {
    int bf16 = g->type == TYPE_BF16, type = g->type;
    size_t d = g->head_dim, lowest = first_needed(g, visible_to(g, first));
    size_t packed = visible_to(g, last - 1) - lowest; // keys from the lowest on
    size_t keys = round_up(g->k_len, NR), dim = round_up(d, NR), d_ku = units(d, bf16), k_ku = units(packed, bf16);
    uint32_t *kt = (uint32_t *)scratch;
    uint32_t *v = kt + keys * dim;
    float *s = (float *)(v + (keys + 1) * dim);
    uint32_t *a_buffer = (uint32_t *)(s + MR * keys);
    float *o = (float *)(a_buffer + MR * (keys > dim ? keys : dim));
    int few = last - first < MANY_ROWS;
    size_t step = few ? GEMV_ROWS : MR;
    if (!few) {
        pack_b(kt, keys_from(g, lowest), packed, d, bf16);
        pack_b(v, values_from(g, lowest), d, packed, bf16);
    }
    for (size_t row = first; row < last; row += step) {
        size_t m = min_size(step, last - row), visible_all = visible_to(g, row + m - 1), end = round_up(visible_all, LANES);
        size_t from = first_needed(g, visible_to(g, row)), n = visible_all - from;
        float *e = s + from;
        struct gemm_operand q = operand(at(g->q, row * g->q_ld, type), g->q_ld, type, 0);
        if (few) product_of_few(e, keys, m, n, d, q, keys_from(g, from), bf16, kt, a_buffer);
        else product(e, keys, m, n, d, q, kt + (from - lowest) * d_ku, d_ku, 1, bf16, a_buffer);
        float sums[MR];
        for (size_t i = 0; i < m; i++) {
            float max;
            sums[i] = softmax_row(g, s + i * keys, visible_to(g, row + i), from, end, &max);
            g->lse[(row + i) * g->lse_ld] = max + s_log(sums[i]);
        }
        if (bf16) round_rows(e, m, keys, end - from);
        struct gemm_operand p = rows_operand(e, keys, bf16, 0);
        if (few) product_of_few(o, dim, m, d, n, p, values_from(g, from), bf16, v, a_buffer);
        else product(o, dim, m, d, n, p, v + units(from - lowest, bf16) * NR, k_ku, 1, bf16, a_buffer);
        if (!all_finite(o, dim, m, d)) {
            product_by_rows(g, o, dim, row, m, e, keys, from, v, a_buffer);
            if (!few) pack_b(v, values_from(g, lowest), d, packed, bf16);
        }
        for (size_t i = 0; i < m; i++)
            for (size_t j = 0; j < d; j += LANES)
                v_store_part(at_mut(g->out, (row + i) * g->out_ld + j, type),
                             vf_div(vf_load(o + i * dim + j), vf_set1(sums[i])), d - j, type);
    }
}

// p = exp(scale s - lse), and ds = scale p (dp - delta), for the rows of a block and keys [from, end); zeros where unseen.
static void score_gradients(const struct attention_args *g, float *p, float *ds, size_t keys, size_t row, size_t m,
                            size_t from, size_t end, const float *delta) {
    size_t past = g->k_len - g->q_len;
    vf factor = vf_set1(g->scale);
    for (size_t i = 0; i < m; i++) {
        size_t visible = row + i + past + 1, unseen = first_seen(g, visible);
        vf lse = vf_set1(g->lse[(row + i) * g->lse_ld]), di = vf_set1(delta[row + i]);
        for (size_t j = from; j < end; j += LANES) {
            vf e = vf_zero(), grad = vf_zero();
            if (j < visible && j + LANES > unseen) {
                vf s = score(vf_load(p + i * keys + j), g);
                e = v_exp(vf_sub(s, lse));
                grad = vf_mul(vf_mul(e, vf_sub(vf_load(ds + i * keys + j), di)), factor);
                if (g->softcap > 0) {
                    vf t = vf_div(s, vf_set1(g->softcap));
                    grad = vf_mul(grad, vf_sub(vf_set1(1.0f), vf_mul(t, t)));
                }
                if (j < unseen) {
                    float t[LANES], u[LANES];
                    vf_store(t, e);
                    vf_store(u, grad);
                    for (size_t l = 0; l < unseen - j; l++) t[l] = u[l] = 0.0f;
                    e = vf_load(t);
                    grad = vf_load(u);
                }
                if (visible - j < LANES) {
                    float t[LANES], u[LANES];
                    vf_store(t, e);
                    vf_store(u, grad);
                    e = vf_load_n(t, (int)(visible - j));
                    grad = vf_load_n(u, (int)(visible - j));
                }
            }
            vf_store(p + i * keys + j, e);
            vf_store(ds + i * keys + j, grad);
        }
    }
}

static void attention_backward(const struct attention_args *g, float *scratch) {
    int bf16 = g->type == TYPE_BF16, type = g->type;
    size_t d = g->head_dim, past = g->k_len - g->q_len;
    size_t keys = round_up(g->k_len, NR), dim = round_up(d, NR), d_ku = units(d, bf16);
    size_t block = min_size(round_up(g->q_len, MR), QUERY_BLOCK);
    uint32_t *kt = (uint32_t *)scratch, *vt = kt + (keys + 1) * dim, *k = vt + (keys + 1) * dim;
    float *p = (float *)(k + (keys + 1) * dim), *ds = p + block * keys;
    uint32_t *a_buffer = (uint32_t *)(ds + block * keys);
    float *dq = (float *)(a_buffer + MR * (keys > dim ? keys : dim));
    uint32_t *q_packed = (uint32_t *)(dq + block * dim), *dout_packed = q_packed + block * dim;
    float *delta = (float *)(dout_packed + block * dim);
    pack_b(kt, operand(g->k, g->k_ld, type, 1), g->k_len, d, bf16);
    pack_b(vt, operand(g->v, g->k_ld, type, 1), g->k_len, d, bf16);
    pack_b(k, operand(g->k, g->k_ld, type, 0), d, g->k_len, bf16);
    memset(g->dk, 0, g->k_len * dim * sizeof(float));
    memset(g->dv, 0, g->k_len * dim * sizeof(float));
    for (size_t i = 0; i < g->q_len; i++) {
        vf sum = vf_zero();
        for (size_t j = 0; j < d; j += LANES)
            sum = vf_fma(v_load_part(at(g->dout, i * g->out_ld + j, type), d - j, type),
                         v_load_part(at(g->out, i * g->out_ld + j, type), d - j, type), sum);
        delta[i] = vf_sum(sum);
    }
    for (size_t row = 0; row < g->q_len; row += block) {
        size_t m = min_size(block, g->q_len - row), seen = row + m + past, end = round_up(seen, LANES);
        size_t from = first_needed(g, row + past + 1), n = seen - from;
        struct gemm_operand q = operand(at(g->q, row * g->q_ld, type), g->q_ld, type, 0);
        struct gemm_operand dout = operand(at(g->dout, row * g->out_ld, type), g->out_ld, type, 0);
        float *p_from = p + from, *ds_from = ds + from;
        product(p_from, keys, m, n, d, q, kt + from * d_ku, d_ku, 1, bf16, a_buffer);
        product(ds_from, keys, m, n, d, dout, vt + from * d_ku, d_ku, 1, bf16, a_buffer);
        score_gradients(g, p, ds, keys, row, m, from, end, delta);
        if (bf16) {
            round_rows(p_from, m, keys, end - from);
            round_rows(ds_from, m, keys, end - from);
        }
        product(dq, dim, m, d, n, rows_operand(ds_from, keys, bf16, 0), k + units(from, bf16) * NR,
                units(g->k_len, bf16), 1, bf16, a_buffer);
        for (size_t i = 0; i < m; i++)
            for (size_t j = 0; j < d; j += LANES)
                v_store_part(at_mut(g->dq, (row + i) * g->q_ld + j, type), vf_load(dq + i * dim + j), d - j, type);
        pack_b(q_packed, q, d, m, bf16);
        pack_b(dout_packed, dout, d, m, bf16);
        product(g->dv + from * dim, dim, n, d, m, rows_operand(p_from, keys, bf16, 1), dout_packed, units(m, bf16), 0,
                bf16, a_buffer);
        product(g->dk + from * dim, dim, n, d, m, rows_operand(ds_from, keys, bf16, 1), q_packed, units(m, bf16), 0,
                bf16, a_buffer);
    }
}

static size_t padded_dim(size_t head_dim) { return round_up(head_dim, NR); }

// out[rows][cols] = sum of the parts in order; a part is [rows][part_ld] floats.
static void sum_parts(void *out, size_t out_ld, int32_t type, const float *parts, size_t part_stride,
                      size_t n_parts, size_t part_ld, size_t rows, size_t cols) {
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j += LANES) {
            vf sum = vf_load(parts + i * part_ld + j);
            for (size_t part = 1; part < n_parts; part++)
                sum = vf_add(sum, vf_load(parts + part * part_stride + i * part_ld + j));
            v_store_part(at_mut(out, i * out_ld + j, type), sum, cols - j, type);
        }
}

void TABLE_FN(attention)(struct kernel_table *table) {
    table->attention_scratch = scratch_floats;
    table->attention_padded_dim = padded_dim;
    table->attention = attention;
    table->attention_backward = attention_backward;
    table->attention_sum_parts = sum_parts;
}
