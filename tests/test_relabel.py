import pytest
import torch

from relabel import relabel


def test_digits_of_an_example_computed_by_hand():
    digits = relabel(torch.tensor([0, 0, 0, 1, 1, 3, 4, 4, 4, 4, 4, 4]), 5)
    assert " ".join(f"{a}{b}" for a, b in digits.tolist()) == "00 01 02 00 01 00 00 01 02 03 04 10"
    assert digits.dtype == torch.int64


@pytest.mark.parametrize(("C", "exponent"), [(10, 3), (3, 5), (5, 3), (2, 12), (7, 4)])
def test_the_number_of_digits_at_exact_powers(C, exponent):
    """math.log(243, 3) and math.log(1000, 10) are not integers in floating point."""
    n = C**exponent
    assert relabel(torch.zeros(n, dtype=torch.int64), C).shape == (n, exponent)
    assert relabel(torch.zeros(n + 1, dtype=torch.int64), C).shape == (n + 1, exponent + 1)


def test_there_is_at_least_one_digit():
    assert relabel(torch.tensor([2, 0]), 3).tolist() == [[0], [0]]
    assert relabel(torch.zeros(0, dtype=torch.int64), 3).shape == (0, 1)


@pytest.mark.parametrize(
    ("labels", "C", "message"),
    [
        (torch.tensor([0, 3]), 3, r"labels must lie in 0\.\.2, got 0\.\.3"),
        (torch.tensor([-1, 1]), 3, r"labels must lie in 0\.\.2, got -1\.\.1"),
        (torch.tensor([[0, 1]]), 3, r"1-D int64, got torch.int64 of shape \(1, 2\)"),
        (torch.tensor([0.0, 1.0]), 3, "1-D int64, got torch.float32"),
        (torch.tensor([0, 0]), 1, "num_classes must be at least 2, got 1"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, C, message):
    with pytest.raises(ValueError, match=message):
        relabel(labels, C)
