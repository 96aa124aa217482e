"""Batches: the split, the chances, and that nothing but the generator decides."""

import pytest
import torch

import mochi_vae
import tensors
from config import UserError
from data import DanceClips
from data_encode import Clip, hash_of
from data_names import AIST_BASE, GENRES, TEST_TRACKS, WILD_BASE, Source, parse_aist


def fake_clips(folder, names, captions=(), logvar=-30.0):
    """Clips with made-up encodings: mean = the clip's number everywhere, features = the prompt's number everywhere."""
    folder.mkdir()
    sources = [Source(folder / f"{name}.mp4", parse_aist(name)) for name in names]
    sources += [Source(folder / f"wild {i}.mp4", None, caption) for i, caption in enumerate(captions)]
    clips = []
    for i, source in enumerate(sources):
        mean = torch.full((12, 2, 2, 2), float(i))
        encoding = {"mean": mean, "logvar": torch.full_like(mean, logvar), "audio": torch.full((5, 3), float(i))}
        clips.append(Clip(source, 0, folder / f"{i}.safetensors"))
        tensors.save(clips[-1].file, encoding)
    prompts = sorted({p for s in sources for p in (*s.prompts(), s.base_prompt())})
    features = {hash_of(p): torch.full((2 + i % 3, 4), 1.0 + i) for i, p in enumerate(prompts)}
    tensors.save(folder / "text.safetensors", features)
    return clips, folder / "text.safetensors", {p: 1.0 + i for i, p in enumerate(prompts)}


ALL_TRACKS = [f"m{genre}{i}" for genre in GENRES for i in range(6)]
ALL_NAMES = [f"g{track[1:3]}_sBM_c01_d04_{track}_ch01" for track in ALL_TRACKS]


def generator(step):
    return torch.Generator().manual_seed(step)


def mean_of(z):
    """Which fake clip an item of a batch is."""
    return mochi_vae.to_vae_space(z)[:, 0, 0, 0, 0].round().int().tolist()


def test_no_test_track_is_ever_trained_on(tmp_path):
    clips, prompts, _ = fake_clips(tmp_path / "c", ALL_NAMES)
    dance = DanceClips(clips, prompts)
    drawn = {ALL_TRACKS[i] for step in range(40) for i in mean_of(dance.batch(32, generator(step)).z)}
    assert drawn == set(ALL_TRACKS) - TEST_TRACKS
    assert {clip.source.aist.music for clip in dance.held_out} == TEST_TRACKS
    assert len(TEST_TRACKS) == 10


def test_without_test_music_the_last_videos_are_held_out_whole(tmp_path):
    clips, prompts, _ = fake_clips(tmp_path / "c", [], captions=[f"dance {i}" for i in range(40)])
    dance = DanceClips(clips, prompts)
    assert len(dance.held_out) == 2
    assert set(dance.held_out).isdisjoint(dance.kinds[0]) and len(dance.kinds[0]) == 38


def test_batch_is_a_function_of_seed_and_step(tmp_path):
    clips, prompts, _ = fake_clips(tmp_path / "c", ALL_NAMES, captions=["a", "b"], logvar=0.0)
    dance = DanceClips(clips, prompts)
    first, other = dance.batch(6, generator(5)), dance.batch(6, generator(6))
    again = DanceClips(clips, prompts).batch(6, generator(5))
    assert all(torch.equal(a, b) for a, b in zip(first[:4], again[:4])) and first.names == again.names
    assert not torch.equal(first.z, other.z)


class Steps(torch.utils.data.Dataset):
    """What a pool of workers would be given: the steps."""

    def __init__(self, dance):
        self.dance = dance

    def __len__(self):
        return 8

    def __getitem__(self, step):
        return self.dance.batch(3, generator(step))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_draws_are_the_same_for_no_worker_one_and_four_and_after_a_resume(tmp_path):
    clips, prompts, _ = fake_clips(tmp_path / "c", ALL_NAMES, captions=["a", "b"], logvar=0.0)
    expected = [DanceClips(clips, prompts).batch(3, generator(step)) for step in range(8)]
    for workers in (0, 1, 4):
        pool = torch.utils.data.DataLoader(Steps(DanceClips(clips, prompts)), batch_size=None, num_workers=workers)
        same(list(pool), expected)
    resumed = DanceClips(clips, prompts)
    same([resumed.batch(3, generator(step)) for step in range(5, 8)], expected[5:])


def same(batches, expected):
    assert len(batches) == len(expected)
    for ours, theirs in zip(batches, expected):
        assert all(torch.equal(a, b) for a, b in zip(ours[:4], theirs[:4])) and ours.names == theirs.names


def test_parts_of_a_batch_are_the_whole_batch_shared_out(tmp_path):
    clips, prompts, _ = fake_clips(tmp_path / "c", ALL_NAMES, captions=["a", "b"], logvar=0.0)
    dance = DanceClips(clips, prompts)
    whole = dance.batch(5, generator(0))
    parts = [dance.batch(5, generator(0), slice(rank, None, 2)) for rank in (0, 1)]
    for rank, part in enumerate(parts):
        assert torch.equal(part.z, whole.z[rank::2]) and part.names == whole.names[rank::2]


def test_aist_and_wild_are_one_to_one_whatever_their_sizes(tmp_path):
    clips, prompts, _ = fake_clips(tmp_path / "c", ALL_NAMES, captions=["a", "b", "c"])
    dance = DanceClips(clips, prompts)
    names = [name for step in range(50) for name in dance.batch(40, generator(step)).names]
    wild = sum(name.startswith("wild") for name in names)
    assert abs(wild - 1000) < 4 * (2000 * 0.25) ** 0.5


def test_base_prompts_and_dropped_captions_have_their_chances(tmp_path):
    clips, prompts, number = fake_clips(tmp_path / "c", ALL_NAMES, ["a"] * 9)
    dance = DanceClips(clips, prompts, base_prompt=0.2, caption_dropout=0.1)
    base = dropped = 0
    used = set()
    for step in range(50):
        batch = dance.batch(40, generator(step))
        for text, mask in zip(batch.text, batch.text_mask):
            if not mask.any():
                dropped += 1
                assert not text.any()
            else:
                used.add(text[0, 0].item())
                base += text[0, 0].item() in (number[AIST_BASE], number[WILD_BASE])
    assert abs(dropped - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5
    assert abs(base - 2000 * 0.9 * 0.2) < 4 * (2000 * 0.18 * 0.82) ** 0.5
    assert used == set(number.values())  # all four templates of the ten genres


def test_text_is_padded_to_the_longest_of_the_batch_and_masked(tmp_path):
    clips, prompts, number = fake_clips(tmp_path / "c", ALL_NAMES)
    length = {value: shape[0] for shape, value in zip(tensors_shapes(prompts, number), number.values())}
    batch = DanceClips(clips, prompts, caption_dropout=0.0).batch(8, generator(0))
    lengths = [length[row[0, 0].item()] for row in batch.text]
    assert batch.text.shape[1] == max(lengths) and batch.text_mask.sum(1).tolist() == lengths
    assert not batch.text[~batch.text_mask].any() and batch.text[batch.text_mask].all()


def tensors_shapes(file, number):
    shapes = tensors.open_weights(file).shapes
    return [shapes[hash_of(prompt)] for prompt in number]


def test_z_is_a_draw_from_the_posterior_in_the_space_of_the_transformer(tmp_path):
    clips, prompts, _ = fake_clips(tmp_path / "c", [], captions=["a", "b"], logvar=-1.0)
    dance = DanceClips(clips, prompts)
    z = torch.cat([dance.batch(32, generator(step)).z for step in range(40)])
    z_vae = mochi_vae.to_vae_space(z)
    assert abs(z_vae.mean()) < 0.02 and abs(z_vae.std() - torch.tensor(-0.5).exp()) < 0.01


def test_music_is_dropped_for_whole_batches_with_its_chance(tmp_path):
    clips, prompts, _ = fake_clips(tmp_path / "c", ALL_NAMES)
    count = {p: sum(DanceClips(clips, prompts, music_dropout=p).batch(2, generator(s)).audio is None for s in range(99))
             for p in (0.0, 0.3, 1.0)}  # fmt: skip
    assert count[0.0] == 0 and count[1.0] == 99 and 12 < count[0.3] < 48


def test_music_belongs_to_its_clip(tmp_path):
    clips, prompts, _ = fake_clips(tmp_path / "c", ALL_NAMES)
    batch = DanceClips(clips, prompts).batch(16, generator(0))
    assert batch.audio[:, 0, 0].int().tolist() == mean_of(batch.z)


def test_held_out_batch_is_always_the_same_and_spread_over_the_tracks(tmp_path):
    clips, prompts, _ = fake_clips(tmp_path / "c", ALL_NAMES, logvar=0.0)
    first, second = (DanceClips(clips, prompts).held_out_batch(5) for _ in range(2))
    assert torch.equal(first.z, second.z) and len(set(first.names)) == 5
    assert [ALL_TRACKS[i] in TEST_TRACKS for i in mean_of(first.z)] == [True] * 5


def test_only_test_music_is_refused(tmp_path):
    clips, prompts, _ = fake_clips(tmp_path / "c", [ALL_NAMES[0]])
    with pytest.raises(UserError, match="Table 7"):
        DanceClips(clips, prompts)
