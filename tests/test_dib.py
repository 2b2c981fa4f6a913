import copy
import math
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

import dib
import heads as engine
import models
from relabel import relabel
from tests.toys import Toy, clusters
from tests.yardsticks import train_alone

SGD = partial(torch.optim.SGD, lr=0.1)
SHARED = nn.ReLU()


def plain() -> nn.Sequential:
    return models.build("MLP", (6,), 3, widths=(5, 4), nonlinearity="Tanh").double()


def convolutional() -> nn.Sequential:
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3))
    return nn.Sequential(conv, nn.Flatten(), nn.Linear(12, 3)).double()


def drawing() -> nn.Sequential:
    """Stochastic depth, as in ConvNeXt, and dropout draw at every training step."""
    return nn.Sequential(nn.Linear(6, 6), StochasticDepth(0.4, "row"), nn.Dropout(0.2), nn.Linear(6, 3)).double()


def toy(N: int = 90, shape: tuple[int, ...] = (6,)) -> Toy:
    split = clusters(N, math.prod(shape), 3)
    return Toy(split.x.double().view(N, *shape), split.labels)


@pytest.mark.parametrize(
    ("build", "shape", "ks", "forward"),
    [
        (plain, (6,), [0], "stacked"),
        (plain, (6,), [0, 2, 3], "stacked"),
        (plain, (2, 3), [1, 3], "stacked"),
        (convolutional, (1, 5, 5), [0], "one_by_one"),
        (convolutional, (1, 5, 5), [1], "stacked"),
        (drawing, (6,), [0], "one_by_one"),
    ],
)
def test_heads_trained_together_are_what_each_would_be_alone(build, shape, ks, forward, monkeypatch):
    """The same start and the same batches, in float64: the loss of a head does not know of the others."""
    used = Counter()
    for name in ("stacked", "one_by_one"):
        path = getattr(engine, name)
        monkeypatch.setattr(engine, name, lambda *a, name=name, path=path: used.update([name]) or path(*a))
    torch.manual_seed(0)
    split, model, epochs = toy(shape=shape), build(), 30
    _, targets = dib.label(split.labels, 3, labelings=1, seed=0)
    heads = {k: [build()[k:].eval() for _ in targets] for k in ks}
    starts = copy.deepcopy(heads)
    encoders = {k: model[:k].eval()(split.x).detach().__getitem__ for k in ks}
    torch.manual_seed(7)
    every = {k: list(targets) for k in ks}
    loss, drop = engine.train(heads, encoders, every, SGD, epochs, 40, torch.Generator().manual_seed(5))
    loss, drop = loss.view(len(ks), -1), drop.view(len(ks), -1)
    assert set(used) == {forward}, f"the heads took the path {used}"
    for i, k in enumerate(ks):
        for j, head in enumerate(starts[k]):
            torch.manual_seed(7)
            generator = torch.Generator().manual_seed(5)
            final, running = train_alone(model[:k], head, split.x, targets[j], SGD, epochs, 40, generator)
            assert loss[i, j].item() == pytest.approx(final, rel=1e-9)
            assert drop[i, j].item() == pytest.approx(running[-4] - running[-1], abs=1e-9)


@pytest.mark.parametrize(("build", "shape"), [(plain, (6,)), (convolutional, (1, 5, 5))])
def test_splits_measured_together_are_what_each_is_alone(build, shape):
    split, model = toy(shape=shape), build()
    ks = [2, 0, 1]
    together = dib.measure_splits(model, ks, split, 3, build, SGD, epochs=5, batch_size=40, seed=4)
    assert list(together) == [0, 1, 2]
    for k in ks:
        for got, expected in zip(together[k], dib.measure(model, k, split, 3, build, SGD, 5, 40, 1, 4), strict=True):
            assert got[:3] == expected[:3]
            assert got[3:] == pytest.approx(expected[3:], rel=1e-9)


def test_stacked_agrees_with_one_by_one():
    torch.manual_seed(0)
    heads = [nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False), nn.GELU(), nn.Linear(5, 3)) for _ in range(4)]
    heads = [head.double() for head in heads]
    x = torch.randn(7, 3, 2, 2, dtype=torch.float64)
    a, b = engine.stacked({0: heads}, engine.stack_parameters(heads), {0: x}), engine.one_by_one(heads, {0: x})
    assert a.shape == (4, 3, 7)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a[2], heads[2](x).T, rtol=1e-12, atol=1e-12)


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
    assert engine.is_plain(nn.Sequential(*layers)) is expected


def test_entropy_is_empirical():
    assert dib.entropy(torch.tensor([0, 0, 0, 1]), 3) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert dib.entropy(torch.tensor([1, 1]), 2) == 0
    assert dib.entropy(torch.arange(8) % 4, 4) == pytest.approx(math.log(4))


def test_labelings():
    split = toy()
    keys, targets = dib.label(split.labels, 3, labelings=3, seed=0)
    digits = relabel(split.labels, 3)
    D = digits.shape[1]
    assert keys == [(0, "y")] + [(p, k) for p in range(3) for k in range(D)]
    assert torch.equal(targets[0], split.labels)
    assert torch.equal(targets[1 : 1 + D], digits.T)
    assert torch.equal(dib.label(split.labels, 3, labelings=2, seed=0)[1], targets[: 1 + 2 * D])
    for p in (1, 2):  # a random enumeration: other digits, and again one index for each sample of a class
        other = targets[1 + p * D : 1 + (p + 1) * D].T
        assert not torch.equal(other, digits)
        for c in range(3):
            of_class = split.labels == c
            assert sorted(other[of_class].tolist()) == digits[of_class].tolist()


def measure(split: Toy, k: int = 2, model: nn.Sequential | None = None, **options) -> list[dib.Head]:
    torch.manual_seed(0)
    model = model or plain()
    return dib.measure(model, k, split, 3, plain, SGD, **{"epochs": 5, "batch_size": 40, **options})


def test_information_where_it_is_known():
    """One-hot inputs give the labels away and nothing else: H(Y), and nothing of the digits beyond the class."""
    labels = torch.arange(81) % 3  # every digit is independent of the class: 27 samples a class, 3 digits
    split = Toy(F.one_hot(labels, 3).repeat(1, 2).double(), labels)
    adam = partial(torch.optim.Adam, lr=0.02)
    y, *digits = dib.measure(plain(), 0, split, 3, plain, adam, epochs=200, batch_size=81)
    assert y.entropy - y.loss == pytest.approx(math.log(3), abs=0.01)
    assert [head.labeling for head in digits] == [0, 1, 2]
    for head in digits:
        assert head.entropy == pytest.approx(math.log(3))
        assert head.entropy - head.loss == pytest.approx(0, abs=0.01)


def test_loss_is_exact_whatever_the_batches():
    """With a learning rate of 0 every head keeps its initial weights: the loss is that of the fresh decoder."""
    split, still = toy(), partial(torch.optim.SGD, lr=0.0)
    a, b = (
        dib.measure(plain(), 0, split, 3, plain, still, epochs=1, batch_size=size, seed=3) for size in (len(split), 7)
    )
    assert [h.loss for h in a] == pytest.approx([h.loss for h in b], rel=1e-12)
    assert all(math.isnan(h.drop) for h in a)


def test_encodings_are_computed_once_if_they_fit():
    split, model, calls = toy(), plain(), []
    model.hidden1.register_forward_hook(lambda *_: calls.append(1))
    measure(split, model=model, epochs=5, batch_size=45)
    assert len(calls) == 1 + 2  # one sample to see the size, then two batches
    calls.clear()
    measure(split, model=model, epochs=5, batch_size=45, keep_bytes=0)
    assert len(calls) == 1 + 5 * 2 + 2  # at every step, and for the final loss


def test_kept_encodings_of_images_keep_their_channels_last(monkeypatch):
    layouts = []

    def train(heads: dict, encoders: dict, *_) -> tuple[torch.Tensor, torch.Tensor]:
        z = encoders[1](torch.arange(4))
        layouts.append(z.shape[1] > 1 and z.is_contiguous(memory_format=torch.channels_last))
        return (torch.zeros(len(heads[1])),) * 2

    def build() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 3)).double()

    monkeypatch.setattr(engine, "train", train)
    dib.measure(build(), 1, toy(shape=(1, 5, 5)), 3, build, SGD)
    assert layouts == [True]


def test_encodings_kept_or_recomputed():
    split = toy()
    assert [h.loss for h in measure(split)] == pytest.approx([h.loss for h in measure(split, keep_bytes=0)], rel=1e-12)


def test_repeats_and_draws_anew_with_seed_and_epoch():
    split = toy()
    assert measure(split) == measure(split)
    assert measure(split) != measure(split, seed=1)
    assert measure(split) != measure(split, model_epoch=1)


def test_every_split_and_every_head_has_a_start_of_its_own(monkeypatch):
    starts, batches = [], []

    def train(heads: dict, *rest) -> tuple[torch.Tensor, torch.Tensor]:
        starts.extend(head for of_split in heads.values() for head in of_split)
        batches.append(rest[-1].initial_seed())
        return (torch.zeros(2 * len(heads[2])),) * 2

    monkeypatch.setattr(engine, "train", train)
    for model_epoch in (0, 1):
        dib.measure_splits(plain(), [2, 3], toy(), 3, plain, SGD, model_epoch=model_epoch)
    assert len(set(batches)) == 2  # other batches in every epoch
    weights = [head.classifier.weight for head in starts]
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_a_first_layer_that_works_in_place_does_not_reach_the_other_heads():
    heads = [nn.Sequential(nn.ELU(inplace=True), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval() for _ in range(2)]
    x = torch.randn(5, 6)
    expected = [head(x.clone()).T for head in heads]
    torch.testing.assert_close(engine.one_by_one(heads, {1: x}), torch.stack(expected))


@pytest.mark.parametrize("build", [convolutional, drawing])
def test_leaves_everything_as_it_was(build):
    split = toy(shape=(1, 5, 5) if build is convolutional else (6,))
    torch.manual_seed(0)
    model = build().train()
    model(split.x).sum().backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    torch.manual_seed(11)
    random = torch.get_rng_state()
    heads = dib.measure(model, 1, split, 3, build, SGD, epochs=2)
    assert heads == dib.measure(model, 1, split, 3, build, SGD, epochs=2)
    assert torch.equal(random, torch.get_rng_state())
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_encoder_runs_in_eval_mode():
    """With BatchNorm in training mode the encodings, and so the loss, would depend on the batch."""
    split, still = toy(shape=(1, 5, 5)), partial(torch.optim.SGD, lr=0.0)
    model = convolutional().train()
    a, b = (
        [h.loss for h in dib.measure(model, 1, split, 3, convolutional, still, epochs=1, batch_size=size)]
        for size in (len(split), 7)
    )
    assert a == pytest.approx(b, rel=1e-9)


@pytest.mark.parametrize("k", [-1, 4])
def test_refuses_a_split_without_decoder(k):
    with pytest.raises(ValueError, match=rf"k must lie in 0\.\.3, so that a decoder is left, got {k}"):
        measure(toy(), k)


@pytest.mark.parametrize("bad", [{"epochs": 0}, {"labelings": 0}])
def test_refuses(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be at least 1, got 0"):
        measure(toy(), **bad)
