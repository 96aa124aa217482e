"""Music adapters: the only trainable parts of the model.

Concept   AudioProjector brings music tokens to the width of the video tokens; ZICA lets video tokens look at them
          (zero-initialised cross-attention); LoRA lets the attention of the prior follow. Nothing here knows Mochi.
Paper     arXiv 2503.14505v2, Sec. 4.3, Eq. (6), Fig. 5; Sec. 5.1 (projector, rank 64); Table 1 (feature addition).
Differs   Eq. (6) is drawn with one head; the published code has 8 heads and biases, and so do we.
          The music tokens are picked before the projector, not after: it works token by token, so that is the same.
          `aligned=True` is our one extension. The published ZICA has no positions on either side: each video token
          sees the music as a bag and cannot tell "now" from "later". The aligned form rotates q and k by the time of
          their latent frame (RoPE), has the same parameters, and takes the music tokens at the frames' centre times.

Dimension key   B batch   T latent frames   S video tokens (time-major: S = T x tokens of a frame)   A music tokens
                D video width   N heads   K head width
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_HEADS = 8
WAVELENGTHS = (2.0, 100.0)  # latent frames (0.2 s each): from the finest that 5 tokens a second can tell apart
#                             to well above the longest clip (28 frames for 163 video frames), so far is never "near"


def published_index(num_tokens: int, num_frames: int) -> list[int]:
    """The music token of each latent frame, nearest-neighbour down-sampling from A to T: floor(i A / T)."""
    return [i * num_tokens // num_frames for i in range(num_frames)]


def centre_index(num_tokens: int, num_frames: int) -> list[int]:
    """The music token heard at the centre time of each latent frame.

    Latent frame i > 0 is video frames 6i-5 ... 6i, which are on screen from (6i-5)/30 to (6i+1)/30 s: its centre is
    (6i-2)/30 s; frame 0 is one video frame, centre 0.5/30 s. The A tokens cut the clip's (6T-5)/30 + 0.09 s into equal
    parts. All times below are in video frames.
    """
    duration = 6 * num_frames - 5 + 0.09 * 30
    centres = [0.5] + [6 * i - 2 for i in range(1, num_frames)]
    return [int(num_tokens * centre / duration) for centre in centres]


NOW = 1.5  # how strongly fresh aligned attention prefers its own time; 0 would be uniform attention


class AudioProjector(nn.Module):
    """Music tokens (B, T, audio width) -> (B, T, D): Linear, SiLU, Linear."""

    def __init__(self, audio_dim: int, width: int):
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(audio_dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, a: Tensor) -> Tensor:
        return self.projection(a)


class ZICA(nn.Module):
    """Zero-initialised cross-attention from video tokens V to music tokens A.

        Z = V + W_O softmax(V W_Q (A W_K)^T / sqrt(d)) A W_V                                   Eq. (6)

    zero_init  W_O (and its bias) start at zero, so that Z = V; False is the ablation of Table 1
    aligned    rotate q and k by the time of their latent frame
    """

    def __init__(self, width: int, aligned: bool = False, zero_init: bool = True):
        super().__init__()
        self.aligned = aligned
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)
        if zero_init:
            nn.init.zeros_(self.to_out.weight)
            nn.init.zeros_(self.to_out.bias)
        if aligned:  # equal constants in q and k, rotated, give sum_p cos(2 pi dt / wavelength_p): a peak at dt = 0
            for linear in (self.to_q, self.to_k):
                first, second = linear.bias.data.view(NUM_HEADS, -1).chunk(2, dim=1)  # of each rotated pair
                first.fill_(NOW)
                second.zero_()

    def listen(self, a: Tensor) -> tuple[Tensor, ...]:
        """Music (B, T, D) -> what the video tokens look at, the same at every noise level.

        returns  k, v (B, N, T, K) and, aligned, the cosines and sines (T, K/2) that turn a frame's queries
        """
        k = self.to_k(a).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)  # (B, N, T, K)
        v = self.to_v(a).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)  # (B, N, T, K)
        if not self.aligned:
            return k, v
        cos, sin = turns(torch.arange(a.shape[1], device=a.device), k.shape[-1])
        return rotate(k, cos, sin), v, cos, sin

    def look(self, x: Tensor, k: Tensor, v: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        """Video tokens (B, S, D) and what `listen` returned -> video tokens (B, S, D)."""
        q = self.to_q(x).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)  # (B, N, S, K)
        if self.aligned:
            frames = q.unflatten(2, (len(cos), -1))  # (B, N, T, S/T, K)
            q = rotate(frames, cos[:, None], sin[:, None]).flatten(2, 3)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, N, S, K)
        return x + self.to_out(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        """x (B, S, D), a (B, T, D) -> (B, S, D)."""
        return self.look(x, *self.listen(a))


def turns(position: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rotary position embedding: the angles 2 pi position / wavelength of each pair of `width` channels.

    position  (n,) in latent frames
    returns   their cosines and sines, (n, width / 2) float32
    """
    shortest, longest = WAVELENGTHS
    wavelength = torch.linspace(math.log(shortest), math.log(longest), width // 2, device=position.device).exp()
    angle = 2 * math.pi * position[:, None] / wavelength  # (n, K/2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels (p, p + K/2) of x (..., n, K) by its angle, given as in `turns`.

    A score of a rotated q and a rotated k depends on the difference of their positions only.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def add_feature(x: Tensor, a: Tensor) -> Tensor:
    """Feature addition, the baseline of Table 1: a frame's feature, spread over space, is added to its tokens.

    x (B, S, D), a (B, T, D) -> (B, S, D)
    """
    return x + a.repeat_interleave(x.shape[1] // a.shape[1], dim=1)


class LoRA(nn.Module):
    """A low-rank update of a Linear's weight: Delta W = (alpha / rank) B A, B starts at zero.

    lora_A (rank, inputs), lora_B (outputs, rank)
    """

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float):
        super().__init__()
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.scale * F.linear(x, self.lora_A), self.lora_B)


class LoRALinear(nn.Module):
    """W x + (alpha / rank) B A x: a frozen Linear with a LoRA beside it, or folded into it."""

    def __init__(self, linear: nn.Linear, lora: LoRA):
        super().__init__()
        self.linear = linear
        self.lora = lora
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if self.merged else y + self.lora(x)

    def merge(self) -> None:
        """W <- W + Delta W, for sampling: the LoRA then costs nothing. Training needs it unmerged."""
        if not self.merged:
            self._shift(1)

    def unmerge(self) -> None:
        """W <- W - Delta W. Equal to the weight before `merge` up to rounding."""
        if self.merged:
            self._shift(-1)

    @torch.no_grad()
    def _shift(self, sign: int) -> None:
        delta = self.lora.scale * self.lora.lora_B.float() @ self.lora.lora_A.float()
        weight = self.linear.weight
        weight.copy_(weight.float() + sign * delta)  # summed in float32, rounded once
        self.merged = not self.merged
