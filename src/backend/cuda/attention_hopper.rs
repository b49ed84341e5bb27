//! Launches of `cuda/attention_hopper.cu`, and its check.

use super::bindings::{self, attention_hopper_params, attention_params, tensor_map};
use super::executor::TmaMatrix;
use super::gemm_hopper::difference;
use super::{Cuda, attention};
use crate::backend::{AttentionShape, Kernels, Sequence};
use crate::dtype::DType;
use crate::error::Result;
use crate::rng::{Philox, PhiloxKey, Stream};
use crate::tensor::Tensor;

/// Queries of a block; threads.
const ROWS: usize = 128;
const THREADS: usize = 384;

/// Rows and columns of a box, in lines of 128 bytes.
const BOX: usize = 64;

/// Whether there is a kernel for heads of this size whose rows are aligned.
pub(super) fn takes(cuda: &Cuda, dtype: DType, head_dim: usize) -> bool {
    cuda.hopper.is_there() && dtype == DType::BF16 && [64, 128].contains(&head_dim)
}

fn kernel(head_dim: usize) -> String {
    format!("attention_hopper_{head_dim}")
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
    let map = |x: &Tensor| -> Result<tensor_map> {
        let matrix = TmaMatrix {
            data: x.device_bytes()?.cast_const(),
            element_bytes: 2,
            size: [x.cols() as u64, x.rows() as u64],
            row_bytes: 2 * x.cols() as u64,
            box_size: [BOX as u32; 2],
            swizzle: 2 * BOX as u32,
        };
        Ok(tensor_map { words: cuda.executor.tensor_map(&matrix)? })
    };
    let [q, k, v] = operands;
    let (heads, head_dim) = (attention.n_heads as usize, attention.head_dim as usize);
    // SAFETY: a structure of the C header, of numbers and pointers.
    let mut params: attention_hopper_params = unsafe { std::mem::zeroed() };
    params.attention = attention;
    (params.q, params.k, params.v) = (map(q)?, map(k)?, map(v)?);
    let grid = [max_queries.div_ceil(ROWS), heads, n_sequences];
    let shared = (ROWS + 2 * bindings::ATTENTION_HOPPER_STAGES as usize * BOX) * head_dim * 2;
    // SAFETY: the caller checked operands against the shape; the kernel stores rows of its sequence alone.
    unsafe { cuda.launch(&kernel(head_dim), grid, THREADS, shared, &params) }
}

/// Whether the kernel serves: it runs, with the bits of the portable one.
pub(super) fn serves(cuda: &Cuda, head_dim: usize) -> Result<bool> {
    cuda.hopper.serves(cuda, kernel(head_dim), || miss(cuda, head_dim))
}

/// How far off the kernel is on small sequences that reach every part of it: several tiles of queries and of keys, parts of
/// them, a cache, a window, heads that share keys.
fn miss(cuda: &Cuda, head_dim: usize) -> Result<Option<String>> {
    let backend: &dyn Kernels = cuda;
    let (n_heads, n_kv_heads, rows) = (2, 1, 360);
    let mut random = Philox::new(PhiloxKey::new(0, Stream::Dummy, 0));
    let mut operand = |heads: usize| -> Result<Tensor> {
        let values: Vec<f32> = (0..rows * heads * head_dim).map(|_| random.normal()).collect();
        backend.to_dtype(&backend.from_slice(&values, &[rows, heads * head_dim])?, DType::BF16)
    };
    let (q, k, v) = (operand(n_heads)?, operand(n_kv_heads)?, operand(n_kv_heads)?);
    let sequences = [
        Sequence { q_start: 0, q_len: 150, k_start: 0, k_len: 150 },
        Sequence { q_start: 150, q_len: 70, k_start: 150, k_len: 200 },
    ];
    for window in [None, Some(80)] {
        let scale = (head_dim as f32).sqrt().recip();
        let shape = AttentionShape {
            sequences: &sequences,
            n_heads,
            n_kv_heads,
            head_dim,
            scale,
            window,
            softcap: None,
        };
        let run = |hopper: bool| -> Result<Vec<f32>> {
            let mut out = backend.zeros(&[rows, n_heads * head_dim], DType::BF16)?;
            let mut lse = backend.zeros(&[rows, n_heads], DType::F32)?;
            attention::forward(cuda, [&mut out, &mut lse], [&q, &k, &v], &shape, Some(hopper))?;
            let mut all = backend.to_f32(&out)?;
            all.extend(backend.to_f32(&lse)?);
            Ok(all)
        };
        let miss = difference(&run(false)?, &run(true)?);
        if miss.is_some() {
            return Ok(miss);
        }
    }
    Ok(None)
}
