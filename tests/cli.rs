//! The `finetune` example as a person or a script uses it: subcommands, outputs, exit statuses, one-line errors.

#![cfg(feature = "cli")]

use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The example's binary, which cargo builds beside the tests.
fn binary() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().and_then(Path::parent).unwrap().join("examples").join("finetune")
}

fn demo(part: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/finetune/demo").join(part).display().to_string()
}

fn finetune(args: &[&str]) -> Output {
    Command::new(binary()).args(args).output().unwrap()
}

fn succeed(args: &[&str]) -> String {
    let output = finetune(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The one line of an error with exit status 1.
fn fail(args: &[&str]) -> String {
    let output = finetune(args);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {text}");
    let lines: Vec<&str> = text.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!(lines.len(), 1, "{args:?}: {text}");
    assert!(text.trim_end().ends_with(lines[0]) && !text.contains("panicked"), "{args:?}: {text}");
    lines[0].to_string()
}

#[track_caller]
fn expect(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "expected {part:?} in: {error}");
    }
}

/// A short training run on the demo's model.
fn train(output: &Path, more: &[&str]) -> Vec<String> {
    let words = [
        "train",
        "--model",
        &demo("model"),
        "--data",
        &demo("data/train.jsonl"),
        "--output",
        &output.display().to_string(),
        "--r",
        "4",
        "--target-modules",
        "all-linear",
        "--threads",
        "2",
        "--per-device-train-batch-size",
        "2",
    ];
    words.iter().chain(more).map(|w| w.to_string()).collect()
}

fn words(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

/// Jobs of one file leave what `train` leaves for each, and rows of one file are continued by the adapter that they name.
#[test]
fn train_many_and_generate_rows() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (model, data) = (demo("model"), demo("data/train.jsonl"));
    let jobs = format!(
        "data = {data:?}\nmax_steps = 3\ntarget_modules = \"all-linear\"\n\n[wide]\nr = 8\nlearning_rate = 1e-3\n\n\
         [narrow]\nr = 2\nuse_rslora = true\nmax_steps = 2\ngradient_accumulation_steps = 2\n\n\
         [directions]\nr = 4\nuse_dora = true\n"
    );
    fs::write(at("jobs.toml"), &jobs).unwrap();
    let common = ["--model", &model, "--threads", "2", "--per-device-train-batch-size", "2"];
    let many = ["train-many", "--jobs", &at("jobs.toml"), "--output", &at("many"), "--json"];
    let report: Value = serde_json::from_str(&succeed(&[&many[..], &common].concat())).unwrap();
    let steps: Vec<_> =
        report["jobs"].as_array().unwrap().iter().map(|job| (&job["name"], &job["steps"])).collect();
    assert_eq!(
        steps,
        [(&"directions".into(), &3.into()), (&"narrow".into(), &2.into()), (&"wide".into(), &3.into())]
    );
    for (name, own) in [
        ("wide", ["--max-steps=3", "--r=8", "--learning-rate=1e-3"].as_slice()),
        ("narrow", &["--max-steps=2", "--r=2", "--use-rslora", "--gradient-accumulation-steps=2"]),
        ("directions", &["--max-steps=3", "--r=4", "--use-dora"]),
    ] {
        let alone = ["train", "--data", &data, "--output", &at(name), "--target-modules", "all-linear"];
        succeed(&[&alone[..], &common, own].concat());
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            let read = |folder: &str| fs::read(Path::new(folder).join(file)).unwrap();
            assert!(read(&at(name)) == read(&at(&format!("many/{name}"))), "{name}: {file} differs");
        }
    }
    // Those that are over are over; flags win over the file.
    succeed(&[&many[..], &common, &["--resume", "latest", "--save-total-limit", "1"]].concat());

    let rows = "{\"chat\": \"What is a fox?\", \"adapter_name\": \"wide\"}\n\n{\"prompt\": \"The\", \"adapter_name\": \
                \"__base__\"}\n{\"prompt\": \"A fox\", \"adapter_name\": \"small\"}\n{\"chat\": \"What is a cow?\", \
                \"adapter_name\": \"directions\"}\n";
    fs::write(at("rows.jsonl"), rows).unwrap();
    let adapters = format!("{},small={},{}", at("many/wide"), at("many/narrow"), at("many/directions"));
    let generate = ["generate", "--model", &model, "--max-new-tokens", "5", "--threads", "2"];
    let rows = ["--adapters", &adapters, "--prompts", &at("rows.jsonl"), "--batch-size", "2"];
    let printed = succeed(&[&generate[..], &rows].concat());
    let printed: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (wide, narrow, directions) = (at("wide"), at("narrow"), at("directions"));
    let alone = [
        vec!["--chat", "What is a fox?", "--adapter", &wide, "--json"],
        vec!["--prompt", "The", "--json"],
        vec!["--prompt", "A fox", "--adapter", &narrow, "--json"],
        vec!["--chat", "What is a cow?", "--adapter", &directions, "--json"],
    ];
    for (row, alone) in printed.iter().zip(alone) {
        let alone: Value = serde_json::from_str(&succeed(&[&generate[..], &alone].concat())).unwrap();
        assert_eq!((&row["tokens"], &row["text"]), (&alone["tokens"], &alone["text"]), "{row}");
    }
    assert_eq!(printed.len(), 4);
    assert_eq!(printed[1]["adapter_name"], "__base__");

    // Rows and jobs that can't be.
    for (line, part) in [
        ("{\"prompt\": \"A\", \"adapter_name\": \"big\"}", "no adapter is called `big`"),
        ("{\"prompt\": \"A\"}", "expected an adapter_name"),
        ("{\"adapter_name\": \"wide\"}", "either prompt or chat"),
        ("{\"promt\": \"A\"}", "row 1"),
    ] {
        fs::write(at("rows.jsonl"), line).unwrap();
        expect(&fail(&[&generate[..], &rows].concat()), &["rows.jsonl", part]);
    }
    for (jobs, parts) in [
        ("max_steps = 1\n", ["jobs.toml", "table for each job"]),
        ("[a]\nr = 2\n", ["`a.data`", "expected a file"]),
        ("[a]\nlerning_rate = 1.0\n", ["lerning_rate", "did you mean `learning_rate`?"]),
        ("[a]\ndtype = \"bf16\"\n", ["`a.dtype`", "the same for all jobs"]),
        ("[a]\ndata = \"DATA\"\nr = \"many\"\n", ["`a.flags`", "many"]),
        ("dat = 1\n[a]\nr = 2\n", ["`dat`", "train-many"]),
        ("[a]\ndata = \"DATA\"\nmethod = \"full\"\n", ["`a`", "nothing to share"]),
        ("[a]\ndata = \"DATA\"\nmethod = \"prefix\"\n", ["`a`", "virtual tokens"]),
        ("[a]\ndata = \"DATA\"\nmethod = \"adapter\"\n", ["`a`", "bottleneck adapters"]),
        (
            "[a]\ndata = \"DATA\"\n[b]\ndata = \"DATA\"\noutput = \"MANY/a\"\n",
            ["`b`", "each job needs its own"],
        ),
    ] {
        fs::write(at("jobs.toml"), jobs.replace("DATA", &data).replace("MANY", &at("many"))).unwrap();
        expect(&fail(&[&many[..], &common].concat()), &parts);
    }
    fs::write(at("jobs.toml"), format!("data = {data:?}\nmax_steps = 1\n[a]\nr = 2\n[b]\nuse_dora = true\n"))
        .unwrap();
    let limited = ["train-many", "--jobs", &at("jobs.toml"), "--output", &at("limited"), "--memory-limit"];
    succeed(&[&limited[..], &["1GB"], &common].concat());
    expect(&fail(&[&limited[..], &["1MB"], &common].concat()), &["memory_limit", "too little"]);
    expect(&fail(&[&many[..], &common, &["--preview", "1"]].concat()), &["--preview", "finetune train"]);
    expect(&fail(&[&many[..], &common, &["--resume", "x"]].concat()), &["--resume", "latest"]);
}

#[test]
fn train_eval_generate_merge_inspect() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("adapter");
    let more = [
        "--max-steps",
        "4",
        "--eval-data",
        &demo("data/held_out.jsonl"),
        "--save-strategy",
        "steps",
        "--save-steps",
        "2",
        "--save-total-limit",
        "1",
    ];
    succeed(&words(&train(&output, &more)));
    let metrics = fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let steps: Vec<&Value> = lines.iter().filter(|l| l["loss"].is_number()).collect();
    assert_eq!(steps.len(), 4);
    for key in [
        "step",
        "epoch",
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens",
        "tokens_per_second",
        "peak_memory_bytes",
    ] {
        assert!(steps.iter().all(|l| l[key].is_number()), "{key}");
    }
    assert!(lines.iter().any(|l| l["eval_loss"].is_number()));
    assert!(output.join("checkpoint-4").is_dir() && !output.join("checkpoint-2").exists());

    let (model, adapter) = (demo("model"), output.display().to_string());
    let held_out = demo("data/held_out.jsonl");
    let eval = |args: &[&str]| -> Value {
        let all = [&["eval", "--data", &held_out, "--json"][..], args].concat();
        serde_json::from_str(&succeed(&all)).unwrap()
    };
    let adapted = eval(&["--model", &model, "--adapter", &adapter]);
    let (loss, perplexity) = (adapted["loss"].as_f64().unwrap(), adapted["perplexity"].as_f64().unwrap());
    assert!((loss.exp() - perplexity).abs() < 1e-9 && adapted["tokens"].as_u64().unwrap() > 100);
    let last = lines.iter().rev().find_map(|l| l["eval_loss"].as_f64()).unwrap();
    assert!((last - loss).abs() < 1e-6, "train's last evaluation {last}, eval's {loss}");

    let merged = folder.path().join("merged").display().to_string();
    let report: Value = serde_json::from_str(&succeed(&[
        "merge",
        "--model",
        &model,
        "--adapter",
        &adapter,
        "--output",
        &merged,
        "--json",
    ]))
    .unwrap();
    assert!(report["adapted"].as_u64().unwrap() > 0 && report["logits"]["tokens"].as_u64().unwrap() > 20);
    let largest = report["logits"]["largest_difference"].as_f64().unwrap();
    assert!(largest < 0.1 && report["logits"]["mean_difference"].as_f64().unwrap() <= largest);
    assert!(report["logits"]["same_top_token"].as_f64().unwrap() > 0.9);
    let dequantized = folder.path().join("dequantized").display().to_string();
    let text = succeed(&[
        "merge",
        "--model",
        &model,
        "--adapter",
        &adapter,
        "--output",
        &dequantized,
        "--quant",
        "nf4",
        "--onto",
        "dequantized",
        "--prompt",
        "A hammer is",
    ]);
    assert!(
        text.contains("largest difference") && Path::new(&dequantized).join("model.safetensors").is_file()
    );
    let of_merged = eval(&["--model", &merged])["loss"].as_f64().unwrap();
    assert!((of_merged - loss).abs() < 0.05, "merged {of_merged}, adapter {loss}");

    let generated = succeed(&[
        "generate",
        "--model",
        &model,
        "--adapter",
        &adapter,
        "--chat",
        "What is a hammer?",
        "--max-new-tokens",
        "8",
        "--min-new-tokens",
        "8",
        "--json",
    ]);
    let generated: Value = serde_json::from_str(&generated).unwrap();
    assert_eq!(generated["tokens"].as_array().unwrap().len(), 8);
    assert!(generated["prompt_tokens"].as_u64().unwrap() > 5 && generated["text"].is_string());
    assert!(generated["decode_tokens_per_second"].as_f64().unwrap() > 0.0);

    let modules: Value = serde_json::from_str(&succeed(&["inspect", "--model", &model, "--json"])).unwrap();
    let q = modules["modules"]
        .as_array()
        .unwrap()
        .iter()
        .find(|m| m["path"] == "model.layers.0.self_attn.q_proj");
    assert_eq!(q.unwrap()["default_target"], true);
    assert!(
        succeed(&["inspect", "--adapter", &adapter])
            .contains("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight [4, 192] F32")
    );
}

#[test]
fn generation_options() {
    let model = demo("model");
    let generate = |more: &[&str]| -> Value {
        let args = [
            &[
                "generate",
                "--model",
                &model,
                "--prompt",
                "The hammer is a kind of",
                "--json",
                "--max-new-tokens",
                "12",
            ][..],
            more,
        ]
        .concat();
        serde_json::from_str(&succeed(&args)).unwrap()
    };
    let greedy = generate(&[]);
    assert_eq!(greedy["tokens"], generate(&["--temperature", "0"])["tokens"]);
    assert_eq!(greedy["tokens"], generate(&["--temperature", "0.7", "--top-k", "1"])["tokens"]);
    let sample = |seed: &str| {
        generate(&["--temperature", "1.5", "--seed", seed, "--min-new-tokens", "12"])["tokens"].clone()
    };
    assert_eq!(sample("1"), sample("1"));
    assert_ne!(sample("1"), sample("2"));
    let text = greedy["text"].as_str().unwrap();
    let stop = &text[text.len() / 2..text.len() / 2 + 2];
    let stopped = generate(&["--stop", stop]);
    assert_eq!(stopped["text"].as_str().unwrap(), &text[..text.find(stop).unwrap()]);
    assert_eq!(finetune(&["generate", "--model", &model]).status.code(), Some(2));
    expect(&fail(&["generate", "--model", &model, "--prompt", "a", "--top-p", "0"]), &["top_p"]);
}

#[test]
fn a_resumed_run_equals_a_straight_one() {
    let folder = tempfile::tempdir().unwrap();
    let (straight, parts) = (folder.path().join("straight"), folder.path().join("parts"));
    let schedule =
        ["--max-steps", "6", "--save-strategy", "steps", "--save-steps", "3", "--lora-dropout", "0.1"];
    succeed(&words(&train(&straight, &schedule)));
    succeed(&words(&train(&parts, &schedule)));
    fs::remove_dir_all(parts.join("checkpoint-6")).unwrap();
    fs::remove_file(parts.join("adapter_model.safetensors")).unwrap();
    succeed(&words(&train(&parts, &[&schedule[..], &["--resume", "latest"]].concat())));
    let file = "adapter_model.safetensors";
    assert!(fs::read(straight.join(file)).unwrap() == fs::read(parts.join(file)).unwrap());
    let nowhere = folder.path().join("nowhere");
    expect(
        &fail(&words(&train(&nowhere, &[&schedule[..], &["--resume", "latest"]].concat()))),
        &["--resume", "no checkpoint"],
    );
}

#[test]
#[cfg(unix)]
fn ctrl_c_saves_a_checkpoint_and_leaves_with_130() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("adapter");
    let args = train(&output, &["--max-steps", "100000", "--save-strategy", "no"]);
    let mut child = Command::new(binary()).args(&args).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().starts_with("step 1/")));
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let rest: Vec<String> = lines.map(|line| line.unwrap()).collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
    assert!(rest.iter().any(|l| l.starts_with("stopped: checkpoint saved to")), "{rest:?}");
    let saved = fs::read_dir(&output)
        .unwrap()
        .any(|e| e.unwrap().file_name().to_string_lossy().starts_with("checkpoint-"));
    assert!(saved);
}

#[test]
fn settings_from_a_file_and_flags_that_win() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("adapter");
    for (name, text) in [
        (
            "run.toml",
            "r = 2\nlora_alpha = 6\nmax_steps = 1\npacking = true\nmax-length = 128\ntarget_modules = [\"q_proj\", \"v_proj\"]",
        ),
        (
            "run.yaml",
            "r: 2\nlora_alpha: 6\nmax_steps: 1\npacking: true\nmax-length: 128\ntarget_modules: [q_proj, v_proj]",
        ),
        (
            "run.json",
            r#"{"r": 2, "lora_alpha": 6, "max_steps": 1, "packing": true, "max-length": 128, "target_modules": ["q_proj", "v_proj"]}"#,
        ),
    ] {
        let file = folder.path().join(name);
        fs::write(&file, text).unwrap();
        succeed(&[
            "train",
            "--model",
            &demo("model"),
            "--data",
            &demo("data/train.jsonl"),
            "--output",
            &output.display().to_string(),
            "--config",
            &file.display().to_string(),
            "--r",
            "3",
        ]);
        let config: Value =
            serde_json::from_str(&fs::read_to_string(output.join("adapter_config.json")).unwrap()).unwrap();
        assert_eq!((&config["r"], &config["lora_alpha"]), (&Value::from(3), &Value::from(6)), "{name}");
        assert_eq!(config["target_modules"], serde_json::json!(["q_proj", "v_proj"]));
    }
    let file = folder.path().join("bad.toml");
    fs::write(&file, "lora_alhpa = 2").unwrap();
    let error = fail(&["train", "--config", &file.display().to_string()]);
    expect(&error, &["bad.toml", "`lora_alhpa`", "did you mean `lora_alpha`?"]);
    fs::write(&file, "r = ").unwrap();
    expect(&fail(&["train", "--config", &file.display().to_string()]), &["bad.toml"]);
}

#[test]
fn preview_marks_what_counts() {
    let shown =
        succeed(&["train", "--model", &demo("model"), "--data", &demo("data/train.jsonl"), "--preview", "2"]);
    assert_eq!(shown.matches('«').count(), 2, "{shown}");
    assert!(shown.contains("<|im_start|>assistant\n«") && shown.contains("<|im_end|>»"), "{shown}");
}

#[test]
fn memory_is_planned_and_kept_to() {
    let model = demo("model");
    let shown = succeed(&["estimate", "--model", &model, "--max-length", "256"]);
    for part in ["base", "trainables", "gradients", "optimizer", "activations", "scratch", "peak"] {
        assert!(shown.contains(part), "{shown}");
    }
    let json = |more: &[&str]| -> Value {
        let words = [&["estimate", "--model", &model, "--max-length", "256", "--json"][..], more].concat();
        serde_json::from_str(&succeed(&words)).unwrap()
    };
    let (whole, checkpointed) = (json(&[]), json(&["--gradient-checkpointing"]));
    assert!(whole["total"].as_u64() > checkpointed["total"].as_u64());
    assert!(json(&["--quant", "nf4"])["base"].as_u64() < whole["base"].as_u64());

    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out").display().to_string();
    let data = demo("data/train.jsonl");
    let train = ["train", "--model", &model, "--data", &data, "--output", &output, "--max-steps", "2"];
    let limited =
        finetune(&[&train[..], &["--memory-limit", "58MB", "--per-device-train-batch-size", "16"]].concat());
    let said = String::from_utf8(limited.stderr).unwrap();
    assert!(limited.status.success() && said.contains("planned, with micro-batches of"), "{said}");
    assert!(!said.contains("micro-batches of 16 x") || said.contains("--gradient-checkpointing=1"), "{said}");
    expect(&fail(&[&train[..], &["--memory-limit", "1MB"]].concat()), &["memory_limit", "too little"]);
}

#[test]
fn bad_input_is_one_clear_line() {
    let folder = tempfile::tempdir().unwrap();
    let data = |name: &str, content: &[u8]| {
        let file = folder.path().join(name);
        fs::write(&file, content).unwrap();
        file.display().to_string()
    };
    let (model, output) = (demo("model"), folder.path().join("out").display().to_string());
    let with_data = |file: &str| fail(&["train", "--model", &model, "--data", file, "--output", &output]);
    expect(&with_data("/nowhere/data.jsonl"), &["/nowhere/data.jsonl", "no folder /nowhere"]);
    let file = data("model.txt", b"");
    for command in [
        &["train", "--model", &file, "--data", "x", "--output", &output][..],
        &["generate", "--model", &file, "--prompt", "a"],
        &["estimate", "--model", &file],
        &["merge", "--model", &model, "--adapter", &file, "--output", &output],
    ] {
        expect(&fail(command), &[&file, "expected a folder, found a file"]);
    }
    expect(
        &with_data(&data("keys.jsonl", b"{\"text\": \"a\"}\n{\"txt\": \"b\"}\n")),
        &["keys.jsonl", "row 2"],
    );
    expect(&with_data(&data("utf8.jsonl", b"{\"text\": \"\xff\"}")), &["utf8.jsonl", "UTF-8"]);
    expect(&with_data(&data("empty.jsonl", b"")), &["empty.jsonl"]);
    let long = format!("{{\"prompt\": \"a\", \"completion\": \"{}\"}}", "word ".repeat(900));
    expect(&with_data(&data("long.jsonl", long.as_bytes())), &["long.jsonl", "512", "--max-length"]);

    let train_data = demo("data/train.jsonl");
    let train = |more: &[&str]| {
        fail(&[&["train", "--model", &model, "--data", &train_data, "--output", &output][..], more].concat())
    };
    expect(&train(&["--target-modules", "q_prj"]), &["`q_prj`", "did you mean `q_proj`?"]);
    expect(&train(&["--quant", "nf5"]), &["`quant`", "`nf5`", "nf4, fp4"]);
    expect(&train(&["--device", "tpu"]), &["--device", "`tpu`", "cuda[:N]"]);
    expect(&train(&["--device", "cuda:77"]), &["cuda:77"]);
    expect(&train(&["--optim", "adafactor"]), &["optim", "`adafactor`", "paged_adamw_32bit"]);
    expect(&train(&["--optimizer-memory", "1MB"]), &["optimizer_memory", "paged_adamw_32bit"]);
    expect(&train(&["--lr-scheduler-type", "wavy"]), &["lr_scheduler_type", "`wavy`"]);
    expect(&train(&["--early-stopping-patience", "2"]), &["early_stopping_patience"]);
    expect(&train(&["--per-device-train-batch-size", "0"]), &["per_device_train_batch_size"]);
    expect(&train(&["--init-adapter", "/nowhere"]), &["/nowhere/adapter_config.json"]);
    expect(&fail(&["eval", "--model", "/nowhere", "--data", &train_data]), &["/nowhere"]);
    assert!(!Path::new(&output).join("adapter_model.safetensors").exists());
    assert_eq!(finetune(&["train", "--no-such-flag"]).status.code(), Some(2));
    assert_eq!(finetune(&["quantise"]).status.code(), Some(2));
    let isa = Command::new(binary())
        .args(["inspect", "--model", &model])
        .env("LOWRANK_ISA", "mmx")
        .output()
        .unwrap();
    assert_eq!(isa.status.code(), Some(1));
    expect(&String::from_utf8(isa.stderr).unwrap(), &["LOWRANK_ISA", "`mmx`", "scalar"]);
}

#[test]
#[cfg(target_os = "linux")]
fn an_output_that_cannot_be_written() {
    let args = train(Path::new("/proc/no-such-folder"), &["--max-steps", "1"]);
    expect(&fail(&words(&args)), &["/proc/no-such-folder"]);
}

/// Training onto a disk that becomes full: one clear line, and no half-written file. Needs the right to mount.
#[test]
#[cfg(target_os = "linux")]
fn a_full_disk() {
    let disk = tempfile::tempdir().unwrap();
    let place = disk.path().display().to_string();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=256k", "tmpfs", &place]).output();
    if !mounted.is_ok_and(|m| m.status.success()) {
        eprintln!("skipped: this user may not mount a small disk");
        return;
    }
    let output = disk.path().join("adapter");
    let args = train(&output, &["--max-steps", "2", "--save-strategy", "steps", "--save-steps", "1"]);
    let result = std::panic::catch_unwind(|| fail(&words(&args)));
    let left: Vec<String> = fs::read_dir(&output)
        .map(|entries| entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    Command::new("umount").arg(&place).status().unwrap();
    expect(&result.unwrap(), &["No space left on device"]);
    assert_eq!(left, ["metrics.jsonl"], "what is left behind");
}

/// Every method trains, saves, and answers with its adapter.
#[test]
fn every_method_from_the_command_line() {
    for (method, more) in [
        ("prefix", vec!["--num-virtual-tokens", "4", "--prefix-projection"]),
        ("prompt", vec!["--prompt-tuning-init", "TEXT", "--prompt-tuning-init-text", "What does it mean?"]),
        ("ptuning", vec!["--encoder-reparameterization-type", "LSTM", "--encoder-hidden-size", "8"]),
        ("ia3", vec![]),
        (
            "adapter",
            vec![
                "--adapter-config",
                "houlsby",
                "--reduction-factor=32",
                "--non-linearity=gelu",
                "--ln-after",
                "--dropout=0.1",
            ],
        ),
        (
            "vera",
            vec!["--r", "8", "--vera-dropout", "0.1", "--d-initial", "0.2", "--projection-prng-key", "3"],
        ),
        ("lora", vec!["--lora-bias", "--layers-to-transform", "1", "--layers-pattern", "layers"]),
        ("ln_tuning", vec![]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().display().to_string();
        let common = ["--method", method, "--max-steps", "2", "--max-length", "48", "--json"];
        let (model, data) = (demo("model"), demo("data/train.jsonl"));
        let words = ["train", "--model", &model, "--data", &data, "--output", &output];
        let summary: Value = serde_json::from_str(&succeed(&[&words[..], &common, &more].concat())).unwrap();
        assert!(summary["trainable_parameters"].as_u64().unwrap() > 0, "{method}");
        let words = [
            "generate",
            "--model",
            &model,
            "--adapter",
            &output,
            "--prompt",
            "What",
            "--max-new-tokens",
            "3",
        ];
        succeed(&words);
        assert!(succeed(&["inspect", "--adapter", &output]).contains("parameters"), "{method}");
    }
}

#[test]
fn a_setting_of_another_method_is_named() {
    let error = fail(
        &train(&PathBuf::from("/tmp/unused"), &["--num-virtual-tokens", "4"])
            .iter()
            .map(|w| &**w)
            .collect::<Vec<_>>(),
    );
    expect(&error, &["num_virtual_tokens"]);
}

#[test]
fn compare_has_a_row_for_each_method_and_says_what_failed() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().display().to_string();
    let (model, data, held_out) = (demo("model"), demo("data/train.jsonl"), demo("data/held_out.jsonl"));
    let words = [
        "compare",
        "--model",
        &model,
        "--data",
        &data,
        "--eval-data",
        &held_out,
        "--output",
        &output,
        "--methods",
        "qlora,ia3,bitfit",
        "--set",
        "ia3:learning-rate=0.01",
        "--max-steps",
        "2",
        "--max-length",
        "48",
        "--json",
    ];
    let report: Value = serde_json::from_str(&succeed(&words)).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2, "{report}");
    assert_eq!(rows[1]["learning_rate"], 0.01);
    for row in rows {
        for key in
            ["trainable_parameters", "adapter_bytes", "peak_memory_bytes", "seconds", "loss", "eval_loss"]
        {
            assert!(row[key].as_f64().unwrap() > 0.0, "{key}: {row}");
        }
    }
    assert!(report["failures"][0]["error"].as_str().unwrap().contains("biases"), "{report}");
    for file in ["losses.svg", "methods.svg", "compare.json"] {
        assert!(folder.path().join(file).is_file(), "{file}");
    }
    let table = succeed(&words[..words.len() - 1]);
    assert!(table.contains("| qlora") && table.contains("held out"), "{table}");

    // Rates are tried in short runs; a rate of its own stays, a rate that fails is not used, a row that fails says why.
    let tried = ["--learning-rates", "1e-9,2e-3,1e37", "--trial-steps", "3"];
    let report: Value = serde_json::from_str(&succeed(&[&words[..], &tried].concat())).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(
        (&rows[0]["learning_rate"], &rows[1]["learning_rate"]),
        (&0.002.into(), &0.01.into()),
        "{report}"
    );
    let losses: Vec<&Value> =
        rows[0]["trials"].as_array().unwrap().iter().map(|trial| &trial["eval_loss"]).collect();
    assert!(losses[0].as_f64() > losses[1].as_f64() && losses[2].is_null(), "{report}");
    assert!(rows[1].get("trials").is_none() && !folder.path().join("qlora/trial").exists());
    assert!(report["failures"][0]["error"].as_str().unwrap().contains("biases"), "{report}");
    let auto = ["--learning-rates", "auto", "--methods", "ln_tuning"];
    let table = succeed(&[&words[..9], &words[13..words.len() - 1], &auto].concat());
    expect(
        &table,
        &["| ln_tuning", "ln_tuning: held out after 2 steps", "at 3.33e-4,", "at 1e-3,", "at 3e-3"],
    );
    for (bad, parts) in [
        (["--learning-rates", "1e-3,fast"], ["--learning-rates", "`fast`"]),
        (["--set", "ia3:learning-rate=no"], ["--set", "`no`"]),
    ] {
        expect(&fail(&[&words[..], &bad].concat()), &parts);
    }
    let blind = ["compare", "--model", &model, "--data", &data, "--output", &output, "--methods", "lora"];
    expect(
        &fail(&[&blind[..], &["--learning-rates", "1e-3,1e-4"]].concat()),
        &["--learning-rates", "--eval-data"],
    );
    expect(
        &fail(&["compare", "--model", &model, "--data", &data, "--output", &output, "--methods", "loar"]),
        &["loar", "lora"],
    );
}
