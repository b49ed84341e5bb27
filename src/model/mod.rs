//! Models: one decoder driven by `config.json`, with small files for what is special about a family.

pub mod module;

pub use module::{Embedding, Linear, Lora, ModuleInfo, ModuleKind, Norm, Parameter, Weight};
