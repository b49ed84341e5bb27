//! The operations of the tape: for each its forward (a method of [`crate::autograd::Tape`]) and its backward.

pub mod activation;
pub mod add;
pub mod attention;
pub mod bottleneck;
pub(crate) mod by_slot;
pub mod columns;
pub mod cross_entropy;
pub mod dora;
pub mod embedding;
pub(crate) mod head;
pub mod linear;
pub mod lstm;
pub mod norm;
pub mod place;
pub mod prompt;
pub mod rope;
pub mod rotate;
pub mod scale;
pub mod scale_columns;
