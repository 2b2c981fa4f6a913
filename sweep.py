"""Runs of several seeds, one after another: each is begun, gone on with or skipped, as its folder says.

    python sweep.py 5 --model MLP --data SZT        (seeds 0 to 4; then any flag of train.py)

--run-dir runs/a makes that runs/a-seed0 to runs/a-seed4. A run that fails does not end the others. A task of a Slurm
job array has the seed of its own number, and no other.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import flags
import runs
from command import Parser

caught: list[int] = []  # signals, after which no further run is begun


def main(arguments: list[str] | None = None) -> None:
    usage, about = "sweep.py seeds [any flag of train.py]", __doc__.split("\n")[0]
    parser = Parser(prog="sweep.py", usage=usage, description=about, allow_abbrev=False)
    parser.add_argument("seeds", type=flags.number(int, 1), help="how many, from 0; then any flag of train.py")
    args, rest = parser.parse_known_args(arguments)
    given = flags.parse(rest)
    chosen = any(word.split("=")[0] == "--seed" for word in rest)
    if given.resume or chosen or given.tune == "only":
        parser.error("--seed, --resume and --tune only are not for a sweep, which chooses them")
    seeds, task = list(range(args.seeds)), os.environ.get("SLURM_ARRAY_TASK_ID")
    if task is not None:
        if task not in map(str, seeds):
            parser.error(f"SLURM_ARRAY_TASK_ID is {task}, expected one of 0..{args.seeds - 1}, the seeds of the sweep")
        seeds = [int(task)]

    outcomes, named = {}, given.run_dir
    for seed in seeds:
        given.seed, given.run_dir = seed, f"{named}-seed{seed}" if named else None
        folder = flags.run_folder(given)
        outcomes[folder] = one([*rest, "--run-dir", str(folder), "--seed", str(seed)], folder)
        if caught:
            break
    for folder, status in outcomes.items():
        print(f"{folder}: {status}")
    left = len(seeds) - sum(status in ("done", "finished before") for status in outcomes.values())
    if left:
        print(f"sweep.py: {left} of {len(seeds)} runs are not finished", file=sys.stderr)
    sys.exit(128 + caught[0] if caught else int(left > 0))


def one(words: list[str], folder: Path) -> str:
    """Bring the run in the folder to its end, and say how that went."""
    if (folder / "hparams.json").exists():
        try:
            state = runs.load(folder)
            wanted = flags.adopt(words, folder, state["hparams"])
        except (ValueError, OSError) as error:
            return f"failed: {error}"
        if state["epoch"] >= wanted.epochs:
            return "finished before"
        words = [*words, "--resume"]
    status = launch(words)
    if caught:
        return f"stopped by {signal.Signals(caught[0]).name}; the same command goes on"
    return "done" if status == 0 else f"failed with status {status}"


def launch(words: list[str]) -> int:
    """train.py in a process of its own, told of a SIGTERM within a second; a keyboard's SIGINT reaches it anyway."""
    child = subprocess.Popen([sys.executable, Path(__file__).with_name("train.py"), *words])
    told = False
    while True:
        try:
            return child.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            if signal.SIGTERM in caught and not told:
                child.terminate()
                told = True


if __name__ == "__main__":
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, _: caught.append(number))
    main()
