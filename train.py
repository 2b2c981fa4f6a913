"""Train a network, and measure it before training and after every epoch.

    python train.py --model MLP --data SZT        (python train.py --help lists every flag)

Loss and accuracy are measured in every epoch. So are NC1 (nc1.py) of the layers and DIB (dib.py) of the encoder/decoder
splits, unless the flags select epochs, sets or splits. The results are written to CSV files in the run's folder.
analysis/plots.py draws them.
"""

import copy
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import product
from math import ceil, isfinite
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dib
import models
import nc1
from layerwise import devices, probes, processes, runs, schema
from layerwise.samples import Samples
from layerwise.streams import make_seed
from training import checkpoint, configuration, setup
from training.flags import Config, make_parser
from training.hardware import make_autocast
from training.optimizers import make_optimizer
from training.setup import Run
from training.terminal import ExitMessages, quote_for_make, report_errors, set_up_terminal

Row = tuple[str, str, dib.ProbeResult]  # set, split, result


@devices.disable_tf32()
def train(run: Run, done: int) -> None:
    """Train and measure from epoch done + 1 on. In epoch 0 the model is only measured, before training."""
    last, timer = run.config.epochs, partial(time_phase, run)
    replace_missing_noise(run, done)
    with prepare_forward(run) as forward:
        for epoch in show_bar(range(done + 1, last + 1), desc="epochs", initial=done + 1, total=last + 1):
            if epoch > 0:
                with timer("train"):
                    train_epoch(run, forward, epoch)
            with timer("evaluation"):
                scores = evaluate(run, epoch)
            with timer("NC1"):
                collapse = measure_nc1(run, epoch)
            with timer("DIB"):
                results = measure_dib(run, epoch)
                noise = measure_noise(run, epoch)
            if processes.get_rank() == 0:
                save_epoch(run, epoch, scores, collapse, results, noise)
                print_epoch(run, epoch, scores, collapse, results)


@contextmanager
def time_phase(run: Run, phase: str) -> Iterator[None]:
    """Store the seconds that the body takes, with the work of the device, in run.seconds[phase]."""
    start = read_clock(run.device)
    yield
    run.seconds[phase] = read_clock(run.device) - start


def read_clock(device: torch.device) -> float:
    """Return the current time in seconds, after the device has finished its work."""
    synchronise(device)
    return time.perf_counter()


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def prepare_forward(run: Run) -> Iterator[nn.Module]:
    """Yield the module for the forward pass of training: the model, compiled with --compile, and distributed.

    It has the weights of run.model. NC1 and DIB use run.model: forward hooks do not work on a compiled module.
    """
    forward, recompile_limit = run.model, nullcontext()
    if run.config.compile:
        torch.compiler.reset()  # start counting recompilations at 0
        recompile_limit = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)  # no eager fallback
        forward = torch.compile(forward, dynamic=False)
    if processes.get_world_size() > 1:
        # DistributedDataParallel wraps the compiled model, whose graph then breaks at each bucket of gradients. If
        # DistributedDataParallel were compiled itself, almost nothing would be compiled.
        forward = nn.parallel.DistributedDataParallel(forward)
    with recompile_limit:
        yield forward


def train_epoch(run: Run, forward: nn.Module, epoch: int) -> None:
    """Train for one pass over the training set. Raises FloatingPointError for a step whose loss is not finite."""
    config, samples, device = run.config, run.sets["train"], run.device
    rank, world_size = processes.get_rank(), processes.get_world_size()
    autocast = make_autocast(device, config.precision)
    run.model.train()
    order = torch.randperm(len(samples)).to(device, non_blocking=True)
    processes.broadcast(order)
    if rank > 0:  # dropout must differ between processes, which train on different parts of a batch
        torch.manual_seed(make_seed("rank", config.seed, epoch, rank))
    # batch sizes differ by at most 1, because BatchNorm cannot train on a batch of one sample
    batches = order.tensor_split(ceil(len(order) / config.batch_size))
    finite = torch.ones(len(batches), dtype=torch.bool, pin_memory=device.type == "cuda")
    for step, indices in enumerate(show_bar(batches, desc="training", delay=1)):
        own = indices.tensor_split(world_size)[rank]
        x, y = samples.batch(own)
        with autocast():
            # gradients are averaged over the processes, whose parts of the batch may differ by one sample
            loss = F.cross_entropy(forward(x), y) * (len(own) * world_size / len(indices))
        finite[step].copy_(loss.detach().isfinite(), non_blocking=True)  # on CUDA it is valid some steps later
        validate_losses(finite, epoch, config.learning_rate)
        run.optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.schedule.step()
    processes.broadcast(*run.model.buffers())  # the BatchNorm statistics differ between processes
    synchronise(device)  # after this all of `finite` is valid
    validate_losses(finite, epoch, config.learning_rate)


def evaluate(run: Run, epoch: int) -> dict[str, tuple[float, float]]:
    """Return {set: (loss, accuracy)}, and leave the model in eval mode.

    Raises FloatingPointError if the loss on the training set is not finite.
    """
    run.model.eval()
    scores = {name: compute_score(run.model, samples, run.config.batch_size) for name, samples in run.sets.items()}
    if not isfinite(scores["train"][0]):
        raise FloatingPointError(
            f"the training loss is not finite after the last step of epoch {epoch}, "
            f"at learning rate {run.config.learning_rate:g}"
        )
    return scores


@torch.no_grad()
def compute_score(model: nn.Module, samples: Samples, batch_size: int) -> tuple[float, float]:
    """Return the mean cross-entropy (nats) and the accuracy of a model in eval mode."""
    loss = torch.zeros((), dtype=torch.float64, device=samples.labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=samples.labels.device)
    for indices in processes.take_share(torch.arange(len(samples), device=samples.labels.device).split(batch_size)):
        x, y = samples.batch(indices)
        logits = model(x)
        loss += F.cross_entropy(logits, y, reduction="sum")
        correct += (logits.argmax(1) == y).sum()
    processes.all_reduce_sum(loss, correct)
    return loss.item() / len(samples), correct.item() / len(samples)


def measure_nc1(run: Run, epoch: int) -> dict[str, dict[str, nc1.Collapse]]:
    """Return {set: {layer: NC1}}, with the layers in order of depth. The dict is empty in epochs without measurement.

    `input` is the input of the model. It does not change, and is measured only in the first measured epoch.
    """
    config, inputs, found = run.config, nn.Identity(), {}
    if not config.nc1 or not configuration.is_measured(config.measure, epoch, config.epochs):
        return found
    networks = [(run.model, models.layers(run.model))]
    if epoch == configuration.get_first_measured(config.measure):
        networks.insert(0, (inputs, {"input": inputs}))
    for name in config.sets:
        found[name] = {}
        for network, layers in networks:
            measure = partial(nc1.measure, network, layers, run.sets[name], config.num_classes)
            cache_bytes = devices.choose_cache_bytes(run.device)
            found[name] |= measure_with_retry(f"NC1 of the {name} set", measure, config.batch_size, cache_bytes)
    return found


def choose_splits(config: Config, epoch: int) -> list[str]:
    """Return the names of the splits for which DIB is measured in this epoch.

    `input` has no encoder, and its encodings do not change. It is measured only in the first measured epoch.
    """
    if not config.dib or not configuration.is_measured(config.measure_dib, epoch, config.epochs):
        return []
    is_first = epoch == configuration.get_first_measured(config.measure_dib)
    return [name for name in config.splits if name != "input" or is_first]


def measure_dib(run: Run, epoch: int, splits: list[str] | None = None, factor: int = 1) -> list[Row]:
    """Return (set, split, result) of every probe.

    splits: the names of the splits (default: choose_splits). factor: multiplies the number of steps of the probes.
    """
    config, rows = run.config, []
    if splits is None:
        splits = choose_splits(config, epoch)
    if not splits:
        return rows
    if config.probes == "thesis":
        optimizer = make_optimizer(config.optimizer, config.optimizer_options, config.learning_rate)
        kind = dib.Thesis(optimizer, factor * config.dib_epochs, config.precision == "bfloat16")
        batch_size = config.batch_size
    else:
        kind = dib.Tuned(factor * count_dib_steps(config, "train"), config.dib_lr)
        batch_size = probes.BATCH_SIZE
    names = {k: name for name, k in models.splits(run.model, splits).items()}
    options = {"probes": kind, "enumerations": config.enumerations, "controls": config.controls}
    options |= {"seed": config.seed, "epoch": epoch}
    for name in config.sets:
        samples, held_out = run.dib_sets[name], run.dib_sets.get("test") if name == "train" else None
        measure = partial(dib.measure_splits, run.model, names, samples, config.num_classes, run.make_model, **options)
        measure = partial(measure, held_out=held_out)
        cache_bytes = devices.choose_cache_bytes(run.device)
        results = measure_with_retry(f"DIB of the {name} set", measure, batch_size, cache_bytes)
        for k, of_split in results.items():
            rows += [("test" if row.labeling == schema.HELD_OUT else name, names[k], row) for row in of_split]
    order = list(names.values())
    return sorted(rows, key=lambda row: (row[0] == "test", order.index(row[1]), row[2].labeling == schema.HELD_OUT))


def measure_noise(run: Run, epoch: int) -> list[Row]:
    """Return (set, split, result) of linear probes on Gaussian features, in the first epoch in which DIB is measured.

    For each linear split they have as many features and samples as its probes. Their results show what linear probes
    find in features that are unrelated to the samples.
    """
    config, rows = run.config, []
    is_first = epoch == configuration.get_first_measured(config.measure_dib)
    if config.dib and config.controls and is_first:
        for name, (split, k) in product(config.sets, models.splits(run.model, config.linear_splits).items()):
            generator = torch.Generator().manual_seed(make_seed("noise", config.seed, name, split))
            results = fit_noise(list(run.model[k:].modules())[-1], run.dib_sets[name].labels, generator, config)
            rows += [(name, split, result) for result in results]
    return rows


def replace_missing_noise(run: Run, done: int) -> None:
    """Write noise.csv again if it is missing from a resumed run. It depends on the flags, not on the network."""
    first, path = configuration.get_first_measured(run.config.measure_dib), Path(run.config.run_dir) / "noise.csv"
    if done >= first and not processes.broadcast_object(path.exists()):
        noise = measure_noise(run, first)
        if noise and processes.get_rank() == 0:
            write_noise(path.parent, noise)


def write_noise(folder: Path, noise: list[Row]) -> None:
    """Write noise.csv."""
    runs.write_table(folder / "noise.csv", schema.NOISE, [(name, split, *result) for name, split, result in noise])


def fit_noise(layer: nn.Linear, labels: Tensor, generator: torch.Generator, config: Config) -> list[dib.ProbeResult]:
    """Return the results of probes like the linear layer, on Gaussian features with these labels (N,)."""

    def make_model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(layer.in_features, layer.out_features, layer.bias is not None))

    samples = Samples(torch.randn(len(labels), layer.in_features, generator=generator).to(labels.device), labels)
    options = {"enumerations": config.enumerations, "seed": config.seed}
    return dib.measure(nn.Sequential(copy.deepcopy(layer)), 0, samples, config.num_classes, make_model, **options)


def count_dib_steps(config: Config, name: str) -> int:
    """Return the number of steps of the probes on a set.

    Tuned probes have the same number of steps on both sets, so that the sets can be compared.
    """
    if config.probes == "thesis":
        return config.dib_epochs * ceil(config.dib_samples[name] / config.batch_size)
    return probes.count_steps(config.dib_epochs, config.dib_samples["train"])


def save_epoch(run: Run, epoch: int, scores: dict, collapse: dict, results: list[Row], noise: list[Row]) -> None:
    """Append the rows of the epoch to the tables, write noise.csv if it was measured, and replace the checkpoint.

    With --save-weights, the weights of a measured epoch are written as well. An epoch is finished when the checkpoint
    is written. --resume removes the rows and the weights of epochs that were not finished.
    """
    seconds = {"train": run.seconds.get("train", 0.0), "test": run.seconds["evaluation"]}  # `seconds` of epochs.csv
    rows = {
        "nc1.csv": [(epoch, name, layer, *value) for name in collapse for layer, value in collapse[name].items()],
        "dib.csv": [(epoch, name, split, *result) for name, split, result in results],
        "epochs.csv": [(epoch, name, *scores[name], round(seconds[name], 4)) for name in scores],
    }
    folder = Path(run.config.run_dir)
    if noise:
        write_noise(folder, noise)
    runs.append_rows(folder, rows)
    if run.config.save_weights and (collapse or results):
        checkpoint.save_weights(folder, epoch, run.model)
    checkpoint.save(folder, epoch, configuration.collect_hparams(run.config), run.device, run.parts)


def print_epoch(run: Run, epoch: int, scores: dict, collapse: dict, results: list[Row]) -> None:
    """Print the line of an epoch. Values of the test set are in parentheses, NC1 is that of the deepest layer."""
    (train_loss, train_accuracy), (test_loss, test_accuracy) = scores["train"], scores["test"]
    line = [f"epoch {epoch}/{run.config.epochs}"]
    line.append(f"loss {train_loss:.4f} ({test_loss:.4f})")
    line.append(f"accuracy {train_accuracy:.2%} ({test_accuracy:.2%})")
    for name, values in collapse.items():
        layer, deepest = list(values.items())[-1]
        line.append(f"NC1 {name} {layer} {deepest.nc1:.4g} (rank {deepest.rank})")
    if results:
        shares = []
        for name in run.config.sets:
            share = dib.compute_suboptimal_share(result for of, _, result in results if of == name)
            shares.append(f"{name} {share:.1%}")
        line.append(f"probes known suboptimal {', '.join(shares)}")
        line += describe_linear_probes(run, results)
    line.append(", ".join(f"{phase} {run.seconds.get(phase, 0):.1f} s" for phase in ("train", "NC1", "DIB")))
    tqdm.write("  ".join(line))
    sys.stdout.flush()


def describe_linear_probes(run: Run, results: list[Row]) -> list[str]:
    """Return the part of an epoch's line about the linear probes, in a list that is empty if there are none."""
    linear = [row for _, split, row in results if split in run.config.linear_splits and row.labeling != schema.HELD_OUT]
    gaps = [row.loss - row.lower for row in linear]
    if not gaps:
        return []
    unproved = sum(not gap <= schema.PROVED for gap in gaps)  # `not <=`, so that NaN counts
    return [f"linear probes within {max(gaps):.1g} nats, {unproved} of {len(gaps)} not proved"]


def validate_losses(finite: Tensor, epoch: int, learning_rate: float) -> None:
    """Raise FloatingPointError if the loss of a step is not finite. finite: (steps,), True for later steps."""
    if not finite.all():
        step = 1 + int(finite.int().argmin())
        raise FloatingPointError(
            f"the training loss is not finite in epoch {epoch}, step {step} of {len(finite)}, "
            f"at learning rate {learning_rate:g}"
        )


def measure_with_retry(what: str, measure: Callable, batch_size: int, cache_bytes: int) -> dict:
    """Call measure(batch_size=..., cache_bytes=...). If memory runs out, halve the batch size and cache nothing.

    With several processes the error is raised, because the other processes would wait forever.
    """
    try:
        return measure(batch_size=batch_size, cache_bytes=cache_bytes)
    except RuntimeError as error:
        if not devices.is_out_of_memory(error) or processes.get_world_size() > 1:
            raise
    torch.cuda.empty_cache()  # after the except clause: the error holds references to the tensors of the pass
    half = max(1, batch_size // 2)
    tqdm.write(f"{what}: out of memory; repeating it with batch size {half} instead of {batch_size}, without a cache")
    return measure(batch_size=half, cache_bytes=0)


def show_bar(things: Iterable, **options) -> Iterable:
    """Iterate with a progress bar, which only the first process shows, and only on a terminal."""
    return tqdm(things, leave=False, disable=True if processes.get_rank() else None, **options)


def main(arguments: list[str] | None = None) -> None:
    config = configuration.parse(arguments)
    folder, state = configuration.choose_run_folder(config), None
    saved = f"finished epochs are saved in {folder}"
    messages = ExitMessages(saved, "to continue, repeat the command with --resume")
    with report_errors(make_parser(), messages), ExitStack() as stack:
        processes.join_group()
        is_first = processes.get_rank() == 0  # the only process that writes
        with processes.raise_on_all_ranks():  # errors in this block are raised before any file is written
            if config.resume:
                if is_first:
                    stack.enter_context(runs.lock(folder))
                state = checkpoint.load(folder)
                config = configuration.adopt_recorded(arguments, folder, state["hparams"])
            elif is_first:
                checkpoint.refuse_existing(folder)
            run, tried = setup.prepare_run(config)
            if state:
                checkpoint.restore(folder, state, run.device, run.parts)
        with processes.raise_on_all_ranks():
            hparams = configuration.collect_hparams(run.config)
            if state and is_first:
                checkpoint.discard_unfinished_epoch(folder, state, hparams, run.device, run.parts)
            elif is_first:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(runs.lock(folder))
                checkpoint.refuse_existing(folder)  # another process may have written a run before the lock
                checkpoint.create_run_files(folder, hparams, run.device, run.parts, tried)
        if is_first:
            print_notices(run, state, tried)
        messages.running = True
        if config.tune != "only":
            train(run, state["epoch"] if state else checkpoint.BEGUN)
        if is_first:
            print(f"done: the run is in {folder}; to draw it: make plots RUN={quote_for_make(folder)}")
        processes.leave_group()


def print_notices(run: Run, state: dict | None, tried: list[tuple]) -> None:
    """Print the learning rate of the range test, and a change of device."""
    config = run.config
    if tried:
        tqdm.write(f"learning rate {config.learning_rate:.3g}, by the range test: {config.run_dir}/lr_range.csv")
    if state and state["hparams"]["device"] != config.device:
        before = state["hparams"]["device"]
        tqdm.write(f"the run continues on {config.device} instead of {before}: the last digits of results may differ")


if __name__ == "__main__":
    set_up_terminal()
    main()
