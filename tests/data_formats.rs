//! Rows of data files: every format is recognised by its keys, and whatever is not one is refused by row.

use lowrank::data::jsonl::{self, Summary};
use lowrank::data::{Format, Message, Record};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::PathBuf;
use tempfile::TempDir;

fn file(name: &str, content: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    (folder, path)
}

fn read(name: &str, content: impl AsRef<[u8]>) -> lowrank::Result<(Summary, Vec<(usize, Record)>)> {
    let (_folder, path) = file(name, content);
    let mut records = Vec::new();
    let summary = jsonl::read(&path, |row, record| {
        records.push((row, record));
        Ok(())
    })?;
    Ok((summary, records))
}

/// The message of the error without the path.
fn refused(name: &str, content: impl AsRef<[u8]>) -> String {
    let message = read(name, content).expect_err("the file must be refused").to_string();
    assert!(!message.contains('\n'), "one line: {message}");
    message.split_once(": ").expect("the file is named").1.to_string()
}

#[test]
fn each_format_is_recognised_by_its_keys() {
    let alpaca = Record::Alpaca { instruction: "i".into(), input: "".into(), output: "o".into() };
    let chat = Record::Chat(vec![Message::new("user", "q"), Message::new("assistant", "a")]);
    let with_system = Record::Chat(vec![
        Message::new("system", "s"),
        Message::new("user", "q"),
        Message::new("assistant", "a"),
    ]);
    let cases = [
        (json!({"text": "t"}), Format::Text, Record::Text("t".into())),
        (
            json!({"prompt": "p", "completion": "c"}),
            Format::PromptCompletion,
            Record::PromptCompletion { prompt: "p".into(), completion: "c".into() },
        ),
        (json!({"instruction": "i", "input": "", "output": "o"}), Format::Alpaca, alpaca.clone()),
        (
            json!({"instruction": "i", "input": null, "output": "o", "text": "t"}),
            Format::Alpaca,
            alpaca.clone(),
        ),
        (json!({"instruction": "i", "output": "o", "history": []}), Format::Alpaca, alpaca),
        (
            json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
            Format::Messages,
            chat.clone(),
        ),
        (
            json!({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
            Format::ShareGpt,
            chat,
        ),
        (
            json!({"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "gpt", "value": "a"}]}),
            Format::ShareGpt,
            with_system.clone(),
        ),
        (json!({"system": "s", "instruction": "q", "input": "", "output": "a"}), Format::Alpaca, with_system),
    ];
    for (row, format, record) in cases {
        for (name, content) in [("a.json", json!([row]).to_string()), ("a.jsonl", row.to_string())] {
            let (summary, records) = read(name, content).unwrap();
            assert_eq!(summary.format, format, "{row}");
            assert_eq!(records, [(1, record.clone())], "{row}");
        }
    }
    let (summary, records) = read("a.txt", "\u{feff}one\ntwo\n").unwrap();
    assert_eq!((summary.format, summary.rows), (Format::PlainText, 1));
    assert_eq!(records, [(1, Record::Text("one\ntwo\n".into()))]);
}

#[test]
fn keys_that_are_not_used_are_reported_and_message_keys_kept() {
    let row = json!({"id": 7, "source": "x", "messages": [
        {"role": "user", "content": "q", "name": "Ann"}, {"role": "assistant", "content": "a"}]});
    let (summary, records) = read("a.jsonl", row.to_string()).unwrap();
    assert_eq!(summary.ignored_keys, ["id", "source"]);
    let Record::Chat(messages) = &records[0].1 else { panic!("{records:?}") };
    assert_eq!(messages[0].extra["name"], "Ann");
}

#[test]
fn lines_may_be_blank_and_a_byte_order_mark_is_skipped() {
    let (summary, records) = read("a.jsonl", "\u{feff}\r\n{\"text\":\"a\"}\r\n\n{\"text\":\"b\"}").unwrap();
    assert_eq!(summary.rows, 2);
    assert_eq!(records[1].1, Record::Text("b".into()));
}

#[test]
fn bad_rows_are_refused_with_their_number() {
    let text = |n: usize| "{\"text\":\"a\"}\n".repeat(n);
    let cases = [
        (text(2) + "{\"prompt\":\"p\",\"completion\":\"c\"}", "row 3: the rows before are text rows"),
        (text(1) + "{\"title\":\"a\",\"body\":\"b\"}", "found `title`, `body`"),
        (text(1) + "{}", "row 2: expected the keys of one of"),
        (text(1) + "[1]", "row 2: expected an object {...}, found an array"),
        (text(1) + "{\"text\": 3}", "row 2: key `text`: expected a string, found a number"),
        (text(1) + "{\"text\": \"a\"", "row 2: expected JSON, found: EOF"),
        ("{\"prompt\":\"p\"}".into(), "row 1: key `completion` is missing"),
        ("{\"instruction\":\"p\",\"response\":\"x\"}".into(), "row 1: key `output` is missing"),
        ("{\"messages\":[]}".into(), "row 1: key `messages`: expected at least one turn, found none"),
        ("{\"messages\":\"a\"}".into(), "expected an array, found a string"),
        ("{\"messages\":[{\"role\":\"user\"}]}".into(), "messages[0]: key `content` is missing"),
        ("{\"conversations\":[{\"from\":\"alien\",\"value\":\"v\"}]}".into(), "found `alien`"),
        ("{\"text\":\"a\",\"chosen\":\"b\",\"rejected\":\"c\"}".into(), "preference data (key `chosen`)"),
        (
            "{\"instruction\":\"i\",\"output\":\"o\",\"history\":[[\"a\",\"b\"]]}".into(),
            "the key `history` is not supported",
        ),
    ];
    for (content, expected) in cases {
        let message = refused("a.jsonl", &content);
        assert!(message.contains(expected), "{content}\n{message}");
    }
}

#[test]
fn bad_files_are_refused() {
    assert_eq!(refused("a.jsonl", ""), "expected rows of data, found none");
    assert_eq!(refused("a.json", " \n[ ] "), "expected rows of data, found none");
    assert_eq!(refused("a.txt", "  \n"), "expected text, found an empty file");
    assert!(refused("a.txt", b"abc\xff").contains("invalid byte at offset 3"));
    assert!(
        refused("a.jsonl", b"{\"text\":\"a\"}\n{\"text\":\"\xc3\"}").starts_with("row 2: expected UTF-8")
    );
    assert!(refused("a.json", b"[{\"text\":\"\xc3\"}]").starts_with("row 1: expected JSON"));
    assert!(
        refused("a.json", "[{\"text\":\"a\"},\n{\"text\":\"b\"").contains("row 2: expected JSON, found: EOF")
    );
    assert!(refused("a.json", "[{\"text\":\"a\"},{\"text\":1}]").starts_with("row 2: key `text`"));
    assert!(refused("a.json", "[{\"text\":\"a\"}] x").contains("trailing characters"));
    assert!(refused("a.json", "{\n\"data\": []\n}").contains("expected an array of objects"));
    assert!(
        refused("a.csv", "text\na")
            .contains("expected a .json, .jsonl or .txt file, found the extension `csv`")
    );
    assert!(refused("a.json", "[".repeat(100_000)).contains("recursion limit"));
    let missing = jsonl::read(&PathBuf::from("/no/such.jsonl"), |_, _| Ok(())).unwrap_err().to_string();
    assert!(missing.starts_with("/no/such.jsonl: "), "{missing}");
}

#[test]
fn what_the_visitor_returns_stops_the_reading() {
    for (name, content) in
        [("a.json", "[{\"text\":\"a\"},{\"text\":\"b\"}]"), ("a.jsonl", "{\"text\":\"a\"}\n{\"text\":\"b\"}")]
    {
        let (_folder, path) = file(name, content);
        let mut seen = 0;
        let stopped = jsonl::read(&path, |row, _| {
            seen += 1;
            Err(lowrank::Error::data(&path, row, "enough"))
        });
        assert!(stopped.unwrap_err().to_string().ends_with("row 1: enough"));
        assert_eq!(seen, 1);
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        ".{0,6}".prop_map(Value::from),
    ];
    let key = prop_oneof![
        Just("text"),
        Just("prompt"),
        Just("completion"),
        Just("instruction"),
        Just("input"),
        Just("output"),
        Just("messages"),
        Just("conversations"),
        Just("role"),
        Just("content"),
        Just("from"),
        Just("value"),
        Just("system"),
        Just("history"),
        Just("chosen"),
    ];
    leaf.prop_recursive(4, 24, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key.clone(), inner), 0..4).prop_map(|pairs| Value::Object(
                pairs.into_iter().map(|(k, v)| (k.to_string(), v)).collect()
            )),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_bytes_give_rows_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..80), start in 0..4usize) {
        let mut content = ["", "[{\"text\":\"", "{\"text\":\"", "[{\"text\":\"a\"},"][start].as_bytes().to_vec();
        content.extend(bytes);
        for name in ["a.json", "a.txt"] {
            let _ = read(name, &content);
        }
    }

    #[test]
    fn an_array_and_lines_are_read_alike(rows in prop::collection::vec(any_json(), 1..4)) {
        let array = read("a.json", Value::from(rows.clone()).to_string());
        let lines = read("a.jsonl", rows.iter().map(|r| format!("{r}\n")).collect::<String>());
        // The first byte decides what a file is, so lines of arrays are no array of rows.
        if !rows[0].is_array() {
            match (array, lines) {
                (Ok(a), Ok(b)) => prop_assert_eq!(a, b),
                (Err(a), Err(b)) => prop_assert_eq!(
                    a.to_string().split_once(": ").map(|p| p.1.to_string()),
                    b.to_string().split_once(": ").map(|p| p.1.to_string())
                ),
                (a, b) => prop_assert!(false, "{:?} {:?}", a, b),
            }
        }
    }
}
