//! Which part of a rendered chat the assistant wrote, its turn's end included.
//!
//! A template says nothing about this, so it is found by rendering: marks set around the answers show where a
//! template puts them, the generation prompt shows where the assistant begins to write, and the chat up to a
//! turn shows where that turn ends.

use super::template::ChatTemplate;
use super::tokenizer::Tokenizer;
use super::{Example, Message};
use crate::backend::IGNORE_INDEX;
use crate::error::{Error, Result};

/// A turn of the assistant in a rendered chat, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Where the assistant begins to write: right after the generation prompt.
    pub start: usize,
    /// Where the turn's own text ends.
    pub end: usize,
    /// Where what the template writes to close the turn ends.
    pub turn_end: usize,
}

/// A chat as its template writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenderedChat {
    /// The text.
    pub text: String,
    /// The assistant's turns, in order.
    pub answers: Vec<Answer>,
}

const ASSISTANT: &str = "assistant";

impl RenderedChat {
    /// Renders a chat and finds the assistant's turns in it.
    ///
    /// # Errors
    /// What the template raises, and when it does not show where an answer lies.
    pub fn new(template: &ChatTemplate, messages: &[Message]) -> Result<Self> {
        let text = template.render(messages, false)?;
        let turns: Vec<usize> = (0..messages.len()).filter(|i| messages[*i].role == ASSISTANT).collect();
        if turns.is_empty() {
            return Ok(RenderedChat { text, answers: Vec::new() });
        }
        let marks = Marks::unused_in(messages);
        let unclear = |turn: usize| {
            Error::Unsupported(format!(
                "chat template: can't tell where message {} lies in the rendered chat, so the loss can't be \
                 taken on answers alone; --train-on-prompt takes it on everything",
                turn + 1
            ))
        };
        let starts = marks.places(template, messages, &text, true);
        let ends = match &starts {
            Some(pairs) => pairs.iter().map(|pair| pair.1).collect(),
            // A template may cut an answer's beginning off, and a mark with it.
            None => marks
                .places(template, messages, &text, false)
                .ok_or_else(|| unclear(turns[0]))?
                .iter()
                .map(|pair| pair.1)
                .collect::<Vec<_>>(),
        };
        let mut answers: Vec<Answer> = Vec::with_capacity(turns.len());
        for (k, (&turn, &end)) in turns.iter().zip(&ends).enumerate() {
            let after_last = answers.last().map_or(0, |last| last.turn_end);
            let marked = starts.as_ref().map(|pairs| pairs[k].0);
            // A template without a generation prompt doesn't show where the assistant begins.
            let without = template.render(&messages[..turn], false).ok();
            let prompted = template
                .render(&messages[..turn], true)
                .ok()
                .filter(|prompt| marked.is_none() || without.as_ref() != Some(prompt))
                .filter(|prompt| text.starts_with(prompt.as_str()))
                .map(|prompt| prompt.len())
                .filter(|start| (after_last..=marked.unwrap_or(end)).contains(start));
            let start = prompted.or(marked).ok_or_else(|| unclear(turn))?;
            let turn_end = marks.turn_end(template, messages, turn, &text, end);
            answers.push(Answer { start, end, turn_end });
        }
        Ok(RenderedChat { text, answers })
    }

    /// Tokens and labels: the answers count, and of what closes a turn everything up to its first special
    /// token, which is what the model must write to stop.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn tokenize(&self, tokenizer: &Tokenizer) -> Result<Example> {
        let (input_ids, spans) = tokenizer.encode_with_spans(&self.text, false)?;
        let mut labels = vec![IGNORE_INDEX; input_ids.len()];
        for answer in &self.answers {
            for i in overlapping(&spans, answer.start, answer.end) {
                labels[i] = input_ids[i] as i32;
            }
            for i in overlapping(&spans, answer.end, usize::MAX) {
                let id = input_ids[i];
                let beyond = spans[i].0 >= answer.turn_end;
                // What begins the next turn counts only where the model stops by it.
                if !beyond || tokenizer.stop_ids().contains(&id) {
                    labels[i] = id as i32;
                }
                if beyond || tokenizer.is_special(id) {
                    break;
                }
            }
        }
        Ok(Example { input_ids, labels })
    }
}

/// The tokens that stand for some of the bytes in `start..end`.
pub(super) fn overlapping(spans: &[(usize, usize)], start: usize, end: usize) -> impl Iterator<Item = usize> {
    (0..spans.len()).filter(move |i| spans[*i].0 < end && spans[*i].1 > start && spans[*i].0 < spans[*i].1)
}

/// Two characters that no message contains.
struct Marks {
    start: char,
    end: char,
}

impl Marks {
    fn unused_in(messages: &[Message]) -> Self {
        // Private-use characters; a chat that contains all 6400 of them can't be marked and is refused later.
        let mut free = ('\u{e000}'..='\u{f8ff}').filter(|c| !messages.iter().any(|m| m.content.contains(*c)));
        Marks { start: free.next().unwrap_or('\u{e000}'), end: free.next().unwrap_or('\u{e001}') }
    }

    /// A message with marks around its text, within white space that templates may trim.
    fn around(&self, message: &Message, with_start: bool) -> Message {
        let content = &message.content;
        let head = content.len() - content.trim_start().len();
        let tail = content.trim_end().len().max(head);
        let start = if with_start { String::from(self.start) } else { String::new() };
        let content =
            format!("{}{start}{}{}{}", &content[..head], &content[head..tail], self.end, &content[tail..]);
        Message { content, ..message.clone() }
    }

    /// Where the marks around the assistant's turns come out, in bytes of `text`, the rendering without marks.
    /// Nothing when a mark is lost or changes what the template writes.
    fn places(
        &self,
        template: &ChatTemplate,
        messages: &[Message],
        text: &str,
        with_start: bool,
    ) -> Option<Vec<(usize, usize)>> {
        let mark = |m: &Message| if m.role == ASSISTANT { self.around(m, with_start) } else { m.clone() };
        let marked = template.render(&messages.iter().map(mark).collect::<Vec<_>>(), false).ok()?;
        let mut plain = String::with_capacity(text.len());
        let (mut starts, mut ends) = (Vec::new(), Vec::new());
        for c in marked.chars() {
            if c == self.start {
                starts.push(plain.len());
            } else if c == self.end {
                ends.push(plain.len());
            } else {
                plain.push(c);
            }
        }
        if !with_start {
            starts.clone_from(&ends);
        }
        let turns = messages.iter().filter(|m| m.role == ASSISTANT).count();
        let in_order =
            starts.len() == turns && ends.len() == turns && starts.iter().zip(&ends).all(|(s, e)| s <= e);
        (plain == text && in_order).then(|| starts.into_iter().zip(ends).collect())
    }

    /// Where turn `turn` is closed in `text`, given where its own text ends: as far as the chat that stops
    /// there goes on alike.
    fn turn_end(
        &self,
        template: &ChatTemplate,
        messages: &[Message],
        turn: usize,
        text: &str,
        end: usize,
    ) -> usize {
        if turn + 1 == messages.len() {
            return text.len();
        }
        let mut head = messages[..=turn].to_vec();
        head[turn] = self.around(&head[turn], false);
        let Ok(rendered) = template.render(&head, false) else { return end };
        let Some((_, closing)) = rendered.rsplit_once(self.end) else { return end };
        let alike = closing.chars().zip(text[end..].chars()).take_while(|(a, b)| a == b);
        end + alike.map(|(a, _)| a.len_utf8()).sum::<usize>()
    }
}
