"""What a folder of dance videos tells before any is opened: genre, camera, dancers, music, split, prompts, captions.

Concept   an AIST file is called g<genre>_s<situation>_c<camera>_d<dancer>..._m<music>_ch<choreography>. From that come
          the tempo, the side of the split it is on, and the prompts; no list of files is needed. Any other video is
          in the wild, and its caption is in a .txt file beside it.
Paper     arXiv 2503.14505v2, Sec. 4.5 (prompts), App. I, Table 7 (test tracks), App. J, Table 8 (templates).
Differs   clips without a track in their name (showcase, cypher, battle) are known as such: theirs may be test music.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from config import UserError

# --------------------------------------------------------------------------------------------- names and prompts

GENRES = {"BR": "Break", "PO": "Pop", "LO": "Lock", "MH": "Middle Hip-hop", "LH": "LA style Hip-hop",
          "HO": "House", "WA": "Waack", "KR": "Krump", "JS": "Street Jazz", "JB": "Ballet Jazz"}  # fmt: skip
SITUATIONS = {"BM": "basic dance", "FM": "advanced dance", "MM": "moving camera", "GR": "group dance",
              "SH": "showcase", "CY": "cypher", "BT": "battle"}  # fmt: skip
CAMERAS = {1: "front view", 2: "front-left diagonal view", 3: "left side view", 4: "back-left diagonal view",
           5: "back view", 6: "back-right diagonal view", 7: "right side view", 8: "front-right diagonal view",
           9: "close-up front view from a low angle", 10: "moving front view"}  # fmt: skip
FEMALE = frozenset((1, 2, 3, 7, 8, 9, 12, 13, 15, 16, 18, 19, 25, 26, 27))
TEST_TRACKS = frozenset(("mLH4", "mKR2", "mBR0", "mLO2", "mJB5", "mWA0", "mJS3", "mMH3", "mHO5", "mPO1"))  # Table 7
TEMPLATES = (  # Table 8
    "{dancers_text} dancing {genre_name} in a {situation_name} setting in a studio with a white backdrop, "
    "captured from a {camera_view}",
    "a {camera_view} video of {dancers_text} performing {genre_name} choreography against a white background "
    "in a {situation_name} scene",
    "{dancers_text} executing {genre_name} movements in a minimalist studio space in a {situation_name} setting, "
    "shot from a {camera_view}",
    "a {genre_name} dance performance by {dancers_text} in a pristine white studio, {camera_view}, {situation_name}",
)
AIST_BASE = "a professional dancer dancing in a studio with a white backdrop"
WILD_BASE = "a dance video"

NAME = re.compile(rf"g({'|'.join(GENRES)})_s([A-Z]{{2}})_c(\d\d)((?:_d\d\d)+)_m([A-Z]{{2}})([0-5])_ch\d+")
FREE = re.compile(r"(?:g[A-Z]{2}_)?s(SH|CY|BT)_c(\d\d)(?:_.*)?")  # no genre, no music
ANY_TEST_TRACK = re.compile(rf"(?<![A-Za-z0-9])({'|'.join(sorted(TEST_TRACKS))})(?![A-Za-z0-9])")


@dataclass(frozen=True)
class AistName:
    """What the name of an AIST clip says; showcases, cyphers and battles have no genre, dancers or music."""

    situation: str
    camera: int
    genre: str = ""
    dancers: tuple[int, ...] = ()
    music: str = ""  # "mBR0"

    @property
    def bpm(self) -> int:
        """Beats a minute of the track: 10 index + 80; House 5 index + 110."""
        index = int(self.music[3])
        return 5 * index + 110 if self.music[1:3] == "HO" else 10 * index + 80

    def prompts(self) -> tuple[str, ...]:
        """The four detailed prompts of Table 8, or the base prompt where the name tells too little."""
        if not self.genre:
            return (AIST_BASE,)
        people = [f"a professional {'female' if d in FEMALE else 'male'} dancer" for d in self.dancers]
        words = {
            "dancers_text": " and ".join(filter(None, [", ".join(people[:-1]), people[-1]])),
            "genre_name": GENRES[self.genre],
            "situation_name": SITUATIONS[self.situation],
            "camera_view": CAMERAS[self.camera],
        }
        return tuple(template.format(**words) for template in TEMPLATES)


def parse_aist(stem: str) -> AistName | None:
    """`gBR_sBM_c01_d04_mBR0_ch01` -> its parts; None if it is not the name of an AIST clip."""
    if match := NAME.fullmatch(stem):
        genre, situation, camera, dancers, track, index = match.groups()
        name = AistName(situation, int(camera), genre, tuple(map(int, dancers[2:].split("_d"))), f"m{track}{index}")
        known = track in GENRES and all(1 <= d <= 35 for d in name.dancers)
    elif match := FREE.fullmatch(stem):
        name, known = AistName(match[1], int(match[2])), True
    else:
        return None
    return name if known and name.situation in SITUATIONS and name.camera in CAMERAS else None


# --------------------------------------------------------------------------------------------------------- files

VIDEO_SUFFIXES = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi"}
Skipped = list[tuple[Path, str]]  # what was left out, and why


@dataclass(frozen=True)
class Source:
    """A video file; `aist` None means in the wild, where the caption is the text of the .txt beside it, or empty."""

    path: Path
    aist: AistName | None = None
    caption: str = ""

    def prompts(self) -> tuple[str, ...]:
        return self.aist.prompts() if self.aist else (self.caption or WILD_BASE,)

    def base_prompt(self) -> str:
        return AIST_BASE if self.aist else WILD_BASE


def find_videos(folders: Sequence[Path]) -> tuple[list[Path], Skipped]:
    """All video files below the folders, by name; each real folder is read once, whatever links lead to it."""
    files, skipped, seen, todo = [], [], set(), []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: not a folder; expected one with videos")
        todo.append(folder)
    while todo:
        folder = todo.pop()
        try:
            real, entries = folder.resolve(strict=True), sorted(folder.iterdir())
        except (OSError, RuntimeError) as error:
            skipped.append((folder, f"cannot be opened: {error}"))
            continue
        if real in seen:
            skipped.append((folder, "a second way to a folder that is read already"))
            continue
        seen.add(real)
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        todo += [entry for entry in visible if entry.is_dir()]
        files += [entry for entry in visible if not entry.is_dir() and entry.suffix.lower() in VIDEO_SUFFIXES]
    return sorted(files), skipped


def read_source(path: Path, cameras: Sequence[int]) -> Source | str:
    """The source, or the reason why it is left out."""
    aist = parse_aist(path.stem)
    if aist is None:
        if track := ANY_TEST_TRACK.search(path.stem):
            return f"names the test track {track[1]} without being an AIST name"
        try:
            with open(path.with_suffix(".txt"), "rb") as handle:
                caption = handle.read(4096).decode("utf-8", errors="replace")
        except OSError:
            caption = ""
        return Source(path, None, " ".join(caption.split()))
    if not aist.music:
        return "no track in its name: it may be test music"
    if aist.camera not in cameras:
        return f"camera c{aist.camera:02d} is not in use"
    return Source(path, aist)
