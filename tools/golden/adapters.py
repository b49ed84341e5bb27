"""Adapters as PEFT saves them, and what PEFT computes with them."""

from pathlib import Path

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.utils import get_peft_model_state_dict

from . import models

PLAIN = dict(r=4, lora_alpha=8, task_type="CAUSAL_LM")

# Target names by whether the family keeps GPT-2's layer names.
ATTENTION = {True: ["c_attn", "attn.c_proj"], False: ["q_proj", "v_proj", "o_proj"]}
EVERYTHING = {True: ["c_attn", "c_proj", "c_fc"], False: ["q_proj", "k_proj", "v_proj", "gate_proj", "down_proj"]}
RANKS = {True: {"attn.c_proj": 2, r"h\.1\.mlp\..*": 6}, False: {"q_proj": 2, r"layers\.1\.mlp\..*": 6}}
ALPHAS = {True: {"c_fc": 3}, False: {"v_proj": 3, "layers.0.self_attn.q_proj": 5}}


# Families with adapters on the head, tied and not; Gemma 2 caps its logits.
HEADS = ("gpt2", "llama", "qwen2", "gemma2")
# Families with adapters on the embeddings, tied to the head and not; Gemma's are scaled.
EMBEDDINGS = ("gpt2", "llama", "mistral", "qwen2", "glm", "gemma2")


def embeddings(name: str) -> dict[str, dict]:
    """LoraConfig's arguments for adapters on embeddings, by the adapter's name."""
    if name not in EMBEDDINGS:
        return {}
    tables = ["wte", "wpe"] if name == "gpt2" else ["embed_tokens"]
    layers = ["c_attn"] if name == "gpt2" else ["q_proj"]
    found = {"embedding": {**PLAIN, "target_modules": tables + layers, "rank_pattern": {tables[0]: 3}, "alpha_pattern": {tables[-1]: 6}}}
    if name in ("gpt2", "llama", "gemma2"):
        found["embedding_dora"] = {**PLAIN, "use_dora": True, "target_modules": tables + layers}
    if name in ("llama", "qwen2"):
        # Dropout is the head's alone.
        both = {**PLAIN, "use_rslora": True, "lora_dropout": 0.1, "target_modules": [*tables, "lm_head"]}
        found["embedding_and_head"] = both
    return found


def variants(name: str) -> dict[str, dict]:
    """LoraConfig's arguments by the adapter's name."""
    gpt2 = name == "gpt2"
    if name.startswith("glm") or name == "phi3":
        plain = {**PLAIN, "target_modules": ["qkv_proj"] if name == "phi3" else ["q_proj", "v_proj"]}
        return {"plain": plain, "all_linear": {**PLAIN, "target_modules": "all-linear"}} | embeddings(name)
    short = embeddings(name) | {"plain": PLAIN, "all_linear": {**PLAIN, "target_modules": "all-linear"}}
    biases = {
        "bias_all": {**PLAIN, "bias": "all"},
        "bias_lora_only": {**PLAIN, "bias": "lora_only"},
    }
    if name in HEADS:
        short["lm_head"] = {**PLAIN, "use_rslora": True, "target_modules": ["c_attn" if gpt2 else "q_proj", "lm_head"]}
    if name == "gemma3_text":
        return {"all_linear": {**PLAIN, "target_modules": "all-linear"}}
    if name.startswith("llama_"):
        return {"plain": PLAIN}
    if name == "qwen2":
        return short | biases
    if name not in ("gpt2", "llama"):
        return short
    full = {
        **short,
        **biases,
        "rslora": {**PLAIN, "use_rslora": True, "target_modules": ATTENTION[gpt2]},
        "dropout": {**PLAIN, "lora_dropout": 0.1, "target_modules": ATTENTION[gpt2]},
        "patterns": {
            **PLAIN,
            "target_modules": EVERYTHING[gpt2],
            "rank_pattern": RANKS[gpt2],
            "alpha_pattern": ALPHAS[gpt2],
        },
        "layers": {**PLAIN, "target_modules": ATTENTION[gpt2], "layers_to_transform": [1]},
    }
    if not gpt2:
        full["modules_to_save"] = {**PLAIN, "modules_to_save": ["lm_head"]}
    return full


ADALORA = dict(init_r=3, target_r=2, lora_alpha=5, total_step=10, tinit=2, tfinal=3, deltaT=2, task_type="CAUSAL_LM")
METHOD_FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "glm", "glm4", "llama_rope_parameters")


def oft(name: str) -> dict[str, PeftConfig]:
    """OFT, which PEFT doesn't have for GPT-2's Conv1D."""
    if name == "gpt2":
        return {}
    common = dict(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    # Blocks of 8 divide both inputs; PEFT turns 5 blocks into 4.
    plain = {"oft": OFTConfig(oft_block_size=8, **common)}
    if name != "llama":
        return plain
    exact = dict(use_cayley_neumann=False)
    return plain | {
        "oft_cayley": OFTConfig(r=5, oft_block_size=0, bias="oft_only", **exact, **common),
        "oft_shared": OFTConfig(oft_block_size=8, block_share=True, num_cayley_neumann_terms=6, **common),
        # Some blocks are shorter than eps / sqrt(blocks) and some longer.
        "oft_constrained": OFTConfig(oft_block_size=4, coft=True, eps=0.9, **exact, **common),
        "oft_short_series": OFTConfig(oft_block_size=4, num_cayley_neumann_terms=2, **common),
    }


def methods(name: str) -> dict[str, PeftConfig]:
    """Configurations of the other methods, by the adapter's name."""
    gpt2 = name == "gpt2"
    if name not in METHOD_FAMILIES:
        return {}
    task = dict(task_type="CAUSAL_LM")
    virtual = dict(num_virtual_tokens=3, **task)
    # PEFT has no defaults for glm.
    targets = dict(target_modules=["c_attn", "c_fc"] if gpt2 else ["q_proj", "v_proj", "o_proj", "down_proj"])
    scaled = {} if not name.startswith("glm") else dict(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    norms = {} if not name.startswith("glm") else dict(
        target_modules=["input_layernorm", "post_attention_layernorm", "norm"]
    )
    attention = dict(target_modules=ATTENTION[gpt2])
    lora = {} if name in ("gpt2", "llama") else {
        "rslora": LoraConfig(**PLAIN, **attention, use_rslora=True),
        "layers": LoraConfig(**PLAIN, **attention, layers_to_transform=[1]),
    }
    return lora | {
        "dora": LoraConfig(**{**PLAIN, **targets}, use_dora=True),
        "prefix": PrefixTuningConfig(**virtual),
        "prefix_projection": PrefixTuningConfig(**virtual, prefix_projection=True, encoder_hidden_size=12),
        "prompt": PromptTuningConfig(**virtual),
        "ptuning": PromptEncoderConfig(**virtual, encoder_hidden_size=10),
        "ptuning_lstm": PromptEncoderConfig(**virtual, encoder_reparameterization_type="LSTM", encoder_hidden_size=6),
        "ia3": IA3Config(**task, **scaled),
        "vera": VeraConfig(**task, r=3, **targets),
        "ln_tuning": LNTuningConfig(**task, **norms),
        "adalora": AdaLoraConfig(**ADALORA, **targets),
    } | oft(name) | ({} if name != "llama" else {
        # One layer of every rank, none among them.
        "adalora_pruned": AdaLoraConfig(**ADALORA, target_modules=["q_proj", "v_proj"], rank_pattern={
            f"model.layers.{layer}.self_attn.{module}.lora_E": [bool(bits & bit) for bit in (1, 2, 4)]
            for (layer, module), bits in zip([(0, "q_proj"), (0, "v_proj"), (1, "q_proj"), (1, "v_proj")], [2, 0, 5, 7])
        }),
    })


def encoder_of(model: PeftModel) -> torch.nn.Module | None:
    """What makes the virtual tokens, if more than a table."""
    encoders = getattr(model, "prompt_encoder", None)
    if encoders is None or len(list(encoders["default"].parameters())) == 1:
        return None
    return encoders["default"]


def randomise(model: torch.nn.Module, stream: torch.Generator) -> None:
    """Moves every trainable parameter from its initial value: B is no longer zero, biases no longer the base's."""
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream))


def save_adapter(model: PeftModel, folder: Path) -> None:
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink()


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    """The trainable parameters' gradients under the names that the adapter's file uses."""
    encoder = encoder_of(model)
    if encoder is not None:
        return {f"gradient.{key}": parameter.grad for key, parameter in encoder.named_parameters()}
    found = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
    if hasattr(model, "prompt_encoder"):
        return {"gradient.prompt_embeddings": next(iter(found.values()))}
    if model.peft_config["default"].peft_type == "VERA":
        return {f"gradient.{key.replace('.default', '')}": value for key, value in found.items()}
    renamed = get_peft_model_state_dict(model, state_dict=dict(found))
    if len(renamed) != len(found):
        raise SystemExit("error: not every trainable parameter is in the adapter's file")
    return {f"gradient.{key}": value for key, value in renamed.items()}


def make_residual(folder: Path, base: Path) -> None:
    """Adapters that start as a part of the base, in a folder of their own: reading one back changes the base."""
    for init in ("pissa", "olora"):
        torch.manual_seed(0)
        # The fifth and sixth singular values are clearly apart in all weights: PyTorch's decomposition in f32 is exact enough.
        config = LoraConfig(**{**PLAIN, "r": 5, "target_modules": "all-linear"}, init_lora_weights=init)
        model = get_peft_model(models.load(base), config)
        randomise(model, models.generator(base.name, init))
        save_adapter(model, folder / init)
        model = PeftModel.from_pretrained(models.load(base), str(folder / init), is_trainable=True).eval()
        models.save(models.results(model, base.name) | gradients(model), folder / init / "golden.safetensors")


def make(base: Path, name: str) -> None:
    configs = {variant: LoraConfig(**arguments) for variant, arguments in variants(name).items()}
    for variant, config in (configs | methods(name)).items():
        folder = base / variant
        torch.manual_seed(0)
        model = get_peft_model(models.load(base), config)
        randomise(model, models.generator(name, variant))
        save_adapter(model, folder)
        encoder = encoder_of(model)
        if encoder is not None:
            models.save(dict(encoder.named_parameters()), folder / "prompt_encoder.safetensors")
        if hasattr(model, "prompt_encoder"):
            # PEFT can't read these back to go on training: what was saved is computed with.
            model.eval()
            tensors = models.results(model, name) | gradients(model)
            models.save(tensors, folder / "golden.safetensors")
            continue
        written = get_peft_model_state_dict(model)
        # What the folder holds is what is computed with: the adapter is read back.
        model = PeftModel.from_pretrained(models.load(base), str(folder), is_trainable=True).eval()
        read = get_peft_model_state_dict(model)
        if any(not torch.equal(read[key], value) for key, value in written.items()):
            raise SystemExit(f"error: {folder}: PEFT doesn't read back what it wrote")
        tensors = models.results(model, name) | gradients(model)
        models.save(tensors, folder / "golden.safetensors")
