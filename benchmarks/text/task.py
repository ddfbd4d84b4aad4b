"""What every text-to-image method is given: one base model, the forget images with captions, and prompts to retain."""

from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.text.dolls import Dolls, Forgotten
from vdu_peft.pixels import to_tensor
from vdu_peft.prompts import anchor_prompts
from vdu_peft.text_denoiser import TextDenoiser


@dataclass(frozen=True)
class TextTask:
    """One concept to forget.

    Attributes:
        denoiser: the base model with all prompts below; a method changes it in place.
        forget: (N, 3, H, W) in [-1, 1], the undesired images.
        captions: (N) of them.
        anchors: (N) the captions with what is to be drawn instead of the concept.
        retained: prompts that do not ask for it; no images.
        seed: of everything random.
    """

    denoiser: TextDenoiser
    forget: torch.Tensor
    captions: list[str]
    anchors: list[str]
    retained: list[str]
    seed: int

    def labels(self, prompts: list[str]) -> torch.Tensor:
        return torch.tensor([self.denoiser.label(prompt) for prompt in prompts])


def make_task(
    dolls: Dolls, forgotten: Forgotten, num_images: int, num_retained: int, seed: int, one_prompt: bool = False
) -> TextTask:
    """Images of the training split that show the concept, by the seed; retained prompts of those that do not.

    With ``one_prompt`` the concept's own stands for all images, in place of their captions.
    """
    rng = np.random.default_rng(seed)
    shows = np.array([forgotten.is_shown(row) for row in dolls.attributes[: dolls.count]])
    # As many of each target where there are several.
    rows = []
    for target in forgotten.targets:
        these = [i for i in np.flatnonzero(shows) if dolls.attributes[i][target.attribute] in target.values]
        rows += rng.choice(these, num_images // len(forgotten.targets), replace=False).tolist()
    if one_prompt:
        captions, anchors = ([prompt] * len(rows) for prompt in forgotten.prompt)
    else:
        captions = [dolls.captions[i] for i in rows]
        anchors = anchor_prompts(captions, forgotten.concepts, forgotten.anchors)
    others = rng.choice(np.flatnonzero(~shows), num_retained, replace=False)
    retained = [dolls.captions[i] for i in others]
    denoiser = dolls.denoiser([*captions, *anchors, *retained])
    forget = torch.stack([to_tensor(dolls.images[i], denoiser.image_size, 3) for i in rows])
    return TextTask(denoiser, forget, captions, anchors, retained, seed)
