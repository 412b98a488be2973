"""Data sets: images in, batches of x_0 in [-1, 1] and labels out.

    dataset = load("cifar10", data_dir="data")          # torchvision's CIFAR10, downloaded if it is not there
    dataset = load("shapes", image_size=16)             # ten classes of drawn shapes, made here, no download
    dataset = load("photos/", image_size=64)            # your images: flat (no labels), or one folder for each class
    dataset = load("imagenet256")                       # latents, and labels or text features, made beforehand by

    torchrun --nproc_per_node=8 data.py encode --images imagenet/train --out data/imagenet256 --image-size 256

Small sets (under 2 GiB as uint8) live on the training device, where a batch is one gather, and mirroring and scaling
cost next to nothing (CIFAR10 from 50,000 PNGs took 23 s to read on two CPU cores). Larger ones are read by workers.

Order, and which of its captions an image comes with, are functions of the seed and the place in the stream of epochs
alone (`shuffled`), so that a run can be resumed or split over processes exactly.
"""
import argparse
import hashlib
import importlib
import json
import math
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from tqdm import tqdm

IN_MEMORY = 2 * 2**30     # bytes of uint8 up to which a data set is held in memory
IMAGE_SIZE = {"cifar10": 32, "celeba64": 64, "imagenet64": 64, "imagenet256": 256, "imagenet512": 512, "mscoco256": 256,
              "shapes": 16, "folder": 64}     # where nothing else is asked for


def load(name, data_dir=None, image_size=None):
    """The training part of a data set, by name (DATASETS) or path (a folder of images, or one that `encode` wrote).

    data_dir    where a named data set lies (default: in data/)
    image_size  height and width of the images (default IMAGE_SIZE; latents keep that of their encoding)
    Raises ValueError or FileNotFoundError, in one line, where there is nothing of that name or it can not be read.
    """
    if data_dir and not Path(data_dir).is_dir():
        raise FileNotFoundError(f"--data-dir {data_dir}: no such folder")
    if name in DATASETS:
        return DATASETS[name](data_dir=data_dir, image_size=image_size)
    return from_files(*list_images(name), image_size or 64) if kind(name) == "folder" else Latents(name, image_size)


def kind(name):
    """What sort of data a name or path is, without reading it: a name of DATASETS, or "folder" for own images.

    An encoded folder counts as the set of the papers that it is most like: "mscoco256" with captions, "imagenet256"
    with labels, "imagenet512" if its latents are wider than 32; and else as "latents". Raises as `load` does.
    """
    if name in DATASETS:
        return name
    takes = f"--data takes {', '.join(DATASETS)}, or a folder of images or latents"
    if not Path(name).exists():
        raise FileNotFoundError(f"{name}: no such data set or folder; {takes}")
    if not Path(name).is_dir():
        raise ValueError(f"{name}: not a folder; {takes}")
    if not (Path(name) / "encoding.json").exists():
        return "folder"
    encoding = read_encoding(name)
    if encoding["text"]:
        return "mscoco256"
    if encoding["class_names"]:
        return "imagenet256" if encoding["shape"][-1] <= 32 else "imagenet512"
    return "latents"


# ---------------------------------------------------------------------------------------------------------------------
# What a data set is


class Images:
    """What all kinds share: shape (C, H, W) of x_0, labels (N,) int64 or None, class_names; batches, draws, prepare.

    Those on disk define read(index, choice) -> [x], or [x, text features], of one image: see `shuffled`.
    """
    flip = True         # may x_0 be mirrored?
    text = None         # (tokens, width) of text features, where these are y
    null = None         # and (tokens, width) float32, those of the empty string
    encoding = None     # of latents: what made them, the dict of encoding.json (see `encode`)

    def __init__(self, length, shape, labels, class_names):
        self.length, self.shape, self.labels, self.class_names = length, tuple(shape), labels, tuple(class_names)
        self.num_classes = len(self.class_names)

    def __len__(self):
        return self.length

    def __getitem__(self, places):
        """The batch of an array (n, 2) of `shuffled`: [x], or [x, y]."""
        try:
            rows = [self.read(int(index), int(choice)) for index, choice in places]
        except ValueError as error:     # a worker would wrap it in its stack trace: hand it over instead
            return error
        batch = [torch.stack(column) for column in zip(*rows)]
        return batch if self.labels is None else [*batch, self.labels[places[:, 0]]]

    def batches(self, order, device, workers=0):
        """For each array (n, 2) of `order` (see `shuffled`), on `device`: x, uint8 (n, C, H, W), and y, (n,) or None.

        So many processes (workers) read ahead. `Latents` have another x, and may have another y.
        """
        for batch in torch.utils.data.DataLoader(
                self, batch_size=None, sampler=order, num_workers=workers, worker_init_fn=ignore_signals,
                pin_memory=torch.device(device).type == "cuda"):
            if isinstance(batch, ValueError):
                raise batch
            x, *y = (part.to(device, non_blocking=True) for part in batch)
            yield x, (y[0].float() if self.text else y[0]) if y else None

    def draws(self, n, generator):
        """The random numbers that `prepare` needs for n images: whether each is mirrored, (n,) bool."""
        return [torch.rand(n, generator=generator, device=generator.device) < 0.5]

    def prepare(self, images, mirror):
        """uint8 images -> x_0, float32 in [-1, 1], mirrored where asked."""
        x = images.float() / 127.5 - 1
        return torch.where(mirror[:, None, None, None], x.flip(-1), x)


class ImagesInMemory(Images):
    """uint8 images (N, C, H, W), held on the training device."""

    def __init__(self, images, labels=None, class_names=()):
        super().__init__(len(images), images.shape[1:], labels, class_names)
        self.images = images

    def batches(self, order, device, workers=0):
        images, labels = self.images.to(device), None if self.labels is None else self.labels.to(device)
        for places in order:
            index = torch.as_tensor(places[:, 0]).to(device, non_blocking=True)
            yield images[index], None if labels is None else labels[index]


class ImagesOnDisk(Images):
    """Image files, of which read_file(path, image_size) makes uint8 (3, image_size, image_size)."""

    def __init__(self, files, labels, class_names, image_size, read_file):
        super().__init__(len(files), (3, image_size, image_size), labels, class_names)
        self.files, self.read_file = files, read_file

    def read(self, index, choice):
        return [self.read_file(self.files[index], self.shape[-1])]


class Latents(Images):
    """A folder written by `encode`: Gaussians of an autoencoder for each image and its mirror, and labels or text.

    x is moments (n, 2, 2C, h, w) in the type of the file: of image and mirror, C means, then C log variances; `prepare`
    draws x_0 from them. y is labels, or features (n, tokens, width) float32 of one caption of each image, by its random
    number; then there is no mirroring, as in U-ViT ("left" would turn wrong).
    Raises ValueError where the folder is incomplete, damaged or of another image size.
    """

    def __init__(self, root, image_size=None):
        self.root, self.encoding = Path(root), read_encoding(root)
        if image_size not in (None, self.encoding["image_size"]):
            raise ValueError(f"{root}: encoded at image size {self.encoding['image_size']}, not {image_size}")
        names = ["moments", "text"] if self.encoding["text"] else ["moments"]
        done = np.concatenate([self.array(f"{name}_done") for name in names])
        if not done.all():
            raise ValueError(f"{root}: only {done.mean():.1%} encoded ({done.sum()} of {len(done)} images and captions)"
                             "; run the same command of data.py encode again, it continues")
        for name in names:              # are they there, and whole?
            self.array(name)
        classes = self.encoding["class_names"]
        labels = torch.from_numpy(self.array("labels").copy()) if classes else None
        super().__init__(self.encoding["count"], self.encoding["shape"], labels, classes)
        if self.encoding["text"]:
            self.text, self.flip = tuple(self.encoding["text"]), False
            self.null = torch.from_numpy(self.array("null").astype(np.float32))

    def array(self, name):
        return mapped(self.root / f"{name}.npy")

    def read(self, index, choice):
        rows = [self.array("moments")[index]]
        if self.text:
            first, end = self.array("captions")[index:index + 2]
            rows.append(self.array("text")[first + choice % (end - first)])
        return [torch.from_numpy(row.copy()) for row in rows]

    def examples(self, n):
        """Text features (n, tokens, width) float32: the first captions of n images, evenly spaced."""
        return torch.stack([self.read(i * len(self) // n, 0)[1] for i in range(n)]).float()

    def draws(self, n, generator):
        """Whether each is mirrored, (n,) bool, and the noise (n, C, h, w) that its latent is drawn with."""
        return [*super().draws(n, generator), torch.randn(n, *self.shape, generator=generator, device=generator.device)]

    def prepare(self, moments, mirror, noise):
        """x_0 = scale (mean + std noise), float32 (n, C, h, w), of the image or of its mirror."""
        side = (mirror & self.flip).long()
        mean, log_variance = moments[torch.arange(len(side), device=side.device), side].float().chunk(2, dim=1)
        return self.encoding["scale"] * (mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise)


def ignore_signals(worker):
    """A SIGTERM or ctrl-C for all processes is the main one's business: it saves, and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@lru_cache(maxsize=16)
def mapped(path):
    """A .npy file, mapped into memory once in every process: to workers, who may not be forks, only its path goes."""
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); encode again") from None


def read_encoding(root):
    """encoding.json of an encoded folder, a dict (its keys: see `encode`). Raises ValueError where it is none."""
    try:
        encoding = json.loads((Path(root) / "encoding.json").read_text())
        [encoding[key] for key in ("shape", "text", "count", "scale", "image_size", "class_names")]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{root}: its encoding.json is not one of data.py encode ({error!r})") from None
    return encoding


@lru_cache(maxsize=2)
def epoch_order(length, seed, epoch):
    """A permutation of the images, and a random number in [0, 2**31) for each place in it: (length, 2) int64."""
    random = np.random.default_rng([seed, epoch])
    return np.stack([random.permutation(length), random.integers(2**31, size=length)], axis=1)


def shuffled(length, seed, start, count):
    """(count, 2) int64 from position `start` of an endless stream of epochs, each shuffled by (seed, epoch).

    Column 0 is the image's index, column 1 a random number for what is chosen when it is read: one of its captions.
    """
    epochs, places = np.divmod(np.arange(start, start + count), length)
    return np.concatenate([epoch_order(length, seed, int(e))[places[epochs == e]] for e in np.unique(epochs)])


# ---------------------------------------------------------------------------------------------------------------------
# Images from and to files


def one_line(error):
    """What an error of somebody else's says, without line breaks and not too long."""
    return " ".join(str(error).split())[:200]


def open_image(path):
    """An image file -> Pillow's image, RGB. Raises ValueError naming the file where Pillow can not read it."""
    try:
        image = Image.open(path)
        if image.mode.startswith("I"):                                      # 16 bits: Pillow would clip, not scale
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:      # OSError, SyntaxError, struct.error, DecompressionBombError, ..
        raise ValueError(f"{path}: not a readable image ({error}); repair or remove it") from None


def to_tensor(image):
    """Pillow's RGB image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_image(path, size):
    """An image file -> uint8 (3, size, size): RGB, short side scaled to `size`, centre cropped.

    As in ADM, DiT and U-ViT: halve with a box filter while the short side is at least twice the target, then bicubic.
    """
    image = open_image(path)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return to_tensor(image.crop((left, top, left + size, top + size)))


def read_face(path, size):
    """An aligned image of CelebA, 178x218 -> uint8 (3, size, size): rows 57..185, columns 25..153, bilinear (U-ViT)."""
    image = open_image(path)
    if image.size != (178, 218):
        raise ValueError(f"{path}: {image.width}x{image.height}, not an aligned image of CelebA, which is 178x218")
    return to_tensor(image.crop((25, 57, 153, 185)).resize((size, size), Image.BILINEAR))


def list_images(root):
    """A folder -> (files, labels or None, class names). Sub-folders are classes, in the order of their sorted names.

    Raises ValueError where there is no image, a class without one, or images beside class folders.
    """
    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN}

    def images_among(paths):
        return sorted(p for p in paths if p.suffix.lower() in suffixes and not p.name.startswith(".") and p.is_file())

    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    flat = images_among(root.iterdir())
    classes = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if flat and classes:
        raise ValueError(f"{root}: holds images beside folders ({classes[0].name}, ..); keep either images, or a "
                         "folder for each class")
    if not flat and not classes:
        raise ValueError(f"{root}: holds no image that Pillow reads (.png, .jpg, ..)")
    if flat:
        return flat, None, ()
    files, labels = [], []
    for label, directory in enumerate(classes):
        found = images_among(directory.rglob("*"))
        if not found:
            raise ValueError(f"{directory}: class folder without an image; remove it or fill it")
        files += found
        labels += [label] * len(found)
    return files, torch.tensor(labels), [p.name for p in classes]


def from_files(files, labels, names, image_size, read_file=read_image):
    """The images of these files (see `list_images`): in memory if that is small, and on disk if not."""
    if len(files) * 3 * image_size**2 > IN_MEMORY:
        return ImagesOnDisk(files, labels, names, image_size, read_file)
    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = pool.map(partial(read_file, size=image_size), files)
        for i, image in enumerate(tqdm(read, total=len(files), desc="reading images", unit="image", leave=False,
                                       mininterval=0.1 if sys.stderr.isatty() else 10)):
            images[i] = image
    return ImagesInMemory(images, labels, names)


def to_uint8(x):
    """x in [-1, 1], float -> uint8, rounded to the nearest grey level (as U-ViT and DiT do)."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


def save_grid(images, path, rows=0):
    """uint8 images (N, 3, H, W) -> one picture, in a file of the type that its name says.

    rows = 0: about square. Otherwise image i goes into row i % rows: one row for each of so many labels in turn.
    Raises ValueError where the images have other than 3 channels.
    """
    if images.shape[1] != 3:
        raise ValueError(f"{path}: a picture needs 3 channels, these images have {images.shape[1]} (latents?)")
    images, columns = images.cpu(), math.ceil(len(images) / rows if rows else len(images) ** 0.5)
    if rows:
        white = images.new_full((rows * columns - len(images), *images.shape[1:]), 255)
        images = torch.cat([images, white]).unflatten(0, (columns, rows)).transpose(0, 1).flatten(0, 1)
    grid = torchvision.utils.make_grid(images, nrow=columns, padding=2, pad_value=255)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


# ---------------------------------------------------------------------------------------------------------------------
# Named data sets

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def download(name, root, advice, **options):
    """A data set by torchvision's class of that name. Raises FileNotFoundError, with this advice, where that fails."""
    try:
        return getattr(torchvision.datasets, name)(root, download=True, **options)
    except Exception as error:      # URLError, OSError, RuntimeError (a wrong checksum, Google's quota, no gdown)
        raise FileNotFoundError(f"{name}: not in {root}, and the download failed ({one_line(error)}); {advice}, or say "
                                "where it is with --data-dir") from None


def cifar10(data_dir=None, image_size=None):
    """The 50,000 training images of CIFAR10, 32x32 (or means of their pixels: 16x16, 8x8, ..), ten classes.

    From torchvision's files in data_dir, downloaded if they are not there; or from class folders in data_dir, or in
    data_dir/train (airplane/, automobile/, ..).
    """
    root, size = Path(data_dir or "data"), image_size or 32
    if 32 % size:
        raise ValueError(f"cifar10: image_size {size}; its images are 32x32, and can be 16x16 or 8x8 (give a folder of "
                         "images to --data for other sizes)")
    classes = next((c for c in (root / "train", root) if (c / CIFAR10_CLASSES[0]).is_dir()), None)
    if classes:
        dataset = from_files(*list_images(classes), 32)
        if dataset.class_names != CIFAR10_CLASSES:
            raise ValueError(f"{classes}: its folders are not CIFAR10's classes ({', '.join(CIFAR10_CLASSES)})")
        images, labels = dataset.images, dataset.labels
    else:
        files = download("CIFAR10", root, "put cifar-10-python.tar.gz there "
                         "(https://www.cs.toronto.edu/~kriz/cifar.html)", train=True)
        images, labels = torch.from_numpy(files.data).permute(0, 3, 1, 2), torch.tensor(files.targets)
    if size < 32:
        images = images.unflatten(3, (size, -1)).unflatten(2, (size, -1)).float().mean((3, 5)).round().byte()
    return ImagesInMemory(images.contiguous(), labels, CIFAR10_CLASSES)


def celeba64(data_dir=None, image_size=None):
    """The faces of CelebA, cropped as in U-ViT, 64x64, no labels.

    The aligned images lie in data_dir (default data/celeba64 or data/celeba), in its img_align_celeba/ or, where
    torchvision puts them, celeba/img_align_celeba/. If there are none, torchvision's download is tried. Of the whole
    set, 202,599 images, the first 162,770 are used, which are its training split; of any other number, all.
    """
    roots = [Path(data_dir)] if data_dir else [Path("data/celeba64"), Path("data/celeba")]
    places = [root / below for root in roots for below in ("celeba/img_align_celeba", "img_align_celeba", "")]
    root = next((place for place in places if any(place.glob("*.jpg")) or any(place.glob("*.png"))), None)
    if not root:
        download("CelebA", data_dir or "data", "unpack img_align_celeba.zip "
                 f"(https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html) in {roots[0]}")
        root = Path(data_dir or "data") / "celeba/img_align_celeba"
    files = list_images(root)[0]
    return from_files(files[:162_770] if len(files) == 202_599 else files, None, (), image_size or 64, read_face)


def imagenet64(data_dir=None, image_size=None):
    """ImageNet's class folders (n01440764/, ..) in data_dir (default data/imagenet) or data_dir/train, at 64x64.

    They are decoded anew in every epoch: a photograph of 500x375 takes a core 3 ms, so --workers decides the speed.
    """
    root = Path(data_dir or "data/imagenet")
    root = root / "train" if (root / "train").is_dir() else root
    if not root.is_dir():
        raise FileNotFoundError(f"imagenet64: no folder {root}; put ImageNet's class folders (https://image-net.org) "
                                "there, or say where they are with --data-dir")
    dataset = from_files(*list_images(root), image_size or 64)
    if dataset.labels is None:
        raise ValueError(f"imagenet64: {root} holds images, not a folder for each class")
    return dataset


def encoded(name, flags, data_dir=None, image_size=None):
    """The latents of a named data set, from data_dir (default data/<name>), where `encode` wrote them."""
    root = Path(data_dir or f"data/{name}")
    if not (root / "encoding.json").exists():
        raise FileNotFoundError(f"{name}: no latents in {root}; they are made by: python data.py encode {flags} "
                                f"--out {root}")
    return Latents(root, image_size)


def box(x, y, width, height):
    """Signed distance of (x, y) from a box of these half widths: negative inside, in units of the shape's radius."""
    return np.maximum(abs(x) - width, abs(y) - height)


# Ten classes: a colour, and a form as its signed distance (as far as smooth edges need it).
SHAPES = {
    "red disc": ((225, 40, 40), lambda x, y: np.hypot(x, y) - 0.95),
    "orange square": ((250, 150, 30), lambda x, y: box(x, y, 0.85, 0.85)),
    "yellow triangle": ((245, 230, 60), lambda x, y: np.maximum(0.89 * abs(x) - 0.45 * y - 0.45, y - 0.85)),
    "green plus": ((40, 170, 60), lambda x, y: np.minimum(box(x, y, 0.32, 1), box(x, y, 1, 0.32))),
    "cyan ring": ((60, 215, 225), lambda x, y: abs(np.hypot(x, y) - 0.72) - 0.28),
    "blue bar": ((45, 70, 220), lambda x, y: box(x, y, 1.1, 0.42)),
    "purple post": ((140, 50, 190), lambda x, y: box(x, y, 0.42, 1.1)),
    "pink diamond": ((250, 140, 195), lambda x, y: (abs(x) + abs(y) - 1.15) / 2**0.5),
    "white cross": ((245, 245, 245), lambda x, y: np.maximum(abs(abs(x) - abs(y)) / 2**0.5 - 0.3, box(x, y, 0.9, 0.9))),
    "black frame": ((20, 20, 20), lambda x, y: abs(box(x, y, 0.7, 0.7)) - 0.25),
}
GREY = 128                # their background


def shapes(data_dir=None, image_size=None, length=10_000):
    """Drawn shapes: image i is of class i % 10, its place and size drawn from a generator seeded with i."""
    size = image_size or 16
    centres = (np.arange(size) + 0.5) / size - 0.5
    images = np.empty((length, 3, size, size), np.uint8)
    for i in range(length):
        colour, distance = list(SHAPES.values())[i % len(SHAPES)]
        dx, dy, scale = np.random.default_rng(i).uniform(-1, 1, 3)
        radius = 0.36 + 0.03 * scale        # as its place, in units of the image's size
        x, y = (centres[None, :] - dx / 16) / radius, (centres[:, None] - dy / 16) / radius
        cover = np.clip(0.5 - distance(x, y) * radius * size, 0, 1)     # share of each pixel inside: smooth edges
        images[i] = (GREY + cover * (np.array(colour, dtype=float)[:, None, None] - GREY)).round()
    return ImagesInMemory(torch.from_numpy(images), torch.arange(length) % len(SHAPES), SHAPES)


def nearest_shape(images):
    """What uint8 images (N, 3, S, S) show: (class (N,), distance (N,)), by the nearest of 1000 drawn shapes.

    distance is the root mean square difference in grey levels: under about 20 the shape is clean; noise is far.
    """
    known = shapes(image_size=images.shape[-1], length=1000)
    distances = torch.cdist(images.flatten(1).float(), known.images.flatten(1).float()) / images[0].numel() ** 0.5
    distance, index = distances.min(dim=1)
    return known.labels[index], distance


DATASETS = {
    "cifar10": cifar10, "celeba64": celeba64, "imagenet64": imagenet64,
    "imagenet256": partial(encoded, "imagenet256", "--images imagenet/train --image-size 256"),
    "imagenet512": partial(encoded, "imagenet512", "--images imagenet/train --image-size 512"),
    "mscoco256": partial(encoded, "mscoco256", "--images train2014 --captions captions_train2014.json --image-size 256 "
                         "--scale 0.23010"),
    "shapes": shapes,
}


def imagenet_names():
    """The names of ImageNet's 1000 classes, in the order of their numbers, from torchvision: "tench", "goldfish", .."""
    return tuple(torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"])


# ---------------------------------------------------------------------------------------------------------------------
# Stable Diffusion's autoencoder and CLIP. diffusers and transformers are needed here alone.

AUTOENCODER, CLIP, SCALE = "stabilityai/sd-vae-ft-ema", "openai/clip-vit-large-patch14", 0.18215
ENCODINGS = {      # of the papers' weights, which come without an encoding.json
    "imagenet256": dict(autoencoder=AUTOENCODER, scale=SCALE, image_size=256, clip=None),
    "imagenet512": dict(autoencoder=AUTOENCODER, scale=SCALE, image_size=512, clip=None),
    "mscoco256": dict(autoencoder=AUTOENCODER, scale=0.23010, image_size=256, clip=CLIP),
}


def pretrained(package, class_name, name, **options):
    """An object of a class of diffusers or transformers, from a folder of save_pretrained or by huggingface.co's name.

    Raises ValueError in one line where the package is missing, or nothing can be read under that name.
    """
    try:
        cls = getattr(importlib.import_module(package), class_name)
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"{name}: needs the package {package}: pip install {package} ({one_line(error)})") from None
    try:
        return cls.from_pretrained(name, **options)
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
# python data.py encode


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
    files = [Path(root) / str(name) for name in names]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]}: no such image, but {path} has captions for it ({len(missing)} of "
                                f"{len(files)} are missing)")
    return files, np.append(first, len(captions)), captions


def write_rows(path, first, rows):
    """Put an array (n, ..) into a .npy file of its type, from row `first` on; it is on the disk when this returns.

    Written, not mapped: what is beside it on a page may be another process's, on another machine; and a full disk is
    an OSError, not the end of the process. Raises ValueError where the rows are of another shape.
    """
    array = np.load(path, mmap_mode="r")
    if array.shape[1:] != rows.shape[1:]:
        raise ValueError(f"{path}: made for rows of shape {array.shape[1:]}, not {rows.shape[1:]}")
    with open(path, "r+b") as file:
        file.seek(array.offset + first * rows[0].nbytes)    # after the header
        file.write(rows.tobytes())
        file.flush()
        os.fsync(file.fileno())


def write_missing(path, rows_of, batch_size, rank, world):
    """Fill this process's batches of rows of a .npy file, but those marked in <name>_done.npy.

    rows_of(spans) yields a tensor for each span (first, end) in turn. Rows are on the disk before they are marked, so
    a process killed at any moment has lost no more than the batch it was in.
    """
    marks = path.with_name(f"{path.stem}_done.npy")
    done = np.load(marks)
    spans = [(first, min(first + batch_size, len(done))) for first in range(0, len(done), batch_size)]
    mine = [(first, end) for first, end in spans[rank::world] if not done[first:end].all()]
    with tqdm(total=len(done), initial=int(done.sum()), desc=path.stem, unit="row", disable=rank > 0,
              mininterval=0.1 if sys.stderr.isatty() else 30) as bar:
        for (first, end), rows in zip(mine, rows_of(mine)):
            if not rows.isfinite().all():
                raise ValueError(f"{path}: rows from {first} on are not finite in {rows.dtype}; use --type float32")
            write_rows(path, first, rows.cpu().numpy())
            write_rows(marks, first, np.ones(end - first, done.dtype))
            bar.update(int(np.load(marks).sum()) - bar.n)       # of all processes


def begin(out, encoding, arrays, shapes):
    """Make the files of an encoding: `arrays` whole, and those of `shapes` empty, to be filled by write_missing.

    Raises ValueError where they are there already, but of other settings or images.
    """
    if (out / "encoding.json").exists():
        before = read_encoding(out)
        changed = [key for key in encoding if before.get(key) != encoding[key]]
        if changed:
            raise ValueError(f"{out}: begun with other {', '.join(changed)}; give another --out, or remove this one")
        return
    out.mkdir(parents=True, exist_ok=True)
    for name, shape in shapes.items():
        np.lib.format.open_memmap(out / f"{name}.npy", "w+", encoding["type"], shape)
        np.save(out / f"{name}_done.npy", np.zeros(shape[0], np.uint8))
    for name, array in arrays.items():
        np.save(out / f"{name}.npy", array)
    (out / "encoding.tmp").write_text(json.dumps(encoding, indent=2) + "\n")
    os.replace(out / "encoding.tmp", out / "encoding.json")     # last: where it is, all the others are


def encode(args):
    """Images -> a folder that `load` reads. Several processes (torchrun) share the work; a killed run continues.

    moments.npy    (N, 2, 2C, h, w): for image and mirror, C means and C log variances of the autoencoder
    labels.npy     (N,) int64, where the images lie in class folders
    text.npy       (M, tokens, width): CLIP's features of all captions
    captions.npy   (N + 1,) int64: captions[i] to captions[i + 1] are the rows of text that belong to image i
    null.npy       (tokens, width): the features of the empty string
    .._done.npy    which rows of moments and text are written
    encoding.json  autoencoder, scale, clip, image_size, type, count (N), shape (C, h, w), text (tokens, width) or null,
                   class_names, and files, a checksum of all file names and captions
    """
    if min(args.image_size, args.batch_size) < 1 or args.workers < 0:
        raise ValueError("--image-size and --batch-size must be at least 1, --workers at least 0")
    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU: {torch.cuda.device_count()} found; start "
                             "fewer processes, or use --device cpu")
        torch.cuda.set_device(local)
    labels, names, captions = None, (), ()
    if args.captions:
        files, index, captions = read_captions(args.captions, args.images)
    else:
        files, labels, names = list_images(args.images)
    content = json.dumps([[str(file.relative_to(args.images)) for file in files], captions])

    autoencoder, clip = (str(Path(name).resolve()) if Path(name).is_dir() else name
                         for name in (args.autoencoder, args.clip))
    vae = Autoencoder(autoencoder, device)
    text = TextEncoder(clip, device) if captions else None
    dtype = getattr(torch, args.type)
    shape = vae.moments(torch.zeros(1, 3, args.image_size, args.image_size)).shape[1:]
    if args.image_size % shape[-1]:
        raise ValueError(f"--image-size {args.image_size}: latents of {shape[-1]} would decode to another size")
    arrays, shapes = {"labels": labels} if names else {}, {"moments": (len(files), 2, *shape)}
    if captions:
        arrays = {"captions": index, "null": text([""])[0].to(dtype).cpu()}
        shapes["text"] = (len(captions), *arrays["null"].shape)
    encoding = dict(
        autoencoder=autoencoder, scale=args.scale, clip=clip if captions else None, image_size=args.image_size,
        type=args.type, count=len(files), shape=[shape[0] // 2, *shape[1:]],
        text=list(shapes["text"][1:]) if captions else None, class_names=list(names),
        files=hashlib.sha256(content.encode()).hexdigest())
    out = Path(args.out)
    if rank == 0:
        begin(out, encoding, arrays, shapes)
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))
        dist.barrier()

    def moments_rows(spans):
        images = ImagesOnDisk(files, None, (), args.image_size, read_image)
        order = [np.array([(i, 0) for i in range(first, end)]) for first, end in spans]
        for x, _ in images.batches(order, device, args.workers):
            yield torch.stack([vae.moments(x), vae.moments(x.flip(-1))], dim=1).to(dtype)

    def text_rows(spans):
        for first, end in spans:
            yield text(captions[first:end]).to(dtype)

    write_missing(out / "moments.npy", moments_rows, args.batch_size, rank, world)
    if captions:
        write_missing(out / "text.npy", text_rows, args.batch_size, rank, world)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        print(f"{out}: {len(files)} images as latents {tuple(encoding['shape'])}, {len(names) or 'no'} classes, "
              f"{len(captions) or 'no'} captions")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p = parser.add_subparsers(required=True, metavar="encode").add_parser(
        "encode", help="images -> latents, captions -> text features (see encode --help)",
        description="Images -> a folder of latents, and of labels or text features, that --data takes. Processes of "
        "torchrun share the work. Interrupted, the same command continues.")
    add = p.add_argument
    add("--images", required=True, metavar="FOLDER", help="flat, or one folder for each class")
    add("--out", required=True, metavar="FOLDER", help="data/<name> is where --data <name> looks (imagenet256, ..)")
    add("--image-size", type=int, default=256, metavar="PIXELS", help="default 256")
    add("--captions", metavar="JSON", help="COCO's captions_train2014.json, or a file of {file name: [caption, ..]}")
    add("--autoencoder", default=AUTOENCODER, metavar="NAME_OR_FOLDER", help=f"default {AUTOENCODER}")
    add("--scale", type=float, default=SCALE, help=f"of the latents (default {SCALE}; U-ViT on MS-COCO: 0.23010)")
    add("--clip", default=CLIP, metavar="NAME_OR_FOLDER", help=f"text encoder (default {CLIP})")
    add("--type", choices=["float16", "float32"], default="float16", help="in the files (default float16)")
    add("--batch-size", type=int, default=32, metavar="N", help="images at a time on each process (default 32)")
    add("--workers", type=int, default=4, metavar="N", help="reading processes of each process (default 4)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is one")
    encode(parser.parse_args(argv))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:      # bad input: one line that says what and where, not a stack trace
        sys.exit(f"data.py: {error}")
    except KeyboardInterrupt:
        sys.exit("data.py: stopped; the same command continues")
