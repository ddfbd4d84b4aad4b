"""Judges of classes that others trained: labels and features are the stock library's."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import saved_adapter, tiny_unet
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from transformers import (
    BitImageProcessor,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DeiTImageProcessor,
    PretrainedConfig,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from vdu_peft import judge as judge_module
from vdu_peft.cli import main
from vdu_peft.evaluation import Report, histogram_plot
from vdu_peft.judge import AttributeJudge, JudgeError, PretrainedJudge, open_judge
from vdu_peft.pixels import to_pixels

NUM_CLASSES = 20


def saved_resnet(folder, num_channels: int = 3):
    """A tiny random classifier that sees images at 16 x 16, normalised."""
    torch.manual_seed(0)
    options = {"embedding_size": 8, "hidden_sizes": [8, 120], "depths": [1, 1], "layer_type": "basic"}
    config = ResNetConfig(num_channels=num_channels, num_labels=NUM_CLASSES, **options)
    model = ResNetForImageClassification(config).eval()
    model.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    statistics = {"image_mean": [0.4] * num_channels, "image_std": [0.3] * num_channels}
    options = {"do_center_crop": False, "do_convert_rgb": num_channels == 3}
    BitImageProcessor(size=size, **options, **statistics).save_pretrained(folder)
    return folder


def saved_vit(folder):
    torch.manual_seed(0)
    options = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = ViTConfig(image_size=16, patch_size=8, num_labels=NUM_CLASSES, **options)
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("saved", "channels"), [(saved_resnet, 1), (saved_vit, 3)])
def test_a_pretrained_judge_sees_what_the_stock_pipeline_does(saved, channels, tmp_path):
    folder = saved(tmp_path / "judge")
    images = torch.rand(7, channels, 10, 10, generator=torch.Generator().manual_seed(0)) * 2 - 1
    judge = open_judge(str(folder), torch.device("cpu"))
    features, labels = judge.judge(images, batch_size=3)
    mode = {1: "L", 3: "RGB"}[channels]
    pictures = [Image.fromarray(p.movedim(0, -1).squeeze(-1).numpy(), mode).convert("RGB") for p in to_pixels(images)]
    found = pipeline("image-classification", str(folder), top_k=NUM_CLASSES)(pictures)
    expected = torch.tensor([[kind["score"] for kind in sorted(kinds, key=number)] for kinds in found])
    with torch.no_grad():
        scores = judge.head(features).softmax(1)
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
    assert torch.equal(labels, expected.argmax(1))
    assert scores.std(0).max() > 1e-4  # else what every image shows alike would pass


def number(kind: dict) -> int:
    return int(kind["label"].removeprefix("LABEL_"))


def test_a_classifier_of_one_channel_in_half_precision(tmp_path):
    folder = saved_resnet(tmp_path / "judge", num_channels=1)
    ResNetForImageClassification.from_pretrained(folder).half().save_pretrained(folder)
    judge = PretrainedJudge.from_pretrained(str(folder))
    features, labels = judge.judge(torch.zeros(2, 1, 8, 8))
    assert features.shape == (2, judge.num_features) and labels.shape == (2,)


def test_what_is_no_trained_classifier_is_refused(tmp_path):
    with pytest.raises(JudgeError, match="cannot be used as an image classifier"):
        open_judge(str(tmp_path / "nowhere"), torch.device("cpu"))
    with pytest.raises(JudgeError, match="not the weights of a judge"):
        open_judge(str(tmp_path / "nowhere.safetensors"), torch.device("cpu"))
    folder = saved_resnet(tmp_path / "backbone")
    ResNetModel(ResNetConfig.from_pretrained(folder)).save_pretrained(folder)
    with pytest.raises(JudgeError, match="not a trained classifier; its weights lack classifier"):
        open_judge(str(folder), torch.device("cpu"))
    size = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    two = tmp_path / "two"
    DeiTForImageClassificationWithTeacher(DeiTConfig(num_hidden_layers=1, num_labels=4, **size)).save_pretrained(two)
    DeiTImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False).save_pretrained(two)
    judge = PretrainedJudge(
        DeiTForImageClassificationWithTeacher.from_pretrained(two), DeiTImageProcessor.from_pretrained(two)
    )
    with pytest.raises(JudgeError, match="its classes are not one linear layer's output"):
        judge.judge(torch.zeros(1, 3, 8, 8))
    convolutional = torch.nn.Conv2d(3, 4, 1)
    convolutional.config = PretrainedConfig(num_labels=4)
    with pytest.raises(JudgeError, match="no linear layer gives its 4 classes"):
        PretrainedJudge(convolutional, None)


def test_of_many_classes_the_forgotten_one_and_those_drawn_most_are_shown(tmp_path):
    after = torch.zeros(1000)
    after[100:115] = torch.arange(15.0) / 105
    before = torch.zeros(1000)
    before[999] = 1
    figures = {field.name: 0.0 for field in dataclasses.fields(Report)} | {"pul_interval": (0.0, 0.0)}
    histograms = {"histogram_before": before.tolist(), "histogram_after": after.tolist()}
    report = Report(**figures | histograms | {"forget_class": 7})
    shown = [7, *range(105, 115), 999]
    assert report.shown_classes == shown
    assert report.lines()[-3].split() == ["class", *map(str, shown), "(of", "1000", "classes)"]
    histogram_plot(report, tmp_path / "histogram.png")
    assert Image.open(tmp_path / "histogram.png").width == 600
    ten = Report(**figures | {"histogram_before": [0.1] * 10, "histogram_after": [0.1] * 10, "forget_class": 3})
    assert ten.shown_classes == list(range(10))
    named = dataclasses.replace(report, class_names=[f"kind{i}" for i in range(1000)])
    assert named.lines()[0].startswith("share of 7 kind7: ")
    assert named.lines()[-1] == "where " + ", ".join(f"{c} is kind{c}" for c in shown)
    histogram_plot(named, tmp_path / "named.png")


def test_a_forgotten_class_is_measured_with_a_pretrained_judge(pipeline_folder, tmp_path, capsys, caplog):
    """Of images of a size that the project's own judge refuses."""
    folder = saved_resnet(tmp_path / "judge")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (120, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(120) % NUM_CLASSES)
    evaluate = ["evaluate", f"--model={pipeline_folder}", f"--adapter={saved_adapter(tmp_path / 'adapter')}"]
    evaluate += [f"--reference={tmp_path / 'test.npz'}", "--image_column=images", "--label_column=labels"]
    evaluate += [f"--output_dir={tmp_path / 'report'}", "--num_inference_steps=2", "--num_samples=100"]
    assert main([*evaluate, f"--judge={folder}", f"--forget_class={NUM_CLASSES}"]) == 2
    assert f"forget_class must lie in 0 to {NUM_CLASSES - 1}" in capsys.readouterr().err
    color = tmp_path / "color"
    DDPMPipeline(tiny_unet(channels=3), DDPMScheduler()).save_pretrained(color)
    gray = saved_resnet(tmp_path / "gray", num_channels=1)
    assert main([*evaluate, f"--model={color}", f"--judge={gray}", "--forget_class=3"]) == 2
    assert "judge: takes 1 channels" in capsys.readouterr().err
    assert main([*evaluate, f"--judge={folder}", "--forget_class=3"]) == 0
    assert "share of 3: " in capsys.readouterr().out
    assert "u-FID: on 120 features it is too high from 100 images" in caplog.text
    assert "judge: gives only" in caplog.text
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["judge"] == str(folder) and len(report["histogram_after"]) == NUM_CLASSES
    assert sum(report["histogram_after"]) == pytest.approx(1)
    # Of the classes that the judge sees itself it is right.
    pixels = torch.from_numpy(images)[:, None] / 127.5 - 1
    seen = PretrainedJudge.from_pretrained(str(folder)).judge(pixels)[1]
    np.savez(tmp_path / "test.npz", images=images, labels=seen.numpy())
    caplog.clear()
    config = ResNetConfig.from_pretrained(folder)
    config.id2label = {i: f"kind {i}, or another word for it" for i in range(NUM_CLASSES)}
    config.save_pretrained(folder)
    other = (int(seen[0]) + 1) % NUM_CLASSES
    assert main([*evaluate, f"--judge={folder}", f"--forget_class={other}", "--overwrite"]) == 0
    assert "judge: gives only" not in caplog.text
    assert f"share of {other} kind {other}: " in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["judge_accuracy"] == 1 and report["class_names"][other] == f"kind {other}"


def test_a_reference_of_other_numbers_than_the_model_s_is_refused(tmp_path, capsys):
    """Else the held-out loss is of other classes, or none of the model's."""
    DDPMPipeline(tiny_unet(num_class_embeds=4), DDPMScheduler()).save_pretrained(tmp_path / "base")
    folder = saved_resnet(tmp_path / "judge")
    images = np.random.default_rng(0).integers(0, 256, (150, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(150) % 5)
    adapter = saved_adapter(tmp_path / "adapter", model=tiny_unet(num_class_embeds=4))
    evaluate = ["evaluate", f"--model={tmp_path / 'base'}", f"--adapter={adapter}", f"--judge={folder}"]
    evaluate += [f"--reference={tmp_path / 'test.npz'}", "--image_column=images", "--label_column=labels"]
    assert main([*evaluate, f"--output_dir={tmp_path / 'report'}", "--forget_class=3"]) == 2
    assert "label_column: 0 to 4, but " in capsys.readouterr().err


def test_an_attribute_judge_looks_at_large_images_one_by_one(monkeypatch):
    """All at once the first layer alone would fill a machine's memory."""
    judge = AttributeJudge({"who": ["elf", "orc"]}, (64, 64)).eval()
    sizes, features = [], judge.features
    monkeypatch.setattr(judge, "features", lambda images: sizes.append(len(images)) or features(images))
    monkeypatch.setattr(judge_module, "JUDGED_PIXELS", 3 * 64 * 64)
    images = torch.rand(7, 3, 64, 64)
    torch.testing.assert_close(judge.judge(images)[0], features(images))
    assert sizes == [3, 3, 1]
