import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
import yaml
from conftest import saved_adapter, tiny_text_pipeline, tiny_unet
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from vdu_peft import cli_unlearn, demo, replay, trainer
from vdu_peft import options as command_line
from vdu_peft.adapter import load_adapter
from vdu_peft.cli import main
from vdu_peft.contexts import adapter_scale
from vdu_peft.demo import assets
from vdu_peft.denoiser import Denoiser
from vdu_peft.evaluation import Report
from vdu_peft.judge import AttributeJudge
from vdu_peft.pictures import labelled_grids
from vdu_peft.prompts import neutral_prompts
from vdu_peft.reached import Reached
from vdu_peft.strength import Strength
from vdu_peft.text_denoiser import open_denoiser

FAST = ["--max_train_steps=3", "--train_batch_size=4", "--replay_size=8", "--replay_inference_steps=2"]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(8):
        image = Image.new("L", (16, 16), 0)
        image.paste(255, (4, 4, 12, 12 - i % 3))
        image.save(folder / f"{i}.png")
    return folder


@pytest.fixture
def unlearn_command(pipeline_folder, pictures, tmp_path):
    return [
        "unlearn",
        f"--model={pipeline_folder}",
        f"--forget_data={pictures}",
        f"--output_dir={tmp_path / 'out'}",
        *FAST,
        "--learning_rate=0.02",
    ]


@pytest.mark.parametrize(("remaining", "mend"), [(20, True), (1, False)])
def test_what_is_left_in_the_end_is_told(unlearn_command, monkeypatch, capsys, remaining, mend):
    monkeypatch.setattr(trainer, "calibrate", lambda *_, **__: Strength(1.25, 40, remaining, 0.025))
    assert main([*unlearn_command, "--max_train_steps=5", "--learning_rate=0.05"]) == 0
    shown = capsys.readouterr().out
    assert f"of 40 own samples that looked like the forget images {remaining} still do, drawn again; the delta" in shown
    assert ("a smaller stability_weight or more images forget more" in shown) == mend


def samples_panels(denoiser, adapter, labels):
    """What a run's samples.png shows, by hand: of each kind the same noise with the adapter off and on."""
    load_adapter(denoiser.model, adapter)
    panels = {}
    for kind, each in labels.items():
        for title, scale in (("adapter off", 0), ("adapter on", 1)):
            with adapter_scale(denoiser.model, scale):
                drawn = denoiser.sample(8, seed=0, num_inference_steps=2, class_labels=each)
            panels[f"{kind}, {title}"] = drawn
    return panels


def test_from_a_folder_of_pictures_to_a_merged_pipeline(
    pipeline_folder, pictures, unlearn_command, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(replay, "quick_precision", lambda _: "no")
    main(unlearn_command)
    panels = samples_panels(Denoiser.from_pretrained(pipeline_folder), tmp_path / "out" / "adapter", {"any": None})
    assert (panels["any, adapter off"] - panels["any, adapter on"]).abs().max() > 0.1
    picture, shown = labelled_grids(panels, columns=2), Image.open(tmp_path / "out" / "samples.png")
    # To its left is what looks like the forget images, if anything does.
    np.testing.assert_array_equal(np.asarray(shown)[:, -picture.width :], np.asarray(picture))
    shown = capsys.readouterr().out
    assert "after 3 steps" in shown and "92 variations of the forget images" in shown
    assert Image.open(tmp_path / "out" / "loss.png").width == 4 * 300
    # 10 columns of 8 pixels at double size in two panels; the variations in 10 rows.
    assert Image.open(tmp_path / "out" / "variations.png").size == (2 * 160 + 12, 10 * 16 + 24)
    model_and_adapter = [f"--model={pipeline_folder}", f"--adapter={tmp_path / 'out' / 'adapter'}"]
    grid = tmp_path / "grid.png"
    sample = ["sample", *model_and_adapter, "--num_images=4", "--num_inference_steps=2", f"--output_file={grid}"]
    assert main([*sample, "--scale", "0", "0.5", "1", "down_blocks=0.5,mid_block=0"]) == 0
    assert Image.open(grid).width > 3 * 8 * 8
    assert main(["sample", f"--model={pipeline_folder}", f"--output_file={pictures}"]) == 2
    assert "not an image file name" in capsys.readouterr().err
    (tmp_path / "a.png").mkdir()
    assert main(["sample", f"--model={pipeline_folder}", f"--output_file={tmp_path / 'a.png'}"]) == 2
    assert "a.png is a folder; name a file" in capsys.readouterr().err
    assert main(["sample", f"--model={pipeline_folder}", "--scale=0.5"]) == 2
    assert "scale: is an adapter's" in capsys.readouterr().err
    assert main(["inspect", *model_and_adapter]) == 0
    shown = capsys.readouterr().out
    assert "down_blocks.0.resnets.0.conv1" in shown and '"prior_scale": 0.1' in shown

    merged = tmp_path / "merged"
    assert main(["merge", *model_and_adapter, f"--output_dir={merged}"]) == 0
    assert f"DiffusionPipeline.from_pretrained('{merged}', dtype=torch.float32)" in capsys.readouterr().out
    stock = DDPMPipeline.from_pretrained(merged)  # no layer of ours in it
    assert type(stock.unet.conv_in) is torch.nn.Conv2d
    denoiser = Denoiser.from_pretrained(pipeline_folder)
    load_adapter(denoiser.model, tmp_path / "out" / "adapter")
    ours = denoiser.sample(2, seed=3, num_inference_steps=4)
    generators = [torch.Generator().manual_seed(3 * 1_000_003 + i) for i in range(2)]
    pipeline = DDIMPipeline(stock.unet, stock.scheduler)
    theirs = pipeline(batch_size=2, generator=generators, num_inference_steps=4, output_type="np").images
    # W + BA added once against two products per forward: float32 rounding over four sampler steps.
    torch.testing.assert_close((ours + 1) / 2, torch.from_numpy(theirs).movedim(-1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_alike", [0, 3, 9])
def test_the_picture_shows_what_looked_like_the_forget_images(
    pipeline_folder, unlearn_command, tmp_path, monkeypatch, num_alike
):
    """From the seeds that such samples were drawn from, at most eight of them."""
    monkeypatch.setattr(replay, "quick_precision", lambda _: "no")
    seeds, own_replay = list(range(50, 50 + num_alike)), trainer.own_replay

    def with_seeds(*args):
        images, labels, own = own_replay(*args)
        own.seeds[:] = seeds
        return images, labels, own

    monkeypatch.setattr(trainer, "own_replay", with_seeds)
    monkeypatch.setattr(trainer, "calibrate", lambda *_, **__: Strength(1.0, 1, 0, 0.05))
    main(unlearn_command)
    denoiser = Denoiser.from_pretrained(pipeline_folder)
    panels = samples_panels(denoiser, tmp_path / "out" / "adapter", {"any": None})
    if seeds:
        alike = {}
        for title, scale in (("adapter off", 0), ("adapter on", 1)):
            with adapter_scale(denoiser.model, scale):
                alike[f"forget-like, {title}"] = denoiser.sample(len(seeds[:8]), seed=seeds[:8], num_inference_steps=2)
        panels = alike | panels
    picture = labelled_grids(panels, columns=2)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "samples.png")), np.asarray(picture))


def test_the_picture_of_a_class_conditional_model(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(replay, "quick_precision", lambda _: "no")
    DDPMPipeline(tiny_unet(num_class_embeds=4), DDPMScheduler()).save_pretrained(tmp_path / "classes")
    command = ["unlearn", f"--model={tmp_path / 'classes'}", f"--forget_data={pictures}", *FAST]
    command += [f"--output_dir={tmp_path / 'out'}", "--forget_class=2", "--anchor_class=0", "--null_class=3"]
    main([*command, "--learning_rate=0.02"])
    labels = {"forgotten": [2], "retained": [1]}
    panels = samples_panels(Denoiser.from_pretrained(tmp_path / "classes"), tmp_path / "out" / "adapter", labels)
    picture = labelled_grids(panels, columns=2, numbered=True)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "samples.png")), np.asarray(picture))
    assert "forgotten, in turn:\n    1 class 2\n  retained, in turn:\n    1 class 1\n" in capsys.readouterr().out


def test_a_picture_that_cannot_be_drawn_costs_the_picture_alone(unlearn_command, tmp_path, monkeypatch, capsys):
    def too_little_memory(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(cli_unlearn, "draw_replay", too_little_memory)
    assert main([*unlearn_command, "--max_train_steps=20"]) == 0
    shown = capsys.readouterr().err
    assert (
        "warning: not all pictures could be drawn (OutOfMemoryError: CUDA out of memory.); the adapter is whole"
        in shown
    )
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("module", "name", "options", "mend"),
    [
        (trainer, "own_replay", [], "checkpointing_steps keeps what is learned"),
        (trainer, "own_replay", ["--mixed_precision=bf16", "--dry_run"], None),
        (trainer, "run_status", [], "checkpointing_steps keeps what is learned"),
        (trainer, "run_status", ["--checkpointing_steps=1"], "--resume_from_checkpoint latest goes on from"),
        (
            trainer,
            "calibrate",
            ["--checkpointing_steps=1", "--max_train_steps=20"],
            "all steps are done, and the adapter",
        ),
        (cli_unlearn, "draw_replay", ["--checkpointing_steps=1"], "all steps are done, and the adapter"),
    ],
)
def test_an_interrupt_is_one_line_that_says_how_to_go_on(
    unlearn_command, tmp_path, monkeypatch, capsys, module, name, options, mend
):
    """By what this run has written: an earlier one's checkpoint and adapter lie there."""
    main([*unlearn_command, "--checkpointing_steps=1"])
    for file in (tmp_path / "out").rglob("*.safetensors"):
        os.utime(file, (0, 0))
    monkeypatch.setattr(module, name, lambda *_, **__: signal.raise_signal(signal.SIGINT))
    code = main([*unlearn_command, "--overwrite", *options])
    shown = capsys.readouterr().err.splitlines()[-1]
    if mend is None:
        assert code == 0
    else:
        assert code == 130 and shown.startswith("vdu-peft: interrupted; ") and mend in shown


def test_who_begins_again_is_told_of_the_checkpoint(unlearn_command, capsys):
    main([*unlearn_command, "--checkpointing_steps=1"])
    assert main(unlearn_command) == 2
    assert "holds a run's checkpoint; go on from it with --resume_from_checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["unlearn", "evaluate", "sample"])
def test_an_output_that_cannot_be_written_is_found_before_any_work(command, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    option = "output_file" if command == "sample" else "output_dir"
    arguments = ["--model=nowhere", f"--{option}={tmp_path / 'file' / 'out.png'}", "--adapter=nowhere"]
    if command == "unlearn":
        arguments[-1:] = ["--forget_data=nowhere", "--dry_run"]
    assert main([command, *arguments]) == 2
    assert f"file is a file, not a folder; choose another {option}" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_may_not_be_written_is_found_before_any_work(tmp_path, capsys):
    (tmp_path / "kept").mkdir(mode=0o555)
    assert main(["sample", "--model=nowhere", f"--output_file={tmp_path / 'kept' / 'grid.png'}"]) == 2
    assert "kept cannot be written into; choose another output_file" in capsys.readouterr().err


def test_an_option_that_is_not_there_is_told_with_the_one_most_like_it(unlearn_command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*unlearn_command, "--learning_rat=0.1"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --learning_rat=0.1; is it --learning_rate?" in capsys.readouterr().err


def test_a_run_s_folder_in_place_of_its_adapter_is_told(tmp_path, capsys):
    saved_adapter(tmp_path / "out" / "adapter")
    assert main(["export", f"--adapter={tmp_path / 'out'}", f"--output_dir={tmp_path / 'lora'}"]) == 2
    assert f"no adapter_config.json there; give {tmp_path / 'out' / 'adapter'}" in capsys.readouterr().err


def test_prompts_to_retain_that_hold_the_concept_are_warned_of(tmp_path, pictures, caplog):
    tiny_text_pipeline(tmp_path / "tokens").save_pretrained(tmp_path / "sd")
    (tmp_path / "retain.txt").write_text("a cat\nA Sword, a dog\na sword\n")
    command = ["unlearn", f"--model={tmp_path / 'sd'}", f"--forget_data={pictures}", f"--output_dir={tmp_path / 'out'}"]
    command += ["--forget_prompt=a sword", "--dry_run"]
    assert main([*command, f"--retain_prompts={tmp_path / 'retain.txt'}"]) == 0
    # The forgotten prompt itself is not retained, and so no matter.
    assert "1 of 3 hold what is to be forgotten, such as 'A Sword, a dog', and would keep it; take" in caplog.text
    caplog.clear()
    assert main(command) == 0 and "hold what is" not in caplog.text
    (own, *_), count = neutral_prompts(), len(neutral_prompts())
    assert main([*command, f"--forget_prompt={own.split()[-1]}"]) == 0
    assert f"of {count} of the package's own hold what" in caplog.text and "give others in a file" in caplog.text


@pytest.mark.parametrize(("left", "told"), [(0.7, True), (0.3, False), (None, False)])
def test_a_run_that_is_far_from_its_anchor_says_what_goes_further(unlearn_command, monkeypatch, capsys, left, told):
    monkeypatch.setattr(trainer, "reached", lambda *_, **__: Reached(1.5, 0.0, left))
    main([*unlearn_command, "--min_forget_images=0"])
    assert ("more than half of the way to the anchor is left" in capsys.readouterr().out) == told


def test_a_run_that_is_not_finite_leaves_no_picture_of_an_earlier_one_s(unlearn_command, tmp_path, capsys):
    main(unlearn_command)
    assert (tmp_path / "out" / "samples.png").is_file()
    assert main([*unlearn_command, "--overwrite", "--learning_rate=1e30"]) == 1
    assert "not finite" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.png")) and (tmp_path / "out" / "adapter").is_dir()


def test_a_run_without_variations_leaves_no_picture_of_an_earlier_one_s(unlearn_command, tmp_path, capsys):
    for options, made in (([], True), (["--overwrite", "--min_forget_images=8"], False)):
        main([*unlearn_command, *options])
        assert ("variations of the forget images" in capsys.readouterr().out) == made
        assert (tmp_path / "out" / "variations.png").is_file() == made


def test_forgetting_is_measured_by_the_forget_images_alone(
    unlearn_command, pipeline_folder, pictures, tmp_path, capsys
):
    main(unlearn_command)
    evaluate = ["evaluate", f"--model={pipeline_folder}", f"--adapter={tmp_path / 'out' / 'adapter'}"]
    evaluate += [f"--forget_data={pictures}", f"--output_dir={tmp_path / 'report'}", "--num_inference_steps=2"]
    capsys.readouterr()
    for options, message in (
        (["--num_samples=99"], "num_samples must be at least 100"),
        (["--forget_class=1"], "forget_class: forget_data is looked for without a judge"),
        (["--clip_model=clip"], "clip_model: goes with prompts"),
        (["--prompts=prompts.csv"], "forget_data: of a prompt file the judge tells what is forgotten"),
    ):
        assert main([*evaluate, *options]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "one").mkdir()
    shutil.copy(pictures / "0.png", tmp_path / "one")
    assert main([*evaluate, f"--forget_data={tmp_path / 'one'}"]) == 2
    assert "forget_data: one image does not tell what is like it" in capsys.readouterr().err
    assert main([*evaluate, "--num_samples=100"]) == 0
    shown = capsys.readouterr().out
    assert "samples that look like the forget images: " in shown
    assert f"look at {tmp_path / 'report' / 'grid.png'}; figures are in {tmp_path / 'report' / 'report.json'}" in shown
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["num_forget_images"] == 8 and report["forget_data"] == str(pictures)
    assert (tmp_path / "report" / "grid.png").is_file()


def test_a_concept_of_a_text_to_image_model(tmp_path, pictures, pipeline_folder, capsys, monkeypatch):
    monkeypatch.setattr(replay, "quick_precision", lambda _: "no")
    tiny_text_pipeline(tmp_path / "tokens").save_pretrained(tmp_path / "sd")
    (tmp_path / "retain.txt").write_text("a cat\na dog\n")
    model, out = f"--model={tmp_path / 'sd'}", tmp_path / "out"
    command = ["unlearn", model, f"--forget_data={pictures}", f"--output_dir={out}", *FAST]
    assert main(command) == 2
    assert "forget_prompt: the model draws from prompts" in capsys.readouterr().err
    prompts = ["--forget_prompt=a sword", "--anchor_prompt=a hand"]
    for clash, message in (
        ("--forget_prompt=a hand", "forget_prompt: must be a prompt other than the anchor_prompt"),
        ("--forget_prompt=", "anchor_prompt: an empty forget_prompt is redirected to nothing"),
    ):
        assert main([*command, *prompts, clash]) == 2
        assert message in capsys.readouterr().err
    # The dry run finds what the run would: eight replay images for thirty everyday prompts.
    assert main([*command, *prompts, "--dry_run"]) == 2
    assert "replay_size: 8 images cannot show all" in capsys.readouterr().err
    retain = f"--retain_prompts={tmp_path / 'retain.txt'}"
    assert main([*command, prompts[0], retain, "--plasticity=elbo", "--dry_run"]) == 0
    capsys.readouterr()
    assert main([*command, *prompts, retain, "--plasticity=elbo", "--dry_run"]) == 2
    assert "anchor_prompt: plasticity elbo redirects to nothing" in capsys.readouterr().err
    assert main([*command, *prompts, f"--retain_prompts={tmp_path / 'nowhere'}"]) == 2
    assert "not a readable text file of prompts" in capsys.readouterr().err
    assert main([*command, *prompts, retain]) in (0, 1)
    shown = capsys.readouterr().out
    assert "after 3 steps" in shown and "of the way to the anchor left" in shown
    assert "forgotten, in turn:\n    1 'a sword'\n  retained, in turn:\n    1 'a cat'\n    2 'a dog'\n" in shown
    # What is told of it and put together takes the network alone: a pipeline without its VAE serves.
    shutil.copytree(tmp_path / "sd", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "vae")
    encoder = tmp_path / "cut" / "text_encoder" / "model.safetensors"
    encoder.rename(encoder.with_name("model.fp16.safetensors"))  # a variant of another part
    shutil.copytree(out / "adapter", tmp_path / "again")
    adapters = [str(out / "adapter"), str(tmp_path / "again")]
    assert main(["inspect", f"--model={tmp_path / 'cut'}", f"--adapter={adapters[0]}"]) == 0
    compose = ["compose", f"--model={tmp_path / 'cut'}", "--adapter", *adapters]
    assert main([*compose, f"--output_dir={tmp_path / 'both'}"]) == 0
    shutil.copytree(tmp_path / "cut", tmp_path / "empty", ignore=shutil.ignore_patterns("diffusion_*.safetensors"))
    assert main(["inspect", f"--model={tmp_path / 'empty'}", f"--adapter={adapters[0]}"]) == 2
    assert "pipeline (no .safetensors file in unet)" in capsys.readouterr().err
    # Nor can the model be written over.
    assert main([*compose, f"--output_dir={tmp_path / 'cut'}", "--overwrite"]) == 2
    assert "cut: would be replaced, and " in capsys.readouterr().err and (tmp_path / "cut" / "unet").is_dir()
    assert Image.open(out / "loss.png").width == 5 * 300  # a panel for the redirection, too
    denoiser = open_denoiser(tmp_path / "sd", ["a sword", "a hand", "", "a cat", "a dog"])
    # The anchor and the empty prompt, which replay draws, too, stand in for what is forgotten.
    labels = {"forgotten": [0], "retained": [denoiser.label(p) for p in ("a cat", "a dog")]}
    picture = labelled_grids(samples_panels(denoiser, out / "adapter", labels), columns=2, numbered=True)
    np.testing.assert_array_equal(np.asarray(Image.open(out / "samples.png")), np.asarray(picture))
    assert main([*command, "--overwrite", "--forget_prompt=", retain]) in (0, 1)
    assert "redirect" not in json.loads((out / "history.json").read_text())[0]
    assert "| forgotten | '' |" in (out / "adapter" / "README.md").read_text()
    assert main([*command, "--overwrite", "--caption_column=text"]) == 2
    assert "no metadata.csv or metadata.jsonl there" in capsys.readouterr().err
    names = sorted(file.relative_to(pictures).as_posix() for file in pictures.rglob("*.png"))
    rows = "".join(f"{name},a sword of {name}\n" for name in names)
    (pictures / "metadata.csv").write_text(f"file_name,text\n{rows}")
    assert main([*command, "--overwrite", "--caption_column=text", *prompts]) == 2
    assert "forget_prompt: caption_column gives each image its own" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--caption_column=text", "--forget_class=1"]) == 2
    assert "forget_class: a text-to-image model's classes are prompts" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--caption_column=text", retain, "--dry_run"]) == 0
    assert main([*command, "--overwrite", "--caption_column=text", retain]) in (0, 1)
    assert "after 3 steps" in capsys.readouterr().out
    captions = [*command, "--overwrite", "--caption_column=text", retain]
    for options, message in (
        (["--anchor_concept=a hand"], "anchor_concept: stands in place of a forget_concept"),
        (["--forget_concept", "a hat"], "none of it is in the caption 'a sword of"),
        (["--forget_concept", "a sword", "--anchor_prompt=a cat"], "leave out anchor_prompt"),
        ([f"--anchor_prompt=a sword of {names[0]}"], "is the caption of a forget image itself"),
    ):
        assert main([*captions, *options]) == 2
        assert message in capsys.readouterr().err
    assert main([*command, "--forget_prompt=a cat", "--overwrite", "--forget_concept", "a cat"]) == 2
    assert "looked for in captions; give a caption_column" in capsys.readouterr().err
    anchored = [*captions, "--forget_concept", "a sword", "--anchor_concept=a hand", "--replay_size=32"]
    assert main(anchored) in (0, 1)
    assert "after 3 steps" in capsys.readouterr().out
    grid, adapter = tmp_path / "grid.png", f"--adapter={out / 'adapter'}"
    sample = ["sample", model, adapter, "--num_images=2", "--num_inference_steps=2", f"--output_file={grid}"]
    assert main([*sample, "--prompt", "a sword", "--class_labels", "1"]) == 2
    assert main([*sample, "--prompt", "a sword", "a cat"]) == 0
    assert Image.open(grid).width > 2 * 2 * 16
    one = ["sample", model, "--num_inference_steps=1", f"--output_file={grid}", "--prompt"]
    for count, rows in ((2, 1), (9, 2)):  # 8 of any number of prompts, and every prompt once
        assert main([*one, *(f"cat {i}" for i in range(count))]) == 0
        assert Image.open(grid).height == rows * 2 * 16 + 24
    assert main(["export", adapter, "--format=kohya", f"--output_dir={tmp_path / 'lora'}"]) == 0
    assert main(["merge", model, adapter, f"--output_dir={tmp_path / 'merged'}"]) == 0
    assert (tmp_path / "merged" / "vae").is_dir() and (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
    unconditional = [f"--model={pipeline_folder}", f"--forget_data={pictures}", f"--output_dir={tmp_path / 'other'}"]
    assert main(["unlearn", *unconditional, "--forget_prompt=a sword"]) == 2
    assert "is not a text-to-image model" in capsys.readouterr().err


def test_a_prompt_file_is_evaluated(tmp_path, pipeline_folder, pictures, capsys, caplog):
    tiny_text_pipeline(tmp_path / "tokens").save_pretrained(tmp_path / "sd")
    evaluate = ["evaluate", f"--model={tmp_path / 'sd'}", "--adapter=a", f"--output_dir={tmp_path / 'report'}"]
    for options in (
        ["--forget_data", str(pictures)],
        ["--judge=a", "--reference=b", "--label_column=c", "--forget_class=1"],
    ):
        assert main([*evaluate, *options]) == 2
        assert "model: a StableDiffusionPipeline, which draws what prompts ask for" in capsys.readouterr().err
    saved_adapter(tmp_path / "adapter", model=tiny_text_pipeline(tmp_path / "tokens").unet)
    AttributeJudge({"who": ["elf", "orc"], "weapon": ["", "axe", "sword"]}, (16, 16)).save(tmp_path / "judge")
    (tmp_path / "prompts.csv").write_text(
        "prompt,who,weapon,sd_image_width,sd_image_height\nan elf with a sword,elf,sword,512,512\nan orc,orc,,16,16\n"
    )
    for name, count in (("real", 100), ("few", 4)):
        np.savez(tmp_path / f"{name}.npz", images=np.zeros((count, 16, 16, 3), dtype=np.uint8))
    evaluate = ["evaluate", f"--adapter={tmp_path / 'adapter'}", f"--prompts={tmp_path / 'prompts.csv'}"]
    evaluate += [f"--output_dir={tmp_path / 'report'}", "--num_inference_steps=2"]
    model, judge = f"--model={tmp_path / 'sd'}", [f"--judge={tmp_path / 'judge'}", "--forget_attribute=weapon=sword"]
    for options, message in (
        ([model], "judge: nothing would be measured"),
        ([model, judge[0]], "give both or neither"),
        ([model, *judge, "--forget_class=1"], "a prompt file's target is a forget_attribute"),
        ([model, "--clip_model=nowhere", "--reference=x"], "give a judge"),
        ([model, *judge, "--resolution=32"], r"judge: takes (16, 16) images"),
        ([model, *judge, f"--reference={tmp_path / 'few.npz'}"], "reference: 4 images are too few"),
        ([model, *judge, "--label_column=x"], "the reference of a prompt file has no labels"),
        ([model, *judge, "--forget_label=x"], "forget_label: chooses from forget_data, which is not given"),
        ([model, f"--clip_model={tmp_path / 'nowhere'}"], "cannot be loaded as a CLIP model"),
        ([model, *judge, "--guidance_scale=-1"], "guidance_scale must be a number from 0"),
        ([f"--model={pipeline_folder}", *judge], "is not a text-to-image model"),
        ([f"--model={pipeline_folder}", *judge, "--dtype=bfloat16"], "dtype: "),
        *([] if torch.cuda.is_available() else [([model, *judge, "--dtype=float16"], "float16 needs a GPU")]),
    ):
        assert main([*evaluate, *options]) == 2
        assert message in capsys.readouterr().err
    caplog.clear()
    assert main([*evaluate, model, *judge, f"--reference={tmp_path / 'real.npz'}"]) == 0
    assert caplog.text.count("prompts: 1 of 2 name another size than 16 x 16, such as 512 x 512") == 1
    assert "1 images of target prompts, 1 of others" in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {*report["figures"]} == {"UA", "IRA", "CRA", "target prompts, other attributes"}
    assert report["figures"]["IRA"]["before"] is None  # the other prompt asks for no weapon
    assert report["sampler"].startswith("DDIMScheduler, 2 steps") and report["forget_attribute"] == "weapon=sword"
    assert main([*evaluate, model, "--nudenet", "--dtype=bfloat16", "--overwrite"]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["dtype"] == "bfloat16" and len(report["figures"]) == 10
    assert report["figures"]["NudeNet, exposed parts"] == {"before": 0, "after": 0}
    class_options = [model, f"--adapter={tmp_path / 'adapter'}", f"--output_dir={tmp_path / 'other'}"]
    assert main(["evaluate", *class_options, "--forget_attribute=weapon=sword", "--judge=x"]) == 2
    assert "reference: needed to evaluate a forgotten class" in capsys.readouterr().err
    class_options += ["--judge=x", "--reference=x", "--label_column=x", "--forget_class=1"]
    assert main(["evaluate", *class_options, "--guidance_scale=0"]) == 2
    assert "guidance_scale: goes with prompts" in capsys.readouterr().err


def test_compose(pipeline_folder, unlearn_command, tmp_path, capsys):
    main([*unlearn_command, "--rank=3"])
    adapter, both = tmp_path / "out" / "adapter", tmp_path / "both"
    command = ["compose", f"--model={pipeline_folder}", f"--output_dir={both}", "--adapter", str(adapter)]
    shutil.copytree(adapter, tmp_path / "again")
    assert main([*command, str(tmp_path / "again"), "--rank=2"]) == 0
    assert "discards: at most" in capsys.readouterr().out
    model_and_adapter = [f"--model={pipeline_folder}", f"--adapter={both}"]
    assert main(["inspect", *model_and_adapter]) == 0
    assert '"r": 2' in capsys.readouterr().out
    assert main(command) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 2
    assert "at least two adapters" in capsys.readouterr().err


def test_options_from_a_file_and_the_command_line_wins(unlearn_command, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        yaml.safe_dump({"max_train_steps": 9, "rank": 2, "variational": False, "overwrite": False, "lora_alpha": 0.5})
    )
    main([*unlearn_command, f"--config={file}"])
    assert "after 3 steps" in capsys.readouterr().out
    adapter = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 2 and adapter["variational"] is False and adapter["lora_alpha"] == 0.5
    file.write_text(yaml.safe_dump({"earlystopping": False}))
    assert main([*unlearn_command, "--overwrite", f"--config={file}"]) == 2
    assert "run.yaml: unlearn has no option earlystopping; did you mean early_stopping?" in capsys.readouterr().err
    file.write_text("max_train_step: 10\n")  # not false: the parser would have told it, without the file
    assert main([*unlearn_command, "--overwrite", f"--config={file}"]) == 2
    assert "run.yaml: unlearn has no option max_train_step; did you mean" in capsys.readouterr().err
    file.write_text("mixed_precision: no\n")  # which is false to YAML, and not fp16
    assert main([*unlearn_command, "--overwrite", f"--config={file}"]) == 2
    assert "run.yaml: mixed_precision takes a value; quote it" in capsys.readouterr().err
    assert main([f"--config={file}", *unlearn_command]) == 2
    assert "the command comes first, as in vdu-peft unlearn --config" in capsys.readouterr().err
    file.write_text("forget_label: []\ntarget_modules: [-a]\nforget_prompt: -a\n")
    assert main([*unlearn_command, "--overwrite", f"--config={file}"]) == 2
    assert "forget_prompt: " in capsys.readouterr().err


def test_options_from_a_json_file_indented_by_tabs(unlearn_command, tmp_path, capsys):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"dry_run": True, "forget_data": "/nowhere"}, indent="\t"))
    assert main([*unlearn_command, f"--config={file}"]) == 0
    assert "dry run" in capsys.readouterr().out
    file.write_text("{")
    assert main([*unlearn_command, f"--config={file}"]) == 2
    assert "run.json: not a readable YAML or JSON file" in capsys.readouterr().err


def test_help_tells_every_default(capsys):
    told = {
        "unlearn": [
            "Default: 350",
            "left out, 0.003, and 0.0001 for a text",
            "default train",
            "random. Default: 0.",
            "Default: False.",
        ]
    }
    told |= {
        "sample": [
            "default 64, of a text-to-image model 8",
            "Default: 25.",
            "Default: samples.png.",
            "scale. Default: 0.",
        ]
    }
    told |= {"evaluate": ["Default: 1000.", "Default: 25.", "samples. Default: 1.", "test of the reference"]}
    told |= {"demo": ["Default: 200.", "Default: demo."]}
    for name, texts in told.items():
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert all(text in shown for text in texts), name
        assert "When None" not in shown and "Default: None" not in shown


def test_dry_run_writes_nothing(unlearn_command, tmp_path, capsys):
    assert main([*unlearn_command, "--dry_run"]) == 0
    assert "dry run" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_tensorboard_gets_every_term(unlearn_command, tmp_path):
    main([*unlearn_command, "--report_to=tensorboard"])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "out" / "unlearn"))
    events.Reload()
    assert {"loss", "plasticity", "stability", "kl", "forget_ratio"} <= set(events.Tags()["scalars"])


WOULD_NOT_START = [("--report_to=aim", "report_to aim: its package is not installed")]
WOULD_NOT_START += [("--report_to=nothing", "report_to nothing: ")]
if not torch.cuda.is_available():
    WOULD_NOT_START += [("--mixed_precision=fp16", "mixed_precision fp16: needs a GPU")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has fp16")
def test_fp16_on_a_cpu_is_refused_before_anything_is_loaded(tmp_path, capsys):
    command = ["unlearn", "--model=nowhere", "--forget_data=nowhere", f"--output_dir={tmp_path / 'out'}"]
    assert main([*command, "--mixed_precision=fp16"]) == 2
    assert "mixed_precision fp16: needs a GPU; use bf16 or no" in capsys.readouterr().err


FOUND_BY_A_DRY_RUN = [
    *WOULD_NOT_START,
    ("--target_modules=nothing_like_it", "target_modules"),
    ("--replay_inference_steps=2000", "replay_inference_steps must lie in 1 to 1000"),
    ("--resume_from_checkpoint=latest", "no checkpoint to resume from"),
]


@pytest.mark.parametrize("option, message", FOUND_BY_A_DRY_RUN)
def test_a_dry_run_finds_what_would_not_start(unlearn_command, tmp_path, capsys, option, message):
    assert main([*unlearn_command, option, "--dry_run"]) == 2
    said = capsys.readouterr()
    assert message in said.err and "are fine" not in said.out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option, message", [*WOULD_NOT_START, ("--rank=1000000", "target_modules")])
def test_the_demo_finds_what_would_not_start_before_it_samples(tmp_path, capsys, monkeypatch, option, message):
    monkeypatch.setattr(Denoiser, "sample", lambda *_, **__: pytest.fail("sampled"))
    assert main(["demo", f"--output_dir={tmp_path / 'demo'}", option]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, message",
    [
        ("--rank=0", "rank must be at least 1"),
        ("--target_modules=nothing_like_it", "target_modules"),
        ("--forget_target=1", "forget_target must be a number greater than 1"),
        ("--learning_rate=inf", "learning_rate must be a number greater than 0"),
        ("--stability_weight=inf", "stability_weight must be a number from 0"),
        ("--anchor_prompt=a dog", "anchor_prompt: "),
        ("--retain_prompts=/nowhere", "retain_prompts: "),
        ("--image_column=images", "a folder of images has no image_column"),
        ("--label_column=labels", "label_column: chooses nothing by itself; say which label to forget"),
        ("--forget_data=nowhere/", "nowhere: no such folder or .npz file"),
        ("--model=/nowhere", "/nowhere: no such folder"),
        ("--model=./nowhere", "./nowhere: no such folder"),
        ("--forget_data=/nowhere", "/nowhere: no such folder"),
        ("--resume_from_checkpoint=latest", "no checkpoint to resume from"),
        ("--seed=-1", "seed must lie in"),
        ("--forget_tolerance=2", "forget_tolerance must lie in"),
        ("--max_forget_images=0", "max_forget_images must be at least 1"),
        ("--replay_inference_steps=2000", "replay_inference_steps must lie in 1 to 1000"),
        ("--config=/nowhere.yaml", "/nowhere.yaml: not a readable"),
        ("--guidance_scale=2", "guidance_scale: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(unlearn_command, capsys, option, message):
    assert main([*unlearn_command, option]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vdu-peft: error:") and message in error


def test_an_output_dir_that_is_not_empty_is_refused(unlearn_command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    assert main(unlearn_command) == 2
    assert "choose another output_dir or pass --overwrite" in capsys.readouterr().err


def test_nothing_learned_is_exit_code_1(unlearn_command, capsys):
    assert main([*unlearn_command, "--learning_rate=1e-9", "--train_batch_size=32"]) == 1
    assert "nothing learned: raise max_train_steps" in capsys.readouterr().err


def test_a_killed_run_resumes(unlearn_command, tmp_path, capsys):
    checkpoint = tmp_path / "out" / "checkpoint.safetensors"
    command = [*unlearn_command, "--max_train_steps=30", "--no-early_stopping", "--checkpointing_steps=1"]
    process = subprocess.Popen([sys.executable, "-m", "vdu_peft", *command], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with safe_open(checkpoint, framework="pt") as stored:
        steps = len(json.loads(stored.metadata()["history"]))
    assert 1 <= steps < 30
    assert main([*command, "--resume_from_checkpoint=latest"]) in (0, 1)
    assert "after 30 steps" in capsys.readouterr().out


def test_the_demo_s_module_is_imported_where_there_is_no_resource(monkeypatch):
    """Every command imports it, and on Windows there is no such module."""
    monkeypatch.setitem(sys.modules, "resource", None)
    assert "run_demo" in runpy.run_path(demo.__file__)


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
from vdu_peft.adapter import load_adapter
from vdu_peft.cli import main
from vdu_peft.demo import assets
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("checkpointing", ["1", "0"], ids=["checkpoint", "adapter"])
def test_a_full_disk_keeps_what_was_saved_before(unlearn_command, tmp_path, checkpointing):
    assert main([*unlearn_command, "--checkpointing_steps=1"]) in (0, 1)
    saved = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    command = [*unlearn_command, "--overwrite", "--seed=1", f"--checkpointing_steps={checkpointing}"]
    run = subprocess.run([sys.executable, "-c", FULL_DISK, *command], capture_output=True, text=True)
    assert run.returncode == 2 and "is kept" in run.stderr.splitlines()[-1], run.stderr
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == saved


@pytest.mark.parametrize("command", ["unlearn", "sample", "compose", "merge", "export", "inspect", "evaluate", "demo"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and f"example:\n  vdu-peft {command}" in capsys.readouterr().out


def test_help_explains_the_runs_options_in_the_docstrings_words(capsys):
    with pytest.raises(SystemExit):
        main(["unlearn", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for told in (
        "c of hinge and reciprocal: raise the forget images' denoising loss to c times the original, and no further. "
        "Default: 3.0.",
        "--plasticity {hinge,reciprocal,elbo} hinge or reciprocal (bounded)",
        "--max_forget_timestep MAX_FORGET_TIMESTEP and to less than this one. When",
        "--seed SEED of everything random. Default: 0.",
        "--rank RANK Rank of the adapter. Default: 4.",
    ):
        assert told in shown, told


STOCK_SAMPLES = """
import sys
from diffusers import DDIMPipeline, DDPMPipeline
from peft import PeftModel
from safetensors.torch import save_file
import torch
base, adapter, merged, out = sys.argv[1:]
images = {}
for name, folder in (("adapter", base), ("merged", merged)):
    pipeline = DDPMPipeline.from_pretrained(folder, dtype=torch.float32)
    unet = PeftModel.from_pretrained(pipeline.unet, adapter).get_base_model() if name == "adapter" else pipeline.unet
    pipeline = DDIMPipeline(unet, pipeline.scheduler)
    generators = [torch.Generator().manual_seed(3 * 1_000_003 + i) for i in range(2)]
    output = pipeline(batch_size=2, generator=generators, num_inference_steps=5, output_type="np").images
    images[name] = torch.from_numpy(output).movedim(-1, 1).contiguous()
assert not [name for name in sys.modules if name.startswith("vdu_peft")]
save_file(images, out)
"""


def test_demo_runs_whole_and_stock_libraries_draw_what_we_draw(tmp_path, capsys):
    """Few steps and 100 rough samples: that every part of the demo works, not that the digit is gone."""
    out = tmp_path / "demo"
    options = ["--num_samples=100", "--max_train_steps=3", "--learning_rate=0.02", "--replay_size=32"]
    options += ["--num_inference_steps=5", "--replay_inference_steps=5"]
    out.mkdir()
    (out / "kept").touch()
    assert main(["demo", f"--output_dir={out}", "--overwrite", "--num_inference_steps=0"]) == 2
    assert (out / "kept").is_file() and "num_inference_steps must lie" in capsys.readouterr().err
    main(["demo", f"--output_dir={out}", "--overwrite", *options])
    report = json.loads((out / "report.json").read_text())
    assert report["num_samples"] == 100 and sum(report["histogram_after"]) == pytest.approx(1)
    assert report["trained_parameters"] <= 0.1 * report["model_parameters"]
    # The run's own, whatever it was told: with what None stands for.
    assert (report["config"]["learning_rate"], report["config"]["stability_weight"]) == (0.02, 1.75)
    assert report["adapter_bytes"] <= 1.5e6
    assert all((out / name).is_file() for name in ("grid.png", "loss.png", "histogram.png", "history.json"))
    assert "u-FID (judge features)" in capsys.readouterr().out

    base = assets() / "ddpm"
    evaluate = [
        "evaluate",
        f"--model={base}",
        f"--adapter={out / 'adapter'}",
        f"--judge={assets() / 'judge.safetensors'}",
    ]
    evaluate += [f"--reference={assets() / 'images.npz'}", "--image_column=reference_images"]
    evaluate += ["--label_column=reference_labels", "--num_samples=100", f"--output_dir={tmp_path / 'report'}"]
    evaluate += ["--num_inference_steps=5"]
    assert main([*evaluate, "--forget_class=10"]) == 2
    assert "forget_class must lie in 0 to 9" in capsys.readouterr().err
    assert main([*evaluate, "--forget_class=1"]) == 0
    again = json.loads((tmp_path / "report" / "report.json").read_text())
    assert again["class_names"] is None  # the demo's judge has none
    figures = {f.name for f in fields(Report)} - {"class_names"}
    for name in figures:  # the same samples, to the rounding of sums in float32 over several threads
        assert again[name] == pytest.approx(report[name], rel=1e-5), name
    assert all((tmp_path / "report" / name).is_file() for name in ("grid.png", "histogram.png"))

    merge = ["merge", f"--model={base}", f"--adapter={out / 'adapter'}", f"--output_dir={tmp_path / 'merged'}"]
    assert main([*merge, "--dtype=float32"]) == 0
    command = [sys.executable, "-c", STOCK_SAMPLES, base, out / "adapter", tmp_path / "merged", tmp_path / "stock"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    stock = load_file(tmp_path / "stock")
    denoiser = Denoiser.from_pretrained(base)
    untouched = denoiser.sample(2, seed=3, num_inference_steps=5)
    load_adapter(denoiser.model, out / "adapter")
    ours = denoiser.sample(2, seed=3, num_inference_steps=5)
    assert (ours - untouched).abs().max() > 0.1  # else an adapter that was never applied would pass
    # float32 rounding, carried through five sampler steps.
    torch.testing.assert_close(stock["adapter"], (ours + 1) / 2, atol=1e-4, rtol=0)
    torch.testing.assert_close(stock["merged"], (ours + 1) / 2, atol=1e-4, rtol=0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("can", [{}, {"avx512_bf16": False}, {"avx512_bf16": True}, {"amx_bf16": True}])
def test_the_demo_learns_in_bfloat16_on_cpus_that_compute_in_it(device, can, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    monkeypatch.setattr(command_line, "best_device", lambda: torch.device(device))
    unlearning = ["unlearn", "--model=a", "--forget_data=b", "--output_dir=c"]
    assert command_line.parse(["demo"]).mixed_precision == ("bf16" if device == "cpu" and any(can.values()) else "no")
    assert command_line.parse(["demo", "--mixed_precision=no"]).mixed_precision == "no"
    assert command_line.parse(unlearning).mixed_precision == "no"
