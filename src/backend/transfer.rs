//! Tensors from and to the host's elements.

use super::Kernels;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

impl dyn Kernels {
    /// A tensor of zeros.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn zeros(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let mut out = self.empty(shape, dtype)?;
        if dtype.is_float() {
            self.fill(&mut out, 0.0)?;
        } else {
            let zeros = vec![0u8; out.bytes()];
            self.upload(&mut out, &zeros)?;
        }
        Ok(out)
    }

    /// A tensor with these elements.
    ///
    /// # Errors
    /// When the number of elements does not fit the shape, or memory can't be had.
    pub fn from_slice<T: Element>(&self, data: &[T], shape: &[usize]) -> Result<Tensor> {
        let mut out = self.empty(shape, T::DTYPE)?;
        if out.elements() != data.len() {
            return Err(Error::shape("upload", format!("{} elements for shape {shape:?}", data.len())));
        }
        self.upload(&mut out, bytemuck::cast_slice(data))?;
        Ok(out)
    }

    /// The elements of `x`, which must be of type `T`.
    ///
    /// # Errors
    /// When the type differs.
    pub fn to_vec<T: Element>(&self, x: &Tensor) -> Result<Vec<T>> {
        if x.dtype() != T::DTYPE {
            return Err(Error::shape("download", format!("expected {}, found {}", T::DTYPE, x.dtype())));
        }
        let mut data = vec![T::zeroed(); x.elements()];
        self.download(x, bytemuck::cast_slice_mut(&mut data))?;
        Ok(data)
    }

    /// The elements of a float tensor as f32.
    ///
    /// # Errors
    /// When the tensor is not of floats, or memory can't be had.
    pub fn to_f32(&self, x: &Tensor) -> Result<Vec<f32>> {
        if x.dtype() == DType::F32 {
            return self.to_vec(x);
        }
        let mut wide = self.empty(x.shape(), DType::F32)?;
        self.cast(&mut wide, x)?;
        self.to_vec(&wide)
    }

    /// A copy of `x` in type `dtype`; `x` itself (a shared handle) when it has that type already.
    ///
    /// # Errors
    /// When `x` is not of floats, or memory can't be had.
    pub fn to_dtype(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        if x.dtype() == dtype {
            return self.place(x);
        }
        let mut out = self.empty(x.shape(), dtype)?;
        self.cast(&mut out, x)?;
        Ok(out)
    }

    /// The transpose of a matrix of any type, in memory of its own. Waits.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn transposed(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, cols, size) = (x.rows(), x.cols(), x.dtype().size());
        let mut from = vec![0u8; x.bytes()];
        self.download(x, &mut from)?;
        let mut to = vec![0u8; x.bytes()];
        for (i, element) in from.chunks_exact(size).enumerate() {
            let at = (i % cols * rows + i / cols) * size;
            to[at..at + size].copy_from_slice(element);
        }
        let mut out = self.empty(&[cols, rows], x.dtype())?;
        self.upload(&mut out, &to)?;
        Ok(out)
    }
}
