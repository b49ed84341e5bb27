//! Writing model folders: tensors streamed to safetensors files, and the small files beside them.

use super::decoder::Model;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::fs::{read_text, write_atomic, write_atomic_bytes};
use half::bf16;
use serde_json::{Map, Value, json};
use std::fs;
use std::io::{self, Write};
use std::path::Path;

/// Files beside the weights that a model folder may have; copied as they are.
const COMPANIONS: [&str; 9] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
];

/// Writes a tensor's elements, row-major, little-endian.
pub type WriteTensor<'a> = Box<dyn Fn(&mut dyn Write) -> io::Result<()> + 'a>;

/// A tensor to be written: its description, and a function that writes its bytes.
pub struct StreamedTensor<'a> {
    /// Name in the file.
    pub name: String,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
    /// Writes the elements, row-major, little-endian.
    pub write: WriteTensor<'a>,
}

impl StreamedTensor<'_> {
    /// Bytes of the elements.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }
}

/// safetensors' name of an element type.
fn type_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "F32",
        DType::BF16 => "BF16",
        DType::F16 => "F16",
        DType::I32 => "I32",
        DType::U8 => "U8",
    }
}

/// Writes tensors to a safetensors file with PyTorch's metadata, one at a time, in the order in which the
/// safetensors library writes them (wider types first, then by name).
///
/// # Errors
/// When the file can't be written.
pub fn write_streamed(path: &Path, mut tensors: Vec<StreamedTensor<'_>>) -> Result<()> {
    tensors.sort_by(|a, b| b.dtype.size().cmp(&a.dtype.size()).then_with(|| a.name.cmp(&b.name)));
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0;
    for tensor in &tensors {
        let end = offset + tensor.bytes();
        let entry =
            json!({"dtype": type_name(tensor.dtype), "shape": tensor.shape, "data_offsets": [offset, end]});
        header.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut text = Value::Object(header).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    write_atomic(path, |w| {
        w.write_all(&(text.len() as u64).to_le_bytes())?;
        w.write_all(text.as_bytes())?;
        tensors.iter().try_for_each(|tensor| (tensor.write)(w))
    })
}

/// Bytes of weights per file, as Hugging Face splits them.
pub const SHARD_BYTES: usize = 5_000_000_000;

/// Writes `model.safetensors`, or several files of at most `shard_bytes` with an index; a larger tensor has a
/// file of its own. Neighbours in `tensors` share a file.
///
/// # Errors
/// When a file can't be written.
pub fn write_sharded(folder: &Path, tensors: Vec<StreamedTensor<'_>>, shard_bytes: usize) -> Result<()> {
    let mut shards: Vec<Vec<StreamedTensor<'_>>> = vec![Vec::new()];
    let (mut size, mut total) = (0, 0);
    for tensor in tensors {
        if size > 0 && size + tensor.bytes() > shard_bytes {
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
        return write_streamed(&folder.join("model.safetensors"), shards.pop().unwrap_or_default());
    }
    let mut weight_map = Map::new();
    for (i, shard) in shards.into_iter().enumerate() {
        let file = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
        weight_map.extend(shard.iter().map(|t| (t.name.clone(), json!(file))));
        write_streamed(&folder.join(&file), shard)?;
    }
    weight_map.sort_keys();
    let index = json!({"metadata": {"total_size": total}, "weight_map": Value::Object(weight_map)});
    let text = serde_json::to_string_pretty(&index).map_err(|e| Error::format(folder, e.to_string()))?;
    write_atomic_bytes(&folder.join("model.safetensors.index.json"), text.as_bytes())
}

/// Copies tokenizer, templates and the like from one model folder to another.
///
/// # Errors
/// When a file can't be copied.
pub fn copy_companions(from: &Path, to: &Path) -> Result<()> {
    for name in COMPANIONS {
        let source = from.join(name);
        if source.is_file() {
            let bytes = fs::read(&source).map_err(|e| Error::io(&source, e))?;
            write_atomic_bytes(&to.join(name), &bytes)?;
        }
    }
    Ok(())
}

/// Writes the `config.json` of `from` to `to` with some keys changed; null takes one out.
///
/// # Errors
/// When it can't be read or written.
pub fn copy_config(from: &Path, to: &Path, changes: &[(&str, Value)]) -> Result<()> {
    let path = from.join("config.json");
    let config: Value = serde_json::from_str(&read_text(&path)?)
        .map_err(|e| Error::format(&path, format!("not JSON: {e}")))?;
    if !config.is_object() {
        return Err(Error::format(&path, "expected a JSON object"));
    }
    write_config(to, &config, changes)
}

/// Writes a `config.json` to `to` with some keys changed; null takes one out.
///
/// # Errors
/// When it can't be written.
pub fn write_config(to: &Path, config: &Value, changes: &[(&str, Value)]) -> Result<()> {
    let mut keys = config.as_object().cloned().unwrap_or_default();
    for (key, value) in changes {
        match value {
            Value::Null => drop(keys.remove(*key)),
            value => drop(keys.insert((*key).to_string(), value.clone())),
        }
    }
    let text = serde_json::to_string_pretty(&keys).map_err(|e| Error::format(to, e.to_string()))?;
    write_atomic_bytes(&to.join("config.json"), format!("{text}\n").as_bytes())
}

/// Writes a model whose parameters are all trained (`--method full`) as a Hugging Face folder, in the type
/// of its activations, with the small files of `source`.
///
/// # Errors
/// When a file can't be written.
pub fn save_model(model: &Model, source: &Path, output: &Path) -> Result<()> {
    let tensors = model
        .params
        .ids()
        .map(|id| {
            let info = model.params.info(id);
            StreamedTensor {
                name: info.name.clone(),
                shape: info.shape.clone(),
                dtype: model.dtype,
                write: Box::new(move |w| {
                    let values = model.params.to_vec(id).map_err(io::Error::other)?;
                    if model.dtype == DType::F32 {
                        return w.write_all(bytemuck::cast_slice(&values));
                    }
                    let narrow: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
                    w.write_all(bytemuck::cast_slice(&narrow))
                }),
            }
        })
        .collect();
    write_streamed(&output.join("model.safetensors"), tensors)?;
    let name = if model.dtype == DType::F32 { "float32" } else { "bfloat16" };
    copy_config(source, output, &[("dtype", json!(name))])?;
    copy_companions(source, output)
}
