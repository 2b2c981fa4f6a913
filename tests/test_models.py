import pytest
import torch
import torchvision
from torch import nn

import dib
import models
from layerwise.probes import Tuned
from models import cifarnet
from tests.toys import make_clusters

COLOUR, GREY = (3, 32, 32), (1, 28, 28)
CONVOLUTIONAL = [name for name in models.ARCHITECTURES if name != "MLP"]
CASES = [("MLP", (12,)), *((name, shape) for name in models.ARCHITECTURES for shape in (COLOUR, GREY))]


def make_images(shape: tuple[int, ...], n: int = 2) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("MLP", (12,), (12 * 10 + 10) + (10 * 7 + 7) + (7 * 5 + 5) + (5 * 4 + 4) + (4 * 3 + 3) + (3 * 10 + 10)),
        ("MNISTNet", GREY, 215_194),
        ("CIFARNet", COLOUR, 1_971_640),
        ("ResNet", COLOUR, 11_181_642),
        ("ConvNeXt", COLOUR, 27_827_818),
    ],
)
def test_numbers_of_parameters(name, shape, parameters):
    assert sum(p.numel() for p in models.build(name, shape, 10).parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "layers", "splits"),
    [
        ("MLP", [f"hidden{i}" for i in range(1, 6)], [f"hidden{i}" for i in range(1, 6)]),
        ("MNISTNet", ["conv1", "conv2", "hidden1"], ["conv1", "conv2", "hidden1"]),
        ("CIFARNet", ["group1", "group2", "group3", "pool"], ["group1", "group2", "group3"]),
        ("ResNet", [*(f"block{i}" for i in range(1, 9)), "pool"], ["block2", "block4", "block6", "block8"]),
        ("ConvNeXt", [*(f"block{i}" for i in range(1, 19)), "pool"], ["block3", "block6", "block15", "block18"]),
    ],
)
def test_names_of_layers_and_splits(name, layers, splits):
    model = models.build(name, COLOUR, 10)
    assert list(models.layers(model)) == layers
    assert list(models.splits(model)) == ["input", *splits]
    blocks = [block for block, _ in model.named_children()]
    every = models.splits(model, ["input", *blocks[:-1]])
    assert list(every.values()) == list(range(len(blocks)))  # input is 0, and the last block leaves no decoder
    assert all(blocks[k - 1] == block for block, k in every.items() if k)
    with pytest.raises(ValueError, match=r"unknown split 'classifier': expected some of input"):
        models.splits(model, ["classifier"])


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_encoder_and_decoder_are_the_model_and_layers_are_called_once_in_order(name, shape):
    torch.manual_seed(0)
    model, x, called = models.build(name, shape, 10).eval(), make_images(shape), []
    for layer, module in models.layers(model).items():
        module.register_forward_hook(lambda *_, layer=layer: called.append(layer))
    with torch.no_grad():
        out = model(x)
        assert out.shape == (2, 10)
        assert called == list(models.layers(model))
        for k in range(len(model)):
            assert torch.equal(model[k:](model[:k](x)), out)


def test_the_blocks_of_an_mlp():
    model = models.build("MLP", (1, 4, 3), 5, widths=(7, 6), nonlinearity="Tanh")
    assert [name for name, _ in model.named_children()] == ["flatten", "hidden1", "hidden2", "classifier"]
    assert [type(m) for m in model.hidden2] == [nn.Linear, nn.Tanh]
    assert (model.hidden1[0].in_features, model.hidden1[0].out_features) == (12, 7)
    assert isinstance(models.build("MLP", (12,), 2).hidden1[1], nn.ReLU)


def rename_for_resnet(name: str) -> str:
    """Return the name that a parameter of torchvision's ResNet-18 has in ours."""
    top, _, rest = name.partition(".")
    if top.startswith("layer"):
        j, _, rest = rest.partition(".")
        return f"block{2 * (int(top[-1]) - 1) + int(j) + 1}.{rest}"
    return {"conv1": "stem.0.", "bn1": "stem.1.", "fc": "classifier."}[top] + rest


def rename_for_convnext(name: str) -> str:
    """Return the name that a parameter of torchvision's ConvNeXt-T has in ours."""
    top, i, rest = name.split(".", 2)
    if top == "classifier":
        return {"0": "pool.1.", "2": "classifier."}[i] + rest
    if i == "0":
        j, rest = rest.split(".", 1)
        return f"stem.{int(j) + 1}.{rest}"  # after the padding
    if int(i) % 2 == 0:
        return f"down{int(i) // 2}.{rest}"
    j, rest = rest.split(".", 1)
    return f"block{(0, 3, 6, 15)[int(i) // 2] + int(j) + 1}.{rest}"


@pytest.mark.parametrize(
    ("name", "constructor", "rename"),
    [
        ("ResNet", torchvision.models.resnet18, rename_for_resnet),
        ("ConvNeXt", torchvision.models.convnext_tiny, rename_for_convnext),
    ],
)
def test_outputs_equal_those_of_torchvision(name, constructor, rename):
    torch.manual_seed(0)
    theirs, ours = constructor(num_classes=10).eval(), models.build(name, COLOUR, 10).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # LayerScale starts at 1e-6, so blocks would hardly count
            parameter += 0.02 * torch.randn_like(parameter)
        ours.load_state_dict({rename(k): v for k, v in theirs.state_dict().items()})
        assert torch.equal(ours(make_images(COLOUR, 4)), theirs(make_images(COLOUR, 4)))


def test_convnext_pads_28_to_32():
    model, x = models.build("ConvNeXt", GREY, 10).eval(), make_images(GREY)
    padded = nn.functional.pad(x, (2, 2, 2, 2))
    assert torch.equal(model.stem[0](x), padded)
    assert torch.equal(models.build("ConvNeXt", COLOUR, 10).stem[0](make_images(COLOUR)), make_images(COLOUR))


def test_cifarnet_is_that_of_its_source():
    torch.manual_seed(0)
    correlated = nn.functional.avg_pool2d(make_images((3, 33, 33), 50), 2, 1)
    filters = cifarnet.compute_whitening(correlated)
    model = models.build("CIFARNet", COLOUR, 10, whitening=filters)
    assert torch.equal(model.whiten[0].weight, filters)
    assert not model.whiten[0].weight.requires_grad
    assert model.whiten[0].bias.requires_grad
    responses = nn.functional.conv2d(correlated, filters[:12]).movedim(1, 0).flatten(1)  # (12, places)
    covariance = responses @ responses.T / responses.shape[1]
    torch.testing.assert_close(covariance, torch.eye(12), atol=0.02, rtol=0)  # white, except for the 5e-4
    assert torch.equal(filters[12:], -filters[:12])
    first, second = model.group1[0], model.group1[4]
    x = make_images((24, 9, 9))
    assert torch.equal(first(x)[:, :24], x)  # the first filters are the identity
    assert torch.equal(second.weight, nn.init.dirac_(torch.empty_like(second.weight)))
    assert model.classifier[1].weight.std().item() == pytest.approx(1)
    z = make_images((256,))
    assert torch.equal(model.classifier(z[None]), z[None] @ model.classifier[1].weight.T / 256)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 6
    assert all([name for name, _ in norm.named_parameters()] == ["bias"] for norm in norms)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("ResNet", "ConvNeXt"))) for name in models.ARCHITECTURES],
)
def test_probes_have_nothing_of_the_trained_decoder(name, monkeypatch):
    """Every parameter and buffer of the trained model is 7. Those of the probes are as at construction."""
    options = {"whitening": torch.full((8, 1, 2, 2), 0.5)} if name == "CIFARNet" else {}

    def make_model() -> nn.Sequential:
        return models.build(name, GREY, 10, **options)

    model, seen = make_model(), []
    for tensor in (*(p for p in model.parameters() if p.requires_grad), *model.buffers()):
        tensor.data.fill_(7)
    samples = make_clusters(20, 784, 10)
    samples.inputs = samples.inputs.view(20, *GREY)
    monkeypatch.setattr(Tuned, "train", lambda _, group, *rest: seen.extend(group.modules()) or torch.zeros(3))
    monkeypatch.setattr(Tuned, "count_starts", lambda *_: 1)
    monkeypatch.setattr(dib, "compute_network_loss", lambda *_: 1.0)  # not finite for a deep network with weights of 7
    dib.measure(model, 0, samples, 10, make_model)
    assert len(seen) == 3
    for tensor in (*seen[0].parameters(), *seen[0].buffers()):
        assert not (tensor == 7).any()
    drawn = [(a, b) for a, b in zip(seen[0].parameters(), seen[1].parameters(), strict=True) if a.dim() > 1]
    torch.manual_seed(0)
    again = dict(make_model().named_parameters())
    for probe in seen:
        for key, parameter in probe.named_parameters():
            if again[key].unique().numel() == 1:  # constant at construction: LayerScale, norms, biases
                assert torch.equal(parameter, again[key])
    if name == "CIFARNet":
        identity = nn.init.dirac_(torch.empty(256, 256, 3, 3))
        assert all(torch.equal(probe.group3[0].weight, identity) for probe in seen)
        assert all((probe.whiten[0].weight == 0.5).all() for probe in seen)
        drawn = [(probe.group1[0].weight[8:], probe.classifier[1].weight) for probe in seen[:2]]  # not the identity
        drawn = list(zip(*drawn, strict=True))
    assert not any(torch.equal(a, b) for a, b in drawn if a.unique().numel() > 1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("MLPP", {}, "unknown model 'MLPP': expected one of MLP"),
        ("MLP", {"widths": (3, 0)}, "widths must be positive integers, got 3 0"),
        ("MLP", {"widths": ()}, "widths must be positive integers, got none"),
        ("MLP", {"nonlinearity": "Relu"}, "unknown nonlinearity 'Relu': expected one of ReLU, Tanh"),
        *((name, {}, f"{name} requires images .*, got inputs of shape 12: use MLP") for name in CONVOLUTIONAL),
    ],
)
def test_unknown_names_and_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, (12,), 2, **options)
