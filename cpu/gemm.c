// Matrix products. A result is computed by column panels: a panel of B is packed in chunks of k that stay in
// cache and used for all rows of A, which the caller has packed once. Accumulators pass from chunk to chunk
// and term to term through f32 memory, which changes no bits.
#include "gemm_kernel.h"
#include "table.h"

// Units of k per chunk: a packed chunk of B takes KC * NR * 4 bytes.
#define KC 256

static size_t pack_a_units(size_t m, size_t k, int32_t bf16) { return m * units(k, bf16); }

static size_t rows_per_tile(size_t m) { return tile_rows(m); }

// A tile's units lie at row0 * ku, so a chunk's at + u0 * mr.
static void pack_a(uint32_t *dst, const struct gemm_operand *a, size_t m, size_t k, int32_t bf16, size_t first,
                   size_t last) {
    size_t rows = tile_rows(m), ku = units(k, bf16);
    for (size_t t = first; t < last; t++) {
        size_t row0 = t * rows, mr = m - row0 < rows ? m - row0 : rows;
        pack_a_tile(dst + row0 * ku, a, row0, mr, 0, k, bf16);
    }
}

static size_t scratch_floats(size_t m, size_t first, size_t last) {
    return KC * NR + (last - first) * tile_rows(m) * NR;
}

INLINE vf load_bias(const struct gemm_args *g, size_t column, size_t left) {
    return v_load_part(at(g->bias, column, g->bias_type), left, g->bias_type);
}

// Accumulators [mr][NR] from the existing output.
static void load_tile(const struct gemm_args *g, float *c, size_t row0, size_t mr, size_t column, size_t count) {
    for (size_t i = 0; i < mr; i++)
        for (size_t j = 0; j < count; j += LANES) {
            const void *p = at(g->out, (row0 + i) * g->ldo + column + j, g->out_type);
            vf_store(c + i * NR + j, v_load_part(p, count - j, g->out_type));
        }
}

static void store_tile(const struct gemm_args *g, const float *c, size_t row0, size_t mr, size_t column,
                       size_t count) {
    vf scale = vf_set1(g->scale);
    for (size_t j = 0; j < count; j += LANES) {
        vf bias = g->bias ? load_bias(g, column + j, count - j) : vf_zero();
        for (size_t i = 0; i < mr; i++) {
            vf x = vf_load(c + i * NR + j);
            if (g->scale != 1.0f) x = vf_mul(x, scale);
            if (g->bias) x = vf_add(x, bias);
            void *p = at_mut(g->out, (row0 + i) * g->ldo + column + j, g->out_type);
            v_store_part(p, x, count - j, g->out_type);
        }
    }
}

static void panel(const struct gemm_args *g, size_t column, size_t first, size_t last, float *scratch) {
    uint32_t *packed = (uint32_t *)scratch;
    float *accumulators = scratch + KC * NR;
    size_t rows = tile_rows(g->m), row_first = first * rows;
    size_t row_last = last * rows < g->m ? last * rows : g->m;
    size_t count = g->n - column < NR ? g->n - column : NR;
    int bf16 = g->bf16, started = 0;
    if (g->accumulate) {
        load_tile(g, accumulators, row_first, row_last - row_first, column, count);
        started = 1;
    }
    size_t per_unit = bf16 ? 2 : 1;
    for (size_t t = 0; t < g->n_terms; t++) {
        const struct gemm_term *term = &g->terms[t];
        size_t ku = units(term->k, bf16);
        for (size_t u0 = 0; u0 < ku; u0 += KC) {
            size_t k0 = u0 * per_unit, k = term->k - k0 < KC * per_unit ? term->k - k0 : KC * per_unit;
            pack_b_panel(packed, NR, &term->b, column, count, k0, k, bf16);
            for (size_t row0 = row_first; row0 < row_last; row0 += rows) {
                size_t mr = row_last - row0 < rows ? row_last - row0 : rows;
                const uint32_t *a = term->a + row0 * ku + u0 * mr;
                float *c = accumulators + (row0 - row_first) * NR;
                tile_for(mr, count, bf16)(units(k, bf16), a, packed, c, NR, !started);
            }
            started = 1;
        }
    }
    if (!started) memset(accumulators, 0, (row_last - row_first) * NR * sizeof(float));
    store_tile(g, accumulators, row_first, row_last - row_first, column, count);
}

// As many accumulators as registers hold, and more than the instruction's latency needs.
static double peak(size_t steps, int32_t bf16, float *sink) {
    enum { N = MR < 12 ? MR : 24 };
    vf acc[N], sum = vf_zero();
    vi b = vi_set1(0x3c003c00);
    for (int i = 0; i < N; i++) acc[i] = vf_set1((float)i);
    if (bf16) {
        FLUSH_BEGIN;
        for (size_t s = 0; s < steps; s++) {
#pragma GCC unroll 24
            for (int i = 0; i < N; i++) acc[i] = step_bf16(acc[i], 0x3c003c00u, b);
        }
        FLUSH_END;
    } else {
        for (size_t s = 0; s < steps; s++) {
#pragma GCC unroll 24
            for (int i = 0; i < N; i++) acc[i] = step_f32(acc[i], 0x3c003c00u, b);
        }
    }
#pragma GCC unroll 24
    for (int i = 0; i < N; i++) sum = vf_add(sum, acc[i]);
    *sink = vf_sum(sum);
    return (double)steps * N * LANES * (bf16 ? 4 : 2);
}

void TABLE_FN(gemm)(struct kernel_table *table) {
    table->gemm_mr = MR;
    table->gemm_nr = NR;
    table->gemm_kc = KC;
    table->gemm_pack_a_units = pack_a_units;
    table->gemm_pack_a = pack_a;
    table->gemm_tile_rows = rows_per_tile;
    table->gemm_scratch = scratch_floats;
    table->gemm_panel = panel;
    table->peak = peak;
}
