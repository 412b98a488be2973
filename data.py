"""Data sets: images in, batches of x_0 in [-1, 1] and labels out.

    dataset = load("cifar10", data_dir="data")          # torchvision's CIFAR10, downloaded if it is not there
    dataset = load("shapes", image_size=16)             # ten classes of drawn shapes, made here, no download
    dataset = load("photos/", image_size=64)            # your images: flat (no labels), or one folder for each class
    dataset = load("imagenet256", data_dir="latents")   # what `python data.py encode` wrote: latents, labels or text

Small sets (under 2 GiB as uint8) live on the training device, where mirroring and scaling cost next to nothing: reading
CIFAR10's 50,000 PNGs took 9 s on two CPU cores, and a batch is one gather. Larger sets are read by DataLoader workers.

Order is a function of (seed, epoch) alone (`shuffled`), so that a run can be resumed or split over processes exactly.
"""
import json
import math
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from tqdm import tqdm

IN_MEMORY = 2 * 2**30     # bytes of uint8 up to which a data set is held in memory
IMAGE_SIZE = {"cifar10": 32, "celeba64": 64, "imagenet64": 64, "imagenet256": 256, "imagenet512": 512, "mscoco256": 256,
              "shapes": 16, "folder": 64}     # where nothing else is asked for
AUTOENCODER, CLIP = "stabilityai/sd-vae-ft-ema", "openai/clip-vit-large-patch14"
ENCODINGS = {name: dict(autoencoder=AUTOENCODER, scale=scale, image_size=IMAGE_SIZE[name], clip=clip) for name, scale, clip
             in [("imagenet256", 0.18215, None), ("imagenet512", 0.18215, None), ("mscoco256", 0.23010, CLIP)]}


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
    return folder(name, image_size or 64) if kind(name) == "folder" else Latents(name, image_size)


def kind(name):
    """What sort of data a name or path is, without reading it: a name of DATASETS, or "folder" for own images.

    An encoded folder counts as the set of the papers that it is most like: "mscoco256" with captions; "imagenet256"
    without, and "imagenet512" where the latents are wider than 32. Raises as `load` does.
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
    return "mscoco256" if encoding["text"] else "imagenet256" if encoding["shape"][-1] <= 32 else "imagenet512"


# ---------------------------------------------------------------------------------------------------------------------
# What a data set is


class Images:
    """What all kinds share: shape (C, H, W) of x_0, class names, labels (N,) int64 or None, `draws` and `prepare`.

    A kind has `batches(order, device, workers)`: for each array (n, 2) of `order` (see `shuffled`), images uint8
    (n, C, H, W), or latents, and labels (n,), text features (n, tokens, width) or None, on `device`.
    Latents have an `encoding` (see `encode`), and those of captions (tokens, width) as `text`, and the empty string's
    features as `null`.
    """
    text = null = encoding = None

    def __init__(self, shape, labels, class_names, flip):
        self.shape, self.labels, self.class_names, self.flip = tuple(shape), labels, tuple(class_names), flip
        self.num_classes = len(self.class_names)

    def draws(self, n, generator):
        """The random numbers that `prepare` needs for n images: whether each is mirrored, (n,) bool."""
        return [torch.rand(n, generator=generator, device=generator.device) < 0.5]

    def prepare(self, images, mirror):
        """uint8 images -> x_0, float32 in [-1, 1], mirrored where asked (if the data set allows it)."""
        x = images.float() / 127.5 - 1
        return torch.where(mirror[:, None, None, None], x.flip(-1), x) if self.flip else x


class ImagesInMemory(Images):
    """uint8 images (N, C, H, W), held on the training device."""

    def __init__(self, images, labels=None, class_names=(), flip=True):
        super().__init__(images.shape[1:], labels, class_names, flip)
        self.images = images

    def __len__(self):
        return len(self.images)

    def batches(self, order, device, workers=0):
        images, labels = self.images.to(device), None if self.labels is None else self.labels.to(device)
        for places in order:
            index = torch.as_tensor(places[:, 0]).to(device, non_blocking=True)
            yield images[index], None if labels is None else labels[index]


def ignore_signals(worker):
    """A SIGTERM or ctrl-C for all processes is the main one's business: it saves, and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class OnDisk(Images):
    """What is read when it is needed, by `workers` processes: `read(index, choice)` -> x and, if there is any, y."""

    def __getitem__(self, place):
        try:
            return self.read(*map(int, place))
        except ValueError as error:     # a worker would wrap it in its stack trace: hand it over instead
            return error

    @staticmethod
    def collate(items):
        for item in items:
            if isinstance(item, ValueError):
                return item
        return [torch.stack(parts) for parts in zip(*items)]

    def batches(self, order, device, workers=0):
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=order, num_workers=workers, collate_fn=self.collate, worker_init_fn=ignore_signals,
            pin_memory=torch.device(device).type == "cuda")
        for batch in loader:
            if isinstance(batch, ValueError):
                raise batch
            x, *y = (part.to(device, non_blocking=True) for part in batch)
            yield x, (y[0].float() if self.text else y[0]) if y else None


class ImagesOnDisk(OnDisk):
    """Image files, of which read_file(path, image_size) makes uint8 (3, image_size, image_size)."""

    def __init__(self, files, labels, class_names, image_size, read_file):
        super().__init__((3, image_size, image_size), labels, class_names, flip=True)
        self.files, self.read_file = files, read_file

    def __len__(self):
        return len(self.files)

    def read(self, index, choice):
        image = self.read_file(self.files[index], self.shape[-1])
        return (image,) if self.labels is None else (image, self.labels[index])


class Latents(OnDisk):
    """A folder written by `encode`: Gaussians of an autoencoder for each image and its mirror, and labels or text.

    Batches hold moments (n, 2, 2C, h, w) in the type of the file: image and mirror; C means, then C log variances.
    `prepare` draws x_0 from them. There is no mirroring where there is text ("left of" would turn wrong).
    Raises ValueError or FileNotFoundError where the folder is incomplete, damaged or of another image size.
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
        self.text = tuple(self.encoding["text"] or ()) or None
        self.null = torch.from_numpy(self.array("null").astype(np.float32)) if self.text else None
        labels = torch.from_numpy(self.array("labels").copy()) if self.encoding["class_names"] else None
        super().__init__(self.encoding["shape"], labels, self.encoding["class_names"], flip=not self.text)
        for name in names:              # are they there, and whole?
            self.array(name)

    def __len__(self):
        return self.encoding["count"]

    def array(self, name):
        try:
            return mapped(self.root / f"{name}.npy")
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.root}: {name}.npy is missing or damaged ({error}); encode again") from None

    def read(self, index, choice):
        moments = torch.from_numpy(self.array("moments")[index].copy())
        if self.text:
            first, end = self.array("captions")[index:index + 2]
            return moments, torch.from_numpy(self.array("text")[first + choice % (end - first)].copy())
        return (moments,) if self.labels is None else (moments, self.labels[index])

    def examples(self, n):
        """Text features (n, tokens, width) float32: the first captions of n images, evenly spaced."""
        places = np.stack([np.arange(n) * len(self) // n, np.zeros(n, np.int64)], axis=1)
        return torch.stack([self[place][1] for place in places]).float()

    def draws(self, n, generator):
        """Whether each is mirrored, (n,) bool, and the noise (n, C, h, w) that its latent is drawn with."""
        return [*super().draws(n, generator), torch.randn(n, *self.shape, generator=generator, device=generator.device)]

    def prepare(self, moments, mirror, noise):
        """x_0 = scale (mean + std noise), float32 (n, C, h, w), of the image or of its mirror."""
        side = mirror.long() if self.flip else torch.zeros_like(mirror, dtype=torch.long)
        mean, log_variance = moments[torch.arange(len(side), device=side.device), side].float().chunk(2, dim=1)
        return self.encoding["scale"] * (mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise)


@lru_cache(maxsize=16)
def mapped(path):
    """A .npy file, mapped into memory once in every process: to workers, who may not be forks, only its path goes."""
    return np.load(path, mmap_mode="r")


def read_encoding(root):
    """encoding.json of an encoded folder, a dict (its keys: see `encode`). Raises ValueError where it is none."""
    try:
        encoding = json.loads((Path(root) / "encoding.json").read_text())
        encoding["shape"], encoding["text"], encoding["count"], encoding["scale"], encoding["image_size"]
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
    positions = np.arange(start, start + count)
    epochs = positions // length
    return np.concatenate([epoch_order(length, seed, int(epoch))[positions[epochs == epoch] % length]
                           for epoch in np.unique(epochs)])


# ---------------------------------------------------------------------------------------------------------------------
# Reading images


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
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}

    def images_below(folder, pattern):
        return sorted(p for p in folder.glob(pattern)
                      if p.suffix.lower() in suffixes and not p.name.startswith(".") and p.is_file())

    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    flat = images_below(root, "*")
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
        found = images_below(directory, "**/*")
        if not found:
            raise ValueError(f"{directory}: class folder without an image; remove it or fill it")
        files += found
        labels += [label] * len(found)
    return files, torch.tensor(labels), [p.name for p in classes]


def folder(root, image_size):
    """A folder of images, flat or one folder for each class."""
    return from_files(root, *list_images(root), image_size)


def from_files(root, files, labels, names, image_size, read_file=read_image):
    """The images of these files, all below root: in memory if that is small and on disk if not."""
    if len(files) * 3 * image_size**2 > IN_MEMORY:
        return ImagesOnDisk(files, labels, names, image_size, read_file)
    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = pool.map(partial(read_file, size=image_size), files)
        for i, image in enumerate(tqdm(read, total=len(files), desc=f"reading {root}", unit="image", leave=False,
                                       mininterval=0.1 if sys.stderr.isatty() else 10)):
            images[i] = image
    return ImagesInMemory(images, labels, names)


# ---------------------------------------------------------------------------------------------------------------------
# Named data sets

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(data_dir=None, image_size=None):
    """The 50,000 training images of CIFAR10, 32x32, ten classes.

    From torchvision's files in data_dir, downloaded if they are not there; or from class folders in data_dir, or in
    data_dir/train (airplane/, automobile/, ..).
    """
    root = Path(data_dir or "data")
    if image_size not in (None, 32):
        raise ValueError(f"cifar10: image_size {image_size}; its images are 32x32 (give a folder to --data to resize)")
    for classes in (root / "train", root):
        if (classes / CIFAR10_CLASSES[0]).is_dir():
            dataset = folder(classes, 32)
            if dataset.class_names != CIFAR10_CLASSES:
                raise ValueError(f"{classes}: its folders are not CIFAR10's classes ({', '.join(CIFAR10_CLASSES)})")
            return dataset
    try:
        files = torchvision.datasets.CIFAR10(root, train=True, download=True)
    except Exception as error:      # a URLError, a RuntimeError on a wrong checksum, an OSError on a full disk
        raise FileNotFoundError(
            f"cifar10: not in {root}, and the download failed ({error}); put cifar-10-python.tar.gz "
            "(https://www.cs.toronto.edu/~kriz/cifar.html) there, or say where it is with --data-dir") from None
    images = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()
    return ImagesInMemory(images, torch.tensor(files.targets), CIFAR10_CLASSES)


def celeba64(data_dir=None, image_size=None):
    """The faces of CelebA, cropped as in U-ViT, 64x64, no labels.

    The aligned images lie in data_dir (default data/celeba64 or data/celeba), in its img_align_celeba/ or, as torchvision
    keeps them, celeba/img_align_celeba/; where they do not, torchvision's download is tried. If all 202,599 images are
    there, the first 162,770, which are the training split, are used; if another number is there, all of them.
    """
    roots = [Path(data_dir)] if data_dir else [Path("data/celeba64"), Path("data/celeba")]
    places = [root / below for root in roots for below in ("celeba/img_align_celeba", "img_align_celeba", "")]
    root = next((place for place in places if any(place.glob("*.jpg")) or any(place.glob("*.png"))), None)
    if not root:
        try:
            torchvision.datasets.CelebA(data_dir or "data", download=True)
        except Exception as error:      # gdown's absence or complaint about the quota, URLError, RuntimeError, OSError
            raise FileNotFoundError(
                f"celeba64: no images in {' or '.join(map(str, roots))}, and the download failed "
                f"({' '.join(str(error).split())}); unpack img_align_celeba.zip "
                "(https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html) there, or say where it is with --data-dir") from None
        root = Path(data_dir or "data") / "celeba/img_align_celeba"
    files = list_images(root)[0]
    return from_files(root, files[:162_770] if len(files) == 202_599 else files, None, (), image_size or 64, read_face)


def imagenet64(data_dir=None, image_size=None):
    """ImageNet's class folders (n01440764/, ..) in data_dir (default data/imagenet) or data_dir/train, at 64x64.

    Whole photographs take long to decode in every epoch: a copy of the set with a short side of 64 trains the same.
    """
    root = Path(data_dir or "data/imagenet")
    root = root / "train" if (root / "train").is_dir() else root
    if not root.is_dir():
        raise FileNotFoundError(f"imagenet64: no folder {root}; put ImageNet's class folders (https://image-net.org) "
                                "there, or say where they are with --data-dir")
    dataset = folder(root, image_size or 64)
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


def draw_shape(label, size, dx=0.0, dy=0.0, radius=0.375):
    """One shape as uint8 (3, size, size), moved by (dx, dy) and of this radius, both as parts of the image's size."""
    colour, distance = list(SHAPES.values())[label]
    centres = (np.arange(size) + 0.5) / size - 0.5
    x, y = (centres[None, :] - dx) / radius, (centres[:, None] - dy) / radius
    cover = np.clip(0.5 - distance(x, y) * radius * size, 0, 1)             # share of each pixel inside: smooth edges
    pixels = GREY + cover * (np.array(colour, dtype=float)[:, None, None] - GREY)
    return pixels.round().astype(np.uint8)


def shapes(data_dir=None, image_size=None, length=10_000):
    """Drawn shapes: image i is of class i % 10, its place and size drawn from a generator seeded with i."""
    size = image_size or 16
    images = np.empty((length, 3, size, size), np.uint8)
    for i in range(length):
        dx, dy, scale = np.random.default_rng(i).uniform(-1, 1, 3)
        images[i] = draw_shape(i % len(SHAPES), size, dx / 16, dy / 16, 0.36 + 0.03 * scale)
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


@lru_cache
def imagenet_names():
    """The names of ImageNet's 1000 classes, in the order of their numbers, from torchvision: "tench", "goldfish", .."""
    return tuple(torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"])


# ---------------------------------------------------------------------------------------------------------------------
# Writing images


def decoder(encoding, device):
    """A function from samples x_0 to uint8 images (n, 3, H, W): of pixels where encoding is None, else of latents."""
    return Autoencoder(encoding["autoencoder"], device, encoding["scale"]).decode if encoding else to_uint8


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
    columns = math.ceil(len(images) / rows if rows else len(images) ** 0.5)
    if rows:
        places = torch.full((rows, columns, *images.shape[1:]), 255, dtype=torch.uint8)
        for i, image in enumerate(images.cpu()):
            places[i % rows, i // rows] = image
        images = places.flatten(0, 1)
    grid = torchvision.utils.make_grid(images.cpu(), nrow=columns, padding=2, pad_value=255)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)
