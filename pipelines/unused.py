"""What of a recipe has no effect on its images, so that it can be said."""

from __future__ import annotations

from pathlib import Path

from ..toolkit.diffusion.load import open_model, resolve_base
from ..toolkit.formats.locate import adapter_facts, adapter_path
from .generate import Recipe
from .subjects import HERE, find_words, own_prompts

GUIDED = 5.0  # a guidance scale at which whatever takes a negative prompt takes it


def unused_in_recipe(recipe: Recipe) -> list[str]:
    """A sentence for each setting that is given and not used, and for adapters that count twice."""
    notes = []
    base = open_model(resolve_base(recipe.base))
    if recipe.negative_prompt:
        if "negative_prompt" not in base.call_kwargs([""], [recipe.negative_prompt], GUIDED):
            notes.append(f"--negative-prompt has no effect: {base.title} takes none.")
        elif recipe.guidance_scale <= base.guidance_off:
            notes.append(
                f"--negative-prompt has no effect: guidance is off (--guidance-scale {recipe.guidance_scale:g})."
            )
    places = [adapter_path(Path(path)).resolve() for path in recipe.adapters]
    twice = {place for place in places if places.count(place) > 1 and not recipe.regions and not recipe.subjects}
    notes += [f"The adapter {place} is given {places.count(place)} times: their strengths add up." for place in twice]
    return notes + unused_in_subjects(recipe)


def unused_in_subjects(recipe: Recipe) -> list[str]:
    """What subjects are drawn by, where it is not the prompt itself, and a sentence for each adapter whose own word is not asked for."""
    notes = []
    prompts = own_prompts(recipe.prompt, recipe.subjects) if recipe.subjects else []
    for words, own, path in zip(recipe.subjects, prompts, recipe.adapters, strict=True) if prompts else ():
        if HERE not in recipe.prompt:
            notes.append(
                f"'{words}' is drawn by '{own}': the words from the first subject to the last are put as its own."
            )
        facts = adapter_facts(adapter_path(Path(path)))
        if facts.tokens and not any(find_words(own, token) for token in facts.tokens):
            notes.append(f"The adapter {path} was trained for '{facts.trigger_words}', and '{own}' does not say it.")
    if len(prompts) > 1:
        notes.append(
            f"The subjects stand side by side, from the left: {', '.join(recipe.subjects)}; --regions says other places."
        )
    return notes
