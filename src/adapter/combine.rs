//! A weighted combination of LoRA adapters as one adapter, folder to folder, as PEFT's `add_weighted_adapter`.
//!
//! With `w` an adapter's weight times its scale: `linear` adds `sqrt(w) A` and `sqrt(w) B`, for adapters of one rank;
//! `cat` puts `w A` and `B` of all beside each other, which is exact; `svd` is the best adapter of a rank for the sum of
//! the changes. The result has scale 1, also where rank-stabilized adapters go in (PEFT scales those by `sqrt(r)` again).

use super::config::LoraConfig;
use super::io::{ADAPTER_FILE, CONFIG_FILE, COPY_SUFFIX, PREFIX, open_adapter, streamed_f32};
use super::method::save_settings;
use super::reader::{Reader, read_map};
use super::target::{TargetModules, Targeting, target_at};
use crate::backend::cpu::Cpu;
use crate::error::{Error, Result};
use crate::math::svd::low_rank_svd;
use crate::model::save::write_streamed;
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;

/// How adapters are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CombinationType {
    /// Sum of the matrices.
    Linear,
    /// Matrices side by side.
    Cat,
    /// The nearest adapter of a rank; `None`: the largest of the adapters'.
    Svd(Option<usize>),
}

impl FromStr for CombinationType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "linear" => Ok(CombinationType::Linear),
            "cat" => Ok(CombinationType::Cat),
            "svd" => Ok(CombinationType::Svd(None)),
            other => Err(Error::config(
                "combine",
                "combination_type",
                format!("`{other}` is not supported; supported: linear, cat, svd"),
            )),
        }
    }
}

/// One adapter's matrices for a module, row-major.
struct Part {
    a: Vec<f32>, // [r, in]
    b: Vec<f32>, // [out, r]
    r: usize,
    weight: f64,                 // times the scale
    suffixes: [&'static str; 2], // of A and B in the file
}

/// What follows a module's path in the names of A and B: of a linear layer, of an embedding.
const SUFFIXES: [[&str; 2]; 2] =
    [[".lora_A.weight", ".lora_B.weight"], [".lora_embedding_A", ".lora_embedding_B"]];

/// A module's combined matrices.
struct Combined {
    a: Vec<f32>,
    b: Vec<f32>,
    shape: [usize; 3], // r, in, out
}

/// Combines the adapters of some folders with their weights into `output`, which must not hold one.
///
/// # Errors
/// When a folder is not a LoRA adapter, the adapters do not fit each other, one has tensors besides A and B, or the output
/// can't be written.
pub fn combine(adapters: &[(&Path, f64)], kind: CombinationType, output: &Path) -> Result<usize> {
    if adapters.is_empty() {
        return Err(Error::config("combine", "adapters", "expected at least one"));
    }
    if output.join(ADAPTER_FILE).exists() {
        return Err(Error::format(output, "holds an adapter already; choose another folder"));
    }
    let mut modules: BTreeMap<String, Vec<Part>> = BTreeMap::new();
    let mut copies = BTreeMap::new();
    let mut configs = Vec::new();
    for (dir, weight) in adapters {
        let config = read_parts(dir, *weight, &mut modules, &mut copies)?;
        configs.push(config);
    }
    let rank = match kind {
        CombinationType::Cat => configs.iter().map(|c| c.r).sum(),
        CombinationType::Svd(Some(rank)) if rank > 0 => rank,
        _ => configs.iter().map(|c| c.r).max().unwrap_or(0),
    };
    let widest = modules.values().map(|parts| parts.iter().map(|p| p.r).sum::<usize>()).max().unwrap_or(0);
    let rank = if kind == CombinationType::Cat { rank.max(widest) } else { rank };
    let first = &configs[0];
    let config = LoraConfig {
        r: rank,
        lora_alpha: rank as f64,
        targets: Targeting {
            fan_in_fan_out: first.targets.fan_in_fan_out,
            // By full paths: the adapters may be on different layers.
            ..TargetModules::Names(modules.keys().cloned().collect()).into()
        },
        origin: first.origin.clone(),
        ..LoraConfig::default()
    };
    let backend = Cpu::new(None)?;
    let mut tensors = Vec::new();
    for (module, parts) in &modules {
        let Combined { a, b, shape: [r, inputs, outputs] } = combine_module(module, parts, kind, rank)?;
        let [a_key, b_key] = parts[0].suffixes.map(|suffix| format!("{PREFIX}{module}{suffix}"));
        tensors.push(streamed_f32(&backend, a_key, backend.from_slice(&a, &[r, inputs])?));
        tensors.push(streamed_f32(&backend, b_key, backend.from_slice(&b, &[outputs, r])?));
    }
    tensors.extend(copies.into_iter().map(|(key, copy)| streamed_f32(&backend, key, copy)));
    std::fs::create_dir_all(output).map_err(|e| Error::io(output, e))?;
    write_streamed(&output.join(ADAPTER_FILE), tensors)?;
    save_settings(config.settings(), output)?;
    Ok(modules.len())
}

/// Reads an adapter's matrices.
fn read_parts(
    dir: &Path,
    weight: f64,
    modules: &mut BTreeMap<String, Vec<Part>>,
    copies: &mut BTreeMap<String, Tensor>,
) -> Result<LoraConfig> {
    let map = read_map(dir)?;
    let reader = Reader::new(dir.join(CONFIG_FILE).display().to_string(), &map);
    if reader.kind()? != "LORA" {
        return Err(reader.error("peft_type", "only LoRA adapters can be combined"));
    }
    let config = LoraConfig::read(&reader)?;
    let checkpoint = open_adapter(dir)?;
    let values = |name: &str| -> Result<(Vec<f32>, [usize; 2])> {
        let tensor = checkpoint.tensor(name)?;
        let &[rows, cols] = tensor.shape() else {
            return Err(Error::tensor(name, format!("expected a matrix, found {:?}", tensor.shape())));
        };
        Ok((Cpu::new(Some(1))?.to_f32(&tensor)?, [rows, cols]))
    };
    for name in checkpoint.names() {
        let part = |suffixes: [&'static str; 2]| {
            Some((name.strip_prefix(PREFIX)?.strip_suffix(suffixes[0])?, suffixes))
        };
        let Some((module, suffixes)) = SUFFIXES.into_iter().find_map(part) else {
            if SUFFIXES.iter().any(|[_, b]| name.ends_with(b)) {
                continue;
            }
            if name.ends_with(COPY_SUFFIX) {
                keep_copy(name, checkpoint.tensor(name)?, copies)?;
                continue;
            }
            return Err(Error::tensor(
                name,
                format!(
                    "in {}: only A and B can be combined, no magnitudes, biases or whole modules",
                    dir.display()
                ),
            ));
        };
        let other = format!("{PREFIX}{module}{}", suffixes[1]);
        let ((a, [r, inputs]), (b, [outputs, r_b])) = (values(name)?, values(&other)?);
        let target = target_at(&config, module)?;
        if r != r_b || r != target.r {
            return Err(Error::tensor(
                other,
                format!("rank {r_b}, expected {} by the settings and {r} by lora_A", target.r),
            ));
        }
        let known = modules.entry(module.to_string()).or_default();
        if let Some(first) = known.first()
            && (first.a.len() / first.r != inputs || first.b.len() / first.r != outputs)
        {
            return Err(Error::tensor(
                name,
                "has other dimensions than in the other adapters: another base model",
            ));
        }
        known.push(Part { a, b, r, weight: weight * target.scale, suffixes });
    }
    Ok(config)
}

/// The base's own weight beside an adapter on an embedding or a head, as PEFT writes it: kept where all have the same.
fn keep_copy(name: &str, copy: Tensor, copies: &mut BTreeMap<String, Tensor>) -> Result<()> {
    let backend = Cpu::new(Some(1))?;
    match copies.get(name) {
        Some(known)
            if known.shape() != copy.shape() || backend.to_f32(known)? != backend.to_f32(&copy)? =>
        {
            Err(Error::tensor(name, "is another in the other adapters: they are for different base models"))
        }
        Some(_) => Ok(()),
        None => {
            copies.insert(name.to_string(), copy);
            Ok(())
        }
    }
}

fn combine_module(module: &str, parts: &[Part], kind: CombinationType, rank: usize) -> Result<Combined> {
    let (inputs, outputs) = (parts[0].a.len() / parts[0].r, parts[0].b.len() / parts[0].r);
    let shape = [rank, inputs, outputs];
    match kind {
        CombinationType::Linear => {
            let (mut a, mut b) = (vec![0.0; rank * inputs], vec![0.0; outputs * rank]);
            for part in parts {
                if part.r != rank {
                    return Err(Error::tensor(
                        module,
                        format!(
                            "rank {} beside {rank}: linear needs adapters of one rank; use cat or svd",
                            part.r
                        ),
                    ));
                }
                let root = part.weight.abs().sqrt() as f32;
                let signed = if part.weight < 0.0 { -root } else { root };
                a.iter_mut().zip(&part.a).for_each(|(sum, x)| *sum += signed * x);
                b.iter_mut().zip(&part.b).for_each(|(sum, x)| *sum += root * x);
            }
            Ok(Combined { a, b, shape })
        }
        CombinationType::Cat => {
            let (a, b) = side_by_side(parts, inputs, outputs, rank);
            Ok(Combined { a, b, shape })
        }
        CombinationType::Svd(_) => {
            let total = parts.iter().map(|p| p.r).sum();
            let (a, b) = side_by_side(parts, inputs, outputs, total);
            let (up, down) = low_rank_svd(&b, &a, [outputs, total, inputs], rank);
            Ok(Combined { a: down, b: up, shape })
        }
    }
}

/// `w A` below each other and B beside each other, zeros up to `rank`.
fn side_by_side(parts: &[Part], inputs: usize, outputs: usize, rank: usize) -> (Vec<f32>, Vec<f32>) {
    let (mut a, mut b) = (vec![0.0; rank * inputs], vec![0.0; outputs * rank]);
    let mut first = 0;
    for part in parts {
        let weight = part.weight as f32;
        for (to, from) in a[first * inputs..].iter_mut().zip(&part.a) {
            *to = weight * from;
        }
        for (row, from) in b.chunks_mut(rank).zip(part.b.chunks(part.r)) {
            row[first..first + part.r].copy_from_slice(from);
        }
        first += part.r;
    }
    (a, b)
}
