"""U-ViT: a Vision Transformer with long skip connections, as a diffusion backbone.

    Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023, arXiv:2209.12152

Everything is a token: the time, the condition (a class label or text features) and the image patches form one
sequence. The first half of the blocks store their outputs. The second half receive them, last in, first out, as in a
U-Net, so that low-level detail has a short path to the output:

    x, t, y -> [label, t, text, patches] + positions
                  in_block 0 ------------------------.
                     in_block 1 ----------------.    |      depth / 2 in-blocks
                        mid_block               |    |
                     out_block 0  <- Linear(concat)  |      depth / 2 out-blocks
                  out_block 1  <------- Linear(concat)
            LayerNorm, Linear, unpatchify, 3x3 convolution -> noise, shaped like x

    model = MODELS["uvit_s2"](image_size=32, in_channels=3)     # CIFAR10: 44.26 M parameters, 12.2 GMACs per image
    noise = model(x, t)                                         # x (N, 3, 32, 32), t (N,): 999 times the time in [0, 1]

This file imports only torch and can be copied into another project. The parameters have the names of the released
checkpoints, which load with strict=True. test_all.py compares outputs with the released code's (relative error < 1e-5).
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


def unpatchify(tokens, grid, patch_size):
    """Lay patches back into an image: (N, H' * W', p * p * C) -> (N, C, H' * p, W' * p), grid = (H', W').

    Within a token the numbers are ordered (row, column, channel); tokens are in row-major order.
    """
    (h, w), p = grid, patch_size
    x = tokens.unflatten(1, (h, w)).unflatten(3, (p, p, -1))                # (N, H', W', p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)          # (N, C, H' p, W' p)


class PatchEmbed(nn.Module):
    """Cut an image into p x p patches and map each to D numbers: (N, C, H, W) -> (N, H/p * W/p, D), row-major."""

    def __init__(self, patch_size, in_channels, width):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, (N, L, D) -> (N, L, D): softmax(q k^T / sqrt(D / H)) v for each of H heads.

    The fused kernel never stores the L x L matrix. It computes in the type that autocast gave q, k and v.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)                  # rows ordered (q k v, head, channel)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)    # each (N, H, L, D / H)
        x = F.scaled_dot_product_attention(q, k, v)                         # (N, H, L, D / H)
        return self.proj(x.transpose(1, 2).flatten(2))                      # (N, L, D)


class MLP(nn.Module):
    """Two Linear layers with an exact GELU between them, applied to each token: (N, L, D) -> (N, L, D)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def modulate(x, shift, scale):
    """Apply adaLN's shift and scale, (N, 1, D), to a normalised x (N, L, D): (1 + scale) x + shift, in one pass.

    Under autocast the norm answers in float32, and rounding it first halves what the backward pass keeps of it.
    """
    return torch.addcmul(shift, x.to(shift.dtype), 1 + scale)


class Block(nn.Module):
    """One pre-norm Transformer block, x (N, L, D), time (N, D) -> (N, L, D).

    skip    how an out-block joins a long skip (N, L, D) with x: "concat" (a Linear layer of the concatenation, the
            paper's best) or "add"; "none" for a block without a long skip
    time    "token": the norms have learned scales and shifts; "adaln": a Linear layer computes them from the time
    """

    def __init__(self, width, heads, mlp_ratio, time, skip="none"):
        super().__init__()
        self.skip = skip
        affine = time == "token"
        self.norm1 = nn.LayerNorm(width, elementwise_affine=affine)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=affine)
        self.mlp = MLP(width, int(mlp_ratio * width))
        self.skip_linear = nn.Linear(2 * width, width) if skip == "concat" else None
        self.modulation = None if affine else nn.Linear(width, 4 * width)

    def forward(self, x, time, skip=None):
        if self.skip == "concat":
            # Under autocast, x is bfloat16 after the first out-block. Then a float32 skip would make the concatenation
            # float32, twice as large, and the Linear layer would round it to the same numbers.
            x = self.skip_linear(torch.cat([x, skip.to(x.dtype)], dim=-1))
        elif self.skip == "add":
            x = x + skip
        if self.modulation is None:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        scale1, shift1, scale2, shift2 = self.modulation(time)[:, None].chunk(4, dim=-1)    # each (N, 1, D)
        x = x + self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2))


class UViT(nn.Module):
    """The U-ViT network. It predicts the noise in x_t, or another target of the same shape.

    image_size    int, or (height, width), in pixels or latent cells; each a multiple of patch_size
    in_channels   C, the channels of the input and of the noise
    patch_size    p; there are H/p * W/p image tokens
    width         D, the length of a token
    depth         number of in-blocks plus out-blocks, even; there is one mid block more
    heads         number of attention heads; D must be a multiple of it
    mlp_ratio     hidden width of the MLPs, divided by D
    num_classes   0: no labels. Otherwise y is (N,) int64 in [0, num_classes), and becomes one token
    null_class    add a row, index num_classes, to the label table: the null label of classifier-free guidance
    text_dim      0: no text. Otherwise y is (N, text_tokens, text_dim) features, and becomes text_tokens tokens
    conv          end with a 3x3 convolution over the image, which removes seams between patches
    skip          "concat", "add" or "none": the long skips (table 1 of the paper)
    time          "token" or "adaln": how the network receives the time. The paper's plain ViT baseline, GenViT, is
                  skip="none", conv=False, time="adaln"
    checkpoint    k: the backward pass recomputes the activations of every k-th block (True: all): less memory, slower

    Raises ValueError if the arguments do not fit together.
    """

    def __init__(self, image_size=32, in_channels=3, patch_size=2, width=512, depth=12, heads=8, mlp_ratio=4.0,
                 num_classes=0, null_class=True, text_dim=0, text_tokens=77, conv=True, skip="concat", time="token",
                 checkpoint=False):
        super().__init__()
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        for wrong, message in [
            (any(side < 1 or side % patch_size for side in self.image_size),
             f"image_size {self.image_size} is not a multiple of patch_size {patch_size}"),
            (width % heads or width % 2, f"width {width} is not a multiple of heads {heads} (and of 2)"),
            (depth % 2, f"depth {depth} is odd: it counts as many in-blocks as out-blocks"),
            (num_classes and text_dim,
             f"num_classes {num_classes} and text_dim {text_dim}: a model takes labels or text"),
            (skip not in ("concat", "add", "none"), f"skip {skip!r} is none of 'concat', 'add', 'none'"),
            (time not in ("token", "adaln"), f"time {time!r} is none of 'token', 'adaln'"),
        ]:
            if wrong:
                raise ValueError(f"UViT: {message}")
        self.in_channels, self.patch_size, self.width = in_channels, patch_size, width
        self.label_rows = num_classes + null_class if num_classes else 0
        self.text_shape = (text_tokens, text_dim) if text_dim else None
        self.grid = tuple(side // patch_size for side in self.image_size)
        self.time = time
        self.extras = (time == "token") + bool(num_classes) + (text_tokens if text_dim else 0)

        self.patch_embed = PatchEmbed(patch_size, in_channels, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + math.prod(self.grid), width))
        self.label_emb = nn.Embedding(self.label_rows, width) if num_classes else None
        self.context_embed = nn.Linear(text_dim, width) if text_dim else None

        block = partial(Block, width, heads, mlp_ratio, time)
        self.in_blocks = nn.ModuleList(block() for _ in range(depth // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(skip=skip) for _ in range(depth // 2))
        for i, block in enumerate([*self.in_blocks, self.mid_block, *self.out_blocks]):
            block.recomputed = checkpoint > 0 and i % checkpoint == 0

        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, patch_size**2 * in_channels)
        self.final_layer = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1) if conv else nn.Identity()
        self.initialise()

    def initialise(self):
        """Truncated normal (0.02) for positions and Linear weights, zero Linear biases; PyTorch's default elsewhere."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x, t, y=None):
        """x (N, C, H, W), t (N,) in network units, y None | (N,) int64 | (N, T, F) float -> (N, C, H, W)."""
        self.check(x, t, y)
        time = timestep_embedding(t, self.width).to(x.dtype)                # (N, D)
        tokens = []
        if self.label_rows:
            tokens.append(self.label_emb(y)[:, None])                       # (N, 1, D)
        if self.time == "token":
            tokens.append(time[:, None])                                    # (N, 1, D)
        if self.text_shape:
            tokens.append(self.context_embed(y))                            # (N, T, D)
        tokens.append(self.patch_embed(x))                                  # (N, H/p * W/p, D)
        x = torch.cat(tokens, dim=1) + self.pos_embed                       # (N, L, D)

        skips = []
        for block in self.in_blocks:
            x = self.run(block, x, time)                                    # (N, L, D)
            skips.append(x)
        x = self.run(self.mid_block, x, time)
        for block in self.out_blocks:
            x = self.run(block, x, time, skips.pop())

        x = self.decoder_pred(self.norm(x))                                 # (N, L, p * p * C)
        x = unpatchify(x[:, self.extras:], self.grid, self.patch_size)
        return self.final_layer(x)                                          # (N, C, H, W)

    def run(self, block, *inputs):
        """Return block(*inputs). A block with gradient checkpointing runs again in the backward pass."""
        if block.recomputed:
            return recompute(block, *inputs, use_reentrant=False, preserve_rng_state=False)    # no random numbers
        return block(*inputs)

    def check(self, x, t, y):
        """Raise ValueError, in one line, if the model was not built for these inputs."""
        n, expected = x.shape[0], (self.in_channels, *self.image_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"UViT: x has shape {tuple(x.shape)}, expected (N, {', '.join(map(str, expected))})")
        if tuple(t.shape) != (n,):
            raise ValueError(f"UViT: t has shape {tuple(t.shape)}, expected ({n},): one time for each image")
        if self.label_rows and (y is None or tuple(y.shape) != (n,) or y.is_floating_point()):
            raise ValueError(f"UViT: y must be ({n},) integer labels in [0, {self.label_rows}), got {describe(y)}")
        if self.text_shape and (y is None or tuple(y.shape) != (n, *self.text_shape)):
            raise ValueError(f"UViT: y must be {(n, *self.text_shape)} text features, got {describe(y)}")
        if y is not None and not self.label_rows and not self.text_shape:
            raise ValueError(f"UViT: the model is unconditional (num_classes=0, text_dim=0), but y is {describe(y)}")


def describe(y):
    return "none" if y is None else f"shape {tuple(y.shape)} of {y.dtype}"


def preset(**size):
    """A function that builds a UViT of this size, with overrides. An argument unknown to UViT raises TypeError."""
    return lambda **overrides: UViT(**{**size, **overrides})


# Table 2 of the paper, with the released code's settings: name -> function(**overrides) -> UViT.
# Right: M parameters, GMACs per image (and the data set that both belong to).
MODELS = {
    "uvit_tiny": preset(patch_size=4, width=160, depth=4, heads=4),                 # learns "shapes" on a laptop CPU
    "uvit_s2": preset(patch_size=2, width=512, depth=12, heads=8),                  # 44.26 M, 12.20 (CIFAR10)
    "uvit_s2_deep": preset(patch_size=2, width=512, depth=16, heads=8),             # 58.35 M, 21.24 (MS-COCO 256)
    "uvit_s4": preset(patch_size=4, width=512, depth=12, heads=8),                  # 44.29 M, 12.21 (CelebA 64)
    "uvit_m4": preset(patch_size=4, width=768, depth=16, heads=12),                 # 130.94 M, 35.24 (ImageNet 64)
    "uvit_l2": preset(patch_size=2, width=1024, depth=20, heads=16),                # 286.76 M, 76.46 (ImageNet 256)
    "uvit_l4": preset(patch_size=4, width=1024, depth=20, heads=16),                # 286.83 M, 76.47 (ImageNet 64)
    "uvit_h2": preset(patch_size=2, width=1152, depth=28, heads=16, conv=False),    # 500.83 M, 133.20 (ImageNet 256)
    "uvit_h4": preset(patch_size=4, width=1152, depth=28, heads=16, conv=False),    # 500.94 M, 133.23 (ImageNet 512)
}
