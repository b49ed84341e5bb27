//! Adapters: what is trained on top of a frozen base, in PEFT's terms and files.

pub mod adalora;
pub mod attach;
pub mod bitfit;
pub mod bottleneck;
mod card;
pub mod combine;
pub mod config;
pub mod full;
pub mod ia3;
pub mod io;
pub mod ln_tuning;
pub mod lora;
pub mod merge;
pub mod method;
pub mod oft;
pub mod prompt;
pub mod rank_allocator;
pub mod reader;
pub mod residual;
pub mod set;
pub mod target;
pub mod vera;

pub use adalora::AdaLoraConfig;
pub use bitfit::BitFitConfig;
pub use bottleneck::BottleneckConfig;
pub use config::{Bias, InitLoraWeights, LoraConfig};
pub use full::Full;
pub use ia3::Ia3Config;
pub use ln_tuning::LnTuningConfig;
pub use method::{METHODS, Method, from_settings, load_adapter, method_row, read_adapter};
pub use oft::OftConfig;
pub use prompt::{PromptKind, PromptLearningConfig, PromptTuningInit};
pub use reader::Origin;
pub use set::AdapterSet;
pub use target::{Target, TargetModules, Targeting, select_targets};
pub use vera::VeraConfig;
