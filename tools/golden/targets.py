"""Which modules PEFT adapts, and with which rank and scaling, by LoraConfig's arguments."""

import json
from pathlib import Path

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from . import models

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")

ANY_FAMILY = [
    {},
    {"target_modules": "all-linear"},
    {"target_modules": "ALL-LINEAR"},
    {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    {"target_modules": "all-linear", "layers_to_transform": [1]},
    {"target_modules": ["lm_head"]},
    {"target_modules": ["nothing"]},
    {"target_modules": "nothing"},
    {"target_modules": []},
]
LLAMA_LIKE = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["q_proj", "o_proj", "mlp.down_proj"]},
    {"target_modules": ["model.layers.1.self_attn.k_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.1\.mlp.*"},
    {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": r"model\.layers\.1\..*_proj"},
    {"target_modules": r"q_proj"},
    {"target_modules": r".*layers\.(?!0)\d+\.self_attn\.[qk]_proj"},
    {"target_modules": r".*_proj", "layers_to_transform": 1},
    {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": 0},
    {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [0, 1]},
    {"target_modules": ["q_proj"], "layers_to_transform": [5]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    {"target_modules": ["model.layers.1.self_attn.k_proj", "q_proj"], "layers_to_transform": [0]},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 10}},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r"layers\.1\..*": 2, "q_proj": 5}},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 5, r"layers\.1\..*": 2}},
    {"target_modules": ["q_proj"], "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 2, "proj": 7}},
    {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"layers.0.self_attn.q_proj": 9}},
]
GPT2_LIKE = [
    {"target_modules": ["c_attn", "c_fc"]},
    {"target_modules": ["c_proj"]},
    {"target_modules": ["attn.c_proj"]},
    {"target_modules": r".*\.mlp\.c_(fc|proj)"},
    {"target_modules": ["c_attn"], "layers_to_transform": [1]},
    {"target_modules": ["c_attn"], "layers_to_transform": 0, "layers_pattern": "h"},
    {"target_modules": ["c_proj"], "exclude_modules": ["attn.c_proj"]},
    {"target_modules": ["c_attn", "c_proj"], "rank_pattern": {"attn.c_proj": 2}, "alpha_pattern": {r"h\.1\..*": 4}},
]


def outcome(folder: Path, arguments: dict) -> dict:
    try:
        model = get_peft_model(models.load(folder), LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **arguments))
    except ValueError as error:
        return {"error": type(error).__name__}
    layers = {name: module for name, module in model.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    return {"modules": {name: {"r": m.r["default"], "scaling": m.scaling["default"]} for name, m in layers.items()}}


def make(path: Path, root: Path) -> None:
    cases = []
    for family in FAMILIES:
        for arguments in ANY_FAMILY + (GPT2_LIKE if family == "gpt2" else LLAMA_LIKE):
            cases.append({"model": family, "config": arguments, **outcome(root / family, arguments)})
    path.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
