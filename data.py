"""Data sets: images in, batches of x_0 in [-1, 1] and labels out.

    dataset = load("cifar10", data_dir="data")          # torchvision's CIFAR10, downloaded if it is not there
    dataset = load("shapes", image_size=16)             # ten classes of drawn shapes, made here, no download
    dataset = load("photos/", image_size=64)            # your images: flat (no labels), or one folder for each class

Small sets (under 2 GiB as uint8) live on the training device, where mirroring and scaling cost next to nothing: reading
CIFAR10's 50,000 PNGs took 9 s on two CPU cores, and a batch is one gather. Larger sets are read by DataLoader workers.

Order is a function of (seed, epoch) alone (`shuffled`), so that a run can be resumed or split over processes exactly.
"""
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
IMAGE_SIZE = {"cifar10": 32, "shapes": 16}      # .. and 64 for folders, where nothing else is asked for


def load(name, data_dir=None, image_size=None):
    """The training images of a data set, by name ("cifar10", "shapes") or path (a folder of images).

    data_dir    where a named data set lies (default: data/)
    image_size  height and width of the images (default IMAGE_SIZE)
    Raises ValueError or FileNotFoundError, in one line, where there is nothing of that name or it can not be read.
    """
    if data_dir and not Path(data_dir).is_dir():
        raise FileNotFoundError(f"--data-dir {data_dir}: no such folder")
    if name in DATASETS:
        return DATASETS[name](data_dir=data_dir, image_size=image_size)
    if Path(name).is_dir():
        return folder(name, image_size or 64)
    if Path(name).exists():
        raise ValueError(f"{name}: not a folder; --data takes {', '.join(DATASETS)}, or a folder of images")
    raise FileNotFoundError(f"{name}: no such data set or folder; --data takes {', '.join(DATASETS)}, or a folder of "
                            "images")


# ---------------------------------------------------------------------------------------------------------------------
# What a data set is


class Images:
    """What both kinds share: shape (C, H, W) of an image, class names, labels (N,) int64 or None, and `prepare`.

    A kind has `batches(order, device, workers)`: for each array of indices in `order`, images uint8 (n, C, H, W) and
    labels (n,) or None, on `device`.
    """

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
        for index in order:
            index = torch.as_tensor(index).to(device, non_blocking=True)
            yield images[index], None if labels is None else labels[index]


def ignore_signals(worker):
    """A SIGTERM or ctrl-C for all processes is the main one's business: it saves, and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class ImagesOnDisk(Images):
    """Image files that are read when they are needed, by `workers` processes."""

    def __init__(self, files, labels, class_names, image_size, flip=True):
        super().__init__((3, image_size, image_size), labels, class_names, flip)
        self.files, self.image_size = files, image_size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        try:
            return read_image(self.files[index], self.image_size), -1 if self.labels is None else self.labels[index]
        except ValueError as error:     # a worker would wrap it in its stack trace: hand it over instead
            return error

    @staticmethod
    def collate(items):
        for item in items:
            if isinstance(item, ValueError):
                return item
        images, labels = zip(*items)
        return torch.stack(images), torch.tensor(labels)

    def batches(self, order, device, workers=0):
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=order, num_workers=workers, collate_fn=self.collate, worker_init_fn=ignore_signals,
            pin_memory=torch.device(device).type == "cuda")
        for batch in loader:
            if isinstance(batch, ValueError):
                raise batch
            images, labels = (part.to(device, non_blocking=True) for part in batch)
            yield images, None if self.labels is None else labels


@lru_cache(maxsize=2)
def permutation(length, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(length)


def shuffled(length, seed, start, count):
    """Image indices (count,) from position `start` of an endless stream of epochs, each shuffled by (seed, epoch)."""
    positions = np.arange(start, start + count)
    epochs = positions // length
    return np.concatenate([permutation(length, seed, int(epoch))[positions[epochs == epoch] % length]
                           for epoch in np.unique(epochs)])


# ---------------------------------------------------------------------------------------------------------------------
# Reading images


def read_image(path, size):
    """An image file -> uint8 (3, size, size): RGB, short side scaled to `size`, centre cropped.

    As in ADM, DiT and U-ViT: halve with a box filter while the short side is at least twice the target, then bicubic.
    Raises ValueError naming the file where Pillow can not read it.
    """
    try:
        image = Image.open(path)
        if image.mode.startswith("I"):                                      # 16 bits: Pillow would clip, not scale
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        image = image.convert("RGB")
    except Exception as error:      # OSError, SyntaxError, struct.error, DecompressionBombError, ..
        raise ValueError(f"{path}: not a readable image ({error}); repair or remove it") from None
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image)[top:top + size, left:left + size]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


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


def folder(root, image_size, flip=True):
    """A folder of images, flat or one folder for each class, in memory if that is small and on disk if not."""
    files, labels, names = list_images(root)
    if len(files) * 3 * image_size**2 > IN_MEMORY:
        return ImagesOnDisk(files, labels, names, image_size, flip)
    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = pool.map(partial(read_image, size=image_size), files)
        for i, image in enumerate(tqdm(read, total=len(files), desc=f"reading {root}", unit="image", leave=False,
                                       mininterval=0.1 if sys.stderr.isatty() else 10)):
            images[i] = image
    return ImagesInMemory(images, labels, names, flip)


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


DATASETS = {"cifar10": cifar10, "shapes": shapes}


# ---------------------------------------------------------------------------------------------------------------------
# Writing images


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
