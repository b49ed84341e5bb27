//! Full fine-tuning: every parameter of the base is trained.

use super::attach::Attachment;
use super::method::Method;
use super::reader::Settings;
use crate::error::Result;
use crate::model::Model;
use crate::param::ParamStore;

/// The whole model. There is no adapter: the parameters are saved in f32 by the base's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Full;

impl Method for Full {
    fn name(&self) -> &'static str {
        "full"
    }

    fn settings(&self) -> Settings {
        Settings::new()
    }

    fn install(&mut self, model: &mut Model, attachment: &mut Attachment) -> Result<()> {
        for (name, parameter) in model.parameters_mut() {
            attachment.make_trainable(&name, parameter)?;
        }
        model.retie();
        Ok(())
    }

    fn key(&self, _params: &ParamStore, name: &str) -> String {
        name.to_string()
    }

    fn file(&self) -> &'static str {
        "model.safetensors"
    }
}
