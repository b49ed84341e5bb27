//! Parameters in the making: what a method adds to a model, with initial values.

use crate::error::{Error, Result};
use crate::model::{Model, Parameter, Weight};
use crate::param::{ParamId, ParamLayout};
use crate::rng::{Philox, PhiloxKey, Stream};
use crate::tensor::Tensor;

/// How a parameter starts.
#[derive(Clone, Debug)]
pub enum Initial {
    /// All elements alike.
    Constant(f32),
    /// Uniform in `+-bound`.
    Uniform(f32),
    /// Normal with this standard deviation.
    Normal(f32),
    /// Normal with this standard deviation, within two of it.
    TruncatedNormal(f32),
    /// These elements.
    Values(Vec<f32>),
    /// The elements of a frozen parameter that becomes trainable.
    Copy(Tensor),
}

/// Collects a method's parameters; [`Attachment::finish`] makes them.
#[derive(Debug)]
pub struct Attachment {
    layout: ParamLayout,
    initial: Vec<(ParamId, Initial)>,
    seed: u64,
}

impl Attachment {
    /// An empty one; random initial values follow from `seed`.
    pub fn new(seed: u64) -> Self {
        Attachment { layout: ParamLayout::default(), initial: Vec::new(), seed }
    }

    /// What random initial values follow from.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Adds a parameter; weight decay applies to all but biases.
    pub fn add(&mut self, name: impl Into<String>, shape: &[usize], initial: Initial) -> ParamId {
        let name = name.into();
        let decay = !name.rsplit('.').next().is_some_and(|last| last.starts_with("bias"));
        self.push(name, shape, decay, initial)
    }

    /// [`Attachment::add`] of a matrix whose transpose is what files hold.
    pub fn add_transposed(
        &mut self,
        name: impl Into<String>,
        shape: [usize; 2],
        initial: Initial,
    ) -> ParamId {
        let id = self.add(name, &shape, initial);
        self.layout.transpose_in_files(id);
        id
    }

    /// [`Attachment::add`] without weight decay.
    pub fn add_undecayed(&mut self, name: impl Into<String>, shape: &[usize], initial: Initial) -> ParamId {
        self.push(name.into(), shape, false, initial)
    }

    fn push(&mut self, name: String, shape: &[usize], decay: bool, initial: Initial) -> ParamId {
        let id = self.layout.add(name, shape, decay);
        self.initial.push((id, initial));
        id
    }

    /// Makes a frozen parameter of the base trainable, if it isn't yet.
    ///
    /// # Errors
    /// When it is quantized.
    pub fn make_trainable(&mut self, name: &str, parameter: &mut Parameter) -> Result<()> {
        self.make_trainable_as(name, name, parameter)
    }

    /// [`Attachment::make_trainable`] under another name than the base's.
    ///
    /// # Errors
    /// When it is quantized.
    pub fn make_trainable_as(&mut self, name: &str, base: &str, parameter: &mut Parameter) -> Result<()> {
        let tensor = match parameter {
            Parameter::Trainable(_) => return Ok(()),
            Parameter::SideBySide(_) => {
                return Err(Error::tensor(
                    base,
                    "belongs to adapters side by side; take them off the model first",
                ));
            }
            Parameter::Frozen(Weight::Dense(tensor)) => tensor.clone(),
            Parameter::Frozen(Weight::Quantized(_)) => {
                return Err(Error::tensor(
                    base,
                    "a quantized weight can't be trained whole; load the base without quantization",
                ));
            }
        };
        // Biases and norms have one dimension; weight decay spares them.
        let decay = tensor.shape().len() > 1;
        let id = self.push(name.to_string(), tensor.shape(), decay, Initial::Copy(tensor.clone()));
        *parameter = Parameter::Trainable(id);
        Ok(())
    }

    /// Makes the modules that end in one of `modules_to_save` trainable, and the biases that `bias` takes in. A tied
    /// head that is trained whole gets values of its own; the embedding stays.
    ///
    /// # Errors
    /// When one is quantized.
    pub fn train_whole(
        &mut self,
        model: &mut Model,
        modules_to_save: &[String],
        bias: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let kept = |module: &str| modules_to_save.iter().any(|name| module.ends_with(name.as_str()));
        let tied_head = model.config.tie_word_embeddings && kept(&model.head.path);
        for (name, parameter) in model.parameters_mut() {
            let (module, kind) = name.rsplit_once('.').unwrap_or((&name, ""));
            if (kind == "bias" && bias(module)) || kept(module) {
                self.make_trainable(&name, parameter)?;
            }
        }
        if tied_head {
            let name = format!("{}.weight", model.head.path);
            self.make_trainable(&name, &mut model.head.weight)?;
        }
        Ok(())
    }

    /// Makes the model's parameters with their initial values.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn finish(self, model: &mut Model) -> Result<()> {
        model.params = self.layout.build(&model.backend, model.dtype)?;
        for (index, (id, initial)) in self.initial.into_iter().enumerate() {
            let mut rng = Philox::new(PhiloxKey::new(self.seed, Stream::Init, index as u64));
            let n = model.params.info(id).range.len();
            let values: Vec<f32> = match initial {
                Initial::Constant(0.0) => continue,
                Initial::Copy(tensor) => {
                    model.params.copy_from(id, &tensor)?;
                    tensor.release_pages();
                    continue;
                }
                Initial::Constant(x) => vec![x; n],
                Initial::Uniform(bound) => (0..n).map(|_| bound * (2.0 * rng.uniform() - 1.0)).collect(),
                Initial::Normal(deviation) => (0..n).map(|_| deviation * rng.normal()).collect(),
                Initial::TruncatedNormal(deviation) => {
                    let mut within = || loop {
                        let x = rng.normal();
                        if x.abs() <= 2.0 {
                            return deviation * x;
                        }
                    };
                    (0..n).map(|_| within()).collect()
                }
                Initial::Values(values) => values,
            };
            model.params.set(id, &values)?;
        }
        Ok(())
    }
}
