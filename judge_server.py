"""Asking an OpenAI-compatible server about a video and its sound, with patience and without leaving traces.

Concept   picture, sound and question are three parts of one message. A try that fails, or an answer that is no bare
          number, is repeated after a pause that doubles; what was answered is kept, by content, and never asked again.
Paper     arXiv 2503.14505v2, Sec. 5.1: Qwen3-Omni as judge.
Differs   the published code sends the mp4 alone; a served Qwen3-Omni does not listen to its sound track, hence the
          separate wav.

Privacy   the key comes from the environment (JUDGE_API_KEY), goes into one header, and redirects are not followed.
          Neither the key nor any medium nor the server's words are printed or written to a file.
"""

import base64
import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from config import UserError
from questions import parse

GIVE_UP = 8  # questions in a row without an answer: the server is not there


@dataclass(frozen=True)
class Server:
    """Where to ask and how patiently."""

    url: str  # of the chat completions
    model: str
    retries: int  # further tries
    backoff_s: float  # before the second try, doubled for every further one
    timeout_s: float  # of one try
    key: str = ""


def message(model: str, video: bytes, sound: bytes, question: str) -> dict:
    """The request: video, sound and question as three parts of one user message."""
    parts = [("video", "video/mp4", video), ("audio", "audio/wav", sound)]
    content: list[dict] = [
        {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{mime};base64,{base64.b64encode(data).decode()}"}}
        for kind, mime, data in parts
    ]
    content.append({"type": "text", "text": question})
    return {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 16}


def endpoint(url: str | None) -> str:
    """`http://host:8000` or `.../v1` -> the address of the chat completions; UserError if it is no web address."""
    try:
        parts = urlsplit(url or "")
        fits = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # a port that is no number
        fits = False
    if not fits:
        raise UserError(f"--url {url}: expected the server's address, such as http://localhost:8000/v1")
    if parts.username or parts.query or parts.fragment:
        raise UserError("--url: expected an address without user name or ?query; a key goes into JUDGE_API_KEY")
    base = url.rstrip("/").removesuffix("/chat/completions")
    return base + ("" if urlsplit(base).path else "/v1") + "/chat/completions"


class Refused(Exception):
    """The server understood and said no: asking again would not help."""


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
            if time.monotonic() > end or sum(map(len, pieces)) > 2**20:
                raise TimeoutError
    return b"".join(pieces)


def ask(server: Server, body: bytes, sleep: Callable = time.sleep) -> tuple[float | None, str]:
    """(score, "") or (None, why): tries until a bare number comes, waiting twice as long each time.

    A server's Retry-After is obeyed, up to `timeout_s`. Raises Refused for an answer 4xx that no repetition mends.
    """
    why = ""
    for attempt in range(server.retries + 1):
        wait = server.backoff_s * 2**attempt
        try:
            reply = json.loads(post(server.url, body, server.key, server.timeout_s))
            score = parse(reply["choices"][0]["message"]["content"])
            if score is not None:
                return score, ""
            why = "not a bare number"
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
        except (ValueError, LookupError, TypeError):
            why = "not an answer of the chat interface"
        if attempt < server.retries:
            sleep(wait)
    return None, why


class Answers:
    """Answers by the content of the question: a JSON line each, appended in one piece, so nothing is asked twice."""

    def __init__(self, server: Server, path: Path):
        self.server, self.path = server, path
        self.lock, self.known, self.failures = threading.Lock(), {}, 0
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self.known[entry["key"]] = float(entry["score"])
            except (ValueError, LookupError, TypeError):
                continue  # torn by a kill: it is asked again
        self.torn = bool(text) and not text.endswith("\n")

    def get(self, video: bytes, sound: bytes, question: str) -> tuple[float | None, str]:
        """(score, "") from the cache or the server, or (None, why). Called from several threads at once.

        raises   UserError if the server knows neither us nor the model
        """
        media_keys = [hashlib.sha256(data).hexdigest() for data in (video, sound)]
        key = hashlib.sha256(json.dumps([self.server.model, question, *media_keys]).encode()).hexdigest()
        if key in self.known:
            return self.known[key], ""
        if self.failures >= GIVE_UP:
            return None, "not asked"
        body = json.dumps(message(self.server.model, video, sound, question)).encode()
        try:
            score, why = ask(self.server, body)
        except Refused as refusal:
            score, why = None, str(refusal)
            if why in ("HTTP 401", "HTTP 403", "HTTP 404"):
                hint = "set JUDGE_API_KEY" if why != "HTTP 404" else "is the path, or --model, right?"
                raise UserError(f"{self.server.url} answers {why}: {hint}") from None
        with self.lock:
            lost = why in ("no connection", "too slow") or why.startswith("HTTP")
            self.failures = self.failures + 1 if lost else 0
            if score is not None:
                self.known[key] = score
                line = "\n" * self.torn + json.dumps({"key": key, "score": score}) + "\n"
                self.torn = False
                file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                os.write(file, line.encode())
                os.close(file)
        return score, why

    def check(self) -> None:
        """UserError if the last questions all went without an answer."""
        if self.failures >= GIVE_UP:
            raise UserError(
                f"{self.server.url}: the last {self.failures} questions got no answer; what was answered is kept "
                f"in {self.path}, so start again when the server is back"
            )
