"""One step's images, noise, timesteps and conditions, drawn from torch's global generator."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator

from vdu_peft.classes import Classes
from vdu_peft.config import UnlearnConfig
from vdu_peft.data import ImageDataset
from vdu_peft.denoiser import Denoiser

# Share of the images that a class-conditional model with a null class sees under it.
NULL_SHARE = 0.5
# Share of the images to redirect that are the model's own of what shall be drawn instead: under the forgotten condition
# sampling comes by both, and forget images alone leave it halfway.
ANCHOR_SHARE = 0.5
# Share of an unconditional model's replay images that are shown at the forget images' timesteps: where it is pushed, it
# must be held.
HELD_SHARE = 0.7
# So many replay images tell how much all differ.
SPREAD_IMAGES = 512
# Lowest of 1000 where there is a condition. A redirection acts at all that are higher; below it only a loss is changed.
MIN_CONDITIONAL_TIMESTEP = 200


class Batch(NamedTuple):
    """The forget images, then as many replay images; labels are None for an unconditional model.

    Where forget images are redirected, some are replaced by replay images of their anchor; never the first, so that
    every batch has a forget image, whose loss and ratio are told of those that are left. A batch of one has none of
    the anchor, then, and one of two a quarter.
    """

    images: torch.Tensor  # (2b, C, H, W)
    noise: torch.Tensor  # (2b, C, H, W)
    timesteps: torch.Tensor  # (2b,)
    labels: torch.Tensor | None = None  # (2b,) what each image is shown under
    anchors: torch.Tensor | None = None  # (b,) what the forget images are redirected to, None for nothing
    replaced: torch.Tensor | None = None  # (b,) bool, where an image of the anchor stands in for a forget image


def batch_shares(classes: Classes | None) -> dict[str, float]:
    """The numbers above that decide a run of these classes, by name."""
    if classes is None:
        return {"held_share": HELD_SHARE, "spread_images": SPREAD_IMAGES}
    return {"anchor_share": ANCHOR_SHARE} if classes.anchors.numel() else {}


@dataclass(frozen=True)
class BatchSource:
    """What steps draw from.

    Attributes:
        forget_set: the forget images.
        replay: (M, C, H, W), as the denoiser encodes them.
        replay_labels: (M,), of a model with a condition.
        classes: of a model with a condition.
        config: of the run, filled.
        shown_at: the least timestep at which forget images are shown, and the one after the greatest.
        num_train_timesteps: of the model's schedule.
    """

    forget_set: ImageDataset
    replay: torch.Tensor
    replay_labels: torch.Tensor | None
    classes: Classes | None
    config: UnlearnConfig
    shown_at: tuple[int, int]
    num_train_timesteps: int

    @property
    def redirects(self) -> bool:
        """Whether forget images are redirected to an anchor."""
        return self.classes is not None and self.config.plasticity != "elbo" and bool(self.classes.anchors.numel())

    def draw(self, accelerator: Accelerator) -> Batch:
        """This process's share of a step.

        All processes draw the whole batch from the one seed and keep their share, so that P processes of batch
        size b see the images, noise and timesteps that one of P·b sees. (Their posterior noise is their own. Of images
        that are redirected each process keeps its first, so that there they are not quite the same.)
        """
        classes, batch_size = self.classes, self.config.train_batch_size
        total = batch_size * accelerator.num_processes
        forget_indices = draw_indices(len(self.forget_set), total)
        forget = torch.stack([self.forget_set[i] for i in forget_indices])
        replay_indices = draw_indices(len(self.replay), total)
        images = torch.stack([forget, self.replay[replay_indices]])  # (2, total, C, H, W)
        noise = torch.randn(images.shape)
        timesteps = torch.stack(
            [torch.randint(*self.shown_at, (total,)), torch.randint(self.num_train_timesteps, (total,))]
        )
        if classes is None:
            held = torch.rand(total) < HELD_SHARE
            timesteps[1, held] = torch.randint(*self.shown_at, (int(held.sum()),))
        drawn = [images, noise, timesteps]
        if classes is not None:
            labels = torch.stack([classes.forget_labels[forget_indices], self.replay_labels[replay_indices]])
            if classes.null is not None:
                labels = torch.where(torch.rand(2, total) < NULL_SHARE, classes.null, labels)
            drawn.append(labels)
            if self.redirects:
                anchors = classes.anchors[forget_indices, torch.randint(classes.anchors.shape[1], (total,))]
                of_anchor = self.replay_labels == anchors[:, None]  # (total, M)
                replaced = of_anchor.any(1) & (torch.rand(total) < ANCHOR_SHARE)
                if classes.null is not None:
                    replaced &= labels[0] != classes.null
                replaced[::batch_size] = False  # every process has a forget image, to tell its loss
                images[0, replaced] = self.replay[torch.multinomial(of_anchor[replaced].float(), 1).flatten()]
                timesteps[0, replaced] = torch.randint(self.num_train_timesteps, (int(replaced.sum()),))
                drawn += [anchors[None], replaced[None]]
        share = slice(accelerator.process_index * batch_size, (accelerator.process_index + 1) * batch_size)
        return Batch(*(t[:, share].flatten(0, 1).to(accelerator.device) for t in drawn))


def forget_timesteps(
    config: UnlearnConfig, denoiser: Denoiser, replay: torch.Tensor, conditional: bool
) -> tuple[int, int]:
    """The least timestep at which forget images are shown, and the one after the greatest.

    Args:
        replay: (M, C, H, W), as the denoiser encodes them.
    """
    num_timesteps = denoiser.num_train_timesteps
    if config.plasticity == "elbo":  # a sum over all timesteps
        lowest, highest = 0, num_timesteps
    elif conditional:
        lowest, highest = MIN_CONDITIONAL_TIMESTEP * num_timesteps // 1000, num_timesteps
    else:
        lowest, highest = deciding_timesteps(denoiser, replay)
    # What is asked for wins, and where it lies beyond the other's default, that goes all the way.
    if config.min_forget_timestep is not None:
        lowest = config.min_forget_timestep * num_timesteps // 1000
        highest = highest if lowest < highest else num_timesteps
    if config.max_forget_timestep is not None:
        highest = config.max_forget_timestep * num_timesteps // 1000
        if config.min_forget_timestep is None and lowest >= highest:
            lowest = 0
    return lowest, max(highest, lowest + 1)  # a short schedule may have no timestep between the two


def deciding_timesteps(denoiser: Denoiser, replay: torch.Tensor) -> tuple[int, int]:
    """The least timestep at which it is decided what an image of the model shows, and the one after the greatest.

    Args:
        replay: (M, C, H, W), as the denoiser encodes them.
    """
    return denoiser.schedule.deciding_timesteps(max(denoiser.image_size), widest_deviation(replay))


def widest_deviation(images: torch.Tensor) -> float:
    """The standard deviation of images (N, C, H, W) along the direction in which they differ most; 0 of a single one.

    Of SPREAD_IMAGES of them, evenly spaced, which tell it to a few per cent, and of these of the finite ones: what is
    not stays in the replay, and the loss tells of it.
    """
    differences = images[:: -(-len(images) // SPREAD_IMAGES)].flatten(1).double()  # whose squares do not overflow
    differences = differences[differences.isfinite().all(1)]
    if len(differences) < 2:
        return 0.0
    differences -= differences.mean(0)
    # (N, N): beside zeros it has the eigenvalues of the covariance, which has as many rows as an image has elements.
    return torch.linalg.eigvalsh(differences @ differences.T / len(differences))[-1].clamp_min(0).sqrt().item()


def draw_indices(size: int, count: int) -> list[int]:
    """``count`` indices without repetition as long as the set lasts, then again."""
    rounds = -(-count // size)
    return torch.cat([torch.randperm(size) for _ in range(rounds)])[:count].tolist()
