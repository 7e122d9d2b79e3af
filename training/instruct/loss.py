"""The loss of answers: cross-entropy of the tokens that a vision-language model is to say."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...toolkit.adapters.auxiliary import auxiliary_losses
from ...toolkit.vlm.chat_tokens import IGNORE
from ...toolkit.vlm.packing import pack_rows


class AnswerLoss(nn.Module):
    """The model with the loss of what it is to answer as its forward, so that one module is all DDP has to wrap."""

    def __init__(self, model: nn.Module, *, packing: bool = False) -> None:
        """packing: rows end to end in one sequence, see `pack_rows`."""
        super().__init__()
        self.model, self.packing = model, packing

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        """Loss of each row, (B,): cross-entropy summed over its learned tokens, each times its own weight, times `weight`.

        Logits are made only where some row learns a token: most tokens are images and questions.
        """
        inputs = {key: value for key, value in batch.items() if key != "weight"}
        count = len(inputs["labels"])
        rows = torch.arange(count, device=inputs["labels"].device)[:, None]
        if self.packing:
            inputs, rows = pack_rows(self.model, inputs)
            rows = rows[None]
        labels, token_weights = inputs.pop("labels"), inputs.pop("token_weights", None)
        target = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # what each token is to say next
        places = (target != IGNORE).any(0).nonzero()[:, 0]
        with auxiliary_losses(inputs.get("attention_mask")) as auxiliary:
            logits = self.model(**inputs, logits_to_keep=places, use_cache=False).logits
        if logits.shape[1] == labels.shape[1]:  # of a class that makes all of them (MiniCPM-V's, in transformers 5.23)
            logits = logits[:, places]
        target, rows = target[:, places], rows.expand(*labels.shape)[:, places]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORE, reduction="none")
        if token_weights is not None:  # of the token that is said next, as the target is
            losses = losses * F.pad(token_weights[:, 1:], (0, 1))[:, places].flatten()
        sums = torch.zeros(count, device=losses.device).index_add(0, rows.flatten(), losses)
        return sums * batch["weight"] + auxiliary.total()
