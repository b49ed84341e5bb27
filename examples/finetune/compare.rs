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
    /// Short runs at several rates, if there were any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trials: Vec<Trial>,
    /// Mean of the last steps' losses.
    pub loss: f64,
    #[serde(flatten)]
    pub summary: Summary,
    /// Steps and losses.
    #[serde(skip)]
    pub curve: Vec<(f64, f64)>,
}

/// A short run at one rate.
#[derive(Clone, Debug, Serialize)]
pub struct Trial {
    pub learning_rate: f64,
    /// `None`: it failed.
    pub eval_loss: Option<f64>,
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
    if !args.learning_rates.is_empty() && args.train.eval_data.is_none() {
        return Err(Error::config(
            "compare",
            "--learning-rates",
            "needs --eval-data, by which the best is chosen",
        ));
    }
    for name in &names {
        rates(name, args)?;
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
        for row in rows.iter().filter(|row| !row.trials.is_empty()) {
            println!("{}: {}", row.name, told(&row.trials, trial_steps(args)));
        }
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

/// Flags that rows don't get as they are.
const OWN_FLAGS: [&str; 7] =
    ["--methods", "--set", "--learning-rates", "--trial-steps", "--output", "--config", "--method"];

/// The command line's words that every row gets.
fn common_words(words: &[OsString]) -> Vec<OsString> {
    let mut common = words_without(words, &OWN_FLAGS);
    common.retain(|word| word.to_string_lossy() != "--json");
    common
}

/// A row's own flags of `--set`.
fn own_flags<'a>(name: &'a str, args: &'a CompareArgs) -> impl Iterator<Item = (&'a str, &'a str)> {
    let own =
        args.set.iter().filter_map(|set| set.split_once(':')).filter(move |(method, _)| *method == name);
    own.map(|(_, setting)| setting.split_once('=').unwrap_or((setting, "")))
}

/// The rates to try for a row: those that are asked for, unless it has one of its own.
fn rates(name: &str, args: &CompareArgs) -> Result<Vec<f64>> {
    let usual = preset(name)?.1;
    let read = |flag: &str, text: &str| {
        text.trim().parse::<f64>().ok().filter(|rate| rate.is_finite() && *rate >= 0.0).ok_or_else(|| {
            Error::config("compare", flag, format!("expected a learning rate of at least 0, found `{text}`"))
        })
    };
    if let Some((_, own)) = own_flags(name, args).filter(|(flag, _)| *flag == "learning-rate").last() {
        return Ok(vec![read("--set", own)?]);
    }
    match args.learning_rates.as_slice() {
        [] => Ok(vec![usual]),
        [auto] if auto == "auto" => Ok([1.0 / 3.0, 1.0, 3.0].map(|factor| factor * usual).to_vec()),
        rates => rates.iter().map(|rate| read("--learning-rates", rate)).collect(),
    }
}

fn run_row(name: &str, args: &CompareArgs, common: &[OsString], output: &Path) -> Result<Row> {
    let given = common.iter().any(|w| w.to_string_lossy().starts_with("--learning-rate"));
    let own = own_flags(name, args).any(|(flag, _)| flag == "learning-rate");
    let rates = rates(name, args)?;
    let mut learning_rate = if given && !own { args.train.learning_rate } else { rates[0] };
    let mut trials = Vec::new();
    if rates.len() > 1 {
        (learning_rate, trials) = best_rate(name, args, common, output, &rates)?;
    }
    let summary = train(name, args, common, output, learning_rate, &[])?;
    let curve = curve(&output.join("metrics.jsonl"))?;
    let last = &curve[curve.len().saturating_sub(LAST_STEPS)..];
    let loss = last.iter().map(|(_, loss)| loss).sum::<f64>() / last.len().max(1) as f64;
    eprintln!("loss {loss:.4}, {:.0} s", summary.seconds);
    Ok(Row { name: name.to_string(), learning_rate, trials, loss, summary, curve })
}

/// Steps of a short run: no more than of the whole one.
fn trial_steps(args: &CompareArgs) -> usize {
    args.train.max_steps.map_or(args.trial_steps, |all| args.trial_steps.min(all)).max(1)
}

/// The rate whose short run ends with the least held-out loss, and all of them.
fn best_rate(
    name: &str,
    args: &CompareArgs,
    common: &[OsString],
    output: &Path,
    rates: &[f64],
) -> Result<(f64, Vec<Trial>)> {
    let steps = trial_steps(args);
    let short = [format!("--max-steps={steps}"), "--eval-strategy=epoch".into(), "--save-strategy=no".into()];
    let common: Vec<OsString> =
        common.iter().filter(|word| *word != "--load-best-model-at-end").cloned().collect();
    let (mut trials, mut failure) = (Vec::new(), None);
    for rate in rates {
        let folder = output.join("trial");
        let done = train(name, args, &common, &folder, *rate, &short);
        match std::fs::remove_dir_all(&folder) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&folder, e)),
            _ => {}
        }
        let eval_loss = done.map_err(|e| failure = Some(e)).ok().and_then(|summary| summary.eval_loss);
        trials.push(Trial { learning_rate: *rate, eval_loss });
    }
    eprintln!("{}", told(&trials, steps));
    let known = trials.iter().filter_map(|trial| Some((trial.learning_rate, trial.eval_loss?)));
    match (known.min_by(|a, b| a.1.total_cmp(&b.1)), failure) {
        (Some((rate, _)), _) => Ok((rate, trials)),
        (None, Some(failure)) => Err(failure),
        (None, None) => Err(Error::Unsupported("no short run gave a held-out loss".into())),
    }
}

/// Held-out losses by rate, for people.
fn told(trials: &[Trial], steps: usize) -> String {
    let one = |trial: &Trial| match trial.eval_loss {
        Some(loss) => format!("{loss:.4} at {}", rate_text(trial.learning_rate)),
        None => format!("failed at {}", rate_text(trial.learning_rate)),
    };
    format!("held out after {steps} steps: {}", trials.iter().map(one).collect::<Vec<_>>().join(", "))
}

/// A rate in three digits, as `6.67e-5`.
fn rate_text(rate: f64) -> String {
    let text = format!("{rate:.2e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    format!("{}e{exponent}", digits.trim_end_matches('0').trim_end_matches('.'))
}

/// Trains a row in a process of its own; what `train --json` says.
fn train(
    name: &str,
    args: &CompareArgs,
    common: &[OsString],
    output: &Path,
    learning_rate: f64,
    more: &[String],
) -> Result<Summary> {
    let exe = std::env::current_exe().map_err(|e| Error::io("the running program", e))?;
    let mut command = Command::new(exe);
    // Flags that come later win.
    command.arg("train").args(preset(name)?.0).args(common);
    for (flag, value) in own_flags(name, args) {
        command.arg(format!("--{flag}={value}"));
    }
    command.arg(format!("--learning-rate={learning_rate}")).args(more);
    command.arg("--output").arg(output).arg("--json").stdout(Stdio::piped());
    let done = command.stderr(Stdio::piped()).output().map_err(|e| Error::io(output, e))?;
    let log = String::from_utf8_lossy(&done.stderr);
    if !done.status.success() {
        let last = log.lines().rev().find(|line| line.contains("error:")).or(log.lines().last());
        let last = last.unwrap_or("no message").trim_start_matches("error: ");
        return Err(Error::Unsupported(format!("{} ({})", last, done.status)));
    }
    serde_json::from_slice(&done.stdout)
        .map_err(|e| Error::format(output, format!("train printed no summary: {e}")))
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
            rate_text(*learning_rate),
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
