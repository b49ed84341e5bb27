"""Measures a step of several adapters at once (`finetune train-many`) against one adapter's with the same tokens (`finetune train`).

    cargo build --release --example finetune
    tools/compare_many.py --model target/smollm2-bf16

Both take the same rows of a sample text, --rows a step: one adapter all of them, the others one each. Each run is a process of
its own, and the sides take turns; a step's time is the median after two of warm-up, figures are medians over the runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from sample_text import write_rows

WARMUP = 2


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="target/smollm2-bf16", help="Hugging Face folder")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="bf16")
    parser.add_argument("--quant", default="none")
    parser.add_argument("--rows", type=int, default=4, help="rows a step, and adapters")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--binary", default="target/release/examples/finetune")
    return parser.parse_args()


def step_seconds(folder: Path, tokens: int) -> float:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(tokens / line["tokens_per_second"] for line in lines[WARMUP:] if "loss" in line)


def run(args: argparse.Namespace, scratch: Path, side: str) -> float:
    common = ["--model", args.model, "--dtype", args.dtype, "--quant", args.quant, "--threads", str(args.threads)]
    common += ["--max-length", str(args.max_length), "--max-steps", str(args.steps), "--r", "16", "--target-modules", "all-linear"]
    common += ["--save-strategy", "no", "--no-shuffle"]
    output = scratch / side
    if side == "one":
        command = ["train", "--data", str(scratch / "rows.jsonl"), "--per-device-train-batch-size", str(args.rows)]
    else:
        command = ["train-many", "--jobs", str(scratch / "jobs.json"), "--per-device-train-batch-size", "1"]
    subprocess.run([args.binary, *command, *common, "--output", str(output)], check=True, capture_output=True)
    if side == "one":
        return step_seconds(output, args.rows * args.max_length)
    return step_seconds(output / "job0", args.max_length)


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_rows(scratch / "rows.jsonl", args.rows * args.steps, 8 * args.max_length)
        rows = (scratch / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        jobs = {}
        for job in range(args.rows):
            (scratch / f"rows{job}.jsonl").write_text("".join(rows[job :: args.rows]), encoding="utf-8")
            jobs[f"job{job}"] = {"data": str(scratch / f"rows{job}.jsonl")}
        (scratch / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
        times = {"one": [], "many": []}
        for repetition in range(args.repetitions):
            for side in ("one", "many") if repetition % 2 == 0 else ("many", "one"):
                times[side].append(run(args, scratch, side))
    for side, seconds in times.items():
        print(f"{side}: " + ", ".join(f"{1000 * s:.0f}" for s in seconds) + " ms a step", file=sys.stderr)
    one, many = (statistics.median(times[side]) for side in ("one", "many"))
    tokens = args.rows * args.max_length
    print(f"one adapter: {one * 1000:.0f} ms a step of {tokens} tokens ({tokens / one:.0f} tokens/s); {args.rows} adapters:"
          f" {many * 1000:.0f} ms ({tokens / many:.0f} tokens/s), {many / one:.2f} of it")


if __name__ == "__main__":
    main()
