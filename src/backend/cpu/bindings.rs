// Made from cpu/kernels.h by tools/regenerate_bindings.sh; do not edit.

#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantized {
    pub codes: *mut u8,
    pub scales: *mut f32,
    pub zeros: *mut u8,
    pub nested: *const u8,
    pub nested_absmax: *const f32,
    pub nested_map: *const f32,
    pub nested_offset: f32,
    pub nested_shift: i32,
    pub minimums: *mut f32,
    pub minimum_codes: *const u8,
    pub minimum_factors: *const f32,
    pub levels: *const f32,
    pub rows: usize,
    pub cols: usize,
    pub block_rows: usize,
    pub block_cols: usize,
    pub blocks_per_row: usize,
    pub format: i32,
    pub panels: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantized"][::core::mem::size_of::<quantized>() - 136usize];
    ["Alignment of quantized"][::core::mem::align_of::<quantized>() - 8usize];
    ["Offset of field: quantized::codes"][::core::mem::offset_of!(quantized, codes) - 0usize];
    ["Offset of field: quantized::scales"][::core::mem::offset_of!(quantized, scales) - 8usize];
    ["Offset of field: quantized::zeros"][::core::mem::offset_of!(quantized, zeros) - 16usize];
    ["Offset of field: quantized::nested"][::core::mem::offset_of!(quantized, nested) - 24usize];
    ["Offset of field: quantized::nested_absmax"]
        [::core::mem::offset_of!(quantized, nested_absmax) - 32usize];
    ["Offset of field: quantized::nested_map"][::core::mem::offset_of!(quantized, nested_map) - 40usize];
    ["Offset of field: quantized::nested_offset"]
        [::core::mem::offset_of!(quantized, nested_offset) - 48usize];
    ["Offset of field: quantized::nested_shift"][::core::mem::offset_of!(quantized, nested_shift) - 52usize];
    ["Offset of field: quantized::minimums"][::core::mem::offset_of!(quantized, minimums) - 56usize];
    ["Offset of field: quantized::minimum_codes"]
        [::core::mem::offset_of!(quantized, minimum_codes) - 64usize];
    ["Offset of field: quantized::minimum_factors"]
        [::core::mem::offset_of!(quantized, minimum_factors) - 72usize];
    ["Offset of field: quantized::levels"][::core::mem::offset_of!(quantized, levels) - 80usize];
    ["Offset of field: quantized::rows"][::core::mem::offset_of!(quantized, rows) - 88usize];
    ["Offset of field: quantized::cols"][::core::mem::offset_of!(quantized, cols) - 96usize];
    ["Offset of field: quantized::block_rows"][::core::mem::offset_of!(quantized, block_rows) - 104usize];
    ["Offset of field: quantized::block_cols"][::core::mem::offset_of!(quantized, block_cols) - 112usize];
    ["Offset of field: quantized::blocks_per_row"]
        [::core::mem::offset_of!(quantized, blocks_per_row) - 120usize];
    ["Offset of field: quantized::format"][::core::mem::offset_of!(quantized, format) - 128usize];
    ["Offset of field: quantized::panels"][::core::mem::offset_of!(quantized, panels) - 132usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantizer {
    pub thresholds: *const f32,
    pub ranks: *const f32,
    pub max_level: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantizer"][::core::mem::size_of::<quantizer>() - 24usize];
    ["Alignment of quantizer"][::core::mem::align_of::<quantizer>() - 8usize];
    ["Offset of field: quantizer::thresholds"][::core::mem::offset_of!(quantizer, thresholds) - 0usize];
    ["Offset of field: quantizer::ranks"][::core::mem::offset_of!(quantizer, ranks) - 8usize];
    ["Offset of field: quantizer::max_level"][::core::mem::offset_of!(quantizer, max_level) - 16usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct gemm_operand {
    pub data: *const ::core::ffi::c_void,
    pub quantized: *const quantized,
    pub ld: usize,
    pub type_: i32,
    pub transposed: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of gemm_operand"][::core::mem::size_of::<gemm_operand>() - 32usize];
    ["Alignment of gemm_operand"][::core::mem::align_of::<gemm_operand>() - 8usize];
    ["Offset of field: gemm_operand::data"][::core::mem::offset_of!(gemm_operand, data) - 0usize];
    ["Offset of field: gemm_operand::quantized"][::core::mem::offset_of!(gemm_operand, quantized) - 8usize];
    ["Offset of field: gemm_operand::ld"][::core::mem::offset_of!(gemm_operand, ld) - 16usize];
    ["Offset of field: gemm_operand::type_"][::core::mem::offset_of!(gemm_operand, type_) - 24usize];
    ["Offset of field: gemm_operand::transposed"]
        [::core::mem::offset_of!(gemm_operand, transposed) - 28usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct gemm_term {
    pub a: *const u32,
    pub b: gemm_operand,
    pub k: usize,
    pub first_row: usize,
    pub last_row: usize,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of gemm_term"][::core::mem::size_of::<gemm_term>() - 64usize];
    ["Alignment of gemm_term"][::core::mem::align_of::<gemm_term>() - 8usize];
    ["Offset of field: gemm_term::a"][::core::mem::offset_of!(gemm_term, a) - 0usize];
    ["Offset of field: gemm_term::b"][::core::mem::offset_of!(gemm_term, b) - 8usize];
    ["Offset of field: gemm_term::k"][::core::mem::offset_of!(gemm_term, k) - 40usize];
    ["Offset of field: gemm_term::first_row"][::core::mem::offset_of!(gemm_term, first_row) - 48usize];
    ["Offset of field: gemm_term::last_row"][::core::mem::offset_of!(gemm_term, last_row) - 56usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct gemm_args {
    pub terms: *const gemm_term,
    pub n_terms: usize,
    pub m: usize,
    pub n: usize,
    pub out: *mut ::core::ffi::c_void,
    pub ldo: usize,
    pub out_type: i32,
    pub out_transposed: i32,
    pub bf16: i32,
    pub accumulate: i32,
    pub scale: f32,
    pub bias: *const ::core::ffi::c_void,
    pub bias_type: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of gemm_args"][::core::mem::size_of::<gemm_args>() - 88usize];
    ["Alignment of gemm_args"][::core::mem::align_of::<gemm_args>() - 8usize];
    ["Offset of field: gemm_args::terms"][::core::mem::offset_of!(gemm_args, terms) - 0usize];
    ["Offset of field: gemm_args::n_terms"][::core::mem::offset_of!(gemm_args, n_terms) - 8usize];
    ["Offset of field: gemm_args::m"][::core::mem::offset_of!(gemm_args, m) - 16usize];
    ["Offset of field: gemm_args::n"][::core::mem::offset_of!(gemm_args, n) - 24usize];
    ["Offset of field: gemm_args::out"][::core::mem::offset_of!(gemm_args, out) - 32usize];
    ["Offset of field: gemm_args::ldo"][::core::mem::offset_of!(gemm_args, ldo) - 40usize];
    ["Offset of field: gemm_args::out_type"][::core::mem::offset_of!(gemm_args, out_type) - 48usize];
    ["Offset of field: gemm_args::out_transposed"]
        [::core::mem::offset_of!(gemm_args, out_transposed) - 52usize];
    ["Offset of field: gemm_args::bf16"][::core::mem::offset_of!(gemm_args, bf16) - 56usize];
    ["Offset of field: gemm_args::accumulate"][::core::mem::offset_of!(gemm_args, accumulate) - 60usize];
    ["Offset of field: gemm_args::scale"][::core::mem::offset_of!(gemm_args, scale) - 64usize];
    ["Offset of field: gemm_args::bias"][::core::mem::offset_of!(gemm_args, bias) - 72usize];
    ["Offset of field: gemm_args::bias_type"][::core::mem::offset_of!(gemm_args, bias_type) - 80usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct attention_args {
    pub q: *const ::core::ffi::c_void,
    pub k: *const ::core::ffi::c_void,
    pub v: *const ::core::ffi::c_void,
    pub q_ld: usize,
    pub k_ld: usize,
    pub q_len: usize,
    pub k_len: usize,
    pub head_dim: usize,
    pub one_token: i32,
    pub scale: f32,
    pub softcap: f32,
    pub window: usize,
    pub type_: i32,
    pub out: *mut ::core::ffi::c_void,
    pub out_ld: usize,
    pub lse: *mut f32,
    pub lse_ld: usize,
    pub dout: *const ::core::ffi::c_void,
    pub dq: *mut ::core::ffi::c_void,
    pub dk: *mut f32,
    pub dv: *mut f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of attention_args"][::core::mem::size_of::<attention_args>() - 160usize];
    ["Alignment of attention_args"][::core::mem::align_of::<attention_args>() - 8usize];
    ["Offset of field: attention_args::q"][::core::mem::offset_of!(attention_args, q) - 0usize];
    ["Offset of field: attention_args::k"][::core::mem::offset_of!(attention_args, k) - 8usize];
    ["Offset of field: attention_args::v"][::core::mem::offset_of!(attention_args, v) - 16usize];
    ["Offset of field: attention_args::q_ld"][::core::mem::offset_of!(attention_args, q_ld) - 24usize];
    ["Offset of field: attention_args::k_ld"][::core::mem::offset_of!(attention_args, k_ld) - 32usize];
    ["Offset of field: attention_args::q_len"][::core::mem::offset_of!(attention_args, q_len) - 40usize];
    ["Offset of field: attention_args::k_len"][::core::mem::offset_of!(attention_args, k_len) - 48usize];
    ["Offset of field: attention_args::head_dim"]
        [::core::mem::offset_of!(attention_args, head_dim) - 56usize];
    ["Offset of field: attention_args::one_token"]
        [::core::mem::offset_of!(attention_args, one_token) - 64usize];
    ["Offset of field: attention_args::scale"][::core::mem::offset_of!(attention_args, scale) - 68usize];
    ["Offset of field: attention_args::softcap"][::core::mem::offset_of!(attention_args, softcap) - 72usize];
    ["Offset of field: attention_args::window"][::core::mem::offset_of!(attention_args, window) - 80usize];
    ["Offset of field: attention_args::type_"][::core::mem::offset_of!(attention_args, type_) - 88usize];
    ["Offset of field: attention_args::out"][::core::mem::offset_of!(attention_args, out) - 96usize];
    ["Offset of field: attention_args::out_ld"][::core::mem::offset_of!(attention_args, out_ld) - 104usize];
    ["Offset of field: attention_args::lse"][::core::mem::offset_of!(attention_args, lse) - 112usize];
    ["Offset of field: attention_args::lse_ld"][::core::mem::offset_of!(attention_args, lse_ld) - 120usize];
    ["Offset of field: attention_args::dout"][::core::mem::offset_of!(attention_args, dout) - 128usize];
    ["Offset of field: attention_args::dq"][::core::mem::offset_of!(attention_args, dq) - 136usize];
    ["Offset of field: attention_args::dk"][::core::mem::offset_of!(attention_args, dk) - 144usize];
    ["Offset of field: attention_args::dv"][::core::mem::offset_of!(attention_args, dv) - 152usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rope_args {
    pub x: *mut ::core::ffi::c_void,
    pub rows: usize,
    pub n_heads: usize,
    pub head_dim: usize,
    pub rotary_dim: usize,
    pub table: *const f32,
    pub table_rows: usize,
    pub positions: *const i32,
    pub type_: i32,
    pub interleaved: i32,
    pub inverse: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rope_args"][::core::mem::size_of::<rope_args>() - 80usize];
    ["Alignment of rope_args"][::core::mem::align_of::<rope_args>() - 8usize];
    ["Offset of field: rope_args::x"][::core::mem::offset_of!(rope_args, x) - 0usize];
    ["Offset of field: rope_args::rows"][::core::mem::offset_of!(rope_args, rows) - 8usize];
    ["Offset of field: rope_args::n_heads"][::core::mem::offset_of!(rope_args, n_heads) - 16usize];
    ["Offset of field: rope_args::head_dim"][::core::mem::offset_of!(rope_args, head_dim) - 24usize];
    ["Offset of field: rope_args::rotary_dim"][::core::mem::offset_of!(rope_args, rotary_dim) - 32usize];
    ["Offset of field: rope_args::table"][::core::mem::offset_of!(rope_args, table) - 40usize];
    ["Offset of field: rope_args::table_rows"][::core::mem::offset_of!(rope_args, table_rows) - 48usize];
    ["Offset of field: rope_args::positions"][::core::mem::offset_of!(rope_args, positions) - 56usize];
    ["Offset of field: rope_args::type_"][::core::mem::offset_of!(rope_args, type_) - 64usize];
    ["Offset of field: rope_args::interleaved"][::core::mem::offset_of!(rope_args, interleaved) - 68usize];
    ["Offset of field: rope_args::inverse"][::core::mem::offset_of!(rope_args, inverse) - 72usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct adamw_args {
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
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of adamw_args"][::core::mem::size_of::<adamw_args>() - 40usize];
    ["Alignment of adamw_args"][::core::mem::align_of::<adamw_args>() - 4usize];
    ["Offset of field: adamw_args::grad_scale"][::core::mem::offset_of!(adamw_args, grad_scale) - 0usize];
    ["Offset of field: adamw_args::decay"][::core::mem::offset_of!(adamw_args, decay) - 4usize];
    ["Offset of field: adamw_args::beta1"][::core::mem::offset_of!(adamw_args, beta1) - 8usize];
    ["Offset of field: adamw_args::one_minus_beta1"]
        [::core::mem::offset_of!(adamw_args, one_minus_beta1) - 12usize];
    ["Offset of field: adamw_args::beta2"][::core::mem::offset_of!(adamw_args, beta2) - 16usize];
    ["Offset of field: adamw_args::one_minus_beta2"]
        [::core::mem::offset_of!(adamw_args, one_minus_beta2) - 20usize];
    ["Offset of field: adamw_args::bias_correction2_sqrt"]
        [::core::mem::offset_of!(adamw_args, bias_correction2_sqrt) - 24usize];
    ["Offset of field: adamw_args::epsilon"][::core::mem::offset_of!(adamw_args, epsilon) - 28usize];
    ["Offset of field: adamw_args::step_size"][::core::mem::offset_of!(adamw_args, step_size) - 32usize];
    ["Offset of field: adamw_args::weight_decay"]
        [::core::mem::offset_of!(adamw_args, weight_decay) - 36usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct moments_8bit {
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
    ["Size of moments_8bit"][::core::mem::size_of::<moments_8bit>() - 64usize];
    ["Alignment of moments_8bit"][::core::mem::align_of::<moments_8bit>() - 8usize];
    ["Offset of field: moments_8bit::m"][::core::mem::offset_of!(moments_8bit, m) - 0usize];
    ["Offset of field: moments_8bit::v"][::core::mem::offset_of!(moments_8bit, v) - 8usize];
    ["Offset of field: moments_8bit::m_absmax"][::core::mem::offset_of!(moments_8bit, m_absmax) - 16usize];
    ["Offset of field: moments_8bit::v_absmax"][::core::mem::offset_of!(moments_8bit, v_absmax) - 24usize];
    ["Offset of field: moments_8bit::m_map"][::core::mem::offset_of!(moments_8bit, m_map) - 32usize];
    ["Offset of field: moments_8bit::m_midpoints"]
        [::core::mem::offset_of!(moments_8bit, m_midpoints) - 40usize];
    ["Offset of field: moments_8bit::v_map"][::core::mem::offset_of!(moments_8bit, v_map) - 48usize];
    ["Offset of field: moments_8bit::v_midpoints"]
        [::core::mem::offset_of!(moments_8bit, v_midpoints) - 56usize];
};
unsafe extern "C" {
    pub fn lowrank_table_scalar(table: *mut kernel_table);
}
unsafe extern "C" {
    pub fn lowrank_table_avx2(table: *mut kernel_table);
}
unsafe extern "C" {
    pub fn lowrank_table_avx512(table: *mut kernel_table);
}
unsafe extern "C" {
    pub fn lowrank_table_avx512bf16(table: *mut kernel_table);
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct kernel_table {
    pub isa: *const ::core::ffi::c_char,
    pub gemm_mr: usize,
    pub gemm_nr: usize,
    pub gemm_kc: usize,
    pub gemm_pack_a_units:
        ::core::option::Option<unsafe extern "C" fn(rows: usize, k: usize, bf16: i32) -> usize>,
    pub gemm_pack_a: ::core::option::Option<
        unsafe extern "C" fn(
            dst: *mut u32,
            a: *const gemm_operand,
            m: usize,
            first_row: usize,
            rows: usize,
            k: usize,
            bf16: i32,
            first: usize,
            last: usize,
        ),
    >,
    pub gemm_tile_rows: ::core::option::Option<unsafe extern "C" fn(m: usize) -> usize>,
    pub gemm_scratch: ::core::option::Option<
        unsafe extern "C" fn(m: usize, panels: usize, first: usize, last: usize) -> usize,
    >,
    pub gemm_panels: ::core::option::Option<
        unsafe extern "C" fn(
            args: *const gemm_args,
            column: usize,
            panels: usize,
            first: usize,
            last: usize,
            scratch: *mut f32,
        ),
    >,
    pub attention_scratch: ::core::option::Option<
        unsafe extern "C" fn(q_len: usize, k_len: usize, head_dim: usize, backward: i32) -> usize,
    >,
    pub attention: ::core::option::Option<
        unsafe extern "C" fn(args: *const attention_args, first: usize, last: usize, scratch: *mut f32),
    >,
    pub attention_padded_dim: ::core::option::Option<unsafe extern "C" fn(head_dim: usize) -> usize>,
    pub attention_sum_parts: ::core::option::Option<
        unsafe extern "C" fn(
            out: *mut ::core::ffi::c_void,
            out_ld: usize,
            type_: i32,
            parts: *const f32,
            part_stride: usize,
            n_parts: usize,
            part_ld: usize,
            rows: usize,
            cols: usize,
        ),
    >,
    pub attention_backward:
        ::core::option::Option<unsafe extern "C" fn(args: *const attention_args, scratch: *mut f32)>,
    pub quantize: ::core::option::Option<
        unsafe extern "C" fn(
            q: *const quantized,
            how: *const quantizer,
            x: *const ::core::ffi::c_void,
            type_: i32,
            first: usize,
            last: usize,
        ) -> i32,
    >,
    pub lay_out_panels: ::core::option::Option<
        unsafe extern "C" fn(to: *const quantized, from: *const quantized, first: usize, last: usize) -> i32,
    >,
    pub dequantize_row: ::core::option::Option<
        unsafe extern "C" fn(q: *const quantized, row: usize, out: *mut ::core::ffi::c_void, out_type: i32),
    >,
    pub rms_norm: ::core::option::Option<
        unsafe extern "C" fn(
            y: *mut ::core::ffi::c_void,
            rstd: *mut f32,
            x: *const ::core::ffi::c_void,
            weight: *const ::core::ffi::c_void,
            weight_type: i32,
            rows: usize,
            cols: usize,
            eps: f32,
            type_: i32,
        ),
    >,
    pub rms_norm_dx: ::core::option::Option<
        unsafe extern "C" fn(
            dx: *mut ::core::ffi::c_void,
            dy: *const ::core::ffi::c_void,
            x: *const ::core::ffi::c_void,
            rstd: *const f32,
            weight: *const ::core::ffi::c_void,
            weight_type: i32,
            rows: usize,
            cols: usize,
            accumulate: i32,
            type_: i32,
        ),
    >,
    pub rms_norm_dweight: ::core::option::Option<
        unsafe extern "C" fn(
            dweight: *mut f32,
            dy: *const ::core::ffi::c_void,
            x: *const ::core::ffi::c_void,
            rstd: *const f32,
            rows: usize,
            cols: usize,
            first: usize,
            last: usize,
            type_: i32,
        ),
    >,
    pub layer_norm: ::core::option::Option<
        unsafe extern "C" fn(
            y: *mut ::core::ffi::c_void,
            stats: *mut f32,
            x: *const ::core::ffi::c_void,
            weight: *const ::core::ffi::c_void,
            bias: *const ::core::ffi::c_void,
            weight_type: i32,
            rows: usize,
            cols: usize,
            eps: f32,
            type_: i32,
        ),
    >,
    pub layer_norm_dx: ::core::option::Option<
        unsafe extern "C" fn(
            dx: *mut ::core::ffi::c_void,
            dy: *const ::core::ffi::c_void,
            x: *const ::core::ffi::c_void,
            stats: *const f32,
            weight: *const ::core::ffi::c_void,
            weight_type: i32,
            rows: usize,
            cols: usize,
            accumulate: i32,
            type_: i32,
        ),
    >,
    pub layer_norm_dweight: ::core::option::Option<
        unsafe extern "C" fn(
            dweight: *mut f32,
            dy: *const ::core::ffi::c_void,
            x: *const ::core::ffi::c_void,
            stats: *const f32,
            rows: usize,
            cols: usize,
            first: usize,
            last: usize,
            type_: i32,
        ),
    >,
    pub column_products: ::core::option::Option<
        unsafe extern "C" fn(
            out: *mut f32,
            a: *const ::core::ffi::c_void,
            b: *const ::core::ffi::c_void,
            rows: usize,
            cols: usize,
            first: usize,
            last: usize,
            type_: i32,
        ),
    >,
    pub scale_columns: ::core::option::Option<
        unsafe extern "C" fn(
            out: *mut ::core::ffi::c_void,
            x: *const ::core::ffi::c_void,
            factors: *const f32,
            bias: *const f32,
            rows: usize,
            cols: usize,
            type_: i32,
        ),
    >,
    pub softcap: ::core::option::Option<unsafe extern "C" fn(x: *mut f32, n: usize, cap: f32)>,
    pub softcap_backward: ::core::option::Option<
        unsafe extern "C" fn(dx: *mut ::core::ffi::c_void, y: *const f32, n: usize, cap: f32, type_: i32),
    >,
    pub rsqrt: ::core::option::Option<unsafe extern "C" fn(out: *mut f32, x: *const f32, n: usize)>,
    pub column_sums: ::core::option::Option<
        unsafe extern "C" fn(
            out: *mut f32,
            x: *const ::core::ffi::c_void,
            rows: usize,
            cols: usize,
            first: usize,
            last: usize,
            type_: i32,
        ),
    >,
    pub rope: ::core::option::Option<unsafe extern "C" fn(args: *const rope_args)>,
    pub activation: ::core::option::Option<
        unsafe extern "C" fn(
            y: *mut ::core::ffi::c_void,
            x: *const ::core::ffi::c_void,
            n: usize,
            kind: i32,
            type_: i32,
        ),
    >,
    pub activation_backward: ::core::option::Option<
        unsafe extern "C" fn(
            dx: *mut ::core::ffi::c_void,
            dy: *const ::core::ffi::c_void,
            x: *const ::core::ffi::c_void,
            n: usize,
            kind: i32,
            type_: i32,
        ),
    >,
    pub gated: ::core::option::Option<
        unsafe extern "C" fn(
            y: *mut ::core::ffi::c_void,
            gate: *const ::core::ffi::c_void,
            up: *const ::core::ffi::c_void,
            n: usize,
            kind: i32,
            type_: i32,
        ),
    >,
    pub gated_backward: ::core::option::Option<
        unsafe extern "C" fn(
            dgate: *mut ::core::ffi::c_void,
            dup: *mut ::core::ffi::c_void,
            dy: *const ::core::ffi::c_void,
            gate: *const ::core::ffi::c_void,
            up: *const ::core::ffi::c_void,
            n: usize,
            kind: i32,
            type_: i32,
        ),
    >,
    pub dropout: ::core::option::Option<
        unsafe extern "C" fn(
            y: *mut ::core::ffi::c_void,
            x: *const ::core::ffi::c_void,
            n: usize,
            first_element: u64,
            p: f32,
            key0: u32,
            key1: u32,
            accumulate: i32,
            type_: i32,
        ),
    >,
    pub cross_entropy: ::core::option::Option<
        unsafe extern "C" fn(
            losses: *mut f32,
            dlogits: *mut ::core::ffi::c_void,
            dlogits_type: i32,
            logits: *const f32,
            targets: *const i32,
            rows: usize,
            vocabulary: usize,
            grad_scale: f32,
        ),
    >,
    pub add: ::core::option::Option<
        unsafe extern "C" fn(
            out: *mut ::core::ffi::c_void,
            a: *const ::core::ffi::c_void,
            b: *const ::core::ffi::c_void,
            n: usize,
            type_: i32,
        ),
    >,
    pub scale: ::core::option::Option<
        unsafe extern "C" fn(out: *mut ::core::ffi::c_void, n: usize, factor: f32, type_: i32),
    >,
    pub cast: ::core::option::Option<
        unsafe extern "C" fn(
            out: *mut ::core::ffi::c_void,
            out_type: i32,
            x: *const ::core::ffi::c_void,
            type_: i32,
            n: usize,
        ),
    >,
    pub sum_squares: ::core::option::Option<unsafe extern "C" fn(x: *const f32, n: usize) -> f32>,
    pub adamw: ::core::option::Option<
        unsafe extern "C" fn(
            p: *mut f32,
            g: *const f32,
            m: *mut f32,
            v: *mut f32,
            n: usize,
            step: *const adamw_args,
        ),
    >,
    pub adamw_8bit: ::core::option::Option<
        unsafe extern "C" fn(
            p: *mut f32,
            g: *const f32,
            moments: *const moments_8bit,
            n: usize,
            first: usize,
            last: usize,
            step: *const adamw_args,
        ),
    >,
    pub lion: ::core::option::Option<
        unsafe extern "C" fn(p: *mut f32, g: *const f32, m: *mut f32, n: usize, step: *const adamw_args),
    >,
    pub sgd: ::core::option::Option<
        unsafe extern "C" fn(p: *mut f32, g: *const f32, n: usize, step: *const adamw_args),
    >,
    pub peak: ::core::option::Option<unsafe extern "C" fn(steps: usize, bf16: i32, sink: *mut f32) -> f64>,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of kernel_table"][::core::mem::size_of::<kernel_table>() - 360usize];
    ["Alignment of kernel_table"][::core::mem::align_of::<kernel_table>() - 8usize];
    ["Offset of field: kernel_table::isa"][::core::mem::offset_of!(kernel_table, isa) - 0usize];
    ["Offset of field: kernel_table::gemm_mr"][::core::mem::offset_of!(kernel_table, gemm_mr) - 8usize];
    ["Offset of field: kernel_table::gemm_nr"][::core::mem::offset_of!(kernel_table, gemm_nr) - 16usize];
    ["Offset of field: kernel_table::gemm_kc"][::core::mem::offset_of!(kernel_table, gemm_kc) - 24usize];
    ["Offset of field: kernel_table::gemm_pack_a_units"]
        [::core::mem::offset_of!(kernel_table, gemm_pack_a_units) - 32usize];
    ["Offset of field: kernel_table::gemm_pack_a"]
        [::core::mem::offset_of!(kernel_table, gemm_pack_a) - 40usize];
    ["Offset of field: kernel_table::gemm_tile_rows"]
        [::core::mem::offset_of!(kernel_table, gemm_tile_rows) - 48usize];
    ["Offset of field: kernel_table::gemm_scratch"]
        [::core::mem::offset_of!(kernel_table, gemm_scratch) - 56usize];
    ["Offset of field: kernel_table::gemm_panels"]
        [::core::mem::offset_of!(kernel_table, gemm_panels) - 64usize];
    ["Offset of field: kernel_table::attention_scratch"]
        [::core::mem::offset_of!(kernel_table, attention_scratch) - 72usize];
    ["Offset of field: kernel_table::attention"][::core::mem::offset_of!(kernel_table, attention) - 80usize];
    ["Offset of field: kernel_table::attention_padded_dim"]
        [::core::mem::offset_of!(kernel_table, attention_padded_dim) - 88usize];
    ["Offset of field: kernel_table::attention_sum_parts"]
        [::core::mem::offset_of!(kernel_table, attention_sum_parts) - 96usize];
    ["Offset of field: kernel_table::attention_backward"]
        [::core::mem::offset_of!(kernel_table, attention_backward) - 104usize];
    ["Offset of field: kernel_table::quantize"][::core::mem::offset_of!(kernel_table, quantize) - 112usize];
    ["Offset of field: kernel_table::lay_out_panels"]
        [::core::mem::offset_of!(kernel_table, lay_out_panels) - 120usize];
    ["Offset of field: kernel_table::dequantize_row"]
        [::core::mem::offset_of!(kernel_table, dequantize_row) - 128usize];
    ["Offset of field: kernel_table::rms_norm"][::core::mem::offset_of!(kernel_table, rms_norm) - 136usize];
    ["Offset of field: kernel_table::rms_norm_dx"]
        [::core::mem::offset_of!(kernel_table, rms_norm_dx) - 144usize];
    ["Offset of field: kernel_table::rms_norm_dweight"]
        [::core::mem::offset_of!(kernel_table, rms_norm_dweight) - 152usize];
    ["Offset of field: kernel_table::layer_norm"]
        [::core::mem::offset_of!(kernel_table, layer_norm) - 160usize];
    ["Offset of field: kernel_table::layer_norm_dx"]
        [::core::mem::offset_of!(kernel_table, layer_norm_dx) - 168usize];
    ["Offset of field: kernel_table::layer_norm_dweight"]
        [::core::mem::offset_of!(kernel_table, layer_norm_dweight) - 176usize];
    ["Offset of field: kernel_table::column_products"]
        [::core::mem::offset_of!(kernel_table, column_products) - 184usize];
    ["Offset of field: kernel_table::scale_columns"]
        [::core::mem::offset_of!(kernel_table, scale_columns) - 192usize];
    ["Offset of field: kernel_table::softcap"][::core::mem::offset_of!(kernel_table, softcap) - 200usize];
    ["Offset of field: kernel_table::softcap_backward"]
        [::core::mem::offset_of!(kernel_table, softcap_backward) - 208usize];
    ["Offset of field: kernel_table::rsqrt"][::core::mem::offset_of!(kernel_table, rsqrt) - 216usize];
    ["Offset of field: kernel_table::column_sums"]
        [::core::mem::offset_of!(kernel_table, column_sums) - 224usize];
    ["Offset of field: kernel_table::rope"][::core::mem::offset_of!(kernel_table, rope) - 232usize];
    ["Offset of field: kernel_table::activation"]
        [::core::mem::offset_of!(kernel_table, activation) - 240usize];
    ["Offset of field: kernel_table::activation_backward"]
        [::core::mem::offset_of!(kernel_table, activation_backward) - 248usize];
    ["Offset of field: kernel_table::gated"][::core::mem::offset_of!(kernel_table, gated) - 256usize];
    ["Offset of field: kernel_table::gated_backward"]
        [::core::mem::offset_of!(kernel_table, gated_backward) - 264usize];
    ["Offset of field: kernel_table::dropout"][::core::mem::offset_of!(kernel_table, dropout) - 272usize];
    ["Offset of field: kernel_table::cross_entropy"]
        [::core::mem::offset_of!(kernel_table, cross_entropy) - 280usize];
    ["Offset of field: kernel_table::add"][::core::mem::offset_of!(kernel_table, add) - 288usize];
    ["Offset of field: kernel_table::scale"][::core::mem::offset_of!(kernel_table, scale) - 296usize];
    ["Offset of field: kernel_table::cast"][::core::mem::offset_of!(kernel_table, cast) - 304usize];
    ["Offset of field: kernel_table::sum_squares"]
        [::core::mem::offset_of!(kernel_table, sum_squares) - 312usize];
    ["Offset of field: kernel_table::adamw"][::core::mem::offset_of!(kernel_table, adamw) - 320usize];
    ["Offset of field: kernel_table::adamw_8bit"]
        [::core::mem::offset_of!(kernel_table, adamw_8bit) - 328usize];
    ["Offset of field: kernel_table::lion"][::core::mem::offset_of!(kernel_table, lion) - 336usize];
    ["Offset of field: kernel_table::sgd"][::core::mem::offset_of!(kernel_table, sgd) - 344usize];
    ["Offset of field: kernel_table::peak"][::core::mem::offset_of!(kernel_table, peak) - 352usize];
};
