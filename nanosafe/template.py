"""Chat templates are programs from the hub; they are rendered in a small process of their own.

Jinja2's immutable sandbox keeps a template away from Python's internals, but bounds neither time nor memory nor output,
and a computation inside C (9**(9**9)) cannot be interrupted. So they get a worker process, which is this file run as a
script: it limits its own memory and output, and ends itself when a render takes too long. One worker serves all
tokenizers of a process. Needs only Jinja2 and the standard library, so that it starts fast.
"""

import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

SECONDS = 5.0  # wall clock of one render; an ordinary one takes well under a millisecond
MEMORY_BYTES = 1 << 30  # address space of the worker, where the platform can limit it
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
    environment.globals |= {"raise_exception": _raise, "namespace": _Namespace, "dict": _dict,
                            "strftime_now": lambda format: datetime.now().strftime(format)}
    return environment.from_string(source)


def _answer(source: str, variables: dict[str, Any]) -> dict[str, str]:
    parts, size = [], 0
    try:
        for part in _compile(source).generate(variables):
            parts.append(part)
            size += len(part)
            if size > MAX_CHARACTERS:
                return {"error": f"its text is longer than {MAX_CHARACTERS} characters"}
        return {"text": "".join(parts)}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def _serve() -> None:
    """The worker: each line [seconds, source, variables] gives a line {"text"} or {"error"}, until stdin ends."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit, macOS refuses it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    nowhere = open(os.devnull, "w")
    for line in sys.stdin.buffer:
        seconds, source, variables = json.loads(line)
        # This watchdog needs no interpreter lock, so it also ends a computation in C, and no parent.
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
        answer = json.dumps(_answer(source, variables))
        faulthandler.cancel_dump_traceback_later()
        print(answer, flush=True)


class _Worker:
    """The parent's side: starts the process on first use, and again after it ended."""

    def __init__(self):
        self.lock, self.process = threading.Lock(), None

    def render(self, source: str, variables: dict[str, Any]) -> str:
        """Render the template `source` with `variables`, which are JSON values (tuples become lists).

        Raises:
            ValueError: the template failed, was refused or went over its bounds, or a variable is not a JSON value.
        """
        try:
            request = json.dumps([SECONDS, source, variables]).encode() + b"\n"
        except TypeError as error:
            raise ValueError(f"messages and template variables must be JSON values: {error}") from None
        with self.lock:
            try:
                answer = self._exchange(request)
            except BaseException:  # an interrupt too: the next caller must not read this one's answer
                if self.process is not None:
                    with self.process:
                        self.process.kill()
                self.process = None
                raise
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def _exchange(self, request: bytes) -> dict[str, str]:
        if self.process is None or self.process.poll() is not None:
            # -P keeps this folder off the path as -I does, but still finds a Jinja2 in the user's site folder; the
            # session of its own keeps Ctrl-C for the parent.
            self.process = subprocess.Popen([sys.executable, "-P", __file__], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
        started, answer = time.monotonic(), bytearray()
        with contextlib.suppress(OSError):  # a broken pipe: there will be no answer
            while request:
                request = request[self.process.stdin.write(request):]
        while not answer.endswith(b"\n") and (chunk := self.process.stdout.read(1 << 20)):
            answer += chunk
        if not answer.endswith(b"\n"):
            late = time.monotonic() - started >= SECONDS
            raise ValueError(f"it took longer than {SECONDS:g} seconds" if late else
                             f"its process ended with exit code {self.process.wait()}")
        return json.loads(answer)


_worker = _Worker()
render = _worker.render
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_worker.__init__)  # pipes and lock stay with the parent

if __name__ == "__main__":
    _serve()
