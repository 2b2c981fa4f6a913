"""How a program of this project speaks: whatever ends it is said in one line, with an exit status.

0: done. 1: it failed, what it had is kept. 2: what was asked for is refused, and nothing written. 128 + n: signal n.
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

import devices
import ranks


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line instead of argparse's usage and error."""
        self.end(2, f"error: {message}")

    def end(self, status: int, message: str) -> None:
        """Exit with the message on one line, whatever characters of an argument it repeats.

        What is refused with status 2 is refused by every process that torchrun started, and said by the first alone.
        """
        if status == 2 and "TORCHELASTIC_RUN_ID" in os.environ and os.environ["RANK"] != "0":
            sys.exit(status)
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        self.exit(status, f"{self.prog}: {line}\n")


class Stop(BaseException):
    """SIGINT or SIGTERM: raised at once, as what is in flight is done again from its start anyway."""


def stop(number: int, frame: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)  # a second one ends the program where it stands
    raise Stop(number)


def begin() -> None:
    """What a program does first: a signal is to become a Stop, and what a terminal cannot show no error."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
    sys.stdout.reconfigure(errors="replace")


def for_make(path: Path) -> str:
    """The path as an argument RUN=... on a command line, from which make hands it on to another shell."""
    return shlex.quote(shlex.quote(str(path))).replace("$", "$$")


@dataclass
class Progress:
    """What a program says when it ends early: what is kept, once it is running, and how it goes on."""

    kept: str
    go_on: str
    running: bool = False


@contextmanager
def one_line(parser: Parser, progress: Progress) -> Iterator[None]:
    """Whatever ends the program is said in one line: 2 for what is refused, 1 for what fails, 128 + n for a signal."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        if not progress.running:
            ranks.leave()  # all refuse together, and a process that only ended would be aborted
            parser.end(2, f"error: {error}")
        parser.end(1, f"error: {error}; {progress.kept}")
    except RuntimeError as error:
        short = devices.is_out_of_memory(error)
        if not short and not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        kept = f"; {progress.kept}" if progress.running else ""
        parser.end(1, f"error: {error if short else f'process {ranks.rank()} has lost another one'}{kept}")
    except Stop as stopped:
        number = stopped.args[0]
        rest = f"; {progress.kept}, {progress.go_on}" if progress.running else " before the run began"
        parser.end(128 + number, f"stopped by {signal.Signals(number).name}{rest}")
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:  # last, as naming it imports dynamo
        parser.end(1, f"error: torch.compile gave up, --no-compile does without it: {error}; {progress.kept}")
