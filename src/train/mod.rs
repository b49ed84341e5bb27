//! Training: the loop, its checkpoints and its record.

pub mod arguments;
pub mod checkpoint;
mod job;
pub mod many;
pub mod metrics;
pub mod plan;
pub mod plan_many;
pub mod trainer;

pub use arguments::{Interval, TrainingArguments};
pub use checkpoint::latest_checkpoint;
pub use many::ManyTrainer;
pub use plan::{MemoryPlan, PlanArguments, Planner, base_bytes};
pub use plan_many::ManyPlanner;
pub use trainer::{Event, Report, Trainer, evaluate};
