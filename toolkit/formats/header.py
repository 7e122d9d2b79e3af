"""What an exported file says of itself in its header: ModelSpec 1.0.1, and what readers of kohya's files show (ss_, sshs_)."""

from __future__ import annotations

import base64
import datetime
import hashlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import save
from torch import Tensor

from ..core.paths import is_hub_id
from ..diffusion.families import family_of_denoiser
from .adapter_facts import AdapterFacts

THUMBNAIL_SIDE = 256  # pixels, the longer side
IMPLEMENTATION = "https://github.com/huggingface/diffusers"


def describe_file(
    state: dict[str, Tensor], parts: dict[str, Any], facts: AdapterFacts, *, title: str, thumbnail: Path | None = None
) -> dict[str, str]:
    """The header's entries for tensors that change these parts' models. facts: what the adapter says of itself."""
    known = ((family_of_denoiser(part.model), part.model) for part in parts.values())
    versions = (family.versions_in_headers(denoiser) for family, denoiser in known if family)
    architecture, kohya_version = next(versions, ("unknown", ""))
    words = facts.trigger_words
    found = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": title,
        "modelspec.date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.description": f"{facts.adapter or 'lora'} trained with rankfold",
        "modelspec.trigger_phrase": words,
        "modelspec.tags": ", ".join(dict.fromkeys(word for word in (facts.class_noun, facts.adapter) if word)),
        "ss_output_name": title,
        "ss_training_comment": "made with rankfold",
        "ss_base_model_version": kohya_version,
        "ss_v2": "True" if kohya_version == "sd_v2" else "",
        "ss_sd_model_name": facts.base if is_hub_id(facts.base) else Path(facts.base).name,
        "ss_tag_frequency": json.dumps({title: {words: 1}}) if words else "",
    }  # fmt: skip
    if thumbnail is not None and (image := data_url(thumbnail)):
        found["modelspec.thumbnail"] = image
    return {key: value for key, value in found.items() if value} | file_hashes(state)


def file_hashes(state: dict[str, Tensor]) -> dict[str, str]:
    """The hashes by which A1111 and kohya's tools know a file whatever its header says: of its tensors alone."""
    data = save(state)
    tensors = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    legacy = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    return {"modelspec.hash_sha256": f"0x{tensors}", "sshs_model_hash": tensors, "sshs_legacy_hash": legacy}


def data_url(path: Path) -> str:
    """An image, small, as a data URL; '' when it cannot be read."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except (OSError, ValueError):
        return ""
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="jpeg", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
