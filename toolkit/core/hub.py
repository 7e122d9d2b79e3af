"""Snapshots of repositories of the hub, from the local cache where they are there."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import UserError

CONFIGS = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja"]
WEIGHTS = [*CONFIGS, "*/*.safetensors"]
IGNORED_FILES = ("*.fp16.*", "*.non_ema.*")


def fetch_snapshot(
    hub_id: str, patterns: list[str], subject: str, cure: str, ignore: Sequence[str] = IGNORED_FILES
) -> str:
    """Folder with the files of these patterns.

    subject and cure: how the error's sentence begins, and what it proposes. ignore: patterns of files that are not wanted.

    Raises:
        UserError: when the repository is gated, or neither in the cache nor within reach.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        return snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=list(ignore))
    except GatedRepoError as error:
        raise UserError(
            f"{subject} is gated: accept its terms on its page of the hub, log in with `hf auth login`, and try again."
        ) from error
    except Exception as error:
        raise UserError(
            f"{subject} is not in the local cache and could not be fetched ({type(error).__name__}). {cure}"
        ) from error
