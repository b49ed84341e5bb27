//! The training loop.

use super::arguments::{Interval, TrainingArguments};
use super::checkpoint::{self, Best, TrainerState};
use super::metrics::{EvalMetrics, MetricsFile, StepMetrics, peak_memory_bytes};
use crate::adapter::Method;
use crate::autograd::Dropout;
use crate::data::Example;
use crate::data::loader::{Loader, sequential_batches};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::optim::{Optimizer, Schedule, clip_scale};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

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
    method: Box<dyn Method>,
    arguments: TrainingArguments,
    loader: Loader,
    eval_examples: Vec<Example>,
    output: PathBuf,
    optimizer: Optimizer,
    schedule: Schedule,
    total_steps: usize,
    state: TrainerState,
    metrics: Option<MetricsFile>,
    eval_loss: Option<f64>,
}

impl<'a> Trainer<'a> {
    /// A run of `method`, already attached to `model`, that writes to the folder `output`.
    ///
    /// # Errors
    /// When memory can't be had or settings contradict each other.
    pub fn new(
        model: &'a mut Model,
        mut method: Box<dyn Method>,
        arguments: TrainingArguments,
        loader: Loader,
        eval_examples: Vec<Example>,
        output: &Path,
    ) -> Result<Self> {
        check(&arguments, &eval_examples)?;
        let total_steps = arguments.total_steps(loader.steps_per_epoch());
        method.begin(model, total_steps)?;
        let schedule = Schedule::new(
            arguments.lr_scheduler_type,
            arguments.learning_rate,
            arguments.warmup_steps,
            total_steps,
        );
        let optimizer = Optimizer::new(&model.backend, &model.params, arguments.optimizer.clone(), output)?;
        let state = TrainerState {
            global_step: 0,
            tokens: 0,
            loader: loader.state().clone(),
            settings: arguments.fingerprint(total_steps),
            best: None,
        };
        let output = output.to_path_buf();
        Ok(Trainer {
            model,
            method,
            arguments,
            loader,
            eval_examples,
            output,
            optimizer,
            schedule,
            total_steps,
            state,
            metrics: None,
            eval_loss: None,
        })
    }

    /// Steps of the whole run.
    pub fn total_steps(&self) -> usize {
        self.total_steps
    }

    /// Tokens read so far.
    pub fn tokens(&self) -> u64 {
        self.state.tokens
    }

    /// Steps done so far.
    pub fn steps_done(&self) -> usize {
        self.state.global_step
    }

    /// Goes to where the run of a checkpoint stood.
    ///
    /// # Errors
    /// When the checkpoint is malformed, or of a run with other data or settings.
    pub fn resume(&mut self, checkpoint: &Path) -> Result<()> {
        let state = checkpoint::load(checkpoint, self.model, &mut *self.method, &mut self.optimizer)?;
        if let (Some(old), Some(new)) = (state.settings.as_object(), self.state.settings.as_object()) {
            for (key, value) in new {
                if old.get(key) != Some(value) {
                    let was = old.get(key).map_or("nothing".to_string(), |v| v.to_string());
                    return Err(Error::config(
                        checkpoint.display(),
                        key,
                        format!(
                            "the checkpoint's run has {was}, this one {value}; resume with the same, or start anew from its weights with --init-adapter"
                        ),
                    ));
                }
            }
        }
        self.loader.restore(&state.loader)?;
        self.state = state;
        Ok(())
    }

    /// Trains to the end, or until `stop` is set: then a checkpoint is written and
    /// [`Error::Interrupted`] returned.
    ///
    /// # Errors
    /// When a loss or gradient is not finite, a file can't be written, or an operation fails.
    pub fn run(&mut self, stop: &AtomicBool, tell: &mut dyn FnMut(&Event)) -> Result<Report> {
        self.metrics = Some(MetricsFile::open(&self.output.join("metrics.jsonl"), self.state.global_step)?);
        let mut loss = f64::NAN;
        let mut clock = (Instant::now(), self.state.tokens);
        while self.state.global_step < self.total_steps {
            if stop.load(Ordering::Relaxed) {
                let path = self.save_checkpoint(tell)?;
                return Err(Error::Interrupted(format!(
                    "checkpoint saved to {}; go on with --resume latest",
                    path.display()
                )));
            }
            let metrics = self.step()?;
            loss = metrics.loss;
            if self.is_due(Interval::Steps(self.arguments.logging_steps)) || self.is_last() {
                let seconds = clock.0.elapsed().as_secs_f64().max(1e-9);
                let metrics = StepMetrics {
                    tokens_per_second: (self.state.tokens - clock.1) as f64 / seconds,
                    peak_memory_bytes: peak_memory_bytes(),
                    ..metrics
                };
                self.metrics.as_mut().map_or(Ok(()), |file| file.step(&metrics))?;
                tell(&Event::Step { metrics, total_steps: self.total_steps });
                clock = (Instant::now(), self.state.tokens);
            }
            let patience_is_over = self.is_due(self.arguments.eval_strategy) && self.evaluate(tell)?;
            if self.is_due(self.arguments.save_strategy) {
                self.save_checkpoint(tell)?;
            }
            // Evaluation and saving are not part of the training speed.
            clock.0 = if clock.1 == self.state.tokens { Instant::now() } else { clock.0 };
            if patience_is_over {
                tell(&Event::EarlyStop(self.arguments.early_stopping_patience.unwrap_or(0)));
                break;
            }
        }
        self.load_best()?;
        self.method.save(self.model, &self.output)?;
        let best = self.state.best.clone();
        Ok(Report { steps: self.state.global_step, loss, eval_loss: self.eval_loss, best })
    }

    /// One optimizer step.
    fn step(&mut self) -> Result<StepMetrics> {
        let step = self.state.global_step;
        let batches = self.loader.next_step();
        let counted: usize = batches.iter().map(|b| self.model.counted(b)).sum();
        self.model.params.zero_grads()?;
        let scale = 1.0 / counted.max(1) as f32;
        let (mut sum, mut first_row) = (0.0f64, 0);
        for batch in &batches {
            let dropout = Dropout { seed: self.arguments.seed, step: step as u64, first_row };
            let losses = self.model.train_step(batch, scale, Some(dropout))?;
            let losses = self.model.backend.to_vec::<f32>(&losses)?;
            sum = losses.iter().fold(sum, |sum, loss| sum + f64::from(*loss));
            first_row += batch.tokens();
        }
        let loss = sum / counted.max(1) as f64 + self.method.regularize(self.model)?;
        let grad_norm = match self.model.params.grads() {
            Some(grads) => self.model.backend.sum_squares(grads)?.sqrt(),
            None => 0.0,
        };
        for (what, value) in [("loss", loss), ("gradient norm", grad_norm)] {
            if !value.is_finite() {
                return Err(Error::NotFinite { step: step + 1, what, advice: self.advice() });
            }
        }
        let learning_rate = self.schedule.learning_rate(step);
        let grad_scale = clip_scale(grad_norm, self.arguments.max_grad_norm);
        let backend = self.model.backend.clone();
        self.optimizer.step(&backend, &mut self.model.params, learning_rate, grad_scale)?;
        self.method.after_step(self.model, step, grad_scale)?;
        self.state.global_step += 1;
        self.state.tokens += first_row as u64;
        self.state.loader = self.loader.state().clone();
        Ok(StepMetrics {
            step: step + 1,
            epoch: self.loader.epoch(),
            loss,
            grad_norm,
            learning_rate,
            tokens: self.state.tokens,
            tokens_per_second: 0.0,
            peak_memory_bytes: 0,
        })
    }

    fn advice(&self) -> String {
        let checkpoint = match checkpoint::latest_checkpoint(&self.output) {
            Some(path) => format!("the last good checkpoint is {}", path.display()),
            None => "there is no checkpoint yet".to_string(),
        };
        format!("{checkpoint}; try a smaller --learning-rate or --max-grad-norm, or look at the data")
    }

    fn is_last(&self) -> bool {
        self.state.global_step == self.total_steps
    }

    fn is_due(&self, interval: Interval) -> bool {
        match interval {
            Interval::No => false,
            Interval::Steps(n) => self.state.global_step.is_multiple_of(n.max(1)),
            Interval::Epoch => self.loader.at_epoch_end() || self.is_last(),
        }
    }

    /// Evaluates and remembers the best; tells whether patience is over.
    fn evaluate(&mut self, tell: &mut dyn FnMut(&Event)) -> Result<bool> {
        let (eval_loss, _) =
            evaluate(self.model, &self.eval_examples, self.arguments.per_device_eval_batch_size)?;
        let metrics = EvalMetrics { step: self.state.global_step, epoch: self.loader.epoch(), eval_loss };
        self.metrics.as_mut().map_or(Ok(()), |file| file.evaluation(&metrics))?;
        tell(&Event::Evaluation(metrics));
        self.eval_loss = Some(eval_loss);
        let better = self.state.best.as_ref().is_none_or(|best| eval_loss < best.eval_loss);
        if better {
            self.state.best = Some(Best { eval_loss, step: self.state.global_step, evaluations_since: 0 });
        } else if let Some(best) = &mut self.state.best {
            best.evaluations_since += 1;
        }
        let since = self.state.best.as_ref().map_or(0, |best| best.evaluations_since);
        Ok(self.arguments.early_stopping_patience.is_some_and(|patience| since >= patience))
    }

    fn save_checkpoint(&self, tell: &mut dyn FnMut(&Event)) -> Result<PathBuf> {
        let path = checkpoint::save(&self.output, self.model, &*self.method, &self.optimizer, &self.state)?;
        let best = self.state.best.as_ref().map(|best| best.step);
        checkpoint::prune(&self.output, self.arguments.save_total_limit, best)?;
        tell(&Event::Checkpoint(path.clone()));
        Ok(path)
    }

    /// Takes the parameters of the best checkpoint, if asked to.
    fn load_best(&mut self) -> Result<()> {
        let Some(best) = self.state.best.as_ref().filter(|_| self.arguments.load_best_model_at_end) else {
            return Ok(());
        };
        let dir = checkpoint::checkpoint_dir(&self.output, best.step);
        self.method.load_state(self.model, &dir)
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

fn check(arguments: &TrainingArguments, eval_examples: &[Example]) -> Result<()> {
    let bad = |key: &str, message: String| Err(Error::config("training", key, message));
    if !(arguments.learning_rate.is_finite() && arguments.learning_rate >= 0.0) {
        return bad(
            "learning_rate",
            format!("expected a number of at least 0, found {}", arguments.learning_rate),
        );
    }
    if arguments.warmup_steps.is_nan() || arguments.warmup_steps < 0.0 {
        return bad(
            "warmup_steps",
            format!("expected steps or a share below 1, found {}", arguments.warmup_steps),
        );
    }
    if arguments.max_steps.is_none()
        && !(arguments.num_train_epochs.is_finite() && arguments.num_train_epochs > 0.0)
    {
        return bad(
            "num_train_epochs",
            format!("expected a positive number, found {}", arguments.num_train_epochs),
        );
    }
    if arguments.eval_strategy != Interval::No && eval_examples.is_empty() {
        return bad("eval_strategy", "needs evaluation data (--eval-data)".into());
    }
    if arguments.early_stopping_patience.is_some() && arguments.eval_strategy == Interval::No {
        return bad("early_stopping_patience", "needs an eval_strategy other than no".into());
    }
    if arguments.load_best_model_at_end
        && (arguments.save_strategy == Interval::No || arguments.save_strategy != arguments.eval_strategy)
    {
        return bad(
            "load_best_model_at_end",
            "needs equal eval_strategy and save_strategy other than no".into(),
        );
    }
    Ok(())
}
