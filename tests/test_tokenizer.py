"""Conversations become the same text and ids as in transformers, and hostile templates do no harm.

The first half needs the official tokenizers and templates; the second half shows the same on a tokenizer trained here.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from nanosafe import template
from nanosafe.tokenizer import Tokenizer, load_tokenizer

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
    _, ours, reference = official
    for path in sorted((assets / "templates").glob("*.jinja")):
        monkeypatch.setattr(ours, "chat_template", path.read_text())
        monkeypatch.setattr(reference, "chat_template", path.read_text())
        texts = 0
        for messages in CONVERSATIONS:
            for add in (False, True):
                texts += assert_same(ours, reference, messages, add_generation_prompt=add)
            assert_same(ours, reference, messages, add_generation_prompt=True, enable_thinking=False, thinking=True,
                        date_string="01 Jan 2030", documents=[{"doc_id": 1, "text": "A <b>é</b>", "title": "t"}])
        assert texts >= len(CONVERSATIONS)


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
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)
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
    ({"chat_template": "no"}, {"chat_template_jinja": TINY_TEMPLATE}),
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
def test_template_dialect_is_transformers(tiny, monkeypatch, source):
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tiny.folder)
    monkeypatch.setattr(tiny, "chat_template", source)
    monkeypatch.setattr(reference, "chat_template", source)
    for messages in CONVERSATIONS:
        assert_same(tiny, reference, messages, a_variable=["é", 1.5, True, None, {"k": "v"}])


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
    with pytest.raises(ValueError, match="JSON"):
        tiny.render(CONVERSATIONS[0], a_set={1})
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


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_hostile_template_is_refused_or_stopped(tiny, monkeypatch, source):
    monkeypatch.setattr(template, "SECONDS", 1.0)
    messages, start = [{"role": "user", "content": "Hi"}], time.monotonic()
    monkeypatch.setattr(tiny, "chat_template", source)
    rendered = outcome(tiny.render, messages)
    assert rendered == "" or isinstance(rendered, ValueError) and len(str(rendered)) < 3000
    assert time.monotonic() - start < 5  # a second, and some for a busy machine
    assert messages == [{"role": "user", "content": "Hi"}]
    monkeypatch.setattr(tiny, "chat_template", "{{ messages[0].content }}")
    assert tiny.render(messages) == "Hi"


@pytest.mark.parametrize("name, message", [
    ("huge power", "took longer than 1 seconds"),
    ("huge output", "longer than 16777216 characters"),
    pytest.param("repetition", "more than 1024 MiB", marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux")),
])
def test_a_limit_names_itself_and_the_folder(tiny, monkeypatch, name, message):
    monkeypatch.setattr(template, "SECONDS", 1.0)
    monkeypatch.setattr(tiny, "chat_template", HOSTILE[name])
    with pytest.raises(ValueError, match=f"{re.escape(str(tiny.folder))} failed: .*{message}"):
        tiny.render([{"role": "user", "content": "Hi"}])


def test_any_text_survives_the_way_to_the_worker_and_back():
    text = "".join(map(chr, range(0x300))) + "\ud83c \udf89 🎉 \u2028\u0085\ufeff\uffff\U0010ffff"
    assert template.render("{{ x }}", {"x": text}) == text
    long = [{"role": "user", "content": "é" * 1000}] * 5000
    assert template.render("{% for m in messages %}{{ m.content }}{% endfor %}", {"messages": long}) == "é" * 5_000_000


def test_threads_share_the_worker():
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: template.render("{{ i }}" * (1 + i % 3), {"i": i}), range(200)))
    assert texts == [str(i) * (1 + i % 3) for i in range(200)]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_an_interrupted_render_does_not_shift_the_answers():
    def interrupt(*_):
        raise KeyboardInterrupt

    start, before = time.monotonic(), signal.signal(signal.SIGALRM, interrupt)
    try:
        assert template.render("{{ x }}", {"x": 1}) == "1"
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            template.render(HOSTILE["nested loops"], {})
    finally:
        signal.signal(signal.SIGALRM, before)
    assert template.render("{{ x }}", {"x": 2}) == "2"
    assert time.monotonic() - start < 4  # not the five seconds of the interrupted one


def test_a_worker_that_was_killed_is_replaced():
    assert template.render("a", {}) == "a"
    template._worker.process.kill()
    template._worker.process.wait()
    assert template.render("b", {}) == "b"


def run_script(body: str) -> subprocess.CompletedProcess:
    """Run `body` in a fresh process. Its worker inherits stderr, so this returns only when both have ended."""
    start = f"import os, signal, sys, threading, time\nsys.path.insert(0, {os.path.dirname(template.__file__)!r})\n"
    script = start + "import template\nassert template.render('a', {}) == 'a'\n" + body
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)


posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")


@posix
def test_the_worker_ends_with_its_parent():
    idle = run_script("os.kill(os.getpid(), signal.SIGKILL)")
    assert idle.returncode == -signal.SIGKILL and idle.stderr == ""
    busy = run_script("template.SECONDS = 1.5\n"
                      "threading.Thread(target=template.render, args=('{{ 9**(9**9) }}', {})).start()\n"
                      "time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)")
    assert busy.returncode == -signal.SIGKILL and busy.stderr == ""


@posix
def test_a_forked_child_has_its_own_worker():
    script = run_script("old = template._worker.process.pid; template._worker.lock.acquire()\n"
                        "if os.fork() == 0:\n"
                        "    print(template.render('child', {}), template._worker.process.pid != old, flush=True)\n"
                        "    os._exit(0)\n"
                        "os.wait(); template._worker.lock.release()\n"
                        "print(template.render('parent', {}), template._worker.process.pid == old)")
    assert script.stdout.split() == ["child", "True", "parent", "True"], script.stderr


@posix
def test_ctrl_c_does_not_reach_the_worker():
    script = run_script("os.setsid(); template._worker.process.kill(); template._worker.process.wait()\n"
                        "template.render('a', {}); signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
                        "os.killpg(0, signal.SIGINT); time.sleep(0.5); print(template._worker.process.poll())")
    assert script.stdout.split() == ["None"], script.stderr


def test_template_file_needs_neither_torch_nor_the_package():
    script = run_script("print('torch' in sys.modules, 'nanosafe' in sys.modules)")
    assert script.stdout.split() == ["False", "False"], script.stderr
