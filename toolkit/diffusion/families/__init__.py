"""The families of diffusion models, a file each, found by being here (docs/adding-a-family.md).

Comes in what differs from family to family. Imports diffusion/model.py and core.
"""

import pkgutil
from importlib import import_module

from ..model import DiffusionModel

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def _subclasses(kind: type[DiffusionModel]) -> list[type[DiffusionModel]]:
    return [one for child in kind.__subclasses__() for one in (child, *_subclasses(child))]


FAMILIES: tuple[type[DiffusionModel], ...] = tuple(
    family for family in _subclasses(DiffusionModel) if family.__module__.startswith(f"{__name__}.")
)
"""All families; each names the pipeline classes that it serves."""


def family_of_denoiser(denoiser: object) -> type[DiffusionModel] | None:
    """The family whose denoisers are of this class."""
    return next((family for family in FAMILIES if type(denoiser).__name__ in family.denoiser_classes), None)
