"""MusicInfuser: the prior with its music adapters, D_theta,phi(x | c, a; sigma).

Concept   theta is the frozen Mochi DiT, phi the adapters. `Adapters` holds phi and nothing else, under the names of the
          official file, so its state_dict IS the file. `MusicInfuser` joins the two: LoRA on the attention of every
          block, ZICA after the chosen blocks. With fresh adapters the output is the prior's, bit for bit.
Paper     arXiv 2503.14505v2, Sec. 4, Fig. 5, Sec. 4.3; the layer list is read off Fig. 15 by the official code.
Differs   layers, form and null branch are recorded in the file's header where they differ from the published ones; the
          official file names none of them.

Dimension key   B batch   C latent channels   T H W latent frames, height, width   S video tokens   L text tokens
                A music tokens   D video width   E text width
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tensors
from adapters import ZICA, AudioProjector, LoRA, LoRALinear, add_feature, centre_index, published_index
from config import UserError, flag, from_cli, run
from mochi_dit import MochiDiT, Prompt, load_dit
from schedule import denoised, to_flow

OFFICIAL_LAYERS = (6, 7, 8, 9, 10, 21, 34, 35, 36, 38, 39, 43, 44, 45, 46, 47)  # most adaptable 16 of 48, Fig. 15
FORMS = ("published", "aligned", "add")
NULL_AUDIO = ("keep", "drop")


class Adapters(nn.Module):
    """phi: all that is trained, under the names of the official adapter file.

    dit         the prior it is made for; only its widths and depth are read
    layers      blocks that hear the music, ascending
    audio_dim   width of the audio encoder's tokens
    rank, alpha of the LoRA on the attention Linears of every block; rank 0: no LoRA
    form        "published": ZICA, Eq. (6)   "aligned": ZICA with time on q and k   "add": feature addition (Table 1)
    null_audio  "keep": the unconditional pass of CFG hears the music too (published)   "drop": it does not
    zero_init   the path of the music starts at zero (W_O, or the projector's last layer for "add", which has no W_O);
                False is the ablation of Table 1
    seed        the fresh weights (float32, with gradients) are a function of it
    """

    def __init__(
        self,
        dit: MochiDiT,
        layers: Sequence[int] = OFFICIAL_LAYERS,
        audio_dim: int = 768,
        rank: int = 64,
        alpha: float = 64,
        form: str = "published",
        null_audio: str = "keep",
        zero_init: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        depth, width = len(dit.blocks), dit.blocks[0].attn.proj_x.out_features
        self.layers, self.rank, self.alpha, self.form, self.null_audio = tuple(layers), rank, alpha, form, null_audio
        check_layers(self.layers, depth)
        if form not in FORMS or null_audio not in NULL_AUDIO:
            raise UserError(f"form {form!r} and null audio {null_audio!r}: expected {FORMS} and {NULL_AUDIO}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.audio_projection = AudioProjector(audio_dim, width)
            self.audio_cross_attn_blocks = nn.ModuleList(
                ZICA(width, aligned=form == "aligned", zero_init=zero_init) for _ in self.layers if form != "add"
            )
            torch.manual_seed(seed + 1)  # so that other layers or another form leave the fresh LoRA as it is
            self.blocks = nn.ModuleList(BlockLoRA(block.attn, rank, alpha) for block in dit.blocks if rank)
        if form == "add" and zero_init:
            nn.init.zeros_(self.audio_projection.projection[2].weight)
            nn.init.zeros_(self.audio_projection.projection[2].bias)

    def project(self, audio: Tensor, num_frames: int) -> Tensor:
        """Music tokens (B, A, audio_dim) -> one feature a latent frame, (B, T, D)."""
        pick = centre_index if self.form == "aligned" else published_index
        picked = audio[:, pick(audio.shape[1], num_frames)]  # (B, T, audio_dim)
        return self.audio_projection(picked.to(self.audio_projection.projection[0].weight.dtype))

    def listen(self, audio: Tensor, num_frames: int) -> dict[int, tuple[Tensor, ...]]:
        """Music tokens (B, A, audio_dim) -> for each of `layers`, what a video of T latent frames looks at there."""
        music = self.project(audio, num_frames)  # (B, T, D)
        if self.form == "add":
            return dict.fromkeys(self.layers, (music,))
        return {layer: zica.listen(music) for layer, zica in zip(self.layers, self.audio_cross_attn_blocks)}

    def infuse(self, layer: int, x: Tensor, heard: tuple[Tensor, ...]) -> Tensor:
        """Video tokens (B, S, D) after block `layer`, and what `listen` returned for it -> video tokens."""
        if self.form == "add":
            return add_feature(x, *heard)
        return self.audio_cross_attn_blocks[self.layers.index(layer)].look(x, *heard)

    def metadata(self) -> dict[str, str]:
        """The header of the adapter file: `kwargs` as the official code writes it, and ours where it cannot be told."""
        kwargs = {}
        for part in ("qkv", "out"):
            kwargs |= {f"{part}_proj_lora_rank": self.rank, f"{part}_proj_lora_alpha": self.alpha}
            kwargs |= {f"{part}_proj_lora_dropout": 0.0}
        header = {"kwargs": json.dumps(kwargs)}
        if self.layers != OFFICIAL_LAYERS:
            header["layers"] = json.dumps(self.layers)
        if self.form != "published":
            header["form"] = self.form
        if self.null_audio != "keep":
            header["null_audio"] = self.null_audio
        return header


class BlockLoRA(nn.Module):
    """The LoRAs of one block; the last block of the prior has no proj_y."""

    def __init__(self, attn: nn.Module, rank: int, alpha: float):
        super().__init__()
        self.attn = nn.Module()
        for name in ("qkv_x", "qkv_y", "proj_x", "proj_y"):
            linear = getattr(attn, name)
            if linear is not None:
                self.attn.add_module(name, LoRA(linear.in_features, linear.out_features, rank, alpha))


class Condition(NamedTuple):
    """c and a of D(x | c, a; sigma) as the blocks read them; `MusicInfuser.condition` makes it."""

    prompt: Prompt
    heard: dict[int, tuple[Tensor, ...]]  # layer: what its ZICA looks at; {} without music


class MusicInfuser(nn.Module):
    """The prior with its adapters; without adapters it is the prior, deaf to any music.

    recompute   blocks, counted from the first, of which training keeps only the tokens between them and computes the
                rest again in the backward pass (memory)
    """

    def __init__(self, dit: MochiDiT, adapters: Adapters | None = None):
        super().__init__()
        self.dit = dit.requires_grad_(False)
        self.adapters = adapters
        self.recompute = 0
        if adapters is not None:
            for block, loras in zip(dit.blocks, adapters.blocks):
                for name, lora in loras.attn.named_children():
                    setattr(block.attn, name, LoRALinear(getattr(block.attn, name), lora))

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that hear the music; () for the bare prior."""
        return () if self.adapters is None else self.adapters.layers

    def forward(
        self,
        z: Tensor,
        sigma: Tensor,
        text: Tensor,
        text_mask: Tensor,
        audio: Tensor | None = None,
        skip_layers: Collection[int] = (),
    ) -> Tensor:
        """Velocity z0 - eps at z = (1 - sigma) z0 + sigma eps: Fig. 5.

        z            (B, C, T, H, W) z_dit
        sigma        (B,) in [0, 1], 1 = pure noise
        text         (B, L, F) features of the text encoder;  text_mask (B, L), a row all False is the empty prompt
        audio        (B, A, audio_dim) features of the audio encoder; None leaves out the music (LoRA still works)
        skip_layers  blocks that are the identity on both streams, their music included
        returns      (B, C, T, H, W), in the type of the weights
        """
        grid = self.dit.grid_of(z)
        condition = self.condition(text, text_mask, audio, num_frames=grid[0])
        return self.velocity(z, sigma, condition, self.dit.embed_positions(grid), skip_layers)

    def condition(self, text: Tensor, text_mask: Tensor, audio: Tensor | None, num_frames: int) -> Condition:
        """All that `forward` reads of prompt and music, for a video of T latent frames: once for all noise levels."""
        hears = audio is not None and self.adapters is not None
        heard = self.adapters.listen(audio, num_frames) if hears else {}
        return Condition(self.dit.embed_text(text, text_mask), heard)

    def velocity(
        self, z: Tensor, sigma: Tensor, condition: Condition, rope: Tensor, skip_layers: Collection[int] = ()
    ) -> Tensor:
        """`forward` from there on; rope: `dit.embed_positions` of the grid. Never waits for the device."""
        x, y, c, rope, mask, grid = self.dit.embed_noisy(z, sigma, condition.prompt, rope)  # x (B, S, D), y (B, L, E)
        for i in range(len(self.dit.blocks)):
            if i in skip_layers:
                continue
            arguments = (i, x, y, c, rope, mask, condition.heard.get(i))
            if i < self.recompute and torch.is_grad_enabled():
                x, y = checkpoint(self.block, *arguments, use_reentrant=False)
            else:
                x, y = self.block(*arguments)
        return self.dit.unembed(x, c, grid)

    def block(self, i: int, x: Tensor, y: Tensor, c, rope, mask, heard: tuple | None) -> tuple[Tensor, Tensor]:
        """Block i of the prior, then ZICA where there is music: x (B, S, D), y (B, L, E) -> the same."""
        x, y = self.dit.blocks[i](x, y, c, rope, mask)
        return (x if heard is None else self.adapters.infuse(i, x, heard)), y

    def denoise(
        self,
        x: Tensor,
        s: Tensor,
        text: Tensor,
        text_mask: Tensor,
        audio: Tensor | None = None,
        skip_layers: Collection[int] = (),
    ) -> Tensor:
        """D_theta,phi(x | c, a; s) of Eq. (1)-(4): the clean latent, in EDM coordinates.

        x (B, C, T, H, W) = z0 + s eps, s (B,) in [0, inf) -> (B, C, T, H, W) float32, an estimate of z0
        """
        z, sigma = to_flow(x.float(), s.float().view(-1, 1, 1, 1, 1))
        return denoised(z, sigma, self(z, sigma.flatten(), text, text_mask, audio, skip_layers).float())

    def adapter_parameters(self) -> list[nn.Parameter]:
        """phi of Eq. (1): what trains."""
        return [] if self.adapters is None else list(self.adapters.parameters())

    def merge(self) -> None:
        """Fold every LoRA into its weight, for sampling."""
        for module in self.modules():
            if isinstance(module, LoRALinear):
                module.merge()


def check_layers(layers: Sequence[int], depth: int) -> None:
    """UserError unless `layers` are ascending block indices of a prior of that depth."""
    whole = all(type(i) is int and 0 <= i < depth for i in layers)
    if not layers or not whole or list(layers) != sorted(set(layers)):
        shown = str(list(layers))[:200]
        raise UserError(
            f"layers {shown}: expected ascending block numbers from 0 to {depth - 1}; the prior has {depth}"
        )


def load_musicinfuser(
    dit: str | Path,
    adapter: str | Path | None = None,
    layers: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MusicInfuser:
    """The prior from `dit` and, unless None, the adapters from `adapter`; without gradients, in eval mode.

    layers   the blocks that hear the music; None takes the list in the adapter's header, else OFFICIAL_LAYERS
    device   "meta" checks both files and allocates nothing
    raises   UserError if a file does not fit, or `layers` is not what the adapter was trained with
    """
    prior = load_dit(dit, device, dtype)
    if adapter is None:
        return MusicInfuser(prior).eval()
    weights = tensors.open_weights(adapter)
    with tensors.shapes_only():
        adapters = Adapters(prior, **read_settings(weights, layers))
    return MusicInfuser(prior, tensors.load(adapters, weights, device, dtype)).eval()


def read_settings(weights: tensors.Weights, layers: Sequence[int] | None) -> dict:
    """The arguments of `Adapters` that an adapter file was made with, from its shapes and its header."""
    header, shapes = weights.metadata, weights.shapes
    first, lora = "audio_projection.projection.0.weight", "blocks.0.attn.qkv_x.lora_A"
    if len(shapes.get(first, ())) != 2:
        raise UserError(f"{weights.path}: not a MusicInfuser adapter: it has no {first}")
    rank = shapes[lora][0] if lora in shapes else 0
    kwargs = _json(weights, "kwargs", {"qkv_proj_lora_alpha": rank, "out_proj_lora_alpha": rank})
    alphas = {kwargs.get(f"{part}_proj_lora_alpha") for part in ("qkv", "out")} if isinstance(kwargs, dict) else set()
    (alpha,) = alphas if len(alphas) == 1 else (None,)
    if type(alpha) not in (int, float):
        raise UserError(f"{weights.path}: its header's `kwargs` should give one LoRA alpha for qkv and out")

    told = _json(weights, "layers", list(OFFICIAL_LAYERS) if layers is None else list(layers))
    form = header.get("form", "published")
    count = len({name.split(".")[1] for name in shapes if name.startswith("audio_cross_attn_blocks.")})
    if not isinstance(told, list) or (layers is not None and list(layers) != told):
        raise UserError(f"{weights.path}: was trained with layers {told}, not {layers}; leave the layers out")
    if form != "add" and count != len(told):
        raise UserError(f"{weights.path}: holds {count} ZICA blocks for {len(told)} layers {told}; give its own layers")
    return {
        "layers": told,
        "audio_dim": shapes[first][1],
        "rank": rank,
        "alpha": alpha,
        "form": form,
        "null_audio": header.get("null_audio", "keep"),
    }


def _json(weights: tensors.Weights, key: str, default):
    """A header entry parsed as JSON."""
    if key not in weights.metadata:
        return default
    try:
        return json.loads(weights.metadata[key])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{weights.path}: its header's `{key}` is not JSON") from error


def save_adapter(m: MusicInfuser, path: str | Path) -> None:
    """Write the adapters of `m` in the official file's layout, whole or not at all, in the type they have."""
    tensors.save(path, m.adapters.state_dict(), m.adapters.metadata())


@dataclass(frozen=True)
class ModelConfig:
    """Look at a folder of weights: what is in it, what is missing and where to get it, and whether it fits together."""

    check: Path = flag(help="the folder")


def main() -> None:
    import check  # it stands on this file

    check.check(from_cli(ModelConfig).check)


if __name__ == "__main__":
    run(main)
