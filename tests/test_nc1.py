import math

import pytest
import torch
from torch import nn

import nc1
from tests.toys import Toy, clusters
from tests.yardsticks import dense_nc1


def of(split: Toy, C: int, **options) -> tuple[int, int, float]:
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
    assert of(split, 2) == (1, 1, pytest.approx(0.4, rel=1e-12))


@pytest.mark.parametrize(("N", "d", "C"), [(500, 20, 10), (500, 4, 10), (300, 30, 2), (200, 3, 3)])
@pytest.mark.parametrize(("offset", "tolerance"), [(0, 1e-6), (100, 1e-4)])
def test_agrees_with_dense_nc1(N, d, C, offset, tolerance):
    """Classes of different sizes, C > d among them; the overall mean is over samples, not over classes."""
    split = clusters(N, d, C)
    split.x += offset
    dim, rank, value = of(split, C, batch_size=37)
    assert (dim, rank) == (d, min(d, C - 1))
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
    _, rank, value = of(split, 3)
    assert rank == 2
    assert value == pytest.approx(dense_nc1(split.x, y, 3), rel=1e-4)


@pytest.mark.parametrize(("N", "offset"), [(30, 0), (2000, 0), (2000, 100)])
def test_rank_ignores_rounding(N, offset):
    """Float32 features that were multiplied out of a plane, and moved by 100, still have means of rank 2."""
    split, g = clusters(N, 2, 6, spread=0.1), torch.Generator().manual_seed(0)
    h = split.x
    for fan_in, fan_out in ((2, 1000), (1000, 1000), (1000, 1000), (1000, 40)):
        h = h @ torch.randn(fan_in, fan_out, generator=g) / fan_in**0.5
    dim, rank, value = of(Toy(h + offset, split.labels), 6)
    assert (dim, rank) == (40, 2)
    assert value == pytest.approx(of(split, 6)[2], rel=1e-4)  # linear maps of full rank leave the trace as it is


def test_batch_size_order_rotation_and_offset_change_nothing():
    split = clusters(400, 12, 5)
    _, _, value = of(split, 5)
    shuffle = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    Q, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)).double())
    assert of(split, 5, batch_size=1)[2] == pytest.approx(value, rel=1e-12)
    assert of(Toy(split.x[shuffle], split.labels[shuffle]), 5)[2] == pytest.approx(value, rel=1e-12)
    assert of(Toy(split.x.double() @ Q, split.labels), 5)[2] == pytest.approx(value, rel=1e-9)
    assert of(Toy(split.x.double() + 3.0, split.labels), 5)[2] == pytest.approx(value, rel=1e-9)


def test_float64_in_chunks(monkeypatch):
    split = clusters(100, 12, 5)
    whole = of(split, 5)
    monkeypatch.setattr(nc1, "CHUNK_BYTES", 8 * 12 * 7)
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
    assert calls == [1 + 2 + 2, 1 + 2, 1 + 2, 1]  # one sample to see the shapes, two batches, two batches again


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


def test_refuses_a_tap_that_is_overwritten():
    """What was kept is no longer what the layer gave; recomputed, it is read in time."""
    split = clusters(50, 6, 3)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True))
    taps = {"linear": model[0], "relu": model[1]}
    with pytest.raises(ValueError, match="'linear' has its output overwritten"):
        nc1.measure(model, taps, split, 3)
    value = nc1.measure(model, taps, split, 3, keep_bytes=0)["linear"][2]
    assert value == pytest.approx(dense_nc1(model[0](split.x).detach(), split.labels, 3), rel=1e-6)


def test_no_taps():
    assert nc1.measure(three_blocks(), {}, clusters(50, 6, 3), 3) == {}


@pytest.mark.parametrize("constant", [0.0, 0.1, 100.3])
def test_class_means_that_coincide_have_no_nc1(constant):
    dim, rank, value = of(Toy(torch.full((300, 5), constant), torch.arange(300) % 3), 3)
    assert (dim, rank) == (5, 0)
    assert math.isnan(value)


def test_class_means_that_coincide_but_for_rounding_have_no_nc1():
    noise = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)) * 1e-5  # 100.3 has an ulp of 8e-6
    assert of(Toy(100.3 + noise, torch.arange(300) % 3), 3)[1] == 0


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
    with pytest.raises(ValueError, match="'stray' is not called"):
        nc1.measure(model, {"stray": nn.Linear(6, 6)}, split, 3)
    twice = nn.Sequential(model[0], model[0])
    with pytest.raises(ValueError, match="'twice' is called more than once"):
        nc1.measure(twice, {"twice": model[0]}, split, 3)
