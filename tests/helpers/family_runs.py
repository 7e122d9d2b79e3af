"""Short runs on a tiny model of any family."""

from settings import quick_config
from tiny_families import SIDE

from rankfold.training.config.subject import SubjectConfig


def a_config(folder, photos, out, **more):
    settings = {
        "resolution": SIDE,
        "steps": 2,
        "batch_size": 2,
        "rank": 4,
        "alpha": 4.0,
        "learning_rate": 0.01,
        "preview_every": 0,
        "threads": 1,
    }
    own = {"base": str(folder), "images": photos, "out": out}
    return quick_config(SubjectConfig, **own, **(settings | more))
