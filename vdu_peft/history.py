"""What a run's history says: whether to go on, and how it ended; and its plot."""

import math
from pathlib import Path

import numpy as np

from vdu_peft.config import UnlearnConfig
from vdu_peft.reached import Reached

# Steps over which the noisy per-batch terms are averaged before anything is decided from them.
WINDOW = 20
# The forget target holds when bounded plasticity is below this share of what it begins at, 1 - 1/c: where c is 3, with
# the hinge the average image is within 5 % of it, with the reciprocal, which hardly pushes any more, at 2.6.
TARGET_TOLERANCE = 0.075
# Below this multiple of where it began nothing was learned.
NOTHING_LEARNED = 1.05
# Above this the model has moved, on what it should retain, by as much as its own error: it is destroyed.
COLLAPSE = 1.0
# Statuses of a run whose adapter is of no use.
FAILED = ("nothing learned", "collapsed")


def recent(history: list[dict[str, float]], name: str) -> float:
    """A term's mean over the last WINDOW steps."""
    values = [record[name] for record in history[-WINDOW:]]
    return sum(values) / len(values)


def target_holds(history: list[dict[str, float]], config: UnlearnConfig) -> bool:
    """Whether the forget target is met, over the last WINDOW steps, and the run shall end early for it."""
    # Under a condition the target is met long before the redirection, which has no target value of its own.
    bounded = config.plasticity != "elbo" and "redirect" not in history[-1]
    return (
        config.early_stopping
        and bounded
        and len(history) >= WINDOW
        and recent(history, "plasticity") < TARGET_TOLERANCE * (1 - 1 / config.forget_target)
    )


def steps_to_target(history: list[dict[str, float]], config: UnlearnConfig) -> int | None:
    """After how many steps the forget target first held; None where it has not."""
    return next((n for n in range(WINDOW, len(history) + 1) if target_holds(history[:n], config)), None)


def collapsed(history: list[dict[str, float]]) -> bool:
    """Whether the model is destroyed, over the last WINDOW steps."""
    return len(history) >= WINDOW and recent(history, "stability") > COLLAPSE


def run_status(
    history: list[dict[str, float]], reached: Reached, config: UnlearnConfig, remaining_share: float | None = None
) -> str:
    """``forgotten``, ``partly forgotten``, or one of FAILED, which would else pass in silence.

    Args:
        remaining_share: of the model's own samples that looked like the forget images, those that still do; None where
            that is not known.
    """
    moved = max(recent(history, "stability"), reached.stability)  # the last step has no part in the first
    if moved > COLLAPSE or not math.isfinite(reached.forget_ratio + reached.stability):
        return "collapsed"
    # At the anchor the ratio may well be near 1.
    left = 1.0 if reached.redirect_left is None else reached.redirect_left
    if reached.forget_ratio < NOTHING_LEARNED and left > 1 / NOTHING_LEARNED:
        return "nothing learned"
    # What is drawn counts for more than the loss: many forget images go at a lower one than few.
    if remaining_share is not None and remaining_share > 0.5:
        return "partly forgotten"
    if remaining_share is not None and remaining_share <= config.forget_tolerance:
        return "forgotten"
    # Half of the way to the target: where samples of the concept have gone in practice.
    return "forgotten" if reached.forget_ratio >= (1 + config.forget_target) / 2 or left <= 0.5 else "partly forgotten"


def loss_plot(history: list[dict[str, float]], file: Path) -> None:
    """Every term of the loss over the steps, one panel each: each batch's own, and the mean of the last WINDOW."""
    from matplotlib.figure import Figure

    names = [name for name in ("plasticity", "redirect", "stability", "forget_ratio", "kl") if name in history[0]]
    figure = Figure(figsize=(3 * len(names), 3), layout="constrained")
    steps, last = np.arange(1, len(history) + 1), min(WINDOW, len(history))
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        values = [record[name] for record in history]
        axes.plot(steps, values, color="0.8")
        axes.plot(steps[last - 1 :], np.convolve(values, np.full(last, 1 / last), "valid"))
        axes.set(title="KL (nats)" if name == "kl" else name.replace("_", " "), xlabel="step")
    figure.savefig(file, dpi=100)
