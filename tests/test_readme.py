"""README's links point at what they say, and the commands it gives parse."""

import re
import shlex
from pathlib import Path

import eval as evaluation
import train_rl
import train_sft
from nanosafe.names import tiny_seed
from nanosafe.paper import __main__ as paper
from nanosafe.recipes import ALIASES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_link_with_a_line_names_what_stands_there():
    links = re.findall(r"\[`([\w./]+):(\d+)` (\S+)\]\(([\w./]+)#L(\d+)\)", README)
    assert len(links) >= 20
    for shown, line, word, path, anchor in links:
        assert shown == path and line == anchor
        found = (ROOT / path).read_text().splitlines()[int(line) - 1]
        assert word in found, f"{path}:{line} is {found.strip()!r}, not {word}"


def test_every_linked_file_exists():
    for path in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / path).exists(), path


PARSERS = {"train_rl.py": train_rl, "train_sft.py": train_sft, "eval.py": evaluation, "-m nanosafe.paper": paper}


def test_commands_have_only_flags_and_models_that_exist():
    lines = README.replace("\\\n", " ").splitlines()
    commands = [(script, line.split(script)[1]) for line in lines for script in PARSERS
                if re.match(rf"(pip .*&& )?(python|torchrun) .*{script}", line)]  # fmt: skip
    assert {script for script, _ in commands} == set(PARSERS) and len(commands) >= 9
    for script, words in commands:
        models = PARSERS[script].flags().parse_args(shlex.split(words, comments=True)).model
        for model in [models] if isinstance(models, str) else models or []:
            assert model in ALIASES or "/" in model or tiny_seed(model) is not None, model


def test_glossary_names_every_metric():
    source = (ROOT / "train_rl.py").read_text() + (ROOT / "train_sft.py").read_text()
    glossary = README[README.index("## Glossary") :]
    for name in re.findall(r'"((?:reward|advantage|kl|policy|response|mismatch|reflection|sft|eval)/\w+)"', source):
        group, key = name.split("/")
        assert name in glossary or re.search(rf"`{group}/[^|]*`/{key}`", glossary), name
