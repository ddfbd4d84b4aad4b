"""What PEFT's own suite for custom models asks of a method, asked of LoraConfig and of VDUConfig alike."""

import copy

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn

from vdu_peft.config import VDUConfig

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:Adapter .* was active")
MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)), ["0", "3"], (4, 6)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 3)),
        ["0", "3"],
        (4, 3, 5, 5),
    ),
}
over_configs = pytest.mark.parametrize("config_class", [LoraConfig, VDUConfig])
over_models = pytest.mark.parametrize("name", MODELS)


def base_model(name):
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def config(config_class, name, **options):
    return config_class(**{"r": 2, "lora_alpha": 4, "target_modules": MODELS[name][1], **options})


def inputs(name):
    return torch.randn(MODELS[name][2], generator=torch.Generator().manual_seed(1))


def fill(peft_model, adapter_name, seed=2):
    """A delta that is not zero."""
    torch.manual_seed(seed)
    for module in peft_model.modules():
        if adapter_name in getattr(module, "lora_B", {}):
            nn.init.normal_(module.lora_B[adapter_name].weight, std=0.5)


@pytest.fixture
def made():
    """name, config class -> (PeftModel with the adapters "first", active, and "second"; input; base's output)"""

    def make(config_class, name):
        x, base = inputs(name), base_model(name)
        expected = base(x)
        model = get_peft_model(base, config(config_class, name), adapter_name="first")
        model.add_adapter("second", config(config_class, name, r=3))
        fill(model, "first", 2)
        fill(model, "second", 3)
        return model.eval(), x, expected

    return make


def output_of(model, adapter_name, x):
    model.set_adapter(adapter_name)
    return model(x)


@over_configs
@over_models
def test_adapters_are_told_apart(made, config_class, name):
    model, x, base = made(config_class, name)
    first, second = output_of(model, "first", x), output_of(model, "second", x)
    assert min((first - base).abs().max(), (second - base).abs().max(), (first - second).abs().max()) > 1e-2
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    assert torch.equal(output_of(model, "first", x), first)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".first" in n for n in trainable)


@over_configs
@over_models
def test_a_mixed_batch(made, config_class, name):
    model, x, base = made(config_class, name)
    alone = {"__base__": base, "first": output_of(model, "first", x), "second": output_of(model, "second", x)}
    names = ["second", "__base__", "first", "second"]
    expected = torch.stack([alone[n][i] for i, n in enumerate(names)])
    torch.testing.assert_close(model(x, adapter_names=names), expected, atol=1e-6, rtol=0)


@over_configs
@over_models
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_chosen_adapters(made, config_class, name, safe_merge):
    model, x, base = made(config_class, name)
    second = output_of(model, "second", x)
    twin = copy.deepcopy(model)
    merged = twin.merge_and_unload(safe_merge=safe_merge, adapter_names=["second"])
    torch.testing.assert_close(merged(x), second, atol=1e-5, rtol=0)
    assert not any("lora" in n for n, _ in merged.named_modules())
    model.set_adapter("first")
    first = model(x)
    model.base_model.set_adapter(["first", "second"])
    both = model(x)
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(model(x), both, atol=1e-5, rtol=0)
    model.unmerge_adapter()
    torch.testing.assert_close(output_of(model, "first", x), first, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.unload()(x), base, atol=1e-5, rtol=0)


@over_configs
@over_models
@pytest.mark.filterwarnings(
    "ignore:All adapters are already merged", "ignore:Already unmerged", "ignore:Already following"
)
def test_merging_again(made, config_class, name):
    """What is merged is not merged twice, another adapter is added to it, and the way back is the base."""
    model, x, base = made(config_class, name)
    first = output_of(model, "first", x)
    for _ in range(5):
        model.merge_adapter()
        model.merge_adapter()
        torch.testing.assert_close(model(x), first, atol=1e-5, rtol=0)
        model.unmerge_adapter()
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), first, atol=1e-5, rtol=0)
    model.base_model.set_adapter(["first", "second"])
    both = model(x)
    model.merge_adapter(adapter_names=["first"])
    model.merge_adapter(adapter_names=["second"])
    torch.testing.assert_close(model(x), both, atol=1e-5, rtol=0)
    model.unmerge_adapter()
    torch.testing.assert_close(model.unload()(x), base, atol=1e-5, rtol=0)


@over_configs
@over_models
def test_disabling_what_is_merged(made, config_class, name):
    model, x, base = made(config_class, name)
    first = output_of(model, "first", x)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(x), first, atol=1e-5, rtol=0)


@over_configs
@over_models
def test_merging_what_is_not_finite_is_refused(made, config_class, name):
    model, x, _ = made(config_class, name)
    model.base_model.model[0].lora_B["first"].weight.data.fill_(torch.nan)
    before = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


@over_configs
@over_models
def test_deleting(made, config_class, name):
    model, x, base = made(config_class, name)
    second = output_of(model, "second", x)
    model.set_adapter("first")
    model.delete_adapter("first")
    assert set(model.peft_config) == {"second"} and model.active_adapters == ["second"]
    assert not any(".first" in n for n in model.state_dict())
    assert torch.equal(output_of(model, "second", x), second)
    with pytest.raises(ValueError, match="first does not exist"):
        model.delete_adapter("first")
    assert torch.equal(model.unload()(x), base)


@over_configs
@over_models
def test_deleting_an_inactive_one(made, config_class, name):
    model, x, _ = made(config_class, name)
    first = output_of(model, "first", x)
    model.delete_adapter("second")
    assert set(model.peft_config) == {"first"} and model.active_adapters == ["first"]
    assert not any(".second" in n for n in model.state_dict())
    assert torch.equal(model(x), first)


@over_configs
@over_models
def test_unknown_names_are_refused(made, config_class, name):
    model, x, _ = made(config_class, name)
    first = output_of(model, "first", x)
    with pytest.raises(ValueError, match="other not found"):
        model.set_adapter("other")
    with pytest.raises(ValueError, match="non-existing adapter.*other"):
        model(x, adapter_names=["first", "other", "second", "__base__"])
    assert model.active_adapters == ["first"] and torch.equal(model(x), first)


@over_configs
@over_models
def test_a_mixed_batch_is_for_inference(made, config_class, name):
    model, x, _ = made(config_class, name)
    model.train()
    with pytest.raises(ValueError, match="`adapter_names` when the model is in training mode"):
        model(x, adapter_names=["first", "second", "first", "__base__"])


@over_configs
@over_models
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
def test_half_precision(config_class, name, dtype, autocast_adapter_dtype):
    """A base in half precision with adapters in the same or, PEFT's default, in float32; float32 is the oracle."""
    x, base = inputs(name).to(dtype), base_model(name).to(dtype)
    options = {"adapter_name": "first", "autocast_adapter_dtype": autocast_adapter_dtype}
    model = get_peft_model(base, config(config_class, name), **options).eval()
    fill(model, "first")
    adapter_dtypes = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert adapter_dtypes == {torch.float32 if autocast_adapter_dtype else dtype}
    twin = copy.deepcopy(model).float()
    expected = twin(x.float())
    with twin.disable_adapter():
        untouched = twin(x.float())
    rounding = 4 * torch.finfo(dtype).eps * expected.abs().max()
    assert (expected - untouched).abs().max() > 4 * rounding
    unmerged = model(x)
    model.merge_adapter()
    for output in (unmerged, model(x)):
        assert output.dtype == dtype and (output.float() - expected).abs().max() < rounding


@over_configs
@over_models
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_is_loaded(made, config_class, name, low_cpu_mem_usage, tmp_path):
    model, x, _ = made(config_class, name)
    expected = {n: output_of(model, n, x) for n in ("first", "second")}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        base_model(name),
        tmp_path / "first",
        adapter_name="first",
        config=config_class.from_pretrained(tmp_path / "first"),
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    loaded.add_adapter("second", config_class.from_pretrained(tmp_path / "second"), low_cpu_mem_usage=low_cpu_mem_usage)
    stored = get_peft_model_state_dict(model, adapter_name="second")
    set_peft_model_state_dict(loaded, stored, adapter_name="second", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.eval()
    for adapter_name, value in expected.items():
        assert torch.equal(output_of(loaded, adapter_name, x), value)
        ours, theirs = (get_peft_model_state_dict(m, adapter_name=adapter_name) for m in (model, loaded))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}


@over_configs
@over_models
def test_injected_on_meta_and_filled(made, config_class, name):
    model, x, _ = made(config_class, name)
    expected = output_of(model, "first", x)
    stored = get_peft_model_state_dict(model, adapter_name="first")
    injected = inject_adapter_in_model(
        config(config_class, name), base_model(name), adapter_name="other", low_cpu_mem_usage=True
    )
    assert {p.device.type for n, p in injected.named_parameters() if "lora_" in n} == {"meta"}
    plain = {n.removeprefix("base_model.model."): value for n, value in stored.items()}
    set_peft_model_state_dict(injected, plain, adapter_name="other", low_cpu_mem_usage=True)
    assert torch.equal(injected.eval()(x), expected)


@over_configs
@over_models
@pytest.mark.parametrize("combination", ["cat", "linear", "svd", "ties_svd", "dare_linear"])
def test_weighted_combinations(made, config_class, name, combination):
    """Against a closed form where there is one, and with the same draws against the plain twin's in every case."""
    model, x, _ = made(config_class, name)
    plain, _, _ = made(LoraConfig, name)
    names = ["first", "second"]
    if combination in ("linear", "dare_linear"):  # for equal ranks
        names = ["first", "third"]
        for m, kind in ((model, config_class), (plain, LoraConfig)):
            m.add_adapter("third", config(kind, name))
        fill(model, "third", 4)
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if "lora_log_std" not in n})
    layers, twins = [], []
    for m, found in ((model, layers), (plain, twins)):
        torch.manual_seed(5)  # dare draws what it leaves out
        m.add_weighted_adapter(names, [0.5, 2.0], "mixed", combination_type=combination, density=0.5)
        found += [module for module in m.modules() if "mixed" in getattr(module, "lora_B", {})]
    assert len(layers) == 2
    for layer, twin in zip(layers, twins, strict=True):
        mixed, rank = layer.get_delta_weight("mixed").flatten(1), layer.r["mixed"]
        torch.testing.assert_close(mixed, twin.get_delta_weight("mixed").flatten(1), atol=1e-6, rtol=0)
        if combination in ("cat", "svd"):
            assert combination == "svd" or rank == sum(layer.r[n] for n in names)
            first, second = (layer.get_delta_weight(n) for n in names)
            left, values, right = torch.linalg.svd((0.5 * first + 2.0 * second).flatten(1), full_matrices=False)
            best = (left[:, :rank] * values[:rank]) @ right[:rank]
            torch.testing.assert_close(mixed, best, atol=1e-4, rtol=0)
        if combination == "linear":  # of the factors: beside w s B A of each there are the products across
            roots = [(weight * layer.scaling[n]) ** 0.5 for n, weight in zip(names, (0.5, 2.0), strict=True)]
            factors = [
                sum(root * part[n].weight.flatten(1) for n, root in zip(names, roots, strict=True))
                for part in (layer.lora_B, layer.lora_A)
            ]
            torch.testing.assert_close(mixed, factors[0] @ factors[1], atol=1e-5, rtol=0)
    assert output_of(model, "mixed", x).isfinite().all()


@over_configs
def test_ranks_stacked_above_a_layers_inputs(config_class):
    """As PEFT's concatenation may stack them: a sum of deltas like any other, which merges."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(3, 8)), config_class(r=2, target_modules=["0"]), adapter_name="first"
    )
    model.add_adapter("second", config_class(r=3, target_modules=["0"]))
    fill(model, "first", 2)
    fill(model, "second", 3)
    model.add_weighted_adapter(["first", "second"], [0.5, 2.0], "mixed", combination_type="cat")
    layer = model.get_submodule("base_model.model.0")
    assert layer.r["mixed"] == 5
    expected = 0.5 * layer.get_delta_weight("first") + 2.0 * layer.get_delta_weight("second")
    torch.testing.assert_close(layer.get_delta_weight("mixed"), expected)
    x = torch.randn(4, 3)
    mixed = output_of(model, "mixed", x)
    torch.testing.assert_close(model.merge_and_unload(adapter_names=["mixed"])(x), mixed)


@over_configs
@over_models
def test_training_moves_the_adapter_alone(made, config_class, name):
    model, x, _ = made(config_class, name)
    model.set_adapter("first")
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(".first" in n and ".lora_" in n for n in moved)
