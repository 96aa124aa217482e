"""Clips a second through the encoding of a folder of videos, and where the time goes.

Concept   `python bench.py data --data DIR --weights DIR` takes clips through each stage of the encoding, one stage
          after the other, and then draws batches.
Paper     none.
"""

import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import audio
import media
import mochi_vae
import tensors
from bench_rows import hardware
from config import UserError, flag
from data import DanceClips
from data_clips import FPS, DataConfig, cut_videos, fit_frames, frame_size, weights_part
from data_encode import Clip, encode_prompts


@dataclass(frozen=True)
class DataBench(DataConfig):
    """Clips a second through the encoding and batches a second out of it, and the share of each stage."""

    clips: int = flag(20, help="clips to take, spread over the folder")
    batch: int = flag(8, help="clips in a batch")
    out: Path = flag(Path("bench-data.json"), help="result")


def bench_data(cfg: DataBench) -> dict:
    """Measure; seconds of each stage are wall time and CPU time of all threads, summed over the clips."""
    size = cfg.frames, *frame_size(cfg)
    spent: dict[str, list[float]] = {}

    @contextmanager
    def stage(name):
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        if cfg.device.startswith("cuda"):
            torch.cuda.synchronize()
        total = spent.setdefault(name, [0.0, 0.0])
        total[0] += time.perf_counter() - wall
        total[1] += time.process_time() - cpu

    with stage("look at the headers of all files"):
        paths, cuts, _ = cut_videos(cfg, size)
    if not cuts:
        raise UserError(f"{cfg.data}: no usable video to measure with")
    cuts = [cuts[i * len(cuts) // cfg.clips] for i in range(min(cfg.clips, len(cuts)))]
    dtype = getattr(torch, cfg.dtype)
    encoder_file = weights_part(cfg.weights, "encoder.safetensors", "vae")
    encoder = mochi_vae.load_encoder(encoder_file, device=cfg.device, dtype=dtype)
    wav2vec2 = audio.load_wav2vec2(weights_part(cfg.weights, "wav2vec2", "wav2vec2.safetensors"), device=cfg.device)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        clips = []
        for i, (source, start, _) in enumerate(tqdm([cuts[0], *cuts], unit="clip", dynamic_ncols=True)):
            if i == 1:  # the first clip was for warming up
                headers = spent.pop("look at the headers of all files")
                spent.clear()
            with stage("decode the picture"):
                pictures = torch.from_numpy(media.read_video(source.path, FPS, start / FPS, cfg.frames))
            with stage("decode the sound"):
                dur_s = audio.clip_samples(cfg.frames) / audio.SR_HZ
                sound = torch.from_numpy(media.read_audio(source.path, audio.SR_HZ, start / FPS, dur_s))
            with stage("crop and resize"):
                video = fit_frames(pictures, *size[1:], source.aist is not None)[None].to(cfg.device)
            with stage("VAE encoder"):
                mean, logvar = encoder(video)
            with stage("Wav2Vec2"):
                music = wav2vec2(audio.prepare(sound, cfg.frames).to(cfg.device))
            with stage("write"):
                clips.append(Clip(source, start, Path(folder) / f"{i}.safetensors"))
                encoding = {"mean": mean[0].half(), "logvar": logvar[0].half(), "audio": music[0].float()}
                tensors.save(clips[-1].file, encoding)
        prompts = {p for clip in clips for p in (*clip.source.prompts(), clip.source.base_prompt())}
        with stage("T5, all prompts, with loading"):
            prompts_file = encode_prompts(prompts, cfg.weights, Path(folder), cfg.device, dtype)
        text = spent.pop("T5, all prompts, with loading")
        batches = draw(DanceClips(clips, prompts_file), cfg.batch)
    wall, cpu = (sum(times[i] for times in spent.values()) for i in (0, 1))
    return {
        "hardware": hardware(cfg.device),
        "clip": {"frames": size[0], "height": size[1], "width": size[2], "dtype": cfg.dtype, "device": cfg.device},
        "clips": len(cuts),
        "clips_per_s": len(cuts) / wall,
        "cpu_s_per_clip": cpu / len(cuts),
        "stages": {name: {"wall_s": t[0] / len(cuts), "share": t[0] / wall, "cpu_s": t[1] / len(cuts)}
                   for name, t in spent.items()},
        "headers_s_per_file": headers[0] / len(paths),
        "prompts_s": text[0],
        "prompts": len(prompts),
        **batches,
    }  # fmt: skip


def draw(dance: DanceClips, n: int, count: int = 50) -> dict:
    """Batches a second, all encodings in memory after the first round."""
    began = time.perf_counter()
    for step in range(count):
        dance.batch(n, torch.Generator().manual_seed(step))
    return {"batch": n, "batches_per_s": count / (time.perf_counter() - began)}
