//! RMSNorm and LayerNorm.

use super::matrix::row_sum;
use super::real::Real;
use crate::dtype::DType;

/// RMSNorm of the rows of `x` (`[rows, weight.len()]`): `y` and `rstd` of each row.
pub fn rms_norm<R: Real>(x: &[R], weight: &[R], eps: R, dtype: DType) -> (Vec<R>, Vec<R>) {
    let (mut y, mut stats) = (Vec::new(), Vec::new());
    for x in x.chunks(weight.len()) {
        let squares = row_sum(x.len(), |sum, i| x[i].mul_add(x[i], sum));
        let rstd = R::one() / (squares / R::from_f64(x.len() as f64) + eps).sqrt();
        stats.push(rstd);
        y.extend(x.iter().zip(weight).map(|(x, w)| (*x * rstd).rounded(dtype) * *w));
    }
    (y, stats)
}

/// LayerNorm of the rows of `x`: `y`, and each row's mean and rstd.
pub fn layer_norm<R: Real>(x: &[R], weight: &[R], bias: Option<&[R]>, eps: R) -> (Vec<R>, Vec<R>) {
    let (mut y, mut stats) = (Vec::new(), Vec::new());
    for x in x.chunks(weight.len()) {
        let n = R::from_f64(x.len() as f64);
        let mean = row_sum(x.len(), |sum: R, i| sum + x[i]) / n;
        let squares = row_sum(x.len(), |sum, i| (x[i] - mean).mul_add(x[i] - mean, sum));
        let rstd = R::one() / (squares / n + eps).sqrt();
        stats.extend([mean, rstd]);
        for (i, x) in x.iter().enumerate() {
            let scaled = (*x - mean) * rstd * weight[i];
            y.push(bias.map_or(scaled, |bias| scaled + bias[i]));
        }
    }
    (y, stats)
}

/// Gradients of one of the norms: returns `dx`, adds to `dweight`.
///
/// With `n` the normalized row and `g = weight dy`: `dx = rstd (g - mean(g) - n mean(g n))`; RMSNorm, whose
/// `stats` are one number per row, has no `mean(g)`.
pub fn norm_backward<R: Real>(
    dweight: &mut [R],
    dy: &[R],
    x: &[R],
    stats: &[R],
    weight: &[R],
    dtype: DType,
) -> Vec<R> {
    let cols = weight.len();
    let layer_norm = stats.len() == 2 * (x.len() / cols);
    let mut dx = Vec::new();
    for (row, (x, dy)) in x.chunks(cols).zip(dy.chunks(cols)).enumerate() {
        let (mean, rstd) =
            if layer_norm { (stats[2 * row], stats[2 * row + 1]) } else { (R::zero(), stats[row]) };
        let n: Vec<R> = x.iter().map(|x| (*x - mean) * rstd).collect();
        let g: Vec<R> = weight.iter().zip(dy).map(|(w, dy)| *w * *dy).collect();
        let count = R::from_f64(cols as f64);
        let mean_g = if layer_norm { row_sum(cols, |sum: R, i| sum + g[i]) / count } else { R::zero() };
        let mean_gn = row_sum(cols, |sum, i| g[i].mul_add(n[i], sum)) / count;
        for i in 0..cols {
            dx.push((-n[i]).mul_add(mean_gn, g[i] - mean_g) * rstd);
            let factor = if layer_norm { n[i] } else { n[i].rounded(dtype) };
            dweight[i] = dy[i].mul_add(factor, dweight[i]);
        }
    }
    dx
}
