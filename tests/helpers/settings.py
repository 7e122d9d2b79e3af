"""Settings of short runs on random models: what the embedded models start from, so that a few steps change something."""

from dataclasses import fields

from rankfold.training.config.defaults import EMBEDDED_SETTINGS


def quick_config(kind, **more):
    """A config of this class with such settings, and `more`."""
    names = {field.name for field in fields(kind)}
    more = {"text_learning_rate": more.get("learning_rate", 1e-3)} | more if "text_learning_rate" in names else more
    more = {"alpha": 8.0} | more if "alpha" in names else more
    return kind(**({name: value for name, value in EMBEDDED_SETTINGS.items() if name in names} | more))
