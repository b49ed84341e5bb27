//! What several tests share.
#![allow(dead_code)]

pub mod cases;
pub mod compare;
pub mod gemm;
pub mod golden;
pub mod training;
