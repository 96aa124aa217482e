"""Mochi 1: the asymmetric joint text-video diffusion transformer, the prior that MusicInfuser teaches to dance.

Concept   a wide stream of video tokens x and a narrow stream of text tokens y meet in one attention per block; noise
          level and pooled prompt modulate both streams. The output estimates the velocity z0 - eps at
          z_sigma = (1 - sigma) z0 + sigma eps.
Paper     arXiv 2503.14505v2, Sec. 3 (the backbone) and Sec. 4 (what the adapters hang on).
Differs   padding is cut off or masked, so a batch may mix prompts of any length, the empty one included. Attributes
          carry the official (genmo) tensor names; the diffusers layout is read through `from_diffusers`.

Dimension key   B batch   C latent channels   T H W latent frames, height, width   S video tokens = T (H/p) (W/p)
                L text tokens   D video width   E text width   N heads   K head width = D / N
"""

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensors
from config import UserError

TEXT_POOL_HEADS = 8
TIME_WIDTH = 256  # sinusoids that describe the noise level
BASE_AREA = 192 * 192  # every patch grid is stretched to this area before it is turned into positions
KEEP_FLOAT32 = ("pos_frequencies", "q_norm_x.weight", "k_norm_x.weight", "q_norm_y.weight", "k_norm_y.weight")


class Prompt(NamedTuple):
    """What the transformer reads of a text; it depends on neither z nor sigma, so a sampler makes it once."""

    y: Tensor  # (B, L, E) text tokens, without the columns that are padding in every sample
    pooled: Tensor  # (B, D)
    mask: Tensor | None  # (B, L) True where a token counts; None where all do


class State(NamedTuple):
    """Everything the blocks need, as `MochiDiT.embed` leaves it."""

    x: Tensor  # (B, S, D) video tokens
    y: Tensor  # (B, L, E) text tokens
    c: Tensor  # (B, D) noise level + pooled prompt
    rope: Tensor  # (S, N, K/2, 2) float32: cosine and sine of each rotation
    mask: Tensor | None  # (B, 1, 1, S + L) True where a key may be attended; None where all may
    grid: tuple[int, int, int]  # patches along time, height and width


def normed(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * gain in the type of x, and the float32 factor 1 / sqrt(...) of each row."""
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return (wide * inverse).mul_(gain).to(x.dtype), inverse


class RMSNorm(torch.autograd.Function):
    """`normed` with its gradient written out, for a CPU.

    Autograd would keep two float32 copies of x and pass over memory twice as often; this keeps x and one number a row.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        out, inverse = normed(x, gain, eps)
        ctx.save_for_backward(x, gain, inverse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, gain, inverse = ctx.saved_tensors
        unit, grad = x.float() * inverse, grad.float()
        grad_x = grad_gain = None
        if ctx.needs_input_grad[1]:
            grad_gain = (grad * unit).sum_to_size(gain.shape)
        if ctx.needs_input_grad[0]:
            grad = grad * gain
            along = torch.linalg.vecdot(grad, unit)[..., None].div_(x.shape[-1])  # what would only rescale the row
            grad_x = grad.addcmul_(unit, along, value=-1).mul_(inverse).to(x.dtype)
        return grad_x, grad_gain, None


def rms_norm(x: Tensor, gain: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension; gain is float32 and broadcasts to x."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return RMSNorm.apply(x, gain, eps) if torch.is_grad_enabled() else normed(x, gain, eps)[0]
    with torch.autocast(
        x.device.type, enabled=False
    ):  # one kernel, float32 inside; autocast would make x float32 first
        return F.rms_norm(x, x.shape[-1:], eps=eps) * gain.to(x.dtype)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """RoPE: turn each even/odd pair of x (B, S, N, K) by an angle; rope (S, N, K/2, 2) has its cosine and sine."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, S, N, K/2, 2)
    if torch.compiler.is_compiling():  # a compiler fuses this, and knows no complex numbers
        (even, odd), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    else:  # one pass over memory
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).to(x.dtype)


def positions(grid: tuple[int, int, int], device=None) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates of the patches along each axis of a grid (T, H, W) of patches: (T,), (H,), (W,).

    Time counts latent frames. Rows are the centres of H equal bins of [-H s/2, H s/2] and columns likewise, with
    s = sqrt(BASE_AREA / (H W)): the same area whatever the resolution.
    """
    frames, height, width = grid
    stretch = math.sqrt(BASE_AREA / (height * width))
    t = torch.arange(frames, device=device, dtype=torch.float32)
    h = (torch.arange(height, device=device, dtype=torch.float32) - (height - 1) / 2) * stretch
    w = (torch.arange(width, device=device, dtype=torch.float32) - (width - 1) / 2) * stretch
    return t, h, w


def patchify(z: Tensor, patch: int) -> Tensor:
    """Latent (B, C, T, H, W) -> patches (B, S, p p C), in the order (row, column, channel)."""
    B, C, T, H, W = z.shape
    z = z.reshape(B, C, T, H // patch, patch, W // patch, patch)
    return z.permute(0, 2, 3, 5, 4, 6, 1).reshape(B, -1, patch * patch * C)


def unpatchify(x: Tensor, grid: tuple[int, int, int], patch: int) -> Tensor:
    """Patches (B, S, p p C) of a grid of patches -> latent (B, C, T, H, W): the inverse of `patchify`."""
    T, rows, columns = grid
    x = x.reshape(len(x), T, rows, columns, patch, patch, -1)
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(len(x), -1, T, rows * patch, columns * patch)


class PatchEmbed(nn.Module):
    """Latent (B, C, T, H, W) -> tokens (B, S, D). A convolution of stride p in the checkpoint, a product here."""

    def __init__(self, in_channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch, patch)

    def forward(self, z: Tensor) -> Tensor:
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, p p C)
        return F.linear(patchify(z, self.proj.stride[0]), weight, self.proj.bias)


class TimeEmbed(nn.Module):
    """Noise level (B,) -> (B, D): cosines and sines of 1000 (1 - sigma), then two layers."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_WIDTH, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, sigma: Tensor) -> Tensor:
        half = TIME_WIDTH // 2
        frequencies = torch.exp(torch.arange(half, device=sigma.device) * (-math.log(10000) / half))
        angle = 1000 * (1 - sigma.float()[:, None]) * frequencies  # (B, 128)
        waves = torch.cat((angle.cos(), angle.sin()), -1)  # (B, 256)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class TextPool(nn.Module):
    """Text features (B, L, F) -> (B, D): the mean feature attends over itself and the tokens, once, with 8 heads."""

    def __init__(self, text_dim: int, width: int):
        super().__init__()
        self.to_kv = nn.Linear(text_dim, 2 * text_dim)
        self.to_q = nn.Linear(text_dim, text_dim)
        self.to_out = nn.Linear(text_dim, width)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """mask (B, L) bool; the features under False must be zero."""
        mean = text.sum(1, keepdim=True) / mask.sum(1).clamp(min=1)[:, None, None].to(text.dtype)  # (B, 1, F)
        tokens = torch.cat((mean, text), 1)  # (B, 1 + L, F); the mean may always be attended
        k, v = self.to_kv(tokens).unflatten(-1, (2, TEXT_POOL_HEADS, -1)).permute(2, 0, 3, 1, 4)
        q = self.to_q(mean).unflatten(-1, (TEXT_POOL_HEADS, -1)).transpose(1, 2)  # (B, 8, 1, F/8)
        allowed = F.pad(mask, (1, 0), value=True)[:, None, None]  # (B, 1, 1, 1 + L)
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)  # (B, 8, 1, F/8)
        return self.to_out(pooled.flatten(1))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v in the type of v; on a CPU in float32, which is faster there than bf16."""
    if v.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class HeadNorm(nn.Module):
    """RMS norm of each head of q or k, (B, S, N, K) -> the same, with a gain (K,)."""

    def __init__(self, head_width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, 1e-5)


class JointAttention(nn.Module):
    """One attention over video and text tokens: each stream has its own projections, all see all."""

    def __init__(self, width: int, text_width: int, num_heads: int, text_out: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv_x = nn.Linear(width, 3 * width, bias=False)
        self.qkv_y = nn.Linear(text_width, 3 * width, bias=False)
        self.q_norm_x, self.k_norm_x = HeadNorm(width // num_heads), HeadNorm(width // num_heads)
        self.q_norm_y, self.k_norm_y = HeadNorm(width // num_heads), HeadNorm(width // num_heads)
        self.proj_x = nn.Linear(width, width)
        self.proj_y = nn.Linear(width, text_width) if text_out else None

    def forward(self, x: Tensor, y: Tensor, rope: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (B, S, D), y (B, L, E) -> the same shapes; None for y in the last block."""
        q_x, k_x, v_x = self.qkv_x(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, S, N, K) each
        q_y, k_y, v_y = self.qkv_y(y).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, L, N, K) each
        q_x, k_x = rotate(self.q_norm_x(q_x), rope), rotate(self.k_norm_x(k_x), rope)  # only video has positions
        pairs = (q_x, self.q_norm_y(q_y)), (k_x, self.k_norm_y(k_y)), (v_x, v_y)
        q, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in pairs)  # (B, N, S + L, K) each
        out = attend(q, k, v, mask).transpose(1, 2).flatten(2)  # (B, S + L, D)
        out_x, out_y = out.split((x.shape[1], y.shape[1]), 1)
        return self.proj_x(out_x), None if self.proj_y is None else self.proj_y(out_y)


class SwiGLU(nn.Module):
    """w2(silu(a) * b), where a, b are the halves of w1 x; the hidden width is 8/3 of the width, up to 256s."""

    def __init__(self, width: int):
        super().__init__()
        hidden = -(-(8 * width // 3) // 256) * 256
        self.w1 = nn.Linear(width, 2 * hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = (F.linear(x, half) for half in self.w1.weight.chunk(2))  # two dense outputs: halves of one are slower
        return self.w2(F.silu(a, inplace=not a.requires_grad) * b)


class Block(nn.Module):
    """Joint attention, then an MLP per stream; scales and gates of both streams come from c.

    x + rms(attention(rms(x) (1 + scale))) tanh(gate), then the same with the MLP. The last block's text is not read
    by anyone: it has neither output nor MLP, and passes y through.
    """

    def __init__(self, width: int, text_width: int, num_heads: int, last: bool):
        super().__init__()
        self.mod_x = nn.Linear(width, 4 * width)
        self.mod_y = nn.Linear(width, text_width if last else 4 * text_width)
        self.attn = JointAttention(width, text_width, num_heads, text_out=not last)
        self.mlp_x = SwiGLU(width)
        self.mlp_y = None if last else SwiGLU(text_width)

    def forward(self, x: Tensor, y: Tensor, c: Tensor, rope: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, S, D), y (B, L, E), c (B, D), rope and mask as in `State` -> x, y"""
        c = F.silu(c)[:, None]  # (B, 1, D)
        scale, gate, scale_mlp, gate_mlp = self.mod_x(c).float().chunk(4, -1)
        scale_y, *rest_y = self.mod_y(c).float().split(y.shape[-1], -1)
        out_x, out_y = self.attn(rms_norm(x, 1 + scale), rms_norm(y, 1 + scale_y), rope, mask)
        x = x + rms_norm(out_x, gate.tanh())
        x = x + rms_norm(self.mlp_x(rms_norm(x, 1 + scale_mlp)), gate_mlp.tanh())
        if out_y is not None:
            gate_y, scale_mlp_y, gate_mlp_y = rest_y
            y = y + rms_norm(out_y, gate_y.tanh())
            y = y + rms_norm(self.mlp_y(rms_norm(y, 1 + scale_mlp_y)), gate_mlp_y.tanh())
        return x, y


class FinalLayer(nn.Module):
    """Tokens (B, S, D) -> patches of velocity (B, S, p p C): layer norm, shift and scale from c, one Linear."""

    def __init__(self, width: int, patch_width: int):
        super().__init__()
        self.mod = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, patch_width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.mod(F.silu(c))[:, None].float().chunk(2, -1)
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.linear(normed.to(x.dtype))


class MochiDiT(nn.Module):
    """The transformer: velocity z0 - eps of a noisy latent, given its noise level and a prompt.

    depth        blocks                          width       D, of the video stream
    text_width   E, of the text stream           num_heads   N; D / N must be even
    text_dim     width of the text encoder's features, a multiple of 8
    """

    def __init__(
        self,
        depth: int,
        width: int,
        text_width: int,
        num_heads: int,
        text_dim: int,
        in_channels: int = 12,
        patch: int = 2,
    ):
        super().__init__()
        self.patch = patch
        self.x_embedder = PatchEmbed(in_channels, width, patch)
        self.t_embedder = TimeEmbed(width)
        self.t5_y_embedder = TextPool(text_dim, width)
        self.t5_yproj = nn.Linear(text_dim, text_width)
        self.pos_frequencies = nn.Parameter(torch.zeros(3, num_heads, width // num_heads // 2))
        self.blocks = nn.ModuleList(Block(width, text_width, num_heads, last=i == depth - 1) for i in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * in_channels)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights and of the token streams."""
        return self.t5_yproj.weight.dtype

    @torch.no_grad()
    def initialise(self, grid: tuple[int, int, int]) -> None:
        """Prepare fresh weights for training from scratch on a grid of patches (T, H, W).

        Gates and output start at zero, so each block starts as the identity. Every head's rotations get random
        directions in (t, h, w) and half-periods from 1 to 16 patches, spread evenly in the logarithm.
        """
        for linear in [*(m for block in self.blocks for m in (block.mod_x, block.mod_y)), self.final_layer.mod]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)
        half_period = torch.logspace(0, 4, self.pos_frequencies.shape[-1], base=2)  # in patches
        direction = F.normalize(torch.randn(self.pos_frequencies.shape), dim=0)  # (3, N, K/2)
        stretch = math.sqrt(BASE_AREA / (grid[1] * grid[2]))  # of one patch in height and width; one frame in time is 1
        spacing = torch.tensor([1.0, stretch, stretch])[:, None, None]
        self.pos_frequencies.copy_(direction * math.pi / half_period / spacing)

    def embed_text(self, text: Tensor, text_mask: Tensor) -> Prompt:
        """Text features (B, L, F) and mask (B, L), True for tokens, False for padding -> what the blocks read of them.

        Looks at the mask on the host, the only synchronisation of a forward pass: keep the mask on the CPU to avoid it.
        """
        mask = text_mask.to("cpu", torch.bool)
        used = mask.any(0)
        full = bool(mask[:, used].all())
        mask = mask[:, used].to(text.device)
        text = text[:, used].to(self.dtype).masked_fill(~mask[..., None], 0)  # text has no positions: columns may go
        return Prompt(self.t5_yproj(text).to(self.dtype), self.t5_y_embedder(text, mask), None if full else mask)

    def embed_positions(self, grid: tuple[int, int, int]) -> Tensor:
        """Grid of patches -> rotations (S, N, K/2, 2), cosine and sine, by angles (t, h, w) . pos_frequencies."""
        t, h, w = positions(grid, self.pos_frequencies.device)
        f = self.pos_frequencies.float()  # (3, N, K/2)
        plane = h[:, None, None, None] * f[1] + w[:, None, None] * f[2]  # (H, W, N, K/2)
        angle = (t[:, None, None, None, None] * f[0] + plane).flatten(0, 2)  # (S, N, K/2)
        return torch.stack((angle.cos(), angle.sin()), -1)

    def embed_noisy(self, z: Tensor, sigma: Tensor, prompt: Prompt, rope: Tensor) -> State:
        """The part of `embed` that depends on z (B, C, T, H, W) and sigma (B,)."""
        x = self.x_embedder(z.to(self.dtype)).to(self.dtype)  # float32 weights: float32 residuals under autocast too
        c = (self.t_embedder(sigma) + prompt.pooled).to(self.dtype)
        mask = None if prompt.mask is None else F.pad(prompt.mask, (x.shape[1], 0), value=True)[:, None, None]
        return State(x, prompt.y, c, rope, mask, self.grid_of(z))

    def embed(self, z: Tensor, sigma: Tensor, text: Tensor, text_mask: Tensor) -> State:
        """Patches, noise level, text and positions; arguments as in `forward`."""
        return self.embed_noisy(z, sigma, self.embed_text(text, text_mask), self.embed_positions(self.grid_of(z)))

    def unembed(self, x: Tensor, c: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Video tokens (B, S, D) -> velocity (B, C, T, H, W)."""
        return unpatchify(self.final_layer(x, c), grid, self.patch)

    def forward(
        self, z: Tensor, sigma: Tensor, text: Tensor, text_mask: Tensor, skip_layers: Collection[int] = ()
    ) -> Tensor:
        """Velocity z0 - eps at z = (1 - sigma) z0 + sigma eps.

        z            (B, C, T, H, W) z_dit, H and W multiples of the patch
        sigma        (B,) in [0, 1], 1 = pure noise
        text         (B, L, F) features of the text encoder, any L
        text_mask    (B, L) True for tokens; a row may be all False: the empty prompt
        skip_layers  indices of blocks that pass both streams through untouched
        returns      (B, C, T, H, W), in the type of the weights
        """
        x, y, c, rope, mask, grid = self.embed(z, sigma, text, text_mask)
        for i, block in enumerate(self.blocks):
            if i not in skip_layers:
                x, y = block(x, y, c, rope, mask)
        return self.unembed(x, c, grid)

    def grid_of(self, z: Tensor) -> tuple[int, int, int]:
        """Patches along time, height and width of a latent (B, C, T, H, W)."""
        T, H, W = z.shape[2:]
        if H % self.patch or W % self.patch:
            raise ValueError(f"latent of {H} x {W}: height and width must be multiples of {self.patch}")
        return T, H // self.patch, W // self.patch


def compile_blocks(dit: MochiDiT, backend: str = "inductor") -> None:
    """Let torch.compile fuse what stands between the matrix products of a block, in place (`--compile`).

    One block is compiled for all, as they are alike; the last one, which has no text output, is not worth a compilation
    of its own. A prompt of another length is another shape: the second one compiles a form for all that follow.
    """
    torch._dynamo.config.recompile_limit = 64  # forms: with and without gradients, prompt, mask, LoRA
    for block in dit.blocks[:-1]:
        block.compile(fullgraph=True, backend=backend)


def load_dit(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> MochiDiT:
    """Load the transformer from a file or folder in the genmo or the diffusers layout; sizes come from the shapes.

    returns  the model on `device` in `dtype` (KEEP_FLOAT32 stays float32), in eval mode, without gradients
    raises   UserError that names what is missing, unexpected or mis-shaped
    """
    weights = tensors.open_weights(path)
    shapes = weights.shapes
    diffusers = "patch_embed.proj.weight" in shapes
    embedder, projection, per_block = (
        ("patch_embed.proj.weight", "time_embed.caption_proj.weight", "transformer_blocks.{}.norm1.linear.weight")
        if diffusers
        else ("x_embedder.proj.weight", "t5_yproj.weight", "blocks.{}.mod_x.weight")
    )
    ranks = {embedder: 4, projection: 2, "pos_frequencies": 3, per_block.format(0): 2}
    unfit = [name for name, rank in ranks.items() if len(shapes.get(name, ())) != rank or 0 in shapes[name]]
    if unfit:
        some = ", ".join(sorted(shapes)[:8]) + (", ..." if len(shapes) > 8 else "")
        raise UserError(f"{path}: not a Mochi DiT, genmo or diffusers: no usable {', '.join(unfit)}; it holds {some}")
    width, in_channels, patch, _ = shapes[embedder]
    text_width, text_dim = shapes[projection]
    _, num_heads, half_head = shapes["pos_frequencies"]
    if width != num_heads * 2 * half_head or text_dim % TEXT_POOL_HEADS:
        raise UserError(
            f"{path}: not a Mochi DiT: pos_frequencies {shapes['pos_frequencies']} does not fit a width of {width}, "
            f"or {TEXT_POOL_HEADS} does not divide the text features' width, {text_dim}"
        )
    blocks = {name.split(".")[1] for name in shapes if name.startswith(per_block.partition("{")[0])}
    depth = next(i for i in range(len(shapes) + 1) if str(i) not in blocks)
    with tensors.shapes_only():
        dit = MochiDiT(depth, width, text_width, num_heads, text_dim, in_channels, patch)
    sources = from_diffusers(dit) if diffusers else None
    return tensors.load(dit, weights, device, dtype, sources=sources, keep_float32=KEEP_FLOAT32)


DIFFUSERS_NAMES = {  # part of our name: part of theirs
    "x_embedder.": "patch_embed.",
    "t_embedder.mlp.0.": "time_embed.timestep_embedder.linear_1.",
    "t_embedder.mlp.2.": "time_embed.timestep_embedder.linear_2.",
    "t5_y_embedder.": "time_embed.pooler.",
    "t5_yproj.": "time_embed.caption_proj.",
    "final_layer.mod.": "norm_out.linear.",
    "final_layer.linear.": "proj_out.",
    "blocks.": "transformer_blocks.",
    "mod_x.": "norm1.linear.",
    "mod_y.": "norm1_context.linear.",
    "attn.qkv_x.": "attn1.to_{}.",
    "attn.qkv_y.": "attn1.add_{}_proj.",
    "attn.q_norm_x.": "attn1.norm_q.",
    "attn.k_norm_x.": "attn1.norm_k.",
    "attn.q_norm_y.": "attn1.norm_added_q.",
    "attn.k_norm_y.": "attn1.norm_added_k.",
    "attn.proj_x.": "attn1.to_out.0.",
    "attn.proj_y.": "attn1.to_add_out.",
    "mlp_x.w1.": "ff.net.0.proj.",
    "mlp_x.w2.": "ff.net.2.",
    "mlp_y.w1.": "ff_context.net.0.proj.",
    "mlp_y.w2.": "ff_context.net.2.",
}


def from_diffusers(dit: MochiDiT) -> dict[str, tuple[list[str], Callable[..., Tensor]]]:
    """{our name: ([names in the diffusers layout], how to join them)}, for `tensors.load`.

    There q, k and v are apart, the halves of w1 and of the last modulation stand the other way round, and the text
    modulation of the last block has a name of its own.
    """
    last_mod = f"blocks.{len(dit.blocks) - 1}.mod_y."
    sources = {}
    for name in dit.state_dict():
        theirs = name.replace(last_mod, last_mod.replace("mod_y", "norm1_context.linear_1"))
        for ours, other in DIFFUSERS_NAMES.items():
            theirs = theirs.replace(ours, other)
        swapped = ".w1." in name or name.startswith("final_layer.mod.")
        names = [theirs.format(part) for part in "qkv"] if "{}" in theirs else [theirs]
        sources[name] = (names, swap_halves if swapped else stack)
    return sources


def stack(*parts: Tensor) -> Tensor:
    """The parts one above the other; a single part as it is."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def swap_halves(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1])
