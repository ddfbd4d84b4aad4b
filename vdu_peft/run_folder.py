"""What a run leaves in its folder: the adapter with its card, and the history."""

import json
from contextlib import suppress
from pathlib import Path

from accelerate import Accelerator
from peft import PeftModel

from vdu_peft.adapter import save_adapter
from vdu_peft.card import model_card
from vdu_peft.classes import Classes
from vdu_peft.config import UnlearnConfig
from vdu_peft.denoiser import Denoiser
from vdu_peft.reached import Reached
from vdu_peft.strength import Strength

# What `vdu-peft unlearn` and `demo` draw of a run, beside its adapter.
PICTURES = ("variations.png", "loss.png", "samples.png", "grid.png", "histogram.png")


def run_facts(
    denoiser: Denoiser,
    num_forget: int,
    num_variations: int,
    shown_at: tuple[int, int],
    rank: int,
    classes: Classes | None,
    config: UnlearnConfig,
) -> dict[str, object]:
    """What the adapter's card tells of a run, whatever comes of it."""
    facts: dict[str, object] = {"forget images": num_forget}
    if num_variations:
        facts["variations of them"] = num_variations
    facts |= {"shown at timesteps": f"{shown_at[0]} to {shown_at[1] - 1}", "rank": rank, "seed": config.seed}
    if classes is not None:
        facts["forgotten"] = classes.named(classes.forget_labels, denoiser)
        if config.plasticity != "elbo" and classes.anchors.numel():
            facts["drawn instead"] = classes.named(classes.anchors, denoiser)
    return facts


def save_run(
    peft_model: PeftModel,
    base_name: str,
    output_dir: Path | None,
    facts: dict[str, object],
    history: list[dict[str, float]],
    accelerator: Accelerator,
    status: str | None = None,
    reached: Reached | None = None,
    strength: Strength | None = None,
) -> str:
    """Write the adapter as it is, its card and the history; returns where, as a part of a sentence.

    Args:
        status, reached: None where there is no history yet.
    """
    if output_dir is None:
        return "nothing was written (no output_dir)"
    if accelerator.is_main_process:
        facts = facts | {"steps": len(history)}
        if status is not None:
            facts["outcome"] = status
            facts["reached"] = reached
        if strength is not None:
            facts["strength"] = strength
        save_adapter(peft_model, output_dir / "adapter", model_card("adapter", base_name, facts))
        with suppress(OSError):  # an earlier run's are not of this adapter; one that stays is no reason to fail
            for name in PICTURES:
                (output_dir / name).unlink(missing_ok=True)
        (output_dir / "history.json").write_text(json.dumps(history) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()
    return f"the adapter of the last good step is in {output_dir / 'adapter'}"
