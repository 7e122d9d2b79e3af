"""A batch's rows end to end in one sequence: no padding is computed, and no row sees another.

Positions start again with each row, by which transformers knows (when there is neither a mask nor a cache) where a row ends.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

TOKEN_KEYS = ("input_ids", "labels", "token_weights", "token_type_ids", "mm_token_type_ids")  # one value per token


def pack_rows(model: Any, batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of rows padded to (B, L) -> the same as one row (1, T), and which row each token is of, (T,)."""
    real = batch["attention_mask"].bool()
    out = {key: value for key, value in batch.items() if key != "attention_mask"}
    out |= {key: batch[key][real][None] for key in TOKEN_KEYS if key in batch}
    places = (real.cumsum(1) - 1)[real][None]
    core = model.model
    if hasattr(
        core, "get_rope_index"
    ):  # images have places of their own there: (3, B, L), in front of them those in the text
        known = inspect.signature(core.get_rope_index).parameters
        theirs, _ = core.get_rope_index(**{key: value for key, value in batch.items() if key in known})
        places = torch.cat([places[None], theirs.to(places.device)[:, real][:, None]])
    for key in ("pixel_values", "pixel_attention_mask"):
        if "pixel_attention_mask" in batch:  # images lie in rows: (B, N, ...)
            out[key] = batch[key].flatten(0, 1)[None]
    rows = torch.arange(len(real), device=real.device)[:, None].expand_as(real)[real]
    return out | {"position_ids": places}, rows
