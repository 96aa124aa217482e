"""One training step against diffusers' MochiTransformer3DModel with the adapters written by hand, by hooks.

LoRA on to_q, to_k, to_v is a third of our LoRA on qkv each: A is shared, B is cut in three.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data import Batch
from mochi_dit import load_dit
from model import Adapters, MusicInfuser
from train import velocity_error

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # diffusers asks for a float32 autocast

WIDTH, TEXT_DIM, AUDIO_DIM, LAYERS, RANK, ALPHA = 96, 64, 24, [0, 2], 5, 3.0


def reference():
    """Random weights everywhere, also where fresh ones are zero or one."""
    torch.manual_seed(0)
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=4, attention_head_dim=24, num_layers=3, pooled_projection_dim=WIDTH, text_embed_dim=TEXT_DIM
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "pos_frequencies":
                p.normal_(std=0.1)
            elif ".norm_" in name or "_norm_" in name:
                p.normal_(1, 0.3)
    return model.eval().requires_grad_(False)


def adapt(model, p, audio, frames):
    """Hang the adapters with parameters `p` on diffusers' model."""

    def add_lora(linear, A, B):
        linear.register_forward_hook(lambda _, inputs, out: out + ALPHA / RANK * (inputs[0] @ A.T) @ B.T)

    def add_zica(block, W, b, music):
        def hook(_, inputs, out):
            x = out[0]
            q, k, v = ((t @ W[n].T + b[n]).chunk(8, -1) for t, n in ((x, "q"), (music, "k"), (music, "v")))
            heads = [(qh @ kh.mT / math.sqrt(qh.shape[-1])).softmax(-1) @ vh for qh, kh, vh in zip(q, k, v)]
            return x + torch.cat(heads, -1) @ W["out"].T + b["out"], *out[1:]

        block.register_forward_hook(hook)

    first, second = "audio_projection.projection.0.", "audio_projection.projection.2."
    tokens = torch.stack([audio[:, i * audio.shape[1] // frames] for i in range(frames)], 1)
    hidden = F.silu(tokens @ p[first + "weight"].T + p[first + "bias"])
    music = hidden @ p[second + "weight"].T + p[second + "bias"]
    for i, block in enumerate(model.transformer_blocks):
        attn, last = block.attn1, i == len(model.transformer_blocks) - 1
        for ours, linears in (
            ("qkv_x", (attn.to_q, attn.to_k, attn.to_v)),
            ("qkv_y", (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)),
            ("proj_x", (attn.to_out[0],)),
            ("proj_y", () if last else (attn.to_add_out,)),
        ):
            if linears:
                A, B = (p[f"blocks.{i}.attn.{ours}.lora_{k}"] for k in "AB")
                for linear, rows in zip(linears, B.chunk(len(linears))):
                    add_lora(linear, A, rows)
        if i in LAYERS:
            names = "q", "k", "v", "out"
            at = f"audio_cross_attn_blocks.{LAYERS.index(i)}.to_"
            add_zica(block, *({n: p[f"{at}{n}.{kind}"] for n in names} for kind in ("weight", "bias")), music)


def test_loss_and_gradients_of_a_step_equal_autograd_through_diffusers(tmp_path):
    theirs = reference()
    theirs.save_pretrained(tmp_path)
    dit = load_dit(tmp_path)
    ours = MusicInfuser(dit, Adapters(dit, LAYERS, AUDIO_DIM, RANK, ALPHA))
    for p in ours.adapter_parameters():
        nn.init.normal_(p, std=0.15)
    g = torch.Generator().manual_seed(1)
    z, eps = torch.randn(2, 2, 12, 3, 4, 6, generator=g)
    text, audio = torch.randn(2, 9, TEXT_DIM, generator=g), torch.randn(2, 17, AUDIO_DIM, generator=g)
    mask, sigma = torch.arange(9) < torch.tensor([[9], [4]]), torch.tensor([0.3, 0.8])

    loss = velocity_error(ours, Batch(z, text, mask, audio, []), audio, sigma, eps, "float32").mean()
    gradients = torch.autograd.grad(loss, ours.adapter_parameters())

    parameters = {name: p.detach().clone().requires_grad_() for name, p in ours.adapters.named_parameters()}
    adapt(theirs, parameters, audio, z.shape[2])
    s = sigma[:, None, None, None, None]
    velocity = theirs((1 - s) * z + s * eps, text, 1000 * (1 - sigma), mask, return_dict=False)[0]
    wanted = F.mse_loss(velocity, z - eps)
    wanted_gradients = torch.autograd.grad(wanted, parameters.values())

    assert abs(loss / wanted - 1) <= 1e-5
    largest = max(gradient.abs().max() for gradient in wanted_gradients)
    assert largest > 0
    for name, one, other in zip(parameters, gradients, wanted_gradients):
        # what only rounding makes (softmax ignores the bias of k) is measured against the largest gradient of all
        scale = largest if name.endswith("to_k.bias") else other.abs().max()
        assert ((one - other).abs().max() / scale) <= 1e-4, name
