"""Train a diffusion transformer: one loop, on a CPU, one GPU, or many under torchrun.

    python train.py --model uvit_tiny --data shapes                         # a laptop, minutes, no download
    torchrun --nproc_per_node=8 train.py --model uvit_s2 --data cifar10     # the paper's recipe
    torchrun --nproc_per_node=8 train.py --model uvit_s4 --data photos/     # your images

The first took 343 s on two CPU cores; then 100 of 100 samples showed the class asked for (.ci/endure.py repeats it).
Every default is the recipe for that model and data (RECIPES): the paper's, where the paper has that data. What is used
is printed and saved. A run writes --out (default runs/<model>-<data>/): config.json, log.jsonl, samples/<step>.png,
checkpoint.pt and the one before it, previous.pt. Started again with the same command, it continues where it was.

Whatever is random in step k (order, mirroring, times, noise, dropped labels) is a function of (seed, k), drawn for the
whole batch and sliced by process. So N + M steps equal N, a stop, and M more: to the last bit on a CPU, and on a GPU up
to the order in which its kernels add (--deterministic fixes it). Rounding apart, so do any number of processes.
"""
import argparse
import contextlib
import copy
import inspect
import json
import math
import os
import resource
import signal
import sys
import time
import warnings
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

import data
import diffusion
import dit
import encode
import jit
import udit
import unet
import uvit

MODELS = {**uvit.MODELS, **dit.MODELS, **udit.MODELS, **unet.MODELS, **jit.MODELS}
NETWORKS = {"uvit": uvit.UViT, "dit": dit.DiT, "udit": udit.UDiT, "unet": unet.UNet, "jit": jit.JiT}

# ---------------------------------------------------------------------------------------------------------------------
# The recipes: a row for each model family and data set, and what single models have otherwise. "folder" serves every
# folder of images, and named data that a family has no row for. An encoded folder has the row of what it looks like:
# imagenet256 (labels), imagenet512 (labels, larger than 32 x 32), mscoco256 (captions).

# U-ViT, arXiv:2209.12152, appendix B and the released code
UVIT = dict(batch_size=128, steps=500_000, warmup=5000, lr=2e-4, weight_decay=0.03, betas=[0.99, 0.99], schedule="vp",
            class_cond=False, label_dropout=0.0, sampler="euler_maruyama", sample_steps=1000)
LARGE = dict(UVIT, batch_size=1024, class_cond=True, sampler="dpm_solver", sample_steps=50)
LATENT = dict(LARGE, schedule="sd", label_dropout=0.1, sampler="dpm_solver++")
TEXT = dict(LATENT, batch_size=256, steps=1_000_000, betas=[0.9, 0.9], class_cond=False, cfg=2.0, flip=False)
# DiT, arXiv:2212.09748, section 4; U-DiT, arXiv:2405.02730, section 5. With --schedule flow or gvp, SiT,
# arXiv:2401.08740, which samples otherwise
DIT = dict(batch_size=256, steps=400_000, warmup=0, lr=1e-4, weight_decay=0.0, betas=[0.9, 0.999], schedule="ddpm",
           class_cond=None, label_dropout=0.1, sampler="ddpm", sample_steps=250)
SIT, SIT_SHAPES = dict(sampler="euler_maruyama", sample_steps=250), dict(sampler="heun", sample_steps=25)
# JiT, arXiv:2511.13720, and its released code: 600 epochs of ImageNet's pixels, which are a folder of images
JIT = dict(batch_size=1024, steps=750_600, warmup=6255, lr=2e-4, weight_decay=0.0, betas=[0.9, 0.95], schedule="flow",
           predict="data", compare="velocity", times=["logit-normal", 0.8, 0.8], class_cond=None, label_dropout=0.1,
           ema=[0.9999, 0.9996], ema_warmup=False, sampler="heun", sample_steps=50, cfg_interval=[0.0, 0.9])
# Ours: minutes on two CPU cores; and for own images, a sampler whose first pictures have the colours of the data
TINY = dict(batch_size=64, steps=10_000, warmup=100, lr=2e-3, weight_decay=0.0, betas=[0.9, 0.99], log_every=50,
            sample_every=500, save_every=500)
SHAPES = dict(TINY, steps=5000, lr=3e-3, class_cond=True, label_dropout=0.1, sampler="ddpm", sample_steps=100,
              clip_x0=True)
OWN = dict(class_cond=None, label_dropout=0.1, sampler="ddpm", sample_steps=100, clip_x0=True)
RECIPES = {
    ("uvit", "cifar10"): dict(UVIT, warmup=2500, betas=[0.99, 0.999]),
    ("uvit", "celeba64"): UVIT,
    ("uvit", "imagenet64"): dict(LARGE, steps=300_000, lr=3e-4),
    ("uvit", "imagenet256"): dict(LATENT, cfg=1.4),
    ("uvit_l2", "imagenet256"): dict(steps=300_000, schedule="vp", label_dropout=0.15, sampler="dpm_solver"),
    ("uvit", "imagenet512"): dict(LATENT, cfg=1.7),
    ("uvit_l4", "imagenet512"): dict(schedule="vp", label_dropout=0.15, sampler="dpm_solver"),
    ("uvit", "mscoco256"): TEXT,
    ("uvit", "folder"): dict(UVIT, warmup=2500, betas=[0.99, 0.999], **OWN),
    ("uvit", "shapes"): dict(SHAPES, lr=4e-3, weight_decay=0.03, schedule="vp"),
    **{(name, size): dict(DIT, class_cond=True, cfg=1.5)
       for name in ("dit", "udit") for size in ("imagenet256", "imagenet512")},
    **{(name, "folder"): dict(DIT, **OWN) for name in ("dit", "udit", "unet")},
    ("dit", "shapes"): dict(SHAPES, steps=4000, schedule="ddpm"),
    ("udit", "shapes"): dict(SHAPES, batch_size=32, steps=1500, schedule="ddpm"),
    # U-Net: IDDPM's, arXiv:2102.09672, but for its betas and dropout; ADM's, arXiv:2105.05233, which DiT took over
    ("unet", "cifar10"): dict(DIT, batch_size=128, steps=500_000, class_cond=False, label_dropout=0.0,
                              sample_steps=1000),
    ("unet", "imagenet256"): dict(LATENT, cfg=1.4),         # U-ViT's, which is compared with it in this setting
    ("unet", "mscoco256"): TEXT,
    ("unet", "shapes"): dict(SHAPES, steps=2000, lr=4e-3, weight_decay=0.03, schedule="vp"),
    ("jit", "folder"): JIT,
    **{(f"{name}_tiny", "folder"): TINY for name in ("uvit", "dit", "udit", "unet", "jit")},
    **{(f"jit_{size}16", "folder"): dict(cfg=cfg) for size, cfg in [("b", 3.0), ("l", 2.4), ("h", 2.2)]},
    **{(f"jit_{size}32", "folder"): dict(cfg=cfg, noise_scale=2.0)          # at 512 x 512 pixels
       for size, cfg in [("b", 3.0), ("l", 2.5), ("h", 2.3)]},
    ("jit", "shapes"): {**SHAPES, **SIT_SHAPES, "schedule": "flow", "predict": "data", "compare": "velocity",
                        "times": ["logit-normal", 0.8, 0.8]},
}
COMMON = dict(predict=None, compare=None, times=["uniform"], noise_scale=1.0, flip=True, ema=[0.9999], ema_warmup=True,
              clip_grad=0.0, cfg=1.0, cfg_interval=[0.0, 1.0], clip_x0=False, log_every=100, sample_every=10_000,
              save_every=5000, seed=0, workers=4, compile=False, grad_checkpoint=0, deterministic=False)
YES_NO = {"yes": True, "on": True, "true": True, "1": True, "no": False, "off": False, "false": False, "0": False}
PASS = 128      # images in a backward pass, at most, where --accumulate does not say otherwise
SHARES = {"warmup": 10, "save_every": 4, "sample_every": 4}     # in a short run, a recipe's value is --steps over this


def family(model):
    """ "uvit_s2" -> "uvit", the key of RECIPES and NETWORKS. Raises ValueError on an unknown model."""
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; choose from {', '.join(MODELS)}")
    return model.split("_")[0]


def recipe(model, dataset, schedule=None):
    """Values for a model and data set, {flag: value}; schedule replaces the row's. Raises ValueError as family."""
    kind = family(model)
    row = {**COMMON, **RECIPES.get((kind, dataset), RECIPES[kind, "folder"]), **RECIPES.get((model, dataset), {})}
    if dataset == "latents" or dataset in encode.ENCODINGS:
        row["clip_x0"] = False
    if schedule in ("flow", "gvp") and row["schedule"] != "flow":
        row.update(SIT_SHAPES if dataset == "shapes" else SIT)
    return {**row, "schedule": schedule or row["schedule"]}


def parse(argv=None):
    """The command line over the recipe -> argparse.Namespace with a value for every flag."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                epilog="Where no default is given, it is the recipe's for the model and data.")
    yes_no, targets = argparse.BooleanOptionalAction, ["noise", "data", "velocity"]
    add = p.add_argument_group("what is trained on what").add_argument
    add("--model", required=True, metavar="NAME", help=", ".join(MODELS))
    add("--data", required=True, metavar="NAME_OR_FOLDER", help=f"{', '.join(data.DATASETS)}, or a folder of images "
        "(flat, or one folder for each class), or one written by encode.py")
    add("--data-dir", metavar="DIR", help="where a named data set lies (default data/)")
    add("--image-size", type=int, metavar="PIXELS", help="default: folder 64, shapes 16, cifar10 32 (or 16)")
    add("--flip", action=yes_no, help="mirror half of the images (default: yes, but not those with captions)")
    add("--class-cond", action=yes_no, help="train on the labels (default: the recipe's, or wherever there are any)")
    add("--model-args", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="e.g. width=256 conv=off")
    add = p.add_argument_group("how noise is added, and what the network learns").add_argument
    add("--schedule", choices=diffusion.SCHEDULES, help="a DiT with flow is SiT")
    add("--predict", choices=targets, help="what the network answers (default: the schedule's)")
    add("--compare", choices=targets, help="where its error is squared (default: in what it predicts)")
    add("--times", nargs="+", metavar="WORD", help="at which it is trained: uniform (default), logit-normal MEAN STD")
    add("--noise-scale", type=float, metavar="S", help="multiplies the noise, with flow (default 1)")
    add = p.add_argument_group("optimisation").add_argument
    add("--steps", type=int, help="training steps in all")
    add("--batch-size", type=int, metavar="N", help="images in a step, over all processes")
    add("--accumulate", type=int, metavar="N", help=f"backward passes in a step (default: of {PASS} images at most)")
    add("--lr", type=float, help="learning rate of AdamW, constant after the warm-up")
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
    add("--sample-every", type=int, metavar="STEPS", help="default 10000; 0 draws no grids")
    add = p.add_argument_group("sampling: sample.py's defaults for this run, and the grids'").add_argument
    add("--sampler", choices=diffusion.SAMPLERS)
    add("--sample-steps", type=int, metavar="N", help="of the sampler")
    add("--cfg", type=float, metavar="W", help="guidance weight of eps_u + W (eps_c - eps_u) (default 1: none)")
    add("--cfg-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="times that are guided (default 0 1: all)")
    add("--clip-x0", action=yes_no, help="limit the predicted image to [-1, 1] while sampling")

    config = p.parse_args(argv)
    if config.data not in data.DATASETS:
        config.data = str(Path(config.data))        # "photos/" and "photos" are one
    scaled = []
    for flag, value in recipe(config.model, data.kind(config.data), config.schedule).items():
        if getattr(config, flag) is None:
            setattr(config, flag, value)
            if flag in SHARES and config.steps and value > (most := max(1, config.steps // SHARES[flag])):
                scaled.append(f"--{flag.replace('_', '-')} {value} -> {most}")
                setattr(config, flag, most)
    data.check(vars(config))
    if scaled and os.environ.get("RANK", "0") == "0":
        print(f"scaled to a run of {config.steps} steps: {', '.join(scaled)}")
    config.device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.amp is None:      # before Ampere, bf16 is emulated and slow
        bf16 = config.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        config.amp = "off" if config.device == "cpu" else "bf16" if bf16 else "fp16"
    config.out = config.out or f"runs/{config.model}-{Path(config.data).resolve().name}"
    return config


# ---------------------------------------------------------------------------------------------------------------------
# From the configuration to what is trained


def schedule_of(config):
    """The schedule of a configuration, a dict (an older one lacks keys). Raises ValueError where values do not fit."""
    kind, *numbers = words = config.get("times", ["uniform"])
    try:
        times = tuple(float(number) for number in numbers) or None
        if {"uniform": 0, "logit-normal": 2}.get(kind) != len(numbers):
            raise ValueError
    except ValueError:
        raise ValueError(f"--times {' '.join(map(str, words))}: must be uniform, or logit-normal MEAN STD") from None
    return diffusion.SCHEDULES[config["schedule"]](predict=config.get("predict"), compare=config.get("compare"),
                                                   times=times, noise_scale=config.get("noise_scale", 1.0))


def parse_argument(item, known):
    """ "width=256" -> ("width", 256): of the type of the default that this argument has, {name: inspect.Parameter}.

    An unknown one stays text, since `build` says which there are. Raises ValueError on text of another type.
    """
    key, equals, text = item.partition("=")
    default = known[key].default if key in known else ""
    if not equals:
        raise ValueError(f"--model-args {item}: expected KEY=VALUE")
    try:
        if isinstance(default, str):
            return key, text
        if isinstance(default, bool):
            return key, YES_NO[text.lower()]
        kind, parts = (int, text.strip("()[]").split(",")) if isinstance(default, tuple) else (type(default), [text])
        numbers = tuple(kind(part) for part in parts)
        if not all(0 <= number < math.inf for number in numbers):
            raise ValueError
    except (ValueError, KeyError):
        raise ValueError(f"--model-args {item}: expected a value like {key}={default}") from None
    return key, numbers if isinstance(default, tuple) else numbers[0]


def model_arguments(config, dataset):
    """Arguments of the model's constructor: the data's shape, and its classes or text; then --model-args."""
    known = inspect.signature(NETWORKS[family(config.model)]).parameters
    arguments = dict(image_size=dataset.shape[1], in_channels=dataset.shape[0], null_class=config.label_dropout > 0,
                     num_classes=dataset.num_classes if config.class_cond else 0)
    if dataset.text:
        arguments.update(text_tokens=dataset.text[0], text_dim=dataset.text[1])
    for item in config.model_args:
        key, value = parse_argument(item, known)
        if key in ("image_size", "in_channels", "num_classes", "null_class", "text_tokens", "text_dim", "checkpoint"):
            raise ValueError(f"--model-args {item}: {key} follows from the data, --class-cond, --label-dropout and "
                             "--grad-checkpoint")
        arguments[key] = value
    if "learn_sigma" in known and known["learn_sigma"].default and config.schedule != "ddpm":
        arguments.setdefault("learn_sigma", False)      # only DDPM's loss trains a variance
    return arguments


def build(name, arguments):
    """A model of MODELS. Raises ValueError on an unknown name or argument, or values that do not fit together."""
    known = inspect.signature(NETWORKS[family(name)]).parameters
    if "text_dim" in arguments and "text_dim" not in known:
        raise ValueError(f"{name} takes no text, but the data has captions; choose a uvit or a unet")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # PyTorch only warns of weights without elements
            model = MODELS[name](**arguments)
        if empty := [key for key, weight in model.named_parameters() if not weight.numel()]:
            raise TypeError(f"{empty[0]} would have no elements")
    except (TypeError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"{name}: {error}; its arguments are {', '.join(known)}") from None
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Processes, checkpoints, logs


class Processes:
    """Where this process stands: rank and world size (0 of 1 without torchrun), its device, and the last signal."""

    def __init__(self, device):
        self.distributed = "RANK" in os.environ
        if self.distributed and not {"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise ValueError("RANK is set without WORLD_SIZE, MASTER_ADDR, MASTER_PORT: use torchrun, or unset RANK")
        self.rank, self.world = (int(os.environ[v]) for v in ("RANK", "WORLD_SIZE")) if self.distributed else (0, 1)
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cpu")
        if device == "cuda":
            if self.local >= torch.cuda.device_count():
                raise ValueError(f"process {self.local} of this machine has no GPU: {torch.cuda.device_count()} found; "
                                 "start fewer processes, or use --device cpu")
            self.device = torch.device("cuda", self.local)
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")      # TF32 where float32 remains
        if self.distributed:        # two hours: the others wait while one lists or downloads the data
            gpu = dict(backend="cpu:gloo,cuda:nccl", device_id=self.device) if device == "cuda" else {}
            dist.init_process_group(**{"backend": "gloo", **gpu}, timeout=timedelta(hours=2))
        self.signal = 0

    @contextlib.contextmanager
    def catching_signals(self):
        """SIGTERM, SIGHUP and ctrl-C only set a flag, so that a step can end; ctrl-C twice still ends at once."""
        def remember(number, frame):
            if self.signal == number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = number
        found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
        try:
            for number, handler in found.items():
                if handler != signal.SIG_IGN:       # nohup ignores SIGHUP
                    signal.signal(number, remember)
            yield
        finally:
            for number, handler in found.items():
                signal.signal(number, handler)

    def highest(self, number=0):
        """The highest of all processes' numbers, the same on each. All wait here for the last (but not for a GPU)."""
        highest = torch.tensor(number)          # on the CPU, over gloo
        if self.distributed:
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    @contextlib.contextmanager
    def first(self):
        """Let one process of each machine through ahead of the others, to download what all need."""
        if self.local:
            self.highest()
        yield
        if not self.local:
            self.highest()

    def close(self):
        self.highest()      # nobody leaves while another still writes: torchrun would end it
        if self.distributed:
            dist.destroy_process_group()


def write_checkpoint(state, path):
    """Write to a temporary file, then rename: at every moment a whole checkpoint.pt or previous.pt exists."""
    temporary = path.with_suffix(".tmp")
    try:
        with data.writing(path), open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{error}{'; the checkpoint before it is whole' if path.exists() else ''}") from None
    if path.exists():
        os.replace(path, path.with_name("previous.pt"))
    os.replace(temporary, path)


class Damaged(ValueError):
    """A checkpoint that is torn or altered."""


def read_checkpoint(path):
    """A checkpoint of train.py, after its checksums were verified. Its tensors are the file's pages, on the CPU.

    Raises FileNotFoundError, Damaged where it is torn or altered, ValueError where it is not a checkpoint of train.py.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (MemoryError, OSError):      # the machine's fault, not the file's
        raise
    except Exception as error:      # whatever zipfile, pickle and torch make of arbitrary bytes
        raise Damaged(f"{path}: damaged, or not a checkpoint ({data.one_line(error) or repr(error)})") from None
    parts = state if isinstance(state, dict) else {}
    for part, keys in [(parts, "model ema step config model_args shape class_names encoding null"),
                       (parts.get("config"), "model data schedule sampler sample_steps cfg clip_x0"),
                       (parts.get("model_args"), "image_size in_channels num_classes null_class")]:
        if not isinstance(part, dict) or not set(keys.split()) <= part.keys():
            raise ValueError(f"{path}: not a checkpoint of train.py, or of another version of it; give a file of "
                             "weights alone to sample.py --weights")
    return state


def resume(out, config, arguments, identity, lead):
    """The state to continue from, or None in a new folder. A damaged checkpoint is named, put aside, and not used.

    What changed since, in the configuration and the data (see Images.identity), is printed. Raises ValueError where the
    folder holds a run of another model, schedule or classes, or damaged checkpoints alone.
    """
    damaged = list(out.glob("*.damaged"))
    for path in (out / "checkpoint.pt", out / "previous.pt"):
        try:
            state = read_checkpoint(path)
            break
        except FileNotFoundError:
            pass
        except Damaged as error:
            damaged.append(path.with_suffix(".damaged"))
            if lead:
                print(f"{error}; kept as {damaged[-1].name}, trying the one before it", file=sys.stderr)
                os.replace(path, damaged[-1])
    else:
        if damaged:
            raise ValueError(f"{out}: no checkpoint can be read; remove it to start anew, or give another --out")
        return None
    before = {**COMMON, **state["config"], **state["model_args"], "class_names": state["class_names"]}
    now = {**vars(config), **arguments, "class_names": identity["class_names"]}
    for key in ("model", "schedule", "predict", "noise_scale", "class_names", *state["model_args"], *arguments):
        if before.get(key) != now.get(key):
            raise ValueError(f"{path} is of another run: its {key} is {before.get(key)}, here {now.get(key)}; "
                             f"give another --out, or remove {out}")
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in vars(config) if now[key] != before.get(key)]
    if (old := state.get("identity", identity)) != identity:
        changed.append(f"the data: {old['count']} images -> {identity['count']}, not all the same")
    if changed and lead:
        print(f"changed since step {state['step']}: {', '.join(changed)}")
    return state


class Log:
    """What a run reports: a progress bar, lines of JSON in log.jsonl, and TensorBoard's file if that is installed.

    Losses of good steps, and how many were bad, stay on the device between reports, since reading waits for it.
    """

    def __init__(self, out, config, here, step, skipped):
        self.path, self.config, self.here, self.step, self.skipped = out / "log.jsonl", config, here, step, skipped
        self.loss, self.bad, self.bad_in_a_row = torch.zeros(3, device=here.device)
        self.bar = tqdm(total=config.steps, initial=step, unit="step", disable=here.rank > 0,
                        mininterval=1 if sys.stderr.isatty() else 30)
        self.clock, self.board = time.perf_counter(), None
        if here.rank > 0:
            return
        if self.path.exists() and not step:
            os.replace(self.path, out / "log.old.jsonl")
        elif self.path.exists():        # reports of steps that will be taken again go, and lines that are none
            lines = self.path.read_text(errors="replace").splitlines()
            (out / "log.tmp").write_text("".join(line + "\n" for line in lines if 0 < step_of(line) <= step))
            os.replace(out / "log.tmp", self.path)
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(out, purge_step=step + 1)

    def add(self, loss, bad):
        """Count one more step: its loss, and 1 where it was bad."""
        self.loss = self.loss + torch.where(bad > 0, 0, loss)
        self.bad, self.bad_in_a_row = self.bad + bad, (self.bad_in_a_row + bad) * bad
        self.bar.update()

    def report(self, step, lr, grad_norm):
        """Report the mean loss of the good steps since the last report. Raises ValueError after ten bad ones."""
        if self.here.distributed:
            dist.all_reduce(self.loss)
        steps, bad, device = step - self.step, int(self.bad), self.here.device
        loss = self.loss.item() / self.here.world / (steps - bad) if steps > bad else math.nan
        rate = self.config.batch_size * steps / (time.perf_counter() - self.clock)
        self.step, self.skipped = step, self.skipped + bad
        values = dict(loss=loss, lr=lr, grad_norm=grad_norm.item(), images_per_sec=rate, memory_gb=memory_gb(device),
                      skipped=self.skipped)
        self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
        if self.here.rank == 0:
            finite = {name: x if math.isfinite(x) else None for name, x in values.items()}      # JSON has no NaN
            with data.writing(self.path), open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
        if self.bad_in_a_row >= 10:
            folder = self.path.parent
            kept = f"; {folder} holds the checkpoint before" if (folder / "checkpoint.pt").exists() else ""
            raise ValueError(f"step {step}: the gradient was not finite ten times in a row (learning rate {lr:.1e}); "
                             f"try a lower --lr, --clip-grad 1, or --amp off{kept}")
        self.loss, self.bad = torch.zeros(2, device=self.here.device)


def step_of(line):
    """The step that a line of log.jsonl reports; 0 where it is no report: torn by a crash, or edited."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return 0


def memory_gb(device):
    """Most memory used so far, in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


# ---------------------------------------------------------------------------------------------------------------------
# A step: what it is trained on, and what it changes


def passes_of(dataset, schedule, config, null, here, start):
    """passes(step) for steps from start: an iterator of (x0, y, t, noise), one for each backward pass of this process.

    null stands for a condition that is dropped (see `settle`).
    """
    n, share, generator = config.batch_size, config.batch_size // here.world, torch.Generator(here.device)
    parts = np.array_split(np.arange(here.rank * share, (here.rank + 1) * share), config.accumulate)
    parts = [slice(part[0], part[-1] + 1) for part in parts]        # rows of the batch, for each pass
    order = (data.shuffled(len(dataset), config.seed, step * n, n)[rows]
             for step in range(start, config.steps) for rows in parts)
    batches = dataset.batches(order, here.device, config.workers)

    def passes(step):
        # Whatever is random in this step is drawn for the whole batch; this process uses its rows.
        generator.manual_seed(int(np.random.SeedSequence([config.seed, step]).generate_state(1, np.uint64)[0]))
        where = dict(generator=generator, device=here.device)
        t = schedule.training_time(torch.rand(n, **where, dtype=torch.float64))
        noise = torch.randn(n, *dataset.shape, **where)
        dropped = torch.rand(n, **where) < config.label_dropout
        augment = dataset.draws(n, generator)
        for rows in parts:
            images, y = next(batches)
            x0 = dataset.prepare(images, *(draw[rows] for draw in augment))
            if not config.class_cond and dataset.text is None:
                y = None
            if null is not None:
                y = torch.where(dropped[rows].view(-1, *[1] * (y.ndim - 1)), null, y)
            yield x0, y, t[rows], noise[rows]

    return passes


class Learner:
    """What training changes: a network, its averages, AdamW, and fp16's scaler. step() trains one step.

    here is the Processes over which gradients are averaged. config is a namespace with batch_size, accumulate, lr,
    warmup, betas, weight_decay, clip_grad, ema, ema_warmup, amp and compile.
    """

    def __init__(self, model, schedule, config, here):
        self.model, self.schedule, self.config, self.share = model, schedule, config, config.batch_size // here.world
        self.parameters = list(model.parameters())
        self.trained = [p for p in self.parameters if p.requires_grad]      # not JiT's positions
        self.averages = {str(decay): copy.deepcopy(model).eval().requires_grad_(False) for decay in config.ema}
        self.optimizer = torch.optim.AdamW(self.trained, config.lr, config.betas, weight_decay=config.weight_decay,
                                           fused=True)
        kind, half = here.device.type, torch.float16 if config.amp == "fp16" else torch.bfloat16
        self.scaler = torch.amp.GradScaler(kind, enabled=config.amp == "fp16")
        self.autocast = torch.autocast(kind, half, enabled=config.amp != "off")
        if config.compile:
            model.compile()
        self.network = model
        if here.distributed:    # static_graph saves bookkeeping, but fails (torch 2.15) if the first pass has no sync
            self.network = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True,
                                                   static_graph=config.accumulate == 1)

    def step(self, step, passes):
        """Train on passes (x0, y, t, noise); t and noise may be None -> (loss, gradient norm, bad), on the device.

        bad is 1 where the norm is not finite, and then weights and moments stay as they were; else 0.
        """
        config, step_loss = self.config, 0
        for i, (x0, y, t, noise) in enumerate(passes, 1):
            if self.network is not self.model:      # processes average their gradients in the last pass alone
                self.network.require_backward_grad_sync = i == config.accumulate
            with self.autocast:
                loss = self.schedule.loss(self.network, x0, y, t, noise).mean() / (self.share / len(x0))
            self.scaler.scale(loss).backward()
            step_loss = step_loss + loss.detach()

        self.optimizer.param_groups[0]["lr"] = config.lr * min(1, (step + 1) / max(1, config.warmup))
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

    def load(self, state):
        """Continue from a state. An average that it lacks starts as "ema"; AdamW's settings stay those of config."""
        self.model.load_state_dict(state["model"])
        for decay, average in self.averages.items():
            average.load_state_dict(state.get("averages", {}).get(decay, state["ema"]))
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": settings})
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def preview(config, pixels):
    """(sampler, steps, clip) of a grid, which should cost seconds: the run's own, or others of fewer steps."""
    if config.sample_steps <= 100:
        return config.sampler, config.sample_steps, config.clip_x0
    if config.schedule in ("flow", "gvp"):
        return "heun", 25, config.clip_x0
    return (OWN["sampler"], OWN["sample_steps"], OWN["clip_x0"]) if pixels else ("dpm_solver", 50, config.clip_x0)


def draw_grid(learner, config, dataset, null, decode, device, path):
    """A grid of samples at fixed noise: one row for each class (ten at most) or caption (eight), else 8 x 8."""
    classes = dataset.num_classes if config.class_cond else 0
    rows = 8 if dataset.text else min(classes, 10)
    conditions = dataset.examples(rows) if dataset.text else torch.arange(rows) * classes // max(rows, 1)
    indices = range(8 * (rows or 8))
    y = conditions.to(device)[torch.arange(len(indices)) % rows] if rows else None
    sampler, steps, clip = preview(config, dataset.encoding is None)
    model = next(iter(learner.averages.values()))
    with learner.autocast:
        x = diffusion.generate(model, learner.schedule, dataset.shape, indices, y, null, sampler=sampler, steps=steps,
                               w=config.cfg, interval=config.cfg_interval, clip=clip, seed=config.seed, device=device)
    with data.writing(path):
        path.parent.mkdir(exist_ok=True)
        data.save_grid(decode(x), path, rows)


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
    config.label_dropout = config.label_dropout if config.class_cond or dataset.text else 0.0
    if config.cfg != 1 and not config.label_dropout:
        raise ValueError(f"--cfg {config.cfg}: guidance needs labels, and a null label trained by --label-dropout 0.1")
    null = torch.tensor(dataset.num_classes) if config.class_cond else dataset.null
    return null.to(here.device) if config.label_dropout else None


def main(argv=None):
    config = parse(argv)
    here = Processes(config.device)
    lead, out = here.rank == 0, Path(config.out)
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"       # read when the first matrix is multiplied
        torch.use_deterministic_algorithms(True)
    schedule = schedule_of(vars(config))
    with here.first():
        dataset = data.load(config.data, config.data_dir, config.image_size)
    identity = dataset.identity()
    null = settle(config, dataset, here)
    arguments = model_arguments(config, dataset)
    torch.manual_seed(config.seed)
    model = build(config.model, {**arguments, "checkpoint": config.grad_checkpoint}).to(here.device)
    learner = Learner(model, schedule, config, here)

    with data.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with data.lock(out) if lead else contextlib.nullcontext(), here.catching_signals():
        step = skipped = stop = 0
        if state := resume(out, config, arguments, identity, lead):
            try:
                learner.load(state)
                step, skipped = state["step"], state["skipped"]
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{out}: its checkpoint does not fit this version of {config.model} or train.py "
                                 f"({data.one_line(error)}); give another --out") from None
            del state
        if here.highest(step) != -here.highest(-step):
            raise ValueError(f"the processes found different checkpoints in {out}: all machines must see one folder")
        if step >= config.steps:
            if lead:
                print(f"{out} is at step {step} already; for more give a larger --steps")
            return here.close()
        decode = None
        if lead:
            with data.writing(out):
                (out / "config.json").write_text(json.dumps(vars(config), indent=2) + "\n")
            print("\n".join(f"{key:>16} {value}" for key, value in vars(config).items()))
            print(f"{config.model}({', '.join(f'{key}={value}' for key, value in arguments.items())}): "
                  f"{sum(p.numel() for p in learner.parameters) / 1e6:.2f} M parameters; {config.data}: {len(dataset)} "
                  f"images {dataset.shape}, {arguments['num_classes'] or 'no'} classes; {here.world} x {here.device}; "
                  + (f"continues after step {step}" if step else f"a new run in {out}"), flush=True)
            try:
                decode = encode.decoder(dataset.encoding, here.device) if config.sample_every else None
            except (ValueError, OSError) as error:      # latents train without the autoencoder
                print(f"no grids of samples: {error}", file=sys.stderr)
        about = dict(config=vars(config), model_args=arguments, shape=list(dataset.shape), identity=identity,
                     class_names=list(dataset.class_names), encoding=dataset.encoding, null=null)
        passes = passes_of(dataset, schedule, config, null, here, step)
        log = Log(out, config, here, step, skipped)

        while step < config.steps and not stop:
            loss, grad_norm, bad = learner.step(step, passes(step))
            log.add(loss, bad)
            step += 1

            stop = here.highest(here.signal)        # a signal to one process stops all at the same step
            saves = step % config.save_every == 0 or step == config.steps or stop
            samples = config.sample_every and (step % config.sample_every == 0 or step == config.steps)
            if step % config.log_every == 0 or saves or samples:
                log.report(step, learner.optimizer.param_groups[0]["lr"], grad_norm)
            if saves and lead:
                write_checkpoint(dict(about, **learner.state(), step=step, skipped=log.skipped), out / "checkpoint.pt")
            if samples and decode:
                draw_grid(learner, config, dataset, null, decode, here.device, out / "samples" / f"{step:07d}.png")
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
    data.command("train.py", main, "interrupted; the same command continues after the last checkpoint")
