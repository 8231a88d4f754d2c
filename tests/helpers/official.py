"""The official tokenizers with their official templates, put together from the folder of official files. Not a test."""

import json
import shutil
from pathlib import Path

from nanosafe.names import load_tokenizer
from nanosafe.text.tokenizer import Tokenizer

OFFICIAL = {  # tokenizer, template, config, and the id that ends a turn
    "r1": ("deepseek-r1-distill-qwen", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "DeepSeek-R1-Distill-Qwen-1.5B",
           151643),
    "qwen3": ("qwen3", "Qwen-Qwen3-8B-official", "Qwen3-8B", 151645),
    "llama": ("llama3.1", "meta-llama-Llama-3.1-8B-Instruct", "Llama-3.1-8B-Instruct", 128009),
    "granite": ("granite-4.0-tiny-preview", "ibm-granite-granite-4.0-h", "granite-4.0-tiny-preview", 0),
}  # fmt: skip


def official_tokenizer(assets: Path, name: str, folder: Path) -> Tokenizer:
    """The tokenizer `name` of OFFICIAL, written to an empty folder."""
    tokenizer, template, config, _ = OFFICIAL[name]
    for file in (assets / "tokenizers" / tokenizer).iterdir():
        shutil.copy(file, folder)
    for file in (assets / "configs" / config).glob("*config.json"):
        shutil.copy(file, folder)
    shutil.copy(assets / "templates" / f"{template}.jinja", folder / "chat_template.jinja")
    if not (folder / "tokenizer_config.json").exists():  # where the official one is not at hand
        tokens = {"llama": ("<|begin_of_text|>", "<|eot_id|>"), "granite": ("<|end_of_text|>",) * 2}[name]
        written = dict(zip(("bos_token", "eos_token"), tokens, strict=True))
        (folder / "tokenizer_config.json").write_text(json.dumps(written))
    return load_tokenizer(folder)
