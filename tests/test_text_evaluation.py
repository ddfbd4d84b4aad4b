"""Prompt files, per-prompt seeds and guidance against the stock pipeline, and every figure counted by hand."""

import json
import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from conftest import tiny_text_pipeline
from nudenet import NudeDetector
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from vdu_peft.denoiser import ModelError
from vdu_peft.judge import AttributeJudge
from vdu_peft.metrics import frechet_distance, kernel_distance
from vdu_peft.pixels import to_pixels
from vdu_peft.prompt_file import (
    EvaluationPrompt,
    PromptFileError,
    Target,
    check_sizes,
    read_prompt_file,
    seeded,
)
from vdu_peft.text_denoiser import TextDenoiser
from vdu_peft.text_evaluation import (
    attribute_accuracy,
    draw,
    draw_and_look,
    evaluate_prompts,
    shown_places,
)
from vdu_peft.text_judges import Judges, Seen, clip_scores, exposed_parts, load_clip

ATTRIBUTES = {"who": ["elf", "orc"], "weapon": ["", "axe", "sword"]}
SWORD = Target("weapon", ("sword",))


def prompt(who: str, weapon: str) -> EvaluationPrompt:
    return EvaluationPrompt(f"{who} {weapon}".strip(), attributes={"who": who, "weapon": weapon})


class Reader(AttributeJudge):
    """Reads what was written into the first pixels: exact, where a trained judge is not."""

    def judge(self, images, batch_size=500):
        found = {
            name: [values[int(i)] for i in images[:, 0, 0, k]]
            for k, (name, values) in enumerate(self.attributes.items())
        }
        return images.flatten(1)[:, :4], found


def picture(who: str, weapon: str) -> torch.Tensor:
    image = torch.zeros(3, 8, 8)
    image[0, 0, 0], image[0, 0, 1] = ATTRIBUTES["who"].index(who), ATTRIBUTES["weapon"].index(weapon)
    return image


def seen(both, prompts, judges: Judges | None = None) -> list[Seen]:
    """Of the images before and after, by the judge that reads them exactly where there is no other."""
    judges = judges or Judges(Reader(ATTRIBUTES, (8, 8)))
    return [judges.look(images, prompts) for images in both]


def test_figures_by_hand():
    prompts = [
        prompt("elf", "sword"),
        prompt("orc", "sword"),
        prompt("elf", "axe"),
        prompt("orc", ""),
        prompt("orc", "axe"),
    ]
    before = torch.stack([picture(**p.attributes) for p in prompts])
    after = torch.stack(
        [
            picture("elf", "axe"),  # forgotten, the rest kept
            picture("elf", "sword"),  # not forgotten, the rest lost
            picture("elf", "axe"),
            picture("elf", "sword"),  # who is wrong; a weapon was not asked for
            picture("orc", "sword"),  # the weapon is wrong
        ]
    )
    report = evaluate_prompts(*seen((before, after), prompts), prompts, SWORD)
    assert report.figures == {
        "UA": (0.0, 0.5),
        "IRA": (1.0, 0.5),
        "CRA": (1.0, pytest.approx(2 / 3)),
        "target prompts, other attributes": (1.0, 0.5),
    }
    assert "2 images of target prompts, 3 of others" in report.lines()[0]


def test_distances_are_to_the_reference(monkeypatch, tmp_path):
    monkeypatch.setattr("vdu_peft.text_evaluation.MIN_FID_IMAGES", 20)
    torch.manual_seed(0)
    prompts = [prompt("elf", weapon) for weapon in ["sword"] * 30 + ["axe"] * 30 + ["axe"] * 2]
    judge, images = Reader(ATTRIBUTES, (8, 8)), torch.rand(2, 62, 3, 8, 8)
    reference = torch.rand(50, 3, 8, 8)
    report = evaluate_prompts(*seen(images, prompts), prompts, SWORD, judge.judge(reference)[0])
    features = [judge.judge(batch)[0] for batch in (images[0][:30], images[1][30:], reference)]
    kids = []
    for name, distance in (("FID", frechet_distance), ("KID", kernel_distance)):
        for kind, when in (("target", 0), ("other", 1)):
            figure = report.figures[f"{name}, {kind} prompts"]
            assert figure[when] == pytest.approx(distance(features[when], features[2]))
            kids += [figure] if name == "KID" else []
    shown = [line.split()[-2:] for line in report.lines() if line.startswith("KID")]
    assert shown == [[f"{value:.3f}" for value in figure] for figure in kids]
    few_prompts = [*prompts[:1], *prompts[42:]]
    few = evaluate_prompts(*seen(images[:, 41:], few_prompts), few_prompts, SWORD, judge.judge(reference)[0])
    assert {name for name in few.figures if "ID" in name} == {"FID, other prompts", "KID, other prompts"}
    report.save(tmp_path, *images[:, shown_places(prompts, SWORD)], seed=3)
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["num_target"] == 30 and record["seed"] == 3 and (tmp_path / "grid.png").is_file()
    assert record["figures"]["UA"] == {"before": report.figures["UA"][0], "after": report.figures["UA"][1]}


def test_every_image_has_its_prompt_and_verdict_in_the_report(tmp_path):
    """And the picture's rows begin with the numbers that prompts have there."""
    wanted = [("elf", "sword"), ("orc", "axe"), *[("orc", "sword")] * 5, ("elf", "sword")]
    prompts = [replace(prompt(*names), seed=seed, guidance_scale=2.0) for seed, names in enumerate(wanted)]
    before = torch.stack([picture(*names) for names in wanted])
    after = torch.stack([picture("elf", "axe")] * 8)
    report = evaluate_prompts(*seen((before, after), prompts), prompts, SWORD)
    places = shown_places(prompts, SWORD)
    assert places == [0, 2, 3, 4, 5, 6, 7, 1]
    report.save(tmp_path, before[places], after[places])
    images = json.loads((tmp_path / "report.json").read_text())["images"]
    assert images[1] == {
        "prompt": "orc axe",
        "seed": 1,
        "guidance_scale": 2.0,
        "target": False,
        "number": 1,
        "before": {"who": "orc", "weapon": "axe"},
        "after": {"who": "elf", "weapon": "axe"},
    }
    assert [image["number"] for image in images if image["target"]] == [1, 2, 3, 4, 5, 6, 7]
    grid, side, header = Image.open(tmp_path / "grid.png"), 28, 24
    pixels = np.asarray(grid.convert("L")).astype(int)
    assert pixels.shape[0] == header + 2 * 16  # two rows of five
    for row in range(2):
        assert pixels[header + 16 * row : header + 16 * (row + 1), :side].min() < 128  # a number
    # The seventh target prompt's image is the second of the row that begins with 6.
    cell = np.asarray(grid)[header + 16 : header + 32, side + 16 : side + 32]
    assert np.array_equal(cell[::2, ::2], to_pixels(before[7]).movedim(0, -1).numpy())
    unjudged = evaluate_prompts(*seen((before, after), prompts, Judges(nudenet=NudeDetector())), prompts)
    unjudged.save(tmp_path / "unjudged", before, after)
    first = json.loads((tmp_path / "unjudged" / "report.json").read_text())["images"][0]
    assert first["before"] == first["after"] == {} and first["prompt"] == "elf sword"


def test_accuracy_of_nothing_asked_is_nan():
    assert math.isnan(attribute_accuracy({"who": ["elf"], "weapon": ["axe"]}, [prompt("elf", "")], ["weapon"]))
    assert attribute_accuracy({"who": ["elf"], "weapon": ["axe"]}, [prompt("elf", "")], ["who", "weapon"]) == 1


def test_a_prompt_file_is_read_as_the_field_writes_it(tmp_path):
    file = tmp_path / "i2p.csv"
    file.write_text(
        'prompt,sd_seed,sd_guidance_scale,who,weapon\n"an elf, with a sword",7,6.5,elf,sword\nan orc,,,orc,\n'
    )
    judge = AttributeJudge(ATTRIBUTES, (8, 8))
    first, second = read_prompt_file(file, judge, SWORD)
    assert first == EvaluationPrompt("an elf, with a sword", 7, 6.5, {"who": "elf", "weapon": "sword"})
    assert second == EvaluationPrompt("an orc", None, None, {"who": "orc", "weapon": ""})
    assert read_prompt_file(file, None, None)[0] == EvaluationPrompt("an elf, with a sword", 7, 6.5)
    # As a person types it.
    file.write_text('prompt, sd_seed , sd_guidance_scale, who, weapon\n"an elf, with a sword", 7, 6.5, elf, sword\n')
    assert read_prompt_file(file, judge, SWORD) == [first]


@pytest.mark.parametrize(
    ("content", "target", "message"),
    [
        ("text\na cat\n", SWORD, "no rows with a column 'prompt'"),
        ("prompt\n", SWORD, "no rows with a column 'prompt'"),
        ("prompt,seed\na cat,1\n ,2\n", None, "prompts.csv, line 3: the prompt is empty"),
        ("prompt,sd_image_width\na cat,wide\n", None, "line 2: could not convert string to float: 'wide'"),
        ("prompt,seed\na cat,x\n", None, "line 2: invalid literal"),
        ("prompt,seed\na cat,-1\n", None, "line 2: a seed lies in"),
        ("prompt,guidance\na cat,nan\n", None, "line 2: a guidance scale is a number from 0, not nan"),
        ("prompt,who\nan elf,elf\na cat,cat\n", SWORD, "line 3: the judge knows no who 'cat'"),
        ("prompt,weapon\nan axe,axe\n", SWORD, "no prompt asks for weapon sword"),
        ("prompt,weapon\nan axe,axe\n", Target("weapon", ("club",)), "the judge knows no weapon 'club'"),
        ("prompt,weapon\nan axe,axe\n", Target("hat", ("cap",)), "the judge knows no hat; it knows who, weapon$"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path, content, target, message):
    (tmp_path / "prompts.csv").write_text(content)
    with pytest.raises(PromptFileError, match=message):
        read_prompt_file(tmp_path / "prompts.csv", AttributeJudge(ATTRIBUTES, (8, 8)), target)


def test_other_sizes_than_the_model_s_are_told_of_once(tmp_path, caplog):
    file = tmp_path / "i2p.csv"
    file.write_text("prompt,sd_image_width,sd_image_height\na,512,512\nb,512,768\nc,768,512\nd,,\n")
    prompts = read_prompt_file(file, None, None)
    assert [prompt.size for prompt in prompts] == [(512, 512), (768, 512), (512, 768), None]
    check_sizes(prompts, (512, 512))
    assert len(caplog.records) == 1
    assert "2 of 4 name another size than 512 x 512, such as 768 x 512" in caplog.text
    caplog.clear()
    check_sizes([prompts[0], prompts[3]], (512, 512))
    assert not caplog.records


def test_targets():
    assert Target.parse("clothes=red robe, blue robe") == Target("clothes", ("red robe", "blue robe"))
    for text in ("sword", "weapon=", "=sword"):
        with pytest.raises(PromptFileError, match="not of the form attribute=value"):
            Target.parse(text)
    with pytest.raises(PromptFileError, match="not a readable CSV"):
        read_prompt_file("/nowhere/prompts.csv", None, None)


def test_each_prompt_is_drawn_with_its_own_seed_and_guidance(tmp_path):
    pipeline = tiny_text_pipeline(tmp_path)
    prompts = [EvaluationPrompt("a cat", 5, 3.0), EvaluationPrompt("a sword"), EvaluationPrompt("a sword", 9, 3.0)]
    denoiser = TextDenoiser(pipeline, [p.text for p in prompts])
    images = draw(denoiser, seeded(prompts, 2), num_inference_steps=3)
    for i, (seed, guidance) in enumerate([(5, 3.0), (2 * 1_000_003 + 1, 7.5), (9, 3.0)]):
        stock = pipeline(
            prompts[i].text,
            guidance_scale=guidance,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(seed),
            height=16,
            width=16,
            output_type="pt",
        ).images
        torch.testing.assert_close((images[i] + 1) / 2, stock[0], atol=1e-5, rtol=0)


def test_what_is_judged_batch_by_batch_is_what_all_images_at_once_are(tmp_path):
    """In the prompts' order, though those of one guidance are drawn together; only the kept images are held."""

    class Written(NudeDetector):
        def detect(self, image):
            return [{"class": "BELLY_EXPOSED", "score": float(image.mean()) / 255 + 0.2}]

    scales = [None, 3.0, None, 2.0, 3.0, None, 3.0]
    prompts = [EvaluationPrompt(f"a {i}", guidance_scale=scale) for i, scale in enumerate(scales)]
    prompts = seeded(prompts, 4)
    denoiser = TextDenoiser(tiny_text_pipeline(tmp_path), [p.text for p in prompts])
    denoiser.batch_size = 2
    torch.manual_seed(0)
    judges = Judges(AttributeJudge(ATTRIBUTES, denoiser.image_size).eval(), nudenet=Written())
    images = draw(denoiser, prompts, num_inference_steps=2)
    whole = judges.look(images, prompts)
    seen, kept = draw_and_look(denoiser, prompts, judges, [6, 1, 2], num_inference_steps=2)
    torch.testing.assert_close(seen.features, whole.features, atol=1e-4, rtol=0)
    assert seen.found == whole.found and seen.exposed == whole.exposed
    assert not torch.allclose(whole.features[0], whole.features[1], atol=1e-2)  # an order that is wrong shows
    torch.testing.assert_close(kept, images[[6, 1, 2]], atol=1e-5, rtol=0)
    unjudged = Judges(nudenet=Written()).look(images, prompts)
    figures = evaluate_prompts(unjudged, unjudged, prompts, SWORD, whole.features).figures
    assert all(name.startswith("NudeNet") for name in figures)  # nobody looked for the target


def test_clip_scores_are_the_models_own_logits(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = tiny_text_pipeline(tmp_path / "tokens").tokenizer
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": 53}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=16)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    size = {"height": 8, "width": 8}
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), tokenizer).save_pretrained(tmp_path / "clip")
    images, prompts = torch.rand(3, 3, 8, 8) * 2 - 1, [EvaluationPrompt(text) for text in ("a cat", "a dog", "a hat")]
    scores = clip_scores(images, prompts, load_clip(str(tmp_path / "clip")))
    model, processor = CLIPModel.from_pretrained(tmp_path / "clip"), CLIPProcessor.from_pretrained(tmp_path / "clip")
    expected = []
    for image, p in zip(((images + 1) * 127.5).round().byte(), prompts, strict=True):
        logits = model(**processor(text=[p.text], images=[image], return_tensors="pt")).logits_per_image
        expected.append(100 * (logits / model.logit_scale.exp()).item())  # one at a time: no padding
    assert scores.tolist() == pytest.approx(expected, abs=1e-3)
    judges = Judges(clip=load_clip(str(tmp_path / "clip")))
    figures = evaluate_prompts(*seen((images, images.flip(0)), prompts, judges), prompts).figures
    assert list(figures) == ["CLIP score, target prompts"]
    assert figures["CLIP score, target prompts"][0] == pytest.approx(sum(expected) / 3, abs=1e-3)
    with pytest.raises(ModelError, match="cannot be loaded as a CLIP model"):
        load_clip(str(tmp_path / "nowhere"))


def test_nudenet_sees_what_it_sees_of_a_file_and_only_exposed_parts_count(tmp_path):
    class Noted(NudeDetector):
        """The real detector, beside what it was given, and with parts planted into what it finds."""

        def detect(self, image):
            given.append((image, super().detect(image)))
            return [*given[-1][1], *planted]

    given = []
    planted = [
        {"class": "BELLY_EXPOSED", "score": 0.61},
        {"class": "BELLY_EXPOSED", "score": 0.59},
        {"class": "FEET_COVERED", "score": 0.9},
        {"class": "FEMALE_BREAST_EXPOSED", "score": 0.9},
    ]
    images = torch.rand(2, 3, 40, 32) * 2 - 1
    counts = exposed_parts(images, Noted())
    for image, (array, detections) in zip(images, given, strict=True):
        file = tmp_path / "image.png"
        Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(file)
        assert np.array_equal(array, cv2.imread(str(file)))
        assert detections == NudeDetector().detect(str(file))
    assert sum(counts.values()) == 4
    assert counts["BELLY_EXPOSED"] == counts["FEMALE_BREAST_EXPOSED"] == 2
    prompts = [prompt("elf", "axe"), prompt("orc", "")]
    report = evaluate_prompts(*seen((images, images), prompts, Judges(nudenet=Noted())), prompts)
    assert report.figures["NudeNet, belly exposed"] == (2, 2)
    assert report.figures["NudeNet, exposed parts"] == (4, 4) and "         4         4" in report.lines()[2]
