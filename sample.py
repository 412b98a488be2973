"""Sample images: from a run's checkpoint, or from a file of released weights.

    python sample.py --ckpt runs/uvit_tiny-shapes/checkpoint.pt                           # a grid, samples.png
    torchrun --nproc_per_node=8 -- sample.py --ckpt runs/uvit_s2-cifar10/checkpoint.pt --num 50000 --out x.npz
    python sample.py --model uvit_h2 --weights imagenet256_uvit_huge.pth --data imagenet256 --labels 207,otter
    python sample.py --model uvit_s2 --weights mscoco_uvit_small.pth --data mscoco256 --prompt "a red bus" "two cats"

--out decides the form: a .png grid (a row for each label or prompt), an .npz (arr_0: uint8 (N, H, W, 3), arr_1:
labels), or a folder of PNGs. --sweep draws a grid with a row for each guidance weight, --walk one that goes from one
noise, class or prompt to another. Latents are decoded by the autoencoder they were made with, prompts encoded by CLIP.
Image i depends on the seed, i and its condition, not on the batch size or the number of processes (up to rounding: for
another batch, kernels add in another order). The lone "--" keeps recent torchruns from taking --num for their own.
"""
import argparse
import math
import re
import shutil
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
    add("--image-size", type=int, metavar="PIXELS", help="with --weights: of the images, if not the data's own")
    add("--raw", action="store_true", help="the weights themselves, not their moving average (EMA)")
    add("--autoencoder", metavar="NAME", help="hub name or folder of the latents' autoencoder, if not the data's own")
    add("--clip", metavar="NAME", help="hub name or folder of the prompts' text encoder, if not the data's own")
    add = p.add_argument_group("what to sample").add_argument
    add("--num", type=int, metavar="N", help="images (default 64, or 8 for each label of --labels or a grid)")
    add("--labels", metavar="L,L,..", help="classes by number or name, taken in turn (default: all; ten for a grid)")
    add("--prompt", nargs="+", metavar="TEXT", help="texts, taken in turn; or a file with one on each line")
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
    add("--compile", action="store_true", help="torch.compile the network: a minute at the start, for many images")
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
    add("--sweep", type=float, nargs="+", metavar="W", help="a grid with a row for each of these guidance weights")
    add("--walk", choices=["noise", "condition"],
        help="a grid whose rows go from one noise to another (spherical), or from the first of two labels or prompts "
             "to the second (linear)")
    args = p.parse_args(argv)
    check_flags(args)
    out = args.out = Path(args.out)
    args.form = out.suffix.lower() or "folder"
    if args.sweep and args.walk or (args.sweep or args.walk) and args.form != ".png":
        raise ValueError("--sweep and --walk each draw a grid: give one of them, and an --out that ends in .png")
    if args.form not in (".png", ".npz", "folder"):
        raise ValueError(f"--out {out}: give a name that ends in .png or .npz, or a folder's without a dot")
    if args.form == "folder" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not an empty folder; images would be mixed up")
    if args.form == ".npz" and out.exists() or args.form == ".png" and out.is_dir():
        raise ValueError(f"--out {out}: exists already; remove it or give another name")
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
    shared = [name for name in own if name in other and name not in fixed]
    wrong = {"missing": [name for name in own if name not in other],
             "unexpected": [name for name in other if name not in own],
             "of another shape": [f"{n} {other[n]}, here {own[n]}" for n in shared if own[n] != other[n]]}
    problems = [f"{len(names)} {kind} ({', '.join(names[:3])}{', ..' if len(names) > 3 else ''})"
                for kind, names in wrong.items() if names]
    if problems:
        raise ValueError(f"{path}: does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(state)


def open_source(args, device):
    """--ckpt or --weights -> a namespace of the model, what it draws and on which conditions, and how to sample."""
    if args.ckpt:
        state = train.read_checkpoint(args.ckpt)
        config, arguments, step, shape = state["config"], state["model_args"], state["step"], tuple(state["shape"])
        key = "model" if args.raw else "ema"
        weights, names, null, encoding = state[key], state["class_names"], state["null"], state["encoding"]
        name, path = config["model"], args.ckpt
    else:
        kind = data.kind(args.data)
        config = train.recipe(args.model, kind)
        name, path, step, names, null = args.model, args.weights, None, [], None
        encoded = args.data not in data.DATASETS and kind != "folder"
        encoding = data.read_encoding(args.data) if encoded else data.ENCODINGS.get(args.data)
        weights, key = read_weights(path, args.raw)
        size = args.image_size or (encoding["image_size"] if encoding else data.IMAGE_SIZE[kind])
        arguments, shape = released_arguments(weights, config, size, encoding)
    model = train.build(name, arguments)
    load_weights(model, weights, path)
    model = model.to(device).eval()
    if hasattr(model, "fold"):
        model = model.fold()        # U-DiT: the branches of its convolutions merged, once for all steps
    if args.compile:
        model.compile()
    if encoding:
        encoding = {**encoding, **{k: v for k in ("autoencoder", "clip") if (v := getattr(args, k))}}
    if args.cfg_channels and args.cfg_channels > shape[0]:
        raise ValueError(f"--cfg-channels {args.cfg_channels}: {path} has {shape[0]} channels")
    classes = arguments["num_classes"]
    if classes == 1000 and (not names or names[0] == "n01440764"):      # ImageNet: by name, not by number in WordNet
        names = data.imagenet_names()
    if classes and arguments["null_class"]:
        null = torch.tensor(classes, device=device)

    settings = {name: config[key] if given is None else given for name, given, key in [
        ("sampler", args.sampler, "sampler"), ("steps", args.steps, "sample_steps"), ("w", args.cfg, "cfg"),
        ("clip", args.clip_x0, "clip_x0")]}
    return SimpleNamespace(
        model=model, compiled=args.compile, device=device, schedule=diffusion.SCHEDULES[config["schedule"]](),
        shape=shape, image_shape=(3, *[encoding["image_size"]] * 2) if encoding else shape, encoding=encoding,
        decode=data.decoder(encoding, device), num_classes=classes, class_names=names, text="text_dim" in arguments,
        null=null, path=path, step=step, weights={"ema": "EMA", "model": "raw"}.get(key, "as they are"),
        settings=dict(settings, channels=args.cfg_channels, seed=args.seed))


def released_arguments(weights, config, image_size, encoding):
    """What a file of weights alone tells of its model: the constructor's arguments, and the shape of its images."""
    size = image_size // 8 if encoding else image_size          # the autoencoders' latents: 8 times smaller
    null_row = config["label_dropout"] > 0                      # whoever dropped labels has a row for the null label
    rows = [len(w) for key, w in weights.items() if key.endswith(("label_emb.weight", "embedding_table.weight"))]
    stems = [w for key, w in weights.items()
             if key in ("patch_embed.proj.weight", "x_embedder.proj.weight", "stem.weight")]
    channels, patch = (stems[0].shape[1], stems[0].shape[-1]) if stems else (3, 1)
    arguments = dict(image_size=size, in_channels=channels, num_classes=rows[0] - null_row if rows else 0,
                     null_class=null_row)
    if "context_embed.weight" in weights:                       # U-ViT's tokens: time, text, patches
        tokens = weights["pos_embed"].shape[1] - 1 - (size // patch) ** 2
        arguments.update(text_dim=weights["context_embed.weight"].shape[1], text_tokens=tokens)
    return arguments, (channels, size, size)


def parse_labels(text, source):
    """ "3,horse" -> [3, 7]. Raises ValueError on a class that the model does not have."""
    if not source.num_classes:
        raise ValueError(f"--labels: {source.path} is a model without classes")
    names, labels = list(source.class_names), []
    for item in text.split(","):
        item = item.strip()
        label = names.index(item) if item in names else int(item) if item.isdecimal() else -1
        if not 0 <= label < source.num_classes:
            named = f", or {', '.join(names[:10])}{', ..' if len(names) > 10 else ''}" if names else ""
            raise ValueError(f"--labels {item}: the model has classes 0 to {source.num_classes - 1}{named}")
        labels.append(label)
    return labels


def parse_conditions(args, source):
    """--labels or --prompt -> the conditions that images take in turn: labels (k,), text features (k, T, F), or None.

    Encodes the empty text as source.null where the checkpoint brought none. Raises ValueError where the model does not
    take what is asked, or guidance is asked of one without a null label.
    """
    y = None
    if source.text:
        if not args.prompt:
            raise ValueError(f"{source.path} draws what a text says: give --prompt")
        if not (source.encoding or {}).get("clip"):
            raise ValueError(f"{source.path}: its text encoder is not known; name it with --clip")
        file = Path(args.prompt[0])
        prompts = file.read_text().splitlines() if len(args.prompt) == 1 and file.is_file() else args.prompt
        encode = data.TextEncoder(source.encoding["clip"], source.device)
        y = encode(prompts)
        if source.null is None:
            source.null = encode([""])[0]
    elif args.prompt:
        raise ValueError(f"--prompt: {source.path} takes no text")
    if args.labels or source.num_classes:
        labels = parse_labels(args.labels, source) if args.labels else range(source.num_classes)
        y = torch.tensor(list(labels), device=source.device)
    if source.settings["w"] != 1 and (y is None or source.null is None):
        raise ValueError(f"--cfg {source.settings['w']:g}: {source.path} has no null label to guide with; "
                         "leave it at 1")
    return y


# ---------------------------------------------------------------------------------------------------------------------
# Images out


def sampled(source, conditions, num, batch_size, here, amp=False, noise=None, **settings):
    """Yield (indices, uint8 images (n, 3, H, W)) until all `num` are made; each process makes its share of the batches.

    Image i has conditions[i % len(conditions)], where there are any. amp runs the network in bfloat16. noise is a
    function of indices that returns generate's noise; settings override the source's. A compiled network is made for
    one size of batch: the last is filled up.
    """
    settings = {**source.settings, **settings}
    name = f"{settings['sampler']}, {settings['steps']} steps"
    batches = [range(first, min(first + batch_size, num)) for first in range(0, num, batch_size)]
    with tqdm(total=num, desc=name, unit="image", disable=here.rank > 0) as bar:
        for number, indices in enumerate(batches):
            if number % here.world == here.rank:
                batch = range(indices.start, indices.start + batch_size) if source.compiled else indices
                y = None if conditions is None else conditions[torch.tensor(batch) % len(conditions)]
                with torch.autocast(here.device.type, torch.bfloat16, enabled=amp):
                    images = diffusion.generate(
                        source.model, source.schedule, source.shape, batch, y, source.null, **settings,
                        noise=noise and noise(batch), device=here.device, progress=here.rank == 0)
                yield indices, source.decode(images[:len(indices)]).cpu()
            bar.update(len(indices))


class Walk:
    """Noise for pictures on the way from image a to image b: each draw lies between theirs, on a sphere's great circle.

    Normal noise lies near a sphere: a straight line between two such points would leave it (Shoemake's slerp).
    """

    def __init__(self, seed, a, b, fractions):
        self.ends, self.fractions = [diffusion.ImageNoise(seed, [image]) for image in (a, b)], fractions

    def __call__(self, x):
        a, b = (end(x[:1]).double() for end in self.ends)                   # (1, C, H, W)
        f = torch.as_tensor(self.fractions).to(a).view(-1, 1, 1, 1)
        angle = torch.arccos(((a * b).sum() / a.norm() / b.norm()).clamp(-1, 1))
        if angle < 1e-6:
            return a.expand_as(x).to(x)
        return ((((1 - f) * angle).sin() * a + (f * angle).sin() * b) / angle.sin()).to(x)


def conditions_between(model, y, fractions):
    """Conditions (k, ..) on the straight line between the two in y: texts' features, or new labels.

    A new label is a new row of the model's tables of labels, between the rows of the two.
    """
    f = torch.as_tensor(fractions, dtype=torch.float32, device=y.device)
    if y.is_floating_point():
        return torch.lerp(y[:1], y[1:], f[:, None, None])
    for table in [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]:
        known, (a, b) = len(table.weight), table.weight.data[y]
        rows = torch.cat([table.weight.data, torch.lerp(a, b, f[:, None])])
        table.weight = torch.nn.Parameter(rows, requires_grad=False)
    return known + torch.arange(len(f), device=y.device)


def plan(args, source, y):
    """What to draw: (number of images in a job, rows of the grid, jobs), a job being arguments of `sampled`."""
    columns = args.num or 8
    if args.sweep:
        return columns, len(args.sweep), [dict(conditions=y, w=w) for w in args.sweep]
    if args.walk:
        at = np.linspace(0, 1, columns)

        def walk(a, b):
            return lambda indices: Walk(args.seed, a, b, [at[i % columns] for i in indices])

        if args.walk == "noise":
            ways = [None] if y is None else y.split(1)
            return columns, len(ways), [dict(conditions=one, noise=walk(0, 1)) for one in ways]
        if y is None or len(y) != 2:
            raise ValueError("--walk condition goes from one to another: give two --labels or two texts to --prompt")
        between = conditions_between(source.model, y, at)
        return columns, 4, [dict(conditions=between, noise=walk(row, row)) for row in range(4)]
    rows = 0 if y is None else len(y)
    of_each = rows and (args.labels or args.prompt or args.form == ".png")
    return args.num or (8 * rows if of_each else 64), rows, [dict(conditions=y)]


def main(argv=None):
    args = parse(argv)
    here = train.Processes(args.device)
    source = open_source(args, here.device)
    out, form = args.out, args.form
    if args.sweep:
        source.settings["w"] = next((w for w in args.sweep if w != 1), 1)       # checked with the conditions
    y = parse_conditions(args, source)
    if y is not None and form == ".png" and not (args.labels or args.prompt):
        y = y[::math.ceil(len(y) / 10)]         # ten rows at most
    num, rows, jobs = plan(args, source, y)
    shape = (num * len(jobs), *source.image_shape)
    with train.writing(out):
        (out if form == "folder" else out.parent).mkdir(parents=True, exist_ok=True)
    needed, free = 2 * math.prod(shape), shutil.disk_usage(out.parent).free
    if form != "folder" and needed > free:
        raise OSError(f"--out {out}: {shape[0]} images take {needed / 1e9:.1f} GB while they are made, and "
                      f"{free / 1e9:.1f} are free; make room or give another --out")

    # Every process writes its rows, job by job, into one file on disk, which the first one then puts into form.
    part = out.with_name(out.name + ".part.npy")
    try:
        if form != "folder" and here.rank == 0:
            with train.writing(out):
                np.lib.format.open_memmap(part, "w+", np.uint8, shape)
        here.highest()      # wait for one another
        for number, job in enumerate(jobs):
            for indices, batch in sampled(source, **job, num=num, batch_size=args.batch_size, here=here,
                                          amp=args.amp == "bf16"):
                with train.writing(out):
                    if form == "folder":
                        for i, image in zip(indices, batch.permute(0, 2, 3, 1).numpy()):
                            Image.fromarray(image).save(out / f"{i:06d}.png")
                    else:
                        data.write_rows(part, number * num + indices.start, batch.numpy())
        here.highest()
        if here.rank == 0 and form == ".npz":
            labels = dict(arr_1=y.cpu().numpy()[np.arange(num) % len(y)]) if source.num_classes else {}
            try:
                with train.writing(out):
                    np.savez(out, arr_0=np.load(part, mmap_mode="r").transpose(0, 2, 3, 1), **labels)
            except OSError:
                out.unlink(missing_ok=True)
                raise
        elif here.rank == 0 and form == ".png":     # image i of job j becomes row i * jobs + j
            images = np.load(part).reshape(len(jobs), num, *source.image_shape).swapaxes(0, 1).reshape(shape)
            with train.writing(out):
                data.save_grid(torch.from_numpy(images), out, rows)
    finally:
        if here.rank == 0:
            part.unlink(missing_ok=True)
    if here.rank == 0:
        settings, step = source.settings, "" if source.step is None else f", step {source.step}"
        w = ", ".join(f"{w:g}" for w in args.sweep or [settings["w"]])
        print(f"{out}: {shape[0]} images from {source.path} (weights {source.weights}{step}), "
              f"{settings['sampler']} {settings['steps']} steps, w {w}, seed {settings['seed']}")
    here.close()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:      # bad input: one line that says what and where, not a stack trace
        sys.exit(f"sample.py: {error}")
    except KeyboardInterrupt:
        sys.exit("sample.py: interrupted")
