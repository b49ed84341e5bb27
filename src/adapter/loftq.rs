//! LoftQ: LoRA that starts as what quantizing a weight loses.
//!
//! `Q + scale B A` comes close to the weight W before quantization: A and B are the largest singular directions of `W - Q`,
//! and, in further rounds, Q is made again of `W - scale B A`. After one round the base is the quantized model as it is, and
//! the adapter a plain one for it. Source: Li et al., "LoftQ" (arXiv 2310.08659).

use super::attach::Initial;
use super::config::InitLoraWeights;
use super::residual::{Factors, factors, without};
use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::load::Originals;
use crate::model::{Linear, Parameter, Weight};

/// How a quantized layer's A and B start after so many rounds; after more than one, its weight is another.
///
/// # Errors
/// When the weight isn't quantized to `bits`, the weight before that can't be read, or the rank is too large.
pub(super) fn start(
    originals: &Originals,
    backend: &Backend,
    linear: &mut Linear,
    [bits, rounds]: [usize; 2],
    (r, scale): (usize, f32),
) -> Result<[Initial; 2]> {
    let Parameter::Frozen(Weight::Quantized(matrix)) = &linear.weight else {
        return Err(Error::tensor(
            &linear.path,
            "is not quantized, and LoftQ makes up for quantization; load the base with --quant nf4",
        ));
    };
    let config = matrix.config();
    if config.format.bits() != bits {
        let found =
            format!("is in {} bits ({}), loftq_bits is {bits}", config.format.bits(), config.format.name);
        return Err(Error::tensor(&linear.path, found));
    }
    if r > linear.in_features.min(linear.out_features) {
        let found = format!("has no {r} directions to start from; use a smaller r");
        return Err(Error::tensor(&linear.path, found));
    }
    let weight = originals.weight(linear)?;
    let mut base = matrix.clone();
    let mut found: Option<Factors> = None;
    for _ in 0..rounds {
        if let Some([a, b]) = &found {
            base = backend.quantize(&without(backend, &weight, [a, b], scale)?, &config)?;
        }
        let mut rest = backend.empty(weight.shape(), DType::F32)?;
        backend.dequantize(&mut rest, &base)?;
        backend.scale(&mut rest, -1.0)?;
        backend.add_assign(&mut rest, &weight)?;
        found = Some(factors(backend, &rest, InitLoraWeights::Pissa, r, scale)?);
    }
    let Some([a, b]) = found else { return Err(Error::tensor(&linear.path, "LoftQ needs a round")) };
    if rounds > 1 {
        linear.weight = Parameter::Frozen(Weight::Quantized(base));
    }
    Ok([Initial::Values(backend.to_vec(&a)?), Initial::Values(backend.to_vec(&b)?)])
}
