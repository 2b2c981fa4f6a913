import re

import pandas as pd
import pytest

from analysis import table
from analysis.tables import read_groups
from tests.toys import write_run

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
def test_digits_of_mean_and_deviation(values, expected):
    assert table.format_mean(pd.Series(values, dtype=float), nan="rank 0") == expected


def test_each_run_and_the_mean_have_a_row(tmp_path):
    """Loss is (1 + seed) / 3 on the training set after the third epoch, accuracy 1 - 1 / 8."""
    training = table.tabulate_training(read_groups([write_run(tmp_path / f"s{seed}", LAYERS, seed) for seed in (0, 2)]))
    assert training["seeds"].tolist() == ["seed 0", "seed 2", "mean ± sd of 2 seeds"]
    assert training["loss, train (nats)"].tolist() == ["0.3333", "1.000", "0.67 ± 0.47"]
    assert training["loss, test (nats)"].tolist() == ["0.5000", "1.167", "0.83 ± 0.47"]
    assert training["accuracy, test (%)"].tolist() == ["87.50", "87.50", "87.50 ± 0"]
    assert training["epochs"].tolist() == ["3"] * 3


def test_each_layer_has_a_row_after_the_last_epoch(tmp_path):
    """NC1 is 100 / 2 / 3 and 100 / 4 / 3. Minimality is 0.3 nats, also of the input, and sufficiency 0.2 nats more."""
    (group,) = read_groups([write_run(tmp_path / "run", LAYERS)])
    layers = table.tabulate_layers(group)
    assert layers["layer"].tolist() == ["input", *LAYERS]
    assert layers["NC1, train"].tolist() == ["100.0", "16.67", "8.333"]
    assert layers["NC1, test"].tolist() == ["150.0", "25.00", "12.50"]
    assert layers["minimality, train (bits)"].tolist() == ["0.4328"] * 3
    assert layers["sufficiency, test (bits)"].tolist() == ["0.7213"] * 3


def test_the_share_of_suboptimal_probes_is_given_for_each_measured_set(tmp_path):
    """They are one of four of each layer in each epoch, and those of y and the digits of the input: 9 of 28.

    Held-out rows do not count.
    """
    run = write_run(tmp_path / "run", LAYERS)
    assert table.describe_suboptimal_probes(*read_groups([run])).startswith(
        "Of the probes of all epochs, 32.1% (train set) and 32.1% (test"
    )
    text = (run / "dib.csv").read_text()
    (run / "dib.csv").write_text("".join(row for row in text.splitlines(True) if ",train," not in row))
    assert table.describe_suboptimal_probes(*read_groups([run])).startswith(
        "Of the probes of all epochs, 32.1% (test set) are known"
    )
    (run / "dib.csv").write_text(text.splitlines(True)[0])
    assert table.describe_suboptimal_probes(*read_groups([run])) == ""


def test_a_dead_layer_and_a_loss_that_is_nan_are_shown(tmp_path):
    run = write_run(tmp_path / "run", LAYERS)
    (run / "nc1.csv").write_text(re.sub(r"(3,train,hidden2,8),1,.*", r"\1,0,nan,nan,1", (run / "nc1.csv").read_text()))
    (run / "epochs.csv").write_text(re.sub(r"(3,test),[^,]*", r"\1,nan", (run / "epochs.csv").read_text()))
    (group,) = read_groups([run])
    assert table.tabulate_layers(group)["NC1, train"].tolist() == ["100.0", "16.67", "rank 0"]
    assert table.tabulate_training([group])["loss, test (nats)"].tolist() == ["nan"]


def test_a_deficient_rank_is_given(tmp_path):
    """d is 8 and there are ten classes. The ranks of two seeds differ in hidden2, and are 8 in hidden1."""
    runs = [write_run(tmp_path / f"s{seed}", LAYERS, seed, num_classes=10) for seed in (0, 1)]
    for run, rank in zip(runs, (3, 5), strict=True):
        text = (run / "nc1.csv").read_text()
        for layer, new in (("input,12", 9), ("hidden1,8", 8), ("hidden2,8", rank)):
            text = text.replace(f"{layer},1,", f"{layer},{new},")
        (run / "nc1.csv").write_text(text)
    found = [
        table.tabulate_layers(group)["NC1, train"].tolist()[1:]
        for group in (*read_groups(runs[:1]), *read_groups(runs))
    ]
    assert found == [["16.67", "8.333 (rank 3)"], ["25 ± 12", "12.5 ± 5.9 (rank 3 to 5)"]]


def test_a_measure_that_was_off_is_a_dash_or_no_table(tmp_path, capsys):
    run = write_run(tmp_path / "run", LAYERS)

    def remove_rows(name):
        path = run / f"{name}.csv"
        path.write_text(path.read_text().splitlines()[0] + "\n")

    remove_rows("dib")
    assert table.tabulate_layers(*read_groups([run])).iloc[:2].to_numpy().tolist() == [
        ["input", "100.0", "150.0", *"––––"],
        ["hidden1", "16.67", "25.00", *"––––"],
    ]
    remove_rows("nc1")
    table.write_tables(read_groups([run]), run)
    assert (run / "table.tex").read_text().count("tabular") == 2  # begin and end of a single one
    remove_rows("epochs")
    (run / "lr_range.csv").write_text("step,learning_rate,loss,smoothed,chosen\n0,1e-6,2.3,2.3,0\n")
    with pytest.raises(SystemExit):
        table.write_tables(read_groups([run]), run)
    assert "run holds no finished epoch" in capsys.readouterr().err


def test_controls_are_in_a_table_of_their_own(tmp_path):
    """Information of shuffled labels is 0.02 nats, of held-out samples 0.15, of the digits of noise 0.08 to 0.1."""
    runs = [write_run(tmp_path / f"s{seed}", LAYERS, seed, enumerations=3, linear=("hidden2",)) for seed in (0, 2)]
    controls = table.tabulate_controls(*read_groups(runs))
    assert controls.to_dict("list") == {
        "layer": ["input", *LAYERS],
        "shuffled, train (bits)": ["0.02885 ± 0"] * 3,
        "shuffled, test (bits)": ["0.02885 ± 0"] * 3,
        "held-out, test (bits)": ["0.2164 ± 0"] * 3,
        "noise, train (bits)": ["–", "–", "0.1298 ± 0"],
        "noise, test (bits)": ["–", "–", "0.1298 ± 0"],
        "deviation, train (bits)": ["0.01443 ± 0"] * 3,
        "deviation, test (bits)": ["0.01443 ± 0"] * 3,
    }
    note = table.describe_controls(controls)
    assert re.findall(r"([\w-]+): ", note) == ["shuffled", "held-out", "noise", "deviation"]


def test_columns_of_controls_without_values_are_left_out(tmp_path):
    (group,) = read_groups([write_run(tmp_path / "run", LAYERS)])
    controls = table.tabulate_controls(group)
    assert [name.split(",")[0] for name in controls] == ["layer", "shuffled", "shuffled", "held-out"]
    assert re.findall(r"([\w-]+): ", table.describe_controls(controls)) == ["shuffled", "held-out"]
    (group,) = read_groups([write_run(tmp_path / "without", LAYERS, controls=False)])
    assert table.tabulate_controls(group).empty
    assert [title for title, *_ in table.make_tables([group])] == ["Loss and accuracy", "MLP on SZT, epoch 3, seed 0"]


def test_the_note_gives_the_ceilings(tmp_path):
    (group,) = read_groups([write_run(tmp_path / "run", LAYERS)])
    for quantity in ("minimality", "sufficiency"):
        sentence = f"The ceiling of {quantity} is 0.9955 bits (train set) and 0.9955 bits (test set)."
        assert sentence in table.describe_information(group)
    assert table.describe_linear_probes(group) == ""


def test_the_note_gives_the_gaps_of_linear_probes(tmp_path):
    """The loss of digit 1 is 0.01 nats above `upper`, in 3 epochs of 2 sets, and all gaps are 1e-6 more."""
    (group,) = read_groups([write_run(tmp_path / "run", LAYERS, linear=("hidden2",))])
    sentences = "The loss of linear probes is above the optimum by at most 1.0e-02 nats. 6 of 24 are not proved to be "
    assert table.describe_linear_probes(group) == sentences + "within 1e-05 nats."
    assert table.describe_linear_probes(group) in table.describe_information(group)
    group.tables["dib"]["loss"] = float("nan")
    assert "24 of 24 are not proved" in table.describe_linear_probes(group)


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        ({"train": 3482, "test": 614}, "3,482 training and 614 test samples"),
        (None, "the number of samples is not recorded"),
        ({"train": 60, "test": 60}, ""),
    ],
)
def test_a_note_warns_of_sets_of_unequal_size(tmp_path, samples, reason):
    run = write_run(tmp_path / "run", LAYERS, dib_samples=samples)
    warning = f"Minimality and sufficiency of the two sets cannot be compared: {reason}. Use --dib-size "
    assert (warning in table.describe_information(*read_groups([run]))) == bool(reason)
    text = (run / "dib.csv").read_text()
    (run / "dib.csv").write_text("".join(row for row in text.splitlines(True) if ",train," not in row))
    assert "cannot be compared" not in table.describe_information(*read_groups([run]))


@pytest.fixture
def written(tmp_path):
    runs = [write_run(tmp_path / f"s{seed}", LAYERS, seed) for seed in (0, 2)]
    runs.append(write_run(tmp_path / "other", LAYERS, nonlinearity="a|b_c&"))
    table.write_tables(read_groups(runs), tmp_path / "out")
    return tmp_path / "out"


def test_markdown(written, capsys):
    text = (written / "table.md").read_text()
    _, *blocks = text.split("**")
    assert blocks[::2] == [
        "Loss and accuracy",
        "MLP on SZT, epoch 3, mean ± sd of 2 seeds",
        "MLP on SZT, epoch 3, mean ± sd of 2 seeds: controls",
        "MLP on SZT, nonlinearity a|b_c&, epoch 3, seed 0",
        "MLP on SZT, nonlinearity a|b_c&, epoch 3, seed 0: controls",
    ]
    for block in blocks[1::2]:
        lines = block.strip().split("\n\n")[0].splitlines()
        assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
        assert set(lines[1]) == set("|- ")
    note = "Of the probes of all epochs, 32.1% (train set) and 32.1% (test set) are known suboptimal: "
    note += "their loss exceeds the smallest known upper bound by more than 0.001 bits."
    assert [note in block for block in blocks[1::2]] == [False, True, False, True, False]
    assert "| hidden1 | 0.02885 ± 0 | 0.02885 ± 0 | 0.2164 ± 0 |" in blocks[5]
    assert "\n\nshuffled: the information about the labels in a random order" in blocks[5]
    assert "| mean ± sd of 2 seeds | 3 | 0.67 ± 0.47 |" in blocks[1]
    assert r"| MLP on SZT, nonlinearity a\|b_c& | seed 0 | 3 | 0.3333 |" in blocks[1]


def test_latex(written):
    text = (written / "table.tex").read_text()
    assert text.startswith("% needs \\usepackage{booktabs}\n")
    assert (
        text.count("\n% Of the probes of all epochs, 32.1% (train set) and 32.1% (test set) are known suboptimal: ")
        == 2
    )
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 5
    assert r"\multicolumn{3}{c}{} & \multicolumn{2}{c}{loss (nats)} & \multicolumn{2}{c}{accuracy (\%)} \\" in text
    assert r" & \multicolumn{2}{c}{NC1} & \multicolumn{2}{c}{minimality (bits)} &" in text
    assert r"layer & train & test & train & test & train & test \\" in text
    assert r" & \multicolumn{2}{c}{shuffled (bits)} & held-out (bits) \\" in text
    assert r"layer & train & test & test \\" in text
    assert text.count("\n% shuffled: the information about the labels in a random order") == 2
    assert r"MLP on SZT, nonlinearity a|b\_c\& & seed 0 & 3 & 0.3333 &" in text
    assert r"mean $\pm$ sd of 2 seeds & 3 & 0.67 $\pm$ 0.47 &" in text
    assert r"input & 200 $\pm$ 141 &" in text
    negative = table.format_latex(pd.DataFrame({"layer": ["x-1"], "NC1, train": ["-0.5 ± 0.1"]}))
    assert r"x-1 & $-$0.5 $\pm$ 0.1 \\" in negative
