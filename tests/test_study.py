"""The study: its tables are right for numbers worked out by hand, and docs/study.md shows what tools/study.py makes."""

import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from analysis import statistics, tables
from tests.toys import write_run
from tools import findings, study
from training import configuration

LAYERS = ["hidden1", "hidden2", "hidden3"]


@pytest.fixture
def groups(tmp_path):
    """Make five seeds of a sweep, and five whose probes are the thesis's.

    NC1 halves by layer and with 1 / epoch. Probes find more with each epoch.
    """
    made = {}
    for name, flags in (("a", {}), ("a-thesis", {"probes": "thesis"})):
        factors = [(1, 2, 4, 8), *[()] * 4]
        folders = [write_run(tmp_path / f"{name}{i}", LAYERS, i, factors=factors[i], **flags) for i in range(5)]
        made[name] = tables.read_groups(folders)[0]
    return made


def list_rows(table: str, groups: dict) -> list[dict]:
    """Return the rows of a table."""
    return getattr(findings, f"tabulate_{table}")(groups).to_dict("records")


def test_tables_of_fit_collapse_and_law_are_as_worked_out_by_hand(groups, monkeypatch):
    first = list_rows("fit", groups)[0]
    assert (first["seeds"], first["epochs"], first["training error (%)"]) == ("5", "3", "12.50 ± 0")
    assert first["first measured epoch with 99% training accuracy"] == "never"
    monkeypatch.setattr(findings, "FITTED", 0.7)  # 0.5, 0.75, 0.875 are right
    assert list_rows("fit", groups)[0]["first measured epoch with 70% training accuracy"] == "2"
    names = ("start, train", "70% right, train", "end, test")
    shown = [list_rows("collapse", groups)[i][name] for i in (0, 2) for name in names]
    # 50 / epoch times 1 to 5: their geometric mean is 120^(1/5) = 2.605, and a deviation is a factor of 1.9
    assert shown == [f"{value} ×/÷ 1.89" for value in ("130", "65.1", "65.1", "32.6", "16.3", "16.3")]
    law = list_rows("law", groups)[0]
    assert law["ratio of NC1 between consecutive layers, end"] == "0.50 to 0.50"
    assert (law["factor, start"], law["correlation, end"], law["≤ -0.9 from epoch"]) == (
        "0.500 ×/÷ 1.00",
        "-1.000 ± 0",
        "1",
    )


def test_tables_of_information_are_as_worked_out_by_hand(groups):
    epochs = groups["a"].tables["epochs"]
    epochs.loc[epochs["set"] == "test", "loss"] *= 1 + epochs["seed"]  # so that the gap grows with the seed
    compression = list_rows("compression", groups)
    assert [row["layer"] for row in compression] == 2 * LAYERS
    # 0.1 epoch (1 + 0.1 seed) nats, a mean of 0.12 epoch
    assert (compression[0]["start"], compression[0]["highest"]) == ("0.173 ± 0.023", "0.519 ± 0.068 (epoch 3)")
    assert compression[0]["start to end, test"] == "0.346 ± 0.046 (5 up, 0 down)"
    assert compression[0]["highest to lowest, test"] == "–"
    first = list_rows("generalisation", groups)[0]
    assert first["minimality, loss gap: over epochs"] == "-1.000 ± 0"  # it grows while the gap of the loss falls
    assert first["minimality, loss gap: over seeds"] == first["change, loss gap: over seeds"] == "1.00"
    assert first["minimality, accuracy: over seeds"] == "nan"  # all seeds have the same
    probes = {row["runs"]: row for row in list_rows("probes", groups)}  # of the last layer
    assert probes["a"]["minimality, epoch 3"] == "0.519 ± 0.068"
    # the probes of one of the two labelings have 0.01 nats less
    assert probes["a-thesis"]["minimality, epoch 3"] == "0.512 ± 0.068"
    assert probes["a"]["between"] == "0.173 ± 0.023 (epoch 1)"
    convergence = list_rows("convergence", groups)[0]
    assert [convergence[f"× {factor}"] for factor in (1, 2, 4, 8)] == ["0.058", "0.115", "0.231", "0.462"]
    ends = list_rows("architectures", groups)[0]
    assert (ends["d"], ends["NC1, test over train"], ends["NC1, test over train, at the start"]) == (
        "8",
        "1.50 ×/÷ 1.00",
        "1.50 ×/÷ 1.00",
    )


def test_a_change_is_shown_with_how_many_seeds_rise_and_fall(groups):
    """Minimality is 0.35 bits in epoch 2, then 0, except in seed 0, where it rises by 0.17."""
    information = groups["a"].tables["information"]
    information.loc[(information["epoch"] == 3) & (information["seed"] > 0), ["minimality"]] = 0.0
    row = list_rows("compression", groups)[0]
    assert (row["highest"][-9:], row["lowest after"][-9:]) == ("(epoch 2)", "(epoch 3)")
    assert row["highest to lowest, test"].endswith(" (1 up, 4 down)")
    assert (row["lowest to end, test"], row["end, seed 0, × 8 steps"]) == ("–", "0.462")


def test_a_geometric_mean_shows_how_many_values_it_is_of():
    series = findings.pd.Series
    assert findings.format_geometric(series([1.0, 4.0])) == "2.00 ×/÷ 2.67"
    assert findings.format_geometric(series([1.0, float("nan"), 4.0])) == "2.00 ×/÷ 2.67 (2 of 3)"
    assert findings.format_geometric(series([float("nan")])) == "–"


def test_spearman_correlates_ranks():
    series = findings.pd.Series
    assert statistics.compute_spearman(series([1, 2, 9.0]), series([0.1, 0.2, 0.3])) == pytest.approx(1)
    assert statistics.compute_spearman(series([1, 2, 3.0]), series([9, 4, 1.0])) == pytest.approx(-1)


def test_the_document_has_every_table_and_figure():
    text = (study.DOCS / "study.md").read_text()
    figures = {f"figure {name}" for name in study.FIGURES}
    assert sorted(re.findall(r"<!-- (?!end)(.+) -->", text)) == sorted([*study.TABLES, *figures, "commands"])
    for name in study.FIGURES:
        assert study.format_figure(name) in text
        assert 0 < (study.DOCS / "study" / f"{name}.png").stat().st_size < 300_000, name
    assert {path.stem for path in (study.DOCS / "study").iterdir()} == set(study.FIGURES)
    for name in study.SWEEPS:
        assert study.format_commands(name) in text
    for name, (_, sweeps) in study.TABLES.items():
        part = text.split(f"<!-- {name} -->\n")[1].split("<!-- end -->")[0].splitlines()
        assert {row.split("|")[1].strip() for row in part[2:]} == set(sweeps), name


def test_the_commands_measure_what_the_document_shows():
    """Its figures and tables show digits in data order, without controls."""
    for name, sweep in study.SWEEPS.items():
        config = configuration.parse(sweep.flags.split())
        assert not config.dib or (config.enumerations, config.controls) == ("data", False), name


def test_programs_start_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    with Path("log").open("w") as log:
        assert study.launch(log, "tools.sweep", "--help"), Path("log").read_text()
    study.children.clear()


def test_a_signal_ends_running_programs_and_starts_no_more(tmp_path, monkeypatch):
    """A SIGINT of the keyboard reaches the programs only through `stop_programs`."""
    (tmp_path / "wait.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "caught", [])
    with (tmp_path / "log").open("w") as log, ThreadPoolExecutor() as pool:
        running = pool.submit(study.launch, log, "wait")
        while not study.children:
            time.sleep(0.01)
        study.stop_programs(signal.SIGINT, None)
        assert running.result(timeout=30) is False
        assert study.launch(log, "wait") is False
    study.children.clear()


def test_a_table_is_put_between_its_marks():
    text = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n"
    filled = study.replace_parts(text, {"one": "new \\1\n", "two": "2\n"})
    assert filled == "a\n<!-- one -->\nnew \\1\n<!-- end -->\nb\n<!-- two -->\n2\n<!-- end -->\n"
    with pytest.raises(ValueError, match="lacks <!-- three -->"):
        study.replace_parts(text, {"three": ""})


@pytest.mark.parametrize(("program", "expected"), [("true", True), ("false", False)])
def test_a_sweep_that_fails_is_reported(tmp_path, monkeypatch, capsys, program, expected):
    monkeypatch.setattr(study, "RUNS", tmp_path)
    monkeypatch.setattr(sys, "executable", program)
    assert study.finish_sweep("mnistnet") is expected
    assert ("not finished" in capsys.readouterr().out) is not expected
    assert (tmp_path / "mnistnet.log").exists()


@pytest.mark.slow
def test_a_small_study(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    docs = tmp_path / "docs"
    (docs / "study").mkdir(parents=True)
    marks = ("commands", "fit", "figure training")
    (docs / "study.md").write_text("".join(f"<!-- {name} -->\n<!-- end -->\n" for name in marks))
    monkeypatch.setattr(study, "DOCS", docs)
    small = study.Sweep(2, 0.5, "-w 4 3 --epochs 2 --dib-epochs 1 --dib-size 64", convergence=True)
    monkeypatch.setattr(study, "SWEEPS", {"small": small})
    monkeypatch.setattr(study, "FIGURES", {"training": ("training", ["small"])})
    monkeypatch.setattr(study, "TABLES", {"fit": (findings.tabulate_fit, ["small"])})
    study.main()
    assert "small: 2 to do, about 1 min on one core" in capsys.readouterr().out
    text = (docs / "study.md").read_text()
    assert "--dib-size 64 --run-dir runs/study/small" in text
    assert "| small | 2 | 2 |" in text
    assert (docs / "study" / "training.png").exists()
    assert (Path("runs/study/small-seed0/convergence.csv")).exists()
    study.main()
    assert "about" not in capsys.readouterr().out
