"""`rankfold evaluate instruct`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from ...toolkit.core.errors import UserError
from .options import parse_options


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    run: Path | None = None
    """Run folder whose adapter is tuned."""
    adapters: tuple[Path, ...] = ()
    """More adapter folders."""
    strength: tuple[float, ...] = ()
    """One number for all adapters, or one for each; 1 is as trained."""
    base: str | None = None
    """Base model; unset means the run's, or 'tiny-vlm'."""
    data: Path | None = None
    """Questions with answers: {"image", "question", "answer" | "answers" | "choices" and "answer"}, or conversations."""
    images: Path | None = None
    """Folder that the images' paths start from; unset means the data file's own."""
    video_frames: Annotated[int, Ge(1)] | None = None
    """Most frames of a video that the base is given; unset means as the adapter was trained."""
    retention: Path | None = None
    """Questions of what the base could do before; what was forgotten is shown."""
    ask_short: bool = False
    """Append LLaVA's instruction for short answers to each question."""
    max_new_tokens: Annotated[int, Ge(1)] | None = None
    """Maximum tokens of an answer; unset follows the longest right answer."""
    columns: tuple[str, ...] = ()
    """Columns of --data under other names, each as OURS=THEIRS: question=Frage, or ignore=THEIRS."""
    split: str = ""
    """Which split of a folder that holds several."""
    skip_bad: bool = False
    """Leave out rows that cannot be used instead of stopping."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """dtype of the model."""
    device: str = ""
    """Where to run: cuda, xpu, mps or cpu; unset means the GPU if there is one."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the shuffled-image control."""
    out: Path | None = None
    """Folder for evaluation.json and answers.jsonl; unset means evaluation/ in the run."""
    vlmevalkit: bool = False
    """Also write the questions as a table that VLMEvalKit reads."""
    lmms_eval: bool = False
    """Also write the questions as a task of lmms-eval."""


def evaluate_instruct(argv: list[str]) -> None:
    options = parse_options(EvaluateOptions, argv, "evaluate instruct")
    if options.data is None:
        raise UserError("--data is missing: give a file with questions and answers.")
    if options.run is None and not options.adapters:
        raise UserError("--run is missing: give the run (or --adapters) that is to be set against its base.")
    from ...training.engine.processes import distributed_state
    from ...training.evaluation.instruct import evaluate
    from ...training.evaluation.instruct_report import format_report, write_figures
    from ...training.evaluation.items import count_leaked, read_item_file, read_items, write_vlmevalkit
    from ...training.evaluation.lmms_eval import write_lmms_eval

    found = read_item_file(
        options.data,
        options.images,
        ask_short=options.ask_short,
        columns=options.columns,
        split=options.split,
        skip_bad=options.skip_bad,
    )
    items = found.items
    retention = read_items(options.retention, options.images) if options.retention else []
    out = options.out or (options.run / "evaluation" if options.run else Path("evaluation"))
    first = distributed_state().is_main_process
    if first:
        print(options.data, *found.describe(), sep="\n  ")
    if options.vlmevalkit and first:
        table = write_vlmevalkit(items, out / f"{options.data.stem}.tsv")
        print(f"{table}\n{vlmevalkit_advice(options, table)}")
    if options.lmms_eval and first:
        task = write_lmms_eval(items, out / "lmms_eval", options.data.stem, options.max_new_tokens or 64)
        print(f"{task}\n{lmms_eval_advice(options, task)}")
    vision, trained_on = open_tuned(options)
    figures = evaluate(vision, items, retention=retention, max_new_tokens=options.max_new_tokens, seed=options.seed)
    if not first:
        return
    if trained_on is not None:
        figures["leaked"] = count_leaked(items, trained_on)
    print(format_report(figures))
    print(write_figures(out, figures))


def vlmevalkit_advice(options: EvaluateOptions, table: Path) -> str:
    """How to run the table elsewhere."""
    run = options.run or "RUN"
    return (
        "To run it in VLMEvalKit: put the table into its LMUData folder, write the tuned model whole with\n"
        f"  rankfold export {run} --format merged\n"
        f"and there: python run.py --data {table.stem} --model MODEL (MODEL: an entry of its config that loads the merged folder)"
    )


def lmms_eval_advice(options: EvaluateOptions, task: Path) -> str:
    """How to run the task elsewhere."""
    run = options.run or "RUN"
    return (
        "To run it in lmms-eval: write the tuned model whole with\n"
        f"  rankfold export {run} --format merged\n"
        f"and there: python -m lmms_eval --model MODEL --model_args pretrained={run}/export/merged "
        f"--tasks {Path(options.data or '').stem} --include_path {task} (MODEL: its class for the base, such as llava_hf or qwen2_5_vl)"
    )


def open_tuned(options: Any) -> tuple[Any, list[Any] | None]:
    """The model with its adapters, and the conversations that it was trained on where they are still there."""
    from ...pipelines.chat import open_chat
    from ...toolkit.core.devices import parse_device
    from ...toolkit.data.conversations import read_conversations

    adapters, base, template, trained_on = list(options.adapters), options.base, None, None
    if options.run is not None:
        run, config = instruct_run(options.run)
        adapters.insert(0, run.finished_adapter())
        base = base or config.base
        template = (run.adapter / "chat_template.jinja").read_text(encoding="utf-8") if config.chat_template else None
        if config.data is not None and Path(config.data).exists():
            trained_on = read_conversations(
                config.data, config.images, skip_bad=True, columns=config.columns, split=config.split
            ).rows
    if options.strength and not adapters:
        raise UserError("--strength says how strong adapters are: give one by --run or --adapters, or leave it out.")
    strengths = options.strength * len(adapters) if len(options.strength) == 1 else options.strength
    vision = open_chat(
        base or "tiny-vlm",
        adapters,
        strengths,
        precision=options.precision,
        device=parse_device(options.device),
        template=template,
        video_frames=options.video_frames,
    )
    return vision, trained_on


def instruct_run(folder: Path) -> tuple[Any, Any]:
    """A run of visual instruction tuning, and its config.

    Raises:
        UserError: when it is a run of another kind.
    """
    from ...toolkit.core.run_folder import Run
    from ...training.config.instruct import ConversationConfig
    from ...training.config.yaml_file import from_yaml

    run = Run.open(folder)
    config = from_yaml(run.config_file)
    if not isinstance(config, ConversationConfig):
        raise UserError(f"{folder} is a run on a diffusion model: use `rankfold sample --run {folder}`.")
    return run, config
