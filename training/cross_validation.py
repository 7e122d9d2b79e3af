"""Cross-validation: how many steps a subject needs, where photos are too few to leave any out of the last training.

Each fold trains without some of the photos and is measured by these. The step that is best over all folds is how long the last
training, on all photos, goes on.
"""

from __future__ import annotations

from dataclasses import replace

from ..toolkit.data.subjects import find_samples
from ..toolkit.errors import UserError
from ..toolkit.runs import Run
from . import measuring
from .config import SubjectConfig
from .processes import is_first
from .start import preflight, resume, train


def cross_validated(config: SubjectConfig, folds: int) -> Run:
    """The run on all photos, for as many steps as `folds` other runs (in its folder) say. Folds that are done are not done again.

    Raises:
        UserError: for settings that exclude each other, fewer photos than folds, and as `train` does.
    """
    checks = {"--evaluate-every": not config.evaluate_every, "no --evaluate-images": config.evaluate_images is not None}
    for wanted, wrong in (checks | {"no --hold-out": config.hold_out}).items():
        if wrong:
            raise UserError(f"--folds holds other photos out in turn: it needs {wanted}.")
    if config.images is None:
        raise UserError("--images is missing: give the folder with the pictures of the subject.")
    files = sorted({sample.path.name for sample in find_samples(config.images, skip_bad=config.skip_bad)})
    if not 2 <= folds <= len(files):
        raise UserError(f"--folds must lie between 2 and the number of photos, {len(files)}, not {folds}.")
    own = [
        replace(config, hold_out=tuple(files[k::folds]), out=config.out / "folds" / str(k), keep="last", patience=0)
        for k in range(folds)
    ]
    for fold in own:
        preflight(fold)
    runs = [finished(fold) for fold in own]
    choice = measuring.choose([measuring.Series.of(run) for run in runs])
    if is_first():
        print(f"cross-validation of {folds} runs: {measuring.told(choice)}")
    run = train(replace(config, steps=choice.step, evaluate_every=0, keep="last", patience=0))
    if is_first():
        measuring.write_choice(run, choice)
    return run


def finished(config: SubjectConfig) -> Run:
    """The run of this config: as it is when it is done, gone on with when it was stopped, begun otherwise."""
    run = Run(config.out)
    if run.status().get("state") != "done":
        run = resume(config.out) if run.checkpoint_files() else train(config)
    if run.status()["state"] != "done":
        raise UserError(f"{config.out} was stopped: the same command goes on.")
    return run
