from pathlib import Path

import numpy as np
import torch

import audio
import media
import mochi_vae
import sample
import toy
import toy_read
from check import check_networks, find_files, made_for
from data import Batch
from mochi_dit import load_dit
from model import Adapters, MusicInfuser
from train import velocity_error

BABY = Path(__file__).parent.parent / "weights" / "baby"
DEMO = BABY.parent.parent / "demo" / "demo.ogg"


def test_baby_weights_fit_together_and_take_less_than_15_megabytes():
    m = check_networks(find_files(BABY))
    assert m.adapters.form == "aligned" and m.adapters.null_audio == "drop"
    assert made_for(find_files(BABY).dit)["height"] == 96
    assert sum(file.stat().st_size for file in BABY.rglob("*") if file.is_file()) < 15e6


def test_shipped_demo_makes_a_moving_dancer_with_sound_and_the_same_one_twice(tmp_path, monkeypatch):
    for name in ("a", "b"):
        command = (
            f"sample.py --audio {DEMO} --weights {BABY} --frames 19 --steps 6 --device cpu --out {tmp_path}/{name}.mp4"
        )
        monkeypatch.setattr("sys.argv", command.split())
        torch.manual_seed(len(name))
        sample.main()
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    frames = media.read_video(tmp_path / "a.mp4")
    assert frames.shape == (19, 480, 480, 3)
    backdrop, middle = frames[:, :80, :60].astype(float), frames[:, 100:400, 150:350].astype(float)
    assert backdrop.mean() > 200 and backdrop.std() < 15  # a white studio, and in front of it something else that moves
    assert middle.mean() < 190 and np.abs(np.diff(middle, axis=0)).mean() > 1
    assert toy_read.read_colours(frames[:, 2::5, 2::5]) == ("red", "blue")  # as the default prompt says
    assert np.abs(media.read_audio(tmp_path / "a.mp4", 16000)).max() > 0.1


def test_adapters_learn_one_clip_with_its_noise_by_heart():
    """Everything on the way from the music to the loss has to let the gradient through: the loss falls to near zero."""
    clip, generator = toy.sample_clip(np.random.default_rng(0)), torch.Generator().manual_seed(0)
    video = torch.from_numpy(toy.render(clip, 13, 96))[None].permute(0, 4, 1, 2, 3) / 127.5 - 1
    with torch.no_grad():
        z = mochi_vae.to_dit_space(mochi_vae.load_encoder(BABY / "encoder.safetensors")(video)[0]).expand(
            2, -1, -1, -1, -1
        )
        heard = audio.prepare(torch.from_numpy(toy.music(clip, 0.0, 1.0)), 13)
        music = audio.load_wav2vec2(BABY / "wav2vec2")(heard).expand(2, -1, -1)
    dit = load_dit(BABY / "dit.safetensors")
    model = MusicInfuser(dit, Adapters(dit, [1, 2, 3], music.shape[-1], 64, 64, "aligned"))
    batch = Batch(z, torch.zeros(2, 1, 64), torch.zeros(2, 1, dtype=torch.bool), music, ["clip"] * 2)
    sigma, eps = torch.tensor([0.3, 0.7]), torch.randn(z.shape, generator=generator)
    optimizer, losses = torch.optim.AdamW(model.adapter_parameters(), lr=4e-3, weight_decay=0.0), []
    for _ in range(60):
        losses.append(velocity_error(model, batch, music, sigma, eps, "float32").mean())
        optimizer.zero_grad()
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(model.adapter_parameters(), 1.0)
        optimizer.step()
    assert losses[0] > 0.1 and losses[-1] < 0.05 * losses[0]
