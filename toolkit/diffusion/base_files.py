"""A base that is several files, as ComfyUI keeps them: denoiser, autoencoder and text encoders apart.

It is named by one text, which is how the command line names it, so whatever keeps a base (configs, adapters, recipes, the library)
keeps all of it: "flux1-dev.safetensors --vae ae.safetensors --text-encoder clip_l.safetensors t5xxl.safetensors --layout FLUX.1-dev".
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.errors import UserError
from ..core.paths import expand_paths, is_there

VAE, TEXT, LAYOUT = "--vae", "--text-encoder", "--layout"


@dataclass(frozen=True)
class BaseFiles:
    """The files of a base."""

    denoiser: str
    """UNet or transformer, or a whole checkpoint, of which the others then replace parts."""
    vae: str = ""
    text_encoders: tuple[str, ...] = ()
    layout: str = ""
    """Pipeline folder or hub id with configs and tokenizers, and the weights of parts that have no file."""

    def __str__(self) -> str:
        words = [self.denoiser, *([VAE, self.vae] if self.vae else [])]
        words += [TEXT, *self.text_encoders] if self.text_encoders else []
        return shlex.join([*words, *([LAYOUT, self.layout] if self.layout else [])])

    def with_paths(self, change: Callable[[str], str]) -> BaseFiles:
        """The same with each path changed; a layout that is a hub id stays."""
        layout = change(self.layout) if self.layout and is_there(Path(self.layout)) else self.layout
        changed = tuple(map(change, self.text_encoders))
        return replace(
            self, denoiser=change(self.denoiser), vae=change(self.vae) if self.vae else "", text_encoders=changed, layout=layout
        )  # fmt: skip

    @property
    def files(self) -> list[Path]:
        """All files, the denoiser's first."""
        return [Path(text) for text in (self.denoiser, self.vae, *self.text_encoders) if text]


def parse_base(text: str) -> BaseFiles | None:
    """The files that a base's name names; None where it is one file, a folder or a hub id.

    Raises:
        UserError: for words that are no such name.
    """
    if not any(f" {option} " in text for option in (VAE, TEXT, LAYOUT)):
        return None
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--base {text}: a quotation mark has no other ({error}).") from error
    given: dict[str, list[str]] = {"": []}
    option = ""
    for word in words:
        if word in (VAE, TEXT, LAYOUT):
            option = word
            given.setdefault(option, [])
        else:
            given[option].append(word)
    for option, values in given.items():
        if not values or (option != TEXT and len(values) > 1):
            what = "folder or hub id" if option == LAYOUT else "file"
            raise UserError(
                f"--base {text}: {option or '--base'} takes one {what}; a name with blanks goes into quotation marks."
            )
    one = {option: values[0] for option, values in given.items()}
    return BaseFiles(one[""], one.get(VAE, ""), tuple(given.get(TEXT, ())), one.get(LAYOUT, ""))


def join_base(base: str, vae: Path | None, text_encoders: tuple[Path, ...], layout: str) -> str:
    """The name of a base with these options beside it."""
    if vae is None and not text_encoders and not layout:
        return base
    known = parse_base(base) or BaseFiles(base)
    texts = [expand_paths(path).as_posix() for path in text_encoders]
    return str(
        BaseFiles(
            expand_paths(known.denoiser),
            expand_paths(vae).as_posix() if vae else known.vae,
            tuple(texts) or known.text_encoders,
            expand_paths(layout) or known.layout,
        )
    )


def base_paths(base: str) -> list[str]:
    """All that a base's name names."""
    files = parse_base(base)
    return [base] if files is None else [*map(str, files.files), *([files.layout] if files.layout else [])]


def short_base(base: str) -> str:
    """A base's name for people: without the folders, and of several files the denoiser's."""
    return Path(base_paths(base)[0]).name if base else ""
