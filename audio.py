"""Music features: a waveform becomes Wav2Vec 2.0 tokens.

Concept   seven strided convolutions turn 16 kHz sound into about 50 vectors a second; a positional convolution and a
          post-norm transformer give each of them the context of the whole clip.
Paper     arXiv 2503.14505v2, Sec. 5.1 (the audio encoder, frozen) and Fig. 7 (speed change). Baevski et al.,
          arXiv 2006.11477, Sec. 2.
Differs   the official code cuts the music at a random place; ours starts where the caller cut it.

Dimension key   B batch   S samples   A music tokens   D width   N heads   K head width
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

import tensors
from config import UserError

SR_HZ = 16_000
FPS = 30
MARGIN = 1_440  # samples beyond the last frame: 0.09 s
STRIDES = (5, 2, 2, 2, 2, 2, 2)  # one token per 320 samples, 20 ms

# ---------------------------------------------------------------- waveforms


def clip_samples(num_frames: int) -> int:
    """Samples that go with a video clip: ceil(16000 (num_frames/30 + 0.09)), in integers so that nothing rounds."""
    return -(-num_frames * SR_HZ // FPS) + MARGIN


def prepare(waveform, num_frames: int):
    """Cut or zero-pad (at the end) to the clip's length, then normalise: (S,) at 16 kHz -> (1, clip_samples).

        (x - mean) / sqrt(var + 1e-7)      over the padded clip, as the official code does

    raises   UserError if the waveform is empty or not finite
    """
    if waveform.ndim != 1:
        raise ValueError(f"waveform {tuple(waveform.shape)}: expected one channel, (S,)")
    n = clip_samples(num_frames)
    x = waveform[:n].float()
    if not len(x):
        raise UserError("the music is empty at this place: give a longer file or an earlier --start")
    if not x.isfinite().all():
        raise UserError("the music holds samples that are not numbers (NaN or infinite): convert the file again")
    x = F.pad(x, (0, n - len(x)))
    return ((x - x.mean()) / torch.sqrt(x.var(correction=0) + 1e-7))[None]


def change_speed(waveform, speed: float, zeros: int = 16):
    """Play the music `speed` times as fast: (S,) -> (round(S / speed),). Tempo and pitch both rise, as on a turntable.

        y[i] = sum_j x[j] c sinc(c (i speed - j)) hann(c (i speed - j) / zeros)      c = min(1, 1 / speed)

    A windowed sinc reads the waveform between its samples; its cutoff c keeps what would exceed the new Nyquist out.
    zeros    zero crossings of the sinc on each side: more is sharper and slower
    raises   UserError unless 0.25 <= speed <= 4
    """
    if not 0.25 <= speed <= 4:
        raise UserError(f"speed={speed}: the music can be played 0.25 to 4 times as fast; 1 leaves it alone")
    if speed == 1:
        return waveform
    cutoff = min(1.0, 1 / speed)
    half = math.ceil(zeros / cutoff)
    padded = F.pad(waveform.double(), (half, half))
    length = round(len(waveform) / speed)
    pieces = [waveform.new_empty(0)]
    for start in range(0, length, 65_536):  # in pieces: each output sample gathers 2 half inputs
        t = torch.arange(start, min(start + 65_536, length), dtype=torch.float64, device=waveform.device) * speed
        j = t.long()[:, None] + torch.arange(1 - half, half + 1, device=waveform.device)  # (piece, 2 half)
        d = (t[:, None] - j) * cutoff
        kernel = cutoff * torch.sinc(d) * torch.cos(math.pi / 2 * (d / zeros).clamp(-1, 1)) ** 2
        pieces.append((padded[j + half] * kernel).sum(-1).to(waveform.dtype))
    return torch.cat(pieces)


# ---------------------------------------------------------------- Wav2Vec 2.0


class Conv(nn.Module):
    """Strided convolution without bias, exact GELU; the first one also norms each channel over time."""

    def __init__(self, width_in, width, kernel, stride, norm):
        super().__init__()
        self.conv = nn.Conv1d(width_in, width, kernel, stride, bias=False)
        self.layer_norm = nn.GroupNorm(width, width) if norm else None

    def forward(self, x):
        x = self.conv(x)
        return F.gelu(x if self.layer_norm is None else self.layer_norm(x))


class FeatureExtractor(nn.Module):
    """(B, S) -> (B, A, conv width)"""

    def __init__(self, widths, kernels):
        super().__init__()
        shapes = zip((1, *widths[:-1]), widths, kernels, STRIDES, strict=True)
        self.conv_layers = nn.ModuleList(Conv(*shape, norm=i == 0) for i, shape in enumerate(shapes))

    def forward(self, waveform):
        x = waveform[:, None]  # (B, 1, S)
        for layer in self.conv_layers:
            x = layer(x)
        return x.transpose(1, 2)


class FeatureProjection(nn.Module):
    """LayerNorm, Linear: (B, A, conv width) -> (B, A, D)"""

    def __init__(self, conv_width, width):
        super().__init__()
        self.layer_norm = nn.LayerNorm(conv_width)
        self.projection = nn.Linear(conv_width, width)

    def forward(self, x):
        return self.projection(self.layer_norm(x))


class WeightNormConv(nn.Module):
    """Grouped convolution over time, length kept, whose weight is `g v / |v|` with one norm |v| per kernel position."""

    def __init__(self, width, kernel, groups):
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(1, 1, kernel))
        self.weight_v = nn.Parameter(torch.empty(width, width // groups, kernel))
        self.bias = nn.Parameter(torch.zeros(width))
        self.groups = groups
        nn.init.normal_(self.weight_v, std=2 / math.sqrt(kernel * width))
        if not self.weight_v.is_meta:
            self.weight_g.data.copy_(self.weight_v.data.norm(dim=(0, 1), keepdim=True))

    def forward(self, x):
        """(B, D, A) -> (B, D, A): zero-padded by half a kernel; an even kernel makes one step too many, dropped."""
        weight = self.weight_v * (self.weight_g * self.weight_v.square().sum((0, 1)).rsqrt())  # `norm` is slower
        return F.conv1d(x, weight, self.bias, padding=weight.shape[-1] // 2, groups=self.groups)[..., : x.shape[-1]]


class PositionConv(nn.Module):
    """Relative positions, learned: (B, A, D) -> (B, A, D), to be added to x"""

    def __init__(self, width, kernel, groups):
        super().__init__()
        self.conv = WeightNormConv(width, kernel, groups)

    def forward(self, x):
        return F.gelu(self.conv(x.transpose(1, 2))).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens: (B, A, D) -> (B, A, D)"""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in projections)  # (B, N, A, K)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width, ffn):
        super().__init__()
        self.intermediate_dense = nn.Linear(width, ffn)
        self.output_dense = nn.Linear(ffn, width)

    def forward(self, x):
        return self.output_dense(F.gelu(self.intermediate_dense(x)))


class Layer(nn.Module):
    """Post-norm transformer block: the norm comes after the residual sum."""

    def __init__(self, width, ffn, heads):
        super().__init__()
        self.attention = Attention(width, heads)
        self.layer_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, ffn)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x):
        x = self.layer_norm(x + self.attention(x))
        return self.final_layer_norm(x + self.feed_forward(x))


class Encoder(nn.Module):
    """Position convolution, LayerNorm, transformer blocks: (B, A, D) -> (B, A, D)"""

    def __init__(self, width, depth, ffn, heads, pos_kernel, pos_groups):
        super().__init__()
        self.pos_conv_embed = PositionConv(width, pos_kernel, pos_groups)
        self.layer_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(Layer(width, ffn, heads) for _ in range(depth))

    def forward(self, x):
        x = self.layer_norm(x + self.pos_conv_embed(x))
        for layer in self.layers:
            x = layer(x)
        return x


class Wav2Vec2(nn.Module):
    """The audio encoder; attributes carry the published tensor names. Official size: the defaults."""

    def __init__(
        self,
        width=768,
        depth=12,
        ffn=3072,
        heads=12,
        conv_widths=(512,) * 7,
        conv_kernels=(10, 3, 3, 3, 3, 2, 2),
        pos_kernel=128,
        pos_groups=16,
    ):
        super().__init__()
        self.feature_extractor = FeatureExtractor(conv_widths, conv_kernels)
        self.feature_projection = FeatureProjection(conv_widths[-1], width)
        self.encoder = Encoder(width, depth, ffn, heads, pos_kernel, pos_groups)

    def features(self, waveform):
        """Tokens that know only their own 25 ms: normalised waveform (B, S) -> (B, A, D)."""
        return self.feature_projection(self.feature_extractor(waveform))

    def encode(self, features):
        """Give each token its context (and place, by the position convolution): (B, A, D) -> (B, A, D)."""
        return self.encoder(features)

    def forward(self, waveform):
        """Normalised 16 kHz waveform (B, S) -> music tokens (B, A, D), about 50 a second."""
        return self.encode(self.features(waveform))


# ---------------------------------------------------------------- files

PREFIX = "wav2vec2."
IGNORED = re.compile(r"lm_head\.|(wav2vec2\.)?(masked_spec_embed$|quantizer\.|project_q\.|project_hid\.)")


def load_wav2vec2(path, num_heads=None, device="cpu", dtype=torch.float32) -> Wav2Vec2:
    """The encoder of a safetensors file or Hugging Face folder; sizes are read off the shapes.

    num_heads   default: what the file's header says, else width / 64 as in all published models
    raises      UserError if the file is not a Wav2Vec 2.0 of the "base" kind (group norm, post-norm)
    """
    w = tensors.open_weights(path)
    shapes = w.shapes
    prefix = PREFIX if any(name.startswith(PREFIX) for name in shapes) else ""
    pos = prefix + "encoder.pos_conv_embed.conv."
    weight_norm = {"weight_g": "weight_g", "weight_v": "weight_v"}
    if pos + "parametrizations.weight.original0" in shapes:  # the same two tensors under newer PyTorch's names
        weight_norm = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    convs = [f"{prefix}feature_extractor.conv_layers.{i}.conv.weight" for i in range(len(STRIDES))]
    ffn = prefix + "encoder.layers.0.feed_forward.intermediate_dense.weight"
    ranks = dict.fromkeys([*convs, pos + weight_norm["weight_v"]], 3) | {ffn: 2}
    if missing := [name for name, rank in ranks.items() if len(shapes.get(name, ())) != rank or 0 in shapes[name]]:
        raise UserError(f"{path}: not a Wav2Vec 2.0 encoder, no usable tensor named {', '.join(missing)}")
    width, group_width, pos_kernel = shapes[pos + weight_norm["weight_v"]]
    depth = 1 + max(int(m[1]) for m in (re.match(rf"{prefix}encoder\.layers\.(\d{{1,4}})\.", k) for k in shapes) if m)
    told = w.metadata.get("num_heads", str(max(1, width // 64)))
    heads = num_heads or (int(told) if re.fullmatch("[0-9]{1,4}", told) else 0)
    if heads < 1 or width % heads:
        raise UserError(f"{path}: width {width} does not divide into {heads} heads; give num_heads")
    with tensors.shapes_only():
        model = Wav2Vec2(
            width=width,
            depth=depth,
            ffn=shapes[ffn][0],
            heads=heads,
            conv_widths=[shapes[name][0] for name in convs],
            conv_kernels=[shapes[name][2] for name in convs],
            pos_kernel=pos_kernel,
            pos_groups=width // group_width,
        )
    sources = {name: ([prefix + name], lambda tensor: tensor) for name in model.state_dict()}
    for ours, theirs in weight_norm.items():
        sources["encoder.pos_conv_embed.conv." + ours] = ([pos + theirs], lambda tensor: tensor)
    ignore = [name for name in shapes if IGNORED.match(name)]
    return tensors.load(model, w, device=device, dtype=dtype, sources=sources, ignore=ignore)


def save_wav2vec2(model: Wav2Vec2, path):
    """Write the encoder under its published names; the number of heads, which no shape tells, goes into the header."""
    state = {PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    tensors.save(path, state, {"num_heads": str(model.encoder.layers[0].attention.heads)})
