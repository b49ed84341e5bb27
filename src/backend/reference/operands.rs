//! Operands of the reference as numbers, and whether they fit together.

use super::{Real, Reference, norm, quant};
use crate::backend::{AttentionShape, Kernels, Matrix};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use half::{bf16, f16};

impl<R: Real> Reference<R> {
    /// The elements of a float tensor.
    pub(super) fn load(&self, x: &Tensor) -> Result<Vec<R>> {
        let mut bytes = vec![0; x.bytes()];
        self.download(x, &mut bytes)?;
        let numbers = bytes.chunks_exact(x.dtype().size());
        match x.dtype() {
            DType::F32 => {
                Ok(numbers.map(|b| R::from_f64(bytemuck::pod_read_unaligned::<f32>(b).into())).collect())
            }
            DType::BF16 => {
                Ok(numbers.map(|b| R::from_f64(bytemuck::pod_read_unaligned::<bf16>(b).into())).collect())
            }
            DType::F16 => {
                Ok(numbers.map(|b| R::from_f64(bytemuck::pod_read_unaligned::<f16>(b).into())).collect())
            }
            other => Err(Error::shape("load", format!("expected floats, found {other}"))),
        }
    }

    /// The elements of an i32 tensor, each checked to be in `0..limit`.
    pub(super) fn load_indices(&self, operation: &'static str, x: &Tensor, limit: usize) -> Result<Vec<i32>> {
        fits(operation, x.dtype() == DType::I32, &[x])?;
        let mut numbers = vec![0i32; x.elements()];
        self.download(x, bytemuck::cast_slice_mut(&mut numbers))?;
        match numbers.iter().find(|i| usize::try_from(**i).map_or(true, |i| i >= limit)) {
            None => Ok(numbers),
            Some(bad) => Err(Error::shape(operation, format!("expected indices below {limit}, found {bad}"))),
        }
    }

    /// Rounds `values` into a float tensor.
    pub(super) fn store(&self, out: &mut Tensor, values: &[R]) -> Result<()> {
        let bytes: Vec<u8> = match out.dtype() {
            DType::F32 => values.iter().flat_map(|x| (x.value() as f32).to_ne_bytes()).collect(),
            DType::BF16 => {
                values.iter().flat_map(|x| bf16::from_f32(x.value() as f32).to_ne_bytes()).collect()
            }
            DType::F16 => values.iter().flat_map(|x| f16::from_f32(x.value() as f32).to_ne_bytes()).collect(),
            other => return Err(Error::shape("store", format!("expected floats, found {other}"))),
        };
        self.upload(out, &bytes)
    }

    /// `out = f(a, b)`, element by element.
    pub(super) fn zip(&self, out: &mut Tensor, a: &Tensor, b: &Tensor, f: impl Fn(R, R) -> R) -> Result<()> {
        alike("elementwise", &[out, a, b])?;
        let (a, b) = (self.load(a)?, self.load(b)?);
        let values: Vec<R> = a.into_iter().zip(b).map(|(a, b)| f(a, b)).collect();
        self.store(out, &values)
    }

    pub(super) fn norm_backward(
        &self,
        dx: Option<&mut Tensor>,
        accumulate: bool,
        dweight: Option<&mut Tensor>,
        dy: &Tensor,
        x: &Tensor,
        stats: &Tensor,
        weight: &Tensor,
    ) -> Result<()> {
        let cols = x.cols();
        alike("norm_backward", &[dy, x])?;
        fits("norm_backward", weight.elements() == cols, &[x, weight])?;
        if let Some(dx) = &dx {
            alike("norm_backward", &[dx, dy])?;
        }
        let mut sums = vec![R::zero(); cols];
        if let Some(dweight) = &dweight {
            fits("norm_backward", is_f32(dweight, cols), &[dweight])?;
            sums = self.load(dweight)?;
        }
        let (dy, w, stats) = (self.load(dy)?, self.load(weight)?, self.load(stats)?);
        let mut values = norm::norm_backward(&mut sums, &dy, &self.load(x)?, &stats, &w, x.dtype());
        if let Some(dx) = dx {
            if accumulate {
                values = self.load(dx)?.into_iter().zip(values).map(|(old, new)| old + new).collect();
            }
            self.store(dx, &values)?;
        }
        dweight.map_or(Ok(()), |dweight| self.store(dweight, &sums))
    }

    /// An operand's elements in the type the arithmetic takes, row-major as the operand is seen.
    pub(super) fn operand(&self, matrix: &Matrix<'_>, arithmetic: DType) -> Result<Vec<R>> {
        let (stored, transposed) = match *matrix {
            Matrix::Dense { tensor, transposed } => (self.load(tensor)?, transposed),
            Matrix::Quantized { matrix, transposed } => (quant::values(self, matrix)?, transposed),
        };
        let stored: Vec<R> = stored.into_iter().map(|x| x.rounded(arithmetic)).collect();
        let (rows, cols) = matrix.shape();
        let at = |i: usize, j: usize| if transposed { stored[j * rows + i] } else { stored[i * cols + j] };
        Ok((0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))).map(|(i, j)| at(i, j)).collect())
    }
}

/// Fails unless `condition`, naming the operands.
pub(super) fn fits(operation: &'static str, condition: bool, operands: &[&Tensor]) -> Result<()> {
    if condition {
        return Ok(());
    }
    let found: Vec<_> = operands.iter().map(|t| format!("{:?} {}", t.shape(), t.dtype())).collect();
    Err(Error::shape(operation, format!("operands do not fit together: {}", found.join(", "))))
}

/// Fails unless the operands are activations of one type and size.
pub(super) fn alike(operation: &'static str, operands: &[&Tensor]) -> Result<()> {
    let (dtype, elements) = (operands[0].dtype(), operands[0].elements());
    let alike = operands.iter().all(|t| t.dtype() == dtype && t.elements() == elements);
    fits(operation, alike && is_activation(operands[0]), operands)
}

pub(super) fn is_activation(x: &Tensor) -> bool {
    matches!(x.dtype(), DType::F32 | DType::BF16)
}

pub(super) fn is_f32(x: &Tensor, elements: usize) -> bool {
    x.dtype() == DType::F32 && x.elements() == elements
}

pub(super) fn check_attention(
    shape: &AttentionShape<'_>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    lse: &Tensor,
) -> Result<()> {
    let AttentionShape { n_heads, n_kv_heads, head_dim, .. } = *shape;
    let heads = n_kv_heads > 0 && n_heads.is_multiple_of(n_kv_heads) && (1..=256).contains(&head_dim);
    let cols = q.cols() == n_heads * head_dim && k.cols() == n_kv_heads * head_dim && k.shape() == v.shape();
    let types = is_activation(q) && q.dtype() == k.dtype() && q.dtype() == v.dtype();
    let inside = shape
        .sequences
        .iter()
        .all(|s| s.q_start + s.q_len <= q.rows() && s.k_start + s.k_len <= k.rows() && s.k_len >= s.q_len);
    let lse_fits = is_f32(lse, q.rows() * n_heads);
    fits("attention", heads && cols && types && inside && lse_fits, &[q, k, v, lse])
}
