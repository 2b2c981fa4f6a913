"""The figures as files."""

import matplotlib.pyplot as plt
import pytest

from analysis import gallery, plots, style
from analysis.tables import groups
from tests.toys import measured

LAYERS = ["hidden1", "hidden2"]
ALL = {"training", "nc1", "depth", "information", "plane", "plane_by_epoch", "gap", "settle"}
LR_RANGE = "step,learning_rate,loss,smoothed,chosen\n0,1e-6,2.3,2.3,0\n1,1e-2,1.5,1.9,1\n"


def test_every_figure_as_png_and_as_pdf_with_its_fonts(tmp_path, capsys):
    plots.write(groups([measured(tmp_path / f"s{seed}", LAYERS, seed, factors=(1, 2)) for seed in range(2)]), tmp_path)
    files = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert set(files) == {f"{name}.{ending}" for name in ALL for ending in ("png", "pdf")}
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "figures" / f"{name}.png")
        for name in ("training", "nc1", "depth", "information", "plane", "plane_by_epoch", "gap", "settle")
    ]
    for name, content in files.items():
        if name.endswith(".pdf"):
            assert b"/FontFile2" in content, name  # TrueType, embedded
            assert b"/Type3" not in content, name
            assert b"/Subtype /Image" not in content, name  # lines, not a picture of lines
        else:
            assert content.startswith(b"\x89PNG"), name


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        ([], ALL),
        (["settle"], ALL - {"settle"}),
        (["nc1"], ALL - {"nc1", "depth"}),
        (["dib", "settle"], {"training", "nc1", "depth", "gap"}),
        (["nc1", "dib", "settle"], {"training"}),
        (["hidden"], {"training", "nc1", "depth", "information", "plane", "plane_by_epoch", "settle"}),
        ([",test,"], ALL - {"gap"}),
        (["epochs", "nc1", "dib", "settle"], set()),
    ],
)
def test_what_was_measured_is_drawn(tmp_path, without, expected):
    """A table without rows (a measure that was off), the input alone, one set alone, a range test alone."""
    run = measured(tmp_path / "run", LAYERS, factors=() if "settle" in without else (1, 2))
    (run / "lr_range.csv").write_text(LR_RANGE)
    for path in (run / f"{name}.csv" for name in ("epochs", "nc1", "dib", *["settle"] * ("settle" not in without))):
        header, *rows = path.read_text().splitlines()
        if path.stem in without:
            rows = []
        elif path.stem != "epochs":
            rows = [row for row in rows if not any(text in row for text in without)]
        path.write_text("\n".join([header, *rows]) + "\n")
    found = groups([run])
    assert set(gallery.names(found)) == expected | {"lr_range"}
    with plt.rc_context(style.STYLE):
        for name in gallery.names(found):
            gallery.figure(name, found)
    plt.close("all")
