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

import drawing
import mochi_vae
import tensors
from check import DECODER, ENCODER
from config import UserError
from pretrain_fit import FRAMES, HELD_OUT, PretrainConfig, fit, on_device


def baby_vae() -> nn.ModuleDict:
    """8x8 in space, 6x in time, 12 channels, like Mochi's; most of the space is folded next to the pixels: cheap."""
    reductions = ((1, 4, 4), (2, 2, 2), (3, 1, 1))
    encoder = mochi_vae.Encoder((24, 32, 48, 64), (0, 1, 1, 1, 0), reductions, (False,) * 5, norm_groups=4)
    decoder = mochi_vae.Decoder((32, 56, 80, 88), (2, 1, 1, 1, 0), reductions, norm_groups=4)
    with torch.no_grad():  # start with log-variance about -6: behind SiLU of a unit normal, whose mean is 0.2066
        encoder.output_proj.weight[12:] = -6 / (0.2066 * encoder.output_proj.weight.shape[1])
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder}).to(memory_format=torch.channels_last_3d)


def to_video(frames: np.ndarray, device: str = "cpu") -> Tensor:
    """(B, T, H, W, 3) uint8 -> (B, 3, T, H, W) float32 in [-1, 1], channels innermost in memory."""
    return torch.tensor(frames).to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_frames(video: Tensor) -> np.ndarray:
    """(B, 3, T, H, W) in [-1, 1] -> (B, T, H, W, 3) uint8."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()


def draw_frames(frames: np.ndarray, batch: int, generator: torch.Generator) -> np.ndarray:
    """Of three shapes one: `batch` single frames, a quarter as many clips of 7, or an eighth of 13: (B, T, H, W, 3).

    Single frames give many scenes a batch (a batch of a few clips gets stuck at grey figures), clips give motion.
    """
    shapes = (batch, 1), (batch // 4, 7), (batch // 8, 13)
    count, length = shapes[int(torch.randint(3, (1,), generator=generator))]
    clips = torch.randint(len(frames) - HELD_OUT, (count,), generator=generator).tolist()
    starts = torch.randint(FRAMES - length + 1, (count,), generator=generator).tolist()
    return np.stack([frames[c, s : s + length] for c, s in zip(clips, starts)])


def draw_latent(mean: Tensor, logvar: Tensor, generator: torch.Generator) -> Tensor:
    """A draw from the posterior N(mean, exp(logvar)), its noise drawn on the posterior's device."""
    noise = torch.randn(mean.shape, generator=on_device(generator, mean.device), device=mean.device)
    return mean + noise * (0.5 * logvar).exp()


def pixel_loss(output: Tensor, video: Tensor) -> Tensor:
    """L1 + L2, where pixels that differ from the backdrop of their row count five times."""
    weight = 1 + 4 * figure_of(video).float()
    error = output - video
    return ((error.abs() + error.square()) * weight).mean() / weight.mean()


def figure_of(video: Tensor) -> Tensor:
    """(B, 3, T, H, W) -> (B, 1, T, H, W) bool: pixels that differ from the backdrop of their row.

    The backdrop of a row is taken as the mean of its two border columns: a figure rarely touches both.
    """
    backdrop = (video[..., :1] + video[..., -1:]) / 2
    return (video - backdrop).abs().amax(dim=1, keepdim=True) > 0.15


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 images, in dB."""
    return 10 * math.log10(255**2 / max(np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2), 1e-9))


def train_vae(cfg: PretrainConfig, frames: np.ndarray) -> nn.ModuleDict:
    """Encoder and decoder together; afterwards the latents are scaled to the spread that Mochi's have."""
    torch.manual_seed(cfg.seed)
    vae = baby_vae().to(cfg.device)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        video = to_video(draw_frames(frames, cfg.vae_batch, generator), cfg.device)
        mean, logvar = (half.float() for half in vae["encoder"](video))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return pixel_loss(vae["decoder"](draw_latent(mean, logvar, generator)).float(), video) + 3e-4 * kl

    fit("vae", cfg, vae, cfg.vae_steps, 1.5e-3, 0.99, loss_of, lambda: look_at_vae(cfg, frames, vae, "vae"))
    return scale_latents(vae, frames)


@torch.no_grad()
def look_at_vae(cfg: PretrainConfig, frames: np.ndarray, vae: nn.ModuleDict, name: str) -> str:
    """Held-out clips above their reconstructions, in out/<name>.png."""
    true = frames[-HELD_OUT::8]
    videos = (to_video(clip[None], cfg.device) for clip in true)
    rebuilt = np.concatenate([to_frames(vae["decoder"](vae["encoder"](video)[0])) for video in videos])
    rows = [pair for t, r in zip(true[:6], rebuilt) for pair in ((t, "held out"), (r, "rebuilt"))]
    drawing.sheet(cfg.out / f"{name}.png", rows)
    shown = np.concatenate([figure_of(to_video(clip[None]))[0, 0].numpy() for clip in true])  # (F, H, W)
    figure = psnr(true.reshape(-1, *true.shape[2:])[shown], rebuilt.reshape(-1, *true.shape[2:])[shown])
    return f"held-out PSNR {psnr(true, rebuilt):.2f} dB, on the figure {figure:.2f} dB, see {cfg.out / name}.png"


@torch.no_grad()
def scale_latents(vae: nn.ModuleDict, frames: np.ndarray) -> nn.ModuleDict:
    """Give each latent channel the standard deviation that Mochi's has, by folding a factor into two 1x1 layers.

    The DiT sees (z_vae - MEAN) / STD with Mochi's constants, so the baby's latents have to be of that size too.
    """
    encoder, decoder = vae["encoder"], vae["decoder"]
    device = next(encoder.parameters()).device
    stride = max(1, (len(frames) - HELD_OUT) // 64) | 1  # odd, so that clips of both halves of the world are met
    sample_clips = frames[: len(frames) - HELD_OUT : stride][:64]
    means = torch.cat([encoder(to_video(clip[None], device))[0] for clip in sample_clips])  # (64, C, T, H, W)
    factor = torch.tensor(mochi_vae.STD, device=device) / means.std(dim=(0, 2, 3, 4))
    encoder.output_proj.weight[: len(factor)].mul_(factor[:, None])
    decoder.blocks[0][0].weight.div_(factor[:, None, None, None])
    return vae


@torch.no_grad()
def encode_world(cfg: PretrainConfig, frames: np.ndarray, encoder: nn.Module) -> tuple[Tensor, Tensor]:
    """Posterior mean and log-variance of every clip, (N, C, T, H, W) float16, kept in out/latents.safetensors."""
    path = cfg.out / "latents.safetensors"
    if not path.exists():
        pairs, few = [], 16 if cfg.device.startswith("cuda") else 1
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            for i in tqdm(range(0, len(frames), few), desc="encode", unit=f"{few} clips", dynamic_ncols=True):
                pairs.append([half.half() for half in encoder(to_video(frames[i : i + few], cfg.device))])
        tensors.save(path, {name: torch.cat([pair[k] for pair in pairs]) for k, name in enumerate(("mean", "logvar"))})
    saved = tensors.open_weights(path)
    return saved.read("mean", cfg.device), saved.read("logvar", cfg.device)


def load_vae(cfg: PretrainConfig) -> nn.ModuleDict:
    """The VAE in cfg.vae, to be gone on with: as its encoder stays, so does all that was trained on its latents.

    raises   UserError if a network is missing or broken, or if cfg.out holds a VAE of its own
    """
    if (cfg.out / "vae.safetensors").exists():
        raise UserError(f"{cfg.out} holds a VAE of its own: give another --out, or leave out --vae")
    halves = {
        "encoder": mochi_vae.load_encoder(ENCODER.find(cfg.vae), cfg.device),
        "decoder": mochi_vae.load_decoder(DECODER.find(cfg.vae), cfg.device),
    }
    return nn.ModuleDict(halves).requires_grad_(True).to(memory_format=torch.channels_last_3d)


def export_vae(cfg: PretrainConfig, vae: nn.ModuleDict) -> None:
    """Write both halves into cfg.weights in the official layout, bf16."""
    for name, half in vae.items():
        weights = {key: tensor.bfloat16() for key, tensor in half.state_dict().items()}
        tensors.save(cfg.weights / f"{name}.safetensors", weights, {"norm_groups": str(half.norm_groups)})
    print(f"wrote encoder.safetensors and decoder.safetensors in {cfg.weights}")


def train_decoder(cfg: PretrainConfig, frames: np.ndarray, vae: nn.ModuleDict) -> nn.ModuleDict:
    """The decoder alone, behind the frozen encoder: all capacity goes into drawing."""
    vae["encoder"].requires_grad_(False)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        video = to_video(draw_frames(frames, cfg.vae_batch, generator), cfg.device)
        with torch.no_grad():
            mean, logvar = (half.float() for half in vae["encoder"](video))
        return pixel_loss(vae["decoder"](draw_latent(mean, logvar, generator)).float(), video)

    look = lambda: look_at_vae(cfg, frames, vae, "decoder")  # noqa: E731
    return fit("decoder", cfg, vae, cfg.decoder_steps, 1e-3, 0.998, loss_of, look)
