"""A GGUF file from end to end with the `finetune` example, each step against transformers (+ PEFT) on the same weights dequantized.

    cargo build --release --example finetune
    target/python/bin/python tools/check_gguf.py FILE.gguf [--folder DIR] [--dtype f32]

Trains a few LoRA steps straight from the file, evaluates held-out rows and generates with and without the adapter, merges
into a folder, which transformers loads, and compares the merged weights with those of PEFT's merge. --folder is what
gguf_to_folder.py made of the file in float32, if it is there already. Exit status 1 when something differs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sample_text import write_rows

TOOLS = Path(__file__).resolve().parent
HELD_OUT, ALL, CHARACTERS = 8, 24, 3000


def python(tool: str, *arguments: str) -> bool:
    return subprocess.run([sys.executable, str(TOOLS / tool), *arguments]).returncode == 0


def finetune(args: argparse.Namespace, *arguments: str) -> str:
    command = [args.binary, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"error: exit status {done.returncode} from {' '.join(command)}")
    return done.stdout


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", help="the file")
    parser.add_argument("--folder", help="the same weights dequantized, in float32")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--binary", default="target/release/examples/finetune")
    return parser.parse_args()


def check_merged(folder: str, adapter: str, merged: str) -> bool:
    """Whether the merged folder has the weights that PEFT's merge has."""
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter)
    theirs = theirs.merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).state_dict()
    if ours.keys() != theirs.keys():
        print(f"DIFFERS: tensors of the merged model: {sorted(ours.keys() ^ theirs.keys())}")
        return False
    worst = max((ours[key] - theirs[key]).abs().max().item() for key in ours)
    print(f"{'ok' if worst <= 1e-6 else 'DIFFERS'}: {len(ours)} merged tensors, PEFT's at most {worst:.1e} away")
    return worst <= 1e-6


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as scratch:
        at = lambda name: str(Path(scratch) / name)
        folder = args.folder or at("folder")
        if not args.folder and not python("gguf_to_folder.py", args.gguf, folder, "float32"):
            raise SystemExit(1)
        write_rows(Path(at("all.jsonl")), ALL, CHARACTERS)
        rows = Path(at("all.jsonl")).read_text(encoding="utf-8").splitlines(keepends=True)
        Path(at("held_out.jsonl")).write_text("".join(rows[:HELD_OUT]), encoding="utf-8")
        Path(at("train.jsonl")).write_text("".join(rows[HELD_OUT:]), encoding="utf-8")

        base = ["--model", args.gguf, "--dtype", args.dtype]
        compare = ["--dtype", args.dtype, "--data", at("held_out.jsonl")]
        passed = [python("compare_loss.py", "--model", args.gguf, "--peer-model", folder, *compare)]
        finetune(args, "train", *base, "--data", at("train.jsonl"), "--output", at("adapter"), "--target-modules", "all-linear",
                 "--r", "8", "--max-length", "512", "--per-device-train-batch-size", "2", "--max-steps", str(args.steps),
                 "--learning-rate", "1e-3")
        losses = [json.loads(line) for line in Path(at("adapter"), "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in losses if "loss" in line]
        print(f"trained {args.steps} steps from {args.gguf}: loss {losses[0]:.4f} to {losses[-1]:.4f}")
        passed.append(python("compare_loss.py", "--model", args.gguf, "--peer-model", folder, "--adapter", at("adapter"), *compare))
        finetune(args, "merge", *base, "--adapter", at("adapter"), "--output", at("merged"))
        passed.append(python("compare_loss.py", "--model", at("merged"), *compare))
        if args.dtype == "f32":
            passed.append(check_merged(folder, at("adapter"), at("merged")))
    if not all(passed):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
