"""U-Net: the convolutional diffusion backbone, to which the papers of this project compare their transformers.

    Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020, arXiv:2006.11239
    Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (IDDPM), ICML 2021, arXiv:2102.09672
    Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis" (ADM), NeurIPS 2021, arXiv:2105.05233
    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (LDM), CVPR 2022, arXiv:2112.10752

Residual blocks of 3x3 convolutions work on an image whose sides are halved level by level, then doubled again. The stem
and every layer of the encoder store their outputs, and the decoder receives them at the same resolution, last in, first
out. Time and class are added into one vector c, which scales and shifts a norm in every block. At the lower resolutions
the cells of the image also attend to one another, and to the text:

    x -> stem -> encoder ----------------------------> decoder -> norm, SiLU, conv -> noise       H   x W
                   down -> encoder ---------------> decoder -> up                                 H/2 x W/2
                             down -> encoder ---> decoder -> up                                   H/4 x W/4
                                         middle                    t, y -> c = MLP(sinusoids(t)) + table[y]

    model = MODELS["unet_cifar"](image_size=32, in_channels=3)  # CIFAR10: 52.53 M parameters, 8.4 GMACs per image
    noise = model(x, t)                                         # x (N, 3, 32, 32), t (N,): 0..999 for DDPM

This file imports only torch and can be copied into another project. It was written from the papers, without dropout.
test_all.py compares its counts with the published ones. No released checkpoint loads: the parameters' names differ.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute


def timestep_embedding(t, width):
    """Sinusoidal embedding of time: t (N,) -> (N, width), float32.

    [cos(t f_i), sin(t f_i)] with f_i = 10000^(-i / (width / 2)) ("Attention is All You Need", section 3.5).
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000.0) / half))
    angles = t.float()[:, None] * frequencies                               # (N, width / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def conv3(width, out, stride=1):
    return nn.Conv2d(width, out, kernel_size=3, stride=stride, padding=1)


def zero(layer):
    """Set the layer's weights to zero and return it. It ends a branch, which then adds nothing in a new network."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(width):
    """GroupNorm with 32 groups, or with groups of four channels if width (a multiple of 32) is below 128."""
    return nn.GroupNorm(min(32, width // 4), width)


def to_tokens(x):
    """Make each cell a token, in row-major order: (N, C, H, W) -> (N, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


class ResBlock(nn.Module):
    """Two convolutions, between which c brings in time and class; x (N, C, H, W), c (N, E) -> (N, D, H, W):

        h = conv1(resample(SiLU(norm1(x))))
        x <- shortcut(resample(x)) + conv2(SiLU((1 + scale) norm2(h) + shift)),     (scale, shift) = Linear(SiLU(c))

    shortcut is a 1x1 convolution if D is not C, else the identity. resample: "down" averages 2x2 cells, "up" repeats
    cells, None keeps H and W. Without scale_shift, Linear(SiLU(c)) is added to h before norm2 (Ho et al., LDM).
    """

    def __init__(self, width, out, embed, scale_shift=True, resample=None):
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = {"down": nn.AvgPool2d(2), "up": nn.Upsample(scale_factor=2), None: nn.Identity()}[resample]
        self.norm1, self.conv1 = group_norm(width), conv3(width, out)
        self.condition = nn.Linear(embed, 2 * out if scale_shift else out)
        self.norm2, self.conv2 = group_norm(out), zero(conv3(out, out))
        self.shortcut = nn.Conv2d(width, out, kernel_size=1) if out != width else nn.Identity()

    def forward(self, x, c):
        h = self.conv1(self.resample(F.silu(self.norm1(x))))                # (N, D, H, W)
        condition = self.condition(F.silu(c))[:, :, None, None]             # (N, 2D or D, 1, 1)
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = (1 + scale) * self.norm2(h) + shift
        else:
            h = self.norm2(h + condition)
        return self.shortcut(self.resample(x)) + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Multi-head attention of tokens x (N, L, D) to a context (N, T, F), or to themselves -> (N, L, D).

    softmax(q k^T / sqrt(D / H)) v for each of H heads. q, k and v have no biases, as in LDM. The fused kernel never
    stores the L x T matrix.
    """

    def __init__(self, width, heads, context=None):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(context or width, 2 * width, bias=False)        # rows ordered (k v, head, channel)
        self.proj = nn.Linear(width, width)

    def forward(self, x, context=None):
        q, k, v = self.q(x), *self.kv(x if context is None else context).chunk(2, dim=-1)
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))    # each (N, H, L or T, D / H)
        x = F.scaled_dot_product_attention(q, k, v)                         # (N, H, L, D / H)
        return self.proj(x.transpose(1, 2).flatten(2))                      # (N, L, D)


class AttentionBlock(nn.Module):
    """x <- x + attention(norm(x)), x (N, C, H, W): every cell attends to all cells, without text (IDDPM, ADM)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm = group_norm(width)
        self.attn = Attention(width, heads)
        zero(self.attn.proj)

    def forward(self, x, text):
        h = self.attn(to_tokens(self.norm(x)))                              # (N, H * W, C)
        return x + h.transpose(1, 2).view_as(x)


class TransformerBlock(nn.Module):
    """Cells attend to all cells, then to the text, then pass through an MLP; x (N, C, H, W), text (N, T, F) (LDM).

        z = Linear(norm(x))
        z <- z + attention(norm1(z));    z <- z + attention(norm2(z), text);    z <- z + MLP(norm3(z))
        x <- x + Linear(z)

    The MLP is a GEGLU: Linear(a * GELU(b)) with (a, b) = Linear(z). a and b are four times as wide as z.
    """

    def __init__(self, width, heads, text_dim):
        super().__init__()
        self.norm, self.proj_in = group_norm(width), nn.Linear(width, width)
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.cross_attn = nn.LayerNorm(width), Attention(width, heads, text_dim)
        self.norm3, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 8 * width), nn.Linear(4 * width, width)
        self.proj_out = zero(nn.Linear(width, width))

    def forward(self, x, text):
        z = self.proj_in(to_tokens(self.norm(x)))                           # (N, H * W, C)
        z = z + self.attn(self.norm1(z))
        z = z + self.cross_attn(self.norm2(z), text)
        a, b = self.fc1(self.norm3(z)).chunk(2, dim=-1)                     # each (N, H * W, 4C)
        z = z + self.fc2(a * F.gelu(b))
        return x + self.proj_out(z).transpose(1, 2).view_as(x)


class Layer(nn.ModuleList):
    """Modules in sequence. Residual blocks also receive c (N, E), attention receives text (N, T, F) or None.

    A skip (N, C', H, W), if given, is first concatenated to x (N, C, H, W) as C' more channels.
    """

    def forward(self, x, c, text, skip=None):
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        for module in self:
            if isinstance(module, ResBlock):
                x = module(x, c)
            elif isinstance(module, (AttentionBlock, TransformerBlock)):
                x = module(x, text)
            else:
                x = module(x)
        return x


class UNet(nn.Module):
    """The U-Net. It predicts the noise in x_t and, with learn_sigma, the variance of a denoising step.

    image_size    int, or (height, width), in pixels or latent cells; each a multiple of 2^(levels - 1)
    in_channels   C, the channels of the input and of the noise
    channels      D, a multiple of 32; the time has D sinusoids, c has shape (N, 4D)
    multipliers   width of each level, divided by D; the stem is as wide as the first level
    blocks        residual blocks per level of the encoder; the decoder has one more, so that each skip enters a block
    attention     levels with attention, by down-sampling factor: (2, 4) are H/2 and H/4; the middle always has it
    head_channels channels of an attention head; the width of every level with attention must be a multiple of it
    resample      between levels: "conv", a strided convolution down, nearest neighbour and a convolution up (IDDPM,
                  LDM); "block", a residual block that averages or repeats cells in both of its branches (ADM)
    scale_shift   c scales and shifts the second norm of a residual block (IDDPM, ADM); False: it is added before (LDM)
    num_classes   0: no labels. Otherwise y is (N,) int64 in [0, num_classes)
    null_class    add a row, index num_classes, to the label table: the null label of classifier-free guidance
    text_dim      0: no text. Otherwise y is (N, text_tokens, text_dim) features, for TransformerBlocks
    learn_sigma   add C output channels, v: a step's log variance is u log(beta) + (1 - u) log(beta~), u = (v + 1) / 2
    checkpoint    k: the backward pass recomputes the activations of every k-th layer (True: all): less memory, slower

    Raises ValueError if the arguments do not fit together.
    """

    def __init__(self, image_size=32, in_channels=3, channels=128, multipliers=(1, 2, 2, 2), blocks=3, attention=(2, 4),
                 head_channels=64, resample="conv", scale_shift=True, num_classes=0, null_class=True, text_dim=0,
                 text_tokens=77, learn_sigma=False, checkpoint=False):
        super().__init__()
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        levels = [(2**level, channels * times) for level, times in enumerate(multipliers)]    # (how far down, width)
        lowest = 2 ** (len(levels) - 1)
        attending = {width for down, width in levels if down in (*attention, lowest)}
        for wrong, message in [
            (channels < 32 or channels % 32, f"channels {channels} is not a multiple of 32"),
            (min(multipliers, default=0) < 1, f"multipliers {multipliers} must be one positive number for each level"),
            (any(side < 1 or side % lowest for side in self.image_size),
             f"image_size {self.image_size} is not a multiple of {lowest}, for {len(levels)} levels"),
            (blocks < 1, f"blocks {blocks}: a level needs at least one"),
            (not set(attention) <= {down for down, _ in levels},
             f"attention {attention} is not among the levels {[down for down, _ in levels]}"),
            (any(width % head_channels for width in attending),
             f"head_channels {head_channels} does not divide the widths with attention, {sorted(attending)}"),
            (resample not in ("conv", "block"), f"resample {resample!r} is none of 'conv', 'block'"),
            (num_classes and text_dim,
             f"num_classes {num_classes} and text_dim {text_dim}: a model takes labels or text"),
        ]:
            if wrong:
                raise ValueError(f"UNet: {message}")
        self.in_channels, self.channels = in_channels, channels
        self.label_rows = num_classes + null_class if num_classes else 0
        self.text_shape = (text_tokens, text_dim) if text_dim else None
        embed = 4 * channels
        block = partial(ResBlock, embed=embed, scale_shift=scale_shift)

        def attend(width):
            heads = width // head_channels
            return TransformerBlock(width, heads, text_dim) if text_dim else AttentionBlock(width, heads)

        def parts(down, before, width):
            return [block(before, width)] + ([attend(width)] if down in attention else [])

        def change(way, width):
            if resample == "block":
                return block(width, width, resample=way)
            if way == "down":
                return conv3(width, width, stride=2)
            return nn.Sequential(nn.Upsample(scale_factor=2), conv3(width, width))

        self.time_embed = nn.Sequential(nn.Linear(channels, embed), nn.SiLU(), nn.Linear(embed, embed))
        self.label_emb = nn.Embedding(self.label_rows, embed) if num_classes else None

        skips = [levels[0][1]]                                              # widths of the stored outputs
        self.stem, self.encoder, self.decoder = conv3(in_channels, skips[0]), nn.ModuleList(), nn.ModuleList()
        for down, width in levels:
            if down > 1:
                self.encoder.append(Layer([change("down", skips[-1])]))
                skips.append(skips[-1])
            for _ in range(blocks):
                self.encoder.append(Layer(parts(down, skips[-1], width)))
                skips.append(width)
        self.middle = Layer([block(width, width), attend(width), block(width, width)])
        before = width                                                      # width of the next layer's input
        for down, width in reversed(levels):
            for i in range(blocks + 1):
                up = [change("up", width)] if down > 1 and i == blocks else []
                self.decoder.append(Layer(parts(down, before + skips.pop(), width) + up))
                before = width
        for i, layer in enumerate([*self.encoder, self.middle, *self.decoder]):
            layer.recomputed = checkpoint > 0 and i % checkpoint == 0
        self.norm, self.head = group_norm(width), zero(conv3(width, (1 + learn_sigma) * in_channels))

    def forward(self, x, t, y=None):
        """x (N, C, H, W), t (N,) in network units, y None | (N,) int64 | (N, T, F) float -> (N, C, H, W), or 2C."""
        self.check(x, t, y)
        c = self.time_embed(timestep_embedding(t, self.channels).to(x.dtype))       # (N, 4D)
        if self.label_rows:
            c = c + self.label_emb(y)
        text = y if self.text_shape else None

        x = self.stem(x)                                                    # (N, D, H, W)
        skips = [x]
        for layer in self.encoder:
            x = self.run(layer, x, c, text)                                 # (N, width, H / down, W / down)
            skips.append(x)
        x = self.run(self.middle, x, c, text)
        for layer in self.decoder:
            x = self.run(layer, x, c, text, skips.pop())

        return self.head(F.silu(self.norm(x)))                              # (N, C or 2C, H, W)

    def run(self, layer, *inputs):
        """Return layer(*inputs). A layer with gradient checkpointing runs again in the backward pass."""
        if layer.recomputed:
            return recompute(layer, *inputs, use_reentrant=False, preserve_rng_state=False)    # no random numbers
        return layer(*inputs)

    def check(self, x, t, y):
        """Raise ValueError, in one line, if the model was not built for these inputs."""
        n, expected = x.shape[0], (self.in_channels, *self.image_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"UNet: x has shape {tuple(x.shape)}, expected (N, {', '.join(map(str, expected))})")
        if tuple(t.shape) != (n,):
            raise ValueError(f"UNet: t has shape {tuple(t.shape)}, expected ({n},): one time for each image")
        if self.label_rows and (y is None or tuple(y.shape) != (n,) or y.is_floating_point()):
            raise ValueError(f"UNet: y must be ({n},) integer labels in [0, {self.label_rows}), got {describe(y)}")
        if self.text_shape and (y is None or tuple(y.shape) != (n, *self.text_shape)):
            raise ValueError(f"UNet: y must be {(n, *self.text_shape)} text features, got {describe(y)}")
        if y is not None and not self.label_rows and not self.text_shape:
            raise ValueError(f"UNet: the model is unconditional (num_classes=0, text_dim=0), but y is {describe(y)}")


def describe(y):
    return "none" if y is None else f"shape {tuple(y.shape)} of {y.dtype}"


def preset(**size):
    """A function that builds a UNet of this size, with overrides. An argument unknown to UNet raises TypeError."""
    return lambda **overrides: UNet(**{**size, **overrides})


# Name -> function(**overrides) -> UNet, with M parameters and GMACs per image (in brackets: as published). A paper may
# not say how levels are joined, how wide the stem is or how time enters: these choices give the published counts.
MODELS = {
    # learns data "shapes" on a laptop CPU: 1.2 M
    "unet_tiny": preset(channels=32, multipliers=(1, 2, 2), blocks=1, attention=(4,), head_channels=32),
    # IDDPM on CIFAR10: 52.5 M (53)
    "unet_cifar": preset(channels=128, multipliers=(1, 2, 2, 2), blocks=3, attention=(2, 4)),
    # ADM on latents of ImageNet 256, as in U-ViT's comparison: with 1000 classes 645.9 M (646), 135.4 GMACs (135)
    "unet_adm": preset(in_channels=4, channels=320, multipliers=(2, 2, 4), blocks=3, attention=(2, 4),
                       resample="block"),
    # LDM on latents of MS-COCO, as in U-ViT's comparison: with 77 tokens of 768 features 53.0 M (53)
    "unet_ldm_text": preset(in_channels=4, channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(2, 4),
                            head_channels=32, scale_shift=False, text_dim=768),
}
