"""Random weights at any size, drawn where they are used.

Paper     none.
"""

import torch


@torch.no_grad()
def fill(module: torch.nn.Module, device: torch.device, dtype: torch.dtype, keep_float32: tuple[str, ...]):
    """Random weights, drawn on the device: matrices keep the size of what they multiply, gains are near 1."""
    torch.manual_seed(0)
    for name, parameter in list(module.named_parameters()):
        kind = torch.float32 if keep_float32 and name.endswith(keep_float32) else dtype
        weight = torch.randn(parameter.shape, device=device, dtype=kind)
        if name == "pos_frequencies":
            weight *= 0.1
        elif "norm" in name:
            weight = 1 + 0.1 * weight
        elif weight.ndim > 1:
            weight *= weight[0].numel() ** -0.5
        else:
            weight *= 0.02
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(weight, requires_grad=False))
    return module.eval()


def lively(module: torch.nn.Module) -> torch.nn.Module:
    """A VAE half in which the residual branches, fresh at zero, matter."""
    for name, parameter in module.named_parameters():
        if name.endswith("stack.5.weight"):
            torch.nn.init.normal_(parameter, std=0.5 * parameter[0].numel() ** -0.5)
    return module.eval().requires_grad_(False)
