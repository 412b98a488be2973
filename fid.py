"""How far are generated images from real ones? FID, sFID, Inception score, precision and recall.

    python fid.py samples.npz --ref cifar10                             # an npz, a folder of images, or statistics
    torchrun --nproc_per_node=8 -- fid.py --ckpt runs/uvit_s2-cifar10/checkpoint.pt --num 50000 --ref cifar10
    python fid.py samples.npz --ref photos/ --features network.pt       # where Inception means nothing

A network turns every image into a vector, and the numbers compare two clouds of vectors, or look at its class scores:

    FID        |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means and covariances     Heusel 2017, 1706.08500
    sFID       the same of 7 maps of 17 x 17 numbers, which know where in the image     Nash 2021, 2103.03841
    IS         exp(mean KL(p(y|x) || p(y))): sure of its class, but varied over images  Salimans 2016, 1606.03498
    precision  share of generated images in the cloud of real ones; recall: reversed    Kynkaanniemi 2019, 1904.06991

The network is the Inception of 2015 that all papers report with. Images are scaled to its 299 x 299 in one of two
ways, which differ in the result: TensorFlow's (ADM, DiT, U-DiT; the default) or pytorch-fid's (U-ViT). Compare numbers
only of the same resize, reference and number of images (50,000 in the papers). Features agree with pytorch-fid 0.3.0
and torch-fidelity 0.4.0 to 2e-6, and all numbers made of them to 2e-8 (test_all.py holds some).
"""
import argparse
import hashlib
import json
import math
import os
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

import data
import sample
import train

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
RELEASED = "6726825d"       # so begins that file's SHA-256
VECTORS = 10_000            # reference images for precision and recall, as many as in guided-diffusion's files

# ---------------------------------------------------------------------------------------------------------------------
# The networks


class Repooled(nn.Module):
    """A block of torchvision's Inception whose pooling branch, the last one, pools in another way."""

    def __init__(self, block, pool):
        super().__init__()
        self.block, self.pool, self.branch_pool = block, pool, block.branch_pool
        block.branch_pool = nn.Identity()       # so that what the block itself pools is its last x.shape[1] channels

    def forward(self, x):
        others = self.block(x)[:, :-x.shape[1]]
        return torch.cat([others, self.branch_pool(self.pool(x))], dim=1)


class Inception(torchvision.models.Inception3):
    """uint8 images (N, 3, H, W) -> dict(pool3 (N, 2048), spatial (N, 2023), logits (N, 1008)), float32.

    Inception v3 (Szegedy et al. 2015, 1512.00567) as TensorFlow released it in December 2015. It differs from
    torchvision's in its averages, which do not count the padding, and in its last block, which takes the maximum.

    path    weights with the names and shapes of pytorch-fid's release (None: that file, downloaded once)
    resize  "tensorflow" or "pytorch": how images come to 299 x 299
    spatial is sFID's, in TensorFlow's order (y, x, channel); logits are without bias, as IS has always been computed.
    5.71 GMACs an image. Raises FileNotFoundError or ValueError where the weights can not be had, or do not fit.
    """

    def __init__(self, path=None, resize="tensorflow"):
        if resize not in ("tensorflow", "pytorch"):
            raise ValueError(f"unknown resize {resize!r}: choose tensorflow or pytorch")
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        path = path or download()
        sample.load_weights(self, sample.read_weights(path)[0], path)
        self.eval().requires_grad_(False)
        for name, block in list(self.named_children()):
            if hasattr(block, "branch_pool"):
                setattr(self, name, Repooled(block, nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)))
        self.Mixed_7c.pool = nn.MaxPool2d(3, stride=1, padding=1)
        for layer in list(self.modules()):      # a batch norm, once trained, is linear, and goes into the convolution
            if hasattr(layer, "bn"):
                layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
        self.to(memory_format=torch.channels_last)      # 1.6 times as fast on a CPU
        self.made = dict(network="Inception", weights=file_hash(path), resize=resize)

    @torch.no_grad()
    def forward(self, images):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected uint8 images (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        pytorch = self.made["resize"] == "pytorch"
        x = resize(images.float(), 299, centres=pytorch)                            # (N, 3, 299, 299), 0 to 255
        x = x / 127.5 - 1 if pytorch else (x - 128) / 128
        x = self.Conv2d_1a_3x3(x.contiguous(memory_format=torch.channels_last))     # (N, 32, 149, 149)
        x = self.maxpool1(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(x)))                # (N, 64, 73, 73)
        x = self.maxpool2(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))                # (N, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))                          # (N, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))           # (N, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)                           # (N, 2023): 7 channels of branch1x1
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))           # (N, 2048, 8, 8)
        pool3 = x.mean(dim=(2, 3))                                                  # (N, 2048)
        return dict(pool3=pool3, spatial=spatial, logits=pool3 @ self.fc.weight.T)


def resize(x, size, centres):
    """Bilinear, without antialiasing: (N, C, H, W) -> (N, C, size, size).

    Output pixel i is at i H / size of the input (TensorFlow 1), or, if pixels are counted from their centres (PyTorch),
    at (i + 1/2) H / size - 1/2: up to half an input pixel away, hence another FID.
    """
    shift = 0.5 if centres else 0.0
    for dim in (2, 3):
        n = x.shape[dim]
        place = ((torch.arange(size, device=x.device) + shift) * n / size - shift).clamp(min=0)
        low = place.long()
        part = (place - low).unsqueeze(1) if dim == 2 else place - low
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1)), part)
    return x


def download():
    """The path of the released weights, fetched into torch.hub's cache if they are not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL).name
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=RELEASED)
        except Exception as error:      # a URLError, a RuntimeError on a wrong checksum, an OSError on a full disk
            raise FileNotFoundError(f"Inception's weights are not in {path}, and the download failed ({error}); "
                                    f"fetch {URL}, and say where it is with --inception") from None
    return path


def file_hash(path):
    """The first 8 digits of a file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]


class Scripted(nn.Module):
    """A TorchScript file in Inception's place: uint8 images (N, 3, H, W) -> dict(pool3 (N, D)), D its own."""

    def __init__(self, path):
        super().__init__()
        self.made = dict(network=str(path), weights=file_hash(path))
        self.module = self.attempt(torch.jit.load, path).eval()

    @torch.no_grad()
    def attempt(self, call, given):
        try:
            return call(given)
        except RuntimeError as error:       # TorchScript's are stack traces, whose last line says what happened
            raise ValueError(f"--features {self.made['network']}: {str(error).strip().splitlines()[-1]}") from None

    def forward(self, images):
        vectors = self.attempt(self.module, images)
        if not torch.is_tensor(vectors) or vectors.ndim != 2 or len(vectors) != len(images):
            raise ValueError(f"--features {self.made['network']}: images (N, 3, H, W) do not become vectors (N, D)")
        return dict(pool3=vectors)


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


class Moments:
    """Mean (D,) and scatter sum (x - mean)(x - mean)^T (D, D) of vectors that come in parts, in float64.

    Parts add up without the cancellation of E[x x^T] - mean mean^T, and without keeping the vectors:
    scatter = scatter_1 + scatter_2 + n_1 n_2 / (n_1 + n_2) (mean_1 - mean_2)(mean_1 - mean_2)^T.
    """

    def __init__(self, x):
        x = x.double()
        self.n, self.mean = len(x), x.mean(0)
        self.scatter = (x - self.mean).T @ (x - self.mean)

    def add(self, other):
        total, shift = self.n + other.n, other.mean - self.mean
        self.scatter += other.scatter + self.n * other.n / total * shift.outer(shift)
        self.mean += other.n / total * shift
        self.n = total
        return self

    def cpu(self):
        self.mean, self.scatter = self.mean.cpu(), self.scatter.cpu()
        return self


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)); mu (D,), sigma (D, D) symmetric -> float.

    With sigma = F F^T, the eigenvalues of sigma1 sigma2 are those of the symmetric (F1^T F2)(F1^T F2)^T: squares of the
    singular values of F1^T F2, whose sum is the trace sought. Nothing is inverted, and no root taken of a rounding
    error, so covariances without full rank are no special case. 5 s at D = 2048 on one thread. ValueError on wrong
    shapes, or where anything is not finite.
    """
    mu1, sigma1, mu2, sigma2 = given = [torch.as_tensor(v, dtype=torch.float64) for v in (mu1, sigma1, mu2, sigma2)]
    if mu1.ndim != 1 or [v.shape for v in given] != [mu1.shape, (len(mu1), len(mu1))] * 2:
        raise ValueError("means and covariances do not fit together: " + ", ".join(str(tuple(v.shape)) for v in given))
    if not all(v.isfinite().all() for v in given):
        raise ValueError("means or covariances are not finite")

    def factor(sigma):
        values, vectors = torch.linalg.eigh(sigma)
        kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps       # the others are 0, but rounded
        return vectors[:, kept] * values[kept].sqrt()

    trace = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    return max(0.0, ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item())


def inception_score(logits, splits=10):
    """logits (N, classes) -> mean and standard deviation, over equal parts in order, of exp(mean KL(p(y|x) || p(y))).

    Images sorted by class have few classes in a part, and score too low. ValueError where N < splits.
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
    """Vectors (N, D), (M, D) -> (precision, recall), shares in 0 .. 1, computed on the device where they are.

    A set's cloud is the union of balls around its vectors, each as wide as the distance to the k-th nearest other one.
    Precision: the share of generated vectors in the cloud of the real ones; recall: the other way round. Distances are
    taken in float64 and in blocks, whose memory does not grow with N and M. ValueError where a set has only k vectors.
    """
    real, generated = torch.as_tensor(real), torch.as_tensor(generated)
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"precision and recall need more than {k} images on both sides, here {len(real)} real and "
                         f"{len(generated)} generated (--no-pr leaves them out)")
    return share_inside(generated, real, k), share_inside(real, generated, k)


def share_inside(points, cloud, k, block=2000):
    """The share of points (M, D) in the cloud of (N, D)."""
    centre = cloud[:block].double().mean(0)     # distances do not depend on it, but their rounding errors do

    def squared_distances(a, b):
        a, b = a.double() - centre, b.double() - centre
        return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)

    inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for balls in cloud.split(block):
        nearest = torch.empty(len(balls), 0, dtype=torch.float64, device=balls.device)
        for others in cloud.split(block):
            distances = torch.cat([nearest, squared_distances(balls, others)], dim=1)
            nearest = distances.topk(min(k + 1, distances.shape[1]), largest=False).values      # itself and k more
        for found, some in zip(inside.split(block), points.split(block)):
            found |= (squared_distances(some, balls) <= nearest[:, k]).any(1)
    return inside.double().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Images in, statistics out


def open_input(name, args, here):
    """A data set, folder or npz -> (its images or None, its statistics or {}, and what it is: {source, size})."""
    if name in data.DATASETS or Path(name).is_dir():
        with here.first():
            size = args.size or (common_size(name) if data.kind(name) == "folder" else None)
            images, statistics = data.load(name, args.data_dir, size), {}
        if images.encoding:
            raise ValueError(f"{name}: holds latents, no images; give the folder of images that they were made of")
    else:
        images, statistics = read_npz(name)
    return images, statistics, dict(source=name, size=None if images is None else pixels(images.shape))


def read_npz(path):
    """An npz -> (its images, arr_0, or None; its statistics {mu, sigma[, mu_s, sigma_s, made]} or {})."""
    if not zipfile.is_zipfile(path):
        what = "not an npz (or a damaged one)" if Path(path).exists() else "no such file"
        raise ValueError(f"{path}: {what}, folder, or data set ({', '.join(data.DATASETS)})")
    try:
        with np.load(path, allow_pickle=False) as npz:
            statistics = {key: npz[key] for key in ("mu", "sigma", "mu_s", "sigma_s", "made") if key in npz}
            statistics = statistics if {"mu", "sigma"} <= statistics.keys() else {}
            rows = npz["arr_0"] if "arr_0" in npz else None
            if rows is None and not statistics:
                raise ValueError(f"neither arr_0 (images) nor mu and sigma (statistics) is in it, but {', '.join(npz)}")
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if rows is None:
        return None, statistics
    if rows.dtype != np.uint8 or rows.ndim != 4 or rows.shape[3] != 3:
        hint = " (NCHW? transpose(0, 2, 3, 1))" if rows.shape[1:2] == (3,) else ""
        raise ValueError(f"{path}: arr_0 is {rows.dtype} {rows.shape}{hint}; expected uint8, 0 to 255, (N, H, W, 3)")
    return data.ImagesInMemory(torch.from_numpy(rows).permute(0, 3, 1, 2)), statistics


def common_size(folder):
    """The side of a folder's images, from their headers. Raises ValueError where that is not one number for all."""
    sizes = {}
    for file in data.list_images(folder)[0]:
        with Image.open(file) as image:
            sizes.setdefault(image.size, file)
    if len(sizes) > 1 or image.width != image.height:
        found = " and ".join(f"{file} of {width}x{height}" for (width, height), file in [*sizes.items()][:2])
        raise ValueError(f"{found}: square images of one size are needed; --size PIXELS scales and crops")
    return image.width


def pixels(shape):
    return f"{shape[-2]}x{shape[-1]}"


def read_batches(images, name, args, here):
    """This process's batches of a data set, every world-th one: (index of the first, uint8 images)."""
    n, step = len(images), args.batch_size
    if n < 2:
        raise ValueError(f"{name}: {n} image(s); a covariance takes at least two, a good one 50000")
    batches = [np.arange(i, min(i + step, n)) for i in range(here.rank * step, n, here.world * step)]
    order = [np.stack([index, 0 * index], axis=1) for index in batches]
    with tqdm(total=n, desc=name, unit="image", disable=here.rank > 0,
              mininterval=0.1 if sys.stderr.isatty() else 10) as bar:
        for index, (batch, _) in zip(batches, images.batches(order, "cpu", workers=4)):
            yield index[0], batch
            bar.update(min(step * here.world, n - index[0]))


def sample_batches(args, here):
    """What sample.py would write, by its flags -> (batches as above, and how they are made)."""
    source = sample.open_source(args, here.device)
    conditions = sample.parse_conditions(args, source)
    batches = sample.sampled(source, conditions, args.num, args.batch_size, here, args.amp == "bf16")
    made = dict(source=str(source.path), size=pixels(source.image_shape), step=source.step, weights=source.weights,
                **source.settings, labels=args.labels, prompt=args.prompt, amp=args.amp)
    return ((indices[0], images) for indices, images in batches), made


def collect(network, batches, here, keep=()):
    """Batches of all processes through the network -> on the first process dict(n, mu, sigma[, mu_s, sigma_s]) and the
    outputs (N, D) named in `keep`, in order; {} on the others.
    """
    moments, kept = {}, {}
    for first, images in batches:
        out = network(images.to(here.device))
        for name in out.keys() - {"logits"}:
            part = Moments(out[name])
            moments[name] = moments[name].add(part) if name in moments else part
        kept[first] = {name: out[name].float().cpu() for name in keep}
    everyone = [({name: part.cpu() for name, part in moments.items()}, kept)]
    if here.distributed:
        mine, everyone = everyone[0], [None] * here.world if here.rank == 0 else None
        dist.gather_object(mine, everyone)
    if here.rank > 0:
        return {}
    moments, kept = everyone[0]
    for more, rows in everyone[1:]:
        for name, part in more.items():
            moments[name].add(part)
        kept.update(rows)
    numbers = {name: torch.cat([kept[first][name] for first in sorted(kept)]).numpy() for name in keep}
    for name, suffix in [("pool3", ""), ("spatial", "_s")]:
        if name in moments:
            numbers["mu" + suffix] = moments[name].mean.numpy()
            numbers["sigma" + suffix] = moments[name].scatter.numpy() / (moments[name].n - 1)
    return dict(numbers, n=moments["pool3"].n)


def collect_reference(network, images, args, here):
    """`collect` of a reference, with up to VECTORS of pool3; kept in torch.hub's cache by all that it depends on."""
    content = images.images.contiguous().numpy() if isinstance(images, data.ImagesInMemory) else repr(
        [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in images.files]).encode()
    made = dict(network.made, images=hashlib.sha256(content).hexdigest(), n=len(images), size=pixels(images.shape))
    key = hashlib.sha256(json.dumps([made, args.pr]).encode()).hexdigest()[:16]
    path = Path(torch.hub.get_dir()) / "fid" / f"{key}.npz"
    if not here.highest(int(here.rank == 0 and not path.exists())):
        return {**np.load(path), "n": len(images)} if here.rank == 0 else {}
    numbers = collect(network, read_batches(images, args.ref, args, here), here, ["pool3"] * args.pr)
    if here.rank == 0:
        if args.pr:     # evenly spread, since the first ones of a sorted set are of one class
            count = min(VECTORS, len(images))
            numbers["pool3"] = numbers["pool3"][np.arange(count) * len(images) // count]
        temporary = path.with_suffix(f".{os.getpid()}.npz")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(temporary, **numbers, made=json.dumps(made))
            os.replace(temporary, path)
        except OSError as error:
            print(f"fid.py: warning: the reference's numbers could not be kept ({error})", file=sys.stderr)
    return numbers


# ---------------------------------------------------------------------------------------------------------------------


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = f"an npz (arr_0), a folder of images, {', '.join(data.DATASETS)}, or statistics (an npz of mu and sigma)"
    p.add_argument("samples", nargs="?", help=f"{kinds}; or none, with --ckpt or --weights")
    add = p.add_argument_group("what is compared, and how").add_argument
    add("--ref", required=True, help=f"the real images: {kinds}")
    add("--resize", choices=["tensorflow", "pytorch"], default="tensorflow",
        help="to 299 x 299 (default tensorflow: ADM, DiT, U-DiT; U-ViT: pytorch)")
    add("--inception", metavar="FILE", help="Inception's weights (default: downloaded to torch.hub's cache)")
    add("--features", metavar="FILE", help="in its place, a TorchScript module: uint8 images (N, 3, H, W) -> (N, D)")
    add("--pr", action=argparse.BooleanOptionalAction, default=True,
        help="precision and recall, which keep all vectors in memory, 8 kB an image (default: yes)")
    add("--size", type=int, metavar="PIXELS", help="scale and crop as training does (default: as the files are)")
    add("--data-dir", metavar="DIR", help="where a named data set lies (default data/)")
    add("--json", action="store_true", help="print one line of JSON")
    sample.add_flags(p)
    args = p.parse_args(argv)
    if bool(args.samples) == bool(args.ckpt or args.weights):
        raise ValueError(f"give either {kinds}; or --ckpt or --weights, to sample from")
    if args.size is not None and args.size < 1:
        raise ValueError(f"--size {args.size}: must be at least 1")
    if args.samples:
        train.check_bounds(vars(args))
    else:
        sample.check_flags(args)
        if (args.num or 0) < 2:
            raise ValueError("--num N: say how many images to sample, at least 2 (50000 in the papers)")
    return args


def main(argv=None):
    args = parse(argv)
    here = train.Processes(args.device)
    torch.backends.cudnn.allow_tf32 = False         # features in full float32 on every machine
    torch.set_float32_matmul_precision("highest")
    real_images, real, reference = open_input(args.ref, args, here)
    if args.samples:
        images, fake, samples = open_input(args.samples, args, here)
        batches = None if images is None else read_batches(images, args.samples, args, here)
    else:
        (batches, samples), fake = sample_batches(args, here), {}
    with_pr = args.pr and batches is not None and real_images is not None
    network = None                                  # two files of statistics need none
    if batches is not None or not real:
        with here.first():
            network = Scripted(args.features) if args.features else Inception(args.inception, args.resize)
        network.to(here.device)
    made_by = agreed(network.made if network else {}, {args.ref: real, args.samples: fake})
    if with_pr or not real:
        found = collect_reference(network, real_images, args, here)
        real = {**real, "pool3": found.get("pool3")} if real else found     # published statistics go first
    if batches is not None:
        fake = collect(network, batches, here, ["pool3"] * with_pr + ["logits"] * (not args.features))
    if here.rank == 0:
        samples["n"], reference["n"] = fake.get("n"), real.get("n")
        how = dict(samples=samples, reference=reference, network=made_by)
        report(compare(fake, real, made_by, here.device), how, args.json)
    here.close()


def agreed(network, files):
    """What network all numbers are of, before any is computed. ValueError where a file's statistics are of another."""
    for name, statistics in files.items():
        theirs = json.loads(str(statistics.get("made", "{}")))
        network = network or {key: theirs[key] for key in ("network", "weights", "resize") if key in theirs}
        if theirs and any(theirs.get(key) != value for key, value in network.items()):
            raise ValueError(f"{name}: statistics of {theirs}, not of {network}")
        if network.get("network") == "Inception" and statistics and statistics["mu"].shape != (2048,):
            raise ValueError(f"{name}: mu has shape {statistics['mu'].shape}; Inception's has 2048 numbers")
    return network


def compare(fake, real, network, device):
    """The statistics of both sides -> {name of a number: its value}, of whatever they allow."""
    name = network.get("network", "Inception")
    name = "FID" if name == "Inception" else f"Frechet distance on {name}"
    numbers = {name: frechet_distance(fake["mu"], fake["sigma"], real["mu"], real["sigma"])}
    if "mu_s" in fake and "mu_s" in real:
        numbers["sFID"] = frechet_distance(fake["mu_s"], fake["sigma_s"], real["mu_s"], real["sigma_s"])
    if "logits" in fake:
        numbers["IS"], numbers["IS deviation"] = inception_score(fake["logits"], min(10, fake["n"]))
    if "pool3" in fake:
        vectors = [torch.from_numpy(side["pool3"]).to(device) for side in (real, fake)]
        numbers["precision"], numbers["recall"] = precision_recall(*vectors)
    return numbers


def report(numbers, how, as_json):
    """Print the numbers and how both sides were made, {side: {fact: value or None}}; and warn where they mislead."""
    how = {side: {key: value for key, value in facts.items() if value is not None} for side, facts in how.items()}
    samples, reference, network = how.values()
    warnings = [f"{facts['n']} {side}: under 2048 images the covariance has no full rank, and the distance is too large"
                for side, facts in how.items() if facts.get("n", math.inf) < 2048]
    if "FID" in numbers and network.get("weights", RELEASED) != RELEASED:
        warnings.append("these are not the released weights of Inception: no published FID compares with this")
    if "size" in samples and "size" in reference and samples["size"] != reference["size"]:
        warnings.append(f"samples of {samples['size']} pixels against {reference['size']}: files are scaled by --size")
    for warning in warnings:
        print(f"fid.py: warning: {warning}", file=sys.stderr)
    if as_json:
        return print(json.dumps({**numbers, **how}))
    for name, value in numbers.items():
        print(f"{name:<12} {value:#.6g}")
    for side, facts in how.items():
        print(f"{side:<12} {', '.join(f'{key} {value}' for key, value in facts.items())}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:      # bad input: one line that says what and where, not a stack trace
        sys.exit(f"fid.py: {error}")
    except KeyboardInterrupt:
        sys.exit("fid.py: interrupted")
