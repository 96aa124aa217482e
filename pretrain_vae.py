"""The baby VAE: encoder and decoder together, then the decoder alone; and every clip encoded once.

Concept   L1 + L2 + a little KL on frames and short clips. Then the encoder is frozen, its latents are given the spread
          of Mochi's, and the decoder goes on by itself: all of its capacity goes into drawing.
Paper     stands in for Mochi 1's VAE (arXiv 2503.14505v2, Sec. 5.1). Sizes and recipe are ours.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import media
import mochi_vae
import tensors
from pretrain_fit import FRAMES, HELD_OUT, PretrainConfig, fit


def baby_vae() -> nn.ModuleDict:
    """8x8 in space, 6x in time, 12 channels, like Mochi's; most of the space is folded next to the pixels: cheap."""
    reductions = ((1, 4, 4), (2, 2, 2), (3, 1, 1))
    encoder = mochi_vae.Encoder((24, 32, 48, 64), (0, 1, 1, 1, 0), reductions, (False,) * 5, norm_groups=4)
    decoder = mochi_vae.Decoder((32, 48, 72, 104), (1, 1, 1, 1, 0), reductions, norm_groups=4)
    with torch.no_grad():  # start with log-variance about -6: behind SiLU of a unit normal, whose mean is 0.2066
        encoder.output_proj.weight[12:] = -6 / (0.2066 * encoder.output_proj.weight.shape[1])
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder}).to(memory_format=torch.channels_last_3d)


def to_video(frames: np.ndarray) -> Tensor:
    """(B, T, H, W, 3) uint8 -> (B, 3, T, H, W) float32 in [-1, 1]."""
    return torch.tensor(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_frames(video: Tensor) -> np.ndarray:
    """(B, 3, T, H, W) in [-1, 1] -> (B, T, H, W, 3) uint8."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()


def draw_frames(frames: np.ndarray, generator: torch.Generator) -> Tensor:
    """A batch of one of three shapes: 24 single frames, 6 clips of 7, or 3 clips of 13 frames -> (B, 3, T, H, W).

    Single frames give many scenes a batch (a batch of a few clips gets stuck at grey figures), clips give motion.
    """
    count, length = ((24, 1), (6, 7), (3, 13))[int(torch.randint(3, (1,), generator=generator))]
    clips = torch.randint(len(frames) - HELD_OUT, (count,), generator=generator).tolist()
    starts = torch.randint(FRAMES - length + 1, (count,), generator=generator).tolist()
    return to_video(np.stack([frames[c, s : s + length] for c, s in zip(clips, starts)]))


def pixel_loss(output: Tensor, video: Tensor) -> Tensor:
    """L1 + L2, where pixels that differ from the backdrop of their row count five times.

    The backdrop of a row is taken as the mean of its two border columns: a figure rarely touches both.
    """
    backdrop = (video[..., :1] + video[..., -1:]) / 2
    weight = 1 + 4 * ((video - backdrop).abs().amax(dim=1, keepdim=True) > 0.15).float()
    error = output - video
    return ((error.abs() + error.square()) * weight).mean() / weight.mean()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 images, in dB."""
    return 10 * math.log10(255**2 / max(np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2), 1e-9))


def train_vae(cfg: PretrainConfig, frames: np.ndarray) -> nn.ModuleDict:
    """Encoder and decoder together; afterwards the latents are scaled to the spread that Mochi's have."""
    torch.manual_seed(cfg.seed)
    vae = baby_vae().to(cfg.device)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        video = draw_frames(frames, generator).to(cfg.device)
        mean, logvar = vae["encoder"](video)
        z_vae = mean + torch.randn(mean.shape, generator=generator).to(mean) * (0.5 * logvar).exp()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return pixel_loss(vae["decoder"](z_vae), video) + 3e-4 * kl

    fit("vae", cfg, vae, cfg.vae_steps, 1e-3, 0.99, loss_of, lambda: look_at_vae(cfg, frames, vae, "vae"))
    return scale_latents(vae, frames)


@torch.no_grad()
def look_at_vae(cfg: PretrainConfig, frames: np.ndarray, vae: nn.ModuleDict, name: str) -> str:
    """Held-out clips above their reconstructions, in out/<name>.png."""
    true = frames[-HELD_OUT::16]
    videos = (to_video(clip[None]).to(cfg.device) for clip in true)
    rebuilt = np.concatenate([to_frames(vae["decoder"](vae["encoder"](video)[0])) for video in videos])
    rows = [pair for t, r in zip(true, rebuilt) for pair in ((t, "held out"), (r, "rebuilt"))]
    media.sheet(cfg.out / f"{name}.png", rows)
    return f"held-out PSNR {psnr(true, rebuilt):.2f} dB, see {cfg.out / name}.png"


@torch.no_grad()
def scale_latents(vae: nn.ModuleDict, frames: np.ndarray) -> nn.ModuleDict:
    """Give each latent channel the standard deviation that Mochi's has, by folding a factor into two 1x1 layers.

    The DiT sees (z_vae - MEAN) / STD with Mochi's constants, so the baby's latents have to be of that size too.
    """
    encoder, decoder = vae["encoder"], vae["decoder"]
    device = next(encoder.parameters()).device
    sample_clips = frames[: len(frames) - HELD_OUT : max(1, (len(frames) - HELD_OUT) // 64)][:64]
    means = torch.cat([encoder(to_video(clip[None]).to(device))[0] for clip in sample_clips])  # (64, C, T, H, W)
    factor = torch.tensor(mochi_vae.STD, device=device) / means.std(dim=(0, 2, 3, 4))
    encoder.output_proj.weight[: len(factor)].mul_(factor[:, None])
    decoder.blocks[0][0].weight.div_(factor[:, None, None, None])
    return vae


@torch.no_grad()
def encode_world(cfg: PretrainConfig, frames: np.ndarray, encoder: nn.Module) -> tuple[Tensor, Tensor]:
    """Posterior mean and log-variance of every clip, (N, C, T, H, W) each, kept in out/latents.safetensors."""
    path = cfg.out / "latents.safetensors"
    if not path.exists():
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            pairs = [encoder(to_video(clip[None]).to(cfg.device)) for clip in tqdm(frames, desc="encode", unit="clip")]
        tensors.save(path, {"mean": torch.cat([m for m, _ in pairs]), "logvar": torch.cat([v for _, v in pairs])})
    saved = tensors.open_weights(path)
    return saved.read("mean"), saved.read("logvar")


def train_decoder(cfg: PretrainConfig, frames: np.ndarray, vae: nn.ModuleDict) -> nn.ModuleDict:
    """The decoder alone, behind the frozen encoder: all capacity goes into drawing."""
    vae["encoder"].requires_grad_(False)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        video = draw_frames(frames, generator).to(cfg.device)
        with torch.no_grad():
            mean, logvar = vae["encoder"](video)
        z_vae = mean + torch.randn(mean.shape, generator=generator).to(mean) * (0.5 * logvar).exp()
        return pixel_loss(vae["decoder"](z_vae), video)

    look = lambda: look_at_vae(cfg, frames, vae, "decoder")  # noqa: E731
    return fit("decoder", cfg, vae, cfg.decoder_steps, 1e-3, 0.998, loss_of, look)
