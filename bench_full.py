"""What `bench_gpu.py` times: passes, steps with CFG and training steps of the transformer, with random weights.

Paper     arXiv 2503.14505v2, Sec. 5.1: 73 frames of 480x848, 16 layers that hear the music, LoRA of rank 64, AdamW.
"""

import contextlib
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from adapters import LoRALinear
from bench_flop import pass_flop, tokens_of, train_flop
from bench_rows import clock, wait
from bench_weights import fill
from mochi_dit import KEEP_FLOAT32, MochiDiT, compile_blocks
from model import OFFICIAL_LAYERS, Adapters, MusicInfuser

TF = 1e12


class Scale(NamedTuple):
    """Sizes to measure at."""

    dit: dict  # arguments of MochiDiT
    layers: tuple[int, ...]  # that hear the music
    rank: int  # of the LoRA
    height: int
    width: int
    vae: tuple[int, ...]  # widths of the decoder
    groups: int
    t5: dict
    square: int  # side of the matrices that give the ceiling
    loaded: int  # blocks of the transformer that is written to disk and loaded


SCALES = {
    "full": Scale(
        {"depth": 48, "width": 3072, "text_width": 1536, "num_heads": 24, "text_dim": 4096},
        OFFICIAL_LAYERS, 64, 480, 848, (128, 256, 512, 768), 32,
        {"vocab": 32128, "width": 4096, "depth": 24, "heads": 64, "kv": 64, "ffn": 10240}, 8192, 12,
    ),
    "tiny": Scale(
        {"depth": 3, "width": 96, "text_width": 96, "num_heads": 4, "text_dim": 64},
        (0, 2), 4, 32, 48, (64, 64, 64, 64), 4,
        {"vocab": 64, "width": 64, "depth": 2, "heads": 2, "kv": 32, "ffn": 64}, 256, 3,
    ),
}  # fmt: skip


class FullSize:
    """The transformer at one scale, made when it is first asked for, and what can be measured with it.

    Each of `one_pass`, `cfg_step`, `peer_step`, `musical_pass`, `train_step` and `shares` returns a function that
    measures and returns a row. `kernels` is the attention kernel in use; None leaves the choice to PyTorch.
    """

    def __init__(self, scale: Scale, device: torch.device):
        self.scale, self.device = scale, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.backend = "inductor" if device.type == "cuda" else "aot_eager"
        self.kernels: SDPBackend | None = None
        self._dit: MochiDiT | None = None

    def dit(self) -> MochiDiT:
        if self._dit is None:
            self._dit = self.make_dit(self.scale.dit["depth"])
        return self._dit

    def make_dit(self, depth: int) -> MochiDiT:
        with torch.device("meta"):
            dit = MochiDiT(**(self.scale.dit | {"depth": depth}))
        return fill(dit, self.device, self.dtype, KEEP_FLOAT32)

    def choices(self) -> list[SDPBackend | None]:
        if self.device.type != "cuda":
            return [None]
        return [None, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]

    def told(self) -> str:
        return name_of(self.kernels)

    def bare(self) -> None:
        """Take LoRA and compilation off the transformer again (a merged LoRA stays in its weights)."""
        for block in self.dit().blocks:
            for name, module in list(block.attn.named_children()):
                if isinstance(module, LoRALinear):
                    setattr(block.attn, name, module.linear)
        self.compile_off()

    def compile_off(self) -> None:
        for block in self.dit().blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()

    def inputs(self, frames: int, length: int):
        """z, sigma, text of 256 columns, mask with that many tokens, and the mask of the empty prompt."""
        torch.manual_seed(0)
        shape = (1, 12, (frames - 1) // 6 + 1, self.scale.height // 8, self.scale.width // 8)
        z = torch.randn(shape, device=self.device, dtype=self.dtype)
        text = torch.randn(1, 256, self.scale.dit["text_dim"], device=self.device, dtype=self.dtype)
        mask = (torch.arange(256) < length)[None]
        return z, torch.full((1,), 0.5, device=self.device), text, mask, torch.zeros_like(mask)

    def one_pass(self, frames: int, length: int, kernels):
        def measure():
            z, sigma, text, mask, _ = self.inputs(frames, length)
            dit = self.dit()

            @torch.no_grad()
            def one():
                with attention(kernels):
                    return dit(z, sigma, text, mask)

            flop = pass_flop(dit, tokens_of(z), length)
            return self.rate(clock(one, self.device), flop)

        return measure

    def cfg_step(self, frames: int, length: int, kernels, repeats: int = 3):
        def measure():
            z, sigma, text, mask, none = self.inputs(frames, length)
            dit, scale = self.dit(), 6.0

            @torch.no_grad()
            def two():
                with attention(kernels):
                    v = scale * dit(z, sigma, text, mask).float()
                    v += (1 - scale) * dit(z, sigma, torch.zeros_like(text), none).float()
                    return z + 0.01 * v

            flop = pass_flop(dit, tokens_of(z), length) + pass_flop(dit, tokens_of(z), 0)
            return self.rate(clock(two, self.device, repeats), flop) | {"finite": bool(two().isfinite().all())}

        return measure

    def peer_step(self, twin, kernels):
        def measure():
            z, sigma, text, mask, none = self.inputs(73, 256)
            texts, masks = torch.cat((text, torch.zeros_like(text))), torch.cat((mask, none)).to(self.device)
            time, z = 1000 * (1 - sigma).expand(2), z.expand(2, -1, -1, -1, -1)

            @torch.no_grad()
            def two():  # as its pipeline does: both prompts in one batch
                with attention(kernels):
                    return twin(z, texts, time, masks, return_dict=False)[0]

            return clock(two, self.device)

        return measure

    def musical_pass(self):
        def measure():
            z, sigma, text, mask, _ = self.inputs(73, 256)
            model = self.infuser().eval()
            model.merge()
            audio = torch.randn(1, 120, 768, device=self.device, dtype=self.dtype)
            model.adapters.to(self.dtype)

            @torch.no_grad()
            def one():
                with attention(self.kernels):
                    return model(z, sigma, text, mask, audio)

            hears = len(self.scale.layers)
            try:
                return self.rate(clock(one, self.device), pass_flop(model.dit, tokens_of(z), 256, z.shape[2], hears))
            finally:
                self.bare()

        return measure

    def infuser(self) -> MusicInfuser:
        """The transformer with fresh adapters, float32, drawn on the device."""
        rank = self.scale.rank
        with torch.device(self.device):
            adapters = Adapters(self.dit(), self.scale.layers, 768, rank, rank)
        return MusicInfuser(self.dit(), adapters.to(self.device))

    def train_step(self, recompute: int, compiled: bool = False):
        def measure():
            z, sigma, text, mask, _ = self.inputs(73, 50)
            z, eps = z.float(), torch.randn_like(z, dtype=torch.float32)
            model = self.infuser()
            model.recompute = recompute
            if compiled:
                torch._dynamo.reset()
                compile_blocks(model.dit, self.backend)
            audio = torch.randn(1, 120, 768, device=self.device)
            optimizer = torch.optim.AdamW(model.adapter_parameters(), lr=1e-4, weight_decay=0.0)
            losses = []

            def step():
                z_s = (1 - sigma) * z + sigma * eps
                with attention(self.kernels), torch.autocast(self.device.type, torch.bfloat16):
                    velocity = model(z_s, sigma, text, mask, audio)
                    loss = (velocity.float() - (z - eps)).square().mean()
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.item())

            try:
                told = clock(step, self.device, 2)
            finally:
                self.bare()
            flop = train_flop(model, tokens_of(z), 50, z.shape[2], recompute)
            trained = sum(p.numel() for p in model.adapter_parameters())
            return self.rate(told, flop) | {"losses": losses, "trained_parameters": trained}

        return measure

    def shares(self, frames: int, length: int):
        """Device time of one pass by kind of kernel, and the kernels that take most of it."""

        def measure():
            from torch.autograd import DeviceType
            from torch.profiler import ProfilerActivity, profile

            z, sigma, text, mask, _ = self.inputs(frames, length)
            cuda = self.device.type == "cuda"
            with torch.no_grad(), attention(self.kernels):
                self.dit()(z, sigma, text, mask)
                wait(self.device)
                with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
                    self.dit()(z, sigma, text, mask)
                    wait(self.device)
            kind = DeviceType.CUDA if cuda else DeviceType.CPU
            events = [event for event in profiler.key_averages() if event.device_type == kind]
            spent = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e6 for e in events}
            parts = {"attention": 0.0, "products": 0.0, "rest": 0.0}
            for name, seconds in spent.items():
                parts[part_of(name)] += seconds
            total = sum(parts.values())
            top = sorted(spent.items(), key=lambda item: -item[1])[:25]
            counts = {e.key: e.count for e in events}
            return {
                "device_s": total,
                "seconds": parts,
                "shares": {name: seconds / total for name, seconds in parts.items()},
                "top": [{"kernel": n[:120], "part": part_of(n), "s": s, "calls": counts[n]} for n, s in top],
            }

        return measure

    def rate(self, told: dict, flop: float) -> dict:
        return told | {"tflop": flop / TF, "tflop_per_s": flop / TF / told["median_s"]}


def attention(kernels: SDPBackend | None):
    """Prefer these kernels; what they cannot do (the text pool's wide heads, ZICA's) goes to the next."""
    if kernels is None:
        return contextlib.nullcontext()
    return sdpa_kernel([kernels, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)


def name_of(kernels: SDPBackend | None) -> str:
    return "PyTorch's attention" if kernels is None else kernels.name.lower().replace("_", " ")


def part_of(kernel: str) -> str:
    """attention, products or rest, by what the kernels of PyTorch, cuBLAS, cuDNN and CUTLASS are called."""
    name = kernel.lower()
    if any(word in name for word in ("flash", "fmha", "sdpa", "attention")):
        return "attention"
    if any(word in name for word in ("gemm", "nvjet", "cutlass", "xmma", "gemv", "splitk", "aten::mm", "addmm")):
        return "products"
    return "rest"


def bytes_of(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
