//! Merging an adapter into its base: file to file, a few rows at a time, so that memory holds the adapter
//! and little else, however large the model.
//!
//! LoRA: `W += scale * B A`; as in PEFT, the change is rounded to the weight's type before it is added. DoRA: each
//! output's weights are scaled to its magnitude besides. AdaLoRA and VeRA: changes of low rank with factors. IA3: outputs or inputs times their factors.

use super::config::Bias;
use super::io::{ADAPTER_FILE, check_all_used, open_adapter, take};
use super::method::read_adapter;
use crate::backend::cpu::Cpu;
use crate::backend::{Backend, Gemm, GemmTerm, Matrix};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::fs::{sync_folder, temporary_sibling};
use crate::model::bnb;
use crate::model::save::{SHARD_BYTES, StreamedTensor, copy_companions, copy_config, write_sharded};
use crate::model::stored::{full_name, head_name, stored_modules};
use crate::model::{Checkpoint, ModelConfig};
use crate::tensor::Tensor;
use half::{bf16, f16};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
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
    base: String,        // name in the base's file
    own: Option<Tensor>, // f32, trained whole: in place of the base's
    shape: Vec<usize>,
    dtype: DType,
    change: Option<LowRank>,
    factors: Option<Factors>,
    bias_change: Option<(Tensor, f32)>, // lora_B.bias and the scale
}

/// Merges the adapter of one folder into the model of another; the result is a plain Hugging Face folder at
/// `output`, which must not exist. Returns a line that says what was merged.
///
/// # Errors
/// When either folder is malformed, they do not fit each other, an adapter's tensor would be left out, or
/// the output can't be written; then nothing is left behind.
pub fn merge(model_dir: &Path, adapter_dir: &Path, output: &Path) -> Result<String> {
    merge_sharded(model_dir, adapter_dir, output, SHARD_BYTES)
}

/// [`merge`] with another limit on the bytes of weights per file; a larger tensor has a file of its own.
///
/// # Errors
/// As [`merge`].
pub fn merge_sharded(
    model_dir: &Path,
    adapter_dir: &Path,
    output: &Path,
    shard_bytes: usize,
) -> Result<String> {
    if output.exists() {
        return Err(Error::format(output, "exists already; choose another folder"));
    }
    let backend = Cpu::new(None)?;
    let config = ModelConfig::load(model_dir)?;
    let method = read_adapter(adapter_dir)?;
    let base = Checkpoint::open(model_dir)?;
    if let Some(name) = base.names().find(|name| bnb::is_quantized(&base, name)) {
        return Err(Error::tensor(
            name,
            format!(
                "{} is quantized, and a change of few bits would be lost; merge into the model that it was quantized from",
                model_dir.display()
            ),
        ));
    }
    let adapter = open_adapter(adapter_dir)?;
    let adapter_file = adapter_dir.join(ADAPTER_FILE);
    let merge = method.merge_plan(&stored_modules(&base, &config), &config.model_type)?;
    let mut planner = Planner {
        backend: &backend,
        config: &config,
        merge: &merge,
        base: &base,
        adapter: &adapter,
        adapter_file: &adapter_file,
        unused: adapter.names().collect(),
    };
    let (plans, untied) = planner.plan()?;
    let changed = plans.values().filter(|p| p.change.is_some() || p.factors.is_some()).count();
    let temporary = temporary_sibling(output)?;
    let written = (|| {
        fs::create_dir_all(&temporary).map_err(|e| Error::io(&temporary, e))?;
        let tensors = plans.iter().map(|(name, plan)| StreamedTensor {
            name: name.clone(),
            shape: plan.shape.clone(),
            dtype: plan.dtype,
            write: Box::new(|w| write_merged(w, plan, &base, &backend)),
        });
        write_sharded(&temporary, tensors.collect(), shard_bytes)?;
        let changes = if untied { vec![("tie_word_embeddings", json!(false))] } else { Vec::new() };
        copy_config(model_dir, &temporary, &changes)?;
        copy_companions(model_dir, &temporary)?;
        fs::rename(&temporary, output).map_err(|e| Error::io(output, e))
    })();
    if written.is_err() {
        let _ = fs::remove_dir_all(&temporary);
    }
    written?;
    sync_folder(output);
    Ok(format!("merged {changed} adapted weights into {} tensors", plans.len()))
}

struct Planner<'a> {
    backend: &'a Backend,
    config: &'a ModelConfig,
    merge: &'a MergePlan,
    base: &'a Checkpoint,
    adapter: &'a Checkpoint,
    adapter_file: &'a Path,
    unused: BTreeSet<&'a str>,
}

impl Planner<'_> {
    /// Every tensor of the merged model by its name in the file, and whether the head is no longer tied.
    fn plan(&mut self) -> Result<(BTreeMap<String, Plan>, bool)> {
        let mut plans = BTreeMap::new();
        for name in self.base.names() {
            let (_, dtype) = self.base.info(name).ok_or_else(|| Error::tensor(name, "missing"))?;
            // Buffers such as GPT-2's causal masks are not weights and not needed.
            if !matches!(dtype, safetensors::Dtype::F32 | safetensors::Dtype::F16 | safetensors::Dtype::BF16)
            {
                continue;
            }
            let full = full_name(name, self.config);
            // A tied head is the embedding, even where a file holds it once more.
            if self.config.tie_word_embeddings && full == head_name(self.config) {
                continue;
            }
            plans.insert(full.clone(), self.plan_tensor(&full, name)?);
        }
        let untied = self.config.tie_word_embeddings && self.untie(&mut plans)?;
        check_all_used(&self.unused, self.adapter_file)?;
        Ok((plans, untied))
    }

    /// A head that was tied to the embedding and is so no longer, because one of them was trained.
    fn untie(&mut self, plans: &mut BTreeMap<String, Plan>) -> Result<bool> {
        let embed = format!("{}.weight", self.config.names.embed);
        let embedding = plans.get(&embed).ok_or_else(|| Error::tensor(embed, "missing in the base"))?;
        let (base, embedding_trained) = (embedding.base.clone(), embedding.own.is_some());
        let plan = self.plan_tensor(&head_name(self.config), &base)?;
        let untied =
            embedding_trained || plan.own.is_some() || plan.change.is_some() || plan.factors.is_some();
        if untied {
            plans.insert(head_name(self.config), plan);
        }
        Ok(untied)
    }

    /// A tensor of the adapter, in f32.
    fn take(&mut self, key: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = take(self.adapter, &mut self.unused, key, shape, self.adapter_file)?;
        self.backend.to_dtype(&tensor, DType::F32)
    }

    /// What becomes of the tensor `name`, which the base's file holds as `base`.
    fn plan_tensor(&mut self, name: &str, base: &str) -> Result<Plan> {
        let stored = self.base.tensor(base)?;
        let (shape, dtype) = (stored.shape().to_vec(), stored.dtype());
        let mut plan = Plan {
            base: base.to_string(),
            own: None,
            shape: shape.clone(),
            dtype,
            change: None,
            factors: None,
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
        let conv1d = self.config.conv1d && module != self.config.names.head;
        let (inputs, outputs) = match *shape {
            [i, o] if conv1d => (i, o),
            [o, i] => (i, o),
            _ => (shape[0], shape[0]),
        };
        match (rule, kind) {
            (MergeRule::LowRank { r, scale, dora, .. }, "weight") => {
                let a = self.take(&at("lora_A.weight"), &[r, inputs])?;
                let b = self.take(&at("lora_B.weight"), &[outputs, r])?;
                let mut change = LowRank { a, b, scale: scale as f32, conv1d, factors: None };
                if dora {
                    let magnitude = self.take(&at("lora_magnitude_vector"), &[outputs])?;
                    let magnitude = self.backend.to_vec::<f32>(&magnitude)?;
                    let norms = merged_norms(self.backend, &stored, &change, outputs)?;
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
            (MergeRule::Ia3 { feedforward }, "weight") => {
                let shape = if feedforward { [1, inputs] } else { [outputs, 1] };
                let values = self.take(&at("ia3_l"), &shape)?;
                let values = self.backend.to_vec(&values)?;
                plan.factors = Some(Factors { values, of_rows: feedforward == conv1d });
            }
            (MergeRule::Ia3 { feedforward: false }, "bias") => {
                let values = self.take_again(&at("ia3_l"))?;
                plan.factors = Some(Factors { values, of_rows: false });
            }
            (MergeRule::Norm, _) => {
                plan.own = Some(self.take(&at(&format!("ln_tuning_layers.{kind}")), &shape)?)
            }
            _ => {}
        }
        Ok(plan)
    }

    /// A tensor that another plan takes too.
    fn take_again(&self, key: &str) -> Result<Vec<f32>> {
        self.backend.to_f32(&self.adapter.tensor(key)?)
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
        let shared = |key: &str| self.adapter.tensor(key);
        let (down, up) = (shared("base_model.vera_A")?, shared("base_model.vera_B")?);
        if down.shape().len() != 2
            || down.rows() != r
            || down.cols() < inputs
            || up.cols() != r
            || up.rows() < outputs
        {
            return Err(Error::tensor(
                "base_model.vera_A",
                "is too small for this base model or of another rank",
            ));
        }
        let (wide, all) = (down.cols(), self.backend.to_f32(&down)?);
        let rows = all.chunks(wide).zip(&d);
        let a: Vec<f32> = rows.flat_map(|(row, d)| row[..inputs].iter().map(move |x| x * d)).collect();
        let all = self.backend.to_f32(&up.slice(0..outputs)?)?;
        let rows = all.chunks(r).zip(&b);
        let b: Vec<f32> = rows.flat_map(|(row, b)| row.iter().map(move |x| x * b)).collect();
        self.unused.remove("base_model.vera_A");
        self.unused.remove("base_model.vera_B");
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
fn write_merged(w: &mut dyn Write, plan: &Plan, base: &Checkpoint, backend: &Backend) -> io::Result<()> {
    let stored = match &plan.own {
        Some(own) => Ok(own.clone()),
        None => base.tensor(&plan.base),
    };
    let stored = stored.map_err(io::Error::other)?;
    let flat = stored.shape().len() < 2;
    let stored =
        if flat { stored.reshape(&[1, stored.elements()]) } else { Ok(stored) }.map_err(io::Error::other)?;
    let rows = stored.shape()[0];
    let cols = stored.elements() / rows.max(1);
    let per_block = (BLOCK / cols.max(1)).clamp(1, rows.max(1));
    for first in (0..rows).step_by(per_block) {
        let range = first..(first + per_block).min(rows);
        let block = stored.slice(range.clone()).map_err(io::Error::other)?;
        let bytes = merged_block(plan, &block, range, backend).map_err(io::Error::other)?;
        w.write_all(&bytes)?;
        block.release_pages();
    }
    Ok(())
}

fn merged_block(
    plan: &Plan,
    block: &Tensor,
    rows: std::ops::Range<usize>,
    backend: &Backend,
) -> Result<Vec<u8>> {
    let mut bytes = vec![0; block.elements() * plan.dtype.size()];
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
fn block_factors(plan: &Plan, rows: &std::ops::Range<usize>) -> Option<Factors> {
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
    rows: std::ops::Range<usize>,
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
fn columns(backend: &Backend, x: &Tensor, range: std::ops::Range<usize>) -> Result<Tensor> {
    let mut out = backend.empty(&[x.rows(), range.len()], x.dtype())?;
    backend.copy_columns(&mut out, 0, x, range.start, range.len(), false)?;
    Ok(out)
}
