// Made from cuda/params.h by tools/regenerate_bindings.sh; do not edit.

pub const ROPE_MAX: u32 = 2;
pub const SUM_BLOCK: u32 = 4096;
pub const GEMM_MAX_TERMS: u32 = 4;
pub const GEMM_MAX_PROBLEMS: u32 = 4;
pub const GEMM_HOPPER_MAX_STAGES: u32 = 8;
pub const ATTENTION_HOPPER_STAGES: u32 = 2;
pub const ATTENTION_BACKWARD_HOPPER_STAGES: u32 = 3;
pub const SAMPLE_NONE: u32 = 4294967295;
#[repr(C)]
#[repr(align(128))]
#[derive(Debug, Copy, Clone)]
pub struct tensor_map {
    pub words: [u64; 16usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of tensor_map"][::core::mem::size_of::<tensor_map>() - 128usize];
    ["Alignment of tensor_map"][::core::mem::align_of::<tensor_map>() - 128usize];
    ["Offset of field: tensor_map::words"][::core::mem::offset_of!(tensor_map, words) - 0usize];
};
pub const FAULT_GATHER_ROWS: fault = 1;
pub const FAULT_SCATTER_ADD_ROWS: fault = 2;
pub const FAULT_ROPE: fault = 4;
pub const FAULT_CROSS_ENTROPY: fault = 8;
pub const FAULT_QUANTIZE: fault = 16;
pub type fault = ::core::ffi::c_uint;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct fill_params {
    pub out: *mut ::core::ffi::c_void,
    pub n: u64,
    pub value: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of fill_params"][::core::mem::size_of::<fill_params>() - 24usize];
    ["Alignment of fill_params"][::core::mem::align_of::<fill_params>() - 8usize];
    ["Offset of field: fill_params::out"][::core::mem::offset_of!(fill_params, out) - 0usize];
    ["Offset of field: fill_params::n"][::core::mem::offset_of!(fill_params, n) - 8usize];
    ["Offset of field: fill_params::value"][::core::mem::offset_of!(fill_params, value) - 16usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct cast_params {
    pub out: *mut ::core::ffi::c_void,
    pub x: *const ::core::ffi::c_void,
    pub n: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of cast_params"][::core::mem::size_of::<cast_params>() - 24usize];
    ["Alignment of cast_params"][::core::mem::align_of::<cast_params>() - 8usize];
    ["Offset of field: cast_params::out"][::core::mem::offset_of!(cast_params, out) - 0usize];
    ["Offset of field: cast_params::x"][::core::mem::offset_of!(cast_params, x) - 8usize];
    ["Offset of field: cast_params::n"][::core::mem::offset_of!(cast_params, n) - 16usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct add_params {
    pub out: *mut ::core::ffi::c_void,
    pub a: *const ::core::ffi::c_void,
    pub b: *const ::core::ffi::c_void,
    pub n: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of add_params"][::core::mem::size_of::<add_params>() - 32usize];
    ["Alignment of add_params"][::core::mem::align_of::<add_params>() - 8usize];
    ["Offset of field: add_params::out"][::core::mem::offset_of!(add_params, out) - 0usize];
    ["Offset of field: add_params::a"][::core::mem::offset_of!(add_params, a) - 8usize];
    ["Offset of field: add_params::b"][::core::mem::offset_of!(add_params, b) - 16usize];
    ["Offset of field: add_params::n"][::core::mem::offset_of!(add_params, n) - 24usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct scale_params {
    pub x: *mut ::core::ffi::c_void,
    pub n: u64,
    pub factor: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of scale_params"][::core::mem::size_of::<scale_params>() - 24usize];
    ["Alignment of scale_params"][::core::mem::align_of::<scale_params>() - 8usize];
    ["Offset of field: scale_params::x"][::core::mem::offset_of!(scale_params, x) - 0usize];
    ["Offset of field: scale_params::n"][::core::mem::offset_of!(scale_params, n) - 8usize];
    ["Offset of field: scale_params::factor"][::core::mem::offset_of!(scale_params, factor) - 16usize];
};
pub const ACTIVATION_SILU: activation_kind = 0;
pub const ACTIVATION_GELU: activation_kind = 1;
pub const ACTIVATION_GELU_TANH: activation_kind = 2;
pub const ACTIVATION_RELU: activation_kind = 3;
pub const ACTIVATION_TANH: activation_kind = 4;
pub const ACTIVATION_SIGMOID: activation_kind = 5;
pub type activation_kind = ::core::ffi::c_uint;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct activation_params {
    pub y: *mut ::core::ffi::c_void,
    pub x: *const ::core::ffi::c_void,
    pub n: u64,
    pub kind: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of activation_params"][::core::mem::size_of::<activation_params>() - 32usize];
    ["Alignment of activation_params"][::core::mem::align_of::<activation_params>() - 8usize];
    ["Offset of field: activation_params::y"][::core::mem::offset_of!(activation_params, y) - 0usize];
    ["Offset of field: activation_params::x"][::core::mem::offset_of!(activation_params, x) - 8usize];
    ["Offset of field: activation_params::n"][::core::mem::offset_of!(activation_params, n) - 16usize];
    ["Offset of field: activation_params::kind"][::core::mem::offset_of!(activation_params, kind) - 24usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct activation_backward_params {
    pub dx: *mut ::core::ffi::c_void,
    pub dy: *const ::core::ffi::c_void,
    pub x: *const ::core::ffi::c_void,
    pub n: u64,
    pub kind: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of activation_backward_params"][::core::mem::size_of::<activation_backward_params>() - 40usize];
    ["Alignment of activation_backward_params"]
        [::core::mem::align_of::<activation_backward_params>() - 8usize];
    ["Offset of field: activation_backward_params::dx"]
        [::core::mem::offset_of!(activation_backward_params, dx) - 0usize];
    ["Offset of field: activation_backward_params::dy"]
        [::core::mem::offset_of!(activation_backward_params, dy) - 8usize];
    ["Offset of field: activation_backward_params::x"]
        [::core::mem::offset_of!(activation_backward_params, x) - 16usize];
    ["Offset of field: activation_backward_params::n"]
        [::core::mem::offset_of!(activation_backward_params, n) - 24usize];
    ["Offset of field: activation_backward_params::kind"]
        [::core::mem::offset_of!(activation_backward_params, kind) - 32usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct gated_params {
    pub y: *mut ::core::ffi::c_void,
    pub gate: *const ::core::ffi::c_void,
    pub up: *const ::core::ffi::c_void,
    pub n: u64,
    pub kind: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of gated_params"][::core::mem::size_of::<gated_params>() - 40usize];
    ["Alignment of gated_params"][::core::mem::align_of::<gated_params>() - 8usize];
    ["Offset of field: gated_params::y"][::core::mem::offset_of!(gated_params, y) - 0usize];
    ["Offset of field: gated_params::gate"][::core::mem::offset_of!(gated_params, gate) - 8usize];
    ["Offset of field: gated_params::up"][::core::mem::offset_of!(gated_params, up) - 16usize];
    ["Offset of field: gated_params::n"][::core::mem::offset_of!(gated_params, n) - 24usize];
    ["Offset of field: gated_params::kind"][::core::mem::offset_of!(gated_params, kind) - 32usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct gated_backward_params {
    pub dgate: *mut ::core::ffi::c_void,
    pub dup: *mut ::core::ffi::c_void,
    pub dy: *const ::core::ffi::c_void,
    pub gate: *const ::core::ffi::c_void,
    pub up: *const ::core::ffi::c_void,
    pub n: u64,
    pub kind: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of gated_backward_params"][::core::mem::size_of::<gated_backward_params>() - 56usize];
    ["Alignment of gated_backward_params"][::core::mem::align_of::<gated_backward_params>() - 8usize];
    ["Offset of field: gated_backward_params::dgate"]
        [::core::mem::offset_of!(gated_backward_params, dgate) - 0usize];
    ["Offset of field: gated_backward_params::dup"]
        [::core::mem::offset_of!(gated_backward_params, dup) - 8usize];
    ["Offset of field: gated_backward_params::dy"]
        [::core::mem::offset_of!(gated_backward_params, dy) - 16usize];
    ["Offset of field: gated_backward_params::gate"]
        [::core::mem::offset_of!(gated_backward_params, gate) - 24usize];
    ["Offset of field: gated_backward_params::up"]
        [::core::mem::offset_of!(gated_backward_params, up) - 32usize];
    ["Offset of field: gated_backward_params::n"]
        [::core::mem::offset_of!(gated_backward_params, n) - 40usize];
    ["Offset of field: gated_backward_params::kind"]
        [::core::mem::offset_of!(gated_backward_params, kind) - 48usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct softcap_params {
    pub x: *mut f32,
    pub n: u64,
    pub cap: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of softcap_params"][::core::mem::size_of::<softcap_params>() - 24usize];
    ["Alignment of softcap_params"][::core::mem::align_of::<softcap_params>() - 8usize];
    ["Offset of field: softcap_params::x"][::core::mem::offset_of!(softcap_params, x) - 0usize];
    ["Offset of field: softcap_params::n"][::core::mem::offset_of!(softcap_params, n) - 8usize];
    ["Offset of field: softcap_params::cap"][::core::mem::offset_of!(softcap_params, cap) - 16usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct softcap_backward_params {
    pub dx: *mut ::core::ffi::c_void,
    pub y: *const f32,
    pub n: u64,
    pub cap: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of softcap_backward_params"][::core::mem::size_of::<softcap_backward_params>() - 32usize];
    ["Alignment of softcap_backward_params"][::core::mem::align_of::<softcap_backward_params>() - 8usize];
    ["Offset of field: softcap_backward_params::dx"]
        [::core::mem::offset_of!(softcap_backward_params, dx) - 0usize];
    ["Offset of field: softcap_backward_params::y"]
        [::core::mem::offset_of!(softcap_backward_params, y) - 8usize];
    ["Offset of field: softcap_backward_params::n"]
        [::core::mem::offset_of!(softcap_backward_params, n) - 16usize];
    ["Offset of field: softcap_backward_params::cap"]
        [::core::mem::offset_of!(softcap_backward_params, cap) - 24usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rsqrt_params {
    pub out: *mut f32,
    pub x: *const f32,
    pub n: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rsqrt_params"][::core::mem::size_of::<rsqrt_params>() - 24usize];
    ["Alignment of rsqrt_params"][::core::mem::align_of::<rsqrt_params>() - 8usize];
    ["Offset of field: rsqrt_params::out"][::core::mem::offset_of!(rsqrt_params, out) - 0usize];
    ["Offset of field: rsqrt_params::x"][::core::mem::offset_of!(rsqrt_params, x) - 8usize];
    ["Offset of field: rsqrt_params::n"][::core::mem::offset_of!(rsqrt_params, n) - 16usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct dropout_params {
    pub y: *mut ::core::ffi::c_void,
    pub x: *const ::core::ffi::c_void,
    pub n: u64,
    pub first_element: u64,
    pub p: f32,
    pub key: [u32; 2usize],
    pub accumulate: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of dropout_params"][::core::mem::size_of::<dropout_params>() - 48usize];
    ["Alignment of dropout_params"][::core::mem::align_of::<dropout_params>() - 8usize];
    ["Offset of field: dropout_params::y"][::core::mem::offset_of!(dropout_params, y) - 0usize];
    ["Offset of field: dropout_params::x"][::core::mem::offset_of!(dropout_params, x) - 8usize];
    ["Offset of field: dropout_params::n"][::core::mem::offset_of!(dropout_params, n) - 16usize];
    ["Offset of field: dropout_params::first_element"]
        [::core::mem::offset_of!(dropout_params, first_element) - 24usize];
    ["Offset of field: dropout_params::p"][::core::mem::offset_of!(dropout_params, p) - 32usize];
    ["Offset of field: dropout_params::key"][::core::mem::offset_of!(dropout_params, key) - 36usize];
    ["Offset of field: dropout_params::accumulate"]
        [::core::mem::offset_of!(dropout_params, accumulate) - 44usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rope_params {
    pub x: [*mut ::core::ffi::c_void; 2usize],
    pub n_heads: [u32; 2usize],
    pub table: *const f32,
    pub positions: *const i32,
    pub faults: *mut u32,
    pub rows: u64,
    pub head_dim: u32,
    pub rotary_dim: u32,
    pub table_rows: u32,
    pub interleaved: i32,
    pub inverse: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rope_params"][::core::mem::size_of::<rope_params>() - 80usize];
    ["Alignment of rope_params"][::core::mem::align_of::<rope_params>() - 8usize];
    ["Offset of field: rope_params::x"][::core::mem::offset_of!(rope_params, x) - 0usize];
    ["Offset of field: rope_params::n_heads"][::core::mem::offset_of!(rope_params, n_heads) - 16usize];
    ["Offset of field: rope_params::table"][::core::mem::offset_of!(rope_params, table) - 24usize];
    ["Offset of field: rope_params::positions"][::core::mem::offset_of!(rope_params, positions) - 32usize];
    ["Offset of field: rope_params::faults"][::core::mem::offset_of!(rope_params, faults) - 40usize];
    ["Offset of field: rope_params::rows"][::core::mem::offset_of!(rope_params, rows) - 48usize];
    ["Offset of field: rope_params::head_dim"][::core::mem::offset_of!(rope_params, head_dim) - 56usize];
    ["Offset of field: rope_params::rotary_dim"][::core::mem::offset_of!(rope_params, rotary_dim) - 60usize];
    ["Offset of field: rope_params::table_rows"][::core::mem::offset_of!(rope_params, table_rows) - 64usize];
    ["Offset of field: rope_params::interleaved"]
        [::core::mem::offset_of!(rope_params, interleaved) - 68usize];
    ["Offset of field: rope_params::inverse"][::core::mem::offset_of!(rope_params, inverse) - 72usize];
};
pub const TYPE_F32: element_type = 0;
pub const TYPE_BF16: element_type = 1;
pub const TYPE_F16: element_type = 2;
pub const TYPE_QUANTIZED: element_type = 3;
pub type element_type = ::core::ffi::c_uint;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct norm_params {
    pub y: *mut ::core::ffi::c_void,
    pub stats: *mut f32,
    pub x: *const ::core::ffi::c_void,
    pub weight: *const ::core::ffi::c_void,
    pub bias: *const ::core::ffi::c_void,
    pub added: *const ::core::ffi::c_void,
    pub sum: *mut ::core::ffi::c_void,
    pub rows: u64,
    pub cols: u32,
    pub eps: f32,
    pub weight_type: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of norm_params"][::core::mem::size_of::<norm_params>() - 80usize];
    ["Alignment of norm_params"][::core::mem::align_of::<norm_params>() - 8usize];
    ["Offset of field: norm_params::y"][::core::mem::offset_of!(norm_params, y) - 0usize];
    ["Offset of field: norm_params::stats"][::core::mem::offset_of!(norm_params, stats) - 8usize];
    ["Offset of field: norm_params::x"][::core::mem::offset_of!(norm_params, x) - 16usize];
    ["Offset of field: norm_params::weight"][::core::mem::offset_of!(norm_params, weight) - 24usize];
    ["Offset of field: norm_params::bias"][::core::mem::offset_of!(norm_params, bias) - 32usize];
    ["Offset of field: norm_params::added"][::core::mem::offset_of!(norm_params, added) - 40usize];
    ["Offset of field: norm_params::sum"][::core::mem::offset_of!(norm_params, sum) - 48usize];
    ["Offset of field: norm_params::rows"][::core::mem::offset_of!(norm_params, rows) - 56usize];
    ["Offset of field: norm_params::cols"][::core::mem::offset_of!(norm_params, cols) - 64usize];
    ["Offset of field: norm_params::eps"][::core::mem::offset_of!(norm_params, eps) - 68usize];
    ["Offset of field: norm_params::weight_type"]
        [::core::mem::offset_of!(norm_params, weight_type) - 72usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct norm_dx_params {
    pub dx: *mut ::core::ffi::c_void,
    pub dy: *const ::core::ffi::c_void,
    pub x: *const ::core::ffi::c_void,
    pub weight: *const ::core::ffi::c_void,
    pub stats: *const f32,
    pub rows: u64,
    pub cols: u32,
    pub weight_type: i32,
    pub accumulate: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of norm_dx_params"][::core::mem::size_of::<norm_dx_params>() - 64usize];
    ["Alignment of norm_dx_params"][::core::mem::align_of::<norm_dx_params>() - 8usize];
    ["Offset of field: norm_dx_params::dx"][::core::mem::offset_of!(norm_dx_params, dx) - 0usize];
    ["Offset of field: norm_dx_params::dy"][::core::mem::offset_of!(norm_dx_params, dy) - 8usize];
    ["Offset of field: norm_dx_params::x"][::core::mem::offset_of!(norm_dx_params, x) - 16usize];
    ["Offset of field: norm_dx_params::weight"][::core::mem::offset_of!(norm_dx_params, weight) - 24usize];
    ["Offset of field: norm_dx_params::stats"][::core::mem::offset_of!(norm_dx_params, stats) - 32usize];
    ["Offset of field: norm_dx_params::rows"][::core::mem::offset_of!(norm_dx_params, rows) - 40usize];
    ["Offset of field: norm_dx_params::cols"][::core::mem::offset_of!(norm_dx_params, cols) - 48usize];
    ["Offset of field: norm_dx_params::weight_type"]
        [::core::mem::offset_of!(norm_dx_params, weight_type) - 52usize];
    ["Offset of field: norm_dx_params::accumulate"]
        [::core::mem::offset_of!(norm_dx_params, accumulate) - 56usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct norm_dweight_params {
    pub dweight: *mut f32,
    pub dy: *const ::core::ffi::c_void,
    pub x: *const ::core::ffi::c_void,
    pub stats: *const f32,
    pub rows: u64,
    pub cols: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of norm_dweight_params"][::core::mem::size_of::<norm_dweight_params>() - 48usize];
    ["Alignment of norm_dweight_params"][::core::mem::align_of::<norm_dweight_params>() - 8usize];
    ["Offset of field: norm_dweight_params::dweight"]
        [::core::mem::offset_of!(norm_dweight_params, dweight) - 0usize];
    ["Offset of field: norm_dweight_params::dy"][::core::mem::offset_of!(norm_dweight_params, dy) - 8usize];
    ["Offset of field: norm_dweight_params::x"][::core::mem::offset_of!(norm_dweight_params, x) - 16usize];
    ["Offset of field: norm_dweight_params::stats"]
        [::core::mem::offset_of!(norm_dweight_params, stats) - 24usize];
    ["Offset of field: norm_dweight_params::rows"]
        [::core::mem::offset_of!(norm_dweight_params, rows) - 32usize];
    ["Offset of field: norm_dweight_params::cols"]
        [::core::mem::offset_of!(norm_dweight_params, cols) - 40usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct column_sums_params {
    pub out: *mut f32,
    pub a: *const ::core::ffi::c_void,
    pub b: *const ::core::ffi::c_void,
    pub rows: u64,
    pub cols: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of column_sums_params"][::core::mem::size_of::<column_sums_params>() - 40usize];
    ["Alignment of column_sums_params"][::core::mem::align_of::<column_sums_params>() - 8usize];
    ["Offset of field: column_sums_params::out"][::core::mem::offset_of!(column_sums_params, out) - 0usize];
    ["Offset of field: column_sums_params::a"][::core::mem::offset_of!(column_sums_params, a) - 8usize];
    ["Offset of field: column_sums_params::b"][::core::mem::offset_of!(column_sums_params, b) - 16usize];
    ["Offset of field: column_sums_params::rows"]
        [::core::mem::offset_of!(column_sums_params, rows) - 24usize];
    ["Offset of field: column_sums_params::cols"]
        [::core::mem::offset_of!(column_sums_params, cols) - 32usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct scale_columns_params {
    pub out: *mut ::core::ffi::c_void,
    pub x: *const ::core::ffi::c_void,
    pub factors: *const f32,
    pub bias: *const f32,
    pub n: u64,
    pub cols: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of scale_columns_params"][::core::mem::size_of::<scale_columns_params>() - 48usize];
    ["Alignment of scale_columns_params"][::core::mem::align_of::<scale_columns_params>() - 8usize];
    ["Offset of field: scale_columns_params::out"]
        [::core::mem::offset_of!(scale_columns_params, out) - 0usize];
    ["Offset of field: scale_columns_params::x"][::core::mem::offset_of!(scale_columns_params, x) - 8usize];
    ["Offset of field: scale_columns_params::factors"]
        [::core::mem::offset_of!(scale_columns_params, factors) - 16usize];
    ["Offset of field: scale_columns_params::bias"]
        [::core::mem::offset_of!(scale_columns_params, bias) - 24usize];
    ["Offset of field: scale_columns_params::n"][::core::mem::offset_of!(scale_columns_params, n) - 32usize];
    ["Offset of field: scale_columns_params::cols"]
        [::core::mem::offset_of!(scale_columns_params, cols) - 40usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct sum_squares_params {
    pub sums: *mut f32,
    pub x: *const f32,
    pub n: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of sum_squares_params"][::core::mem::size_of::<sum_squares_params>() - 24usize];
    ["Alignment of sum_squares_params"][::core::mem::align_of::<sum_squares_params>() - 8usize];
    ["Offset of field: sum_squares_params::sums"][::core::mem::offset_of!(sum_squares_params, sums) - 0usize];
    ["Offset of field: sum_squares_params::x"][::core::mem::offset_of!(sum_squares_params, x) - 8usize];
    ["Offset of field: sum_squares_params::n"][::core::mem::offset_of!(sum_squares_params, n) - 16usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct gather_rows_params {
    pub out: *mut ::core::ffi::c_void,
    pub x: *const ::core::ffi::c_void,
    pub indices: *const i32,
    pub faults: *mut u32,
    pub n: u64,
    pub x_rows: u64,
    pub cols: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of gather_rows_params"][::core::mem::size_of::<gather_rows_params>() - 56usize];
    ["Alignment of gather_rows_params"][::core::mem::align_of::<gather_rows_params>() - 8usize];
    ["Offset of field: gather_rows_params::out"][::core::mem::offset_of!(gather_rows_params, out) - 0usize];
    ["Offset of field: gather_rows_params::x"][::core::mem::offset_of!(gather_rows_params, x) - 8usize];
    ["Offset of field: gather_rows_params::indices"]
        [::core::mem::offset_of!(gather_rows_params, indices) - 16usize];
    ["Offset of field: gather_rows_params::faults"]
        [::core::mem::offset_of!(gather_rows_params, faults) - 24usize];
    ["Offset of field: gather_rows_params::n"][::core::mem::offset_of!(gather_rows_params, n) - 32usize];
    ["Offset of field: gather_rows_params::x_rows"]
        [::core::mem::offset_of!(gather_rows_params, x_rows) - 40usize];
    ["Offset of field: gather_rows_params::cols"]
        [::core::mem::offset_of!(gather_rows_params, cols) - 48usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct scatter_add_rows_params {
    pub out: *mut ::core::ffi::c_void,
    pub x: *const ::core::ffi::c_void,
    pub indices: *const i32,
    pub faults: *mut u32,
    pub n: u64,
    pub out_rows: u64,
    pub cols: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of scatter_add_rows_params"][::core::mem::size_of::<scatter_add_rows_params>() - 56usize];
    ["Alignment of scatter_add_rows_params"][::core::mem::align_of::<scatter_add_rows_params>() - 8usize];
    ["Offset of field: scatter_add_rows_params::out"]
        [::core::mem::offset_of!(scatter_add_rows_params, out) - 0usize];
    ["Offset of field: scatter_add_rows_params::x"]
        [::core::mem::offset_of!(scatter_add_rows_params, x) - 8usize];
    ["Offset of field: scatter_add_rows_params::indices"]
        [::core::mem::offset_of!(scatter_add_rows_params, indices) - 16usize];
    ["Offset of field: scatter_add_rows_params::faults"]
        [::core::mem::offset_of!(scatter_add_rows_params, faults) - 24usize];
    ["Offset of field: scatter_add_rows_params::n"]
        [::core::mem::offset_of!(scatter_add_rows_params, n) - 32usize];
    ["Offset of field: scatter_add_rows_params::out_rows"]
        [::core::mem::offset_of!(scatter_add_rows_params, out_rows) - 40usize];
    ["Offset of field: scatter_add_rows_params::cols"]
        [::core::mem::offset_of!(scatter_add_rows_params, cols) - 48usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct copy_columns_params {
    pub out: *mut ::core::ffi::c_void,
    pub x: *const ::core::ffi::c_void,
    pub rows: u64,
    pub out_cols: u32,
    pub out_col: u32,
    pub x_cols: u32,
    pub x_col: u32,
    pub cols: u32,
    pub accumulate: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of copy_columns_params"][::core::mem::size_of::<copy_columns_params>() - 48usize];
    ["Alignment of copy_columns_params"][::core::mem::align_of::<copy_columns_params>() - 8usize];
    ["Offset of field: copy_columns_params::out"][::core::mem::offset_of!(copy_columns_params, out) - 0usize];
    ["Offset of field: copy_columns_params::x"][::core::mem::offset_of!(copy_columns_params, x) - 8usize];
    ["Offset of field: copy_columns_params::rows"]
        [::core::mem::offset_of!(copy_columns_params, rows) - 16usize];
    ["Offset of field: copy_columns_params::out_cols"]
        [::core::mem::offset_of!(copy_columns_params, out_cols) - 24usize];
    ["Offset of field: copy_columns_params::out_col"]
        [::core::mem::offset_of!(copy_columns_params, out_col) - 28usize];
    ["Offset of field: copy_columns_params::x_cols"]
        [::core::mem::offset_of!(copy_columns_params, x_cols) - 32usize];
    ["Offset of field: copy_columns_params::x_col"]
        [::core::mem::offset_of!(copy_columns_params, x_col) - 36usize];
    ["Offset of field: copy_columns_params::cols"]
        [::core::mem::offset_of!(copy_columns_params, cols) - 40usize];
    ["Offset of field: copy_columns_params::accumulate"]
        [::core::mem::offset_of!(copy_columns_params, accumulate) - 44usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct cross_entropy_params {
    pub losses: *mut f32,
    pub dlogits: *mut ::core::ffi::c_void,
    pub logits: *const f32,
    pub targets: *const i32,
    pub faults: *mut u32,
    pub rows: u64,
    pub vocabulary: u32,
    pub grad_scale: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of cross_entropy_params"][::core::mem::size_of::<cross_entropy_params>() - 56usize];
    ["Alignment of cross_entropy_params"][::core::mem::align_of::<cross_entropy_params>() - 8usize];
    ["Offset of field: cross_entropy_params::losses"]
        [::core::mem::offset_of!(cross_entropy_params, losses) - 0usize];
    ["Offset of field: cross_entropy_params::dlogits"]
        [::core::mem::offset_of!(cross_entropy_params, dlogits) - 8usize];
    ["Offset of field: cross_entropy_params::logits"]
        [::core::mem::offset_of!(cross_entropy_params, logits) - 16usize];
    ["Offset of field: cross_entropy_params::targets"]
        [::core::mem::offset_of!(cross_entropy_params, targets) - 24usize];
    ["Offset of field: cross_entropy_params::faults"]
        [::core::mem::offset_of!(cross_entropy_params, faults) - 32usize];
    ["Offset of field: cross_entropy_params::rows"]
        [::core::mem::offset_of!(cross_entropy_params, rows) - 40usize];
    ["Offset of field: cross_entropy_params::vocabulary"]
        [::core::mem::offset_of!(cross_entropy_params, vocabulary) - 48usize];
    ["Offset of field: cross_entropy_params::grad_scale"]
        [::core::mem::offset_of!(cross_entropy_params, grad_scale) - 52usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct optimizer_params {
    pub p: *mut f32,
    pub m: *mut f32,
    pub v: *mut f32,
    pub g: *const f32,
    pub n: u64,
    pub grad_scale: f32,
    pub decay: f32,
    pub beta1: f32,
    pub one_minus_beta1: f32,
    pub beta2: f32,
    pub one_minus_beta2: f32,
    pub bias_correction2_sqrt: f32,
    pub epsilon: f32,
    pub step_size: f32,
    pub weight_decay: f32,
    pub verdict: *const f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of optimizer_params"][::core::mem::size_of::<optimizer_params>() - 88usize];
    ["Alignment of optimizer_params"][::core::mem::align_of::<optimizer_params>() - 8usize];
    ["Offset of field: optimizer_params::p"][::core::mem::offset_of!(optimizer_params, p) - 0usize];
    ["Offset of field: optimizer_params::m"][::core::mem::offset_of!(optimizer_params, m) - 8usize];
    ["Offset of field: optimizer_params::v"][::core::mem::offset_of!(optimizer_params, v) - 16usize];
    ["Offset of field: optimizer_params::g"][::core::mem::offset_of!(optimizer_params, g) - 24usize];
    ["Offset of field: optimizer_params::n"][::core::mem::offset_of!(optimizer_params, n) - 32usize];
    ["Offset of field: optimizer_params::grad_scale"]
        [::core::mem::offset_of!(optimizer_params, grad_scale) - 40usize];
    ["Offset of field: optimizer_params::decay"][::core::mem::offset_of!(optimizer_params, decay) - 44usize];
    ["Offset of field: optimizer_params::beta1"][::core::mem::offset_of!(optimizer_params, beta1) - 48usize];
    ["Offset of field: optimizer_params::one_minus_beta1"]
        [::core::mem::offset_of!(optimizer_params, one_minus_beta1) - 52usize];
    ["Offset of field: optimizer_params::beta2"][::core::mem::offset_of!(optimizer_params, beta2) - 56usize];
    ["Offset of field: optimizer_params::one_minus_beta2"]
        [::core::mem::offset_of!(optimizer_params, one_minus_beta2) - 60usize];
    ["Offset of field: optimizer_params::bias_correction2_sqrt"]
        [::core::mem::offset_of!(optimizer_params, bias_correction2_sqrt) - 64usize];
    ["Offset of field: optimizer_params::epsilon"]
        [::core::mem::offset_of!(optimizer_params, epsilon) - 68usize];
    ["Offset of field: optimizer_params::step_size"]
        [::core::mem::offset_of!(optimizer_params, step_size) - 72usize];
    ["Offset of field: optimizer_params::weight_decay"]
        [::core::mem::offset_of!(optimizer_params, weight_decay) - 76usize];
    ["Offset of field: optimizer_params::verdict"]
        [::core::mem::offset_of!(optimizer_params, verdict) - 80usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct judge_losses_params {
    pub verdict: *mut f32,
    pub losses: *const f32,
    pub n: u64,
    pub step: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of judge_losses_params"][::core::mem::size_of::<judge_losses_params>() - 32usize];
    ["Alignment of judge_losses_params"][::core::mem::align_of::<judge_losses_params>() - 8usize];
    ["Offset of field: judge_losses_params::verdict"]
        [::core::mem::offset_of!(judge_losses_params, verdict) - 0usize];
    ["Offset of field: judge_losses_params::losses"]
        [::core::mem::offset_of!(judge_losses_params, losses) - 8usize];
    ["Offset of field: judge_losses_params::n"][::core::mem::offset_of!(judge_losses_params, n) - 16usize];
    ["Offset of field: judge_losses_params::step"]
        [::core::mem::offset_of!(judge_losses_params, step) - 24usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct judge_gradients_params {
    pub verdict: *mut f32,
    pub sums: *const f32,
    pub n: u64,
    pub max_grad_norm: f64,
    pub step: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of judge_gradients_params"][::core::mem::size_of::<judge_gradients_params>() - 40usize];
    ["Alignment of judge_gradients_params"][::core::mem::align_of::<judge_gradients_params>() - 8usize];
    ["Offset of field: judge_gradients_params::verdict"]
        [::core::mem::offset_of!(judge_gradients_params, verdict) - 0usize];
    ["Offset of field: judge_gradients_params::sums"]
        [::core::mem::offset_of!(judge_gradients_params, sums) - 8usize];
    ["Offset of field: judge_gradients_params::n"]
        [::core::mem::offset_of!(judge_gradients_params, n) - 16usize];
    ["Offset of field: judge_gradients_params::max_grad_norm"]
        [::core::mem::offset_of!(judge_gradients_params, max_grad_norm) - 24usize];
    ["Offset of field: judge_gradients_params::step"]
        [::core::mem::offset_of!(judge_gradients_params, step) - 32usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct adamw_8bit_params {
    pub step: optimizer_params,
    pub m: *mut u8,
    pub v: *mut u8,
    pub m_absmax: *mut f32,
    pub v_absmax: *mut f32,
    pub m_map: *const f32,
    pub m_midpoints: *const f32,
    pub v_map: *const f32,
    pub v_midpoints: *const f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of adamw_8bit_params"][::core::mem::size_of::<adamw_8bit_params>() - 152usize];
    ["Alignment of adamw_8bit_params"][::core::mem::align_of::<adamw_8bit_params>() - 8usize];
    ["Offset of field: adamw_8bit_params::step"][::core::mem::offset_of!(adamw_8bit_params, step) - 0usize];
    ["Offset of field: adamw_8bit_params::m"][::core::mem::offset_of!(adamw_8bit_params, m) - 88usize];
    ["Offset of field: adamw_8bit_params::v"][::core::mem::offset_of!(adamw_8bit_params, v) - 96usize];
    ["Offset of field: adamw_8bit_params::m_absmax"]
        [::core::mem::offset_of!(adamw_8bit_params, m_absmax) - 104usize];
    ["Offset of field: adamw_8bit_params::v_absmax"]
        [::core::mem::offset_of!(adamw_8bit_params, v_absmax) - 112usize];
    ["Offset of field: adamw_8bit_params::m_map"]
        [::core::mem::offset_of!(adamw_8bit_params, m_map) - 120usize];
    ["Offset of field: adamw_8bit_params::m_midpoints"]
        [::core::mem::offset_of!(adamw_8bit_params, m_midpoints) - 128usize];
    ["Offset of field: adamw_8bit_params::v_map"]
        [::core::mem::offset_of!(adamw_8bit_params, v_map) - 136usize];
    ["Offset of field: adamw_8bit_params::v_midpoints"]
        [::core::mem::offset_of!(adamw_8bit_params, v_midpoints) - 144usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantized_matrix {
    pub codes: *mut u8,
    pub scales: *mut f32,
    pub zeros: *mut u8,
    pub nested: *const u8,
    pub nested_absmax: *const f32,
    pub nested_map: *const f32,
    pub nested_offset: f32,
    pub nested_shift: i32,
    pub levels: [f32; 16usize],
    pub rows: u64,
    pub cols: u64,
    pub block_rows: u64,
    pub block_cols: u64,
    pub blocks_per_row: u64,
    pub format: i32,
    pub block_rows_shift: i32,
    pub block_cols_shift: i32,
    pub minimums: *const f32,
    pub minimum_codes: *const u8,
    pub minimum_factors: *const f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantized_matrix"][::core::mem::size_of::<quantized_matrix>() - 200usize];
    ["Alignment of quantized_matrix"][::core::mem::align_of::<quantized_matrix>() - 8usize];
    ["Offset of field: quantized_matrix::codes"][::core::mem::offset_of!(quantized_matrix, codes) - 0usize];
    ["Offset of field: quantized_matrix::scales"][::core::mem::offset_of!(quantized_matrix, scales) - 8usize];
    ["Offset of field: quantized_matrix::zeros"][::core::mem::offset_of!(quantized_matrix, zeros) - 16usize];
    ["Offset of field: quantized_matrix::nested"]
        [::core::mem::offset_of!(quantized_matrix, nested) - 24usize];
    ["Offset of field: quantized_matrix::nested_absmax"]
        [::core::mem::offset_of!(quantized_matrix, nested_absmax) - 32usize];
    ["Offset of field: quantized_matrix::nested_map"]
        [::core::mem::offset_of!(quantized_matrix, nested_map) - 40usize];
    ["Offset of field: quantized_matrix::nested_offset"]
        [::core::mem::offset_of!(quantized_matrix, nested_offset) - 48usize];
    ["Offset of field: quantized_matrix::nested_shift"]
        [::core::mem::offset_of!(quantized_matrix, nested_shift) - 52usize];
    ["Offset of field: quantized_matrix::levels"]
        [::core::mem::offset_of!(quantized_matrix, levels) - 56usize];
    ["Offset of field: quantized_matrix::rows"][::core::mem::offset_of!(quantized_matrix, rows) - 120usize];
    ["Offset of field: quantized_matrix::cols"][::core::mem::offset_of!(quantized_matrix, cols) - 128usize];
    ["Offset of field: quantized_matrix::block_rows"]
        [::core::mem::offset_of!(quantized_matrix, block_rows) - 136usize];
    ["Offset of field: quantized_matrix::block_cols"]
        [::core::mem::offset_of!(quantized_matrix, block_cols) - 144usize];
    ["Offset of field: quantized_matrix::blocks_per_row"]
        [::core::mem::offset_of!(quantized_matrix, blocks_per_row) - 152usize];
    ["Offset of field: quantized_matrix::format"]
        [::core::mem::offset_of!(quantized_matrix, format) - 160usize];
    ["Offset of field: quantized_matrix::block_rows_shift"]
        [::core::mem::offset_of!(quantized_matrix, block_rows_shift) - 164usize];
    ["Offset of field: quantized_matrix::block_cols_shift"]
        [::core::mem::offset_of!(quantized_matrix, block_cols_shift) - 168usize];
    ["Offset of field: quantized_matrix::minimums"]
        [::core::mem::offset_of!(quantized_matrix, minimums) - 176usize];
    ["Offset of field: quantized_matrix::minimum_codes"]
        [::core::mem::offset_of!(quantized_matrix, minimum_codes) - 184usize];
    ["Offset of field: quantized_matrix::minimum_factors"]
        [::core::mem::offset_of!(quantized_matrix, minimum_factors) - 192usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantize_params {
    pub q: quantized_matrix,
    pub x: *const ::core::ffi::c_void,
    pub faults: *mut u32,
    pub blocks: u64,
    pub thresholds: [f32; 15usize],
    pub ranks: [u8; 16usize],
    pub has_thresholds: i32,
    pub max_level: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantize_params"][::core::mem::size_of::<quantize_params>() - 312usize];
    ["Alignment of quantize_params"][::core::mem::align_of::<quantize_params>() - 8usize];
    ["Offset of field: quantize_params::q"][::core::mem::offset_of!(quantize_params, q) - 0usize];
    ["Offset of field: quantize_params::x"][::core::mem::offset_of!(quantize_params, x) - 200usize];
    ["Offset of field: quantize_params::faults"][::core::mem::offset_of!(quantize_params, faults) - 208usize];
    ["Offset of field: quantize_params::blocks"][::core::mem::offset_of!(quantize_params, blocks) - 216usize];
    ["Offset of field: quantize_params::thresholds"]
        [::core::mem::offset_of!(quantize_params, thresholds) - 224usize];
    ["Offset of field: quantize_params::ranks"][::core::mem::offset_of!(quantize_params, ranks) - 284usize];
    ["Offset of field: quantize_params::has_thresholds"]
        [::core::mem::offset_of!(quantize_params, has_thresholds) - 300usize];
    ["Offset of field: quantize_params::max_level"]
        [::core::mem::offset_of!(quantize_params, max_level) - 304usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct dequantize_params {
    pub q: quantized_matrix,
    pub out: *mut ::core::ffi::c_void,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of dequantize_params"][::core::mem::size_of::<dequantize_params>() - 208usize];
    ["Alignment of dequantize_params"][::core::mem::align_of::<dequantize_params>() - 8usize];
    ["Offset of field: dequantize_params::q"][::core::mem::offset_of!(dequantize_params, q) - 0usize];
    ["Offset of field: dequantize_params::out"][::core::mem::offset_of!(dequantize_params, out) - 200usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct gemm_operand {
    pub data: *const ::core::ffi::c_void,
    pub ld: u64,
    pub type_: i32,
    pub transposed: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of gemm_operand"][::core::mem::size_of::<gemm_operand>() - 24usize];
    ["Alignment of gemm_operand"][::core::mem::align_of::<gemm_operand>() - 8usize];
    ["Offset of field: gemm_operand::data"][::core::mem::offset_of!(gemm_operand, data) - 0usize];
    ["Offset of field: gemm_operand::ld"][::core::mem::offset_of!(gemm_operand, ld) - 8usize];
    ["Offset of field: gemm_operand::type_"][::core::mem::offset_of!(gemm_operand, type_) - 16usize];
    ["Offset of field: gemm_operand::transposed"]
        [::core::mem::offset_of!(gemm_operand, transposed) - 20usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct gemm_term {
    pub a: gemm_operand,
    pub b: gemm_operand,
    pub quantized: quantized_matrix,
    pub k: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of gemm_term"][::core::mem::size_of::<gemm_term>() - 256usize];
    ["Alignment of gemm_term"][::core::mem::align_of::<gemm_term>() - 8usize];
    ["Offset of field: gemm_term::a"][::core::mem::offset_of!(gemm_term, a) - 0usize];
    ["Offset of field: gemm_term::b"][::core::mem::offset_of!(gemm_term, b) - 24usize];
    ["Offset of field: gemm_term::quantized"][::core::mem::offset_of!(gemm_term, quantized) - 48usize];
    ["Offset of field: gemm_term::k"][::core::mem::offset_of!(gemm_term, k) - 248usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct gemm_problem {
    pub out: *mut ::core::ffi::c_void,
    pub bias: *const ::core::ffi::c_void,
    pub m: u32,
    pub n: u32,
    pub n_terms: u32,
    pub first_block: u32,
    pub out_type: i32,
    pub bias_type: i32,
    pub accumulate: i32,
    pub scale: f32,
    pub terms: [gemm_term; 4usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of gemm_problem"][::core::mem::size_of::<gemm_problem>() - 1072usize];
    ["Alignment of gemm_problem"][::core::mem::align_of::<gemm_problem>() - 8usize];
    ["Offset of field: gemm_problem::out"][::core::mem::offset_of!(gemm_problem, out) - 0usize];
    ["Offset of field: gemm_problem::bias"][::core::mem::offset_of!(gemm_problem, bias) - 8usize];
    ["Offset of field: gemm_problem::m"][::core::mem::offset_of!(gemm_problem, m) - 16usize];
    ["Offset of field: gemm_problem::n"][::core::mem::offset_of!(gemm_problem, n) - 20usize];
    ["Offset of field: gemm_problem::n_terms"][::core::mem::offset_of!(gemm_problem, n_terms) - 24usize];
    ["Offset of field: gemm_problem::first_block"]
        [::core::mem::offset_of!(gemm_problem, first_block) - 28usize];
    ["Offset of field: gemm_problem::out_type"][::core::mem::offset_of!(gemm_problem, out_type) - 32usize];
    ["Offset of field: gemm_problem::bias_type"][::core::mem::offset_of!(gemm_problem, bias_type) - 36usize];
    ["Offset of field: gemm_problem::accumulate"]
        [::core::mem::offset_of!(gemm_problem, accumulate) - 40usize];
    ["Offset of field: gemm_problem::scale"][::core::mem::offset_of!(gemm_problem, scale) - 44usize];
    ["Offset of field: gemm_problem::terms"][::core::mem::offset_of!(gemm_problem, terms) - 48usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct gemm_params {
    pub n_problems: u32,
    pub code_bits: u32,
    pub pair_copies: u32,
    pub parts: *mut f32,
    pub arrived: *mut u32,
    pub problems: [gemm_problem; 4usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of gemm_params"][::core::mem::size_of::<gemm_params>() - 4320usize];
    ["Alignment of gemm_params"][::core::mem::align_of::<gemm_params>() - 8usize];
    ["Offset of field: gemm_params::n_problems"][::core::mem::offset_of!(gemm_params, n_problems) - 0usize];
    ["Offset of field: gemm_params::code_bits"][::core::mem::offset_of!(gemm_params, code_bits) - 4usize];
    ["Offset of field: gemm_params::pair_copies"][::core::mem::offset_of!(gemm_params, pair_copies) - 8usize];
    ["Offset of field: gemm_params::parts"][::core::mem::offset_of!(gemm_params, parts) - 16usize];
    ["Offset of field: gemm_params::arrived"][::core::mem::offset_of!(gemm_params, arrived) - 24usize];
    ["Offset of field: gemm_params::problems"][::core::mem::offset_of!(gemm_params, problems) - 32usize];
};
#[repr(C)]
#[repr(align(128))]
#[derive(Debug, Copy, Clone)]
pub struct gemm_hopper_params {
    pub gemm: gemm_params,
    pub tiles: u32,
    pub whole: u32,
    pub stages: u32,
    pub __bindgen_padding_0: [u64; 2usize],
    pub tensor_maps: [[[tensor_map; 2usize]; 4usize]; 4usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of gemm_hopper_params"][::core::mem::size_of::<gemm_hopper_params>() - 8448usize];
    ["Alignment of gemm_hopper_params"][::core::mem::align_of::<gemm_hopper_params>() - 128usize];
    ["Offset of field: gemm_hopper_params::gemm"][::core::mem::offset_of!(gemm_hopper_params, gemm) - 0usize];
    ["Offset of field: gemm_hopper_params::tiles"]
        [::core::mem::offset_of!(gemm_hopper_params, tiles) - 4320usize];
    ["Offset of field: gemm_hopper_params::whole"]
        [::core::mem::offset_of!(gemm_hopper_params, whole) - 4324usize];
    ["Offset of field: gemm_hopper_params::stages"]
        [::core::mem::offset_of!(gemm_hopper_params, stages) - 4328usize];
    ["Offset of field: gemm_hopper_params::tensor_maps"]
        [::core::mem::offset_of!(gemm_hopper_params, tensor_maps) - 4352usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct cross_entropy_stats {
    pub top: f32,
    pub sum: f32,
    pub target: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of cross_entropy_stats"][::core::mem::size_of::<cross_entropy_stats>() - 12usize];
    ["Alignment of cross_entropy_stats"][::core::mem::align_of::<cross_entropy_stats>() - 4usize];
    ["Offset of field: cross_entropy_stats::top"][::core::mem::offset_of!(cross_entropy_stats, top) - 0usize];
    ["Offset of field: cross_entropy_stats::sum"][::core::mem::offset_of!(cross_entropy_stats, sum) - 4usize];
    ["Offset of field: cross_entropy_stats::target"]
        [::core::mem::offset_of!(cross_entropy_stats, target) - 8usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct cross_entropy_columns_params {
    pub weights: *mut ::core::ffi::c_void,
    pub sums: *mut f32,
    pub stats: *mut cross_entropy_stats,
    pub logits: *const f32,
    pub targets: *const i32,
    pub first: u32,
    pub columns: u32,
    pub hidden: u32,
    pub softcap: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of cross_entropy_columns_params"]
        [::core::mem::size_of::<cross_entropy_columns_params>() - 56usize];
    ["Alignment of cross_entropy_columns_params"]
        [::core::mem::align_of::<cross_entropy_columns_params>() - 8usize];
    ["Offset of field: cross_entropy_columns_params::weights"]
        [::core::mem::offset_of!(cross_entropy_columns_params, weights) - 0usize];
    ["Offset of field: cross_entropy_columns_params::sums"]
        [::core::mem::offset_of!(cross_entropy_columns_params, sums) - 8usize];
    ["Offset of field: cross_entropy_columns_params::stats"]
        [::core::mem::offset_of!(cross_entropy_columns_params, stats) - 16usize];
    ["Offset of field: cross_entropy_columns_params::logits"]
        [::core::mem::offset_of!(cross_entropy_columns_params, logits) - 24usize];
    ["Offset of field: cross_entropy_columns_params::targets"]
        [::core::mem::offset_of!(cross_entropy_columns_params, targets) - 32usize];
    ["Offset of field: cross_entropy_columns_params::first"]
        [::core::mem::offset_of!(cross_entropy_columns_params, first) - 40usize];
    ["Offset of field: cross_entropy_columns_params::columns"]
        [::core::mem::offset_of!(cross_entropy_columns_params, columns) - 44usize];
    ["Offset of field: cross_entropy_columns_params::hidden"]
        [::core::mem::offset_of!(cross_entropy_columns_params, hidden) - 48usize];
    ["Offset of field: cross_entropy_columns_params::softcap"]
        [::core::mem::offset_of!(cross_entropy_columns_params, softcap) - 52usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct cross_entropy_finish_params {
    pub losses: *mut f32,
    pub dx: *mut ::core::ffi::c_void,
    pub sums: *const f32,
    pub stats: *const cross_entropy_stats,
    pub targets: *const i32,
    pub faults: *mut u32,
    pub head: gemm_operand,
    pub quantized: quantized_matrix,
    pub vocabulary: u32,
    pub hidden: u32,
    pub softcap: f32,
    pub grad_scale: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of cross_entropy_finish_params"][::core::mem::size_of::<cross_entropy_finish_params>() - 288usize];
    ["Alignment of cross_entropy_finish_params"]
        [::core::mem::align_of::<cross_entropy_finish_params>() - 8usize];
    ["Offset of field: cross_entropy_finish_params::losses"]
        [::core::mem::offset_of!(cross_entropy_finish_params, losses) - 0usize];
    ["Offset of field: cross_entropy_finish_params::dx"]
        [::core::mem::offset_of!(cross_entropy_finish_params, dx) - 8usize];
    ["Offset of field: cross_entropy_finish_params::sums"]
        [::core::mem::offset_of!(cross_entropy_finish_params, sums) - 16usize];
    ["Offset of field: cross_entropy_finish_params::stats"]
        [::core::mem::offset_of!(cross_entropy_finish_params, stats) - 24usize];
    ["Offset of field: cross_entropy_finish_params::targets"]
        [::core::mem::offset_of!(cross_entropy_finish_params, targets) - 32usize];
    ["Offset of field: cross_entropy_finish_params::faults"]
        [::core::mem::offset_of!(cross_entropy_finish_params, faults) - 40usize];
    ["Offset of field: cross_entropy_finish_params::head"]
        [::core::mem::offset_of!(cross_entropy_finish_params, head) - 48usize];
    ["Offset of field: cross_entropy_finish_params::quantized"]
        [::core::mem::offset_of!(cross_entropy_finish_params, quantized) - 72usize];
    ["Offset of field: cross_entropy_finish_params::vocabulary"]
        [::core::mem::offset_of!(cross_entropy_finish_params, vocabulary) - 272usize];
    ["Offset of field: cross_entropy_finish_params::hidden"]
        [::core::mem::offset_of!(cross_entropy_finish_params, hidden) - 276usize];
    ["Offset of field: cross_entropy_finish_params::softcap"]
        [::core::mem::offset_of!(cross_entropy_finish_params, softcap) - 280usize];
    ["Offset of field: cross_entropy_finish_params::grad_scale"]
        [::core::mem::offset_of!(cross_entropy_finish_params, grad_scale) - 284usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct attention_sequence {
    pub q_start: u32,
    pub q_len: u32,
    pub k_start: u32,
    pub k_len: u32,
    pub part_start: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of attention_sequence"][::core::mem::size_of::<attention_sequence>() - 20usize];
    ["Alignment of attention_sequence"][::core::mem::align_of::<attention_sequence>() - 4usize];
    ["Offset of field: attention_sequence::q_start"]
        [::core::mem::offset_of!(attention_sequence, q_start) - 0usize];
    ["Offset of field: attention_sequence::q_len"]
        [::core::mem::offset_of!(attention_sequence, q_len) - 4usize];
    ["Offset of field: attention_sequence::k_start"]
        [::core::mem::offset_of!(attention_sequence, k_start) - 8usize];
    ["Offset of field: attention_sequence::k_len"]
        [::core::mem::offset_of!(attention_sequence, k_len) - 12usize];
    ["Offset of field: attention_sequence::part_start"]
        [::core::mem::offset_of!(attention_sequence, part_start) - 16usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct attention_params {
    pub out: *mut ::core::ffi::c_void,
    pub lse: *mut f32,
    pub q: *const ::core::ffi::c_void,
    pub k: *const ::core::ffi::c_void,
    pub v: *const ::core::ffi::c_void,
    pub sequences: *const attention_sequence,
    pub parts: *mut f32,
    pub part_stats: *mut f32,
    pub n_heads: u32,
    pub n_kv_heads: u32,
    pub head_dim: u32,
    pub max_queries: u32,
    pub window: i32,
    pub scale: f32,
    pub softcap: f32,
    pub aligned: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of attention_params"][::core::mem::size_of::<attention_params>() - 96usize];
    ["Alignment of attention_params"][::core::mem::align_of::<attention_params>() - 8usize];
    ["Offset of field: attention_params::out"][::core::mem::offset_of!(attention_params, out) - 0usize];
    ["Offset of field: attention_params::lse"][::core::mem::offset_of!(attention_params, lse) - 8usize];
    ["Offset of field: attention_params::q"][::core::mem::offset_of!(attention_params, q) - 16usize];
    ["Offset of field: attention_params::k"][::core::mem::offset_of!(attention_params, k) - 24usize];
    ["Offset of field: attention_params::v"][::core::mem::offset_of!(attention_params, v) - 32usize];
    ["Offset of field: attention_params::sequences"]
        [::core::mem::offset_of!(attention_params, sequences) - 40usize];
    ["Offset of field: attention_params::parts"][::core::mem::offset_of!(attention_params, parts) - 48usize];
    ["Offset of field: attention_params::part_stats"]
        [::core::mem::offset_of!(attention_params, part_stats) - 56usize];
    ["Offset of field: attention_params::n_heads"]
        [::core::mem::offset_of!(attention_params, n_heads) - 64usize];
    ["Offset of field: attention_params::n_kv_heads"]
        [::core::mem::offset_of!(attention_params, n_kv_heads) - 68usize];
    ["Offset of field: attention_params::head_dim"]
        [::core::mem::offset_of!(attention_params, head_dim) - 72usize];
    ["Offset of field: attention_params::max_queries"]
        [::core::mem::offset_of!(attention_params, max_queries) - 76usize];
    ["Offset of field: attention_params::window"]
        [::core::mem::offset_of!(attention_params, window) - 80usize];
    ["Offset of field: attention_params::scale"][::core::mem::offset_of!(attention_params, scale) - 84usize];
    ["Offset of field: attention_params::softcap"]
        [::core::mem::offset_of!(attention_params, softcap) - 88usize];
    ["Offset of field: attention_params::aligned"]
        [::core::mem::offset_of!(attention_params, aligned) - 92usize];
};
#[repr(C)]
#[repr(align(128))]
#[derive(Debug, Copy, Clone)]
pub struct attention_hopper_params {
    pub attention: attention_params,
    pub __bindgen_padding_0: [u64; 4usize],
    pub q: tensor_map,
    pub k: tensor_map,
    pub v: tensor_map,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of attention_hopper_params"][::core::mem::size_of::<attention_hopper_params>() - 512usize];
    ["Alignment of attention_hopper_params"][::core::mem::align_of::<attention_hopper_params>() - 128usize];
    ["Offset of field: attention_hopper_params::attention"]
        [::core::mem::offset_of!(attention_hopper_params, attention) - 0usize];
    ["Offset of field: attention_hopper_params::q"]
        [::core::mem::offset_of!(attention_hopper_params, q) - 128usize];
    ["Offset of field: attention_hopper_params::k"]
        [::core::mem::offset_of!(attention_hopper_params, k) - 256usize];
    ["Offset of field: attention_hopper_params::v"]
        [::core::mem::offset_of!(attention_hopper_params, v) - 384usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct attention_delta_params {
    pub delta: *mut f32,
    pub dout: *const ::core::ffi::c_void,
    pub out: *const ::core::ffi::c_void,
    pub rows: u64,
    pub head_dim: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of attention_delta_params"][::core::mem::size_of::<attention_delta_params>() - 40usize];
    ["Alignment of attention_delta_params"][::core::mem::align_of::<attention_delta_params>() - 8usize];
    ["Offset of field: attention_delta_params::delta"]
        [::core::mem::offset_of!(attention_delta_params, delta) - 0usize];
    ["Offset of field: attention_delta_params::dout"]
        [::core::mem::offset_of!(attention_delta_params, dout) - 8usize];
    ["Offset of field: attention_delta_params::out"]
        [::core::mem::offset_of!(attention_delta_params, out) - 16usize];
    ["Offset of field: attention_delta_params::rows"]
        [::core::mem::offset_of!(attention_delta_params, rows) - 24usize];
    ["Offset of field: attention_delta_params::head_dim"]
        [::core::mem::offset_of!(attention_delta_params, head_dim) - 32usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct attention_backward_params {
    pub dq: *mut ::core::ffi::c_void,
    pub dk: *mut ::core::ffi::c_void,
    pub dv: *mut ::core::ffi::c_void,
    pub dout: *const ::core::ffi::c_void,
    pub q: *const ::core::ffi::c_void,
    pub k: *const ::core::ffi::c_void,
    pub v: *const ::core::ffi::c_void,
    pub lse: *const f32,
    pub delta: *const f32,
    pub sequences: *const attention_sequence,
    pub n_heads: u32,
    pub n_kv_heads: u32,
    pub head_dim: u32,
    pub window: i32,
    pub scale: f32,
    pub softcap: f32,
    pub aligned: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of attention_backward_params"][::core::mem::size_of::<attention_backward_params>() - 112usize];
    ["Alignment of attention_backward_params"][::core::mem::align_of::<attention_backward_params>() - 8usize];
    ["Offset of field: attention_backward_params::dq"]
        [::core::mem::offset_of!(attention_backward_params, dq) - 0usize];
    ["Offset of field: attention_backward_params::dk"]
        [::core::mem::offset_of!(attention_backward_params, dk) - 8usize];
    ["Offset of field: attention_backward_params::dv"]
        [::core::mem::offset_of!(attention_backward_params, dv) - 16usize];
    ["Offset of field: attention_backward_params::dout"]
        [::core::mem::offset_of!(attention_backward_params, dout) - 24usize];
    ["Offset of field: attention_backward_params::q"]
        [::core::mem::offset_of!(attention_backward_params, q) - 32usize];
    ["Offset of field: attention_backward_params::k"]
        [::core::mem::offset_of!(attention_backward_params, k) - 40usize];
    ["Offset of field: attention_backward_params::v"]
        [::core::mem::offset_of!(attention_backward_params, v) - 48usize];
    ["Offset of field: attention_backward_params::lse"]
        [::core::mem::offset_of!(attention_backward_params, lse) - 56usize];
    ["Offset of field: attention_backward_params::delta"]
        [::core::mem::offset_of!(attention_backward_params, delta) - 64usize];
    ["Offset of field: attention_backward_params::sequences"]
        [::core::mem::offset_of!(attention_backward_params, sequences) - 72usize];
    ["Offset of field: attention_backward_params::n_heads"]
        [::core::mem::offset_of!(attention_backward_params, n_heads) - 80usize];
    ["Offset of field: attention_backward_params::n_kv_heads"]
        [::core::mem::offset_of!(attention_backward_params, n_kv_heads) - 84usize];
    ["Offset of field: attention_backward_params::head_dim"]
        [::core::mem::offset_of!(attention_backward_params, head_dim) - 88usize];
    ["Offset of field: attention_backward_params::window"]
        [::core::mem::offset_of!(attention_backward_params, window) - 92usize];
    ["Offset of field: attention_backward_params::scale"]
        [::core::mem::offset_of!(attention_backward_params, scale) - 96usize];
    ["Offset of field: attention_backward_params::softcap"]
        [::core::mem::offset_of!(attention_backward_params, softcap) - 100usize];
    ["Offset of field: attention_backward_params::aligned"]
        [::core::mem::offset_of!(attention_backward_params, aligned) - 104usize];
};
#[repr(C)]
#[repr(align(128))]
#[derive(Debug, Copy, Clone)]
pub struct attention_backward_hopper_params {
    pub attention: attention_backward_params,
    pub __bindgen_padding_0: [u64; 2usize],
    pub q: tensor_map,
    pub k: tensor_map,
    pub v: tensor_map,
    pub dout: tensor_map,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of attention_backward_hopper_params"]
        [::core::mem::size_of::<attention_backward_hopper_params>() - 640usize];
    ["Alignment of attention_backward_hopper_params"]
        [::core::mem::align_of::<attention_backward_hopper_params>() - 128usize];
    ["Offset of field: attention_backward_hopper_params::attention"]
        [::core::mem::offset_of!(attention_backward_hopper_params, attention) - 0usize];
    ["Offset of field: attention_backward_hopper_params::q"]
        [::core::mem::offset_of!(attention_backward_hopper_params, q) - 128usize];
    ["Offset of field: attention_backward_hopper_params::k"]
        [::core::mem::offset_of!(attention_backward_hopper_params, k) - 256usize];
    ["Offset of field: attention_backward_hopper_params::v"]
        [::core::mem::offset_of!(attention_backward_hopper_params, v) - 384usize];
    ["Offset of field: attention_backward_hopper_params::dout"]
        [::core::mem::offset_of!(attention_backward_hopper_params, dout) - 512usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct sample_row {
    pub temperature: f32,
    pub top_p: f32,
    pub uniform: f32,
    pub penalty: f32,
    pub top_k: u32,
    pub first_id: u32,
    pub n_seen: u32,
    pub n_banned: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of sample_row"][::core::mem::size_of::<sample_row>() - 32usize];
    ["Alignment of sample_row"][::core::mem::align_of::<sample_row>() - 4usize];
    ["Offset of field: sample_row::temperature"][::core::mem::offset_of!(sample_row, temperature) - 0usize];
    ["Offset of field: sample_row::top_p"][::core::mem::offset_of!(sample_row, top_p) - 4usize];
    ["Offset of field: sample_row::uniform"][::core::mem::offset_of!(sample_row, uniform) - 8usize];
    ["Offset of field: sample_row::penalty"][::core::mem::offset_of!(sample_row, penalty) - 12usize];
    ["Offset of field: sample_row::top_k"][::core::mem::offset_of!(sample_row, top_k) - 16usize];
    ["Offset of field: sample_row::first_id"][::core::mem::offset_of!(sample_row, first_id) - 20usize];
    ["Offset of field: sample_row::n_seen"][::core::mem::offset_of!(sample_row, n_seen) - 24usize];
    ["Offset of field: sample_row::n_banned"][::core::mem::offset_of!(sample_row, n_banned) - 28usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct sample_params {
    pub scores: *mut f32,
    pub tops: *mut f32,
    pub weights: *mut f64,
    pub sums: *mut f64,
    pub tokens: *mut u32,
    pub rows: *const sample_row,
    pub ids: *const u32,
    pub vocabulary: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of sample_params"][::core::mem::size_of::<sample_params>() - 64usize];
    ["Alignment of sample_params"][::core::mem::align_of::<sample_params>() - 8usize];
    ["Offset of field: sample_params::scores"][::core::mem::offset_of!(sample_params, scores) - 0usize];
    ["Offset of field: sample_params::tops"][::core::mem::offset_of!(sample_params, tops) - 8usize];
    ["Offset of field: sample_params::weights"][::core::mem::offset_of!(sample_params, weights) - 16usize];
    ["Offset of field: sample_params::sums"][::core::mem::offset_of!(sample_params, sums) - 24usize];
    ["Offset of field: sample_params::tokens"][::core::mem::offset_of!(sample_params, tokens) - 32usize];
    ["Offset of field: sample_params::rows"][::core::mem::offset_of!(sample_params, rows) - 40usize];
    ["Offset of field: sample_params::ids"][::core::mem::offset_of!(sample_params, ids) - 48usize];
    ["Offset of field: sample_params::vocabulary"]
        [::core::mem::offset_of!(sample_params, vocabulary) - 56usize];
};
