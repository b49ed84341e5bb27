//! Sums and matrix products.

use super::real::Real;
use crate::dtype::DType;
use std::ops::Range;

/// One step of an accumulator in f32 or bf16 arithmetic (laws 1 and 2).
pub fn step<R: Real>(a: R, b: R, sum: R, arithmetic: DType) -> R {
    if arithmetic == DType::BF16 { a.bf16_step(b, sum) } else { a.mul_add(b, sum) }
}

/// `sum` plus the products of `k` pairs in order. An odd bf16 is paired with zeros.
pub fn dot<R: Real>(k: usize, pair: impl Fn(usize) -> (R, R), sum: R, arithmetic: DType) -> R {
    let sum = (0..k).map(pair).fold(sum, |sum, (a, b)| step(a, b, sum, arithmetic));
    if arithmetic == DType::BF16 && !k.is_multiple_of(2) {
        return step(R::zero(), R::zero(), sum, arithmetic);
    }
    sum
}

/// A product of some rows of the result: the rows, k, `a` `[rows, k]` and `b` `[k, n]`.
pub type Term<'a, R> = (Range<usize>, usize, &'a [R], &'a [R]);

/// `out[m, n] = scale (out + sum of a b) + bias`: [`crate::backend::Gemm`] with `out` holding the initial
/// accumulators.
pub fn gemm<R: Real>(
    out: &mut [R],
    n: usize,
    terms: &[Term<'_, R>],
    scale: R,
    bias: Option<&[R]>,
    arithmetic: DType,
) {
    for (index, out) in out.iter_mut().enumerate() {
        let (i, j) = (index / n, index % n);
        let own = terms.iter().filter(|(rows, ..)| rows.contains(&i));
        let sum = own.fold(*out, |sum, (rows, k, a, b)| {
            dot(*k, |l| (a[(i - rows.start) * k + l], b[l * n + j]), sum, arithmetic)
        });
        *out = scale * sum;
        if let Some(bias) = bias {
            *out = *out + bias[j];
        }
    }
}

/// A sum over a row of `n` by 16 lanes and a tree (law 3); `add(sum, i)` adds element `i`.
pub fn row_sum<R: Real>(n: usize, add: impl Fn(R, usize) -> R) -> R {
    let mut lanes = [R::zero(); 16];
    for i in 0..n {
        lanes[i % 16] = add(lanes[i % 16], i);
    }
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] = lanes[i] + lanes[i + width];
        }
    }
    lanes[0]
}

/// `out[c] += sum over rows of x[:, c]`, rows ascending.
pub fn add_column_sums<R: Real>(out: &mut [R], x: &[R]) {
    for row in x.chunks(out.len()) {
        out.iter_mut().zip(row).for_each(|(sum, x)| *sum = *sum + *x);
    }
}

/// Products of two matrices summed by column, rows ascending.
pub fn add_column_products<R: Real>(out: &mut [R], a: &[R], b: &[R]) {
    let cols = out.len();
    for (a, b) in a.chunks(cols).zip(b.chunks(cols)) {
        out.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum = a.mul_add(*b, *sum));
    }
}

/// Sum of squares: each block of 4096 by [`row_sum`], the blocks in f64.
pub fn sum_squares<R: Real>(x: &[R]) -> f64 {
    x.chunks(4096).map(|x| row_sum(x.len(), |sum, i| x[i].mul_add(x[i], sum)).value()).sum()
}
