"""A safetensors file: its header read once, its tensors when they are asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..core.errors import UserError

FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
NUMBERS = FLOATS | {"I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL"}
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # how files of torch.save begin


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor."""

    dtype: str
    """As safetensors calls it: F32, BF16, F8_E4M3, ..."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether it holds real numbers of a kind that we compute with."""
        return self.dtype in FLOATS


class TensorFile:
    """A file's header, and its tensors."""

    def __init__(self, path: Path) -> None:
        """Raises UserError when there is no such file, it is a pickle, or it is damaged."""
        self.path = path
        check_is_safetensors(path)
        try:
            self.metadata: dict[str, str] = self.handle.metadata() or {}
            self.infos = read_infos(path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} is corrupted ({reason}); copy or download it again.") from error

    @cached_property
    def handle(self) -> Any:
        """The file, open for as long as this object lives: a header of 50,000 names is not read for each of them."""
        return safe_open(self.path, framework="pt").__enter__()

    def load(self, name: str) -> torch.Tensor:
        """A tensor in the dtype and shape of the file."""
        return self.handle.get_tensor(name)


class TensorsInMemory:
    """Tensors that no file holds yet, behind the same face."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
        self.path, self.metadata, self.tensors = Path("memory"), metadata or {}, dict(tensors)
        names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
        self.infos = {k: TensorInfo(names.get(v.dtype, "I64"), tuple(v.shape)) for k, v in self.tensors.items()}

    def load(self, name: str) -> torch.Tensor:
        """A tensor in its own dtype and shape."""
        return self.tensors[name]


def check_is_safetensors(path: Path) -> None:
    """Raises UserError for a file that is not there, or one of torch.save, which is not opened: that can run whatever is in it."""
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    if start[8:9] == b"{":
        return  # behind the header's length, whose bytes may be those of anything, the header
    if start.startswith(PICKLES):
        raise UserError(
            f"{path} is a pickle, as torch.save writes it, and opening one can run any program: it is not opened. If you trust who "
            'made it, turn it into safetensors: python -c "import torch, safetensors.torch as s; '
            "s.save_file(torch.load('IN.bin', weights_only=True), 'OUT.safetensors')\""
        )
    if start[:1] in (b"<", b"{") or start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is corrupted: it holds a text, such as a web page or a pointer of Git LFS, and no tensors; download it again."
        )


def read_infos(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes, from the header alone."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return {name: TensorInfo(info["dtype"], tuple(info["shape"])) for name, info in header.items()}
