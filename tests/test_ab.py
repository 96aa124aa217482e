"""The human study: the page in a real browser from the first pair to the saved file, and the tally of such files."""

import base64
import io
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import av
import numpy as np
import pytest
from tiny import write_video

import ab
import evaluate
from config import UserError

NAMES = ["mBR0_p00", "mBR0_p01", "mPO1_p00", "mLO2_p00"]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
in_browser = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver on the PATH")


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "ab", *map(str, argv)])
    evaluate.main()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two configurations with four videos of the same names; the pictures tell which is which."""
    root = tmp_path_factory.mktemp("ab")
    for number, folder in enumerate(("secret_ours", "secret_mochi")):
        for k, name in enumerate(NAMES):
            write_video(root / folder / f"{name}.mp4", dur_s=0.6, size=64, seed=10 * number + k)
    write_video(root / "secret_ours" / "mJB5_p00.mp4", dur_s=0.6)  # without a partner
    return root


@pytest.fixture(scope="module")
def study(folders):
    """(page, key) of all four pairs."""
    page, key = ab.build(ab.AbConfig(a=folders / "secret_ours", b=folders / "secret_mochi", pairs=9))
    (folders / "study.html").write_text(page)
    (folders / "study.key.json").write_text(json.dumps(key))
    return page, key


def data_of(page):
    return json.loads(re.search(r'<script id="study" type="application/json">(.*?)</script>', page, re.S)[1])


def first_frame(uri):
    """The first picture of a data URI, and what the file says of itself; it must have sound."""
    with av.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as container:
        assert container.streams.audio
        return next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int), dict(container.metadata)


# -------------------------------------------------------------------------------------------------------- the page


def test_the_page_holds_every_pair_with_sound_and_asks_the_four_questions_of_appendix_c(study):
    page, key = study
    data = data_of(page)
    assert sorted(entry["name"] for entry in key["pairs"].values()) == sorted(NAMES)
    assert sorted(pair["id"] for pair in data["pairs"]) == sorted(key["pairs"])
    assert list(data["questions"].values()) == [
        "Which video has higher visual quality?",
        "Which video's dance aligns better with the music?",
        "Which video's motion is more realistic?",
        "Which video's dance is more complex?",
    ]
    for pair in data["pairs"]:
        for uri in pair["videos"]:
            first_frame(uri)


def test_the_key_says_truly_which_video_is_which(study, folders):
    page, key = study
    for pair in data_of(page)["pairs"]:
        entry = key["pairs"][pair["id"]]
        for uri, side in zip(pair["videos"], entry["videos"]):
            folder = folders / ("secret_ours" if side == "a" else "secret_mochi")
            original, _ = first_frame("," + base64.b64encode((folder / f"{entry['name']}.mp4").read_bytes()).decode())
            assert np.abs(first_frame(uri)[0] - original).mean() < 6


def test_the_page_names_no_configuration_track_or_prompt_and_loads_nothing(study):
    page, key = study
    text = re.sub(r"data:video/mp4;base64,[A-Za-z0-9+/=]+", "", page)
    for word in ("secret", "ours", "mochi", *NAMES, "mBR0"):
        assert not re.search(rf"(?<![a-z]){word}(?![a-z])", text), word
    assert not re.search(r"https?://", text) and "default-src 'none'" in text
    metadata = {json.dumps(first_frame(uri)[1]) for pair in data_of(page)["pairs"] for uri in pair["videos"]}
    assert len(metadata) == 1  # nothing in the files' own headers either


def test_sides_and_order_are_random_whatever_the_seed(monkeypatch, folders):
    monkeypatch.setattr(ab, "anonymous", lambda path: path.parent.name)
    cfg = ab.AbConfig(a=folders / "secret_ours", b=folders / "secret_mochi", pairs=4)
    built = [(data_of(page), key) for page, key in (ab.build(cfg) for _ in range(60))]
    left = [pair["videos"][0] for data, _ in built for pair in data["pairs"]]
    assert 80 < left.count("secret_ours") < 160
    orders = {tuple(key["pairs"][pair["id"]]["name"] for pair in data["pairs"]) for data, key in built}
    assert len(orders) > 10
    assert len({pair["id"] for data, _ in built for pair in data["pairs"]}) == 240


def test_pairs_are_spread_over_the_tracks():
    names = [f"{track}_p{k:02d}" for track in ("mBR0", "mPO1", "mLO2") for k in range(10)]
    chosen = ab.choose(names, 7, seed=1)
    counts = sorted(sum(name.startswith(track) for name in chosen) for track in ("mBR0", "mPO1", "mLO2"))
    assert counts == [2, 2, 3] and len(set(chosen)) == 7
    assert chosen == ab.choose(names[::-1], 7, seed=1) != ab.choose(names, 7, seed=2)


def test_mistakes_at_the_keyboard_are_named(monkeypatch, folders, tmp_path):
    write_video(tmp_path / "other" / "x.mp4")
    here = ["--a", folders / "secret_ours"]
    for argv, words in (
        ([*here, "--b", tmp_path / "other"], "no video of the same name"),
        ([*here, "--b", tmp_path / "nowhere"], "no such folder"),
        ([*here, "--b", tmp_path, "--pairs", "0"], "at least 1"),
        ([*here, "--b", tmp_path, "--out", "x.pdf"], "ends in .html"),
    ):
        with pytest.raises(UserError, match=words):
            run(monkeypatch, *argv)


# ------------------------------------------------------------------------------------------------------ the browser


class Page:
    """A browser window driven over the WebDriver protocol."""

    def __init__(self, folder: Path, width: int, height: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.base = f"http://127.0.0.1:{port}"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--mute-audio", "--disable-dev-shm-usage",
                 f"--user-data-dir={folder / 'profile'}"]  # fmt: skip
        options = {"binary": BROWSER, "args": flags, "prefs": {"download.default_directory": str(folder)}}
        for attempt in itertools.count():
            try:
                session = self.call(
                    "POST", "/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
                )
                break
            except urllib.error.URLError:
                if attempt > 100:
                    raise
                time.sleep(0.1)
        self.base += f"/session/{session['sessionId']}"
        emulated = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.cdp("Emulation.setDeviceMetricsOverride", emulated)
        self.cdp("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=120) as response:
            return json.loads(response.read())["value"]

    def cdp(self, command, params):
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def js(self, code):
        return self.call("POST", "/execute/sync", {"script": f"return {code}", "args": []})

    def open(self, path):
        self.call("POST", "/url", {"url": Path(path).as_uri()})

    def press(self, *keys):
        codes = {
            "left": "\ue012",
            "right": "\ue014",
            "up": "\ue013",
            "down": "\ue015",
            "enter": "\ue007",
            "tab": "\ue004",
        }
        actions = [{"type": kind, "value": codes.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def click(self, element):
        found = self.call("POST", "/element", {"using": "css selector", "value": element})
        self.call("POST", f"/element/{next(iter(found.values()))}/click", {})

    def until(self, condition):
        for _ in range(600):
            if self.js(condition):
                return
            time.sleep(0.05)
        raise AssertionError(f"never came true: {condition}\n{self.js('document.body.innerText')}")

    def picture(self, path):
        Path(path).write_bytes(base64.b64decode(self.call("GET", "/screenshot")))

    def close(self):
        try:
            self.call("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait(20)


@pytest.fixture(params=[(1280, 800), (390, 844)], ids=["desktop", "phone"])
def page(request, tmp_path, monkeypatch):
    page = Page(tmp_path, *request.param)
    yield page
    page.close()


def fits(page):
    """Nothing sticks out at the side, and buttons are large enough for a finger."""
    assert page.js("document.documentElement.scrollWidth") <= page.js("innerWidth")
    small = "[...document.querySelectorAll('button, label')].filter(e => e.offsetHeight && e.offsetHeight < 44).length"
    assert page.js(small) == 0


def watch(page):
    """Play both videos with the keyboard until their end."""
    page.until("$('video0').readyState >= 3 && $('video1').readyState >= 3")
    for side, key in enumerate("ab"):
        page.press(key)
        page.until(f"$('video{side}').ended")


@in_browser
def test_a_whole_study_by_keyboard_from_the_first_pair_to_the_saved_file(page, study, folders, tmp_path, monkeypatch):
    shots = os.environ.get("SCREENSHOTS")
    page.open(folders / "study.html")
    fits(page)
    assert page.js("$('start').innerText.includes('4 pairs')")
    page.click("#begin")
    for place in range(4):
        page.until(f"$('where').textContent === 'Pair {place + 1} of 4' && $('video0').readyState >= 3")
        fits(page)
        page.press("left")  # before the videos were seen, nothing can be answered
        assert page.js("Object.keys(state.answers).length") == place and page.js("$('next').disabled")
        watch(page)
        page.until("$('hint').textContent === ''")
        page.press("left", "right", "left")
        page.press("enter")  # one question is open: it does not go on
        assert page.js("state.at") == place
        if shots and place == 1:
            page.picture(Path(shots) / f"pair_{page.js('innerWidth')}.png")
        page.press("up", "right", "down", "right")  # the third answer is changed to B, the fourth given
        page.until("!$('next').disabled")
        assert (
            page.js("[...document.querySelectorAll('input:checked')].map(i => i.parentElement.innerText).join('')")
            == "ABBB"
        )
        page.press("enter")
    page.until("!$('end').hidden")
    fits(page)
    if shots:
        page.picture(Path(shots) / f"end_{page.js('innerWidth')}.png")
    page.click("#save")
    for _ in range(200):
        if saved := list(tmp_path.glob("answers-*.json")):
            break
        time.sleep(0.05)
    text = saved[0].read_text()
    assert json.loads(text)["answers"] == json.loads(page.js("$('text').value"))["answers"]
    votes = json.loads(text)["answers"]
    assert len(votes) == 16 and [v["shown_as"] for v in votes] == list("ABBB") * 4
    left, order = page.js("state.left"), page.js("state.order")
    assert [v["pair"] for v in votes] == [pair for pair in order for _ in range(4)]
    for vote in votes:
        assert vote["choice"] == left[vote["pair"]] ^ (vote["shown_as"] == "B")
    _, counted = ab.read_votes(saved[0], study[1])
    assert len(counted) == 16


@in_browser
def test_a_closed_page_goes_on_where_it_was_left_and_a_new_person_starts_anew(page, folders, study):
    page.open(folders / "study.html")
    page.click("#begin")
    watch(page)
    for question, side in zip(ab.ASKED, (1, 2, 2, 1)):  # by finger
        page.click(f"#q-{question} label:nth-of-type({side})")
    page.click("#next")
    page.until("$('where').textContent === 'Pair 2 of 4'")
    before = page.js("JSON.stringify(state)")
    page.open("/dev/null")
    page.open(folders / "study.html")
    page.until("$('where').textContent === 'Pair 2 of 4'")
    assert page.js("JSON.stringify(state)") == before
    page.click("#back")
    page.until("$('where').textContent === 'Pair 1 of 4' && $('video0').readyState >= 3")
    assert (
        page.js("[...document.querySelectorAll('input:checked')].map(i => i.parentElement.innerText).join('')")
        == "ABBA"
    )
    person = page.js("state.participant")
    page.js("(window.confirm = () => true, $('anew').click())")
    page.until("!$('start').hidden")
    assert page.js("state.participant") != person and page.js("Object.keys(state.answers).length") == 0


@in_browser
def test_what_is_shown_as_a_is_the_video_that_the_answer_names(page, folders, study):
    page.open(folders / "study.html")
    page.click("#begin")
    page.until("$('video0').readyState >= 3 && $('video1').readyState >= 3")
    shown = """(() => [0, 1].map(side => { const c = document.createElement('canvas'); c.width = c.height = 64;
        const g = c.getContext('2d'); g.drawImage($('video' + side), 0, 0, 64, 64);
        return [...g.getImageData(0, 0, 64, 64).data]; }))()"""
    pixels = [np.array(p).reshape(64, 64, 4)[:, :, :3] for p in page.js(shown)]
    videos = next(pair["videos"] for pair in data_of(study[0])["pairs"] if pair["id"] == page.js("id()"))
    frames = [first_frame(uri)[0] for uri in videos]
    first = page.js("state.left[id()]")  # the answer "A" names this one of the two
    assert np.abs(pixels[0] - frames[first]).mean() < 12 < np.abs(pixels[0] - frames[1 - first]).mean()
    assert np.abs(pixels[1] - frames[1 - first]).mean() < 12


@in_browser
def test_only_one_video_plays_at_a_time_and_the_same_key_stops_it(page, folders, study):
    page.open(folders / "study.html")
    page.click("#begin")
    page.until("$('video0').readyState >= 3 && $('video1').readyState >= 3")
    page.js("['video0', 'video1'].forEach(v => $(v).loop = true)")
    page.press("a")
    page.until("!$('video0').paused && $('play0').textContent === 'Stop A'")
    page.press("b")
    page.until("$('video0').paused && !$('video1').paused")
    page.press("b")
    page.until("$('video0').paused && $('video1').paused && $('play1').textContent === 'Play B'")
    assert not page.js("$('video1').muted")


@in_browser
def test_every_person_sees_another_order_and_other_sides(page, folders, study):
    page.open(folders / "study.html")
    drawn = page.js("Array.from({length: 200}, fresh).map(s => [s.order.join(), Object.values(s.left)])")
    assert len({order for order, _ in drawn}) > 20
    assert 300 < sum(sum(left) for _, left in drawn) < 500
    assert len({tuple(left) for _, left in drawn}) == 16


# -------------------------------------------------------------------------------------------------------- the tally


def participant(path, key, person, prefer_b, questions=tuple(ab.ASKED), pairs=None):
    """Write the file of someone who prefers b where prefer_b(pair number, question) says so."""
    answers = []
    for i, (pair, entry) in enumerate(key["pairs"].items()):
        if pairs is None or i in pairs:
            for q in questions:
                answers.append({"pair": pair, "question": q, "choice": entry["videos"].index("ab"[prefer_b(i, q)])})
    path.write_text(json.dumps({"study": key["study"], "participant": person, "answers": answers}))
    return path


KEY = {
    "study": "5e",
    "a": "mochi",
    "b": "ours",
    "pairs": {f"p{i}": {"name": "", "videos": ["ab", "ba"][i % 2]} for i in range(6)},
}


@pytest.fixture
def key(tmp_path):
    (tmp_path / "study.key.json").write_text(json.dumps(KEY))
    return tmp_path / "study.key.json"


def test_tally_counts_who_prefers_b_whatever_side_it_was_on(monkeypatch, tmp_path, key, capsys):
    files = [
        participant(
            tmp_path / f"{n}.json", KEY, f"{n}", lambda i, q, n=n: int(q == "realism" or (q == "complexity" and n < 2))
        )
        for n in range(4)
    ]
    run(monkeypatch, "--tally", *files, "--key", key, "--json", tmp_path / "tally.json")
    found = json.loads((tmp_path / "tally.json").read_text())
    assert found["people"] == 4 and (found["a"], found["b"]) == ("mochi", "ours")
    rates = {q: found["prefer_b"][q]["rate"] for q in ab.ASKED}
    assert rates == {"visual_quality": 0, "music_alignment": 0, "realism": 1, "complexity": 0.5}
    assert all(found["prefer_b"][q]["votes"] == 24 for q in ab.ASKED)
    assert found["prefer_b"]["complexity"]["fleiss_kappa"] == pytest.approx(-1 / 3)  # two against two on every pair
    out = capsys.readouterr().out
    assert "prefer ours to mochi" in out and "91.5 %" in out and "kappa -0.33" in out


def test_a_file_given_twice_counts_once_and_a_changed_one_is_refused(monkeypatch, tmp_path, key, capsys):
    one = participant(tmp_path / "1.json", KEY, "aa", lambda i, q: 1)
    shutil.copy(one, tmp_path / "2.json")
    run(monkeypatch, "--tally", one, tmp_path / "2.json", "--key", key)
    assert "1 people" in capsys.readouterr().out
    participant(tmp_path / "2.json", KEY, "aa", lambda i, q: 0)
    with pytest.raises(UserError, match="second, different file"):
        run(monkeypatch, "--tally", one, tmp_path / "2.json", "--key", key)


def test_unfinished_files_count_for_what_they_hold(monkeypatch, tmp_path, key):
    files = [
        participant(tmp_path / "1.json", KEY, "a1", lambda i, q: 1, pairs=(0, 1)),
        participant(tmp_path / "2.json", KEY, "a2", lambda i, q: 0, questions=("realism",)),
    ]
    run(monkeypatch, "--tally", *files, "--key", key, "--json", tmp_path / "t.json")
    found = json.loads((tmp_path / "t.json").read_text())["prefer_b"]
    assert found["realism"]["votes"] == 8 and found["realism"]["rate"] == 0.25
    assert found["complexity"]["votes"] == 2 and found["complexity"]["fleiss_kappa"] is None


@pytest.mark.parametrize("change, words", [
    ({"study": "77"}, "belongs to study"),
    ({"answers": [{"pair": "nope", "question": "realism", "choice": 0}]}, "not the answers"),
    ({"answers": [{"pair": "p0", "question": "taste", "choice": 0}]}, "not the answers"),
    ({"answers": [{"pair": "p0", "question": "realism", "choice": 2}]}, "not the answers"),
    ({"answers": [{"pair": "p0", "question": "realism"}]}, "not the answers"),
    ({"answers": 3}, "not the answers"),
    ({"participant": "../x"}, "no participant's number"),
])  # fmt: skip
def test_a_file_that_does_not_belong_is_named(monkeypatch, tmp_path, key, change, words):
    good = json.loads(participant(tmp_path / "1.json", KEY, "aa", lambda i, q: 1).read_text())
    (tmp_path / "1.json").write_text(json.dumps(good | change))
    with pytest.raises(UserError, match=words):
        run(monkeypatch, "--tally", tmp_path / "1.json", "--key", key)


def test_a_missing_or_broken_key_is_named(monkeypatch, tmp_path):
    run_it = ["--tally", tmp_path / "1.json", "--key", tmp_path / "k.json"]
    with pytest.raises(UserError, match="no such key"):
        run(monkeypatch, *run_it)
    for text in ("{", "{}", '{"study": "a", "a": "x", "b": "y", "pairs": {"p": {"videos": ["a", "a"]}}}'):
        (tmp_path / "k.json").write_text(text)
        with pytest.raises(UserError, match="not the key"):
            run(monkeypatch, *run_it)


def test_fleiss_kappa_of_the_textbook_table_is_0_21():
    table = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1], [7, 7, 0, 0, 0],
             [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]  # fmt: skip
    assert ab.fleiss_kappa(table) == pytest.approx(0.210, abs=0.0005)


def test_fleiss_kappa_is_one_for_agreement_and_about_zero_for_coins():
    assert ab.fleiss_kappa([[9, 0], [0, 9], [9, 0]]) == pytest.approx(1)
    heads = np.random.default_rng(0).binomial(20, 0.5, 2000)
    assert abs(ab.fleiss_kappa(np.stack([heads, 20 - heads], axis=1))) < 0.01
    assert np.isnan(ab.fleiss_kappa([[9, 0], [9, 0]])) and np.isnan(ab.fleiss_kappa([[1, 0], [0, 1]]))


def test_wilsons_interval_is_the_textbook_one_and_leaves_room_when_all_agree():
    assert ab.wilson(15, 20) == pytest.approx((0.5313, 0.8881), abs=1e-4)
    low, high = ab.wilson(10, 10)
    assert low == pytest.approx(0.7225, abs=1e-4) and high == pytest.approx(1)


def test_votes_that_hang_together_widen_the_interval():
    rng = np.random.default_rng(1)
    independent = (rng.random((12, 10)) < 0.6).astype(float)
    by_person = np.repeat((np.arange(12) < 7).astype(float)[:, None], 10, axis=1)  # everyone always votes alike
    width = [np.ptp(ab.preference(votes)["interval"]) for votes in (independent, by_person)]
    assert width[1] > 1.5 * width[0]
    low, high = ab.preference(by_person)["interval"]
    assert low < 7 / 12 < high and high - low == pytest.approx(2 * 1.96 * np.sqrt(7 * 5 / 12**3), rel=0.2)
    assert ab.preference(np.full((2, 2), np.nan)) == {"votes": 0}
