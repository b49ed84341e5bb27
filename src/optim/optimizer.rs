//! Optimizers over a [`ParamStore`], with state in pages.
//!
//! Sources: AdamW, Loshchilov, Hutter, "Decoupled weight decay regularization" (arXiv 1711.05101); its eight-bit
//! moments, Dettmers et al. (arXiv 2110.02861); paging, Dettmers et al., "QLoRA" (arXiv 2305.14314); Lion, Chen
//! et al., "Symbolic discovery of optimization algorithms" (arXiv 2302.06675).

use super::pages::{Page, StateSpec, page_bytes, pages};
use crate::backend::{Backend, Moments8bit, OptimizerStep, PAGES_AHEAD};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::Checkpoint;
use crate::model::save::StreamedTensor;
use crate::param::{ParamStore, SLICE_ALIGNMENT};
use crate::quant::dynamic_map::{MOMENTS_BLOCKSIZE, SIGNED_ZERO};
use crate::tensor::Tensor;
use std::collections::VecDeque;
use std::ops::Range;
use std::path::Path;

/// What a step does with the gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    AdamW,
    AdamW8bit,
    Lion,
    Sgd,
}

const EXP_AVG: StateSpec = StateSpec { name: "exp_avg", dtype: DType::F32, block: 1, zero: 0 };
const EXP_AVG_SQ: StateSpec = StateSpec { name: "exp_avg_sq", dtype: DType::F32, block: 1, zero: 0 };

impl Rule {
    fn name(self) -> &'static str {
        match self {
            Rule::AdamW => "adamw",
            Rule::AdamW8bit => "adamw_8bit",
            Rule::Lion => "lion",
            Rule::Sgd => "sgd",
        }
    }

    /// What is kept from step to step, in the order of [`Optimizer::apply`].
    fn state(self) -> &'static [StateSpec] {
        match self {
            Rule::AdamW => &[EXP_AVG, EXP_AVG_SQ],
            Rule::AdamW8bit => &[
                StateSpec { name: "exp_avg", dtype: DType::U8, block: 1, zero: SIGNED_ZERO },
                StateSpec { name: "exp_avg_sq", dtype: DType::U8, block: 1, zero: 0 },
                StateSpec { name: "exp_avg_absmax", dtype: DType::F32, block: MOMENTS_BLOCKSIZE, zero: 0 },
                StateSpec { name: "exp_avg_sq_absmax", dtype: DType::F32, block: MOMENTS_BLOCKSIZE, zero: 0 },
            ],
            Rule::Lion => &[EXP_AVG],
            Rule::Sgd => &[],
        }
    }
}

/// A row of the table of optimizers.
#[derive(Debug)]
struct Row {
    /// Hugging Face's name.
    name: &'static str,
    aliases: &'static [&'static str],
    rule: Rule,
    paged: bool,
}

const fn row(name: &'static str, aliases: &'static [&'static str], rule: Rule, paged: bool) -> Row {
    Row { name, aliases, rule, paged }
}

static ROWS: [Row; 7] = [
    row("adamw_torch", &["adamw", "adamw_torch_fused"], Rule::AdamW, false),
    row("paged_adamw_32bit", &["paged_adamw"], Rule::AdamW, true),
    row("adamw_8bit", &["adamw_bnb_8bit"], Rule::AdamW8bit, false),
    row("paged_adamw_8bit", &[], Rule::AdamW8bit, true),
    row("lion_32bit", &["lion"], Rule::Lion, false),
    row("paged_lion_32bit", &["paged_lion"], Rule::Lion, true),
    row("sgd", &[], Rule::Sgd, false),
];

/// An optimizer, by Hugging Face's name (`optim` of its training arguments).
#[derive(Clone, Copy, Debug)]
pub struct Optim(&'static Row);

impl Optim {
    /// Hugging Face's name.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// The name of the arithmetic: paged or not, the bits are the same.
    pub(crate) fn rule_name(self) -> &'static str {
        self.0.rule.name()
    }

    /// Bytes of state for `elements` parameters.
    pub fn state_bytes(self, elements: usize) -> usize {
        self.0.rule.state().iter().map(|spec| spec.bytes(elements)).sum()
    }

    /// Whether state over a budget can leave memory.
    pub fn is_paged(self) -> bool {
        self.0.paged
    }
}

impl PartialEq for Optim {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl std::str::FromStr for Optim {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = ROWS.iter().find(|row| row.name == name || row.aliases.contains(&name));
        found.map(Optim).ok_or_else(|| {
            let names: Vec<_> = ROWS.iter().map(|row| row.name).collect();
            Error::config("training", "optim", format!("`{name}` is not one of {}", names.join(", ")))
        })
    }
}

/// Settings of the optimizer that stay the same through a run, in Hugging Face's names.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct OptimizerArguments {
    pub optim: Optim,
    pub adam_beta1: f64,
    pub adam_beta2: f64,
    pub adam_epsilon: f64,
    /// Decoupled (but for SGD); biases and norms are spared.
    pub weight_decay: f64,
    /// The learning rate of B over that of A (LoRA+); Hayou et al. (arXiv 2402.12354).
    pub loraplus_lr_ratio: f64,
    /// The peak learning rate of adapters on embeddings under LoRA+.
    pub loraplus_lr_embedding: f64,
    /// Bytes of state that may stay in memory, of a paged optimizer; the rest is in a file. `None`: all.
    pub optimizer_memory: Option<usize>,
}

impl Default for OptimizerArguments {
    fn default() -> Self {
        OptimizerArguments {
            optim: Optim(&ROWS[0]),
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            weight_decay: 0.0,
            loraplus_lr_ratio: 1.0,
            loraplus_lr_embedding: 1e-6,
            optimizer_memory: None,
        }
    }
}

impl OptimizerArguments {
    /// Bytes of state for `elements` parameters: in memory, and in a file.
    pub fn state_bytes(&self, elements: usize) -> (usize, usize) {
        page_bytes(self.optim.0.rule.state(), elements, self.optimizer_memory)
    }
}

/// The optimizer's state, flat as the parameters, in pages; and the steps done.
#[derive(Debug)]
pub struct Optimizer {
    arguments: OptimizerArguments,
    pages: Vec<Page>,
    /// The first paged ones, on their way to where the next step takes them.
    fetched: VecDeque<Vec<Tensor>>,
    step: u64,
    peak_learning_rate: Option<f64>,
}

impl Optimizer {
    /// The state before the first step. State over the budget goes to a file in `folder` that has no name, so
    /// that nothing is left of it whatever happens.
    ///
    /// # Errors
    /// When memory can't be had, the file can't be made, or a budget is given to an optimizer without pages.
    pub fn new(
        backend: &Backend,
        params: &ParamStore,
        arguments: OptimizerArguments,
        folder: &Path,
    ) -> Result<Self> {
        if arguments.optimizer_memory.is_some() && !arguments.optim.is_paged() {
            return Err(Error::config(
                "training",
                "optimizer_memory",
                format!(
                    "needs a paged optimizer such as paged_adamw_32bit, found {}",
                    arguments.optim.name()
                ),
            ));
        }
        let specs = arguments.optim.0.rule.state();
        let pages = pages(backend, specs, params.flat_elements(), arguments.optimizer_memory, folder)?;
        Ok(Optimizer { arguments, pages, fetched: VecDeque::new(), step: 0, peak_learning_rate: None })
    }

    /// The rate of which the steps' are shares, as those of parameters with a peak of their own are then; without, each
    /// step's own is taken for it.
    pub fn with_peak(mut self, learning_rate: f64) -> Self {
        self.peak_learning_rate = Some(learning_rate).filter(|peak| *peak > 0.0);
        self
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// Bytes of state in a file, or on a GPU in pinned host memory.
    pub fn paged_bytes(&self) -> usize {
        self.paged().flat_map(|page| &page.state).map(|tensor| tensor.bytes()).sum()
    }

    /// One step with the store's gradients times `grad_scale`. If state is paged, it goes on beside what follows, and the
    /// store gives each parameter as the step leaves it.
    ///
    /// # Errors
    /// When an operation fails.
    pub fn step(
        &mut self,
        backend: &Backend,
        params: &mut ParamStore,
        learning_rate: f64,
        grad_scale: f32,
    ) -> Result<()> {
        self.step_by(backend, params, learning_rate, (grad_scale, None))
    }

    /// The same with what [`Kernels::judge`](crate::backend::Kernels::judge) found of the step: nothing changes if it, or one
    /// before it, is not finite.
    ///
    /// # Errors
    /// When an operation fails.
    pub fn step_judged(
        &mut self,
        backend: &Backend,
        params: &mut ParamStore,
        learning_rate: f64,
        verdict: &Tensor,
    ) -> Result<()> {
        self.step_by(backend, params, learning_rate, (1.0, Some(verdict)))
    }

    fn step_by(
        &mut self,
        backend: &Backend,
        params: &mut ParamStore,
        learning_rate: f64,
        (grad_scale, verdict): (f32, Option<&Tensor>),
    ) -> Result<()> {
        self.step += 1;
        let Some(grads) = params.grads()?.cloned() else { return Ok(()) };
        let values = params.values()?.clone();
        let fetched = std::mem::take(&mut self.fetched);
        let arguments = &self.arguments;
        let step = OptimizerStep {
            learning_rate,
            beta1: arguments.adam_beta1,
            beta2: arguments.adam_beta2,
            epsilon: arguments.adam_epsilon,
            weight_decay: 0.0,
            grad_scale,
            verdict: verdict.cloned(),
            bias_correction1: 1.0 - power(arguments.adam_beta1, self.step),
            bias_correction2_sqrt: (1.0 - power(arguments.adam_beta2, self.step)).sqrt(),
        };
        let share = self.peak_learning_rate.map_or(1.0, |peak| learning_rate / peak);
        let (rule, runs) = (arguments.optim.0.rule, runs(params, arguments.loraplus_lr_ratio != 1.0));
        let change = |page: &Page, here: &[Tensor]| {
            for Run { range: run, decay, pace } in &runs {
                let range = run.start.max(page.range.start)..run.end.min(page.range.end);
                if range.is_empty() {
                    continue;
                }
                let step = OptimizerStep {
                    weight_decay: if *decay { arguments.weight_decay } else { 0.0 },
                    learning_rate: match pace {
                        Pace::Base => learning_rate,
                        Pace::Fast => learning_rate * arguments.loraplus_lr_ratio,
                        Pace::Embedding => arguments.loraplus_lr_embedding * share,
                    },
                    ..step.clone()
                };
                let (mut p, g) = (values.slice(range.clone())?, grads.slice(range.clone())?);
                self.apply(backend, &mut p, &g, &mut page.slices(here, rule.state(), &range)?, &step)?;
            }
            Ok(())
        };
        if self.paged().next().is_none() {
            self.pages.iter().try_for_each(|page| change(page, &page.state))?;
            return params.refresh_compute(0..values.elements());
        }
        self.fetched = self.change_beside(backend, params, fetched, verdict, &change)?;
        Ok(())
    }

    /// Changes page by page beside the operations that follow, so that the next forward pass waits only for the pages of
    /// the parameters that it comes to. `fetched` are the first pages that are on their way; gives those that the next
    /// step begins with.
    fn change_beside(
        &self,
        backend: &Backend,
        params: &ParamStore,
        mut fetched: VecDeque<Vec<Tensor>>,
        verdict: Option<&Tensor>,
        change: &dyn Fn(&Page, &[Tensor]) -> Result<()>,
    ) -> Result<VecDeque<Vec<Tensor>>> {
        let mut ahead = self.paged().skip(fetched.len());
        for page in &self.pages {
            while page.is_paged()
                && fetched.len() < PAGES_AHEAD
                && let Some(next) = ahead.next()
            {
                fetched.push_back(backend.fetch_page(&next.state)?);
            }
            let here = match page.is_paged() {
                true => fetched.pop_front().expect("the page is among those fetched"),
                false => page.state.clone(),
            };
            let end = backend.beside(&mut || {
                backend.begin_page(&here)?;
                change(page, &here)?;
                params.refresh_compute(page.range.clone())?;
                if page.is_paged() { backend.store_page(&page.state, here.clone()) } else { Ok(()) }
            })?;
            let keeps = here.into_iter().filter(|_| !page.is_paged()).chain(verdict.cloned());
            params.changes_beside(page.range.start, end, keeps.collect());
        }
        let first = self.paged().take(PAGES_AHEAD);
        first.map(|page| backend.fetch_page(&page.state)).collect()
    }

    fn paged(&self) -> impl Iterator<Item = &Page> {
        self.pages.iter().filter(|page| page.is_paged())
    }

    fn apply(
        &self,
        backend: &Backend,
        p: &mut Tensor,
        g: &Tensor,
        state: &mut [Tensor],
        step: &OptimizerStep,
    ) -> Result<()> {
        match (self.arguments.optim.0.rule, state) {
            (Rule::AdamW, [m, v]) => backend.adamw(p, g, m, v, step),
            (Rule::AdamW8bit, [m, v, m_absmax, v_absmax]) => {
                backend.adamw_8bit(p, g, &mut Moments8bit { m, v, m_absmax, v_absmax }, step)
            }
            (Rule::Lion, [m]) => backend.lion(p, g, m, step),
            (Rule::Sgd, []) => backend.sgd(p, g, step),
            (rule, state) => Err(Error::shape("optimizer", format!("{} parts of {rule:?}", state.len()))),
        }
    }

    /// The state by parameter, to be written before the next step: `exp_avg.NAME` and so on.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn tensors<'a>(
        &'a self,
        backend: &'a Backend,
        params: &ParamStore,
    ) -> Result<Vec<StreamedTensor<'a>>> {
        params.finish_step()?;
        let mut tensors = Vec::new();
        for info in params.infos() {
            for (i, spec) in self.arguments.optim.0.rule.state().iter().enumerate() {
                let range = info.range.clone();
                tensors.push(StreamedTensor {
                    name: format!("{}.{}", spec.name, info.name),
                    shape: spec.shape(&info.shape),
                    dtype: spec.dtype,
                    write: Box::new(move |w| {
                        self.parts(i, &range).try_for_each(|(_, part)| {
                            let part = part.map_err(std::io::Error::other)?;
                            let mut bytes = vec![0; part.bytes()];
                            backend.download(&part, &mut bytes).map_err(std::io::Error::other)?;
                            part.release_pages();
                            w.write_all(&bytes)
                        })
                    }),
                });
            }
        }
        Ok(tensors)
    }

    /// Takes the state that a checkpoint holds after `steps` steps.
    ///
    /// # Errors
    /// When a tensor is missing, or of another type or size.
    pub fn load(
        &mut self,
        backend: &Backend,
        params: &ParamStore,
        file: &Checkpoint,
        steps: u64,
    ) -> Result<()> {
        params.finish_step()?;
        self.fetched.clear();
        for info in params.infos() {
            for (i, spec) in self.arguments.optim.0.rule.state().iter().enumerate() {
                let name = format!("{}.{}", spec.name, info.name);
                let saved = file.tensor(&name)?;
                let shape = spec.shape(&info.shape);
                if saved.shape() != shape || saved.dtype() != spec.dtype {
                    return Err(Error::tensor(
                        name,
                        format!(
                            "expected {shape:?} {}, found {:?} {}",
                            spec.dtype,
                            saved.shape(),
                            saved.dtype()
                        ),
                    ));
                }
                let saved = saved.reshape(&[saved.elements()])?;
                for (place, part) in self.parts(i, &info.range) {
                    let mut part = part?;
                    let from = saved.slice(place..place + part.elements())?;
                    let mut bytes = vec![0; from.bytes()];
                    backend.download(&from, &mut bytes)?;
                    backend.upload(&mut part, &bytes)?;
                    part.release_pages();
                }
            }
        }
        self.step = steps;
        Ok(())
    }

    /// The pieces of one part of the state for a range of elements, each with its place in the range.
    fn parts(&self, part: usize, range: &Range<usize>) -> impl Iterator<Item = (usize, Result<Tensor>)> {
        let spec = self.arguments.optim.0.rule.state()[part];
        let range = range.clone();
        self.pages.iter().filter_map(move |page| {
            let piece = range.start.max(page.range.start)..range.end.min(page.range.end);
            (!piece.is_empty())
                .then(|| ((piece.start - range.start) / spec.block, page.slice(part, spec.block, &piece)))
        })
    }
}

/// Neighbouring parameters that are stepped alike, with the gaps behind them.
struct Run {
    range: Range<usize>,
    decay: bool,
    pace: Pace,
}

/// How fast LoRA+ lets a parameter learn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    Base,
    Fast,
    Embedding,
}

/// The parameters as few runs as possible. As in PEFT, LoRA+ takes the matrices B and all vectors for fast ones, and those
/// on embeddings apart.
fn runs(params: &ParamStore, loraplus: bool) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for info in params.infos() {
        let end = info.range.end.next_multiple_of(SLICE_ALIGNMENT);
        let fast = info.name.contains("lora_B") || info.shape.len() == 1;
        let pace = match loraplus {
            true if info.name.contains(".lora_embedding_") => Pace::Embedding,
            true if fast => Pace::Fast,
            _ => Pace::Base,
        };
        match runs.last_mut() {
            Some(run) if run.decay == info.decay && run.pace == pace => run.range.end = end,
            _ => runs.push(Run { range: info.range.start..end, decay: info.decay, pace }),
        }
    }
    runs
}

/// `base` to a whole power by squaring, the same on every platform.
fn power(mut base: f64, mut exponent: u64) -> f64 {
    let mut result = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    result
}

/// The factor that brings a gradient of this norm down to `max_grad_norm`, as PyTorch's
/// `clip_grad_norm_`; 1 without a bound.
pub fn clip_scale(grad_norm: f64, max_grad_norm: Option<f64>) -> f32 {
    max_grad_norm.map_or(1.0, |max| (max / (grad_norm + 1e-6)).min(1.0) as f32)
}
