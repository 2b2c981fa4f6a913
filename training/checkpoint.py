"""Save and load checkpoint.pt, so that a run can be continued after a crash.

At the end of an epoch, rows are appended to the tables, to epochs.csv last. Then checkpoint.pt is replaced. It holds
the length and the checksum of each table. After a crash in between, the tables have rows of an epoch that is not
finished. discard_unfinished_epoch truncates them to the lengths in the checkpoint.
"""

import io
import json
import os
from contextlib import suppress
from pathlib import Path
from zlib import crc32

import torch
from torch import nn

from layerwise import runs
from layerwise.schema import COLUMNS, DEVICE_DEFAULTS, LR_RANGE, MAY_CHANGE, RENAMED_FILES, RENAMED_HPARAMS
from layerwise.streams import restore_random_states, take_random_states

BEGUN = -1  # the epoch in a run's first checkpoint, which is written before epoch 0 is measured


def create_run_files(folder: Path, hparams: dict, device: torch.device, parts: dict, tried: list[tuple]) -> None:
    """Create the tables, hparams.json and the first checkpoint. If this fails, the files are removed again.

    tried: the rows of lr_range.csv, empty without a range test. Raises ValueError if the folder cannot be written.
    """
    try:
        for name in ("checkpoint.pt", "lr_range.csv", "convergence.csv", "noise.csv", *RENAMED_FILES):
            (folder / name).unlink(missing_ok=True)
        remove_weights(folder, BEGUN)
        if tried:
            runs.write_table(folder / "lr_range.csv", LR_RANGE, tried)
        for name in COLUMNS:
            runs.write_atomically(folder / name, runs.make_header(name))
        save(folder, BEGUN, hparams, device, parts)
        runs.write_hparams(folder, hparams)
    except OSError as error:
        for name in (*COLUMNS, "checkpoint.pt", "hparams.json", "lr_range.csv"):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # the folder may hold other files
            folder.rmdir()
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from error


def load(folder: Path) -> dict:
    """Return the last checkpoint of a run.

    Raises ValueError if checkpoint.pt, hparams.json or a table is missing or damaged, belongs to a different run, or
    was written by an earlier version. The message names the file.
    """
    refuse_earlier_version(folder)
    path = folder / "checkpoint.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        hparams, epoch, tables = state["hparams"], state["epoch"], state["tables"]
        if set(tables) != set(COLUMNS) or not BEGUN <= epoch <= hparams["epochs"]:
            raise ValueError("the entries of the tables or the epoch are missing or invalid")
        sizes = {name: (int(size), int(checksum)) for name, (size, checksum) in tables.items()}
    except Exception as error:  # torch.load raises many types for a file that is not a checkpoint
        reason = " ".join(str(error).split()).split(". ")[0] or type(error).__name__  # the first sentence
        raise ValueError(f"{path} is not a checkpoint of a run: {reason}") from error
    validate_hparams(folder, hparams)
    validate_tables(folder, epoch, sizes)
    return state


def validate_hparams(folder: Path, hparams: dict) -> None:
    """Raise ValueError if hparams.json differs from the hparams in the checkpoint.

    Values that --resume can change may differ, after a crash between writing the two files.
    """
    recorded = read_hparams(folder)
    may_differ = {*MAY_CHANGE, *DEVICE_DEFAULTS, "chosen"}
    for name in {**hparams, **recorded}:
        texts = [json.dumps(values[name]) if name in values else "missing" for values in (recorded, hparams)]
        if texts[0] != texts[1] and (name not in may_differ or "missing" in texts):
            raise ValueError(f"{name} is {texts[0]} in {folder / 'hparams.json'}, but {texts[1]} in checkpoint.pt")


def validate_tables(folder: Path, epoch: int, sizes: dict[str, tuple[int, int]]) -> None:
    """Raise ValueError if a table does not begin with its rows up to the epoch. sizes: {table: (length, checksum)}."""
    for name, (size, checksum) in sizes.items():
        content = (folder / name).read_bytes() if (folder / name).exists() else b""
        if len(content) < size or crc32(content[:size]) != checksum:
            since = f"epoch {epoch}" if epoch > BEGUN else "the start of the run"
            raise ValueError(f"{folder / name} has changed since {since}: it was edited or truncated")
        if not content.startswith(runs.make_header(name)):
            raise ValueError(
                f"{folder / name} was written by a different version: expected the columns {COLUMNS[name]}"
            )


def read_hparams(folder: Path) -> dict:
    """Return the contents of hparams.json. Raises ValueError if it cannot be read."""
    path = folder / "hparams.json"
    try:
        recorded = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # the message of json names line and column
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(recorded, dict):
        raise ValueError(f"{path} does not hold the flags of a run")
    return recorded


def refuse_earlier_version(folder: Path) -> None:
    """Raise ValueError if hparams.json has old names. A file that cannot be read is left to the caller."""
    try:
        old = sorted(set(RENAMED_HPARAMS) & set(read_hparams(folder)))
    except ValueError:
        return
    if old:
        raise ValueError(
            f"{folder} holds a run of an earlier version ({old[0]} is now {RENAMED_HPARAMS[old[0]]}): it can be "
            "plotted, but not continued"
        )


def refuse_existing(folder: Path) -> None:
    """Raise ValueError if the folder holds a run, unless its tables have no rows."""
    tables = [name for name in COLUMNS if (folder / name).exists()]
    unmeasured = tables and all((folder / name).read_bytes() == runs.make_header(name) for name in tables)
    if (tables or (folder / "checkpoint.pt").exists()) and not unmeasured:
        refuse_earlier_version(folder)
        raise ValueError(f"{folder} already holds a run: continue it with --resume, or choose another with --run-dir")


def restore(folder: Path, state: dict, device: torch.device, parts: dict) -> None:
    """Load the states of the parts and of the random generators from a checkpoint.

    Raises ValueError for states that do not fit the parts.
    """
    try:
        for name, part in parts.items():
            if state[name] or name != "scaler":  # the state of a disabled GradScaler is empty, and it cannot be loaded
                part.load_state_dict(state[name])
        restore_random_states(state, device)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / 'checkpoint.pt'} does not fit the model: {reason}") from error


def discard_unfinished_epoch(folder: Path, state: dict, hparams: dict, device: torch.device, parts: dict) -> None:
    """Truncate the tables to the last finished epoch, remove later weights, and write the present hparams.

    state: a checkpoint that `restore` has loaded into the parts.
    """
    remove_weights(folder, state["epoch"])
    for name, (size, _) in state["tables"].items():
        with (folder / name).open("rb+") as file:
            file.truncate(size)
            os.fsync(file.fileno())
    save(folder, state["epoch"], hparams, device, parts)  # the number of epochs may have grown
    runs.write_hparams(folder, hparams)


def save(folder: Path, epoch: int, hparams: dict, device: torch.device, parts: dict) -> None:
    """Write checkpoint.pt with the states of the parts and random generators, and the checksums of the tables."""
    contents = {name: (folder / name).read_bytes() for name in COLUMNS}
    tables = {name: (len(content), crc32(content)) for name, content in contents.items()}
    state = {"epoch": epoch, "hparams": hparams, **take_random_states(device), "tables": tables}
    write_state(folder / "checkpoint.pt", state | {name: part.state_dict() for name, part in parts.items()})


def save_weights(folder: Path, epoch: int, model: nn.Module) -> None:
    """Write the model's weights to weights/epoch<number>.pt."""
    (folder / "weights").mkdir(exist_ok=True)
    write_state(folder / "weights" / f"epoch{epoch}.pt", model.state_dict())


def write_state(path: Path, state: dict) -> None:
    """Write a file of torch.save. If this fails, an earlier file is kept."""
    file = io.BytesIO()
    torch.save(state, file)
    runs.write_atomically(path, file.getvalue())


def list_weights(folder: Path) -> dict[int, Path]:
    """Return {epoch: file} of the saved weights, in order."""
    numbers = {path: path.stem.removeprefix("epoch") for path in (folder / "weights").glob("epoch*.pt")}
    return dict(sorted((int(number), path) for path, number in numbers.items() if number.isdecimal()))


def remove_weights(folder: Path, last: int) -> None:
    """Remove the saved weights of the epochs after `last`."""
    for epoch, path in list_weights(folder).items():
        if epoch > last:
            path.unlink()


def load_weights(folder: Path, state: dict, epoch: int, model: nn.Module) -> None:
    """Load the saved weights of a finished epoch into the model. state: the last checkpoint of the run.

    Raises ValueError if there is no file of this epoch, or if it does not hold weights of such a model.
    """
    last = state["epoch"]
    if not state["hparams"]["save_weights"]:
        held = f"the weights of epoch {epoch}, only those of epoch {last}"
        raise ValueError(f"{folder} does not hold {held}: the run was made without --save-weights")
    paths = {number: path for number, path in list_weights(folder).items() if number <= last}
    if epoch not in paths:
        reason = f"it holds those of epochs {', '.join(map(str, paths))}" if paths else "it holds none"
        raise ValueError(f"{folder / 'weights'} does not hold the weights of epoch {epoch}: {reason}")
    try:
        model.load_state_dict(torch.load(paths[epoch], map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises many types for a file that torch.save did not write
        reason = " ".join(str(error).split()).split(". ")[0] or type(error).__name__  # the first sentence
        raise ValueError(f"{paths[epoch]} does not hold weights of the model: {reason}") from error
