"""VBench's two scores of the picture, without a judge: imaging quality and aesthetic quality, each frame by itself.

Concept   imaging quality    is it sharp, clean and well exposed? MUSIQ, a transformer over patches of the picture at
                             three sizes, trained on photographs of phones that people had rated (SPAQ)
          aesthetic quality  would people like it? CLIP's feature of the picture, times LAION's linear head, which was
                             fitted to ratings
          A video's score is the mean of its frames', in about [0, 1].
Paper     arXiv 2503.14505v2, Sec. 4.1, App. G: layers are chosen by imaging quality, Fig. 15 shows both. The scores are
          those of VBench (Huang et al. 2024).
Differs   weights are read from safetensors files only, where pyiqa and VBench unpickle; CLIP runs in float32 (VBench on
          CUDA: float16). The networks are those of the packages pyiqa and open_clip, imported when asked for.

Dimension key   F frames   H W picture   D width of CLIP's feature, 768
"""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import media
import tensors
from config import UserError
from questions import Clip

MUSIQ = "musiq_spaq.safetensors"
CLIP = "open_clip_model.safetensors"
HEADS = {  # file: what precedes the names of its two tensors
    "sa_0_4_vit_l_14_linear.safetensors": "",
    "model.safetensors": "predictor.",
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
AT_ONCE = 16  # frames


def imaging_input(frames: Tensor) -> Tensor:
    """(F, 3, H, W) in 0 ... 255 -> in [0, 1], no side above 512: VBench shrinks bilinearly, sides rounded down."""
    high, wide = frames.shape[2:]
    if max(high, wide) > 512:
        scale = 512.0 / max(high, wide)
        frames = F.interpolate(frames, size=(int(scale * high), int(scale * wide)), mode="bilinear")
    return frames / 255


def aesthetic_input(frames: Tensor) -> Tensor:
    """(F, 3, H, W) in 0 ... 255 -> (F, 3, 224, 224): shorter side to 224 (bicubic), the middle, CLIP's scale."""
    high, wide = frames.shape[2:]
    size = (224, int(224 * wide / high)) if high <= wide else (int(224 * high / wide), 224)
    frames = F.interpolate(frames, size=size, mode="bicubic", antialias=True)
    top, left = (round((side - 224) / 2) for side in size)
    frames = frames[:, :, top : top + 224, left : left + 224] / 255
    mean, std = (torch.tensor(x, device=frames.device).view(1, 3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    return (frames - mean) / std


def load_imaging(folder: Path, device: str | torch.device) -> Callable[[Tensor], Tensor]:
    """MUSIQ -> a function of frames (F, 3, H, W) in 0 ... 255 that gives (F,) scores: network / 100."""
    pyiqa = _package("pyiqa", "pyiqa")
    weights = tensors.open_weights(folder / MUSIQ)
    network = pyiqa.create_metric("musiq-spaq", device=torch.device(device), pretrained=False).net
    tensors.load(network, weights, device)
    return lambda frames: network(imaging_input(frames)).flatten() / 100


def load_aesthetic(folder: Path, device: str | torch.device) -> Callable[[Tensor], Tensor]:
    """CLIP ViT-L/14 and the linear head -> a function of frames (F, 3, H, W) in 0 ... 255 that gives (F,) scores.

    score = (w . f / |f| + b) / 10    with f the feature (D,) of the picture
    """
    open_clip = _package("open_clip", "open_clip_torch")
    head = load_head(folder).to(device)
    weights = tensors.open_weights(folder / CLIP)
    logging.disable(logging.WARNING)  # it warns of random weights, which these are until the next lines
    try:
        eye = open_clip.create_model("ViT-L-14-quickgelu", pretrained=None, device="cpu").visual.to(device)
    finally:
        logging.disable(logging.NOTSET)
    own = {name: ([f"visual.{name}"], lambda tensor: tensor) for name in eye.state_dict()}
    words = [name for name in weights.shapes if not name.startswith("visual.")]  # the half that reads text
    tensors.load(eye, weights, device, sources=own, ignore=words)
    return lambda frames: head(F.normalize(eye(aesthetic_input(frames)), dim=-1)).flatten() / 10


def load_head(folder: Path) -> nn.Linear:
    """LAION's linear head (D -> 1), by itself or out of a file that also holds a CLIP."""
    for name, before in HEADS.items():
        if (folder / name).exists():
            weights = tensors.open_weights(folder / name)
            with torch.device("meta"):
                head = nn.Linear(768, 1)
            own = {leaf: ([before + leaf], lambda tensor: tensor) for leaf in ("weight", "bias")}
            rest = [n for n in weights.shapes if before and not n.startswith(before)]
            return tensors.load(head, weights, sources=own, ignore=rest)
    raise UserError(f"{folder / next(iter(HEADS))}: no such file, nor {list(HEADS)[1]} beside it")


def _package(name: str, on_pypi: str):
    try:
        return __import__(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision made for another torch
        why = "which is not installed" if getattr(error, "name", None) == name else f"which fails to import ({error})"
        raise UserError(f"needs the package {name}, {why}: pip install {on_pypi}") from error


SCORES = {"vbench_imaging": load_imaging, "vbench_aesthetic": load_aesthetic}


def load(folder: Path, device: str | torch.device) -> tuple[dict[str, Callable], dict[str, str]]:
    """(the scores whose package and weights are here, what is amiss with the others).

    raises   UserError if there is neither
    """
    found, lacking = {}, {}
    for name, load_one in SCORES.items():
        try:
            found[name] = load_one(folder, device)
        except UserError as error:
            lacking[name] = str(error)
    if not found:
        told = "; ".join(f"{name}: {why}" for name, why in lacking.items())
        raise UserError(f'--metrics vbench: {told} (README, "VBench\'s scores")')
    return found, lacking


@torch.no_grad()
def score(network: Callable[[Tensor], Tensor], frames: np.ndarray, device: str | torch.device = "cpu") -> float:
    """Mean over the frames (F, H, W, 3) uint8 of what a loaded network gives them."""
    parts = (torch.from_numpy(frames[i : i + AT_ONCE]) for i in range(0, len(frames), AT_ONCE))
    return float(torch.cat([network(part.to(device).permute(0, 3, 1, 2).float()) for part in parts]).mean())


def judge_folder(folder: Path, clips: list[Clip], gaps: dict) -> dict:
    """Both scores of every clip: what vbench.json holds. A video that cannot be read becomes one of the `gaps`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    networks, lacking = load(folder, device)
    for name, why in lacking.items():
        print(f"left out   {name}: {why}")
    scores = {}
    for clip in tqdm(clips, "VBench", unit="video"):
        try:
            frames = media.read_video(clip.path)
        except UserError as error:
            gaps[clip.name] = str(error)
            continue
        scores[clip.name] = {name: score(network, frames, device) for name, network in networks.items()}
    for name in networks:
        if scores:
            print(f"{name:<17} {np.mean([row[name] for row in scores.values()]):.4f} over {len(scores)} videos")
    return {"judge": ", ".join(networks), "scores": scores, "left_out": lacking}
