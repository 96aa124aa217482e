"""Train with kill -9 at random moments: python tests/killed.py KILLS SEED then the flags of train.py.

One run goes through without a break, to OUT/whole; the other is killed KILLS times and resumed, in OUT/killed. Each run
is a fork of this process, so that only one pays for the imports. Prints the checkpoints that the kills left behind.
"""

import os
import random
import signal
import sys
import time
from dataclasses import replace

import torch

import train
from config import from_cli
from data_encode import encode
from train_state import checkpoints


def start(cfg) -> int:
    """A training in a process of its own: its id."""
    child = os.fork()
    if child == 0:
        train.train(cfg)
        os._exit(0)
    return child


def main() -> None:
    torch.set_num_threads(1)
    kills, draw, cfg = int(sys.argv[1]), random.Random(sys.argv[2]), from_cli(train.TrainConfig, sys.argv[3:])
    encoded = encode(cfg)
    train.encode = lambda cfg: encoded
    train.draw_curves = lambda out: None
    whole, killed = (replace(cfg, out=cfg.out / name) for name in ("whole", "killed"))
    begin = time.monotonic()
    assert os.waitpid(start(whole), 0)[1] == 0
    took = time.monotonic() - begin
    for i in range(kills):
        child = start(replace(killed, resume=bool(checkpoints(killed.out))))
        time.sleep(draw.uniform(0, 2 * took / (kills + 2)))
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            print("finished before kill", i)
            break
        left = sorted(file.name for file in killed.out.glob("*"))
        print("kill", i, *(name for name in left if name.startswith("step")))
    assert os.waitpid(start(replace(killed, resume=bool(checkpoints(killed.out)))), 0)[1] == 0
    print("killed", i + 1)


if __name__ == "__main__":
    main()
