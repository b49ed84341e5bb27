//! The `README.md` beside an adapter: what a hub of models and its users look for, in the keys of PEFT's model cards.

use super::reader::{PEFT_VERSION, Settings};
use crate::error::Result;
use crate::fs::write_atomic_bytes;
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::Path;

/// A text as YAML: plain where nothing in it means something there.
fn yaml(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    let starts = text.starts_with(|c: char| c.is_ascii_alphabetic() || "/.".contains(c));
    let is_word = ["null", "true", "false", "yes", "no", "on", "off"].contains(&&*text.to_lowercase());
    match starts && text.chars().all(plain) && !is_word {
        true => text.to_string(),
        false => json!(text).to_string(),
    }
}

/// The card of an adapter with these settings; `None` where the file isn't one of PEFT's.
fn card(settings: &Settings) -> Option<String> {
    let text = |key: &str| settings.get(key).and_then(Value::as_str);
    let kind = text("peft_type").filter(|kind| *kind != "BITFIT")?;
    let base = text("base_model_name_or_path");
    let mut tags = vec!["transformers".to_string()];
    if kind == "LORA" {
        tags.push("lora".into());
    }
    tags.extend(base.map(|base| format!("base_model:adapter:{base}")));
    tags.sort();
    let mut out = "---\n".to_string();
    if let Some(base) = base {
        let _ = writeln!(out, "base_model: {}", yaml(base));
    }
    out.push_str("library_name: peft\npipeline_tag: text-generation\ntags:\n");
    for tag in &tags {
        // A colon within a word needs no quotes, and is all that a tag has beyond its base's name.
        let quoted = tag.strip_prefix("base_model:adapter:").map_or_else(
            || yaml(tag),
            |base| match yaml(base) == base {
                true => tag.clone(),
                false => json!(tag).to_string(),
            },
        );
        let _ = writeln!(out, "- {quoted}");
    }
    let of = base.map_or(String::new(), |base| format!(" of `{base}`"));
    let load = json!(base.unwrap_or("the base model")).to_string();
    let _ = write!(
        out,
        "---\n\n# {kind} adapter{of}\n\nIts settings are in `adapter_config.json`, its weights in `adapter_model.safetensors`.\n\n\
         ```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n\
         base = AutoModelForCausalLM.from_pretrained({load})\nmodel = PeftModel.from_pretrained(base, \".\")  # this folder\n\
         ```\n\nWritten by lowrank {} in the format of PEFT {PEFT_VERSION}.\n",
        env!("CARGO_PKG_VERSION"),
    );
    Some(out)
}

/// Writes the card, unless the folder has a `README.md`, which may be the user's.
///
/// # Errors
/// When it can't be written.
pub(super) fn write_card(settings: &Settings, dir: &Path) -> Result<()> {
    let path = dir.join("README.md");
    match card(settings) {
        Some(text) if !path.exists() => write_atomic_bytes(&path, text.as_bytes()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(base: Option<&str>, kind: &str) -> Option<String> {
        card(&Settings::from([("base_model_name_or_path", json!(base)), ("peft_type", json!(kind))]))
    }

    #[test]
    fn cards_have_pefts_keys() {
        let lora = of(Some("org/base-1.5"), "LORA").unwrap();
        let head = "---\nbase_model: org/base-1.5\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n\
                    - base_model:adapter:org/base-1.5\n- lora\n- transformers\n---\n";
        assert!(lora.starts_with(head), "{lora}");
        let odd = of(Some("C: \"x\""), "IA3").unwrap();
        assert!(
            odd.contains("base_model: \"C: \\\"x\\\"\"\n")
                && odd.contains("- \"base_model:adapter:C: \\\"x\\\"\"\n")
        );
        assert!(!of(None, "VERA").unwrap().contains("base_model:"));
        assert_eq!(of(None, "BITFIT"), None);
    }
}
