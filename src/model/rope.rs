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
    /// All divided by `factor`.
    Linear { factor: f64 },
    /// YaRN: low frequencies divided by `factor`, high ones kept, between them a ramp over the pairs from `low` to
    /// `high`; cosines and sines times `attention_factor`. Source: Peng et al. (arXiv 2309.00071).
    Yarn { factor: f64, attention_factor: f64, low: f64, high: f64 },
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
        Self::from_inner(keys, section, inner.as_ref(), head_dim, interleaved)
    }

    /// From one of several sections of `rope_parameters`, by kind of layer.
    ///
    /// # Errors
    /// As [`RopeConfig::from_keys`].
    pub fn from_section(keys: &Keys<'_>, both: &Keys<'_>, name: &str, head_dim: usize) -> Result<Self> {
        let inner = both.object(name)?;
        Self::from_inner(keys, &format!("rope_parameters.{name}"), inner.as_ref(), head_dim, false)
    }

    fn from_inner(
        keys: &Keys<'_>,
        section: &str,
        inner: Option<&Keys<'_>>,
        head_dim: usize,
        interleaved: bool,
    ) -> Result<Self> {
        let theta = match inner.map(|k| k.f64_opt("rope_theta")).transpose()?.flatten() {
            Some(theta) => theta,
            None => keys.f64_opt("rope_theta")?.unwrap_or(10_000.0),
        };
        if !(theta.is_finite() && theta > 0.0) {
            return Err(keys.error("rope_theta", format!("expected a positive number, found {theta}")));
        }
        let mut partial = keys.f64_opt("partial_rotary_factor")?.unwrap_or(1.0);
        if let Some(inner) = inner {
            partial = inner.f64_opt("partial_rotary_factor")?.unwrap_or(partial);
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
        let scaling = match inner {
            Some(inner) => RopeScaling::from_keys(keys, section, inner, theta, rotary_dim)?,
            None => RopeScaling::Default,
        };
        Ok(RopeConfig { rope_theta: theta, rotary_dim, interleaved, scaling })
    }

    /// The angle per position of each pair, `[rotary_dim / 2]`, rounded to f32 where transformers does.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        (0..self.rotary_dim / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / self.rotary_dim as f32;
                let frequency = 1.0 / math::pow(self.rope_theta, f64::from(exponent)) as f32;
                self.scaling.apply(i, frequency)
            })
            .collect()
    }

    /// Cosines, then sines, of every pair's angle at positions `0..positions`: `[positions, rotary_dim]`.
    pub fn table(&self, positions: usize) -> Vec<f32> {
        let frequencies = self.inverse_frequencies();
        let factor = match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        };
        let mut table = Vec::with_capacity(positions * self.rotary_dim);
        for position in 0..positions {
            let angles = frequencies.iter().map(|f| f64::from(position as f32 * f));
            table.extend(angles.clone().map(|a| math::cos(a) as f32 * factor));
            table.extend(angles.map(|a| math::sin(a) as f32 * factor));
        }
        table
    }
}

impl RopeScaling {
    /// From the keys of `rope_parameters` or `rope_scaling`.
    fn from_keys(
        keys: &Keys<'_>,
        section: &str,
        inner: &Keys<'_>,
        theta: f64,
        rotary_dim: usize,
    ) -> Result<Self> {
        let kind = ["rope_type", "type"].into_iter().find(|k| inner.get(k).is_some());
        let kind = kind.map(|k| inner.string(k)).transpose()?.unwrap_or_else(|| "default".to_string());
        let need = |key: &str| {
            inner.f64_opt(key)?.filter(|v| *v > 0.0).ok_or_else(|| {
                keys.error(
                    &format!("{section}.{key}"),
                    format!("expected a positive number for rope type `{kind}`"),
                )
            })
        };
        match kind.as_str() {
            "default" => Ok(RopeScaling::Default),
            "linear" => Ok(RopeScaling::Linear { factor: need("factor")? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_max_position_embeddings: need("original_max_position_embeddings")?,
            }),
            "yarn" => {
                let (factor, original) = (need("factor")?, need("original_max_position_embeddings")?);
                let scale =
                    |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * math::ln(factor) + 1.0 };
                let attention_factor = match inner.f64_opt("attention_factor")? {
                    Some(given) => given,
                    None => match (inner.f64_opt("mscale")?, inner.f64_opt("mscale_all_dim")?) {
                        (Some(m), Some(all)) if m != 0.0 && all != 0.0 => scale(m) / scale(all),
                        _ => scale(1.0),
                    },
                };
                // The pair that turns so often within the original positions.
                let pair = |turns: f64| {
                    let wavelengths = original / (turns * 2.0 * std::f64::consts::PI);
                    rotary_dim as f64 * math::ln(wavelengths) / (2.0 * math::ln(theta))
                };
                let mut low = pair(inner.f64_opt("beta_fast")?.unwrap_or(32.0));
                let mut high = pair(inner.f64_opt("beta_slow")?.unwrap_or(1.0));
                if inner.bool_or("truncate", true)? {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, high) = (low.max(0.0), high.min(rotary_dim as f64 - 1.0));
                let high = if low == high { high + 0.001 } else { high };
                Ok(RopeScaling::Yarn { factor, attention_factor, low, high })
            }
            other => Err(keys.error(
                &format!("{section}.rope_type"),
                format!("`{other}` is not supported; supported: default, linear, llama3, yarn"),
            )),
        }
    }

    /// The scaled frequency of a pair.
    fn apply(self, pair: usize, frequency: f32) -> f32 {
        let f = f64::from(frequency);
        match self {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor as f32,
            RopeScaling::Yarn { factor, low, high, .. } => {
                let ramp = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                (f / factor * ramp + f * (1.0 - ramp)) as f32
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
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
    }
}
