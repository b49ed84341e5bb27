"""What LoftQ's start leaves of a weight, by PEFT's own code: |W - Q - B A|, in NF4, after so many rounds."""

import inspect
import json
from pathlib import Path

import torch
from peft.utils import loftq_utils
from safetensors.torch import load_file

RANK, ROUNDS = 4, (1, 2, 5)
# bitsandbytes repacks matrices whose sides are multiples of 16 and 32 for its CPU kernels, and what it dequantizes then is
# another matrix.
MODULES = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")


def start_on_cpu():
    """PEFT's `loftq_init`, which asks for a GPU by name."""
    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"')
    scope = dict(vars(loftq_utils))
    exec(source, scope)
    return scope["loftq_init"]


def make(path: Path, base: Path) -> None:
    weights = load_file(str(base / "model.safetensors"))
    loftq_init, norms = start_on_cpu(), {}
    for module in MODULES:
        weight = weights[f"{module}.weight"]
        for rounds in ROUNDS:
            dequantized, a, b = loftq_init(weight, num_bits=4, reduced_rank=RANK, num_iter=rounds)
            norms.setdefault(module, {})[str(rounds)] = torch.linalg.norm(weight - dequantized - b @ a).item()
    path.write_text(json.dumps({"r": RANK, "norms": norms}, indent=2) + "\n")
