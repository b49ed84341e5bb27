//! Weights of a Hugging Face folder: one `model.safetensors`, or shards with an index; memory-mapped.
//!
//! Format: 8 bytes little-endian header length, a JSON header of names, types, shapes and byte ranges, then
//! the bytes (the safetensors format).

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::fs::read_text;
use crate::tensor::Tensor;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Where a tensor is.
#[derive(Clone, Debug)]
struct Entry {
    file: usize,
    range: std::ops::Range<usize>,
    shape: Vec<usize>,
    dtype: Dtype,
}

/// The tensors of a folder or a file, by name.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<(PathBuf, Arc<Mmap>)>,
    entries: BTreeMap<String, Entry>,
}

impl Checkpoint {
    /// Opens the weights of a model folder.
    ///
    /// # Errors
    /// When there are none (a `pytorch_model.bin` is refused: it is a pickle, which can run code), a shard
    /// is missing or outside the folder, or a file is truncated or malformed.
    pub fn open(model_dir: &Path) -> Result<Self> {
        if super::gguf::is_gguf(model_dir) {
            return Err(Error::format(
                model_dir,
                "a GGUF file can be trained on, generated with and merged into, but not quantized or saved; use the model's \
                 Hugging Face folder",
            ));
        }
        let single = model_dir.join("model.safetensors");
        if single.is_file() {
            return Self::open_file(&single);
        }
        let index = model_dir.join("model.safetensors.index.json");
        if index.is_file() {
            return Self::open_index(model_dir, &index);
        }
        for pickle in ["pytorch_model.bin", "pytorch_model.bin.index.json"] {
            if model_dir.join(pickle).is_file() {
                return Err(Error::format(
                    model_dir.join(pickle),
                    "a pickle can run code when loaded and is not read; convert it once with transformers: \
                     AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)",
                ));
            }
        }
        Err(Error::format(
            model_dir,
            "expected model.safetensors or model.safetensors.index.json, found neither",
        ))
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// When it can't be read, or is truncated or malformed.
    pub fn open_file(path: &Path) -> Result<Self> {
        let mut checkpoint = Checkpoint { files: Vec::new(), entries: BTreeMap::new() };
        for (name, entry) in checkpoint.map_file(path)? {
            checkpoint.entries.insert(name, entry);
        }
        Ok(checkpoint)
    }

    fn open_index(model_dir: &Path, index: &Path) -> Result<Self> {
        let json: Value = serde_json::from_str(&read_text(index)?)
            .map_err(|e| Error::format(index, format!("not JSON: {e}")))?;
        let weight_map = json.get("weight_map").and_then(Value::as_object).ok_or_else(|| {
            Error::format(index, "expected an object `weight_map` of tensor names to files")
        })?;
        let mut by_file: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, file) in weight_map {
            let file = file.as_str().ok_or_else(|| {
                Error::format(index, format!("`{name}`: expected a file name, found {file}"))
            })?;
            let inside = Path::new(file).components().all(|c| matches!(c, Component::Normal(_)));
            if !inside || file.is_empty() {
                return Err(Error::format(
                    index,
                    format!("`{name}`: `{file}` is not a file inside the folder"),
                ));
            }
            by_file.entry(file).or_default().push(name);
        }
        let mut checkpoint = Checkpoint { files: Vec::new(), entries: BTreeMap::new() };
        for (file, names) in by_file {
            let path = model_dir.join(file);
            if !path.is_file() {
                return Err(Error::format(
                    &path,
                    format!("this shard is named by {} but missing", index.display()),
                ));
            }
            let mut found = checkpoint.map_file(&path)?;
            for name in names {
                let entry = found.remove(name).ok_or_else(|| {
                    Error::format(
                        &path,
                        format!("tensor `{name}` should be here by {}, but is not", index.display()),
                    )
                })?;
                checkpoint.entries.insert(name.to_string(), entry);
            }
        }
        Ok(checkpoint)
    }

    fn map_file(&mut self, path: &Path) -> Result<BTreeMap<String, Entry>> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        // SAFETY: the map is read-only and private; a checkpoint that another process truncates while it is
        // in use ends this process with a bus error, as for every program that maps files.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        let bad = |e: &dyn std::fmt::Display| {
            Error::format(path, format!("not a whole safetensors file ({e}); download or copy it again"))
        };
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| bad(&e))?;
        let data = 8 + header;
        let index = self.files.len();
        let mut entries = BTreeMap::new();
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            if data + end > map.len() {
                return Err(bad(&format!("tensor `{name}` ends after the file")));
            }
            let entry = Entry {
                file: index,
                range: data + start..data + end,
                shape: info.shape.clone(),
                dtype: info.dtype,
            };
            entries.insert(name, entry);
        }
        if data + metadata.data_len() != map.len() {
            return Err(bad(&format!("{} bytes expected, {} found", data + metadata.data_len(), map.len())));
        }
        self.files.push((path.to_path_buf(), Arc::new(map)));
        Ok(entries)
    }

    /// Tells the system that no page of the files is needed now; those of tensors in use are read again.
    pub fn release_pages(&self) {
        #[cfg(unix)]
        for (_, map) in &self.files {
            // SAFETY: the map is private, read-only and file-backed: dropped pages come back from the file.
            let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        }
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether there is a tensor with this name.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Shape and type of a tensor as the file has them.
    pub fn info(&self, name: &str) -> Option<(&[usize], Dtype)> {
        self.entries.get(name).map(|e| (e.shape.as_slice(), e.dtype))
    }

    /// The bytes of a tensor of any type, in place: u8 `[bytes]`.
    ///
    /// # Errors
    /// When it is missing.
    pub fn raw(&self, name: &str) -> Result<Tensor> {
        let entry = self.entry(name)?;
        let (path, map) = &self.files[entry.file];
        Tensor::from_mapped(map.clone(), entry.range.clone(), &[entry.range.len()], DType::U8)
            .map_err(|e| Error::tensor(name, format!("in {}: {e}", path.display())))
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| {
            let files: Vec<_> = self.files.iter().map(|(p, _)| p.display().to_string()).collect();
            Error::tensor(name, format!("missing in {}", files.join(", ")))
        })
    }

    /// A tensor of floats or bytes, in place in the mapped file (copied if it is not aligned there).
    ///
    /// # Errors
    /// When it is missing or of a type that is not read.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let entry = self.entry(name)?;
        let dtype = match entry.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::U8 => DType::U8,
            other => {
                return Err(Error::tensor(
                    name,
                    format!("type {other:?} is not supported; expected F32, F16, BF16 or U8"),
                ));
            }
        };
        if entry.shape.len() > 4 {
            return Err(Error::tensor(
                name,
                format!("expected at most 4 dimensions, found {:?}", entry.shape),
            ));
        }
        let (path, map) = &self.files[entry.file];
        Tensor::from_mapped(map.clone(), entry.range.clone(), &entry.shape, dtype)
            .map_err(|e| Error::tensor(name, format!("in {}: {e}", path.display())))
    }
}
