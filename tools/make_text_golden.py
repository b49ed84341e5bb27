"""Makes tests/golden/tokenizer and tests/golden/chat/*.json: what Hugging Face's tokenizers and chat templates do.

Run from the repository's root:  python tools/make_text_golden.py
Made with transformers 5.23.0 and tokenizers 0.23.3 (tools/requirements.txt). A second run writes the same bytes.

    tests/golden/tokenizer/       a byte-level BPE of 640 tokens, trained on the texts of the templates and cases
    tests/golden/tokenizer.json   texts with their token ids, with and without special tokens
    tests/golden/chat/NAME.json   chats as the template NAME.jinja renders them
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

GOLDEN = Path("tests/golden")
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]",
]  # fmt: skip

QUESTION = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "The capital of France is Paris."}
SYSTEM = {"role": "system", "content": "  Answer briefly, \nin one line.\n"}
CHATS = {
    "one turn": [QUESTION, ANSWER],
    "system": [SYSTEM, QUESTION, ANSWER],
    "two turns": [
        QUESTION,
        ANSWER,
        {"role": "user", "content": "And of Spain? ¿Y qué más? 日本語 🙂"},
        {"role": "assistant", "content": " \n Madrid — naturally.\n\n  It lies on the Manzanares.  \n"},
    ],
    "question alone": [SYSTEM, QUESTION],
    "empty answer": [QUESTION, {"role": "assistant", "content": ""}],
    "reasoning": [
        QUESTION,
        {"role": "assistant", "content": "<think>\nThey ask for a city.\n</think>\n\nParis."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "<think>\nParis it is.\n</think>\n\nYes, Paris."},
    ],
    "same answer twice": [QUESTION, ANSWER, QUESTION, ANSWER],
    "markup": [{"role": "user", "content": "{{ x }} {% if %} <b>&amp;</b> 'q' \"d\""}, {"role": "assistant", "content": "<|im_end|> & </s>"}],
    "answer first": [ANSWER, QUESTION, ANSWER],
    "tool": [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look_up", "arguments": {"q": "naïve \"x\"", "n": [1, 2.5, None]}}}]},
        {"role": "tool", "content": "Paris\n"},
        {"role": "assistant", "content": "Paris."},
    ],
}  # fmt: skip
TEXTS = [
    "", " ", "Hello, world!", "  two  spaces\n\n\ttab", "naïve café — 日本語 🙂🙃", "<|im_start|>user\nhi<|im_end|>\n",
    "don't we'll I'm", "x" * 40, "1234567890 3.14", "<s>already begun", "\u0000\u007f\u00ad\ufffd",
]  # fmt: skip


def train() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = [path.read_text() for path in sorted(GOLDEN.glob("chat/*.jinja"))]
    corpus += [m["content"] for chat in CHATS.values() for m in chat] + TEXTS[2:9]
    tokenizer.train_from_iterator(corpus, trainer)
    # As Llama's: spans without the spaces around them, and a token at the beginning of a text.
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]),
        ]
    )
    folder = GOLDEN / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    generation = {"eos_token_id": [SPECIAL.index("</s>"), SPECIAL.index("<|im_end|>"), SPECIAL.index("<|eot_id|>")]}
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n")


def write(path: Path, rows: list) -> None:
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n")


def main() -> None:
    train()
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    rows = []
    for text in TEXTS:
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        special = tokenizer(text)["input_ids"]
        rows.append({"text": text, "plain": plain, "special": special, "decoded": tokenizer.decode(special, skip_special_tokens=True)})
    write(GOLDEN / "tokenizer.json", rows)
    for path in sorted(GOLDEN.glob("chat/*.jinja")):
        tokenizer.chat_template = path.read_text()
        rows = []
        for name, messages in CHATS.items():
            for prompt in [False, True]:
                row = {"chat": name, "messages": messages, "add_generation_prompt": prompt}
                try:
                    row["text"] = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
                except Exception as error:  # what the template raises
                    row["raises"] = str(error)
                if path.stem == "generation" and not prompt:
                    out = tokenizer.apply_chat_template(
                        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
                    )
                    row["input_ids"], row["assistant_masks"] = out["input_ids"], out["assistant_masks"]
                rows.append(row)
        write(path.with_suffix(".json"), rows)


if __name__ == "__main__":
    main()
