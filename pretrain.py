"""Make the baby weights: pre-train every network on the toy world, the video model WITHOUT music.

Concept   MusicInfuser adapts a text-to-video model that already knows how to dance but cannot hear. On a laptop that
          prior does not exist, so this command makes one, in stages that follow the real history of the big networks:
            world    render the clips (toy.py), with several captions each
            vae      encoder and decoder together: L1 + L2 + KL, on single frames and short clips
            decoder  the decoder alone, behind the frozen encoder; then every clip is encoded once
            audio    Wav2Vec2, self-supervised: predict the masked log-mel spectrogram. It never sees a beat label
            prior    T5 and the DiT, jointly: flow matching of latents given captions, no sound anywhere
            export   all of it in the official layouts, bf16
Paper     "Text-to-video models already know how to dance" (Sec. 4, v2) is what the prior is for; the paper itself
          starts from Mochi 1 and Wav2Vec2-base-960h. Sizes and recipe are ours.
Resume    every stage goes on from its last checkpoint, and a finished stage is not run again.
"""

import copy
import json
import math
import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import audio
import media
import mochi_vae
import t5
import tensors
import toy
from config import UserError, flag, from_cli, run
from mochi_dit import KEEP_FLOAT32, MochiDiT
from model import MusicInfuser
from sample import sample
from schedule import linear_quadratic

FRAMES, SIZE, FPS = 73, 64, 30
HELD_OUT = 64  # clips at the end of the world that no stage trains on
PROMPT = (  # what sample.py shows when nobody says what to show
    "a professional female dancer wearing a red shirt and blue trousers dancing House in a studio with a white "
    "backdrop, captured from a front view"
)
STAGES = ("world", "vae", "decoder", "audio", "prior", "export")


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-train the baby VAE, audio encoder, text encoder and video prior on the toy world."""

    stage: str = flag("all", help="world, vae, decoder, audio, prior, export, or all of them in that order")
    out: Path = flag(Path("runs/baby"), help="folder for the world, checkpoints and pictures")
    weights: Path = flag(Path("runs/baby/weights"), help="folder that receives the finished weights")
    clips: int = flag(6000, help="clips of the world, of which the last 64 are held out")
    vae_steps: int = flag(2200, help="steps of encoder and decoder together")
    decoder_steps: int = flag(1800, help="steps of the decoder alone")
    audio_steps: int = flag(900, help="steps of the audio encoder")
    prior_steps: int = flag(5000, help="steps of text encoder and DiT")
    prior_batch: int = flag(12, help="clips in a batch of the prior")
    seed: int = flag(0, help="seed of the world, of the initial weights and of every step's draw")
    device: str = flag("cpu", help="cpu or cuda")
    dtype: str = flag("float32", help="float32, or bfloat16 autocast where the chip multiplies it fast")
    save_every: int = flag(250, help="steps between checkpoints")
    look_every: int = flag(1000, help="steps between pictures of held-out clips")

    def __post_init__(self):
        if self.stage not in (*STAGES, "all"):
            raise UserError(f"--stage {self.stage}: expected one of {', '.join(STAGES)} or all")
        if self.clips <= 2 * HELD_OUT:
            raise UserError(f"--clips {self.clips}: need more than {2 * HELD_OUT}")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"--dtype {self.dtype}: expected float32 or bfloat16")


# ---------------------------------------------------------------- the networks, at baby size


def baby_vae() -> nn.ModuleDict:
    """8x8 in space, 6x in time, 12 channels, like Mochi's; most of the space is folded next to the pixels: cheap."""
    reductions = ((1, 4, 4), (2, 2, 2), (3, 1, 1))
    encoder = mochi_vae.Encoder((24, 32, 48, 64), (0, 1, 1, 1, 0), reductions, (False,) * 5, norm_groups=4)
    decoder = mochi_vae.Decoder((32, 48, 72, 104), (1, 1, 1, 1, 0), reductions, norm_groups=4)
    with torch.no_grad():  # start with log-variance about -6: behind SiLU of a unit normal, whose mean is 0.2066
        encoder.output_proj.weight[12:] = -6 / (0.2066 * encoder.output_proj.weight.shape[1])
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder}).to(memory_format=torch.channels_last_3d)


def baby_audio() -> audio.Wav2Vec2:
    return audio.Wav2Vec2(width=128, depth=3, ffn=256, heads=2, conv_widths=(64,) * 7, pos_kernel=128, pos_groups=16)


def baby_prior(vocab: int) -> nn.ModuleDict:
    text = t5.T5(vocab=vocab, width=64, depth=2, heads=4, kv=16, ffn=128)
    dit = MochiDiT(depth=6, width=192, text_width=48, num_heads=6, text_dim=64)
    dit.initialise(((FRAMES - 1) // 6 + 1, SIZE // 16, SIZE // 16))
    return nn.ModuleDict({"t5": text, "dit": dit})


# ---------------------------------------------------------------- one training loop for every stage


def fit(
    name: str,
    cfg: PretrainConfig,
    networks: nn.ModuleDict,
    steps: int,
    lr: float,
    ema: float,
    loss_of: Callable[[int, torch.Generator], Tensor],
    look: Callable[[], str],
) -> nn.ModuleDict:
    """Minimise loss_of(step, generator) with AdamW; returns the networks with their averaged weights.

    The learning rate warms up for 100 steps, stays at `lr` and falls linearly to 0 over the last 35 %.
    State is (weights, their average, optimiser, step) in out/<name>.safetensors; all else is a function of
    (seed, step), so an interrupted run goes on exactly where it would have been.

    ema    decay of the exponential moving average of the weights, which is what is looked at and returned
    look   called with the averaged weights in place; draws held-out pictures, returns a line to print
    """
    path = cfg.out / f"{name}.safetensors"
    weights = {key: p for key, p in networks.named_parameters() if p.requires_grad}
    average = {key: p.detach().clone() for key, p in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    first = 0
    if path.exists():
        first = _restore(path, weights, average, optimizer)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, unit="step", dynamic_ncols=True)
    smooth = None
    for step in bar:
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            loss = loss_of(step, generator)
        if not loss.isfinite():
            raise UserError(f"{name}: the loss is {loss.item()} at step {step}; {path} holds the last good state")
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100, (steps - step) / (0.35 * steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            decay = min(ema, (step + 1) / (step + 10))  # follow closely at first, when the start is worth nothing
            torch._foreach_lerp_(list(average.values()), list(weights.values()), 1 - decay)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}")
        done = step + 1
        if done % cfg.save_every == 0 or done == steps:
            _store(path, weights, average, optimizer, done)
        if done % cfg.look_every == 0 or done == steps:
            swapped = {key: p.detach().clone() for key, p in weights.items()}
            _copy(average, weights)
            tqdm.write(f"{name} step {done}: loss {smooth:.4f}, {look()}")
            _copy(swapped, weights)
    _copy(average, weights)
    return networks.eval()


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for key, tensor in source.items():
        target[key].copy_(tensor)


def _store(path: Path, weights, average, optimizer, step: int) -> None:
    state = {f"weights/{key}": p for key, p in weights.items()} | {f"average/{key}": p for key, p in average.items()}
    for key, p in weights.items():
        state[f"exp_avg/{key}"] = optimizer.state[p]["exp_avg"]
        state[f"exp_avg_sq/{key}"] = optimizer.state[p]["exp_avg_sq"]
    tensors.save(path, state, {"step": str(step)})


def _restore(path: Path, weights, average, optimizer) -> int:
    saved = tensors.open_weights(path)
    step = int(saved.metadata["step"])
    _copy({key: saved.read(f"weights/{key}") for key in weights}, weights)
    _copy({key: saved.read(f"average/{key}") for key in average}, average)
    for key, p in weights.items():
        optimizer.state[p] = {
            "step": torch.tensor(float(step)),
            "exp_avg": saved.read(f"exp_avg/{key}", p.device),
            "exp_avg_sq": saved.read(f"exp_avg_sq/{key}", p.device),
        }
    return step


# ---------------------------------------------------------------- stage 1: the world


def make_world(cfg: PretrainConfig) -> tuple[np.ndarray, list[list[str]]]:
    """Render the clips once: frames (N, F, H, W, 3) uint8, mapped from disk, and four captions of each clip.

    Half of them look like AIST (a studio with a white backdrop), half like clips from the web.
    """
    path, notes = cfg.out / "world.npy", cfg.out / "world.json"
    shape = (cfg.clips, FRAMES, SIZE, SIZE, 3)
    if notes.exists():
        world = json.loads(notes.read_text())
        if world["seed"] == cfg.seed and world["clips"] == cfg.clips:
            return np.load(path, mmap_mode="r"), world["captions"]
    cfg.out.mkdir(parents=True, exist_ok=True)
    frames = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    captions = []
    with multiprocessing.get_context("spawn").Pool() as pool:
        made = pool.imap(partial(make_clip, cfg.seed), range(cfg.clips), chunksize=16)
        for index, (video, texts) in enumerate(tqdm(made, "world", cfg.clips, unit="clip", dynamic_ncols=True)):
            frames[index] = video
            captions.append(texts)
    frames.flush()
    notes.write_text(json.dumps({"seed": cfg.seed, "clips": cfg.clips, "captions": captions}))
    return np.load(path, mmap_mode="r"), captions


def make_clip(seed: int, index: int) -> tuple[np.ndarray, list[str]]:
    """Frames and captions of clip number `index` of the world of this seed."""
    rng = np.random.default_rng([seed, index])
    clip = toy.sample_clip(rng, wild=index % 2 == 1)
    return toy.render(clip, FRAMES, SIZE), [toy.prior_caption(clip, rng) for _ in range(4)]


def to_video(frames: np.ndarray) -> Tensor:
    """(B, T, H, W, 3) uint8 -> (B, 3, T, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_frames(video: Tensor) -> np.ndarray:
    """(B, 3, T, H, W) in [-1, 1] -> (B, T, H, W, 3) uint8."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()


# ---------------------------------------------------------------- stages 2 and 3: the VAE


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


# ---------------------------------------------------------------- stage 4: the audio encoder


def log_mel(waveform: Tensor, sr_hz: int = 16000, bands: int = 32) -> Tensor:
    """(B, S) -> (B, bands, S // 160): log power in bands of equal width on the mel scale, every 10 ms."""
    window = torch.hann_window(512, device=waveform.device)
    power = torch.stft(waveform, 512, 160, window=window, return_complex=True).abs().square()  # (B, 257, M)
    top = 2595 * math.log10(1 + sr_hz / 2 / 700)
    mel_of_bin = 2595 * torch.log10(1 + torch.linspace(0, sr_hz / 2, 257, device=waveform.device) / 700)
    centre = torch.linspace(0, top, bands + 2, device=waveform.device)[1:-1, None]
    overlap = (1 - (mel_of_bin - centre).abs() * (bands + 1) / top).clamp(min=0)  # (bands, 257) triangles
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

    def error(waveform: Tensor, generator: torch.Generator) -> Tensor:
        features = encoder.features(waveform)  # (B, A, D), one token every 20 ms
        count = features.shape[1]
        starts = (
            torch.rand(len(waveform), count, generator=generator) < 0.045
        )  # spans of 16 tokens = 0.32 s, half of all
        mask = F.max_pool1d(F.pad(starts.float()[:, None], (15, 0)), 16, 1)[:, 0].bool().to(features.device)
        seen = torch.where(mask[..., None], networks["hidden"][0].to(features.dtype), features)
        target = log_mel(waveform)[..., : 2 * count]  # (B, 32, 2A)
        target = (target - target.mean((1, 2), keepdim=True)) / (target.std((1, 2), keepdim=True) + 1e-5)
        target = target.transpose(1, 2).reshape(len(waveform), count, 64)
        return F.mse_loss(networks["head"](encoder.encode(seen)).float()[mask], target[mask])

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        return error(music_batch([cfg.seed, 2, step], 32).to(cfg.device), generator)

    @torch.no_grad()
    def look() -> str:
        fixed = torch.Generator().manual_seed(0)
        return f"held-out error {error(music_batch([cfg.seed, 3, 0], 64).to(cfg.device), fixed).item():.4f}"

    return fit("audio", cfg, networks, cfg.audio_steps, 1e-3, 0.998, loss_of, look)["encoder"]


def music_batch(seed: list[int], count: int) -> Tensor:
    """`count` sections of toy music as the audio encoder hears them, (count, S)."""
    rng = np.random.default_rng(seed)
    waveforms = [
        torch.from_numpy(toy.music(toy.sample_clip(rng, wild=True), 0.0, FRAMES / FPS + 0.09)) for _ in range(count)
    ]
    return torch.cat([audio.prepare(waveform, FRAMES) for waveform in waveforms])


# ---------------------------------------------------------------- stage 5: the prior


def train_tokenizer(cfg: PretrainConfig, captions: list[list[str]]) -> t5.Tokenizer:
    """A sentencepiece model of the captions, with T5's special tokens: </s> is 1, padding 0."""
    path = cfg.out / "t5" / "spiece.model"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text for several in captions for text in several]),
            model_prefix=str(path.with_suffix("")),
            vocab_size=512,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    return t5.Tokenizer(path)


def train_prior(cfg: PretrainConfig, captions: list[list[str]], mean: Tensor, logvar: Tensor, decoder: nn.Module):
    """Flow matching: E || pred(z_sigma, sigma, c) - (z0 - eps) ||^2 with sigma = sigmoid(N(0.3, 1))."""
    torch.manual_seed(cfg.seed + 2)
    tokenizer = train_tokenizer(cfg, captions)
    networks = baby_prior(tokenizer.vocab_size).to(cfg.device)
    train_count = len(mean) - HELD_OUT

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        clips = torch.randint(train_count, (cfg.prior_batch,), generator=generator)
        which = torch.randint(4, (cfg.prior_batch,), generator=generator)
        texts = [captions[c][w] for c, w in zip(clips.tolist(), which.tolist())]
        kept = torch.rand(cfg.prior_batch, generator=generator) >= 0.1  # caption dropout, for guidance
        features, mask = t5.encode(networks["t5"], tokenizer, [t if k else "" for t, k in zip(texts, kept)], cfg.device)
        m, v = mean[clips].float(), logvar[clips].float()
        z = mochi_vae.to_dit_space(m + torch.randn(m.shape, generator=generator) * (0.5 * v).exp())
        sigma = torch.sigmoid(0.3 + torch.randn(cfg.prior_batch, generator=generator))
        s = sigma.view(-1, 1, 1, 1, 1)
        eps = torch.randn(z.shape, generator=generator)
        z_sigma, target = (1 - s) * z + s * eps, z - eps
        pred = networks["dit"](z_sigma.to(cfg.device), sigma.to(cfg.device), features, mask)
        return F.mse_loss(pred.float(), target.to(cfg.device))

    @torch.no_grad()
    def held_out() -> float:
        """The loss on the held-out clips at fixed noise."""
        generator, losses = torch.Generator().manual_seed(0), []
        for index in range(train_count, len(mean), 16):
            z = mochi_vae.to_dit_space(mean[index : index + 16].float())
            texts = [several[0] for several in captions[index : index + 16]]
            features, mask = t5.encode(networks["t5"], tokenizer, texts, cfg.device)
            sigma = torch.linspace(0.05, 0.95, len(z))
            s, eps = sigma.view(-1, 1, 1, 1, 1), torch.randn(z.shape, generator=generator)
            pred = networks["dit"](((1 - s) * z + s * eps).to(cfg.device), sigma.to(cfg.device), features, mask)
            losses.append(F.mse_loss(pred.float().cpu(), z - eps).item())
        return float(np.mean(losses))

    @torch.no_grad()
    def look() -> str:
        rows = []
        for index in range(train_count, train_count + 6):
            frames = sample_prior(networks, tokenizer, decoder, captions[index][0], seed=index)
            rows.append((frames, captions[index][0]))
        media.sheet(cfg.out / "prior.png", rows)
        return f"held-out loss {held_out():.4f}, see {cfg.out / 'prior.png'}"

    return fit("prior", cfg, networks, cfg.prior_steps, 1.5e-3, 0.998, loss_of, look)


@torch.no_grad()
def sample_prior(
    networks: nn.ModuleDict, tokenizer: t5.Tokenizer, decoder: nn.Module, caption: str, seed: int
) -> np.ndarray:
    """One clip of the prior for one caption: (F, H, W, 3) uint8."""
    features, mask = t5.encode(networks["t5"], tokenizer, [caption, ""], next(decoder.parameters()).device)
    latent = (1, 12, (FRAMES - 1) // 6 + 1, SIZE // 8, SIZE // 8)
    noise = torch.randn(latent, generator=torch.Generator().manual_seed(seed)).to(features)
    text, null_text = (features[:1], mask[:1]), (features[1:], mask[1:])
    z_dit = sample(MusicInfuser(copy.deepcopy(networks["dit"])), noise, linear_quadratic(24), text, null_text, cfg=3.0)
    return to_frames(decoder(mochi_vae.to_vae_space(z_dit)))[0]


# ---------------------------------------------------------------- stage 6: export, and the command


def export(cfg: PretrainConfig, vae: nn.ModuleDict, encoder: audio.Wav2Vec2, prior: nn.ModuleDict) -> None:
    """Write the weights in the official layouts, in bf16 but for the few tensors that stay float32."""
    islands = {name: t for name, t in prior["dit"].state_dict().items() if name.endswith(KEEP_FLOAT32)}
    for network in (vae, encoder, prior):
        network.bfloat16()
    size = {"default_height": str(SIZE), "default_width": str(SIZE)}
    defaults = size | {"default_steps": "24", "default_cfg": "3.0", "default_prompt": PROMPT}
    groups = {"norm_groups": str(vae["encoder"].norm_groups)}
    tensors.save(cfg.weights / "encoder.safetensors", vae["encoder"].state_dict(), groups)
    tensors.save(cfg.weights / "decoder.safetensors", vae["decoder"].state_dict(), groups)
    tensors.save(cfg.weights / "dit.safetensors", prior["dit"].state_dict() | islands, defaults)
    audio.save_wav2vec2(encoder, cfg.weights / "wav2vec2" / "model.safetensors")
    t5.save_t5(prior["t5"], cfg.weights / "t5" / "model.safetensors")
    shutil.copyfile(cfg.out / "t5" / "spiece.model", cfg.weights / "t5" / "spiece.model")
    total = sum(file.stat().st_size for file in cfg.weights.rglob("*") if file.is_file())
    print(f"wrote {cfg.weights} ({total / 1e6:.1f} MB)")


def main() -> None:
    cfg = from_cli(PretrainConfig)

    def wanted(*stages: str) -> bool:
        return cfg.stage in ("all", *stages)

    # a stage that is needed by the wanted one and finished costs no more than reading its checkpoint
    if wanted("audio", "export"):
        encoder = train_audio(cfg)
    if cfg.stage == "audio":
        return
    frames, captions = make_world(cfg)
    if wanted("vae", "decoder", "prior", "export"):
        vae = train_vae(cfg, frames)
    if wanted("decoder", "export"):
        vae = train_decoder(cfg, frames, vae)
    if wanted("prior", "export"):
        mean, logvar = encode_world(cfg, frames, vae["encoder"])
        prior = train_prior(cfg, captions, mean, logvar, vae["decoder"])
    if wanted("export"):
        export(cfg, vae, encoder, prior)


if __name__ == "__main__":
    run(main)
