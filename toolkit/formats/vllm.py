"""A LoRA folder that vLLM and SGLang serve beside a vision-language base, by the rules of vLLM's loader.

All tensors end in .lora_A.weight or .lora_B.weight, all layers have one rank and alpha = rank, nothing is trained in full, and only the
language model is adapted: vLLM leaves the tower and the projector as they are, whatever the folder holds.
"""

from __future__ import annotations

import torch
from peft import LoraConfig

from ..core.errors import UserError
from .write import Part, check_representable, peft_state

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank


def vllm_state(part: Part, language: str) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Tensors and config. language: the name of the language model among the model's modules.

    Raises:
        UserError: when the adapter changes anything that is not served.
    """
    check_representable(part, "peft")
    other = [name for name in part.folded if not name.startswith(f"{language}.")]
    if other:
        raise UserError(
            f"vLLM serves LoRA on the language model alone and would leave {other[0]} out without an error: use --format merged."
        )
    if any(change.changes_bias for change in part.folded.values()):
        raise UserError("vLLM serves no LoRA that changes biases: use --format merged.")
    state, _ = peft_state(part)
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".bias")}
    rank = max(tensor.shape[0] for name, tensor in state.items() if name.endswith(".lora_A.weight"))
    if rank > RANKS[-1]:
        raise UserError(f"vLLM serves ranks up to {RANKS[-1]}, and the adapter's is {rank}: use --format merged.")
    state = {name: pad_rank(tensor, rank, down=name.endswith(".lora_A.weight")) for name, tensor in state.items()}
    return state, LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(part.folded))


def pad_rank(tensor: torch.Tensor, rank: int, *, down: bool) -> torch.Tensor:
    """A factor, (r, in) or (out, r), with zeros up to this rank."""
    missing = rank - tensor.shape[0 if down else 1]
    if not missing:
        return tensor
    zeros = tensor.new_zeros((missing, tensor.shape[1]) if down else (tensor.shape[0], missing))
    return torch.cat([tensor, zeros], 0 if down else 1).contiguous()


def max_lora_rank(rank: int) -> int:
    """vLLM's --max-lora-rank for a rank."""
    return next(known for known in RANKS if known >= rank)
