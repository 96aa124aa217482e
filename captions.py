"""Captions for clips in the wild: a vision server says in a sentence what is seen, kept as .txt beside the clip.

Concept   of each video without a caption a few frames, spread over its length, go to any OpenAI-compatible vision
          server (`python data.py --caption-url`). What is captioned is not asked again, so a stopped run goes on.
Paper     arXiv 2503.14505v2, Sec. 4.4 (captions of in-the-wild clips).
Differs   the paper used VideoChat2. Frames go as JPEG `image_url` parts, which all such servers take; `video_url` is
          known to few of them.

Privacy   the server's key is read from the environment (CAPTION_API_KEY) and never shown; see chat.py.
"""

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

import media
from chat import Refused, Server, ask, endpoint, message, part
from config import UserError
from data_names import Skipped, Source, find_videos, read_source

QUESTION = (
    "These are frames of one short dance video, in order. Describe it in one sentence of at most 50 words for a "
    "text-to-video model: who dances, what they wear, the style of dance if it is clear, the place, the light and "
    "the camera's view. Do not mention frames, music or sound. Answer with the sentence alone."
)
FRAMES = 8
KEY_VARIABLE = "CAPTION_API_KEY"  # of the environment: the server's key
LONG_SIDE = 512  # pixels of what is sent
LONGEST = 1000  # characters of a caption: more is not the one sentence that was asked for
JOBS = 4  # questions in flight at once
RETRIES, BACKOFF_S, TIMEOUT_S = 4, 1.0, 180.0
GIVE_UP = 8  # questions in a row without an answer: the server is not there


def vision_server(url: str, model: str) -> Server:
    """The server at --caption-url; its key, if it wants one, is in the environment."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    return Server(endpoint(url, "--caption-url", KEY_VARIABLE), model, RETRIES, BACKOFF_S, TIMEOUT_S, key)


def stills(path: Path) -> list[bytes]:
    """FRAMES frames as JPEG, each from the middle of an equal part of the video; UserError if it cannot be decoded."""
    dur_s = media.video_info(path).dur_s
    times = [(i + 0.5) * dur_s / FRAMES for i in range(FRAMES)]
    return [jpeg(media.read_video(path, start_s=time, num_frames=1)[0]) for time in times]


def jpeg(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a JPEG of at most LONG_SIDE pixels."""
    height, width = image.shape[:2]
    shrink = min(1, LONG_SIDE / max(height, width))
    size = [max(2, round(pixels * shrink)) for pixels in (width, height)]
    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
    with io.BytesIO() as memory:
        with av.open(memory, "w", format="image2pipe") as container:
            stream = container.add_stream("mjpeg", rate=1, options={"qmin": "2", "qmax": "4"})
            stream.width, stream.height = size
            stream.pix_fmt = "yuvj420p"
            for picture in (frame.reformat(*size, "yuvj420p", interpolation="AREA"), None):
                container.mux(stream.encode(picture))
        return memory.getvalue()


def clean(answer: object) -> str | None:
    """The caption on one line; None if the answer is none: no text, not a word in it, or far too much."""
    if not isinstance(answer, str):
        return None
    caption = " ".join(answer.split()).strip("\"'` ")
    fits = len(caption) <= LONGEST and caption.isprintable() and any(map(str.isalpha, caption))
    return caption if fits else None


def caption_wild(folders: Sequence[Path], server: Server) -> tuple[int, Skipped]:
    """Caption every in-the-wild video below the folders that has none: (how many captions were written, failures).

    raises   UserError if the server knows neither us nor the model, or has stopped answering; what was written stays
    """
    sources = [read_source(path, range(1, 11)) for path in find_videos(folders)[0]]
    bare = [s for s in sources if isinstance(s, Source) and s.aist is None and not s.caption]
    todo = list({s.path.with_suffix(".txt"): s for s in bare}.values())  # a.mp4 and a.mov share a.txt
    written, failed, silent = 0, [], 0
    with ThreadPoolExecutor(JOBS) as pool:
        try:
            answers = pool.map(lambda source: caption_one(source, server), todo)
            for source, why in zip(todo, tqdm(answers, "caption", len(todo), unit="clip", dynamic_ncols=True)):
                written += not why
                if why:
                    failed.append((source.path, why))
                silent = silent + 1 if why.startswith("no answer") else 0
                if silent == GIVE_UP:
                    raise UserError(
                        f"{server.url}: the last {silent} questions got {why}; the {written} captions that came are "
                        f"kept, so start again when the server is back"
                    )
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return written, failed


def caption_one(source: Source, server: Server) -> str:
    """Ask for one caption and write it; the reason if there is none."""
    target = source.path.with_suffix(".txt")
    if target.exists() and target.read_text(encoding="utf-8", errors="replace").strip():
        return ""  # by another process, or for a video of the same name
    try:
        pictures = [part("image", "image/jpeg", still) for still in stills(source.path)]
    except (UserError, OSError, ValueError) as error:
        return str(error).removeprefix(f"{source.path}: ")
    try:
        caption, why = ask(server, message(server.model, pictures, QUESTION, max_tokens=200), clean, "not a caption")
    except Refused as refusal:
        if str(refusal) in ("HTTP 401", "HTTP 403", "HTTP 404"):
            hint = "is the path, or --caption-model, right?" if str(refusal) == "HTTP 404" else f"set {KEY_VARIABLE}"
            raise UserError(f"{server.url} answers {refusal}: {hint}") from None
        return f"refused ({refusal})"
    if caption is None:
        return f"no answer ({why})"
    with media.new_file(target) as temporary:
        temporary.write_text(caption + "\n", encoding="utf-8")
    return ""
