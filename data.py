"""Data sets: images in, batches of x_0 in [-1, 1] and labels out.

    dataset = load("cifar10", data_dir="data")      # torchvision's CIFAR10, downloaded if it is not there
    dataset = load("shapes", image_size=16)         # ten classes of drawn shapes, no download
    dataset = load("photos/", image_size=64)        # your images: flat (no labels), or one folder for each class
    dataset = load("imagenet256")                   # latents, with labels or text features, made by encode.py

A data set under 2 GiB (as uint8) is kept on the training device, where a batch is one gather; worker processes read a
larger one. Reading CIFAR10 from 50,000 PNGs took 23 s on two CPU cores. The order of the images, and the caption that
each comes with, are functions of the seed and the position in the stream of epochs (`shuffled`), so a run can be
resumed, or split over processes, exactly.
"""
import contextlib
import hashlib
import json
import math
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

IN_MEMORY = 2 * 2**30     # bytes of uint8 up to which a data set is held in memory


def load(name, data_dir=None, image_size=None, split="train"):
    """Load a data set: a name (see DATASETS), a folder of images, or one that encode.py wrote.

    data_dir    where a named data set lies (default: in data/)
    image_size  height and width of the images (default IMAGE_SIZE; latents keep that of their encoding)
    split       "train", or "test": images of the same classes that are not trained on
    Raises ValueError or OSError, in one line, where there is nothing of that name or split, or it can not be read.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r}: must be train or test")
    if data_dir and not Path(data_dir).is_dir():
        raise FileNotFoundError(f"--data-dir {data_dir}: no such folder")
    if name in DATASETS:
        given = {key: value for key, value in (("data_dir", data_dir), ("image_size", image_size)) if value}
        return DATASETS[name].load(split=split, **given)
    if kind(name) == "folder":
        return from_files(*list_images(name, split), image_size or IMAGE_SIZE["folder"])
    return Latents(name, image_size, split)


def kind(name):
    """The name of the recipe that a data set takes, without reading it: a name of DATASETS, "folder" or "latents".

    A folder of images is "folder". An encoded folder with captions is "mscoco256"; with labels it is "imagenet256", or
    "imagenet512" where latents are wider than 32; else it is "latents". Raises ValueError where there is neither.
    """
    if name in DATASETS:
        return name
    if not Path(name).is_dir():
        what = "not a folder" if Path(name).exists() else "no such data set or folder"
        raise ValueError(f"{name}: {what}; --data takes {', '.join(DATASETS)}, or a folder of images or latents")
    if not (Path(name) / "encoding.json").exists():
        return "folder"
    encoding = read_encoding(name)
    if not encoding["class_names"]:
        return "mscoco256" if encoding["text"] else "latents"
    return "imagenet256" if encoding["shape"][-1] <= 32 else "imagenet512"


# ---------------------------------------------------------------------------------------------------------------------
# What a data set is


class Images:
    """A data set of image files, which worker processes read with read_file(path, image_size) when they are needed.

    x_0 has `shape` (C, H, W). `labels` are (N,) int64, or None.
    """
    flip = True         # may x_0 be mirrored? train.py sets it
    text = None         # (tokens, width) of the text features, if these are y
    null = None         # (tokens, width) float32: the features of the empty string, if there is text
    encoding = None     # the content of encoding.json, if x_0 are latents

    def __init__(self, files, labels, class_names, shape, read_file=None):
        self.files, self.labels, self.class_names, self.shape = files, labels, tuple(class_names), tuple(shape)
        self.length, self.num_classes, self.read_file = len(files), len(self.class_names), read_file

    def __len__(self):
        return self.length

    def identity(self):
        """What tells this data set from others, wherever it lies: {count, class_names, files}.

        files: a checksum of the images' paths below their folder and of their sizes in bytes; None without files.
        """
        checksum = self.encoding and self.encoding["files"]
        if self.files:      # they are sorted, so all lie in the folder that the first and the last share
            start = len(os.path.commonpath([self.files[0], self.files[-1]]))
            lines = "".join(f"{file[start:]} {os.path.getsize(file)}\n" for file in self.files)
            checksum = hashlib.sha256(os.fsencode(lines)).hexdigest()
        return {"count": len(self), "class_names": list(self.class_names), "files": checksum}

    def read(self, places):
        """The batch (x, y or None) of an array (n, 2) of `shuffled`."""
        x = torch.stack([self.read_file(self.files[index], self.shape[-1]) for index in places[:, 0]])
        return x, None if self.labels is None else self.labels[places[:, 0]]

    def __getitem__(self, places):
        """The same, or an error, which `batches` raises: raised by a worker, it would arrive as a stack trace."""
        try:
            return self.read(places)
        except (ValueError, OSError, MemoryError) as error:
            return error

    def batches(self, order, device, workers=0):
        """Yield x, uint8 (n, C, H, W), and y, (n,) or None, for each array (n, 2) of `order` (see `shuffled`).

        They are on `device`. `workers` processes prefetch them. `Latents` have another x, and may have another y.
        """
        for batch in torch.utils.data.DataLoader(
                self, batch_size=None, sampler=order, num_workers=workers, worker_init_fn=ignore_signals,
                pin_memory=torch.device(device).type == "cuda"):
            if isinstance(batch, Exception):
                raise batch
            x, y = (None if part is None else part.to(device, non_blocking=True) for part in batch)
            yield x, y.float() if self.text else y

    def draws(self, n, generator):
        """The random numbers that `prepare` needs for n images: whether each is mirrored, (n,) bool."""
        return [torch.rand(n, generator=generator, device=generator.device) < 0.5]

    def prepare(self, images, mirror):
        """uint8 images -> x_0, float32 in [-1, 1], mirrored where `mirror` says so and `flip` allows it."""
        x = images.float() / 127.5 - 1
        return torch.where((mirror & self.flip)[:, None, None, None], x.flip(-1), x)


class ImagesInMemory(Images):
    """uint8 images (N, C, H, W), held on the training device."""

    def __init__(self, images, labels=None, class_names=(), files=()):
        super().__init__(files, labels, class_names, images.shape[1:])
        self.images, self.length = images, len(images)

    def batches(self, order, device, workers=0):
        images, labels = self.images.to(device), None if self.labels is None else self.labels.to(device)
        for places in order:
            index = torch.as_tensor(places[:, 0]).to(device, non_blocking=True)
            yield images[index], None if labels is None else labels[index]


class Latents(Images):
    """A folder that encode.py wrote: an autoencoder's Gaussians for each image, and labels or text features.

    x is moments (n, 2, 2C, h, w) in the type of the files: of image and mirror, C means, then C log variances.
    `prepare` draws x_0 from them. y is labels, or features (n, tokens, width) float32 of one caption of each image.
    With captions x is (n, 1, 2C, h, w) and nothing is mirrored, as in U-ViT ("left" would be wrong).
    Raises ValueError where the folder is incomplete, damaged or of another image size.
    """

    def __init__(self, root, image_size=None, split="train"):
        self.root, self.encoding = str(root), read_encoding(root)
        if split != "train":
            raise ValueError(f"{root}: latents have no test split; encode the images to test on into another folder")
        if image_size not in (None, self.encoding["image_size"]):
            raise ValueError(f"{root}: encoded at image size {self.encoding['image_size']}, not {image_size}")
        for name in self.encoding["tables"]:
            for path, *_ in missing_files(root, name, self.encoding):
                raise ValueError(f"{root}: not all is encoded ({name}/{path.name} is missing or damaged); run the same "
                                 "command of encode.py again, it continues")
        count, classes, text = (self.encoding[key] for key in ("count", "class_names", "text"))
        labels = torch.from_numpy(self.array("labels", count)) if classes else None
        super().__init__((), labels, classes, self.encoding["shape"])
        self.length = count
        if text:
            self.text, self.flip, self.captions = tuple(text), False, self.array("captions", count + 1)
            self.null = torch.from_numpy(self.array("null", text[0]).astype(np.float32))

    def array(self, name, length):
        """The array in <name>.npy. Raises ValueError where it is not there, or of another length."""
        path = f"{self.root}/{name}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):
            if len(array := np.load(path)) == length:
                return array
        raise ValueError(f"{path} is missing, damaged or not of length {length}; encode again")

    def rows(self, name, indices):
        """These rows of a table, moments or text."""
        (_, *shape), dtype = self.encoding["tables"][name], np.dtype(self.encoding["type"])
        step, rows = self.encoding["batch_size"], np.empty((len(indices), *shape), dtype)
        for row, index in zip(rows, indices.tolist()):
            path = f"{self.root}/{name}/{index - index % step:09d}.bin"
            found = np.fromfile(path, dtype, row.size, offset=index % step * row.nbytes)
            if len(found) < row.size:
                raise ValueError(f"{path}: damaged; remove it and encode again")
            row[:] = found.reshape(shape)
        return torch.from_numpy(rows)

    def read(self, places):
        index, choice = places.T
        x = self.rows("moments", index)
        if not self.text:
            return x, None if self.labels is None else self.labels[index]
        first, end = self.captions[index], self.captions[index + 1]
        return x, self.rows("text", first + choice % (end - first))

    def examples(self, n):
        """Text features (n, tokens, width) float32: the first captions of n images, evenly spaced."""
        return self.rows("text", self.captions[np.arange(n) * len(self) // n]).float()

    def draws(self, n, generator):
        """Whether each is mirrored, (n,) bool, and the noise (n, C, h, w) that its latent is drawn with."""
        return [*super().draws(n, generator), torch.randn(n, *self.shape, generator=generator, device=generator.device)]

    def prepare(self, moments, mirror, noise):
        """x_0 = scale (mean + std noise), float32 (n, C, h, w), of the image or of its mirror."""
        side = (mirror & self.flip).long()
        mean, log_variance = moments[torch.arange(len(side), device=side.device), side].float().chunk(2, dim=1)
        return self.encoding["scale"] * (mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise)


def ignore_signals(worker):
    """SIGTERM, SIGHUP and ctrl-C reach all processes. The main one answers: it saves, and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def read_encoding(root):
    """The dict in encoding.json of an encoded folder (keys: see encode.py). Raises ValueError if it makes no sense."""
    try:
        encoding = json.loads((Path(root) / "encoding.json").read_text())
        (channels, height, width), text = encoding["shape"], encoding["text"]
        tables = {"moments": [encoding["count"], 1 if text else 2, 2 * channels, height, width]}
        if text:
            tables["text"] = [encoding["tables"]["text"][0], *text]
        numbers = [encoding["image_size"], encoding["batch_size"], *sum(tables.values(), [])]
        if not (tables == encoding["tables"] and all(type(number) is int and number > 0 for number in numbers)
                and encoding["image_size"] % width == 0 and 0 < encoding["scale"] < math.inf
                and encoding["type"] in ("float16", "float32") and isinstance(encoding["class_names"], list)
                and all(isinstance(encoding[key], str) for key in ("autoencoder", "files"))):
            raise ValueError("a count, shape, scale or other value makes no sense")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{root}: its encoding.json is not one of encode.py, or of an older version ({error!r}); "
                         "encode again, to another --out") from None
    return encoding


def missing_files(root, name, encoding):
    """The files of a table that are not there, or not whole: yields (path, first row, end)."""
    (count, *shape), step = encoding["tables"][name], encoding["batch_size"]
    row = math.prod(shape) * np.dtype(encoding["type"]).itemsize
    for first in range(0, count, step):
        path, end = Path(root, name, f"{first:09d}.bin"), min(first + step, count)
        if not path.is_file() or path.stat().st_size != (end - first) * row:
            yield path, first, end


@lru_cache(maxsize=2)
def epoch_order(length, seed, epoch):
    """A permutation of the images, and a random number in [0, 2**31) for each place in it: (length, 2) int64."""
    random = np.random.default_rng([seed, epoch])
    return np.stack([random.permutation(length), random.integers(2**31, size=length)], axis=1)


def shuffled(length, seed, start, count):
    """(count, 2) int64 from position `start` of an endless stream of epochs, each shuffled by (seed, epoch).

    Column 0 is the index of an image, column 1 a random number that chooses one of its captions.
    """
    epochs, places = np.divmod(np.arange(start, start + count), length)
    return np.concatenate([epoch_order(length, seed, int(e))[places[epochs == e]] for e in np.unique(epochs)])


# ---------------------------------------------------------------------------------------------------------------------
# Images from and to files

SUFFIXES = tuple(".png .jpg .jpeg .jfif .webp .avif .bmp .gif .tif .tiff .ppm .pgm".split())    # in any case


def open_image(path):
    """An image file -> Pillow's image, RGB, turned as its EXIF says, transparent pixels on white.

    Raises ValueError naming the file where it is not an image that can be shown. The system's errors ("Too many open
    files", no memory) stay what they are.
    """
    try:
        with Image.open(path) as image:
            if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
                raise ValueError("32-bit pixels do not say which value is white; save it with 8 or 16 bits")
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):      # 16 bits, which Pillow would clip, not scale
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except Exception as error:      # UnidentifiedImageError, SyntaxError, struct.error, DecompressionBombError, ..
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise
        raise ValueError(f"{path}: not a readable image ({one_line(error)}); repair or remove it") from None


def centre(image, size):
    """The central square of Pillow's image."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


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
    return pil_to_tensor(centre(image, size))


def read_square(path, size):
    """An image file -> uint8 (3, size, size): its central square, scaled with Lanczos, as U-ViT reads MS-COCO."""
    image = open_image(path)
    return pil_to_tensor(centre(image, min(image.size)).resize((size, size), Image.LANCZOS))


def read_face(path, size):
    """An aligned image of CelebA, 178x218 -> uint8 (3, size, size): rows 57..185, columns 25..153, bilinear (U-ViT)."""
    image = open_image(path)
    if image.size != (178, 218):
        raise ValueError(f"{path}: {image.width}x{image.height}, not an aligned image of CelebA, which is 178x218")
    return pil_to_tensor(image.crop((25, 57, 153, 185)).resize((size, size), Image.BILINEAR))


HELD_OUT = ("val", "valid", "validation", "test")     # beside train/; split "test" reads the first that is there


def folders_in(root):
    """Names of the folders in a folder, sorted, hidden ones left out."""
    return tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."))


def images_below(folder):
    """Paths of the images in a folder and in the folders in it, sorted by name, hidden ones left out."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name[0] == ".":
            continue
        if entry.is_dir():
            yield from images_below(entry.path)
        elif entry.name.lower().endswith(SUFFIXES):
            yield entry.path


def list_images(root, split="train", advice=""):
    """A folder -> (paths of its images, labels or None, class names). Sub-folders are classes. Prints what it found.

    Classes are in the order of their names as text (1, 10, 2), as in torchvision. Where train/ lies alone or beside a
    folder of HELD_OUT, one of the two is read, as `split` says.
    Raises FileNotFoundError, with this advice, where there is no such folder; ValueError where there is no image, a
    class without one, images beside classes, or no test split of the same classes.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such folder{advice}")
    folders, labels = folders_in(root), None
    train, held_out = os.path.join(root, "train"), [os.path.join(root, name) for name in HELD_OUT if name in folders]
    if split == "test":
        if "train" not in folders or not held_out:
            raise ValueError(f"{root}: has no test split, which is a folder {' or '.join(HELD_OUT)} beside train")
        if folders_in(held_out[0]) != folders_in(train):
            raise ValueError(f"{held_out[0]}: its class folders are not those of {train}")
        return list_images(held_out[0])
    if "train" in folders and (held_out or len(folders) == 1):
        return list_images(train)
    files = list(images_below(root))
    if not files and not folders:
        raise ValueError(f"{root}: holds no image ({', '.join(SUFFIXES)})")
    if folders:
        number, start = {name: label for label, name in enumerate(folders)}, len(os.path.join(root, ""))
        classes = [file[start:].split(os.sep)[0] for file in files]
        if set(classes) - number.keys():
            raise ValueError(f"{root}: holds images beside folders ({folders[0]}, ..); keep either images, or a folder "
                             "for each class")
        if empty := number.keys() - set(classes):
            raise ValueError(f"{os.path.join(root, min(empty))}: class folder without an image; remove it or fill it")
        labels = torch.tensor([number[name] for name in classes])
    say(f"{root}: {len(files)} images, {len(folders) or 'no'} class{'es' * (len(folders) != 1)}")
    return files, labels, folders


def from_files(files, labels, names, image_size, read_file=read_image):
    """The images in these files (see `list_images`): in memory if they are small, and else on disk."""
    if len(files) * 3 * image_size**2 > IN_MEMORY:
        return Images(files, labels, names, (3, image_size, image_size), read_file)
    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = pool.map(partial(read_file, size=image_size), files)
        for i, image in enumerate(tqdm(read, total=len(files), desc="reading images", unit="image", leave=False,
                                       mininterval=0.1 if sys.stderr.isatty() else 10)):
            images[i] = image
    return ImagesInMemory(images, labels, names, files)


def to_uint8(x):
    """x in [-1, 1], float -> uint8, rounded to the nearest grey level (as U-ViT and DiT do)."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


def save_grid(images, path, rows=0):
    """uint8 images (N, 3, H, W) -> one picture, in a file of the type that its name says.

    rows = 0: about square. Otherwise image i goes into row i % rows, so that each row shows one label.
    """
    if images.shape[1] != 3:
        raise ValueError(f"{path}: a picture needs 3 channels, these images have {images.shape[1]} (latents?)")
    grid = partial(torchvision.utils.make_grid, padding=2, pad_value=255)       # fills row by row
    images = images.cpu()
    picture = grid(images.mT, nrow=rows).mT if rows else grid(images, nrow=math.ceil(len(images) ** 0.5))
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)


# ---------------------------------------------------------------------------------------------------------------------
# Named data sets

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(data_dir="data", image_size=32, split="train"):
    """The 50,000 or 10,000 images of CIFAR10, 32x32 (or means of their pixels: 16x16, 8x8, ..), ten classes.

    From torchvision's files in data_dir, downloaded if they are not there; or from class folders (airplane/,
    automobile/, ..) in data_dir/train and data_dir/test, or in data_dir.
    """
    if 32 % image_size:
        raise ValueError(f"cifar10: image_size {image_size}; its images are 32x32, and can be 16x16 or 8x8 (give a "
                         "folder of images to --data for other sizes)")
    if any(Path(data_dir, folder, "airplane").is_dir() for folder in ("", "train")):
        dataset = from_files(*list_images(data_dir, split), 32)
        if dataset.class_names != CIFAR10_CLASSES:
            raise ValueError(f"{data_dir}: its folders are not CIFAR10's classes ({', '.join(CIFAR10_CLASSES)})")
    else:
        try:
            found = torchvision.datasets.CIFAR10(data_dir, train=split == "train", download=True)
        except Exception as error:      # URLError, OSError, RuntimeError (a wrong checksum)
            raise FileNotFoundError(f"cifar10: not in {data_dir}, and the download failed ({one_line(error)}); put "
                                    "cifar-10-python.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html) there, or "
                                    "say where it is with --data-dir") from None
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        dataset = ImagesInMemory(images, torch.tensor(found.targets), CIFAR10_CLASSES)
    if image_size < 32:
        means = F.avg_pool2d(dataset.images.float(), 32 // image_size).round().byte()
        dataset = ImagesInMemory(means, dataset.labels, CIFAR10_CLASSES, dataset.files)
    return dataset


def celeba64(data_dir="data/celeba", image_size=64, split="train"):
    """The aligned faces of CelebA, in data_dir or a folder in it, cropped as in U-ViT, no labels, no test split.

    Of all 202,599 images, the first 162,770 are used, which are the training split; of any other number, all.
    """
    if split == "test":
        raise ValueError("celeba64: has no test split here; CelebA's faces have no labels to test on")
    files, *_ = list_images(data_dir, advice="; unpack img_align_celeba.zip there "
                            "(https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html), or say where it is with --data-dir")
    files = files[:162_770] if len(files) == 202_599 else files
    return from_files(files, None, (), image_size, read_face)


def imagenet64(data_dir="data/imagenet", image_size=64, split="train"):
    """ImageNet's class folders (n01440764/, ..) in data_dir/train and data_dir/val, or in data_dir.

    They are decoded anew in every epoch. A photograph of 500x375 takes 3 ms of a core, so --workers decides the speed.
    """
    files, labels, names = list_images(data_dir, split, "; put ImageNet's class folders there (https://image-net.org), "
                                       "or say where they are with --data-dir")
    if labels is None:
        raise ValueError(f"imagenet64: {data_dir} holds images, not a folder for each class")
    return from_files(files, labels, names, image_size)


def encoded(name, flags, data_dir=None, image_size=None, split="train"):
    """The latents of a named data set, from data_dir (default data/<name>), where encode.py wrote them."""
    root = Path(data_dir or f"data/{name}")
    if not (root / "encoding.json").exists():
        raise FileNotFoundError(f"{name}: no latents in {root}; this makes them: python encode.py {flags} --out {root}")
    return Latents(root, image_size, split)


def box(x, y, width, height):
    """Signed distance of (x, y) from a box of these half widths: negative inside, in units of the shape's radius."""
    return np.maximum(abs(x) - width, abs(y) - height)


GREY = 128      # the background of the shapes
SHAPES = {      # ten classes: a colour, and the signed distance of (x, y) from the shape, right near its edge
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


def shapes(data_dir=None, image_size=16, split="train", length=10_000):
    """Drawn shapes: the first `length` images, or for split "test" the 1000 after them. Image i is of class i % 10."""
    indices = range(length) if split == "train" else range(length, length + 1000)
    images = torch.tensor(draw_shapes(image_size, indices))     # a copy of what is kept
    return ImagesInMemory(images, torch.tensor(indices) % len(SHAPES), SHAPES)


@lru_cache(maxsize=2)
def draw_shapes(size, indices):
    """uint8 images (N, 3, size, size) of `shapes`. Place and size of image i are drawn by a generator seeded with i."""
    images = np.empty((len(indices), 3, size, size), np.uint8)
    centres = (np.arange(size) + 0.5) / size - 0.5      # of the pixels
    kinds = [(np.array(colour)[:, None, None], distance) for colour, distance in SHAPES.values()]
    for image, i in zip(images, indices):
        colour, distance = kinds[i % len(kinds)]
        dx, dy, scale = np.random.default_rng(i).uniform(-1, 1, 3)
        radius = 0.36 + 0.03 * scale        # in units of the image's size, like the place
        x, y = (centres[None, :] - dx / 16) / radius, (centres[:, None] - dy / 16) / radius
        cover = np.clip(0.5 - distance(x, y) * radius * size, 0, 1)     # share of each pixel inside: smooth edges
        image[:] = (GREY + cover * (colour - GREY)).round()
    return images


class Named(NamedTuple):
    """A data set with a name: the function that loads it, and what is known of it before it is there."""
    load: Callable              # (data_dir, image_size, split) -> Images
    image_size: int             # height and width of the images, unless another one is asked for
    shape: tuple                # of x_0
    num_classes: int
    text: tuple | None = None   # (tokens, width)


DATASETS = {
    "cifar10": Named(cifar10, 32, (3, 32, 32), 10),
    "celeba64": Named(celeba64, 64, (3, 64, 64), 0),
    "imagenet64": Named(imagenet64, 64, (3, 64, 64), 1000),
    "imagenet256": Named(partial(encoded, "imagenet256", "--images imagenet/train"), 256, (4, 32, 32), 1000),
    "imagenet512": Named(partial(encoded, "imagenet512", "--images imagenet/train --image-size 512"),
                         512, (4, 64, 64), 1000),
    "mscoco256": Named(partial(encoded, "mscoco256", "--images train2014 --captions captions_train2014.json"),
                       256, (4, 32, 32), 0, (77, 768)),
    "shapes": Named(shapes, 16, (3, 16, 16), 10),
}
IMAGE_SIZE = {"folder": 64, **{name: known.image_size for name, known in DATASETS.items()}}


def imagenet_names():
    """The names of ImageNet's 1000 classes, in the order of their numbers, from torchvision: "tench", "goldfish", .."""
    return tuple(torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"])


# ---------------------------------------------------------------------------------------------------------------------
# What the commands share


def say(line):
    """Print a line for the user, once, not once for each process; to stderr, since stdout may be read by a program."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, file=sys.stderr)


def one_line(error, most=200):
    """The text of an error that others raised, without line breaks, and cut after `most` characters."""
    return " ".join(str(error).split())[:most]
