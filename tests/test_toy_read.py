"""The readers, on true clips whose answers are known."""

import dataclasses

import numpy as np
import torch

import toy
import toy_read
import toy_reader


def any_clips(count: int, seed: int = 5) -> list[toy.Clip]:
    return [toy_reader.any_clip(np.random.default_rng([seed, i])) for i in range(count)]


def test_every_place_is_read_from_its_border():
    for clip, setting in zip(any_clips(13), toy.SETTINGS):
        clip = dataclasses.replace(clip, setting=setting, shirt="red", trousers="orange")
        assert toy_read.read_setting(toy.render(clip, 7, 64)) == setting


def test_advanced_dances_move_more_than_basic_ones():
    def movement(situation):
        clips = [dataclasses.replace(c, situation=situation, camera=1, figures=c.figures[:1]) for c in any_clips(4)]
        return np.mean([toy_read.movement(toy.render(clip, 25, 48)) for clip in clips])

    assert movement("FM") > 1.1 * movement("BM")


def test_a_still_picture_does_not_move_and_a_blurred_one_is_less_sharp():
    video = toy.render(any_clips(1)[0], 7, 64)
    assert toy_read.movement(np.repeat(video[:1], 7, 0)) == 0
    blurred = (video[:, :-1].astype(int) + video[:, 1:]) // 2
    assert toy_read.sharpness(blurred.astype(np.uint8)) < toy_read.sharpness(video)


def test_a_glance_of_a_video_is_the_few_small_frames_that_the_reader_was_fitted_to():
    clip = dataclasses.replace(any_clips(1)[0], camera=1)
    glance = toy_read.glance(toy.render(clip, 73, 96))
    drawn = toy_reader.render_glance(clip)
    assert glance.shape == drawn.shape == (4, 48, 48, 3)
    assert np.abs(glance.astype(int) - drawn).mean() < 3
    odd = toy_read.glance(toy.render(clip, 7, 40))  # fewer frames, another size
    assert odd.shape == glance.shape


def test_the_silhouette_follows_the_dancer():
    clip = dataclasses.replace(
        any_clips(1)[0], camera=1, figures=("male dancer",), setting=toy.WHITE_STUDIO, shirt="red"
    )
    shape = toy_read.silhouette(toy.render(clip, 7, 64))
    assert shape.shape == (3, 16, 16) and shape[:, 6:12, 6:10].mean() > 0.5 > 10 * shape[:, :, :2].mean()


def test_a_fitted_reader_knows_view_figure_and_number_of_dancers_of_clips_it_did_not_see():
    examples = []
    for i, clip in enumerate(any_clips(240)):  # few kinds, so that few examples teach them
        clip = dataclasses.replace(clip, camera=(1, 5)[i % 2], setting=toy.WHITE_STUDIO, shirt="red", trousers="blue")
        examples.append((toy_reader.render_glance(clip), toy_reader.truth(clip)))
    reader = toy_reader.fit(examples[:180], epochs=30)
    share = toy_reader.accuracy(reader, examples[180:])
    assert share["dancers"] > 0.9 and share["figure"] > 0.75 and share["view"] > 0.75  # chance .6, .33, .5


def test_the_reader_is_the_same_whatever_was_drawn_before():
    examples = [toy_reader.draw(i) for i in range(20)]
    first = toy_reader.fit(examples, epochs=2)
    torch.rand(7)
    second = toy_reader.fit(examples, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_examples_have_all_views_places_figures_and_numbers_of_dancers():
    clips = any_clips(300)
    assert {clip.camera for clip in clips} == set(range(1, 11))
    assert {clip.setting for clip in clips} == set(toy.SETTINGS)
    assert {len(clip.figures) for clip in clips} == {1, 2, 3}
    assert {figure for clip in clips for figure in clip.figures} == set(toy.FIGURES)
    assert all((len(clip.figures) > 1) == (clip.situation == "GR") for clip in clips)
    assert all({clip.shirt, clip.trousers} <= set(toy.visible_colours(clip.setting)) for clip in clips)
