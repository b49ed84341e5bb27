// The C kernels' interface: argument structures and one table of functions per instruction set.
//
// Kernels never allocate, start threads or wait; scratch memory is passed in. Element types are 0 = f32,
// 1 = bf16, 2 = f16; sizes and leading dimensions count elements. The Rust bindings of this header are made
// by tools/regenerate_bindings.sh.
#ifndef LOWRANK_KERNELS_H
#define LOWRANK_KERNELS_H

#include <stddef.h>
#include <stdint.h>

// A quantized matrix [rows, cols]; see Quantized in Rust. The scale of block b is scales[b], or, where scales
// are quantized themselves, nested_map[nested[b]] * nested_absmax[b >> nested_shift] + nested_offset.
struct quantized {
    // Four bits: two in a byte, the even element of the flat matrix in the high half. Six bits: the low four of all like
    // that, then the high two of all, four in a byte, the first element's lowest.
    uint8_t *codes;
    float *scales;
    uint8_t *zeros; // zero points, or null
    const uint8_t *nested;
    const float *nested_absmax, *nested_map;
    float nested_offset;
    int32_t nested_shift;
    // Minimums, added after the scale, or null: of block b minimums[b], or, in the form of nested scales,
    // nested_map[minimum_codes[b]] * minimum_factors[b >> nested_shift].
    float *minimums;
    const uint8_t *minimum_codes;
    const float *minimum_factors;
    const float *levels; // [16], of codes of four bits
    // Blocks are [block_rows, block_cols], blocks_per_row side by side; with block_rows 0 they are runs of
    // block_cols elements of the flat matrix.
    size_t rows, cols, block_rows, block_cols, blocks_per_row;
    int32_t format; // of the codes: 0 four bits by levels, 1 int8, 2 float8 e4m3, 3 float8 e5m2, 4 six bits
    int32_t panels; // whether codes, scales, zero points and minimums lie as panels.h says
};

// How a block is quantized: x * (1 / scale) becomes the nearest code, scale being absmax / max_level.
struct quantizer {
    const float *thresholds; // [15] ascending; x above the i-th has a rank above i; null: whole numbers
    const float *ranks;      // [16] codes by rank, as floats
    float max_level;
};

// A stored matrix [rows, ld], or the transpose of one; quantized if `quantized` is not null.
struct gemm_operand {
    const void *data;
    const struct quantized *quantized;
    size_t ld;
    int32_t type;
    int32_t transposed;
};

// One product: A packed by gemm_pack_a, B as stored. Rows [first_row, last_row) of the result have it, and A has them
// alone.
struct gemm_term {
    const uint32_t *a;
    struct gemm_operand b;
    size_t k, first_row, last_row;
};

// out = scale * (init + sum of A B) + bias. With out_transposed it is the transpose that is stored, [n, ldo],
// and bias is [m].
struct gemm_args {
    const struct gemm_term *terms;
    size_t n_terms;
    size_t m, n;
    void *out;
    size_t ldo;
    int32_t out_type, out_transposed;
    int32_t bf16; // arithmetic
    int32_t accumulate;
    float scale;
    const void *bias;
    int32_t bias_type;
};

// Rows of one sequence in packed tensors; see Sequence in Rust.
struct attention_args {
    const void *q, *k, *v; // first row of this sequence and head
    size_t q_ld, k_ld;
    size_t q_len, k_len, head_dim;
    int32_t one_token; // forward only: the queries are a token's heads that share k and v, and see all keys
    float scale;
    float softcap;  // 0: none
    size_t window;  // keys a query sees at most, itself among them; 0: all
    int32_t type;
    void *out;
    size_t out_ld;
    float *lse;
    size_t lse_ld;
    // Backward only.
    const void *dout;
    void *dq;
    float *dk, *dv; // [k_len, attention_padded_dim], this query head's part
};

// Rotary embedding of rows.
struct rope_args {
    void *x;
    size_t rows, n_heads, head_dim, rotary_dim;
    const float *table;
    size_t table_rows;
    const int32_t *positions;
    int32_t type, interleaved, inverse;
};

// Constants of one optimizer step, derived in double precision; see AdamW in Rust.
struct adamw_args {
    float grad_scale;
    float decay; // 1 - learning_rate * weight_decay
    float beta1, one_minus_beta1, beta2, one_minus_beta2;
    float bias_correction2_sqrt, epsilon;
    float step_size; // learning_rate / bias_correction1; without a correction the learning rate
    float weight_decay;
};

// Moments in eight bits: codes [n] and a constant for each 256 of them, by ascending maps of 256 numbers with the 255
// midpoints between them. m's map is signed, v's begins at zero.
struct moments_8bit {
    uint8_t *m, *v;
    float *m_absmax, *v_absmax;
    const float *m_map, *m_midpoints, *v_map, *v_midpoints;
};

// The functions that fill an instruction set's table.
struct kernel_table;
void lowrank_table_scalar(struct kernel_table *table);
void lowrank_table_avx2(struct kernel_table *table);
void lowrank_table_avx512(struct kernel_table *table);
void lowrank_table_avx512bf16(struct kernel_table *table);

struct kernel_table {
    const char *isa;
    size_t gemm_mr, gemm_nr, gemm_kc;

    // Number of 32-bit units that packing A [rows, k] takes.
    size_t (*gemm_pack_a_units)(size_t rows, size_t k, int32_t bf16);
    // Packs A [rows, k], the rows from first_row on of a result of m, as far as it lies in the result's tiles
    // [first, last); a tile has gemm_tile_rows(m) rows.
    void (*gemm_pack_a)(uint32_t *dst, const struct gemm_operand *a, size_t m, size_t first_row, size_t rows,
                        size_t k, int32_t bf16, size_t first, size_t last);
    size_t (*gemm_tile_rows)(size_t m);
    // Floats of scratch that gemm_panels takes for `panels` panels and tiles [first, last).
    size_t (*gemm_scratch)(size_t m, size_t panels, size_t first, size_t last);
    // `panels` panels of gemm_nr columns from `column` on (all of them begin inside the result), tiles
    // [first, last) of its rows.
    void (*gemm_panels)(const struct gemm_args *args, size_t column, size_t panels, size_t first, size_t last,
                        float *scratch);

    // Floats of scratch for attention over a sequence.
    size_t (*attention_scratch)(size_t q_len, size_t k_len, size_t head_dim, int32_t backward);
    // Queries [first, last) of one head.
    void (*attention)(const struct attention_args *args, size_t first, size_t last, float *scratch);
    // Row length of dk and dv.
    size_t (*attention_padded_dim)(size_t head_dim);
    // out [rows, cols] = sum of n_parts matrices [rows, part_ld] of floats, in order.
    void (*attention_sum_parts)(void *out, size_t out_ld, int32_t type, const float *parts, size_t part_stride,
                                size_t n_parts, size_t part_ld, size_t rows, size_t cols);
    // All queries of one head: dq written, dk and dv written.
    void (*attention_backward)(const struct attention_args *args, float *scratch);

    // Quantizes blocks [first, last) of x [rows, cols] into codes, scales and zero points. Returns 0 if an
    // element is not finite. Blocks of four-bit codes have an even number of elements.
    int32_t (*quantize)(const struct quantized *q, const struct quantizer *how, const void *x, int32_t type,
                        size_t first, size_t last);
    // Lays panels [first, last) of a matrix of codes out as panels.h says. Returns 0 if products could not
    // take them: because of this instruction set, or since a scale is so small that elements may be denormal.
    int32_t (*lay_out_panels)(const struct quantized *to, const struct quantized *from, size_t first, size_t last);
    // Row `row` of q, rounded to out_type.
    void (*dequantize_row)(const struct quantized *q, size_t row, void *out, int32_t out_type);

    void (*rms_norm)(void *y, float *rstd, const void *x, const void *weight, int32_t weight_type, size_t rows,
                     size_t cols, float eps, int32_t type);
    void (*rms_norm_dx)(void *dx, const void *dy, const void *x, const float *rstd, const void *weight,
                        int32_t weight_type, size_t rows, size_t cols, int32_t accumulate, int32_t type);
    // Columns [first, last) of dweight += sum over rows.
    void (*rms_norm_dweight)(float *dweight, const void *dy, const void *x, const float *rstd, size_t rows,
                             size_t cols, size_t first, size_t last, int32_t type);
    void (*layer_norm)(void *y, float *stats, const void *x, const void *weight, const void *bias,
                       int32_t weight_type, size_t rows, size_t cols, float eps, int32_t type);
    void (*layer_norm_dx)(void *dx, const void *dy, const void *x, const float *stats, const void *weight,
                          int32_t weight_type, size_t rows, size_t cols, int32_t accumulate, int32_t type);
    void (*layer_norm_dweight)(float *dweight, const void *dy, const void *x, const float *stats, size_t rows,
                               size_t cols, size_t first, size_t last, int32_t type);
    // Columns [first, last) of out += sum over rows of x.
    void (*column_products)(float *out, const void *a, const void *b, size_t rows, size_t cols, size_t first,
                            size_t last, int32_t type);
    void (*scale_columns)(void *out, const void *x, const float *factors, const float *bias, size_t rows, size_t cols,
                          int32_t type);
    void (*softcap)(float *x, size_t n, float cap);
    void (*softcap_backward)(void *dx, const float *y, size_t n, float cap, int32_t type);
    void (*rsqrt)(float *out, const float *x, size_t n);
    void (*column_sums)(float *out, const void *x, size_t rows, size_t cols, size_t first, size_t last,
                        int32_t type);

    void (*rope)(const struct rope_args *args);

    // kind: 0 silu, 1 gelu, 2 gelu_tanh, 3 relu
    void (*activation)(void *y, const void *x, size_t n, int32_t kind, int32_t type);
    void (*activation_backward)(void *dx, const void *dy, const void *x, size_t n, int32_t kind, int32_t type);
    void (*gated)(void *y, const void *gate, const void *up, size_t n, int32_t kind, int32_t type);
    void (*gated_backward)(void *dgate, void *dup, const void *dy, const void *gate, const void *up, size_t n,
                           int32_t kind, int32_t type);

    // Element e of the tensor is first_element + index.
    void (*dropout)(void *y, const void *x, size_t n, uint64_t first_element, float p, uint32_t key0,
                    uint32_t key1, int32_t accumulate, int32_t type);

    void (*cross_entropy)(float *losses, void *dlogits, int32_t dlogits_type, const float *logits,
                          const int32_t *targets, size_t rows, size_t vocabulary, float grad_scale);

    void (*add)(void *out, const void *a, const void *b, size_t n, int32_t type);
    void (*scale)(void *out, size_t n, float factor, int32_t type);
    void (*cast)(void *out, int32_t out_type, const void *x, int32_t type, size_t n);
    // Sum of squares of at most 4096 floats by 16 lanes.
    float (*sum_squares)(const float *x, size_t n);
    void (*adamw)(float *p, const float *g, float *m, float *v, size_t n, const struct adamw_args *step);
    // Blocks [first, last) of 256 elements; the last may be shorter.
    void (*adamw_8bit)(float *p, const float *g, const struct moments_8bit *moments, size_t n, size_t first,
                       size_t last, const struct adamw_args *step);
    void (*lion)(float *p, const float *g, float *m, size_t n, const struct adamw_args *step);
    void (*sgd)(float *p, const float *g, size_t n, const struct adamw_args *step);
    // Runs `steps` rounds of independent fused multiply-adds (or bf16 dot products); returns the operations
    // done, for measuring the machine's peak.
    double (*peak)(size_t steps, int32_t bf16, float *sink);
};

#endif
