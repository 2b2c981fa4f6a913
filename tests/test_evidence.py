"""The measures give the known answers, and README says so: a row of its table for each of evidence.py's."""

import re
from pathlib import Path

import pytest

from tests import evidence

README = Path(__file__).parent.parent / "README.md"
SLOW = ("dense", "kills")
PLAIN = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


@pytest.fixture(scope="module")
def table() -> list[list[str]]:
    """The cells of README's rows."""
    section = README.read_text().split("\n## Is it right?\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert rows[:2] == [["measure", "known answer", "measured", "error", "command"], ["---"] * 5]
    return rows[2:]


def command(name: str) -> str:
    return f"`make evidence ROWS={name}`"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in evidence.ROWS]
)
def test_errors_are_within_what_each_row_allows(table, name):
    rows = list(evidence.ROWS[name]())
    assert [row for row in rows if not row.error <= row.most] == []
    shown = [cells for cells in table if cells[4] == command(name)]
    assert [cells[:2] for cells in shown] == [[row.measure, row.known] for row in rows]
    for cells, row in zip(shown, rows, strict=True):
        number, *unit = cells[3].split()
        mantissa, _, exponent = number.translate(PLAIN).partition("·10")
        assert float(f"{mantissa}e{exponent or 0}") <= row.most
        assert unit == row.unit.split()


def test_readme_has_each_row_and_no_other(table):
    assert list(dict.fromkeys(cells[4] for cells in table)) == [command(name) for name in evidence.ROWS]
    assert all(len(cells) == 5 and all(cells) for cells in table)


def test_an_error_above_what_is_allowed_ends_with_1_after_all_rows(monkeypatch, capsys):
    row = evidence.Row("NC1, a problem", "1", "1.2", 0.2, "relative", 0.1)
    lost = row._replace(error=float("nan"))
    monkeypatch.setattr(evidence, "ROWS", {"off": lambda: [row, lost], "exact": lambda: [row._replace(error=2e-7)]})
    with pytest.raises(SystemExit) as end:
        evidence.main([])
    assert end.value.code == 1
    out, error = capsys.readouterr()
    assert error == "evidence: off: an error of 0.2, above 0.1; off: an error of nan, above 0.1\n"
    assert out.splitlines()[2:] == [
        f"| NC1, a problem | 1 | 1.2 | {shown} relative | {command(name)} |"
        for name, shown in (("off", "0.2"), ("off", "nan"), ("exact", "2·10⁻⁷"))
    ]
    evidence.main(["exact"])


def test_an_unknown_row_is_refused_on_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        evidence.main(["simplex", "nope"])
    assert end.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"evidence: error: unknown row 'nope': expected some of simplex, .*, kills\n", error)
