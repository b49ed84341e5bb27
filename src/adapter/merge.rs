//! Merging an adapter into its base: file to file, a few rows at a time, so that memory holds the adapter
//! and little else, however large the model.
//!
//! `W += scale * B A`; as in PEFT, the change is rounded to the weight's type before it is added.

use super::config::{Bias, LoraConfig};
use super::io::{ADAPTER_FILE, CONFIG_FILE, check_all_used, open_adapter, take};
use super::reader::{Reader, read_map};
use super::target::{Target, select_targets};
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

/// A low-rank change of a weight.
struct LowRank {
    a: Tensor, // f32 [r, in]
    b: Tensor, // f32 [out, r]
    scale: f32,
    conv1d: bool, // the weight is stored [in, out]
}

/// What becomes of one tensor of the merged model.
struct Plan {
    base: String,        // name in the base's file
    own: Option<Tensor>, // f32, trained whole: in place of the base's
    shape: Vec<usize>,
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
    let lora = read_lora(adapter_dir)?;
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
    let targets = select_targets(&lora, &stored_modules(&base, &config), &config.model_type)?;
    let mut planner = Planner {
        backend: &backend,
        config: &config,
        lora: &lora,
        targets: targets.into_iter().map(|t| (t.path.clone(), t)).collect(),
        base: &base,
        adapter: &adapter,
        adapter_file: &adapter_file,
        unused: adapter.names().collect(),
    };
    let (plans, untied) = planner.plan()?;
    let changed = plans.values().filter(|p| p.change.is_some()).count();
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

/// The settings of a LoRA adapter.
fn read_lora(dir: &Path) -> Result<LoraConfig> {
    let map = read_map(dir)?;
    let reader = Reader::new(dir.join(CONFIG_FILE).display().to_string(), &map);
    match reader.kind()?.as_str() {
        "LORA" => LoraConfig::read(&reader),
        other => Err(reader.error("peft_type", format!("`{other}` can't be merged; supported: LORA"))),
    }
}

struct Planner<'a> {
    backend: &'a Backend,
    config: &'a ModelConfig,
    lora: &'a LoraConfig,
    targets: BTreeMap<String, Target>, // by module path
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
        let untied = embedding_trained || plan.own.is_some() || plan.change.is_some();
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
            bias_change: None,
        };
        let (module, kind) = name.rsplit_once('.').unwrap_or((name, ""));
        let at = |suffix: &str| format!("base_model.model.{module}.{suffix}");
        let target = self.targets.get(module).cloned();
        if self.is_trained_whole(module, kind, &shape) {
            let of_target = kind == "bias" && target.is_some();
            let key = if of_target { at("base_layer.bias") } else { at(kind) };
            plan.own = Some(self.take(&key, &shape)?);
        }
        let Some(target) = target else { return Ok(plan) };
        let scale = target.scale as f32;
        if kind == "weight" {
            let conv1d = self.config.conv1d && module != self.config.names.head;
            let (inputs, outputs) = if conv1d { (shape[0], shape[1]) } else { (shape[1], shape[0]) };
            let a = self.take(&at("lora_A.weight"), &[target.r, inputs])?;
            let b = self.take(&at("lora_B.weight"), &[outputs, target.r])?;
            plan.change = Some(LowRank { a, b, scale, conv1d });
        }
        if kind == "bias" && self.lora.lora_bias {
            plan.bias_change = Some((self.take(&at("lora_B.bias"), &shape)?, scale));
        }
        Ok(plan)
    }

    /// Whether the settings say that the adapter has this parameter of the base.
    fn is_trained_whole(&self, module: &str, kind: &str, shape: &[usize]) -> bool {
        let kept = self.lora.targets.modules_to_save.iter().any(|name| module.ends_with(name.as_str()));
        let by_bias = match self.lora.bias {
            Bias::None => false,
            Bias::All => true,
            Bias::LoraOnly => self.targets.contains_key(module),
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
        (Some(change), _) => {
            let mut delta = backend.empty(block.shape(), DType::F32)?;
            let b_rows;
            let term = if change.conv1d {
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
