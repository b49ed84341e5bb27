//! LN-tuning: only norms are trained.
//! Source: Zhao et al., "Tuning LayerNorm in Attention" (arXiv 2312.11420).

use super::attach::Attachment;
use super::config::Bias;
use super::io::PREFIX;
use super::merge::{MergePlan, MergeRule};
use super::method::Method;
use super::reader::{Origin, Reader, Settings, common_settings};
use super::target::Targeting;
use crate::error::{Error, Result};
use crate::model::{Model, ModuleInfo, ModuleKind};
use crate::param::ParamStore;

/// An LN-tuning adapter's settings, in PEFT's names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct LnTuningConfig {
    pub targets: Targeting,
    pub origin: Origin,
}

/// PEFT's default targets by `model_type`, and what is alike for the families that it has none for.
fn defaults(model_type: &str) -> Option<&'static [&'static str]> {
    Some(match model_type {
        "gpt2" | "qwen" => &["ln_1", "ln_2", "ln_f"],
        "llama" | "mistral" | "glm" | "glm4" | "phi3" => {
            &["input_layernorm", "post_attention_layernorm", "norm"]
        }
        "qwen2" | "qwen3" => &["post_attention_layernorm"],
        "gemma" | "gemma2" | "gemma3_text" => &["input_layernorm", "post_attention_layernorm", "norm"],
        "chatglm" => &["input_layernorm", "post_attention_layernorm", "final_layernorm"],
        _ => return None,
    })
}

impl LnTuningConfig {
    /// Reads the keys.
    ///
    /// # Errors
    /// When one is malformed, or set and not implemented.
    pub fn read(reader: &Reader<'_>) -> Result<Self> {
        let config = LnTuningConfig { targets: Targeting::read(reader)?, origin: Origin::read(reader)? };
        reader.finish(&[])?;
        Ok(config)
    }
}

impl Method for LnTuningConfig {
    fn name(&self) -> &'static str {
        "ln_tuning"
    }

    fn settings(&self) -> Settings {
        let mut keys = common_settings("LN_TUNING", &self.origin);
        keys.extend(self.targets.settings());
        keys.retain(|key, _| !key.starts_with("layers_") && *key != "fan_in_fan_out");
        keys
    }

    fn install(&mut self, model: &mut Model, attachment: &mut Attachment) -> Result<()> {
        let (modules, model_type) = (model.modules(), model.config.model_type.clone());
        let chosen = self.targets.select(&modules, &model_type, defaults)?;
        if let Some(other) = chosen.iter().find(|m| m.kind != ModuleKind::Norm) {
            return Err(Error::config(
                "adapter",
                "target_modules",
                format!("`{}` is not a norm; LN-tuning trains norms alone", other.path),
            ));
        }
        self.targets.complete(&modules, &model_type, false, defaults)?;
        for (name, parameter) in model.parameters_mut() {
            let (module, kind) = name.rsplit_once('.').unwrap_or((&name, ""));
            if chosen.iter().any(|m| m.path == module) {
                let own = format!("{module}.ln_tuning_layers.{kind}");
                attachment.make_trainable_as(&own, &name, parameter)?;
            }
        }
        attachment.train_whole(model, &self.targets.modules_to_save, |_| false)
    }

    fn merge_plan(&self, modules: &[ModuleInfo], model_type: &str) -> Result<MergePlan> {
        let chosen = self.targets.select(modules, model_type, defaults)?;
        let rules = chosen.into_iter().map(|m| (m.path.clone(), MergeRule::Norm)).collect();
        Ok(MergePlan { rules, modules_to_save: self.targets.modules_to_save.clone(), bias: Bias::None })
    }

    fn key(&self, _params: &ParamStore, name: &str) -> String {
        format!("{PREFIX}{name}")
    }
}
