"""Measures LoRA and QLoRA training: the `finetune` example against transformers + PEFT (+ bitsandbytes), on the same work in the same run.

    cargo build --release --example finetune
    tools/get_smollm2.sh target/smollm2-f32 float32 && tools/get_smollm2.sh target/smollm2-bf16 bfloat16
    target/python/bin/python tools/compare_training.py --json target/compare_training.json

Both sides start from one adapter that PEFT made and take the same rows in the same order: one row of 512 tokens a step,
LoRA of rank 16 on all linear layers, AdamW, clipping at 1. Each run is a process of its own and the sides take turns.
Speed is the median over the steps after the warm-up; memory is the process's peak resident set, which the kernel counted.
With --check the losses and gradient norms are compared step by step too.

This script imports nothing large: a child's peak starts from what its parent held when it was started.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sample_text import write_rows

HERE = Path(__file__).resolve().parent
LEARNING_RATE, RANK, ALPHA = 2e-4, 16, 32
# Largest difference of a step's loss that --check accepts: rounding order in f32, the format's precision in bf16.
LOSS_TOLERANCE = {"f32": 1e-4, "bf16": 3e-2}
# With a quantized base, whose constants get other codes in bitsandbytes here and there (see compare_loss.py).
QUANTIZED_LOSS_TOLERANCE = {"f32": 3e-3, "bf16": 5e-2}


@dataclass(frozen=True)
class Case:
    dtype: str
    checkpointing: bool
    quant: str

    def __str__(self) -> str:
        return self.dtype + ("" if self.quant == "none" else f" {self.quant}") + (" + gradient checkpointing" if self.checkpointing else "")


@dataclass
class Run:
    """One process: a list of metrics by step, and its peak resident set in bytes."""

    losses: list[float]
    grad_norms: list[float]
    tokens_per_second: list[float]
    peak_memory: int
    planned_memory: int | None = None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-f32", default="target/smollm2-f32", help="Hugging Face folder for f32")
    parser.add_argument("--model-bf16", default="target/smollm2-bf16", help="Hugging Face folder for bf16")
    parser.add_argument("--binary", default="target/release/examples/finetune")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has tools/requirements.txt")
    parser.add_argument("--data", help='JSONL of {"text"} rows of at least --length tokens (default: a sample text)')
    parser.add_argument("--length", type=int, default=512, help="tokens of a row that are used")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=3, help="first steps that aren't timed")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=LOSS_TOLERANCE, help="only this one")
    parser.add_argument("--quant", nargs="+", choices=("none", "nf4", "fp4"), default=["none"], help="formats of the base")
    parser.add_argument("--peer-autocast", action="store_true", help="the peer's bf16 by autocast over f32 weights")
    parser.add_argument("--check", action="store_true", help="compare the losses by step; exit 1 where they differ")
    parser.add_argument("--json", help="write all figures here")
    args = parser.parse_args()
    if args.steps <= args.warm_up:
        parser.error("--steps must be larger than --warm-up")
    return args


def start(command: list[str], output: Path) -> int:
    """Runs a command with its output in a file; returns its peak resident set in bytes."""
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = output.read_text(errors="replace")[-2000:]
        raise SystemExit(f"error: exit status {process.returncode} from {' '.join(command)}\n{tail}")
    return usage.ru_maxrss * 1024


def read_lines(path: Path) -> list[dict]:
    lines = (line for line in path.read_text(errors="replace").splitlines() if line.startswith("{"))
    return [row for row in map(json.loads, lines) if "grad_norm" in row]


def run_ours(args: argparse.Namespace, case: Case, work: Path) -> Run:
    output = work / "ours"
    command = [args.binary, "train", "--model", model(args, case), "--data", str(work / "rows.jsonl")]
    command += ["--output", str(output), "--init-adapter", str(work / "init"), "--dtype", case.dtype, "--quant", case.quant]
    command += ["--max-length", args.length, "--append-eos", "false", "--no-shuffle", "--max-steps", args.steps]
    command += ["--per-device-train-batch-size", 1, "--gradient-accumulation-steps", 1]
    command += ["--learning-rate", LEARNING_RATE, "--lr-scheduler-type", "constant", "--weight-decay", 0]
    command += ["--max-grad-norm", 1, "--logging-steps", 1, "--save-strategy", "no", "--threads", args.threads]
    command += ["--gradient-checkpointing"] if case.checkpointing else []
    # A folder left by the run before would be one to resume.
    shutil.rmtree(output, ignore_errors=True)
    peak = start([str(part) for part in command], work / "ours.log")
    rows = read_lines(output / "metrics.jsonl")
    command[1] = "estimate"
    plan = json.loads(subprocess.check_output([str(part) for part in [*command, "--json"]]))["total"]
    return Run([r["loss"] for r in rows], [r["grad_norm"] for r in rows], [r["tokens_per_second"] for r in rows], peak, plan)


def run_peer(args: argparse.Namespace, case: Case, work: Path, *extra: str) -> Run:
    command = [args.python, str(HERE / "peer_train.py"), "--model", model(args, case), "--data", str(work / "rows.jsonl")]
    command += ["--dtype", case.dtype, "--max-length", args.length, "--max-steps", args.steps, "--quant", case.quant]
    command += ["--r", RANK, "--lora-alpha", ALPHA, "--learning-rate", LEARNING_RATE, "--threads", args.threads, *extra]
    command += ["--gradient-checkpointing"] if case.checkpointing else []
    command += ["--autocast"] if args.peer_autocast and case.dtype == "bf16" else []
    peak = start([str(part) for part in command], work / "peer.log")
    rows = read_lines(work / "peer.log")
    speeds = [row["tokens"] / row["seconds"] for row in rows]
    return Run([row["loss"] for row in rows], [row["grad_norm"] for row in rows], speeds, peak)


def model(args: argparse.Namespace, case: Case) -> str:
    return args.model_f32 if case.dtype == "f32" else args.model_bf16


def check(case: Case, ours: Run, peer: Run) -> dict:
    """Compares the losses and gradient norms of two runs, step by step."""
    if len(ours.losses) != len(peer.losses):
        raise SystemExit(f"error: {case}: {len(ours.losses)} steps against {len(peer.losses)}")
    loss = max(abs(a - b) for a, b in zip(ours.losses, peer.losses))
    norm = max(abs(a - b) / b for a, b in zip(ours.grad_norms, peer.grad_norms))
    passed = loss <= (LOSS_TOLERANCE if case.quant == "none" else QUANTIZED_LOSS_TOLERANCE)[case.dtype]
    word = "agrees" if passed else "DIFFERS"
    print(f"{case}: {word}: largest loss difference {loss:.2e}, largest relative gradient norm difference {norm:.2e}")
    return {"loss_difference": loss, "grad_norm_relative_difference": norm, "passed": passed}


def summary(args: argparse.Namespace, runs: list[Run]) -> dict:
    speeds = [statistics.median(run.tokens_per_second[args.warm_up :]) for run in runs]
    return {
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_by_run": speeds,
        "peak_memory": statistics.median(run.peak_memory for run in runs),
        "planned_memory": runs[0].planned_memory,
        "losses": runs[0].losses,
        "grad_norms": runs[0].grad_norms,
    }


def table(results: list[dict]) -> str:
    lines = [
        "| case | lowrank tokens/s | peer tokens/s | speed ratio | lowrank GB | planned GB | peer GB | memory ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results:
        ours, peer = row["lowrank"], row["peer"]
        lines.append(
            f"| {row['case']} | {ours['tokens_per_second']:.1f} | {peer['tokens_per_second']:.1f} | {row['speed_ratio']:.2f}"
            f" | {ours['peak_memory'] / 1e9:.3f} | {ours['planned_memory'] / 1e9:.3f} | {peer['peak_memory'] / 1e9:.2f} | {row['memory_ratio']:.2f} |"
        )
    return "\n".join(lines)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    args = parse()
    dtypes = [d for d in LOSS_TOLERANCE if args.dtype in (None, d)]
    cases = [Case(d, c, q) for q in args.quant for d in dtypes for c in (False, True)]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        if args.data:
            (work / "rows.jsonl").write_bytes(Path(args.data).read_bytes())
        else:
            write_rows(work / "rows.jsonl", args.steps, args.length * 12)
        run_peer(args, cases[0], work, "--write-init-adapter", str(work / "init"))
        runs = {case: ([], []) for case in cases}
        for repetition in range(args.repetitions):
            for case in cases:
                sides = [(0, run_ours), (1, run_peer)]
                for side, run in sides if repetition % 2 == 0 else reversed(sides):
                    extra = ("--init-adapter", str(work / "init")) if side == 1 else ()
                    result = run(args, case, work, *extra)
                    runs[case][side].append(result)
                    speed = statistics.median(result.tokens_per_second[args.warm_up :])
                    name = ("lowrank", "peer")[side]
                    print(f"{repetition + 1}/{args.repetitions} {case}: {name} {speed:.1f} tokens/s", file=sys.stderr)
    results = []
    for case, (ours, peer) in runs.items():
        row = {"case": str(case), "lowrank": summary(args, ours), "peer": summary(args, peer)}
        row["speed_ratio"] = row["lowrank"]["tokens_per_second"] / row["peer"]["tokens_per_second"]
        row["memory_ratio"] = row["lowrank"]["peak_memory"] / row["peer"]["peak_memory"]
        if args.check:
            row["check"] = check(case, ours[0], peer[0])
        results.append(row)
    print(f"{processor()}, {args.threads} threads; {args.length} tokens a step, r {RANK}, all-linear, batch 1;"
          f" medians of {args.repetitions} runs of {args.steps} steps, the first {args.warm_up} not timed\n")
    print(table(results))
    if args.json:
        settings = {"processor": processor(), **vars(args), "r": RANK, "lora_alpha": ALPHA}
        Path(args.json).write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
    if any(not row["check"]["passed"] for row in results if "check" in row):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
