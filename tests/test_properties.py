"""What holds for any input: 100 cases each, and as many as CASES says in make test-slow."""

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
from flags import make_parser
from relabel import relabel
from tests.toys import Toy, clusters
from tests.yardsticks import dense_nc1

cases = settings(max_examples=int(os.environ.get("CASES", "100")), deadline=None)


def plainly(labels: list[int], C: int) -> list[list[int]]:
    """Algorithm 1 as one would do it by hand."""
    counters = {}
    indices = [next(counters.setdefault(c, count())) for c in labels]
    D = next(D for D in count(1) if C**D > max(indices, default=0))
    return [[int(d) for d in reversed([i // C**k % C for k in range(D)])] for i in indices]


@cases
@given(st.integers(2, 12).flatmap(lambda C: st.tuples(st.just(C), st.lists(st.integers(0, C - 1), max_size=60))))
def test_relabel_agrees_with_counting_by_hand(case):
    C, labels = case
    digits = relabel(torch.tensor(labels, dtype=torch.int64), C)
    assert digits.tolist() == plainly(labels, C)
    named = {(c, *row) for c, row in zip(labels, digits.tolist(), strict=True)}
    assert len(named) == len(labels)  # the digits name every sample of a class


@cases
@given(
    C=st.integers(2, 8),
    d=st.integers(1, 40),
    more=st.integers(1, 120),
    spread=st.floats(1e-3, 1e3),
    offset=st.floats(-1e3, 1e3),
    batch_size=st.integers(1, 150),
    keep_bytes=st.sampled_from([0, nc1.KEEP_BYTES]),
    seed=st.integers(0, 2**32),
)
def test_nc1_agrees_with_the_dense_formula(C, d, more, spread, offset, batch_size, keep_bytes, seed):
    split, model = clusters(C + more, d, C, spread, seed), nn.Sequential(nn.Identity())
    split.x += offset
    order = torch.randperm(C + more, generator=torch.Generator().manual_seed(seed))
    shuffled = Toy(split.x[order], split.labels[order])
    got = nc1.measure(model, {"layer": model[0]}, shuffled, C, batch_size, keep_bytes)
    dim, rank, value, _, dropped = got["layer"]
    assert dim == d
    assert (rank, dropped) == (min(C - 1, d), 0)
    assert value == pytest.approx(dense_nc1(split.x, split.labels, C), rel=1e-6)


FLAGS = [flag for action in make_parser()._actions for flag in action.option_strings if "h" not in flag.strip("-")[:1]]
NUMBERS = st.one_of(st.integers(), st.floats()).map(str)
WORDS = st.sampled_from(
    ["MLP", "SZT", "ResNet", "Tanh", "SGD", "cpu", "train", "input", "runs/a", "--", "-1", "nan", "1e-3"]
)


@cases
@given(st.lists(st.one_of(st.sampled_from(FLAGS), NUMBERS, WORDS, st.text(max_size=8)), max_size=6))
def test_flags_are_understood_or_refused_on_one_line(arguments):
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            args = make_parser().parse_args(arguments)
        except SystemExit as stop:
            lines = error.getvalue().splitlines()
            refused = stop.code == 2 and len(lines) == 1 and lines[0].startswith("train.py: error: ")
            if not refused and stop.code != 0:  # 0: --help
                raise AssertionError(f"{stop.code}: {lines}") from stop
            return
    assert all(n >= 1 for n in (args.batch_size, args.epochs, args.dib_epochs, args.labelings, *(args.widths or [])))
    assert args.learning_rate is None or 0 < args.learning_rate < math.inf
    assert args.seed >= 0
