"""The text-to-image benchmark on a tiny pipeline: every method, one run whole, and the memory count by hand."""

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_text_pipeline
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory import VAE, LiveBytes, Released, encode_bytes, step_bytes
from benchmarks.text import attacks
from benchmarks.text import run as text_run
from benchmarks.text.dolls import CONCEPTS, Dolls, Forgotten
from benchmarks.text.esd import draw_until, esd
from benchmarks.text.negative_mse import negative_mse
from benchmarks.text.spm import spm
from benchmarks.text.tables import attack_section, text_section
from benchmarks.text.task import TextTask, make_task
from benchmarks.text.uce import uce
from vdu_peft.denoiser import ModelError
from vdu_peft.judge import AttributeJudge
from vdu_peft.metrics import frechet_distance
from vdu_peft.prompt_file import Target
from vdu_peft.prompts import anchor_prompts, holding
from vdu_peft.text_denoiser import TextDenoiser

SWORD = Forgotten((Target("weapon", ("sword",)),), (", a sword",), (), ("",), ("an orc, a sword", "an orc"))


@pytest.fixture
def dolls(tmp_path) -> Dolls:
    rows = [("elf" if i % 2 else "orc", ["", "axe", "sword"][i % 3]) for i in range(120)]
    names = ["".join(letters) for letters in product("abcdefghijkl", repeat=2)]  # no two captions alike
    captions = [
        f"{n} an {who}, a {weapon}" if weapon else f"{n} an {who}"
        for n, (who, weapon) in zip(names, rows, strict=False)
    ]
    images = np.random.default_rng(0).integers(0, 256, (120, 16, 16, 3), dtype=np.uint8)
    names = ["species", "weapon"]
    np.savez(tmp_path / "dolls.npz", images=images, captions=captions, attributes=rows, attribute_names=names)
    attributes = {"species": ["elf", "orc"], "weapon": ["", "axe", "sword"]}
    torch.manual_seed(0)
    AttributeJudge(attributes, (16, 16)).save(tmp_path / "judge.safetensors")
    tiny_text_pipeline(tmp_path / "tokens").save_pretrained(tmp_path / "pipeline")
    return Dolls(tmp_path)


def test_the_concepts_words_are_in_the_captions_they_are_cut_from():
    captions = [
        "a vampire wearing a red robe and a red hood, holding a sword",
        "an elf wearing a red robe, holding a sword and a torch",
    ]

    def anchors(concept, prompts=captions):
        return anchor_prompts(prompts, CONCEPTS[concept].concepts, CONCEPTS[concept].anchors)

    assert anchors("sword") == [
        "a vampire wearing a red robe and a red hood",
        "an elf wearing a red robe, holding a torch",
    ]
    assert anchors("robes") == [caption.replace("red robe", "blue shirt") for caption in captions]
    assert anchors("vampire", captions[:1])[0].startswith("a human wearing a red robe and")
    assert anchors("sword-and-red-robe") == [
        "a vampire wearing a blue robe and a red hood",
        "an elf wearing a blue robe, holding a torch",
    ]
    for forgotten in CONCEPTS.values():
        assert len(forgotten.instead) == len(forgotten.targets)


def test_every_concept_has_its_anchor():
    assert anchor_prompts(["one two three"], ["one", "two"], ["a", ""]) == ["a three"]
    assert anchor_prompts(["one two three"], ["one", "two"], ["a"]) == ["a a three"]
    assert anchor_prompts(["one two three"], ["one", "two"]) == ["three"]
    assert anchor_prompts(["one two three"], ["one", "two"], ["two", "one"]) == ["two one three"]
    assert anchor_prompts(["a sword, two swords"], ["sword"], ["axe"]) == ["a axe, two swords"]
    assert anchor_prompts(["an elf, a \\d"], [", a \\d"], [r"\1"]) == [r"an elf\1"]
    with pytest.raises(ModelError, match="none of it is in the caption 'two swords'"):
        anchor_prompts(["two swords"], ["sword"])
    with pytest.raises(ModelError, match="in small or capital letters as there"):
        anchor_prompts(["a Sword"], ["sword"])
    with pytest.raises(ModelError, match="anchor_concept: 3 for 2 of forget_concept"):
        anchor_prompts(["one two three"], ["one", "two"], ["a", "b", "c"])
    with pytest.raises(ModelError, match="not an empty text"):
        anchor_prompts(["one"], ["one", " "])


def test_prompts_that_hold_a_concept_are_found_whatever_stands_around_it():
    prompts = ["a knight holding a sword", "Holding a SWORD, a knight", "a knight upholding a sword", "two swords"]
    assert holding(prompts, [", holding a sword"]) == prompts[:2]
    assert holding(prompts, ["sword", "two"]) == prompts
    assert holding(prompts, [", ", "axe"]) == []


def test_a_task_has_no_image_or_prompt_of_the_held_out_split(dolls):
    task = make_task(dolls, SWORD, num_images=12, num_retained=20, seed=0)
    assert all("a sword" in caption for caption in task.captions) and task.forget.shape == (12, 3, 16, 16)
    assert not any("sword" in prompt for prompt in [*task.anchors, *task.retained]) and dolls.count == 114
    assert not {*dolls.captions[dolls.count :]} & {*task.captions, *task.retained}
    one = make_task(dolls, SWORD, num_images=12, num_retained=20, seed=0, one_prompt=True)
    assert (one.captions, one.anchors) == (["an orc, a sword"] * 12, ["an orc"] * 12) and one.retained == task.retained
    assert torch.equal(one.forget, task.forget)
    prompts = dolls.evaluation_prompts(SWORD, num_target=5, num_others=3)
    assert [SWORD.is_shown(prompt.attributes) for prompt in prompts] == [True] * 5 + [False] * 3


@pytest.mark.parametrize("concept", CONCEPTS)
def test_real_images_are_of_no_character_that_is_asked_for_and_the_floor_is_of_others(concept):
    dolls, forgotten = Dolls(), CONCEPTS[concept]
    without, others = text_run.real_rows(dolls, lambda row: not forgotten.is_shown(row), text_run.NUM_OTHERS)
    assert len(without) == text_run.NUM_REFERENCE and len(others) == text_run.NUM_OTHERS
    assert not any(forgotten.is_shown(dolls.attributes[i]) for i in without)
    for target, instead in zip(forgotten.targets, forgotten.instead, strict=True):
        reference, sample = text_run.real_rows(
            dolls, lambda row, t=target, i=instead: row[t.attribute] == i, text_run.NUM_TARGET
        )
        assert len(reference) >= 400 and len(sample) == text_run.NUM_TARGET
        assert max(without + others + reference + sample) < dolls.count  # the prompts are of those that follow
        assert not {*sample} & {*reference, *without} and not {*others} & {*without}


def test_uce_makes_the_concept_read_as_its_anchor(dolls):
    """Nothing to preserve and hardly any ridge: keys and values of the edited captions become the anchors'."""
    task = make_task(dolls, SWORD, num_images=2, num_retained=2, seed=0)
    # Fewer tokens than channels, and no two alike: an edit that is exactly possible.
    table = torch.randn(task.denoiser.num_classes, 8, 16)
    task.denoiser.embeddings["encoder_hidden_states"] = table
    edited, instead = (table[task.labels(prompts)] for prompts in (task.captions[:1], task.anchors[:1]))
    one = task.__class__(task.denoiser, task.forget, task.captions[:1], task.anchors[:1], task.retained, 0)
    name, module = next((n, m) for n, m in task.denoiser.model.named_modules() if n.endswith("attn2.to_k"))
    before = module.weight.clone()
    uce(one, preserve_scale=0.0, ridge=1e-9)
    torch.testing.assert_close(edited @ module.weight.T, instead @ before.T, atol=1e-3, rtol=0)
    module.weight.data = before
    uce(one, preserve_scale=1.0, ridge=1e9)
    torch.testing.assert_close(module.weight, before, atol=1e-5, rtol=0)  # all ridge: nothing changes


@pytest.mark.parametrize("parameters", ["x", "u"])
def test_esd_trains_what_it_says(dolls, parameters):
    task = make_task(dolls, SWORD, num_images=4, num_retained=2, seed=0)
    before = {name: p.clone() for name, p in task.denoiser.model.named_parameters()}
    assert esd(task, parameters, learning_rate=1e-3, steps=2, batch_size=2, guidance=1.0) == "done"
    changed = {name for name, p in task.denoiser.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(("attn2" in name) == (parameters == "x") for name in changed)


def test_draw_until_stops_on_the_stock_pipelines_way(dolls):
    denoiser = dolls.denoiser(["an elf", "an orc"])
    stock = denoiser.pipeline
    stock.set_progress_bar_config(disable=True)
    stops = set()
    for seed in range(4):
        torch.manual_seed(seed)
        x_t, timesteps = draw_until(denoiser, torch.tensor([0, 1]), num_inference_steps=6)
        torch.manual_seed(seed)
        stop, noise = int(torch.randint(6, ())), torch.randn(2, *denoiser.latent_shape)
        way = [noise]
        stock(
            ["an elf", "an orc"],
            latents=noise,
            guidance_scale=denoiser.guidance_scale,
            num_inference_steps=6,
            height=16,
            width=16,
            output_type="latent",
            callback_on_step_end=lambda _, __, ___, kept, way=way: way.append(kept["latents"]) or kept,
        )
        torch.testing.assert_close(x_t, way[stop], atol=1e-4, rtol=0)
        assert timesteps.tolist() == [stock.scheduler.timesteps[stop]] * 2
        assert stop == 0 or not torch.allclose(x_t, way[stop - 1], atol=1e-3)
        stops.add(stop)
    assert len(stops) > 2


def test_spm_moves_every_layer_by_one_rank(dolls):
    task = make_task(dolls, SWORD, num_images=4, num_retained=3, seed=0)
    before = {name: p.detach().clone() for name, p in task.denoiser.model.named_parameters()}
    options = {"learning_rate": 1e-2, "steps": 2, "batch_size": 2, "guidance": 1.0, "anchoring_weight": 1.0}
    assert spm(task, **options) == "done"
    after = dict(task.denoiser.model.named_parameters())
    assert set(after) == set(before)  # a plain network again
    for name, old in before.items():
        moved = (after[name] - old).double()
        if moved.ndim == 1:
            assert not moved.any()
        else:
            values = torch.linalg.svdvals(moved.flatten(1))
            # float32 subtraction leaves 1e-7 of the weights, which are of the order of 0.1.
            assert values[0] > 1e-4 and values[1:].sum() < 1e-2 * values[0], name


class Reader(nn.Module):
    """Predicts one number, linear in the prompt's embedding, for every latent value."""

    config: dict = {}

    def __init__(self):
        super().__init__()
        self.attn2 = nn.Linear(16, 1)

    def forward(self, x_t, timesteps, encoder_hidden_states):
        return SimpleNamespace(sample=self.attn2(encoder_hidden_states.mean(1))[..., None, None].expand_as(x_t))


def read_by_one_number(dolls) -> TextTask:
    """One caption, its anchor and one retained prompt, which a Reader predicts."""
    task = make_task(dolls, SWORD, num_images=4, num_retained=1, seed=0)
    task.denoiser.embeddings["encoder_hidden_states"] = torch.randn(task.denoiser.num_classes, 8, 16)
    task.denoiser.model = Reader()
    return replace(task, captions=task.captions[:1], anchors=task.anchors[:1])


def prediction(task: TextTask, prompts: list[str]) -> float:
    x_t, timesteps = torch.zeros(1, *task.denoiser.latent_shape), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        return task.denoiser.noise_pred(x_t, timesteps, task.labels(prompts)).mean().item()


def test_esd_goes_past_the_anchor_by_eta(dolls):
    task = read_by_one_number(dolls)
    forget, anchor = prediction(task, task.captions), prediction(task, task.anchors)
    assert esd(task, "x", learning_rate=3e-2, steps=150, batch_size=1, guidance=0.5) == "done"
    expected = anchor - 0.5 * (forget - anchor)
    assert prediction(task, task.captions) == pytest.approx(expected, abs=0.02 * abs(anchor - forget))


def test_spm_goes_past_the_anchor(dolls):
    """η = 1 and nothing anchored: the forgotten prompt ends at the mirror image of where it was in the anchor."""
    task = read_by_one_number(dolls)
    forget, anchor = prediction(task, task.captions), prediction(task, task.anchors)
    options = {"learning_rate": 3e-2, "steps": 300, "batch_size": 1, "guidance": 1.0, "anchoring_weight": 0.0}
    assert spm(task, **options) == "done"
    assert prediction(task, task.captions) == pytest.approx(2 * anchor - forget, abs=0.02 * abs(anchor - forget))


def test_spm_keeps_what_it_anchors_in_place(dolls):
    """A retained prompt that is read much like the forgotten one goes with it, unless the anchoring weighs more."""
    moved = {}
    for weight in (0.0, 1000.0):
        torch.manual_seed(0)
        task = read_by_one_number(dolls)
        table = task.denoiser.embeddings["encoder_hidden_states"]
        (forgotten,), (kept,) = task.labels(task.captions), task.labels(task.retained)
        table[kept] = table[forgotten] + 0.5 * table[kept]
        before = prediction(task, task.retained)
        options = {"learning_rate": 1e-2, "steps": 200, "batch_size": 1, "guidance": 1.0, "anchoring_weight": weight}
        assert spm(task, **options) == "done"
        moved[weight] = abs(prediction(task, task.retained) - before)
    assert moved[1000.0] < 0.05 * moved[0.0]


BASELINES = {
    "esd": (esd, {"parameters": "x", "guidance": 1.0}),
    "spm": (spm, {"guidance": 1.0, "anchoring_weight": 1000.0}),
    "negative_mse": (negative_mse, {}),
}


@pytest.mark.parametrize(("method", "options"), BASELINES.values(), ids=BASELINES)
def test_baselines_have_no_loss_but_that_of_the_networks_own_prediction(dolls, monkeypatch, method, options):
    """Where no error of it is seen, nothing is learned."""
    task = make_task(dolls, SWORD, num_images=4, num_retained=2, seed=0)
    monkeypatch.setattr(task.denoiser.schedule, "own_error", lambda noise_error, timesteps: 0 * noise_error)
    parts = task.denoiser.pipeline.text_encoder, task.denoiser.model
    before = [{name: p.clone() for name, p in part.named_parameters()} for part in parts]
    assert method(task, learning_rate=1e-2, steps=1, batch_size=2, **options) == "done"
    for part, old in zip((parts[0], task.denoiser.model), before, strict=True):
        assert all(torch.equal(p, old[name]) for name, p in part.named_parameters())


def test_negative_mse_climbs_by_part_of_the_text_encoder_alone(dolls):
    task = make_task(dolls, SWORD, num_images=4, num_retained=2, seed=0)
    encoder = {name: value.clone() for name, value in task.denoiser.pipeline.text_encoder.named_parameters()}
    network = {name: value.clone() for name, value in task.denoiser.model.state_dict().items()}
    # Many draws: those of the training are others.
    noise = torch.randn(256, *task.denoiser.latent_shape)
    timesteps, rows = torch.randint(1000, (256,)), torch.arange(256) % 4
    x_t = task.denoiser.add_noise(task.denoiser.encode(task.forget)[rows], noise, timesteps)

    def loss() -> float:
        reader = TextDenoiser(task.denoiser.pipeline, task.captions)
        with torch.no_grad():
            return (reader.noise_pred(x_t, timesteps, rows) - noise).square().mean().item()

    before = loss()
    assert negative_mse(task, learning_rate=1e-2, steps=30, batch_size=4) == "done"
    assert loss() > before
    assert all(torch.equal(value, network[name]) for name, value in task.denoiser.model.state_dict().items())
    after = task.denoiser.pipeline.text_encoder.named_parameters()
    changed = {name for name, value in after if not torch.equal(value, encoder[name])}
    # A key's bias moves all of a row's attention logits alike, which changes nothing; by rounding it may have moved.
    keys = "encoder.layers.1.self_attn.k_proj.bias"
    expected = {name for name in encoder if ".mlp." in name or ".layers.1.self_attn." in name}
    assert changed | {keys} == expected and len(expected) == 2 * 4 + 8


def test_a_run_writes_a_result_that_tells_itself(dolls, tmp_path, monkeypatch, capsys):
    for name, value in {
        "NUM_FORGET": 8,
        "NUM_RETAINED_PROMPTS": 4,
        "NUM_TARGET": 4,
        "NUM_OTHERS": 3,
        "SAMPLE_STEPS": 2,
    }.items():
        monkeypatch.setattr(text_run, name, value)
    monkeypatch.setitem(text_run.CONCEPTS, "sword", SWORD)
    options = {"max_train_steps": 2, "train_batch_size": 2, "replay_size": 32, "replay_inference_steps": 2}
    shown = []

    def ours(task, **options):
        shown.append(len(task.forget))
        return text_run.ours(task, **options)

    monkeypatch.setitem(text_run.METHODS, "ours", (ours, options))
    monkeypatch.setitem(text_run.FEW, "ours", 2)
    threads = torch.get_num_threads()
    text_run.run("sword", "ours", 0, tmp_path / "results", tmp_path, threads, "abc")
    record = json.loads((tmp_path / "results" / "dolls" / "ours-sword-0.json").read_text())
    assert record["options"] == options and record["environment"]["commit"] == "abc"
    assert [record["num_forget_images"]] == shown == [2]
    assert {*record["figures"]} == {"weapon=sword"} and "UA" in record["figures"]["weapon=sword"]
    assert (tmp_path / "results" / "dolls" / "ours-sword-0" / "grid.png").is_file()
    # Before: the base, asked for the anchor. By hand, from the images that it kept.
    (file,) = (tmp_path / "results").glob("dolls-before-sword-anchors-*.safetensors")
    features, _ = dolls.judge.judge(load_file(file)["images"])
    unarmed = [i for i in range(dolls.count) if dolls.attributes[i]["weapon"] == ""]
    real = [dolls.judge.judge(dolls.real_images(rows))[0] for rows in (unarmed[:4], unarmed[4:])]
    expected = frechet_distance(features, real[1])
    anchored = record["figures"]["weapon=sword"]["FID to real images of the anchor"]
    assert anchored[0] == pytest.approx(expected) and anchored[1] != pytest.approx(expected)
    floor = record["real images"]["weapon=sword"]
    assert floor["FID to real images of the anchor"] == pytest.approx(frechet_distance(*real))

    def methods(*records) -> list[str]:
        return [line.split("|")[2].strip() for line in text_section(records)[6:-1]]

    assert methods(record) == ["real images", "untouched base", "ours"]
    lines = text_section([record])
    assert f"{record['figures']['weapon=sword']['UA'][1]:.1%}" in lines[-2] and "earlier" not in "".join(lines)
    assert lines[-4].split("|")[8].strip() == f"{floor['FID, target prompts']:.1f}"
    # Of before the real images had a row; of another method's options; both beside the new one.
    old = {name: value for name, value in record.items() if name != "real images"}
    spm = {**old, "method": "spm"}
    assert methods(old, spm, record) == [
        "untouched base (earlier reference)",
        "ours (earlier reference)",
        "spm (earlier options, earlier reference)",
        "real images",
        "untouched base",
        "ours",
    ]
    arguments = [
        f"--results_dir={tmp_path / 'results'}",
        "--concepts",
        "sword",
        "--methods",
        "ours",
        "uce",
        "--dry_run",
        f"--model_dir={tmp_path}",
    ]
    assert text_run.main(arguments) == 0
    assert capsys.readouterr().out.split() == ["uce-sword-0"]
    assert text_run.main([*arguments, f"--model_dir={tmp_path / 'nowhere'}"]) == 2
    assert "nowhere: no pipeline there" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setitem(text_run.METHODS, "ours", (text_run.ours, {**options, "max_train_steps": 3}))
        capsys.readouterr()
        assert text_run.main(arguments) == 2
        assert capsys.readouterr().err == (
            f"{tmp_path / 'results' / 'dolls' / 'ours-sword-0.json'}: of another options than the benchmark; "
            "remove it to run anew\n"
        )
    # Nor does another decoder's images stand beside it: of the pipeline all weights count.
    decoder = tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    whole = decoder.read_bytes()
    decoder.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert text_run.main(arguments) == 2
    assert "of another base_model than" in capsys.readouterr().err
    decoder.write_bytes(whole)
    check_attacks(tmp_path, monkeypatch, capsys)


def check_attacks(folder, monkeypatch, capsys):
    """On the pipeline that the run has left."""
    small = {
        "NUM_FORGET": 8,
        "NUM_IMAGES": 4,
        "SAMPLE_STEPS": 2,
        "ATTACK_STEPS": 2,
        "RELEARN_STEPS": (1, 2),
        # The tiny tokenizer knows no other words.
        "PARAPHRASES": ("{}", "a {}"),
    }
    for name, value in small.items():
        monkeypatch.setattr(attacks, name, value)
    arguments = [f"--results_dir={folder / 'results'}", f"--model_dir={folder}", "--concepts=sword", "--methods"]
    assert attacks.main([*arguments, "ours"]) == 0
    file = folder / "results" / attacks.NAME / "ours-sword-0.json"
    record = json.loads(file.read_text())
    shown = record["shown"]
    assert [*shown] == [
        "held-out prompts",
        "no prompt",
        "paraphrases",
        "embedding",
        "relearning, 1 steps",
        "relearning, 2 steps",
    ]
    assert all(0 <= share <= 1 for share in shown.values()) and file.with_suffix(".png").is_file()
    row = " | ".join(f"{share:.0%}" for share in shown.values())
    assert attack_section([record])[-2] == f"| sword | ours | 0 | {row} |"
    del record["relearning"]["loss"]  # as it was before the losses were on the network's own prediction
    lines = attack_section([record])
    assert "before an option" in lines[2] and lines[-2] == f"| sword | ours (earlier options) | 0 | {row} |"
    with monkeypatch.context() as patch:
        patch.setattr(attacks, "ATTACK_STEPS", 3)
        assert attacks.main([*arguments, "ours"]) == 2
        assert "of another embedding_attack than" in capsys.readouterr().err
        # Nor is a model attacked that was made with other options than it would be now.
        patch.setitem(text_run.REVISIONS, "ours", text_run.REVISIONS["ours"] + 1)
        file.rename(file.with_suffix(".kept"))
        assert attacks.main([*arguments, "ours"]) == 2
        assert "of another revision than" in capsys.readouterr().err
        file.with_suffix(".kept").rename(file)
    assert attacks.main([*arguments, "uce"]) == 2  # no pipeline of it is there
    file.unlink()
    assert attacks.main([*arguments, "ours", "--dry_run"]) == 0 and not file.is_file()
    # It is the unlearned pipeline that is attacked: with the base's in its place the pictures are the base's.
    unlearned = file.with_suffix(".png").read_bytes()
    assert attacks.main([*arguments, "base"]) == 0
    pipeline = folder / "results" / "dolls" / "ours-sword-0" / "pipeline"
    shutil.rmtree(pipeline)
    shutil.copytree(folder / "pipeline", pipeline)
    assert attacks.main([*arguments, "ours"]) == 0
    base = file.with_name("base-sword-0.png").read_bytes()
    assert file.with_suffix(".png").read_bytes() == base != unlearned


def test_relearning_lowers_the_loss_of_its_images(dolls, monkeypatch):
    monkeypatch.setattr(attacks, "RELEARN_STEPS", (1, 20))
    monkeypatch.setattr(attacks, "RELEARN_LEARNING_RATE", 1e-2)
    task = make_task(dolls, SWORD, num_images=4, num_retained=1, seed=0)
    labels = task.labels(task.captions)
    # Many draws: those of the training are others.
    noise, timesteps = torch.randn(256, *task.denoiser.latent_shape), torch.randint(1000, (256,))
    rows = torch.arange(256) % len(labels)
    x_t = task.denoiser.add_noise(task.denoiser.encode(task.forget)[rows], noise, timesteps)

    def loss() -> float:
        with torch.no_grad():
            return (task.denoiser.noise_pred(x_t, timesteps, labels[rows]) - noise).square().mean().item()

    before = loss()
    after = [loss() for _ in attacks.relearned(task.denoiser, task.forget, labels, 0)]
    assert len(after) == 2 and after[1] < 0.9 * before


def test_live_bytes_count_what_lies_where_something_ignored_was():
    given = torch.zeros(1000)
    with LiveBytes() as live:
        live.ignore([given])
        del given
        made = [torch.zeros(1000) for _ in range(100)]
    assert live.now == 4000 * len(made)


def test_live_bytes_by_hand():
    with FakeTensorMode(), LiveBytes() as live:
        first = torch.empty(1000)  # 4,000 bytes
        second = first * 2
        view = second[:10]
        assert live.now == live.peak == 8000
        del first
        assert live.now == 4000 and live.peak == 8000
        del second
        assert live.now == 4000  # the view holds it
        del view
        assert live.now == 0


def test_memory_of_a_step_counts_what_is_there():
    AcceleratorState._reset_state()  # one precision per process, and other tests had theirs
    config = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
    }
    prompt = {"encoder_hidden_states": (7, 16)}
    tiny = Released("tiny", "StableDiffusionPipeline", UNet2DConditionModel, config, (4, 16, 16), prompt)
    frozen, trained, peak = step_bytes(tiny, 2, gradient_checkpointing=False)
    assert frozen == 2 * sum(p.numel() for p in UNet2DConditionModel(**config).parameters())  # bfloat16
    assert frozen + trained < step_bytes(tiny, 2, gradient_checkpointing=True)[2] < peak
    assert step_bytes(tiny, 4, gradient_checkpointing=False)[2] > 1.5 * peak - frozen
    AcceleratorState._reset_state()


def test_encoding_takes_four_times_the_memory_at_twice_the_size():
    with torch.device("meta"):
        weights = 4 * sum(p.numel() for p in AutoencoderKL(**VAE, latent_channels=4).parameters())
    small, large = (encode_bytes((4, size, size)) - weights for size in (64, 128))
    assert large == pytest.approx(4 * small, rel=0.01)
    assert small > 4 * 3 * 128 * 512 * 512  # a layer's input, what is in it and its output at the image's size


def test_what_ships_is_small():
    folder = Path(text_run.__file__).parent.parent / "models"
    # Which is put there by whoever trains it, and does not ship.
    trained = folder / "tiny-imagenet" / "ddpm"
    files = [file for file in folder.rglob("*") if file.is_file() and trained not in file.parents]
    assert sum(file.stat().st_size for file in files) <= 40 * 2**20
