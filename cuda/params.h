// The kernels' arguments: each kernel takes one of these structures by value, named after it.
//
// Element types are in the kernels' names (add_bf16); sizes count elements unless they say bytes. The Rust bindings of
// this header are made by tools/regenerate_bindings.sh.
#ifndef LOWRANK_PARAMS_H
#define LOWRANK_PARAMS_H

#include <stdint.h>

#include "tensor_map.h"

// Bits of the word that `faults` points to: what a kernel was given and could not use. It does nothing there and sets
// the bit; the host looks at it when it next waits.
enum fault {
    FAULT_GATHER_ROWS = 1,
    FAULT_SCATTER_ADD_ROWS = 2,
    FAULT_ROPE = 4,
    FAULT_CROSS_ENTROPY = 8,
    FAULT_QUANTIZE = 16,
};

// fill_{f32,bf16,f16}
struct fill_params {
    void *out;
    uint64_t n;
    float value;
};

// cast_{f32,bf16,f16}_{f32,bf16,f16}: from the first type to the second
struct cast_params {
    void *out;
    const void *x;
    uint64_t n;
};

// add_{f32,bf16}
struct add_params {
    void *out;
    const void *a, *b;
    uint64_t n;
};

// scale_{f32,bf16}
struct scale_params {
    void *x;
    uint64_t n;
    float factor;
};

// What `kind` means in activations.
enum activation_kind {
    ACTIVATION_SILU,
    ACTIVATION_GELU,
    ACTIVATION_GELU_TANH,
    ACTIVATION_RELU,
    ACTIVATION_TANH,
    ACTIVATION_SIGMOID
};

// activation_{f32,bf16}
struct activation_params {
    void *y;
    const void *x;
    uint64_t n;
    int32_t kind;
};

// activation_backward_{f32,bf16}
struct activation_backward_params {
    void *dx;
    const void *dy, *x;
    uint64_t n;
    int32_t kind;
};

// gated_{f32,bf16}
struct gated_params {
    void *y;
    const void *gate, *up;
    uint64_t n;
    int32_t kind;
};

// gated_backward_{f32,bf16}
struct gated_backward_params {
    void *dgate, *dup;
    const void *dy, *gate, *up;
    uint64_t n;
    int32_t kind;
};

// softcap_f32
struct softcap_params {
    float *x;
    uint64_t n;
    float cap;
};

// softcap_backward_{f32,bf16}
struct softcap_backward_params {
    void *dx;
    const float *y;
    uint64_t n;
    float cap;
};

// rsqrt_f32
struct rsqrt_params {
    float *out;
    const float *x;
    uint64_t n;
};

// dropout_{f32,bf16}: element e of the tensor is first_element + its index
struct dropout_params {
    void *y;
    const void *x;
    uint64_t n, first_element;
    float p;
    uint32_t key[2];
    int32_t accumulate;
};

// rope_{f32,bf16}: of each x [rows, n_heads * head_dim], which blockIdx.y counts; table [table_rows, rotary_dim]: cosines,
// then sines
#define ROPE_MAX 2
struct rope_params {
    void *x[ROPE_MAX];
    uint32_t n_heads[ROPE_MAX];
    const float *table;
    const int32_t *positions; // [rows]
    uint32_t *faults;
    uint64_t rows;
    uint32_t head_dim, rotary_dim, table_rows;
    int32_t interleaved, inverse;
};

// An operand's element type at run time.
enum element_type { TYPE_F32, TYPE_BF16, TYPE_F16, TYPE_QUANTIZED };

// rms_norm_{f32,bf16}, layer_norm_{f32,bf16}, and the same of {rms,layer}_norm_long with a block for each row, which it has
// in dynamic shared memory, f32 in whole packs: rows of cols; stats: rstd, or mean and rstd of each row
struct norm_params {
    void *y;
    float *stats;
    const void *x, *weight, *bias; // bias may be null
    // norm_long alone: what is added to x first, and the sum; or null
    const void *added;
    void *sum;
    uint64_t rows;
    uint32_t cols;
    float eps;
    int32_t weight_type; // of bias, too
};

// rms_norm_dx_{f32,bf16}, layer_norm_dx_{f32,bf16}, and the same of {rms,layer}_norm_dx_long, with two such rows
struct norm_dx_params {
    void *dx;
    const void *dy, *x, *weight;
    const float *stats;
    uint64_t rows;
    uint32_t cols;
    int32_t weight_type, accumulate;
};

// rms_norm_dweight_{f32,bf16}, layer_norm_dweight_{f32,bf16}
struct norm_dweight_params {
    float *dweight; // [cols], added to
    const void *dy, *x;
    const float *stats;
    uint64_t rows;
    uint32_t cols;
};

// column_sums_{f32,bf16}: out [cols] += sums over the rows of a; column_products: of a times b
struct column_sums_params {
    float *out;
    const void *a, *b;
    uint64_t rows;
    uint32_t cols;
};

// scale_columns_{f32,bf16}
struct scale_columns_params {
    void *out;
    const void *x;
    const float *factors, *bias; // [cols]; bias may be null
    uint64_t n;
    uint32_t cols;
};

// sum_squares: one sum for each block of SUM_BLOCK elements
#define SUM_BLOCK 4096
struct sum_squares_params {
    float *sums;
    const float *x;
    uint64_t n;
};

// gather_rows_{f32,bf16,f16}_{f32,bf16,f16}: from the first type to the second; indices [n] into x [x_rows, cols]
struct gather_rows_params {
    void *out;
    const void *x;
    const int32_t *indices;
    uint32_t *faults;
    uint64_t n, x_rows;
    uint32_t cols;
};

// scatter_add_rows_{f32_f32,bf16_bf16,bf16_f32}: x [n, cols] of the first type added to rows of out [out_rows, cols]
struct scatter_add_rows_params {
    void *out;
    const void *x;
    const int32_t *indices;
    uint32_t *faults;
    uint64_t n, out_rows;
    uint32_t cols;
};

// copy_columns_{f32,bf16}
struct copy_columns_params {
    void *out;
    const void *x;
    uint64_t rows;
    uint32_t out_cols, out_col, x_cols, x_col, cols;
    int32_t accumulate;
};

// cross_entropy_{f32,bf16}, by the type of dlogits, which may be null
struct cross_entropy_params {
    float *losses; // [rows]
    void *dlogits; // [rows, vocabulary]
    const float *logits;
    const int32_t *targets;
    uint32_t *faults;
    uint64_t rows;
    uint32_t vocabulary;
    float grad_scale;
};

// adamw, lion (without v), sgd (without m and v): see adamw_args of cpu/kernels.h
struct optimizer_params {
    float *p, *m, *v;
    const float *g;
    uint64_t n;
    float grad_scale, decay, beta1, one_minus_beta1, beta2, one_minus_beta2;
    float bias_correction2_sqrt, epsilon, step_size, weight_decay;
    const float *verdict; // on the step, in whose place grad_scale is and which may forbid it; or null
};

// A verdict on steps is float [3]: the first step whose losses or gradients are not finite, counted from 1, or 0; 1 if they
// are its losses, else 0; and the last step's grad_scale.

// judge_losses
struct judge_losses_params {
    float *verdict;
    const float *losses;
    uint64_t n;
    float step;
};

// judge_gradients: sums are those of sum_squares; max_grad_norm is infinite where there is no bound
struct judge_gradients_params {
    float *verdict;
    const float *sums;
    uint64_t n;
    double max_grad_norm;
    float step;
};

// adamw_8bit: blocks of 256 elements; see moments_8bit of cpu/kernels.h
struct adamw_8bit_params {
    struct optimizer_params step; // without m and v
    uint8_t *m, *v;
    float *m_absmax, *v_absmax;
    const float *m_map, *m_midpoints, *v_map, *v_midpoints;
};

// A quantized matrix [rows, cols], as struct quantized of cpu/kernels.h.
struct quantized_matrix {
    uint8_t *codes;
    float *scales;
    uint8_t *zeros;
    const uint8_t *nested;
    const float *nested_absmax, *nested_map;
    float nested_offset;
    int32_t nested_shift;
    float levels[16]; // of codes of four bits
    uint64_t rows, cols, block_rows, block_cols, blocks_per_row;
    int32_t format; // 0 four bits by levels, 1 int8, 2 float8 e4m3, 3 float8 e5m2, 4 six bits
    // log2 of block_rows and block_cols, 63 for blocks as long as a row.
    int32_t block_rows_shift, block_cols_shift;
    // Formats of GGUF files: minimums of blocks, plain or products, or null. Without a map nested codes are whole numbers in
    // two's complement.
    const float *minimums;
    const uint8_t *minimum_codes;
    const float *minimum_factors;
};

// quantize_{f32,bf16,f16}: a warp for each block; see struct quantizer of cpu/kernels.h
struct quantize_params {
    struct quantized_matrix q;
    const void *x;
    uint32_t *faults;
    uint64_t blocks;
    float thresholds[15];
    uint8_t ranks[16];
    int32_t has_thresholds;
    float max_level;
};

// dequantize_{f32,bf16,f16}
struct dequantize_params {
    struct quantized_matrix q;
    void *out;
};

// A matrix as it is stored: rows of `ld` elements.
struct gemm_operand {
    const void *data; // null if quantized
    uint64_t ld;
    int32_t type;
    int32_t transposed; // the operand is the transpose of what is stored
};

// a [m, k] times b [k, n]
struct gemm_term {
    struct gemm_operand a, b;
    struct quantized_matrix quantized; // what b is if its type is TYPE_QUANTIZED
    uint64_t k;                        // not 0
};

// out [m, n] = scale * (out if accumulate + sum of a b over the terms) + bias [n] or null
#define GEMM_MAX_TERMS 4
#define GEMM_MAX_PROBLEMS 4
struct gemm_problem {
    void *out;
    const void *bias;
    uint32_t m, n, n_terms;
    uint32_t first_block; // of the grid
    int32_t out_type, bias_type, accumulate;
    float scale;
    struct gemm_term terms[GEMM_MAX_TERMS];
};

// gemm_{bf16,decoded}_{16x32,64x64,128x128}_{nt,nn}, gemm_bf16_{16x32,64x64,128x128}_tn, gemv_{8x32,16x32,32x32},
// gemm_any_bf16, gemm_f32, gemm_parts_16x32_{nt,nn}
struct gemm_params {
    uint32_t n_problems;
    uint32_t code_bits;   // of an element of the operands that are decoded
    uint32_t pair_copies; // log2 of the copies of the table of pairs in shared memory
    // gemm_parts alone: [tiles, 4, rows and columns of one], and [tiles], how many parts of a tile are there: zeros before and
    // after.
    float *parts;
    uint32_t *arrived;
    struct gemm_problem problems[GEMM_MAX_PROBLEMS];
};

// gemm_hopper_{bf16,codes4,codes8}_{128,192}_{nt,nn}, gemm_hopper_bf16_{128,192}_tn, and the same of gemm_hopper_split of 128 rows;
// gemm_hopper_square_bf16_{128,192,208}_{nt,nn}, gemm_hopper_square_bf16_{128,192}_tn; first_block of a problem counts the
// tiles of clusters. tensor_maps: of each term, of what TMA copies of both operands.
struct gemm_hopper_params {
    struct gemm_params gemm;
    uint32_t tiles;  // of clusters, each cut one of gemm_hopper_square counting as its four tiles
    uint32_t whole;  // the tiles before the first cut one
    uint32_t stages; // of the ring, at most GEMM_HOPPER_MAX_STAGES
    struct tensor_map tensor_maps[GEMM_MAX_PROBLEMS][GEMM_MAX_TERMS][2];
};
#define GEMM_HOPPER_MAX_STAGES 8

// What is known of a row of logits when some of its columns have been seen: the largest, the sum of exp(logit - top), and
// the target's, all after the cap.
struct cross_entropy_stats {
    float top, sum, target;
};

// cross_entropy_columns_{f32,bf16}: a block for each row of the logits of `columns` tokens from `first` on. sums
// [rows, hidden] are of earlier weights times the head.
struct cross_entropy_columns_params {
    void *weights; // [rows, columns]: exp(logit - top) times the cap's derivative, 0 for the target; or null
    float *sums;   // or null
    struct cross_entropy_stats *stats; // [rows], overwritten if first is 0
    const float *logits;               // [rows, columns]
    const int32_t *targets;            // [rows]
    uint32_t first, columns, hidden;
    float softcap; // 0: no cap
};

// cross_entropy_finish_{f32,bf16}: a block for each row. head: [vocabulary, hidden]
struct cross_entropy_finish_params {
    float *losses; // [rows]
    void *dx;      // [rows, hidden], or null
    const float *sums;
    const struct cross_entropy_stats *stats;
    const int32_t *targets;
    uint32_t *faults;
    struct gemm_operand head;
    struct quantized_matrix quantized; // what head is if its type is TYPE_QUANTIZED
    uint32_t vocabulary, hidden;
    float softcap, grad_scale;
};

// The rows of one sequence of an attention, as in backend::Sequence, and where its parts begin.
struct attention_sequence {
    uint32_t q_start, q_len, k_start, k_len, part_start;
};

// attention_{f32_{64,128,256},bf16_{64,96,128,256}}, and the same of attention_split and attention_join
struct attention_params {
    void *out;                                  // [tokens, n_heads * head_dim]
    float *lse;                                 // [tokens, n_heads]
    const void *q, *k, *v;                      // [tokens, n_heads * head_dim], [key rows, n_kv_heads * head_dim]
    const struct attention_sequence *sequences; // blockIdx.z counts them
    // Of a sequence's heads, queries and tiles of keys: the products with v [.., head_dim], and maxima and sums [.., 2].
    float *parts, *part_stats;
    uint32_t n_heads, n_kv_heads, head_dim;
    uint32_t max_queries; // of a sequence
    int32_t window;       // INT32_MAX: none
    float scale, softcap; // 0: no cap
    int32_t aligned;      // whether every row of a head begins at a multiple of 16 bytes and has a multiple of them
};

// attention_hopper_{64,128}: of boxes of 64 x 64.
struct attention_hopper_params {
    struct attention_params attention;
    struct tensor_map q, k, v;
};
#define ATTENTION_HOPPER_STAGES 2 // of the rings of keys and of values

// attention_delta_{f32,bf16}
struct attention_delta_params {
    float *delta; // [tokens, n_heads]
    const void *dout, *out;
    uint64_t rows; // tokens * n_heads
    uint32_t head_dim;
};

// attention_backward_keys_{f32_{64,128,256},bf16_{64,96,128,256}} and the same of attention_backward_queries
struct attention_backward_params {
    void *dq, *dk, *dv; // the first kernel writes dk and dv, the second one dq
    const void *dout, *q, *k, *v;
    const float *lse, *delta;
    const struct attention_sequence *sequences;
    uint32_t n_heads, n_kv_heads, head_dim;
    int32_t window;
    float scale, softcap;
    int32_t aligned;
};

// attention_backward_{keys,queries}_hopper_{64,128}: of boxes of 64 x 64.
struct attention_backward_hopper_params {
    struct attention_backward_params attention;
    struct tensor_map q, k, v, dout;
};
#define ATTENTION_BACKWARD_HOPPER_STAGES 3 // of the ring of pairs of tiles

// The token of a row that has none: a score is not a number.
#define SAMPLE_NONE 0xffffffffu

// How a row's token is chosen; see SampleRow in Rust. Its ids are those seen, then those banned.
struct sample_row {
    float temperature, top_p, uniform, penalty;
    uint32_t top_k, first_id, n_seen, n_banned;
};

// sample_{prepare,weights,choose}: scores [rows, vocabulary], weights alike, sums [rows, blocks of 64 and of 64 such]
struct sample_params {
    float *scores, *tops;
    double *weights, *sums;
    uint32_t *tokens;
    const struct sample_row *rows;
    const uint32_t *ids;
    uint32_t vocabulary;
};

#endif
