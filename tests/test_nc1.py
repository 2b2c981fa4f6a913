import math
import weakref

import pytest
import torch
from torch import nn

import dib
import models
import nc1
from layerwise import activations, devices, processes
from layerwise.activations import ActivationRecorder
from layerwise.samples import Samples
from layerwise.schema import COLUMNS
from tests.toys import make_clusters
from tools.references import compute_dense_nc1


def measure_inputs(samples: Samples, C: int, **options) -> nc1.Collapse:
    """Return NC1 of the inputs themselves."""
    model = nn.Sequential(nn.Flatten())
    return nc1.measure(model, {"inputs": model[0]}, samples, C, **options)["inputs"]


def make_three_blocks(d: int = 6) -> nn.Sequential:
    """Build three blocks with BatchNorm, always with the same weights, and a classifier of 3 classes."""
    torch.manual_seed(1)
    blocks = [nn.Sequential(nn.Linear(d, d), nn.BatchNorm1d(d), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(*blocks, nn.Linear(d, 3))


def test_nc1_computed_by_hand():
    """The class means are 1 and 6 and the mean is 3.5, so Sigma_B = 6.25. The deviations 1 1 2 2 give Sigma_W = 2.5."""
    samples = Samples(torch.tensor([[0.0], [2.0], [4.0], [8.0]]), torch.tensor([0, 0, 1, 1]))
    assert measure_inputs(samples, 2) == (1, 1, pytest.approx(0.4, rel=1e-12), 1, 0)
    assert nc1.collapse(samples.inputs, samples.labels, 2) == (1, 1, pytest.approx(0.4, rel=1e-12), 1, 0)


@pytest.mark.parametrize(("N", "d", "C"), [(500, 20, 10), (500, 4, 10), (300, 30, 2), (200, 3, 3)])
@pytest.mark.parametrize(("offset", "tolerance"), [(0, 1e-6), (100, 1e-4)])
def test_nc1_agrees_with_the_dense_formula(N, d, C, offset, tolerance):
    """Classes differ in size, and C > d occurs. The overall mean is over samples, not over classes."""
    samples = make_clusters(N, d, C)
    samples.inputs += offset
    dim, rank, value, _, dropped = measure_inputs(samples, C, batch_size=37)
    assert (dim, rank, dropped) == (d, min(d, C - 1), 0)
    collapse = nc1.collapse(samples.inputs, samples.labels, C)
    assert measure_inputs(samples, C, batch_size=37) == pytest.approx(collapse, rel=1e-9)
    assert value == pytest.approx(compute_dense_nc1(samples.inputs, samples.labels, C), rel=tolerance)


@pytest.mark.parametrize(("offset", "aside"), [(0, 1e-3), (100, 1e-3), (0, 1e-5)])
def test_nearly_collinear_class_means_have_rank_2(offset, aside):
    """The third mean is a little off the line through the other two."""
    g = torch.Generator().manual_seed(0)
    means = torch.zeros(3, 8)
    means[:, 0], means[2, 1] = torch.tensor([0.0, 1.0, 2.0]), aside
    y = torch.arange(600) % 3
    noise = torch.randn(200, 8, generator=g).repeat_interleave(3, 0) * 0.1  # the same in every class
    samples = Samples(means[y] + noise + offset, y)
    _, rank, value, kept, _ = measure_inputs(samples, 3)
    assert rank == 2
    assert kept == pytest.approx(aside / 12**0.5, rel=0.01)
    assert value == pytest.approx(compute_dense_nc1(samples.inputs, y, 3), rel=1e-4)


@pytest.mark.parametrize(("aside", "rank"), [(3e-7, 1), (1.4e-6, 1), (2e-6, 2), (3e-6, 2)])
def test_singular_values_near_eps_times_the_largest_do_not_count(aside, rank):
    """The means are (-1, 0), (1, 0) and (0, aside).

    M has the singular values sqrt(2) and sqrt(2/3) aside. The floor is 8 x 1.2e-7 sqrt(2).
    """
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, aside]])
    found = nc1.collapse(means, torch.arange(3), 3)
    share = pytest.approx(aside / 3**0.5)
    assert found[1:] == ((1, 0, pytest.approx(1), share) if rank == 1 else (2, 0, share, 0))
    assert nc1.collapse(means.double(), torch.arange(3), 3).rank == 2


@pytest.mark.parametrize(("N", "offset"), [(30, 0), (2000, 0), (2000, 100)])
def test_rank_ignores_rounding(N, offset):
    """Linear maps take features of a plane to 40 dimensions in float32. Their class means still have rank 2."""
    samples, g = make_clusters(N, 2, 6, spread=0.1), torch.Generator().manual_seed(0)
    h = samples.inputs
    for fan_in, fan_out in ((2, 1000), (1000, 1000), (1000, 1000), (1000, 40)):
        h = h @ torch.randn(fan_in, fan_out, generator=g) / fan_in**0.5
    dim, rank, value, kept, dropped = measure_inputs(Samples(h + offset, samples.labels), 6)
    assert (dim, rank) == (40, 2)
    assert 0 < dropped < 1e-5 < 0.1 < kept
    of_plane = measure_inputs(samples, 6)[2]
    assert value == pytest.approx(of_plane, rel=1e-4)  # linear maps of full rank do not change the trace


def test_nc1_does_not_depend_on_batch_size_order_rotation_and_offset():
    samples = make_clusters(400, 12, 5)
    x, y = samples.inputs, samples.labels
    value = measure_inputs(samples, 5)[2]
    shuffle = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    Q, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)).double())
    assert measure_inputs(samples, 5, batch_size=1)[2] == pytest.approx(value, rel=1e-12)
    assert measure_inputs(Samples(x[shuffle], y[shuffle]), 5)[2] == pytest.approx(value, rel=1e-12)
    assert measure_inputs(Samples(x.double() @ Q, y), 5)[2] == pytest.approx(value, rel=1e-9)
    assert measure_inputs(Samples(x.double() + 3.0, y), 5)[2] == pytest.approx(value, rel=1e-9)


def test_nc1_does_not_depend_on_the_size_of_chunks(monkeypatch):
    samples = make_clusters(100, 12, 5)
    whole = measure_inputs(samples, 5)
    monkeypatch.setitem(activations.CHUNK_BYTES, "cpu", 8 * 12 * 7)
    assert measure_inputs(samples, 5)[2] == pytest.approx(whole[2], rel=1e-12)


def test_cached_and_recomputed_activations_give_the_same_nc1():
    samples, model = make_clusters(200, 6, 3), make_three_blocks()
    layers = {f"block{i}": model[i - 1] for i in (1, 2, 3)}
    cached = nc1.measure(model, layers, samples, 3, batch_size=64)
    hidden = samples.inputs
    for i in range(3):
        hidden = model.eval()[i](hidden).detach()
        assert cached[f"block{i + 1}"][:2] == (6, 2)
        assert cached[f"block{i + 1}"][2] == pytest.approx(compute_dense_nc1(hidden, samples.labels, 3), rel=1e-6)
    one_layer = 200 * 6 * 4
    for cache_bytes in (0, one_layer, 2 * one_layer):
        again = nc1.measure(model, layers, samples, 3, batch_size=64, cache_bytes=cache_bytes)
        for name, value in again.items():
            assert value[2] == pytest.approx(cached[name][2], rel=1e-12)


def test_the_second_pass_ends_at_the_deepest_layer_that_is_not_cached():
    samples, model = make_clusters(200, 6, 3), make_three_blocks()
    calls = [0] * 4
    for i, block in enumerate(model):
        block.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    layers = {"block3": model[2], "block1": model[0]}
    nc1.measure(model, layers, samples, 3, batch_size=100, cache_bytes=200 * 6 * 4)  # block3 is cached, block1 is not
    assert calls == [3 + 2 + 2, 3 + 2, 3 + 2, 3]  # three trials on a few samples, two batches, two batches again


def test_the_model_and_the_random_state_stay_as_they_were():
    """The model runs in eval mode, so BatchNorm does not mix the batch. Afterwards each module is in its mode again."""
    samples, model = make_clusters(200, 6, 3), make_three_blocks()
    model.train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    model(samples.inputs).sum().backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    layers = {"block2": model[1]}
    small, large = (nc1.measure(model, layers, samples, 3, batch_size=b)["block2"][2] for b in (8, 200))
    assert small == pytest.approx(large, rel=1e-5)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("cache_bytes", [0, 60 * 24 * 4, devices.CACHE_BYTES])
def test_outputs_that_a_later_layer_overwrites_are_measured_before(layout, cache_bytes):
    """Later layers work in place, also through views. Features are in the order of memory or in another."""
    samples = make_clusters(60, 24, 3)
    samples.inputs = samples.inputs.view(60, 6, 2, 2).contiguous(memory_format=layout)
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1), nn.Flatten(), nn.ELU(inplace=True))
    model.to(memory_format=layout)
    with torch.inference_mode():
        expected, h = {}, samples.inputs.clone()
        for i, block in enumerate(model):
            h = block(h)
            expected[str(i)] = compute_dense_nc1(h.flatten(1), samples.labels, 3)
        got = nc1.measure(model, dict(model.named_children()), samples, 3, 25, cache_bytes)
    assert {layer: of_layer.nc1 for layer, of_layer in got.items()} == pytest.approx(expected, rel=1e-6)


def test_no_layers_give_no_results():
    assert nc1.measure(make_three_blocks(), {}, make_clusters(50, 6, 3), 3) == {}


@pytest.mark.parametrize(
    ("dtype", "offset"), [(torch.float32, 0), (torch.float32, 100), (torch.float64, 0), (torch.float64, 1e6)]
)
def test_class_means_are_those_of_all_batches(dtype, offset):
    """float64 activations are summed relative to the first one: sums far from 0 would lose digits."""
    samples = make_clusters(200, 12, 5)
    h, y = samples.inputs.to(dtype) + offset, samples.labels
    class_means = nc1.ClassMeans(h[:1], torch.bincount(y, minlength=5))
    for batch in zip(h.split(64), y.split(64), strict=True):
        class_means.update(*batch)
    shifted = h - h[:1] if dtype == torch.float64 else h.double()
    expected = torch.stack([shifted[y == c].mean(0) for c in range(5)])
    torch.testing.assert_close(class_means.compute(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("dtype", "offset"), [(torch.float32, 0), (torch.float32, 100), (torch.float64, 0), (torch.float64, 1e6)]
)
def test_scatter_of_all_batches_is_nc1(dtype, offset):
    samples = make_clusters(200, 12, 5)
    h, y = samples.inputs.to(dtype) + offset, samples.labels
    batches = list(zip(h.split(64), y.split(64), strict=True))
    class_means = nc1.ClassMeans(h[:1], torch.bincount(y, minlength=5))
    for batch in batches:
        class_means.update(*batch)
    scatter = nc1.Scatter(class_means, class_means.compute())
    for batch in batches:
        scatter.update(*batch)
    found = scatter.compute()
    assert found == pytest.approx(nc1.collapse(h, y, 5), rel=1e-9)
    assert found.nc1 == pytest.approx(compute_dense_nc1(h.double() - offset, y, 5), rel=1e-9)


@pytest.mark.parametrize("constant", [0.0, 0.1, 100.3])
def test_class_means_that_coincide_have_no_nc1(constant):
    y = (torch.arange(300) % 7).clamp(max=2)  # classes of different sizes: their sums are rounded differently
    for dtype in (torch.float32, torch.float64):
        dim, rank, *rest = measure_inputs(Samples(torch.full((300, 5), constant, dtype=dtype), y), 3)
        assert (dim, rank) == (5, 0)
        assert all(map(math.isnan, rest))  # M is 0


def test_class_means_that_coincide_but_for_rounding_have_no_nc1():
    noise = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)) * 1e-5  # 100.3 has an ulp of 8e-6
    assert measure_inputs(Samples(100.3 + noise, torch.arange(300) % 3), 3)[1] == 0


@pytest.mark.parametrize("C", [10, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 100])
def test_class_means_one_ulp_apart_have_rank_0(C, dtype, offset):
    """Each number in the class means is one of two neighbours. There are fewer or more dimensions than classes."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    g, y = torch.Generator().manual_seed(0), torch.arange(3 * C) % C
    for d in (5, 300):
        low = (torch.rand(d, generator=g) + offset).to(dtype).view(integers)
        means = (low + torch.randint(0, 2, (C, d), generator=g).to(integers)).view(dtype)
        assert len(means.unique(dim=0)) > 1
        for samples in (Samples(means[y], y), Samples(-means[y], y)):
            rank, value, kept, dropped = measure_inputs(samples, C)[1:]
            assert (rank, dropped) == (0, 1)
            assert math.isnan(value)
            assert math.isnan(kept)


def test_an_empty_class_is_refused_by_name():
    with pytest.raises(ValueError, match=r"got none of class 2, 4"):
        measure_inputs(Samples(torch.randn(6, 2), torch.tensor([0, 1, 3, 0, 1, 3])), 5)


def test_labels_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1, got 0\.\.2"):
        measure_inputs(Samples(torch.randn(3, 2), torch.arange(3)), 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused_by_layer(bad):
    samples, model = make_clusters(50, 6, 3), make_three_blocks()
    with torch.no_grad():
        model[1][0].bias[2] = bad
    model[1][2] = nn.Identity()
    with pytest.raises(ValueError, match="layer 'block2'"):
        nc1.measure(model, {"block1": model[0], "block2": model[1]}, samples, 3)


def test_a_layer_that_is_not_called_exactly_once_is_refused():
    samples, model = make_clusters(50, 6, 3), make_three_blocks()
    with pytest.raises(ValueError, match="'stray' is called 0 times"):
        nc1.measure(model, {"stray": nn.Linear(6, 6)}, samples, 3)
    twice = nn.Sequential(model[0], model[0])
    with pytest.raises(ValueError, match="'twice' is called 2 times"):
        nc1.measure(twice, {"twice": model[0]}, samples, 3)


@pytest.mark.parametrize("C", [2, 10])
@pytest.mark.parametrize("nonlinearity", ["Tanh", "Sigmoid", "ReLU"])
def test_small_mlps_are_measured_in_float64(nonlinearity, C):
    """float32 would lose or add directions in deep saturated layers. Singular values of M below 1e-8 count as 0."""
    torch.manual_seed(0)
    samples = make_clusters(600, 20, C)
    model = models.build("MLP", (20,), C, widths=(10,) * 8, nonlinearity=nonlinearity)
    got = nc1.measure(model, models.layers(model), samples, C, batch_size=250, cache_bytes=600 * 4 * 10 * 8)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    h = samples.inputs.double()
    for layer, block in list(model.double().named_children())[1:-1]:
        h = block(h).detach()
        assert got[layer].nc1 == pytest.approx(compute_dense_nc1(h, samples.labels, C, rtol=1e-8), rel=1e-5), layer
        M = torch.stack([h[samples.labels == c].mean(0) for c in range(C)]) - h.mean(0)
        assert got[layer].rank == torch.linalg.matrix_rank(M, rtol=1e-8), layer


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("change", ["hook", "hook before", "forward", "subclass", "large", "bfloat16"])
def test_networks_that_are_not_small_mlps_run_as_they_are(monkeypatch, change):
    """They run in their own dtype, with every hook and forward method that changes what they compute."""
    torch.manual_seed(0)
    model, samples = nn.Sequential(nn.Linear(6, 5), nn.Tanh()), make_clusters(90, 6, 3)
    layer = model[0]
    if change == "hook":
        layer.register_forward_hook(lambda _, __, output: output * 2)
    elif change == "hook before":
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    elif change == "forward":
        layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)
    elif change == "subclass":
        model[0] = Doubled(6, 5)
    elif change == "large":
        monkeypatch.setattr(activations, "SMALL", 34)  # the model has 35 parameters
    else:
        model.bfloat16()
        samples.inputs = samples.inputs.bfloat16()
    h = model(samples.inputs).detach()
    assert h.dtype == (torch.bfloat16 if change == "bfloat16" else torch.float32)
    got = nc1.measure(model, {"tanh": model[1]}, samples, 3)["tanh"].nc1
    assert got == pytest.approx(compute_dense_nc1(h, samples.labels, 3), rel=1e-9)


class Lambda(nn.Module):
    """A layer that applies a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> object:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (lambda x: (x, x), r"tuple of torch.float32 \(13, 6\) on cpu, .*"),
        (lambda x: {"x": x}, "dict"),
        (lambda x: x[:, 0], r"torch.float32 \(13,\) on cpu"),
        (lambda x: x[..., None].transpose(0, 1), r"torch.float32 \(6, 13, 1\) on cpu"),
        (lambda x: x[:, :0], r"torch.float32 \(13, 0\) on cpu"),
        (lambda x: x.long(), r"torch.int64 \(13, 6\) on cpu"),
        (lambda x: x > 0, r"torch.bool \(13, 6\) on cpu"),
        (lambda x: x + 1j, r"torch.complex64 \(13, 6\) on cpu"),
    ],
)
def test_outputs_that_are_no_floating_point_batch_are_refused_by_layer(function, given):
    model = nn.Sequential(nn.Linear(6, 6), Lambda(function))
    with pytest.raises(ValueError, match=f"layer 'second' returns {given}, expected a floating-point tensor of shape"):
        nc1.measure(model, {"first": model[0], "second": model[1]}, make_clusters(50, 6, 3), 3)


def test_a_layer_that_returns_a_part_of_the_batch_is_refused():
    """A replica of DataParallel returns a part of the batch."""
    model = nn.Sequential(Lambda(lambda x: x[: max(1, len(x) // 2)]))
    message = r"layer 'half' returns torch.float32 \(6, 6\) on cpu, expected a .* of shape \(13, ...\)"
    with pytest.raises(ValueError, match=message):
        nc1.measure(model, {"half": model[0]}, make_clusters(50, 6, 3), 3, batch_size=20)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_may_be_of_any_integer_type(dtype):
    samples = make_clusters(50, 6, 3)
    expected = measure_inputs(samples, 3)
    samples.labels = samples.labels.to(dtype)
    assert measure_inputs(samples, 3) == expected


class OtherLabels(Samples):
    """Samples whose length does not depend on the labels."""

    def __len__(self) -> int:
        return len(self.inputs)


def make_other_labels() -> OtherLabels:
    samples = make_clusters(50, 6, 3)
    return OtherLabels(samples.inputs, samples.labels)


@pytest.mark.parametrize(
    ("change", "given"),
    [
        (lambda y: y.tolist(), "list"),
        (lambda y: y.numpy(), "ndarray"),
        (lambda y: None, "NoneType"),
        (lambda y: y.float(), r"torch.float32 \(50,\) on cpu"),
        (lambda y: y[:, None], r"torch.int64 \(50, 1\) on cpu"),
    ],
)
def test_labels_that_are_no_integer_vector_are_refused(change, given):
    samples = make_other_labels()
    samples.labels = change(samples.labels)
    with pytest.raises(ValueError, match=rf"NC1: samples\.labels .* the 50 samples.*, got {given}"):
        measure_inputs(samples, 3)


def test_samples_without_labels_are_refused():
    samples = make_other_labels()
    del samples.labels
    with pytest.raises(ValueError, match=r"NC1: samples .* got OtherLabels"):
        measure_inputs(samples, 3)


def test_batches_with_other_labels_are_refused():
    samples = make_clusters(50, 6, 3)
    noisy = samples.labels.clone()
    noisy[41] = (noisy[41] + 1) % 3
    samples.batch = lambda indices: (samples.inputs[indices], noisy[indices])
    with pytest.raises(ValueError, match=r"samples.batch\(indices\) must return samples.labels\[indices\]"):
        measure_inputs(samples, 3, batch_size=20)


def test_a_batch_without_a_row_for_each_index_is_refused():
    samples = make_clusters(50, 6, 3)
    x, y = samples.inputs, samples.labels
    samples.batch = lambda indices: (x[indices[:-1] if len(indices) == 20 else indices], y[indices])
    with pytest.raises(ValueError, match=r"samples.batch\(indices\) returns 19 inputs for 20 indices"):
        measure_inputs(samples, 3, batch_size=20)


def test_arguments_of_other_kinds_are_refused():
    model, samples = nn.Sequential(nn.Linear(6, 6)), make_clusters(50, 6, 3)
    with pytest.raises(ValueError, match="layers must be a dict, got list"):
        nc1.measure(model, [model[0]], samples, 3)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        measure_inputs(samples, 3, batch_size=0)
    for given in ({"x": samples.inputs}, (samples.inputs,), (samples.inputs, samples.labels.tolist())):
        samples.batch = lambda indices, given=given: given
        with pytest.raises(ValueError, match=r"NC1: samples.batch\(indices\) must return"):
            measure_inputs(samples, 3)


def test_augmented_samples_are_refused():
    samples = make_clusters(50, 6, 3)
    x, y = samples.inputs, samples.labels
    samples.batch = lambda indices: (x[indices] + 0.1 * torch.randn(len(indices), 6), y[indices])
    with pytest.raises(ValueError, match=r"NC1: samples.batch\(indices\) .* without augmentation"):
        measure_inputs(samples, 3)


@pytest.mark.parametrize(
    "layer",
    [
        Lambda(lambda x: torch.nn.functional.dropout(x, 0.5)),
        nn.BatchNorm1d(6, track_running_stats=False),
        Lambda(lambda x: x - x.mean(0)),
        Lambda(lambda x: x[x[:, 0].argsort()]),
    ],
    ids=["dropout", "BatchNorm", "centred", "sorted"],
)
def test_layers_that_draw_random_numbers_or_mix_samples_are_refused(layer):
    model = nn.Sequential(nn.Linear(6, 6), layer)
    with pytest.raises(ValueError, match="NC1: layer 'second': the output for a sample depends on the other samples"):
        nc1.measure(model, {"first": model[0], "second": model[1]}, make_clusters(50, 6, 3), 3)


@pytest.mark.parametrize("cache_bytes", [0, devices.CACHE_BYTES])
def test_a_first_layer_that_works_in_place_does_not_change_the_inputs(cache_bytes):
    """samples.batch may return a view of the inputs."""
    samples = make_clusters(50, 6, 3)
    samples.batch = lambda indices: (
        (samples.inputs[indices[0] : indices[-1] + 1], samples.labels[indices[0] : indices[-1] + 1])
        if len(indices) > 1 and (indices.diff() == 1).all()
        else (samples.inputs[indices], samples.labels[indices])
    )
    model, before = nn.Sequential(Lambda(lambda x: x.mul_(2).sub_(1)), nn.Linear(6, 5)), samples.inputs.clone()
    found = nc1.measure(model, {"first": model[0]}, samples, 3, batch_size=20, cache_bytes=cache_bytes)["first"]
    expected = compute_dense_nc1(before, samples.labels, 3)  # NC1 does not depend on a scale and a shift
    assert found.nc1 == pytest.approx(expected, rel=1e-6)
    assert torch.equal(samples.inputs, before)


def test_autocast_around_the_call_has_no_effect():
    samples, model = make_clusters(50, 6, 3), make_three_blocks()
    expected = nc1.measure(model, {"block2": model[1]}, samples, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert nc1.measure(model, {"block2": model[1]}, samples, 3) == expected


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        measure_inputs(Samples(torch.randn(6, 2), torch.zeros(6, dtype=torch.int64)), 1)


class SkipsOnce(nn.Module):
    """A network that does not call its layer in the second batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(6, 6), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x if self.calls == 5 else self.layer(x)  # the first three calls are trials


def test_a_layer_that_is_not_called_in_some_batch_is_refused():
    """This happens in a compiled network: it does not run new hooks for batch sizes that it was compiled for."""
    model = SkipsOnce()
    with pytest.raises(ValueError, match="'layer' is called 0 times in a forward pass, expected once"):
        nc1.measure(model, {"layer": model.layer}, make_clusters(50, 6, 3), 3, batch_size=20)


class CatchesExceptions(nn.Module):
    """A network that computes something else if a layer raises an Exception."""

    def __init__(self):
        super().__init__()
        self.linear, self.tanh = nn.Linear(6, 6), nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return self.tanh(self.linear(x))
        except Exception:
            return self.tanh(0 * x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("network", [CatchesExceptions, make_three_blocks])
def test_the_mode_of_autograd_has_no_effect_and_stays_as_it_was(network, mode):
    torch.manual_seed(0)
    model, samples = network().eval(), make_clusters(90, 6, 3)
    catches = network is CatchesExceptions
    layer = model.tanh if catches else model[1]
    h = model(samples.inputs) if catches else model[:2](samples.inputs)
    expected = pytest.approx(compute_dense_nc1(h.detach(), samples.labels, 3), rel=1e-6)
    for cache_bytes in (0, devices.CACHE_BYTES):
        with mode():
            before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            assert nc1.measure(model, {"layer": layer}, samples, 3, 40, cache_bytes)["layer"].nc1 == expected
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    model(samples.inputs).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_an_output_is_released_before_the_next_layer_is_called():
    """With nothing cached, a pass holds one output at a time, however many layers it records."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))).eval()
    samples = make_clusters(60, 6, 3)
    recorder = ActivationRecorder(model, {str(i): layer for i, layer in enumerate(model)}, samples.inputs[:8])
    seen: list[weakref.ref] = []

    def update(name: str, h: torch.Tensor, y: torch.Tensor) -> None:
        assert all(ref() is None for ref in seen)
        seen.append(weakref.ref(h))

    recorder.run_pass(iter([(samples.inputs, samples.labels)] * 2), update)
    assert len(seen) == 8


def test_accumulators_can_be_computed_again(monkeypatch):
    """As with two processes that have the same samples: a sum over processes must not change the own sum."""
    monkeypatch.setattr(processes, "all_reduce_sum", lambda *tensors: [tensor.mul_(2) for tensor in tensors])
    samples, counts = make_clusters(60, 6, 3), torch.tensor([20, 20, 20])
    class_means = nc1.ClassMeans(samples.inputs[:1], counts)
    class_means.update(samples.inputs, samples.labels)
    means = class_means.compute()
    assert torch.equal(class_means.compute(), means)
    scatter = nc1.Scatter(class_means, means)
    scatter.update(samples.inputs, samples.labels)
    assert scatter.compute() == scatter.compute()


def test_the_fields_are_the_columns_of_the_table():
    assert list(nc1.Collapse._fields) == COLUMNS["nc1.csv"].split(",")[3:]
    assert list(dib.ProbeResult._fields) == COLUMNS["dib.csv"].split(",")[3:]


@pytest.mark.parametrize(("units", "rank"), [(7, 1), (9, 1), (19, 1), (21, 2)])
def test_the_floor_of_the_rank_is_relative_to_the_longest_class_mean(units, rank):
    """The means are (1, 0), 0 and 398 times (0, +-s).

    M has the singular values sqrt(1 - 1/400) and sqrt(398) s, which is a number of eps. The first floor is 8 eps. The
    second is sqrt(400) eps times the length of (1, 0).
    """
    means = torch.zeros(400, 2)
    means[0, 0], means[2:, 1] = 1, units * 2**-23 / 398**0.5
    means[3::2, 1] *= -1
    assert nc1.collapse(means, torch.arange(400), 400).rank == rank
