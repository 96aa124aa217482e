"""Claims about the picture: the prompt still holds after adaptation, also for what the adapter never saw.

Concept   the same prompts and noise before (the prior) and after (with adapters); what is asked for is read back from
          the pixels. The same readers on true clips give the ceiling; the answers held against other prompts, chance.
Paper     arXiv 2503.14505v2, Sec. 4, Fig. 3 (unseen subjects), 4 (groups), 8 (diversity) and 12 (difficulty).
"""

from dataclasses import replace

import numpy as np

import toy
import toy_read
import toy_reader
from claims_score import SHIFTS, Row, dance_rows, kept_row, mean, ratio_row, share_row, spread, true_beats, values_of
from claims_studio import FRAMES, PRIOR, Dancer, Studio, music_of, prompt_of, solo_clips
from toy_draw import COLOURS, SETTINGS

POSSIBLE = {"shirt": COLOURS, "trousers": COLOURS, "setting": SETTINGS} | toy_reader.ANSWERS  # attribute -> answers


def wanted(clip: toy.Clip) -> dict:
    """What its prompt asks for; the figure is asked for where one dancer is alone."""
    asked = {"shirt": clip.shirt, "trousers": clip.trousers, "setting": clip.setting} | toy_reader.truth(clip)
    if len(clip.figures) > 1:
        del asked["figure"]
    return asked


def attribute_rows(
    studio: Studio, dancers: list[Dancer], clips: list[toy.Clip], attributes, what: str = "", on_beat: bool = False
) -> list[Row]:
    """For each attribute: share right before and after, and after / before. on_beat: their alignment as well.

    Chance: the answers held against the wishes of other clips; one of the possible answers where all wish the same.
    """
    prompts, waves = [prompt_of(clip) for clip in clips], music_of(clips)
    asked, true = [wanted(clip) for clip in clips], studio.look(studio.true(clips))
    answers = {dancer: studio.look(studio.dance(dancer, prompts, waves)) for dancer in [PRIOR, *dancers]}
    rows = []
    for attribute in attributes:
        has = [i for i, wish in enumerate(asked) if attribute in wish]
        ceiling, right = mean([true[i][attribute] == asked[i][attribute] for i in has]), {}
        for dancer, told in answers.items():
            right[dancer] = [told[i][attribute] == asked[i][attribute] for i in has]
            turned = [np.roll(has, k) for k in range(1, min(SHIFTS, len(has) - 1) + 1)]
            chance = mean([told[i][attribute] == asked[j][attribute] for turn in turned for i, j in zip(has, turn)])
            if len({asked[i][attribute] for i in has}) == 1:
                chance = 1 / len(POSSIBLE[attribute])
            rows.append(share_row(what + dancer.label, attribute, right[dancer], chance, ceiling))
        for dancer in dancers:
            rows.append(kept_row(what + dancer.label, f"{attribute}: after / before", right[PRIOR], right[dancer]))
    if on_beat:
        music = [true_beats(clip, FRAMES) for clip in clips]
        ceilings = values_of(dance_rows("", [a["curve"] for a in true], music))
        for dancer, told in answers.items():
            rows += dance_rows(what + dancer.label, [a["curve"] for a in told], music, ceiling=ceilings)
    return rows


def prompt(studio: Studio, dancers: list[Dancer]) -> list[Row]:
    """Twice --clips prompts of all kinds: places, views and numbers of dancers come about evenly."""
    clips = []
    for index in range(2 * studio.cfg.clips):
        rng = np.random.default_rng([studio.cfg.seed, 2_000_000, index])
        while toy.held_back(clip := toy_reader.any_clip(rng)):
            pass
        clips.append(clip)
    return attribute_rows(studio, dancers, clips, POSSIBLE)


def unseen(studio: Studio, dancers: list[Dancer]) -> list[Row]:
    """Pairs of clothes and a rabbit that the adapter's data hold back, and alignment with such a dancer."""
    rows, solos = [], solo_clips(studio.cfg)
    pairs = list(toy.HELD_BACK.items())
    dressed = [
        replace(clip, shirt=pairs[i % len(pairs)][0], trousers=pairs[i % len(pairs)][1]) for i, clip in enumerate(solos)
    ]
    scenes = [name for name in toy.SETTINGS if name != toy.WHITE_STUDIO]
    rabbits = []
    for i, clip in enumerate(solos):
        rng = np.random.default_rng([studio.cfg.seed, 3_000_000, i])
        setting = scenes[i % len(scenes)]
        shirt, trousers = rng.choice(toy.visible_colours(setting), 2, replace=False)
        rabbit = replace(
            clip, figures=("rabbit",), setting=setting, shirt=str(shirt), trousers=str(trousers), wild=True
        )
        rabbits.append(rabbit)
    for what, clips, attributes in (
        ("clothes never seen together, ", dressed, ("shirt", "trousers")),
        ("rabbit, ", rabbits, ("figure", "setting")),
    ):
        rows += attribute_rows(studio, dancers, clips, attributes, what, on_beat=True)
    return rows


def groups(studio: Studio, dancers: list[Dancer]) -> list[Row]:
    """Two and three dancers: is their number kept, and do they dance on the beat."""
    rows = []
    for count in (2, 3):
        clips = solo_clips(studio.cfg, max(4, studio.cfg.clips // 2))
        clips = [
            replace(clip, situation="GR", figures=tuple(toy.FIGURES[(i + k) % 2] for k in range(count)))
            for i, clip in enumerate(clips)
        ]
        rows += attribute_rows(studio, dancers, clips, ("dancers",), f"{count} dancers, ", on_beat=True)
    return rows


def difficulty(studio: Studio, dancers: list[Dancer]) -> list[Row]:
    """AIST's prompts "basic dance" and "advanced dance", all else alike: how much more the advanced dancer moves.

    Chance is 1, no difference; the ceiling is the true clips' ratio.
    """
    solos = solo_clips(studio.cfg)
    pairs = [[replace(clip, situation=situation) for clip in solos] for situation in ("BM", "FM")]

    def rows_of(what: str, videos: list[list], ceiling: dict) -> list[Row]:
        basic, advanced = (studio.read(some) for some in videos)
        rows = []
        for measure, value in (
            ("range of the body's height", lambda a: np.ptp(np.percentile(a["curve"], (5, 95)))),
            ("movement", lambda a: a["movement"]),
        ):
            above, below = ([value(a) for a in some] for some in (advanced, basic))
            name = f"{measure}: advanced / basic"
            rows.append(ratio_row(what, name, above, below, 1.0, ceiling.get(name)))
        return rows

    true = rows_of("true clips", [studio.true(clips) for clips in pairs], {})
    rows = list(true)
    prompts = [
        [toy.aist_prompt(clip, np.random.default_rng([studio.cfg.seed, i])) for i, clip in enumerate(clips)]
        for clips in pairs
    ]
    waves = music_of(solos)
    for dancer in [PRIOR, *dancers]:
        rows += rows_of(dancer.label, [studio.dance(dancer, some, waves) for some in prompts], values_of(true))
    return rows


def diversity(studio: Studio, dancers: list[Dancer]) -> list[Row]:
    """Spread of the dances to one prompt and one piece of music over 16 seeds, relative to the spread of the data.

    A spread is the mean difference of two videos' silhouettes. Chance, one dance always, is 0; the data's is 1.
    """
    scenes, seeds = solo_clips(studio.cfg, max(1, studio.cfg.clips // 16)), 16
    repeated = [clip for clip in scenes for _ in range(seeds)]
    prompts, waves = [prompt_of(clip) for clip in repeated], music_of(repeated)
    others = [replace(clip, dance_seed=clip.dance_seed + i % seeds) for i, clip in enumerate(repeated)]

    def spreads(videos: list) -> list[float]:
        shapes = np.stack(studio.map(toy_read.silhouette, videos))
        return [spread(shapes[i : i + seeds]) for i in range(0, len(shapes), seeds)]

    of_data, rows = spreads(studio.true(others)), []
    for dancer in [PRIOR, *dancers]:
        value = spreads(studio.dance(dancer, prompts, waves))
        rows.append(ratio_row(dancer.label, "spread over seeds / of the data", value, of_data, 0.0, 1.0))
    return rows
