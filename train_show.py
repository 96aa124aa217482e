"""A look at a training while it runs: the first held-out clip's prompt and music, danced by the adapters of now.

Concept   always the same prompt, music and noise: the videos differ by what was learned in between. Draws from no
          generator of the training: with it or without it, the weights come out the same.
Paper     none: plumbing; the sampler is that of sample.py.
"""

from pathlib import Path

import torch

import media
from audio import FPS
from check import DECODER, DIT, made_for
from data import DanceClips
from model import MusicInfuser
from sample import null_of, sample
from schedule import linear_quadratic
from stages import SOUND_HZ, WATCHABLE, decode


@torch.no_grad()
def show(model: MusicInfuser, clips: DanceClips, weights: Path, device: torch.device, dtype: str, path: Path) -> None:
    """Write an mp4 with the music on it. weights: the folder with the decoder; dtype: of the transformer's products."""
    clip, batch, made = clips.held_out[0], clips.held_out_batch(1), made_for(DIT.find(weights))
    text = batch.text.to(device), batch.text_mask
    noise = torch.randn(batch.z.shape, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        sigmas = linear_quadratic(made["steps"])
        z = sample(model, noise, sigmas, text, null_of(text), batch.audio.to(device), cfg=made["cfg"])
    dur_s = (6 * z.shape[2] - 5) / FPS
    sound = media.read_audio(clip.source.path, SOUND_HZ, clip.start / FPS, dur_s)
    frames = decode(DECODER.find(weights), z)
    media.write_mp4(path, frames, FPS, sound, SOUND_HZ, max(1, WATCHABLE // (8 * max(z.shape[3:]))))
