"""Keeps the libraries' progress bars and advice out of what a benchmark prints."""

from __future__ import annotations

import os

from rankfold.toolkit.core.terminal import calm


def quiet_libraries() -> None:
    """Before anything heavy is imported, as far as that can be."""
    calm(os.environ)
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
