//! Learning rates by step, as transformers' `get_scheduler` makes them.

use crate::error::{Error, Result};
use crate::math;

/// The shape of the schedule after warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LrSchedulerType {
    /// Down to zero in a straight line.
    Linear,
    /// Down to zero by half a cosine.
    Cosine,
    /// The same rate always; no warmup.
    Constant,
    /// The same rate after warmup.
    ConstantWithWarmup,
}

impl LrSchedulerType {
    /// All, with the names that flags and files use.
    pub const NAMES: [(&'static str, LrSchedulerType); 4] = [
        ("linear", LrSchedulerType::Linear),
        ("cosine", LrSchedulerType::Cosine),
        ("constant", LrSchedulerType::Constant),
        ("constant_with_warmup", LrSchedulerType::ConstantWithWarmup),
    ];

    /// The name that flags and files use.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, kind)| *kind == self).map_or("", |(name, _)| name)
    }
}

impl std::str::FromStr for LrSchedulerType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::NAMES.iter().find(|(name, _)| *name == text).map(|(_, kind)| *kind).ok_or_else(|| {
            let names = Self::NAMES.map(|(name, _)| name).join(", ");
            Error::config("training", "lr_scheduler_type", format!("expected one of {names}, found `{text}`"))
        })
    }
}

/// A run's learning rates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    kind: LrSchedulerType,
    learning_rate: f64,
    warmup_steps: usize,
    total_steps: usize,
}

impl Schedule {
    /// A schedule over `total_steps` optimizer steps. `warmup_steps` below 1 is a share of them, rounded up.
    pub fn new(kind: LrSchedulerType, learning_rate: f64, warmup_steps: f64, total_steps: usize) -> Self {
        let warmup =
            if warmup_steps < 1.0 { (warmup_steps * total_steps as f64).ceil() } else { warmup_steps };
        Schedule { kind, learning_rate, warmup_steps: warmup as usize, total_steps }
    }

    /// The rate of step `step`, counted from 0. Warmup starts at zero.
    pub fn learning_rate(&self, step: usize) -> f64 {
        self.learning_rate * self.factor(step)
    }

    fn factor(&self, step: usize) -> f64 {
        let (step, warmup, total) = (step as f64, self.warmup_steps as f64, self.total_steps as f64);
        if self.kind != LrSchedulerType::Constant && step < warmup {
            return step / warmup.max(1.0);
        }
        match self.kind {
            LrSchedulerType::Constant | LrSchedulerType::ConstantWithWarmup => 1.0,
            LrSchedulerType::Linear => ((total - step) / (total - warmup).max(1.0)).max(0.0),
            LrSchedulerType::Cosine => {
                let progress = (step - warmup) / (total - warmup).max(1.0);
                (0.5 * (1.0 + math::cos(std::f64::consts::PI * progress))).max(0.0)
            }
        }
    }
}
