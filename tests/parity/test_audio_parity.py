"""audio.py against transformers: Wav2Vec 2.0 on random weights, small and at the size of the base model."""

import pytest
import torch
import torch.nn.functional as F

import audio
import tensors

transformers = pytest.importorskip("transformers", reason="the reference Wav2Vec 2.0 lives in transformers")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (8, 12, 8, 8, 8, 8, 16),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
NEW = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


def reference_model(sizes):
    """The reference, on weights that leave no norm at 1, no bias at 0 and no weight norm at its start."""
    torch.manual_seed(0)
    model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes)).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim == 1 or "original0" in name or "weight_g" in name:
            p.mul_(torch.empty_like(p).uniform_(0.5, 1.5)).add_(torch.empty_like(p).uniform_(-0.1, 0.1))
    return model


def official_state(model):
    """The reference's tensors under the older of the two spellings."""
    state = {name: p.clone() for name, p in model.state_dict().items()}
    for old, new in NEW.items():
        state = {name.replace(new, old): p for name, p in state.items()}
    assert any(name.endswith("conv.weight_g") for name in state)
    return state


def error_of(ours, reference, waveform):
    expected = reference(waveform).last_hidden_state
    got = ours(waveform)
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("prefix", ["", "wav2vec2."])
@pytest.mark.parametrize("spelling", ["weight_g", "original0"])
def test_our_encoder_matches_the_reference_in_both_spellings(tmp_path, prefix, spelling):
    reference = reference_model(SMALL)
    state = official_state(reference)
    if spelling == "original0":
        for old, new in NEW.items():
            state = {name.replace(old, new): p for name, p in state.items()}
    assert any(spelling in name for name in state)
    tensors.save(tmp_path / "model.safetensors", {prefix + name: p for name, p in state.items()})
    ours = audio.load_wav2vec2(tmp_path, num_heads=4)
    for samples in (400, 8_000, 20_001):
        waveform = torch.randn(2, samples, generator=torch.Generator().manual_seed(samples))
        error = error_of(ours, reference, waveform)
        print(f"{samples} samples: largest error / largest output {error:.1e}")
        assert error <= 5e-5


def test_an_odd_position_kernel_matches_the_reference(tmp_path):
    reference = reference_model(SMALL | {"num_conv_pos_embeddings": 15})
    tensors.save(tmp_path / "model.safetensors", official_state(reference))
    ours = audio.load_wav2vec2(tmp_path, num_heads=4)
    assert error_of(ours, reference, torch.randn(1, 8_000, generator=torch.Generator().manual_seed(0))) <= 5e-5


def test_our_encoder_matches_the_reference_at_the_size_of_the_base_model(tmp_path):
    reference = reference_model({})
    tensors.save(tmp_path / "model.safetensors", official_state(reference))
    ours = audio.load_wav2vec2(tmp_path)
    error = error_of(ours, reference, torch.randn(1, 40_000, generator=torch.Generator().manual_seed(0)))
    print(f"base size, 2.5 s: largest error / largest output {error:.1e}")
    assert error <= 5e-5


def test_features_match_the_reference_before_its_transformer(tmp_path):
    reference = reference_model(SMALL)
    tensors.save(tmp_path / "model.safetensors", official_state(reference))
    waveform = torch.randn(2, 8_000, generator=torch.Generator().manual_seed(0))
    expected, _ = reference.feature_projection(reference.feature_extractor(waveform).transpose(1, 2))
    got = audio.load_wav2vec2(tmp_path, num_heads=4).features(waveform)
    assert (got - expected).abs().max() <= 5e-5 * expected.abs().max()


def test_the_reference_reads_the_file_that_we_save(tmp_path):
    reference = reference_model(SMALL)
    tensors.save(tmp_path / "model.safetensors", official_state(reference))
    audio.save_wav2vec2(audio.load_wav2vec2(tmp_path, num_heads=4), tmp_path / "model.safetensors")
    reference.config.save_pretrained(tmp_path)
    again = transformers.Wav2Vec2Model.from_pretrained(tmp_path).eval()
    waveform = torch.randn(1, 8_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(waveform).last_hidden_state, reference(waveform).last_hidden_state)


@pytest.mark.parametrize("samples", [1_000, 200_000])
def test_our_normalisation_matches_the_reference_on_the_padded_clip(samples):
    x = 0.3 + 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(0))
    n = audio.clip_samples(145)
    padded = F.pad(x[:n], (0, max(0, n - samples)))
    extract = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    expected = extract(padded.numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    assert (audio.prepare(x, 145) - expected).abs().max() <= 5e-5 * expected.abs().max()
