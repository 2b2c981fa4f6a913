"""Train a network. Before training and after every epoch, measure loss and accuracy, NC1 of every layer, and DIB of
every encoder/decoder split.

    python train.py --model MLP --data SZT        (python train.py --help lists every flag)

The results are written to tables in the run's folder, which analysis/plots.py draws.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, wraps
from math import ceil, isfinite
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import dib
import models
import nc1
from layerwise import devices, probes, processes, runs
from layerwise.samples import Samples
from training import checkpoint, configuration, lr_range
from training.terminal import Progress, catch_signals, quote_for_make, report_errors

# Models of fewer parameters run on one CPU thread. More threads save no time there, and lose much while another program
# uses a core (DIB of MLP on SZT, two cores: 0.6 s with one or two threads; beside a busy program 0.6 s and 2 to 30 s).
ONE_THREAD_BELOW = 10_000


@dataclass
class Run:
    """What the parts of an epoch work with."""

    args: argparse.Namespace  # the flags, each with the value that this run uses
    device: torch.device
    num_classes: int
    sets: dict[str, Samples]  # train and test
    dib_sets: dict[str, Samples]  # those of their samples that DIB measures
    make_model: Callable[[], nn.Sequential]  # builds the model as at construction
    model: nn.Sequential
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    seconds: dict[str, float] = field(default_factory=dict)  # {part: seconds of its last call}

    @property
    def parts(self) -> dict:
        """Return what a checkpoint stores the state of."""
        return {name: getattr(self, name) for name in ("model", "optimizer", "schedule", "scaler")}


def read_clock(device: torch.device) -> float:
    """Return the time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_seconds(part: str) -> Callable:
    """Decorate a function of a run: run.seconds[part] is the time that its last call took."""

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def measured(run: Run, *rest):
            start = read_clock(run.device)
            result = function(run, *rest)
            run.seconds[part] = read_clock(run.device) - start
            return result

        return measured

    return decorate


@devices.disable_tf32()
def train(run: Run, done: int) -> None:
    """Run the epochs after epoch `done`. Epoch 0 is the model before training, and is only measured."""
    last = run.args.epochs
    with prepare_forward(run) as forward:
        for epoch in show_bar(range(done + 1, last + 1), desc="epochs", initial=done + 1, total=last + 1):
            if epoch > 0:
                train_epoch(run, forward, epoch)
            scores = evaluate(run, epoch)
            collapse = measure_nc1(run, epoch)
            results = measure_dib(run, epoch)
            save(run, epoch, scores, collapse, results)


@contextmanager
def prepare_forward(run: Run) -> Iterator[nn.Module]:
    """Yield the module that training calls: the model, compiled and distributed over processes if asked for.

    It has the weights of run.model. The measures use run.model itself, on which hooks work.
    """
    forward, recompile_limit = run.model, nullcontext()
    if run.args.compile:
        torch._dynamo.reset()  # earlier runs of this process do not count towards the limit
        recompile_limit = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)  # else it runs uncompiled
        forward = torch.compile(forward, dynamic=False)
    if processes.get_world_size() > 1:
        # DistributedDataParallel goes around the compiled model: the other way round, the compiler gets almost no
        # operations. The price is that the graph is split where a bucket of gradients ends.
        forward = nn.parallel.DistributedDataParallel(forward)
    with recompile_limit:
        yield forward


@measure_seconds("train")
def train_epoch(run: Run, forward: nn.Module, epoch: int) -> None:
    """Train for one pass over the training set. Raises FloatingPointError for a step whose loss is not finite."""
    args, samples, device = run.args, run.sets["train"], run.device
    autocast, _ = make_precision(device, args.precision)
    run.model.train()
    order = torch.randperm(len(samples)).to(device, non_blocking=True)
    processes.broadcast(order)
    if processes.get_rank() > 0:  # random layers draw other numbers for each share of a batch
        torch.manual_seed(hash((args.seed, epoch, processes.get_rank())))
    # batches of equal size, up to one sample: BatchNorm cannot train on a last batch of one sample
    batches = order.tensor_split(ceil(len(order) / args.batch_size))
    finite = torch.ones(len(batches), dtype=torch.bool, pin_memory=device.type == "cuda")
    for step, indices in enumerate(show_bar(batches, desc="training", delay=1)):
        own = indices.tensor_split(processes.get_world_size())[processes.get_rank()]
        x, y = samples.batch(own)
        with autocast():
            # gradients are averaged over the processes, whose shares of the batch may differ by one sample
            loss = F.cross_entropy(forward(x), y) * (len(own) * processes.get_world_size() / len(indices))
        finite[step].copy_(loss.detach().isfinite(), non_blocking=True)  # from CUDA it arrives some steps later
        refuse_infinite(finite, epoch, args.learning_rate)
        run.optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.schedule.step()
    processes.broadcast(*run.model.buffers())  # BatchNorm statistics, which each process has of its own samples
    read_clock(device)  # waits until all of `finite` has arrived
    refuse_infinite(finite, epoch, args.learning_rate)


@measure_seconds("evaluation")
def evaluate(run: Run, epoch: int) -> dict[str, tuple[float, float]]:
    """Return {set: (loss, accuracy)}, and leave the model in eval mode.

    Raises FloatingPointError if the loss on the training set is not finite.
    """
    run.model.eval()
    scores = {name: compute_score(run.model, samples, run.args.batch_size) for name, samples in run.sets.items()}
    if not isfinite(scores["train"][0]):
        raise FloatingPointError(
            f"the training loss is not finite after the last step of epoch {epoch}, "
            f"at learning rate {run.args.learning_rate:g}"
        )
    return scores


@torch.no_grad()
def compute_score(model: nn.Module, samples: Samples, batch_size: int) -> tuple[float, float]:
    """Return the mean cross-entropy in nats and the share of correctly classified samples, of a model in eval mode."""
    loss = torch.zeros((), dtype=torch.float64, device=samples.labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=samples.labels.device)
    for indices in processes.take_share(torch.arange(len(samples), device=samples.labels.device).split(batch_size)):
        x, y = samples.batch(indices)
        logits = model(x)
        loss += F.cross_entropy(logits, y, reduction="sum")
        correct += (logits.argmax(1) == y).sum()
    processes.all_reduce_sum(loss, correct)
    return loss.item() / len(samples), correct.item() / len(samples)


@measure_seconds("NC1")
def measure_nc1(run: Run, epoch: int) -> dict[str, dict[str, nc1.Collapse]]:
    """Return {set: {layer: NC1}}, layers in order of depth; nothing in an epoch without measurement.

    The input does not change. It is measured in the first measured epoch alone.
    """
    args, inputs, found = run.args, nn.Identity(), {}
    if not args.nc1 or not configuration.is_measured(args.measure, epoch, args.epochs):
        return found
    networks = [(run.model, models.layers(run.model))]
    if epoch == configuration.get_first_measured(args.measure):
        networks.insert(0, (inputs, {"input": inputs}))
    for name in args.sets:
        found[name] = {}
        for network, layers in networks:
            measure = partial(nc1.measure, network, layers, run.sets[name], run.num_classes)
            cache_bytes = devices.choose_cache_bytes(run.device)
            found[name] |= retry_in_less_memory(f"NC1 of the {name} set", measure, args.batch_size, cache_bytes)
    return found


def choose_splits(args: argparse.Namespace, epoch: int) -> list[str]:
    """Return the splits that DIB measures in an epoch.

    The split without encoder, `input`, does not change. It is measured in the first measured epoch alone.
    """
    if not args.dib or not configuration.is_measured(args.measure_dib, epoch, args.epochs):
        return []
    is_first = epoch == configuration.get_first_measured(args.measure_dib)
    return [name for name in args.splits if name != "input" or is_first]


@measure_seconds("DIB")
def measure_dib(
    run: Run, epoch: int, splits: list[str] | None = None, factor: int = 1
) -> list[tuple[str, str, dib.ProbeResult]]:
    """Return (set, split, result) of every probe.

    splits: by default those of the epoch. factor: multiplies the steps of the flags.
    """
    args, rows = run.args, []
    if splits is None:
        splits = choose_splits(args, epoch)
    if not splits:
        return rows
    if args.probes == "thesis":
        optimizer = configuration.make_optimizer(args)
        kind = dib.Thesis(optimizer, factor * args.dib_epochs, args.precision == "bfloat16")
        batch_size = args.batch_size
    else:
        kind, batch_size = dib.Tuned(factor * count_dib_steps(args, "train"), args.dib_lr), probes.BATCH_SIZE
    names = {k: name for name, k in models.splits(run.model, splits).items()}
    options = {"probes": kind, "labelings": args.labelings, "seed": args.seed, "epoch": epoch}
    for name in args.sets:
        samples = run.dib_sets[name]
        measure = partial(dib.measure_splits, run.model, names, samples, run.num_classes, run.make_model, **options)
        cache_bytes = devices.choose_cache_bytes(run.device)
        results = retry_in_less_memory(f"DIB of the {name} set", measure, batch_size, cache_bytes)
        rows += [(name, names[k], result) for k, of_split in results.items() for result in of_split]
    return rows


def count_dib_steps(args: argparse.Namespace, name: str) -> int:
    """Return the number of steps of the probes on a set.

    Tuned probes take the steps of the training set on both sets: sets compare only at equal steps.
    """
    if args.probes == "thesis":
        return args.dib_epochs * ceil(args.dib_samples[name] / args.batch_size)
    return probes.count_steps(args.dib_epochs, args.dib_samples["train"])


def save(run: Run, epoch: int, scores: dict, collapse: dict, results: list[tuple[str, str, dib.ProbeResult]]) -> None:
    """Append the rows of the epoch to the tables, replace the checkpoint, and print a line.

    The epoch is finished once the checkpoint is replaced: --resume removes rows of later epochs.
    """
    if processes.get_rank() > 0:
        return
    seconds = {"train": run.seconds.get("train", 0.0), "test": run.seconds["evaluation"]}
    rows = {
        "nc1.csv": [(epoch, name, layer, *value) for name in collapse for layer, value in collapse[name].items()],
        "dib.csv": [(epoch, name, split, *result) for name, split, result in results],
        "epochs.csv": [(epoch, name, *scores[name], round(seconds[name], 4)) for name in scores],
    }
    runs.append_rows(Path(run.args.run_dir), rows)
    checkpoint.save(Path(run.args.run_dir), epoch, configuration.collect_hparams(run.args), run.device, run.parts)
    suboptimal = {}
    if results:
        for name in run.args.sets:
            suboptimal[name] = dib.compute_suboptimal_share(result for of, _, result in results if of == name)
    tqdm.write(summarise(f"{epoch}/{run.args.epochs}", scores, collapse, suboptimal, run.seconds))
    sys.stdout.flush()


def summarise(epoch: str, scores: dict, collapse: dict, suboptimal: dict, seconds: dict[str, float]) -> str:
    """Return the line of an epoch. Values of the test set are in brackets.

    It has loss and accuracy, NC1 of the deepest layer, the share of probes known suboptimal, and the seconds.
    """
    (train_loss, train_accuracy), (test_loss, test_accuracy) = scores["train"], scores["test"]
    parts = [f"loss {train_loss:.4f} ({test_loss:.4f})  accuracy {train_accuracy:.2%} ({test_accuracy:.2%})"]
    for name, values in collapse.items():
        layer, deepest = list(values.items())[-1]
        parts.append(f"NC1 {name} {layer} {deepest.nc1:.4g} (rank {deepest.rank})")
    if suboptimal:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in suboptimal.items())
        parts.append(f"probes known suboptimal {shares}")
    parts.append(", ".join(f"{part} {seconds.get(part, 0):.1f} s" for part in ("train", "NC1", "DIB")))
    return f"epoch {epoch}  " + "  ".join(parts)


def refuse_infinite(finite: torch.Tensor, epoch: int, learning_rate: float) -> None:
    """Raise FloatingPointError for the first step whose loss is known not to be finite."""
    if not finite.all():
        step = 1 + int(finite.int().argmin())
        raise FloatingPointError(
            f"the training loss is not finite in epoch {epoch}, step {step} of {len(finite)}, "
            f"at learning rate {learning_rate:g}"
        )


def retry_in_less_memory(what: str, measure: Callable, batch_size: int, cache_bytes: int) -> dict:
    """Call the measure. If memory runs out, print a line and call it with half the batch size and nothing cached.

    With several processes the error is raised: the other processes wait in the middle of a pass.
    """
    try:
        return measure(batch_size=batch_size, cache_bytes=cache_bytes)
    except RuntimeError as error:
        if not devices.is_out_of_memory(error) or processes.get_world_size() > 1:
            raise
    torch.cuda.empty_cache()  # after the except clause: the error holds references to the tensors of the pass
    half = max(1, batch_size // 2)
    tqdm.write(f"{what}: out of memory; called again with batches of {half}, not {batch_size}, and nothing cached")
    return measure(batch_size=half, cache_bytes=0)


def show_bar(things: Iterable, **options) -> Iterable:
    """Iterate with a progress bar. Only the first process shows it, and only on a terminal."""
    return tqdm(things, leave=False, disable=True if processes.get_rank() else None, **options)


def make_precision(device: torch.device, precision: str) -> tuple[Callable, torch.amp.GradScaler]:
    """Return the context of a forward pass and the scaler of its loss."""
    dtype = configuration.PRECISIONS[precision]
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # only float16 can underflow


@devices.disable_tf32()
def prepare(args: argparse.Namespace) -> tuple[Run, list[tuple]]:
    """Return the run that the flags describe, and the rows of lr_range.csv. Nothing is written.

    args gets the value of every flag. Raises ValueError for flags that cannot be satisfied.
    """
    device = configuration.choose_device(args.device)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # older versions of cuBLAS need it
    torch.use_deterministic_algorithms(args.deterministic)
    with processes.wait_for_first_rank(args.download):
        dataset = data.load(args.data, args.data_dir, device, args.download, args.train_size)
    options = configuration.choose_model_options(args, dataset)

    def make_model() -> nn.Sequential:
        model = models.build(args.model, dataset.input_shape, dataset.num_classes, **options)
        # convolutions run faster with channels last, on CUDA and on a CPU (MNISTNet there: 0.14 ms a sample, not 0.22)
        return model.to(memory_format=torch.channels_last)

    torch.manual_seed(args.seed)
    model = make_model().to(device)
    if device.type == "cpu" and sum(p.numel() for p in model.parameters()) < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    configuration.fill_in(args, device, dataset, model)
    sets = {"train": dataset.train, "test": dataset.test}
    dib_sets = {name: sets[name] for name in args.sets if args.dib}
    if args.dib_size:
        for name, samples in dib_sets.items():
            what = f"--dib-size of the {args.data} {name} set"
            dib_sets[name] = samples.choose(args.dib_size, dataset.num_classes, what)
    tried = find_learning_rate(args, device, model, dataset.train) if args.tune and not args.resume else []
    optimizer = configuration.make_optimizer(args)([p for p in model.parameters() if p.requires_grad])
    steps = args.epochs * ceil(len(dataset.train) / args.batch_size)
    schedule = configuration.make_schedule(args, optimizer, steps)
    _, scaler = make_precision(device, args.precision)
    run = Run(args, device, dataset.num_classes, sets, dib_sets, make_model, model, optimizer, schedule, scaler)
    return run, tried


def find_learning_rate(
    args: argparse.Namespace, device: torch.device, model: nn.Module, samples: Samples
) -> list[tuple]:
    """Return the rows of lr_range.csv. args gets the learning rate that the range test finds."""
    if args.learning_rate:
        raise ValueError(f"--tune finds the learning rate: expected no --learning-rate, got {args.learning_rate:g}")
    precision = make_precision(device, args.precision)
    steps = lr_range.run_test(model, samples, configuration.make_optimizer(args), args.batch_size, *precision)
    steps = processes.broadcast_object(steps)
    best = lr_range.find_steepest(steps)
    args.learning_rate = steps[best].learning_rate
    return [(i, *step, int(i == best)) for i, step in enumerate(steps)]


def main(arguments: list[str] | None = None) -> None:
    args = configuration.parse(arguments)
    folder, state = configuration.choose_run_folder(args), None
    progress = Progress(f"finished epochs are in {folder}", "and the same command with --resume continues from them")
    with report_errors(configuration.make_parser(), progress), ExitStack() as stack:
        processes.join_group()
        is_first = processes.get_rank() == 0  # the only process that writes
        with processes.raise_on_all_ranks():  # what is refused here leaves no file behind
            if args.resume:
                if is_first:
                    stack.enter_context(runs.lock(folder))
                state = checkpoint.load(folder)
                args = configuration.adopt(arguments, folder, state["hparams"])
            elif is_first:
                runs.refuse_existing(folder)
            run, tried = prepare(args)
            if state:
                checkpoint.restore(folder, state, run.device, run.parts)
        with processes.raise_on_all_ranks():  # from here on no other run can write to the folder
            hparams = configuration.collect_hparams(run.args)
            if state and is_first:
                checkpoint.resume(folder, state, hparams, run.device, run.parts)
            elif is_first:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(runs.lock(folder))
                runs.refuse_existing(folder)  # another process may have written a run in the meantime
                checkpoint.start(folder, hparams, run.device, run.parts, tried)
        if is_first:
            announce(run, state, tried)
        progress.running = True
        if args.tune != "only":
            train(run, state["epoch"] if state else checkpoint.BEGUN)
        if is_first:
            print(f"done: the run is in {folder}; make plots RUN={quote_for_make(folder)} draws it")
        processes.leave_group()


def announce(run: Run, state: dict | None, tried: list[tuple]) -> None:
    """Print what a user may not expect of the run that begins."""
    folder, before = run.args.run_dir, state["hparams"]["device"] if state else run.args.device
    if tried:
        tqdm.write(f"learning rate {run.args.learning_rate:.3g}, by the range test: {folder}/lr_range.csv")
    if before != run.args.device:
        tqdm.write(f"the run continues on {run.args.device}, after {before}: numbers differ in their last digits")


if __name__ == "__main__":
    catch_signals()
    main()
