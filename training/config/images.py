"""What every training on a folder of images has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt, Le, Lt

from ...toolkit.diffusion.base_files import join_base
from ...toolkit.formats.adapter_facts import AdapterFacts
from .base import AUTO, AutoFloat, AutoInt, LoopConfig

if TYPE_CHECKING:
    AutoShift: TypeAlias = float | Literal["auto"]
else:
    AutoShift = Annotated[float, Gt(0)] | Literal["auto"] | None


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(LoopConfig):
    """What every training on a folder of images has (DreamBooth, Ruiz et al. 2022, arXiv 2208.12242)."""

    images: Path | None = None
    """Folder with the images of the subject."""
    base: str = "tiny"
    """Base model: 'tiny' (embedded), a folder, or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5; or a file."""
    vae: Path | None = None
    """Where --base is a file: the file with its autoencoder; it becomes a part of the base's name."""
    text_encoder: tuple[Path, ...] = ()
    """Where --base is a file: the files with its text encoders."""
    layout: str = ""
    """Where --base is a file: pipeline folder or hub id with configs, tokenizers and missing parts; unset: the one usual for it."""
    token: str = "sks"
    """Rare word that will stand for the subject."""
    class_noun: str = ""
    """What the subject is an instance of (dog, mug, person); the embedded models' is creature, others have none."""
    resolution: Annotated[int, Ge(0), Le(16_384)] = 0
    """Side of the training images in pixels; 0 means the base model's own."""
    extra_resolutions: tuple[Annotated[int, Ge(1), Le(16_384)], ...] = ()
    """More sides, in pixels, at which every image is trained as often; previews and class images have --resolution."""
    crop: Literal["center", "pad", "bucket"] = "center"
    """center: crop the middle square; pad: the whole image on a border; bucket: its own shape, with about as many pixels."""
    flip: bool = False
    """Also train on mirrored images (not for subjects whose left and right differ)."""
    skip_bad: bool = False
    """Leave out images that cannot be read instead of stopping."""
    masks: str = ""
    """Folder with a PNG for each image, white where the subject is; 'alpha' takes the images' own transparency."""
    unmasked_weight: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Loss weight outside the masks."""
    caption_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Fraction of samples trained without their caption."""
    caption_orders: Annotated[int, Ge(0)] = 0
    """Also use this many shuffled orders of a caption's tags; the first tag stays in front."""
    preservation_weight: Annotated[float, Ge(0)] = 1.0
    """Holds captions without the token to what the untrained model predicts for them, on a quarter of the rows; 0 is off."""
    prior_weight: Annotated[float, Ge(0)] = 0.0
    """Weight of the prior preservation loss (class images); 0 turns it off, 1 is usual."""
    prior_folder: Path | None = None
    """Images of the class of one's own (regularisation images) with captions or without, instead of images that the base makes."""
    prior_images: Annotated[int, Ge(1)] = 50
    """Class images, made once by the base model and kept."""
    min_snr_gamma: Annotated[float, Gt(0)] | None = None
    """Min-SNR loss weighting (Hang et al. 2023, arXiv 2303.09556); 5 is usual, unset is off."""
    debiased: bool = False
    """Debiased loss weighting (Yu et al. 2024, arXiv 2310.08442), instead of --min-snr-gamma."""
    noise_offset: Annotated[float, Ge(0)] = 0.0
    """Noise offset: adds noise that is constant over an image, so that brightness is learned too; 0.05 is usual."""
    timestep_sampling: Literal["uniform", "logit_normal", "mode"] = "logit_normal"
    """Distribution of the timesteps of flow models (Esser et al. 2024, section 3.1); others draw uniformly."""
    timestep_shift: AutoShift = AUTO
    """Timestep shift of flow models: above 1 trains more at high noise, as large images need; auto: as the base samples; unset: its own."""
    preview_prompts: tuple[str, ...] = ("a {token} {noun} on the beach", "a {token} {noun} in the snow")
    """Prompts of the previews; {token} and {noun} are filled in."""
    preview_steps: Annotated[AutoInt, Ge(1)] = AUTO
    """Denoising steps per preview; unset: the base's own."""
    guidance_scale: AutoFloat = AUTO
    """Guidance of previews and class images, and of `rankfold sample --run`; unset: the stock pipeline's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "base", join_base(self.base, self.vae, self.text_encoder, self.layout))
        for name, value in (("vae", None), ("text_encoder", ()), ("layout", "")):
            object.__setattr__(self, name, value)

    @property
    def drawing_base(self) -> str:
        """The base that the settings of drawing are of, and that an adapter of this run is for."""
        return self.base

    @property
    def prompt(self) -> str:
        """The prompt of an image without a caption."""
        return f"a {self.token} {self.class_noun}"

    @property
    def class_prompt(self) -> str:
        """The prompt of the class images."""
        return f"a {self.class_noun}"

    @property
    def subjects(self) -> dict[str, str]:
        """Token -> class noun of every subject."""
        return {self.token: self.class_noun}

    @property
    def facts(self) -> AdapterFacts:
        """What an adapter of this run says of itself."""
        return AdapterFacts(self.base, token=self.token, class_noun=self.class_noun, precision=self.precision)
