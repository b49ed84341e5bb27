//! Merging an adapter into its base: file to file, a few rows at a time, so that memory holds the adapter
//! and little else, however large the model.
//!
//! LoRA: `W += scale * B A`; as in PEFT, the change is rounded to the weight's type before it is added. DoRA: each
//! output's weights are scaled to its magnitude besides. AdaLoRA and VeRA: changes of low rank with factors. OFT:
//! the inputs are rotated. IA3: outputs or inputs times their factors.

mod base;
mod memory;
mod report;
mod rotation;

pub use memory::merge_into;
pub use report::{Drift, compare};

use super::config::Bias;
use super::io::{ADAPTER_FILE, AdapterTensors, copy_key};
use super::method::read_adapter;
use super::vera::SHARED;
use crate::backend::cpu::Cpu;
use crate::backend::{Backend, Gemm, GemmTerm, Matrix};
use crate::data::gguf::tokenizer_files;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::fs::{sync_folder, temporary_sibling};
use crate::model::ModelConfig;
use crate::model::gguf::{Gguf, is_gguf};
use crate::model::save::{
    SHARD_BYTES, StreamedTensor, copy_companions, copy_config, write_config, write_sharded,
};
use crate::model::stored::head_name;
use crate::ops::rotate::{constrain, matrices};
use crate::quant::QuantConfig;
use crate::tensor::Tensor;
use base::{Base, modules, open_base};
use half::{bf16, f16};
use rotation::Turn;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;

/// Elements of a weight in memory at a time.
const BLOCK: usize = 1 << 22;

/// What merging does to one module.
#[derive(Clone, Debug, PartialEq)]
pub enum MergeRule {
    /// `W += scale * B A`, and `bias += scale * lora_B.bias`; with DoRA the rows get their magnitudes.
    LowRank {
        /// Rank.
        r: usize,
        /// Factor on the change.
        scale: f64,
        /// Whether B has a bias.
        lora_bias: bool,
        /// Whether there are magnitudes.
        dora: bool,
    },
    /// `W += scale * B (E A)` with a factor per rank.
    Factored {
        /// Rank.
        r: usize,
        /// Factor on the change.
        scale: f64,
    },
    /// `W += (lambda_b B) (lambda_d A)` with shared A and B.
    Vera {
        /// Rank.
        r: usize,
    },
    /// `W = W R^T`, blocks of inputs rotated.
    Rotation {
        /// Stored blocks; one is shared by all.
        blocks: usize,
        /// Columns of a block.
        block_size: usize,
        /// Terms of the series; `None`: the transform itself.
        terms: Option<usize>,
        /// COFT's bound.
        max_norm: Option<f64>,
    },
    /// `W`'s outputs (and the bias), or its inputs, times factors.
    Ia3 {
        /// Whether the inputs.
        feedforward: bool,
    },
    /// Values of the adapter in place of the base's.
    Norm,
}

/// What merging does to a model.
#[derive(Clone, Debug, PartialEq)]
pub struct MergePlan {
    /// By module path.
    pub rules: BTreeMap<String, MergeRule>,
    /// Modules that the adapter has whole.
    pub modules_to_save: Vec<String>,
    /// Biases that the adapter has.
    pub bias: Bias,
}

/// A low-rank change of a weight.
struct LowRank {
    a: Tensor, // f32 [r, in]
    b: Tensor, // f32 [out, r]
    scale: f32,
    conv1d: bool,              // the weight is stored [in, out]
    factors: Option<Vec<f32>>, // of each output, after the sum: DoRA
}

/// Factors on a weight's rows or columns as stored.
struct Factors {
    values: Vec<f32>,
    of_rows: bool,
}

/// What becomes of one tensor of the merged model.
struct Plan {
    base: String,        // name of the base's tensor
    own: Option<Tensor>, // f32, trained whole: in place of the base's
    shape: Vec<usize>,
    dtype: DType,
    change: Option<LowRank>,
    factors: Option<Factors>,
    turn: Option<Turn>,
    bias_change: Option<(Tensor, f32)>, // lora_B.bias and the scale
}

impl Plan {
    /// Whether the adapter changes it.
    fn is_changed(&self) -> bool {
        self.own.is_some()
            || self.change.is_some()
            || self.factors.is_some()
            || self.turn.is_some()
            || self.bias_change.is_some()
    }
}

/// The weights that an adapter is merged onto.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Onto {
    /// Those of the model's files.
    #[default]
    Original,
    /// What the quantized base stands for, against which the adapter was trained.
    Dequantized,
}

/// What was merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merged {
    /// Tensors that the adapter changed.
    pub adapted: usize,
    /// All tensors of the merged model.
    pub tensors: usize,
}

/// How to merge into files.
#[derive(Clone, Copy, Debug)]
pub struct MergeOptions {
    /// The base.
    pub onto: Onto,
    /// What the base was quantized to in training, for [`Onto::Dequantized`] of a model that is not quantized on disk.
    pub quant: Option<QuantConfig>,
    /// Limit on the bytes of weights per file; a larger tensor has a file of its own.
    pub shard_bytes: usize,
    /// The type of the merged weights where the base is a GGUF file, whose own may be codes.
    pub gguf_dtype: DType,
    /// Threads; all that the process may use by default.
    pub threads: Option<usize>,
}

impl Default for MergeOptions {
    fn default() -> Self {
        MergeOptions {
            onto: Onto::Original,
            quant: None,
            shard_bytes: SHARD_BYTES,
            gguf_dtype: DType::F32,
            threads: None,
        }
    }
}

/// Merges the adapter of one folder into the model of another; the result is a plain Hugging Face folder at
/// `output`, which must not exist.
///
/// # Errors
/// When either folder is malformed, they do not fit each other, an adapter's tensor would be left out, or
/// the output can't be written; then nothing is left behind.
pub fn merge(model_dir: &Path, adapter_dir: &Path, output: &Path, options: &MergeOptions) -> Result<Merged> {
    if output.exists() {
        return Err(Error::format(output, "exists already; choose another folder"));
    }
    let backend = Cpu::new(options.threads)?;
    let config = ModelConfig::load(model_dir)?;
    let method = read_adapter(adapter_dir)?;
    let base = open_base(model_dir, &config, &backend, options)?;
    let companions = match is_gguf(model_dir) {
        true => Some((Gguf::open(model_dir)?.config_json(options.gguf_dtype)?, tokenizer_files(model_dir)?)),
        false => None,
    };
    let merge = method.merge_plan(&modules(&*base, &config)?, &config.model_type)?;
    let adapter = AdapterTensors::open(adapter_dir, ADAPTER_FILE)?;
    let (plans, untied) =
        Planner { backend: &backend, config: &config, merge: &merge, base: &*base, adapter }.plan()?;
    let adapted = plans.values().filter(|p| p.is_changed()).count();
    let temporary = temporary_sibling(output)?;
    let written = (|| {
        fs::create_dir_all(&temporary).map_err(|e| Error::io(&temporary, e))?;
        let tensors = plans.iter().map(|(name, plan)| StreamedTensor {
            name: name.clone(),
            shape: plan.shape.clone(),
            dtype: plan.dtype,
            write: Box::new(|w| write_merged(w, plan, &*base, &backend)),
        });
        write_sharded(&temporary, tensors.collect(), options.shard_bytes)?;
        let mut changes = vec![("quantization_config", Value::Null)];
        if untied {
            changes.push(("tie_word_embeddings", json!(false)));
        }
        match &companions {
            None => {
                copy_config(model_dir, &temporary, &changes)?;
                copy_companions(model_dir, &temporary)?;
            }
            Some((config, tokenizer)) => {
                write_config(&temporary, config, &changes)?;
                tokenizer.write(&temporary)?;
            }
        }
        fs::rename(&temporary, output).map_err(|e| Error::io(output, e))
    })();
    if written.is_err() {
        let _ = fs::remove_dir_all(&temporary);
    }
    written?;
    sync_folder(output);
    Ok(Merged { adapted, tensors: plans.len() })
}

struct Planner<'a> {
    backend: &'a Backend,
    config: &'a ModelConfig,
    merge: &'a MergePlan,
    base: &'a dyn Base,
    adapter: AdapterTensors,
}

impl Planner<'_> {
    /// Every tensor of the merged model by its full name, and whether the head is no longer tied.
    fn plan(mut self) -> Result<(BTreeMap<String, Plan>, bool)> {
        let mut plans = BTreeMap::new();
        for name in self.base.names() {
            let plan = self.plan_tensor(&name, &name)?;
            plans.insert(name, plan);
        }
        let untied = self.config.tie_word_embeddings && self.untie(&mut plans)?;
        self.adapter.finish()?;
        Ok((plans, untied))
    }

    /// A head that was tied to the embedding and is so no longer, because one of them was trained.
    fn untie(&mut self, plans: &mut BTreeMap<String, Plan>) -> Result<bool> {
        let embed = format!("{}.weight", self.config.names.embed);
        let embedding = plans.get(&embed).ok_or_else(|| Error::tensor(embed, "missing in the base"))?;
        let embedding_changed = embedding.is_changed();
        // A copy that came with an adapter on the embedding was the head's too.
        let copy = embedding.own.clone().filter(|_| self.merge.rules.contains_key(self.config.names.embed));
        let mut plan = self.plan_tensor(&head_name(self.config), &self.base.tied_head())?;
        plan.own = plan.own.or(copy);
        let untied = embedding_changed || plan.is_changed();
        if untied {
            plans.insert(head_name(self.config), plan);
        }
        Ok(untied)
    }

    /// A tensor of the adapter, in f32.
    fn take(&mut self, key: &str, shape: &[usize]) -> Result<Tensor> {
        self.backend.to_dtype(&self.adapter.take(key, shape)?, DType::F32)
    }

    /// What becomes of the tensor `name`, which is `base` in the base.
    fn plan_tensor(&mut self, name: &str, base: &str) -> Result<Plan> {
        let (shape, dtype) = self.base.info(base)?;
        let mut plan = Plan {
            base: base.to_string(),
            own: None,
            shape: shape.clone(),
            dtype,
            change: None,
            factors: None,
            turn: None,
            bias_change: None,
        };
        let (module, kind) = name.rsplit_once('.').unwrap_or((name, ""));
        let at = |suffix: &str| format!("base_model.model.{module}.{suffix}");
        let rule = self.merge.rules.get(module).cloned();
        if self.is_trained_whole(module, kind, &shape) {
            let of_target = kind == "bias" && rule.is_some();
            let key = if of_target { at("base_layer.bias") } else { at(kind) };
            plan.own = Some(self.take(&key, &shape)?);
        }
        let Some(rule) = rule else { return Ok(plan) };
        let copy = copy_key(module);
        if kind == "weight" && self.adapter.shape(&copy).is_some() {
            // As a model that the adapter is loaded on holds it.
            let held = self.backend.to_dtype(&self.take(&copy, &shape)?, dtype)?;
            plan.own = Some(self.backend.to_dtype(&held, DType::F32)?);
        }
        let names = &self.config.names;
        let embedding = module == names.embed || Some(module) == names.positions;
        // A table of entries is stored as the weight of a linear layer that takes them, the other way round.
        let conv1d = embedding || self.config.conv1d && module != names.head;
        let [a_key, b_key] = match embedding {
            true => ["lora_embedding_A", "lora_embedding_B"],
            false => ["lora_A.weight", "lora_B.weight"],
        };
        let (inputs, outputs) = match *shape {
            [i, o] if conv1d => (i, o),
            [o, i] => (i, o),
            _ => (shape[0], shape[0]),
        };
        match (rule, kind) {
            (MergeRule::LowRank { r, scale, dora, .. }, "weight") => {
                let a = self.take(&at(a_key), &[r, inputs])?;
                let b = self.take(&at(b_key), &[outputs, r])?;
                let mut change = LowRank { a, b, scale: scale as f32, conv1d, factors: None };
                if dora {
                    let magnitude = self.take(&at("lora_magnitude_vector"), &[outputs])?;
                    let magnitude = self.backend.to_vec::<f32>(&magnitude)?;
                    let norms = merged_norms(self.backend, &self.base.tensor(base)?, &change, outputs)?;
                    change.factors = Some(magnitude.iter().zip(norms).map(|(m, n)| m / n).collect());
                }
                plan.change = Some(change);
            }
            (MergeRule::LowRank { scale, lora_bias: true, .. }, "bias") => {
                plan.bias_change = Some((self.take(&at("lora_B.bias"), &shape)?, scale as f32));
            }
            (MergeRule::Factored { r, scale }, "weight") => {
                let (a, b) =
                    (self.take(&at("lora_A"), &[r, inputs])?, self.take(&at("lora_B"), &[outputs, r])?);
                let e = self.take(&at("lora_E"), &[r, 1])?;
                let e = self.backend.to_vec::<f32>(&e)?;
                let a: Vec<f32> = self.backend.to_vec::<f32>(&a)?;
                let rows = a.chunks(inputs).zip(&e);
                let a: Vec<f32> = rows.flat_map(|(row, e)| row.iter().map(move |x| x * e)).collect();
                let a = self.backend.from_slice(&a, &[r, inputs])?;
                plan.change = (r > 0).then_some(LowRank { a, b, scale: scale as f32, conv1d, factors: None });
            }
            (MergeRule::Vera { r }, "weight") => {
                let (a, b) = self.vera(&at("vera_lambda_d"), &at("vera_lambda_b"), r, inputs, outputs)?;
                plan.change = Some(LowRank { a, b, scale: 1.0, conv1d, factors: None });
            }
            (MergeRule::Rotation { blocks, block_size, terms, max_norm }, "weight") => {
                let elements = block_size * (block_size - 1) / 2;
                let values = self.take(&at("oft_R.weight"), &[blocks, elements])?;
                let mut values = self.backend.to_vec::<f32>(&values)?;
                if let Some(max_norm) = max_norm {
                    constrain(&mut values, elements, max_norm);
                }
                let r = matrices(self.backend, &values, block_size, terms)?.r;
                plan.turn = Some(Turn { r, blocks, conv1d });
            }
            (MergeRule::Ia3 { feedforward }, "weight") => {
                let shape = if feedforward { [1, inputs] } else { [outputs, 1] };
                let values = self.take(&at("ia3_l"), &shape)?;
                let values = self.backend.to_vec(&values)?;
                plan.factors = Some(Factors { values, of_rows: feedforward == conv1d });
            }
            (MergeRule::Ia3 { feedforward: false }, "bias") => {
                let values = self.backend.to_f32(&self.adapter.get(&at("ia3_l"))?)?;
                plan.factors = Some(Factors { values, of_rows: false });
            }
            (MergeRule::Norm, _) => {
                plan.own = Some(self.take(&at(&format!("ln_tuning_layers.{kind}")), &shape)?)
            }
            _ => {}
        }
        Ok(plan)
    }

    /// VeRA's shared matrices, their parts for a layer times its factors.
    fn vera(
        &mut self,
        d: &str,
        b: &str,
        r: usize,
        inputs: usize,
        outputs: usize,
    ) -> Result<(Tensor, Tensor)> {
        let (d, b) = (self.take(d, &[r])?, self.take(b, &[outputs])?);
        let (d, b) = (self.backend.to_vec::<f32>(&d)?, self.backend.to_vec::<f32>(&b)?);
        let (down, up) = (self.adapter.get(SHARED[0])?, self.adapter.get(SHARED[1])?);
        if down.shape().len() != 2
            || down.rows() != r
            || down.cols() < inputs
            || up.cols() != r
            || up.rows() < outputs
        {
            return Err(Error::tensor(SHARED[0], "is too small for this base model or of another rank"));
        }
        let (wide, all) = (down.cols(), self.backend.to_f32(&down)?);
        let rows = all.chunks(wide).zip(&d);
        let a: Vec<f32> = rows.flat_map(|(row, d)| row[..inputs].iter().map(move |x| x * d)).collect();
        let all = self.backend.to_f32(&up.slice(0..outputs)?)?;
        let rows = all.chunks(r).zip(&b);
        let b: Vec<f32> = rows.flat_map(|(row, b)| row.iter().map(move |x| x * b)).collect();
        Ok((self.backend.from_slice(&a, &[r, inputs])?, self.backend.from_slice(&b, &[outputs, r])?))
    }

    /// Whether the settings say that the adapter has this parameter of the base.
    fn is_trained_whole(&self, module: &str, kind: &str, shape: &[usize]) -> bool {
        let kept = self.merge.modules_to_save.iter().any(|name| module.ends_with(name.as_str()));
        let by_bias = match self.merge.bias {
            Bias::None => false,
            Bias::All => true,
            Bias::LoraOnly => self.merge.rules.contains_key(module),
        };
        // GPT-2's old files hold masks of four dimensions by the name `bias`.
        (kept && kind == "weight") || (kind == "bias" && shape.len() == 1 && (kept || by_bias))
    }
}

/// Writes one tensor in blocks of rows.
fn write_merged(w: &mut dyn Write, plan: &Plan, base: &dyn Base, backend: &Backend) -> io::Result<()> {
    let mut failed = None;
    let done = merged_blocks(plan, base, backend, &mut |_, bytes| {
        w.write_all(bytes).map_err(|e| {
            let message = Error::format("merged weights", e.to_string());
            failed = Some(e);
            message
        })
    });
    match (done, failed) {
        (_, Some(e)) => Err(e),
        (done, None) => done.map_err(io::Error::other),
    }
}

/// Takes some rows of a tensor as bytes.
type TakeRows<'a> = &'a mut dyn FnMut(Range<usize>, &[u8]) -> Result<()>;

/// Gives one tensor in blocks of rows, as bytes of its type.
fn merged_blocks(plan: &Plan, base: &dyn Base, backend: &Backend, take: TakeRows<'_>) -> Result<()> {
    let stored = match &plan.own {
        Some(own) => own.clone(),
        None => base.tensor(&plan.base)?,
    };
    let flat = stored.shape().len() < 2;
    let stored = if flat { stored.reshape(&[1, stored.elements()])? } else { stored };
    let rows = stored.shape()[0];
    let cols = stored.elements() / rows.max(1);
    let per_block = (BLOCK / cols.max(1)).clamp(1, rows.max(1));
    let per_block = plan.turn.as_ref().map_or(per_block, |turn| turn.rows(per_block));
    for first in (0..rows).step_by(per_block) {
        let range = first..(first + per_block).min(rows);
        let block = stored.slice(range.clone())?;
        take(range.clone(), &merged_block(plan, &block, range, backend)?)?;
        block.release_pages();
    }
    Ok(())
}

fn merged_block(plan: &Plan, block: &Tensor, rows: Range<usize>, backend: &Backend) -> Result<Vec<u8>> {
    let mut bytes = vec![0; block.elements() * plan.dtype.size()];
    if let Some(turn) = &plan.turn {
        let merged = turn.apply(&backend.to_dtype(block, DType::F32)?, rows.start, backend)?;
        backend.download(&backend.to_dtype(&merged, plan.dtype)?, &mut bytes)?;
        return Ok(bytes);
    }
    let delta = match (&plan.change, &plan.bias_change) {
        (Some(change), _) => Some(change_of_block(change, block, rows.clone(), backend)?),
        (None, Some((bias, scale))) => {
            Some(backend.to_vec::<f32>(bias)?.into_iter().map(|x| x * scale).collect())
        }
        (None, None) => None,
    };
    if let Some(factors) = block_factors(plan, &rows) {
        let mut values = backend.to_f32(block)?;
        if let Some(delta) = &delta {
            values.iter_mut().zip(delta).for_each(|(w, d)| *w += d);
        }
        let cols = block.elements() / rows.len().max(1);
        for (row, values) in values.chunks_mut(cols).enumerate() {
            for (col, w) in values.iter_mut().enumerate() {
                *w *= factors.values[if factors.of_rows { row } else { col }];
            }
        }
        let merged = backend.from_slice(&values, &[values.len()])?;
        backend.download(&backend.to_dtype(&merged, plan.dtype)?, &mut bytes)?;
        return Ok(bytes);
    }
    let Some(delta) = delta else {
        backend.download(&backend.to_dtype(block, plan.dtype)?, &mut bytes)?;
        return Ok(bytes);
    };
    let base = backend.to_f32(block)?;
    let sums = base.iter().zip(&delta);
    match plan.dtype {
        DType::BF16 => {
            for (out, (w, d)) in bytes.chunks_exact_mut(2).zip(sums) {
                out.copy_from_slice(&bf16::from_f32(w + bf16::from_f32(*d).to_f32()).to_le_bytes());
            }
        }
        DType::F16 => {
            for (out, (w, d)) in bytes.chunks_exact_mut(2).zip(sums) {
                out.copy_from_slice(&f16::from_f32(w + f16::from_f32(*d).to_f32()).to_le_bytes());
            }
        }
        _ => {
            for (out, (w, d)) in bytes.chunks_exact_mut(4).zip(sums) {
                out.copy_from_slice(&(w + d).to_le_bytes());
            }
        }
    }
    Ok(bytes)
}

/// The factors on a block's rows or columns, if there are any.
fn block_factors(plan: &Plan, rows: &Range<usize>) -> Option<Factors> {
    let (values, of_rows) = match (&plan.factors, &plan.change) {
        (Some(factors), _) => (&factors.values, factors.of_rows),
        (None, Some(LowRank { factors: Some(values), conv1d, .. })) => (values, !conv1d),
        _ => return None,
    };
    let values = if of_rows { values[rows.clone()].to_vec() } else { values.clone() };
    Some(Factors { values, of_rows })
}

/// The low-rank change of a block of rows as stored.
fn change_of_block(
    change: &LowRank,
    block: &Tensor,
    rows: Range<usize>,
    backend: &Backend,
) -> Result<Vec<f32>> {
    let mut delta = backend.empty(block.shape(), DType::F32)?;
    let part;
    let term = if change.conv1d {
        // Rows of [in, out] are columns of A.
        part = columns(backend, &change.a, rows)?;
        GemmTerm { a: Matrix::transposed(&part), b: Matrix::transposed(&change.b) }
    } else {
        part = change.b.slice(rows)?;
        GemmTerm { a: Matrix::plain(&part), b: Matrix::plain(&change.a) }
    };
    backend.gemm(&mut delta, &Gemm { scale: change.scale, ..Gemm::new(&[term]) })?;
    backend.to_vec(&delta)
}

/// The norm of each output's weights with the change.
fn merged_norms(backend: &Backend, stored: &Tensor, change: &LowRank, outputs: usize) -> Result<Vec<f32>> {
    let (all, cols) = (stored.rows(), stored.cols());
    let mut squares = vec![0f64; outputs];
    let per_block = (BLOCK / cols.max(1)).clamp(1, all.max(1));
    for first in (0..all).step_by(per_block) {
        let rows = first..(first + per_block).min(all);
        let block = stored.slice(rows.clone())?;
        let delta = change_of_block(change, &block, rows, backend)?;
        for (i, (w, d)) in backend.to_f32(&block)?.iter().zip(delta).enumerate() {
            let output = if change.conv1d { i % cols } else { first + i / cols };
            squares[output] += f64::from(w + d).powi(2);
        }
        block.release_pages();
    }
    Ok(squares.into_iter().map(|x| x.sqrt() as f32).collect())
}

/// A column range of a matrix as a matrix of its own.
fn columns(backend: &Backend, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
    let mut out = backend.empty(&[x.rows(), range.len()], x.dtype())?;
    backend.copy_columns(&mut out, 0, x, range.start, range.len(), false)?;
    Ok(out)
}
