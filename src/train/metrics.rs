//! `metrics.jsonl`: a line per logged step and per evaluation.

use crate::error::{Error, Result};
use crate::fs::write_atomic_bytes;
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// One logged optimizer step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepMetrics {
    /// Optimizer steps done.
    pub step: usize,
    /// Epochs done.
    pub epoch: f64,
    /// Mean cross-entropy of the step's target tokens.
    pub loss: f64,
    /// Global L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// The rate that the step used.
    pub learning_rate: f64,
    /// Tokens read so far, all steps together.
    pub tokens: u64,
    /// Tokens per second since the last logged step.
    pub tokens_per_second: f64,
    /// The process's largest resident memory so far.
    pub peak_memory_bytes: u64,
}

/// One evaluation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EvalMetrics {
    /// Optimizer steps done.
    pub step: usize,
    /// Epochs done.
    pub epoch: f64,
    /// Mean cross-entropy of all target tokens.
    pub eval_loss: f64,
}

/// The open file.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens the file of a run that has done `step` steps: lines of later steps, which a killed run may have
    /// left, and broken lines are dropped.
    ///
    /// # Errors
    /// When it can't be read or written.
    pub fn open(path: &Path, step: usize) -> Result<Self> {
        let old = std::fs::read_to_string(path).unwrap_or_default();
        let kept: String = old
            .lines()
            .filter(|line| {
                let value: Option<Value> = serde_json::from_str(line).ok();
                value.and_then(|v| v["step"].as_u64()).is_some_and(|s| s as usize <= step && step > 0)
            })
            .flat_map(|line| [line, "\n"])
            .collect();
        write_atomic_bytes(path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(path).map_err(|e| Error::io(path, e))?;
        Ok(MetricsFile { path: path.to_path_buf(), file })
    }

    /// Appends a step.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn step(&mut self, m: &StepMetrics) -> Result<()> {
        self.line(&json!({
            "step": m.step,
            "epoch": m.epoch,
            "loss": m.loss,
            "grad_norm": m.grad_norm,
            "learning_rate": m.learning_rate,
            "tokens": m.tokens,
            "tokens_per_second": m.tokens_per_second,
            "peak_memory_bytes": m.peak_memory_bytes,
        }))
    }

    /// Appends an evaluation.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn evaluation(&mut self, m: &EvalMetrics) -> Result<()> {
        self.line(&json!({"step": m.step, "epoch": m.epoch, "eval_loss": m.eval_loss}))
    }

    fn line(&mut self, value: &Value) -> Result<()> {
        let line = format!("{value}\n");
        self.file.write_all(line.as_bytes()).map_err(|e| Error::io(&self.path, e))
    }
}

/// The process's largest resident memory so far in bytes, where the system tells it, else 0.
pub fn peak_memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kilobytes = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}
