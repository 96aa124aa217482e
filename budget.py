"""What a training step will need in memory, from the headers of the weights alone.

Concept   the same model as in training runs once on tensors that have shapes and types but no memory. Autograd says
          which of them it would keep for the backward pass, block by block; the rest is counting parameters.
Paper     arXiv 2503.14505v2, Sec. 5.1: one A100 with 80 GB was needed.
"""

import contextlib
import math

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mochi_dit import KEEP_FLOAT32
from model import MusicInfuser

TEXT_TOKENS = 64  # of a batch: Table 8's prompts have up to about 50, and padding is cut off


def without_memory(model: MusicInfuser, dtype: torch.dtype) -> MusicInfuser:
    """Give a model on the meta device parameters that claim to be on the CPU; to be called inside FakeTensorMode.

    The prior gets `dtype` (KEEP_FLOAT32 excepted), the adapters float32 and gradients, as in training.
    """
    trained = {id(p) for p in model.adapter_parameters()}
    for owner_name, owner in model.named_modules():
        for name, p in owner.named_parameters(owner_name, recurse=False):
            keep = id(p) in trained or name.endswith(KEEP_FLOAT32)
            empty = torch.empty(p.shape, dtype=torch.float32 if keep else dtype)
            setattr(owner, name.rpartition(".")[2], nn.Parameter(empty, id(p) in trained))
    return model


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Inside `with`, autograd keeps tensors as ever, and `count` tells how many bytes are new since the last call.

    Tensors that share their memory count once, parameters not at all.
    """

    def __init__(self, model: nn.Module):
        self.memory = {id_of(p): p for p in model.parameters()}  # held, so that no address is used twice
        self.new = self.largest = 0
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor: Tensor) -> Tensor:
        if id_of(tensor) not in self.memory:
            self.memory[id_of(tensor)] = tensor
            self.new += tensor.untyped_storage().nbytes()
            self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return tensor

    def count(self) -> int:
        new, self.new = self.new, 0
        return new


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def predict(
    meta: MusicInfuser,
    batch: int,
    latent: tuple[int, int, int],
    recompute: int,
    stored: torch.dtype,
    compute: torch.dtype,
) -> dict[str, int]:
    """Bytes by part of one training step on one device.

    meta     the model on the meta device, as load_dit(..., "meta") and Adapters made under it leave it
    latent   (T, H, W) of z_dit;   recompute  blocks, counted from the first, that are computed again in backward
    stored   type of the prior's weights;   compute  type to compute in
    returns  `passing` is a guess: three times the largest tensor that is kept, for what comes and goes in backward
    """
    prior, patch = meta.dit, meta.dit.patch
    audio_dim = meta.adapters.audio_projection.projection[0].in_features
    width, text_width = prior.x_embedder.proj.out_channels, prior.t5_yproj.out_features
    grid = latent[0], latent[1] // patch, latent[2] // patch
    autocast = torch.autocast("cpu", compute) if compute != torch.float32 else contextlib.nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), autocast:
        model = without_memory(meta, stored)
        trained = 4 * sum(p.numel() for p in model.adapter_parameters())
        frozen = sum(p.numel() * p.element_size() for p in model.parameters()) - trained
        x = torch.empty(batch, math.prod(grid), width, dtype=stored)  # what `embed` returns; nothing in it is trained
        y = torch.empty(batch, TEXT_TOKENS, text_width, dtype=stored)
        c, rope = torch.empty(batch, width, dtype=stored), prior.embed_positions(grid)
        kept = Kept(model)
        with kept:
            heard = model.adapters.listen(torch.empty(batch, 4 * grid[0], audio_dim), grid[0])
            ends = kept.count()
            full, between, last = [], bytes_of(x) + bytes_of(y), len(prior.blocks) - 1
            alike: dict[tuple[bool, bool], int] = {}  # hears the music, is the last: all others of a kind keep as much
            for i in range(last + 1):
                kind = i in model.layers, i == last
                if kind not in alike:
                    x, y = model.block(i, x, y, c, rope, None, heard.get(i))
                    alike[kind] = kept.count()
                full.append(alike[kind])
            prior.unembed(x, c, grid)
            ends += kept.count()
    thin = recompute * between + ends  # what is left when the backward pass reaches the recomputed blocks
    activations = max(thin + sum(full[recompute:]), thin + max(full[:recompute], default=0))
    return {
        "frozen weights": frozen,
        "adapters": trained,
        "gradients": trained,
        "optimiser": 2 * trained,
        "activations": activations,
        "passing": 3 * kept.largest,
    }


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
