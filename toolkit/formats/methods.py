"""What an adapter's tensors make of a layer: its factors' product, times a magnitude where it has one (DoRA), for every method.

A method is a row of METHODS: which tensors it needs, its rank, and its product. Shapes are checked against the header before any tensor
is read, and against the layer before anything is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch

from ..core.change import Change
from ..core.errors import UserError
from ..core.finite import is_finite
from .tensor_file import NUMBERS, TensorInfo

Roles = dict[str, torch.Tensor]
EXTRAS = ("alpha", "magnitude", "dora_scale", "diff_b")
"""Tensors that may stand beside the factors of any method."""
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Frozen:
    """The base's weight in a layer, read where a method needs it."""

    shape: tuple[int, ...]
    """(out, in, *kernel), or (n,) of a norm."""
    load: Callable[[], torch.Tensor]

    @property
    def weight(self) -> torch.Tensor:
        """The weight in fp32 in main memory, of this shape; of a model without numbers (meta) ones, for shapes to be checked by."""
        weight = self.load().detach()
        return torch.ones(self.shape) if weight.is_meta else weight.float().cpu()

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in * kernel)."""
        return self.shape[0], math.prod(self.shape[1:])

    @staticmethod
    def of(weight: torch.Tensor) -> Frozen:
        """A weight that is there, with its shape."""
        return Frozen(tuple(weight.shape), lambda: weight)


@dataclass(frozen=True)
class Method:
    """How a method's tensors make a product (out, in * kernel), before the scale."""

    name: str
    needs: tuple[tuple[frozenset[str], ...], ...]
    """Each an alternative of sets: one of them must be there in full."""
    optional: frozenset[str]
    rank: Callable[[dict[str, Any]], int | None]
    """Of tensors or of their infos: both have a shape."""
    product: Callable[[Roles, Frozen], torch.Tensor]

    @cached_property
    def roles(self) -> frozenset[str]:
        """All tensors that belong to it."""
        return self.optional.union(*(choice for choices in self.needs for choice in choices))


def matrix(tensor: torch.Tensor) -> torch.Tensor:
    """A factor (out, in, *kernel) as a matrix (out, in * kernel)."""
    return tensor.flatten(1)


def tucker(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """core (i, j, *kernel), a (i, out), b (j, in) -> (out, in * kernel)."""
    return torch.einsum("ij...,ip,jr->pr...", core, a, b).flatten(1)


def lora_product(t: Roles, frozen: Frozen) -> torch.Tensor:
    """up @ down, of shape (out, in * kernel)."""
    if "mid" in t:
        return tucker(t["mid"], matrix(t["up"]).t(), matrix(t["down"]))
    return matrix(t["up"]) @ matrix(t["down"])


def loha_product(t: Roles, frozen: Frozen) -> torch.Tensor:
    """(w1_a @ w1_b) * (w2_a @ w2_b), of shape (out, in * kernel)."""
    if "hada_t1" in t:
        return tucker(t["hada_t1"], t["hada_w1_a"], t["hada_w1_b"]) * tucker(
            t["hada_t2"], t["hada_w2_a"], t["hada_w2_b"]
        )
    return (t["hada_w1_a"] @ matrix(t["hada_w1_b"])) * (t["hada_w2_a"] @ matrix(t["hada_w2_b"]))


def lokr_product(t: Roles, frozen: Frozen) -> torch.Tensor:
    """kron(w1, w2), of shape (out, in * kernel)."""
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = matrix(t["lokr_w2"])
    elif "lokr_t2" in t:
        w2 = tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2_a"] @ matrix(t["lokr_w2_b"])
    return torch.kron(matrix(w1), w2)


def glora_product(t: Roles, frozen: Frozen) -> torch.Tensor:
    """Older files hold the factors the other way round: a1 (r, in), a2 (in, r), b1 (r, in), b2 (out, r)."""
    a1, a2, b1, b2 = (matrix(t[name]) for name in ("a1", "a2", "b1", "b2"))
    if len(b2) == frozen.shape[0] and b1.shape[0] == b2.shape[1] and a2.shape[1] == a1.shape[0] != a2.shape[0]:
        a1, a2, b1, b2 = a2, a1, b2, b1
    plain = tucker(t["bm"], b1.t(), b2) if "bm" in t else b1 @ b2
    if not a1.any() or not a2.any():
        return plain
    return plain + torch.einsum("oi...,ij->oj...", frozen.weight, a1 @ a2).flatten(1)


def first_dim(*names: str) -> Callable[[dict[str, Any]], int | None]:
    """The length of the first of these tensors that is there."""
    return lambda t: next((int(t[name].shape[0]) for name in names if name in t and len(t[name].shape)), None)


def glora_rank(t: dict[str, Any]) -> int | None:
    """The rank of GLoRA's factors, whichever way round they are."""
    return min(int(t["a2"].shape[0]), math.prod(t["a2"].shape[1:])) if "a2" in t and len(t["a2"].shape) > 1 else None


def all_of(*names: str) -> tuple[frozenset[str], ...]:
    return (frozenset(names),)


METHODS = (
    Method("lora", (all_of("down", "up"),), frozenset({"mid", "up_bias"}), first_dim("down"), lora_product),
    Method(
        "loha",
        (all_of("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
        frozenset({"hada_t1", "hada_t2"}),
        first_dim("hada_w1_b"),
        loha_product,
    ),
    Method(
        "lokr",
        (
            (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"})),
            (frozenset({"lokr_w2"}), frozenset({"lokr_w2_a", "lokr_w2_b"})),
        ),
        frozenset({"lokr_t2"}),
        first_dim("lokr_w2_b", "lokr_w1_b"),
        lokr_product,
    ),
    Method("glora", (all_of("a1", "a2", "b1", "b2"),), frozenset({"bm"}), glora_rank, glora_product),
    Method(
        "full", (all_of("diff"),), frozenset(), lambda t: None, lambda t, frozen: t["diff"].reshape(frozen.shape[0], -1)
    ),
)
NO_FACTORS = Method("bias", (), frozenset(), lambda t: None, lambda t, frozen: torch.zeros(frozen.matrix_shape))


def method_of(roles: Iterable[str]) -> Method:
    """The method that a layer's tensors are of.

    Raises:
        UserError: for tensors of several, or of a kind that is not read.
    """
    return method_of_roles(frozenset(roles))


@cache
def method_of_roles(roles: frozenset[str]) -> Method:
    """The same; files have thousands of layers and few sets of tensors."""
    if unread := unread_kinds(roles):
        raise UserError(f"is of a kind ({', '.join(unread)}) that rankfold does not read")
    found = [method for method in METHODS if method.roles & roles]
    if len(found) > 1:
        raise UserError(f"holds tensors of several methods ({', '.join(method.name for method in found)})")
    return found[0] if found else NO_FACTORS


def unread_kinds(roles: Iterable[str]) -> list[str]:
    """The kinds that are not read, of which tensors are."""
    return sorted({role[1:].partition(" | ")[0] for role in roles if role.startswith("!")})


def method_name(roles: Iterable[str]) -> str:
    """lora, dora, loha, lokr, glora, full, bias; a product of another method with a magnitude is called dora-loha and so on."""
    roles = set(roles)
    try:
        name = method_of(roles).name
    except UserError:
        return next(iter(unread_kinds(roles)), "mixed").lower()
    if not {"magnitude", "dora_scale"} & roles:
        return name
    return "dora" if name == "lora" else f"dora-{name}"


def check_layer(infos: dict[str, TensorInfo]) -> None:
    """Checks what can be seen of a layer's tensors without reading them.

    Raises:
        UserError: half a sentence, behind the layer's name: what is missing, or has a shape or dtype that cannot be.
    """
    method = method_of(infos)
    for choices in method.needs:
        if not any(choice <= infos.keys() for choice in choices):
            missing = sorted(min(choices, key=lambda choice: len(choice - infos.keys())) - infos.keys())
            raise UserError(f"lacks {', '.join(missing)}; the file is incomplete")
    if method is NO_FACTORS and ("diff_b" not in infos or {"magnitude", "dora_scale"} & infos.keys()):
        raise UserError(f"holds {' and '.join(infos)} and lacks the factors that belong to it; the file is incomplete")
    for name in ("hada_t1", "hada_t2"):
        if name in infos and not {"hada_t1", "hada_t2"} <= infos.keys():
            raise UserError("lacks one of hada_t1 and hada_t2; the file is incomplete")
    for role, info in infos.items():
        if role == "alpha":
            if info.size != 1 or info.dtype not in NUMBERS:
                raise UserError(f"has an alpha of {info.size} numbers ({info.dtype}), which must be one number")
        elif not info.is_float:
            raise UserError(f"holds {role} as {info.dtype}, which are no real numbers of a kind that is read")
        elif info.size == 0:
            raise UserError(f"holds {role} of no numbers (shape {info.shape}), a rank of 0")
        elif len(info.shape) < (2 if role in method.roles - {"diff", "up_bias"} else 1):
            raise UserError(f"holds {role} in the shape {info.shape}, which has too few sides")
    check_shapes(infos)


def check_shapes(infos: dict[str, TensorInfo]) -> None:
    """Raises UserError when factors do not fit each other."""
    shape = {role: info.shape for role, info in infos.items()}

    def require(holds: bool, *roles: str) -> None:
        if not holds:
            raise UserError(
                f"holds {' and '.join(f'{r} {shape[r]}' for r in roles)}, whose shapes do not fit each other"
            )

    def inner(a: str, b: str) -> None:
        if a in shape and b in shape:
            require(math.prod(shape[a][1:]) == shape[b][0], a, b)

    def core(name: str, a: str, b: str) -> None:
        require(len(shape[name]) > 2 and shape[name][:2] == (shape[a][0], shape[b][0]), name, a, b)

    if "mid" in shape:
        up, down, mid = shape["up"], shape["down"], shape["mid"]
        require(len(mid) > 2 and mid[:2] == (math.prod(up[1:]), down[0]), "mid", "up", "down")
    else:
        inner("up", "down")
    for number in (1, 2):
        if f"hada_t{number}" in shape:
            core(f"hada_t{number}", f"hada_w{number}_a", f"hada_w{number}_b")
        else:
            inner(f"hada_w{number}_a", f"hada_w{number}_b")
    inner("lokr_w1_a", "lokr_w1_b")
    if "lokr_t2" in shape and {"lokr_w2_a", "lokr_w2_b"} <= shape.keys():
        core("lokr_t2", "lokr_w2_a", "lokr_w2_b")
    else:
        inner("lokr_w2_a", "lokr_w2_b")
    if "hada_w1_a" in shape and "hada_t1" not in shape:
        require(shape["hada_w1_a"][0] == shape["hada_w2_a"][0], "hada_w1_a", "hada_w2_a")


def layer_change(tensors: Roles, scale: float, frozen: Frozen | None) -> Change:
    """The change that a layer's tensors ask for, in fp32; it sees the weight as (out, in * kernel).

    A whole matrix that the file holds in bf16 stays so: it may be one of many gigabytes. frozen may be None where the change does not
    depend on it.

    Raises:
        UserError: half a sentence, behind the layer's name: for tensors that do not fit the weight, or hold NaN or infinity.
    """
    method, magnitude = method_of(tensors), bool({"magnitude", "dora_scale"} & tensors.keys())
    whole = method.name == "full" and not magnitude and tensors["diff"].dtype == torch.bfloat16
    t = {role: tensor if whole and role == "diff" else tensor.float() for role, tensor in tensors.items()}
    bad = [role for role, tensor in t.items() if not is_finite(tensor)] + ["alpha"] * (not math.isfinite(scale))
    if bad:
        raise NotFiniteError(f"holds NaN or infinity in {bad[0]}: the file is corrupted; take an earlier checkpoint")
    plain = "mid" not in t and "bm" not in t and not magnitude
    mixes_weight = method.name == "glora" and bool(t["a1"].any() and t["a2"].any())
    if frozen is None and (magnitude or mixes_weight):
        raise NeedsWeightError(
            "changes by an amount that depends on the base model's weight: name the base with --base"
        )
    bias = t.get("diff_b")
    if "up_bias" in t:
        scaled = t["up_bias"] * scale
        bias = scaled if bias is None else bias + scaled
    if frozen is not None:
        check_fits(method, t, frozen.shape, bias)
    if method is NO_FACTORS:
        return Change(bias=bias)
    if method.name == "lora" and plain:
        return Change(down=matrix(t["down"]), up=matrix(t["up"]) * scale, bias=bias)
    if method.name == "glora" and plain and not mixes_weight:
        return glora_factors(t, scale, frozen, bias)
    try:
        delta = method.product(t, frozen or Frozen((len(t.get("diff", ())),), lambda: torch.zeros(0)))
    except RuntimeError as error:
        raise UserError(
            f"holds tensors whose shapes do not fit each other ({' '.join(str(error).split())[:160]})"
        ) from error
    delta = delta if method.name == "full" else delta * scale
    if frozen is not None and delta.shape != frozen.matrix_shape:
        raise MisfitError(f"has the shape {frozen.shape} here, and the file's change {tuple(delta.shape)}")
    if magnitude and frozen is not None:
        delta = turn(frozen.weight, delta, t)
    return Change(dense=delta, bias=bias)


def glora_factors(t: Roles, scale: float, frozen: Frozen | None, bias: torch.Tensor | None) -> Change:
    """GLoRA whose A changes nothing: its B is plain LoRA, of shape (out, r) and (r, in); bias (out,)."""
    b1, b2 = matrix(t["b1"]), matrix(t["b2"])
    if b1.shape[1] != b2.shape[0] or (frozen is not None and len(b1) != frozen.shape[0] == len(b2)):
        b1, b2 = b2, b1
    return Change(down=b2, up=b1 * scale, bias=bias)


class NeedsWeightError(UserError):
    """The change depends on the base's weight, which was not given."""


class NotFiniteError(UserError):
    """A tensor holds NaN or infinity."""


class MisfitError(UserError):
    """Tensors are those of a layer of another shape."""


def check_fits(method: Method, t: Roles, shape: tuple[int, ...], bias: torch.Tensor | None) -> None:
    """Raises MisfitError when tensors are those of a layer of another shape."""
    out, width = shape[0], math.prod(shape[1:])
    if bias is not None and bias.numel() != out:
        raise MisfitError(f"has {out} outputs here, and the file's bias {bias.numel()}")
    theirs: Sequence[int] = shape
    if method.name == "lora" and "mid" not in t and (len(t["up"]) != out or matrix(t["down"]).shape[1] != width):
        theirs = (len(t["up"]), *t["down"].shape[1:])
    elif method.name == "full" and without_ones(t["diff"].shape) != without_ones(shape):
        theirs = tuple(t["diff"].shape)
    elif method.name == "glora" and "bm" not in t and (out, width) not in outer_shapes(t, "b"):
        theirs = outer_shapes(t, "b")[0]
    elif method.name == "glora" and (len(shape) < 2 or (shape[1], shape[1]) not in outer_shapes(t, "a")):
        theirs = outer_shapes(t, "a")[0]
    if tuple(theirs) != tuple(shape):
        raise MisfitError(f"has the shape {shape} here, and the file's tensors are for {tuple(theirs)}")


def outer_shapes(t: Roles, pair: str) -> list[tuple[int, int]]:
    """The shapes that the product of GLoRA's a1 and a2, or b1 and b2, can have, the newer files' order first."""
    first, second = matrix(t[f"{pair}1"]), matrix(t[f"{pair}2"])
    found = []
    for left, right in ((first, second), (second, first)):
        if left.shape[1] == right.shape[0]:
            found.append((left.shape[0], right.shape[1]))
    return found or [(0, 0)]


def without_ones(shape: Sequence[int]) -> list[int]:
    """A shape without sides of 1: a convolution of 1 x 1 is a linear layer."""
    return [side for side in shape if side != 1]


def turn(weight: torch.Tensor, delta: torch.Tensor, t: Roles) -> torch.Tensor:
    """What DoRA makes of a weight (out, in, *kernel) and a product (out, in * kernel), less the weight.

    PEFT's magnitudes are those of outputs: (out,), of convolutions (1, out, 1, 1). LyCORIS' dora_scale is that of inputs (1, in, ...) or,
    with wd_on_out, of outputs (out, 1, ...).

    Raises:
        UserError: for a magnitude of another shape.
    """
    frozen = weight.reshape(len(weight), -1)
    turned = frozen + delta
    if "magnitude" in t:
        magnitude, by_output = t["magnitude"], True
    else:
        magnitude = t["dora_scale"]
        by_output = len(magnitude) == len(weight) and (len(weight) > 1 or magnitude.numel() == 1)
    count = len(weight) if by_output else weight.shape[1] if weight.dim() > 1 else 0
    if magnitude.numel() != count:
        raise MisfitError(
            f"has the shape {tuple(weight.shape)} here, and the file's magnitude {tuple(magnitude.shape)}"
        )
    if by_output:
        norm = turned.norm(dim=1, keepdim=True)
        ratio = magnitude.reshape(-1, 1) / (norm + EPS)
        # A file that keeps several layers as one has magnitudes of those, too, that were not trained: their norms, but for rounding.
        same = ~delta.any(dim=1, keepdim=True) & ((ratio - 1).abs() <= 8 * EPS)
        return torch.where(same, 0.0, turned * ratio - frozen)
    kernels = turned.reshape(len(weight), weight.shape[1], -1)
    norm = kernels.norm(dim=(0, 2), keepdim=True)
    return (kernels * (magnitude.reshape(1, -1, 1) / (norm + EPS))).reshape(turned.shape) - frozen
