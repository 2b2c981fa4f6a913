"""torch.compile as train.py uses it, with a backend that compiles nothing but counts what it is handed."""

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
from tests.test_ranks import torchrun
from tests.toys import random_images

SLOW = ("ResNet", "ConvNeXt")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Nothing compiled is left of another test, which would count towards the limit."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


def counting(graphs: list[int], **options) -> Callable:
    """A stand-in for torch.compile that notes the calls in each graph that the compiler is handed."""
    compile_ = torch.compile

    def backend(graph: torch.fx.GraphModule, _) -> Callable:
        graphs.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward

    return lambda network, **rest: compile_(network, **rest, **options, backend=backend)


@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in models.ARCHITECTURES]
)
def test_one_graph_for_each_size_of_batches_and_none_after_the_first_epoch(tmp_path, pictures, monkeypatch, model):
    """41 samples would be batches of 14, 14 and 13; here 40: 14, 13 and 13. Whole graphs, or the compiler raises."""
    graphs, ends, evaluate = [], [], train.evaluate
    monkeypatch.setattr(torch, "compile", counting(graphs, fullgraph=True))
    monkeypatch.setattr(train, "evaluate", lambda *those: ends.append(len(graphs)) or evaluate(*those))
    flags = ["-m", model, "-d", "CIFAR10", "-b", "14", "--no-dib", "--no-nc1", "--epochs", "3", "--device", "cpu"]
    train.main([*flags, "--compile", "--run-dir", str(tmp_path / "run")])
    assert len(graphs) == 2
    assert graphs[0] == graphs[1] >= len(list(models.build(model, (3, 32, 32), 10)))
    assert ends == [0, 2, 2, 2]  # at the end of every epoch


def test_two_runs_of_one_process_do_not_share_the_limit(tmp_path, monkeypatch):
    """And what the second one was told to do at it is not left to whoever compiles next."""
    monkeypatch.setattr(torch, "compile", counting([]))
    flags = ["--no-dib", "--no-nc1", "--epochs", "1", "--device", "cpu", "--compile"]
    with torch._dynamo.config.patch(recompile_limit=2):
        for name in "ab":
            train.main([*flags, "-w", "4", *"3" * (name == "b"), "--run-dir", str(tmp_path / name)])
    assert not torch._dynamo.config.fail_on_recompile_limit_hit


def of_two(folder: str) -> None:
    """A run of one of the processes; the calls in its graphs."""
    graphs = []
    torch.compile = counting(graphs)
    data.SOURCES["CIFAR10"] = random_images(3, 32, 32)
    flags = ["-m", "MNISTNet", "-d", "CIFAR10", "-b", "20", "--no-dib", "--no-nc1", "--epochs", "2", "--device", "cpu"]
    rank = os.environ["RANK"]
    train.main([*flags, "--compile", "--run-dir", f"{folder}/run"])
    Path(f"{folder}/{rank}").write_text(json.dumps(graphs))


def test_two_processes_compile_the_whole_network(tmp_path):
    """torch.compile around DistributedDataParallel would hand on next to nothing of an nn.Sequential."""
    torchrun("-m", "tests.test_compile", str(tmp_path))
    layers = [m for m in models.build("MNISTNet", (3, 32, 32), 10).modules() if not list(m.children())]
    for rank in range(2):
        assert sum(json.loads((tmp_path / str(rank)).read_text())) == len(layers)


def test_the_limit_of_recompilation_ends_the_run_with_a_line(tmp_path, monkeypatch, capsys):
    """Uncompiled, the run would go on at another speed, and nobody would know."""
    monkeypatch.setattr(torch, "compile", counting([]))
    flags = ["--no-dib", "--no-nc1", "-b", "500", "--device", "cpu", "--compile", "--run-dir", str(tmp_path / "run")]
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(SystemExit) as end:
        train.main([*flags, "--epochs", "1"])
    assert end.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("train.py: error: torch.compile gave up")


if __name__ == "__main__":
    of_two(sys.argv[1])
