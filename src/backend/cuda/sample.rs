//! Launches of `cuda/sample.cu`.

use super::bindings::*;
use super::{Cuda, read, written};
use crate::backend::check::ensure_f32;
use crate::backend::{Kernels, SampleRow};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;
use std::ptr::null_mut;

/// Threads of a block that has a row, and of one that has weights.
const ROW_THREADS: usize = 512;
const WEIGHT_THREADS: usize = 256;

/// Weights, or sums, that are added up first.
const GROUP: usize = 64;

pub(super) fn sample(cuda: &Cuda, scores: &mut Tensor, rows: &[SampleRow<'_>]) -> Result<Vec<Option<u32>>> {
    let (n, vocabulary) = (rows.len(), scores.cols());
    ensure_f32("sample", &[(scores, n * vocabulary)])?;
    if n == 0 {
        return Ok(Vec::new());
    }
    let (mut ids, mut all) = (Vec::new(), Vec::with_capacity(n));
    for row in rows {
        let greedy = row.temperature == 0.0;
        all.push([
            row.temperature.to_bits(),
            row.top_p.to_bits(),
            row.uniform.to_bits(),
            row.repetition_penalty.to_bits(),
            if greedy { 0 } else { row.top_k.min(vocabulary) as u32 },
            ids.len() as u32,
            row.seen.len() as u32,
            row.banned.len() as u32,
        ]);
        ids.extend(row.seen.iter().chain(row.banned).copied());
    }
    ids.push(0); // so that there is one
    let (all, ids) = (cuda.tensor_of(&all)?, cuda.tensor_of(&ids)?);
    let mut tokens = cuda.empty(&[n], DType::I32)?;
    let mut tops = cuda.empty(&[n], DType::F32)?;
    let mut params = sample_params {
        scores: written(scores)?,
        tops: written(&mut tops)?,
        weights: null_mut(),
        sums: null_mut(),
        tokens: written(&mut tokens)?,
        rows: read(&all)?,
        ids: read(&ids)?,
        vocabulary: vocabulary as u32,
    };
    // SAFETY: the operands are as the structure says; numbers of tokens are checked by the kernel.
    unsafe { cuda.launch("sample_prepare", [n, 1, 1], ROW_THREADS, 0, &params)? };
    let drawn = rows.iter().any(|row| row.temperature != 0.0);
    let blocks = vocabulary.div_ceil(GROUP);
    let sums = blocks + blocks.div_ceil(GROUP);
    let scratch =
        drawn.then(|| cuda.empty(&[n * (vocabulary + sums) * size_of::<f64>()], DType::U8)).transpose()?;
    if let Some(mut scratch) = scratch {
        params.weights = written(&mut scratch)?;
        params.sums = params.weights.wrapping_add(n * vocabulary);
        // SAFETY: as above; the scratch memory has room for both.
        unsafe {
            cuda.launch(
                "sample_weights",
                [vocabulary.div_ceil(WEIGHT_THREADS), n, 1],
                WEIGHT_THREADS,
                0,
                &params,
            )?;
            cuda.launch("sample_choose", [n, 1, 1], ROW_THREADS, 0, &params)?;
        }
    }
    let mut found = vec![0u32; n];
    cuda.to_host(&mut [(&tokens, bytemuck::cast_slice_mut(&mut found))])?;
    Ok(found.into_iter().map(|token| (token != SAMPLE_NONE).then_some(token)).collect())
}
