//! Bottleneck adapters: a small MLP after, or beside, attention and MLP of every layer.
//!
//! PEFT has none; the files are those of AdapterHub's `adapters` (1.3): `adapter_config.json` with the settings under
//! `config`, and `adapter.safetensors`. With `h` what a sublayer gives and `x` what it is added to, a sequential
//! adapter makes `x + h + scaling up(act(down(h)))`, of `h + x` instead of `h` with `original_ln_before`, a parallel one
//! `x + h + scaling up(act(down(x)))`. Sources: Houlsby et al. (arXiv 1902.00751, `double_seq_bn`); Pfeiffer et al.
//! (arXiv 2005.00247, `seq_bn`); He et al. (arXiv 2110.04366, `par_bn`).

use super::attach::{Attachment, Initial};
use super::method::Method;
use super::reader::{Reader, Settings};
use crate::backend::Activation;
use crate::error::{Error, Result};
use crate::model::{Bottleneck, Linear, Model, Norm, Parameter};
use crate::param::ParamStore;
use serde_json::{Map, Value, json};

/// An activation by AdapterHub's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NonLinearity(&'static str);

/// The names that are known.
const NON_LINEARITIES: [(&str, Activation); 6] = [
    ("relu", Activation::Relu),
    ("gelu", Activation::Gelu),
    ("gelu_new", Activation::GeluTanh),
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("tanh", Activation::Tanh),
];

/// How the weights start; all near the identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitWeights {
    /// Normal with standard deviation 0.02.
    Bert,
    /// Down uniform, up zero.
    MamAdapter,
    /// Normal with standard deviation 0.01, within two of it.
    Houlsby,
}

/// What an adapter is of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Identity {
    pub name: String,
    pub model_name: Option<String>,
    pub model_type: String,
    pub hidden_size: usize,
}

/// A bottleneck adapter's settings, in AdapterHub's names.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct BottleneckConfig {
    /// After attention.
    pub mh_adapter: bool,
    /// After the MLP.
    pub output_adapter: bool,
    /// The model's columns over the bottleneck's.
    pub reduction_factor: f64,
    pub non_linearity: NonLinearity,
    /// The adapter sees the sum with the residual.
    pub original_ln_before: bool,
    /// LayerNorm on its input.
    pub ln_before: bool,
    /// LayerNorm on its output.
    pub ln_after: bool,
    /// The sublayer's output is added before that LayerNorm.
    pub adapter_residual_before_ln: bool,
    pub init_weights: InitWeights,
    /// Beside the sublayer instead of after it.
    pub is_parallel: bool,
    pub scaling: f64,
    pub dropout: f64,
    /// Layers without adapters.
    pub leave_out: Vec<usize>,
    pub identity: Identity,
}

impl Default for BottleneckConfig {
    /// AdapterHub's defaults of the keys that have one, after both sublayers; [`BottleneckConfig::named`] has its
    /// architectures.
    fn default() -> Self {
        BottleneckConfig {
            mh_adapter: true,
            output_adapter: true,
            reduction_factor: 16.0,
            non_linearity: NonLinearity("relu"),
            original_ln_before: false,
            ln_before: false,
            ln_after: false,
            adapter_residual_before_ln: false,
            init_weights: InitWeights::Bert,
            is_parallel: false,
            scaling: 1.0,
            dropout: 0.0,
            leave_out: Vec::new(),
            identity: Identity { name: "default".into(), ..Identity::default() },
        }
    }
}

/// Keys of `config` that are written and not implemented, with the values under which they do nothing.
fn neutral_keys() -> Vec<(&'static str, Value)> {
    vec![
        ("cross_adapter", json!(false)),
        ("factorized_phm_W", json!(true)),
        ("factorized_phm_rule", json!(false)),
        ("hypercomplex_nonlinearity", json!("glorot-uniform")),
        ("init_weights_seed", Value::Null),
        ("inv_adapter", Value::Null),
        ("inv_adapter_reduction_factor", Value::Null),
        ("learn_phm", json!(true)),
        ("original_ln_after", json!(true)),
        ("phm_bias", json!(true)),
        ("phm_c_init", json!("normal")),
        ("phm_dim", json!(4)),
        ("phm_init_range", json!(0.0001)),
        ("phm_layer", json!(false)),
        ("phm_rank", json!(1)),
        ("residual_before_ln", json!(true)),
        ("shared_W_phm", json!(false)),
        ("shared_phm_rule", json!(true)),
        ("stochastic_depth", json!(0.0)),
        ("use_gating", json!(false)),
    ]
}

impl BottleneckConfig {
    /// The settings of an architecture: `seq_bn`, `double_seq_bn`, `par_bn`, or `pfeiffer`, `houlsby`, `parallel`.
    ///
    /// # Errors
    /// When the name is not known.
    pub fn named(name: &str) -> Result<Self> {
        let double = BottleneckConfig::default();
        match name {
            "seq_bn" | "pfeiffer" => {
                Ok(BottleneckConfig { original_ln_before: true, mh_adapter: false, ..double })
            }
            "double_seq_bn" | "houlsby" => {
                Ok(BottleneckConfig { non_linearity: NonLinearity("swish"), ..double })
            }
            "par_bn" | "parallel" => Ok(BottleneckConfig {
                mh_adapter: false,
                reduction_factor: 2.0,
                init_weights: InitWeights::MamAdapter,
                is_parallel: true,
                scaling: 4.0,
                ..double
            }),
            other => Err(Error::config(
                "adapter",
                "adapter_config",
                format!("`{other}` is not known; expected seq_bn, double_seq_bn or par_bn"),
            )),
        }
    }

    /// Reads AdapterHub's file, or the same keys without the one around them.
    ///
    /// # Errors
    /// When a key is malformed, or set and not implemented.
    pub fn read(reader: &Reader<'_>) -> Result<Self> {
        match reader.get("config") {
            Some(Value::Object(map)) => {
                let identity = Identity {
                    name: reader.string("name")?.unwrap_or_else(|| "default".to_string()),
                    model_name: reader.string("model_name")?,
                    model_type: reader.string("model_type")?.unwrap_or_default(),
                    hidden_size: reader.usize("hidden_size")?.unwrap_or(0),
                };
                // Every key has a value in a file; these are `BnConfig`'s own.
                let inner = Reader::new(format!("{} under `config`", reader.context), map);
                Self::read_keys(&inner, BottleneckConfig::default(), identity)
            }
            Some(other) => {
                Err(reader.error("config", format!("{other} is not supported; expected an object")))
            }
            None => {
                let base = Self::named(reader.string("adapter_config")?.as_deref().unwrap_or("seq_bn"))?;
                let model_name = reader.string("base_model_name_or_path")?;
                reader.string("task_type")?;
                let identity = Identity { name: "default".into(), model_name, ..Identity::default() };
                Self::read_keys(reader, base, identity)
            }
        }
    }

    fn read_keys(reader: &Reader<'_>, base: Self, identity: Identity) -> Result<Self> {
        let flag = |key: &str, default: bool| {
            if reader.get(key).is_some() { reader.bool(key) } else { Ok(default) }
        };
        let config = BottleneckConfig {
            mh_adapter: flag("mh_adapter", base.mh_adapter)?,
            output_adapter: flag("output_adapter", base.output_adapter)?,
            reduction_factor: reader.f64("reduction_factor")?.unwrap_or(base.reduction_factor),
            non_linearity: match reader.string("non_linearity")? {
                None => base.non_linearity,
                Some(name) => {
                    let known = NON_LINEARITIES.iter().find(|(known, _)| *known == name);
                    NonLinearity(known.map(|(known, _)| *known).ok_or_else(|| {
                        let names: Vec<&str> = NON_LINEARITIES.iter().map(|(known, _)| *known).collect();
                        reader.error(
                            "non_linearity",
                            format!("`{name}` is not supported; supported: {}", names.join(", ")),
                        )
                    })?)
                }
            },
            original_ln_before: flag("original_ln_before", base.original_ln_before)?,
            ln_before: flag("ln_before", base.ln_before)?,
            ln_after: flag("ln_after", base.ln_after)?,
            adapter_residual_before_ln: flag("adapter_residual_before_ln", base.adapter_residual_before_ln)?,
            init_weights: match reader.string("init_weights")?.as_deref() {
                None => base.init_weights,
                Some("bert") => InitWeights::Bert,
                Some("mam_adapter") => InitWeights::MamAdapter,
                Some("houlsby") => InitWeights::Houlsby,
                Some(other) => {
                    return Err(reader.error(
                        "init_weights",
                        format!("`{other}` is not supported; supported: bert, mam_adapter, houlsby"),
                    ));
                }
            },
            is_parallel: flag("is_parallel", base.is_parallel)?,
            scaling: reader.f64("scaling")?.unwrap_or(base.scaling),
            dropout: reader.f64("dropout")?.unwrap_or(base.dropout),
            leave_out: reader.layers("leave_out")?.unwrap_or_default(),
            identity,
        };
        reader.finish(&neutral_keys())?;
        if !(config.reduction_factor > 0.0 && config.reduction_factor.is_finite()) {
            return Err(reader.error("reduction_factor", "expected a positive number"));
        }
        if !(config.mh_adapter || config.output_adapter) {
            return Err(reader.error("output_adapter", "neither mh_adapter nor output_adapter is set"));
        }
        if !(0.0..1.0).contains(&config.dropout) {
            return Err(reader.error("dropout", "expected a probability in [0, 1)"));
        }
        Ok(config)
    }

    fn activation(&self) -> Activation {
        let found = NON_LINEARITIES.iter().find(|(name, _)| *name == self.non_linearity.0);
        found.map_or(Activation::Relu, |(_, activation)| *activation)
    }

    /// The adapter at `path`.
    fn bottleneck(&self, attachment: &mut Attachment, path: &str, hidden: usize, stream: u64) -> Bottleneck {
        let inner = ((hidden as f64 / self.reduction_factor).floor() as usize).max(1);
        let (down, up) = match self.init_weights {
            InitWeights::Bert => (Initial::Normal(0.02), Initial::Normal(0.02)),
            InitWeights::Houlsby => (Initial::TruncatedNormal(0.01), Initial::TruncatedNormal(0.01)),
            InitWeights::MamAdapter => {
                (Initial::Uniform(1.0 / (hidden as f32).sqrt()), Initial::Constant(0.0))
            }
        };
        let mut linear = |path: String, weight: Initial, inputs: usize, outputs: usize| {
            let weight = attachment.add(format!("{path}.weight"), &[outputs, inputs], weight);
            let bias = attachment.add(format!("{path}.bias"), &[outputs], Initial::Constant(0.0));
            Linear::new(
                &path,
                Parameter::Trainable(weight),
                Some(Parameter::Trainable(bias)),
                inputs,
                outputs,
            )
        };
        // With a norm before it, the layer is the sequence's second.
        let down = linear(format!("{path}.adapter_down.{}", u8::from(self.ln_before)), down, hidden, inner);
        let up = linear(format!("{path}.adapter_up"), up, inner, hidden);
        let mut norm = |name: &str| {
            let path = format!("{path}.{name}");
            let weight =
                attachment.add_undecayed(format!("{path}.weight"), &[hidden], Initial::Constant(1.0));
            let bias = attachment.add(format!("{path}.bias"), &[hidden], Initial::Constant(0.0));
            let (weight, bias) = (Parameter::Trainable(weight), Some(Parameter::Trainable(bias)));
            Norm { path, weight, bias, eps: 1e-5, layer_norm: true, plus_one: false }
        };
        Bottleneck {
            norm_before: self.ln_before.then(|| norm("adapter_norm_before")),
            norm_after: self.ln_after.then(|| norm("adapter_norm_after")),
            down,
            up,
            activation: self.activation(),
            scale: self.scaling as f32,
            dropout: self.dropout as f32,
            stream,
            parallel: self.is_parallel,
            sees_sum: self.original_ln_before,
            adds_before_norm: self.adapter_residual_before_ln,
        }
    }
}

impl Method for BottleneckConfig {
    fn name(&self) -> &'static str {
        "adapter"
    }

    fn settings(&self) -> Settings {
        let init = match self.init_weights {
            InitWeights::Bert => "bert",
            InitWeights::MamAdapter => "mam_adapter",
            InitWeights::Houlsby => "houlsby",
        };
        let factor = match self.reduction_factor {
            whole if whole.fract() == 0.0 => json!(whole as i64),
            other => json!(other),
        };
        let mut keys: Settings = neutral_keys().into_iter().collect();
        keys.extend([
            ("adapter_residual_before_ln", json!(self.adapter_residual_before_ln)),
            ("dropout", json!(self.dropout)),
            ("init_weights", json!(init)),
            ("is_parallel", json!(self.is_parallel)),
            ("leave_out", json!(self.leave_out)),
            ("ln_after", json!(self.ln_after)),
            ("ln_before", json!(self.ln_before)),
            ("mh_adapter", json!(self.mh_adapter)),
            ("non_linearity", json!(self.non_linearity.0)),
            ("original_ln_before", json!(self.original_ln_before)),
            ("output_adapter", json!(self.output_adapter)),
            ("reduction_factor", factor),
            ("scaling", json!(self.scaling)),
        ]);
        let config: Map<String, Value> = keys.into_iter().map(|(k, v)| (k.to_string(), v)).collect();
        let id = &self.identity;
        let class = match id.model_type.as_str() {
            "gpt2" => "GPT2LMHeadModel",
            "llama" => "LlamaForCausalLM",
            "mistral" => "MistralForCausalLM",
            _ => "PreTrainedModel",
        };
        Settings::from([
            ("config", Value::Object(config)),
            ("hidden_size", json!(id.hidden_size)),
            ("model_class", json!(class)),
            ("model_name", json!(id.model_name)),
            ("model_type", json!(id.model_type)),
            ("name", json!(id.name)),
            ("version", json!("adapters.1.3.0")),
        ])
    }

    fn install(&mut self, model: &mut Model, attachment: &mut Attachment) -> Result<()> {
        let hidden = model.config.hidden_size;
        self.identity.hidden_size = hidden;
        self.identity.model_type = model.config.model_type.clone();
        if let Some(layer) = self.leave_out.iter().find(|layer| **layer >= model.layers.len()) {
            return Err(Error::config("adapter", "leave_out", format!("there is no layer {layer}")));
        }
        let (layers, name) = (model.config.names.layers, &self.identity.name);
        let mut stream = 0;
        for (number, layer) in model.layers.iter_mut().enumerate() {
            if self.leave_out.contains(&number) {
                continue;
            }
            for (place, at, wanted) in [
                (&mut layer.attention_adapter, "attention_adapters", self.mh_adapter),
                (&mut layer.output_adapter, "output_adapters", self.output_adapter),
            ] {
                if wanted {
                    let path = format!("{layers}.{number}.{at}.adapters.{name}");
                    *place = Some(self.bottleneck(attachment, &path, hidden, stream));
                    stream += 1;
                }
            }
        }
        Ok(())
    }

    fn key(&self, _params: &ParamStore, name: &str) -> String {
        name.to_string()
    }

    fn file(&self) -> &'static str {
        "adapter.safetensors"
    }
}
