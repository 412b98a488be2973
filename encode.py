"""Images to latents, captions to text features, and back. A command, and what train.py and sample.py decode with.

    python encode.py --images imagenet/train --out data/imagenet256
    torchrun --nproc_per_node=8 encode.py --images train2014 --captions captions_train2014.json --out data/mscoco256

The latents are those of Stable Diffusion's autoencoders, the text features those of CLIP. A latent is kept as its
Gaussian, from which every training step draws anew. Each batch has a file of its own, under a temporary name until it
is whole. So the processes need not talk to one another, and a run that was killed continues to the same numbers.
"""
import argparse
import contextlib
import hashlib
import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import bookkeeping
import data
from data import Images, list_images, one_line, read_image, read_square, to_uint8

# ---------------------------------------------------------------------------------------------------------------------
# Stable Diffusion's autoencoder and CLIP. Only this part needs diffusers and transformers.

AUTOENCODER, CLIP, SCALE = "stabilityai/sd-vae-ft-ema", "openai/clip-vit-large-patch14", 0.18215
FIRST = "CompVis/stable-diffusion-v1-4/vae"     # repository/folder; U-ViT's release calls it autoencoder_kl.pth
ENCODINGS = {       # what the papers' weights take; they come without an encoding.json
    "imagenet256": dict(autoencoder=AUTOENCODER, scale=SCALE, image_size=256, clip=None),
    "imagenet512": dict(autoencoder=AUTOENCODER, scale=SCALE, image_size=512, clip=None),
    "mscoco256": dict(autoencoder=FIRST, scale=0.23010, image_size=256, clip=CLIP),
}


def released_encoding(model, dataset):
    """The entry of ENCODINGS that a model's released weights take on a named data set, or None for pixels."""
    encoding = ENCODINGS.get(dataset)
    if (model, dataset) in [("uvit_l2", "imagenet256"), ("uvit_l4", "imagenet512")]:
        return {**encoding, "autoencoder": FIRST}
    return encoding


def pretrained(package, class_name, name, **options):
    """An object of a class of diffusers or transformers, from a folder of save_pretrained or a name on huggingface.co.

    name    "owner/repository", or "owner/repository/folder"
    Raises ValueError where the package is missing, or nothing can be read under that name.
    """
    try:
        cls = getattr(importlib.import_module(package), class_name)
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"{name}: needs the package {package}: pip install {package} ({one_line(error)})") from None
    repository, folder = name, {}
    if not Path(name).is_dir() and str(name).count("/") == 2:
        repository, _, folder["subfolder"] = name.rpartition("/")
    try:
        return cls.from_pretrained(repository, **folder, **options)
    except Exception as error:      # OSError, HTTP errors, KeyError, whatever the reader makes of other files
        raise ValueError(f"{name}: no {class_name} could be read from a folder, nor from huggingface.co, of that name "
                         f"({one_line(error)})") from None


class Autoencoder:
    """A KL autoencoder of Stable Diffusion, frozen, in float32 (float16 overflows in some of them)."""

    def __init__(self, name=AUTOENCODER, device="cpu", scale=SCALE):
        net = pretrained("diffusers", "AutoencoderKL", name, low_cpu_mem_usage=False)   # True asks for one more package
        self.net = net.to(device).requires_grad_(False).eval()
        self.device, self.scale = device, scale

    def moments(self, x):
        """Images (n, 3, S, S), uint8 or in [-1, 1] -> C means and C log variances, (n, 2C, s, s) float32, unscaled."""
        x = x.to(self.device)
        return self.net.encode(x if x.is_floating_point() else x / 127.5 - 1).latent_dist.parameters

    def decode(self, latents):
        """Scaled latents (n, C, s, s) -> images, uint8 (n, 3, S, S), on the device; a few at a time, to save memory."""
        parts = (latents.to(self.device, torch.float32) / self.scale).split(8)
        return torch.cat([to_uint8(self.net.decode(part).sample) for part in parts])


def decoder(encoding, device):
    """A function from samples x_0 to uint8 images (n, 3, H, W): of pixels where encoding is None, else of latents."""
    return Autoencoder(encoding["autoencoder"], device, encoding["scale"]).decode if encoding else to_uint8


class TextEncoder:
    """CLIP's text model, frozen: captions -> last hidden states (n, tokens, width) float32, all cut or padded to 77."""

    def __init__(self, name=CLIP, device="cpu"):
        self.tokenizer = pretrained("transformers", "CLIPTokenizer", name)
        net = pretrained("transformers", "CLIPTextModel", name)
        self.net = net.to(device).float().requires_grad_(False).eval()
        self.device, self.tokens = device, net.config.max_position_embeddings
        if len(self.tokenizer) < net.config.vocab_size:     # transformers makes an empty one where there are no files
            raise ValueError(f"{name}: lacks the tokenizer of its text model (tokenizer.json)")

    def __call__(self, captions):
        tokens = self.tokenizer(list(captions), padding="max_length", truncation=True, max_length=self.tokens,
                                return_tensors="pt")
        return self.net(input_ids=tokens.input_ids.to(self.device)).last_hidden_state


# ---------------------------------------------------------------------------------------------------------------------
# The command


def read_captions(path, root):
    """A JSON file of captions -> (image files below root, sorted; the first caption of each, (N + 1,); captions).

    As COCO's ("images" with id and file_name, "annotations" with image_id and caption), or {file name: [caption, ..]}.
    """
    try:
        content = json.loads(Path(path).read_text())
        if "annotations" in content:
            names = {image["id"]: image["file_name"] for image in content["images"]}
            pairs = [(names[caption["image_id"]], caption["caption"]) for caption in content["annotations"]]
        else:
            pairs = [(name, text) for name, texts in content.items() for text in [] + texts]    # a str is no list
        names, captions = zip(*sorted(pairs, key=lambda pair: pair[0]))
        if {type(text) for text in names + captions} != {str}:
            raise ValueError("names and captions must be text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--captions {path}: not a file of captions, neither COCO's nor {{file name: [caption, ..]}} "
                         f"({type(error).__name__}: {one_line(error)})") from None
    names, first = np.unique(names, return_index=True)
    files = [os.path.join(root, name) for name in names]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise FileNotFoundError(f"{missing[0]}: no such image, but {path} has captions for it ({len(missing)} of "
                                f"{len(files)} are missing)")
    return files, np.append(first, len(captions)), captions


def place(device):
    """The place of this process, as torchrun sets it: (rank, number of processes, its torch.device)."""
    if "RANK" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError("RANK is set, but WORLD_SIZE is not: set both, as torchrun does, or none")
    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU: {torch.cuda.device_count()} found; start "
                             "fewer processes, or use --device cpu")
        torch.cuda.set_device(local)
    return rank, world, torch.device(device)


@contextlib.contextmanager
def whole(path):
    """A file to write to. It gets the name `path` when the block ends, so a file of that name is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with bookkeeping.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def begin(out, encoding, arrays):
    """Write the small arrays and encoding.json. Raises ValueError where those of other settings or images are there."""
    if (out / "encoding.json").exists():
        before = data.read_encoding(out)
        changed = [key for key in encoding if before.get(key) != encoding[key]]
        if changed:
            raise ValueError(f"{out}: begun with other {', '.join(changed)}; give another --out, or remove this one")
        return
    for name, array in arrays.items():
        with whole(out / f"{name}.npy") as file:
            np.save(file, np.asarray(array))
    with whole(out / "encoding.json") as file:
        file.write(json.dumps(encoding, indent=2).encode() + b"\n")


def write_missing(out, name, encoding, rows_of, rank, world):
    """Write this process's missing files of a table. rows_of(spans) yields a tensor for each span (first, end)."""
    step = encoding["batch_size"]       # every world-th file is this process's, whatever the others have written by now
    mine = [missing for missing in data.missing_files(out, name, encoding) if missing[1] // step % world == rank]
    bar = tqdm(mine, desc=name, unit="batch", disable=rank > 0, mininterval=0.1 if sys.stderr.isatty() else 30)
    for (path, first, end), rows in zip(bar, rows_of([span for _, *span in mine])):
        if not rows.isfinite().all():
            raise ValueError(f"{path}: some numbers of images or captions {first} to {end - 1} are not finite in "
                             f"{rows.dtype}; try --type float32 or another --autoencoder")
        with whole(path) as file:
            file.write(rows.cpu().numpy().tobytes())


def encode(args):
    """Images -> a folder that data.load reads. Several processes (torchrun) share the work; a killed run continues.

    moments/       (N, 2, 2C, h, w): for image and mirror, C means and C log variances of the autoencoder;
                   (N, 1, 2C, h, w) with captions, which a mirrored image would not fit
    text/          (M, tokens, width): CLIP's features of all captions. As in moments/, each file holds `batch_size`
                   rows and bears the number of the first; np.fromfile(file, type) reads it.
    labels.npy     (N,) int64, where the images lie in class folders
    captions.npy   (N + 1,) int64: captions[i] to captions[i + 1] are the rows of text that belong to image i
    null.npy       (tokens, width): the features of the empty string
    encoding.json  autoencoder, scale, clip, image_size, batch_size, type, count (N), shape (C, h, w), text (tokens,
                   width) or null, class_names, tables (the shapes of moments and text), and files, a checksum of the
                   images' names and sizes and of the captions
    """
    bookkeeping.check(vars(args))
    rank, world, device = place(args.device)
    size = args.image_size
    labels, names, captions = None, (), ()
    if args.captions:
        files, index, captions = read_captions(args.captions, args.images)
    else:
        files, labels, names = list_images(args.images)
    images = Images(files, None, (), (3, size, size), read_square if captions else read_image)
    content = json.dumps([images.identity()["files"], captions])
    usual = ENCODINGS["mscoco256" if captions else "imagenet256"]
    autoencoder, clip = (str(Path(name).resolve()) if Path(name).is_dir() else name
                         for name in (args.autoencoder or usual["autoencoder"], args.clip))
    scale = usual["scale"] if args.scale is None else args.scale

    vae = Autoencoder(autoencoder, device)
    text = TextEncoder(clip, device) if captions else None
    dtype, out = getattr(torch, args.type), Path(args.out)
    shape = vae.moments(torch.zeros(1, 3, size, size)).shape[1:]
    if size % shape[-1]:
        raise ValueError(f"--image-size {size}: latents of {shape[-1]} would decode to another size")
    arrays, tables = {"labels": labels} if names else {}, {"moments": [len(files), 1 if captions else 2, *shape]}
    if captions:
        arrays = {"captions": index, "null": text([""])[0].to(dtype).cpu()}
        tables["text"] = [len(captions), *arrays["null"].shape]
    encoding = dict(
        autoencoder=autoencoder, scale=scale, clip=clip if captions else None, image_size=size,
        batch_size=args.batch_size, type=args.type, count=len(files), shape=[shape[0] // 2, *shape[1:]],
        text=tables["text"][1:] if captions else None, class_names=list(names), tables=tables,
        files=hashlib.sha256(content.encode()).hexdigest())

    def moments_rows(spans):
        order = [np.array([(i, 0) for i in range(first, end)]) for first, end in spans]
        for x, _ in images.batches(order, device, args.workers):
            sides = [x] if captions else [x, x.flip(-1)]
            yield torch.stack([vae.moments(side) for side in sides], dim=1).to(dtype)

    def text_rows(spans):
        for first, end in spans:
            yield text(captions[first:end]).to(dtype)

    with bookkeeping.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with bookkeeping.lock(out) if rank == 0 else contextlib.nullcontext():
        begin(out, encoding, arrays)
        write_missing(out, "moments", encoding, moments_rows, rank, world)
        if captions:
            write_missing(out, "text", encoding, text_rows, rank, world)
    data.say(f"{out}: {len(files)} images as latents {tuple(encoding['shape'])}, {len(names) or 'no'} classes, "
             f"{len(captions) or 'no'} captions")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", required=True, metavar="FOLDER", help="flat, or one folder for each class")
    add("--out", required=True, metavar="FOLDER", help="data/<name> is where --data <name> looks (imagenet256, ..)")
    add("--image-size", type=int, default=256, metavar="PIXELS", help="default 256")
    add("--captions", metavar="JSON", help="COCO's captions_train2014.json, or a file of {file name: [caption, ..]}; "
        "images are then cropped and scaled as in U-ViT's MS-COCO")
    add("--autoencoder", metavar="NAME_OR_FOLDER", help=f"default {AUTOENCODER}; with captions {FIRST}, "
        "which U-ViT's weights uvit_l2 of imagenet256 and uvit_l4 of imagenet512 take too")
    add("--scale", type=float, help=f"what latents are multiplied by (default {SCALE}; with captions 0.2301)")
    add("--clip", default=CLIP, metavar="NAME_OR_FOLDER", help=f"text encoder (default {CLIP})")
    add("--type", choices=["float16", "float32"], default="float16", help="numbers in the files (default float16)")
    add("--batch-size", type=int, default=32, metavar="N", help="images at a time, and in each file (default 32)")
    add("--workers", type=int, default=4, metavar="N", help="processes that read images, for each GPU (default 4)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is one")
    encode(parser.parse_args(argv))


if __name__ == "__main__":
    bookkeeping.command("encode.py", main, "stopped; the same command continues")
