// Made from cuda/params.h by tools/regenerate_bindings.sh; do not edit.

pub const FAULT_GATHER_ROWS: fault = 1;
pub const FAULT_SCATTER_ADD_ROWS: fault = 2;
pub const FAULT_ROPE: fault = 4;
pub const FAULT_CROSS_ENTROPY: fault = 8;
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
    pub x: *mut ::core::ffi::c_void,
    pub table: *const f32,
    pub positions: *const i32,
    pub faults: *mut u32,
    pub rows: u64,
    pub n_heads: u32,
    pub head_dim: u32,
    pub rotary_dim: u32,
    pub table_rows: u32,
    pub interleaved: i32,
    pub inverse: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rope_params"][::core::mem::size_of::<rope_params>() - 64usize];
    ["Alignment of rope_params"][::core::mem::align_of::<rope_params>() - 8usize];
    ["Offset of field: rope_params::x"][::core::mem::offset_of!(rope_params, x) - 0usize];
    ["Offset of field: rope_params::table"][::core::mem::offset_of!(rope_params, table) - 8usize];
    ["Offset of field: rope_params::positions"][::core::mem::offset_of!(rope_params, positions) - 16usize];
    ["Offset of field: rope_params::faults"][::core::mem::offset_of!(rope_params, faults) - 24usize];
    ["Offset of field: rope_params::rows"][::core::mem::offset_of!(rope_params, rows) - 32usize];
    ["Offset of field: rope_params::n_heads"][::core::mem::offset_of!(rope_params, n_heads) - 40usize];
    ["Offset of field: rope_params::head_dim"][::core::mem::offset_of!(rope_params, head_dim) - 44usize];
    ["Offset of field: rope_params::rotary_dim"][::core::mem::offset_of!(rope_params, rotary_dim) - 48usize];
    ["Offset of field: rope_params::table_rows"][::core::mem::offset_of!(rope_params, table_rows) - 52usize];
    ["Offset of field: rope_params::interleaved"]
        [::core::mem::offset_of!(rope_params, interleaved) - 56usize];
    ["Offset of field: rope_params::inverse"][::core::mem::offset_of!(rope_params, inverse) - 60usize];
};
