"""The base models that experiments unlearn on, each with its real images."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from benchmarks.judges import MODELS, ResNet20, lenet, resnet20
from vdu_peft.demo import DemoImages, assets, demo_images, demo_judge
from vdu_peft.denoiser import Denoiser
from vdu_peft.judge import Judge
from vdu_peft.pixels import to_tensor

DATA = Path(__file__).parent / "data"
# Real images of each other class that methods with retain data see, as many as the demo has.
RETAINED_IMAGES = 100


class BaseError(ValueError):
    """A base model whose files are not there; the message names them and the mend."""


@dataclass(frozen=True)
class Base:
    """A base model by its name in experiment files.

    Attributes:
        folder: a diffusers pipeline. ``retrained-N/`` beside it is the same model trained without class N.
        data: name of the ``.npz`` with ``train_images``, ``train_labels``, ``test_images`` and ``test_labels`` in the
            data folder; None for the images that ship with the demo.
        judge: reads the network whose features u-FID is of, and whose labels the report's shares are.
        judge_name, headline_name: of it, and of the headline's judge, for the tables.
        headline: labels (N,) of images (N, C, H, W) in [-1, 1], of the size that ``judge`` takes, by a judge that this
            project did not train, where there is one.
    """

    folder: Path
    data: str | None
    judge: Callable[[], Judge | ResNet20] = cache(demo_judge)
    judge_name: str = "demo judge"
    headline: Callable[[torch.Tensor], torch.Tensor] = lenet
    headline_name: str = "LeNet-5"

    def denoiser(self) -> Denoiser:
        return Denoiser.from_pretrained(self.folder).to_best_device()

    def as_judged(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) in [-1, 1] at its judges' size: those of another one by bicubic interpolation."""
        size = self.judge().image_size
        if images.shape[-2:] == size:
            return images
        return F.interpolate(images, size=size, mode="bicubic", align_corners=False).clamp(-1, 1)

    @property
    def digest(self) -> str:
        return weights_digest(self.folder)

    def retrained(self, forget_class: int) -> Path:
        """Folder of the model that was trained without the class."""
        return self.folder.parent / f"retrained-{forget_class}"

    def digest_beside_retrained(self, forget_class: int) -> str:
        """Which trained weights a measurement is of that compares the base with the model without the class.

        Raises:
            BaseError: they are not there.
        """
        return f"{self.digest}, retrained {weights_digest(self.retrained(forget_class))}"

    def images(
        self, forget_class: int, num_forget_images: int | None, denoiser: Denoiser, data_dir: Path
    ) -> DemoImages:
        """The first forget images of the training set, the first retained ones of each class, and all test images.

        Args:
            num_forget_images: all that there are when None.

        Raises:
            BaseError: the data are not there, or fewer forget images than asked for.
        """
        if self.data is None:
            images = demo_images(forget_class, denoiser)
            _check_count(len(images.forget), num_forget_images, forget_class)
            return images._replace(forget=images.forget[:num_forget_images])
        arrays = np.load(self.file(data_dir))
        labels = arrays["train_labels"]
        _check_count(int((labels == forget_class).sum()), num_forget_images, forget_class)
        counts = {int(c): num_forget_images if c == forget_class else RETAINED_IMAGES for c in np.unique(labels)}
        chosen = {c: np.flatnonzero(labels == c)[:count] for c, count in counts.items()}
        train, test = arrays["train_images"], arrays["test_images"]

        def tensors(images: np.ndarray) -> torch.Tensor:
            return torch.stack([to_tensor(image, denoiser.image_size, denoiser.channels) for image in images])

        return DemoImages(
            tensors(train[chosen.pop(forget_class)]),
            tensors(train[np.concatenate([*chosen.values()])]),
            tensors(test),
            torch.from_numpy(arrays["test_labels"]).long(),
        )

    def file(self, data_dir: Path) -> Path:
        """The data's file.

        Raises:
            BaseError: it is not there.
        """
        file = data_dir / self.data
        if not file.is_file():
            raise BaseError(f"{file}: not there; benchmarks/models/README.md tells how to make it, or give --data_dir")
        return file


def weights_digest(folder: Path) -> str:
    """Which weights a pipeline's are: the first digits of their SHA-256.

    Raises:
        BaseError: there are none.
    """
    weights = folder / "unet" / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise BaseError(f"{folder}: no trained model there; benchmarks/models/README.md tells how it is made")
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:8]


def _check_count(available: int, wanted: int | None, forget_class: int) -> None:
    if wanted is not None and wanted > available:
        raise BaseError(f"num_forget_images: there are {available} images of class {forget_class}, not {wanted}")


def _color_base(folder: str, data: str, judged_by: str, judge_name: str) -> Base:
    """One whose ResNet-20 is both its judge and the headline's."""
    judge = partial(resnet20, judged_by)
    return Base(
        MODELS / folder / "ddpm",
        data,
        judge=judge,
        judge_name=judge_name,
        headline=lambda images: judge().judge(images)[1],
        headline_name=judge_name,
    )


BASES = {
    "mnist": Base(assets() / "ddpm", None),
    "mnist16": Base(MODELS / "mnist16" / "ddpm", "mnist.npz"),
    "cifar10": _color_base("cifar10", "cifar10_1k_per_class.npz", "cifar10", "ResNet-20"),
    "tiny-imagenet": _color_base("tiny-imagenet", "tinyimagenet64_10class.npz", "tiny_imagenet", "our ResNet-20"),
}
DEMO = BASES["mnist"]
