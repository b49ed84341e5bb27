// Matrix products. A result is computed by column panels, a few neighbours at a time: their part of B is packed
// in chunks of k that stay in cache and used for all rows of A, which the caller has packed once. Accumulators pass from chunk to chunk
// and term to term through f32 memory, which changes no bits.
#include "gemm_kernel.h"
#include "gemv.h"
#include "table.h"

static size_t pack_a_units(size_t rows, size_t k, int32_t bf16) { return rows * units(k, bf16); }

static size_t rows_per_tile(size_t m) { return tile_rows(m); }

// The rows from row0 on, `count` of them, that lie in [first, last).
struct rows {
    size_t row0, mr;
};

static struct rows rows_inside(size_t row0, size_t count, size_t first, size_t last) {
    size_t end = row0 + count < last ? row0 + count : last;
    if (row0 < first) row0 = first;
    return (struct rows){row0, row0 < end ? end - row0 : 0};
}

// What a tile has of A lies at its first row's place times ku, so a chunk's at + u0 * mr.
static void pack_a(uint32_t *dst, const struct gemm_operand *a, size_t m, size_t first_row, size_t count, size_t k,
                   int32_t bf16, size_t first, size_t last) {
    size_t rows = tile_rows(m), ku = units(k, bf16);
    for (size_t t = first; t < last; t++) {
        struct rows r = rows_inside(t * rows, rows, first_row, first_row + count);
        if (r.mr) pack_a_tile(dst + (r.row0 - first_row) * ku, a, r.row0 - first_row, r.mr, 0, k, bf16);
    }
}

static size_t scratch_floats(size_t m, size_t panels, size_t first, size_t last) {
    return panels * (KC * NR + (last - first) * tile_rows(m) * NR);
}

INLINE vf load_bias(const struct gemm_args *g, size_t first, size_t left) {
    return g->bias ? v_load_part(at(g->bias, first, g->bias_type), left, g->bias_type) : vf_zero();
}

INLINE vf finished(const struct gemm_args *g, vf x, vf bias) {
    if (g->scale != 1.0f) x = vf_mul(x, vf_set1(g->scale));
    return g->bias ? vf_add(x, bias) : x;
}

// Accumulators [mr][NR] from the existing output.
static void load_tile(const struct gemm_args *g, float *c, size_t row0, size_t mr, size_t column, size_t count) {
    for (size_t i = 0; i < mr; i++)
        for (size_t j = 0; j < count; j += LANES) {
            const void *p = at(g->out, (row0 + i) * g->ldo + column + j, g->out_type);
            vf_store(c + i * NR + j, v_load_part(p, count - j, g->out_type));
        }
}

static void store_tile(const struct gemm_args *g, float *c, size_t row0, size_t mr, size_t column,
                       size_t count) {
    for (size_t i = 0; i < mr; i++)
        for (size_t j = 0; j < count; j += LANES) {
            vf bias = load_bias(g, column + j, count - j);
            void *p = at_mut(g->out, (row0 + i) * g->ldo + column + j, g->out_type);
            v_store_part(p, finished(g, vf_load(c + i * NR + j), bias), count - j, g->out_type);
        }
}

INLINE size_t at_most_lanes(size_t n) { return n < LANES ? n : LANES; }

// The same for a transposed output, 16 x 16 elements at a time.
static void load_tile_transposed(const struct gemm_args *g, float *c, size_t row0, size_t mr, size_t column,
                                 size_t count) {
    for (size_t i0 = 0; i0 < mr; i0 += LANES)
        for (size_t j0 = 0; j0 < count; j0 += LANES) {
            vi r[LANES];
            size_t columns = at_most_lanes(count - j0), rows = at_most_lanes(mr - i0);
            for (size_t j = 0; j < LANES; j++) {
                const void *p = at(g->out, (column + j0 + j) * g->ldo + row0 + i0, g->out_type);
                r[j] = j < columns ? vf_as_vi(v_load_part(p, mr - i0, g->out_type)) : vi_set1(0);
            }
            transpose16(r);
            for (size_t i = 0; i < rows; i++) vf_store(c + (i0 + i) * NR + j0, vi_as_vf(r[i]));
        }
}

static void store_tile_transposed(const struct gemm_args *g, float *c, size_t row0, size_t mr, size_t column,
                                  size_t count) {
    for (size_t i0 = 0; i0 < mr; i0 += LANES) {
        vf bias = load_bias(g, row0 + i0, mr - i0);
        for (size_t j0 = 0; j0 < count; j0 += LANES) {
            vi r[LANES];
            size_t columns = at_most_lanes(count - j0), rows = at_most_lanes(mr - i0);
            for (size_t i = 0; i < LANES; i++)
                r[i] = i < rows ? vf_as_vi(vf_load(c + (i0 + i) * NR + j0)) : vi_set1(0);
            transpose16(r);
            for (size_t j = 0; j < columns; j++) {
                void *p = at_mut(g->out, (column + j0 + j) * g->ldo + row0 + i0, g->out_type);
                v_store_part(p, finished(g, vi_as_vf(r[j]), bias), mr - i0, g->out_type);
            }
        }
    }
}

// What a job computes: `panels` panels from `column` on, rows [first_row, last_row).
struct job {
    const struct gemm_args *g;
    size_t column, panels, first_row, last_row;
    uint32_t *packed;    // [panels][KC][NR]
    float *accumulators; // [panels][rows][NR]
};

// A chunk of one term's k, for the panels from `column` on.
struct chunk {
    size_t term, u0, k0, k, column;
};

static size_t columns_of(const struct gemm_args *g, size_t column, size_t panels) {
    return g->n - column < panels * NR ? g->n - column : panels * NR;
}

static struct chunk chunk_at(const struct gemm_args *g, size_t column, size_t term, size_t u0) {
    size_t per_unit = g->bf16 ? 2 : 1, k0 = u0 * per_unit, left = g->terms[term].k - k0;
    return (struct chunk){term, u0, k0, left < KC * per_unit ? left : KC * per_unit, column};
}

// The chunk after c: of the same panels, or the first of the next ones, which this thread likely gets.
static struct chunk chunk_after(const struct job *job, struct chunk c) {
    const struct gemm_args *g = job->g;
    if (c.u0 + KC < units(g->terms[c.term].k, g->bf16)) return chunk_at(g, c.column, c.term, c.u0 + KC);
    if (c.term + 1 < g->n_terms) return chunk_at(g, c.column, c.term + 1, 0);
    return chunk_at(g, c.column + job->panels * NR, 0, 0);
}

// Asks for part `part` of `parts` of a chunk of B.
static void prefetch(const struct job *job, struct chunk chunk, size_t part, size_t parts) {
    const struct gemm_args *g = job->g;
    if (chunk.column >= g->n) return;
    prefetch_b_panel(&g->terms[chunk.term].b, chunk.column, columns_of(g, chunk.column, job->panels), chunk.k0,
                     chunk.k, part, parts);
}

// A chunk's part of B in one panel of NR columns: KC * NR * 4 bytes at most.
static void pack_b(uint32_t *dst, const struct gemm_operand *b, size_t column, size_t count, size_t k0, size_t k,
                   int bf16) {
    if (!b->quantized) pack_b_panel(dst, NR, b, column, count, k0, k, bf16);
    else if (b->transposed) pack_quantized_lines(dst, b->quantized, column, count, k0, k, bf16);
    else pack_quantized_columns(dst, b->quantized, column, count, k0, k, bf16);
}

// Adds a chunk to the accumulators of its term's rows, which start from zero if `first`.
static void add_chunk(const struct job *job, struct chunk chunk, int first) {
    const struct gemm_args *g = job->g;
    const struct gemm_term *term = &g->terms[chunk.term];
    size_t rows = tile_rows(g->m), job_rows = job->last_row - job->first_row;
    size_t ku = units(term->k, g->bf16), parts = (job_rows + rows - 1) / rows;
    if (term->last_row <= job->first_row || term->first_row >= job->last_row) return;
    for (size_t p = 0; p < job->panels; p++) {
        size_t column = chunk.column + p * NR;
        pack_b(job->packed + p * KC * NR, &term->b, column, columns_of(g, column, 1), chunk.k0, chunk.k, g->bf16);
    }
    struct chunk next = chunk_after(job, chunk);
    for (size_t part = 0; part < parts; part++) {
        prefetch(job, next, part, parts);
        struct rows r = rows_inside(job->first_row + part * rows, rows, term->first_row, term->last_row);
        if (!r.mr) continue;
        const uint32_t *a = term->a + (r.row0 - term->first_row) * ku + chunk.u0 * r.mr;
        for (size_t p = 0; p < job->panels; p++) {
            float *c = job->accumulators + (p * job_rows + r.row0 - job->first_row) * NR;
            tile_for(r.mr, columns_of(g, chunk.column + p * NR, 1), g->bf16)(
                units(chunk.k, g->bf16), a, job->packed + p * KC * NR, c, NR, first);
        }
    }
}

typedef void (*tile_copy)(const struct gemm_args *g, float *c, size_t row0, size_t mr, size_t column,
                          size_t count);

static void copy_tiles(const struct job *job, tile_copy copy) {
    size_t rows = job->last_row - job->first_row;
    for (size_t p = 0; p < job->panels; p++) {
        size_t column = job->column + p * NR;
        copy(job->g, job->accumulators + p * rows * NR, job->first_row, rows, column, columns_of(job->g, column, 1));
    }
}

static void panels(const struct gemm_args *g, size_t column, size_t count, size_t first, size_t last,
                   float *scratch) {
    size_t rows = tile_rows(g->m), last_row = last * rows < g->m ? last * rows : g->m;
    struct job job = {g, column, count, first * rows, last_row, (uint32_t *)scratch, scratch + count * KC * NR};
    int started = 0;
    if (g->accumulate) {
        copy_tiles(&job, g->out_transposed ? load_tile_transposed : load_tile);
        started = 1;
    }
    for (size_t t = 0; t < g->n_terms; t++) {
        const struct gemm_term *term = &g->terms[t];
        int of_all = term->last_row - term->first_row == g->m;
        if (!of_all && !started) {
            memset(job.accumulators, 0, count * (last_row - job.first_row) * NR * sizeof(float));
            started = 1;
        }
        size_t done = 0;
        if (g->bf16 && of_all && count == 1)
            done = few_rows(&term->b, column, g->n, g->m, term->a, term->k, job.accumulators, NR, !started);
        started |= done > 0;
        for (size_t u0 = done; u0 < units(g->terms[t].k, g->bf16); u0 += KC) {
            add_chunk(&job, chunk_at(g, column, t, u0), !started);
            started = 1;
        }
    }
    if (!started) memset(job.accumulators, 0, count * (last_row - job.first_row) * NR * sizeof(float));
    copy_tiles(&job, g->out_transposed ? store_tile_transposed : store_tile);
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
    table->gemm_panels = panels;
    table->peak = peak;
}
