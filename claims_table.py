"""Tables 1 and 4 in miniature: the adapters are trained in many ways, several seeds each, and each is measured.

Concept   a variant is a handful of train.py's own flags. A process trains one adapter, dances with it and writes one
          JSON file; finished ones are not trained again. Intervals are over seeds, not over clips.
Paper     arXiv 2503.14505v2, Table 1 (layers, feature addition, ablations), Table 4 (ratio of base prompts).
"""

import contextlib
import json
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import media
from check import DIT, check_networks, find_files
from claims_score import Row, dance_rows, mean, seeds_row, true_beats, values_of
from claims_studio import FRAMES, PRIOR, ClaimsConfig, Dancer, Studio, music_of, prompt_of, solo_clips
from config import UserError
from data_encode import Encoded, encode, fingerprint_weights, hash_of
from train import TrainConfig, choose_layers, train
from train_log import read_log
from train_state import checkpoints

RECIPE = {  # of all of them; TrainConfig's names
    "form": "aligned", "null_audio": "drop", "music_dropout": 0.1, "lora_rank": 16, "lr": 2e-3, "warmup": 50,
    "half_life": 100.0,
}  # fmt: skip
STRATEGIES = {  # what each variant changes of the recipe: here, the layers that hear the music (Fig. 5 b-d)
    "ours: time-aligned": {},
    "even layers": {"layers": "even"},
    "first layers": {"layers": "first"},
    "middle layers": {"layers": "middle"},
    "last layers": {"layers": "last"},
    "all layers": {"layers": "all"},
}
TABLE_1 = STRATEGIES | {
    "feature addition": {"form": "add"},
    "no Beta-Uniform": {"schedule": "uniform"},
    "no in-the-wild": {"wild_ratio": 0.0},
    "no zero-init": {"zero_init": False},
    "no LoRA": {"lora_rank": 0},
    "LoRA rank 4": {"lora_rank": 4},
    "LoRA rank 64": {"lora_rank": 64},
    "published ZICA": {"form": "published"},
    "null branch hears the music": {"null_audio": "keep"},
}
TABLE_4 = {"base prompt 0": {"base_prompt": 0.0}, "ours: time-aligned": {}, "base prompt 1": {"base_prompt": 1.0}}
MEASURES = (
    "BAS", "PLV", "shirt and trousers", "sharpness / true", "held-out loss: shuffled - right",
    "held-out loss: no music - right",
)  # fmt: skip


class Incomplete(Exception):
    """Some trainings failed; `rows` are those of the others."""

    def __init__(self, why: str, rows: list[Row]):
        super().__init__(why)
        self.rows = rows


def table1(studio: Studio, dancers: list[Dancer]) -> list[Row]:
    """How the layers are chosen, the forms of the adapter, and the ablations; the prior is the level of chance."""
    changes = dict(TABLE_1)
    if studio.cfg.layers is None:  # then the recipe is all layers
        del changes["all layers"]
    if studio.cfg.wild is None:
        del changes["no in-the-wild"]
    return rows_of(studio, changes)


def layers(studio: Studio, dancers: list[Dancer]) -> list[Row]:
    """The rows of Table 1 that are about layers: the most adaptable ones (--layers) beside the other strategies."""
    return rows_of(studio, STRATEGIES)


def table4(studio: Studio, dancers: list[Dancer]) -> list[Row]:
    """The share of base prompts in training: 0, 0.2 (ours) and 1."""
    return rows_of(studio, TABLE_4)


def rows_of(studio: Studio, changes: dict[str, dict]) -> list[Row]:
    """Train and measure what is not yet measured, in --jobs processes; then the rows, mean over seeds."""
    cfg = studio.cfg
    if cfg.data is None:
        raise UserError("tables need --data, a folder of toy.py's AIST clips (and --wild), to train on")
    runs = [(name, config_of(cfg, changes[name], seed)) for name in changes for seed in range(cfg.seeds)]
    encoded = encode(runs[0][1])
    missing = {run.out: (name, run) for name, run in runs if not result_file(cfg, run).exists()}.values()
    failed = []
    with ProcessPoolExecutor(max(1, min(studio.jobs, len(missing))), get_context("spawn")) as pool:
        futures = {pool.submit(train_and_measure, cfg, run, encoded): name for name, run in missing}
        for future in tqdm(as_completed(futures), "trainings", len(futures), unit="run", dynamic_ncols=True):
            try:
                future.result()
            except Exception as error:
                failed.append(f"{futures[future]}: {type(error).__name__}: {error}")
                traceback.print_exception(error)
    ceiling, chance = limits(studio)
    rows = []
    for name in changes:
        files = [result_file(cfg, run) for other, run in runs if other == name]
        told = [json.loads(file.read_text()) for file in files if file.exists()]
        for measure in MEASURES:
            values = [scores[measure] for scores in told if measure in scores]
            if values:
                rows.append(seeds_row(name, measure, values, chance.get(measure), ceiling.get(measure)))
    if failed:
        raise Incomplete("; ".join(failed), rows)
    return rows


def config_of(cfg: ClaimsConfig, change: dict, seed: int) -> TrainConfig:
    """The training of one variant and seed, in a folder named by a hash of all that it depends on.

    Layers are numbers there: two variants that mean the same blocks are one training.
    """
    flags = RECIPE | {"layers": str(cfg.layers) if cfg.layers else "all"} | change
    flags["layers"] = ",".join(map(str, choose_layers(flags["layers"], depth_of(cfg))))
    steps = {"steps": cfg.train_steps, "batch": cfg.train_batch, "eval_every": cfg.train_steps}
    key = hash_of(
        {k: str(v) for k, v in (flags | steps).items()}, str(cfg.data), str(cfg.wild), weights_print(cfg), seed
    )
    out = cfg.out / "trainings" / f"{key[:12]}-{seed}"
    run = TrainConfig(data=cfg.data, wild=cfg.wild, weights=cfg.weights, out=out, seed=seed, **flags, **steps)
    if cfg.device:
        run = replace(run, device=cfg.device)
    if cfg.dtype:
        run = replace(run, dtype=cfg.dtype)
    return replace(run, save_every=cfg.train_steps)


@lru_cache(maxsize=1)
def weights_print(cfg: ClaimsConfig) -> str:
    return fingerprint_weights(DIT.find(cfg.weights))


@lru_cache(maxsize=1)
def depth_of(cfg: ClaimsConfig) -> int:
    return len(check_networks(find_files(cfg.weights, None)).dit.blocks)


def result_file(cfg: ClaimsConfig, run: TrainConfig) -> Path:
    """Where the scores of a training are: another name for other ways to sample."""
    return run.out / f"scores-{hash_of(cfg.clips, cfg.steps, cfg.cfg, cfg.seed)[:8]}.json"


def train_and_measure(cfg: ClaimsConfig, run: TrainConfig, encoded: Encoded) -> None:
    """Train one adapter and write its scores; what it prints goes to OUT/output.txt. Runs in a process of its own."""
    torch.set_num_threads(1)
    run.out.mkdir(parents=True, exist_ok=True)
    with open(run.out / "output.txt", "w") as output:
        print(run, file=output)
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            started = bool(checkpoints(run.out))
            train(replace(run, resume=started), encoded)
            scores = measure(
                studio_of(replace(cfg, jobs=1)), Dancer(run.out.name, run.out / "musicinfuser.safetensors")
            )
    held_out = [entry["held_out"] for entry in read_log(run.out / "log.jsonl") if "held_out" in entry]
    if held_out:
        scores["held-out loss: shuffled - right"] = held_out[-1]["shuffled"] - held_out[-1]["right"]
        scores["held-out loss: no music - right"] = held_out[-1]["no"] - held_out[-1]["right"]
    with media.new_file(result_file(cfg, run)) as temporary:
        temporary.write_text(json.dumps(scores, indent=1))


@lru_cache(maxsize=1)
def studio_of(cfg: ClaimsConfig) -> Studio:
    """One a process, whatever number of trainings it does."""
    return Studio(cfg)


def measure(studio: Studio, dancer: Dancer) -> dict[str, float]:
    """The scores of one dancer on the solo clips."""
    clips = solo_clips(studio.cfg)
    videos = studio.dance(dancer, [prompt_of(clip) for clip in clips], music_of(clips))
    return scores_of(studio, videos, clips, true_sharpness(studio))


def scores_of(studio: Studio, videos: list[np.ndarray], clips: list, sharp: float) -> dict[str, float]:
    told = studio.read(videos)
    rows = dance_rows("", [a["curve"] for a in told], [true_beats(clip, FRAMES) for clip in clips])
    both = [(a["shirt"], a["trousers"]) == (clip.shirt, clip.trousers) for a, clip in zip(told, clips)]
    return values_of(rows) | {
        "shirt and trousers": mean(both),
        "sharpness / true": mean([a["sharpness"] for a in told]) / sharp,
    }


@lru_cache(maxsize=1)
def true_sharpness(studio: Studio) -> float:
    return mean([a["sharpness"] for a in studio.read(studio.true(solo_clips(studio.cfg, 8)))])


def limits(studio: Studio) -> tuple[dict[str, float], dict[str, float]]:
    """(ceiling, chance): the scores of true clips through the VAE, and of the prior, which hears nothing."""
    clips = solo_clips(studio.cfg)
    rebuilt = studio.rebuild(studio.true(clips))
    return scores_of(studio, rebuilt, clips, true_sharpness(studio)), measure(studio, PRIOR)
