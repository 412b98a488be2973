"""JiT: a Transformer on large patches of plain pixels, built of today's blocks, as a diffusion backbone.

    Li & He, "Back to Basics: Let Denoising Generative Models Denoise" (Just image Transformers), CVPR 2026,
    arXiv:2511.13720

There is no autoencoder: a patch of 16 x 16 pixels is a token. The network predicts the clean image x_0, because noise
fills every dimension of so large a patch and images fill few of them. The block is DiT's with the parts that
Transformers have gained since: RMSNorm, SwiGLU, rotary positions, normalised queries and keys. The class enters through
the norms as in DiT, and also as tokens of its own, which join the patches after some blocks:

    x -> patches -> bottleneck -> width, + fixed positions        t, y -> c = MLP(sinusoids(t)) + table[y]
    depth times:  (shift1, scale1, gate1, shift2, scale2, gate2) = Linear(SiLU(c))
                  x <- x + gate1 * attention((1 + scale1) norm(x) + shift1)
                  x <- x + gate2 *    SwiGLU((1 + scale2) norm(x) + shift2)
                  before block context_start, class tokens join: x <- [table[y] + learned positions, x]
    of the patches alone: norm, shift and scale from c, Linear, unpatchify -> x_0, shaped like x

    model = MODELS["jit_b16"](image_size=256, num_classes=1000)  # ImageNet 256: 131.32 M parameters, 25.22 GMACs
    x_0 = model(x, t, y)              # x (N, 3, 256, 256), t (N,) 0 noise .. 1 data, y (N,) int64

Each part can be switched off. Without all of them, the network is DiT with learn_sigma=False: the same weights give the
same output, bit for bit. Only the use differs: DiT receives a time in 0..999 and predicts the noise.

    MODELS["jit_b16"](norm="layer", mlp="gelu", rotary=False, qk_norm=False, bottleneck=0, context_tokens=0)

This file imports only torch and can be copied into another project. The parameters have the names of the released
network, whose weights load with strict=True. test_all.py compares outputs with the released code's (error < 1e-5).
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


def grid_angles(grid, width, dtype=torch.float32, device=None):
    """Angles of the row and of the column of each cell of a grid = (H', W'), row-major, each (H' * W', width / 4).

    These are r f_i for row r and c f_i for column c, with f_i = 10000^(-i / (width / 4)).
    """
    row, column = torch.meshgrid(*(torch.arange(n, dtype=dtype, device=device) for n in grid), indexing="ij")
    frequencies = 10000.0 ** (torch.arange(0, width, 4, dtype=dtype, device=device) / -width)
    return [place.flatten()[:, None] * frequencies for place in (row, column)]


def position_table(grid, width):
    """DiT's fixed positions of the patch tokens: sine and cosine of the column, then of the row, (1, H' * W', D)."""
    row, column = grid_angles(grid, width, torch.float64)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=-1)[None].float()


def rotary_table(grid, d, context_tokens=0, device=None):
    """Cosine and sine of the angles by which a head of width d turns: (T + H' * W', d / 2, 2), T = context_tokens.

    The first half of the angles comes from the row, the second from the column. The first T tokens do not turn.
    """
    angles = F.pad(torch.cat(grid_angles(grid, d, device=device), dim=-1), (0, 0, context_tokens, 0))
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x, table):
    """Turn every two adjacent channels (a, b) of x (N, heads, L, d) to (a + ib) exp(i angle), in float32.

    Uses the last L rows of the table (T + L or L, d / 2, 2): the patches are the last tokens, with or without T others.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs, table = x.to(wide).unflatten(-1, (-1, 2)), table[-x.shape[2]:]
    if torch.compiler.is_compiling():                                       # the compiler fuses real numbers only
        (a, b), (cosine, sine) = pairs.unbind(-1), table.unbind(-1)
        pairs = torch.stack([a * cosine - b * sine, b * cosine + a * sine], dim=-1)
    else:
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return pairs.flatten(-2).to(x.dtype)


def unpatchify(tokens, grid, patch_size):
    """Lay patches back into an image: (N, H' * W', p * p * C) -> (N, C, H' * p, W' * p), grid = (H', W').

    Within a token the numbers are ordered (row, column, channel); tokens are in row-major order.
    """
    (h, w), p = grid, patch_size
    x = tokens.unflatten(1, (h, w)).unflatten(3, (p, p, -1))                # (N, H', W', p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)          # (N, C, H' p, W' p)


class PatchEmbed(nn.Module):
    """Cut an image into p x p patches and map each to D numbers: (N, C, H, W) -> (N, H/p * W/p, D), row-major.

    With a bottleneck the map has two steps, p p C -> bottleneck -> D, with nothing between: a matrix of low rank.
    """

    def __init__(self, patch_size, in_channels, bottleneck, width):
        super().__init__()
        self.bottleneck = bottleneck
        if bottleneck:
            self.proj1 = nn.Conv2d(in_channels, bottleneck, kernel_size=patch_size, stride=patch_size, bias=False)
            self.proj2 = nn.Conv2d(bottleneck, width, kernel_size=1)
        else:
            self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        x = self.proj2(self.proj1(x)) if self.bottleneck else self.proj(x)  # (N, D, H/p, W/p)
        return x.flatten(2).transpose(1, 2)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * weight over the last dimension, computed in float32 (float64 where x is)."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), eps=1e-6).to(x.dtype)


NORMS = {"rms": RMSNorm, "layer": partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False)}     # "layer" is DiT's


class Attention(nn.Module):
    """Multi-head self-attention, (N, L, D) -> (N, L, D): softmax(q k^T / sqrt(D / H)) v for each of H heads.

    RMSNorm normalises q and k (with qk_norm), then the rotary table turns them (if there is one). The released code
    computes logits and softmax in float32, because other predictions than x_0 had loss spikes. The fused kernel also
    accumulates them in float32. Under bf16 autocast either form changes the output of 12 blocks of width 384 by 0.7 %.
    """

    def __init__(self, width, heads, qk_norm, dropout):
        super().__init__()
        self.heads = heads
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()    # one weight, shared by all heads
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.qkv = nn.Linear(width, 3 * width)                              # rows ordered (q k v, head, channel)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, table):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)    # each (N, H, L, D / H)
        q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        x = F.scaled_dot_product_attention(q, k, v)                         # (N, H, L, D / H)
        return self.dropout(self.proj(x.transpose(1, 2).flatten(2)))        # (N, L, D)


class SwiGLU(nn.Module):
    """Gated MLP, for each token: w3(SiLU(a) * b), where a and b are the halves of w12(x): (N, L, D) -> (N, L, D)."""

    def __init__(self, width, dropout):
        super().__init__()
        hidden = 8 * width // 3                                             # as many weights as DiT's MLP of 4 D
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)                                 # each (N, L, hidden)
        return self.w3(self.dropout(F.silu(a) * b))


class MLP(nn.Module):
    """DiT's MLP: two Linear layers with a GELU (tanh form) between them, for each token: (N, L, D) -> (N, L, D)."""

    def __init__(self, width, dropout):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.fc2(self.dropout(F.gelu(self.fc1(x), approximate="tanh")))


def modulate(x, shift, scale):
    """Apply adaLN's shift and scale, (N, 1, D), to a normalised x (N, L, D): (1 + scale) x + shift, in one pass.

    Under autocast the norm answers in float32, and rounding it first halves what the backward pass keeps of it.
    """
    return torch.addcmul(shift, x.to(shift.dtype), 1 + scale)


class Block(nn.Module):
    """One pre-norm Transformer block with adaLN-Zero: x (N, L, D), c (N, D), rotary table or None -> (N, L, D)."""

    def __init__(self, width, heads, norm, mlp, qk_norm, dropout):
        super().__init__()
        self.norm1 = NORMS[norm](width)
        self.attn = Attention(width, heads, qk_norm, dropout)
        self.norm2 = NORMS[norm](width)
        self.mlp = SwiGLU(width, dropout) if mlp == "swiglu" else MLP(width, dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, table):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), table)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Map tokens to patches, x (N, L, D), c (N, D) -> (N, L, outputs): norm, shift and scale from c, then Linear."""

    def __init__(self, width, outputs, norm):
        super().__init__()
        self.norm_final = NORMS[norm](width)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)))


class JiT(nn.Module):
    """The JiT network. It predicts the clean image x_0 from z = t x_0 + (1 - t) noise.

    image_size      int, or (height, width), in pixels; each a multiple of patch_size
    in_channels     C, the channels of the input and of x_0
    patch_size      p; there are H/p * W/p patch tokens
    width           D, the length of a token; a multiple of 4 (positions: sine and cosine, column and row)
    depth           number of blocks
    heads           number of attention heads; D must be a multiple of it (with rotary: of 4 times it)
    bottleneck      a Linear layer compresses each patch to this many numbers, a second one maps them to D; 0: one
                    Linear layer maps the patch to D (DiT)
    context_tokens  T, the number of class tokens; 0: the class enters through the norms alone (DiT, or no labels)
    context_start   the class tokens join before the block with this index
    num_classes     0: no labels. Otherwise y is (N,) int64 in [0, num_classes)
    null_class      add a row, index num_classes, to the label table: the null label of classifier-free guidance
    norm            "rms", or "layer" (DiT)
    mlp             "swiglu", or "gelu" (DiT)
    rotary          turn queries and keys by their positions; False: do not (DiT)
    qk_norm         normalise each head's queries and keys; False: do not (DiT)
    dropout         rate in training, after attention and inside the MLP, in the middle half of the blocks
    checkpoint      k: the backward pass recomputes the activations of every k-th block (True: all): less memory, slower

    Raises ValueError if the arguments do not fit together.
    """

    def __init__(self, image_size=256, in_channels=3, patch_size=16, width=768, depth=12, heads=12, bottleneck=128,
                 context_tokens=32, context_start=4, num_classes=0, null_class=True, norm="rms", mlp="swiglu",
                 rotary=True, qk_norm=True, dropout=0.0, checkpoint=False):
        super().__init__()
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.context_tokens = context_tokens if num_classes else 0
        for wrong, message in [
            (any(side < 1 or side % patch_size for side in self.image_size),
             f"image_size {self.image_size} is not a multiple of patch_size {patch_size}"),
            (width % heads or width % 4, f"width {width} is not a multiple of heads {heads} (and of 4)"),
            (rotary and width // heads % 4, f"width / heads is {width // heads}, but rotary needs a multiple of 4"),
            (self.context_tokens and not 0 <= context_start < depth,
             f"context_start {context_start} is not the index of one of {depth} blocks"),
            (norm not in NORMS, f"norm {norm!r} is none of 'rms', 'layer'"),
            (mlp not in ("swiglu", "gelu"), f"mlp {mlp!r} is none of 'swiglu', 'gelu'"),
        ]:
            if wrong:
                raise ValueError(f"JiT: {message}")
        self.in_channels, self.patch_size, self.width, self.heads = in_channels, patch_size, width, heads
        self.context_start, self.rotary = context_start, rotary
        self.label_rows = num_classes + null_class if num_classes else 0
        self.grid = tuple(side // patch_size for side in self.image_size)

        self.x_embedder = PatchEmbed(patch_size, in_channels, bottleneck, width)
        self.pos_embed = nn.Parameter(position_table(self.grid, width), requires_grad=False)
        time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": time})
        table = nn.Embedding(self.label_rows, width) if num_classes else None
        self.y_embedder = nn.ModuleDict({"embedding_table": table}) if num_classes else None
        if self.context_tokens:
            self.in_context_posemb = nn.Parameter(torch.empty(1, context_tokens, width))
        self.blocks = nn.ModuleList()
        for i in range(depth):
            rate = dropout if depth // 4 <= i < 3 * (depth // 4) else 0.0
            self.blocks.append(Block(width, heads, norm, mlp, qk_norm, rate))
            self.blocks[i].recomputed, self.blocks[i].random = checkpoint > 0 and i % checkpoint == 0, rate > 0
        self.final_layer = FinalLayer(width, patch_size**2 * in_channels, norm)
        self.initialise()

    def initialise(self):
        """Xavier uniform; normal (0.02) for time, labels and class tokens; zero for biases, the last Linear, adaLN."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))           # the patch embedding as a Linear layer
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
        if self.context_tokens:
            nn.init.normal_(self.in_context_posemb, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Positions depend on image_size, not on training. This model keeps its own, so checkpoints of any size load.
        if prefix + "pos_embed" in state_dict:
            state_dict[prefix + "pos_embed"] = position_table(self.grid, self.width)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x, t, y=None):
        """x (N, C, H, W), t (N,) 1 - time: 0 noise, 1 data, y None | (N,) int64 -> x_0 (N, C, H, W)."""
        self.check(x, t, y)
        c = self.t_embedder.mlp(timestep_embedding(t, 256).to(x.dtype))     # (N, D)
        if self.label_rows:
            label = self.y_embedder.embedding_table(y)                      # (N, D)
            c = c + label
        head = self.width // self.heads
        table = rotary_table(self.grid, head, self.context_tokens, x.device) if self.rotary else None

        x = self.x_embedder(x) + self.pos_embed                             # (N, L, D), L = H/p * W/p
        for i, block in enumerate(self.blocks):
            if self.context_tokens and i == self.context_start:
                x = torch.cat([label[:, None] + self.in_context_posemb, x], dim=1)    # (N, T + L, D)
            x = self.run(block, x, c, table)

        x = self.final_layer(x[:, self.context_tokens:], c)                 # (N, L, p * p * C)
        return unpatchify(x, self.grid, self.patch_size)                    # (N, C, H, W)

    def run(self, block, *inputs):
        """Return block(*inputs). A block with gradient checkpointing runs again in the backward pass."""
        if block.recomputed:                                                # dropout must draw the same numbers again
            return recompute(block, *inputs, use_reentrant=False, preserve_rng_state=block.random)
        return block(*inputs)

    def check(self, x, t, y):
        """Raise ValueError, in one line, if the model was not built for these inputs."""
        n, expected = x.shape[0], (self.in_channels, *self.image_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"JiT: x has shape {tuple(x.shape)}, expected (N, {', '.join(map(str, expected))})")
        if tuple(t.shape) != (n,):
            raise ValueError(f"JiT: t has shape {tuple(t.shape)}, expected ({n},): one time for each image")
        if self.label_rows and (y is None or tuple(y.shape) != (n,) or y.is_floating_point()):
            raise ValueError(f"JiT: y must be ({n},) integer labels in [0, {self.label_rows}), got {describe(y)}")
        if y is not None and not self.label_rows:
            raise ValueError(f"JiT: the model is unconditional (num_classes=0), but y is {describe(y)}")


def describe(y):
    return "none" if y is None else f"shape {tuple(y.shape)} of {y.dtype}"


def preset(**size):
    """A function that builds a JiT of this size, with overrides. An argument unknown to JiT raises TypeError."""
    return lambda **overrides: JiT(**{**size, **overrides})


# The paper's sizes, with its dropout, each with two patch sizes: name -> function(**overrides) -> JiT.
# Right: M parameters and GMACs per image for 16 x 16 patches (ImageNet 256); the same for 32 x 32 (ImageNet 512).
SIZES = {
    "b": dict(width=768, depth=12, heads=12, context_start=4),              # 131.32 M, 25.22 GMACs; 133.39 M, 25.75
    "l": dict(width=1024, depth=24, heads=16, context_start=8),             # 459.14 M, 87.94; 461.80 M, 88.62
    "h": dict(width=1280, depth=32, heads=16, bottleneck=256, context_start=10, dropout=0.2),
    "g": dict(width=1664, depth=40, heads=16, bottleneck=256, context_start=10, dropout=0.2),
}                                   # h: 952.84 M, 181.95; 956.38 M, 182.85; g: 2007.56 M, 383.74; 2011.98 M, 384.88
MODELS = {
    "jit_tiny": preset(image_size=32, patch_size=4, width=192, depth=4, heads=4, bottleneck=32, context_tokens=4,
                       context_start=2),                                    # for a laptop CPU
    **{f"jit_{name}{p}": preset(image_size=16 * p, patch_size=p, **size)
       for name, size in SIZES.items() for p in (16, 32)},
}
