"""Keeps the libraries' progress bars and advice out of what a benchmark prints."""

from __future__ import annotations

import os

from rankfold.toolkit.core.terminal import quiet_libraries


def silence_libraries() -> None:
    """Before anything heavy is imported, as far as that can be."""
    quiet_libraries(os.environ)
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
