"""Text features: a prompt becomes T5 v1.1 tokens.

Concept   sentencepiece ids, then a 24-block transformer encoder. Three things set T5 apart: RMS norms before each
          sub-layer, attention scores without the 1/sqrt(K) scaling, and no positions but one learned bias per
          (bucket of relative distance, head), shared by all blocks.
Paper     arXiv 2503.14505v2, Sec. 5.1: the text branch of Mochi, frozen. Raffel et al., arXiv 1910.10683, Sec. 2.1.
Differs   the official pipeline pads each batch to 256 tokens; `encode` cuts off what is padding in every row, since
          nothing looks at it.

Dimension key   B batch   L text tokens   E text width   N heads   K head width
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensors
from config import UserError

MAX_TOKENS = 256  # Mochi's prompt length
MAX_DISTANCE = 128  # relative distances from here on share the last bucket
HIDDEN = -1e30  # score of padding: exp is 0, yet finite in bfloat16, so that a row of padding alone gives no NaN
PAD, EOS, UNK = 0, 1, 2
EXTRA = 100  # the sentinels <extra_id_0> ... <extra_id_99> come after the pieces, in falling order
SPECIAL = re.compile(r"(<pad>|</s>|<unk>|<extra_id_(?:[0-9]|[1-9][0-9])>)")

# ---------------------------------------------------------------- prompt -> ids


class Tokenizer:
    """The ids of T5's sentencepiece tokenizer, as the official pipeline makes them (transformers' T5Tokenizer).

    Sentencepiece normalises (NFKC), turns newlines and runs of spaces into one space and drops those at the ends. The
    names of special tokens (<pad>, </s>, <unk>, <extra_id_0> ... <extra_id_99>) written in a prompt stand for these
    tokens, and the text after one starts a new word. </s> is appended, unless the prompt ends with one.

    path        the file `spiece.model`
    vocab_size  pieces + sentinels: rows an embedding needs (the official T5 has 28 unused ones more)
    raises      UserError if the file is missing or is not a T5 vocabulary
    """

    def __init__(self, path):
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; expected T5's sentencepiece vocabulary, spiece.model")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: not a sentencepiece model; download spiece.model again") from error
        ids = self.pieces.pad_id(), self.pieces.eos_id(), self.pieces.unk_id()
        if ids != (PAD, EOS, UNK):
            raise UserError(f"{path}: not a T5 vocabulary: <pad>, </s>, <unk> are {ids}, expected {(PAD, EOS, UNK)}")
        self.vocab_size = len(self.pieces) + EXTRA

    def ids(self, prompt: str) -> list[int]:
        """The prompt's ids of any number, without the closing </s>."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError("the prompt holds bytes that are not UTF-8 text: type it again") from error
        special = {"<pad>": PAD, "</s>": EOS, "<unk>": UNK}
        special |= {f"<extra_id_{i}>": self.vocab_size - 1 - i for i in range(EXTRA)}
        parts = SPECIAL.split(prompt)
        return [i for part in parts for i in ([special[part]] if part in special else self.pieces.encode(part))]

    def __call__(self, prompts: Sequence[str], length: int = MAX_TOKENS) -> tuple[Tensor, Tensor]:
        """ids (B, length) int64 and mask (B, length) bool: cut so that </s> still fits, then padded with 0."""
        ids = torch.full((len(prompts), length), PAD)
        mask = torch.zeros(len(prompts), length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            tokens = self.ids(prompt)[: length - 1]
            tokens += [] if tokens[-1:] == [EOS] else [EOS]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return ids, mask


def encode(
    model: Callable[[Tensor, Tensor], Tensor],
    tok: Tokenizer,
    prompts: Sequence[str],
    device="cpu",
    length: int = MAX_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Prompts -> features (B, L, E), mask (B, L) bool, on `device`; L = the longest prompt's tokens, at least 1.

    Features are zero where the mask is False. The empty prompt "" is the unconditional one: its whole mask is False.
    model    a T5 on `device`, or any function of (ids, mask), such as one that calls stream_t5
    """
    ids, mask = tok(prompts, length)
    empty = torch.tensor([prompt == "" for prompt in prompts])
    ids[empty], mask[empty] = PAD, False
    longest = max(1, int(mask.sum(1).max()))
    ids, mask = ids[:, :longest].to(device), mask[:, :longest].to(device)
    return model(ids, mask).masked_fill(~mask[..., None], 0), mask


# ---------------------------------------------------------------- the encoder


def bucket(distance, num_buckets=32, max_distance=MAX_DISTANCE):
    """Row of the bias table for a relative distance (key position - query position): any integer shape, same shape out.

    n = num_buckets/2,  e = n/2,  d = |distance|
    row = d                                              d < e: one row per distance
          e + floor(log(d/e) / log(max_distance/e) * e)  else: logarithmic, at most n - 1
    plus n for keys after the query.
    """
    n = num_buckets // 2
    e = n // 2
    d = distance.abs()
    far = e + (torch.log(d.clamp(min=e).float() / e) / math.log(max_distance / e) * (n - e)).long()
    return torch.where(d < e, d, far.clamp(max=n - 1)) + n * (distance > 0)


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + 1e-6), the mean in float32: no mean subtraction, no bias."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention, then pre-norm gated MLP `wo(gelu_tanh(wi_0 x) * wi_1 x)`; no biases anywhere."""

    def __init__(self, width, heads, kv, ffn):
        super().__init__()
        self.heads = heads
        self.norm_attention = RMSNorm(width)
        self.q = nn.Linear(width, heads * kv, bias=False)
        self.k = nn.Linear(width, heads * kv, bias=False)
        self.v = nn.Linear(width, heads * kv, bias=False)
        self.o = nn.Linear(heads * kv, width, bias=False)
        self.norm_mlp = RMSNorm(width)
        self.wi_0 = nn.Linear(width, ffn, bias=False)
        self.wi_1 = nn.Linear(width, ffn, bias=False)
        self.wo = nn.Linear(ffn, width, bias=False)
        nn.init.normal_(self.q.weight, std=(width * kv) ** -0.5)  # the missing score scaling lives in q's start
        nn.init.normal_(self.k.weight, std=width**-0.5)

    def forward(self, x, bias):
        """x (B, L, E), bias (B, N, L, L) added to the scores -> (B, L, E)."""
        h = self.norm_attention(x)
        q, k, v = (proj(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # (B, N, L, K)
        x = x + self.o(h.transpose(1, 2).flatten(2))
        h = self.norm_mlp(x)
        return x + self.wo(F.gelu(self.wi_0(h), approximate="tanh") * self.wi_1(h))


class T5(nn.Module):
    """The encoder. Official size: T5(vocab=32128, width=4096, depth=24, heads=64, kv=64, ffn=10240)."""

    def __init__(self, vocab, width, depth, heads, kv, ffn, buckets=32):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.bias = nn.Embedding(buckets, heads)
        self.blocks = nn.ModuleList(Block(width, heads, kv, ffn) for _ in range(depth))
        self.norm = RMSNorm(width)
        nn.init.normal_(self.bias.weight, std=width**-0.5)

    def forward(self, ids, mask):
        """ids (B, L) int64, mask (B, L) bool, False = padding -> (B, L, E); rows where mask is False mean nothing.

        Padding is invisible to the other tokens. A row without any valid token gives finite numbers, not NaN.
        """
        x = self.embed(ids)  # (B, L, E)
        place = torch.arange(ids.shape[1], device=ids.device)
        rows = bucket(place[None, :] - place[:, None], self.bias.num_embeddings)  # (L query, L key)
        bias = self.bias(rows).permute(2, 0, 1)  # (N, L, L)
        bias = torch.where(mask.bool()[:, None, None, :], bias, HIDDEN)  # (B, N, L, L)
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)


# ---------------------------------------------------------------- files: our names and the published ones

OFFICIAL = {
    "embed.weight": "shared.weight",
    "bias.weight": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
}
OFFICIAL_IN_BLOCK = {
    "norm_attention": "layer.0.layer_norm",
    **{name: f"layer.0.SelfAttention.{name}" for name in ("q", "k", "v", "o")},
    "norm_mlp": "layer.1.layer_norm",
    **{name: f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")},
}


def official_name(name: str) -> str:
    """Our parameter name -> the published one: blocks.3.q.weight -> encoder.block.3.layer.0.SelfAttention.q.weight"""
    if name in OFFICIAL:
        return OFFICIAL[name]
    _, index, part, _ = name.split(".")
    return f"encoder.block.{index}.{OFFICIAL_IN_BLOCK[part]}.weight"


def open_t5(path, dtype):
    """Open the file and check it: -> (weights, model on meta, {our name: file name}). Sizes are read off the shapes.

    raises   UserError for float16, and for a file whose names or shapes are not those of a T5 v1.1 encoder
    """
    if dtype == torch.float16:
        raise UserError("T5 overflows in float16: use bfloat16 or float32")
    w = tensors.open_weights(path)
    embed = "shared.weight" if "shared.weight" in w.shapes else "encoder.embed_tokens.weight"
    wanted = [embed, *(official_name(name) for name in ("bias.weight", "blocks.0.q.weight", "blocks.0.wi_0.weight"))]
    if missing := [name for name in wanted if len(w.shapes.get(name, ())) != 2]:
        raise UserError(f"{path}: not a T5 v1.1 encoder, no matrix named {', '.join(missing)}; give its folder or file")
    (vocab, width), (buckets, heads), (inner, _), (ffn, _) = (w.shapes[name] for name in wanted)
    if not heads or not inner or inner % heads:
        raise UserError(f"{path}: not a T5 v1.1 encoder: queries of width {inner} do not divide into {heads} heads")
    depth = 1 + max(int(m[1]) for m in map(re.compile(r"encoder\.block\.(\d{1,4})\.").match, w.shapes) if m)
    with tensors.shapes_only():
        model = T5(vocab, width, depth, heads, inner // heads, ffn, buckets)
    names = {name: official_name(name) for name in model.state_dict()} | {"embed.weight": embed}
    return w, model, names


def load(w, model, names, device, dtype):
    """Fill the model from the file; the decoder half of a full T5 and copies of the embedding stay unread."""
    unread = re.compile(r"decoder\.|lm_head\.|(shared|encoder\.embed_tokens)\.weight$")
    ignore = [name for name in w.shapes if unread.match(name) and name not in names.values()]
    sources = {ours: ([theirs], lambda tensor: tensor) for ours, theirs in names.items()}
    return tensors.load(model, w, device=device, dtype=dtype, sources=sources, ignore=ignore)


def load_t5(path, device="cpu", dtype=torch.float32) -> T5:
    """The encoder of a safetensors file, or of a Hugging Face folder with one file or shards and their index.

    dtype    float32, or bfloat16 (norms are still computed in float32); float16 is refused
    raises   UserError if the file is not a T5 v1.1 encoder
    """
    return load(*open_t5(path, dtype), device, dtype)


def stream_t5(path, ids, mask, device="cpu", dtype=torch.float32):
    """load_t5(path)(ids, mask) -> (B, L, E) on `device`, each part of the model read from disk when its turn comes.

    One block is in memory at a time (official size, float32: 0.8 GB, not 19), and of the embedding table the rows that
    the prompts use.
    """
    w, model, names = open_t5(path, dtype)
    load(w, model, names, "meta", dtype)  # names and shapes only
    used, ids = ids.unique(return_inverse=True)
    model.embed.weight = nn.Parameter(w.read(names["embed.weight"], device, dtype, used), requires_grad=False)
    parts = {model.bias: "bias", model.norm: "norm"}
    parts |= {block: f"blocks.{i}" for i, block in enumerate(model.blocks)}

    def read(part, args):
        state = {name: w.read(names[f"{parts[part]}.{name}"], device, dtype) for name in part.state_dict()}
        part.load_state_dict(state, assign=True)

    def free(part, args, output):
        part.to("meta")

    for part in parts:
        part.register_forward_pre_hook(read)
        part.register_forward_hook(free)
    return model(ids.to(device), mask.to(device))


def save_t5(model: T5, path):
    """Write the encoder under its published names; the file loads with load_t5 and with other T5 v1.1 code."""
    tensors.save(path, {official_name(name): tensor for name, tensor in model.state_dict().items()})
