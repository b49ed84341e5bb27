//! LoRA: low-rank matrices beside linear layers and embeddings. Source: Hu et al. (arXiv 2106.09685). For DoRA see `ops/dora.rs`.

use super::attach::{Attachment, Initial};
use super::config::{Bias, InitLoraWeights, LoraConfig};
use super::io::{PREFIX, load_params, named_params};
use super::loftq;
use super::merge::{MergePlan, MergeRule};
use super::method::Method;
use super::reader::Settings;
use super::residual;
use super::target::{Target, lora_defaults, no_adapter_on, select_targets};
use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::load::Originals;
use crate::model::{
    Dora, Embedding, EmbeddingAdapter, EmbeddingLora, LinearAdapter, Lora, Model, ModuleInfo, ModuleKind,
    Parameter, Weight,
};
use crate::param::ParamStore;
use crate::tensor::Tensor;
use std::path::Path;

/// Adds the magnitudes of a module, which start as the norms of the weights of each output: the change is zero. An
/// embedding is stored as a `conv1d` layer of its entries.
fn install_dora(
    attachment: &mut Attachment,
    backend: &Backend,
    (path, parameter, conv1d): (&str, &Parameter, bool),
    (outputs, r): (usize, usize),
) -> Result<Dora> {
    let Parameter::Frozen(weight) = parameter else {
        return Err(Error::tensor(path, "is trained whole and can't have DoRA's magnitudes"));
    };
    let squares = row_squares(backend, weight, conv1d, outputs)?;
    let norms = squares.iter().map(|x| x.sqrt()).collect();
    let name = format!("{path}.lora_magnitude_vector");
    let magnitude = attachment.add(name, &[outputs], Initial::Values(norms));
    let unit: Vec<f32> = (0..r * r).map(|i| if i / r == i % r { 1.0 } else { 0.0 }).collect();
    Ok(Dora {
        magnitude,
        base_squares: backend.from_slice(&squares, &[squares.len()])?,
        identity: backend.from_slice(&unit, &[r, r])?,
    })
}

/// Rows of a weight that are widened at a time.
const ROWS: usize = 256;

/// The squared norm of each output's weights.
fn row_squares(backend: &Backend, weight: &Weight, conv1d: bool, outputs: usize) -> Result<Vec<f32>> {
    let widened;
    let (tensor, conv1d) = match weight {
        Weight::Dense(tensor) => (tensor, conv1d),
        Weight::Quantized(matrix) => {
            let mut dense = backend.empty(matrix.shape(), DType::F32)?;
            backend.dequantize(&mut dense, matrix)?;
            widened = dense;
            (&widened, false)
        }
    };
    let mut squares = vec![0f64; outputs];
    for start in (0..tensor.rows()).step_by(ROWS) {
        let rows = tensor.slice(start..(start + ROWS).min(tensor.rows()))?;
        let values = backend.to_f32(&rows)?;
        for (i, row) in values.chunks(tensor.cols()).enumerate() {
            if conv1d {
                squares.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x).powi(2));
            } else {
                squares[start + i] = row.iter().map(|x| f64::from(*x).powi(2)).sum();
            }
        }
    }
    Ok(squares.into_iter().map(|x| x as f32).collect())
}

impl LoraConfig {
    /// Adds A and B of an embedding.
    fn install_embedding(
        &self,
        attachment: &mut Attachment,
        model: &Model,
        table: &Embedding,
        target: &Target,
    ) -> Result<EmbeddingLora> {
        let (path, r, scale) = (&table.path, target.r, target.scale as f32);
        let [entries, cols] = *table.weight.shape(&model.params) else {
            return Err(Error::tensor(path, "is not a table"));
        };
        // As PEFT: A starts at zero, and B is normal.
        let random = self.init_lora_weights == InitLoraWeights::Random;
        let a = if random { Initial::Normal(1.0) } else { Initial::Constant(0.0) };
        let a = attachment.add_transposed(format!("{path}.lora_embedding_A"), [entries, r], a);
        let b = attachment.add(format!("{path}.lora_embedding_B"), &[cols, r], Initial::Normal(1.0));
        let of_columns = (path.as_str(), &table.weight, true);
        let dora = match self.use_dora {
            true => Some(Box::new(install_dora(attachment, &model.backend, of_columns, (cols, r))?)),
            false => None,
        };
        Ok(EmbeddingLora { a, b, scale, dora })
    }

    /// Refuses settings that a target can't have.
    fn check_targets(&self, targets: &[Target], modules: &[ModuleInfo]) -> Result<()> {
        let plain = matches!(
            self.init_lora_weights,
            InitLoraWeights::Default | InitLoraWeights::Gaussian | InitLoraWeights::Random
        );
        let is_target = |m: &&ModuleInfo| targets.iter().any(|t| t.path == m.path);
        for module in modules.iter().filter(is_target) {
            let embedding = module.kind == ModuleKind::Embedding;
            if embedding && self.lora_bias {
                let why = format!("can't be used with the embedding `{}`", module.path);
                return Err(Error::config("adapter", "lora_bias", why));
            }
            if (embedding || module.is_head) && !plain {
                let what = if embedding { "an embedding" } else { "the output head" };
                let why =
                    format!("{what} can't have a start that is taken out of its weight (init_lora_weights)");
                return Err(no_adapter_on(&module.path, &why));
            }
            if module.is_head && self.use_dora {
                return Err(no_adapter_on(&module.path, "the output head can't have DoRA"));
            }
        }
        Ok(())
    }
}

impl Method for LoraConfig {
    fn name(&self) -> &'static str {
        "lora"
    }

    /// An adapter that starts as a part of the base is written as a plain one.
    fn settings(&self) -> Settings {
        match self.takes_out() {
            true => LoraConfig::settings(&residual::doubled(self)),
            false => LoraConfig::settings(self),
        }
    }

    fn tensors(&self, model: &Model) -> Result<Vec<(String, Tensor)>> {
        if self.takes_out() {
            return residual::tensors(self, model);
        }
        named_params(&model.params, |name| self.key(&model.params, name))
    }

    fn load_values(&self, model: &mut Model, dir: &Path) -> Result<()> {
        if self.takes_out() {
            return residual::load_values(self, model, dir);
        }
        load_params(model, dir, self.file(), |params, name| self.key(params, name))
    }

    /// Adds A and B (and a bias on B) of every target, in the model's order, and the biases and modules that are
    /// trained whole.
    fn install(&mut self, model: &mut Model, attachment: &mut Attachment) -> Result<()> {
        self.check("adapter")?;
        let modules = model.modules();
        let targets = select_targets(self, &modules, &model.config.model_type)?;
        self.targets.complete(&modules, &model.config.model_type, model.config.conv1d, lora_defaults)?;
        self.check_targets(&targets, &modules)?;
        let loftq = match self.init_lora_weights {
            InitLoraWeights::Loftq { bits, rounds } => Some((Originals::open(model)?, [bits, rounds])),
            _ => None,
        };
        for which in 0..model.embeddings_mut().count() {
            let table = model.embeddings_mut().nth(which).expect("there are so many").clone();
            let Some(target) = targets.iter().find(|t| t.path == table.path) else { continue };
            let adapter = self.install_embedding(attachment, model, &table, target)?;
            let adapter = Some(EmbeddingAdapter::Lora(adapter));
            model.embeddings_mut().nth(which).expect("there are so many").adapter = adapter;
        }
        let mut stream = 0;
        let backend = model.backend.clone();
        for linear in model.linears_mut() {
            let Some(target) = targets.iter().find(|t| t.path == linear.path) else { continue };
            let (path, r, inputs) = (linear.path.clone(), target.r, linear.in_features);
            let mut taken_out = None;
            let (a, b) = match self.init_lora_weights {
                init @ (InitLoraWeights::Pissa | InitLoraWeights::Olora) => {
                    let (factors, [a, b]) =
                        residual::take_out(&backend, linear, init, r, target.scale as f32)?;
                    taken_out = Some(Box::new(factors));
                    (a, b)
                }
                InitLoraWeights::Loftq { .. } => {
                    let Some((originals, settings)) = &loftq else { unreachable!("opened above") };
                    let [a, b] =
                        loftq::start(originals, &backend, linear, *settings, (r, target.scale as f32))?;
                    (a, b)
                }
                InitLoraWeights::Gaussian => (Initial::Normal(1.0 / r as f32), Initial::Constant(0.0)),
                InitLoraWeights::Default => {
                    (Initial::Uniform(1.0 / (inputs as f32).sqrt()), Initial::Constant(0.0))
                }
                InitLoraWeights::Random => (
                    Initial::Uniform(1.0 / (inputs as f32).sqrt()),
                    Initial::Uniform(1.0 / (r as f32).sqrt()),
                ),
            };
            let a = attachment.add(format!("{path}.lora_A.weight"), &[r, inputs], a);
            let b = attachment.add(format!("{path}.lora_B.weight"), &[linear.out_features, r], b);
            let zero = || Initial::Constant(0.0);
            let bias = self
                .lora_bias
                .then(|| attachment.add(format!("{path}.lora_B.bias"), &[linear.out_features], zero()));
            let dora = match self.use_dora {
                true => {
                    let weight = (path.as_str(), &linear.weight, linear.conv1d);
                    Some(Box::new(install_dora(attachment, &backend, weight, (linear.out_features, r))?))
                }
                false => None,
            };
            linear.adapter = Some(LinearAdapter::Lora(Lora {
                a,
                b,
                bias,
                scale: target.scale as f32,
                dropout: self.lora_dropout as f32,
                stream,
                dora,
                taken_out,
            }));
            stream += 1;
        }
        attachment.train_whole(model, &self.targets.modules_to_save, |module| match self.bias {
            Bias::None => false,
            Bias::All => true,
            Bias::LoraOnly => targets.iter().any(|t| t.path == module),
        })
    }

    fn merge_plan(&self, modules: &[ModuleInfo], model_type: &str) -> Result<MergePlan> {
        if self.changes_base() {
            return Err(Error::Unsupported(
                "PEFT's PiSSA and OLoRA adapters, and LoftQ's of several rounds, belong to a base that their start changed and \
                 can't be merged into a file; train on from it with --init-adapter, which saves a plain adapter"
                    .into(),
            ));
        }
        let (lora_bias, dora) = (self.lora_bias, self.use_dora);
        let rules = select_targets(self, modules, model_type)?.into_iter();
        let rule = |Target { path, r, scale }| (path, MergeRule::LowRank { r, scale, lora_bias, dora });
        let modules_to_save = self.targets.modules_to_save.clone();
        Ok(MergePlan { rules: rules.map(rule).collect(), modules_to_save, bias: self.bias })
    }

    /// A LoftQ start of one round leaves the base as it is and need not be made to be overwritten.
    fn load(&mut self, model: &mut Model, dir: &Path) -> Result<()> {
        if !self.changes_base() {
            self.init_lora_weights = match self.init_lora_weights {
                InitLoraWeights::Loftq { .. } => InitLoraWeights::Default,
                other => other,
            };
        }
        self.attach(model, 0)?;
        self.load_values(model, dir)
    }

    /// The bias of an adapted layer belongs to its `base_layer`.
    fn key(&self, params: &ParamStore, name: &str) -> String {
        if let Some(module) = name.strip_suffix(".bias")
            && params.find(&format!("{module}.lora_A.weight")).is_some()
        {
            return format!("{PREFIX}{module}.base_layer.bias");
        }
        format!("{PREFIX}{name}")
    }
}
