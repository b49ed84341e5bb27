//! Putting a LoRA adapter on a model, or making the whole model trainable.

use super::config::{Bias, InitLoraWeights, LoraConfig};
use super::target::{Target, no_such_module, select_targets, spelled_out};
use crate::error::{Error, Result};
use crate::model::{Lora, Model, Parameter, Weight};
use crate::param::{ParamId, ParamLayout};
use crate::rng::{Philox, PhiloxKey, Stream};
use crate::tensor::Tensor;

/// Parameters of the base that are trained, with their present values.
type Copies = Vec<(ParamId, Tensor)>;

/// Puts an adapter on a base model: low-rank matrices with initial values from `seed`, and the biases and
/// modules that are trained whole. `config.fan_in_fan_out` and
/// `config.target_modules` are set to what PEFT writes for this model.
///
/// # Errors
/// When the targets don't fit the model or memory can't be had.
pub fn attach(model: &mut Model, config: &mut LoraConfig, seed: u64) -> Result<()> {
    config.check("adapter")?;
    let modules = model.modules();
    let targets = select_targets(config, &modules, &model.config.model_type)?;
    if let Some(head) = targets.iter().find(|t| t.path == model.head.path) {
        return Err(Error::config(
            "adapter",
            "target_modules",
            format!(
                "`{0}`: low-rank adapters on the output head are not supported; train it whole by modules_to_save `{0}`",
                head.path
            ),
        ));
    }
    for name in &config.modules_to_save {
        if !modules.iter().any(|m| m.path.ends_with(name.as_str())) {
            return Err(no_such_module("modules_to_save", name, &modules));
        }
    }
    config.fan_in_fan_out = model.config.conv1d;
    config.target_modules =
        Some(spelled_out(config.target_modules.as_ref(), &modules, &model.config.model_type)?);
    let mut layout = ParamLayout::default();
    let loras = add_low_rank(model, config, &targets, &mut layout);
    let copies = add_base_parameters(model, config, &targets, &mut layout)?;
    model.params = layout.build(&model.backend, model.dtype)?;
    for (index, lora) in loras.iter().enumerate() {
        initialize(model, config, lora, seed, index as u64)?;
    }
    for (id, values) in copies {
        model.params.copy_from(id, &values)?;
        values.release_pages();
    }
    Ok(())
}

/// Makes every parameter of the base trainable.
///
/// # Errors
/// When memory can't be had.
pub fn attach_full(model: &mut Model) -> Result<()> {
    let mut layout = ParamLayout::default();
    let mut copies = Copies::new();
    for (name, parameter) in model.parameters_mut() {
        make_trainable(&name, parameter, &mut layout, &mut copies)?;
    }
    model.retie();
    model.params = layout.build(&model.backend, model.dtype)?;
    for (id, values) in copies {
        model.params.copy_from(id, &values)?;
        values.release_pages();
    }
    Ok(())
}

/// Adds A and B (and a bias on B) of every target, in the model's order.
fn add_low_rank(
    model: &mut Model,
    config: &LoraConfig,
    targets: &[Target],
    layout: &mut ParamLayout,
) -> Vec<Lora> {
    let mut loras = Vec::with_capacity(targets.len());
    for linear in model.linears_mut() {
        linear.lora = targets.iter().find(|t| t.path == linear.path).map(|target| {
            let path = &linear.path;
            let a = layout.add(format!("{path}.lora_A.weight"), &[target.r, linear.in_features], true);
            let b = layout.add(format!("{path}.lora_B.weight"), &[linear.out_features, target.r], true);
            let bias = config
                .lora_bias
                .then(|| layout.add(format!("{path}.lora_B.bias"), &[linear.out_features], false));
            Lora {
                a,
                b,
                bias,
                scale: target.scale as f32,
                dropout: config.lora_dropout as f32,
                stream: loras.len() as u64,
            }
        });
        loras.extend(linear.lora.clone());
    }
    loras
}

/// Makes the biases and whole modules that the settings name trainable.
fn add_base_parameters(
    model: &mut Model,
    config: &LoraConfig,
    targets: &[Target],
    layout: &mut ParamLayout,
) -> Result<Copies> {
    let mut copies = Copies::new();
    let kept = |module: &str| config.modules_to_save.iter().any(|name| module.ends_with(name.as_str()));
    // A tied head that is trained whole gets values of its own; the embedding stays.
    let tied_head = model.config.tie_word_embeddings && kept(&model.head.path);
    for (name, parameter) in model.parameters_mut() {
        let (module, kind) = name.rsplit_once('.').unwrap_or((&name, ""));
        let by_bias = kind == "bias"
            && match config.bias {
                Bias::None => false,
                Bias::All => true,
                Bias::LoraOnly => targets.iter().any(|t| t.path == module),
            };
        if by_bias || kept(module) {
            make_trainable(&name, parameter, layout, &mut copies)?;
        }
    }
    if tied_head {
        let name = format!("{}.weight", model.head.path);
        make_trainable(&name, &mut model.head.weight, layout, &mut copies)?;
    }
    Ok(copies)
}

fn make_trainable(
    name: &str,
    parameter: &mut Parameter,
    layout: &mut ParamLayout,
    copies: &mut Copies,
) -> Result<()> {
    let tensor = match parameter {
        Parameter::Trainable(_) => return Ok(()),
        Parameter::Frozen(Weight::Dense(tensor)) => tensor,
        Parameter::Frozen(Weight::Quantized(_)) => {
            return Err(Error::tensor(
                name,
                "a quantized weight can't be trained whole; load the base without quantization",
            ));
        }
    };
    // Biases and norms have one dimension; weight decay spares them.
    let id = layout.add(name, tensor.shape(), tensor.shape().len() > 1);
    copies.push((id, tensor.clone()));
    *parameter = Parameter::Trainable(id);
    Ok(())
}

/// Initial values of one target's matrices.
fn initialize(model: &mut Model, config: &LoraConfig, lora: &Lora, seed: u64, index: u64) -> Result<()> {
    let shape = model.params.info(lora.a).shape.clone();
    let (r, in_features) = (shape[0], shape[1]);
    let mut rng = Philox::new(PhiloxKey::new(seed, Stream::Init, index));
    let bound = 1.0 / (in_features as f32).sqrt();
    let a: Vec<f32> = (0..r * in_features)
        .map(|_| match config.init_lora_weights {
            InitLoraWeights::Gaussian => rng.normal() / r as f32,
            _ => bound * (2.0 * rng.uniform() - 1.0),
        })
        .collect();
    model.params.set(lora.a, &a)?;
    if config.init_lora_weights == InitLoraWeights::Random {
        let bound = 1.0 / (r as f32).sqrt();
        let n = model.params.info(lora.b).range.len();
        let b: Vec<f32> = (0..n).map(|_| bound * (2.0 * rng.uniform() - 1.0)).collect();
        model.params.set(lora.b, &b)?;
    }
    Ok(())
}
