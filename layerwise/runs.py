"""Functions for the folder of a run: locking, atomic writes, and appending rows. torch is not imported."""

import csv
import errno
import fcntl
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from layerwise.schema import COLUMNS

# Errors of file systems that do not support an operation, for example some network file systems.
UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock the folder against other runs. Raises ValueError if a process has locked it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {folder}") from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            warn_once(f"the file system of {folder} has no locks: do not start a second run in this folder")
        yield
    finally:
        os.close(descriptor)


def make_header(name: str) -> bytes:
    """Return the first line of a table."""
    return f"{COLUMNS[name]}\n".encode()


def write_hparams(folder: Path, hparams: dict) -> None:
    """Write hparams.json."""
    write_atomically(folder / "hparams.json", json.dumps(hparams, indent=2).encode() + b"\n")


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file. After an error or a crash, it has either the old or the new content."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # flush the new name, too
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once(
            f"the file system of {path.parent} cannot flush folders: a power failure may lose what was written last"
        )
    finally:
        os.close(folder)


@cache
def warn_once(line: str) -> None:
    """Print a line to stderr. The same line is not printed again."""
    print(line, file=sys.stderr, flush=True)


def append_rows(folder: Path, rows: dict[str, list[tuple]]) -> None:
    """Append the rows of an epoch, {table: rows}, and flush them to disk.

    convergence.csv is removed, because it describes the network of an earlier epoch.
    """
    (folder / "convergence.csv").unlink(missing_ok=True)
    for name in COLUMNS:
        with (folder / name).open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows[name])
            file.flush()
            os.fsync(file.fileno())


def write_table(path: Path, header: str, rows: list[tuple]) -> None:
    """Write a CSV that does not grow."""
    text = io.StringIO()
    text.write(header + "\n")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomically(path, text.getvalue().encode())


def find_newest_run(folder: Path = Path("runs")) -> Path:
    """Return the run whose hparams.json was written last. Raises ValueError if `folder` holds no run."""
    found = sorted(folder.glob("*/hparams.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"no run in {folder.resolve()}: create one with make train, or choose a run with RUN=folder")
    return found[-1].parent
