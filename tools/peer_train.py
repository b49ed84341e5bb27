"""LoRA and QLoRA training steps with transformers + PEFT (+ bitsandbytes): the peer that tools/compare_training.py measures.

A plain loop, no Trainer around it: what is timed is forward, backward, clipping and AdamW. Prints a JSON line per step
(`step`, `loss`, `grad_norm`, `tokens`, `seconds`), the columns of the `finetune` example's metrics.jsonl where they match.
"""

import argparse
import json
import time

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, get_scheduler
from transformers.utils import logging

from rows import DTYPES, first_rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--data", required=True, help='JSONL of {"text"} rows, a row a step')
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--autocast", action="store_true", help="bf16 by torch.autocast over f32 weights")
    parser.add_argument("--quant", choices=("none", "nf4", "fp4"), default="none", help="by bitsandbytes, with double quantization")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row that are used")
    parser.add_argument("--max-steps", type=int, default=10)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lora-alpha", type=float, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init-adapter", help="start from this adapter folder")
    parser.add_argument("--write-init-adapter", help="write the initial adapter here and stop")
    return parser.parse_args()


def load(args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(args.seed)
    dtype = torch.float32 if args.autocast else DTYPES[args.dtype]
    quant = None
    if args.quant != "none":
        quant = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=args.quant, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=DTYPES[args.dtype]
        )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, quantization_config=quant)
    model.config.use_cache = False
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.init_adapter:
        return PeftModel.from_pretrained(model, args.init_adapter, is_trainable=True)
    config = LoraConfig(r=args.r, lora_alpha=args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def main() -> None:
    args = parse()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    model = load(args)
    if args.write_init_adapter:
        model.save_pretrained(args.write_init_adapter)
        return
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = first_rows(tokenizer, args.data, args.max_length, args.max_steps)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, weight_decay=0.0)
    scheduler = get_scheduler("constant", optimizer)
    model.train()
    for step, ids in enumerate(rows, 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        loss, norm = loss.item(), norm.item()
        seconds = time.perf_counter() - start
        print(json.dumps({"step": step, "loss": loss, "grad_norm": norm, "tokens": ids.numel(), "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
