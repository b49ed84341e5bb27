"""Weighted combinations of the golden LoRA adapters by PEFT's add_weighted_adapter: the logits that they give."""

from pathlib import Path

from peft import PeftModel

from . import models

# Adapters that lie elsewhere than in the base's folder.
ELSEWHERE = {"embedding_trained": Path("training/embedding/final_adapter")}
CASES = {
    "linear": (["plain", "all_linear"], [0.7, -0.4], dict(combination_type="linear")),
    "cat": (["plain", "rslora"], [0.6, 1.2], dict(combination_type="cat")),
    "svd": (["plain", "all_linear"], [0.7, 0.4], dict(combination_type="svd", svd_rank=3)),
    # On the embedding and the head too.
    "cat_embedding": (["plain", "embedding_trained"], [0.6, 1.2], dict(combination_type="cat")),
    "linear_embedding": (["plain", "embedding_trained"], [0.6, 1.2], dict(combination_type="linear")),
}


def make(folder: Path, base: Path) -> None:
    folder.mkdir()
    tensors = {}
    for name, (adapters, weights, arguments) in CASES.items():
        at = lambda adapter: str(base.parent / ELSEWHERE[adapter] if adapter in ELSEWHERE else base / adapter)
        model = PeftModel.from_pretrained(models.load(base), at(adapters[0]), adapter_name=adapters[0])
        for other in adapters[1:]:
            model.load_adapter(at(other), adapter_name=other)
        model.add_weighted_adapter(adapters, weights, "combined", **arguments)
        model.set_adapter("combined")
        model.eval()
        for index, ids in enumerate(models.sequences(base.name)):
            tensors[f"{name}.logits.{index}"] = model(input_ids=ids).logits[0].detach()
    models.save(tensors, folder / "golden.safetensors")
