"""Learning rates of Hugging Face's schedules, by step."""

import json
from pathlib import Path

import torch
from transformers import TrainingArguments, get_scheduler

LEARNING_RATE = 2e-4
CASES = [
    ("linear", 0, 30),
    ("linear", 5, 30),
    ("linear", 0.1, 37),
    ("linear", 40, 30),
    ("cosine", 0, 30),
    ("cosine", 5, 30),
    ("cosine", 0.03, 40),
    ("constant", 0, 10),
    ("constant_with_warmup", 7, 30),
    ("constant_with_warmup", 0.25, 30),
]


def rates(name: str, warmup_steps: float, steps: int) -> list[float]:
    """The rate that each step uses."""
    warmup = TrainingArguments(output_dir="unused", use_cpu=True, warmup_steps=warmup_steps).get_warmup_steps(steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LEARNING_RATE)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    values = []
    for _ in range(steps):
        values.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return values


def make(path: Path) -> None:
    cases = [
        {
            "lr_scheduler_type": name,
            "warmup_steps": warmup,
            "num_training_steps": steps,
            "learning_rate": LEARNING_RATE,
            "rates": rates(name, warmup, steps),
        }
        for name, warmup, steps in CASES
    ]
    path.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
