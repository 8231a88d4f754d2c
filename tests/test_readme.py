"""README's links point at what they say, and the commands it gives parse."""

import re
import shlex
from pathlib import Path

import train_rl
import train_sft
from nanosafe.config import ALIASES

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


def test_commands_have_only_flags_and_aliases_that_exist():
    commands = [line for line in README.replace("\\\n", " ").splitlines() if re.search(r"train_(rl|sft)\.py --", line)]
    assert len(commands) >= 4
    for command in commands:
        script = train_rl if "train_rl.py" in command else train_sft
        words = shlex.split(command.split("train_rl.py" if script is train_rl else "train_sft.py")[1], comments=True)
        args = script.flags().parse_args(words)
        assert args.model in ALIASES or "/" in args.model


def test_glossary_names_every_metric():
    source = (ROOT / "train_rl.py").read_text() + (ROOT / "train_sft.py").read_text()
    glossary = README[README.index("## Glossary") :]
    for name in re.findall(r'"((?:reward|advantage|kl|policy|response|mismatch|reflection|sft)/\w+)"', source):
        group, key = name.split("/")
        assert name in glossary or re.search(rf"`{group}/[^|]*`/{key}`", glossary), name
