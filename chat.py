"""Asking an OpenAI-compatible server, with patience and without leaving traces.

Concept   one question is one POST to .../chat/completions. A try that fails, or an answer that cannot be used, is
          repeated after a pause that doubles; a server that says how long to wait is obeyed.
Paper     none: plumbing of the captions (arXiv 2503.14505v2, Sec. 4.4).

Privacy   the key comes from the environment and goes into one header; redirects are not followed. Neither the key nor
          what was sent nor the server's error texts are printed or written to a file.
"""

import base64
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from config import UserError

LARGEST = 2**20  # bytes of an answer


@dataclass(frozen=True)
class Server:
    """Where to ask and how patiently."""

    url: str  # of the chat completions
    model: str
    retries: int  # further tries
    backoff_s: float  # before the second try, doubled for every further one
    timeout_s: float  # of one try
    key: str = ""


class Refused(Exception):
    """The server understood and said no: asking again would not help."""


def endpoint(url: str | None, flag: str, key_variable: str) -> str:
    """`http://host:8000` or `.../v1` -> the address of the chat completions; UserError if it is no web address."""
    try:
        parts = urlsplit(url or "")
        fits = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # a port that is no number
        fits = False
    if not fits:
        raise UserError(f"{flag} {url}: expected the server's address, such as http://localhost:8000/v1")
    if parts.username or parts.query or parts.fragment:
        raise UserError(f"{flag}: expected an address without user name or ?query; a key goes into {key_variable}")
    base = url.rstrip("/").removesuffix("/chat/completions")
    return base + ("" if urlsplit(base).path else "/v1") + "/chat/completions"


def part(kind: str, mime: str, data: bytes) -> dict:
    """A medium as one part of a message: kind is image, video or audio."""
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{mime};base64,{base64.b64encode(data).decode()}"}}


def message(model: str, parts: list[dict], question: str, max_tokens: int) -> bytes:
    """The request: media and question as the parts of one user message."""
    content = [*parts, {"type": "text", "text": question}]
    return json.dumps(
        {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": max_tokens}
    ).encode()


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key and the media to another host."""

    def redirect_request(self, *_):
        return None


def post(url: str, body: bytes, key: str, timeout_s: float) -> bytes:
    """One request -> the answer's bytes. Unlike the socket's, this time limit holds for a server that drips, too."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, body, headers)
    end, pieces = time.monotonic() + timeout_s, []
    with urllib.request.build_opener(NoRedirect).open(request, timeout=timeout_s) as response:
        while piece := response.read1(65536):
            pieces.append(piece)
            if time.monotonic() > end or sum(map(len, pieces)) > LARGEST:
                raise TimeoutError
    return b"".join(pieces)


def ask(server: Server, body: bytes, read: Callable, unfit: str, sleep: Callable = time.sleep) -> tuple[Any, str]:
    """(what `read` makes of the answer's text, "") or (None, why): tries until `read` does not say None.

    unfit   the reason when it does
    A server's Retry-After is obeyed, up to `timeout_s`. Raises Refused for an answer 4xx that no repetition mends.
    """
    why = ""
    for attempt in range(server.retries + 1):
        wait = server.backoff_s * 2**attempt
        try:
            reply = json.loads(post(server.url, body, server.key, server.timeout_s))
            answer = read(reply["choices"][0]["message"]["content"])
            if answer is not None:
                return answer, ""
            why = unfit
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 409, 425, 429):
                raise Refused(f"HTTP {error.code}") from None  # its text may echo what was sent
            why = f"HTTP {error.code}"
            asked_for = error.headers.get("Retry-After", "")
            wait = max(wait, min(float(asked_for), server.timeout_s)) if asked_for.isdecimal() else wait
        except TimeoutError:
            why = "too slow"
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            why = "too slow" if isinstance(getattr(error, "reason", None), TimeoutError) else "no connection"
        except (ValueError, LookupError, TypeError, AttributeError):
            why = "not an answer of the chat interface"
        if attempt < server.retries:
            sleep(wait)
    return None, why
