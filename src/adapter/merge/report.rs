//! How far merging moves what a model says.

use crate::error::{Error, Result};
use crate::model::{Batch, Model};

/// Differences between the logits of two models.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Drift {
    /// Positions compared.
    pub tokens: usize,
    /// The largest absolute difference of two logits.
    pub largest: f64,
    /// The mean absolute difference.
    pub mean: f64,
    /// The share of positions whose likeliest token is the same.
    pub same_top_token: f64,
}

/// The first of the largest elements.
fn top(row: &[f32]) -> usize {
    let mut best = 0;
    for (i, x) in row.iter().enumerate() {
        if *x > row[best] {
            best = i;
        }
    }
    best
}

/// Compares two models of one vocabulary on some texts, one at a time.
///
/// # Errors
/// When the vocabularies differ, there is no token, or a pass fails.
pub fn compare(one: &Model, other: &Model, texts: &[Vec<u32>]) -> Result<Drift> {
    let cols = one.config.vocab_size;
    if cols != other.config.vocab_size {
        return Err(Error::shape(
            "compare",
            format!("vocabularies of {cols} and {} tokens", other.config.vocab_size),
        ));
    }
    let (mut drift, mut sum, mut same) = (Drift::default(), 0.0, 0usize);
    for ids in texts.iter().filter(|ids| !ids.is_empty()) {
        let mut batch = Batch::new();
        let labels: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
        batch.push(ids, &labels);
        let logits = |model: &Model| model.backend.to_vec::<f32>(&model.logits(&batch)?);
        let (a, b) = (logits(one)?, logits(other)?);
        for (a, b) in a.chunks(cols).zip(b.chunks(cols)) {
            for (x, y) in a.iter().zip(b) {
                let difference = f64::from((x - y).abs());
                // A NaN must not pass for agreement.
                if difference > drift.largest || difference.is_nan() {
                    drift.largest = difference;
                }
                sum += difference;
            }
            same += usize::from(top(a) == top(b));
            drift.tokens += 1;
        }
    }
    if drift.tokens == 0 {
        return Err(Error::shape("compare", "expected texts with tokens, found none"));
    }
    drift.mean = sum / (drift.tokens * cols) as f64;
    drift.same_top_token = same as f64 / drift.tokens as f64;
    Ok(drift)
}
