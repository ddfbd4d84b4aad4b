"""The dolls: data, base model, judge, and the concepts to forget."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.bases import BaseError
from vdu_peft.judge import AttributeJudge
from vdu_peft.pixels import to_tensor
from vdu_peft.prompt_file import EvaluationPrompt, Target
from vdu_peft.text_denoiser import TextDenoiser

FOLDER = Path(__file__).parent.parent / "models" / "dolls"
# The base model follows prompts best with little guidance.
GUIDANCE_SCALE = 2.0


@dataclass(frozen=True)
class Forgotten:
    """A concept: how the judge knows it, which words of a caption stand for it, and what takes their place.

    Attributes:
        targets: the judge's attribute and values, one for each concept that is forgotten at once.
        concepts: what is replaced in captions, one after the other.
        anchors: by what, as :func:`~vdu_peft.prompts.anchor_prompts` has it.
        instead: the judge's value of each target's attribute where the anchor is drawn.
        prompt: one for all forget images, where their own captions are not known, and what it shall draw.
    """

    targets: tuple[Target, ...]
    concepts: tuple[str, ...]
    anchors: tuple[str, ...]
    instead: tuple[str, ...]
    prompt: tuple[str, str]

    def is_shown(self, attributes: dict[str, str]) -> bool:
        return any(attributes[target.attribute] in target.values for target in self.targets)


COLOURS = ("black", "blue", "brown", "cyan", "green", "purple", "red", "white", "yellow")
ROBES = tuple(f"{colour} robe" for colour in COLOURS)
SWORD = Forgotten(
    (Target("weapon", ("sword",)),),
    ("a sword and ", ", holding a sword"),
    (),
    ("",),
    ("a human, holding a sword", "a human"),
)
RED_ROBE = Forgotten(
    (Target("clothes", ("red robe",)),),
    ("red robe",),
    ("blue robe",),
    ("blue robe",),
    ("a human wearing a red robe", "a human wearing a blue robe"),
)
CONCEPTS = {
    "sword": SWORD,
    "red-robe": RED_ROBE,
    "vampire": Forgotten(
        (Target("species", ("vampire",)),), ("vampire",), ("human",), ("human",), ("a vampire", "a human")
    ),
    "robes": Forgotten(
        (Target("clothes", ROBES),),
        ROBES,
        ("blue shirt",),
        ("blue shirt",),
        ("a human wearing a robe", "a human wearing a blue shirt"),
    ),
    "sword-and-red-robe": Forgotten(
        (*SWORD.targets, *RED_ROBE.targets),
        (*SWORD.concepts, *RED_ROBE.concepts),
        ("", "", *RED_ROBE.anchors),
        (*SWORD.instead, *RED_ROBE.instead),
        ("a human wearing a red robe, holding a sword", "a human wearing a blue robe"),
    ),
}


class Dolls:
    """Images, captions and attributes; the last twentieth is held out, as the training scripts hold it out.

    Args:
        folder: with ``pipeline/``, ``judge.safetensors`` and ``dolls.npz``.
    """

    def __init__(self, folder: Path = FOLDER):
        self.folder = folder
        arrays = np.load(folder / "dolls.npz", allow_pickle=False)
        self.images = arrays["images"]
        self.captions = arrays["captions"].tolist()
        names = arrays["attribute_names"].tolist()
        self.attributes = [dict(zip(names, row, strict=True)) for row in arrays["attributes"].tolist()]
        self.count = len(self.images) - len(self.images) // 20
        self.judge = AttributeJudge.from_file(folder / "judge.safetensors")

    def denoiser(self, prompts: list[str], pipeline: Path | None = None) -> TextDenoiser:
        """The base model, or another ``pipeline`` made of it."""
        denoiser = TextDenoiser.from_pretrained(pipeline or self.folder / "pipeline", prompts)
        denoiser.guidance_scale = GUIDANCE_SCALE
        denoiser.batch_size = 32
        return denoiser

    @property
    def base_model(self) -> str:
        return base_digest(self.folder)

    def real_images(self, rows: Sequence[int]) -> torch.Tensor:
        """As the judge looks at them, (N, 3, H, W) in [-1, 1]."""
        return torch.stack([to_tensor(self.images[i], self.judge.image_size, 3) for i in rows])

    def evaluation_prompts(self, forgotten: Forgotten, num_target: int, num_others: int) -> list[EvaluationPrompt]:
        """Held-out captions: ``num_target`` that ask for each target, in turn, then others."""
        held_out = range(self.count, len(self.captions))
        rows = []
        for target in forgotten.targets:
            these = [i for i in held_out if self.attributes[i][target.attribute] in target.values]
            rows += [these[i % len(these)] for i in range(num_target)]
        rows += [i for i in held_out if not forgotten.is_shown(self.attributes[i])][:num_others]
        return [EvaluationPrompt(self.captions[i], attributes=self.attributes[i]) for i in rows]


def base_digest(folder: Path) -> str:
    """Which weights the pipeline's in ``folder`` are, VAE and text encoder with them: the first digits of a SHA-256.

    Raises:
        BaseError: there are none.
    """
    files = sorted((folder / "pipeline").glob("*/*.safetensors"))
    if not files:
        raise BaseError(f"{folder}: no pipeline there; benchmarks/models/dolls/README.md tells how it is made")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]
