//! Adapters: what is trained on top of a frozen base, in PEFT's terms and files.

pub mod config;
pub mod io;
pub mod lora;
pub mod merge;
pub mod target;

pub use config::{Bias, InitLoraWeights, LoraConfig, TargetModules};
pub use target::{Target, select_targets};
