"""What people would use instead, on the weights of ours: diffusers' transformer and VAE, transformers' T5 and Wav2Vec2.

Concept   each function takes a network of ours and returns the peer with the same weights, most of them in the same
          memory. Music and LoRA come to diffusers' transformer by hooks, as nobody offers them for it.
Paper     arXiv 2503.14505v2, Sec. 4.3: what the hooks add.
"""

from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import audio
import mochi_vae
from adapters import NUM_HEADS
from mochi_dit import MochiDiT, from_diffusers, swap_halves
from model import Adapters


def give(peer: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Put these tensors into a module made on the meta device; every parameter gets its own, of whatever size."""
    if missing := peer.state_dict().keys() ^ state.keys():
        raise ValueError(f"the peer's weights and ours differ in {sorted(missing)[:8]}")
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        setattr(peer.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    return peer.eval()


def diffusers_transformer(dit: MochiDiT) -> nn.Module:
    """Its text MLPs are not rounded up to 256s: at such widths they get the size of ours."""
    from diffusers import MochiTransformer3DModel

    _, heads, half = dit.pos_frequencies.shape
    text_width, text_dim = dit.t5_yproj.weight.shape
    with torch.device("meta"):
        peer = MochiTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=2 * half,
            num_layers=len(dit.blocks),
            pooled_projection_dim=text_width,
            text_embed_dim=text_dim,
        )
    state, ours = {}, dit.state_dict()
    for name, (names, join) in from_diffusers(dit).items():
        parts = ours[name].chunk(len(names))
        state |= dict(zip(names, [swap_halves(part) for part in parts] if join is swap_halves else parts))
    return give(peer, state)


def diffusers_vae(encoder: mochi_vae.Encoder, decoder: mochi_vae.Decoder) -> tuple[nn.Module, nn.Module]:
    """(encoder, decoder); their norms get as many groups as ours have. `AutoencoderKLMochi.decode` drops the decoder's
    first 5 frames."""
    from diffusers.models.autoencoders import autoencoder_kl_mochi as published

    ours = {"encoder": encoder, "decoder": decoder}
    shapes = {half: {n: tuple(t.shape) for n, t in m.state_dict().items()} for half, m in ours.items()}
    widths, blocks, reductions, attention = mochi_vae.encoder_sizes(shapes["encoder"])
    decoder_widths, decoder_blocks, expansions = mochi_vae.decoder_sizes(shapes["decoder"])
    norm, latent = partial(published.MochiChunkedGroupNorm3D, num_groups=decoder.norm_groups), mochi_vae.LATENT
    times, spaces = ([tuple(x[i] for x in steps) for steps in (reductions, expansions)] for i in (0, 1))
    with torch.device("meta"), patch.object(published, "MochiChunkedGroupNorm3D", norm):
        peer = nn.ModuleDict(
            {
                "encoder": published.MochiEncoder3D(15, latent, widths, blocks, times[0], spaces[0], attention),
                "decoder": published.MochiDecoder3D(latent, 3, decoder_widths, decoder_blocks, times[1], spaces[1]),
            }
        )
    theirs, state = {name: tuple(tensor.shape) for name, tensor in peer.state_dict().items()}, {}
    for half, module in ours.items():
        names = mochi_vae.diffusers_names(theirs, half)
        for name, tensor in module.state_dict().items():
            layer, _, leaf = name.rpartition(".")
            parts = [f".to_{x}" for x in "qkv"] if layer.endswith(".qkv") else [""]
            state |= {f"{names[layer]}{part}.{leaf}": rows for part, rows in zip(parts, tensor.chunk(len(parts)))}
    give(peer, state)
    return peer["encoder"], peer["decoder"]


def transformers_t5(model: nn.Module) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    from t5 import official_name

    block = model.blocks[0]
    config = T5Config(
        vocab_size=model.embed.num_embeddings,
        d_model=model.embed.embedding_dim,
        d_kv=block.q.out_features // block.heads,
        d_ff=block.wi_0.out_features,
        num_layers=len(model.blocks),
        num_heads=block.heads,
        feed_forward_proj="gated-gelu",
    )
    peer = T5EncoderModel(config).eval().requires_grad_(False)
    state = {official_name(name): tensor for name, tensor in model.state_dict().items()}
    wrong = peer.load_state_dict(state, strict=False)
    if wrong.unexpected_keys or set(wrong.missing_keys) - {"encoder.embed_tokens.weight"}:
        raise ValueError(f"transformers' T5 does not take our weights: {wrong}")
    return peer


def transformers_wav2vec2(model: audio.Wav2Vec2) -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    layer, position = model.encoder.layers[0], model.encoder.pos_conv_embed.conv
    convs = [layer.conv.weight for layer in model.feature_extractor.conv_layers]
    config = Wav2Vec2Config(
        hidden_size=position.weight_v.shape[0],
        num_hidden_layers=len(model.encoder.layers),
        num_attention_heads=layer.attention.heads,
        intermediate_size=layer.feed_forward.intermediate_dense.out_features,
        conv_dim=tuple(w.shape[0] for w in convs),
        conv_kernel=tuple(w.shape[2] for w in convs),
        num_conv_pos_embeddings=position.weight_v.shape[2],
        num_conv_pos_embedding_groups=position.groups,
    )
    peer = Wav2Vec2Model(config).eval().requires_grad_(False)
    state = {}
    for name, tensor in model.state_dict().items():
        for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
            name = name.replace(old, f"parametrizations.weight.{new}")
        state[name] = tensor
    wrong = peer.load_state_dict(state, strict=False)
    if wrong.unexpected_keys or set(wrong.missing_keys) - {"masked_spec_embed"}:
        raise ValueError(f"transformers' Wav2Vec2 does not take our weights: {wrong}")
    return peer


def hang_adapters(peer: nn.Module, adapters: Adapters, audio_tokens: Tensor, frames: int) -> list[nn.Parameter]:
    """LoRA and ZICA (published form) on diffusers' transformer by forward hooks; returns what trains.

    Its q, k and v are three Linears: each gets A and a third of B as a parameter of its own. The music is projected
    anew in every forward pass, and the hooks read it from `peer.music`.
    """
    scale, rows = adapters.alpha / adapters.rank, []
    peer.register_forward_pre_hook(lambda *_: setattr(peer, "music", adapters.project(audio_tokens, frames)))

    def add_lora(linear: nn.Linear, A: Tensor, B: nn.Parameter):
        linear.register_forward_hook(lambda _, inputs, out: out + scale * F.linear(F.linear(inputs[0], A), B))
        rows.append(B)

    def add_zica(block: nn.Module, zica: nn.Module):
        def hook(_, inputs, out):
            x = out[0]
            q, k, v = (
                linear(tokens).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)
                for linear, tokens in ((zica.to_q, x), (zica.to_k, peer.music), (zica.to_v, peer.music))
            )
            heard = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return x + zica.to_out(heard), *out[1:]

        block.register_forward_hook(hook)

    for i, (block, loras) in enumerate(zip(peer.transformer_blocks, adapters.blocks)):
        attn = block.attn1
        linears = {
            "qkv_x": [attn.to_q, attn.to_k, attn.to_v],
            "qkv_y": [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj],
            "proj_x": [attn.to_out[0]],
        }
        if hasattr(attn, "to_add_out"):
            linears["proj_y"] = [attn.to_add_out]
        for name, lora in loras.attn.named_children():
            for linear, B in zip(linears[name], lora.lora_B.detach().chunk(len(linears[name]))):
                add_lora(linear, lora.lora_A, nn.Parameter(B.clone()))
        if i in adapters.layers:
            add_zica(block, adapters.audio_cross_attn_blocks[adapters.layers.index(i)])
    return [p for name, p in adapters.named_parameters() if not name.endswith("lora_B")] + rows
