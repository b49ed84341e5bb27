//! Starts of LoRA that take the adapter out of the base: PiSSA and OLoRA.
//!
//! The factors `B0 A0` are part of the weight, and the base keeps the rest, `W - scale B0 A0`, so the model starts as it
//! was. PEFT's files then belong to that rest. Here an adapter is saved as a plain one for the base itself: its change is
//! `scale (B A - B0 A0)`, a LoRA of twice the rank. Sources: Meng et al., "PiSSA" (arXiv 2404.02948), by subspace
//! iteration (Halko et al., arXiv 0909.4061); Büyükakyüz, "OLoRA" (arXiv 2406.01775).

use super::attach::Initial;
use super::config::{InitLoraWeights, LoraConfig};
use super::io::{ADAPTER_FILE, AdapterTensors};
use super::method::Method;
use crate::backend::{Backend, Gemm, GemmTerm, Matrix};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::math::svd::{low_rank_svd, orthonormal};
use crate::model::{Linear, Model, Parameter, Weight};
use crate::rng::{Philox, PhiloxKey, Stream};
use crate::tensor::Tensor;
use std::path::Path;

/// Rounds of subspace iteration.
const ROUNDS: usize = 16;

/// The factors of a layer's weight: `A0` `[r, in]` and `B0` `[out, r]`, f32.
pub type Factors = [Tensor; 2];

/// `x y` or `x^T y` in f32.
fn product(backend: &Backend, x: Matrix<'_>, y: &Tensor) -> Result<Tensor> {
    let mut out = backend.empty(&[x.shape().0, y.cols()], DType::F32)?;
    backend.gemm(&mut out, &Gemm::new(&[GemmTerm { a: x, b: Matrix::plain(y) }]))?;
    Ok(out)
}

/// The same columns, orthonormal.
fn orthonormalized(backend: &Backend, x: &Tensor) -> Result<Tensor> {
    backend.from_slice(&orthonormal(&backend.to_vec::<f32>(x)?, x.cols()), x.shape())
}

/// `w - scale B A` of an upright weight (f32 `[out, in]`).
pub(super) fn without(backend: &Backend, w: &Tensor, [a, b]: [&Tensor; 2], scale: f32) -> Result<Tensor> {
    let mut rest = backend.empty(w.shape(), DType::F32)?;
    backend.cast(&mut rest, w)?;
    let mut minus = backend.empty(b.shape(), DType::F32)?;
    backend.cast(&mut minus, b)?;
    backend.scale(&mut minus, -scale)?;
    let terms = [GemmTerm { a: Matrix::plain(&minus), b: Matrix::plain(a) }];
    backend.gemm(&mut rest, &Gemm { accumulate: true, ..Gemm::new(&terms) })?;
    Ok(rest)
}

/// The factors of an upright weight (f32 `[out, in]`).
pub(super) fn factors(
    backend: &Backend,
    w: &Tensor,
    init: InitLoraWeights,
    r: usize,
    scale: f32,
) -> Result<Factors> {
    let (outputs, inputs) = (w.rows(), w.cols());
    if init == InitLoraWeights::Olora {
        let first: Vec<f32> =
            backend.to_vec::<f32>(w)?.chunks(inputs).flat_map(|row| row[..r].to_vec()).collect();
        let q = backend.from_slice(&orthonormal(&first, r), &[outputs, r])?;
        return Ok([product(backend, Matrix::transposed(&q), w)?, q]);
    }
    let width = (2 * r + 10).min(inputs).min(outputs);
    let mut rng = Philox::new(PhiloxKey::new(0, Stream::Init, width as u64));
    let start: Vec<f32> = (0..inputs * width).map(|_| rng.normal()).collect();
    let mut right = backend.from_slice(&start, &[inputs, width])?;
    let mut left = backend.empty(&[outputs, width], DType::F32)?;
    for _ in 0..ROUNDS {
        left = orthonormalized(backend, &product(backend, Matrix::plain(w), &right)?)?;
        right = orthonormalized(backend, &product(backend, Matrix::transposed(w), &left)?)?;
    }
    let core = product(backend, Matrix::transposed(&left), w)?;
    let (left, core) = (backend.to_vec::<f32>(&left)?, backend.to_vec::<f32>(&core)?);
    // U S and V^T; half of S goes to each side.
    let (mut up, mut down) = low_rank_svd(&left, &core, [outputs, width, inputs], r);
    for k in 0..r {
        let s = (0..outputs).map(|i| f64::from(up[i * r + k]).powi(2)).sum::<f64>().sqrt();
        let root = (s / f64::from(scale)).sqrt();
        let (for_up, for_down) = (if s > 0.0 { root / s } else { 0.0 }, root);
        (0..outputs).for_each(|i| up[i * r + k] = (f64::from(up[i * r + k]) * for_up) as f32);
        (0..inputs).for_each(|j| {
            down[k * inputs + j] = (f64::from(down[k * inputs + j]) * for_down) as f32;
        });
    }
    Ok([backend.from_slice(&down, &[r, inputs])?, backend.from_slice(&up, &[outputs, r])?])
}

/// Takes the factors of a frozen layer out of its weight; gives them, and how A and B start.
///
/// # Errors
/// When the weight is trained, the rank is larger than its sides, or memory can't be had.
pub(super) fn take_out(
    backend: &Backend,
    linear: &mut Linear,
    init: InitLoraWeights,
    r: usize,
    scale: f32,
) -> Result<(Factors, [Initial; 2])> {
    let Parameter::Frozen(weight) = &linear.weight else {
        return Err(Error::tensor(&linear.path, "is trained whole and can't be taken apart"));
    };
    if r > linear.in_features.min(linear.out_features) {
        return Err(Error::tensor(
            &linear.path,
            format!("has no {r} directions to start from; use a smaller r"),
        ));
    }
    let upright = match weight {
        Weight::Dense(tensor) => {
            let wide = backend.to_dtype(tensor, DType::F32)?;
            if linear.conv1d { backend.transposed(&wide)? } else { wide }
        }
        Weight::Quantized(matrix) => {
            let mut dense = backend.empty(matrix.shape(), DType::F32)?;
            backend.dequantize(&mut dense, matrix)?;
            dense
        }
    };
    let factors = factors(backend, &upright, init, r, scale)?;
    let rest = without(backend, &upright, [&factors[0], &factors[1]], scale)?;
    let rest = match weight {
        Weight::Dense(tensor) => {
            let rest = if linear.conv1d { backend.transposed(&rest)? } else { rest };
            let rest = backend.to_dtype(&rest, tensor.dtype())?;
            tensor.release_pages();
            Weight::Dense(rest)
        }
        Weight::Quantized(matrix) => Weight::Quantized(backend.quantize(&rest, &matrix.config())?),
    };
    linear.weight = Parameter::Frozen(rest);
    let start =
        [Initial::Values(backend.to_vec(&factors[0])?), Initial::Values(backend.to_vec(&factors[1])?)];
    Ok((factors, start))
}

/// The settings of the plain adapter of twice the rank.
pub(super) fn doubled(config: &LoraConfig) -> LoraConfig {
    let grow = if config.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
    LoraConfig {
        r: 2 * config.r,
        lora_alpha: grow * config.lora_alpha,
        rank_pattern: config.rank_pattern.iter().map(|(k, r)| (k.clone(), 2 * r)).collect(),
        alpha_pattern: config.alpha_pattern.iter().map(|(k, a)| (k.clone(), grow * a)).collect(),
        init_lora_weights: InitLoraWeights::Default,
        ..config.clone()
    }
}

/// The tensors of the adapter for the base itself.
pub(super) fn tensors(config: &LoraConfig, model: &Model) -> Result<Vec<(String, Tensor)>> {
    let (backend, params) = (&model.backend, &model.params);
    let start = |name: &str, which: usize| {
        let module = name.strip_suffix([".lora_A.weight", ".lora_B.weight"][which])?;
        let linear = model.linears().into_iter().find(|l| l.path == module)?;
        linear.lora()?.taken_out.as_ref().map(|factors| factors[which].clone())
    };
    let mut tensors = Vec::new();
    for id in params.ids() {
        let name = &params.info(id).name;
        let mut values = params.master(id)?;
        if let Some(a0) = start(name, 0) {
            // [A; A0].
            let both = backend.empty(&[2 * a0.rows(), a0.cols()], DType::F32)?;
            backend.cast(&mut both.slice(0..a0.rows())?, &values)?;
            backend.cast(&mut both.slice(a0.rows()..2 * a0.rows())?, &a0)?;
            values = both;
        } else if let Some(b0) = start(name, 1) {
            // [B, -B0].
            let (r, mut both) = (b0.cols(), backend.empty(&[b0.rows(), 2 * b0.cols()], DType::F32)?);
            let mut minus = backend.empty(b0.shape(), DType::F32)?;
            backend.cast(&mut minus, &b0)?;
            backend.scale(&mut minus, -1.0)?;
            backend.copy_columns(&mut both, 0, &values, 0, r, false)?;
            backend.copy_columns(&mut both, r, &minus, 0, r, false)?;
            values = both;
        }
        tensors.push((config.key(params, name), values));
    }
    Ok(tensors)
}

/// Reads A and B from a file of this kind, or of PEFT's, which holds them alone.
pub(super) fn load_values(config: &LoraConfig, model: &mut Model, dir: &Path) -> Result<()> {
    let mut tensors = AdapterTensors::open(dir, ADAPTER_FILE)?;
    for id in model.params.ids() {
        let info = model.params.info(id).clone();
        let key = config.key(&model.params, &info.name);
        let mut wanted = info.shape.clone();
        let side = usize::from(info.name.ends_with(".lora_B.weight"));
        let of_both = side == 1 || info.name.ends_with(".lora_A.weight");
        if of_both && tensors.shape(&key).is_some_and(|shape| shape.get(side) == Some(&(2 * wanted[side]))) {
            wanted[side] *= 2;
        }
        let tensor = model.backend.to_dtype(&tensors.take(&key, &wanted)?, DType::F32)?;
        let mut own = model.backend.empty(&info.shape, DType::F32)?;
        if wanted == info.shape {
            own = tensor;
        } else if side == 0 {
            model.backend.cast(&mut own, &tensor.slice(0..info.shape[0])?)?;
        } else {
            model.backend.copy_columns(&mut own, 0, &tensor, 0, info.shape[1], false)?;
        }
        model.params.copy_from(id, &own)?;
    }
    tensors.finish()
}
