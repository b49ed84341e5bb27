//! Rotations of blocks of columns: `y = x R` with a block-diagonal R (OFT).
//!
//! A block is Cayley's transform of a skew-symmetric matrix Q, whose upper triangle is trained: `R = (1 - Q)(1 + Q)^-1`, or
//! the first terms of `1 + 2 Q + 2 Q^2 + ...`, by Horner's rule `H_j = c_j + Q H_(j+1)`, `R = H_0`. Backward, with G the
//! gradient of R: `dQ = -(1 + R)^T G (1 + R)^T / 2`, or the sum of `G_j H_(j+1)^T` with `G_0 = G`, `G_(j+1) = Q^T G_j`.
//! Rows of activations are seen as one row for each block, which a gather sorts by block; products do the rest.
//! Sources: Qiu et al., "OFT" (arXiv 2306.07280); "OFTv2" (arXiv 2506.19847), which rotates the input.

use crate::autograd::{Dropout, Gradients, Op, Tape, ValueId, Var};
use crate::backend::{Backend, Gemm, GemmTerm, Matrix};
use crate::dtype::DType;
use crate::error::Result;
use crate::math::solve::inverse;
use crate::model::Rotation;
use crate::rng::Philox;
use crate::tensor::Tensor;

/// The matrices of a rotation, one below the other: f32 `[blocks * b, b]`.
#[derive(Debug)]
pub(crate) struct Matrices {
    /// The rotation.
    pub r: Tensor,
    /// For the backward.
    from: From,
}

#[derive(Debug)]
enum From {
    /// `1 + R`.
    Cayley(Tensor),
    /// Q and `H_1, H_2, ...`.
    Series(Tensor, Vec<Tensor>),
}

/// The coefficients of PEFT's series of so many terms: `1, 2, ..., 2, 1` from the third term on, of degree 3 at least.
fn coefficients(terms: usize) -> Vec<f32> {
    match terms {
        0 | 1 => vec![1.0],
        2 => vec![1.0, 2.0],
        _ => {
            let mut all = vec![2.0; terms.max(4)];
            (all[0], all[terms.max(4) - 1]) = (1.0, 1.0);
            all
        }
    }
}

/// `factor` times the unit matrix, `blocks` times.
fn unit(blocks: usize, b: usize, factor: f32) -> Vec<f32> {
    let mut all = vec![0.0; blocks * b * b];
    all.chunks_mut(b * b).for_each(|block| block.iter_mut().step_by(b + 1).for_each(|x| *x = factor));
    all
}

/// Upper triangles as skew-symmetric matrices.
fn skew(values: &[f32], b: usize) -> Vec<f32> {
    let elements = b * (b - 1) / 2;
    let mut all = vec![0.0; values.len() / elements.max(1) * b * b];
    for (block, upper) in all.chunks_mut(b * b).zip(values.chunks(elements.max(1))) {
        let mut upper = upper.iter();
        for i in 0..b {
            for j in i + 1..b {
                let x = upper.next().copied().unwrap_or(0.0);
                (block[i * b + j], block[j * b + i]) = (x, -x);
            }
        }
    }
    all
}

/// Multiplies the blocks whose Q is longer than `max_norm / sqrt(blocks)` so that it is not (COFT).
pub(crate) fn constrain(values: &mut [f32], elements: usize, max_norm: f64) {
    let blocks = values.len() / elements.max(1);
    let bound = max_norm / (blocks as f64).sqrt();
    for block in values.chunks_mut(elements.max(1)) {
        let norm = (2.0 * block.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>()).sqrt();
        if norm > bound {
            block.iter_mut().for_each(|x| *x = (f64::from(*x) * (bound / norm)) as f32);
        }
    }
}

/// Rows of a matrix cut into `blocks` parts.
fn parts(x: &Tensor, blocks: usize) -> Result<Vec<Tensor>> {
    let rows = x.rows() / blocks;
    (0..blocks).map(|i| x.slice(i * rows..(i + 1) * rows)).collect()
}

/// `out = a b`, or added to `out`, by blocks of rows of all three; a flag says that the blocks are transposed.
fn block_products(
    backend: &Backend,
    out: &Tensor,
    a: (&Tensor, bool),
    b: (&Tensor, bool),
    blocks: usize,
    accumulate: bool,
) -> Result<()> {
    let (mut outs, lefts, rights) = (parts(out, blocks)?, parts(a.0, blocks)?, parts(b.0, blocks)?);
    let terms: Vec<_> = lefts
        .iter()
        .zip(&rights)
        .map(|(l, r)| {
            let operand = |tensor, transposed| Matrix::Dense { tensor, transposed };
            [GemmTerm { a: operand(l, a.1), b: operand(r, b.1) }]
        })
        .collect();
    let products = outs.iter_mut().zip(&terms);
    let mut products: Vec<_> =
        products.map(|(out, terms)| (out, Gemm { accumulate, ..Gemm::new(terms) })).collect();
    backend.gemm_all(&mut products)
}

/// The matrices of these upper triangles, `[blocks, b (b - 1) / 2]`; `terms` of the series, or `None`: the transform itself.
///
/// # Errors
/// When memory can't be had.
pub(crate) fn matrices(
    backend: &Backend,
    values: &[f32],
    b: usize,
    terms: Option<usize>,
) -> Result<Matrices> {
    let q = skew(values, b);
    let blocks = q.len() / (b * b);
    let shape = [blocks * b, b];
    let Some(terms) = terms else {
        let mut sums = Vec::with_capacity(q.len());
        for block in q.chunks(b * b) {
            let mut plus: Vec<f64> = block.iter().map(|x| f64::from(*x)).collect();
            plus.iter_mut().step_by(b + 1).for_each(|x| *x += 1.0);
            // (1 - Q) (1 + Q)^-1 = 2 (1 + Q)^-1 - 1.
            sums.extend(inverse(&plus, b).into_iter().map(|x| (2.0 * x) as f32));
        }
        let r: Vec<f32> = sums.iter().zip(unit(blocks, b, 1.0)).map(|(sum, one)| sum - one).collect();
        let sums = backend.from_slice(&sums, &shape)?;
        return Ok(Matrices { r: backend.from_slice(&r, &shape)?, from: From::Cayley(sums) });
    };
    let coefficients = coefficients(terms);
    let q = backend.from_slice(&q, &shape)?;
    let mut horner: Vec<Tensor> = Vec::new();
    for c in coefficients.iter().rev() {
        let next = backend.from_slice(&unit(blocks, b, *c), &shape)?;
        if let Some(last) = horner.last() {
            block_products(backend, &next, (&q, false), (last, false), blocks, true)?;
        }
        horner.push(next);
    }
    horner.reverse();
    let r = horner.remove(0);
    Ok(Matrices { r, from: From::Series(q, horner) })
}

impl Matrices {
    /// The gradient of the upper triangles from that of R.
    fn backward(&self, backend: &Backend, dr: Tensor, blocks: usize) -> Result<Vec<f32>> {
        let (b, empty) = (dr.cols(), || backend.zeros(dr.shape(), DType::F32));
        let dq = empty()?;
        match &self.from {
            From::Cayley(sum) => {
                let half = empty()?;
                block_products(backend, &half, (sum, true), (&dr, false), blocks, false)?;
                block_products(backend, &dq, (&half, false), (sum, true), blocks, false)?;
                backend.scale(&mut dq.clone(), -0.5)?;
            }
            From::Series(q, horner) => {
                let mut g = dr.clone();
                for (j, h) in horner.iter().enumerate() {
                    block_products(backend, &dq, (&g, false), (h, true), blocks, true)?;
                    if j + 1 < horner.len() {
                        let next = empty()?;
                        block_products(backend, &next, (q, true), (&g, false), blocks, false)?;
                        g = next;
                    }
                }
            }
        }
        let dq = backend.to_vec::<f32>(&dq)?;
        let upper = |block: &[f32]| {
            let mut all = Vec::with_capacity(b * (b - 1) / 2);
            for i in 0..b {
                all.extend((i + 1..b).map(|j| block[i * b + j] - block[j * b + i]));
            }
            all
        };
        Ok(dq.chunks(b * b).flat_map(upper).collect())
    }
}

impl Rotation {
    /// Which blocks are left as they are in this step of training, of several.
    fn dropped(&self, blocks: usize, dropout: Option<Dropout>) -> Vec<bool> {
        let mut all = vec![false; blocks];
        let Some(dropout) = dropout.filter(|_| self.dropout > 0.0 && blocks > 1) else { return all };
        let mut rng = Philox::new(dropout.key(self.stream));
        let mut order: Vec<usize> = (0..blocks).collect();
        for i in 0..(self.dropout * blocks as f32) as usize {
            order.swap(i, i + rng.below((blocks - i) as u32) as usize);
            all[order[i]] = true;
        }
        all
    }
}

/// The upper triangles that a pass uses, and which blocks are dropped.
fn upper_triangles(
    tape: (&crate::param::ParamStore, Option<Dropout>),
    rotation: &Rotation,
) -> Result<(Vec<f32>, Vec<bool>)> {
    let (params, dropout) = tape;
    let mut values = params.to_vec(rotation.skew)?;
    let [blocks, elements] = [params.info(rotation.skew).shape[0], params.info(rotation.skew).shape[1]];
    if let Some(max_norm) = rotation.max_norm {
        constrain(&mut values, elements, max_norm);
    }
    let dropped = rotation.dropped(blocks, dropout);
    for (block, _) in values.chunks_mut(elements.max(1)).zip(&dropped).filter(|(_, dropped)| **dropped) {
        block.fill(0.0);
    }
    Ok((values, dropped))
}

/// The rows of `x`, `[n, blocks * b]`, one for each block, those of a block together: `[blocks * n, b]`. One block shared by
/// all is one block of all rows.
fn sorted_by_block(backend: &Backend, x: &Tensor, blocks: usize, b: usize) -> Result<Tensor> {
    let (n, view) = (x.rows(), x.reshape(&[x.elements() / b, b])?);
    if blocks == 1 {
        return Ok(view);
    }
    let order: Vec<i32> =
        (0..blocks).flat_map(|block| (0..n).map(move |row| (row * blocks + block) as i32)).collect();
    gathered(backend, &view, &order)
}

/// The inverse of [`sorted_by_block`], `[n, blocks * b]` as `shape`.
fn sorted_by_row(backend: &Backend, x: &Tensor, blocks: usize, shape: &[usize]) -> Result<Tensor> {
    if blocks == 1 {
        return x.reshape(shape);
    }
    let n = shape[0];
    let order: Vec<i32> =
        (0..n).flat_map(|row| (0..blocks).map(move |block| (block * n + row) as i32)).collect();
    gathered(backend, x, &order)?.reshape(shape)
}

fn gathered(backend: &Backend, x: &Tensor, order: &[i32]) -> Result<Tensor> {
    let mut out = backend.empty(x.shape(), x.dtype())?;
    backend.gather_rows(&mut out, x, &backend.from_slice(order, &[order.len()])?)?;
    Ok(out)
}

/// `x` `[n, cols]` times R, or its transpose, which has `blocks` blocks of `b` columns (one: shared).
pub(crate) fn rotated(
    backend: &Backend,
    x: &Tensor,
    r: &Tensor,
    blocks: usize,
    transposed: bool,
) -> Result<Tensor> {
    let sorted = sorted_by_block(backend, x, blocks, r.cols())?;
    let out = backend.empty(sorted.shape(), x.dtype())?;
    block_products(backend, &out, (&sorted, false), (r, transposed), blocks, false)?;
    drop(sorted);
    sorted_by_row(backend, &out, blocks, &[x.rows(), x.cols()])
}

impl Tape<'_> {
    /// `x R`, `[tokens, cols]`.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn rotate(&mut self, x: &Var, rotation: &Rotation) -> Result<Var> {
        let (values, dropped) = upper_triangles((self.params, self.dropout), rotation)?;
        let made = matrices(&self.backend, &values, rotation.block_size, rotation.terms)?;
        let y = rotated(&self.backend, &x.tensor, &made.r, dropped.len(), false)?;
        let (saved, rotation) = (x.tensor.clone(), Box::new(rotation.clone()));
        Ok(self.record(y, [x], true, || Op::Rotate { x: saved, rotation }))
    }
}

pub(crate) fn backward(
    g: &mut Gradients<'_>,
    inputs: [Option<ValueId>; 3],
    dy: &Tensor,
    x: &Tensor,
    rotation: &Rotation,
    dropout: Option<Dropout>,
) -> Result<()> {
    let (backend, b) = (g.backend.clone(), rotation.block_size);
    let (values, dropped) = upper_triangles((g.params, dropout), rotation)?;
    let (blocks, made) = (dropped.len(), matrices(&backend, &values, b, rotation.terms)?);
    let sorted_dy = sorted_by_block(&backend, dy, blocks, b)?;
    let dr = backend.empty(&[blocks * b, b], DType::F32)?;
    {
        let sorted_x = sorted_by_block(&backend, x, blocks, b)?;
        block_products(&backend, &dr, (&sorted_x, true), (&sorted_dy, false), blocks, false)?;
    }
    let mut gradient = made.backward(&backend, dr, blocks)?;
    let elements = b * (b - 1) / 2;
    for (block, _) in gradient.chunks_mut(elements.max(1)).zip(&dropped).filter(|(_, dropped)| **dropped) {
        block.fill(0.0);
    }
    let mut into = g.params.grad(rotation.skew)?;
    backend.add_assign(&mut into, &backend.from_slice(&gradient, &[blocks, elements])?)?;
    let Some(id) = inputs[0] else { return Ok(()) };
    let dx = backend.empty(sorted_dy.shape(), dy.dtype())?;
    block_products(&backend, &dx, (&sorted_dy, false), (&made.r, true), blocks, false)?;
    drop(sorted_dy);
    let dx = sorted_by_row(&backend, &dx, blocks, &[dy.rows(), dy.cols()])?;
    g.add(id, dx)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::rng::{PhiloxKey, Stream};

    fn product(a: &[f64], b: &[f64], n: usize) -> Vec<f64> {
        let at = |i: usize| (0..n).map(|k| a[i / n * n + k] * b[k * n + i % n]).sum();
        (0..n * n).map(at).collect()
    }

    /// One block's matrix in f64, by PEFT's sum of powers or by the inverse.
    fn oracle(upper: &[f64], b: usize, terms: Option<usize>) -> Vec<f64> {
        let (mut q, mut next) = (vec![0.0; b * b], upper.iter());
        for i in 0..b {
            for j in i + 1..b {
                (q[i * b + j], q[j * b + i]) = (*next.clone().next().unwrap(), -*next.next().unwrap());
            }
        }
        let one: Vec<f64> = unit(1, b, 1.0).into_iter().map(f64::from).collect();
        let sum =
            |x: &[f64], y: &[f64], by: f64| x.iter().zip(y).map(|(x, y)| x + by * y).collect::<Vec<_>>();
        let Some(terms) = terms else {
            return product(&sum(&one, &q, -1.0), &inverse(&sum(&one, &q, 1.0), b), b);
        };
        let (mut r, mut power) = (one.clone(), one);
        let degree = if terms > 2 { terms.max(4) - 1 } else { terms.max(1) - 1 };
        for k in 1..=degree {
            power = product(&power, &q, b);
            r = sum(&r, &power, if k == degree && k > 2 { 1.0 } else { 2.0 });
        }
        r
    }

    const CASES: [(usize, usize, Option<usize>); 7] = [
        (3, 4, None),
        (1, 7, None),
        (1, 2, Some(5)),
        (5, 4, Some(5)),
        (2, 8, Some(2)),
        (2, 5, Some(3)),
        (3, 3, Some(7)),
    ];

    fn normal(n: usize, deviation: f32, seed: u64) -> Vec<f32> {
        let mut rng = Philox::new(PhiloxKey::new(seed, Stream::Dummy, 3));
        (0..n).map(|_| deviation * rng.normal()).collect()
    }

    #[test]
    fn matrices_and_their_gradients_are_those_of_f64() {
        let backend = Cpu::new(None).unwrap();
        for (blocks, b, terms) in CASES {
            let elements = b * (b - 1) / 2;
            let values = normal(blocks * elements, 0.3, 1);
            let all = |along: &[f32], by: f64| -> Vec<f64> {
                let moved: Vec<f64> =
                    values.iter().zip(along).map(|(x, d)| f64::from(*x) + by * f64::from(*d)).collect();
                moved.chunks(elements).flat_map(|upper| oracle(upper, b, terms)).collect()
            };
            let made = matrices(&backend, &values, b, terms).unwrap();
            let (r, along) = (backend.to_vec::<f32>(&made.r).unwrap(), normal(values.len(), 1.0, 2));
            for (ours, exact) in r.iter().zip(all(&along, 0.0)) {
                assert!((f64::from(*ours) - exact).abs() < 1e-6, "{blocks} {b} {terms:?}: {ours}, {exact}");
            }
            let dr = normal(blocks * b * b, 1.0, 3);
            let weigh = |r: Vec<f64>| r.iter().zip(&dr).map(|(r, d)| r * f64::from(*d)).sum::<f64>();
            let exact = (weigh(all(&along, 1e-5)) - weigh(all(&along, -1e-5))) / 2e-5;
            let dr = backend.from_slice(&dr, &[blocks * b, b]).unwrap();
            let gradient = made.backward(&backend, dr, blocks).unwrap();
            let ours: f64 = gradient.iter().zip(&along).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
            let size: f64 = gradient.iter().zip(&along).map(|(g, d)| f64::from((g * d).abs())).sum();
            assert!((ours - exact).abs() < 2e-6 * size, "{blocks} {b} {terms:?}: {ours}, {exact}");
        }
    }

    #[test]
    fn blocks_of_columns_are_rotated_and_back() {
        let backend = Cpu::new(None).unwrap();
        for (stored, blocks, b, n) in [(3, 3, 4, 5), (1, 3, 4, 5), (1, 1, 7, 1), (14, 14, 2, 9)] {
            let values = normal(stored * b * (b - 1) / 2, 0.5, 4);
            let r = matrices(&backend, &values, b, None).unwrap().r;
            let x = normal(n * blocks * b, 1.0, 5);
            let input = backend.from_slice(&x, &[n, blocks * b]).unwrap();
            let y = rotated(&backend, &input, &r, stored, false).unwrap();
            let (out, r_values) = (backend.to_vec::<f32>(&y).unwrap(), backend.to_vec::<f32>(&r).unwrap());
            for (i, ours) in out.iter().enumerate() {
                let (row, col) = (i / (blocks * b), i % (blocks * b));
                let block = col / b;
                let matrix = &r_values[if stored == 1 { 0 } else { block * b * b }..];
                let exact: f32 =
                    (0..b).map(|k| x[row * blocks * b + block * b + k] * matrix[k * b + col % b]).sum();
                assert!((ours - exact).abs() < 1e-5, "{stored} {blocks} {b} {n}: {ours}, {exact}");
            }
            let back = rotated(&backend, &y, &r, stored, true).unwrap();
            // An orthogonal matrix's transpose is its inverse.
            for (back, x) in backend.to_vec::<f32>(&back).unwrap().iter().zip(&x) {
                assert!((back - x).abs() < 1e-5, "{stored} {blocks} {b} {n}: {back}, {x}");
            }
        }
    }

    #[test]
    fn a_step_drops_whole_blocks_and_the_same_ones_again() {
        let rotation = Rotation {
            skew: crate::param::ParamLayout::default().add("x", &[8, 1], true),
            block_size: 2,
            terms: None,
            max_norm: None,
            dropout: 0.3,
            stream: 2,
        };
        let at = |step| rotation.dropped(8, Some(Dropout { seed: 1, step, first_row: 7 }));
        assert!((0..20).all(|step| at(step).iter().filter(|dropped| **dropped).count() == 2));
        assert!((0..20).any(|step| at(step) != at(0)) && at(3) == at(3));
        assert!(!rotation.dropped(8, None).contains(&true));
    }
}
