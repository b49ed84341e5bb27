//! Launches of `cuda/optimizer.cu`.

use super::bindings::*;
use super::{Cuda, PACK, THREADS, norm, read, written};
use crate::backend::check::{self, ensure_f32};
use crate::backend::{Kernels, Moments8bit, OptimizerStep};
use crate::error::Result;
use crate::quant::dynamic_map::{DynamicMap, MOMENTS_BLOCKSIZE};
use crate::tensor::Tensor;
use std::ptr::null_mut;

fn parameters(p: &mut Tensor, g: &Tensor, step: &OptimizerStep) -> Result<optimizer_params> {
    let c = step.constants();
    Ok(optimizer_params {
        n: p.elements() as u64,
        p: written(p)?,
        m: null_mut(),
        v: null_mut(),
        g: read(g)?,
        grad_scale: c.grad_scale,
        decay: c.decay,
        beta1: c.beta1,
        one_minus_beta1: c.one_minus_beta1,
        beta2: c.beta2,
        one_minus_beta2: c.one_minus_beta2,
        bias_correction2_sqrt: c.bias_correction2_sqrt,
        epsilon: c.epsilon,
        step_size: c.step_size,
        weight_decay: c.weight_decay,
        verdict: step.verdict.as_ref().map_or(Ok(std::ptr::null()), read)?,
    })
}

/// What the host would find by `step_report`, in the verdict.
pub(super) fn judge(
    cuda: &Cuda,
    verdict: &mut Tensor,
    step: usize,
    gradients: Option<&Tensor>,
    losses: &[Tensor],
    max_grad_norm: Option<f64>,
) -> Result<()> {
    ensure_f32("judge", &[(verdict, 3)])?;
    let step = step as f32; // exact for 16 million steps
    for losses in losses {
        let n = losses.elements();
        ensure_f32("judge", &[(losses, n)])?;
        let params =
            judge_losses_params { verdict: written(verdict)?, losses: read(losses)?, n: n as u64, step };
        // SAFETY: the operands are as the structure says.
        unsafe { cuda.launch("judge_losses", [1, 1, 1], THREADS, 0, &params)? };
    }
    let sums = gradients.map(|gradients| norm::block_sums(cuda, gradients)).transpose()?;
    let params = judge_gradients_params {
        verdict: written(verdict)?,
        sums: sums.as_ref().map_or(Ok(std::ptr::null()), read)?,
        n: sums.as_ref().map_or(0, |sums| sums.elements() as u64),
        max_grad_norm: max_grad_norm.unwrap_or(f64::INFINITY),
        step,
    };
    // SAFETY: the operands are as the structure says.
    unsafe { cuda.launch("judge_gradients", [1, 1, 1], THREADS, 0, &params)? };
    cuda.queue.start_over()
}

/// A step of AdamW (with `m` and `v`), Lion (with `m`) or gradient descent.
pub(super) fn step(
    cuda: &Cuda,
    kernel: &'static str,
    p: &mut Tensor,
    g: &Tensor,
    m: Option<&mut Tensor>,
    v: Option<&mut Tensor>,
    step: &OptimizerStep,
) -> Result<()> {
    let n = p.elements();
    ensure_f32(kernel, &[(p, n), (g, n)])?;
    let mut params = parameters(p, g, step)?;
    for (to, moments) in [(&mut params.m, m), (&mut params.v, v)] {
        if let Some(moments) = moments {
            ensure_f32(kernel, &[(moments, n)])?;
            *to = written(moments)?;
        }
    }
    let grid = [n.div_ceil(THREADS * PACK), 1, 1];
    // SAFETY: the operands are as the structure says.
    unsafe { cuda.launch(kernel, grid, THREADS, 0, &params) }
}

pub(super) fn adamw_8bit(
    cuda: &Cuda,
    p: &mut Tensor,
    g: &Tensor,
    moments: &mut Moments8bit<'_>,
    step: &OptimizerStep,
) -> Result<()> {
    let blocks = check::moments_8bit(p, g, moments)?;
    let mut maps = cuda.maps.lock().expect("the lock is never held across a panic");
    if maps.is_none() {
        let (signed, unsigned) = (DynamicMap::signed(), DynamicMap::unsigned());
        let all = [&signed.levels[..], &signed.midpoints, &unsigned.levels, &unsigned.midpoints].concat();
        *maps = Some((cuda as &dyn Kernels).from_slice(&all, &[all.len()])?);
        cuda.queue.fork()?; // work beside the computations reads them, too
    }
    let map = |start: usize| read::<f32>(maps.as_ref().expect("made above")).map(|p| p.wrapping_add(start));
    let params = adamw_8bit_params {
        step: parameters(p, g, step)?,
        m: written(moments.m)?,
        v: written(moments.v)?,
        m_absmax: written(moments.m_absmax)?,
        v_absmax: written(moments.v_absmax)?,
        m_map: map(0)?,
        m_midpoints: map(256)?,
        v_map: map(511)?,
        v_midpoints: map(767)?,
    };
    // SAFETY: the operands are as the structure says.
    unsafe { cuda.launch("adamw_8bit", [blocks, 1, 1], MOMENTS_BLOCKSIZE, 0, &params) }
}
