//! `tokenizer.json` and the special tokens of a model's folder.

use super::gguf::tokenizer_files;
use crate::error::{Error, Result};
use crate::model::gguf::is_gguf;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use tokenizers::{Encoding, PostProcessor, PostProcessorWrapper};

/// Byte range of a token in its text; empty for tokens that stand for no text.
pub type Span = (usize, usize);

/// The tokenizer of a model, with the ids that end a turn.
#[derive(Clone)]
pub struct Tokenizer {
    /// Without its post-processor: some post-processors narrow the spans.
    inner: tokenizers::Tokenizer,
    post_processor: Option<PostProcessorWrapper>,
    special_tokens: Vec<(&'static str, String)>, // names like `bos_token` and their texts
    bos_token_id: Option<u32>,
    eos_token_id: Option<u32>,
    stop_ids: Vec<u32>,
    special_ids: BTreeSet<u32>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("special_tokens", &self.special_tokens)
            .field("stop_ids", &self.stop_ids)
            .finish_non_exhaustive()
    }
}

const SPECIAL_TOKEN_KEYS: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];

impl Tokenizer {
    /// Reads `tokenizer.json` of a model's folder, and its special tokens from `tokenizer_config.json`,
    /// `special_tokens_map.json`, `generation_config.json` and `config.json`, where they exist.
    ///
    /// # Errors
    /// When `tokenizer.json` is missing or can't be used, or another of these files is no JSON object.
    pub fn load(model_dir: &Path) -> Result<Self> {
        if is_gguf(model_dir) {
            let files = tokenizer_files(model_dir)?;
            return Self::from_parts(model_dir, &files.tokenizer, &[files.config], &[files.ids]);
        }
        let path = model_dir.join("tokenizer.json");
        let bytes = fs::read(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound if model_dir.is_dir() => Error::format(
                &path,
                "not found; expected a Hugging Face folder with a fast tokenizer \
                 (transformers writes it: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR))",
            ),
            _ => Error::io(&path, e),
        })?;
        let sources = ["tokenizer_config.json", "special_tokens_map.json"]
            .map(|name| read_object(&model_dir.join(name)))
            .into_iter()
            .collect::<Result<Vec<_>>>()?;
        let configs = ["generation_config.json", "config.json"]
            .map(|name| read_object(&model_dir.join(name)))
            .into_iter()
            .collect::<Result<Vec<_>>>()?;
        Self::from_parts(&path, &bytes, &sources, &configs)
    }

    /// From the content of `tokenizer.json`, of files with special tokens, and of files with ids; `path` is for messages.
    fn from_parts(
        path: &Path,
        bytes: &[u8],
        sources: &[Map<String, Value>],
        configs: &[Map<String, Value>],
    ) -> Result<Self> {
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| {
            Error::format(path, format!("expected a tokenizer: {}", one_line(&e.to_string())))
        })?;
        let post_processor = inner.get_post_processor().cloned();
        inner.with_post_processor(None::<PostProcessorWrapper>);
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::format(path, one_line(&e.to_string())))?;
        let special_tokens: Vec<_> = SPECIAL_TOKEN_KEYS
            .into_iter()
            .filter_map(|key| Some((key, sources.iter().find_map(|source| token_text(source.get(key)?))?)))
            .collect();
        Ok(Self::assemble(inner, post_processor, special_tokens, configs))
    }

    fn assemble(
        inner: tokenizers::Tokenizer,
        post_processor: Option<PostProcessorWrapper>,
        mut special_tokens: Vec<(&'static str, String)>,
        configs: &[Map<String, Value>],
    ) -> Self {
        let configured =
            |key: &str| configs.iter().map(|c| token_ids(c.get(key))).find(|ids| !ids.is_empty());
        let mut id_of = |name: &'static str, key: &str| {
            if let Some((_, text)) = special_tokens.iter().find(|(n, _)| *n == name) {
                return inner.token_to_id(text);
            }
            let id = *configured(key)?.first()?;
            special_tokens.push((name, inner.id_to_token(id)?));
            Some(id)
        };
        let bos_token_id = id_of("bos_token", "bos_token_id");
        let eos_token_id = id_of("eos_token", "eos_token_id");
        let mut stop_ids = configured("eos_token_id").unwrap_or_default();
        stop_ids.extend(eos_token_id);
        stop_ids.sort_unstable();
        stop_ids.dedup();
        let added = inner.get_added_tokens_decoder();
        let mut special_ids: BTreeSet<u32> =
            added.iter().filter(|(_, t)| t.special).map(|(id, _)| *id).collect();
        special_ids.extend(&stop_ids);
        Tokenizer { inner, post_processor, special_tokens, bos_token_id, eos_token_id, stop_ids, special_ids }
    }

    /// Token ids of `text`. With `add_special_tokens` the post-processor of `tokenizer.json` adds what it
    /// adds in Hugging Face's tokenizers (a beginning-of-sequence token, for many models); special tokens
    /// written in the text are recognised either way.
    ///
    /// # Errors
    /// When the tokenizer can't represent the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        Ok(self.encode_with_spans(text, add_special_tokens)?.0)
    }

    /// As [`Tokenizer::encode`], with the bytes of `text` that each token stands for.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_spans(&self, text: &str, add_special_tokens: bool) -> Result<(Vec<u32>, Vec<Span>)> {
        let failed =
            |e: tokenizers::Error| Error::Unsupported(format!("tokenizer: {}", one_line(&e.to_string())));
        let encoding = self.inner.encode(text, false).map_err(failed)?;
        let ids = encoding.get_ids().to_vec();
        let spans = encoding.get_offsets().to_vec();
        match &self.post_processor {
            Some(processor) if add_special_tokens => {
                let processed = processor.process(encoding, None, true).map_err(failed)?;
                Ok(self.with_added(&processed, ids, spans))
            }
            _ => Ok((ids, spans)),
        }
    }

    /// The ids of `processed`, which hold `ids` in one piece, with empty spans for what was added.
    fn with_added(&self, processed: &Encoding, ids: Vec<u32>, spans: Vec<Span>) -> (Vec<u32>, Vec<Span>) {
        let all = processed.get_ids().to_vec();
        let start =
            (0..=all.len().saturating_sub(ids.len())).find(|i| all[*i..].starts_with(&ids)).unwrap_or(0);
        let mut all_spans = vec![(0, 0); all.len()];
        for (place, span) in all_spans[start..].iter_mut().zip(spans) {
            *place = span;
        }
        (all, all_spans)
    }

    /// The text of token ids.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.inner
            .decode(ids, skip_special_tokens)
            .map_err(|e| Error::Unsupported(format!("tokenizer: {}", one_line(&e.to_string()))))
    }

    /// Text of tokens that arrive one by one.
    pub fn decode_stream(&self, skip_special_tokens: bool) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, skip_special_tokens, ids: Vec::new(), shown: 0 }
    }

    /// The id of a token given by its text in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The vocabulary's text of a token.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Size of the vocabulary with added tokens.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The beginning-of-sequence token.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos_token_id
    }

    /// The end-of-sequence token.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos_token_id
    }

    /// Every token that ends a generated text: all of `eos_token_id` in `generation_config.json` (or
    /// `config.json`) and the tokenizer's own end-of-sequence token; ascending.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// Whether a token is a special one, of the kind that ends or begins a turn.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// The text of a named special token: `bos_token`, `eos_token`, `unk_token` or `pad_token`.
    pub fn special_token(&self, name: &str) -> Option<&str> {
        self.special_tokens.iter().find(|(n, _)| *n == name).map(|(_, text)| text.as_str())
    }

    /// The named special tokens with their texts.
    pub fn special_tokens(&self) -> &[(&'static str, String)] {
        &self.special_tokens
    }
}

/// Turns tokens into text as they come; characters of several tokens wait until they are whole.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special_tokens: bool,
    ids: Vec<u32>, // tokens already shown that the next ones' text depends on, then those not shown
    shown: usize,
}

impl DecodeStream<'_> {
    /// Adds a token; returns the text that is complete by it, which may be empty.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.pending()?;
        if text.is_empty() || text.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        Ok(text)
    }

    /// The text of tokens still held back: broken characters, if the tokens end within one.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String> {
        self.pending()
    }

    /// The text that the tokens not shown add to the shown ones before them. Some decoders drop a space at
    /// the start of a text, so new tokens are never decoded alone.
    fn pending(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.shown], self.skip_special_tokens)?;
        let after = self.tokenizer.decode(&self.ids, self.skip_special_tokens)?;
        Ok(after.strip_prefix(&before).unwrap_or_default().to_string())
    }
}

/// A JSON object; empty when the file doesn't exist.
pub(super) fn read_object(path: &Path) -> Result<Map<String, Value>> {
    if !path.exists() {
        return Ok(Map::new());
    }
    let text = crate::fs::read_text(path)?;
    serde_json::from_str(&text).map_err(|e| Error::format(path, format!("expected a JSON object: {e}")))
}

/// A special token is written as a string, or as an object with the string in `content`.
fn token_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Object(token) => Some(token.get("content")?.as_str()?.to_string()),
        _ => None,
    }
}

/// An id, or a list of them.
fn token_ids(value: Option<&Value>) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// A message of another library on one line.
pub(super) fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}
