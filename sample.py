"""Sample images: from a run's checkpoint, or from a file of released weights.

    python sample.py --ckpt runs/uvit_tiny-shapes/checkpoint.pt                           # a grid, samples.png
    torchrun --nproc_per_node=8 -- sample.py --ckpt runs/uvit_s2-cifar10/checkpoint.pt --num 50000 --out x.npz
    python sample.py --model uvit_s2 --weights cifar10_uvit_small.pth --data cifar10 --out grid.png

--out decides the form: a .png grid (a row for each label), an .npz (arr_0: uint8 (N, H, W, 3), arr_1: labels), or a
folder of PNGs. Image i depends on the seed, i and its label, not on the batch size or the number of processes (up to
rounding: for another batch, kernels add in another order). The lone "--" keeps a recent torchrun from taking --num for
an abbreviation of its own --numa-binding.
"""
import argparse
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import diffusion
import train


def add_flags(p):
    """The flags that say which weights, what to sample and how: sample.py's, and fid.py's where it samples itself."""
    add = p.add_argument_group("weights: a run's checkpoint, or a file of weights and what it is").add_argument
    add("--ckpt", metavar="FILE", help="checkpoint.pt of a run of train.py")
    add("--weights", metavar="FILE", help="released weights: a state dict, bare or under 'ema', 'model', 'state_dict'")
    add("--model", metavar="NAME", help=f"with --weights: {', '.join(train.MODELS)}")
    add("--data", metavar="NAME", help="with --weights: what it was trained on")
    add("--image-size", type=int, metavar="PIXELS", help="with --weights: 32 for cifar10, 16 for shapes, else 64")
    add("--raw", action="store_true", help="the weights themselves, not their moving average (EMA)")
    add = p.add_argument_group("what to sample").add_argument
    add("--num", type=int, metavar="N", help="images (default 64, or 8 for each label of --labels or a grid)")
    add("--labels", metavar="L,L,..", help="classes by number or name, taken in turn (default: all; ten for a grid)")
    add("--cfg", type=float, metavar="W",
        help="guidance weight of eps_u + W (eps_c - eps_u); 1 is none, U-ViT's s is W - 1")
    add("--cfg-channels", type=int, metavar="C", help="guide the first C channels only (DiT's release: 3)")
    add("--sampler", choices=diffusion.SAMPLERS)
    add("--steps", type=int, metavar="N", help="calls of the network for an image")
    add("--clip-x0", action=argparse.BooleanOptionalAction, help="limit the predicted image to [-1, 1]")
    add("--seed", type=int, default=0, help="default 0")
    add = p.add_argument_group("how").add_argument
    add("--batch-size", type=int, default=100, metavar="N", help="images at a time on each process (default 100)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is one")
    add("--amp", choices=["bf16", "off"], help="autocast type of the network (default bf16 on cuda, off on cpu)")
    return add


def check_flags(args):
    """Raise ValueError where these flags do not go together; fill in --amp."""
    if bool(args.ckpt) == bool(args.weights):
        raise ValueError("give either --ckpt (a run's checkpoint), or --weights with --model and --data")
    if args.weights and not (args.model and args.data):
        raise ValueError("--weights needs --model and --data: which network it is, and what it was trained on")
    train.check_bounds(vars(args))
    args.amp = args.amp or ("bf16" if args.device == "cuda" else "off")


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Where no default is given, it is the run's own setting, or the paper's for --model and --data.")
    add = add_flags(p)
    add("--out", default="samples.png", metavar="FILE_OR_FOLDER", help=".png, .npz, or a folder (default samples.png)")
    args = p.parse_args(argv)
    check_flags(args)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Weights in


def read_weights(path, raw=False):
    """A file of weights -> ({name: tensor}, its key), from a bare state dict or one under "ema", "model", "state_dict".

    raw prefers "model" to "ema". Prefixes left by wrappers ("module.", "_orig_mod.") are taken off. Raises
    FileNotFoundError, or ValueError where the file is something else; a pickle with code in it is refused, not run.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):    # DiT's own checkpoints keep their flags in one
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, OSError):
        raise                       # the machine's fault, not the file's
    except Exception as error:      # whatever torch makes of arbitrary bytes
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split(". ")[0].splitlines()[0]
        raise ValueError(f"{path}: not a file of weights alone, or damaged ({reason})") from None
    found = "bare"
    for key in ("model", "ema", "state_dict") if raw else ("ema", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state, found = state[key], key
            break
    if not isinstance(state, dict) or not state or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f"{path}: holds no state dict (names and tensors, bare or under 'ema', 'model', 'state_dict')")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in state.items()}, found


def load_weights(model, state, path):
    """Load a state dict into a model. Raises ValueError that names the keys that do not fit.

    Fixed tables (buffers, such as DiT's positions) may have been made for another image size: the model keeps its own.
    """
    fixed = {name for name, _ in model.named_buffers()}
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    other = {name: tuple(value.shape) for name, value in state.items()}
    problems = [f"{len(names)} {kind} ({', '.join(names[:3])}{', ..' if len(names) > 3 else ''})" for kind, names in [
        ("missing", [name for name in own if name not in other]),
        ("unexpected", [name for name in other if name not in own]),
        ("of another shape", [f"{name} {other[name]}, here {own[name]}" for name in own
                              if name in other and own[name] != other[name] and name not in fixed]),
    ] if names]
    if problems:
        raise ValueError(f"{path}: does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(state)


def open_source(args, device):
    """--ckpt or --weights -> a namespace of model, schedule, shape, num_classes, null label, and how to sample."""
    if args.ckpt:
        state = train.read_checkpoint(args.ckpt)
        config, arguments, step = state["config"], state["model_args"], state["step"]
        key = "model" if args.raw else "ema"
        weights, names, shape = state[key], state["class_names"], tuple(state["shape"])
        name, path = config["model"], args.ckpt
    else:
        if args.data not in data.DATASETS and not Path(args.data).is_dir():
            raise ValueError(f"--data {args.data}: no recipe of that name; {', '.join(data.DATASETS)}, or a folder")
        config = train.recipe(args.model, args.data if args.data in data.DATASETS else "folder")
        name, path, step, names = args.model, args.weights, None, []
        weights, key = read_weights(path, args.raw)
        rows = [len(w) for key, w in weights.items() if key.endswith(("label_emb.weight", "embedding_table.weight"))]
        stem = [w for key, w in weights.items()
                if key in ("patch_embed.proj.weight", "x_embedder.proj.weight", "stem.weight")]
        null_row = config["label_dropout"] > 0      # whoever dropped labels has a row for the null label
        size = args.image_size or data.IMAGE_SIZE.get(args.data, 64)
        shape = (stem[0].shape[1] if stem else 3, size, size)
        arguments = dict(image_size=size, in_channels=shape[0], num_classes=rows[0] - null_row if rows else 0,
                         null_class=null_row)
    model = train.build(name, arguments)
    load_weights(model, weights, path)
    classes = arguments["num_classes"]

    def setting(given, key):
        return config[key] if given is None else given

    return SimpleNamespace(
        model=model.to(device).eval(), schedule=diffusion.SCHEDULES[config["schedule"]](), shape=shape,
        num_classes=classes, class_names=names, null=classes if classes and arguments["null_class"] else None,
        path=path, step=step, weights={"ema": "EMA", "model": "raw"}.get(key, "as they are"),
        settings=dict(sampler=setting(args.sampler, "sampler"), steps=setting(args.steps, "sample_steps"),
                      w=setting(args.cfg, "cfg"), channels=args.cfg_channels, clip=setting(args.clip_x0, "clip_x0"),
                      seed=args.seed))


def parse_labels(text, source):
    """ "3,horse" -> [3, 7]. Raises ValueError on a class that the model does not have."""
    if not source.num_classes:
        raise ValueError(f"--labels: {source.path} is an unconditional model")
    labels = []
    for item in text.split(","):
        item = item.strip()
        label = source.class_names.index(item) if item in source.class_names else int(item) if item.isdigit() else -1
        if not 0 <= label < source.num_classes:
            named = f", or {', '.join(source.class_names[:10])}" if source.class_names else ""
            raise ValueError(f"--labels {item}: the model has classes 0 to {source.num_classes - 1}{named}")
        labels.append(label)
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# Images out


def sampled(source, labels, num, batch_size, here, amp=False):
    """Yield (indices, uint8 images (n, C, H, W)) until all `num` are made; each process makes its share of the batches.

    Image i has label labels[i % len(labels)], where there are labels. amp runs the network in bfloat16.
    """
    name = f"{source.settings['sampler']}, {source.settings['steps']} steps"
    batches = [range(first, min(first + batch_size, num)) for first in range(0, num, batch_size)]
    with tqdm(total=num, desc=name, unit="image", disable=here.rank > 0) as bar:
        for number, indices in enumerate(batches):
            if number % here.world == here.rank:
                y = torch.tensor([labels[i % len(labels)] for i in indices], device=here.device) if labels else None
                with torch.autocast(here.device.type, torch.bfloat16, enabled=amp):
                    images = diffusion.generate(source.model, source.schedule, source.shape, indices, y, source.null,
                                                **source.settings, device=here.device, progress=here.rank == 0)
                yield indices, data.to_uint8(images).cpu()
            bar.update(len(indices))


def main(argv=None):
    args = parse(argv)
    here = train.Processes(args.device)
    source = open_source(args, here.device)
    out = Path(args.out)
    form = out.suffix.lower() or "folder"
    if form not in (".png", ".npz", "folder"):
        raise ValueError(f"--out {out}: give a name that ends in .png or .npz, or a folder's without a dot")
    settings = source.settings
    if settings["w"] != 1 and source.null is None:
        raise ValueError(f"--cfg {settings['w']}: {source.path} has no null label to guide with; leave it at 1")
    labels = list(range(source.num_classes))
    if args.labels:
        labels = parse_labels(args.labels, source)
    elif form == ".png" and len(labels) > 10:
        labels = labels[::math.ceil(len(labels) / 10)]
    num = args.num or (8 * len(labels) if labels and (args.labels or form == ".png") else 64)
    if form == "folder" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not an empty folder; images would be mixed up")
    if form == ".npz" and out.exists():
        raise ValueError(f"--out {out}: exists already; remove it or give another name")
    out.parent.mkdir(parents=True, exist_ok=True)

    # Every process writes its rows into one file on disk, which the first one then puts into form.
    part = out.with_name(out.name + ".part.npy")
    if form == "folder":
        out.mkdir(exist_ok=True)
    elif here.rank == 0:
        np.lib.format.open_memmap(part, "w+", np.uint8, (num, *source.shape))
    here.highest()      # wait for one another
    try:
        for indices, images in sampled(source, labels, num, args.batch_size, here, args.amp == "bf16"):
            if form == "folder":
                for i, image in zip(indices, images.permute(0, 2, 3, 1).numpy()):
                    Image.fromarray(image).save(out / f"{i:06d}.png")
            else:
                rows = np.load(part, mmap_mode="r+")
                rows[indices.start:indices.stop] = images.numpy()
                rows.flush()
        here.highest()
        if here.rank == 0 and form == ".npz":
            y = dict(arr_1=np.array([labels[i % len(labels)] for i in range(num)])) if labels else {}
            np.savez(out, arr_0=np.load(part, mmap_mode="r").transpose(0, 2, 3, 1), **y)
        elif here.rank == 0 and form == ".png":
            data.save_grid(torch.from_numpy(np.load(part)), out, len(labels))
    finally:
        if here.rank == 0:
            part.unlink(missing_ok=True)
    if here.rank == 0:
        step = "" if source.step is None else f", step {source.step}"
        print(f"{out}: {num} images from {source.path} (weights {source.weights}{step}), {settings['sampler']} "
              f"{settings['steps']} steps, w {settings['w']:g}, seed {settings['seed']}")
    here.close()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:      # bad input: one line that says what and where, not a stack trace
        sys.exit(f"sample.py: {error}")
