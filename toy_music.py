"""Toy music: ten dance genres synthesised from a drum pattern, a bass line and chords, at any tempo.

Concept   every voice is a function of "seconds since its last onset", looked up for all samples at once, so a clip
          may start anywhere in its track and beat k lies at exactly k * 60 / bpm seconds into the track.
Paper     arXiv 2503.14505v2 trains on the 60 tracks of AIST; these 60 stand in for them, with AIST's names and tempi.
Differs   any genre can be played at any tempo, so that tempo can be heard but not guessed from the genre's name.

Dimension key   S audio samples
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Style:
    """How one genre sounds. Patterns have 16 steps, four to a beat: 'x' an onset, '-' none, a digit a scale degree."""

    kick: str
    snare: str
    hat: str
    bass: str
    lead: str
    wave: str  # timbre of the lead, a key of WAVES
    octave: int  # of the lead
    decay_s: float  # of the lead's notes: short is plucked, long is a pad
    punch: float  # drum level against the tones


STYLES = {
    "BR": Style("x--xx-x-x--xx---", "----x--x----x--x", "x-x-x-x-x-x-x-x-",
                "0--0--4-0--2--4-", "----0-----2-0---", "brass", 0, 0.12, 1.2),
    "PO": Style("x---x--xx---x---", "----x-------x---", "--x---x---x---x-",
                "0-0-0-0-3-3-4-4-", "0-2-4-2-0-2-4-5-", "square", 1, 0.09, 0.9),
    "LO": Style("x---x-x-x---x--x", "----x-------x-x-", "xxx-xxx-xxx-xxx-",
                "0-40--040-40--24", "--0---0---2---0-", "organ", 0, 0.15, 0.9),
    "MH": Style("x---x----x--x---", "----x-------x---", "x-x-x-x-x-x-x-xx",
                "0-----0-4-------", "0-------4-------", "bell", 1, 0.50, 1.1),
    "LH": Style("x--xx---x-x-x---", "----x--x----x---", "xxxxxxxxxxxxxxxx",
                "0---------0-2---", "4-4-5-4---2-----", "string", 1, 0.25, 1.2),
    "HO": Style("x---x---x---x---", "----x-------x---", "--x---x---x---x-",
                "--0---0---4---0-", "0--0--0---0--0--", "organ", 1, 0.20, 1.0),
    "WA": Style("x---x---x---x---", "----x-------x---", "x-xxx-xxx-xxx-xx",
                "0-0-7-7-0-0-7-7-", "4---2---0---2-4-", "string", 1, 0.40, 0.8),
    "KR": Style("x-x-x--xx-x-x-xx", "----x-------x-xx", "x---x---x---x---",
                "0---0---1---0---", "0---------1-----", "brass", -1, 0.35, 1.5),
    "JS": Style("x---x--xx---x---", "----x--x-x--x---", "x--xx--xx--xx--x",
                "0--2--4-5--4--2-", "--4--2----5--4--", "bell", 0, 0.22, 0.8),
    "JB": Style("x---x---x---x---", "----x-------x---", "x---x---x---x---",
                "0-------4-------", "0-2-4-7-4-2-0-2-", "sine", 1, 0.60, 0.5),
}  # fmt: skip
UNHEARD = {  # styles of no dance genre: no clip is ever drawn with them, so no network has heard one
    "drum and bass": Style("x---------x-----", "----x-------x---", "x-xxx-xxx-xxx-xx",
                           "0-----0---3-----", "------4-------2-", "string", 1, 0.30, 1.3),
    "reggaeton": Style("x---x---x---x---", "---x--x----x--x-", "x---x---x---x---",
                       "0--0--0-4--4--4-", "0-----2---4-----", "square", 0, 0.18, 1.1),
}  # fmt: skip
WAVES = {  # loudness of the harmonics 1, 2, 3, ...
    "sine": (1, 0.15),
    "organ": (1, 0.8, 0, 0.6, 0, 0.3),
    "square": (1, 0, 0.33, 0, 0.2, 0, 0.14, 0, 0.11),
    "brass": (1, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1),
    "string": (0.6, 0.5, 0.45, 0.2, 0.35, 0.1),
    "bell": (1, 0, 0, 0.6, 0, 0, 0.35),
}
MINOR = np.array([0, 2, 3, 5, 7, 8, 10, 12, 14, 15])  # semitones of the scale's degrees 0 ... 9
PROGRESSIONS = ((0, 0, 5, 4), (0, 3, 4, 0), (0, 5, 2, 6), (0, 0, 3, 3))  # the chords' degrees, one a bar, four bars
CYCLE = 2048  # samples of one stored period


def track(name: str) -> tuple[str, float, int]:
    """An AIST track name -> (genre, bpm, seed): 80 + 10 * index beats a minute, House 110 + 5 * index."""
    genre, index = name[1:3], name[3:]
    if len(name) != 4 or name[0] != "m" or genre not in STYLES or index not in "012345":
        raise ValueError(f"{name!r} is not an AIST track: expected m, a genre of {', '.join(STYLES)}, and 0-5")
    index = int(index)
    return genre, 110.0 + 5 * index if genre == "HO" else 80.0 + 10 * index, index


TRACKS = tuple(f"m{genre}{index}" for genre in STYLES for index in range(6))


def play(genre: str, bpm: float, seed: int, start_s: float, dur_s: float, sr_hz: int = 16000) -> np.ndarray:
    """Play `dur_s` seconds of the track (genre, bpm, seed) from `start_s` on -> float32 (S,) in [-1, 1].

    genre is a key of STYLES or of UNHEARD.

    S = round(dur_s * sr_hz). Sample i sounds at start_s + i / sr_hz seconds into the track; kicks are on every beat.
    The seed picks the key, the chords, extra notes and the loudness; tempo is free.
    """
    style, score = _style(genre), _score(genre, seed)
    seconds = start_s + np.arange(round(dur_s * sr_hz)) / sr_hz  # (S,)
    step_s = 15 / bpm  # a sixteenth note
    step = np.floor(seconds / step_s + 1e-9).astype(np.int64)  # (S,)
    bar_step = step % 64

    def since_onset(voice):  # (S,) seconds since the voice's last onset
        return (seconds - (step - score[voice + "_age"][bar_step]) * step_s).astype(np.float32)

    kick, snare, hat = _drums(genre, sr_hz)
    out = np.zeros(len(seconds), np.float32)
    for voice, sound in (("kick", kick), ("snare", snare), ("hat", hat)):
        at = np.minimum((since_onset(voice) * sr_hz).astype(np.int32), len(sound) - 1)
        out += style.punch * sound[at]
    for voice, wave, decay_s, level in (("bass", "organ", 0.25, 0.35), ("lead", style.wave, style.decay_s, 0.2)):
        age = since_onset(voice)
        envelope = level * np.minimum(age * 200, 1) * np.exp(-age / np.float32(decay_s))
        for voicing in score[voice + "_hz"]:  # one a note of the chord
            period = (age * voicing[bar_step] * CYCLE).astype(np.int32) & (CYCLE - 1)
            out += envelope * _wave(wave)[period]
    return np.tanh(score["gain"] * out).astype(np.float32)


def beats_in(bpm: float, start_s: float, dur_s: float) -> np.ndarray:
    """Beats k * 60 / bpm - start_s within [0, dur_s): seconds from `start_s` seconds into the track on."""
    first, last = np.ceil(start_s * bpm / 60 - 1e-9), np.ceil((start_s + dur_s) * bpm / 60 - 1e-9)
    return np.arange(first, last) * 60 / bpm - start_s


def _style(genre: str) -> Style:
    return (STYLES | UNHEARD)[genre]


def _number(genre: str) -> int:
    return list(STYLES | UNHEARD).index(genre)


@lru_cache(maxsize=4096)
def _score(genre: str, seed: int) -> dict:
    """Four bars of notes: for each of 64 steps, how many steps ago each voice last began, and at what pitch in Hz."""
    style, rng = _style(genre), np.random.default_rng([_number(genre), seed])
    root = 33 + rng.integers(0, 12)  # A1 ... G sharp 2, as MIDI notes
    degrees = np.repeat(PROGRESSIONS[rng.integers(len(PROGRESSIONS))], 16)  # (64,)
    score = {"gain": np.float32(rng.uniform(0.6, 1.0))}
    for voice in ("kick", "snare", "hat", "bass", "lead"):
        notes = list(getattr(style, voice) * 4)
        for at in rng.integers(0, 64, 3):  # small fills, off the beat
            if at % 4 and notes[at] == "-":
                notes[at] = "x" if voice in ("kick", "snare", "hat") else "0"
        onset = np.flatnonzero([n != "-" for n in notes])
        last = onset[
            np.searchsorted(onset, np.arange(64), side="right") - 1
        ]  # -1 wraps to the previous four bars' last
        score[voice + "_age"] = (np.arange(64) - last) % 64
        if voice in ("bass", "lead"):
            degree = np.array([int(notes[at]) for at in last]) + degrees[last]
            chord = (0,) if voice == "bass" else (0, 2, 4)
            base = root + (0 if voice == "bass" else 24 + 12 * style.octave)
            midi = [base + 12 * ((degree + c) // 7) + MINOR[(degree + c) % 7] for c in chord]
            score[voice + "_hz"] = [np.float32(440 * 2 ** ((m - 69) / 12)) for m in midi]  # each (64,)
    return score


@lru_cache(maxsize=16)
def _wave(name: str) -> np.ndarray:
    angle = 2 * np.pi * np.arange(CYCLE) / CYCLE
    wave = sum(level * np.sin((k + 1) * angle) for k, level in enumerate(WAVES[name]))
    return (wave / np.abs(wave).max()).astype(np.float32)  # (CYCLE,)


@lru_cache(maxsize=64)
def _drums(genre: str, sr_hz: int) -> list[np.ndarray]:
    """The genre's own kick, snare and hat: float32, each ending in silence."""
    rng = np.random.default_rng([7, _number(genre)])
    t = np.arange(int(0.3 * sr_hz)) / sr_hz
    low, high = rng.uniform(42, 58), rng.uniform(90, 220)
    kick = np.sin(2 * np.pi * (low * t + high * 0.03 * (1 - np.exp(-t / 0.03)))) * np.exp(-t / 0.09)
    noise = np.interp(t * 16000, np.arange(4801), rng.standard_normal(4801))  # the same noise at any sampling rate
    snare = (0.45 * noise + 0.5 * np.sin(2 * np.pi * rng.uniform(160, 240) * t)) * np.exp(-t / rng.uniform(0.04, 0.09))
    hat = 0.35 * np.diff(noise, prepend=0) * (sr_hz / 16000) * np.exp(-t / rng.uniform(0.012, 0.05))
    fade = np.minimum(1, (t[-1] - t) / 0.02)
    return [(level * drum * fade).astype(np.float32) for level, drum in ((0.9, kick), (0.6, snare), (0.5, hat))]
