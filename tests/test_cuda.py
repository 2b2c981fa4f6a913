"""Code for CUDA, tested on a GPU (`make check-gpu`), or, except for torch.compile, on tests/lookalike.py.

It imports nothing but torch, pytest and the project, which needs torchvision, numpy and tqdm.
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
import models
import nc1
import train
from layerwise import devices
from layerwise.probes import group
from layerwise.probes.decoders import is_linear
from layerwise.probes.orthogonal import orthogonalise
from layerwise.probes.separate import compute_logits_one_by_one
from layerwise.samples import Samples
from relabel import relabel
from tests import lookalike
from tests.toys import check_run, make_clusters
from training import lr_range
from training.hardware import PRECISIONS, choose_compile

GPU = torch.cuda.is_available()
# The models and precisions of a run that are not slow on the look-alike.
FAST = {("MLP", "float16"), ("MNISTNet", "bfloat16")}


@pytest.fixture(autouse=True)
def cuda(monkeypatch) -> Iterator[lookalike.Lookalike | None]:
    """Use a CUDA device or its look-alike, and restore its debug mode. No tensor may be indexed from the CPU."""
    with nullcontext() if GPU else lookalike.fake_cuda(monkeypatch) as device:
        mode = torch.cuda.get_sync_debug_mode()
        yield device
        torch.cuda.set_sync_debug_mode(mode)
        assert device is None or "indices of the CPU" not in device.waits


def move_to_cuda(samples: Samples) -> Samples:
    """Return the samples on the device."""
    return Samples(samples.inputs.cuda(), samples.labels.cuda())


def make_images(samples: Samples) -> Samples:
    """Return samples of 25 features as images (1, 5, 5)."""
    return Samples(samples.inputs.view(-1, 1, 5, 5), samples.labels)


def make_mlp() -> nn.Sequential:
    """Build an MLP for 25 features and 3 classes."""
    return models.build("MLP", (25,), 3, widths=(5, 4), nonlinearity="Tanh")


def make_norm_net() -> nn.Sequential:
    """Build a network with BatchNorm, for 25 features and 3 classes."""
    conv = nn.Sequential(nn.Unflatten(1, (1, 5, 5)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(conv, nn.Sequential(nn.Conv2d(4, 3, 2), nn.Tanh(), nn.Flatten()), nn.Linear(12, 3))


def make_wide_net() -> nn.Sequential:
    """Build a network for 25 features and 3 classes, whose filters and hidden layer take orthogonalised steps."""
    conv = nn.Sequential(nn.Unflatten(1, (1, 5, 5)), nn.Conv2d(1, 16, (4, 4)), nn.ReLU(), nn.Flatten())
    return nn.Sequential(conv, nn.Sequential(nn.Linear(64, 20), nn.Tanh()), nn.Linear(20, 3))


def make_random_net() -> nn.Sequential:
    """Build a network with dropout, for images (1, 5, 5) and 3 classes."""
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3))
    return nn.Sequential(conv, nn.Dropout(0.2), nn.Flatten(), nn.Linear(12, 3))


def build_small_net(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Build a small network for train.py with pooling, BatchNorm and dropout."""
    model = nn.Sequential()
    layers = nn.Conv2d(input_shape[0], 4, 4, 4), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Dropout(0.5), nn.Flatten()
    model.add_module("hidden1", nn.Sequential(*layers))
    model.add_module("classifier", nn.Linear(64, num_classes))
    model.layer_names = model.split_names = ("hidden1",)
    return model


def test_relabel_is_that_of_the_cpu():
    labels = torch.arange(500) % 7
    assert torch.equal(relabel(labels.cuda(), 7).cpu(), relabel(labels, 7))


@pytest.mark.parametrize("cache_bytes", [0, devices.CACHE_BYTES])
def test_nc1_is_that_of_the_cpu(cache_bytes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.Sequential(nn.Tanh(), nn.Linear(9, 5)))
    samples, layers = make_clusters(200, 12, 3), {"first": model[0], "second": model[1]}
    expected = nc1.measure(model, layers, samples, 3)
    got = nc1.measure(model.cuda(), layers, move_to_cuda(samples), 3, 64, cache_bytes)
    assert {name: v[:2] for name, v in got.items()} == {name: v[:2] for name, v in expected.items()}
    assert {name: v[2] for name, v in got.items()} == pytest.approx({n: v[2] for n, v in expected.items()}, rel=1e-3)


@pytest.mark.parametrize("make", [make_mlp, make_norm_net])
@pytest.mark.parametrize("probes", [dib.Thesis(partial(torch.optim.SGD, lr=0.1, fused=True), 5), dib.Tuned(20)])
def test_probes_are_those_of_the_cpu(make, probes):
    """In float64. Initial weights and batches are drawn on the CPU. The optimum of linear probes is compared, too."""
    samples = make_clusters(90, 25, 3)
    samples.inputs = samples.inputs.double()

    def make_model() -> nn.Sequential:
        with torch.device("cpu"):
            return make().double()

    torch.manual_seed(0)
    model = make_model()
    splits, options = range(len(model)), {"probes": probes, "batch_size": 40, "enumerations": 2}
    expected = dib.measure_splits(model, splits, samples, 3, make_model, **options)
    options["cache_bytes"] = devices.CACHE_BYTES if probes.standardises else 0
    got = dib.measure_splits(model.cuda(), splits, move_to_cuda(samples), 3, make_model, **options)
    for k in splits:
        # the optimum is computed to 1e-4 nats
        is_optimum = probes.solves_linear and is_linear(model[k:])
        tolerance = {"abs": 1e-4} if is_optimum else {"rel": 1e-6}
        assert [r.loss for r in got[k]] == pytest.approx([r.loss for r in expected[k]], **tolerance)


@pytest.mark.parametrize("shape", [(20, 70), (70, 20)])
def test_orthogonalised_steps_are_close_to_those_of_the_cpu(shape):
    """On CUDA they are products, whose singular values are between 0.84 and 1.13 of those of the CPU."""
    torch.manual_seed(0)
    G = torch.randn(3, *shape)
    G[1, :, 15:] = 0
    expected = orthogonalise(G)
    difference = orthogonalise(G.cuda()).cpu() - expected
    assert (torch.linalg.matrix_norm(difference) < 0.17 * torch.linalg.matrix_norm(expected)).all()


def test_wide_probes_reach_the_losses_of_the_cpu():
    """Their steps differ, so only losses near 0 are compared. Without the steps four of six would be above 0.7."""
    torch.manual_seed(0)
    model, samples = make_wide_net(), make_clusters(90, 25, 3)
    for to in (lambda x: x, move_to_cuda):
        found = dib.measure(model, 0, to(samples), 3, make_wide_net, probes=dib.Tuned(60))
        assert all(result.loss < 0.01 for result in found)
        model.cuda()


def test_the_range_test_leaves_the_random_states():
    samples, model = make_images(make_clusters(90, 25, 3)), make_random_net().cuda()
    random = torch.get_rng_state(), torch.cuda.get_rng_state()
    lr_range.run_test(model, move_to_cuda(samples), partial(torch.optim.SGD, fused=True), 30, "float32")
    assert torch.equal(random[0], torch.get_rng_state())
    assert torch.equal(random[1], torch.cuda.get_rng_state())


@pytest.mark.parametrize("make", [make_mlp, make_norm_net, make_wide_net])
@pytest.mark.parametrize("probes", [dib.Thesis(partial(torch.optim.SGD, lr=0.1, fused=True), 5), dib.Tuned(10)])
def test_steps_of_probes_do_not_synchronise(monkeypatch, make, probes):
    """The first step may: it tests whether the probes draw random numbers. Probes are made on CUDA."""
    compute_losses, step, found = group.ProbeGroup.compute_losses, group.ProbeGroup.step, set()

    def compute_strictly(probe_group: group.ProbeGroup, indices: torch.Tensor) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error" if torch.is_grad_enabled() else "default")
        return compute_losses(probe_group, indices)

    def step_and_relax(probe_group: group.ProbeGroup, *rest) -> torch.Tensor:
        losses = step(probe_group, *rest)
        torch.cuda.set_sync_debug_mode("default")
        return losses

    def make_model() -> nn.Sequential:
        model = make()
        found.update(p.device.type for p in model.parameters())
        return model

    monkeypatch.setattr(group.ProbeGroup, "compute_losses", compute_strictly)
    monkeypatch.setattr(group.ProbeGroup, "step", step_and_relax)
    model, samples = make().cuda(), move_to_cuda(make_clusters(90, 25, 3))
    results = dib.measure_splits(model, range(len(model) - 1), samples, 3, make_model, probes=probes)
    assert all(result.loss > 0 for of_split in results.values() for result in of_split)
    assert found == {"cuda"}


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_models_are_made_on_the_device(name):
    """Every parameter and buffer of a network that dib.py builds is drawn on the device."""
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
def test_steps_of_probes_have_the_precision_of_the_device(tmp_path, pictures, monkeypatch, kind, has_bfloat16):
    """It is bfloat16 if the GPU has it, for thesis probes if the network has it too. Exact losses are in float32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    seen, cross_entropy = {True: set(), False: set()}, F.cross_entropy

    def watch(logits: torch.Tensor, *rest, **options) -> torch.Tensor:
        seen[logits.requires_grad].add(logits.dtype)
        return cross_entropy(logits, *rest, **options)

    monkeypatch.setattr(group, "F", SimpleNamespace(cross_entropy=watch))
    flags = ["-m", "MNISTNet", "-d", "MNIST", "--epochs", "1", "--splits", "conv2", "--dib-epochs", "1", "-b", "20"]
    for precision in ("float32", "bfloat16") if has_bfloat16 else ("float32",):
        seen[True].clear()
        options = ["--probes", kind, "--precision", precision, "--no-compile", "--no-nc1"]
        train.main([*flags, *options, "--run-dir", str(tmp_path / precision)])
        is_lower = has_bfloat16 and (kind == "tuned" or precision == "bfloat16")
        assert seen == {True: {torch.bfloat16 if is_lower else torch.float32}, False: {torch.float32}}


def test_probes_with_dropout_repeat_and_leave_the_random_states():
    samples = move_to_cuda(make_images(make_clusters(90, 25, 3)))
    torch.manual_seed(0)
    model, probes = make_random_net().cuda(), dib.Thesis(partial(torch.optim.SGD, lr=0.01), epochs=2)
    found = []
    for _ in range(2):
        torch.rand(3), torch.rand(3, device="cuda")  # the states of the generators do not matter
        random = torch.get_rng_state(), torch.cuda.get_rng_state()
        results = dib.measure(model, 0, samples, 3, make_random_net, probes=probes)
        found.append([result.loss for result in results])
        assert torch.equal(random[0], torch.get_rng_state())
        assert torch.equal(random[1], torch.cuda.get_rng_state())
    assert found[0] == pytest.approx(found[1], rel=1e-4)  # cuDNN may add in another order


def list_cases() -> Iterator[object]:
    """Yield models and precisions, compiled or not. On the look-alike none is compiled, and most are slow."""
    compiles = GPU and choose_compile(torch.device("cuda"), None)
    for model in models.ARCHITECTURES:
        for precision in PRECISIONS:
            is_fast = GPU or (model, precision) in FAST
            yield pytest.param(model, precision, "--no-compile", marks=[] if is_fast else [pytest.mark.slow])
            if compiles and (precision == "bfloat16" or model == "MLP"):  # the compiler takes up to a minute for each
                yield model, precision, "--compile"


@pytest.mark.parametrize("can_compile", [True, False])
def test_compiled_runs_are_tested_if_the_gpu_can_compile(monkeypatch, can_compile):
    monkeypatch.setitem(globals(), "GPU", True)
    monkeypatch.setitem(globals(), "choose_compile", lambda *_: can_compile)
    assert any("--compile" in getattr(case, "values", case) for case in list_cases()) == can_compile


@pytest.mark.parametrize(("model", "precision", "compiled"), list(list_cases()))
def test_every_model_runs_on_cuda(tmp_path, pictures, monkeypatch, model, precision, compiled):
    torch._dynamo.utils.counters.clear()
    check_run(monkeypatch, tmp_path / "run", model, "cuda", precision, "--epochs", "2", compiled)
    assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == (compiled == "--compile")


def test_training_steps_do_not_synchronise(tmp_path, pictures, monkeypatch):
    """A call that waits for the device raises, from the first loss of an epoch until its last loss is known."""
    cross_entropy, synchronise = train.F.cross_entropy, train.synchronise

    def strict(logits: torch.Tensor, *rest, **options) -> torch.Tensor:
        if logits.requires_grad:
            torch.cuda.set_sync_debug_mode("error")
        return cross_entropy(logits, *rest, **options)

    def relaxed(device: torch.device) -> None:
        torch.cuda.set_sync_debug_mode("default")
        synchronise(device)

    monkeypatch.setattr(train.F, "cross_entropy", strict)
    monkeypatch.setattr(train, "synchronise", relaxed)
    flags = ["-m", "CIFARNet", "-d", "CIFAR10", "-b", "10", "--no-dib", "--no-nc1", "--no-compile", "--epochs", "2"]
    train.main([*flags, "--run-dir", str(tmp_path / "run")])


def test_nc1_converts_larger_chunks_on_cuda():
    h, y = torch.zeros(8, 2**18), torch.zeros(8, dtype=torch.int64)  # 2 MiB a row in float64
    assert [len(some) for some, _ in nc1.convert_to_float64(h, y, None)] == [4, 4]
    assert [len(some) for some, _ in nc1.convert_to_float64(h.cuda(), y.cuda(), None)] == [8]


def test_a_constructor_that_fails_on_the_device_is_refused():
    samples = move_to_cuda(make_clusters(90, 6, 3))

    def make_model() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(6, 3))
        model.register_buffer("fixed", torch.randn(3, generator=torch.Generator().manual_seed(0)))
        return model

    with pytest.raises(ValueError, match=r"make_model\(\) fails while cuda:0 is torch's default device: "):
        dib.measure(nn.Sequential(nn.Linear(6, 3)).cuda(), 0, samples, 3, make_model)


def test_probes_draw_the_random_numbers_that_each_would_draw_alone():
    probe, x = make_random_net().cuda().train(), torch.randn(90, 1, 5, 5).cuda()
    state = torch.cuda.get_rng_state()
    alone = copy.deepcopy(probe)(x).T
    torch.cuda.set_rng_state(state)
    for logits in compute_logits_one_by_one([probe, copy.deepcopy(probe)], x):
        torch.testing.assert_close(logits, alone)
    assert not torch.equal(state, torch.cuda.get_rng_state())


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("small", "tuned"),
        *(
            pytest.param(*case, marks=[] if GPU else [pytest.mark.slow])
            for case in (("CIFARNet", "tuned"), ("ResNet", "thesis"), ("ConvNeXt", "thesis"))
        ),
    ],
)
def test_deterministic_runs_repeat_and_can_be_resumed(tmp_path, pictures, monkeypatch, model, kind):
    """The models have pooling, norms and random layers. Every byte of the tables is compared, except for seconds."""
    flags = ["-m", model, "-d", "CIFAR10", "-b", "20", "--dib-epochs", "1", "--splits", "input", "--deterministic"]
    monkeypatch.setitem(models.ARCHITECTURES, "small", build_small_net)
    flags += ["--dib-size", "20", "--probes", kind, "--no-compile"]
    for name, epochs in (("a", ["2"]), ("b", ["2"]), ("c", ["1", "2"])):
        for i, number in enumerate(epochs):
            train.main([*flags, "--epochs", number, "--run-dir", str(tmp_path / name), *["--resume"] * (i > 0)])
    a, b, c = ([(tmp_path / run / name).read_text() for name in ("nc1.csv", "dib.csv")] for run in "abc")
    assert a == b
    assert a == c


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, pictures, capsys):
    flags = ["-m", "MLP", "-d", "CIFAR10", "-b", "4", "-lr", "1e18", "-opt", "SGD", "--precision", "float32"]
    with pytest.raises(SystemExit) as end:
        train.main([*flags, "--no-dib", "--no-compile", "--run-dir", str(tmp_path / "run")])
    assert end.value.code == 1
    assert "the training loss is not finite in epoch 1, step" in capsys.readouterr().err


def count_waits(cuda: lookalike.Lookalike, run: Callable[[], object]) -> int:
    """Return how often a call waits for the device."""
    before = len(cuda.waits)
    run()
    return len(cuda.waits) - before


@pytest.mark.skipif(GPU, reason="only the look-alike counts calls that wait")
def test_waits_do_not_grow_with_the_number_of_batches(cuda, monkeypatch):
    """An evaluation, NC1 and DIB wait as often for few batches as for many. The range test waits once a step."""
    samples = move_to_cuda(make_clusters(200, 25, 3))
    model = make_norm_net().cuda()
    layers = {"first": model[0], "second": model[1]}
    adam = partial(torch.optim.Adam, fused=True)

    def count_in_passes(batch_size: int, cache_bytes: int) -> list[int]:
        options = {"probes": dib.Tuned(4), "batch_size": batch_size, "cache_bytes": cache_bytes}
        passes = [
            lambda: train.compute_score(model.eval(), samples, batch_size),
            lambda: nc1.measure(model, layers, samples, 3, batch_size, cache_bytes),
            lambda: dib.measure_splits(model, [0, 1], samples, 3, make_norm_net, **options),
        ]
        return [count_waits(cuda, run) for run in passes]

    for cache_bytes in (0, devices.CACHE_BYTES):
        assert count_in_passes(100, cache_bytes) == count_in_passes(20, cache_bytes)

    monkeypatch.setattr(lr_range, "HIGHEST", 2e-6)  # at these rates the loss does not diverge
    few, many = (count_waits(cuda, partial(lr_range.run_test, model, samples, adam, B, "float16")) for B in (2, 1))
    assert many - few == 100  # there are 200 steps instead of 100


@pytest.mark.skipif(GPU, reason="a test of the look-alike")
def test_the_look_alike_refuses_tensors_of_two_devices(cuda):
    host, gpu = torch.arange(6.0), torch.arange(6.0).cuda()
    assert (host.device.type, gpu.device.type, gpu[1:].is_cuda, gpu.cpu().is_cuda) == ("cpu", "cuda", True, False)
    assert (gpu * torch.tensor(2.0)).is_cuda  # a 0-D tensor of the CPU
    for mixed in (
        lambda: host + gpu,
        lambda: host.add_(gpu),
        lambda: host[gpu.long()],
        lambda: torch.cat([host, gpu]),
        lambda: nn.Linear(6, 2)(gpu),
        lambda: torch.zeros(()).add_(gpu.sum()),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        gpu.numpy()
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        gpu.sum().item()
    cuda.waits.clear()


@pytest.mark.skipif(GPU, reason="a test of the look-alike")
def test_the_look_alike_counts_waits(cuda):
    host, gpu = torch.arange(6.0), torch.arange(6.0).cuda()
    labels, matrix = torch.arange(3).cuda(), torch.eye(3).cuda()
    waiting = [
        lambda: torch.where(gpu > 2), lambda: F.one_hot(labels), lambda: F.one_hot(labels, num_classes=-1),
        lambda: torch.linalg.cholesky(matrix), lambda: torch.linalg.pinv(matrix), matrix.inverse, matrix.pinverse,
        lambda: torch.linalg.matrix_rank(matrix), lambda: torch.linalg.svdvals(matrix),
        lambda: torch.linalg.eigvalsh(matrix), lambda: gpu.new_tensor([1.0]),
        lambda: host.new_tensor([1.0], device="cuda"), lambda: host.copy_(gpu, non_blocking=True),
        lambda: host[:2].copy_(gpu[:2], True), lambda: host.pin_memory().copy_(gpu),
        gpu.sum().item, gpu.tolist, gpu.cpu, host.cuda, lambda: bool(gpu.sum()), lambda: gpu[host.long()],
        lambda: gpu[gpu > 2], lambda: host.copy_(gpu), lambda: torch.tensor([1.0], device="cuda"),
    ]  # fmt: skip
    assert [count_waits(cuda, run) for run in waiting] == [1] * len(waiting)
    silent = [
        lambda: host.to("cuda", non_blocking=True), lambda: gpu.copy_(host, non_blocking=True), lambda: gpu[2:4],
        lambda: torch.zeros(3, device="cuda"), lambda: gpu.sum().add_(1), lambda: gpu[gpu.long()], gpu.double,
        lambda: torch.where(gpu > 2, gpu, 0.0), lambda: F.one_hot(labels, 3),
        lambda: F.one_hot(labels, num_classes=3), lambda: torch.linalg.cholesky_ex(matrix),
        lambda: gpu.new_tensor([1.0], device="cpu"), lambda: host.new_tensor([1.0]),
        lambda: host.pin_memory()[2:].copy_(gpu[2:], non_blocking=True),
        lambda: torch.ones(6, pin_memory=True).copy_(gpu, non_blocking=True),
        lambda: gpu.to("cpu", non_blocking=True),
    ]  # fmt: skip
    assert [count_waits(cuda, run) for run in silent] == [0] * len(silent)
    cuda.waits.clear()


@pytest.mark.skipif(GPU, reason="a test of the look-alike")
def test_the_look_alike_pins_only_tensors_of_the_cpu(cuda):
    host, gpu = torch.arange(6.0), torch.arange(6.0).cuda()
    pinned = host.pin_memory()
    assert torch.equal(pinned, host)
    assert pinned.pin_memory() is pinned is not host
    assert all(tensor.is_pinned() for tensor in (pinned, pinned[2:], gpu.to("cpu", non_blocking=True)))
    assert not any(tensor.is_pinned() for tensor in (host, gpu, gpu.cpu()))
    for pin in (gpu.pin_memory, lambda: torch.ones(3, device="cuda", pin_memory=True)):
        with pytest.raises(RuntimeError, match="can be pinned"):
            pin()
