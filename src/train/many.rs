//! Several adapters that train at once over one frozen base: one pass over the rows of all, each with the bits that it
//! would have had alone.
//!
//! A row's numbers depend on that row alone, so what a job sees does not depend on which others run. Jobs go each at its
//! own pace: every pass takes the next micro-batch of each, and whoever has a step's last one makes its optimizer step.

use super::arguments::TrainingArguments;
use super::job::{Job, MicroBatch};
use super::trainer::{Event, Report};
use crate::adapter::Method;
use crate::autograd::Slot;
use crate::data::Example;
use crate::data::loader::Loader;
use crate::error::{Error, Result};
use crate::model::{Batch, Installed, Model};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// A training run of several adapters.
#[derive(Debug)]
pub struct ManyTrainer<'a> {
    model: &'a mut Model,
    runs: Vec<Run>,
}

/// A job with its adapter, which is on the model only while the job looks at it.
#[derive(Debug)]
struct Run {
    name: String,
    job: Job,
    adapter: Installed,
    outcome: Option<Result<Report>>,
}

impl Run {
    /// Lets the job work on the model with its adapter on it.
    fn on<T>(&mut self, model: &mut Model, work: impl FnOnce(&mut Job, &mut Model) -> T) -> T {
        model.swap(&mut self.adapter);
        let result = work(&mut self.job, model);
        model.swap(&mut self.adapter);
        result
    }

    /// Ends with an error, if it is one.
    fn note<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.outcome = Some(Err(error))).ok()
    }
}

impl<'a> ManyTrainer<'a> {
    /// A run without jobs yet, on a base model.
    pub fn new(base: &'a mut Model) -> Self {
        ManyTrainer { model: base, runs: Vec::new() }
    }

    /// Adds a job under a name of its own: what `attach` puts on the model, trained on the loader's data, with what it
    /// writes in a folder of its own.
    ///
    /// # Errors
    /// When name or folder are another job's, settings contradict each other, or the method can't be beside others
    /// ([`Model::side_by_side`]). The run is then as before.
    pub fn add(
        &mut self,
        name: &str,
        arguments: TrainingArguments,
        loader: Loader,
        eval_examples: Vec<Example>,
        output: &Path,
        attach: impl FnOnce(&mut Model) -> Result<Box<dyn Method>>,
    ) -> Result<()> {
        if let Some(other) = self.runs.iter().find(|run| run.name == name || run.job.output == output) {
            return Err(Error::config(
                "jobs",
                name,
                format!("has the name or the output folder of `{}`; each job needs its own", other.name),
            ));
        }
        let base = self.model.installed()?;
        let job = attach(self.model).and_then(|method| {
            check_method(name, &*method)?;
            Job::new(self.model, method, arguments, loader, eval_examples, output)
        });
        let adapter = self.model.exchange(base);
        let job = job?;
        self.model.side_by_side(&[(name, &adapter)])?;
        self.runs.push(Run { name: name.to_string(), job, adapter, outcome: None });
        Ok(())
    }

    /// Names of the jobs, in the order in which they were added.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.runs.iter().map(|run| run.name.as_str())
    }

    /// Steps that each job has done, and steps of its whole run.
    pub fn steps(&self) -> Vec<(usize, usize)> {
        self.runs.iter().map(|run| (run.job.state.global_step, run.job.total_steps)).collect()
    }

    /// Tokens read so far, by all jobs.
    pub fn tokens(&self) -> u64 {
        self.runs.iter().map(|run| run.job.state.tokens).sum()
    }

    /// Trained elements of all adapters.
    pub fn trainable_elements(&self) -> usize {
        self.runs.iter().map(|run| run.adapter.params().elements()).sum()
    }

    /// Goes to where the run of a checkpoint of the job `name` stood: its own, of a run with or without others.
    ///
    /// # Errors
    /// When there is no such job, or the checkpoint is malformed or of a run with other data or settings.
    pub fn resume(&mut self, name: &str, checkpoint: &Path) -> Result<()> {
        let Some(run) = self.runs.iter_mut().find(|run| run.name == name) else {
            let known: Vec<&str> = self.runs.iter().map(|run| run.name.as_str()).collect();
            return Err(Error::config("jobs", name, format!("is no job; there are {}", known.join(", "))));
        };
        run.on(self.model, |job, model| job.resume(model, checkpoint))
    }

    /// Trains all jobs to their ends, or until `stop` is set: then checkpoints of all that are not over are written and
    /// [`Error::Interrupted`] returned. Gives each job's report; one that fails, as by a loss that is not finite, does
    /// not touch the others. `tell` hears of each job by its number.
    ///
    /// # Errors
    /// When there is no job, or an operation fails.
    pub fn run(
        &mut self,
        stop: &AtomicBool,
        tell: &mut dyn FnMut(usize, &Event),
    ) -> Result<Vec<Result<Report>>> {
        if self.runs.is_empty() {
            return Err(Error::config("jobs", "jobs", "expected at least one, found none"));
        }
        let adapters: Vec<_> = self.runs.iter().map(|run| (run.name.as_str(), &run.adapter)).collect();
        let mut all = self.model.side_by_side(&adapters)?;
        for run in &mut self.runs {
            let begun = run.job.begin();
            run.note(begun);
        }
        loop {
            self.finish_those_over();
            if self.runs.iter().all(|run| run.outcome.is_some()) {
                break;
            }
            if stop.load(Ordering::Relaxed) {
                return Err(self.interrupt(tell));
            }
            self.pass(&mut all, tell)?;
        }
        Ok(self.runs.iter_mut().filter_map(|run| run.outcome.take()).collect())
    }

    /// One pass over the next micro-batch of every job that is not over.
    fn pass(&mut self, all: &mut Installed, tell: &mut dyn FnMut(usize, &Event)) -> Result<()> {
        let mut batch = Batch::new();
        let mut parts: Vec<(Range<usize>, Option<MicroBatch>)> = Vec::with_capacity(self.runs.len());
        for run in &mut self.runs {
            let start = batch.tokens();
            let micro = match run.outcome {
                Some(_) => None,
                None => Some(run.on(self.model, Job::next_micro_batch)?),
            };
            if let Some(micro) = &micro {
                batch.append(&micro.batch);
            }
            parts.push((start..batch.tokens(), micro));
        }
        let slots = self.runs.iter().zip(&parts).map(|(run, (rows, micro))| Slot {
            rows: rows.clone(),
            params: run.adapter.params(),
            dropout: micro.as_ref().map(|micro| micro.dropout),
            grad_scale: micro.as_ref().map_or(0.0, |micro| micro.grad_scale),
        });
        let slots: Vec<Slot<'_>> = slots.collect();
        self.model.swap(all);
        let losses = self.model.train_step_slots(&batch, &slots);
        self.model.swap(all);
        let losses = losses?;
        let mut start = 0;
        for (number, (run, (_, micro))) in self.runs.iter_mut().zip(parts).enumerate() {
            let Some(micro) = micro else { continue };
            let end = start + micro.batch.counted();
            let own = losses.slice(start..end)?;
            start = end;
            let tell = &mut |event: &Event| tell(number, event);
            let taken = run.on(self.model, |job, model| job.take_losses(model, own, tell));
            run.note(taken);
        }
        Ok(())
    }

    fn finish_those_over(&mut self) {
        for run in self.runs.iter_mut().filter(|run| run.outcome.is_none() && run.job.is_over()) {
            let report = run.on(self.model, |job, model| job.finish(model));
            run.outcome = Some(report);
        }
    }

    /// Saves all that are not over.
    fn interrupt(&mut self, tell: &mut dyn FnMut(usize, &Event)) -> Error {
        for (number, run) in self.runs.iter_mut().enumerate().filter(|(_, run)| run.outcome.is_none()) {
            let tell = &mut |event: &Event| tell(number, event);
            if let Err(error) = run.on(self.model, |job, model| job.save_checkpoint(model, tell)) {
                return error;
            }
        }
        Error::Interrupted("checkpoints of the unfinished jobs are saved; go on with --resume latest".into())
    }
}

/// A base that is trained whole is nothing to share.
fn check_method(name: &str, method: &dyn Method) -> Result<()> {
    match method.name() {
        "full" => Err(Error::config(
            "jobs",
            name,
            "full fine-tuning trains every weight of the base, so there is nothing to share; use `finetune train`",
        )),
        _ => Ok(()),
    }
}
