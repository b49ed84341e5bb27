//! What several tests share.
#![allow(dead_code)]

pub mod golden;
pub mod training;
