"""Makes tests/golden: what transformers and PEFT compute on tiny random models, for the tests to compare with.

Run from the repository's root:  python tools/make_golden.py
Made with torch 2.15.0, transformers 5.23.0, peft 0.21.2, safetensors 0.8.0 (tools/requirements.txt) on x86-64.
Everything follows from fixed seeds and one thread, so a second run writes the same bytes; other versions may not.

    tests/golden/MODEL/           config.json, model.safetensors, and golden.safetensors: its inputs, logits, loss, greedy tokens
    tests/golden/MODEL/ADAPTER/   an adapter as PEFT saves it, and its golden.safetensors
    tests/golden/training/        ten steps of the Trainer: settings.json, data.jsonl, the first and the last adapter
    tests/golden/quant/           tensors and models in bitsandbytes' four bits
    tests/golden/optimizers/      steps of PyTorch's and bitsandbytes' optimizers
    tests/golden/combine/         weighted combinations of adapters
    tests/golden/residual/        adapters that start as a part of the base
    tests/golden/loftq.json       what LoftQ's start leaves of a weight
    tests/golden/gguf/            GGUF files and the values in them
    tests/golden/schedules.json   learning rates by step
    tests/golden/targets.json     which modules PEFT picks, and with which rank and scaling
"""

import os
import shutil
import sys
from pathlib import Path

# Sets are written to adapter_config.json in the order of their hashes.
if os.environ.get("PYTHONHASHSEED") != "0":
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})

import peft
import torch
import transformers

from golden import adapters, combine, gguf_files, loftq, models, optimizers, quant, schedules, targets, training

VERSIONS = {"torch": (torch, "2.15.0"), "transformers": (transformers, "5.23.0"), "peft": (peft, "0.21.2")}
MAX_FILE, MAX_TOTAL = 256 * 1024, 9 * 1024 * 1024
ROOT = Path("tests/golden")
# What make_text_golden.py and make_adapterhub_golden.py make.
OTHERS = ("chat", "tokenizer", "tokenizer.json", "adapterhub")


def check_sizes() -> None:
    sizes = {path: path.stat().st_size for path in ROOT.rglob("*") if path.is_file()}
    for path, size in sizes.items():
        if size > MAX_FILE:
            raise SystemExit(f"error: {path}: {size} bytes, at most {MAX_FILE} are wanted")
    total = sum(sizes.values())
    if total > MAX_TOTAL:
        raise SystemExit(f"error: {ROOT}: {total} bytes in all, at most {MAX_TOTAL} are wanted")
    print(f"{ROOT}: {len(sizes)} files, {total} bytes")


def main() -> None:
    for name, (module, wanted) in VERSIONS.items():
        if module.__version__.split("+")[0] != wanted:
            raise SystemExit(f"error: {name} {module.__version__} is installed, {wanted} is needed: see tools/requirements.txt")
    if not Path("tools/make_golden.py").is_file():
        raise SystemExit("error: run this from the repository's root")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    for path in ROOT.iterdir():
        if path.name in OTHERS:
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in models.MODELS:
        models.make(ROOT / name, name)
        adapters.make(ROOT / name, name)
    training.make(ROOT / "training", ROOT / "llama")
    schedules.make(ROOT / "schedules.json")
    targets.make(ROOT / "targets.json", ROOT)
    quant.make(ROOT / "quant", ROOT)
    optimizers.make(ROOT / "optimizers")
    adapters.make_residual(ROOT / "residual", ROOT / "llama")
    loftq.make(ROOT / "loftq.json", ROOT / "llama")
    combine.make(ROOT / "combine", ROOT / "llama")
    gguf_files.make(ROOT / "gguf", ROOT)
    check_sizes()


if __name__ == "__main__":
    main()
