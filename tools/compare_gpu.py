"""Times PyTorch (cuBLAS, scaled_dot_product_attention, cross-entropy of a frozen head, fused AdamW), bitsandbytes' four-bit linear layers and a QLoRA
training step of transformers + PEFT on a GPU, on the shapes of benches/cuda.rs, and puts them beside what that printed.

    cargo bench --bench cuda | tee bench.txt                  # or results/bench.txt of a bundle (tools/gpu_bundle.sh)
    python tools/compare_gpu.py --bench bench.txt [--metrics OUTPUT/metrics.jsonl] [--json compare_gpu.json]

Run both on the same idle GPU, one after the other. Times are medians by CUDA events; weights take turns so that the second-level
cache does not hold them. --metrics is of a `finetune train` run of the same model (tools/gpu_7b_config.json, --load-format
dummy --quant nf4 --dtype bf16 --gradient-checkpointing --r 16 --target-modules all-linear, micro-batches of one sequence of 512 tokens), whose
steps become the line `step`. --device cpu --smoke runs everything once on tiny shapes, to see that it runs.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROTATED_BYTES = 256 << 20
RANK = 16
UNITS = {"ps": 1e-12, "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


class Timer:
    def __init__(self, device: str, smoke: bool):
        self.device, self.smoke = device, smoke

    def once(self, run: Callable[[int], object], i: int) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            run(i)
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(i)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def median(self, run: Callable[[int], object]) -> float:
        """Seconds of one call; many are put between two events where a call is short."""
        if self.smoke:
            return self.once(run, 0)
        for i in range(3):
            run(i)
        single = self.once(run, 3)
        repeats = max(1, int(0.02 / max(single, 1e-7)))

        def many(round_: int) -> None:
            for i in range(repeats):
                run(round_ * repeats + i)

        return statistics.median(self.once(many, round_) / repeats for round_ in range(10))


def normal(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def copies(timer: Timer, rows: dict[str, float]) -> None:
    n = 1 << 10 if timer.smoke else 1 << 28
    x, y = (torch.zeros(n, device=timer.device) for _ in range(2))
    rows["copy/1 GiB"] = timer.median(lambda i: y.copy_(x))


def products(timer: Timer, rows: dict[str, float]) -> None:
    for n in (4096, 8192):
        size = 64 if timer.smoke else n
        x, w = (normal((size, size), timer.device) for _ in range(2))
        rows[f"gemm bf16/{n}^3"] = timer.median(lambda i: torch.nn.functional.linear(x, w))


def quantized_products(timer: Timer, rows: dict[str, float]) -> None:
    import bitsandbytes as bnb
    from bitsandbytes import functional as F

    for n, k in ((4096, 4096), (11008, 4096), (22016, 8192)):
        out, inner = (128, 64) if timer.smoke else (n, k)
        w = normal((out, inner), timer.device)
        count = 1 if timer.smoke else -(-ROTATED_BYTES // (out * inner // 2))
        weights = [F.quantize_4bit(w, quant_type="nf4", compress_statistics=True, blocksize=64) for _ in range(count)]
        a, b = normal((RANK, inner), timer.device), normal((out, RANK), timer.device)
        for m in (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 8192):
            tokens = min(m, 4) if timer.smoke else m
            x, dy = normal((tokens, inner), timer.device), normal((tokens, out), timer.device)

            def forward(i: int) -> torch.Tensor:
                packed, state = weights[i % count]
                return bnb.matmul_4bit(x, packed.t(), quant_state=state)

            def with_rank(i: int) -> torch.Tensor:
                return forward(i) + (x @ a.t()) @ b.t()

            def backward(i: int) -> torch.Tensor:
                packed, state = weights[i % count]
                return dy @ F.dequantize_4bit(packed, state)

            with torch.no_grad():
                rows[f"gemm nf4 {n}x{k} x W^T/{m} rows"] = timer.median(forward)
                rows[f"gemm nf4 {n}x{k} x W^T/{m} rows with rank {RANK}"] = timer.median(with_rank)
                rows[f"gemm nf4 {n}x{k} dy W/{m} rows"] = timer.median(backward)


def attention(timer: Timer, rows: dict[str, float]) -> None:
    for length in (512, 4096):
        shape = (1, 2, 16, 32) if timer.smoke else (1, 32, length, 128)
        q, k, v = (normal(shape, timer.device).requires_grad_() for _ in range(3))
        dout = normal(shape, timer.device)

        def forward(_: int = 0) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        with torch.no_grad():
            rows[f"attention bf16/{length} forward"] = timer.median(forward)
        out = forward()
        gradients = lambda i: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)  # noqa: E731
        rows[f"attention bf16/{length} backward"] = timer.median(gradients)


def losses(timer: Timer, rows: dict[str, float]) -> None:
    """Whole logits in bf16, their loss in f32 and the gradient of the hidden states; the head is frozen."""
    for vocabulary in (32_000, 128_256, 152_064):
        out, hidden = (256, 64) if timer.smoke else (vocabulary, 4096)
        head = normal((out, hidden), timer.device)
        for tokens in (512, 4096):
            m = 16 if timer.smoke else tokens
            x = normal((m, hidden), timer.device).requires_grad_()
            targets = torch.randint(0, out, (m,), device=timer.device)

            def both(_: int) -> torch.Tensor:
                logits = torch.nn.functional.linear(x, head).float()
                return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets), x)[0]

            rows[f"linear cross-entropy {vocabulary}x4096/{tokens} rows"] = timer.median(both)


def optimizer(timer: Timer, rows: dict[str, float]) -> None:
    n = 160_000_000
    p = torch.zeros(1 << 10 if timer.smoke else n, device=timer.device, requires_grad=True)
    p.grad = torch.zeros_like(p)
    adamw = torch.optim.AdamW([p], lr=1e-4, weight_decay=0.01, fused=True)
    rows[f"adamw/{n}"] = timer.median(lambda i: adamw.step())


def quantized_model(config: dict, device: str) -> torch.nn.Module:
    """A random model whose linear layers but the head are bitsandbytes' in NF4, made layer by layer."""
    import bitsandbytes as bnb
    from transformers import LlamaConfig, LlamaForCausalLM

    keys = {k: v for k, v in config.items() if k not in ("architectures", "model_type", "torch_dtype")}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**keys)).to(torch.bfloat16)
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        new = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        data = 0.02 * torch.randn(module.out_features, module.in_features, dtype=torch.bfloat16)
        new.weight = bnb.nn.Params4bit(data, requires_grad=False, quant_type="nf4", compress_statistics=True)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new.to(device))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, last = name.rpartition(".")
            value = torch.ones(parameter.shape) if "norm" in name else 0.02 * torch.randn(parameter.shape)
            value = torch.nn.Parameter(value.to(device, torch.bfloat16), requires_grad=False)
            setattr(model.get_submodule(parent), last, value)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    model.is_loaded_in_4bit = True
    return model


def training_step(timer: Timer, rows: dict[str, float], config: dict, tokens: int) -> None:
    from peft import LoraConfig, get_peft_model

    if timer.smoke:
        tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256}
        config, tokens = {**config, **tiny, "num_attention_heads": 4, "num_key_value_heads": 4}, 16
    model = quantized_model(config, timer.device)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(0, config["vocab_size"], (1, tokens), device=timer.device)

    def step(_: int) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        adamw.zero_grad()

    rows[f"step/{tokens} tokens"] = timer.median(step)


def bench_times(path: Path) -> dict[str, float]:
    """Seconds by name, from what criterion printed: a name, then its times, on one line or on two."""
    found, name = {}, ""
    for line in path.read_text().splitlines():
        match = re.search(r"^(.*?)\s*time:\s*\[\S+ \S+ (\S+) (\S+) \S+ \S+\]", line)
        if match is None:
            name = line.strip() or name
            continue
        found[match[1].strip() or name] = float(match[2]) * UNITS[match[3]]
    return found


def metrics_time(path: Path, tokens: int) -> float:
    """Seconds of a step of so many tokens, from a run's metrics."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][2:]
    return tokens / statistics.median(speeds)


def table(ours: dict[str, float], peer: dict[str, float]) -> str:
    lines = ["| what | ours, µs | peer, µs | peer / ours |", "|---|---|---|---|"]
    for name in [*peer, *(name for name in ours if name not in peer)]:
        micro = [f"{1e6 * side[name]:.1f}" if name in side else "" for side in (ours, peer)]
        ratio = f"{peer[name] / ours[name]:.2f}" if name in ours and name in peer else ""
        lines.append(f"| {name} | {micro[0]} | {micro[1]} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, help="what `cargo bench --bench cuda` printed")
    parser.add_argument("--metrics", type=Path, help="metrics.jsonl of a training run of ours")
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "gpu_7b_config.json")
    parser.add_argument("--tokens", type=int, default=512, help="of a training step")
    parser.add_argument("--json", type=Path, help="where to write the times, in seconds")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", help="parts whose function's name has this in it")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, once")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch sees; --device cpu --smoke only shows that this runs")
    timer, peer = Timer(args.device, args.smoke), {}
    config = json.loads(args.config.read_text())
    for part in (copies, products, quantized_products, attention, losses, optimizer):
        if args.only is None or args.only in part.__name__:
            part(timer, peer)
    if args.only is None or args.only in training_step.__name__:
        training_step(timer, peer, config, args.tokens)
    ours = bench_times(args.bench) if args.bench else {}
    if args.metrics:
        ours[f"step/{args.tokens} tokens"] = metrics_time(args.metrics, args.tokens)
    device = torch.cuda.get_device_name() if args.device != "cpu" else "cpu"
    print(f"{device}, torch {torch.__version__}{', tiny shapes: no measurement' if args.smoke else ''}\n")
    print(table(ours, peer))
    if args.json:
        args.json.write_text(json.dumps({"device": device, "smoke": args.smoke, "ours": ours, "peer": peer}, indent=1))


if __name__ == "__main__":
    main()
