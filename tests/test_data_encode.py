"""Several processes on one cache, one of them killed: real ones."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import FRAMES, make_tiny_weights, write_video

import data_encode
from data_encode import claim

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
    data.mkdir()
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
