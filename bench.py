"""Measure a model on this machine: size, speed, memory, and how near it comes to the machine's matrix products.

    python bench.py --model uvit_s2 --data cifar10                                # forward, training step, sampling
    python bench.py --model uvit_s2 --data cifar10 --compare amp=off amp=bf16     # two settings, side by side
    python bench.py --model uvit_s2 --data cifar10 --loop --data-dir data         # does reading images slow training?
    python bench.py --papers                                                      # what the papers print, measured here
    python bench.py --cka runs/*/checkpoint.pt --out cka.png                      # how alike the blocks of networks are

Nothing is downloaded: weights are random, and so are data, in the data set's shape (--loop reads real ones). A time is
that of a block of calls, 0.2 s or longer, which ends with one wait for the device. Blocks of all that is compared take
turns, A B A B, so that a drift of the machine hits all alike; before that, each work is called twice. Printed are the
median of the blocks, the quickest and the slowest, for one call.

share   rate of the multiply-adds that the network needs over that of a large matrix product in the same type, whose
        blocks take turns too. The need of a forward pass is counted (torch.utils.flop_counter, U-DiT's convolutions
        merged), and a training step needs three: activations that are computed again earn nothing
GB      peak memory, beyond what was held before the model was built (on a CPU: of the process; Linux only)
"""
import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import math
import re
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import torch
from PIL import Image, ImageDraw
from torch.nn.utils import get_total_norm
from torch.utils.flop_counter import FlopCounterMode

import data
import diffusion
import train

BLOCK = 0.2                                     # seconds
CEILING = {"cpu": 2048, "cuda": 8192}           # rows and columns of the large matrices
DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What a network sees of each data set: shape of an image or its latent, classes, and text features (tokens, width).
DATA = {
    "shapes": ((3, 16, 16), 10, None),
    "cifar10": ((3, 32, 32), 10, None),
    "celeba64": ((3, 64, 64), 0, None),
    "imagenet64": ((3, 64, 64), 1000, None),
    "imagenet256": ((4, 32, 32), 1000, None),
    "imagenet512": ((4, 64, 64), 1000, None),
    "mscoco256": ((4, 32, 32), 0, (77, 768)),
}

# The rows of --papers: flags without their dashes, and what is published for them (training: steps/s times the batch).
VANILLA = "cosine=False rotary=False ffn_conv=False reparam=False"
SAMPLE = "measure=sampling batch-size=500 repeats=3"
STEP = "data=imagenet256 measure=step"
ON_GPU = [
    ("model=uvit_s2 data=cifar10 measure=forward batch-size=1", "A40: 55 images/s"),
    ("model=uvit_s2 data=cifar10 measure=forward batch-size=500", "A40: 1125 images/s"),
    (f"model=uvit_s2 data=cifar10 {SAMPLE}", "A100: 19 s"),
    (f"model=uvit_m4 data=imagenet64 {SAMPLE}", "A100: 34 s"),
    (f"model=uvit_l2 data=imagenet256 {SAMPLE}", "A100: 59 s"),
    (f"model=uvit_h2 data=imagenet256 {SAMPLE}", "A100: 89 s"),
    (f"model=uvit_h2 data=imagenet256 {SAMPLE} cfg=1.4", "A100: about 178 s"),
    ("model=uvit_s2 data=cifar10 measure=step batch-size=128", ""),
    (f"model=uvit_l2 {STEP} batch-size=128", "A100: 53 GB"),
    (f"model=uvit_l2 {STEP} batch-size=128 grad-checkpoint", "A100: 10 GB"),
    (f"model=uvit_h2 {STEP} batch-size=128", "A100: 146 images/s, 54.3 GB"),
    (f"model=uvit_h2 {STEP} batch-size=128 grad-checkpoint", "A100: 111 images/s, 18.9 GB"),
    (f"model=dit_xl2 {STEP} batch-size=128", "A100: 108 images/s"),
    (f"model=dit_xl2 {STEP} batch-size=32", "each of 8 A100: 54.7 images/s"),
    (f"model=udit_b {STEP} batch-size=32 {VANILLA}", "each of 8 A100: 100 images/s"),
    (f"model=udit_b {STEP} batch-size=32", ""),
    (f"model=udit_l {STEP} batch-size=32 {VANILLA}", "each of 8 A100: 49.6 images/s"),
    (f"model=udit_l {STEP} batch-size=32", "each of 8 A100: 26.9 images/s"),
]
ON_CPU = [      # no paper has any: beside these stands the released code, on two cores that know bf16
    ("model=uvit_s2 data=cifar10 batch-size=8 repeats=5 amp=off", "forward 1130 ms, step 3435 ms"),
    ("model=uvit_s2 data=cifar10 batch-size=8 repeats=5 amp=bf16", "forward 590 ms, step 1891 ms"),
    ("model=dit_s2 data=imagenet256 batch-size=8 repeats=5 amp=off", "forward 688 ms, step 1910 ms"),
    ("model=udit_s data=imagenet256 batch-size=4 repeats=5 amp=off", "forward 561 ms, step 2237 ms"),
]


# ---------------------------------------------------------------------------------------------------------------------
# What to measure


def parse(argv):
    """Flags -> argparse.Namespace. --key=value that is no flag is an argument of the model. Raises ValueError."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    yes_no = argparse.BooleanOptionalAction
    add = p.add_argument_group("what is measured").add_argument
    add("--model", metavar="NAME", help=", ".join(train.MODELS))
    add("--data", metavar="NAME", help=f"{', '.join(DATA)}; with --loop, whatever train.py takes")
    add("--data-dir", metavar="DIR", help="with --loop, --cka: where named data lie (default data/)")
    add("--image-size", type=int, metavar="PIXELS", help="other than the data set's (of latents: cells)")
    add("--model-args", nargs="*", default=[], metavar="KEY=VALUE", help="arguments of the model's constructor")
    add("--measure", default=",".join(WORKS), metavar="WORK,..",
        help="of forward, step (forward, backward, AdamW, average of the weights) and sampling (default: all three)")
    add("--compare", nargs=2, metavar=("A", "B"), help="two settings in turn: each some of these flags without dashes, "
        "or arguments of the model, in quotes: --compare amp=off 'amp=bf16 compile', or --compare '' skip=none")
    add("--loop", action="store_true", help="training steps on random images, on stored ones, and the reading alone")
    add("--papers", action="store_true", help="the rows that the papers print, beside what they report; on a CPU, "
        "small ones. Other flags hold for every row")
    add("--cka", nargs="+", metavar="CKPT", help="how alike the outputs of blocks of trained U-ViTs or DiTs are, on "
        "--batch-size images (default 256) of their training data with the noise of --time: a picture, and a table")
    add("--time", type=float, default=0.5, metavar="T", help="with --cka: 0 is no noise, 1 nothing else (default 0.5)")
    add("--out", default="cka.png", metavar="PNG", help="with --cka (default cka.png)")
    add = p.add_argument_group("in which setting").add_argument
    add("--batch-size", type=int, metavar="N", help="images at a time (default: the recipe's on cuda, 8 on cpu)")
    add("--amp", choices=DTYPES, help="autocast type (default bf16 on cuda, off on cpu)")
    add("--compile", action=yes_no, default=False, help="torch.compile the network")
    add("--grad-checkpoint", nargs="?", type=int, const=1, default=0, metavar="K",
        help="compute the activations of every K-th block (default: of every one) again in the backward pass")
    add("--channels-last", action=yes_no, default=False, help="images and convolutions in this memory format")
    add("--fold", action=yes_no, default=True, help="U-DiT's convolutions merged for forward and sampling (default on)")
    add("--evaluations", type=int, metavar="N", help="of DPM-Solver for an image (default 50 on cuda, 4 on cpu)")
    add("--cfg", type=float, default=1.0, metavar="W", help="guidance weight in sampling (default 1: none)")
    add("--workers", type=int, metavar="N", help="with --loop: reading processes (default 4)")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add = p.add_argument_group("how").add_argument
    add("--repeats", type=int, default=10, metavar="N", help="blocks of each work (default 10)")
    add("--json", action="store_true", help="print one line of JSON: seconds, rates a second, bytes")
    args, others = p.parse_known_args(argv)

    cuda = args.device == "cuda" or not args.device and torch.cuda.is_available()
    args.device, args.measure = "cuda" if cuda else "cpu", args.measure.split(",")
    args.amp = args.amp or ("bf16" if cuda else "off")
    args.evaluations = (50 if cuda else 4) if args.evaluations is None else args.evaluations
    args.model_args = args.model_args + [word[2:] for word in others]
    strange = [word for word in others if not (word.startswith("--") and "=" in word)]
    for wrong, message in [
        (strange, f"{' '.join(strange)}: neither a flag (see --help) nor KEY=VALUE for the model"),
        (set(args.measure) - WORKS.keys(), f"--measure {','.join(args.measure)}: choose from {', '.join(WORKS)}"),
        (min(args.repeats, args.evaluations) < 1, "--repeats and --evaluations: must be at least 1"),
        (args.loop and (args.compare or args.papers), "--loop stands alone, without --compare or --papers"),
        (not 0 <= args.time <= 1, f"--time {args.time}: must be 0 to 1"),
        (not (args.papers or args.cka or args.model and args.data),
         "give --model and --data, or --papers, or --cka; see --help"),
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
    """The flags over the recipe's values, and what follows from the data: dataset, shape, text, arguments, macs, ..

    Raises ValueError where something does not fit.
    """
    given = {key: value for key, value in vars(args).items() if value is not None}
    recipe = train.recipe(args.model, args.data) | ({"batch_size": 8} if args.device == "cpu" else {})
    config = argparse.Namespace(**vars(args) | recipe | given)
    train.check_bounds(vars(config))
    if config.loop:
        config.dataset = data.load(config.data, config.data_dir, config.image_size)
    else:
        shape, classes, text = DATA[config.data]
        shape = (shape[0], config.image_size, config.image_size) if config.image_size else shape
        config.dataset = SimpleNamespace(shape=shape, num_classes=classes, text=text)
    config.shape, classes, config.text = config.dataset.shape, config.dataset.num_classes, config.dataset.text
    config.class_cond = classes > 0 if config.class_cond is None else config.class_cond
    config.label_dropout = config.label_dropout if config.class_cond else 0.0
    config.arguments = train.model_arguments(config, config.dataset)
    if config.cfg != 1 and not config.text and not config.label_dropout:
        raise ValueError(f"--cfg {config.cfg}: {config.model} learns no null label on {config.data}, leave it at 1")
    with torch.device("meta"):      # shapes alone: nothing is allocated or computed
        config.parameters, config.macs = count(train.build(config.model, config.arguments), config)
    return config


@torch.no_grad()
def count(model, config):
    """Parameters of a model, and multiply-adds of its forward pass of one image, convolutions merged."""
    fast = model.fold() if hasattr(model, "fold") else model
    with FlopCounterMode(display=False) as counter:
        fast(*inputs(argparse.Namespace(**vars(config) | {"batch_size": 1}), torch.device("meta")))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


# ---------------------------------------------------------------------------------------------------------------------
# Works: what is timed


@dataclass
class Work:
    """Something to time. One call of `run` makes `images` images, for which `macs` multiply-adds are needed."""

    run: Callable
    images: int
    macs: float
    amp: str
    before: Callable = lambda: None     # called before each block, outside the time
    calls: int = 1                      # of run, in a block
    peak: float | None = None           # bytes beyond what was held before the model was built


def network(config, device, inference=False):
    with torch.device(device):
        model = train.build(config.model, config.arguments | {"checkpoint": config.grad_checkpoint})
    if inference and config.fold and hasattr(model, "fold"):
        model = model.fold()
    if config.compile:
        model.compile()
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def inputs(config, device):
    """A random batch: x0 (N, C, H, W), network times (N,), and labels (N,), text features (N, T, F) or None."""
    n, classes = config.batch_size, config.arguments["num_classes"]
    x0 = torch.randn(n, *config.shape, device=device)
    x0 = x0.contiguous(memory_format=torch.channels_last) if config.channels_last else x0
    y = torch.randint(classes, (n,), device=device) if classes else None
    return x0, 999 * torch.rand(n, device=device), torch.randn(n, *config.text, device=device) if config.text else y


def autocast(config):
    return torch.autocast(config.device, DTYPES[config.amp], enabled=config.amp != "off")


def forward(config, device):
    model, (x, t, y) = network(config, device, inference=True), inputs(config, device)

    def run():
        with torch.no_grad(), autocast(config):
            model(x, t, y)

    return Work(run, config.batch_size, config.batch_size * config.macs, config.amp)


def sampling(config, device):
    """Images from noise with DPM-Solver, as sample.py makes them. Guidance evaluates the network twice."""
    model, (_, _, y) = network(config, device, inference=True), inputs(config, device)
    schedule = diffusion.SCHEDULES[config.schedule]()
    null = torch.zeros(config.text, device=device) if config.text else config.arguments["num_classes"]

    def run():
        with autocast(config):
            diffusion.generate(model, schedule, config.shape, range(config.batch_size), y, null, w=config.cfg,
                               sampler="dpm_solver", steps=config.evaluations, device=device)

    passes = config.batch_size * config.evaluations * (1 if config.cfg == 1 else 2)
    return Work(run, config.batch_size, passes * config.macs, config.amp)


def training(config, device):
    """A step of train.py, from a batch on the device to new weights and their average."""
    model, (random_x0, _, random_y) = network(config, device), inputs(config, device)
    parameters = list(model.parameters())
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, config.lr, config.betas, weight_decay=config.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    schedule = diffusion.SCHEDULES[config.schedule]()

    def run(x0=random_x0, y=random_y):
        with autocast(config):
            loss = schedule.loss(model, x0, y).mean()       # draws times and noise
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grad_norm = get_total_norm([p.grad for p in parameters])
        if not scaler.is_enabled():
            optimizer.grad_scale, optimizer.found_inf = None, (~torch.isfinite(grad_norm)).float()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - config.ema)

    return Work(run, config.batch_size, 3 * config.batch_size * config.macs, config.amp)


WORKS = {"forward": forward, "step": training, "sampling": sampling}


def matrix_product(amp, device):
    """The ceiling: a product of two square matrices in this type."""
    size = CEILING[device.type]
    a, b = torch.randn(2, size, size, device=device).to(DTYPES[amp])
    return Work(lambda: a @ b, 0, size**3, amp)


def loop(config, device):
    """Training steps on random images and on stored ones, and the reading alone -> {name: Work}, warm."""
    dataset, n = config.dataset, config.batch_size
    order = (data.shuffled(len(dataset), 0, step * n, n) for step in itertools.count())
    workers = 0 if isinstance(dataset, data.ImagesInMemory) else config.workers
    batches, generator = dataset.batches(order, device, workers), torch.Generator(device)

    def read():
        images, y = next(batches)
        return dataset.prepare(images, *dataset.draws(n, generator)), y if config.class_cond else None

    def drain():        # what workers have read ahead, while something else was timed, does not count
        for _ in range(2 * workers):
            next(batches)

    step = warm_up(lambda: training(config, device), device)
    step.run(*read())
    calls = max(step.calls, 4 * workers)
    return {"step, random": step,
            "step, stored": replace(step, run=lambda: step.run(*read()), before=drain, calls=calls),
            "reading alone": replace(step, run=read, before=drain, calls=calls, macs=0, peak=None)}


# ---------------------------------------------------------------------------------------------------------------------
# Timing


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device, peak=False):
    """Bytes held now, or (peak) the most since the last such call: by tensors on a GPU, by this process on a CPU.

    None on a CPU whose system does not tell (it is not Linux).
    """
    if device.type == "cuda":
        if not peak:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):
        if not peak:
            ctypes.CDLL(None).malloc_trim(0)                        # what malloc keeps for later is not held
            Path("/proc/self/clear_refs").write_text("5")           # VmHWM starts anew
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0])


def warm_up(make, device):
    """make() -> its Work, after two calls (the first may compile), with its peak memory and the calls of a block."""
    gc.collect()
    held = memory(device)
    work = make()
    memory(device)          # the peak starts anew: what building took besides is not counted
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        work.run()
        synchronize(device)
    work.calls = math.ceil(BLOCK / (time.perf_counter() - start))
    peak = memory(device, peak=True)
    work.peak = None if held is None or peak is None else peak - held
    return work


def alternate(works, repeats, device):
    """Seconds of one call of each work, (len(works), repeats): a block of the first, of the second, .., and again."""
    seconds = [[] for _ in works]
    for _ in range(repeats):
        for work, taken in zip(works, seconds):
            work.before()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(work.calls):
                work.run()
            synchronize(device)
            taken.append((time.perf_counter() - start) / work.calls)
    return seconds


def spread(name, numbers):
    return {name: statistics.median(numbers), f"{name}_min": min(numbers), f"{name}_max": max(numbers)}


def compare(works, repeats, device):
    """{name: Work}, warm -> a row of results for each, and for the ceilings, which are timed with them.

    speed_ratio is images/s over those of the first work, taken block by block.
    """
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


def measure(configs, device):
    """{name: config} -> rows, as they are done. One that does not fit into memory says so, and the rest goes on."""
    config, *_ = configs.values()
    if config.loop:
        yield from compare(loop(config, device), config.repeats, device)
        return
    for part in config.measure:
        torch.compiler.reset()
        works = {}
        for name, setting in configs.items():
            label = f"{name} {part}".strip()
            try:
                works[label] = warm_up(lambda: WORKS[part](setting, device), device)
            except Exception as error:      # OutOfMemoryError, a RuntimeError on a CPU, or train.build's ValueError
                if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                    raise
                yield {"work": label, "error": "out of memory"}
        yield from compare(works, config.repeats, device) if works else []


# ---------------------------------------------------------------------------------------------------------------------
# How alike blocks are


def cka(a, b):
    """Linear centred kernel alignment of two representations (n, p), (n, q) of the same n things: a float in [0, 1].

    |A'B|^2 / (|A'A| |B'B|), columns centred: 1 where one is the other, turned and scaled, 0 where no linear map relates
    them (Kornblith et al., arXiv:1905.00414, section 3).
    """
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    return ((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())).item()


@torch.no_grad()
def block_outputs(model, *inputs):
    """model(*inputs) -> {name of a block: its output (images * tokens, D)}, in the order in which the blocks run.

    Raises ValueError where the blocks of the model do not see the same tokens: it is no U-ViT or DiT.
    """
    found, hooks = {}, []
    for name, module in model.named_modules():
        if re.fullmatch(r"((in_|out_)?blocks\.\d+)|mid_block", name):
            hooks.append(module.register_forward_hook(
                lambda module, inputs, output, name=name: found.update({name: output.flatten(0, -2)})))
    model(*inputs)
    for hook in hooks:
        hook.remove()
    if not found:
        raise ValueError(f"{type(model).__name__}: only the blocks of a U-ViT or a DiT can be compared")
    return found


def block_similarity(path, args, load, device):
    """A checkpoint, with data.load or its like -> names of its blocks, and the CKA of any two, (blocks, blocks)."""
    state = train.read_checkpoint(path)
    config = argparse.Namespace(**state["config"])
    model = train.build(config.model, state["model_args"]).to(device).eval()
    model.load_state_dict(state["ema"])
    dataset, n = load(config.data, args.data_dir or config.data_dir, config.image_size), args.batch_size or 256
    images, y = next(dataset.batches([data.shuffled(len(dataset), 0, 0, n)], device))
    generator, schedule = torch.Generator(device).manual_seed(0), diffusion.SCHEDULES[config.schedule]()
    x0, t = dataset.prepare(images, *dataset.draws(n, generator)), torch.full((n,), args.time, device=device)
    alpha, sigma = schedule.alpha_sigma(args.time)
    x = alpha.item() * x0 + sigma.item() * torch.randn(x0.shape, generator=generator, device=device)
    found = block_outputs(model, x, schedule.model_time(t), y if config.class_cond or dataset.text else None)
    return list(found), torch.tensor([[cka(a, b) for a in found.values()] for b in found.values()])


def draw_similarity(panels, path, cell=24):
    """[(name, (blocks, blocks) in [0, 1]), ..] -> a PNG: a square for each, black 0, white 1, first block top left."""
    sizes = [cell * len(values) for _, values in panels]
    picture = Image.new("L", (sum(sizes) + cell * (len(sizes) - 1), max(sizes) + cell), 255)
    left = 0
    for (name, values), size in zip(panels, sizes):
        square = Image.fromarray((255 * values).round().byte().numpy()).resize((size, size), Image.NEAREST)
        picture.paste(square, (left, cell))
        ImageDraw.Draw(picture).rectangle((left, cell, left + size - 1, cell + size - 1), outline=0)
        ImageDraw.Draw(picture).text((left, cell // 4), name, fill=0)
        left += size + cell
    with train.writing(path):
        picture.save(path)


def compare_blocks(args, device):
    """--cka: prints the similarities of the blocks of each checkpoint, and draws them."""
    panels, load = [], lru_cache(data.load)        # networks of the same data: read once
    for path in args.cka:
        names, values = block_similarity(path, args, load, device)
        print(f"\n{path}\n{'':>14}" + "".join(f"{i:>6}" for i in range(len(names))))
        for i, (name, row) in enumerate(zip(names, values)):
            print(f"{i:>2} {name:<11}" + "".join(f"{value:6.2f}" for value in row))
        panels.append((Path(path).resolve().parent.name, values))
    draw_similarity(panels, args.out)
    print(f"\n{args.out}: black 0, white 1")


# ---------------------------------------------------------------------------------------------------------------------

HEAD = f"{'':>20} {'ms':>10} {'quickest':>10} {'slowest':>10} {'images/s':>10} {'TFLOP/s':>8} {'share':>7} {'GB':>7}"


def title(name, c):
    """A setting in words."""
    options = [key.replace("_", "-") for key in ("compile", "channels_last") if getattr(c, key)]
    options += [f"grad-checkpoint {c.grad_checkpoint}"] if c.grad_checkpoint else []
    words = [f"batch {c.batch_size}", f"amp {c.amp}", *options, *c.model_args]
    if "sampling" in c.measure and not c.loop:
        words += [f"{c.evaluations} evaluations for a sample"] + [f"guidance {c.cfg}"] * (c.cfg != 1)
    return (f"{name} {c.model}, {c.data} {'x'.join(map(str, c.shape))}: {c.parameters / 1e6:.2f} M parameters, "
            f"{c.macs / 1e9:.2f} GMACs an image; {', '.join(words)}").strip()


def line(row):
    """A row of the table."""
    if "error" in row:
        return f"{row['work']:>20} {row['error']:>10}"
    times = " ".join(f"{1e3 * row[key]:10.2f}" for key in ("seconds", "seconds_min", "seconds_max"))
    images = f"{row['images_per_sec']:10.2f}" if row["images"] else " " * 10
    share = f"{row['flops_per_sec'] / 1e12:8.3f} {row['share']:7.1%}" if row["share"] else " " * 16
    peak = f"{row['peak_bytes'] / 1e9:7.2f}" if row["peak_bytes"] and row["images"] else " " * 7
    ratio = "   {speed_ratio:.3f} times as fast ({speed_ratio_min:.3f} to {speed_ratio_max:.3f})"
    return (f"{row['work']:>20} {times} {images} {share} {peak}"
            + (ratio.format(**row) if "speed_ratio" in row else "")).rstrip()


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    device = train.Processes(args.device).device        # on a GPU: TF32 where float32 remains
    if args.cka:
        return compare_blocks(args, device)
    report = dict(device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                  cpu_threads=torch.get_num_threads(), torch=torch.__version__, results=[])
    say = (lambda text: None) if args.json else partial(print, flush=True)
    say(f"{report['device']}, torch {report['torch']}, {report['cpu_threads']} CPU threads")
    argv = [word for word in argv if word != "--papers"]
    rows, source = (ON_GPU, "published") if device.type == "cuda" else (ON_CPU, "the released code on two cores")
    for words, reported in rows if args.papers else [("", "")]:
        names = dict(zip("AB", args.compare)) if args.compare else {"": ""}
        configs = {name: configure(parse([*flags(words), *argv, *flags(setting)])) for name, setting in names.items()}
        say("\n" + "\n".join(title(*pair) for pair in configs.items()))
        say((f"{source}: {reported}\n" if reported else "") + HEAD)
        measured = []
        for row in measure(configs, device):
            say(line(row))
            measured.append(row)
        settings = {name: {key: value for key, value in vars(config).items() if key != "dataset"}
                    for name, config in configs.items()}
        report["results"].append(dict(reported=reported, settings=settings, rows=measured))
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:      # one line that says what, not a stack trace
        sys.exit(f"bench.py: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit("bench.py: interrupted")
