"""`rankfold doctor`: versions, devices, memory, caches, and what is missing and how to get it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from pathlib import Path

from ...toolkit.core.versions import incompatible_versions, installed_version, untested_versions

LIBRARIES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "open_clip_torch",
    "gradio",
    "safetensors",
)
OPTIONAL = {
    "tensorboard": "pip install tensorboard",
    "wandb": "pip install wandb",
    "bitsandbytes": "pip install bitsandbytes",
    "torchao": "pip install torchao",
}


def doctor(argv: list[str]) -> None:
    raise SystemExit(print_report())


def print_report() -> int:
    """Prints the report; returns 0 when training can start, 1 when something needed is missing."""
    missing = []
    print(
        f"rankfold      {installed_version('rankfold')}\npython        {platform.python_version()} on {platform.platform()}"
    )
    for name in LIBRARIES:
        found = installed_version(name)
        print(f"{name:<13} {found or 'missing'}")
        if not found:
            missing.append(f"{name}: pip install {name}")
    for name, cure in OPTIONAL.items():
        found = importlib.util.find_spec(name) is not None
        print(f"{name:<13} {'there' if found else f'not there (optional: {cure})'}")
    if not missing:
        missing += devices_and_caches()
    for line in missing:
        print(f"MISSING  {line}")
    unfit = list(incompatible_versions())
    for line in unfit:
        print(f"UNFIT    {line}")
    for line in untested_versions():
        print(f"UNTESTED {line}")
    missing += unfit
    print("ready" if not missing else "not ready")
    return 1 if missing else 0


def devices_and_caches() -> list[str]:
    """Prints devices, memory and cache folders; returns what is missing."""
    import psutil

    from ...toolkit.core import devices
    from ...toolkit.core.errors import UserError
    from ...toolkit.core.paths import assets_folder, cache_folder, place_from
    from ...toolkit.core.system_faults import to_user_error
    from ...toolkit.diffusion.load import EMBEDDED
    from ...toolkit.vlm.model import EMBEDDED as VISION

    memory = psutil.virtual_memory()
    print(
        f"memory        {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free, {os.cpu_count()} cores"
    )
    for line in devices.describe_devices():
        print(f"device        {line}")
    for line in devices.list_faults(
        devices.this_machine(), lambda library: importlib.util.find_spec(library) is not None
    ):
        print(f"will not work {line}")
    for name, find in (("cache", cache_folder), ("hub cache", lambda: place_from("HF_HOME", "~/.cache/huggingface"))):
        try:
            folder = find()
            size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0
            print(f"{name:<13} {folder} ({size / 2**20:.0f} MiB)")
        except (UserError, OSError) as error:
            print(f"will not work {to_user_error(error)}")
    print(f"disk          {shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB free here")
    missing = [name for name, place in EMBEDDED.items() if not (assets_folder() / place / "model_index.json").is_file()]
    missing += [
        name for name, place in VISION.items() if not (assets_folder() / "tiny" / place / "config.json").is_file()
    ]
    return [f"the embedded models {' and '.join(missing)} in {assets_folder()}: rankfold build-tiny"] if missing else []
