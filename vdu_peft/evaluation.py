"""Samples → judge → figures → Report, and its plot."""

import json
import math
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image

from vdu_peft.config import ConfigError
from vdu_peft.denoiser import Denoiser
from vdu_peft.image_losses import image_losses
from vdu_peft.judge import Judge, PretrainedJudge
from vdu_peft.metrics import (
    class_shares,
    frechet_distance,
    kernel_distance,
    loss_gap,
    precision_recall,
    pul,
    pul_interval,
    retained_distance,
)
from vdu_peft.pictures import labelled_grids
from vdu_peft.version import __version__

LOSS_IMAGES, LOSS_TIMESTEPS = 50, 5
# Of samples, for a Fréchet distance on the 64 features of a judge.
MIN_SAMPLES = 100
# More are not shown side by side.
SHOWN_CLASSES = 12


def check_evaluation(num_samples: int = MIN_SAMPLES) -> None:
    """Whether an evaluation can be made, before any work.

    Raises:
        ConfigError: too few samples, or a library of the extra ``eval`` that is missing.
    """
    if num_samples < MIN_SAMPLES:
        raise ConfigError(f"num_samples must be at least {MIN_SAMPLES}, not {num_samples}: fewer tell too little")
    for library in ("matplotlib", "scipy", "torchmetrics"):
        if find_spec(library) is None:
            raise ConfigError(f"evaluation needs {library}: pip install 'vdu-peft[eval]'")


@dataclass(frozen=True)
class Report:
    """How much of a class is gone, and what it cost.

    Attributes:
        pul: percentage of unlearning, by the judge; pul_interval is its 95 % confidence interval.
        u_fid_before, u_fid_after: of the samples against real images without the forget class, judge features.
        u_fid_oracle: as these, of the base model's samples without those that the judge takes for the class: what a
            removal would have that changes nothing else. Fewer samples make it a little larger; nan if none is left.
        fid_before: of the base model's samples against real images of all classes.
        kid_before, kid_after: as the u-FIDs, by the kernel distance.
        precision, recall: of the unlearned model's samples against the same real images.
        retained_distance: total variation between the retained classes' proportions before and after.
        histogram_before, histogram_after: share of every class.
        loss_gap_before, loss_gap_after: denoising loss of held-out forget images minus that of retained ones, mean over
            elements; how far the likelihood has moved, where the shares tell what is drawn.
        class_names: the judge's, where it has any.
    """

    forget_class: int
    num_samples: int
    share_before: float
    share_after: float
    pul: float
    pul_interval: tuple[float, float]
    fid_before: float
    u_fid_before: float
    u_fid_after: float
    u_fid_oracle: float
    kid_before: float
    kid_after: float
    precision: float
    recall: float
    retained_distance: float
    histogram_before: list[float]
    histogram_after: list[float]
    loss_gap_before: float
    loss_gap_after: float
    class_names: list[str] | None = None

    @property
    def shown_classes(self) -> list[int]:
        """All, or where there are many the forgotten one and those that are drawn most, before or after."""
        most = [max(pair) for pair in zip(self.histogram_before, self.histogram_after, strict=True)]
        most[self.forget_class] = math.inf
        return sorted(sorted(range(len(most)), key=lambda c: -most[c])[:SHOWN_CLASSES])

    @property
    def _left_out(self) -> str:
        count = len(self.histogram_before)
        return f"  (of {count} classes)" if count > SHOWN_CLASSES else ""

    def named(self, label: int) -> str:
        """A class by its number and, where it has one, its name."""
        return f"{label} {self.class_names[label]}" if self.class_names else str(label)

    def lines(self) -> list[str]:
        """The report for a person to read."""
        low, high = self.pul_interval
        rows = [
            f"share of {self.named(self.forget_class)}: {self.share_before:.1%} -> {self.share_after:.1%}, "
            f"PUL {self.pul:.1f} % (95 % interval {low:.1f} to {high:.1f}), {self.num_samples} samples",
            f"u-FID (judge features): {self.u_fid_before:.1f} -> {self.u_fid_after:.1f} (of the base's samples that "
            f"are of other classes {self.u_fid_oracle:.1f}, of all against all classes {self.fid_before:.1f}); "
            f"KID {self.kid_before:.3f} -> {self.kid_after:.3f}",
            f"denoising loss of held-out forget images over that of the others: {self.loss_gap_before:+.4f} -> "
            f"{self.loss_gap_after:+.4f}",
            f"precision {self.precision:.2f}, recall {self.recall:.2f}; "
            f"retained classes moved by {self.retained_distance:.3f} (total variation)",
            "class   " + "".join(f"{c:>7}" for c in self.shown_classes) + self._left_out,
        ]
        for title, shares in (("before", self.histogram_before), ("after", self.histogram_after)):
            rows.append(f"{title:<8}" + "".join(f"{shares[c]:>7.1%}" for c in self.shown_classes))
        if self.class_names:
            rows.append("where " + ", ".join(f"{c} is {self.class_names[c]}" for c in self.shown_classes))
        return rows

    def save(self, folder: Path, samples: dict[str, torch.Tensor], **context) -> None:
        """Write report.json, grid.png and histogram.png.

        Args:
            samples: what was judged, by title; the first 80 are shown.
            context: whatever tells how the figures came about. In the JSON, what is not a number becomes null.
        """
        grid = labelled_grids({title: images[:80] for title, images in samples.items()})
        write_report(folder, {**asdict(self), **context}, grid)
        histogram_plot(self, folder / "histogram.png")


def write_report(folder: Path, record: dict, grid: Image.Image) -> None:
    """Write grid.png, and report.json with the versions that made it; a figure that is not a number becomes null."""
    folder.mkdir(parents=True, exist_ok=True)
    grid.save(folder / "grid.png")
    versions = {"vdu_peft": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    record = {**_finite(record), "versions": versions}
    text = json.dumps(record, indent=2, default=str, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")


def _finite(value):
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate(
    before: torch.Tensor,
    after: torch.Tensor,
    judge: Judge | PretrainedJudge,
    forget_class: int,
    reference: torch.Tensor,
    reference_labels: torch.Tensor,
    loss_gaps: tuple[float, float],
) -> Report:
    """Judge samples of the base and of the unlearned model, (N, C, H, W) in [-1, 1], against real images.

    Args:
        loss_gaps: :func:`held_out_loss_gap` of both models.
    """
    features_before, labels_before = judge.judge(before)
    features_after, labels_after = judge.judge(after)
    real, _ = judge.judge(reference)
    retained = real[reference_labels != forget_class]
    others = features_before[labels_before != forget_class]
    shares_before, shares_after = (class_shares(ls, judge.num_classes) for ls in (labels_before, labels_after))
    precision, recall = precision_recall(features_after, retained)
    share_before, share_after = shares_before[forget_class].item(), shares_after[forget_class].item()
    return Report(
        forget_class=forget_class,
        num_samples=len(after),
        share_before=share_before,
        share_after=share_after,
        pul=pul(share_before, share_after),
        pul_interval=pul_interval(
            int((labels_before == forget_class).sum()),
            int((labels_after == forget_class).sum()),
            len(before),
            len(after),
        ),
        fid_before=frechet_distance(features_before, real),
        u_fid_before=frechet_distance(features_before, retained),
        u_fid_after=frechet_distance(features_after, retained),
        u_fid_oracle=frechet_distance(others, retained) if len(others) > 1 else math.nan,
        kid_before=kernel_distance(features_before, retained),
        kid_after=kernel_distance(features_after, retained),
        precision=precision,
        recall=recall,
        retained_distance=retained_distance(shares_before, shares_after, forget_class),
        histogram_before=shares_before.tolist(),
        histogram_after=shares_after.tolist(),
        loss_gap_before=loss_gaps[0],
        loss_gap_after=loss_gaps[1],
        class_names=judge.class_names,
    )


def held_out_loss_gap(
    denoiser: Denoiser, images: torch.Tensor, labels: torch.Tensor, forget_class: int, seed: int
) -> float:
    """:func:`~vdu_peft.metrics.loss_gap` of a model on held-out images (N, C, H, W) in [-1, 1].

    At LOSS_TIMESTEPS evenly spaced timesteps, on at most LOSS_IMAGES images of the class and as many of the others, at
    random: in what order they lie is no matter. The same images and noise for the same seed, so that two models' gaps
    differ by the models alone.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = [kind.nonzero().flatten() for kind in (labels == forget_class, labels != forget_class)]
    rows = torch.cat([kind[torch.randperm(len(kind), generator=generator)[:LOSS_IMAGES]] for kind in kinds])
    images, labels = denoiser.encode(images[rows]), labels[rows]
    timesteps = [int((i + 0.5) / LOSS_TIMESTEPS * denoiser.num_train_timesteps) for i in range(LOSS_TIMESTEPS)]
    losses = image_losses(denoiser, images, timesteps, seed, labels if denoiser.num_classes else None).mean(1)
    return loss_gap(losses, labels, forget_class)


def histogram_plot(report: Report, file: Path) -> None:
    """Share of every class that is shown, before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5 if report.class_names else 3), layout="constrained")
    axes = figure.subplots()
    shown = report.shown_classes
    places = np.arange(len(shown))
    axes.bar(places - 0.2, [report.histogram_before[c] for c in shown], 0.4, label="before")
    after = [report.histogram_after[c] for c in shown]
    axes.bar(places + 0.2, after, 0.4, label=f"after forgetting {report.named(report.forget_class)}")
    axes.set(xlabel="class", ylabel="share of samples", xticks=places, xticklabels=map(report.named, shown))
    if report.class_names:
        axes.tick_params("x", rotation=90)
    figure.legend(loc="outside upper center", ncols=2)  # over the axes, where it hides no bar
    figure.savefig(file, dpi=100)
