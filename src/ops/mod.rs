//! The operations of the tape: for each its forward (a method of [`crate::autograd::Tape`]) and its backward.

pub mod activation;
pub mod add;
pub mod attention;
pub mod columns;
pub mod cross_entropy;
pub mod embedding;
pub mod linear;
pub mod norm;
pub mod rope;
