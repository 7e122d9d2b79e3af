"""Exported files to the Hugging Face Hub: into a repository that is named, private unless it is said otherwise."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ....toolkit.core.errors import UserError
from ....toolkit.diffusion.base_files import base_paths
from .adapter_list import AdapterEntry
from .temporary import temporary_subfolder

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def check_repository(repository: str | None) -> str:
    """The name of a repository.

    Raises:
        UserError: when it is none.
    """
    name = (repository or "").strip()
    if not REPOSITORY.fullmatch(name) or ".." in name or "--" in name:
        raise UserError(f"{name[:100]!r} is not the name of a repository: give it as USER/NAME.")
    return name


def hub_token() -> str:
    """This machine's token of the hub.

    Raises:
        UserError: when there is none.
    """
    from huggingface_hub import get_token

    if not (token := get_token()):
        raise UserError(
            "This machine has no token of the Hugging Face Hub: run `hf auth login`, or start the studio with HF_TOKEN set."
        )
    return token


def push_files(one: AdapterEntry, files: Sequence[str], repository: str, *, private: bool) -> str:
    """Uploads an adapter's files with a model card; returns a sentence.

    Raises:
        UserError: when the hub refuses, or cannot be reached; when the repository is public and it should be private.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=hub_token())
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise UserError(
                f"{repository} is there already and public: clear “private” to push to it, or give another name."
            )
        with temporary_subfolder("push") as folder:
            for file in files:
                shutil.copy(file, folder)
            (folder / "README.md").write_text(model_card(one), encoding="utf-8")
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=f"{Path(files[0]).name} by rankfold"
            )
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"The hub did not take it: {str(error).splitlines()[0][:300]}") from error
    return f"{one.name} is at {repository}{', private' if private else ''}."


def model_card(one: AdapterEntry) -> str:
    """What the hub shows of it."""
    facts = {
        "library_name": "peft" if one.is_chat else "diffusers",
        "base_model": one.facts.base,
        "instance_prompt": one.trigger,
    }
    public = {key: value for key, value in facts.items() if value and not Path(base_paths(value)[0]).is_absolute()}
    head = "".join(f"{key}: {value!r}\n" for key, value in public.items())
    tags = "tags:\n- lora\n" if one.is_chat else "tags:\n- lora\n- text-to-image\n"
    words = f"Trigger words: `{one.trigger}`.\n" if one.trigger else ""
    return f"---\n{head}{tags}---\n\n# {one.name}\n\n{words}Made with rankfold.\n"
