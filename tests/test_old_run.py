"""Test that a run of the first version is still read. tests/old_run is one, with names that were changed later."""

import base64
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from analysis.plots import write_figures
from analysis.reading import find_table, read_tables
from analysis.report import write_report
from analysis.table import write_tables
from analysis.tables import read_groups, run_script
from layerwise import schema

OLD = Path(__file__).parent / "old_run"


@pytest.fixture
def run(tmp_path):
    """Return a copy of the old run."""
    return shutil.copytree(OLD, tmp_path / "run")


def rename_all(run: Path) -> None:
    """Give the files, columns and flags of an old run their present names and values."""
    for old, new in schema.RENAMED_FILES.items():
        (run / old).rename(run / new)
    for path in run.glob("*.csv"):
        header, rows = path.read_text().split("\n", 1)
        columns = [schema.RENAMED_COLUMNS.get(column, column) for column in header.split(",")]
        path.write_text(",".join(columns) + "\n" + rows)
    hparams = json.loads((run / "hparams.json").read_text())
    renamed = {schema.RENAMED_HPARAMS.get(name, name): value for name, value in hparams.items()}
    renamed["enumerations"] = "data and 1 random"
    (run / "hparams.json").write_text(json.dumps(renamed))


def change_flags(run: Path, **flags: object) -> None:
    """Replace flags of a run."""
    path = run / "hparams.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | flags))


@pytest.mark.parametrize("write", [write_figures, write_report, write_tables])
def test_programs_read_an_old_run(write, run, capsys):
    run_script("", write, [str(run)])
    assert capsys.readouterr().err == ""


def test_convergence_of_an_old_run_is_drawn(run, capsys):
    run_script("", write_figures, [str(run)])
    assert str(run / "figures" / "convergence.png") in capsys.readouterr().out.splitlines()
    assert (run / "figures" / "convergence.pdf").exists()


def test_downloads_of_an_old_run_have_their_own_file_names(run):
    run_script("", write_report, [str(run)])
    links = re.findall(r'download="([^"]+)" href="data:text/csv;base64,([^"]+)"', (run / "report.html").read_text())
    found = {name: base64.b64decode(content) for name, content in links}
    assert found == {path.name: path.read_bytes() for path in run.glob("*.csv")}
    assert set(schema.RENAMED_FILES) <= set(found)


@pytest.mark.parametrize("name", ["dib", "convergence"])
def test_upper_is_the_column_bound(run, name):
    raw = pd.read_csv(find_table(run, name))
    assert read_tables(run)[name]["upper"].tolist() == raw["bound"].tolist()


def test_an_old_and_a_new_run_of_other_seeds_are_one_group(run, tmp_path):
    new = shutil.copytree(run, tmp_path / "new")
    rename_all(new)
    change_flags(new, seed=1)
    (group,) = read_groups([run, new])
    assert group.describe_seeds() == "2 seeds"
    assert [flags["probes"] for flags in group.hparams] == ["tuned", "tuned"]
    for name in ("dib", "convergence"):
        old_rows, new_rows = (
            rows.drop(columns="seed").reset_index(drop=True) for _, rows in group.tables[name].groupby("seed")
        )
        pd.testing.assert_frame_equal(old_rows, new_rows)


@pytest.mark.parametrize(
    ("labelings", "enumerations", "labels"),
    [
        (1, "data", ["MLP on SZT"]),
        (1, 1, ["MLP on SZT, enumerations data", "MLP on SZT, enumerations 1"]),
        (2, 2, ["MLP on SZT, enumerations data and 1 random", "MLP on SZT, enumerations 2"]),
    ],
)
def test_runs_in_data_order_and_in_random_orders_are_not_seeds_of_one_group(
    run, tmp_path, labelings, enumerations, labels
):
    new = shutil.copytree(run, tmp_path / "new")
    rename_all(new)
    change_flags(run, labelings=labelings)
    change_flags(new, seed=1, enumerations=enumerations, linear_splits=["hidden2"])
    assert [group.label for group in read_groups([run, new])] == labels


def test_lower_and_the_controls_of_an_old_run_are_nan(run):
    (group,) = read_groups([run])
    for name in ("dib", "convergence"):
        assert group.tables[name]["lower"].isna().all()
        assert group.tables["information" if name == "dib" else "convergence_information"]["minimality"].notna().all()
    assert group.tables["information"][["shuffled", "held_out"]].isna().all(axis=None)
    assert group.tables["information"]["deviation"].notna().all()  # of data order and of a random order
    assert group.tables["noise_information"].empty


def test_an_old_and_a_new_run_of_the_same_seed_are_refused_as_equal(run, tmp_path):
    new = shutil.copytree(run, tmp_path / "new")
    rename_all(new)
    with pytest.raises(ValueError, match="the same flags"):
        read_groups([run, new])
