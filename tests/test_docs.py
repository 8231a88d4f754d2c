"""README and docs/ name only files, functions, commands and metrics that exist; README is short and shows the path."""

import re
import shlex
from pathlib import Path

import pytest

from nanosafe.evals.flags import calibration_flags, eval_flags
from nanosafe.names import tiny_seed
from nanosafe.paper.flags import paper_flags
from nanosafe.recipes import ALIASES
from nanosafe.sampler import __main__ as chat
from nanosafe.train.flags import rl_flags, sft_flags

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = [README, ROOT / "benchmarks" / "RESULTS.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAX_README_LINES = 160

# The main job in the order in which it is to be read.
PATH = [
    "train_rl.py",
    "nanosafe/train/reinforce.py",
    "nanosafe/text/data.py",
    "nanosafe/text/tokenizer.py",
    "nanosafe/model/config.py",
    "nanosafe/model/decoder.py",
    "nanosafe/model/attention.py",
    "nanosafe/sampler/generation.py",
    "nanosafe/sampler/scheduler.py",
    "nanosafe/sampler/engine.py",
    "nanosafe/kernels/sample.py",
    "nanosafe/kernels/logprob.py",
    "nanosafe/train/packing.py",
    "nanosafe/train/rewards.py",
    "nanosafe/train/optim.py",
    "nanosafe/parallel.py",
]

PARSERS = {
    "train_rl.py": rl_flags(""),
    "train_sft.py": sft_flags(""),
    "eval.py": eval_flags(""),
    "-m nanosafe.paper": paper_flags(""),
    "-m nanosafe.sampler": chat.flags(),
    "-m nanosafe.evals.calibration": calibration_flags(""),
}
METRIC = r"(?:reward|advantage|kl|policy|response|mismatch|reflection|experts|eval|sft|memory)/\w+"


def links(document: Path) -> list[tuple[str, Path]]:
    """Text and target of every link and image of a document that leads to a file of the repository."""
    found = re.findall(r"\[([^\]]*)\]\((?!http|#)([^)#\s]+)", document.read_text())
    return [(text, document.parent / target) for text, target in found]


def name(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCS, ids=name)
def test_every_linked_file_exists(document):
    missing = [str(target) for _, target in links(document) if not target.exists()]
    assert not missing, missing


@pytest.mark.parametrize("document", DOCS, ids=name)
def test_every_linked_function_is_defined_in_the_linked_file(document):
    """A link whose text is `function` or `file.py:function` leads to the file that defines it."""
    missing = []
    for text, target in links(document):
        label = re.fullmatch(r"`(?:([\w./]+\.py):)?(\w+)`", text)
        if label is None or target.suffix != ".py" or not target.exists():
            continue
        path, function = label.groups()
        if path and (ROOT / path).resolve() != target.resolve():
            missing.append(f"{text} leads to {target}")
        elif not re.search(rf"^\s*(?:def|class) {function}\b", target.read_text(), re.MULTILINE):
            missing.append(text)
    assert not missing, missing


def test_every_detail_names_its_function():
    details = re.findall(r"^\d+\. (.*?)(?=^\d+\. |^## |\Z)", (ROOT / "docs/details.md").read_text(), re.M | re.S)
    assert len(details) >= 50
    for detail in details:
        assert re.search(r"\[`[\w./]+\.py:\w+`\]\(", detail), detail


def commands() -> list[tuple[str, str, str]]:
    """Document, script and flags of every command line in README and docs/, RESULTS.md's dated ones left out."""
    found = []
    for document in DOCS:
        if document.parent.name == "benchmarks":
            continue
        for line in document.read_text().replace("\\\n", " ").splitlines():
            for script in PARSERS:
                if re.match(rf"(pip .*&& )?(python|torchrun) .*{re.escape(script)}( |$)", line):
                    found.append((name(document), script, line.split(script, 1)[1]))
    return found


def test_commands_have_only_flags_and_models_that_exist():
    assert {script for _, script, _ in commands()} == set(PARSERS) and len(commands()) >= 20
    for document, script, flags in commands():
        args = PARSERS[script].parse_args(shlex.split(flags, comments=True))
        models = getattr(args, "model", None) or []
        for model in [models] if isinstance(models, str) else models:
            known = model in ALIASES or "/" in model or tiny_seed(model) is not None
            assert known, f"{document}: {script}{flags}: {model}"


def sources() -> str:
    files = [ROOT / "train_rl.py", ROOT / "train_sft.py", *sorted((ROOT / "nanosafe/train").glob("*.py"))]
    files += [ROOT / "nanosafe/model/granite.py", ROOT / "nanosafe/evals/during_training.py"]
    return "\n".join(file.read_text() for file in files)


def test_the_glossary_names_every_metric_and_no_other():
    logged = set(re.findall(rf'"({METRIC})"', sources()))
    explained = set(re.findall(rf"`({METRIC})`", (ROOT / "docs/metrics.md").read_text()))
    # Names that the code puts together: of an eval's subject, an expert's number, a reward.
    composed = {"eval/safety", "eval/over_refusal", "eval/reasoning", "experts/load_N", "reward/NAME"}
    assert len(logged) >= 30
    assert explained == logged | composed


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= MAX_README_LINES


def test_readme_has_the_test_command_where_ci_reads_it():
    command = re.search(r"<!-- the tests -->\n```bash\n(.+)\n```\n", README.read_text())
    assert command and command[1].endswith("python -m pytest")


def test_readme_names_the_files_of_the_reading_path_in_order():
    section = README.read_text().split("## Reading path")[1].split("\n## ")[0]
    named = re.findall(r"^\d+\. \[`([\w./]+)`\]\(([\w./]+)\)", section, re.MULTILINE)
    assert [path for path, _ in named] == PATH
    assert [target for _, target in named] == PATH
    assert all((ROOT / path).is_file() for path in PATH)


def test_names_of_files_are_those_of_the_tree():
    """Python files named in backticks exist, with their folder or, where only a file's name stands, anywhere."""
    tree = {file.name for file in ROOT.rglob("*.py")}
    missing = []
    for document in DOCS:
        for path in re.findall(r"`((?:[\w]+/)*[\w]+\.py)`", document.read_text()):
            if not ((ROOT / path).exists() if "/" in path else path in tree):
                missing.append(f"{name(document)}: {path}")
    assert not missing, missing
