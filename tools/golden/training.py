"""Ten optimizer steps of several methods by Hugging Face's Trainer: losses, gradient norms, learning rates and the last adapter."""

import json
import tempfile
from pathlib import Path

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from . import adapters, models

STEPS, BATCH, ACCUMULATION = 10, 2, 2
SETTINGS = dict(
    learning_rate=5e-3,
    lr_scheduler_type="linear",
    warmup_steps=3,
    weight_decay=0.1,
    adam_beta1=0.9,
    adam_beta2=0.99,
    adam_epsilon=1e-8,
    max_grad_norm=1.0,
    per_device_train_batch_size=BATCH,
    gradient_accumulation_steps=ACCUMULATION,
    max_steps=STEPS,
)


def data() -> list[dict]:
    """Rows of 4 to 17 tokens, some with a prompt that doesn't count (-100), in the order in which they are used."""
    stream = models.generator("training", "data")
    rows = []
    for index in range(STEPS * BATCH * ACCUMULATION):
        length = int(torch.randint(4, 18, (1,), generator=stream))
        ids = torch.randint(2, models.VOCAB, (length,), generator=stream).tolist()
        # Where a virtual token predicts a row's first token, the Trainer counts its loss and not the token: no first
        # token counts here.
        prompt = max(1, int(torch.randint(0, length - 1, (1,), generator=stream)) if index % 3 else 0)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pads on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "attention_mask": torch.tensor(mask)}


class Recorder(TrainerCallback):
    """Keeps what the Trainer logs for each step."""

    def __init__(self) -> None:
        self.log: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "grad_norm" in logs:
            self.log.append({"step": state.global_step, **{key: logs[key] for key in ("loss", "grad_norm", "learning_rate")}})


def token_weighted_loss(model: torch.nn.Module, rows: list[dict]) -> float:
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            # Virtual embeddings have logits; the last one's predict the first token.
            extra = logits.shape[0] - len(row["input_ids"])
            labels = torch.tensor(([-100] * extra + row["labels"])[1:])
            total += torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="sum").item()
            count += int((labels != -100).sum())
    return total / count


def orthogonality(model: PeftModel) -> float:
    """The mean of |P P^T - 1| over AdaLoRA's factors."""
    factors = [p if "lora_A" in key else p.T for key, p in model.named_parameters() if "lora_A" in key or "lora_B" in key]
    return sum(torch.linalg.norm(p @ p.T - torch.eye(p.shape[0])).item() for p in factors) / len(factors)


class RankRecorder(TrainerCallback):
    """Lets AdaLoRA allocate ranks after each step, and keeps which were left."""

    def __init__(self, model: PeftModel) -> None:
        self.model, self.ranks = model, []

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.model.base_model.update_and_allocate(state.global_step)
        pattern = self.model.peft_config["default"].rank_pattern or {}
        self.ranks.append({key.removesuffix(".lora_E.default"): "".join("01"[kept] for kept in value) for key, value in pattern.items()})


TASK = dict(task_type="CAUSAL_LM")
LORA = dict(r=4, lora_alpha=5, target_modules="all-linear", **TASK)
EMBEDDING = LoraConfig(r=4, lora_alpha=5, target_modules=["embed_tokens", "q_proj", "lm_head"], **TASK)
METHODS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
    "embedding": EMBEDDING,
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, **TASK),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, **TASK),
}
# Twenty steps: PEFT adds the penalty to every micro-batch's loss, so each step has one.
ADALORA = AdaLoraConfig(
    init_r=4, target_r=2, lora_alpha=5, tinit=3, tfinal=5, deltaT=2, total_step=20, orth_reg_weight=0.1,
    target_modules=["q_proj", "v_proj", "down_proj"], **TASK,
)


def make(folder: Path, base: Path) -> None:
    folder.mkdir(parents=True)
    rows = data()
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, config in METHODS.items():
        run(folder / name, base, config, rows)
    run(folder / "loraplus", base, LoraConfig(**LORA), rows, ratio=8.0)
    run(folder / "loraplus_embedding", base, EMBEDDING, rows, ratio=8.0)
    run(folder / "adalora", base, ADALORA, rows)


def run(folder: Path, base: Path, config: PeftConfig, rows: list[dict], ratio: float | None = None) -> None:
    torch.manual_seed(1)
    model = get_peft_model(models.load(base), config)
    adapters.save_adapter(model, folder / "init_adapter")
    if not hasattr(model, "prompt_encoder"):
        # What the folder holds is what is trained: the adapter is read back.
        model = PeftModel.from_pretrained(models.load(base), str(folder / "init_adapter"), is_trainable=True)
    settings = SETTINGS
    if hasattr(model, "prompt_encoder"):
        # With virtual tokens the Trainer averages micro-batches, not tokens: one micro-batch a step.
        settings = SETTINGS | dict(per_device_train_batch_size=BATCH * ACCUMULATION, gradient_accumulation_steps=1)
    adalora = config.peft_type == "ADALORA"
    if adalora:
        settings = SETTINGS | dict(gradient_accumulation_steps=1, max_steps=config.total_step)
    first_rows = rows[: settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]]
    expected = token_weighted_loss(model, first_rows)
    if adalora:
        expected += config.orth_reg_weight * orthogonality(model)

    recorder = Recorder()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            optim="adamw_torch",
            **settings,
        )
        optimizer = None
        if ratio is not None:
            optimizer = create_loraplus_optimizer(
                model, torch.optim.AdamW, lr=SETTINGS["learning_rate"], loraplus_lr_ratio=ratio,
                betas=(SETTINGS["adam_beta1"], SETTINGS["adam_beta2"]), eps=SETTINGS["adam_epsilon"],
                loraplus_weight_decay=SETTINGS["weight_decay"],
            )
        trainer = Trainer(optimizers=(optimizer, None), model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[recorder])
        trainer.remove_callback(PrinterCallback)
        if adalora:
            ranks = RankRecorder(trainer.model)
            trainer.add_callback(ranks)
        trainer.train()
    if abs(recorder.log[0]["loss"] - expected) > 1e-5:
        raise SystemExit(f"error: the Trainer's loss {recorder.log[0]['loss']} is not the token-weighted {expected}")
    adapters.save_adapter(model, folder / "final_adapter")
    settings = settings | ({} if ratio is None else dict(loraplus_lr_ratio=ratio))
    if adalora:
        settings["ranks"] = ranks.ranks
    settings = {"model": base.name, "optim": "adamw_torch", **settings, "steps": recorder.log}
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
