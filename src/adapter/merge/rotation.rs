//! Merging a rotation of the inputs (OFT): `W R^T`.

use crate::backend::{Backend, Gemm, GemmTerm, Matrix};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::rotate::rotated;
use crate::tensor::Tensor;

/// Rotated inputs of a weight.
pub(super) struct Turn {
    pub r: Tensor, // f32, the blocks one below the other
    pub blocks: usize,
    pub conv1d: bool, // the weight is stored [in, out]
}

impl Turn {
    /// How many rows as stored to merge at a time, near `wanted`: whole blocks of inputs.
    pub fn rows(&self, wanted: usize) -> usize {
        let b = self.r.cols();
        if self.conv1d { (wanted / b).max(1) * b } else { wanted }
    }

    /// `W R^T` of a block of rows as stored, f32, that begins with row `first`.
    pub fn apply(&self, block: &Tensor, first: usize, backend: &Backend) -> Result<Tensor> {
        if !self.conv1d {
            return rotated(backend, block, &self.r, self.blocks, true);
        }
        // R times the rows of [in, out], which are whole blocks.
        let (b, out) = (self.r.cols(), backend.empty(block.shape(), DType::F32)?);
        for start in (0..block.rows()).step_by(b) {
            let at = if self.blocks == 1 { 0 } else { first + start };
            let (r, rows) = (self.r.slice(at..at + b)?, block.slice(start..start + b)?);
            let terms = [GemmTerm { a: Matrix::plain(&r), b: Matrix::plain(&rows) }];
            backend.gemm(&mut out.slice(start..start + b)?, &Gemm::new(&terms))?;
        }
        Ok(out)
    }
}
