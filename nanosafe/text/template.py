"""What runs in the worker process that renders chat templates (worker.py); it imports nothing of nanosafe.

Chat templates are programs from the hub, and they see what transformers shows them. Jinja2's immutable sandbox keeps
them away from Python's internals; the process bounds their time and memory, this file their output.
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


def answer(request: list) -> str:
    """[source, messages, variables, date] -> the text of the template `source`, on that day at midnight."""
    source, messages, variables, date = request
    now = datetime.fromisoformat(date)
    messages = [_with_reasoning(message) for message in messages]
    seen = {"messages": messages, "tools": None, "documents": None, "strftime_now": now.strftime}
    pieces, size = [], 0
    for piece in _compile(source).generate(seen | variables):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_CHARACTERS:
            raise SecurityError(f"its text is longer than {MAX_CHARACTERS} characters")
    return "".join(pieces)


def _with_reasoning(message: dict) -> dict:
    """A message without None values, its reasoning under each of the names that templates ask for."""
    message = {key: value for key, value in message.items() if value is not None}
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in message:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message


@lru_cache(maxsize=16)
def _compile(source: str) -> Template:
    """Compile in the environment that transformers gives to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "namespace": _Namespace, "dict": _dict}
    return environment.from_string(source)


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


def _dict(*args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)  # the type itself would hand out dict.update, which changes the messages


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)  # fmt: skip
