"""Mochi's video VAE: frames <-> latents, 8x8 smaller in space and 6x in time, causal in time.

Concept   an encoder and a larger decoder of 3-D residual blocks that never look ahead: frame 0 makes latent frame 0,
          and each later latent frame holds six more frames. A decoder that never looks ahead can decode a film latent
          frame by latent frame in constant memory, and get what decoding it whole would give (`Decoder.stream`).
Paper     arXiv 2503.14505v2, Sec. 3 and 5.1: the frozen latent space of the prior, Mochi 1.
Differs   the decoder drops the surplus first frames inside each up-sampling level, as genmo's does; diffusers drops
          them once at the end, so its first frames differ. Sizes are read off the tensors' shapes.

Spaces    frames in [-1, 1];  z_vae raw latent of the encoder;  z_dit = (z_vae - mean) / std, what the transformer sees.
Dimension key   B batch   C channels   T H W frames, height, width   N heads   K head width
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

import tensors
from config import UserError

# Per-channel statistics of z_vae over Mochi's training set (genmo), for z_vae <-> z_dit.
# fmt: off
MEAN = (-0.06730896234512329, -0.03801138326525688, -0.07477820664644241, -0.055652644485235214,
        0.012767231091856956, -0.047035425901412964, 0.04389696940779686, -0.09346305578947067,
        -0.09918314963579178, -0.008729793131351471, -0.011931556276977062, -0.03219933807849884)
STD = (0.9263795018196106, 0.9248894453048706, 0.9393059611320496, 0.95925372838974,
       0.8244560360908508, 0.9172599911689758, 0.9294154644012451, 1.3720942735671997,
       0.8813936710357666, 0.9168315529823303, 0.9185249209403992, 0.9274757504463196)
# fmt: on

HEAD_WIDTH = 32  # of the encoder's temporal attention
LATENT = 12  # latent channels
LARGEST = 2**30  # elements of a convolution's input; CUDA's kernels count them in 32 bits


def to_dit_space(z_vae):
    """z_dit = (z_vae - mean) / std, per channel.  ([B,] 12, T, H, W) -> same shape."""
    return (z_vae - z_vae.new_tensor(MEAN).view(-1, 1, 1, 1)) / z_vae.new_tensor(STD).view(-1, 1, 1, 1)


def to_vae_space(z_dit):
    """z_vae = z_dit * std + mean, per channel.  ([B,] 12, T, H, W) -> same shape."""
    return z_dit * z_dit.new_tensor(STD).view(-1, 1, 1, 1) + z_dit.new_tensor(MEAN).view(-1, 1, 1, 1)


class Pointwise(nn.Linear):
    """A linear map of the channels, (B, C, T, H, W) -> (B, C', T, H, W)."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class FrameNorm(nn.GroupNorm):
    """Group norm with the statistics of each single frame: time is folded into the batch."""

    def forward(self, x):
        frames = x.transpose(1, 2).flatten(0, 1)  # (B T, C, H, W), no copy in channels_last_3d
        return super().forward(frames).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class CausalConv(nn.Conv3d):
    """3-D convolution whose output frame depends on its own and earlier frames only; borders are replicated.

    Copies of the first frame stand before it. `past`, when given, is a dict in which each convolution leaves the last
    frames of its input, to stand before the next piece of the film.
    """

    def forward(self, x, past=None):
        t, h, w = (k - 1 for k in self.kernel_size)
        if x.numel() > LARGEST and x.shape[2] > 1 and self.stride[0] == 1:
            past = {} if past is None else past
            pieces = x.split(max(1, LARGEST // x[:, :, 0].numel()), dim=2)
            return torch.cat([self(piece, past) for piece in pieces], 2)
        if past is not None:
            x = torch.cat([past.get(self, x[:, :, :1].expand(-1, -1, t, -1, -1)), x], 2)
            past[self] = x[:, :, x.shape[2] - t :].clone()  # a view would keep all of x
            t = 0
        with torch.autocast(x.device.type, enabled=False):  # would pad a float32 copy
            x = F.pad(x, (w // 2, w // 2, h // 2, h // 2, t, 0), mode="replicate")
        if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            # what conv3d comes to as well, but for small films it takes a kernel that is up to eight times slower
            return torch.mkldnn_convolution(x, self.weight, self.bias, (0, 0, 0), self.stride, (1, 1, 1), 1)
        return super().forward(x)


def silu(x):
    """SiLU, in place unless autograd needs x. Only for an x that nobody else holds."""
    return F.silu(x, inplace=not x.requires_grad)


class Attention(nn.Module):
    """Causal attention over time, each position of the frame for itself; q and k have unit length."""

    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def attend(self, x):  # (rows, T, C) -> (rows, T, C)
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)  # (rows, N, T, K) each
        q, k = F.normalize(q, dim=-1).to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # scale K^-1/2 on top of the unit length
        return self.out(x.transpose(1, 2).flatten(2))

    def forward(self, x):
        B, _, _, H, W = x.shape
        rows = x.permute(0, 3, 4, 2, 1).flatten(0, 2)  # (B H W, T, C)
        rows = torch.cat([self.attend(r) for r in rows.split(2**15)])  # CUDA's attention takes fewer than 2^16 rows
        return rows.unflatten(0, (B, H, W)).permute(0, 4, 3, 1, 2)


class AttentionBlock(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, width, norm_groups):
        super().__init__()
        self.norm = FrameNorm(norm_groups, width)
        self.attn = Attention(width)

    def forward(self, x):
        return x + self.attn(self.norm(x))


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), then attention where the level has it. Fresh, it is the identity."""

    def __init__(self, width, norm_groups, attention=False):
        super().__init__()
        self.stack = nn.ModuleDict(
            {  # the official numbering counts the activations
                "0": FrameNorm(norm_groups, width),
                "2": CausalConv(width, width, 3),
                "3": FrameNorm(norm_groups, width),
                "5": CausalConv(width, width, 3),
            }
        )
        nn.init.zeros_(self.stack["5"].weight)
        nn.init.zeros_(self.stack["5"].bias)
        self.attn_block = AttentionBlock(width, norm_groups) if attention else nn.Identity()

    def forward(self, x, past=None):
        y = self.stack["2"](silu(self.stack["0"](x)), past)
        y = self.stack["5"](silu(self.stack["3"](y)), past)
        return self.attn_block(x + y)


class Down(nn.Module):
    """One encoder level: a convolution with kernel = stride, then residual blocks."""

    def __init__(self, width_in, width, stride, blocks):
        super().__init__()
        self.layers = nn.Sequential(CausalConv(width_in, width, stride, stride), *blocks)

    def forward(self, x):
        return self.layers(x)


class Encoder(nn.Module):
    """frames (B, 3, T, H, W) in [-1, 1] -> mean and log-variance of z_vae, each (B, 12, T', H', W').

    Levels are listed from the pixels to the latent.
    widths       channels of each of the n levels
    res_blocks   residual blocks: of each level, then of the end              n + 1 numbers
    reductions   (time, height, width) strides between the levels             n - 1 triples
    attention    temporal attention in the blocks of each level and the end   n + 1 booleans
    norm_groups  groups of every group norm
    """

    def __init__(
        self,
        widths=(64, 128, 256, 384),
        res_blocks=(3, 3, 4, 6, 3),
        reductions=((1, 2, 2), (2, 2, 2), (3, 2, 2)),
        attention=(False, True, True, True, True),
        norm_groups=32,
    ):
        super().__init__()
        self.norm_groups = norm_groups
        self.reduction = tuple(math.prod(r[axis] for r in reductions) for axis in range(3))  # official: (6, 8, 8)

        def blocks(level, width):
            return [ResBlock(width, norm_groups, attention[level]) for _ in range(res_blocks[level])]

        downs = [Down(widths[i], widths[i + 1], r, blocks(i + 1, widths[i + 1])) for i, r in enumerate(reductions)]
        self.layers = nn.Sequential(Pointwise(15, widths[0]), *blocks(0, widths[0]), *downs, *blocks(-1, widths[-1]))
        self.output_norm = FrameNorm(norm_groups, widths[-1])
        self.output_proj = Pointwise(widths[-1], 2 * LATENT, bias=False)

    def forward(self, frames):
        self.check(*frames.shape[2:])
        x = fourier_features(frames).to(self.layers[0].weight.dtype)
        x = self.layers(x)
        return self.output_proj(silu(self.output_norm(x))).chunk(2, dim=1)

    def check(self, num_frames, height, width):
        """UserError unless 1 + 6k frames of a size that the strides divide."""
        t, h, w = self.reduction
        if (num_frames - 1) % t:
            below = num_frames - (num_frames - 1) % t
            raise UserError(f"{num_frames} frames: the video VAE packs 1 + {t}k frames; use {below} or {below + t}")
        if height % h or width % w:
            raise UserError(f"frames of {height}x{width}: height must be a multiple of {h} and width of {w}")


def fourier_features(frames):
    """rgb -> [rgb, sin, cos] of 2 pi 2^6 rgb and 2 pi 2^7 rgb, the two frequencies side by side for each channel.

    (B, 3, T, H, W) -> (B, 15, T, H, W), in float32: the angles reach 804, which half precision cannot tell apart.
    """
    frames = frames.float()
    angle = frames.unsqueeze(2) * (2 * math.pi * frames.new_tensor([2.0**6, 2.0**7]).view(2, 1, 1, 1))
    angle = angle.flatten(1, 2)  # (B, 6, T, H, W)
    return torch.cat([frames, angle.sin(), angle.cos()], 1)


class Up(nn.Module):
    """One decoder level: residual blocks, a wider projection, and its channels spread over time and space."""

    def __init__(self, width, width_out, expansion, blocks):
        super().__init__()
        self.expansion = expansion
        self.blocks = nn.Sequential(*blocks)
        self.proj = Pointwise(width, width_out * math.prod(expansion))

    def forward(self, x, past=None):
        for block in self.blocks:
            x = block(x, past)
        B, _, T, H, W = x.shape
        t, h, w = self.expansion
        x = self.proj(x).movedim(1, -1).unflatten(-1, (-1, t, h, w))  # (B, T, H, W, C, t, h, w)
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(B, T * t, H * h, W * w, -1).movedim(-1, 1)
        first = past is None or self not in past
        if past is not None:
            past[self] = True
        return x[:, :, t - 1 :] if first else x  # latent frame 0 stands for one frame, not for t


class Decoder(nn.Module):
    """z_vae (B, 12, T, H, W) -> frames (B, 3, T', H', W'), about [-1, 1] (clamp before showing).  T' = 1 + 6 (T - 1)

    Levels are listed from the pixels to the latent, as in the encoder; decoding walks them backwards.
    widths       channels of each of the n levels
    res_blocks   residual blocks: of each level, then of the start            n + 1 numbers
    expansions   (time, height, width) factors between the levels             n - 1 triples, height = width
    norm_groups  groups of every group norm
    """

    def __init__(
        self,
        widths=(128, 256, 512, 768),
        res_blocks=(3, 3, 4, 6, 3),
        expansions=((1, 2, 2), (2, 2, 2), (3, 2, 2)),
        norm_groups=32,
    ):
        super().__init__()
        self.norm_groups = norm_groups
        for expansion in expansions:
            if factors(math.prod(expansion)) != tuple(expansion):
                raise UserError(f"expansion {tuple(expansion)}: a file would read as {factors(math.prod(expansion))}")

        def blocks(level, width):
            return [ResBlock(width, norm_groups) for _ in range(res_blocks[level])]

        ups = [Up(widths[i + 1], widths[i], e, blocks(i + 1, widths[i + 1])) for i, e in enumerate(expansions)]
        start = nn.Sequential(nn.Conv3d(LATENT, widths[-1], 1), *blocks(-1, widths[-1]))
        self.blocks = nn.ModuleList([start, *reversed(ups), nn.Sequential(*blocks(0, widths[0]))])
        self.output_proj = Pointwise(widths[0], 3)

    def forward(self, z_vae, past=None):
        start, *ups, end = self.blocks
        x = start[0](z_vae.to(start[0].weight.dtype))
        for block in (*start[1:], *ups, *end):
            x = block(x, past)
        return self.output_proj(silu(x))

    @torch.no_grad()
    def stream(self, z_vae):
        """Yield decoder(z_vae) in pieces of (B, 3, t, H', W'), t = 1 then 6, holding one latent frame's activations."""
        past = {}
        for z in z_vae.split(1, dim=2):
            yield self(z, past)


def factors(n):
    """Split n = t s s into (t, s, s), s as large as can be: 4 -> (1, 2, 2), 8 -> (2, 2, 2), 3 -> (3, 1, 1)."""
    s = max(s for s in range(1, math.isqrt(n) + 1) if n % (s * s) == 0)
    return n // (s * s), s, s


def load_encoder(path, device="cpu", dtype=torch.float32):
    """The encoder in a safetensors file or folder, genmo or diffusers layout, of any size.

    The header's metadata entry `norm_groups` (default 32) tells what shapes cannot.
    raises   UserError if the file does not hold such an encoder, whole
    """
    return load_half("encoder", lambda shapes, groups: Encoder(*encoder_sizes(shapes), groups), path, device, dtype)


def load_decoder(path, device="cpu", dtype=torch.float32):
    """The decoder in a safetensors file or folder: as `load_encoder`."""
    return load_half("decoder", lambda shapes, groups: Decoder(*decoder_sizes(shapes), groups), path, device, dtype)


def load_half(half, build, path, device, dtype):
    """Build one half of the VAE from shapes under genmo's names, and fill it from the file.

    A diffusers file holds both halves, "encoder." and "decoder.", under other names; its encoder's qkv comes in three.
    """
    weights = tensors.open_weights(path)
    diffusers = begins(weights.shapes, half + ".")
    names = diffusers_names(weights.shapes, half) if diffusers else {}  # genmo module -> diffusers module

    def source(name):
        """The names in the file that make up the tensor of that genmo name."""
        module, _, leaf = name.rpartition(".")
        if module not in names:
            return [name]
        parts = ("to_q.", "to_k.", "to_v.") if module.endswith(".qkv") else ("",)
        return [f"{names[module]}.{part}{leaf}" for part in parts]

    shapes, other_half = weights.shapes, []
    if diffusers:
        other_half = [name for name in shapes if not name.startswith(half + ".")]
        leaves = [module + leaf for module in names for leaf in (".weight", ".bias")]
        shapes = {name: shapes[source(name)[0]] for name in leaves if source(name)[0] in shapes}
    try:
        with tensors.shapes_only():
            module = build(shapes, int(weights.metadata.get("norm_groups", 32)))
    except KeyError as error:
        raise UserError(f"{path}: not a Mochi VAE {half}: missing: {', '.join(source(error.args[0]))}") from error
    except (LookupError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(f"{path}: not a Mochi VAE {half} by its shapes ({error}); is it the right file?") from error
    sources = {name: (source(name), join) for name in module.state_dict()}
    return tensors.load(module, weights, device, dtype, sources, other_half)


def join(*parts):
    """The parts one above the other; a single part as it is."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def run(shapes, pattern, start=0):
    """How many of pattern % start, pattern % (start + 1), ... begin a name in `shapes`, up to the first gap."""
    return next(i for i in itertools.count(start) if not begins(shapes, pattern % i)) - start


def begins(shapes, prefix):
    return any(name.startswith(prefix) for name in shapes)


def encoder_sizes(shapes):
    """(widths, res_blocks, reductions, attention) of an Encoder, read off {genmo name: shape}."""
    stem = run(shapes, "layers.%d.stack.", 1)
    downs = [f"layers.{stem + 1 + i}.layers" for i in range(run(shapes, "layers.%d.layers.", stem + 1))]
    end = stem + 1 + len(downs)
    strided = [shapes[f"{down}.0.weight"] for down in downs]  # (C', C, t, h, w) with kernel = stride
    for down, shape in zip(downs, strided):
        if shape[3] != shape[4]:
            raise ValueError(f"{down}.0.weight {tuple(shape)} shrinks height and width differently")
    widths = [shapes["layers.0.weight"][0], *(shape[0] for shape in strided)]
    lists = [("layers.%d", 1), *((f"{down}.%d", 1) for down in downs), ("layers.%d", end)]
    res_blocks = [run(shapes, blocks + ".stack.", first) for blocks, first in lists]
    attention = [begins(shapes, blocks % first + ".attn_block.") for blocks, first in lists]
    return widths, res_blocks, [shape[2:] for shape in strided], attention


def decoder_sizes(shapes):
    """(widths, res_blocks, expansions) of a Decoder, read off {genmo name: shape}."""
    levels = run(shapes, "blocks.%d.proj.", 1)
    projections = [shapes[f"blocks.{i + 1}.proj.weight"] for i in range(levels)]  # (C' t s s, C)
    widths = [*(shape[1] for shape in projections), shapes["output_proj.weight"][1]]  # from the latent to the pixels
    expansions = [factors(shape[0] // width) for shape, width in zip(projections, widths[1:])]
    ups = [(f"blocks.{i + 1}.blocks.%d", 0) for i in range(levels)]
    lists = [("blocks.0.%d", 1), *ups, (f"blocks.{levels + 1}.%d", 0)]
    res_blocks = [run(shapes, blocks + ".stack.", first) for blocks, first in lists]
    return widths[::-1], res_blocks[::-1], expansions[::-1]


def diffusers_names(shapes, half):
    """{genmo module: diffusers module} of one half, if `shapes` are those of a diffusers file."""
    resnet = "%s.resnets.%%d."
    if half == "encoder":
        stem = run(shapes, resnet % "encoder.block_in")
        levels = run(shapes, "encoder.down_blocks.%d.")
        downs = [(f"layers.{stem + 1 + i}.layers", f"encoder.down_blocks.{i}") for i in range(levels)]
        names = {f"{ours}.0": f"{theirs}.conv_in.conv" for ours, theirs in downs}
        names |= {"layers.0": "encoder.proj_in", "output_norm": "encoder.norm_out.norm_layer"}
        lists = [("layers.%d", 1, "encoder.block_in"), *((f"{ours}.%d", 1, theirs) for ours, theirs in downs)]
        lists += [("layers.%d", stem + 1 + levels, "encoder.block_out")]
    else:
        levels = run(shapes, "decoder.up_blocks.%d.")
        ups = [(f"blocks.{i + 1}", f"decoder.up_blocks.{i}") for i in range(levels)]
        names = {f"{ours}.proj": f"{theirs}.proj" for ours, theirs in ups} | {"blocks.0.0": "decoder.conv_in"}
        lists = [("blocks.0.%d", 1, "decoder.block_in"), *((f"{ours}.blocks.%d", 0, theirs) for ours, theirs in ups)]
        lists += [(f"blocks.{levels + 1}.%d", 0, "decoder.block_out")]
    names["output_proj"] = f"{half}.proj_out"
    for ours, first, theirs in lists:
        for i in range(run(shapes, resnet % theirs)):
            block = ours % (first + i)
            names[f"{block}.stack.0"] = f"{theirs}.resnets.{i}.norm1.norm_layer"
            names[f"{block}.stack.2"] = f"{theirs}.resnets.{i}.conv1.conv"
            names[f"{block}.stack.3"] = f"{theirs}.resnets.{i}.norm2.norm_layer"
            names[f"{block}.stack.5"] = f"{theirs}.resnets.{i}.conv2.conv"
            names[f"{block}.attn_block.norm"] = f"{theirs}.norms.{i}.norm_layer"
            names[f"{block}.attn_block.attn.qkv"] = f"{theirs}.attentions.{i}"  # .to_q, .to_k, .to_v
            names[f"{block}.attn_block.attn.out"] = f"{theirs}.attentions.{i}.to_out.0"
    return names
