//! Elementary functions in f64 from basic operations alone, so that tables made from them (rotary
//! embeddings, initial weights, schedules) have the same bits on every platform. Accurate to about 1e-15.

pub mod solve;
pub mod svd;

use std::f64::consts::{FRAC_PI_2, LN_2};

/// Natural logarithm of a positive finite number.
pub fn ln(x: f64) -> f64 {
    if x <= 0.0 || !x.is_finite() {
        return if x == 0.0 { f64::NEG_INFINITY } else { f64::NAN };
    }
    let (scaled, shift) = if x < f64::MIN_POSITIVE { (x * (1u64 << 54) as f64, -54) } else { (x, 0) };
    let bits = scaled.to_bits();
    let mut exponent = ((bits >> 52) as i64 - 1023) as i32 + shift;
    let mut m = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) | 0x3ff0_0000_0000_0000);
    if m > std::f64::consts::SQRT_2 {
        m *= 0.5;
        exponent += 1;
    }
    // ln m = 2 artanh(s), s = (m - 1) / (m + 1), |s| <= 0.1716.
    let s = (m - 1.0) / (m + 1.0);
    let s2 = s * s;
    let series = (0..12).rev().fold(0.0, |sum, i| sum * s2 + 1.0 / f64::from(2 * i + 1));
    f64::from(exponent) * LN_2 + 2.0 * s * series
}

/// `e` to the power of `x`.
pub fn exp(x: f64) -> f64 {
    if x.is_nan() {
        return x;
    }
    if x > 709.78 {
        return f64::INFINITY;
    }
    if x < -708.0 {
        return 0.0;
    }
    const LN_2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    let n = (x / LN_2).round();
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let series = (1..=14).rev().fold(1.0, |sum, i| 1.0 + sum * r / f64::from(i));
    series * f64::from_bits(((n as i64 + 1023) as u64) << 52)
}

/// `base` to the power of `exponent`, for a positive base.
pub fn pow(base: f64, exponent: f64) -> f64 {
    if exponent == 0.0 { 1.0 } else { exp(exponent * ln(base)) }
}

/// Sine of an angle in radians; accurate for angles below 2^25.
pub fn sin(x: f64) -> f64 {
    let (r, quadrant) = reduce(x);
    match quadrant {
        0 => sin_core(r),
        1 => cos_core(r),
        2 => -sin_core(r),
        _ => -cos_core(r),
    }
}

/// Cosine of an angle in radians; accurate for angles below 2^25.
pub fn cos(x: f64) -> f64 {
    let (r, quadrant) = reduce(x);
    match quadrant {
        0 => cos_core(r),
        1 => -sin_core(r),
        2 => -cos_core(r),
        _ => sin_core(r),
    }
}

/// Takes away multiples of pi/2 (in three parts, the first two exact in products) and tells the quadrant.
fn reduce(x: f64) -> (f64, i64) {
    const PART_1: f64 = 1.570_796_326_734_125_6;
    const PART_2: f64 = 6.077_100_506_303_966e-11;
    const PART_3: f64 = 2.022_266_248_795_950_6e-21;
    let n = (x / FRAC_PI_2).round();
    (((x - n * PART_1) - n * PART_2) - n * PART_3, (n as i64).rem_euclid(4))
}

fn sin_core(r: f64) -> f64 {
    let r2 = r * r;
    let series = (1..=9).rev().fold(1.0, |sum, i| 1.0 - sum * r2 / f64::from(2 * i * (2 * i + 1)));
    r * series
}

fn cos_core(r: f64) -> f64 {
    let r2 = r * r;
    (1..=9).rev().fold(1.0, |sum, i| 1.0 - sum * r2 / f64::from((2 * i - 1) * (2 * i)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agree_with_the_platform_to_the_last_digits() {
        for i in 0..20_000 {
            let x = f64::from(i) * 3.7 + 0.013;
            assert!((sin(x) - x.sin()).abs() < 3e-15, "sin {x}");
            assert!((cos(x) - x.cos()).abs() < 3e-15, "cos {x}");
            assert!((ln(x) - x.ln()).abs() <= 4e-16 * x.ln().abs().max(1.0), "ln {x}");
            let y = -f64::from(i) * 0.003;
            assert!((exp(y) - y.exp()).abs() <= 4e-16 * y.exp().max(1e-20) * 2.0, "exp {y}");
        }
        assert!((pow(10_000.0, -0.25) - 0.1).abs() < 1e-16);
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(ln(1.0), 0.0);
        assert!(ln(-1.0).is_nan() && exp(f64::NAN).is_nan());
    }
}
