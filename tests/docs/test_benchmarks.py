"""Benchmarks are run by hand, so nothing else would notice that one of them no longer fits the library."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_all_benchmarks_can_be_imported():
    names = sorted(file.stem for folder in (FOLDER, FOLDER / "peers") for file in folder.glob("*.py"))
    code = "import importlib, sys; sys.path.append('peers'); "
    code += "; ".join(f"importlib.import_module({name!r})" for name in names)
    result = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


BEGIN = """
import sys
from pathlib import Path

import few_shot, mixer, search_evidence, step_options
import torch
from rankfold.toolkit.data.subjects import find_samples
from rankfold.training.config.instruct import InstructConfig
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.subject.task import SubjectTask

torch.set_num_threads(1)
folder = Path(sys.argv[1])
images = step_options.ROOT / "assets" / "demo" / "creature"
held_out = find_samples(images, flip=False, skip_bad=False)[:2]
short = {"steps": 1, "batch_size": 1, "rank": 2, "threads": 1, "preview_every": 0}
config = SubjectConfig(images=images, out=folder / "subject", preservation_weight=0.0, **short)
task, optimizer = step_options.make_task(folder, "tiny", "lora", rank=2, threads=1)
assert all(seconds >= 0 for seconds in step_options.Step(task, optimizer)().values())
loss, size = search_evidence.trained_loss(config, held_out, folder / "evidence")
assert len(loss) and size

class Measure:
    def __init__(self):
        self.held_out = held_out
    def __call__(self, training):
        return training

assert few_shot.run_way(SubjectTask, config, Measure())
_, loop = mixer.prepare_loop(InstructConfig(data=mixer.data_of(0, folder) / "train.json", out=folder / "task", steps=1, rank=2, threads=1))
assert loop.parameters
"""


def test_benchmarks_that_run_the_loop_themselves_begin(tmp_path):
    """They build tasks by hand, from configs that leave settings to the base."""
    result = subprocess.run([sys.executable, "-c", BEGIN, str(tmp_path)], cwd=FOLDER, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
