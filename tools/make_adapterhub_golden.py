"""Makes tests/golden/adapterhub: bottleneck adapters as AdapterHub's `adapters` saves them, and what it computes.

Run from the repository's root, in an environment of its own with adapters 1.3.0 and the transformers that it wants
(4.57.6), after tools/make_golden.py:  python tools/make_adapterhub_golden.py
"""

import shutil
from pathlib import Path

import adapters
import torch

from golden import models

ROOT = Path("tests/golden/adapterhub")
CONFIGS = {
    "seq_bn": dict(config="seq_bn", reduction_factor=4),
    "double_seq_bn": dict(config="double_seq_bn", reduction_factor=8, non_linearity="gelu", leave_out=[0]),
    "par_bn": dict(config="par_bn", ln_after=True),
    "norms": dict(config="double_seq_bn", reduction_factor=4, ln_after=True, adapter_residual_before_ln=True),
}


def make(family: str, name: str, arguments: dict) -> None:
    torch.manual_seed(0)
    model = models.load(Path("tests/golden") / family)
    adapters.init(model)
    config = adapters.AdapterConfig.load(**{"config": arguments["config"]}, **{k: v for k, v in arguments.items() if k != "config"})
    model.add_adapter(name, config=config)
    model.train_adapter(name)
    model.eval()
    stream = models.generator(family, name)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream))
    folder = ROOT / family / name
    folder.mkdir(parents=True)
    model.save_adapter(str(folder), name, use_safetensors=True)
    for extra in ("model_head.safetensors", "head_config.json"):
        (folder / extra).unlink(missing_ok=True)
    tensors = models.results(model, family)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"gradient.{key}"] = parameter.grad
    models.save(tensors, folder / "golden.safetensors")


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    shutil.rmtree(ROOT, ignore_errors=True)
    for family in ("gpt2", "llama", "mistral"):
        for name, arguments in CONFIGS.items():
            make(family, name, arguments)


if __name__ == "__main__":
    main()
