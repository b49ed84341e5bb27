"""Compares the `finetune` example with transformers (+ PEFT) on a model folder: evaluation loss and greedy tokens.

    target/python/bin/python tools/compare_loss.py --model target/smollm2-f32 [--adapter DIR] [--dtype f32|bf16]

Exit status 1 when the losses differ by more than --tolerance or the greedy tokens by one.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from rows import DTYPES, read_rows
from sample_text import write_rows

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a small village by the sea,"]
TOLERANCE = {"f32": 2e-5, "bf16": 2e-2}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--adapter", help="PEFT adapter folder")
    parser.add_argument("--data", help='JSONL of {"text"} rows (default: eight rows of a sample text)')
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row that are used")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--tolerance", type=float, help="of the loss (default 2e-5 in f32, 2e-2 in bf16)")
    parser.add_argument("--binary", default="target/release/examples/finetune")
    return parser.parse_args()


def ours(args: argparse.Namespace, subcommand: str, *rest: str) -> dict:
    command = [args.binary, subcommand, "--model", args.model, "--dtype", args.dtype, "--json", *rest]
    command += ["--adapter", args.adapter] if args.adapter else []
    done = subprocess.run(command, stdout=subprocess.PIPE)
    if done.returncode != 0:
        raise SystemExit(f"error: exit status {done.returncode} from {' '.join(command)}")
    return json.loads(done.stdout)


def evaluate(model: torch.nn.Module, rows: list[torch.Tensor]) -> tuple[float, int]:
    """The cross-entropy of the rows' tokens, weighted by token, and their number."""
    total, count = 0.0, 0
    for ids in rows:
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count, count


def check_loss(args: argparse.Namespace, model: torch.nn.Module, tokenizer, data: str) -> bool:
    mine = ours(args, "eval", "--data", data, "--max-length", str(args.max_length), "--append-eos", "false")
    loss, tokens = evaluate(model, list(read_rows(tokenizer, data, args.max_length, append_eos=False)))
    difference = abs(mine["loss"] - loss)
    tolerance = TOLERANCE[args.dtype] if args.tolerance is None else args.tolerance
    passed = difference <= tolerance and mine["tokens"] == tokens
    print(f"{'ok' if passed else 'DIFFERS'}: loss {mine['loss']:.7f} over {mine['tokens']} tokens,"
          f" transformers {loss:.7f} over {tokens}; difference {difference:.1e}")
    return passed


def check_greedy(args: argparse.Namespace, model: torch.nn.Module, tokenizer, prompt: str) -> bool:
    count = str(args.max_new_tokens)
    mine = ours(args, "generate", "--prompt", prompt, "--max-new-tokens", count, "--temperature", "0")["tokens"]
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(input_ids=ids, do_sample=False, max_new_tokens=args.max_new_tokens, attention_mask=torch.ones_like(ids))
    theirs = [token for token in output[0, ids.shape[1] :].tolist() if token != tokenizer.eos_token_id]
    mine = [token for token in mine if token != tokenizer.eos_token_id]
    if mine == theirs:
        print(f"ok: {len(mine)} greedy tokens after {prompt!r}")
        return True
    common = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs)))
    top = model(input_ids=output[:, : ids.shape[1] + common]).logits[0, -1].float().topk(2).values
    print(f"DIFFERS: greedy tokens after {prompt!r} part at {common}, where the two best logits are {top[0] - top[1]:.1e}"
          f" apart\n  ours         {mine}\n  transformers {theirs}")
    return False


def main() -> None:
    args = parse()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype])
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter)
    model.eval()
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        data = args.data
        if data is None:
            data = str(Path(scratch) / "rows.jsonl")
            write_rows(Path(data), 8, 3000)
        passed = [check_loss(args, model, tokenizer, data)]
        passed += [check_greedy(args, model, tokenizer, prompt) for prompt in args.prompt or PROMPTS]
    if not all(passed):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
