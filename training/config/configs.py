"""Configuration of training runs: frozen dataclasses, read from the command line or YAML, written to every run folder.

Only the standard library is imported here, so that `rankfold --help` stays quick.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from pathlib import Path, PurePath
from typing import Any, ClassVar, Literal

from ...toolkit.core.errors import UserError, nearest
from ...toolkit.core.paths import at_home, home, name_fault
from ...toolkit.core.systems import WINDOWS
from ...toolkit.core.texts import read_text
from ..search.evolution import EvolutionConfig

Part = Literal["language-attention", "language-mlp", "vision-attention", "vision-mlp", "projector"]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What every training run has: steps, optimizer, logging, checkpoints."""

    unused_parameters: ClassVar[bool] = False
    """Whether a step may leave parameters out, which several processes must know of."""

    out: Path = Path("runs/subject")
    """Run folder."""
    steps: int = 300
    """Optimizer steps."""
    batch_size: int = 4
    """Pictures per forward pass, over all processes together."""
    gradient_accumulation: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 1e-3
    """Peak learning rate of the adapter."""
    lr_scheduler: str = "constant"
    """A scheduler of diffusers: constant, constant_with_warmup, linear, cosine, polynomial, ..."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    optimizer: str = "AdamW"
    """Name of a class in torch.optim, or AdamW8bit, Lion8bit, Prodigy (learning rate 1), AdamWScheduleFree."""
    weight_decay: float = 0.01
    """Weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    ema_decay: float = 0.0
    """Decay of the moving average of the adapter's weights (0.99 to 0.9999); 0 keeps none."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the base model; the adapter itself is always trained in fp32."""
    quantize: Literal["none", "nf4", "int8", "fp8"] = "none"
    """Number format of the base model's linear layers in memory; the text encoders' too."""
    gradient_checkpointing: bool = False
    """Less memory, about a third more time."""
    compile: bool = False
    """Compile the denoiser's repeated blocks (torch.compile): the first steps take minutes, the others less; needs a C++ compiler."""
    seed: int = 0
    """All randomness is a function of seed, step and sample."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl; the device is not waited for in between."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    preview_every: int = 100
    """Steps between previews; 0 makes none."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Also log to this tracker, through accelerate."""
    threads: int = 0
    """Torch threads on a CPU; 0 takes as many as find a core that no other process keeps busy when the run starts."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, at_home(value))


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Which adapter."""

    adapter: str = "moslora"
    """Adapter variant, see 'rankfold adapters'."""
    rank: int = 8
    """Width of the bottleneck."""
    alpha: float = 8.0
    """The change is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    adapter_options: dict[str, str] = field(default_factory=dict)
    """Fields of the variant's own config, as in: --adapter-options mixer frozen."""
    lora_plus_ratio: float = 1.0
    """Up-factors learn so many times faster than the rest (LoRA+, Hayou et al. 2024, arXiv 2402.12354); 4 to 16 is usual."""


@dataclass(frozen=True, kw_only=True)
class AdapterChoice(AdapterSettings):
    """Where it attaches to a diffusion model."""

    target_modules: tuple[str, ...] = ()
    """Names of the denoiser's layers to adapt; unset means its attention layers."""
    train_text_encoder: bool = False
    """Adapt the text encoders too."""
    text_target_modules: tuple[str, ...] = ()
    """Names of the text encoders' layers to adapt; unset means their attention layers."""
    token_vectors: int = 0
    """The token becomes a new word of so many vectors, learned beside the adapter; 0 leaves it as the text encoders have it."""
    text_learning_rate: float | None = None
    """Learning rate of the text encoders' adapters and of the token's vectors; unset means the same."""


@dataclass(frozen=True, kw_only=True)
class PictureConfig(LoopConfig):
    """What every training on a folder of pictures has (DreamBooth, Ruiz et al. 2022, arXiv 2208.12242)."""

    images: Path | None = None
    """Folder with the pictures of the subject."""
    base: str = "tiny"
    """Base model: 'tiny' (embedded), a folder, or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5."""
    token: str = "sks"
    """Rare word that will stand for the subject."""
    class_noun: str = "creature"
    """What the subject is an instance of."""
    resolution: int = 0
    """Side of the training pictures in pixels; 0 means the base model's own."""
    crop: Literal["center", "pad", "bucket"] = "center"
    """center: crop the middle square; pad: the whole picture on a border; bucket: its own shape, with about as many pixels."""
    flip: bool = False
    """Also train on mirrored pictures (not for subjects whose left and right differ)."""
    skip_bad: bool = False
    """Leave out pictures that cannot be read instead of stopping."""
    masks: str = ""
    """Folder with a PNG for each picture, white where the subject is; 'alpha' takes the pictures' own transparency."""
    unmasked_weight: float = 0.0
    """What the error outside the masks counts for."""
    caption_dropout: float = 0.0
    """Share of the rows whose caption is left out."""
    caption_orders: int = 0
    """Captions of tags are also used in so many other orders; the first tag stays in front."""
    preservation_weight: float = 1.0
    """Holds captions without the token to what the untrained model predicts for them, on a quarter of the rows; 0 is off."""
    prior_weight: float = 0.0
    """Weight of the prior preservation loss (class pictures); 0 turns it off, 1 is usual."""
    prior_pictures: int = 50
    """Class pictures, made once by the base model and kept."""
    min_snr_gamma: float | None = None
    """Min-SNR loss weighting (Hang et al. 2023, arXiv 2303.09556); 5 is usual, unset is off."""
    debiased: bool = False
    """Debiased loss weighting (Yu et al. 2024, arXiv 2310.08442), instead of --min-snr-gamma."""
    noise_offset: float = 0.0
    """Adds noise that is alike in all of a picture, so that light and dark are learned too; 0.05 is usual."""
    timestep_sampling: Literal["uniform", "logit_normal", "mode"] = "logit_normal"
    """Where flow models are trained on the way from noise to picture (Esser et al. 2024, section 3.1); others draw alike."""
    timestep_shift: float = 1.0
    """Above 1 flow models are trained more where the noise is, as large pictures ask for."""
    preview_prompts: tuple[str, ...] = ("a {token} {noun} on the beach", "a {token} {noun} in the snow")
    """Prompts of the previews; {token} and {noun} are filled in."""
    preview_steps: int = 20
    """Denoising steps of a preview."""
    guidance_scale: float = 4.0
    """Guidance of previews and class pictures, and of `rankfold sample --run`."""

    @property
    def prompt(self) -> str:
        """The prompt of a picture without a caption."""
        return f"a {self.token} {self.class_noun}"

    @property
    def class_prompt(self) -> str:
        """The prompt of the class pictures."""
        return f"a {self.class_noun}"

    @property
    def subjects(self) -> dict[str, str]:
        """Token -> class noun of every subject."""
        return {self.token: self.class_noun}

    @property
    def facts(self) -> dict[str, str]:
        """What an adapter of this run says of itself."""
        return {name: getattr(self, name) for name in ("base", "token", "class_noun", "precision")}


@dataclass(frozen=True, kw_only=True)
class SubjectConfig(PictureConfig, AdapterChoice):
    """Teaches a diffusion model a subject, or several, from a few pictures."""

    also: dict[str, str] = field(default_factory=dict)
    """More subjects for the same adapter, token and class noun before the folder: --also "sks2 cat" photos/cat."""
    evaluate_every: int = 0
    """Steps between measurements of likeness and prompt fidelity; 0 makes none."""
    evaluate_images: Path | None = None
    """Photos that likeness is measured by; unset means one in five of --images, which is then not trained on."""
    hold_out: tuple[str, ...] = ()
    """Names of the photos that are held out, in the place of one in five."""
    evaluate_prompts: str = ""
    """object, live, world, or a file, as in `rankfold evaluate`; unset means world for embedded bases and object for others."""
    evaluate_clip: str = ""
    """An open_clip model (MODEL:WEIGHTS, hf-hub:... or local-dir:...); unset means the embedded one for embedded bases."""
    keep: Literal["last", "best"] = "last"
    """Which step's adapter becomes the run's; best needs --evaluate-every."""
    patience: int = 0
    """Stop after so many measurements without a sure gain; 0 never does."""
    shard_base: bool = False
    """Share the frozen denoiser out over the devices (FSDP2) instead of holding it whole on each."""

    @property
    def subjects(self) -> dict[str, str]:
        more = [name.strip().split(None, 1) for name in self.also]
        return super().subjects | {token: noun for token, noun in more}


@dataclass(frozen=True, kw_only=True)
class ComposeSettings:
    """How one adapter is made of several (learned weights: arXiv 2402.15414)."""

    adapters: tuple[str, ...] = ()
    """Run folders, adapter folders, LoRA files, or names in the library."""
    weights: tuple[float, ...] = ()
    """Fixed weights, one for each adapter; unset means learned if there is something to learn from, and otherwise alike (1 / N)."""
    tie: Literal["layer", "block", "global"] = "layer"
    """Learned weights of their own for each layer, each block, or one set for the whole model."""
    temperature: float = 1.0
    """Learned weights are softmax(v / temperature)."""
    free: bool = False
    """Learned weights are v itself, neither positive nor summing to 1."""
    max_rank: int = 0
    """Cut the sum to this rank, layer by layer, and print the error; 0 keeps it exact, at the sum of the ranks."""
    merge: str | None = None
    """Merge by a method of PEFT instead: linear, svd, ties, dare_linear, dare_ties, magnitude_prune, ..."""
    density: float = 0.5
    """Share of the values that the pruning methods of --merge keep."""


@dataclass(frozen=True, kw_only=True)
class ComposeConfig(PictureConfig, ComposeSettings):
    """Makes one adapter of several; with pictures, learns how much of each to take in every layer."""

    out: Path = Path("runs/composed")
    """Run folder."""
    preservation_weight: float = 0.0
    """Not for composing: what it could preserve is already in its sources."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings(EvolutionConfig):
    """The space of GLoRA structures that is searched (Chavan et al. 2023, arXiv 2306.07967)."""

    rank: int = 4
    """Rank of the low-rank choices."""
    form: Literal["matmul", "elementwise"] = "matmul"
    """How A meets the weight: matmul (folds into LoRA), elementwise (the released code)."""
    a_rate: float = 1.0
    """Factor on the learning rate of A."""
    choices_a: tuple[str, ...] = ("lora", "vector", "constant", "none")
    """Choices of the weight scale A."""
    choices_b: tuple[str, ...] = ("lora", "vector", "constant", "none")
    """Choices of the weight shift B."""
    choices_c: tuple[str, ...] = ("lora", "vector", "none")
    """Choices of the prompt C."""
    choices_d: tuple[str, ...] = ("vector", "constant", "none")
    """Choices of the bias scale D."""
    choices_e: tuple[str, ...] = ("vector", "constant", "none")
    """Choices of the bias shift E."""
    limit: int = 0
    """Most parameters of a structure; 0 means as many as plain LoRA of this rank has on the same layers."""
    largest_every: int = 0
    """Every so many steps the largest structure is trained (sandwich rule); 0 means random ones only."""
    held_out_share: float = 0.2
    """Share of the data that structures are judged on, and that is then not trained on; at least one row."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(PictureConfig, SearchSettings):
    """Searches each layer's own GLoRA structure: a supernet is trained, then structures are bred and judged on held-out pictures."""

    unused_parameters: ClassVar[bool] = True

    out: Path = Path("runs/search")
    """Run folder."""
    steps: int = 1000
    """Optimizer steps of the supernet."""
    target_modules: tuple[str, ...] = ()
    """Names of the denoiser's layers; unset means its attention layers."""
    train_text_encoder: bool = False
    """Search the text encoders' layers too."""
    text_target_modules: tuple[str, ...] = ()
    """Names of the text encoders' layers; unset means their attention layers."""
    held_out: Path | None = None
    """Folder with the pictures that structures are judged on, in the place of a share of --images."""
    held_out_draws: int = 32
    """Noise and timesteps drawn once for each held-out picture."""


@dataclass(frozen=True, kw_only=True)
class ConversationConfig(LoopConfig):
    """What every training on conversations about pictures has (visual instruction tuning, Liu et al. 2023, arXiv 2304.08485)."""

    unused_parameters: ClassVar[bool] = True  # rows without a picture use no part of the tower

    out: Path = Path("runs/instruct")
    """Run folder."""
    data: Path | None = None
    """Conversations: LLaVA JSON, ShareGPT, chat messages or questions, as .json, .jsonl, .parquet or a data-set folder."""
    images: Path | None = None
    """Folder that the pictures' paths start from; unset means the data file's own."""
    base: str = "tiny-vlm"
    """Base model: 'tiny-vlm' (embedded), a folder, or a hub id such as llava-hf/llava-1.5-7b-hf."""
    chat_template: Path | None = None
    """File with a chat template in the place of the base's own."""
    pad_to_square: bool = False
    """Give pictures borders in the processor's mean colour, so that one that crops cuts nothing off; LLaVA-1.5 was trained so."""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """How attention is calculated."""
    epochs: float | None = None
    """Passes over the data, in the place of --steps."""
    learning_rate: float = 2e-4
    """Peak learning rate of the adapter."""
    replay: Path | None = None
    """More conversations, of what the base can do already and shall keep."""
    replay_share: float = 0.25
    """Share of the rows that come from --replay."""
    skip_bad: bool = False
    """Leave out rows that cannot be used instead of stopping."""
    max_length: int = 2048
    """Most tokens of a row, those of pictures counted; longer rows are left out."""
    shorten: bool = False
    """Of a longer row keep as many exchanges as fit, from the first; a picture is never cut."""
    group_by_length: bool = True
    """Batches of rows of similar length, so that little is padding."""
    packing: bool = False
    """Put a batch's rows end to end in one sequence, in which none sees another, so that no padding is computed."""
    workers: int = 2
    """Processes that read pictures ahead; 0 reads them when they are wanted."""
    preview_rows: int = 4
    """Rows whose first question is answered in previews."""
    preview_tokens: int = 64
    """Most tokens of such an answer."""


@dataclass(frozen=True, kw_only=True)
class InstructConfig(ConversationConfig, AdapterSettings):
    """Teaches a vision-language model a task from pictures with questions and answers."""

    adapt: tuple[Part, ...] = ("language-attention", "language-mlp")
    """Parts whose linear layers get the adapter."""
    vision_alpha: float | None = None
    """Alpha of the tower's layers; unset means --alpha."""
    target_modules: tuple[str, ...] = ()
    """Names of layers, in the place of --adapt."""
    train_projector: bool = False
    """Train the projector between tower and language model in full, as LLaVA does."""
    projector_learning_rate: float | None = None
    """Its learning rate; unset means the adapter's."""
    shard_base: bool = False
    """Share the frozen language model out over the devices (FSDP2) instead of holding it whole on each."""


@dataclass(frozen=True, kw_only=True)
class InstructSearchConfig(ConversationConfig, SearchSettings):
    """Searches each layer's own GLoRA structure for a vision-language task, judged on held-out conversations."""

    out: Path = Path("runs/search-instruct")
    """Run folder."""
    steps: int = 1000
    """Optimizer steps of the supernet."""
    adapt: tuple[Part, ...] = ("language-attention", "language-mlp")
    """Parts whose linear layers are searched."""
    target_modules: tuple[str, ...] = ()
    """Names of layers, in the place of --adapt."""
    held_out: Path | None = None
    """Conversations that structures are judged on, in the place of a share of --data."""


@dataclass(frozen=True, kw_only=True)
class ComposeInstructConfig(ConversationConfig, ComposeSettings):
    """Makes one adapter of several of a vision-language model; with conversations, learns how much of each to take in every layer."""

    out: Path = Path("runs/composed-instruct")
    """Run folder."""
    learning_rate: float = 0.05
    """Peak learning rate of the weights."""


def is_fixed(config: LoopConfig) -> bool:
    """Whether it is a composition that has nothing to learn its weights from."""
    return (isinstance(config, ComposeConfig) and config.images is None) or (
        isinstance(config, ComposeInstructConfig) and config.data is None
    )


LEAST = {
    "steps": 1, "batch_size": 1, "gradient_accumulation": 1, "rank": 1, "log_every": 1, "checkpoint_every": 1,
    "keep_checkpoints": 1, "preview_every": 0, "lr_warmup_steps": 0, "weight_decay": 0, "max_grad_norm": 0,
    "prior_weight": 0, "prior_pictures": 1, "preview_steps": 1, "threads": 0, "resolution": 0, "seed": 0, "max_rank": 0,
    "limit": 0, "largest_every": 0, "held_out_draws": 1, "noise_offset": 0, "preservation_weight": 0, "caption_orders": 0,
    "unmasked_weight": 0, "token_vectors": 0, "max_length": 16, "workers": 0, "preview_rows": 0, "preview_tokens": 1,
    "evaluate_every": 0, "patience": 0,
}  # fmt: skip
MOST = {
    "resolution": 16_384
}  # a larger picture is a mistake, and might take all the memory that there is before it fails
ABOVE_ZERO = (
    "learning_rate",
    "text_learning_rate",
    "alpha",
    "vision_alpha",
    "min_snr_gamma",
    "temperature",
    "density",
    "a_rate",
    "held_out_share",
    "timestep_shift",
    "lora_plus_ratio",
    "projector_learning_rate",
    "epochs",
)
BELOW_ONE = ("dropout", "ema_decay", "held_out_share", "caption_dropout", "unmasked_weight", "replay_share")


def check_numbers(config: LoopConfig) -> None:
    """Checks every field that can be checked without files or models.

    Raises:
        UserError: naming the first field that is out of range.
    """
    values = asdict(config)  # type: ignore[call-overload]
    check_folder_names(config.out, windows=WINDOWS)
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not isfinite(value):
            raise UserError(f"{flag} must be a finite number, not {value}.")
        if name in LEAST and value < LEAST[name]:
            raise UserError(f"{flag} must be at least {LEAST[name]}, not {value}.")
        if name in MOST and value > MOST[name]:
            raise UserError(f"{flag} must be at most {MOST[name]}, not {value}.")
        if name in ABOVE_ZERO and value is not None and not value > 0:
            raise UserError(f"{flag} must be above 0, not {value}.")
        if name in BELOW_ONE and value is not None and not 0 <= value < 1:
            raise UserError(f"{flag} must lie between 0 and below 1, not {value}.")
    if isinstance(config, PictureConfig):
        check_pictures(config)


def check_folder_names(out: PurePath, *, windows: bool) -> None:
    """Raises UserError for a run folder that Windows cannot have, some of which it would take for something else."""
    for name in out.relative_to(out.anchor).parts if windows else ():
        if name != ".." and (fault := name_fault(name)):
            raise UserError(f"--out {out}: Windows has no folder '{name}' ({fault}); choose another name.")


def check_pictures(config: PictureConfig) -> None:
    """Raises UserError when settings of training on pictures contradict each other."""
    if config.crop == "bucket" and config.prior_weight:
        raise UserError(
            "--prior-weight works with square pictures only: take --preservation-weight, or --crop center or pad."
        )
    if config.debiased and config.min_snr_gamma is not None:
        raise UserError("--debiased and --min-snr-gamma both weigh the timesteps: leave one of them out.")
    if isinstance(config, SubjectConfig):
        check_also(config)
        if not config.evaluate_every and (config.patience or config.keep == "best"):
            raise UserError(
                "--keep best and --patience go by measurements, of which there are none: set --evaluate-every."
            )
        if config.hold_out and (config.evaluate_images is not None or not config.evaluate_every):
            raise UserError(
                "--hold-out names photos of --images to measure by: it needs --evaluate-every, and no --evaluate-images."
            )
    if not config.token.strip():
        raise UserError("--token is empty: give a rare word that will stand for the subject, such as sks.")


def check_also(config: SubjectConfig) -> None:
    """Raises UserError when subjects beside the first cannot be told apart, or meet a setting that knows only one."""
    if not config.also:
        return
    for name in config.also:
        if len(name.split()) < 2:
            raise UserError(f"--also '{name}' must be a token and a class noun, such as 'sks2 cat', before the folder.")
    if len(config.subjects) <= len(config.also):
        raise UserError("--token and --also name the same token twice: give each subject one of its own.")
    one_only = {
        "--prior-weight": config.prior_weight,
        "--token-vectors": config.token_vectors,
        "--evaluate-every": config.evaluate_every,
    }
    for flag, value in one_only.items():
        if value:
            raise UserError(f"{flag} knows one subject only: leave it or --also out.")


METHODS: dict[str, type[LoopConfig]] = {
    "subject": SubjectConfig,
    "compose": ComposeConfig,
    "search": SearchConfig,
    "instruct": InstructConfig,
    "search-instruct": InstructSearchConfig,
    "compose-instruct": ComposeInstructConfig,
}


def to_yaml(config: LoopConfig) -> str:
    """The complete config as YAML, its method first; `from_yaml` reads it back."""
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return value.as_posix()  # which every system reads, so that a run may move to another
        return list(value) if isinstance(value, tuple) else value

    method = next(name for name, kind in METHODS.items() if type(config) is kind)
    return yaml.safe_dump({"method": method} | {k: plain(v) for k, v in asdict(config).items()}, sort_keys=False)


def from_yaml(path: Path) -> Any:
    """Reads a config file, of the class that its `method` names (subject if it names none); unset fields take their defaults.

    Raises:
        UserError: for a file that cannot be read, an unknown key (with the nearest name) or a value of the wrong type.
    """
    try:
        return from_text(read_text(home(path)), str(path))
    except OSError as error:
        raise UserError(f"Cannot read the config {path}: {error.strerror}.") from error


def from_text(text: str, path: str) -> Any:
    """The same for a config as text. path: what errors call it."""
    import yaml
    from pydantic import TypeAdapter, ValidationError

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        escape = "escape character" in str(error)
        hint = r" A path such as C:\photos goes without quotes, or in single ones." if escape else ""
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}{hint}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold 'name: value' lines.")
    method = values.pop("method", "subject")
    if method not in METHODS:
        raise UserError(f"{path}: unknown method '{method}'.{nearest(str(method), METHODS)}")
    known = [f.name for f in fields(METHODS[method])]
    for key in values:
        if key not in known:
            raise UserError(f"{path}: unknown key '{key}'.{nearest(str(key), known)}")
    try:
        return TypeAdapter(METHODS[method]).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: '{place}' cannot be {first['input']!r}: {first['msg'].lower()}.") from error
