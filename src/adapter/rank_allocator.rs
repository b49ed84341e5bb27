//! AdaLoRA's training beside its gradients: the penalty that keeps the factors orthogonal, how much each rank matters, and
//! which are taken away at which step.
//!
//! A rank matters as much as its element of E and the mean of its row of A and column of B, each by `|p dp|` smoothed over
//! steps, times how much that varies. Source: Zhang et al., "AdaLoRA" (arXiv 2303.10512); steps are counted as in PEFT.

use crate::backend::{Backend, Gemm, GemmTerm, Matrix};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::save::write_streamed;
use crate::model::{Checkpoint, Model};
use crate::param::ParamId;
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::path::Path;

use super::io::streamed_f32;

/// Which ranks of a module are left, by its path.
pub type RankPattern = BTreeMap<String, Vec<bool>>;

/// The file beside a checkpoint's adapter.
const STATE_FILE: &str = "rank_allocator.safetensors";

/// How many ranks there are at which step.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Budget {
    pub tinit: usize,
    pub tfinal: usize,
    pub total_step: usize,
    pub delta_t: usize,
    /// Ranks of a module at the end, on average.
    pub target_r: usize,
}

/// What a step asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Allocation {
    /// Nothing: the ranks stay as they were.
    None,
    /// So many ranks are to be left.
    Ranks(usize),
    /// Those taken away are to stay away.
    Fixed,
}

impl Budget {
    /// The last step that allocates ranks.
    fn last(&self) -> usize {
        self.total_step - self.tfinal
    }

    /// What the step asks for, of `first` ranks at the start and `target` at the end: fewer by a cubic schedule.
    fn at(&self, step: usize, first: usize, target: usize) -> Allocation {
        if step > self.last() {
            return Allocation::Fixed;
        }
        if step < self.last() && (step <= self.tinit || !step.is_multiple_of(self.delta_t)) {
            return Allocation::None;
        }
        let left = 1.0 - (step - self.tinit) as f64 / (self.last() - self.tinit) as f64;
        let ranks = (first as f64 - target as f64) * (left * left * left) + target as f64;
        Allocation::Ranks(ranks as usize)
    }
}

/// A parameter whose importance is followed.
#[derive(Debug)]
struct Tracked {
    id: ParamId,
    /// Smoothed `|p dp|`, f32 `[n]`.
    importance: Tensor,
    /// Smoothed deviation of it, f32 `[n]`.
    uncertainty: Tensor,
}

/// An adapted module: its A, B and E.
#[derive(Debug)]
struct Module {
    path: String,
    r: usize,
    parts: [Tracked; 3],
    /// Which ranks are left, once any was taken away.
    left: Option<Vec<bool>>,
}

/// The ranks of a run.
#[derive(Debug)]
pub struct RankAllocator {
    modules: Vec<Module>,
    /// Paths of modules without a rank.
    empty: Vec<String>,
    budget: Budget,
    betas: [f32; 2],
}

impl RankAllocator {
    /// The state before the first step, of the modules at `paths`.
    pub fn new<'a>(
        model: &Model,
        paths: impl Iterator<Item = &'a str>,
        budget: Budget,
        betas: [f64; 2],
    ) -> Result<Self> {
        let (mut modules, mut empty) = (Vec::new(), Vec::new());
        for path in paths {
            let track = |part: &str| {
                let name = format!("{path}.{part}");
                let id =
                    model.params.find(&name).ok_or_else(|| Error::tensor(name, "is not on the model"))?;
                let n = model.params.info(id).range.len();
                let zeros = || model.backend.zeros(&[n], DType::F32);
                Ok(Tracked { id, importance: zeros()?, uncertainty: zeros()? })
            };
            let r =
                model.params.find(&format!("{path}.lora_E")).map_or(0, |id| model.params.info(id).shape[0]);
            if r == 0 {
                empty.push(path.to_string());
            } else {
                let parts = [track("lora_A")?, track("lora_B")?, track("lora_E")?];
                modules.push(Module { path: path.to_string(), r, parts, left: None });
            }
        }
        Ok(RankAllocator { modules, empty, budget, betas: betas.map(|beta| beta as f32) })
    }

    /// The mean of `|P P^T - 1|` over the factors (ranks as rows) times `weight`, with its gradient added to theirs.
    pub fn regularize(&self, model: &Model, weight: f64) -> Result<f64> {
        let (backend, count) = (&model.backend, 2 * (self.modules.len() + self.empty.len()));
        let mut sum = 0.0;
        for module in &self.modules {
            for (part, by_rows) in module.parts[..2].iter().zip([true, false]) {
                let p = model.params.master(part.id)?;
                let (plain, transposed) = (Matrix::plain(&p), Matrix::transposed(&p));
                let product = if by_rows { (plain, transposed) } else { (transposed, plain) };
                let mut gram = backend.empty(&[module.r, module.r], DType::F32)?;
                backend.gemm(&mut gram, &Gemm::new(&[GemmTerm { a: product.0, b: product.1 }]))?;
                let mut off = backend.to_vec::<f32>(&gram)?;
                off.iter_mut().step_by(module.r + 1).for_each(|x| *x -= 1.0);
                let norm = off.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                sum += norm;
                if norm == 0.0 {
                    continue;
                }
                let factor = (2.0 * weight / (count as f64 * norm)) as f32;
                off.iter_mut().for_each(|x| *x *= factor);
                let off = backend.from_slice(&off, &[module.r, module.r])?;
                let (a, b) = if by_rows { (&off, &p) } else { (&p, &off) };
                let terms = [GemmTerm { a: Matrix::plain(a), b: Matrix::plain(b) }];
                let gemm = Gemm { accumulate: true, ..Gemm::new(&terms) };
                backend.gemm(&mut model.params.grad(part.id)?, &gemm)?;
            }
        }
        Ok(weight * sum / count as f64)
    }

    /// Follows the parameters and allocates ranks after the optimizer's step numbered `step` from 0, whose gradients were
    /// multiplied by `grad_scale`. Gives the ranks that are left if they were allocated anew.
    pub fn after_step(
        &mut self,
        model: &mut Model,
        step: usize,
        grad_scale: f32,
    ) -> Result<Option<RankPattern>> {
        if step < self.budget.last() {
            self.follow(model, grad_scale)?;
        }
        let first: usize = self.modules.iter().map(|module| module.r).sum();
        let target = self.budget.target_r * (self.modules.len() + self.empty.len());
        match self.budget.at(step, first, target) {
            Allocation::None => Ok(None),
            Allocation::Fixed => self.take_away(model).map(|()| None),
            Allocation::Ranks(ranks) => {
                self.allocate(&model.backend, first.saturating_sub(ranks))?;
                self.take_away(model)?;
                let left = self.modules.iter().filter_map(|m| Some((m.path.clone(), m.left.clone()?)));
                let empty = self.empty.iter().map(|path| (path.clone(), Vec::new()));
                Ok(Some(left.chain(empty).collect()))
            }
        }
    }

    /// Smooths `|p dp|` and its deviation from that.
    fn follow(&mut self, model: &Model, grad_scale: f32) -> Result<()> {
        let (backend, [beta1, beta2]) = (&model.backend, self.betas);
        for part in self.modules.iter_mut().flat_map(|module| &mut module.parts) {
            let values = model.params.to_vec(part.id)?;
            let gradients = backend.to_vec::<f32>(&model.params.grad(part.id)?)?;
            let mut importance = backend.to_vec::<f32>(&part.importance)?;
            let mut uncertainty = backend.to_vec::<f32>(&part.uncertainty)?;
            let smoothed = importance.iter_mut().zip(&mut uncertainty);
            for ((i, u), (p, g)) in smoothed.zip(values.iter().zip(&gradients)) {
                let now = (p * (g * grad_scale)).abs();
                *i = beta1 * *i + (1.0 - beta1) * now;
                *u = beta2 * *u + (1.0 - beta2) * (now - *i).abs();
            }
            backend.upload(&mut part.importance, bytemuck::cast_slice(&importance))?;
            backend.upload(&mut part.uncertainty, bytemuck::cast_slice(&uncertainty))?;
        }
        Ok(())
    }

    /// Marks the `excess` ranks that matter least, and those that matter no more than they.
    fn allocate(&mut self, backend: &Backend, excess: usize) -> Result<()> {
        let scores: Vec<Vec<f32>> = self.modules.iter().map(|m| m.scores(backend)).collect::<Result<_>>()?;
        let mut sorted = scores.concat();
        sorted.sort_by(f32::total_cmp);
        let threshold = excess.checked_sub(1).and_then(|k| sorted.get(k).copied());
        for (module, scores) in self.modules.iter_mut().zip(scores) {
            module.left = Some(scores.iter().map(|score| threshold.is_none_or(|t| *score > t)).collect());
        }
        Ok(())
    }

    /// Sets the factors of ranks that were taken away to zero.
    fn take_away(&self, model: &mut Model) -> Result<()> {
        for module in &self.modules {
            let Some(left) = module.left.as_ref().filter(|left| left.contains(&false)) else { continue };
            let mut e = model.params.to_vec(module.parts[2].id)?;
            e.iter_mut().zip(left).filter(|(_, left)| !**left).for_each(|(e, _)| *e = 0.0);
            model.params.set(module.parts[2].id, &e)?;
        }
        Ok(())
    }

    /// Writes the state, and the factors with the ranks that the adapter's file leaves out.
    pub fn save(&self, model: &Model, dir: &Path) -> Result<()> {
        let mut tensors = Vec::new();
        for part in self.modules.iter().flat_map(|module| &module.parts) {
            let name = &model.params.info(part.id).name;
            let all = [
                ("", model.params.master(part.id)?),
                ("exp_avg_ipt.", part.importance.clone()),
                ("exp_avg_unc.", part.uncertainty.clone()),
            ];
            tensors.extend(
                all.map(|(kind, tensor)| streamed_f32(&model.backend, format!("{kind}{name}"), tensor)),
            );
        }
        for module in &self.modules {
            let left = module.left.clone().unwrap_or_else(|| vec![true; module.r]);
            let left: Vec<f32> = left.into_iter().map(|left| f32::from(u8::from(left))).collect();
            let left = model.backend.from_slice(&left, &[module.r])?;
            tensors.push(streamed_f32(&model.backend, format!("left.{}", module.path), left));
        }
        write_streamed(&dir.join(STATE_FILE), tensors)
    }

    /// Reads what [`RankAllocator::save`] wrote.
    pub fn load(&mut self, model: &mut Model, dir: &Path) -> Result<()> {
        let file = Checkpoint::open_file(&dir.join(STATE_FILE))?;
        let backend = model.backend.clone();
        let read = |name: String, n: usize| {
            let values = backend.to_f32(&file.tensor(&name)?)?;
            match values.len() == n {
                true => Ok(values),
                false => Err(Error::tensor(name, format!("expected {n} elements, found {}", values.len()))),
            }
        };
        for module in &mut self.modules {
            for part in &mut module.parts {
                let info = model.params.info(part.id).clone();
                let n = info.range.len();
                model.params.set(part.id, &read(info.name.clone(), n)?)?;
                let importance = read(format!("exp_avg_ipt.{}", info.name), n)?;
                let uncertainty = read(format!("exp_avg_unc.{}", info.name), n)?;
                backend.upload(&mut part.importance, bytemuck::cast_slice(&importance))?;
                backend.upload(&mut part.uncertainty, bytemuck::cast_slice(&uncertainty))?;
            }
            let left: Vec<bool> =
                read(format!("left.{}", module.path), module.r)?.iter().map(|x| *x > 0.0).collect();
            module.left = left.contains(&false).then_some(left);
        }
        Ok(())
    }
}

impl Module {
    /// How much each rank matters.
    fn scores(&self, backend: &Backend) -> Result<Vec<f32>> {
        let of = |part: &Tracked| -> Result<Vec<f32>> {
            let (importance, uncertainty) =
                (backend.to_vec::<f32>(&part.importance)?, backend.to_vec::<f32>(&part.uncertainty)?);
            Ok(importance.iter().zip(&uncertainty).map(|(i, u)| i * u).collect())
        };
        let [a, b, e] = [of(&self.parts[0])?, of(&self.parts[1])?, of(&self.parts[2])?];
        let (inputs, outputs) = (a.len() / self.r, b.len() / self.r);
        let score = |k: usize| {
            let of_a = a[k * inputs..][..inputs].iter().map(|x| f64::from(*x)).sum::<f64>() / inputs as f64;
            let of_b = b[k..].iter().step_by(self.r).map(|x| f64::from(*x)).sum::<f64>() / outputs as f64;
            e[k] + (of_a as f32 + of_b as f32)
        };
        Ok((0..self.r).map(score).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::{Allocation, Budget};

    #[test]
    fn ranks_shrink_by_the_cube_and_then_stay() {
        let budget = Budget { tinit: 2, tfinal: 3, total_step: 10, delta_t: 2, target_r: 1 };
        let all: Vec<Allocation> = (0..10).map(|step| budget.at(step, 30, 10)).collect();
        let (none, ranks) = (Allocation::None, Allocation::Ranks);
        // At steps 4 and 6, 3/5 and 1/5 of the way are left; step 7 is the last that allocates, whatever deltaT.
        let expected = [none, none, none, none, ranks(14), none, ranks(10), ranks(10)];
        assert_eq!(all[..8], expected);
        assert_eq!(all[8..], [Allocation::Fixed; 2]);
    }
}
