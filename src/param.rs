//! The trainable parameters: flat buffers with named slices.
//!
//! One f32 buffer of values, one of gradients, and, for bf16 training, a bf16 copy of the values that the
//! operations read. The optimizer's state is flat too, so a step is one launch, the gradient norm one
//! reduction, and a file one buffer.
//!
//! An optimizer's step may go on beside what follows it ([`Kernels::beside`](crate::backend::Kernels::beside)): whoever
//! asks the store for a parameter gets it as the step leaves it, by a wait of the device for the part of the step that
//! changes it. Handles from before the step are not told.

use crate::backend::{Backend, Mark};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

/// Slices start at multiples of this many elements, so that every view is aligned in f32 and bf16, and a block
/// of moments in eight bits never holds two parameters.
pub const SLICE_ALIGNMENT: usize = 256;

/// One parameter of a [`ParamStore`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ParamId(usize);

/// Name and place of a parameter.
#[derive(Clone, Debug)]
pub struct ParamInfo {
    /// Module path and suffix, as in the model: `model.layers.0.self_attn.q_proj.lora_A.weight`.
    pub name: String,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Whether weight decay applies (not to biases and norms).
    pub decay: bool,
    /// Whether files hold the transpose of a matrix.
    pub transposed: bool,
    /// Elements of the flat buffers.
    pub range: Range<usize>,
}

/// Collects the parameters before their buffers are made.
#[derive(Debug, Default)]
pub struct ParamLayout {
    infos: Vec<ParamInfo>,
    end: usize,
}

impl ParamLayout {
    /// Adds a parameter; names are unique within a store.
    pub fn add(&mut self, name: impl Into<String>, shape: &[usize], decay: bool) -> ParamId {
        let start = self.end;
        let elements = shape.iter().product::<usize>();
        self.end = (start + elements).next_multiple_of(SLICE_ALIGNMENT);
        self.infos.push(ParamInfo {
            name: name.into(),
            shape: shape.to_vec(),
            decay,
            transposed: false,
            range: start..start + elements,
        });
        ParamId(self.infos.len() - 1)
    }

    /// Says that files hold the transpose of a matrix.
    pub fn transpose_in_files(&mut self, id: ParamId) {
        self.infos[id.0].transposed = true;
    }

    /// Makes the buffers, all zero. `dtype` is the type that operations see (f32 or bf16).
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn build(self, backend: &Backend, dtype: DType) -> Result<ParamStore> {
        let values = backend.zeros(&[self.end], DType::F32)?;
        let compute = match dtype {
            DType::F32 => None,
            _ => Some(backend.zeros(&[self.end], dtype)?),
        };
        let unfinished = Unfinished { backend: backend.clone(), parts: Mutex::default() };
        let backend = backend.clone();
        Ok(ParamStore { unfinished, backend, infos: self.infos, values, compute, grads: None })
    }
}

/// What goes on beside the operations, in its order. Dropped before the buffers, which stay until it is done.
#[derive(Debug)]
struct Unfinished {
    backend: Backend,
    parts: Mutex<VecDeque<Part>>,
}

/// A part that changes the elements from `start` to the next part's.
#[derive(Debug)]
struct Part {
    start: usize,
    end: Mark,
    /// What it uses beside the store's buffers.
    keeps: Vec<Tensor>,
}

impl Unfinished {
    fn parts(&self) -> MutexGuard<'_, VecDeque<Part>> {
        self.parts.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Operations from now on find elements before `end` as the parts leave them.
    fn join(&self, end: usize) -> Result<()> {
        let mut parts = self.parts();
        let n = parts.partition_point(|part| part.start < end);
        let (marks, keeps): (Vec<_>, Vec<_>) = parts.drain(..n).map(|part| (part.end, part.keeps)).unzip();
        self.backend.join(marks)?;
        drop(keeps);
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // A device that fails here fails whoever asks it next.
        let _ = self.join(usize::MAX);
    }
}

/// The trainable parameters of a model and their gradients.
#[derive(Debug)]
pub struct ParamStore {
    unfinished: Unfinished,
    backend: Backend,
    infos: Vec<ParamInfo>,
    values: Tensor,          // f32 [total]
    compute: Option<Tensor>, // bf16 [total]
    grads: Option<Tensor>,   // f32 [total]
}

impl ParamStore {
    /// A store without parameters.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn empty(backend: &Backend) -> Result<Self> {
        ParamLayout::default().build(backend, DType::F32)
    }

    /// All parameters, in order.
    pub fn infos(&self) -> &[ParamInfo] {
        &self.infos
    }

    /// Ids of all parameters, in order.
    pub fn ids(&self) -> impl Iterator<Item = ParamId> + use<> {
        (0..self.infos.len()).map(ParamId)
    }

    /// Name and place of a parameter.
    pub fn info(&self, id: ParamId) -> &ParamInfo {
        &self.infos[id.0]
    }

    /// The parameter with this name.
    pub fn find(&self, name: &str) -> Option<ParamId> {
        self.infos.iter().position(|info| info.name == name).map(ParamId)
    }

    /// Number of trainable elements (without alignment gaps).
    pub fn elements(&self) -> usize {
        self.infos.iter().map(|info| info.range.len()).sum()
    }

    /// Bytes of the values and of their copy in the compute type.
    pub fn bytes(&self) -> usize {
        self.values.capacity() + self.compute.as_ref().map_or(0, Tensor::capacity)
    }

    /// Length of the flat buffers, alignment gaps included.
    pub fn flat_elements(&self) -> usize {
        self.values.elements()
    }

    /// Bytes of the gradients' buffer, if [`ParamStore::zero_grads`] made it.
    pub fn grads_bytes(&self) -> usize {
        self.grads.as_ref().map_or(0, Tensor::capacity)
    }

    /// The flat f32 buffer of values; alignment gaps hold zeros.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn values(&self) -> Result<&Tensor> {
        self.unfinished.join(self.values.elements())?;
        Ok(&self.values)
    }

    /// The flat f32 buffer of gradients, if [`ParamStore::zero_grads`] made it.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn grads(&self) -> Result<Option<&Tensor>> {
        self.finish_step()?;
        Ok(self.grads.as_ref())
    }

    /// Operations from now on come after all of an optimizer's step; all methods of the store see to what they need
    /// themselves.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn finish_step(&self) -> Result<()> {
        self.unfinished.join(usize::MAX)
    }

    /// Tells of work beside the operations that changes the elements from `start` to where the next call's begin, and of
    /// the tensors that it uses beside the store's own.
    pub(crate) fn changes_beside(&self, start: usize, end: Mark, keeps: Vec<Tensor>) {
        self.unfinished.parts().push_back(Part { start, end, keeps });
    }

    /// A parameter as operations see it: a view in the compute type.
    ///
    /// # Errors
    /// Never in practice: ranges lie within the buffers.
    pub fn value(&self, id: ParamId) -> Result<Tensor> {
        let info = &self.infos[id.0];
        self.unfinished.join(info.range.end)?;
        self.compute.as_ref().unwrap_or(&self.values).slice(info.range.clone())?.reshape(&info.shape)
    }

    /// A parameter's f32 master value: a view.
    ///
    /// # Errors
    /// Never in practice: ranges lie within the buffers.
    pub fn master(&self, id: ParamId) -> Result<Tensor> {
        let info = &self.infos[id.0];
        self.unfinished.join(info.range.end)?;
        self.values.slice(info.range.clone())?.reshape(&info.shape)
    }

    /// A parameter's f32 master value as files hold it: a view, or a copy of what they hold transposed.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn stored(&self, id: ParamId) -> Result<Tensor> {
        let value = self.master(id)?;
        if self.infos[id.0].transposed { self.backend.transposed(&value) } else { Ok(value) }
    }

    /// A parameter's f32 gradient: a view to accumulate into.
    ///
    /// # Errors
    /// When no gradients were prepared by [`ParamStore::zero_grads`].
    pub fn grad(&self, id: ParamId) -> Result<Tensor> {
        let info = &self.infos[id.0];
        let grads = self.grads()?.ok_or_else(|| {
            Error::Unsupported("gradients were not prepared before the backward pass".into())
        })?;
        grads.slice(info.range.clone())?.reshape(&info.shape)
    }

    /// Sets a parameter's value (and its compute copy).
    ///
    /// # Errors
    /// When the number of elements differs.
    pub fn set(&mut self, id: ParamId, data: &[f32]) -> Result<()> {
        let info = &self.infos[id.0];
        if data.len() != info.range.len() {
            return Err(Error::tensor(
                &info.name,
                format!("expected shape {:?}, found {} elements", info.shape, data.len()),
            ));
        }
        let mut view = self.values()?.slice(info.range.clone())?;
        self.backend.upload(&mut view, bytemuck::cast_slice(data))?;
        if let Some(compute) = &self.compute {
            self.backend.cast(&mut compute.slice(info.range.clone())?, &view)?;
        }
        Ok(())
    }

    /// Sets a parameter's value (and its compute copy) to that of a float tensor of its size.
    ///
    /// # Errors
    /// When the number of elements differs.
    pub fn copy_from(&mut self, id: ParamId, tensor: &Tensor) -> Result<()> {
        let info = &self.infos[id.0];
        let tensor = tensor.reshape(&[tensor.elements()])?;
        self.backend.cast(&mut self.values()?.slice(info.range.clone())?, &tensor)?;
        match &self.compute {
            Some(compute) => self.backend.cast(&mut compute.slice(info.range.clone())?, &tensor),
            None => Ok(()),
        }
    }

    /// A parameter's f32 values on the host.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn to_vec(&self, id: ParamId) -> Result<Vec<f32>> {
        self.backend.to_vec(&self.master(id)?)
    }

    /// Sets all gradients to zero, making their buffer on first use.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn zero_grads(&mut self) -> Result<()> {
        match &mut self.grads {
            // A step that goes on beside the operations still reads them.
            Some(grads) if !self.unfinished.parts().is_empty() => {
                let end = self.backend.beside(&mut || self.backend.fill(grads, 0.0))?;
                self.changes_beside(self.flat_elements(), end, Vec::new());
                Ok(())
            }
            Some(grads) => self.backend.fill(grads, 0.0),
            None => {
                self.grads = Some(self.backend.zeros(self.values.shape(), DType::F32)?);
                Ok(())
            }
        }
    }

    /// Copies values that a part of an optimizer's step has changed into the compute type.
    pub(crate) fn refresh_compute(&self, range: Range<usize>) -> Result<()> {
        match &self.compute {
            Some(compute) => {
                self.backend.cast(&mut compute.slice(range.clone())?, &self.values.slice(range)?)
            }
            None => Ok(()),
        }
    }
}
