//! Adapters: what is trained on top of a frozen base, in PEFT's terms and files.

pub mod attach;
pub mod config;
pub mod full;
pub mod io;
pub mod lora;
pub mod merge;
pub mod method;
pub mod reader;
pub mod target;

pub use config::{Bias, InitLoraWeights, LoraConfig};
pub use full::Full;
pub use method::{METHODS, Method, from_settings, load_adapter, method_row, read_adapter};
pub use reader::Origin;
pub use target::{Target, TargetModules, Targeting, select_targets};
