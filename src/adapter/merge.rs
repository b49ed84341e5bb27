//! Merging an adapter into its base: file to file, a few rows at a time, so that memory holds the adapter
//! and little else, however large the model.
//!
//! `W += scale * B A`; as in PEFT, the change is rounded to the weight's type before it is added.

use super::config::LoraConfig;
use super::io::ADAPTER_FILE;
use super::target::by_pattern;
use crate::backend::cpu::Cpu;
use crate::backend::{Backend, Gemm, GemmTerm, Matrix};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::fs::{sync_folder, temporary_sibling, write_atomic_bytes};
use crate::model::save::{StreamedTensor, copy_companions, copy_config, write_streamed};
use crate::model::{Checkpoint, ModelConfig};
use crate::tensor::Tensor;
use half::{bf16, f16};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::path::Path;

/// Elements of a weight in memory at a time.
const BLOCK: usize = 1 << 22;

/// Bytes of weights per file, as Hugging Face splits them.
const SHARD_BYTES: usize = 5_000_000_000;

/// A low-rank change of a weight.
struct LowRank {
    a: Tensor, // f32 [r, in]
    b: Tensor, // f32 [out, r]
    scale: f32,
}

/// What becomes of one tensor of the merged model.
struct Plan {
    stored: Tensor, // the base's, or the adapter's own copy
    dtype: DType,
    change: Option<LowRank>,
    bias_change: Option<(Tensor, f32)>, // lora_B.bias and the scale
}

/// Merges the adapter of one folder into the model of another; the result is a plain Hugging Face folder at
/// `output`, which must not exist. Returns a line that says what was merged.
///
/// # Errors
/// When either folder is malformed, they do not fit each other, an adapter's tensor would be left out, or
/// the output can't be written; then nothing is left behind.
pub fn merge(model_dir: &Path, adapter_dir: &Path, output: &Path) -> Result<String> {
    if output.exists() {
        return Err(Error::format(output, "exists already; choose another folder"));
    }
    let backend = Cpu::new(None)?;
    let config = ModelConfig::load(model_dir)?;
    let lora = LoraConfig::load(adapter_dir)?;
    let base = Checkpoint::open(model_dir)?;
    let adapter = Checkpoint::open_file(&adapter_dir.join(ADAPTER_FILE))?;
    let mut planner = Planner {
        backend: &backend,
        config: &config,
        lora: &lora,
        base: &base,
        adapter: &adapter,
        unused: adapter.names().collect(),
    };
    let (plans, untied) = planner.plan()?;
    let changed = plans.values().filter(|p| p.change.is_some()).count();
    let temporary = temporary_sibling(output)?;
    let written = (|| {
        fs::create_dir_all(&temporary).map_err(|e| Error::io(&temporary, e))?;
        write_shards(&temporary, &plans, &config, &backend)?;
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
    lora: &'a LoraConfig,
    base: &'a Checkpoint,
    adapter: &'a Checkpoint,
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
            let stored = self.base.tensor(name)?;
            plans.insert(name.to_string(), self.plan_tensor(&self.full_name(name), stored)?);
        }
        let untied = self.untie(&mut plans)?;
        match self.unused.first() {
            None => Ok((plans, untied)),
            Some(name) => Err(Error::tensor(
                *name,
                format!(
                    "of the adapter fits nothing in this base ({} such tensors); is it another model's?",
                    self.unused.len()
                ),
            )),
        }
    }

    /// The name with the base model's prefix, which base checkpoints leave out.
    fn full_name(&self, name: &str) -> String {
        let prefix = self.config.names.base_prefix;
        if name.starts_with(prefix) || name.starts_with(self.config.names.head) {
            name.to_string()
        } else {
            format!("{prefix}{name}")
        }
    }

    /// A head that was tied to the embedding and is so no longer, because one of them was trained.
    fn untie(&mut self, plans: &mut BTreeMap<String, Plan>) -> Result<bool> {
        let head = format!("{}.weight", self.config.names.head);
        if !self.config.tie_word_embeddings || plans.contains_key(&head) {
            return Ok(false);
        }
        let embed = format!("{}.weight", self.config.names.embed);
        let stored = match self.base.tensor(&embed) {
            Ok(tensor) => tensor,
            Err(_) => self.base.tensor(embed.trim_start_matches(self.config.names.base_prefix))?,
        };
        let before = self.unused.len();
        let plan = self.plan_tensor(&head, stored)?;
        let embedding_trained = self.adapter.contains(&format!("base_model.model.{embed}"));
        if self.unused.len() == before && !embedding_trained {
            return Ok(false);
        }
        plans.insert(head, plan);
        Ok(true)
    }

    fn take(&mut self, key: &str) -> Result<Option<Tensor>> {
        if !self.unused.remove(key) {
            return Ok(None);
        }
        Ok(Some(self.backend.to_dtype(&self.adapter.tensor(key)?, DType::F32)?))
    }

    fn plan_tensor(&mut self, name: &str, stored: Tensor) -> Result<Plan> {
        let dtype = stored.dtype();
        let mut plan = Plan { stored, dtype, change: None, bias_change: None };
        let (module, kind) = name.rsplit_once('.').unwrap_or((name, ""));
        let at = |suffix: &str| format!("base_model.model.{module}.{suffix}");
        let replacement = match kind {
            "bias" => self.take(&at("base_layer.bias"))?,
            _ => None,
        };
        if let Some(own) = replacement.or(self.take(&format!("base_model.model.{name}"))?) {
            if own.shape() != plan.stored.shape() {
                return Err(mismatch(name, own.shape(), plan.stored.shape()));
            }
            plan.stored = own;
        }
        let alpha =
            by_pattern(&self.lora.alpha_pattern, module, "alpha_pattern")?.unwrap_or(self.lora.lora_alpha);
        let rank = by_pattern(&self.lora.rank_pattern, module, "rank_pattern")?.unwrap_or(self.lora.r);
        let scale = self.lora.scale(rank, alpha) as f32;
        if kind == "weight"
            && let Some(a) = self.take(&at("lora_A.weight"))?
        {
            let b = self
                .take(&at("lora_B.weight"))?
                .ok_or_else(|| Error::tensor(at("lora_B.weight"), "missing in the adapter"))?;
            let delta = if self.is_conv1d(module) { [a.cols(), b.rows()] } else { [b.rows(), a.cols()] };
            if a.rows() != b.cols() || a.rows() != rank || delta != *plan.stored.shape() {
                return Err(mismatch(name, &delta, plan.stored.shape()));
            }
            plan.change = Some(LowRank { a, b, scale });
        }
        if kind == "bias"
            && let Some(bias) = self.take(&at("lora_B.bias"))?
        {
            plan.bias_change = Some((bias, scale));
        }
        Ok(plan)
    }

    fn is_conv1d(&self, module: &str) -> bool {
        self.config.conv1d && module != self.config.names.head
    }
}

fn mismatch(name: &str, found: &[usize], expected: &[usize]) -> Error {
    Error::tensor(
        name,
        format!(
            "the adapter is for shape {found:?} at its rank, the base has {expected:?}: it is for another base"
        ),
    )
}

fn write_shards(
    output: &Path,
    plans: &BTreeMap<String, Plan>,
    config: &ModelConfig,
    backend: &Backend,
) -> Result<()> {
    let mut shards: Vec<Vec<StreamedTensor<'_>>> = vec![Vec::new()];
    let (mut size, mut total) = (0, 0);
    for (name, plan) in plans {
        let tensor = StreamedTensor {
            name: name.clone(),
            shape: plan.stored.shape().to_vec(),
            dtype: plan.dtype,
            write: Box::new(move |w| write_merged(w, plan, config.conv1d, backend)),
        };
        if size > 0 && size + tensor.bytes() > SHARD_BYTES {
            shards.push(Vec::new());
            size = 0;
        }
        size += tensor.bytes();
        total += tensor.bytes();
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    let count = shards.len();
    if count == 1 {
        return write_streamed(&output.join("model.safetensors"), shards.pop().unwrap_or_default());
    }
    let mut weight_map = Map::new();
    for (i, shard) in shards.into_iter().enumerate() {
        let file = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
        weight_map.extend(shard.iter().map(|t| (t.name.clone(), json!(file))));
        write_streamed(&output.join(&file), shard)?;
    }
    weight_map.sort_keys();
    let index = json!({"metadata": {"total_size": total}, "weight_map": Value::Object(weight_map)});
    let text = serde_json::to_string_pretty(&index).map_err(|e| Error::format(output, e.to_string()))?;
    write_atomic_bytes(&output.join("model.safetensors.index.json"), text.as_bytes())
}

/// Writes one tensor in blocks of rows.
fn write_merged(w: &mut dyn Write, plan: &Plan, conv1d: bool, backend: &Backend) -> io::Result<()> {
    let flat = plan.stored.shape().len() < 2;
    let stored =
        if flat { plan.stored.reshape(&[1, plan.stored.elements()]) } else { Ok(plan.stored.clone()) }
            .map_err(io::Error::other)?;
    let rows = stored.shape()[0];
    let cols = stored.elements() / rows.max(1);
    let per_block = (BLOCK / cols.max(1)).clamp(1, rows.max(1));
    for first in (0..rows).step_by(per_block) {
        let range = first..(first + per_block).min(rows);
        let block = stored.slice(range.clone()).map_err(io::Error::other)?;
        let bytes = merged_block(plan, &block, range, conv1d, backend).map_err(io::Error::other)?;
        w.write_all(&bytes)?;
        block.release_pages();
    }
    Ok(())
}

fn merged_block(
    plan: &Plan,
    block: &Tensor,
    rows: std::ops::Range<usize>,
    conv1d: bool,
    backend: &Backend,
) -> Result<Vec<u8>> {
    let mut bytes = vec![0; block.elements() * plan.dtype.size()];
    let delta = match (&plan.change, &plan.bias_change) {
        (Some(change), _) => {
            let mut delta = backend.empty(block.shape(), DType::F32)?;
            let b_rows;
            let term = if conv1d {
                // Rows of [in, out] are columns of A.
                b_rows = columns(backend, &change.a, rows)?;
                GemmTerm { a: Matrix::transposed(&b_rows), b: Matrix::transposed(&change.b) }
            } else {
                b_rows = change.b.slice(rows)?;
                GemmTerm { a: Matrix::plain(&b_rows), b: Matrix::plain(&change.a) }
            };
            backend.gemm(&mut delta, &Gemm { scale: change.scale, ..Gemm::new(&[term]) })?;
            Some(backend.to_vec::<f32>(&delta)?)
        }
        (None, Some((bias, scale))) => {
            Some(backend.to_vec::<f32>(bias)?.into_iter().map(|x| x * scale).collect())
        }
        (None, None) => None,
    };
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

/// A column range of a matrix as a matrix of its own.
fn columns(backend: &Backend, x: &Tensor, range: std::ops::Range<usize>) -> Result<Tensor> {
    let mut out = backend.empty(&[x.rows(), range.len()], x.dtype())?;
    backend.copy_columns(&mut out, 0, x, range.start, range.len(), false)?;
    Ok(out)
}
