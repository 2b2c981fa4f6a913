import math

import pytest
import torch
from torch import nn

import models
import nc1
from tests.toys import Toy, clusters
from tests.yardsticks import dense_nc1


def of(split: Toy, C: int, **options) -> nc1.Collapse:
    """NC1 of the inputs themselves."""
    model = nn.Sequential(nn.Flatten())
    return nc1.measure(model, {"inputs": model[0]}, split, C, **options)["inputs"]


def three_blocks(d: int = 6) -> nn.Sequential:
    torch.manual_seed(1)
    blocks = [nn.Sequential(nn.Linear(d, d), nn.BatchNorm1d(d), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(*blocks, nn.Linear(d, 3))


def test_by_hand():
    """Means 1 and 6, overall 3.5: Sigma_B = 6.25; deviations 1 1 2 2: Sigma_W = 2.5."""
    split = Toy(torch.tensor([[0.0], [2.0], [4.0], [8.0]]), torch.tensor([0, 0, 1, 1]))
    assert of(split, 2) == (1, 1, pytest.approx(0.4, rel=1e-12), 1, 0)
    assert nc1.collapse(split.x, split.labels, 2) == (1, 1, pytest.approx(0.4, rel=1e-12), 1, 0)


@pytest.mark.parametrize(("N", "d", "C"), [(500, 20, 10), (500, 4, 10), (300, 30, 2), (200, 3, 3)])
@pytest.mark.parametrize(("offset", "tolerance"), [(0, 1e-6), (100, 1e-4)])
def test_agrees_with_dense_nc1(N, d, C, offset, tolerance):
    """Classes of different sizes, C > d among them; the overall mean is over samples, not over classes."""
    split = clusters(N, d, C)
    split.x += offset
    dim, rank, value, _, dropped = of(split, C, batch_size=37)
    assert (dim, rank, dropped) == (d, min(d, C - 1), 0)
    assert of(split, C, batch_size=37) == pytest.approx(nc1.collapse(split.x, split.labels, C), rel=1e-9)
    assert value == pytest.approx(dense_nc1(split.x, split.labels, C), rel=tolerance)


@pytest.mark.parametrize(("offset", "aside"), [(0, 1e-3), (100, 1e-3), (0, 1e-5)])
def test_nearly_collinear_means(offset, aside):
    """The third mean leaves the line through the others by a little."""
    g = torch.Generator().manual_seed(0)
    means = torch.zeros(3, 8)
    means[:, 0], means[2, 1] = torch.tensor([0.0, 1.0, 2.0]), aside
    y = torch.arange(600) % 3
    noise = torch.randn(200, 8, generator=g).repeat_interleave(3, 0) * 0.1  # the same in every class
    split = Toy(means[y] + noise + offset, y)
    _, rank, value, kept, _ = of(split, 3)
    assert rank == 2
    assert kept == pytest.approx(aside / 12**0.5, rel=0.01)
    assert value == pytest.approx(dense_nc1(split.x, y, 3), rel=1e-4)


@pytest.mark.parametrize(("aside", "rank"), [(3e-7, 1), (1.4e-6, 1), (2e-6, 2), (3e-6, 2)])
def test_directions_near_the_eps_of_the_largest_do_not_count(aside, rank):
    """Means -1 0, 1 0 and 0 aside: singular values sqrt(2) and sqrt(2/3) aside, the floor 8 x 1.2e-7 sqrt(2)."""
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, aside]])
    found = nc1.collapse(means, torch.arange(3), 3)
    evidence = (pytest.approx(1), pytest.approx(aside / 3**0.5)) if rank == 1 else (pytest.approx(aside / 3**0.5), 0)
    assert found[1:] == (rank, 0, *evidence)
    assert nc1.collapse(means.double(), torch.arange(3), 3).rank == 2


@pytest.mark.parametrize(("N", "offset"), [(30, 0), (2000, 0), (2000, 100)])
def test_rank_ignores_rounding(N, offset):
    """Float32 features that were multiplied out of a plane, and moved by 100, still have means of rank 2."""
    split, g = clusters(N, 2, 6, spread=0.1), torch.Generator().manual_seed(0)
    h = split.x
    for fan_in, fan_out in ((2, 1000), (1000, 1000), (1000, 1000), (1000, 40)):
        h = h @ torch.randn(fan_in, fan_out, generator=g) / fan_in**0.5
    dim, rank, value, kept, dropped = of(Toy(h + offset, split.labels), 6)
    assert (dim, rank) == (40, 2)
    assert 0 < dropped < 1e-5 < 0.1 < kept
    assert value == pytest.approx(of(split, 6)[2], rel=1e-4)  # linear maps of full rank leave the trace as it is


def test_batch_size_order_rotation_and_offset_change_nothing():
    split = clusters(400, 12, 5)
    value = of(split, 5)[2]
    shuffle = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    Q, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)).double())
    assert of(split, 5, batch_size=1)[2] == pytest.approx(value, rel=1e-12)
    assert of(Toy(split.x[shuffle], split.labels[shuffle]), 5)[2] == pytest.approx(value, rel=1e-12)
    assert of(Toy(split.x.double() @ Q, split.labels), 5)[2] == pytest.approx(value, rel=1e-9)
    assert of(Toy(split.x.double() + 3.0, split.labels), 5)[2] == pytest.approx(value, rel=1e-9)


def test_float64_in_chunks(monkeypatch):
    split = clusters(100, 12, 5)
    whole = of(split, 5)
    monkeypatch.setitem(nc1.CHUNK_BYTES, "cpu", 8 * 12 * 7)
    assert of(split, 5)[2] == pytest.approx(whole[2], rel=1e-12)


def test_every_tap_kept_or_recomputed():
    split, model = clusters(200, 6, 3), three_blocks()
    taps = {f"block{i}": model[i - 1] for i in (1, 2, 3)}
    kept = nc1.measure(model, taps, split, 3, batch_size=64)
    hidden = split.x
    for i in range(3):
        hidden = model.eval()[i](hidden).detach()
        assert kept[f"block{i + 1}"][:2] == (6, 2)
        assert kept[f"block{i + 1}"][2] == pytest.approx(dense_nc1(hidden, split.labels, 3), rel=1e-6)
    one_tap = 200 * 6 * 4
    for keep_bytes in (0, one_tap, 2 * one_tap):
        again = nc1.measure(model, taps, split, 3, batch_size=64, keep_bytes=keep_bytes)
        assert {t: v[2] for t, v in again.items()} == pytest.approx({t: v[2] for t, v in kept.items()}, rel=1e-12)


def test_second_pass_runs_only_as_far_as_needed():
    split, model = clusters(200, 6, 3), three_blocks()
    calls = [0] * 4
    for i, block in enumerate(model):
        block.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    taps = {"block3": model[2], "block1": model[0]}
    nc1.measure(model, taps, split, 3, batch_size=100, keep_bytes=200 * 6 * 4)  # block3 is kept, block1 is not
    assert calls == [2 + 2 + 2, 2 + 2, 2 + 2, 2]  # some samples in two ways, two batches, two batches again


def test_leaves_the_model_as_it_was():
    """Eval mode, so BatchNorm does not mix the batch; then the modes, buffers, gradients and random state as before."""
    split, model = clusters(200, 6, 3), three_blocks()
    model.train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    model(split.x).sum().backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    taps = {"block2": model[1]}
    small, large = (nc1.measure(model, taps, split, 3, batch_size=b)["block2"][2] for b in (8, 200))
    assert small == pytest.approx(large, rel=1e-5)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("keep_bytes", [0, 60 * 24 * 4, nc1.KEEP_BYTES])
def test_a_tap_that_is_overwritten_is_measured_as_it_was(layout, keep_bytes):
    """By a layer in place further on, through views too, with features in memory as they are taken and otherwise."""
    split = clusters(60, 24, 3)
    split.x = split.x.view(60, 6, 2, 2).contiguous(memory_format=layout)
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1), nn.Flatten(), nn.ELU(inplace=True))
    model.to(memory_format=layout)
    with torch.inference_mode():
        expected, h = {}, split.x.clone()
        for i, block in enumerate(model):
            h = block(h)
            expected[str(i)] = dense_nc1(h.flatten(1), split.labels, 3)
        got = nc1.measure(model, dict(model.named_children()), split, 3, 25, keep_bytes)
    assert {tap: of_tap.nc1 for tap, of_tap in got.items()} == pytest.approx(expected, rel=1e-6)


def test_no_taps():
    assert nc1.measure(three_blocks(), {}, clusters(50, 6, 3), 3) == {}


@pytest.mark.parametrize("constant", [0.0, 0.1, 100.3])
def test_class_means_that_coincide_have_no_nc1(constant):
    y = (torch.arange(300) % 7).clamp(max=2)  # of different sizes, so that sums are rounded differently
    for dtype in (torch.float32, torch.float64):
        dim, rank, *rest = of(Toy(torch.full((300, 5), constant, dtype=dtype), y), 3)
        assert (dim, rank) == (5, 0)
        assert all(map(math.isnan, rest))  # M is 0


def test_class_means_that_coincide_but_for_rounding_have_no_nc1():
    noise = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)) * 1e-5  # 100.3 has an ulp of 8e-6
    assert of(Toy(100.3 + noise, torch.arange(300) % 3), 3)[1] == 0


@pytest.mark.parametrize("C", [10, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 100])
def test_class_means_one_ulp_apart_have_rank_0(C, dtype, offset):
    """Each number in them is one of two neighbours, in fewer and in more dimensions than there are classes."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    g, y = torch.Generator().manual_seed(0), torch.arange(3 * C) % C
    for d in (5, 300):
        low = (torch.rand(d, generator=g) + offset).to(dtype).view(integers)
        means = (low + torch.randint(0, 2, (C, d), generator=g).to(integers)).view(dtype)
        assert len(means.unique(dim=0)) > 1
        for split in (Toy(means[y], y), Toy(-means[y], y)):
            rank, value, kept, dropped = of(split, C)[1:]
            assert (rank, dropped) == (0, 1)
            assert math.isnan(value)
            assert math.isnan(kept)


def test_names_the_empty_class():
    with pytest.raises(ValueError, match=r"got none of class 2, 4"):
        of(Toy(torch.randn(6, 2), torch.tensor([0, 1, 3, 0, 1, 3])), 5)


def test_refuses_labels_out_of_range():
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1, got 0\.\.2"):
        of(Toy(torch.randn(3, 2), torch.arange(3)), 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_names_the_layer_that_is_not_finite(bad):
    split, model = clusters(50, 6, 3), three_blocks()
    with torch.no_grad():
        model[1][0].bias[2] = bad
    model[1][2] = nn.Identity()
    with pytest.raises(ValueError, match="layer 'block2'"):
        nc1.measure(model, {"block1": model[0], "block2": model[1]}, split, 3)


def test_refuses_a_tap_that_is_not_called_once():
    split, model = clusters(50, 6, 3), three_blocks()
    with pytest.raises(ValueError, match="'stray' is called 0 times"):
        nc1.measure(model, {"stray": nn.Linear(6, 6)}, split, 3)
    twice = nn.Sequential(model[0], model[0])
    with pytest.raises(ValueError, match="'twice' is called 2 times"):
        nc1.measure(twice, {"twice": model[0]}, split, 3)


@pytest.mark.parametrize("C", [2, 10])
@pytest.mark.parametrize("nonlinearity", ["Tanh", "Sigmoid", "ReLU"])
def test_small_plain_networks_are_measured_in_float64(nonlinearity, C):
    """Deep saturated layers have directions that float32 would lose or add; singular values of M below 1e-8 are 0."""
    torch.manual_seed(0)
    split, model = clusters(600, 20, C), models.build("MLP", (20,), C, widths=(10,) * 8, nonlinearity=nonlinearity)
    got = nc1.measure(model, models.taps(model), split, C, batch_size=250, keep_bytes=600 * 4 * 10 * 8)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    h = split.x.double()
    for tap, block in list(model.double().named_children())[1:-1]:
        h = block(h).detach()
        assert got[tap].nc1 == pytest.approx(dense_nc1(h, split.labels, C, rtol=1e-8), rel=1e-5), tap
        M = torch.stack([h[split.labels == c].mean(0) for c in range(C)]) - h.mean(0)
        assert got[tap].rank == torch.linalg.matrix_rank(M, rtol=1e-8), tap


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("change", ["hook", "hook before", "forward", "subclass", "large", "bfloat16"])
def test_what_is_not_plain_or_small_runs_as_it_is(monkeypatch, change):
    """In float32, with all that makes it another network."""
    torch.manual_seed(0)
    model, split = nn.Sequential(nn.Linear(6, 5), nn.Tanh()), clusters(90, 6, 3)
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
        monkeypatch.setattr(nc1, "SMALL", 34)  # it has 35
    else:
        model.bfloat16()
        split.x = split.x.bfloat16()
    h = model(split.x).detach()
    assert h.dtype == (torch.bfloat16 if change == "bfloat16" else torch.float32)
    got = nc1.measure(model, {"tanh": model[1]}, split, 3)["tanh"].nc1
    assert got == pytest.approx(dense_nc1(h, split.labels, 3), rel=1e-9)


class Gives(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x: torch.Tensor) -> object:
        return self.what(x)


@pytest.mark.parametrize(
    ("what", "given"),
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
def test_names_the_layer_that_gives_something_else(what, given):
    model = nn.Sequential(nn.Linear(6, 6), Gives(what))
    with pytest.raises(ValueError, match=f"layer 'second' gives {given}, expected a floating-point tensor of shape"):
        nc1.measure(model, {"first": model[0], "second": model[1]}, clusters(50, 6, 3), 3)


def test_names_the_layer_that_gives_a_part_of_the_batch():
    """As a replica of DataParallel would."""
    model = nn.Sequential(Gives(lambda x: x[: max(1, len(x) // 2)]))
    message = r"layer 'half' gives torch.float32 \(6, 6\) on cpu, expected a .* of shape \(13, ...\)"
    with pytest.raises(ValueError, match=message):
        nc1.measure(model, {"half": model[0]}, clusters(50, 6, 3), 3, batch_size=20)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(dtype):
    split = clusters(50, 6, 3)
    assert of(Toy(split.x, split.labels.to(dtype)), 3) == of(split, 3)


class Labeled(Toy):
    def __len__(self) -> int:
        return len(self.x)


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
def test_says_what_labels_have_to_be(change, given):
    split = Labeled(*vars(clusters(50, 6, 3)).values())
    split.labels = change(split.labels)
    with pytest.raises(
        ValueError, match=rf"samples\.labels must be an integer tensor \(N,\) .* of the 50 samples.*, got {given}"
    ):
        of(split, 3)


def test_says_that_labels_are_missing():
    split = Labeled(*vars(clusters(50, 6, 3)).values())
    del split.labels
    with pytest.raises(ValueError, match=r"samples must have len\(\), labels and batch\(indices\), as .*, got Labeled"):
        of(split, 3)


def test_refuses_batches_with_other_labels():
    split = clusters(50, 6, 3)
    noisy = split.labels.clone()
    noisy[41] = (noisy[41] + 1) % 3
    split.batch = lambda indices: (split.x[indices], noisy[indices])
    with pytest.raises(ValueError, match=r"samples.batch\(indices\) gives other labels than samples.labels\[indices\]"):
        of(split, 3, batch_size=20)


def test_refuses_what_is_no_dict_of_taps_and_no_batch():
    model, split = nn.Sequential(nn.Linear(6, 6)), clusters(50, 6, 3)
    with pytest.raises(ValueError, match="expected taps in a dict and batches of at least 1"):
        nc1.measure(model, [model[0]], split, 3)
    with pytest.raises(ValueError, match=r"batches of at least 1, got .* and 0"):
        of(split, 3, batch_size=0)
    for given in ({"x": split.x}, (split.x,), (split.x, split.labels.tolist())):
        split.batch = lambda indices, given=given: given
        with pytest.raises(ValueError, match=r"NC1: samples.batch\(indices\) must give two tensors"):
            of(split, 3)


def test_refuses_data_that_are_augmented():
    split = clusters(50, 6, 3)
    split.batch = lambda indices: (split.x[indices] + 0.1 * torch.randn(len(indices), 6), split.labels[indices])
    with pytest.raises(ValueError, match=r"NC1: .* without augmentation, shuffling or sorting"):
        of(split, 3)


@pytest.mark.parametrize(
    "layer",
    [
        Gives(lambda x: torch.nn.functional.dropout(x, 0.5)),
        nn.BatchNorm1d(6, track_running_stats=False),
        Gives(lambda x: x - x.mean(0)),
        Gives(lambda x: x[x[:, 0].argsort()]),
    ],
    ids=["dropout", "BatchNorm", "centred", "sorted"],
)
def test_refuses_layers_that_draw_or_mix_samples(layer):
    model = nn.Sequential(nn.Linear(6, 6), layer)
    with pytest.raises(ValueError, match="layer 'second' gives a sample other outputs beside other samples"):
        nc1.measure(model, {"first": model[0], "second": model[1]}, clusters(50, 6, 3), 3)


@pytest.mark.parametrize("keep_bytes", [0, nc1.KEEP_BYTES])
def test_a_first_layer_in_place_leaves_the_data_as_they_were(keep_bytes):
    """Also those of a split that gives a part of them without a copy."""
    split = clusters(50, 6, 3)
    split.batch = lambda indices: (
        (split.x[indices[0] : indices[-1] + 1], split.labels[indices[0] : indices[-1] + 1])
        if len(indices) > 1 and (indices.diff() == 1).all()
        else (split.x[indices], split.labels[indices])
    )
    model, before = nn.Sequential(Gives(lambda x: x.mul_(2).sub_(1)), nn.Linear(6, 5)), split.x.clone()
    found = nc1.measure(model, {"first": model[0]}, split, 3, batch_size=20, keep_bytes=keep_bytes)["first"]
    assert found.nc1 == pytest.approx(dense_nc1(before, split.labels, 3), rel=1e-6)  # which a scale and a shift leave
    assert torch.equal(split.x, before)


def test_autocast_around_it_changes_nothing():
    split, model = clusters(50, 6, 3), three_blocks()
    expected = nc1.measure(model, {"block2": model[1]}, split, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert nc1.measure(model, {"block2": model[1]}, split, 3) == expected


def test_refuses_one_class():
    with pytest.raises(ValueError, match="num_classes has to be at least 2, got 1"):
        of(Toy(torch.randn(6, 2), torch.zeros(6, dtype=torch.int64)), 1)


class Moody(nn.Module):
    """Goes around its layer in the second batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(6, 6), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x if self.calls == 4 else self.layer(x)  # two calls are for some samples


def test_refuses_a_tap_that_is_not_called_in_some_batch():
    """As in a compiled network, which has forgotten its hooks for the sizes of batches that it knows."""
    model = Moody()
    with pytest.raises(ValueError, match="'layer' is called 0 times in a forward pass, expected once"):
        nc1.measure(model, {"layer": model.layer}, clusters(50, 6, 3), 3, batch_size=20)


class Careful(nn.Module):
    """A network that would take the end of a forward pass for a failure."""

    def __init__(self):
        super().__init__()
        self.linear, self.tanh = nn.Linear(6, 6), nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return self.tanh(self.linear(x))
        except Exception:
            return self.tanh(0 * x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("network", [Careful, three_blocks])
def test_the_same_in_any_mode_of_autograd_which_is_left_as_it_was(network, mode):
    torch.manual_seed(0)
    model, split = network().eval(), clusters(90, 6, 3)
    tap = model.tanh if network is Careful else model[1]
    h = model(split.x) if network is Careful else model[:2](split.x)
    expected = pytest.approx(dense_nc1(h.detach(), split.labels, 3), rel=1e-6)
    for keep_bytes in (0, nc1.KEEP_BYTES):
        with mode():
            before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            assert nc1.measure(model, {"tap": tap}, split, 3, 40, keep_bytes)["tap"].nc1 == expected
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    model(split.x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
