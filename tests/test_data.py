import hashlib
import pickle

import numpy as np
import pytest
import torch
import torchvision

import data
from data import images, szt
from layerwise import samples
from layerwise.samples import Samples


def test_szt_has_the_published_labels():
    x, y = szt.make_patterns()
    assert hashlib.sha256(bytes(y.tolist())).hexdigest() == (
        "77732f16f85e91b49d3997196b56163b3bd362d8cf631468a8de3f986e88359f"
    )
    assert y.sum() == 2118
    assert x[1].tolist() == [0] * 11 + [1]  # input 0 is the most significant bit
    assert x[2048].tolist() == [1] + [0] * 11


def test_the_sets_of_szt_are_fixed_stratified_and_in_binary_order():
    dataset = data.load("SZT")
    assert (dataset.num_classes, dataset.input_shape) == (2, (12,))
    assert (len(dataset.train), len(dataset.test)) == (3481, 615)
    assert (dataset.train.labels.sum(), dataset.test.labels.sum()) == (1800, 318)  # 85 and 15 % of 2118
    weights = 2 ** torch.arange(11, -1, -1)
    numbers = [
        (each.batch(torch.arange(len(each)))[0] @ weights.float()).long() for each in (dataset.train, dataset.test)
    ]
    assert torch.equal(torch.cat(numbers).sort().values, torch.arange(4096))
    assert all((n.diff() > 0).all() for n in numbers)
    digest = hashlib.sha256(numbers[1].numpy().astype("<i8").tobytes()).hexdigest()
    assert digest == "be954f6bb909cd2a7323033410c6e088f85e6ae3272f95f6060ac9152f3a7239"


def test_train_size_chooses_as_many_of_each_class_always_the_same(monkeypatch):
    y = torch.tensor([0, 1, 1, 0, 2, 1, 0, 2, 2, 1])
    x = torch.arange(10).float()[:, None]
    monkeypatch.setitem(data.SOURCES, "toy", lambda root, download: (x, y, x, y, 3))
    a, b = (data.load("toy", train_size=6) for _ in range(2))
    assert torch.bincount(a.train.labels).tolist() == [2, 2, 2]
    chosen = a.train.inputs[:, 0].long()
    assert (chosen.diff() > 0).all()  # data order
    assert torch.equal(a.train.labels, y[chosen])
    assert torch.equal(a.train.inputs, b.train.inputs)
    assert len(a.test) == 10
    for size in (0, 4, 12):
        with pytest.raises(ValueError, match=f"the training size of toy must be a multiple of 3 up to 9, got {size}"):
            data.load("toy", train_size=size)


def test_a_batch_is_the_samples_at_the_indices():
    train = data.load("SZT").train
    x, y = train.batch(torch.tensor([5, 0]))
    assert x.dtype == torch.float32
    assert torch.equal(x, train.inputs[[5, 0]])
    assert torch.equal(y, train.labels[[5, 0]])


def write_mnist(root, name: str, sizes: tuple[int, int]) -> dict[str, np.ndarray]:
    """Write random images in the four files of MNIST or FashionMNIST, and return them."""
    raw, made, random = root / name / "raw", {}, np.random.default_rng(0)
    raw.mkdir(parents=True)
    for part, n in zip(("train", "t10k"), sizes, strict=True):
        x = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        y = (np.arange(n) % 10).astype(np.uint8)
        header = [int(v).to_bytes(4, "big") for v in (2051, n, 28, 28, 2049, n)]
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"".join(header[:4]) + x.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"".join(header[4:]) + y.tobytes())
        made[part] = x
    return made


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_mnist_and_fashionmnist_are_read_and_normalised(tmp_path, monkeypatch, name):
    monkeypatch.setitem(images.FACTS, name, ((1, 28, 28), 30, 20))
    monkeypatch.setitem(images.MD5, name, {})  # only the published files have these checksums
    made = write_mnist(tmp_path, name, (30, 20))
    dataset = data.load(name, str(tmp_path))
    assert (dataset.num_classes, dataset.input_shape) == (10, (1, 28, 28))
    assert dataset.train.inputs.dtype == torch.uint8
    x, y = dataset.test.batch(torch.tensor([3, 12]))
    mean, std = made["train"].mean(), made["train"].std()  # of the training set, also for the test set
    np.testing.assert_allclose(x[:, 0], (made["t10k"][[3, 12]] - mean) / std, rtol=1e-5, atol=1e-5)
    assert y.tolist() == [3, 2]


def test_cifar10_is_read_and_normalised(tmp_path, monkeypatch):
    """The checksums of torchvision are not compared: only the published files have them."""
    monkeypatch.setitem(images.FACTS, "CIFAR10", ((3, 32, 32), 25, 5))
    monkeypatch.setitem(images.MD5, "CIFAR10", {})
    monkeypatch.setattr(images.torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(images.torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    folder, random = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    made = {}
    for part in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        made[part] = random.integers(0, 256, (5, 3072), dtype=np.uint8)
        (folder / part).write_bytes(pickle.dumps({"data": made[part], "labels": [0, 1, 2, 3, 4]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    dataset = data.load("CIFAR10", str(tmp_path))
    assert (len(dataset.train), len(dataset.test), dataset.input_shape) == (25, 5, (3, 32, 32))
    train = np.concatenate([made[f"data_batch_{i}"] for i in range(1, 6)]).reshape(25, 3, 32, 32)
    x, _ = dataset.train.batch(torch.arange(25))
    expected = (train - train.mean((0, 2, 3), keepdims=True)) / train.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", images.FACTS)
def test_missing_files_are_refused_with_their_folder_and_the_flags_that_help(tmp_path, name):
    folder = tmp_path / images.FOLDERS[name]
    with pytest.raises(ValueError, match=f"{name} was not found intact in {folder} .*--download.*--data-dir"):
        data.load(name, str(tmp_path))


def test_a_file_that_is_not_the_published_one_is_refused_or_renamed_and_downloaded(tmp_path, monkeypatch):
    """It may be a file of FashionMNIST in the folder of MNIST, or a download that was interrupted."""
    made = write_mnist(tmp_path, "MNIST", (30, 20))
    monkeypatch.setitem(images.FACTS, "MNIST", ((1, 28, 28), 30, 20))
    raw, whole = tmp_path / "MNIST/raw", {}
    for path in raw.iterdir():
        whole[path.name] = path.read_bytes()
    monkeypatch.setitem(images.MD5, "MNIST", {name: hashlib.md5(whole[name]).hexdigest() for name in whole})
    data.load("MNIST", str(tmp_path))
    name = "t10k-images-idx3-ubyte"
    (raw / name).write_bytes(whole[name][:-1] + b"x")
    with pytest.raises(ValueError, match=f"{raw / name} differs from the published file of MNIST: run once"):
        data.load("MNIST", str(tmp_path))

    def fetch(self) -> None:
        for missing in set(whole) - {path.name for path in raw.iterdir()}:
            (raw / missing).write_bytes(whole[missing])

    monkeypatch.setattr(images.torchvision.datasets.MNIST, "download", fetch)
    dataset = data.load("MNIST", str(tmp_path), download=True)
    assert np.array_equal(dataset.test.inputs[:, 0], made["t10k"])
    assert (raw / f"{name}.other").read_bytes()[-1:] == b"x"


def test_truncated_and_short_files_are_refused(tmp_path, monkeypatch):
    write_mnist(tmp_path, "MNIST", (30, 20))
    monkeypatch.setitem(images.MD5, "MNIST", {})
    with pytest.raises(
        ValueError, match=r"holds \(30, 1, 28, 28\) images and 30 labels, expected \(60000, 1, 28, 28\)"
    ):
        data.load("MNIST", str(tmp_path))
    file = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    for content in (file.read_bytes()[:5000], b"", bytes(5000), b"<html>404</html>", b"\0\0\x0d\x03" + bytes(5000)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="MNIST was not found intact"):
            data.load("MNIST", str(tmp_path))


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown data set 'SZTT': expected one of SZT, CIFAR10"):
        data.load("SZTT")


# Other data


class Items(torch.utils.data.Dataset):
    """A Dataset of N items, which a function makes."""

    def __init__(self, item, N: int = 300):
        self.item, self.N = item, N

    def __len__(self) -> int:
        return self.N

    def __getitem__(self, i: int):
        return self.item(i)


def test_samples_of_tensors():
    x = torch.randn(9, 4)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        got, y = Samples(x, torch.arange(9).to(dtype)).batch(torch.tensor([5, 2]))
        assert torch.equal(got, x[[5, 2]])
        assert (y.dtype, y.tolist()) == (torch.int64, [5, 2])
    tokens = torch.arange(12).view(6, 2)  # without mean and std integers stay integers
    assert torch.equal(Samples(tokens, torch.arange(6)).batch(torch.tensor([3]))[0], tokens[3:4])


@pytest.mark.parametrize("label", [int, torch.tensor, np.int32, np.uint8, lambda i: i % 2 == 1])
@pytest.mark.parametrize("loader", [False, True])
def test_samples_of_a_dataset_or_a_loader(label, loader):
    x = torch.randn(100, 3)
    source = Items(lambda i: (x[i], label(i)), 100)
    state = torch.get_rng_state()
    read = Samples.of(torch.utils.data.DataLoader(source, 30) if loader else source)
    assert loader or torch.equal(torch.get_rng_state(), state)
    assert torch.equal(read.inputs, x)
    assert read.labels.tolist() == [int(label(i)) for i in range(100)]
    assert read.labels.dtype == torch.int64


def test_random_numbers_of_a_loader_are_drawn_once():
    source = Items(lambda i: (torch.full((2,), float(i)) + torch.rand(2) / 2, i), 40)
    read = Samples.of(torch.utils.data.DataLoader(source, 8, shuffle=True))
    x, y = read.batch(torch.arange(40))
    assert sorted(y.tolist()) == list(range(40))
    assert torch.equal(x.floor()[:, 0].long(), y)
    assert torch.equal(read.batch(torch.arange(40))[0], x)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (lambda i: (torch.zeros(1 + i % 2), 0), "samples cannot be stacked .*equal size"),
        (
            lambda i: (torch.zeros(2), torch.ones(3)),
            r"labels must be an integer tensor \(N,\) .* got .*float32 labels \(300, 3\)",
        ),
        (lambda i: (torch.zeros(2), torch.tensor([i])), r"labels must be an integer tensor .*int64 labels \(300, 1\)"),
        (lambda i: (torch.zeros(2), float(i)), r"labels must be an integer tensor .*float64 labels \(300,\)"),
        (lambda i: {"image": torch.zeros(2), "label": i}, r"must be \(input, label\), .* batches of type dict"),
        (lambda i: torch.zeros(2), r"must be \(input, label\), .* batches of type Tensor"),
        (lambda i: (torch.zeros(2), i, i), r"must be \(input, label\), .* type list of Tensor, Tensor, Tensor"),
        (lambda i: (torch.zeros(2), "cat"), r"must be \(input, label\), .* type list of Tensor, tuple"),
        (
            lambda i: (torchvision.transforms.ToPILImage()(torch.zeros(1, 2, 2)), 0),
            "transformed to tensors of the same size.*PIL",
        ),
    ],
    ids=["uneven", "one-hot", "column", "float", "dict", "no label", "three", "name", "PIL"],
)
def test_items_that_are_no_input_and_label_of_one_shape_are_refused(item, message):
    with pytest.raises(ValueError, match=message):
        Samples.of(Items(item))


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (torch.zeros(3, 2), torch.arange(4), r"got inputs \(3, 2\) and torch.int64 labels \(4,\)"),
        (torch.zeros(0, 2), torch.arange(0), "len.inputs. >= 1"),
        (torch.tensor(0.0), torch.tensor(0), r"got inputs \(\)"),
        (torch.zeros(3, 2), [0, 1, 2], "labels must be a tensor, got list"),
        (np.zeros((3, 2)), torch.arange(3), "inputs must be a tensor, got ndarray"),
        (torch.zeros(3, 2), torch.arange(3, device="meta"), "inputs are on cpu and labels on meta"),
    ],
)
def test_tensors_that_are_no_inputs_and_labels_are_refused(inputs, labels, message):
    with pytest.raises(ValueError, match=message):
        Samples(inputs, labels)


def test_samples_that_do_not_fit_in_memory_are_refused(monkeypatch):
    source = Items(lambda i: (torch.zeros(1000), 0))  # 300 samples, in two batches of 256
    monkeypatch.setattr(samples.os, "sysconf", lambda name: 4 if "PAGES" in name else 4096)
    with pytest.raises(ValueError, match=r"300 samples of \(1000,\) torch.float32 needs 0.0041 GB, .* 1.64e-05 GB"):
        Samples.of(source)
    monkeypatch.undo()
    assert len(Samples.of(source)) == 300


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="no samples"):
        Samples.of(torch.utils.data.TensorDataset(torch.zeros(0, 2), torch.arange(0)))
