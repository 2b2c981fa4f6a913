"""Run several seeds, one after another. Finished runs are skipped, and runs that were stopped are continued.

    python -m tools.sweep 5 --model MLP --data SZT        (seeds 0 to 4, and any flags of train.py)

With --run-dir runs/a the folders are runs/a-seed0 to runs/a-seed4. If a run fails, the sweep continues with the next
seed. In a Slurm job array, each task runs the seed SLURM_ARRAY_TASK_ID.
"""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from training import checkpoint, configuration
from training.flags import COUNT
from training.terminal import Parser

PROGRAM = Path(__file__).parent.parent / "train.py"

caught: list[int] = []  # signals; after the first no further run is started


def main(arguments: list[str] | None = None) -> None:
    usage, about = "sweep seeds [any flag of train.py]", __doc__.split("\n")[0]
    parser = Parser(prog="sweep", usage=usage, description=about, allow_abbrev=False)
    parser.add_argument("seeds", type=COUNT, help="number of seeds, from 0; then any flag of train.py")
    args, rest = parser.parse_known_args(arguments)
    given = configuration.parse(rest)
    has_seed = any(word.split("=")[0] == "--seed" for word in rest)
    if given.resume or has_seed or given.tune == "only":
        parser.error("a sweep cannot have --seed, --resume or `--tune only`")
    seeds, task = list(range(args.seeds)), os.environ.get("SLURM_ARRAY_TASK_ID")
    if task is not None:
        if task not in map(str, seeds):
            parser.error(f"SLURM_ARRAY_TASK_ID is {task}, expected one of 0..{args.seeds - 1}, the seeds of the sweep")
        seeds = [int(task)]

    outcomes, named = {}, given.run_dir
    for seed in seeds:
        run_dir = f"{named}-seed{seed}" if named else None
        folder = configuration.choose_run_folder(replace(given, seed=seed, run_dir=run_dir))
        outcomes[folder] = finish_run([*rest, "--run-dir", str(folder), "--seed", str(seed)], folder)
        if caught:
            break
    for folder, outcome in outcomes.items():
        print(f"{folder}: {outcome}")
    left = len(seeds) - sum(outcome in ("done", "finished before") for outcome in outcomes.values())
    if left:
        print(f"sweep: {left} of {len(seeds)} runs are not finished", file=sys.stderr)
    sys.exit(128 + caught[0] if caught else int(left > 0))


def finish_run(words: list[str], folder: Path) -> str:
    """Start or continue the run in the folder, with these flags of train.py. Return the outcome as a text."""
    if (folder / "hparams.json").exists():
        try:
            state = checkpoint.load(folder)
            wanted = configuration.adopt_recorded(words, folder, state["hparams"])
        except (ValueError, OSError) as error:
            return f"failed: {error}"
        if state["epoch"] >= wanted.epochs:
            return "finished before"
        words = [*words, "--resume"]
    status = launch(words)
    if caught:
        return f"stopped by {signal.Signals(caught[0]).name}; to continue, repeat the command"
    return "done" if status == 0 else f"failed with status {status}"


def launch(words: list[str]) -> int:
    """Run train.py in another process, and return its exit status.

    SIGTERM is forwarded to the process within a second. The terminal sends the SIGINT of Ctrl-C to both processes.
    """
    child = subprocess.Popen([sys.executable, PROGRAM, *words])
    terminated = False
    while True:
        try:
            return child.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            if signal.SIGTERM in caught and not terminated:
                child.terminate()
                terminated = True


if __name__ == "__main__":
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, _: caught.append(number))
    main()
