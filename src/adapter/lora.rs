//! LoRA: low-rank matrices beside linear layers. Source: Hu et al. (arXiv 2106.09685).

use super::attach::{Attachment, Initial};
use super::config::{Bias, InitLoraWeights, LoraConfig};
use super::io::PREFIX;
use super::method::Method;
use super::reader::Settings;
use super::target::{lora_defaults, select_targets};
use crate::error::Result;
use crate::model::{LinearAdapter, Lora, Model};
use crate::param::ParamStore;

impl Method for LoraConfig {
    fn name(&self) -> &'static str {
        "lora"
    }

    fn settings(&self) -> Settings {
        LoraConfig::settings(self)
    }

    /// Adds A and B (and a bias on B) of every target, in the model's order, and the biases and modules that are
    /// trained whole.
    fn install(&mut self, model: &mut Model, attachment: &mut Attachment) -> Result<()> {
        self.check("adapter")?;
        let modules = model.modules();
        let targets = select_targets(self, &modules, &model.config.model_type)?;
        self.targets.complete(&modules, &model.config.model_type, model.config.conv1d, lora_defaults)?;
        let mut stream = 0;
        for linear in model.linears_mut() {
            let Some(target) = targets.iter().find(|t| t.path == linear.path) else { continue };
            let (path, r, inputs) = (&linear.path, target.r, linear.in_features);
            let (a, b) = match self.init_lora_weights {
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
            linear.adapter = Some(LinearAdapter::Lora(Lora {
                a,
                b,
                bias,
                scale: target.scale as f32,
                dropout: self.lora_dropout as f32,
                stream,
            }));
            stream += 1;
        }
        attachment.train_whole(model, &self.targets.modules_to_save, |module| match self.bias {
            Bias::None => false,
            Bias::All => true,
            Bias::LoraOnly => targets.iter().any(|t| t.path == module),
        })
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
