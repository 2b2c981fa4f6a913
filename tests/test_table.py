import re

import pandas as pd
import pytest

from analysis import table
from analysis.tables import groups
from tests.toys import measured

LAYERS = ["hidden1", "hidden2"]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.42139], "0.4214"),
        ([12345.6], "12346"),
        ([0.00012345], "0.0001234"),
        ([-0.5], "-0.5000"),
        ([0.0], "0.000"),
        ([1.234e-10], "1.234e-10"),
        ([1.0, 2.0, 6.0], "3.0 ± 2.6"),
        ([0.4214, 0.4216], "0.42150 ± 0.00014"),
        ([100.0, 300.0], "200 ± 141"),
        ([1e-9, 3e-9], "2.0e-09 ± 1.4e-09"),
        ([0.5, 0.500000002], "5.000000010e-01 ± 1.4e-09"),
        ([99.39] * 5, "99.39 ± 0"),
        ([], "–"),
        ([NAN], "rank 0"),
        ([0.5, NAN], "0.5000 (1 of 2)"),
        ([1.0, 2.0, 6.0, NAN], "3.0 ± 2.6 (3 of 4)"),
        ([INF], "inf"),
        ([1.0, INF], "inf"),
    ],
)
def test_mean_and_deviation_in_digits(values, expected):
    assert table.cell(pd.Series(values, dtype=float), none="rank 0") == expected


def test_a_row_for_each_run_and_one_for_the_mean(tmp_path):
    """Loss is (1 + seed) / 3 on the training set after the third epoch, accuracy 1 - 1 / 8."""
    fits = table.fits(groups([measured(tmp_path / f"s{seed}", LAYERS, seed) for seed in (0, 2)]))
    assert fits["seeds"].tolist() == ["seed 0", "seed 2", "mean ± sd of 2 seeds"]
    assert fits["loss, train (nats)"].tolist() == ["0.3333", "1.000", "0.67 ± 0.47"]
    assert fits["loss, test (nats)"].tolist() == ["0.5000", "1.167", "0.83 ± 0.47"]
    assert fits["accuracy, test (%)"].tolist() == ["87.50", "87.50", "87.50 ± 0"]
    assert fits["epochs"].tolist() == ["3"] * 3


def test_a_row_for_each_layer_after_the_last_epoch(tmp_path):
    """NC1 is 100 / 2 / 3 and 100 / 4 / 3; decoders tell 0.3 nats, from the input too, and 0.2 more of the class."""
    (group,) = groups([measured(tmp_path / "run", LAYERS)])
    layers = table.layers(group)
    assert layers["layer"].tolist() == ["input", *LAYERS]
    assert layers["NC1, train"].tolist() == ["100.0", "16.67", "8.333"]
    assert layers["NC1, test"].tolist() == ["150.0", "25.00", "12.50"]
    assert layers["minimality, train (bits)"].tolist() == ["0.4328"] * 3
    assert layers["sufficiency, test (bits)"].tolist() == ["0.7213"] * 3


def test_how_many_decoders_were_not_found_is_said_for_the_sets_there_are(tmp_path):
    """A third of those of the layers, in each epoch, and all three of the input in the first: 9 of 21 of each set."""
    run = measured(tmp_path / "run", LAYERS)
    assert table.heads(*groups([run])).startswith("Of DIB's decoders in all epochs 42.9% (train set) and 42.9% (test")
    text = (run / "dib.csv").read_text()
    (run / "dib.csv").write_text("".join(row for row in text.splitlines(True) if ",train," not in row))
    assert table.heads(*groups([run])).startswith("Of DIB's decoders in all epochs 42.9% (test set) ended more")
    (run / "dib.csv").write_text(text.splitlines(True)[0])
    assert table.heads(*groups([run])) == ""


def test_a_dead_layer_and_a_lost_loss_are_said(tmp_path):
    run = measured(tmp_path / "run", LAYERS)
    (run / "nc1.csv").write_text(re.sub(r"(3,train,hidden2,8),1,.*", r"\1,0,nan,nan,1", (run / "nc1.csv").read_text()))
    (run / "epochs.csv").write_text(re.sub(r"(3,test),[^,]*", r"\1,nan", (run / "epochs.csv").read_text()))
    (group,) = groups([run])
    assert table.layers(group)["NC1, train"].tolist() == ["100.0", "16.67", "rank 0"]
    assert table.fits([group])["loss, test (nats)"].tolist() == ["nan"]


def test_a_rank_that_is_short_is_given(tmp_path):
    """d is 8, of ten classes; the ranks of two seeds differ in hidden2, and are 9 - 1 in hidden1."""
    runs = [measured(tmp_path / f"s{seed}", LAYERS, seed, num_classes=10) for seed in (0, 1)]
    for run, rank in zip(runs, (3, 5), strict=True):
        text = (run / "nc1.csv").read_text()
        for layer, its in (("input,12", 9), ("hidden1,8", 8), ("hidden2,8", rank)):
            text = text.replace(f"{layer},1,", f"{layer},{its},")
        (run / "nc1.csv").write_text(text)
    found = [table.layers(group)["NC1, train"].tolist()[1:] for group in (*groups(runs[:1]), *groups(runs))]
    assert found == [["16.67", "8.333 (rank 3)"], ["25 ± 12", "12.5 ± 5.9 (rank 3 to 5)"]]


def test_what_was_not_measured_is_a_dash_or_no_table(tmp_path, capsys):
    run = measured(tmp_path / "run", LAYERS)

    def empty(name):
        path = run / f"{name}.csv"
        path.write_text(path.read_text().splitlines()[0] + "\n")

    empty("dib")
    assert table.layers(*groups([run])).iloc[:2].to_numpy().tolist() == [
        ["input", "100.0", "150.0", *"––––"],
        ["hidden1", "16.67", "25.00", *"––––"],
    ]
    empty("nc1")
    table.write(groups([run]), run)
    assert (run / "table.tex").read_text().count("tabular") == 2  # begin and end of one
    empty("epochs")
    (run / "lr_range.csv").write_text("step,learning_rate,loss,smoothed,chosen\n0,1e-6,2.3,2.3,0\n")
    with pytest.raises(SystemExit):
        table.write(groups([run]), run)
    assert "run holds no finished epoch" in capsys.readouterr().err


@pytest.fixture
def written(tmp_path):
    runs = [measured(tmp_path / f"s{seed}", LAYERS, seed) for seed in (0, 2)]
    runs.append(measured(tmp_path / "other", LAYERS, nonlinearity="a|b_c&"))
    table.write(groups(runs), tmp_path / "out")
    return tmp_path / "out"


def test_markdown(written, capsys):
    text = (written / "table.md").read_text()
    _, *blocks = text.split("**")
    assert blocks[::2] == [
        "Loss and accuracy",
        "MLP on SZT, epoch 3, mean ± sd of 2 seeds",
        "MLP on SZT, nonlinearity a|b_c&, epoch 3, seed 0",
    ]
    for block in blocks[1::2]:
        lines = block.strip().split("\n\n")[0].splitlines()
        assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
        assert set(lines[1]) == set("|- ")
    note = "Of DIB's decoders in all epochs 42.9% (train set) and 42.9% (test set) ended more than 0.001 bits above "
    assert [note in block for block in blocks[1::2]] == [False, True, True]
    assert "| mean ± sd of 2 seeds | 3 | 0.67 ± 0.47 |" in blocks[1]
    assert r"| MLP on SZT, nonlinearity a\|b_c& | seed 0 | 3 | 0.3333 |" in blocks[1]


def test_latex(written):
    text = (written / "table.tex").read_text()
    assert text.startswith("% needs \\usepackage{booktabs}\n")
    assert (
        text.count("\n% Of DIB's decoders in all epochs 42.9% (train set) and 42.9% (test set) ended more than ") == 2
    )
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 3
    assert r"\multicolumn{3}{c}{} & \multicolumn{2}{c}{loss (nats)} & \multicolumn{2}{c}{accuracy (\%)} \\" in text
    assert r" & \multicolumn{2}{c}{NC1} & \multicolumn{2}{c}{minimality (bits)} &" in text
    assert r"layer & train & test & train & test & train & test \\" in text
    assert r"MLP on SZT, nonlinearity a|b\_c\& & seed 0 & 3 & 0.3333 &" in text
    assert r"mean $\pm$ sd of 2 seeds & 3 & 0.67 $\pm$ 0.47 &" in text
    assert r"input & 200 $\pm$ 141 &" in text
    negative = table.latex(pd.DataFrame({"layer": ["x-1"], "NC1, train": ["-0.5 ± 0.1"]}))
    assert r"x-1 & $-$0.5 $\pm$ 0.1 \\" in negative
