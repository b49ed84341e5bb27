//! Chat templates: Jinja as `apply_chat_template` of transformers runs it.

use super::Message;
use super::gguf::tokenizer_files;
use super::tokenizer::{Tokenizer, one_line, read_object};
use crate::error::{Error, Result};
use crate::model::gguf::is_gguf;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, ErrorKind};
use serde::Serialize;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// What a model without a template of its own gets: each turn's text, ended by the end-of-sequence token, as
/// DialoGPT was trained.
pub const DEFAULT_TEMPLATE: &str =
    "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}";

/// A chat template, ready to render.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(&'static str, String)>,
    source: String,
    is_default: bool,
}

impl ChatTemplate {
    /// The template of a model's folder: `chat_template.jinja`, else `chat_template` of
    /// `tokenizer_config.json` (a string, or a list of named ones, of which `default` counts), else
    /// [`DEFAULT_TEMPLATE`].
    ///
    /// # Errors
    /// When the template can't be read or has a syntax error.
    pub fn load(model_dir: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let special_tokens = tokenizer.special_tokens().to_vec();
        let file = model_dir.join("chat_template.jinja");
        if file.exists() {
            let text = crate::fs::read_text(&file)?;
            return Self::build(text, special_tokens, file.display().to_string(), false);
        }
        let (config, keys) = match is_gguf(model_dir) {
            true => (model_dir.to_path_buf(), tokenizer_files(model_dir)?.config),
            false => {
                let config = model_dir.join("tokenizer_config.json");
                let keys = read_object(&config)?;
                (config, keys)
            }
        };
        let name = format!("chat_template of {}", config.display());
        match keys.get("chat_template") {
            None | Some(serde_json::Value::Null) => Self::build(
                DEFAULT_TEMPLATE.to_string(),
                special_tokens,
                "the built-in default (turns ended by the end-of-sequence token)".to_string(),
                true,
            ),
            Some(serde_json::Value::String(text)) => Self::build(text.clone(), special_tokens, name, false),
            Some(serde_json::Value::Array(list)) => {
                let default = list.iter().find(|entry| entry["name"] == "default");
                let text = default.and_then(|entry| entry["template"].as_str()).ok_or_else(|| {
                    Error::config(
                        config.display(),
                        "chat_template",
                        "expected a template named `default` in the list",
                    )
                })?;
                Self::build(text.to_string(), special_tokens, name, false)
            }
            Some(_) => Err(Error::config(
                config.display(),
                "chat_template",
                "expected a string or a list of named templates",
            )),
        }
    }

    /// A template from its text; `special_tokens` are variables such as `bos_token` that it may use.
    ///
    /// # Errors
    /// When the template has a syntax error.
    pub fn new(template: &str, special_tokens: Vec<(&'static str, String)>) -> Result<Self> {
        Self::build(template.to_string(), special_tokens, "chat template".to_string(), false)
    }

    fn build(
        template: String,
        special_tokens: Vec<(&'static str, String)>,
        source: String,
        is_default: bool,
    ) -> Result<Self> {
        let failed = |e: minijinja::Error| {
            Error::format(&source, format!("expected a Jinja template: {}", describe(&e)))
        };
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(failed)?;
        let mut environment = Environment::new();
        environment.set_syntax(syntax);
        environment.set_unknown_method_callback(python_method);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_template_owned("chat", without_generation_tags(&template)).map_err(failed)?;
        Ok(ChatTemplate { environment, special_tokens, source, is_default })
    }

    /// The text of a chat; with `add_generation_prompt` up to where the assistant's next turn begins.
    ///
    /// # Errors
    /// What the template raises, for instance for roles in an order that it doesn't know.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        #[derive(Serialize)]
        struct Context<'a> {
            messages: &'a [Message],
            add_generation_prompt: bool,
            tools: (),
            documents: (),
            #[serde(flatten)]
            special_tokens: std::collections::BTreeMap<&'a str, &'a str>,
        }
        let special_tokens = self.special_tokens.iter().map(|(name, text)| (*name, text.as_str())).collect();
        let context = Context { messages, add_generation_prompt, tools: (), documents: (), special_tokens };
        self.environment
            .get_template("chat")
            .and_then(|template| template.render(Serde(&context)))
            .map_err(|e| Error::Unsupported(format!("chat template: {}", describe(&e))))
    }

    /// Where the template comes from, for people to read.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the model brought no template, so that [`DEFAULT_TEMPLATE`] is in use.
    pub fn is_default(&self) -> bool {
        self.is_default
    }
}

fn describe(e: &minijinja::Error) -> String {
    let message = e.detail().map_or_else(|| e.to_string(), str::to_string);
    match e.line() {
        Some(line) => format!("{} (line {line})", one_line(&message)),
        None => one_line(&message),
    }
}

/// `{% generation %}` marks the assistant's text for transformers and leaves no trace in the rendering.
fn without_generation_tags(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        rest = tag;
        let end = tag.find("%}").unwrap_or(tag.len());
        let word = tag[..end].trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        out.push_str(&tag[..end].replacen(word, replacement, 1));
        rest = &tag[end..];
    }
    out + rest
}

/// Methods of Python's types; `str.title` as Python has it, where a letter after anything else is a capital.
fn python_method(
    state: &mut minijinja::State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> std::result::Result<Value, minijinja::Error> {
    match (method, value.as_str(), args) {
        ("title", Some(text), []) => Ok(Value::from(title(text))),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut within_word = false;
    for c in text.chars() {
        if within_word {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        within_word = c.is_alphabetic();
    }
    out
}

fn raise_exception(message: String) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// `tojson` as transformers overrides it: Python's `json.dumps` with non-ASCII characters kept.
fn to_json(
    value: &Value,
    indent: Option<usize>,
    options: Kwargs,
) -> std::result::Result<String, minijinja::Error> {
    let indent = indent.or(options.get("indent")?);
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        Some(width) => {
            let spaces = " ".repeat(width);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonSeparators)),
    };
    let failed = |e: String| minijinja::Error::new(ErrorKind::BadSerialization, e);
    written.map_err(|e| failed(e.to_string()))?;
    String::from_utf8(out).map_err(|e| failed(e.to_string()))
}

/// `", "` and `": "`, Python's separators.
struct PythonSeparators;

impl serde_json::ser::Formatter for PythonSeparators {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

/// The present date and time, in UTC.
fn strftime_now(format: String) -> std::result::Result<String, minijinja::Error> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    strftime(&format, seconds).map_err(|c| {
        minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: unknown `%{c}`"))
    })
}

/// Python's `strftime` for a time in seconds since 1970; the error is the directive that isn't known.
fn strftime(format: &str, seconds: u64) -> std::result::Result<String, char> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    let (year, month, day) = civil_from_days(days);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next().unwrap_or('%');
        out.push_str(&match directive {
            'd' => format!("{day:02}"),
            'm' => format!("{month:02}"),
            'b' => MONTHS[month as usize - 1][..3].to_string(),
            'B' => MONTHS[month as usize - 1].to_string(),
            'y' => format!("{:02}", year % 100),
            'Y' => year.to_string(),
            'a' => DAYS[(days % 7) as usize][..3].to_string(),
            'A' => DAYS[(days % 7) as usize].to_string(),
            'H' => format!("{hour:02}"),
            'I' => format!("{:02}", (hour + 11) % 12 + 1),
            'p' => if hour < 12 { "AM" } else { "PM" }.to_string(),
            'M' => format!("{minute:02}"),
            'S' => format!("{second:02}"),
            '%' => "%".to_string(),
            other => return Err(other),
        });
    }
    Ok(out)
}

/// Year, month and day of the Gregorian calendar, by days since 1970-01-01.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    // Years that begin in March have their leap day last; 719,468 days lie between 0000-03-01 and 1970.
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        // As Python's datetime.fromtimestamp(..., timezone.utc) prints them.
        let format = "%d %b %Y, %A %H:%M:%S %I%p %y-%m %a %B 100%%";
        assert_eq!(
            strftime(format, 0).unwrap(),
            "01 Jan 1970, Thursday 00:00:00 12AM 70-01 Thu January 100%"
        );
        assert_eq!(strftime("%d %b %Y %A", 1_709_208_000).unwrap(), "29 Feb 2024 Thursday");
        assert_eq!(strftime("%Y-%m-%d %H:%M:%S %I%p", 4_107_542_399).unwrap(), "2100-02-28 23:59:59 11PM");
        assert_eq!(strftime("%Q", 0), Err('Q'));
    }

    #[test]
    fn generation_tags_keep_their_white_space_control() {
        assert_eq!(
            without_generation_tags("a{%- generation -%}b{%endgeneration%}{% if x %}{% generations %}"),
            "a{%- if true -%}b{%endif%}{% if x %}{% generations %}"
        );
    }
}
