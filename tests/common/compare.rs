//! Comparison of results: bit for bit, or by errors against f64.

use lowrank::DType;

/// The number of elements whose bits differ; any NaN equals any other.
pub fn different_bits(a: &[f32], b: &[f32]) -> usize {
    assert_eq!(a.len(), b.len());
    let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
    a.iter().zip(b).filter(|(a, b)| !same(**a, **b)).count()
}

/// The largest and the root mean square difference; infinite where only one is finite.
fn errors(x: &[f32], truth: &[f32]) -> [f64; 2] {
    assert_eq!(x.len(), truth.len());
    let difference = |(x, t): (&f32, &f32)| match (x.is_finite(), t.is_finite()) {
        (true, true) => (f64::from(*x) - f64::from(*t)).abs(),
        (false, false) => 0.0,
        _ => f64::INFINITY,
    };
    let all: Vec<f64> = x.iter().zip(truth).map(difference).collect();
    let squares: f64 = all.iter().map(|e| e * e).sum();
    [all.iter().copied().fold(0.0, f64::max), (squares / all.len() as f64).sqrt()]
}

/// Whether `ours`, stored as `dtype`, is as near to `truth` as a plain computation in the same precision,
/// `naive`: at most twice its error (largest and root mean square), and half a unit of rounding of the
/// largest true value. Else what was found.
pub fn within_twice_naive(ours: &[f32], naive: &[f32], truth: &[f32], dtype: DType) -> Result<(), String> {
    let rounding = if dtype == DType::BF16 { 2f64.powi(-9) } else { 2f64.powi(-24) };
    let largest = truth.iter().filter(|t| t.is_finite()).map(|t| f64::from(t.abs())).fold(0.0, f64::max);
    let (ours, naive) = (errors(ours, truth), errors(naive, truth));
    for (what, ours, naive) in [("largest", ours[0], naive[0]), ("mean square", ours[1], naive[1])] {
        // In f32 the truth itself is rounded when it is stored.
        let allowed = 2.0 * naive + 2.0 * rounding * largest;
        if ours > allowed {
            return Err(format!("{what} error {ours:e}, naive {naive:e}, allowed {allowed:e}"));
        }
    }
    Ok(())
}
