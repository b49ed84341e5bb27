//! From a data file to [`Example`]s: rows as text, text as tokens, and which of them count for the loss.

use super::chat::{RenderedChat, overlapping};
use super::jsonl::{self, Record, Summary, join_instruction};
use super::template::ChatTemplate;
use super::tokenizer::Tokenizer;
use super::{Example, Format, Message};
use crate::backend::IGNORE_INDEX;
use crate::error::{Error, Result};
use rayon::prelude::*;
use std::fmt;
use std::path::Path;

/// The prompt that Stanford Alpaca's data was made for, used with models that have no chat template.
pub const ALPACA_WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an input that \
    provides further context. Write a response that appropriately completes the request.\n\n\
    ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n";

/// [`ALPACA_WITH_INPUT`] for rows without an input.
pub const ALPACA_WITHOUT_INPUT: &str = "Below is an instruction that describes a task. Write a response that \
    appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n";

/// Length of the pieces a plain text is cut into when no `--max-length` is given, in tokens.
pub const TEXT_BLOCK: usize = 512;

/// How rows become examples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatasetOptions {
    /// Longer sequences are cut off here, in tokens; plain text is cut into pieces of this length.
    pub max_length: Option<usize>,
    /// The longest sequence that the model takes, in tokens.
    pub model_max_length: usize,
    /// Whether the end-of-sequence token is added to texts and completions.
    pub append_eos: bool,
    /// Whether prompts count for the loss too.
    pub train_on_prompt: bool,
}

/// A tokenized data file.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// The sequences, in the file's order.
    pub examples: Vec<Example>,
    /// What there is to say about them.
    pub report: Report,
}

/// What became of the rows of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The file's format and rows.
    pub summary: Summary,
    /// How the text was made of the rows.
    pub rendering: String,
    /// Number of sequences.
    pub examples: usize,
    /// Tokens of all sequences.
    pub tokens: usize,
    /// Tokens that count for the loss.
    pub counted: usize,
    /// Tokens of the longest sequence.
    pub longest: usize,
    /// Sequences that were cut off.
    pub truncated: usize,
    /// Sequences left out because nothing of them counts for the loss.
    pub dropped: usize,
    /// Whole sequences whose last counted token is none that ends a text.
    pub unended: usize,
}

impl fmt::Display for Report {
    /// A line for the data, and one for each thing to know about it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} rows of {}, rendered by {}: {} sequences, {} tokens ({} count for the loss), longest {}",
            self.summary.rows,
            self.summary.format,
            self.rendering,
            self.examples,
            self.tokens,
            self.counted,
            self.longest
        )?;
        if !self.summary.ignored_keys.is_empty() {
            write!(f, "\nkeys not used: {}", self.summary.ignored_keys.join(", "))?;
        }
        if self.truncated > 0 {
            write!(f, "\n{} sequences cut off at --max-length", self.truncated)?;
        }
        if self.dropped > 0 {
            write!(f, "\n{} sequences left out: nothing in them counts for the loss", self.dropped)?;
        }
        if self.unended > 0 {
            write!(
                f,
                "\nwarning: {} sequences do not end with an end-of-sequence token; the model won't learn to stop there",
                self.unended
            )?;
        }
        Ok(())
    }
}

/// Rows are tokenized in parallel, this many at a time.
const CHUNK: usize = 1024;

impl Dataset {
    /// Reads and tokenizes `path`.
    ///
    /// # Errors
    /// As [`jsonl::read`]; for a row that the chat template refuses, or that is longer than the model allows
    /// while no `max_length` is set; for a `max_length` beyond the model's; when no row is left.
    pub fn load(
        path: &Path,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        options: &DatasetOptions,
    ) -> Result<Self> {
        let encoder = Encoder::new(path, tokenizer, template, options)?;
        let mut dataset = Dataset { examples: Vec::new(), report: Report::empty() };
        let mut pending: Vec<(usize, Record)> = Vec::with_capacity(CHUNK);
        let plain_text = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("txt"));
        let summary = jsonl::read(path, |row, record| {
            pending.push((row, record));
            if pending.len() == CHUNK { dataset.add(&encoder, &mut pending, plain_text) } else { Ok(()) }
        })?;
        dataset.add(&encoder, &mut pending, plain_text)?;
        if dataset.examples.is_empty() {
            return Err(Error::format(
                path,
                format!(
                    "expected tokens that count for the loss, found none in {} rows; a larger --max-length or \
                     --train-on-prompt keeps more",
                    summary.rows
                ),
            ));
        }
        let report = &mut dataset.report;
        report.rendering = encoder.rendering(summary.format);
        report.summary = summary;
        report.examples = dataset.examples.len();
        report.tokens = dataset.examples.iter().map(|e| e.input_ids.len()).sum();
        report.longest = dataset.examples.iter().map(|e| e.input_ids.len()).max().unwrap_or(0);
        report.counted = dataset.examples.iter().map(counted).sum();
        Ok(dataset)
    }

    /// Tokenizes the pending rows and takes over what is left of them.
    fn add(
        &mut self,
        encoder: &Encoder<'_>,
        pending: &mut Vec<(usize, Record)>,
        plain_text: bool,
    ) -> Result<()> {
        let encoded: Vec<Result<Encoded>> =
            pending.par_iter().map(|(row, record)| encoder.encode(*row, record, plain_text)).collect();
        pending.clear();
        for encoded in encoded {
            let encoded = encoded?;
            self.report.truncated += usize::from(encoded.truncated);
            self.report.unended += usize::from(encoded.unended);
            for example in encoded.examples {
                if counted(&example) == 0 {
                    self.report.dropped += 1;
                } else {
                    self.examples.push(example);
                }
            }
        }
        Ok(())
    }
}

/// Tokens whose prediction counts: the first one of a sequence is never predicted.
fn counted(example: &Example) -> usize {
    example.labels.iter().skip(1).filter(|label| **label != IGNORE_INDEX).count()
}

impl Report {
    fn empty() -> Self {
        Report {
            summary: Summary { format: Format::Text, rows: 0, ignored_keys: Vec::new() },
            rendering: String::new(),
            examples: 0,
            tokens: 0,
            counted: 0,
            longest: 0,
            truncated: 0,
            dropped: 0,
            unended: 0,
        }
    }
}

/// The sequences of a row.
struct Encoded {
    examples: Vec<Example>,
    truncated: bool,
    unended: bool,
}

struct Encoder<'a> {
    path: &'a Path,
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    options: &'a DatasetOptions,
}

impl<'a> Encoder<'a> {
    fn new(
        path: &'a Path,
        tokenizer: &'a Tokenizer,
        template: &'a ChatTemplate,
        options: &'a DatasetOptions,
    ) -> Result<Self> {
        let allowed = 2..=options.model_max_length;
        if options.max_length.is_some_and(|n| !allowed.contains(&n)) {
            return Err(Error::config(
                "data",
                "max_length",
                format!("expected 2 to {} tokens, which is what the model allows", options.model_max_length),
            ));
        }
        Ok(Encoder { path, tokenizer, template, options })
    }

    fn rendering(&self, format: Format) -> String {
        match format {
            Format::PlainText | Format::Text | Format::PromptCompletion => "plain concatenation".to_string(),
            Format::Alpaca if self.template.is_default() => "the Alpaca prompt".to_string(),
            _ => self.template.source().to_string(),
        }
    }

    fn encode(&self, row: usize, record: &Record, plain_text: bool) -> Result<Encoded> {
        let mut example = self.tokens(record).map_err(|e| Error::data(self.path, row, e.to_string()))?;
        if plain_text {
            let block = self.options.max_length.unwrap_or(TEXT_BLOCK.min(self.options.model_max_length));
            return Ok(Encoded { examples: blocks(&example, block), truncated: false, unended: false });
        }
        let found = example.input_ids.len();
        match self.options.max_length {
            None if found > self.options.model_max_length => Err(Error::data(
                self.path,
                row,
                format!(
                    "{found} tokens, but the model allows {}; --max-length N cuts longer rows off",
                    self.options.model_max_length
                ),
            )),
            Some(limit) if found > limit => {
                example.input_ids.truncate(limit);
                example.labels.truncate(limit);
                Ok(Encoded { examples: vec![example], truncated: true, unended: false })
            }
            _ => {
                let last = example.labels.iter().rev().find(|label| **label != IGNORE_INDEX);
                let stops = self.tokenizer.stop_ids();
                let unended = last.is_some_and(|label| !stops.contains(&(*label as u32)));
                // A text without an end was asked for by --append-eos false.
                let unended = unended && matches!(record, Record::Chat(_) | Record::Alpaca { .. });
                Ok(Encoded { examples: vec![example], truncated: false, unended })
            }
        }
    }

    fn tokens(&self, record: &Record) -> Result<Example> {
        match record {
            Record::Text(text) => self.completion("", text, self.options.append_eos),
            Record::PromptCompletion { prompt, completion } => {
                self.completion(prompt, completion, self.options.append_eos)
            }
            Record::Alpaca { instruction, input, output } if self.template.is_default() => {
                self.completion(&alpaca_prompt(instruction, input), output, true)
            }
            Record::Alpaca { instruction, input, output } => self.chat(&[
                Message::new("user", join_instruction(instruction, input)),
                Message::new("assistant", output.as_str()),
            ]),
            Record::Chat(messages) => self.chat(messages),
        }
    }

    fn chat(&self, messages: &[Message]) -> Result<Example> {
        if self.options.train_on_prompt {
            let input_ids = self.tokenizer.encode(&self.template.render(messages, false)?, false)?;
            return Ok(all_counted(input_ids));
        }
        RenderedChat::new(self.template, messages)?.tokenize(self.tokenizer)
    }

    /// The prompt, not counted, and the completion, counted with its end-of-sequence token.
    fn completion(&self, prompt: &str, completion: &str, append_eos: bool) -> Result<Example> {
        let text = format!("{prompt}{completion}");
        let (mut input_ids, spans) = self.tokenizer.encode_with_spans(&text, true)?;
        let mut labels = vec![IGNORE_INDEX; input_ids.len()];
        for i in overlapping(&spans, prompt.len(), text.len()) {
            labels[i] = input_ids[i] as i32;
        }
        if append_eos {
            let eos = self.tokenizer.eos_token_id().ok_or_else(|| {
                Error::Unsupported(
                    "the tokenizer names no eos_token to append; --append-eos false goes without".to_string(),
                )
            })?;
            // Some tokenizers add it by themselves.
            if input_ids.last() != Some(&eos) {
                input_ids.push(eos);
                labels.push(eos as i32);
            }
            if let Some(last) = labels.last_mut() {
                *last = eos as i32;
            }
        }
        if prompt.is_empty() || self.options.train_on_prompt {
            return Ok(all_counted(input_ids));
        }
        Ok(Example { input_ids, labels })
    }
}

/// The prompt of an Alpaca row for a model without a chat template.
pub fn alpaca_prompt(instruction: &str, input: &str) -> String {
    let template = if input.is_empty() { ALPACA_WITHOUT_INPUT } else { ALPACA_WITH_INPUT };
    let (head, tail) = template.split_once("{instruction}").unwrap_or((template, ""));
    format!("{head}{instruction}{}", tail.replacen("{input}", input, 1))
}

fn all_counted(input_ids: Vec<u32>) -> Example {
    let labels = input_ids.iter().map(|id| *id as i32).collect();
    Example { input_ids, labels }
}

/// A long sequence cut into pieces of `length` tokens; nothing of it is lost but a last single token.
fn blocks(example: &Example, length: usize) -> Vec<Example> {
    let ids = example.input_ids.chunks(length);
    ids.filter(|piece| piece.len() > 1).map(|piece| all_counted(piece.to_vec())).collect()
}
