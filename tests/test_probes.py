"""The probes: each fast way to train them is compared with the slow one of tools/references.py."""

import copy
import math
import subprocess
import sys
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

import dib
import models
from layerwise import devices
from layerwise.probes import (
    Task,
    Thesis,
    Tuned,
    count_steps,
    fit,
    group,
    held_out,
    linear,
    separate,
    stacked,
    training,
)
from layerwise.probes.decoders import is_linear, is_mlp, is_norm, list_layers
from layerwise.probes.encodings import compute_group_entropy, group_equal, make_source, make_standardiser
from layerwise.probes.fitting import Fitted, group_splits
from layerwise.probes.group import ProbeGroup
from layerwise.probes.held_out import HeldOut, choose_half, compute_ridge_losses, cross_fit, list_moments
from layerwise.probes.linear import (
    can_fit_linear,
    compute_dual_bound,
    compute_linear_optimum,
    compute_newton_step,
    decompose,
    read_features,
)
from layerwise.probes.orthogonal import Orthogonalised
from layerwise.probes.separate import SeparateProbes, compute_logits_one_by_one
from layerwise.probes.stacked import StackedProbes, compute_stacked_logits, stack_parameters
from layerwise.probes.training import compute_parameter_sizes, find_best_starts
from layerwise.samples import Samples
from layerwise.schema import PROVED
from layerwise.streams import make_seed
from tests.toys import (
    ROOT,
    make_clusters,
    make_conv_net,
    make_mlp,
    make_random_net,
    make_toy_samples,
    make_wide_conv_net,
    make_wide_mlp,
)
from tools.references import (
    compute_gradient_and_hessian,
    compute_newton_optimum,
    cross_fit_alone,
    standardise_encodings,
    train_probe_alone,
    tune_probe_alone,
)

STACKED, ONE_BY_ONE = "compute_stacked_logits", "compute_logits_one_by_one"
SHARED = nn.ReLU()


def make_padding_net() -> nn.Sequential:
    """Build a network of float64 for images (2, 3, 3). Its first layer pads: inputs may be scaled, but not shifted."""
    first = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh())
    return nn.Sequential(first, nn.Flatten(), nn.Linear(27, 3)).double()


def make_batches(N: int, size: int = 40) -> tuple[Tensor, ...]:
    return torch.arange(N).split(size)


def make_group(probes: dict[int, list[nn.Sequential]], *rest) -> ProbeGroup:
    """Group probes as `fit` does."""
    kind = StackedProbes if is_mlp(next(iter(probes.values()))[0]) else SeparateProbes
    return kind(probes, *rest)


def freeze(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """Count the calls of the two functions that compute logits."""
    counter = Counter()
    for module, name in ((stacked, STACKED), (separate, ONE_BY_ONE)):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, f=function: counter.update([name]) or f(*a))
    return counter


# Which decoders are MLPs


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([nn.Linear(3, 3), SHARED, nn.Linear(3, 3), SHARED], False),
        ([nn.Linear(4, 3)], True),
        ([nn.Flatten(), nn.Sequential(nn.Linear(4, 3), nn.ReLU())], True),
        ([nn.Linear(4, 3), nn.Flatten()], False),
        ([nn.Linear(4, 3), nn.BatchNorm1d(3)], False),
        ([nn.Linear(4, 3), nn.Softmax(1)], False),
        ([nn.Linear(4, 3), nn.Dropout()], False),
    ],
)
def test_mlps_are_linear_layers_and_elementwise_functions(layers, expected):
    assert is_mlp(nn.Sequential(*layers)) is expected


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Bounded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


@pytest.mark.parametrize("layer", [Residual(nn.Linear(3, 3), nn.Tanh()), Bounded(3, 3)])
def test_layers_with_an_overridden_forward_make_no_mlp(layer):
    assert not is_mlp(nn.Sequential(layer, nn.Linear(3, 3)))


def test_a_flatten_of_some_dimensions_makes_no_mlp():
    assert not is_mlp(nn.Sequential(nn.Flatten(2), nn.Linear(9, 3)))


def test_an_in_place_layer_before_the_first_linear_layer_makes_no_mlp():
    assert not is_mlp(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)))
    assert not is_mlp(nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(4, 3)))


def test_splits_whose_decoders_are_mlps_are_fitted_together():
    one = dict.fromkeys(range(4), 1)  # start of each split
    assert group_splits(make_mlp(), [0, 1, 2, 3], set(), one) == [("mlp", [0, 1, 2, 3])]
    assert group_splits(make_mlp(), [0, 1, 2, 3], {3}, one) == [("mlp", [0, 1, 2]), ("linear", [3])]
    assert group_splits(make_mlp(), [0, 1, 2, 3], set(), {0: 8, 1: 8, 2: 8, 3: 1}) == [("mlp", [0, 1, 2]), ("mlp", [3])]
    assert group_splits(make_conv_net(), [0, 1, 2], set(), one) == [("other", [0]), ("mlp", [1, 2])]
    assert group_splits(make_conv_net(), [0, 1, 2], {1, 2}, one) == [("other", [0]), ("linear", [1]), ("linear", [2])]
    assert group_splits(make_random_net(), [0, 1, 3], set(), one) == [("other", [0]), ("other", [1]), ("mlp", [3])]
    assert group_splits(freeze(make_mlp()), [0, 3], set(), one) == [("frozen", [0]), ("frozen", [3])]


# Which decoders are linear


def make_linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(8, 3, bias=bias)


def make_half_frozen() -> nn.Linear:
    layer = make_linear()
    freeze(layer.weight)
    return layer


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([make_linear()], True),
        ([make_linear(bias=False)], True),
        ([nn.Flatten(), make_linear()], True),
        ([nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), nn.Sequential(make_linear())], True),
        ([nn.ReLU(), make_linear()], True),
        ([nn.Dropout(), make_linear()], True),
        ([LayerNorm2d(8), nn.Flatten(), make_linear()], True),
        ([nn.LayerNorm(8), make_linear()], True),
        ([nn.BatchNorm1d(8), make_linear()], True),
        ([nn.GroupNorm(2, 8), nn.Flatten(), make_linear()], True),
        ([nn.LayerNorm(8), make_linear(bias=False)], False),
        ([nn.LayerNorm(8, elementwise_affine=False), make_linear(bias=False)], True),
        ([nn.BatchNorm1d(8, affine=False), make_linear(bias=False)], False),
        ([nn.LayerNorm(8), nn.ReLU(), make_linear()], False),
        ([nn.LayerNorm(8), nn.LayerNorm(8), make_linear()], False),
        ([nn.Linear(8, 8), make_linear()], False),
        ([nn.PReLU(), make_linear()], False),
        ([make_half_frozen()], False),
        ([freeze(make_linear())], False),
        ([make_linear(), nn.ReLU()], False),
        ([make_linear(), nn.LogSoftmax(1)], False),
        ([nn.Flatten()], False),
        ([nn.Bilinear(8, 8, 3)], False),
    ],
)
def test_linear_decoders_are_a_linear_layer_after_layers_without_parameters(layers, expected):
    assert is_linear(nn.Sequential(*layers)) is expected


@pytest.mark.parametrize(
    ("name", "last", "before"),
    [
        ("MLP", "hidden5", "hidden4"),
        ("MNISTNet", "hidden1", "conv2"),
        ("CIFARNet", "group3", "group2"),
        ("ResNet", "block8", "block6"),
        ("ConvNeXt", "block18", "block17"),
    ],
)
def test_the_last_split_of_every_architecture_has_a_linear_decoder(name, last, before):
    model = models.build(name, (3, 32, 32), 10)
    splits = models.splits(model, [last, before])
    assert is_linear(model[splits[last] :])
    assert not is_linear(model[splits[before] :])


def test_a_norm_with_a_weight_of_0_is_not_absorbed():
    decoder = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))
    assert is_linear(decoder)
    nn.init.zeros_(decoder[0].weight)
    assert not is_linear(decoder)


def test_the_norm_of_torchvision_is_recognised_without_importing_torchvision():
    assert is_norm(LayerNorm2d(8))
    code = "import sys, dib, nc1; assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_modules_that_programs_without_torch_need_do_not_import_torch():
    code = "import sys, layerwise, layerwise.schema, layerwise.runs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Groups


def test_stacked_probes_compute_the_logits_of_each_probe():
    torch.manual_seed(0)
    probes = [nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False), nn.GELU(), nn.Linear(5, 3)) for _ in range(4)]
    probes = [probe.double() for probe in probes]
    x = torch.randn(7, 3, 2, 2, dtype=torch.float64)
    a, b = compute_stacked_logits({0: probes}, stack_parameters(probes), {0: x}), compute_logits_one_by_one(probes, x)
    assert a.shape == (4, 3, 7)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a[2], probes[2](x).T, rtol=1e-12, atol=1e-12)


def test_a_first_layer_that_works_in_place_does_not_change_the_inputs_of_other_probes():
    probes = [nn.Sequential(nn.ELU(inplace=True), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval() for _ in range(2)]
    x = torch.randn(5, 6)
    expected = [probe(x.clone()).T for probe in probes]
    torch.testing.assert_close(compute_logits_one_by_one(probes, x), torch.stack(expected))


def test_the_first_step_finds_out_whether_probes_draw_random_numbers():
    """Any layer may draw, also a hook."""
    noisy = nn.Sequential(nn.Linear(6, 3))
    noisy.register_forward_hook(lambda probe, _, logits: logits + torch.rand(3) if probe.training else None)
    quiet = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    x, targets = torch.randn(4, 6), torch.tensor([[0, 1, 2, 0]])
    for probe, expected in [(make_random_net().float(), True), (noisy, True), (quiet, False)]:
        probes = SeparateProbes({0: [probe.train()]}, {0: x.__getitem__}, targets, {0: [0]})
        probes.step([torch.optim.SGD(probe.parameters(), lr=0.1)], torch.arange(4))
        assert probes.draws is expected


def test_random_states_are_set_only_for_probes_that_draw_random_numbers(monkeypatch):
    """In the first step, states are set for all probes."""
    calls, set_rng_state = Counter(), torch.set_rng_state
    monkeypatch.setattr(torch, "set_rng_state", lambda state: calls.update(["set"]) or set_rng_state(state))
    samples = make_toy_samples(shape=(1, 5, 5))
    for make_model, J, expected in ((make_conv_net, 2, 2), (make_random_net, 3, 3 * 9)):
        calls.clear()
        x = samples.inputs if make_model is make_conv_net else samples.inputs.flatten(1)[:, :6]
        sources, targets = {0: x.__getitem__}, samples.labels.expand(J, -1)
        probes = SeparateProbes({0: [make_model() for _ in range(J)]}, sources, targets, {0: list(range(J))})
        Thesis(partial(torch.optim.SGD, lr=0.1), 2).train(probes, {}, 30, torch.Generator())  # 6 steps, 3 batches
        assert calls["set"] == expected


def test_selected_probes_are_trained_as_if_they_were_alone():
    torch.manual_seed(0)
    samples, model = make_toy_samples(), make_mlp()
    _, targets = dib.make_labelings(samples.labels, 3, 1, False, 0)
    sources = {k: model[:k](samples.inputs).detach().__getitem__ for k in (0, 2)}
    starts = {k: [make_mlp()[k:] for _ in range(4)] for k in (0, 2)}
    learns = {0: [0, 0, 1, 1], 2: [2, 2, 0, 0]}
    rows = torch.tensor([1, 2, 4, 7])  # of the eight

    def make(chosen: dict[int, list[int]]) -> tuple[StackedProbes, list[torch.optim.Optimizer]]:
        probes = {k: [copy.deepcopy(starts[k][i]) for i in chosen[k]] for k in chosen}
        made = StackedProbes(probes, sources, targets, {k: [learns[k][i] for i in chosen[k]] for k in chosen})
        param_groups = [{"params": p, "lr": 0.01 * i} for i, p in enumerate(made.parameters().values(), 1)]
        return made, [torch.optim.Adam(param_groups[1:]), Orthogonalised(param_groups[:1], 0.8, stacked=True)]

    probes, optimizers = make({k: [0, 1, 2, 3] for k in starts})
    alone, optimizers_alone = make({0: [1, 2], 2: [0, 3]})
    for i in range(12):
        if i == 5:
            probes.select_rows(rows, optimizers)
        indices = torch.randperm(len(samples))[:30]
        losses, expected = probes.step(optimizers, indices), alone.step(optimizers_alone, indices)
        torch.testing.assert_close(losses if i >= 5 else losses[rows], expected, rtol=1e-10, atol=1e-10)
    assert {k: len(of_split) for k, of_split in probes.probes.items()} == {0: 2, 2: 2}
    for name, stack in alone.stacks.items():
        torch.testing.assert_close(probes.stacks[name], stack, rtol=1e-10, atol=1e-10)
    losses, expected = probes.compute_final_losses(40), alone.compute_final_losses(40)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10)


def test_statistics_are_those_of_the_final_weights():
    torch.manual_seed(0)
    x = 3 * torch.randn(60, 6, dtype=torch.float64) + 1
    layers = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.ReLU(), nn.Linear(5, 4), nn.BatchNorm1d(4)
    probe = nn.Sequential(*layers, nn.Linear(4, 3)).double()
    probe(100 * x)  # running statistics become wrong for x
    state = copy.deepcopy(dict(probe.named_parameters()))
    probes = SeparateProbes({0: [probe]}, {0: x.__getitem__}, torch.randint(3, (1, 60)), {0: [0]})

    def compute_statistics(x: Tensor) -> list[Tensor]:
        """Return mean and variance before each norm, without dropout."""
        first = layers[0](x)
        normal = (first - first.mean(0)) / (first.var(0, correction=0) + layers[1].eps).sqrt()
        second = layers[4](normal.relu())
        return [first.mean(0), first.var(0), second.mean(0), second.var(0)]

    for parts in (torch.arange(60)[None], torch.randperm(60).view(3, 20)):
        probes.recompute_batchnorm_statistics(parts)
        got = [layers[1].running_mean, layers[1].running_var, layers[5].running_mean, layers[5].running_var]
        of_parts = zip(*(compute_statistics(x[part]) for part in parts), strict=True)
        torch.testing.assert_close(got, [torch.stack(values).mean(0) for values in of_parts])
    assert all(torch.equal(p, state[name]) for name, p in probe.named_parameters())
    loss = F.cross_entropy(probe.eval()(x), probes.targets[:, 0])
    assert probes.compute_final_losses(7).item() == pytest.approx(loss.item(), rel=1e-12)


def test_statistics_are_computed_from_every_sample_once(monkeypatch):
    seen = []
    monkeypatch.setattr(
        ProbeGroup, "recompute_batchnorm_statistics", lambda _, batches: seen.extend(torch.cat([*batches]).tolist())
    )
    samples = make_toy_samples(shape=(1, 5, 5))
    dib.measure(make_conv_net(), 0, samples, 3, make_conv_net, probes=Tuned(8), batch_size=40)
    assert sorted(seen) == list(range(90))


def test_final_losses_are_computed_in_eval_mode():
    torch.manual_seed(0)
    samples = make_toy_samples(shape=(1, 5, 5))
    made = [make_conv_net().train() for _ in range(2)]
    probes = SeparateProbes({0: made}, {0: samples.inputs.__getitem__}, samples.labels[None], {0: [0, 0]})
    for size in (1, 40, 90):
        losses = probes.compute_final_losses(size)
        expected = [F.cross_entropy(probe.eval()(samples.inputs), samples.labels).item() for probe in made]
        assert losses.tolist() == pytest.approx(expected, rel=1e-12)


# Thesis


@pytest.mark.parametrize(
    ("make_model", "shape", "splits", "forward"),
    [
        (make_mlp, (6,), [0], STACKED),
        (make_mlp, (6,), [0, 2, 3], STACKED),
        (make_mlp, (2, 3), [1, 3], STACKED),
        (make_conv_net, (1, 5, 5), [0], ONE_BY_ONE),
        (make_conv_net, (1, 5, 5), [1], STACKED),
        (make_random_net, (6,), [0], ONE_BY_ONE),
    ],
)
def test_thesis_probes_trained_together_are_what_each_would_be_alone(make_model, shape, splits, forward, calls):
    """The initial weights and the batches are the same, and all numbers are float64."""
    torch.manual_seed(0)
    samples, model, epochs = make_toy_samples(shape=shape), make_model(), 30
    sgd = partial(torch.optim.SGD, lr=0.1)
    _, targets = dib.make_labelings(samples.labels, 3, 1, False, 0)
    starts = {k: [make_model()[k:].eval() for _ in targets] for k in splits}
    sources = {k: model[:k].eval()(samples.inputs).detach().__getitem__ for k in splits}
    probes = make_group(copy.deepcopy(starts), sources, targets, {k: list(range(len(targets))) for k in splits})
    torch.manual_seed(7)
    losses = Thesis(sgd, epochs).train(probes, {}, 40, torch.Generator().manual_seed(5)).view(len(splits), -1)
    assert set(calls) == {forward}
    for i, k in enumerate(splits):
        for j, probe in enumerate(starts[k]):
            torch.manual_seed(7)
            generator = torch.Generator().manual_seed(5)
            final, _ = train_probe_alone(model[:k], probe, samples.inputs, targets[j], sgd, epochs, 40, generator)
            assert losses[i, j].item() == pytest.approx(final, rel=1e-9)


# Tuned


def fit_and_train_alone(
    make_model, shape, splits, steps, dtype=torch.float64, **options
) -> tuple[Fitted, list[list[float]], list[float]]:
    """Return the results of tuned probes for three labelings, and those of the same probes trained one at a time.

    They are the losses, and the held-out losses of the first labeling.
    """
    torch.manual_seed(0)
    samples, model, tuned = make_toy_samples(shape=shape), make_model().to(dtype).eval(), Tuned(steps)
    samples.inputs = (3 * samples.inputs + 5).to(dtype)
    targets = dib.make_labelings(samples.labels, 3, 1, False, 0)[1][:3]

    def inputs(indices: Tensor) -> Tensor:
        return samples.batch(indices)[0]

    def make_probe(k: int, *words: object) -> nn.Sequential:
        torch.manual_seed(make_seed(k, *words))
        return make_model().to(dtype)[k:]

    def start(*words: object) -> torch.Generator:
        torch.manual_seed(7)
        return torch.Generator().manual_seed(5)

    reference = make_probe(0, "reference").eval()
    other = make_toy_samples(50, shape=shape)
    other.inputs = (3 * other.inputs + 4).to(dtype)
    held_out = HeldOut(other.inputs.__getitem__, other.labels, choose_half(other.labels, 0))
    streams = SimpleNamespace(seed_generators=start)
    task = Task(model, reference, splits, inputs, targets, make_probe, streams, held_out)
    fitted = fit(task, tuned, batch_size=40, cache_bytes=2**30)
    sizes, losses, held_out_losses = compute_parameter_sizes(reference), [], []
    for k in splits:
        with torch.no_grad():
            z, z_other = model[:k](samples.inputs), model[:k](other.inputs)
        first = next(layer for layer in make_probe(k).modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))
        both = standardise_encodings(first, z), standardise_encodings(first, z_other, like=z)
        losses.append([])
        for j, target in enumerate(targets):
            starts = [make_probe(k, "head", j, i) for i in range(tuned.count_starts(make_probe(k)))]
            loss, path = tune_probe_alone(
                *both, starts, target, other.labels, sizes, 0.2, steps, 40, start(), list_moments(steps), **options
            )
            losses[-1].append(loss)
            if j == 0:
                held_out_losses.append(cross_fit_alone(path, held_out.in_first.tolist()))
    return fitted, losses, held_out_losses


@pytest.mark.parametrize(
    ("make_model", "shape", "splits", "steps", "forward", "tolerance"),
    [
        (make_mlp, (6,), [0, 1, 2], 120, STACKED, 1e-9),
        (make_mlp, (2, 3), [1], 8, STACKED, 1e-9),
        (make_conv_net, (1, 5, 5), [0], 120, ONE_BY_ONE, 1e-9),
        (make_padding_net, (2, 3, 3), [0], 50, ONE_BY_ONE, 1e-9),
        (make_random_net, (6,), [0], 120, ONE_BY_ONE, 1e-9),
        # X X^T has the squared condition number of X, which the singular value decomposition of the reference has
        (make_wide_mlp, (6,), [0, 3, 4, 5], 60, STACKED, 1e-6),
        (make_wide_conv_net, (2, 5, 5), [0], 30, ONE_BY_ONE, 1e-6),
    ],
    ids=["MLP", "few steps", "convolutional", "padding", "random", "wide MLP", "wide convolutional"],
)
def test_tuned_probes_are_what_each_would_be_alone(make_model, shape, splits, steps, forward, tolerance, calls):
    fitted, losses, held_out = fit_and_train_alone(make_model, shape, splits, steps)
    assert set(calls) == {forward}
    expected = {"rel": tolerance, "abs": tolerance}
    assert fitted.losses.flatten().tolist() == pytest.approx([x for row in losses for x in row], **expected)
    assert fitted.held_out.tolist() == pytest.approx(held_out, **expected)


@pytest.mark.parametrize(("make_model", "shape", "splits"), [(make_mlp, (6,), [0, 2]), (make_conv_net, (1, 5, 5), [0])])
def test_tuned_probes_in_float32_are_what_each_would_be_alone(make_model, shape, splits, monkeypatch):
    """The first starts are trained to the end: rounding could exchange two starts of nearly the same loss."""

    def find_first(losses: Tensor, starts: int, count: int) -> Tensor:
        return torch.arange(len(losses)).view(-1, starts)[:, :count].flatten()

    monkeypatch.setattr(training, "find_best_starts", find_first)
    options = {"dtype": torch.float32, "find_best": lambda losses, count: list(range(count))}
    fitted, losses, _ = fit_and_train_alone(make_model, shape, splits, 60, **options)
    torch.testing.assert_close(fitted.losses, torch.tensor(losses, dtype=torch.float64), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", range(1, 8))
def test_few_steps_are_enough_or_refused(steps):
    try:
        fitted, *_ = fit_and_train_alone(make_mlp, (6,), [0], steps)
    except ValueError as refusal:
        assert "steps" in str(refusal)  # noqa: PT017
    else:
        assert fitted.losses.isfinite().all()
        assert fitted.held_out.isfinite().all()


def test_the_starts_of_least_loss_are_found_for_each_probe():
    losses = torch.tensor([3.0, 1.0, 2.0, 4.0, 9.0, 9.0, 8.0, math.nan])  # of two probes
    assert find_best_starts(losses, 4, 2).tolist() == [1, 2, 6, 4]
    assert find_best_starts(losses, 4, 1).tolist() == [1, 6]


def test_rates_grow_and_fall():
    factor = Tuned(steps=200).compute_rate_factor  # grows in 20 steps, falls in the last 30
    assert [factor(i) for i in (0, 9, 19, 20, 170)] == pytest.approx([1 / 20, 1 / 2, 1, 1, 1])
    assert [factor(i) for i in (171, 185, 199)] == pytest.approx([29 / 30, 1 / 2, 1 / 30])
    short = Tuned(steps=100).compute_rate_factor  # does not fall
    assert [short(i) for i in (0, 10, 99)] == pytest.approx([1 / 10, 1, 1])


def test_numbers_of_steps_computed_by_hand():
    assert count_steps(30, 614) == 600  # 2 batches an epoch count as 20
    assert count_steps(3, 8000) == 60
    assert count_steps(3, 8001) == 63
    assert count_steps(2, 50_000) == 250


class Scale(nn.Module):
    """Scale channels by a parameter that starts at a constant, as ConvNeXt does."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((4, 1, 1), 1e-6))


def compute_rms(*parameters: Tensor) -> float:
    values = [v for p in parameters for v in p.flatten().tolist()]
    return math.sqrt(sum(v * v for v in values) / len(values))


def test_parameter_sizes_computed_by_hand():
    torch.manual_seed(0)
    linear, narrow, wide = nn.Linear(5, 4), nn.Conv2d(2, 3, 3), nn.Conv2d(64, 4, 3)
    zero_bias, constant = nn.Linear(5, 4), nn.Linear(5, 4, bias=False)
    nn.init.zeros_(zero_bias.bias)
    nn.init.constant_(constant.weight, 0.05)
    model = nn.Sequential(linear, narrow, wide, zero_bias, constant, nn.BatchNorm2d(7), nn.LayerNorm(8), Scale())
    of_linear, of_narrow, of_wide = (compute_rms(layer.weight, layer.bias) for layer in (linear, narrow, wide))
    assert compute_parameter_sizes(model) == pytest.approx(
        {
            "0.weight": of_linear,
            "0.bias": of_linear,
            "1.weight": of_narrow,
            "1.bias": of_narrow,
            "2.weight": of_wide,
            "2.bias": of_wide,
            "3.weight": compute_rms(zero_bias.weight),  # zeros were not drawn at random
            "3.bias": compute_rms(zero_bias.weight),
            "4.weight": 0.05,  # a constant below 0.1
            "5.weight": 0.1,
            "5.bias": 0.1,
            "6.weight": 0.1,
            "6.bias": 0.1,
            "7.scale": 0.01,
        }
    )


def test_parameter_sizes_of_cifarnet():
    """The weights of the classifier have size 1, as the logits are divided by 256."""
    sizes = compute_parameter_sizes(models.build("CIFARNet", (3, 32, 32), 10))
    assert sizes["classifier.1.weight"] == pytest.approx(1, rel=1e-2)
    assert sizes["group1.2.bias"] == 0.01  # the shift of BatchNorm: only zeros


def test_the_size_of_a_parameter_does_not_depend_on_the_layers_before():
    torch.manual_seed(0)
    model = make_mlp()
    sizes, names = compute_parameter_sizes(model), dict(model[2:].named_parameters())
    assert compute_parameter_sizes(model[2:]) == {name: size for name, size in sizes.items() if name in names}


# Both


@pytest.mark.parametrize(("make_model", "shape"), [(make_mlp, (6,)), (make_conv_net, (1, 5, 5))])
@pytest.mark.parametrize("probes", [Thesis(partial(torch.optim.SGD, lr=0.1), 5, bfloat16=True), Tuned(20)])
def test_steps_in_bfloat16_end_with_a_pass_in_float32(make_model, shape, probes, monkeypatch):
    """Steps use bfloat16 on a device that has it. float64 probes stay float64."""
    samples, seen, cross_entropy = make_toy_samples(shape=shape), {True: set(), False: set()}, F.cross_entropy

    def watch(logits: Tensor, *rest, **options) -> Tensor:
        seen[logits.requires_grad].add(logits.dtype)
        return cross_entropy(logits, *rest, **options)

    def measure_losses(dtype: torch.dtype) -> list[float]:
        for dtypes in seen.values():
            dtypes.clear()
        converted, model = Samples(samples.inputs.to(dtype), samples.labels), make_model().to(dtype)
        found = dib.measure(model, 0, converted, 3, lambda: make_model().to(dtype), probes=probes)
        return [probe.loss for probe in found]

    monkeypatch.setattr(group, "F", SimpleNamespace(cross_entropy=watch))
    torch.manual_seed(0)
    expected = measure_losses(torch.float32)
    assert seen == {True: {torch.float32}, False: {torch.float32}}
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: True)
    assert measure_losses(torch.float32) == pytest.approx(expected, abs=0.05)
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}
    measure_losses(torch.float64)
    assert seen == {True: {torch.float64}, False: {torch.float64}}
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    measure_losses(torch.float32)
    assert seen == {True: {torch.float32}, False: {torch.float32}}


@pytest.mark.parametrize("make_model", [make_mlp, make_conv_net])
@pytest.mark.parametrize("probes", [Thesis(partial(torch.optim.SGD, lr=0.1), 2), Tuned(8)])
def test_frozen_parameters_stay_as_constructed(make_model, probes):
    torch.manual_seed(0)
    samples = make_toy_samples(shape=(6,) if make_model is make_mlp else (1, 5, 5))
    made = [make_model() for _ in range(probes.count_starts(make_model()))]
    for probe in made:
        freeze(next(m for m in probe.modules() if isinstance(m, (nn.Linear, nn.Conv2d))))
    before = [copy.deepcopy(dict(probe.named_parameters())) for probe in made]
    of_all = make_group({0: made}, {0: samples.inputs.__getitem__}, samples.labels[None], {0: [0] * len(made)})
    probes.train(of_all, compute_parameter_sizes(made[0]), 40, torch.Generator().manual_seed(0))
    if of_all.is_stacked:
        trained = {name: stack[0] for name, stack in of_all.stacks.items()}
    else:
        trained = dict(made[0].named_parameters())
    for name, p in trained.items():  # of the start that was trained to the end, whichever it is
        assert any(torch.equal(p, own[name]) for own in before) != before[0][name].requires_grad


def test_probes_find_the_classes_of_clusters():
    samples = make_clusters(120, 6, 3, spread=0.05)
    for probes in (Tuned(100), Thesis(partial(torch.optim.Adam, lr=0.05), 60)):
        make_model = partial(models.build, "MLP", (6,), 3, widths=(8,), nonlinearity="Tanh")
        y, *_ = dib.measure(make_model(), 0, samples, 3, make_model, probes=probes, batch_size=40)
        assert y.loss < 0.02


@pytest.mark.parametrize("make_probes", [partial(Tuned, 0), partial(Thesis, torch.optim.SGD, 0)])
def test_less_than_one_step_or_epoch_is_refused(make_probes):
    with pytest.raises(ValueError, match="at least 1"):
        make_probes()


# Standardised encodings


@pytest.mark.parametrize(
    ("layers", "shape", "centred"),
    [
        ([nn.Linear(6, 3)], (6,), True),
        ([nn.Linear(6, 3, bias=False)], (6,), False),
        ([nn.Flatten(), nn.Linear(12, 3)], (3, 2, 2), True),
        ([nn.Flatten(), nn.Linear(12, 3, bias=False)], (3, 2, 2), False),
        ([nn.Sequential(nn.Conv2d(3, 4, 2), nn.Tanh()), nn.Flatten()], (3, 3, 3), True),
        ([nn.Conv2d(3, 4, 2, padding="valid"), nn.Tanh()], (3, 3, 3), True),
        ([nn.Conv2d(3, 4, 2, bias=False), nn.Tanh()], (3, 3, 3), False),
        ([nn.Conv2d(3, 4, 2, padding=1), nn.Tanh()], (3, 3, 3), False),
        ([nn.Conv2d(3, 4, 3, padding="same"), nn.Tanh()], (3, 3, 3), False),
    ],
)
def test_standardised_encodings_do_not_change_the_set_of_functions(layers, shape, centred):
    """Encodings have standard deviation 1 and, if possible, mean 0. Other weights do the same for the inputs."""
    torch.manual_seed(0)
    decoder = nn.Sequential(*layers).double()
    x = torch.randn(50, *shape, dtype=torch.float64) * torch.rand(shape, dtype=torch.float64).mul(10) + 3
    z = make_standardiser(decoder, x.__getitem__, make_batches(50, 20))(x)
    other = copy.deepcopy(decoder)
    layer = next(m for m in other.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    over = (0, 2, 3) if isinstance(layer, nn.Conv2d) else (0,)
    one = torch.ones_like(z.mean(over))
    torch.testing.assert_close(z.std(over, correction=0), one)
    if centred:
        torch.testing.assert_close(z.mean(over), 0 * one)
    a = z.std(over) / x.std(over)  # z = a x + b
    b = z.mean(over) - a * x.mean(over)
    a, b = (v.view(1, -1, *[1] * (layer.weight.dim() - 2)) for v in (a, b))
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias += (layer.weight * b).flatten(1).sum(1)
        layer.weight *= a
        torch.testing.assert_close(other(x), decoder(z))


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.ReLU(), nn.Linear(6, 3)], (6,)),
        ([nn.BatchNorm1d(6), nn.Linear(6, 3)], (6,)),
        ([nn.Dropout(), nn.Linear(6, 3)], (6,)),
        ([freeze(nn.Linear(6, 3)), nn.Linear(3, 3)], (6,)),
        ([freeze(nn.Conv2d(2, 3, 2)), nn.Flatten()], (2, 3, 3)),
        ([nn.Linear(3, 3), nn.Flatten(), nn.Linear(6, 3)], (2, 3)),  # the same weights for both rows
        ([nn.MaxPool2d(2), nn.Conv2d(2, 3, 2)], (2, 4, 4)),
        ([nn.ConvTranspose2d(2, 3, 2)], (2, 3, 3)),
        ([nn.Flatten(2), nn.Linear(9, 3), nn.Flatten(), nn.Linear(6, 3)], (2, 3, 3)),
    ],
)
def test_encodings_of_other_decoders_are_not_standardised(layers, shape):
    encode = torch.randn(20, *shape).__getitem__
    assert isinstance(make_standardiser(nn.Sequential(*layers), encode, make_batches(20)), nn.Identity)


def test_encodings_are_not_standardised_before_a_weight_that_is_used_again():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    encode, decoder = torch.randn(20, 4).__getitem__, nn.Sequential(first, nn.Tanh(), second)
    assert isinstance(make_standardiser(decoder, encode, make_batches(20)), nn.Identity)


def test_encodings_are_only_scaled_before_a_frozen_bias():
    layer, x = nn.Linear(6, 3), torch.randn(20, 6) + 5
    freeze(layer.bias)
    z = make_standardiser(nn.Sequential(layer), x.__getitem__, make_batches(20))(x)
    torch.testing.assert_close(z, x / x.std(0, correction=0))


def test_constant_features_are_not_scaled():
    x = torch.randn(20, 4, dtype=torch.float64)
    x[:, 1], x[:, 2] = 0.1, 0
    for bias in (True, False):
        layer = nn.Linear(4, 3, bias=bias).double()
        z = make_standardiser(nn.Sequential(layer), x.__getitem__, make_batches(20, 7))(x)
        expected = torch.zeros_like(x[:, 1:3]) if bias else x[:, 1:3]
        torch.testing.assert_close(z[:, 1:3], expected, rtol=0, atol=1e-12)


def test_features_far_from_0_are_standardised_in_float32():
    torch.manual_seed(0)
    x = torch.randn(1000, 3) + 1e4
    z = make_standardiser(nn.Sequential(nn.Linear(3, 3)), x.__getitem__, make_batches(1000, 300))(x)
    assert z.dtype == torch.float32
    expected = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
    torch.testing.assert_close(z.double(), expected, rtol=0, atol=4e-3)  # a few roundings of 1e4


# Sources of encodings


def test_cached_encodings_of_images_are_channels_last():
    x = torch.randn(20, 1, 5, 5)
    encode, _ = make_source(nn.Sequential(nn.Conv2d(1, 3, 2)), x.__getitem__, make_batches(20), 2**20)
    assert encode(torch.arange(4)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("cache_bytes", [2**20, 20 * 3 * 4, 20 * 3 * 4 - 1, 0])
def test_encodings_are_computed_once_if_they_fit(cache_bytes):
    blocks, calls, x = nn.Sequential(nn.Linear(5, 3)), [], torch.randn(20, 5)
    blocks[0].register_forward_hook(lambda *_: calls.append(1))
    encode, cached = make_source(blocks, x.__getitem__, make_batches(20, 10), cache_bytes)
    for _ in range(4):
        torch.testing.assert_close(encode(torch.arange(7)), blocks[0](x[:7]).detach())
    fits = cache_bytes >= 20 * 3 * 4
    assert cached == 20 * 3 * 4 * fits
    assert len(calls) == 4 + 1 + (2 if fits else 4)  # of the test, one for the size, then of the batches or the calls


@pytest.mark.parametrize(("both", "cached"), [(True, [True, True]), (False, [True, False])])
def test_the_set_of_the_probes_is_cached_before_the_samples_held_out(both, cached):
    """The encodings of the samples held out are 1, which shows the first layer which set it encodes."""
    rows = [0, 0]

    class Count(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            rows[int(x[0, 0] == 1)] += len(x)
            return x

    def make_model() -> nn.Sequential:
        return nn.Sequential(Count(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    samples = Samples(torch.rand(400, 6) / 2, torch.arange(400) % 2)
    tested = Samples(torch.ones(100, 6), torch.arange(100) % 2)
    options = {"probes": Tuned(100), "held_out": tested, "batch_size": 50}
    dib.measure(make_model(), 1, samples, 2, make_model, **options, cache_bytes=(400 + 100 * both) * 6 * 4)
    few = [3 * len(samples), 3 * len(tested)]  # to validate the network and to fill the cache
    assert [count < most for count, most in zip(rows, few, strict=True)] == cached


# The optimum of linear decoders


def make_features(kind: str, N: int = 200, d: int = 5) -> Tensor:
    torch.manual_seed(0)
    if kind == "heavy":  # 50 iterations are not enough
        return torch.randn(300, 30) * torch.randn(300, 1).mul(2).exp()
    z = torch.randn(N, d) + 1
    if kind == "collinear":
        z = (1024 * z).round() / 1024  # sums are exact: their rounding would add directions
        z = torch.cat([z, z[:, :2] + z[:, 2:4], z[:, :1]], dim=1)
    elif kind == "constant":
        z = torch.cat([z, torch.full((N, 1), 3.0), torch.zeros(N, 1)], dim=1)
    elif kind == "scales":
        z = z * torch.logspace(-3, 3, d)
    elif kind == "far":
        z = z + 100
    elif kind == "many":
        z = torch.randn(N, 60)
    return z


def make_uncertain_labels(z: Tensor, C: int = 3) -> Tensor:
    """Return labels that depend on the features, half of them replaced by random ones."""
    generator = torch.Generator().manual_seed(1)
    labels = (z / z.std(0).clamp(min=1e-6))[:, :C].argmax(1)
    others = torch.randint(C, (len(z),), generator=generator)
    return torch.where(torch.rand(len(z), generator=generator) < 0.5, labels, others)


def fit_optima(decoder: nn.Sequential, z: Tensor, targets: Tensor) -> list[tuple[float, float]]:
    """Return (loss, lower) of a linear decoder of the encodings z (N, ...) for each labeling of targets (J, N)."""
    last = list_layers(decoder)[-1]
    has_bias = last.bias is not None
    U = decompose(read_features(decoder, z.__getitem__, make_batches(len(z))), has_bias).U
    return [compute_linear_optimum(U, labels, last.out_features, has_bias) for labels in targets]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["normal", "collinear", "constant", "scales", "far", "many", "heavy"])
def test_the_optimum_is_that_of_newtons_method_and_proved(kind, bias):
    z = make_features(kind)
    labels = make_uncertain_labels(z)
    least = compute_newton_optimum(z, labels, bias, within=1e-9)
    assert 0.1 < least < math.log(3)
    ((loss, lower),) = fit_optima(nn.Sequential(nn.Linear(z.shape[1], 3, bias=bias)), z, labels[None])
    assert lower - 1e-9 <= least <= loss + 1e-8
    assert loss - lower <= PROVED


def test_the_optimum_for_constant_features_is_the_entropy():
    z, labels = torch.full((40, 4), 2.0), torch.arange(40).fmod(4).clamp(max=2)
    for constant in (z, torch.zeros_like(z)):
        ((loss, lower),) = fit_optima(nn.Sequential(nn.Linear(4, 3)), constant, labels[None])
        assert lower <= loss <= lower + PROVED
        assert loss == pytest.approx(dib.compute_entropy(labels, 3), abs=PROVED)


def test_the_optimum_for_zero_features_without_bias_is_log_c():
    z, labels = torch.zeros(40, 4), torch.arange(40) % 3
    ((loss, lower),) = fit_optima(nn.Sequential(nn.Linear(4, 3, bias=False)), z, labels[None])
    assert (loss, lower) == (pytest.approx(math.log(3)), pytest.approx(math.log(3)))


def test_without_a_bias_classes_without_samples_count():
    """Two of ten classes occur, in features unrelated to them. Logits of 0 give log 10, and little less is possible."""
    torch.manual_seed(0)
    z, labels = torch.randn(400, 3), torch.arange(400) % 2
    ((loss, lower),) = fit_optima(nn.Sequential(nn.Linear(3, 10, bias=False)), z, labels[None])
    W = torch.zeros(3, 10, dtype=torch.float64, requires_grad=True)
    assert minimise_for_long([W], lambda: F.cross_entropy(z.double() @ W, labels)) == pytest.approx(loss, abs=PROVED)
    assert 2 < loss < math.log(10)
    assert loss - lower <= PROVED


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spread", [1e-3, 1, 1e3])
def test_the_optimum_for_separable_classes_is_0_after_few_iterations(spread, bias, monkeypatch):
    calls = []
    monkeypatch.setattr(linear, "compute_newton_step", lambda *a, **o: calls.append(1) or compute_newton_step(*a, **o))
    torch.manual_seed(0)
    z, labels = spread * torch.randn(60, 80), torch.randint(3, (2, 60))
    for loss, lower in fit_optima(nn.Sequential(nn.Linear(80, 3, bias=bias)), z, labels):
        assert 0 <= lower <= loss <= PROVED
    assert len(calls) <= 2  # after 20 iterations each


def test_small_directions_of_the_features_count():
    """The label is the sign of a direction that is 1e-5 of the others, mixed into all features."""
    torch.manual_seed(0)
    z, labels = torch.randn(300, 4, dtype=torch.float64), torch.arange(300) % 2
    z[:, 3] = 1e-5 * (2 * labels - 1)
    mixed = z @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    ((loss, _),) = fit_optima(nn.Sequential(nn.Linear(4, 2)).double(), mixed, labels[None])
    assert loss <= PROVED


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1e-320, 1e-170, 1e200, 1e307])
def test_features_whose_squares_overflow_or_underflow_count(scale, bias):
    torch.manual_seed(0)
    labels = torch.arange(60) % 2
    z = torch.stack([(2 * labels - 1) * (1 + 0.1 * torch.rand(60)), torch.randn(60)], dim=1).double()
    z[:, 0] *= scale
    ((loss, _),) = fit_optima(nn.Sequential(nn.Linear(2, 2, bias=bias)).double(), z, labels[None])
    assert loss <= PROVED


@pytest.mark.parametrize("offset", [0, 1e3, 1e6, 1e8])
def test_singular_vectors_are_orthonormal_and_of_mean_0_where_features_nearly_coincide(offset):
    torch.manual_seed(0)
    first, noise, other = torch.randn(3, 300, dtype=torch.float64)
    first = offset + first
    z = torch.stack([first, first + 1e-15 * max(offset, 1e6) * noise, other], dim=1)
    basis = decompose(z, True)
    Z = torch.cat([basis.U * 300**0.5, torch.ones(300, 1).double()], dim=1)
    torch.testing.assert_close(Z.T @ Z / 300, torch.eye(4).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(basis.U * basis.S @ basis.V.T, (z - basis.mean) / basis.scale, rtol=0, atol=1e-7)


def test_the_optimum_for_features_of_single_samples():
    """Some features are not 0 for one sample only, which can be told apart from the others."""
    torch.manual_seed(0)
    z, labels = torch.randn(300, 20), torch.randint(4, (300,))
    z[:, 15:] = 0
    z[range(5), range(15, 20)] = 1
    ((loss, lower),) = fit_optima(nn.Sequential(nn.Linear(20, 4)), z, labels[None])
    assert loss - lower <= PROVED
    assert lower <= compute_newton_optimum(z, labels, within=1e-7) <= loss + 1e-6


def test_the_optimum_for_sparse_features():
    """Some features are nearly always 0, and determine the class if they are not."""
    torch.manual_seed(0)
    z = torch.randn(400, 30).relu() * (torch.rand(400, 30) < 0.05)
    labels = (z @ torch.randn(30, 3)).argmax(1)
    labels = torch.where(torch.rand(400) < 0.1, torch.randint(3, (400,)), labels)
    ((loss, lower),) = fit_optima(nn.Sequential(nn.Linear(30, 3)), z, labels[None])
    assert loss - lower <= PROVED
    assert lower <= compute_newton_optimum(z, labels) <= loss + 1e-6


def test_the_optimum_for_heavy_tails_and_few_wrong_labels():
    """L-BFGS alone ends 0.01 nats above the optimum."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1000, 80, generator=generator, dtype=torch.float64) ** 3
    labels = (z @ torch.randn(80, 5, generator=generator, dtype=torch.float64)).argmax(1)
    wrong = torch.rand(1000, generator=generator) < 0.02
    labels = torch.where(wrong, torch.randint(5, (1000,), generator=generator), labels)
    ((loss, lower),) = fit_optima(nn.Sequential(nn.Linear(80, 5)).double(), z, labels[None])
    least = compute_newton_optimum(z, labels, within=1e-6)
    assert lower <= least + 1e-9
    assert loss <= least + PROVED


def test_a_norm_before_the_linear_layer_is_absorbed():
    """Training all parameters of both for long reaches the optimum, and not less than the bound."""
    z = make_features("normal", d=6).double()
    labels = make_uncertain_labels(z)
    decoder = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)).double()
    ((loss, lower),) = fit_optima(copy.deepcopy(decoder), z, labels[None])
    trained = minimise_for_long(decoder.parameters(), lambda: F.cross_entropy(decoder(z), labels))
    assert lower <= trained <= loss + 1e-3


def minimise_for_long(params, compute_loss) -> float:
    """Return the least loss that L-BFGS finds in 1,000 iterations."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = compute_loss()
        loss.backward()
        return loss

    options = {"max_iter": 1000, "tolerance_grad": 1e-9, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(params, **options)
    optimizer.step(closure)
    return closure().item()


@pytest.mark.parametrize("seed", range(20))
def test_no_decoder_is_below_the_bound(seed):
    """L-BFGS on the features as they are stored does not find a lower loss. Labels are nearly separable in half of the
    problems. Some features depend on one another, and their scales differ.
    """
    g = torch.Generator().manual_seed(seed)
    N, d, C = 150 + 10 * seed, 3 + seed, 2 + seed % 4
    z = torch.randn(N, d, generator=g) * torch.logspace(-2, 2, d)[torch.randperm(d, generator=g)]
    z = torch.cat([z, z[:, :2] @ torch.randn(2, 2, generator=g)], dim=1)  # rounding keeps them apart
    logits = z / z.std(0) @ torch.randn(d + 2, C, generator=g)
    labels = (logits + 0.2 * (seed % 2) * torch.randn(N, C, generator=g)).argmax(1)
    others = torch.rand(N, generator=g) < (0.02 if seed % 2 else 0.3)
    labels = torch.where(others, torch.randint(C, (N,), generator=g), labels)
    ((loss, lower),) = fit_optima(nn.Sequential(nn.Linear(d + 2, C)), z, labels[None])
    assert loss - lower <= PROVED
    x = z.double() / z.double().std(0)
    W, b = (torch.zeros(*shape, dtype=torch.float64, requires_grad=True) for shape in ((d + 2, C), (C,)))
    assert minimise_for_long([W, b], lambda: F.cross_entropy(x @ W + b, labels)) >= lower


def test_a_bound_that_is_not_finite_is_not_used(monkeypatch):
    monkeypatch.setattr(linear, "compute_dual_bound", lambda *arguments: math.nan)
    z = make_features("normal")
    ((loss, lower),) = fit_optima(nn.Sequential(nn.Linear(z.shape[1], 3)), z, make_uncertain_labels(z)[None])
    assert lower == 0 < loss


def test_bounds_are_proved_for_logits_that_span_as_much_as_those_of_the_optimum(monkeypatch):
    z = 3 * make_features("normal")
    decoder, spans, compute = nn.Sequential(nn.Linear(z.shape[1], 3)), [], linear.compute_dual_bound
    monkeypatch.setattr(linear, "HALF_SPAN", 0.5)
    monkeypatch.setattr(linear, "compute_dual_bound", lambda *rest: spans.append(rest[-1]) or compute(*rest))
    ((loss, lower),) = fit_optima(decoder, z, make_uncertain_labels(z)[None])
    assert loss - lower <= PROVED
    assert spans[-1] > 1
    monkeypatch.setattr(linear, "compute_dual_bound", lambda *rest: 0.1 if rest[-1] == 0.5 else 0.0)
    ((loss, lower),) = fit_optima(decoder, z, make_uncertain_labels(z)[None])
    assert lower == 0 < loss  # the bound of smaller logits was not kept


def test_bounds_that_other_weights_proved_are_not_used_if_the_loss_is_below_them():
    """A threshold separates the classes, but features of very different sizes need logits beyond HALF_SPAN for it."""
    z = torch.exp(6 * torch.randn(300, 1, generator=torch.Generator().manual_seed(3)))
    labels = (z > z.median()).long().flatten()
    ((loss, lower),) = fit_optima(nn.Sequential(nn.Linear(1, 2)), z, labels[None])
    assert lower <= loss <= PROVED


def test_the_bound_holds_for_any_weights():
    """Also far from the optimum, and where q has negative entries, a bound is below the optimum."""
    z = make_features("normal").double()
    labels = make_uncertain_labels(z)
    least, Y = compute_newton_optimum(z, labels), F.one_hot(labels, 3).double()
    Z = torch.cat([decompose(z, True).U * len(z) ** 0.5, torch.ones(len(z), 1).double()], dim=1)
    torch.testing.assert_close(Z.T @ Z / len(Z), torch.eye(6).double())
    best = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    minimise_for_long([best], lambda: F.cross_entropy(Z @ best, labels))
    torch.manual_seed(0)
    bounds = []
    for scale in (0, 0.01, 0.1, 0.3, 1, 3):
        p = (Z @ (best.detach() + scale * torch.randn(6, 3, dtype=torch.float64))).softmax(1)
        step = compute_newton_step(Z, p, Y, 1e-8 if scale > 0.1 else None)
        bounds.append(compute_dual_bound(Z, p, Y, Z @ step, linear.HALF_SPAN))
    assert all(bound <= least + 1e-9 for bound in bounds)
    assert bounds[0] == pytest.approx(least, abs=1e-8)
    assert least - 1e-3 < bounds[1] < least
    assert bounds[-1] < 0  # far away, q has negative entries


def test_the_bound_holds_for_a_step_that_is_not_solved():
    """Without a step, q is p and what makes it feasible. Its entropy alone would be log 3, more than the optimum."""
    z = make_features("normal").double()
    labels = make_uncertain_labels(z)
    Z = torch.cat([decompose(z, True).U * len(z) ** 0.5, torch.ones(len(z), 1).double()], dim=1)
    p, Y = torch.full((len(z), 3), 1 / 3).double(), F.one_hot(labels, 3).double()
    assert (
        compute_dual_bound(Z, p, Y, torch.zeros_like(p), linear.HALF_SPAN)
        < compute_newton_optimum(z, labels)
        < math.log(3)
    )


def test_the_dual_bound_computed_by_hand():
    """Only constants: q is the share of each class, whose entropy is the infimum."""
    labels = torch.tensor([0, 0, 0, 1])
    Z, Y, p = torch.ones(4, 1).double(), F.one_hot(labels, 2).double(), torch.full((4, 2), 0.5).double()
    step = compute_newton_step(Z, p, Y, None)
    expected = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert compute_dual_bound(Z, p, Y, Z @ step, linear.HALF_SPAN) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("floor", [None, 1e-8, 1e-12])
def test_the_newton_step_is_that_of_the_dense_hessian(floor):
    z = make_features("collinear").double()
    labels = make_uncertain_labels(z)
    Z = decompose(z, False).U * len(z) ** 0.5
    for scale in (0, 0.3):
        W = scale * torch.randn(Z.shape[1], 3, dtype=torch.float64)
        g, H = compute_gradient_and_hessian(Z, labels, W)
        step = compute_newton_step(Z, (Z @ W).softmax(1), F.one_hot(labels, 3).double(), floor).flatten()
        torch.testing.assert_close(H @ step, g, rtol=1e-6, atol=1e-9)


def test_the_dense_hessian_is_that_of_autograd():
    z, W = make_features("normal", 30, 3).double(), torch.randn(3, 3, dtype=torch.float64)
    labels = make_uncertain_labels(z)
    g, H = compute_gradient_and_hessian(z, labels, W)

    def compute_loss(W: Tensor) -> Tensor:
        return F.cross_entropy(z @ W, labels)

    torch.testing.assert_close(g.view_as(W), torch.func.grad(compute_loss)(W))
    torch.testing.assert_close(H.view(3, 3, 3, 3), torch.func.hessian(compute_loss)(W))


def test_an_optimum_is_computed_if_its_float64_features_fit(monkeypatch):
    """Otherwise probes are trained, and come near the optimum."""
    assert can_fit_linear(make_mlp()[3:], 2**27)  # times 4 features of 8 bytes
    assert not can_fit_linear(make_mlp()[3:], 2**27 + 1)
    assert not can_fit_linear(make_mlp()[2:], 90)
    torch.manual_seed(0)
    samples, model = make_toy_samples(), make_mlp()
    optimum = dib.measure(model, 3, samples, 3, make_mlp, probes=Tuned(60), cache_bytes=0)
    monkeypatch.setattr(linear, "FEATURE_BYTES", 0)
    trained = dib.measure(model, 3, samples, 3, make_mlp, probes=Tuned(100))
    for best, probe in zip(optimum, trained, strict=True):
        assert best.loss != probe.loss
        assert best.loss - 1e-4 <= probe.loss <= best.loss + 0.02


def test_encodings_of_linear_decoders_that_are_not_finite_are_refused():
    decoder, z = nn.Sequential(nn.Linear(4, 3)), torch.full((20, 4), math.nan)
    with pytest.raises(ValueError, match="the encodings of a linear decoder are not finite"):
        read_features(decoder, z.__getitem__, make_batches(20))


# Encodings that coincide


def test_equal_encodings_are_found():
    torch.manual_seed(0)
    x = torch.randint(0, 3, (500, 4)) * 1.5
    x[7:9, 0] = torch.tensor([0.0, -0.0])  # equal numbers
    for z in (x, x.double(), x.bool(), (x * 2).long(), x[:, :, None, None]):
        groups = group_equal(z.__getitem__, make_batches(500, 60))
        same = (z.flatten(1)[:, None] == z.flatten(1)).all(-1)  # (N, N)
        assert torch.equal(groups[:, None] == groups, same)


def test_encodings_that_differ_in_one_bit_are_different():
    z = torch.ones(3, 2)
    z[1, 1] += torch.finfo(torch.float32).eps
    groups = group_equal(z.__getitem__, make_batches(3))
    assert groups[0] == groups[2] != groups[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_encodings_of_two_values_are_different(dtype):
    """The patterns of the two values differ in few bits: in float64, those of 1 and -1 in the highest alone."""
    rows = torch.randint(2, (20000, 30), generator=torch.Generator().manual_seed(0)).unique(dim=0)
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    for values in ((1.0, 0.0), (1.0, -1.0), (smallest, 0.0)):
        z = torch.tensor(values, dtype=dtype)[torch.cat([rows, rows])]
        z = z.T.contiguous().T  # the numbers of an encoding are not neighbours in memory
        groups = group_equal(z.__getitem__, make_batches(len(z), 700))
        assert len(groups.unique()) == len(rows) > 19000
        assert torch.equal(groups[: len(rows)], groups[len(rows) :])


def test_the_entropy_given_the_group_computed_by_hand():
    """Three samples with the labels 0 0 1, and one alone."""
    groups, labels = torch.tensor([1, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    within = -2 / 3 * math.log(2 / 3) - 1 / 3 * math.log(1 / 3)
    assert compute_group_entropy(groups, labels) == pytest.approx(3 / 4 * within)
    assert compute_group_entropy(torch.arange(4), labels) == 0


# Held-out samples


def test_halves_have_as_many_of_each_class_as_can_be():
    labels = torch.tensor([0] * 7 + [1] * 4 + [2] * 5 + [3])
    in_first = choose_half(labels, 0)
    assert abs(2 * in_first.sum() - len(labels)) <= 1
    for c in range(4):
        of_class = in_first[labels == c]
        assert abs(2 * of_class.sum() - len(of_class)) <= 1
    assert torch.equal(in_first, choose_half(labels, 0))
    assert not torch.equal(in_first, choose_half(labels, 1))


def test_each_sample_is_scored_with_the_row_that_is_best_without_it():
    """Row 0 is best on the first half, row 2 on the second. A row that is not finite is never best."""
    in_first = torch.tensor([True, True, False, False])
    losses = torch.tensor([[1.0, 2.0, 9.0, 7.0], [0.0, math.nan, 0.0, math.inf], [3.0, 4.0, 5.0, 6.0]])
    assert cross_fit(losses, in_first).item() == pytest.approx((3 + 4 + 9 + 7) / 4)
    assert cross_fit_alone(losses.tolist(), in_first.tolist()) == pytest.approx((3 + 4 + 9 + 7) / 4)


def test_moments_end_with_the_last_step():
    assert list_moments(600) == {1, 3, 5, 9, 18, 35, 72, 145, 295, 600}
    assert list_moments(1) == {1}
    for steps in range(1, 50):
        assert {1, steps} <= list_moments(steps) <= set(range(1, steps + 1))


@pytest.mark.parametrize("bias", [True, False])
def test_ridge_losses_are_those_of_a_plain_minimisation(bias):
    z, other = make_features("collinear").double(), make_features("collinear", N=90).double() + 0.1
    labels, other_labels = make_uncertain_labels(z), make_uncertain_labels(other)
    found = compute_ridge_losses(decompose(z, bias), labels, other, other_labels, 3, bias)
    center = z.mean(0) if bias else 0
    scale = (z - center).square().mean(0).sqrt()
    x, x_other = (z - center) / scale, (other - center) / scale
    for strength, losses in zip(held_out.STRENGTHS, found, strict=True):
        W = torch.zeros(z.shape[1], 3, dtype=torch.float64, requires_grad=True)
        b = torch.zeros(3, dtype=torch.float64, requires_grad=bias)
        params = [W, b] if bias else [W]

        def compute_loss(W=W, b=b, strength=strength) -> Tensor:
            return F.cross_entropy(x @ W + b, labels) + strength / 2 * W.square().sum()

        minimise_for_long(params, compute_loss)
        expected = F.cross_entropy(x_other @ W + b, other_labels, reduction="none")
        torch.testing.assert_close(losses, expected.detach(), rtol=0, atol=3e-3)
