"""The eleven questions of the judge, how an answer is read, and which videos are asked about.

Concept   five questions make up dance quality, three video quality, three prompt alignment; each is answered by a
          number from 0 to 10. A folder of videos is one configuration.
Paper     arXiv 2503.14505v2, Sec. 5.1 "Quantitative Metrics", App. J, Table 10.
Differs   the published parser takes the first number of an answer ("On a 0-10 scale: 7" is 0); here only a bare
          number counts.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from config import UserError
from data_names import GENRES, AistName


def rate(what: str, low="poor {}", middle="moderate {}", high="perfect {}") -> str:
    """The wording that eight of the questions share; {} in a grade stands for `what`."""
    grades = f"0 means {low}, 5 means {middle}, and 10 means {high}".replace("{}", what)
    return f"Rate the {what} where: {grades}. Output only the number."


# Table 10, word for word
DANCE = {
    "style_alignment": rate("style alignment of the dance to music"),
    "beat_alignment": rate("beat alignment of the dance to music"),
    "body_representation": rate(
        "body representation of the dancer",
        "unrealistic/distorted proportions of the dancer",
        "minor anatomical issues of the dancer",
        "anatomically perfect representation of the dancer",
    ),
    "movement_realism": rate("movement realism of the dancer"),
    "choreography_complexity": rate(
        "complexity of the choreography",
        "extremely basic choreography",
        "intermediate choreography",
        "extremely complex/advanced choreography",
    ),
}
VIDEO = {
    "imaging_quality": rate("imaging quality"),
    "aesthetic_quality": rate("aesthetic quality"),
    "overall_consistency": rate(
        "overall consistency", "poor consistency", "moderate consistency", "perfect consistency"
    ),
}
PROMPT = {
    "style_capture": "How well does the dance video capture the specific style mentioned in the prompt: '{prompt}'? "
    "Rate 0-10 where: 0 means completely missed the style, 5 means some elements of the style are present, and 10 "
    "means perfectly captures the style. Output only the number.",
    "creative_interpretation": "Based on the prompt '{prompt}', rate the creativity in interpreting the prompt 0-10 "
    "where: 0 means generic/standard interpretation, 5 means moderate creativity, and 10 means highly creative and "
    "unique interpretation. Output only the number.",
    "prompt_satisfaction": "Rate the overall prompt satisfaction 0-10 where: 0 means the video fails to satisfy the "
    "prompt '{prompt}', 5 means it partially satisfies the prompt, and 10 means it fully satisfies all aspects of the "
    "prompt. Output only the number.",
}
QUESTIONS = DANCE | VIDEO | PROMPT


def parse(text) -> float | None:
    """A bare number from 0 to 10, "/10" behind it allowed -> the number; anything else -> None."""
    if not isinstance(text, str):
        return None
    bare = re.fullmatch(r"\s*(10(?:\.0+)?|[0-9](?:\.[0-9]+)?)(?:\s*/\s*10)?\s*", text)
    return float(bare[1]) if bare else None


class Clip(NamedTuple):
    """One video that is expected, there or not."""

    name: str
    path: Path
    prompt: str | None


def find_clips(folder: Path) -> list[Clip]:
    """The videos of grid.json, else every mp4 of the folder without a prompt."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of videos")
    grid = folder / "grid.json"
    if grid.exists():
        try:
            listed = [
                (str(v["name"]), str(v["prompt"])) for v in json.loads(grid.read_text(encoding="utf-8"))["videos"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{grid}: expected the list that evaluate.py generate writes ({error})") from error
        clips = [Clip(name, folder / f"{Path(name).name}.mp4", prompt) for name, prompt in listed]
    else:
        clips = [Clip(path.stem, path, None) for path in sorted(folder.glob("*.mp4"))]
    if not any(clip.path.exists() for clip in clips):
        raise UserError(f"{folder}: holds no mp4 file; make some with evaluate.py generate")
    return clips


def bpm_of(stem: str) -> int | None:
    """Tempo by the AIST rule if a track's name is part of a file name: gBR_..._mBR0_ch01 or mBR0_p03 -> 80."""
    found = re.search(rf"(?<![A-Za-z0-9])m({'|'.join(GENRES)})([0-5])(?![A-Za-z0-9])", stem)
    return found and AistName("", 1, found[1], (), f"m{found[1]}{found[2]}").bpm
