//! Launches of `cuda/attention.cu` and `cuda/attention_backward.cu`; kernels for Hopper serve for them where they may
//! ([`attention_hopper`]).

use super::bindings::*;
use super::{Cuda, attention_hopper, read, written};
use crate::backend::check::{self, ensure, ensure_alike};
use crate::backend::{AttentionShape, Kernels};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;

/// Rows of queries and heads, of one sequence and key head, up to which there is a block for each tile of keys.
const SPLIT_ROWS: usize = 64;

/// The kernels of one type and padded head size, and their geometry, as the templates of `cuda/` have it.
#[derive(Clone, Copy)]
struct Geometry {
    dtype: DType,
    /// Columns of a tile.
    dim: usize,
}

impl Geometry {
    fn new(dtype: DType, head_dim: usize) -> Self {
        let dims: &[usize] = if dtype == DType::BF16 { &[64, 96, 128, 256] } else { &[64, 128, 256] };
        // The largest head size was checked.
        let dim = dims.iter().copied().find(|dim| *dim >= head_dim).unwrap_or(256);
        Geometry { dtype, dim }
    }

    fn is_f32(self) -> bool {
        self.dtype == DType::F32
    }

    /// Bytes of shared memory of so many rows of tiles.
    fn tile_bytes(self, rows: usize) -> usize {
        rows * (self.dim * self.dtype.size() + 16)
    }

    /// Bytes of shared memory in which a warp turns 16 rows of an accumulator into an operand.
    fn operand_bytes(self, columns: usize) -> usize {
        if self.is_f32() { 16 * (columns + 4) * 4 } else { 0 }
    }

    /// Keys of a tile of the forward.
    fn keys(self) -> usize {
        match (self.dim > 128, self.is_f32()) {
            (true, _) => 16,
            (false, true) => 32,
            (false, false) => 64,
        }
    }

    /// Warps of a block of the forward, and the rows of queries that each has.
    fn forward(self) -> (usize, usize) {
        match (self.is_f32(), self.dim) {
            (true, 256) => (2, 16),
            (true, _) => (4, 16),
            (false, 64) => (4, 32),
            (false, _) => (8, 16),
        }
    }

    /// Warps of a block of the backward, its resident rows, and those that stream by, of all stages.
    fn backward(self) -> (usize, usize, usize) {
        let groups = if self.dim > 128 { 2 } else { 1 };
        let warps = if self.is_f32() { 2 } else { 4 };
        (warps, warps / groups * 16, if self.is_f32() { 16 } else { 2 * self.stream() })
    }

    /// Rows of a tile that streams by in the backward.
    fn stream(self) -> usize {
        if self.is_f32() || self.dim > 128 { 16 } else { 32 }
    }

    fn kernel(self, name: &str) -> String {
        format!("{name}_{}_{}", self.dtype, self.dim)
    }
}

/// What is common to the launches of one call.
struct Call<'a> {
    geometry: Geometry,
    shape: &'a AttentionShape<'a>,
    /// `attention_sequence`s.
    sequences: Tensor,
    /// Products of a tile and a row, of all sequences, if they were kept.
    parts: usize,
    max_queries: usize,
    max_keys: usize,
}

impl<'a> Call<'a> {
    fn new(cuda: &Cuda, shape: &'a AttentionShape<'a>, dtype: DType, rows: [usize; 2]) -> Result<Self> {
        // Positions are signed in the kernels.
        ensure(rows.iter().all(|n| *n < 1 << 30), "attention", || {
            format!("expected fewer than 2^30 rows, found {} queries and {} keys", rows[0], rows[1])
        })?;
        let geometry = Geometry::new(dtype, shape.head_dim);
        let mut parts = 0;
        let words: Vec<u32> = (shape.sequences.iter())
            .flat_map(|s| {
                let words = [s.q_start, s.q_len, s.k_start, s.k_len, parts].map(|n| n as u32);
                parts += shape.n_heads * s.q_len * s.k_len.div_ceil(geometry.keys());
                words
            })
            .collect();
        Ok(Call {
            geometry,
            shape,
            sequences: sequences(cuda, words)?,
            parts,
            max_queries: shape.sequences.iter().map(|s| s.q_len).max().unwrap_or(0),
            max_keys: shape.sequences.iter().map(|s| s.k_len).max().unwrap_or(0),
        })
    }

    fn window(&self) -> i32 {
        self.shape.window.map_or(i32::MAX, |window| window.min(i32::MAX as usize) as i32)
    }

    /// Whether rows of heads of these tensors can be copied 16 bytes at a time.
    fn is_aligned(&self, tensors: &[&Tensor]) -> Result<bool> {
        let mut aligned = (self.shape.head_dim * self.geometry.dtype.size()).is_multiple_of(16);
        for x in tensors {
            aligned &= x.device_bytes()?.addr().is_multiple_of(16);
        }
        Ok(aligned)
    }
}

/// `attention_sequence`s on the device, where those of the last call stay: all layers of a batch have the same.
fn sequences(cuda: &Cuda, words: Vec<u32>) -> Result<Tensor> {
    let mut last = cuda.sequences.lock().expect("the lock is never held across a panic");
    if let Some((same, tensor)) = &*last
        && *same == words
    {
        return Ok(tensor.clone());
    }
    let tensor = cuda.tensor_of(&words)?;
    *last = Some((words, tensor.clone()));
    Ok(tensor)
}

pub(super) fn attention(
    cuda: &Cuda,
    out: &mut Tensor,
    lse: &mut Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape<'_>,
) -> Result<()> {
    forward(cuda, [out, lse], [q, k, v], shape, None)
}

/// The forward; `hopper` says whose kernels serve for many queries, if it isn't to be found out.
pub(super) fn forward(
    cuda: &Cuda,
    [out, lse]: [&mut Tensor; 2],
    [q, k, v]: [&Tensor; 3],
    shape: &AttentionShape<'_>,
    hopper: Option<bool>,
) -> Result<()> {
    let dtype = ensure_alike("attention", &[out, q])?;
    check::attention(shape, q, k, v, lse)?;
    if shape.sequences.is_empty() {
        return Ok(());
    }
    let call = Call::new(cuda, shape, dtype, [q.rows(), k.rows()])?;
    let geometry = call.geometry;
    let aligned = call.is_aligned(&[out, q, k, v])?;
    let mut params = attention_params {
        out: written(out)?,
        lse: written(lse)?,
        q: read(q)?,
        k: read(k)?,
        v: read(v)?,
        sequences: read(&call.sequences)?,
        parts: std::ptr::null_mut(),
        part_stats: std::ptr::null_mut(),
        n_heads: shape.n_heads as u32,
        n_kv_heads: shape.n_kv_heads as u32,
        head_dim: shape.head_dim as u32,
        max_queries: call.max_queries as u32,
        window: call.window(),
        scale: shape.scale,
        softcap: shape.softcap.unwrap_or(0.0),
        aligned: i32::from(aligned),
    };
    let n_sequences = shape.sequences.len();
    let keys = geometry.keys();
    let rows_of_group = call.max_queries * (shape.n_heads / shape.n_kv_heads);
    if rows_of_group > SPLIT_ROWS || call.max_keys <= keys || call.parts > u32::MAX as usize {
        let takes = aligned && attention_hopper::takes(cuda, dtype, shape.head_dim);
        if takes && hopper.map_or_else(|| attention_hopper::serves(cuda, shape.head_dim), Ok)? {
            return attention_hopper::launch(cuda, params, [q, k, v], [call.max_queries, n_sequences]);
        }
        let (warps, rows) = geometry.forward();
        let grid = [call.max_queries.div_ceil(warps * rows), shape.n_heads, n_sequences];
        let shared = geometry.tile_bytes(warps * rows + 2 * keys) + warps * geometry.operand_bytes(keys);
        // SAFETY: operands were checked against the shape; the kernel stays in the rows of its sequence.
        return unsafe { cuda.launch(&geometry.kernel("attention"), grid, 32 * warps, shared, &params) };
    }
    let mut parts = cuda.empty(&[call.parts, shape.head_dim], DType::F32)?;
    let mut stats = cuda.empty(&[call.parts, 2], DType::F32)?;
    params.parts = written(&mut parts)?;
    params.part_stats = written(&mut stats)?;
    let sixteens = rows_of_group.div_ceil(16);
    let grid = [call.max_keys.div_ceil(keys), shape.n_kv_heads * sixteens, n_sequences];
    let shared = geometry.tile_bytes(16 + 2 * keys) + 4 * geometry.operand_bytes(keys);
    let join = [call.max_queries, shape.n_heads, n_sequences];
    // SAFETY: as above; there is a part for every head, query and tile of keys.
    unsafe {
        cuda.launch(&geometry.kernel("attention_split"), grid, 128, shared, &params)?;
        let threads = shape.head_dim.next_multiple_of(32);
        cuda.launch(&geometry.kernel("attention_join"), join, threads, 0, &params)
    }
}

pub(super) fn attention_backward(
    cuda: &Cuda,
    gradients: [&mut Tensor; 3],
    dout: &Tensor,
    [q, k, v]: [&Tensor; 3],
    out: &Tensor,
    lse: &Tensor,
    shape: &AttentionShape<'_>,
) -> Result<()> {
    backward(cuda, gradients, dout, [q, k, v], [out, lse], shape, None)
}

/// The backward; `hopper` says whose kernels serve, if it isn't to be found out.
pub(super) fn backward(
    cuda: &Cuda,
    [dq, dk, dv]: [&mut Tensor; 3],
    dout: &Tensor,
    [q, k, v]: [&Tensor; 3],
    [out, lse]: [&Tensor; 2],
    shape: &AttentionShape<'_>,
    hopper: Option<bool>,
) -> Result<()> {
    let dtype = ensure_alike("attention_backward", &[dq, dout, q, out])?;
    ensure_alike("attention_backward", &[dk, dv, k, v])?;
    check::attention(shape, q, k, v, lse)?;
    if shape.sequences.iter().map(|s| s.k_len).sum::<usize>() != k.rows() {
        cuda.fill(dk, 0.0)?;
        cuda.fill(dv, 0.0)?;
    }
    if shape.sequences.is_empty() {
        return Ok(());
    }
    let call = Call::new(cuda, shape, dtype, [q.rows(), k.rows()])?;
    let geometry = call.geometry;
    let aligned = call.is_aligned(&[dq, dk, dv, dout, q, k, v])?;
    let heads = q.rows() * shape.n_heads;
    let mut delta = cuda.empty(&[heads], DType::F32)?;
    let delta_params = attention_delta_params {
        delta: written(&mut delta)?,
        dout: read(dout)?,
        out: read(out)?,
        rows: heads as u64,
        head_dim: shape.head_dim as u32,
    };
    let params = attention_backward_params {
        dq: written(dq)?,
        dk: written(dk)?,
        dv: written(dv)?,
        dout: read(dout)?,
        q: read(q)?,
        k: read(k)?,
        v: read(v)?,
        lse: read(lse)?,
        delta: read(&delta)?,
        sequences: read(&call.sequences)?,
        n_heads: shape.n_heads as u32,
        n_kv_heads: shape.n_kv_heads as u32,
        head_dim: shape.head_dim as u32,
        window: call.window(),
        scale: shape.scale,
        softcap: shape.softcap.unwrap_or(0.0),
        aligned: i32::from(aligned),
    };
    let n_sequences = shape.sequences.len();
    // SAFETY: operands were checked against the shape; there is a delta for every row of a head.
    unsafe {
        let kernel = format!("attention_delta_{dtype}");
        cuda.launch(&kernel, [heads.div_ceil(8), 1, 1], 256, 0, &delta_params)?;
    }
    let takes = aligned && attention_hopper::takes(cuda, dtype, shape.head_dim);
    if takes && hopper.map_or_else(|| attention_hopper::backward_serves(cuda, shape.head_dim), Ok)? {
        let most = [call.max_queries, call.max_keys, n_sequences];
        return attention_hopper::launch_backward(cuda, params, [q, k, v, dout], most);
    }
    let (warps, rows, streamed) = geometry.backward();
    let shared =
        geometry.tile_bytes(2 * rows + 2 * streamed) + 2 * warps * geometry.operand_bytes(geometry.stream());
    let of_keys = [call.max_keys.div_ceil(rows), shape.n_kv_heads, n_sequences];
    let of_queries = [call.max_queries.div_ceil(rows), shape.n_heads, n_sequences];
    let launch = |name: &str, grid| {
        // SAFETY: operands were checked against the shape; the kernel stays in the rows of its sequence.
        unsafe { cuda.launch(&geometry.kernel(name), grid, 32 * warps, shared, &params) }
    };
    launch("attention_backward_keys", of_keys)?;
    launch("attention_backward_queries", of_queries)
}
