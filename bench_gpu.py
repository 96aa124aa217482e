"""The networks at full size with random weights: seconds, TFLOP/s and peak memory, beside diffusers.

Concept   `python bench.py gpu` measures on one card, most important first: what the card can do; the transformer, eager
          and compiled, per attention kernel and prompt length; diffusers' transformer on the same weights; a training
          step; decoding and encoding; loading from disk. Random weights are as fast as trained ones.
Paper     arXiv 2503.14505v2, Sec. 5.1: 73 frames of 480x848, 16 layers that hear the music, LoRA of rank 64.
"""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import tensors
from bench_full import SCALES, TF, FullSize, Scale, attention, bytes_of, name_of
from bench_peers import diffusers_transformer
from bench_rows import GB, Rows, clock, hardware, peak_host_gb, relative_error, wait
from bench_weights import fill, lively
from config import UserError, flag
from mochi_dit import compile_blocks, load_dit
from mochi_vae import Decoder, Encoder

GROUPS = ("device", "dit", "peer", "train", "vae", "compiled", "load", "more", "t5")


@dataclass(frozen=True)
class GpuBench:
    """Measure the networks at full size on one device; every row is written as soon as it is measured."""

    out: Path = flag(Path("bench/gpu.json"), help="result")
    device: str = flag("cuda", help="cuda, cuda:N or cpu")
    scale: str = flag("full", help=f"{' or '.join(SCALES)}: the official size, or one for trying this command")
    rows: str = flag(",".join(GROUPS), help="what to measure, in the order given here")
    budget_s: float = flag(600.0, help="seconds after which no further row begins; a running one is stopped")
    scratch: Path | None = flag(None, help="folder for the file that is loaded (default: the system's temporary one)")

    def __post_init__(self):
        unknown = set(self.rows.split(",")) - set(GROUPS)
        if unknown:
            raise UserError(f"--rows {self.rows}: unknown {', '.join(sorted(unknown))}; expected {','.join(GROUPS)}")
        if self.scale not in SCALES:
            raise UserError(f"--scale {self.scale}: expected {' or '.join(SCALES)}")


def bench_gpu(cfg: GpuBench) -> dict:
    """All chosen groups, in their order; returns what was written."""
    device = torch.device(cfg.device)
    head = {"command": f"bench.py gpu --device {cfg.device} --scale {cfg.scale} --rows {cfg.rows}"}
    rows = Rows(cfg.out, head | {"hardware": hardware(cfg.device)}, cfg.budget_s)
    bench = Bench(rows, SCALES[cfg.scale], device, cfg.scratch)
    measures = {
        "device": bench.device_ceilings,
        "dit": bench.transformer,
        "peer": bench.peer,
        "train": bench.training,
        "vae": bench.vae,
        "compiled": bench.compiled,
        "load": bench.loading,
        "more": bench.more,
        "t5": bench.text,
    }
    for group in GROUPS:
        if group in cfg.rows.split(","):
            try:
                measures[group]()
            except Exception as error:  # one group's failure between its rows is not the next one's
                rows.add({"name": group, "failed": f"{type(error).__name__}: {str(error)[:400]}"})
    return rows.head | {"rows": rows.rows}


class Bench(FullSize):
    """One method per group of rows. The transformer is made once and shared by the groups that leave it as it is."""

    def __init__(self, rows: Rows, scale: Scale, device: torch.device, scratch: Path | None):
        super().__init__(scale, device)
        self.rows, self.scratch = rows, scratch

    def device_ceilings(self) -> None:
        """A large product of random matrices (zeros draw less power and run faster), and a copy."""
        n = self.scale.square
        self.rows.row("ceiling: product", self.ceiling_product(n), 20)
        self.rows.row("ceiling: copy", self.ceiling_copy(16 * n * n), 20)

    def ceiling_product(self, n: int):
        def measure():
            a, b = (torch.randn(n, n, device=self.device, dtype=self.dtype) for _ in range(2))
            told = clock(lambda: [a @ b for _ in range(10)], self.device, 7)
            return told | {"size": n, "tflop_per_s": 10 * 2 * n**3 / told["median_s"] / TF}

        return measure

    def ceiling_copy(self, count: int):
        def measure():
            a = torch.randn(count, device=self.device, dtype=self.dtype)
            b = torch.empty_like(a)
            told = clock(lambda: [b.copy_(a) for _ in range(10)], self.device, 7)
            return told | {"gb_per_s": 10 * 2 * a.numel() * a.element_size() / told["median_s"] / GB}

        return measure

    def transformer(self) -> None:
        """One pass per attention kernel; steps with CFG (two passes); where the time goes."""
        self.rows.row("make the transformer", lambda: {"weights_gb": bytes_of(self.dit()) / GB}, 60)
        found = {}
        for kernels in self.choices():
            told = self.rows.row(f"pass, 73 frames, {name_of(kernels)}", self.one_pass(73, 256, kernels), 30)
            found[kernels] = told.get("median_s", float("inf"))
        self.kernels = min(found, key=found.get)
        self.rows.row("CFG step, 73 frames, PyTorch's attention", self.cfg_step(73, 256, None), 30)
        if self.kernels is not None:
            self.rows.row(f"CFG step, 73 frames, {self.told()}", self.cfg_step(73, 256, self.kernels), 30)
        self.rows.row(f"CFG step, 73 frames, 40 text tokens, {self.told()}", self.cfg_step(73, 40, self.kernels), 30)
        self.rows.row(f"shares of a pass, 73 frames, {self.told()}", self.shares(73, 256), 40)
        self.rows.row(f"CFG step, 145 frames, {self.told()}", self.cfg_step(145, 256, self.kernels, 2), 40)

    def peer(self) -> None:
        """diffusers' transformer on the same weights, with PyTorch's attention as it comes, and with ours."""
        twin = []
        self.rows.row("diffusers: make", lambda: twin.append(diffusers_transformer(self.dit())) or {}, 60)
        if not twin:
            return

        @torch.no_grad()
        def agreement():
            z, sigma, text, mask, _ = self.inputs(73, 256)
            with attention(self.kernels):
                theirs = twin[0](z, text, 1000 * (1 - sigma), mask.to(self.device), return_dict=False)[0]
                return relative_error(self.dit()(z, sigma, text, mask), theirs)

        self.rows.row("diffusers: outputs agree", agreement, 30)
        self.rows.row("diffusers: CFG step, 73 frames, PyTorch's attention", self.peer_step(twin[0], None), 30)
        if self.kernels is not None:
            step = self.peer_step(twin[0], self.kernels)
            self.rows.row(f"diffusers: CFG step, 73 frames, {self.told()}", step, 30)

    def training(self) -> None:
        """A step of the paper's recipe: batch 1, 73 frames; frozen bf16 weights, float32 adapters and optimiser."""
        depth = self.scale.dit["depth"]
        for recompute in (depth, depth * 3 // 4, depth // 2):
            self.rows.row(f"training step, {recompute} blocks recomputed", self.train_step(recompute), 60)

    def compiled(self) -> None:
        """The steps above with compiled blocks: ours, training, diffusers."""
        compile_blocks(self.dit(), self.backend)
        self.rows.row(f"CFG step, 73 frames, compiled, {self.told()}", self.cfg_step(73, 256, self.kernels), 150)
        self.rows.row(f"shares of a pass, 73 frames, compiled, {self.told()}", self.shares(73, 256), 40)
        self.compile_off()
        twin = []
        self.rows.row("diffusers: make", lambda: twin.append(diffusers_transformer(self.dit())) or {}, 60)
        for block in twin[0].transformer_blocks if twin else ():
            block.compile(backend=self.backend)
        if twin:
            step = self.peer_step(twin.pop(), self.kernels)
            self.rows.row(f"diffusers: CFG step, 73 frames, compiled, {self.told()}", step, 150)
            del step
        depth = self.scale.dit["depth"]
        self.rows.row(f"training step, {depth} blocks recomputed, compiled", self.train_step(depth, True), 200)

    def vae(self) -> None:
        """Decoding and encoding 73 frames; the encoder has the widths of the published one (half of the decoder's)."""
        latent = torch.randn(1, 12, 13, self.scale.height // 8, self.scale.width // 8, device=self.device)
        with torch.device(self.device):
            decoder = lively(Decoder(self.scale.vae, norm_groups=self.scale.groups).to(self.dtype))

        def stream():
            for piece in decoder.stream(latent):
                piece[:, :, -1].sum()

        @torch.no_grad()
        def whole():
            return decoder(latent)

        @torch.no_grad()
        def agreement():
            return relative_error(torch.cat([*decoder.stream(latent)], 2), decoder(latent))

        self.rows.row("decode 73 frames, streamed", lambda: clock(stream, self.device, 2), 60)
        self.rows.row("decode 73 frames, whole", lambda: clock(whole, self.device, 2), 60)
        self.rows.row("decode, streamed and whole agree", agreement, 60)
        with torch.device(self.device):
            widths = tuple(w // 2 for w in self.scale.vae)
            encoder = lively(Encoder(widths, norm_groups=self.scale.groups).to(self.dtype))
            frames = torch.rand(1, 3, 73, self.scale.height, self.scale.width).to(self.dtype) * 2 - 1
        encode = torch.no_grad()(lambda: encoder(frames))
        self.rows.row("encode 73 frames", lambda: clock(encode, self.device, 2), 60)
        for level, frames in enumerate((6, 6, 2)):
            self.rows.row(f"ways to convolve, decoder level {level}", self.convolutions(level, frames), 20)

    def convolutions(self, level: int, frames: int):
        """3x3x3, of one streamed latent frame: as such, channels last, and as 2-D on three stacked frames."""
        C, rows, columns = self.scale.vae[level], self.scale.height >> level, self.scale.width >> level

        @torch.no_grad()
        def measure():
            x = torch.randn(1, C, frames + 2, rows + 2, columns + 2, device=self.device, dtype=self.dtype)
            w = torch.randn(C, C, 3, 3, 3, device=self.device, dtype=self.dtype)
            last, w_last = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, w))
            flat = w.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)  # (C, 3 C, 3, 3)

            def stacked():
                film = last[0].transpose(0, 1)  # (T, C, H, W)
                return F.conv2d(torch.cat((film[:-2], film[1:-1], film[2:]), 1), flat)

            flop = 2 * 27 * C * C * frames * rows * columns
            ways = {"plain": lambda: F.conv3d(x, w), "channels last": lambda: F.conv3d(last, w_last), "2-D": stacked}
            return {
                name: {**told, "tflop_per_s": flop / told["median_s"] / TF}
                for name, told in ((name, clock(way, self.device, 5)) for name, way in ways.items())
            }

        return measure

    def loading(self) -> None:
        """A part of the transformer, bf16, from a file that the system does not hold in memory, to the device."""
        self._dit = None

        def measure():
            with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
                file = Path(folder) / "dit.safetensors"
                began = time.perf_counter()
                tensors.save(file, self.make_dit(self.scale.loaded).state_dict())
                told = {"file_gb": file.stat().st_size / GB, "write_s": time.perf_counter() - began}
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                for state in ("cold", "warm"):
                    if state == "cold":
                        forget(file)
                    base, began = peak_host_gb(reset=True), time.perf_counter()
                    model = load_dit(file, self.device, self.dtype)
                    wait(self.device)
                    seconds = time.perf_counter() - began
                    told[f"{state}_s"], told[f"{state}_gb_per_s"] = seconds, told["file_gb"] / seconds
                    told[f"{state}_host_peak_above_gb"] = peak_host_gb() - base
                    del model
                return told

        self.rows.row("load a bf16 file", measure, 150)

    def more(self) -> None:
        """What is nice to know: with the music, and the long clip compiled."""
        self.rows.row(f"pass, 73 frames, with the music, LoRA merged, {self.told()}", self.musical_pass(), 40)
        self._dit = None
        self.rows.row("training step, no block recomputed", self.train_step(0), 60)
        torch._dynamo.reset()
        self._dit = None
        compile_blocks(self.dit(), self.backend)
        self.rows.row(f"CFG step, 145 frames, compiled, {self.told()}", self.cfg_step(145, 256, self.kernels, 2), 150)
        self._dit = None

    def text(self) -> None:
        """T5 v1.1 XXL on 256 tokens."""
        self._dit = None

        def measure():
            import t5

            with torch.device("meta"):
                model = t5.T5(**self.scale.t5)
            fill(model, self.device, self.dtype, ())
            ids = torch.randint(0, self.scale.t5["vocab"], (1, 256), device=self.device)
            encode = torch.no_grad()(lambda: model(ids, torch.ones_like(ids, dtype=torch.bool)))
            return {"weights_gb": bytes_of(model) / GB} | clock(encode, self.device)

        self.rows.row("T5, 256 tokens", measure, 60)


def forget(file: Path) -> None:
    """Ask the system to drop its copy of the file, so that reading it goes to the disk."""
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
