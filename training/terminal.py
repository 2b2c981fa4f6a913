"""End a program with a message of one line and an exit status.

0: done. 1: an error occurred; the results so far are saved. 2: the arguments are not valid, and nothing was written.
128 + n: signal n ended the program.
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
    """An argument parser whose errors are one line. For a flag that was renamed, the message gives the new name."""

    def parse_known_args(self, arguments=None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        """Parse the arguments. Exits for a flag that was renamed."""
        for word in sys.argv[1:] if arguments is None else arguments:
            flag = word.split("=")[0]
            if flag in RENAMED_FLAGS:
                self.error(f"{flag} is now {RENAMED_FLAGS[flag]}")
        return super().parse_known_args(arguments, namespace)

    def error(self, message: str) -> None:
        """Exit with status 2 and one line, in place of argparse's usage and error."""
        self.exit_with_message(2, f"error: {message}")

    def exit_with_message(self, status: int, message: str) -> None:
        """Exit with the message on one line. Characters that cannot be printed are escaped.

        With status 2 all processes that torchrun started exit, and only the first prints.
        """
        if status == 2 and "TORCHELASTIC_RUN_ID" in os.environ and os.environ["RANK"] != "0":
            sys.exit(status)
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        self.exit(status, f"{self.prog}: {line}\n")


class Stop(BaseException):
    """Raised on SIGINT or SIGTERM, at once: an epoch that is not finished is repeated when the run is resumed."""


def raise_stop(number: int, frame: object) -> None:
    """Raise Stop for a signal."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)  # a second signal ends the program immediately
    raise Stop(number)


def set_up_terminal() -> None:
    """Turn SIGINT and SIGTERM into Stop, and print `?` for characters the terminal cannot encode."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, raise_stop)
    sys.stdout.reconfigure(errors="replace")


def quote_for_make(path: Path) -> str:
    """Quote a path for use in make ... RUN=<path>. It is quoted twice, because make passes the value to a shell."""
    return shlex.quote(shlex.quote(str(path))).replace("$", "$$")


@dataclass
class ExitMessages:
    """Texts for the exit message of a program that is running: where its results are, and how to continue."""

    results: str
    how_to_continue: str
    running: bool = False


@contextmanager
def report_errors(parser: Parser, messages: ExitMessages) -> Iterator[None]:
    """Turn errors into one-line messages. The status is 1 if messages.running, else 2; 128 + n for signal n."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        if not messages.running:
            processes.leave_group()  # or torchrun aborts the other processes before they exit with the same error
            parser.exit_with_message(2, f"error: {error}")
        parser.exit_with_message(1, f"error: {error}; {messages.results}")
    except RuntimeError as error:
        is_memory = devices.is_out_of_memory(error)
        if not is_memory and not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        reason = error if is_memory else f"process {processes.get_rank()} lost the connection to another process"
        parser.exit_with_message(1, f"error: {reason}" + (f"; {messages.results}" if messages.running else ""))
    except Stop as stop:
        number = stop.args[0]
        rest = f"; {messages.results}; {messages.how_to_continue}" if messages.running else " before the run began"
        parser.exit_with_message(128 + number, f"stopped by {signal.Signals(number).name}{rest}")
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:  # last, as this line imports torch._dynamo
        parser.exit_with_message(1, f"error: torch.compile failed, run with --no-compile: {error}; {messages.results}")
