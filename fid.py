"""Measure how far generated images are from real ones: FID, sFID, Inception score, precision and recall.

    python fid.py samples.npz --ref cifar10                             # an npz, a folder of images, or a data set
    python fid.py samples.npz --ref cifar10 --save-ref cifar10.npz      # keep what is computed from the reference ..
    python fid.py other.npz --ref cifar10.npz                           # .. and use it again
    torchrun --nproc_per_node=8 fid.py --ckpt runs/uvit_s2-cifar10/checkpoint.pt --num-images 50000 --ref cifar10
    python fid.py samples.npz --ref photos/ --features network.py:net   # your own network instead of Inception

A network turns each image into a vector and class scores, from which these numbers are computed:

    FID        |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means m, covariances S    Heusel 2017, 1706.08500
    sFID       the same for 7 feature maps of 17 x 17, which keep the position          Nash 2021, 2103.03841
    IS         exp(mean KL(p(y|x) || p(y))), high for clear and varied classes          Salimans 2016, 1606.03498
    precision  share of generated images among the real ones; recall: the reverse       Kynkaanniemi 2019, 1904.06991

The network is the Inception of 2015 that all papers report with. Images are resized to its 299 x 299 in one of two
ways, which give different numbers: TensorFlow's (ADM, DiT, U-DiT; the default) or pytorch-fid's (U-ViT). Compare only
numbers with the same resize, reference and number of images (50,000 in the papers). Features agree with pytorch-fid
0.3.0 and torch-fidelity 0.4.0 to 2e-6, and the numbers computed from them to 2e-8 (test_all.py holds some).
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import runpy
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

import bookkeeping
import data
import recipes
import sample

RELEASED = "6726825d"       # the first digits of the SHA-256 of Inception's released weights
VECTORS = 10_000            # reference images for precision and recall, as many as in guided-diffusion's files


class Repooled(nn.Module):
    """A block of torchvision's Inception with another pooling in its last branch."""

    def __init__(self, block, pool):
        super().__init__()
        self.block, self.pool, self.branch_pool = block, pool, block.branch_pool
        block.branch_pool = nn.Identity()       # the block's last x.shape[1] channels are then its own pooling of x

    def forward(self, x):
        return torch.cat([self.block(x)[:, :-x.shape[1]], self.branch_pool(self.pool(x))], dim=1)


class Inception(torchvision.models.Inception3):
    """uint8 images (N, 3, H, W) -> dict(pool3 (N, 2048), spatial (N, 2023), logits (N, 1008)), float32.

    Inception v3 (Szegedy et al. 2015, 1512.00567) as TensorFlow released it in December 2015: unlike torchvision's,
    average pooling does not count the padding, and the last block takes the maximum. 5.71 GMACs an image.
    path      weights with pytorch-fid's names and shapes (None: its release, downloaded once); errors as sample.py's
    resize    "tensorflow" or "pytorch", to 299 x 299
    `spatial` is for sFID, in TensorFlow's order (y, x, channel). `logits` leave out the bias, as in all published IS.
    """

    def __init__(self, path=None, resize="tensorflow"):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        path = recipes.find(path or "inception")
        sample.load_weights(self, recipes.read_weights(path)[0], path)
        self.eval().requires_grad_(False)
        for name, block in list(self.named_children()):
            if hasattr(block, "branch_pool"):
                setattr(self, name, Repooled(block, nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)))
        self.Mixed_7c.pool = nn.MaxPool2d(3, stride=1, padding=1)
        for layer in list(self.modules()):      # merge each batch norm, which is linear now, into its convolution
            if hasattr(layer, "bn"):
                layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
        self.to(memory_format=torch.channels_last)      # 1.6 times as fast on a CPU
        self.made = dict(network="Inception", weights=digest(path), resize=resize)

    @torch.no_grad()
    def forward(self, images):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected uint8 images (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        if self.made["resize"] == "pytorch":
            x = F.interpolate(images.float(), (299, 299), mode="bilinear") / 127.5 - 1
        else:
            x = (resize(images.float(), 299) - 128) / 128                           # (N, 3, 299, 299)
        x = self.Conv2d_1a_3x3(x.contiguous(memory_format=torch.channels_last))     # (N, 32, 149, 149)
        x = self.maxpool1(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(x)))                # (N, 64, 73, 73)
        x = self.maxpool2(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))                # (N, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))                          # (N, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))           # (N, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)                           # (N, 2023): 7 channels of branch1x1
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))           # (N, 2048, 8, 8)
        pool3 = x.mean(dim=(2, 3))                                                  # (N, 2048)
        return dict(pool3=pool3, spatial=spatial, logits=pool3 @ self.fc.weight.T)


def resize(x, size):
    """TensorFlow 1's bilinear resize, (N, C, H, W) -> (N, C, size, size): pixel i lies at i H / size of the input.

    PyTorch's counts from pixel centres: (i + 1/2) H / size - 1/2. Neither blurs an image that it makes smaller.
    """
    for dim in (2, 3):
        place = torch.arange(size, device=x.device) * x.shape[dim] / size
        low = place.long()
        part = (place - low).unsqueeze(1) if dim == 2 else place - low
        above = (low + 1).clamp(max=x.shape[dim] - 1)
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, above), part)
    return x


def digest(path, state={}):
    """The first 8 digits of the SHA-256 of a file and of the tensors of a state dict."""
    found = hashlib.sha256(Path(path).read_bytes())
    for name, value in state.items():
        found.update(name.encode() + value.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:8]


class Features(nn.Module):
    """Your own network instead of Inception: uint8 images (N, 3, H, W) -> dict(pool3 (N, D)), any D.

    where is FILE.py:NAME, a function, a module, or a class of modules without arguments (the file is executed), or
    FILE.pt2, written by torch.export.save. Raises ValueError where it can not be loaded or does not return vectors.
    """

    def __init__(self, where):
        super().__init__()
        path, _, name = where.rpartition(":")
        try:
            if path.endswith(".py"):
                print(f"fid.py: executes {path}", file=sys.stderr)
                network = runpy.run_path(path)[name]
                network = network() if isinstance(network, type) else network
                self.network = network.eval() if isinstance(network, nn.Module) else network
            elif where.endswith(".pt2") and zipfile.is_zipfile(where):      # else torch prints a stack trace
                self.network = torch.export.load(path := where).module()
            else:
                raise ValueError("not there, or neither FILE.py:NAME nor FILE.pt2")
        except Exception as error:      # of the user's code, or what torch makes of the user's file
            raise ValueError(f"--features {where}: {type(error).__name__}: {data.one_line(error)}") from None
        self.made = dict(network=Path(where).name, weights=digest(path, self.state_dict()))

    @torch.no_grad()
    def forward(self, images):
        vectors = self.network(images)
        if not torch.is_tensor(vectors) or vectors.ndim != 2 or len(vectors) != len(images):
            raise ValueError(f"{self.made['network']}: images (N, 3, H, W) do not become vectors (N, D)")
        return dict(pool3=vectors)


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


def moments(x):
    """Vectors (N, D) -> (N, their mean (D,), their scatter, the sum of (x - mean)(x - mean)^T (D, D)), in float64."""
    mean = x.double().mean(0)
    return len(x), mean, (x.double() - mean).T @ (x.double() - mean)


def merged(a, b):
    """The moments of two sets together, without their vectors, and without the cancellation of E[x x^T]."""
    (n, mean, scatter), (m, other, more) = a, b
    shift = other - mean
    return n + m, mean + m / (n + m) * shift, scatter + more + n * m / (n + m) * shift.outer(shift)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)); mu (D,), sigma (D, D) symmetric -> float.

    With sigma = F F^T, the eigenvalues of sigma1 sigma2 are the squares of the singular values of F1^T F2, so the trace
    of the root is their sum. Nothing is inverted and no root is taken of a rounding error: covariances without full
    rank are no special case. 5 s at D = 2048 on one thread. Raises ValueError on wrong shapes, NaN or infinity.
    """
    mu1, sigma1, mu2, sigma2 = given = [torch.as_tensor(v, dtype=torch.float64) for v in (mu1, sigma1, mu2, sigma2)]
    if mu1.ndim != 1 or [v.shape for v in given] != [mu1.shape, (len(mu1), len(mu1))] * 2:
        raise ValueError("means and covariances do not fit together: " + ", ".join(str(tuple(v.shape)) for v in given))
    if not all(v.isfinite().all() for v in given):
        raise ValueError("means or covariances are not finite")

    def factor(sigma):
        values, vectors = torch.linalg.eigh(sigma)
        kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps       # the others are rounded zeros
        return vectors[:, kept] * values[kept].sqrt()

    trace = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    return max(0.0, ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item())


def inception_score(logits, splits=10):
    """logits (N, classes) -> mean and standard deviation, over equal parts in order, of exp(mean KL(p(y|x) || p(y))).

    Images sorted by class score too low, because a part then has few classes. Raises ValueError where N < splits.
    """
    logits, n, scores = torch.as_tensor(logits), len(logits), []
    if n < splits:
        raise ValueError(f"Inception score: {n} images do not make {splits} splits")
    for i in range(splits):
        log_p = logits[i * n // splits:(i + 1) * n // splits].double().log_softmax(dim=1)   # log p(y|x)
        marginal = log_p.logsumexp(dim=0) - math.log(len(log_p))                            # log p(y)
        scores.append((log_p.exp() * (log_p - marginal)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real, generated, k=3):
    """Vectors (N, D), (M, D) -> (precision, recall): the shares of generated vectors in the cloud of the real ones, and
    of real vectors in the cloud of the generated ones. Raises ValueError where a set has no more than k vectors."""
    real, generated = torch.as_tensor(real), torch.as_tensor(generated)
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"precision and recall need more than {k} images on both sides, here {len(real)} real and "
                         f"{len(generated)} generated (--no-pr leaves them out)")
    return share_inside(generated, real, k), share_inside(real, generated, k)


def share_inside(points, cloud, k, block=2000):
    """The share of points (M, D) in a cloud (N, D): in a ball around one of its vectors, whose radius is the distance
    to its k-th nearest neighbour in the cloud. Computed in float64 and in blocks, to save memory."""
    centre = cloud[:block].double().mean(0)     # makes rounding errors smaller

    def squared_distances(a, b):
        a, b = a.double() - centre, b.double() - centre
        return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)

    inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for balls in cloud.split(block):
        nearest = torch.empty(len(balls), 0, dtype=torch.float64, device=balls.device)
        for others in cloud.split(block):
            distances = torch.cat([nearest, squared_distances(balls, others)], dim=1)
            nearest = distances.topk(min(k + 1, distances.shape[1]), largest=False).values      # itself and k others
        for found, some in zip(inside.split(block), points.split(block)):
            found |= (squared_distances(some, balls) <= nearest[:, k]).any(1)
    return inside.double().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Images in, statistics out


def open_input(name, args, here):
    """A data set, folder or npz -> (its facts {source, size, n}, its statistics or {}, its batches or None)."""
    if name in data.DATASETS or Path(name).is_dir():
        with here.first():
            size = args.size or (common_size(name) if data.kind(name) == "folder" else None)
            images, statistics = data.load(name, args.data_dir, size), {}
        if images.encoding:
            raise ValueError(f"{name}: holds latents, no images; give the folder of images that they were made of")
    else:
        images, statistics = read_npz(name)
    if images is None:
        return dict(source=name, size=statistics.get("size"), n=statistics.get("n")), statistics, None
    if len(images) < 2:
        raise ValueError(f"{name}: {len(images)} image(s); a covariance takes at least two, a good one 50000")
    facts = dict(source=name, size="x".join(map(str, images.shape[-2:])), n=len(images))
    return facts, statistics, read_batches(images, name, args, here)


def read_npz(path):
    """An npz -> (images (N, 3, H, W) of arr_0 or None, statistics {mu, sigma[, mu_s, sigma_s, pool3, ..]} or {})."""
    if not zipfile.is_zipfile(path):
        what = "not an npz (or a damaged one)" if Path(path).exists() else "no such file"
        raise ValueError(f"{path}: {what}, folder, or data set ({', '.join(data.DATASETS)})")
    try:
        with np.load(path) as npz:
            if damaged := npz.zip.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
            found = {key: npz[key] for key in ("mu", "sigma", "mu_s", "sigma_s", "pool3") if key in npz}
            if unfit := [key for key, value in found.items() if not np.isfinite(value).all()]:
                raise ValueError(f"{unfit[0]} is not finite")
            found.update({key: npz[key].item() for key in ("network", "weights", "resize", "size", "n") if key in npz})
            if "arr_0" not in npz and not {"mu", "sigma"} <= found.keys():
                raise ValueError(f"neither arr_0 (images) nor mu and sigma (statistics) is in it, but {', '.join(npz)}")
            rows = read_images(npz) if "arr_0" in npz else None
    except Exception as error:      # whatever zipfile and NumPy make of arbitrary bytes
        raise ValueError(f"{path}: {data.one_line(error)}") from None
    return rows, found if {"mu", "sigma"} <= found.keys() else {}


def read_images(npz):
    """arr_0 of an open npz, (N, 3, H, W). Where it is stored (np.savez), it is mapped, so that all processes share one
    copy in the system's file cache; where it is compressed (np.savez_compressed), it is read into memory."""
    entry = npz.zip.getinfo("arr_0.npy")
    if entry.compress_type == zipfile.ZIP_STORED:
        with open(npz.zip.filename, "rb") as file:      # an entry: 30 bytes, a name, extras, the array's file
            file.seek(entry.header_offset + 26)
            file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
            np.lib.format.read_magic(file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            rows = np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")
    else:
        rows = npz["arr_0"]
    if rows.dtype != np.uint8 or rows.ndim != 4 or rows.shape[3] != 3:
        hint = " (NCHW? transpose(0, 2, 3, 1))" if rows.shape[1:2] == (3,) else ""
        raise ValueError(f"arr_0 is {rows.dtype} {rows.shape}{hint}; expected uint8, 0 to 255, (N, H, W, 3)")
    return rows.transpose(0, 3, 1, 2)


def common_size(folder):
    """The side of a folder's images, from their headers. Raises ValueError where they differ or are not square."""
    sizes = {}
    for file in data.list_images(folder)[0]:
        with contextlib.suppress(Exception), Image.open(file) as image:     # data.load names what can not be read
            sizes.setdefault(image.size, file)
    if len(sizes) > 1 or any(width != height for width, height in sizes):
        found = " and ".join(f"{file} of {width}x{height}" for (width, height), file in [*sizes.items()][:2])
        raise ValueError(f"{found}: square images of one size are needed; --size PIXELS scales and crops")
    return max(sizes)[0] if sizes else None


def read_batches(images, name, args, here):
    """This process's batches, every world-th one: (index of the first, uint8 images (n, 3, H, W))."""
    n, step = len(images), args.batch_size
    firsts = range(here.rank * step, n, here.world * step)
    if isinstance(images, np.ndarray):
        batches = (torch.from_numpy(images[first:first + step].copy()) for first in firsts)
    else:
        order = [np.arange(first, min(first + step, n))[:, None] * [1, 0] for first in firsts]
        batches = (batch for batch, _ in images.batches(order, "cpu", workers=4))
    with tqdm(total=n, desc=name, unit="image", disable=here.rank > 0,
              mininterval=0.1 if sys.stderr.isatty() else 10) as bar:
        for first, batch in zip(firsts, batches):
            yield first, batch
            bar.update(min(step * here.world, n - first))


def open_sampler(args, here):
    """What sample.py would write with the same flags -> (its facts, {}, its batches)."""
    source = sample.open_source(args, here.device)
    conditions = sample.parse_conditions(args, source)
    batches = sample.sampled(source, conditions, args.num_images, args.batch_size, here, args.amp == "bf16")
    size = "x".join(map(str, source.image_shape[-2:]))
    facts = dict(source=str(source.path), size=size, n=args.num_images, step=source.step, weights=source.weights,
                 **source.settings, labels=args.labels, prompt=args.prompt or args.prompts, amp=args.amp,
                 guide_with=args.guide_with)
    return facts, {}, ((indices[0], images) for indices, images in batches)


def collect(network, batches, source, here, keep=()):
    """Send the batches of all processes through the network. On the first process, returns mu and sigma of pool3, mu_s
    and sigma_s of spatial, and the outputs (N, D) named in `keep`, in the images' order; on the others {}."""
    total, kept = {}, {}
    for first, images in batches:
        out = network(images.to(here.device))
        if not all(values.isfinite().all() for values in out.values()):
            raise ValueError(f"{source}: the features of images {first} to {first + len(images) - 1} are not finite; "
                             f"look at the weights of {network.made['network']}")
        for name in out.keys() - {"logits"}:
            part = moments(out[name])
            total[name] = merged(total[name], part) if name in total else part
        kept[first] = {name: out[name].float().cpu() for name in keep}
    mine = {name: (n, mean.cpu(), scatter.cpu()) for name, (n, mean, scatter) in total.items()}, kept
    everyone = [mine]
    if here.distributed:
        everyone = [None] * here.world if here.rank == 0 else None
        dist.gather_object(mine, everyone)
    if here.rank > 0:
        return {}
    kept = {first: rows for _, kept in everyone for first, rows in kept.items()}
    numbers = {name: torch.cat([kept[first][name] for first in sorted(kept)]).numpy() for name in keep}
    for name in total:
        n, mean, scatter = functools.reduce(merged, [total[name] for total, _ in everyone if name in total])
        suffix = {"pool3": "", "spatial": "_s"}[name]
        numbers.update({f"mu{suffix}": mean.numpy(), f"sigma{suffix}": scatter.numpy() / (n - 1)})
    return numbers


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = f"an npz (arr_0), a folder of images, {', '.join(data.DATASETS)}, or statistics (an npz of mu and sigma)"
    p.add_argument("samples", nargs="?", help=f"{kinds}; leave it out with --ckpt or --weights")
    add = p.add_argument_group("what is compared, and how").add_argument
    add("--ref", required=True, help=f"the real images: {kinds}")
    add("--save-ref", metavar="FILE.npz", help="write the reference's numbers there, for --ref of later calls")
    add("--resize", choices=["tensorflow", "pytorch"], default="tensorflow",
        help="to 299 x 299 (default tensorflow: ADM, DiT, U-DiT; U-ViT: pytorch)")
    add("--inception", metavar="FILE", help="Inception's weights (default: downloaded to torch.hub's cache)")
    add("--features", metavar="FILE.py:NAME", help="another network, uint8 images (N, 3, H, W) -> (N, D): a function "
        "or module of a Python file, which is executed; or FILE.pt2, written by torch.export")
    add("--pr", action=argparse.BooleanOptionalAction, default=True, help="precision and recall, against at most "
        f"{VECTORS} reference images, evenly spaced; all vectors are kept, 8 kB an image (default: yes)")
    add("--size", type=int, metavar="PIXELS", help="scale and crop folders and data sets (default: as the files are)")
    add("--data-dir", metavar="DIR", help="where a named data set lies (default data/)")
    add("--json", action="store_true", help="print one line of JSON")
    sample.add_flags(p)
    args = p.parse_args(argv)
    bookkeeping.check(vars(args))
    if bool(args.samples) == bool(args.ckpt or args.weights):
        raise ValueError(f"give either {kinds}; or --ckpt or --weights, to sample from")
    if not args.samples:
        sample.check_flags(args)
        if (args.num_images or 0) < 2:
            raise ValueError("--num-images N: say how many images to sample, at least 2 (50000 in the papers)")
    for flag in ("num_images", "labels", "prompt", "prompts", "cfg", "cfg_interval", "guide_with", "sampler", "steps"):
        if args.samples and getattr(args, flag) is not None:
            raise ValueError(f"--{flag.replace('_', '-')}: {args.samples} is there already, nothing is sampled")
    if args.save_ref and (not args.save_ref.endswith(".npz") or Path(args.save_ref).exists()):
        raise ValueError(f"--save-ref {args.save_ref}: give the name of a new file that ends in .npz")
    return args


def main(argv=None):
    args = parse(argv)
    here = bookkeeping.Processes(args.device)
    torch.backends.cudnn.allow_tf32 = False         # features in full float32 on every machine
    torch.set_float32_matmul_precision("highest")
    # The samples come first: the reference may have to be downloaded.
    samples, fake, batches = open_input(args.samples, args, here) if args.samples else open_sampler(args, here)
    reference, real, real_batches = open_input(args.ref, args, here)
    if args.save_ref and real:
        raise ValueError(f"--save-ref: {args.ref} holds statistics already")
    network = None                                  # two files of statistics need none
    if batches or not real:
        with here.first():
            network = Features(args.features) if args.features else Inception(args.inception, args.resize)
        network.to(here.device)
    made = agreed(network.made if network else {}, args.size, (samples, fake), (reference, real))
    with_pr = args.pr and batches is not None and (real_batches is not None or "pool3" in real)
    if not real or with_pr and "pool3" not in real:
        found = collect(network, real_batches, args.ref, here, ["pool3"] * args.pr)
        if "pool3" in found:        # evenly spaced, since the first ones of a sorted set are of one class
            n, count = reference["n"], min(VECTORS, reference["n"])
            found["pool3"] = found["pool3"][np.arange(count) * n // count]
        # A published file has the statistics of a whole set, and the images of a part of it.
        real = {**real, "pool3": found.get("pool3")} if real else found
        if args.save_ref and here.rank == 0:
            part = Path(args.save_ref).with_suffix(f".{os.getpid()}.npz")
            with bookkeeping.writing(args.save_ref):
                np.savez(part, **real, **made, **reference)
                os.replace(part, args.save_ref)
    if batches:
        keep = ["pool3"] * with_pr + ["logits"] * (not args.features)
        fake = collect(network, batches, samples["source"], here, keep)
    if here.rank == 0:
        reference["vectors"] = len(real["pool3"]) if with_pr else None
        how = dict(samples=samples, reference=reference, network=made)
        report(compare(fake, real, made, here.device), how, args.json)
    here.close()


def agreed(network, size, *sides):
    """The network {network, weights[, resize]} of all numbers. Raises ValueError where sides do not fit together."""
    sizes = {f"--size {size}": f"{size}x{size}"} if size else {}
    for facts, statistics in sides:
        name, mu = facts["source"], statistics.get("mu")
        theirs = {key: statistics[key] for key in ("network", "weights", "resize") if key in statistics}
        network = network or theirs
        if theirs and theirs != network:
            raise ValueError(f"{name}: statistics of {theirs}, not of {network}")
        if mu is not None and mu.shape != (2048,) and network.get("network", "Inception") == "Inception":
            raise ValueError(f"{name}: mu has shape {mu.shape}; Inception's has 2048 numbers")
        sizes.update({name: facts["size"]} if facts["size"] else {})
    if len({*sizes.values()}) > 1:
        raise ValueError(f"images of unequal sizes: {', '.join(f'{name} {size}' for name, size in sizes.items())}; "
                         "--size scales folders and data sets, and no npz")
    return network


def compare(fake, real, network, device):
    """The statistics of both sides -> {name of a number: its value}, as far as the statistics allow."""
    name = network.get("network", "Inception")
    name = "FID" if name == "Inception" else f"Frechet distance on {name}"
    numbers = {name: frechet_distance(fake["mu"], fake["sigma"], real["mu"], real["sigma"])}
    if "mu_s" in fake and "mu_s" in real:
        numbers["sFID"] = frechet_distance(fake["mu_s"], fake["sigma_s"], real["mu_s"], real["sigma_s"])
    if "logits" in fake:
        numbers["IS"], numbers["IS deviation"] = inception_score(fake["logits"], min(10, len(fake["logits"])))
    if "pool3" in fake:
        vectors = [torch.from_numpy(side["pool3"]).to(device) for side in (real, fake)]
        numbers["precision"], numbers["recall"] = precision_recall(*vectors)
    return numbers


def report(numbers, how, as_json):
    """Print the numbers and how = {side: {fact: value or None}}, and warn where the numbers mislead."""
    how = {side: {key: value for key, value in facts.items() if value is not None} for side, facts in how.items()}
    warnings = [f"{facts['n']} {side}: under 2048 images, covariances have no full rank and distances are too large"
                for side, facts in how.items() if facts.get("n", math.inf) < 2048]
    if "FID" in numbers and how["network"].get("weights", RELEASED) != RELEASED:
        warnings.append("these are not the released weights of Inception: do not compare with published FIDs")
    for warning in warnings:
        print(f"fid.py: warning: {warning}", file=sys.stderr)
    if as_json:
        return print(json.dumps({**numbers, **how}))
    for name, value in numbers.items():
        print(f"{name:<12} {value:#.6g}")
    for side, facts in how.items():
        print(f"{side:<12} {', '.join(f'{key} {value}' for key, value in facts.items())}")


if __name__ == "__main__":
    bookkeeping.command("fid.py", main, "interrupted")
