//! Rows of a data file: a JSON array or JSON lines in one of five shapes told apart by their keys, or plain
//! text. Files are read as a stream; only one row is held at a time.

use crate::error::{Error, Result};
use serde::Deserializer as _;
use serde::de::{SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// The shape of a file's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A `.txt` file: one document.
    PlainText,
    /// `{"text"}`.
    Text,
    /// `{"prompt", "completion"}`.
    PromptCompletion,
    /// `{"instruction", "input", "output"}`, the format of Stanford Alpaca.
    Alpaca,
    /// `{"messages": [{"role", "content"}]}`.
    Messages,
    /// `{"conversations": [{"from", "value"}]}`.
    ShareGpt,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::PlainText => "plain text",
            Format::Text => "text rows {\"text\"}",
            Format::PromptCompletion => "{\"prompt\", \"completion\"} rows",
            Format::Alpaca => "Alpaca rows {\"instruction\", \"input\", \"output\"}",
            Format::Messages => "chats {\"messages\"}",
            Format::ShareGpt => "ShareGPT chats {\"conversations\"}",
        })
    }
}

/// A turn of a chat, as chat templates take it.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or another role that the template knows.
    pub role: String,
    /// The turn's text.
    pub content: String,
    /// Further keys of the row's message, handed to the template as they are.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A message without further keys.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into(), extra: Map::new() }
    }
}

/// The content of a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A text; all of it counts for the loss.
    Text(String),
    /// A text whose second part counts.
    PromptCompletion {
        /// What the model is given.
        prompt: String,
        /// What it is to write.
        completion: String,
    },
    /// An instruction with its answer.
    Alpaca {
        /// What to do.
        instruction: String,
        /// What to do it with; may be empty.
        input: String,
        /// The answer.
        output: String,
    },
    /// A conversation; the assistant's turns count.
    Chat(Vec<Message>),
}

/// What was found while reading a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The shape of the rows.
    pub format: Format,
    /// Number of rows.
    pub rows: usize,
    /// Keys of rows that the format does not use.
    pub ignored_keys: Vec<String>,
}

/// Calls `visit` with each row of `path` and its number from 1 (for JSON lines the line's number).
///
/// # Errors
/// For a file that can't be read, is empty, or has another extension than `.json`, `.jsonl`, `.ndjson` or
/// `.txt`; for a row that is not UTF-8, not JSON, of no known format, or of another format than the first row;
/// and what `visit` returns.
pub fn read(path: &Path, mut visit: impl FnMut(usize, Record) -> Result<()>) -> Result<Summary> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    match extension.as_str() {
        "txt" => return read_plain_text(path, visit),
        "json" | "jsonl" | "ndjson" => {}
        other => {
            return Err(Error::format(
                path,
                format!("expected a .json, .jsonl or .txt file, found the extension `{other}`"),
            ));
        }
    }
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut reader = BufReader::with_capacity(1 << 20, file);
    skip_byte_order_mark(&mut reader).map_err(|e| Error::io(path, e))?;
    let mut rows = Rows { path, format: None, count: 0, ignored: BTreeSet::new(), visit: &mut visit };
    match first_byte(&mut reader).map_err(|e| Error::io(path, e))? {
        None => {}
        Some(b'[') => read_array(reader, &mut rows)?,
        Some(_) => read_lines(reader, &mut rows)?,
    }
    let format = rows.format.ok_or_else(|| Error::format(path, "expected rows of data, found none"))?;
    Ok(Summary { format, rows: rows.count, ignored_keys: rows.ignored.into_iter().collect() })
}

fn read_plain_text(path: &Path, mut visit: impl FnMut(usize, Record) -> Result<()>) -> Result<Summary> {
    let text = crate::fs::read_text(path)?;
    if text.trim().is_empty() {
        return Err(Error::format(path, "expected text, found an empty file"));
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text).to_string();
    visit(1, Record::Text(text))?;
    Ok(Summary { format: Format::PlainText, rows: 1, ignored_keys: Vec::new() })
}

fn skip_byte_order_mark(reader: &mut impl BufRead) -> std::io::Result<()> {
    if reader.fill_buf()?.starts_with(&[0xef, 0xbb, 0xbf]) {
        reader.consume(3);
    }
    Ok(())
}

/// The first byte that is no white space, left unread; the white space before it on its line is consumed.
fn first_byte(reader: &mut impl BufRead) -> std::io::Result<Option<u8>> {
    loop {
        let buffer = reader.fill_buf()?;
        let Some(&byte) = buffer.first() else { return Ok(None) };
        if !byte.is_ascii_whitespace() {
            return Ok(Some(byte));
        }
        reader.consume(1);
    }
}

/// What is known about the rows read so far.
struct Rows<'a> {
    path: &'a Path,
    format: Option<Format>,
    count: usize,
    ignored: BTreeSet<String>,
    visit: &'a mut dyn FnMut(usize, Record) -> Result<()>,
}

impl Rows<'_> {
    fn add(&mut self, number: usize, row: Value) -> Result<()> {
        let at = |message: String| Error::data(self.path, number, message);
        let Value::Object(mut row) = row else {
            return Err(at(format!("expected an object {{...}}, found {}", kind(&row))));
        };
        let format = recognise(&row).map_err(at)?;
        if let Some(first) = self.format.filter(|first| *first != format) {
            return Err(at(format!(
                "the rows before are {first}, this one is {format}; expected one format"
            )));
        }
        let record = parse(format, &mut row).map_err(at)?;
        self.format = Some(format);
        self.count += 1;
        for (key, _) in row {
            self.ignored.insert(key);
        }
        (self.visit)(number, record)
    }
}

fn read_lines(mut reader: impl BufRead, rows: &mut Rows<'_>) -> Result<()> {
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if reader.read_until(b'\n', &mut line).map_err(|e| Error::io(rows.path, e))? == 0 {
            break;
        }
        let at = |message: String| Error::data(rows.path, number, message);
        let text = std::str::from_utf8(&line).map_err(|e| {
            at(format!(
                "expected UTF-8 text, found an invalid byte at offset {} of the line",
                e.valid_up_to()
            ))
        })?;
        if text.trim().is_empty() {
            continue;
        }
        let row = serde_json::from_str(text).map_err(|e| {
            let hint =
                if number == 1 { "; expected an array of objects, or an object on each line" } else { "" };
            at(format!("{}{hint}", json_error(&e, false)))
        })?;
        rows.add(number, row)?;
    }
    Ok(())
}

fn read_array(reader: impl BufRead, rows: &mut Rows<'_>) -> Result<()> {
    let mut failure = None;
    let mut started = 0;
    let mut json = serde_json::Deserializer::from_reader(reader);
    let visitor = ArrayVisitor { rows, failure: &mut failure, started: &mut started };
    let outcome = json.deserialize_seq(visitor).and_then(|()| json.end());
    match (failure, outcome) {
        (Some(failure), _) => Err(failure),
        (None, Err(e)) if e.is_io() => Err(Error::io(rows.path, e.into())),
        (None, Err(e)) => Err(Error::data(rows.path, started.max(1), json_error(&e, true))),
        (None, Ok(())) => Ok(()),
    }
}

/// Takes the elements of an array one by one.
struct ArrayVisitor<'r, 'a> {
    rows: &'r mut Rows<'a>,
    failure: &'r mut Option<Error>,
    started: &'r mut usize,
}

impl<'de> Visitor<'de> for ArrayVisitor<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> std::result::Result<(), A::Error> {
        loop {
            *self.started += 1;
            let Some(row) = elements.next_element::<Value>()? else { return Ok(()) };
            if let Err(e) = self.rows.add(*self.started, row) {
                *self.failure = Some(e);
                return Err(serde::de::Error::custom("row rejected"));
            }
        }
    }
}

fn json_error(e: &serde_json::Error, with_line: bool) -> String {
    let text = e.to_string();
    let text = text.split(" at line ").next().unwrap_or(&text);
    let place = match with_line {
        true => format!("line {}, column {}", e.line(), e.column()),
        false => format!("column {}", e.column()),
    };
    format!("expected JSON, found: {text} ({place})")
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The format whose keys a row has. A data set with several sets of keys (Alpaca's own file has `text` too) is
/// taken as the first of them in the order conversation, instruction, prompt, text.
fn recognise(row: &Map<String, Value>) -> std::result::Result<Format, String> {
    let has = |key: &str| row.get(key).is_some_and(|v| !v.is_null());
    let preference = ["chosen", "rejected", "kto_tag"].into_iter().find(|key| has(key));
    if let Some(key) = preference {
        return Err(format!(
            "this is preference data (key `{key}`), which supervised fine-tuning can't use; \
             keep the prompt and the wanted answer as {{\"messages\"}} or {{\"prompt\", \"completion\"}}"
        ));
    }
    if has("messages") {
        return Ok(Format::Messages);
    }
    if has("conversations") {
        return Ok(Format::ShareGpt);
    }
    if has("instruction") || has("output") {
        return Ok(Format::Alpaca);
    }
    if has("prompt") || has("completion") {
        return Ok(Format::PromptCompletion);
    }
    if has("text") {
        return Ok(Format::Text);
    }
    let keys: Vec<&str> = row.keys().take(8).map(String::as_str).collect();
    Err(format!(
        "expected the keys of one of {{\"text\"}}, {{\"prompt\", \"completion\"}}, \
         {{\"instruction\", \"input\", \"output\"}}, {{\"messages\"}}, {{\"conversations\"}}; found {}",
        if keys.is_empty() { "no keys".to_string() } else { format!("`{}`", keys.join("`, `")) }
    ))
}

/// The record of a row; takes what it uses out of `row`.
fn parse(format: Format, row: &mut Map<String, Value>) -> std::result::Result<Record, String> {
    let record = match format {
        Format::PlainText | Format::Text => Record::Text(take_text(row, "text")?),
        Format::PromptCompletion => Record::PromptCompletion {
            prompt: take_text(row, "prompt")?,
            completion: take_text(row, "completion")?,
        },
        Format::Alpaca => parse_alpaca(row)?,
        Format::Messages => Record::Chat(take_chat(row, "messages", ["role", "content"])?),
        Format::ShareGpt => Record::Chat(take_chat(row, "conversations", ["from", "value"])?),
    };
    // These change what a row means; a row that has them must not be used as if it had not.
    let unsupported =
        ["history", "tools", "images", "videos", "audios"].into_iter().find(|key| match row.get(*key) {
            None | Some(Value::Null) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::String(text)) => !text.is_empty() && text != "[]",
            Some(_) => true,
        });
    match unsupported {
        Some(key) => Err(format!("the key `{key}` is not supported; write such rows as {{\"messages\"}}")),
        None => Ok(record),
    }
}

fn parse_alpaca(row: &mut Map<String, Value>) -> std::result::Result<Record, String> {
    let instruction = take_text(row, "instruction")?;
    let input = match row.get("input") {
        None | Some(Value::Null) => String::new(),
        Some(_) => take_text(row, "input")?,
    };
    row.remove("input");
    let output = take_text(row, "output")?;
    match take_system(row)? {
        None => Ok(Record::Alpaca { instruction, input, output }),
        Some(system) => Ok(Record::Chat(vec![
            system,
            Message::new("user", join_instruction(&instruction, &input)),
            Message::new("assistant", output),
        ])),
    }
}

/// An Alpaca row's instruction and input as one user's turn.
pub fn join_instruction(instruction: &str, input: &str) -> String {
    match input.is_empty() {
        true => instruction.to_string(),
        false => format!("{instruction}\n{input}"),
    }
}

fn take_text(row: &mut Map<String, Value>, key: &str) -> std::result::Result<String, String> {
    match row.remove(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("key `{key}`: expected a string, found {}", kind(&other))),
        None => Err(format!("key `{key}` is missing")),
    }
}

/// The system prompt that some data sets keep beside the conversation.
fn take_system(row: &mut Map<String, Value>) -> std::result::Result<Option<Message>, String> {
    match row.get("system") {
        None | Some(Value::Null) => Ok(None),
        Some(_) => {
            let text = take_text(row, "system")?;
            Ok((!text.is_empty()).then(|| Message::new("system", text)))
        }
    }
}

fn take_chat(
    row: &mut Map<String, Value>,
    key: &str,
    [role_key, content_key]: [&str; 2],
) -> std::result::Result<Vec<Message>, String> {
    let list = match row.remove(key) {
        Some(Value::Array(list)) => list,
        Some(other) => return Err(format!("key `{key}`: expected an array, found {}", kind(&other))),
        None => return Err(format!("key `{key}` is missing")),
    };
    let mut chat: Vec<Message> = take_system(row)?.into_iter().collect();
    for (index, message) in list.into_iter().enumerate() {
        let at = |problem: String| format!("{key}[{index}]: {problem}");
        let Value::Object(mut message) = message else {
            return Err(at(format!("expected an object, found {}", kind(&message))));
        };
        let role = take_text(&mut message, role_key).map_err(at)?;
        let content = take_text(&mut message, content_key).map_err(at)?;
        let role = if role_key == "from" { share_gpt_role(&role).map_err(at)? } else { role };
        chat.push(Message { role, content, extra: message });
    }
    if chat.iter().all(|message| message.role == "system") {
        return Err(format!("key `{key}`: expected at least one turn, found none"));
    }
    Ok(chat)
}

fn share_gpt_role(from: &str) -> std::result::Result<String, String> {
    Ok(match from {
        "human" | "user" => "user",
        "gpt" | "assistant" | "chatgpt" | "bing" | "bard" | "model" => "assistant",
        "system" => "system",
        "tool" | "observation" => "tool",
        other => {
            return Err(format!(
                "key `from`: expected human, user, gpt, assistant, system, tool or observation, found `{other}`"
            ));
        }
    }
    .to_string())
}
