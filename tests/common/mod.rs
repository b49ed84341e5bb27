//! What several tests share.
#![allow(dead_code)]

pub mod gemm;
pub mod golden;
pub mod training;
