"""Ours beside what people would use instead, on a CPU: the same weights and inputs, in one process, taking turns.

Concept   `python bench.py cpu` times each pair round by round, ours and the peer's, the first alternating, after it has
          checked that their outputs agree; a ratio is the median over the rounds. Peak memory is measured in a process
          of its own for each side. Two sizes: that of the weights in --weights, and a middle one.
Paper     none.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import audio
import mochi_vae
import t5
from bench_flop import pass_flop, tokens_of, train_flop
from bench_peers import (
    diffusers_transformer,
    diffusers_vae,
    hang_adapters,
    transformers_t5,
    transformers_wav2vec2,
)
from bench_rows import Rows, hardware, peak_host_gb, relative_error
from bench_weights import fill, lively
from config import UserError, flag
from data import Batch
from mochi_dit import KEEP_FLOAT32, MochiDiT, compile_blocks, load_dit
from model import Adapters, MusicInfuser
from sample import null_of, sample
from schedule import linear_quadratic
from train import velocity_error

SIZES = ("baby", "middle")
CFG_STEPS = 4  # what a sampler does once a video (text, positions) is shared by some steps, as in use
GF = 1e9
CPU = torch.device("cpu")


@dataclass(frozen=True)
class CpuBench:
    """Ours against diffusers and transformers on the CPU: seconds, ratio, GFLOP/s, peak memory, agreement."""

    out: Path = flag(Path("bench/cpu.json"), help="result")
    weights: Path = flag(Path("weights/baby"), help="what `baby` is the size of")
    rows: str = flag("all", help="pairs to measure: all, or names such as pass,t5")
    sizes: str = flag(",".join(SIZES), help="baby, middle or both")
    frames: int = flag(73, help="video frames at the baby's size")
    pixels: int = flag(96, help="height and width at the baby's size")
    rounds: int = flag(15, help="rounds of each pair, after one that does not count")
    box_s: float = flag(60.0, help="seconds a pair may take; it then has fewer rounds, three at least")
    threads: int = flag(2, help="CPU threads")
    compile: str = flag("none", help="transformers whose blocks torch.compile fuses: none, ours or both")
    memory: bool = flag(True, help="peak memory too, in processes of its own")
    curves: Path | None = flag(None, help="PNG of the cost against frames and pixels, measured too (minutes)")

    def __post_init__(self):
        if set(self.sizes.split(",")) - set(SIZES):
            raise UserError(f"--sizes {self.sizes}: expected {' or '.join(SIZES)} or both with a comma between")
        if self.compile not in ("none", "ours", "both"):
            raise UserError(f"--compile {self.compile}: expected none, ours or both")
        if self.rows != "all" and (unknown := set(self.rows.split(",")) - set(PAIRS)):
            raise UserError(f"--rows {self.rows}: unknown {', '.join(sorted(unknown))}; expected {','.join(PAIRS)}")


class Pair(NamedTuple):
    """The same work, by us and by a peer."""

    peer: str
    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    flop: float | None
    alike: Callable[[Tensor, Tensor], dict] = relative_error  # how far the two outputs are apart


class Size(NamedTuple):
    """Networks with their weights, and the size of the clip."""

    dit: Callable[[], MochiDiT]
    encoder: Callable[[], mochi_vae.Encoder]
    decoder: Callable[[], mochi_vae.Decoder]
    t5: Callable[[], t5.T5]
    wav2vec2: Callable[[], audio.Wav2Vec2]
    frames: int
    pixels: int
    text: int  # tokens of the prompt
    batch: int  # of a training step
    audio_dim: int
    compile: str  # none, ours or both

    def fuse(self, dit: MochiDiT, peer: torch.nn.Module) -> None:
        """Compile the blocks of ours, or of both."""
        if self.compile != "none":
            compile_blocks(dit)
        if self.compile == "both":
            for block in peer.transformer_blocks:
                block.compile()


def baby(cfg: CpuBench) -> Size:
    folder = cfg.weights
    return Size(
        lambda: load_dit(folder / "dit.safetensors"),
        lambda: mochi_vae.load_encoder(folder / "encoder.safetensors"),
        lambda: mochi_vae.load_decoder(folder / "decoder.safetensors"),
        lambda: t5.load_t5(folder / "t5"),
        lambda: audio.load_wav2vec2(folder / "wav2vec2"),
        cfg.frames,
        cfg.pixels,
        text=40,
        batch=8,
        audio_dim=128,
        compile=cfg.compile,
    )


def middle(cfg: CpuBench) -> Size:
    """As large as two cores allow: products of matrices dominate, as at the official size."""
    vae = (32, 64, 128, 192), (1, 1, 1, 1, 1), ((1, 2, 2), (2, 2, 2), (3, 2, 2))

    def random(build, *arguments, **named):
        with torch.device("meta"):
            module = build(*arguments, **named)
        return fill(module, CPU, torch.float32, KEEP_FLOAT32)

    return Size(
        lambda: random(MochiDiT, depth=2, width=1536, text_width=768, num_heads=12, text_dim=1024),
        lambda: lively(mochi_vae.Encoder(*vae, attention=(False, True, True, True, True))),
        lambda: lively(mochi_vae.Decoder(*vae)),
        lambda: random(t5.T5, vocab=1000, width=1024, depth=4, heads=16, kv=64, ffn=2816),
        lambda: random(audio.Wav2Vec2),
        frames=37,
        pixels=160,
        text=256,
        batch=1,
        audio_dim=768,
        compile=cfg.compile,
    )


def clip(size: Size, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """z, text and mask (all tokens count) of a batch."""
    torch.manual_seed(0)
    side = size.pixels // 8
    z = torch.randn(batch, 12, (size.frames - 1) // 6 + 1, side, side)
    return z, torch.ones(batch, size.text, dtype=torch.bool), z


def one_pass(size: Size) -> Pair:
    """One forward pass of the transformer."""
    dit = size.dit()
    peer, (z, mask, _), sigma = diffusers_transformer(dit), clip(size, 1), torch.tensor([0.5])
    size.fuse(dit, peer)
    text = torch.randn(1, size.text, dit.t5_yproj.in_features)
    flop = pass_flop(dit, tokens_of(z), size.text)
    return Pair(
        "diffusers",
        lambda: dit(z, sigma, text, mask),
        lambda: peer(z, text, 1000 * (1 - sigma), mask, return_dict=False)[0],
        flop,
    )


def cfg_step(size: Size) -> Pair:
    """CFG_STEPS steps of the sampler with guidance; diffusers' pipeline puts both prompts in one batch."""
    dit = size.dit()
    peer, (z, mask, _), scale = diffusers_transformer(dit), clip(size, 1), 6.0
    size.fuse(dit, peer)
    model, text = MusicInfuser(dit), torch.randn(1, size.text, dit.t5_yproj.in_features)
    null = null_of((text, mask))
    texts, masks, sigmas = torch.cat((text, null[0])), torch.cat((mask, null[1])), linear_quadratic(CFG_STEPS)

    def theirs():
        latent = z
        for sigma, following in zip(sigmas, sigmas[1:]):
            time = torch.full((2,), 1000 * (1 - sigma))
            pair = peer(latent.expand(2, -1, -1, -1, -1), texts, time, masks, return_dict=False)[0]
            latent = latent + (sigma - following) * (pair[1:] + scale * (pair[:1] - pair[1:]))
        return latent

    flop = CFG_STEPS * (pass_flop(dit, tokens_of(z), size.text) + pass_flop(dit, tokens_of(z), 0))
    return Pair("diffusers", lambda: sample(model, z, sigmas, (text, mask), null, cfg=scale), theirs, flop)


def training_step(size: Size) -> Pair:
    """Forward, backward and AdamW of the adapters; diffusers' transformer gets them by hooks."""
    layers, rank = range(len(size.dit().blocks) // 2), 16
    z, mask, _ = clip(size, size.batch)
    eps, sound = torch.randn_like(z), torch.randn(size.batch, 120, size.audio_dim)
    sigma = torch.linspace(0.1, 0.9, size.batch)
    dits = size.dit(), size.dit()
    text = torch.randn(size.batch, size.text, dits[0].t5_yproj.in_features)
    adapters = [Adapters(dit, layers, size.audio_dim, rank, rank, zero_init=False) for dit in dits]
    for some in adapters:
        fill(some.blocks, CPU, torch.float32, ()).requires_grad_(True)  # LoRA's B starts at zero
    batch, s = Batch(z, text, mask, sound, []), sigma.view(-1, 1, 1, 1, 1)
    model, peer = MusicInfuser(dits[0], adapters[0]), diffusers_transformer(dits[1])
    trained = model.adapter_parameters(), hang_adapters(peer, adapters[1], sound, z.shape[2])
    size.fuse(dits[0], peer)
    optimizers = [torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0) for parameters in trained]

    def error_of_ours():
        return velocity_error(model, batch, sound, sigma, eps, "float32").mean()

    def error_of_theirs():
        velocity = peer((1 - s) * z + s * eps, text, 1000 * (1 - sigma), mask, return_dict=False)[0]
        return (velocity - (z - eps)).square().mean()

    def step(loss_of, optimizer):
        with torch.enable_grad():
            loss = loss_of()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach().view(1)

    flop = size.batch * train_flop(model, tokens_of(z), size.text, z.shape[2], 0)
    return Pair(
        "diffusers with hooks",
        lambda: step(error_of_ours, optimizers[0]),
        lambda: step(error_of_theirs, optimizers[1]),
        flop,
    )


def text_encoder(size: Size) -> Pair:
    model = size.t5()
    peer, length = transformers_t5(model), max(size.text, 64)
    ids, mask = torch.arange(length)[None] % model.embed.num_embeddings, torch.ones(1, length, dtype=torch.bool)
    linears = sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "blocks" in name)
    inner = model.blocks[0].q.out_features
    flop = 2 * length * linears + len(model.blocks) * 4 * length**2 * inner
    return Pair("transformers", lambda: model(ids, mask), lambda: peer(ids, mask.long()).last_hidden_state, flop)


def audio_encoder(size: Size) -> Pair:
    model = size.wav2vec2()
    peer, sound = transformers_wav2vec2(model), audio.prepare(torch.randn(60_000), size.frames)
    return Pair("transformers", lambda: model(sound), lambda: peer(sound).last_hidden_state, None)


def decode(size: Size) -> Pair:
    """Latent to frames, piece by piece as our sampler does it; diffusers decodes the film whole."""
    decoder = size.decoder()
    (_, peer), (z, _, _) = diffusers_vae(size.encoder(), decoder), clip(size, 1)

    def late(ours, theirs):  # what surplus first frames do to diffusers' output has faded by then (see the tests)
        first = ours.shape[2] // 2
        told = {"frames_compared": f"{first} to {ours.shape[2] - 1}"}
        return told | relative_error(ours[:, :, first:], theirs[:, :, first:])

    return Pair("diffusers", Pieces(decoder, z), lambda: peer(z)[0][:, :, 5:], None, late)


class Pieces:
    """Decode in pieces; only the uint8 pictures of a piece are kept, as a sampler hands them on, unless `whole`."""

    def __init__(self, decoder, z):
        self.decoder, self.z, self.whole = decoder, z, False

    def __call__(self):
        pieces = self.decoder.stream(self.z)
        if self.whole:
            return torch.cat([*pieces], 2)
        return [(piece.clamp(-1, 1) * 127.5 + 127.5).byte() for piece in pieces]


def encode(size: Size) -> Pair:
    encoder = size.encoder()
    peer, _ = diffusers_vae(encoder, size.decoder())
    frames = torch.rand(1, 3, size.frames, size.pixels, size.pixels) * 2 - 1
    return Pair("diffusers", lambda: torch.cat(encoder(frames), 1), lambda: peer(frames)[0], None)


PAIRS = {
    "pass": one_pass,
    "cfg": cfg_step,
    "train": training_step,
    "t5": text_encoder,
    "wav2vec2": audio_encoder,
    "decode": decode,
    "encode": encode,
}


# ------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def take_turns(pair: Pair, rounds: int, box_s: float) -> dict:
    """Seconds of both sides, in turns: medians with quartiles, and those of the ratio theirs / ours of each round."""
    if isinstance(pair.ours, Pieces):
        pair.ours.whole = True
    error = pair.alike(pair.ours(), pair.theirs())
    if isinstance(pair.ours, Pieces):
        pair.ours.whole = False
    sides, seconds, end = (pair.ours, pair.theirs), ([], []), time.monotonic() + box_s
    for i in range(-1, rounds):
        if i >= 3 and time.monotonic() > end:
            break
        for side in (0, 1) if i % 2 else (1, 0):
            began = time.perf_counter()
            sides[side]()
            if i >= 0:
                seconds[side].append(time.perf_counter() - began)
    ours, theirs = (spread(s) for s in seconds)
    ratio = spread([b / a for a, b in zip(*seconds)])
    told = {"peer": pair.peer, "ratio": ratio, "ours_s": ours, "theirs_s": theirs, "rounds": len(seconds[0]), **error}
    if pair.flop:
        told |= {"gflop": pair.flop / GF, "gflop_per_s": pair.flop / GF / ours["median"]}
    return told


def spread(values: list[float]) -> dict:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "quartiles": [low, high]}


def product_rate() -> float:
    """GFLOP/s of a product of two random matrices of 2048 x 2048: what the shares are measured by."""
    a, b = torch.randn(2, 2048, 2048)
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / GF / statistics.median(seconds[1:])


def peak_memory(name: str, size: str, cfg: CpuBench, side: str) -> float:
    """MB above what the process held before, at the peak of one run, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_peak, (name, size, cfg, side))


@torch.no_grad()
def measure_peak(name: str, size: str, cfg: CpuBench, side: str) -> float:
    torch.set_num_threads(cfg.threads)
    pair = PAIRS[name](sizes(cfg)[size])
    base = peak_host_gb(reset=True)
    (pair.ours if side == "ours" else pair.theirs)()
    return (peak_host_gb() - base) * 1000


def sizes(cfg: CpuBench) -> dict[str, Size]:
    return {"baby": baby(cfg), "middle": middle(cfg)}


def bench_cpu(cfg: CpuBench) -> dict:
    torch.set_num_threads(cfg.threads)
    rate = product_rate()
    command = f"bench.py cpu --rows {cfg.rows} --sizes {cfg.sizes} --frames {cfg.frames} --pixels {cfg.pixels}"
    command += f" --compile {cfg.compile}"
    head = {"command": command, "hardware": hardware("cpu"), "product_gflop_per_s": rate}
    rows = Rows(cfg.out, head, budget_s=3600)
    for size in cfg.sizes.split(","):
        for name in PAIRS if cfg.rows == "all" else cfg.rows.split(","):

            def measure(name=name, size=size):
                told = take_turns(PAIRS[name](sizes(cfg)[size]), cfg.rounds, cfg.box_s)
                if "gflop_per_s" in told:
                    told["share_of_product"] = told["gflop_per_s"] / rate
                if cfg.memory:
                    told |= {f"{side}_peak_mb": peak_memory(name, size, cfg, side) for side in ("ours", "theirs")}
                return told

            rows.row(f"{name}, {size}", measure, 10 * cfg.box_s + 60)
    if cfg.curves:
        from bench_curves import draw_curves

        rows.row("curves", lambda: draw_curves(cfg), 3000)
    return rows.head | {"rows": rows.rows}


def table(result: dict) -> str:
    """The rows as Markdown, for README."""
    lines = [
        "| what | size | peer | ours, s | peer, s | peer / ours | GFLOP/s (share) | peak, MB: ours | peer | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if "ratio" not in row:
            continue
        name, size = row["name"].split(", ")
        low, high = row["ratio"]["quartiles"]
        rate = f"{row['gflop_per_s']:.0f} ({row['share_of_product']:.0%})" if "gflop_per_s" in row else ""
        peaks = [f"{row[f'{side}_peak_mb']:.0f}" if f"{side}_peak_mb" in row else "" for side in ("ours", "theirs")]
        lines.append(
            f"| {name} | {size} | {row['peer']} | {row['ours_s']['median']:.3f} | {row['theirs_s']['median']:.3f} "
            f"| {row['ratio']['median']:.2f} [{low:.2f}, {high:.2f}] | {rate} | {peaks[0]} | {peaks[1]} "
            f"| {row['max_error']:.0e} |"
        )
    return "\n".join(lines)
