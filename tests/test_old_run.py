"""A run of the program before its words were changed (tests/old_run): it is read for ever, and not resumed."""

import shutil
from pathlib import Path

import pytest

from analysis import plots, report, table, tables

OLD = Path(__file__).parent / "old_run"


@pytest.mark.parametrize("program", [plots, report, table])
def test_an_old_run_is_drawn(program, tmp_path, capsys):
    run = shutil.copytree(OLD, tmp_path / "run")
    tables.script("", program.write, [str(run)])
    assert capsys.readouterr().err == ""
