//! Parameter-efficient fine-tuning of large language models.
//!
//! The tour, in the order in which data flows:
//!
//! 1. Foundations: [`Tensor`] handles over [`arena`] memory or mapped files, [`rng`], the [`error::Error`] enum.
//! 2. [`backend`]: the trait [`backend::Kernels`] specifies every computation; a scalar reference and the
//!    CPU's SIMD kernels implement it.
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod adapter;
pub mod arena;
pub mod autograd;
pub mod backend;
pub mod data;
pub mod dtype;
pub mod error;
pub mod fs;
pub mod generate;
pub mod math;
pub mod model;
pub mod ops;
pub mod optim;
pub mod param;
pub mod rng;
pub mod tensor;
pub mod train;

pub use dtype::DType;
pub use error::{Error, Result};
pub use param::{ParamId, ParamLayout, ParamStore};
pub use tensor::Tensor;
