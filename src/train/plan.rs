//! The memory of a run before it starts: the model is loaded, attached to and trained for a step on a backend that
//! only counts, so that a plan follows every path that a run takes.

use crate::adapter::Method;
use crate::autograd::Dropout;
use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::fs::read_text;
use crate::model::gguf::{Gguf, is_gguf};
use crate::model::{Batch, LoadOptions, Model, ModelConfig, StoredWeights};
use crate::optim::OptimizerArguments;
use crate::quant::{Format, QuantConfig};
use serde_json::{Value, json};
use std::path::Path;

/// What the process holds beside tensors: code, threads, the allocator's own.
pub(super) const PROCESS_BYTES: usize = 24 << 20;

/// The settings that memory follows from, beside the model and the method.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanArguments {
    /// Sequences of a micro-batch.
    pub rows: usize,
    /// Tokens of the longest sequence.
    pub length: usize,
    /// Layers per checkpoint; 0: none.
    pub gradient_checkpointing: usize,
    /// The optimizer and its budget.
    pub optimizer: OptimizerArguments,
    /// Sequences of an evaluation batch, if there are evaluations.
    pub eval_rows: Option<usize>,
}

/// Bytes of a run by part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The frozen model.
    pub base: usize,
    /// Trained parameters, and their copy in the compute type.
    pub trainables: usize,
    /// Their gradients.
    pub gradients: usize,
    /// The optimizer's state in memory, and what the method keeps from step to step.
    pub optimizer: usize,
    /// The most that a step's tensors take at once.
    pub activations: usize,
    /// Working memory of the threads.
    pub scratch: usize,
    /// What the process itself takes.
    pub process: usize,
    /// The most that loading takes at once, the process aside.
    pub loading: usize,
    /// The optimizer's state in a file; not part of the total.
    pub paged: usize,
}

impl MemoryPlan {
    /// The parts of a step by name, in order.
    pub fn parts(&self) -> [(&'static str, usize); 7] {
        [
            ("base", self.base),
            ("trainables", self.trainables),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("scratch", self.scratch),
            ("process", self.process),
        ]
    }

    /// The peak: of a step, or of loading if that is more.
    pub fn total(&self) -> usize {
        let step: usize = self.parts().iter().map(|(_, bytes)| bytes).sum();
        step.max(self.loading + self.process)
    }

    /// The plan as JSON, in bytes.
    pub fn to_json(&self) -> Value {
        let mut all: serde_json::Map<_, _> =
            self.parts().iter().map(|(name, bytes)| (name.to_string(), json!(bytes))).collect();
        all.insert("loading".into(), json!(self.loading));
        all.insert("paged".into(), json!(self.paged));
        all.insert("total".into(), json!(self.total()));
        Value::Object(all)
    }
}

/// The bytes that the frozen model of a folder (or GGUF file) takes on a backend.
///
/// # Errors
/// When the configuration does not load or the backend can't plan.
pub fn base_bytes(model_dir: &Path, backend: &Backend, options: LoadOptions, dummy: bool) -> Result<usize> {
    Ok(planned_model(model_dir, backend, options, dummy)?.backend.arena().live_bytes())
}

/// A model without content on the backend's planner.
pub(super) fn planned_model(
    model_dir: &Path,
    backend: &Backend,
    options: LoadOptions,
    dummy: bool,
) -> Result<Model> {
    let planner = backend.planner()?;
    if is_gguf(model_dir) {
        return Model::planned_gguf(&Gguf::open(model_dir)?, &planner, options);
    }
    let config = ModelConfig::load(model_dir)?;
    let stored = match dummy {
        true => StoredWeights { dtype: None, quant: None },
        false => stored_weights(&model_dir.join("config.json"), &options)?,
    };
    Model::planned(config, &planner, options, stored)
}

/// Plans runs of one model with one method.
#[derive(Debug)]
pub struct Planner {
    model: Model,
    _method: Box<dyn Method>, // holds its state
    state: usize,
    trainables: usize,
    loading: usize,
}

impl Planner {
    /// The model of a folder (or GGUF file), of which only `config.json` is read, with what `attach` puts on it. `dummy` weights are
    /// made and not read.
    ///
    /// # Errors
    /// When the configuration does not load, the backend can't plan, or attaching fails.
    pub fn new(
        model_dir: &Path,
        backend: &Backend,
        options: LoadOptions,
        dummy: bool,
        attach: impl FnOnce(&mut Model) -> Result<Box<dyn Method>>,
    ) -> Result<Self> {
        let mut model = planned_model(model_dir, backend, options, dummy)?;
        let planner = model.backend.clone();
        let mut method = attach(&mut model)?;
        let trainables = model.params.bytes();
        let loading = planner.arena().peak_bytes();
        let before = planner.arena().live_bytes();
        method.begin(&mut model, usize::MAX)?;
        let state = planner.arena().live_bytes() - before;
        Ok(Planner { model, _method: method, state, trainables, loading })
    }

    /// The plan of a run.
    ///
    /// # Errors
    /// When the model refuses the batch.
    pub fn plan(&mut self, arguments: &PlanArguments) -> Result<MemoryPlan> {
        let backend = self.model.backend.clone();
        let arena = backend.arena();
        let held = arena.live_bytes() - self.model.params.grads_bytes();
        self.model.params.zero_grads()?;
        let before = arena.live_bytes();
        arena.reset_peak();
        self.model.gradient_checkpointing = arguments.gradient_checkpointing;
        let dropout = Dropout { seed: 0, step: 0, first_row: 0 };
        self.model.train_step(&batch(arguments.rows, arguments.length), 1.0, Some(dropout))?;
        if let Some(rows) = arguments.eval_rows {
            self.model.evaluate(&batch(rows, arguments.length))?;
        }
        let elements = self.model.params.flat_elements();
        let (optimizer, paged) = arguments.optimizer.state_bytes(elements);
        Ok(MemoryPlan {
            base: held - self.trainables - self.state,
            trainables: self.trainables,
            gradients: before - held,
            optimizer: optimizer + self.state,
            activations: arena.peak_bytes() - before,
            scratch: backend.scratch_bytes(),
            process: PROCESS_BYTES,
            loading: self.loading,
            paged,
        })
    }

    /// The first plan that fits into `limit` bytes, in the order of what it costs in speed: smaller micro-batches
    /// (divisors of the wanted ones, whose number grows), state of a paged optimizer in its file, checkpoints of a
    /// layer.
    ///
    /// # Errors
    /// When nothing fits; the message names the smallest plan and the longest sequences that would.
    pub fn fit(&mut self, wanted: &PlanArguments, limit: usize) -> Result<(PlanArguments, MemoryPlan)> {
        let (mut chosen, plan) = fit_within(std::slice::from_ref(wanted), limit, |jobs| self.plan(&jobs[0]))?;
        Ok((chosen.swap_remove(0), plan))
    }
}

/// The first plan of some jobs' that fits into `limit` bytes.
pub(super) fn fit_within(
    wanted: &[PlanArguments],
    limit: usize,
    mut plan: impl FnMut(&[PlanArguments]) -> Result<MemoryPlan>,
) -> Result<(Vec<PlanArguments>, MemoryPlan)> {
    let mut smallest: Option<(Vec<PlanArguments>, MemoryPlan)> = None;
    for candidate in candidates(wanted) {
        let planned = plan(&candidate)?;
        if planned.total() <= limit {
            return Ok((candidate, planned));
        }
        if smallest.as_ref().is_none_or(|(_, least)| planned.total() < least.total()) {
            smallest = Some((candidate, planned));
        }
    }
    let Some((least, planned)) = smallest else {
        return Err(Error::config("training", "memory_limit", "expected at least one sequence per batch"));
    };
    let most = |of: fn(&PlanArguments) -> usize| least.iter().map(of).max().unwrap_or(0);
    let longest = most(|job| job.length);
    let mut advice = "a smaller --r, --quant nf4 or a smaller model would need less".to_string();
    let mut length = longest / 2;
    while length >= 16 {
        let shorter = |job: &PlanArguments| PlanArguments { length: job.length.min(length), ..job.clone() };
        if plan(&least.iter().map(shorter).collect::<Vec<_>>())?.total() <= limit {
            advice = format!("--max-length {length} fits");
            break;
        }
        length /= 2;
    }
    let gigabytes = |bytes: usize| format!("{:.2} GB", bytes as f64 / 1e9);
    Err(Error::config(
        "training",
        "memory_limit",
        format!(
            "{} is too little: the least, with micro-batches of {}, --gradient-checkpointing={}{} and sequences of \
             {longest} tokens, takes {}; {advice}",
            gigabytes(limit),
            most(|job| job.rows),
            most(|job| job.gradient_checkpointing),
            if planned.paged > 0 { ", optimizer state in a file" } else { "" },
            gigabytes(planned.total()),
        ),
    ))
}

/// What runs may be changed to, cheapest first; the wanted settings themselves at the head. Micro-batches are divisors of
/// the wanted ones, as large as the others' allow.
fn candidates(wanted: &[PlanArguments]) -> Vec<Vec<PlanArguments>> {
    let divides = |job: &PlanArguments, rows: usize| job.rows.is_multiple_of(rows);
    let largest = wanted.iter().map(|job| job.rows).max().unwrap_or(0);
    let most: Vec<usize> =
        (1..=largest).rev().filter(|rows| wanted.iter().any(|job| divides(job, *rows))).collect();
    let mut checkpoints = vec![wanted.first().map_or(0, |job| job.gradient_checkpointing)];
    if checkpoints == [0] {
        checkpoints.push(1);
    }
    let can_page =
        |job: &PlanArguments| job.optimizer.optimizer_memory.is_none() && job.optimizer.optim.is_paged();
    let mut all = Vec::new();
    for gradient_checkpointing in checkpoints {
        for paged in [false, true] {
            if paged && !wanted.iter().any(can_page) {
                continue;
            }
            for most in &most {
                let change = |job: &PlanArguments| {
                    let rows = (1..=job.rows.min(*most)).rev().find(|rows| divides(job, *rows));
                    let mut job =
                        PlanArguments { rows: rows.unwrap_or(0), gradient_checkpointing, ..job.clone() };
                    if paged && can_page(&job) {
                        job.optimizer.optimizer_memory = Some(0);
                    }
                    job
                };
                all.push(wanted.iter().map(change).collect());
            }
        }
    }
    all
}

/// Sequences of equal length, every token of which counts.
pub(super) fn batch(rows: usize, length: usize) -> Batch {
    let mut batch = Batch::new();
    for _ in 0..rows {
        batch.push(&vec![0; length], &vec![0; length]);
    }
    batch
}

/// What config.json says of the files: the tensors' type (f32 where it is silent) and bitsandbytes' settings.
fn stored_weights(path: &Path, options: &LoadOptions) -> Result<StoredWeights> {
    let config: Value =
        serde_json::from_str(&read_text(path)?).map_err(|e| Error::format(path, format!("not JSON: {e}")))?;
    let name = config.get("dtype").or(config.get("torch_dtype")).and_then(Value::as_str).unwrap_or("float32");
    let dtype = match name.trim_start_matches("torch.") {
        "float32" => DType::F32,
        "bfloat16" => DType::BF16,
        "float16" => DType::F16,
        other => return Err(Error::config(path.display(), "dtype", format!("`{other}` is not supported"))),
    };
    let quant = match config.get("quantization_config") {
        None => None,
        Some(settings) => {
            let format = settings.get("bnb_4bit_quant_type").and_then(Value::as_str).unwrap_or("fp4");
            let double_quant = settings.get("bnb_4bit_use_double_quant").and_then(Value::as_bool);
            Some(QuantConfig {
                double_quant: double_quant.unwrap_or(false),
                ..QuantConfig::new(Format::by_name(format)?)
            })
        }
    };
    Ok(StoredWeights { dtype: Some(dtype), quant: if options.quant.is_some() { None } else { quant } })
}
