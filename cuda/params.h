// The kernels' arguments: each kernel takes one of these structures by value, named after it.
//
// Element types are in the kernels' names (add_bf16); sizes count elements unless they say bytes. The Rust bindings of
// this header are made by tools/regenerate_bindings.sh.
#ifndef LOWRANK_PARAMS_H
#define LOWRANK_PARAMS_H

#include <stdint.h>

// Bits of the word that `faults` points to: what a kernel was given and could not use. It does nothing there and sets
// the bit; the host looks at it when it next waits.
enum fault {
    FAULT_GATHER_ROWS = 1,
    FAULT_SCATTER_ADD_ROWS = 2,
    FAULT_ROPE = 4,
    FAULT_CROSS_ENTROPY = 8,
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

// rope_{f32,bf16}: x [rows, n_heads * head_dim]; table [table_rows, rotary_dim]: cosines, then sines
struct rope_params {
    void *x;
    const float *table;
    const int32_t *positions; // [rows]
    uint32_t *faults;
    uint64_t rows;
    uint32_t n_heads, head_dim, rotary_dim, table_rows;
    int32_t interleaved, inverse;
};

#endif
