"""Compares the `finetune` example with transformers (+ PEFT) on a model folder: evaluation loss and greedy tokens.

    target/python/bin/python tools/compare_loss.py --model target/smollm2-f32 [--adapter DIR] [--dtype f32|bf16] [--quant nf4|fp4]

With --quant both sides quantize the base, and the peer computes with bitsandbytes' dequantized weights: its own CPU
products round the constants of blocks to bf16.

bitsandbytes' CPU quantizer misses the nearest code for some constants in double quantization (3,700 of 1,658,880 on
SmolLM2-135M); with --peer-checkpoint both sides have the same codes.

Exit status 1 when the losses differ by more than --tolerance or the greedy tokens by one.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from rows import DTYPES, read_rows
from sample_text import write_rows

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a small village by the sea,"]
TOLERANCE = {"f32": 2e-5, "bf16": 2e-2}
QUANTIZED_TOLERANCE = {"f32": 1e-4, "bf16": 3e-2}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder, or a GGUF file")
    parser.add_argument("--peer-model", help="what transformers loads (default: --model): of a GGUF file, gguf_to_folder.py's folder")
    parser.add_argument("--adapter", help="PEFT adapter folder")
    parser.add_argument("--data", help='JSONL of {"text"} rows (default: eight rows of a sample text)')
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--quant", choices=("none", "nf4", "fp4"), default="none")
    parser.add_argument("--no-double-quant", action="store_true")
    parser.add_argument("--peer-checkpoint", action="store_true", help="ours reads the codes that bitsandbytes wrote")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row that are used")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--tolerance", type=float, help="of the loss (default 2e-5 in f32, 2e-2 in bf16; quantized 1e-4 and 3e-2)")
    parser.add_argument("--binary", default="target/release/examples/finetune")
    return parser.parse_args()


def ours(args: argparse.Namespace, subcommand: str, *rest: str) -> dict:
    command = [args.binary, subcommand, "--model", args.model, "--dtype", args.dtype, "--json", *rest]
    command += ["--adapter", args.adapter] if args.adapter else []
    if args.quant != "none" and not args.peer_checkpoint:
        command += ["--quant", args.quant, f"--double-quant={str(not args.no_double_quant).lower()}"]
    done = subprocess.run(command, stdout=subprocess.PIPE)
    if done.returncode != 0:
        raise SystemExit(f"error: exit status {done.returncode} from {' '.join(command)}")
    return json.loads(done.stdout)


def load(args: argparse.Namespace, scratch: Path) -> torch.nn.Module:
    dtype = DTYPES[args.dtype]
    if args.quant == "none":
        return AutoModelForCausalLM.from_pretrained(args.peer_model or args.model, dtype=dtype)
    import bitsandbytes as bnb

    quant = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.quant,
        bnb_4bit_use_double_quant=not args.no_double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, quantization_config=quant)
    if args.peer_checkpoint:
        model.save_pretrained(scratch / "quantized")
        for file in Path(args.model).glob("*token*"):
            shutil.copy(file, scratch / "quantized")
        args.model = str(scratch / "quantized")
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).to(dtype)
            dense = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, dtype=dtype)
            dense.weight.data = weight
            if module.bias is not None:
                dense.bias.data = module.bias.data
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, dense)
    return model


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
    tolerance = (TOLERANCE if args.quant == "none" else QUANTIZED_TOLERANCE)[args.dtype]
    tolerance = tolerance if args.tolerance is None else args.tolerance
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
    tokenizer = AutoTokenizer.from_pretrained(args.peer_model or args.model)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        model = load(args, Path(scratch))
        if args.adapter:
            model = PeftModel.from_pretrained(model, args.adapter)
        model.eval()
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
