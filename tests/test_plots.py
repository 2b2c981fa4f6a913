"""Test the figures as files."""

import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from analysis import gallery, style
from analysis.plots import write_figures
from analysis.tables import read_groups
from tests.toys import write_run

LAYERS = ["hidden1", "hidden2"]
ALL = {"training", "nc1", "depth", "information", "plane", "plane_by_epoch", "gap", "convergence"}
LR_RANGE = "step,learning_rate,loss,smoothed,chosen\n0,1e-6,2.3,2.3,0\n1,1e-2,1.5,1.9,1\n"


def test_every_figure_is_written_as_png_and_as_pdf_with_fonts(tmp_path, capsys):
    write_figures(
        read_groups([write_run(tmp_path / f"s{seed}", LAYERS, seed, factors=(1, 2)) for seed in range(2)]), tmp_path
    )
    files = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert set(files) == {f"{name}.{ending}" for name in ALL for ending in ("png", "pdf")}
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "figures" / f"{name}.png")
        for name in ("training", "nc1", "depth", "information", "plane", "plane_by_epoch", "gap", "convergence")
    ]
    for name, content in files.items():
        if name.endswith(".pdf"):
            assert b"/FontFile2" in content, name  # TrueType, embedded
            assert b"/Type3" not in content, name
            assert b"/Subtype /Image" not in content, name  # vector graphics
        else:
            assert content.startswith(b"\x89PNG"), name


def test_quantities_at_their_ceiling_are_named(tmp_path, capsys):
    """Minimality of the test set is within 0.01 bits (0.007 nats) in all layers, except in one case."""
    sentence = "minimality on the test set is at its ceiling of 1.00 bits in every layer and epoch, so it shows no "
    sentence += "difference between them; more samples (--dib-size) are needed."
    for nats, more, found in ((0.006, 0, [sentence]), (0.006, 0.002, []), (0.008, 0, [])):
        run = write_run(tmp_path / f"{nats}{more}", LAYERS)
        dib = pd.read_csv(run / "dib.csv", dtype={"labeling": str})
        is_chosen = (dib["set"] == "test") & dib["labeling"].isin(["0", "1"])
        dib.loc[is_chosen, "upper"] = nats + more * ((dib["split"] == "hidden2") & (dib["epoch"] == 2))
        dib.to_csv(run / "dib.csv", index=False)
        groups = read_groups([run])
        write_figures(groups, run)
        printed = capsys.readouterr().out.splitlines()
        assert [line for line in printed if not line.endswith(".png")] == [f"MLP on SZT: {each}" for each in found]
        for name in ("information", "plane", "plane_by_epoch"):
            assert [sentence in gallery.write_caption(name, groups)] == [bool(found)]
        assert sentence not in gallery.write_caption("nc1", groups)


def test_captions_explain_controls_if_there_are_any(tmp_path):
    groups = read_groups([write_run(tmp_path / str(on), LAYERS, controls=on, factors=(1, 2)) for on in (True, False)])
    for name in ("information", "plane", "plane_by_epoch", "convergence"):
        kind = gallery.KINDS[name]
        assert gallery.write_caption(name, groups) == f"{kind.caption} {kind.controls}"
        assert gallery.write_caption(name, groups[1:]) == kind.caption
        assert "shuffled labels" in kind.controls
    assert gallery.write_caption("nc1", groups) == gallery.KINDS["nc1"].caption


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        ([], ALL),
        (["convergence"], ALL - {"convergence"}),
        (["nc1"], ALL - {"nc1", "depth"}),
        (["dib", "convergence"], {"training", "nc1", "depth", "gap"}),
        (["nc1", "dib", "convergence"], {"training"}),
        (["hidden"], {"training", "nc1", "depth", "information", "plane", "plane_by_epoch", "convergence"}),
        ([",test,"], ALL - {"gap"}),
        (["epochs", "nc1", "dib", "convergence"], set()),
    ],
)
def test_figures_of_what_was_measured_are_drawn(tmp_path, without, expected):
    """A run may have tables without rows (a measure was off), only the input, only one set or only a range test."""
    run = write_run(tmp_path / "run", LAYERS, factors=() if "convergence" in without else (1, 2))
    (run / "lr_range.csv").write_text(LR_RANGE)
    for path in run.glob("*.csv"):
        if path.stem == "lr_range":
            continue
        header, *rows = path.read_text().splitlines()
        if path.stem in without:
            rows = []
        elif path.stem != "epochs":
            rows = [row for row in rows if not any(text in row for text in without)]
        path.write_text("\n".join([header, *rows]) + "\n")
    found = read_groups([run])
    assert set(gallery.list_figures(found)) == expected | {"lr_range"}
    with plt.rc_context(style.STYLE):
        for name in gallery.list_figures(found):
            gallery.draw_figure(name, found)
    plt.close("all")


def test_analysis_does_not_import_torch():
    code = "import sys, analysis.plots, analysis.report, analysis.table; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(gallery.__file__).parents[1], check=True)
