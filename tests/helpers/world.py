"""A small world in the official layouts: policy, reward model with another tokenizer, prompts with SFT responses."""

import json
from pathlib import Path

import tokenizers
from tiny_models import random_checkpoint
from tokenizers import decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (  # Llama's manner: the template writes BOS, and a tokenizer that adds it too must not double it
    "{{ bos_token }}"
    "{% for m in messages %}{{ '<|h|>' + m['role'] + '<|/h|>\n\n' + m['content'] + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}"
)
CORPUS = ["How do I bake bread at home?", "Wait, but that is not safe. However, I can help.", "Okay\n\nNo."]


def write_tokenizer(folder: Path, template: str, specials: list[str], **config) -> int:
    """A byte-level BPE tokenizer with `specials` as its first ids; returns its size."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    trainer.show_progress = False
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}))
    return tokenizer.get_vocab_size()


def write_policy(folder: Path, seed: int = 0, family: str = "qwen3", **changes) -> Path:
    """A Qwen3 of 2 layers, or a `family`, with ChatML; EOS ids 1 (end of turn), 0 (end of text), as Qwen3 has two."""
    size = write_tokenizer(folder, CHATML, ["<|endoftext|>", "<|im_end|>", "<|im_start|>"], eos_token="<|im_end|>",
                           pad_token="<|endoftext|>")  # fmt: skip
    random_checkpoint(folder, family, seed, vocab_size=size, bos_token_id=0, eos_token_id=1, **changes)
    generation = {"eos_token_id": [1, 0], "temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def write_reward_model(folder: Path, seed: int = 1, template: str = HEADERS) -> Path:
    """A Llama with a score head, another vocabulary and another template."""
    size = write_tokenizer(folder, template, ["<|bos|>", "<|eos|>", "<|h|>", "<|/h|>", "<|eot|>"], bos_token="<|bos|>",
                           eos_token="<|eos|>")  # fmt: skip
    random_checkpoint(folder, "llama", seed, reward=True, vocab_size=size, bos_token_id=0, eos_token_id=1)
    return folder


def write_rows(path: Path, rows: int = 12) -> Path:
    """STAR-1's form: question, response with a thought."""
    words = ["bread", "soup", "tea", "a cake", "rice", "an omelette", "pasta", "salad"]
    data = [
        {"question": f"How do I make {words[i % len(words)]}{' at home' * (i % 3)}?",
         "response": f"<think>\nWait, number {i}.\n</think>\n\nTake {i} spoons.", "answer": str(i)}
        for i in range(rows)
    ]  # fmt: skip
    path.write_text(json.dumps(data) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in data))
    return path


def write_dates(world: Path) -> None:
    """Both models' templates now begin with the date, as Llama 3.2's and Granite 3.3's have it."""
    for model in ("policy", "reward"):
        path = world / model / "tokenizer_config.json"
        config = json.loads(path.read_text())
        config["chat_template"] = "{{ strftime_now('%B %d, %Y') }}" + config["chat_template"]
        path.write_text(json.dumps(config))


def write_world(folder: Path, **changes) -> Path:
    """policy/, reward/ and rows.jsonl in `folder`."""
    write_policy(folder / "policy", **changes)
    write_reward_model(folder / "reward")
    write_rows(folder / "rows.jsonl")
    return folder


if __name__ == "__main__":  # python tests/helpers/world.py FOLDER, as benchmarks/RESULTS.md has it
    import sys

    print(f"wrote {write_world(Path(sys.argv[1]))}/policy, reward and rows.jsonl")
