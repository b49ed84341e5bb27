//! The one decoder: embedding, layers of attention and MLP with residuals, final norm, head.

use super::config::ModelConfig;
use super::module::{
    Bottleneck, Embedding, EmbeddingAdapter, Linear, LinearAdapter, ModuleInfo, ModuleKind, Norm, Parameter,
    Weight,
};
use super::prompt::Prompt;
use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::param::ParamStore;
use crate::tensor::Tensor;
use std::sync::Mutex;

/// Query, key and value projections.
#[derive(Clone, Debug)]
pub enum Qkv {
    /// Three layers.
    Separate(Box<[Linear; 3]>),
    /// One layer: queries, keys, values side by side.
    Fused(Box<Linear>),
}

/// The MLP.
#[derive(Clone, Debug)]
pub enum Mlp {
    /// Gate, up, down.
    Gated(Box<[Linear; 3]>),
    /// Gate and up side by side in one layer, down.
    FusedGated(Box<[Linear; 2]>),
    /// First and second layer.
    Plain(Box<[Linear; 2]>),
}

/// One decoder layer.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Layer {
    pub input_norm: Norm,
    pub qkv: Qkv,
    pub qk_norm: Option<[Norm; 2]>,
    pub o: Linear,
    /// On attention's output, before it is added.
    pub attention_norm: Option<Norm>,
    pub post_norm: Norm,
    pub mlp: Mlp,
    /// On the MLP's output, before it is added.
    pub mlp_norm: Option<Norm>,
    /// Trained, after or beside attention.
    pub attention_adapter: Option<Bottleneck>,
    /// Trained, after or beside the MLP.
    pub output_adapter: Option<Bottleneck>,
}

/// What methods change of a model: its parameters as they are seen, and what was put beside them. Handles only; the base's
/// weights are not copied.
#[derive(Debug)]
pub struct Installed {
    pub(super) params: ParamStore,
    pub(super) parameters: Vec<Parameter>, // in the order of `Model::parameters_mut`
    pub(super) head: Option<Parameter>,    // a tied one, which is not among them
    pub(super) linears: Vec<Option<LinearAdapter>>, // in the order of `Model::linears_mut`
    pub(super) embeddings: [Option<EmbeddingAdapter>; 2], // of tokens, of positions
    pub(super) bottlenecks: Vec<[Option<Bottleneck>; 2]>,
    pub(super) prompt: Option<Prompt>,
}

impl Installed {
    /// The trainable parameters.
    pub fn params(&self) -> &ParamStore {
        &self.params
    }

    /// The trainable parameters.
    pub fn params_mut(&mut self) -> &mut ParamStore {
        &mut self.params
    }
}

/// A module of a layer.
#[derive(Debug)]
enum Part<L, N> {
    Linear(L),
    Norm(N),
}

/// A layer's modules in order, by reference or by mutable reference.
macro_rules! parts {
    ($layer:expr, $iter:ident, $($borrow:tt)+) => {{
        let layer = $layer;
        let mut all = vec![Part::Norm($($borrow)+ layer.input_norm)];
        match $($borrow)+ layer.qkv {
            Qkv::Separate(l) => all.extend(l.$iter().map(Part::Linear)),
            Qkv::Fused(l) => all.push(Part::Linear(l)),
        }
        all.extend(layer.qk_norm.$iter().flatten().map(Part::Norm));
        all.push(Part::Linear($($borrow)+ layer.o));
        all.extend(layer.attention_norm.$iter().map(Part::Norm));
        all.push(Part::Norm($($borrow)+ layer.post_norm));
        match $($borrow)+ layer.mlp {
            Mlp::Gated(l) => all.extend(l.$iter().map(Part::Linear)),
            Mlp::FusedGated(l) | Mlp::Plain(l) => all.extend(l.$iter().map(Part::Linear)),
        }
        all.extend(layer.mlp_norm.$iter().map(Part::Norm));
        all
    }};
}

/// A decoder-only transformer with its trainable parameters.
#[derive(Debug)]
pub struct Model {
    /// What it is made of.
    pub config: ModelConfig,
    /// What computes.
    pub backend: Backend,
    /// Type of activations: f32 or bf16.
    pub dtype: DType,
    /// The trainable parameters; empty for a base model.
    pub params: ParamStore,
    /// Token embedding.
    pub embed: Embedding,
    /// Learned positions.
    pub positions: Option<Embedding>,
    /// The layers.
    pub layers: Vec<Layer>,
    /// Final norm.
    pub norm: Norm,
    /// Output head; shares the embedding's parameter where `tie_word_embeddings`.
    pub head: Linear,
    /// Keep only the input of each so many layers in training, computing them again in the backward pass; 0: keep
    /// everything.
    pub gradient_checkpointing: usize,
    /// Trained virtual tokens.
    pub prompt: Option<Prompt>,
    pub(super) origin: super::load::Origin,
    pub(super) rope_tables: [Mutex<Option<Tensor>>; 2], // f32 [positions, rotary_dim]: of all layers, of local ones
}

impl Model {
    /// The modules as a user of PEFT sees them, in order.
    pub fn modules(&self) -> Vec<ModuleInfo> {
        let mut all = Vec::new();
        let linear = |l: &Linear, is_head: bool| ModuleInfo {
            path: l.path.clone(),
            kind: if l.conv1d { ModuleKind::Conv1d } else { ModuleKind::Linear },
            in_features: l.in_features,
            out_features: l.out_features,
            bias: l.bias.is_some(),
            is_head,
        };
        let norm = |n: &Norm| {
            let cols = n.weight.shape(&self.params)[0];
            ModuleInfo {
                path: n.path.clone(),
                kind: ModuleKind::Norm,
                in_features: cols,
                out_features: cols,
                bias: n.bias.is_some(),
                is_head: false,
            }
        };
        for e in std::iter::once(&self.embed).chain(&self.positions) {
            let shape = e.weight.shape(&self.params);
            all.push(ModuleInfo {
                path: e.path.clone(),
                kind: ModuleKind::Embedding,
                in_features: shape[0],
                out_features: shape[1],
                bias: false,
                is_head: false,
            });
        }
        for part in self.layers.iter().flat_map(Layer::parts) {
            all.push(match part {
                Part::Linear(l) => linear(l, false),
                Part::Norm(n) => norm(n),
            });
        }
        all.push(norm(&self.norm));
        all.push(linear(&self.head, true));
        all
    }

    /// Number of the base's parameters; a tied head counts once.
    pub fn base_elements(&self) -> usize {
        let tied = self.config.tie_word_embeddings;
        let elements = |m: &ModuleInfo| {
            let bias = if m.bias { m.out_features } else { 0 };
            let weight =
                if m.kind == ModuleKind::Norm { m.out_features } else { m.in_features * m.out_features };
            weight + bias
        };
        self.modules().iter().filter(|m| !(m.is_head && tied)).map(elements).sum()
    }

    /// All linear layers but the head, in the order of [`Model::modules`].
    pub fn linears(&self) -> Vec<&Linear> {
        let parts = self.layers.iter().flat_map(Layer::parts);
        parts
            .filter_map(|part| match part {
                Part::Linear(l) => Some(l),
                Part::Norm(_) => None,
            })
            .collect()
    }

    /// All linear layers, in the order of [`Model::modules`], the head last.
    pub fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let parts = self.layers.iter_mut().flat_map(Layer::parts_mut);
        let mut all: Vec<_> = parts
            .filter_map(|part| match part {
                Part::Linear(l) => Some(l),
                Part::Norm(_) => None,
            })
            .collect();
        all.push(&mut self.head);
        all
    }

    /// The tables of tokens and, if they are learned, of positions.
    pub fn embeddings_mut(&mut self) -> impl Iterator<Item = &mut Embedding> {
        std::iter::once(&mut self.embed).chain(&mut self.positions)
    }

    /// Puts quantized weights into the backend's layout for products with few rows, one after the other, and a head in
    /// a mapped file into memory, whose larger pages are read faster: for models that generate text and are not trained
    /// or saved. Results keep their bits.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn lay_out_for_decoding(&mut self) -> Result<()> {
        if self.dtype != DType::BF16 {
            return Ok(()); // products in f32 have kernels for rows alone
        }
        let backend = self.backend.clone();
        if let Parameter::Frozen(Weight::Dense(head)) = &mut self.head.weight
            && head.is_mapped()
        {
            let mut copy = backend.empty(head.shape(), DType::BF16)?;
            backend.cast(&mut copy, head)?;
            head.release_pages();
            *head = copy;
        }
        let linears = self.linears_mut().into_iter();
        let mut all: Vec<_> = linears
            .filter_map(|linear| match &mut linear.weight {
                Parameter::Frozen(Weight::Quantized(matrix)) => Some(matrix),
                _ => None,
            })
            .collect();
        backend.lay_out_for_decoding(&mut all)
    }

    /// All base parameters by their Hugging Face names, in the order of [`Model::modules`]. A tied head is
    /// not listed.
    pub fn parameters_mut(&mut self) -> Vec<(String, &mut Parameter)> {
        fn linear<'a>(all: &mut Vec<(String, &'a mut Parameter)>, l: &'a mut Linear) {
            all.push((format!("{}.weight", l.path), &mut l.weight));
            all.extend(l.bias.as_mut().map(|b| (format!("{}.bias", l.path), b)));
        }
        fn norm<'a>(all: &mut Vec<(String, &'a mut Parameter)>, n: &'a mut Norm) {
            all.push((format!("{}.weight", n.path), &mut n.weight));
            all.extend(n.bias.as_mut().map(|b| (format!("{}.bias", n.path), b)));
        }
        let mut all = Vec::new();
        for e in std::iter::once(&mut self.embed).chain(&mut self.positions) {
            all.push((format!("{}.weight", e.path), &mut e.weight));
        }
        for part in self.layers.iter_mut().flat_map(Layer::parts_mut) {
            match part {
                Part::Linear(l) => linear(&mut all, l),
                Part::Norm(n) => norm(&mut all, n),
            }
        }
        norm(&mut all, &mut self.norm);
        if !self.config.tie_word_embeddings {
            linear(&mut all, &mut self.head);
        }
        all
    }

    /// The model as it is now, to be given back by [`Model::exchange`]; for a base without trained parameters.
    ///
    /// # Errors
    /// When the model has trained parameters, or memory can't be had.
    pub fn installed(&mut self) -> Result<Installed> {
        if self.params.elements() > 0 {
            return Err(Error::Unsupported("a model with an adapter on it is no base for others".into()));
        }
        Ok(Installed {
            params: ParamStore::empty(&self.backend)?,
            parameters: self.parameters_mut().into_iter().map(|(_, p)| p.clone()).collect(),
            head: self.config.tie_word_embeddings.then(|| self.head.weight.clone()),
            linears: self.linears_mut().into_iter().map(|l| l.adapter.clone()).collect(),
            embeddings: [None, None],
            bottlenecks: vec![[None, None]; self.layers.len()],
            prompt: None,
        })
    }

    /// Puts what was there at another time in place of what is there now, and gives that.
    pub fn exchange(&mut self, mut other: Installed) -> Installed {
        self.swap(&mut other);
        other
    }

    /// [`Model::exchange`] in place.
    pub fn swap(&mut self, other: &mut Installed) {
        std::mem::swap(&mut self.params, &mut other.params);
        if let Some(theirs) = &mut other.head {
            std::mem::swap(&mut self.head.weight, theirs);
        }
        for ((_, own), theirs) in self.parameters_mut().into_iter().zip(&mut other.parameters) {
            std::mem::swap(own, theirs);
        }
        for (own, theirs) in self.linears_mut().into_iter().zip(&mut other.linears) {
            std::mem::swap(&mut own.adapter, theirs);
        }
        for (own, theirs) in self.embeddings_mut().zip(&mut other.embeddings) {
            std::mem::swap(&mut own.adapter, theirs);
        }
        for (layer, theirs) in self.layers.iter_mut().zip(&mut other.bottlenecks) {
            std::mem::swap(&mut layer.attention_adapter, &mut theirs[0]);
            std::mem::swap(&mut layer.output_adapter, &mut theirs[1]);
        }
        std::mem::swap(&mut self.prompt, &mut other.prompt);
    }

    /// Makes a tied head share the embedding's parameter again, after the embedding's was replaced.
    pub fn retie(&mut self) {
        if self.config.tie_word_embeddings {
            self.head.weight = self.embed.weight.clone();
        }
    }
}

impl Layer {
    fn parts(&self) -> Vec<Part<&Linear, &Norm>> {
        parts!(self, iter, &)
    }

    fn parts_mut(&mut self) -> Vec<Part<&mut Linear, &mut Norm>> {
        parts!(self, iter_mut, &mut)
    }

    /// Whether any parameter of the layer is trained.
    pub(super) fn is_trainable(&self) -> bool {
        let trained = |weight: &Parameter, bias: &Option<Parameter>| {
            weight.is_trained() || bias.as_ref().is_some_and(Parameter::is_trained)
        };
        let adapted = self.attention_adapter.is_some() || self.output_adapter.is_some();
        adapted
            || self.parts().into_iter().any(|part| match part {
                Part::Linear(l) => l.adapter.is_some() || trained(&l.weight, &l.bias),
                Part::Norm(n) => trained(&n.weight, &n.bias),
            })
    }
}
