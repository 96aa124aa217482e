"""Data: a folder of dance videos in, exact training batches out.

Concept   data_names.py reads the names, data_clips.py cuts the videos, data_encode.py makes latents and tokens once;
          here they become batches. A batch is a function of (seed, step): clip, prompt, dropouts and the draw from
          the posterior. Nothing is remembered, so it is the same whoever asks, in whatever order.
Paper     arXiv 2503.14505v2, Sec. 4.4 (AIST : in-the-wild 1 : 1), Sec. 4.5 (base prompts), Sec. 5.1 (split by music).
Differs   the latent is drawn anew from the posterior in every step. Music dropout is ours (0 by default, as published).

Dimension key   B batch   C latent channels   T H W latent frames, height, width   L text tokens   E text width
                A music tokens   D width of a music token
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import mochi_vae
import tensors
from captions import caption_wild, vision_server
from config import UserError, flag, from_cli, run
from data_clips import FPS, DataConfig
from data_encode import Clip, encode, hash_of, printable
from data_names import TEST_TRACKS
from look import draw_clips

# -------------------------------------------------------------------------------------------------------- batches

IN_MEMORY = 4 * 2**30  # bytes of encodings: up to here they are kept, beyond they are read again for every batch


class Batch(NamedTuple):
    """One training batch; z is a draw from the posterior in z_dit, audio None means no music in this step."""

    z: Tensor  # (B, C, T, H, W)
    text: Tensor  # (B, L, E)
    text_mask: Tensor  # (B, L) bool
    audio: Tensor | None  # (B, A, D)
    names: list[str]


class DanceClips:
    """Encoded clips, split into AIST, in-the-wild and held-out; `batch` draws from the first two, 1 : 1.

    Held out are the clips with test music; if there are none, those of the last 5 % of the videos.
    base_prompt, caption_dropout   chance of an item to get the base prompt; to get no prompt at all
    music_dropout                  chance of a whole batch to get no music
    """

    def __init__(self, clips: list[Clip], prompts: Path, base_prompt=0.2, caption_dropout=0.1, music_dropout=0.0):
        self.base_prompt, self.caption_dropout, self.music_dropout = base_prompt, caption_dropout, music_dropout
        self.held_out = [c for c in clips if c.source.aist and c.source.aist.music in TEST_TRACKS]
        if not self.held_out:
            sources = sorted({c.source.path for c in clips})
            last = set(sources[len(sources) - max(1, len(sources) // 20) :]) if len(sources) > 1 else set()
            self.held_out = [c for c in clips if c.source.path in last]
        held_out = set(self.held_out)
        train = [c for c in clips if c not in held_out]
        self.kinds = [k for k in ([c for c in train if c.source.aist], [c for c in train if not c.source.aist]) if k]
        if not self.kinds:
            raise UserError("all clips have test music (Table 7): nothing is left to train on; add other videos")
        self.prompts = tensors.open_weights(prompts)
        self.keep = prompts.stat().st_size + sum(c.file.stat().st_size for c in clips) <= IN_MEMORY
        self.kept: dict[Path | str, tuple[Tensor, ...]] = {}

    def batch(self, n: int, generator: torch.Generator, part: slice = slice(None)) -> Batch:
        """n items drawn with the generator alone; of these `part` is returned (the whole batch is one draw for all)."""
        u = torch.rand(n, 5, generator=generator).tolist()
        no_music = torch.rand((), generator=generator).item() < self.music_dropout
        items = []
        for of_kind, of_clip, of_prompt, base, dropped in u:
            kind = self.kinds[int(of_kind * len(self.kinds))]
            clip = kind[int(of_clip * len(kind))]
            choices = clip.source.prompts()
            prompt = choices[int(of_prompt * len(choices))]
            prompt = clip.source.base_prompt() if base < self.base_prompt else prompt
            items.append((clip, None if dropped < self.caption_dropout else prompt))
        noise = torch.randn(n, *self.clip(items[0][0])[0].shape, generator=generator)  # of the posterior
        return self.collate(items[part], noise[part], not no_music)

    def held_out_batch(self, n: int) -> Batch | None:
        """The same at most n held-out clips each time, spread over all, first prompt, mean of the posterior."""
        n = min(n, len(self.held_out))
        clips = [self.held_out[i * len(self.held_out) // n] for i in range(n)]
        if not clips:
            return None
        return self.collate([(clip, clip.source.prompts()[0]) for clip in clips], None, True)

    def collate(self, items: list[tuple[Clip, str | None]], noise: Tensor | None, music: bool) -> Batch:
        """Read the encodings and put them together; a prompt None is zero features with the mask all False."""
        means, logvars, sounds = zip(*(self.clip(clip) for clip, _ in items))
        z_vae = torch.stack(means)
        if noise is not None:
            z_vae = z_vae + torch.stack(logvars).mul(0.5).exp() * noise
        texts = [self.text(prompt or clip.source.base_prompt()) for clip, prompt in items]
        text = texts[0].new_zeros(len(items), max(map(len, texts)), texts[0].shape[1])  # (B, L, E)
        mask = torch.zeros(text.shape[:2], dtype=torch.bool)
        for row, (features, (_, prompt)) in enumerate(zip(texts, items)):
            if prompt is not None:
                text[row, : len(features)] = features
                mask[row, : len(features)] = True
        names = [f"{clip.source.path.name}@{clip.start / FPS:.2f}s" for clip, _ in items]
        return Batch(mochi_vae.to_dit_space(z_vae), text, mask, torch.stack(sounds) if music else None, names)

    @property
    def audio_dim(self) -> int:
        """D, the width of the music tokens."""
        return self.clip(self.kinds[0][0])[2].shape[1]

    def clip(self, clip: Clip) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior mean and log-variance (C, T, H, W) of z_vae, music tokens (A, D), all float32."""
        if clip.file in self.kept:
            return self.kept[clip.file]
        w = tensors.open_weights(clip.file)
        encoding = tuple(w.read(name, dtype=torch.float32) for name in ("mean", "logvar", "audio"))
        if self.keep:
            self.kept[clip.file] = encoding
        return encoding

    def text(self, prompt: str) -> Tensor:
        """T5 features (L, E) of a prompt, float32."""
        return self.prompts.read(hash_of(prompt), dtype=torch.float32)


@dataclass(frozen=True)
class DataCommand(DataConfig):
    """Encode a folder of dance videos once, so that training only reads latents. Resumable; several may run at once."""

    look: bool = flag(False, help="only draw a few clips as the model will see them: look.png in the cache")
    caption_url: str | None = flag(
        None, help="vision server that first captions videos without a .txt (its key: CAPTION_API_KEY)"
    )
    caption_model: str = flag("Qwen/Qwen2.5-VL-7B-Instruct", help="name of the model on that server")


def main() -> None:
    cfg = from_cli(DataCommand)
    if cfg.caption_url:
        folders = [cfg.data, cfg.wild] if cfg.wild else [cfg.data]
        written, failed = caption_wild(folders, vision_server(cfg.caption_url, cfg.caption_model))
        print(f"{written} captions written, {len(failed)} failed")
        for path, why in failed:
            print(f"  {printable(path)}: {printable(why)}")
    if cfg.look:
        print(draw_clips(cfg))
    else:
        encode(cfg)


if __name__ == "__main__":
    run(main)
