//! The training loop.

use super::arguments::TrainingArguments;
use super::checkpoint::Best;
use super::job::Job;
use super::metrics::{EvalMetrics, StepMetrics};
use crate::adapter::Method;
use crate::data::Example;
use crate::data::loader::{Loader, sequential_batches};
use crate::error::{Error, Result};
use crate::model::Model;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// What a run tells while it goes on.
#[derive(Clone, Debug)]
pub enum Event {
    /// A step was logged; the run has `total_steps`.
    Step {
        /// Its numbers.
        metrics: StepMetrics,
        /// Steps of the whole run.
        total_steps: usize,
    },
    /// An evaluation was made.
    Evaluation(EvalMetrics),
    /// A checkpoint was written.
    Checkpoint(PathBuf),
    /// The run ends early: the evaluation loss has not improved for so many evaluations.
    EarlyStop(usize),
}

/// The end of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// Optimizer steps done.
    pub steps: usize,
    /// The last step's loss.
    pub loss: f64,
    /// The last evaluation's loss, if any was made.
    pub eval_loss: Option<f64>,
    /// The best evaluation, if any was made.
    pub best: Option<Best>,
}

/// A training run: model, data, settings and where it stands.
#[derive(Debug)]
pub struct Trainer<'a> {
    model: &'a mut Model,
    job: Job,
}

impl<'a> Trainer<'a> {
    /// A run of `method`, already attached to `model`, that writes to the folder `output`.
    ///
    /// # Errors
    /// When memory can't be had or settings contradict each other.
    pub fn new(
        model: &'a mut Model,
        method: Box<dyn Method>,
        arguments: TrainingArguments,
        loader: Loader,
        eval_examples: Vec<Example>,
        output: &Path,
    ) -> Result<Self> {
        let job = Job::new(model, method, arguments, loader, eval_examples, output)?;
        Ok(Trainer { model, job })
    }

    /// Steps of the whole run.
    pub fn total_steps(&self) -> usize {
        self.job.total_steps
    }

    /// Tokens read so far.
    pub fn tokens(&self) -> u64 {
        self.job.state.tokens
    }

    /// Steps done so far.
    pub fn steps_done(&self) -> usize {
        self.job.state.global_step
    }

    /// Goes to where the run of a checkpoint stood.
    ///
    /// # Errors
    /// When the checkpoint is malformed, or of a run with other data or settings.
    pub fn resume(&mut self, checkpoint: &Path) -> Result<()> {
        self.job.resume(self.model, checkpoint)
    }

    /// Trains to the end, or until `stop` is set: then a checkpoint is written and
    /// [`Error::Interrupted`] returned.
    ///
    /// # Errors
    /// When a loss or gradient is not finite, a file can't be written, or an operation fails.
    pub fn run(&mut self, stop: &AtomicBool, tell: &mut dyn FnMut(&Event)) -> Result<Report> {
        self.job.begin()?;
        while !self.job.is_over() {
            if stop.load(Ordering::Relaxed) {
                let path = self.job.save_checkpoint(self.model, tell)?;
                return Err(Error::Interrupted(format!(
                    "checkpoint saved to {}; go on with --resume latest",
                    path.display()
                )));
            }
            let micro = self.job.next_micro_batch(self.model)?;
            let losses = self.model.train_step(&micro.batch, micro.grad_scale, Some(micro.dropout))?;
            self.job.take_losses(self.model, losses, tell)?;
        }
        self.job.finish(self.model)
    }
}

/// Mean cross-entropy over all target tokens, and their number; each example is its own sequence.
///
/// # Errors
/// When there is no target token, or an operation fails.
pub fn evaluate(model: &Model, examples: &[Example], batch_size: usize) -> Result<(f64, usize)> {
    let (mut sum, mut counted) = (0.0f64, 0);
    for batch in sequential_batches(examples, batch_size) {
        let losses = model.backend.to_vec::<f32>(&model.evaluate(&batch)?)?;
        sum = losses.iter().fold(sum, |sum, loss| sum + f64::from(*loss));
        counted += losses.len();
    }
    if counted == 0 {
        return Err(Error::config(
            "evaluation data",
            "labels",
            "expected at least one token that counts, found none",
        ));
    }
    Ok((sum / counted as f64, counted))
}
