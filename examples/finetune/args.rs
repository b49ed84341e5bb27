//! The command line, in the names of PEFT and of Hugging Face's training arguments.

use crate::method_args::MethodArgs;
use bytesize::ByteSize;
use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use lowrank::DType;
use lowrank::adapter::METHODS;
use std::path::PathBuf;

/// Parameter-efficient fine-tuning of Hugging Face language models. Without a subcommand: a demo on a small
/// built-in model.
#[derive(Debug, Parser)]
#[command(name = "finetune", version, args_override_self = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Fine-tune a model; writes the adapter and metrics.jsonl to --output
    #[command(args_override_self = true)]
    Train(Box<TrainArgs>),
    /// Train several adapters at once over one base, each with the bits that it would have alone
    #[command(args_override_self = true, mut_arg("data", |a| a.required(false)), mut_arg("output", |a| a.required(false)))]
    TrainMany(Box<TrainManyArgs>),
    /// Loss and perplexity of a model (with an adapter) on a data file
    #[command(args_override_self = true)]
    Eval(EvalArgs),
    /// Continue a text, or answer a chat message
    #[command(args_override_self = true)]
    Generate(GenerateArgs),
    /// Train several methods on the same data: one table, and pictures
    #[command(args_override_self = true)]
    Compare(Box<CompareArgs>),
    /// Combine LoRA adapters with weights into one, as PEFT's add_weighted_adapter
    #[command(args_override_self = true)]
    Combine(CombineArgs),
    /// Merge an adapter into its base: a plain Hugging Face folder
    #[command(args_override_self = true)]
    Merge(MergeArgs),
    /// The memory that a run with these flags would take, by part, from config.json alone
    #[command(args_override_self = true, mut_arg("data", |a| a.required(false)), mut_arg("output", |a| a.required_unless_present("model")))]
    Estimate(Box<EstimateArgs>),
    /// Write a model with its linear layers in four bits, in bitsandbytes' form
    #[command(args_override_self = true)]
    Quantize(QuantizeArgs),
    /// Show a model's modules and default targets, or an adapter's settings and tensors
    #[command(args_override_self = true)]
    Inspect(InspectArgs),
}

/// Type of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    F32,
    Bf16,
}

impl From<Dtype> for DType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => DType::F32,
            Dtype::Bf16 => DType::BF16,
        }
    }
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LoadFormat {
    /// The folder's safetensors
    Auto,
    /// Random weights by config.json alone
    Dummy,
}

/// When evaluations and checkpoints happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Strategy {
    No,
    Steps,
    Epoch,
}

#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Folder of a Hugging Face model: config.json, *.safetensors, tokenizer.json
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Where to compute: auto, cpu or cuda[:N]
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Type of activations and arithmetic
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: Dtype,
    /// Format of the frozen base's linear layers: none, nf4, fp4, int4, int4-asym, int8, int8-block, fp8, fp8-e5m2, fp8-block
    /// or fp8-e5m2-block
    #[arg(long, default_value = "none")]
    pub quant: String,
    /// Quantize the constants of quantized blocks; by default for nf4 and fp4
    #[arg(long, action = ArgAction::Set, value_name = "true|false", num_args = 0..=1, require_equals = true,
        default_missing_value = "true")]
    pub double_quant: Option<bool>,
    /// Elements that share a constant, for formats of four bits
    #[arg(long, default_value_t = 64, value_name = "ELEMENTS")]
    pub blocksize: usize,
    /// Quantize the output head too
    #[arg(long)]
    pub quant_head: bool,
    /// Where weights come from
    #[arg(long, value_enum, default_value = "auto")]
    pub load_format: LoadFormat,
    /// Threads; all that the process may use by default
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Seed of initial weights, data order, dropout and sampling
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
}

#[derive(Debug, Args)]
pub struct TextArgs {
    /// Cut sequences off at this many tokens
    #[arg(long, value_name = "TOKENS")]
    pub max_length: Option<usize>,
    /// Add the end-of-sequence token to texts and completions
    #[arg(long, default_value_t = true, action = ArgAction::Set, value_name = "true|false")]
    pub append_eos: bool,
    /// Count prompts for the loss too, not answers alone
    #[arg(long)]
    pub train_on_prompt: bool,
}

#[derive(Debug, Args)]
pub struct CombineArgs {
    /// Adapter folders, separated by commas
    #[arg(long, value_delimiter = ',', required = true, value_name = "DIR,DIR")]
    pub adapters: Vec<PathBuf>,
    /// Their weights; 1 each by default
    #[arg(long, value_delimiter = ',', value_name = "W,W", allow_hyphen_values = true)]
    pub weights: Vec<f64>,
    /// cat (exact, the ranks add up), linear (one rank), or svd (the nearest of a rank)
    #[arg(long, default_value = "cat")]
    pub combination_type: String,
    /// Rank for svd; the largest of the adapters' by default
    #[arg(long, value_name = "R")]
    pub svd_rank: Option<usize>,
    /// Folder for the combined adapter
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
}

#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Methods, separated by commas: lora, qlora, dora, rslora, adalora, oft, adapter, houlsby, parallel, prefix,
    /// prefix_projection, prompt, ptuning, ptuning_lstm, ia3, vera, ln_tuning, bitfit, full
    #[arg(long, value_delimiter = ',', required = true, value_name = "NAME,NAME")]
    pub methods: Vec<String>,
    /// A flag for one method, as in prompt:learning-rate=0.1; may be given several times
    #[arg(long, value_name = "METHOD:FLAG=VALUE")]
    pub set: Vec<String>,
    /// Try these peak learning rates in short runs for each method and use the best by held-out loss; auto: a third of the
    /// method's usual rate, the rate, three times the rate
    #[arg(long, value_delimiter = ',', value_name = "RATE,RATE|auto", conflicts_with = "learning_rate")]
    pub learning_rates: Vec<String>,
    /// Steps of such a short run
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub trial_steps: usize,
    #[command(flatten)]
    pub train: TrainArgs,
}

#[derive(Debug, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Training data: JSON, JSONL or text
    #[arg(long, value_name = "FILE", required = true)]
    pub data: Option<PathBuf>,
    /// Folder for the adapter, checkpoints and metrics.jsonl
    #[arg(long, value_name = "DIR", required_unless_present = "preview")]
    pub output: Option<PathBuf>,
    /// Read flags from a TOML, YAML or JSON file; flags given here win
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub text: TextArgs,
    /// Print the first N examples as rendered, marking what counts for the loss, and stop
    #[arg(long, value_name = "N")]
    pub preview: Option<usize>,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,

    /// What is trained
    #[arg(long, default_value = "lora", value_parser = method_names(), help_heading = "Method")]
    pub method: String,
    #[command(flatten)]
    pub settings: MethodArgs,
    /// Start anew from the weights and settings of this adapter
    #[arg(long, value_name = "DIR", help_heading = "Method")]
    pub init_adapter: Option<PathBuf>,

    /// Peak learning rate
    #[arg(long, default_value_t = 2e-4, help_heading = "Optimizer")]
    pub learning_rate: f64,
    /// linear, cosine, constant or constant_with_warmup
    #[arg(long, default_value = "linear", help_heading = "Optimizer")]
    pub lr_scheduler_type: String,
    /// Warmup steps, or a share of all steps if below 1
    #[arg(long, default_value_t = 0.0, help_heading = "Optimizer")]
    pub warmup_steps: f64,
    /// Learning rate of LoRA's B over that of A (LoRA+)
    #[arg(long, default_value_t = 1.0, value_name = "RATIO", help_heading = "Optimizer")]
    pub loraplus_lr_ratio: f64,
    /// Peak learning rate of adapters on embeddings under LoRA+
    #[arg(long, default_value_t = 1e-6, value_name = "RATE", help_heading = "Optimizer")]
    pub loraplus_lr_embedding: f64,
    /// Decoupled weight decay (not on biases and norms)
    #[arg(long, default_value_t = 0.0, help_heading = "Optimizer")]
    pub weight_decay: f64,
    /// Bound of the gradient's norm; 0: none
    #[arg(long, default_value_t = 1.0, help_heading = "Optimizer")]
    pub max_grad_norm: f64,
    #[arg(long, default_value_t = 0.9, help_heading = "Optimizer")]
    pub adam_beta1: f64,
    #[arg(long, default_value_t = 0.999, help_heading = "Optimizer")]
    pub adam_beta2: f64,
    #[arg(long, default_value_t = 1e-8, help_heading = "Optimizer")]
    pub adam_epsilon: f64,
    /// adamw_torch, adamw_8bit, lion_32bit, sgd; paged_adamw_32bit, paged_adamw_8bit, paged_lion_32bit
    #[arg(long, default_value = "adamw_torch", help_heading = "Optimizer")]
    pub optim: String,
    /// Memory that a paged optimizer's state may take (such as 64MB); the rest is in a file, for a GPU in host memory
    #[arg(long, value_name = "SIZE", help_heading = "Optimizer")]
    pub optimizer_memory: Option<ByteSize>,

    /// Sequences per micro-batch
    #[arg(long, default_value_t = 4, help_heading = "Run")]
    pub per_device_train_batch_size: usize,
    /// Micro-batches per optimizer step
    #[arg(long, default_value_t = 1, help_heading = "Run")]
    pub gradient_accumulation_steps: usize,
    /// Times through the data
    #[arg(long, default_value_t = 3.0, help_heading = "Run")]
    pub num_train_epochs: f64,
    /// Optimizer steps; overrides the epochs
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub max_steps: Option<usize>,
    /// Keep only the input of each so many layers and compute them again: less memory, same bits
    #[arg(long, value_name = "LAYERS", help_heading = "Run", num_args = 0..=1, require_equals = true,
        default_value = "0", default_missing_value = "1", hide_default_value = true, value_parser = layers)]
    pub gradient_checkpointing: usize,
    /// Fit the run into this much memory (such as 6GB) by smaller micro-batches, a paged optimizer's file and
    /// gradient checkpointing, or refuse it
    #[arg(long, value_name = "SIZE", help_heading = "Run")]
    pub memory_limit: Option<ByteSize>,
    /// Batch sequences of similar length
    #[arg(long, help_heading = "Run")]
    pub group_by_length: bool,
    /// Fill rows of --max-length with several sequences; attention stays within each
    #[arg(long, help_heading = "Run")]
    pub packing: bool,
    /// Keep the file's order
    #[arg(long, help_heading = "Run")]
    pub no_shuffle: bool,
    /// Evaluation data
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    pub eval_data: Option<PathBuf>,
    /// When to evaluate; with --eval-data every epoch by default
    #[arg(long, value_enum, help_heading = "Run")]
    pub eval_strategy: Option<Strategy>,
    /// Optimizer steps between evaluations, with --eval-strategy steps
    #[arg(long, default_value_t = 100, help_heading = "Run")]
    pub eval_steps: usize,
    /// Sequences per evaluation batch
    #[arg(long, default_value_t = 8, help_heading = "Run")]
    pub per_device_eval_batch_size: usize,
    /// Optimizer steps between lines of metrics.jsonl
    #[arg(long, default_value_t = 1, help_heading = "Run")]
    pub logging_steps: usize,
    /// When to write checkpoints
    #[arg(long, value_enum, default_value = "epoch", help_heading = "Run")]
    pub save_strategy: Strategy,
    /// Optimizer steps between checkpoints, with --save-strategy steps
    #[arg(long, default_value_t = 100, help_heading = "Run")]
    pub save_steps: usize,
    /// Checkpoints to keep
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub save_total_limit: Option<usize>,
    /// End with the parameters of the best evaluation
    #[arg(long, help_heading = "Run")]
    pub load_best_model_at_end: bool,
    /// Stop after N evaluations without a better loss
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub early_stopping_patience: Option<usize>,
    /// Go on exactly from a checkpoint: `latest` of --output, or a folder
    #[arg(long, value_name = "latest|DIR", help_heading = "Run")]
    pub resume: Option<String>,
}

#[derive(Debug, Args)]
pub struct TrainManyArgs {
    /// TOML, YAML or JSON file with a table for each job: flags of `train` by name, such as data, r and learning_rate.
    /// Keys above the tables are for all jobs; flags given here win. A job's folder is its `output`, or the one of its
    /// name in --output
    #[arg(long, value_name = "FILE")]
    pub jobs: PathBuf,
    #[command(flatten)]
    pub train: TrainArgs,
}

#[derive(Debug, Args)]
pub struct EstimateArgs {
    #[command(flatten)]
    pub train: TrainArgs,
}

#[derive(Debug, Args)]
pub struct EvalArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Adapter folder
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Data: JSON, JSONL or text
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    #[command(flatten)]
    pub text: TextArgs,
    /// Sequences per batch
    #[arg(long, default_value_t = 8)]
    pub per_device_eval_batch_size: usize,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Adapter folder
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// LoRA adapters for --prompts, separated by commas; a row names one by its NAME, else the folder's
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "[NAME=]DIR",
        requires = "prompts",
        conflicts_with = "adapter"
    )]
    pub adapters: Vec<String>,
    /// JSONL file of rows with a `prompt` or a `chat` and perhaps an `adapter_name` (`__base__`: none); prints a JSON
    /// object for each
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "chat"])]
    pub prompts: Option<PathBuf>,
    /// Rows of --prompts that are generated at a time
    #[arg(long, default_value_t = 8, value_name = "ROWS")]
    pub batch_size: usize,
    /// Text to continue as it is
    #[arg(long, value_name = "TEXT", required_unless_present_any = ["chat", "prompts"], conflicts_with = "chat")]
    pub prompt: Option<String>,
    /// A user's message, rendered by the chat template
    #[arg(long, value_name = "TEXT")]
    pub chat: Option<String>,
    /// Tokens to make at most
    #[arg(long, default_value_t = 128)]
    pub max_new_tokens: usize,
    /// Tokens before the end-of-sequence token is allowed
    #[arg(long, default_value_t = 0)]
    pub min_new_tokens: usize,
    /// Divides the scores; 0: always the likeliest token
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Only this many likeliest tokens; 0: all
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Only the likeliest tokens of this total probability
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
    /// Penalty on tokens that were there already; 1: none
    #[arg(long, default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Stop before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// The weights that an adapter is merged onto.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OntoArg {
    /// Those of the model's files
    Original,
    /// What the quantized base of the training stands for: --quant, or a model quantized by bitsandbytes
    Dequantized,
}

#[derive(Debug, Args)]
pub struct MergeArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Adapter folder
    #[arg(long, value_name = "DIR")]
    pub adapter: PathBuf,
    /// Folder for the merged model; must not exist
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// The weights that the adapter is merged onto
    #[arg(long, value_enum, default_value = "original")]
    pub onto: OntoArg,
    /// Compare the logits of base and adapter with the merged model's
    #[arg(long, default_value_t = true, action = ArgAction::Set, value_name = "true|false")]
    pub report: bool,
    /// Text to compare them on; may be given several times; a few short ones by default
    #[arg(long, value_name = "TEXT")]
    pub prompt: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct QuantizeArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Folder for the quantized model; must not exist
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Folder of a model
    #[arg(long, value_name = "DIR", required_unless_present = "adapter")]
    pub model: Option<PathBuf>,
    /// Adapter folder
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// The methods by name, with what they are.
fn method_names() -> PossibleValuesParser {
    METHODS.iter().map(|row| PossibleValue::new(row.name).help(row.about)).collect::<Vec<_>>().into()
}

/// A number of layers; `true` and `false` as in Hugging Face's settings.
fn layers(text: &str) -> Result<usize, String> {
    match text {
        "true" => Ok(1),
        "false" => Ok(0),
        _ => text.parse().map_err(|_| format!("expected a number of layers, found `{text}`")),
    }
}
