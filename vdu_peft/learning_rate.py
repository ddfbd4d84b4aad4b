"""The learning rate over a run, and the step at which it has fallen to nothing."""


def lr_factor(step: int, max_train_steps: int, to_target: int | None = None) -> float:
    """Linear warmup over a tenth of the run, then linear decay; of the history alone, so that resuming needs no state.

    Without the warmup Adam's first full steps, on a posterior mean of 0, can move the model by more than its error.
    Once the forget target holds, after ``to_target`` steps, the rest of the decay is made in a fifth of the run: a
    model that is left at a high rate draws noticeably worse images than one that has settled.
    """
    warmup = max(max_train_steps // 10, 1)
    factor = min((step + 1) / warmup, (max_train_steps - step) / (max_train_steps - warmup + 1))
    if to_target is None:
        return factor
    return factor * (1 - (step - to_target) / settling_steps(max_train_steps))


def settling_steps(max_train_steps: int) -> int:
    """How many steps a run goes on for, at a falling rate, once its forget target holds."""
    return max(max_train_steps // 5, 1)


def last_step(to_target: int | None, max_train_steps: int) -> int:
    """How many steps the run has in all, as far as is known."""
    if to_target is None:
        return max_train_steps
    return min(to_target + settling_steps(max_train_steps), max_train_steps)
