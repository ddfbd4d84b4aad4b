"""The product of posteriors against the densities that it multiplies, and composed adapters against their parts."""

import pytest
import torch
from conftest import saved_adapter, tiny_unet
from peft import PeftModel
from torch import nn
from torch.distributions import MultivariateNormal

from vdu_peft import adapter
from vdu_peft.adapter import AdapterError, load_adapter, save_adapter, variational_layers
from vdu_peft.card import model_card
from vdu_peft.compose import Factors, compose, posterior_product
from vdu_peft.config import ConfigError, VDUConfig

SIGMA = 0.7


def random_factors(rank, columns, rows=3, seed=0, std=0.3):
    generator = torch.Generator().manual_seed(seed)
    mean, lora_A = (torch.randn(1, n, m, generator=generator).double() for n, m in ((rows, rank), (rank, columns)))
    return Factors(mean, torch.full_like(mean, std).log() - lora_A.norm(dim=-1).log().unsqueeze(-2), lora_A)


def row_density(factors, row):
    """q over one row of the delta; proper where the row space is all of it."""
    mean, log_std, lora_A = (t[0] for t in factors)
    covariance = lora_A.T @ torch.diag((2 * log_std[row]).exp()) @ lora_A
    return MultivariateNormal(mean[row] @ lora_A, covariance)


def test_product_is_the_product_of_the_densities():
    """With full row rank all densities are proper: log q12 - (log q1 + log q2 - log p) is the same everywhere."""
    parts = [random_factors(4, 4, seed=1, std=0.1), random_factors(4, 4, seed=2, std=0.1)]
    composed, discarded = posterior_product(parts, SIGMA, rank=4)
    prior = MultivariateNormal(torch.zeros(4).double(), SIGMA**2 * torch.eye(4).double())
    for row in range(3):
        quotients = [row_density(part, row).covariance_matrix.inverse() - prior.precision_matrix for part in parts]
        assert all(torch.linalg.eigvalsh(q).min() > 0 for q in quotients)  # else directions would be left out
        points = torch.randn(20, 4).double()
        expected = sum(row_density(part, row).log_prob(points) for part in parts) - prior.log_prob(points)
        precision = sum(row_density(part, row).precision_matrix for part in parts) - prior.precision_matrix
        covariance = precision.inverse()
        mean = covariance @ sum(row_density(p, row).precision_matrix @ row_density(p, row).mean for p in parts)
        difference = MultivariateNormal(mean, covariance).log_prob(points) - expected
        torch.testing.assert_close(difference, difference[:1].expand(20))
        # The composed factors carry that mean, and that covariance's diagonal in their own row basis.
        A = composed.lora_A[0]
        torch.testing.assert_close(composed.mean[0, row] @ A, mean)
        torch.testing.assert_close((2 * composed.log_std[0, row]).exp(), (A @ covariance @ A.T).diagonal())
    assert discarded == 0


def test_one_adapter_is_itself_and_disjoint_row_spaces_add():
    part = random_factors(2, 6)
    composed, _ = posterior_product([part], SIGMA, rank=2)
    torch.testing.assert_close(composed.mean @ composed.lora_A, part.mean @ part.lora_A)
    other = random_factors(3, 6, seed=5)
    basis = torch.linalg.qr(torch.randn(6, 6).double()).Q
    first, second = (f._replace(lora_A=a) for f, a in ((part, basis[None, :2]), (other, basis[None, 2:5])))
    first, second = (f._replace(log_std=torch.full_like(f.mean, -2.0)) for f in (first, second))
    composed, _ = posterior_product([first, second], SIGMA, rank=5)
    expected = first.mean @ first.lora_A + second.mean @ second.lora_A
    torch.testing.assert_close(composed.mean @ composed.lora_A, expected)


def test_the_more_certain_adapter_counts_for_more_and_an_ignorant_one_for_nothing():
    sure, unsure = random_factors(2, 6, seed=1), random_factors(2, 6, seed=2)
    unsure = unsure._replace(lora_A=sure.lora_A)
    for log_std, close_to in ((-3.0, 0.5), (5.0, 1.0)):  # as certain as the other; less certain than the prior
        parts = [sure._replace(log_std=sure.log_std * 0 - 3.0), unsure._replace(log_std=unsure.log_std * 0 + log_std)]
        composed, _ = posterior_product(parts, prior_std=100.0, rank=2)
        expected = close_to * sure.mean + (1 - close_to) * unsure.mean
        torch.testing.assert_close(composed.mean @ composed.lora_A, expected @ sure.lora_A, atol=1e-5, rtol=1e-5)


def test_the_cut_is_the_best_of_its_rank_and_reports_what_it_discards():
    parts = [random_factors(3, 8, rows=6, seed=s) for s in (1, 2)]
    whole, none = posterior_product(parts, SIGMA, rank=6)
    cut, discarded = posterior_product(parts, SIGMA, rank=2)
    delta, approximation = whole.mean @ whole.lora_A, cut.mean @ cut.lora_A
    values = torch.linalg.svdvals(delta[0])
    assert none == 0 and 0 < discarded < 1
    assert discarded == pytest.approx(((values[2:] ** 2).sum() / (values**2).sum()).item())
    assert discarded == pytest.approx(((delta - approximation).square().sum() / delta.square().sum()).item())
    torch.testing.assert_close(cut.lora_A[0] @ cut.lora_A[0].T, torch.eye(2).double())


def layers(folder):
    model = tiny_unet()
    load_adapter(model, folder)
    return dict(variational_layers(model))


def factors_of(layer):
    """The layer's posterior with the scaling inside lora_A."""
    mean, log_std, lora_A = (t.detach().double() for t in layer.factors("default"))
    return Factors(mean, log_std, layer.scaling["default"] * lora_A)


def merged_delta(layer):
    """What PEFT would merge, as (1, out, in)."""
    return layer.get_delta_weight("default").double().flatten(1)[None]


def test_composed_adapter_is_a_plain_lora_of_the_product(tmp_path):
    a, b = saved_adapter(tmp_path / "a", 1, r=2), saved_adapter(tmp_path / "b", 2, r=4, lora_alpha=8)
    for folder, forgotten in ((a, "swords"), (b, "robes")):
        (folder / "README.md").write_text(model_card("adapter", "a base", {"forgotten": forgotten}))
    model = tiny_unet()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert max(compose(model, [a, b], tmp_path / "ab").values()) < 1e-12
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    first, second, both = layers(a), layers(b), layers(tmp_path / "ab")
    assert both.keys() == first.keys() == second.keys()
    for name, layer in both.items():
        parts = [factors_of(first[name]), factors_of(second[name])]
        expected, _ = posterior_product(parts, layer.prior_std["default"], rank=layer.r["default"])
        torch.testing.assert_close(merged_delta(layer), expected.mean @ expected.lora_A, atol=1e-6, rtol=1e-4)
    assert both["conv_in"].r["default"] == 6  # the sum of the ranks
    card = (tmp_path / "ab" / "README.md").read_text()
    assert "| forgotten (adapter 1) | swords |" in card and "| forgotten (adapter 2) | robes |" in card
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 500])
    ours, stock = tiny_unet(), tiny_unet()
    load_adapter(ours, tmp_path / "ab")
    with pytest.warns(UserWarning, match="'init_scale', 'prior_scale', 'variational'"):
        stock = PeftModel.from_pretrained(stock, tmp_path / "ab").eval()
    torch.testing.assert_close(stock(x, t).sample, ours.eval()(x, t).sample, atol=1e-5, rtol=0)


def test_a_layer_with_few_inputs_gets_no_more_directions_than_those(tmp_path):
    a, b = saved_adapter(tmp_path / "a", 1, r=6), saved_adapter(tmp_path / "b", 2, r=6)
    assert max(compose(tiny_unet(), [a, b], tmp_path / "ab").values()) < 1e-12
    composed = layers(tmp_path / "ab")
    assert composed["conv_in"].r["default"] == 9  # 1 channel, 3 x 3
    assert composed["conv_out"].r["default"] == 12 and all(layer.scaling["default"] == 1 for layer in composed.values())


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_grouped_convolutions_and_names_inside_others(tmp_path):
    """Only "0" is adapted, where "1.0" ends in the same name; rank 4 + 4 is 4 for each of two groups."""

    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Sequential(nn.Conv2d(6, 2, 1)))

    for seed in range(2):
        model = adapter.attach(base(), VDUConfig(target_modules=r"0"))
        torch.manual_seed(seed)
        nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
        save_adapter(model, tmp_path / str(seed))
    folders = [tmp_path / "0", tmp_path / "1"]
    for rank, expected in ((None, 8), (4, 4)):
        discarded = compose(base(), folders, tmp_path / "both", rank=rank)
        model = base()
        load_adapter(model, tmp_path / "both")
        ((name, layer),) = variational_layers(model)
        assert name == "0" and layer.r["default"] == expected and discarded.keys() == {"0"}
        parts = []
        for folder in folders:
            part = base()
            load_adapter(part, folder)
            parts.append(factors_of(next(variational_layers(part))[1]))
        product, _ = posterior_product(parts, layer.prior_std["default"], rank=expected // 2)
        composed = factors_of(layer)
        torch.testing.assert_close(composed.mean @ composed.lora_A, product.mean @ product.lora_A, atol=1e-6, rtol=1e-4)


def test_a_failure_leaves_the_model_as_it_was(tmp_path):
    a, b = saved_adapter(tmp_path / "a", 1), saved_adapter(tmp_path / "b", 2)
    model = tiny_unet()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AdapterError, match="cannot be written"):
        compose(model, [a, b], tmp_path / "file" / "ab")
    assert not list(variational_layers(model)) and all(p.requires_grad for p in model.parameters())


def test_a_smaller_rank_is_kept_to(tmp_path):
    a, b = saved_adapter(tmp_path / "a", 1), saved_adapter(tmp_path / "b", 2)
    discarded = compose(tiny_unet(), [a, b], tmp_path / "ab", rank=3)
    assert VDUConfig.from_pretrained(tmp_path / "ab").r == 3 and 0 < max(discarded.values()) < 1


def test_what_has_no_product_is_refused(tmp_path):
    a = saved_adapter(tmp_path / "a", 1)
    with pytest.raises(ConfigError, match="at least two"):
        compose(tiny_unet(), [a], tmp_path / "out")
    with pytest.raises(ConfigError, match="rank must be at least 1"):
        compose(tiny_unet(), [a, a], tmp_path / "out", rank=0)
    with pytest.raises(ConfigError, match="prior_scale 0.2, but 0.1 in"):
        compose(tiny_unet(), [a, saved_adapter(tmp_path / "b", 2, prior_scale=0.2)], tmp_path / "out")
    with pytest.raises(ConfigError, match="is deterministic"):
        compose(tiny_unet(), [a, saved_adapter(tmp_path / "c", 2, variational=False)], tmp_path / "out")
    with pytest.raises(AdapterError, match="out: would be replaced, and .*b is in it"):
        compose(tiny_unet(), [a, saved_adapter(tmp_path / "out" / "b", 2)], tmp_path / "out")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["b"]
