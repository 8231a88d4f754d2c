"""Model folders from anyone: mutated fields, links, and other things that are not files."""

import copy
import json
import math
import os
import random
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from test_tokenizer import flags, make_tiny
from tiny_models import random_checkpoint, tiny_raw

from nanosafe import load_model, load_tokenizer
from nanosafe.io import files
from nanosafe.io.files import MAX_DEPTH, read_file, read_json
from nanosafe.model.config import ModelConfig
from nanosafe.model.weights import load_checkpoint
from nanosafe.sampler.__main__ import sampling_settings

YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16.0, mscale=1.0)
FORMS = [("qwen2", dict(use_sliding_window=True, sliding_window=256, max_window_layers=1)),
         ("qwen3", dict(rope_scaling=YARN)), ("llama", dict(reward=True)), ("granite", {}),
         ("granite4", dict(time_step_limit=[0.0, math.inf]))]  # fmt: skip
GENERATION = dict(eos_token_id=[1, 0], do_sample=True, temperature=0.6, top_p=0.95, top_k=20, min_p=0.0,
                  repetition_penalty=1.0)  # fmt: skip
TOKENS = dict(pad_token=flags("<p>"), x_token="<x>", additional_special_tokens=["<a>", flags("<b>")],
              added_tokens_decoder={"300": flags("<c>"), "2": flags("<|user|>")},
              split_special_tokens=False)  # fmt: skip
DEEP = json.loads("[" * 400 + "]" * 400)
VALUES = [None, True, False, 0, 1, -1, 2, 3, 0.5, 1e-300, 1e300, 10**400, math.nan, math.inf,
          -math.inf, "", "2", "auto", "\ud800", [], [None], [2, None], ["x"], [[2, 3]], [{}], {},
          {"a": 1}, {"default": "x"}, {"2": None}, DEEP]  # fmt: skip


def mutate(rng: random.Random, raw: dict) -> str:
    """The JSON of `raw` with a field, or an entry of one, changed, dropped or added, or torn."""
    raw, extra = copy.deepcopy(raw), ["num_experts", "layer_types", "eos_token_id", "cls_token", "x"]
    unknown = rng.choice(extra)
    place, key = raw, rng.choice([*raw, unknown])
    while isinstance(place.get(key), dict) and place[key] and rng.random() < 0.7:
        place = place[key]
        key = rng.choice([*place, unknown])
    if rng.random() < 0.1:
        place.pop(key, None)
    else:
        place[key] = copy.copy(rng.choice(VALUES))
    text = json.dumps(raw)
    if rng.random() < 0.1:
        cut = rng.randrange(len(text))
        text = text[:cut] + rng.choice(["", "[" * 100_000, "9" * 5000, '"', text[cut + 1 :]])
    return text


@pytest.mark.parametrize("form", range(len(FORMS)), ids=lambda form: FORMS[form][0])
def test_a_mutated_folder_gives_a_result_or_an_error_that_names_the_file(form, tmp_path):
    family, changes = FORMS[form]
    make_tiny(tmp_path, TOKENS)
    random_checkpoint(tmp_path, family, vocab_size=310, **changes)
    (tmp_path / "config.json").write_text(json.dumps(tiny_raw(family, vocab_size=310, **changes)))
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION))
    names = ["config.json", "generation_config.json", "tokenizer_config.json"]
    files = {name: (tmp_path / name).read_text() for name in names}
    rng, results = random.Random(form), 0
    unset, silent = dict.fromkeys(GENERATION), SimpleNamespace(note=lambda text: None)
    for number in range(210):
        name = names[number % 3]
        text = mutate(rng, json.loads(files[name]))
        (tmp_path / name).write_text(text)
        try:
            model = load_checkpoint(tmp_path, "cpu", torch.float32)
            path = tmp_path / "generation_config.json"
            sampling_settings(Namespace(**unset), model.config.generation, silent, path)
            load_tokenizer(tmp_path).render([{"role": "user", "content": "Hi"}])
            if not model.config.num_labels:
                assert model(torch.tensor([[1, 5, 9]])).isfinite().all(), text
            results += 1
        except (ValueError, OSError) as error:
            said = str(error).replace("the chat template of", name)
            assert name in said and str(tmp_path) in said, (text, error)
        (tmp_path / name).write_text(files[name])
    assert 40 < results < 170, "both happen"


def test_links_out_of_a_folder_are_not_followed(tmp_path):
    folder, secret = make_tiny(tmp_path / "model"), tmp_path / "secret"
    random_checkpoint(folder, "llama")
    jsons = ("config.json", "tokenizer.json", "tokenizer_config.json")
    for name in (*jsons, "model.safetensors", "chat_template.jinja"):
        kept = (folder / name).read_bytes() if (folder / name).exists() else b"{{ 1 }}"
        secret.write_bytes(kept)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        with pytest.raises(ValueError, match=f"{folder / name} links to .* out of its folder"):
            load_checkpoint(folder, "cpu", torch.float32)
            load_tokenizer(folder)
        (folder / name).unlink()
        (folder / f"inside-{name}").write_bytes(kept)
        (folder / name).symlink_to(f"inside-{name}")
    (tmp_path / "elsewhere").symlink_to(folder)
    assert load_model(tmp_path / "elsewhere").config.vocab_size == 97
    assert load_tokenizer(tmp_path / "elsewhere").render([{"role": "user", "content": "Hi"}]) == "1"


def test_a_cache_of_the_hub_links_to_its_blobs_and_nowhere_else(tmp_path):
    folder, blobs = make_tiny(tmp_path / "first"), tmp_path / "models--a--b/blobs"
    snapshot = tmp_path / "models--a--b/snapshots/0123abc"
    random_checkpoint(folder, "llama")
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    assert load_model(snapshot).config.vocab_size == 97 and load_tokenizer(snapshot).eos_ids == (1, 2)
    (tmp_path / "secret").write_text("{}")
    (blobs / "blob-config.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"{snapshot}/config.json links to .* which is missing"):
        load_model(snapshot)
    (blobs / "blob-config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"{snapshot}/config.json links to .* out of its folder"):
        load_model(snapshot)


def test_only_ordinary_files_of_a_bounded_size_and_depth_are_read(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    os.mkfifo(path)  # opened, it would wait for somebody to write
    with pytest.raises(ValueError, match=f"{path} is not an ordinary file"):
        ModelConfig.from_folder(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=f"{path} is not an ordinary file"):
        ModelConfig.from_folder(tmp_path)
    path.rmdir()
    path.write_text('{"a":' * MAX_DEPTH + "1" + "}" * MAX_DEPTH)
    assert read_json(path)
    path.write_text('{"a":' * MAX_DEPTH + "{}" + "}" * MAX_DEPTH)
    with pytest.raises(ValueError, match=f"{path} nests more than {MAX_DEPTH}"):
        read_json(path)
    monkeypatch.setattr(files, "MAX_BYTES", 100)
    assert len(read_file_of(path, 100)) == 100
    with pytest.raises(ValueError, match=f"{path} has over"):
        read_file_of(path, 101)


def read_file_of(path, size: int) -> bytes:
    path.write_bytes(b" " * size)
    return read_file(path)
