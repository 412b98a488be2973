"""DiT: a plain Vision Transformer, conditioned on time and class through its norms, as a diffusion backbone.

    Peebles & Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, arXiv:2212.09748

The image (or latent) is cut into patches, each patch is a token, and a stack of equal blocks works on the tokens. Time
and class are added into one vector c. A Linear layer of each block maps c to the shift, scale and gate of its two
branches. This layer starts at zero, so every block starts as the identity (adaLN-Zero):

    x -> patches + fixed positions                         t, y -> c = MLP(sinusoids(t)) + table[y]
    depth times:  (shift1, scale1, gate1, shift2, scale2, gate2) = Linear(SiLU(c))
                  x <- x + gate1 * attention((1 + scale1) norm(x) + shift1)
                  x <- x + gate2 *       MLP((1 + scale2) norm(x) + shift2)
    norm, shift and scale from c, Linear, unpatchify -> noise and learned variance, each shaped like x

    model = MODELS["dit_xl2"](image_size=32, num_classes=1000)   # ImageNet 256: 675.13 M parameters, 118.6 GMACs
    noise, v = model(x, t, y).chunk(2, dim=1)                    # x (N, 4, 32, 32), t (N,) in 0..999, y (N,) int64

This file imports only torch and can be copied into another project. The parameters have the names of the released
checkpoints, which load with strict=True. test_all.py compares outputs with the released code's (relative error < 1e-5).
"""
import math
import re

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


def position_table(grid, width):
    """Fixed positions of the tokens of a grid = (H', W'), in row-major order: (1, H' * W', D), float32.

    [sin(c f_i), cos(c f_i), sin(r f_i), cos(r f_i)] for column c and row r, with f_i = 10000^(-i / (D / 4)).
    """
    row, column = torch.meshgrid(*map(torch.arange, grid), indexing="ij")   # each (H', W')
    frequencies = 10000.0 ** (torch.arange(width // 4, dtype=torch.float64) / -(width // 4))
    c, r = (place.flatten()[:, None] * frequencies for place in (column, row))    # each (H' W', D / 4)
    return torch.cat([c.sin(), c.cos(), r.sin(), r.cos()], dim=-1)[None].float()


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
        self.qkv = nn.Linear(width, 3 * width)                              # rows ordered (q k v, head, channel)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)    # each (N, H, L, D / H)
        x = F.scaled_dot_product_attention(q, k, v)                         # (N, H, L, D / H)
        return self.proj(x.transpose(1, 2).flatten(2))                      # (N, L, D)


class MLP(nn.Module):
    """Two Linear layers with a GELU (tanh form) between them, applied to each token: (N, L, D) -> (N, L, D)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x, shift, scale):
    """Apply adaLN's shift and scale, (N, 1, D), to a normalised x (N, L, D): (1 + scale) x + shift, in one pass.

    Under autocast the norm answers in float32, and rounding it first halves what the backward pass keeps of it.
    """
    return torch.addcmul(shift, x.to(shift.dtype), 1 + scale)


class Block(nn.Module):
    """One pre-norm Transformer block, x (N, L, D) -> (N, L, D), in one of the paper's four designs (counts: DiT-XL/2).

    "adaln_zero": shift, scale and gate of both branches come from the condition c (N, D); 675.1 M, 118.6 GMACs.
    "adaln": shift and scale come from c, and there is no gate; 600.7 M, 118.5 GMACs.
    "cross": a third branch, between the two, attends to the condition, a sequence c (N, T, D); 598.3 M, 137.6 GMACs.
    "in_context": a standard block that does not use c, because c is among the tokens; 449.5 M, 119.4 GMACs.
    """

    def __init__(self, width, heads, mlp_ratio, design):
        super().__init__()
        self.design = design
        affine = design in ("cross", "in_context")                          # without shift and scale from c
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)
        self.attn = Attention(width, heads)
        self.norm_cross = nn.LayerNorm(width, eps=1e-6) if design == "cross" else None
        self.cross_attn = nn.MultiheadAttention(width, heads, batch_first=True) if design == "cross" else None
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)
        self.mlp = MLP(width, int(mlp_ratio * width))
        parts = 6 if design == "adaln_zero" else 4
        self.adaLN_modulation = None if affine else nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))

    def forward(self, x, c):
        if self.design == "adaln_zero":                                     # shift, scale, gate: each (N, 1, D)
            shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
            x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
            return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))
        if self.design == "adaln":
            shift1, scale1, shift2, scale2 = self.adaLN_modulation(c)[:, None].chunk(4, dim=-1)
            x = x + self.attn(modulate(self.norm1(x), shift1, scale1))
            return x + self.mlp(modulate(self.norm2(x), shift2, scale2))
        x = x + self.attn(self.norm1(x))
        if self.design == "cross":
            x = x + self.cross_attn(self.norm_cross(x), c, c, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class FinalLayer(nn.Module):
    """Map tokens to patches, (N, L, D) -> (N, L, outputs): LayerNorm (adaptive in the adaLN designs), then Linear."""

    def __init__(self, width, outputs, design):
        super().__init__()
        affine = design in ("cross", "in_context")
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = None if affine else nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        x = self.norm_final(x)
        if self.adaLN_modulation is not None:
            x = modulate(x, *self.adaLN_modulation(c)[:, None].chunk(2, dim=-1))
        return self.linear(x)


class DiT(nn.Module):
    """The DiT network. It predicts the noise in x_t and, with learn_sigma, the variance of a denoising step.

    image_size    int, or (height, width), in pixels or latent cells; each a multiple of patch_size
    in_channels   C, the channels of the input and of the noise
    patch_size    p; there are H/p * W/p tokens
    width         D, the length of a token; a multiple of 4 (positions: sine and cosine, column and row)
    depth         number of blocks
    heads         number of attention heads; D must be a multiple of it
    mlp_ratio     hidden width of the MLPs, divided by D
    num_classes   0: no labels. Otherwise y is (N,) int64 in [0, num_classes)
    null_class    add a row, index num_classes, to the label table: the null label of classifier-free guidance
    learn_sigma   add C output channels, v: a step's log variance is u log(beta) + (1 - u) log(beta~), u = (v + 1) / 2
    block         how the blocks receive time and class: "adaln_zero" (the paper's best), "adaln", "cross" (they
                  attend to t and y), "in_context" (t and y are two more tokens)
    checkpoint    k: the backward pass recomputes the activations of every k-th block (True: all): less memory, slower

    Raises ValueError if the arguments do not fit together.
    """

    def __init__(self, image_size=32, in_channels=4, patch_size=2, width=384, depth=12, heads=6, mlp_ratio=4.0,
                 num_classes=0, null_class=True, learn_sigma=True, block="adaln_zero", checkpoint=False):
        super().__init__()
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        for wrong, message in [
            (any(side < 1 or side % patch_size for side in self.image_size),
             f"image_size {self.image_size} is not a multiple of patch_size {patch_size}"),
            (width % heads or width % 4, f"width {width} is not a multiple of heads {heads} (and of 4)"),
            (block not in ("adaln_zero", "adaln", "cross", "in_context"),
             f"block {block!r} is none of 'adaln_zero', 'adaln', 'cross', 'in_context'"),
        ]:
            if wrong:
                raise ValueError(f"DiT: {message}")
        self.in_channels, self.patch_size, self.width = in_channels, patch_size, width
        self.label_rows = num_classes + null_class if num_classes else 0
        self.grid = tuple(side // patch_size for side in self.image_size)
        self.block = block

        self.x_embedder = PatchEmbed(patch_size, in_channels, width)
        self.register_buffer("pos_embed", position_table(self.grid, width))     # not trained; the papers count it
        mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        table = nn.Embedding(self.label_rows, width) if num_classes else None
        self.y_embedder = nn.ModuleDict({"embedding_table": table}) if num_classes else None
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, block) for _ in range(depth))
        for i, layer in enumerate(self.blocks):
            layer.recomputed = checkpoint > 0 and i % checkpoint == 0
        self.final_layer = FinalLayer(width, patch_size**2 * in_channels * (1 + learn_sigma), block)
        self.initialise()

    def initialise(self):
        """Xavier uniform; normal (0.02) for time and labels; zero for biases, the last Linear and adaLN-Zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))           # the patch embedding as a Linear layer
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)
        if self.block == "adaln_zero":
            for module in (*self.blocks, self.final_layer):
                nn.init.zeros_(module.adaLN_modulation[1].weight)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Positions depend on image_size, not on training. This model keeps its own, so checkpoints of any size load.
        if prefix + "pos_embed" in state_dict:
            state_dict[prefix + "pos_embed"] = position_table(self.grid, self.width)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x, t, y=None):
        """x (N, C, H, W), t (N,) DDPM index in 0..999, y None | (N,) int64 -> (N, 2C, H, W), or (N, C, H, W)."""
        self.check(x, t, y)
        time = timestep_embedding(t, 256).to(x.dtype)                       # (N, 256)
        x = self.x_embedder(x) + self.pos_embed                             # (N, L, D), L = H/p * W/p
        c = self.t_embedder.mlp(time)[:, None]                              # (N, 1, D)
        if self.label_rows:
            c = torch.cat([c, self.y_embedder.embedding_table(y)[:, None]], dim=1)    # (N, 2, D)
        if self.block in ("adaln_zero", "adaln"):
            c = c.sum(dim=1)                                                # (N, D)
        elif self.block == "in_context":
            x = torch.cat([x, c], dim=1)                                    # (N, L + 2, D)

        for block in self.blocks:
            x = self.run(block, x, c)                                       # (N, L or L + 2, D)

        x = self.final_layer(x[:, :math.prod(self.grid)], c)                # (N, L, p * p * 2C)
        return unpatchify(x, self.grid, self.patch_size)                    # (N, 2C, H, W)

    def run(self, block, *inputs):
        """Return block(*inputs). A block with gradient checkpointing runs again in the backward pass."""
        if block.recomputed:
            return recompute(block, *inputs, use_reentrant=False, preserve_rng_state=False)    # no random numbers
        return block(*inputs)

    def check(self, x, t, y):
        """Raise ValueError, in one line, if the model was not built for these inputs."""
        n, expected = x.shape[0], (self.in_channels, *self.image_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"DiT: x has shape {tuple(x.shape)}, expected (N, {', '.join(map(str, expected))})")
        if tuple(t.shape) != (n,):
            raise ValueError(f"DiT: t has shape {tuple(t.shape)}, expected ({n},): one time for each image")
        if self.label_rows and (y is None or tuple(y.shape) != (n,) or y.is_floating_point()):
            raise ValueError(f"DiT: y must be ({n},) integer labels in [0, {self.label_rows}), got {describe(y)}")
        if y is not None and not self.label_rows:
            raise ValueError(f"DiT: the model is unconditional (num_classes=0), but y is {describe(y)}")


def describe(y):
    return "none" if y is None else f"shape {tuple(y.shape)} of {y.dtype}"


# The tensors of diffusers' DiTTransformer2DModel have other names, of which these parts become ours
DIFFUSERS = {
    "transformer_blocks.": "blocks.", ".attn1.to_out.0.": ".attn.proj.", ".norm1.linear.": ".adaLN_modulation.1.",
    ".ff.net.0.proj.": ".mlp.fc1.", ".ff.net.2.": ".mlp.fc2.", "pos_embed.proj.": "x_embedder.proj.",
    "proj_out_1.": "final_layer.adaLN_modulation.1.", "proj_out_2.": "final_layer.linear.",
    "blocks.0.norm1.emb.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "blocks.0.norm1.emb.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "blocks.0.norm1.emb.class_embedder.": "y_embedder.",
}


def from_diffusers(state):
    """A state dict of diffusers' DiTTransformer2DModel -> one of DiT. What is not in DIFFUSERS keeps its name.

    There q, k and v are separate, and each block embeds time and label itself. Raises ValueError where blocks do that
    differently, which a DiT can not, and KeyError on missing tensors.
    """
    out = {"pos_embed": torch.empty(0)}                                     # the model keeps its own
    for name, p in state.items():
        if own := re.fullmatch(r"transformer_blocks\.\d+(\.norm1\.emb\..*)", name):
            name = f"transformer_blocks.0{own[1]}"
            if not torch.equal(p, state[name]):
                raise ValueError(f"its blocks differ in {own[1]}")
        if ".attn1.to_q." in name:
            p = torch.cat([state[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")])
            name = name.replace("attn1.to_q", "attn.qkv")
        for theirs, ours in DIFFUSERS.items():
            name = name.replace(theirs, ours)
        if ".attn1.to_k." not in name and ".attn1.to_v." not in name:       # they went with q
            out[name] = p
    return out


def preset(**size):
    """A function that builds a DiT of this size, with overrides. An argument unknown to DiT raises TypeError."""
    return lambda **overrides: DiT(**{**size, **overrides})


# Table 1 of the paper, each size with three patch sizes: name -> function(**overrides) -> DiT.
# Right: M parameters for 2 x 2 patches, and GMACs per image for 2 x 2, 4 x 4 and 8 x 8 patches (ImageNet 256).
SIZES = {
    "s": dict(width=384, depth=12, heads=6),                                # 32.96 M; 6.06, 1.41, 0.36 GMACs
    "b": dict(width=768, depth=12, heads=12),                               # 130.51 M; 23.01, 5.57, 1.42 GMACs
    "l": dict(width=1024, depth=24, heads=16),                              # 458.10 M; 80.70, 19.70, 5.01 GMACs
    "xl": dict(width=1152, depth=28, heads=16),                             # 675.13 M; 118.62, 29.04, 7.39 GMACs
}
MODELS = {
    "dit_tiny": preset(patch_size=4, width=192, depth=4, heads=4),          # learns data "shapes" on a laptop CPU
    **{f"dit_{name}{p}": preset(patch_size=p, **size) for name, size in SIZES.items() for p in (2, 4, 8)},
}
