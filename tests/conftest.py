import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none here"))


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the tests are small, and threads that wait for one another spin
