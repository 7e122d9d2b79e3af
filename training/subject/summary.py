"""What a training on images will really see: images, captions, sizes, masks, draws, and what of the folders is not used.

Shown before a run begins and by `rankfold inspect FOLDER`, kept as summary.json in the run folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import psutil

from ...toolkit.core.cache import file_hash
from ...toolkit.core.devices import GIB, device, free_memory
from ...toolkit.core.errors import list_names
from ...toolkit.data.image_folder import ImageFolder, read_image_folders
from ...toolkit.data.references import reference_notes
from ...toolkit.data.subjects import Sample, mask_share, sample_size
from ...toolkit.diffusion.load import EMBEDDED
from ...toolkit.diffusion.model import DiffusionModel
from ...toolkit.diffusion.prompt_length import find_cut_prompts
from ..config.images import DiffusionConfig
from ..config.subject import SubjectConfig
from .class_images import DRAWN
from .prompts import without_token
from .sizes import Size, trained_sizes

EMBEDDED_SIDE = 64  # pixels of the images that the embedded models have seen
REAL_BASES = (  # GiB that training with its defaults takes about -> base
    (27, "black-forest-labs/FLUX.1-dev"),
    (8, "stabilityai/stable-diffusion-xl-base-1.0"),
    (5, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
)
CROPPED = 1 / 3  # of an image that is cut off before it is named
MANY_DRAWS = 1000  # of each image, above which more images are worth more than more steps


@dataclass
class Bucket:
    """Images that are brought to one size."""

    width: int
    height: int
    images: int
    share: float
    """Of all draws, 0 to 1."""


@dataclass
class ImageSummary:
    """What `summarize_images` finds. Counts are of images, mirrored ones counted once."""

    images: int
    draws_per_image: dict[str, float]
    """How often an image is drawn in the whole run -> share of the images, for each number of repeats."""
    caption_sources: dict[str, int]
    """.txt, .json, metadata.csv, a folder's name, or 'the prompt' -> images."""
    buckets: list[Bucket]
    folders: dict[str, int] = field(default_factory=dict)
    """Folder -> images that are used."""
    repeats: dict[str, int] = field(default_factory=dict)
    """Folder -> repeats, where they are not all alike."""
    enlarged: list[str] = field(default_factory=list)
    cropped: list[str] = field(default_factory=list)
    """Images of which more than a third is cut off."""
    empty_captions: list[str] = field(default_factory=list)
    without_token: list[str] = field(default_factory=list)
    """Images with a caption that does not say the subject's token."""
    repeated_captions: dict[str, int] = field(default_factory=dict)
    repeated_images: list[list[str]] = field(default_factory=list)
    """Files of the same bytes."""
    mask_shares: dict[str, float] = field(default_factory=dict)
    preserved: list[str] = field(default_factory=list)
    """Prompts at which the untrained model's predictions are held."""
    class_images: dict[str, int] = field(default_factory=dict)
    """Folder, or how they are made -> images for prior preservation."""
    references: dict[int, int] = field(default_factory=dict)
    """How many references an image has -> images."""
    held_out: list[str] = field(default_factory=list)
    """Photos that likeness is measured by."""
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The summary for people, without the warnings."""
        where = ", ".join(f"{number} in {folder}" for folder, number in self.folders.items())
        drawn = " or ".join(f"{times} times" for times in self.draws_per_image)
        sources = ", ".join(f"{number} from {source}" for source, number in self.caption_sources.items())
        sizes = ", ".join(
            f"{own.images} at {own.width} x {own.height}"
            + (f" ({own.share:.0%} of draws)" if len(self.buckets) > 1 else "")
            for own in self.buckets
        )
        found = [
            f"images    {self.images}: {where}; each drawn about {drawn}",
            f"captions  {sources}",
            f"sizes     {sizes}",
        ]
        if self.repeats:
            found.append("repeats   " + ", ".join(f"{number} x {folder}" for folder, number in self.repeats.items()))
        if self.mask_shares:
            mean = sum(self.mask_shares.values()) / len(self.mask_shares)
            found.append(f"masks     {len(self.mask_shares)}, which count {mean:.0%} of an image on average")
        if self.references:
            counts = (
                f"{many} references: {number} images" for many, number in sorted(self.references.items(), reverse=True)
            )
            found.append(f"pairs     {', '.join(counts)}")
        if self.class_images:
            found.append("class     " + ", ".join(f"{number} {where}" for where, number in self.class_images.items()))
        if self.held_out:
            found.append(f"held out  {list_names(self.held_out)}")
        if self.preserved:
            shown = [repr(text if len(text) < 60 else f"{text[:57]}...") for text in self.preserved]
            found.append(f"preserved {list_names(shown, 3)}")
        return found

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)


def summarize_images(config: DiffusionConfig, samples: Sequence[Sample], model: DiffusionModel) -> ImageSummary:
    """What a run with this config sees of these samples. model: of it, configs and tokenizers are read.

    Raises:
        UserError: as `find_samples` does.
    """
    own = [sample for sample in samples if not sample.flip]
    summary = ImageSummary(
        images=len(own),
        draws_per_image=count_draws(config, own),
        caption_sources=dict(Counter(source_kind(sample) for sample in own)),
        buckets=fill_buckets(config, own, model),
        folders={str(folder): number for folder, number in Counter(sample.path.parent for sample in own).items()},
    )
    if len({sample.repeats for sample in own}) > 1:
        summary.repeats = {sample.path.parent.name: sample.repeats for sample in own}
    look_at_sizes(summary, config, own, model)
    look_at_captions(summary, config, own)
    summary.repeated_images = find_repeated_images(own)
    if config.masks:
        summary.mask_shares = {sample.path.name: round(mask_share(sample, config.masks), 4) for sample in own}
    if config.preservation_weight:
        summary.preserved = sorted({without_token(sample.caption or config.prompt, config) for sample in own})
    if config.prior_folder is not None:
        folders = read_image_folders(config.prior_folder, skip_bad=config.skip_bad, option="--prior-folder")
        summary.class_images = {str(folder.path): len(folder.images) for folder in folders}
    elif config.prior_weight:
        summary.class_images = {f"made by the base for '{config.class_prompt}'": config.prior_images}
    references = config.references if isinstance(config, SubjectConfig) else ()
    if any(sample.references for sample in own):
        summary.references = dict(Counter(len(sample.references) for sample in own))
    summary.warnings = [
        *reference_notes(own, references),
        *base_warnings(config, own),
        *folder_warnings(config),
        *image_warnings(summary),
        *caption_warnings(summary, config, own, model),
    ]
    return summary


def source_kind(sample: Sample) -> str:
    """What kind of place an image's caption is from."""
    if not sample.source:
        return "the prompt" if sample.caption is None else "--also"
    if sample.source == f"{sample.path.stem}{Path(sample.source).suffix}":
        return Path(sample.source).suffix
    return sample.source if sample.source.startswith("metadata.") else "the folder's name"


def count_draws(config: DiffusionConfig, samples: Sequence[Sample]) -> dict[str, float]:
    """How often each image is drawn in the whole run -> share of images for which that is so."""
    total = sum(sample.repeats for sample in samples)
    drawn = config.steps * config.batch_size * config.gradient_accumulation
    counts = Counter(f"{drawn * sample.repeats / total:.3g}" for sample in samples)
    return {times: round(number / len(samples), 4) for times, number in counts.items()}


def fill_buckets(config: DiffusionConfig, samples: Sequence[Sample], model: DiffusionModel) -> list[Bucket]:
    """The sizes that images are brought to, and their shares of the draws."""
    draws: Counter[Size] = Counter()
    counts: Counter[Size] = Counter()
    for sample in samples:
        for size in trained_sizes(config, sample, model):
            draws[size] += sample.repeats
            counts[size] += 1
    total = draws.total()
    return [Bucket(*size, counts[size], float(Fraction(number, total))) for size, number in draws.most_common()]


def look_at_sizes(
    summary: ImageSummary, config: DiffusionConfig, samples: Sequence[Sample], model: DiffusionModel
) -> None:
    """Images that are enlarged, and those that lose much by cropping."""
    for sample in samples:
        width, height = sample_size(sample)
        name = f"{sample.path.name} ({width} x {height})"
        for across, down in trained_sizes(config, sample, model):
            scale = (min if config.crop == "pad" else max)(across / width, down / height)
            if scale > 1 and name not in summary.enlarged:
                summary.enlarged.append(name)
            cropped = config.crop != "pad" and 1 - across * down / (width * height * scale**2) > CROPPED
            if cropped and name not in summary.cropped:
                summary.cropped.append(name)


def look_at_captions(summary: ImageSummary, config: DiffusionConfig, samples: Sequence[Sample]) -> None:
    """Captions that are empty, do not say the token, or are another image's too."""
    for folder in read_folders(config):
        summary.empty_captions += folder.captions.empty
    captions = [sample.caption for sample in samples if sample.caption]
    if any(sample.references for sample in samples):
        return  # captions say what becomes of the references, with a token or without
    if config.images is not None and (config.images / DRAWN).is_file():
        return  # the base's own images teach it no subject
    summary.without_token = [
        sample.path.name
        for sample in samples
        if sample.caption and not any(token in sample.caption for token in config.subjects)
    ]
    summary.repeated_captions = {text: number for text, number in Counter(captions).items() if number > 1}


def find_repeated_images(samples: Sequence[Sample]) -> list[list[str]]:
    """Names of files with the same bytes."""
    groups: dict[tuple[int, str], list[str]] = {}
    sizes = Counter(sample.path.stat().st_size for sample in samples)
    for sample in samples:
        if sizes[size := sample.path.stat().st_size] > 1:
            groups.setdefault((size, file_hash(sample.path)), []).append(sample.path.name)
    return [names for names in groups.values() if len(names) > 1]


def read_folders(config: DiffusionConfig) -> list[ImageFolder]:
    """The folders that the images are from."""
    places = [(config.images, "--images")]
    places += [
        (Path(folder), "--also") for folder in (config.also.values() if isinstance(config, SubjectConfig) else ())
    ]
    return [
        own
        for place, option in places
        if place is not None
        for own in read_image_folders(place, skip_bad=config.skip_bad, option=option)
    ]


def base_warnings(config: DiffusionConfig, samples: Sequence[Sample]) -> list[str]:
    """That an embedded base does not know photos, where these images are larger than anything that it was shown."""
    photos = [sample for sample in samples if min(sample_size(sample)) > EMBEDDED_SIDE]
    if config.base not in EMBEDDED or not photos:
        return []
    return [
        f"THE BASE {config.base} KNOWS DRAWINGS OF {EMBEDDED_SIDE} PIXELS ONLY, as a demo: of photos it makes blobs. For photos name "
        f"a real one with --base, such as {suggested_base()}; `rankfold plan subject` says exactly what it will take."
    ]


def suggested_base() -> str:
    """A base that this machine can train, by its free memory."""
    memory = free_memory(device()) or psutil.virtual_memory().available
    least, name = next(row for row in REAL_BASES if memory >= row[0] * GIB or row is REAL_BASES[-1])
    return f"{name} (about {least} GiB of memory)"


def folder_warnings(config: DiffusionConfig) -> list[str]:
    """What the folders hold that is not used, but for folders that another setting names."""
    named = {Path(value).resolve() for value in vars(config).values() if isinstance(value, (str, Path)) and value}
    if isinstance(config, SubjectConfig):
        named |= {Path(folder).resolve() for folder in config.also.values()}
    return [text for folder in read_folders(config) for text in folder.notes(named)]


def image_warnings(summary: ImageSummary) -> list[str]:
    """What is probably not meant about the images."""
    found = []
    if summary.enlarged:
        found.append(
            f"{len(summary.enlarged)} of {summary.images} images are smaller than they are trained at and are enlarged: "
            f"{list_names(summary.enlarged)}. Take larger ones, or a smaller --resolution."
        )
    if summary.cropped:
        found.append(
            f"More than a third is cut off {list_names(summary.cropped)}: keep the subject in the middle, or take --crop bucket or pad."
        )
    for names in summary.repeated_images:
        found.append(f"{list_names(names)} are the same image and count as often.")
    few = [name for name, share in summary.mask_shares.items() if share < 0.01]
    if few:
        found.append(f"The masks of {list_names(few)} count less than 1 % of the image.")
    if (times := [float(text) for text in summary.draws_per_image]) and min(times) > MANY_DRAWS:
        found.append(f"Each image is drawn more than {MANY_DRAWS} times: fewer --steps are enough.")
    return found


def caption_warnings(
    summary: ImageSummary, config: DiffusionConfig, samples: Sequence[Sample], model: DiffusionModel
) -> list[str]:
    """What is probably not meant about the captions."""
    found = []
    if summary.empty_captions:
        found.append(
            f"The captions of {list_names(summary.empty_captions)} are empty: these images are trained with '{config.prompt}'."
        )
    captioned = [sample for sample in samples if sample.caption]
    if summary.without_token:
        if len(summary.without_token) == len(samples):
            found.append(
                f"No caption says {' or '.join(config.subjects)}, so the adapter will not answer to it: put it into the captions, or give "
                "with --token a word that they have in common."
            )
        else:
            found.append(
                f"{len(summary.without_token)} of {len(captioned)} captions do not say {' or '.join(config.subjects)}: "
                f"{list_names(summary.without_token)}."
            )
    names: dict[str, list[str]] = {}
    for sample in samples:
        names.setdefault(sample.caption or config.prompt, []).append(sample.path.name)
    for cut in find_cut_prompts(model, names):
        found.append(f"The caption of {list_names(names[cut.prompt])} is cut: {cut.describe()}.")
    return found
