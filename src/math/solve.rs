//! Inverse matrices in f64.

/// The inverse of a row-major matrix `[n, n]` by Gauss and Jordan's elimination with row pivots. One that has none gives
/// elements that are not finite.
pub fn inverse(a: &[f64], n: usize) -> Vec<f64> {
    let mut left = a.to_vec();
    let mut right = vec![0.0; n * n];
    right.iter_mut().step_by(n + 1).for_each(|x| *x = 1.0);
    for k in 0..n {
        let larger = |i: &usize, j: &usize| left[i * n + k].abs().total_cmp(&left[j * n + k].abs());
        let pivot = (k..n).max_by(larger).unwrap_or(k);
        for m in [&mut left, &mut right] {
            if pivot != k {
                let (upper, lower) = m.split_at_mut(pivot * n);
                upper[k * n..][..n].swap_with_slice(&mut lower[..n]);
            }
        }
        let factor = 1.0 / left[k * n + k];
        for m in [&mut left, &mut right] {
            m[k * n..][..n].iter_mut().for_each(|x| *x *= factor);
        }
        for i in (0..n).filter(|i| *i != k) {
            let factor = left[i * n + k];
            for m in [&mut left, &mut right] {
                let row = m[k * n..][..n].to_vec();
                m[i * n..][..n].iter_mut().zip(row).for_each(|(x, y)| *x -= factor * y);
            }
        }
    }
    right
}

#[cfg(test)]
mod tests {
    use super::inverse;

    #[test]
    fn a_matrix_times_its_inverse_is_one() {
        let n = 7;
        // The first pivot is zero.
        let a: Vec<f64> =
            (0..n * n).map(|i| if i == 0 { 0.0 } else { ((i * i) as f64 * 0.37).sin() }).collect();
        let b = inverse(&a, n);
        for i in 0..n {
            for j in 0..n {
                let x: f64 = (0..n).map(|k| a[i * n + k] * b[k * n + j]).sum();
                assert!((x - f64::from(u8::from(i == j))).abs() < 1e-11, "{i} {j} {x}");
            }
        }
    }
}
