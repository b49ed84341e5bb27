//! Sentencepiece vocabularies inside GGUF files, as the byte-pair encoding that transformers makes of them (5.23): merges
//! are the pairs of tokens that make a token, the best score first; bytes that no token has are tokens of their own.

use super::{Parts, bpe};
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};

/// What stands for a space.
const SPACE: &str = "\u{2581}";

/// The tokenizer of an architecture. Gemma's tokens of several spaces are respelled in `tokens`.
pub(super) fn parts(
    architecture: &str,
    tokens: &mut [String],
    scores: Option<&[f64]>,
    merges: Option<&Vec<Value>>,
    prefix: bool,
) -> Parts {
    let gemma = architecture.starts_with("gemma");
    if gemma {
        for token in tokens.iter_mut().filter(|t| t.contains(' ') && t.trim().is_empty()) {
            *token = SPACE.repeat(token.chars().count());
        }
    }
    // Gemma's scores don't follow the order of its merges; that of its tokens does.
    let by_place: Vec<f64> = (0..tokens.len()).map(|i| -(i as f64)).collect();
    let scores = scores.filter(|_| !gemma).unwrap_or(&by_place);
    let merges = merges.map_or_else(|| implied_merges(tokens, scores), |m| json!(m));
    let replace =
        |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let spaces = replace(" ", SPACE);
    let mut decoders = vec![replace(SPACE, " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
    let (normalizer, pre_tokenizer) = match architecture {
        _ if gemma => {
            let cut = json!({
                "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false,
            });
            (spaces, cut)
        }
        "phi3" => {
            decoders.push(strip);
            let prepend = json!({"type": "Prepend", "prepend": SPACE});
            (json!({"type": "Sequence", "normalizers": [prepend, spaces]}), Value::Null)
        }
        _ => {
            if prefix {
                decoders.push(strip);
            }
            let scheme = if prefix { "first" } else { "never" };
            let spaces =
                json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": false});
            (Value::Null, spaces)
        }
    };
    let mut settings = vec![("fuse_unk", json!(true)), ("byte_fallback", json!(true))];
    if gemma {
        settings.push(("unk_token", json!("<unk>")));
    }
    Parts {
        normalizer,
        pre_tokenizer,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: bpe(tokens, merges, &settings),
        adds_bos: true,
    }
}

/// A pair of tokens that make a token.
struct Merge<'a> {
    pieces: [&'a str; 2],
    ids: [usize; 2],
    lengths: [usize; 2], // in characters
    score: f64,
}

/// The pairs of tokens that make a token, by its score and the pairs' lengths, the largest first.
fn implied_merges(tokens: &[String], scores: &[f64]) -> Value {
    // Of tokens of one spelling the last one counts, in the place of the first.
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(i, t)| (t.as_str(), i)).collect();
    let mut seen = HashSet::new();
    let mut merges: Vec<Merge<'_>> = Vec::new();
    for token in tokens.iter().filter(|token| seen.insert(token.as_str())) {
        let (first, length) = (merges.len(), token.chars().count());
        for (place, (at, _)) in token.char_indices().enumerate().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                let score = scores[ids[token.as_str()]];
                let lengths = [place, length - place];
                merges.push(Merge { pieces: [left, right], ids: [*l, *r], lengths, score });
            }
        }
        merges[first..].sort_by_key(|merge| merge.ids);
    }
    merges.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.lengths.cmp(&a.lengths)));
    json!(merges.iter().map(|merge| merge.pieces).collect::<Vec<_>>())
}
