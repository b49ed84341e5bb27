//! LoRA's settings.

use super::reader::{Origin, Reader, Settings, common_settings, number};
use super::target::Targeting;
use crate::error::{Error, Result};
use serde_json::{Value, json};

/// Which biases are trained with the adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// None.
    None,
    /// Every bias of the model.
    All,
    /// Those of the adapted layers.
    LoraOnly,
}

impl Bias {
    /// Reads the key `bias`; `own` is the method's word for its own layers' biases.
    pub(super) fn read(reader: &Reader<'_>, own: &str) -> Result<Self> {
        match reader.get("bias").map(|v| v.as_str().unwrap_or("?")) {
            None | Some("none") => Ok(Bias::None),
            Some("all") => Ok(Bias::All),
            Some(word) if word == own => Ok(Bias::LoraOnly),
            Some(_) => Err(reader.error("bias", format!("expected none, all or {own}"))),
        }
    }

    /// The key's value.
    pub(super) fn name(self, own: &'static str) -> &'static str {
        match self {
            Bias::None => "none",
            Bias::All => "all",
            Bias::LoraOnly => own,
        }
    }
}

/// How the low-rank matrices start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitLoraWeights {
    /// A uniform in `+-1 / sqrt(in_features)`, B zero.
    Default,
    /// A normal with standard deviation `1 / r`, B zero.
    Gaussian,
    /// The weight's largest singular directions, which the base loses ([`super::residual`]).
    Pissa,
    /// An orthonormal basis of the weight's first columns, with what the weight has along it, which the base loses.
    Olora,
    /// The largest directions of what quantizing the weight lost ([`super::loftq`]).
    #[allow(missing_docs)]
    Loftq { bits: usize, rounds: usize },
    /// Both uniform: the adapter changes the model from the start (PEFT's `false`, for tests).
    Random,
}

/// A LoRA adapter's settings, in PEFT's names.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct LoraConfig {
    pub r: usize,
    pub lora_alpha: f64,
    pub lora_dropout: f64,
    /// Scale by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`.
    pub use_rslora: bool,
    /// Train the magnitudes of the adapted weights' rows apart from their directions (DoRA).
    pub use_dora: bool,
    /// A bias on B.
    pub lora_bias: bool,
    pub bias: Bias,
    pub targets: Targeting,
    /// Ranks of modules whose path ends in a match of the key; the first match counts.
    pub rank_pattern: Vec<(String, usize)>,
    pub alpha_pattern: Vec<(String, f64)>,
    pub init_lora_weights: InitLoraWeights,
    pub origin: Origin,
}

impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            lora_bias: false,
            bias: Bias::None,
            targets: Targeting::default(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            init_lora_weights: InitLoraWeights::Default,
            origin: Origin::default(),
        }
    }
}

/// Keys that PEFT writes and this crate does not implement, with the values under which they do nothing.
pub(super) fn neutral_keys() -> Vec<(&'static str, Value)> {
    vec![
        ("alora_invocation_tokens", Value::Null),
        ("arrow_config", Value::Null),
        ("corda_config", Value::Null),
        ("ensure_weight_tying", json!(false)),
        ("eva_config", Value::Null),
        ("kasa_config", Value::Null),
        ("layer_replication", Value::Null),
        ("loftq_config", json!({})),
        ("lora_ga_config", Value::Null),
        ("megatron_config", Value::Null),
        ("megatron_core", json!("megatron.core")),
        ("monteclora_config", Value::Null),
        ("qalora_group_size", json!(16)),
        ("target_parameters", Value::Null),
        ("trainable_token_indices", Value::Null),
        ("use_bdlora", Value::Null),
        ("use_qalora", json!(false)),
        ("velora_config", Value::Null),
    ]
}

/// `loftq_config`: bits and rounds, PEFT's 4 and 1 if absent.
fn read_loftq(reader: &Reader<'_>) -> Result<InitLoraWeights> {
    let config = reader.get("loftq_config");
    let bad =
        |found: &str| reader.error("loftq_config", format!("expected loftq_bits and loftq_iter, {found}"));
    let number = |key: &str, default: usize| match config.and_then(|c| c.get(key)) {
        None => Ok(default),
        Some(v) => v.as_u64().map(|n| n as usize).ok_or_else(|| bad(&format!("found {v}"))),
    };
    let (bits, rounds) = (number("loftq_bits", 4)?, number("loftq_iter", 1)?);
    if !(1..=100).contains(&rounds) {
        return Err(bad(&format!("from 1 to 100 rounds, found {rounds}")));
    }
    match config.and_then(Value::as_object).into_iter().flatten().find(|(k, _)| !k.starts_with("loftq_")) {
        Some((key, _)) => Err(bad(&format!("found {key}"))),
        None => Ok(InitLoraWeights::Loftq { bits, rounds }),
    }
}

impl LoraConfig {
    /// Reads the keys of an adapter.
    ///
    /// # Errors
    /// When one is malformed, or set and not implemented.
    pub fn read(reader: &Reader<'_>) -> Result<Self> {
        let defaults = LoraConfig::default();
        let config = LoraConfig {
            r: reader.usize("r")?.unwrap_or(defaults.r),
            lora_alpha: reader.f64("lora_alpha")?.unwrap_or(defaults.lora_alpha),
            lora_dropout: reader.f64("lora_dropout")?.unwrap_or(0.0),
            use_rslora: reader.bool("use_rslora")?,
            use_dora: reader.bool("use_dora")?,
            lora_bias: reader.bool("lora_bias")?,
            bias: Bias::read(reader, "lora_only")?,
            targets: Targeting::read(reader)?,
            rank_pattern: reader
                .pattern("rank_pattern", |v| v.as_u64().map(|n| n as usize).filter(|n| *n > 0))?,
            alpha_pattern: reader.pattern("alpha_pattern", Value::as_f64)?,
            init_lora_weights: match reader.get("init_lora_weights") {
                None | Some(Value::Bool(true)) => InitLoraWeights::Default,
                Some(Value::Bool(false)) => InitLoraWeights::Random,
                Some(Value::String(s)) if s.eq_ignore_ascii_case("gaussian") => InitLoraWeights::Gaussian,
                Some(Value::String(s)) if s == "pissa" => InitLoraWeights::Pissa,
                Some(Value::String(s)) if s == "olora" => InitLoraWeights::Olora,
                Some(Value::String(s)) if s == "loftq" => read_loftq(reader)?,
                Some(other) => {
                    return Err(reader.error(
                        "init_lora_weights",
                        format!("{other} is not supported; supported: true, false, \"gaussian\", \"pissa\", \"olora\", \"loftq\""),
                    ));
                }
            },
            origin: Origin::read(reader)?,
        };
        reader.finish(&neutral_keys())?;
        config.check(&reader.context)?;
        Ok(config)
    }

    /// Checks the values that can't be right for any model; `context` is for messages.
    ///
    /// # Errors
    /// When one can't.
    pub fn check(&self, context: &str) -> Result<()> {
        if self.r == 0 || self.r > 65_536 {
            return Err(Error::config(
                context,
                "r",
                format!("expected a rank from 1 to 65536, found {}", self.r),
            ));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(Error::config(
                context,
                "lora_dropout",
                format!("expected a probability in [0, 1), found {}", self.lora_dropout),
            ));
        }
        if !self.lora_alpha.is_finite() {
            return Err(Error::config(
                context,
                "lora_alpha",
                format!("expected a number, found {}", self.lora_alpha),
            ));
        }
        let plain = matches!(self.init_lora_weights, InitLoraWeights::Default | InitLoraWeights::Gaussian);
        if self.use_dora && (self.lora_bias || !plain) {
            return Err(Error::config(
                context,
                "use_dora",
                "can't be used with lora_bias or init_lora_weights other than true and gaussian",
            ));
        }
        Ok(())
    }

    /// Whether the adapter starts as a part of the base.
    pub(super) fn takes_out(&self) -> bool {
        matches!(self.init_lora_weights, InitLoraWeights::Pissa | InitLoraWeights::Olora)
    }

    /// Whether the adapter belongs to a base that its start changed.
    pub(super) fn changes_base(&self) -> bool {
        self.takes_out() || matches!(self.init_lora_weights, InitLoraWeights::Loftq { rounds: 2.., .. })
    }

    /// The factor on the low-rank part of rank `r` and this alpha.
    pub fn scale(&self, r: usize, lora_alpha: f64) -> f64 {
        if self.use_rslora { lora_alpha / (r as f64).sqrt() } else { lora_alpha / r as f64 }
    }

    /// PEFT's keys and values.
    pub fn settings(&self) -> Settings {
        let init = match self.init_lora_weights {
            InitLoraWeights::Default => json!(true),
            InitLoraWeights::Gaussian => json!("gaussian"),
            InitLoraWeights::Random => json!(false),
            InitLoraWeights::Pissa => json!("pissa"),
            InitLoraWeights::Olora => json!("olora"),
            // After one round it is a plain adapter for the quantized base.
            InitLoraWeights::Loftq { rounds: 1, .. } => json!(true),
            InitLoraWeights::Loftq { .. } => json!("loftq"),
        };
        let alphas = self.alpha_pattern.iter().map(|(k, v)| (k.clone(), number(*v)));
        let ranks = self.rank_pattern.iter().map(|(k, v)| (k.clone(), json!(v)));
        let mut keys: Settings = neutral_keys().into_iter().collect();
        keys.extend(common_settings("LORA", &self.origin));
        keys.extend(self.targets.settings());
        keys.extend([
            ("alpha_pattern", Value::Object(alphas.collect())),
            ("bias", json!(self.bias.name("lora_only"))),
            ("use_dora", json!(self.use_dora)),
            ("init_lora_weights", init),
            ("lora_alpha", number(self.lora_alpha)),
            ("lora_bias", json!(self.lora_bias)),
            ("lora_dropout", json!(self.lora_dropout)),
            ("r", json!(self.r)),
            ("rank_pattern", Value::Object(ranks.collect())),
            ("use_rslora", json!(self.use_rslora)),
        ]);
        if let InitLoraWeights::Loftq { bits, rounds: rounds @ 2.. } = self.init_lora_weights {
            keys.insert("loftq_config", json!({"loftq_bits": bits, "loftq_iter": rounds}));
        }
        keys
    }
}
