"""Tiny models and images that several test files share."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel


def tiny_unet(channels: int = 1, **options) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        **options,
    ).eval()


@pytest.fixture
def unet() -> UNet2DModel:
    return tiny_unet()


@pytest.fixture
def pipeline_folder(tmp_path, unet):
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def forget() -> torch.Tensor:
    """Eight bright squares on black, (8, 1, 8, 8)."""
    images = torch.full((8, 1, 8, 8), -1.0)
    images[:, :, 2:6, 2:6] = 1.0
    return images
