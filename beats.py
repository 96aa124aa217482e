"""Beats of the music, beats of the motion, and how well they agree, each score with its level of chance.

Concept   a motion beat is where a movement stops or turns: a minimum of speed, or a turning point of one coordinate
          (the lowest point of the body). Beat alignment asks how near motion beats and music beats lie; phase locking
          asks whether the motion always passes the beat in the same phase of its swing.
Paper     arXiv 2503.14505v2, Sec. 5.1 has its beats judged by a video LLM; these are the measures of the field.
          AIST++: Li et al. 2021, "AI Choreographer". Bailando: Siyao et al. 2022, "Bailando: 3D Dance Generation".
Differs   two scores share the name "beat alignment": both are here. Their sigma, 3 frames at 60 fps, is in seconds.

Units     times in seconds from the start of the clip, (n,) and rising; phases in turns (1 = one beat).
"""

from collections.abc import Callable

import numpy as np

SIGMA_S = 0.05  # 3 frames at 60 fps, as AIST++ and Bailando
TIGHT = 400  # how evenly beats must follow: at librosa's 100 they bend towards ornaments; slow drift is still followed
SILENCE_S = 3.0  # put around the music when beats are tracked: longer than any beat
LAG_S = 0.02  # librosa's onset strength peaks this late with windows of 128 ms (median over click tracks)

# ---------------------------------------------------------------------------------------------------- finding beats


def music_beats(waveform: np.ndarray, sr_hz: int, bpm_prior: float | None = None) -> tuple[float, np.ndarray]:
    """Tempo (beats a minute) and beat times (s) of a waveform (S,): librosa's dynamic programming (Ellis 2007).

    The onsets it follows are those of all bands plus once more those below 250 Hz: in dance music the bass drum, not
    the brighter off-beat, carries the beat.

    bpm_prior  the tempo to expect, known for AIST from the file name, give or take a third of an octave; without it
               120, give or take an octave
    returns    (0, no beats) for silence
    """
    import librosa

    y, dur_s = np.asarray(waveform, np.float32), len(waveform) / sr_hz
    hop, window = round(0.01 * sr_hz), round(0.128 * sr_hz)  # librosa's usual hop would be 32 ms at 16 kHz
    edge = min(round(window / hop) + 3, max(0, (len(y) - 1) // hop))  # mirrored: sound setting in at 0 is no onset
    y = np.pad(y, edge * hop, mode="reflect") if edge else y
    full = librosa.onset.onset_strength(y=y, sr=sr_hz, hop_length=hop, n_fft=window)
    bass = librosa.onset.onset_strength(y=y, sr=sr_hz, hop_length=hop, n_fft=window, n_mels=8, fmax=250)
    onsets = (full / max(full.std(), 1e-6) + bass / max(bass.std(), 1e-6))[edge : len(full) - edge]
    if not onsets.any():
        return 0.0, np.zeros(0)
    about = {"start_bpm": bpm_prior, "std_bpm": 1 / 3} if bpm_prior else {"start_bpm": 120, "std_bpm": 1}
    tempo = float(librosa.feature.tempo(onset_envelope=onsets, sr=sr_hz, hop_length=hop, **about)[0])
    # Silence on both sides, for librosa is at fault at the cuts: its path of beats ends at the last maximum of a
    # running score, and the last frame counts as one if the score still rises there (a false beat, which bends those
    # before it); and a beat in the second half of the first period is charged for a predecessor that it cannot have.
    silence = np.zeros(round(SILENCE_S * sr_hz / hop))
    _, at = librosa.beat.beat_track(onset_envelope=np.concatenate([silence, onsets, silence]), sr=sr_hz, hop_length=hop,
                                    bpm=tempo, tightness=TIGHT, trim=False)  # fmt: skip
    beats_s = (at - len(silence)) * hop / sr_hz - LAG_S
    return tempo, beats_s[(beats_s >= 0) & (beats_s < dur_s)]


def motion_beats(curve: np.ndarray, fps: float, kind: str = "min", prominence: float = 0.1) -> np.ndarray:
    """Times (s) of the turning points of a curve (F,), one value a frame, frame i at second i / fps.

    The curve is smoothed by a Gaussian of 1/30 s; a point lower than both neighbours counts if on either side the
    curve climbs by `prominence` (a share of its whole range) before it falls below that point again; its time is the
    vertex of the parabola through it and its neighbours.

    kind     "min": lowest points, e.g. of speed (AIST++) or of the height of the head; "max": highest
    """
    if kind not in ("min", "max"):
        raise ValueError(f"kind={kind!r}: expected 'min' or 'max'")
    y = smooth(curve, fps) * (1 if kind == "min" else -1)
    need = prominence * np.ptp(y)
    times = []
    for i in range(1, len(y) - 1):
        if y[i - 1] > y[i] <= y[i + 1] and min(climb(y[i::-1]), climb(y[i:])) >= need > 0:
            bend = y[i - 1] - 2 * y[i] + y[i + 1]
            times.append((i + 0.5 * (y[i - 1] - y[i + 1]) / bend) / fps)
    return np.array(times)


def climb(y: np.ndarray) -> float:
    """How far a curve rises above its first value before it first falls below it."""
    below = np.flatnonzero(y < y[0])
    return float(np.max(y[: below[0]] if len(below) else y) - y[0])


def smooth(curve: np.ndarray, fps: float, width_s: float = 1 / 30) -> np.ndarray:
    """Gaussian smoothing of (F,) with standard deviation `width_s`. The ends go on as their mirror image turned upside
    down, which keeps a slope a slope: a plain mirror would make a turning point of it."""
    y = np.asarray(curve, np.float64)
    reach = min(int(np.ceil(3 * width_s * fps)), len(y) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / (width_s * fps)) ** 2)
    return np.convolve(np.pad(y, reach, mode="reflect", reflect_type="odd"), kernel / kernel.sum(), mode="valid")


def speed(points: np.ndarray, fps: float) -> np.ndarray:
    """Mean speed of points (F, J, D) in units a second, (F,): its minima are AIST++'s motion beats."""
    return np.linalg.norm(np.gradient(np.asarray(points, np.float64), 1 / fps, axis=0), axis=-1).mean(axis=1)


def motion_energy(frames: np.ndarray) -> np.ndarray:
    """How much moves, from pixels alone: frames (F, H, W, 3) uint8 -> (F,) grey levels a frame, F >= 2.

        e_i = mean over the moving region of (|x_i - x_(i-1)| + |x_(i+1) - x_i|) / 2

    The region is where pixels change, over the clip, at least a tenth as much as the busiest pixel. Centred
    differences put e_i at frame i. A poor man's speed: it misses motion along a line of one colour.
    """
    grey = np.asarray(frames, np.float32).mean(axis=-1)  # (F, H, W)
    change = np.abs(np.diff(grey, axis=0))  # (F - 1, H, W)
    activity = change.mean(axis=0)  # (H, W)
    e = change[:, activity >= 0.1 * activity.max()].mean(axis=1)  # (F - 1,)
    return np.concatenate([e[:1], (e[1:] + e[:-1]) / 2, e[-1:]])


def body_height(frames: np.ndarray) -> np.ndarray:
    """How high the moving figure is, from pixels alone: (F, H, W, 3) uint8 -> (F,) pixels upwards from the start.

    Between two frames everything that moves is taken to shift by one (dx, dy): the least squares solution of
    dx gx + dy gy + gt = 0 (Lucas and Kanade 1981), weighted by how much each pixel changes over the clip. The shifts
    add up to a height, which may drift slowly: good for turning points, not for levels. Limbs that move both ways
    cancel, the camera's own motion does not.
    """
    grey = np.asarray(frames, np.float32).mean(axis=-1)  # (F, H, W)
    change = np.diff(grey, axis=0)
    weight = np.abs(change).mean(axis=0)  # (H, W)
    height = [0.0]
    for before, after, gt in zip(grey, grey[1:], change):
        gy, gx = np.gradient((before + after) / 2)
        xx, xy, yy = ((weight * a * b).sum() for a, b in ((gx, gx), (gx, gy), (gy, gy)))
        xt, yt = (weight * gx * gt).sum(), (weight * gy * gt).sum()
        determinant = xx * yy - xy * xy
        down = (xy * xt - xx * yt) / determinant if determinant > 1e-6 * (xx * yy + 1) else 0.0
        height.append(height[-1] - down)
    return np.array(height)


def tempo_of_motion(curve: np.ndarray, fps: float, lo: float = 60, hi: float = 180) -> float:
    """Tempo (cycles a minute) of the sinusoid that, with a straight line, fits a curve (F,) best.

    Least squares over a grid of half beats a minute, the best refined by a parabola. Unlike the peak of an FFT it is
    unbiased on clips of a few cycles. nan for a curve that does not move.
    """
    y = np.asarray(curve, np.float64)
    t = np.arange(len(y)) / fps
    line = np.stack([np.ones_like(t), t - t.mean()], axis=1)
    y = y - line @ np.linalg.lstsq(line, y, rcond=None)[0]
    if np.abs(y).max() < 1e-9 * max(1.0, np.abs(curve).max()):
        return float("nan")
    grid = np.arange(lo, hi + 0.25, 0.5)
    turns = 2 * np.pi * grid[:, None] / 60 * t  # (G, F)
    waves = np.stack([np.broadcast_to(line[:, 0], turns.shape), np.broadcast_to(line[:, 1], turns.shape),
                      np.cos(turns), np.sin(turns)], axis=2)  # (G, F, 4)  # fmt: skip
    explained = ((np.linalg.qr(waves)[0].transpose(0, 2, 1) @ y) ** 2).sum(axis=1)  # (G,)
    i = int(np.clip(explained.argmax(), 1, len(grid) - 2))
    left, top, right = explained[i - 1 : i + 2]
    bend = left - 2 * top + right
    shift = 0.5 * (left - right) / bend if bend < 0 else 0.0
    return float(np.clip(grid[i] + 0.5 * shift, lo, hi))


# --------------------------------------------------------------------------------------------------------- scores


def bas_motion(motion: np.ndarray, music: np.ndarray, sigma_s: float = SIGMA_S) -> float:
    """Beat alignment of AIST++ (Li et al. 2021): do the dancer's beats fall on the music's?

        BAS = 1/|motion| sum over t in motion of exp(-min over b in music of (t - b)^2 / (2 sigma^2))

    In [0, 1]; 0 where either side has no beat.
    """
    if len(motion) == 0 or len(music) == 0:
        return 0.0
    nearest = np.abs(np.subtract.outer(motion, music)).min(axis=1)  # (n_motion,) s
    return float(np.exp(-(nearest**2) / (2 * sigma_s**2)).mean())


def bas_music(motion: np.ndarray, music: np.ndarray, sigma_s: float = SIGMA_S) -> float:
    """Beat alignment of Bailando (Siyao et al. 2022): is each beat of the music danced?

        BAS = 1/|music| sum over b in music of exp(-min over t in motion of (t - b)^2 / (2 sigma^2))

    The roles of `bas_motion` exchanged: motion that is too rare lowers this one, motion that is too busy the other.
    """
    return bas_motion(music, motion, sigma_s)


def precision_recall_f1(motion: np.ndarray, music: np.ndarray, tol_s: float = SIGMA_S) -> tuple[float, float, float]:
    """Share of motion beats on a music beat, of music beats that are danced, and their harmonic mean.

    A pair matches within +-tol_s and each beat is used once (walking through both in order finds the most pairs).
    """
    i = j = hits = 0
    while i < len(motion) and j < len(music):
        if abs(motion[i] - music[j]) <= tol_s:
            hits, i, j = hits + 1, i + 1, j + 1
        elif motion[i] < music[j]:
            i += 1
        else:
            j += 1
    precision, recall = hits / max(len(motion), 1), hits / max(len(music), 1)
    return precision, recall, 2 * hits / max(len(motion) + len(music), 1)


def beat_phase(times: np.ndarray, music: np.ndarray) -> np.ndarray:
    """Phase of each time within the beat it falls in, in [0, 1): 0 on the beat. Needs two beats; the outermost
    intervals go on beyond the first and last beat."""
    music = np.asarray(music, np.float64)
    if len(music) < 2:
        raise ValueError(f"a phase needs at least two music beats, got {len(music)}")
    i = np.clip(np.searchsorted(music, times, side="right") - 1, 0, len(music) - 2)
    return ((times - music[i]) / (music[i + 1] - music[i])) % 1.0


def phase_locking(curve: np.ndarray, fps: float, beats_s: np.ndarray, kind: str = "min") -> complex:
    """One clip's phasor: the mean of exp(2 pi i phase) over its motion beats, |z| in [0, 1]; see `plv`."""
    return phasor(motion_beats(curve, fps, kind), beats_s)


def phasor(motion: np.ndarray, music: np.ndarray) -> complex:
    """Mean of exp(2 pi i phase) of motion beats within the music's beats: 1 on the beat, -1 half-way; 0 for none."""
    if len(motion) == 0:
        return 0j
    return complex(np.exp(2j * np.pi * beat_phase(np.asarray(motion), music)).mean())


def plv(phasors) -> float:
    """Phase-locking value of a set of clips: the length of the mean of their phasors, in [0, 1].

    Pooled over clips on purpose. Inside one clip of a few beats anything regular looks locked; over n clips only a
    phase common to all survives, and chance falls to about 0.9 / sqrt(n).
    """
    return float(np.abs(np.mean(phasors)))


# ------------------------------------------------------------------------------------------- chance and certainty


def circular_shift_null(score: Callable, motion: np.ndarray, music: np.ndarray, dur_s: float, n: int = 32) -> float:
    """Chance level of `score(motion, music)`: its mean over n even circular shifts of the motion within the clip.

    Keeps the number and spacing of the motion beats and destroys only their relation to the music.
    """
    shifts = dur_s * np.arange(1, n + 1) / (n + 1)
    return float(np.mean([score(np.sort((np.asarray(motion) + shift) % dur_s), music) for shift in shifts]))


def bootstrap_interval(values, n: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values`, one a clip, from n resamples of the clips.

    Complex values are phasors: the interval is that of the length of their mean, i.e. of `plv`.
    """
    values = np.asarray(values)
    picks = np.random.default_rng(seed).integers(len(values), size=(n, len(values)))
    means = values[picks].mean(axis=1)  # (n,)
    low, high = np.quantile(np.abs(means) if np.iscomplexobj(values) else means, [0.025, 0.975])
    return float(low), float(high)
