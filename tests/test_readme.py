"""The section "Your own network" of README works as it is written."""

import csv
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text().split("## Your own network\n")[1].split("\n## ")[0]

MYNET = """
from math import prod

from torch import nn


def build(input_shape, num_classes):
    model = nn.Sequential()
    model.add_module("wide", nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), 8), nn.ReLU(inplace=True)))
    model.add_module("narrow", nn.Sequential(nn.Linear(8, 4), nn.Tanh()))
    model.add_module("last", nn.Linear(4, num_classes))
    model.layer_names, model.split_names = ("wide", "narrow"), ("narrow",)
    return model
"""
MYSET = """
import torch


def load(root, download):
    y = torch.arange(60) % 3
    x = torch.randn(60, 5) + y[:, None]
    return x[:40], y[:40], x[40:], y[40:], 3
"""


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
    assert len(example.splitlines()) <= 25
    exec(compile(example, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["NC1", "layer4"], ["NC1", "pool"]]
    found = [re.fullmatch(r"DIB (y|shuffled|\d) from (\S+) to (\S+) nats", line) for line in lines[2:]]
    assert [match[1] for match in found] == ["y", "shuffled", "0", "1", "2"]
    assert all(0 <= float(match[2]) <= float(match[3]) <= math.log(3) for match in found)


@pytest.fixture
def project(tmp_path):
    """Copy what train.py imports, as tests must not write into the project."""
    for package in (".", "layerwise", "layerwise/probes", "training", "models", "data"):
        (tmp_path / package).mkdir(exist_ok=True)
        for source in (ROOT / package).glob("*.py"):
            shutil.copy(source, tmp_path / package)
    return tmp_path


def add(project: Path, package: str, module: str, text: str, registry: str, entry: str) -> None:
    """Add a module, its import and its entry in the registry. README must name the entry."""
    assert f"`{package}/__init__.py`, add `{entry}` to `{registry}`" in " ".join(SECTION.split())
    (project / package / f"{module}.py").write_text(text)
    file = project / package / "__init__.py"
    content, added = re.subn(rf"^({registry}\b.*= {{)$", rf"\1\n    {entry},", file.read_text(), flags=re.MULTILINE)
    assert added == 1
    file.write_text(f"from {package} import {module}\n{content}")


def test_an_added_architecture_and_an_added_data_set_are_trained_and_measured(project):
    add(project, "models", "mynet", MYNET, "ARCHITECTURES", '"MyNet": mynet.build')
    add(project, "data", "myset", MYSET, "SOURCES", '"MySet": myset.load')
    command = [sys.executable, "train.py", "--model", "MyNet", "--data", "MySet", "--run-dir", "run", "--device", "cpu"]
    command += ["--epochs", "1", "--dib-epochs", "1"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name, column, expected in (("nc1", "layer", {"wide", "narrow"}), ("dib", "split", {"input", "narrow"})):
        with (project / "run" / f"{name}.csv").open() as file:
            assert {row[column] for row in csv.DictReader(file)} >= expected
