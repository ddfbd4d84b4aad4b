import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_unet
from diffusers import DDPMScheduler

from vdu_peft import UnlearnConfig
from vdu_peft.batch import HELD_SHARE, Batch, BatchSource, forget_timesteps, widest_deviation
from vdu_peft.classes import Classes
from vdu_peft.data import ImageDataset
from vdu_peft.denoiser import Denoiser


def test_images_of_the_anchor_stand_in_for_half_of_those_that_are_redirected():
    """Each for forget images of that anchor, under the forgotten label, at all timesteps; never the first, which tells
    the forget ratio; and never under the null class, which redirects nothing."""
    levels, anchors = torch.tensor([-0.6, -0.3, 0.3, 0.6]), torch.tensor([0, 2] * 4)
    replay, replay_labels = levels.view(4, 1, 1, 1).expand(4, 1, 8, 8), torch.tensor([0, 2, 0, 3])
    config = UnlearnConfig(null_class=3, train_batch_size=4)
    classes = Classes(torch.ones(8, dtype=torch.int64), [0, 2, 3], anchors[:, None], 3)
    denoiser = Denoiser(tiny_unet(num_class_embeds=4), DDPMScheduler())
    forget_set, accelerator = ImageDataset(torch.ones(8, 1, 8, 8)), Accelerator()
    torch.manual_seed(0)
    shown_at = forget_timesteps(config, denoiser, replay, conditional=True)
    source = BatchSource(forget_set, replay, replay_labels, classes, config, shown_at, 1000)
    batches = [source.draw(accelerator) for _ in range(500)]
    rows = {name: torch.stack([getattr(batch, name) for batch in batches]) for name in Batch._fields}
    replaced, anchor, label = rows["replaced"], rows["anchors"], rows["labels"][:, :4]
    drawn = rows["images"][:, :4, 0, 0, 0]
    assert torch.equal(replaced, drawn != 1) and not replaced[:, 0].any()
    shown = {(a, round(level, 1)) for a, level in zip(anchor[replaced].tolist(), drawn[replaced].tolist(), strict=True)}
    assert shown == {(0, -0.6), (2, -0.3), (0, 0.3)}
    assert {*label[replaced].tolist()} == {1}
    conditional = label[:, 1:] == 1
    # A binomial share, so within four deviations of a half.
    assert abs(replaced[:, 1:][conditional].float().mean() - 0.5) < 4 * 0.5 / conditional.sum().sqrt()
    timesteps = rows["timesteps"][:, :4]
    assert timesteps[replaced].min() < 50 and timesteps[~replaced].min() >= 200


def test_an_unconditional_model_is_held_where_it_is_pushed():
    """Forget images between the two timesteps; so many replay images more than evenly spread ones, and those at all."""
    denoiser, config = Denoiser(tiny_unet(), DDPMScheduler()), UnlearnConfig(train_batch_size=8)
    images, accelerator = torch.tensor([-1.0, -1.0, 1.0, 1.0]).view(4, 1, 1, 1).expand(4, 1, 8, 8), Accelerator()
    lowest, highest = forget_timesteps(config, denoiser, images, conditional=False)
    assert (lowest, highest) == denoiser.schedule.deciding_timesteps(8, 8.0)  # 1 in each of 64 elements, all as one
    source = BatchSource(ImageDataset(images), images, None, None, config, (lowest, highest), 1000)
    torch.manual_seed(0)
    batches = [source.draw(accelerator) for _ in range(500)]
    forget, replay = torch.stack([batch.timesteps for batch in batches]).split(8, dim=1)
    assert forget.min() == lowest and forget.max() == highest - 1
    within = ((replay >= lowest) & (replay < highest)).float().mean()
    expected = HELD_SHARE + (1 - HELD_SHARE) * (highest - lowest) / 1000
    # A binomial share of 4000, within four deviations.
    assert abs(within - expected) < 4 * (expected * (1 - expected) / replay.numel()) ** 0.5
    assert replay.min() < 10 and replay.max() > 980


def test_timesteps_that_are_asked_for_win_and_the_elbo_has_all():
    denoiser, images = Denoiser(tiny_unet(), DDPMScheduler()), torch.randn(3, 1, 8, 8)

    def timesteps(conditional=False, **options):
        return forget_timesteps(UnlearnConfig(**options), denoiser, images, conditional)

    assert timesteps(plasticity="elbo") == (0, 1000)
    assert timesteps(conditional=True) == (200, 1000)
    assert timesteps(min_forget_timestep=300, max_forget_timestep=400) == (300, 400)
    assert timesteps(plasticity="elbo", max_forget_timestep=400) == (0, 400)
    short = Denoiser(tiny_unet(), DDPMScheduler(num_train_timesteps=100))
    asked = UnlearnConfig(min_forget_timestep=950, max_forget_timestep=955)
    assert forget_timesteps(asked, short, images, conditional=False) == (95, 96)
    assert forget_timesteps(UnlearnConfig(max_forget_timestep=5), short, images, conditional=False) == (0, 1)
    # Beyond the other's default, all the way.
    assert timesteps(min_forget_timestep=900) == (900, 1000) and timesteps(max_forget_timestep=2) == (0, 2)


def test_the_widest_deviation_is_that_of_the_first_principal_component():
    """More images than elements and fewer, against the covariance itself; and of such as tell nothing."""
    torch.manual_seed(0)
    for count in (200, 5):
        images = torch.randn(count, 2, 3, 3) * torch.rand(2, 3, 3) + torch.randn(count, 1, 1, 1)
        covariance = torch.cov(images.flatten(1).double().T, correction=0)
        expected = torch.linalg.eigvalsh(covariance)[-1].sqrt().item()
        assert widest_deviation(images) == pytest.approx(expected, rel=1e-9)
        assert widest_deviation(images * 1e30) == pytest.approx(expected * 1e30, rel=1e-6)
        broken = torch.cat([images, torch.full((1, 2, 3, 3), torch.nan)])
        assert widest_deviation(broken) == widest_deviation(images)
    many = torch.randn(3000, 1, 2, 2) * torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    assert widest_deviation(many) == pytest.approx(3, rel=0.15)  # of 500 images, so within five deviations
    for images in (torch.ones(4, 1, 8, 8), torch.ones(1, 1, 8, 8), torch.full((4, 1, 8, 8), torch.nan)):
        assert widest_deviation(images) == 0
