"""ConvNeXt V2, a convolutional network for images, and FCMAE, the masked autoencoder that pre-trains it.

    Woo et al., "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders", CVPR 2023, arXiv:2301.00808

    encoder     x -> conv 4x4, LayerNorm -> blocks -> LayerNorm, conv 2x2 -> blocks -> ... four stages
    block       x <- x + Linear(GRN(GELU(Linear(LayerNorm(depthwise conv 7x7(x))))))
    classifier  x -> encoder -> mean over the cells -> LayerNorm -> Linear -> logits
    FCMAE       x, mask -> encoder of the visible patches -> conv 1x1, mask token at removed patches -> block
                -> conv 1x1 -> pixels of the removed patches

FCMAE removes 60 % of the patches of an image. The encoder sees the others, and a decoder of one block predicts the
pixels of the removed ones. ConvNeXt V1 learned badly in this way: many of its channels became alike. GRN, a layer of
three lines, makes the channels compete: it multiplies each by its own norm over the mean norm of all channels.

    model = MODELS["convnextv2_atto"](image_size=224, num_classes=1000)     # 3.71 M parameters, 0.547 GMACs an image
    logits = model(x)                                       # x (N, 3, 224, 224), by ImageNet's mean and deviation
    model = MODELS["fcmae_atto"](image_size=224)            # 7.26 M parameters, 49 patches, of which 19 stay
    loss, prediction = model(x)                             # (N,), (N, 49, 3072); draws the patches to remove
    classifier.load_state_dict(dense(model.state_dict()), strict=False)     # norm and head stay new: fine-tune

The paper's encoder is a sparse convolution: it visits visible cells alone and leaves out their removed neighbours. This
file computes the same with a dense convolution over a map that is zero at the removed cells: a neighbour of zero adds
nothing to the sum, and the sums at removed cells are not used. Every other layer of a block acts on each cell alone,
so it runs on the visible cells only, and GRN's norms are over those. A step of pre-training takes 1.74 s so, and
2.77 s if every layer runs on all cells (one CPU core, fcmae_atto, 16 images of 128 x 128, the best of five).

A mask is needed wherever a bias would fill the removed cells: after the stem's LayerNorm and after each down-sampling.
None is needed inside a block, whose result is added to visible cells alone. No kernel of the stem or of a down-sampling
sees visible and removed cells together, because a patch is one cell of the last stage. In the decoder no cell is
removed any more: a learned token takes the place of each.

This file imports only torch and can be copied into another project. test_all.py compares outputs, losses and recipes
with the released code's (error < 1e-5).
"""
import math
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute


def patchify(x, patch_size):
    """Cut images into p x p patches: (N, C, H, W) -> (N, H/p * W/p, p * p * C), row by row.

    Within a patch the numbers are ordered (row, column, channel).
    """
    p = patch_size
    x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))                       # (N, C, H/p, p, W/p, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches, grid, patch_size):
    """Lay patches back into an image: (N, H' * W', p * p * C) -> (N, C, H' * p, W' * p), grid = (H', W')."""
    (h, w), p = grid, patch_size
    x = patches.unflatten(1, (h, w)).unflatten(3, (p, p, -1))               # (N, H', W', p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)          # (N, C, H' p, W' p)


class GRN(nn.Module):
    """Global response normalisation, (N, L, C) -> (N, L, C), with gamma and beta that start at zero:

    y = gamma * x * n + beta + x, where n = g / mean(g) and g (N, C) is the L2 norm of each channel over the L cells.

    The paper's formula divides by the sum of g, its algorithm and the released weights by the mean. The norm is over
    each image. The released PyTorch code for pre-training takes it over the whole batch, so that the features of an
    image depend on its batch. The published weights come from JAX code, which takes it over each image.
    """

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))              # the released shape
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)                  # sums of squares overflow float16
        g = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)    # (N, 1, C)
        n = g / (g.mean(dim=-1, keepdim=True) + 1e-6)
        return torch.addcmul(self.beta[0, 0], x, 1 + self.gamma[0, 0] * n)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map, (N, C, h, w) -> (N, C, h, w), which then lies channels last in memory.

    The maps after it do too. A depthwise convolution's backward pass then takes less than half the time on a CPU.
    """

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class StochasticDepth(nn.Module):
    """In training, set an image's x (N, L, D) to zero with probability `rate`, and divide the others by 1 - rate."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.rate
        return x * (kept / (1 - self.rate)).to(x.dtype)


class Block(nn.Module):
    """One ConvNeXt V2 block, (N, D, h, w) -> (N, D, h, w). Without GRN, it is V1's without LayerScale.

    cells (N, K) are the indices, row * w + column, of each image's visible cells. If they are given, x must be zero at
    the other cells, and the result is zero there too. None: all cells are visible.
    """

    def __init__(self, width, grn=True, drop_path=0.0):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, kernel_size=7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.grn = GRN(4 * width) if grn else nn.Identity()
        self.pwconv2 = nn.Linear(4 * width, width)
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x, cells=None):
        y = self.dwconv(x).flatten(2).transpose(1, 2)                       # (N, h w, D)
        whole = y.shape
        if cells is not None:
            cells = cells[..., None].expand(-1, -1, whole[2])
            y = y.gather(1, cells)                                          # (N, K, D)
        y = F.gelu(self.pwconv1(self.norm(y)))                              # (N, K, 4 D), K = h w without cells
        y = self.drop_path(self.pwconv2(self.grn(y)))                       # (N, K, D)
        if cells is not None:
            y = y.new_zeros(whole).scatter(1, cells, y)                     # (N, h w, D)
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


def initialise(network):
    """Truncated normal of deviation 0.02 for every convolution and Linear layer, zero for their biases."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """ConvNeXt V2 without its classifier: images (N, C, H, W) -> the last stage's map (N, D, H/p, W/p).

    image_size   int, or (height, width), in pixels; each a multiple of the patch size p = stem * 2^(stages - 1)
    in_channels  C
    depths       the number of blocks of each stage
    width        channels of the first stage; each further stage has twice as many, so D = width * 2^(stages - 1)
    stem         kernel size and stride of the first convolution; each further stage halves the map's sides.
                 32 x 32 images get 16 patches with three stages and stem=2, or with four stages and stem=1
    grn          False: no GRN (the paper's ablation)
    drop_path    rate of stochastic depth of the last block; it rises linearly over the blocks from 0
    checkpoint   k: the backward pass recomputes the activations of every k-th block (True: all): less memory, slower

    Raises ValueError if the arguments do not fit together.
    """

    def __init__(self, image_size=224, in_channels=3, depths=(3, 3, 9, 3), width=96, stem=4, grn=True, drop_path=0.0,
                 checkpoint=False):
        super().__init__()
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.in_channels, self.patch_size = in_channels, stem * 2**(len(depths) - 1)
        if any(side < 1 or side % self.patch_size for side in self.image_size):
            raise ValueError(f"ConvNeXt: image_size {self.image_size} is not a multiple of the patch size "
                             f"{self.patch_size}, the stem's {stem} times {self.patch_size // stem}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"ConvNeXt: drop_path {drop_path} is not in [0, 1)")
        self.grid = tuple(side // self.patch_size for side in self.image_size)
        self.widths = [width * 2**i for i in range(len(depths))]

        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        for i, d in enumerate(self.widths):
            if i == 0:
                down = nn.Conv2d(in_channels, d, kernel_size=stem, stride=stem), ChannelNorm(d, eps=1e-6)
            else:
                down = ChannelNorm(d // 2, eps=1e-6), nn.Conv2d(d // 2, d, kernel_size=2, stride=2)
            self.downsample_layers.append(nn.Sequential(*down))
            self.stages.append(nn.ModuleList())
            for j in range(sum(depths[:i]), sum(depths[:i + 1])):           # j counts the blocks of all stages
                block = Block(d, grn, drop_path * j / max(sum(depths) - 1, 1))
                block.recomputed = checkpoint > 0 and j % checkpoint == 0
                self.stages[i].append(block)
        initialise(self)

    def encode(self, x, mask=None):
        """x (N, C, H, W) -> (N, D, H/p, W/p). mask (N, L), 1 = removed: removed patches are not seen and give zero."""
        expected = (self.in_channels, *self.image_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"ConvNeXt: x has shape {tuple(x.shape)}, expected (N, {', '.join(map(str, expected))})")
        kept = 0 if mask is None else int((mask[0] == 0).sum())
        for down, blocks in zip(self.downsample_layers, self.stages):
            x, cells = down(x), None                                        # (N, d, h, w)
            if mask is not None:
                removed, cells = self.cells(mask, kept, x.shape[2:])
                x = x.masked_fill(removed, 0)
            for block in blocks:
                x = recompute(block, x, cells, use_reentrant=False) if block.recomputed else block(x, cells)
        return x

    def cells(self, mask, kept, size):
        """For a map of size (h, w): which cells are removed (N, 1, h, w), and the visible ones' indices (N, K)."""
        removed = F.interpolate(mask.float().unflatten(1, (1, *self.grid)), size).bool()    # a patch becomes a square
        visible = kept * size.numel() // math.prod(self.grid)
        return removed, removed.flatten(1).int().argsort(dim=1, stable=True)[:, :visible]   # in order, row by row


class ConvNeXt(Encoder):
    """The classifier: images (N, C, H, W) -> logits (N, num_classes).

    num_classes      at least 1
    head_init_scale  factor of the last Linear layer's first weights; the recipes for fine-tuning have 0.001
    Other arguments are Encoder's.
    """

    def __init__(self, num_classes=1000, head_init_scale=1.0, **arguments):
        super().__init__(**arguments)
        if num_classes < 1:
            raise ValueError(f"ConvNeXt: num_classes is {num_classes}, but a classifier needs labels")
        self.norm = nn.LayerNorm(self.widths[-1], eps=1e-6)
        self.head = nn.Linear(self.widths[-1], num_classes)
        initialise(self.head)
        with torch.no_grad():
            self.head.weight *= head_init_scale

    def features(self, x):
        """x (N, C, H, W) -> (N, D), from which the last layer predicts the class."""
        return self.norm(self.encode(x).mean(dim=(2, 3)))

    def forward(self, x):
        return self.head(self.features(x))


class FCMAE(nn.Module):
    """The masked autoencoder: images (N, C, H, W) -> the loss of each image (N,) and the prediction (N, L, p * p * C).

    mask_ratio     the share of removed patches: int(L (1 - mask_ratio)) of L = H/p * W/p stay
    norm_pix       predict each patch less its own mean, over its own standard deviation; False: predict the pixels
    decoder_width  channels of the decoder
    decoder_depth  blocks of the decoder
    Other arguments are Encoder's.

    All weights start with a standard deviation of 0.02. In the released PyTorch class most start with 1, so that atto's
    first loss on normal noise is 17 instead of 1. The published weights come from JAX code.
    """

    def __init__(self, mask_ratio=0.6, norm_pix=True, decoder_width=512, decoder_depth=1, grn=True, **arguments):
        super().__init__()
        self.encoder = Encoder(grn=grn, **arguments)
        self.grid, self.patch_size = self.encoder.grid, self.encoder.patch_size
        self.norm_pix, self.patches = norm_pix, math.prod(self.grid)
        self.kept = int(self.patches * (1 - mask_ratio))
        if not 0 < self.kept < self.patches:
            raise ValueError(f"FCMAE: mask_ratio {mask_ratio} keeps {self.kept} of {self.patches} patches; "
                             "at least one must stay and one be removed")
        self.mask_token = nn.Parameter(torch.empty(1, decoder_width, 1, 1))
        self.proj = nn.Conv2d(self.encoder.widths[-1], decoder_width, kernel_size=1)
        self.decoder = nn.Sequential(*(Block(decoder_width, grn) for _ in range(decoder_depth)))
        self.pred = nn.Conv2d(decoder_width, self.patch_size**2 * self.encoder.in_channels, kernel_size=1)
        for part in (self.proj, self.decoder, self.pred):
            initialise(part)
        nn.init.normal_(self.mask_token, std=0.02)

    def draw_mask(self, n, device=None, generator=None):
        """Draw which patches of n images to remove -> (n, L), 1 = removed."""
        order = torch.rand(n, self.patches, device=device, generator=generator).argsort(dim=1)
        return torch.ones(n, self.patches, device=device).scatter(1, order[:, :self.kept], 0)

    def encode(self, x, mask):
        """x (N, C, H, W), mask (N, L), 1 = removed -> (N, D, H/p, W/p), zero at the removed patches."""
        self.check(x, mask)
        return self.encoder.encode(x, mask)

    def forward(self, x, mask=None):
        """x (N, C, H, W), mask None | (N, L) -> loss (N,), prediction (N, L, p * p * C). Draws the mask if None."""
        mask = self.draw_mask(len(x), x.device) if mask is None else mask
        y = self.proj(self.encode(x, mask))                                 # (N, decoder_width, H/p, W/p)
        y = torch.where(mask.bool().unflatten(1, (1, *self.grid)), self.mask_token, y)
        y = self.pred(self.decoder(y))                                      # (N, p * p * C, H/p, W/p)
        prediction = y.flatten(2).transpose(1, 2)                           # (N, L, p * p * C)
        return self.loss(x, mask, prediction), prediction

    def loss(self, x, mask, prediction):
        """Squared error, mean over a patch, then mean over an image's removed patches -> (N,)."""
        target, mean, deviation = self.target(x)
        errors = (prediction - (target - mean) / deviation).square().mean(dim=2)    # (N, L)
        return (errors * mask).sum(dim=1) / mask.sum(dim=1)

    def target(self, x):
        """The patches of x (N, L, p * p * C), and their mean and deviation (N, L, 1) or, without norm_pix, 0 and 1."""
        patches = patchify(x, self.patch_size)
        if not self.norm_pix:
            return patches, 0.0, 1.0
        variance, mean = torch.var_mean(patches, dim=2, keepdim=True)       # unbiased
        return patches, mean, (variance + 1e-6).sqrt()

    def reconstruct(self, x, mask, prediction):
        """The visible patches of x and the predicted others -> an image (N, C, H, W), to look at.

        With norm_pix the network predicts no mean and no deviation of a patch, so those of x are used.
        """
        patches, mean, deviation = self.target(x)
        patches = torch.where(mask.bool()[..., None], prediction * deviation + mean, patches)
        return unpatchify(patches, self.grid, self.patch_size)

    def check(self, x, mask):
        """Raise ValueError, in one line, if the mask does not fit."""
        if tuple(mask.shape) != (len(x), self.patches):
            raise ValueError(f"FCMAE: mask has shape {tuple(mask.shape)}, expected ({len(x)}, {self.patches}): "
                             "one number for each patch")
        least, most = mask.bool().sum(dim=1).aminmax()
        if least < 1 or most >= self.patches or least < most:
            raise ValueError(f"FCMAE: a mask removes {int(least)} to {int(most)} of {self.patches} patches; it must "
                             "remove some, not all, and as many of every image")


def dense(state):
    """A pre-training checkpoint -> the names and shapes of the classifier, without `norm` and `head`.

    Takes the state dicts of FCMAE here, of the released sparse FCMAE class, and of the released *_fcmae.pt files (an
    encoder alone). The kernel of a sparse convolution is (k * k, in, out), its index column * k + row.
    """
    out = {}
    for name, p in state.items():
        if name.startswith(("mask_token", "proj.", "decoder.", "pred.")):
            continue
        name = name.removeprefix("encoder.").replace(".ln.", ".").replace(".linear.", ".")
        if name.endswith(".kernel"):                                        # depthwise ones are (k * k, channels)
            k, name = math.isqrt(len(p)), name.removesuffix("kernel") + "weight"
            p = p.reshape(k, k, -1, p.shape[-1]).permute(3, 2, 1, 0).contiguous()
        elif name.endswith(".bias"):
            p = p.flatten()
        elif name.endswith((".gamma", ".beta")):
            p = p.reshape(1, 1, 1, -1)
        out[name] = p
    return out


def rates(net, decay, kind="single"):
    """Factors of the learning rate for fine-tuning a ConvNeXt: {parameter: decay^(number of layers after it)}.

    kind "single": each block is a layer. "group" (the paper's base and large): three successive blocks of a stage are
    one. A down-sampling layer is part of the layer after it, but with "group" the stem is a layer of its own. `norm`
    and `head` are the last layer, with factor 1. Raises ValueError if kind is another word.
    """
    if kind not in ("single", "group"):
        raise ValueError(f"ConvNeXt: kind {kind!r} of the rates is none of 'single', 'group'")
    blocks, layers, last = {"single": 1, "group": 3}[kind], {}, 0
    for i, stage in enumerate(net.stages):
        first = last + 1
        layers[f"downsample_layers.{i}"] = 0 if i == 0 and kind == "group" else first
        for j in range(len(stage)):
            last = first + j // blocks
            layers[f"stages.{i}.{j}"] = last
    factors = {}
    for name, _ in net.named_parameters():
        prefix = re.match(r"downsample_layers\.\d+|stages\.\d+\.\d+|", name)[0]
        factors[name] = decay ** (last + 1 - layers.get(prefix, last + 1))
    return factors


def decayed(net):
    """The names of the parameters that the recipes' weight decay shrinks: of two dimensions or more.

    Pre-training also shrinks gamma and beta of GRN and the mask token, as released. Fine-tuning spares gamma and beta.
    """
    spared = () if isinstance(net, FCMAE) else (".gamma", ".beta")
    return {name for name, p in net.named_parameters() if p.ndim > 1 and not name.endswith(spared)}


def preset(network, **size):
    """A function that builds a network of this size, with overrides. An unknown argument raises TypeError."""
    return lambda **overrides: network(**{**size, **overrides})


# The paper's sizes. Right: M parameters with 1000 classes, GMACs at 224 x 224; M parameters of FCMAE.
SIZES = {
    "atto": dict(depths=(2, 2, 6, 2), width=40),                            # 3.71 M, 0.547 GMACs; 7.26 M
    "femto": dict(depths=(2, 2, 6, 2), width=48),                           # 5.23 M, 0.780; 8.75 M
    "pico": dict(depths=(2, 2, 6, 2), width=64),                            # 9.07 M, 1.367; 12.52 M
    "nano": dict(depths=(2, 2, 8, 2), width=80),                            # 15.62 M, 2.446; 19.02 M
    "tiny": dict(depths=(3, 3, 9, 3), width=96),                            # 28.64 M, 4.456; 31.97 M
    "base": dict(depths=(3, 3, 27, 3), width=128),                          # 88.72 M, 15.355; 91.92 M
    "large": dict(depths=(3, 3, 27, 3), width=192),                         # 197.96 M, 34.361; 200.91 M
    "huge": dict(depths=(3, 3, 27, 3), width=352),                          # 660.29 M, 114.922; 662.62 M
}
MINI = dict(image_size=32, depths=(2, 2, 4), width=32, stem=2)              # for a CPU: 16 patches of 8 x 8 pixels
MODELS = {
    "convnextv2_mini": preset(ConvNeXt, **MINI, num_classes=10),
    "fcmae_mini": preset(FCMAE, **MINI, decoder_width=128),
    **{f"convnextv2_{name}": preset(ConvNeXt, **size) for name, size in SIZES.items()},
    **{f"fcmae_{name}": preset(FCMAE, **size) for name, size in SIZES.items()},
}
