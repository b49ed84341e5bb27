//! The optimizer over the flat parameter buffers, and learning-rate schedules.

pub mod adamw;
pub mod schedule;

pub use adamw::{AdamWArguments, AdamWState, clip_scale};
pub use schedule::{LrSchedulerType, Schedule};
