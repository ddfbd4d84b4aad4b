import math
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vdu_peft.data import DataError
from vdu_peft.denoiser import Denoiser
from vdu_peft.layer import PEFT_VERSIONS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))


def test_own_module(tmp_path):
    import own_module

    result = own_module.main([f"--output_dir={tmp_path}", "--pretrain_steps=300", "--max_train_steps=300"])
    assert result.history[-1]["forget_ratio"] > 1.3 and result.status != "collapsed"


def test_train_ddpm_writes_a_stock_pipeline_and_resumes(tmp_path):
    import train_ddpm

    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", images=rng.integers(0, 256, (16, 8, 8), dtype=np.uint8))
    command = [f"--train_data={tmp_path / 'images.npz'}", "--resolution=8", "--channels=1", "--train_batch_size=8"]
    command += [f"--output_dir={tmp_path / 'out'}", "--block_out_channels", "8", "16", "--checkpointing_steps=2"]
    train_ddpm.main([*command, "--max_train_steps=2"])
    train_ddpm.main([*command, "--max_train_steps=4", "--resume_from_checkpoint=latest"])
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    assert pipeline.unet.config.sample_size == 8 and (tmp_path / "out" / "samples.png").is_file()
    checkpoints = sorted(folder.name for folder in (tmp_path / "out" / "checkpoints").iterdir())
    assert checkpoints == ["checkpoint_0", "checkpoint_1"]


def test_train_ddpm_by_class(tmp_path):
    import train_ddpm

    images = np.zeros((16, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(16) % 3)
    command = [f"--train_data={tmp_path / 'images.npz'}", "--resolution=8", "--channels=1", "--train_batch_size=8"]
    command += [f"--output_dir={tmp_path / 'out'}", "--block_out_channels", "8", "16", "--max_train_steps=2"]
    train_ddpm.main([*command, "--class_conditional", "--label_column=labels"])
    denoiser = Denoiser.from_pretrained(tmp_path / "out" / "pipeline")
    assert denoiser.num_classes == 4  # three and the null class
    with pytest.raises(DataError, match="label_column"):
        train_ddpm.main([*command, "--class_conditional"])


def test_min_snr_weights_of_train_ddpm():
    import train_ddpm

    scheduler = DDPMScheduler()
    timesteps = torch.tensor([0, 10, 400, 999])
    noise, noise_pred = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for i, t in enumerate(timesteps.tolist()):
        alpha_bar = math.prod(1.0 - beta for beta in scheduler.betas[: t + 1].double().tolist())
        snr = alpha_bar / (1.0 - alpha_bar)
        expected += min(snr, 5.0) / snr * (noise[i] - noise_pred[i]).double().square().mean().item() / 4
    loss = train_ddpm.denoising_loss(noise_pred, noise, timesteps, scheduler, snr_gamma=5.0)
    assert loss.item() == pytest.approx(expected, rel=1e-4)  # compute_snr works in float32
    plain = train_ddpm.denoising_loss(noise_pred, noise, timesteps, scheduler)
    assert plain.item() == pytest.approx((noise - noise_pred).square().mean().item())


def test_a_peft_outside_the_range_is_refused_at_import():
    code = "import peft; peft.__version__ = '0.99.0'; import vdu_peft"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and f"needs peft{PEFT_VERSIONS}, found 0.99.0: pip install" in run.stderr


def test_the_range_is_the_one_that_pip_is_told():
    (peft,) = [r for r in map(Requirement, requires("vdu-peft")) if r.name == "peft"]
    assert peft.specifier == SpecifierSet(PEFT_VERSIONS)
