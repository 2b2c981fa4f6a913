"""Set up a run: load the data, build the model, and find the learning rate if --tune is given."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil

import torch
from torch import nn

import data
import models
from layerwise import devices, processes
from layerwise.samples import Samples
from training import hardware, lr_range
from training.configuration import choose_model_options, resolve
from training.flags import Config
from training.optimizers import make_optimizer, make_schedule

# Models of fewer parameters run on one CPU thread. More threads are not faster for them, and much slower if another
# program uses a core. Example (DIB of MLP on SZT, two cores): 0.6 s with one or two threads. With a busy core, 0.6 s
# with one thread and 2 to 30 s with two.
ONE_THREAD_BELOW = 10_000


@dataclass
class Run:
    """The state of a run: its flags, data, model, optimizer and schedule."""

    config: Config  # with every value that this run uses
    device: torch.device
    sets: dict[str, Samples]  # train and test
    dib_sets: dict[str, Samples]  # the samples of each set that DIB uses
    make_model: Callable[[], nn.Sequential]  # returns a newly initialised model
    model: nn.Sequential
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    seconds: dict[str, float] = field(default_factory=dict)  # {phase of an epoch: seconds of the last time}

    @property
    def parts(self) -> dict:
        """The objects whose state_dict is stored in a checkpoint, by name."""
        return {name: getattr(self, name) for name in ("model", "optimizer", "schedule", "scaler")}


@devices.disable_tf32()
def prepare_run(config: Config) -> tuple[Run, list[tuple]]:
    """Return the run for these flags, and the rows of lr_range.csv. No file of a run is written.

    Raises ValueError for flags that cannot be satisfied.
    """
    device = hardware.choose_device(config.device)
    set_deterministic(config.deterministic)
    with processes.wait_for_first_rank(config.download):
        dataset = data.load(config.data, config.data_dir, device, config.download, config.train_size)
    make_model = define_model(config, dataset)
    torch.manual_seed(config.seed)
    model = make_model().to(device)
    if device.type == "cpu" and sum(p.numel() for p in model.parameters()) < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    config = resolve(config, device, dataset, model)
    sets = {"train": dataset.train, "test": dataset.test}
    dib_sets = choose_dib_samples(config, sets)
    tried = []
    if config.tune and not config.resume:
        config, tried = find_learning_rate(config, model, dataset.train)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(config.optimizer, config.optimizer_options, config.learning_rate)(trainable)
    steps = config.epochs * ceil(len(dataset.train) / config.batch_size)
    schedule = make_schedule(config.schedule, optimizer, config.learning_rate, steps)
    scaler = hardware.make_scaler(device, config.precision)
    return Run(config, device, sets, dib_sets, make_model, model, optimizer, schedule, scaler), tried


def set_deterministic(enabled: bool) -> None:
    """Make torch use deterministic algorithms only, or not."""
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # older versions of cuBLAS need it
    torch.use_deterministic_algorithms(enabled)


def define_model(config: Config, dataset: data.Dataset) -> Callable[[], nn.Sequential]:
    """Return the function that returns a newly initialised model."""
    options = choose_model_options(config, dataset)

    def make_model() -> nn.Sequential:
        model = models.build(config.model, dataset.input_shape, dataset.num_classes, **options)
        # channels_last is faster on CUDA and on a CPU. MNISTNet on a CPU takes 0.14 ms per sample instead of 0.22 ms.
        return model.to(memory_format=torch.channels_last)

    return make_model


def choose_dib_samples(config: Config, sets: dict[str, Samples]) -> dict[str, Samples]:
    """Return the samples of each set that DIB uses. Raises ValueError if --dib-size does not fit a set."""
    if not config.dib:
        return {}
    if not config.dib_size:
        return {name: sets[name] for name in config.sets}
    return {
        name: sets[name].choose(config.dib_size, config.num_classes, f"--dib-size of the {config.data} {name} set")
        for name in config.sets
    }


def find_learning_rate(config: Config, model: nn.Module, samples: Samples) -> tuple[Config, list[tuple]]:
    """Return the configuration with the learning rate that the range test finds, and the rows of lr_range.csv."""
    if config.learning_rate:
        raise ValueError(
            f"--learning-rate {config.learning_rate:g} cannot be combined with --tune, which determines it"
        )
    optimizer = make_optimizer(config.optimizer, config.optimizer_options)
    steps = lr_range.run_test(model, samples, optimizer, config.batch_size, config.precision)
    steps = processes.broadcast_object(steps)
    best = lr_range.find_steepest(steps)
    rows = [(i, *step, int(i == best)) for i, step in enumerate(steps)]
    return replace(config, learning_rate=steps[best].learning_rate), rows
