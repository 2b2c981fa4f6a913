import pytest
import torch
from torch import nn

import models


def test_mlp_is_named_blocks():
    model = models.build("MLP", (1, 4, 3), 5, widths=(7, 6), nonlinearity="Tanh")
    assert [name for name, _ in model.named_children()] == ["flatten", "hidden1", "hidden2", "classifier"]
    assert list(models.taps(model)) == ["hidden1", "hidden2"]
    assert models.splits(model) == {"input": 0, "hidden1": 2, "hidden2": 3}
    assert [type(m) for m in model.hidden2] == [nn.Linear, nn.Tanh]
    assert sum(p.numel() for p in model.parameters()) == (12 * 7 + 7) + (7 * 6 + 6) + (6 * 5 + 5)


def test_default_widths_are_the_papers():
    model = models.build("MLP", (12,), 2)
    assert [model.get_submodule(f"hidden{i}")[0].out_features for i in range(1, 6)] == [10, 7, 5, 4, 3]
    assert isinstance(model.hidden1[1], nn.ReLU)


def test_encoder_then_decoder_is_the_model():
    model, x = models.build("MLP", (12,), 2), torch.randn(9, 12)
    for k in models.splits(model).values():
        assert torch.equal(model[k:](model[:k](x)), model(x))


def test_every_tap_fires_once_and_in_order():
    model, fired = models.build("MLP", (12,), 2), []
    for name, module in models.taps(model).items():
        module.register_forward_hook(lambda *_, name=name: fired.append(name))
    model(torch.randn(2, 12))
    assert fired == [f"hidden{i}" for i in range(1, 6)]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("MLPP", {}, "unknown model 'MLPP': expected one of MLP"),
        ("MLP", {"widths": (3, 0)}, "widths must be positive integers, got 3 0"),
        ("MLP", {"widths": ()}, "widths must be positive integers, got none"),
        ("MLP", {"nonlinearity": "Relu"}, "unknown nonlinearity 'Relu': expected one of ReLU, Tanh"),
    ],
)
def test_refuses(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, (12,), 2, **options)
