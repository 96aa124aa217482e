"""A folder of weights: which file is which network, and whether they all fit together.

Concept   everything is read off file names and headers, so a folder of 60 GB is judged in a second and nothing is
          allocated. Two layouts: ours (dit, decoder, encoder, musicinfuser .safetensors; t5/ and wav2vec2/), and the
          snapshots of the Hugging Face hub as they come.
Paper     arXiv 2503.14505v2, Sec. 5.1: the published networks.
Command   python model.py --check DIR
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import audio
import mochi_vae
import t5
import tensors
from config import UserError
from mochi_dit import load_dit
from model import MusicInfuser, load_musicinfuser

BASE_PROMPT = "a professional dancer dancing in a studio with a white backdrop"
OFFICIAL = {"height": 480, "width": 848, "steps": 64, "cfg": 6.0, "prompt": BASE_PROMPT}
ADAPTER = Path("musicinfuser.safetensors")


@dataclass(frozen=True)
class Part:
    """One network of a weights folder: what it is called, its names in either layout, where it is published."""

    what: str
    names: tuple[str, ...]
    repository: str
    download: str  # what `hf download` is asked for
    into: str = ""  # folder below the weights folder

    def find(self, folder: Path) -> Path:
        """Its file or folder; UserError if there is none."""
        for name in self.names:
            if (folder / name).exists():
                return folder / name
        expected = " or ".join(str(folder / name) for name in self.names)
        raise UserError(f"{folder}: {self.what} missing; expected {expected}")


MOCHI, WAV2VEC2 = "genmo/mochi-1-preview", "facebook/wav2vec2-base-960h"
DIT = Part("video transformer", ("dit.safetensors", "transformer"), MOCHI, "dit.safetensors")
DECODER = Part("video decoder", ("decoder.safetensors", "vae"), MOCHI, "decoder.safetensors")
ENCODER = Part("video encoder", ("encoder.safetensors", "vae"), MOCHI, "encoder.safetensors")
SHARDS = '--include "text_encoder/model-*" "text_encoder/model.safetensors.index.json"'
TEXT = Part("text encoder", ("t5", "text_encoder"), MOCHI, SHARDS)
VOCABULARY = Part(
    "vocabulary of the text encoder", ("t5/spiece.model", "tokenizer/spiece.model"), MOCHI, "tokenizer/spiece.model"
)
MUSIC = Part("music encoder", ("wav2vec2", "wav2vec2.safetensors"), WAV2VEC2, "model.safetensors", "wav2vec2")
MUSICINFUSER = Part("adapter", (ADAPTER.name,), "susunghong/MusicInfuser", ADAPTER.name)


DIFFUSERS = {"patch_embed.proj.weight", "encoder.proj_in.weight", "decoder.conv_in.weight"}  # names that genmo has not


class Files(NamedTuple):
    """Where each network is that sampling needs."""

    text: Path
    vocabulary: Path
    music: Path | None
    dit: Path
    adapter: Path | None
    decoder: Path


def find_files(folder: Path, adapter: Path | None = ADAPTER) -> Files:
    """UserError that names the first network without a file. adapter: a file, sought in the folder first, or None."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of weights")
    if adapter is not None and not (folder / adapter).exists() and not adapter.exists():
        raise UserError(f"{folder / adapter}: no such adapter; give --adapter a file, or none for the bare prior")
    return Files(
        text=TEXT.find(folder),
        vocabulary=VOCABULARY.find(folder),
        music=adapter and MUSIC.find(folder),
        dit=DIT.find(folder),
        adapter=adapter and (folder / adapter if (folder / adapter).exists() else adapter),
        decoder=DECODER.find(folder),
    )


def check_networks(files: Files) -> MusicInfuser:
    """Read every header: UserError if a file is broken, or one network does not fit the next. Allocates nothing."""
    m = load_musicinfuser(files.dit, files.adapter, device="meta")
    mochi_vae.load_decoder(files.decoder, "meta")
    made = m.dit.x_embedder.proj.in_channels
    if made != mochi_vae.LATENT:
        raise UserError(f"{files.dit}: makes latents of {made} channels, but {files.decoder} reads {mochi_vae.LATENT}")
    embed = t5.load_t5(files.text, "meta").embed
    made, read = embed.embedding_dim, m.dit.t5_yproj.in_features
    if made != read:
        raise UserError(f"{files.text}: makes features of width {made}, but {files.dit} reads {read}")
    made, read = t5.Tokenizer(files.vocabulary).vocab_size, embed.num_embeddings
    if made > read:
        raise UserError(f"{files.vocabulary}: makes {made} different ids, but {files.text} knows {read}")
    if m.adapters:
        made = audio.load_wav2vec2(files.music, device="meta").encoder.layer_norm.weight.shape[0]
        read = m.adapters.audio_projection.projection[0].in_features
        if made != read:
            raise UserError(f"{files.music}: makes features of width {made}, but {files.adapter} reads {read}")
    return m


def made_for(dit: Path) -> dict:
    """What the weights were made for: `default_*` in the header of the transformer, else the official values."""
    header = tensors.open_weights(dit).metadata
    try:
        return {key: type(value)(header.get(f"default_{key}", value)) for key, value in OFFICIAL.items()}
    except ValueError as error:
        raise UserError(f"{dit}: a default_... entry of its header is not a number ({error})") from error


# ------------------------------------------------------------------------------------------------------- the table


def check(folder: Path) -> None:
    """Print what is in the folder and what is missing; UserError if music cannot become a video with it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of weights")
    loaders = {
        DIT: lambda path: load_dit(path, "meta"),
        MUSICINFUSER: lambda path: load_musicinfuser(DIT.find(folder), path, device="meta"),
        MUSIC: lambda path: audio.load_wav2vec2(path, device="meta"),
        TEXT: lambda path: t5.load_t5(path, "meta"),
        VOCABULARY: t5.Tokenizer,
        DECODER: lambda path: mochi_vae.load_decoder(path, "meta"),
        ENCODER: lambda path: mochi_vae.load_encoder(path, "meta"),
    }
    print(f"{'network':<31}{'file':<26}{'layout':<11}{'tensors':>8}{'parameters':>16}  {'type':<18}{'size':>9}")
    wrong, missing = [], []
    for part, load in loaders.items():
        try:
            path = part.find(folder)
        except UserError:
            missing.append(part)
            print(f"{part.what:<31}missing" + "  (only training needs it)" * (part is ENCODER))
            continue
        try:
            print(f"{part.what:<31}{row(path, part, load)}")
        except UserError as error:
            wrong.append(str(error))
            print(f"{part.what:<31}{path.name:<26}does not fit: {error}")
    if not wrong and not [part for part in missing if part is not ENCODER]:
        try:
            m = check_networks(find_files(folder))
            print(f"\nIt all fits together. Music is heard after the blocks {', '.join(map(str, m.layers))}.")
        except UserError as error:
            wrong.append(str(error))
            print(f"\ndoes not fit together: {error}")
    for part in missing:
        print(f"\n{part.what}:\n  {command(part, folder)}")
    needed = [part.what for part in missing if part is not ENCODER]
    if wrong or needed:
        told = [f"missing: {', '.join(needed)}"] * bool(needed) + [f"{len(wrong)} do not fit"] * bool(wrong)
        raise UserError(f"{folder}: cannot be used as it is; {'; '.join(told)}")


def row(path: Path, part: Part, load: Callable) -> str:
    """File, layout, count, types and size of a network that loads; UserError if it does not."""
    loaded = load(path)
    if part is VOCABULARY:
        return f"{path.name:<26}{'':<11}{loaded.vocab_size:>8} ids{'':<32}{size(path.stat().st_size)}"
    w = tensors.open_weights(path)
    diffusers, half = bool(DIFFUSERS & w.shapes.keys()), ""
    if diffusers and part is not DIT:  # one file for both halves of the VAE
        half = "decoder." if part is DECODER else "encoder."
    layout = ("diffusers" if diffusers else "genmo") if part in (DIT, DECODER, ENCODER) else ""
    names = [name for name in w.shapes if name.startswith(half)]
    count = sum(math.prod(w.shapes[name]) for name in names)
    types = ", ".join(sorted({str(w.dtypes[name]).removeprefix("torch.") for name in names}))
    on_disk = sum(file.stat().st_size for file in w.files)
    return f"{path.name:<26}{layout:<11}{len(names):>8}{count:>16,}  {types:<18}{size(on_disk)}"


def size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:6.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:6.1f} MB"


def command(part: Part, folder: Path) -> str:
    """The command that downloads it."""
    return f"hf download {part.repository} {part.download} --local-dir {folder / part.into}"
