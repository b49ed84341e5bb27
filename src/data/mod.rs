//! Training data, in the order in which it flows: rows of a file ([`jsonl`]), their text as a chat template
//! writes it (`template`) and its tokens (`tokenizer`) with a label each (`chat`, `dataset`), sequences packed
//! into rows ([`pack`]), the micro-batches of each optimizer step ([`loader`]).

#[cfg(feature = "text")]
pub mod chat;
#[cfg(feature = "text")]
pub mod dataset;
pub(crate) mod gguf;
pub mod jsonl;
pub mod loader;
pub mod pack;
#[cfg(feature = "text")]
pub mod preview;
#[cfg(feature = "text")]
pub mod template;
#[cfg(feature = "text")]
pub mod tokenizer;

#[cfg(feature = "text")]
pub use dataset::{Dataset, DatasetOptions, Report};
pub use jsonl::{Format, Message, Record};
pub use loader::{Loader, LoaderConfig, LoaderState, sequential_batches};
#[cfg(feature = "text")]
pub use preview::{Marking, preview};
#[cfg(feature = "text")]
pub use template::ChatTemplate;
#[cfg(feature = "text")]
pub use tokenizer::Tokenizer;

/// A tokenized sequence with a label per token: the token itself where it counts for the loss, otherwise
/// [`IGNORE_INDEX`](crate::backend::IGNORE_INDEX). Labels are not shifted.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Example {
    /// Token ids, `[tokens]`.
    pub input_ids: Vec<u32>,
    /// Labels, `[tokens]`.
    pub labels: Vec<i32>,
}
