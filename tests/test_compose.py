"""The product of posteriors against the densities that it multiplies, and composed adapters against their parts."""

import pytest
import torch
from conftest import saved_adapter, tiny_unet
from peft import PeftModel
from torch import nn
from torch.distributions import MultivariateNormal

from vdu_peft import adapter
from vdu_peft.adapter import load_adapter, save_adapter, variational_layers
from vdu_peft.atomic_folder import FolderError
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


def level_log_precision(factors):
    """How certain a part is in all: log of the geometric mean of its precisions in the delta's own directions."""
    gram = factors.lora_A @ factors.lora_A.mT
    return (-2 * factors.log_std).mean() - torch.linalg.slogdet(gram).logabsdet.mean() / factors.lora_A.shape[-2]


def at_level(factors, log_precision=3.0):
    return factors._replace(log_std=factors.log_std + (level_log_precision(factors) - log_precision) / 2)


def varied(factors, seed):
    """With an uncertainty of its own for every element."""
    spread = 0.5 * torch.randn(factors.log_std.shape, generator=torch.Generator().manual_seed(seed)).double()
    return factors._replace(log_std=factors.log_std + spread)


def delta_of(factors):
    return factors.mean @ factors.lora_A


def test_product_is_the_product_of_the_densities():
    """With full row rank all densities are proper: log q - (log q1 + log q2 - log q0) is the same everywhere."""
    parts = [at_level(varied(random_factors(4, 4, seed=seed), seed)) for seed in (1, 2)]
    composed, discarded = posterior_product(parts, SIGMA, rank=4)
    for row in range(3):
        densities = [row_density(part, row) for part in parts]
        shared = sum(d.precision_matrix for d in densities) / 2
        points = torch.randn(20, 4).double()
        expected = sum(d.log_prob(points) for d in densities)
        expected -= MultivariateNormal(torch.zeros(4).double(), precision_matrix=shared).log_prob(points)
        covariance = shared.inverse()
        mean = covariance @ sum(d.precision_matrix @ d.mean for d in densities)
        difference = MultivariateNormal(mean, covariance).log_prob(points) - expected
        torch.testing.assert_close(difference, difference[:1].expand(20))
        # The composed factors carry that mean, and that covariance's diagonal in their own row basis.
        A = composed.lora_A[0]
        torch.testing.assert_close(composed.mean[0, row] @ A, mean)
        torch.testing.assert_close((2 * composed.log_std[0, row]).exp(), (A @ covariance @ A.T).diagonal())
    assert discarded == 0


def test_one_adapter_is_itself_and_disjoint_row_spaces_add():
    part, other = varied(random_factors(2, 6), 1), varied(random_factors(3, 6, seed=5), 2)
    composed, _ = posterior_product([part], SIGMA, rank=2)
    torch.testing.assert_close(delta_of(composed), delta_of(part))
    basis = torch.linalg.qr(torch.randn(6, 6).double()).Q
    first, second = (f._replace(lora_A=a) for f, a in ((part, basis[None, :2]), (other, basis[None, 2:5])))
    composed, _ = posterior_product([first, second], SIGMA, rank=5)
    torch.testing.assert_close(delta_of(composed), delta_of(first) + delta_of(second))


@pytest.mark.parametrize("apart", (1.0, 1e-3, 0.0))
def test_equally_certain_adapters_add_however_near_their_row_spaces_lie(apart):
    parts = []
    for rank, seed in ((2, 1), (3, 2), (2, 3)):
        directions = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
        own = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)).double()
        orthonormal = torch.linalg.qr(directions + apart * own).Q.mT[None, :rank]
        parts.append(random_factors(rank, 6, seed=seed)._replace(lora_A=orthonormal))
        parts[-1] = parts[-1]._replace(log_std=torch.full_like(parts[-1].mean, -2.0))
    composed, _ = posterior_product(parts, SIGMA, rank=6)
    torch.testing.assert_close(delta_of(composed), sum(map(delta_of, parts)))
    if apart == 0.0:  # three directions are reached, by two adapters or all three, and the other three by none
        stds = composed.log_std[0].exp().sort(dim=-1).values
        torch.testing.assert_close(stds[:, :3], torch.full((3, 3), torch.tensor(-2.0).exp().item()).double())
        torch.testing.assert_close(stds[:, 3:], torch.full((3, 3), SIGMA).double())


def test_how_certain_an_adapter_is_in_all_moves_no_mean():
    """Posteriors of another kl_weight, or of a run cut short, are wider throughout."""
    parts = [varied(random_factors(2, 6, seed=seed), seed) for seed in (1, 2)]
    composed, _ = posterior_product(parts, SIGMA, rank=4)
    wider, _ = posterior_product([parts[0], parts[1]._replace(log_std=parts[1].log_std + 1)], SIGMA, rank=4)
    torch.testing.assert_close(delta_of(wider), delta_of(composed))
    # The geometric mean of both adapters' widths: half of the one that is e times as wide.
    torch.testing.assert_close(wider.log_std, composed.log_std + 0.5)


def test_the_more_certain_adapter_counts_for_more_in_a_direction():
    first, second = (at_level(varied(random_factors(2, 6, seed=seed), seed)) for seed in (1, 2))
    second = at_level(second._replace(lora_A=first.lora_A))
    composed, _ = posterior_product([first, second], SIGMA, rank=2)
    # In one row space with one A, the rows of B are independent coordinates.
    precisions = [(-2 * part.log_std).exp() for part in (first, second)]
    expected = sum(p * part.mean for p, part in zip(precisions, (first, second), strict=True)) / (sum(precisions) / 2)
    torch.testing.assert_close(delta_of(composed), expected @ first.lora_A)


def test_the_cut_is_the_best_of_its_rank_and_reports_what_it_discards():
    parts = [random_factors(3, 8, rows=6, seed=s) for s in (1, 2)]
    whole, none = posterior_product(parts, SIGMA, rank=6)
    cut, discarded = posterior_product(parts, SIGMA, rank=2)
    delta, approximation = delta_of(whole), delta_of(cut)
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
        torch.testing.assert_close(merged_delta(layer), delta_of(expected), atol=1e-6, rtol=1e-4)
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
        discarded = compose(base(), folders, tmp_path / "both", rank=rank, overwrite=True)
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
        torch.testing.assert_close(delta_of(composed), delta_of(product), atol=1e-6, rtol=1e-4)


def test_a_failure_leaves_the_model_as_it_was(tmp_path):
    a, b = saved_adapter(tmp_path / "a", 1), saved_adapter(tmp_path / "b", 2)
    model = tiny_unet()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FolderError, match="file is a file, not a folder; choose another output_dir"):
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
    with pytest.raises(ConfigError, match="an adapter is named twice"):
        compose(tiny_unet(), [a, tmp_path / "out" / ".." / "a"], tmp_path / "out")
    with pytest.raises(ConfigError, match="rank must be at least 1"):
        compose(tiny_unet(), [a, tmp_path / "other"], tmp_path / "out", rank=0)
    with pytest.raises(ConfigError, match="prior_scale 0.2, but 0.1 in"):
        compose(tiny_unet(), [a, saved_adapter(tmp_path / "b", 2, prior_scale=0.2)], tmp_path / "out")
    with pytest.raises(ConfigError, match="is deterministic"):
        compose(tiny_unet(), [a, saved_adapter(tmp_path / "c", 2, variational=False)], tmp_path / "out")
    with pytest.raises(FolderError, match="out: would be replaced, and .*b is in it"):
        compose(tiny_unet(), [a, saved_adapter(tmp_path / "out" / "b", 2)], tmp_path / "out")
    with pytest.raises(FolderError, match="out: exists and is not empty"):
        compose(tiny_unet(), [a, tmp_path / "b"], tmp_path / "out")
    with pytest.raises(FolderError, match="out: holds something else than an adapter"):
        compose(tiny_unet(), [a, tmp_path / "b"], tmp_path / "out", overwrite=True)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["b"]
