"""Several subjects in one image: each region is denoised with an adapter and a prompt of its own.

All regions share the latents, so each is drawn in sight of the others; what the denoiser predicts is mixed by soft masks in every
step (as in MultiDiffusion, Bar-Tal et al. 2023, arXiv 2302.08113). It costs one pass of the denoiser a region. For its own pass a
region is moved sideways to the middle (the image is closed to a ring), where a model puts a subject most readily: so prompts
speak of the middle, not of left and right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..toolkit.core.errors import UserError
from ..toolkit.formats import native
from .place import execution_device

Region = tuple[str, float, float, float, float]  # prompt; left, top, right, bottom as shares of the image
NAMED_REGIONS = {
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
    "top": (0.0, 0.0, 1.0, 0.5),
    "bottom": (0.0, 0.5, 1.0, 1.0),
}
EDGE_WIDTH = 1.0  # width of a region's edge, in latent pixels
MIN_SHARE = 1e-4  # share of every region everywhere, so that what none covers is a mixture of all


def parse_region(text: str) -> Region:
    """'left: a sks1 creature in the centre', or '0,0,0.5,1: ...' with left, top, right and bottom.

    Raises:
        UserError: for anything else.
    """
    where, colon, prompt = text.partition(":")
    try:
        edges = (
            NAMED_REGIONS[where.strip()]
            if where.strip() in NAMED_REGIONS
            else tuple(float(x) for x in where.split(","))
        )
        left, top, right, bottom = edges
        sound = bool(colon and prompt.strip()) and 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    except ValueError:
        sound = False
    if not sound:
        raise UserError(
            f"--regions '{text}': write 'left: PROMPT' (or right, top, bottom), or '0,0,0.5,1: PROMPT' with left, top, right "
            "and bottom as shares of the image."
        )
    return prompt.strip(), left, top, right, bottom


def denoises_by_region(pipeline: str) -> bool:
    """Whether a base of this stock pipeline's class takes a pass for each region, as this file has it; others take one for all."""
    return pipeline == "StableDiffusionPipeline"


def region_masks(regions: Sequence[Region], height: int, width: int) -> torch.Tensor:
    """Shares of each region in each latent pixel, (R, 1, height, width); they sum to 1."""

    def ramp(low: float, high: float, n: int) -> torch.Tensor:
        middle = torch.arange(n) + 0.5
        inside = torch.minimum(
            middle - low * n if low > 0 else torch.ones(n), high * n - middle if high < 1 else torch.ones(n)
        )
        return (inside / EDGE_WIDTH + 0.5).clamp(0, 1)

    parts = [ramp(top, bottom, height)[:, None] * ramp(left, right, width) for _, left, top, right, bottom in regions]
    shares = torch.stack(parts)[:, None] + MIN_SHARE
    return shares / shares.sum(0)


def region_states(
    pipe: Any, regions: Sequence[Region], strengths: Sequence[dict[str, float]], negative: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(prompt, negative) states (1, L, width) of each region, with its own adapter on the text encoder."""
    states = []
    for (prompt, *_), active in zip(regions, strengths, strict=True):
        native.set_strengths(pipe, active)
        states.append(pipe.encode_prompt(prompt, execution_device(pipe), 1, True, negative_prompt=negative))
    return states


@contextmanager
def denoise_by_region(
    pipe: Any,
    regions: Sequence[Region],
    strengths: Sequence[dict[str, float]],
    *,
    negative: str,
    guided: bool,
    size: tuple[int, int],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Within the block the pipeline's denoiser works by regions; gives (prompt, negative) states to call the pipeline with.

    strengths: the adapters of each region. guided: whether the pipeline also asks for the negative prompt. size: of the latents.
    """
    states = region_states(pipe, regions, strengths, negative)
    unet, shares = pipe.unet, region_masks(regions, *size).to(execution_device(pipe), pipe.unet.dtype)
    shifts = [round((0.5 - (left + right) / 2) * size[1]) for _, left, _, right, _ in regions]
    whole = unet.forward

    def forward(sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, **named: Any) -> Any:
        n, total = len(sample) // 2 if guided else len(sample), torch.zeros_like(sample)
        for share, active, (wanted, unwanted), shift in zip(shares, strengths, states, shifts, strict=True):
            native.set_strengths(pipe, active)
            prompt_embeds = wanted.expand(n, -1, -1)
            prompt_embeds = torch.cat((unwanted.expand(n, -1, -1), prompt_embeds)) if guided else prompt_embeds
            seen = sample.roll(shift, 3)
            pred = whole(seen, timestep, encoder_hidden_states=prompt_embeds, **(named | {"return_dict": False}))[0]
            total += share * pred.roll(-shift, 3)
        return (total,)

    hooked = "forward" in vars(unet)  # a part that comes only while it is at work has a forward of its own
    unet.forward = forward
    try:
        yield states[0]
    finally:
        del unet.forward
        if hooked:
            unet.forward = whole
        native.set_strengths(pipe, {name: s for active in strengths for name, s in active.items()})
