//! The singular value decomposition of a product of thin matrices, in f64: orthogonal bases of both, and one-sided Jacobi
//! rotations of the small matrix between them. Source: Golub and Van Loan, "Matrix Computations", 5.2 and 8.6.

/// Rotations are swept at most so often; a few are enough.
const SWEEPS: usize = 60;

/// Columns, each a vector.
type Columns = Vec<Vec<f64>>;

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `q` with orthonormal columns (or zero ones) and upper triangular `r` by columns, `q r` the given columns.
fn qr(columns: &Columns) -> (Columns, Columns) {
    let n = columns.len();
    let (mut q, mut r): (Columns, Columns) = (Vec::new(), Vec::new());
    for column in columns {
        let (mut v, mut coefficients) = (column.clone(), vec![0.0; n]);
        // Twice, so that what the first time loses to rounding is made up for.
        for _ in 0..2 {
            for (known, coefficient) in q.iter().zip(&mut coefficients) {
                let along = dot(known, &v);
                *coefficient += along;
                v.iter_mut().zip(known).for_each(|(x, k)| *x -= along * k);
            }
        }
        let (length, whole) = (dot(&v, &v).sqrt(), dot(column, column).sqrt());
        if length > 1e-12 * whole {
            v.iter_mut().for_each(|x| *x /= length);
            coefficients[q.len()] = length;
        } else {
            v.iter_mut().for_each(|x| *x = 0.0);
        }
        q.push(v);
        r.push(coefficients);
    }
    (q, r)
}

/// The columns of a row-major matrix of `cols` columns, orthonormal: each what is left of it after those before, of length 1,
/// or zero if nothing is.
pub fn orthonormal(x: &[f32], cols: usize) -> Vec<f32> {
    let rows = x.len() / cols.max(1);
    let columns: Columns =
        (0..cols).map(|k| (0..rows).map(|i| f64::from(x[i * cols + k])).collect()).collect();
    let (q, _) = qr(&columns);
    (0..rows).flat_map(|i| q.iter().map(move |column| column[i] as f32)).collect()
}

/// Rotates pairs of columns of `m`, and of `v` with them, until the columns of `m` are orthogonal.
fn orthogonalize(m: &mut Columns, v: &mut Columns) {
    for _ in 0..SWEEPS {
        let mut rotated = false;
        for i in 0..m.len() {
            for j in i + 1..m.len() {
                let (a, b, c) = (dot(&m[i], &m[i]), dot(&m[j], &m[j]), dot(&m[i], &m[j]));
                if c.abs() <= 1e-15 * (a * b).sqrt() || c == 0.0 {
                    continue;
                }
                rotated = true;
                let zeta = (b - a) / (2.0 * c);
                let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let t = if zeta == 0.0 { 1.0 } else { t };
                let cos = 1.0 / (1.0 + t * t).sqrt();
                let sin = cos * t;
                for columns in [&mut *m, &mut *v] {
                    for k in 0..columns[i].len() {
                        let (x, y) = (columns[i][k], columns[j][k]);
                        columns[i][k] = cos * x - sin * y;
                        columns[j][k] = sin * x + cos * y;
                    }
                }
            }
        }
        if !rotated {
            return;
        }
    }
}

/// The best factors of rank `rank` for `b a`, with `b` `[outputs, r]` and `a` `[r, inputs]`, row-major: `U S`
/// `[outputs, rank]` and `V^T` `[rank, inputs]`, the largest singular value first, zeros where there are fewer.
pub fn low_rank_svd(
    b: &[f32],
    a: &[f32],
    [outputs, r, inputs]: [usize; 3],
    rank: usize,
) -> (Vec<f32>, Vec<f32>) {
    let columns_of = |x: &dyn Fn(usize, usize) -> f32, n: usize| -> Columns {
        (0..r).map(|k| (0..n).map(|i| f64::from(x(i, k))).collect()).collect()
    };
    let (q_b, r_b) = qr(&columns_of(&|i, k| b[i * r + k], outputs));
    let (q_a, r_a) = qr(&columns_of(&|i, k| a[k * inputs + i], inputs));
    // The core R_b R_a^T by columns.
    let mut core: Columns =
        (0..r).map(|j| (0..r).map(|i| (0..r).map(|k| r_b[k][i] * r_a[k][j]).sum()).collect()).collect();
    let mut v: Columns = (0..r).map(|j| (0..r).map(|i| f64::from(u8::from(i == j))).collect()).collect();
    orthogonalize(&mut core, &mut v);
    let mut order: Vec<usize> = (0..r).collect();
    let squares: Vec<f64> = core.iter().map(|c| dot(c, c)).collect();
    order.sort_by(|i, j| squares[*j].total_cmp(&squares[*i]));
    let (mut up, mut down) = (vec![0.0; outputs * rank], vec![0.0; rank * inputs]);
    for (place, &k) in order.iter().take(rank).enumerate() {
        for i in 0..outputs {
            up[i * rank + place] = (0..r).map(|l| q_b[l][i] * core[k][l]).sum::<f64>() as f32;
        }
        for i in 0..inputs {
            down[place * inputs + i] = (0..r).map(|l| q_a[l][i] * v[k][l]).sum::<f64>() as f32;
        }
    }
    (up, down)
}

#[cfg(test)]
mod tests {
    use super::low_rank_svd;
    use crate::rng::{Philox, PhiloxKey, Stream};

    fn product(b: &[f32], a: &[f32], [m, k, n]: [usize; 3]) -> Vec<f64> {
        let mut out = vec![0.0; m * n];
        for i in 0..m {
            for l in 0..k {
                for j in 0..n {
                    out[i * n + j] += f64::from(b[i * k + l]) * f64::from(a[l * n + j]);
                }
            }
        }
        out
    }

    #[test]
    fn full_rank_gives_the_product_back_and_less_leaves_the_smallest_part() {
        let mut rng = Philox::new(PhiloxKey::new(1, Stream::Dummy, 0));
        let [m, k, n] = [23, 6, 17];
        let mut b: Vec<f32> = (0..m * k).map(|_| rng.normal()).collect();
        let a: Vec<f32> = (0..k * n).map(|_| rng.normal()).collect();
        // A column twice: the product has rank 5.
        (0..m).for_each(|i| b[i * k + 5] = b[i * k]);
        let exact = product(&b, &a, [m, k, n]);
        let distance = |rank: usize| {
            let (up, down) = low_rank_svd(&b, &a, [m, k, n], rank);
            let near = product(&up, &down, [m, rank, n]);
            near.iter().zip(&exact).map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt()
        };
        assert!(distance(6) < 1e-4 && distance(5) < 1e-4);
        let errors: Vec<f64> = (1..=5).map(distance).collect();
        assert!(errors.windows(2).all(|w| w[0] > w[1]), "{errors:?}");
        // The error of rank r is the norm of the singular values left out: those of U S.
        let (up, _) = low_rank_svd(&b, &a, [m, k, n], 5);
        let value = |c: usize| (0..m).map(|i| f64::from(up[i * 5 + c]).powi(2)).sum::<f64>();
        for rank in 1..5 {
            let left: f64 = (rank..5).map(value).sum::<f64>().sqrt();
            assert!((left - errors[rank - 1]).abs() < 1e-4 * errors[0], "rank {rank}");
        }
    }
}
