"""What holds for any input, tried on 100 random cases or as many as the environment variable CASES says."""

import contextlib
import io
import math
import os
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nc1
from layerwise import devices
from layerwise.samples import Samples
from relabel import relabel
from tests.toys import make_clusters
from tools.references import compute_dense_nc1
from training.configuration import parse
from training.flags import make_parser

cases = settings(max_examples=int(os.environ.get("CASES", "100")), deadline=None)


def relabel_by_counting(labels: list[int], C: int) -> list[list[int]]:
    """Return the digits of Algorithm 1, computed sample by sample."""
    counters = {}
    indices = [next(counters.setdefault(c, count())) for c in labels]
    D = next(D for D in count(1) if C**D > max(indices, default=0))
    return [[int(d) for d in reversed([i // C**k % C for k in range(D)])] for i in indices]


@cases
@given(st.integers(2, 12).flatmap(lambda C: st.tuples(st.just(C), st.lists(st.integers(0, C - 1), max_size=60))))
def test_relabel_agrees_with_counting(case):
    C, labels = case
    digits = relabel(torch.tensor(labels, dtype=torch.int64), C)
    assert digits.tolist() == relabel_by_counting(labels, C)
    identified = {(c, *row) for c, row in zip(labels, digits.tolist(), strict=True)}
    assert len(identified) == len(labels)  # the digits identify every sample of a class


@cases
@given(
    C=st.integers(2, 8),
    d=st.integers(1, 40),
    more=st.integers(1, 120),
    spread=st.floats(1e-3, 1e3),
    offset=st.floats(-1e3, 1e3),
    batch_size=st.integers(1, 150),
    cache_bytes=st.sampled_from([0, devices.CACHE_BYTES]),
    seed=st.integers(0, 2**32),
)
def test_nc1_agrees_with_the_dense_formula(C, d, more, spread, offset, batch_size, cache_bytes, seed):
    samples, model = make_clusters(C + more, d, C, spread, seed), nn.Sequential(nn.Identity())
    samples.inputs += offset
    order = torch.randperm(C + more, generator=torch.Generator().manual_seed(seed))
    shuffled = Samples(samples.inputs[order], samples.labels[order])
    got = nc1.measure(model, {"layer": model[0]}, shuffled, C, batch_size, cache_bytes)
    dim, rank, value, _, dropped = got["layer"]
    assert dim == d
    assert (rank, dropped) == (min(C - 1, d), 0)
    assert value == pytest.approx(compute_dense_nc1(samples.inputs, samples.labels, C), rel=1e-6)


FLAGS = [flag for action in make_parser()._actions for flag in action.option_strings if "h" not in flag.strip("-")[:1]]
NUMBERS = st.one_of(st.integers(), st.floats()).map(str)
WORDS = st.sampled_from(
    ["MLP", "SZT", "ResNet", "Tanh", "SGD", "cpu", "train", "input", "data", "runs/a", "--", "-1", "nan", "1e-3"]
)


@cases
@given(st.lists(st.one_of(st.sampled_from(FLAGS), NUMBERS, WORDS, st.text(max_size=8)), max_size=6))
def test_flags_are_parsed_or_refused_in_one_line(arguments):
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            config = parse(arguments)
        except SystemExit as stop:
            lines = error.getvalue().splitlines()
            refused = stop.code == 2 and len(lines) == 1 and lines[0].startswith("train.py: error: ")
            if not refused and stop.code != 0:  # 0: --help
                raise AssertionError(f"{stop.code}: {lines}") from stop
            return
    counts = (config.batch_size, config.epochs, config.dib_epochs, *(config.widths or []))
    assert all(n >= 1 for n in counts)
    assert config.enumerations == "data" or config.enumerations >= 1
    assert config.learning_rate is None or 0 < config.learning_rate < math.inf
    assert config.seed >= 0
