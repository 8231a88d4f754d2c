"""One chat completion from an OpenAI-compatible endpoint, bounded in size and time.

The hub's client would ask nothing while the hub is offline, and reads replies of any length.
"""

import json
import time
from http.client import HTTPException, HTTPResponse, InvalidURL
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

SECONDS = 600  # for a whole reply: room for a slow judge's thought
MAX_BYTES = 1 << 20  # of a reply: far more than the tokens it may have
# Whose fault a status is. All others from 400 to 499 are the request's, from 500 on the endpoint's.
FAULTS = dict.fromkeys((401, 402, 404, 405, 407, 408, 425, 429), "endpoint")
FAULTS |= {403: "either", 500: "either"}
BUSY = (408, 425, 429)  # asking later may help, as it may with every status from 500 on


class Failure(Exception):
    """Why there is no completion.

    fault: of the "endpoint" (also a wrong key or URL), of the "request" (nothing will answer it),
    or of "either". passing: it may work later.
    """

    def __init__(self, reason: str, fault: str, passing: bool = False):
        super().__init__(" ".join(reason.split())[:500])
        self.fault, self.passing = fault, passing


def chat_completion(url: str, key: str, body: dict) -> tuple[str, str | None]:
    """The text of the first choice, "" if it has none, and its finish reason. Raises Failure."""
    status, data = _post(f"{url.rstrip('/')}/chat/completions", key, json.dumps(body).encode())
    reply = data.decode(errors="replace")
    if status != 200:
        fault = FAULTS.get(status, "request" if 400 <= status < 500 else "endpoint")
        raise Failure(f"HTTP {status}: {reply}", fault, status in BUSY or status >= 500)
    try:
        choice = json.loads(reply)["choices"][0]
        text, reason = choice["message"].get("content"), choice.get("finish_reason")
    except (ValueError, RecursionError):
        raise Failure("what it sends is no JSON", "either", passing=True) from None
    except (AttributeError, IndexError, KeyError, TypeError):
        raise Failure(f"no choice in its reply: {reply}", "request") from None
    return text if isinstance(text, str) else "", reason


def _post(url: str, key: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of the reply."""
    # With these handlers alone, no redirect is followed: it would carry the key to another host.
    opener = OpenerDirector()
    for handler in (ProxyHandler(), HTTPHandler(), HTTPSHandler()):
        opener.add_handler(handler)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        request = Request(url, body, headers | {"User-Agent": "nanosafe"})
        with opener.open(request, timeout=SECONDS) as reply:
            return reply.status, _read(reply)
    except TimeoutError:
        raise Failure(f"no whole reply in {SECONDS} seconds", "either") from None
    except (ValueError, InvalidURL) as error:
        raise Failure(f"URL or key is malformed: {error}", "endpoint") from None
    except (OSError, HTTPException) as error:
        raise Failure(str(error) or type(error).__name__, "endpoint", passing=True) from None


def _read(reply: HTTPResponse) -> bytes:
    deadline, data = time.monotonic() + SECONDS, b""
    while block := reply.read1(1 << 16):
        data += block
        if len(data) > MAX_BYTES:
            raise Failure(f"its reply is longer than {MAX_BYTES} bytes", "request")
        if time.monotonic() > deadline:
            raise TimeoutError
    return data
