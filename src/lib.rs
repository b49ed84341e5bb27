//! Parameter-efficient fine-tuning of large language models.
//!
//! The tour, in the order in which data flows:
//!
//! 1. Foundations: [`Tensor`] handles over [`arena`] memory or mapped files, [`rng`], the [`error::Error`] enum.
//! 2. [`backend`]: the trait [`backend::Kernels`] specifies every computation; a scalar reference and the
//!    CPU's SIMD kernels implement it.
//! 3. [`param`]: the trainable parameters in flat buffers. [`autograd`] and [`ops`]: a tape of coarse operations.
//! 4. [`model`]: `config.json` and safetensors become a [`model::Model`].
//! 5. [`adapter`]: LoRA in PEFT's terms: settings, targets, files, merging.
//! 6. [`data`]: rows become tokens with labels, and micro-batches in a reproducible order.
//! 7. [`optim`] and [`train`]: optimizers, schedules, the loop with its checkpoints. [`mod@generate`]: text again.
//!
//! ```no_run
//! use lowrank::{DType, adapter::{LoraConfig, Method}, backend::cpu::Cpu, model::Model};
//! # fn main() -> lowrank::Result<()> {
//! let backend = Cpu::new(None)?;
//! let mut model = Model::load("a-hugging-face-folder".as_ref(), &backend, DType::BF16)?;
//! let mut config = LoraConfig { r: 16, ..LoraConfig::default() };
//! config.attach(&mut model, 42)?;
//! println!("{} trained parameters on {}", model.params.elements(), backend.name());
//! # Ok(())
//! # }
//! ```
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
pub mod quant;
pub mod rng;
pub mod tensor;
pub mod train;

pub use dtype::DType;
pub use error::{Error, Result};
pub use param::{ParamId, ParamLayout, ParamStore};
pub use tensor::Tensor;
