"""What is installed, what the containers copy, and what make runs."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from layerwise.schema import RENAMED_HPARAMS  # the first version had a module of that name

ROOT = Path(__file__).parent.parent
MAKEFILE, README = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
IGNORED = shutil.ignore_patterns(".*", "runs", "datasets", "__pycache__", "build", "*.egg-info")

# The modules that a user may have beside a script. Each raises an error if the library imports it.
OF_THE_USER = ("data", "utils", "config", "devices", "checks", "probes", "train", "training", *RENAMED_HPARAMS)
FOLDERS_OF_THE_USER = ("models", "runs", "analysis", "tools", "tests")

SCRIPT = """
import sys
import torch
from torch import nn
import dib, nc1
from dib import Samples, Tuned

assert Samples is nc1.Samples


def make_model():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


torch.manual_seed(0)
model, samples = make_model(), Samples(torch.randn(60, 4), torch.arange(60) % 3)
for name, value in nc1.measure(model, {"first": model[0], "relu": model[2]}, samples, num_classes=3).items():
    print("NC1", name, value.nc1)
for result in dib.measure(model, 0, samples, 3, make_model, probes=Tuned(5)):
    print("DIB", result.labeling, result.upper)
for name in ("torchvision", "pandas", "matplotlib", "jinja2"):
    assert name not in sys.modules, name
for name in ("nc1", "dib", "layerwise"):
    assert sys.argv[1] in sys.modules[name].__file__, sys.modules[name].__file__
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The library as pip installs it, from a wheel that is built of a copy of the project."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "project", ignore=IGNORED)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", ".."]
    done = subprocess.run(command, cwd=folder / "project", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_installs_four_names(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"nc1.py", "dib.py", "relabel.py", "layerwise"}
    modules = {path.relative_to(ROOT) for path in (ROOT / "layerwise").rglob("*.py")}
    assert {path.relative_to(installed) for path in (installed / "layerwise").rglob("*.py")} == modules
    (metadata,) = installed.glob("*.dist-info/METADATA")
    needed = re.findall(r"^Requires-Dist: (\w+)", metadata.read_text(), re.MULTILINE)
    assert sorted(needed) == ["numpy", "torch", "tqdm"]


@pytest.mark.parametrize("safe", ["", "1"], ids=["script", "PYTHONSAFEPATH"])
def test_the_library_works_beside_modules_of_the_same_names(installed, tmp_path, safe):
    for name in OF_THE_USER:
        (tmp_path / f"{name}.py").write_text("raise ImportError('the module of the user')")
    for name in FOLDERS_OF_THE_USER:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the package of the user')")
    (tmp_path / "mine.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": safe}
    command = [sys.executable, "mine.py", str(installed)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line.split()[:2] for line in done.stdout.splitlines()]
    labelings = ["y", "shuffled", "0", "1", "2"]
    assert lines == [["NC1", "first"], ["NC1", "relu"], *(["DIB", labeling] for labeling in labelings)]


def test_the_project_has_one_name():
    name = re.search(r'^name = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert name == "layerwise"
    assert re.search(rf'^title: "?{name}\b', (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert f"name: {name}\n" in (ROOT / "environment.yaml").read_text()


def read_instructions(keyword: str) -> list[str]:
    """Return the arguments of the instructions of a keyword in the Dockerfile."""
    return re.findall(rf"^{keyword} (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)


def test_docker_copies_files_that_exist_and_those_that_make_venv_needs():
    first, everything = (copy.split() for copy in read_instructions("COPY"))
    assert all((ROOT / name).exists() for name in first[1:-1])
    needs = re.search(r"^\$\(VENV\): (.*)$", MAKEFILE, re.MULTILINE).group(1).split()
    assert {*needs, "Makefile"} == set(first[1:-1])
    assert everything[1:] == [".", "."]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "datasets"} <= set(ignored)


def test_docker_runs_make_as_a_user():
    text = (ROOT / "Dockerfile").read_text()
    assert read_instructions("USER") == ["user"]
    assert text.index("USER user") < text.index("RUN make venv") < text.index("ENTRYPOINT")
    assert read_instructions("ENTRYPOINT") == ['["make"]']
    assert read_instructions("CMD") == ['["help"]']


@pytest.mark.parametrize("name", ["Dockerfile", "apptainer.def", "environment.yaml"])
def test_python_has_the_same_version_everywhere(name):
    text = (ROOT / name).read_text()
    (version,) = re.findall(r"python(?::|=)3\.(\d+)", text)
    assert int(version) >= 10
    assert int(version) == int(re.search(r"python:3\.(\d+)", (ROOT / "Dockerfile").read_text()).group(1))


def test_conda_takes_the_packages_of_the_requirements():
    text = (ROOT / "environment.yaml").read_text()
    (name,) = re.findall(r"- -r (\S+)", text)
    assert (ROOT / name).exists()
    packages = set(re.findall(r"^  - ([a-z-]+)", text, re.MULTILINE)) - {"conda-forge", "python", "pip", "make"}
    assert packages == {"cxx-compiler"}  # the versions of our packages stand in one place


def test_every_make_target_that_is_named_exists():
    """In the README, the containers, .ci/run and make help."""
    files = [README, *((ROOT / name).read_text() for name in ("Dockerfile", "apptainer.def", ".ci/run"))]
    named = {
        target for text in files for target in re.findall(r"(?:`|^    |\"|RUN )make ([a-z][a-z-]*)", text, re.MULTILINE)
    }
    named |= set(re.findall(r"layerwise(?:\.sif)? ([a-z-]+) MODEL", "".join(files)))
    assert {"train", "plots", "test", "venv", "sweep", "lock"} <= named
    assert named <= TARGETS
    for target in TARGETS - {"help"}:
        assert re.search(rf"^{target}:.*## ", MAKEFILE, re.MULTILINE), f"make help does not list {target}"


def read_apptainer_files() -> list[str]:
    """Return the files and folders that apptainer.def copies, each to the same name under /app."""
    text = (ROOT / "apptainer.def").read_text()
    files = [line.split() for line in re.search(r"%files\n((?:    .*\n)+)", text).group(1).splitlines()]
    assert all(target == f"/app/{name}" for name, target in files)
    return [name for name, _ in files]


def test_apptainer_copies_files_that_exist_and_every_module():
    text, copied = (ROOT / "apptainer.def").read_text(), set(read_apptainer_files())
    assert all((ROOT / name).exists() for name in copied)
    assert {path.name for path in ROOT.glob("*.py")} <= copied
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= copied
    assert 'exec make -C /app "$@"' in text
    assert text.index("cd /app") < text.index("make venv")


@pytest.mark.skipif(not Path(sys.prefix, ".complete").exists(), reason="the tests do not run in the .venv of make")
def test_make_runs_from_what_apptainer_copies(tmp_path):
    """Without a copy of .venv: it is the one in which the tests run. Its own folder is not written to."""
    for name in read_apptainer_files():
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tmp_path / name, **({"ignore": IGNORED} if (ROOT / name).is_dir() else {}))
    (tmp_path / ".venv").symlink_to(sys.prefix)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and "MAKE" not in name}
    environment["PYTHONSAFEPATH"] = "1"
    for words in (
        ["help"],
        ["venv"],
        ["train", "ARGS=--help"],
        ["plots", "ARGS=--help"],
    ):
        command = ["make", *words, "--assume-old=requirements.txt", "--assume-old=requirements-dev.txt"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    modules = sorted(
        f"{path.parent.name}.{path.stem}" for room in ("tools", "training") for path in (tmp_path / room).glob("*.py")
    )
    script = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    command = [sys.executable, "-c", script, *modules]
    done = subprocess.run(command, cwd=tmp_path, env={**environment, "PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert done.returncode == 0, done.stderr
