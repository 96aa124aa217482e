"""The prior with its adapters: what fresh, trained, saved and broken adapters must do."""

import json
from pathlib import Path

import pytest
import torch

import model
import tensors
from config import UserError
from mochi_dit import MochiDiT
from model import OFFICIAL_LAYERS, Adapters, MusicInfuser, load_musicinfuser, save_adapter

DEPTH, LAYERS, AUDIO = 4, (1, 2), 10
MANIFEST = json.loads((Path(__file__).parent / "manifests" / "musicinfuser.json").read_text())


def tiny_dit(depth=DEPTH):
    torch.manual_seed(0)
    dit = MochiDiT(depth=depth, width=48, text_width=24, num_heads=2, text_dim=16)
    torch.nn.init.normal_(dit.pos_frequencies)
    return dit


def tiny_adapters(dit, layers=LAYERS, audio_dim=AUDIO, rank=4, alpha=6, **settings):
    return Adapters(dit, layers=layers, audio_dim=audio_dim, rank=rank, alpha=alpha, **settings)


def trained(m):
    """Give every adapter parameter a value that shows."""
    rng = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in m.adapter_parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.2)
    return m.eval().requires_grad_(False)


def inputs(batch=2, frames=3, tokens=30):
    rng = torch.Generator().manual_seed(5)
    z = torch.randn(batch, 12, frames, 4, 4, generator=rng)
    sigma = torch.tensor([0.3, 0.8])[:batch]
    text = torch.randn(batch, 6, 16, generator=rng)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])[:batch]
    audio = torch.randn(batch, tokens, AUDIO, generator=rng)
    return z, sigma, text, mask, audio


@pytest.mark.parametrize("form", ["published", "aligned", "add"])
@torch.no_grad()
def test_fresh_adapters_leave_the_priors_output_bit_identical(form):
    z, sigma, text, mask, audio = inputs()
    wanted = tiny_dit()(z, sigma, text, mask)
    dit = tiny_dit()
    m = MusicInfuser(dit, tiny_adapters(dit, form=form))
    assert torch.equal(m(z, sigma, text, mask, audio), wanted)
    assert torch.equal(m(z, sigma, text, mask), wanted)
    dit = tiny_dit()
    ablated = MusicInfuser(dit, tiny_adapters(dit, form=form, zero_init=False))
    assert (ablated(z, sigma, text, mask, audio) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["published", "aligned", "add"])
@torch.no_grad()
def test_music_is_heard_after_the_chosen_layers_only(form):
    z, sigma, text, mask, audio = inputs()
    dit = tiny_dit()
    m = trained(MusicInfuser(dit, tiny_adapters(dit, form=form)))
    heard = m(z, sigma, text, mask, audio)
    assert (heard - m(z, sigma, text, mask)).abs().max() > 1e-2
    assert (heard - m(z, sigma, text, mask, audio.flip(1))).abs().max() > 1e-3
    # the same blocks, adapters and embeddings put together by hand
    x, y, c, rope, bias, grid = m.dit.embed(z, sigma, text, mask)
    heard_at = m.adapters.listen(audio, 3)
    for i, block in enumerate(m.dit.blocks):
        x, y = block(x, y, c, rope, bias)
        if i == 1:
            x = m.adapters.infuse(1, x, heard_at[1])
        if i == 2:
            x = m.adapters.infuse(2, x, heard_at[2])
    assert torch.equal(heard, m.dit.unembed(x, c, grid))


@torch.no_grad()
def test_one_zica_per_chosen_layer_in_order():
    dit = tiny_dit()
    adapters = tiny_adapters(dit, layers=(1, 3), zero_init=False)
    x, audio = torch.ones(1, 6, 48), torch.ones(1, 3, AUDIO)
    assert len(adapters.audio_cross_attn_blocks) == 2
    heard, music = adapters.listen(audio, 3), adapters.project(audio, 3)
    assert list(heard) == [1, 3]
    assert torch.equal(adapters.infuse(3, x, heard[3]), adapters.audio_cross_attn_blocks[1](x, music))
    assert not torch.equal(adapters.infuse(1, x, heard[1]), adapters.infuse(3, x, heard[3]))


@torch.no_grad()
def test_each_form_picks_its_own_music_tokens():
    dit = tiny_dit()
    audio = torch.randn(1, 126, AUDIO, generator=torch.Generator().manual_seed(0))
    published, aligned = (tiny_adapters(dit, form=form) for form in ("published", "aligned"))
    everything = published.audio_projection(audio)  # the projector first, as published: then down-sampling
    torch.testing.assert_close(published.project(audio, 13), everything[:, [i * 126 // 13 for i in range(13)]])
    assert not torch.allclose(aligned.project(audio, 13), published.project(audio, 13))


@torch.no_grad()
def test_skipped_layer_is_the_identity_on_both_streams_and_takes_its_music_along():
    z, sigma, text, mask, audio = inputs()
    dit = tiny_dit()
    m = trained(MusicInfuser(dit, tiny_adapters(dit)))
    skipped = m(z, sigma, text, mask, audio, skip_layers=[1])
    x, y, c, rope, bias, grid = m.dit.embed(z, sigma, text, mask)
    for i in (0, 2, 3):
        x, y = m.dit.blocks[i](x, y, c, rope, bias)
        if i == 2:
            x = m.adapters.infuse(2, x, m.adapters.listen(audio, 3)[2])
    assert torch.equal(skipped, m.dit.unembed(x, c, grid))
    assert (skipped - m(z, sigma, text, mask, audio)).abs().max() > 1e-3
    bare = MusicInfuser(tiny_dit())
    assert torch.equal(bare(z, sigma, text, mask, audio, [2]), tiny_dit()(z, sigma, text, mask, skip_layers=[2]))


@torch.no_grad()
def test_denoiser_in_edm_coordinates_is_z_plus_sigma_velocity():
    z, sigma, text, mask, audio = inputs()
    dit = tiny_dit()
    m = trained(MusicInfuser(dit, tiny_adapters(dit)))
    s = sigma / (1 - sigma)
    x = z / (1 - sigma).view(-1, 1, 1, 1, 1)
    wanted = z + sigma.view(-1, 1, 1, 1, 1) * m(z, sigma, text, mask, audio)
    torch.testing.assert_close(m.denoise(x, s, text, mask, audio), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_merged_lora_equals_unmerged():
    z, sigma, text, mask, audio = inputs()
    dit = tiny_dit()
    m = trained(MusicInfuser(dit, tiny_adapters(dit)))
    wanted = m(z, sigma, text, mask, audio)
    m.merge()
    merged = m(z, sigma, text, mask, audio)
    assert 0 < (merged - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (MusicInfuser(tiny_dit())(z, sigma, text, mask) - m(z, sigma, text, mask)).abs().max() > 1e-2


def test_only_adapters_train_and_every_one_of_them_learns():
    z, sigma, text, mask, audio = inputs()
    dit = tiny_dit()
    m = MusicInfuser(dit, tiny_adapters(dit, zero_init=False))
    for lora in (x for x in m.modules() if isinstance(x, model.LoRA)):
        torch.nn.init.normal_(lora.lora_B)
    m(z, sigma, text, mask, audio).square().mean().backward()
    trains = {id(p) for p in m.adapter_parameters()}
    assert trains == {id(p) for p in m.parameters() if p.requires_grad}
    assert all(p.grad.abs().max() > 0 for p in m.adapter_parameters())
    assert all(p.grad is None for p in m.parameters() if id(p) not in trains)


def test_recomputation_gives_the_same_gradients():
    z, sigma, text, mask, audio = inputs()
    gradients = []
    for recompute in range(len(tiny_dit().blocks) + 1):
        dit = tiny_dit()
        m = MusicInfuser(dit, tiny_adapters(dit, zero_init=False))
        m.recompute = recompute
        m(z, sigma, text, mask, audio).square().mean().backward()
        gradients.append([p.grad for p in m.adapter_parameters()])
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other))


def test_each_recomputed_block_keeps_fewer_activations():
    z, sigma, text, mask, audio = inputs()
    kept = []
    for recompute in range(len(tiny_dit().blocks) + 1):
        dit = tiny_dit()
        m, sizes = MusicInfuser(dit, tiny_adapters(dit)), []
        m.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            m(z, sigma, text, mask, audio)
        kept.append(sum(sizes))
    assert kept[-1] < 0.5 * kept[0] and sorted(kept, reverse=True) == kept and len(set(kept)) == len(kept)


def test_fresh_lora_does_not_depend_on_layers_or_form():
    a, b = (tiny_adapters(tiny_dit(), **change).blocks.state_dict() for change in ({}, {"form": "add"}))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_fresh_adapters_are_a_function_of_the_seed_and_leave_the_global_generator_alone():
    dit = tiny_dit()
    torch.manual_seed(1)
    a = tiny_adapters(dit, seed=3).state_dict()
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    b, c = tiny_adapters(dit, seed=3).state_dict(), tiny_adapters(dit, seed=4).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["audio_projection.projection.0.weight"], c["audio_projection.projection.0.weight"])


def test_adapter_names_shapes_and_header_are_the_official_files():
    with torch.device("meta"):
        dit = MochiDiT(depth=48, width=3072, text_width=1536, num_heads=24, text_dim=4096)
        adapters = Adapters(dit)
    ours = {name: list(p.shape) for name, p in adapters.state_dict().items()}
    assert ours == {name: shape for name, (shape, _) in MANIFEST["tensors"].items()}
    header = adapters.metadata()
    assert header.keys() == MANIFEST["safetensors_metadata"].keys()
    assert json.loads(header["kwargs"]) == json.loads(MANIFEST["safetensors_metadata"]["kwargs"])
    assert list(OFFICIAL_LAYERS) == MANIFEST["config"]["audio_cross_attn_layers"]


@pytest.fixture
def saved(tmp_path):
    """A prior and trained adapters on disk: (dit path, adapter path, the model)."""

    def save(**settings):
        dit = tiny_dit()
        tensors.save(tmp_path / "dit.safetensors", dit.state_dict())
        m = trained(MusicInfuser(dit, tiny_adapters(dit, **settings)))
        save_adapter(m, tmp_path / "adapter.safetensors")
        return tmp_path / "dit.safetensors", tmp_path / "adapter.safetensors", m

    return save


@pytest.mark.parametrize("settings", [{}, {"form": "aligned", "null_audio": "drop"}, {"form": "add"}, {"rank": 0}])
@torch.no_grad()
def test_saved_adapter_comes_back_bit_for_bit_with_its_settings(saved, settings):
    dit_path, adapter_path, m = saved(**settings)
    back = load_musicinfuser(dit_path, adapter_path)
    assert back.adapters.metadata() == m.adapters.metadata()
    assert back.adapters.null_audio == settings.get("null_audio", "keep") and back.layers == LAYERS
    assert back.adapters.alpha == 6 or settings.get("rank") == 0
    z, sigma, text, mask, audio = inputs()
    assert torch.equal(back(z, sigma, text, mask, audio), m(z, sigma, text, mask, audio))
    assert not back.training and not any(p.requires_grad for p in back.parameters())
    save_adapter(back, adapter_path.with_name("again.safetensors"))
    first, again = (
        tensors.open_weights(adapter_path.with_name(n)) for n in ("adapter.safetensors", "again.safetensors")
    )
    assert first.metadata == again.metadata and first.shapes == again.shapes
    assert all(torch.equal(first.read(name), again.read(name)) for name in first.shapes)


@torch.no_grad()
def test_official_file_without_our_keys_means_published_form_official_layers_and_music_in_both_passes(tmp_path):
    dit = tiny_dit(depth=48)
    tensors.save(tmp_path / "dit.safetensors", dit.state_dict())
    adapters = Adapters(dit, audio_dim=AUDIO, rank=2, alpha=2)
    bf16 = {name: p.bfloat16() for name, p in adapters.state_dict().items()}
    tensors.save(tmp_path / "a.safetensors", bf16, {"kwargs": adapters.metadata()["kwargs"]})
    m = load_musicinfuser(tmp_path / "dit.safetensors", tmp_path / "a.safetensors")
    assert m.layers == OFFICIAL_LAYERS and m.adapters.form == "published" and m.adapters.null_audio == "keep"
    assert all(p.dtype == torch.float32 for p in m.adapter_parameters())
    load_musicinfuser(tmp_path / "dit.safetensors", tmp_path / "a.safetensors", layers=OFFICIAL_LAYERS, device="meta")
    with pytest.raises(UserError, match="16 ZICA blocks for 15 layers"):
        load_musicinfuser(tmp_path / "dit.safetensors", tmp_path / "a.safetensors", layers=OFFICIAL_LAYERS[1:])


def test_header_names_only_what_differs_from_the_published_model():
    dit = tiny_dit(depth=48)
    assert Adapters(dit, audio_dim=4, rank=2, alpha=2).metadata().keys() == {"kwargs"}
    ours = Adapters(dit, layers=[3], audio_dim=4, rank=2, alpha=2, form="aligned", null_audio="drop").metadata()
    assert {k: v for k, v in ours.items() if k != "kwargs"} == {
        "layers": "[3]",
        "form": "aligned",
        "null_audio": "drop",
    }


@pytest.mark.parametrize("layers", [[1, 3], [1], [2, 1]])
def test_layers_other_than_the_files_are_refused(saved, layers):
    dit_path, adapter_path, _ = saved()
    with pytest.raises(UserError, match="was trained with layers"):
        load_musicinfuser(dit_path, adapter_path, layers=layers)
    assert load_musicinfuser(dit_path, adapter_path, layers=[1, 2]).layers == LAYERS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kwargs": "{"}, "`kwargs` is not JSON"),
        ({"kwargs": "[]"}, "one LoRA alpha"),
        ({"kwargs": '{"qkv_proj_lora_alpha": 1, "out_proj_lora_alpha": 2}'}, "one LoRA alpha"),
        ({"layers": "[1, 99]"}, "0 to 3"),
        ({"layers": '["a", "b"]'}, "0 to 3"),
        ({"layers": "[1, 2, 3]"}, "2 ZICA blocks for 3 layers"),
        ({"layers": "7"}, "was trained with layers"),
        ({"form": "wavy"}, "form 'wavy'"),
        ({"null_audio": "perhaps"}, "null audio 'perhaps'"),
    ],
)
def test_adapter_file_with_a_wrong_header_is_refused(saved, change, message):
    dit_path, adapter_path, m = saved()
    tensors.save(adapter_path, m.adapters.state_dict(), m.adapters.metadata() | change)
    with pytest.raises(UserError, match=message):
        load_musicinfuser(dit_path, adapter_path)


def test_adapter_of_another_prior_is_refused(saved, tmp_path):
    dit_path, adapter_path, m = saved()
    state = m.adapters.state_dict()
    tensors.save(adapter_path, {k: v for k, v in state.items() if not k.startswith("blocks.3.")}, m.adapters.metadata())
    with pytest.raises(UserError, match="missing: blocks.3.attn"):
        load_musicinfuser(dit_path, adapter_path)
    with pytest.raises(UserError, match="not a MusicInfuser adapter"):
        load_musicinfuser(dit_path, dit_path)
    with pytest.raises(UserError, match="no such"):
        load_musicinfuser(dit_path, tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("layers", [[], [2, 1], [1, 1], [4], [-1]])
def test_impossible_layer_lists_are_refused(layers):
    with pytest.raises(UserError, match="ascending block numbers"):
        tiny_adapters(tiny_dit(), layers=layers)


@torch.no_grad()
def test_bfloat16_model_stays_near_float32(saved):
    dit_path, adapter_path, m = saved()
    half = load_musicinfuser(dit_path, adapter_path, dtype=torch.bfloat16)
    z, sigma, text, mask, audio = inputs()
    wanted = m(z, sigma, text, mask, audio)
    out = half(z, sigma, text, mask, audio)
    assert out.dtype == torch.bfloat16 and (out.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
