//! Several LoRA adapters side by side on one base, for passes whose rows have different ones.

use super::decoder::{Installed, Model};
use super::module::{LinearAdapter, Lora, Parameter, Weight};
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
}

/// The low-rank part that an adapter has on a layer.
fn low_rank(adapter: &Option<LinearAdapter>) -> std::result::Result<Option<Lora>, &'static str> {
    match adapter {
        None => Ok(None),
        Some(LinearAdapter::Lora(lora)) if lora.dora.is_some() => Err("DoRA's magnitudes"),
        Some(LinearAdapter::Lora(lora)) if lora.bias.is_some() => Err("a trained bias (lora_bias)"),
        Some(LinearAdapter::Lora(lora)) if lora.taken_out.is_some() => {
            Err("a part of the base (PiSSA, OLoRA)")
        }
        Some(LinearAdapter::Lora(lora)) => Ok(Some(lora.clone())),
        Some(_) => Err("something else than a low-rank part"),
    }
}

impl Model {
    /// What puts these adapters side by side on this base, for passes whose rows have one of them each (their
    /// [slots](crate::autograd::Slot), in this order) or none. Their parameters stay where they are, and nothing is
    /// copied.
    ///
    /// # Errors
    /// When the model has an adapter on it, or one of these, which the message names, does more than adding low-rank
    /// parts to the products of linear layers.
    pub fn side_by_side(&mut self, adapters: &[(&str, &Installed)]) -> Result<Installed> {
        let base = self.installed()?;
        let paths: Vec<String> = self.linears_mut().into_iter().map(|l| l.path.clone()).collect();
        let names: Vec<String> = self.parameters_mut().into_iter().map(|(name, _)| name).collect();
        let mut linears: Vec<Vec<Option<Lora>>> = vec![Vec::new(); paths.len()];
        for (adapter, state) in adapters {
            let refuse = |what: String| {
                Err(Error::Unsupported(format!(
                    "the adapter `{adapter}` {what}; adapters side by side are LoRA or rsLoRA on linear layers, \
                     which share a base: use this one by itself"
                )))
            };
            let parameters = base.parameters.iter().zip(&state.parameters).zip(&names);
            if let Some((_, name)) = parameters.into_iter().find(|((a, b), _)| !a.is_same(b)) {
                return refuse(format!("changes the base's {name}"));
            }
            if base.head.as_ref().zip(state.head.as_ref()).is_some_and(|(a, b)| !a.is_same(b)) {
                return refuse("changes the base's output head".into());
            }
            if state.prompt.is_some() || state.bottlenecks.iter().flatten().any(Option::is_some) {
                return refuse("has virtual tokens or layers of its own".into());
            }
            if state.embeddings.iter().any(Option::is_some) {
                return refuse("adapts embeddings".into());
            }
            for ((all, own), path) in linears.iter_mut().zip(&state.linears).zip(&paths) {
                match low_rank(own) {
                    Ok(Some(_)) if *path == self.head.path => return refuse(format!("adapts {path}")),
                    Ok(lora) => all.push(lora),
                    Err(what) => return refuse(format!("has {what} on {path}")),
                }
            }
        }
        let linears = linears.into_iter();
        let linears = linears.map(|all| {
            let any = all.iter().any(Option::is_some);
            any.then_some(LinearAdapter::SideBySide(all))
        });
        Ok(Installed { linears: linears.collect(), ..base })
    }
}
