"""Recipes for fine-tuning: named sets of numbers.

``paper`` is VBP's (arXiv 2507.12988): AdamW at 1.5e-5 on a cosine, weight decay 0.01, ten epochs of distillation from the
dense model on the whole training set. What the paper does not publish is the plainest choice: temperature 1, no warm-up, no
clipping, no features. Its batches hold 32 samples; here batches are the caller's.

``default`` is for little data without labels. The outputs of a few hundred samples say little about what a network should
compute inside, so that the blocks' outputs are matched as well; held-out data decides which epoch's weights are returned. Its numbers were chosen
on the demo's digits alone.

``few`` is for the samples that the network was pruned on by ``method="auto"``, where there are no others. Its layers fit these
samples already, so that holding some of them out tells little; use it with ``held_out=0``, and with ``augment=`` where samples can
be changed without harm. Steps are small, and the result lies half-way between the start and the trained weights: of all that
was tried on 750 images, measured on 250 others, no recipe was better by its last weights than by that mixture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from vbpfx.errors import FinetuneError


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune.

    Attributes:
        epochs: passes over the training batches.
        learning_rate: of AdamW, at its highest.
        weight_decay: of AdamW, on every parameter.
        warmup: fraction of the steps in which the learning rate rises from zero.
        temperature: T, by which the logits are divided.
        feature_weight: weight of the feature loss; 0 for none.
        max_norm: the gradient is cut to this norm; None for no cut.
        patience: epochs without a better held-out loss after which to end; None for never.
        mixing: alpha; what counts is start + alpha (trained - start), after every epoch (WiSE-FT, Wortsman et al. 2022,
            arXiv 2109.01903, equation 1). 1 for the trained weights as they are.
    """

    epochs: int
    learning_rate: float
    weight_decay: float
    warmup: float
    temperature: float
    feature_weight: float
    max_norm: float | None
    patience: int | None
    mixing: float = 1.0

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of one step, counted from 0: a linear rise, then half a cosine to zero behind the last."""
        rise = round(self.warmup * steps)
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


RECIPES = {
    "paper": Recipe(
        epochs=10,
        learning_rate=1.5e-5,
        weight_decay=0.01,
        warmup=0.0,
        temperature=1.0,
        feature_weight=0.0,
        max_norm=None,
        patience=None,
    ),
    "default": Recipe(
        epochs=30,
        learning_rate=5e-4,
        weight_decay=0.01,
        warmup=0.1,
        temperature=2.0,
        feature_weight=1.0,
        max_norm=1.0,
        patience=10,
    ),
    "few": Recipe(
        epochs=5,
        learning_rate=5e-5,
        weight_decay=0.0,
        warmup=0.1,
        temperature=1.0,
        feature_weight=0.0,
        max_norm=1.0,
        patience=None,
        mixing=0.5,
    ),
}

# name: what it has to be, and the test of it
_SOUND: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "epochs": ("at least 1", lambda v: v >= 1),
    "learning_rate": ("above 0", lambda v: 0 < v < math.inf),
    "weight_decay": ("at least 0", lambda v: 0 <= v < math.inf),
    "warmup": ("at least 0 and below 1", lambda v: 0 <= v < 1),
    "temperature": ("above 0", lambda v: 0 < v < math.inf),
    "feature_weight": ("at least 0", lambda v: 0 <= v < math.inf),
    "max_norm": ("above 0, or None", lambda v: v is None or v > 0),
    "patience": ("at least 1, or None", lambda v: v is None or v >= 1),
    "mixing": ("above 0 and at most 1", lambda v: 0 < v <= 1),
}


def make_recipe(recipe: str | Recipe, **changes: Any) -> Recipe:
    """A recipe, by name or as it is, with every change that is not None.

    Raises:
        FinetuneError: there is no recipe of that name, or a number is out of its range.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise FinetuneError(f"there is no recipe {recipe!r}; choose one of {', '.join(map(repr, RECIPES))}")
        recipe = RECIPES[recipe]
    recipe = replace(recipe, **{name: value for name, value in changes.items() if value is not None})
    for field in fields(recipe):
        value, (range_, sound) = getattr(recipe, field.name), _SOUND[field.name]
        if not sound(value):
            raise FinetuneError(f"{field.name} must be {range_}, found {value!r}")
    return recipe
