"""The folder of a run: a lock on it, and files that are whole after a crash at any moment. No torch is needed."""

import csv
import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from layerwise.schema import COLUMNS

# The errors of file systems that lack a function, as those of some networks and containers.
UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to the folder. Raises ValueError if one already does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {folder}") from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            warn_once(f"the file system of {folder} has no locks: a second process that writes there is not stopped")
        yield
    finally:
        os.close(descriptor)


def refuse_existing(folder: Path) -> None:
    """Raise ValueError if the folder holds a run with at least one finished epoch."""
    tables = [name for name in COLUMNS if (folder / name).exists()]
    unmeasured = tables and all((folder / name).read_bytes() == make_header(name) for name in tables)
    if (tables or (folder / "checkpoint.pt").exists()) and not unmeasured:
        raise ValueError(f"{folder} already holds a run: continue it with --resume, or name another with --run-dir")


def make_header(name: str) -> bytes:
    """Return the first line of a table."""
    return f"{COLUMNS[name]}\n".encode()


def write_hparams(folder: Path, hparams: dict) -> None:
    """Write hparams.json."""
    write_atomically(folder / "hparams.json", json.dumps(hparams, indent=2).encode() + b"\n")


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file. After an error, or a crash at any moment, it holds either the old content or the new."""
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
        os.fsync(folder)  # the new name has to reach the disk as well
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once(f"the file system of {path.parent} cannot flush folders: a power failure may lose an epoch")
    finally:
        os.close(folder)


@cache
def warn_once(line: str) -> None:
    """Print a line to stderr. The same line is not printed again."""
    print(line, file=sys.stderr, flush=True)


def append_rows(folder: Path, rows: dict[str, list[tuple]]) -> None:
    """Add the rows of an epoch, {table: rows}, and wait until they are on the disk.

    convergence.csv is removed: its network is no longer that of the last epoch.
    """
    (folder / "convergence.csv").unlink(missing_ok=True)
    for name in COLUMNS:
        with (folder / name).open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows[name])
            file.flush()
            os.fsync(file.fileno())


def find_newest_run(folder: Path = Path("runs")) -> Path:
    """Return the run in the folder whose hparams.json was written last. Raises ValueError if there is none."""
    found = sorted(folder.glob("*/hparams.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"no run in {folder.resolve()}: make train makes one, and RUN=folder names one elsewhere")
    return found[-1].parent
