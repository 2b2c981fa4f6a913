"""Runs of several seeds, one after another: each is begun, gone on with or skipped, as its folder says.

    python sweep.py 5 --model MLP --data SZT        (seeds 0 to 4; then any flag of train.py)

A run that fails does not end the others. A task of a Slurm job array has the seed of its own number, and no other.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import runs
import train


def main(arguments: list[str] | None = None) -> None:
    parser = train.Parser(prog="sweep.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("seeds", type=train.number(int, 1), help="how many, from 0; then any flag of train.py")
    args, flags = parser.parse_known_args(arguments)
    given = train.make_parser().parse_args(flags)
    if given.run_dir or given.resume or given.seed or given.tune == "only":
        parser.error("--seed, --run-dir, --resume and --tune only are not for a sweep, which chooses them")
    seeds, task = list(range(args.seeds)), os.environ.get("SLURM_ARRAY_TASK_ID")
    if task is not None:
        if task not in map(str, seeds):
            parser.error(f"SLURM_ARRAY_TASK_ID is {task}, expected one of 0..{args.seeds - 1}, the seeds of the sweep")
        seeds = [int(task)]

    outcomes = {}
    for seed in seeds:
        given.seed = seed
        folder = train.run_folder(given)
        outcomes[folder] = status = one([*flags, "--seed", str(seed)], folder)
        if status.startswith("stopped"):
            break
    for folder, status in outcomes.items():
        print(f"{folder}: {status}")
    left = len(seeds) - sum(status in ("done", "finished before") for status in outcomes.values())
    sys.exit(f"sweep.py: {left} of {len(seeds)} runs are not finished" if left else 0)


def one(flags: list[str], folder: Path) -> str:
    """Bring the run in the folder to its end, and say how that went."""
    if (folder / "hparams.json").exists():
        try:
            state = runs.load(folder)
            wanted = train.adopt_flags(train.make_parser(), flags, folder, state["hparams"])
        except (ValueError, OSError) as error:
            return f"failed: {error}"
        if state["epoch"] >= wanted.epochs:
            return "finished before"
        flags = [*flags, "--resume"]
    status = launch(flags)
    if status in (130, 143):
        return f"stopped by {signal.Signals(status - 128).name}; the same command goes on"
    return "done" if status == 0 else f"failed with status {status}"


def launch(flags: list[str]) -> int:
    """train.py in a process of its own, which is told of a SIGTERM; a SIGINT from the keyboard reaches it anyway."""
    child = subprocess.Popen([sys.executable, Path(__file__).with_name("train.py"), *flags])
    signal.signal(signal.SIGTERM, lambda number, _: child.send_signal(number))
    signal.signal(signal.SIGINT, lambda *_: None)
    return child.wait()


if __name__ == "__main__":
    main()
