"""Measure problems whose answers are known, and print a table in Markdown: `make evidence`.

Each row comes from a function, here or in tools/evidence_dib.py. Its docstring says why the answer is known. It yields
what was measured and the error that is allowed. If an error is larger, the exit status is 1. ROWS="simplex bits"
selects rows. All but dense and kills take seconds on a CPU.
"""

import io
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import product, zip_longest
from math import prod
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import nn

import models
import nc1
import train
from layerwise import schema
from layerwise.samples import Samples
from relabel import relabel
from tools import evidence_dib
from tools.references import compute_dense_nc1
from tools.rows import Row, compute_error
from training.terminal import Parser

# Flags of a short run. Thesis probes take few steps.
QUICK = ["--device", "cpu", "--widths", "4", "3", "--train-size", "64", "-b", "16", "--epochs", "2"]
QUICK += ["--probes", "thesis", "--dib-epochs", "1"]

IMAGE = (3, 32, 32)  # CIFARNet needs at least 25 x 25, which makes its matrices d x d smallest
SHAPES = {"MLP": (12,), "MNISTNet": (1, 28, 28), "CIFARNet": (3, 25, 25), "ConvNeXt": IMAGE, "ResNet": IMAGE}
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def check_simplex() -> Iterator[Row]:
    """Compare NC1 of samples around the vertices of a simplex.

    The class means are e_c - 1/C. With the projection J = I - 11^T / C, Sigma_B is J / C, and its pseudoinverse is C J.
    The samples are at a distance s from the vertex, in both directions along each of the C axes: Sigma_W = s^2 / C I,
    and NC1 is s^2 (C - 1). The measured layer has orthonormal columns, which turn all of this into 64 dimensions.
    """
    torch.manual_seed(0)
    C, s = 10, 0.5
    y = torch.arange(C).repeat_interleave(2 * C)
    vertices, aside = torch.eye(C)[y] - 1 / C, s * torch.cat([torch.eye(C), -torch.eye(C)]).repeat(C, 1)  # (N, C)
    model = nn.Sequential(nn.Linear(C, 64), nn.ReLU(), nn.Linear(64, C))
    nn.init.orthogonal_(model[0].weight)
    for what, x, known in (("at the vertices", vertices, 0), (f"{s} off them", vertices + aside, s**2 * (C - 1))):
        found = nc1.measure(model, {"turned": model[0]}, Samples(x, y), C)["turned"].nc1
        error = compute_error(found, known)
        yield Row(f"NC1, simplex, samples {what}", f"{known:g}", f"{found:.6f}", error, "", 1e-5)


def check_gaussian() -> Iterator[Row]:
    """Compare NC1 of four Gaussian classes with means 2 e_c and covariance 0.5^|j - k|.

    With P = I - 11^T / 4 on the first four axes, Sigma_B and its pseudoinverse are both P. In the population
    tr(Sigma P) = 4 - 33/16 = 31/16. Samples scatter around this. The standard error of the mean of 20 is 0.0015, and
    four times as much is allowed.
    """
    C, d, N, draws = 4, 6, 100_000, 20
    j, y, g = torch.arange(d), torch.arange(N) % C, torch.Generator().manual_seed(0)
    Sigma, means = 0.5 ** (j[:, None] - j).abs().double(), 2 * torch.eye(C, d).double()
    known = 31 / 16
    L = torch.linalg.cholesky(Sigma)
    noise = (torch.randn(N, d, generator=g, dtype=torch.float64) @ L.T for _ in range(draws))
    found = [nc1.collapse(means[y] + some, y, C).nc1 for some in noise]
    measured, error = f"{mean(found):.4f} ± {stdev(found) / draws**0.5:.4f}", compute_error(mean(found), known)
    yield Row("NC1, Gaussian classes, mean ± its error", f"{known:g}", measured, error, "", 0.006)


def check_unbalanced() -> Iterator[Row]:
    """Compare NC1 of classes of 6 and 2 samples, with means 0 and 4.

    The mean over samples is 1, so Sigma_B = (1 + 9) / 2 = 5. With the mean of the class means, 2, it would be 4. Every
    sample is 1 off its class mean: Sigma_W = 1.
    """
    x, y = torch.tensor([-1.0, 1, -1, 1, -1, 1, 3, 5])[:, None], torch.tensor([0] * 6 + [1] * 2)
    found = measure_inputs(Samples(x, y), 2).nc1
    yield Row("NC1, classes of 6 and 2 samples", "0.2", f"{found:.6f}", compute_error(found, 0.2), "", 1e-9)


def check_spectrum() -> Iterator[Row]:
    """Compare rank, kept, dropped and NC1 of 400 classes whose class means have known singular values.

    One class mean is 1 on the first axis, and the others are 0 there. On the second and third axes, 396 are +-s, in
    patterns that are orthogonal. The singular values are sqrt(1 - 1/400), 2^-10 and 14 eps, with eps of float32. The
    last does not count, as it is below sqrt(400) eps times the longest class mean. Each class has two samples, at 1/2
    and 3/2 of its mean. This adds 1/4 to NC1 for the second axis, and 1/4 / (1 - 1/400) for the first.
    """
    C, small = 400, torch.tensor([2**-10, 14 * 2**-23])
    signs, means, first = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]]), torch.zeros(C, 3), (1 - 1 / C) ** 0.5
    means[0, 0], means[4:, 1:] = 1, signs.repeat(99, 1) * small / 396**0.5
    layer = measure_inputs(Samples(torch.cat([means / 2, means * 3 / 2]), torch.arange(2 * C) % C), C)
    known = (2, 1 / 4 + 1 / 4 / first**2, *(small / first).tolist())
    found = layer[1:]
    error = max(compute_error(a / b, 1) for a, b in zip(found, known, strict=True))
    shown, measured = (f"{rank}, {nc1:.5f}, {kept:.3g}, {dropped:.3g}" for rank, nc1, kept, dropped in (known, found))
    yield Row("rank, NC1, kept and dropped of known class means", shown, measured, error, "relative", 1e-6)


def measure_inputs(samples: Samples, C: int) -> nc1.Collapse:
    """Return NC1 of the inputs themselves."""
    model = nn.Sequential(nn.Flatten())
    return nc1.measure(model, {"inputs": model[0]}, samples, C)["inputs"]


def check_dense() -> Iterator[Row]:
    """Compare NC1 of every layer of the five architectures after 20 training steps with the formula as it is written.

    The formula is computed with its matrices d x d, up to 9216 x 9216, from the activations of the network in float64.
    """
    C, values, errors = 10, [], {}
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        model, flat = models.build(name, shape, C), make_clusters(60, prod(shape), C)
        samples = Samples(flat.inputs.view(-1, *shape), flat.labels)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(samples.inputs), samples.labels).backward()
            optimizer.step()
        found, h = nc1.measure(model, models.layers(model), samples, C, 25), samples.inputs.double()
        with torch.no_grad():
            for block, layer in model.eval().double().named_children():
                h = layer(h)
                if block in found:
                    known = compute_dense_nc1(h.flatten(1), samples.labels, C, rtol=1e-8)
                    values.append(found[block].nc1)
                    errors[f"{name} {block}"] = compute_error(values[-1] / known, 1)
    worst = max(errors, key=errors.get)
    measured = f"{min(values):.2g} to {max(values):.3g}, {worst} the worst"
    what = f"NC1, {len(errors)} layers of {len(SHAPES)} networks"
    yield Row(what, "dense formula, float64", measured, errors[worst], "relative", 1e-5)


def check_digits() -> Iterator[Row]:
    """Compare the digits of C^k samples of a class, whose labels are in random order, with counting.

    k digits number them. math.log finds 4 for 125 = 5^3.
    """
    wrong = total = 0
    for C, k in ((10, 3), (3, 5), (5, 3), (2, 12), (7, 4)):
        labels = torch.randperm(C ** (k + 1), generator=torch.Generator().manual_seed(0)) % C
        found, numbers = relabel(labels, C), list(product(range(C), repeat=k))  # 0 0 0, 0 0 1, ...
        for c in range(C):
            pairs = zip(found[labels == c].tolist(), numbers, strict=True)
            wrong += sum(a != b for digits, number in pairs for a, b in zip_longest(digits, number))
            total += k * len(numbers)
    yield Row("digits of C^k samples a class", "counting in base C", f"{wrong} of {total:,} wrong", wrong, "", 0)


def check_untouched() -> Iterator[Row]:
    """Compare the weights of two runs: with NC1 and DIB measured after every epoch, and without.

    Measuring does not change training in any bit.
    """
    weights = []
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in (("a", ["--splits", "hidden2", "--dib-epochs", "1"]), ("b", ["--no-nc1", "--no-dib"])):
            train_quietly("--device", "cpu", "--epochs", "3", *flags, "--run-dir", f"{folder}/{name}")
            state = torch.load(f"{folder}/{name}/checkpoint.pt", weights_only=True)["model"]
            weights.append(b"".join(w.numpy().tobytes() for w in state.values()))
    differ = sum(a != b for a, b in zip_longest(*weights))
    yield Row("weights, measured or not", "the same", f"{differ} of {len(weights[0]):,} bytes differ", differ, "", 0)


def check_kills() -> Iterator[Row]:
    """Compare the tables of two runs, without the seconds.

    One of them is killed (SIGKILL) at random moments, and continued each time. The other is not interrupted.
    """
    flags, times, tables = ["--epochs", "100", "--dib-epochs", "2"], 5, []
    with tempfile.TemporaryDirectory() as folder:
        train_quietly(*QUICK, *flags, "--run-dir", f"{folder}/whole")
        kill_repeatedly(Path(folder, "killed"), times, *flags)
        train_quietly(*QUICK, *flags, "--run-dir", f"{folder}/killed", "--resume")
        for name in ("whole", "killed"):
            lines = "\n".join(read_results(Path(folder, name)).values()).splitlines()
            tables.append([cell for line in lines for cell in line.split(",")])
    differ = sum(a != b for a, b in zip_longest(*tables))
    what, measured = f"tables of a run killed {times} times", f"{differ} of {len(tables[0]):,} cells differ"
    yield Row(what, "as of one that was not", measured, differ, "", 0)


ROWS = {
    "simplex": check_simplex,
    "gaussian": check_gaussian,
    "unbalanced": check_unbalanced,
    "spectrum": check_spectrum,
    "dense": check_dense,
    "bits": evidence_dib.check_bits,
    "balanced": evidence_dib.check_balanced,
    "minimality": evidence_dib.check_minimality,
    "entropies": evidence_dib.check_entropies,
    "optimum": evidence_dib.check_optimum,
    "directions": evidence_dib.check_directions,
    "convolution": evidence_dib.check_convolution,
    "upper": evidence_dib.check_upper,
    "lower": evidence_dib.check_lower,
    "held-out": evidence_dib.check_held_out,
    "szt": evidence_dib.check_szt,
    "enumerations": evidence_dib.check_enumerations,
    "digits": check_digits,
    "untouched": check_untouched,
    "kills": check_kills,
}


def make_clusters(N: int, d: int, C: int, spread: float = 1.0, seed: int = 0) -> Samples:
    """Return N samples (N, d) of Gaussian classes of different sizes. Means have unit scale, and no class is empty."""
    g = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.arange(C), torch.rand(N - C, generator=g).square().mul(C).long()])
    x = torch.randn(C, d, generator=g)[y] + spread * torch.randn(N, d, generator=g)
    return Samples(x, y)


def train_quietly(*flags: str) -> None:
    """Run train.py in this process, without its output."""
    with redirect_stdout(io.StringIO()):
        train.main(list(flags))


def start_run(folder: Path, *flags: str) -> subprocess.Popen:
    """Start train.py with QUICK and these flags in a process of its own."""
    command = [sys.executable, "train.py", *QUICK, "--run-dir", str(folder), *flags]
    root = Path(train.__file__).parent
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_repeatedly(folder: Path, times: int, *flags: str) -> None:
    """Start a run of QUICK and these flags, kill it at a random moment, and continue it, until it was killed so often.

    Raises RuntimeError if it ended in another way, or if no epoch or every epoch is finished after the last time.
    """
    draw, begun = random.Random(0), False
    for _ in range(times):
        process = start_run(folder, *flags, *["--resume"] * begun)
        if draw.random() < 0.8:
            process.stdout.readline()  # otherwise the run may be killed before it has begun
        time.sleep(draw.uniform(0, 1))
        process.kill()
        _, error = process.communicate()
        if process.returncode != -signal.SIGKILL:
            raise RuntimeError(f"the run ended before it was killed, with status {process.returncode}: {error}")
        begun = (folder / "hparams.json").exists()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    if not 0 < state["epoch"] < state["hparams"]["epochs"]:
        raise RuntimeError(
            f"the killed run is at epoch {state['epoch']}: expected one after the first, before the last"
        )


def read_results(folder: Path) -> dict[str, str]:
    """Return {table: its text} of a run, without the seconds, which differ from run to run."""
    names = [name for name in (*schema.COLUMNS, "noise.csv") if (folder / name).exists()]
    texts = {name: (folder / name).read_text() for name in names}
    texts["epochs.csv"] = "\n".join(line.rsplit(",", 1)[0] for line in texts["epochs.csv"].splitlines())
    return texts


def format_error(x: float) -> str:
    """Return the number with one digit. A count is not rounded."""
    mantissa, _, exponent = (str(x) if isinstance(x, int) else f"{x:.1g}").partition("e")
    return f"{mantissa}·10{str(int(exponent)).translate(SUPERSCRIPTS)}" if exponent else mantissa


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="evidence", description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", help=f"some of {', '.join(ROWS)} (all)")
    names = parser.parse_args(arguments).rows or list(ROWS)
    for name in names:
        if name not in ROWS:
            parser.error(f"unknown row {name!r}: expected some of {', '.join(ROWS)}")
    torch.set_num_threads(1)  # the problems are small: several threads would wait for one another
    print("| measure | known answer | measured | error | command |\n|---|---|---|---|---|")
    above = []
    for name in names:
        for row in ROWS[name]():
            cells = [*row[:3], f"{format_error(row.error)} {row.unit}".rstrip(), f"`make evidence ROWS={name}`"]
            print(f"| {' | '.join(cells)} |", flush=True)
            above += [] if row.error <= row.most else [f"{name}: an error of {row.error:g}, above {row.most:g}"]
    if above:
        parser.exit_with_message(1, "; ".join(above))


if __name__ == "__main__":
    main()
