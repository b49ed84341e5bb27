//! OFT: the input of a layer is rotated, block by block, before the frozen weight sees it ([`crate::ops::rotate`]).
//! Sources: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (arXiv 2306.07280); "Orthogonal
//! Finetuning Made Scalable" (arXiv 2506.19847).

use super::attach::{Attachment, Initial};
use super::config::Bias;
use super::io::PREFIX;
use super::merge::{MergePlan, MergeRule};
use super::method::Method;
use super::reader::{Origin, Reader, Settings, common_settings};
use super::target::{Targeting, lora_defaults};
use crate::error::{Error, Result};
use crate::model::{LinearAdapter, Model, ModuleInfo, Rotation};
use crate::ops::rotate::constrain;
use crate::param::ParamStore;
use serde_json::json;

/// An OFT adapter's settings, in PEFT's names.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct OftConfig {
    /// Blocks of a layer; 0: as many as blocks of `oft_block_size` fit.
    pub r: usize,
    /// Columns of a block; 0: as `r` says.
    pub oft_block_size: usize,
    /// Share of a layer's blocks that are not rotated in a step of training.
    pub module_dropout: f64,
    /// Whether rotations stay near none, as near as `eps` says.
    pub coft: bool,
    pub eps: f64,
    /// One rotation for all blocks of a layer.
    pub block_share: bool,
    /// Cayley's transform by a series instead of an inverse.
    pub use_cayley_neumann: bool,
    pub num_cayley_neumann_terms: usize,
    /// False: a random start, for tests.
    pub init_weights: bool,
    pub bias: Bias,
    pub targets: Targeting,
    pub origin: Origin,
}

impl Default for OftConfig {
    fn default() -> Self {
        OftConfig {
            r: 0,
            oft_block_size: 32,
            module_dropout: 0.0,
            coft: false,
            eps: 6e-5,
            block_share: false,
            use_cayley_neumann: true,
            num_cayley_neumann_terms: 5,
            init_weights: true,
            bias: Bias::None,
            targets: Targeting::default(),
            origin: Origin::default(),
        }
    }
}

/// The divisor of `whole` that is nearest to `wanted`, the smaller of two as near.
fn nearest_divisor(whole: usize, wanted: usize) -> usize {
    let lower = (1..=wanted.min(whole)).rev().find(|n| whole.is_multiple_of(*n)).unwrap_or(1);
    let higher = (wanted..=whole).find(|n| whole.is_multiple_of(*n)).unwrap_or(whole);
    if wanted >= whole || wanted - lower > higher - wanted { higher } else { lower }
}

impl OftConfig {
    /// Reads the keys.
    ///
    /// # Errors
    /// When one is malformed, or set and not implemented.
    pub fn read(reader: &Reader<'_>) -> Result<Self> {
        let defaults = OftConfig::default();
        let r = reader.usize("r")?.unwrap_or(0);
        let flag = |key: &str, default: bool| match reader.get(key) {
            None => Ok(default),
            Some(_) => reader.bool(key),
        };
        let config = OftConfig {
            r,
            oft_block_size: reader.usize("oft_block_size")?.unwrap_or(if r == 0 { 32 } else { 0 }),
            module_dropout: reader.f64("module_dropout")?.unwrap_or(0.0),
            coft: reader.bool("coft")?,
            eps: reader.f64("eps")?.unwrap_or(defaults.eps),
            block_share: reader.bool("block_share")?,
            use_cayley_neumann: flag("use_cayley_neumann", true)?,
            num_cayley_neumann_terms: reader.usize("num_cayley_neumann_terms")?.unwrap_or(5),
            init_weights: flag("init_weights", true)?,
            bias: Bias::read(reader, "oft_only")?,
            targets: Targeting::read(reader)?,
            origin: Origin::read(reader)?,
        };
        reader.finish(&[])?;
        if (config.r == 0) == (config.oft_block_size == 0) {
            let found = format!("found {} and oft_block_size {}", config.r, config.oft_block_size);
            return Err(reader.error("r", format!("expected one of r and oft_block_size to be 0, {found}")));
        }
        if !(0.0..1.0).contains(&config.module_dropout) {
            return Err(reader.error("module_dropout", "expected a probability in [0, 1)"));
        }
        if !(config.eps.is_finite() && config.eps >= 0.0) {
            return Err(reader.error("eps", format!("expected 0 or more, found {}", config.eps)));
        }
        if config.num_cayley_neumann_terms > 64 {
            return Err(reader.error("num_cayley_neumann_terms", "expected at most 64"));
        }
        Ok(config)
    }

    /// The blocks that a layer's columns are cut into, and the columns of one; sizes that don't divide become the nearest
    /// that do, as in PEFT.
    fn blocks(&self, path: &str, inputs: usize) -> Result<(usize, usize)> {
        let (blocks, block_size) = if self.r == 0 {
            let size = nearest_divisor(inputs, self.oft_block_size);
            (inputs / size, size)
        } else {
            let blocks = nearest_divisor(inputs, self.r);
            (blocks, inputs / blocks)
        };
        if block_size < 2 {
            let found = format!("blocks of one column in `{path}`, which can't be rotated");
            return Err(Error::config("adapter", "oft_block_size", found));
        }
        Ok((if self.block_share { 1 } else { blocks }, block_size))
    }

    fn terms(&self) -> Option<usize> {
        self.use_cayley_neumann.then_some(self.num_cayley_neumann_terms)
    }
}

impl Method for OftConfig {
    fn name(&self) -> &'static str {
        "oft"
    }

    fn settings(&self) -> Settings {
        let mut keys = common_settings("OFT", &self.origin);
        keys.extend(self.targets.settings());
        keys.extend([
            ("bias", json!(self.bias.name("oft_only"))),
            ("block_share", json!(self.block_share)),
            ("coft", json!(self.coft)),
            ("eps", json!(self.eps)),
            ("init_weights", json!(self.init_weights)),
            ("module_dropout", json!(self.module_dropout)),
            ("num_cayley_neumann_terms", json!(self.num_cayley_neumann_terms)),
            ("oft_block_size", json!(self.oft_block_size)),
            ("r", json!(self.r)),
            ("use_cayley_neumann", json!(self.use_cayley_neumann)),
        ]);
        keys
    }

    fn install(&mut self, model: &mut Model, attachment: &mut Attachment) -> Result<()> {
        let (modules, model_type) = (model.modules(), model.config.model_type.clone());
        let chosen = self.targets.select_linears(&modules, &model_type, lora_defaults)?;
        self.targets.complete(&modules, &model_type, model.config.conv1d, lora_defaults)?;
        let mut stream = 0;
        for linear in model.linears_mut() {
            if !chosen.iter().any(|m| m.path == linear.path) {
                continue;
            }
            let (blocks, block_size) = self.blocks(&linear.path, linear.in_features)?;
            let start = if self.init_weights { Initial::Constant(0.0) } else { Initial::Normal(0.1) };
            let shape = [blocks, block_size * (block_size - 1) / 2];
            linear.adapter = Some(LinearAdapter::Rotation(Rotation {
                skew: attachment.add(format!("{}.oft_R.weight", linear.path), &shape, start),
                block_size,
                terms: self.terms(),
                max_norm: self.coft.then_some(self.eps),
                dropout: self.module_dropout as f32,
                stream,
            }));
            stream += 1;
        }
        attachment.train_whole(model, &self.targets.modules_to_save, |module| match self.bias {
            Bias::None => false,
            Bias::All => true,
            Bias::LoraOnly => chosen.iter().any(|m| m.path == module),
        })
    }

    fn merge_plan(&self, modules: &[ModuleInfo], model_type: &str) -> Result<MergePlan> {
        let mut rules = std::collections::BTreeMap::new();
        for module in self.targets.select_linears(modules, model_type, lora_defaults)? {
            let (blocks, block_size) = self.blocks(&module.path, module.in_features)?;
            let (terms, max_norm) = (self.terms(), self.coft.then_some(self.eps));
            rules.insert(module.path.clone(), MergeRule::Rotation { blocks, block_size, terms, max_norm });
        }
        let modules_to_save = self.targets.modules_to_save.clone();
        Ok(MergePlan { rules, modules_to_save, bias: self.bias })
    }

    /// The bias of an adapted layer belongs to its `base_layer`.
    fn key(&self, params: &ParamStore, name: &str) -> String {
        if let Some(module) = name.strip_suffix(".bias")
            && params.find(&format!("{module}.oft_R.weight")).is_some()
        {
            return format!("{PREFIX}{module}.base_layer.bias");
        }
        format!("{PREFIX}{name}")
    }

    /// COFT's parameters are brought within their bound before a step sees them, as in PEFT.
    fn begin(&mut self, model: &mut Model, _total_steps: usize) -> Result<()> {
        self.after_step(model, 0, 1.0)
    }

    fn follows_steps(&self) -> bool {
        self.coft
    }

    fn after_step(&mut self, model: &mut Model, _step: usize, _grad_scale: f32) -> Result<()> {
        if !self.coft {
            return Ok(());
        }
        for id in model.params.ids() {
            let info = model.params.info(id);
            if info.name.ends_with(".oft_R.weight") {
                let elements = info.shape[1];
                let mut values = model.params.to_vec(id)?;
                constrain(&mut values, elements, self.eps);
                model.params.set(id, &values)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::nearest_divisor;

    #[test]
    fn sizes_that_do_not_divide_become_the_nearest_that_do() {
        for (whole, wanted, nearest) in
            [(32, 8, 8), (32, 5, 4), (32, 6, 4), (32, 7, 8), (56, 32, 28), (56, 60, 56), (7, 3, 1), (7, 5, 7)]
        {
            assert_eq!(nearest_divisor(whole, wanted), nearest, "{whole} {wanted}");
        }
    }
}
