"""The folder of a run: CSVs, hparams.json, and a checkpoint from which the run goes on after a crash at any moment.

The rows of an epoch are appended at its end, those of epochs.csv last: an epoch that has these has all. They count once
the checkpoint has been replaced: it holds the length and checksum of each CSV, and resume cuts off what comes after.
"""

import csv
import errno
import fcntl
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from zlib import crc32

import torch

COLUMNS = {
    "nc1.csv": "epoch,set,layer,dim,rank,nc1,kept,dropped",
    "dib.csv": "epoch,set,split,permutation,labeling,entropy,loss,bound",
    "epochs.csv": "epoch,set,loss,accuracy,seconds",
}
BEGUN = -1  # the epoch of a run's first checkpoint, before epoch 0 is measured

# Of a run that began with a range test; chosen is 1 at the rate that the run then has.
LR_RANGE = "step,learning_rate,loss,smoothed,chosen"

# Of the heads of the last epoch, trained longer (settle.py).
SETTLE = "factor,steps,set,split,permutation,labeling,entropy,loss,bound"

# What a file system answers that does not know what it is asked for, as those of some networks and containers.
UNKNOWN = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)

# What may change when a run is resumed: how far to go, where and with what; and what is left to the device.
ELSEWHERE = ("epochs", "resume", "run_dir", "data_dir", "download", "device", "torch", "torchvision", "processes")
MAY_DIFFER = (*ELSEWHERE, "chosen", "compile", "precision")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to the folder; ValueError where one does already."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {folder}") from None
        except OSError as error:
            if error.errno not in UNKNOWN:
                raise
            say(f"the file system of {folder} knows no locks: a second process that writes there is not kept out")
        yield
    finally:
        os.close(descriptor)


def refuse_existing(folder: Path) -> None:
    """Raise ValueError where there is anything of a run, but for one that ended before its first epoch did."""
    tables = [name for name in COLUMNS if (folder / name).exists()]
    unmeasured = tables and all((folder / name).read_bytes() == header(name) for name in tables)
    if (tables or (folder / "checkpoint.pt").exists()) and not unmeasured:
        raise ValueError(f"{folder} already holds a run: go on with --resume, or name another folder with --run-dir")


def header(name: str) -> bytes:
    return f"{COLUMNS[name]}\n".encode()


def start(folder: Path, hparams: dict, device: torch.device, parts: dict, steps: list[tuple]) -> None:
    """Write the CSVs with their headers, hparams.json and the first checkpoint, or nothing.

    steps: the rows of lr_range.csv, if there was a range test.
    """
    try:
        for name in ("checkpoint.pt", "lr_range.csv", "settle.csv"):
            (folder / name).unlink(missing_ok=True)
        if steps:
            lines = [LR_RANGE, *(",".join(map(str, step)) for step in steps)]
            write(folder / "lr_range.csv", ("\n".join(lines) + "\n").encode())
        for name in COLUMNS:
            write(folder / name, header(name))
        save(folder, BEGUN, hparams, device, parts)
        write_hparams(folder, hparams)
    except OSError as error:
        for name in (*COLUMNS, "checkpoint.pt", "hparams.json", "lr_range.csv"):
            for path in (folder / name, folder / f"{name}.tmp"):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # it may hold something else
            folder.rmdir()
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from error


def load(folder: Path) -> dict:
    """The last checkpoint, once it, hparams.json and the CSVs are found to be whole and of one run.

    Raises ValueError that names the file that is missing, damaged or of another run.
    """
    path = folder / "checkpoint.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        hparams, epoch, tables = state["hparams"], state["epoch"], state["tables"]
        if set(tables) != set(COLUMNS) or not BEGUN <= epoch <= hparams["epochs"]:
            raise ValueError("it lacks a table or an epoch")
        sizes = {name: (int(size), int(checksum)) for name, (size, checksum) in tables.items()}
    except Exception as error:  # torch.load raises half a dozen kinds for files that are no checkpoints
        reason = " ".join(str(error).split()).split(". ")[0] or type(error).__name__  # its first sentence
        raise ValueError(f"{path} is not a checkpoint to go on from: {reason}") from error

    path = folder / "hparams.json"
    try:
        recorded = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # json names line and column
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(recorded, dict):
        raise ValueError(f"{path} does not hold the flags of a run")
    for name in {**hparams, **recorded}:
        texts = [json.dumps(flags[name]) if name in flags else "nothing" for flags in (recorded, hparams)]
        if texts[0] != texts[1] and (name not in MAY_DIFFER or "nothing" in texts):
            raise ValueError(f"{path} has {texts[0]} as {name}, and checkpoint.pt beside it {texts[1]}")

    for name, (size, checksum) in sizes.items():
        content = (folder / name).read_bytes() if (folder / name).exists() else b""
        if len(content) < size or crc32(content[:size]) != checksum:
            when = f"epoch {epoch}" if epoch > BEGUN else "its start"
            raise ValueError(f"{folder / name} is not as {when} left it: it was edited or cut short")
        if not content.startswith(header(name)):
            raise ValueError(f"{folder / name} has other columns than {COLUMNS[name]}: a run of another version")
    return state


def restore(folder: Path, state: dict, device: torch.device, parts: dict) -> None:
    """Bring the parts and the random states to where the loaded checkpoint has them."""
    try:
        for name, part in parts.items():
            if state[name] or name != "scaler":  # which has no state where the run had no use for it
                part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        if device.type == "cuda" and "random_cuda" in state:
            torch.cuda.set_rng_state(state["random_cuda"], device)
        elif device.type == "cuda":  # so far the run was on a CPU: a new stream, and not again that of the seed
            torch.cuda.manual_seed(int.from_bytes(sha256(state["random"].numpy()).digest()[:7], "big"))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / 'checkpoint.pt'} does not fit the model: {reason}") from error


def resume(folder: Path, state: dict, hparams: dict, device: torch.device, parts: dict) -> None:
    """Drop the rows of epochs after the loaded checkpoint's, whose parts are restored, and note the flags of today."""
    for name, (size, _) in state["tables"].items():
        with (folder / name).open("rb+") as file:
            file.truncate(size)
            os.fsync(file.fileno())
    save(folder, state["epoch"], hparams, device, parts)  # with more epochs, perhaps
    write_hparams(folder, hparams)


def write_hparams(folder: Path, hparams: dict) -> None:
    write(folder / "hparams.json", json.dumps(hparams, indent=2).encode() + b"\n")


def write(path: Path, content: bytes) -> None:
    """Replace the file, so that after a crash at any moment it holds either the old content or the new."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, has to reach the disk
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
        say(f"the file system of {path.parent} flushes no folders: if the power fails, an epoch may be lost")
    finally:
        os.close(folder)


@cache
def say(line: str) -> None:
    """Once, however often it holds."""
    print(line, file=sys.stderr, flush=True)


def append(folder: Path, rows: dict[str, list[tuple]]) -> None:
    """Add the rows of an epoch to the CSVs, {name: rows}, and wait until they are on the disk.

    settle.csv is of the epoch that was the last one, and goes.
    """
    (folder / "settle.csv").unlink(missing_ok=True)
    for name in COLUMNS:
        with (folder / name).open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows[name])
            file.flush()
            os.fsync(file.fileno())


def save(folder: Path, epoch: int, hparams: dict, device: torch.device, parts: dict) -> None:
    """Write what it takes to go on after this epoch: the parts' and all random states, the CSVs' checksums."""
    state = {"epoch": epoch, "hparams": hparams, "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_cuda"] = torch.cuda.get_rng_state(device)
    contents = {name: (folder / name).read_bytes() for name in COLUMNS}
    state["tables"] = {name: (len(content), crc32(content)) for name, content in contents.items()}
    file = io.BytesIO()
    torch.save(state | {name: part.state_dict() for name, part in parts.items()}, file)
    write(folder / "checkpoint.pt", file.getvalue())
