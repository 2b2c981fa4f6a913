import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dib
from layerwise.probes import Task, Thesis, Tuned
from layerwise.probes.decoders import is_linear
from layerwise.samples import Samples
from layerwise.schema import PROVED
from layerwise.streams import Streams, make_seed
from relabel import relabel
from tests.toys import make_conv_net, make_mlp, make_random_net, make_toy_samples

SGD = Thesis(partial(torch.optim.SGD, lr=0.1), epochs=5)
UNTRAINED = Thesis(partial(torch.optim.SGD, lr=0.0), epochs=1)
PROBES = pytest.mark.parametrize("probes", [SGD, Tuned(steps=8)], ids=["thesis", "tuned"])


@PROBES
@pytest.mark.parametrize(("make_model", "shape"), [(make_mlp, (6,)), (make_conv_net, (1, 5, 5))])
def test_splits_measured_together_are_what_each_is_alone(make_model, shape, probes):
    """Each split has the same losses. `upper` may be smaller, as deeper splits bound it."""
    torch.manual_seed(0)
    samples, model = make_toy_samples(shape=shape), make_model()
    splits = [2, 0, 1]
    together = dib.measure_splits(model, splits, samples, 3, make_model, probes=probes, batch_size=40, seed=4)
    assert list(together) == [0, 1, 2]
    for k in splits:
        alone = dib.measure(model, k, samples, 3, make_model, probes=probes, batch_size=40, seed=4)
        for got, expected in zip(together[k], alone, strict=True):
            assert got[:3] == expected[:3]
            # an optimum is computed to 1e-5 nats, and rounding decides after which iteration
            near = PROVED if probes is not SGD and is_linear(model[k:]) else 1e-9
            assert got.loss == pytest.approx(expected.loss, rel=1e-9, abs=near)
            assert got.upper <= expected.upper + near


def test_entropy_is_that_of_the_empirical_distribution():
    expected = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert dib.compute_entropy(torch.tensor([0, 0, 0, 1]), 3) == pytest.approx(expected)
    assert dib.compute_entropy(torch.tensor([1, 1]), 2) == 0
    assert dib.compute_entropy(torch.arange(8) % 4, 4) == pytest.approx(math.log(4))


def test_labelings_are_the_labels_and_the_digits_of_every_enumeration():
    samples = make_toy_samples()
    keys, targets = dib.make_labelings(samples.labels, 3, 3, False, seed=0)
    digits = relabel(samples.labels, 3)
    D = digits.shape[1]
    assert keys == [(0, "y")] + [(p, k) for p in (1, 2, 3) for k in range(D)]
    assert torch.equal(targets[0], samples.labels)
    assert torch.equal(dib.make_labelings(samples.labels, 3, 2, False, seed=0)[1], targets[: 1 + 2 * D])
    of_enumeration = targets[1:].view(3, D, -1).transpose(1, 2)  # (enumerations, N, D)
    for p, other in enumerate(of_enumeration):  # each sample of a class has a different number
        assert not torch.equal(other, digits)
        assert all(not torch.equal(other, one) for one in of_enumeration[:p])
        for c in range(3):
            of_class = samples.labels == c
            assert sorted(other[of_class].tolist()) == digits[of_class].tolist()


def test_an_enumeration_in_data_order_is_algorithm_1():
    samples = make_toy_samples()
    keys, targets = dib.make_labelings(samples.labels, 3, "data", False, seed=0)
    digits = relabel(samples.labels, 3)
    assert keys == [(0, "y")] + [(0, k) for k in range(digits.shape[1])]
    assert torch.equal(targets[1:], digits.T)


def test_shuffled_labels_are_the_labels_in_an_order_that_depends_on_the_seed():
    samples = make_toy_samples()
    keys, targets = dib.make_labelings(samples.labels, 3, 1, True, seed=0)
    without = dib.make_labelings(samples.labels, 3, 1, False, seed=0)
    assert keys[1] == (0, "shuffled")
    assert [keys[0], *keys[2:]] == without[0]
    assert torch.equal(torch.cat([targets[:1], targets[2:]]), without[1])
    assert torch.equal(targets[1].bincount(), samples.labels.bincount())
    assert not torch.equal(targets[1], samples.labels)
    assert not torch.equal(targets[1], dib.make_labelings(samples.labels, 3, 1, True, seed=1)[1][1])


def measure(samples: Samples, k: int = 2, probes: Tuned | Thesis = SGD, **options) -> list[dib.ProbeResult]:
    """Measure an MLP that is always the same."""
    torch.manual_seed(0)
    return dib.measure(make_mlp(), k, samples, 3, make_mlp, probes=probes, **{"batch_size": 40, **options})


@pytest.mark.parametrize("probes", [Thesis(partial(torch.optim.Adam, lr=0.02), 200), Tuned(steps=100)])
def test_information_where_it_is_known(probes):
    """One-hot inputs determine the labels and nothing else: information is H(Y), and 0 about the digits."""
    labels = torch.arange(81) % 3  # 27 samples a class have 3 digits, which are independent of the class
    samples = Samples(F.one_hot(labels, 3).repeat(1, 2).double(), labels)
    options = {"probes": probes, "enumerations": "data", "controls": False, "batch_size": 81}
    y, *digits = dib.measure(make_mlp(), 0, samples, 3, make_mlp, **options)
    assert y.entropy - y.loss == pytest.approx(math.log(3), abs=0.01)
    assert [probe.labeling for probe in digits] == [0, 1, 2]
    for probe in digits:
        assert probe.entropy == pytest.approx(math.log(3))
        assert probe.entropy - probe.loss == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(
    ("make_model", "shape", "k"), [(make_mlp, (6,), 0), (make_mlp, (6,), 3), (make_conv_net, (1, 5, 5), 1)]
)
def test_loss_is_exact_for_every_batch_size(make_model, shape, k):
    """At a learning rate of 0 a probe keeps its initial weights, so the loss is that of a decoder as constructed.

    The BatchNorm of an encoder in training mode would make encodings depend on the batch.
    """
    samples, model = make_toy_samples(shape=shape), make_model().train()
    measured = partial(dib.measure, model, k, samples, 3, make_model, probes=UNTRAINED, seed=3)
    a, b = measured(batch_size=len(samples)), measured(batch_size=7)
    assert [probe.loss for probe in a] == pytest.approx([probe.loss for probe in b], rel=1e-9)
    torch.manual_seed(make_seed("head", 0, 0, k, 3, 0))
    probe = make_model()[k:].eval()
    expected = F.cross_entropy(probe(model.eval()[:k](samples.inputs)), samples.labels)
    assert a[0].loss == pytest.approx(expected.item(), rel=1e-9)


@PROBES
def test_cached_and_recomputed_encodings_give_the_same_losses(probes):
    samples = make_toy_samples()
    cached, again = measure(samples, probes=probes), measure(samples, probes=probes, cache_bytes=0)
    assert [probe.loss for probe in cached] == pytest.approx([probe.loss for probe in again], rel=1e-9)


@PROBES
def test_results_repeat_and_depend_on_seed_and_epoch(probes):
    samples = make_toy_samples()
    assert measure(samples, probes=probes) == measure(samples, probes=probes)
    assert measure(samples, probes=probes) != measure(samples, probes=probes, seed=1)
    assert measure(samples, probes=probes) != measure(samples, probes=probes, epoch=1)


@PROBES
@pytest.mark.parametrize(
    ("make_model", "shape"), [(make_conv_net, (1, 5, 5)), (make_random_net, (6,)), (make_mlp, (6,))]
)
def test_the_model_its_gradients_and_the_random_state_stay_as_they_were(make_model, shape, probes):
    samples = make_toy_samples(shape=shape)
    torch.manual_seed(0)
    model = make_model().train()
    model[-1].eval()
    model(samples.inputs).sum().backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    torch.manual_seed(11)
    random = torch.get_rng_state()
    found = dib.measure_splits(model, [0, 1], samples, 3, make_model, probes=probes)
    assert found == dib.measure_splits(model, [0, 1], samples, 3, make_model, probes=probes)
    assert torch.equal(random, torch.get_rng_state())
    assert all(m.training == (m is not model[-1]) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


# Random streams


def test_different_words_give_different_seeds():
    different = [("a", 0, 1), ("a", 0, 1, 0, 0), ("a", 0, 1, 0), ("b", 0, 1), ("a", 1, 0), ("a", 0), ("a", "0", 1)]
    assert len({make_seed(*words) for words in different}) == len(different)
    assert make_seed("a", 0, 1) == make_seed("a", 0, 1)
    assert all(0 <= make_seed(*words) < 2**64 for words in different)


def test_every_purpose_has_a_stream_of_its_own(monkeypatch):
    seeds = {}
    for place in ("dib.make_seed", "layerwise.streams.make_seed"):
        monkeypatch.setattr(place, lambda *words: seeds.setdefault(words, make_seed(*words)))
    for epoch in (0, 1):
        options = {"probes": Tuned(8), "enumerations": 2, "held_out": make_toy_samples(60), "epoch": epoch}
        dib.measure_splits(make_mlp(), [1, 2], make_toy_samples(), 3, make_mlp, **options)
    words_of_all = {"enumerations", "shuffled", "halves", "reference", "again", "head", "batches"}
    assert {words[0] for words in seeds} == words_of_all
    assert len(set(seeds.values())) == len(seeds)
    J = 2 + 2 * 4  # the largest class has 28 to 81 samples: four digits
    assert sum(words[0] == "head" for words in seeds) == 2 * 2 * 8 * J  # epochs, splits, starts
    assert sum(words[0] == "batches" for words in seeds) == 2  # the same batches for all probes of an epoch
    for word in ("enumerations", "shuffled", "halves"):  # the same in every epoch
        assert sum(words[0] == word for words in seeds) == 1


@PROBES
def test_every_probe_and_every_start_has_weights_of_its_own(monkeypatch, probes):
    weights, batches = [], []

    def train(probes, group, sizes: dict, batch_size: int, generator: torch.Generator, recorder: None) -> Tensor:
        weights.extend(probe.classifier.weight for probe in group.modules())
        batches.append(generator.initial_seed())
        return torch.zeros(len(group.modules()) // probes.count_starts(make_mlp()))

    monkeypatch.setattr(type(probes), "train", train)
    for epoch in (0, 1):
        dib.measure_splits(make_mlp(), [1, 2], make_toy_samples(), 3, make_mlp, probes=probes, epoch=epoch)
    assert len(set(batches)) == 2  # other batches in every epoch
    assert len(weights) == 2 * 2 * 6 * probes.count_starts(make_mlp())
    assert len({tuple(weight.flatten().tolist()) for weight in weights}) == len(weights)


# What is known without training


def make_net(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3, bias=bias))


def make_task(
    model: nn.Sequential, reference: nn.Sequential, splits: list[int], inputs: Callable | None = None
) -> Task:
    """Return a task for functions that train no probes."""
    return Task(model, reference, splits, inputs, None, None, Streams(0, 0, torch.device("cpu")))


def compute_upper(model: nn.Sequential, reference: nn.Sequential, splits: list[int], *rest, **options) -> dict:
    return dib.compute_upper(make_task(model, reference, splits), *rest, **options)


def test_upper_computed_by_hand():
    """Three splits are measured, for the original labels and a digit."""
    losses, entropies = [[1.0, 0.5], [0.8, 0.9], [0.9, 0.7]], [1.05, 0.6]
    assert compute_upper(make_net(), make_net(), [0, 1, 2], losses, entropies, network_loss=0.85) == {
        2: [0.85, 0.6],  # of the network itself, of a constant
        1: [0.8, 0.6],  # of the probe, of a constant
        0: [0.8, 0.5],  # of a block and the probe of split 1, of the probe
    }
    assert compute_upper(make_net(), make_net(), [0, 2], [[1.0, 0.5], [0.8, 0.1]], entropies, network_loss=0.85) == {
        2: [0.8, 0.1],
        0: [0.8, 0.1],
    }
    only_y = compute_upper(make_net(), make_net(), [1], [[1.0, 0.5]], entropies, network_loss=0.3)
    assert only_y == {1: [0.3, 0.5]}  # the network itself counts for the original labels


def test_upper_of_a_decoder_without_bias():
    """The only constant it can be is the uniform distribution, also if the classes are unbalanced."""
    losses, entropies = [[2.0, 1.5]], [0.2, 0.3]
    without = compute_upper(make_net(bias=False), make_net(bias=False), [0], losses, entropies, network_loss=9.0)
    assert without == {0: pytest.approx([math.log(3), math.log(3)])}
    assert compute_upper(make_net(), make_net(), [0], losses, entropies, network_loss=9.0) == {0: entropies}


def test_lower_computed_by_hand():
    """Bounds go from shallow splits to deep ones. None exceeds `upper`."""
    task, lowers = make_task(make_net(), make_net(), [0, 1, 2]), [[0.2, 0.0], [0.1, 0.4], [0.3, 0.1]]
    uppers = {0: [0.5, 0.6], 1: [0.6, 0.7], 2: [0.9, 0.4 - 5e-7]}
    assert dib.compute_lower(task, lowers, uppers) == {0: [0.2, 0.0], 1: [0.2, 0.4], 2: [0.3, 0.4 - 5e-7]}


def test_a_lower_that_exceeds_upper_by_more_than_rounding_is_not_used():
    task, uppers = make_task(make_net(), make_net(), [0, 1]), {0: [0.5, 0.6, 0.7], 1: [0.6, 0.4, 0.8]}
    lowers = [[1e9, 0.5, math.nan], [0.1, 0.5, 0.7]]
    assert dib.compute_lower(task, lowers, uppers) == {0: [0.0, 0.5, 0.0], 1: [0.1, 0.0, 0.7]}


def test_lower_is_not_carried_to_a_split_whose_functions_are_not_in_v():
    model, reference = make_net(), make_net()
    reference[0].weight.requires_grad_(False)  # with other values than the model's
    lowers, uppers = [[0.4], [0.1]], {0: [0.5], 1: [0.5]}
    assert dib.compute_lower(make_task(model, reference, [0, 1]), lowers, uppers) == {0: [0.4], 1: [0.1]}
    model[0].weight.data.copy_(reference[0].weight)
    assert dib.compute_lower(make_task(model, reference, [0, 1]), lowers, uppers) == {0: [0.4], 1: [0.4]}


def test_a_probe_whose_loss_is_nan_has_an_upper():
    losses = [[math.nan, 0.5], [math.nan, 0.7]]
    found = compute_upper(make_net(), make_net(), [0, 1], losses, [1.0, 1.0], network_loss=0.7)
    assert found == {0: [0.7, 0.5], 1: [0.7, 0.7]}
    unknown = compute_upper(make_net(), make_net().append(nn.ReLU()), [0], [[math.nan]], [1.0], math.nan)
    assert all(map(math.isnan, unknown[0]))


def test_the_loss_of_the_best_constant_that_a_decoder_can_be():
    assert dib.compute_constant_loss(nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(4, 3))), 0.4) == 0.4
    assert dib.compute_constant_loss(nn.Sequential(nn.Linear(4, 5, bias=False)), 0.4) == pytest.approx(math.log(5))
    assert dib.compute_constant_loss(make_net().append(nn.ReLU()), 0.4) == math.inf
    frozen = make_net()
    frozen[-1].weight.requires_grad_(False)
    assert dib.compute_constant_loss(frozen, 0.4) == math.inf


def test_upper_does_not_include_deeper_splits_that_share_a_parameter_with_the_layers_before():
    """The layers before the deeper split stay as they are. The deeper probe trained the same parameter."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU())
    losses = [[2.0, 2.5], [1.0, 0.5], [0.8, 0.9]]
    found = compute_upper(model, model, [0, 1, 2], losses, [1.0, 1.0], network_loss=1.7)
    assert found == {2: [0.8, 0.9], 1: [0.8, 0.5], 0: [0.8, 0.5]}
    model[2].weight = model[0].weight
    assert dib.shares_any_parameter(model[0], model[2])
    assert not dib.shares_any_parameter(model[:2], model[1])
    found = compute_upper(model, model, [0, 1, 2], losses, [1.0, 1.0], network_loss=1.7)
    assert found == {2: [0.8, 0.9], 1: [0.8, 0.5], 0: [1.7, 2.5]}  # of the network itself, of the probe


@PROBES
@pytest.mark.parametrize(("make_model", "shape"), [(make_mlp, (6,)), (make_conv_net, (1, 5, 5))])
def test_upper_is_at_most_every_loss_that_is_known(make_model, shape, probes):
    samples, model = make_toy_samples(shape=shape), make_model()
    found = dib.measure_splits(model, [0, 1, 2], samples, 3, make_model, probes=probes, batch_size=40)
    own = F.cross_entropy(model.eval()(samples.inputs), samples.labels).item()
    for k, of_split in found.items():
        for j, probe in enumerate(of_split):
            assert 0 <= probe.lower <= probe.upper <= min(probe.loss, probe.entropy)
            assert all(probe.upper <= deeper[j].upper for other, deeper in found.items() if other > k)
        assert of_split[0].upper <= own + 1e-12


def test_a_linear_decoder_gets_its_optimum():
    """The optimum does not depend on the seed, and trained probes are not better."""
    samples, model = make_toy_samples(), make_mlp()
    find = partial(dib.measure, model, 3, samples, 3, make_mlp, enumerations="data", controls=False)
    a, b = (find(probes=Tuned(8), seed=seed) for seed in (0, 1))
    assert a == b
    trained = find(probes=Thesis(partial(torch.optim.Adam, lr=0.1), 100))
    assert all(probe.loss <= other.loss + PROVED for probe, other in zip(a, trained, strict=True))
    assert all(probe.lower <= other.loss for probe, other in zip(a, trained, strict=True))
    assert all(probe.loss - probe.lower <= PROVED for probe in a)
    briefly = find(probes=SGD)
    assert any(probe.loss < other.loss for probe, other in zip(a, briefly, strict=True))


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_a_split_before_a_norm_has_the_optimum_of_the_split_after_it(spread):
    """The outputs of the norm are float32, and their rounding adds a direction to them.

    spread: of the weights of the norm.
    """

    def make_model() -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))

    g, model = torch.Generator().manual_seed(0), make_model()
    for p in model[0].parameters():
        p.data += spread * torch.randn(8, generator=g)
    samples = Samples(torch.randn(200, 8, generator=g), torch.randint(3, (200,), generator=g))
    before, after = (dib.measure(model, k, samples, 3, make_model, controls=False) for k in (0, 1))
    for probe, deeper in zip(before, after, strict=True):
        assert probe.loss - probe.lower <= PROVED
        assert (probe.loss, probe.lower) == (deeper.loss, deeper.lower)


def test_probes_find_what_a_norm_of_the_network_with_a_weight_of_0_removes():
    """Labels follow from the feature that the norm of the network removes."""

    def make_model() -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))

    g, model, y = torch.Generator().manual_seed(0), make_model(), torch.arange(200) % 2
    x = torch.randn(200, 4, generator=g)
    x[:, 0], model[0].weight.data[0] = 9.0 * y, 0.0
    labels, *_ = dib.measure(model, 0, Samples(x, y), 2, make_model, controls=False)
    assert labels.loss <= PROVED


def test_the_loss_of_the_network_itself_is_exact():
    samples, model = make_toy_samples(shape=(1, 5, 5)), make_conv_net()
    model(samples.inputs)  # running statistics differ from those of a new network
    few = Samples(samples.inputs[:37], samples.labels[:37])
    with torch.no_grad():
        expected = [F.cross_entropy(model.eval()(s.inputs), s.labels).item() for s in (samples, few)]
    for size in (1, 7, 90):
        for given, loss in zip((samples, few), expected, strict=True):
            task = make_task(model, model, [0], given.inputs.__getitem__)
            found = dib.compute_network_loss(task, task.inputs, given.labels, size)
            assert found == pytest.approx(loss, rel=1e-12)


def test_the_share_of_probes_that_are_known_suboptimal():
    bit = math.log(2)
    pairs = [(0.5, 0.5), (0.5, 0.5 - 0.0009 * bit), (0.5, 0.5 - 0.0011 * bit), (0.5, 0.1), (math.nan, 0.5)]
    results = [dib.ProbeResult(0, 0, 1.0, loss, 0.0, upper) for loss, upper in pairs]
    held_out = dib.ProbeResult(0, "held-out", 1.0, 0.5, 0.0, 0.5)  # not counted
    assert dib.compute_suboptimal_share([*results, held_out]) == 3 / 5


@pytest.mark.parametrize("k", [-1, 4])
def test_a_split_that_leaves_no_decoder_is_refused(k):
    with pytest.raises(ValueError, match=rf"DIB: k .* got {k}"):
        measure(make_toy_samples(), k)


@pytest.mark.parametrize("enumerations", [0, "all", 1.5])
def test_less_than_one_enumeration_is_refused(enumerations):
    with pytest.raises(ValueError, match=f'enumerations must be "data" or .* at least 1, got {enumerations!r}'):
        measure(make_toy_samples(), enumerations=enumerations)


def test_a_decoder_with_a_frozen_bias_has_no_known_constant():
    model = make_net()
    model[-1].bias.requires_grad_(False)
    model[-1].bias.data = torch.tensor([10.0, 0.0, 0.0])
    assert dib.compute_constant_loss(model, 0.4) == math.inf


def make_tied_net() -> nn.Sequential:
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    b.weight = a.weight
    return nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), nn.Linear(6, 3)).double()


def make_net_with_a_layer_used_twice() -> nn.Sequential:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 3)).double()


@PROBES
def test_layers_that_share_a_weight_are_measured(probes):
    found = dib.measure(make_tied_net(), 0, make_toy_samples(), 3, make_tied_net, probes=probes)
    assert all(math.isfinite(probe.loss) for probe in found)


def test_a_layer_used_twice_is_measured():
    make_model = make_net_with_a_layer_used_twice
    found = dib.measure(make_model(), 1, make_toy_samples(), 3, make_model, probes=Tuned(8))
    assert all(math.isfinite(probe.loss) for probe in found)


@PROBES
def test_a_decoder_without_trainable_parameters_is_measured_as_it_is(probes):
    """The classifier is frozen, and the same in every network. Its loss is H_V."""
    frozen = make_mlp()[3].requires_grad_(False)

    def make_model() -> nn.Sequential:
        model = make_mlp()
        model.classifier = copy.deepcopy(frozen)
        return model

    samples, model = make_toy_samples(), make_model()
    _, targets = dib.make_labelings(samples.labels, 3, 1, True, seed=0)
    with torch.no_grad():
        logits = model(samples.inputs)
    expected = [F.cross_entropy(logits, target).item() for target in targets]
    found = dib.measure_splits(model, [2, 3], samples, 3, make_model, probes=probes, batch_size=40)
    assert [probe.loss for probe in found[3]] == pytest.approx(expected, rel=1e-9)
    assert [probe.upper for probe in found[3]] == pytest.approx(expected, rel=1e-9)  # no constant is in V
    assert all(a.upper <= b.upper for a, b in zip(found[2], found[3], strict=True))
    assert all(math.isfinite(probe.loss) for probe in found[2])


def test_a_frozen_decoder_that_differs_from_that_of_the_model_is_refused():
    with pytest.raises(ValueError, match=r"all parameters of the decoder model\[2:\] are frozen, .* differ"):
        dib.measure(make_mlp(), 2, make_toy_samples(), 3, lambda: make_mlp().requires_grad_(False), probes=Tuned(8))


def test_a_decoder_without_parameters_is_measured_as_it_is():
    def make_model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 3), nn.Tanh()).double()

    samples, model = make_toy_samples(), make_model()
    y, *_ = dib.measure(model, 1, samples, 3, make_model, probes=Tuned(8))
    assert y.loss == pytest.approx(F.cross_entropy(model(samples.inputs), samples.labels).item(), rel=1e-9)


def test_encodings_and_outputs_that_are_not_finite_are_refused():
    """All samples are checked, not only those on which networks are tried."""
    samples, model = make_toy_samples(), make_mlp()
    samples.inputs[3] = 1e200

    def compute_network_loss(splits: list[int]) -> float:
        task = make_task(model, model, splits)
        return dib.compute_network_loss(task, samples.inputs.__getitem__, samples.labels, 40)

    assert math.isfinite(compute_network_loss([0, 1, 2, 3]))
    samples.inputs[3] = math.inf
    with pytest.raises(ValueError, match="the encodings of split 0 are not finite"):
        compute_network_loss([0, 3])
    with pytest.raises(ValueError, match="the outputs of the model are not finite"):
        compute_network_loss([])


def test_probes_of_a_frozen_model_train_what_make_model_leaves_trainable():
    torch.manual_seed(0)
    model = make_mlp()
    expected = dib.measure(model, 1, make_toy_samples(), 3, make_mlp, probes=Tuned(8))
    assert dib.measure(model.requires_grad_(False), 1, make_toy_samples(), 3, make_mlp, probes=Tuned(8)) == expected
    assert all(probe.upper <= probe.entropy for probe in expected)


def test_the_network_itself_bounds_upper_only_if_probes_have_its_frozen_parameters():
    """If make_model() draws other ones, the layers and the decoder of the model are not in V. Constants are."""
    model, reference = make_net(), make_net()
    losses, entropies = [[2.0, 1.5], [0.8, 0.9]], [1.05, 1.1]
    found = partial(compute_upper, model, reference, [0, 1], losses, entropies, network_loss=0.7)
    assert found() == {1: [0.7, 0.9], 0: [0.7, 0.9]}
    frozen = reference[0].weight.requires_grad_(False)
    assert found() == {1: [0.7, 0.9], 0: entropies}
    model[0].weight.data.copy_(frozen)
    assert found() == {1: [0.7, 0.9], 0: [0.7, 0.9]}


@PROBES
def test_frozen_parameters_that_are_drawn_anew_are_measured(probes):
    def make_model() -> nn.Sequential:
        model = make_mlp()
        model.hidden2[0].weight.requires_grad_(False)
        return model

    found = dib.measure_splits(make_model(), [0, 3], make_toy_samples(), 3, make_model, probes=probes)
    assert all(probe.upper == min(probe.loss, probe.entropy) for probe in found[0])


# Encodings that coincide, and samples held out


@PROBES
def test_samples_with_equal_encodings_bound_the_loss_from_below(probes):
    """A layer maps all samples to three encodings. Within each, all labels are equally frequent."""

    def make_model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 3)).double()

    labels = torch.arange(90) % 3
    samples = Samples((torch.arange(90) // 30).double()[:, None], labels)
    found = dib.measure_splits(make_model(), [0, 1], samples, 3, make_model, probes=probes)
    for of_split in found.values():
        y, *others = of_split
        assert y.lower == pytest.approx(math.log(3), abs=1e-9)
        assert all(0 < probe.lower <= probe.upper for probe in others)


@PROBES
@pytest.mark.parametrize(
    ("make_model", "shape"), [(make_mlp, (6,)), (make_conv_net, (1, 5, 5)), (make_random_net, (6,))]
)
def test_samples_held_out_change_no_other_result(make_model, shape, probes):
    samples, other = make_toy_samples(shape=shape), make_toy_samples(60, shape=shape)
    torch.manual_seed(0)
    find = partial(dib.measure_splits, make_model(), [0, 1, 2], samples, 3, make_model, probes=probes, batch_size=40)
    found, without = find(held_out=other), find()
    shares = samples.labels.bincount() / len(samples)
    entropy = -shares[other.labels].log().mean().item()
    for k, of_split in found.items():
        *rest, last = of_split
        assert rest == without[k]
        assert last[:2] == (0, "held-out")
        assert last.entropy == pytest.approx(entropy, rel=1e-6)
        assert (last.lower, last.upper) == (0, last.loss)
        assert math.isfinite(last.loss)
    assert find(held_out=other, controls=False) == find(controls=False)


def test_the_held_out_loss_of_an_untrained_probe_is_that_of_a_new_decoder():
    samples, other, model = make_toy_samples(), make_toy_samples(60), make_mlp()
    *_, found = dib.measure(model, 1, samples, 3, make_mlp, probes=UNTRAINED, held_out=other)
    torch.manual_seed(make_seed("head", 0, 0, 1, 0, 0))
    with torch.no_grad():
        expected = F.cross_entropy(make_mlp()[1:](model[:1](other.inputs)), other.labels)
    assert found.loss == pytest.approx(expected.item(), rel=1e-9)


def test_samples_held_out_are_scored_before_probes_memorise():
    """Labels that are unrelated to the inputs are memorised, which costs much on other samples."""
    torch.manual_seed(0)
    samples, other = (Samples(torch.randn(40, 6).double(), torch.arange(40) % 3) for _ in range(2))
    for k, most in ((0, 0.5), (3, 0.95)):
        y, *_, held_out = dib.measure(make_mlp(), k, samples, 3, make_mlp, probes=Tuned(400), held_out=other)
        assert y.loss < most * y.entropy
        assert held_out.loss < 1.2 * held_out.entropy


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0], "at least two samples"), ([0, 1, 3, 0], "class 3, and the samples of the probes have none")],
)
def test_samples_that_cannot_be_held_out_are_refused(labels, message):
    other = Samples(torch.randn(len(labels), 6).double(), torch.tensor(labels))
    with pytest.raises(ValueError, match=f"DIB: held_out .*{message}"):
        measure(make_toy_samples(), held_out=other)


def test_held_out_samples_whose_encodings_are_not_finite_are_refused():
    other = make_toy_samples(60)
    other.inputs[7] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        measure(make_toy_samples(), k=1, held_out=other)


def test_results_are_float64():
    """The gap of a linear probe is smaller than the precision of float32."""
    y, *_ = dib.measure(make_mlp(), 3, make_toy_samples(), 3, make_mlp, probes=Tuned(8))
    assert 0 < y.loss - y.lower < 1e-8
    assert y.loss != torch.tensor(y.loss).item()
