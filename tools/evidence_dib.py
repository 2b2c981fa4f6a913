"""Rows of DIB problems whose answers are known. tools/evidence.py lists them and prints the table."""

from collections.abc import Iterator
from functools import cache, partial
from math import inf, log
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import dib
import models
from layerwise import schema
from layerwise.samples import Samples
from relabel import relabel
from tools.references import compute_newton_optimum
from tools.rows import Row, compute_error, compute_largest_error, format_values

BIT = log(2)  # nats
LINEAR = 1e-5  # nats: a linear probe is this close to its optimum, or has a loss below this if the optimum is 0


def compute_entropy(*counts: int) -> float:
    """Return the entropy of classes with these numbers of samples, in nats."""
    return sum(n / sum(counts) * log(sum(counts) / n) for n in counts)


def compute_bits(probes: list[dib.ProbeResult]) -> list[float]:
    """Return the information of each probe, in bits."""
    return [(probe.entropy - probe.loss) / BIT for probe in probes]


def make_decoder(d: int, C: int, hidden: bool = False) -> nn.Sequential:
    """Return a network for d features and C classes: linear, or with a hidden layer."""
    between = [nn.Linear(d, 16), nn.ReLU()] if hidden else []
    return nn.Sequential(*between, nn.Linear(16 if hidden else d, C))


@cache
def measure_bits(values: int, hidden: bool) -> tuple[float, list[float]]:
    """Return the bits that probes find about 8 classes, and about each digit of their samples.

    The network begins with a fixed layer. Its output is one-hot: it says in which of `values` equal intervals the class
    lies, and nothing else. A class has 64 samples, and in each interval all values of a digit are equally frequent.
    hidden: whether the probes have a hidden layer. Otherwise they are linear.
    """

    def make_model() -> nn.Sequential:
        encoder = nn.Linear(8, values, bias=False)
        encoder.weight.data = F.one_hot(torch.arange(8) * values // 8, values).T.float()  # (values, 8)
        return nn.Sequential(encoder, *make_decoder(values, 8, hidden))

    y = torch.arange(512) % 8
    samples = Samples(F.one_hot(y, 8).float(), y)
    labels, *digits = compute_bits(dib.measure(make_model(), 1, samples, 8, make_model, controls=False))
    return labels, digits


# kinds of probes, and the errors that are allowed
PROBES = (("linear probes", False, LINEAR / BIT), ("hidden layer", True, schema.SUBOPTIMAL / BIT))


def check_bits() -> Iterator[Row]:
    """Compare the information about the labels: which of 2^b intervals a class lies in is b of their 3 bits."""
    for what, hidden, most in PROBES:
        found = [measure_bits(2**b, hidden)[0] for b in range(4)]
        error = compute_largest_error(found, range(4))
        yield Row(f"DIB of 8 classes, {what}", "0, 1, 2, 3 bits", format_values(found), error, "bits", most)


def check_balanced() -> Iterator[Row]:
    """Compare the information about digits when all 8 classes can be told apart.

    The digits are balanced in each class, so that the class says nothing about them.
    """
    for what, hidden, most in PROBES:
        found = measure_bits(8, hidden)[1]
        error = max(compute_error(one, 0) for one in found)
        yield Row(f"DIB of labels balanced in every value, {what}", "0 bits", format_values(found), error, "bits", most)


def check_minimality() -> Iterator[Row]:
    """Compare the minimality of encodings that are the first of two digits of a sample's number in its class, one-hot.

    They hold 3 bits about that digit and none about the other: 1.5 on average.
    """
    y, first = torch.arange(512) % 8, torch.arange(512) // 64
    for what, hidden, most in PROBES:
        make_model = partial(make_decoder, 8, 8, hidden)
        samples, options = Samples(F.one_hot(first, 8).float(), y), {"enumerations": "data", "controls": False}
        _, *found = compute_bits(dib.measure(make_model(), 0, samples, 8, make_model, **options))
        error = compute_error(mean(found), 1.5)
        yield Row(f"DIB, minimality, {what}", "(3 + 0) / 2 bits", format_values(found), error, "bits", most)


def check_optimum() -> Iterator[Row]:
    """Compare linear probes for SZT's labels and their digits with the optimum, on the 12 bits of the inputs.

    They are logistic regressions, and each has one optimum. No two inputs are equal, so `lower` is a proof by duality.
    """
    samples = data.load("SZT").train
    make_model = partial(make_decoder, 12, 2)
    options = {"enumerations": "data", "controls": False}
    probes = dib.measure(make_model(), 0, samples, 2, make_model, **options)
    labelings = [samples.labels, *relabel(samples.labels, 2).T]
    known = [compute_newton_optimum(samples.inputs, labeling) for labeling in labelings]
    shown = f"{mean(known):.4f} nats, by Newton"
    for what, found in (("loss", [probe.loss for probe in probes]), ("`lower`", [probe.lower for probe in probes])):
        error = compute_largest_error(found, known)
        yield Row(f"DIB, {what} of {len(found)} linear probes", shown, f"{mean(found):.4f}", error, "nats", LINEAR)


def check_szt() -> Iterator[Row]:
    """Compare the information about SZT's labels, which follow from the inputs, with H(Y), which is counted here.

    No decoder finds more. One that is right about every sample comes closer the larger its weights are. In 48 seeds the
    difference was 0.0001 to 0.003 bits.
    """
    samples, make_model = data.load("SZT").train, partial(models.build, "MLP", (12,), 2)
    torch.manual_seed(0)
    labels, *_ = dib.measure(make_model(), 0, samples, 2, make_model, controls=False)
    limit = compute_entropy(*samples.labels.bincount().tolist()) / BIT
    (found,) = compute_bits([labels])
    error = limit - found if max(found, labels.entropy / BIT) < limit + 1e-9 else inf
    yield Row("DIB of SZT's labels, from the input", f"at most {limit:.4f} bits", f"{found:.4f}", error, "bits", 0.01)


def check_entropies() -> Iterator[Row]:
    """Compare the entropies of classes of 6 and 2 samples, and of their digits, with counting.

    Three digits number the samples of the classes, 000 to 101 and 000 to 001. Of the 8 samples, 2 are of class 1. A
    digit is 1 for 2, 2 and 4 of them.
    """
    y = torch.tensor([0, 0, 1, 0, 0, 0, 1, 0])
    make_model = partial(make_decoder, 1, 2)
    probes = dib.measure(make_model(), 0, Samples(y[:, None].float(), y), 2, make_model, controls=False)
    found, known = [probe.entropy / BIT for probe in probes], [compute_entropy(n, 8 - n) / BIT for n in (2, 2, 2, 4)]
    error = compute_largest_error(found, known)
    what, shown = "DIB, entropies of y and its digits, classes of 6 and 2", f"{format_values(known)} bits"
    yield Row(what, shown, format_values(found), error, "bits", 1e-9)


def check_enumerations() -> Iterator[Row]:
    """Count in three random enumerations the samples whose digits are not a number of their own in their class.

    Classes have 27 samples, which 3 digits number. No two enumerations are the same, and none is data order.
    """
    y = torch.arange(81) % 3
    _, targets = dib.make_labelings(y, 3, 3, controls=False, seed=0)
    numbers = [digits.T @ torch.tensor([9, 3, 1]) for digits in targets[1:].split(3)]  # (81,) of each enumeration
    wrong = sum(n not in number[y == c] for number in numbers for c in range(3) for n in range(27))
    orders = len({tuple(number.tolist()) for number in [torch.arange(81) // 3, *numbers]})
    measured = f"{wrong} of {3 * 81} missing, {orders} orders"
    yield Row("numbers of 3 random enumerations and data order", "all, 4 orders", measured, wrong + 4 - orders, "", 0)


def make_noisy_values(distinct: bool = False) -> Samples:
    """Return 48 samples of each of two values. The label is the value, but for 6 of the 48.

    inputs (96, 3): the value, one-hot, and a number. It is 0, or, if the inputs are to be distinct, i and -i for two
    samples of the same value and label. This symmetry lets the best linear decoder ignore it.
    """
    i = torch.arange(96)
    value, number = i // 48, (i // 2 + 1) * (1 - 2 * (i % 2)) * distinct
    return Samples(torch.stack([value == 0, value == 1, number / 48], 1).float(), value ^ (i % 48 < 6))


def make_narrow() -> nn.Sequential:
    """Return a network with a hidden layer of two units for make_noisy_values."""
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))


def check_upper() -> Iterator[Row]:
    """Compare `upper` where each of its rules decides: a deeper split, the network, a constant, the probe itself.

    Labels agree with one of two values in 7 of 8 samples (make_noisy_values). A linear probe of the last hidden layer,
    whose units are the values, attains H(1/8). It bounds the input, where a probe that takes one step is worse. Without
    it, the network does: it gives the value a probability of 3/4. The first digit is 1 for a third of the samples, and
    for digits, the network is no bound: a constant is the best that is known.
    """
    model, samples, options = make_narrow(), make_noisy_values(), {"probes": dib.Tuned(1), "controls": False}
    state = {"0.weight": torch.eye(2, 3), "0.bias": torch.zeros(2)}
    model.load_state_dict(state | {"2.weight": log(3) * torch.eye(2), "2.bias": torch.zeros(2)})
    both = dib.measure_splits(model, [0, 2], samples, 2, make_narrow, **options)
    of_labels, of_digit, *_ = dib.measure(model, 0, samples, 2, make_narrow, **options)
    found = [probe.upper for probe in (both[0][0], of_labels, of_digit, both[2][0])]
    known = [compute_entropy(1, 7), (7 * log(4 / 3) + log(4)) / 8, compute_entropy(1, 2), compute_entropy(1, 7)]
    error = compute_largest_error(found, known)
    what, shown = "DIB, `upper`: deeper split, network, constant, probe", f"{format_values(known)} nats"
    yield Row(what, shown, format_values(found), error, "nats", LINEAR)


class Rounding(nn.Module):
    """Change each row of a batch in another way, by as little as rounding does."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.finfo(x.dtype).eps * torch.arange(len(x), dtype=x.dtype)[:, None]


def check_lower() -> Iterator[Row]:
    """Compare `lower` where each of its rules decides: duality, encodings that coincide, a shallower split.

    Labels agree with one of two values in 7 of 8 samples (make_noisy_values), and no decoder is below H(1/8). Duality
    proves it for a linear probe, though no two encodings are equal. Encodings that coincide prove it for any decoder. A
    split behind a layer that rounds has no equal encodings, and inherits the bound of the split before.
    """

    def make_rounding() -> nn.Sequential:
        return nn.Sequential(Rounding(), *make_narrow())

    make_model, options = partial(make_decoder, 3, 2), {"probes": dib.Tuned(1), "controls": False}
    of_linear, *_ = dib.measure(make_model(), 0, make_noisy_values(distinct=True), 2, make_model, **options)
    of_equal, *_ = dib.measure(make_narrow(), 0, make_noisy_values(), 2, make_narrow, **options)
    both = dib.measure_splits(make_rounding(), [0, 1], make_noisy_values(), 2, make_rounding, **options)
    found, known = [probe.lower for probe in (of_linear, of_equal, both[1][0])], [compute_entropy(1, 7)] * 3
    error = compute_largest_error(found, known)
    what, shown = "DIB, `lower`: duality, equal encodings, shallower split", f"{format_values(known)} nats"
    yield Row(what, shown, format_values(found), error, "nats", LINEAR)


def check_directions() -> Iterator[Row]:
    """Compare the information of linear probes about labels that follow from the shortest direction of the features.

    Along it a feature is +s or -s, as the label says. The other 7 are Gaussian of scale 1 and say nothing. A rotation
    then mixes them, so that no column alone is short.
    """
    g, sizes, y = torch.Generator().manual_seed(0), (1e-2, 1e-5, 1e-9), torch.arange(512) % 2
    noise, turn = (torch.randn(n, d, generator=g, dtype=torch.float64) for n, d in ((512, 7), (8, 8)))

    def make_model() -> nn.Sequential:
        return make_decoder(8, 2).double()

    found = []
    for s in sizes:
        x = torch.cat([noise, s * (2 * y[:, None] - 1)], 1) @ torch.linalg.qr(turn).Q
        found += compute_bits(dib.measure(make_model(), 0, Samples(x, y), 2, make_model, controls=False)[:1])
    error = compute_largest_error(found, [1] * len(sizes))
    what = "DIB of labels along a direction of size 10⁻², 10⁻⁵, 10⁻⁹"
    yield Row(what, "1 bit", format_values(found), error, "bits", LINEAR / BIT)


def check_convolution() -> Iterator[Row]:
    """Compare the information of convolutional probes with BatchNorm about four images, and about their digits.

    All 16 samples of a class are the same image, a bar at one of four sides. They hold 2 bits about the class. Digits
    are balanced in each class, so that the image says nothing about them.
    """

    def make_model() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))

    images, y = torch.zeros(4, 1, 4, 4), torch.arange(64) % 4
    images[0, :, 0], images[1, :, 3], images[2, :, :, 0], images[3, :, :, 3] = 1, 1, 1, 1
    found = compute_bits(dib.measure(make_model(), 0, Samples(images[y], y), 4, make_model, controls=False))
    error, what = compute_largest_error(found, [2, 0, 0]), "DIB of 4 images, convolution and BatchNorm"
    yield Row(what, "2, 0, 0 bits", format_values(found), error, "bits", schema.SUBOPTIMAL / BIT)


def make_counted(*counts: tuple[int, ...]) -> Samples:
    """Return samples of one-hot values. counts[v][c] samples of value v are of class c."""
    table = torch.tensor(counts)
    value, y = table.nonzero().repeat_interleave(table[table > 0], 0).T
    return Samples(F.one_hot(value).float(), y)


def check_held_out() -> Iterator[Row]:
    """Compare the held-out information about labels with counting.

    The labels of two values have the same shares in both sets: 1/2 and 1/2, or 1/4 and 3/4. The best probe of the
    training set attains them, and no other is better on the test set. So the information is that about the value. Its
    shares are 1/4 and 3/4 in the training set, and 1/2 in the test set. Then labels of the training set are independent
    of the value, and those of the test set follow from it. The probe is constant and has no information. All samples of
    a class have one value in the test set, so that its halves are the same.
    """
    train, test = make_counted((32, 32, 0, 0), (0, 0, 48, 144)), make_counted((32, 32, 0, 0), (0, 0, 16, 48))
    for what, hidden, _ in PROBES:
        yield compare_held_out(f"DIB, held-out, {what}", train, test, 4, hidden, log(4) / 2 + log(4 / 3) / 2)
    train, test = make_counted((16, 48), (16, 48)), make_counted((32, 0), (0, 32))
    yield compare_held_out("DIB, held-out, training labels independent", train, test, 2, False, 0)


def compare_held_out(what: str, train: Samples, test: Samples, C: int, hidden: bool, known: float) -> Row:
    """Return a row for the held-out information at the input, known in nats."""
    make_model = partial(make_decoder, 2, C, hidden)
    *_, probe = dib.measure(make_model(), 0, train, C, make_model, held_out=test)
    found, known = (probe.entropy - probe.loss) / BIT, known / BIT
    error = compute_error(found, known)
    return Row(what, f"{round(known, 4):g} bits", f"{found:.4f}", error, "bits", schema.SUBOPTIMAL / BIT)
