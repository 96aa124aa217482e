"""Captions from a vision server on 127.0.0.1 that answers well, badly, slowly or not at all; asking with patience."""

import base64
import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import pytest
from tiny import write_video

import captions
import chat
import data
import media
from captions import caption_wild, clean, vision_server
from chat import Server, ask, endpoint
from config import UserError
from data_names import Source

KEY = "sk-never-shown"
GOOD = "A woman in a red coat dances on a bridge at night."


def says(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode(), {}


@contextmanager
def serve(*replies):
    """A server that gives these replies (status, body, headers) in turn, the last one for ever; None: no answer.

    Yields its address and the list of what it was asked: (headers, body)."""
    asked, free, lock = [], threading.Event(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                reply = replies[min(len(asked), len(replies) - 1)]
                asked.append((dict(self.headers), body))
            if reply is None:
                free.wait()
                return
            status, text, headers = reply
            self.send_response(status)
            for name, value in {"Content-Length": str(len(text)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/chat/completions", asked
    finally:
        free.set()
        server.shutdown()
        thread.join()
        server.server_close()


def at(url, timeout_s=20.0, retries=2):
    return Server(url, "eyes", retries, 0.0, timeout_s, KEY)


def left_behind(folder):
    return sorted(name for name in os.listdir(folder) if not name.endswith((".mp4", ".mov", ".txt")))


# ------------------------------------------------------------------------------------------------------- captions


def test_only_wild_videos_without_a_caption_are_asked_about_and_never_twice(tmp_path):
    for name in ("a.mp4", "b.mp4", "blank.mp4", "gBR_sBM_c01_d04_mBR1_ch01.mp4"):
        write_video(tmp_path / name)
    (tmp_path / "b.txt").write_text("my own words")
    (tmp_path / "blank.txt").write_text(" \n")
    with serve(says(GOOD)) as (url, asked):
        assert caption_wild([tmp_path], at(url)) == (2, [])
        assert len(asked) == 2
        assert caption_wild([tmp_path], at(url)) == (0, [])
        assert len(asked) == 2
    texts = {path.name: path.read_text() for path in tmp_path.glob("*.txt")}
    assert texts == {"a.txt": GOOD + "\n", "b.txt": "my own words", "blank.txt": GOOD + "\n"}
    assert left_behind(tmp_path) == []


def test_two_videos_of_one_name_are_one_question_and_words_that_came_meanwhile_stay(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    (tmp_path / "a.mov").write_bytes(path.read_bytes())
    with serve(says(GOOD)) as (url, asked):
        assert caption_wild([tmp_path], at(url)) == (1, []) and len(asked) == 1
        (tmp_path / "a.txt").write_text("someone else's words")
        assert captions.caption_one(Source(path), at(url)) == "" and len(asked) == 1
    assert (tmp_path / "a.txt").read_text() == "someone else's words"


def test_what_is_asked_are_eight_frames_from_first_to_last_in_the_chat_form(tmp_path):
    frames = np.zeros((80, 600, 800, 3), np.uint8)
    for i in range(8):
        frames[10 * i : 10 * i + 10] = 30 * i + 10
    media.write_mp4(tmp_path / "a.mp4", frames, 30)
    with serve(says(GOOD)) as (url, asked):
        caption_wild([tmp_path], at(url))
    ((headers, body),) = asked
    body = json.loads(body)
    assert headers["Authorization"] == f"Bearer {KEY}" and body["model"] == "eyes"
    *pictures, question = body["messages"][0]["content"]
    assert question == {"type": "text", "text": captions.QUESTION} and len(pictures) == 8
    for i, picture in enumerate(pictures):
        start, coded = picture["image_url"]["url"].split(",")
        assert (picture["type"], start) == ("image_url", "data:image/jpeg;base64")
        (tmp_path / "a.jpg").write_bytes(base64.b64decode(coded))
        with av.open(str(tmp_path / "a.jpg")) as container:
            image = next(container.decode(video=0)).to_ndarray(format="rgb24")
        assert image.shape == (384, 512, 3) and abs(image.astype(int) - (30 * i + 10)).max() < 6


def test_bad_answers_are_asked_again_until_one_is_a_caption(tmp_path):
    write_video(tmp_path / "a.mp4")
    bad = [(500, b"", {}), (429, b"", {"Retry-After": "0"}), (200, b"<html>", {}), (200, b"[]", {}), says(""), says(7)]
    with serve(*bad, says(f' "{GOOD}"\n')) as (url, asked):
        assert caption_wild([tmp_path], at(url, retries=6)) == (1, [])
        assert len(asked) == 7
    assert (tmp_path / "a.txt").read_text() == GOOD + "\n"


@pytest.mark.parametrize(
    "reply, why",
    [
        ((503, b"", {}), "no answer (HTTP 503)"),
        (says("x" * 5000), "no answer (not a caption)"),
        ((200, b"null", {}), "no answer (not an answer of the chat interface)"),
        ((200, b"x" * 2**21, {}), "no answer (too slow)"),
        ((400, b"no pictures please", {}), "refused (HTTP 400)"),
    ],
)
def test_a_clip_that_gets_no_caption_is_reported_and_nothing_is_written(tmp_path, reply, why):
    path = write_video(tmp_path / "a.mp4")
    with serve(reply) as (url, asked):
        assert caption_wild([tmp_path], at(url)) == (0, [(path, why)])
        assert len(asked) == (1 if why.startswith("refused") else 3)
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_a_server_that_takes_too_long_is_given_up(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    with serve(None) as (url, asked):
        assert caption_wild([tmp_path], at(url, timeout_s=0.2, retries=1)) == (0, [(path, "no answer (too slow)")])
        assert len(asked) == 2


def test_a_broken_video_does_not_stop_the_others(tmp_path):
    write_video(tmp_path / "b.mp4")
    (tmp_path / "a.mp4").write_text("not a video")
    with serve(says(GOOD)) as (url, _):
        written, ((path, why),) = caption_wild([tmp_path], at(url))
    assert written == 1 and path.name == "a.mp4" and "cannot be read" in why


@pytest.mark.parametrize("status, hint", [(401, "CAPTION_API_KEY"), (403, "CAPTION_API_KEY"), (404, "--caption-model")])
def test_a_server_that_does_not_know_us_stops_the_run_without_showing_the_key(tmp_path, status, hint):
    write_video(tmp_path / "a.mp4")
    with serve((status, KEY.encode(), {})) as (url, _), pytest.raises(UserError, match=hint) as caught:
        caption_wild([tmp_path], at(url))
    assert KEY not in str(caught.value)


def test_a_server_that_died_ends_the_run_and_what_it_said_is_kept(tmp_path):
    for i in range(12):
        write_video(tmp_path / f"{i:02d}.mp4", dur_s=0.2)
    with serve(says(GOOD), (500, b"", {})) as (url, asked), pytest.raises(UserError, match="1 captions that came"):
        caption_wild([tmp_path], at(url, retries=0))
    assert len(list(tmp_path.glob("*.txt"))) == 1 and left_behind(tmp_path) == []
    assert 9 <= len(asked) <= 12


def test_failures_between_answers_do_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "JOBS", 1)
    for i in range(18):
        write_video(tmp_path / f"{i:02d}.mp4", dur_s=0.1)
    with serve(*[(500, b"", {}), says(GOOD)] * 9) as (url, _):
        written, failed = caption_wild([tmp_path], at(url, retries=0))
    assert written == len(failed) == 9


def test_a_redirect_does_not_carry_the_key_to_another_host(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    with serve(says(GOOD)) as (other, never), serve((302, b"", {"Location": other})) as (url, _):
        assert caption_wild([tmp_path], at(url)) == (0, [(path, "refused (HTTP 302)")])
        assert never == []


@pytest.mark.parametrize(
    "answer, caption",
    [
        ('  "Two men\n dance." ', "Two men dance."),
        ("Ein Mann tanzt – schön.", "Ein Mann tanzt – schön."),
        ("", None),
        ("...", None),
        (None, None),
        (["a"], None),
        ("a\x00b", None),
        ("x" * 1001, None),
    ],
)
def test_a_caption_is_one_printable_line_of_words(answer, caption):
    assert clean(answer) == caption


def test_the_command_captions_first_then_encodes_and_never_prints_the_key(tmp_path, monkeypatch, capsys):
    write_video(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").touch()
    monkeypatch.setenv("CAPTION_API_KEY", KEY)
    seen = []
    monkeypatch.setattr(data, "encode", lambda cfg: seen.append((tmp_path / "a.txt").read_text()))
    with serve(says(GOOD)) as (url, asked):
        command = (
            f"data.py --data {tmp_path} --caption-url {url.removesuffix('/chat/completions')} --caption-model eyes"
        )
        monkeypatch.setattr("sys.argv", command.split())
        data.main()
    assert seen == [GOOD + "\n"] and asked[0][0]["Authorization"] == f"Bearer {KEY}"
    told = capsys.readouterr()
    assert "1 captions written, 1 failed" in told.out and "b.mp4: " in told.out
    assert KEY not in told.out + told.err


# --------------------------------------------------------------------------------------------------------- asking


def test_pauses_double_and_a_wish_of_the_server_is_obeyed_within_the_time_limit():
    replies = [(500, b"", {}), (429, b"", {"Retry-After": "7"}), (503, b"", {"Retry-After": "999"}), (500, b"", {})]
    pauses = []
    with serve(*replies, says("ok")) as (url, _):
        server = Server(url, "m", 4, 1.5, 30.0)
        assert ask(server, b"{}", lambda text: text, "unfit", pauses.append) == ("ok", "")
    assert pauses == [1.5, 7.0, 30.0, 12.0]


def test_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.delenv("CAPTION_API_KEY", raising=False)
    with serve(says("ok")) as (url, asked):
        chat.ask(vision_server(url, "m"), b"{}", str, "unfit")
    assert "Authorization" not in asked[0][0]


@pytest.mark.parametrize("given", ["http://h:8000", "http://h:8000/v1", "http://h:8000/v1/chat/completions"])
def test_addresses_lead_to_the_chat_completions(given):
    assert endpoint(given, "--caption-url", "K") == "http://h:8000/v1/chat/completions"


@pytest.mark.parametrize("given", [None, "", "localhost:8000", "file:///etc/passwd", "http://h:port", "http://u:p@h"])
def test_other_addresses_are_refused(given):
    with pytest.raises(UserError, match="--caption-url"):
        endpoint(given, "--caption-url", "K")
