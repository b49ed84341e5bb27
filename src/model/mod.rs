//! Models: one decoder driven by `config.json`, with small files for what is special about a family.

pub mod batch;
pub mod bnb;
pub mod checkpoint;
pub mod config;
pub mod decoder;
pub mod forward;
pub mod gemma;
pub mod gguf;
pub mod glm;
pub mod gpt2;
pub mod llama;
pub mod load;
pub mod module;
pub mod phi3;
pub mod prompt;
pub mod quantize;
pub mod qwen;
pub mod rope;
pub mod save;
pub mod side_by_side;
pub(crate) mod stored;

pub use batch::Batch;
pub use checkpoint::Checkpoint;
pub use config::ModelConfig;
pub use decoder::{Installed, Model};
pub use forward::{KvCache, RowSlot};
pub use load::LoadOptions;
pub(crate) use load::StoredWeights;
pub use module::{
    Apart, Bottleneck, Dora, Embedding, EmbeddingAdapter, EmbeddingLora, Factored, Linear, LinearAdapter,
    Lora, ModuleInfo, ModuleKind, Norm, Parameter, Rotation, Weight,
};
