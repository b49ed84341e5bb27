//! What a method of fine-tuning is, and the table of those there are.

use super::adalora::AdaLoraConfig;
use super::attach::Attachment;
use super::bitfit::BitFitConfig;
use super::bottleneck::BottleneckConfig;
use super::card::write_card;
use super::config::LoraConfig;
use super::full::Full;
use super::ia3::Ia3Config;
use super::io::{ADAPTER_FILE, CONFIG_FILE, load_params, named_params, write_tensors};
use super::ln_tuning::LnTuningConfig;
use super::merge::MergePlan;
use super::oft::OftConfig;
use super::prompt::PromptLearningConfig;
use super::reader::{Reader, Settings, read_map, to_json};
use super::vera::VeraConfig;
use crate::error::{Error, Result};
use crate::fs::write_atomic_bytes;
use crate::model::{Model, ModuleInfo};
use crate::param::ParamStore;
use crate::tensor::Tensor;
use serde_json::{Map, Value};
use std::fmt::Debug;
use std::path::Path;

/// A method with its settings: what it puts on a model, and how that is stored.
pub trait Method: Debug + Send + Sync {
    /// Its row of [`METHODS`], by name.
    fn name(&self) -> &'static str;

    /// PEFT's keys and values; empty if the method has no `adapter_config.json`.
    fn settings(&self) -> Settings;

    /// Those of the settings that training does not change: a run goes on only with the same.
    fn fixed_settings(&self) -> Settings {
        self.settings()
    }

    /// Adds parameters to `attachment` and puts them on the model, with initial values that follow from the
    /// attachment's seed. Settings are completed by what the model says.
    ///
    /// # Errors
    /// When the settings don't fit the model.
    fn install(&mut self, model: &mut Model, attachment: &mut Attachment) -> Result<()>;

    /// The name in the file of the parameter `name`.
    fn key(&self, params: &ParamStore, name: &str) -> String;

    /// What merging the adapter into a base with these modules does.
    ///
    /// # Errors
    /// When no weight of the base can hold what the method does.
    fn merge_plan(&self, _modules: &[ModuleInfo], _model_type: &str) -> Result<MergePlan> {
        Err(Error::Unsupported(format!(
            "an adapter of the method `{}` can't be merged: no weight of the base can hold it; use it with --adapter",
            self.name()
        )))
    }

    /// Puts the method on a base model.
    ///
    /// # Errors
    /// When the settings don't fit the model or memory can't be had.
    fn attach(&mut self, model: &mut Model, seed: u64) -> Result<()> {
        let mut attachment = Attachment::new(seed);
        self.install(model, &mut attachment)?;
        attachment.finish(model)
    }

    /// The file of the parameters.
    fn file(&self) -> &'static str {
        ADAPTER_FILE
    }

    /// What the adapter's file holds, by the names there.
    ///
    /// # Errors
    /// When memory can't be had.
    fn tensors(&self, model: &Model) -> Result<Vec<(String, Tensor)>> {
        named_params(&model.params, |name| self.key(&model.params, name))
    }

    /// Writes what is trained to a folder. Equal parameters give equal bytes.
    ///
    /// # Errors
    /// When a file can't be written.
    fn save(&self, model: &Model, dir: &Path) -> Result<()> {
        write_tensors(&model.backend, &dir.join(self.file()), self.tensors(model)?)?;
        save_settings(self.settings(), dir)
    }

    /// Reads what [`Method::save`] wrote into the parameters of a model that the method is on.
    ///
    /// # Errors
    /// When a tensor is missing, left over or of another shape.
    fn load_values(&self, model: &mut Model, dir: &Path) -> Result<()> {
        load_params(model, dir, self.file(), |params, name| self.key(params, name))
    }

    /// Puts an adapter of a folder on a base model; the settings are those of the folder already.
    ///
    /// # Errors
    /// When the adapter does not fit the model.
    fn load(&mut self, model: &mut Model, dir: &Path) -> Result<()> {
        self.attach(model, 0)?;
        self.load_values(model, dir)
    }

    /// Prepares for a run of `total_steps` optimizer steps; what the method keeps from step to step is made here.
    ///
    /// # Errors
    /// When the settings don't fit the run or memory can't be had.
    fn begin(&mut self, _model: &mut Model, _total_steps: usize) -> Result<()> {
        Ok(())
    }

    /// A penalty on the parameters, once in each step; its gradient is added to theirs.
    ///
    /// # Errors
    /// When an operation fails.
    fn regularize(&self, _model: &Model) -> Result<f64> {
        Ok(0.0)
    }

    /// Whether [`Method::regularize`] or [`Method::after_step`] does anything.
    fn follows_steps(&self) -> bool {
        false
    }

    /// Follows the optimizer's step numbered `step` from 0, which multiplied the gradients by `grad_scale`.
    ///
    /// # Errors
    /// When an operation fails.
    fn after_step(&mut self, _model: &mut Model, _step: usize, _grad_scale: f32) -> Result<()> {
        Ok(())
    }

    /// Writes to a checkpoint's folder what [`Method::save`] leaves out and the run needs to go on.
    ///
    /// # Errors
    /// When a file can't be written.
    fn save_state(&self, _model: &Model, _dir: &Path) -> Result<()> {
        Ok(())
    }

    /// Takes parameters and state from a checkpoint of the same run.
    ///
    /// # Errors
    /// When a tensor is missing, left over or of another shape.
    fn load_state(&mut self, model: &mut Model, dir: &Path) -> Result<()> {
        self.load_values(model, dir)
    }
}

/// Writes `adapter_config.json` and the model card, unless there is nothing to write.
///
/// # Errors
/// When a file can't be written.
pub(super) fn save_settings(settings: Settings, dir: &Path) -> Result<()> {
    if settings.is_empty() {
        return Ok(());
    }
    write_atomic_bytes(&dir.join(CONFIG_FILE), to_json(&settings).as_bytes())?;
    write_card(&settings, dir)
}

/// A row of the table of methods.
#[derive(Clone, Copy, Debug)]
pub struct MethodRow {
    /// Name on the command line.
    pub name: &'static str,
    /// PEFT's `peft_type`; empty for what has no adapter.
    pub peft_type: &'static str,
    /// One line for people.
    pub about: &'static str,
    /// Settings from keys.
    pub read: fn(&Reader<'_>) -> Result<Box<dyn Method>>,
}

/// All methods.
pub const METHODS: &[MethodRow] = &[
    MethodRow {
        name: "lora",
        peft_type: "LORA",
        about: "low-rank matrices beside linear layers; also DoRA, rsLoRA, PiSSA, OLoRA, LoftQ",
        read: |r| Ok(Box::new(LoraConfig::read(r)?)),
    },
    MethodRow {
        name: "adalora",
        peft_type: "ADALORA",
        about: "LoRA whose ranks shrink where they matter least",
        read: |r| Ok(Box::new(AdaLoraConfig::read(r)?)),
    },
    MethodRow {
        name: "oft",
        peft_type: "OFT",
        about: "trained rotations of the layers' inputs",
        read: |r| Ok(Box::new(OftConfig::read(r)?)),
    },
    MethodRow {
        name: "adapter",
        peft_type: "BOTTLENECK",
        about: "small MLPs after or beside attention and MLP (AdapterHub's files)",
        read: |r| Ok(Box::new(BottleneckConfig::read(r)?)),
    },
    MethodRow {
        name: "prefix",
        peft_type: "PREFIX_TUNING",
        about: "trained keys and values before every layer's own",
        read: |r| Ok(Box::new(PromptLearningConfig::read_prefix(r)?)),
    },
    MethodRow {
        name: "prompt",
        peft_type: "PROMPT_TUNING",
        about: "trained embeddings before the text's",
        read: |r| Ok(Box::new(PromptLearningConfig::read_prompt(r)?)),
    },
    MethodRow {
        name: "ptuning",
        peft_type: "P_TUNING",
        about: "the same, made by a small network while training",
        read: |r| Ok(Box::new(PromptLearningConfig::read_ptuning(r)?)),
    },
    MethodRow {
        name: "ia3",
        peft_type: "IA3",
        about: "trained factors on keys, values and the MLP's inner columns",
        read: |r| Ok(Box::new(Ia3Config::read(r)?)),
    },
    MethodRow {
        name: "vera",
        peft_type: "VERA",
        about: "shared random low-rank matrices with trained factors",
        read: |r| Ok(Box::new(VeraConfig::read(r)?)),
    },
    MethodRow {
        name: "ln_tuning",
        peft_type: "LN_TUNING",
        about: "the norms alone",
        read: |r| Ok(Box::new(LnTuningConfig::read(r)?)),
    },
    MethodRow {
        name: "bitfit",
        peft_type: "BITFIT",
        about: "the biases alone",
        read: |r| Ok(Box::new(BitFitConfig::read(r)?)),
    },
    MethodRow {
        name: "full",
        peft_type: "",
        about: "every parameter of the base",
        read: |_| Ok(Box::new(Full)),
    },
];

/// A method from its `peft_type` and keys; `context` says where they come from.
///
/// # Errors
/// When the kind is not known or a key is malformed, or set and not implemented.
pub fn from_settings(context: impl Into<String>, map: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let reader = Reader::new(context, map);
    let kind = reader.kind()?;
    let row = METHODS.iter().find(|row| row.peft_type == kind && !kind.is_empty()).ok_or_else(|| {
        let known: Vec<&str> = METHODS.iter().map(|r| r.peft_type).filter(|t| !t.is_empty()).collect();
        reader.error("peft_type", format!("`{kind}` is not supported; supported: {}", known.join(", ")))
    })?;
    (row.read)(&reader)
}

/// The method of an adapter folder, not yet on a model.
///
/// # Errors
/// As [`from_settings`], or when `adapter_config.json` can't be read.
pub fn read_adapter(dir: &Path) -> Result<Box<dyn Method>> {
    let map = read_map(dir)?;
    from_settings(dir.join(CONFIG_FILE).display().to_string(), &map)
}

/// Puts the adapter of a folder on a base model; returns its method with settings.
///
/// # Errors
/// When the folder is not an adapter that fits this model: every tensor must be there, have the right shape, and be
/// used.
pub fn load_adapter(model: &mut Model, dir: &Path) -> Result<Box<dyn Method>> {
    let mut method = read_adapter(dir)?;
    method.load(model, dir)?;
    Ok(method)
}

/// The row of a method by its name on the command line.
///
/// # Errors
/// When there is none.
pub fn method_row(name: &str) -> Result<&'static MethodRow> {
    METHODS.iter().find(|row| row.name == name).ok_or_else(|| {
        let known: Vec<&str> = METHODS.iter().map(|r| r.name).collect();
        Error::config(
            "command line",
            "--method",
            format!("`{name}` is not a method; expected {}", known.join(", ")),
        )
    })
}
