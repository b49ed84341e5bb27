//! BitFit: only the base's biases are trained. Source: Ben Zaken et al. (arXiv 2106.10199). PEFT has no such type; the
//! files are like its others, with the type `BITFIT`.

use super::attach::Attachment;
use super::config::Bias;
use super::io::PREFIX;
use super::merge::MergePlan;
use super::method::Method;
use super::reader::{Origin, Reader, Settings, common_settings};
use crate::error::{Error, Result};
use crate::model::{Model, ModuleInfo};
use crate::param::ParamStore;
use std::collections::BTreeMap;

/// Settings of BitFit; there are none of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct BitFitConfig {
    pub origin: Origin,
}

impl BitFitConfig {
    /// Reads the keys.
    ///
    /// # Errors
    /// When one is set that is not known.
    pub fn read(reader: &Reader<'_>) -> Result<Self> {
        let config = BitFitConfig { origin: Origin::read(reader)? };
        reader.finish(&[])?;
        Ok(config)
    }
}

impl Method for BitFitConfig {
    fn name(&self) -> &'static str {
        "bitfit"
    }

    fn settings(&self) -> Settings {
        common_settings("BITFIT", &self.origin)
    }

    fn install(&mut self, model: &mut Model, attachment: &mut Attachment) -> Result<()> {
        if !model.modules().iter().any(|m| m.bias) {
            return Err(Error::Unsupported(format!(
                "a model of the family `{}` without biases can't be trained by bitfit; use ln_tuning or ia3",
                model.config.model_type
            )));
        }
        attachment.train_whole(model, &[], |_| true)
    }

    fn merge_plan(&self, _modules: &[ModuleInfo], _model_type: &str) -> Result<MergePlan> {
        Ok(MergePlan { rules: BTreeMap::new(), modules_to_save: Vec::new(), bias: Bias::All })
    }

    fn key(&self, _params: &ParamStore, name: &str) -> String {
        format!("{PREFIX}{name}")
    }
}
