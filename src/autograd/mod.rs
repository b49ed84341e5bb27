//! Reverse-mode differentiation over a tape of coarse operations.
//!
//! A model is a plain forward function over a [`Tape`]. Each operation computes at once and, where a gradient
//! is needed, leaves a [`tape::Node`] with what its backward needs. [`backward`] walks the nodes in reverse.
//! Activations live as long as a handle to them does: a variable in the forward function, or a node.

pub mod backward;
pub mod checkpoint;
pub mod tape;

pub use backward::Gradients;
pub use checkpoint::Replay;
pub use tape::{Dropout, Node, Op, Slot, Tape, ValueId, Var};
