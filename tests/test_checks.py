"""Unusual networks, samples and make_model functions are measured correctly, or refused. Nothing is changed."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import dib
from layerwise import checks
from layerwise.probes import Thesis, Tuned
from layerwise.samples import Samples
from tests.toys import make_toy_samples

TUNED = Tuned(8)
PROBES = pytest.mark.parametrize(
    "probes", [Thesis(partial(torch.optim.SGD, lr=0.1), 2), TUNED], ids=["thesis", "tuned"]
)


def make_net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        *(layers or (nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
    ).double()


def measure(make_model=make_net, splits=(0, 2), samples=None, model=None, make_other=None, probes=TUNED):
    """Measure a model. make_other: what DIB gets as make_model, if it is not the function that builds the model."""
    torch.manual_seed(0)
    model, samples = model or make_model(), make_toy_samples() if samples is None else samples
    return dib.measure_splits(model, splits, samples, 3, make_other or make_model, probes=probes, batch_size=40)


def assert_refused(message: str, *args, **options) -> None:
    """Assert that `measure` raises ValueError with this message."""
    with pytest.raises(ValueError, match=message):
        measure(*args, **options)


# Layers that compute something else than their type


class ZeroLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 0 * super().forward(x)


class ZeroSequential(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 0 * super().forward(x)


def make_net_ending_in(last: nn.Module) -> nn.Sequential:
    return make_net(nn.Linear(6, 5), nn.Tanh(), last)


def make_hooked_net(register: str) -> nn.Sequential:
    """Build a network with a hook that makes all logits 0."""
    model = make_net()
    hook = {
        "register_forward_hook": lambda module, inputs, output: 0 * output,
        "register_forward_pre_hook": lambda _, inputs: 0 * inputs[0],
    }
    getattr(model[4], register)(hook[register])
    nn.init.zeros_(model[4].bias).requires_grad_(False)
    return model


def make_net_with_own_forward() -> nn.Sequential:
    """Build a network with a layer whose instance has another forward than its type."""
    model = make_net()
    model[4].forward = lambda x: 0 * F.linear(x, model[4].weight)
    return model


@PROBES
@pytest.mark.parametrize(
    "make_model",
    [
        lambda: make_net_ending_in(ZeroLinear(5, 3)),
        lambda: make_net_ending_in(ZeroSequential(nn.Linear(5, 3))),
        lambda: make_net(ZeroSequential(nn.Linear(6, 5)), nn.Linear(5, 3, bias=False)),
        lambda: make_hooked_net("register_forward_hook"),
        lambda: make_hooked_net("register_forward_pre_hook"),
        make_net_with_own_forward,
    ],
    ids=["type", "Sequential", "first", "hook", "pre-hook", "instance"],
)
def test_layers_that_override_forward_are_run_by_it(make_model, probes):
    """All logits are 0. Stacked probes or a linear optimum would have other ones."""
    for of_split in measure(make_model, (0, 1), probes=probes).values():
        assert [probe.loss for probe in of_split] == pytest.approx([math.log(3)] * len(of_split))


def test_a_hook_on_all_modules_is_run():
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: 0 * output if isinstance(module, nn.Linear) else None
    )
    try:
        found = measure()
    finally:
        handle.remove()
    assert all(probe.loss == pytest.approx(math.log(3)) for of_split in found.values() for probe in of_split)


def test_a_hook_that_changes_no_output_has_no_effect():
    model, seen = make_net(), []
    expected = measure(model=model)
    model[2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert measure(model=model) == expected
    assert seen


def make_reparametrised_net(how) -> nn.Sequential:
    model = make_net()
    for layer in model[::2]:
        how(layer)
    return model


@PROBES
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
def test_reparametrised_layers_are_measured(how, probes):
    """`upper` includes the loss of the network itself. Its parameters and buffers stay as they are."""
    model = make_reparametrised_net(how).train()
    before = copy.deepcopy(model.state_dict())
    found = measure(lambda: make_reparametrised_net(how), model=model, probes=probes)
    own = F.cross_entropy(model.eval()(make_toy_samples().inputs), make_toy_samples().labels).item()
    assert all(of_split[0].upper <= own + 1e-9 for of_split in found.values())
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


class TwoLayers(nn.Sequential):
    def __init__(self, width: int, bias: bool):
        super().__init__(nn.Linear(6, width, bias=bias), nn.Tanh(), nn.Linear(width, 3))


def test_a_subclass_of_sequential_with_its_own_constructor_is_measured_like_any_other():
    of_subclass = measure(lambda: TwoLayers(5, True).double())
    assert of_subclass == measure(lambda: make_net(*TwoLayers(5, True)))


# Layers that work in place


class Views(Samples):
    """Samples whose batches may be views of the inputs."""

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        is_whole = len(indices) == len(self) and (indices.diff() == 1).all()
        return (self.inputs, self.labels) if is_whole else super().batch(indices)


def make_in_place_net() -> nn.Sequential:
    elu = partial(nn.ELU, inplace=True)
    return make_net(elu(), nn.Linear(6, 6), nn.Identity(), elu(), nn.Linear(6, 6), elu(), nn.Linear(6, 3))


@PROBES
@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_layers_that_work_in_place_do_not_change_inputs_and_encodings(probes, cache_bytes):
    """Splits measured together are what each is alone. MLPs occur before and after decoders of other kinds."""
    samples = Views(make_toy_samples().inputs.clone(), make_toy_samples().labels)
    torch.manual_seed(0)
    model = make_in_place_net()
    options = {"probes": probes, "batch_size": 90, "cache_bytes": cache_bytes}
    found = dib.measure_splits(model, range(7), samples, 3, make_in_place_net, **options)
    for k, of_split in found.items():
        alone = dib.measure(model, k, samples, 3, make_in_place_net, **options)
        assert [probe.loss for probe in of_split] == pytest.approx([probe.loss for probe in alone], rel=1e-9)
    with torch.no_grad():
        z = model[:6](samples.inputs.clone())
        own = F.cross_entropy(model[6](z), samples.labels).item()
    encodings, options = Samples(z, samples.labels), {"probes": probes, "batch_size": 90}
    (last, *_) = dib.measure(model[6:], 0, encodings, 3, lambda: make_in_place_net()[6:], **options)
    if probes == TUNED:  # both are the optimum
        assert last.loss == pytest.approx(found[6][0].loss, rel=1e-6)
    assert all(of_split[0].upper <= own + 1e-9 for of_split in found.values())
    assert torch.equal(samples.inputs, make_toy_samples().inputs)


# Other dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("made", ["like the model", torch.float32])
def test_probes_of_a_model_in_half_precision_are_float32(dtype, made):
    samples, networks = make_toy_samples(), []
    samples.inputs = samples.inputs.to(dtype)

    def make_model() -> nn.Sequential:
        networks.append(make_net().to(dtype if made == "like the model" else made))
        return networks[-1]

    exact = measure(lambda: make_net().float(), samples=Samples(samples.inputs.float(), samples.labels))
    for k, of_split in measure(lambda: make_net().to(dtype), samples=samples, make_other=make_model).items():
        assert [probe.loss for probe in of_split] == pytest.approx([probe.loss for probe in exact[k]], abs=0.05)
    assert all(p.dtype == torch.float32 for each in networks for p in each[2:].parameters())


def test_probes_of_a_double_model_have_the_dtype_that_make_model_gives_them():
    assert all(math.isfinite(probe.loss) for probe in measure(make_other=lambda: make_net().float())[2])


# Modes of autograd and autocast


def test_modes_around_the_call_have_no_effect():
    samples = Samples(make_toy_samples().inputs.float(), make_toy_samples().labels)
    measured = partial(measure, lambda: make_net().float(), samples=samples)
    expected = measured()
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.enable_grad()):
        with mode:
            assert measured() == expected
            assert torch.is_grad_enabled() is not isinstance(mode, (torch.no_grad, torch.inference_mode))
            assert torch.is_inference_mode_enabled() is isinstance(mode, torch.inference_mode)
            assert torch.is_autocast_enabled("cpu") is isinstance(mode, torch.autocast)


def test_a_model_and_samples_made_in_inference_mode_are_measured():
    expected = measure()
    with torch.inference_mode():
        torch.manual_seed(0)
        model, samples = make_net(), make_toy_samples()
        samples = Samples(samples.inputs.clone(), samples.labels.clone())
    assert samples.inputs.is_inference()
    assert next(model.parameters()).is_inference()
    assert measure(model=model, samples=samples) == expected


# What is refused


class UnvalidatedSamples(Samples):
    """Samples of any labels and any length."""

    def __init__(self, inputs: Tensor, labels: object, length: int):
        self.inputs, self.labels, self.mean, self.length = inputs, labels, None, length

    def __len__(self) -> int:
        return self.length


class Lambda(nn.Module):
    """A layer that applies a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def make_net_with_block(function, width: int = 5) -> nn.Sequential:
    return make_net(nn.Linear(6, 5), Lambda(function), nn.Linear(width, 3))


class AlwaysTraining(nn.BatchNorm1d):
    """A BatchNorm that stays in training mode."""

    def train(self, mode: bool = True):
        return super().train(True)


@pytest.mark.parametrize("splits", [(0, 1), (2,)])
@pytest.mark.parametrize(
    "make_model",
    [
        lambda: make_net(nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)),
        lambda: make_net(nn.Linear(6, 5), AlwaysTraining(5), nn.Linear(5, 3)),
        lambda: make_net_with_block(lambda z: z.softmax(0)),
        lambda: make_net_with_block(lambda z: 100 + z - z.mean(0)),
        lambda: make_net_with_block(F.dropout),
        lambda: make_net_with_block(lambda z: z + torch.randn_like(z)),
        lambda: make_net(nn.Linear(6, 5), nn.LSTM(5, 5), Lambda(lambda z: z[0]), nn.Linear(5, 3)),  # over the batch
    ],
    ids=["batch norm", "batch norm in training", "softmax", "centred", "dropout", "noise", "lstm"],
)
def test_blocks_that_mix_samples_or_draw_random_numbers_are_refused(make_model, splits):
    name = 2 if isinstance(make_model()[1], nn.LSTM) else 1
    message = f"block '{name}': the output for a sample depends on the other samples of the batch"
    assert_refused(message, make_model, (0,) if name == 2 else splits)


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(4), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)])
def test_norms_over_one_sample_or_with_running_statistics_are_measured(norm):
    def make_model() -> nn.Sequential:
        return make_net(nn.Conv2d(1, 4, 3), copy.deepcopy(norm), nn.Flatten(), nn.Linear(36, 3))

    found = measure(make_model, (0, 2), make_toy_samples(shape=(1, 5, 5)))
    assert all(math.isfinite(probe.loss) for probe in found[0])


def compute_probabilities(x: Tensor) -> Tensor:
    """Return bfloat16 probabilities whose sums differ from 1 by more than a thousandth."""
    return torch.stack([torch.full((len(x),), share) for share in (0.3, 0.3, 0.4)], 1).bfloat16() + 0 * x.bfloat16()


@pytest.mark.parametrize(
    ("make_model", "splits", "message"),
    [
        (lambda: Lambda(torch.tanh), (0,), "the model must be an nn.Sequential, .* got Lambda"),
        (lambda: ZeroSequential(nn.Linear(6, 3)), (0,), "the model overrides forward"),
        (
            lambda: make_net_with_block(lambda z: (z, z)),
            (2,),
            r"the encodings of split 2 must be a tensor with 15 rows, but block '1' returns tuple of",
        ),
        (lambda: make_net_with_block(lambda z: z.repeat(2, 1)), (2,), r"the encodings of split 2 .*float64 \(30, 5\)"),
        (
            lambda: make_net_ending_in(nn.Linear(5, 2)),
            (0,),
            r"must return logits, \(15, 3\) or wider .* got .*\(15, 2\)",
        ),
        (lambda: make_net(nn.Linear(6, 3), Lambda(lambda z: {"logits": z})), (0,), "must return logits, .* got dict"),
        (lambda: make_net(nn.Linear(6, 3), nn.Unflatten(1, (3, 1))), (0,), r"must return logits, .*\(15, 3, 1\)"),
        (lambda: make_net(nn.Linear(6, 3), nn.Softmax(1)), (0,), "got probabilities"),
        (
            lambda: make_net(nn.Linear(6, 3), Lambda(compute_probabilities)),
            (0,),
            "got probabilities",
        ),
        (lambda: make_net(nn.Linear(7, 3)), (0,), r"block '0' fails on torch.float64 \(15, 6\) on cpu: .*shapes"),
        (lambda: make_net().float(), (0,), r"block '0' fails on torch.float64 .*dtype"),
        (lambda: make_net().to("meta"), (0,), r"block '0' fails on torch.float64 \(15, 6\) on cpu: .*meta"),
        (make_net, (5,), r"k must lie in 0\.\.4, so that model\[k:\] is not empty, got 5"),
        (make_net, (1.0,), "k must lie in .* got 1.0"),
        (make_net, ("hidden1",), "k must lie in .* got 'hidden1'"),
    ],
)
def test_models_that_cannot_be_measured_are_refused(make_model, splits, message):
    model = make_model()
    cannot_be_made = isinstance(model, Lambda) or next(model.parameters()).device.type == "meta"
    assert_refused(message, make_model, splits, make_other=make_net if cannot_be_made else make_model)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_the_model_itself_is_refused(register):
    model = make_net()
    getattr(model, register)(lambda *of: None)
    assert_refused("the model has a hook, which its slices would not run", model=model)


def test_a_forward_set_on_the_model_itself_is_refused():
    model = make_net()
    model.forward = lambda x: 0 * x
    assert_refused("DIB: the model overrides forward", model=model)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2), (torch.float16, 0.1)])
def test_outputs_that_differ_by_rounding_are_close(dtype, least):
    """The samples are equal: differences between them would allow for larger errors."""
    a = torch.ones(8, 5, dtype=dtype)
    assert checks.are_close(a, a * (1 + torch.finfo(dtype).eps))
    assert not checks.are_close(a, a * (1 + least))


def test_a_tuple_between_splits_is_measured():
    def make_model() -> nn.Sequential:
        rest = nn.LSTM(3, 5, batch_first=True), Lambda(lambda z: z[0][:, -1]), nn.Linear(5, 3)
        return make_net(nn.Unflatten(1, (2, 3)), *rest)

    found = measure(make_model, (0, 1, 3))
    assert all(math.isfinite(probe.loss) for of_split in found.values() for probe in of_split)


def assert_refused_unchanged(make_other, message: str, model: nn.Sequential) -> None:
    """Assert that make_other is refused, and that the model stays as it was."""
    before = copy.deepcopy(model.state_dict())
    assert_refused(message, model=model, make_other=make_other)
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


def test_functions_that_do_not_return_a_newly_initialised_model_are_refused():
    model = make_net(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    made = copy.deepcopy(model)
    norm = copy.deepcopy(model[1])
    for layer in (*made[::3], norm):
        layer.weight.data += 1
    check = partial(assert_refused_unchanged, model=model)
    check(lambda: model, r"must return new tensors, but 0\.weight shares memory with the model")
    check(lambda: made, r"0\.weight shares memory with the network that it returned before")
    check(lambda: make_net(nn.Linear(6, 5), model[1], nn.Tanh(), nn.Linear(5, 3)), r"1\.weight shares memory")
    norm.running_mean = model[1].running_mean
    check(lambda: make_net(nn.Linear(6, 5), norm, nn.Tanh(), nn.Linear(5, 3)), r"1\.running_mean shares memory")
    check(
        lambda: copy.deepcopy(model),
        "must draw its weights from torch's global generators, but two calls return equal weights",
    )
    check(model, "make_model must be a function that returns a newly initialised model, got Sequential")
    check(lambda: None, "what make_model.. returns must be an nn.Sequential, .* got NoneType")
    check(lambda: make_net(*copy.deepcopy(model), nn.ReLU()), "returns 5 blocks, but the model has 4")
    check(
        lambda: make_net(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)),
        r"returns another network: 0\.weight is of shape \(7, 6\), but of shape \(5, 6\) in the model",
    )
    check(
        lambda: make_net(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3, bias=False)),
        r"returns another network: 3\.bias is missing, but of shape \(3,\) in the model",
    )
    check(
        lambda: make_net(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
        "with the same weights, block '2' of the network that make_model.. returns has different outputs",
    )
    check(
        lambda: nn.Sequential(nn.LazyLinear(5), nn.BatchNorm1d(5), nn.Tanh(), nn.LazyLinear(3)),
        r"0\.weight is without a shape",
    )


def test_frozen_layers_and_layers_before_the_first_split_may_be_shared():
    """Training does not change frozen layers, and layers before the first split are not used."""
    backbone, norm = nn.Linear(6, 5).double().requires_grad_(False), nn.BatchNorm1d(5).double()
    assert measure(lambda: make_net(backbone, nn.Tanh(), nn.Linear(5, 3)), (0, 1))
    assert measure(lambda: make_net(backbone, norm, nn.Tanh(), nn.Linear(5, 3)), (2, 3))


def test_a_make_model_that_loads_pretrained_weights_is_measured():
    pretrained = make_net().state_dict()

    def make_model() -> nn.Sequential:
        model = make_net()
        model.load_state_dict(pretrained)
        nn.init.normal_(model[4].weight)
        return model

    assert measure(make_model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y.tolist(), "labels must be an integer tensor .* 90 samples, at least one, got list"),
        (lambda y: y.numpy(), "labels must be an integer tensor .* got ndarray"),
        (lambda y: y.double(), "labels must be an integer tensor .* got torch.float64"),
        (lambda y: F.one_hot(y), r"labels must be an integer tensor .* got torch.int64 \(90, 3\)"),
        (lambda y: y[:, None], r"labels must be an integer tensor .* got torch.int64 \(90, 1\)"),
        (lambda y: y + 1, r"got 1\.\.3"),
    ],
)
def test_labels_that_are_no_integers_of_every_sample_are_refused(change, message):
    samples = make_toy_samples()
    assert_refused(message, samples=UnvalidatedSamples(samples.inputs, change(samples.labels), 90))


def test_labels_of_any_integer_type_are_measured():
    samples, expected = make_toy_samples(), measure()
    for dtype in (torch.uint8, torch.int16, torch.int32):
        given = UnvalidatedSamples(samples.inputs, samples.labels.to(dtype), 90)
        assert measure(samples=given) == expected


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda self, i: self.inputs[i], "must return two tensors .* got torch.float64"),
        (lambda self, i: (self.inputs[i], self.labels[i], i), "must return two tensors .* got tuple of"),
        (lambda self, i: ({"x": self.inputs[i]}, self.labels[i]), "must return two tensors .* got tuple of dict"),
        (
            lambda self, i: (self.inputs, self.labels),
            r"must return two tensors .* got tuple of torch.float64 \(90, 6\)",
        ),
        (
            lambda self, i: (self.inputs[i] + torch.randn(len(i), 1), self.labels[i]),
            "must return the same values",
        ),
        (
            lambda self, i: (self.inputs[i.sort()[0]], self.labels[i.sort()[0]]),
            "must return the same values",
        ),
        (lambda self, i: (self.inputs[i], self.labels[i - 1]), "must return the same values"),
    ],
    ids=["inputs alone", "three", "dict", "all", "drawn", "sorted", "other labels"],
)
def test_batches_that_are_not_the_inputs_and_labels_of_the_indices_are_refused(batch, message):
    samples = make_toy_samples()
    other = type("OtherSamples", (Samples,), {"batch": batch})
    assert_refused(message, samples=other(samples.inputs, samples.labels))


def test_samples_without_batch_or_of_another_length_are_refused():
    x, y = make_toy_samples().inputs, make_toy_samples().labels
    assert_refused(r"samples must have len\(\), labels and batch", samples=torch.utils.data.TensorDataset(x, y))
    assert_refused("for each of the 0 samples, at least one", samples=UnvalidatedSamples(x[:0], y[:0], 0))
    assert_refused("for each of the 50 samples", samples=UnvalidatedSamples(x, y, 50))


def test_no_splits_give_no_results():
    assert measure(splits=()) == {}
