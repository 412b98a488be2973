"""What the papers published: the networks by name, the recipe of each table's row, and where the weights are.

    row = recipe("uvit_s2", "cifar10")                      # {flag of train.py: value}: batch size, steps, schedule, ..
    model = build("uvit_s2", dict(image_size=32, in_channels=3))
    weights, _ = read_weights("dit_xl2_256")                # downloaded once; or a file: .pt, .pth, .safetensors

train.py, sample.py, fid.py and bench.py take what they know of a model or a data set from here.
"""
import argparse
import contextlib
import fcntl
import hashlib
import http.client
import inspect
import math
import os
import re
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

import convnext
import data
import diffusion
import dit
import encode
import jit
import udit
import unet
import uvit

MODELS = {**uvit.MODELS, **dit.MODELS, **udit.MODELS, **unet.MODELS, **jit.MODELS, **convnext.MODELS}
NETWORKS = {"uvit": uvit.UViT, "dit": dit.DiT, "udit": udit.UDiT, "unet": unet.UNet, "jit": jit.JiT,
            "fcmae": convnext.FCMAE, "convnextv2": convnext.ConvNeXt}

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
SIT = dict(sampler="euler_maruyama", sample_steps=250)
# JiT, arXiv:2511.13720, and its released code: 600 epochs of ImageNet's pixels, which are a folder of images
JIT = dict(batch_size=1024, steps=750_600, warmup=6255, lr=2e-4, weight_decay=0.0, betas=[0.9, 0.95], schedule="flow",
           predict="data", compare="velocity", times=["logit-normal", 0.8, 0.8], class_cond=None, label_dropout=0.1,
           ema=[0.9999, 0.9996], ema_warmup=False, sampler="heun", sample_steps=50, cfg_interval=[0.0, 0.9])
# Ours: minutes on two CPU cores; and for own images, a sampler whose first pictures have the colours of the data
TINY = dict(batch_size=64, steps=10_000, warmup=100, lr=2e-3, weight_decay=0.0, betas=[0.9, 0.99], log_every=50,
            sample_every=500, save_every=500)
SHAPES = dict(TINY, steps=1200, lr=3e-3, lr_schedule="cosine", class_cond=True, label_dropout=0.1, schedule="flow",
              times=["logit-normal", 0.3, 1.0], sampler="ddpm", sample_steps=50, clip_x0=True, sample_every=200)
OWN = dict(class_cond=None, label_dropout=0.1, sampler="ddpm", sample_steps=100, clip_x0=True)
# What every row has, and what those of diffusion models have. A model has no other flags than its row
RUN = dict(flip=True, lr_schedule="constant", min_lr=0.0, ema=[0.9999], ema_warmup=True, clip_grad=0.0, log_every=100,
           sample_every=10_000, save_every=5000, seed=0, workers=4, compile=False, grad_checkpoint=0,
           deterministic=False)
COMMON = dict(RUN, predict=None, compare=None, times=["uniform"], noise_scale=1.0, cfg=1.0, cfg_interval=[0.0, 1.0],
              clip_x0=False)
# FCMAE and ConvNeXt V2, arXiv:2301.00808, tables 8 to 11, on ImageNet: 1600 epochs of 312 steps without averages; then
# fine-tuning in epochs of 1251 steps, atto's here, and what the larger sizes have otherwise; and ours, for a CPU
PRETRAIN = dict(batch_size=4096, steps=499_200, warmup=12_480, lr=2.4e-3, lr_schedule="cosine", weight_decay=0.05,
                betas=[0.9, 0.95], ema=[0.0], drop_path=0.0, crop=0.2)
FINETUNE = dict(batch_size=1024, steps=750_600, warmup=0, lr=8e-4, lr_schedule="cosine", min_lr=1e-6, weight_decay=0.3,
                betas=[0.9, 0.999], ema_warmup=False, layer_decay=0.9, layer_groups=False, drop_path=0.1, crop=0.08,
                rand_augment=9, erasing=0.25, mixup=0.0, cutmix=0.0, smoothing=0.2, freeze=False, labels_per_class=0,
                model_args=["head_init_scale=0.001"])
LARGER = dict(steps=125_100, warmup=25_020, lr=2.5e-3, weight_decay=0.05, smoothing=0.1, mixup=0.8, cutmix=1.0)
MINI = dict(TINY, steps=3000, lr=1e-3, weight_decay=0.05, ema=[0.999])
MINI_FINE = dict(MINI, betas=[0.9, 0.999], ema_warmup=True, layer_decay=1.0, drop_path=0.0, crop=0.5, rand_augment=0,
                 erasing=0.0, smoothing=0.1)
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
    ("uvit", "shapes"): dict(SHAPES, lr=4e-3, weight_decay=0.03),
    **{(name, size): dict(DIT, class_cond=True, cfg=1.5)
       for name in ("dit", "udit") for size in ("imagenet256", "imagenet512")},
    **{(name, "folder"): dict(DIT, **OWN) for name in ("dit", "udit", "unet")},
    ("dit", "shapes"): SHAPES,
    ("udit", "shapes"): dict(SHAPES, batch_size=32, steps=400),
    # U-Net: IDDPM's, arXiv:2102.09672, but for its betas and dropout; ADM's, arXiv:2105.05233, which DiT took over
    ("unet", "cifar10"): dict(DIT, batch_size=128, steps=500_000, class_cond=False, label_dropout=0.0,
                              sample_steps=1000),
    ("unet", "imagenet256"): dict(LATENT, cfg=1.4),         # U-ViT's, which is compared with it in this setting
    ("unet", "mscoco256"): TEXT,
    ("unet", "shapes"): dict(SHAPES, steps=300, lr=4e-3, weight_decay=0.03),
    ("jit", "folder"): JIT,
    **{(f"{name}_tiny", "folder"): TINY for name in ("uvit", "dit", "udit", "unet", "jit")},
    **{(f"jit_{size}16", "folder"): dict(cfg=cfg) for size, cfg in [("b", 3.0), ("l", 2.4), ("h", 2.2)]},
    **{(f"jit_{size}32", "folder"): dict(cfg=cfg, noise_scale=2.0)         # at 512 x 512 pixels
       for size, cfg in [("b", 3.0), ("l", 2.5), ("h", 2.3)]},
    ("jit", "shapes"): dict(SHAPES, predict="data", compare="velocity"),
    ("fcmae", "folder"): PRETRAIN,
    ("convnextv2", "folder"): FINETUNE,
    ("convnextv2_femto", "folder"): dict(weight_decay=0.05, drop_path=0.0, mixup=0.3, cutmix=0.3),
    ("convnextv2_pico", "folder"): dict(drop_path=0.0, mixup=0.3, cutmix=0.3),
    ("convnextv2_nano", "folder"): dict(mixup=0.5, cutmix=0.5),
    ("convnextv2_tiny", "folder"): dict(LARGER, steps=375_300, warmup=50_040, lr=3.2e-3, drop_path=0.2),
    ("convnextv2_base", "folder"): dict(LARGER, layer_decay=0.6, layer_groups=True),
    ("convnextv2_large", "folder"): dict(LARGER, layer_decay=0.6, layer_groups=True, drop_path=0.2),
    ("convnextv2_huge", "folder"): dict(LARGER, steps=62_550, warmup=12_510, lr=5e-3, layer_decay=0.75, drop_path=0.3),
    ("fcmae_mini", "folder"): dict(MINI, lr=3e-3, betas=[0.9, 0.95]),
    ("convnextv2_mini", "folder"): MINI_FINE,
}
YES_NO = {"yes": True, "on": True, "true": True, "1": True, "no": False, "off": False, "false": False, "0": False}
FLAGS = {**COMMON, **UVIT, **PRETRAIN, **FINETUNE}.keys() - {"model_args"}       # those that some row has


def family(model):
    """ "uvit_s2" -> "uvit", the key of RECIPES and NETWORKS. Raises ValueError on an unknown model."""
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; choose from {', '.join(MODELS)}")
    return model.split("_")[0]


def recipe(model, dataset, schedule=None):
    """Values for a model and data set, {flag: value}; schedule replaces the row's. Raises ValueError as family."""
    kind = family(model)
    known = dataset if (kind, dataset) in RECIPES else "folder"
    row = {**RECIPES[kind, known], **RECIPES.get((model, known), {})}
    if kind in ("fcmae", "convnextv2"):
        return {**RUN, **row}
    row = {**COMMON, **row}
    if dataset == "latents" or dataset in encode.ENCODINGS:
        row["clip_x0"] = False
    if schedule in ("flow", "gvp") and row["schedule"] != "flow":
        row.update(SIT)
    if dataset == "shapes" and schedule not in (None, "flow"):
        row.update(predict=None, compare=None, times=["uniform"], sample_steps=100)
    return {**row, "schedule": schedule or row["schedule"]}


# ---------------------------------------------------------------------------------------------------------------------
# From values to a schedule and a network


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


def known_arguments(name):
    """The arguments that a model's constructor takes, {name: inspect.Parameter}."""
    known = dict(inspect.signature(NETWORKS[family(name)]).parameters)
    if known.pop("arguments", None):        # FCMAE and ConvNeXt pass the others on
        known.update(inspect.signature(convnext.Encoder).parameters)
    return known


def model_arguments(config, dataset):
    """Arguments of the model's constructor: the data's shape, and its classes or text; then --model-args."""
    known = known_arguments(config.model)
    arguments = dict(image_size=dataset.shape[1], in_channels=dataset.shape[0], null_class=config.label_dropout > 0,
                     num_classes=dataset.num_classes if config.class_cond else 0)
    arguments = {key: value for key, value in arguments.items() if key in known}
    if "drop_path" in known:
        arguments["drop_path"] = config.drop_path
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
    known = known_arguments(name)
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
# Weights of others: released ones by name, and files in their layouts
#
# RELEASED is {name: (file, address, flags of sample.py)}. A name is the model's and the data's, of ImageNet its size
# alone. The file is kept in torch.hub's cache. Where the address is a page (U-DiT's, JiT's; Google's for large files),
# somebody has to fetch the file there and put it into the cache under the name that the error tells.

DRIVE, META = "https://drive.google.com/uc?id=", "https://dl.fbaipublicfiles.com/"
UDIT_PAGE = "https://huggingface.co/yuchuantian/U-DiT"
JIT_PAGE = ("https://www.dropbox.com/scl/fo/3ken1avtsd81ip67b9qpi/AK218ZNvXKSv74igVvht4PQ"
            "?rlkey=14gjrblmljewpl6ygxzlr3njm")
SIT_256 = ("https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt"
           "?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=1")
SIT_FLAGS = dict(model="dit_xl2", schedule="flow", cfg_channels=3)
RELEASED = {
    **{f"{model}_{dataset.removeprefix('imagenet')}": (file, DRIVE + key, dict(model=model, data=dataset))
       for model, dataset, file, key in [
           ("uvit_s2", "cifar10", "cifar10_uvit_small.pth", "1yoYyuzR_hQYWU0mkTj659tMTnoCWCMv-"),
           ("uvit_s4", "celeba64", "celeba64_uvit_small.pth", "13YpbRtlqF1HDBNLNRlKxLTbKbKeLE06C"),
           ("uvit_m4", "imagenet64", "imagenet64_uvit_mid.pth", "1igVgRY7-A0ZV3XqdNcMGOnIGOxKr9azv"),
           ("uvit_l4", "imagenet64", "imagenet64_uvit_large.pth", "19rmun-T7RwkNC1feEPWinIo-1JynpW7J"),
           ("uvit_l2", "imagenet256", "imagenet256_uvit_large.pth", "1w7T1hiwKODgkYyMH9Nc9JNUThbxFZgs3"),
           ("uvit_h2", "imagenet256", "imagenet256_uvit_huge.pth", "13StUdrjaaSXjfqqF7M47BzPyhMAArQ4u"),
           ("uvit_l4", "imagenet512", "imagenet512_uvit_large.pth", "1mkj4aN2utHMBTWQX9l1nYue9vleL7ZSB"),
           ("uvit_h4", "imagenet512", "imagenet512_uvit_huge.pth", "1uegr2o7cuKXtf2akWGAN2Vnlrtw5YKQq"),
           ("uvit_s2", "mscoco256", "mscoco_uvit_small.pth", "15JsZWRz2byYNU6K093et5e5Xqd4uwA8S"),
           ("uvit_s2_deep", "mscoco256", "mscoco_uvit_small_deep.pth", "1gHRy8sn039Wy-iFL21wH8TiheHK8Ky71")]},
    **{f"dit_xl2_{size}": (f"DiT-XL-2-{size}x{size}.pt", f"{META}DiT/models/DiT-XL-2-{size}x{size}.pt",
                           dict(model="dit_xl2", data=f"imagenet{size}", cfg_channels=3)) for size in (256, 512)},
    "sit_xl2_256": ("SiT-XL-2-256.pt", SIT_256, dict(SIT_FLAGS, data="imagenet256")),
    "sit_xl2_512": ("SiT-XL-2-512x512.pt", f"{META}SiT/models/SiT-XL-2-512x512.pt",
                    dict(SIT_FLAGS, data="imagenet512")),
    **{name: (f"{name}.pt", UDIT_PAGE, dict(model=name.removesuffix("_1m"), data="imagenet256"))
       for name in ("udit_s", "udit_b", "udit_l", "udit_b_1m")},            # after 400,000 steps, and after a million
    **{f"jit_{size}{patch}": (f"jit_{size}{patch}.pth", JIT_PAGE, dict(
        model=f"jit_{size}{patch}", data="imagenet64", image_size=16 * patch)) for size in "blh" for patch in (16, 32)},
    # For train.py --init: classifiers, those that saw ImageNet-22K before, and FCMAE's encoders; at the end, fid.py's
    **{name: (f"{file}.pt", f"{META}convnext/convnextv2/{folder}/{file}.pt", {}) for name, folder, file in [
        *[(f"convnextv2_{size}", "im1k", f"convnextv2_{size}_1k_224_ema") for size in convnext.SIZES],
        *[(f"convnextv2_{size}_22k_{pixels}", "im22k", f"convnextv2_{size}_22k_{pixels}_ema")
          for pixels, sizes in [(224, "nano tiny base large"), (384, "nano tiny base large huge"), (512, "huge")]
          for size in sizes.split()],
        *[(f"fcmae_{size}", "pt_only", f"convnextv2_{size}_1k_224_fcmae") for size in convnext.SIZES]]},
    "inception": ("pt_inception-2015-12-05-6726825d.pth", "https://github.com/mseitzer/pytorch-fid/releases/download/"
                  "fid_weights/pt_inception-2015-12-05-6726825d.pth", {}),
}


def find(weights):
    """The path of a file of weights: the file itself, or the one of a name of RELEASED, which is downloaded once.

    A transfer that broke off goes on where it was. A SHA-256 is checked where the file's name holds its first digits.
    Raises FileNotFoundError, which says what to fetch by hand, and where to put it.
    """
    if weights not in RELEASED:
        if not Path(weights).exists():
            raise FileNotFoundError(f"{weights}: no such file of weights, nor the name of released ones (sample.py "
                                    "--help lists them)")
        return Path(weights)
    file, address, _ = RELEASED[weights]
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    part = path.with_name(f"{file}.part")
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "a+b") as out:
                with contextlib.suppress(OSError):      # a file system without locks
                    fcntl.flock(out, fcntl.LOCK_EX)     # a second process waits here, and then finds the file
                if not path.exists():
                    download(address, out, file)
                    os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:       # no network, a full disk, no such page, ..
        raise FileNotFoundError(f"{weights}: {path} is not there, and the download failed ({data.one_line(error)}); "
                                f"fetch {address} with a browser and put it there") from None
    return path


def download(address, out, file):
    """Append what an open file lacks of what is at the address. Raises OSError where that is not a file of weights.

    A transfer that breaks off goes on, five times at most. What came is kept, unless its checksum is wrong.
    """
    size, digest = None, re.search(r"-([0-9a-f]{8,})\.", file)
    for _ in range(5):
        start = out.seek(0, os.SEEK_END)
        request = urllib.request.Request(address, headers={"User-Agent": "torch.hub"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                start = start if answer.status == 206 else 0        # 200: all of it, from the beginning
                length, chunk = answer.headers["Content-Length"], answer.read(2**20)
                size = length and start + int(length)               # None: the answer itself says where it ends
                if not start:
                    if not re.match(rb"PK|\x80|.{8}\{", chunk, re.DOTALL):      # a zip, a pickle, safetensors
                        raise OSError("there is a page or something else, no file of weights")
                    out.truncate(0)
                with tqdm(total=size, initial=start, desc=file, unit="B", unit_scale=True) as bar:
                    while chunk:
                        out.write(chunk)
                        bar.update(len(chunk))
                        chunk = answer.read(2**20)
                size = size or out.seek(0, os.SEEK_END)
        except (ConnectionError, TimeoutError, http.client.IncompleteRead):
            pass
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            out.truncate(0)         # nothing follows: the part is of another file, or whole, and then comes again
        if out.seek(0, os.SEEK_END) == size:
            break
    else:
        raise OSError(f"it broke off after {out.tell()} bytes of {size}; the same command continues there")
    out.seek(0)
    if digest and not hashlib.sha256(out.read()).hexdigest().startswith(digest[1]):
        out.truncate(0)
        raise OSError(f"its SHA-256 does not begin with {digest[1]}")


def import_safetensors(path):
    """The package that reads and writes files of this kind. Raises ValueError where it is missing."""
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError(f"{path}: needs the package safetensors: pip install safetensors") from None
    return safetensors


def read_weights(weights, raw=False):
    """A file of weights, or a name of RELEASED -> ({name: tensor}, their key in the file, or "bare").

    Keys are "ema", "model_ema1" (JiT), "model", "state_dict"; raw prefers "model". Prefixes left by wrappers are taken
    off ("module.", "_orig_mod.", JiT's "net."), and diffusers' DiT becomes dit.py's. Raises FileNotFoundError, or
    ValueError where the file is something else; a pickle with code in it is refused, not run.
    """
    path = find(weights)
    package = import_safetensors(path) if path.suffix == ".safetensors" else None
    try:
        if package:
            with package.safe_open(path, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):    # DiT's own checkpoints keep flags in one
                state = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, OSError):
        raise                       # the machine's fault, not the file's
    except Exception as error:      # whatever torch and safetensors make of arbitrary bytes
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split(". ")[0]
        raise ValueError(f"{path}: not a file of weights alone, or damaged ({data.one_line(reason)})") from None
    state = state if isinstance(state, dict) else {}
    keys = ["model"] * raw + ["ema", "model_ema1", "model", "state_dict"]
    found = next((key for key in keys if isinstance(state.get(key), dict)), "bare")
    state = state.get(found, state)
    if not state or not all(isinstance(name, str) and torch.is_tensor(value) and value.layout == torch.strided
                            for name, value in state.items()):
        raise ValueError(f"{path}: holds no state dict (names and dense tensors, bare or under 'ema' or 'model')")
    state = {re.sub(r"^((module|_orig_mod|net)\.)+", "", name): value for name, value in state.items()}
    if "transformer_blocks.0.attn1.to_q.weight" in state:
        try:
            state = dit.from_diffusers(state)
        except (ValueError, KeyError, RuntimeError) as error:
            raise ValueError(f"{path}: not diffusers' DiT ({data.one_line(error)})") from None
    return state, found


