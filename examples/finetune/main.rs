//! Fine-tunes, evaluates and merges Hugging Face models from the command line.
//!
//! What a person reads goes to stderr, what a program reads to stdout. Exit status: 0 done, 1 an error,
//! 2 bad usage, 130 stopped by Ctrl-C after a checkpoint was saved.

mod args;
mod commands;
mod compare;
mod compare_plot;
mod config_file;
mod demo;
mod estimate;
mod generate;
mod generate_rows;
mod method_args;
mod progress;
mod train;
mod train_many;

use clap::Parser;
use lowrank::{Error, Result};
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(Error::Interrupted(message)) => {
            eprintln!("stopped: {message}");
            ExitCode::from(130)
        }
        Err(error) => {
            // One line, also where a library's message has several.
            let text = error.to_string();
            eprintln!("error: {}", text.split_whitespace().collect::<Vec<_>>().join(" "));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let given: Vec<_> = std::env::args_os().collect();
    let words = config_file::expand(given.clone())?;
    let cli = args::Cli::parse_from(&words);
    match cli.command {
        None => demo::run(),
        Some(args::Command::Train(args)) => train::run(args),
        Some(args::Command::TrainMany(args)) => train_many::run(&args, &given),
        Some(args::Command::Estimate(args)) => estimate::run(&args),
        Some(args::Command::Compare(args)) => compare::run(&args, &words),
        Some(args::Command::Eval(args)) => commands::eval(&args),
        Some(args::Command::Generate(args)) => generate::run(&args),
        Some(args::Command::Combine(args)) => commands::combine(&args),
        Some(args::Command::Merge(args)) => commands::merge(&args),
        Some(args::Command::Quantize(args)) => commands::quantize(&args),
        Some(args::Command::Inspect(args)) => commands::inspect(&args),
    }
}
