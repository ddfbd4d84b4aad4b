import json
import math
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import saved_adapter, tiny_text_pipeline
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusionPipeline
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from safetensors.torch import load_file

from vdu_peft.denoiser import Denoiser
from vdu_peft.judge import AttributeJudge, JudgeError
from vdu_peft.peft_range import PEFT_VERSIONS
from vdu_peft.pixels import DataError, to_tensor

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


@pytest.mark.parametrize("config", sorted(file.stem for file in (ROOT / "examples" / "configs").glob("ddpm-*.txt")))
def test_configs_of_train_ddpm(config):
    import train_ddpm

    file = ROOT / "examples" / "configs" / f"{config}.txt"
    args = train_ddpm.parse_args([f"@{file}", "--train_data=images", "--output_dir=out", "--max_train_steps=7"])
    assert args.max_train_steps == 7
    if args.pretrained_model_name_or_path:
        denoiser = Denoiser.from_pretrained(ROOT / args.pretrained_model_name_or_path)
        assert (denoiser.image_size, denoiser.channels) == ((args.resolution, args.resolution), args.channels)
        unet = denoiser.model
    else:
        with torch.device("meta"):
            unet = train_ddpm.build_unet(args.resolution, args.channels, args.block_out_channels, args.layers_per_block)
    parameters = sum(p.numel() for p in unet.parameters())
    assert parameters == 1_805_121 if "mnist" in config else 3e6 <= parameters <= 10e6


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


@pytest.fixture
def captioned(tmp_path):
    """(.npz of 40 images with captions and attributes, folder of CLIP's tokenizer as it would be with eight merges)"""
    colours, things = ["red", "blue"], ["cat", "cart", ""]
    rows = [(colours[i % 2], things[i % 3]) for i in range(40)]
    images = np.zeros((40, 16, 16, 3), dtype=np.uint8)
    for image, (colour, thing) in zip(images, rows, strict=True):
        image[..., 0 if colour == "red" else 2] = 200
        image[4:12, 4:12, 1] = 255 * things.index(thing) // 2
    captions = [f"{colour} {thing}".strip() for colour, thing in rows]
    file = tmp_path / "images.npz"
    np.savez(file, images=images, captions=captions, attributes=rows, attribute_names=["colour", "thing"])
    merges = ["c a", "ca t</w>", "ca r", "car t</w>", "r e", "re d</w>", "d o", "do g</w>"]
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "clip" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return file, tmp_path / "clip"


def test_the_cut_tokenizer_reads_captions_as_the_whole_one(captioned, tmp_path):
    import train_text_to_image
    from transformers import CLIPTokenizer

    captions = ["red cat", "blue cart"]
    whole = CLIPTokenizer.from_pretrained(captioned[1])
    cut = train_text_to_image.cut_tokenizer(captioned[1], captions, tmp_path / "cut", 16)
    assert [cut.tokenize(caption) for caption in captions] == [whole.tokenize(caption) for caption in captions]
    assert whole.tokenize("dog") == ["dog</w>"] and cut.tokenize("dog") == ["d", "o", "g</w>"]
    assert len(cut) == len(whole) - 2 and cut.model_max_length == 16
    assert cut("red cat").input_ids[0] == cut.bos_token_id and max(cut.get_vocab().values()) == len(cut) - 1


def test_a_small_stable_diffusion_is_trained_and_resumed(captioned, tmp_path):
    import train_autoencoder
    import train_text_to_image

    file, clip = captioned
    command = [f"--train_data={file}", "--train_batch_size=8", "--checkpointing_steps=2"]
    vae = [*command, f"--output_dir={tmp_path / 'vae'}", "--resolution=16", "--latent_channels=4"]
    vae += ["--block_out_channels", "8", "8", "8"]
    train_autoencoder.main([*vae, "--max_train_steps=2"])
    train_autoencoder.main([*vae, "--max_train_steps=4", "--resume_from_checkpoint=latest"])
    assert (tmp_path / "vae" / "reconstructions.png").is_file()
    text = [*command, f"--output_dir={tmp_path / 'sd'}", "--caption_column=captions", f"--tokenizer={clip}"]
    text += [f"--vae={tmp_path / 'vae' / 'vae'}", "--block_out_channels", "16", "16", "--text_channels=16"]
    train_text_to_image.main([*text, "--max_train_steps=2"])
    train_text_to_image.main([*text, "--max_train_steps=4", "--resume_from_checkpoint=latest"])
    folder = tmp_path / "sd" / "pipeline"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert pipeline.unet.config.sample_size == 4 and pipeline.tokenizer.model_max_length == 36
    assert pipeline.vae.config.scaling_factor != 0.18215 and pipeline.scheduler.config.prediction_type == "v_prediction"
    # Kept small enough to ship, and what is loaded is what was trained last.
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert (folder / "held_out_captions.txt").read_text().splitlines() == ["red", "blue cat"]  # the last twentieth


def test_an_attribute_judge_learns_and_reads_back(captioned, tmp_path):
    import train_attribute_judge

    file, _ = captioned
    out = tmp_path / "judge.safetensors"
    command = [f"--train_data={file}", f"--output_file={out}", "--train_batch_size=8", "--num_train_epochs=10"]
    train_attribute_judge.main(command)
    judge = AttributeJudge.from_file(out)
    assert judge.attributes == {"colour": ["blue", "red"], "thing": ["", "cart", "cat"]}
    arrays = np.load(file)
    images = torch.stack([to_tensor(image, (16, 16), 3) for image in arrays["images"]])
    features, found = judge.judge(images)
    assert features.shape == (40, judge.num_features)
    rows = list(zip(found["colour"], found["thing"], strict=True))
    assert rows == [tuple(row) for row in arrays["attributes"].tolist()]
    with pytest.raises(JudgeError, match="not the weights of an attribute judge"):
        AttributeJudge.from_file(ROOT / "vdu_peft" / "assets" / "mnist" / "judge.safetensors")


def test_merge_and_export_of_a_text_to_image_model(tmp_path):
    import merge_and_export

    pipeline = tiny_text_pipeline(tmp_path / "tokens")
    pipeline.save_pretrained(tmp_path / "base")
    untouched = {name: weight.clone() for name, weight in pipeline.unet.state_dict().items()}
    adapter = saved_adapter(tmp_path / "adapter", model=pipeline.unet, r=2, lora_alpha=60)
    command = [f"--model={tmp_path / 'base'}", f"--adapter={adapter}", f"--output_dir={tmp_path / 'release'}"]
    command += ["--prompt=a cat", "--num_images=2", "--num_inference_steps=2"]
    assert merge_and_export.main(command) < 1e-3  # W + BA added once against two products
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "release" / "pipeline", safety_checker=None)
    deltas = [(weight - untouched[name]).abs().max() for name, weight in merged.unet.state_dict().items()]
    assert max(deltas) > 0.1
    lora = load_file(tmp_path / "release" / "lora" / "pytorch_lora_weights.safetensors")
    assert lora and all(name.startswith("unet.") for name in lora)


def test_bad_input_of_merge_and_export_is_one_line(pipeline_folder, tmp_path, capsys):
    import merge_and_export

    command = [f"--model={pipeline_folder}", f"--output_dir={tmp_path / 'release'}"]
    adapter = saved_adapter(tmp_path / "adapter")
    for options, message in (
        ([f"--adapter={tmp_path / 'nowhere'}"], "nowhere: no adapter_config.json there"),
        ([f"--adapter={adapter}", "--num_images=0"], "num_images must be at least 1, not 0"),
        ([f"--adapter={adapter}", "--prompt=a cat"], "is not a text-to-image model; leave it out"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            merge_and_export.main([*command, *options])
        output = capsys.readouterr().err
        assert exit_info.value.code == 2 and message in output and len(output.splitlines()) == 1
    assert not (tmp_path / "release").exists()


def test_debiased_weights_of_train_ddpm():
    import train_ddpm

    scheduler = DDPMScheduler()
    timesteps = torch.tensor([0, 10, 400, 999])  # the last one's weight is cut off
    noise, noise_pred = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for i, t in enumerate(timesteps.tolist()):
        alpha_bar = math.prod(1.0 - beta for beta in scheduler.betas[: t + 1].double().tolist())
        weight = min(math.sqrt((1.0 - alpha_bar) / alpha_bar), 10.0)
        expected += weight * (noise[i] - noise_pred[i]).double().square().mean().item() / 4
    loss = train_ddpm.denoising_loss(noise_pred, noise, timesteps, scheduler, debiased=True)
    assert loss.item() == pytest.approx(expected, rel=1e-4)  # compute_snr works in float32
    plain = train_ddpm.denoising_loss(noise_pred, noise, timesteps, scheduler)
    assert plain.item() == pytest.approx((noise - noise_pred).square().mean().item())


def test_a_peft_outside_the_range_is_refused_at_import(tmp_path):
    """One that has nothing of what the package imports."""
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").touch()
    (tmp_path / "peft-0.99.0.dist-info").mkdir()
    (tmp_path / "peft-0.99.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.99.0\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import vdu_peft"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and f"needs peft{PEFT_VERSIONS}, found 0.99.0: pip install" in run.stderr


def test_the_range_is_the_one_that_pip_is_told():
    (peft,) = [r for r in map(Requirement, requires("vdu-peft")) if r.name == "peft"]
    assert peft.specifier == SpecifierSet(PEFT_VERSIONS)
