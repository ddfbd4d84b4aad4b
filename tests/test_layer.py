"""One contract over every layer type and dtype of the base, and the seam that PEFT must keep."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import layer as lora
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from vdu_peft.config import VDUConfig
from vdu_peft.contexts import posterior_noise
from vdu_peft.layer import GaussianVariant, VariationalConv2d, VariationalLinear

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")

# name: (layer, shape of its input)
LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (3, 6)),
    "linear-tokens": (lambda: nn.Linear(6, 8, bias=False), (3, 5, 6)),
    "conv": (lambda: nn.Conv2d(5, 6, 3, padding=1), (3, 5, 7, 7)),
    "conv-1x1": (lambda: nn.Conv2d(5, 6, 1, bias=False), (3, 5, 7, 7)),
    "conv-strided": (lambda: nn.Conv2d(5, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (3, 5, 7, 7)),
    "conv-same": (lambda: nn.Conv2d(5, 6, 3, padding="same"), (3, 5, 7, 7)),
    "conv-grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (3, 4, 7, 7)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

over_layers = pytest.mark.parametrize("name", LAYERS)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
over_twins = pytest.mark.parametrize("variational", [True, False], ids=["variational", "deterministic"])


class Tiny(nn.Module):
    """The target layer and a parameter that no adapter may touch."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.layer(x) * self.gain


def base_and_input(name, dtype=torch.float32):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    return Tiny(make()).to(dtype), torch.randn(shape).to(dtype)


def wrap(base, trained=True, **options):
    """(PeftModel, its one adapted layer); ``trained`` gives it a random mean and random deviations."""
    model = get_peft_model(base, VDUConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["layer"], **options}))
    layer = model.base_model.model.layer
    if trained:
        nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
        for log_std in layer.lora_log_std.values():
            nn.init.normal_(log_std, mean=-1, std=0.3)
    return model, layer


def dense_factors(layer):
    """(M, ln S or None, A), float64, as (groups, rows, columns), from the stored parameters and nothing else."""
    base = layer.base_layer
    groups = base.groups if isinstance(base, nn.Conv2d) else 1

    def split(weight):
        return weight.detach().double().reshape(groups, weight.shape[0] // groups, -1)

    log_std = layer.lora_log_std.get("default")
    mean, lora_A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    return split(mean), None if log_std is None else split(log_std), split(lora_A)


def dense_delta(layer):
    """s M A in the shape of a convolution over all input channels: (out, in, ...), float64."""
    mean, _, lora_A = dense_factors(layer)
    return (2.0 * mean @ lora_A).reshape(-1, *layer.lora_A["default"].weight.shape[1:])  # s = 8 / 4


def apply(base, weight, x):
    """The product of a layer with a full weight, without bias, float64."""
    if isinstance(base, nn.Linear):
        return F.linear(x.double(), weight)
    return F.conv2d(x.double(), weight, stride=base.stride, padding=base.padding)


def full_weight(base):
    """The weight over all input channels, float64: block diagonal for a grouped convolution."""
    weight = base.weight.detach().double()
    groups = getattr(base, "groups", 1)
    if groups == 1:
        return weight
    full = weight.new_zeros(weight.shape[0], weight.shape[1] * groups, *weight.shape[2:])
    for g, (rows, block) in enumerate(zip(full.chunk(groups), weight.chunk(groups), strict=True)):
        rows[:, g * weight.shape[1] : (g + 1) * weight.shape[1]] = block
    return full


def roundoff(layer, x):
    """Bound on the rounding error of an output element.

    A float32 dot product of K terms is off by at most K eps Σ|w||x|; the weights, the base output, the
    sum and the result are each rounded once to the base's dtype.
    """
    base = layer.base_layer
    mean, _, lora_A = dense_factors(layer)
    delta = (2.0 * mean.abs() @ lora_A.abs()).reshape(dense_delta(layer).shape)
    size = apply(base, full_weight(base).abs() + delta, x.abs()) + 1  # biases are below 1
    terms = base.weight[0].numel() * getattr(base, "groups", 1) + mean.shape[-1]
    return (terms * torch.finfo(torch.float32).eps + 4 * torch.finfo(x.dtype).eps) * size


def assert_within(actual, expected, bound):
    assert actual.shape == expected.shape
    excess = ((actual.double() - expected.double()).abs() / bound).max().item()
    assert excess <= 1, f"{excess} times the rounding error"


@over_layers
@over_dtypes
@over_twins
def test_a_fresh_adapter_is_the_base(name, dtype, variational):
    base, x = base_and_input(name, dtype)
    expected = base(x)
    model, _ = wrap(base, trained=False, variational=variational)
    assert torch.equal(model(x), expected)


@over_layers
@over_dtypes
def test_the_base_is_there_when_the_adapter_is_off(name, dtype):
    """Bit for bit, and without noise."""
    base, x = base_and_input(name, dtype)
    expected = base(x)
    model, _ = wrap(base)
    with posterior_noise(model), model.disable_adapter():
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)


@over_layers
@over_dtypes
@over_twins
def test_forward_is_that_of_the_dense_mean(name, dtype, variational):
    base, x = base_and_input(name, dtype)
    model, layer = wrap(base, variational=variational)
    expected = apply(layer.base_layer, full_weight(layer.base_layer) + dense_delta(layer), x)
    if layer.base_layer.bias is not None:
        bias = layer.base_layer.bias.double()
        expected = expected + (bias if x.ndim != 4 else bias[:, None, None])
    actual = model(x)
    assert actual.dtype == dtype
    assert_within(actual, expected, roundoff(layer, x))
    assert torch.equal(model(x), actual)  # no noise outside the context


@over_layers
@over_dtypes
@over_twins
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_is_unmerged(name, dtype, variational, safe_merge):
    base, x = base_and_input(name, dtype)
    model, layer = wrap(base, variational=variational)
    if "grouped" in name:
        with pytest.raises(NotImplementedError, match="groups > 1"):
            model.merge_adapter(safe_merge=safe_merge)
        return
    weight, expected, bound = layer.base_layer.weight.clone(), model(x), roundoff(layer, x)
    model.merge_adapter(safe_merge=safe_merge)
    # twice: the two forwards that are compared are each within the bound of the exact one
    assert_within(layer.base_layer(x), expected, 2 * bound)
    with posterior_noise(model):
        assert torch.equal(model(x), layer.base_layer(x))
    model.unmerge_adapter()
    # Rounded at the addition, at the subtraction, and the delta once.
    size = weight.double().abs() + 2 * dense_delta(layer).abs()
    assert_within(layer.base_layer.weight, weight, 2 * torch.finfo(dtype).eps * size)
    # The weights have moved by up to two roundings each.
    assert_within(model(x), expected, 3 * bound)


@over_layers
@over_dtypes
@over_twins
@pytest.mark.parametrize("noise", [False, True], ids=["mean", "noise"])
def test_only_the_adapter_learns(name, dtype, variational, noise):
    base, x = base_and_input(name, dtype)
    model, layer = wrap(base, variational=variational)
    parameters = dict(layer.named_parameters())
    names = {n.split(".")[0] for n in parameters if n.startswith("lora_")}
    assert names == {"lora_A", "lora_B", "lora_log_std"} if variational else {"lora_A", "lora_B"}

    torch.manual_seed(0)
    if noise:
        with posterior_noise(model):
            model(x).float().square().sum().backward()
    else:
        model(x).float().square().sum().backward()
    # The mean does not depend on the deviations.
    learning = {"lora_A", "lora_B"} | ({"lora_log_std"} if variational and noise else set())
    for parameter_name, parameter in model.named_parameters():
        adapter = next((n for n in names if f".{n}." in parameter_name), None)
        assert parameter.requires_grad == (adapter is not None), parameter_name
        if adapter is not None:
            assert parameter.dtype == torch.float32
        if adapter in learning:
            assert (parameter.grad != 0).all(), parameter_name
        else:
            assert parameter.grad is None, parameter_name


@over_layers
def test_noise_has_the_moments_of_the_posterior(name):
    """Per output element; the covariance between positions is tested with the posterior."""
    base, x = base_and_input(name)
    model, layer = wrap(base)
    x = x[:1]
    _, log_std, lora_A = dense_factors(layer)
    rows = lora_A.flatten(0, 1).reshape(layer.lora_A["default"].weight.shape)
    hidden = apply(layer.base_layer, rows, x)
    hidden = hidden.movedim(1, -1) if x.ndim == 4 else hidden  # (..., r)
    hidden = hidden.unflatten(-1, (lora_A.shape[0], -1))
    variance = 4 * torch.einsum("...gk,gok->...go", hidden.square(), torch.exp(2 * log_std)).flatten(-2)  # s² = 4
    variance = variance.movedim(-1, 1) if x.ndim == 4 else variance

    torch.manual_seed(0)
    draws = 4000
    with torch.no_grad(), posterior_noise(model):
        samples = model(x.expand(draws, *x.shape[1:])).double()
    with torch.no_grad():
        mean = model(x).double()
    # at most 300 outputs, so 5.5 standard errors is a chance of 2e-5
    assert ((samples.mean(0) - mean).abs() < 5.5 * (variance / draws).sqrt()).all()
    assert ((samples.var(0) - variance).abs() < 5.5 * variance * (2 / draws) ** 0.5).all()


@over_twins
def test_a_deterministic_twin_has_no_noise(variational):
    base, x = base_and_input("conv")
    model, _ = wrap(base, variational=variational)
    with posterior_noise(model):
        assert torch.equal(model(x), model(x)) != variational


@over_dtypes
@pytest.mark.parametrize("name", [n for n, (_, shape) in LAYERS.items() if len(shape) == 4])
def test_channels_last(name, dtype):
    base, x = base_and_input(name, dtype)
    model, layer = wrap(base)
    expected, bound = model(x), roundoff(layer, x)
    model = model.to(memory_format=torch.channels_last)
    assert_within(model(x.to(memory_format=torch.channels_last)), expected, 2 * bound)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_compiled(name):
    """Whole, by the backend that changes no arithmetic."""
    base, x = base_and_input(name)
    model, layer = wrap(base)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    with posterior_noise(model):  # switching the noise on has to compile anew
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x), model(x))
    with torch.no_grad():  # eager takes one pass here, compiled code two
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=0)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("variational", [True, False])
def test_compiled_by_the_default_backend(variational):
    base, x = base_and_input("conv")
    model, layer = wrap(base, variational=variational)
    torch.compiler.reset()
    compiled = torch.compile(model)
    assert_within(compiled(x), model(x), 2 * roundoff(layer, x))


@pytest.fixture
def deltas(monkeypatch):
    """The adapters whose delta weights a forward has made: those of a pass with W + ΔW."""
    made = []

    def spy(of_peft):
        def get_delta_weight(layer, adapter):
            made.append(adapter)
            return of_peft(layer, adapter)

        return get_delta_weight

    for kind in (VariationalLinear, VariationalConv2d):
        monkeypatch.setattr(kind, "get_delta_weight", spy(kind.get_delta_weight))
    return made


# Enough rows that W + ΔW is the cheaper way.
WIDE = {"linear": (9, 6), "linear-tokens": (3, 5, 6)}


@over_layers
@over_twins
def test_inference_is_one_pass_and_gives_the_same(name, variational, deltas):
    base, x = base_and_input(name)
    x = torch.randn(WIDE.get(name, x.shape))
    model, layer = wrap(base, variational=variational, lora_dropout=0.5)
    model.add_adapter("other", VDUConfig(r=2, target_modules=["layer"], variational=variational))
    nn.init.normal_(layer.lora_B["other"].weight, std=0.3)
    model.eval()
    for active in (["default"], ["default", "other"]):
        model.base_model.set_adapter(active)
        expected = model(x)
        assert deltas == []
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)  # sums of another order
        # PEFT has no delta weight of a grouped convolution.
        assert deltas == ([] if "grouped" in name else active)
        deltas.clear()


class LoudLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_inference_takes_two_passes_where_one_would_differ_or_cost_more(deltas):
    def outputs(model, x):
        with torch.no_grad():
            one = model(x)
        assert torch.equal(one, model(x).detach())
        assert deltas == []

    x = torch.randn(9, 6)
    model, layer = wrap(Tiny(nn.Linear(6, 8)), lora_dropout=0.5)
    with torch.no_grad():  # the case that the others vary
        model.eval()(x)
    assert deltas.pop() == "default"
    outputs(model, x[:7])  # fewer rows than outputs
    outputs(wrap(Tiny(LoudLinear(6, 8)))[0], x)
    with torch.autocast("cpu", torch.bfloat16):
        outputs(model, x)
    with torch.no_grad():
        model.train()(x)
        with posterior_noise(model.eval()):
            model(x)
        layer.lora_dropout.train()  # alone, as for a spread of predictions
        model(x)
        layer.lora_dropout.eval()
        assert deltas == []
    calls = []
    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        handle = module.register_forward_hook(lambda *_: calls.append(1))
        outputs(model, x)
        handle.remove()
    assert len(calls) == 6
    forward = layer.base_layer.forward
    layer.base_layer.forward = lambda x: forward(x) + 1  # as accelerate's offloading does
    outputs(model, x)
    del layer.base_layer.forward
    layer.lora_A.bfloat16()
    layer.lora_B.bfloat16()
    outputs(model, x)
    outputs(model.bfloat16(), x.bfloat16())


@over_layers
@over_dtypes
def test_mixed_batch(name, dtype):
    base, x = base_and_input(name, dtype)
    expected = base(x)
    model, layer = wrap(base)
    model.eval()
    bound = roundoff(layer, x)
    adapted = model(x)
    mixed = model(x, adapter_names=["default", "__base__", "default"])
    assert_within(mixed[[0, 2]], adapted[[0, 2]], 2 * bound[[0, 2]])
    assert torch.equal(mixed[1], expected[1])
    assert not torch.equal(adapted[1], expected[1])


@over_layers
@over_twins
def test_kl_is_that_of_the_delta(name, variational):
    """In the space of the delta: its coordinates on an orthonormal basis of the row space of A, row by row."""
    base, _ = base_and_input(name)
    _, layer = wrap(base, variational=variational, prior_scale=0.2)
    prior_std = 0.2 * layer.base_layer.weight.double().square().mean().sqrt()
    mean, log_std, lora_A = dense_factors(layer)
    if variational:
        expected = 0.0
        for m, s, a in zip(mean, log_std.exp(), lora_A, strict=True):
            basis = torch.linalg.qr(a.mT).Q
            coordinates = 2.0 * a @ basis  # of the rows of s A, (r, r)
            covariance = coordinates.mT @ torch.diag_embed(s**2) @ coordinates
            q = MultivariateNormal(m @ coordinates, covariance_matrix=covariance)
            p = MultivariateNormal(torch.zeros_like(m), prior_std**2 * torch.eye(m.shape[-1], dtype=m.dtype))
            expected = expected + kl_divergence(q, p).sum()
        noise = (4.0 * torch.exp(2 * log_std) @ lora_A.square()).sum()
        snr = dense_delta(layer).square().sum() / noise
        assert layer.signal_to_noise("default") == pytest.approx(snr.item(), rel=1e-5)
    else:
        expected = dense_delta(layer).square().sum() / (2 * prior_std**2)
        assert layer.signal_to_noise("default") is None
    # float32 against float64, a few hundred terms
    torch.testing.assert_close(layer.kl("default").double(), expected.detach(), rtol=1e-5, atol=0)
    norm = (dense_delta(layer).norm() / layer.base_layer.weight.double().norm()).item()
    assert layer.delta_norm("default") == pytest.approx(norm, rel=1e-5)


@over_layers
@pytest.mark.parametrize("lora_alpha", [1, 8])
def test_deviations_start_at_init_scale(name, lora_alpha):
    """Each rank component alone spreads a row of the delta by init_scale x RMS(W)."""
    base, _ = base_and_input(name)
    _, layer = wrap(base, trained=False, init_scale=0.05, lora_alpha=lora_alpha)
    _, log_std, lora_A = dense_factors(layer)
    spread = log_std.exp() * (lora_alpha / 4 * lora_A).norm(dim=-1)[:, None]
    expected = 0.05 * layer.base_layer.weight.double().square().mean().sqrt()
    torch.testing.assert_close(spread, expected.expand_as(spread), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_a_base_of_zeros_has_the_scale_of_its_fan_in(name):
    base, _ = base_and_input(name)
    nn.init.zeros_(base.layer.weight)
    fan_in = base.layer.weight[0].numel()
    _, layer = wrap(base, prior_scale=0.1)
    assert layer.prior_std["default"] == pytest.approx(0.1 / fan_in**0.5)
    assert layer.kl("default").isfinite()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite_is_refused(value):
    base, _ = base_and_input("linear")
    with torch.no_grad():
        base.layer.weight[0, 0] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        wrap(base)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding": 1, "padding_mode": "circular"}], ids=str)
def test_convolutions_that_peft_would_get_wrong_are_refused(options):
    with pytest.raises(ValueError, match=r"dilation .* not supported by PEFT; leave the layer out"):
        wrap(Tiny(nn.Conv2d(4, 6, 3, **options)))


@pytest.mark.parametrize("layer", [nn.Linear(3, 8), nn.Conv2d(3, 8, 1)], ids=["linear", "conv"])
def test_a_rank_above_the_inputs_has_no_kl(layer):
    """A (4 x 3) has no full row rank."""
    with pytest.raises(ValueError, match="rank 4 exceeds the 3 inputs"):
        wrap(Tiny(layer))[1].kl("default")
    assert wrap(Tiny(layer), variational=False)[1].kl("default") > 0  # needs no determinant


@pytest.mark.parametrize(
    ("name", "ours", "theirs"), [("linear", VariationalLinear, lora.Linear), ("conv", VariationalConv2d, lora.Conv2d)]
)
def test_peft_still_calls_us(name, ours, theirs):
    """The seam: were PEFT to rename its hooks, adapters would become plain LoRA without an error."""
    base, x = base_and_input(name)
    model, layer = wrap(base)
    assert type(layer) is ours
    assert isinstance(layer, theirs)
    assert isinstance(layer.lora_variant["default"], GaussianVariant)
    trainable = {n.split("layer.")[1] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A.default.weight", "lora_B.default.weight", "lora_log_std.default"}
    stored = {n.split("layer.")[1] for n in get_peft_model_state_dict(model)}
    assert stored == {"lora_A.weight", "lora_B.weight", "lora_log_std"}
    with posterior_noise(model):
        assert not torch.equal(model(x), model(x))
    # A second adapter has its own; deleting takes ours along.
    model.add_adapter("other", model.peft_config["default"])
    assert set(layer.lora_log_std) == {"default", "other"}
    model.delete_adapter("other")
    assert set(layer.lora_log_std) == {"default"}
    assert type(model.merge_and_unload().layer) is type(LAYERS[name][0]())
