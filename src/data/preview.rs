//! Shows an example as the model sees it, with what counts for the loss marked.

use super::Example;
use super::tokenizer::Tokenizer;
use crate::backend::IGNORE_INDEX;
use crate::error::Result;

/// How tokens that count are set off from the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marking {
    /// Between `«` and `»`.
    Quotes,
    /// Bold green, for terminals.
    Colour,
}

impl Marking {
    fn pair(self) -> (&'static str, &'static str) {
        match self {
            Marking::Quotes => ("«", "»"),
            Marking::Colour => ("\u{1b}[1;32m", "\u{1b}[0m"),
        }
    }
}

/// The text of an example, special tokens included, with each stretch of tokens that count marked.
///
/// # Errors
/// As [`Tokenizer::decode`].
pub fn preview(tokenizer: &Tokenizer, example: &Example, marking: Marking) -> Result<String> {
    let (open, close) = marking.pair();
    let mut stream = tokenizer.decode_stream(false);
    let mut out = String::new();
    let mut marked = false;
    for (i, (id, label)) in example.input_ids.iter().zip(&example.labels).enumerate() {
        // The first token of a sequence is never predicted.
        let counts = i > 0 && *label != IGNORE_INDEX;
        if counts != marked {
            out.push_str(if counts { open } else { close });
            marked = counts;
        }
        out.push_str(&stream.push(*id)?);
    }
    out.push_str(&stream.finish()?);
    if marked {
        out.push_str(close);
    }
    Ok(out)
}
