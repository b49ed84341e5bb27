//! Rotary position embeddings: frequencies and tables.
//!
//! Source: Su et al., "RoFormer" (arXiv 2104.09864); Llama 3's frequency scaling as transformers computes it.

use super::config::Keys;
use crate::error::Result;
use crate::math;

/// Scaling of the frequencies for longer contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum RopeScaling {
    /// Frequencies as they are.
    Default,
    /// Low frequencies divided by `factor`, high ones kept, between them a blend.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_position_embeddings: f64 },
}

/// Rotary embedding of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub rope_theta: f64,
    /// Rotated elements at the start of each head.
    pub rotary_dim: usize,
    /// Pairs are neighbours instead of halves.
    pub interleaved: bool,
    /// Scaling of the frequencies.
    pub scaling: RopeScaling,
}

impl RopeConfig {
    /// From both forms that transformers writes: `rope_parameters` (new), or `rope_theta` with
    /// `rope_scaling` (old).
    ///
    /// # Errors
    /// When the type of scaling is not implemented or a parameter of it is missing.
    pub fn from_keys(keys: &Keys<'_>, head_dim: usize, interleaved: bool) -> Result<Self> {
        let (section, inner) = match keys.object("rope_parameters")? {
            Some(inner) => ("rope_parameters", Some(inner)),
            None => ("rope_scaling", keys.object("rope_scaling")?),
        };
        let theta = match inner.as_ref().map(|k| k.f64_opt("rope_theta")).transpose()?.flatten() {
            Some(theta) => theta,
            None => keys.f64_opt("rope_theta")?.unwrap_or(10_000.0),
        };
        if !(theta.is_finite() && theta > 0.0) {
            return Err(keys.error("rope_theta", format!("expected a positive number, found {theta}")));
        }
        let mut partial = keys.f64_opt("partial_rotary_factor")?.unwrap_or(1.0);
        let mut scaling = RopeScaling::Default;
        if let Some(inner) = inner {
            partial = inner.f64_opt("partial_rotary_factor")?.unwrap_or(partial);
            let kind = ["rope_type", "type"].into_iter().find(|k| inner.get(k).is_some());
            match kind.map(|k| inner.string(k)).transpose()?.as_deref() {
                None | Some("default") => {}
                Some("llama3") => {
                    let need = |key: &str| {
                        inner.f64_opt(key)?.filter(|v| *v > 0.0).ok_or_else(|| {
                            keys.error(
                                &format!("{section}.{key}"),
                                "expected a positive number for rope type `llama3`",
                            )
                        })
                    };
                    scaling = RopeScaling::Llama3 {
                        factor: need("factor")?,
                        low_freq_factor: need("low_freq_factor")?,
                        high_freq_factor: need("high_freq_factor")?,
                        original_max_position_embeddings: need("original_max_position_embeddings")?,
                    };
                }
                Some(other) => {
                    return Err(keys.error(
                        &format!("{section}.rope_type"),
                        format!("`{other}` is not supported; supported: default, llama3"),
                    ));
                }
            }
        }
        let rotary_dim = (head_dim as f64 * partial) as usize;
        if rotary_dim == 0 || rotary_dim > head_dim || !rotary_dim.is_multiple_of(2) {
            return Err(keys.error(
                "partial_rotary_factor",
                format!(
                    "{partial} of head_dim {head_dim} is {rotary_dim}, expected an even number up to head_dim"
                ),
            ));
        }
        Ok(RopeConfig { rope_theta: theta, rotary_dim, interleaved, scaling })
    }

    /// The angle per position of each pair, `[rotary_dim / 2]`, rounded to f32 where transformers does.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        (0..self.rotary_dim / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / self.rotary_dim as f32;
                let frequency = 1.0 / math::pow(self.rope_theta, f64::from(exponent)) as f32;
                self.scaling.apply(frequency)
            })
            .collect()
    }

    /// Cosines, then sines, of every pair's angle at positions `0..positions`: `[positions, rotary_dim]`.
    pub fn table(&self, positions: usize) -> Vec<f32> {
        let frequencies = self.inverse_frequencies();
        let mut table = Vec::with_capacity(positions * self.rotary_dim);
        for position in 0..positions {
            let angles = frequencies.iter().map(|f| f64::from(position as f32 * f));
            table.extend(angles.clone().map(|a| math::cos(a) as f32));
            table.extend(angles.map(|a| math::sin(a) as f32));
        }
        table
    }
}

impl RopeScaling {
    fn apply(self, frequency: f32) -> f32 {
        let RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } = self
        else {
            return frequency;
        };
        let f = f64::from(frequency);
        let wavelength = 2.0 * std::f64::consts::PI / f;
        if wavelength < original_max_position_embeddings / high_freq_factor {
            return frequency;
        }
        if wavelength > original_max_position_embeddings / low_freq_factor {
            return (f / factor) as f32;
        }
        let smooth = (original_max_position_embeddings / wavelength - low_freq_factor)
            / (high_freq_factor - low_freq_factor);
        ((1.0 - smooth) * f / factor + smooth * f) as f32
    }
}
