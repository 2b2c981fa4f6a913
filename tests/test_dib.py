import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

import dib
import heads
import models
from heads import Thesis, Tuned
from relabel import relabel
from tests.toys import Toy, clusters

SGD = Thesis(partial(torch.optim.SGD, lr=0.1), epochs=5)
STILL = Thesis(partial(torch.optim.SGD, lr=0.0), epochs=1)
RECIPES = pytest.mark.parametrize("recipe", [SGD, Tuned(steps=8)], ids=["thesis", "tuned"])


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


@RECIPES
@pytest.mark.parametrize(("build", "shape"), [(plain, (6,)), (convolutional, (1, 5, 5))])
def test_splits_measured_together_are_what_each_is_alone(build, shape, recipe):
    """Their losses; what is known of H_V comes from all splits measured."""
    torch.manual_seed(0)
    split, model = toy(shape=shape), build()
    splits = [2, 0, 1]
    together = dib.measure_splits(model, splits, split, 3, build, recipe, batch_size=40, seed=4)
    assert list(together) == [0, 1, 2]
    for k in splits:
        alone = dib.measure(model, k, split, 3, build, recipe, batch_size=40, seed=4)
        for got, expected in zip(together[k], alone, strict=True):
            assert got[:3] == expected[:3]
            # an optimum is found to 1e-4 nats, and where it is left there is a matter of rounding
            near = 1e-4 if recipe is not SGD and heads.is_linear(model[k:]) else 1e-9
            assert got.loss == pytest.approx(expected.loss, rel=1e-9, abs=near)
            assert got.bound <= expected.bound + near


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


def measure(split: Toy, k: int = 2, model: nn.Sequential | None = None, recipe=SGD, **options) -> list[dib.Head]:
    torch.manual_seed(0)
    return dib.measure(model or plain(), k, split, 3, plain, recipe, **{"batch_size": 40, **options})


@pytest.mark.parametrize("recipe", [Thesis(partial(torch.optim.Adam, lr=0.02), 200), Tuned(steps=100)])
def test_information_where_it_is_known(recipe):
    """One-hot inputs give the labels away and nothing else: H(Y), and nothing of the digits beyond the class."""
    labels = torch.arange(81) % 3  # every digit is independent of the class: 27 samples a class, 3 digits
    split = Toy(F.one_hot(labels, 3).repeat(1, 2).double(), labels)
    y, *digits = dib.measure(plain(), 0, split, 3, plain, recipe, batch_size=81)
    assert y.entropy - y.loss == pytest.approx(math.log(3), abs=0.01)
    assert [head.labeling for head in digits] == [0, 1, 2]
    for head in digits:
        assert head.entropy == pytest.approx(math.log(3))
        assert head.entropy - head.loss == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(("build", "shape", "k"), [(plain, (6,), 0), (plain, (6,), 3), (convolutional, (1, 5, 5), 1)])
def test_loss_is_exact_whatever_the_batches(build, shape, k):
    """With a learning rate of 0 every head keeps its initial weights: the loss is that of the fresh decoder. An encoder
    in training mode would, by its BatchNorm, give encodings that depend on the batch."""
    split, model = toy(shape=shape), build().train()
    a, b = (dib.measure(model, k, split, 3, build, STILL, batch_size=size, seed=3) for size in (len(split), 7))
    assert [h.loss for h in a] == pytest.approx([h.loss for h in b], rel=1e-9)
    torch.manual_seed(dib.stream("head", 0, 0, k, 3, 0))
    head = build()[k:].eval()
    expected = F.cross_entropy(head(model.eval()[:k](split.x)), split.labels)
    assert a[0].loss == pytest.approx(expected.item(), rel=1e-9)


@RECIPES
def test_encodings_kept_or_recomputed(recipe):
    split = toy()
    kept, again = measure(split, recipe=recipe), measure(split, recipe=recipe, keep_bytes=0)
    assert [h.loss for h in kept] == pytest.approx([h.loss for h in again], rel=1e-9)


@RECIPES
def test_repeats_and_draws_anew_with_seed_and_epoch(recipe):
    split = toy()
    assert measure(split, recipe=recipe) == measure(split, recipe=recipe)
    assert measure(split, recipe=recipe) != measure(split, recipe=recipe, seed=1)
    assert measure(split, recipe=recipe) != measure(split, recipe=recipe, model_epoch=1)


@RECIPES
@pytest.mark.parametrize(("build", "shape"), [(convolutional, (1, 5, 5)), (drawing, (6,)), (plain, (6,))])
def test_leaves_everything_as_it_was(build, shape, recipe):
    split = toy(shape=shape)
    torch.manual_seed(0)
    model = build().train()
    model[-1].eval()
    model(split.x).sum().backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    torch.manual_seed(11)
    random = torch.get_rng_state()
    heads = dib.measure_splits(model, [0, 1], split, 3, build, recipe)
    assert heads == dib.measure_splits(model, [0, 1], split, 3, build, recipe)
    assert torch.equal(random, torch.get_rng_state())
    assert all(m.training == (m is not model[-1]) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


# Random streams


def test_streams_differ():
    words = [("a", 0, 1), ("a", 0, 1, 0, 0), ("a", 0, 1, 0), ("b", 0, 1), ("a", 1, 0), ("a", 0), ("a", "0", 1)]
    assert len({dib.stream(*those) for those in words}) == len(words)
    assert dib.stream("a", 0, 1) == dib.stream("a", 0, 1)
    assert all(0 <= dib.stream(*those) < 2**64 for those in words)


def test_every_purpose_has_a_stream_of_its_own(monkeypatch):
    streams, stream = {}, dib.stream
    monkeypatch.setattr(dib, "stream", lambda *words: streams.setdefault(words, stream(*words)))
    for model_epoch in (0, 1):
        dib.measure_splits(plain(), [1, 2], toy(), 3, plain, Tuned(8), labelings=2, model_epoch=model_epoch)
    assert {words[0] for words in streams} == {"enumerations", "reference", "again", "head", "batches"}
    assert len(set(streams.values())) == len(streams)
    J = 1 + 2 * 4  # 28 to 81 samples of the largest class: four digits
    assert sum(words[0] == "head" for words in streams) == 2 * 2 * 8 * J  # epochs, splits, starts
    assert sum(words[0] == "batches" for words in streams) == 2  # the same batches for all heads of an epoch
    assert sum(words[0] == "enumerations" for words in streams) == 1  # and the same enumerations in every epoch


@RECIPES
def test_every_head_and_every_start_has_weights_of_its_own(monkeypatch, recipe):
    weights, batches = [], []

    def train(recipe, bundle, sizes: dict, batch_size: int, generator: torch.Generator) -> list[float]:
        weights.extend(head.classifier.weight for head in bundle.modules())
        batches.append(generator.initial_seed())
        return [0.0] * (len(bundle.modules()) // recipe.starts(plain()))

    monkeypatch.setattr(type(recipe), "train", train)
    for model_epoch in (0, 1):
        dib.measure_splits(plain(), [1, 2], toy(), 3, plain, recipe, model_epoch=model_epoch)
    assert len(set(batches)) == 2  # other batches in every epoch
    assert len(weights) == 2 * 2 * 5 * recipe.starts(plain())
    assert len({tuple(weight.flatten().tolist()) for weight in weights}) == len(weights)


# What is known without training


def layers(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3, bias=bias))


def test_bounds_by_hand():
    """The original labels and a digit, of three splits."""
    losses, entropies = [[1.0, 0.5], [0.8, 0.9], [0.9, 0.7]], [1.05, 0.6]
    assert dib.bound(layers(), layers(), [0, 1, 2], losses, entropies, own_loss=0.85) == {
        2: [0.85, 0.6],  # the network itself, a constant
        1: [0.8, 0.6],  # the head, a constant
        0: [0.8, 0.5],  # a block before the head of 1, the head
    }
    assert dib.bound(layers(), layers(), [0, 2], [[1.0, 0.5], [0.8, 0.1]], entropies, own_loss=0.85) == {
        2: [0.8, 0.1],
        0: [0.8, 0.1],
    }
    assert dib.bound(layers(), layers(), [1], [[1.0, 0.5]], entropies, own_loss=0.3) == {1: [0.3, 0.5]}  # y alone


def test_bounds_of_a_last_layer_without_bias():
    """Of the constants it can be the uniform distribution alone, however unbalanced the classes are."""
    losses, entropies = [[2.0, 1.5]], [0.2, 0.3]
    without = dib.bound(layers(bias=False), layers(bias=False), [0], losses, entropies, own_loss=9.0)
    assert without == {0: pytest.approx([math.log(3), math.log(3)])}
    assert dib.bound(layers(), layers(), [0], losses, entropies, own_loss=9.0) == {0: entropies}


def test_a_head_that_diverged_has_a_bound():
    losses = [[math.nan, 0.5], [math.nan, 0.7]]
    assert dib.bound(layers(), layers(), [0, 1], losses, [1.0, 1.0], own_loss=0.7) == {0: [0.7, 0.5], 1: [0.7, 0.7]}
    assert all(map(math.isnan, dib.bound(layers(), layers().append(nn.ReLU()), [0], [[math.nan]], [1.0], math.nan)[0]))


def test_the_constants_that_a_decoder_can_be():
    assert dib.constant_loss(nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(4, 3))), 0.4) == 0.4
    assert dib.constant_loss(nn.Sequential(nn.Linear(4, 5, bias=False)), 0.4) == pytest.approx(math.log(5))
    assert dib.constant_loss(layers().append(nn.ReLU()), 0.4) == math.inf
    frozen = layers()
    frozen[-1].weight.requires_grad_(False)
    assert dib.constant_loss(frozen, 0.4) == math.inf


def test_bounds_are_not_handed_on_across_a_parameter_that_blocks_share():
    """A block frozen as it is would freeze the deeper head, which is free to have other weights."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU())
    losses = [[2.0, 2.5], [1.0, 0.5], [0.8, 0.9]]
    handed = {2: [0.8, 0.9], 1: [0.8, 0.5], 0: [0.8, 0.5]}
    assert dib.bound(model, model, [0, 1, 2], losses, [1.0, 1.0], own_loss=1.7) == handed
    model[2].weight = model[0].weight
    assert dib.shared(model[0], model[2])
    assert not dib.shared(model[:2], model[1])
    across = dib.bound(model, model, [0, 1, 2], losses, [1.0, 1.0], own_loss=1.7)
    assert across == {2: [0.8, 0.9], 1: [0.8, 0.5], 0: [1.7, 2.5]}  # its own, and the network's


@RECIPES
@pytest.mark.parametrize(("build", "shape"), [(plain, (6,)), (convolutional, (1, 5, 5))])
def test_bounds_of_what_is_measured(build, shape, recipe):
    split, model = toy(shape=shape), build()
    found = dib.measure_splits(model, [0, 1, 2], split, 3, build, recipe, batch_size=40)
    own = F.cross_entropy(model.eval()(split.x), split.labels).item()
    for k, those in found.items():
        for j, head in enumerate(those):
            assert head.bound <= min(head.loss, head.entropy)
            assert all(head.bound <= deeper[j].bound for other, deeper in found.items() if other > k)
        assert those[0].bound <= own + 1e-12


def test_a_linear_split_is_measured_by_its_optimum():
    """It does not depend on the seed, and no other weights do better."""
    split, model = toy(), plain()
    a, b = (dib.measure(model, 3, split, 3, plain, Tuned(8), seed=seed) for seed in (0, 1))
    assert a == b
    trained = dib.measure(model, 3, split, 3, plain, Thesis(partial(torch.optim.Adam, lr=0.1), 100))
    assert all(head.loss <= other.loss + 1e-4 for head, other in zip(a, trained, strict=True))
    assert any(
        head.loss < other.loss for head, other in zip(a, dib.measure(model, 3, split, 3, plain, SGD), strict=True)
    )


def test_own_loss_is_exact_and_of_exactly_the_samples_given():
    split, model = toy(shape=(1, 5, 5)), convolutional()
    model(split.x)  # running statistics that are not those of a fresh network
    few = Toy(split.x[:37], split.labels[:37])
    with torch.no_grad():
        expected = [F.cross_entropy(model.eval()(s.x), s.labels).item() for s in (split, few)]
    for size in (1, 7, 90):
        losses = [dib.own_loss(model, [0], s.x.__getitem__, s.labels, size) for s in (split, few)]
        assert losses == pytest.approx(expected, rel=1e-12)


def test_how_many_heads_are_known_not_to_have_been_found():
    bit = math.log(2)
    pairs = [(0.5, 0.5), (0.5, 0.5 - 0.0009 * bit), (0.5, 0.5 - 0.0011 * bit), (0.5, 0.1), (math.nan, 0.5)]
    assert dib.beaten(dib.Head(0, 0, 1.0, loss, bound) for loss, bound in pairs) == 3 / 5


@pytest.mark.parametrize("k", [-1, 4])
def test_refuses_a_split_without_decoder(k):
    with pytest.raises(ValueError, match=rf"k must lie in 0\.\.3, so that a decoder is left, got {k}"):
        measure(toy(), k)


def test_refuses_no_labelings():
    with pytest.raises(ValueError, match="labelings must be at least 1, got 0"):
        measure(toy(), labelings=0)


def test_a_frozen_bias_leaves_no_known_constant():
    model = layers()
    model[-1].bias.requires_grad_(False)
    model[-1].bias.data = torch.tensor([10.0, 0.0, 0.0])
    assert dib.constant_loss(model, 0.4) == math.inf


def tied() -> nn.Sequential:
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    b.weight = a.weight
    return nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), nn.Linear(6, 3)).double()


def twice() -> nn.Sequential:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 3)).double()


@RECIPES
def test_layers_that_share_a_weight_are_measured(recipe):
    assert all(math.isfinite(head.loss) for head in dib.measure(tied(), 0, toy(), 3, tied, recipe))


def test_a_layer_used_twice_is_measured():
    assert all(math.isfinite(head.loss) for head in dib.measure(twice(), 1, toy(), 3, twice, Tuned(8)))


@RECIPES
def test_a_decoder_with_nothing_to_train_is_measured_as_it_is(recipe):
    """A fixed classifier, here the same in every network: its loss is H_V."""
    fixed = plain()[3].requires_grad_(False)

    def build() -> nn.Sequential:
        model = plain()
        model.classifier = copy.deepcopy(fixed)
        return model

    split, model = toy(), build()
    _, targets = dib.label(split.labels, 3, labelings=1, seed=0)
    with torch.no_grad():
        logits = model(split.x)
    expected = [F.cross_entropy(logits, target).item() for target in targets]
    found = dib.measure_splits(model, [2, 3], split, 3, build, recipe, batch_size=40)
    assert [head.loss for head in found[3]] == pytest.approx(expected, rel=1e-9)
    assert [head.bound for head in found[3]] == pytest.approx(expected, rel=1e-9)  # a constant is not in V
    assert all(a.bound <= b.bound for a, b in zip(found[2], found[3], strict=True))
    assert all(math.isfinite(head.loss) for head in found[2])


def test_refuses_a_fixed_decoder_that_is_not_the_models():
    with pytest.raises(ValueError, match=r"fresh\(\) freezes all of the decoder model\[2:\], with other values"):
        dib.measure(plain(), 2, toy(), 3, lambda: plain().requires_grad_(False), Tuned(8))


def test_a_decoder_without_parameters_is_measured_as_it_is():
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 3), nn.Tanh()).double()

    split, model = toy(), build()
    y, *_ = dib.measure(model, 1, split, 3, build, Tuned(8))
    assert y.loss == pytest.approx(F.cross_entropy(model(split.x), split.labels).item(), rel=1e-9)


def test_refuses_what_is_not_finite():
    """Of all samples: the one that is not is none of those that are looked at first."""
    split, model = toy(), plain()
    split.x[3] = 1e200
    own = partial(dib.own_loss, model, inputs=split.x.__getitem__, labels=split.labels, batch_size=40)
    assert math.isfinite(own([0, 1, 2, 3]))
    split.x[3] = math.inf
    with pytest.raises(ValueError, match="the encodings of split 0 are not finite"):
        own([0, 3])
    with pytest.raises(ValueError, match="the outputs of the model are not finite"):
        own([])


def test_a_frozen_model_is_measured_with_what_fresh_trains():
    torch.manual_seed(0)
    model = plain()
    expected = dib.measure(model, 1, toy(), 3, plain, Tuned(8))
    assert dib.measure(model.requires_grad_(False), 1, toy(), 3, plain, Tuned(8)) == expected
    assert all(head.bound <= head.entropy for head in expected)


def test_bounds_by_the_network_itself_want_its_frozen_parameters():
    """Where fresh() draws others, its layers and its decoder are not in V; constants are."""
    model, reference = layers(), layers()
    losses, entropies = [[2.0, 1.5], [0.8, 0.9]], [1.05, 1.1]
    assert dib.bound(model, reference, [0, 1], losses, entropies, own_loss=0.7) == {1: [0.7, 0.9], 0: [0.7, 0.9]}
    frozen = reference[0].weight.requires_grad_(False)
    assert dib.bound(model, reference, [0, 1], losses, entropies, own_loss=0.7) == {1: [0.7, 0.9], 0: entropies}
    model[0].weight.data.copy_(frozen)
    assert dib.bound(model, reference, [0, 1], losses, entropies, own_loss=0.7) == {1: [0.7, 0.9], 0: [0.7, 0.9]}


@RECIPES
def test_frozen_parameters_that_are_drawn_anew_are_measured(recipe):
    def build() -> nn.Sequential:
        model = plain()
        model.hidden2[0].weight.requires_grad_(False)
        return model

    found = dib.measure_splits(build(), [0, 3], toy(), 3, build, recipe)
    assert all(head.bound == min(head.loss, head.entropy) for head in found[0])
