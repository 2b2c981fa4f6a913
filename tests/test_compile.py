"""torch.compile as train.py uses it, with a backend that compiles nothing and counts the calls in each graph."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import data
import models
import train
from tests.toys import make_image_source, run_torchrun

SLOW = ("ResNet", "ConvNeXt")


@pytest.fixture(autouse=True)
def reset_dynamo():
    """Remove what other tests have compiled, which would count towards the limit."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


def make_compile(graphs: list[int], **options) -> Callable:
    """Return a stand-in for torch.compile that appends to `graphs` the number of calls in each graph."""
    compile_ = torch.compile

    def backend(graph: torch.fx.GraphModule, _) -> Callable:
        graphs.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward

    return lambda network, **rest: compile_(network, **rest, **options, backend=backend)


@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in models.ARCHITECTURES]
)
def test_one_graph_is_compiled_for_each_size_of_batches_in_the_first_epoch_only(tmp_path, pictures, monkeypatch, model):
    """40 samples make batches of 14, 13 and 13. With fullgraph the compiler raises if it has to split a graph."""
    graphs, ends, evaluate = [], [], train.evaluate
    monkeypatch.setattr(torch, "compile", make_compile(graphs, fullgraph=True))
    monkeypatch.setattr(train, "evaluate", lambda *rest: ends.append(len(graphs)) or evaluate(*rest))
    flags = ["-m", model, "-d", "CIFAR10", "-b", "14", "--no-dib", "--no-nc1", "--epochs", "3", "--device", "cpu"]
    train.main([*flags, "--compile", "--run-dir", str(tmp_path / "run")])
    assert len(graphs) == 2
    assert graphs[0] == graphs[1] >= len(list(models.build(model, (3, 32, 32), 10)))
    assert ends == [0, 2, 2, 2]  # graphs at the end of each epoch


def test_the_limit_of_recompilation_is_counted_for_each_run(tmp_path, monkeypatch):
    """The setting that a run changes at the limit is restored at its end."""
    monkeypatch.setattr(torch, "compile", make_compile([]))
    flags = ["--no-dib", "--no-nc1", "--epochs", "1", "--device", "cpu", "--compile"]
    with torch._dynamo.config.patch(recompile_limit=2):
        for name in "ab":
            train.main([*flags, "-w", "4", *"3" * (name == "b"), "--run-dir", str(tmp_path / name)])
    assert not torch._dynamo.config.fail_on_recompile_limit_hit


def run_and_count(folder: str) -> None:
    """Make a run as one of two processes, and write the number of calls in each of its graphs."""
    graphs: list[int] = []
    torch.compile = make_compile(graphs)
    data.SOURCES["CIFAR10"] = make_image_source(3, 32, 32)
    flags = ["-m", "MNISTNet", "-d", "CIFAR10", "-b", "20", "--no-dib", "--no-nc1", "--epochs", "2", "--device", "cpu"]
    rank = os.environ["RANK"]
    train.main([*flags, "--compile", "--run-dir", f"{folder}/run"])
    Path(f"{folder}/{rank}").write_text(json.dumps(graphs))


def test_two_processes_compile_the_whole_network(tmp_path):
    """torch.compile around DistributedDataParallel would compile almost none of the operations of an nn.Sequential."""
    run_torchrun("-m", "tests.test_compile", str(tmp_path))
    layers = [m for m in models.build("MNISTNet", (3, 32, 32), 10).modules() if not list(m.children())]
    for rank in range(2):
        assert sum(json.loads((tmp_path / str(rank)).read_text())) == len(layers)


def test_the_limit_of_recompilation_ends_the_run_with_one_line(tmp_path, monkeypatch, capsys):
    """By default torch would run the rest uncompiled, at another speed, without an error."""
    monkeypatch.setattr(torch, "compile", make_compile([]))
    flags = ["--no-dib", "--no-nc1", "-b", "500", "--device", "cpu", "--compile", "--run-dir", str(tmp_path / "run")]
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(SystemExit) as end:
        train.main([*flags, "--epochs", "1"])
    assert end.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("train.py: error: torch.compile failed")


if __name__ == "__main__":
    run_and_count(sys.argv[1])
