"""The form of the code itself: which way imports point, how long files are, how dense lines are (docs/map.md)."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train_rl", "train_sft", "eval")
# What is run and never imported stands above the rooms, as the scripts do.
RUN_ONLY = ("nanosafe.paper.__main__", "nanosafe.sampler.__main__", "nanosafe.evals.calibration", "nanosafe.tiny.gates")
# From top to bottom. A file may import from its own room and from those below it.
FLOORS = (
    ("paper",), ("plan",), ("evals",), ("names",), ("tiny",),
    ("train",), ("sampler",), ("model",), ("text",), ("io", "parallel", "randomness", "recipes"), ("kernels",),
)  # fmt: skip
READING_PATH = """
    train_rl.py nanosafe/train/reinforce.py nanosafe/text/data.py nanosafe/text/tokenizer.py
    nanosafe/model/config.py nanosafe/model/decoder.py nanosafe/model/attention.py
    nanosafe/sampler/generation.py nanosafe/sampler/scheduler.py nanosafe/sampler/engine.py
    nanosafe/kernels/sample.py nanosafe/kernels/logprob.py
    nanosafe/train/packing.py nanosafe/train/rewards.py nanosafe/train/optim.py nanosafe/parallel.py
""".split()
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def sources() -> dict[str, Path]:
    """Every module by its dotted name; tests and benchmarks have rules of their own."""
    files = [ROOT / f"{script}.py" for script in SCRIPTS] + sorted((ROOT / "nanosafe").rglob("*.py"))
    modules = {}
    for file in files:
        dotted = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        modules[dotted.removesuffix(".__init__")] = file
    return modules


@cache
def imports() -> dict[str, set[str]]:
    """The project's modules that each module imports, those inside functions too.

    The public face, `nanosafe` itself, is left out: it re-exports and is what users import.
    """
    graph = {}
    for name, file in sources().items():
        used = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: imports are written in full"
                used |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        graph[name] = used & sources().keys() - {name, "nanosafe"}
    return graph


def floor(module: str) -> int:
    """0 for the scripts; larger is lower."""
    if module in SCRIPTS or module in RUN_ONLY or module == "nanosafe":
        return 0
    room = module.split(".")[1]
    [number] = [number for number, rooms in enumerate(FLOORS, 1) if room in rooms]
    return number


def reachable(module: str) -> set[str]:
    seen, todo = set(), [module]
    while todo:
        for used in imports()[todo.pop()] - seen:
            seen.add(used)
            todo.append(used)
    return seen


def code_lines(file: Path) -> list[str]:
    """The lines that are no blank, comment or docstring."""
    text = file.read_text()
    documentation = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            documentation |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.strip().startswith("#") and number not in documentation:
            lines.append(line)
    return lines


def test_there_is_no_circle_of_imports():
    assert not [module for module in sources() if module in reachable(module)]


@pytest.mark.parametrize("module", sorted(sources()))
def test_imports_point_downwards(module):
    if module == "nanosafe":
        return
    for used in imports()[module]:
        assert used not in RUN_ONLY and used not in SCRIPTS, f"{module} imports {used}, which is a script"
        assert floor(used) >= floor(module), f"{module} imports {used}, which stands above it"


def test_kernels_and_the_mathematics_of_rl_need_nothing_else_of_the_project():
    for module, used in imports().items():
        if module.startswith("nanosafe.kernels"):
            assert all(other.startswith("nanosafe.kernels") for other in used), module
    assert not imports()["nanosafe.train.reinforce"]


def test_no_file_is_longer_than_a_reader_keeps_in_mind():
    lengths = {name: len(file.read_text().splitlines()) for name, file in sources().items()}
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_the_reading_path_takes_one_evening():
    lengths = [len((ROOT / file).read_text().splitlines()) for file in READING_PATH]
    assert len(lengths) == 16 and sum(lengths) <= 3000, sum(lengths)


def test_lines_are_not_dense():
    lines, comprehensions = [], 0
    for file in sources().values():
        lines += code_lines(file)
        nodes = ast.walk(ast.parse(file.read_text()))
        comprehensions += sum(isinstance(node, COMPREHENSIONS) for node in nodes)
    assert 100 * comprehensions <= 4.5 * len(lines), 100 * comprehensions / len(lines)
    wide = sum(len(line) > 100 for line in lines)
    assert wide <= 0.06 * len(lines), wide / len(lines)


def test_only_tests_in_a_process_of_their_own_compile():
    """Where torch's CUDA build has compiled a function, no fork can do a backward pass, and many tests fork."""
    compiling = [file.name for file in (ROOT / "tests").rglob("*.py") if "torch." + "compile(" in file.read_text()]
    assert compiling == ["compiled_functions.py"]
