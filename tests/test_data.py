"""Names, prompts, split, crops, the encoding of good and broken files, and batches of data.py and its two helpers."""

import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import AUDIO_DIM, FRAMES, SIZE, make_tiny_weights, write_video

import audio
import data_encode
import media
import mochi_vae
import t5
import tensors
from config import UserError
from data import DanceClips
from data_clips import DataConfig, crop_starts, fit_frames
from data_encode import Clip, claim, encode, hash_of
from data_names import AIST_BASE, GENRES, TEST_TRACKS, WILD_BASE, AistName, Source, parse_aist, read_source

# ---------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "stem, parts",
    [
        ("gBR_sBM_c01_d04_mBR0_ch01", AistName("BM", 1, "BR", (4,), "mBR0")),
        ("gJB_sFM_c10_d07_mJB5_ch21", AistName("FM", 10, "JB", (7,), "mJB5")),
        ("gPO_sMM_c09_d10_mPO3_ch11", AistName("MM", 9, "PO", (10,), "mPO3")),
        ("gLH_sGR_c02_d16_d17_d18_mLH1_ch02", AistName("GR", 2, "LH", (16, 17, 18), "mLH1")),
        ("sSH_c01_v0", AistName("SH", 1)),
        ("sCY_c10_v12", AistName("CY", 10)),
        ("sBT_c03", AistName("BT", 3)),
        ("gHO_sSH_c01_d19_v0", AistName("SH", 1)),
        ("gXX_sBM_c01_d04_mBR0_ch01", None),  # no such genre, situation, camera, dancer, track
        ("gBR_sXX_c01_d04_mBR0_ch01", None),
        ("gBR_sBM_c11_d04_mBR0_ch01", None),
        ("gBR_sBM_c01_d36_mBR0_ch01", None),
        ("gBR_sBM_c01_d04_mBR6_ch01", None),
        ("gBR_sBM_c01_d04_mXX0_ch01", None),
        ("gBR_sBM_c01_mBR0_ch01", None),
        ("gBR_sBM_c01_d04_mBR0_ch01_copy", None),
        ("my holiday", None),
    ],
)
def test_name_is_read_as_the_scheme_says(stem, parts):
    assert parse_aist(stem) == parts


def test_tempo_is_80_plus_10_index_and_house_110_plus_5_index():
    for genre in GENRES:
        bpm = [parse_aist(f"g{genre}_sBM_c01_d04_m{genre}{i}_ch01").bpm for i in range(6)]
        assert bpm == ([110, 115, 120, 125, 130, 135] if genre == "HO" else [80, 90, 100, 110, 120, 130])


def test_prompts_are_the_templates_verbatim():
    assert parse_aist("gMH_sBM_c01_d24_mMH0_ch01").prompts() == (
        "a professional male dancer dancing Middle Hip-hop in a basic dance setting in a studio with a white backdrop, "
        "captured from a front view",
        "a front view video of a professional male dancer performing Middle Hip-hop choreography against a white "
        "background in a basic dance scene",
        "a professional male dancer executing Middle Hip-hop movements in a minimalist studio space in a basic dance "
        "setting, shot from a front view",
        "a Middle Hip-hop dance performance by a professional male dancer in a pristine white studio, front view, "
        "basic dance",
    )


def test_dancers_are_joined_by_commas_and_one_and():
    woman, man = "a professional female dancer", "a professional male dancer"
    names = {(16, 17): f"{woman} and {man}", (16, 17, 18): f"{woman}, {man} and {woman}"}
    for dancers, words in names.items():
        prompt = AistName("GR", 10, "LH", dancers, "mLH1").prompts()[0]
        assert prompt.startswith(f"{words} dancing LA style Hip-hop in a group dance setting")
        assert prompt.endswith("captured from a moving front view")


def test_showcases_without_a_genre_get_the_base_prompt():
    assert parse_aist("sSH_c01_v0").prompts() == (AIST_BASE,)


def test_female_dancers_are_the_fifteen_of_aist():
    female = [d for d in range(1, 36) if "female" in AistName("BM", 1, "BR", (d,), "mBR0").prompts()[0]]
    assert female == [1, 2, 3, 7, 8, 9, 12, 13, 15, 16, 18, 19, 25, 26, 27]


# --------------------------------------------------------------------------------------------------------- batches


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


# ---------------------------------------------------------------------------------------------------- crops, sizes


def test_crops_are_five_a_minute_inside_the_middle_ninety_percent():
    starts = crop_starts("a.mp4", 120.0, 73)
    assert len(starts) == 10 and starts == sorted(starts) == crop_starts("a.mp4", 120.0, 73)
    clip_s = audio.clip_samples(73) / 16000
    assert all(6.0 - 1 / 60 <= start / 30 <= 114.0 - clip_s + 1 / 60 for start in starts)
    assert starts != crop_starts("b.mp4", 120.0, 73) and starts != crop_starts("a.mp4", 120.0, 73, seed=1)


def test_short_files_give_one_crop_and_too_short_ones_none():
    assert crop_starts("a.mp4", 73 / 30, 73) == [0]
    assert crop_starts("a.mp4", 72 / 30, 73) == []
    assert len(crop_starts("a.mp4", 2.7, 73)) == 1 and 0 <= crop_starts("a.mp4", 2.7, 73)[0] <= 5


def test_a_video_of_the_wanted_size_is_taken_as_it_is():
    frames = torch.randint(0, 256, (9, 16, 32, 3), dtype=torch.uint8, generator=generator(0))
    ours = fit_frames(frames, 16, 32, aist=True)
    assert torch.equal(ours, (frames.float() / 127.5 - 1).permute(3, 0, 1, 2))


@pytest.mark.parametrize("aist, box", [(True, (270, 990, 324, 1596)), (False, (0, 1080, 6, 1914))])
def test_crop_is_the_official_one_for_aist_and_the_largest_centred_one_else(aist, box):
    top, bottom, left, right = box
    outside = torch.full((1, 1080, 1920, 3), 255, dtype=torch.uint8)
    outside[:, top:bottom, left:right] = 0
    assert fit_frames(outside, 480, 848, aist).max() < -0.9
    outside[:, top : top + 8] = outside[:, bottom - 8 : bottom] = 255
    outside[:, :, left : left + 8] = outside[:, :, right - 8 : right] = 255
    video = fit_frames(outside, 480, 848, aist)
    edges = (video[:, 0, 0], video[:, 0, -1], video[:, 0, :, 0], video[:, 0, :, -1])
    assert video.shape == (3, 1, 480, 848) and min(edge.min() for edge in edges) > 0.9


def test_shrinking_averages_instead_of_dropping_pixels():
    stripes = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 254
    assert fit_frames(stripes, 16, 16, aist=False)[..., 2:-2].abs().max() < 0.05


# -------------------------------------------------------------------------------------------------------- encoding

AIST = "gBR_sBM_c01_d04_mBR1_ch01"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_tiny_weights(tmp_path_factory.mktemp("weights"))


def config(data, weights, **changes):
    return DataConfig(data=data, weights=weights, frames=FRAMES, device="cpu", dtype="float32", **changes)


def test_encoding_holds_what_the_networks_say(tmp_path, weights):
    path = write_video(tmp_path / f"{AIST}.mp4")
    (clip,) = encode(config(tmp_path, weights)).clips
    stored = load_file(clip.file)
    frames = torch.from_numpy(media.read_video(path, 30, clip.start / 30, FRAMES)).permute(3, 0, 1, 2) / 127.5 - 1
    mean, logvar = mochi_vae.load_encoder(weights / "encoder.safetensors")(frames[None])
    sound = torch.from_numpy(media.read_audio(path, 16000, clip.start / 30, FRAMES / 30 + 0.09))
    music = audio.load_wav2vec2(weights / "wav2vec2")(audio.prepare(sound, FRAMES))
    torch.testing.assert_close(stored["mean"].float(), mean[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stored["logvar"].float(), logvar[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stored["audio"], music[0])
    assert stored["mean"].shape == (12, 2, SIZE // 8, SIZE // 8) and stored["audio"].shape[1] == AUDIO_DIM


def test_prompts_hold_what_t5_says_without_padding(tmp_path, weights):
    write_video(tmp_path / f"{AIST}.mp4")
    encoded = encode(config(tmp_path, weights))
    stored = load_file(encoded.prompts)
    tokenizer, model = t5.Tokenizer(weights / "t5" / "spiece.model"), t5.load_t5(weights / "t5")
    assert set(stored) == {hash_of(p) for p in (*parse_aist(AIST).prompts(), AIST_BASE)}
    ids, mask = tokenizer([AIST_BASE])
    torch.testing.assert_close(stored[hash_of(AIST_BASE)], model(ids, mask)[0, mask[0]])


def test_broken_files_are_reported_and_stop_nothing(tmp_path, weights, capsys):
    data = tmp_path / "data"
    data.mkdir()
    good = write_video(data / f"{AIST}.mp4", dur_s=2.0)
    shutil.copy(good, data / 'it\'s "quoted" & spaced;$(rm) é中.mp4')
    (data / "cut.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (data / "beheaded.mp4").write_bytes(good.read_bytes()[:200])
    (data / "empty.mp4").write_bytes(b"")
    (data / "text.mp4").write_text("this is not a video\n" * 50)
    write_video(data / "silent.mp4", sound=False)
    write_video(data / "short.mp4", dur_s=5 / 30)
    write_video(data / "small.mp4", size=6)
    upright, silence = np.zeros((30, 3 * SIZE, SIZE, 3), np.uint8), np.zeros(16000, np.float32)
    media.write_mp4(data / "upright.mp4", upright, 30, silence, 16000)
    (data / "loop.mp4").symlink_to(data / "loop.mp4")
    (data / "round").symlink_to(data)
    (data / "dangling.mp4").symlink_to(data / "nowhere.mp4")
    (data / "sSH_c01_v0.mp4").symlink_to(good)
    (data / "old mBR0 take.mp4").symlink_to(good)
    (data / "gBR_sBM_c02_d04_mBR1_ch01.mp4").symlink_to(good)
    os.symlink(good, os.fsencode(data) + b"/not utf-8 \xff.mp4")
    (data / "notes.md").write_text("not a video, and not called one")
    encoded = encode(config(data, weights))
    reasons = {path.name: why for path, why in encoded.skipped}
    for name, why in {
        "beheaded.mp4": "", "empty.mp4": "empty", "text.mp4": "cannot be read", "silent.mp4": "no sound",
        "short.mp4": "too short", "small.mp4": "too small", "upright.mp4": "wrong shape",
        "loop.mp4": "", "dangling.mp4": "no such file", "round": "read already",
        "sSH_c01_v0.mp4": "no track", "old mBR0 take.mp4": "test track mBR0",
        "gBR_sBM_c02_d04_mBR1_ch01.mp4": "camera c02",
    }.items():  # fmt: skip
        assert why in reasons.pop(name), name
    used = {clip.source.path.name for clip in encoded.clips}
    assert {good.name, 'it\'s "quoted" & spaced;$(rm) é中.mp4'} <= used
    assert used | set(reasons) == {
        good.name,
        'it\'s "quoted" & spaced;$(rm) é中.mp4',
        "cut.mp4",
        "not utf-8 \udcff.mp4",
    }
    told = capsys.readouterr().out
    assert "1 x camera c02" in told and "no sound" in told
    listed = (data / ".encoded" / "skipped.txt").read_text()
    assert all(path.name.encode(errors="replace").decode() in listed for path, _ in encoded.skipped)


def test_a_folder_without_a_usable_video_is_refused(tmp_path, weights):
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="no usable video"):
        encode(config(tmp_path, weights))
    with pytest.raises(UserError, match="not a folder"):
        encode(config(tmp_path / "nowhere", weights))


def test_wild_clips_take_the_text_beside_them_and_bare_ones_are_counted(tmp_path, weights, capsys):
    write_video(tmp_path / "a.mp4")
    write_video(tmp_path / "b.mp4", seed=1)
    (tmp_path / "a.txt").write_bytes(b"  someone dances \n on a beach \xff ")
    encoded = encode(config(tmp_path, weights))
    prompts = {clip.source.path.name: clip.source.prompts() for clip in encoded.clips}
    assert prompts == {"a.mp4": ("someone dances on a beach \ufffd",), "b.mp4": (WILD_BASE,)}
    assert "2 in the wild (1 without a caption)" in capsys.readouterr().out


def test_cameras_are_those_asked_for():
    names = [f"gBR_sBM_c{c:02d}_d04_mBR1_ch01.mp4" for c in range(1, 11)]
    used = [isinstance(read_source(data_encode.Path(name), [1, 10]), Source) for name in names]
    assert used == [True] + [False] * 8 + [True]


def count_encodings(monkeypatch):
    done, real = [], data_encode.encode_clip
    monkeypatch.setattr(data_encode, "encode_clip", lambda clip, *rest: done.append(clip) or real(clip, *rest))
    return done


def test_an_encoding_is_used_again_until_source_size_or_weights_change(tmp_path, weights, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    path = write_video(data / f"{AIST}.mp4")
    done = count_encodings(monkeypatch)

    def encodings(**changes):
        done.clear()
        encode(config(data, changes.pop("weights", weights), **changes))
        return len(done)

    assert encodings() == 1 and encodings() == 0
    assert encodings(height=32, width=32) == 1 and encodings() == 0
    stat = path.stat()
    with open(path, "r+b") as handle:  # one byte of the sound or the picture, the time stamp kept
        handle.seek(-1, os.SEEK_END)
        last = handle.read(1)
        handle.seek(-1, os.SEEK_END)
        handle.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert encodings() == 1
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert encodings() == 1
    other = make_tiny_weights(tmp_path / "other", seed=1)
    assert encodings(weights=other) == 1 and encodings() == 0


def test_other_text_weights_make_other_prompt_features(tmp_path, weights):
    write_video(tmp_path / f"{AIST}.mp4")
    other = shutil.copytree(weights, tmp_path / "other")
    torch.manual_seed(7)
    vocab = t5.Tokenizer(other / "t5" / "spiece.model").vocab_size
    t5.save_t5(t5.T5(vocab=vocab, width=16, depth=1, heads=2, kv=8, ffn=16), other / "t5" / "model.safetensors")
    assert encode(config(tmp_path, weights)).prompts != encode(config(tmp_path, other)).prompts


def test_new_prompts_join_the_old_ones_in_their_file(tmp_path, weights):
    write_video(tmp_path / f"{AIST}.mp4")
    before = load_file(encode(config(tmp_path, weights)).prompts)
    write_video(tmp_path / "b.mp4", seed=1)
    after = load_file(encode(config(tmp_path, weights)).prompts)
    assert set(after) == {*before, hash_of(WILD_BASE)}
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_damaged_encoding_is_made_again(tmp_path, weights):
    write_video(tmp_path / f"{AIST}.mp4")
    (clip,) = encode(config(tmp_path, weights)).clips
    whole = clip.file.read_bytes()
    clip.file.write_bytes(whole[:-10])
    encode(config(tmp_path, weights))
    assert clip.file.read_bytes() == whole


def test_a_run_killed_while_writing_leaves_no_half_encoding_and_goes_on(tmp_path, weights, monkeypatch):
    for i in range(3):
        write_video(tmp_path / f"{i}.mp4", seed=i)
    real, calls = os.chmod, []

    def die_in_the_second(path, mode):  # all bytes are written, the name is still the temporary one
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(tensors.os, "chmod", die_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            encode(config(tmp_path, weights))
    left = list((tmp_path / ".encoded").iterdir())
    assert len(left) == 1 and data_encode.is_whole(left[0])
    done = count_encodings(monkeypatch)
    assert len(encode(config(tmp_path, weights)).clips) == 3 and len(done) == 2


def test_a_full_disk_stops_the_run_instead_of_blaming_the_videos(tmp_path, weights, monkeypatch):
    write_video(tmp_path / f"{AIST}.mp4")

    def full(path, mode):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors.os, "chmod", full)
    with pytest.raises(UserError, match="No space left"):
        encode(config(tmp_path, weights))


def test_two_processes_never_write_the_same_encoding(tmp_path):
    file = tmp_path / "a.safetensors"
    with claim(file, wait=False) as mine:
        with claim(file, wait=False) as other:
            assert (mine, other) == (True, False)
    with claim(file, wait=False) as again:
        assert again
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes, told", [({"frames": 8}, "use 7 or 13"), ({"height": 20}, "use 16"), ({"dtype": "float16"}, "bfloat16")]
)
def test_settings_that_cannot_work_are_refused(tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        DataConfig(data=tmp_path, **changes)


def test_unknown_cameras_are_refused(tmp_path, weights):
    for cameras in ("c11", "front", ""):
        with pytest.raises(UserError, match="c01,c10"):
            encode(config(tmp_path, weights, cameras=cameras))
