"""What an adapter forgot where nobody labels anything: how many samples still look like the forget images."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vdu_peft.config import ConfigError
from vdu_peft.contexts import adapter_scale
from vdu_peft.denoiser import Denoiser
from vdu_peft.evaluation import write_report
from vdu_peft.likeness import held_out_likeness, likeness_features
from vdu_peft.metrics import pul, pul_interval
from vdu_peft.pictures import labelled_grids

logger = logging.getLogger(__name__)

# Of each, in the grid.
SHOWN = 40
# Fewer samples of the base that look like the forget images tell nothing.
MIN_LIKE = 5


@dataclass(frozen=True)
class LikenessReport:
    """How many samples look like the forget images, before and after.

    No judge and no labels: a logistic regression on the pre-trained model's own features tells the forget images from
    the model's samples (:func:`~vdu_peft.likeness.held_out_likeness`). It finds a part of the concept's samples, the
    plainest; what counts is the ratio of after to before. What it cost in quality it does not tell.

    Attributes:
        share_before, share_after: of the samples, those that look like the forget images; after, also those that did
            before from the same noise and still do, if less plainly (:meth:`~vdu_peft.likeness.Likeness.left`), so that
            an adapter that only blurs the concept has not removed it.
        pul: the relative drop in percent, pul_interval its 95 % confidence interval.
    """

    num_forget_images: int
    num_samples: int
    share_before: float
    share_after: float
    pul: float
    pul_interval: tuple[float, float]

    def lines(self) -> list[str]:
        """The report for a person to read."""
        low, high = self.pul_interval
        return [
            f"samples that look like the forget images: {self.share_before:.1%} -> {self.share_after:.1%}, "
            f"{self.pul:.1f} % fewer (95 % interval {low:.1f} to {high:.1f}), {self.num_samples} samples",
            "told by the model's own features, without labels; grid.png has those that look most like them first",
        ]

    def save(self, folder: Path, panels: dict[str, torch.Tensor], **context) -> None:
        """Write report.json and grid.png."""
        grid = labelled_grids({title: images[:SHOWN] for title, images in panels.items()})
        write_report(folder, {**asdict(self), **context}, grid)


def evaluate_likeness(
    denoiser: Denoiser,
    forget: torch.Tensor,
    *,
    num_samples: int,
    num_inference_steps: int,
    seed: int,
    progress: bool = False,
) -> tuple[LikenessReport, dict[str, torch.Tensor]]:
    """Draw with the adapter off and on, from the same starting noise, and look for the forget images' like.

    As many more samples of the base as are reported on are what the forget images are told from.

    Args:
        denoiser: its model with the adapter active.
        forget: (N, C, H, W) in [-1, 1], two or more.

    Returns:
        the report, and by title the forget images and both sets of samples, those that look most like them first.

    Raises:
        ConfigError: a single forget image.
    """
    if len(forget) < 2:
        raise ConfigError("forget_data: one image does not tell what is like it; give a few")
    sampling = {"num_inference_steps": num_inference_steps, "decode": False}
    if denoiser.num_classes:
        sampling["class_labels"] = range(denoiser.num_classes)
    encoded, class_label = denoiser.encode(forget), 0 if denoiser.num_classes else None

    def draw(title: str, seed: int) -> torch.Tensor:
        return denoiser.sample(num_samples, seed=seed, progress=title if progress else None, **sampling)

    after = draw("adapter on", seed)
    with adapter_scale(denoiser.model, 0):  # features, too: by what the pre-trained model sees in an image
        before, others = draw("adapter off", seed), draw("to compare with", seed + 1)
        features = [likeness_features(denoiser, x, seed, class_label) for x in (encoded, others, before, after)]
    likeness, _ = held_out_likeness(*features[:2])
    counts = [int(likeness.alike(features[2]).sum()), int(likeness.left(*features[2:]).sum())]
    if counts[0] < MIN_LIKE:
        logger.warning(
            "%d of %d samples of the base itself look like the forget images: too few to tell how many are forgotten. "
            "Draw more, or take forget images of what the model draws",
            counts[0],
            num_samples,
        )
    shares = [count / num_samples for count in counts]
    report = LikenessReport(
        len(forget), num_samples, *shares, pul(*shares), pul_interval(*counts, num_samples, num_samples)
    )
    panels = {"forget images": forget}
    for title, images, x in zip(("adapter off", "adapter on"), (before, after), features[2:], strict=True):
        panels[title] = denoiser.decode(images[likeness.scorer(x).argsort(descending=True)]).cpu()
    return report, panels
