"""Reads view, kind of dancer and number of dancers off a video of the toy world: a small network fitted on the spot.

Concept   these three have no closed form, but true clips with known answers can be drawn without end. A few small
          frames of each (toy_read.glance) go through three convolutions; seconds suffice. It never sees a generated
          video, and its accuracy on true clips that it did not see is reported as the ceiling.
Paper     stands in for the video LLM that judges what a video shows (arXiv 2503.14505v2, Sec. 5.1).

Dimension key   B batch   H W glance
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toy
from data_names import CAMERAS
from toy_dance import FIGURES, Clip
from toy_draw import SETTINGS, WHITE_STUDIO
from toy_read import GLANCE, GLANCES_S

ANSWERS = {"dancers": (1, 2, 3), "figure": FIGURES, "view": tuple(CAMERAS)}  # question -> what it may be


def draw(index: int) -> tuple[np.ndarray, dict]:
    """Example number `index`: its glance (4, GLANCE, GLANCE, 3) uint8 and the true answers."""
    clip = any_clip(np.random.default_rng([404, index]))
    return render_glance(clip), truth(clip)


def any_clip(rng: np.random.Generator) -> Clip:
    """A clip whose views, places and numbers of dancers come about evenly: unlike the world's, where some are rare."""
    clip = toy.sample_clip(rng, wild=rng.random() < 0.5)
    count = int(rng.choice([1, 2, 3], p=[0.6, 0.2, 0.2]))
    figures = tuple(str(f) for f in rng.choice(FIGURES, count))
    setting = WHITE_STUDIO if rng.random() < 0.3 else str(rng.choice(SETTINGS))
    shirt, trousers = rng.choice(toy.visible_colours(setting), 2, replace=False)
    situation = "GR" if count > 1 else "FM" if clip.situation == "GR" else clip.situation
    return dataclasses.replace(
        clip, figures=figures, camera=int(rng.integers(1, 11)), setting=setting, shirt=str(shirt),
        trousers=str(trousers), situation=situation,
    )  # fmt: skip


def render_glance(clip: Clip) -> np.ndarray:
    return toy.render(clip, len(GLANCES_S), GLANCE, fps=1 / GLANCES_S[1])


def truth(clip: Clip) -> dict:
    """The right answers for a clip; the figure is that of the first dancer."""
    return {"dancers": len(clip.figures), "figure": clip.figures[0], "view": clip.camera}


class Reader(nn.Module):
    """glance (B, 4, GLANCE, GLANCE, 3) uint8 -> the scores of each question's answers, (B, answers) each."""

    def __init__(self):
        super().__init__()
        layers, width = [], 3 * len(GLANCES_S)
        for wide in (32, 64, 96):
            layers += [nn.Conv2d(width, wide, 5 if wide == 32 else 3, stride=2, padding=1), nn.GroupNorm(8, wide)]
            layers.append(nn.ReLU())
            width = wide
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(192), nn.ReLU(), nn.Dropout(0.2))
        self.heads = nn.ModuleDict({question: nn.Linear(192, len(answers)) for question, answers in ANSWERS.items()})

    def forward(self, glance: Tensor) -> dict[str, Tensor]:
        x = glance.permute(0, 1, 4, 2, 3).flatten(1, 2).float() / 127.5 - 1  # (B, 12, GLANCE, GLANCE)
        return self.scores(x)

    def scores(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {question: head(x) for question, head in self.heads.items()}

    @torch.no_grad()
    def read(self, glances: list[np.ndarray]) -> list[dict]:
        """The likeliest answers for each glance."""
        device = self.heads["view"].weight.device
        scores = self(torch.from_numpy(np.stack(glances)).to(device))
        best = {question: value.argmax(1).tolist() for question, value in scores.items()}
        return [{question: ANSWERS[question][best[question][i]] for question in ANSWERS} for i in range(len(glances))]


def fit(examples: list[tuple[np.ndarray, dict]], device="cpu", epochs: int = 20, seed: int = 0) -> Reader:
    """A reader fitted to the examples; noise and blur stand in for what the VAE and the sampler do to a picture."""
    with torch.random.fork_rng():  # dropout draws from the global generators
        torch.manual_seed(seed)
        return _fit(examples, device, epochs, torch.Generator().manual_seed(seed))


def _fit(examples: list[tuple[np.ndarray, dict]], device, epochs: int, generator: torch.Generator) -> Reader:
    reader, batch = Reader(), 64
    reader(torch.zeros(1, len(GLANCES_S), GLANCE, GLANCE, 3))  # sizes of the lazy layer
    reader.to(device)
    glances = torch.from_numpy(np.stack([glance for glance, _ in examples])).to(device)
    answers = {
        question: torch.tensor([allowed.index(true[question]) for _, true in examples], device=device)
        for question, allowed in ANSWERS.items()
    }
    steps = epochs * -(-len(examples) // batch)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=0.01)
    for step in range(steps):
        pick = torch.randint(len(examples), (batch,), generator=generator).to(device)
        x = glances[pick].permute(0, 1, 4, 2, 3).flatten(1, 2).float() / 127.5 - 1
        if step % 2:
            x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        x = x + 0.08 * torch.randn(x.shape, generator=generator).to(device)
        scores = reader.scores(x)
        loss = sum(F.cross_entropy(scores[question], answers[question][pick]) for question in ANSWERS)
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return reader.eval()


def accuracy(reader: Reader, examples: list[tuple[np.ndarray, dict]]) -> dict[str, float]:
    """Share of right answers to each question; the figure counts where one dancer is alone."""
    read = reader.read([glance for glance, _ in examples])
    share = {}
    for question in ANSWERS:
        asked = [i for i, (_, true) in enumerate(examples) if question != "figure" or true["dancers"] == 1]
        share[question] = float(np.mean([read[i][question] == examples[i][1][question] for i in asked]))
    return share
