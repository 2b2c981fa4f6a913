"""checkpoint.pt, from which a run is continued after a crash at any moment.

The rows of an epoch are appended to the tables at its end, those of epochs.csv last: an epoch in epochs.csv has all its
rows. Then checkpoint.pt is replaced. It holds the length and the checksum of each table. `resume` truncates the tables
to these lengths, which removes the rows of an epoch that was not finished.
"""

import io
import json
import os
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from zlib import crc32

import torch

from layerwise import runs
from layerwise.schema import COLUMNS, LR_RANGE, MAY_DIFFER, RENAMED_HPARAMS

BEGUN = -1  # the epoch in a run's first checkpoint, which is written before epoch 0 is measured


def start(folder: Path, hparams: dict, device: torch.device, parts: dict, steps: list[tuple]) -> None:
    """Write the headers of the tables, hparams.json and the first checkpoint, or nothing.

    steps: the rows of lr_range.csv, if there was a range test. Raises ValueError if the folder cannot be written.
    """
    try:
        for name in ("checkpoint.pt", "lr_range.csv", "convergence.csv"):
            (folder / name).unlink(missing_ok=True)
        if steps:
            lines = [LR_RANGE, *(",".join(map(str, step)) for step in steps)]
            runs.write_atomically(folder / "lr_range.csv", ("\n".join(lines) + "\n").encode())
        for name in COLUMNS:
            runs.write_atomically(folder / name, runs.make_header(name))
        save(folder, BEGUN, hparams, device, parts)
        runs.write_hparams(folder, hparams)
    except OSError as error:
        for name in (*COLUMNS, "checkpoint.pt", "hparams.json", "lr_range.csv"):
            for path in (folder / name, folder / f"{name}.tmp"):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # the folder may hold other files
            folder.rmdir()
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from error


def load(folder: Path) -> dict:
    """Return the last checkpoint of a run.

    Raises ValueError, naming the file, if checkpoint.pt, hparams.json or a table is missing, damaged, of another run or
    of an earlier version.
    """
    refuse_earlier_version(folder)
    path = folder / "checkpoint.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        hparams, epoch, tables = state["hparams"], state["epoch"], state["tables"]
        if set(tables) != set(COLUMNS) or not BEGUN <= epoch <= hparams["epochs"]:
            raise ValueError("it lacks a table or an epoch")
        sizes = {name: (int(size), int(checksum)) for name, (size, checksum) in tables.items()}
    except Exception as error:  # torch.load raises many types for a file that is not a checkpoint
        reason = " ".join(str(error).split()).split(". ")[0] or type(error).__name__  # the first sentence
        raise ValueError(f"{path} is not a checkpoint of a run: {reason}") from error

    recorded = read_hparams(folder)
    for name in {**hparams, **recorded}:
        texts = [json.dumps(flags[name]) if name in flags else "nothing" for flags in (recorded, hparams)]
        if texts[0] != texts[1] and (name not in MAY_DIFFER or "nothing" in texts):
            path = folder / "hparams.json"
            raise ValueError(f"{path} has {texts[0]} as {name}, and checkpoint.pt beside it {texts[1]}")

    for name, (size, checksum) in sizes.items():
        content = (folder / name).read_bytes() if (folder / name).exists() else b""
        if len(content) < size or crc32(content[:size]) != checksum:
            when = f"epoch {epoch}" if epoch > BEGUN else "the start of the run"
            raise ValueError(f"{folder / name} is not as it was after {when}: it was edited or cut short")
        if not content.startswith(runs.make_header(name)):
            raise ValueError(f"{folder / name} has other columns than {COLUMNS[name]}: a run of another version")
    return state


def read_hparams(folder: Path) -> dict:
    """Return what hparams.json holds. Raises ValueError if it cannot be read."""
    path = folder / "hparams.json"
    try:
        recorded = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # the message of json names line and column
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(recorded, dict):
        raise ValueError(f"{path} does not hold the flags of a run")
    return recorded


def refuse_earlier_version(folder: Path) -> None:
    """Raise ValueError for a run whose flags have the names of an earlier version."""
    if not (folder / "hparams.json").exists():
        return
    old = sorted(set(RENAMED_HPARAMS) & set(read_hparams(folder)))
    if old:
        raise ValueError(
            f"{folder} holds a run of an earlier version, in which --{RENAMED_HPARAMS[old[0]]} was called --{old[0]}: "
            "the run can be drawn, but not continued"
        )


def restore(folder: Path, state: dict, device: torch.device, parts: dict) -> None:
    """Load the states of the parts and of the random generators from a checkpoint.

    Raises ValueError for states that do not fit the parts.
    """
    try:
        for name, part in parts.items():
            if state[name] or name != "scaler":  # a scaler that is not enabled has no state
                part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        if device.type == "cuda" and "random_cuda" in state:
            torch.cuda.set_rng_state(state["random_cuda"], device)
        elif device.type == "cuda":  # the run was on a CPU until now: start a new stream, not that of the seed again
            torch.cuda.manual_seed(int.from_bytes(sha256(state["random"].numpy()).digest()[:7], "big"))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / 'checkpoint.pt'} does not fit the model: {reason}") from error


def resume(folder: Path, state: dict, hparams: dict, device: torch.device, parts: dict) -> None:
    """Truncate the tables to the epoch of a loaded checkpoint, whose states are restored, and record today's flags."""
    for name, (size, _) in state["tables"].items():
        with (folder / name).open("rb+") as file:
            file.truncate(size)
            os.fsync(file.fileno())
    save(folder, state["epoch"], hparams, device, parts)  # the number of epochs may have grown
    runs.write_hparams(folder, hparams)


def save(folder: Path, epoch: int, hparams: dict, device: torch.device, parts: dict) -> None:
    """Replace checkpoint.pt: the states of the parts and of the random generators, and the checksums of the tables."""
    state = {"epoch": epoch, "hparams": hparams, "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_cuda"] = torch.cuda.get_rng_state(device)
    contents = {name: (folder / name).read_bytes() for name in COLUMNS}
    state["tables"] = {name: (len(content), crc32(content)) for name, content in contents.items()}
    file = io.BytesIO()
    torch.save(state | {name: part.state_dict() for name, part in parts.items()}, file)
    runs.write_atomically(folder / "checkpoint.pt", file.getvalue())
