"""Train a network; before and after its epochs measure loss and accuracy, NC1 at every tap and DIB at every split.

    python train.py --model MLP --data SZT        (python train.py --help: every flag)

Everything measured goes into the CSVs of the run's folder, which analysis/plots.py draws.
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
import devices
import dib
import flags
import heads
import lr_range
import models
import nc1
import ranks
import runs
from command import Progress, begin, for_make, one_line

# A CPU shares the steps of a smaller model among threads at no gain, and where another program wants a core at a great
# loss (DIB of MLP on SZT, two cores: 0.6 s with one or two threads alone; beside a busy program 0.6 s and 2 to 30 s).
ONE_THREAD_BELOW = 10_000  # parameters


@dataclass
class Run:
    """What the parts of an epoch work with."""

    args: argparse.Namespace  # the flags, every one filled in
    device: torch.device
    num_classes: int
    sets: dict[str, data.Split]  # train and test
    dib_sets: dict[str, data.Split]  # the samples of these that DIB measures
    build: Callable[[], nn.Sequential]  # the model anew, as at construction
    model: nn.Sequential
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    seconds: dict[str, float] = field(default_factory=dict)  # that the parts took when they were called last

    @property
    def parts(self) -> dict:
        """What a checkpoint has the states of."""
        return {name: getattr(self, name) for name in ("model", "optimizer", "schedule", "scaler")}


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(part: str) -> Callable:
    """A function of a run, the seconds of which the run notes under that name."""

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def measured(run: Run, *rest):
            start = clock(run.device)
            result = function(run, *rest)
            run.seconds[part] = clock(run.device) - start
            return result

        return measured

    return decorate


@devices.exact_float32()
def train(run: Run, done: int) -> None:
    """The epochs after the one that is done. Epoch 0 is the model before training, and is only measured."""
    last = run.args.epochs
    with in_training(run) as forward:
        for epoch in bar(range(done + 1, last + 1), desc="epochs", initial=done + 1, total=last + 1):
            if epoch > 0:
                train_epoch(run, forward, epoch)
            scores = evaluate(run, epoch)
            collapse = measure_nc1(run, epoch)
            found = measure_dib(run, epoch)
            save(run, epoch, scores, collapse, found)


@contextmanager
def in_training(run: Run) -> Iterator[nn.Module]:
    """The model as training calls it: the same weights, compiled, shared by several processes. Measures hook into the
    model itself."""
    forward, limit = run.model, nullcontext()
    if run.args.compile:
        torch._dynamo.reset()  # runs that this process had before do not count towards the limit
        limit = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)  # rather than go on uncompiled
        forward = torch.compile(forward, dynamic=False)
    if ranks.world() > 1:
        # Around what is compiled: of a compiled DistributedDataParallel the compiler is handed next to nothing. The
        # price: the graph is cut where the buckets of gradients end, of which each is averaged once it is there.
        forward = nn.parallel.DistributedDataParallel(forward)
    with limit:
        yield forward


@timed("train")
def train_epoch(run: Run, forward: nn.Module, epoch: int) -> None:
    """One pass over the training set; FloatingPointError for a step whose loss is not finite."""
    args, samples, device = run.args, run.sets["train"], run.device
    autocast, _ = mixed_precision(device, args.precision)
    run.model.train()
    order = torch.randperm(len(samples)).to(device, non_blocking=True)
    ranks.from_first(order)
    if ranks.rank() > 0:  # layers that draw are to draw something else for each share of a batch
        torch.manual_seed(hash((args.seed, epoch, ranks.rank())))
    # batches as even as can be: BatchNorm cannot train on a leftover of one sample
    batches = order.tensor_split(ceil(len(order) / args.batch_size))
    finite = torch.ones(len(batches), dtype=torch.bool, pin_memory=device.type == "cuda")
    for step, indices in enumerate(bar(batches, desc="training", delay=1)):
        mine = indices.tensor_split(ranks.world())[ranks.rank()]
        x, y = samples.batch(mine)
        with autocast():
            # gradients are averaged over the processes, whose shares of the batch may differ by one sample
            loss = F.cross_entropy(forward(x), y) * (len(mine) * ranks.world() / len(indices))
        finite[step].copy_(loss.detach().isfinite(), non_blocking=True)  # from CUDA it arrives some steps later
        refuse_infinite(finite, epoch, args.learning_rate)
        run.optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.schedule.step()
    ranks.from_first(*run.model.buffers())  # each process has running statistics of its own samples
    clock(device)  # until all of finite is there
    refuse_infinite(finite, epoch, args.learning_rate)


@timed("evaluation")
def evaluate(run: Run, epoch: int) -> dict[str, tuple[float, float]]:
    """{set: (loss, accuracy)}, and the model in eval mode; FloatingPointError where the training loss is not finite."""
    run.model.eval()
    scores = {name: score(run.model, samples, run.args.batch_size) for name, samples in run.sets.items()}
    if not isfinite(scores["train"][0]):
        raise FloatingPointError(
            f"the training loss is not finite after the last step of epoch {epoch}, "
            f"at learning rate {run.args.learning_rate:g}"
        )
    return scores


@torch.no_grad()
def score(model: nn.Module, samples: data.Split, batch_size: int) -> tuple[float, float]:
    """Mean cross-entropy in nats and share of samples classified right, of a model in eval mode."""
    loss = torch.zeros((), dtype=torch.float64, device=samples.labels.device)
    right = torch.zeros((), dtype=torch.int64, device=samples.labels.device)
    for indices in ranks.share(torch.arange(len(samples), device=samples.labels.device).split(batch_size)):
        x, y = samples.batch(indices)
        logits = model(x)
        loss += F.cross_entropy(logits, y, reduction="sum")
        right += (logits.argmax(1) == y).sum()
    ranks.add_up(loss, right)
    return loss.item() / len(samples), right.item() / len(samples)


@timed("NC1")
def measure_nc1(run: Run, epoch: int) -> dict[str, dict[str, nc1.Collapse]]:
    """{set: {layer: NC1}}, layers in order of depth, if this is an epoch in which it is measured.

    The input does not change, and is measured in the first of them alone.
    """
    args, inputs, found = run.args, nn.Identity(), {}
    if not args.nc1 or not flags.is_measured(args.measure, epoch, args.epochs):
        return found
    networks = [(run.model, models.taps(run.model))]
    if epoch == flags.first_measured(args.measure):
        networks.insert(0, (inputs, {"input": inputs}))
    for name in args.sets:
        found[name] = {}
        for network, taps in networks:
            measure = partial(nc1.measure, network, taps, run.sets[name], run.num_classes)
            keep_bytes = devices.bytes_to_keep(run.device)
            found[name] |= within_memory(f"NC1 of the {name} set", measure, args.batch_size, keep_bytes)
    return found


def splits_in(args: argparse.Namespace, epoch: int) -> list[str]:
    """The splits that DIB measures in an epoch: the one without encoder, which does not change, in the first alone."""
    if not args.dib or not flags.is_measured(args.measure_dib, epoch, args.epochs):
        return []
    return [name for name in args.splits if name != "input" or epoch == flags.first_measured(args.measure_dib)]


@timed("DIB")
def measure_dib(
    run: Run, epoch: int, splits: list[str] | None = None, factor: int = 1
) -> list[tuple[str, str, dib.Head]]:
    """(set, split, head) of all heads of these splits, or those of the epoch, trained for so many times the steps that
    the flags give."""
    args, rows = run.args, []
    splits = splits_in(args, epoch) if splits is None else splits
    if args.heads == "thesis":
        how = heads.Thesis(flags.optimizer_of(args), factor * args.dib_epochs, args.precision == "bfloat16")
        batch_size = args.batch_size
    else:
        how, batch_size = heads.Tuned(factor * dib_steps(args, "train"), args.dib_lr), heads.BATCH
    names = {k: name for name, k in models.splits(run.model, splits).items()}
    options = {"labelings": args.labelings, "seed": args.seed, "model_epoch": epoch}
    for name in args.sets if names else []:
        samples = run.dib_sets[name]
        measure = partial(dib.measure_splits, run.model, names, samples, run.num_classes, run.build, how, **options)
        keep_bytes = devices.bytes_to_keep(run.device)
        found = within_memory(f"DIB of the {name} set", measure, batch_size, keep_bytes)
        rows += [(name, names[k], head) for k, of_split in found.items() for head in of_split]
    return rows


def dib_steps(args: argparse.Namespace, name: str) -> int:
    """The steps of DIB's heads on a set: sets compare only after the same number, and tuned heads take it on both."""
    if args.heads == "thesis":
        return args.dib_epochs * ceil(args.dib_samples[name] / args.batch_size)
    return heads.steps(args.dib_epochs, args.dib_samples["train"])


def save(run: Run, epoch: int, scores: dict, collapse: dict, found: list[tuple[str, str, dib.Head]]) -> None:
    """The epoch into the CSVs, the checkpoint and a line on the screen. It counts once its checkpoint stands: rows
    beyond it are dropped when the run goes on."""
    if ranks.rank() > 0:
        return
    took = {"train": run.seconds.get("train", 0.0), "test": run.seconds["evaluation"]}
    rows = {
        "nc1.csv": [(epoch, name, layer, *value) for name in collapse for layer, value in collapse[name].items()],
        "dib.csv": [(epoch, name, split, *head) for name, split, head in found],
        "epochs.csv": [(epoch, name, *scores[name], round(took[name], 4)) for name in scores],
    }
    runs.append(Path(run.args.run_dir), rows)
    runs.save(Path(run.args.run_dir), epoch, flags.hparams_of(run.args), run.device, run.parts)
    beaten = {name: dib.beaten(head for of, _, head in found if of == name) for name in run.args.sets if found}
    tqdm.write(summary(f"{epoch}/{run.args.epochs}", scores, collapse, beaten, run.seconds))
    sys.stdout.flush()


def summary(epoch: str, scores: dict, collapse: dict, beaten: dict, seconds: dict[str, float]) -> str:
    """The line of an epoch: train (test) figures, NC1 at the deepest tap, the share of heads that are known not to have
    been found, and where the time went."""
    (train_loss, train_accuracy), (test_loss, test_accuracy) = scores["train"], scores["test"]
    parts = [f"loss {train_loss:.4f} ({test_loss:.4f})  accuracy {train_accuracy:.2%} ({test_accuracy:.2%})"]
    for name, values in collapse.items():
        layer, deepest = list(values.items())[-1]
        parts.append(f"NC1 {name} {layer} {deepest.nc1:.4g} (rank {deepest.rank})")
    if beaten:
        parts.append("heads beaten " + ", ".join(f"{name} {share:.1%}" for name, share in beaten.items()))
    parts.append(", ".join(f"{part} {seconds.get(part, 0):.1f} s" for part in ("train", "NC1", "DIB")))
    return f"epoch {epoch}  " + "  ".join(parts)


def refuse_infinite(finite: torch.Tensor, epoch: int, learning_rate: float) -> None:
    """Raise FloatingPointError for the first step of which the loss is known not to be finite."""
    if not finite.all():
        step = 1 + int(finite.int().argmin())
        raise FloatingPointError(
            f"the training loss is not finite in epoch {epoch}, step {step} of {len(finite)}, "
            f"at learning rate {learning_rate:g}"
        )


def within_memory(what: str, measure: Callable, batch_size: int, keep_bytes: int) -> dict:
    """The measure; where memory runs out, once more with half the batch and nothing kept, and a line that says so."""
    try:
        return measure(batch_size=batch_size, keep_bytes=keep_bytes)
    except RuntimeError as error:
        if not devices.is_out_of_memory(error) or ranks.world() > 1:  # which wait for this one within the pass
            raise
    torch.cuda.empty_cache()  # after the clause above, as the error holds on to what the pass had
    half = max(1, batch_size // 2)
    tqdm.write(f"{what}: out of memory; once more in batches of {half}, not {batch_size}, with nothing kept")
    return measure(batch_size=half, keep_bytes=0)


def bar(things: Iterable, **options) -> Iterable:
    """A progress bar, of the first process, where somebody looks."""
    return tqdm(things, leave=False, disable=True if ranks.rank() else None, **options)


def mixed_precision(device: torch.device, precision: str) -> tuple[Callable, torch.amp.GradScaler]:
    """The context of a forward pass and the scaler of its loss."""
    dtype = flags.PRECISIONS[precision]
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # float16 alone can underflow


@devices.exact_float32()
def prepare(args: argparse.Namespace) -> tuple[Run, list[tuple]]:
    """What the flags ask for, and the rows of lr_range.csv; args gets every default filled in. Nothing is written.

    Raises ValueError for what is asked for and cannot be had.
    """
    device = flags.choose_device(args.device)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what older cuBLAS needs for it
    torch.use_deterministic_algorithms(args.deterministic)
    with ranks.first_alone(args.download):
        dataset = data.load(args.data, args.data_dir, device, args.download, args.train_size)
    options = flags.model_options(args, dataset)

    def build() -> nn.Sequential:
        model = models.build(args.model, dataset.input_shape, dataset.num_classes, **options)
        # convolutions run faster with channels last, on CUDA and on a CPU (MNISTNet there: 0.14 ms a sample, not 0.22)
        return model.to(memory_format=torch.channels_last)

    torch.manual_seed(args.seed)
    model = build().to(device)
    if device.type == "cpu" and sum(p.numel() for p in model.parameters()) < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    flags.fill_in(args, device, dataset, model)
    sets = {"train": dataset.train, "test": dataset.test}
    dib_sets = {name: sets[name] for name in args.sets if args.dib}
    if args.dib_size:
        what = f"--dib-size of the {args.data} {{}} set"
        dib_sets = {
            name: split.some(args.dib_size, dataset.num_classes, what.format(name)) for name, split in dib_sets.items()
        }
    tried = range_test(args, device, model, dataset.train) if args.tune and not args.resume else []
    optimizer = flags.optimizer_of(args)([p for p in model.parameters() if p.requires_grad])
    schedule = flags.schedule_of(args, optimizer, args.epochs * ceil(len(dataset.train) / args.batch_size))
    _, scaler = mixed_precision(device, args.precision)
    run = Run(args, device, dataset.num_classes, sets, dib_sets, build, model, optimizer, schedule, scaler)
    return run, tried


def range_test(args: argparse.Namespace, device: torch.device, model: nn.Module, samples: data.Split) -> list[tuple]:
    """The rows of lr_range.csv; args gets the learning rate that is found."""
    if args.learning_rate:
        raise ValueError(f"--learning-rate {args.learning_rate:g} is given, and --tune is to find it")
    precision = mixed_precision(device, args.precision)
    steps = lr_range.sweep(model, samples, flags.optimizer_of(args), args.batch_size, *precision)
    steps = ranks.told_by_first(steps)
    best = lr_range.steepest(steps)
    args.learning_rate = steps[best].learning_rate
    return [(i, *step, int(i == best)) for i, step in enumerate(steps)]


def main(arguments: list[str] | None = None) -> None:
    args = flags.parse(arguments)
    folder, state = flags.run_folder(args), None
    progress = Progress(f"finished epochs are kept in {folder}", "and the same command with --resume goes on from them")
    with one_line(flags.make_parser(), progress), ExitStack() as stack:
        ranks.join()
        first = ranks.rank() == 0  # the only process that writes
        with ranks.together():  # what cannot be had is refused, and nothing is written
            if args.resume:
                if first:
                    stack.enter_context(runs.locked(folder))
                state = runs.load(folder)
                args = flags.adopt(arguments, folder, state["hparams"])
            elif first:
                runs.refuse_existing(folder)
            run, tried = prepare(args)
            if state:
                runs.restore(folder, state, run.device, run.parts)
        with ranks.together():  # the folder is this process's from here on
            hparams = flags.hparams_of(run.args)
            if state and first:
                runs.resume(folder, state, hparams, run.device, run.parts)
            elif first:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(runs.locked(folder))
                runs.refuse_existing(folder)  # another process may have been here while this one prepared
                runs.start(folder, hparams, run.device, run.parts, tried)
        if first:
            announce(run, state, tried)
        progress.running = True
        if args.tune != "only":
            train(run, state["epoch"] if state else runs.BEGUN)
        if first:
            print(f"done: the run is in {folder}; make plots RUN={for_make(folder)} draws it")
        ranks.leave()


def announce(run: Run, state: dict | None, tried: list[tuple]) -> None:
    """What a run says before it begins."""
    folder, had = run.args.run_dir, state["hparams"]["device"] if state else run.args.device
    if tried:
        tqdm.write(f"learning rate {run.args.learning_rate:.3g}, by the range test: {folder}/lr_range.csv")
    if had != run.args.device:
        tqdm.write(f"goes on with {run.args.device}, after {had}: numbers differ in their last bits")


if __name__ == "__main__":
    begin()
    main()
