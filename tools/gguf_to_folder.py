"""Turns a GGUF file into a plain Hugging Face folder: gguf_to_folder.py FILE.gguf OUTPUT_DIR DTYPE."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main() -> None:
    gguf, output, dtype = Path(sys.argv[1]), Path(sys.argv[2]), getattr(torch, sys.argv[3])
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{output}: {type(model).__name__}, {count} parameters, {dtype}")


if __name__ == "__main__":
    main()
