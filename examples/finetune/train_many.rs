//! `train-many`: several adapters at once over one base.

use crate::args::{Cli, Command, TrainArgs, TrainManyArgs};
use crate::commands::{load_model, open_backend};
use crate::config_file::{flags, read, words_without};
use crate::estimate::{Planned, fit_many};
use crate::progress::Progress;
use crate::train::{
    adapter_bytes, attach_method, load_data, load_eval_data, loader, packed_length, stop_on_ctrl_c,
    training_arguments,
};
use clap::Parser;
use indicatif::MultiProgress;
use lowrank::arena::release_free_memory;
use lowrank::data::{Example, Tokenizer};
use lowrank::model::{Model, ModelConfig};
use lowrank::train::metrics::peak_memory_bytes;
use lowrank::train::{Event, ManyTrainer, Report, latest_checkpoint};
use lowrank::{Error, Result};
use serde_json::{Map, Value, json};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Keys that are not a job's own.
const SHARED: [&str; 16] = [
    "model",
    "device",
    "dtype",
    "quant",
    "double_quant",
    "blocksize",
    "quant_head",
    "load_format",
    "threads",
    "gradient_checkpointing",
    "memory_limit",
    "preview",
    "json",
    "resume",
    "config",
    "jobs",
];

/// A job of the file.
struct Job {
    name: String,
    args: TrainArgs,
    output: PathBuf,
}

/// A job with what it is trained on.
struct Prepared {
    job: Job,
    examples: Vec<Example>,
    eval_examples: Vec<Example>,
    packed: Option<usize>,
}

impl Prepared {
    /// Tokens of the longest sequence.
    fn longest(&self) -> usize {
        let lengths = self.examples.iter().chain(&self.eval_examples).map(|e| e.input_ids.len());
        self.packed.unwrap_or(lengths.max().unwrap_or(1))
    }
}

/// `words`: the command line as it was given, without the file's keys.
pub fn run(args: &TrainManyArgs, words: &[OsString]) -> Result<()> {
    let common = &args.train;
    if common.preview.is_some() {
        let message = "is not there for several jobs at once; use `finetune train`";
        return Err(Error::config("train-many", "--preview", message));
    }
    if common.config.is_some() {
        return Err(Error::config(
            "train-many",
            "--config",
            "put the keys into the jobs' file, above its tables",
        ));
    }
    if common.resume.as_ref().is_some_and(|resume| resume != "latest") {
        return Err(Error::config(
            "train-many",
            "--resume",
            "expected `latest`: every job goes on from its own",
        ));
    }
    open_backend(&common.model)?;
    let jobs = read_jobs(args, words)?;
    let tokenizer = Tokenizer::load(&common.model.model)?;
    let config = ModelConfig::load(&common.model.model)?;
    let mut prepared = Vec::with_capacity(jobs.len());
    for job in jobs {
        prepared.push(prepare(job, &tokenizer, &config)?);
    }
    drop(tokenizer);
    let mut planned: Vec<Planned<'_>> = Vec::with_capacity(prepared.len());
    for one in &mut prepared {
        let (longest, has_eval) = (one.longest(), !one.eval_examples.is_empty());
        planned.push((&one.job.name, &mut one.job.args, longest, has_eval));
    }
    fit_many(common, &mut planned)?;
    release_free_memory();
    let mut model = load_model(&common.model)?;
    model.gradient_checkpointing = match common.memory_limit {
        None => common.gradient_checkpointing,
        Some(_) => prepared[0].job.args.gradient_checkpointing,
    };
    train(args, &mut model, prepared)
}

/// The file's jobs, as if each were a command line of `train`.
fn read_jobs(args: &TrainManyArgs, words: &[OsString]) -> Result<Vec<Job>> {
    let path = &args.jobs;
    let (mut shared, mut tables) = (Map::new(), Vec::new());
    for (key, value) in read(path)? {
        match value {
            Value::Object(table) => tables.push((key, table)),
            value => {
                shared.insert(key, value);
            }
        }
    }
    if tables.is_empty() {
        return Err(Error::format(
            path,
            "expected a table for each job, such as [poems] with data = \"poems.jsonl\"",
        ));
    }
    let shared = flags(path, shared, "train")?;
    let given = words_without(words, &["--jobs", "--output", "--config"]);
    tables.into_iter().map(|(name, table)| read_job(args, name, table, &shared, &given)).collect()
}

fn read_job(
    args: &TrainManyArgs,
    name: String,
    table: Map<String, Value>,
    shared: &[String],
    given: &[OsString],
) -> Result<Job> {
    let path = &args.jobs;
    let fail =
        |key: &str, message: String| Err(Error::config(path.display(), format!("{name}.{key}"), message));
    if let Some(key) = table.keys().find(|key| SHARED.contains(&key.replace('-', "_").as_str())) {
        return fail(key, "is the same for all jobs: give it as a flag or above the tables".into());
    }
    let output = match (table.get("output").and_then(Value::as_str), &args.train.output) {
        (Some(own), _) => PathBuf::from(own),
        (None, Some(folder)) => folder.join(&name),
        (None, None) => return fail("output", "expected a folder here or --output, found none".into()),
    };
    let mut words: Vec<OsString> = vec!["finetune".into(), "train".into()];
    words.extend(shared.iter().map(OsString::from));
    words.extend(flags(path, table, "train")?.into_iter().map(OsString::from));
    words.extend(given.iter().cloned());
    if !words.iter().any(|word| word.to_string_lossy().starts_with("--data")) {
        return fail("data", "expected a file here or above the tables, found none".into());
    }
    words.extend(["--output".into(), output.clone().into_os_string()]);
    let train = match Cli::try_parse_from(words).map(|cli| cli.command) {
        Ok(Some(Command::Train(train))) => *train,
        Ok(_) => return fail("data", "expected flags of `train`".into()),
        Err(error) => {
            let text = error.to_string();
            let text = text.lines().map(str::trim).filter(|line| !line.is_empty());
            let words: Vec<&str> = text.take_while(|line| !line.starts_with("Usage")).collect();
            return fail("flags", words.join(" ").trim_start_matches("error: ").to_string());
        }
    };
    Ok(Job { name, args: train, output })
}

fn prepare(job: Job, tokenizer: &Tokenizer, config: &ModelConfig) -> Result<Prepared> {
    let args = &job.args;
    let Some(data) = &args.data else {
        return Err(Error::config(&job.name, "data", "expected a file, found none"));
    };
    let data = load_data(data, &args.model, &args.text, tokenizer, config)?;
    eprintln!("{}: {}", job.name, data.report);
    let eval_examples = load_eval_data(args, tokenizer, config)?;
    let packed = packed_length(args, config);
    Ok(Prepared { job, examples: data.examples, eval_examples, packed })
}

fn train(args: &TrainManyArgs, model: &mut Model, prepared: Vec<Prepared>) -> Result<()> {
    let base = model.base_elements();
    let mut jobs = Vec::with_capacity(prepared.len());
    let mut trainer = ManyTrainer::new(model);
    for Prepared { job, examples, eval_examples, packed } in prepared {
        let arguments = training_arguments(&job.args, !eval_examples.is_empty())?;
        let loader = loader(&job.args, examples, packed)?;
        let attach = |model: &mut Model| attach_method(&job.args, model);
        trainer.add(&job.name, arguments, loader, eval_examples, &job.output, attach)?;
        if args.train.resume.is_some() {
            match latest_checkpoint(&job.output) {
                Some(checkpoint) => {
                    trainer.resume(&job.name, &checkpoint)?;
                    eprintln!("{}: resuming from {}", job.name, checkpoint.display());
                }
                None => eprintln!("{}: no checkpoint in {}, begins anew", job.name, job.output.display()),
            }
        }
        jobs.push(job);
    }
    let trained = trainer.trainable_elements();
    eprintln!("model: {base} parameters; {} adapters with {trained} trained ones", jobs.len());
    let stop = stop_on_ctrl_c()?;
    let bars = MultiProgress::new();
    let steps = trainer.steps();
    let mut progress: Vec<Progress> = jobs
        .iter()
        .zip(steps)
        .map(|(job, (done, total))| Progress::of_job(&job.name, total, done, &bars))
        .collect();
    let started = (Instant::now(), trainer.tokens());
    let reports = trainer.run(&stop, &mut |number, event: &Event| progress[number].show(event))?;
    progress.iter().for_each(Progress::finish);
    let (seconds, tokens) = (started.0.elapsed().as_secs_f64(), trainer.tokens() - started.1);
    if args.train.json {
        println!("{}", summary(&jobs, &reports, trained, tokens, seconds));
    }
    tell(&jobs, &reports, &args.train.model.model)
}

/// What `--json` prints.
fn summary(jobs: &[Job], reports: &[Result<Report>], trained: usize, tokens: u64, seconds: f64) -> Value {
    let one = |(job, report): (&Job, &Result<Report>)| match report {
        Ok(report) => json!({
            "name": job.name, "output": job.output, "steps": report.steps, "loss": report.loss,
            "eval_loss": report.eval_loss, "adapter_bytes": adapter_bytes(&job.output),
        }),
        Err(error) => json!({"name": job.name, "output": job.output, "error": error.to_string()}),
    };
    json!({
        "jobs": jobs.iter().zip(reports).map(one).collect::<Vec<_>>(),
        "trainable_parameters": trained, "peak_memory_bytes": peak_memory_bytes(), "tokens": tokens, "seconds": seconds,
    })
}

/// A line for each job; those that failed make the run fail.
fn tell(jobs: &[Job], reports: &[Result<Report>], model: &Path) -> Result<()> {
    let mut failures = Vec::new();
    let mut folders = Vec::new();
    for (job, report) in jobs.iter().zip(reports) {
        match report {
            Ok(report) => {
                eprintln!(
                    "{}: done, {} steps, last loss {:.4}; the adapter is in {}",
                    job.name,
                    report.steps,
                    report.loss,
                    job.output.display()
                );
                folders.push(job.output.display().to_string());
            }
            Err(error) => failures.push(format!("{}: {error}", job.name)),
        }
    }
    if !folders.is_empty() {
        eprintln!(
            "try them: finetune generate --model {} --adapters {} --prompts FILE",
            model.display(),
            folders.join(",")
        );
    }
    match failures.is_empty() {
        true => Ok(()),
        false => Err(Error::Unsupported(format!(
            "{} of {} jobs failed: {}",
            failures.len(),
            jobs.len(),
            failures.join("; ")
        ))),
    }
}
