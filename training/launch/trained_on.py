"""What a run is trained on, by hashes of its content: kept in data.json, named in every checkpoint, compared before a run goes on.

An item is a photo, a caption, a row, an adapter or a file of the base, under the words that people are told of it by.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...toolkit.core.cache import cache_key, file_hash, sampled_hash
from ...toolkit.core.errors import UserError
from ...toolkit.core.files import write_text
from ...toolkit.core.run_folder import Run
from ...toolkit.data.conversations import Conversation
from ...toolkit.data.subjects import ALPHA, Sample, find_samples, mask_path
from ...toolkit.data.videos import medium_parts
from ...toolkit.diffusion.load import open_model
from ...toolkit.formats.locate import adapter_path, content_hash
from ..config.base import LoopConfig
from ..config.compose import ComposeSettings
from ..config.defaults import resolve_preview_base
from ..config.images import DiffusionConfig
from ..config.instruct import ConversationConfig, InstructConfig
from ..config.search import SearchConfig, SearchSettings
from ..config.subject import SubjectConfig
from ..engine.checkpoint import newest_checkpoint
from ..engine.loop import check_same_config, comparable_config
from ..runs import library
from ..subject.held_out import split_measured_photos

HASH_DIGITS = 16  # hexadecimal digits of an item's hash: data sets have a million of them
READERS = 8  # files read at once
MAX_CHANGES = 3  # differences that are named
WEIGHTS = (".json", ".safetensors", ".txt", ".model", ".jinja")  # files of a base that training reads


@dataclass(frozen=True)
class TrainingData:
    """The data of a run."""

    items: dict[str, str]
    """What it is -> hash of its content."""
    held_out: tuple[str, ...] = ()
    """Names of the photos that likeness is measured by, which are among the photos and not trained on."""
    learned: tuple[str, ...] = ()
    """Hashes of all photos that were ever trained on, where some are held out."""
    earlier: tuple[dict[str, Any], ...] = ()
    """What was trained on before changes were accepted: until which step, its digest, and the changes in words."""

    @property
    def digest(self) -> str:
        """One hash of all items."""
        return cache_key(**self.items)

    def digests(self) -> set[str]:
        """Its own, and those of what was trained on before."""
        return {self.digest, *(own["digest"] for own in self.earlier)}

    @property
    def photos(self) -> dict[str, str]:
        """Name of each photo -> its hash."""
        return {name.removeprefix("photo "): own for name, own in self.items.items() if name.startswith("photo ")}

    def describe_changes(self) -> str:
        """The changes that were accepted, for an adapter to say of itself."""
        return "; ".join(f"until step {own['step']} other data: {', '.join(own['changes'])}" for own in self.earlier)


# ---------------------------------------------------------------------------------------------- found


def collect_training_data(config: Any, inputs: Sequence[Any]) -> TrainingData:
    """The data of a run that begins. inputs: what the method's checks have found."""
    items = data_items(config, inputs)
    if not draws_held_out(config):
        return TrainingData(items)
    kept, held_out = split_measured_photos(config, inputs[0])
    learned = {items[f"photo {display_path(sample.path, config.images)}"] for sample in kept}
    return TrainingData(items, tuple(path.name for path in held_out), tuple(sorted(learned)))


def draws_held_out(config: Any) -> bool:
    """Whether photos to measure by are taken out of those to train on."""
    return isinstance(config, SubjectConfig) and config.evaluate_every > 0 and config.evaluate_images is None


def data_items(config: Any, inputs: Sequence[Any]) -> dict[str, str]:
    """What it is -> hash of its content, of all that is trained on."""
    own = image_items(config, *inputs) if isinstance(config, DiffusionConfig) else conversation_items(config, *inputs)
    if isinstance(config, SubjectConfig) and config.preview_base:
        own |= base_items(resolve_preview_base(config.preview_base), "the preview base")
    return own | adapter_items(config) | base_items(inputs[-1])


def image_items(config: DiffusionConfig, samples: list[Sample], base: str) -> dict[str, str]:
    """Photos with captions and masks, and what is measured or judged by."""
    items = sample_items(samples, "photo", config)
    if isinstance(config, SearchConfig) and config.held_out is not None:
        items |= sample_items(find_samples(config.held_out, skip_bad=config.skip_bad), "held-out photo", config)
    if config.prior_folder is not None:
        own = find_samples(config.prior_folder, skip_bad=config.skip_bad, option="--prior-folder")
        items |= sample_items(own, "class image", config)
    measured = config.evaluate_images if isinstance(config, SubjectConfig) and config.evaluate_every else None
    if measured is not None:
        found = find_samples(measured, skip_bad=config.skip_bad, option="--evaluate-images")
        items |= hash_files({f"--evaluate-images {sample.path.name}": sample.path for sample in found})
        items |= hash_files(
            {
                f"reference {number} of --evaluate-images {sample.path.name}": path
                for sample in found
                for number, path in enumerate(sample.references, 1)
            }
        )
    prompts = Path(getattr(config, "evaluate_prompts", ""))
    return items | hash_files({f"the prompts {prompts.name}": prompts} if prompts.is_file() else {})


def sample_items(samples: Iterable[Sample], what: str, config: DiffusionConfig) -> dict[str, str]:
    """Photos, their captions and their masks."""
    files, items = {}, {}
    for sample in samples:
        name = display_path(sample.path, config.images)
        files[f"{what} {name}"] = sample.path
        if sample.caption is not None:
            items[f"the caption of {name}"] = text_hash(sample.caption)
        for number, path in enumerate(sample.references, 1):
            files[f"reference {number} of {name}"] = path
        if config.masks and config.masks != ALPHA and what == "photo":
            files[f"the mask of {name}"] = mask_path(sample, config.masks)
    return hash_files(files) | items


def conversation_items(config: ConversationConfig, found: Any, *more: Any) -> dict[str, str]:
    """Rows with their images. more: rows that a search judges by, and the base's folder."""
    *held_out, _ = more
    items, files = {}, {}
    more_data = [(f"more data {number}: ", rows) for number, rows in enumerate(found.more, 1)]
    groups = (("", found.data), ("replay: ", found.replay), ("measured by: ", found.held_out), *more_data)
    for group, planned in (*groups, *(("held out: ", rows) for rows in held_out)):
        for row in planned.rows:
            items[f"{group}{row.location}"] = text_hash(row_text(row))
            for image in (part for medium in row.images for part in medium_parts(medium)):
                if isinstance(image, Path):
                    files[f"image {display_path(image, config.images or Path(config.data or '').parent)}"] = image
    items |= hash_files(files)
    if config.chat_template is not None:
        items["the chat template"] = text_hash(config.chat_template.read_text(encoding="utf-8"))
    return items


def row_text(row: Conversation) -> str:
    """All of a row, with names instead of images that are files."""
    parts = [part for medium in row.images for part in medium_parts(medium)]
    images = [str(part.name) if isinstance(part, Path) else hashlib.sha256(part).hexdigest() for part in parts]
    return json.dumps([row.messages, images])


def adapter_items(config: Any) -> dict[str, str]:
    """The adapters that are composed, gone on from, or merged while training."""
    names = config.adapters if isinstance(config, ComposeSettings) else ()
    if isinstance(config, (InstructConfig, SubjectConfig)) and config.start_from is not None:
        names = (str(config.start_from),)
    if isinstance(config, SubjectConfig) and config.training_adapter is not None:
        names = (*names, str(config.training_adapter))
    return {f"adapter {name}": content_hash(adapter_path(library.resolve(name)))[:HASH_DIGITS] for name in names}


def base_items(folder: str, name: str = "the base") -> dict[str, str]:
    """The files of a base model, of either kind."""
    root = Path(folder)
    index = root / "model_index.json"
    if index.is_file():
        parts = [root / part for part in open_model(folder).parts]
        files = [index, *(file for part in parts if part.is_dir() for file in part.iterdir())]
    else:
        files = list(root.iterdir())
    names = [file for file in sorted(files) if file.suffix in WEIGHTS and file.is_file()]
    return {f"{name}'s {file.relative_to(root).as_posix()}": sampled_hash(file)[:HASH_DIGITS] for file in names}


def hash_files(files: dict[str, Path]) -> dict[str, str]:
    """The hash of each file's content."""
    with ThreadPoolExecutor(READERS) as readers:
        found = readers.map(lambda path: file_hash(path)[:HASH_DIGITS], files.values())
        return dict(zip(files, found, strict=True))


def text_hash(text: str) -> str:
    """Hash of a text."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:HASH_DIGITS]


def display_path(path: Path, folder: Path | None) -> str:
    """A file's path as it is told: from the folder of the data where it lies in it."""
    inside = folder is not None and path.is_relative_to(folder)
    return path.relative_to(folder).as_posix() if inside else str(path)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- kept


def save_data(run: Run, data: TrainingData) -> None:
    """Writes data.json."""
    write_text(run.data_file, json.dumps(asdict(data), indent=1))


def load_data(run: Run) -> TrainingData | None:
    """What data.json says; None where it is not there or broken."""
    try:
        found = json.loads(run.data_file.read_text(encoding="utf-8"))
        held_out, learned = (tuple(map(str, found[key])) for key in ("held_out", "learned"))
        earlier = tuple({key: own[key] for key in ("step", "digest", "changes")} for own in found["earlier"])
        return TrainingData(dict(found["items"]), held_out, learned, earlier)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def with_held_out(config: Any, data: TrainingData | None) -> Any:
    """The config with the photos that were held out when the run began, whatever else is in their folder by now."""
    if data is None or not data.held_out or not isinstance(config, SubjectConfig):
        return config
    return replace(config, hold_out=data.held_out)


# ---------------------------------------------------------------------------------------------- compared


def differences(known: dict[str, str], now: dict[str, str]) -> list[str]:
    """What was added, removed or changed, in words."""
    found = []
    for name in known | now:
        if known.get(name) != now.get(name):
            how = "has changed" if name in known and name in now else "was added" if name in now else "was removed"
            found.append(f"{name} {how}")
    return found


def first_changes(changes: Sequence[str]) -> str:
    """The first of the changes, and how many there are more."""
    more = len(changes) - MAX_CHANGES
    return ", ".join(changes[:MAX_CHANGES]) + (f" and {more} more" if more > 0 else "")


def check_data(run: Run, config: LoopConfig, inputs: Sequence[Any], *, accept: bool = False) -> None:
    """Compares a run's config and data with those that its newest checkpoint was trained with; without one nothing was trained yet.

    accept: other data are written down as the run's from here on.

    Raises:
        UserError: for another config; for other data unless they are accepted; and where they cannot be.
    """
    if (found := newest_checkpoint(run.checkpoint_files())) is None:
        save_data(run, collect_training_data(config, inputs))
        return
    path, state, _ = found
    check_same_config(state["config"], comparable_config(config), path)
    known, digest, now = load_data(run), state.get("data"), TrainingData(data_items(config, inputs))
    if not digest:
        print(f"{path} says nothing of its data, so whether they have changed since cannot be told.")
    if not digest or (known is None and digest == now.digest):
        save_data(run, collect_training_data(config, inputs))
        return
    changes = differences(known.items, now.items) if known else []
    if known is None or (digest not in known.digests() and not changes):
        changes = ["they differ, and how is not known any more"]
    if changes:
        accept_data(run, config, state["step"], known, now, changes, accept=accept)
    elif accept:
        print(f"The data of {run.folder} are those of its step {state['step']}: there is nothing to accept.")


def accept_data(
    run: Run, config: Any, step: int, known: TrainingData | None, now: TrainingData, changes: list[str], *, accept: bool
) -> None:
    """Writes changed data down as the run's, if so wished.

    Raises:
        UserError: if not, or where the method cannot go on with other data.
    """
    began = f"The data of {run.folder} have changed since its step {step}: {first_changes(changes)}."
    if isinstance(config, SearchSettings):
        raise UserError(
            f"{began} A search compares what was judged on the same data: put them back, or start over with --overwrite."
        )
    if not accept:
        raise UserError(
            f"{began} Put them back, or go on with them as they are now: rankfold resume {run.folder} --accept-changes"
        )
    if known is None and draws_held_out(config):
        raise UserError(
            f"{began} Without {run.data_file} it is not known which photos it is measured by: put the data back, or start over with "
            "--overwrite."
        )
    known = known or TrainingData({})
    still = remaining_held_out(run, known, now)
    learned = {own for name, own in now.photos.items() if name not in still} if still else set()
    earlier = {"step": step, "digest": known.digest, "changes": [first_changes(changes)]}
    learned |= set(known.learned)
    save_data(run, replace(now, held_out=still, learned=tuple(sorted(learned)), earlier=(*known.earlier, earlier)))
    print(f"{began} It goes on with them as they are now.")


def remaining_held_out(run: Run, known: TrainingData, now: TrainingData) -> tuple[str, ...]:
    """The photos to measure by: those of the run's start, wherever they are now, and never one that was trained on.

    Raises:
        UserError: when none is left.
    """
    if not known.held_out:
        return ()
    held = {known.photos.get(name) for name in known.held_out}
    replaced = {name for name, own in now.photos.items() if name in known.held_out and own not in known.learned}
    still = [name for name, own in now.photos.items() if own in held or name in replaced]
    if not still or len(still) == len(now.photos):
        raise UserError(
            f"Of the photos that {run.folder} is measured by ({', '.join(known.held_out)}) none is left, or no other to train on: put "
            "them back, or start over with --overwrite."
        )
    return tuple(still)
