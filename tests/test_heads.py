"""How heads are trained, each fast path beside its plain twin of yardsticks.py."""

import copy
import math
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

import devices
import dib
import heads
import models
from heads import Bundle, Thesis, Tuned
from tests.test_dib import convolutional, drawing, plain, toy
from tests.toys import Toy, clusters
from tests.yardsticks import (
    dense_newton,
    newton_optimum,
    standardised_alone,
    train_alone,
    tune_alone,
)

SHARED = nn.ReLU()


def padded() -> nn.Sequential:
    """Two channels, and a first layer that pads: its inputs may be scaled, and not shifted."""
    first = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh())
    return nn.Sequential(first, nn.Flatten(), nn.Linear(27, 3)).double()


def batches(N: int, size: int = 40) -> tuple[Tensor, ...]:
    return torch.arange(N).split(size)


# Thesis


@pytest.mark.parametrize(
    ("build", "shape", "splits", "forward"),
    [
        (plain, (6,), [0], "stacked"),
        (plain, (6,), [0, 2, 3], "stacked"),
        (plain, (2, 3), [1, 3], "stacked"),
        (convolutional, (1, 5, 5), [0], "one_by_one"),
        (convolutional, (1, 5, 5), [1], "stacked"),
        (drawing, (6,), [0], "one_by_one"),
    ],
)
def test_heads_trained_together_are_what_each_would_be_alone(build, shape, splits, forward, monkeypatch):
    """The same start and the same batches, in float64: the loss of a head does not know of the others."""
    used = Counter()
    for name in ("stacked", "one_by_one"):
        path = getattr(heads, name)
        monkeypatch.setattr(heads, name, lambda *a, name=name, path=path: used.update([name]) or path(*a))
    torch.manual_seed(0)
    split, model, epochs = toy(shape=shape), build(), 30
    sgd = partial(torch.optim.SGD, lr=0.1)
    _, targets = dib.label(split.labels, 3, labelings=1, seed=0)
    starts = {k: [build()[k:].eval() for _ in targets] for k in splits}
    encoders = {k: model[:k].eval()(split.x).detach().__getitem__ for k in splits}
    bundle = Bundle(copy.deepcopy(starts), encoders, targets, {k: list(range(len(targets))) for k in splits})
    torch.manual_seed(7)
    losses = Thesis(sgd, epochs).train(bundle, {}, 40, torch.Generator().manual_seed(5)).view(len(splits), -1)
    assert set(used) == {forward}, f"the heads took the path {used}"
    for i, k in enumerate(splits):
        for j, head in enumerate(starts[k]):
            torch.manual_seed(7)
            generator = torch.Generator().manual_seed(5)
            final, _ = train_alone(model[:k], head, split.x, targets[j], sgd, epochs, 40, generator)
            assert losses[i, j].item() == pytest.approx(final, rel=1e-9)


def test_stacked_agrees_with_one_by_one():
    torch.manual_seed(0)
    those = [nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False), nn.GELU(), nn.Linear(5, 3)) for _ in range(4)]
    those = [head.double() for head in those]
    x = torch.randn(7, 3, 2, 2, dtype=torch.float64)
    a, b = heads.stacked({0: those}, heads.stack_parameters(those), {0: x}), heads.one_by_one(those, {0: x})
    assert a.shape == (4, 3, 7)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a[2], those[2](x).T, rtol=1e-12, atol=1e-12)


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
def test_only_plain_decoders_are_stacked(layers, expected):
    assert heads.is_plain(nn.Sequential(*layers)) is expected


def test_whether_heads_draw_is_measured():
    """In the first step, whatever layer it is that draws."""
    noisy = nn.Sequential(nn.Linear(6, 3))
    noisy.register_forward_hook(lambda head, _, logits: logits + torch.rand(3) if head.training else None)
    quiet = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    x, targets = torch.randn(4, 6), torch.tensor([[0, 1, 2, 0]])
    for head, expected in [(drawing().float(), True), (noisy, True), (quiet, False)]:
        bundle = heads.Bundle({0: [head.train()]}, {0: x.__getitem__}, targets, {0: [0]})
        bundle.step(torch.optim.SGD(head.parameters(), lr=0.1), torch.arange(4))
        assert bundle.draws is expected


def test_random_states_are_set_only_for_heads_that_draw(monkeypatch):
    """In the first step, which shows whether they do, for all."""
    calls, setter = Counter(), torch.set_rng_state
    monkeypatch.setattr(torch, "set_rng_state", lambda state: calls.update(["set"]) or setter(state))
    split = toy(shape=(1, 5, 5))
    for build, J, expected in ((convolutional, 2, 2), (drawing, 3, 3 * 9)):
        calls.clear()
        x = split.x if build is convolutional else split.x.flatten(1)[:, :6]
        encoders, targets = {0: x.__getitem__}, split.labels.expand(J, -1)
        bundle = Bundle({0: [build() for _ in range(J)]}, encoders, targets, {0: list(range(J))})
        Thesis(partial(torch.optim.SGD, lr=0.1), 2).train(bundle, {}, 30, torch.Generator())  # 6 steps, 3 batches
        assert calls["set"] == expected


@pytest.mark.parametrize(("build", "shape"), [(plain, (6,)), (convolutional, (1, 5, 5))])
@pytest.mark.parametrize("recipe", [Thesis(partial(torch.optim.SGD, lr=0.1), 5, bfloat16=True), Tuned(20)])
def test_steps_in_bfloat16_end_with_a_pass_in_float32(build, shape, recipe, monkeypatch):
    """As on CUDA, where the device has it; float64 heads stay float64, and a CPU does without."""
    split, seen, cross_entropy = toy(shape=shape), {True: set(), False: set()}, heads.F.cross_entropy

    def watch(logits: torch.Tensor, *rest, **options) -> torch.Tensor:
        seen[logits.requires_grad].add(logits.dtype)
        return cross_entropy(logits, *rest, **options)

    def losses(dtype: torch.dtype) -> list[float]:
        for dtypes in seen.values():
            dtypes.clear()
        samples, model = Toy(split.x.to(dtype), split.labels), build().to(dtype)
        return [h.loss for h in dib.measure(model, 0, samples, 3, lambda: build().to(dtype), recipe)]

    monkeypatch.setattr(heads, "F", SimpleNamespace(cross_entropy=watch))
    torch.manual_seed(0)
    expected = losses(torch.float32)
    assert seen == {True: {torch.float32}, False: {torch.float32}}
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: True)
    assert losses(torch.float32) == pytest.approx(expected, abs=0.05)
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}
    losses(torch.float64)
    assert seen == {True: {torch.float64}, False: {torch.float64}}
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    losses(torch.float32)
    assert seen == {True: {torch.float32}, False: {torch.float32}}


def test_a_first_layer_that_works_in_place_does_not_reach_the_other_heads():
    those = [nn.Sequential(nn.ELU(inplace=True), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval() for _ in range(2)]
    x = torch.randn(5, 6)
    expected = [head(x.clone()).T for head in those]
    torch.testing.assert_close(heads.one_by_one(those, {1: x}), torch.stack(expected))


# Tuned


def found_and_alone(build, shape, splits, steps, dtype=torch.float64, **choice) -> tuple[Tensor, list[list[float]]]:
    """The losses of tuned heads of these splits for three labelings, and of each trained alone by the twin."""
    torch.manual_seed(0)
    split, model, recipe = toy(shape=shape), build().to(dtype).eval(), Tuned(steps)
    split.x = (3 * split.x + 5).to(dtype)
    targets = dib.label(split.labels, 3, labelings=1, seed=0)[1][:3]

    def inputs(indices: Tensor) -> Tensor:
        return split.batch(indices)[0]

    def new_head(k: int, *which: object) -> nn.Sequential:
        torch.manual_seed(dib.stream(k, *which))
        return build().to(dtype)[k:]

    def seeded(*words: object) -> torch.Generator:
        torch.manual_seed(7)
        return torch.Generator().manual_seed(5)

    reference = new_head(0, "reference").eval()
    found = heads.find(model, splits, inputs, targets, reference, new_head, seeded, recipe, 40, 2**30)
    sizes, alone = heads.parameter_sizes(reference), []
    for k in splits:
        with torch.no_grad():
            z = model[:k](split.x)
        first = next(layer for layer in new_head(k).modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))
        z = standardised_alone(first, z)
        alone.append([])
        for j, target in enumerate(targets):
            starts = [new_head(k, "head", j, start) for start in range(recipe.starts(new_head(k)))]
            alone[-1].append(tune_alone(z, starts, target, sizes, 0.2, steps, 40, seeded(), **choice))
    return found, alone


@pytest.mark.parametrize(
    ("build", "shape", "splits", "steps"),
    [
        (plain, (6,), [0, 1, 2], 120),
        (plain, (2, 3), [1], 8),
        (convolutional, (1, 5, 5), [0], 120),
        (padded, (2, 3, 3), [0], 50),
        (drawing, (6,), [0], 120),
    ],
    ids=["plain", "few steps", "convolutional", "padded", "drawing"],
)
def test_tuned_heads_are_what_each_would_be_alone(build, shape, splits, steps):
    found, alone = found_and_alone(build, shape, splits, steps)
    torch.testing.assert_close(found, torch.tensor(alone, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("build", "shape", "splits"), [(plain, (6,), [0, 2]), (convolutional, (1, 5, 5), [0])])
def test_tuned_heads_in_float32_are_what_each_would_be_alone(build, shape, splits, monkeypatch):
    """With the same starts kept, as two that are about as good may change places by a rounding."""
    first = lambda losses, starts, kept: torch.arange(len(losses)).view(-1, starts)[:, :kept].flatten()  # noqa: E731
    monkeypatch.setattr(heads, "best", first)
    found, alone = found_and_alone(build, shape, splits, 60, torch.float32, best=lambda lately, kept: list(range(kept)))
    torch.testing.assert_close(found, torch.tensor(alone, dtype=torch.float64), rtol=1e-3, atol=1e-3)


def test_the_best_starts_of_each_head_are_kept():
    losses = torch.tensor([3.0, 1.0, 2.0, 4.0, 9.0, 9.0, 8.0, math.nan])  # of two heads
    assert heads.best(losses, 4, 2).tolist() == [1, 2, 6, 4]
    assert heads.best(losses, 4, 1).tolist() == [1, 6]


def test_rates_warm_up_and_fall():
    factor = Tuned(steps=200).factor  # up in 20 steps, down in the last 30
    assert [factor(i) for i in (0, 9, 19, 20, 170)] == pytest.approx([1 / 20, 1 / 2, 1, 1, 1])
    assert [factor(i) for i in (171, 185, 199)] == pytest.approx([29 / 30, 1 / 2, 1 / 30])
    short = Tuned(steps=100).factor  # it does not fall
    assert [short(i) for i in (0, 10, 99)] == pytest.approx([1 / 10, 1, 1])


def test_steps_by_hand():
    assert heads.steps(30, 614) == 600  # 2 batches an epoch count as 20
    assert heads.steps(3, 8000) == 60
    assert heads.steps(3, 8001) == 63
    assert heads.steps(2, 50_000) == 250


class Scale(nn.Module):
    """LayerScale, which starts at a constant."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((4, 1, 1), 1e-6))


def rms(*those: Tensor) -> float:
    values = [v for p in those for v in p.flatten().tolist()]
    return math.sqrt(sum(v * v for v in values) / len(values))


def test_parameter_sizes_by_hand():
    torch.manual_seed(0)
    linear, narrow, wide = nn.Linear(5, 4), nn.Conv2d(2, 3, 3), nn.Conv2d(64, 4, 3)
    zero_bias, constant = nn.Linear(5, 4), nn.Linear(5, 4, bias=False)
    nn.init.zeros_(zero_bias.bias)
    nn.init.constant_(constant.weight, 0.05)
    model = nn.Sequential(linear, narrow, wide, zero_bias, constant, nn.BatchNorm2d(7), nn.LayerNorm(8), Scale())
    of_linear, of_narrow, of_wide = (rms(layer.weight, layer.bias) for layer in (linear, narrow, wide))
    assert heads.parameter_sizes(model) == pytest.approx(
        {
            "0.weight": of_linear,
            "0.bias": of_linear,
            "1.weight": of_narrow,
            "1.bias": of_narrow,
            "2.weight": of_wide * (256 / 576) ** 0.75,  # 64 x 3 x 3 inputs
            "2.bias": of_wide,
            "3.weight": rms(zero_bias.weight),  # zeros were not drawn
            "3.bias": rms(zero_bias.weight),
            "4.weight": 0.05,  # a constant below 0.1
            "5.weight": 0.1,
            "5.bias": 0.1,
            "6.weight": 0.1,
            "6.bias": 0.1,
            "7.scale": 0.01,
        }
    )


def test_parameter_sizes_of_cifarnet():
    """Its classifier has weights of size 1, as the logits are divided by 256."""
    sizes = heads.parameter_sizes(models.build("CIFARNet", (3, 32, 32), 10))
    assert sizes["classifier.1.weight"] == pytest.approx(1, rel=1e-2)
    assert sizes["group1.2.bias"] == 0.01  # BatchNorm's shift, of zeros alone


def test_a_size_does_not_depend_on_what_is_before_it():
    torch.manual_seed(0)
    model = plain()
    sizes = heads.parameter_sizes(model)
    assert heads.parameter_sizes(model[2:]) == {
        n: s for n, s in sizes.items() if n in dict(model[2:].named_parameters())
    }


# Standardised inputs


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
def test_other_weights_do_what_standardised_inputs_do(layers, shape, centred):
    """Spread 1, mean 0 where that can be; and the same function of the inputs as they are has other weights."""
    torch.manual_seed(0)
    decoder = nn.Sequential(*layers).double()
    x = torch.randn(50, *shape, dtype=torch.float64) * torch.rand(shape, dtype=torch.float64).mul(10) + 3
    z = heads.standardised(decoder, x.__getitem__, batches(50, 20))(torch.arange(50))
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


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.ReLU(), nn.Linear(6, 3)], (6,)),
        ([nn.BatchNorm1d(6), nn.Linear(6, 3)], (6,)),
        ([nn.Dropout(), nn.Linear(6, 3)], (6,)),
        ([frozen(nn.Linear(6, 3)), nn.Linear(3, 3)], (6,)),
        ([frozen(nn.Conv2d(2, 3, 2)), nn.Flatten()], (2, 3, 3)),
        ([nn.Linear(3, 3), nn.Flatten(), nn.Linear(6, 3)], (2, 3)),  # the same weights for both rows
        ([nn.MaxPool2d(2), nn.Conv2d(2, 3, 2)], (2, 4, 4)),
        ([nn.ConvTranspose2d(2, 3, 2)], (2, 3, 3)),
    ],
)
def test_nothing_else_is_standardised(layers, shape):
    x = torch.randn(20, *shape)
    encode = x.__getitem__
    assert heads.standardised(nn.Sequential(*layers), encode, batches(20)) is encode


def test_a_layer_with_a_frozen_bias_is_only_scaled():
    layer, x = nn.Linear(6, 3), torch.randn(20, 6) + 5
    frozen(layer.bias)
    z = heads.standardised(nn.Sequential(layer), x.__getitem__, batches(20))(torch.arange(20))
    torch.testing.assert_close(z, x / x.std(0, correction=0))


def test_features_without_spread_keep_their_scale():
    x = torch.randn(20, 4, dtype=torch.float64)
    x[:, 1], x[:, 2] = 0.1, 0
    for bias in (True, False):
        layer = nn.Linear(4, 3, bias=bias).double()
        z = heads.standardised(nn.Sequential(layer), x.__getitem__, batches(20, 7))(torch.arange(20))
        expected = torch.zeros_like(x[:, 1:3]) if bias else x[:, 1:3]
        torch.testing.assert_close(z[:, 1:3], expected, rtol=0, atol=1e-12)


def test_features_far_from_0_are_standardised_in_float32():
    torch.manual_seed(0)
    x = torch.randn(1000, 3) + 1e4
    z = heads.standardised(nn.Sequential(nn.Linear(3, 3)), x.__getitem__, batches(1000, 300))(torch.arange(1000))
    assert z.dtype == torch.float32
    expected = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
    torch.testing.assert_close(z.double(), expected, rtol=0, atol=4e-3)  # a few roundings of 1e4


# Linear decoders


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(8, 3, bias=bias)


def half_frozen() -> nn.Linear:
    layer = linear()
    frozen(layer.weight)
    return layer


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([linear()], True),
        ([linear(bias=False)], True),
        ([nn.Flatten(), linear()], True),
        ([nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), nn.Sequential(linear())], True),
        ([nn.ReLU(), linear()], True),
        ([nn.Dropout(), linear()], True),
        ([LayerNorm2d(8), nn.Flatten(), linear()], True),
        ([nn.LayerNorm(8), linear()], True),
        ([nn.BatchNorm1d(8), linear()], True),
        ([nn.GroupNorm(2, 8), nn.Flatten(), linear()], True),
        ([nn.LayerNorm(8), linear(bias=False)], False),
        ([nn.LayerNorm(8, elementwise_affine=False), linear(bias=False)], True),
        ([nn.BatchNorm1d(8, affine=False), linear(bias=False)], False),
        ([nn.LayerNorm(8), nn.ReLU(), linear()], False),
        ([nn.LayerNorm(8), nn.LayerNorm(8), linear()], False),
        ([nn.Linear(8, 8), linear()], False),
        ([nn.PReLU(), linear()], False),
        ([half_frozen()], False),
        ([frozen(linear())], False),
        ([linear(), nn.ReLU()], False),
        ([linear(), nn.LogSoftmax(1)], False),
        ([nn.Flatten()], False),
        ([nn.Bilinear(8, 8, 3)], False),
    ],
)
def test_which_decoders_are_linear(layers, expected):
    assert heads.is_linear(nn.Sequential(*layers)) is expected


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
def test_which_splits_have_linear_decoders(name, last, before):
    model = models.build(name, (3, 32, 32), 10)
    splits = models.splits(model, [last, before])
    assert heads.is_linear(model[splits[last] :])
    assert not heads.is_linear(model[splits[before] :])


def features(kind: str, N: int = 200, d: int = 5) -> Tensor:
    torch.manual_seed(0)
    if kind == "heavy":  # 50 iterations are not enough
        return torch.randn(300, 30) * torch.randn(300, 1).mul(2).exp()
    z = torch.randn(N, d) + 1
    if kind == "collinear":
        z = (1024 * z).round() / 1024  # so that sums are exact: their rounding would be directions, too
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


def mixed_up(z: Tensor, C: int = 3) -> Tensor:
    """Labels that depend on the features, and cannot be told from them for sure."""
    generator = torch.Generator().manual_seed(1)
    labels = (z / z.std(0).clamp(min=1e-6))[:, :C].argmax(1)
    others = torch.randint(C, (len(z),), generator=generator)
    return torch.where(torch.rand(len(z), generator=generator) < 0.5, labels, others)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["plain", "collinear", "constant", "scales", "far", "many", "heavy"])
def test_the_optimum_is_that_of_newtons_method(kind, bias):
    z = features(kind)
    labels = mixed_up(z)
    least = newton_optimum(z, labels, bias, within=1e-7)
    assert 0.1 < least < math.log(3)
    decoder = nn.Sequential(nn.Linear(z.shape[1], 3, bias=bias))
    (loss,) = heads.optima(decoder, z.__getitem__, batches(len(z)), labels[None])
    assert least - 1e-6 <= loss <= least + 1e-4 + 1e-6  # half the squared decrement is below 1e-4
    exact = heads.linear_optimum(heads.whitened(z.double(), bias), labels, 3, bias, within=1e-10)
    assert exact == pytest.approx(least, abs=1e-6)


def test_the_optimum_for_constant_features_is_the_entropy():
    z, labels = torch.full((40, 4), 2.0), torch.arange(40).fmod(4).clamp(max=2)
    (loss,) = heads.optima(nn.Sequential(nn.Linear(4, 3)), z.__getitem__, batches(40), labels[None])
    assert loss == pytest.approx(dib.entropy(labels, 3), abs=1e-4)
    (loss,) = heads.optima(nn.Sequential(nn.Linear(4, 3)), torch.zeros_like(z).__getitem__, batches(40), labels[None])
    assert loss == pytest.approx(dib.entropy(labels, 3), abs=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spread", [1e-3, 1, 1e3])
def test_classes_that_can_be_separated_end_at_0_and_quickly(spread, bias, monkeypatch):
    looks, step = [], heads.newton_step
    monkeypatch.setattr(heads, "newton_step", lambda *a: looks.append(1) or step(*a))
    torch.manual_seed(0)
    z, labels = spread * torch.randn(60, 80), torch.randint(3, (2, 60))
    for loss in heads.optima(nn.Sequential(nn.Linear(80, 3, bias=bias)), z.__getitem__, batches(60), labels):
        assert 0 <= loss < 1e-4
    assert len(looks) <= 2 * 2  # 50 or 100 iterations each


def test_the_decrement_is_that_of_the_dense_hessian():
    z = features("collinear").double()
    labels = mixed_up(z)
    for scale in (0, 0.3):
        W = scale * torch.randn(z.shape[1], 3, dtype=torch.float64)
        g, H = dense_newton(z, labels, W)
        expected = g @ torch.linalg.pinv(H, hermitian=True, rtol=1e-10) @ g
        assert heads.newton_step(z, labels, W)[1] == pytest.approx(expected.item(), rel=1e-6)


def test_the_dense_hessian_is_that_of_autograd():
    z, W = features("plain", 30, 3).double(), torch.randn(3, 3, dtype=torch.float64)
    labels = mixed_up(z)
    g, H = dense_newton(z, labels, W)
    loss = lambda W: F.cross_entropy(z @ W, labels)  # noqa: E731
    torch.testing.assert_close(g.view_as(W), torch.func.grad(loss)(W))
    torch.testing.assert_close(H.view(3, 3, 3, 3), torch.func.hessian(loss)(W))


def test_a_norm_before_the_linear_layer_is_absorbed():
    """All parameters of both trained together and long get as far as the optimum, and no further."""
    z = features("plain", d=6)
    labels = mixed_up(z)
    decoder = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3))
    (loss,) = heads.optima(copy.deepcopy(decoder), z.__getitem__, batches(len(z)), labels[None])
    decoder, z = decoder.double(), z.double()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(decoder(z), labels)
        loss.backward()
        return loss

    options = {"max_iter": 1000, "tolerance_grad": 1e-9, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(decoder.parameters(), **options)
    optimizer.step(closure)
    assert loss - 1e-4 <= closure().item() <= loss + 1e-3


# Bundles


def test_heads_that_are_kept_go_on_as_they_would_have():
    torch.manual_seed(0)
    split, model = toy(), plain()
    _, targets = dib.label(split.labels, 3, labelings=1, seed=0)
    encoders = {k: model[:k](split.x).detach().__getitem__ for k in (0, 2)}
    starts = {k: [plain()[k:] for _ in range(4)] for k in (0, 2)}
    learns = {0: [0, 0, 1, 1], 2: [2, 2, 0, 0]}
    rows = torch.tensor([1, 2, 4, 7])  # of the eight

    def bundle(which: dict[int, list[int]]) -> tuple[Bundle, torch.optim.Optimizer]:
        those = {k: [copy.deepcopy(starts[k][i]) for i in which[k]] for k in which}
        made = Bundle(those, encoders, targets, {k: [learns[k][i] for i in which[k]] for k in which})
        groups = [{"params": p, "lr": 0.01 * i} for i, p in enumerate(made.parameters().values(), 1)]
        return made, torch.optim.Adam(groups)

    cut, optimizer = bundle({k: [0, 1, 2, 3] for k in starts})
    alone, of_alone = bundle({0: [1, 2], 2: [0, 3]})
    for i in range(12):
        if i == 5:
            cut.keep(rows, optimizer)
        indices = torch.randperm(len(split))[:30]
        losses, expected = cut.step(optimizer, indices), alone.step(of_alone, indices)
        torch.testing.assert_close(losses if i >= 5 else losses[rows], expected, rtol=1e-10, atol=1e-10)
    assert {k: len(of_split) for k, of_split in cut.heads.items()} == {0: 2, 2: 2}
    for name, stack in alone.stacks.items():
        torch.testing.assert_close(cut.stacks[name], stack, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cut.exact_losses(40), alone.exact_losses(40), rtol=1e-10, atol=1e-10)


def test_statistics_are_those_of_the_final_weights():
    torch.manual_seed(0)
    x = 3 * torch.randn(60, 6, dtype=torch.float64) + 1
    layers = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.ReLU(), nn.Linear(5, 4), nn.BatchNorm1d(4)
    head = nn.Sequential(*layers, nn.Linear(4, 3)).double()
    head(100 * x)  # statistics that lag behind
    state = copy.deepcopy(dict(head.named_parameters()))
    bundle = Bundle({0: [head]}, {0: x.__getitem__}, torch.randint(3, (1, 60)), {0: [0]})

    def expected(x: Tensor) -> list[Tensor]:
        """Of both norms, in a pass with dropout off."""
        first = layers[0](x)
        normal = (first - first.mean(0)) / (first.var(0, correction=0) + layers[1].eps).sqrt()
        second = layers[4](normal.relu())
        return [first.mean(0), first.var(0), second.mean(0), second.var(0)]

    for parts in (torch.arange(60)[None], torch.randperm(60).view(3, 20)):
        bundle.take_statistics(parts)
        got = [layers[1].running_mean, layers[1].running_var, layers[5].running_mean, layers[5].running_var]
        means = [torch.stack(of_parts).mean(0) for of_parts in zip(*(expected(x[part]) for part in parts), strict=True)]
        torch.testing.assert_close(got, means)
    assert all(torch.equal(p, state[name]) for name, p in head.named_parameters())
    loss = F.cross_entropy(head.eval()(x), bundle.targets[:, 0])
    assert bundle.exact_losses(7).item() == pytest.approx(loss.item(), rel=1e-12)


def test_statistics_are_of_every_sample_once(monkeypatch):
    seen = []
    monkeypatch.setattr(Bundle, "take_statistics", lambda self, batches: seen.extend(torch.cat(list(batches)).tolist()))
    dib.measure(convolutional(), 0, toy(shape=(1, 5, 5)), 3, convolutional, Tuned(8), batch_size=40)
    assert sorted(seen) == list(range(90))


def test_exact_losses_are_those_of_eval_mode():
    torch.manual_seed(0)
    split = toy(shape=(1, 5, 5))
    those = [convolutional().train() for _ in range(2)]
    bundle = Bundle({0: those}, {0: split.x.__getitem__}, split.labels[None], {0: [0, 0]})
    for size in (1, 40, 90):
        losses = bundle.exact_losses(size)
        expected = [F.cross_entropy(head.eval()(split.x), split.labels).item() for head in those]
        assert losses.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("build", [plain, convolutional])
@pytest.mark.parametrize("recipe", [Thesis(partial(torch.optim.SGD, lr=0.1), 2), Tuned(8)])
def test_what_is_frozen_stays_as_it_was_constructed(build, recipe):
    torch.manual_seed(0)
    split = toy(shape=(6,) if build is plain else (1, 5, 5))
    those = [build() for _ in range(recipe.starts(build()))]
    for head in those:
        frozen(next(m for m in head.modules() if isinstance(m, (nn.Linear, nn.Conv2d))))
    before = [copy.deepcopy(dict(head.named_parameters())) for head in those]
    bundle = Bundle({0: those}, {0: split.x.__getitem__}, split.labels[None], {0: [0] * len(those)})
    recipe.train(bundle, heads.parameter_sizes(those[0]), 40, torch.Generator().manual_seed(0))
    trained = {n: p[0] for n, p in bundle.stacks.items()} if bundle.plain else dict(those[0].named_parameters())
    for name, p in trained.items():  # of the start that was kept, whichever it is
        assert any(torch.equal(p, own[name]) for own in before) != before[0][name].requires_grad


# Encoders


def test_kept_encodings_of_images_keep_their_channels_last():
    x = torch.randn(20, 1, 5, 5)
    encode = heads.encoder(nn.Sequential(nn.Conv2d(1, 3, 2)), x.__getitem__, batches(20), 2**20)
    assert encode(torch.arange(4)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("keep_bytes", [2**20, 20 * 3 * 4, 20 * 3 * 4 - 1, 0])
def test_encodings_are_computed_once_if_they_fit(keep_bytes):
    blocks, calls, x = nn.Sequential(nn.Linear(5, 3)), [], torch.randn(20, 5)
    blocks[0].register_forward_hook(lambda *_: calls.append(1))
    encode = heads.encoder(blocks, x.__getitem__, batches(20, 10), keep_bytes)
    for _ in range(4):
        torch.testing.assert_close(encode(torch.arange(7)), blocks[0](x[:7]).detach())
    fits = keep_bytes >= 20 * 3 * 4
    assert len(calls) == 4 + 1 + (2 if fits else 4)  # the test's, one to see the size, then the batches or each call


def test_plain_splits_are_found_together():
    assert heads.groups(plain(), [0, 1, 2, 3], set()) == [[0, 1, 2, 3]]
    assert heads.groups(plain(), [0, 1, 2, 3], {3}) == [[0, 1, 2], [3]]
    assert heads.groups(convolutional(), [0, 1, 2], set()) == [[0], [1, 2]]
    assert heads.groups(convolutional(), [0, 1, 2], {1, 2}) == [[0], [1], [2]]
    assert heads.groups(drawing(), [0, 1, 3], set()) == [[0], [1], [3]]


def test_an_optimum_is_found_where_its_features_fit_in_float64(monkeypatch):
    """Else heads are trained, which come near it."""
    assert heads.optimum_fits(plain()[3:], 2**27)  # times 4 features of 8 bytes
    assert not heads.optimum_fits(plain()[3:], 2**27 + 1)
    assert not heads.optimum_fits(plain()[2:], 90)
    torch.manual_seed(0)
    split, model = toy(), plain()
    optimum = dib.measure(model, 3, split, 3, plain, Tuned(60), keep_bytes=0)
    monkeypatch.setattr(heads, "OPTIMUM_BYTES", 0)
    trained = dib.measure(model, 3, split, 3, plain, Tuned(60))
    for best, head in zip(optimum, trained, strict=True):
        assert best.loss != head.loss
        assert best.loss - 1e-4 <= head.loss <= best.loss + 0.02


def test_clusters_are_told_by_every_recipe():
    """What all of this is for: heads of a network with much to tell find it."""
    split = clusters(120, 6, 3, spread=0.05)
    for recipe in (Tuned(100), Thesis(partial(torch.optim.Adam, lr=0.05), 60)):
        build = partial(models.build, "MLP", (6,), 3, widths=(8,), nonlinearity="Tanh")
        y, *_ = dib.measure(build(), 0, split, 3, build, recipe, batch_size=40)
        assert y.loss < 0.02


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Bounded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


@pytest.mark.parametrize("layer", [Residual(nn.Linear(3, 3), nn.Tanh()), Bounded(3, 3)])
def test_layers_with_a_forward_of_their_own_are_not_plain(layer):
    assert not heads.is_plain(nn.Sequential(layer, nn.Linear(3, 3)))


def test_a_flatten_of_some_dimensions_is_not_plain():
    assert not heads.is_plain(nn.Sequential(nn.Flatten(2), nn.Linear(9, 3)))


def test_inputs_are_not_standardised_behind_a_flatten_of_some_dimensions():
    decoder = nn.Sequential(nn.Flatten(2), nn.Linear(9, 3), nn.Flatten(), nn.Linear(6, 3))
    encode = torch.randn(20, 2, 3, 3).__getitem__
    assert heads.standardised(decoder, encode, batches(20)) is encode


@pytest.mark.parametrize("steps", range(1, 8))
def test_few_steps_are_enough_or_refused(steps):
    try:
        found, _ = found_and_alone(plain, (6,), [0], steps)
    except ValueError as refusal:
        assert "steps" in str(refusal)  # noqa: PT017
    else:
        assert found.isfinite().all()


@pytest.mark.parametrize("make", [partial(Tuned, 0), partial(Thesis, torch.optim.SGD, 0)])
def test_no_steps_are_refused(make):
    with pytest.raises(ValueError, match="at least 1"):
        dib.measure(plain(), 0, toy(), 3, plain, make())


def test_the_optimum_for_dead_features_without_bias():
    z, labels = torch.zeros(40, 4), torch.arange(40) % 3
    (loss,) = heads.optima(nn.Sequential(nn.Linear(4, 3, bias=False)), z.__getitem__, batches(40), labels[None])
    assert loss == pytest.approx(math.log(3))


def test_the_optimum_of_sparse_features():
    """Some are nearly always 0, and then tell the class for sure."""
    torch.manual_seed(0)
    z = torch.randn(400, 30).relu() * (torch.rand(400, 30) < 0.05)
    labels = (z @ torch.randn(30, 3)).argmax(1)
    labels = torch.where(torch.rand(400) < 0.1, torch.randint(3, (400,)), labels)
    (loss,) = heads.optima(nn.Sequential(nn.Linear(30, 3)), z.__getitem__, batches(400), labels[None])
    assert loss <= newton_optimum(z, labels) + dib.BEATEN  # which no figure shows


def test_refuses_encodings_that_are_not_finite():
    decoder, z = nn.Sequential(nn.Linear(4, 3)), torch.full((20, 4), math.nan)
    with pytest.raises(ValueError, match="the encodings of a linear decoder are not finite"):
        heads.optima(decoder, z.__getitem__, batches(20), torch.zeros(1, 20, dtype=torch.int64))


def test_the_optimum_of_heavy_tails_and_few_wrong_labels():
    """L-BFGS alone ends 0.01 nats above it, and does not know."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1000, 80, generator=generator, dtype=torch.float64) ** 3
    labels = (z @ torch.randn(80, 5, generator=generator, dtype=torch.float64)).argmax(1)
    wrong = torch.rand(1000, generator=generator) < 0.02
    labels = torch.where(wrong, torch.randint(5, (1000,), generator=generator), labels)
    (loss,) = heads.optima(nn.Sequential(nn.Linear(80, 5)).double(), z.__getitem__, batches(1000), labels[None])
    assert loss <= newton_optimum(z, labels, within=1e-6) + dib.BEATEN


def test_inputs_are_not_standardised_before_a_weight_that_is_used_again():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    encode = torch.randn(20, 4).__getitem__
    assert heads.standardised(nn.Sequential(first, nn.Tanh(), second), encode, batches(20)) is encode


def test_a_norm_whose_scale_begins_at_0_is_not_absorbed():
    decoder = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))
    assert heads.is_linear(decoder)
    nn.init.zeros_(decoder[0].weight)
    assert not heads.is_linear(decoder)


def test_a_decoder_that_begins_in_place_is_not_plain():
    assert not heads.is_plain(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)))
    assert not heads.is_plain(nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(4, 3)))
