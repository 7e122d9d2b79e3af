"""The embedded vision-language model's training, from scratch, on questions about drawn images."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration

from ...toolkit.embedded import groups, questions, tiny_vlm, world
from ...toolkit.embedded.questions import Question
from .loop import BuildTinyConfig, fit, load_as_fp32, shuffled_batches, to_pixels

ImageQuestions = tuple[np.ndarray, list[Question]]
TRAIN, HELD_OUT = 0, 1  # streams of images
CREATURES = 0.1  # share of the images of things that show a creature
IGNORE = -100
LENGTH = 192  # tokens of an image's row; questions beyond are left out


def question_image(number: int, *, seed: int, stream: int = TRAIN, group_every: int = 2) -> ImageQuestions:
    """Image `number` (64, 64, 3) and all that is asked about it: a group of things, a kind of thing, or a creature.

    Held-out images of things are of the combinations that training never draws.
    """
    rng = np.random.default_rng((seed, 17, stream, number))
    if number % group_every == 1:
        group = groups.random_group(rng)
        return np.asarray(groups.draw_group(group, rng)), questions.group_questions(group, rng)
    alive = stream == TRAIN and rng.random() < CREATURES
    creature = int(rng.integers(world.TRAINING_CREATURES))
    thing = world.random_creature_thing(rng, creature) if alive else world.random_thing(rng, held=stream == HELD_OUT)
    return np.asarray(world.draw(thing, rng)), questions.thing_questions(thing)


def train_vlm_draft(config: BuildTinyConfig) -> None:
    """The first round, from random weights."""
    tokenizer = tiny_vlm.make_chat_tokenizer()
    torch.manual_seed(config.seed)
    model = tiny_vlm.make_model(tokenizer)
    train_round(config, "vlm-draft", model, tokenizer, seed=config.seed, lr=1.5e-3, group_every=2)
    save_vlm(model, tokenizer, config.work / "vlm-draft")


def train_vlm(config: BuildTinyConfig) -> None:
    """The second round, on other images, fewer of them groups: what is left to learn are patterns and shapes behind faces."""
    tokenizer = tiny_vlm.make_chat_tokenizer()
    model = LlavaForConditionalGeneration.from_pretrained(config.work / "vlm-draft", dtype=torch.float32)
    train_round(config, "vlm", model, tokenizer, seed=config.seed + 1, lr=7e-4, group_every=4)
    save_vlm(model.half(), tokenizer, config.out / "vlm")


def train_round(
    config: BuildTinyConfig,
    name: str,
    model: LlavaForConditionalGeneration,
    tokenizer,
    *,
    seed: int,
    lr: float,
    group_every: int,
) -> None:
    """Trains tower, projector and language model together. The step is compiled, for which torch needs a C++ compiler."""
    draw = partial(question_image, seed=seed, group_every=group_every)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        rows = pool.map(draw, range(config.vlm_images), chunksize=500)
    images = torch.from_numpy(np.stack([image for image, _ in rows])).permute(0, 3, 1, 2).contiguous()
    texts = Texts(tokenizer, [asked for _, asked in rows])
    forward = torch.compile(answers_loss, dynamic=False)
    model.train()

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return forward(model, to_pixels(images[rows]), *texts.batch(rows))

    steps = config.vlm_steps
    batches = shuffled_batches(len(images), 32, steps, seed)
    fit(config, name, list(model.parameters()), batches, loss_of, steps=steps, lr=lr, bf16=True)


def answers_loss(
    model: LlavaForConditionalGeneration,
    pixels: torch.Tensor,
    ids: torch.Tensor,
    targets: torch.Tensor,
    places: torch.Tensor,
    blocks: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy of the answers to many questions about one image each, none of which sees another.

    pixels (B, 3, H, W); ids, targets, places, blocks (B, L): tokens, the tokens to be said next (or IGNORE), their position as if
    their question stood alone, and its number, 0 for what all share.
    """
    length = ids.shape[1]
    before = torch.ones(length, length, dtype=torch.bool).tril()
    mask = before & ((blocks[:, None, :] == 0) | (blocks[:, None, :] == blocks[:, :, None]))
    seen = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    words = model.model.language_model.embed_tokens(ids)
    shown = model.model.multi_modal_projector(seen).to(words.dtype)
    start = 2  # behind begin and user
    words = torch.cat((words[:, :start], shown, words[:, start + shown.shape[1] :]), 1)
    states = model.model.language_model(
        inputs_embeds=words, attention_mask=mask[:, None], position_ids=places, use_cache=False
    ).last_hidden_state
    logits = model.lm_head(states[:, tiny_vlm.IMAGE_TOKENS :])
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets[:, tiny_vlm.IMAGE_TOKENS :].flatten(), ignore_index=IGNORE
    )


class Texts:
    """All questions as tokens: what every image's row shares, then each question with its answer."""

    def __init__(self, tokenizer, asked: list[list[Question]]) -> None:
        _, self.begin, self.user, self.assistant, self.end, self.image = tokenizer.convert_tokens_to_ids(
            list(tiny_vlm.SPECIAL)
        )
        words = sorted({text for own in asked for _, *both in own for text in both})
        self.ids = dict(zip(words, tokenizer(words, add_special_tokens=False).input_ids, strict=True))
        order = np.random.default_rng(0)
        self.rows = torch.stack([self.row([own[0], *order.permutation(np.array(own[1:])).tolist()]) for own in asked])

    def row(self, asked: Sequence[Sequence[str]]) -> torch.Tensor:
        """ids, targets, places, blocks (4, LENGTH) of one image's questions, as many as fit, as `answers_loss` takes them."""
        ids = [self.begin, self.user] + [self.image] * tiny_vlm.IMAGE_TOKENS
        shared = len(ids)
        targets, places, blocks = [IGNORE] * shared, list(range(shared)), [0] * shared
        for number, (_, question, answer) in enumerate(asked, 1):
            said = self.ids[answer]
            own = [*self.ids[question], self.assistant, *said]
            if len(ids) + len(own) > LENGTH:
                continue
            ids += own
            targets += [IGNORE] * len(self.ids[question]) + [*said, self.end]
            places += range(shared, shared + len(own))
            blocks += [number] * len(own)
        parts = zip((ids, targets, places, blocks), (0, IGNORE, 0, -1), strict=True)
        return torch.tensor([part + [fill] * (LENGTH - len(part)) for part, fill in parts], dtype=torch.int16)

    def batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """ids, targets, places, blocks (B, LENGTH) of these rows."""
        return tuple(self.rows[rows].long().unbind(1))


def save_vlm(model: LlavaForConditionalGeneration, tokenizer, folder: Path) -> None:
    """Writes model and processor; whoever names no dtype loads fp32."""
    model.save_pretrained(folder)
    tiny_vlm.make_processor(tokenizer).save_pretrained(folder)
    load_as_fp32(folder)
