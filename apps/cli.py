"""The command line: `rankfold ...`.

Heavy libraries are imported by the command that needs them, so that help and mistakes answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ..toolkit.errors import UserError, nearest
from .commands import HELP


def version() -> str:
    """The installed version."""
    from importlib.metadata import version as installed

    return installed("rankfold")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 a mistake that the message names, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return
    if words[0] in ("-V", "--version"):
        print(f"rankfold {version()}")
        return
    try:
        run_command(words)
    except UserError as error:
        print(f"rankfold: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def overview() -> str:
    """The text of `rankfold --help`."""
    width = max(len(name) for name in HELP)
    lines = [f"  {name:<{width}}  {text}" for name, text in HELP.items()]
    return "usage: rankfold COMMAND [options]\n\n" + "\n".join(lines) + "\n\nrankfold COMMAND --help says more."


def run_command(words: list[str]) -> None:
    """Finds the command, reads its options and runs it."""
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    if name not in COMMANDS:
        two = [command for command in COMMANDS if command.startswith(f"{words[0]} ")]
        if two:
            raise UserError(f"'{words[0]}' needs one more word: {', '.join(two)}.")
        raise UserError(f"there is no command '{words[0]}'.{nearest(words[0], COMMANDS)}")
    COMMANDS[name](words[len(name.split()) :])


def parse(kind: Any, words: list[str], name: str, default: Any = None) -> Any:
    """Reads the options of a dataclass from the command line."""
    import tyro

    extra = {} if default is None else {"default": default}
    return tyro.cli(kind, args=words, prog=f"rankfold {name}", description=HELP[name], **extra)


# ---------------------------------------------------------------------------------------------- train, resume


def train_subject(words: list[str]) -> None:
    """`--config FILE` gives the defaults; other options change them."""
    from ..training.config import SubjectConfig, from_yaml

    config_file, words = take_option(words, "--config")
    default = from_yaml(Path(config_file)) if config_file else SubjectConfig()
    config = parse(SubjectConfig, words, "train subject", default)
    quiet_libraries()
    from ..training.subject import train_subject as train

    report(train(config).folder)


def resume(words: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        run: Annotated[Path, positional()]
        """Run folder."""

    options = parse(Options, words, "resume")
    quiet_libraries()
    from ..training.subject import resume as go_on

    report(go_on(options.run).folder)


def stop(words: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        run: Annotated[Path, positional()]
        """Run folder."""

    from ..toolkit.runs import Run

    run = Run.open(parse(Options, words, "stop").run)
    if not run.is_live():
        raise UserError(f"{run.folder} is not running.")
    (run.requests / "stop").touch()
    print(f"{run.folder} will write a checkpoint and stop after this step.")


def report(folder: Path) -> None:
    """Says how a run ended and what can be done with it."""
    from ..toolkit.runs import Run

    if os.environ.get("RANK", "0") != "0":
        return
    status = Run(folder).status()
    if status["state"] == "stopped":
        print(f"Stopped at step {status['step']}; a checkpoint is kept. Go on with: rankfold resume {folder}")
    else:
        print(f"Done: {folder / 'adapter'}\nNext: rankfold sample --run {folder} --n 4 --grid")


def take_option(words: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of an option and the words without it."""
    for number, word in enumerate(words):
        if word == name and number + 1 < len(words):
            return words[number + 1], words[:number] + words[number + 2 :]
        if word.startswith(f"{name}="):
            return word.split("=", 1)[1], words[:number] + words[number + 1 :]
    return None, words


def positional() -> Any:
    """tyro's mark for an argument without a flag."""
    import tyro

    return tyro.conf.Positional


# ---------------------------------------------------------------------------------------------- sample, export


@dataclass(frozen=True)
class SampleOptions:
    run: Path | None = None
    """Run folder whose adapter is used."""
    adapters: tuple[Path, ...] = ()
    """More adapter folders."""
    strength: tuple[float, ...] = ()
    """One number for all adapters, or one for each; 1 is as trained."""
    base: str | None = None
    """Base model; unset means the run's, or 'tiny'."""
    prompt: str | None = None
    """What to show; unset means the run's own prompt."""
    negative_prompt: str = ""
    """What to steer away from."""
    n: int = 1
    """Number of pictures, from seeds seed, seed + 1, ..."""
    seed: int = 0
    """Seed of the first picture."""
    steps: int = 25
    """Denoising steps."""
    guidance_scale: float | None = None
    """How closely to follow the prompt; 1 is not at all; unset means the run's, or 4."""
    scheduler: str = "DDIMScheduler"
    """A scheduler class of diffusers."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format."""
    out: Path = Path("samples")
    """Folder for the pictures."""
    grid: bool = False
    """Also write all pictures on one sheet."""
    again: Path | None = field(default=None)
    """Repeat the picture of this PNG exactly (also spelled --from)."""


def sample(words: list[str]) -> None:
    words = ["--again" + word[len("--from") :] if word.split("=")[0] == "--from" else word for word in words]
    options = parse(SampleOptions, words, "sample")
    quiet_libraries()
    from ..pipelines.generate import generate, grid, read_recipe, repeat, save_picture

    if options.n < 1:
        raise UserError(f"--n must be at least 1, not {options.n}.")
    made = [repeat(read_recipe(options.again))] if options.again else generate(recipe_of(options), options.n)
    options.out.mkdir(parents=True, exist_ok=True)
    for picture, own in made:
        path = options.out / f"{own.seed:06d}.png"
        save_picture(path, picture, own)
        print(path)
    if options.grid:
        sheet = grid([picture for picture, _ in made], columns=min(4, len(made)))
        save_picture(options.out / "grid.png", sheet, made[0][1])
        print(options.out / "grid.png")


def recipe_of(options: SampleOptions) -> Any:
    """The recipe that the options ask for."""
    from ..pipelines.generate import Recipe
    from ..toolkit.runs import Run
    from ..training.config import from_yaml

    adapters, base, prompt = [str(path) for path in options.adapters], options.base, options.prompt
    guidance_scale = options.guidance_scale
    if options.run is not None:
        run = Run.open(options.run)
        config = from_yaml(run.config_file)
        adapters.insert(0, str(run.adapter))
        base, prompt = base or config.base, prompt or config.prompt
        guidance_scale = config.guidance_scale if guidance_scale is None else guidance_scale
    if prompt is None:
        raise UserError("--prompt is missing: say what the picture should show.")
    strengths = options.strength or (1.0,)
    if len(strengths) == 1:
        strengths *= len(adapters)
    return Recipe(
        prompt=prompt,
        base=base or "tiny",
        negative_prompt=options.negative_prompt,
        adapters=tuple(adapters),
        strengths=tuple(strengths),
        steps=options.steps,
        guidance_scale=4.0 if guidance_scale is None else guidance_scale,
        scheduler=options.scheduler,
        precision=options.precision,
        seed=options.seed,
    )


def export(words: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        run: Annotated[Path, positional()]
        """Run folder."""
        format: str = "diffusers"
        """diffusers, peft, kohya (A1111, ComfyUI), kohya-full (whole weight changes) or kohya-glora (GLoRA's own factors)."""
        out: Path | None = None
        """Folder for the file; unset means export/ in the run."""
        approximate: bool = False
        """Export the nearest plain LoRA when there is no exact one; its errors are measured and kept in the file."""
        max_error: float = 0.05
        """With --approximate: relative error of a layer's weight change, where a rank can be chosen for it, 0 to 1."""
        drop_bias: bool = False
        """Leave the adapter's changes of biases out."""

    options = parse(Options, words, "export")
    quiet_libraries()
    from ..pipelines.export import export_adapter
    from ..toolkit.runs import Run
    from ..training.config import from_yaml

    run = Run.open(options.run)
    config = from_yaml(run.config_file)
    proof = export_adapter(
        run.adapter,
        config.base,
        options.format,
        options.out or run.folder / "export",
        prompt=config.prompt,
        max_error=options.max_error if options.approximate else None,
        drop_bias=options.drop_bias,
    )
    print_proof(proof)


def print_proof(proof: Any) -> None:
    """The outcome of an export."""
    print(proof.path)
    ranks = (
        ""
        if proof.ranks is None
        else f", rank {proof.ranks[0]}" + (f" to {proof.ranks[1]}" if proof.ranks[1] != proof.ranks[0] else "")
    )
    print(
        f"read back by {proof.reader}: {proof.layers} layers{ranks}, largest weight error {proof.weight_error:.1e}, "
        f"largest picture difference {proof.picture_difference:.1e} (the adapter itself changes it by {proof.effect:.2f})"
    )
    if not proof.exact:
        print(
            f"an approximation: a layer's change is missed by up to {proof.approximation:.0%}, "
            f"and {proof.picture_error:.0%} of what the adapter does to a picture"
        )
    if proof.weight_error > 1e-5 or (proof.exact and proof.picture_difference > 1e-5):
        raise UserError(f"{proof.path} does not reproduce the adapter; do not use it, and please report this.")


def inspect(words: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        file: Annotated[Path, positional()]
        """A LoRA file, or the folder it lies in."""
        base: str | None = None
        """Base model; with it, each layer's change is set against the base's weight."""
        layers: bool = False
        """List every layer."""
        json: bool = False
        """Print all of it as JSON."""

    options = parse(Options, words, "inspect")
    quiet_libraries()
    from ..pipelines.generate import Recipe, load_pipeline
    from ..toolkit.formats.report import as_json, inspect_lora

    pipe = load_pipeline(Recipe(prompt="", base=options.base)) if options.base else None
    found = inspect_lora(options.file, pipe)
    if options.json:
        print(as_json(found))
    else:
        print_report(found, every_layer=options.layers)


def print_report(found: Any, *, every_layer: bool) -> None:
    """What `inspect` found, for people."""
    from collections import Counter

    count = lambda values: ", ".join(f"{v} ({n})" for v, n in Counter(values).most_common())  # noqa: E731
    print(f"{found.path}\n  format   {found.format}\n  base     {found.base}\n  alpha    {found.alpha}")
    print(f"  methods  {count(layer.method for layer in found.layers)}")
    print(f"  ranks    {count(layer.rank for layer in found.layers if layer.rank) or 'none'}")
    norms = sorted((layer.relative, layer.name) for layer in found.layers if layer.relative is not None)
    if norms:
        middle, strongest = norms[len(norms) // 2], norms[-1]
        print(f"  change   over the weight: median {middle[0]:.1%}, largest {strongest[0]:.1%} ({strongest[1]})")
    for key, value in found.facts.items():
        print(f"  {key}: {value if len(value) < 100 else value[:100] + ' ...'}")
    for loader, answer in found.loaders.items():
        print(f"  loads in {loader}: {answer}")
    if every_layer:
        for layer in found.layers:
            norm = "-" if layer.norm is None else f"{layer.norm:.4g}"
            relative = "" if layer.relative is None else f"{layer.relative:.2%} of the weight"
            print(
                f"    {layer.name}  {layer.method} r={layer.rank} scale={layer.scale:g} |change|={norm} {relative} {layer.fault}"
            )
    for line in found.advice:
        print(f"  ! {line}")
    if found.is_sound and not found.advice:
        print("  sound: no layer is zero or not finite")


# ---------------------------------------------------------------------------------------------- the rest


def adapters(words: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        markdown: bool = False
        """Print docs/adapters.md."""

    options = parse(Options, words, "adapters")
    if options.markdown:
        from ..toolkit.adapters.describe import markdown

        print(markdown(), end="")
        return
    from ..toolkit.adapters.registry import adapter_names, options_of

    for name in adapter_names():
        print(name)
        for option, text in options_of(name).items():
            print(f"    {option}: {text}")


def demo(words: list[str]) -> None:
    from .demo import DemoConfig

    config = parse(DemoConfig, words, "demo")
    quiet_libraries()
    from .demo import run_demo

    run_demo(config)


def build_tiny(words: list[str]) -> None:
    quiet_libraries()
    from ..training.tiny import BuildTinyConfig
    from ..training.tiny import build_tiny as build

    build(parse(BuildTinyConfig, words, "build-tiny", BuildTinyConfig()))


def doctor(words: list[str]) -> None:
    from .doctor import examine

    raise SystemExit(examine())


def quiet_libraries() -> None:
    """Keeps the progress bars and advice of the libraries out of our output."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo,
    "train subject": train_subject,
    "resume": resume,
    "stop": stop,
    "sample": sample,
    "export": export,
    "inspect": inspect,
    "adapters": adapters,
    "doctor": doctor,
    "build-tiny": build_tiny,
}


if __name__ == "__main__":
    main()
