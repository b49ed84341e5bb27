//! GGUF files as bases: weights, settings, tokenizer and chat template in one file.
//!
//! Layout: the magic `GGUF`, a version (2 or 3), the numbers of tensors and of keys; the keys with typed values; the
//! tensors' names, dimensions (the fastest first), types and offsets; then, aligned, their bytes. Everything is
//! little-endian. Source: ggml's `docs/gguf.md`.

pub mod dequantize;
mod names;
mod own;

use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::bnb::torch_name;
use crate::model::config::ModelConfig;
use crate::model::rope::RopeScaling;
use crate::quant::Quantized;
use crate::tensor::Tensor;
use dequantize::{GgmlType, TYPES};
use memmap2::Mmap;
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Keys, tensors or elements of an array that a file may have at most; more is a damaged one.
const MAX_COUNT: u64 = 1 << 24;

/// Factors on the rotary frequencies.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Whether a path names a GGUF file.
pub fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) && path.is_file()
}

#[derive(Clone, Debug)]
struct Entry {
    kind: GgmlType,
    /// The slowest first, as everywhere else.
    shape: Vec<usize>,
    /// Within the file.
    range: std::ops::Range<usize>,
}

/// An open GGUF file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    map: Arc<Mmap>,
    keys: Map<String, Value>,
    tensors: BTreeMap<String, Entry>,
}

/// A reader that never leaves its bytes.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

type Parsed<T> = std::result::Result<T, String>;

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Parsed<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.bytes.len());
        let end =
            end.ok_or_else(|| format!("ends at byte {}, in the middle of its header", self.bytes.len()))?;
        let bytes = &self.bytes[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    fn u32(&mut self) -> Parsed<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Parsed<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn count(&mut self, what: &str) -> Parsed<usize> {
        match self.u64()? {
            n if n <= MAX_COUNT => Ok(n as usize),
            n => Err(format!("says that it has {n} {what}")),
        }
    }

    fn string(&mut self) -> Parsed<String> {
        let n = self.u64()?;
        let bytes = self.take(usize::try_from(n).map_err(|_| format!("has a text of {n} bytes"))?)?;
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    /// A value of the type numbered `kind`; arrays may not hold arrays.
    fn value(&mut self, kind: u32, nested: bool) -> Parsed<Value> {
        Ok(match kind {
            0 => json!(self.array::<1>()?[0]),
            1 => json!(self.array::<1>()?[0] as i8),
            2 => json!(u16::from_le_bytes(self.array()?)),
            3 => json!(i16::from_le_bytes(self.array()?)),
            4 => json!(self.u32()?),
            5 => json!(i32::from_le_bytes(self.array()?)),
            6 => json!(f32::from_le_bytes(self.array()?)),
            7 => json!(self.array::<1>()?[0] != 0),
            8 => json!(self.string()?),
            9 if !nested => {
                let kind = self.u32()?;
                let n = self.count("elements in an array")?;
                let mut list = Vec::new();
                for _ in 0..n {
                    list.push(self.value(kind, true)?);
                }
                Value::Array(list)
            }
            10 => json!(self.u64()?),
            11 => json!(i64::from_le_bytes(self.array()?)),
            12 => json!(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("has a key of the unknown type {other}")),
        })
    }
}

impl Gguf {
    /// Opens a file and checks that every tensor lies within it.
    ///
    /// # Errors
    /// When it can't be read, is truncated or malformed, or has a type of tensor that is not known.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        // SAFETY: the map is read-only and private; a file that another process truncates while it is in use ends this
        // process with a bus error, as for every program that maps files.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        let (keys, tensors) =
            parse(&map).map_err(|e| Error::format(path, format!("not a whole GGUF file: it {e}")))?;
        Ok(Gguf { path: path.to_path_buf(), map: Arc::new(map), keys, tensors })
    }

    /// The value of a key.
    pub fn key(&self, name: &str) -> Option<&Value> {
        self.keys.get(name)
    }

    /// The names of the tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The dimensions of a tensor, the slowest first, and ggml's name of its type.
    pub fn info(&self, name: &str) -> Option<(&[usize], &'static str)> {
        self.tensors.get(name).map(|entry| (entry.shape.as_slice(), entry.kind.name))
    }

    /// The bytes of a tensor within the file.
    pub fn range(&self, name: &str) -> Option<std::ops::Range<usize>> {
        self.tensors.get(name).map(|entry| entry.range.clone())
    }

    /// The model's configuration, from the file's keys.
    ///
    /// # Errors
    /// When the architecture is not known, or a key is missing or not supported.
    pub fn config(&self) -> Result<ModelConfig> {
        let value = names::config(self)?;
        let mut config = ModelConfig::from_json(&self.path, &value)?;
        self.read_rope_factors(&mut config)?;
        Ok(config)
    }

    /// The `config.json` of the model's folder, with weights of `dtype`.
    ///
    /// # Errors
    /// As [`Gguf::config`].
    pub fn config_json(&self, dtype: DType) -> Result<Value> {
        let (config, mut value) = (self.config()?, names::config(self)?);
        if let Some(keys) = value.as_object_mut() {
            keys.retain(|_, value| !value.is_null());
            keys.insert("dtype".into(), json!(torch_name(dtype)));
            if let Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            }) = config.rope.map(|rope| rope.scaling)
            {
                let scaling = json!({
                    "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
                    "high_freq_factor": high_freq_factor,
                    "original_max_position_embeddings": original_max_position_embeddings as u64,
                });
                keys.insert("rope_scaling".into(), scaling);
            }
        }
        Ok(value)
    }

    /// The names that transformers has for the tensors.
    ///
    /// # Errors
    /// When one is of no module of the model.
    pub fn full_names(&self, config: &ModelConfig) -> Result<Vec<String>> {
        let weights = self.tensors.keys().filter(|own| *own != ROPE_FACTORS);
        let full = |own: &String| {
            names::full_name(own, config)
                .ok_or_else(|| Error::tensor(own, format!("is not one of {}", config.model_type)))
        };
        weights.map(full).collect()
    }

    /// The dimensions of what transformers names `name`.
    ///
    /// # Errors
    /// When it is missing.
    pub fn shape(&self, name: &str, config: &ModelConfig) -> Result<&[usize]> {
        Ok(&self.entry(&self.own_name(name, config)?)?.shape)
    }

    /// Llama 3's frequencies come as factors by pair: those that its scaling gives, with 8,192 original positions.
    fn read_rope_factors(&self, config: &mut ModelConfig) -> Result<()> {
        let (Some(entry), Some(rope)) = (self.tensors.get(ROPE_FACTORS), &mut config.rope) else {
            return Ok(());
        };
        let factors = self.values(entry);
        let plain = rope.inverse_frequencies();
        rope.scaling = RopeScaling::Llama3 {
            factor: f64::from(factors.iter().copied().fold(1.0, f32::max)),
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        let scaled = rope.inverse_frequencies();
        let same = factors.len() == plain.len()
            && plain.iter().zip(&scaled).zip(&factors).all(|((p, s), f)| (p / s - f).abs() <= 1e-3 * f);
        match same {
            true => Ok(()),
            false => Err(Error::tensor(
                ROPE_FACTORS,
                "holds frequencies that are not Llama 3's and is not supported",
            )),
        }
    }

    /// The matrix named `own` in the file, in its own codes and constants; `None` if its type has no format with the same
    /// values. `dtype` is the type that it stands for.
    ///
    /// # Errors
    /// When it is missing or memory can't be had.
    pub fn matrix(&self, own: &str, backend: &Backend, dtype: DType) -> Result<Option<Quantized>> {
        let entry = self.entry(own)?;
        own::matrix(entry, &self.map[entry.range.clone()], |row| row, backend, dtype)
    }

    /// [`Gguf::matrix`] of what transformers names `name`.
    ///
    /// # Errors
    /// As [`Gguf::matrix`].
    pub fn own_matrix(
        &self,
        name: &str,
        config: &ModelConfig,
        backend: &Backend,
        dtype: DType,
    ) -> Result<Option<Quantized>> {
        let own = self.own_name(name, config)?;
        let entry = self.entry(&own)?;
        let order = names::rows(self, &own, config, entry.shape[0]);
        own::matrix(entry, &self.map[entry.range.clone()], order, backend, dtype)
    }

    fn entry(&self, own: &str) -> Result<&Entry> {
        let entry = self.tensors.get(own);
        entry.ok_or_else(|| Error::tensor(own, format!("missing in {}", self.path.display())))
    }

    /// The file's name of what transformers names `name`.
    fn own_name(&self, name: &str, config: &ModelConfig) -> Result<String> {
        names::own_name(name, config)
            .filter(|own| self.tensors.contains_key(own))
            .ok_or_else(|| Error::tensor(name, format!("missing in {}", self.path.display())))
    }

    /// All elements in f32.
    fn values(&self, entry: &Entry) -> Vec<f32> {
        let mut values = vec![0.0; entry.shape.iter().product()];
        entry.kind.dequantize(&self.map[entry.range.clone()], &mut values);
        values
    }

    /// The tensor that transformers names `name`, in `dtype`; `config` is the model's.
    ///
    /// # Errors
    /// When there is none, or memory can't be had.
    pub fn tensor(
        &self,
        name: &str,
        config: &ModelConfig,
        backend: &Backend,
        dtype: DType,
    ) -> Result<Tensor> {
        let own = self.own_name(name, config)?;
        let entry = self.entry(&own)?;
        let cols = entry.shape.last().copied().unwrap_or(1).max(1);
        let rows = entry.shape.iter().product::<usize>() / cols;
        let row_bytes = cols / entry.kind.block * entry.kind.bytes;
        let order = names::rows(self, &own, config, rows);
        let out = backend.empty(&[rows, cols], dtype)?;
        let bytes = &self.map[entry.range.clone()];
        // A backend that only counts reads nothing.
        let counting = backend.arena().is_counting();
        for start in (0..rows).step_by(ROWS).filter(|_| !counting) {
            let end = (start + ROWS).min(rows);
            let mut values = vec![0f32; (end - start) * cols];
            values.par_chunks_mut(cols).enumerate().for_each(|(i, values)| {
                let from = order(start + i) * row_bytes;
                entry.kind.dequantize(&bytes[from..from + row_bytes], values);
            });
            if names::is_shifted(&own, config) {
                values.iter_mut().for_each(|w| *w -= 1.0);
            }
            let values = backend.from_slice(&values, &[end - start, cols])?;
            backend.cast(&mut out.slice(start..end)?, &values)?;
        }
        out.reshape(&entry.shape)
    }
}

/// Rows that are decoded at a time.
const ROWS: usize = 1024;

fn parse(bytes: &[u8]) -> Parsed<(Map<String, Value>, BTreeMap<String, Entry>)> {
    let mut cursor = Cursor { bytes, at: 0 };
    if cursor.take(4)? != b"GGUF" {
        return Err("does not begin with GGUF".into());
    }
    match cursor.u32()? {
        2 | 3 => {}
        other => return Err(format!("has version {other}; supported: 2 and 3, little-endian")),
    }
    let (tensors, keys) = (cursor.count("tensors")?, cursor.count("keys")?);
    let mut map = Map::new();
    for _ in 0..keys {
        let name = cursor.string()?;
        let kind = cursor.u32()?;
        map.insert(name, cursor.value(kind, false)?);
    }
    let mut found = Vec::new();
    for _ in 0..tensors {
        let name = cursor.string()?;
        let n_dims = cursor.u32()?;
        if !(1..=4).contains(&n_dims) {
            return Err(format!("gives `{name}` {n_dims} dimensions"));
        }
        let mut shape = Vec::new();
        for _ in 0..n_dims {
            shape.push(usize::try_from(cursor.u64()?).map_err(|_| format!("gives `{name}` an absurd size"))?);
        }
        shape.reverse();
        let id = cursor.u32()?;
        let kind = TYPES.into_iter().find(|t| t.id == id).ok_or_else(|| {
            let known: Vec<&str> = TYPES.iter().map(|t| t.name).collect();
            format!("has `{name}` in the type numbered {id}; supported: {}", known.join(", "))
        })?;
        found.push((name, kind, shape, cursor.u64()?));
    }
    let alignment = map.get("general.alignment").and_then(Value::as_u64).unwrap_or(32);
    if !(1..=1 << 20).contains(&alignment) {
        return Err(format!("has an alignment of {alignment}"));
    }
    let data = cursor.at.next_multiple_of(alignment as usize);
    let mut entries = BTreeMap::new();
    for (name, kind, shape, offset) in found {
        let outside =
            || format!("has `{name}` {shape:?} outside its {} bytes; download or copy it again", bytes.len());
        let elements = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).ok_or_else(outside)?;
        if shape.last().is_none_or(|cols| cols % kind.block != 0) || elements == 0 {
            return Err(format!(
                "has `{name}` {shape:?} in {}, whose blocks have {} elements",
                kind.name, kind.block
            ));
        }
        let length = (elements / kind.block).checked_mul(kind.bytes);
        let start = usize::try_from(offset).ok().and_then(|offset| data.checked_add(offset));
        let range = start.zip(length).and_then(|(start, n)| Some(start..start.checked_add(n)?));
        let range = range.filter(|r| r.end <= bytes.len()).ok_or_else(outside)?;
        if entries.insert(name.clone(), Entry { kind, shape, range }).is_some() {
            return Err(format!("has two tensors named `{name}`"));
        }
    }
    Ok((map, entries))
}
