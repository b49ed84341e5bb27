//! Launches of `cuda/attention_hopper.cu` and `cuda/attention_backward_hopper.cu`, and their checks.

use super::bindings::{
    self, attention_backward_hopper_params, attention_backward_params, attention_hopper_params,
    attention_params, tensor_map,
};
use super::executor::TmaMatrix;
use super::gemm_hopper::difference;
use super::{Cuda, attention};
use crate::backend::{AttentionShape, Kernels, Sequence};
use crate::dtype::DType;
use crate::error::Result;
use crate::rng::{Philox, PhiloxKey, Stream};
use crate::tensor::Tensor;

/// Queries of a block, or keys; threads.
const ROWS: usize = 128;
const THREADS: usize = 384;

/// Rows and columns of a box, in lines of 128 bytes.
const BOX: usize = 64;

/// Whether there are kernels for heads of this size whose rows are aligned.
pub(super) fn takes(cuda: &Cuda, dtype: DType, head_dim: usize) -> bool {
    cuda.hopper.is_there() && dtype == DType::BF16 && [64, 128].contains(&head_dim)
}

fn kernel(head_dim: usize) -> String {
    format!("attention_hopper_{head_dim}")
}

/// How TMA finds tiles of a tensor.
fn map(cuda: &Cuda, x: &Tensor) -> Result<tensor_map> {
    let matrix = TmaMatrix {
        data: x.device_bytes()?.cast_const(),
        element_bytes: 2,
        size: [x.cols() as u64, x.rows() as u64],
        row_bytes: 2 * x.cols() as u64,
        box_size: [BOX as u32; 2],
        swizzle: 2 * BOX as u32,
    };
    Ok(tensor_map { words: cuda.executor.tensor_map(&matrix)? })
}

/// One launch over sequences of at most so many queries.
pub(super) fn launch(
    cuda: &Cuda,
    attention: attention_params,
    operands: [&Tensor; 3],
    [max_queries, n_sequences]: [usize; 2],
) -> Result<()> {
    if cuda.plans {
        return Ok(());
    }
    let [q, k, v] = operands;
    let (heads, head_dim) = (attention.n_heads as usize, attention.head_dim as usize);
    // SAFETY: a structure of the C header, of numbers and pointers.
    let mut params: attention_hopper_params = unsafe { std::mem::zeroed() };
    params.attention = attention;
    (params.q, params.k, params.v) = (map(cuda, q)?, map(cuda, k)?, map(cuda, v)?);
    let grid = [max_queries.div_ceil(ROWS), heads, n_sequences];
    let shared = (ROWS + 2 * bindings::ATTENTION_HOPPER_STAGES as usize * BOX) * head_dim * 2;
    // SAFETY: the caller checked operands against the shape; the kernel stores rows of its sequence alone.
    unsafe { cuda.launch(&kernel(head_dim), grid, THREADS, shared, &params) }
}

/// Both launches over sequences of at most so many queries and keys; operands are q, k, v and dout.
pub(super) fn launch_backward(
    cuda: &Cuda,
    attention: attention_backward_params,
    operands: [&Tensor; 4],
    [max_queries, max_keys, n_sequences]: [usize; 3],
) -> Result<()> {
    if cuda.plans {
        return Ok(());
    }
    let [q, k, v, dout] = operands;
    // SAFETY: a structure of the C header, of numbers and pointers.
    let mut params: attention_backward_hopper_params = unsafe { std::mem::zeroed() };
    params.attention = attention;
    (params.q, params.k, params.v, params.dout) =
        (map(cuda, q)?, map(cuda, k)?, map(cuda, v)?, map(cuda, dout)?);
    let head_dim = attention.head_dim as usize;
    let shared = 2 * (ROWS + bindings::ATTENTION_BACKWARD_HOPPER_STAGES as usize * BOX) * head_dim * 2;
    for (of, rows, heads) in
        [("keys", max_keys, attention.n_kv_heads), ("queries", max_queries, attention.n_heads)]
    {
        let kernel = format!("attention_backward_{of}_hopper_{head_dim}");
        let grid = [rows.div_ceil(ROWS) * heads as usize, 1, n_sequences];
        // SAFETY: the caller checked operands against the shape; kernels store rows of their sequence alone.
        unsafe { cuda.launch(&kernel, grid, THREADS, shared, &params)? };
    }
    Ok(())
}

/// Whether the kernel serves: it runs, with the bits of the portable one.
pub(super) fn serves(cuda: &Cuda, head_dim: usize) -> Result<bool> {
    cuda.hopper.serves(cuda, kernel(head_dim), || Example::new(cuda, head_dim)?.miss(Example::forward))
}

/// The same of the backward's kernels.
pub(super) fn backward_serves(cuda: &Cuda, head_dim: usize) -> Result<bool> {
    let kernels = format!("attention_backward_hopper_{head_dim}");
    cuda.hopper.serves(cuda, kernels, || Example::new(cuda, head_dim)?.miss(Example::backward))
}

/// Small sequences that reach every part of the kernels: several tiles of queries and of keys, parts of them, a cache, a
/// window, heads that share keys.
struct Example<'a> {
    cuda: &'a Cuda,
    head_dim: usize,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
}

impl<'a> Example<'a> {
    const ROWS: usize = 360;
    const HEADS: [usize; 2] = [2, 1];
    const SEQUENCES: [Sequence; 2] = [
        Sequence { q_start: 0, q_len: 150, k_start: 0, k_len: 150 },
        Sequence { q_start: 150, q_len: 70, k_start: 150, k_len: 200 },
    ];

    fn new(cuda: &'a Cuda, head_dim: usize) -> Result<Self> {
        let backend: &dyn Kernels = cuda;
        let mut random = Philox::new(PhiloxKey::new(0, Stream::Dummy, 0));
        let mut operand = |heads: usize| -> Result<Tensor> {
            let values: Vec<f32> = (0..Self::ROWS * heads * head_dim).map(|_| random.normal()).collect();
            backend.to_dtype(&backend.from_slice(&values, &[Self::ROWS, heads * head_dim])?, DType::BF16)
        };
        let [n_heads, n_kv_heads] = Self::HEADS;
        let (q, k, v) = (operand(n_heads)?, operand(n_kv_heads)?, operand(n_kv_heads)?);
        Ok(Example { cuda, head_dim, q, k, v, dout: operand(n_heads)? })
    }

    /// How far off results of the kernels are.
    fn miss(
        &self,
        run: fn(&Self, &AttentionShape<'_>, hopper: bool) -> Result<Vec<f32>>,
    ) -> Result<Option<String>> {
        for window in [None, Some(80)] {
            let [n_heads, n_kv_heads] = Self::HEADS;
            let shape = AttentionShape {
                sequences: &Self::SEQUENCES,
                n_heads,
                n_kv_heads,
                head_dim: self.head_dim,
                scale: (self.head_dim as f32).sqrt().recip(),
                window,
                softcap: None,
            };
            let miss = difference(&run(self, &shape, false)?, &run(self, &shape, true)?);
            if miss.is_some() {
                return Ok(miss);
            }
        }
        Ok(None)
    }

    fn zeros(&self, like: &Tensor) -> Result<Tensor> {
        let backend: &dyn Kernels = self.cuda;
        backend.zeros(&[like.rows(), like.cols()], DType::BF16)
    }

    fn floats(&self, tensors: &[&Tensor]) -> Result<Vec<f32>> {
        let backend: &dyn Kernels = self.cuda;
        let values: Result<Vec<_>> = tensors.iter().map(|x| backend.to_f32(x)).collect();
        Ok(values?.concat())
    }

    /// out and lse.
    fn results(&self, shape: &AttentionShape<'_>, hopper: bool) -> Result<[Tensor; 2]> {
        let backend: &dyn Kernels = self.cuda;
        let mut out = self.zeros(&self.q)?;
        let mut lse = backend.zeros(&[Self::ROWS, shape.n_heads], DType::F32)?;
        let operands = [&self.q, &self.k, &self.v];
        attention::forward(self.cuda, [&mut out, &mut lse], operands, shape, Some(hopper))?;
        Ok([out, lse])
    }

    fn forward(&self, shape: &AttentionShape<'_>, hopper: bool) -> Result<Vec<f32>> {
        let [out, lse] = self.results(shape, hopper)?;
        self.floats(&[&out, &lse])
    }

    fn backward(&self, shape: &AttentionShape<'_>, hopper: bool) -> Result<Vec<f32>> {
        let [out, lse] = self.results(shape, false)?;
        let (mut dq, mut dk, mut dv) = (self.zeros(&self.q)?, self.zeros(&self.k)?, self.zeros(&self.v)?);
        let gradients = [&mut dq, &mut dk, &mut dv];
        let operands = [&self.q, &self.k, &self.v];
        attention::backward(self.cuda, gradients, &self.dout, operands, [&out, &lse], shape, Some(hopper))?;
        self.floats(&[&dq, &dk, &dv])
    }
}
