//! The memory of several adapters' run at once before it starts, as [`super::plan`] finds out one's.

use super::plan::{MemoryPlan, PROCESS_BYTES, PlanArguments, batch, fit_within, planned_model};
use crate::adapter::Method;
use crate::autograd::{Dropout, Slot};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::model::{Batch, Installed, LoadOptions, Model};
use std::path::Path;

/// Plans runs of several adapters over one model, as [`super::ManyTrainer`] makes them.
#[derive(Debug)]
pub struct ManyPlanner {
    model: Model,
    runs: Vec<PlannedRun>,
}

/// An adapter, and what it takes.
#[derive(Debug)]
struct PlannedRun {
    name: String,
    _method: Box<dyn Method>, // holds its state
    adapter: Installed,
    /// Bytes that the method keeps from step to step.
    state: usize,
    /// The most that was there at once until it was on the model, optimizer states aside.
    loading: usize,
}

impl ManyPlanner {
    /// The model of a folder (or GGUF file), of which only `config.json` is read. `dummy` weights are made and not read.
    ///
    /// # Errors
    /// When the configuration does not load, or the backend can't plan.
    pub fn new(model_dir: &Path, backend: &Backend, options: LoadOptions, dummy: bool) -> Result<Self> {
        Ok(ManyPlanner { model: planned_model(model_dir, backend, options, dummy)?, runs: Vec::new() })
    }

    /// Adds a job with what `attach` puts on the model.
    ///
    /// # Errors
    /// When attaching fails.
    pub fn add(
        &mut self,
        name: &str,
        attach: impl FnOnce(&mut Model) -> Result<Box<dyn Method>>,
    ) -> Result<()> {
        let arena = self.model.backend.clone();
        let arena = arena.arena();
        let base = self.model.installed()?;
        let (mut loading, mut state) = (0, 0);
        let method = attach(&mut self.model).and_then(|mut method| {
            loading = arena.peak_bytes();
            let before = arena.live_bytes();
            method.begin(&mut self.model, usize::MAX)?;
            state = arena.live_bytes() - before;
            Ok(method)
        });
        let adapter = self.model.exchange(base);
        self.runs.push(PlannedRun { name: name.to_string(), _method: method?, adapter, state, loading });
        Ok(())
    }

    /// The plan of a run, with the settings of each job in order; they have one gradient checkpointing.
    ///
    /// # Errors
    /// When there is not one for each job, adapters can't be side by side, or the model refuses the batch.
    pub fn plan(&mut self, jobs: &[PlanArguments]) -> Result<MemoryPlan> {
        let [first, ..] = jobs else {
            return Err(Error::config("jobs", "jobs", "expected at least one, found none"));
        };
        if jobs.len() != self.runs.len() {
            let message = format!("expected settings of {}, found {}", self.runs.len(), jobs.len());
            return Err(Error::config("jobs", "jobs", message));
        }
        let named: Vec<_> = self.runs.iter().map(|run| (run.name.as_str(), &run.adapter)).collect();
        let mut all = self.model.side_by_side(&named)?;
        let backend = self.model.backend.clone();
        let arena = backend.arena();
        let gradients = |run: &PlannedRun| run.adapter.params().grads_bytes();
        let held = arena.live_bytes() - self.runs.iter().map(gradients).sum::<usize>();
        for run in &mut self.runs {
            run.adapter.params_mut().zero_grads()?;
        }
        let before = arena.live_bytes();
        arena.reset_peak();
        self.model.gradient_checkpointing = first.gradient_checkpointing;
        self.model.swap(&mut all);
        let passed = self.pass(jobs);
        self.model.swap(&mut all);
        passed?;
        for (run, job) in self.runs.iter_mut().zip(jobs) {
            if let Some(rows) = job.eval_rows {
                self.model.swap(&mut run.adapter);
                let evaluated = self.model.evaluate(&batch(rows, job.length));
                self.model.swap(&mut run.adapter);
                evaluated?;
            }
        }
        let sum = |bytes: &dyn Fn(&PlannedRun) -> usize| self.runs.iter().map(bytes).sum::<usize>();
        let trainables = sum(&|run| run.adapter.params().bytes());
        let state = sum(&|run| run.state);
        // Earlier jobs' optimizers are there while later jobs load.
        let (mut optimizer, mut paged, mut loading) = (0, 0, 0);
        for (run, job) in self.runs.iter().zip(jobs) {
            loading = loading.max(run.loading + optimizer);
            let elements = run.adapter.params().flat_elements();
            let (in_memory, in_file) = job.optimizer.state_bytes(elements);
            (optimizer, paged) = (optimizer + in_memory, paged + in_file);
        }
        Ok(MemoryPlan {
            base: held - trainables - state,
            trainables,
            gradients: before - held,
            optimizer: optimizer + state,
            activations: arena.peak_bytes() - before,
            scratch: backend.scratch_bytes(),
            process: PROCESS_BYTES,
            loading,
            paged,
        })
    }

    /// One pass over a micro-batch of every job.
    fn pass(&self, jobs: &[PlanArguments]) -> Result<()> {
        let (mut all, mut slots) = (Batch::new(), Vec::with_capacity(jobs.len()));
        for (run, job) in self.runs.iter().zip(jobs) {
            let start = all.tokens();
            all.append(&batch(job.rows, job.length));
            slots.push(Slot {
                rows: start..all.tokens(),
                params: run.adapter.params(),
                dropout: Some(Dropout { seed: 0, step: 0, first_row: 0 }),
                grad_scale: 1.0,
            });
        }
        self.model.train_step_slots(&all, &slots).map(|_| ())
    }

    /// The first plan that fits into `limit` bytes, in the order of [`super::Planner::fit`]: all jobs' micro-batches get
    /// smaller together, the largest first.
    ///
    /// # Errors
    /// When nothing fits; the message names the smallest plan and the longest sequences that would.
    pub fn fit(
        &mut self,
        wanted: &[PlanArguments],
        limit: usize,
    ) -> Result<(Vec<PlanArguments>, MemoryPlan)> {
        fit_within(wanted, limit, |jobs| self.plan(jobs))
    }
}
