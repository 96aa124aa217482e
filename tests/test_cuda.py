"""Each network on CUDA, in float32 and in bfloat16, against the same weights on the CPU in float32.

Prints the errors (`pytest -s`). float32 products may use TF32 nowhere: PyTorch's default, asserted here.
"""

import copy
import time

import pytest
import torch

import audio
import mochi_vae
from adapters import LoRALinear
from mochi_dit import KEEP_FLOAT32, MochiDiT
from model import Adapters, MusicInfuser

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FLOAT32, BFLOAT16 = 5e-5, 4e-2  # largest error, of the largest output


@pytest.fixture(autouse=True)
def exact_products():
    assert not torch.backends.cuda.matmul.allow_tf32
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def shake(module: torch.nn.Module) -> torch.nn.Module:
    """Weights in which every part matters: gates, zero starts, positions and gains included."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and parameter.ndim == 1:
            parameter.data = 1 + 0.2 * noise if name.endswith("weight") else 0.1 * noise
        elif parameter.ndim > 1 and "pos_frequencies" not in name:
            parameter.data = noise * parameter[0].numel() ** -0.5
        else:
            parameter.data = 0.1 * noise
    return module.eval().requires_grad_(False)


def on_cuda(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A copy with the types that the loaders give it."""
    module = copy.deepcopy(module).to("cuda")
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name.endswith(KEEP_FLOAT32) else dtype)
    return module


def error(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    ours, wanted = ours.float().cpu(), wanted.float()
    assert ours.isfinite().all()
    return ((ours - wanted).abs().max() / wanted.abs().max()).item()


def compare(name: str, module: torch.nn.Module, run, loose: float = BFLOAT16):
    """run(module, device, dtype) -> tensor, on the CPU in float32 and on CUDA in both types."""
    with torch.no_grad():
        wanted = run(module, "cpu", torch.float32)
        for dtype, most in ((torch.float32, FLOAT32), (torch.bfloat16, loose)):
            began = time.perf_counter()
            found = error(run(on_cuda(module, dtype), "cuda", dtype), wanted)
            spent = time.perf_counter() - began
            print(f"\n{name:<34}{str(dtype)[6:]:<10}error {found:.1e}, at most {most:.0e}; {spent:.1f} s")
            assert found < most, (name, dtype)


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prior(depth=3) -> MochiDiT:
    return MochiDiT(depth=depth, width=256, text_width=128, num_heads=2, text_dim=64)


MASKS = {"full": [9], "partial": [4], "empty": [0], "mixed": [9, 3, 0]}


@pytest.mark.parametrize("lengths", MASKS.values(), ids=MASKS.keys())
def test_transformer_on_cuda_is_that_of_the_cpu(lengths):
    B = len(lengths)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]

    def run(dit, device, dtype):
        z, text = noise(B, 12, 3, 8, 10).to(device), noise(B, 9, 64, seed=2).to(device)
        return dit(z, torch.full((B,), 0.4, device=device), text, mask)

    compare(f"transformer, prompts {lengths}", shake(prior()), run)


def infuser(form: str) -> MusicInfuser:
    dit = shake(prior())
    adapters = shake(Adapters(dit, [0, 2], 64, rank=8, alpha=8.0, form=form))
    return MusicInfuser(dit, adapters)


@pytest.mark.parametrize("form", ["published", "aligned", "add"])
@pytest.mark.parametrize("merged", [False, True])
def test_music_infuser_on_cuda_is_that_of_the_cpu(form, merged):
    def run(m, device, dtype):
        if merged:
            m.merge()
        z, text, music = noise(1, 12, 3, 8, 10), noise(1, 9, 64, seed=2), noise(1, 20, 64, seed=3)
        sigma = torch.full((1,), 0.4, device=device)
        return m(z.to(device), sigma, text.to(device), torch.ones(1, 9, dtype=torch.bool), music.to(device))

    m = infuser(form)
    compare(f"MusicInfuser, {form}{', merged' * merged}", m, lambda m, *how: run(copy.deepcopy(m), *how))


def decoder():
    return shake(mochi_vae.Decoder((64, 64, 96, 128), (1,) * 5, ((1, 2, 2), (2, 2, 2), (3, 2, 2)), 8))


def encoder():
    reductions, attention = ((1, 2, 2), (2, 2, 2), (3, 2, 2)), (False, True, True, True, True)
    return shake(mochi_vae.Encoder((64, 64, 96, 128), (1,) * 5, reductions, attention, 8))


def test_decoder_on_cuda_is_that_of_the_cpu():
    compare("decoder, whole", decoder(), lambda d, device, dtype: d(noise(1, 12, 3, 6, 8).to(device)))


def test_streamed_decoder_on_cuda_is_the_whole_one_of_the_cpu():
    model = decoder()

    def run(d, device, dtype):
        z = noise(1, 12, 3, 6, 8).to(device)
        return d(z) if device == "cpu" else torch.cat([*d.stream(z)], 2)

    compare("decoder, streamed", model, run)


def test_encoder_on_cuda_is_that_of_the_cpu():
    def run(e, device, dtype):
        return torch.cat(e(noise(1, 3, 13, 32, 48).tanh().to(device)), 1)

    compare("encoder", encoder(), run, loose=0.15)  # the angles of its input reach 804: bf16 weights meet fine detail


def test_t5_on_cuda_is_that_of_the_cpu():
    t5 = pytest.importorskip("t5", exc_type=ImportError)
    mask = torch.arange(12) < torch.tensor([12, 5])[:, None]

    def run(model, device, dtype):
        ids = torch.randint(0, 90, (2, 12), generator=torch.Generator().manual_seed(4)).to(device)
        return model(ids, mask.to(device)).masked_fill(~mask[..., None].to(device), 0)

    torch.manual_seed(0)
    model = t5.T5(
        vocab=90, width=64, depth=3, heads=4, kv=16, ffn=128
    )  # fresh: no 1/sqrt(K) in its scores to hold them
    compare("T5", model.eval().requires_grad_(False), run)


def test_wav2vec2_on_cuda_is_that_of_the_cpu():
    model = audio.Wav2Vec2(128, depth=2, ffn=256, heads=2, conv_widths=(32,) * 7, pos_kernel=16, pos_groups=4)
    model = shake(model)
    compare("Wav2Vec2", model, lambda m, device, dtype: m(noise(1, 16000).to(device, dtype)))


@pytest.mark.parametrize("recompute", [0, 3])
def test_a_training_step_on_cuda_has_the_loss_and_gradients_of_the_cpu(recompute):
    """float32 everywhere; then as trained: bf16 prior, float32 adapters, autocast."""

    def run(m, device, dtype):
        m = on_cuda(m, dtype) if device == "cuda" else copy.deepcopy(m)
        m.adapters.float().requires_grad_(True)
        m.recompute = recompute
        z, eps, text, music = noise(1, 12, 3, 8, 10), noise(1, 12, 3, 8, 10, seed=5), noise(1, 9, 64), noise(1, 20, 64)
        z, eps, text, music = (t.to(device) for t in (z, eps, text, music))
        sigma = torch.full((1,), 0.4, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            v = m(0.6 * z + 0.4 * eps, sigma, text, torch.ones(1, 9, dtype=torch.bool), music)
        loss = (v.float() - (z - eps)).square().mean()
        loss.backward()
        assert all(p.grad is None for p in m.dit.parameters() if id(p) not in {id(q) for q in m.adapter_parameters()})
        return loss.detach().cpu(), torch.cat([p.grad.flatten().cpu() for p in m.adapter_parameters()])

    m = infuser("published")
    assert any(isinstance(module, LoRALinear) for module in m.modules())
    loss, gradient = run(m, "cpu", torch.float32)
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 6e-2)):
        ours, ours_gradient = run(m, "cuda", dtype)
        off = (ours_gradient - gradient).norm() / gradient.norm()  # of all gradients together
        told = f"loss {ours:.6f} for {loss:.6f}, gradient off by {off:.1e}"
        print(f"\ntraining step, {recompute} recomputed, {str(dtype)[6:]}: {told}")
        assert abs(ours - loss) < most * loss and off < most, dtype


def test_compiled_blocks_on_cuda_give_the_velocity_of_the_cpu():
    pytest.importorskip("triton", reason="torch.compile needs triton on CUDA")
    from mochi_dit import compile_blocks

    def run(dit, device, dtype):
        if device == "cuda":
            compile_blocks(dit)
        z, text = noise(1, 12, 3, 8, 10).to(device), noise(1, 9, 64, seed=2).to(device)
        return dit(z, torch.full((1,), 0.4, device=device), text, torch.ones(1, 9, dtype=torch.bool))

    compare("transformer, compiled", shake(prior(2)), run)
    torch._dynamo.reset()
