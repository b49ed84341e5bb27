//! The methods' settings as flags: each is the PEFT key of the same name, given to the method only if set.

use clap::Args;
use lowrank::adapter::{Full, Method, TargetModules, from_settings, method_row};
use lowrank::{Error, Result};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Settings of the method; those that the chosen one doesn't have are refused.
#[derive(Clone, Debug, Default, Args, Serialize)]
pub struct MethodArgs {
    /// Rank of the adapter [default: 8]
    #[arg(long, help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r: Option<usize>,
    /// The adapter's scale is lora-alpha / r [default: 8]
    #[arg(long, help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_alpha: Option<f64>,
    /// Probability of dropping an input element of the adapter [default: 0]
    #[arg(long, help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_dropout: Option<f64>,
    /// Scale by lora-alpha / sqrt(r)
    #[arg(long, help_heading = "Method")]
    #[serde(skip_serializing_if = "is_false")]
    pub use_rslora: bool,
    /// Train magnitude and direction apart (DoRA)
    #[arg(long, help_heading = "Method")]
    #[serde(skip_serializing_if = "is_false")]
    pub use_dora: bool,
    /// Train a bias with the adapter's B
    #[arg(long, help_heading = "Method")]
    #[serde(skip_serializing_if = "is_false")]
    pub lora_bias: bool,
    /// true, gaussian, pissa, olora or loftq [default: true]
    #[arg(long, value_name = "INIT", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_lora_weights: Option<String>,
    /// Bits of the quantized base that a loftq start makes up for [default: 4]
    #[arg(long, value_name = "N", help_heading = "Method")]
    #[serde(skip)]
    pub loftq_bits: Option<usize>,
    /// Rounds of a loftq start; after more than one, the adapter fits only the base that they make [default: 1]
    #[arg(long, value_name = "N", help_heading = "Method")]
    #[serde(skip)]
    pub loftq_iter: Option<usize>,
    /// all-linear, names separated by commas, or a regular expression; PEFT's default of the family if absent
    #[arg(long, value_name = "MODULES", help_heading = "Method")]
    #[serde(skip)]
    pub target_modules: Option<String>,
    /// Modules left out, in the same form
    #[arg(long, value_name = "MODULES", help_heading = "Method")]
    #[serde(skip)]
    pub exclude_modules: Option<String>,
    /// IA3's targets whose input is scaled, in the same form
    #[arg(long, value_name = "MODULES", help_heading = "Method")]
    #[serde(skip)]
    pub feedforward_modules: Option<String>,
    /// Layers that are adapted, separated by commas; all by default
    #[arg(long, value_delimiter = ',', value_name = "N,N", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Names of the list of layers that --layers-to-transform counts in; any by default
    #[arg(long, value_delimiter = ',', value_name = "NAME,NAME", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_pattern: Option<Vec<String>>,
    /// Ranks by module pattern, separated by commas; the first match counts
    #[arg(long, value_delimiter = ',', value_parser = key_value::<usize>, value_name = "PATTERN=R", help_heading = "Method")]
    #[serde(skip)]
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas by module pattern, separated by commas
    #[arg(long, value_delimiter = ',', value_parser = key_value::<f64>, value_name = "PATTERN=ALPHA", help_heading = "Method")]
    #[serde(skip)]
    pub alpha_pattern: Vec<(String, f64)>,
    /// Modules trained whole and saved with the adapter, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "MODULES", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modules_to_save: Option<Vec<String>>,
    /// Biases trained with the adapter: none, all or the adapted layers' (lora_only, vera_only, oft_only) [default: none]
    #[arg(long, value_parser = ["none", "all", "lora_only", "vera_only", "oft_only"], help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bias: Option<String>,
    /// AdaLoRA's ranks of a module at the start [default: 12]
    #[arg(long, value_name = "R", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_r: Option<usize>,
    /// AdaLoRA's ranks of a module at the end, on average [default: 8]
    #[arg(long, value_name = "R", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_r: Option<usize>,
    /// Steps before AdaLoRA takes ranks away [default: 0]
    #[arg(long, value_name = "N", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tinit: Option<usize>,
    /// Steps at the end in which AdaLoRA's ranks stay as they are [default: 0]
    #[arg(long, value_name = "N", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tfinal: Option<usize>,
    /// Steps from one of AdaLoRA's allocations to the next [default: 1]
    #[arg(long, alias = "deltaT", value_name = "N", help_heading = "Method")]
    #[serde(rename = "deltaT", skip_serializing_if = "Option::is_none")]
    pub delta_t: Option<usize>,
    /// How slowly AdaLoRA's importance of a rank changes [default: 0.85]
    #[arg(long, value_name = "BETA", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta1: Option<f64>,
    /// The same for how much the importance varies [default: 0.85]
    #[arg(long, value_name = "BETA", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta2: Option<f64>,
    /// Weight of AdaLoRA's penalty on factors that are not orthogonal [default: 0.5]
    #[arg(long, value_name = "X", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub orth_reg_weight: Option<f64>,
    /// Steps of AdaLoRA's schedule [default: those of the run]
    #[arg(long, value_name = "N", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_step: Option<usize>,
    /// Columns that OFT rotates together [default: 32]; --r gives the number of blocks instead
    #[arg(long, value_name = "N", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oft_block_size: Option<usize>,
    /// One OFT rotation for all blocks of a layer
    #[arg(long, help_heading = "Method")]
    #[serde(skip_serializing_if = "is_false")]
    pub block_share: bool,
    /// OFT's Cayley transform by a series instead of an inverse [default: true]
    #[arg(long, value_name = "BOOL", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub use_cayley_neumann: Option<bool>,
    /// Terms of that series [default: 5]
    #[arg(long, value_name = "N", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_cayley_neumann_terms: Option<usize>,
    /// Keep OFT's rotations small, as --eps says
    #[arg(long, help_heading = "Method")]
    #[serde(skip_serializing_if = "is_false")]
    pub coft: bool,
    /// How large a rotation may be with --coft [default: 6e-5]
    #[arg(long, value_name = "X", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eps: Option<f64>,
    /// Share of OFT's blocks that a step leaves as they are [default: 0]
    #[arg(long, value_name = "P", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module_dropout: Option<f64>,
    /// Probability of dropping an input element of VeRA's adapter [default: 0]
    #[arg(long, value_name = "P", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vera_dropout: Option<f64>,
    /// Where VeRA's factors between its matrices start [default: 0.1]
    #[arg(long, value_name = "X", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub d_initial: Option<f64>,
    /// What VeRA's random matrices follow from [default: 0]
    #[arg(long, value_name = "N", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub projection_prng_key: Option<u64>,
    /// Virtual tokens of prefix, prompt and ptuning [default: 20]
    #[arg(long, value_name = "N", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_virtual_tokens: Option<usize>,
    /// Make the prefix by a small MLP while training
    #[arg(long, help_heading = "Method")]
    #[serde(skip_serializing_if = "is_false")]
    pub prefix_projection: bool,
    /// Width of that MLP, and of ptuning's encoder
    #[arg(long, value_name = "N", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoder_hidden_size: Option<usize>,
    /// ptuning's encoder: MLP or LSTM [default: MLP]
    #[arg(long, value_parser = ["MLP", "LSTM"], help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoder_reparameterization_type: Option<String>,
    /// Dropout between the layers of ptuning's LSTM [default: 0]
    #[arg(long, value_name = "P", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoder_dropout: Option<f64>,
    /// Layers of ptuning's LSTM [default: 2]
    #[arg(long, value_name = "N", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoder_num_layers: Option<usize>,
    /// How prompt tuning starts: RANDOM, TEXT or SAMPLE_VOCAB [default: RANDOM]
    #[arg(long, value_parser = ["RANDOM", "TEXT", "SAMPLE_VOCAB"], help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tuning_init: Option<String>,
    /// The text for --prompt-tuning-init TEXT
    #[arg(long, value_name = "TEXT", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tuning_init_text: Option<String>,
    /// adapter's architecture: seq_bn (pfeiffer), double_seq_bn (houlsby) or par_bn (parallel) [default: seq_bn]
    #[arg(long, value_name = "NAME", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter_config: Option<String>,
    /// The model's width over the adapter's [default: 16]
    #[arg(long, value_name = "N", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reduction_factor: Option<f64>,
    /// adapter's activation: relu, gelu, silu, ... [default: the architecture's]
    #[arg(long, value_name = "NAME", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub non_linearity: Option<String>,
    /// Factor on adapter's output [default: the architecture's]
    #[arg(long, value_name = "X", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaling: Option<f64>,
    /// Probability of dropping an element of adapter's output [default: 0]
    #[arg(long, value_name = "P", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f64>,
    /// A LayerNorm before the adapter
    #[arg(long, help_heading = "Method")]
    #[serde(skip_serializing_if = "is_false")]
    pub ln_before: bool,
    /// A LayerNorm after the adapter
    #[arg(long, help_heading = "Method")]
    #[serde(skip_serializing_if = "is_false")]
    pub ln_after: bool,
}

fn is_false(x: &bool) -> bool {
    !x
}

/// `PATTERN=VALUE`.
fn key_value<T: std::str::FromStr>(text: &str) -> std::result::Result<(String, T), String> {
    let (key, value) =
        text.rsplit_once('=').ok_or_else(|| format!("expected PATTERN=VALUE, found `{text}`"))?;
    let value = value.parse().map_err(|_| format!("expected a number after `=`, found `{value}`"))?;
    Ok((key.to_string(), value))
}

impl MethodArgs {
    /// The flags that are set, by PEFT's keys.
    fn settings(&self) -> Result<Map<String, Value>> {
        let Ok(Value::Object(mut map)) = serde_json::to_value(self) else {
            return Err(Error::Unsupported("the method's flags are not keys and values".into()));
        };
        for (key, text) in [
            ("target_modules", &self.target_modules),
            ("exclude_modules", &self.exclude_modules),
            ("feedforward_modules", &self.feedforward_modules),
        ] {
            let value = match text.as_deref().map(TargetModules::parse) {
                None => continue,
                Some(TargetModules::AllLinear) => json!("all-linear"),
                Some(TargetModules::Names(names)) => json!(names),
                Some(TargetModules::Pattern(pattern)) => json!(pattern),
            };
            map.insert(key.into(), value);
        }
        if let Some(Value::String(init)) = map.get_mut("init_lora_weights")
            && let Ok(value) = init.parse::<bool>()
        {
            map.insert("init_lora_weights".into(), json!(value));
        }
        let loftq = [("loftq_bits", self.loftq_bits), ("loftq_iter", self.loftq_iter)];
        let loftq: Map<_, _> =
            loftq.iter().filter_map(|(k, v)| Some((k.to_string(), json!((*v)?)))).collect();
        if !loftq.is_empty() {
            map.insert("loftq_config".into(), Value::Object(loftq));
        }
        let mut pattern = |key: &str, entries: Map<String, Value>| {
            if !entries.is_empty() {
                map.insert(key.into(), Value::Object(entries));
            }
        };
        pattern("rank_pattern", self.rank_pattern.iter().map(|(k, v)| (k.clone(), json!(v))).collect());
        pattern("alpha_pattern", self.alpha_pattern.iter().map(|(k, v)| (k.clone(), json!(v))).collect());
        Ok(map)
    }

    /// The method of this name with these settings, for the model of a folder.
    pub fn method(&self, name: &str, model: &Path) -> Result<Box<dyn Method>> {
        let row = method_row(name)?;
        let mut map = self.settings()?;
        if row.peft_type.is_empty() {
            return match map.keys().next() {
                None => Ok(Box::new(Full)),
                Some(key) => {
                    Err(Error::config("command line", key, format!("is not a setting of --method {name}")))
                }
            };
        }
        map.insert("peft_type".into(), json!(row.peft_type));
        map.insert("task_type".into(), json!("CAUSAL_LM"));
        map.insert("base_model_name_or_path".into(), json!(model.display().to_string()));
        from_settings("command line", &map)
    }
}
