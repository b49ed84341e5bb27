"""Steps of PyTorch's and bitsandbytes' optimizers on one tensor."""

from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as F
from bitsandbytes.backends.cpu import ops
from safetensors.torch import save_file

# A multiple of no block; bitsandbytes keeps smaller tensors in 32 bits.
ELEMENTS = 4096 + 100
STEPS = 4
LEARNING_RATE = 1e-2


def quantize_exactly(x, code, absmax_out, out, blocksize):
    """bitsandbytes' CPU quantizer looks codes up in coarse steps and misses the nearest one for small numbers."""
    for block, part in enumerate(x.split(blocksize)):
        absmax = part.abs().max()
        scaled = (part * (1 / absmax)).double()
        midpoints = (code[:-1].double() + code[1:].double()) / 2
        absmax_out[block] = absmax
        out[block * blocksize : block * blocksize + len(part)] = torch.bucketize(scaled, midpoints).to(torch.uint8)


ops._quant_blockwise_fp32_direct = quantize_exactly


def optimizers(p: torch.nn.Parameter) -> dict:
    """By our names."""
    return {
        "adamw_torch": lambda: torch.optim.AdamW([p], lr=LEARNING_RATE, weight_decay=0.1),
        "adamw_8bit": lambda: bnb.optim.AdamW8bit([p], lr=LEARNING_RATE, weight_decay=0.1),
        "lion_32bit": lambda: bnb.optim.Lion32bit([p], lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.1),
        "sgd": lambda: torch.optim.SGD([p], lr=LEARNING_RATE, weight_decay=0.1),
    }


def make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(ELEMENTS, generator=generator)
    # Gradients of a few magnitudes, as those of different layers.
    scales = 10.0 ** -torch.arange(ELEMENTS).div(1024, rounding_mode="floor")
    grads = [torch.randn(ELEMENTS, generator=generator) * scales for _ in range(STEPS)]
    out = {"start": start, "map.unsigned": F.create_dynamic_map(signed=False)}
    out |= {f"grad.{step}": grad for step, grad in enumerate(grads)}
    for name in optimizers(torch.nn.Parameter(start.clone())):
        p = torch.nn.Parameter(start.clone())
        optimizer = optimizers(p)[name]()
        for grad in grads:
            p.grad = grad.clone()
            optimizer.step()
        out[f"{name}.end"] = p.detach()
        state = optimizer.state[p]
        if name == "adamw_8bit":
            for key in ["state1", "state2", "absmax1", "absmax2"]:
                out[f"{name}.{key}"] = state[key]
    save_file({key: value.contiguous() for key, value in out.items()}, folder / "optimizers.safetensors")
