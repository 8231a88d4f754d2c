"""One chat completion from an OpenAI-compatible endpoint, bounded in size and time, by the standard library.

The hub's client would ask nothing while the hub is offline, reads replies of any length, and follows redirects with
the key.
"""

import json
import time
from http.client import HTTPException, HTTPResponse, InvalidURL
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

SECONDS = 600  # for a whole reply: room for a slow judge's thought
MAX_BYTES = 1 << 20  # of a reply: far more than the tokens it may have


class Failure(Exception):
    """Why there is no completion. fault: of the "endpoint" (also a wrong key or URL), of the "request" (nothing will
    answer it), or "either". passing: it may work later."""

    def __init__(self, reason: str, fault: str, passing: bool = False):
        super().__init__(" ".join(reason.split())[:500])
        self.fault, self.passing = fault, passing


def chat_completion(url: str, key: str, body: dict) -> tuple[str, str | None]:
    """The text of the first choice, "" if it has none, and its finish reason. Raises Failure."""
    # Only these handlers: nothing follows a redirect, which would carry the key to another host.
    opener = OpenerDirector()
    for handler in (ProxyHandler(), HTTPHandler(), HTTPSHandler()):
        opener.add_handler(handler)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", "User-Agent": "nanosafe"}
    try:
        request = Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        with opener.open(request, timeout=SECONDS) as reply:
            status, data = reply.status, _whole(reply)
    except TimeoutError:
        raise Failure(f"no whole reply in {SECONDS} seconds", "either") from None
    except (ValueError, InvalidURL) as error:
        raise Failure(f"URL or key is malformed: {error}", "endpoint") from None
    except (OSError, HTTPException) as error:
        raise Failure(str(error) or type(error).__name__, "endpoint", passing=True) from None
    if status != 200:
        fault, passing = _blame(status)
        raise Failure(f"HTTP {status}: {data.decode(errors='replace')}", fault, passing)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise Failure("what it sends is no JSON", "either", passing=True) from None
    try:
        choice = found["choices"][0]
        text, reason = choice["message"].get("content"), choice.get("finish_reason")
    except (AttributeError, IndexError, KeyError, TypeError):
        raise Failure(f"no choice in its reply: {data.decode(errors='replace')}", "request") from None
    return text if isinstance(text, str) else "", reason


def _whole(reply: HTTPResponse) -> bytes:
    deadline, data = time.monotonic() + SECONDS, b""
    while True:
        part = reply.read1(1 << 16)
        data += part
        if not part:
            return data
        if len(data) > MAX_BYTES:
            raise Failure(f"its reply is longer than {MAX_BYTES} bytes", "request")
        if time.monotonic() > deadline:
            raise TimeoutError


def _blame(status: int) -> tuple[str, bool]:
    """Whose fault an HTTP status is, and whether it may pass."""
    if status in (408, 425, 429) or status > 500:
        return "endpoint", True
    if status == 500:
        return "either", True
    if status == 403:  # a key without rights, or a text that the endpoint's filter does not let through
        return "either", False
    if status < 400 or status in (401, 402, 404, 405, 407):
        return "endpoint", False
    return "request", False
