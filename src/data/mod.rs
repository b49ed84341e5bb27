//! Training data, in the order in which it flows: rows of a file ([`jsonl`]), their text as a chat template
//! writes it and its tokens with labels (feature `text`), rows filled by packing ([`pack`]), the micro-batches
//! of each optimizer step ([`loader`]).

pub mod jsonl;
pub mod loader;
pub mod pack;

pub use jsonl::{Format, Message, Record};
pub use loader::{Loader, LoaderConfig, LoaderState, sequential_batches};

/// A tokenized sequence with a label per token: the token itself where it counts for the loss, otherwise
/// [`IGNORE_INDEX`](crate::backend::IGNORE_INDEX). Labels are not shifted.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Example {
    /// Token ids, `[tokens]`.
    pub input_ids: Vec<u32>,
    /// Labels, `[tokens]`.
    pub labels: Vec<i32>,
}
