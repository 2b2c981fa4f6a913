"""Networks, data and constructors of other people: measured right, or refused in one sentence, with nothing changed."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import checks
import dib
from heads import Thesis, Tuned
from tests.test_dib import toy
from tests.toys import Toy

TUNED = Tuned(8)
RECIPES = pytest.mark.parametrize(
    "recipe", [Thesis(partial(torch.optim.SGD, lr=0.1), 2), TUNED], ids=["thesis", "tuned"]
)


def network(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        *(layers or (nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
    ).double()


def measure(build=network, splits=(0, 2), split=None, model=None, fresh=None, recipe=TUNED, C=3, **options):
    torch.manual_seed(0)
    model, split = model or build(), toy() if split is None else split
    return dib.measure_splits(model, splits, split, C, fresh or build, recipe, batch_size=40, **options)


def refused(message: str, *args, **options) -> None:
    with pytest.raises(ValueError, match=message):
        measure(*args, **options)


# Layers that are not what their type says


class Bounded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 0 * super().forward(x)


class Nothing(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 0 * super().forward(x)


def of_type(last: nn.Module) -> nn.Sequential:
    return network(nn.Linear(6, 5), nn.Tanh(), last)


def hooked(register: str) -> nn.Sequential:
    model = network()
    hook = {
        "register_forward_hook": lambda *of: 0 * of[2],
        "register_forward_pre_hook": lambda _, inputs: 0 * inputs[0],
    }
    getattr(model[4], register)(hook[register])
    nn.init.zeros_(model[4].bias).requires_grad_(False)
    return model


def by_instance() -> nn.Sequential:
    model = network()
    model[4].forward = lambda x: 0 * F.linear(x, model[4].weight)
    return model


@RECIPES
@pytest.mark.parametrize(
    "build",
    [
        lambda: of_type(Bounded(5, 3)),
        lambda: of_type(Nothing(nn.Linear(5, 3))),
        lambda: network(Nothing(nn.Linear(6, 5)), nn.Linear(5, 3, bias=False)),
        lambda: hooked("register_forward_hook"),
        lambda: hooked("register_forward_pre_hook"),
        by_instance,
    ],
    ids=["type", "Sequential", "first", "hook", "pre-hook", "instance"],
)
def test_a_layer_with_a_forward_of_its_own_is_run_by_it(build, recipe):
    """All give three logits of 0, which stacked or optimal linear layers would not."""
    for of_split in measure(build, (0, 1), recipe=recipe).values():
        assert [head.loss for head in of_split] == pytest.approx([math.log(3)] * len(of_split))


def test_a_hook_on_all_modules_is_run():
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: 0 * output if isinstance(module, nn.Linear) else None
    )
    try:
        found = measure()
    finally:
        handle.remove()
    assert all(head.loss == pytest.approx(math.log(3)) for of_split in found.values() for head in of_split)


def test_a_hook_that_only_looks_changes_nothing():
    model, seen = network(), []
    expected = measure(model=model)
    model[2].register_forward_hook(lambda *of: seen.append(of[2]))
    assert measure(model=model) == expected
    assert seen


def reparametrised(how) -> nn.Sequential:
    model = network()
    for layer in model[::2]:
        how(layer)
    return model


@RECIPES
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "how",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        partial(prune.l1_unstructured, name="weight", amount=0.5),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
    ],
    ids=["weight_norm", "spectral_norm", "new weight_norm", "new spectral_norm", "pruned", "backward hook"],
)
def test_reparametrised_layers_are_measured(how, recipe):
    """The network's own decoder is among them, and its parameters, buffers and modes stay as they are."""
    model = reparametrised(how).train()
    before = copy.deepcopy(model.state_dict())
    found = measure(lambda: reparametrised(how), model=model, recipe=recipe)
    own = F.cross_entropy(model.eval()(toy().x), toy().labels).item()
    assert all(of_split[0].bound <= own + 1e-9 for of_split in found.values())
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


class Two(nn.Sequential):
    def __init__(self, width: int, bias: bool):
        super().__init__(nn.Linear(6, width, bias=bias), nn.Tanh(), nn.Linear(width, 3))


def test_a_sequential_with_a_constructor_of_its_own_is_any_other():
    of_subclass = measure(lambda: Two(5, True).double())
    assert of_subclass == measure(lambda: network(*Two(5, True)))


# Layers that work in place


class Views(Toy):
    """Data that hands out itself, not a copy."""

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        whole = len(indices) == len(self) and (indices.diff() == 1).all()
        return (self.x, self.labels) if whole else super().batch(indices)


def in_place() -> nn.Sequential:
    elu = partial(nn.ELU, inplace=True)
    return network(elu(), nn.Linear(6, 6), nn.Identity(), elu(), nn.Linear(6, 6), elu(), nn.Linear(6, 3))


@RECIPES
@pytest.mark.parametrize("keep_bytes", [0, 2**20])
def test_layers_that_work_in_place_leave_data_and_encodings(recipe, keep_bytes):
    """All splits together are what each is alone, also where plain ones stand before and after others."""
    split = Views(toy().x.clone(), toy().labels)
    torch.manual_seed(0)
    model = in_place()
    options = {"fresh": in_place, "recipe": recipe, "batch_size": 90, "keep_bytes": keep_bytes}
    found = dib.measure_splits(model, range(7), split, 3, **options)
    for k, of_split in found.items():
        alone = dib.measure(model, k, split, 3, **options)
        assert [head.loss for head in of_split] == pytest.approx([head.loss for head in alone], rel=1e-9)
    with torch.no_grad():
        z = model[:6](split.x.clone())
        own = F.cross_entropy(model[6](z), split.labels).item()
    (last, *_) = dib.measure(model[6:], 0, Toy(z, split.labels), 3, lambda: in_place()[6:], recipe, batch_size=90)
    if recipe == TUNED:  # the optimum
        assert last.loss == pytest.approx(found[6][0].loss, rel=1e-6)
    assert all(of_split[0].bound <= own + 1e-9 for of_split in found.values())
    assert torch.equal(split.x, toy().x)


# Numbers of other sizes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("made", ["like the model", torch.float32])
def test_heads_of_a_model_in_half_precision_are_float32(dtype, made):
    split, networks = toy(), []
    split.x = split.x.to(dtype)

    def fresh() -> nn.Sequential:
        networks.append(network().to(dtype if made == "like the model" else made))
        return networks[-1]

    exact = measure(lambda: network().float(), split=Toy(split.x.float(), split.labels))
    for k, of_split in measure(lambda: network().to(dtype), split=split, fresh=fresh).items():
        assert [head.loss for head in of_split] == pytest.approx([head.loss for head in exact[k]], abs=0.05)
    assert all(p.dtype == torch.float32 for each in networks for p in each[2:].parameters())


def test_a_double_model_has_heads_as_fresh_makes_them():
    assert all(math.isfinite(head.loss) for head in measure(fresh=lambda: network().float())[2])


# Gradients that are off, autocast


def test_modes_around_the_call_change_nothing():
    split = Toy(toy().x.float(), toy().labels)
    measured = partial(measure, lambda: network().float(), split=split)
    expected = measured()
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.enable_grad()):
        with mode:
            assert measured() == expected
            assert torch.is_grad_enabled() is not isinstance(mode, (torch.no_grad, torch.inference_mode))
            assert torch.is_inference_mode_enabled() is isinstance(mode, torch.inference_mode)
            assert torch.is_autocast_enabled("cpu") is isinstance(mode, torch.autocast)


def test_a_model_and_data_made_in_inference_mode_are_measured():
    expected = measure()
    with torch.inference_mode():
        torch.manual_seed(0)
        model, split = network(), toy()
        split = Toy(split.x.clone(), split.labels.clone())
    assert split.x.is_inference()
    assert next(model.parameters()).is_inference()
    assert measure(model=model, split=split) == expected


# What is refused


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def with_block(function, width: int = 5) -> nn.Sequential:
    return network(nn.Linear(6, 5), Lambda(function), nn.Linear(width, 3))


class Still(nn.BatchNorm1d):
    """It stays in training mode."""

    def train(self, mode: bool = True):
        return super().train(True)


@pytest.mark.parametrize("splits", [(0, 1), (2,)])
@pytest.mark.parametrize(
    "build",
    [
        lambda: network(nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)),
        lambda: network(nn.Linear(6, 5), Still(5), nn.Linear(5, 3)),
        lambda: with_block(lambda z: z.softmax(0)),
        lambda: with_block(lambda z: 100 + z - z.mean(0)),
        lambda: with_block(F.dropout),
        lambda: with_block(lambda z: z + torch.randn_like(z)),
        lambda: network(nn.Linear(6, 5), nn.LSTM(5, 5), Lambda(lambda of: of[0]), nn.Linear(5, 3)),  # over the batch
    ],
    ids=["batch norm", "batch norm in training", "softmax", "centred", "dropout", "noise", "lstm"],
)
def test_refuses_blocks_that_mix_samples_or_draw(build, splits):
    name = 2 if isinstance(build()[1], nn.LSTM) else 1
    refused(f"block '{name}' gives a sample other outputs beside other samples", build, (0,) if name == 2 else splits)


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(4), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)])
def test_norms_of_a_sample_or_of_running_statistics_are_measured(norm):
    def build() -> nn.Sequential:
        return network(nn.Conv2d(1, 4, 3), copy.deepcopy(norm), nn.Flatten(), nn.Linear(36, 3))

    assert all(math.isfinite(head.loss) for head in measure(build, (0, 2), toy(shape=(1, 5, 5)))[0])


def in_bfloat16(x: Tensor) -> Tensor:
    """Probabilities whose sums are off by more than a thousandth."""
    return torch.stack([torch.full((len(x),), share) for share in (0.3, 0.3, 0.4)], 1).bfloat16() + 0 * x.bfloat16()


@pytest.mark.parametrize(
    ("build", "splits", "message"),
    [
        (lambda: Lambda(torch.tanh), (0,), "the model must be an nn.Sequential, .* got Lambda"),
        (lambda: Nothing(nn.Linear(6, 3)), (0,), "the model has a forward of its own"),
        (lambda: with_block(lambda z: (z, z)), (2,), r"split 2 needs encodings, .* block '1' gives tuple of"),
        (lambda: with_block(lambda z: z.repeat(2, 1)), (2,), r"split 2 needs encodings, .*float64 \(30, 5\)"),
        (lambda: of_type(nn.Linear(5, 2)), (0,), r"must give logits, \(15, 3\) or wider .* got .*\(15, 2\)"),
        (lambda: network(nn.Linear(6, 3), Lambda(lambda z: {"logits": z})), (0,), "must give logits, .* got dict"),
        (lambda: network(nn.Linear(6, 3), nn.Unflatten(1, (3, 1))), (0,), r"must give logits, .*\(15, 3, 1\)"),
        (lambda: network(nn.Linear(6, 3), nn.Softmax(1)), (0,), "outputs of the model are probabilities"),
        (lambda: network(nn.Linear(6, 3), Lambda(in_bfloat16)), (0,), "outputs of the model are probabilities"),
        (lambda: network(nn.Linear(7, 3)), (0,), r"block '0' fails on torch.float64 \(15, 6\) on cpu: .*shapes"),
        (lambda: network().float(), (0,), r"block '0' fails on torch.float64 .*dtype"),
        (lambda: network().to("meta"), (0,), r"block '0' fails on torch.float64 \(15, 6\) on cpu: .*meta"),
        (network, (5,), r"k must lie in 0\.\.4, so that a decoder is left, got 5"),
        (network, (1.0,), "k must lie in .* got 1.0"),
        (network, ("hidden1",), "k must lie in .* got 'hidden1'"),
    ],
)
def test_refuses_models(build, splits, message):
    fresh = network if isinstance(build(), Lambda) or next(build().parameters()).device.type == "meta" else build
    refused(message, build, splits, fresh=fresh)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_refuses_a_hook_on_the_model_itself(register):
    model = network()
    getattr(model, register)(lambda *of: None)
    refused("the model has a hook, which its slices would not have", model=model)


def test_refuses_a_forward_set_on_the_model_itself():
    model = network()
    model.forward = lambda x: 0 * x
    refused("the model has a forward of its own", model=model)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2), (torch.float16, 0.1)])
def test_outputs_are_alike_but_for_the_rounding_of_their_dtype(dtype, least):
    """Of samples that do not differ, so that no spread among them covers for it."""
    a = torch.ones(8, 5, dtype=dtype)
    assert checks.alike(a, a * (1 + torch.finfo(dtype).eps))
    assert not checks.alike(a, a * (1 + least))


def test_a_tuple_between_splits_is_measured():
    def build() -> nn.Sequential:
        rest = nn.LSTM(3, 5, batch_first=True), Lambda(lambda of: of[0][:, -1]), nn.Linear(5, 3)
        return network(nn.Unflatten(1, (2, 3)), *rest)

    assert all(math.isfinite(head.loss) for of_split in measure(build, (0, 1, 3)).values() for head in of_split)


def untouched(fresh, message: str, model: nn.Sequential) -> None:
    before = copy.deepcopy(model.state_dict())
    refused(message, model=model, fresh=fresh)
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


def test_refuses_constructors_that_do_not_build_anew():
    model = network(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    made = copy.deepcopy(model)
    norm = copy.deepcopy(model[1])
    for layer in (*made[::3], norm):
        layer.weight.data += 1
    refuses = partial(untouched, model=model)
    refuses(lambda: model, r"must build the network anew, and 0\.weight is that of the model")
    refuses(lambda: made, r"must build the network anew, and 0\.weight is that of what it made before")
    refuses(lambda: network(nn.Linear(6, 5), model[1], nn.Tanh(), nn.Linear(5, 3)), r"1\.weight is that of the model")
    norm.running_mean = model[1].running_mean
    refuses(lambda: network(nn.Linear(6, 5), norm, nn.Tanh(), nn.Linear(5, 3)), r"1\.running_mean is that of the model")
    refuses(
        lambda: copy.deepcopy(model), "must draw weights from torch's global generators, and gives the same ones twice"
    )
    refuses(model, "fresh must be a function that builds the network anew, got Sequential")
    refuses(lambda: None, "what fresh.. makes must be an nn.Sequential, .* got NoneType")
    refuses(lambda: network(*copy.deepcopy(model), nn.ReLU()), "makes 5 blocks, and the model has 4")
    refuses(
        lambda: network(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)),
        r"makes another network: 0\.weight is of shape \(7, 6\), and of shape \(5, 6\) in the model",
    )
    refuses(
        lambda: network(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3, bias=False)),
        r"makes another network: 3\.bias is missing, and of shape \(3,\) in the model",
    )
    refuses(
        lambda: network(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
        "block '2' of what fresh.. makes, given the model's weights, gives other outputs",
    )
    refuses(
        lambda: nn.Sequential(nn.LazyLinear(5), nn.BatchNorm1d(5), nn.Tanh(), nn.LazyLinear(3)),
        r"0\.weight is without a size",
    )


def test_frozen_layers_may_be_shared():
    """Nothing trains them, and before the first split nothing of fresh() is used."""
    backbone, norm = nn.Linear(6, 5).double().requires_grad_(False), nn.BatchNorm1d(5).double()
    assert measure(lambda: network(backbone, nn.Tanh(), nn.Linear(5, 3)), (0, 1))
    assert measure(lambda: network(backbone, norm, nn.Tanh(), nn.Linear(5, 3)), (2, 3))


def test_fine_tuning_starts_where_it_starts():
    pretrained = network().state_dict()

    def build() -> nn.Sequential:
        model = network()
        model.load_state_dict(pretrained)
        nn.init.normal_(model[4].weight)
        return model

    assert measure(build)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda y: y.tolist(), "labels must be an integer tensor .* 90 samples, at least one, got list"),
        (lambda y: y.numpy(), "labels must be an integer tensor .* got ndarray"),
        (lambda y: y.double(), "labels must be an integer tensor .* got torch.float64"),
        (lambda y: F.one_hot(y), r"labels must be an integer tensor .* got torch.int64 \(90, 3\)"),
        (lambda y: y[:, None], r"labels must be an integer tensor .* got torch.int64 \(90, 1\)"),
        (lambda y: y + 1, r"labels must lie in 0\.\.2, got 1\.\.3"),
    ],
)
def test_refuses_labels(labels, message):
    split = toy()
    given = labels(split.labels)
    refused(message, split=type("Other", (Toy,), {"__len__": lambda _: 90})(split.x, given))


def test_labels_of_any_integer_type_are_measured():
    split, expected = toy(), measure()
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert measure(split=Toy(split.x, split.labels.to(dtype))) == expected


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda self, i: self.x[i], "must give two tensors .* got torch.float64"),
        (lambda self, i: (self.x[i], self.labels[i], i), "must give two tensors .* got tuple of"),
        (lambda self, i: ({"x": self.x[i]}, self.labels[i]), "must give two tensors .* got tuple of dict"),
        (lambda self, i: (self.x, self.labels), r"must give two tensors .* got tuple of torch.float64 \(90, 6\)"),
        (lambda self, i: (self.x[i] + torch.randn(len(i), 1), self.labels[i]), "must give each sample as it gave it"),
        (lambda self, i: (self.x[i.sort()[0]], self.labels[i.sort()[0]]), "must give each sample as it gave it"),
        (lambda self, i: (self.x[i], self.labels[i - 1]), "must give each sample as it gave it before, with its own"),
    ],
    ids=["inputs alone", "three", "dict", "all", "drawn", "sorted", "other labels"],
)
def test_refuses_batches(batch, message):
    split = toy()
    refused(message, split=type("Other", (Toy,), {"batch": batch})(split.x, split.labels))


def test_refuses_data_that_is_no_split():
    split = toy()
    refused(
        "samples must have len\\(\\), labels and batch", split=torch.utils.data.TensorDataset(split.x, split.labels)
    )
    refused("for each of the 0 samples, at least one", split=Toy(split.x[:0], split.labels[:0]))
    refused("for each of the 50 samples", split=type("Fewer", (Toy,), {"__len__": lambda _: 50})(split.x, split.labels))


def test_no_splits_are_no_work():
    assert measure(splits=()) == {}
