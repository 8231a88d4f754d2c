"""--plan: its shapes against the official files and published sizes, its formulas against counted bytes and by hand."""

import json

import pytest
import torch

from nanosafe.config import ALIASES, SHAPES, ModelConfig
from nanosafe.model import Decoder

FOLDERS = {alias: repo.partition("@")[0].split("/")[1] for alias, repo in ALIASES.items()}
OFFICIAL = sorted(a for a in FOLDERS if a.startswith(("qwen3-", "r1-", "llama-3.1")))
PUBLISHED = {  # parameters, as the model cards and index files give them
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264, "r1-qwen-1.5b": 1_777_088_000,
    "r1-qwen-7b": 7_615_616_512, "r1-llama-8b": 8_030_261_248, "llama-3.1-8b": 8_030_261_248,
    "llama-guard-3-8b": 8_030_261_248, "llama-3.3-70b": 70_553_706_496, "granite-guardian-3.3-8b": 8_170_864_640,
}  # fmt: skip


# Shapes.


@pytest.mark.parametrize("alias", OFFICIAL)
def test_every_field_of_a_shape_is_the_official_files(alias, assets):
    folder = assets / "configs" / FOLDERS[alias]
    official = json.loads((folder / "config.json").read_text())
    missing = object()
    assert {name: official.get(name, missing) for name in SHAPES[alias]} == SHAPES[alias]
    ours, theirs = ModelConfig.from_dict(SHAPES[alias]), ModelConfig.from_dict(official)
    assert ours == theirs  # all that is computed, also from fields that the shape leaves out


@pytest.mark.parametrize("alias", SHAPES)
def test_a_shape_has_the_published_number_of_parameters(alias):
    with torch.device("meta"):
        count = sum(p.numel() for p in Decoder(ModelConfig.from_dict(SHAPES[alias])).parameters())
    if alias.startswith("skywork"):  # the language model it was trained from, with one row in place of the head
        base = alias.removeprefix("skywork-v2-").replace("llama-8b", "llama-3.1-8b")
        shape = SHAPES[base]
        head = 0 if shape["tie_word_embeddings"] else shape["vocab_size"] * shape["hidden_size"]
        assert count == PUBLISHED[base] - head + shape["hidden_size"]
    else:
        assert count == PUBLISHED[alias]


def test_every_alias_has_a_shape():
    assert set(SHAPES) == set(ALIASES) | {"llama-3.3-70b"}
