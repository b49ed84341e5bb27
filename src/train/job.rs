//! A job: one method's run over its data, and where it stands. The model is handed in with the method on it, so that
//! several jobs can share one.

use super::arguments::{Interval, TrainingArguments};
use super::checkpoint::{self, Best, TrainerState};
use super::metrics::{EvalMetrics, MetricsFile, StepMetrics, peak_memory_bytes};
use super::trainer::{Event, Report, evaluate};
use crate::adapter::Method;
use crate::autograd::Dropout;
use crate::data::Example;
use crate::data::loader::Loader;
use crate::error::{Error, Result};
use crate::model::{Batch, Model};
use crate::optim::{Optimizer, Schedule, clip_scale};
use crate::tensor::Tensor;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// A run of one method.
#[derive(Debug)]
pub(super) struct Job {
    pub method: Box<dyn Method>,
    arguments: TrainingArguments,
    loader: Loader,
    eval_examples: Vec<Example>,
    pub output: PathBuf,
    optimizer: Optimizer,
    schedule: Schedule,
    pub total_steps: usize,
    pub state: TrainerState,
    metrics: Option<MetricsFile>,
    step: Option<StepInHand>,
    stopped_early: bool,
    /// On steps that nobody looked at, where the backend judges them, and whether there are such.
    verdict: Option<Tensor>,
    has_unread: bool,
    loss: f64,
    eval_loss: Option<f64>,
    clock: (Instant, u64), // when the last step was logged, and the tokens then
}

/// An optimizer step that has begun.
#[derive(Debug)]
struct StepInHand {
    left: VecDeque<Batch>,
    counted: usize,
    /// Of the micro-batches so far.
    losses: Vec<Tensor>,
    /// Tokens so far.
    tokens: usize,
}

/// A micro-batch, and what its pass needs.
#[derive(Debug)]
pub(super) struct MicroBatch {
    pub batch: Batch,
    pub grad_scale: f32,
    pub dropout: Dropout,
}

impl Job {
    /// A run of `method`, which is on `model` now.
    ///
    /// # Errors
    /// When memory can't be had or settings contradict each other.
    pub fn new(
        model: &mut Model,
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
        let optimizer = Optimizer::new(&model.backend, &model.params, arguments.optimizer.clone(), output)?
            .with_peak(arguments.learning_rate);
        let state = TrainerState {
            global_step: 0,
            tokens: 0,
            loader: loader.state().clone(),
            settings: arguments.fingerprint(total_steps),
            best: None,
        };
        Ok(Job {
            method,
            arguments,
            loader,
            eval_examples,
            output: output.to_path_buf(),
            optimizer,
            schedule,
            total_steps,
            state,
            metrics: None,
            step: None,
            stopped_early: false,
            verdict: model.backend.verdict()?,
            has_unread: false,
            loss: f64::NAN,
            eval_loss: None,
            clock: (Instant::now(), 0),
        })
    }

    /// Goes to where the run of a checkpoint stood.
    ///
    /// # Errors
    /// When the checkpoint is malformed, or of a run with other data or settings.
    pub fn resume(&mut self, model: &mut Model, checkpoint: &Path) -> Result<()> {
        let state = checkpoint::load(checkpoint, model, &mut *self.method, &mut self.optimizer)?;
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

    /// Opens the record of the run.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn begin(&mut self) -> Result<()> {
        self.metrics = Some(MetricsFile::open(&self.output.join("metrics.jsonl"), self.state.global_step)?);
        self.clock = (Instant::now(), self.state.tokens);
        Ok(())
    }

    /// Whether all steps are done, or patience is over.
    pub fn is_over(&self) -> bool {
        self.step.is_none() && (self.stopped_early || self.state.global_step >= self.total_steps)
    }

    /// The next micro-batch; begins an optimizer step where none has begun.
    ///
    /// # Errors
    /// When memory for gradients can't be had.
    pub fn next_micro_batch(&mut self, model: &mut Model) -> Result<MicroBatch> {
        if self.step.is_none() {
            let left: VecDeque<Batch> = self.loader.next_step().into();
            let counted = left.iter().map(|batch| model.counted(batch)).sum();
            model.params.zero_grads()?;
            self.step = Some(StepInHand { left, counted, losses: Vec::new(), tokens: 0 });
        }
        let in_hand = self.step.as_mut().and_then(|step| Some((step.left.pop_front()?, step)));
        let (batch, step) = in_hand.expect("a step in hand has micro-batches left");
        let dropout = Dropout {
            seed: self.arguments.seed,
            step: self.state.global_step as u64,
            first_row: step.tokens,
        };
        step.tokens += batch.tokens();
        Ok(MicroBatch { batch, grad_scale: 1.0 / step.counted.max(1) as f32, dropout })
    }

    /// Takes the losses of the micro-batch whose gradients are the model's now. After the last one of a step: the
    /// optimizer's step, and whatever is due after it.
    ///
    /// # Errors
    /// When a loss or gradient is not finite, or a file can't be written.
    pub fn take_losses(
        &mut self,
        model: &mut Model,
        losses: Tensor,
        tell: &mut dyn FnMut(&Event),
    ) -> Result<()> {
        if let Some(step) = &mut self.step {
            step.losses.push(losses);
        }
        match self.step.take_if(|step| step.left.is_empty()) {
            Some(step) => {
                let metrics = self.optimize(model, &step)?;
                self.after_step(model, metrics, tell)
            }
            None => Ok(()),
        }
    }

    /// The optimizer's step; gives its numbers if somebody looks at them. Else the backend may decide by itself whether
    /// the step is made, and who looks at the next one is told.
    fn optimize(&mut self, model: &mut Model, in_hand: &StepInHand) -> Result<Option<StepMetrics>> {
        let is_read = self.method.follows_steps() || self.is_read(1);
        let metrics = match self.verdict.clone().filter(|_| !is_read) {
            None => Some(self.optimize_read(model, in_hand)?),
            Some(verdict) => {
                self.optimize_unread(model, in_hand, verdict)?;
                None
            }
        };
        self.state.global_step += 1;
        self.state.tokens += in_hand.tokens as u64;
        self.state.loader = self.loader.state().clone();
        Ok(metrics)
    }

    fn optimize_unread(
        &mut self,
        model: &mut Model,
        in_hand: &StepInHand,
        mut verdict: Tensor,
    ) -> Result<()> {
        let (step, backend) = (self.state.global_step, model.backend.clone());
        let max_grad_norm = self.arguments.max_grad_norm;
        backend.judge(&mut verdict, step + 1, model.params.grads()?, &in_hand.losses, max_grad_norm)?;
        self.has_unread = true;
        let learning_rate = self.schedule.learning_rate(step);
        self.optimizer.step_judged(&backend, &mut model.params, learning_rate, &verdict)
    }

    fn optimize_read(&mut self, model: &mut Model, in_hand: &StepInHand) -> Result<StepMetrics> {
        let step = self.state.global_step;
        let regularization = self.method.regularize(model)?;
        let (mut read, unread) = (in_hand.losses.clone(), self.verdict.clone().filter(|_| self.has_unread));
        let n_losses: usize = read.iter().map(Tensor::elements).sum();
        read.extend(unread);
        let (squares, mut losses) = model.backend.step_report(model.params.grads()?, &read)?;
        self.look_at(&losses.split_off(n_losses))?;
        let sum = losses.into_iter().fold(0.0, |sum, loss| sum + f64::from(loss));
        let (loss, grad_norm) = (sum / in_hand.counted.max(1) as f64 + regularization, squares.sqrt());
        for (what, value) in [("loss", loss), ("gradient norm", grad_norm)] {
            if !value.is_finite() {
                return Err(self.not_finite(step + 1, what));
            }
        }
        let learning_rate = self.schedule.learning_rate(step);
        let grad_scale = clip_scale(grad_norm, self.arguments.max_grad_norm);
        let backend = model.backend.clone();
        self.optimizer.step(&backend, &mut model.params, learning_rate, grad_scale)?;
        self.method.after_step(model, step, grad_scale)?;
        self.loss = loss;
        Ok(StepMetrics {
            step: step + 1,
            epoch: self.loader.epoch(),
            loss,
            grad_norm,
            learning_rate,
            tokens: self.state.tokens + in_hand.tokens as u64,
            tokens_per_second: 0.0,
            peak_memory_bytes: 0,
        })
    }

    /// Fails with the first step that was not finite, by the verdict on those that nobody looked at, if there are any.
    fn look_at(&mut self, verdict: &[f32]) -> Result<()> {
        self.has_unread = false;
        match *verdict {
            [step, of_losses, _] if step > 0.0 => {
                let what = if of_losses > 0.0 { "loss" } else { "gradient norm" };
                Err(self.not_finite(step as usize, what))
            }
            _ => Ok(()),
        }
    }

    fn not_finite(&self, step: usize, what: &'static str) -> Error {
        Error::NotFinite { step, what, advice: self.advice() }
    }

    /// Logs, evaluates and saves where that is due.
    fn after_step(
        &mut self,
        model: &mut Model,
        metrics: Option<StepMetrics>,
        tell: &mut dyn FnMut(&Event),
    ) -> Result<()> {
        if let Some(metrics) = metrics.filter(|_| self.is_logged(0)) {
            let seconds = self.clock.0.elapsed().as_secs_f64().max(1e-9);
            let metrics = StepMetrics {
                tokens_per_second: (self.state.tokens - self.clock.1) as f64 / seconds,
                peak_memory_bytes: peak_memory_bytes(),
                ..metrics
            };
            self.metrics.as_mut().map_or(Ok(()), |file| file.step(&metrics))?;
            tell(&Event::Step { metrics, total_steps: self.total_steps });
            self.clock = (Instant::now(), self.state.tokens);
        }
        let patience_is_over = self.is_due(self.arguments.eval_strategy, 0) && self.evaluate(model, tell)?;
        if self.is_due(self.arguments.save_strategy, 0) {
            self.save_checkpoint(model, tell)?;
        }
        // Evaluation and saving are not part of the training speed.
        if self.clock.1 == self.state.tokens {
            self.clock.0 = Instant::now();
        }
        if patience_is_over {
            tell(&Event::EarlyStop(self.arguments.early_stopping_patience.unwrap_or(0)));
            self.stopped_early = true;
        }
        Ok(())
    }

    /// Writes what was trained.
    ///
    /// # Errors
    /// When a file can't be read or written.
    pub fn finish(&mut self, model: &mut Model) -> Result<Report> {
        self.load_best(model)?;
        self.method.save(model, &self.output)?;
        let best = self.state.best.clone();
        Ok(Report { steps: self.state.global_step, loss: self.loss, eval_loss: self.eval_loss, best })
    }

    fn advice(&self) -> String {
        let checkpoint = match checkpoint::latest_checkpoint(&self.output) {
            Some(path) => format!("the last good checkpoint is {}", path.display()),
            None => "there is no checkpoint yet".to_string(),
        };
        format!("{checkpoint}; try a smaller --learning-rate or --max-grad-norm, or look at the data")
    }

    /// Whether something is due after so many more steps of those that the loader has given.
    fn is_due(&self, interval: Interval, more: usize) -> bool {
        let step = self.state.global_step + more;
        match interval {
            Interval::No => false,
            Interval::Steps(n) => step.is_multiple_of(n.max(1)),
            Interval::Epoch => self.loader.at_epoch_end() || step == self.total_steps,
        }
    }

    fn is_logged(&self, more: usize) -> bool {
        let is_last = self.state.global_step + more == self.total_steps;
        is_last || self.is_due(Interval::Steps(self.arguments.logging_steps), more)
    }

    /// Whether somebody looks at what comes of the step.
    fn is_read(&self, more: usize) -> bool {
        let TrainingArguments { eval_strategy, save_strategy, .. } = self.arguments;
        self.is_logged(more) || self.is_due(eval_strategy, more) || self.is_due(save_strategy, more)
    }

    /// Evaluates and remembers the best; tells whether patience is over.
    fn evaluate(&mut self, model: &Model, tell: &mut dyn FnMut(&Event)) -> Result<bool> {
        let (eval_loss, _) = evaluate(model, &self.eval_examples, self.arguments.per_device_eval_batch_size)?;
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

    /// Writes a checkpoint of the last whole step.
    ///
    /// # Errors
    /// When a step was not finite, or a file can't be written.
    pub fn save_checkpoint(&mut self, model: &Model, tell: &mut dyn FnMut(&Event)) -> Result<PathBuf> {
        if let Some(verdict) = self.verdict.clone().filter(|_| self.has_unread) {
            self.look_at(&model.backend.to_vec(&verdict)?)?;
        }
        let path = checkpoint::save(&self.output, model, &*self.method, &self.optimizer, &self.state)?;
        let best = self.state.best.as_ref().map(|best| best.step);
        checkpoint::prune(&self.output, self.arguments.save_total_limit, best)?;
        tell(&Event::Checkpoint(path.clone()));
        Ok(path)
    }

    /// Takes the parameters of the best checkpoint, if asked to.
    fn load_best(&mut self, model: &mut Model) -> Result<()> {
        let Some(best) = self.state.best.as_ref().filter(|_| self.arguments.load_best_model_at_end) else {
            return Ok(());
        };
        let dir = checkpoint::checkpoint_dir(&self.output, best.step);
        self.method.load_state(model, &dir)
    }
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
