//! Attention: jobs by sequence, head and (forward) range of queries.

use super::bindings::attention_args;
use super::{Cpu, Shared, kernel, type_code};
use crate::backend::check::{self, ensure_alike};
use crate::backend::{AttentionShape, Kernels, Sequence};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;

/// Queries per forward job: enough to pay for packing the keys and values, few enough to share out.
const QUERIES_PER_JOB: usize = 112;

/// The operands' addresses and row lengths.
struct Operands {
    q: Shared<u8>,
    k: Shared<u8>,
    v: Shared<u8>,
    out: Shared<u8>,
    lse: Shared<f32>,
    q_cols: usize,
    k_cols: usize,
    dtype: DType,
}

impl Operands {
    /// The arguments for one sequence and query head.
    fn args(&self, shape: &AttentionShape<'_>, s: &Sequence, head: usize) -> attention_args {
        let size = self.dtype.size();
        let kv_head = head / (shape.n_heads / shape.n_kv_heads);
        let q = (s.q_start * self.q_cols + head * shape.head_dim) * size;
        let k = (s.k_start * self.k_cols + kv_head * shape.head_dim) * size;
        attention_args {
            q: self.q.at(q).cast(),
            k: self.k.at(k).cast(),
            v: self.v.at(k).cast(),
            q_ld: self.q_cols,
            k_ld: self.k_cols,
            q_len: s.q_len,
            k_len: s.k_len,
            head_dim: shape.head_dim,
            one_token: 0,
            scale: shape.scale,
            softcap: shape.softcap.unwrap_or(0.0),
            window: shape.window.unwrap_or(0),
            type_: type_code(self.dtype),
            out: self.out.at(q).cast(),
            out_ld: self.q_cols,
            lse: self.lse.at(s.q_start * shape.n_heads + head),
            lse_ld: shape.n_heads,
            dout: std::ptr::null(),
            dq: std::ptr::null_mut(),
            dk: std::ptr::null_mut(),
            dv: std::ptr::null_mut(),
        }
    }
}

impl Cpu {
    /// Floats of scratch memory for one head of a sequence.
    fn attention_floats(&self, s: &Sequence, shape: &AttentionShape<'_>, backward: bool) -> usize {
        // SAFETY: a pure function of its arguments.
        unsafe { kernel!(self, attention_scratch)(s.q_len, s.k_len, shape.head_dim, i32::from(backward)) }
    }

    pub(super) fn run_attention(
        &self,
        out: &mut Tensor,
        lse: &mut Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: &AttentionShape<'_>,
    ) -> Result<()> {
        let dtype = ensure_alike("attention", &[out, q])?;
        check::attention(shape, q, k, v, lse)?;
        let operands = Operands {
            q: Shared(q.host_bytes().cast_mut()),
            k: Shared(k.host_bytes().cast_mut()),
            v: Shared(v.host_bytes().cast_mut()),
            out: Shared(out.host_bytes_mut()?),
            lse: Shared(lse.host_mut()?),
            q_cols: q.cols(),
            k_cols: k.cols(),
            dtype,
        };
        // A single query's heads that share keys and values are one job, which packs those once.
        let group = shape.n_heads / shape.n_kv_heads;
        let mut jobs = Vec::new();
        for (i, s) in shape.sequences.iter().enumerate() {
            // Late queries see more keys: hand them out first.
            for first in (0..s.q_len).step_by(QUERIES_PER_JOB).rev() {
                let heads = if s.q_len == 1 { group } else { 1 };
                jobs.extend((0..shape.n_heads).step_by(heads).map(|head| (i, head, first)));
            }
        }
        let floats = |job: usize| self.attention_floats(&shape.sequences[jobs[job].0], shape, false);
        self.run_with_scratch(jobs.len(), false, floats, |job, scratch| {
            let (i, head, first) = jobs[job];
            let s = &shape.sequences[i];
            let mut args = operands.args(shape, s, head);
            let mut last = (first + QUERIES_PER_JOB).min(s.q_len);
            if s.q_len == 1 {
                last = group;
                (args.one_token, args.q_len) = (1, group);
                (args.q_ld, args.out_ld, args.lse_ld) = (shape.head_dim, shape.head_dim, 1);
            }
            // SAFETY: jobs write disjoint rows and columns of `out` and `lse`; ranges were checked.
            unsafe {
                kernel!(self, attention)(&args, first, last, scratch);
            }
        });
        Ok(())
    }

    pub(super) fn run_attention_backward(
        &self,
        dq: &mut Tensor,
        dk: &mut Tensor,
        dv: &mut Tensor,
        dout: &Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        shape: &AttentionShape<'_>,
    ) -> Result<()> {
        let dtype = ensure_alike("attention_backward", &[dq, dout, q, out])?;
        ensure_alike("attention_backward", &[dk, dv, k, v])?;
        check::attention(shape, q, k, v, lse)?;
        if shape.sequences.iter().map(|s| s.k_len).sum::<usize>() != k.rows() {
            self.fill(dk, 0.0)?;
            self.fill(dv, 0.0)?;
        }
        // SAFETY: a pure function of its argument.
        let padded = unsafe { kernel!(self, attention_padded_dim)(shape.head_dim) };
        let part = k.rows() * padded;
        let mut dk_parts = self.empty(&[shape.n_heads, part], DType::F32)?;
        let mut dv_parts = self.empty(&[shape.n_heads, part], DType::F32)?;
        let parts = [Shared(dk_parts.host_mut::<f32>()?), Shared(dv_parts.host_mut::<f32>()?)];
        let operands = Operands {
            q: Shared(q.host_bytes().cast_mut()),
            k: Shared(k.host_bytes().cast_mut()),
            v: Shared(v.host_bytes().cast_mut()),
            out: Shared(out.host_bytes().cast_mut()),
            lse: Shared(lse.host::<f32>()?.cast_mut()),
            q_cols: q.cols(),
            k_cols: k.cols(),
            dtype,
        };
        let (dout, dq) = (Shared(dout.host_bytes().cast_mut()), Shared(dq.host_bytes_mut()?));
        let floats = |job: usize| self.attention_floats(&shape.sequences[job / shape.n_heads], shape, true);
        self.run_with_scratch(shape.sequences.len() * shape.n_heads, false, floats, |job, scratch| {
            let (s, head) = (&shape.sequences[job / shape.n_heads], job % shape.n_heads);
            let mut args = operands.args(shape, s, head);
            let first = (s.q_start * operands.q_cols + head * shape.head_dim) * dtype.size();
            args.dout = dout.at(first).cast();
            args.dq = dq.at(first).cast();
            args.dk = parts[0].at(head * part + s.k_start * padded);
            args.dv = parts[1].at(head * part + s.k_start * padded);
            // SAFETY: jobs write disjoint columns of `dq` and disjoint parts; ranges were checked.
            unsafe { kernel!(self, attention_backward)(&args, scratch) };
        });
        let outs = [Shared(dk.host_bytes_mut()?), Shared(dv.host_bytes_mut()?)];
        let group = shape.n_heads / shape.n_kv_heads;
        self.run(shape.sequences.len() * shape.n_kv_heads * 2, |job| {
            let (which, job) = (job % 2, job / 2);
            let (s, head) = (&shape.sequences[job / shape.n_kv_heads], job % shape.n_kv_heads);
            let from = head * group * part + s.k_start * padded;
            let to = (s.k_start * operands.k_cols + head * shape.head_dim) * dtype.size();
            // SAFETY: jobs write disjoint rows and columns of `dk` or `dv`.
            unsafe {
                kernel!(self, attention_sum_parts)(
                    outs[which].at(to).cast(),
                    operands.k_cols,
                    type_code(dtype),
                    parts[which].at(from),
                    part,
                    group,
                    padded,
                    s.k_len,
                    shape.head_dim,
                );
            }
        });
        Ok(())
    }
}
