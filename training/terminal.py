"""How a program ends: with one line on the terminal and an exit status.

0: done. 1: it failed, and keeps the results so far. 2: the arguments are refused, and nothing is written. 128 + n: a
signal n ended it.
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from layerwise import devices, processes
from layerwise.schema import RENAMED_FLAGS


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line. It refuses the old name of a flag with the new one."""

    def parse_known_args(self, arguments=None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        """Parse, after refusing flags that were renamed."""
        for word in sys.argv[1:] if arguments is None else arguments:
            flag = word.split("=")[0]
            if flag in RENAMED_FLAGS:
                self.error(f"{flag} is now {RENAMED_FLAGS[flag]}")
        return super().parse_known_args(arguments, namespace)

    def error(self, message: str) -> None:
        """Exit with status 2 and one line, in place of argparse's usage and error."""
        self.end(2, f"error: {message}")

    def end(self, status: int, message: str) -> None:
        """Exit with the message on one line. Characters that cannot be printed are escaped.

        With status 2 all processes that torchrun started exit, and only the first prints.
        """
        if status == 2 and "TORCHELASTIC_RUN_ID" in os.environ and os.environ["RANK"] != "0":
            sys.exit(status)
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        self.exit(status, f"{self.prog}: {line}\n")


class Stop(BaseException):
    """SIGINT or SIGTERM. It is raised at once: the epoch in progress is repeated from its start in any case."""


def raise_stop(number: int, frame: object) -> None:
    """Raise Stop for a signal."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)  # a second signal ends the program immediately
    raise Stop(number)


def catch_signals() -> None:
    """Turn SIGINT and SIGTERM into Stop, and print characters that the terminal lacks as `?`."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, raise_stop)
    sys.stdout.reconfigure(errors="replace")


def quote_for_make(path: Path) -> str:
    """Return the path as an argument RUN=... on a command line, which make passes to a second shell."""
    return shlex.quote(shlex.quote(str(path))).replace("$", "$$")


@dataclass
class Progress:
    """What a program prints if it ends early: which results it keeps once it is running, and how to continue."""

    kept_results: str
    how_to_continue: str
    running: bool = False


@contextmanager
def report_errors(parser: Parser, progress: Progress) -> Iterator[None]:
    """Exit with one line for every error: status 2 before the program is running, 1 after it, 128 + n for signal n."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        if not progress.running:
            processes.leave_group()  # else torchrun would abort the other processes, which refuse as well
            parser.end(2, f"error: {error}")
        parser.end(1, f"error: {error}; {progress.kept_results}")
    except RuntimeError as error:
        is_memory = devices.is_out_of_memory(error)
        if not is_memory and not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        reason = error if is_memory else f"process {processes.get_rank()} has lost another process"
        parser.end(1, f"error: {reason}" + (f"; {progress.kept_results}" if progress.running else ""))
    except Stop as stop:
        number = stop.args[0]
        rest = f"; {progress.kept_results}, {progress.how_to_continue}" if progress.running else " before the run began"
        parser.end(128 + number, f"stopped by {signal.Signals(number).name}{rest}")
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:  # last, as this line imports torch._dynamo
        parser.end(1, f"error: torch.compile failed, run with --no-compile: {error}; {progress.kept_results}")
