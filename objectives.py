"""What a network learns: to denoise images, to complete them, or to name them. train.py asks one of three objectives:

    draw(n, shape, where)       what is random in a batch of n images: tensors of n rows each, from where's generator
    loss(model, x, y, *draws)   of each image, (N,); x (N, C, H, W) in [-1, 1]
    viewer(device, autocast)    what --sample-every shows: a function model -> (uint8 images, rows, {name: number})

A schedule of diffusion.py gives the first its loss, FCMAE the second; the third is cross-entropy.
"""
import contextlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2

import data
import diffusion
import encode
import recipes


class Diffusion:
    """Learn to tell images from noise, by a schedule of diffusion.py; some labels are hidden. Shows samples.

    null stands for a hidden label or text (see train.py's `settle`).
    """

    def __init__(self, config, dataset, model, null):
        self.config, self.dataset, self.null = config, dataset, null
        self.schedule = recipes.schedule_of(vars(config))

    def draw(self, n, shape, where):
        t = self.schedule.training_time(torch.rand(n, **where, dtype=torch.float64))
        return t, torch.randn(n, *shape, **where), torch.rand(n, **where) < self.config.label_dropout

    def loss(self, model, x, y, t, noise, dropped):
        if self.null is not None:
            y = torch.where(dropped.view(-1, *[1] * (y.ndim - 1)), self.null, y)
        return self.schedule.loss(model, x, y, t, noise)

    def viewer(self, device, autocast):
        """Samples from fixed noise: a row for each class (ten at most) or caption (eight), else 8 x 8."""
        config, dataset, decode = self.config, self.dataset, encode.decoder(self.dataset.encoding, device)
        classes = dataset.num_classes if config.class_cond else 0
        rows = 8 if dataset.text else min(classes, 10)
        conditions = dataset.examples(rows) if dataset.text else torch.arange(rows) * classes // max(rows, 1)
        indices = range(8 * (rows or 8))
        y = conditions.to(device)[torch.arange(len(indices)) % rows] if rows else None
        sampler, steps, clip = preview(config, dataset.encoding is None)

        def show(model):
            with autocast:
                x = diffusion.generate(model, self.schedule, dataset.shape, indices, y, self.null, sampler=sampler,
                                       steps=steps, w=config.cfg, interval=config.cfg_interval, clip=clip,
                                       seed=config.seed, device=device)
            return decode(x), rows, {}

        return show


def preview(config, pixels):
    """(sampler, steps, clip) of a grid, which should cost seconds: the run's own, or others of fewer steps."""
    if config.sample_steps <= 100:
        return config.sampler, config.sample_steps, config.clip_x0
    if config.schedule in ("flow", "gvp"):
        return "heun", 25, config.clip_x0
    own = recipes.OWN       # for own images: shows an early network's colours
    return (own["sampler"], own["sample_steps"], own["clip_x0"]) if pixels else ("dpm_solver", 50, config.clip_x0)


class Autoencoding:
    """Learn to predict the removed patches of images: FCMAE. Shows what is left, what is predicted, and the images."""

    def __init__(self, config, dataset, model, null):
        self.config, self.dataset, self.model, self.augment = config, dataset, model, Augment(config, dataset)

    def draw(self, n, shape, where):
        return self.model.draw_mask(n, **where), *self.augment.draw(n, where)

    def loss(self, model, x, y, mask, *seeds):
        x, _ = self.augment(x, y, *seeds)
        return model(x, mask)[0]

    def viewer(self, device, autocast):
        """Ten held-out images, or where there are none, images of the training set, with fixed masks."""
        dataset = self.dataset
        with contextlib.suppress(ValueError, OSError):
            dataset = held_out(self.config, dataset)
        images, _ = next(mixed(dataset, 10, device))
        x = self.augment.plain(images)
        where = dict(generator=torch.Generator(device).manual_seed(self.config.seed), device=device)
        mask = self.model.draw_mask(len(x), **where)
        left = images.masked_fill(F.interpolate(mask.unflatten(1, (1, *self.model.grid)), x.shape[2:]).bool(), 128)

        @torch.no_grad()
        def show(model):
            with autocast:
                _, prediction = model(x, mask)
            predicted = self.augment.inverse(model.reconstruct(x, mask, prediction.float()))    # in [0, 1]
            columns = torch.stack([left, data.to_uint8(2 * predicted - 1), images], dim=1)
            return columns.flatten(0, 1), 3, {}

        return show


class Classification:
    """Learn to name the class. Shows the accuracy on held-out images, and in each row, images that are named alike."""

    def __init__(self, config, dataset, model, null):
        self.config, self.dataset, self.augment = config, dataset, Augment(config, dataset)

    def draw(self, n, shape, where):
        return self.augment.draw(n, where)

    def loss(self, model, x, y, *seeds):
        x, y = self.augment(x, y, *seeds)
        return F.cross_entropy(model(x).float(), y, reduction="none", label_smoothing=self.config.smoothing)

    def viewer(self, device, autocast):
        """All held-out images count. Eight of them are in each row, one row for each class (ten at most)."""
        dataset, classes = held_out(self.config, self.dataset), self.dataset.num_classes
        shown = [i * classes // min(classes, 10) for i in range(min(classes, 10))]
        white = torch.full((8, *dataset.shape), 255, dtype=torch.uint8)

        @torch.no_grad()
        def show(model):
            right, rows = 0, {label: white for label in shown}
            for images, y in mixed(dataset, 128, device, self.config.workers):
                with autocast:
                    named = model(self.augment.plain(images)).argmax(dim=1)
                right += (named == y).sum().item()
                rows = {label: torch.cat([images[named == label].cpu(), row])[:8] for label, row in rows.items()}
            return torch.stack([*rows.values()], dim=1).flatten(0, 1), len(rows), {"accuracy": right / len(dataset)}

        return show


def of(family):
    """The objective of a family of networks."""
    return {"fcmae": Autoencoding, "convnextv2": Classification}.get(family, Diffusion)


def held_out(config, dataset):
    """The held-out images beside the data set of training. Raises ValueError where there are none, or other classes."""
    held = data.load(config.data, config.data_dir, config.image_size, split="test")
    if held.class_names != dataset.class_names:
        raise ValueError(f"{config.data}: the held-out images have other classes than those to train on")
    return held


def mixed(dataset, n, device, workers=0):
    """All images, in an order that mixes the classes and never changes, n at a time, as from `Images.batches`."""
    order = data.shuffled(len(dataset), 0, 0, len(dataset))
    return dataset.batches(np.array_split(order, math.ceil(len(order) / n)), device, workers)


class Augment:
    """Images by ImageNet's mean and deviation, as the networks of convnext.py take them, after random changes.

    torchvision makes the changes, as config says: --crop, --rand-augment and --erasing of each image, then --mixup or
    --cutmix of the batch. The paper also varies the magnitude of RandAugment, which torchvision does not.
    """

    def __init__(self, config, dataset):
        if dataset.encoding:
            raise ValueError(f"{config.model} learns images, and {config.data} holds latents")
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.plain = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])   # of uint8 images
        self.inverse = v2.Normalize([-m / s for m, s in zip(mean, std)], [1 / s for s in std])      # to [0, 1]
        grey, bicubic = [round(255 * m) for m in mean], InterpolationMode.BICUBIC
        self.changes = v2.Compose(      # of 11 magnitudes, number 10 is the largest
            [v2.RandomResizedCrop(dataset.shape[1:], (config.crop, 1), interpolation=bicubic)] * (config.crop < 1)
            + [v2.RandAugment(2, config.rand_augment, 11, fill=grey)] * bool(config.rand_augment)
            + [self.plain, v2.RandomErasing(config.erasing or 0.0, value="random")])
        self.mix = v2.RandomChoice(
            [kind(alpha=alpha, num_classes=dataset.num_classes)
             for kind, alpha in [(v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)] if alpha] or [lambda *xy: xy])

    def draw(self, n, where):
        """Seeds of the changes: one for each image, (n,), and one for the batch, n times."""
        seeds = torch.randint(2**62, (n + 1,), **where)
        return seeds[:n], seeds[n:].expand(n)

    def __call__(self, x, y, seeds, of_batch):
        """x (N, 3, H, W) in [-1, 1], y (N,) -> x to train on, y (N,), or (N, classes) where images were mixed."""
        # torch.manual_seed also looks for a GPU, and where there is none takes half a millisecond for it
        images, reseed = [], torch.manual_seed if x.is_cuda else torch.default_generator.manual_seed
        with torch.random.fork_rng([x.device] if x.is_cuda else []), torch.autocast(x.device.type, enabled=False):
            for image, seed in zip(data.to_uint8(x), seeds.tolist()):
                reseed(seed)
                images.append(self.changes(image))
            reseed(of_batch[0].item())
            return self.mix(torch.stack(images), y)


