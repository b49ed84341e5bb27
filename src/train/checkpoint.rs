//! Checkpoints: everything that a run needs to go on with the same bits.
//!
//! A folder `checkpoint-N` holds the adapter (or the whole model) as it would be saved at the end, in f32;
//! `optimizer.safetensors` with the optimizer's state of every parameter; and `trainer_state.json` with the place in
//! the data, the settings and the history. It is built under another name and renamed when whole.

use crate::adapter::io::CONFIG_FILE;
use crate::adapter::reader::to_json;
use crate::adapter::{Method, read_adapter};
use crate::data::loader::LoaderState;
use crate::error::{Error, Result};
use crate::fs::{read_text, sync_folder, temporary_sibling, write_atomic_bytes};
use crate::model::save::write_streamed;
use crate::model::{Checkpoint, Model};
use crate::optim::Optimizer;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

const STATE_FILE: &str = "trainer_state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";

/// The best evaluation so far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Its loss.
    pub eval_loss: f64,
    /// When it was.
    pub step: usize,
    /// Evaluations since then.
    pub evaluations_since: usize,
}

/// Where a run stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Optimizer steps done.
    pub global_step: usize,
    /// Tokens read.
    pub tokens: u64,
    /// The place in the data.
    pub loader: LoaderState,
    /// The settings that the numbers follow from.
    pub settings: Value,
    /// The best evaluation so far.
    pub best: Option<Best>,
}

/// The folder of the checkpoint after `step` steps.
pub fn checkpoint_dir(output: &Path, step: usize) -> PathBuf {
    output.join(format!("checkpoint-{step}"))
}

/// The checkpoints of a run, oldest first.
pub fn checkpoints(output: &Path) -> Vec<(usize, PathBuf)> {
    let mut found: Vec<(usize, PathBuf)> = fs::read_dir(output)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let step = entry.file_name().to_str()?.strip_prefix("checkpoint-")?.parse().ok()?;
            entry.path().join(STATE_FILE).is_file().then(|| (step, entry.path()))
        })
        .collect();
    found.sort();
    found
}

/// The newest checkpoint of a run.
pub fn latest_checkpoint(output: &Path) -> Option<PathBuf> {
    checkpoints(output).pop().map(|(_, path)| path)
}

/// Writes a checkpoint; returns its folder.
///
/// # Errors
/// When a file can't be written; nothing is left behind then.
pub fn save(
    output: &Path,
    model: &Model,
    method: &dyn Method,
    optimizer: &Optimizer,
    state: &TrainerState,
) -> Result<PathBuf> {
    let dir = checkpoint_dir(output, state.global_step);
    let temporary = temporary_sibling(&dir)?;
    let written = (|| {
        fs::create_dir_all(&temporary).map_err(|e| Error::io(&temporary, e))?;
        method.save(model, &temporary)?;
        method.save_state(model, &temporary)?;
        write_streamed(&temporary.join(OPTIMIZER_FILE), optimizer.tensors(&model.backend, &model.params)?)?;
        let text = serde_json::to_string_pretty(state).map_err(|e| Error::format(&dir, e.to_string()))?;
        write_atomic_bytes(&temporary.join(STATE_FILE), text.as_bytes())?;
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
        }
        fs::rename(&temporary, &dir).map_err(|e| Error::io(&dir, e))
    })();
    if written.is_err() {
        let _ = fs::remove_dir_all(&temporary);
    }
    written?;
    sync_folder(&dir);
    Ok(dir)
}

/// Reads a checkpoint into the model's parameters and the optimizer; returns where the run stood.
///
/// # Errors
/// When a file is missing or malformed, or belongs to another model or method.
pub fn load(
    dir: &Path,
    model: &mut Model,
    method: &mut dyn Method,
    optimizer: &mut Optimizer,
) -> Result<TrainerState> {
    let path = dir.join(STATE_FILE);
    if !path.is_file() {
        return Err(Error::format(dir, format!("expected a checkpoint with {STATE_FILE}, found none")));
    }
    let state: TrainerState = serde_json::from_str(&read_text(&path)?)
        .map_err(|e| Error::format(&path, format!("not a trainer's state: {e}")))?;
    let settings = method.fixed_settings();
    if !settings.is_empty() && to_json(&read_adapter(dir)?.fixed_settings()) != to_json(&settings) {
        return Err(Error::format(
            dir.join(CONFIG_FILE),
            "the checkpoint's adapter has other settings than this run; resume with the same, or start anew \
             from its weights with --init-adapter",
        ));
    }
    method.load_state(model, dir)?;
    let file = Checkpoint::open_file(&dir.join(OPTIMIZER_FILE))?;
    optimizer.load(&model.backend, &model.params, &file, state.global_step as u64)?;
    Ok(state)
}

/// Deletes the oldest checkpoints beyond `limit`, sparing the best one.
///
/// # Errors
/// When one can't be deleted.
pub fn prune(output: &Path, limit: Option<usize>, best: Option<usize>) -> Result<()> {
    let Some(limit) = limit else { return Ok(()) };
    let found = checkpoints(output);
    let excess = found.len().saturating_sub(limit.max(1));
    for (_, path) in found.into_iter().filter(|(step, _)| Some(*step) != best).take(excess) {
        fs::remove_dir_all(&path).map_err(|e| Error::io(&path, e))?;
    }
    Ok(())
}
