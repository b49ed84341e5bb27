//! Causal attention with grouped heads.

use super::matrix::{dot, row_sum};
use super::real::Real;
use crate::backend::{AttentionShape, Sequence};
use crate::dtype::DType;

/// Queries, keys and values of packed sequences, with the type that products are computed in.
pub struct Inputs<'a, R> {
    /// `[tokens, n_heads * head_dim]`.
    pub q: &'a [R],
    /// `[key rows, n_kv_heads * head_dim]`.
    pub k: &'a [R],
    /// As `k`.
    pub v: &'a [R],
    /// f32 or bf16.
    pub dtype: DType,
    /// Heads and sequences.
    pub shape: &'a AttentionShape<'a>,
}

impl<R: Real> Inputs<'_, R> {
    /// Where query `i` of `s` at `head` starts in `q`.
    fn query(&self, s: &Sequence, i: usize, head: usize) -> usize {
        ((s.q_start + i) * self.shape.n_heads + head) * self.shape.head_dim
    }

    /// Where the key `j` that `head` reads starts in `k` and `v`.
    fn key(&self, s: &Sequence, j: usize, head: usize) -> usize {
        let head = head / (self.shape.n_heads / self.shape.n_kv_heads);
        ((s.k_start + j) * self.shape.n_kv_heads + head) * self.shape.head_dim
    }

    /// The product of two heads' vectors.
    fn product(&self, a: &[R], b: &[R]) -> R {
        dot(self.shape.head_dim, |i| (a[i], b[i]), R::zero(), self.dtype)
    }

    /// Whether query `i` is too far behind key `j` to see it.
    fn beyond_window(&self, s: &Sequence, i: usize, j: usize) -> bool {
        self.shape.window.is_some_and(|window| j + window <= i + s.k_len - s.q_len)
    }

    /// Scores of query `i` with the keys up to its own, minus infinity for those beyond the window.
    fn scores(&self, s: &Sequence, i: usize, head: usize) -> Vec<R> {
        let scale = R::from_f64(f64::from(self.shape.scale));
        let q = &self.q[self.query(s, i, head)..];
        (0..=i + s.k_len - s.q_len)
            .map(|j| {
                if self.beyond_window(s, i, j) {
                    return R::from_f64(f64::NEG_INFINITY);
                }
                let score = self.product(q, &self.k[self.key(s, j, head)..]) * scale;
                self.shape.softcap.map_or(score, |cap| {
                    let cap = R::from_f64(cap.into());
                    cap * (score / cap).tanh()
                })
            })
            .collect()
    }

    /// Every (sequence, head, query).
    fn queries(&self) -> impl Iterator<Item = (&Sequence, usize, usize)> {
        let heads = self.shape.n_heads;
        self.shape
            .sequences
            .iter()
            .flat_map(move |s| (0..heads).flat_map(move |head| (0..s.q_len).map(move |i| (s, head, i))))
    }

    /// Writes the rows of the sequences into `out` (as `q`) and `lse` (`[tokens, n_heads]`).
    pub fn forward(&self, out: &mut [R], lse: &mut [R]) {
        for (s, head, i) in self.queries() {
            let scores = self.scores(s, i, head);
            let top = scores.iter().copied().reduce(R::max).unwrap_or(R::zero());
            let seen = |j: usize| !self.beyond_window(s, i, j);
            let exp = |(j, score): (usize, &R)| if seen(j) { (*score - top).exp() } else { R::zero() };
            let e: Vec<R> = scores.iter().enumerate().map(exp).collect();
            let total = row_sum(e.len(), |sum: R, j| sum + e[j]);
            lse[(s.q_start + i) * self.shape.n_heads + head] = top + total.ln();
            let at = self.query(s, i, head);
            for c in 0..self.shape.head_dim {
                // What is not finite must not get through a probability of zero.
                let value = |j: usize| if seen(j) { self.v[self.key(s, j, head) + c] } else { R::zero() };
                let pair = |j: usize| (e[j].rounded(self.dtype), value(j));
                out[at + c] = dot(e.len(), pair, R::zero(), self.dtype) / total;
            }
        }
    }

    /// Gradients of [`Inputs::forward`]: writes the sequences' rows of `dq`, adds to `dk` and `dv`.
    ///
    /// With `p = exp(s - lse)`: `dv = p^T dout`, `ds = scale p (dout v^T - rowsum(dout out))`, `dq = ds k`,
    /// `dk = ds^T q`.
    pub fn backward(&self, dq: &mut [R], dk: &mut [R], dv: &mut [R], dout: &[R], out: &[R], lse: &[R]) {
        let d = self.shape.head_dim;
        let scale = R::from_f64(f64::from(self.shape.scale));
        for (s, head, i) in self.queries() {
            let at = self.query(s, i, head);
            let (q, dout, out) = (&self.q[at..], &dout[at..], &out[at..]);
            let delta = row_sum(d, |sum, c| dout[c].mul_add(out[c], sum));
            let lse = lse[(s.q_start + i) * self.shape.n_heads + head];
            let mut ds = Vec::new();
            for (j, score) in self.scores(s, i, head).into_iter().enumerate() {
                if self.beyond_window(s, i, j) {
                    ds.push(R::zero());
                    continue;
                }
                let key = self.key(s, j, head);
                let p = (score - lse).exp();
                let dp = self.product(dout, &self.v[key..]);
                let slope = self.shape.softcap.map_or(R::one(), |cap| {
                    let t = score / R::from_f64(cap.into());
                    R::one() - t * t
                });
                ds.push((p * (dp - delta) * scale * slope).rounded(self.dtype));
                for c in 0..d {
                    dv[key + c] = p.rounded(self.dtype).mul_add(dout[c], dv[key + c]);
                    dk[key + c] = ds[j].mul_add(q[c], dk[key + c]);
                }
            }
            for c in 0..d {
                let pair = |j: usize| (ds[j], self.k[self.key(s, j, head) + c]);
                dq[at + c] = dot(ds.len(), pair, R::zero(), self.dtype);
            }
        }
    }
}
