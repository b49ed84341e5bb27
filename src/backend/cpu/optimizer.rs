//! One step of an optimizer over flat parameters.

use super::bindings::{adamw_args, moments_8bit};
use super::ops::{Elements, GRAIN};
use super::{Cpu, Shared, kernel};
use crate::backend::check::{self, ensure_f32};
use crate::backend::{Moments8bit, OptimizerStep};
use crate::error::Result;
use crate::quant::dynamic_map::DynamicMap;
use crate::tensor::Tensor;

fn arguments(step: &OptimizerStep) -> adamw_args {
    let c = step.constants();
    adamw_args {
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
    }
}

impl Cpu {
    pub(super) fn run_adamw(
        &self,
        p: &mut Tensor,
        g: &Tensor,
        m: &mut Tensor,
        v: &mut Tensor,
        step: &OptimizerStep,
    ) -> Result<()> {
        let n = p.elements();
        ensure_f32("adamw", &[(p, n), (g, n), (m, n), (v, n)])?;
        let args = arguments(step);
        let (p, g, m, v) =
            (Elements::of_mut(p)?, Elements::of(g), Elements::of_mut(m)?, Elements::of_mut(v)?);
        // SAFETY: chunks are disjoint and inside all operands.
        self.run_chunks(n, GRAIN, |i, len| unsafe {
            kernel!(self, adamw)(p.at(i), g.at(i), m.at(i), v.at(i), len, &args);
        });
        Ok(())
    }

    pub(super) fn run_adamw_8bit(
        &self,
        p: &mut Tensor,
        g: &Tensor,
        moments: &mut Moments8bit<'_>,
        step: &OptimizerStep,
    ) -> Result<()> {
        let (n, blocks) = (p.elements(), check::moments_8bit(p, g, moments)?);
        let args = arguments(step);
        let (signed, unsigned) = (DynamicMap::signed(), DynamicMap::unsigned());
        let operands = moments_8bit {
            m: moments.m.host_mut::<u8>()?,
            v: moments.v.host_mut::<u8>()?,
            m_absmax: moments.m_absmax.host_mut::<f32>()?,
            v_absmax: moments.v_absmax.host_mut::<f32>()?,
            m_map: signed.levels.as_ptr(),
            m_midpoints: signed.midpoints.as_ptr(),
            v_map: unsigned.levels.as_ptr(),
            v_midpoints: unsigned.midpoints.as_ptr(),
        };
        let operands = Shared(std::ptr::from_ref(&operands).cast_mut());
        let (p, g) = (Elements::of_mut(p)?, Elements::of(g));
        // SAFETY: each job writes its own blocks; sizes were checked.
        self.run_chunks(blocks, 1, |first, len| unsafe {
            kernel!(self, adamw_8bit)(p.at(0), g.at(0), operands.at(0), n, first, first + len, &args);
        });
        Ok(())
    }

    pub(super) fn run_lion(
        &self,
        p: &mut Tensor,
        g: &Tensor,
        m: &mut Tensor,
        step: &OptimizerStep,
    ) -> Result<()> {
        let n = p.elements();
        ensure_f32("lion", &[(p, n), (g, n), (m, n)])?;
        let args = arguments(&OptimizerStep { bias_correction1: 1.0, ..step.clone() });
        let (p, g, m) = (Elements::of_mut(p)?, Elements::of(g), Elements::of_mut(m)?);
        // SAFETY: chunks are disjoint and inside all operands.
        self.run_chunks(n, GRAIN, |i, len| unsafe {
            kernel!(self, lion)(p.at(i), g.at(i), m.at(i), len, &args);
        });
        Ok(())
    }

    pub(super) fn run_sgd(&self, p: &mut Tensor, g: &Tensor, step: &OptimizerStep) -> Result<()> {
        let n = p.elements();
        ensure_f32("sgd", &[(p, n), (g, n)])?;
        let args = arguments(&OptimizerStep { bias_correction1: 1.0, ..step.clone() });
        let (p, g) = (Elements::of_mut(p)?, Elements::of(g));
        // SAFETY: chunks are disjoint and inside all operands.
        self.run_chunks(n, GRAIN, |i, len| unsafe {
            kernel!(self, sgd)(p.at(i), g.at(i), len, &args);
        });
        Ok(())
    }
}
