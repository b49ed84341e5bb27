//! Operations on elements by themselves.

use super::real::Real;
use crate::backend::{Activation, RopeShape};
use crate::dtype::DType;
use crate::rng::PhiloxKey;
use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI, PI};

const GELU_CUBIC: f64 = 0.044715;

/// The activation function at `x`.
pub fn activate<R: Real>(x: R, activation: Activation) -> R {
    let (half, one) = (R::from_f64(0.5), R::one());
    match activation {
        Activation::Silu => x / (one + (-x).exp()),
        Activation::Gelu => half * x * (one + (x * R::from_f64(FRAC_1_SQRT_2)).erf()),
        Activation::GeluTanh => half * x * (one + gelu_argument(x).tanh()),
        Activation::Relu => x.max(R::zero()),
        Activation::Tanh => x.tanh(),
        Activation::Sigmoid => one / (one + (-x).exp()),
    }
}

/// Its derivative at `x`.
pub fn activation_slope<R: Real>(x: R, activation: Activation) -> R {
    let (half, one) = (R::from_f64(0.5), R::one());
    match activation {
        Activation::Silu => {
            let s = one / (one + (-x).exp());
            s * (one + x * (one - s))
        }
        Activation::Gelu => {
            let cdf = half * (one + (x * R::from_f64(FRAC_1_SQRT_2)).erf());
            let density = (-half * x * x).exp() * R::from_f64((2.0 * PI).sqrt().recip());
            cdf + x * density
        }
        Activation::GeluTanh => {
            let t = gelu_argument(x).tanh();
            let du = R::from_f64(FRAC_2_PI.sqrt()) * (one + R::from_f64(3.0 * GELU_CUBIC) * x * x);
            half * (one + t) + half * x * (one - t * t) * du
        }
        Activation::Tanh => one - x.tanh() * x.tanh(),
        Activation::Sigmoid => {
            let s = one / (one + (-x).exp());
            s * (one - s)
        }
        Activation::Relu if x.value() > 0.0 => one,
        Activation::Relu => R::zero(),
    }
}

/// `sqrt(2 / pi) (x + 0.044715 x^3)`.
fn gelu_argument<R: Real>(x: R) -> R {
    R::from_f64(FRAC_2_PI.sqrt()) * (x + R::from_f64(GELU_CUBIC) * x * x * x)
}

/// Rotates the heads of `x` (`[positions.len(), n_heads * head_dim]`) in place.
pub fn rope<R: Real>(x: &mut [R], table: &[R], positions: &[i32], shape: &RopeShape) {
    let half = shape.rotary_dim / 2;
    for (index, head) in x.chunks_mut(shape.head_dim).enumerate() {
        let row = positions[index / shape.n_heads] as usize * shape.rotary_dim;
        for i in 0..half {
            let (first, second) = if shape.interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
            let (cos, sin) = (table[row + i], table[row + half + i]);
            let sin = if shape.inverse { -sin } else { sin };
            let (a, b) = (head[first], head[second]);
            head[first] = (-b).mul_add(sin, a * cos);
            head[second] = a.mul_add(sin, b * cos);
        }
    }
}

/// `x` with dropped elements zero and kept ones scaled; `first` is the index of the first element.
pub fn dropout<R: Real>(x: &[R], p: f32, key: PhiloxKey, first: u64) -> Vec<R> {
    let factor = R::one() / (R::one() - R::from_f64(f64::from(p)));
    let kept = |element: u64| {
        let word = key.words(element / 4)[(element % 4) as usize];
        (word >> 8) as f32 / 16_777_216.0 >= p
    };
    (first..).zip(x).map(|(element, x)| if kept(element) { *x * factor } else { R::zero() }).collect()
}

/// `out[rows[i]] += x[i]`, each sum rounded to `dtype`.
pub fn scatter_add_rows<R: Real>(out: &mut [R], cols: usize, x: &[R], rows: &[i32], dtype: DType) {
    for (x, row) in x.chunks(cols).zip(rows) {
        let out = &mut out[*row as usize * cols..][..cols];
        out.iter_mut().zip(x).for_each(|(out, x)| *out = (*out + *x).rounded(dtype));
    }
}

/// Softmax cross-entropy of one row of logits, and its gradient times `grad_scale`.
pub fn cross_entropy<R: Real>(logits: &[R], target: usize, grad_scale: R) -> (R, Vec<R>) {
    let top = logits.iter().copied().reduce(R::max).unwrap_or(R::zero());
    let exponentials: Vec<R> = logits.iter().map(|x| (*x - top).exp()).collect();
    let total = super::matrix::row_sum(logits.len(), |sum: R, i| sum + exponentials[i]);
    let mut gradient: Vec<R> = exponentials.iter().map(|e| *e * (grad_scale / total)).collect();
    gradient[target] = gradient[target] - grad_scale;
    (top + total.ln() - logits[target], gradient)
}
