"""Train a diffusion transformer: one loop, on a CPU, one GPU, or many under torchrun.

    python train.py --model uvit_tiny --data shapes                         # a laptop, minutes, no download
    torchrun --nproc_per_node=8 train.py --model uvit_s2 --data cifar10     # the paper's recipe
    torchrun --nproc_per_node=8 train.py --model uvit_s4 --data photos/     # your images

The first took 343 s on two CPU cores; then 100 of 100 samples showed the class asked for (test_all.py repeats it).
Every default is the recipe for that model and data (RECIPES): the paper's, where the paper has that data. Every value
can be overridden, and what is used is printed and saved. A run writes --out (default runs/<model>-<data>/):
config.json, log.jsonl, samples/<step>.png, checkpoint.pt and the one before it, previous.pt. Started again with the
same command, it continues where it was.

Whatever is random in step k (order, mirroring, times, noise, dropped labels) is a function of (seed, k), drawn for the
whole batch and sliced by process. So N + M steps equal N, a stop, and M more: to the last bit on a CPU, and on a GPU up
to the order in which its kernels add (--deterministic fixes it). Nor does a run depend on the number of processes,
rounding apart.
"""
import argparse
import ast
import contextlib
import copy
import inspect
import json
import math
import os
import signal
import sys
import time
import zipfile
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
import udit
import unet
import uvit

MODELS = {**uvit.MODELS, **dit.MODELS, **udit.MODELS, **unet.MODELS}
NETWORKS = {"uvit": uvit.UViT, "dit": dit.DiT, "udit": udit.UDiT, "unet": unet.UNet}

# ---------------------------------------------------------------------------------------------------------------------
# The recipes: a row for each model family and data set, and what single models have otherwise. "folder" serves every
# folder of images, and named data that a family has no row for. An encoded folder has the row of what it looks like:
# imagenet256 (labels), imagenet512 (labels, larger than 32 x 32), mscoco256 (captions).

# U-ViT, arXiv:2209.12152, appendix B and the released code
UVIT = dict(batch_size=128, steps=500_000, warmup=5000, lr=2e-4, weight_decay=0.03, betas=[0.99, 0.99], schedule="vp",
            label_dropout=0.0)
LARGE = dict(UVIT, batch_size=1024, class_cond=True, sampler="dpm_solver", sample_steps=50)
LATENT = dict(LARGE, schedule="sd", label_dropout=0.1, sampler="dpm_solver++")
TEXT = dict(LATENT, batch_size=256, steps=1_000_000, betas=[0.9, 0.9], class_cond=False, cfg=2.0)
# DiT, arXiv:2212.09748, section 4, and U-DiT, arXiv:2405.02730, section 5
DIT = dict(batch_size=256, steps=400_000, warmup=0, lr=1e-4, weight_decay=0.0, betas=[0.9, 0.999], schedule="ddpm",
           class_cond=None, label_dropout=0.1, sampler="ddpm", sample_steps=250)
# Ours, for minutes on two CPU cores
SHAPES = dict(batch_size=64, steps=5000, warmup=100, lr=4e-3, weight_decay=0.03, betas=[0.9, 0.99], class_cond=True,
              label_dropout=0.1, sampler="ddpm", sample_steps=100, clip_x0=True, log_every=50, sample_every=500,
              save_every=500)
RECIPES = {
    ("uvit", "cifar10"): dict(UVIT, warmup=2500, betas=[0.99, 0.999], class_cond=False, sampler="euler_maruyama",
                              sample_steps=1000),
    ("uvit", "celeba64"): dict(UVIT, class_cond=False, sampler="euler_maruyama", sample_steps=1000),
    ("uvit", "imagenet64"): dict(LARGE, steps=300_000, lr=3e-4),
    ("uvit", "imagenet256"): dict(LATENT, cfg=1.4),
    ("uvit_l2", "imagenet256"): dict(steps=300_000, schedule="vp", label_dropout=0.15, sampler="dpm_solver"),
    ("uvit", "imagenet512"): dict(LATENT, cfg=1.7),
    ("uvit_l4", "imagenet512"): dict(schedule="vp", label_dropout=0.15, sampler="dpm_solver"),
    ("uvit", "mscoco256"): TEXT,
    ("uvit", "folder"): dict(UVIT, warmup=2500, betas=[0.99, 0.999], class_cond=None, label_dropout=0.1,
                             sampler="dpm_solver", sample_steps=50),
    ("uvit", "shapes"): dict(SHAPES, schedule="vp"),
    ("dit", "imagenet256"): dict(DIT, class_cond=True, cfg=1.5),
    ("dit", "imagenet512"): dict(DIT, class_cond=True, cfg=1.5),
    ("dit", "folder"): DIT,
    ("dit", "shapes"): dict(SHAPES, steps=4000, lr=3e-3, weight_decay=0.0, schedule="ddpm"),
    ("udit", "imagenet256"): dict(DIT, class_cond=True, cfg=1.5),
    ("udit", "imagenet512"): dict(DIT, class_cond=True, cfg=1.5),
    ("udit", "folder"): DIT,
    ("udit", "shapes"): dict(SHAPES, batch_size=32, steps=1500, lr=3e-3, weight_decay=0.0, schedule="ddpm"),
    # U-Net: IDDPM's, arXiv:2102.09672, but for its betas and dropout; ADM's, arXiv:2105.05233, which DiT took over
    ("unet", "cifar10"): dict(DIT, batch_size=128, steps=500_000, class_cond=False, label_dropout=0.0,
                              sample_steps=1000),
    ("unet", "imagenet256"): dict(LATENT, cfg=1.4),         # U-ViT's, which is compared with it in this setting
    ("unet", "mscoco256"): TEXT,
    ("unet", "folder"): DIT,
    ("unet", "shapes"): dict(SHAPES, steps=2000, schedule="vp"),            # after 1588, 100 of 100 samples were right
}
COMMON = dict(ema=0.9999, clip_grad=0.0, cfg=1.0, clip_x0=False, log_every=100, sample_every=10_000, save_every=5000,
              seed=0, workers=4, compile=False, grad_checkpoint=0, deterministic=False)
PASS = 128      # images in a backward pass, at most, where --accumulate does not say otherwise


def family(model):
    """ "uvit_s2" -> "uvit", the key of RECIPES and NETWORKS. Raises ValueError on an unknown model."""
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; choose from {', '.join(MODELS)}")
    return model.split("_")[0]


def recipe(model, dataset):
    """Training and sampling values for a model and data set, {flag: value}. Raises ValueError on an unknown model."""
    kind = family(model)
    return {**COMMON, **RECIPES.get((kind, dataset), RECIPES[kind, "folder"]), **RECIPES.get((model, dataset), {})}


def check_bounds(values):
    """Raise ValueError where a number ({flag: value}) makes no sense. Serves the other commands as well."""
    for flag, value in values.items():
        if any(isinstance(x, float) and not math.isfinite(x) for x in (value if isinstance(value, list) else [value])):
            raise ValueError(f"--{flag.replace('_', '-')} {value}: must be finite")
    for low, high, flags in [
        (1, math.inf, "steps batch_size accumulate image_size log_every save_every sample_steps num cfg_channels"),
        (0, math.inf, "lr warmup weight_decay clip_grad workers sample_every grad_checkpoint"),
        (0, 1, "ema label_dropout"),
        (0, 2**63 - 1, "seed"),
    ]:
        for flag in flags.split():
            if values.get(flag) is not None and not low <= values[flag] <= high:
                limit = f"at least {low}" if high == math.inf else f"{low} to {high}"
                raise ValueError(f"--{flag.replace('_', '-')} {values[flag]}: must be {limit}")


def parse(argv=None):
    """The command line over the recipe -> argparse.Namespace with a value for every flag."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                epilog="Where no default is given, it is the recipe's for the model and data.")
    yes_no = argparse.BooleanOptionalAction
    add = p.add_argument_group("what is trained on what").add_argument
    add("--model", required=True, metavar="NAME", help=", ".join(MODELS))
    add("--data", required=True, metavar="NAME_OR_FOLDER", help=f"{', '.join(data.DATASETS)}, or a folder: of images "
        "(flat, or one folder for each class), or written by data.py encode")
    add("--data-dir", metavar="DIR", help="where a named data set lies (default data/)")
    add("--image-size", type=int, metavar="PIXELS",
        help="for a folder of images (default 64), shapes (default 16), or cifar10 (32, or 16); others have their own")
    add("--class-cond", action=yes_no, help="train on the labels (default: the recipe's, or wherever there are any)")
    add("--model-args", nargs="*", default=[], metavar="KEY=VALUE",
        help="arguments of the model's constructor, e.g. width=256 depth=8 skip=none")
    add("--schedule", choices=diffusion.SCHEDULES, help="how noise is added")
    add = p.add_argument_group("optimisation").add_argument
    add("--steps", type=int, help="training steps in all")
    add("--batch-size", type=int, metavar="N", help="images in a step, over all processes")
    add("--accumulate", type=int, metavar="N",
        help=f"split each process's share into N backward passes, to save memory (default: of {PASS} images at most)")
    add("--lr", type=float, help="learning rate of AdamW, constant after the warm-up")
    add("--warmup", type=int, metavar="STEPS", help="steps over which the learning rate rises linearly")
    add("--weight-decay", type=float)
    add("--betas", type=float, nargs=2, metavar=("B1", "B2"), help="AdamW's")
    add("--clip-grad", type=float, metavar="NORM", help="largest gradient norm (default 0: no limit, as in the papers)")
    add("--ema", type=float, metavar="DECAY",
        help="of the averaged weights, reached by min(DECAY, (1 + step) / (10 + step)) (default 0.9999)")
    add("--label-dropout", type=float, metavar="P",
        help="share of labels (captions) replaced by the null label (the empty text), for guidance")
    add = p.add_argument_group("machine").add_argument
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--amp", choices=["bf16", "fp16", "off"],
        help="autocast type (default bf16 on cuda, off on cpu, where it is seldom faster)")
    add("--compile", action=yes_no, help="torch.compile the model: a minute at the start, then faster steps on a GPU")
    add("--grad-checkpoint", nargs="?", type=int, const=1, metavar="K",
        help="recompute the activations of every K-th block in the backward pass (no K: of every block): less memory, "
             "slower (default 0: of none)")
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
    add("--sample-steps", type=int, metavar="N", help="calls of the network for an image")
    add("--cfg", type=float, metavar="W", help="guidance weight of eps_u + W (eps_c - eps_u) (default 1: none)")
    add("--clip-x0", action=yes_no, help="limit the predicted image to [-1, 1] while sampling")

    config = p.parse_args(argv)
    if config.data not in data.DATASETS:
        config.data = str(Path(config.data))        # "photos/" and "photos" are one
    for flag, value in recipe(config.model, data.kind(config.data)).items():
        if getattr(config, flag) is None:
            setattr(config, flag, value)
    check_bounds(vars(config))
    config.device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    config.amp = config.amp or ("bf16" if config.device == "cuda" else "off")
    config.out = config.out or f"runs/{config.model}-{Path(config.data).resolve().name}"
    return config


def model_arguments(config, dataset):
    """Arguments of the model's constructor: the data's shape, and its classes or text; then --model-args."""
    classes = dataset.num_classes if config.class_cond else 0
    arguments = dict(image_size=dataset.shape[1], in_channels=dataset.shape[0], num_classes=classes,
                     null_class=config.label_dropout > 0)
    if dataset.text:
        arguments.update(text_tokens=dataset.text[0], text_dim=dataset.text[1])
    for item in config.model_args:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--model-args {item}: expected KEY=VALUE")
        if key in ("image_size", "in_channels", "num_classes", "null_class", "text_tokens", "text_dim", "checkpoint"):
            raise ValueError(f"--model-args {item}: {key} follows from the data, --class-cond, --label-dropout and "
                             "--grad-checkpoint")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = {"true": True, "false": False}.get(value.lower(), value)
    return arguments


def build(name, arguments):
    """A model of MODELS. Raises ValueError on an unknown name or argument, or values that do not fit together."""
    known = inspect.signature(NETWORKS[family(name)]).parameters
    if "text_dim" in arguments and "text_dim" not in known:
        raise ValueError(f"{name} takes no text, but the data has captions; choose a uvit or a unet")
    try:
        return MODELS[name](**arguments)
    except (TypeError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"{name}: {error}; its arguments are {', '.join(known)}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Processes, checkpoints, logs


class Processes:
    """Where this process stands: rank and world size (0 of 1 without torchrun), and its device."""

    def __init__(self, device):
        self.distributed = "RANK" in os.environ
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
        if self.distributed:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        self.signal = 0

    def catch_signals(self):
        """From now on SIGTERM and ctrl-C only set a flag, so that a step can end; ctrl-C twice still ends at once."""
        def remember(number, frame):
            if self.signal == number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = number

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, remember)

    def highest(self, number=0):
        """The highest of all processes' numbers, the same on each. All wait here for the last (but not for a GPU)."""
        if not self.distributed:
            return number
        highest = torch.tensor(number)          # on the CPU, over gloo
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

    def mean(self, x):
        """The mean of a tensor over all processes; the tensor itself becomes their sum."""
        if self.distributed:
            dist.all_reduce(x)
        return x / self.world

    def close(self):
        self.highest()      # nobody leaves while another still writes: torchrun would end it
        if self.distributed:
            dist.destroy_process_group()


@contextlib.contextmanager
def writing(path):
    """Where the disk is full or the folder can not be written to: one line that names the file and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError):     # torch's own, raised on the system's
            error = error.__context__ or error
        raise OSError(f"{path}: could not be written ({error}); make room or give another --out") from None


def write_checkpoint(state, path):
    """Write to a temporary file, then rename: at every moment a whole checkpoint.pt or previous.pt exists."""
    temporary = path.with_suffix(".tmp")
    try:
        with writing(path), open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{error}; the checkpoint before it is whole") from None
    if path.exists():
        os.replace(path, path.with_name("previous.pt"))
    os.replace(temporary, path)


class Damaged(ValueError):
    """A checkpoint that is torn or altered."""


def read_checkpoint(path):
    """A checkpoint of train.py, on the CPU, after its checksums were verified.

    Raises FileNotFoundError, Damaged where it is torn or altered, ValueError where it is not a checkpoint of train.py.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, OSError):
        raise                       # the machine's fault, not the file's
    except Exception as error:      # whatever zipfile, pickle and torch make of arbitrary bytes
        raise Damaged(f"{path}: damaged, or not a checkpoint ({data.one_line(error) or repr(error)})") from None
    needed = {"model", "ema", "step", "config", "model_args", "shape", "class_names", "encoding", "null"}
    if not isinstance(state, dict) or not needed <= state.keys():
        raise ValueError(f"{path}: not a checkpoint of train.py, or of another version of it; give a file of weights "
                         "alone to sample.py --weights")
    return state


def resume(out, config, arguments, lead):
    """The state to continue from, or None in a new folder. A damaged checkpoint is named, put aside, and not used.

    What changed on the command line since is printed. Raises ValueError where the folder holds a run of another model,
    data or schedule, or damaged checkpoints alone.
    """
    damaged = list(out.glob("*.damaged"))
    for path in (out / "checkpoint.pt", out / "previous.pt"):
        try:
            state = read_checkpoint(path)
        except FileNotFoundError:
            continue
        except Damaged as error:
            damaged.append(path.with_suffix(".damaged"))
            if lead:
                print(f"{error}; kept as {damaged[-1].name}, trying the one before it", file=sys.stderr)
                os.replace(path, damaged[-1])
            continue
        before, now = {**state["config"], **state["model_args"]}, {**vars(config), **arguments}
        for key in ("model", "data", "schedule", *state["model_args"], *arguments):
            if before.get(key) != now.get(key):
                raise ValueError(f"{path} is of another run: its {key} is {before.get(key)}, here {now.get(key)}; "
                                 f"give another --out, or remove {out}")
        changed = [f"{key} {before.get(key)} -> {now[key]}" for key in vars(config) if now[key] != before.get(key)]
        if changed and lead:
            print(f"changed since step {state['step']}: {', '.join(changed)}")
        return state
    if damaged:
        raise ValueError(f"{out}: no checkpoint can be read; remove the folder to start anew, or give another --out")
    return None


class Log:
    """A JSON line for each report in log.jsonl, and TensorBoard's file if that is installed; nothing if not active."""

    def __init__(self, out, step, active):
        self.file = self.board = None
        if not active:
            return
        path, temporary = out / "log.jsonl", out / "log.tmp"
        if path.exists() and not step:
            os.replace(path, out / "log.old.jsonl")
        elif path.exists():         # reports of steps that will be taken again, and a line torn by a crash, go
            whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
            temporary.write_text("".join(line + "\n" for line in whole if json.loads(line)["step"] <= step))
            os.replace(temporary, path)
        self.file = open(path, "ab", buffering=0)
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(out, purge_step=step + 1)

    def write(self, step, **values):
        if self.file:
            finite = {name: x if math.isfinite(x) else None for name, x in values.items()}      # JSON has no NaN
            with writing(self.file.name):
                self.file.write((json.dumps({"step": step, **finite}) + "\n").encode())
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()


def memory_gb(device):
    """Most memory used so far, in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource     # Linux and macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def draw_grid(model, schedule, config, dataset, null, autocast, decode, device, path):
    """A grid of samples at fixed noise: one row for each class (ten at most) or caption (eight), else 8 x 8."""
    classes = dataset.num_classes if config.class_cond else 0
    rows = 8 if dataset.text else min(classes, 10)
    conditions = dataset.examples(rows) if dataset.text else torch.arange(rows) * classes // max(rows, 1)
    indices = range(8 * (rows or 8))
    y = conditions.to(device)[torch.arange(len(indices)) % rows] if rows else None
    # A grid should cost seconds: DPM-Solver in 50 evaluations where the run's own sampler takes more than 100.
    sampler, steps = (config.sampler, config.sample_steps) if config.sample_steps <= 100 else ("dpm_solver", 50)
    with autocast:
        images = diffusion.generate(model, schedule, dataset.shape, indices, y, null, sampler=sampler, steps=steps,
                                    w=config.cfg, clip=config.clip_x0, seed=config.seed, device=device)
    images = decode(images)
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        data.save_grid(images, path, rows)


# ---------------------------------------------------------------------------------------------------------------------
# The run, from the command line to the last step


def main(argv=None):
    config = parse(argv)
    here = Processes(config.device)
    device, lead = here.device, here.rank == 0
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"       # read when the first matrix is multiplied
        torch.use_deterministic_algorithms(True)
    share = config.batch_size // here.world     # images of each step on this process
    if config.accumulate is None:
        config.accumulate = next(k for k in range(1, share + 2) if share % k == 0 and share // k <= PASS)
    micro = share // config.accumulate          # .. and in one backward pass
    if micro * config.accumulate * here.world != config.batch_size:
        raise ValueError(f"--batch-size {config.batch_size} does not divide by {here.world} processes x "
                         f"--accumulate {config.accumulate}")

    # Data, model, optimiser
    with here.first():
        dataset = data.load(config.data, config.data_dir, config.image_size)
    if config.class_cond is None:
        config.class_cond = dataset.num_classes > 0
    if config.class_cond and not dataset.num_classes:
        raise ValueError(f"--class-cond: {config.data} has no labels (a folder for each class would give them)")
    conditional = config.class_cond or dataset.text is not None
    config.label_dropout = config.label_dropout if conditional else 0.0
    arguments = model_arguments(config, dataset)
    null = None             # what stands for no condition: the null label, or the empty text's features
    if config.label_dropout:
        null = (torch.tensor(dataset.num_classes) if config.class_cond else dataset.null).to(device)
    if config.cfg != 1 and null is None:
        raise ValueError(f"--cfg {config.cfg}: guidance needs labels, and a null label trained by --label-dropout 0.1")
    schedule = diffusion.SCHEDULES[config.schedule]()
    torch.manual_seed(config.seed)
    model = build(config.model, {**arguments, "checkpoint": config.grad_checkpoint}).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    parameters, averages = list(model.parameters()), list(ema.parameters())
    optimizer = torch.optim.AdamW(parameters, config.lr, config.betas, weight_decay=config.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    half = torch.float16 if config.amp == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, half, enabled=config.amp != "off")

    # Continue, if there is something to continue
    out, start, skipped = Path(config.out), 0, 0
    state = resume(out, config, arguments, lead)
    if state:
        try:
            model.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
            settings = optimizer.state_dict()["param_groups"]       # those of now count, not those that were saved
            optimizer.load_state_dict({**state["optimizer"], "param_groups": settings})
            if state["scaler"]:
                scaler.load_state_dict(state["scaler"])
            start, skipped = state["step"], state["skipped"]
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{out}: its checkpoint does not fit this version of {config.model} or train.py "
                             f"({data.one_line(error)}); give another --out") from None
        del state
    if here.highest(start) != -here.highest(-start):
        raise ValueError(f"the processes found different checkpoints in {out}: all machines must see the same folder")
    if start >= config.steps:
        if lead:
            print(f"{out} is at step {start} already; for more give a larger --steps")
        return here.close()
    if lead:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.json").write_text(json.dumps(vars(config), indent=2) + "\n")
        print("\n".join(f"{key:>16} {value}" for key, value in vars(config).items()))
        print(f"{config.model}: {sum(p.numel() for p in parameters) / 1e6:.2f} M parameters; "
              f"{config.data}: {len(dataset)} images {dataset.shape}, {arguments['num_classes'] or 'no'} classes; "
              f"{here.world} x {device}; " + (f"continues after step {start}" if start else f"a new run in {out}"),
              flush=True)

    decode = None
    if lead and config.sample_every:
        try:
            decode = data.decoder(dataset.encoding, device)
        except (ValueError, OSError) as error:      # latents train without the autoencoder
            print(f"no grids of samples: {error}", file=sys.stderr)
    if config.compile:
        model.compile()
    network = model
    if here.distributed:
        # static_graph saves bookkeeping in each step, but fails (torch 2.15) if the first pass is one without a sync.
        network = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True,
                                          static_graph=config.accumulate == 1)
    rows = slice(here.rank * share, (here.rank + 1) * share)
    order = (part for step in range(start, config.steps) for part in np.split(
        data.shuffled(len(dataset), config.seed, step * config.batch_size, config.batch_size)[rows], config.accumulate))
    batches = dataset.batches(order, device, config.workers)
    generator = torch.Generator(device)
    log = Log(out, start, lead)
    bar = tqdm(total=config.steps, initial=start, unit="step", disable=not lead,
               mininterval=1 if sys.stderr.isatty() else 30)

    # These stay on the device, since reading them waits for it: losses of finite steps, and the number of the others.
    loss_sum, bad_steps, bad_in_a_row = torch.zeros(3, device=device)
    logged_step = start
    clock = time.perf_counter()
    here.catch_signals()
    stop, step = 0, start
    while step < config.steps and not stop:
        # Everything random in this step, for the whole batch; this process uses its rows.
        generator.manual_seed(int(np.random.SeedSequence([config.seed, step]).generate_state(1, np.uint64)[0]))
        n, where = config.batch_size, dict(generator=generator, device=device)
        draws = [schedule.training_time(torch.rand(n, **where, dtype=torch.float64)),
                 torch.randn(n, *dataset.shape, **where),
                 torch.rand(n, **where) < config.label_dropout, *dataset.draws(n, generator)]

        step_loss = 0
        for i, (t, noise, dropped, *augment) in enumerate(zip(*(draw[rows].split(micro) for draw in draws))):
            images, y = next(batches)
            x0 = dataset.prepare(images, *augment)
            y = y if conditional else None
            if null is not None:
                y = torch.where(dropped.view(-1, *[1] * (y.ndim - 1)), null, y)
            adds_up = not here.distributed or i == config.accumulate - 1    # over the processes: in the last pass alone
            with contextlib.nullcontext() if adds_up else network.no_sync():
                with autocast:
                    loss = schedule.loss(network, x0, y, t, noise).mean() / config.accumulate
                scaler.scale(loss).backward()
            step_loss = step_loss + loss.detach()

        lr = optimizer.param_groups[0]["lr"] = config.lr * min(1, (step + 1) / max(1, config.warmup))
        scaler.unscale_(optimizer)
        grad_norm = get_total_norm([p.grad for p in parameters])
        if config.clip_grad:
            clip_grads_with_norm_(parameters, config.clip_grad, grad_norm)
        bad = (~torch.isfinite(grad_norm)).float()
        if not scaler.is_enabled():     # (the scaler does the same) a step that is not finite changes no weight
            optimizer.grad_scale, optimizer.found_inf = None, bad
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(config.ema, (1 + step) / (10 + step)))
        loss_sum = loss_sum + torch.where(bad > 0, 0, step_loss)
        bad_steps, bad_in_a_row = bad_steps + bad, (bad_in_a_row + bad) * bad
        step += 1
        bar.update()

        stop = here.highest(here.signal)        # SIGTERM or SIGINT on any process stops all at the same step
        saves = step % config.save_every == 0 or step == config.steps or stop
        samples = config.sample_every and (step % config.sample_every == 0 or step == config.steps)
        if step % config.log_every == 0 or saves or samples:
            steps, skipped = step - logged_step, skipped + int(bad_steps)
            good = steps - int(bad_steps)
            mean_loss = here.mean(loss_sum).item() / good if good else math.nan
            rate = config.batch_size * steps / (time.perf_counter() - clock)
            log.write(step, loss=mean_loss, lr=lr, grad_norm=grad_norm.item(), images_per_sec=rate,
                      memory_gb=memory_gb(device), skipped=skipped)
            bar.set_postfix_str(f"loss {mean_loss:.4f}, {rate:.0f} images/s")
            if bad_in_a_row >= 10:
                raise ValueError(
                    f"step {step}: the gradient was not finite ten times in a row (learning rate {lr:.1e}); "
                    f"try a lower --lr, --clip-grad 1, or --amp off; {out} holds the checkpoint before")
            loss_sum, bad_steps = torch.zeros(2, device=device)
            logged_step = step
        if saves and lead:
            write_checkpoint(dict(
                model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(), step=step, skipped=skipped, config=vars(config), model_args=arguments,
                shape=list(dataset.shape), class_names=list(dataset.class_names), encoding=dataset.encoding,
                null=null), out / "checkpoint.pt")
        if samples and decode:
            draw_grid(ema, schedule, config, dataset, null, autocast, decode, device,
                      out / "samples" / f"{step:07d}.png")
        if logged_step == step:
            clock = time.perf_counter()     # the time of saving and sampling is not the training's

    bar.close()
    here.close()
    if stop:
        sys.exit(f"train.py: stopped by {signal.Signals(stop).name} after step {step}, which is saved; "
                 "the same command continues" if lead else 1)
    if lead:
        print(f"done: {out / 'checkpoint.pt'}" + (f", {out / 'samples'}" if config.sample_every else ""))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:      # bad input: one line that says what and where, not a stack trace
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; the same command continues after the last checkpoint")
