//! The optimizer over the flat parameter buffers, and learning-rate schedules.

pub mod optimizer;
mod pages;
pub mod schedule;

pub use optimizer::{Optim, Optimizer, OptimizerArguments, clip_scale};
pub use schedule::{LrSchedulerType, Schedule};
