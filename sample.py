"""Sample images: from a run's checkpoint, or from released weights, by name or as a file.

    python sample.py --ckpt runs/uvit_tiny-shapes/checkpoint.pt                             # a grid, samples.png
    torchrun --nproc_per_node=8 sample.py --ckpt runs/uvit_s2-cifar10/checkpoint.pt --num-images 50000 --out x.npz
    python sample.py --weights dit_xl2_256 --labels "golden retriever,88"                   # downloaded once
    python sample.py --weights mscoco_uvit_small.pth --model uvit_s2 --data mscoco256 --prompt "a red bus" "two cats"
    python sample.py --ckpt runs/uvit_tiny-shapes/checkpoint.pt --export shapes.safetensors # the weights, for others

--out decides the form: a .png grid (a row for each label or prompt), an .npz (arr_0: uint8 (N, H, W, 3), arr_1:
labels), or a folder of PNGs. --sweep draws a grid with a row for each guidance weight. Latents are decoded by the
autoencoder they were made with, prompts are encoded by CLIP. Image i depends on the seed, i and its condition, not on
the batch size or the number of processes (up to rounding: for another batch, kernels add in another order).
"""
import argparse
import contextlib
import inspect
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import bookkeeping
import data
import diffusion
import encode
import recipes

DESCRIBED = "model data image_size schedule predict compare model_args".split()     # flags: what a file of weights is
EXPORTED = "config model_args shape class_names encoding step which".split()        # what --export writes besides


def add_flags(p):
    """The flags that say which weights, what to sample and how: sample.py's, and fid.py's where it samples itself.

    Returns the function that adds one more flag to the last group.
    """
    group = p.add_argument_group("weights: a run's checkpoint, or a file of weights and what it is")
    add, average = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--ckpt", metavar="FILE", help="checkpoint.pt of a run of train.py")
    average("--raw", action="store_true", help="the weights themselves, not their moving average (EMA)")
    average("--ema", type=float, metavar="DECAY", help="with --ckpt: which average of several (default: the first)")
    names = ", ".join(name for name, (_, _, flags) in recipes.RELEASED.items() if flags)
    add("--weights", metavar="NAME_OR_FILE", help=f"released weights by name: {names}; or a file, with --model and "
        "--data where it does not come from --export: safetensors, or a state dict, bare or under 'ema', 'model', "
        "'state_dict'")
    add("--model", metavar="NAME", help=f"with a file of weights: {', '.join(recipes.MODELS)}")
    add("--data", metavar="NAME", help="with a file of weights: what it was trained on")
    add("--image-size", type=int, metavar="PIXELS", help="with --weights: of the images, if not the data's own")
    add("--schedule", choices=diffusion.SCHEDULES, help="with --weights: if not the recipe's (SiT is a dit with flow)")
    for flag, what in ("--predict", "what the network answers"), ("--compare", "what its loss compared"):
        add(flag, choices=["noise", "data", "velocity"], help=f"with --weights: {what}, if not the recipe's")
    add("--model-args", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="with --weights: arguments of the model's constructor that the file does not tell")
    add("--autoencoder", metavar="NAME", help="hub name or folder of the latents' autoencoder, if not the data's own")
    add("--clip", metavar="NAME", help="hub name or folder of the prompts' text encoder, if not the data's own")
    group = p.add_argument_group("what to sample")
    add, text = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--num-images", type=int, metavar="N", help="default 64, or 8 for each row of a grid, label or prompt given")
    add("--labels", metavar="L,L,..", help="classes by number or name, taken in turn (default: all; ten for a grid)")
    text("--prompt", nargs="+", metavar="TEXT", help="texts, taken in turn")
    text("--prompts", metavar="FILE", help="a file with a text on each line")
    add("--cfg", type=float, metavar="W", help="guidance: eps_u + W (eps_c - eps_u); 1 is none, U-ViT's s is W - 1")
    add("--cfg-channels", type=int, metavar="C", help="guide the first C channels only (DiT's and SiT's releases: 3)")
    add("--cfg-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guide at times LOW < t < HIGH only")
    add("--guide-with", metavar="FILE", help="autoguidance: checkpoint.pt of a run on the same data whose average, of "
        "a smaller network or fewer steps, takes the null label's place")
    add("--sampler", choices=diffusion.SAMPLERS)
    add("--steps", type=int, metavar="N", help="steps, of one call of the network each (heun: two)")
    add("--clip-x0", action=argparse.BooleanOptionalAction, help="limit the predicted image to [-1, 1]")
    add("--seed", type=int, default=0, help="default 0")
    add = p.add_argument_group("how").add_argument
    add("--batch-size", type=int, default=100, metavar="N", help="images at a time on each process (default 100)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is one")
    add("--amp", choices=["bf16", "off"], help="autocast type of the network (default bf16 on cuda, off on cpu)")
    add("--compile", action="store_true", help="torch.compile the network: a minute at the start, for many images")
    return add


def check_flags(args):
    """Raise ValueError where the flags of add_flags do not go together; fill in --amp, and what a name stands for."""
    if bool(args.ckpt) == bool(args.weights):
        raise ValueError("give either --ckpt (a run's checkpoint), or --weights (a name; or a file, --model, --data)")
    other = "--ckpt" if args.weights else "--weights"
    for flag in ["ema"] if args.weights else DESCRIBED:
        if getattr(args, flag):
            raise ValueError(f"--{flag.replace('_', '-')} goes with {other} only")
    if args.weights in recipes.RELEASED:
        known = recipes.RELEASED[args.weights][-1]
        if not known:
            raise ValueError(f"--weights {args.weights}: draws no images; train.py --init or fid.py takes it")
        for flag, value in known.items():
            if getattr(args, flag) is None:
                setattr(args, flag, value)
    bookkeeping.check(vars(args))
    args.amp = args.amp or ("bf16" if args.device == "cuda" else "off")


def parse(argv=None):
    """The command line -> argparse.Namespace; out is a Path, and form is ".png", ".npz" or "folder"."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Where no default is given, it is the run's own setting, or the paper's for --model and --data.")
    add = add_flags(p)
    add("--out", default="samples.png", metavar="FILE_OR_FOLDER", help=".png, .npz, or a folder (default samples.png)")
    add("--sweep", type=float, nargs="+", metavar="W", help="a grid with a row for each of these guidance weights")
    add("--export", metavar="FILE.safetensors", help="write the weights that would be used, and what they are, for "
        "--weights of another call and for other tools; and draw nothing")
    args = p.parse_args(argv)
    check_flags(args)
    if args.export and not args.export.endswith(".safetensors"):
        raise ValueError(f"--export {args.export}: give a name that ends in .safetensors")
    args.out = Path(args.out)
    args.form = args.out.suffix.lower() or "folder"
    if args.form not in (".png", ".npz", "folder"):
        raise ValueError(f"--out {args.out}: give a name that ends in .png or .npz, or a folder's without a dot")
    if args.sweep and args.form != ".png":
        raise ValueError("--sweep draws a grid: give an --out that ends in .png")
    check_out(args.out, args.form)
    return args


def check_out(out, form):
    """Raise ValueError where images would be mixed with others, or replace them (a grid may replace a grid)."""
    if form == "folder" and out.exists() and (not out.is_dir() or any(p.name != ".lock" for p in out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not an empty folder; images would be mixed up")
    if form == ".npz" and out.exists() or form == ".png" and out.is_dir():
        raise ValueError(f"--out {out}: exists already; remove it or give another name")


# ---------------------------------------------------------------------------------------------------------------------
# Weights in


def load_weights(model, state, path):
    """Load a state dict into a model. Raises ValueError that names the tensors that do not fit or are not finite.

    Fixed tables (buffers, such as DiT's positions) may have been made for another image size: the model keeps its own.
    """
    fixed = {name for name, _ in model.named_buffers()}
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    other = {name: tuple(value.shape) for name, value in state.items()}
    shared = [name for name in own if name in other and name not in fixed]
    wrong = {"missing": [name for name in own if name not in other],
             "unexpected": [name for name in other if name not in own],
             "of another shape": [f"{n} {other[n]}, here {own[n]}" for n in shared if own[n] != other[n]],
             "with NaN or infinite numbers": [n for n in shared if not state[n].isfinite().all()]}
    problems = [f"{len(names)} {kind} ({', '.join(names[:3])}{', ..' if len(names) > 3 else ''})"
                for kind, names in wrong.items() if names]
    if problems:
        raise ValueError(f"{path}: does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(state)


@dataclass(frozen=True)
class Source:
    """A network with its weights, what it draws, on which conditions, and how it is sampled unless told otherwise."""
    model: torch.nn.Module
    weak: torch.nn.Module       # the weaker one that guides it, or None
    schedule: object            # of diffusion.SCHEDULES
    shape: tuple                # (C, H, W) of x_0
    image_shape: tuple          # (3, H, W) of the images that `decode` makes of x_0 (N, C, H, W)
    decode: Callable
    num_classes: int            # 0: none
    class_names: tuple          # in the order of their numbers, () where they are not known
    encode_text: Callable       # texts -> features (n, T, F), or None where the network takes no text
    null: torch.Tensor          # the null label (), the empty text's features (T, F), or None where guidance has none
    settings: dict              # arguments of diffusion.generate: sampler, steps, w, channels, interval, clip, seed
    path: str
    step: int                   # of training, None where it is not known
    weights: str                # which of the file's weights: "EMA 0.9999", "raw", ..
    compiled: bool


def open_source(args, device):
    """The flags of add_flags -> Source. Raises ValueError or OSError, in one line, where they do not fit the file."""
    found, path = read(args), args.ckpt or args.weights
    config, arguments = found["config"], found["model_args"]
    if not config.get("schedule"):
        raise ValueError(f"{path}: {config['model']} does not generate images: nothing to sample")
    shape, names, null, encoding = tuple(found["shape"]), found["class_names"], found["null"], found["encoding"]
    if args.cfg_channels and args.cfg_channels > shape[0]:
        raise ValueError(f"--cfg-channels {args.cfg_channels}: {path} has {shape[0]} channels")
    model, weak = network(found, path, device, args.compile), None
    if args.guide_with:
        weak = network(weaker(args.guide_with, found, path), args.guide_with, device, args.compile)

    if encoding and args.autoencoder:
        encoding = dict(encoding, autoencoder=args.autoencoder)
    classes, encode_text = arguments["num_classes"], None
    if classes == 1000 and (not names or names[0] == "n01440764"):      # ImageNet: by name, not by number in WordNet
        names = data.imagenet_names()
    if classes and arguments["null_class"]:
        null = torch.tensor(classes)
    if "text_dim" in arguments:
        if not (args.prompt or args.prompts):
            raise ValueError(f"{path} draws what a text says: give --prompt or --prompts")
        encode_text = encode.TextEncoder(args.clip or (encoding or {}).get("clip") or encode.CLIP, device)
        null = encode_text([""])[0] if null is None else null

    settings = {name: config[key] if given is None else given for name, given, key in [
        ("sampler", args.sampler, "sampler"), ("steps", args.steps, "sample_steps"), ("w", args.cfg, "cfg"),
        ("interval", args.cfg_interval, "cfg_interval"), ("clip", args.clip_x0, "clip_x0")]}
    if weak and settings["w"] == 1 and not getattr(args, "sweep", None):
        raise ValueError("--guide-with: give a guidance weight too, such as --cfg 2 (1 is no guidance)")
    return Source(
        model, weak, recipes.schedule_of(config), shape, (3, *[encoding["image_size"]] * 2) if encoding else shape,
        encode.decoder(encoding, device), classes, tuple(names) if len(names) == classes else (), encode_text, null,
        dict(settings, channels=args.cfg_channels, seed=args.seed), path, found["step"], found["which"], args.compile)


def read(args):
    """--ckpt or --weights -> {"weights": {name: tensor}, "which": of the file's they are, and, as in train.py's
    checkpoint, config, model_args, shape, class_names, encoding, step, null}."""
    found = from_checkpoint(args.ckpt, args.raw, args.ema) if args.ckpt else from_weights(args)
    return dict(found, config={**recipes.COMMON, **found["config"]})          # older runs lack some keys


def from_checkpoint(path, raw=False, ema=None):
    """A checkpoint of train.py -> the dict of `read`. ema is the decay of one of several averages."""
    state = bookkeeping.read_checkpoint(path)
    if raw:
        return dict(state, weights=state["model"], which="raw")
    first, *_ = np.ravel(state["config"].get("ema", recipes.COMMON["ema"])).tolist()      # older runs have one average
    averages = {**{float(decay): weights for decay, weights in state.get("averages", {}).items()}, first: state["ema"]}
    decay = ema or first
    if decay not in averages:
        raise ValueError(f"--ema {decay}: {path} has the averages {', '.join(map(str, averages))}")
    return dict(state, weights=averages[decay], which=f"EMA {decay:g}")


def from_weights(args):
    """--weights, and the flags that say what they are -> the dict of `read`."""
    path = recipes.find(args.weights)
    if about := described(path):
        if given := [flag for flag in DESCRIBED if getattr(args, flag)]:
            raise ValueError(f"--{given[0].replace('_', '-')}: {path} says itself what it is")
        return dict(about, weights=recipes.read_weights(path)[0], null=None)
    if not (args.model and args.data):
        raise ValueError("--weights needs --model and --data: which network it is, and what it was trained on")
    kind = data.kind(args.data)
    config = dict(recipes.recipe(args.model, kind, args.schedule), model=args.model, data=args.data)
    config.update({key: getattr(args, key) for key in ("predict", "compare") if getattr(args, key)})
    encoded = args.data not in data.DATASETS and kind != "folder"
    encoding = data.read_encoding(args.data) if encoded else encode.released_encoding(args.model, args.data)
    size = args.image_size or (encoding["image_size"] if encoding else data.IMAGE_SIZE[kind])
    weights, key = recipes.read_weights(path, args.raw)
    known = inspect.signature(recipes.NETWORKS[recipes.family(args.model)]).parameters
    given = dict(recipes.parse_argument(item, known) for item in args.model_args)
    if encoded or kind == "folder":
        names = encoding["class_names"] if encoded else data.list_images(args.data)[2]
    else:
        names = {"cifar10": data.CIFAR10_CLASSES, "shapes": tuple(data.SHAPES), "celeba64": (), "mscoco256": ()}.get(
            kind, data.imagenet_names())
    arguments = released_arguments(weights, size // 8 if encoding else size, len(names), given)
    return dict(config=config, model_args=arguments, weights=weights, step=None, null=None, class_names=names,
                shape=(arguments["in_channels"], *[arguments["image_size"]] * 2), encoding=encoding,
                which={"ema": "EMA", "model_ema1": "EMA", "model": "raw"}.get(key, "as they are"))


def described(path):
    """What --export wrote into a file, a dict of EXPORTED's keys, or None where another program wrote it."""
    if path.suffix != ".safetensors":
        return None
    package = recipes.import_safetensors(path)
    try:
        with package.safe_open(path, "pt") as file:
            return {key: json.loads(file.metadata()[key]) for key in EXPORTED}
    except Exception:       # no metadata, or a damaged file, of which read_weights says what is wrong
        return None


def weaker(path, found, strong):
    """A checkpoint -> the dict of `read` where it can guide what was `found` in the file `strong`, else ValueError."""
    def task(found):
        config, arguments, schedule = found["config"], found["model_args"], recipes.schedule_of(found["config"])
        return dict(data=config["data"], schedule=config["schedule"], predict=schedule.predict, shape=[*found["shape"]],
                    noise_scale=schedule.noise_scale, num_classes=arguments["num_classes"],
                    text_dim=arguments.get("text_dim"))

    weak = from_checkpoint(path)
    for (key, theirs), ours in zip(task(weak).items(), task(found).values()):
        if theirs != ours:
            raise ValueError(f"--guide-with {path}: its {key} is {theirs}, that of {strong} is {ours}")
    return weak


def network(found, path, device, compiled):
    """The network of a dict of `read`, with its weights, ready to sample. Raises ValueError where they do not fit."""
    model = recipes.build(found["config"]["model"], found["model_args"])
    load_weights(model, found["weights"], path)
    model = model.to(device).eval()
    if hasattr(model, "fold"):
        model = model.fold()        # U-DiT: the branches of its convolutions merged, once for all steps
    if compiled:
        model.compile()
    return model


def export(args):
    """Write the weights that the flags choose, and what they are, into args.export, a file of safetensors."""
    found, part = read(args), f"{args.export}.{secrets.token_hex(4)}.part"
    package = recipes.import_safetensors(args.export)
    weights = {name: value.contiguous() for name, value in found["weights"].items()}
    metadata = {"format": "pt", **{key: json.dumps(found[key]) for key in EXPORTED}}
    try:
        package.torch.save_file(weights, part, metadata)
        os.replace(part, args.export)
    except (OSError, package.SafetensorError) as error:
        raise OSError(f"--export {args.export}: could not be written ({data.one_line(error)})") from None
    finally:
        Path(part).unlink(missing_ok=True)
    numbers = sum(value.numel() for value in weights.values()) / 1e6
    print(f"{args.export}: {numbers:.2f} M numbers from {args.ckpt or args.weights} (weights {found['which']})")


def released_arguments(weights, size, classes, given):
    """The model's arguments: channels, tokens of text, classes, a null label or none. The tensors tell them.

    size is the side of x_0, and classes what the data has: a table of labels with one row more has a null label. Where
    it has another number of rows, `given` (--model-args) must tell, or ValueError is raised.
    """
    def shapes(*names, ndim):
        return [w.shape for key, w in weights.items() if key.endswith(names) and w.ndim == ndim]

    stems = shapes("patch_embed.proj.weight", "embedder.proj.weight", "embedder.proj1.weight", "stem.weight", ndim=4)
    _, channels, _, patch = stems[0] if stems else (0, 3, 1, 1)
    arguments = dict(image_size=size, in_channels=channels, num_classes=0)
    for rows, _ in shapes("label_emb.weight", "embedding_table.weight", ndim=2)[:1]:
        null = given.get("null_class", {0: False, 1: True}.get(rows - given.get("num_classes", classes)))
        if null is None:
            raise ValueError(f"--weights: the table of labels has {rows} rows, and the data {classes} classes; say "
                             "whether its last row is the null label: --model-args null_class=true (or false)")
        arguments.update(num_classes=rows - null, null_class=null)
    for _, width in shapes("context_embed.weight", ndim=2):         # U-ViT's tokens: time, text, patches
        arguments.update(text_dim=width, text_tokens=weights["pos_embed"].shape[1] - 1 - (size // patch) ** 2)
    return {**arguments, **given}


def parse_labels(text, source):
    """ "3,horse" -> [3, 7]. Where a class is named by a number, as in folders 1, 2, 10, all numbers are names.

    Raises ValueError on a class that the model does not have.
    """
    if not source.num_classes:
        raise ValueError(f"--labels: {source.path} is a model without classes")
    known = {name: number for number, name in enumerate(source.class_names)}
    examples = ", ".join(list(known)[:10]) + ", .." * (len(known) > 10)
    if not any(map(str.isdecimal, known)):
        examples = f"0 to {source.num_classes - 1}" + f", or {examples}" * bool(known)
        known.update({str(number): number for number in range(source.num_classes)})
    try:
        return [known[item.strip()] for item in text.split(",")]
    except KeyError as item:
        raise ValueError(f"--labels {item.args[0]}: the model has classes {examples}") from None


def parse_conditions(args, source):
    """--labels or --prompt -> the conditions that images take in turn: labels (k,), text features (k, T, F), or None.

    Raises ValueError where the model does not take what is asked.
    """
    texts = args.prompt
    if args.prompts:
        texts = [line for line in Path(args.prompts).read_text("utf-8", "replace").splitlines() if line.strip()]
        if not texts or "\ufffd" in "".join(texts):        # what "replace" puts where bytes are no text
            raise ValueError(f"--prompts {args.prompts}: holds no text in UTF-8")
    if texts and not source.encode_text:
        raise ValueError(f"--prompt: {source.path} takes no text")
    if args.labels:
        return torch.tensor(parse_labels(args.labels, source))
    if texts:
        return torch.cat([source.encode_text(texts[i:i + 100]).cpu() for i in range(0, len(texts), 100)])
    return torch.arange(source.num_classes) if source.num_classes else None


# ---------------------------------------------------------------------------------------------------------------------
# Images out


def sampled(source, conditions, num, batch_size, here, amp=False, **settings):
    """Yield (indices, uint8 images (n, 3, H, W)) until all `num` are made; each process makes its share of the batches.

    Image i has conditions[i % len(conditions)], where there are any. amp runs the network in bfloat16. settings
    override the source's. A compiled network is made for one size of batch: the last is filled up.
    Raises ValueError where an image is not finite.
    """
    settings = {**source.settings, **settings}
    size = min(batch_size, math.ceil(num / here.world))         # few images, too, are shared by all processes
    name = f"{settings['sampler']}, {settings['steps']} steps"
    with tqdm(total=num, desc=name, unit="image", disable=here.rank > 0) as bar:
        for first in range(here.rank * size, num, here.world * size):
            indices = range(first, min(first + size, num))
            batch = range(first, first + size) if source.compiled else indices
            y = None if conditions is None else conditions[torch.tensor(batch) % len(conditions)].to(here.device)
            with torch.autocast(here.device.type, torch.bfloat16, enabled=amp):
                x0 = diffusion.generate(source.model, source.schedule, source.shape, batch, y, source.null,
                                        weak=source.weak, **settings, device=here.device,
                                        progress=here.rank == 0)[:len(indices)]
            if not x0.isfinite().all():
                raise ValueError(f"{source.path}: images {first} to {indices[-1]} are not finite (NaN); try --amp off, "
                                 "another --sampler, or other weights")
            yield indices, source.decode(x0).cpu()
            bar.update(min(here.world * size, num - first))


def write(args, source, y, num, rows, here):
    """Draw `num` images for each guidance weight into args.out, a grid in so many rows. Returns how many there are.

    Every process writes into one file, at its images' places, which the first one then puts into form. Its name and
    that of the unfinished result are of this run alone, and both are gone however it ends, SIGKILL excepted.
    """
    out, form = args.out, args.form
    weights = args.sweep or [source.settings["w"]]
    shape = (len(weights) * num, *source.image_shape[1:], 3)
    name = f"{out.name}.{here.highest(secrets.randbits(62)):x}.part"    # the same in all processes
    part, result = out.with_name(name), out.with_name(name + form)
    try:
        if here.rank == 0 and form != "folder":
            needed, free = 2 * math.prod(shape), shutil.disk_usage(out.parent).free
            if needed > free:
                raise OSError(f"--out {out}: {shape[0]} images take {needed / 1e9:.1f} GB while they are made, and "
                              f"{free / 1e9:.1f} are free; make room or give another --out")
            part.touch()
        here.highest()      # wait for one another
        for number, w in enumerate(weights):
            for indices, images in sampled(source, y, num, args.batch_size, here, args.amp == "bf16", w=w):
                images = images.permute(0, 2, 3, 1).numpy()
                with bookkeeping.writing(out):
                    if form == "folder":
                        for i, image in zip(indices, images):
                            Image.fromarray(image).save(out / f"{i:06d}.png")
                        continue
                    with open(part, "r+b") as file:
                        file.seek((number * num + indices.start) * images[0].nbytes)
                        file.write(images.tobytes())
        here.highest()
        if here.rank == 0 and form != "folder":
            images = np.memmap(part, np.uint8, "r", shape=shape)
            with bookkeeping.writing(out):
                if form == ".npz":
                    labels = dict(arr_1=y.numpy()[np.arange(num) % len(y)]) if source.num_classes else {}
                    np.savez(result, arr_0=images, **labels)
                else:           # image i of weight k is the grid's i * len(weights) + k
                    images = images.reshape(len(weights), num, *shape[1:]).swapaxes(0, 1).reshape(shape)
                    data.save_grid(torch.from_numpy(images.copy()).permute(0, 3, 1, 2), result, rows)
                result.replace(out)
    finally:
        if here.rank == 0:
            part.unlink(missing_ok=True)
            result.unlink(missing_ok=True)
    return shape[0]


def main(argv=None):
    args = parse(argv)
    here = bookkeeping.Processes(args.device)
    if args.export:
        if here.rank == 0:
            export(args)
        return here.close()
    source = open_source(args, here.device)
    y, asked = parse_conditions(args, source), args.labels or args.prompt or args.prompts
    if y is not None and args.form == ".png" and not asked:
        y = y[::math.ceil(len(y) / 10)]         # a grid shows ten classes at most
    rows = len(args.sweep or (() if y is None else y))
    num = args.num_images or (8 if args.sweep else 8 * rows if rows and (asked or args.form == ".png") else 64)
    if args.form == "folder":
        with bookkeeping.writing(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
    with bookkeeping.lock(args.out) if here.rank == 0 else contextlib.nullcontext():
        check_out(args.out, args.form)          # again: another run may have ended there since
        count = write(args, source, y, num, rows, here)
    if here.rank == 0:
        settings, step = source.settings, "" if source.step is None else f", step {source.step}"
        w = ", ".join(f"{w:g}" for w in args.sweep or [settings["w"]])
        print(f"{args.out}: {count} images from {source.path} (weights {source.weights}{step}), "
              f"{settings['sampler']} {settings['steps']} steps, w {w}, seed {settings['seed']}"
              + f", guided by {args.guide_with}" * bool(args.guide_with))
    here.close()


if __name__ == "__main__":
    bookkeeping.command("sample.py", main, "interrupted")
