"""Encoding of good and broken files; what is in the cache; several processes at once, one of them killed."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import AUDIO_DIM, FRAMES, SIZE, make_tiny_weights, write_video

import audio
import data_encode
import media
import mochi_vae
import t5
import tensors
from config import UserError
from data_clips import DataConfig
from data_encode import claim, encode, hash_of
from data_names import AIST_BASE, WILD_BASE, parse_aist

AIST = "gBR_sBM_c01_d04_mBR1_ch01"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_tiny_weights(tmp_path_factory.mktemp("weights"))


def config(data, weights, **changes):
    return DataConfig(data=data, weights=weights, frames=FRAMES, device="cpu", dtype="float32", **changes)


def test_encoding_holds_what_the_networks_say(tmp_path, weights):
    path = write_video(tmp_path / f"{AIST}.mp4")
    (clip,) = encode(config(tmp_path, weights)).clips
    stored = load_file(clip.file)
    frames = torch.from_numpy(media.read_video(path, 30, clip.start / 30, FRAMES)).permute(3, 0, 1, 2) / 127.5 - 1
    mean, logvar = mochi_vae.load_encoder(weights / "encoder.safetensors")(frames[None])
    sound = torch.from_numpy(media.read_audio(path, 16000, clip.start / 30, FRAMES / 30 + 0.09))
    music = audio.load_wav2vec2(weights / "wav2vec2")(audio.prepare(sound, FRAMES))
    torch.testing.assert_close(stored["mean"].float(), mean[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stored["logvar"].float(), logvar[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stored["audio"], music[0])
    assert stored["mean"].shape == (12, 2, SIZE // 8, SIZE // 8) and stored["audio"].shape[1] == AUDIO_DIM


def test_prompts_hold_what_t5_says_without_padding(tmp_path, weights):
    write_video(tmp_path / f"{AIST}.mp4")
    encoded = encode(config(tmp_path, weights))
    stored = load_file(encoded.prompts)
    tokenizer, model = t5.Tokenizer(weights / "t5" / "spiece.model"), t5.load_t5(weights / "t5")
    assert set(stored) == {hash_of(p) for p in (*parse_aist(AIST).prompts(), AIST_BASE)}
    ids, mask = tokenizer([AIST_BASE])
    torch.testing.assert_close(stored[hash_of(AIST_BASE)], model(ids, mask)[0, mask[0]])


def test_broken_files_are_reported_and_stop_nothing(tmp_path, weights, capsys):
    data = tmp_path / "data"
    data.mkdir()
    good = write_video(data / f"{AIST}.mp4", dur_s=2.0)
    shutil.copy(good, data / 'it\'s "quoted" & spaced;$(rm) é中.mp4')
    (data / "cut.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (data / "beheaded.mp4").write_bytes(good.read_bytes()[:200])
    (data / "empty.mp4").write_bytes(b"")
    (data / "text.mp4").write_text("this is not a video\n" * 50)
    write_video(data / "silent.mp4", sound=False)
    write_video(data / "short.mp4", dur_s=5 / 30)
    write_video(data / "small.mp4", size=6)
    upright, silence = np.zeros((30, 3 * SIZE, SIZE, 3), np.uint8), np.zeros(16000, np.float32)
    media.write_mp4(data / "upright.mp4", upright, 30, silence, 16000)
    (data / "loop.mp4").symlink_to(data / "loop.mp4")
    (data / "round").symlink_to(data)
    (data / "dangling.mp4").symlink_to(data / "nowhere.mp4")
    (data / "sSH_c01_v0.mp4").symlink_to(good)
    (data / "old mBR0 take.mp4").symlink_to(good)
    (data / "gBR_sBM_c02_d04_mBR1_ch01.mp4").symlink_to(good)
    os.symlink(good, os.fsencode(data) + b"/not utf-8 \xff.mp4")
    (data / "notes.md").write_text("not a video, and not called one")
    encoded = encode(config(data, weights))
    reasons = {path.name: why for path, why in encoded.skipped}
    for name, why in {
        "beheaded.mp4": "", "empty.mp4": "empty", "text.mp4": "cannot be read", "silent.mp4": "no sound",
        "short.mp4": "too short", "small.mp4": "too small", "upright.mp4": "wrong shape",
        "loop.mp4": "", "dangling.mp4": "no such file", "round": "read already",
        "sSH_c01_v0.mp4": "no track", "old mBR0 take.mp4": "test track mBR0",
        "gBR_sBM_c02_d04_mBR1_ch01.mp4": "camera c02",
    }.items():  # fmt: skip
        assert why in reasons.pop(name), name
    used = {clip.source.path.name for clip in encoded.clips}
    assert {good.name, 'it\'s "quoted" & spaced;$(rm) é中.mp4'} <= used
    assert used | set(reasons) == {
        good.name,
        'it\'s "quoted" & spaced;$(rm) é中.mp4',
        "cut.mp4",
        "not utf-8 \udcff.mp4",
    }
    told = capsys.readouterr().out
    assert "1 x camera c02" in told and "no sound" in told
    listed = (data / ".encoded" / "skipped.txt").read_text()
    assert all(path.name.encode(errors="replace").decode() in listed for path, _ in encoded.skipped)


def test_a_folder_without_a_usable_video_is_refused(tmp_path, weights):
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="no usable video"):
        encode(config(tmp_path, weights))
    with pytest.raises(UserError, match="not a folder"):
        encode(config(tmp_path / "nowhere", weights))


def test_wild_clips_take_the_text_beside_them_and_bare_ones_are_counted(tmp_path, weights, capsys):
    write_video(tmp_path / "a.mp4")
    write_video(tmp_path / "b.mp4", seed=1)
    (tmp_path / "a.txt").write_bytes(b"  someone dances \n on a beach \xff ")
    encoded = encode(config(tmp_path, weights))
    prompts = {clip.source.path.name: clip.source.prompts() for clip in encoded.clips}
    assert prompts == {"a.mp4": ("someone dances on a beach \ufffd",), "b.mp4": (WILD_BASE,)}
    assert "2 in the wild (1 without a caption)" in capsys.readouterr().out


def count_encodings(monkeypatch):
    done, real = [], data_encode.encode_clip
    monkeypatch.setattr(data_encode, "encode_clip", lambda clip, *rest: done.append(clip) or real(clip, *rest))
    return done


def test_an_encoding_is_used_again_until_source_size_or_weights_change(tmp_path, weights, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    path = write_video(data / f"{AIST}.mp4")
    done = count_encodings(monkeypatch)

    def encodings(**changes):
        done.clear()
        encode(config(data, changes.pop("weights", weights), **changes))
        return len(done)

    assert encodings() == 1 and encodings() == 0
    assert encodings(height=32, width=32) == 1 and encodings() == 0
    stat = path.stat()
    with open(path, "r+b") as handle:  # one byte of the sound or the picture, the time stamp kept
        handle.seek(-1, os.SEEK_END)
        last = handle.read(1)
        handle.seek(-1, os.SEEK_END)
        handle.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert encodings() == 1
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert encodings() == 1
    other = make_tiny_weights(tmp_path / "other", seed=1)
    assert encodings(weights=other) == 1 and encodings() == 0


def test_other_text_weights_make_other_prompt_features(tmp_path, weights):
    write_video(tmp_path / f"{AIST}.mp4")
    other = shutil.copytree(weights, tmp_path / "other")
    torch.manual_seed(7)
    vocab = t5.Tokenizer(other / "t5" / "spiece.model").vocab_size
    t5.save_t5(t5.T5(vocab=vocab, width=16, depth=1, heads=2, kv=8, ffn=16), other / "t5" / "model.safetensors")
    assert encode(config(tmp_path, weights)).prompts != encode(config(tmp_path, other)).prompts


def test_new_prompts_join_the_old_ones_in_their_file(tmp_path, weights):
    write_video(tmp_path / f"{AIST}.mp4")
    before = load_file(encode(config(tmp_path, weights)).prompts)
    write_video(tmp_path / "b.mp4", seed=1)
    after = load_file(encode(config(tmp_path, weights)).prompts)
    assert set(after) == {*before, hash_of(WILD_BASE)}
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_damaged_encoding_is_made_again(tmp_path, weights):
    write_video(tmp_path / f"{AIST}.mp4")
    (clip,) = encode(config(tmp_path, weights)).clips
    whole = clip.file.read_bytes()
    clip.file.write_bytes(whole[:-10])
    encode(config(tmp_path, weights))
    assert clip.file.read_bytes() == whole


def test_a_run_killed_while_writing_leaves_no_half_encoding_and_goes_on(tmp_path, weights, monkeypatch):
    for i in range(3):
        write_video(tmp_path / f"{i}.mp4", seed=i)
    real, calls = os.chmod, []

    def die_in_the_second(path, mode):  # all bytes are written, the name is still the temporary one
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(tensors.os, "chmod", die_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            encode(config(tmp_path, weights))
    left = list((tmp_path / ".encoded").iterdir())
    assert len(left) == 1 and data_encode.is_whole(left[0])
    done = count_encodings(monkeypatch)
    assert len(encode(config(tmp_path, weights)).clips) == 3 and len(done) == 2


def test_a_full_disk_stops_the_run_instead_of_blaming_the_videos(tmp_path, weights, monkeypatch):
    write_video(tmp_path / f"{AIST}.mp4")

    def full(path, mode):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors.os, "chmod", full)
    with pytest.raises(UserError, match="No space left"):
        encode(config(tmp_path, weights))


def test_two_processes_never_write_the_same_encoding(tmp_path):
    file = tmp_path / "a.safetensors"
    with claim(file, wait=False) as mine:
        with claim(file, wait=False) as other:
            assert (mine, other) == (True, False)
    with claim(file, wait=False) as again:
        assert again
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes, told", [({"frames": 8}, "use 7 or 13"), ({"height": 20}, "use 16"), ({"dtype": "float16"}, "bfloat16")]
)
def test_settings_that_cannot_work_are_refused(tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        DataConfig(data=tmp_path, **changes)


def test_unknown_cameras_are_refused(tmp_path, weights):
    for cameras in ("c11", "front", ""):
        with pytest.raises(UserError, match="c01,c10"):
            encode(config(tmp_path, weights, cameras=cameras))


# ------------------------------------------------------------------------------------- several processes

WORKER = """
import os, sys, time
from pathlib import Path
import data_encode
from data_clips import DataConfig

data, weights, log, pause_s = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
real = data_encode.encode_clip

def note(word, clip):
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{os.getpid()} {word} {clip.source.path.name}\\n".encode())

def encode_clip(clip, *rest):
    note("begins", clip)
    time.sleep(pause_s)
    encoding = real(clip, *rest)
    note("has", clip)
    return encoding

data_encode.encode_clip = encode_clip
frames = int(sys.argv[5])
data_encode.encode(DataConfig(data=data, weights=weights, frames=frames, device="cpu", dtype="float32"))
"""


def wait_for(log, process, word, count):
    """Until `count` lines say `word`; fails if the process ends before."""
    while sum(f" {word} " in line for line in lines(log)) < count:
        assert process.poll() is None, "ended too early"
        time.sleep(0.02)


def lines(log):
    return log.read_text().splitlines() if log.exists() else []


def test_processes_share_the_clips_and_take_over_from_one_that_is_killed(tmp_path):
    weights, data, log = make_tiny_weights(tmp_path / "weights"), tmp_path / "data", tmp_path / "log"
    (data / ".encoded").mkdir(parents=True)
    (data / ".encoded" / "a.safetensors.tmpx1").touch()  # of a process that was killed before
    names = [write_video(data / f"{i}.mp4", seed=i).name for i in range(6)]

    def start(pause_s):
        root = Path(data_encode.__file__).parent
        return subprocess.Popen(
            [sys.executable, "-c", WORKER, data, weights, log, str(pause_s), str(FRAMES)],
            cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    stuck = start(pause_s=10_000)
    others = []
    try:
        wait_for(log, stuck, "begins", 1)
        others += [start(pause_s=0.05), start(pause_s=0.05)]
        wait_for(log, others[0], "has", 5)  # all but the one that is held
        assert all(process.poll() is None for process in others)  # and for that one they wait
        stuck.send_signal(signal.SIGKILL)
        assert [process.wait() for process in others] == [0, 0]
    finally:
        for process in (stuck, *others):
            process.kill()
            process.wait()
    done = [line.split()[2] for line in lines(log) if " has " in line]
    assert sorted(done) == names  # each once, by whomever
    cache = sorted(path.suffix for path in (data / ".encoded").iterdir())
    assert cache == [".safetensors"] * 7 + [".txt"]  # six clips, the prompts, the report: no lock, nothing half-written
    assert all(load_file(path) for path in (data / ".encoded").glob("*.safetensors"))


def test_a_lock_file_that_its_holder_removed_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    file, real = tmp_path / "a.safetensors", fcntl.flock

    def removed_just_before(handle, how):
        monkeypatch.setattr(data_encode.fcntl, "flock", real)
        (tmp_path / "a.lock").unlink()
        real(handle, how)

    monkeypatch.setattr(data_encode.fcntl, "flock", removed_just_before)
    with claim(file, wait=True) as mine, claim(file, wait=False) as other:
        assert (mine, other) == (True, False)


def test_a_claim_is_given_back_when_the_work_fails(tmp_path):
    with pytest.raises(KeyError), claim(tmp_path / "a.safetensors", wait=False):
        raise KeyError
    with claim(tmp_path / "a.safetensors", wait=False) as mine:
        assert mine


def test_what_a_killed_process_was_writing_is_removed_but_not_what_a_living_one_writes(tmp_path):
    torn, alive = tmp_path / "a.safetensors.tmpx1", tmp_path / "b.safetensors.tmpx2"
    whole = tmp_path / "c.safetensors"
    for path in (torn, alive, whole):
        path.write_text("some bytes")
    with claim(tmp_path / "b.safetensors", wait=False):
        data_encode.remove_torn(tmp_path)
    assert sorted(tmp_path.iterdir()) == [alive, whole]
