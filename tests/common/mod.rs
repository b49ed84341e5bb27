//! What several tests share.
#![allow(dead_code)]

pub mod cases;
pub mod compare;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod gemm;
pub mod golden;
#[cfg(feature = "cuda")]
pub mod host_kernels;
pub mod training;
#[cfg(feature = "cuda")]
pub mod watched;
