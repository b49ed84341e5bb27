"""Quantized tensors and checkpoints as bitsandbytes and transformers make them."""

import warnings
from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as F
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

# name: (shape, block size, quant type, nested, type)
TENSORS = {
    "nf4": ((20, 128), 64, "nf4", False, "f32"),
    "nf4_nested": ((290, 32), 32, "nf4", True, "bf16"),
    "nf4_nested_f32": ((20, 128), 64, "nf4", True, "f32"),
    "nf4_f16": ((24, 96), 64, "nf4", False, "f16"),
    "nf4_ragged": ((7, 98), 64, "nf4", False, "f32"),
    "nf4_ragged_nested": ((19, 50), 32, "nf4", True, "bf16"),
    "nf4_256": ((16, 256), 256, "nf4", False, "f32"),
    "nf4_odd": ((5, 33), 32, "nf4", False, "f32"),
    "nf4_4096": ((3, 4096), 4096, "nf4", False, "bf16"),
    "nf4_zero_block": ((4, 64), 64, "nf4", False, "f32"),
    "fp4": ((24, 128), 64, "fp4", False, "f32"),
    "fp4_nested": ((19, 96), 64, "fp4", True, "bf16"),
    "fp4_odd": ((5, 33), 32, "fp4", False, "f16"),
}

# folder: (tiny model, quant type, double quantization)
CHECKPOINTS = {
    "llama_nf4_nested": ("llama", "nf4", True),
    "qwen2_nf4": ("qwen2", "nf4", False),
    "gpt2_fp4_nested": ("gpt2", "fp4", True),
}


def dequantized(codes: torch.Tensor, state: F.QuantState) -> torch.Tensor:
    """As bitsandbytes' generic code does it: its CPU kernel takes rows to be whole blocks, and is wrong where they
    are not."""
    if state.shape[-1] % state.blocksize == 0:
        return F.dequantize_4bit(codes, state)
    absmax = state.absmax
    if state.nested:
        absmax = F.dequantize_blockwise(absmax, state.state2) + state.offset
    return _dequantize_4bit_compute(
        codes.flatten(), absmax, state.code, state.blocksize, state.shape, state.dtype
    )


def tensors() -> dict[str, torch.Tensor]:
    """NAME.x, .codes, .absmax (as stored), .nested_absmax, .offset, .values (dequantized, as f32)."""
    out = {}
    for seed, (name, (shape, blocksize, quant_type, nested, dtype)) in enumerate(TENSORS.items()):
        torch.manual_seed(seed)
        x = (torch.randn(shape) * torch.rand(shape[0], 1) * 0.1).to(DTYPES[dtype])
        if name == "nf4_zero_block":
            x[1] = 0
        codes, state = F.quantize_4bit(
            x, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
        )
        out[f"{name}.x"] = x
        out[f"{name}.codes"] = codes.flatten()
        out[f"{name}.absmax"] = state.absmax
        if nested:
            out[f"{name}.nested_absmax"] = state.state2.absmax
            out[f"{name}.offset"] = state.offset.reshape(1)
        out[f"{name}.values"] = dequantized(codes, state)
    out["levels.nf4"] = F.get_4bit_type("nf4", device="cpu")
    out["levels.fp4"] = F.get_4bit_type("fp4", device="cpu")
    out["map.signed"] = F.create_dynamic_map(signed=True)
    return {key: value.contiguous() for key, value in out.items()}


def checkpoint(folder: Path, base: Path, quant_type: str, nested: bool) -> None:
    """The model as transformers saves it in four bits, and the logits of its dequantized weights: on the CPU
    bitsandbytes itself computes with constants rounded to bf16."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
    modules = dict(plain.named_modules())
    ids = torch.arange(3, 20).remainder(model.config.vocab_size).reshape(1, -1)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                values = dequantized(module.weight.data, module.weight.quant_state)
                weight = modules[name].weight
                weight.copy_(values if isinstance(modules[name], torch.nn.Linear) else values.T)
        logits = plain(ids).logits[0]
    save_file({"ids": ids[0].contiguous(), "logits": logits.contiguous()}, folder / "golden.safetensors")


def make(folder: Path, models: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(), folder / "tensors.safetensors")
    for name, (base, quant_type, nested) in CHECKPOINTS.items():
        checkpoint(folder / name, models / base, quant_type, nested)
