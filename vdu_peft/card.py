"""Model cards: what was forgotten, how it was measured, and what the files are not."""

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

WARNING = {
    "adapter": (
        "**A removable adapter is not secure erasure.** Whoever has the base model can leave the adapter off. Release "
        "a merged model instead; even then, fine-tuning on a few images of the forgotten concept can bring it back."
    ),
    "merged": (
        "**This is not secure erasure.** The weights were moved, not cleaned: fine-tuning on a few images of the "
        "forgotten concept can bring it back."
    ),
}


def model_card(kind: str, base_model: str, facts: Mapping[str, object]) -> str:
    """The text of a README.md with the hub's YAML front matter.

    Args:
        kind: ``adapter`` or ``merged``.
        base_model: a hub id, which the hub links to, or any other name.
        facts: what a reader should know, one table row each.
    """
    front = {"tags": ["unlearning", "variational-diffusion-unlearning"]}
    if kind == "adapter":
        front = {"library_name": "peft", "tags": ["lora", *front["tags"]]}
    else:
        front = {"library_name": "diffusers", **front}
    if base_model.count("/") == 1 and not base_model.startswith((".", "/", "~")):
        front = {"base_model": base_model, **front}
    # Weights that were made from others' are under theirs, which nothing here knows.
    front |= {"license": "other", "license_name": "that-of-the-base-model"}
    title = "An adapter that forgets" if kind == "adapter" else "A model with an unlearning adapter merged in"
    rows = {"base model": base_model, **facts}
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {title}",
        "",
        "Made with `vdu_peft` (variational diffusion unlearning, arXiv 2510.04058): a low-rank change of the base "
        "model that lowers the likelihood of a few undesired images and holds everything else in place.",
        "",
        WARNING[kind],
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    return "\n".join(lines) + "\n"


def card_facts(folder: str | Path) -> dict[str, str]:
    """The facts on the card of an adapter in ``folder``, without its base model; none where there is no card."""
    card = Path(folder) / "README.md"
    rows = (
        re.findall(r"^\| (.+?) \| (.+) \|$", card.read_text(encoding="utf-8"), re.MULTILINE) if card.is_file() else []
    )
    return {name: value for name, value in rows if name != "base model"}
