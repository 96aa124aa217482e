"""The judge against a real HTTP server on this machine: one that is well, slow, broken, talkative, or deaf."""

import base64
import io
import json
import re
import socket
import sys
import threading
import wave
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product

import av
import numpy as np
import pytest
from tiny import write_video

import beats
import judge
import media
from config import UserError
from judge_server import GIVE_UP, Answers, Refused, Server, ask, endpoint
from questions import DANCE, PROMPT, QUESTIONS, VIDEO, bpm_of, find_clips, parse

KEY = "sk-very-secret-0123456789"


def say(text):
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.fixture
def serve(monkeypatch):
    """serve(reply) -> Server; reply(request, number of the request) -> (status, headers, body)."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = []

    def start(reply, retries=2, timeout_s=20.0):
        seen, lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    seen.append((request, dict(self.headers), self.path))
                    number = len(seen) - 1
                status, headers, body = reply(request, number)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in body if isinstance(body, list) else [body]:
                    if callable(piece):
                        piece()
                    else:
                        self.wfile.write(piece)
                        self.wfile.flush()

            def log_message(self, *_):
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        running.append(http)
        server = Server(endpoint(f"http://127.0.0.1:{http.server_port}"), "m", retries, 0.0, timeout_s, KEY)
        return server, seen

    yield start
    for http in running:
        http.shutdown()
        http.server_close()


def sound_of(request) -> np.ndarray:
    data = base64.b64decode(request["messages"][0]["content"][1]["audio_url"]["url"].partition(",")[2])
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767


def video_of(request) -> bytes:
    return base64.b64decode(request["messages"][0]["content"][0]["video_url"]["url"].partition(",")[2])


def question_of(request) -> str:
    return request["messages"][0]["content"][2]["text"]


# --------------------------------------------------------------------------------------------------- questions


def test_the_eleven_questions_are_those_of_table_10():
    assert (len(DANCE), len(VIDEO), len(PROMPT)) == (5, 3, 3)
    assert DANCE["style_alignment"] == (
        "Rate the style alignment of the dance to music where: 0 means poor style alignment of the dance to music, 5 "
        "means moderate style alignment of the dance to music, and 10 means perfect style alignment of the dance to "
        "music. Output only the number."
    )
    assert DANCE["body_representation"] == (
        "Rate the body representation of the dancer where: 0 means unrealistic/distorted proportions of the dancer, 5 "
        "means minor anatomical issues of the dancer, and 10 means anatomically perfect representation of the dancer. "
        "Output only the number."
    )
    assert DANCE["choreography_complexity"] == (
        "Rate the complexity of the choreography where: 0 means extremely basic choreography, 5 means intermediate "
        "choreography, and 10 means extremely complex/advanced choreography. Output only the number."
    )
    assert VIDEO["overall_consistency"] == (
        "Rate the overall consistency where: 0 means poor consistency, 5 means moderate consistency, and 10 means "
        "perfect consistency. Output only the number."
    )
    assert VIDEO["imaging_quality"] == (
        "Rate the imaging quality where: 0 means poor imaging quality, 5 means moderate imaging quality, and 10 means "
        "perfect imaging quality. Output only the number."
    )
    assert all(text.endswith(" Output only the number.") for text in QUESTIONS.values())
    assert [name for name, text in QUESTIONS.items() if "'{prompt}'" in text] == list(PROMPT)


@pytest.mark.parametrize("text, score", [("7", 7), (" 8.5\n", 8.5), ("10", 10), ("10.0", 10), ("0", 0), ("9/10", 9),
                                         ("7.5 / 10", 7.5)])  # fmt: skip
def test_a_bare_number_is_read(text, score):
    assert parse(text) == score


@pytest.mark.parametrize("text", ["On a 0-10 scale: 7", "7 out of 10", "11", "10.5", "-3", "", "seven", "7.", "7, 8",
                                  "**7**", "7/5", "7/100", "1e1", "nan", "٧", None, 7, ["7"]])  # fmt: skip
def test_anything_but_a_bare_number_from_0_to_10_is_no_score(text):
    assert parse(text) is None


def test_tempo_comes_from_the_track_in_the_name():
    assert [bpm_of(n) for n in ("mBR0_p03", "gHO_sBM_c01_d04_mHO5_ch01", "mLH4")] == [80, 135, 120]
    assert bpm_of("wild_000001") is None and bpm_of("mBR7_p00") is None and bpm_of("xmBR0") is None


# ------------------------------------------------------------------------------------------------- the server


@pytest.mark.parametrize("url, full", [("http://h:8000", "http://h:8000/v1/chat/completions"),
                                       ("http://h:8000/v1/", "http://h:8000/v1/chat/completions"),
                                       ("https://h/api/v3", "https://h/api/v3/chat/completions"),
                                       ("http://h/v1/chat/completions", "http://h/v1/chat/completions")])  # fmt: skip
def test_the_address_is_completed(url, full):
    assert endpoint(url) == full


@pytest.mark.parametrize("url", [None, "", "localhost:8000", "file:///etc/passwd", "http://", "http://h:x"])
def test_what_is_no_web_address_is_refused(url):
    with pytest.raises(UserError, match="expected the server's address"):
        endpoint(url)


def test_a_key_inside_the_address_is_refused_without_repeating_it():
    for url in (f"http://u:{KEY}@h/v1", f"http://h/v1?key={KEY}"):
        with pytest.raises(UserError, match="JUDGE_API_KEY") as error:
            endpoint(url)
        assert KEY not in str(error.value)


def test_a_good_answer_is_a_score_and_the_key_is_sent_in_its_header(serve):
    server, seen = serve(lambda request, n: say("8"))
    assert ask(server, b"{}") == (8.0, "")
    assert len(seen) == 1 and seen[0][1]["Authorization"] == f"Bearer {KEY}"
    assert seen[0][2] == "/v1/chat/completions"


@pytest.mark.parametrize("bad, why", [
    (say("Certainly! On a 0-10 scale: 7"), "not a bare number"),
    ((500, {}, b"oops"), "HTTP 500"),
    ((429, {"Retry-After": "0"}, b""), "HTTP 429"),
    ((200, {}, b"<html>"), "not an answer of the chat interface"),
    ((200, {}, b'{"choices": []}'), "not an answer of the chat interface"),
    ((200, {"Content-Length": "99"}, b"{"), "not an answer of the chat interface"),
])  # fmt: skip
def test_a_bad_answer_is_asked_again_and_is_missing_after_all_tries(serve, bad, why):
    server, seen = serve(lambda request, n: bad, retries=2)
    assert ask(server, b"{}") == (None, why) and len(seen) == 3
    server, seen = serve(lambda request, n: bad if n < 2 else say("6"), retries=2)
    assert ask(server, b"{}") == (6.0, "") and len(seen) == 3


def test_the_pause_doubles_and_retry_after_is_obeyed_up_to_the_time_limit(serve):
    after = ["", "30", "9999", "soon", "-5"]
    server, _ = serve(lambda request, n: (429, {"Retry-After": after[n]} if n < 5 else {}, b""), retries=5)
    server = Server(server.url, "m", 5, 2.0, 60.0)
    pauses = []
    ask(server, b"{}", pauses.append)
    assert pauses == [2, 30, 60, 16, 32]  # 2, 4 -> 30, 8 -> at most 60, 16, 32; none after the last try


def test_a_server_that_never_answers_is_given_up_in_time(serve):
    end = threading.Event()
    server, seen = serve(lambda request, n: (200, {}, [lambda: end.wait(10)]), retries=0, timeout_s=0.3)
    assert ask(server, b"{}") == (None, "too slow") and len(seen) == 1
    end.set()


def test_a_server_cannot_stretch_the_time_limit_by_dripping(serve):
    end, good = threading.Event(), say("7")[2]
    drops = [b" ", lambda: end.wait(0.05)] * 40  # two seconds of blanks before a good answer
    server, _ = serve(lambda request, n: (200, {}, [*drops, good]), retries=0, timeout_s=0.4)
    assert ask(server, b"{}") == (None, "too slow")
    end.set()
    server, _ = serve(lambda request, n: (200, {}, [*drops, good]), retries=0)
    assert ask(server, b"{}") == (7.0, "")


def test_a_refusal_is_not_repeated_and_a_redirect_not_followed(serve):
    server, seen = serve(lambda request, n: (400, {}, b"no"))
    with pytest.raises(Refused, match="HTTP 400"):
        ask(server, b"{}")
    elsewhere, stolen = serve(lambda request, n: say("10"))
    for code in (302, 307):
        server, seen = serve(lambda request, n, code=code: (code, {"Location": elsewhere.url}, b""))
        with pytest.raises(Refused, match=f"HTTP {code}"):
            ask(server, b"{}")
        assert len(seen) == 1
    assert stolen == []


# --------------------------------------------------------------------------------------------------- the cache


def test_an_answer_is_asked_once_for_the_same_content_and_again_for_any_other(serve, tmp_path):
    server, seen = serve(lambda request, n: say("4"))
    for _ in range(2):  # the second time from the file
        answers = Answers(server, tmp_path / "answers.jsonl")
        for video, sound, question in [(b"v", b"s", "q")] * 2 + [
            (b"w", b"s", "q"),
            (b"v", b"t", "q"),
            (b"v", b"s", "r"),
        ]:
            assert answers.get(video, sound, question) == (4.0, "")
    assert len(seen) == 4
    Answers(Server(server.url, "other model", 0, 0, 9), tmp_path / "answers.jsonl").get(b"v", b"s", "q")
    assert len(seen) == 5


def test_answers_are_kept_in_a_new_folder_and_a_place_that_cannot_hold_them_is_named_before_asking(serve, tmp_path):
    server, seen = serve(lambda request, n: say("4"))
    assert Answers(server, tmp_path / "new" / "er" / "answers.jsonl").get(b"v", b"s", "q") == (4.0, "")
    assert (tmp_path / "new" / "er" / "answers.jsonl").read_text().count("\n") == 1
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "answers.jsonl", tmp_path):
        with pytest.raises(UserError, match="cannot be kept there"):
            Answers(server, path)
    assert len(seen) == 1


def test_a_missing_answer_is_not_kept_and_a_torn_line_costs_only_itself(serve, tmp_path):
    path = tmp_path / "answers.jsonl"
    server, seen = serve(lambda request, n: say("I love it") if n == 0 else say("4"), retries=0)
    assert Answers(server, path).get(b"v", b"s", "q") == (None, "not a bare number")
    Answers(server, path).get(b"v", b"s", "q")
    Answers(server, path).get(b"w", b"s", "q")
    assert len(seen) == 3
    path.write_bytes(path.read_bytes()[:-9])  # killed while the second line was written
    answers = Answers(server, path)
    assert answers.get(b"v", b"s", "q") == answers.get(b"w", b"s", "q") == (4.0, "") and len(seen) == 4
    assert len(Answers(server, path).known) == 2


def test_a_key_or_model_that_the_server_does_not_know_stops_at_once(serve, tmp_path):
    for code, hint in ((401, "JUDGE_API_KEY"), (404, "--model")):
        server, seen = serve(lambda request, n, code=code: (code, {}, json.dumps(request).encode()))
        with pytest.raises(UserError, match=hint) as error:
            Answers(server, tmp_path / "a").get(b"v", b"s", "q")
        assert KEY not in str(error.value) and "data:" not in str(error.value)


def test_a_dead_server_is_given_up_after_a_few_questions(serve, tmp_path):
    server, seen = serve(lambda request, n: (503, {}, b""), retries=0)
    answers = Answers(server, tmp_path / "a")
    for i in range(3 * GIVE_UP):
        answers.get(b"v", b"s", str(i))
    assert len(seen) == GIVE_UP
    with pytest.raises(UserError, match="start again"):
        answers.check()


# ----------------------------------------------------------------------------------------------- the statistics


def test_sign_flip_p_equals_a_brute_force_over_all_sign_patterns():
    rng = np.random.default_rng(0)
    for n in range(1, 9):
        d = rng.integers(-3, 4, n) / 2
        means = [np.mean(d * signs) for signs in product((-1, 1), repeat=n)]
        assert judge.sign_flip_p(d) == np.mean(np.array(means) >= d.mean() - 1e-9)
        assert judge.sign_flip_p(d, two_sided=True) == np.mean(np.abs(means) >= abs(d.mean()) - 1e-9)


def test_sign_flip_p_of_many_pairs_is_uniform_under_the_null_and_small_under_an_effect():
    rng = np.random.default_rng(1)
    p = [judge.sign_flip_p(rng.normal(size=20), draws=400) for _ in range(200)]
    assert 0.4 < np.mean(p) < 0.6 and 0.01 <= np.mean(np.array(p) <= 0.05) <= 0.1
    assert judge.sign_flip_p(rng.normal(1, 1, 30)) < 0.001
    assert judge.sign_flip_p(np.zeros(30)) == 1.0 and judge.sign_flip_p([]) == 1.0


def test_holm_multiplies_the_smallest_p_most_and_never_reverses_the_order():
    assert judge.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert judge.holm([0.5, 0.9]) == [1.0, 1.0] and judge.holm([]) == []


def pairs(swapped, silent, shifted, still=3, n=10, noise=0.0):
    rng = np.random.default_rng(2)
    drops = {"swapped": swapped, "silent": silent, "shifted": shifted, "still": still}
    return {k: [(8.0, 8.0 - drop + noise * rng.normal()) for _ in range(n)] for k, drop in drops.items()}


def test_a_judge_who_hears_is_said_to_hear_and_a_deaf_one_deaf():
    assert judge.verdict(pairs(2, 4, 1))["hears"] is True
    assert judge.verdict(pairs(0, 4, 1))["hears"] is True
    assert judge.verdict(pairs(2, 4, 1, noise=0.5))["hears"] is True
    for deaf in (pairs(0, 0, 0), pairs(0, 0, 0, noise=1), pairs(-2, -1, -1)):
        found = judge.verdict(deaf)
        assert found["hears"] is False and "DEAF" in found["verdict"]


def test_a_judge_who_only_notices_silence_does_not_count_as_hearing():
    found = judge.verdict(pairs(0, 5, 0))
    assert found["hears"] is False and "not whether it fits" in found["verdict"]


def test_too_few_pairs_give_no_verdict():
    assert judge.verdict(pairs(9, 9, 9, n=5))["hears"] is None
    assert judge.verdict(pairs(9, 9, 9, n=6))["hears"] is True
    assert judge.verdict({})["hears"] is None


def test_a_judge_blind_to_movement_is_named():
    assert "does not see movement" in judge.verdict(pairs(2, 2, 2, still=0))["verdict"]
    assert "movement" not in judge.verdict(pairs(2, 2, 2, still=2))["verdict"]


# -------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight videos of different tracks with a sound each, and grid.json that expects nine."""
    folder = tmp_path_factory.mktemp("judged") / "ours"
    folder.mkdir()
    tracks = ["mBR0", "mPO1", "mLO2", "mMH3", "mLH4", "mHO5", "mWA0", "mKR2", "mJS3"]
    videos = [{"name": f"{t}_p00", "track": t, "prompt": f"a {t} dancer"} for t in tracks]
    (folder / "grid.json").write_text(json.dumps({"settings": {}, "videos": videos}))
    for seed, video in enumerate(videos[:8]):
        write_video(folder / f"{video['name']}.mp4", seed=seed)
    return folder


def command(monkeypatch, server, folder, *flags):
    url = server.url.removesuffix("/chat/completions")
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    monkeypatch.setattr(sys, "argv", ["judge", "--videos", str(folder), "--url", url, "--backoff", "0", *flags])
    judge.main()


def pitch(wave) -> int:
    """Where the spectrum of half a second peaks; 0 for silence."""
    spectrum = np.abs(np.fft.rfft(wave[:8000]))
    return int(spectrum.argmax()) if spectrum.max() > 1 else 0


def test_a_judge_who_hears_passes_with_all_scores_and_nothing_secret_left_behind(serve, folder, monkeypatch, capfd):
    there = [clip for clip in find_clips(folder) if clip.path.exists()]
    right = {judge.soundless(clip.path): pitch(media.read_audio(clip.path, 16000)) for clip in there}

    def reply(request, n):  # hears whether the tone is the one that belongs to these pictures, and sees a still one
        with av.open(io.BytesIO(video_of(request))) as video:
            assert not video.streams.audio
        if video_of(request) not in right:
            return say("2")
        return say("9" if pitch(sound_of(request)) == right[video_of(request)] else "4")

    server, seen = serve(reply)
    command(monkeypatch, server, folder)
    result = json.loads((folder / "judge.json").read_text())
    assert result["hears"] is True and "hears" in result["verdict"]
    assert set(result["scores"]["mBR0_p00"]) == set(QUESTIONS)
    assert (result["expected"], list(result["gaps"])) == (9, ["mJS3_p00"])
    assert (result["asked"], result["missing"]) == (88, 0)
    assert len(seen) == 8 * (11 + 3 * 2 + 2)
    assert all(request["temperature"] == 0 for request, _, _ in seen)
    assert any("'a mBR0 dancer'" in question_of(request) for request, _, _ in seen)
    out, err = capfd.readouterr()
    kept = "".join(path.read_text() for path in folder.glob("*.json*"))
    for text in (out, err, kept):
        assert KEY not in text and "base64" not in text and not re.search(r"[A-Za-z0-9+/]{100}", text)

    command(monkeypatch, server, folder)  # again: everything is known
    assert len(seen) == 8 * (11 + 3 * 2 + 2)
    assert json.loads((folder / "judge.json").read_text()) == result


def test_a_deaf_judge_is_called_deaf(serve, folder, monkeypatch, tmp_path, capsys):
    server, _ = serve(lambda request, n: say(str(len(video_of(request)) % 7 + 3)))  # looks at the picture only
    command(monkeypatch, server, folder, "--out", str(tmp_path / "judge.json"), "--model", "deaf")
    result = json.loads((tmp_path / "judge.json").read_text())
    assert result["hears"] is False and "DEAF" in result["verdict"] and "DEAF" in capsys.readouterr().out
    assert all(result["tests"][name]["difference"] == 0 for name in judge.SOUNDS)


def test_answers_with_prose_are_counted_as_missing_and_never_scored(serve, folder, monkeypatch, tmp_path):
    def reply(request, n):
        return say("Sure! I would say 7." if "imaging quality" in question_of(request) else "5")

    server, _ = serve(reply)
    command(monkeypatch, server, folder, "--out", str(tmp_path / "judge.json"), "--retries", "1", "--controls", "0")
    result = json.loads((tmp_path / "judge.json").read_text())
    assert result["missing"] == 8 and result["missing_rate"] == pytest.approx(1 / 11)
    assert result["reasons"] == {"not a bare number": 8} and result["hears"] is None
    assert all(answers["imaging_quality"] is None for answers in result["scores"].values())


def test_a_run_that_broke_off_goes_on_where_it_stopped(serve, folder, monkeypatch, tmp_path):
    limit = [30]
    server, seen = serve(lambda request, n: say("5") if n < limit[0] else (503, {}, b""), retries=0)
    flags = ["--out", str(tmp_path / "judge.json"), "--retries", "0", "--jobs", "1", "--controls", "0"]
    with pytest.raises(UserError, match=r"got no answer \(HTTP 503\)"):
        command(monkeypatch, server, folder, *flags)
    assert not (tmp_path / "judge.json").exists() and len(seen) == 30 + GIVE_UP
    limit[0] = 10**6
    command(monkeypatch, server, folder, *flags)
    assert len(seen) == 88 + GIVE_UP


def test_a_broken_and_a_silent_video_are_gaps_with_a_reason(serve, monkeypatch, tmp_path):
    write_video(tmp_path / "a.mp4")
    write_video(tmp_path / "b.mp4", sound=False)
    (tmp_path / "c.mp4").write_bytes(b"not a video")
    server, seen = serve(lambda request, n: say("5"))
    command(monkeypatch, server, tmp_path, "--controls", "0")
    result = json.loads((tmp_path / "judge.json").read_text())
    assert list(result["scores"]) == ["a"] and set(result["scores"]["a"]) == {*DANCE, *VIDEO}  # no prompt is known
    assert "no sound" in result["gaps"]["b"] and "cannot be read" in result["gaps"]["c"]


# -------------------------------------------------------------------------------------------------- what is sent


def test_the_video_goes_without_its_sound_and_with_the_same_pictures(folder):
    path = folder / "mBR0_p00.mp4"
    data = judge.soundless(path)
    with av.open(io.BytesIO(data)) as sent, av.open(str(path)) as source:
        assert not sent.streams.audio and source.streams.audio
        ours, theirs = ([f.to_ndarray(format="rgb24") for f in c.decode(video=0)] for c in (sent, source))
    assert len(ours) == 30 and all((a == b).all() for a, b in zip(ours, theirs))
    assert data == judge.soundless(path)


def test_the_controls_change_exactly_what_they_are_named_for(folder):
    clips = [clip for clip in find_clips(folder) if clip.path.exists()]
    own = media.read_audio(clips[0].path, 16000)
    given = judge.control_media(clips[0], clips, lambda clip: media.read_audio(clip.path, 16000))
    picture, right = judge.soundless(clips[0].path), judge.wav(own)
    assert set(given) == {"swapped", "silent", "shifted", "still"}
    assert all(given[name][0] == picture and given[name][1] != right for name in judge.SOUNDS)
    assert given["still"][1] == right and given["still"][0] != picture
    assert not any(given["silent"][1][44:]) and len(given["silent"][1]) == len(given["swapped"][1]) == len(right)
    with av.open(io.BytesIO(given["still"][0])) as still:
        frames = [f.to_ndarray(format="rgb24").astype(int) for f in still.decode(video=0)]
    assert len(frames) == 30 and all(np.abs(f - frames[0]).mean() < 3 for f in frames)


def test_the_swapped_sound_is_never_of_the_same_track(folder):
    clips = [clip._replace(name=name) for clip, name in zip(find_clips(folder), ("mBR0_p00", "mBR0_p01", "mBR0_p02"))]
    waves = {clip.name: np.zeros(160) for clip in clips}
    assert "swapped" not in judge.control_media(clips[0], clips, lambda clip: waves[clip.name])
    other = clips[2]._replace(name="mPO1_p00")
    heard = []
    judge.control_media(clips[0], [*clips[:2], other], lambda clip: heard.append(clip.name) or np.zeros(160))
    assert heard == ["mBR0_p00", "mPO1_p00"]


def test_the_shift_is_half_a_beat_around_the_end():
    clicks = np.zeros(64000, np.float32)
    clicks[np.arange(0, 64000, 8000)] = 1  # 120 beats a minute
    shifted = judge.half_a_beat_later(clicks, 120)
    lag = np.flatnonzero(shifted)[0]
    assert sorted(shifted) == sorted(clicks) and lag == pytest.approx(4000, abs=200)
    silence = np.arange(16000) * 0.0
    assert (judge.half_a_beat_later(silence, None) == 0).all()
    assert beats.music_beats(clicks, 16000, 120)[0] == pytest.approx(120, rel=0.05)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("flags, words", [
    (["--url", "nonsense"], "server's address"),
    ([], "server's address"),
    (["--url", "http://h", "--metrics", "fid"], "llm or vbench"),
    (["--url", "http://h", "--timeout", "0"], "timeout > 0"),
    (["--url", "http://127.0.0.1:9", "--videos", "nowhere"], "no such folder"),
    (["--url", "http://127.0.0.1:9", "--out", "."], "expected a file name"),
])  # fmt: skip
def test_mistakes_at_the_keyboard_are_named(flags, words, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["judge", "--videos", str(tmp_path), *flags])
    with pytest.raises(UserError, match=words):
        judge.main()


@pytest.mark.parametrize("text", ["[]", "{", '{"videos": [{"name": "a"}]}', '{"videos": 3}'])
def test_a_broken_grid_file_is_named(tmp_path, text):
    (tmp_path / "grid.json").write_text(text)
    with pytest.raises(UserError, match="grid.json"):
        find_clips(tmp_path)


def test_a_name_in_the_grid_cannot_leave_the_folder(tmp_path):
    write_video(tmp_path / "a.mp4")
    (tmp_path / "grid.json").write_text(json.dumps({"videos": [{"name": "../../x/a", "prompt": "p"}]}))
    assert find_clips(tmp_path)[0].path == tmp_path / "a.mp4"


def test_nobody_at_the_address_is_no_connection(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        server = Server(endpoint(f"http://127.0.0.1:{unused.getsockname()[1]}"), "m", 1, 0.0, 5.0)
        assert ask(server, b"{}") == (None, "no connection")
