"""Orthogonalised steps, compared with the singular value decomposition and with torch.optim.Muon."""

import math

import pytest
import torch
from torch import Tensor, nn

from layerwise import devices
from layerwise.probes import Tuned
from layerwise.probes.orthogonal import (
    Orthogonalised,
    orthogonalise,
    orthogonalise_by_eigh,
    orthogonalise_by_products,
)
from layerwise.probes.separate import SeparateProbes
from layerwise.probes.stacked import StackedProbes
from layerwise.probes.training import compute_parameter_sizes

MUON = ((3.4445, -4.7750, 2.0315),) * 5  # the coefficients of torch.optim.Muon


def make_matrices(P: int, m: int, n: int, least: float = 0.01) -> Tensor:
    """Return random float64 matrices (P, m, n), whose singular values decrease from 1 to `least`."""
    torch.manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(P, m, n).double(), full_matrices=False)
    return U * torch.logspace(0, math.log10(least), min(m, n), dtype=torch.float64) @ V


def compute_polar(G: Tensor) -> Tensor:
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    return U @ V


@pytest.mark.parametrize("shape", [(20, 70), (70, 20), (30, 30)])
def test_all_singular_values_become_the_square_root_of_the_longer_side(shape):
    G = make_matrices(3, *shape)
    torch.testing.assert_close(orthogonalise(G), compute_polar(G) * max(shape) ** 0.5, rtol=1e-9, atol=1e-9)
    rms = orthogonalise(G.float()).square().mean((1, 2)).sqrt()
    torch.testing.assert_close(rms, torch.ones(3), rtol=1e-4, atol=1e-4)


def test_the_size_of_a_step_is_that_of_its_own_columns_that_are_not_zero():
    """As if the columns of zeros were not there, also beside a matrix that has more columns."""
    G = make_matrices(2, 20, 70)
    G[0, :, 30:] = 0
    expected = compute_polar(G[0, :, :30]) * 30**0.5
    for step in (orthogonalise(G)[0], orthogonalise(G[:1])[0]):
        torch.testing.assert_close(step[:, :30], expected, rtol=1e-9, atol=1e-9)
        assert not step[:, 30:].any()
    few = torch.zeros(1, 20, 70).double()
    few[..., :5] = G[0, :, :5]
    torch.testing.assert_close(orthogonalise(few)[0, :, :5], compute_polar(G[0, :, :5]) * 20**0.5, rtol=1e-6, atol=1e-6)


def test_tiny_directions_are_not_raised_to_noise():
    """A direction below 3e-4 of the largest is rounding in X X^T."""
    G = make_matrices(1, 20, 70, least=1e-9)
    S = torch.linalg.svdvals(orthogonalise_by_eigh(G.float()))[0]
    assert S.max() < 1.1
    assert S[0] == pytest.approx(1, rel=1e-3)
    assert S[-1] < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_denormal_and_nan_gradients_affect_their_own_matrix_alone(dtype):
    G = make_matrices(5, 16, 40).to(dtype)
    expected = orthogonalise(G[4:])[0]
    G[0] = 0
    G[1] = torch.finfo(dtype).smallest_normal / 8
    g = torch.Generator().manual_seed(99)  # rows of dead units, whose momentum decays; eigh failed for these in float32
    G[2] = torch.randn(16, 40, generator=g) * 10.0 ** (-40 * torch.rand(16, 1, generator=g))
    G[3, 0, 0] = math.nan
    steps = orthogonalise(G)
    assert not steps[0].any()
    assert steps[1:3].isfinite().all()
    assert steps[3].isnan().any()
    torch.testing.assert_close(steps[4], expected)
    assert not orthogonalise(torch.zeros(2, 16, 40, dtype=dtype)).any()


def test_products_replace_a_decomposition_that_does_not_converge(monkeypatch):
    def fail(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("The algorithm failed to converge")

    G = 1e-12 * make_matrices(2, 16, 40)
    expected = orthogonalise_by_eigh(G)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    assert torch.linalg.matrix_norm(orthogonalise_by_eigh(G) - expected).max() / 16**0.5 < 0.17


@pytest.mark.parametrize("is_bfloat16", [False, True])
def test_products_are_close_to_the_polar_factor(is_bfloat16, monkeypatch):
    """The singular values of these matrices, relative to their norm, are between 0.003 and 0.3."""
    monkeypatch.setattr(devices, "has_bfloat16", lambda _: is_bfloat16)
    G = make_matrices(3, 30, 100).float()
    expected, found = orthogonalise_by_eigh(G), orthogonalise_by_products(G)
    assert found.dtype == torch.float32
    assert torch.linalg.matrix_norm(found - expected).max() / 30**0.5 < 0.17
    S = torch.linalg.svdvals(found)
    assert 0.84 < S.min() < S.max() < 1.13
    assert not orthogonalise_by_products(torch.zeros(1, 16, 20)).any()
    for scale in (1e-20, 1e-24, 1e-30, 1e-37, 1e25):  # gradients of solved probes underflow
        S = torch.linalg.svdvals(orthogonalise_by_products(scale * torch.randn(2, 16, 40)))
        assert 0.84 < S.min() < S.max() < 1.13


def test_products_with_the_coefficients_of_muon_are_those_of_muon(monkeypatch):
    monkeypatch.setattr(devices, "has_bfloat16", lambda _: True)
    for shape in ((20, 70), (70, 20)):
        G = make_matrices(1, *shape)[0].float()
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = G.clone()
        options = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
        torch.optim.Muon([weight], **options).step()  # multiplies by sqrt(max(1, m / n))
        expected = -weight.detach() / max(1, shape[0] / shape[1]) ** 0.5
        wide = G if shape[0] < shape[1] else G.T
        found = orthogonalise_by_products(wide[None], MUON)[0]
        found = found if shape[0] < shape[1] else found.T
        torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-7)  # of bfloat16, by the order of sums


def test_steps_have_nesterov_momentum():
    weight = nn.Parameter(torch.zeros(4, 3, 2, 2).double().to(memory_format=torch.channels_last))
    unused = nn.Parameter(torch.zeros(4, 3))
    groups = [{"params": [weight], "lr": 0.1}, {"params": [unused], "lr": 0.1}]
    optimizer = Orthogonalised(groups, momentum=0.8, stacked=False)
    grads, momentum, expected = torch.randn(5, 4, 12).double(), torch.zeros(4, 12).double(), torch.zeros(4, 12).double()
    for grad in grads:
        weight.grad = grad.view_as(weight).clone(memory_format=torch.channels_last)
        optimizer.step()
        momentum = 0.8 * momentum + grad
        expected -= 0.1 * 12**0.5 * compute_polar(grad + 0.8 * momentum)
    torch.testing.assert_close(weight.detach().flatten(1), expected)
    assert not unused.any()  # it has no gradient


def test_wide_matrices_but_the_last_take_orthogonalised_steps():
    """All others take steps of Adam: narrow matrices, the scale of a channel, norms, biases and the last matrix."""
    wide = [nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16, 15), nn.Linear(15, 300)]
    probe = nn.Sequential(*wide, nn.Linear(300, 20), nn.Linear(20, 16))
    probe[1].gain = nn.Parameter(torch.ones(16, 1, 1))
    sizes = compute_parameter_sizes(probe)
    group = SeparateProbes({0: [probe]}, {0: torch.zeros(4, 16, 3, 3).__getitem__}, torch.zeros(1, 4).long(), {0: [0]})
    orthogonal, adam = Tuned(10, rate=0.3).make_optimizers(group, sizes)
    assert isinstance(orthogonal, Orthogonalised)
    names = {p: name for name, p in probe.named_parameters()}
    rates = [{names[g["params"][0]]: g["rate"] for g in each.param_groups} for each in (orthogonal, adam)]
    assert rates[0] == pytest.approx({name: 0.3 * 0.45 * sizes[name] for name in ("0.weight", "5.weight")})
    expected = {name: 0.3 * sizes[name] for name in names.values() if name not in rates[0]}
    expected["6.weight"] = 0.3 * sizes["6.weight"]
    assert rates[1] == pytest.approx(expected)
    (only,) = Tuned(10).make_optimizers(
        StackedProbes({0: [nn.Sequential(nn.Linear(400, 3))]}, {}, torch.zeros(1, 4).long(), {0: [0]}),
        {"0.weight": 1.0, "0.bias": 1.0},
    )
    assert [g["rate"] for g in only.param_groups] == pytest.approx([0.2 * (256 / 400) ** 0.75, 0.2])


def test_only_mlps_with_a_narrow_hidden_layer_have_several_starts():
    def count(*layers: nn.Module) -> int:
        return Tuned(10).count_starts(nn.Sequential(*layers))

    assert count(nn.Linear(12, 15), nn.Tanh(), nn.Linear(15, 2)) == 8
    assert count(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 2)) == 1  # few inputs do not matter
    assert count(nn.Linear(99, 40), nn.Linear(40, 15), nn.Linear(15, 40), nn.Linear(40, 2)) == 8
    assert count(nn.Linear(99, 2)) == 1
    assert count(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2)) == 1
