//! VeRA: low-rank matrices that are random, frozen and shared by all layers, with trained factors between and after.
//!
//! PEFT draws the matrices by PyTorch's generator, which can't be repeated here: they are read from the adapter, and
//! saved with it (`save_projection`). Source: Kopiczko et al. (arXiv 2310.11454).

use super::attach::{Attachment, Initial};
use super::config::Bias;
use super::io::{ADAPTER_FILE, AdapterTensors, PREFIX, named_params, open_adapter};
use super::merge::{MergePlan, MergeRule};
use super::method::Method;
use super::reader::{Origin, Reader, Settings, common_settings};
use super::target::{Targeting, lora_defaults};
use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::{Factored, Linear, LinearAdapter, Model, ModuleInfo, Parameter, Weight};
use crate::param::ParamStore;
use crate::rng::{Philox, PhiloxKey, Stream};
use crate::tensor::Tensor;
use serde_json::json;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;

/// The names of the matrices that all layers share.
pub(super) const SHARED: [&str; 2] = ["base_model.vera_A", "base_model.vera_B"];

/// A VeRA adapter's settings, in PEFT's names.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct VeraConfig {
    pub r: usize,
    pub targets: Targeting,
    pub projection_prng_key: u64,
    pub vera_dropout: f64,
    pub d_initial: f64,
    pub bias: Bias,
    pub origin: Origin,
    /// The shared matrices, f32: `[r, max in_features]` and `[max out_features, r]`.
    projections: Option<[Tensor; 2]>,
}

impl Default for VeraConfig {
    fn default() -> Self {
        VeraConfig {
            r: 256,
            targets: Targeting::default(),
            projection_prng_key: 0,
            vera_dropout: 0.0,
            d_initial: 0.1,
            bias: Bias::None,
            origin: Origin::default(),
            projections: None,
        }
    }
}

impl VeraConfig {
    /// Reads the keys.
    ///
    /// # Errors
    /// When one is malformed, or set and not implemented.
    pub fn read(reader: &Reader<'_>) -> Result<Self> {
        let defaults = VeraConfig::default();
        let config = VeraConfig {
            r: reader.usize("r")?.unwrap_or(defaults.r),
            targets: Targeting::read(reader)?,
            projection_prng_key: reader.usize("projection_prng_key")?.unwrap_or(0) as u64,
            vera_dropout: reader.f64("vera_dropout")?.unwrap_or(0.0),
            d_initial: reader.f64("d_initial")?.unwrap_or(defaults.d_initial),
            bias: Bias::read(reader, "vera_only")?,
            origin: Origin::read(reader)?,
            projections: None,
        };
        if reader.get("save_projection") == Some(&json!(false)) {
            return Err(reader.error(
                "save_projection",
                "false is not supported: PyTorch's random matrices can't be made again here; save the adapter with them",
            ));
        }
        reader.finish(&[("init_weights", json!(true))])?;
        if !(1..=65_536).contains(&config.r) {
            return Err(reader.error("r", format!("expected a rank from 1 to 65536, found {}", config.r)));
        }
        if !(0.0..1.0).contains(&config.vera_dropout) {
            return Err(reader.error("vera_dropout", "expected a probability in [0, 1)"));
        }
        Ok(config)
    }

    /// Kaiming-uniform matrices, as PEFT's are drawn, from `projection_prng_key`.
    fn make_projections(&self, backend: &Backend, shapes: [[usize; 2]; 2]) -> Result<[Tensor; 2]> {
        let make = |index: usize| {
            let shape = shapes[index];
            let mut rng = Philox::new(PhiloxKey::new(self.projection_prng_key, Stream::Init, index as u64));
            // torch.nn.init.kaiming_uniform_ with a = sqrt(5): the bound is 1 / sqrt(fan_in).
            let bound = 1.0 / (shape[1] as f32).sqrt();
            let values: Vec<f32> =
                (0..shape[0] * shape[1]).map(|_| bound * (2.0 * rng.uniform() - 1.0)).collect();
            backend.from_slice(&values, &shape)
        };
        Ok([make(0)?, make(1)?])
    }
}

/// The part of the shared matrices that layers of one shape use, in the activations' type.
fn sliced(model: &Model, projections: &[Tensor; 2], inputs: usize, outputs: usize) -> Result<[Weight; 2]> {
    let [a, b] = projections;
    let mut down = model.backend.empty(&[a.rows(), inputs], DType::F32)?;
    model.backend.copy_columns(&mut down, 0, a, 0, inputs, false)?;
    let convert = |x: &Tensor| model.backend.to_dtype(x, model.dtype).map(Weight::Dense);
    Ok([convert(&down)?, convert(&b.slice(0..outputs)?)?])
}

impl Method for VeraConfig {
    fn name(&self) -> &'static str {
        "vera"
    }

    fn settings(&self) -> Settings {
        let mut keys = common_settings("VERA", &self.origin);
        keys.extend(self.targets.settings());
        keys.remove("exclude_modules");
        keys.extend([
            ("bias", json!(self.bias.name("vera_only"))),
            ("d_initial", json!(self.d_initial)),
            ("init_weights", json!(true)),
            ("projection_prng_key", json!(self.projection_prng_key)),
            ("r", json!(self.r)),
            ("save_projection", json!(true)),
            ("vera_dropout", json!(self.vera_dropout)),
        ]);
        keys
    }

    fn install(&mut self, model: &mut Model, attachment: &mut Attachment) -> Result<()> {
        let (modules, model_type) = (model.modules(), model.config.model_type.clone());
        let chosen = self.targets.select_linears(&modules, &model_type, lora_defaults)?;
        self.targets.complete(&modules, &model_type, model.config.conv1d, lora_defaults)?;
        let largest = |f: fn(&ModuleInfo) -> usize| chosen.iter().map(|m| f(m)).max().unwrap_or(0);
        let shapes = [[self.r, largest(|m| m.in_features)], [largest(|m| m.out_features), self.r]];
        let projections = match self.projections.take() {
            Some(read) => read,
            None => self.make_projections(&model.backend, shapes)?,
        };
        for (name, tensor, shape) in
            [("vera_A", &projections[0], shapes[0]), ("vera_B", &projections[1], shapes[1])]
        {
            if tensor.shape() != shape {
                return Err(Error::tensor(
                    format!("base_model.{name}"),
                    format!("expected shape {shape:?} for this base model, found {:?}", tensor.shape()),
                ));
            }
        }
        let mut parts: BTreeMap<(usize, usize), [Weight; 2]> = BTreeMap::new();
        for module in &chosen {
            let key = (module.in_features, module.out_features);
            if let Entry::Vacant(entry) = parts.entry(key) {
                entry.insert(sliced(model, &projections, key.0, key.1)?);
            }
        }
        let mut stream = 0;
        for linear in model.linears_mut() {
            if !chosen.iter().any(|m| m.path == linear.path) {
                continue;
            }
            let (inputs, outputs, path) = (linear.in_features, linear.out_features, linear.path.clone());
            let [down, up] = parts[&(inputs, outputs)].clone();
            let d = Initial::Constant(self.d_initial as f32);
            let factors = attachment.add(format!("{path}.vera_lambda_d"), &[self.r], d);
            let outer = attachment.add(format!("{path}.vera_lambda_b"), &[outputs], Initial::Constant(0.0));
            linear.adapter = Some(LinearAdapter::Factored(Box::new(Factored {
                down: Linear::new("vera_A", Parameter::Frozen(down), None, inputs, self.r),
                factors,
                up: Linear::new("vera_B", Parameter::Frozen(up), None, self.r, outputs),
                outer: Some(outer),
                scale: 1.0,
                dropout: self.vera_dropout as f32,
                stream,
            })));
            stream += 1;
        }
        self.projections = Some(projections);
        attachment.train_whole(model, &self.targets.modules_to_save, |module| match self.bias {
            Bias::None => false,
            Bias::All => true,
            Bias::LoraOnly => chosen.iter().any(|m| m.path == module),
        })
    }

    fn merge_plan(&self, modules: &[ModuleInfo], model_type: &str) -> Result<MergePlan> {
        let chosen = self.targets.select_linears(modules, model_type, lora_defaults)?;
        let rules = chosen.into_iter().map(|m| (m.path.clone(), MergeRule::Vera { r: self.r })).collect();
        Ok(MergePlan { rules, modules_to_save: self.targets.modules_to_save.clone(), bias: self.bias })
    }

    fn key(&self, params: &ParamStore, name: &str) -> String {
        if let Some(module) = name.strip_suffix(".bias")
            && params.find(&format!("{module}.vera_lambda_d")).is_some()
        {
            return format!("{PREFIX}{module}.base_layer.bias");
        }
        format!("{PREFIX}{name}")
    }

    fn tensors(&self, model: &Model) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = named_params(&model.params, |name| self.key(&model.params, name))?;
        for (name, shared) in SHARED.iter().zip(self.projections.iter().flatten()) {
            tensors.push((name.to_string(), shared.clone()));
        }
        Ok(tensors)
    }

    fn load_values(&self, model: &mut Model, dir: &Path) -> Result<()> {
        let mut tensors = AdapterTensors::open(dir, ADAPTER_FILE)?;
        for name in SHARED {
            tensors.get(name)?;
        }
        for id in model.params.ids() {
            let info = model.params.info(id).clone();
            let key = self.key(&model.params, &info.name);
            let values = model.backend.to_f32(&tensors.take(&key, &info.shape)?)?;
            model.params.set(id, &values)?;
        }
        tensors.finish()
    }

    fn load(&mut self, model: &mut Model, dir: &Path) -> Result<()> {
        let checkpoint = open_adapter(dir)?;
        let read = |name: &str| {
            let tensor = checkpoint.tensor(name).map_err(|_| {
                Error::tensor(
                    name,
                    "missing: PyTorch's random matrices can't be made again here; save the adapter with them",
                )
            })?;
            model.backend.to_dtype(&tensor, DType::F32)
        };
        self.projections = Some([read(SHARED[0])?, read(SHARED[1])?]);
        self.attach(model, 0)?;
        self.load_values(model, dir)
    }
}
