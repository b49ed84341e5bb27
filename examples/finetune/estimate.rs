//! `estimate`, and `--memory-limit` of `train` and `train-many`.

use crate::args::{EstimateArgs, LoadFormat, TrainArgs};
use crate::commands::{open_backend, quant_config};
use crate::train::{attach_method, optimizer_arguments};
use bytesize::ByteSize;
use lowrank::model::{LoadOptions, Model, ModelConfig};
use lowrank::train::{ManyPlanner, MemoryPlan, PlanArguments, Planner};
use lowrank::{Error, Result};

/// Sequences are taken to be this long if nothing says how long they are.
const LENGTH: usize = 2048;

pub fn run(args: &EstimateArgs) -> Result<()> {
    let train = &args.train;
    let config = ModelConfig::load(&train.model.model)?;
    let length = train.text.max_length.unwrap_or(LENGTH).min(config.max_sequence());
    let (chosen, plan) = plan(train, length, train.eval_data.is_some())?;
    if train.json {
        println!("{}", plan.to_json());
        return Ok(());
    }
    println!("{}", describe(&chosen));
    for (name, bytes) in plan.parts() {
        println!("{name:12} {:>10}", size(bytes));
    }
    println!("{:12} {:>10}", "peak", size(plan.total()));
    if plan.paged > 0 {
        println!(
            "{:12} {:>10}  optimizer state in a file (of a GPU: in host memory)",
            "paged",
            size(plan.paged)
        );
    }
    Ok(())
}

/// Changes the flags of a run, whose longest sequence has `length` tokens, so that it fits its memory limit.
pub fn fit(args: &mut TrainArgs, length: usize, has_eval: bool) -> Result<()> {
    if args.memory_limit.is_none() {
        return Ok(());
    }
    let (chosen, plan) = plan(args, length, has_eval)?;
    eprintln!("memory: {} planned, with {}", size(plan.total()), describe(&chosen));
    change(args, &chosen);
    Ok(())
}

/// A run's flags are those that were chosen.
fn change(args: &mut TrainArgs, chosen: &PlanArguments) {
    args.gradient_accumulation_steps *= args.per_device_train_batch_size / chosen.rows;
    args.per_device_train_batch_size = chosen.rows;
    args.gradient_checkpointing = chosen.gradient_checkpointing;
    args.optimizer_memory = chosen.optimizer.optimizer_memory.map(|bytes| ByteSize::b(bytes as u64));
}

/// Several jobs by name, each with the tokens of its longest sequence and whether it evaluates.
pub type Planned<'a> = (&'a str, &'a mut TrainArgs, usize, bool);

/// [`fit`] for jobs that share the model of `common`, whose limit it is.
pub fn fit_many(common: &TrainArgs, jobs: &mut [Planned<'_>]) -> Result<()> {
    let Some(limit) = common.memory_limit else { return Ok(()) };
    let dummy = common.model.load_format == LoadFormat::Dummy;
    let backend = open_backend(&common.model)?;
    let mut planner = ManyPlanner::new(&common.model.model, &backend, options(common)?, dummy)?;
    let mut wanted = Vec::with_capacity(jobs.len());
    for (name, args, length, has_eval) in jobs.iter() {
        planner.add(name, |model| attach_method(args, model))?;
        let gradient_checkpointing = common.gradient_checkpointing;
        wanted.push(PlanArguments { gradient_checkpointing, ..plan_arguments(args, *length, *has_eval)? });
    }
    let (chosen, plan) = planner.fit(&wanted, limit.as_u64() as usize)?;
    eprintln!("memory: {} planned", size(plan.total()));
    for ((name, args, ..), chosen) in jobs.iter_mut().zip(&chosen) {
        eprintln!("{name}: {}", describe(chosen));
        change(args, chosen);
    }
    Ok(())
}

fn options(args: &TrainArgs) -> Result<LoadOptions> {
    Ok(LoadOptions { dtype: args.model.dtype.into(), quant: quant_config(&args.model)? })
}

fn plan_arguments(args: &TrainArgs, length: usize, has_eval: bool) -> Result<PlanArguments> {
    let rows = args.per_device_train_batch_size;
    if rows == 0 || length == 0 {
        return Err(Error::config(
            "command line",
            "per_device_train_batch_size",
            "expected at least one sequence",
        ));
    }
    Ok(PlanArguments {
        rows,
        length,
        gradient_checkpointing: args.gradient_checkpointing,
        optimizer: optimizer_arguments(args)?,
        eval_rows: has_eval.then_some(args.per_device_eval_batch_size),
    })
}

fn plan(args: &TrainArgs, length: usize, has_eval: bool) -> Result<(PlanArguments, MemoryPlan)> {
    let dummy = args.model.load_format == LoadFormat::Dummy;
    let wanted = plan_arguments(args, length, has_eval)?;
    let backend = open_backend(&args.model)?;
    let attach = |model: &mut Model| attach_method(args, model);
    let mut planner = Planner::new(&args.model.model, &backend, options(args)?, dummy, attach)?;
    match args.memory_limit {
        None => planner.plan(&wanted).map(|plan| (wanted, plan)),
        Some(limit) => planner.fit(&wanted, limit.as_u64() as usize),
    }
}

fn describe(chosen: &PlanArguments) -> String {
    let checkpointing = match chosen.gradient_checkpointing {
        0 => "no gradient checkpointing".to_string(),
        n => format!("--gradient-checkpointing={n}"),
    };
    let optimizer = match chosen.optimizer.optimizer_memory {
        None => chosen.optimizer.optim.name().to_string(),
        Some(bytes) => format!("{} in {}", chosen.optimizer.optim.name(), size(bytes)),
    };
    format!("micro-batches of {} x {} tokens, {checkpointing}, {optimizer}", chosen.rows, chosen.length)
}

fn size(bytes: usize) -> String {
    ByteSize::b(bytes as u64).display().si().to_string()
}
