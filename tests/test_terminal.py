"""How programs end, and where they run: locales, notebooks, limited file systems, paths with spaces, old targets."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from layerwise import runs, schema
from tests.toys import QUICK, ROOT, TUNED, assert_same_run, write_run

LAYERS = ["hidden1", "hidden2"]


def run_python(*words: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run Python with these arguments, in a folder and with environment variables."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, timeout=120)


def remove_make_variables() -> dict[str, str]:
    """Return the environment variables without those of `make test`."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}


def test_no_file_is_read_or_written_in_the_encoding_of_the_locale(tmp_path):
    """Python warns if a program leaves the encoding to the locale."""
    script = """
import runpy, sys
run, *flags = sys.argv[1:]
for program, words in (
    ("train", [*flags, "--run-dir", run]),
    *((name, [run]) for name in ("tools.convergence", "analysis.plots", "analysis.report", "analysis.table")),
):
    sys.argv = [program, *words]
    runpy.run_module(program, run_name="__main__")
"""
    flags = [*TUNED, "--tune", "--splits", "hidden2", "--epochs", "1"]
    warn = ["-X", "warn_default_encoding", "-W", "always::EncodingWarning"]
    done = run_python(*warn, "-c", script, tmp_path / "run", *flags)
    assert done.returncode == 0
    assert (tmp_path / "run" / "table.tex").exists()
    own = [line for line in done.stderr.decode().splitlines() if line.startswith(f"{ROOT}/")]
    assert [line for line in own if not line.startswith(f"{ROOT}/.venv/")] == []


def test_a_terminal_without_some_characters_raises_no_error(tmp_path):
    folders = [write_run(tmp_path / f"é{seed}", LAYERS, seed) for seed in range(2)]
    done = run_python("-m", "analysis.table", *folders, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert "±" in (tmp_path / "table.md").read_text("utf-8")


def test_figures_do_not_depend_on_the_settings_of_matplotlib(tmp_path):
    """They depend neither on the backend of a notebook nor on a matplotlibrc in the folder."""
    run, elsewhere = write_run(tmp_path / "run", LAYERS), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "matplotlibrc").write_text("figure.dpi: 30\nsavefig.dpi: 30\nlines.linewidth: 9\nfont.size: 30\n")
    draw = """
import sys
from pathlib import Path
from analysis import gallery, tables
(png,) = gallery.render_figure("nc1", tables.read_groups([Path(sys.argv[1])]), ("png",))
sys.stdout.buffer.write(png)
"""
    expected = run_python("-c", draw, run)
    done = run_python("-c", draw, run, cwd=elsewhere, MPLBACKEND="module://of.a.notebook")
    assert expected.stdout.startswith(b"\x89PNG")
    assert done.stdout == expected.stdout
    assert (done.stderr, expected.stderr) == (b"", b"")


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path):
    run = write_run(tmp_path / "run", LAYERS)
    (run / "report.html").write_text("old")
    limit = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (4096,) * 2); "
    start = "import sys; sys.argv = ['report', sys.argv[1]]; runpy.run_module('analysis.report', run_name='__main__')"
    done = run_python("-c", limit + start, run)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert (run / "report.html").read_text() == "old"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_or_flushes_is_used_with_a_warning(tmp_path, monkeypatch, capsys, number):
    fsync, flock, run = os.fsync, fcntl.flock, tmp_path / "run"

    def refuse_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    def refuse_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    train.main([*QUICK, "--run-dir", str(tmp_path / "whole")])
    capsys.readouterr()
    monkeypatch.setattr(os, "fsync", refuse_folders)
    monkeypatch.setattr(fcntl, "flock", refuse_locks)
    train.main([*QUICK, "--run-dir", str(run)])
    assert_same_run(tmp_path / "whole", run)
    assert capsys.readouterr().err.splitlines() == [
        f"the file system of {run} has no locks: do not start a second run in this folder",
        f"the file system of {run} cannot flush folders: a power failure may lose what was written last",
    ]
    monkeypatch.setattr(fcntl, "flock", flock)
    with runs.lock(run), pytest.raises(ValueError, match=str(run)), runs.lock(run):
        pass


def test_the_printed_make_command_works_for_a_path_with_spaces(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main([*QUICK, "--no-dib", "--run-dir", "a run's $folder"])
    command = capsys.readouterr().out.splitlines()[-1].split("; ")[1].removeprefix("to draw it: ")
    (tmp_path / "Makefile").write_text("plots:\n\t@printf '%s\\n' $(RUN)\n")
    done = subprocess.run(command, shell=True, env=remove_make_variables(), capture_output=True, text=True)
    assert done.stdout == "a run's $folder\n"


@pytest.mark.parametrize(("name", "lines"), [("WORLD_SIZE", 1), ("TORCHELASTIC_RUN_ID", 0)])
def test_only_processes_of_torchrun_leave_the_message_to_the_first(monkeypatch, capsys, name, lines):
    """Other programs, such as a job scheduler, may set RANK as well."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv(name, "4")
    with pytest.raises(SystemExit) as end:
        train.main(["--epochs", "0"])
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_make_names_the_package_that_a_python_without_ensurepip_needs(tmp_path):
    """Debian's Python has no ensurepip without the package python3-venv."""
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "ensurepip.py").write_text("raise ImportError")
    done = subprocess.run(["make", "venv", f"PYTHON={sys.executable}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        "This Python cannot make a .venv: install its venv package (on Debian and Ubuntu python3-venv)" in done.stdout
    )
    assert not (tmp_path / ".venv").exists()


def run_make(target: str) -> list[str]:
    """Run a make target that must fail with status 2, and return the lines that are not make's own."""
    command = ["make", target, f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, env=remove_make_variables(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    return [line for line in done.stderr.splitlines() if not line.startswith("make: ")]


@pytest.mark.parametrize(("old", "new"), schema.RENAMED_TARGETS.items())
def test_the_old_name_of_a_make_target_is_refused_with_the_new_one(old, new):
    assert run_make(old) == [f"make {old} is now make {new}"]


def test_a_make_target_that_does_not_exist_is_refused_on_one_line():
    (line,) = run_make("nonsense")
    assert "nonsense" in line


@pytest.mark.parametrize(("epoch", "flags"), [("", []), ("3", ["--epoch", "3"]), ("0", ["--epoch", "0"])])
def test_make_convergence_passes_the_run_and_the_epoch(epoch, flags):
    """`make -n` prints the commands and runs none."""
    command = ["make", "-n", "convergence", "RUN=runs/a", f"EPOCH={epoch}", "ARGS=--device cpu"]
    done = subprocess.run(command, cwd=ROOT, env=remove_make_variables(), capture_output=True, text=True, timeout=60)
    words = done.stdout.splitlines()[-1].split()
    assert words == [".venv/bin/python", "-m", "tools.convergence", "runs/a", *flags, "--device", "cpu"]
