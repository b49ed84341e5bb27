"""GGUF files: one tensor of each type with the values that gguf-py decodes, and a tiny llama with a tokenizer."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"]
ROWS, COLS = 3, 512


def random_blocks(kind: gguf.GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """Random bytes whose f16 constants are ordinary numbers."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (ROWS, COLS // block, size), dtype=np.uint8)
    constants = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}[kind.name]
    for at in constants:
        values = rng.normal(0, 0.05, (ROWS, COLS // block, 1)).astype(np.float16)
        data[:, :, at : at + 2] = values.view(np.uint8)
    return data.reshape(ROWS, -1)


def make_types(folder: Path) -> None:
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(str(folder / "types.gguf"), "llama")
    expected = {}
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        if name in ("F32", "F16", "BF16"):
            values = rng.normal(0, 1, (ROWS, COLS)).astype(np.float32)
            data = gguf.quantize(values, kind)
        else:
            data = random_blocks(kind, rng)
        writer.add_tensor(name, data, raw_dtype=kind)
        expected[name] = torch.from_numpy(gguf.dequantize(data, kind).astype(np.float32).reshape(ROWS, COLS))
    finish(writer)
    save_file(expected, str(folder / "types.safetensors"))


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp keeps them: pairs beside each other."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def make_llama(folder: Path, base: Path, tokenizer: Path, q4_0: bool = False) -> None:
    """With `q4_0`, the layers' matrices in that type; the MLP is widened to whole blocks."""
    config = json.loads((base / "config.json").read_text())
    weights = {k: v.numpy() for k, v in load_file(str(base / "model.safetensors")).items()}
    if q4_0:
        config["intermediate_size"] = 64
    writer = gguf.GGUFWriter(str(folder / ("llama_q4_0.gguf" if q4_0 else "llama.gguf")), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    model = json.loads(tokenizer.read_text())
    by_id = {i: t for t, i in model["model"]["vocab"].items()}
    special = {t["id"]: t["content"] for t in model["added_tokens"]}
    tokens = [special.get(i) or by_id[i] for i in range(len(by_id | special))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = {t["id"]: 3 if t["special"] else 4 for t in model["added_tokens"]}
    writer.add_token_types([kinds.get(i, 1) for i in range(len(tokens))])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["model"]["merges"]])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}")
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in names.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                heads = config["num_attention_heads" if ours == "attn_q" else "num_key_value_heads"]
                weight = permuted(weight, heads)
            if q4_0 and ours in ("ffn_gate", "ffn_up"):
                weight = np.concatenate([weight, weight[:8]])
            if q4_0 and ours == "ffn_down":
                weight = np.concatenate([weight, weight[:, :8]], axis=1)
            name, weight = f"blk.{layer}.{ours}.weight", np.ascontiguousarray(weight)
            if q4_0 and weight.ndim == 2:
                kind = gguf.GGMLQuantizationType.Q4_0
                writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, weight)
    finish(writer)


def make(folder: Path, root: Path) -> None:
    folder.mkdir()
    make_types(folder)
    for q4_0 in (False, True):
        make_llama(folder, root / "llama", root / "tokenizer" / "tokenizer.json", q4_0)
