"""What is for CUDA: on a GPU (`make check-gpu`), and on a look-alike where there is none, but for what is compiled.

It imports nothing but torch, torchvision, tqdm and pytest.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dib
import heads
import lr_range
import models
import nc1
import train
from flags import PRECISIONS, choose_compile
from relabel import relabel
from tests import lookalike
from tests.toys import Toy, check_run, clusters

GPU = torch.cuda.is_available()
# What runs on the look-alike in the fast suite, of all models in all precisions.
FAST = {("MLP", "float16"), ("MNISTNet", "bfloat16")}


@pytest.fixture(autouse=True)
def cuda(monkeypatch) -> Iterator[lookalike.Lookalike | None]:
    """A CUDA device, or its look-alike; whether it may be waited for is put back. Nothing is indexed from the CPU."""
    with nullcontext() if GPU else lookalike.cuda(monkeypatch) as device:
        mode = torch.cuda.get_sync_debug_mode()
        yield device
        torch.cuda.set_sync_debug_mode(mode)
        assert device is None or "indices of the CPU" not in device.waits


def on_cuda(split: Toy) -> Toy:
    return Toy(split.x.cuda(), split.labels.cuda())


def mlp() -> nn.Sequential:
    return models.build("MLP", (25,), 3, widths=(5, 4), nonlinearity="Tanh")


def normalising() -> nn.Sequential:
    conv = nn.Sequential(nn.Unflatten(1, (1, 5, 5)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(conv, nn.Sequential(nn.Conv2d(4, 3, 2), nn.Tanh(), nn.Flatten()), nn.Linear(12, 3))


def convolutional() -> nn.Sequential:
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3))
    return nn.Sequential(conv, nn.Dropout(0.2), nn.Flatten(), nn.Linear(12, 3))


def noisy(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """A small network for train.py that pools, normalises and draws."""
    model = nn.Sequential()
    layers = nn.Conv2d(input_shape[0], 4, 4, 4), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Dropout(0.5), nn.Flatten()
    model.add_module("hidden1", nn.Sequential(*layers))
    model.add_module("classifier", nn.Linear(64, num_classes))
    model.tap_names = model.split_names = ("hidden1",)
    return model


def test_relabel():
    labels = torch.arange(500) % 7
    assert torch.equal(relabel(labels.cuda(), 7).cpu(), relabel(labels, 7))


@pytest.mark.parametrize("keep_bytes", [0, nc1.KEEP_BYTES])
def test_nc1_is_that_of_the_cpu(keep_bytes):
    torch.manual_seed(0)
    split, model = clusters(200, 12, 3), nn.Sequential(nn.Linear(12, 9), nn.Sequential(nn.Tanh(), nn.Linear(9, 5)))
    taps = {"first": model[0], "second": model[1]}
    expected = nc1.measure(model, taps, split, 3)
    got = nc1.measure(model.cuda(), taps, on_cuda(split), 3, 64, keep_bytes)
    assert {t: v[:2] for t, v in got.items()} == {t: v[:2] for t, v in expected.items()}
    assert {t: v[2] for t, v in got.items()} == pytest.approx({t: v[2] for t, v in expected.items()}, rel=1e-3)


@pytest.mark.parametrize("make", [mlp, normalising])
@pytest.mark.parametrize("recipe", [heads.Thesis(partial(torch.optim.SGD, lr=0.1, fused=True), 5), heads.Tuned(20)])
def test_heads_are_those_of_the_cpu(make, recipe):
    """In float64, from the same start and on the same batches, which are drawn on the CPU; the optimum, too."""
    split = clusters(90, 25, 3)
    split.x = split.x.double()

    def build() -> nn.Sequential:
        with torch.device("cpu"):
            return make().double()

    torch.manual_seed(0)
    model = build()
    splits, keep_bytes = range(len(model)), dib.KEEP_BYTES if recipe.standardised else 0
    expected = dib.measure_splits(model, splits, split, 3, build, recipe, batch_size=40, labelings=2)
    got = dib.measure_splits(model.cuda(), splits, on_cuda(split), 3, build, recipe, 2, 0, 0, 40, keep_bytes)
    for k in splits:
        # an optimum is known to a ten-thousandth of a nat
        optimal = recipe.optimal and heads.is_linear(model[k:])
        tolerance = {"abs": 1e-4} if optimal else {"rel": 1e-6}
        assert [h.loss for h in got[k]] == pytest.approx([h.loss for h in expected[k]], **tolerance)


def test_the_range_test_leaves_the_random_states():
    split = clusters(90, 25, 3)
    split.x, model = split.x.view(90, 1, 5, 5), convolutional().cuda()
    random = torch.get_rng_state(), torch.cuda.get_rng_state()
    precision = train.mixed_precision(torch.device("cuda"), "float32")
    lr_range.sweep(model, on_cuda(split), partial(torch.optim.SGD, fused=True), 30, *precision)
    assert torch.equal(random[0], torch.get_rng_state())
    assert torch.equal(random[1], torch.cuda.get_rng_state())


@pytest.mark.parametrize("make", [mlp, normalising])
@pytest.mark.parametrize("recipe", [heads.Thesis(partial(torch.optim.SGD, lr=0.1, fused=True), 5), heads.Tuned(10)])
def test_steps_of_heads_do_not_synchronise(monkeypatch, make, recipe):
    """All but the first, which looks whether the heads draw; heads are made on the device."""
    losses, devices = heads.Bundle.losses, set()

    def strict(bundle: heads.Bundle, indices: torch.Tensor) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error" if torch.is_grad_enabled() else "default")
        return losses(bundle, indices)

    def step(bundle: heads.Bundle, *rest) -> torch.Tensor:
        found = bundle_step(bundle, *rest)
        torch.cuda.set_sync_debug_mode("default")
        return found

    def build() -> nn.Sequential:
        model = make()
        devices.update(p.device.type for p in model.parameters())
        return model

    bundle_step = heads.Bundle.step
    monkeypatch.setattr(heads.Bundle, "losses", strict)
    monkeypatch.setattr(heads.Bundle, "step", step)
    model, split = make().cuda(), on_cuda(clusters(90, 25, 3))
    found = dib.measure_splits(model, range(len(model) - 1), split, 3, build, recipe)
    assert all(head.loss > 0 for of_split in found.values() for head in of_split)
    assert devices == {"cuda"}


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_models_are_made_on_the_device(name):
    """As dib.py has them made: every parameter and buffer is there, and drawn there."""
    random = torch.get_rng_state(), torch.cuda.get_rng_state()
    options = {"whitening": torch.rand(24, 3, 2, 2, generator=torch.Generator())} if name == "CIFARNet" else {}
    with torch.device("cuda"):
        model = models.build(name, (3, 32, 32), 10, **options).to(memory_format=torch.channels_last)
    tensors = list(model.state_dict().values())
    assert all(tensor.is_cuda for tensor in tensors)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors if t.dim() == 4)
    assert torch.equal(random[0], torch.get_rng_state())
    assert not torch.equal(random[1], torch.cuda.get_rng_state())


@pytest.mark.parametrize("kind", ["tuned", "thesis"])
@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_heads_take_their_steps_in_the_precision_of_the_device(tmp_path, pictures, monkeypatch, kind, has_bfloat16):
    """bfloat16 where it is native, thesis heads where the network has it; the exact pass is float32 in any case."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    seen, cross_entropy = {True: set(), False: set()}, heads.F.cross_entropy

    def watch(logits: torch.Tensor, *rest, **options) -> torch.Tensor:
        seen[logits.requires_grad].add(logits.dtype)
        return cross_entropy(logits, *rest, **options)

    monkeypatch.setattr(heads, "F", SimpleNamespace(cross_entropy=watch))
    flags = ["-m", "MNISTNet", "-d", "MNIST", "--epochs", "1", "--splits", "conv2", "--dib-epochs", "1", "-b", "20"]
    for precision in ("float32", "bfloat16") if has_bfloat16 else ("float32",):
        seen[True].clear()
        options = ["--heads", kind, "--precision", precision, "--no-compile", "--no-nc1"]
        train.main([*flags, *options, "--run-dir", str(tmp_path / precision)])
        lower = has_bfloat16 and (kind == "tuned" or precision == "bfloat16")
        assert seen == {True: {torch.bfloat16 if lower else torch.float32}, False: {torch.float32}}


def test_heads_that_draw_repeat_and_leave_the_random_state():
    split = clusters(90, 25, 3)
    split.x = split.x.view(90, 1, 5, 5)
    torch.manual_seed(0)
    model, recipe = convolutional().cuda(), heads.Thesis(partial(torch.optim.SGD, lr=0.01), epochs=2)
    found = []
    for _ in range(2):
        torch.rand(3), torch.rand(3, device="cuda")  # it does not matter where the generators stand
        random = torch.get_rng_state(), torch.cuda.get_rng_state()
        found.append([head.loss for head in dib.measure(model, 0, on_cuda(split), 3, convolutional, recipe)])
        assert torch.equal(random[0], torch.get_rng_state())
        assert torch.equal(random[1], torch.cuda.get_rng_state())
    assert found[0] == pytest.approx(found[1], rel=1e-4)  # cuDNN may add in another order


def every_case() -> Iterator[object]:
    """Models, precisions, compiled or not: on the look-alike nothing compiled, and few without waiting long."""
    compiles = GPU and choose_compile(torch.device("cuda"), None)
    for model in models.ARCHITECTURES:
        for precision in PRECISIONS:
            fast = GPU or (model, precision) in FAST
            yield pytest.param(model, precision, "--no-compile", marks=[] if fast else [pytest.mark.slow])
            if compiles and (precision == "bfloat16" or model == "MLP"):  # the compiler takes up to a minute for each
                yield model, precision, "--compile"


@pytest.mark.parametrize("can_compile", [True, False])
def test_what_is_compiled_is_tested_where_it_can_be(monkeypatch, can_compile):
    monkeypatch.setitem(globals(), "GPU", True)
    monkeypatch.setitem(globals(), "choose_compile", lambda *_: can_compile)
    assert any("--compile" in getattr(case, "values", case) for case in every_case()) == can_compile


@pytest.mark.parametrize(("model", "precision", "compiled"), list(every_case()))
def test_two_epochs_of_every_model(tmp_path, pictures, monkeypatch, model, precision, compiled):
    torch._dynamo.utils.counters.clear()
    check_run(monkeypatch, tmp_path / "run", model, "cuda", precision, "--epochs", "2", compiled)
    assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == (compiled == "--compile")


def test_training_steps_do_not_synchronise(tmp_path, pictures, monkeypatch):
    """From the first loss of an epoch to the clock at its end, whatever waits for the device raises."""
    cross_entropy, clock = train.F.cross_entropy, train.clock

    def strict(logits: torch.Tensor, *rest, **options) -> torch.Tensor:
        if logits.requires_grad:
            torch.cuda.set_sync_debug_mode("error")
        return cross_entropy(logits, *rest, **options)

    def relaxed(device: torch.device) -> float:
        torch.cuda.set_sync_debug_mode("default")
        return clock(device)

    monkeypatch.setattr(train.F, "cross_entropy", strict)
    monkeypatch.setattr(train, "clock", relaxed)
    flags = ["-m", "CIFARNet", "-d", "CIFAR10", "-b", "10", "--no-dib", "--no-nc1", "--no-compile", "--epochs", "2"]
    train.main([*flags, "--run-dir", str(tmp_path / "run")])


def test_nc1_works_on_larger_chunks_on_cuda():
    h, y = torch.zeros(8, 2**18), torch.zeros(8, dtype=torch.int64)  # 2 MiB a row in float64
    assert [len(some) for some, _ in nc1._float64([(h, y)], None)] == [4, 4]
    assert [len(some) for some, _ in nc1._float64([(h.cuda(), y.cuda())], None)] == [8]


def test_a_constructor_that_fails_on_the_device_is_refused_in_a_sentence():
    split = on_cuda(clusters(90, 6, 3))

    def fresh() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(6, 3))
        model.register_buffer("fixed", torch.randn(3, generator=torch.Generator().manual_seed(0)))
        return model

    with pytest.raises(ValueError, match=r"fresh\(\) fails where cuda:0 is torch's default device: "):
        dib.measure(nn.Sequential(nn.Linear(6, 3)).cuda(), 0, split, 3, fresh)


def test_heads_draw_on_the_device_what_each_would_draw_alone():
    head, x = convolutional().cuda().train(), torch.randn(90, 1, 5, 5).cuda()
    state = torch.cuda.get_rng_state()
    alone = copy.deepcopy(head)(x).T
    torch.cuda.set_rng_state(state)
    for logits in heads.one_by_one([head, copy.deepcopy(head)], {0: x}):
        torch.testing.assert_close(logits, alone)
    assert not torch.equal(state, torch.cuda.get_rng_state())


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("noisy", "tuned"),
        *(
            pytest.param(*case, marks=[] if GPU else [pytest.mark.slow])
            for case in (("CIFARNet", "tuned"), ("ResNet", "thesis"), ("ConvNeXt", "thesis"))
        ),
    ],
)
def test_deterministic_runs_repeat_also_when_resumed(tmp_path, pictures, monkeypatch, model, kind):
    """The models that pool, normalise and draw; every byte of the CSVs but the seconds."""
    flags = ["-m", model, "-d", "CIFAR10", "-b", "20", "--dib-epochs", "1", "--splits", "input", "--deterministic"]
    monkeypatch.setitem(models.ARCHITECTURES, "noisy", noisy)
    flags += ["--dib-size", "20", "--heads", kind, "--no-compile"]
    for name, epochs in (("a", ["2"]), ("b", ["2"]), ("c", ["1", "2"])):
        for i, number in enumerate(epochs):
            train.main([*flags, "--epochs", number, "--run-dir", str(tmp_path / name), *["--resume"] * (i > 0)])
    a, b, c = ([(tmp_path / run / name).read_text() for name in ("nc1.csv", "dib.csv")] for run in "abc")
    assert a == b
    assert a == c


def test_a_loss_that_is_not_finite_is_seen_without_waiting_for_it(tmp_path, pictures, capsys):
    flags = ["-m", "MLP", "-d", "CIFAR10", "-b", "4", "-lr", "1e18", "-opt", "SGD", "--precision", "float32"]
    with pytest.raises(SystemExit) as end:
        train.main([*flags, "--no-dib", "--no-compile", "--run-dir", str(tmp_path / "run")])
    assert end.value.code == 1
    assert "the training loss is not finite in epoch 1, step" in capsys.readouterr().err


def waits_of(cuda: lookalike.Lookalike, run: Callable[[], object]) -> int:
    before = len(cuda.waits)
    run()
    return len(cuda.waits) - before


@pytest.mark.skipif(GPU, reason="the look-alike counts what waits, a GPU does not")
def test_waits_do_not_grow_with_the_batches(cuda, monkeypatch):
    """Of an evaluation, of NC1 and of DIB's passes; the range test waits once a step."""
    split = on_cuda(clusters(200, 25, 3))
    model = normalising().cuda()
    taps = {"first": model[0], "second": model[1]}
    adam = partial(torch.optim.Adam, fused=True)

    def found(batch_size: int, keep_bytes: int) -> list[int]:
        recipe = heads.Tuned(4)
        passes = [
            lambda: train.score(model.eval(), split, batch_size),
            lambda: nc1.measure(model, taps, split, 3, batch_size, keep_bytes),
            lambda: dib.measure_splits(model, [0, 1], split, 3, normalising, recipe, 1, 0, 0, batch_size, keep_bytes),
        ]
        return [waits_of(cuda, run) for run in passes]

    for keep_bytes in (0, dib.KEEP_BYTES):
        assert found(100, keep_bytes) == found(20, keep_bytes)

    monkeypatch.setattr(lr_range, "HIGHEST", 2e-6)  # nothing diverges
    options = {"autocast": partial(torch.autocast, "cuda", enabled=False), "scaler": torch.amp.GradScaler("cuda")}
    few, many = (waits_of(cuda, partial(lr_range.sweep, model, split, adam, B, **options)) for B in (2, 1))
    assert many - few == 100  # steps: 200 beside 100


@pytest.mark.skipif(GPU, reason="of the look-alike itself")
def test_the_look_alike_tells_devices_apart_and_counts_waits(cuda):
    here, there = torch.arange(6.0), torch.arange(6.0).cuda()
    assert (here.device.type, there.device.type, there[1:].is_cuda, there.cpu().is_cuda) == ("cpu", "cuda", True, False)
    assert (there * torch.tensor(2.0)).is_cuda  # a number of the CPU
    for mixed in (
        lambda: here + there,
        lambda: here.add_(there),
        lambda: here[there.long()],
        lambda: torch.cat([here, there]),
        lambda: nn.Linear(6, 2)(there),
        lambda: torch.zeros(()).add_(there.sum()),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        there.sum().item()
    cuda.waits.clear()


@pytest.mark.skipif(GPU, reason="of the look-alike itself")
def test_the_look_alike_counts_waits(cuda):
    here, there = torch.arange(6.0), torch.arange(6.0).cuda()
    labels, matrix = torch.arange(3).cuda(), torch.eye(3).cuda()
    waiting = [
        lambda: torch.where(there > 2), lambda: F.one_hot(labels), lambda: F.one_hot(labels, num_classes=-1),
        lambda: torch.linalg.cholesky(matrix), lambda: torch.linalg.pinv(matrix), matrix.inverse, matrix.pinverse,
        lambda: torch.linalg.matrix_rank(matrix), lambda: torch.linalg.svdvals(matrix),
        lambda: torch.linalg.eigvalsh(matrix), lambda: there.new_tensor([1.0]),
        lambda: here.new_tensor([1.0], device="cuda"), lambda: here.copy_(there, non_blocking=True),
        lambda: here[:2].copy_(there[:2], True), lambda: here.pin_memory().copy_(there),
        there.sum().item, there.tolist, there.cpu, here.cuda, lambda: bool(there.sum()), lambda: there[here.long()],
        lambda: there[there > 2], lambda: here.copy_(there), lambda: torch.tensor([1.0], device="cuda"),
    ]  # fmt: skip
    assert [waits_of(cuda, run) for run in waiting] == [1] * len(waiting)
    silent = [
        lambda: here.to("cuda", non_blocking=True), lambda: there.copy_(here, non_blocking=True), lambda: there[2:4],
        lambda: torch.zeros(3, device="cuda"), lambda: there.sum().add_(1), lambda: there[there.long()], there.double,
        lambda: torch.where(there > 2, there, 0.0), lambda: F.one_hot(labels, 3),
        lambda: F.one_hot(labels, num_classes=3), lambda: torch.linalg.cholesky_ex(matrix),
        lambda: there.new_tensor([1.0], device="cpu"), lambda: here.new_tensor([1.0]),
        lambda: here.pin_memory()[2:].copy_(there[2:], non_blocking=True),
        lambda: torch.ones(6, pin_memory=True).copy_(there, non_blocking=True),
        lambda: there.to("cpu", non_blocking=True),
    ]  # fmt: skip
    assert [waits_of(cuda, run) for run in silent] == [0] * len(silent)
    cuda.waits.clear()


@pytest.mark.skipif(GPU, reason="of the look-alike itself")
def test_the_look_alike_pins_only_what_is_on_the_cpu(cuda):
    here, there = torch.arange(6.0), torch.arange(6.0).cuda()
    pinned = here.pin_memory()
    assert torch.equal(pinned, here)
    assert pinned.pin_memory() is pinned is not here
    assert all(tensor.is_pinned() for tensor in (pinned, pinned[2:], there.to("cpu", non_blocking=True)))
    assert not any(tensor.is_pinned() for tensor in (here, there, there.cpu()))
    for pin in (there.pin_memory, lambda: torch.ones(3, device="cuda", pin_memory=True)):
        with pytest.raises(RuntimeError, match="can be pinned"):
            pin()
