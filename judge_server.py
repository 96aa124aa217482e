"""Asking an OpenAI-compatible server about a video and its sound, with patience and without leaving traces.

Concept   picture, sound and question are three parts of one message. A try that fails, or an answer that is no bare
          number, is repeated after a pause that doubles; what was answered is kept, by content, and never asked again.
Paper     arXiv 2503.14505v2, Sec. 5.1: Qwen3-Omni as judge.
Differs   the published code sends the mp4 alone; a served Qwen3-Omni does not listen to its sound track, hence the
          separate wav.

Privacy   the key comes from the environment (JUDGE_API_KEY), goes into one header, and redirects are not followed.
          Neither the key nor any medium nor the server's words are printed or written to a file.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import chat
from chat import Refused, Server, message, part
from config import UserError
from questions import parse

GIVE_UP = 8  # questions in a row without an answer: the server is not there


def endpoint(url: str | None) -> str:
    """`http://host:8000` or `.../v1` -> the address of the chat completions; UserError if it is no web address."""
    return chat.endpoint(url, "--url", "JUDGE_API_KEY")


def ask(server: Server, body: bytes, sleep: Callable = time.sleep) -> tuple[float | None, str]:
    """(score, "") or (None, why): as `chat.ask`, until a bare number comes."""
    return chat.ask(server, body, parse, "not a bare number", sleep)


def question_body(model: str, video: bytes, sound: bytes, question: str) -> bytes:
    """The request: video, sound and question as three parts of one user message."""
    return message(model, [part("video", "video/mp4", video), part("audio", "audio/wav", sound)], question, 16)


class Answers:
    """Answers by the content of the question: a JSON line each, appended in one piece, so nothing is asked twice."""

    def __init__(self, server: Server, path: Path):
        self.server, self.path = server, path
        self.lock, self.known, self.failures, self.why = threading.Lock(), {}, 0, ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.append("")
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"{path}: answers cannot be kept there ({error.strerror})") from error
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
        body = question_body(self.server.model, video, sound, question)
        try:
            score, why = ask(self.server, body)
        except Refused as refusal:
            score, why = None, str(refusal)
            if why in ("HTTP 401", "HTTP 403", "HTTP 404"):
                hint = "set JUDGE_API_KEY" if why != "HTTP 404" else "is the path, or --model, right?"
                raise UserError(f"{self.server.url} answers {why}: {hint}") from None
        with self.lock:
            lost = why in ("no connection", "too slow") or why.startswith("HTTP")
            self.failures, self.why = (self.failures + 1, why) if lost else (0, "")
            if score is not None:
                self.known[key] = score
                line = "\n" * self.torn + json.dumps({"key": key, "score": score}) + "\n"
                self.torn = False
                try:
                    self.append(line)
                except OSError as error:
                    raise UserError(f"{self.path}: the answer cannot be kept ({error.strerror})") from error
        return score, why

    def append(self, line: str) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def check(self) -> None:
        """UserError if the last questions all went without an answer."""
        if self.failures >= GIVE_UP:
            raise UserError(
                f"{self.server.url}: the last {self.failures} questions got no answer ({self.why}); what was answered "
                f"is kept in {self.path}, so start again when the server is back"
            )
