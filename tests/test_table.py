import pandas as pd
import pytest

from analysis import table
from analysis.tables import groups
from tests.toys import measured

LAYERS = ["hidden1", "hidden2"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.42139], "0.4214"),
        ([12345.6], "12346"),
        ([0.00012345], "0.0001234"),
        ([-0.5], "-0.5000"),
        ([0.0], "0.0000"),
        ([1.0, 2.0, 6.0], "3.0 ± 2.6"),
        ([0.4214, 0.4216], "0.42150 ± 0.00014"),
        ([100.0, 300.0], "200 ± 141"),
        ([99.39] * 5, "99.39 ± 0"),
        ([], "–"),
        ([float("nan")], "rank 0"),
        ([0.5, float("nan")], "0.5000 (1 of 2)"),
        ([1.0, 2.0, 6.0, float("nan")], "3.0 ± 2.6 (3 of 4)"),
    ],
)
def test_mean_and_deviation_in_digits(values, expected):
    assert table.over(pd.Series(values, dtype=float)) == expected


def test_a_row_for_each_run_and_one_for_the_mean(tmp_path):
    """Loss is (1 + seed) / 3 on the training set after the third epoch, accuracy 1 - 1 / 8."""
    fits = table.fits(groups([measured(tmp_path / f"s{seed}", LAYERS, seed) for seed in (0, 2)]))
    assert fits["seeds"].tolist() == ["seed 0", "seed 2", "mean ± sd of 2 seeds"]
    assert fits["loss, train (nats)"].tolist() == ["0.3333", "1.000", "0.67 ± 0.47"]
    assert fits["loss, test (nats)"].tolist() == ["0.5000", "1.167", "0.83 ± 0.47"]
    assert fits["accuracy, test (%)"].tolist() == ["87.50", "87.50", "87.50 ± 0"]
    assert fits["epochs"].tolist() == ["3"] * 3


def test_a_row_for_each_layer_after_the_last_epoch(tmp_path):
    """NC1 is 100 / 2 / 3 and 100 / 4 / 3; decoders tell 0.3 nats, 0.1 from the input, and 0.2 more of the class."""
    layers = table.layers(groups([measured(tmp_path / "run", LAYERS)]))
    assert layers["layer"].tolist() == ["input", *LAYERS]
    assert layers["NC1, train"].tolist() == ["–", "16.67", "8.333"]
    assert layers["NC1, test"].tolist() == ["–", "25.00", "12.50"]
    assert layers["minimality, train (bits)"].tolist() == ["0.1443", "0.4328", "0.4328"]
    assert layers["sufficiency, test (bits)"].tolist() == ["0.4328", "0.7213", "0.7213"]


def test_what_was_not_measured_is_a_dash_or_no_table(tmp_path):
    run = measured(tmp_path / "run", LAYERS)

    def empty(name):
        path = run / f"{name}.csv"
        path.write_text(path.read_text().splitlines()[0] + "\n")

    empty("dib")
    assert table.layers(groups([run])).iloc[0].tolist() == [
        "MLP on SZT",
        "seed 0",
        "hidden1",
        "16.67",
        "25.00",
        *"––––",
    ]
    empty("nc1")
    table.write(groups([run]), run)
    assert (run / "table.tex").read_text().count("tabular") == 2  # begin and end of one
    empty("epochs")
    (run / "lr_range.csv").write_text("step,learning_rate,loss,smoothed,chosen\n0,1e-6,2.3,2.3,0\n")
    with pytest.raises(ValueError, match="run holds no finished epoch"):
        table.write(groups([run]), run)


def test_markdown_and_latex(tmp_path, capsys):
    runs = [measured(tmp_path / f"s{seed}", LAYERS, seed) for seed in (0, 2)]
    runs.append(measured(tmp_path / "other", LAYERS, nonlinearity="a|b_c&"))
    table.write(groups(runs), tmp_path / "out")
    markdown, latex = (tmp_path / "out" / "table.md").read_text(), (tmp_path / "out" / "table.tex").read_text()
    first, second = markdown.split("\n\n")
    for part in (first, second):
        lines = part.splitlines()
        assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
        assert set(lines[1]) <= set("|- ")
    assert r"| MLP on SZT, nonlinearity a\|b_c& | seed 0 | 3 | 0.3333 |" in first
    assert "| mean ± sd of 2 seeds | 3 | 0.67 ± 0.47 |" in first
    assert markdown in capsys.readouterr().out
    assert latex.count(r"\toprule") == latex.count(r"\midrule") == latex.count(r"\bottomrule") == 2
    assert r"MLP on SZT, nonlinearity a|b\_c\& & seed 0 & 3 & 0.3333 &" in latex
    assert r"mean $\pm$ sd of 2 seeds & 3 & 0.67 $\pm$ 0.47 &" in latex
    assert r"input & -- & -- &" in latex
    assert (
        table.latex(pd.DataFrame({"a-1": ["x-1"], "b": ["-0.5 ± 0.1"]})).splitlines()[4] == r"x-1 & $-$0.5 $\pm$ 0.1 \\"
    )
