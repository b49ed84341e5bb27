//! IA3: trained factors on the outputs of some layers and the inputs of others.
//! Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"
//! (arXiv 2205.05638).

use super::attach::{Attachment, Initial};
use super::config::Bias;
use super::io::PREFIX;
use super::merge::{MergePlan, MergeRule};
use super::method::Method;
use super::reader::{Origin, Reader, Settings, common_settings, targets_value};
use super::target::{TargetModules, Targeting};
use crate::error::{Error, Result};
use crate::model::{LinearAdapter, Model, ModuleInfo};
use crate::param::ParamStore;
use serde_json::json;

/// An IA3 adapter's settings, in PEFT's names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Ia3Config {
    pub targets: Targeting,
    /// Those of the targets whose input is scaled; `None`: PEFT's default of the family.
    pub feedforward_modules: Option<TargetModules>,
    pub origin: Origin,
}

/// PEFT's default targets by `model_type`; the feed-forward one last. It has none for glm, glm4 and phi3.
fn defaults(model_type: &str) -> Option<&'static [&'static str]> {
    Some(match model_type {
        "gpt2" => &["c_attn", "mlp.c_proj"],
        "llama" | "mistral" | "glm" | "glm4" => &["k_proj", "v_proj", "down_proj"],
        "qwen2" | "qwen3" | "gemma" | "gemma2" | "gemma3_text" => &["q_proj", "v_proj", "down_proj"],
        "qwen" => &["c_attn", "mlp.c_proj"],
        "phi3" => &["qkv_proj", "down_proj"],
        "chatglm" => &["query_key_value", "dense_4h_to_h"],
        _ => return None,
    })
}

impl Ia3Config {
    /// Reads the keys.
    ///
    /// # Errors
    /// When one is malformed, or set and not implemented.
    pub fn read(reader: &Reader<'_>) -> Result<Self> {
        let config = Ia3Config {
            targets: Targeting::read(reader)?,
            feedforward_modules: reader.targets("feedforward_modules")?,
            origin: Origin::read(reader)?,
        };
        reader.finish(&[("init_ia3_weights", json!(true))])?;
        Ok(config)
    }

    /// The paths of the targets, and of those whose input is scaled.
    fn select(&self, modules: &[ModuleInfo], model_type: &str) -> Result<(Vec<String>, Vec<String>)> {
        let paths = |chosen: Vec<&ModuleInfo>| chosen.into_iter().map(|m| m.path.clone()).collect::<Vec<_>>();
        let chosen = paths(self.targets.select_linears(modules, model_type, defaults)?);
        let feedforward = match &self.feedforward_modules {
            None => Vec::new(),
            Some(TargetModules::Names(names)) if names.is_empty() => Vec::new(),
            Some(names) => paths(Targeting::from(names.clone()).select(modules, model_type, defaults)?),
        };
        match feedforward.iter().find(|path| !chosen.contains(path)) {
            None => Ok((chosen, feedforward)),
            Some(stray) => Err(Error::config(
                "adapter",
                "feedforward_modules",
                format!("`{stray}` is not one of target_modules"),
            )),
        }
    }
}

impl Method for Ia3Config {
    fn name(&self) -> &'static str {
        "ia3"
    }

    fn settings(&self) -> Settings {
        let mut keys = common_settings("IA3", &self.origin);
        keys.extend(self.targets.settings());
        // IA3 has no choice of layers.
        keys.retain(|key, _| !key.starts_with("layers_"));
        keys.extend([
            ("feedforward_modules", targets_value(&self.feedforward_modules)),
            ("init_ia3_weights", json!(true)),
        ]);
        keys
    }

    fn merge_plan(&self, modules: &[ModuleInfo], model_type: &str) -> Result<MergePlan> {
        let (chosen, feedforward) = self.select(modules, model_type)?;
        let rule = |path: &String| MergeRule::Ia3 { feedforward: feedforward.contains(path) };
        let rules = chosen.iter().map(|path| (path.clone(), rule(path))).collect();
        Ok(MergePlan { rules, modules_to_save: self.targets.modules_to_save.clone(), bias: Bias::None })
    }

    fn install(&mut self, model: &mut Model, attachment: &mut Attachment) -> Result<()> {
        let (modules, model_type) = (model.modules(), model.config.model_type.clone());
        if self.targets.target_modules.is_none() && self.feedforward_modules.is_none() {
            let last = defaults(&model_type).and_then(<[_]>::last);
            self.feedforward_modules = last.map(|name| TargetModules::Names(vec![(*name).to_string()]));
        }
        let (chosen, feedforward) = self.select(&modules, &model_type)?;
        self.targets.complete(&modules, &model_type, model.config.conv1d, defaults)?;
        for linear in model.linears_mut() {
            if !chosen.contains(&linear.path) {
                continue;
            }
            let feedforward = feedforward.contains(&linear.path);
            let shape = if feedforward { [1, linear.in_features] } else { [linear.out_features, 1] };
            let factors = attachment.add(format!("{}.ia3_l", linear.path), &shape, Initial::Constant(1.0));
            linear.adapter = Some(LinearAdapter::Ia3 { factors, feedforward });
        }
        attachment.train_whole(model, &self.targets.modules_to_save, |_| false)
    }

    fn key(&self, _params: &ParamStore, name: &str) -> String {
        format!("{PREFIX}{name}")
    }
}
