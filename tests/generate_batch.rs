//! Rows of one batch that different adapters continue: each has the bits that it has alone.

mod common;

use common::golden::path;
use common::training::{bits, method, move_all};
use lowrank::DType;
use lowrank::adapter::{AdapterSet, load_adapter};
use lowrank::backend::cpu::Cpu;
use lowrank::generate::{GenerationConfig, Prompt, generate, generate_batch};
use lowrank::model::{LoadOptions, Model, RowSlot};
use lowrank::quant::{Format, QuantConfig};
use lowrank::rng::{Philox, PhiloxKey, Stream};
use std::path::Path;

/// Adapters whose parameters are moved from where they start, by name.
const ADAPTERS: [(&str, &str); 6] = [
    ("wide", r#"{"peft_type": "LORA", "r": 16, "init_lora_weights": false, "target_modules": "all-linear"}"#),
    ("narrow", r#"{"peft_type": "LORA", "r": 3, "use_rslora": true, "init_lora_weights": false}"#),
    ("one", r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 4, "init_lora_weights": false}"#),
    ("directions", r#"{"peft_type": "LORA", "r": 4, "use_dora": true, "target_modules": "all-linear"}"#),
    ("principal", r#"{"peft_type": "LORA", "r": 2, "init_lora_weights": "pissa"}"#),
    ("head", r#"{"peft_type": "LORA", "r": 2, "lora_bias": true, "modules_to_save": ["lm_head"]}"#),
];

/// A set with the adapters, which lie in `folder`; its weights in the layout for decoding.
fn set(family: &str, options: LoadOptions, folder: &Path) -> AdapterSet {
    let load = || Model::load(&path(family), &Cpu::new(Some(2)).unwrap(), options).unwrap();
    for (seed, (name, settings)) in ADAPTERS.iter().enumerate() {
        let (mut model, mut method) = (load(), method(settings));
        method.attach(&mut model, seed as u64).unwrap();
        move_all(&mut model);
        method.save(&model, &folder.join(name)).unwrap();
    }
    let mut base = load();
    base.lay_out_for_decoding().unwrap();
    let mut set = AdapterSet::new(base);
    ADAPTERS.iter().for_each(|(name, _)| set.load(name, &folder.join(name)).unwrap());
    set
}

/// Prompts of different lengths for all adapters and the base, mixed.
fn prompts() -> Vec<(Option<&'static str>, Vec<u32>)> {
    let mut rng = Philox::new(PhiloxKey::new(8, Stream::Dummy, 1));
    let adapters = [Some("wide"), None, Some("one"), Some("wide"), Some("narrow"), None, Some("wide")]
        .into_iter()
        .chain([Some("directions"), Some("principal"), Some("head")]);
    let lengths = [5, 1, 9, 2, 7, 3, 1, 4, 6, 2];
    adapters.zip(lengths).map(|(a, n)| (a, (0..n).map(|_| rng.below(97)).collect())).collect()
}

fn rows_are_those_of_each_alone(family: &str, options: LoadOptions) {
    let folder = tempfile::tempdir().unwrap();
    let mut set = set(family, options, folder.path());
    let owned = prompts();
    let config = |i: usize| GenerationConfig {
        max_new_tokens: 4 + 2 * i,
        temperature: if i.is_multiple_of(2) { 0.0 } else { 1.5 },
        repetition_penalty: if i == 3 { 1.3 } else { 1.0 },
        eos_token_id: vec![i as u32, 50 + i as u32],
        seed: i as u64,
        ..GenerationConfig::default()
    };
    let prompts: Vec<Prompt<'_>> = owned
        .iter()
        .enumerate()
        .map(|(i, (adapter, tokens))| Prompt { adapter: *adapter, tokens, config: config(i) })
        .collect();
    set.set_active(Some("one")).unwrap();
    set.merge().unwrap();
    let together = generate_batch(&mut set, &prompts, |i, tokens| i != 4 || tokens.len() < 3).unwrap();
    assert!(set.active() == Some("one") && set.is_merged());
    // Alone, with weights as they are trained.
    for (i, (prompt, found)) in prompts.iter().zip(&together).enumerate() {
        let mut model = Model::load(&path(family), &Cpu::new(Some(2)).unwrap(), options).unwrap();
        if let Some(name) = prompt.adapter {
            load_adapter(&mut model, &folder.path().join(name)).unwrap();
        }
        let go_on = |tokens: &[u32]| i != 4 || tokens.len() < 3;
        let alone = generate(&model, prompt.tokens, &prompt.config, go_on).unwrap();
        assert_eq!(found.tokens, alone.tokens, "{family} {options:?}, row {i}");
    }
}

#[test]
fn texts_are_those_of_each_alone() {
    for family in ["llama", "gpt2", "mistral", "gemma3_text", "mistral_window", "glm4"] {
        for dtype in [DType::F32, DType::BF16] {
            rows_are_those_of_each_alone(family, dtype.into());
        }
    }
    for (family, format) in [("llama", "nf4"), ("gpt2", "int4-asym")] {
        let quant = Some(QuantConfig::new(Format::by_name(format).unwrap()));
        rows_are_those_of_each_alone(family, LoadOptions { dtype: DType::BF16, quant });
    }
}

/// The scores themselves, in prompts and in steps of one token, as rows come and go.
#[test]
fn scores_are_those_of_each_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mut set = set("llama", DType::BF16.into(), folder.path());
    let prompts = prompts();
    // The base's rows first, then by adapter.
    let all = [1, 5, 2, 0, 3, 6, 4, 7, 9];
    let steps: [&[usize]; 4] = [&all, &[1, 2, 0, 3, 9], &[5, 0, 4, 7], &all];
    let input = |step: usize, i: usize| match step {
        0 => prompts[i].1.clone(),
        _ => vec![((step * 31 + i) % 97) as u32],
    };
    let names = ["one", "wide", "narrow", "directions", "head"];
    let together = set
        .side_by_side(&names, |model, adapters| {
            let mut cache = model.kv_caches(prompts.len(), 16)?;
            let mut all = vec![Vec::new(); prompts.len()];
            for (step, rows) in steps.iter().enumerate() {
                let inputs: Vec<_> = rows.iter().map(|i| (*i, input(step, *i))).collect();
                let inputs: Vec<(usize, &[u32])> =
                    inputs.iter().map(|(i, ids)| (*i, ids.as_slice())).collect();
                let slot = |(name, params)| {
                    let own = |i: &&usize| prompts[**i].0 == Some(name);
                    let start = rows.iter().take_while(|i| !own(i)).count();
                    RowSlot { rows: start..start + rows.iter().filter(own).count(), params }
                };
                let slots: Vec<RowSlot<'_>> =
                    names.into_iter().zip(adapters.iter().copied()).map(slot).collect();
                let scores = model.backend.to_vec::<f32>(&model.extend_all(&inputs, &mut cache, &slots)?)?;
                for (i, scores) in rows.iter().zip(scores.chunks_exact(model.config.vocab_size)) {
                    all[*i].push((step, bits(scores)));
                }
            }
            Ok(all)
        })
        .unwrap();
    for (i, found) in together.into_iter().enumerate() {
        set.set_active(prompts[i].0).unwrap();
        let model = set.model();
        let mut cache = model.kv_cache(16).unwrap();
        for (step, found) in found {
            let scores = model.extend(&input(step, i), &mut cache).unwrap();
            let alone = bits(&model.backend.to_vec::<f32>(&scores).unwrap());
            assert!(found == alone, "row {i}, step {step}");
        }
    }
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut set = set("llama", DType::F32.into(), folder.path());
    set.load("prefix", &path("llama/prefix_projection")).unwrap();
    set.set_active(Some("one")).unwrap();
    let mut try_with = |adapter, tokens: &[u32]| {
        let config = GenerationConfig::default();
        generate_batch(&mut set, &[Prompt { adapter, tokens, config }], |_, _| true).unwrap_err().to_string()
    };
    for (adapter, tokens, part) in [
        (Some("prefix"), [1].as_slice(), "virtual tokens"),
        (Some("nobody"), &[1], "no adapter of this name"),
        (Some("one"), &[], "at least one token"),
    ] {
        let error = try_with(adapter, tokens);
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(set.active(), Some("one"));
    let model = set.model();
    let mut cache = model.kv_caches(2, 4).unwrap();
    for rows in
        [vec![], vec![(2, [1].as_slice())], vec![(0, [1].as_slice()), (0, &[2])], vec![(1, [].as_slice())]]
    {
        assert!(model.extend_all(&rows, &mut cache, &[]).is_err(), "{rows:?}");
    }
    let error = model.extend_all(&[(0, &[1, 2, 3, 4, 5])], &mut cache, &[]).unwrap_err().to_string();
    assert!(error.contains("do not fit a cache of 4"), "{error}");
    set.set_active(Some("prefix")).unwrap();
    let mut cache = set.model().kv_caches(2, 4).unwrap();
    let error = set.model().extend_all(&[(0, &[1])], &mut cache, &[]).unwrap_err().to_string();
    assert!(error.contains("one by one"), "{error}");
}
