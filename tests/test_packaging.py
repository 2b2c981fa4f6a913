"""What can be known of the containers without an engine to build them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAKEFILE, README = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


def instructions(keyword: str) -> list[str]:
    return re.findall(rf"^{keyword} (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)


def test_docker_copies_what_is_there_and_what_make_venv_needs():
    first, everything = (copy.split() for copy in instructions("COPY"))
    assert all((ROOT / name).exists() for name in first[1:-1])
    needs = re.search(r"^\$\(VENV\): (.*)$", MAKEFILE, re.MULTILINE).group(1).split()
    assert {*needs, "Makefile"} == set(first[1:-1])
    assert everything[1:] == [".", "."]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "datasets"} <= set(ignored)


def test_docker_runs_make_as_a_user():
    text = (ROOT / "Dockerfile").read_text()
    assert instructions("USER") == ["user"]
    assert text.index("USER user") < text.index("RUN make venv") < text.index("ENTRYPOINT")
    assert instructions("ENTRYPOINT") == ['["make"]']
    assert instructions("CMD") == ['["help"]']


@pytest.mark.parametrize("name", ["Dockerfile", "apptainer.def", "environment.yaml"])
def test_the_same_python_everywhere(name):
    text = (ROOT / name).read_text()
    (version,) = re.findall(r"python(?::|=)3\.(\d+)", text)
    assert int(version) >= 10
    assert int(version) == int(re.search(r"python:3\.(\d+)", (ROOT / "Dockerfile").read_text()).group(1))


def test_conda_takes_the_packages_of_the_requirements():
    text = (ROOT / "environment.yaml").read_text()
    (name,) = re.findall(r"- -r (\S+)", text)
    assert (ROOT / name).exists()
    packages = set(re.findall(r"^  - ([a-z-]+)", text, re.MULTILINE)) - {"conda-forge", "python", "pip", "make"}
    assert packages == {"cxx-compiler"}  # no version of a package of ours stands here a second time


def test_every_make_target_that_is_named_exists():
    """In the README, the containers and the comments of the Makefile."""
    files = [README, *((ROOT / name).read_text() for name in ("Dockerfile", "apptainer.def", ".ci/run"))]
    named = {
        target for text in files for target in re.findall(r"(?:`|^    |\"|RUN )make ([a-z][a-z-]*)", text, re.MULTILINE)
    }
    named |= set(re.findall(r"layers(?:\.sif)? ([a-z-]+) MODEL", "".join(files)))
    assert {"train", "plots", "test", "venv", "sweep", "lock"} <= named
    assert named <= TARGETS
    for target in TARGETS - {"help"}:
        assert re.search(rf"^{target}:.*## ", MAKEFILE, re.MULTILINE), f"make help does not list {target}"


def test_apptainer_runs_make_where_it_put_the_files():
    text = (ROOT / "apptainer.def").read_text()
    files = [line.split() for line in re.search(r"%files\n((?:    .*\n)+)", text).group(1).splitlines()]
    assert all(target == f"/app/{name}" for name, target in files)
    copied = {name for name, _ in files}
    assert all((ROOT / name).exists() for name in copied)
    assert {path.name for path in ROOT.glob("*.py")} <= copied
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= copied
    assert 'exec make -C /app "$@"' in text
    assert text.index("cd /app") < text.index("make venv")
