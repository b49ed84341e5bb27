//! A base model quantized on disk, in bitsandbytes' form: file to file, a weight at a time.

use super::bnb;
use super::checkpoint::Checkpoint;
use super::config::ModelConfig;
use super::module::ModuleKind;
use super::save::{SHARD_BYTES, StreamedTensor, copy_companions, copy_config, write_sharded};
use super::stored::{full_name, head_name, stored_modules};
use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::fs::{sync_folder, temporary_sibling};
use crate::quant::{QuantConfig, Quantized};
use crate::tensor::Tensor;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

/// Bytes of a stored tensor that are copied at a time.
const COPY_BYTES: usize = 1 << 24;

/// Quantizes the linear layers of the model in `model_dir`, all but the head, into a folder that transformers
/// loads; `output` must not exist. `compute` is written as `bnb_4bit_compute_dtype`. Returns the number of
/// quantized weights.
///
/// # Errors
/// When the folder is malformed or quantized already, bitsandbytes has no form for the format, a weight has
/// elements that are not finite, or the output can't be written; then nothing is left behind.
pub fn quantize(
    model_dir: &Path,
    output: &Path,
    backend: &Backend,
    quant: &QuantConfig,
    compute: DType,
) -> Result<usize> {
    if output.exists() {
        return Err(Error::format(output, "exists already; choose another folder"));
    }
    quant.check()?;
    if !bnb::FORMATS.contains(&quant.format.name) {
        return Err(Error::config(
            "quantize",
            "quant",
            format!("`{}` has no form on disk; expected {}", quant.format.name, bnb::FORMATS.join(" or ")),
        ));
    }
    let config = ModelConfig::load(model_dir)?;
    let base = Checkpoint::open(model_dir)?;
    let linears: BTreeMap<String, bool> = stored_modules(&base, &config)
        .into_iter()
        .filter(|m| matches!(m.kind, ModuleKind::Linear | ModuleKind::Conv1d) && !m.is_head)
        .map(|m| (format!("{}.weight", m.path), m.kind == ModuleKind::Conv1d))
        .collect();
    let latest = RefCell::new(None);
    let job = Job { base: &base, backend, quant, latest: &latest };
    let mut tensors = Vec::new();
    for stored in base.names() {
        if bnb::is_quantized(&base, stored) {
            return Err(Error::tensor(stored, "is quantized already"));
        }
        let name = full_name(stored, &config);
        // Buffers such as GPT-2's causal masks are not weights; a tied head is the embedding.
        let tensor = match base.tensor(stored) {
            Ok(tensor) if tensor.dtype().is_float() => tensor,
            _ => continue,
        };
        if config.tie_word_embeddings && name == head_name(&config) {
            continue;
        }
        match linears.get(&name) {
            Some(conv1d) => tensors.extend(job.quantized(stored, &name, &tensor, *conv1d)?),
            None => tensors.push(job.copied(&name, tensor)),
        }
    }
    let temporary = temporary_sibling(output)?;
    let written = (|| {
        fs::create_dir_all(&temporary).map_err(|e| Error::io(&temporary, e))?;
        write_sharded(&temporary, tensors, SHARD_BYTES)?;
        let settings = bnb::quantization_config(quant, compute);
        copy_config(model_dir, &temporary, &[("quantization_config", settings)])?;
        copy_companions(model_dir, &temporary)?;
        fs::rename(&temporary, output).map_err(|e| Error::io(output, e))
    })();
    if written.is_err() {
        let _ = fs::remove_dir_all(&temporary);
    }
    written?;
    sync_folder(output);
    Ok(linears.len())
}

/// The weight that was quantized last: its parts are written one after the other.
type Latest = RefCell<Option<(String, Quantized)>>;

#[derive(Clone, Copy)]
struct Job<'a> {
    base: &'a Checkpoint,
    backend: &'a Backend,
    quant: &'a QuantConfig,
    latest: &'a Latest,
}

impl<'a> Job<'a> {
    /// A tensor written as it is.
    fn copied(self, name: &str, tensor: Tensor) -> StreamedTensor<'a> {
        StreamedTensor {
            name: name.to_string(),
            shape: tensor.shape().to_vec(),
            dtype: tensor.dtype(),
            write: Box::new(move |w| {
                let flat = tensor.reshape(&[tensor.elements()]).map_err(io::Error::other)?;
                let step = COPY_BYTES / tensor.dtype().size();
                for start in (0..flat.elements()).step_by(step) {
                    let part =
                        flat.slice(start..(start + step).min(flat.elements())).map_err(io::Error::other)?;
                    let mut bytes = vec![0; part.bytes()];
                    self.backend.download(&part, &mut bytes).map_err(io::Error::other)?;
                    part.release_pages();
                    w.write_all(&bytes)?;
                }
                Ok(())
            }),
        }
    }

    /// The tensors that stand for one quantized weight: the small ones are kept, the large ones made again when
    /// they are written.
    fn quantized(
        self,
        stored: &'a str,
        name: &str,
        weight: &Tensor,
        conv1d: bool,
    ) -> Result<Vec<StreamedTensor<'a>>> {
        let dtype = weight.dtype();
        let parts = bnb::tensors(name, &self.matrix(stored, conv1d)?, dtype, self.backend)?;
        let name = name.to_string();
        let streamed = |(index, (part, tensor)): (usize, (String, Tensor))| {
            if part != name && !part.ends_with(".absmax") {
                return self.copied(&part, tensor);
            }
            let (shape, dtype, name) = (tensor.shape().to_vec(), tensor.dtype(), name.clone());
            let write = Box::new(move |w: &mut dyn Write| {
                let matrix = self.matrix(stored, conv1d).map_err(io::Error::other)?;
                let parts = bnb::tensors(&name, &matrix, dtype, self.backend).map_err(io::Error::other)?;
                let mut bytes = vec![0; parts[index].1.bytes()];
                self.backend.download(&parts[index].1, &mut bytes).map_err(io::Error::other)?;
                w.write_all(&bytes)
            });
            StreamedTensor { name: part, shape, dtype, write }
        };
        Ok(parts.into_iter().enumerate().map(streamed).collect())
    }

    fn matrix(self, stored: &str, conv1d: bool) -> Result<Quantized> {
        if let Some((name, matrix)) = &*self.latest.borrow()
            && name == stored
        {
            return Ok(matrix.clone());
        }
        *self.latest.borrow_mut() = None;
        let weight = self.base.tensor(stored)?;
        let upright = if conv1d { self.backend.transposed(&weight)? } else { weight.clone() };
        let matrix =
            self.backend.quantize(&upright, self.quant).map_err(|e| Error::tensor(stored, e.to_string()))?;
        weight.release_pages();
        *self.latest.borrow_mut() = Some((stored.to_string(), matrix.clone()));
        Ok(matrix)
    }
}
