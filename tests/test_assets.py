"""What ships with the package."""

import torch
from safetensors import safe_open

from vdu_peft.demo import assets, demo_images, demo_judge
from vdu_peft.denoiser import Denoiser


def test_the_demo_s_model_is_small():
    assert sum(file.stat().st_size for file in (assets() / "ddpm").rglob("*") if file.is_file()) <= 6e6


def test_the_demo_s_judge_is_as_good_as_its_file_says():
    with safe_open(assets() / "judge.safetensors", framework="pt") as stored:
        assert float(stored.metadata()["test_accuracy"]) >= 0.985
    images = demo_images(1, Denoiser.from_pretrained(assets() / "ddpm"))
    assert torch.bincount(images.reference_labels).tolist() == [300] * 10
    # The first 300 test images of each digit come from that half of MNIST's which is the harder one.
    assert (demo_judge().judge(images.reference)[1] == images.reference_labels).float().mean() >= 0.98
