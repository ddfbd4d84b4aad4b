"""The adapter as a whole: attaching, sampling, scaling, and what is on disk when all goes well or not."""

import copy
import json
import os
import signal
import stat
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import saved_adapter, tiny_unet
from diffusers import UNet2DConditionModel, UNet2DModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from vdu_peft import adapter, contexts
from vdu_peft.adapter import AdapterError
from vdu_peft.atomic_folder import FolderError, atomic_folder
from vdu_peft.config import ConfigError, VDUConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def tiny(width=4, dtype=torch.float32):
    """A network with both kinds of target, "0" and "3"; the seed makes every call's weights the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(width * 16, 5)).to(dtype)


def images(count=2, dtype=torch.float32):
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


def trained(model, **options):
    """``model`` with an adapter whose mean and deviations are random."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["0", "3"], **options}
    peft_model = adapter.attach(model, VDUConfig(**options))
    for _, layer in adapter.variational_layers(peft_model):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        for log_std in layer.lora_log_std.values():
            nn.init.normal_(log_std, mean=-2, std=0.3)
    return peft_model.eval()


def contents(folder):
    """Every file below a folder, hidden ones too."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def saved(tmp_path):
    """(folder of a saved adapter, the model that was saved)"""
    model = trained(tiny())
    adapter.save_adapter(model, tmp_path / "saved")
    return tmp_path / "saved", model


def run_python(code, *arguments, path=()):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=arguments[0].parent, capture_output=True, text=True)


# On disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variational", [True, False])
def test_round_trip_keeps_the_whole_posterior(tmp_path, variational, dtype):
    model = trained(tiny(dtype=dtype), variational=variational, prior_scale=0.2)
    adapter.save_adapter(model, tmp_path / "a" / "b")
    loaded = adapter.load_adapter(tiny(dtype=dtype), tmp_path / "a" / "b")
    before, after = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert len(before) == (6 if variational else 4)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) and before[name].dtype == torch.float32, name
    assert torch.equal(loaded.eval()(images(dtype=dtype)), model(images(dtype=dtype)))
    assert torch.equal(adapter.total_kl(loaded), adapter.total_kl(model))


def test_saving_again_replaces_the_folder(saved):
    folder, model = saved
    (folder / "stale.txt").write_text("of the earlier save")
    nn.init.ones_(model.base_model.model[3].lora_B["default"].weight)
    adapter.save_adapter(model, folder)
    assert not (folder / "stale.txt").exists()
    assert (load_file(folder / WEIGHTS)["base_model.model.3.lora_B.weight"] == 1).all()
    assert [f.name for f in folder.parent.iterdir()] == ["saved"]


STOCK = """
import sys
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
for case in map(Path, sys.argv[1:]):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(64, 5))
    weights = load_file(case / "base.safetensors")
    model.to(weights["0.weight"].dtype).load_state_dict(weights)
    model = PeftModel.from_pretrained(model, case / "saved").eval()
    io = case / "io.safetensors"
    save_file({"y": model(load_file(io)["x"]).detach()}, io)
assert not [name for name in sys.modules if name.startswith("vdu_peft")]
"""


def test_stock_peft_loads_the_mean(tmp_path):
    """In one process of its own, to which this package is not known."""
    expected = {}
    for dtype, variational in product((torch.float32, torch.bfloat16), (True, False)):
        model, folder = trained(tiny(dtype=dtype), variational=variational), tmp_path / f"{dtype}-{variational}"
        adapter.save_adapter(model, folder / "saved")
        save_file(tiny(dtype=dtype).state_dict(), folder / "base.safetensors")
        save_file({"x": images(dtype=dtype)}, folder / "io.safetensors")
        expected[folder] = model(images(dtype=dtype))
    result = run_python(STOCK, *expected)
    assert result.returncode == 0, result.stderr
    for folder, y in expected.items():
        torch.testing.assert_close(load_file(folder / "io.safetensors")["y"], y, rtol=0, atol=1e-6)


def test_config_from_pretrained_keeps_our_fields(tmp_path):
    config = VDUConfig(r=3, lora_alpha=6, target_modules=["0"], prior_scale=0.2, init_scale=0.01, variational=False)
    adapter.attach(tiny(), config).save_pretrained(tmp_path)
    stored = VDUConfig.from_pretrained(tmp_path)
    for name in ("r", "lora_alpha", "target_modules", "prior_scale", "init_scale", "variational"):
        assert getattr(stored, name) == getattr(config, name), name
    assert VDUConfig.from_pretrained(tmp_path, prior_scale=0.5).prior_scale == 0.5
    written = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**written, "rank_pattern": None}))
    assert VDUConfig.from_pretrained(tmp_path).rank_pattern == {}


def test_config_of_a_plain_lora_is_refused(tmp_path):
    get_peft_model(tiny(), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    for load in (VDUConfig.from_pretrained, lambda folder: adapter.load_adapter(tiny(), folder)):
        with pytest.raises(ConfigError, match=rf"{CONFIG}: not a VDU adapter"):
            load(tmp_path)


CONFIG_DAMAGES = {
    "gone": lambda f: f.unlink(),
    "cut": lambda f: f.write_text('{"r": 4,'),
    "not text": lambda f: f.write_bytes(b"\xff\xfe"),
    "no options": lambda f: f.write_text("4"),
    "a rank in words": lambda f: f.write_text(f.read_text().replace('"r": 4', '"r": "4"')),
    "an endless alpha": lambda f: f.write_text(f.read_text().replace('"lora_alpha": 8', '"lora_alpha": Infinity')),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGES.values(), ids=CONFIG_DAMAGES)
def test_config_that_cannot_be_read(saved, damage):
    damage(saved[0] / CONFIG)
    with pytest.raises(ConfigError, match=f"{saved[0]}.*{CONFIG}"):
        VDUConfig.from_pretrained(saved[0])


def put_nan(file):
    tensors = load_file(file)
    tensors["base_model.model.0.lora_log_std"].view(-1)[0] = float("nan")
    save_file(tensors, file)


DAMAGES = {
    "gone": (lambda f: f.unlink(), "no such file"),
    "empty": (lambda f: f.write_bytes(b""), "not a readable safetensors file"),
    "cut in the header": (lambda f: f.write_bytes(f.read_bytes()[:20]), "not a readable safetensors file"),
    "cut in the data": (lambda f: f.write_bytes(f.read_bytes()[:-1]), "not a readable safetensors file"),
    "not finite": (put_nan, "0.lora_log_std holds NaN"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_cannot_be_read(saved, damage):
    folder, _ = saved
    break_it, message = DAMAGES[damage]
    break_it(folder / WEIGHTS)
    model = tiny()
    with pytest.raises(AdapterError, match=rf"{folder / WEIGHTS}: .*{message}"):
        adapter.load_adapter(model, folder)
    assert not list(adapter.variational_layers(model))  # read before the model is touched


def drop_log_std(file):
    save_file({k: v for k, v in load_file(file).items() if "lora_log_std" not in k}, file)


def add_layer(file):
    save_file({**load_file(file), "base_model.model.9.lora_log_std": torch.zeros(1)}, file)


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (lambda: tiny(width=6), None, r"0\.lora_B\.weight has shape \[4, 4, 1, 1\], the model's needs \[6, 4, 1, 1\]"),
        (tiny, drop_log_std, r"0\.lora_log_std is missing"),
        (tiny, add_layer, r"9\.lora_log_std has shape \[1\], the model's does not exist"),
    ],
    ids=["shape", "missing", "surplus"],
)
def test_adapter_of_another_model(saved, model, change, message):
    folder, _ = saved
    if change:
        change(folder / WEIGHTS)
    target = model()
    before = target(images())
    with pytest.raises(AdapterError, match=rf"{folder}: made for another model: .*{message}"):
        adapter.load_adapter(target, folder)
    # Refused, and the model is as it was: its own layers, trainable as before, with the same output.
    assert {name for name, _ in target.named_parameters()} == {name for name, _ in tiny().named_parameters()}
    assert all(p.requires_grad for p in target.parameters()) and not hasattr(target, "peft_config")
    assert torch.equal(target(images()), before)


def another(like):
    """A model of the same shape with weights of its own."""
    torch.manual_seed(1)
    for p in like.parameters():
        nn.init.normal_(p, std=p.std().item())
    return like


def test_adapter_of_another_base_of_the_same_shape(saved, pair):
    folder, _ = saved
    target = another(tiny())
    before = target(images())
    with pytest.raises(AdapterError, match=f"{folder}: made for another base model"):
        adapter.load_adapter(target, folder)
    assert torch.equal(target(images()), before) and not list(adapter.variational_layers(target))
    other = adapter.load_adapter(another(tiny()), adapter_of(folder.parent / "other", target, ["0", "3"]), "first")
    with pytest.raises(AdapterError, match="made for another base model"):
        adapter.load_adapter(other, folder, "second")
    assert set(other.peft_config) == {"first"}
    # The same base in half precision, or tuned a little, still is the same.
    adapter.load_adapter(tiny(dtype=torch.bfloat16), folder)
    tuned = tiny()
    for p in tuned.parameters():
        p.data += 0.2 * p.std() * torch.randn_like(p)
    adapter.load_adapter(tuned, folder)


@pytest.mark.skipif(sys.platform == "win32", reason="no modes of files there")
def test_others_may_read_what_is_saved(tmp_path):
    saved_adapter(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    assert stat.filemode(weights.stat().st_mode) == "-rw-r--r--"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
def test_an_interrupted_save_leaves_the_earlier_one(tmp_path, existed, error):
    folder = tmp_path / "adapter"
    if existed:
        with atomic_folder(folder) as fresh:
            (fresh / "file").write_text("earlier")
    with pytest.raises(error), atomic_folder(folder) as fresh:
        (fresh / "file").write_text("half")
        raise error
    assert contents(tmp_path) == ({"adapter/file": b"earlier"} if existed else {})
    assert [f.name for f in tmp_path.iterdir()] == (["adapter"] if existed else [])


@pytest.mark.parametrize("back", [True, False])
def test_a_folder_that_cannot_be_replaced_is_kept_or_told_of(tmp_path, monkeypatch, back):
    """The rename of the fresh one fails, and then that of the earlier one back to its place."""
    folder, rename, calls = tmp_path / "adapter", Path.rename, []
    with atomic_folder(folder) as fresh:
        (fresh / "file").write_text("earlier")

    def failing(self, target):
        calls.append(self)
        if len(calls) == 2 or (len(calls) == 3 and not back):
            raise OSError("the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(FolderError) as caught, atomic_folder(folder) as fresh:
        (fresh / "file").write_text("new")
    if back:
        assert "what was there before is kept" in str(caught.value) and contents(tmp_path) == {
            "adapter/file": b"earlier"
        }
        assert [f.name for f in tmp_path.iterdir()] == ["adapter"]
    else:
        (file,) = tmp_path.glob(".adapter-old-*/adapter/file")
        assert f"what was there before is {file.parent}" in str(caught.value) and file.read_text() == "earlier"


def test_a_folder_of_something_else_is_not_replaced_by_an_adapter(saved, tmp_path):
    _, model = saved
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("a cat")
    peft_model = adapter.attach(tiny(), VDUConfig(target_modules=["0"]))
    with pytest.raises(FolderError, match="holds something else than an adapter"):
        adapter.save_adapter(peft_model, tmp_path / "photos")
    assert contents(tmp_path / "photos") == {"cat.png": b"a cat"}


KILLED = """
import os, signal, sys
from pathlib import Path
from vdu_peft.atomic_folder import atomic_folder
with atomic_folder(Path(sys.argv[1])) as fresh:
    (fresh / "adapter_model.safetensors").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_save_leaves_the_earlier_one(saved):
    folder, model = saved
    before = contents(folder)
    result = run_python(KILLED, folder, path=[Path(adapter.__file__).parents[1]])
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert contents(folder) == before
    assert torch.equal(adapter.load_adapter(tiny(), folder).eval()(images()), model(images()))


KILLED_BETWEEN = """
import os, signal, sys
from pathlib import Path
from vdu_peft.atomic_folder import atomic_folder
rename = Path.rename
def killed(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = killed
with atomic_folder(Path(sys.argv[1])):
    pass
"""


def test_a_save_killed_between_its_renames_tells_where_the_earlier_one_is(saved):
    folder, model = saved
    result = run_python(KILLED_BETWEEN, folder, path=[Path(adapter.__file__).parents[1]])
    assert result.returncode == -signal.SIGKILL, result.stderr
    with pytest.raises(ConfigError, match="a killed save left it as (.*); move it back") as error:
        adapter.load_adapter(tiny(), folder)
    Path(str(error.value).partition(" left it as ")[2].removesuffix("; move it back")).rename(folder)
    assert torch.equal(adapter.load_adapter(tiny(), folder).eval()(images()), model(images()))


# Sampling and scaling


def test_posterior_sample_is_held_and_undone():
    model = trained(tiny())
    mean, parameters = model(images()), {n: p.clone() for n, p in model.named_parameters()}
    draws = []
    for seed in (0, 0, 1):
        with contexts.posterior_sample(model, generator=torch.Generator().manual_seed(seed)):
            draws.append(model(images()))
            assert torch.equal(model(images()), draws[-1])
        assert torch.equal(model(images()), mean)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], mean)
    with pytest.raises(KeyError), contexts.posterior_sample(model):
        raise KeyError
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


def test_posterior_sample_moments():
    """One linear layer: y ~ N(W x + s M h, s² S² h²) with h = A x, over draws of B."""
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Linear(6, 8)), target_modules=["0"])
    layer = model.base_model.model[0]
    x = torch.randn(3, 6)
    hidden = x @ layer.lora_A["default"].weight.T
    variance = 4 * hidden.square() @ torch.exp(2 * layer.lora_log_std["default"]).T  # s = 8 / 4
    generator, count, samples = torch.Generator().manual_seed(0), 1000, []
    with torch.no_grad():
        for _ in range(count):
            with contexts.posterior_sample(model, generator=generator):
                samples.append(model(x))
        mean, samples = model(x), torch.stack(samples)
    # 24 outputs, so 5 standard errors is a chance of 3e-5
    assert ((samples.mean(0) - mean).abs() < 5 * (variance / count).sqrt()).all()
    assert ((samples.var(0) - variance).abs() < 5 * variance * (2 / count) ** 0.5).all()


def test_a_sample_of_an_adapter_that_is_not_there_is_refused():
    model = trained(tiny())
    with (
        pytest.raises(AdapterError, match="no variational adapter named 'typo'"),
        contexts.posterior_sample(model, "typo"),
    ):
        pass


def test_a_deterministic_twin_samples_its_mean():
    model = trained(tiny(), variational=False)
    mean = model(images())
    with contexts.posterior_sample(model):
        assert torch.equal(model(images()), mean)


def test_scale_zero_is_the_base():
    expected = tiny()(images())
    model = trained(tiny())
    adapted = model(images())
    with contexts.adapter_scale(model, 0):
        assert torch.equal(model(images()), expected)
    assert torch.equal(model(images()), adapted)
    assert not torch.equal(adapted, expected)


@pytest.mark.parametrize("scale", [0.3, 0.5, 2.0, -1.0])
def test_scale_multiplies_the_delta(scale):
    """One linear layer in float64, so that the output is linear in the delta."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8)).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    at_0 = base(x)
    model = trained(base, target_modules=["0"])
    at_1 = model(x)
    with contexts.adapter_scale(model, scale):
        torch.testing.assert_close(model(x), at_0 + scale * (at_1 - at_0), rtol=1e-12, atol=1e-12)
    assert torch.equal(model(x), at_1)


def test_a_scale_that_is_no_number_leaves_no_trace():
    model = trained(tiny())
    expected = model(images())
    with pytest.raises(TypeError), contexts.adapter_scale(model, {"0": 0.5, "3": "x"}):
        pass
    for scale in (float("nan"), float("inf"), {"0": 0.5, "3": float("nan")}):
        with pytest.raises(AdapterError, match="nan is no scale|inf is no scale"), contexts.adapter_scale(model, scale):
            pass
    assert torch.equal(model(images()), expected)


def test_every_block_has_its_own_scale():
    """Against deltas scaled by hand: the longest name wins, a layer outside the blocks is left alone."""
    options = {"target_modules": VDUConfig.for_model(tiny_unet()).target_modules, "lora_alpha": 4}
    model, twin = trained(tiny_unet(), **options), trained(tiny_unet(), **options)
    x_t, timesteps = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 500])
    expected = {"down_blocks": 0.5, "down_blocks.1": 0.0, "up_blocks.0.resnets": 2.0}
    with torch.no_grad():
        for name, layer in adapter.variational_layers(twin.get_base_model()):
            for block, scale in expected.items():  # in order of their lengths
                if name.startswith(block):
                    layer.scaling["default"] = scale
    scales = [layer.scaling["default"] for _, layer in adapter.variational_layers(twin)]
    assert {0.0, 0.5, 1.0, 2.0} == set(scales)
    with contexts.adapter_scale(model, dict(reversed(expected.items()))):
        scaled = model(x_t, timesteps).sample
    torch.testing.assert_close(scaled, twin(x_t, timesteps).sample, rtol=0, atol=1e-6)
    assert not torch.allclose(scaled, model(x_t, timesteps).sample, atol=1e-3)
    refused = pytest.raises(AdapterError, match="no adapted layer lies under 'down_block'")
    with refused, contexts.adapter_scale(model, {"down_block": 0.5}):  # the name of no block, but how two begin
        pass


@pytest.mark.parametrize("scale", [0, 0.7])
@pytest.mark.parametrize("training", [True, False])
def test_scale_leaves_no_trace(scale, training):
    """Neither in the scalings (1.975 x 0.7 / 0.7 is not 1.975) nor in what is trainable."""
    model = trained(tiny(), lora_alpha=7.9)
    model.requires_grad_(training)
    with pytest.raises(KeyError), contexts.adapter_scale(model, scale):
        raise KeyError
    assert all(layer.scaling == {"default": 7.9 / 4} for _, layer in adapter.variational_layers(model))
    assert all(p.requires_grad == training for p in model.parameters())


def test_total_and_description_add_up():
    model = trained(tiny())
    records = adapter.describe(model)
    assert [record["layer"] for record in records] == ["0", "3"]
    assert sum(record["kl"] for record in records) == pytest.approx(adapter.total_kl(model).item(), rel=1e-6)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(record["parameters"] for record in records) == trainable
    with pytest.raises(AdapterError, match="no variational adapter named 'other'"):
        adapter.total_kl(model, "other")


# Attaching


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (tiny, {"target_modules": ["nothing"]}, "target_modules: .*nothing"),
        (
            lambda: nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 5)),
            {"target_modules": ["0", "1"]},
            "Embedding is neither",
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2)), {"target_modules": ["0"]}, "dilation"),
    ],
    ids=["no match", "embedding", "dilation"],
)
def test_targets_that_cannot_be_adapted(model, options, message):
    with pytest.raises(ConfigError, match=message):
        adapter.attach(model(), VDUConfig(**options))
    # By PEFT alone, too: no layer becomes a plain LoRA without a word.
    with pytest.raises(ValueError, match=message.removeprefix("target_modules: ")):
        get_peft_model(model(), VDUConfig(**options))


class Attentive(nn.Module):
    """torch's own attention, which reads its layers' weights and does not call them."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.encoder(self.attention(x, x, x)[0]))


@pytest.mark.parametrize("target", ["attention.out_proj", "encoder.linear1", "encoder.self_attn.out_proj"])
def test_layers_that_are_passed_by_are_left_out_and_refused(target):
    assert VDUConfig.for_model(Attentive()).target_modules == {"last"}
    with pytest.raises(ConfigError, match=f"{target} is never called"):
        adapter.attach(Attentive(), VDUConfig(target_modules=[target]))


@pytest.mark.parametrize("training", [True, False])
def test_an_adapter_has_the_mode_of_its_base(saved, training):
    """Else its dropout would drop in what a model draws."""
    folder, _ = saved
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "lora_dropout": 0.5}))
    model = adapter.load_adapter(tiny().train(training), folder)
    assert {module.training for module in model.modules()} == {training}
    assert torch.equal(model(images()), model(images())) != training
    # As denoisers do, past the wrapper; and one more adapter is in that mode, too.
    model.get_base_model().eval()
    adapter.load_adapter(model, folder, "second")
    assert not any(module.training for module in model.modules())


def test_a_start_that_left_the_base_alone_is_past_when_an_adapter_is_loaded(saved):
    folder, model = saved
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "init_lora_weights": False}))
    assert torch.equal(adapter.load_adapter(tiny().eval(), folder)(images()), model(images()))


def test_an_adapter_of_another_name_is_saved_again_in_its_place(tmp_path):
    peft_model = adapter.attach(tiny(), VDUConfig(target_modules=["0"]), "cats")
    for _ in range(2):
        adapter.save_adapter(peft_model, tmp_path / "cats")
    assert (tmp_path / "cats" / "cats" / CONFIG).is_file()


def test_a_rank_above_a_layer_s_inputs_is_refused_before_anything_is_learned():
    model = tiny()
    with pytest.raises(ConfigError, match="target_modules: rank 28 exceeds the 27 inputs"):
        adapter.attach(model, VDUConfig(target_modules=["0"], r=28))
    assert not [m for m in model.modules() if isinstance(m, LoraLayer)]


def test_an_adapter_of_stacked_ranks_is_loaded_and_described(tmp_path):
    """As PEFT's concatenation makes them, above the inputs: it has no KL, and is an adapter all the same."""
    base = nn.Sequential(nn.Linear(3, 8))
    model = get_peft_model(copy.deepcopy(base), VDUConfig(target_modules=["0"], r=5))
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    adapter.save_adapter(model, tmp_path / "stacked")
    loaded, x = adapter.load_adapter(copy.deepcopy(base), tmp_path / "stacked"), torch.randn(4, 3)
    torch.testing.assert_close(loaded(x), model(x))
    more = adapter.load_adapter(trained(copy.deepcopy(base), target_modules=["0"], r=2), tmp_path / "stacked", "more")
    more.set_adapter("more")
    torch.testing.assert_close(more(x), model(x))
    (row,) = adapter.describe(loaded)
    assert row["kl"] is None and row["rank"] == 5 and row["signal_to_noise"] > 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("r", 0),
        ("prior_scale", 0),
        ("prior_scale", float("nan")),
        ("init_scale", -1.0),
        ("lora_alpha", 0),
        ("use_dora", True),
        ("alora_invocation_tokens", [1]),
        ("modules_to_save", ["3"]),
        ("bias", "lora_only"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", False),
        ("lora_bias", True),
    ],
)
def test_options_out_of_range(option, value):
    with pytest.raises(ConfigError, match="rank" if option == "r" else option):
        VDUConfig(target_modules=["0"], **{option: value})


def test_inject_adapter_in_model():
    expected = tiny()(images())
    model = inject_adapter_in_model(VDUConfig(target_modules=["0", "3"]), tiny())
    assert [name for name, _ in adapter.variational_layers(model)] == ["0", "3"]
    assert torch.equal(model(images()), expected)


@pytest.fixture(scope="module")
def conditional_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def unconditional_unet():
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def test_diffusers_add_adapter(conditional_unet):
    x = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = conditional_unet(*x).sample
        config = VDUConfig.for_model(conditional_unet)
        conditional_unet.add_adapter(config)
        assert torch.equal(conditional_unet(*x).sample, expected)
        with contexts.posterior_sample(conditional_unet):
            assert not torch.equal(conditional_unet(*x).sample, expected)
        conditional_unet.disable_adapters()
        with contexts.posterior_noise(conditional_unet):
            assert torch.equal(conditional_unet(*x).sample, expected)
    names = [name for name, _ in adapter.variational_layers(conditional_unet)]
    attentions = [n for n, m in conditional_unet.named_modules() if n.endswith((".attn1", ".attn2"))]
    assert set(names) == {f"{a}.{p}" for a in attentions for p in ("to_q", "to_k", "to_v", "to_out.0")}
    assert attentions


@pytest.mark.parametrize("r", [4, 16])
def test_for_model_targets_every_layer_of_an_unconditional_unet(r):
    """All that have at least r inputs: the first convolution has 1 x 3 x 3."""
    model = unconditional_unet()
    expected = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight[0].numel() >= r
    }
    assert ("conv_in" in expected) == (r == 4)
    peft_model = adapter.attach(model, VDUConfig.for_model(model, r=r))
    assert {name for name, _ in adapter.variational_layers(peft_model.get_base_model())} == expected
    assert adapter.total_kl(peft_model).isfinite()


def test_for_model_targets_nothing_else():
    """A target's name also ends the name of layers that LoRA cannot adapt."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)
            self.dilated = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, dilation=2)})
            self.block = nn.ModuleDict({"conv": nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(6, 6, 3, groups=3))})

    model = Network()
    peft_model = adapter.attach(model, VDUConfig.for_model(model))
    assert {n for n, _ in adapter.variational_layers(peft_model.get_base_model())} == {"conv", "block.conv.0"}


def test_for_model_without_a_layer_to_adapt():
    model = nn.Sequential(nn.SiLU())
    with pytest.raises(ConfigError, match="target_modules"):
        adapter.attach(model, VDUConfig.for_model(model))


def test_for_model_leaves_given_targets_alone():
    assert VDUConfig.for_model(tiny(), target_modules=["3"]).target_modules == {"3"}


def test_contexts_refuse_a_merged_adapter():
    """A merged layer computes with its base weight alone: noise and scale would silently do nothing."""
    model = trained(tiny())
    model.merge_adapter()
    with pytest.raises(AdapterError, match="posterior_sample: the adapter is merged"), contexts.posterior_sample(model):
        pass
    with pytest.raises(AdapterError, match="adapter_scale: the adapter is merged"), contexts.adapter_scale(model, 0.5):
        pass
    model.unmerge_adapter()
    with contexts.adapter_scale(model, 0):
        torch.testing.assert_close(model(images()), tiny()(images()), atol=1e-6, rtol=0)


# Several adapters


@pytest.fixture
def pair(tmp_path):
    """Folders of two adapters of the same base, ranks 4 and 2, and the outputs with each alone."""
    folders, outputs = [], []
    for seed, options in enumerate(({}, {"r": 2, "lora_alpha": 6})):
        model = trained(tiny(), **options)
        torch.manual_seed(10 + seed)
        for _, layer in adapter.variational_layers(model):
            nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        adapter.save_adapter(model, tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
        outputs.append(model(images()).detach())
    return folders, outputs


def adapter_of(folder, model, targets):
    """The folder of a fresh adapter for a copy of the model."""
    adapter.save_adapter(adapter.attach(copy.deepcopy(model), VDUConfig(target_modules=targets)), folder)
    return folder


def both(folders):
    model = adapter.load_adapter(tiny(), folders[0], "first").eval()
    return adapter.load_adapter(model, folders[1], "second")


def test_adapters_are_switched_and_add_up(pair):
    folders, outputs = pair
    model = both(folders)
    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(model(images()), outputs[0], **close)  # the second waits
    model.set_adapter("second")
    torch.testing.assert_close(model(images()), outputs[1], **close)
    mixed = model(images(), adapter_names=["first", "second"])
    torch.testing.assert_close(mixed, torch.stack([outputs[0][0], outputs[1][1]]), **close)

    model.base_model.set_adapter(["first", "second"])
    dense = tiny()
    for _, layer in adapter.variational_layers(model, "first"):
        target = dense[0] if layer.get_base_layer().weight.ndim == 4 else dense[3]
        target.weight.data += layer.get_delta_weight("first") + layer.get_delta_weight("second")
    torch.testing.assert_close(model(images()), dense(images()), **close)
    with contexts.adapter_scale(model, 0):
        assert torch.equal(model(images()), tiny()(images()))
    model.merge_adapter()
    torch.testing.assert_close(model(images()), dense(images()), **close)
    model.unmerge_adapter()
    model.delete_adapter("first")
    model.set_adapter("second")
    torch.testing.assert_close(model(images()), outputs[1], **close)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_a_plain_lora_beside_ours_is_peft_s(saved, options):
    """A style on the same layers: what it does is what it does without ours."""
    folder, _ = saved
    style = LoraConfig(r=2, target_modules=["0", "3"], init_lora_weights=False, **options)

    def with_style(model):
        torch.manual_seed(3)
        model.add_adapter("style", style) if hasattr(model, "peft_config") else get_peft_model(model, style, "style")
        for name, p in model.named_parameters():
            if "lora_B.style.bias" in name:
                nn.init.normal_(p)
        return model

    ours = with_style(adapter.load_adapter(tiny(), folder)).eval()
    alone = with_style(tiny()).eval()
    with torch.no_grad():
        ours.set_adapter("style")
        torch.testing.assert_close(ours(images(16)), alone(images(16)), atol=1e-5, rtol=0)  # one pass or two
        ours.set_adapter("default")
        expected = adapter.load_adapter(tiny(), folder).eval()
        torch.testing.assert_close(ours(images(16)), expected(images(16)), atol=1e-5, rtol=0)
    assert adapter.total_kl(ours) == adapter.total_kl(expected)
    with pytest.raises(AdapterError, match="no variational adapter named 'style'"):
        adapter.total_kl(ours, "style")


def test_a_model_with_an_adapter_keeps_it_when_another_is_refused(saved):
    """The network inside a PeftModel is no bare one."""
    folder, _ = saved
    model = adapter.load_adapter(tiny(), folder)
    expected = model(images())
    with pytest.raises(ConfigError, match="carries an adapter already"):
        adapter.load_adapter(model.get_base_model(), folder, "second")
    assert torch.equal(model(images()), expected) and set(model.peft_config) == {"default"}


def test_the_second_adapter_keeps_its_posterior(pair):
    folders, _ = pair
    model = both(folders)
    alone = dict(adapter.variational_layers(adapter.load_adapter(tiny(), folders[1])))
    for name, layer in adapter.variational_layers(model, "second"):
        assert torch.equal(layer.lora_log_std["second"], alone[name].lora_log_std["default"])
        assert layer.kl("second") == alone[name].kl("default")


def test_a_name_that_is_part_of_a_module_s_is_refused(saved, pair):
    """PEFT would leave the layers under that name out of what it saves and loads."""
    folder, _ = saved
    with pytest.raises(ConfigError, match="adapter_name '3': a part of the model's module names"):
        adapter.load_adapter(tiny(), folder, "3")
    with pytest.raises(ConfigError, match="adapter_name '3': a part of the model's module names"):
        adapter.load_adapter(both(pair[0]), folder, "3")


def test_a_second_adapter_that_does_not_fit_is_taken_off_again(pair, tmp_path):
    folders, outputs = pair
    model = adapter.load_adapter(tiny(), folders[0], "first").eval()
    with pytest.raises(ConfigError, match="has an adapter 'first' already"):
        adapter.load_adapter(model, folders[1], "first")
    wide = trained(tiny(width=6))
    adapter.save_adapter(wide, tmp_path / "wide")
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(AdapterError, match="made for another model"):
        adapter.load_adapter(model, tmp_path / "wide", "second")
    other = adapter.attach(nn.Sequential(nn.Linear(4, 4)), VDUConfig(target_modules=["0"]))
    other.save_pretrained(tmp_path / "other")
    drop = tmp_path / "other" / WEIGHTS
    save_file({k: v for k, v in load_file(drop).items() if "lora_A" not in k}, drop)
    with pytest.raises(AdapterError, match="made for another model"):
        adapter.load_adapter(model, tmp_path / "other", "second")
    # Only the later of two target layers cannot be adapted: PEFT has changed the first one by then.
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Conv2d(8, 8, 3, dilation=2))
    partly = adapter.load_adapter(other, adapter_of(tmp_path / "small", other, ["0"]), "first")
    big = adapter_of(tmp_path / "big", nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(8, 8)), ["0", "2"])
    with pytest.raises(AdapterError, match="made for another model.*dilation"):
        adapter.load_adapter(partly, big, "second")
    assert not [name for name, _ in partly.named_parameters() if "second" in name] and type(other[2]) is nn.Conv2d
    assert set(partly.peft_config) == {"first"}
    assert set(model.peft_config) == {"first"}
    assert [p.requires_grad for p in model.parameters()] == flags
    torch.testing.assert_close(model(images()), outputs[0], atol=1e-6, rtol=0)
