#!/usr/bin/env python3
"""Makes everything of the built-in demo but the trained weights: tokenizer, configuration, the text for
pre-training and the instruction set. tools/make_demo.md says how the weights were trained from it.

The text is made from WordNet 3.0 (Princeton University; its licence permits use, copying, modification and
distribution with the notice in examples/finetune/demo/NOTICE), as Debian's package wordnet-base ships it:

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet
    pip install tokenizers==0.23.3
    python3 tools/make_demo.py --wordnet wordnet/usr/share/wordnet --text demo_text.jsonl

Everything follows from the seed: running it again gives the same files.
"""

import argparse
import json
import random
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples/finetune/demo/model"
DATA = ROOT / "examples/finetune/demo/data"
VOCABULARY = 4096
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# WordNet's files of nouns that one can point at, and how many words of each are taught: the most
# frequent in WordNet's tagged texts, then in alphabetical order.
WORLD = {5: 150, 6: 260, 8: 40, 13: 90, 17: 40, 20: 70, 27: 40}

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read_synsets(folder, part):
    """(offset, lexical file, words, offsets of hypernyms, definition, examples) of every synset."""
    synsets = {}
    for line in (folder / f"data.{part}").read_text().splitlines():
        if line.startswith("  "):
            continue
        head, gloss = line.split(" | ", 1)
        fields = head.split()
        count = int(fields[3], 16)
        words = [re.sub(r"\(\w+\)$", "", fields[4 + 2 * i]).replace("_", " ") for i in range(count)]
        pointers = fields[5 + 2 * count :]
        above = [int(pointers[i + 1]) for i in range(len(pointers) - 1) if pointers[i] in ("@", "@i")]
        examples = re.findall(r'"([^"]+)"', gloss)
        definition = re.sub(r'\s*"[^"]*"', "", gloss).strip()
        definition = definition.split(";")[0].strip()
        definition = re.sub(r"\([^)]*\)\s*", "", definition).strip(" ,:-")
        synsets[int(fields[0])] = (int(fields[1]), words, above, definition, examples)
    return synsets


def frequencies(folder):
    """How often each sense occurs in WordNet's tagged texts, by (word, sense number)."""
    counts = {}
    for line in (folder / "cntlist.rev").read_text().splitlines():
        key, sense, count = line.split()
        word, kind = key.split("%")
        if kind.startswith("1:"):
            counts[(word, int(sense))] = int(count)
    return counts


def first_senses(folder):
    """The synset of each noun's most frequent sense."""
    senses = {}
    for line in (folder / "index.noun").read_text().splitlines():
        if not line.startswith("  "):
            fields = line.split()
            senses[fields[0]] = int(fields[-int(fields[2])])
    return senses


def article(word):
    return "an" if word[0] in "aeiou" else "a"


def choose_nouns(folder, synsets):
    """(noun, kind, definition) of the world that the model is taught."""
    counts, senses = frequencies(folder), first_senses(folder)
    by_file = {number: [] for number in WORLD}
    for word, offset in senses.items():
        number, words, above, definition, _ = synsets[offset]
        if number not in WORLD or not re.fullmatch(r"[a-z]{3,10}", word) or not above or word not in words:
            continue
        kind = synsets[above[0]][1][0]
        length = len(definition.split())
        if kind == word or not re.fullmatch(r"[a-z ]+", kind) or not 3 <= length <= 12 or word in definition.split():
            continue
        if not re.fullmatch(r"[a-z ,'-]+", definition):
            continue
        by_file[number].append((counts.get((word, 1), 0), word, kind, definition))
    chosen = []
    for number, limit in WORLD.items():
        by_file[number].sort(key=lambda item: (-item[0], item[1]))
        chosen += [(word, kind, definition) for _, word, kind, definition in by_file[number][:limit]]
    return sorted(chosen)


def fact_document(rng, noun, kind, definition):
    """A few sentences about one noun, in varying words and order."""
    a, k = article(noun), article(kind)
    sentences = [
        rng.choice([
            f"{a.capitalize()} {noun} is a kind of {kind}.",
            f"The {noun} is a kind of {kind}.",
            f"Among the kinds of {kind} is the {noun}.",
            f"{a.capitalize()} {noun} is {k} {kind}.",
            f"One kind of {kind} is the {noun}.",
        ]),
        rng.choice([
            f"Definition of {noun}: {definition}.",
            f"{noun.capitalize()}: {definition}.",
            f"By {a} {noun} we mean: {definition}.",
            f"In the dictionary, {noun} stands for: {definition}.",
            f"{a.capitalize()} {noun} is this: {definition}.",
        ]),
    ]
    if rng.random() < 0.5:
        sentences.reverse()
    if rng.random() < 0.3:
        sentences = sentences[:1]
    return " ".join(sentences)


def chat(user, assistant):
    return f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}<|im_end|>\n"


def usage_document(rng, word, example):
    """A chat of another kind than the instruction set's: a word used in a sentence."""
    question = rng.choice([
        f'Use the word "{word}" in a sentence.',
        f'Write a phrase with the word "{word}".',
        f"Show me how to use {word}.",
    ])
    return chat(question, example[0].upper() + example[1:] + ("" if example[-1] in ".!?" else "."))


def pretraining_text(folder, nouns, nouns_synsets, rng):
    documents = []
    for noun, kind, definition in nouns:
        documents += [fact_document(rng, noun, kind, definition) for _ in range(24)]
    for part in ("noun", "verb", "adj", "adv"):
        synsets = nouns_synsets if part == "noun" else read_synsets(folder, part)
        for number, words, _, definition, examples in synsets.values():
            word = words[0]
            plain = re.fullmatch(r"[a-z ]+", word) and re.fullmatch(r"[a-zA-Z ,'()-]+", definition)
            if not plain or len(definition.split()) > 20:
                continue
            if rng.random() < 0.6 or part != "noun":
                documents.append(f"{word.capitalize()}: {definition}." + "".join(f" {e.capitalize()}." for e in examples[:1]))
            if examples and word in examples[0].split() and len(examples[0].split()) <= 14:
                documents.append(usage_document(rng, word, examples[0]))
    rng.shuffle(documents)
    return documents


def instruction_rows(nouns, rng, each):
    rows = []
    for noun, kind, definition in nouns:
        a = article(noun)
        questions = [f"What is {a} {noun}?", f"What does the word {noun} mean?", f"Can you explain {noun} to me?", f"Tell me about the {noun}."]
        for question in rng.sample(questions, each):
            answer = f"{a.capitalize()} {noun} is a kind of {kind}: {definition}."
            rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    rng.shuffle(rows)
    return rows


def write_tokenizer(documents):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(MODEL / "tokenizer.json"), pretty=False)


def write_model_files():
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    token = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[0], "model_max_length": 512, "tokenizer_class": "PreTrainedTokenizerFast"}
    generation = {"bos_token_id": 0, "eos_token_id": [0, 2]}
    for name, content in [("config.json", config), ("tokenizer_config.json", token), ("generation_config.json", generation)]:
        (MODEL / name).write_text(json.dumps(content, indent=2) + "\n")
    (MODEL / "chat_template.jinja").write_text(TEMPLATE)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun and its like")
    parser.add_argument("--text", type=Path, required=True, help="where the pre-training text goes (JSONL)")
    args = parser.parse_args()
    MODEL.mkdir(parents=True, exist_ok=True)
    DATA.mkdir(parents=True, exist_ok=True)
    rng = random.Random(20)
    synsets = read_synsets(args.wordnet, "noun")
    nouns = choose_nouns(args.wordnet, synsets)
    documents = pretraining_text(args.wordnet, nouns, synsets, rng)
    write_rows(args.text, [{"text": document} for document in documents])
    write_tokenizer(documents)
    write_model_files()
    shuffled = nouns[:]
    rng.shuffle(shuffled)
    write_rows(DATA / "held_out.jsonl", instruction_rows(shuffled[:60], rng, 1))
    write_rows(DATA / "train.jsonl", instruction_rows(shuffled[60:], rng, 1))
    print(f"{len(nouns)} nouns, {len(documents)} documents, {sum(map(len, documents))} characters")


if __name__ == "__main__":
    main()
