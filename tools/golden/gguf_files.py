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


def kind_of(ours: str, types: str) -> str | None:
    """The type of a matrix: `q4_0` in all layers, or `mixed` ones."""
    if types == "q4_0":
        return "Q4_0" if ours != "output" else None
    return {"attn_output": "Q8_0", "output": "Q8_0", "ffn_gate": "Q4_0"}.get(ours, "Q4_1")


def make_llama(folder: Path, base: Path, tokenizer: Path, types: str = "") -> None:
    """With `types`, matrices as kind_of says; the MLP is widened to whole blocks."""
    config = json.loads((base / "config.json").read_text())
    weights = {k: v.numpy() for k, v in load_file(str(base / "model.safetensors")).items()}
    if types:
        config["intermediate_size"] = 64
    writer = gguf.GGUFWriter(str(folder / (f"llama_{types}.gguf" if types else "llama.gguf")), "llama")
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

    def add(name: str, weight: np.ndarray) -> None:
        kind = kind_of(name.split(".")[-2], types) if types and weight.ndim == 2 else None
        if kind:
            kind = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)

    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    add("output.weight", weights["lm_head.weight"])
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in names.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                heads = config["num_attention_heads" if ours == "attn_q" else "num_key_value_heads"]
                weight = permuted(weight, heads)
            if types and ours in ("ffn_gate", "ffn_up"):
                weight = np.concatenate([weight, weight[:8]])
            if types and ours == "ffn_down":
                weight = np.concatenate([weight, weight[:, :8]], axis=1)
            add(f"blk.{layer}.{ours}.weight", np.ascontiguousarray(weight))
    finish(writer)


TEXTS = [
    "Hello world", "the cat sat on the mat, the cat!", " leading and  double   spaces ", "", "\n\n new\tlines\n",
    "caf\u00e9 na\u00efve \u4f60\u597d \U0001f600", "<s>the cat</s> sat", "call <tool> now<tool>", "1234 + 5 = 1239", "\u2581the",
]


def spm_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """A sentencepiece vocabulary: merges of a little text, scored by their order."""
    corpus = "the cat sat on the mat and the hat that the world had; hello there, double spaces and leading lines"
    words = [list("\u2581" + word) for word in corpus.split() * 2]
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    scores, kinds = [0.0] * len(tokens), [2, 3, 3] + [6] * 256
    pieces = []
    for _ in range(90):
        pairs = {}
        for word in words:
            for pair in zip(word, word[1:]):
                pairs[pair] = pairs.get(pair, 0) + 1
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        pieces.append("".join(best))
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    pieces = list(dict.fromkeys(pieces))
    letters = sorted(set("\u2581" + corpus.replace(" ", "") + "HXab\u00e9!=+"))
    tokens += pieces + letters + ["  ", "<tool>"]
    scores += [-float(i) for i in range(len(pieces) + len(letters))] + [0.0, 0.0]
    kinds += [1] * (len(pieces) + len(letters)) + [4, 4]
    return tokens, scores, kinds


def make_spm(folder: Path) -> None:
    """Files with a sentencepiece tokenizer alone, and what transformers makes of them."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer

    tokens, scores, kinds = spm_vocabulary()
    cases = {}
    for architecture in ("llama", "phi3", "gemma"):
        path = folder / f"spm_{architecture}.gguf"
        writer = gguf.GGUFWriter(str(path), architecture)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(kinds)
        for name, token in (("bos", 1), ("eos", 2), ("unk", 0)):
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(True)
        finish(writer)
        name, tokenizer, _ = get_gguf_tokenizer(str(path))
        backend, _ = convert_gguf_tokenizer(name, tokenizer)
        cases[architecture] = []
        for text in TEXTS:
            ids = backend.encode(text, add_special_tokens=False).ids
            cases[architecture].append({"text": text, "ids": ids, "decoded": backend.decode(ids)})
    (folder / "spm.json").write_text(json.dumps(cases, indent=1) + "\n")


def make(folder: Path, root: Path) -> None:
    folder.mkdir()
    make_types(folder)
    make_spm(folder)
    for types in ("", "q4_0", "mixed"):
        make_llama(folder, root / "llama", root / "tokenizer" / "tokenizer.json", types)
