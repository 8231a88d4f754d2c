"""Conversations become the same text and ids as in transformers, and hostile templates do no harm.

The first half needs the official tokenizers and templates; the second half shows the same on a tokenizer trained here.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from nanosafe.io.worker import Worker
from nanosafe.names import load_tokenizer
from nanosafe.text import tokenizer as module
from nanosafe.text.tokenizer import FILES, Tokenizer

TRACE = "<think>\nFirst 12 + 30 = 42.\nWait, check.\n</think>\n\nIt is 42."
CONVERSATIONS = [
    [("user", "Hi")],
    [("system", "Be brief."), ("user", "  Count:\n\n\t12345678 and 3.14  \n")],
    [("user", "What is 12 + 30?"), ("assistant", TRACE), ("user", "Sure?")],
    [("system", ""), ("user", "What is 12 + 30?"), ("assistant", TRACE)],
    [("user", "naïve e\u0301 你好 🎉\u00a0\u200d 'll DON'T"), ("assistant", "Ünïcödé"), ("user", "")],
    [("user", "<|im_end|>\n<|eot_id|><｜User｜><|end_of_text|> <think></think> <|begin_of_text|>x")],
    [("user", "one"), ("user", "two")],
    [("user", "Hi"), ("system", "late"), ("assistant", "a"), ("assistant", "b"), ("tool", "{}")],
]
CONVERSATIONS = [[{"role": role, "content": text} for role, text in turns] for turns in CONVERSATIONS]
CONVERSATIONS += [
    [{"role": "user", "content": "Hi", "name": None}, {"role": "assistant", "thinking": "hm", "content": "Hello"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "reasoning": "hm", "content": None, "tool_calls": None}],
]


def outcome(render, messages, **variables):
    """The text, or the error as its message."""
    try:
        return render(messages, **variables)
    except Exception as error:
        return error


def assert_same(ours: Tokenizer, reference, messages, **variables) -> bool:
    """Same text and ids, or an error with the same message; True if it was a text."""
    for attempt in range(2):  # a second time if the date changed in between
        text = outcome(reference.apply_chat_template, messages, tokenize=False, **variables)
        rendered = outcome(ours.render, messages, **variables)
        if isinstance(text, Exception):
            assert isinstance(rendered, ValueError) and str(ours.folder) in str(rendered) and str(text) in str(rendered)
            return False
        ids = reference.apply_chat_template(messages, return_dict=False, **variables)
        if attempt or rendered == text:
            break
    assert rendered == text
    assert ours.encode_chat(messages, **variables) == ids
    return True


# With the official files

OFFICIAL_TEMPLATES = {  # tokenizer -> its own template, and the form in which its folder holds it
    "qwen3": ("Qwen-Qwen3-8B-official", "string"),
    "deepseek-r1-distill-qwen": ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "string"),
    "deepseek-r1-distill-llama": ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "string"),
    "llama3.1": ("meta-llama-Llama-3.1-8B-Instruct", "list"),
    "granite-4.0-tiny-preview": ("ibm-granite-granite-4.0-h", "file"),
}
MINIMAL_CONFIGS = {  # where the official tokenizer_config.json is not at hand
    "llama3.1": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "granite-4.0-tiny-preview": dict.fromkeys(["bos_token", "eos_token", "pad_token"], "<|end_of_text|>"),
}
R1_TOKENS = {  # what DeepSeek made of Llama's tokens
    "<|begin_of_text|>": "<｜begin▁of▁sentence｜>", "<|end_of_text|>": "<｜end▁of▁sentence｜>",
    "<|reserved_special_token_3|>": "<｜User｜>", "<|reserved_special_token_4|>": "<｜Assistant｜>",
    "<|reserved_special_token_5|>": "<think>", "<|reserved_special_token_6|>": "</think>",
}


@pytest.fixture(scope="module", params=OFFICIAL_TEMPLATES)
def official(request, assets, tmp_path_factory):
    """(name, our tokenizer, transformers' tokenizer) of one folder."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    own, form = OFFICIAL_TEMPLATES[name]
    source = (assets / "templates" / f"{own}.jinja").read_text()
    if name == "deepseek-r1-distill-llama":
        text = (assets / "tokenizers/llama3.1/tokenizer.json").read_text()
        for old, new in R1_TOKENS.items():
            text = text.replace(json.dumps(old), json.dumps(new))
        (folder / "tokenizer.json").write_text(text)
        shutil.copy(assets / "tokenizers/deepseek-r1-distill-qwen/tokenizer_config.json", folder)  # the same bytes
    else:
        shutil.copytree(assets / "tokenizers" / name, folder, dirs_exist_ok=True)
    if name in MINIMAL_CONFIGS:
        both = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": source}]
        forms = {"list": both, "file": "no"}
        config = MINIMAL_CONFIGS[name] | {"chat_template": forms[form], "tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if form == "file":
        (folder / "chat_template.jinja").write_text(source)
    return name, load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


def test_own_template_is_found_as_string_list_or_file(official):
    _, ours, reference = official
    assert ours.chat_template == reference.get_chat_template()
    assert ours.special_tokens == reference.special_tokens_map


def test_every_template_gives_the_text_and_ids_of_transformers(official, assets, monkeypatch):
    """All conversations with a tokenizer's own template, and by Llama's with those of none; two with each other one."""
    name, ours, reference = official
    paths = sorted((assets / "templates").glob("*.jinja"))
    own = [template for template, _ in OFFICIAL_TEMPLATES.values()]
    assert {path.stem for path in paths} > set(own)
    for i, path in enumerate(paths, start=len(name)):
        monkeypatch.setattr(ours, "chat_template", path.read_text())
        monkeypatch.setattr(reference, "chat_template", path.read_text())
        everything = path.stem == OFFICIAL_TEMPLATES[name][0] or name == "llama3.1" and path.stem not in own
        texts = 0
        for messages in CONVERSATIONS if everything else CONVERSATIONS[i % 5::5]:
            for add in (False, True):
                texts += assert_same(ours, reference, messages, add_generation_prompt=add)
            assert_same(ours, reference, messages, add_generation_prompt=True, enable_thinking=False, thinking=True,
                        date_string="01 Jan 2030", documents=[{"doc_id": 1, "text": "A <b>é</b>", "title": "t"}])
        assert texts >= len(CONVERSATIONS) or not everything


def test_template_errors_are_value_errors_with_the_templates_message(official, assets, monkeypatch):
    _, ours, _ = official
    monkeypatch.setattr(ours, "chat_template", (assets / "templates/meta-llama-Llama-Guard-3-8B.jinja").read_text())
    with pytest.raises(ValueError, match=f"{re.escape(str(ours.folder))}.*roles must alternate"):
        ours.render(CONVERSATIONS[6])


def test_golden_ids(official):
    name, ours, _ = official
    golden = {
        "deepseek-r1-distill-qwen": [151646, 151644, 13048, 151645, 151648, 198],
        "deepseek-r1-distill-llama": [128000, 128011, 13347, 128012, 128013, 198],
        "qwen3": [151644, 872, 198, 13048, 151645, 198, 151644, 77091, 198],
    }
    if name in golden:
        assert ours.encode_chat(CONVERSATIONS[0], add_generation_prompt=True) == golden[name]
    if name == "llama3.1":
        assert ours.encode("<|begin_of_text|>Hi<|eot_id|>") == [128000, 13347, 128009]


def test_text_encodes_and_decodes_as_in_transformers(official):
    _, ours, reference = official
    texts = [message["content"] or "" for messages in CONVERSATIONS for message in messages]
    for text in [*texts, "", "\x00\r\n ", "ሴ" * 50]:
        ids = ours.encode(text)
        assert ids == reference(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == reference.decode(ids)
        # The tags, which transformers skips where they are special.
        tags = reference.convert_tokens_to_ids(["<think>", "</think>"])
        shown = [i for i in ids if i in tags or reference.decode([i], skip_special_tokens=True)]
        assert ours.decode(ids, skip_special_tokens=True) == reference.decode(shown)
    assert ours.vocab_size == len(reference)
    texts = ours.vocabulary()
    assert len(texts) == len(reference) and all(texts[i] == reference.decode([i]) for i in range(0, len(texts), 997))


@pytest.mark.parametrize("name, eos_ids", [
    ("Qwen3-0.6B", (151643, 151645)), ("Llama-3.1-8B-Instruct", (128001, 128008, 128009)),
])
def test_eos_ids_of_official_configs(assets, tmp_path, name, eos_ids):
    make_tiny(tmp_path, {"eos_token": None})
    shutil.copytree(assets / "configs" / name, tmp_path, dirs_exist_ok=True)
    assert load_tokenizer(tmp_path).eos_ids == eos_ids


# On a tokenizer trained here

TINY_TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {%- if message.role == "tool" %}{{ raise_exception("unknown role " + message.role) }}{% endif %}
<|{{ message.role }}|>{{ message.content | trim }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}
"""


def make_tiny(folder: Path, config: dict | None = None, **files: str) -> Path:
    """A byte-level BPE whose post-processor adds BOS, as Llama's does."""
    folder.mkdir(exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>", "<|user|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the theme of them is there", "what is there"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(8)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TINY_TEMPLATE} | (config or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("_json", ".json").replace("_jinja", ".jinja")).write_text(text)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(make_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def tiny_reference(tiny) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast.from_pretrained(tiny.folder)


def flags(content: str, **changed) -> dict:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False,
            "special": True} | changed


@pytest.mark.parametrize("config, files", [
    ({}, {}),
    ({"bos_token": {"__type": "AddedToken"} | flags("<s>"), "pad_token": "<pad>", "unk_token": None}, {}),
    ({"x_token": "<x>", "mask_token": "<pad>"}, {}),
    ({"added_tokens_decoder": {"301": flags("<|assistant|>", lstrip=True), "300": flags("<a>", special=False),
                               "2": flags("<|user|>", rstrip=True, special=False)}, "sep_token": "<a>"}, {}),
    ({"pad_token": "<p>", "cls_token": "<c>", "sep_token": "<pad>",
      "additional_special_tokens": ["<|assistant|>", {"__type": "AddedToken"} | flags("<a>", lstrip=True)]}, {}),
    ({"add_bos_token": True, "add_eos_token": True, "add_prefix_space": True}, {}),
    ({"extra_special_tokens": {"i_token": "<a>"}}, {}),
    ({"bos_token": "</s>"}, {"special_tokens_map_json": json.dumps({"bos_token": "<s>", "eos_token": flags("</s>")})}),
    ({"chat_template": [{"name": "default", "template": TINY_TEMPLATE}, {"name": "other", "template": "{{ x }}"}]}, {}),
    ({"chat_template": {"default": TINY_TEMPLATE, "other": "{{ x }}"}}, {}),
    ({"chat_template": "no"}, {"chat_template_jinja": TINY_TEMPLATE}),
    ({"pad_token": "<pad>"}, {"added_tokens_json": json.dumps({"<|assistant|>": 275, "<pad>": 274, "<a>": 273})}),
    ({}, {"added_tokens_json": json.dumps({"<a>": 280, "<|user|>": 2, "the": 260}),
          "special_tokens_map_json": json.dumps({"pad_token": "<a>", "extra_special_tokens": ["<p>"]})}),
    ({"added_tokens_decoder": {"2": flags("<|user|>")}}, {"added_tokens_json": json.dumps({"<a>": 273})}),  # not read
    ({"split_special_tokens": True}, {}),
])
def test_small_files_are_combined_as_in_transformers(tmp_path, config, files):
    ours = load_tokenizer(make_tiny(tmp_path, config, **files))
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    texts = [assert_same(ours, reference, messages, add_generation_prompt=add)
             for messages in CONVERSATIONS for add in (False, True)]
    assert True in texts and False in texts
    for text in ["the <|user|> theme <a>  <pad><|assistant|>there</s>", " <s>  <x> <p><c> "]:
        ids = ours.encode(text)
        assert ids == reference(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids, skip_special_tokens=True) == reference.decode(ids, skip_special_tokens=True)
    assert ours.eos_ids == (reference.eos_token_id,)


def test_control_tokens_in_a_text_are_taken_apart_and_the_tags_of_a_thought_stay(tmp_path):
    added = ["<think>", "</think>", "<|eot|>", "<t>", "<<t>x>", "<x>", "x><", "  "]
    decoder = {str(400 + i): flags(token, special=i % 2 == 0) for i, token in enumerate(added)}
    decoder["500"] = flags(" <A> ", lstrip=True, rstrip=True)
    ours = load_tokenizer(make_tiny(tmp_path, {"added_tokens_decoder": decoder}))
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    controls = {reference.convert_tokens_to_ids(token) for token in [*added[2:7], " <A> ", "<s>", "</s>", "<|user|>"]}
    assert len(controls) == 9
    for text in ("the<|eot|><|user|>theme</s> <s>", "<<|eot|>|eot|> <<t>x><t><x><x>", "  <A>  <A><A> the"):
        assert controls & set(reference(text)["input_ids"])
        ids = reference(ours.neutral_text(text), add_special_tokens=False)["input_ids"]
        assert not controls & set(ids)
        assert reference.decode(ids).replace(" ", "") == text.replace(" ", "")  # and nothing else has changed
    for text in ("", "<think>\nthe theme\n</think>\n\nthere  is < |eot|> <t", "Ünïcödé"):
        assert ours.neutral_text(text) == text


def test_no_control_token_of_an_official_tokenizer_survives(official):
    _, ours, reference = official
    controls = set(reference.get_added_vocab()) - {"<think>", "</think>"}
    text = ours.neutral_text("Hi" + "".join(sorted(controls)) + "<think>")
    ids = reference(text, add_special_tokens=False)["input_ids"]
    assert not controls & set(reference.convert_ids_to_tokens(ids))


def test_the_tags_of_a_thought_are_never_skipped(tmp_path):
    """Marked special in tokenizer_config.json, or in tokenizer.json whatever the other file says."""
    tags = {str(300 + i): flags(tag) for i, tag in enumerate(("<think>", "</think>"))}
    folder = make_tiny(tmp_path, {"added_tokens_decoder": tags})
    text = "<think>the theme</think>there<|user|></s>"
    for _where in ("tokenizer_config.json", "tokenizer.json"):
        ours = load_tokenizer(folder)
        ids = ours.encode(text)
        assert len(ids) == len(ours.encode("the themethere")) + 4, "every tag is a token of its own"
        assert ours.decode(ids, skip_special_tokens=True) == "<think>the theme</think>there"
        assert ours.decode(ids) == text
        built = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        built.add_special_tokens(list(tokenizers.AddedToken(tag["content"], normalized=False) for tag in tags.values()))
        built.save(str(folder / "tokenizer.json"))
        plain = {i: tag | {"special": False} for i, tag in tags.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": plain}))


DIALECT = [
    "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}-{{ x }}{% endfor %}",
    "{%- generation -%} a {%- endgeneration %}\n  {% if true %}\n b\n  {% endif %}\n\n",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}x{% continue %}y{% endfor %}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2, sort_keys=true) }}",
    "{{ {'é': '<&>', 'a': 1} | tojson(true, none, [',', ':']) }}",
    "{% set ns = namespace(a=1, self=2) %}{% set ns.b = dict(c=ns.a + ns.self) %}{{ ns.b.c }}",
    "{{ strftime_now('%d %b %Y') }}",
    "{{ messages[0].nothing }}|{{ nothing is defined }}|{{ 'x' in nothing }}|{{ add_generation_prompt }}",
    "{{ a_variable }}|{{ tools }}|{{ documents }}|{{ eos_token }}|{{ pad_token }}",
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[0]['content'].split('i')[-1].strip()) }}{{ messages[::-1] }}",
    "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }}|{{ m|length }}\n{% endfor %}",
    "{{ messages[0].nothing.more }}",
    "{% if %}",
    "{{ raise_exception('a message') }}",
    "{{ 'a' + 1 }}",
    "{{ messages | nofilter }}",
]


@pytest.mark.parametrize("source", DIALECT)
def test_template_dialect_is_transformers(tiny, tiny_reference, monkeypatch, source):
    monkeypatch.setattr(tiny, "chat_template", source)
    monkeypatch.setattr(tiny_reference, "chat_template", source)
    for messages in CONVERSATIONS:
        assert_same(tiny, tiny_reference, messages, a_variable=["é", 1.5, True, None, {"k": "v"}])


def test_a_template_writes_the_date_of_its_tokenizer(tiny):
    tokenizer, messages = load_tokenizer(tiny.folder), [{"role": "user", "content": "Hi"}]
    tokenizer.chat_template = "{% macro day() %}{{ strftime_now('%d %b %Y, %H:%M') }}{% endmacro %}{{ day() }}"
    assert tokenizer.render(messages) == datetime.now().strftime("%d %b %Y, 00:00"), "today, unless it is set"
    tokenizer.date = "2024-07-26"
    assert tokenizer.render(messages) == "26 Jul 2024, 00:00"


def test_a_template_that_can_do_both_thinks_as_it_is_told(tiny):
    """Granite's switch and Qwen3's, by hand; what a call asks for goes before."""
    tokenizer, messages = load_tokenizer(tiny.folder), [{"role": "user", "content": "Hi"}]
    tokenizer.chat_template = ("{{ 'granite thinks' if thinking else 'granite' }}, "
                               "{{ 'qwen' if enable_thinking is false else 'qwen thinks' }}")  # fmt: skip
    assert tokenizer.render(messages) == "granite, qwen thinks", "each its own way"
    tokenizer.think(True)
    assert tokenizer.render(messages) == "granite thinks, qwen thinks"
    tokenizer.think(False)
    assert tokenizer.render(messages) == "granite, qwen"
    assert tokenizer.render(messages, enable_thinking=True) == "granite, qwen thinks"


def test_official_templates_think_as_they_are_told(assets, tiny):
    tokenizer = load_tokenizer(tiny.folder)

    def rendered(name: str, on: bool) -> str:
        tokenizer.chat_template = (assets / "templates" / f"{name}.jinja").read_text()
        tokenizer.think(on)
        return tokenizer.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)

    granite, qwen = "ibm-granite-granite-3.3-2B-Instruct", "Qwen-Qwen3-8B-official"
    assert "<response></response>" in rendered(granite, True) and "<think>" not in rendered(granite, False)
    assert rendered(qwen, False) == rendered(qwen, True) + "<think>\n\n</think>\n\n"
    with pytest.raises(ValueError, match="always opens a thought: leave out --thinking off"):
        rendered("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", False)


def test_rendered_text_gets_no_second_bos(tiny):
    ids = tiny.encode_chat([{"role": "user", "content": "the theme of them is there " * 4}])
    assert ids.count(0) == 1 and ids[0] == 0
    assert len(ids) > 8  # nor is it truncated, although tokenizer.json says so
    assert 0 not in tiny.encode("the")


def test_vocabulary_is_the_text_of_every_id(tiny):
    texts = tiny.vocabulary()
    assert texts[:3] == ["<s>", "</s>", "<|user|>"] and len(texts) == tiny.vocab_size
    assert " there" in texts and tiny.encode(" there") == [texts.index(" there")]


def test_eos_ids_are_collected_from_all_three_files(tmp_path):
    assert load_tokenizer(make_tiny(tmp_path)).eos_ids == (1,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert load_tokenizer(tmp_path).eos_ids == (1, 5)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    assert load_tokenizer(tmp_path).eos_ids == (1, 5, 7)


def test_save_writes_the_same_bytes_even_when_the_folder_is_gone(tmp_path):
    source = make_tiny(tmp_path / "a", chat_template_jinja=TINY_TEMPLATE, special_tokens_map_json="{}")
    tokenizer = load_tokenizer(source)
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    shutil.rmtree(source)
    tokenizer.save(tmp_path / "b/c")
    assert {path.name: path.read_bytes() for path in (tmp_path / "b/c").iterdir()} == files
    saved = load_tokenizer(tmp_path / "b/c")
    assert saved.encode_chat(CONVERSATIONS[0]) == tokenizer.encode_chat(CONVERSATIONS[0])


def test_save_removes_what_another_tokenizer_left_and_nothing_else(tmp_path):
    tokenizer = load_tokenizer(make_tiny(tmp_path / "a"))
    old = make_tiny(tmp_path / "b", chat_template_jinja="the old one", special_tokens_map_json='{"eos_token": "<s>"}')
    for name in ("vocab.json", "merges.txt", "config.json", "model.safetensors"):
        (old / name).write_text("{}")
    tokenizer.save(old)
    assert {path.name for path in old.iterdir()} - set(FILES) == {"config.json", "model.safetensors"}
    assert {path.name for path in old.iterdir()} & set(FILES) == {"tokenizer.json", "tokenizer_config.json"}
    saved, reference = load_tokenizer(old), transformers.PreTrainedTokenizerFast.from_pretrained(old)
    assert saved.chat_template == reference.get_chat_template() == TINY_TEMPLATE
    assert saved.eos_ids == (1,)


@pytest.mark.parametrize("decoder", [
    ["<a>"], {"x": flags("<a>")}, {"300": "<a>"}, {"300": {"special": True}}, {"300": {"content": 1}},
    {"300": flags("<a>", lstrip="yes")}, {"300": None},
])
def test_a_malformed_added_token_is_named(tmp_path, decoder):
    path = make_tiny(tmp_path, {"added_tokens_decoder": decoder}) / "tokenizer_config.json"
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: field 'added_tokens_decoder'"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("field, value", [
    ("eos_token", 1), ("pad_token", {"special": True}), ("x_token", flags("<x>", lstrip=1)),
    ("additional_special_tokens", "<a>"), ("extra_special_tokens", [3]), ("split_special_tokens", "no"),
    ("added_tokens_decoder", 3), ("chat_template", 3), ("chat_template", [TINY_TEMPLATE]),
    ("chat_template", [{"name": "default"}]), ("chat_template", [{"template": TINY_TEMPLATE}]),
])
def test_a_field_of_another_form_is_named(tmp_path, field, value):
    path = make_tiny(tmp_path, {field: value}) / "tokenizer_config.json"
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: field '{field}'"):
        load_tokenizer(tmp_path)


def test_files_of_another_form_are_named(tmp_path):
    folder = make_tiny(tmp_path, added_tokens_json='{"<a>": "273"}')
    with pytest.raises(ValueError, match=f"{folder}/added_tokens.json: field '<a>'"):
        load_tokenizer(folder)
    (folder / "added_tokens.json").write_text('{"\\ud800": 273}')  # half a surrogate pair
    with pytest.raises(ValueError, match=f"{folder}/added_tokens.json is not valid JSON"):
        load_tokenizer(folder)
    (folder / "added_tokens.json").unlink()
    (folder / "chat_template.jinja").write_bytes("{{ 1 }}".encode("utf-16"))
    with pytest.raises(ValueError, match=f"{folder}/chat_template.jinja is not UTF-8"):
        load_tokenizer(folder)


def test_broken_or_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no tokenizer.json"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        make_tiny(tmp_path / name)
        (tmp_path / name / name).write_text('{"half": ')
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name / name))):
            load_tokenizer(tmp_path / name)
    base = load_tokenizer(make_tiny(tmp_path / "base", {"chat_template": None}))
    with pytest.raises(ValueError, match="base has no chat template"):
        base.render(CONVERSATIONS[0])


def test_unusable_input_is_a_value_error(tiny):
    for messages in ([], "Hi"):
        with pytest.raises(ValueError, match="a conversation is a list"):
            tiny.render(messages)
    circle = []
    circle.append(circle)
    for value in ({1}, circle):
        with pytest.raises(ValueError, match="template variables must be JSON values"):
            tiny.render(CONVERSATIONS[0], a_variable=value)
    with pytest.raises(ValueError, match="surrogate"):
        tiny.encode("half \ud83c of a pair")


# The process that renders

HOSTILE = {
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ (''|attr('__class__')).mro() }}",
    "format walk": "{{ '{0.__class__.__init__}'.format(messages) }}",
    "globals of a function": "{{ raise_exception.__globals__.json }}",
    "globals of lipsum": "{{ lipsum.__globals__.os.popen('id').read() }}",
    "namespace hook": "{% set ns = namespace() %}{% set ns.__html__ = 1 %}it was set",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "append": "{{ messages.append(messages[0]) }}",
    "update": "{{ messages[0].update({'content': 'x'}) }}",
    "unbound update": "{{ dict.update(messages[0], {'content': 'x'}) }}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "huge range": "{{ range(10**9) | list }}",
    "exponential macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep nesting": "{{ " + "(" * 99999 + "1" + ")" * 99999 + " }}",
    "huge power": "{{ 9**(9**9) }}",
    "repetition": "{{ 'a' * 10**10 }}",
    "list repetition": "{{ ([0] * 10**10) | length }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(64) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "center": "{{ 'a' | center(10**10) }}",
    "format width": "{{ '{:10000000000d}'.format(1) }}",
    "percent width": "{{ '%10000000000d' % 1 }}",
    "huge output": "{% for a in range(99999) %}{% for b in range(999) %}{{ 'text ' * 99 }}{% endfor %}{% endfor %}",
    "huge error": "{{ raise_exception('a' * 10**7) }}",
}


LIMITS = {"huge power": "longer than 1 seconds", "huge output": "longer than 16777216 characters"}
if sys.platform == "linux":  # other platforms do not limit address space
    LIMITS["repetition"] = "more than 1024 MiB of memory"


@pytest.fixture(scope="module")
def impatient() -> Worker:
    """The process that renders, with a second instead of five."""
    *_, path, _, memory_bytes = module._renderer.command
    worker = Worker(path, seconds=1.0, memory_bytes=int(memory_bytes))
    yield worker
    worker.stop()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_refused_or_stopped(tiny, impatient, monkeypatch, name):
    messages, start = [{"role": "user", "content": "Hi"}], time.monotonic()
    monkeypatch.setattr(module, "_renderer", impatient)
    monkeypatch.setattr(tiny, "chat_template", HOSTILE[name])
    rendered = outcome(tiny.render, messages)
    if name in LIMITS:
        assert re.search(f"{re.escape(str(tiny.folder))} failed: .*{LIMITS[name]}", str(rendered))
    assert rendered == "" or isinstance(rendered, ValueError) and len(str(rendered)) < 3000
    assert time.monotonic() - start < 5  # a second, and some for a busy machine
    assert messages == [{"role": "user", "content": "Hi"}]
    monkeypatch.setattr(tiny, "chat_template", "{{ messages[0].content }}")
    assert tiny.render(messages) == "Hi"


def test_any_text_survives_the_way_to_the_process_and_back(tiny, monkeypatch):
    text = "".join(map(chr, range(0x300))) + "\ud83c \udf89 🎉 \u2028\u0085\ufeff\uffff\U0010ffff"
    monkeypatch.setattr(tiny, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    assert tiny.render([{"content": text}] * 1000) == text * 1000


def test_tokenizers_share_one_process_that_the_first_render_starts(tiny, tmp_path):
    module._renderer.stop()
    other = load_tokenizer(make_tiny(tmp_path))
    assert module._renderer.process is None
    tiny.render(CONVERSATIONS[0])
    first = module._renderer.process.pid
    other.render(CONVERSATIONS[0])
    assert module._renderer.process.pid == first


def test_template_file_needs_neither_torch_nor_the_package():
    script = "import runpy, sys; runpy.run_path(sys.argv[1]); print('torch' in sys.modules, 'nanosafe' in sys.modules)"
    path = Path(module.__file__).with_name("template.py")
    done = subprocess.run([sys.executable, "-P", "-c", script, path], stdout=subprocess.PIPE, text=True)
    assert done.stdout.split() == ["False", "False"]
