//! AdamW over a [`ParamStore`], in PyTorch's order of operations.
//!
//! Source: Loshchilov, Hutter, "Decoupled weight decay regularization" (arXiv 1711.05101).

use crate::backend::{AdamW, Backend};
use crate::dtype::DType;
use crate::error::Result;
use crate::param::ParamStore;
use crate::tensor::Tensor;

/// Settings of AdamW that stay the same through a run, in Hugging Face's names.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct AdamWArguments {
    pub adam_beta1: f64,
    pub adam_beta2: f64,
    pub adam_epsilon: f64,
    /// Decoupled; biases and norms are spared.
    pub weight_decay: f64,
}

impl Default for AdamWArguments {
    fn default() -> Self {
        AdamWArguments { adam_beta1: 0.9, adam_beta2: 0.999, adam_epsilon: 1e-8, weight_decay: 0.0 }
    }
}

/// The optimizer's state: both moments, flat as the parameters, and the steps done.
#[derive(Debug)]
pub struct AdamWState {
    /// First moments, f32 `[total]`.
    pub m: Tensor,
    /// Second moments, f32 `[total]`.
    pub v: Tensor,
    /// Steps done.
    pub step: u64,
}

impl AdamWState {
    /// The state before the first step.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn new(backend: &Backend, params: &ParamStore) -> Result<Self> {
        let zeros = || backend.zeros(params.values().shape(), DType::F32);
        Ok(AdamWState { m: zeros()?, v: zeros()?, step: 0 })
    }

    /// One step with the store's gradients times `grad_scale`.
    ///
    /// # Errors
    /// When no gradients were prepared.
    pub fn step(
        &mut self,
        backend: &Backend,
        params: &mut ParamStore,
        arguments: &AdamWArguments,
        learning_rate: f64,
        grad_scale: f32,
    ) -> Result<()> {
        self.step += 1;
        let step = AdamW {
            learning_rate,
            beta1: arguments.adam_beta1,
            beta2: arguments.adam_beta2,
            epsilon: arguments.adam_epsilon,
            weight_decay: 0.0,
            grad_scale,
            bias_correction1: 1.0 - power(arguments.adam_beta1, self.step),
            bias_correction2_sqrt: (1.0 - power(arguments.adam_beta2, self.step)).sqrt(),
        };
        let Some(grads) = params.grads() else { return Ok(()) };
        for (range, decay) in runs(params) {
            let step = AdamW { weight_decay: if decay { arguments.weight_decay } else { 0.0 }, ..step };
            let mut p = params.values().slice(range.clone())?;
            let (mut m, mut v) = (self.m.slice(range.clone())?, self.v.slice(range.clone())?);
            backend.adamw(&mut p, &grads.slice(range)?, &mut m, &mut v, &step)?;
        }
        params.refresh_compute()
    }
}

/// Ranges of neighbouring parameters with the same weight decay.
fn runs(params: &ParamStore) -> Vec<(std::ops::Range<usize>, bool)> {
    let mut runs: Vec<(std::ops::Range<usize>, bool)> = Vec::new();
    for info in params.infos() {
        match runs.last_mut() {
            Some((range, decay)) if *decay == info.decay => range.end = info.range.end,
            _ => runs.push((info.range.clone(), info.decay)),
        }
    }
    runs
}

/// `base` to a whole power by squaring, the same on every platform.
fn power(mut base: f64, mut exponent: u64) -> f64 {
    let mut result = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    result
}

/// The factor that brings a gradient of this norm down to `max_grad_norm`, as PyTorch's
/// `clip_grad_norm_`; 1 without a bound.
pub fn clip_scale(grad_norm: f64, max_grad_norm: Option<f64>) -> f32 {
    max_grad_norm.map_or(1.0, |max| (max / (grad_norm + 1e-6)).min(1.0) as f32)
}
