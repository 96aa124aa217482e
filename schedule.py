"""Noise levels and learning rate as functions of a step.

Concept   two coordinates for one diffusion process. The transformer is a flow model: sigma in [0, 1],
          z = (1 - sigma) z0 + sigma eps, and it predicts the velocity z0 - eps. The paper writes its equations for a
          denoiser in EDM coordinates: s in [0, inf), x = z0 + s eps, D(x; s) estimates z0. `to_edm`, `to_flow` and
          `denoised` are the whole dictionary between the two; the ODE of Eq. (2) has the same solutions in both.
Paper     arXiv 2503.14505v2: Eq. (1)-(3) (coordinates), Eq. (5) and Sec. 4.2 (Beta-Uniform), Sec. 5.1 (learning rate).
Differs   the paper writes sigma for both noise levels; here `sigma` is the flow's and `s` is that of Eq. (1)-(4). The
          Beta distribution of Eq. (5) lives on [0, 1], so it is one of `sigma`.
"""

import math

import torch
from torch import Tensor


def to_edm(z: Tensor, sigma: float | Tensor) -> tuple[Tensor, float | Tensor]:
    """Flow -> EDM: x = z / (1 - sigma), s = sigma / (1 - sigma), for sigma in [0, 1). sigma broadcasts against z."""
    return z / (1 - sigma), sigma / (1 - sigma)


def to_flow(x: Tensor, s: float | Tensor) -> tuple[Tensor, float | Tensor]:
    """EDM -> flow: z = x / (1 + s), sigma = s / (1 + s), for s in [0, inf). s broadcasts against x."""
    return x / (1 + s), s / (1 + s)


def denoised(z: Tensor, sigma: float | Tensor, velocity: Tensor) -> Tensor:
    """D(x; s) of Eq. (1)-(3) from the flow's velocity: z + sigma v = z0, for v = z0 - eps."""
    return z + sigma * velocity


def linear_quadratic(num_steps: int, threshold: float = 0.025) -> list[float]:
    """Noise levels of the sampler: num_steps + 1 sigmas that fall from 1 to 0.

    With m = num_steps // 2, step i < m lies on the line 1 - threshold i / m; the rest lie on the parabola that goes on
    from the line at i = m with the same value and slope and ends at 0. One step is [1, 0].

    threshold  how far the linear half goes down, in (0, 0.5]: above that the parabola would not fall all the way
    """
    if num_steps < 1 or not 0 < threshold <= 0.5:
        raise ValueError(f"need num_steps >= 1 and 0 < threshold <= 0.5, got {num_steps} and {threshold}")
    if num_steps == 1:
        return [1.0, 0.0]
    m = num_steps // 2
    rest = num_steps - m
    slope = threshold / m
    curve = (1 - threshold - slope * rest) / rest**2
    linear = [1 - slope * i for i in range(m)]
    quadratic = [1 - threshold - slope * j - curve * j**2 for j in range(rest)]
    return [*linear, *quadratic, 0.0]


def beta_at(step: int, beta0: float = 3.0, half_life: float = 200) -> float:
    """Second parameter of the Beta(1, beta) noise-level distribution at a training step.

        beta(step) = 1 + (beta0 - 1) 2^(-step / half_life)                                     Sec. 4.2

    step       optimiser steps already taken, >= 0
    half_life  steps until half of the excess over 1 (uniform) is gone, > 0
    returns    beta0 at step 0, tends to 1: low noise first, then uniform
    """
    if beta0 < 1 or half_life <= 0:
        raise ValueError(f"need beta0 >= 1 and half_life > 0, got beta0={beta0}, half_life={half_life}")
    return 1 + (beta0 - 1) * 2 ** (-step / half_life)


def sample_sigma(n: int, beta: float, generator: torch.Generator) -> Tensor:
    """n training noise levels: (n,) in [0, 1), drawn from Beta(1, beta) on the generator's device.

    f(sigma) = (1 - sigma)^(beta - 1) / B(1, beta)                                         Eq. (5)
    F(sigma) = 1 - (1 - sigma)^beta = u   <=>   sigma = 1 - (1 - u)^(1 / beta)             inverse CDF
    """
    u = torch.rand(n, generator=generator, device=generator.device)
    return 1 - (1 - u) ** (1 / beta)


def lr_at(step: int, steps: int, lr: float, warmup: int) -> float:
    """Learning rate for the update after `step` finished ones, of `steps` in all: linear warm-up, then cosine to 0.

    The first update already uses lr / warmup, the update number `warmup` all of lr; a step count of `steps` gives 0.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
