"""The baby Wav2Vec2: self-supervised on the toy music, without beats, tempi or videos.

Concept   hide half of the tokens in long spans and predict their log-mel spectrogram from what is left. A span is
          longer than a drum hit, so that to fill it the encoder has to know where in the bar it is.
Paper     stands in for Wav2Vec2-base-960h (arXiv 2503.14505v2, Sec. 5.1), which has never seen a beat label either.
Differs   Wav2Vec 2.0 tells the true token from distractors; at this size predicting the spectrogram learns faster.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import audio
import toy
from pretrain_fit import FPS, FRAMES, PretrainConfig, fit, pool

BANK = 4096  # sections of music that batches are drawn from


def baby_audio() -> audio.Wav2Vec2:
    return audio.Wav2Vec2(width=128, depth=3, ffn=256, heads=2, conv_widths=(64,) * 7, pos_kernel=128, pos_groups=16)


def log_mel(waveform: Tensor, sr_hz: int = 16000, bands: int = 32) -> Tensor:
    """(B, S) -> (B, bands, S // 160): log power in bands of equal width on the mel scale, every 10 ms."""
    window = torch.hann_window(512, device=waveform.device)
    power = torch.stft(waveform, 512, 160, window=window, return_complex=True).abs().square()  # (B, 257, M)
    top = 2595 * math.log10(1 + sr_hz / 2 / 700)
    mel_of_bin = 2595 * torch.log10(1 + torch.linspace(0, sr_hz / 2, 257, device=waveform.device) / 700)
    centre = torch.linspace(0, top, bands + 2, device=waveform.device)[1:-1, None]
    overlap = (1 - (mel_of_bin - centre).abs() * (bands + 1) / top).clamp(min=0)  # (bands, 257) triangles
    with torch.autocast(waveform.device.type, enabled=False):
        return torch.log(overlap @ power + 1e-3)


def train_audio(cfg: PretrainConfig) -> audio.Wav2Vec2:
    """Self-supervision on the toy music: hide half of the tokens in long spans, predict their log-mel spectrogram.

    A hidden span is longer than a drum hit, so to fill it the encoder has to know where in the bar it is. Nobody
    tells it: it never sees a beat label, a tempo or a video.
    """
    torch.manual_seed(cfg.seed + 1)
    encoder = baby_audio()
    width = encoder.encode(encoder.features(torch.zeros(1, 16000))).shape[-1]
    hidden = nn.Parameter(torch.zeros(encoder.features(torch.zeros(1, 16000)).shape[-1]))
    networks = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(width, 64), "hidden": nn.ParameterList([hidden])})
    networks.to(cfg.device)

    @functools.cache  # a finished stage needs no music
    def bank() -> Tensor:
        return music_bank(cfg).to(cfg.device)

    def error(waveform: Tensor, generator: torch.Generator) -> Tensor:
        features = encoder.features(waveform)  # (B, A, D), one token every 20 ms
        count = features.shape[1]
        starts = torch.rand(len(waveform), count, generator=generator).to(features.device) < 0.045  # half of all tokens
        mask = F.max_pool1d(F.pad(starts.float()[:, None], (15, 0)), 16, 1)[:, 0].bool()  # are in spans of 16 = 0.32 s
        seen = torch.where(mask[..., None], networks["hidden"][0].to(features.dtype), features)
        target = log_mel(waveform)[..., : 2 * count]  # (B, 32, 2A)
        target = (target - target.mean((1, 2), keepdim=True)) / (target.std((1, 2), keepdim=True) + 1e-5)
        target = target.transpose(1, 2).reshape(len(waveform), count, 64)
        wrong = (networks["head"](encoder.encode(seen)).float() - target).square().mean(-1)  # (B, A)
        return (wrong * mask).sum() / mask.sum()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        picked = torch.randint(BANK, (32,), generator=generator)
        return error(bank()[picked.to(cfg.device)].float(), generator)

    @torch.no_grad()
    def look() -> str:
        fixed = torch.Generator().manual_seed(0)
        unheard = torch.cat([music_section([cfg.seed, 3], i) for i in range(64)])
        return f"held-out error {error(unheard.to(cfg.device), fixed).item():.4f}"

    return fit("audio", cfg, networks, cfg.audio_steps, 1e-3, 0.998, loss_of, look)["encoder"]


def music_bank(cfg: PretrainConfig) -> Tensor:
    """BANK sections of toy music as the audio encoder hears them, (BANK, S) float16, played by several processes."""
    with pool(cfg) as processes:
        played = processes.imap(functools.partial(music_section, [cfg.seed, 2]), range(BANK), chunksize=64)
        return torch.cat([section.half() for section in tqdm(played, "music", BANK, dynamic_ncols=True)])


def music_section(seed: list[int], index: int) -> Tensor:
    """Section number `index` of toy music, any tempo in any genre, prepared for the audio encoder: (1, S)."""
    clip = toy.sample_clip(np.random.default_rng([*seed, index]), wild=True)
    return audio.prepare(torch.from_numpy(toy.music(clip, 0.0, FRAMES / FPS + 0.09)), FRAMES)
