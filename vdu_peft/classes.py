"""A model's classes in a run: what is forgotten, retained, and drawn instead; checked before any work."""

from typing import NamedTuple

import torch

from vdu_peft.config import ConfigError, UnlearnConfig
from vdu_peft.denoiser import Denoiser

# Of a run's classes or prompts, how many a card names.
NAMED = 3


class Classes(NamedTuple):
    """Labels of a class-conditional model; of a text-to-image model they stand for prompts."""

    forget_labels: torch.Tensor  # (N,) int64, the label under which the model knows each forget image
    retained: list[int]  # all other labels, the null class too
    anchors: torch.Tensor  # (N, K) int64, those that each forget image is redirected to, one at random each time
    null: int | None  # stands for no condition; where it is what is forgotten, K is 0: nothing is redirected

    @staticmethod
    def named(labels: torch.Tensor, denoiser: Denoiser) -> str:
        """The prompts or classes that labels stand for, each once; of many the first few."""
        prompts = getattr(denoiser, "prompts", None)
        each = [repr(prompts[label]) if prompts else f"class {label}" for label in labels.unique().tolist()]
        return ", ".join(each[:NAMED]) + (f" and {len(each) - NAMED} more" if len(each) > NAMED else "")


def run_classes(
    denoiser: Denoiser,
    config: UnlearnConfig,
    forget_labels: torch.Tensor | None,
    num_images: int,
    anchor_labels: torch.Tensor | None = None,
    draws_replay: bool = True,
) -> Classes | None:
    """The classes of a run on ``num_images`` forget images; None for an unconditional model.

    Where the forget labels are the null class, the unconditional likelihood is what falls: there is no condition to
    redirect, and the other labels are held in place by replay.

    Args:
        forget_labels: (N,) int64; ``config.forget_class`` for all when None.
        anchor_labels: (N,) int64; ``config.anchor_class`` for all when None, or else any other label.
        draws_replay: the model draws its own replay, which must show every class to retain.

    Raises:
        ConfigError: labels that the model has not, that contradict each other, or that are missing.
    """
    # The trainer draws its batches on the CPU.
    forget_labels, anchor_labels = (None if x is None else x.cpu() for x in (forget_labels, anchor_labels))
    given = {name: getattr(config, name) for name in ("forget_class", "anchor_class", "null_class")}
    given = {name: value for name, value in given.items() if value is not None}
    if not denoiser.num_classes:
        labels = {"forget_labels": forget_labels, "anchor_labels": anchor_labels}
        for name in [*given, *(name for name, value in labels.items() if value is not None)]:
            raise ConfigError(f"{name}: the model is unconditional; leave it out")
        return None
    if ("forget_class" in given) == (forget_labels is not None):
        raise ConfigError(
            f"forget_class: the model is class-conditional; tell under which of its {denoiser.num_classes} labels "
            "(0 and up) it knows the forget images, or pass forget_labels, one for each"
        )
    for name, value in given.items():
        if not 0 <= value < denoiser.num_classes:
            raise ConfigError(f"{name} must lie in 0 to {denoiser.num_classes - 1}, not {value}")
    if forget_labels is None:
        forget_labels = torch.full((num_images,), config.forget_class)
    check_labels(forget_labels, num_images, denoiser.num_classes, "forget")
    forgotten = {*forget_labels.tolist()}
    null = denoiser.null_label if config.null_class is None else config.null_class
    if null in forgotten:
        if len(forgotten) > 1:
            raise ConfigError(f"forget_labels: {null} is the null class, others are not; forget one after the other")
        for name, value in (("anchor_class", config.anchor_class), ("anchor_labels", anchor_labels)):
            if value is not None:
                raise ConfigError(f"{name}: the null class is forgotten, which is redirected to nothing; leave it out")
    if given.get("anchor_class") in forgotten:
        raise ConfigError(f"anchor_class: {config.anchor_class} is the label of a forget image; name another one")
    if anchor_labels is not None:
        if config.plasticity == "elbo":
            raise ConfigError("anchor_labels: plasticity elbo redirects to nothing; use hinge, or leave them out")
        if "anchor_class" in given:
            raise ConfigError("anchor_labels: anchor_class is one for all images; name one of them")
        check_labels(anchor_labels, num_images, denoiser.num_classes, "anchor")
        if both := forgotten & {*anchor_labels.tolist()}:
            raise ConfigError(f"anchor_labels: {min(both)} is the label of a forget image; name another one")
    retained = [label for label in range(denoiser.num_classes) if label not in forgotten]
    if draws_replay and not retained:
        raise ConfigError("forget_class: there is no other class or prompt to retain; add one, or pass replay")
    replay_size = config.filled(denoiser.condition).replay_size
    if draws_replay and len(retained) > replay_size:
        kinds = "prompts" if denoiser.condition == "text" else "classes"
        raise ConfigError(f"replay_size: {replay_size} images cannot show all {len(retained)} {kinds} to retain")
    if null in forgotten:
        return Classes(forget_labels, retained, forget_labels.new_empty(num_images, 0), null)
    others = [label for label in retained if label != config.null_class]
    if anchor_labels is not None:
        return Classes(forget_labels, retained, anchor_labels[:, None], config.null_class)
    if "anchor_class" not in given and not others:
        raise ConfigError(
            "anchor_class: the model has no other class to draw instead; pass its null_class as anchor_class"
        )
    anchors = [given["anchor_class"]] if "anchor_class" in given else others
    return Classes(forget_labels, retained, torch.tensor(anchors).expand(num_images, -1), config.null_class)


def check_labels(labels: torch.Tensor, num_images: int, num_classes: int, kind: str) -> None:
    """Raises ConfigError unless there is one label of the model for each image."""
    if labels.shape != (num_images,):
        raise ConfigError(f"{kind}_labels: {list(labels.shape)} labels for {num_images} images")
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise ConfigError(f"{kind}_labels must lie in 0 to {num_classes - 1}")
