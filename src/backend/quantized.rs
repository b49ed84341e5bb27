//! What backends share of quantized matrices.

use super::Kernels;
use crate::dtype::DType;
use crate::error::Result;
use crate::quant::double_quant::NestedScales;
use crate::quant::dynamic_map::DynamicMap;
use crate::quant::fp8::Fp8;
use crate::quant::{Codes, Scales};

/// The kernels' number of how codes stand for levels.
pub(super) fn format_code(codes: Codes) -> i32 {
    match codes {
        Codes::Levels { .. } | Codes::Int4 { .. } | Codes::Int4Minimum => 0,
        Codes::Int8 => 1,
        Codes::Fp8(Fp8::E4m3) => 2,
        Codes::Fp8(Fp8::E5m2) => 3,
        Codes::Int6 => 4,
    }
}

/// Quantized scales in the backend's memory.
pub(super) fn upload_nested(backend: &dyn Kernels, nested: &NestedScales) -> Result<Scales> {
    let upload = |bytes: &[u8], count: usize, dtype: DType| {
        let mut out = backend.empty(&[count], dtype)?;
        backend.upload(&mut out, bytes).map(|()| out)
    };
    Ok(Scales::Nested {
        codes: upload(&nested.codes, nested.codes.len(), DType::U8)?,
        absmax: upload(bytemuck::cast_slice(&nested.absmax), nested.absmax.len(), DType::F32)?,
        map: upload(bytemuck::cast_slice(&DynamicMap::signed().levels), 256, DType::F32)?,
        offset: nested.offset,
    })
}
