"""Claims about the music: the dancer listens, follows its speed, keeps on for long, and dances to what was never heard.

Paper     arXiv 2503.14505v2, Sec. 5.2 ("Music responsiveness"), Fig. 6 (longer videos), Fig. 7 (speed of the music).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import audio
import beats
import media
import toy
import toy_music
from claims_score import FPS, Row, dance_rows, median_interval, true_beats, values_of
from claims_studio import FRAMES, PRIOR, Dancer, Studio, music_of, prompt_of, solo_clips
from config import UserError
from data_names import VIDEO_SUFFIXES

SPEEDS = (0.75, 1.0, 1.25)
LONGER = (145, 289)  # frames
CLIP_S = audio.clip_samples(FRAMES) / audio.SR_HZ
NEEDED_S = CLIP_S + 8  # seconds of a recording, to find the beats of a section
MUSIC_SUFFIXES = {".mp3", ".ogg", ".oga", ".flac", ".wav", ".m4a", ".opus"} | VIDEO_SUFFIXES


def listens(studio: Studio, dancers: list[Dancer]) -> list[Row]:
    """Right music, no music (silence), no ears (prior); chance is the same videos against the music of other clips."""
    clips = solo_clips(studio.cfg)
    prompts, waves = [prompt_of(clip) for clip in clips], music_of(clips)
    music, bpms = [true_beats(clip, FRAMES) for clip in clips], [clip.bpm for clip in clips]
    true = studio.true(clips)
    rows = dance_rows("true clips", studio.curves(true), music, bpms)
    rebuilt = dance_rows("true clips through the VAE", studio.curves(studio.rebuild(true)), music, bpms)
    rows, ceiling = rows + rebuilt, values_of(rebuilt)
    for dancer in [*dancers, PRIOR]:
        curves = studio.curves(studio.dance(dancer, prompts, waves))
        rows += dance_rows(dancer.label, curves, music, bpms, ceiling)
        if dancer.adapter:
            silence = [0 * wave for wave in waves]
            curves = studio.curves(studio.dance(dancer, prompts, silence))
            rows += dance_rows(f"{dancer.label}, silence", curves, music, bpms, ceiling)
    return rows


def speed(studio: Studio, dancers: list[Dancer]) -> list[Row]:
    """The motion's tempo over that of the track at its usual speed, when the waveform is played faster or slower.

    Tracks of 100 to 115 beats a minute. Chance is the prior, which hears nothing; the ceiling a true dance.
    """
    clips = solo_clips(studio.cfg, bpm=(100, 115))
    prompts, bpms = [prompt_of(clip) for clip in clips], np.array([clip.bpm for clip in clips])

    def ratios(videos) -> np.ndarray:
        curves = studio.curves(videos)
        return np.array([beats.tempo_of_motion(curve, FPS, lo=50, hi=200) for curve in curves]) / bpms

    chance, rows = float(np.nanmedian(ratios(studio.dance(PRIOR, prompts, None)))), []
    for factor in SPEEDS:
        faster = [replace(clip, bpm=clip.bpm * factor, start_s=clip.start_s / factor) for clip in clips]
        music, waves = [true_beats(clip, FRAMES) for clip in faster], music_of(clips, speed=factor)
        ceiling = float(np.nanmedian(ratios(studio.rebuild(studio.true(faster)))))
        for dancer in dancers:
            what = f"{dancer.label}, music x{factor:g}"
            videos = studio.dance(dancer, prompts, waves)
            ratio = ratios(videos)
            value, interval = float(np.nanmedian(ratio)), median_interval(ratio)
            rows.append(Row(what, "tempo of motion / of track", value, interval, chance, ceiling))
            rows += dance_rows(what, studio.curves(videos), music)
    return rows


def longer(studio: Studio, dancers: list[Dancer]) -> list[Row]:
    """Two and four times the frames that were trained on: alignment in each quarter. The ceiling are the true clips."""
    clips, rows = solo_clips(studio.cfg, max(4, studio.cfg.clips // 2)), []
    prompts = [prompt_of(clip) for clip in clips]
    for num_frames in LONGER:
        waves, music = music_of(clips, num_frames), [true_beats(clip, num_frames) for clip in clips]
        true = studio.curves(studio.true(clips, num_frames))
        danced = {dancer: studio.curves(studio.dance(dancer, prompts, waves, num_frames)) for dancer in dancers}
        for quarter in range(4):
            span = np.array([quarter, quarter + 1]) * num_frames / FPS / 4
            ceiling = values_of(dance_rows("", true, music, span_s=span))
            for dancer, curves in danced.items():
                what = f"{dancer.label}, {num_frames} frames, quarter {quarter + 1}"
                rows += dance_rows(what, curves, music, ceiling=ceiling, span_s=span)
    return rows


def unheard(studio: Studio, dancers: list[Dancer]) -> list[Row]:
    """Styles that no network heard; and with --music recordings, whose beats librosa finds.

    The ceiling of recordings: true dances to synthetic music against the beats that librosa finds in that music.
    """
    clips, rows = solo_clips(studio.cfg), []
    prompts = [prompt_of(clip) for clip in clips]
    music, bpms = [true_beats(clip, FRAMES) for clip in clips], [clip.bpm for clip in clips]
    true = studio.curves(studio.rebuild(studio.true(clips)))
    ceiling = values_of(dance_rows("", true, music, bpms))
    for style in toy_music.UNHEARD:
        waves = music_of([replace(clip, genre=style) for clip in clips])
        for dancer in dancers:
            curves = studio.curves(studio.dance(dancer, prompts, waves))
            rows += dance_rows(f"{dancer.label}, {style}", curves, music, bpms, ceiling)
    if studio.cfg.music is None:
        return rows
    sections, tracks = recorded(studio)
    starts = [clip.start_s for clip in clips]
    found = studio.map(find_beats, [toy.music(clip, -min(s, 4.0), 12.0) for clip, s in zip(clips, starts)])
    found = [times - min(s, 4.0) for times, s in zip(found, starts)]
    ceiling = values_of(dance_rows("", *zip(*[(c, f) for c, f in zip(true, found) if len(f) > 1])))
    waves, music = zip(*(sections[i % len(sections)] for i in range(len(clips))))
    for dancer in [*dancers, PRIOR]:
        curves = studio.curves(studio.dance(dancer, prompts, waves))
        what = f"{dancer.label}, {tracks} recorded tracks ({len(sections)} sections)"
        rows += dance_rows(what, curves, music, ceiling=ceiling)
    return rows


def recorded(studio: Studio) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """Sections of the recordings in --music -> ((waveform, beat times from its start), ...), number of tracks used.

    As many a track as it takes to have one for each clip, 4 at most; the first section of every track comes first.
    """
    folder = studio.cfg.music
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; expected one with music")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in MUSIC_SUFFIXES)[: studio.cfg.clips]
    most = min(4, -(-studio.cfg.clips // max(1, len(files))))
    tracks = [found for found in studio.map(Sections(most), files) if found]
    if not tracks:
        raise UserError(f"{folder}: no recording of at least {NEEDED_S:.0f} s in which beats are found")
    return [found[k] for k in range(most) for found in tracks if k < len(found)], len(tracks)


@dataclass(frozen=True)
class Sections:
    """Cuts up to `most` sections out of a recording; an object so that processes can be given it."""

    most: int

    def __call__(self, file: Path) -> list[tuple[np.ndarray, np.ndarray]]:
        """(waveform, beat times from its start) of each; its beats are found with 4 s more on either side."""
        found = []
        for k in range(self.most):
            try:
                room_s = media.audio_duration(file) - NEEDED_S
                heard = media.read_audio(file, audio.SR_HZ, max(0, room_s) * (k + 0.5) / self.most, NEEDED_S)
            except UserError:
                return []  # a video without sound, a broken file: one track less in the count that is reported
            if len(heard) < round(NEEDED_S * audio.SR_HZ) - 1:
                break
            times = find_beats(heard) - 4
            times = times[(times > -1.5) & (times < CLIP_S + 1.5)]  # of the section and a little around it
            if len(times) > 3 and np.abs(heard).max() > 0.01:
                found.append((heard[4 * audio.SR_HZ :][: audio.clip_samples(FRAMES)], times))
        return found


def find_beats(wave: np.ndarray) -> np.ndarray:
    """Beat times (s) in a waveform at 16 kHz."""
    return beats.music_beats(wave, audio.SR_HZ)[1]
