"""Adapters that each act on tokens of their own, all in one pass of the denoiser.

An adapted layer computes y = W x + b + sum_i m_i * change_i(x): m_i (one number a token) is 1 on the image tokens of subject i's place
and on the tokens of its own words, and 0 on those of others. Words of several subjects stand one behind the other before the denoiser,
each encoded by itself; attention of a place's image tokens to the words of others is held back, and the other way round (after
FreeFuse, Liu et al. 2025, arXiv 2510.23515, which takes one prompt for all).

Which tokens a layer sees follows from the length of its input. A layer for which it does not is refused by its name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..toolkit.adapters.attach import adapter_layers, disable_adapters
from ..toolkit.adapters.fold import fold
from ..toolkit.core.change import (
    CONVOLUTIONS,
    Change,
    add_projection,
    apply_change,
    apply_weight,
    concat_present,
)
from ..toolkit.core.errors import UserError
from ..toolkit.diffusion.model import DiffusionModel

READS_WORDS = re.compile(r"add_[qkv]_proj|to_add_out|context|txt_|text_|caption|cap_embedder")
"""Names of layers that see words alone, in transformers whose attention is over words and image."""
READS_WORDS_ACROSS = re.compile(r"attn2\.(to_k|to_v)$|caption|encoder_hid_proj")
"""The same, in denoisers with cross-attention."""
HELD_BACK = 1e-6
"""What is left of attention that is held back, before the softmax."""


@dataclass(frozen=True)
class Words:
    """Encoded words of all subjects, as one row of a batch has them."""

    states: torch.Tensor
    """(L, ...), as the denoiser is given them."""
    owners: torch.Tensor
    """(L,): the subject whose words, or filling, each token is of."""
    read: int
    """How many of them are no filling."""
    wanted: bool
    """Whether it is the prompt, and not what is steered away from."""


@dataclass
class Tokens:
    """The tokens of one call of the denoiser, (image i of the batch, row r of the call) -> what belongs to which subject."""

    places_BCHW: torch.Tensor
    """Share of each of the C subjects in each image token."""
    words: list[Words]
    """Of each row."""
    words_first: bool | None
    """Whether words stand before the image in one sequence, or behind it; None: they are in no sequence with it."""
    multiple: int = 1
    """Words and image are each filled up to a multiple of this."""
    length: int = 0
    """Of the words, as they are given."""
    sight: bool = True
    """Whether image tokens of a place may attend to those of other places."""
    cache: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Places become those of each row; levels: the resolutions that a UNet works at."""
        rows = torch.arange(len(self.words)) % len(self.places_BCHW)
        self.places_BCHW = self.places_BCHW[rows.to(self.places_BCHW.device)]
        height, width = self.places_BCHW.shape[2:]
        self.levels = {height * width: (height, width)}
        while self.words_first is None and max(height, width) > 1:
            height, width = (height + 1) // 2, (width + 1) // 2
            self.levels.setdefault(height * width, (height, width))

    def kind(self, name: str, length: int) -> str | None:
        """'words', 'image' or 'both': what a layer of this name sees whose input has so many tokens; None where it cannot be told."""
        reads_words = (READS_WORDS_ACROSS if self.words_first is None else READS_WORDS).search(name)
        if reads_words:
            return "words" if length in (self.length, self.filled(self.length)) else None
        if length in self.levels or (self.words_first is not None and length == self.filled(self.grid)):
            return "image"
        return "both" if self.words_first is not None and self.start(length) is not None else None

    @property
    def grid(self) -> int:
        """Image tokens at the finest resolution."""
        return self.places_BCHW.shape[2] * self.places_BCHW.shape[3]

    def filled(self, length: int) -> int:
        """A length as it is filled up."""
        return -(-length // self.multiple) * self.multiple

    def start(self, length: int) -> list[int] | None:
        """Where, in each row of a sequence of words and image, what is second begins; None where the length is no such sequence's."""
        rows = [words.read for words in self.words]
        if not self.words_first:
            fits = length == self.filled(self.grid) + self.filled(self.length)
            return [self.filled(self.grid)] * len(rows) if fits else None
        if length == self.grid + self.length:
            return [self.length] * len(rows)
        return rows if length == self.grid + max(rows) else None  # the image follows the words that are there

    def lay_out(
        self, kind: str, length: int, image: torch.Tensor, words: Sequence[torch.Tensor], fill: torch.Tensor
    ) -> torch.Tensor:
        """Rows (B, length, D) of a sequence. image: (B, N, D); words: (L, D) of each row; fill: (B, 2, D), behind image and words."""
        rows, starts = [], self.start(length) if kind == "both" else None
        for number, (seen, said) in enumerate(zip(image, words, strict=True)):
            behind_image, behind_words = fill[number]
            row = behind_words.repeat(length, 1)
            if kind == "image":
                row[:] = behind_image
                row[: len(seen)] = seen
            elif kind == "words":
                row[: len(said)] = said[:length]
            elif self.words_first:
                row[: min(len(said), length)] = said[:length]
                row[starts[number] : starts[number] + len(seen)] = seen  # type: ignore[index]
            else:
                row[: starts[number]] = behind_image  # type: ignore[index]
                row[: len(seen)] = seen
                row[starts[number] : starts[number] + len(said)] = said  # type: ignore[index]
            rows.append(row)
        return torch.stack(rows)

    def image_at(self, length: int) -> torch.Tensor:
        """Places (B, N, C) at the resolution with so many tokens."""
        size = self.levels.get(length, self.places_BCHW.shape[2:])
        return F.adaptive_avg_pool2d(self.places_BCHW, size).flatten(2).transpose(1, 2)

    def weights(self, kind: str, length: int) -> torch.Tensor:
        """How far each adapter acts on each token, (B, length, C); filling has the mean of what it is behind."""
        if (kind, length) not in self.cache:
            image = self.image_at(length)
            said = [F.one_hot(words.owners, image.shape[2]).to(image) for words in self.words]
            fill = torch.stack((image.mean(1), torch.stack([row.mean(0) for row in said])), 1)
            self.cache[kind, length] = self.lay_out(kind, length, image, said, fill)
        return self.cache[kind, length]

    def parties(self, kind: str, length: int) -> torch.Tensor:
        """Who may attend to whom, (B, length, C + 1): as far as the dot product of two.

        The last is 1 for filling, and for image tokens that are in sight of each other.
        """
        if ("parties", kind, length) not in self.cache:
            image = self.image_at(length)
            most = image.amax(2, keepdim=True)
            image = torch.where(most > 0, image / most, 1.0)  # what is nobody's place attends to all words
            image = F.pad(image, (0, 1), value=float(self.sight))
            said = [F.pad(F.one_hot(words.owners, image.shape[2] - 1).to(image), (0, 1)) for words in self.words]
            fill = image.new_ones(len(image), 2, image.shape[2])
            self.cache["parties", kind, length] = self.lay_out(kind, length, image, said, fill)
        return self.cache["parties", kind, length]

    def numbers(self, kind: str, length: int) -> torch.Tensor:
        """What each token of a sequence is, (B, length): image token 0, 1, ...; word -2, -3, ...; filling -1."""
        if ("numbers", kind, length) not in self.cache:
            count = self.image_at(length).shape[1]
            image = torch.arange(count)[None, :, None].expand(len(self.words), -1, -1)
            words = [-2 - torch.arange(len(words.owners))[:, None] for words in self.words]
            fill = torch.full((len(image), 2, 1), -1)
            self.cache["numbers", kind, length] = self.lay_out(kind, length, image, words, fill)[..., 0]
        return self.cache["numbers", kind, length]

    def bias(self, asking: tuple[str, int], asked: tuple[str, int], dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to attention logits, (B, 1, Q, K); None where nothing is held back."""
        key = ("bias", asking, asked, dtype)
        if key not in self.cache:
            asks = self.parties(*asking)
            if not self.sight:  # filling sees no image, or it would tell one place of another
                own = F.one_hot(torch.tensor(asks.shape[2] - 1), asks.shape[2]).to(asks)
                asks = torch.where((self.numbers(*asking) == -1).to(asks.device)[..., None], own, asks)
            allowed = asks @ self.parties(*asked).transpose(1, 2)
            held = bool((allowed < 1 - 1e-6).any())
            self.cache[key] = allowed.clamp(HELD_BACK, 1).log()[:, None].to(dtype) if held else None
        return self.cache[key]


class MaskedDenoiser:
    """A denoiser at work under token masks: finds the tokens of each call, and weighs adapters and attention by them."""

    def __init__(self, denoiser: nn.Module, family: type[DiffusionModel], places_BCHW: torch.Tensor) -> None:
        self.family, self.places_BCHW = family, places_BCHW
        self.signature = inspect.signature(type(denoiser).forward)
        self.known: list[Words] = []
        self.tokens: Tokens | None = None
        self.calls: dict[Any, Tokens] = {}
        self.attention = ""
        self.holds_attention = False

    def before(self, denoiser: nn.Module, args: Any, kwargs: Any) -> None:
        """Hook: what the denoiser is called with -> its tokens.

        Raises:
            UserError: for words that are not known, too many of them, or an attention that cannot be held back.
        """
        if self.calls and not self.holds_attention and self.places_BCHW.shape[1] > 1:
            raise UserError(
                f"{self.family.title}: attention between subjects cannot be held back, since no attention to words came by PyTorch's "
                "scaled_dot_product_attention: leave DIFFUSERS_ATTN_BACKEND unset, or take one adapter."
            )
        said = self.signature.bind(denoiser, *args, **kwargs).arguments[self.family.words_argument]
        rows = [self.recognise(row) for row in said]
        key = (*rows, max(len(row) for row in said))
        if key not in self.calls:
            words = [self.known[number] for number in rows]
            self.check_length(denoiser, max(one.read for one in words), words)
            order, multiple = self.family.words_first, self.family.token_multiple
            self.calls[key] = Tokens(self.places_BCHW, words, order, multiple, length=key[-1])
        self.tokens = self.calls[key]

    def check_length(self, denoiser: Any, length: int, words: Sequence[Words]) -> None:
        """Raises UserError for more words than the denoiser has positions for."""
        most = (getattr(denoiser.config, "axes_lens", None) or (length + 1,))[0]
        if length >= most:
            subjects = int(words[0].owners.max()) + 1
            raise UserError(
                f"The words of {subjects} subjects are {length} tokens together, and {self.family.title} has positions for {most - 1}: "
                "take a shorter --prompt, or fewer subjects."
            )

    def recognise(self, row: torch.Tensor) -> int:
        """Which of the known words a row of states (L, ...) is.

        Raises:
            UserError: for none of them.
        """
        for number, words in enumerate(self.known):
            length = len(words.states)
            if len(row) >= length and torch.equal(row[:length], words.states.to(row)):
                return number
        raise UserError(
            f"{self.family.title}: the words before the denoiser are others than were encoded, so subjects cannot be kept apart: "
            "take --regions, or one adapter."
        )

    def after(self, *_: Any) -> None:
        """Hook: attention and layers are left alone again."""
        self.tokens = None

    def alone(self, tokens: Tokens, subject: int | None = None) -> Tokens:
        """A call's tokens as if the whole image were one subject's place; for None, with every place out of sight of the others."""
        if ("alone", subject) not in tokens.cache:
            places, here = tokens.places_BCHW, subject is None
            if subject is not None:
                places = (
                    F.one_hot(torch.tensor(subject), places.shape[1]).to(places)[None, :, None, None].expand_as(places)
                )
            tokens.cache["alone", subject] = Tokens(
                places, tokens.words, tokens.words_first, tokens.multiple, tokens.length, sight=not here
            )
        return tokens.cache["alone", subject]

    def weights(self, name: str, base: nn.Module, x: torch.Tensor, y: torch.Tensor, source: str) -> torch.Tensor:
        """How far each adapter acts in a layer with input x (..., in) and outcome y (..., out): (..., C); for maps (B, C, H, W).

        Raises:
            UserError: for a layer whose tokens cannot be told.
        """
        tokens = self.tokens
        if tokens is not None and isinstance(base, CONVOLUTIONS) and y.dim() == 4 and len(y) == len(tokens.words):
            return F.adaptive_avg_pool2d(tokens.places_BCHW, y.shape[2:])
        if tokens is not None and isinstance(base, nn.Linear) and x.dim() == 3:
            rows = len(tokens.words)
            if len(x) == rows and (kind := tokens.kind(name, x.shape[1])):
                return tokens.weights(kind, x.shape[1])
            if x.shape[1] == rows and (kind := tokens.kind(name, len(x))):
                return tokens.weights(kind, len(x)).transpose(0, 1)
            if len(x) == rows * tokens.length and tokens.kind(name, tokens.length) == "words":
                return tokens.weights("words", tokens.length).flatten(0, 1)[:, None]
        raise UserError(
            f"The adapter {source} changes {name}, of which it cannot be told which tokens it sees, so the adapter cannot be kept to its "
            "subject: take an adapter that changes other layers (--target-modules to_q to_k to_v to_out.0), or one adapter alone."
        )


class SubjectAttention(TorchFunctionMode):
    """Within it, attention of the denoiser is held back between subjects."""

    def __init__(self, masked: MaskedDenoiser) -> None:
        super().__init__()
        self.masked = masked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tokens = self.masked.tokens
        if func is not F.scaled_dot_product_attention or tokens is None:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        asking, asked = self.sides(tokens, given["query"].shape[-2], given["key"].shape[-2])
        if asking is None or asked is None:
            return func(*args, **kwargs)
        self.masked.holds_attention = True
        bias = tokens.bias(asking, asked, given["query"].dtype)
        if bias is not None:
            given["attn_mask"] = add_mask(bias, given.get("attn_mask"))
        return func(**given)

    def sides(self, tokens: Tokens, q: int, k: int) -> tuple[Any, Any]:
        """(kind, length) of what asks and what is asked in an attention of q to k tokens; None where nothing is to be held back."""
        name = self.masked.attention
        if tokens.words_first is None:
            across = name.endswith("attn2") and k == tokens.length and q in tokens.levels
            return (("image", q), ("words", k)) if across else (None, None)
        kind = tokens.kind(name, q) if q == k else None
        held = kind in ("words", "both") or (kind == "image" and not tokens.sight)
        return ((kind, q), (kind, k)) if held else (None, None)


def add_mask(bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A bias (B, 1, Q, K) and an attention's own mask, of a shape that goes with it, as one bias."""
    if mask is None:
        return bias
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask.to(bias.dtype)


@dataclass
class MaskedLayer:
    """The changes of all adapters to one layer."""

    name: str
    base: nn.Module
    changes: list[tuple[int, Change]]
    """(subject, change)."""
    sources: Sequence[str]
    masked: MaskedDenoiser

    def __post_init__(self) -> None:
        """Low-rank parts lie side by side, so that all adapters cost one product; which subject each row is of is in `owners`."""
        low = [(i, c) for i, c in self.changes if c.down is not None and c.up is not None]
        self.down = concat_present([c.down for _, c in low], 0)
        self.up = concat_present([c.up for _, c in low], 1)
        self.owners = torch.tensor([i for i, c in low for _ in range(len(c.down))])  # type: ignore[arg-type]
        rest = [
            (i, Change(rows=c.rows, mask_up=c.mask_up, mask_down=c.mask_down, dense=c.dense, bias=c.bias))
            for i, c in self.changes
        ]
        self.rest = [(i, c) for i, c in rest if not c.is_zero]

    def __call__(self, base: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
        """Hook: the base layer's output (..., out) -> that under all changes, each on its own tokens."""
        x, out = args[0], y
        channels = 1 if isinstance(base, CONVOLUTIONS) else -1
        if self.down is not None and self.up is not None:
            self.down, self.up = self.down.to(x.device, x.dtype), self.up.to(x.device, x.dtype)
            code = apply_weight(base, x, self.down)
            out = add_projection(base, out, code * self.code_weights(base, x, y, channels), self.up)
        for subject, change in self.rest:
            moved = Change(**{key: t if t is None else t.to(x.device, x.dtype) for key, t in vars(change).items()})
            changed = apply_change(base, moved, x, y, lambda: base.weight.flatten(1))
            weights = self.masked.weights(self.name, base, x, y, self.sources[subject]).to(x.dtype)
            out = out + weights.narrow(channels, subject, 1) * (changed - y)
        return out

    def code_weights(self, base: nn.Module, x: torch.Tensor, y: torch.Tensor, channels: int) -> torch.Tensor:
        """How far each row of the joint `down` acts on each token of x (..., in), outcome y (..., out): (..., r), or (B, r, H, W).

        The same in every step, so it is kept with the tokens.
        """
        kept = {} if self.masked.tokens is None else self.masked.tokens.cache
        key = (id(self), x.shape, x.dtype)
        if key not in kept:
            weights = self.masked.weights(self.name, base, x, y, self.sources[self.changes[0][0]]).to(x.dtype)
            kept[key] = weights.index_select(channels, self.owners.to(x.device))
        return kept[key]


def masked_layers(
    denoiser: nn.Module,
    adapters: Sequence[str],
    strengths: Sequence[float],
    sources: Sequence[str],
    masked: MaskedDenoiser,
) -> list[MaskedLayer]:
    """The adapted layers of a denoiser. adapters: names on it, one for each subject; sources: what messages call them.

    Raises:
        UserError: for an adapter that is not linear, or one that changes nothing.
    """
    changes: dict[str, list[tuple[int, Change]]] = {}
    here = getattr(denoiser, "peft_config", {})
    for subject, (adapter, strength, source) in enumerate(zip(adapters, strengths, sources, strict=True)):
        try:
            folded = fold(denoiser, adapter) if adapter in here else {}
        except UserError as error:
            raise UserError(f"The adapter {source} cannot be kept to a subject: {error}") from error
        if all(change.is_zero for change in folded.values()):
            raise UserError(
                f"The adapter {source} changes no layer of the denoiser, so it shows no subject: leave it out, or take another."
            )
        for name, change in folded.items():
            changes.setdefault(name, []).append((subject, change.scale(strength)))
    layers = adapter_layers(denoiser)
    return [
        MaskedLayer(name.removesuffix(".base_layer"), layers[name].get_base_layer(), found, sources, masked)  # type: ignore[arg-type]
        for name, found in changes.items()
    ]


@contextmanager
def token_masks(
    denoiser: nn.Module,
    family: type[DiffusionModel],
    places_BCHW: torch.Tensor,
    *,
    adapters: Sequence[str],
    strengths: Sequence[float],
    sources: Sequence[str],
) -> Iterator[MaskedDenoiser]:
    """Within the block each adapter that the denoiser carries acts on its own subject's tokens; `SubjectAttention` holds back the rest.

    places_BCHW: share of each subject in each image token, for each image of a batch. The words have to be made known (`known`) before
    the denoiser is called.

    Raises:
        UserError: as `masked_layers` does, and while the denoiser works for a layer whose tokens cannot be told.
    """
    masked = MaskedDenoiser(denoiser, family, places_BCHW)
    layers = masked_layers(denoiser, adapters, strengths, sources, masked)
    hooks: list[Any] = [layer.base.register_forward_hook(layer) for layer in layers]
    hooks += [
        denoiser.register_forward_pre_hook(masked.before, with_kwargs=True),
        denoiser.register_forward_hook(masked.after, always_call=True),
    ]
    for name, module in denoiser.named_modules():
        if hasattr(module, "processor"):

            def entering(module: nn.Module, args: Any, name: str = name) -> None:
                masked.attention = name

            hooks.append(module.register_forward_pre_hook(entering))
    try:
        with disable_adapters(denoiser):
            yield masked
    finally:
        for hook in hooks:
            hook.remove()
