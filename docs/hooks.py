"""For mkdocs: the repository's folder, whatever it is called, is found as the package `rankfold`."""

import tempfile
from pathlib import Path

from mkdocs.plugins import event_priority


@event_priority(100)  # before mkdocstrings reads its own part
def on_config(config):
    """Puts a folder with a link named rankfold first where mkdocstrings looks."""
    folder = Path(tempfile.mkdtemp())
    (folder / "rankfold").symlink_to(Path(config.config_file_path).parent, target_is_directory=True)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(folder)]
    return config
