"""Rows of text as token ids, the way the `finetune` example reads a JSONL of {"text"} rows."""

import json
from itertools import islice

import torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def read_rows(tokenizer, path: str, max_length: int, append_eos: bool):
    """Yields each row's ids, a [1, n] tensor with n <= max_length."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if not line.strip():
                continue
            ids = tokenizer(json.loads(line)["text"])["input_ids"]
            if append_eos:
                ids = ids + [tokenizer.eos_token_id]
            yield torch.tensor([ids[:max_length]])


def first_rows(tokenizer, path: str, max_length: int, count: int) -> list[torch.Tensor]:
    """The first `count` rows, each of exactly `max_length` tokens."""
    rows = list(islice(read_rows(tokenizer, path, max_length, append_eos=False), count))
    if len(rows) < count:
        raise SystemExit(f"error: {path}: {len(rows)} rows, {count} are needed")
    for number, row in enumerate(rows, 1):
        if row.numel() < max_length:
            raise SystemExit(f"error: {path}: row {number} has {row.numel()} tokens, {max_length} are needed")
    return rows
