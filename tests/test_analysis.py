import os
import re
from math import log

import pandas as pd
import pytest

from analysis import plots

EPOCHS = "epoch,set,loss,accuracy,seconds\n1,train,0.7,0.5,1\n1,test,0.7,0.5,1\n2,train,0.6,0.6,1\n2,test,0.6,0.6,1\n"
NC1 = """epoch,set,layer,dim,rank,nc1
1,train,hidden1,10,1,3.5
1,train,hidden2,7,0,nan
2,train,hidden1,10,1,2.5
2,train,hidden2,7,1,0.5
"""
DIB = """epoch,set,split,permutation,labeling,entropy,loss,drop
1,train,input,0,y,0.69,0.1,0.01
1,train,input,0,0,0.69,0.2,0.01
1,train,input,0,1,0.60,0.6,0.01
1,train,hidden1,0,y,0.69,0.2,0.01
1,train,hidden1,0,0,0.69,0.3,0.01
1,train,hidden1,0,1,0.60,0.5,0.01
2,train,hidden1,0,y,0.69,0.1,nan
2,train,hidden1,0,0,0.69,0.5,nan
2,train,hidden1,0,1,0.60,0.6,nan
"""


@pytest.fixture
def folder(tmp_path):
    for name, text in (("epochs", EPOCHS), ("nc1", NC1), ("dib", DIB)):
        (tmp_path / f"{name}.csv").write_text(text)
    return tmp_path


def test_information_by_hand(folder):
    """Minimality: the mean of entropy - loss over the digits; sufficiency: that of y; both in bits."""
    info = plots.information(plots.read(folder)["dib"])
    assert info[["epoch", "split"]].values.tolist() == [[1, "input"], [1, "hidden1"], [2, "hidden1"]]
    assert (info["minimality"] * log(2)).tolist() == pytest.approx([0.49 / 2, (0.39 + 0.1) / 2, 0.19 / 2])
    assert (info["sufficiency"] * log(2)).tolist() == pytest.approx([0.59, 0.49, 0.59])


def test_draws_every_figure(folder, capsys):
    plots.main([str(folder)])
    names = {
        f"{figure}.{ending}" for figure in ("training", "nc1", "information", "plane") for ending in ("png", "pdf")
    }
    assert {p.name for p in (folder / "figures").iterdir()} == names
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_draws_what_was_measured(folder):
    (folder / "nc1.csv").write_text(NC1.splitlines()[0] + "\n")
    (folder / "dib.csv").write_text(DIB.splitlines()[0] + "\n")
    plots.main([str(folder)])
    assert {p.stem for p in (folder / "figures").iterdir()} == {"training"}


def test_axes_have_titles_and_units(folder):
    tables = plots.read(folder)
    info = plots.information(tables["dib"])
    labels = [
        {axis.get_ylabel() for axis in figure.axes} | {axis.get_xlabel() for axis in figure.axes}
        for figure in (
            plots.draw_training(tables["epochs"], ""),
            plots.draw_information(info, tables["dib"]["drop"], ""),
            plots.draw_plane(info, ""),
        )
    ]
    assert {"epoch", "cross-entropy (nats)", "accuracy (%)"} <= labels[0]
    assert {"epoch", "minimality (bits)", "sufficiency (bits)"} <= labels[1]
    assert {"minimality (bits)", "sufficiency (bits)"} <= labels[2]
    nc1 = plots.draw_nc1(tables["nc1"], "").axes[0]
    assert nc1.get_yscale() == "log"
    hidden2 = next(line for line in nc1.lines if line.get_label() == "hidden2")
    assert pd.isna(hidden2.get_ydata()[0])  # rank 0: a gap, not a zero


def test_newest_run(tmp_path):
    with pytest.raises(ValueError, match="no run in"):
        plots.newest(tmp_path)
    for name, age in (("b", 5), ("a", 50)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hparams.json").write_text("{}")
        os.utime(tmp_path / name / "hparams.json", (1000 - age, 1000 - age))
    assert plots.newest(tmp_path) == tmp_path / "b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "epochs.csv is not a CSV of a run: [Errno 2] No such file"),
        ("", "epochs.csv is not a CSV of a run: No columns"),
        ("a,b\n1,2\n", "epochs.csv, line 1, lacks the column 'epoch'"),
        (EPOCHS.splitlines()[0] + "\n", "epochs.csv holds no finished epoch"),
        (EPOCHS + "3,tra", "epochs.csv, line 6: set is 'tra', expected train or test"),
        (EPOCHS + "3,train,", "epochs.csv, line 6: loss is '', expected a number"),
        (EPOCHS + "3", "epochs.csv, line 6: set is '', expected train or test"),
        (EPOCHS + "\n\n", "epochs.csv, line 6: epoch is '', expected a whole number from 1"),
        (
            EPOCHS.replace("\n1,train", "\n1.5,train"),
            "epochs.csv, line 2: epoch is '1.5', expected a whole number from 1",
        ),
        (EPOCHS.replace("\n1,train", "\n1,train,9"), "epochs.csv is not a CSV of a run: Length of header"),
        (EPOCHS + "3,test,0.6,6 %,1\n", "epochs.csv, line 6: accuracy is '6 %', expected a number"),
        (EPOCHS + "3,test,0.6,0.5,1,7,8\n", "epochs.csv is not a CSV of a run: Error tokenizing data"),
        (EPOCHS.replace("\n2", "\nx", 1), "epochs.csv, line 4: epoch is 'x', expected a whole number from 1"),
        (b"\x89PNG\xff\xfe", "epochs.csv is not a CSV of a run: 'utf-8' codec"),
    ],
)
def test_names_the_file_and_line_it_cannot_use(folder, content, message):
    path = folder / "epochs.csv"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        plots.main([str(folder)])
    assert not (folder / "figures").exists()


def test_the_legend_of_many_layers_fits():
    layers = [f"block{i}" for i in range(1, 19)] + ["pool"]
    nc1 = pd.DataFrame({"epoch": 1, "set": "train", "layer": layers, "nc1": range(1, 20)})
    figure = plots.draw_nc1(nc1, "")
    figure.set_layout_engine("constrained")
    figure.canvas.draw()
    (legend,) = figure.legends
    inside, outside = legend.get_window_extent(), figure.bbox
    assert outside.x0 <= inside.x0
    assert outside.y0 <= inside.y0
    assert inside.x1 <= outside.x1
    assert inside.y1 <= outside.y1


def test_draws_a_range_test_alone_and_beside_a_run(folder):
    steps = (
        "step,learning_rate,loss,smoothed,chosen\n0,1e-6,2.3,2.3,0\n1,1e-4,2.2,2.25,0\n2,1e-2,1.5,1.9,1\n3,1,9,5,0\n"
    )
    (folder / "lr_range.csv").write_text(steps)
    plots.main([str(folder)])
    assert {"lr_range", "training", "nc1"} <= {p.stem for p in (folder / "figures").iterdir()}
    axis = plots.draw_lr_range(plots.read(folder)["lr_range"], "").axes[0]
    assert axis.get_xscale() == "log"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("learning rate", "cross-entropy (nats)")
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["of a step", "smoothed", "chosen: 0.01"]
    for name, text in (("epochs", EPOCHS), ("nc1", NC1), ("dib", DIB)):
        (folder / f"{name}.csv").write_text(text.splitlines()[0] + "\n")
    for path in (folder / "figures").iterdir():
        path.unlink()
    plots.main([str(folder)])
    assert {p.stem for p in (folder / "figures").iterdir()} == {"lr_range"}
    (folder / "lr_range.csv").write_text(steps.splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"lr_range.csv holds no step"):
        plots.main([str(folder)])
