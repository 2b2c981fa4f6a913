"""The measures on problems whose answer is known, as a table in Markdown: `make evidence`.

A row is a function below, which says why the answer is known, and yields what was found and how large an error it
allows: one above that makes the exit status 1. ROWS="simplex bits" runs some of them. They take seconds on a CPU, but
for dense and kills.
"""

import io
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from functools import cache, partial
from itertools import product, zip_longest
from math import inf, isnan, log, log2, prod
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import data
import dib
import models
import nc1
import train
from command import Parser
from relabel import relabel
from tests.test_resume import TINY, killed, results
from tests.toys import Toy, clusters
from tests.yardsticks import dense_nc1, newton_optimum

BIT = log(2)  # nats
LINEAR = 1e-4  # nats: a linear head is its optimum up to that, and classes that can be told apart have a loss below it
IMAGE = (3, 32, 32)  # CIFARNet takes none below 25 x 25, where its matrices d x d are least
SHAPES = {"MLP": (12,), "MNISTNet": (1, 28, 28), "CIFARNet": (3, 25, 25), "ConvNeXt": IMAGE, "ResNet": IMAGE}
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Row(NamedTuple):
    measure: str
    known: str
    measured: str
    error: float
    unit: str  # of the error
    most: float  # the error that is allowed


def simplex() -> Iterator[Row]:
    """Class means e_c - 1/C, the vertices: with the projection J = I - 11^T / C, Sigma_B is J / C, its inverse C J.

    Samples s off the vertex, either way along each of the C axes, have Sigma_W = s^2 / C I: NC1 is s^2 (C - 1). What is
    measured is the output of a layer with orthonormal columns, which turns all that into 64 dimensions.
    """
    torch.manual_seed(0)
    C, s = 10, 0.5
    y = torch.arange(C).repeat_interleave(2 * C)
    vertices, aside = torch.eye(C)[y] - 1 / C, s * torch.cat([torch.eye(C), -torch.eye(C)]).repeat(C, 1)  # (N, C)
    model = nn.Sequential(nn.Linear(C, 64), nn.ReLU(), nn.Linear(64, C))
    nn.init.orthogonal_(model[0].weight)
    for what, x, known in (("at the vertices", vertices, 0), (f"{s} off them", vertices + aside, s**2 * (C - 1))):
        found = nc1.measure(model, {"turned": model[0]}, Toy(x, y), C)["turned"].nc1
        yield Row(f"NC1, simplex, samples {what}", f"{known:g}", f"{found:.6f}", off(found, known), "", 1e-5)


def gaussian() -> Iterator[Row]:
    """Four classes of means 2 e_c and covariance 0.5^|j - k|: of the population tr(Sigma pinv(Sigma_B)) is 31/16.

    With P = I - 11^T / 4 on the first four axes, Sigma_B = P and so is its inverse, and tr(Sigma P) = 4 - 33/16. Draws
    scatter about that; the mean of 20 by 0.0015, of which four times as much is allowed.
    """
    C, d, N, draws = 4, 6, 100_000, 20
    j, y, g = torch.arange(d), torch.arange(N) % C, torch.Generator().manual_seed(0)
    Sigma, means = 0.5 ** (j[:, None] - j).abs().double(), 2 * torch.eye(C, d).double()
    known = 31 / 16
    L = torch.linalg.cholesky(Sigma)
    noise = (torch.randn(N, d, generator=g, dtype=torch.float64) @ L.T for _ in range(draws))
    found = [nc1.collapse(means[y] + some, y, C).nc1 for some in noise]
    measured = f"{mean(found):.4f} ± {stdev(found) / draws**0.5:.4f}"
    yield Row("NC1, Gaussian classes, mean ± its error", f"{known:g}", measured, off(mean(found), known), "", 0.006)


def dense() -> Iterator[Row]:
    """Every layer of the five architectures after 20 steps of training: the formula as it stands, its matrices d x d up
    to 9216 x 9216, of the activations that the same network gives in float64."""
    C, values, errors = 10, [], {}
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        model, split = models.build(name, shape, C), clusters(60, prod(shape), C)
        split.x = split.x.view(-1, *shape)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(split.x), split.labels).backward()
            optimizer.step()
        found, h = nc1.measure(model, models.taps(model), split, C, 25), split.x.double()
        with torch.no_grad():
            for block, layer in model.eval().double().named_children():
                h = layer(h)
                if block in found:
                    known = dense_nc1(h.flatten(1), split.labels, C, rtol=1e-8)
                    values.append(found[block].nc1)
                    errors[f"{name} {block}"] = off(values[-1] / known, 1)
    worst = max(errors, key=errors.get)
    measured = f"{min(values):.2g} to {max(values):.3g}, {worst} the worst"
    what = f"NC1, {len(errors)} layers of {len(SHAPES)} networks"
    yield Row(what, "dense formula, float64", measured, errors[worst], "relative", 1e-5)


def decoder(values: int, hidden: bool) -> nn.Sequential:
    """A network of 8 classes: linear, or with a hidden layer."""
    between = [nn.Linear(values, 16), nn.ReLU()] if hidden else []
    return nn.Sequential(*between, nn.Linear(16 if hidden else values, 8))


@cache
def told(values: int, hidden: bool) -> tuple[float, list[float]]:
    """The bits that heads, linear or with a hidden layer, find about 8 classes, and about each digit of their samples.

    The network begins with a fixed layer that says, one-hot, in which of so many equal intervals the class lies, and
    nothing else. A class has 64 samples: in each interval each digit is as frequent as the others.
    """

    def network() -> nn.Sequential:
        encoder = nn.Linear(8, values, bias=False)
        encoder.weight.data = F.one_hot(torch.arange(8) * values // 8, values).T.float()  # (values, 8)
        return nn.Sequential(encoder, *decoder(values, hidden))

    y = torch.arange(512) % 8
    labels, *digits = dib.measure(network(), 1, Toy(F.one_hot(y, 8).float(), y), 8, network)
    return (labels.entropy - labels.loss) / BIT, [(head.entropy - head.loss) / BIT for head in digits]


HEADS = (("linear heads", False, LINEAR / BIT), ("hidden layer", True, dib.BEATEN / BIT))  # and the error allowed


def bits() -> Iterator[Row]:
    """The interval of a class among 2^b is b of the 3 bits of the labels."""
    for what, hidden, most in HEADS:
        found = [told(2**b, hidden)[0] for b in range(4)]
        error = max(off(one, b) for b, one in enumerate(found))
        yield Row(f"DIB of 8 classes, {what}", "0, 1, 2, 3 bits", listed(found), error, "bits", most)


def balanced() -> Iterator[Row]:
    """All 8 classes can be told apart, and the digits are balanced within each: there is nothing to be found."""
    for what, hidden, most in HEADS:
        found = told(8, hidden)[1]
        error = max(off(one, 0) for one in found)
        yield Row(f"DIB of labels balanced in every value, {what}", "0 bits", listed(found), error, "bits", most)


def minimality() -> Iterator[Row]:
    """Encodings that are the first of the two digits of a sample's number in its class, one-hot, and no more than it:
    3 bits about that digit and none about the other, 1.5 on average."""
    y, first = torch.arange(512) % 8, torch.arange(512) // 64
    for what, hidden, most in HEADS:
        build = partial(decoder, 8, hidden)
        _, *digits = dib.measure(build(), 0, Toy(F.one_hot(first, 8).float(), y), 8, build)
        found = [(head.entropy - head.loss) / BIT for head in digits]
        error = off(mean(found), 1.5)
        yield Row(f"DIB, minimality, {what}", "(3 + 0) / 2 bits", listed(found), error, "bits", most)


def optimum() -> Iterator[Row]:
    """Linear heads for SZT's labels and their digits on its 12 bits: logistic regressions, each with one optimum."""
    split, build = data.load("SZT").train, lambda: nn.Sequential(nn.Linear(12, 2))
    found = [head.loss for head in dib.measure(build(), 0, split, 2, build)]
    targets = [split.labels, *relabel(split.labels, 2).T]
    known = [newton_optimum(split.inputs, target) for target in targets]
    error = max(off(*pair) for pair in zip(found, known, strict=True))
    what, shown = f"DIB, loss of {len(found)} linear heads", f"{mean(known):.4f} nats, by Newton"
    yield Row(what, shown, f"{mean(found):.4f}", error, "nats", LINEAR)


def szt() -> Iterator[Row]:
    """SZT's labels follow from its inputs: decoders find at most H(Y), which is counted here, and a decoder that is
    right about every sample comes as near as its weights are large (48 seeds: to 0.0001 to 0.003 bits)."""
    split, build = data.load("SZT").train, partial(models.build, "MLP", (12,), 2)
    torch.manual_seed(0)
    labels, *_ = dib.measure(build(), 0, split, 2, build)
    ones = split.labels.sum().item() / len(split)
    limit = -ones * log2(ones) - (1 - ones) * log2(1 - ones)
    found = (labels.entropy - labels.loss) / BIT
    error = limit - found if max(found, labels.entropy / BIT) < limit + 1e-9 else inf
    yield Row("DIB of SZT's labels, from the input", f"at most {limit:.4f} bits", f"{found:.4f}", error, "bits", 0.01)


def digits() -> Iterator[Row]:
    """C^k samples a class, in any order: k digits name them, as counting does. math.log finds 4 for 125 = 5^3."""
    wrong = total = 0
    for C, k in ((10, 3), (3, 5), (5, 3), (2, 12), (7, 4)):
        labels = torch.randperm(C ** (k + 1), generator=torch.Generator().manual_seed(0)) % C
        found, names = relabel(labels, C), list(product(range(C), repeat=k))  # 0 0 0, 0 0 1, ...
        for c in range(C):
            pairs = zip(found[labels == c].tolist(), names, strict=True)
            wrong += sum(a != b for got, name in pairs for a, b in zip_longest(got, name))
            total += k * len(names)
    yield Row("digits of C^k samples a class", "counting in base C", f"{wrong} of {total:,} wrong", wrong, "", 0)


def untouched() -> Iterator[Row]:
    """Training is the same to the last bit, whether NC1 and DIB are measured between its epochs or not."""
    weights = []
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in (("a", ["--splits", "hidden2", "--dib-epochs", "1"]), ("b", ["--no-nc1", "--no-dib"])):
            run("--device", "cpu", "--epochs", "3", *flags, "--run-dir", f"{folder}/{name}")
            state = torch.load(f"{folder}/{name}/checkpoint.pt", weights_only=True)["model"]
            weights.append(b"".join(w.numpy().tobytes() for w in state.values()))
    differ = sum(a != b for a, b in zip_longest(*weights))
    yield Row("weights, measured or not", "the same", f"{differ} of {len(weights[0]):,} bytes differ", differ, "", 0)


def kills() -> Iterator[Row]:
    """A run that is killed (SIGKILL) at random moments and goes on each time writes the tables of one that is not, but
    for the seconds in them."""
    flags, times, tables = ["--epochs", "100", "--dib-epochs", "2"], 5, []
    with tempfile.TemporaryDirectory() as folder:
        run(*TINY, *flags, "--run-dir", f"{folder}/whole")
        killed(Path(folder, "killed"), times, *flags)
        run(*TINY, *flags, "--run-dir", f"{folder}/killed", "--resume")
        for name in ("whole", "killed"):
            lines = "\n".join(results(Path(folder, name)).values()).splitlines()
            tables.append([cell for line in lines for cell in line.split(",")])
    differ = sum(a != b for a, b in zip_longest(*tables))
    what, measured = f"tables of a run killed {times} times", f"{differ} of {len(tables[0]):,} cells differ"
    yield Row(what, "as of one that was not", measured, differ, "", 0)


ROWS = {
    row.__name__: row
    for row in (simplex, gaussian, dense, bits, balanced, minimality, optimum, szt, digits, untouched, kills)
}


def run(*flags: str) -> None:
    with redirect_stdout(io.StringIO()):
        train.main(list(flags))


def off(found: float, known: float) -> float:
    """By how much; infinitely, if it is no number, as max would pass over that."""
    return inf if isnan(found) else abs(found - known)


def listed(values: Iterable[float]) -> str:
    return ", ".join(f"{round(value, 3) + 0.0:.3f}" for value in values)  # + 0.0 makes 0 of -0


def figure(x: float) -> str:
    """To one digit; a count as it is."""
    mantissa, _, exponent = (str(x) if isinstance(x, int) else f"{x:.1g}").partition("e")
    return f"{mantissa}·10{str(int(exponent)).translate(SUPERSCRIPTS)}" if exponent else mantissa


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="evidence", description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", help=f"some of {', '.join(ROWS)} (all)")
    names = parser.parse_args(arguments).rows or list(ROWS)
    for name in names:
        if name not in ROWS:
            parser.error(f"unknown row {name!r}: expected some of {', '.join(ROWS)}")
    torch.set_num_threads(1)  # the problems are small, and threads that wait for one another spin
    print("| measure | known answer | measured | error | command |\n|---|---|---|---|---|")
    above = []
    for name in names:
        for row in ROWS[name]():
            cells = [*row[:3], f"{figure(row.error)} {row.unit}".rstrip(), f"`make evidence ROWS={name}`"]
            print(f"| {' | '.join(cells)} |", flush=True)
            above += [] if row.error <= row.most else [f"{name}: an error of {row.error:g}, above {row.most:g}"]
    if above:
        parser.end(1, "; ".join(above))


if __name__ == "__main__":
    main()
