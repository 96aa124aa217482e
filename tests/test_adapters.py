"""The adapters against Eq. (6) written out, and what each form must and must not see."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adapters
from adapters import ZICA, AudioProjector, LoRA, LoRALinear, add_feature, centre_index, published_index, rotate, turns

D, T, S = 48, 5, 20  # width, latent frames, video tokens (4 a frame)


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained_zica(aligned):
    """A ZICA that does something: no zero in it, and large enough for the softmax to be peaked."""
    torch.manual_seed(3)
    zica = ZICA(D, aligned=aligned, zero_init=False).double()
    for linear in (zica.to_q, zica.to_k):
        linear.weight.data *= 3
    return zica


def equation_6(zica, x, a):
    """Eq. (6) for one clip, head by head, matrix by matrix. x (S, D), a (T, D)."""
    q = x @ zica.to_q.weight.T + zica.to_q.bias
    k = a @ zica.to_k.weight.T + zica.to_k.bias
    v = a @ zica.to_v.weight.T + zica.to_v.bias
    width = x.shape[1] // 8
    heads = []
    for n in range(8):
        part = slice(n * width, (n + 1) * width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width)
        heads.append(scores.softmax(dim=1) @ v[:, part])
    return x + torch.cat(heads, dim=1) @ zica.to_out.weight.T + zica.to_out.bias


def test_published_zica_is_equation_6():
    zica = trained_zica(aligned=False)
    x, a = seeded(2, S, D, dtype=torch.float64), seeded(2, T, D, seed=1, dtype=torch.float64)
    wanted = torch.stack([equation_6(zica, x[b], a[b]) for b in range(2)])
    torch.testing.assert_close(zica(x, a), wanted)
    assert (wanted - x).abs().max() > 0.1


@pytest.mark.parametrize("aligned", [False, True])
def test_fresh_zica_is_the_identity_and_its_ablation_is_not(aligned):
    x, a = seeded(2, S, D), seeded(2, T, D, seed=1)
    assert torch.equal(ZICA(D, aligned=aligned)(x, a), x)
    assert not torch.allclose(ZICA(D, aligned=aligned, zero_init=False)(x, a), x, atol=1e-2)


def test_only_the_published_form_hears_the_music_as_a_bag():
    x, a = seeded(1, S, D, dtype=torch.float64), seeded(1, T, D, seed=1, dtype=torch.float64)
    shuffled = a[:, [3, 0, 4, 2, 1]]
    published, aligned = trained_zica(False), trained_zica(True)
    torch.testing.assert_close(published(x, shuffled), published(x, a))
    assert (aligned(x, shuffled) - aligned(x, a)).abs().max() > 0.05


def test_both_forms_have_the_same_parameters():
    assert trained_zica(False).state_dict().keys() == trained_zica(True).state_dict().keys()


def test_aligned_form_depends_on_relative_time_only(monkeypatch):
    """Start counting latent frames at 7 instead of 0, for video and music alike: nothing changes."""
    zica = trained_zica(aligned=True)
    x, a = seeded(1, S, D, dtype=torch.float64), seeded(1, T, D, seed=1, dtype=torch.float64)
    here = zica(x, a)
    monkeypatch.setattr(adapters, "turns", lambda position, width: turns(position + 7, width))
    torch.testing.assert_close(zica(x, a), here, atol=1e-5, rtol=1e-5)  # angles are float32


def test_aligned_form_follows_music_that_moves_with_the_video():
    """One frame's query against its own, the last and the next music token: the same wherever the frame is."""
    q, k = seeded(1, 8, 1, 6, dtype=torch.float64), seeded(1, 8, 1, 6, seed=1, dtype=torch.float64)

    def score(frame, token):
        at_frame, at_token = (turns(torch.tensor([n]), 6) for n in (frame, token))
        return (rotate(q, *at_frame) * rotate(k, *at_token)).sum(-1)

    for lag in (-1, 0, 1):
        torch.testing.assert_close(score(3, 3 + lag), score(20, 20 + lag), atol=1e-5, rtol=1e-5)
    assert (score(3, 4) - score(3, 3)).abs().max() > 0.1
    assert (score(3, 4) - score(3, 2)).abs().max() > 0.1, "cannot tell before from after"
    assert not torch.allclose(score(3, 30), score(3, 3), atol=0.1), "far looks like now"


def test_published_tokens_are_the_floor_of_i_a_over_t():
    assert published_index(245, 25)[:4] == [0, 9, 19, 29]  # 9.8, 19.6, 29.4
    assert published_index(245, 25)[-1] == 235
    assert published_index(3, 5) == [0, 0, 1, 1, 2], "fewer tokens than frames repeats them"


def test_aligned_tokens_are_those_heard_at_the_frames_centres():
    # 73 frames: 13 latent frames, 73/30 + 0.09 s. One token per millisecond makes the index a time.
    duration = 73 / 30 + 0.09
    index = centre_index(round(duration * 1000), 13)
    # frame 1 is video frames 1..6, on screen from 1/30 to 7/30 s; frame 12 is 67..72, on screen from 67/30 to 73/30 s
    assert index[0] == pytest.approx(500 / 30, abs=1.5)
    assert index[1] == pytest.approx(4000 / 30, abs=1.5)
    assert index[12] == pytest.approx(70_000 / 30, abs=1.5)
    assert centre_index(1, 13) == [0] * 13 and max(centre_index(126, 13)) < 126


def test_projector_is_linear_silu_linear_token_by_token():
    torch.manual_seed(0)
    projector, a = AudioProjector(7, D), seeded(2, 9, 7)
    first, _, last = projector.projection
    wanted = F.silu(a @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(projector(a), wanted)
    torch.testing.assert_close(projector(a)[:, [4, 8]], projector(a[:, [4, 8]]))


def test_feature_addition_reaches_its_own_frame_only():
    x, a = seeded(1, S, D), torch.zeros(1, T, D)
    a[0, 2] = seeded(D, seed=1)
    change = (add_feature(x, a) - x).unflatten(1, (T, S // T))  # (1, T, tokens of a frame, D)
    torch.testing.assert_close(change[0, 2], a[0, 2].expand(S // T, D))
    assert change[0, [0, 1, 3, 4]].abs().max() == 0


def lora_linear():
    torch.manual_seed(1)
    lora = LoRALinear(nn.Linear(12, 10), LoRA(12, 10, rank=4, alpha=6.0))
    return lora


def test_fresh_lora_changes_nothing_but_can_learn():
    lora, x = lora_linear(), seeded(3, 12)
    assert torch.equal(lora(x), lora.linear(x))
    lora(x).square().sum().backward()
    assert lora.lora.lora_B.grad.abs().max() > 0
    bound = 1 / math.sqrt(12)  # kaiming-uniform(a = sqrt 5) over 12 inputs
    assert 0.9 * bound < lora.lora.lora_A.abs().max() <= bound


def test_lora_is_alpha_over_rank_times_b_a():
    lora, x = lora_linear(), seeded(3, 12)
    nn.init.normal_(lora.lora.lora_B)
    delta = 6.0 / 4 * lora.lora.lora_B @ lora.lora.lora_A
    torch.testing.assert_close(lora(x), x @ (lora.linear.weight + delta).T + lora.linear.bias)


def test_merged_lora_equals_unmerged_and_comes_back():
    lora, x = lora_linear(), seeded(3, 12)
    nn.init.normal_(lora.lora.lora_B)
    weight, wanted = lora.linear.weight.clone(), lora(x)
    lora.merge()
    lora.merge()  # a second time changes nothing
    torch.testing.assert_close(lora(x), wanted)
    torch.testing.assert_close(lora.linear(x), wanted), "not in the weight"
    lora.unmerge()
    lora.unmerge()
    torch.testing.assert_close(lora.linear.weight, weight)
    torch.testing.assert_close(lora(x), wanted)


def test_fresh_aligned_attention_looks_at_its_own_time_first():
    torch.manual_seed(0)
    zica, frames, width = ZICA(192, aligned=True), 13, 192
    x, a = torch.randn(1, frames, width), torch.randn(1, frames, width)
    weights = []
    with torch.no_grad():
        zica.to_out.weight.copy_(torch.eye(width))
        for t in range(
            frames
        ):  # with a value of one at frame t and zero elsewhere, the output is the attention paid to t
            zica.to_v = OneAt(t)
            weights.append((zica(x, a) - x)[0].mean(-1))
    weights = torch.stack(weights, 1)  # (query, key), mean of the heads
    torch.testing.assert_close(weights.sum(1), torch.ones(frames))
    assert torch.equal(weights.argmax(1), torch.arange(frames)) and weights.diagonal().min() > 0.3


class OneAt(torch.nn.Module):
    def __init__(self, t):
        super().__init__()
        self.t = t

    def forward(self, a):
        return torch.zeros_like(a).index_fill_(1, torch.tensor([self.t]), 1.0)
