//! Steps of the optimizers on single elements and blocks.

use super::real::Real;
use crate::backend::OptimizerStep;
use crate::quant::dynamic_map::DynamicMap;

/// One AdamW step on one element: the new `(p, m, v)`.
pub fn adamw<R: Real>(p: R, g: R, m: R, v: R, step: &OptimizerStep) -> (R, R, R) {
    let constant = R::from_f64;
    let g = g * constant(f64::from(step.grad_scale));
    let m = constant(step.beta1).mul_add(m, constant(1.0 - step.beta1) * g);
    let v = constant(step.beta2).mul_add(v, constant(1.0 - step.beta2) * g * g);
    let denominator = v.sqrt() / constant(step.bias_correction2_sqrt) + constant(step.epsilon);
    let decayed = p * constant(1.0 - step.learning_rate * step.weight_decay);
    let p = (-constant(step.learning_rate / step.bias_correction1)).mul_add(m / denominator, decayed);
    (p, m, v)
}

/// A block of moments from its codes.
pub fn decode_moments<R: Real>(codes: &[u8], absmax: R, map: &DynamicMap) -> Vec<R> {
    codes.iter().map(|code| R::from_f64(map.levels[usize::from(*code)].into()) * absmax).collect()
}

/// A block's codes and its largest magnitude.
pub fn encode_moments<R: Real>(moments: &[R], map: &DynamicMap) -> (Vec<u8>, R) {
    let magnitude = |x: R| if x.value() < 0.0 { -x } else { x };
    let absmax = moments.iter().fold(R::zero(), |most, x| most.max(magnitude(*x)));
    let inverse = R::from_f64(1.0) / absmax.max(R::from_f64(1e-38));
    (moments.iter().map(|x| map.nearest((*x * inverse).value() as f32)).collect(), absmax)
}

/// One Lion step on one element: the new `(p, m)`.
pub fn lion<R: Real>(p: R, g: R, m: R, step: &OptimizerStep) -> (R, R) {
    let constant = R::from_f64;
    let g = g * constant(f64::from(step.grad_scale));
    let update = constant(step.beta1).mul_add(m, constant(1.0 - step.beta1) * g).value();
    let sign = if update > 0.0 {
        1.0
    } else if update < 0.0 {
        -1.0
    } else {
        0.0
    };
    let decayed = p * constant(1.0 - step.learning_rate * step.weight_decay);
    let m = constant(step.beta2).mul_add(m, constant(1.0 - step.beta2) * g);
    (decayed - constant(sign * step.learning_rate), m)
}

/// One step of gradient descent on one element.
pub fn sgd<R: Real>(p: R, g: R, step: &OptimizerStep) -> R {
    let constant = R::from_f64;
    let g = constant(step.weight_decay).mul_add(p, g * constant(f64::from(step.grad_scale)));
    (-constant(step.learning_rate)).mul_add(g, p)
}
