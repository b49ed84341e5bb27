//! Numbers that the reference computes with.

use crate::dtype::DType;
use half::bf16;
use std::fmt::Debug;
use std::ops::{Add, Div, Mul, Neg, Sub};

/// A real number: f32 as the specification rounds it, f64 for the truth, [`Dual`] for its derivative.
pub trait Real:
    Copy
    + Debug
    + Send
    + Sync
    + 'static
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// The number nearest to `x`.
    fn from_f64(x: f64) -> Self;

    /// The value alone, for comparisons and for storing.
    fn value(self) -> f64;

    /// `self * b + c`, rounded once.
    fn mul_add(self, b: Self, c: Self) -> Self;

    /// Square root.
    fn sqrt(self) -> Self;

    /// `e` to the power of `self`.
    fn exp(self) -> Self;

    /// Natural logarithm.
    fn ln(self) -> Self;

    /// Hyperbolic tangent.
    fn tanh(self) -> Self;

    /// Error function.
    fn erf(self) -> Self;

    /// The number as `dtype` holds it. Types finer than f32 stay exact: they stand for the truth.
    fn rounded(self, dtype: DType) -> Self;

    /// `sum + self * b` in bf16 arithmetic (law 2): denormal operands and results are zero. Exact types stay
    /// exact.
    fn bf16_step(self, b: Self, sum: Self) -> Self {
        self.mul_add(b, sum)
    }

    /// The larger number by value.
    fn max(self, other: Self) -> Self {
        if other.value() > self.value() { other } else { self }
    }

    /// Zero.
    fn zero() -> Self {
        Self::from_f64(0.0)
    }

    /// One.
    fn one() -> Self {
        Self::from_f64(1.0)
    }
}

/// The functions of f32 are those of f64, rounded once: as good as any same-precision library.
impl Real for f32 {
    fn from_f64(x: f64) -> Self {
        x as f32
    }
    fn value(self) -> f64 {
        f64::from(self)
    }
    fn mul_add(self, b: Self, c: Self) -> Self {
        f32::mul_add(self, b, c)
    }
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }
    fn exp(self) -> Self {
        f64::from(self).exp() as f32
    }
    fn ln(self) -> Self {
        f64::from(self).ln() as f32
    }
    fn tanh(self) -> Self {
        f64::from(self).tanh() as f32
    }
    fn erf(self) -> Self {
        erf(f64::from(self)) as f32
    }
    fn rounded(self, dtype: DType) -> Self {
        if dtype == DType::BF16 { bf16::from_f32(self).to_f32() } else { self }
    }
    fn bf16_step(self, b: Self, sum: Self) -> Self {
        let (a, b, sum) = (flushed(self), flushed(b), flushed(sum));
        let result = f32::mul_add(a, b, sum);
        // A result is denormal if it is so when rounded to 24 bits with no least exponent, even if as an f32
        // it rounds up to the smallest normal number. (Around there the sum in f64 is exact.)
        let exact = f64::from(a) * f64::from(b) + f64::from(sum);
        let bound = f64::from(f32::MIN_POSITIVE) * (1.0 - 2f64.powi(-25));
        if exact.abs() < bound { 0.0f32.copysign(result) } else { flushed(result) }
    }
}

impl Real for f64 {
    fn from_f64(x: f64) -> Self {
        x
    }
    fn value(self) -> f64 {
        self
    }
    fn mul_add(self, b: Self, c: Self) -> Self {
        f64::mul_add(self, b, c)
    }
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    fn exp(self) -> Self {
        f64::exp(self)
    }
    fn ln(self) -> Self {
        f64::ln(self)
    }
    fn tanh(self) -> Self {
        f64::tanh(self)
    }
    fn erf(self) -> Self {
        erf(self)
    }
    fn rounded(self, _: DType) -> Self {
        self
    }
}

/// Zero of the same sign for a denormal number.
fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}

/// The error function: `2 / sqrt(pi) exp(-x^2) sum of 2^n x^(2n+1) / (2n+1)!!`, a series of positive terms.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return 1.0f64.copysign(x);
    }
    let (mut term, mut sum, mut odd) = (x, x, 1.0);
    while term.abs() > sum.abs() * 1e-17 {
        odd += 2.0;
        term *= 2.0 * x * x / odd;
        sum += term;
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

/// A value and its derivative along one direction: computing with duals differentiates exactly.
#[derive(Clone, Copy, Debug)]
pub struct Dual {
    /// The value.
    pub value: f64,
    /// The derivative.
    pub derivative: f64,
}

impl Dual {
    /// A function's value at `self` and its derivative there, by the chain rule.
    fn chain(self, value: f64, slope: f64) -> Self {
        Dual { value, derivative: slope * self.derivative }
    }
}

impl Add for Dual {
    type Output = Self;
    fn add(self, b: Self) -> Self {
        Dual { value: self.value + b.value, derivative: self.derivative + b.derivative }
    }
}

impl Sub for Dual {
    type Output = Self;
    fn sub(self, b: Self) -> Self {
        Dual { value: self.value - b.value, derivative: self.derivative - b.derivative }
    }
}

impl Mul for Dual {
    type Output = Self;
    fn mul(self, b: Self) -> Self {
        let derivative = self.derivative * b.value + self.value * b.derivative;
        Dual { value: self.value * b.value, derivative }
    }
}

impl Div for Dual {
    type Output = Self;
    fn div(self, b: Self) -> Self {
        let value = self.value / b.value;
        Dual { value, derivative: (self.derivative - value * b.derivative) / b.value }
    }
}

impl Neg for Dual {
    type Output = Self;
    fn neg(self) -> Self {
        Dual { value: -self.value, derivative: -self.derivative }
    }
}

impl Real for Dual {
    fn from_f64(x: f64) -> Self {
        Dual { value: x, derivative: 0.0 }
    }
    fn value(self) -> f64 {
        self.value
    }
    fn mul_add(self, b: Self, c: Self) -> Self {
        self * b + c
    }
    fn sqrt(self) -> Self {
        let root = self.value.sqrt();
        self.chain(root, 0.5 / root)
    }
    fn exp(self) -> Self {
        let e = self.value.exp();
        self.chain(e, e)
    }
    fn ln(self) -> Self {
        self.chain(self.value.ln(), 1.0 / self.value)
    }
    fn tanh(self) -> Self {
        let t = self.value.tanh();
        self.chain(t, 1.0 - t * t)
    }
    fn erf(self) -> Self {
        let slope = std::f64::consts::FRAC_2_SQRT_PI * (-self.value * self.value).exp();
        self.chain(erf(self.value), slope)
    }
    fn rounded(self, _: DType) -> Self {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_function_at_known_points() {
        // Abramowitz and Stegun, "Handbook of mathematical functions", table 7.1.
        for (x, y) in [(0.5, 0.520_499_877_8), (1.0, 0.842_700_792_9), (2.0, 0.995_322_265_0)] {
            assert!((erf(x) - y).abs() < 1e-10 && (erf(-x) + y).abs() < 1e-10);
        }
        assert_eq!(erf(0.0), 0.0);
        assert!((erf(5.9) - 1.0).abs() < 1e-15);
    }

    #[test]
    fn duals_differentiate() {
        let f = |x: Dual| ((x * x).exp() / (x.sqrt() + Dual::one()) - x.tanh()).ln() + x.erf();
        let (x, h) = (1.3, 1e-6);
        let at = |x: f64| f(Dual::from_f64(x)).value;
        let slope = (at(x + h) - at(x - h)) / (2.0 * h);
        let dual = f(Dual { value: x, derivative: 1.0 });
        assert!((dual.derivative - slope).abs() < 1e-8, "{} {slope}", dual.derivative);
    }
}
