//! Several adapters side by side on one base, for passes whose rows have different ones.

use super::decoder::{Installed, Model};
use super::module::{Apart, EmbeddingAdapter, LinearAdapter, Parameter, Weight};
use crate::error::{Error, Result};

impl Parameter {
    /// Whether both are one and the same part of the base.
    fn is_same(&self, other: &Parameter) -> bool {
        match (self, other) {
            (Parameter::Frozen(Weight::Dense(a)), Parameter::Frozen(Weight::Dense(b))) => a.is_same(b),
            (Parameter::Frozen(Weight::Quantized(a)), Parameter::Frozen(Weight::Quantized(b))) => {
                a.is_same(b)
            }
            _ => false,
        }
    }

    /// The base's with what adapters have in its place: itself where nobody has another.
    fn beside(&self, own: Vec<Parameter>) -> Parameter {
        match own.iter().all(|own| own.is_same(self)) {
            true => self.clone(),
            false => Parameter::SideBySide(Box::new(Apart { base: self.clone(), own })),
        }
    }
}

impl Model {
    /// What puts these adapters side by side on this base, for passes whose rows have one of them each (their
    /// [slots](crate::autograd::Slot), in this order) or none. Their parameters stay where they are, and nothing is
    /// copied: where adapters do no more than adding low-rank parts to a layer, its product is one for all rows, and
    /// otherwise each adapter's rows go through what the layer is with it.
    ///
    /// # Errors
    /// When the model has an adapter on it, or one of these, which the message names, is more than a change of layers
    /// and norms.
    pub fn side_by_side(&mut self, adapters: &[(&str, &Installed)]) -> Result<Installed> {
        let base = self.installed()?;
        for (adapter, state) in adapters {
            let what = match state.prompt {
                Some(_) => "virtual tokens, which make its sequences longer than others'",
                None if state.bottlenecks.iter().flatten().any(Option::is_some) => {
                    "layers of its own between the base's (bottleneck adapters)"
                }
                None => continue,
            };
            return Err(Error::Unsupported(format!(
                "the adapter `{adapter}` has {what}; adapters side by side change the base's own layers: use this one \
                 by itself"
            )));
        }
        let states = || adapters.iter().map(|(_, state)| *state);
        let own = |i: usize| states().map(|state| state.parameters[i].clone()).collect();
        let parameters: Vec<Parameter> =
            base.parameters.iter().enumerate().map(|(i, parameter)| parameter.beside(own(i))).collect();
        let head = base.head.as_ref().map(|own| {
            own.beside(states().map(|state| state.head.clone().unwrap_or_else(|| own.clone())).collect())
        });
        let linears = (0..base.linears.len()).map(|i| {
            let all: Vec<Option<LinearAdapter>> = states().map(|state| state.linears[i].clone()).collect();
            all.iter().any(Option::is_some).then_some(LinearAdapter::SideBySide(all))
        });
        let embeddings = [0, 1].map(|i| {
            let all: Vec<_> = states().map(|state| state.embeddings[i].clone()).collect();
            all.iter().any(Option::is_some).then_some(EmbeddingAdapter::SideBySide(all))
        });
        Ok(Installed { parameters, head, linears: linears.collect(), embeddings, ..base })
    }
}
