"""What runs in the worker process that renders chat templates (worker.py); it imports nothing of nanosafe.

Chat templates are programs from the hub. Jinja2's immutable sandbox keeps them away from Python's internals; the
process bounds their time and memory, this file their output.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

MAX_CHARACTERS = 16 << 20  # of the rendered text


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote; it renders as its body, a scope of its own."""

    tags = {"generation"}

    def parse(self, parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """Jinja2 would call a stored `__html__` and the like outside the sandbox, so such names are refused."""

    def __init__(self, /, *args: Any, **kwargs: Any):
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold a name that begins with an underscore: {name!r}")
        super().__setitem__(name, value)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _dict(*args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)  # the type itself would hand out dict.update, which changes the messages


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def _compile(source: str) -> Template:
    """Compile in the environment that transformers gives to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "namespace": _Namespace, "dict": _dict}
    return environment.from_string(source)


def answer(request: list) -> str:
    """[source, variables, date] -> the text of the template `source`, on that day at midnight."""
    source, variables, date = request
    now = datetime.fromisoformat(date)
    variables = {"strftime_now": lambda format: now.strftime(format)} | variables
    parts, size = [], 0
    for part in _compile(source).generate(variables):
        parts.append(part)
        size += len(part)
        if size > MAX_CHARACTERS:
            raise SecurityError(f"its text is longer than {MAX_CHARACTERS} characters")
    return "".join(parts)
