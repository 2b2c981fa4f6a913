"""The measures give the known answers, and the table in README has the rows of tools/evidence.py."""

import re

import pytest

from layerwise.probes import fitting
from tests.toys import ROOT
from tools import evidence

SLOW = ("dense", "kills")
DIGITS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


@pytest.fixture(scope="module")
def table() -> list[list[str]]:
    """Return the cells of the rows in README."""
    section = (ROOT / "README.md").read_text().split("\n## Is it right?\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert rows[:2] == [["measure", "known answer", "measured", "error", "command"], ["---"] * 5]
    return rows[2:]


def format_command(name: str) -> str:
    """Return the last cell of a row."""
    return f"`make evidence ROWS={name}`"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in evidence.ROWS]
)
def test_errors_are_within_what_each_row_allows(table, name):
    rows = list(evidence.ROWS[name]())
    assert [row for row in rows if not row.error <= row.most] == []
    shown = [cells for cells in table if cells[4] == format_command(name)]
    assert [cells[:2] for cells in shown] == [[row.measure, row.known] for row in rows]
    for cells, row in zip(shown, rows, strict=True):
        number, *unit = cells[3].split()
        mantissa, _, exponent = number.translate(DIGITS).partition("·10")
        assert float(f"{mantissa}e{exponent or 0}") <= row.most
        assert unit == row.unit.split()


def test_readme_has_each_row_and_no_other(table):
    assert list(dict.fromkeys(cells[4] for cells in table)) == [format_command(name) for name in evidence.ROWS]
    assert all(len(cells) == 5 and all(cells) for cells in table)


def test_an_error_above_what_is_allowed_exits_with_1_after_all_rows(monkeypatch, capsys):
    row = evidence.Row("NC1, a problem", "1", "1.2", 0.2, "relative", 0.1)
    lost = row._replace(error=float("nan"))
    monkeypatch.setattr(evidence, "ROWS", {"off": lambda: [row, lost], "exact": lambda: [row._replace(error=2e-7)]})
    with pytest.raises(SystemExit) as end:
        evidence.main([])
    assert end.value.code == 1
    out, error = capsys.readouterr()
    assert error == "evidence: off: an error of 0.2, above 0.1; off: an error of nan, above 0.1\n"
    assert out.splitlines()[2:] == [
        f"| NC1, a problem | 1 | 1.2 | {shown} relative | {format_command(name)} |"
        for name, shown in (("off", "0.2"), ("off", "nan"), ("exact", "2·10⁻⁷"))
    ]
    evidence.main(["exact"])


@pytest.mark.parametrize("bound", [1e9, 1.0, 0.0])
def test_bounds_of_linear_probes_that_do_not_hold_exit_with_1(bound, monkeypatch, capsys):
    def fit(*arguments) -> tuple:
        losses, lowers, held_out = fit_linear(*arguments)
        return losses, [bound] * len(lowers), held_out

    fit_linear = fitting.fit_linear
    monkeypatch.setattr(fitting, "fit_linear", fit)
    with pytest.raises(SystemExit) as end:
        evidence.main(["optimum", "lower"])
    assert end.value.code == 1
    assert re.fullmatch(r"evidence: optimum: an error of .*; lower: an error of .*\n", capsys.readouterr().err)


def test_an_unknown_row_is_refused_on_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        evidence.main(["simplex", "nope"])
    assert end.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"evidence: error: unknown row 'nope': expected some of simplex, .*, kills\n", error)
