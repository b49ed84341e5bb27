//! `compare`: trains several methods on the same data, each in a process of its own, so that one row's memory or
//! failure does not touch another's; one table, and pictures.

use crate::args::CompareArgs;
use crate::compare_plot::plot;
use crate::config_file::words_without;
use bytesize::ByteSize;
use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, Table};
use lowrank::{Error, Result, fs::read_text};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};

/// Rows by name: flags besides the common ones, and the learning rate if none is given.
const PRESETS: [(&str, &[&str], f64); 19] = [
    ("lora", &["--method", "lora"], 2e-4),
    ("qlora", &["--method", "lora", "--quant", "nf4"], 2e-4),
    ("dora", &["--method", "lora", "--use-dora"], 2e-4),
    ("rslora", &["--method", "lora", "--use-rslora"], 2e-4),
    ("adalora", &["--method", "adalora"], 2e-3),
    ("oft", &["--method", "oft"], 1e-3),
    ("adapter", &["--method", "adapter"], 1e-3),
    ("houlsby", &["--method", "adapter", "--adapter-config", "houlsby"], 1e-3),
    ("parallel", &["--method", "adapter", "--adapter-config", "parallel"], 1e-3),
    ("prefix", &["--method", "prefix"], 1e-2),
    ("prefix_projection", &["--method", "prefix", "--prefix-projection"], 1e-3),
    ("prompt", &["--method", "prompt"], 3e-2),
    ("ptuning", &["--method", "ptuning"], 1e-3),
    ("ptuning_lstm", &["--method", "ptuning", "--encoder-reparameterization-type", "LSTM"], 1e-3),
    ("ia3", &["--method", "ia3"], 5e-3),
    ("vera", &["--method", "vera"], 4e-3),
    ("ln_tuning", &["--method", "ln_tuning"], 1e-3),
    ("bitfit", &["--method", "bitfit"], 1e-3),
    ("full", &["--method", "full"], 2e-5),
];

/// What `train --json` prints at its end.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Summary {
    pub trainable_parameters: usize,
    pub parameters: usize,
    pub adapter_bytes: u64,
    pub peak_memory_bytes: u64,
    pub tokens: u64,
    pub seconds: f64,
    pub steps: usize,
    pub eval_loss: Option<f64>,
}

/// A finished row.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub name: String,
    pub learning_rate: f64,
    /// Mean of the last steps' losses.
    pub loss: f64,
    #[serde(flatten)]
    pub summary: Summary,
    /// Steps and losses.
    #[serde(skip)]
    pub curve: Vec<(f64, f64)>,
}

/// Steps whose losses are averaged.
const LAST_STEPS: usize = 10;

pub fn run(args: &CompareArgs, words: &[OsString]) -> Result<()> {
    let output = args
        .train
        .output
        .clone()
        .ok_or_else(|| Error::config("compare", "--output", "expected a folder, found none"))?;
    let names: Vec<&str> = args.methods.iter().map(|name| name.trim()).collect();
    for name in &names {
        preset(name)?;
    }
    for set in &args.set {
        let method = set.split_once(':').map(|(method, _)| method);
        if !method.is_some_and(|m| names.contains(&m)) || !set.contains('=') {
            return Err(Error::config(
                "compare",
                "--set",
                format!("expected METHOD:FLAG=VALUE, found `{set}`"),
            ));
        }
    }
    let common = common_words(words);
    std::fs::create_dir_all(&output).map_err(|e| Error::io(&output, e))?;
    let (mut rows, mut failures) = (Vec::new(), Vec::new());
    for name in names {
        eprintln!("== {name}");
        match run_row(name, args, &common, &output.join(name)) {
            Ok(row) => rows.push(row),
            Err(error) => {
                eprintln!("{name} failed: {error}");
                failures.push((name.to_string(), error.to_string()));
            }
        }
    }
    let report = json!({
        "rows": rows,
        "failures": failures.iter().map(|(n, e)| json!({"name": n, "error": e})).collect::<Vec<_>>(),
    });
    let text = serde_json::to_string_pretty(&report).unwrap_or_default();
    lowrank::fs::write_atomic_bytes(&output.join("compare.json"), text.as_bytes())?;
    if !rows.is_empty() {
        plot(&rows, &output)?;
    }
    if args.train.json {
        println!("{report}");
    } else {
        println!("{}", table(&rows));
        for (name, error) in &failures {
            println!("{name}: {error}");
        }
    }
    eprintln!("the adapters, compare.json, losses.svg and methods.svg are in {}", output.display());
    match rows.is_empty() {
        true => Err(Error::Unsupported("no row could be trained".into())),
        false => Ok(()),
    }
}

fn preset(name: &str) -> Result<(&'static [&'static str], f64)> {
    let found = PRESETS.iter().find(|(known, ..)| *known == name);
    found.map(|(_, flags, rate)| (*flags, *rate)).ok_or_else(|| {
        let known: Vec<&str> = PRESETS.iter().map(|(known, ..)| *known).collect();
        Error::config("compare", "--methods", format!("`{name}` is not known; expected {}", known.join(", ")))
    })
}

/// The command line's words that every row gets.
fn common_words(words: &[OsString]) -> Vec<OsString> {
    let mut common = words_without(words, &["--methods", "--set", "--output", "--config", "--method"]);
    common.retain(|word| word.to_string_lossy() != "--json");
    common
}

fn run_row(name: &str, args: &CompareArgs, common: &[OsString], output: &Path) -> Result<Row> {
    let (flags, rate) = preset(name)?;
    let exe = std::env::current_exe().map_err(|e| Error::io("the running program", e))?;
    let mut command = Command::new(exe);
    // Flags that come later win.
    let given = common.iter().any(|w| w.to_string_lossy().starts_with("--learning-rate"));
    let mut learning_rate = if given { args.train.learning_rate } else { rate };
    command.arg("train").args(flags).args(["--learning-rate", &rate.to_string()]).args(common);
    for (_, setting) in
        args.set.iter().filter_map(|s| s.split_once(':')).filter(|(method, _)| *method == name)
    {
        let (flag, value) = setting.split_once('=').unwrap_or((setting, ""));
        if flag == "learning-rate" {
            learning_rate = value.parse().unwrap_or(f64::NAN);
        }
        command.arg(format!("--{flag}={value}"));
    }
    command.arg("--output").arg(output).arg("--json").stdout(Stdio::piped());
    let done = command.stderr(Stdio::piped()).output().map_err(|e| Error::io(output, e))?;
    let log = String::from_utf8_lossy(&done.stderr);
    if !done.status.success() {
        let last = log.lines().rev().find(|line| line.contains("error:")).or(log.lines().last());
        let last = last.unwrap_or("no message").trim_start_matches("error: ");
        return Err(Error::Unsupported(format!("{} ({})", last, done.status)));
    }
    let summary: Summary = serde_json::from_slice(&done.stdout)
        .map_err(|e| Error::format(output, format!("train printed no summary: {e}")))?;
    let curve = curve(&output.join("metrics.jsonl"))?;
    let last = &curve[curve.len().saturating_sub(LAST_STEPS)..];
    let loss = last.iter().map(|(_, loss)| loss).sum::<f64>() / last.len().max(1) as f64;
    eprintln!("loss {loss:.4}, {:.0} s", summary.seconds);
    Ok(Row { name: name.to_string(), learning_rate, loss, summary, curve })
}

/// Steps and losses of a metrics file.
fn curve(path: &Path) -> Result<Vec<(f64, f64)>> {
    let text = read_text(path)?;
    let point = |line: &str| {
        let value: Value = serde_json::from_str(line).ok()?;
        Some((value.get("step")?.as_f64()?, value.get("loss")?.as_f64()?))
    };
    Ok(text.lines().filter_map(point).collect())
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN).set_header([
        "method",
        "trained",
        "share",
        "on disk",
        "peak memory",
        "tokens/s",
        "rate",
        "loss",
        "held out",
        "time",
    ]);
    let bytes = |n: u64| ByteSize::b(n).display().si().to_string();
    for Row { name, learning_rate, loss, summary: s, .. } in rows {
        table.add_row([
            name.clone(),
            s.trainable_parameters.to_string(),
            format!("{:.3}%", 100.0 * s.trainable_parameters as f64 / s.parameters.max(1) as f64),
            bytes(s.adapter_bytes),
            bytes(s.peak_memory_bytes),
            format!("{:.0}", s.tokens as f64 / s.seconds.max(1e-9)),
            format!("{learning_rate:e}"),
            format!("{loss:.4}"),
            s.eval_loss.map_or("-".to_string(), |loss| format!("{loss:.4}")),
            format!("{:.0} s", s.seconds),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Every method has a row.
#[test]
fn every_method_has_a_preset() {
    for row in lowrank::adapter::METHODS {
        assert!(PRESETS.iter().any(|(_, flags, _)| flags[1] == row.name), "{} has no preset", row.name);
    }
}
