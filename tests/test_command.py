"""Where a program runs: other locales, notebooks' settings, file systems that lack something, paths with spaces."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import runs
import train
from tests.test_lr_range import TUNED
from tests.test_resume import TINY, assert_same
from tests.test_train import ROOT
from tests.toys import measured

LAYERS = ["hidden1", "hidden2"]


def python(*words: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    there = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=there, capture_output=True, timeout=120)


def test_no_file_is_read_or_written_in_the_encoding_of_the_locale(tmp_path):
    """Python warns where a program leaves it to the locale."""
    script = """
import runpy, sys
run, *flags = sys.argv[1:]
for program, words in (
    ("train", [*flags, "--run-dir", run]),
    *((name, [run]) for name in ("settle", "analysis.plots", "analysis.report", "analysis.table")),
):
    sys.argv = [program, *words]
    runpy.run_module(program, run_name="__main__")
"""
    flags = [*TUNED, "--tune", "--splits", "hidden2", "--epochs", "1"]
    done = python(
        "-X", "warn_default_encoding", "-W", "always::EncodingWarning", "-c", script, tmp_path / "run", *flags
    )
    assert done.returncode == 0
    assert (tmp_path / "run" / "table.tex").exists()
    of_ours = [line for line in done.stderr.decode().splitlines() if line.startswith(f"{ROOT}/")]
    assert [line for line in of_ours if not line.startswith(f"{ROOT}/.venv/")] == []


def test_a_terminal_that_lacks_a_character_is_no_error(tmp_path):
    folders = [measured(tmp_path / f"é{seed}", LAYERS, seed) for seed in range(2)]
    done = python("-m", "analysis.table", *folders, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert "±" in (tmp_path / "table.md").read_text("utf-8")


def test_figures_depend_on_nothing_but_their_style(tmp_path):
    """Not on the backend of a notebook, nor on a matplotlibrc of the user or of the folder."""
    run, elsewhere = measured(tmp_path / "run", LAYERS), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "matplotlibrc").write_text("figure.dpi: 30\nsavefig.dpi: 30\nlines.linewidth: 9\nfont.size: 30\n")
    draw = """
import sys
from pathlib import Path
from analysis import gallery, tables
(png,) = gallery.picture("nc1", tables.groups([Path(sys.argv[1])]), ("png",))
sys.stdout.buffer.write(png)
"""
    plain = python("-c", draw, run)
    other = python("-c", draw, run, cwd=elsewhere, MPLBACKEND="module://of.a.notebook")
    assert plain.stdout.startswith(b"\x89PNG")
    assert plain.stdout == other.stdout
    assert (plain.stderr, other.stderr) == (b"", b"")


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    run = measured(tmp_path / "run", LAYERS)
    (run / "report.html").write_text("of before")
    limit = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (4096,) * 2); "
    start = "import sys; sys.argv = ['report', sys.argv[1]]; runpy.run_module('analysis.report', run_name='__main__')"
    done = python("-c", limit + start, run)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert (run / "report.html").read_text() == "of before"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_or_flushes_is_said_and_used(tmp_path, monkeypatch, capsys, number):
    fsync, flock = os.fsync, fcntl.flock

    def no_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    train.main([*TINY, "--run-dir", str(tmp_path / "whole")])
    capsys.readouterr()
    monkeypatch.setattr(os, "fsync", no_folders)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    train.main([*TINY, "--run-dir", str(tmp_path / "run")])
    assert_same(tmp_path / "whole", tmp_path / "run")
    assert capsys.readouterr().err.splitlines() == [
        f"the file system of {tmp_path / 'run'} knows no locks: a second process that writes there is not kept out",
        f"the file system of {tmp_path / 'run'} flushes no folders: if the power fails, an epoch may be lost",
    ]
    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        runs.locked(tmp_path / "run"),
        pytest.raises(ValueError, match="another process is writing to"),
        runs.locked(tmp_path / "run"),
    ):
        pass


def test_the_command_that_is_printed_works_where_the_path_has_spaces(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--no-dib", "--run-dir", "a run's $folder"])
    command = capsys.readouterr().out.splitlines()[-1].split("; ")[1].removesuffix(" draws it")
    makefile = "plots:\n\t@printf '%s\\n' $(RUN)\n"
    (tmp_path / "Makefile").write_text(makefile)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of make test
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
    assert done.stdout == "a run's $folder\n"


@pytest.mark.parametrize(("name", "said"), [("WORLD_SIZE", 1), ("TORCHELASTIC_RUN_ID", 0)])
def test_a_rank_of_something_else_hides_nothing(monkeypatch, capsys, name, said):
    """Of the processes that torchrun started the first one says what is refused."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv(name, "4")
    with pytest.raises(SystemExit) as end:
        train.main(["--epochs", "0"])
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == said


def test_a_python_that_cannot_make_an_environment_is_named(tmp_path):
    """As Debian's without python3-venv."""
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "ensurepip.py").write_text("raise ImportError")
    done = subprocess.run(["make", "venv", f"PYTHON={sys.executable}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        "This Python cannot make a .venv: install its venv package (on Debian and Ubuntu python3-venv)" in done.stdout
    )
    assert not (tmp_path / ".venv").exists()
