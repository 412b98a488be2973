"""Train a diffusion transformer, a masked autoencoder or a classifier: one loop, on a CPU, one GPU, or many (torchrun).

    python train.py --model uvit_tiny --data shapes                         # a laptop, two minutes, no download
    torchrun --nproc_per_node=8 train.py --model uvit_s2 --data cifar10     # the paper's recipe
    torchrun --nproc_per_node=8 train.py --model uvit_s4 --data photos/     # your images
    python train.py --model fcmae_mini --data cifar10                       # learns without labels; then fine-tune it:
    python train.py --model convnextv2_mini --data cifar10 --init runs/fcmae_mini-cifar10/checkpoint.pt

The first took 91 s on two CPU cores; then 100 of 100 samples showed the class asked for (.ci/endure.py repeats it).
Every default is the recipe for that model and data (in recipes.py): the paper's, where the paper has that data. It is
printed and saved. A run writes --out (default runs/<model>-<data>/): config.json, log.jsonl and its picture log.png,
samples/<step>.png, index.html that shows them, checkpoint.pt and the one before it, previous.pt. Started again with the
same command, it continues where it was.

Whatever is random in step k (order, mirroring, times, noise, dropped labels, masks) is a function of (seed, k), drawn
for the whole batch and sliced by process. So N + M steps equal N, a stop, and M more: to the last bit on a CPU, and on
a GPU up to the order in which its kernels add (--deterministic fixes it). Rounding apart, so do any number of
processes; but dropout and stochastic depth are drawn, and images are mixed, within the images of one backward pass.
"""
import argparse
import contextlib
import copy
import inspect
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import bookkeeping
import convnext
import data
import diffusion
import objectives
import recipes

PASS = 128      # images in a backward pass, at most, where --accumulate does not say otherwise
SHARES = {"warmup": 10, "save_every": 4, "sample_every": 4}     # in a short run, a recipe's value is --steps over this


def parse(argv=None):
    """The command line over the recipe -> argparse.Namespace with a value for every flag."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                epilog="Where no default is given, it is the recipe's for the model and data.")
    yes_no, targets = argparse.BooleanOptionalAction, ["noise", "data", "velocity"]
    add = p.add_argument_group("what is trained on what").add_argument
    add("--model", required=True, metavar="NAME", help=", ".join(recipes.MODELS))
    add("--data", required=True, metavar="NAME_OR_FOLDER", help=f"{', '.join(data.DATASETS)}, or a folder of images "
        "(flat, or one folder for each class), or one written by encode.py")
    add("--data-dir", metavar="DIR", help="where a named data set lies (default data/)")
    add("--image-size", type=int, metavar="PIXELS", help="default: folder 64, shapes 16, cifar10 32 (or 16)")
    add("--flip", action=yes_no, help="mirror half of the images (default: yes, but not those with captions)")
    add("--class-cond", action=yes_no, help="train on the labels (default: the recipe's, or wherever there are any)")
    add("--model-args", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="e.g. width=256 conv=off")
    add("--init", metavar="FILE", help="start a new run with the weights of another (its checkpoint.pt), or of a "
        "release: what fits by name and shape is taken, the rest is named")
    add = p.add_argument_group("how noise is added, and what the network learns").add_argument
    add("--schedule", choices=diffusion.SCHEDULES, help="a DiT with flow is SiT")
    add("--predict", choices=targets, help="what the network answers (default: the schedule's)")
    add("--compare", choices=targets, help="where its error is squared (default: in what it predicts)")
    add("--times", nargs="+", metavar="WORD", help="at which it is trained: uniform (default), logit-normal MEAN STD")
    add("--noise-scale", type=float, metavar="S", help="multiplies the noise, with flow (default 1)")
    add = p.add_argument_group("classifiers; --crop and --drop-path also for autoencoders").add_argument
    add("--crop", type=float, metavar="AREA", help="cut out AREA to 1 of an image, at random (1: take all)")
    add("--rand-augment", type=int, metavar="M", help="two random changes of magnitude M of 10 (0: none)")
    add("--erasing", type=float, metavar="P", help="fill a box with noise, with this probability")
    add("--mixup", type=float, metavar="ALPHA", help="mix pairs of images, with a share from Beta(ALPHA, ALPHA)")
    add("--cutmix", type=float, metavar="ALPHA", help="paste a box of another image; --mixup gets half of the steps")
    add("--smoothing", type=float, metavar="S", help="share of the target that all classes divide evenly")
    add("--drop-path", type=float, metavar="P", help="stochastic depth: rate of the last block")
    add("--layer-decay", type=float, metavar="D", help="a layer learns D times as fast as the next one")
    add("--layer-groups", action=yes_no, help="count three blocks of a stage as one layer")
    add("--freeze", action=yes_no, help="train the last layer alone: a linear probe")
    add("--labels-per-class", type=int, metavar="N", help="train on N images of each class, drawn by --seed (0: all)")
    add = p.add_argument_group("optimisation").add_argument
    add("--steps", type=int, help="training steps in all")
    add("--batch-size", type=int, metavar="N", help="images in a step, over all processes")
    add("--accumulate", type=int, metavar="N", help=f"backward passes in a step (default: of {PASS} images at most)")
    add("--lr", type=float, help="learning rate of AdamW, after the warm-up")
    add("--lr-schedule", choices=["constant", "cosine"], help="after the warm-up; cosine falls to --min-lr at --steps")
    add("--min-lr", type=float, metavar="LR", help="default 0")
    add("--warmup", type=int, metavar="STEPS", help="steps over which the learning rate rises linearly")
    add("--weight-decay", type=float)
    add("--betas", type=float, nargs=2, metavar=("B1", "B2"), help="AdamW's")
    add("--clip-grad", type=float, metavar="NORM", help="largest gradient norm (default 0: no limit, as in the papers)")
    add("--ema", type=float, nargs="+", metavar="DECAY", help="of the averaged weights (default 0.9999)")
    add("--ema-warmup", action=yes_no, help="use (1 + step) / (10 + step) while that is below DECAY (default: yes)")
    add("--label-dropout", type=float, metavar="P", help="share of labels or captions that are hidden, for guidance")
    add = p.add_argument_group("machine").add_argument
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--amp", choices=["bf16", "fp16", "off"], help="autocast (default: off on cpu; bf16, or fp16 on older GPUs)")
    add("--compile", action=yes_no, help="torch.compile the model: a minute at the start, then faster steps on a GPU")
    add("--grad-checkpoint", nargs="?", type=int, const=1, metavar="K", help="less memory, slower: recompute every "
        "K-th block in the backward pass (no K: every block; default 0: none)")
    add("--deterministic", action=yes_no, help="two runs agree to the last bit on a GPU too, at some cost in speed")
    add("--workers", type=int, metavar="N", help="reading processes, for data too large for memory (default 4)")
    add = p.add_argument_group("run").add_argument
    add("--out", metavar="FOLDER", help="default runs/<model>-<data>")
    add("--seed", type=int, help="default 0")
    add("--log-every", type=int, metavar="STEPS", help="default 100")
    add("--save-every", type=int, metavar="STEPS", help="default 5000")
    add("--sample-every", type=int, metavar="STEPS", help="draw a grid; classifiers also measure their accuracy on "
        "held-out images (default 10000; 0: never)")
    add = p.add_argument_group("sampling: sample.py's defaults for this run, and the grids'").add_argument
    add("--sampler", choices=diffusion.SAMPLERS)
    add("--sample-steps", type=int, metavar="N", help="of the sampler")
    add("--cfg", type=float, metavar="W", help="guidance weight of eps_u + W (eps_c - eps_u) (default 1: none)")
    add("--cfg-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="times that are guided (default 0 1: all)")
    add("--clip-x0", action=yes_no, help="limit the predicted image to [-1, 1] while sampling")

    config = p.parse_args(argv)
    if config.data not in data.DATASETS:
        config.data = str(Path(config.data))        # "photos/" and "photos" are one
    row, scaled = recipes.recipe(config.model, data.kind(config.data), config.schedule), []
    for flag in recipes.FLAGS - row.keys():
        if getattr(config, flag) is not None:
            raise ValueError(f"--{flag.replace('_', '-')}: {config.model} has no use for it")
    config.model_args = row.pop("model_args", []) + config.model_args
    short = config.steps is not None and config.steps < row["steps"]
    for flag, value in row.items():
        if getattr(config, flag) is None:
            setattr(config, flag, value)
            if flag in SHARES and short and value > (most := max(1, config.steps // SHARES[flag])):
                scaled.append(f"--{flag.replace('_', '-')} {value} -> {most}")
                setattr(config, flag, most)
    bookkeeping.check(vars(config))
    if "schedule" in row:
        recipes.schedule_of(vars(config))       # refuses what does not fit together
    if scaled and os.environ.get("RANK", "0") == "0":
        print(f"scaled to a run of {config.steps} steps: {', '.join(scaled)}")
    config.device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.amp is None:      # before Ampere, bf16 is emulated and slow
        bf16 = config.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        config.amp = "off" if config.device == "cpu" else "bf16" if bf16 else "fp16"
    config.out = config.out or f"runs/{config.model}-{Path(config.data).resolve().name}"
    return config


# ---------------------------------------------------------------------------------------------------------------------
# A step: what it is trained on, and what it changes


def seed_of(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def chosen(dataset, config):
    """The indices of the images to train on: all, or --labels-per-class of each class, drawn by --seed."""
    if not config.labels_per_class:
        return np.arange(len(dataset))
    order = np.random.default_rng(config.seed).permutation(len(dataset))
    labels = dataset.labels.numpy()[order]
    return np.concatenate([order[labels == label][:config.labels_per_class] for label in np.unique(labels)])


def passes_of(dataset, objective, config, here, start):
    """passes(step) for steps from start: an iterator of (x, y, *draws), one for each backward pass of this process."""
    n, share, generator = config.batch_size, config.batch_size // here.world, torch.Generator(here.device)
    parts = np.array_split(np.arange(here.rank * share, (here.rank + 1) * share), config.accumulate)
    parts = [slice(part[0], part[-1] + 1) for part in parts]        # rows of the batch, for each pass
    images = chosen(dataset, config)

    def places(step):
        order = data.shuffled(len(images), config.seed, step * n, n)
        order[:, 0] = images[order[:, 0]]
        return order

    order = (order[rows] for order in map(places, range(start, config.steps)) for rows in parts)
    batches = dataset.batches(order, here.device, config.workers)

    def passes(step):
        # Whatever is random in this step is drawn for the whole batch; this process uses its rows.
        generator.manual_seed(seed_of(config.seed, step))
        draws = objective.draw(n, dataset.shape, dict(generator=generator, device=here.device))
        augment = dataset.draws(n, generator)
        for rows in parts:
            images, y = next(batches)
            x = dataset.prepare(images, *(draw[rows] for draw in augment))
            torch.manual_seed(seed_of(config.seed, step, rows.start + 1))       # for the network's own dropout
            yield x, y, *(draw[rows] for draw in draws)

    return passes


def learning_rate(config, step):
    """The rate in step 0, 1, ..: it rises linearly in the warm-up; then it stays, or falls by half a cosine."""
    if step < config.warmup or config.lr_schedule == "constant":
        return config.lr * min(1, (step + 1) / max(1, config.warmup))
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


def groups(model, config):
    """The parameters to train, as AdamW's groups: a group has a weight decay, and a factor of the learning rate.

    One group, but for the networks of convnext.py: their layers learn at different rates, and some weights never decay.
    """
    factors, decayed, found = {}, dict(model.named_parameters()), {}
    if isinstance(model, convnext.ConvNeXt):
        factors = convnext.rates(model, config.layer_decay, "group" if config.layer_groups else "single")
    if isinstance(model, (convnext.ConvNeXt, convnext.FCMAE)):
        decayed = convnext.decayed(model)
    for name, p in model.named_parameters():
        if p.requires_grad:     # not JiT's positions, nor what --freeze holds
            found.setdefault((factors.get(name, 1.0), name in decayed), []).append(p)
    return [dict(params=parameters, factor=factor, weight_decay=config.weight_decay * decays)
            for (factor, decays), parameters in found.items()]


class Learner:
    """What training changes: a network, its averages, AdamW, and fp16's scaler. step() trains one step.

    objective has loss(model, x, y, *draws) -> (N,): a schedule of diffusion.py, or one of objectives.py. here is the
    Processes over which gradients are averaged. config is a namespace with batch_size, accumulate, lr, lr_schedule,
    warmup, betas, weight_decay, clip_grad, ema, ema_warmup, amp, compile and grad_checkpoint; see also `groups` and
    `learning_rate`.
    """

    def __init__(self, model, objective, config, here):
        self.model, self.objective, self.config, self.share = model, objective, config, config.batch_size // here.world
        self.parameters = list(model.parameters())
        self.trained = [p for p in self.parameters if p.requires_grad]      # not JiT's positions
        self.averages = {str(decay): copy.deepcopy(model).eval().requires_grad_(False) for decay in config.ema}
        self.optimizer = torch.optim.AdamW(groups(model, config), config.lr, config.betas, fused=True)
        kind, half = here.device.type, torch.float16 if config.amp == "fp16" else torch.bfloat16
        self.scaler = torch.amp.GradScaler(kind, enabled=config.amp == "fp16")
        self.autocast = torch.autocast(kind, half, enabled=config.amp != "off")
        if config.compile:
            if here.distributed and config.grad_checkpoint:     # torch 2.6 can not split such a graph between buckets
                torch._dynamo.config.optimize_ddp = False
            model.compile()
        self.network = model
        if here.distributed:    # static_graph saves bookkeeping, but fails (torch 2.15) if the first pass has no sync
            renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters       # torch 2.14
            constant = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}      # as all our buffers are
            self.network = DistributedDataParallel(model, gradient_as_bucket_view=True, **constant,
                                                   static_graph=config.accumulate == 1)

    def step(self, step, passes):
        """Train on passes (x, y, *draws) of the objective -> (loss, gradient norm, bad), on the device.

        bad is 1 where the norm is not finite, and then weights and moments stay as they were; else 0.
        """
        config, step_loss = self.config, 0
        for i, (x, y, *draws) in enumerate(passes, 1):
            if self.network is not self.model:      # processes average their gradients in the last pass alone
                self.network.require_backward_grad_sync = i == config.accumulate
            with self.autocast:
                loss = self.objective.loss(self.network, x, y, *draws).mean() / (self.share / len(x))
            self.scaler.scale(loss).backward()
            step_loss = step_loss + loss.detach()

        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(config, step)
        self.scaler.unscale_(self.optimizer)
        grad_norm = get_total_norm([p.grad for p in self.trained])
        if config.clip_grad:
            clip_grads_with_norm_(self.trained, config.clip_grad, grad_norm)
        bad = (~torch.isfinite(grad_norm)).float()
        if not self.scaler.is_enabled():
            # as a scaler does: a fused optimizer does nothing where found_inf is 1, and the answer stays on the device
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for decay, average in zip(config.ema, self.averages.values()):
                decay = min(decay, (1 + step) / (10 + step)) if config.ema_warmup else decay
                torch._foreach_lerp_(list(average.parameters()), self.parameters, 1 - decay)
        return step_loss, grad_norm, bad

    def state(self):
        """What `load` needs. "ema" is the first average, which sample.py uses."""
        averages = {decay: average.state_dict() for decay, average in self.averages.items()}
        return dict(model=self.model.state_dict(), ema=next(iter(averages.values())), averages=averages,
                    optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())

    def begin(self, path):
        """Start from a file of weights (see `read_weights`): take what fits by name and shape -> a line that says what.

        A classifier takes an autoencoder's encoder. Raises ValueError where nothing fits, or numbers are not finite.
        """
        weights, _ = recipes.read_weights(path)
        if isinstance(self.model, convnext.ConvNeXt):
            weights = convnext.dense(weights)
        own, fixed = dict(self.model.named_parameters()), dict(self.model.named_buffers())
        weights = {name: weight for name, weight in weights.items() if name not in fixed}      # made for an image size
        taken = {name: weights[name] for name, p in own.items() if name in weights and weights[name].shape == p.shape}
        if not taken:
            raise ValueError(f"--init {path}: nothing in it fits the network, by name and shape; it has "
                             f"{', '.join([*weights][:3])}, ..")
        if infinite := [name for name, weight in taken.items() if not weight.isfinite().all()]:
            raise ValueError(f"--init {path}: {infinite[0]} has NaN or infinite numbers")
        for network in (self.model, *self.averages.values()):
            network.load_state_dict(taken, strict=False)
        new, unused = ([f"{name} {tuple(weight.shape)}" for name, weight in some.items() if name not in taken]
                       for some in (own, weights))
        return (f"--init {path}: took {len(taken)} of {len(own)} tensors; new: {', '.join(new) or 'none'}; "
                f"not used: {', '.join(unused) or 'none'}")

    def load(self, state):
        """Continue from a state. An average that it lacks starts as "ema"; AdamW's settings stay those of config."""
        self.model.load_state_dict(state["model"])
        for decay, average in self.averages.items():
            average.load_state_dict(state.get("averages", {}).get(decay, state["ema"]))
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": settings})
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


# ---------------------------------------------------------------------------------------------------------------------
# The run, from the command line to the last step


def settle(config, dataset, here):
    """Complete config by what depends on data and processes -> the null label, the empty text's features, or None.

    Raises ValueError where the data or the processes can not give what is asked.
    """
    share = config.batch_size // here.world
    if share * here.world != config.batch_size:
        raise ValueError(f"--batch-size {config.batch_size} does not divide by {here.world} processes; "
                         f"{max(1, share) * here.world} and {(max(1, share) + 1) * here.world} do")
    config.accumulate = config.accumulate or math.ceil(share / PASS)
    if config.accumulate > share:
        raise ValueError(f"--accumulate {config.accumulate}: a process has only {share} images of a batch")
    dataset.flip = config.flip = config.flip and dataset.flip
    config.class_cond = dataset.num_classes > 0 if config.class_cond is None else config.class_cond
    if config.class_cond and not dataset.num_classes:
        raise ValueError(f"--class-cond: {config.data} has no labels (a folder for each class would give them)")
    dataset.labels = dataset.labels if config.class_cond else None
    config.label_dropout = config.label_dropout or 0.0 if config.class_cond or dataset.text else 0.0
    if config.cfg not in (None, 1) and not config.label_dropout:
        raise ValueError(f"--cfg {config.cfg}: guidance needs labels, and a null label trained by --label-dropout 0.1")
    null = torch.tensor(dataset.num_classes) if config.class_cond else dataset.null
    return null.to(here.device) if config.label_dropout else None


def main(argv=None):
    config = parse(argv)
    here = bookkeeping.Processes(config.device)
    lead, out = here.rank == 0, Path(config.out)
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"       # read when the first matrix is multiplied
        torch.use_deterministic_algorithms(True)
    with here.first():
        dataset = data.load(config.data, config.data_dir, config.image_size)
    identity = dataset.identity()
    null = settle(config, dataset, here)
    arguments = recipes.model_arguments(config, dataset)
    torch.manual_seed(config.seed)
    model = recipes.build(config.model, {**arguments, "checkpoint": config.grad_checkpoint}).to(here.device)
    if config.freeze:
        model.requires_grad_(False).head.requires_grad_(True)
    objective = objectives.of(recipes.family(config.model))(config, dataset, model, null)
    learner = Learner(model, objective, config, here)

    with bookkeeping.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with bookkeeping.lock(out) if lead else contextlib.nullcontext(), here.catching_signals():
        step = skipped = stop = 0
        if state := bookkeeping.resume(out, config, arguments, identity, recipes.COMMON, lead):
            try:
                learner.load(state)
                step, skipped = state["step"], state["skipped"]
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{out}: its checkpoint does not fit this version of {config.model} or train.py "
                                 f"({data.one_line(error)}); give another --out") from None
            del state
        elif config.init:
            fits = learner.begin(config.init)
            if lead:
                print(fits)
        if here.highest(step) != -here.highest(-step):
            raise ValueError(f"the processes found different checkpoints in {out}: all machines must see one folder")
        if step >= config.steps:
            if lead:
                print(f"{out} is at step {step} already; for more give a larger --steps")
            return here.close()
        show = None
        if lead:
            with bookkeeping.writing(out):
                (out / "config.json").write_text(json.dumps(vars(config), indent=2) + "\n")
            print("\n".join(f"{key:>16} {value}" for key, value in vars(config).items() if value is not None))
            print(f"{config.model}({', '.join(f'{key}={value}' for key, value in arguments.items())}): "
                  f"{sum(p.numel() for p in learner.parameters) / 1e6:.2f} M parameters; {config.data}: "
                  f"{len(chosen(dataset, config))} images {dataset.shape}, {arguments.get('num_classes') or 'no'} "
                  f"classes; {here.world} x {here.device}; "
                  + (f"continues after step {step}" if step else f"a new run in {out}"), flush=True)
            try:
                show = objective.viewer(here.device, learner.autocast) if config.sample_every else None
            except (ValueError, OSError) as error:      # no autoencoder, no held-out images
                print(f"--sample-every: nothing to show: {error}", file=sys.stderr)
        about = dict(config=vars(config), model_args=arguments, shape=list(dataset.shape), identity=identity,
                     class_names=list(dataset.class_names), encoding=dataset.encoding, null=null)
        passes = passes_of(dataset, objective, config, here, step)
        log, average = bookkeeping.Log(out, config, here, step, skipped), next(iter(learner.averages.values()))

        while step < config.steps and not stop:
            signalled = here.ask()
            loss, grad_norm, bad = learner.step(step, passes(step))
            log.add(loss, bad)
            step += 1

            stop = signalled()      # a signal to one process stops all at the same step
            saves = step % config.save_every == 0 or step == config.steps or stop
            samples = config.sample_every and (step % config.sample_every == 0 or step == config.steps)
            if step % config.log_every == 0 or saves or samples:
                log.report(step, learning_rate(config, step - 1), grad_norm)
            if saves and lead:
                bookkeeping.write_checkpoint(dict(about, **learner.state(), step=step, skipped=log.skipped),
                                             out / "checkpoint.pt")
            if samples and show:
                log.show(step, *show(average))
            if lead and (samples or saves):
                bookkeeping.draw_log(out / "log.jsonl", out / "log.png")
                bookkeeping.draw_page(out)
            if log.step == step:
                log.clock = time.perf_counter()     # the time of saving and sampling is not the training's
        log.bar.close()
        here.close()
    if stop:
        sys.exit(f"train.py: stopped by {signal.Signals(stop).name} after step {step}, which is saved; "
                 "the same command continues" if lead else 1)
    if lead:
        print(f"done: {out / 'checkpoint.pt'}" + (f", {out / 'samples'}" if config.sample_every else ""))


if __name__ == "__main__":
    bookkeeping.command("train.py", main, "interrupted; the same command continues after the last checkpoint")
