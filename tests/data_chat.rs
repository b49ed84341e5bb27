//! Tokenizer and chat templates as Hugging Face's, and which tokens of a chat count for the loss.

#![cfg(feature = "text")]

use lowrank::data::chat::RenderedChat;
use lowrank::data::{ChatTemplate, Example, Marking, Message, Tokenizer, preview};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}

fn rows(path: &str) -> Vec<Value> {
    serde_json::from_str(&fs::read_to_string(golden(path)).unwrap()).unwrap()
}

fn tokenizer() -> Tokenizer {
    Tokenizer::load(&golden("tokenizer")).unwrap()
}

fn template(name: &str) -> ChatTemplate {
    let text = fs::read_to_string(golden(&format!("chat/{name}.jinja"))).unwrap();
    ChatTemplate::new(&text, tokenizer().special_tokens().to_vec()).unwrap()
}

fn messages(value: &Value) -> Vec<Message> {
    let message = |m: &Value| {
        let mut extra = m.as_object().unwrap().clone();
        extra.remove("role");
        extra.remove("content");
        let text = |key: &str| m[key].as_str().unwrap().to_string();
        Message { role: text("role"), content: text("content"), extra }
    };
    value.as_array().unwrap().iter().map(message).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn chat(turns: &[(&str, &str)]) -> Vec<Message> {
    turns.iter().map(|(role, content)| Message::new(*role, *content)).collect()
}

const TWO_TURNS: [(&str, &str); 5] = [
    ("system", "Be brief."),
    ("user", "What is the capital of France?"),
    ("assistant", "Paris."),
    ("user", "And of Spain?"),
    ("assistant", "Madrid."),
];

/// The tokens that count, one string per stretch of them.
fn counted(template: &ChatTemplate, messages: &[Message]) -> Vec<String> {
    let tokenizer = tokenizer();
    let example = RenderedChat::new(template, messages).unwrap().tokenize(&tokenizer).unwrap();
    stretches(&tokenizer, &example)
}

fn stretches(tokenizer: &Tokenizer, example: &Example) -> Vec<String> {
    let mut runs: Vec<Vec<u32>> = vec![vec![]];
    for (id, label) in example.input_ids.iter().zip(&example.labels) {
        match *label {
            -100 => runs.push(vec![]),
            label => {
                assert_eq!(label as u32, *id);
                runs.last_mut().unwrap().push(*id);
            }
        }
    }
    runs.iter().filter(|run| !run.is_empty()).map(|run| tokenizer.decode(run, false).unwrap()).collect()
}

#[test]
fn tokens_are_those_of_hugging_face() {
    let tokenizer = tokenizer();
    for row in rows("tokenizer.json") {
        let text = row["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids(&row["plain"]), "{text:?}");
        let special = tokenizer.encode(text, true).unwrap();
        assert_eq!(special, ids(&row["special"]), "{text:?}");
        assert_eq!(tokenizer.decode(&special, true).unwrap(), row["decoded"].as_str().unwrap());

        let (_, spans) = tokenizer.encode_with_spans(text, true).unwrap();
        assert_eq!(spans[0], (0, 0));
        let covered = spans.iter().fold(0, |end, (a, b)| if *a <= end { end.max(*b) } else { end });
        assert_eq!(covered, text.len(), "the spans leave no gap in {text:?}: {spans:?}");

        let mut stream = tokenizer.decode_stream(true);
        let pieces: Vec<String> = special.iter().map(|id| stream.push(*id).unwrap()).collect();
        assert_eq!(pieces.concat() + &stream.finish().unwrap(), row["decoded"].as_str().unwrap());
        assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')) || text.contains('\u{fffd}'));
    }
}

#[test]
fn special_tokens_come_from_the_folders_files() {
    let tokenizer = tokenizer();
    assert_eq!(tokenizer.special_token("bos_token"), Some("<s>"));
    assert_eq!(tokenizer.special_token("eos_token"), Some("</s>"));
    assert_eq!(tokenizer.bos_token_id(), tokenizer.token_to_id("<s>"));
    assert_eq!(tokenizer.eos_token_id(), tokenizer.token_to_id("</s>"));
    let stops = ["<|im_end|>", "</s>", "<|eot_id|>"].map(|token| tokenizer.token_to_id(token).unwrap());
    assert_eq!(tokenizer.stop_ids(), stops);

    // Without names, the ids of config.json say which tokens they are.
    let folder = tempfile::tempdir().unwrap();
    fs::copy(golden("tokenizer/tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    fs::write(folder.path().join("config.json"), r#"{"bos_token_id": 3, "eos_token_id": 0}"#).unwrap();
    let bare = Tokenizer::load(folder.path()).unwrap();
    assert_eq!(bare.special_token("eos_token"), Some("<|endoftext|>"));
    assert_eq!((bare.bos_token_id(), bare.stop_ids()), (Some(3), &[0][..]));
}

#[test]
fn a_tokenizer_that_is_missing_or_broken_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let load = || Tokenizer::load(folder.path()).unwrap_err().to_string();
    assert!(load().contains("tokenizer.json: not found; expected a Hugging Face folder"));
    fs::write(folder.path().join("tokenizer.json"), "{\"model\": 3}").unwrap();
    assert!(load().contains("tokenizer.json: expected a tokenizer:"), "{}", load());
    fs::copy(golden("tokenizer/tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    fs::write(folder.path().join("tokenizer_config.json"), "[]").unwrap();
    assert!(load().contains("tokenizer_config.json: expected a JSON object"), "{}", load());
}

#[test]
fn templates_render_as_in_transformers() {
    let mut compared = 0;
    for name in ["chatml", "thinking", "llama3", "mistral", "zephyr", "generation", "python"] {
        let template = template(name);
        for row in rows(&format!("chat/{name}.json")) {
            let rendered =
                template.render(&messages(&row["messages"]), row["add_generation_prompt"].as_bool().unwrap());
            match row["text"].as_str() {
                Some(text) => assert_eq!(rendered.unwrap(), text, "{name}: {}", row["chat"]),
                None => {
                    let raised = row["raises"].as_str().unwrap();
                    let message = rendered.unwrap_err().to_string();
                    assert!(message.contains(raised), "{name}: {}: {message}", row["chat"]);
                }
            }
            compared += 1;
        }
    }
    assert_eq!(compared, 7 * 10 * 2);
}

#[test]
fn the_mask_is_that_of_generation_blocks() {
    // This template says by `{% generation %}` what transformers takes for the assistant's text.
    let (template, tokenizer) = (template("generation"), tokenizer());
    for row in rows("chat/generation.json") {
        let Some(mask) = row["assistant_masks"].as_array() else { continue };
        let rendered = RenderedChat::new(&template, &messages(&row["messages"])).unwrap();
        let example = rendered.tokenize(&tokenizer).unwrap();
        assert_eq!(example.input_ids, ids(&row["input_ids"]), "{}", row["chat"]);
        // transformers loses an answer that begins with white space: its tokenizers' offsets leave that out.
        let spaced = |m: &Message| m.role == "assistant" && m.content.starts_with(char::is_whitespace);
        if messages(&row["messages"]).iter().any(spaced) {
            continue;
        }
        // An end token within an answer's own text ends nothing for transformers either.
        let ours: Vec<bool> = example.labels.iter().map(|label| *label != -100).collect();
        let theirs: Vec<bool> = mask.iter().map(|m| *m == 1).collect();
        assert_eq!(ours, theirs, "{}", row["chat"]);
    }
}

#[test]
fn every_answer_counts_with_the_token_that_ends_it() {
    let two_turns = chat(&TWO_TURNS);
    let cases = [
        ("chatml", ["Paris.<|im_end|>", "Madrid.<|im_end|>"]),
        ("llama3", ["Paris.<|eot_id|>", "Madrid.<|eot_id|>"]),
        ("mistral", [" Paris.</s>", " Madrid.</s>"]),
        ("zephyr", ["Paris.</s>", "Madrid.</s>"]),
        ("generation", ["Paris.<|im_end|>", "Madrid.<|im_end|>"]),
        // The template opens the last answer with an empty thought, which the prompt leaves to the model.
        ("thinking", ["Paris.<|im_end|>", "<think>\n\n</think>\n\nMadrid.<|im_end|>"]),
    ];
    for (name, expected) in cases {
        assert_eq!(counted(&template(name), &two_turns), expected, "{name}");
    }
}

#[test]
fn answers_are_found_however_the_template_treats_them() {
    let thoughts = chat(&[
        ("user", "q"),
        ("assistant", "<think>\na\n</think>\n\nParis."),
        ("user", "q"),
        ("assistant", "<think>\nb\n</think>\n\nMadrid."),
    ]);
    let expected = ["Paris.<|im_end|>", "<think>\nb\n</think>\n\nMadrid.<|im_end|>"];
    assert_eq!(counted(&template("thinking"), &thoughts), expected);

    let trimmed = chat(&[("user", "q"), ("assistant", "  a \n"), ("user", "q"), ("assistant", "\n\n")]);
    assert_eq!(counted(&template("llama3"), &trimmed), ["a<|eot_id|>", "<|eot_id|>"]);
    // The prompt's last line end and the answer's first share a token, which counts.
    assert_eq!(counted(&template("chatml"), &trimmed), ["  a \n<|im_end|>", "\n\n\n<|im_end|>"]);

    // The same words elsewhere, and marks' own characters, confuse nothing.
    let repeated =
        chat(&[("user", "Paris."), ("assistant", "Paris."), ("user", "Paris.\u{e000}"), ("assistant", "")]);
    assert_eq!(counted(&template("chatml"), &repeated), ["Paris.<|im_end|>", "<|im_end|>"]);

    let first = chat(&[("assistant", "Hello."), ("user", "q")]);
    assert_eq!(counted(&template("chatml"), &first), ["Hello.<|im_end|>"]);
    assert!(counted(&template("chatml"), &chat(&[("user", "q")])).is_empty());
}

#[test]
fn turns_may_be_closed_by_words_or_by_what_begins_the_next_one() {
    let build = |text: &str| ChatTemplate::new(text, tokenizer().special_tokens().to_vec()).unwrap();
    let words = build(
        "{% for m in messages %}### {{ m.role }}: {{ m.content }} (end)\n{% endfor %}\
         {% if add_generation_prompt %}### assistant:{% endif %}",
    );
    assert_eq!(counted(&words, &chat(&TWO_TURNS)), [" Paris. (end)\n", " Madrid. (end)\n"]);
    // `<|im_end|>` is in the model's list of end tokens, `<|im_start|>` is not.
    let opened = build("{% for m in messages %}<|im_end|>{{ m.role }}\n{{ m.content }}{% endfor %}");
    assert_eq!(counted(&opened, &chat(&TWO_TURNS)), ["Paris.<|im_end|>", "Madrid."]);
    let opened = build("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}");
    assert_eq!(counted(&opened, &chat(&TWO_TURNS)), ["Paris.", "Madrid."]);
}

#[test]
fn a_template_that_hides_the_answers_is_refused() {
    let hiding = ChatTemplate::new("{{ messages | length }}", vec![]).unwrap();
    let message = RenderedChat::new(&hiding, &chat(&TWO_TURNS)).unwrap_err().to_string();
    assert!(
        message.contains("can't tell where message 3 lies") && message.contains("--train-on-prompt"),
        "{message}"
    );
}

#[test]
fn the_template_comes_from_its_file_then_the_configuration_then_the_default() {
    let folder = tempfile::tempdir().unwrap();
    let load = || ChatTemplate::load(folder.path(), &tokenizer());
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    let question = chat(&[("user", "q"), ("assistant", "a")]);
    let render = || load().unwrap().render(&question, false).unwrap();

    assert!(load().unwrap().is_default());
    assert_eq!(render(), "q</s>a</s>");
    assert_eq!(counted(&load().unwrap(), &question), ["a</s>"]);
    write("tokenizer_config.json", r#"{"chat_template": "one"}"#);
    assert_eq!(render(), "one");
    write(
        "tokenizer_config.json",
        r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#,
    );
    assert_eq!(render(), "d");
    write("tokenizer_config.json", r#"{"chat_template": [{"name": "tool_use", "template": "t"}]}"#);
    assert!(load().unwrap_err().to_string().contains("expected a template named `default`"));
    write("tokenizer_config.json", r#"{"chat_template": 3}"#);
    assert!(load().unwrap_err().to_string().contains("`chat_template`: expected a string"));
    write("chat_template.jinja", "two");
    assert_eq!(render(), "two");
    assert!(!load().unwrap().is_default());
    write("chat_template.jinja", "{% for %}");
    let message = load().unwrap_err().to_string();
    assert!(
        message.contains("chat_template.jinja: expected a Jinja template:") && message.contains("line 1"),
        "{message}"
    );
}

#[test]
fn a_preview_shows_special_tokens_and_marks_what_counts() {
    let tokenizer = tokenizer();
    let rendered = RenderedChat::new(&template("chatml"), &chat(&TWO_TURNS[1..])).unwrap();
    let example = rendered.tokenize(&tokenizer).unwrap();
    let shown = preview(&tokenizer, &example, Marking::Quotes).unwrap();
    assert!(shown.contains("<|im_start|>assistant\n«Paris.<|im_end|>»\n<|im_start|>user\n"), "{shown}");
    assert_eq!(shown.replace(['«', '»'], ""), rendered.text);
    let coloured = preview(&tokenizer, &example, Marking::Colour).unwrap();
    assert!(coloured.contains("\u{1b}[1;32mMadrid.<|im_end|>\u{1b}[0m\n"));
}
