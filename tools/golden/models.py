"""Tiny random models of every family, in Hugging Face folders, and what transformers computes with them."""

import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 97
LENGTHS = (13, 7)  # tokens of the two sequences whose loss is taken
END = 1  # the end token
PROMPT_LENGTH = 5
NEW_TOKENS = 12

COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=END,
    tie_word_embeddings=False,
)
LONG = dict(max_position_embeddings=512)
# With head_dim 8 and theta 10000 the four wavelengths are 6, 63, 628 and 6283: kept, blended, divided, divided.
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
)

MODELS = {
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=END),
    "llama": LlamaConfig(**COMMON),
    "llama_bias": LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "llama_rope_parameters": LlamaConfig(
        **{**COMMON, **LONG, "tie_word_embeddings": True}, rope_parameters={"rope_theta": 10000.0, **LLAMA3_ROPE}
    ),
    "llama_rope_scaling": LlamaConfig(**{**COMMON, **LONG}, rope_parameters={"rope_theta": 5000.0, **LLAMA3_ROPE}),
    "mistral": MistralConfig(**COMMON, head_dim=16),
    "qwen2": Qwen2Config(**{**COMMON, "tie_word_embeddings": True}),
    "qwen3": Qwen3Config(**COMMON, head_dim=12),
    "glm": GlmConfig(**COMMON, head_dim=8, pad_token_id=0),
    "glm4": Glm4Config(**COMMON, head_dim=8, pad_token_id=0),
    # Windows of 5 are shorter than both sequences.
    "mistral_window": MistralConfig(**COMMON, head_dim=16, sliding_window=5),
    "llama_yarn": LlamaConfig(
        **{**COMMON, **LONG},
        rope_parameters=dict(rope_theta=10000.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=128),
    ),
    "llama_linear": LlamaConfig(
        **{**COMMON, **LONG}, rope_parameters=dict(rope_theta=10000.0, rope_type="linear", factor=2.5)
    ),
    "gemma": GemmaConfig(**{**COMMON, "tie_word_embeddings": True}, head_dim=8),
    "gemma2": Gemma2Config(
        **{**COMMON, "tie_word_embeddings": True}, head_dim=8, sliding_window=5, query_pre_attn_scalar=16,
        attn_logit_softcapping=3.0, final_logit_softcapping=4.0,
    ),
    "gemma3_text": Gemma3TextConfig(
        **{**COMMON, "tie_word_embeddings": True, "num_hidden_layers": 3}, head_dim=8, sliding_window=5,
        query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": Phi3Config(**COMMON, pad_token_id=0),
}
FULL_GRADIENTS = ("gpt2", "llama", "qwen3", "glm4", "gemma2", "gemma3_text")  # every parameter's gradient is stored
SHARDED = ("mistral",)  # saved in several files with an index


def generator(*names: str) -> torch.Generator:
    """A random stream of its own for each thing that is made, so that adding one leaves the others as they were."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(names).encode()))


def randomise(model: PreTrainedModel, stream: torch.Generator) -> None:
    """Weights large enough that the logits are far from flat; norms and biases off their defaults."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=stream)
            if parameter.dim() > 1:
                parameter.copy_(0.25 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:
                # Gemma's norms add 1 themselves.
                center = 0.0 if model.config.model_type.startswith("gemma") else 1.0
                parameter.copy_(center + 0.2 * noise)


def write_old_config(path: Path) -> None:
    """Rewrites config.json with the keys that transformers 4 used: `rope_theta`, `rope_scaling`, `torch_dtype`."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


def sequences(name: str) -> list[torch.Tensor]:
    """Two sequences of odd lengths, [1, n] each; ids 0 and 1 are the special tokens."""
    stream = generator(name, "sequences")
    return [torch.randint(2, VOCAB, (1, length), generator=stream) for length in LENGTHS]


def target_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies of ids[1:]."""
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")


def continuation(model: torch.nn.Module, prompt: torch.Tensor) -> torch.Tensor | None:
    """The most likely next tokens; none when a choice is too close to call or is the end token."""
    ids = prompt
    for _ in range(NEW_TOKENS):
        best = model(input_ids=ids).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < 1e-3 or best.indices[0] == END:
            return None
        ids = torch.cat([ids, best.indices[:1].view(1, 1)], dim=1)
    return ids[0, prompt.shape[1] :]


def greedy(model: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    """A prompt and its continuation: the first of a fixed row of prompts that has a clear one."""
    stream = generator(name, "prompts")
    for _ in range(100):
        prompt = torch.randint(2, VOCAB, (1, PROMPT_LENGTH), generator=stream)
        with torch.no_grad():
            new = continuation(model, prompt)
        if new is not None:
            return {"greedy.prompt": prompt[0], "greedy.tokens": new}
    raise SystemExit(f"error: {name}: no prompt with a clear greedy continuation")


def results(model: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Inputs, logits, loss and greedy tokens; leaves the loss's gradients in the parameters."""
    tensors, total, count = {}, 0.0, 0
    for index, ids in enumerate(sequences(name)):
        # Virtual tokens of prompt tuning have logits too.
        logits = model(input_ids=ids).logits[:, -ids.shape[1] :]
        total, count = total + target_loss(logits, ids), count + ids.shape[1] - 1
        tensors[f"input_ids.{index}"] = ids[0]
        tensors[f"logits.{index}"] = logits[0].detach()
    loss = total / count
    if loss.requires_grad:
        loss.backward()
    tensors["loss"] = loss.detach().reshape(1)
    return tensors | greedy(model, name)


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, str(path))


def make(folder: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_config(MODELS[name])
    randomise(model, generator(name, "weights"))
    model.save_pretrained(str(folder), max_shard_size="48KB" if name in SHARDED else "5GB")
    if name == "llama_rope_scaling":
        write_old_config(folder / "config.json")
    model = load(folder)
    tensors = results(model, name)
    if name in FULL_GRADIENTS:
        tensors |= {f"gradient.{key}": parameter.grad for key, parameter in model.named_parameters()}
    save(tensors, folder / "golden.safetensors")
