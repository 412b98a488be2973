"""Measure a network on this machine: size, speed, memory, and how near it comes to the machine's matrix products.

    python bench.py --model uvit_s2 --data cifar10                                # forward, training step, sampling
    python bench.py --model uvit_s2 --data cifar10 --compare amp=off amp=bf16     # two settings, timed alternately
    python bench.py --model uvit_s2 --data cifar10 --loop --data-dir data         # does reading images slow training?
    python bench.py --papers                                                      # the rows that the papers print

Weights and data are random, and have the shape of the data set (--loop reads real data). The compared settings are
timed alternately, A B A B, in blocks of 0.2 s or longer that end with one wait for the device, so that a drift of the
machine affects all alike. The table shows the median, quickest and slowest block's.

share   the rate of the network's multiply-adds (U-DiT's convolutions merged; of a training step, those of three forward
        passes) over that of a large matrix product of the same type in the same run
GB      peak memory, beyond what was held before the network was built (on a CPU: of the process; Linux only)
"""
import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

import bookkeeping
import data
import diffusion
import recipes
import train

BLOCK = 0.2                                     # seconds
CEILING = {"cpu": 2048, "cuda": 8192}           # rows and columns of the large matrices
EVALUATIONS = {"cpu": 4, "cuda": 50}            # calls of the network for an image
DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DATA = data.DATASETS | {"folder": data.Named(None, 256, (3, 256, 256), 1000)}     # ImageNet's own pixels, as files

# The rows of --papers: flags without dashes, and what is published for them (training: steps/s times the batch).
SAMPLE = "measure=sampling batch-size=500 repeats=3"
STEP = "data=imagenet256 measure=step"
PAPERS = [
    ("model=uvit_s2 data=cifar10 measure=forward batch-size=1", "A40: 55 images/s"),
    ("model=uvit_s2 data=cifar10 measure=forward batch-size=500", "A40: 1125 images/s"),
    (f"model=uvit_s2 data=cifar10 {SAMPLE}", "A100: 19 s"),
    (f"model=uvit_m4 data=imagenet64 {SAMPLE}", "A100: 34 s"),
    (f"model=uvit_l2 data=imagenet256 {SAMPLE}", "A100: 59 s"),
    (f"model=uvit_h2 data=imagenet256 {SAMPLE}", "A100: 89 s"),
    (f"model=uvit_l2 {STEP} batch-size=128", "A100: 53 GB"),
    (f"model=uvit_l2 {STEP} batch-size=128 grad-checkpoint", "A100: 10 GB"),
    (f"model=uvit_h2 {STEP} batch-size=128", "A100: 146 images/s, 54.3 GB"),
    (f"model=uvit_h2 {STEP} batch-size=128 grad-checkpoint", "A100: 111 images/s, 18.9 GB"),
    (f"model=dit_xl2 {STEP} batch-size=128", "A100: 108 images/s"),
    (f"model=dit_xl2 {STEP} batch-size=32", "each of 8 A100: 54.7 images/s"),
    (f"model=udit_l {STEP} batch-size=32", "each of 8 A100: 26.9 images/s"),
]


def parse(argv):
    """Flags -> argparse.Namespace. --key=value that is no flag is an argument of the network. Raises ValueError."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    yes_no, add = argparse.BooleanOptionalAction, p.add_argument_group("what is measured").add_argument
    add("--model", metavar="NAME", help=", ".join(recipes.MODELS))
    add("--data", metavar="NAME", help=f"{', '.join(DATA)}; with --loop, whatever train.py takes")
    add("--data-dir", metavar="DIR", help="with --loop: where named data lie (default data/)")
    add("--image-size", type=int, metavar="PIXELS", help="other than the data set's (of latents: cells)")
    add("--model-args", nargs="*", default=[], metavar="KEY=VALUE", help="arguments of the model's constructor")
    add("--measure", default=",".join(WORKS), metavar="WORK,..",
        help="of forward, step (forward, backward, AdamW, average of the weights) and sampling (default: all three)")
    add("--compare", nargs=2, dest="pair", metavar=("A", "B"), help="two settings, each in quotes: some of these flags "
        "without dashes, or arguments of the network: --compare amp=off 'amp=bf16 compile', or --compare '' skip=none")
    add("--loop", action="store_true", help="training steps on random images, on stored ones, and the reading alone")
    add("--papers", action="store_true", help="the rows that the papers print, with what they report")
    add = p.add_argument_group("in which setting").add_argument
    add("--batch-size", type=int, metavar="N", help="images at a time (default: the recipe's on cuda, 8 on cpu)")
    add("--amp", choices=DTYPES, help="autocast type (default bf16 on cuda, off on cpu)")
    add("--compile", action=yes_no, default=False, help="torch.compile the network")
    add("--grad-checkpoint", nargs="?", type=int, const=1, default=0, metavar="K",
        help="recompute the activations of every K-th block in the backward pass (no K: of every block)")
    add("--fold", action=yes_no, default=True, help="U-DiT's convolutions merged for forward and sampling (default on)")
    add("--cfg", type=float, default=1.0, metavar="W", help="guidance weight in sampling (default 1: none)")
    add("--workers", type=int, metavar="N", help="with --loop: reading processes (default 4)")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--repeats", type=int, default=10, metavar="N", help="blocks of each work (default 10)")
    add("--json", action="store_true", help="print one line of JSON: seconds, rates a second, bytes")
    args, others = p.parse_known_args(argv)

    cuda = args.device == "cuda" or not args.device and torch.cuda.is_available()
    args.device, args.measure = "cuda" if cuda else "cpu", args.measure.split(",")
    args.amp = args.amp or ("bf16" if cuda else "off")
    args.model_args = args.model_args + [word[2:] for word in others]
    strange = [word for word in others if not (word.startswith("--") and "=" in word)]
    for wrong, message in [
        (strange, f"{' '.join(strange)}: neither a flag (see --help) nor KEY=VALUE for the model"),
        (set(args.measure) - WORKS.keys(), f"--measure {','.join(args.measure)}: choose from {', '.join(WORKS)}"),
        (args.loop and (args.pair or args.papers), "--loop stands alone, without --compare or --papers"),
        (not (args.papers or args.model and args.data), "give --model and --data, or --papers; see --help"),
        (args.data and args.data not in DATA and not args.loop,
         f"--data {args.data}: choose from {', '.join(DATA)} (a folder of images needs --loop)"),
    ]:
        if wrong:
            raise ValueError(message)
    return args


def flags(words):
    """ "amp=bf16 compile" -> ["--amp=bf16", "--compile"]"""
    return ["--" + word.lstrip("-") for word in words.split()]


def configure(args):
    """The flags over the recipe's values, and what follows from them: dataset, shape, arguments, parameters, macs."""
    given = {key: value for key, value in vars(args).items() if value is not None}
    recipe = recipes.recipe(args.model, args.data) | ({"batch_size": 8} if args.device == "cpu" else {})
    if "schedule" not in recipe:
        raise ValueError(f"--model {args.model}: bench.py measures diffusion networks alone")
    config = argparse.Namespace(**vars(args) | recipe | given, accumulate=1)
    bookkeeping.check(vars(config))
    if config.loop:
        config.dataset = data.load(config.data, config.data_dir, config.image_size)
    else:
        known = DATA[config.data]
        shape = (known.shape[0], *[config.image_size or known.shape[1]] * 2)
        config.dataset = argparse.Namespace(shape=shape, num_classes=known.num_classes, text=known.text)
    config.shape, config.text = config.dataset.shape, config.dataset.text
    config.class_cond = config.dataset.num_classes > 0 if config.class_cond is None else config.class_cond
    config.label_dropout *= config.class_cond
    config.arguments = recipes.model_arguments(config, config.dataset)
    if config.cfg != 1 and not config.text and not config.label_dropout:
        raise ValueError(f"--cfg {config.cfg}: {config.model} learns no null label on {config.data}, leave it at 1")
    with torch.device("meta"):      # shapes alone: nothing is allocated or computed
        config.parameters, config.macs = count(recipes.build(config.model, config.arguments), config)
    return config


@torch.no_grad()
def count(model, config):
    """Parameters of a network, and multiply-adds of its forward pass of one image, convolutions merged."""
    batch, fast = inputs(config, "meta"), model.fold() if hasattr(model, "fold") else model
    with FlopCounterMode(display=False) as counter:
        fast(*(z if z is None else z[:1] for z in batch))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@dataclass
class Work:
    """Something to time. One call of `run` makes `images` images and needs `macs` multiply-adds."""

    run: Callable
    images: int
    macs: float
    amp: str
    before: Callable = lambda: None     # called before each block, outside the time
    calls: int = 1                      # of run, in a block
    peak: float | None = None           # bytes beyond what was held before the network was built


def network(config, device, training=False):
    with torch.device(device):
        model = recipes.build(config.model, config.arguments | {"checkpoint": config.grad_checkpoint})
    model = model.fold() if not training and config.fold and hasattr(model, "fold") else model
    if not training and config.compile:         # a Learner compiles its network itself
        model.compile()
    return model


def inputs(config, device):
    """A random batch: x0 (N, C, H, W), network times (N,), and labels (N,), text features (N, T, F) or None."""
    n, classes = config.batch_size, config.arguments["num_classes"]
    y = (torch.randn(n, *config.text, device=device) if config.text else
         torch.randint(classes, (n,), device=device) if classes else None)
    return torch.randn(n, *config.shape, device=device), 999 * torch.rand(n, device=device), y


def forward(config, here):
    """A forward pass."""
    model, (x, t, y) = network(config, here.device), inputs(config, here.device)

    def run():
        with torch.no_grad(), torch.autocast(config.device, DTYPES[config.amp], enabled=config.amp != "off"):
            model(x, t, y)

    return Work(run, config.batch_size, config.batch_size * config.macs, config.amp)


def sampling(config, here):
    """Images from noise, as sample.py makes them. Guidance calls the network twice."""
    model, (_, _, y) = network(config, here.device), inputs(config, here.device)
    schedule = recipes.schedule_of(vars(config))
    sampler = "euler_ode" if config.schedule in ("flow", "gvp") else "dpm_solver"
    null = torch.zeros(config.text) if config.text else torch.tensor(config.arguments["num_classes"])

    def run():
        with torch.autocast(config.device, DTYPES[config.amp], enabled=config.amp != "off"):
            diffusion.generate(model, schedule, config.shape, range(config.batch_size), y, null.to(here.device),
                               w=config.cfg, sampler=sampler, steps=EVALUATIONS[config.device], device=here.device)

    passes = config.batch_size * EVALUATIONS[config.device] * (1 if config.cfg == 1 else 2)
    return Work(run, config.batch_size, passes * config.macs, config.amp)


def training(config, here):
    """A step of train.py, from a batch on the device to new weights and their average."""
    schedule = recipes.schedule_of(vars(config))
    learner = train.Learner(network(config, here.device, training=True), schedule, config, here)
    random_x0, _, random_y = inputs(config, here.device)

    def run(x0=random_x0, y=random_y):
        learner.step(0, [(x0, y, None, None)])      # draws times and noise

    return Work(run, config.batch_size, 3 * config.batch_size * config.macs, config.amp)


WORKS = {"forward": forward, "step": training, "sampling": sampling}


def matrix_product(amp, device):
    """The ceiling: a product of two square matrices in this type."""
    size = CEILING[device.type]
    a, b = torch.randn(2, size, size, device=device).to(DTYPES[amp])
    return Work(lambda: a @ b, 0, size**3, amp)


def loop(config, here):
    """Training steps on random and on stored images, and the reading alone -> {name: Work}, called twice."""
    dataset, n = config.dataset, config.batch_size
    order = (data.shuffled(len(dataset), 0, step * n, n) for step in itertools.count())
    workers = 0 if isinstance(dataset, data.ImagesInMemory) else config.workers
    batches, generator = dataset.batches(order, here.device, workers), torch.Generator(here.device)

    def read():
        images, y = next(batches)
        return dataset.prepare(images, *dataset.draws(n, generator)), y if config.class_cond else None

    def drain():        # batches that workers have prefetched, while something else was timed, do not count
        for _ in range(2 * workers):
            next(batches)

    step = warm_up(lambda: training(config, here), here.device)
    step.run(*read())
    calls = max(step.calls, 4 * workers)
    return {"step, random": step,
            "step, stored": replace(step, run=lambda: step.run(*read()), before=drain, calls=calls),
            "reading alone": replace(step, run=read, before=drain, calls=calls, macs=0, peak=None)}


# ---------------------------------------------------------------------------------------------------------------------
# Timing


def timed(run, calls, device):
    """Seconds of one call, the mean of this many calls in a row. The device is waited for at both ends."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return (time.perf_counter() - start) / calls


def memory(device, peak=False):
    """Bytes held now, or (peak) the most since the last such call: by tensors on a GPU, by this process on Linux."""
    if device.type == "cuda":
        if peak:
            return torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):
        if not peak:
            ctypes.CDLL(None).malloc_trim(0)                        # what malloc keeps for later is not held
            Path("/proc/self/clear_refs").write_text("5")           # VmHWM starts anew
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0])


def warm_up(make, device):
    """make() -> its Work, called twice (the first call may compile), with its peak memory and the calls of a block."""
    gc.collect()
    held = memory(device)
    work = make()
    memory(device)          # the peak starts anew, without what building took for a while
    _, second = timed(work.run, 1, device), timed(work.run, 1, device)
    work.calls = math.ceil(BLOCK / second)
    peak = memory(device, peak=True)
    work.peak = None if held is None or peak is None else peak - held
    return work


def alternate(works, repeats, device):
    """Seconds of one call of each work, (len(works), repeats): a block of each in turn, `repeats` times."""
    seconds = [[] for _ in works]
    for _ in range(repeats):
        for work, taken in zip(works, seconds):
            work.before()
            taken.append(timed(work.run, work.calls, device))
    return seconds


def compare(works, repeats, device):
    """{name: Work} -> a row of results for each, and for the matrix products, which are timed alternately with them.
    speed_ratio is images/s divided by those of the first work, block by block."""
    def spread(name, numbers):
        return {name: statistics.median(numbers), f"{name}_min": min(numbers), f"{name}_max": max(numbers)}

    ceilings = {f"product, {amp}": warm_up(lambda: matrix_product(amp, device), device)
                for amp in dict.fromkeys(work.amp for work in works.values())}
    every = works | ceilings
    seconds = dict(zip(every, alternate(every.values(), repeats, device)))
    rate = {work.amp: 2 * work.macs / statistics.median(seconds[name]) for name, work in ceilings.items()}
    rows, first = [], next(iter(works))
    for name, work in every.items():
        images, flops = (number / statistics.median(seconds[name]) for number in (work.images, 2 * work.macs))
        rows.append({"work": name, **spread("seconds", seconds[name]), "images": work.images, "images_per_sec": images,
                     "flops_per_sec": flops, "share": flops / rate[work.amp], "peak_bytes": work.peak})
        if name in works and name != first:
            ratios = [work.images / b * a / works[first].images for a, b in zip(seconds[first], seconds[name])]
            rows[-1].update(spread("speed_ratio", ratios))
    return rows


def measure(configs, here):
    """{name: config} -> rows, one by one. A work that does not fit into memory says so, and the rest goes on."""
    config, *_ = configs.values()
    if config.loop:
        yield from compare(loop(config, here), config.repeats, here.device)
        return
    for part in config.measure:
        torch.compiler.reset()
        works = {}
        for name, setting in configs.items():
            label = f"{name} {part}".strip()
            try:
                works[label] = warm_up(lambda: WORKS[part](setting, here), here.device)
            except Exception as error:      # OutOfMemoryError, a RuntimeError on a CPU, or recipes.build's ValueError
                if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                    raise
                yield {"work": label, "error": "out of memory"}
        yield from compare(works, config.repeats, here.device) if works else []


HEAD = f"{'':>20} {'ms':>10} {'quickest':>10} {'slowest':>10} {'images/s':>10} {'TFLOP/s':>8} {'share':>7} {'GB':>7}"


def title(name, c):
    """A setting in words."""
    words = [f"batch {c.batch_size}", f"amp {c.amp}", *["compile"] * c.compile, *c.model_args,
             *[f"grad-checkpoint {c.grad_checkpoint}"] * (c.grad_checkpoint > 0)]
    if "sampling" in c.measure and not c.loop:
        words += [f"{EVALUATIONS[c.device]} evaluations for a sample", *[f"guidance {c.cfg}"] * (c.cfg != 1)]
    return (f"{name} {c.model}, {c.data} {'x'.join(map(str, c.shape))}: {c.parameters / 1e6:.2f} M parameters, "
            f"{c.macs / 1e9:.2f} GMACs an image; {', '.join(words)}").strip()


def line(row):
    """A row of the table."""
    if "error" in row:
        return f"{row['work']:>20} {row['error']:>10}"
    cells = [f"{row['work']:>20}", *(f"{1e3 * row[key]:10.2f}" for key in ("seconds", "seconds_min", "seconds_max"))]
    cells += [f"{row['images_per_sec']:10.2f}" if row["images"] else " " * 10]
    cells += [f"{row['flops_per_sec'] / 1e12:8.3f} {row['share']:7.1%}" if row["share"] else " " * 16]
    cells += [f"{row['peak_bytes'] / 1e9:7.2f}"] if row["peak_bytes"] and row["images"] else []
    if "speed_ratio" in row:
        cells += ["  {speed_ratio:.3f} times as fast ({speed_ratio_min:.3f} to {speed_ratio_max:.3f})".format(**row)]
    return " ".join(cells).rstrip()


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    here = bookkeeping.Processes(args.device)         # on a GPU: TF32 where float32 remains
    report = dict(device=torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else "cpu",
                  cpu_threads=torch.get_num_threads(), torch=torch.__version__, results=[])
    say = (lambda text: None) if args.json else partial(print, flush=True)
    say(f"{report['device']}, torch {report['torch']}, {report['cpu_threads']} CPU threads")
    for words, reported in PAPERS if args.papers else [("", "")]:
        names = dict(zip("AB", args.pair)) if args.pair else {"": ""}
        configs = {name: configure(parse([*flags(words), *argv, *flags(setting)])) for name, setting in names.items()}
        say("\n" + "\n".join(title(*pair) for pair in configs.items()))
        say((f"published: {reported}\n" if reported else "") + HEAD)
        rows = []
        for row in measure(configs, here):
            say(line(row))
            rows.append(row)
        settings = {name: {**vars(config), "dataset": None} for name, config in configs.items()}
        report["results"].append(dict(reported=reported, settings=settings, rows=rows))
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    bookkeeping.command("bench.py", main, "interrupted")
