"""VBench's scores with made weights: the arithmetic with stand-ins for the two packages, and with these themselves."""

import importlib.util
import json
import sys
import types

import numpy as np
import pytest
import torch
from tiny import write_video
from torch import nn

import judge
import media
import tensors
import vbench
from config import UserError


def frames(count=3, high=40, wide=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, high, wide, 3), np.uint8)


def pictures(count=3, high=40, wide=60, seed=0):
    """The same as float tensors (F, 3, H, W) in 0 ... 255."""
    return torch.from_numpy(frames(count, high, wide, seed)).permute(0, 3, 1, 2).float()


class Musiq(nn.Module):
    """Stands in for MUSIQ: a weighted mean of the picture, 0 ... 100 or so."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([10.0, 20.0, 30.0]))

    def forward(self, x):
        assert 0 <= x.min() and x.max() <= 1
        return (x.mean((2, 3)) @ self.weight)[:, None]


class Eye(nn.Module):
    """Stands in for CLIP's visual half: 768 weighted means."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 768, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224)
        return x.mean((2, 3)) @ self.weight


@pytest.fixture
def packages(monkeypatch):
    """Both packages as stand-ins whose networks start with other numbers than the files hold."""

    def create_metric(name, device, pretrained):
        assert name == "musiq-spaq" and pretrained is False  # else pyiqa would download and unpickle
        net = Musiq().to(device)
        nn.init.zeros_(net.weight)
        return types.SimpleNamespace(net=net)

    def create_model(name, pretrained, device):
        assert name == "ViT-L-14-quickgelu" and pretrained is None
        eye = Eye().to(device)
        nn.init.zeros_(eye.weight)
        return types.SimpleNamespace(visual=eye)

    monkeypatch.setitem(sys.modules, "pyiqa", types.SimpleNamespace(create_metric=create_metric))
    monkeypatch.setitem(sys.modules, "open_clip", types.SimpleNamespace(create_model=create_model))


HEAD = {"weight": torch.randn(1, 768, generator=torch.Generator().manual_seed(2)), "bias": torch.tensor([5.0])}


@pytest.fixture
def folder(tmp_path):
    tensors.save(tmp_path / vbench.MUSIQ, Musiq().state_dict())
    tensors.save(tmp_path / vbench.CLIP, {"visual.weight": Eye().weight, "token_embedding.weight": torch.zeros(3)})
    tensors.save(tmp_path / "sa_0_4_vit_l_14_linear.safetensors", HEAD)
    return tmp_path


# ---------------------------------------------------------------------------------------------------- the pictures


@pytest.mark.parametrize("high, wide, expected", [(480, 848, (289, 512)), (1030, 700, (512, 347)), (96, 96, (96, 96))])
def test_no_side_is_longer_than_512_sides_are_rounded_down_and_small_pictures_stay(high, wide, expected):
    x = pictures(1, high, wide)
    found = vbench.imaging_input(x)
    assert found.shape == (1, 3, *expected) and 0 <= found.min() and found.max() <= 1
    if expected == (high, wide):
        assert torch.equal(found, x / 255)


def test_shrinking_takes_two_neighbours_a_side_without_smoothing():
    x = torch.zeros(1, 3, 1024, 1024)
    x[:, :, ::4] = 255  # every fourth row: of two to one, each new row is the mean of two old ones
    found = vbench.imaging_input(x)
    assert found[0, 0, :, 0] == pytest.approx(torch.tensor([0.5, 0.0] * 256))


@pytest.mark.parametrize("high, wide", [(240, 424), (424, 240), (96, 96), (224, 300)])
def test_aesthetic_input_is_the_normalised_middle_of_the_picture_at_224(high, wide):
    x = torch.full((1, 3, high, wide), 10.0)
    middle = x[:, :, (high - min(high, wide)) // 2 :, (wide - min(high, wide)) // 2 :]
    middle[:, :, : min(high, wide), : min(high, wide)] = 200.0
    found = vbench.aesthetic_input(x)
    assert found.shape == (1, 3, 224, 224)
    for channel, (mean, std) in enumerate(zip(vbench.CLIP_MEAN, vbench.CLIP_STD)):
        expected = (200 / 255 - mean) / std
        assert found[0, channel, 6:-6, 6:-6] == pytest.approx(torch.full((212, 212), expected), abs=2e-3)


# ----------------------------------------------------------------------------------------------------- the scores


def test_imaging_quality_is_the_mean_of_the_frames_scores_over_100(packages, folder):
    x = frames(20, 40, 1100)  # more than go at once
    small = vbench.imaging_input(torch.from_numpy(x).permute(0, 3, 1, 2).float())
    expected = np.mean([Musiq()(picture[None]).item() for picture in small]) / 100
    assert vbench.score(vbench.load_imaging(folder, "cpu"), x) == pytest.approx(expected, rel=1e-5)


def test_aesthetic_quality_is_a_tenth_of_the_linear_head_on_the_unit_feature(packages, folder):
    x = frames(3)
    values = []
    for picture in pictures(3):
        feature = Eye()(vbench.aesthetic_input(picture[None]))[0].detach().double()
        unit = feature / feature.square().sum().sqrt()
        values.append((float(HEAD["weight"][0].double() @ unit) + 5.0) / 10)
    assert vbench.score(vbench.load_aesthetic(folder, "cpu"), x) == pytest.approx(np.mean(values), rel=1e-5)


def test_a_head_inside_a_file_that_holds_a_clip_too_is_the_same_head(packages, folder):
    alone = vbench.score(vbench.load_aesthetic(folder, "cpu"), frames())
    (folder / "sa_0_4_vit_l_14_linear.safetensors").unlink()
    joined = {"predictor." + name: tensor for name, tensor in HEAD.items()}
    tensors.save(folder / "model.safetensors", joined | {"visual_projection.weight": torch.zeros(2, 2)})
    assert vbench.score(vbench.load_aesthetic(folder, "cpu"), frames()) == alone


@pytest.mark.parametrize("file, change, words", [
    (vbench.MUSIQ, {"weight": torch.zeros(4)}, "mis-shaped"),
    (vbench.MUSIQ, {"other": torch.zeros(3)}, "missing"),
    (vbench.CLIP, {"visual.other": torch.zeros(3)}, "missing"),
    ("sa_0_4_vit_l_14_linear.safetensors", {"weight": torch.zeros(1, 512), "bias": torch.zeros(1)}, "mis-shaped"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused_by_name(packages, folder, file, change, words):
    tensors.save(folder / file, change)
    load = vbench.load_imaging if file == vbench.MUSIQ else vbench.load_aesthetic
    with pytest.raises(UserError, match=words):
        load(folder, "cpu")


# ---------------------------------------------------------------------------------------------------- the command


def command(monkeypatch, videos, weights):
    argv = ["judge", "--videos", str(videos), "--metrics", "vbench", "--weights", str(weights)]
    monkeypatch.setattr(sys, "argv", argv)
    judge.main()
    return json.loads((videos / "vbench.json").read_text())


def test_every_video_gets_both_scores_and_a_broken_one_is_a_gap(monkeypatch, packages, folder, tmp_path, capsys):
    videos = tmp_path / "ours"
    for seed, name in enumerate("ab"):
        write_video(videos / f"{name}.mp4", dur_s=0.3, seed=seed)
    (videos / "c.mp4").write_bytes(b"no video")
    result = command(monkeypatch, videos, folder)
    assert list(result["scores"]) == ["a", "b"] and list(result["gaps"]) == ["c"] and result["expected"] == 3
    for name, load in vbench.SCORES.items():
        network = load(folder, "cpu")
        assert result["scores"]["b"][name] == vbench.score(network, media.read_video(videos / "b.mp4"))
        assert name in capsys.readouterr().out or name == "vbench_aesthetic"


def test_what_is_not_there_is_said_and_the_other_score_is_still_given(monkeypatch, packages, folder, tmp_path, capsys):
    write_video(tmp_path / "ours" / "a.mp4", dur_s=0.3)
    (folder / "sa_0_4_vit_l_14_linear.safetensors").unlink()
    result = command(monkeypatch, tmp_path / "ours", folder)
    assert list(result["scores"]["a"]) == ["vbench_imaging"]
    out = capsys.readouterr().out
    assert "left out   vbench_aesthetic" in out and "sa_0_4_vit_l_14_linear.safetensors: no such file" in out
    assert "sa_0_4" in result["left_out"]["vbench_aesthetic"]


def test_without_any_package_or_weight_one_line_says_what_is_needed(monkeypatch, packages, tmp_path):
    write_video(tmp_path / "ours" / "a.mp4", dur_s=0.3)
    with pytest.raises(UserError, match="musiq_spaq.safetensors: no such weights.*sa_0_4.*no such file.*README"):
        command(monkeypatch, tmp_path / "ours", tmp_path)
    for name in ("pyiqa", "open_clip"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install pyiqa.*pip install open_clip_torch") as error:
        command(monkeypatch, tmp_path / "ours", tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "ours" / "vbench.json").exists()


# ----------------------------------------------------------------------------------------------- the real packages


def there(name):
    return importlib.util.find_spec(name) is not None


@pytest.mark.skipif(not there("pyiqa"), reason="the optional package pyiqa is not installed")
def test_the_real_musiq_takes_its_weights_from_safetensors_and_gives_its_own_score(tmp_path):
    import pyiqa

    torch.manual_seed(0)
    metric = pyiqa.create_metric("musiq-spaq", device=torch.device("cpu"), pretrained=False)
    tensors.save(tmp_path / vbench.MUSIQ, metric.net.state_dict())
    x = frames(2, 300, 600)
    found = vbench.score(vbench.load_imaging(tmp_path, "cpu"), x)
    small = torch.nn.functional.interpolate(pictures(2, 300, 600), size=(256, 512), mode="bilinear") / 255
    assert found == pytest.approx(float(np.mean([float(metric(p[None])) for p in small])) / 100, abs=1e-6)


@pytest.mark.skipif(not there("open_clip"), reason="the optional package open_clip is not installed")
def test_the_real_clip_takes_its_weights_from_safetensors_and_sees_what_torchvision_shows_it(tmp_path):
    import open_clip
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-L-14-quickgelu", pretrained=None).eval()
    tensors.save(tmp_path / vbench.CLIP, clip.state_dict())
    tensors.save(tmp_path / "sa_0_4_vit_l_14_linear.safetensors", HEAD)
    resize = transforms.Resize(224, interpolation=InterpolationMode.BICUBIC)
    normalise = transforms.Normalize(vbench.CLIP_MEAN, vbench.CLIP_STD)
    for high, wide in ((96, 96), (240, 425), (425, 240)):
        shown = normalise(transforms.CenterCrop(224)(resize(pictures(2, high, wide))) / 255)
        assert torch.allclose(vbench.aesthetic_input(pictures(2, high, wide)), shown, atol=1e-5)
    with torch.no_grad():
        feature = clip.encode_image(shown, normalize=True)
        expected = float((feature @ HEAD["weight"].T + HEAD["bias"]).mean()) / 10
    found = vbench.score(vbench.load_aesthetic(tmp_path, "cpu"), frames(2, 425, 240))
    assert found == pytest.approx(expected, abs=1e-5)
