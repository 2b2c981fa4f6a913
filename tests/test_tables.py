import os
import re
from math import log, sqrt
from pathlib import Path

import pandas as pd
import pytest

from analysis import statistics, tables
from layerwise import schema
from layerwise.runs import find_newest_run
from tests.toys import write_run

EPOCHS = "epoch,set,loss,accuracy,seconds\n1,train,0.7,0.5,1\n1,test,0.7,0.5,1\n2,train,0.6,0.6,1\n2,test,0.6,0.6,1\n"
DIB = """epoch,set,split,enumeration,labeling,entropy,loss,lower,upper
1,train,input,0,y,0.69,0.3,0,0.2
1,train,input,0,0,0.69,0.2,0,0.2
1,train,input,0,1,0.60,0.6,0,0.5
1,train,hidden1,0,y,0.69,0.2,0,0.2
1,train,hidden1,0,0,0.69,0.3,0,0.3
1,train,hidden1,0,1,0.60,0.5,0,0.5
1,test,hidden1,0,0,0.69,0.1,0,0.1
2,train,hidden1,0,y,0.69,0.9,0,0.1
2,train,hidden1,0,0,0.69,0.5,0,0.4
2,train,hidden1,0,1,0.60,0.6,0,0.4
2,train,hidden1,1,0,0.69,0.1,0,0.1
"""
CONTROLLED = """epoch,set,split,enumeration,labeling,entropy,loss,lower,upper
1,test,input,0,y,0.69,0.2,0,0.2
1,test,input,0,shuffled,0.69,0.6,0,0.6
1,test,input,0,held-out,0.70,0.3,0,0.3
1,test,input,1,0,0.69,0.4,0,0.4
1,test,input,1,1,0.61,0.4,0,0.4
1,test,input,2,0,0.69,0.1,0,0.1
1,test,input,2,1,0.61,0.5,0,0.5
1,test,hidden1,0,y,0.69,0.3,0,0.3
1,test,hidden1,0,shuffled,0.69,0.5,0,0.4
1,test,hidden1,0,held-out,0.70,0.1,0,0.1
1,test,hidden1,1,0,0.69,0.5,0,0.5
1,test,hidden1,1,1,0.61,0.5,0,0.5
1,test,hidden1,2,0,0.69,0.5,0,0.5
1,test,hidden1,2,1,0.61,0.6,0,0.6
2,test,hidden1,0,held-out,0.70,0.9,0,0.9
"""
CONVERGENCE = """factor,steps,epoch,set,split,enumeration,labeling,entropy,loss,lower,upper
1,60,1,test,hidden1,0,y,0.69,0.4,0,0.3
1,60,1,test,hidden1,0,0,0.69,0.6,0,0.6
2,120,1,test,hidden1,0,y,0.69,0.2,0,0.2
2,120,1,test,hidden1,0,0,0.69,0.6,0,0.5
"""
LAYERS = ["hidden1", "hidden2"]


@pytest.fixture
def folder(tmp_path):
    folder = write_run(tmp_path / "run", LAYERS)
    (folder / "epochs.csv").write_text(EPOCHS)
    return folder


def test_information_by_hand(folder):
    """Minimality is the mean of entropy - upper over the digits, sufficiency is that of y, both in bits.

    The least `upper` of a labeling in any epoch is `upper` of the input: 0.1 of y (epoch 2) and 0.4 of digit 1. That of
    another set (0.1) or another enumeration (0.1 of digit 0) is not.
    """
    (folder / "dib.csv").write_text(DIB)
    for name in ("epochs", "nc1"):  # DIB has two epochs
        text = (folder / f"{name}.csv").read_text()
        (folder / f"{name}.csv").write_text("".join(row for row in text.splitlines(True) if not row.startswith("3,")))
    (group,) = tables.read_groups([folder])
    info = group.select_rows("information", "train")
    assert info[["seed", "epoch", "layer"]].values.tolist() == [[0, 1, "input"], [0, 1, "hidden1"], [0, 2, "hidden1"]]
    nats = info.filter(regex="minimality|sufficiency") * log(2)
    assert nats["minimality"].tolist() == pytest.approx([(0.49 + 0.2) / 2, (0.39 + 0.1) / 2, (0.29 + 0.2 + 0.59) / 3])
    assert nats["sufficiency"].tolist() == pytest.approx([0.59, 0.49, 0.59])
    assert nats["minimality_by_loss"].tolist() == pytest.approx([0.49 / 2, 0.49 / 2, (0.19 + 0 + 0.59) / 3])
    assert nats["sufficiency_by_loss"].tolist() == pytest.approx([0.39, 0.49, -0.21])


def test_controls_by_hand(folder):
    """Digits alone are in minimality. A held-out value is not replaced by another, and may be negative."""
    (folder / "dib.csv").write_text(CONTROLLED)
    (group,) = tables.read_groups([folder])
    nats = group.tables["information"].set_index(["layer", "epoch"]).drop(columns=["seed", "set"]) * log(2)
    of_input, of_hidden = nats.loc[("input", 1)], nats.loc[("hidden1", 1)]
    assert of_input["minimality"] == pytest.approx((0.29 + 0.21 + 0.59 + 0.11) / 4)
    assert of_hidden["minimality"] == pytest.approx((0.19 + 0.11 + 0.19 + 0.01) / 4)
    assert of_input["deviation"] == pytest.approx((0.35 - 0.25) / sqrt(2))
    assert of_hidden["deviation"] == pytest.approx((0.15 - 0.10) / sqrt(2))
    assert (of_input["sufficiency"], of_hidden["sufficiency"]) == pytest.approx((0.49, 0.39))
    assert (of_input["shuffled"], of_hidden["shuffled"]) == pytest.approx((0.29, 0.29))  # 0.4 is a bound for the input
    assert (of_input["held_out"], of_hidden["held_out"]) == pytest.approx((0.4, 0.6))
    assert nats.loc[("hidden1", 2), "held_out"] == pytest.approx(-0.2)
    assert nats["ceiling"].dropna().tolist() == pytest.approx([0.65, 0.65])
    assert nats["label_entropy"].dropna().tolist() == pytest.approx([0.69, 0.69])


def test_one_enumeration_has_no_deviation(tmp_path):
    one, three = (
        tables.read_groups([write_run(tmp_path / str(count), LAYERS, enumerations=count)])[0].tables["information"]
        for count in (1, 3)
    )
    assert one["deviation"].isna().all()
    assert (three["deviation"] * log(2)).tolist() == pytest.approx([0.01] * len(three))
    assert ((three["minimality"] - one["minimality"]) * log(2)).tolist() == pytest.approx([0.01] * len(three))


def test_noise_is_read_and_may_be_missing(tmp_path):
    """In noise.csv the information of the digits is 0.08 nats."""
    runs = [write_run(tmp_path / f"s{seed}", LAYERS, seed, linear=("hidden2",)) for seed in (0, 1)]
    runs.append(write_run(tmp_path / "without", LAYERS, 2))
    noise = tables.read_groups(runs)[0].tables["noise_information"]
    assert noise[["seed", "set", "layer"]].values.tolist() == [
        [seed, name, "hidden2"] for seed in (0, 1) for name in ("train", "test")
    ]
    assert (noise["minimality"] * log(2)).tolist() == pytest.approx([0.08] * 4)


def test_gaps_of_linear_probes_by_hand():
    """Gaps are those of the splits that a run of this seed names, without held-out rows. They use the loss."""
    columns = {"loss": [0.5, 0.6, 0.7, 0.8, 0.9, 0.3], "lower": [0.4, 0.2, 0.0, 0.1, 0.0, float("nan")]}
    names = {"seed": [0, 0, 0, 1, 2, 0], "layer": ["b", "a", "b", "b", "b", "b"]}
    dib = pd.DataFrame({**columns, **names, "labeling": ["y", "y", "held-out", "0", "y", "shuffled"], "upper": 0.4})
    hparams = [{"seed": 0, "linear_splits": ["b"]}, {"seed": 1, "linear_splits": ["b"]}, {"seed": 2}]
    gaps = statistics.compute_linear_gaps(dib, hparams)
    assert gaps.tolist() == pytest.approx([0.1, 0.7, float("nan")], nan_ok=True)
    assert statistics.compute_linear_gaps(dib, hparams[2:]).empty


def test_upper_of_the_input_is_that_of_its_own_seed_up_to_the_last_common_epoch(tmp_path):
    """Information of seed 0 grows by 0.1 nats per epoch, up to epoch 9, that of seed 2 by 0.12, up to epoch 2."""
    runs = [write_run(tmp_path / f"s{seed}", LAYERS, seed, epochs) for seed, epochs in ((0, 9), (2, 2))]
    info = tables.read_groups(runs)[0].select_rows("information", "train")
    assert (info.loc[info["layer"] == "input", "minimality"] * log(2)).tolist() == pytest.approx([0.2, 0.24])


def test_information_by_steps_by_hand(folder):
    (folder / "convergence.csv").write_text(CONVERGENCE)
    converged = tables.read_groups([folder])[0].tables["convergence_information"]
    assert converged[["seed", "steps", "set", "layer"]].values.tolist() == [
        [0, 60, "test", "hidden1"],
        [0, 120, "test", "hidden1"],
    ]
    nats = converged.filter(regex="minimality|sufficiency") * log(2)
    assert nats["minimality"].tolist() == pytest.approx([0.09, 0.19])
    assert nats["minimality_by_loss"].tolist() == pytest.approx([0.09, 0.09])
    assert nats["sufficiency"].tolist() == pytest.approx([0.39, 0.49])
    assert nats["sufficiency_by_loss"].tolist() == pytest.approx([0.29, 0.49])


def test_convergence_without_a_column_epoch_is_that_of_the_last_epoch(folder):
    (folder / "convergence.csv").write_text(CONVERGENCE.replace("epoch,", "").replace("0,1,", "0,"))
    (group,) = tables.read_groups([folder])
    assert group.list_epochs("convergence") == [group.last] == [2]
    assert len(group.tables["convergence"]) == 4


def test_convergence_of_seeds_in_different_epochs_is_not_averaged(tmp_path):
    runs = [write_run(tmp_path / f"s{seed}", LAYERS, seed, factors=(1, 2)) for seed in range(3)]
    path = runs[1] / "convergence.csv"
    path.write_text(re.sub(",3,(train|test),", r",2,\1,", path.read_text()))
    (group,) = tables.read_groups(runs)
    assert group.list_epochs("convergence") == [3]
    assert group.describe_seeds("mean of ", "convergence_information") == "mean of 2 seeds"
    assert group.tables["convergence_information"]["seed"].unique().tolist() == [0, 2]


def test_share_of_suboptimal_probes_by_hand():
    """0.001 bits are 0.000693 nats. Two of four training probes and the only test probe are above.

    Held-out rows do not count.
    """
    dib = pd.DataFrame(
        {
            "set": ["train", "train", "test", "train", "train", "test", "test"],
            "labeling": ["y", "shuffled", "0", "0", "1", "held-out", "held-out"],
            "loss": [0.5, 0.5006, float("nan"), 0.5008, 3.0, 0.5, 0.6],
            "upper": 0.5,
        }
    )
    assert statistics.compute_suboptimal_share(dib).to_dict() == {"train": 0.5, "test": 1}


def test_mean_and_deviation_over_seeds_by_hand():
    nan = float("nan")
    table = pd.DataFrame({"epoch": [1, 1, 1, 2, 2, 2], "v": [1.0, 2.0, 6.0, 1.0, 100.0, nan], "seed": [0, 1, 2] * 2})
    over = statistics.average_over_seeds(table, ["epoch"], "v")
    assert over["mean"].tolist() == [3, 50.5]
    assert over["count"].tolist() == [3, 2]
    assert (over["high"] - over["mean"]).tolist() == pytest.approx([sqrt(7), 99 / sqrt(2)])
    assert (over["mean"] - over["low"]).tolist() == pytest.approx([sqrt(7), 99 / sqrt(2)])
    over = statistics.average_over_seeds(table, ["epoch"], "v", log=True)
    assert over["mean"].tolist() == pytest.approx([12 ** (1 / 3), 10])
    assert over["high"][1] == pytest.approx(10 * 10 ** sqrt(2))  # of 0 and 2, as powers of ten: 1 and sqrt(2)
    table.loc[5, "v"] = float("inf")  # counts as little as NaN
    assert statistics.average_over_seeds(table, ["epoch"], "v")["mean"].tolist() == [3, 50.5]
    one = statistics.average_over_seeds(table[table["seed"] == 0], ["epoch"], "v")
    assert one[["low", "mean", "high"]].values.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_runs_that_differ_only_in_seed_are_one_group(tmp_path):
    """Device, folders, versions and --save-weights may differ, but no other flag."""
    flags = {seed: {"device": f"cuda:{seed}", "processes": seed, "save_weights": seed == 1} for seed in (3, 1)}
    runs = [write_run(tmp_path / f"s{seed}", LAYERS, seed, **flags[seed]) for seed in flags]
    other = write_run(tmp_path / "other", LAYERS, 1, widths=[3, 2], nonlinearity="Tanh")
    cnn = write_run(tmp_path / "cnn", LAYERS, 0, model="MNISTNet", data="MNIST", widths=[9])
    found = tables.read_groups([runs[0], other, runs[1], cnn])
    assert [group.folders for group in found] == [runs, [other], [cnn]]
    assert [group.describe_seeds("mean of ") for group in found] == ["mean of 2 seeds", "seed 1", "seed 0"]
    assert found[0].tables["nc1"]["seed"].unique().tolist() == [3, 1]
    assert len(found[0].tables["information"]) == 2 * 2 * (1 + 3 * 2)
    assert found[1].label == "MLP on SZT, widths 3 2, nonlinearity Tanh"
    assert found[2].label == "MNISTNet on MNIST"


def test_the_number_of_epochs_separates_runs_only_if_the_schedule_depends_on_it(tmp_path):
    for schedule, found in (("constant", 1), ("cosine", 2)):
        runs = [
            write_run(
                tmp_path / f"{schedule}{n}", LAYERS, n, epochs=n, schedule=schedule, recipe="papyan" if n == 2 else None
            )
            for n in (2, 3)
        ]
        assert len(tables.read_groups(runs)) == found


def test_a_rate_of_a_range_test_does_not_separate_runs(tmp_path):
    runs = [write_run(tmp_path / f"s{seed}", LAYERS, seed, tune="first", learning_rate=seed) for seed in range(2)]
    assert len(tables.read_groups(runs)) == 1


def test_linear_splits_do_not_separate_runs_but_controls_do(tmp_path):
    """Linear splits follow from other flags, and runs of earlier versions do not name them."""
    runs = [write_run(tmp_path / f"s{seed}", LAYERS, seed, linear=LAYERS[seed:]) for seed in range(2)]
    runs.append(write_run(tmp_path / "without", LAYERS, 2, controls=False))
    labels = [(group.label, group.describe_seeds()) for group in tables.read_groups(runs)]
    assert labels == [("MLP on SZT, controls True", "2 seeds"), ("MLP on SZT", "seed 2")]


def test_the_number_of_dib_samples_does_not_separate_runs(tmp_path):
    """It follows from other flags. It is formatted as text."""
    runs = [write_run(tmp_path / f"s{n}", LAYERS, n, dib_samples={"train": n, "test": 615}) for n in (3481, 615)]
    assert [group.label for group in tables.read_groups(runs)] == ["MLP on SZT"]
    assert tables.format_value({"train": 3481, "test": 615}) == "train 3481, test 615"


def test_seeds_are_compared_up_to_the_last_common_epoch(tmp_path):
    runs = [write_run(tmp_path / f"s{epochs}", LAYERS, seed=epochs, epochs=epochs) for epochs in (2, 9)]
    (group,) = tables.read_groups(runs)
    assert (group.label, group.last) == ("MLP on SZT, up to epoch 2", 2)
    for name in ("epochs", "nc1", "dib", "information"):
        assert group.tables[name]["epoch"].max() == 2


@pytest.mark.parametrize("torn", [0, 1, 2])
@pytest.mark.parametrize("missing", [1, 2, 30, 60])
def test_an_epoch_that_lacks_rows_is_not_finished(tmp_path, torn, missing):
    """A run in progress or a killed run may lack rows, as the rows of an epoch are appended to one table after another.

    The last line may be incomplete. The rest of it may look like a complete line.
    """
    run = write_run(tmp_path / "run", LAYERS)
    names = list(schema.COLUMNS)[torn:]
    for name in names:
        text = (run / name).read_text()
        third = text.index("\n3,") + 1
        (run / name).write_text(text[: max(third, len(text) - missing)] if name == names[0] else text[:third])
    (group,) = tables.read_groups([run])
    assert group.last == 2
    assert {group.tables[name]["epoch"].max() for name in ("epochs", "nc1", "dib", "information")} == {2}


def test_a_flag_that_is_off_equals_a_flag_that_an_older_version_lacks(tmp_path):
    old, new = (write_run(tmp_path / f"s{seed}", LAYERS, seed, **flags) for seed, flags in enumerate([{}, OFF]))
    assert [group.label for group in tables.read_groups([old, new])] == ["MLP on SZT"]
    on = write_run(tmp_path / "on", LAYERS, deterministic=True)
    assert [group.label for group in tables.read_groups([old, on])] == ["MLP on SZT", "MLP on SZT, deterministic True"]


OFF = {"deterministic": False, "tune": None}


def test_a_repeated_row_is_refused(folder):
    path = folder / "nc1.csv"
    path.write_text(path.read_text() + "2,test,hidden1,8,1,5.0,1,0\n")
    with pytest.raises(ValueError, match=r"nc1.csv, line 16: epoch 2, set test, layer hidden1 appears twice"):
        tables.read_groups([folder])


def test_runs_with_many_different_flags_are_labeled_with_the_folder(tmp_path):
    runs = [write_run(tmp_path / name, LAYERS, splits=[name] * 40) for name in ("a", "b")]
    assert [group.label for group in tables.read_groups(runs)] == [f"MLP on SZT: {run}" for run in runs]


def test_layers_are_in_order_of_depth_with_those_where_only_dib_is_measured(tmp_path):
    run = write_run(tmp_path / "run", ["block3", "block6", "pool"], factors=(1,))
    for name, split in (("dib", "block7"), ("convergence", "block8")):
        text = (run / f"{name}.csv").read_text()
        (run / f"{name}.csv").write_text(text.replace("block3", "stem").replace("pool", split))
    assert tables.read_groups([run])[0].layers == ["stem", "block3", "block6", "block7", "block8", "pool"]


@pytest.mark.parametrize(
    ("epochs", "count", "expected"),
    [
        (range(101), 4, [0, 4, 21, 100]),
        ([0, 1, 3, 10, 32, 100], 4, [0, 3, 32, 100]),
        (range(1, 4), 4, [1, 2, 3]),
        ([0], 4, [0]),
        ([], 4, []),
    ],
)
def test_epochs_are_chosen_evenly_on_a_log_scale(epochs, count, expected):
    assert statistics.choose_log_spaced(list(epochs), count) == expected


def test_requested_epochs_are_chosen(tmp_path):
    runs = [write_run(tmp_path / f"e{epochs}", LAYERS, epochs=epochs, batch_size=epochs) for epochs in (2, 5)]
    assert [group.choose_epochs("nc1") for group in tables.read_groups(runs, [1, 2])] == [[1, 2], [1, 2]]
    for epoch in (0, 3):
        message = f"--epochs {epoch}: MLP on SZT, batch_size 2 was measured in epochs 1, 2"
        with pytest.raises(ValueError, match=message):
            tables.read_groups(runs, [1, epoch])


def test_two_runs_with_the_same_flags_and_seed_are_refused(tmp_path):
    runs = [write_run(tmp_path / name, LAYERS) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"a and .*b have the same flags and the same seed: give only one"):
        tables.read_groups(runs)


@pytest.mark.parametrize("content", ["", "[]", "3", "{}", '{"model": "MLP", "data": "SZT"}', None])
def test_hparams_that_are_not_of_a_run_are_refused(folder, content):
    path = folder / "hparams.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} does not hold the flags of a run: "):
        tables.read_groups([folder])


@pytest.mark.parametrize(
    ("arguments", "expected"), [(["a"], "a"), (["a", "b"], "."), (["a", "b", "--out", "c/d"], "c/d"), ([], "runs/n")]
)
def test_a_script_writes_to_the_folder_of_the_run(tmp_path, monkeypatch, arguments, expected):
    """For several runs it writes to the folder that contains all of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for seed, name in enumerate(("a", "b", "runs/n")):
        write_run(Path(name), LAYERS, seed)
    folders = []
    tables.run_script("A test.", lambda groups, folder: folders.append(folder), arguments)
    assert [folder.resolve() for folder in folders] == [(tmp_path / expected).resolve()]


def test_a_script_prints_an_error_in_one_line(tmp_path, capsys):
    def write(groups, folder):
        folder.mkdir()

    run = write_run(tmp_path / "run", LAYERS)
    for arguments, reason in (
        ([str(tmp_path)], "hparams.json does not hold the flags of a run: No such file or directory"),
        ([str(run)], f"File exists: '{run}'"),  # write fails
        ([str(run), "--epochs", "4"], "MLP on SZT was measured in epochs 1, 2, 3"),
    ):
        with pytest.raises(SystemExit) as stop:
            tables.run_script("A test.", write, arguments)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(reason)


def test_find_the_newest_run(tmp_path):
    with pytest.raises(ValueError, match="no run in"):
        find_newest_run(tmp_path)
    for name, age in (("b", 5), ("a", 50)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hparams.json").write_text("{}")
        os.utime(tmp_path / name / "hparams.json", (1000 - age, 1000 - age))
    assert find_newest_run(tmp_path) == tmp_path / "b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "epochs.csv is not a CSV of a run: [Errno 2] No such file"),
        ("", "epochs.csv is not a CSV of a run: No columns"),
        ("a,b\n1,2\n", "epochs.csv, line 1, lacks the column 'epoch'"),
        (EPOCHS.splitlines()[0] + "\n", "epochs.csv holds no finished epoch"),
        (EPOCHS + "3,tra\n", "epochs.csv, line 6: set is 'tra', expected train or test"),
        (EPOCHS + "3,train,\n", "epochs.csv, line 6: loss is '', expected a number"),
        (EPOCHS + "3\n", "epochs.csv, line 6: set is '', expected train or test"),
        (EPOCHS + "\n\n", "epochs.csv, line 6: epoch is '', expected a whole number from 0"),
        (
            EPOCHS.replace("\n1,train", "\n1.5,train"),
            "epochs.csv, line 2: epoch is '1.5', expected a whole number from 0",
        ),
        (EPOCHS.replace("\n1,train", "\n1,train,9"), "epochs.csv is not a CSV of a run: Length of header"),
        (EPOCHS + "3,test,0.6,6 %,1\n", "epochs.csv, line 6: accuracy is '6 %', expected a number"),
        (EPOCHS + "3,test,0.6,0.5,1,7,8\n", "epochs.csv is not a CSV of a run: Error tokenizing data"),
        (EPOCHS.replace("\n2", "\nx", 1), "epochs.csv, line 4: epoch is 'x', expected a whole number from 0"),
        (b"\x89PNG\xff\xfe", "epochs.csv is not a CSV of a run: 'utf-8' codec"),
    ],
)
def test_a_bad_table_is_refused_with_its_file_and_line(folder, content, message):
    path = folder / "epochs.csv"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        tables.read_groups([folder])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONVERGENCE.splitlines()[0] + "\n", " has no rows: expected at least one probe"),
        (
            CONVERGENCE.replace("factor,", "times,"),
            ", line 1, lacks the column 'factor': expected factor,steps,epoch,set,split,",
        ),
        (CONVERGENCE.replace("\n1,60", "\n1,0", 1), ", line 2: steps is '0', expected a whole number from 1"),
        (CONVERGENCE.replace("60,1,", "60,,", 1), ", line 2: epoch is '', expected a whole number from 0"),
        (CONVERGENCE.replace("\n2,", "\n1.5,", 1), ", line 4: factor is '1.5', expected a whole number from 1"),
        (CONVERGENCE.replace("0.6,0,0.5", "0.6,0,?"), ", line 5: upper is '?', expected a number"),
        (
            CONVERGENCE + "2,120,1,test,hidden1,0,0,0.69,0.6,0,0.5\n",
            ", line 6: factor 2, epoch 1, set test, split hidden1, enumeration 0, ",
        ),
    ],
)
def test_a_bad_optional_table_is_refused_with_its_line(folder, content, message):
    (folder / "convergence.csv").write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"convergence.csv{message}")) as refused:
        tables.read_groups([folder])
    assert "\n" not in str(refused.value)


def test_a_script_that_does_not_compare_by_depth_has_no_option_epochs(tmp_path, capsys):
    run = str(write_run(tmp_path / "run", ["hidden1"]))
    with pytest.raises(SystemExit) as end:
        tables.run_script("A test.", lambda groups, folder: None, [run, "--epochs", "1"], by_depth=False)
    assert end.value.code == 2
    assert "unrecognized arguments: --epochs" in capsys.readouterr().err
    tables.run_script("A test.", lambda groups, folder: None, [run], by_depth=False)
