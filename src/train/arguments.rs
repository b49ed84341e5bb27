//! What a training run is told, in the names of Hugging Face's training arguments.

use crate::optim::{LrSchedulerType, OptimizerArguments};
use serde_json::{Value, json};

/// When evaluations or checkpoints happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interval {
    /// Never (a checkpoint is still made when the run is stopped).
    No,
    /// Every so many optimizer steps.
    Steps(usize),
    /// At the end of every epoch.
    Epoch,
}

/// Settings of a run.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct TrainingArguments {
    pub learning_rate: f64,
    pub lr_scheduler_type: LrSchedulerType,
    /// Steps, or a share of all steps if below 1.
    pub warmup_steps: f64,
    pub optimizer: OptimizerArguments,
    /// Bound of the global gradient norm; `None`: no clipping.
    pub max_grad_norm: Option<f64>,
    pub num_train_epochs: f64,
    /// Overrides `num_train_epochs`.
    pub max_steps: Option<usize>,
    pub seed: u64,
    pub logging_steps: usize,
    pub eval_strategy: Interval,
    pub per_device_eval_batch_size: usize,
    pub save_strategy: Interval,
    /// Checkpoints kept; the best one is kept besides.
    pub save_total_limit: Option<usize>,
    pub load_best_model_at_end: bool,
    /// Stop after so many evaluations without a better loss.
    pub early_stopping_patience: Option<usize>,
}

impl Default for TrainingArguments {
    fn default() -> Self {
        TrainingArguments {
            learning_rate: 2e-4,
            lr_scheduler_type: LrSchedulerType::Linear,
            warmup_steps: 0.0,
            optimizer: OptimizerArguments::default(),
            max_grad_norm: Some(1.0),
            num_train_epochs: 3.0,
            max_steps: None,
            seed: 42,
            logging_steps: 1,
            eval_strategy: Interval::No,
            per_device_eval_batch_size: 8,
            save_strategy: Interval::No,
            save_total_limit: None,
            load_best_model_at_end: false,
            early_stopping_patience: None,
        }
    }
}

impl TrainingArguments {
    /// Optimizer steps of the whole run.
    pub fn total_steps(&self, steps_per_epoch: usize) -> usize {
        self.max_steps.unwrap_or_else(|| (self.num_train_epochs * steps_per_epoch as f64).ceil() as usize)
    }

    /// What the numbers of a run follow from, besides model, data and adapter: a resumed run must have the
    /// same.
    pub(super) fn fingerprint(&self, total_steps: usize) -> Value {
        json!({
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": self.lr_scheduler_type.name(),
            "warmup_steps": self.warmup_steps,
            "optim": self.optimizer.optim.rule_name(),
            "adam_beta1": self.optimizer.adam_beta1,
            "adam_beta2": self.optimizer.adam_beta2,
            "adam_epsilon": self.optimizer.adam_epsilon,
            "weight_decay": self.optimizer.weight_decay,
            "loraplus_lr_ratio": self.optimizer.loraplus_lr_ratio,
            "loraplus_lr_embedding": self.optimizer.loraplus_lr_embedding,
            "max_grad_norm": self.max_grad_norm,
            "total_steps": total_steps,
            "seed": self.seed,
        })
    }
}
