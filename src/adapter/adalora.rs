//! AdaLoRA: low-rank matrices in the form of a singular value decomposition, whose ranks shrink while training, most
//! where they matter least ([`super::rank_allocator`]).
//!
//! `y += scale * B (E * A x)` with E a factor per rank, `scale = lora_alpha / (init_r + 1e-5)`. Ranks that are taken away
//! have a zero in E and are left out of the file, whose `rank_pattern` says which they were.
//! Source: Zhang et al., "AdaLoRA" (arXiv 2303.10512).

use super::attach::{Attachment, Initial};
use super::config::{Bias, neutral_keys};
use super::io::{CONFIG_FILE, PREFIX};
use super::merge::{MergePlan, MergeRule};
use super::method::Method;
use super::rank_allocator::{Budget, RankAllocator, RankPattern};
use super::reader::{Origin, Reader, Settings, common_settings, number, read_map};
use super::target::{Targeting, lora_defaults};
use crate::error::{Error, Result};
use crate::model::{Factored, Linear, LinearAdapter, Model, ModuleInfo, Parameter};
use crate::param::{ParamId, ParamStore};
use crate::tensor::Tensor;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// An AdaLoRA adapter's settings, in PEFT's names.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct AdaLoraConfig {
    pub target_r: usize,
    pub init_r: usize,
    pub lora_alpha: f64,
    pub lora_dropout: f64,
    /// Steps before ranks are taken away.
    pub tinit: usize,
    /// Steps at the end in which they stay as they are.
    pub tfinal: usize,
    /// Steps from one allocation to the next.
    pub delta_t: usize,
    pub beta1: f64,
    pub beta2: f64,
    pub orth_reg_weight: f64,
    /// `None`: the steps of the run, once it begins.
    pub total_step: Option<usize>,
    /// False: all matrices start as random ones, for tests.
    pub init_lora_weights: bool,
    pub bias: Bias,
    pub targets: Targeting,
    pub origin: Origin,
    /// Which of `init_r` ranks are left, by module path.
    pub rank_pattern: Option<RankPattern>,
    /// The ranks that the model has, by module path, as numbers below `init_r`.
    installed: BTreeMap<String, Vec<usize>>,
    allocator: Option<RankAllocator>,
}

impl Default for AdaLoraConfig {
    fn default() -> Self {
        AdaLoraConfig {
            target_r: 8,
            init_r: 12,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            tinit: 0,
            tfinal: 0,
            delta_t: 1,
            beta1: 0.85,
            beta2: 0.85,
            orth_reg_weight: 0.5,
            total_step: None,
            init_lora_weights: true,
            bias: Bias::None,
            targets: Targeting::default(),
            origin: Origin::default(),
            rank_pattern: None,
            installed: BTreeMap::new(),
            allocator: None,
        }
    }
}

/// Keys of LoRA that PEFT writes for AdaLoRA too, with the values under which they do nothing.
fn unused_keys() -> Vec<(&'static str, Value)> {
    let mut keys = neutral_keys();
    keys.extend([
        ("alpha_pattern", json!({})),
        ("lora_bias", json!(false)),
        ("r", json!(8)),
        ("use_dora", json!(false)),
        ("use_rslora", json!(false)),
    ]);
    keys
}

/// `rank_pattern`: for each module (by the name of its E) whether each rank is left.
fn read_pattern(reader: &Reader<'_>) -> Result<Option<RankPattern>> {
    let Some(value) = reader.get("rank_pattern") else { return Ok(None) };
    let bad = |found: &Value| {
        reader.error("rank_pattern", format!("expected lists of true and false by module, found {found}"))
    };
    let mut pattern = RankPattern::new();
    for (name, list) in value.as_object().ok_or_else(|| bad(value))? {
        let kept: Option<Vec<bool>> = list.as_array().and_then(|l| l.iter().map(Value::as_bool).collect());
        let path = name.strip_suffix(".default").unwrap_or(name).strip_suffix(".lora_E");
        match (path, kept) {
            (Some(path), Some(kept)) => pattern.insert(path.to_string(), kept),
            _ => return Err(bad(&json!({ name.as_str(): list }))),
        };
    }
    Ok((!pattern.is_empty()).then_some(pattern))
}

impl AdaLoraConfig {
    /// Reads the keys.
    ///
    /// # Errors
    /// When one is malformed, or set and not implemented.
    pub fn read(reader: &Reader<'_>) -> Result<Self> {
        let defaults = AdaLoraConfig::default();
        let config = AdaLoraConfig {
            target_r: reader.usize("target_r")?.unwrap_or(defaults.target_r),
            init_r: reader.usize("init_r")?.unwrap_or(defaults.init_r),
            lora_alpha: reader.f64("lora_alpha")?.unwrap_or(defaults.lora_alpha),
            lora_dropout: reader.f64("lora_dropout")?.unwrap_or(0.0),
            tinit: reader.usize("tinit")?.unwrap_or(0),
            tfinal: reader.usize("tfinal")?.unwrap_or(0),
            delta_t: reader.usize("deltaT")?.unwrap_or(1),
            beta1: reader.f64("beta1")?.unwrap_or(defaults.beta1),
            beta2: reader.f64("beta2")?.unwrap_or(defaults.beta2),
            orth_reg_weight: reader.f64("orth_reg_weight")?.unwrap_or(defaults.orth_reg_weight),
            total_step: reader.usize("total_step")?,
            init_lora_weights: match reader.get("init_lora_weights") {
                None | Some(Value::Bool(true)) => true,
                Some(Value::Bool(false)) => false,
                Some(other) => {
                    let found = format!("expected true or false for AdaLoRA, found {other}");
                    return Err(reader.error("init_lora_weights", found));
                }
            },
            bias: Bias::read(reader, "lora_only")?,
            targets: Targeting::read(reader)?,
            origin: Origin::read(reader)?,
            rank_pattern: read_pattern(reader)?,
            ..defaults
        };
        reader.finish(&unused_keys())?;
        config.check(reader)?;
        Ok(config)
    }

    fn check(&self, reader: &Reader<'_>) -> Result<()> {
        let bad = |key: &str, message: String| Err(reader.error(key, message));
        if self.init_r == 0 || self.init_r > 65_536 {
            return bad("init_r", format!("expected a rank from 1 to 65536, found {}", self.init_r));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return bad("lora_dropout", "expected a probability in [0, 1)".into());
        }
        if !(self.lora_alpha.is_finite() && self.lora_alpha > 0.0) {
            return bad("lora_alpha", format!("expected a positive number, found {}", self.lora_alpha));
        }
        if self.delta_t == 0 {
            return bad("deltaT", "expected at least one step".into());
        }
        for (key, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(beta > 0.0 && beta < 1.0) {
                return bad(key, format!("expected a number between 0 and 1, found {beta}"));
            }
        }
        if !(self.orth_reg_weight.is_finite() && self.orth_reg_weight >= 0.0) {
            return bad("orth_reg_weight", format!("expected 0 or more, found {}", self.orth_reg_weight));
        }
        if let Some((path, kept)) = self.rank_pattern.iter().flatten().find(|(_, k)| k.len() != self.init_r) {
            let found = format!("{} ranks of `{path}`, expected init_r, {}", kept.len(), self.init_r);
            return bad("rank_pattern", found);
        }
        self.budget().map(|_| ()).map_err(|message| reader.error("total_step", message))
    }

    /// The schedule of ranks; of no steps if `total_step` isn't known yet.
    fn budget(&self) -> std::result::Result<Option<Budget>, String> {
        let Some(total_step) = self.total_step else { return Ok(None) };
        let AdaLoraConfig { tinit, tfinal, delta_t, target_r, .. } = *self;
        if tinit.saturating_add(tfinal) >= total_step {
            return Err(format!(
                "{total_step} steps leave none to take ranks away between tinit {tinit} and tfinal {tfinal}"
            ));
        }
        Ok(Some(Budget { tinit, tfinal, total_step, delta_t, target_r }))
    }

    /// `lora_alpha` over the first rank, whatever is left of it, as PEFT scales.
    fn scale(&self) -> f64 {
        f64::from(self.lora_alpha as f32 / (self.init_r as f32 + 1e-5))
    }

    /// The ranks of a module that are left, as numbers below `init_r`.
    fn ranks_of(&self, path: &str) -> Vec<usize> {
        let pattern = self.rank_pattern.as_ref().and_then(|pattern| pattern.get(path));
        (0..self.init_r).filter(|k| pattern.is_none_or(|kept| kept[*k])).collect()
    }

    /// Of the ranks that the model has in the module of this parameter, the places of those that are left, and whether they
    /// are columns.
    fn rows_of(&self, name: &str) -> Option<(Vec<usize>, bool)> {
        let (path, matrix) = name.rsplit_once('.')?;
        let installed = self.installed.get(path)?;
        let kept = self.ranks_of(path);
        let places = (0..installed.len()).filter(|i| kept.contains(&installed[*i])).collect();
        ["lora_A", "lora_B", "lora_E"].contains(&matrix).then_some((places, matrix == "lora_B"))
    }

    /// A parameter as it is in the file, without the ranks that were taken away.
    fn stored(&self, model: &Model, id: ParamId) -> Result<(String, Tensor)> {
        let (info, params) = (model.params.info(id), &model.params);
        let name = self.key(params, &info.name);
        let Some((places, columns)) = self.rows_of(&info.name) else { return Ok((name, params.master(id)?)) };
        let mut shape = info.shape.clone();
        shape[usize::from(columns)] = places.len();
        let (values, cols) = (params.to_vec(id)?, info.shape.last().copied().unwrap_or(1));
        let kept: Vec<f32> = match columns {
            true => values.chunks(cols.max(1)).flat_map(|row| places.iter().map(|k| row[*k])).collect(),
            false => places.iter().flat_map(|k| values[k * cols..][..cols].iter().copied()).collect(),
        };
        Ok((name, model.backend.from_slice(&kept, &shape)?))
    }
}

impl Method for AdaLoraConfig {
    fn name(&self) -> &'static str {
        "adalora"
    }

    fn settings(&self) -> Settings {
        let mut keys: Settings = unused_keys().into_iter().collect();
        keys.extend(common_settings("ADALORA", &self.origin));
        keys.extend(self.targets.settings());
        let pattern = self.rank_pattern.as_ref().map(|pattern| {
            let entries = pattern.iter().map(|(path, kept)| (format!("{path}.lora_E"), json!(kept)));
            Value::Object(entries.collect())
        });
        keys.extend([
            ("beta1", json!(self.beta1)),
            ("beta2", json!(self.beta2)),
            ("bias", json!(self.bias.name("lora_only"))),
            ("deltaT", json!(self.delta_t)),
            ("init_lora_weights", json!(self.init_lora_weights)),
            ("init_r", json!(self.init_r)),
            ("lora_alpha", number(self.lora_alpha)),
            ("lora_dropout", json!(self.lora_dropout)),
            ("orth_reg_weight", json!(self.orth_reg_weight)),
            ("rank_pattern", json!(pattern)),
            ("target_r", json!(self.target_r)),
            ("tfinal", json!(self.tfinal)),
            ("tinit", json!(self.tinit)),
            ("total_step", json!(self.total_step)),
        ]);
        keys
    }

    /// All but the ranks that are left.
    fn fixed_settings(&self) -> Settings {
        let mut keys = self.settings();
        keys.remove("rank_pattern");
        keys
    }

    fn install(&mut self, model: &mut Model, attachment: &mut Attachment) -> Result<()> {
        let (modules, model_type) = (model.modules(), model.config.model_type.clone());
        let chosen = self.targets.select_linears(&modules, &model_type, lora_defaults)?;
        self.targets.complete(&modules, &model_type, model.config.conv1d, lora_defaults)?;
        if let Some(path) = self
            .rank_pattern
            .iter()
            .flatten()
            .map(|(path, _)| path)
            .find(|path| !chosen.iter().any(|m| m.path == **path))
        {
            return Err(Error::config(
                "adapter",
                "rank_pattern",
                format!("`{path}` is no target of this base"),
            ));
        }
        self.installed.clear();
        let normal = |deviation: f32| Initial::Normal(if self.init_lora_weights { deviation } else { 1.0 });
        let e_start = || if self.init_lora_weights { Initial::Constant(0.0) } else { Initial::Normal(1.0) };
        let mut stream = 0;
        for linear in model.linears_mut() {
            if !chosen.iter().any(|m| m.path == linear.path) {
                continue;
            }
            let (path, inputs, outputs) = (linear.path.clone(), linear.in_features, linear.out_features);
            let ranks = self.ranks_of(&path);
            let r = ranks.len();
            let a = attachment.add(format!("{path}.lora_A"), &[r, inputs], normal(0.02));
            let b = attachment.add(format!("{path}.lora_B"), &[outputs, r], normal(0.02));
            let e = attachment.add(format!("{path}.lora_E"), &[r, 1], e_start());
            self.installed.insert(path, ranks);
            // A layer that has no rank left is the base's.
            if r > 0 {
                linear.adapter = Some(LinearAdapter::Factored(Box::new(Factored {
                    down: Linear::new("lora_A", Parameter::Trainable(a), None, inputs, r),
                    factors: e,
                    up: Linear::new("lora_B", Parameter::Trainable(b), None, r, outputs),
                    outer: None,
                    scale: self.scale() as f32,
                    dropout: self.lora_dropout as f32,
                    stream,
                })));
            }
            stream += 1;
        }
        attachment.train_whole(model, &self.targets.modules_to_save, |module| match self.bias {
            Bias::None => false,
            Bias::All => true,
            Bias::LoraOnly => chosen.iter().any(|m| m.path == module),
        })
    }

    fn merge_plan(&self, modules: &[ModuleInfo], model_type: &str) -> Result<MergePlan> {
        let chosen = self.targets.select_linears(modules, model_type, lora_defaults)?.into_iter();
        let rule = |m: &ModuleInfo| {
            let r = self.ranks_of(&m.path).len();
            (m.path.clone(), MergeRule::Factored { r, scale: self.scale() })
        };
        let modules_to_save = self.targets.modules_to_save.clone();
        Ok(MergePlan { rules: chosen.map(rule).collect(), modules_to_save, bias: self.bias })
    }

    /// The bias of an adapted layer belongs to its `base_layer`.
    fn key(&self, params: &ParamStore, name: &str) -> String {
        if let Some(module) = name.strip_suffix(".bias")
            && params.find(&format!("{module}.lora_E")).is_some()
        {
            return format!("{PREFIX}{module}.base_layer.bias");
        }
        format!("{PREFIX}{name}")
    }

    fn tensors(&self, model: &Model) -> Result<Vec<(String, Tensor)>> {
        model.params.ids().map(|id| self.stored(model, id)).collect()
    }

    fn begin(&mut self, model: &mut Model, total_steps: usize) -> Result<()> {
        self.total_step = self.total_step.or(Some(total_steps));
        let budget = self.budget().map_err(|message| Error::config("adapter", "total_step", message))?;
        let budget =
            budget.ok_or_else(|| Error::config("adapter", "total_step", "expected a number of steps"))?;
        let paths = self.installed.keys().map(String::as_str);
        self.allocator = Some(RankAllocator::new(model, paths, budget, [self.beta1, self.beta2])?);
        Ok(())
    }

    fn regularize(&self, model: &Model) -> Result<f64> {
        match &self.allocator {
            Some(allocator) if self.orth_reg_weight > 0.0 => {
                allocator.regularize(model, self.orth_reg_weight)
            }
            _ => Ok(0.0),
        }
    }

    fn follows_steps(&self) -> bool {
        self.allocator.is_some()
    }

    fn after_step(&mut self, model: &mut Model, step: usize, grad_scale: f32) -> Result<()> {
        let Some(allocator) = &mut self.allocator else { return Ok(()) };
        let Some(left) = allocator.after_step(model, step, grad_scale)? else { return Ok(()) };
        let pattern = left.into_iter().map(|(path, kept)| {
            let mut all = vec![false; self.init_r];
            let ranks = self.installed.get(&path).into_iter().flatten();
            ranks.zip(kept).for_each(|(rank, kept)| all[*rank] = kept);
            (path, all)
        });
        self.rank_pattern = Some(pattern.collect());
        Ok(())
    }

    fn save_state(&self, model: &Model, dir: &Path) -> Result<()> {
        self.allocator.as_ref().map_or(Ok(()), |allocator| allocator.save(model, dir))
    }

    fn load_state(&mut self, model: &mut Model, dir: &Path) -> Result<()> {
        let Some(allocator) = &mut self.allocator else { return self.load_values(model, dir) };
        allocator.load(model, dir)?;
        let settings = read_map(dir)?;
        self.rank_pattern =
            read_pattern(&Reader::new(dir.join(CONFIG_FILE).display().to_string(), &settings))?;
        Ok(())
    }
}
