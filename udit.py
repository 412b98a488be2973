"""U-DiT: a U-Net of diffusion transformer blocks whose self-attention runs on down-sampled tokens.

    Tian et al., "U-DiTs: Downsample Tokens in U-Shaped Diffusion Transformers", NeurIPS 2024, arXiv:2405.02730

There are no patches: each latent cell (or pixel) is a token. Attention splits the grid of tokens (N, H, W, D) into four
subgrids (even or odd rows, even or odd columns), and each attends to itself alone, at a quarter of the cost:

    x -> 3x3 conv -> encoder_level_1 -----------------> decoder_level_1 -> head -> noise, variance     H   x W
                       encoder_level_2 -----------> decoder_level_2                                    H/2 x W/2
                                        latent                                                         H/4 x W/4

    model = MODELS["udit_s"](image_size=32, num_classes=1000)   # ImageNet 256: 58.90 M parameters
    noise, v = model(x, t, y).chunk(2, dim=1)                   # x (N, 4, 32, 32), t (N,) in 0..999, y (N,) int64
    fast = model.fold()             # the same function for inference: 52.05 M parameters, 6.02 GMACs for one image

This file imports only torch and can be copied into another project. The parameters have the names of the released
checkpoints, which load with strict=True. test_all.py compares outputs with the released code's (relative error < 1e-5).
"""
import copy
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)    # torch 2.6 has only the second


def timestep_embedding(t, width):
    """Sinusoidal embedding of time: t (N,) -> (N, width), float32.

    [cos(t f_i), sin(t f_i)] with f_i = 10000^(-i / (width / 2)) ("Attention is All You Need", section 3.5).
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000.0) / half))
    angles = t.float()[:, None] * frequencies                               # (N, width / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_table(grid, d, step=1):
    """Rotary positions of a grid = (H', W') of cells, each of step x step tokens, in row-major order: (H' * W', d).

    (cosine, sine) of c f_0, r f_0, c f_1, r f_1, ... for column c and row r, with f_i = 10000^(-i / (d / 4)).
    """
    row, column = torch.meshgrid(*(torch.arange(side) * step + (step - 1) / 2 for side in grid), indexing="ij")
    frequencies = 10000.0 ** (-torch.arange(0, d, 4) / d)                   # (d / 4,)
    angles = torch.stack([column, row], dim=-1).flatten(0, 1)[:, None] * frequencies[:, None]   # (H' W', d / 4, 2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)


def rotate(x, table):
    """Multiply each pair of adjacent channels, a + ib, of x (N, heads, L, d) by exp(i angle), from table (L, d)."""
    dtype = torch.promote_types(table.dtype, torch.float32)                 # bfloat16 has no complex numbers
    pairs, turns = x.to(dtype).unflatten(-1, (-1, 2)), table.to(dtype).unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():                                   # the compiler fuses only real numbers
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
    else:
        (a, b), (cosine, sine) = pairs.unbind(-1), turns.unbind(-1)
        turned = torch.stack([a * cosine - b * sine, a * sine + b * cosine], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def modulate(x, shift, scale):
    """Adaptive LayerNorm of x (N, H, W, D): (1 + scale) LayerNorm(x) + shift; shift and scale are (N, 1, 1, D).

    Under autocast the norm answers in float32, and rounding it first halves what the backward pass keeps of it.
    """
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6).to(shift.dtype), 1 + scale)


def linear(x, conv):
    """Apply a 1x1 convolution as a matrix product, x (..., in) -> (..., out)."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def spatial(function, x):
    """Apply a function of (N, D, H, W) to x (N, H, W, D). Convolutions keep this memory layout: nothing is copied."""
    return function(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class Pointwise(nn.ModuleList):
    """A chain of 1x1 convolutions, widths[0] -> ... -> widths[-1] channels. Two are equal to one with W = W_2 W_1."""

    def __init__(self, *widths):
        super().__init__(nn.Conv2d(i, o, kernel_size=1) for i, o in zip(widths, widths[1:]))

    def merge(self):
        first, *others = self
        weight, bias = first.weight.flatten(1), first.bias
        for conv in others:
            weight, bias = conv.weight.flatten(1) @ weight, linear(bias, conv)
        return weight[:, :, None, None], bias

    def forward(self, x):
        # Merging pays if tokens outnumber channels. An exported program must not depend on the size of the batch.
        if exporting() or x[..., 0].numel() > max(x.shape[-1], len(self[-1].weight)):
            weight, bias = self.merge()
            return F.linear(x, weight.flatten(1), bias)
        for conv in self:
            x = linear(x, conv)
        return x


class Depthwise(nn.ModuleDict):
    """Depthwise convolutions {name: size} of x, and x itself if shortcut, summed: one convolution, kernels summed."""

    def __init__(self, width, sizes, shortcut):
        super().__init__({name: nn.Conv2d(width, width, kernel_size=k, groups=width) for name, k in sizes.items()})
        self.shortcut, self.padding, self.width = shortcut, max(sizes.values()) // 2, width

    def merge(self):
        first, *others = self.values()
        weight, bias = first.weight, sum((conv.bias for conv in others), first.bias)
        for kernel in [conv.weight for conv in others] + [torch.ones_like(weight[:, :, :1, :1])] * self.shortcut:
            weight = weight + F.pad(kernel, [(weight.shape[-1] - kernel.shape[-1]) // 2] * 4)
        return weight, bias

    def forward(self, x):
        weight, bias = self.merge()
        return spatial(lambda z: F.conv2d(z, weight, bias, padding=self.padding, groups=self.width), x)


class Attention(nn.Module):
    """Multi-head self-attention of a grid, x (N, H, W, D) -> (N, H, W, D), d = D / heads. UDiT explains the options."""

    def __init__(self, width, grid, heads, downsample, downsampler, cosine, rotary):
        super().__init__()
        self.heads, self.downsample, self.rotary = heads, downsample, rotary
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0))) if cosine else None
        if downsample == "kv":                                              # one key and one value per 2 x 2 tokens
            self.to_q, self.to_kv = nn.Linear(width, width), nn.Linear(4 * width, 2 * width)
        else:
            self.to_qkv = nn.Linear(width, 3 * width)                       # rows ordered (q k v, head, channel)
        self.to_out = nn.Conv2d(width, width, kernel_size=1)
        filtered = downsample != "none" and downsampler != "shuffle"
        self.downsampler = Depthwise(width, {"layer": 5}, downsampler == "shortcut") if filtered else nn.Identity()
        if rotary:
            half, d = [side // 2 for side in grid], width // heads
            queries = rotary_table(half if downsample == "tokens" else grid, d)
            keys = rotary_table(half, d, step=2) if downsample == "kv" else queries.clone()     # no sharing: jit.trace
            self.register_buffer("queries", queries, persistent=False)
            self.register_buffer("keys", keys, persistent=False)

    def forward(self, x):
        tokens = self.downsampler(x)                                        # (N, H, W, D)
        if self.downsample == "tokens":                                     # part (a, b): rows 2i + a, columns 2j + b
            tokens = tokens.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        if self.downsample == "kv":
            q, k, v = self.to_q(x), *self.to_kv(spatial(nn.PixelUnshuffle(2), tokens)).chunk(2, dim=-1)
        else:
            q, k, v = self.to_qkv(tokens).chunk(3, dim=-1)                  # each (4N, H/2, W/2, D), or (N, H, W, D)
        q, k, v = (z.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))
        if self.logit_scale is not None:                                    # each (4N, heads, L/4, d)
            q, k = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=math.log(100.0)).exp(), F.normalize(k, dim=-1)
        if self.rotary:
            q, k = rotate(q, self.queries), rotate(k, self.keys)
        out = F.scaled_dot_product_attention(q, k, v, scale=None if self.logit_scale is None else 1.0)
        out = out.transpose(1, 2).flatten(2)                                # (4N, L/4, D)
        if self.downsample == "tokens":                                     # parts to the grid: (N, H/2, 2, W/2, 2, D)
            out = out.unflatten(0, (-1, 2, 2)).unflatten(3, (x.shape[1] // 2, -1)).permute(0, 3, 1, 4, 2, 5)
        return linear(out.reshape(x.shape), self.to_out)                    # (N, H, W, D)


class Block(nn.Module):
    """Two pairs of attention and FFN on (N, H, W, D), all adaLN-Zero: x += gate f((1 + scale) LayerNorm(x) + shift).

    The FFN is a 1x1 convolution D -> 2D, exact GELU, a depthwise 5x5 convolution (if ffn_conv), a 1x1 one 2D -> D.
    """

    def __init__(self, width, attention, ffn_conv, reparam):
        super().__init__()
        middle, sizes = [width] * reparam, {"0": 5, "1": 3, "2": 1} if reparam else {"0": 5}
        for i in "12":
            self.add_module(f"attn{i}", Attention(width, **attention))
            self.add_module(f"mlp{i}", nn.Sequential(OrderedDict(
                project_in=Pointwise(width, *middle, 2 * width), gelu=nn.GELU(),
                dwconv=Depthwise(2 * width, sizes, shortcut=reparam) if ffn_conv else nn.Identity(),
                project_out=Pointwise(2 * width, *middle, width))))
            self.add_module(f"adaLN_modulation{i}", nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)))

    def forward(self, x, c):
        for attn, mlp, modulation in [(self.attn1, self.mlp1, self.adaLN_modulation1),
                                      (self.attn2, self.mlp2, self.adaLN_modulation2)]:
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation(c)[:, None, None].chunk(6, dim=-1)  # (N, 1, 1, D)
            x = x + gate1 * attn(modulate(x, shift1, scale1))
            x = x + gate2 * mlp(modulate(x, shift2, scale2))
        return x


class UDiT(nn.Module):
    """The U-DiT network. It predicts the noise in x_t and, with learn_sigma, the variance of a denoising step.

    image_size    int, or (height, width), in pixels or latent cells; each a multiple of 8
    in_channels   C, the channels of the input and of the noise
    width         D; the five stages have D, 2D, 4D, 2D, 2D channels
    depths        number of blocks in each of the five stages; a block is two pairs of attention and FFN
    heads         number of attention heads; D must be a multiple of it
    num_classes   0: no labels. Otherwise y is (N,) int64 in [0, num_classes)
    null_class    add a row, index num_classes, to the label table: the null label of classifier-free guidance
    learn_sigma   add C output channels, v: a step's log variance is u log(beta) + (1 - u) log(beta~), u = (v + 1) / 2
    downsample    "tokens": each of four subgrids attends to itself (the paper); "kv": all tokens attend to cells of
                  2 x 2 tokens; "none": all tokens attend to all. DiT-UNet is downsample="none" with VANILLA
    downsampler   what precedes it: "shortcut", x plus a depthwise convolution of x; "conv", only that; "shuffle", x
    cosine        trick 1: cosine attention with a learned scale; False: scaled dot products
    rotary        trick 2: 2-d rotary positions; False: no positions
    ffn_conv      trick 3: a depthwise convolution in the FFN; False: none
    reparam       trick 4: in the FFN, two 1x1 convolutions for one, and 5x5 + 3x3 + 1x1 + identity for the 5x5
    checkpoint    k: the backward pass recomputes the activations of every k-th block (True: all): less memory, slower

    Raises ValueError if the arguments do not fit together.
    """

    def __init__(self, image_size=32, in_channels=4, width=96, depths=(2, 5, 8, 5, 2), heads=4, num_classes=0,
                 null_class=True, learn_sigma=True, downsample="tokens", downsampler="shortcut", cosine=True,
                 rotary=True, ffn_conv=True, reparam=True, checkpoint=False):
        super().__init__()
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        for wrong, message in [
            (any(s < 8 or s % 8 for s in self.image_size), f"image_size {self.image_size} is not a multiple of 8"),
            (width % heads or width % 2, f"width {width} is not a multiple of heads {heads} (and of 2)"),
            (rotary and width // heads % 4, f"width / heads is {width // heads}, but rotary needs a multiple of 4"),
            (len(depths) != 5, f"depths {depths} is not one number for each of five stages"),
            (downsample not in ("tokens", "kv", "none"), f"downsample {downsample!r} is none of tokens, kv, none"),
            (downsampler not in ("shortcut", "conv", "shuffle"),
             f"downsampler {downsampler!r} is none of shortcut, conv, shuffle"),
        ]:
            if wrong:
                raise ValueError(f"UDiT: {message}")
        self.in_channels, self.label_rows = in_channels, (num_classes + null_class if num_classes else 0)
        attention = dict(heads=heads, downsample=downsample, downsampler=downsampler, cosine=cosine, rotary=rotary)

        def stage(depth, times, shrink):                                    # times * D wide, H/shrink x W/shrink
            options = {"grid": [side // shrink for side in self.image_size], **attention}
            return nn.ModuleList(Block(times * width, options, ffn_conv, reparam) for _ in range(depth))

        def resample(d, out):                                               # 2 x 2 tokens to one, or one to 2 x 2
            conv = nn.Conv2d(d, out, kernel_size=3, padding=1, bias=False)
            return nn.ModuleDict({"body": nn.Sequential(conv, nn.PixelUnshuffle(2) if out < d else nn.PixelShuffle(2))})

        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, width, kernel_size=3, padding=1)})
        for i, d in (1, width), (2, 2 * width), (3, 4 * width):             # one embedding for each width
            mlp = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
            self.add_module(f"t_embedder_{i}", nn.ModuleDict({"mlp": mlp}))
            table = nn.ModuleDict({"embedding_table": nn.Embedding(self.label_rows, d)}) if num_classes else None
            self.add_module(f"y_embedder_{i}", table)
        self.encoder_level_1 = stage(depths[0], 1, 1)
        self.down1_2, self.encoder_level_2 = resample(width, width // 2), stage(depths[1], 2, 2)
        self.down2_3, self.latent = resample(2 * width, width), stage(depths[2], 4, 4)
        self.up3_2, self.reduce_chan_level2 = resample(4 * width, 8 * width), nn.Conv2d(4 * width, 2 * width, 1)
        self.decoder_level_2 = stage(depths[3], 2, 2)
        self.up2_1, self.reduce_chan_level1 = resample(2 * width, 4 * width), nn.Conv2d(2 * width, 2 * width, 1)
        self.decoder_level_1, self.output = stage(depths[4], 2, 1), nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        out_proj = nn.Conv2d(2 * width, (1 + learn_sigma) * in_channels, kernel_size=3, padding=1)
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(2 * width, 4 * width))
        self.final_layer = nn.ModuleDict({"out_proj": out_proj, "adaLN_modulation": modulation})
        for i, block in enumerate(module for module in self.modules() if isinstance(module, Block)):
            block.recomputed = checkpoint > 0 and i % checkpoint == 0
        self.initialise()

    def initialise(self):
        """Xavier uniform; normal (0.02) for time and labels; zero for biases, adaLN and head; logit_scale is set."""
        for name, p in self.named_parameters():
            if p.ndim == 1 or "adaLN" in name or "final_layer" in name:
                nn.init.zeros_(p)
            elif "t_embedder" in name or "y_embedder" in name:
                nn.init.normal_(p, std=0.02)
            elif "logit_scale" not in name:                                 # the stem as a Linear layer, as released
                nn.init.xavier_uniform_(p.data.flatten(1) if "x_embedder" in name else p)

    def forward(self, x, t, y=None):
        """x (N, C, H, W), t (N,) DDPM index in 0..999, y None | (N,) int64 -> (N, 2C, H, W), or (N, C, H, W)."""
        self.check(x, t, y)
        time = timestep_embedding(t, 256).to(x.dtype)                       # (N, 256)
        c1, c2, c3 = (getattr(self, f"t_embedder_{i}").mlp(time).to(x.dtype) for i in "123")   # D, 2D, 4D wide
        if self.label_rows:
            c1, c2, c3 = (c + getattr(self, f"y_embedder_{i}").embedding_table(y) for i, c in zip("123", (c1, c2, c3)))

        x = spatial(self.x_embedder.proj, x.permute(0, 2, 3, 1).contiguous())
        skip1 = self.run(self.encoder_level_1, x, c1)                       # (N, H, W, D)
        skip2 = self.run(self.encoder_level_2, spatial(self.down1_2.body, skip1), c2)       # (N, H/2, W/2, 2D)
        x = self.run(self.latent, spatial(self.down2_3.body, skip2), c3)    # (N, H/4, W/4, 4D)
        x = torch.cat([spatial(self.up3_2.body, x), skip2], dim=-1)         # (N, H/2, W/2, 4D)
        x = self.run(self.decoder_level_2, linear(x, self.reduce_chan_level2), c2)          # (N, H/2, W/2, 2D)
        x = torch.cat([spatial(self.up2_1.body, x), skip1], dim=-1)         # (N, H, W, 2D)
        x = self.run(self.decoder_level_1, linear(x, self.reduce_chan_level1), c2)
        shift, scale = self.final_layer.adaLN_modulation(c2)[:, None, None].chunk(2, dim=-1)
        x = modulate(spatial(self.output, x), shift, scale).permute(0, 3, 1, 2)             # (N, 2D, H, W)
        return self.final_layer.out_proj(x).contiguous()                    # (N, 2C, H, W)

    def run(self, blocks, x, c):
        """Run the blocks of a stage on x, in the type of c: that of the network's input, also under autocast."""
        x = x.to(c.dtype)
        for block in blocks:                                                # a block draws no random numbers
            keep = not block.recomputed
            x = block(x, c) if keep else recompute(block, x, c, use_reentrant=False, preserve_rng_state=False)
        return x

    @torch.no_grad()
    def fold(self):
        """A copy with merged convolutions (in float64). UDiT(reparam=False, downsampler="conv") loads its weights."""
        network = copy.deepcopy(self)
        for module in list(network.modules()):
            if isinstance(module, (Pointwise, Depthwise)):
                (_, first), *others = module.named_children()
                dtype, merged = first.weight.dtype, module.double().merge()
                first.weight, first.bias = (nn.Parameter(p.to(dtype)) for p in merged)
                module.shortcut = False
                for name, _ in others:
                    delattr(module, name)
        return network

    def check(self, x, t, y):
        """Raise ValueError, in one line, if the model was not built for these inputs."""
        n, expected = x.shape[0], (self.in_channels, *self.image_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"UDiT: x has shape {tuple(x.shape)}, expected (N, {', '.join(map(str, expected))})")
        if tuple(t.shape) != (n,):
            raise ValueError(f"UDiT: t has shape {tuple(t.shape)}, expected ({n},): one time for each image")
        if self.label_rows and (y is None or tuple(y.shape) != (n,) or y.is_floating_point()):
            raise ValueError(f"UDiT: y must be ({n},) integer labels in [0, {self.label_rows}), got {describe(y)}")
        if y is not None and not self.label_rows:
            raise ValueError(f"UDiT: the model is unconditional (num_classes=0), but y is {describe(y)}")


def describe(y):
    return "none" if y is None else f"shape {tuple(y.shape)} of {y.dtype}"


def preset(**size):
    """A function that builds a UDiT of this size, with overrides. An argument unknown to UDiT raises TypeError."""
    return lambda **overrides: UDiT(**{**size, **overrides})


# The paper's sizes: name -> function(**overrides) -> UDiT.
# Right: M parameters; then M parameters and GMACs for one image after fold() (ImageNet 256).
VANILLA = dict(cosine=False, rotary=False, ffn_conv=False, reparam=False)   # MODELS["udit_s"](**VANILLA): no tricks
MODELS = {
    "udit_tiny": preset(width=32, depths=(1, 1, 1, 1, 1), heads=4),         # learns data "shapes" on a laptop CPU
    "udit_s": preset(width=96, heads=4),                                    # 58.90 M; 52.05 M, 6.02 GMACs
    "udit_b": preset(width=192, heads=8),                                   # 231.25 M; 204.43 M, 22.18 GMACs
    "udit_l": preset(width=384, heads=16),                                  # 916.34 M; 810.19 M, 84.91 GMACs
}
