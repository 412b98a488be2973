"""Every test. Each says in one line what it holds to be true.

    python -m pytest test_all.py               # under five minutes on two CPU cores
    SLOW=1 python -m pytest test_all.py        # with the proofs that train to a threshold and start processes, 15 minutes
    SLOW=2 python -m pytest test_all.py        # with longer ones as well, which CI leaves out

"As released" means: as the released code of the papers computed it, from weights and inputs that are functions of names and
seeds (`fill`, `inputs`), so that a few numbers carried over here pin down a whole network or sampler.
"""
import argparse
import collections
import contextlib
import copy
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import bench
import data
import diffusion
import dit
import fid
import sample
import train
import udit
import unet
import uvit

HERE = Path(__file__).parent
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes minutes; set SLOW=1")
by_hand = pytest.mark.skipif(os.environ.get("SLOW") != "2", reason="takes up to an hour; set SLOW=2")


def fill(state_dict, keep=()):
    """Weights from names and shapes alone, as those of the released outputs: N(0, 1/fan_in) for matrices, and so on."""
    out = {}
    for name, p in state_dict.items():
        z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(p.shape))
        if name.endswith("logit_scale"):
            z = np.log(10.0) + 0.1 * z
        elif name.endswith("pos_embed"):
            z = 0.02 * z
        elif p.ndim >= 2:
            z = z / np.sqrt(np.prod(p.shape[1:]))
        else:
            z = 0.1 * z + (1.0 if name.endswith("weight") else 0.0)
        out[name] = p.clone() if name in keep else torch.from_numpy(np.asarray(z)).to(p.dtype)
    return out


def inputs(shape, num_classes=0, text=None, times=(0.0, 1.0)):
    """x ~ N(0, 1) of this shape, times evenly spaced, labels or text features."""
    rng = np.random.RandomState(0)
    x = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    t = torch.from_numpy(np.linspace(*times, shape[0]).astype(np.float32))
    y = torch.from_numpy(rng.randint(0, num_classes, shape[0])) if num_classes else None
    return x, t, torch.from_numpy(rng.standard_normal((shape[0], *text)).astype(np.float32)) if text else y


def relative(a, b):
    """Largest difference over the largest value."""
    b = torch.as_tensor(b, dtype=torch.float64)
    return ((a.double() - b).abs().max() / b.abs().max()).item()


def same(a, b):
    """Two state dicts hold the same numbers, to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def for_all(number=25, **kinds):
    """A test of a property, on so many examples that hypothesis chooses, always the same ones: for_all(n=(1, 9), w=(0.0, 1.0), name=["a", "b"]).

    Two integers or floats are a range, with both ends; a list is a choice. Skipped where hypothesis is not installed.
    """
    try:
        from hypothesis import given, settings, strategies
    except ImportError:
        return pytest.mark.skip(reason="pip install hypothesis")

    def strategy(kind):
        if isinstance(kind, list):
            return strategies.sampled_from(kind)
        return (strategies.integers if isinstance(kind[0], int) else strategies.floats)(*kind)

    examples = given(**{name: strategy(kind) for name, kind in kinds.items()})
    return lambda test: settings(max_examples=number, derandomize=True, deadline=None, database=None)(examples(test))


# ---------------------------------------------------------------------------------------------------------------------
# uvit.py

NARROW = dict(width=128, depth=4, heads=4)
TINY = dict(image_size=8, patch_size=2, width=32, depth=2, heads=2)


@pytest.mark.parametrize("name, arguments, shape, given, norm, values", [
    ("uvit_s2", {}, (3, 3, 32, 32), dict(times=(1, 998)), 0.9031417,
     [-0.612599, 1.595028, 1.240531, 0.271292, -0.843035, -0.81015, 0.535501, -1.019484]),
    ("uvit_h2", dict(**NARROW, in_channels=4, num_classes=1000), (2, 4, 32, 32), dict(num_classes=1001, times=(1, 1000)), 1.0110754,
     [0.656006, 0.410883, -0.289743, -1.516775, -0.295461, -0.282028, 0.949129, 0.301968]),
    ("uvit_s4", dict(**NARROW, skip="none"), (2, 3, 32, 32), dict(times=(1, 998)), 0.9151295,
     [0.021949, -0.231241, -0.207888, -1.047156, 0.301134, -0.579723, -0.499265, -0.082947]),
    ("uvit_s2", dict(**NARROW, in_channels=4, text_dim=768), (2, 4, 32, 32), dict(text=(77, 768), times=(1, 1000)), 0.953997,
     [0.048075, 0.346678, -0.004667, 0.234961, 0.644596, -0.9475, -0.388992, 0.46152]),
], ids=["s2", "h2-labels", "s4-noskip", "s2-text"])
@torch.no_grad()
def test_uvit_computes_what_the_released_network_does(name, arguments, shape, given, norm, values):
    """Eight numbers of the output and its norm are as released, within 1e-5."""
    model = uvit.MODELS[name](**arguments)
    model.load_state_dict(fill(model.state_dict()))
    out = model(*inputs(shape, **given))
    assert out.shape == shape
    assert relative(out.flatten()[::out.numel() // 8], values) < 1e-5
    assert out.square().mean().sqrt().item() == pytest.approx(norm, rel=1e-5)


UVIT_RELEASED = [   # checkpoint, model, arguments, hash of its names and shapes, M parameters, GMACs of one image
    ("cifar10_uvit_small", "uvit_s2", {}, "b38ffe35bab000aa", 44.26, 12.20),
    ("celeba64_uvit_small", "uvit_s4", dict(image_size=64), "ecb30627c7534fdf", 44.29, 12.21),
    ("imagenet64_uvit_mid", "uvit_m4", dict(image_size=64, num_classes=1000, null_class=False), "928cf19184638c83", 130.94, 35.24),
    ("imagenet64_uvit_large", "uvit_l4", dict(image_size=64, num_classes=1000, null_class=False), "b51cfc0d8100fbf5", 286.83, 76.47),
    ("imagenet256_uvit_large", "uvit_l2", dict(in_channels=4, num_classes=1000), "da42ca0b04b6afc3", 286.76, 76.46),
    ("imagenet256_uvit_huge", "uvit_h2", dict(in_channels=4, num_classes=1000), "74dc6939adec520f", 500.83, 133.20),
    ("imagenet512_uvit_large", "uvit_l4", dict(image_size=64, in_channels=4, num_classes=1000), "fe701646042735c4", 286.86, 76.48),
    ("imagenet512_uvit_huge", "uvit_h4", dict(image_size=64, in_channels=4, num_classes=1000), "17c4d0081842ef08", 500.94, 133.23),
    ("mscoco_uvit_small", "uvit_s2", dict(in_channels=4, text_dim=768), "146261d6158fe797", 44.69, 16.23),
    ("mscoco_uvit_small_deep", "uvit_s2_deep", dict(in_channels=4, text_dim=768), "bb3aa5b9bfa1c6bd", 58.35, 21.24),
]


@pytest.mark.parametrize("checkpoint, name, arguments, names_hash, parameters, gmacs", UVIT_RELEASED, ids=[row[0] for row in UVIT_RELEASED])
def test_uvit_has_the_released_names_shapes_and_size(checkpoint, name, arguments, names_hash, parameters, gmacs):
    """Every name and shape of a released checkpoint is there and no other, so it loads strictly; the counts are the published ones."""
    with torch.device("meta"):      # shapes alone: nothing is allocated or computed
        model = uvit.MODELS[name](**arguments)
        x, t = torch.zeros(1, model.in_channels, *model.image_size), torch.zeros(1)
        y = torch.zeros(1, *model.text_shape) if model.text_shape else torch.zeros(1, dtype=torch.int64) if model.label_rows else None
        with FlopCounterMode(display=False) as counter:
            model(x, t, y)
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in model.state_dict().items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == names_hash
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=5e-3)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=5e-3)


@pytest.mark.parametrize("time_", ["token", "adaln"])
@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("skip", ["concat", "add", "none"])
def test_uvit_ablations_learn(skip, conv, time_):
    """Each variant of the paper's ablation uses all its parameters and lowers the loss on one batch in 20 steps."""
    torch.manual_seed(0)
    model = uvit.MODELS["uvit_tiny"](**TINY, skip=skip, conv=conv, time=time_)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x, t, target = torch.randn(8, 3, 8, 8), torch.linspace(0, 999, 8), torch.randn(8, 3, 8, 8)
    losses = []
    for _ in range(20):
        loss = (model(x, t) - target).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_uvit_genvit_baseline_has_no_skip_no_conv_and_no_time_token():
    """skip="none", conv=False, time="adaln" is a plain ViT: its tokens are the patches, its time enters through the norms, in float64 too."""
    model = uvit.MODELS["uvit_tiny"](**TINY, skip="none", conv=False, time="adaln")
    assert model.pos_embed.shape[1] == 16 and model.extras == 0
    assert not any("skip_linear" in name or "final_layer" in name for name in model.state_dict())
    x = torch.randn(1, 3, 8, 8).expand(2, -1, -1, -1)
    early, late = model(x, torch.tensor([1.0, 900.0]))
    assert not torch.allclose(early, late)
    assert model.double()(x.double(), torch.tensor([1.0, 900.0])).dtype == torch.float64


def test_uvit_patches_fold_back_to_where_they_were_cut():
    """unpatchify undoes the patch embedding's order (rows, columns, channels), on a rectangle too."""
    p, channels, image = 2, 3, torch.randn(2, 3, 4, 10)
    embed = uvit.PatchEmbed(p, channels, p * p * channels)
    identity = torch.eye(p * p * channels).view(-1, p, p, channels).permute(0, 3, 1, 2)    # token element (row, column, channel)
    embed.proj.weight.data, embed.proj.bias.data = identity, torch.zeros(p * p * channels)
    assert torch.allclose(uvit.unpatchify(embed(image), (2, 5), p), image)


@for_all(network=[uvit, dit], rows=(1, 7), columns=(1, 7), patch=(1, 5), channels=(1, 8))
def test_any_rectangle_is_the_same_after_patches(network, rows, columns, patch, channels):
    """Token i * columns + j holds the patch in row i and column j, channels last; unpatchify puts every one back, U-ViT's and DiT's."""
    p, image = patch, torch.randn(2, channels, rows * patch, columns * patch)
    tokens = [image[:, :, i * p:(i + 1) * p, j * p:(j + 1) * p].permute(0, 2, 3, 1).flatten(1) for i in range(rows) for j in range(columns)]
    assert torch.equal(network.unpatchify(torch.stack(tokens, dim=1), (rows, columns), p), image)


def test_uvit_takes_rectangles():
    """image_size (H, W) works, and height is not confused with width."""
    model = uvit.MODELS["uvit_tiny"](**{**TINY, "image_size": (4, 12)})
    assert model(torch.randn(2, 3, 4, 12), torch.zeros(2)).shape == (2, 3, 4, 12)
    with pytest.raises(ValueError, match="expected"):
        model(torch.randn(2, 3, 12, 4), torch.zeros(2))


def test_uvit_condition_matters():
    """The output depends on the time, on the label, and the null label is a class of its own."""
    torch.manual_seed(0)
    model = uvit.MODELS["uvit_tiny"](**TINY, num_classes=10)
    x, t = torch.randn(1, 3, 8, 8).expand(3, -1, -1, -1), torch.tensor([5.0, 5.0, 500.0])
    a, b, c = model(x, t, torch.tensor([3, 10, 3]))
    assert not torch.allclose(a, b) and not torch.allclose(a, c)
    assert uvit.MODELS["uvit_tiny"](**TINY, num_classes=10, null_class=False).label_emb.num_embeddings == 10


def test_uvit_checkpointing_changes_no_gradient():
    """checkpoint=k runs every k-th of three blocks' forward twice and gives the same gradients, bit for bit."""
    x, t, grads = torch.randn(2, 3, 8, 8), torch.rand(2), []
    for checkpoint, forwards in ((False, 3), (True, 6), (2, 5)):
        torch.manual_seed(0)
        model, calls = uvit.MODELS["uvit_tiny"](**TINY, checkpoint=checkpoint), []
        for block in (*model.in_blocks, model.mid_block, *model.out_blocks):
            block.mlp.fc1.register_forward_hook(lambda *_: calls.append(0))
        model(x, t).square().mean().backward()
        assert len(calls) == forwards
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert same(grads[0], grads[1]) and same(grads[0], grads[2])


def test_uvit_runs_in_bf16():
    """Under autocast, attention runs in bfloat16 and the output stays within 3 % of float32."""
    torch.manual_seed(0)
    model, (x, t, _) = uvit.MODELS["uvit_tiny"](image_size=8), inputs((2, 3, 8, 8), times=(1, 998))
    model.load_state_dict(fill(model.state_dict()))
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(uvit.F, "scaled_dot_product_attention", lambda q, k, v: (seen.append(q.dtype), attend(q, k, v))[1])
        exact = model(x, t)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(x, t)
    assert set(seen) == {torch.float32, torch.bfloat16}
    assert relative(rough.float(), exact) < 0.03


X8, T2 = torch.zeros(2, 3, 8, 8), torch.zeros(2)


@pytest.mark.parametrize("call, message", [
    (lambda: uvit.MODELS["uvit_tiny"](image_size=10), "multiple of patch_size 4"),
    (lambda: uvit.MODELS["uvit_tiny"](width=130, heads=4), "width 130 is not a multiple of heads 4"),
    (lambda: uvit.MODELS["uvit_tiny"](depth=3), "depth 3 is odd"),
    (lambda: uvit.MODELS["uvit_tiny"](skip="concatenate"), "'concatenate' is none of"),
    (lambda: uvit.MODELS["uvit_tiny"](time="film"), "'film' is none of"),
    (lambda: uvit.MODELS["uvit_tiny"](num_classes=10, text_dim=768), "labels or text"),
    (lambda: uvit.MODELS["uvit_tiny"](**TINY)(X8[:, :2], T2), r"x has shape \(2, 2, 8, 8\), expected \(N, 3, 8, 8\)"),
    (lambda: uvit.MODELS["uvit_tiny"](**TINY)(X8, torch.zeros(1)), r"t has shape \(1,\), expected \(2,\)"),
    (lambda: uvit.MODELS["uvit_tiny"](**TINY)(X8, T2, torch.zeros(2).long()), "unconditional"),
    (lambda: uvit.MODELS["uvit_tiny"](**TINY, num_classes=10)(X8, T2), "got none"),
    (lambda: uvit.MODELS["uvit_tiny"](**TINY, num_classes=10)(X8, T2, torch.zeros(2)), "float32"),
    (lambda: uvit.MODELS["uvit_tiny"](**TINY, text_dim=4, text_tokens=3)(X8, T2, torch.zeros(2, 4, 3)), r"\(2, 4, 3\)"),
])
def test_uvit_says_what_does_not_fit(call, message):
    """Wrong sizes and shapes raise ValueError in one line, rather than broadcast."""
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_uvit_unknown_argument_raises():
    """A misspelt argument is not swallowed."""
    with pytest.raises(TypeError, match="num_class"):
        uvit.MODELS["uvit_tiny"](num_class=10)


# ---------------------------------------------------------------------------------------------------------------------
# dit.py

DIT_BLOCKS = ["adaln_zero", "adaln", "cross", "in_context"]
DIT_COUNTS = {  # name: (M parameters, GMACs of one 4x32x32 input), as published, or recounted from the released code
    "dit_s8": (33.15, 0.36), "dit_s4": (32.95, 1.41), "dit_s2": (32.96, 6.06),
    "dit_b8": (130.88, 1.42), "dit_b4": (130.48, 5.57), "dit_b2": (130.51, 23.01),
    "dit_l8": (458.59, 5.01), "dit_l4": (458.05, 19.70), "dit_l2": (458.10, 80.70),
    "dit_xl8": (675.68, 7.39), "dit_xl4": (675.07, 29.04), "dit_xl2": (675.13, 118.62),
}


def dit_inputs(n=2, channels=3, size=(8, 8), classes=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g) if classes else None
    return torch.randn(n, channels, *size, generator=g), torch.randint(1000, (n,), generator=g).float(), y


def dit_small(**overrides):
    size = dict(image_size=8, in_channels=3, num_classes=10, patch_size=2, width=64, depth=2)
    return dit.MODELS["dit_tiny"](**{**size, **overrides})


def dit_size(model):
    """Numbers in the state dict, in millions: the published counts include the fixed position table, a buffer."""
    return sum(p.numel() for p in model.state_dict().values()) / 1e6


def dit_macs(model, size):
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model(torch.zeros(1, 4, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops() / 2e9


def test_dit_golden():
    """DiT-S/2 with given weights computes what the released code does: 8 values and the norm of its output."""
    model = dit.MODELS["dit_s2"](image_size=32, in_channels=4, num_classes=1000)
    model.load_state_dict(fill(model.state_dict(), keep=("pos_embed",)), strict=True)
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 4, 32, 32)).astype(np.float32))
    with torch.no_grad():
        out = model(x, torch.tensor([0.0, 999.0]), torch.tensor([626, 805]))
    at = [(0, 0, 0, 0), (0, 3, 5, 17), (0, 4, 31, 31), (0, 7, 16, 8),
          (1, 0, 0, 31), (1, 2, 20, 9), (1, 5, 11, 30), (1, 7, 31, 0)]
    golden = torch.tensor([-0.056203, 0.112273, -0.956446, 0.584917, -1.449399, -0.441873, 0.760771, -1.126400])
    assert out.shape == (2, 8, 32, 32)
    torch.testing.assert_close(torch.stack([out[i] for i in at]), golden, rtol=2e-5, atol=2e-5)
    assert out.norm().item() == pytest.approx(143.758911, rel=1e-5)


@pytest.mark.parametrize("name", DIT_COUNTS)
def test_dit_counts(name):
    """Parameters (with the fixed table) and multiply-adds of the twelve sizes agree with the paper within 0.5 %."""
    with torch.device("meta"):
        model = dit.MODELS[name](image_size=32, in_channels=4, num_classes=1000)
    parameters, macs = DIT_COUNTS[name]
    assert dit_size(model) == pytest.approx(parameters, rel=1e-3)
    assert dit_macs(model, 32) == pytest.approx(macs, rel=5e-3, abs=5e-3)       # published with two decimals


@pytest.mark.parametrize("block, parameters, macs", [
    ("adaln_zero", 675, 118.6), ("adaln", 600, 118.6), ("cross", 598, 137.6), ("in_context", 449, 119.4)])
def test_dit_block_counts(block, parameters, macs):
    """DiT-XL/2 in each block design has the size that the paper gives for it."""
    with torch.device("meta"):
        model = dit.MODELS["dit_xl2"](num_classes=1000, block=block)
    assert dit_size(model) == pytest.approx(parameters, rel=2e-3)
    assert dit_macs(model, 32) == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize("size, tokens", [(32, 256), (64, 1024)])
def test_dit_manifest(size, tokens):
    """Names, shapes and order of DiT-XL/2's 292 tensors are those of the released 256 and 512 checkpoints."""
    D, block = 1152, {}
    for name, rows, columns in [("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4),
                                ("adaLN_modulation.1", 6, 1)]:
        block |= {f"{name}.weight": (rows * D, columns * D), f"{name}.bias": (rows * D,)}
    expected = {
        "pos_embed": (1, tokens, D), "x_embedder.proj.weight": (D, 4, 2, 2), "x_embedder.proj.bias": (D,),
        "t_embedder.mlp.0.weight": (D, 256), "t_embedder.mlp.0.bias": (D,),
        "t_embedder.mlp.2.weight": (D, D), "t_embedder.mlp.2.bias": (D,),
        "y_embedder.embedding_table.weight": (1001, D),
        **{f"blocks.{i}.{name}": shape for i in range(28) for name, shape in block.items()},
        "final_layer.linear.weight": (32, D), "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2 * D, D), "final_layer.adaLN_modulation.1.bias": (2 * D,),
    }
    with torch.device("meta"):
        model = dit.MODELS["dit_xl2"](image_size=size, in_channels=4, num_classes=1000)
    own = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert len(own) == 292 and list(own.items()) == list(expected.items())


@pytest.mark.parametrize("block", DIT_BLOCKS)
@pytest.mark.parametrize("classes, learn_sigma", [(10, True), (0, False)])
def test_dit_zero_at_start(block, classes, learn_sigma):
    """A new network of any block design returns exactly zero, 2C channels with learn_sigma and C without."""
    model = dit_small(block=block, num_classes=classes, learn_sigma=learn_sigma)
    out = model(*dit_inputs(classes=classes))
    assert out.shape == (2, 6 if learn_sigma else 3, 8, 8) and not out.any()


def test_dit_blocks_start_as_identity():
    """adaLN-Zero: a new block returns its input bit for bit; a new block of the other designs does not."""
    x, c = torch.randn(2, 16, 64), torch.randn(2, 64)
    assert torch.equal(dit_small().blocks[0](x, c), x)
    assert not torch.equal(dit_small(block="adaln").blocks[0](x, c), x)


@pytest.mark.parametrize("block", DIT_BLOCKS)
def test_dit_learns(block):
    """Each block design lowers the loss on a fixed batch by 20 % in 30 steps of AdamW; all but the positions moves."""
    torch.manual_seed(0)
    model = dit_small(block=block, learn_sigma=False)
    x, t, y = dit_inputs(n=8)
    target = torch.randn(8, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    losses = []
    for _ in range(30):
        loss = (model(x, t, y) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    still = [name for name, p in model.state_dict().items() if torch.equal(p, before[name])]
    assert still == ["pos_embed"]                                               # fixed; all else is trained


@pytest.mark.parametrize("block", DIT_BLOCKS)
def test_dit_listens(block):
    """With other than the initial weights, the output depends on the time and on the label, image by image."""
    model = dit_small(block=block)
    model.load_state_dict(fill(model.state_dict()))
    x, t, y = dit_inputs()
    with torch.no_grad():
        out, later = model(x, t, y), model(x, t + torch.tensor([0.0, 300.0]), y)
        other = model(x, t, (y + torch.tensor([0, 1])) % 10)
    for changed in (later, other):
        torch.testing.assert_close(changed[0], out[0])
        assert (changed[1] - out[1]).abs().max() > 1e-3


@pytest.mark.parametrize("block", DIT_BLOCKS)
def test_dit_checkpoint(block):
    """Gradient checkpointing changes memory only: the same loss and gradients."""
    gradients = []
    for checkpoint in (False, True, 2):
        model = dit_small(block=block, checkpoint=checkpoint)
        model.load_state_dict(fill(model.state_dict()))
        model(*dit_inputs()).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(g is not None for g in gradients[0].values())
    for name, g in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], g, rtol=1e-5, atol=1e-7, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("block", DIT_BLOCKS)
def test_dit_autocast(block):
    """bf16 autocast runs in every design and stays near the float32 output, as does float64."""
    model = dit_small(block=block)
    model.load_state_dict(fill(model.state_dict()))
    with torch.no_grad():
        exact = model(*dit_inputs())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(*dit_inputs())
    assert (out - exact).norm() < 0.05 * exact.norm()
    x, t, y = dit_inputs()
    assert relative(model.double()(x.double(), t.double(), y), exact) < 1e-5


@pytest.mark.parametrize("block", DIT_BLOCKS)
def test_dit_rectangle(block):
    """A rectangular input runs, and the parts of an image stay where they are: unpatchify undoes the cutting."""
    model = dit_small(block=block, image_size=(8, 16))
    assert model(*dit_inputs(size=(8, 16))).shape == (2, 6, 8, 16)
    image = torch.randn(2, 3, 8, 16)
    tokens = image.unflatten(2, (4, 2)).unflatten(4, (8, 2)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    assert torch.equal(dit.unpatchify(tokens, (4, 8), 2), image)


def test_dit_positions():
    """Row 2, column 5 of a 4 x 8 grid: sine and cosine of the column, then of the row, at 10000^(-i / (D / 4))."""
    table = dit.position_table((4, 8), 16)
    f = 10000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.sin(5 * f), np.cos(5 * f), np.sin(2 * f), np.cos(2 * f)])
    assert table.shape == (1, 32, 16) and table.dtype == torch.float32
    np.testing.assert_allclose(table[0, 2 * 8 + 5].numpy(), expected, atol=1e-7)


def test_dit_loads_at_another_size():
    """Weights of one image size load with strict=True into a model of another, which keeps its own positions."""
    weights = fill(dit_small(image_size=8).state_dict())
    for size in [16, (4, 16)]:                                              # more tokens; as many, laid out differently
        model = dit_small(image_size=size)
        own = model.pos_embed.clone()
        model.load_state_dict(weights, strict=True)
        assert torch.equal(model.pos_embed, own)
        assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items() if name != "pos_embed")
        assert weights["pos_embed"].shape == (1, 16, 64)                        # the caller's dict is left alone
    with torch.device("meta"):
        model = dit_small(image_size=16)
    model.load_state_dict(weights, assign=True)                                 # a model made without memory, too
    assert torch.equal(model.pos_embed, dit_small(image_size=16).pos_embed)
    wrong = dict(weights, **{"blocks.0.attn.proj.bias": torch.zeros(3)})
    del wrong["t_embedder.mlp.0.bias"]
    with pytest.raises(RuntimeError, match="(?s)t_embedder.mlp.0.bias.*blocks.0.attn.proj.bias"):
        dit_small().load_state_dict(wrong)
    del weights["pos_embed"]
    with pytest.raises(RuntimeError, match="pos_embed"):
        dit_small().load_state_dict(weights)


def test_dit_null_class():
    """The null label is row num_classes of the table; null_class=False has no such row, num_classes=0 no table."""
    assert dit_small().y_embedder.embedding_table.weight.shape == (11, 64)
    assert dit_small(null_class=False).y_embedder.embedding_table.weight.shape == (10, 64)
    assert dit_small(num_classes=0).y_embedder is None
    x, t, y = dit_inputs()
    assert dit_small()(x, t, torch.full_like(y, 10)).shape == (2, 6, 8, 8)


def test_dit_errors():
    """Wrong arguments and inputs raise at once, in one line that names what was given."""
    with pytest.raises(TypeError, match="num_class"):
        dit_small(num_class=10)
    for wrong, match in [(dict(image_size=9), "image_size"), (dict(width=66), "width"), (dict(heads=5), "heads"),
                         (dict(block="zero"), "'zero'")]:
        with pytest.raises(ValueError, match=match) as error:
            dit_small(**wrong)
        assert "\n" not in str(error.value)
    x, t, y = dit_inputs()
    for wrong in [(x[..., :4], t, y), (x, t[:1], y), (x, t, None), (x, t, y[:1]), (x, t, y.float())]:
        with pytest.raises(ValueError, match="DiT: "):
            dit_small()(*wrong)
    with pytest.raises(ValueError, match="unconditional"):
        dit_small(num_classes=0)(x, t, y)


# ---------------------------------------------------------------------------------------------------------------------
# udit.py

UDIT_TINY = dict(image_size=16, in_channels=3, width=16, heads=2)
UDIT_VARIANTS = {
    "full": {}, "vanilla": udit.VANILLA, "dit-unet": dict(downsample="none", **udit.VANILLA), "kv-vanilla": dict(downsample="kv", **udit.VANILLA),
    "none": dict(downsample="none"), "kv": dict(downsample="kv"), "shuffle": dict(downsampler="shuffle"), "conv": dict(downsampler="conv"),
    "dot-product": dict(cosine=False), "no-rotary": dict(rotary=False), "no-ffn-conv": dict(ffn_conv=False), "plain": dict(reparam=False),
}


def filled_udit(**arguments):
    """A tiny U-DiT with weights that are not zero, and a batch for it."""
    model = udit.MODELS["udit_tiny"](**{**UDIT_TINY, **arguments})
    model.load_state_dict(fill(model.state_dict()))
    x, t, y = inputs((4, 3, *model.image_size), num_classes=model.label_rows, times=(0, 999))
    return model, (x, t, y)


@torch.no_grad()
def test_udit_computes_what_the_released_network_does():
    """Eight numbers of U-DiT-S's output are as released within 2e-5 of the largest of them (1e-5 of the whole), its norm within 1e-5."""
    model = udit.MODELS["udit_s"](num_classes=1000)
    model.load_state_dict(fill(model.state_dict()))
    out = model(*inputs((2, 4, 32, 32), num_classes=1000, times=(0, 999)))
    assert out.shape == (2, 8, 32, 32)
    assert relative(out.flatten()[::out.numel() // 8], [0.115282, -0.220933, -0.476256, -0.476085, 0.245845, -1.165088, 0.176999, -0.2467]) < 2e-5
    assert out.square().mean().sqrt().item() == pytest.approx(1.0550472, rel=1e-5)


@pytest.mark.parametrize("name, names_hash, parameters, folded, gmacs", [
    ("udit_s", "92e63b82eccc5772", 58.90, 52.05, 6.02),
    ("udit_b", "5f69ac40bc6bf660", 231.25, 204.43, 22.18),
    ("udit_l", "f191634b70ab9866", 916.34, 810.19, 84.91),
])
def test_udit_has_the_released_names_shapes_and_size(name, names_hash, parameters, folded, gmacs):
    """Every name and shape of a released checkpoint is there and no other, so it loads strictly; the counts are the published ones."""
    with torch.device("meta"), torch.no_grad():     # shapes alone: nothing is allocated or computed
        model = udit.MODELS[name](num_classes=1000)
        fold = model.fold()
        with FlopCounterMode(display=False) as counter:
            fold(torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in model.state_dict().items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == names_hash
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=5e-3)
    assert sum(p.numel() for p in fold.parameters()) / 1e6 == pytest.approx(folded, rel=5e-3)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=5e-3)


def test_udit_kv_and_token_down_sampling_cost_the_same():
    """Down-sampling keys and values alone needs as many multiply-adds as the paper's form, and fewer than attention of all tokens."""
    flops = {}
    for downsample in ("tokens", "kv", "none"):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            udit.MODELS["udit_s"](downsample=downsample, **udit.VANILLA)(torch.zeros(1, 4, 32, 32), torch.zeros(1))
        flops[downsample] = counter.get_total_flops()
    assert flops["kv"] == flops["tokens"] < 0.75 * flops["none"]


@pytest.mark.parametrize("arguments", [{}, dict(learn_sigma=False), udit.VANILLA], ids=["full", "one-output", "vanilla"])
@torch.no_grad()
def test_udit_starts_as_zero(arguments):
    """The head and every gate start at zero, so the new network returns exactly zero."""
    model = udit.MODELS["udit_tiny"](**UDIT_TINY, num_classes=5, **arguments)
    out = model(torch.randn(2, 3, 16, 16), torch.tensor([0, 999]), torch.tensor([0, 5]))
    assert out.shape == (2, 3 if arguments.get("learn_sigma") is False else 6, 16, 16)
    assert not out.any()


@pytest.mark.parametrize("arguments", UDIT_VARIANTS.values(), ids=UDIT_VARIANTS.keys())
def test_udit_ablations_learn(arguments):
    """Each variant of the paper's ablation uses all its parameters and lowers the loss on one batch in 30 steps."""
    torch.manual_seed(0)
    model = udit.MODELS["udit_tiny"](**UDIT_TINY, **arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    x, t, target = torch.randn(4, 3, 16, 16), torch.linspace(0, 999, 4), torch.randn(4, 6, 16, 16)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(model(x, t), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "plain"])
@pytest.mark.parametrize("downsample", ["tokens", "kv", "none"])
@torch.no_grad()
def test_udit_attention_is_the_formula(downsample, rotary, cosine):
    """The fused attention equals one written token by token, with complex rotations and an explicit softmax, on a rectangular grid."""
    height, width, heads, d = 4, 8, 2, 8
    attention = udit.Attention(heads * d, (height, width), heads, downsample, "shuffle", cosine, rotary)
    attention.load_state_dict(fill(attention.state_dict()))
    x = torch.randn(2, height, width, heads * d, generator=torch.Generator().manual_seed(0))

    def turned(vector, place):      # vector (heads, d) at place (row, column)
        angles = torch.tensor([place[1 - i % 2] * 10000 ** (-4 * (i // 2) / d) for i in range(d // 2)])
        z = torch.view_as_complex(vector.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones(d // 2), angles)
        return torch.view_as_real(z).flatten(-2) if rotary else vector

    expected = torch.zeros_like(x)
    for n, row, column in np.ndindex(2, height, width):
        if downsample == "kv":
            token = attention.to_q(x[n, row, column])
            cells = [(i, j) for i in range(height // 2) for j in range(width // 2)]
            pairs = [attention.to_kv(x[n, 2 * i:2 * i + 2, 2 * j:2 * j + 2].permute(2, 0, 1).flatten()).chunk(2) for i, j in cells]
            keys, places, here = pairs, [(2 * i + 0.5, 2 * j + 0.5) for i, j in cells], (row, column)
        else:
            step = 2 if downsample == "tokens" else 1
            token = attention.to_qkv(x[n, row, column])[:heads * d]
            cells = [(i, j) for i in range(row % step, height, step) for j in range(column % step, width, step)]
            keys = [attention.to_qkv(x[n, i, j])[heads * d:].chunk(2) for i, j in cells]
            places, here = [(i // step, j // step) for i, j in cells], (row // step, column // step)
        q = turned(token.unflatten(0, (heads, d)), here)
        k = torch.stack([turned(key.unflatten(0, (heads, d)), place) for (key, _), place in zip(keys, places)])
        v = torch.stack([value.unflatten(0, (heads, d)) for _, value in keys])
        logits = (k * q).sum(-1) / math.sqrt(d)                                             # (L, heads)
        if cosine:
            logits = F.cosine_similarity(k, q[None], dim=-1) * attention.logit_scale.exp()[:, 0, 0]
        expected[n, row, column] = attention.to_out.weight[:, :, 0, 0] @ (logits.softmax(0)[..., None] * v).sum(0).flatten() + attention.to_out.bias
    assert relative(attention(x), expected) < 1e-5


@torch.no_grad()
def test_udit_cosine_logits_are_bounded():
    """logit_scale above ln 100 counts as ln 100."""
    model, batch = filled_udit()
    outs = []
    for value in (math.log(100.0), 9.0):
        for name, p in model.named_parameters():
            if name.endswith("logit_scale"):
                p.fill_(value)
        outs.append(model(*batch))
    assert relative(outs[1], outs[0]) < 1e-6


@pytest.mark.parametrize("downsample", ["tokens", "kv", "none"])
@torch.no_grad()
def test_udit_takes_rectangular_images(downsample):
    """Height and width may differ, in multiples of 8."""
    model, batch = filled_udit(image_size=(8, 24), downsample=downsample)
    out = model(*batch)
    assert out.shape == (4, 6, 8, 24) and out.isfinite().all()


@torch.no_grad()
def test_udit_reparameterised_convolutions_are_their_branches():
    """A merged 1x1 equals two in a row, for few tokens and many; a merged depthwise equals the sum of its branches and the input."""
    pointwise, depthwise = udit.Pointwise(6, 8, 10), udit.Depthwise(6, {"0": 5, "1": 3, "2": 1}, shortcut=True)
    for shape in [(1, 2, 2, 6), (4, 8, 8, 6)]:
        x = torch.randn(*shape)
        z = x.permute(0, 3, 1, 2)
        assert relative(pointwise(x), pointwise[1](pointwise[0](z)).permute(0, 2, 3, 1)) < 1e-5
        branches = sum(F.conv2d(z, c.weight, c.bias, padding=c.kernel_size[0] // 2, groups=6) for c in depthwise.values())
        assert relative(depthwise(x), (branches + z).permute(0, 2, 3, 1)) < 1e-5


@pytest.mark.parametrize("arguments", UDIT_VARIANTS.values(), ids=UDIT_VARIANTS.keys())
@torch.no_grad()
def test_udit_folds_without_a_change(arguments):
    """fold() computes the same to 1e-5, leaves the original's weights alone to the last bit, and is itself a plain U-DiT's state dict."""
    model, batch = filled_udit(num_classes=5, **arguments)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    out, folded = model(*batch), model.fold()
    assert relative(folded(*batch), out) < 1e-5
    assert same(model.state_dict(), before) and torch.equal(model(*batch), out)
    assert all(p.dtype == torch.float32 for p in folded.parameters())
    downsampler = {"shuffle": "shuffle"}.get(arguments.get("downsampler"), "conv")
    plain = udit.MODELS["udit_tiny"](**{**UDIT_TINY, **arguments, "num_classes": 5, "reparam": False, "downsampler": downsampler})
    plain.load_state_dict(folded.state_dict())
    assert torch.equal(plain(*batch), folded(*batch))
    assert same(folded.fold().state_dict(), folded.state_dict())
    assert {p.data_ptr() for p in folded.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())


@for_all(4, height=[8, 16, 24], width=[8, 16], downsample=["tokens", "kv", "none"], downsampler=["shortcut", "conv", "shuffle"],
         **dict.fromkeys(["cosine", "rotary", "ffn_conv", "reparam", "learn_sigma"], [False, True]))
@torch.no_grad()
def test_udit_folds_in_any_combination(height, width, **ablations):
    """Whatever tricks are left out together, and for any rectangle, fold() computes the same to 1e-5."""
    model, batch = filled_udit(image_size=(height, width), depths=(1, 1, 1, 1, 1), num_classes=5, **ablations)
    assert relative(model.fold()(*batch), model(*batch)) < 1e-5


@torch.no_grad()
def test_udit_modes_change_no_weight():
    """train() and eval(), with calls between, leave every weight as it is, and both modes compute the same: no label is dropped inside."""
    model, batch = filled_udit(num_classes=5)
    before, out = {name: value.clone() for name, value in model.state_dict().items()}, model(*batch)
    for mode in (model.eval, model.train, model.eval, model.train):
        assert torch.equal(mode()(*batch), out)
    assert same(model.state_dict(), before)


def test_udit_gradient_checkpointing_changes_no_gradient():
    """checkpoint=k gives the gradients of the same model without it."""
    grads = []
    for checkpoint in (False, True, 2):
        model, batch = filled_udit(num_classes=5, checkpoint=checkpoint)
        model(*batch).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        with torch.no_grad():
            assert model(*batch).isfinite().all()
    for other in grads[1:]:
        assert all(torch.allclose(grads[0][name], other[name], rtol=1e-5, atol=1e-7) for name in other)


@torch.no_grad()
def test_udit_labels_and_times_reach_the_output():
    """Each label, the null label (num_classes) and each time give another output; an image's output does not depend on its batch."""
    model, (x, t, y) = filled_udit(num_classes=5)
    x, t = x[:1].repeat(6, 1, 1, 1), torch.full((6,), 500)
    out = model(x, t, torch.arange(6))
    assert min((out[i] - out[j]).abs().max() for i in range(6) for j in range(i)) > 1e-3
    assert relative(model(x[:1], t[:1], torch.tensor([3])), out[3:4]) < 1e-5
    assert (model(x, t + 1, torch.arange(6)) - out).abs().max() > 1e-4


@torch.no_grad()
def test_udit_runs_in_bfloat16_and_channels_last():
    """Autocast to bfloat16 stays within 3 % of float32; .to(memory_format=torch.channels_last) changes nothing."""
    model, batch = filled_udit(num_classes=5)
    out = model(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(*batch)
    assert ((half - out).norm() / out.norm()).item() < 0.03
    assert relative(model.to(memory_format=torch.channels_last)(*batch), out) < 1e-6
    assert relative(model.double()(*(z.double() for z in batch[:2]), batch[2]), out) < 1e-5


@pytest.mark.parametrize("arguments, words", [
    (dict(image_size=20), "multiple of 8"), (dict(width=18, heads=4), "multiple of heads"), (dict(width=12, heads=2), "rotary"),
    (dict(depths=(1, 1, 1)), "five stages"), (dict(downsample="half"), "none of"), (dict(downsampler="pool"), "none of"),
])
def test_udit_refuses_arguments_that_do_not_fit(arguments, words):
    """A wrong argument is named in one line of a ValueError, an unknown one raises TypeError."""
    with pytest.raises(ValueError, match=words) as error:
        udit.MODELS["udit_tiny"](**arguments)
    assert "\n" not in str(error.value)
    with pytest.raises(TypeError):
        udit.MODELS["udit_tiny"](patch_size=2)


def test_udit_refuses_inputs_that_do_not_fit():
    """A wrong shape, a missing, superfluous or float label raises ValueError in one line."""
    model, plain = (udit.MODELS["udit_tiny"](**UDIT_TINY, num_classes=n) for n in (5, 0))
    x, t, y = torch.zeros(2, 3, 16, 16), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    for network, given in [(model, (x[:, :2], t, y)), (model, (x[..., :8], t, y)), (model, (x, t[:1], y)), (model, (x, t, None)),
                           (model, (x, t, y.float())), (model, (x, t, y[:1])), (plain, (x, t, y))]:
        with pytest.raises(ValueError, match="UDiT: ") as error:
            network(*given)
        assert "\n" not in str(error.value)


@slow
def test_udit_compiles_whole():
    """torch.compile takes the network in one graph, and output and gradients stay the same."""
    model, batch = filled_udit(num_classes=5)
    out = model(*batch)
    out.square().mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True)(*batch)
    compiled.square().mean().backward()
    assert relative(compiled, out.detach()) < 1e-4
    assert all(((p.grad - grad).norm() / (grad.norm() + 1e-9)).item() < 1e-3 for p, grad in zip(model.parameters(), grads))


# ---------------------------------------------------------------------------------------------------------------------
# unet.py

UNET_TINY = dict(image_size=8, channels=32, multipliers=(1, 2), attention=(2,))
UNET_VARIANTS = {   # arguments, and labels or text
    "iddpm": dict(num_classes=5), "ldm": dict(text_dim=12, text_tokens=3, scale_shift=False),
    "adm": dict(num_classes=5, resample="block", multipliers=(2, 2), attention=(1, 2), learn_sigma=True),
}
every_unet = pytest.mark.parametrize("arguments", UNET_VARIANTS.values(), ids=UNET_VARIANTS.keys())


def tiny_unet(filled=True, **arguments):
    """A tiny U-Net, its weights not zero where filled, and a batch for it."""
    model = unet.MODELS["unet_tiny"](**{**UNET_TINY, **arguments})
    if filled:
        model.load_state_dict(fill(model.state_dict()))
    return model, inputs((4, 3, *model.image_size), num_classes=model.label_rows, text=model.text_shape, times=(0, 999))


@pytest.mark.parametrize("name, arguments, parameters, gmacs", [
    ("unet_cifar", {}, 53, 8.38), ("unet_adm", dict(num_classes=1000), 646, 135), ("unet_ldm_text", {}, 53, 8.41)])
def test_unet_has_the_published_size(name, arguments, parameters, gmacs):
    """Parameters and multiply-adds are as published, to the digits given (GMACs: unet_adm's; the others' are our own count)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:       # shapes alone: nothing is computed
        model = unet.MODELS[name](**arguments)
        x, t = torch.zeros(1, model.in_channels, 32, 32), torch.zeros(1)
        y = torch.zeros(1, *model.text_shape) if model.text_shape else torch.zeros(1, dtype=torch.int64) if model.label_rows else None
        assert model(x, t, y).shape == x.shape
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=0.01)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=5e-3)


@every_unet
def test_unet_starts_as_zero(arguments):
    """A new network returns exactly zero, C or 2C channels; its blocks and attention return what they were given, bit for bit."""
    model, batch = tiny_unet(filled=False, **arguments)
    assert model(*batch).shape == (4, 6 if model.head.out_channels == 6 else 3, 8, 8) and not model(*batch).any()
    assert (model.head.out_channels == 6) == arguments.get("learn_sigma", False)
    x, c, text = torch.randn(4, model.middle[0].norm1.num_channels, 2, 2), torch.randn(4, 128), batch[2] if model.text_shape else None
    assert torch.equal(model.middle(x, c, text), x)


@every_unet
def test_unet_learns(arguments):
    """Each variant uses all its parameters and lowers the loss on one batch by a third in 30 steps."""
    torch.manual_seed(0)
    model, batch = tiny_unet(filled=False, **arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    target, losses = torch.randn(4, model.head.out_channels, 8, 8), []
    for _ in range(30):
        loss = F.mse_loss(model(*batch), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert losses[-1] < 0.67 * losses[0]


@torch.no_grad()
def test_unet_blocks_are_their_formulas():
    """A residual block and both kinds of attention equal what their docstrings say, written out with an explicit softmax."""
    x, c, text = torch.randn(2, 64, 4, 6), torch.randn(2, 8), torch.randn(2, 3, 12)
    for scale_shift, resample, way in [(True, None, lambda z: z), (True, "down", lambda z: z.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))),
                                       (False, "up", lambda z: z.repeat_interleave(2, 2).repeat_interleave(2, 3))]:
        block = unet.ResBlock(64, 96, 8, scale_shift, resample)
        block.load_state_dict(fill(block.state_dict()))
        h, condition = block.conv1(way(F.silu(block.norm1(x)))), (block.condition.weight @ F.silu(c).T).T + block.condition.bias
        if scale_shift:
            h = (1 + condition[:, :96, None, None]) * block.norm2(h) + condition[:, 96:, None, None]
        else:
            h = block.norm2(h + condition[:, :, None, None])
        assert relative(block(x, c), block.shortcut(way(x)) + block.conv2(F.silu(h))) < 1e-5

    def attend(attention, z, context):
        out = []
        for q, k, v in zip(*(rows.chunk(2, dim=-1) for rows in (attention.q(z), *attention.kv(context).chunk(2, dim=-1)))):     # two heads
            out.append((q @ k.transpose(1, 2) / math.sqrt(32)).softmax(-1) @ v)
        return attention.proj(torch.cat(out, dim=-1))

    plain, transformer = unet.AttentionBlock(64, 2), unet.TransformerBlock(64, 2, 12)
    for block in (plain, transformer):
        block.load_state_dict(fill(block.state_dict()))
    z = plain.norm(x).permute(0, 2, 3, 1).reshape(2, 24, 64)
    assert relative(plain(x, None), x + attend(plain.attn, z, z).reshape(2, 4, 6, 64).permute(0, 3, 1, 2)) < 1e-5
    z = transformer.proj_in(transformer.norm(x).permute(0, 2, 3, 1).reshape(2, 24, 64))
    z = z + attend(transformer.attn, transformer.norm1(z), transformer.norm1(z))
    z = z + attend(transformer.cross_attn, transformer.norm2(z), text)
    h = transformer.fc1(transformer.norm3(z))
    z = transformer.proj_out(z + transformer.fc2(h[..., :256] * F.gelu(h[..., 256:])))
    assert relative(transformer(x, text), x + z.reshape(2, 4, 6, 64).permute(0, 3, 1, 2)) < 1e-5


@torch.no_grad()
def test_unet_skips_join_at_their_own_resolution():
    """The decoder takes every output of stem and encoder once, last in, first out, at the size that it had."""
    model, batch = tiny_unet(multipliers=(1, 2, 4), blocks=2, attention=())
    kept, joined = [], []
    for layer in (model.stem, *model.encoder):
        layer.register_forward_hook(lambda module, given, out: kept.append(out))
    for layer in model.decoder:
        layer.register_forward_hook(lambda module, given, out: joined.append(given[3]))
    model(*batch)
    assert len(kept) == 9 and all(a is b for a, b in zip(kept, reversed(joined), strict=True))
    assert [out.shape[-1] for out in kept] == [8, 8, 8, 4, 4, 4, 2, 2, 2]


@torch.no_grad()
def test_unet_labels_text_and_times_reach_the_output():
    """Each label, the null label, each text and each time give another output; an image's output does not depend on its batch."""
    model, (x, t, _) = tiny_unet(num_classes=3)
    reader, (_, _, text) = tiny_unet(text_dim=12, text_tokens=3)
    x, t = x[:1].repeat(4, 1, 1, 1), torch.full((4,), 500.0)
    for network, y in (model, torch.arange(4)), (reader, text):
        out = network(x, t, y)
        assert min((out[i] - out[j]).abs().max() for i in range(4) for j in range(i)) > 1e-3
        assert (network(x, t + 100, y) - out).abs().max() > 1e-3
        assert relative(network(x[:1], t[:1], y[3:]), out[3:]) < 1e-5
    assert tiny_unet(num_classes=3, null_class=False)[0].label_emb.num_embeddings == 3


@every_unet
def test_unet_checkpointing_changes_no_gradient(arguments):
    """checkpoint=k runs every k-th layer's forward twice and gives the same gradients, bit for bit."""
    grads = []
    for checkpoint, share in ((False, 0), (True, 1), (2, 1 / 2)):
        model, batch = tiny_unet(**arguments, checkpoint=checkpoint)
        calls, layers = [], (*model.encoder, model.middle, *model.decoder)
        for layer in layers:
            layer[0].register_forward_pre_hook(lambda *_: calls.append(0))     # (the second one ends early)
        model(*batch).square().mean().backward()
        assert len(calls) == len(layers) + math.ceil(share * len(layers))
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert same(grads[0], grads[1]) and same(grads[0], grads[2])


@every_unet
@torch.no_grad()
def test_unet_runs_in_bfloat16_and_channels_last(arguments):
    """Autocast to bfloat16 stays within 3 % of float32; .to(memory_format=torch.channels_last) and float64 change nothing."""
    model, batch = tiny_unet(**arguments)
    out = model(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(*batch)
    assert ((half - out).norm() / out.norm()).item() < 0.03
    assert relative(model.to(memory_format=torch.channels_last)(*batch), out) < 1e-5
    double = [z if z is None or not z.is_floating_point() else z.double() for z in batch]
    assert relative(model.double()(*double), out) < 1e-5


@every_unet
@torch.no_grad()
def test_unet_takes_rectangles(arguments):
    """Height and width may differ, in multiples of 2^(levels - 1), and are not confused."""
    model, batch = tiny_unet(**{**arguments, "image_size": (4, 10)})
    assert model(*batch).shape[2:] == (4, 10) and model(*batch).isfinite().all()
    with pytest.raises(ValueError, match="expected"):
        model(batch[0].transpose(2, 3), *batch[1:])


def test_unet_weights_sample_by_their_recipe(tmp_path, monkeypatch):
    """--weights of a U-Net gives its channels and classes, and IDDPM's recipe on CIFAR10 has no labels."""
    small = dict(channels=32, multipliers=(1,), blocks=1, attention=(), head_channels=32)
    for name, dataset, shape, classes in [("unet_adm", str(tmp_path), (4, 16, 16), 10), ("unet_cifar", "cifar10", (3, 16, 16), 0)]:
        monkeypatch.setitem(train.MODELS, name, unet.preset(**small))
        weights = unet.UNet(**small, image_size=16, in_channels=shape[0], num_classes=classes).state_dict()
        torch.save(weights, tmp_path / "w.pt")
        given = sample.parse(["--weights", str(tmp_path / "w.pt"), "--model", name, "--data", dataset, "--image-size", "16"])
        source = sample.open_source(given, torch.device("cpu"))
        assert (source.shape, source.num_classes, source.null) == (shape, classes, classes or None)
        assert source.settings["sampler"] == "ddpm" and isinstance(source.schedule, diffusion.DDPM)
        assert same(source.model.state_dict(), weights)


@pytest.mark.parametrize("arguments, words", [
    (dict(image_size=9), "not a multiple of 2, for 2 levels"), (dict(channels=48), "multiple of 32"), (dict(multipliers=()), "multipliers"),
    (dict(multipliers=(1, 0)), "multipliers"), (dict(blocks=0), "blocks 0"), (dict(attention=(4,)), r"not among the levels, \[1, 2\]"),
    (dict(head_channels=48), "head_channels 48"), (dict(resample="pool"), "'pool' is none of"), (dict(num_classes=2, text_dim=2), "labels or text"),
])
def test_unet_refuses_arguments_that_do_not_fit(arguments, words):
    """A wrong argument is named in one line of a ValueError, an unknown one raises TypeError."""
    with pytest.raises(ValueError, match=words) as error:
        tiny_unet(**arguments)
    assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="patch_size"):
        tiny_unet(patch_size=2)


def test_unet_refuses_inputs_that_do_not_fit():
    """A wrong shape, a missing, superfluous or float condition raises ValueError in one line."""
    (model, (x, t, y)), (reader, (_, _, text)), (plain, _) = (tiny_unet(**given) for given in (dict(num_classes=5), dict(text_dim=12, text_tokens=3), {}))
    for network, given in [(model, (x[:, :2], t, y)), (model, (x[..., :4], t, y)), (model, (x, t[:1], y)), (model, (x, t, None)),
                           (model, (x, t, y.float())), (model, (x, t, y[:1])), (reader, (x, t, None)), (reader, (x, t, text[:, :2])),
                           (reader, (x, t, y)), (plain, (x, t, y))]:
        with pytest.raises(ValueError, match="UNet: ") as error:
            network(*given)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# diffusion.py

VP, SD, DDPM = (make() for make in diffusion.SCHEDULES.values())
schedules = pytest.mark.parametrize("schedule", [VP, SD, DDPM], ids=list(diffusion.SCHEDULES))


def mixture_noise(x, alpha, sigma):
    """E[eps | x_t = x] where every pixel is drawn from N(-0.6, 0.25^2) or N(0.6, 0.25^2): a denoiser known exactly."""
    v = alpha**2 * 0.25**2 + sigma**2
    return sigma / v * (x - alpha * 0.6 * torch.tanh(alpha * 0.6 * x / v))


def exact(schedule):
    return lambda x, t: mixture_noise(x, *schedule.alpha_sigma(t))


@schedules
def test_schedule_keeps_variance_and_only_loses_signal(schedule):
    """alpha^2 + sigma^2 = 1 to rounding, log-SNR falls strictly, time() undoes half_log_snr(), all in float64."""
    t = torch.linspace(schedule.t_min, 1, 2001, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    assert alpha.dtype == sigma.dtype == torch.float64
    assert (alpha**2 + sigma**2 - 1).abs().max() < 1e-15
    assert (schedule.half_log_snr(t).diff() < 0).all()
    assert (schedule.time(schedule.half_log_snr(t)) - t).abs().max() < 1e-13
    assert schedule.alpha_sigma(0.0)[1] == 0
    step = 1e-6     # beta is the slope
    middle = torch.linspace(0.05, 0.95, 7, dtype=torch.float64) + 1e-4
    slope = -(schedule.log_alpha(middle + step) - schedule.log_alpha(middle - step)) / step
    assert relative(schedule.beta(middle), slope) < 1e-6


@for_all(schedule=[VP, SD, DDPM], s=(0.0, 1.0), t=(0.0, 1.0), n=(1, 1000), u=(0.0, 0.999))
def test_schedule_holds_at_any_time(schedule, s, t, n, u):
    """At any times s <= t: alpha^2 + sigma^2 = 1, log-SNR is higher at s, time() undoes it, model_time is linear; steps are trained on alone."""
    s, t = sorted([s, t])
    alpha, sigma = schedule.alpha_sigma(t)
    assert abs(alpha**2 + sigma**2 - 1) < 1e-15
    assert schedule.half_log_snr(s) >= schedule.half_log_snr(t) and (t - s < 1e-9 or schedule.half_log_snr(s) > schedule.half_log_snr(t))
    assert abs(schedule.time(schedule.half_log_snr(t)) - t) < 1e-13 or t < schedule.t_min
    scale, offset = {VP: (999, 0), SD: (1000, 0), DDPM: (1000, -1)}[schedule]
    assert abs((schedule.model_time(t) - offset) / scale - t) < 1e-15
    if schedule is not VP:
        time = schedule.training_time(torch.tensor((n - 1 + u) / 1000, dtype=torch.float64))
        assert time == n / 1000 and schedule.model_time(time).round() == n + offset


@pytest.mark.parametrize("schedule, t, alpha_bar", [
    (VP, [0.001, 0.125875, 0.5005, 1.0], [0.9998900560442797, 0.8434619982518934, 0.07866731764583161, 4.318574906034135e-05]),
    (SD, [0.001, 0.002, 0.5, 1.0], [0.99915, 0.9982960278384514, 0.27766965045646763, 0.004660098513077238]),
    (DDPM, [0.001, 0.002, 0.011, 0.501, 1.0], [0.9999, 0.9997800920720721, 0.997806572507846, 0.07779665836502389, 4.035829765375676e-05]),
], ids=list(diffusion.SCHEDULES))
def test_schedule_is_the_released_one(schedule, t, alpha_bar):
    """alpha^2 at a few times is as released, within 1e-7."""
    assert relative(schedule.alpha_sigma(torch.tensor(t, dtype=torch.float64))[0] ** 2, alpha_bar) < 1e-7


def test_schedule_feeds_networks_what_they_were_trained_on():
    """The network sees 999 t (VP), n in 1..1000 (SD), n - 1 in 0..999 (DDPM); discrete schedules train at these n alone."""
    assert VP.model_time(0.5) == 499.5 and SD.model_time(0.5) == 500 and DDPM.model_time(0.5) == 499
    u = torch.tensor([0.0, 0.0009, 0.001, 0.9999])
    assert VP.training_time(u).equal(u)
    assert DDPM.model_time(DDPM.training_time(u)).round().tolist() == [0, 0, 1, 999]


NOISE_5 = torch.from_numpy(np.random.RandomState(5).standard_normal((4, 3, 8, 8)))


@pytest.mark.parametrize("sampler, schedule, steps, tolerance, values", [
    # The released VP solver keeps its times in float32: hence 5e-4 at few steps.
    ("dpm_solver", VP, 10, 5e-4, [0.398750747, -0.342118526, 1.20857033, -0.308805882]),
    ("dpm_solver", VP, 20, 5e-4, [0.512033965, -0.443142162, 1.12691667, -0.383523258]),
    ("dpm_solver", VP, 50, 1e-5, [0.497618173, -0.439106046, 1.14189805, -0.389368601]),
    ("dpm_solver++", SD, 10, 1e-5, [0.491688448, -0.420155348, 0.971051863, -0.351521266]),
    ("dpm_solver++", SD, 20, 1e-5, [0.538798495, -0.50546124, 1.17122479, -0.480931025]),
    ("dpm_solver++", SD, 50, 1e-5, [0.496356477, -0.437536738, 1.16218364, -0.389365402]),
    ("euler_ode", VP, 50, 1e-6, [0.498988537, -0.439292594, 1.12390209, -0.387864416]),
    ("euler_maruyama", VP, 50, 1e-6, [1.13443762, -0.365370538, -0.0793459773, -0.869772839]),
    ("ddpm", DDPM, 50, 1e-5, [1.06810793, -0.396737045, -0.255463054, -0.859402948]),
    ("ddpm", DDPM, 250, 1e-5, [0.930513196, -0.517115915, 0.809203316, 0.445407217]),
    ("ddim", DDPM, 50, 1e-5, [0.489710077, -0.431921972, 1.08464842, -0.38194059]),
    ("ddim", DDPM, 250, 1e-5, [0.496106929, -0.437512228, 1.12997439, -0.387754011]),
])
def test_sampler_walks_as_the_released_one(sampler, schedule, steps, tolerance, values):
    """From the same noise, with a denoiser known exactly, each sampler ends where the released code does."""
    calls = []

    def denoise(x, t):
        calls.append(float(t))
        noise = mixture_noise(x, *schedule.alpha_sigma(t))
        return torch.cat([noise, torch.tanh(0.5 * x)], dim=1) if sampler == "ddpm" else noise     # .. and a learned variance

    torch.manual_seed(0)
    out = diffusion.SAMPLERS[sampler](denoise, schedule, NOISE_5, steps)
    assert relative(out[0, 0, 0, :4], values) < tolerance
    assert len(calls) == steps and calls == sorted(calls, reverse=True) and calls[0] == pytest.approx(1)


@pytest.mark.parametrize("sampler, order", [
    (diffusion.ddim, 1), (partial(diffusion.multistep, grid="log_snr"), 2), (diffusion.dpm_solver, 3)])
def test_sampler_converges_at_its_order(sampler, order):
    """Four times the evaluations divide DPM-Solver's error by 4^3 or more, the multistep one's by 4^2, and DDIM's by about 4."""
    truth = diffusion.dpm_solver(exact(VP), VP, NOISE_5, 600)
    errors = [(sampler(exact(VP), VP, NOISE_5, steps) - truth).abs().mean().item() for steps in (30, 120)]
    slope = math.log(errors[0] / errors[1]) / math.log(4)
    assert order - 0.3 < slope < order + 1


@pytest.mark.parametrize("steps, values", [
    (9, [0.471251363, -0.395551851, 0.956083893, -0.325391523]),
    (27, [0.524600288, -0.485198598, 1.21529741, -0.461751301]),
    (37, [0.502000597, -0.448950408, 1.20485615, -0.410899541])])
@pytest.mark.parametrize("run_diffusers", [False, True])
def test_multistep_solver_walks_as_that_of_diffusers(steps, values, run_diffusers):
    """DPM-Solver++(2M) agrees with diffusers' DPMSolverMultistepScheduler, on the same times (steps that divide 999)."""
    ours = diffusion.SAMPLERS["dpm_solver++2m"](exact(SD), SD, NOISE_5, steps)
    assert relative(ours[0, 0, 0, :4], values) < 1e-5
    if run_diffusers:
        solver = pytest.importorskip("diffusers").DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", algorithm_type="dpmsolver++",
            final_sigmas_type="sigma_min", timestep_spacing="linspace")
        solver.set_timesteps(steps)
        x = NOISE_5
        for n in solver.timesteps:
            x = solver.step(exact(SD)(x, (float(n) + 1) / 1000), n, x).prev_sample
        assert relative(ours, x) < 1e-5


@pytest.mark.parametrize("sampler", list(diffusion.SAMPLERS))
@schedules
def test_sampler_returns_the_data_on_every_schedule(sampler, schedule):
    """On data of one known image every sampler, on every schedule, comes back to that image."""
    image = torch.linspace(-1, 1, 3 * 64, dtype=torch.float64).view(1, 3, 8, 8)

    def denoise(x, t):
        alpha, sigma = schedule.alpha_sigma(t)
        return (x - alpha * image) / sigma

    torch.manual_seed(0)
    out = diffusion.SAMPLERS[sampler](denoise, schedule, torch.randn(1, 3, 8, 8, dtype=torch.float64), 60)
    assert (out - image).abs().mean() < 0.04    # the solvers stop at t_min, where a little noise is left


def test_vp_loss_is_the_mean_squared_error_of_the_noise():
    """A network that answers eps + 2 has loss 4 for each image; the network sees x_t, 999 t and y."""
    x0, y, t, noise = torch.randn(3, 3, 8, 8), torch.arange(3), torch.tensor([0.1, 0.5, 0.9]), torch.randn(3, 3, 8, 8)

    def network(x, time, label):
        alpha, sigma = VP.alpha_sigma(t)
        assert torch.allclose(x, alpha.float().view(-1, 1, 1, 1) * x0 + sigma.float().view(-1, 1, 1, 1) * noise)
        assert torch.allclose(time, 999 * t) and label is y and x.dtype == time.dtype == torch.float32
        return noise + 2

    assert torch.allclose(VP.loss(network, x0, y, t, noise), torch.full((3,), 4.0))
    assert VP.loss(lambda x, t, y: torch.zeros_like(x), x0).shape == (3,)      # draws t and noise itself


def test_hybrid_loss_is_the_released_one():
    """Mean squared error plus the variational bound in bits, its t = 0 term included, at six times, as released."""
    rng = np.random.RandomState(6)
    x0 = (0.6 * rng.choice([-1, 1], (6, 3, 8, 8)) + 0.25 * rng.standard_normal((6, 3, 8, 8))).clip(-1, 1)
    noise, index = torch.from_numpy(rng.standard_normal((6, 3, 8, 8))), torch.tensor([0, 1, 50, 400, 800, 999])

    def network(x, time, y):
        alpha, sigma = (a.view(-1, 1, 1, 1) for a in DDPM.alpha_sigma((time + 1) / 1000))
        return torch.cat([mixture_noise(x, alpha, sigma), torch.tanh(0.5 * x)], dim=1)

    loss = DDPM.loss(network, torch.from_numpy(x0), None, (index + 1) / 1000, noise)
    released = [3.385567185056537, 1.4348820350454692, 0.7623813515509977, 0.08214278904643459, 0.0006186056173906069, 1.684137092272597e-05]
    assert ((loss - torch.tensor(released, dtype=torch.float64)).abs() / loss).max() < 1e-5


def test_variational_bound_trains_the_variance_alone():
    """The bound gives the noise half of the output no gradient, and the variance half one."""
    out = torch.randn(2, 6, 4, 4, requires_grad=True)
    x0, noise = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    total, = torch.autograd.grad(DDPM.loss(lambda x, t, y: out, x0, None, torch.tensor([0.001, 0.5]), noise).sum(), out)
    simple, = torch.autograd.grad((out[:, :3] - noise).square().flatten(1).mean(1).sum(), out)
    assert torch.equal(total[:, :3], simple[:, :3]) and total[:, 3:].abs().min() > 0


def test_loss_and_samplers_refuse_other_outputs():
    """A learned variance without a schedule that trains it, and a wrong number of channels, raise in one line."""
    with pytest.raises(ValueError, match="learn_sigma=False"):
        VP.loss(lambda x, t, y: torch.cat([x, x], 1), torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="expected 3 or 6 channels"):
        VP.loss(lambda x, t, y: x[:, :1], torch.zeros(2, 3, 4, 4))


def test_guidance_mixes_both_halves_in_one_call():
    """eps = eps_u + w (eps_c - eps_u) on the chosen channels, variance from the condition, one batch of both."""
    calls = []

    def network(x, t, y):
        calls.append((len(x), y.tolist()))
        return y.view(-1, 1, 1, 1) * torch.ones(len(x), 8, 2, 2)

    x, y = torch.zeros(2, 4, 2, 2), torch.tensor([1, 2])
    out = diffusion.guide(network, DDPM, y, null=10, w=3.0)(x, 0.5)
    assert calls == [(4, [1, 2, 10, 10])]
    assert out[:, 0, 0, 0].tolist() == [10 + 3 * (1 - 10), 10 + 3 * (2 - 10)] and out[:, 4, 0, 0].tolist() == [1, 2]
    three = diffusion.guide(network, DDPM, y, null=10, w=3.0, channels=3)(x, 0.5)
    assert three[0, :, 0, 0].tolist() == [-17, -17, -17, 1, 1, 1, 1, 1]
    text = diffusion.guide(lambda x, t, y: y.mean((1, 2)).view(-1, 1, 1, 1).expand_as(x), SD, torch.ones(2, 5, 7), torch.zeros(5, 7), w=2.0)
    assert text(x, 0.5).unique().tolist() == [2]


@for_all(a=(-10.0, 10.0), b=(-10.0, 10.0), channels=(1, 4), size=(1, 5), learned=[False, True])
def test_guidance_is_linear_in_its_weight(a, b, channels, size, learned):
    """Between any two weights the guided noise lies on the line through both; channels that are not guided, and the variance, never move."""
    x, y, scale = torch.randn(2, 4, size, 3, dtype=torch.float64), torch.tensor([1, 2]), torch.randn(11, dtype=torch.float64)

    def network(x, t, y):
        return (scale[y].view(-1, 1, 1, 1) + x).sin().repeat(1, 1 + learned, 1, 1)

    at_a, at_b, middle, none = (diffusion.guide(network, DDPM, y, 10, w, channels)(x, 0.5) for w in (a, b, (a + b) / 2, 1.0))
    assert (middle - (at_a + at_b) / 2).abs().max() < 1e-12
    assert torch.equal(at_a[:, channels:], none[:, channels:]) and none.shape == (2, 8 if learned else 4, size, 3)


def test_guidance_of_weight_one_costs_one_pass():
    """w = 1 calls the network once, on the batch alone; another w without a null condition raises."""
    sizes = []
    diffusion.guide(lambda x, t, y: (sizes.append(len(x)), x)[1], VP, torch.tensor([1, 2]), null=10, w=1.0)(torch.zeros(2, 3, 2, 2), 0.5)
    assert sizes == [2]
    with pytest.raises(ValueError, match="guidance w = 2"):
        diffusion.guide(lambda x, t, y: x, VP, torch.tensor([1]), w=2.0)
    with pytest.raises(ValueError, match="guidance w = 2"):
        diffusion.guide(lambda x, t, y: x, VP, None, null=10, w=2.0)


def test_clamped_prediction_stays_in_range():
    """clamp_x0 limits the x_0 that a denoiser implies, leaves what lies inside alone, and keeps a learned variance."""
    x, t = torch.randn(2, 3, 4, 4, dtype=torch.float64), 0.9
    alpha, sigma = VP.alpha_sigma(t)
    out = diffusion.clamp_x0(lambda x, t: torch.cat([0 * x, x], 1), VP)(x, t)
    wanted = (x / alpha).clamp(-1, 1)
    assert torch.allclose((x - sigma * out[:, :3]) / alpha, wanted) and torch.equal(out[:, 3:], x)


def test_image_noise_depends_on_seed_and_index_alone():
    """Whatever the batch it is drawn in, image 7 gets the same numbers, fresh ones at each call."""
    x = torch.empty(3, 2, 4, 4)
    one, other = diffusion.ImageNoise(0, [5, 7, 9]), diffusion.ImageNoise(0, [7])
    first, second = one(x), one(x)
    assert torch.equal(first[1], other(x[:1])[0]) and torch.equal(second[1], other(x[:1])[0])
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    assert not torch.equal(first, diffusion.ImageNoise(1, [5, 7, 9])(x))


# ---------------------------------------------------------------------------------------------------------------------
# data.py


def write_images(root, count=4, size=(20, 12), seed=0):
    """`count` random PNGs in a folder, and their path."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(root / f"{i}.png")
    return root


def test_shapes_are_a_function_of_the_index():
    """Image i is the same in every set, of class i % 10, whatever the set's length."""
    few, many = data.shapes(length=30), data.shapes(length=50)
    assert torch.equal(few.images, many.images[:30]) and few.labels.tolist() == [i % 10 for i in range(30)]
    assert few.shape == (3, 16, 16) and few.num_classes == 10
    assert data.shapes(image_size=24, length=2).shape == (3, 24, 24)


def test_shapes_can_be_told_apart_by_the_nearest_drawn_one():
    """The rule is right on 500 drawn images it does not hold, and calls noise, grey and other colours far."""
    new = data.shapes(length=1500)
    label, distance = data.nearest_shape(new.images[1000:])
    assert torch.equal(label, new.labels[1000:]) and distance.max() < 20
    noise = torch.randint(0, 256, (50, 3, 16, 16), dtype=torch.uint8)
    swapped = new.images[1000:1001, [2, 1, 0]]      # a blue disc
    assert min(data.nearest_shape(x)[1].min() for x in (noise, torch.full((1, 3, 16, 16), 128, dtype=torch.uint8), swapped)) > 20


def test_order_visits_every_image_once_an_epoch():
    """Each epoch is a permutation, another one each time, and any window of the stream can be had by itself."""
    stream = data.shuffled(10, seed=3, start=0, count=30)
    epochs = stream[:, 0].reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and not (epochs[0] == epochs[1]).all()
    assert (data.shuffled(10, 3, 7, 9) == stream[7:16]).all()
    assert not (data.shuffled(10, 4, 0, 10)[:, 0] == stream[:10, 0]).all()
    assert stream.shape == (30, 2) and len(set(stream[:, 1])) == 30 and 0 <= stream.min() <= stream.max() < 2**31


def test_folder_flat_and_with_classes(tmp_path):
    """Images alone are unconditional; sub-folders are classes in the order of their names."""
    flat = data.load(write_images(tmp_path / "flat"), image_size=8)
    assert flat.shape == (3, 8, 8) and len(flat) == 4 and flat.labels is None and flat.num_classes == 0
    write_images(tmp_path / "sorted" / "b", 2)
    write_images(tmp_path / "sorted" / "a" / "deeper", 3)
    classes = data.load(tmp_path / "sorted", image_size=8)
    assert classes.class_names == ("a", "b") and classes.labels.tolist() == [0, 0, 0, 1, 1]


def test_large_folders_are_read_by_workers_to_the_same_batches(tmp_path, monkeypatch):
    """A set too large for memory gives the same images and labels in the same order, through worker processes."""
    for name in "ab":
        write_images(tmp_path / name, 3, seed=ord(name))
    order = [np.array([[5, 0], [0, 0], [3, 0]]), np.array([[1, 0], [1, 0]])]
    small = list(data.load(tmp_path, image_size=8).batches(order, "cpu"))
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    large = data.load(tmp_path, image_size=8)
    assert isinstance(large, data.ImagesOnDisk)
    for (images, labels), (expected, wanted) in zip(large.batches(order, "cpu", workers=2), small, strict=True):
        assert torch.equal(images, expected) and torch.equal(labels, wanted)
    (tmp_path / "a" / "1.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"a/1.png: not a readable image") as error:
        list(large.batches(order, "cpu", workers=2))
    assert "Traceback" not in str(error.value)


def test_images_are_prepared_on_the_training_device():
    """prepare scales 0..255 to [-1, 1] and mirrors exactly the images it is told to."""
    dataset = data.ImagesInMemory(torch.tensor([0, 255, 51, 204], dtype=torch.uint8).view(1, 1, 2, 2))
    (images, labels), = dataset.batches([np.array([[0, 0], [0, 0]])], "cpu")
    x = dataset.prepare(images, torch.tensor([False, True]))
    assert labels is None and torch.allclose(x[0, 0], torch.tensor([[-1, 1], [-0.6, 0.6]])) and torch.equal(x[1], x[0].flip(-1))
    assert torch.equal(data.to_uint8(x[:1]), images[:1])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    """Grey, palette, transparent, CMYK, 16-bit and one-bit files are read; a white one stays white."""
    white = Image.fromarray(np.full((9, 7), 65535, np.uint16)) if mode == "I;16" else Image.new("RGB", (7, 9), "white").convert(mode.replace("LA", "L")).convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    white.save(path)
    image = data.read_image(path, 8)
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8 and image.min() >= 253


def test_grid_has_a_row_for_each_label(tmp_path):
    """save_grid puts image i into row i % rows, fills up with white, and refuses what is not a picture."""
    images = torch.arange(5, dtype=torch.uint8).mul(10).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    data.save_grid(images, tmp_path / "x.png", rows=2)
    pixels = np.asarray(Image.open(tmp_path / "x.png"))[3::6, 3::6, 0]
    assert pixels.tolist() == [[0, 20, 40], [10, 30, 255]]
    with pytest.raises(ValueError, match="needs 3 channels, these images have 4"):
        data.save_grid(torch.zeros(2, 4, 8, 8, dtype=torch.uint8), tmp_path / "x.png")


def test_images_are_cropped_at_the_centre(tmp_path):
    """A wide picture keeps its middle: box-halved, scaled to the short side, cropped."""
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert data.read_image(tmp_path / "wide.png", 16).float().mean() > 250
    assert data.read_image(tmp_path / "wide.png", 32).min() == 255     # no scaling: pixel for pixel


@for_all(width=(1, 90), height=(1, 90), size=(1, 40), grey=(0, 255))
def test_image_of_any_size_is_cropped_to_a_square(width, height, size, grey):
    """Any rectangle becomes size x size, a constant one keeps its colour, and one whose short side is `size` its pixels in the middle."""
    def read(image, size):
        file = io.BytesIO()
        image.save(file, "png")
        return data.read_image(file, size)

    plain = read(Image.new("RGB", (width, height), (grey, 0, 255)), size)
    assert plain.shape == (3, size, size) and plain.dtype == torch.uint8
    assert torch.equal(plain, torch.tensor([grey, 0, 255], dtype=torch.uint8).view(3, 1, 1).expand_as(plain))
    pixels, short = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8), min(width, height)
    top, left = (height - short) // 2, (width - short) // 2
    assert torch.equal(read(Image.fromarray(pixels), short).permute(1, 2, 0), torch.from_numpy(pixels[top:top + short, left:left + short]))


@pytest.mark.parametrize("make, message", [
    (lambda root: root / "none", "no such data set or folder"),
    (lambda root: write_images(root) / "0.png", "not a folder"),
    (lambda root: (root / "empty", (root / "empty").mkdir())[0], "holds no image"),
    (lambda root: (root, (root / "classes" / "a").mkdir(parents=True))[0] / "classes", "a: class folder without an image"),
    (lambda root: (write_images(root), write_images(root / "dogs"))[0], "images beside folders"),
    (lambda root: (write_images(root), (root / "1.png").write_bytes(b"x"))[0], r"1\.png: not a readable image"),
    (lambda root: (write_images(root), (root / "2.png").write_bytes((root / "2.png").read_bytes()[:300]))[0], r"2\.png: not a readable image"),
])
def test_bad_folders_are_named(tmp_path, make, message):
    """What can not be read raises in one line with the name of the folder or file."""
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        data.load(make(tmp_path), image_size=8)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_cifar10_from_torchvision_or_from_folders(tmp_path, monkeypatch):
    """CIFAR10 comes from torchvision's files (here a stand-in), or from class folders; a failed download says what to do."""
    class StandIn:
        data, targets = np.arange(2 * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 32, 32, 3), [3, 7]

        def __init__(self, root, train, download):
            assert train and download and root == tmp_path

    monkeypatch.setattr(data.torchvision.datasets, "CIFAR10", StandIn)
    dataset = data.load("cifar10", tmp_path)
    assert dataset.images.shape == (2, 3, 32, 32) and dataset.labels.tolist() == [3, 7] and dataset.class_names[3] == "cat"
    assert (dataset.images[1].permute(1, 2, 0).numpy() == StandIn.data[1]).all()
    small = data.load("cifar10", tmp_path, 16)      # means of 2 x 2 pixels
    assert small.shape == (3, 16, 16) and small.images[0, 1, 0, 2] == StandIn.data[0, :2, 4:6, 1].mean().round()
    for name in data.CIFAR10_CLASSES:
        write_images(tmp_path / "train" / name, 1, (32, 32))
    assert data.load("cifar10", tmp_path).labels.tolist() == list(range(10))

    def fails(root, train, download):
        raise OSError("no route to host")

    monkeypatch.setattr(data.torchvision.datasets, "CIFAR10", fails)
    with pytest.raises(FileNotFoundError, match=r"no route to host.*cifar-10-python.tar.gz.*--data-dir"):
        data.load("cifar10", write_images(tmp_path / "elsewhere"))


def test_celeba_is_cropped_as_in_the_paper(tmp_path, monkeypatch):
    """Rows 57..185 and columns 25..153 of an aligned image, at 64; found in three places; else it says what to fetch."""
    pixels = np.random.default_rng(0).integers(0, 256, (218, 178, 3), dtype=np.uint8)
    for i, place in enumerate(["celeba/img_align_celeba", "img_align_celeba", "."]):
        (tmp_path / str(i) / place).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / str(i) / place / "000001.png")
        dataset = data.load("celeba64", tmp_path / str(i))
        face = Image.fromarray(pixels[57:185, 25:153]).resize((64, 64), Image.BILINEAR)
        assert dataset.shape == (3, 64, 64) and dataset.num_classes == 0 and dataset.flip
        assert torch.equal(dataset.images[0], torch.from_numpy(np.array(face)).permute(2, 0, 1))
    assert torch.equal(data.load("celeba64", tmp_path / "0", image_size=128).images[0].permute(1, 2, 0),
                       torch.from_numpy(pixels[57:185, 25:153]))
    monkeypatch.setattr(data, "list_images", lambda root: (list(range(202_599)), None, ()))
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    assert len(data.load("celeba64", tmp_path / "0")) == 162_770
    monkeypatch.undo()
    write_images(tmp_path / "small", 1)
    with pytest.raises(ValueError, match="0.png: 20x12, not an aligned image of CelebA"):
        data.load("celeba64", tmp_path / "small")

    def fails(root, download):
        raise RuntimeError("too many\nusers")

    monkeypatch.setattr(data.torchvision.datasets, "CelebA", fails)
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"none, and the download failed \(too many users\); unpack img_align_celeba.zip"):
        data.load("celeba64", tmp_path / "none")


def test_imagenet64_comes_from_class_folders(tmp_path, monkeypatch):
    """Class folders in the data folder or its train/, at 64x64, their names the classes; anything else is refused."""
    write_images(tmp_path / "n02", 1)
    write_images(tmp_path / "n01", 2, (80, 70))
    dataset = data.load("imagenet64", tmp_path)
    assert dataset.class_names == ("n01", "n02") and dataset.labels.tolist() == [0, 0, 1] and dataset.shape == (3, 64, 64)
    write_images(tmp_path / "train" / "n03", 1)
    assert data.load("imagenet64", tmp_path).class_names == ("n03",)
    with pytest.raises(ValueError, match="not a folder for each class"):
        data.load("imagenet64", tmp_path / "n01")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder data/imagenet; put ImageNet's class folders"):
        data.load("imagenet64")


def write_latents(root, count=6, classes=2, text=None, shape=(4, 8, 8), done=True, image_size=64):
    """A small encoded folder: random moments, and labels (0, 1, 0, ..) or image i with 1 + i % 3 captions of (tokens, width)."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    captions = np.concatenate([[0], np.cumsum(1 + np.arange(count) % 3)])
    arrays = {"moments": rng.standard_normal((count, 2, 2 * shape[0], *shape[1:])).astype(np.float16),
              "moments_done": np.ones(count, np.uint8)}
    if text:
        arrays |= {"text": rng.standard_normal((captions[-1], *text)).astype(np.float16), "captions": captions,
                   "text_done": np.full(captions[-1], done, np.uint8), "null": rng.standard_normal(text).astype(np.float16)}
    elif classes:
        arrays["labels"] = np.arange(count) % classes
    for name, array in arrays.items():
        np.save(root / f"{name}.npy", array)
    (root / "encoding.json").write_text(json.dumps(dict(
        autoencoder="none", clip="none" if text else None, scale=0.5, image_size=image_size, count=count, shape=shape, text=text,
        class_names=[] if text else [f"n{i}" for i in range(classes)])))
    return root


def test_latents_are_drawn_from_the_gaussians_of_image_or_mirror(tmp_path):
    """x_0 = scale (mean + std noise), of the mirror where asked; in the file's type until then; labels beside them."""
    dataset = data.load(write_latents(tmp_path / "latents"))
    stored = torch.from_numpy(np.load(tmp_path / "latents" / "moments.npy"))
    (moments, y), = dataset.batches([np.array([[3, 0], [0, 7], [3, 1]])], "cpu")
    assert torch.equal(moments, stored[[3, 0, 3]]) and moments.dtype == torch.float16 and y.tolist() == [1, 0, 1]
    assert dataset.shape == (4, 8, 8) and dataset.num_classes == 2 and dataset.text is dataset.null is None and len(dataset) == 6
    assert dataset.encoding["scale"] == 0.5
    mirror, noise = dataset.draws(1000, torch.Generator().manual_seed(0))
    assert 400 < mirror.sum() < 600 and noise.shape == (1000, 4, 8, 8) and abs(noise.std() - 1) < 0.01
    mirror, noise = torch.tensor([False, True, True]), noise[:3]
    mean, log_variance = moments.float()[[0, 1, 2], [0, 1, 1]].split(4, dim=1)
    expected = 0.5 * (mean + log_variance.exp().sqrt() * noise)
    x0 = dataset.prepare(moments, mirror, noise)
    assert x0.dtype == torch.float32 and torch.allclose(x0, expected, atol=1e-6)
    assert dataset.prepare(torch.full((1, 2, 8, 8, 8), 1e4), mirror[:1], noise[:1]).isfinite().all()   # log variance 20 at most


def test_captions_are_chosen_by_seed_and_place(tmp_path):
    """Every caption of an image comes up, about equally often; which one depends on the second column alone; no mirroring."""
    dataset = data.load(write_latents(tmp_path / "latents", text=(5, 3)))
    text = torch.from_numpy(np.load(tmp_path / "latents" / "text.npy")).float()
    assert dataset.text == (5, 3) and dataset.num_classes == 0 and dataset.labels is None
    assert torch.equal(dataset.null, torch.from_numpy(np.load(tmp_path / "latents" / "null.npy")).float())
    places = data.shuffled(6, 0, 0, 600)
    (moments, y), = dataset.batches([places], "cpu")
    assert y.shape == (600, 5, 3) and y.dtype == torch.float32
    chosen = (y[:, None] == text[None]).flatten(2).all(-1).int().argmax(1).numpy()
    first = np.array([0, 1, 3, 6, 7, 9])            # 1, 2, 3, 1, 2, 3 captions
    assert (chosen == first[places[:, 0]] + places[:, 1] % np.array([1, 2, 3, 1, 2, 3])[places[:, 0]]).all()
    assert min((chosen == caption).sum() for caption in (3, 4, 5)) > 15
    (_, again), = dataset.batches([data.shuffled(6, 0, 570, 30)], "cpu")
    assert torch.equal(again, y[570:])
    noise = torch.zeros(600, 4, 8, 8)
    assert torch.equal(*(dataset.prepare(moments, torch.full((600,), flip), noise) for flip in (True, False)))
    assert torch.equal(dataset.examples(3), text[[0, 3, 7]])


@pytest.mark.parametrize("text", [None, (5, 3)])
def test_workers_read_the_same_latents(tmp_path, text):
    """Reading in two processes gives what reading in this one does, and so does a process that was not forked."""
    dataset = data.load(write_latents(tmp_path / "latents", text=text))
    order = [data.shuffled(6, 0, start, 4) for start in (0, 4, 8)]
    for (a, b), (c, d) in zip(dataset.batches(order, "cpu"), dataset.batches(order, "cpu", workers=2), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert len(pickle.dumps(dataset)) < 5000        # the path travels to such a process, not the file


def test_kind_names_the_recipe_without_reading(tmp_path):
    """Names stand for themselves; folders are "folder", or the set of the papers that their encoding is like."""
    assert [data.kind(name) for name in data.DATASETS] == list(data.DATASETS)
    assert data.kind(write_images(tmp_path / "images")) == "folder"
    assert data.kind(write_latents(tmp_path / "a")) == "imagenet256"
    assert data.kind(write_latents(tmp_path / "b", classes=0)) == "latents" and data.load(tmp_path / "b").labels is None
    assert data.kind(write_latents(tmp_path / "c", shape=(4, 64, 64))) == "imagenet512"
    assert data.kind(write_latents(tmp_path / "d", text=(5, 3))) == "mscoco256"
    assert data.load("imagenet256", tmp_path / "a").shape == (4, 8, 8)


@pytest.mark.parametrize("make, name, message", [
    (lambda root: write_latents(root, text=(5, 3), done=False), None, r"only 33.3% encoded \(6 of 18 .*run the same command"),
    (lambda root: (write_latents(root), (root / "encoding.json").write_text("{"))[0], None, "encoding.json is not one of data.py"),
    (lambda root: (write_latents(root), (root / "labels.npy").unlink())[0], None, "labels.npy is missing or damaged"),
    (lambda root: (write_latents(root), (root / "moments.npy").write_bytes((root / "moments.npy").read_bytes()[:5000]))[0], None,
     "moments.npy is missing or damaged"),
    (lambda root: root.mkdir(), "mscoco256", "mscoco256: no latents in .* made by: python data.py encode --images train2014 --captions"),
    (lambda root: write_latents(root, image_size=512), "imagenet256", "encoded at image size 512, not 256"),
])
def test_bad_latents_are_named(tmp_path, make, name, message):
    """Half-written, damaged and missing encodings raise in one line with the folder's name."""
    root = tmp_path / "latents"
    make(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        data.load(*((name, root, 256) if name else (root,)))
    assert str(root) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Folders of a small autoencoder (images to half their size) and a small CLIP text model, weights at random."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    vae, clip = (tmp_path_factory.mktemp(name) for name in ("vae", "clip"))
    diffusers.AutoencoderKL(block_out_channels=(8, 16), down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=4,
                            up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4).save_pretrained(vae)
    letters = [chr(c) + end for c in range(ord("a"), ord("z") + 1) for end in ("", "</w>")]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, "ca", "cat</w>"]
    (clip / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (clip / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    transformers.CLIPTokenizer.from_pretrained(clip).save_pretrained(clip)
    transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1)).save_pretrained(clip)
    return ["--autoencoder", vae, "--clip", clip, "--workers", "0", "--device", "cpu"]


def write_coco(root, count):
    """Images in class folders, and a file in COCO's format with 1 + i % 3 captions for the i-th of them."""
    for name in "ab":
        write_images(root / "images" / name, count // 2, seed=ord(name))
    names = [f"{name}/{i}.png" for name in "ab" for i in range(count // 2)]
    annotations = [{"image_id": 7 * i, "caption": f"a cat no {chr(97 + 3 * i + j)}"} for j in range(3) for i in range(count) if j <= i % 3]
    (root / "captions.json").write_text(json.dumps(
        {"type": "captions", "images": [{"id": 7 * i, "file_name": name} for i, name in enumerate(names)], "annotations": annotations}))
    return ["encode", "--images", root / "images", "--image-size", "16"], ["--captions", root / "captions.json"]


def test_encoded_images_decode_as_the_autoencoder_itself_does(tmp_path, pretrained):
    """Moments, labels and the decoder agree with diffusers' own round trip of image and mirror; scale is applied and taken back."""
    import diffusers
    flags, _ = write_coco(tmp_path, 6)
    assert command("data.py", *flags, *pretrained, "--out", tmp_path / "out", "--type", "float32", "--scale", "0.3", "--batch-size", "4") is None
    dataset, images = data.load(tmp_path / "out"), data.load(tmp_path / "images", image_size=16)
    assert dataset.shape == (4, 8, 8) and dataset.class_names == ("a", "b") and torch.equal(dataset.labels, images.labels)
    (moments, y), = dataset.batches([np.array([[i, 0] for i in range(6)])], "cpu")
    mirror = torch.tensor([False, True] * 3)
    x0 = dataset.prepare(moments, mirror, torch.zeros(6, 4, 8, 8))
    x = images.prepare(images.images, mirror)
    vae = diffusers.AutoencoderKL.from_pretrained(pretrained[1])
    with torch.no_grad():
        mean = vae.encode(x).latent_dist.mean
        assert torch.allclose(x0, 0.3 * mean, atol=1e-5)
        expected = (vae.decode(mean).sample * 127.5 + 127.5).clamp(0, 255)
        drawn = vae.encode(x).latent_dist.sample(torch.Generator().manual_seed(0))
    decoded = data.Autoencoder(dataset.encoding["autoencoder"], "cpu", dataset.encoding["scale"]).decode(x0)
    assert decoded.dtype == torch.uint8 and (decoded - expected).abs().max() <= 0.51
    noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(dataset.prepare(moments, mirror, noise), 0.3 * drawn, atol=1e-5)


def test_encoded_captions_are_clips_last_hidden_states(tmp_path, pretrained):
    """Every caption's features, and the empty string's, are what the text model gives for it alone, cut to its length."""
    import transformers
    flags, captions = write_coco(tmp_path, 6)
    out = tmp_path / "out"
    assert command("data.py", *flags, *captions, *pretrained, "--out", out, "--batch-size", "4") is None
    tokenizer, model = transformers.CLIPTokenizer.from_pretrained(pretrained[3]), transformers.CLIPTextModel.from_pretrained(pretrained[3])

    def features(caption):
        tokens = tokenizer(caption, padding="max_length", max_length=12, truncation=True, return_tensors="pt").input_ids
        assert tokens.shape == (1, 12) and tokens[0, 0] == 0
        with torch.no_grad():
            return model(tokens).last_hidden_state[0]

    dataset = data.load(out)
    assert dataset.text == (12, 16) and data.kind(out) == "mscoco256" and torch.allclose(dataset.null, features(""), atol=2e-3)
    assert np.load(out / "captions.npy").tolist() == [0, 1, 3, 6, 7, 9, 12]
    (_, y), = dataset.batches([np.array([[2, 0], [2, 1], [5, 5], [0, 9]])], "cpu")
    for row, letter in zip(y, "ghra"):
        assert torch.allclose(row, features(f"a cat no {letter}"), atol=2e-3)       # float16
    assert data.TextEncoder(pretrained[3])(["cat " * 50, ""]).shape == (2, 12, 16)
    shutil.copytree(pretrained[3], tmp_path / "clip", ignore=shutil.ignore_patterns("*token*", "vocab.json", "merges.txt"))
    with pytest.raises(ValueError, match="clip: lacks the tokenizer of its text model"):
        data.TextEncoder(tmp_path / "clip")
    content = {name: [c, "x"] for name, c in (("b/0.png", "one"), ("a/1.png", "two"))}
    (tmp_path / "simple.json").write_text(json.dumps(content))
    files, index, texts = data.read_captions(tmp_path / "simple.json", tmp_path / "images")
    assert [file.name for file in files] == ["1.png", "0.png"] and index.tolist() == [0, 2, 4] and texts == ("two", "x", "one", "x")


def test_encoding_continues_after_its_last_whole_batch(tmp_path, pretrained, monkeypatch):
    """Stopped between the rows of a batch and its mark, it begins with that batch again, and ends with the same files."""
    flags, captions = write_coco(tmp_path, 12)
    flags = [str(flag) for flag in (*flags, *captions, *pretrained, "--batch-size", "2", "--out")]
    data.main([*flags, str(tmp_path / "whole")])
    write_rows, written = data.write_rows, []

    def dies(path, first, rows):
        if (path.name, first) == ("moments_done.npy", 6):
            raise KeyboardInterrupt
        written.append((path.name, first))
        write_rows(path, first, rows)

    monkeypatch.setattr(data, "write_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        data.main([*flags, str(tmp_path / "out")])
    with pytest.raises(ValueError, match=r"only 16.7% encoded \(6 of 36 images and captions\); run the same command"):
        data.load(tmp_path / "out")
    monkeypatch.setattr(data, "write_rows", lambda *rows: (written.append((rows[0].name, rows[1])), write_rows(*rows)))
    data.main([*flags, str(tmp_path / "out")])
    assert [first for name, first in written if name == "moments.npy"] == [0, 2, 4, 6, 6, 8, 10]
    assert all((tmp_path / "out" / p.name).read_bytes() == p.read_bytes() for p in (tmp_path / "whole").iterdir())


@slow
def test_killed_encoding_continues_to_the_same_files(tmp_path, pretrained):
    """Two processes, killed (-9) in their midst, then continued by three: the files of one process never interrupted, bit for bit."""
    flags, captions = write_coco(tmp_path, 60)
    flags = ["data.py", *flags, *captions, *pretrained, "--batch-size", "2", "--out"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert shell(*flags, whole).returncode == 0
    flags.append(out)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.Popen([*torchrun, "--nproc_per_node=2", *map(str, flags)], cwd=HERE, env=environment, start_new_session=True)
    deadline = time.time() + 120
    while not (out / "encoding.json").exists() or not 4 <= np.load(out / "moments_done.npy").sum():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.005)
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)
    process.wait()
    done = int(np.load(out / "moments_done.npy").sum())
    assert 4 <= done < 60
    with pytest.raises(ValueError, match=rf"\({done} of 180 images and captions\); run the same command"):
        data.load(out)
    assert subprocess.run([*torchrun, "--nproc_per_node=3", *map(str, flags)], cwd=HERE, env=environment).returncode == 0
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}
    assert all((out / p.name).read_bytes() == p.read_bytes() for p in whole.iterdir())


def children(pid):
    """Process ids of a process and everything below it (Linux)."""
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(grandchild for child in below for grandchild in children(int(child)))]


@pytest.mark.parametrize("change, message", [
    (["--image-size", "32"], "begun with other image_size, shape"),
    (["--scale", "0.5"], "begun with other scale;"),
    (["--image-size", "17"], "would decode to another size"),
    (["--batch-size", "0"], "--image-size and --batch-size must be at least 1"),
    (["--autoencoder", HERE], "no AutoencoderKL could be read from a folder"),
    (["--captions", "none.json"], "--captions none.json: not a file of captions"),
    (["--images", "nowhere"], "nowhere: no such folder"),
    (["--images", __file__], "test_all.py: no such folder"),
    (["--workers", "-1"], "--workers at least 0"),
    (["--scale", "0.5", "--type", "float32"], "begun with other scale, type;"),
    (["--out", __file__], "test_all.py"),
    (["--out", Path(__file__) / "x"], "Not a directory"),
])
def test_encode_says_what_is_wrong_in_one_line(tmp_path, pretrained, change, message):
    """Other settings than those begun with, impossible ones and files that are not there: one line, nothing changed."""
    flags = ["data.py", *write_coco(tmp_path, 2)[0], *pretrained, "--out", tmp_path / "out"]
    assert command(*flags) is None
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    error = command(*flags, *change)
    assert error.startswith("data.py: ") and message in error and "\n" not in error
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    write_images(tmp_path / "images" / "c", 1)
    assert "begun with other count, class_names, files;" in command(*flags)


def test_missing_packages_and_captions_are_named(tmp_path, monkeypatch):
    """Without diffusers or transformers one line says what to install; captions of images that are not there are named."""
    flags, captions = write_coco(tmp_path, 2)
    flags = ["data.py", *flags, "--out", tmp_path / "out", "--device", "cpu"]
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "stabilityai/sd-vae-ft-ema: needs the package diffusers: pip install diffusers" in command(*flags)
    with pytest.raises(ValueError, match="openai/clip-vit-large-patch14: needs the package transformers: pip install transformers"):
        data.TextEncoder()
    (tmp_path / "images" / "b" / "0.png").unlink()
    assert re.search(r"^data.py: .*b/0.png: no such image, but .*captions.json has captions for it \(1 of 2 are missing", command(*flags, *captions))
    for content in ("{", "[]", "{}", '{"annotations": [{"id": 3}]}', '{"a/0.png": "not in a list"}'):
        captions[1].write_text(content)
        assert "captions.json: not a file of captions, neither COCO's nor" in command(*flags, *captions)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# train.py

SMALL = ["--model", "uvit_tiny", "--data", "shapes", "--model-args", "width=32", "heads=2", "--batch-size", "8", "--steps", "6",
         "--warmup", "2", "--log-every", "1", "--save-every", "3", "--sample-every", "0", "--device", "cpu"]


class Explosive:
    """What a malicious file would hold: code that runs when it is unpickled."""
    def __reduce__(self):
        return os.system, ("touch exploded",)


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def command(script, *arguments):
    """Run a script as the command line does, in this process. Returns its exit message, or None where it succeeded."""
    argv, handlers = sys.argv, [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    sys.argv = [script, *map(str, arguments)]
    try:
        runpy.run_path(str(HERE / script), run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers):
            signal.signal(number, handler)


def shell(*arguments, timeout=600, **environment):
    """Run Python in a process of its own, in the repository's folder, on one thread unless told otherwise."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=HERE, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of six steps."""
    out = tmp_path_factory.mktemp("run") / "whole"
    train.main([*SMALL, "--out", str(out)])
    return out


def test_recipe_is_the_papers():
    """train.py --model uvit_s2 --data cifar10 trains as the paper's table says; a flag overrides one value and no other."""
    paper = dict(batch_size=128, steps=500_000, warmup=2500, lr=2e-4, weight_decay=0.03, betas=[0.99, 0.999], schedule="vp", ema=0.9999,
                 clip_grad=0, label_dropout=0, class_cond=False, sampler="euler_maruyama", sample_steps=1000, cfg=1, clip_x0=False)
    config = vars(train.parse(["--model", "uvit_s2", "--data", "cifar10"]))
    assert {key: config[key] for key in paper} == paper and config["out"] == "runs/uvit_s2-cifar10"
    changed = vars(train.parse(["--model", "uvit_s2", "--data", "cifar10", "--lr", "1e-3"]))
    assert {key for key in config if config[key] != changed[key]} == {"lr"}


@pytest.mark.parametrize("model, dataset, values", [
    ("uvit_s4", "celeba64", dict(batch_size=128, steps=500_000, warmup=5000, betas=[0.99, 0.99], schedule="vp", sample_steps=1000)),
    ("uvit_m4", "imagenet64", dict(batch_size=1024, steps=300_000, lr=3e-4, schedule="vp", sampler="dpm_solver", label_dropout=0, cfg=1)),
    ("uvit_h2", "imagenet256", dict(batch_size=1024, steps=500_000, lr=2e-4, schedule="sd", sampler="dpm_solver++", label_dropout=0.1, cfg=1.4)),
    ("uvit_l2", "imagenet256", dict(batch_size=1024, steps=300_000, schedule="vp", sampler="dpm_solver", label_dropout=0.15, cfg=1.4)),
    ("uvit_h4", "imagenet512", dict(steps=500_000, schedule="sd", label_dropout=0.1, cfg=1.7)),
    ("uvit_l4", "imagenet512", dict(steps=500_000, schedule="vp", label_dropout=0.15, cfg=1.7)),
    ("uvit_s2_deep", "mscoco256", dict(batch_size=256, steps=1_000_000, betas=[0.9, 0.9], schedule="sd", label_dropout=0.1, cfg=2)),
    ("dit_xl2", "imagenet256", dict(batch_size=256, lr=1e-4, weight_decay=0, schedule="ddpm", sampler="ddpm", sample_steps=250, cfg=1.5)),
    ("udit_b", "imagenet256", dict(batch_size=256, steps=400_000, schedule="ddpm", betas=[0.9, 0.999], warmup=0)),
    ("dit_s2", "cifar10", dict(batch_size=256, schedule="ddpm", class_cond=None, label_dropout=0.1)),
])
def test_recipes_are_the_rows_of_the_papers_tables(model, dataset, values):
    """Each row of the papers' set-up tables is one command."""
    config = vars(train.parse(["--model", model, "--data", dataset]))
    assert {key: config[key] for key in values} == values


def test_large_batches_are_split_into_passes(run, tmp_path, monkeypatch):
    """Where --accumulate does not say it, a process takes as many passes as PASS images in each allow; nothing else changes."""
    monkeypatch.setattr(train, "PASS", 4)
    train.main([*SMALL, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "config.json").read_text())["accumulate"] == 2
    for a, b in zip(log_of(run), log_of(tmp_path)):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_run_leaves_what_it_promises(run):
    """config.json has every flag, log.jsonl a line for each report, and the loss is finite."""
    config = json.loads((run / "config.json").read_text())
    flags = re.findall(r"^  --([a-z0-9-]+)", shell("train.py", "--help").stdout, re.MULTILINE)
    assert {flag.replace("-", "_") for flag in flags} == config.keys()
    log = log_of(run)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert log[0].keys() == {"step", "loss", "lr", "grad_norm", "images_per_sec", "memory_gb", "skipped"}
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["skipped"] == 0 for line in log)
    assert [line["lr"] for line in log[:3]] == [0.002, 0.004, 0.004]       # the warm-up of two steps
    assert {p.name for p in run.iterdir()} >= {"config.json", "log.jsonl", "checkpoint.pt", "previous.pt"}


def test_stopped_and_resumed_equals_uninterrupted(run, tmp_path):
    """3 + 3 steps give the weights, averages and log of 6, to the last bit."""
    train.main([*SMALL, "--steps", "3", "--out", str(tmp_path)])
    train.main([*SMALL, "--out", str(tmp_path)])
    whole, parts = train.read_checkpoint(run / "checkpoint.pt"), train.read_checkpoint(tmp_path / "checkpoint.pt")
    assert same(whole["ema"], parts["ema"]) and same(whole["model"], parts["model"])
    assert not same(whole["ema"], whole["model"])
    assert [line["loss"] for line in log_of(run)] == [line["loss"] for line in log_of(tmp_path)]


def test_one_seed_is_one_run(run, tmp_path):
    """The same seed gives the same weights and samples, bit for bit, and another seed others; --deterministic changes no bit on a CPU."""
    try:
        train.main([*SMALL, "--deterministic", "--out", str(tmp_path / "again")])
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    train.main([*SMALL, "--steps", "1", "--seed", "1", "--out", str(tmp_path / "other")])
    assert_same_run(tmp_path / "again", run, 6)
    assert log_of(tmp_path / "other")[0]["loss"] != log_of(run)[0]["loss"]
    one, again, other = (sampled(out, tmp_path / "x.npz", "--num", 2, "--seed", seed)[0] for out, seed in ((run, 0), (tmp_path / "again", 0), (run, 1)))
    assert (one == again).all() and (one != other).mean() > 0.5


def test_accumulation_changes_nothing_but_memory(run, tmp_path):
    """Four passes of two images give the losses of one pass of eight, up to rounding; so does gradient checkpointing."""
    train.main([*SMALL, "--accumulate", "4", "--grad-checkpoint", "--out", str(tmp_path)])
    for one, four in zip(log_of(run), log_of(tmp_path), strict=True):
        assert one["loss"] == pytest.approx(four["loss"], rel=1e-4)


@pytest.mark.parametrize("flags", [["--amp", "bf16"], ["--amp", "fp16"], ["--clip-grad", "0.01"], ["--sampler", "dpm_solver"]])
def test_run_with_other_arithmetic(run, tmp_path, flags):
    """bf16, fp16 with its scaler, and clipped gradients train, draw a grid, and resume; half precision is near float32."""
    common = [*SMALL, *flags, "--sample-steps", "2", "--sample-every", "3", "--log-every", "2", "--out", str(tmp_path)]
    train.main([*common, "--steps", "3"])
    train.main(common)
    log = log_of(tmp_path)
    assert [line["step"] for line in log] == [2, 3, 4, 6] and log[-1]["skipped"] == 0
    assert log[0]["loss"] == pytest.approx(sum(line["loss"] for line in log_of(run)[:2]) / 2, rel=0.02)
    assert Image.open(tmp_path / "samples" / "0000003.png").size == (8 * 18 + 2, 10 * 18 + 2)
    weights = [train.read_checkpoint(folder / "checkpoint.pt")["model"] for folder in (tmp_path, run)]
    assert same(*weights) == (flags[0] == "--sampler")


def test_large_folder_trains_through_workers(tmp_path, monkeypatch):
    """Data too large for memory trains through reading processes as data in memory does, bit for bit."""
    for name in "ab":
        write_images(tmp_path / "images" / name, 5, (16, 16), seed=ord(name))
    common = [*SMALL, "--data", str(tmp_path / "images"), "--image-size", "16", "--workers", "2"]
    train.main([*common, "--out", str(tmp_path / "memory")])
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    train.main([*common, "--out", str(tmp_path / "disk")])
    assert same(*(train.read_checkpoint(tmp_path / kind / "checkpoint.pt")["model"] for kind in ("memory", "disk")))


def test_long_runs_keep_no_history(tmp_path, monkeypatch):
    """The average is not recorded by autograd: its parameters need no gradient, or memory would grow with every step."""
    averages, draw = [], train.draw_grid
    monkeypatch.setattr(train, "draw_grid", lambda ema, *rest: (averages.extend(ema.parameters()), draw(ema, *rest)))
    train.main([*SMALL, "--sample-every", "6", "--sample-steps", "1", "--out", str(tmp_path)])
    assert averages and not any(p.requires_grad or p.grad_fn for p in averages)


def test_changed_flags_are_named_and_used(tmp_path, capsys):
    """A resumed run says which values changed, uses them, and does nothing but say so where it is finished already."""
    train.main([*SMALL, "--steps", "3", "--out", str(tmp_path)])
    train.main([*SMALL, "--steps", "3", "--lr", "1", "--out", str(tmp_path)])
    assert "is at step 3 already" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.004
    train.main([*SMALL, "--lr", "1e-5", "--weight-decay", "0.5", "--out", str(tmp_path)])
    assert "changed since step 3: steps 3 -> 6, lr 0.004 -> 1e-05, weight_decay 0.03 -> 0.5" in capsys.readouterr().out
    group, = train.read_checkpoint(tmp_path / "checkpoint.pt")["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.5 and group["lr"] == 1e-5


def test_average_follows_its_formula(tmp_path):
    """After one step the EMA is initial + (1 - min(ema, 1 / 10)) (new - initial)."""
    torch.manual_seed(0)
    initial = train.build("uvit_tiny", dict(image_size=16, in_channels=3, num_classes=10, null_class=True, width=32, heads=2)).state_dict()
    train.main([*SMALL, "--steps", "1", "--out", str(tmp_path)])
    state = train.read_checkpoint(tmp_path / "checkpoint.pt")
    for name, first in initial.items():
        assert torch.allclose(state["ema"][name], torch.lerp(first, state["model"][name], 0.9), atol=1e-6)


def test_labels_are_dropped_at_their_rate(tmp_path, monkeypatch):
    """--label-dropout replaces that share of labels by the null label, num_classes, and leaves the others alone."""
    seen, loss = [], diffusion.VP.loss
    monkeypatch.setattr(diffusion.VP, "loss", lambda self, model, x0, y, *rest: (seen.append(y.clone()), loss(self, model, x0, y, *rest))[1])
    train.main([*SMALL, "--batch-size", "500", "--steps", "4", "--label-dropout", "0.3", "--out", str(tmp_path)])
    labels = torch.cat(seen)
    assert (labels == 10).float().mean().item() == pytest.approx(0.3, abs=0.05)
    shares = torch.bincount(labels[labels < 10], minlength=10) / (labels < 10).sum()
    assert shares.min() > 0.06 and shares.max() < 0.14


def test_unconditional_training_ignores_labels(tmp_path):
    """--no-class-cond trains a model without a label table."""
    train.main([*SMALL, "--no-class-cond", "--steps", "1", "--out", str(tmp_path)])
    state = train.read_checkpoint(tmp_path / "checkpoint.pt")
    assert state["model_args"]["num_classes"] == 0 and "label_emb.weight" not in state["model"]


def test_step_that_is_not_finite_changes_nothing(tmp_path, monkeypatch):
    """A NaN loss is skipped and counted: weights and moments stay as they were, the log stays JSON, the average finite."""
    loss, calls = diffusion.VP.loss, []

    def planted(self, *given):
        calls.append(0)
        return loss(self, *given) * (math.nan if len(calls) in (2, 3) else 1)

    monkeypatch.setattr(diffusion.VP, "loss", planted)
    train.main([*SMALL, "--ema", "0", "--steps", "1", "--out", str(tmp_path / "one")])
    calls.clear()
    train.main([*SMALL, "--ema", "0", "--steps", "3", "--out", str(tmp_path / "three")])
    one, three = (train.read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "three"))
    assert same(one["model"], three["model"]) and log_of(tmp_path / "three")[-1]["skipped"] == 2
    assert all(torch.isfinite(p).all() for p in three["ema"].values())
    moments = [state["optimizer"]["state"][0] for state in (one, three)]
    assert same(*moments)
    assert [line["loss"] is None for line in log_of(tmp_path / "three")] == [False, True, True] and three["skipped"] == 2


def test_fp16_overflow_recovers(tmp_path, monkeypatch):
    """A finite loss whose fp16 gradient overflows: the step is skipped and counted, the scale halved, and the run goes on.

    The logged loss is the mean over the steps that counted.
    """
    loss, calls = diffusion.VP.loss, []

    def planted(self, *given):
        calls.append(0)
        return loss(self, *given) * (1e35 if len(calls) in (2, 3) else 1)      # .. times the scale, 65536, is beyond float32

    flags = [*SMALL, "--amp", "fp16", "--log-every", "6", "--save-every", "6", "--out"]
    train.main([*flags, str(tmp_path / "whole")])
    monkeypatch.setattr(diffusion.VP, "loss", planted)
    train.main([*flags, str(tmp_path / "planted")])
    line, whole = log_of(tmp_path / "planted")[-1], log_of(tmp_path / "whole")[-1]
    assert line["skipped"] == 2 and whole["skipped"] == 0 and line["loss"] == pytest.approx(whole["loss"], rel=0.1)
    state = train.read_checkpoint(tmp_path / "planted" / "checkpoint.pt")
    assert state["scaler"]["scale"] == 65536 / 4
    assert all(torch.isfinite(p).all() for name in ("model", "ema") for p in state[name].values())


def test_run_that_only_diverges_stops(tmp_path, monkeypatch):
    """Ten steps in a row without a finite gradient end the run with the step, the learning rate and what to try."""
    loss = diffusion.VP.loss
    monkeypatch.setattr(diffusion.VP, "loss", lambda self, *given: loss(self, *given) * math.inf)
    with pytest.raises(ValueError, match=r"step 10: .* ten times in a row \(learning rate 4.0e-03\); try a lower --lr"):
        train.main([*SMALL, "--steps", "50", "--save-every", "50", "--out", str(tmp_path)])


def test_damaged_checkpoint_is_named_and_the_one_before_used(run, tmp_path, capsys):
    """A torn or altered checkpoint.pt is reported, and the run continues from previous.pt to the same end."""
    for damage in (lambda b: b[:len(b) // 2], lambda b: b[:len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1:]):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        out.mkdir()
        for name in ("checkpoint.pt", "previous.pt"):
            (out / name).write_bytes((run / name).read_bytes())
        (out / "checkpoint.pt").write_bytes(damage((run / "checkpoint.pt").read_bytes()))
        train.main([*SMALL, "--out", str(out)])
        printed = capsys.readouterr()
        assert "checkpoint.pt: damaged" in printed.err and "continues after step 3" in printed.out
        assert (out / "checkpoint.damaged").exists()
        assert same(train.read_checkpoint(out / "checkpoint.pt")["ema"], train.read_checkpoint(run / "checkpoint.pt")["ema"])


def test_run_of_damaged_checkpoints_alone_is_not_started_anew(tmp_path):
    """Where no checkpoint can be read the run says so, now and the next time, rather than start over the old one."""
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    for _ in range(2):
        with pytest.raises(ValueError, match="no checkpoint can be read"):
            train.main([*SMALL, "--out", str(tmp_path)])


def test_archive_without_content_is_damaged(tmp_path):
    """A zip file whose checksums are right but whose pickle is empty: torch's error has no text, ours has one line."""
    torch.save({}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "empty.pt", "w") as empty:
        for name in whole.namelist():
            empty.writestr(name, b"" if name.endswith("data.pkl") else whole.read(name))
    with pytest.raises(train.Damaged, match=r"empty.pt: damaged, or not a checkpoint \(\w+"):
        train.read_checkpoint(tmp_path / "empty.pt")


@contextlib.contextmanager
def largest_file(size):
    """The system refuses to write files beyond this size (Unix): half-way, as a full disk does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_keeps_the_checkpoint_before(run, tmp_path):
    """A checkpoint that finds no room: one line says so, the old one is whole, and no half of a new one is left."""
    out = shutil.copytree(run, tmp_path / "run")
    with largest_file((out / "checkpoint.pt").stat().st_size // 2):
        error = command("train.py", *SMALL, "--steps", 9, "--out", out)
    assert error == (f"train.py: {out}/checkpoint.pt: could not be written ([Errno 27] File too large); make room or give another --out; "
                     "the checkpoint before it is whole")
    assert (out / "checkpoint.pt").read_bytes() == (run / "checkpoint.pt").read_bytes() and not (out / "checkpoint.tmp").exists()
    assert command("train.py", *SMALL, "--steps", 9, "--out", out) is None      # with room again, the same command continues
    assert [line["step"] for line in log_of(out)] == list(range(1, 10))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full device")
def test_full_disk_is_named_by_the_log_too(tmp_path):
    """A line of log.jsonl that finds no room names the file."""
    log = train.Log(tmp_path, 0, active=True)
    log.file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(OSError, match=r"/dev/full: could not be written \(.*No space left on device\); make room or give another --out"):
        log.write(1, loss=0.5)


def test_signals_end_the_step_and_save(tmp_path):
    """A scheduler's SIGTERM, and ctrl-C: a checkpoint is written at the step reached, and the exit is not a success."""
    processes = {
        number: subprocess.Popen([sys.executable, "train.py", *SMALL, "--steps", "100000", "--save-every", "100000", "--out", tmp_path / number.name],
                                 cwd=HERE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        for number in (signal.SIGTERM, signal.SIGINT)}
    for number, process in processes.items():
        wait_for(lambda: steps_logged(tmp_path / number.name), process)
        process.send_signal(number)
    for number, process in processes.items():
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 1 and f"stopped by {number.name} after step" in error and "Traceback" not in error
        out = tmp_path / number.name
        assert train.read_checkpoint(out / "checkpoint.pt")["step"] == log_of(out)[-1]["step"] > 0


def test_run_killed_between_two_renames_continues_from_the_checkpoint_before(run, tmp_path):
    """checkpoint.pt has become previous.pt, the new one is still called checkpoint.tmp, torn: the run goes on from previous.pt to the same end."""
    out = shutil.copytree(run, tmp_path / "run")
    (out / "checkpoint.pt").rename(out / "checkpoint.tmp")
    (out / "checkpoint.tmp").write_bytes(b"half of it")
    assert command("train.py", *SMALL, "--out", out) is None
    assert_same_run(out, run, 6)


def steps_logged(out):
    """Whole lines in a run's log so far."""
    path = Path(out) / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(condition, process, seconds=120):
    """Until a condition holds, while the process that should make it true runs on."""
    deadline = time.time() + seconds
    while not condition():
        running = process.is_alive() if hasattr(process, "is_alive") else process.poll() is None
        assert running and time.time() < deadline
        time.sleep(0.001)


@pytest.fixture
def start(monkeypatch):
    """start(flags, out): a process that trains there, on one thread. It is a fork of one that has imported torch already: it starts soon."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])

    def start(flags, out):
        process = context.Process(target=train.main, args=([*flags, "--out", str(out)],))
        process.start()
        return process

    return start


def assert_same_run(killed, whole, steps):
    """Weights, average and optimiser of two runs are equal bit for bit, and so are losses; the logs have every step once."""
    a, b = (train.read_checkpoint(out / "checkpoint.pt") for out in (killed, whole))
    assert same(a["model"], b["model"]) and same(a["ema"], b["ema"]) and a["step"] == b["step"] == steps
    assert all(same(a["optimizer"]["state"][i], state) for i, state in b["optimizer"]["state"].items())
    assert [line["step"] for line in log_of(killed)] == list(range(1, steps + 1))
    assert [line["loss"] for line in log_of(killed)] == [line["loss"] for line in log_of(whole)]


@slow
def test_run_killed_twenty_times_ends_as_if_nothing_had_been(tmp_path, start, capsys):
    """kill -9 at 20 random moments, every other one while a checkpoint is written; the same command again each time: the uninterrupted run.

    Weights, average and optimiser are equal bit for bit, and the log has no gap and no repeated step.
    """
    flags, random, out = [*SMALL, "--steps", "220"], np.random.default_rng(0), tmp_path / "killed"
    began = time.time()
    whole = start(flags, tmp_path / "whole")
    torn = 0
    for kill in range(20):
        writing = kill % 2
        if writing:     # what is there is the half checkpoint of the kill before
            (out / "checkpoint.tmp").unlink(missing_ok=True)
        process = start(flags, out)
        reached = random.integers(10 * kill, 10 * kill + 10)
        wait_for(lambda: steps_logged(out) >= reached, process)
        if writing:
            wait_for((out / "checkpoint.tmp").exists, process)
        time.sleep(random.uniform(0, 0.003 if writing else 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        torn += writing and (out / "checkpoint.tmp").exists()
    last = start(flags, out)
    for process in (last, whole):
        process.join()
        assert process.exitcode == 0
    assert torn >= 5
    assert_same_run(out, tmp_path / "whole", 220)
    with capsys.disabled():
        print(f"\nkilled 20 times, {torn} of them in the middle of a checkpoint, in {time.time() - began:.0f} s: 220 steps equal bit for bit")


def ranks_below(pid):
    """{rank: process id} of the processes that a torchrun with this id has started (Linux)."""
    found = {}
    for child in children(pid)[1:]:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found.update({int(entry[5:]): child for entry in environment if entry.startswith(b"RANK=")})
    return found


@slow
def test_run_of_two_processes_survives_the_death_of_one(tmp_path, capsys):
    """torchrun --max-restarts: rank 1, rank 0 and rank 1 again are killed (-9), and the run ends as the pair that was left alone, bit for bit."""
    flags = ["--nproc_per_node=2", "train.py", *SMALL, "--steps", "90", "--out"]
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}   # without the first, restarts of torchrun may hang
    whole = shell("-m", "torch.distributed.run", "--standalone", *flags, tmp_path / "whole", **environment)
    assert whole.returncode == 0, whole.stderr
    out, began = tmp_path / "killed", time.time()
    with open(tmp_path / "stderr", "w") as stderr:
        process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=3", *flags, str(out)],
                                   cwd=HERE, stderr=stderr, env={**os.environ, **environment})
        for rank, reached in ((1, 20), (0, 45), (1, 70)):
            wait_for(lambda: steps_logged(out) >= reached, process)
            os.kill(ranks_below(process.pid)[rank], signal.SIGKILL)
        assert process.wait(timeout=300) == 0, (tmp_path / "stderr").read_text()
    assert_same_run(out, tmp_path / "whole", 90)
    with capsys.disabled():
        print(f"\none of two processes killed 3 times, in {time.time() - began:.0f} s: 90 steps equal bit for bit")


@pytest.mark.parametrize("change, message", [
    (["--model", "uvit_s3"], "unknown model 'uvit_s3'"),
    (["--data", "imagenet"], "imagenet: no such data set or folder"),
    (["--data", "cifar10", "--image-size", "64"], "its images are 32x32"),
    (["--image-size", "18"], "not a multiple of patch_size 4"),
    (["--model-args", "widht=32"], "widht"),
    (["--model-args", "width"], "expected KEY=VALUE"),
    (["--model-args", "num_classes=5"], "num_classes follows from the data"),
    (["--model-args", "patch_size=0"], "uvit_tiny: "),
    (["--label-dropout", "-0.1"], "--label-dropout -0.1: must be 0 to 1"),
    (["--seed", "-1"], "--seed -1: must be 0 to 9223372036854775807"),
    (["--data-dir", "nowhere"], "--data-dir nowhere: no such folder"),
    (["--schedule", "sd"], "is of another run: its schedule is vp, here sd"),
    (["--batch-size", "9", "--accumulate", "2"], "does not divide"),
    (["--batch-size", "0"], "must be at least 1"),
    (["--steps", "-5"], "must be at least 1"),
    (["--cfg", "2", "--label-dropout", "0"], "--cfg 2.0: guidance needs labels"),
    (["--model-args", "width=64"], "is of another run: its width is 32, here 64"),
    (["--no-class-cond"], "is of another run: its num_classes is 10, here 0"),
    (["--seed", str(2**63)], "must be 0 to 9223372036854775807"),
    (["--lr", "nan"], "--lr nan: must be finite"),
    (["--lr", "inf"], "--lr inf: must be finite"),
    (["--cfg", "nan"], "--cfg nan: must be finite"),
    (["--betas", "nan", "0.9"], "--betas [nan, 0.9]: must be finite"),
    (["--betas", "2", "3"], "Invalid beta parameter at index 0: 2.0"),
    (["--ema", "1.5"], "--ema 1.5: must be 0 to 1"),
    (["--weight-decay", "-1"], "--weight-decay -1.0: must be at least 0"),
    (["--warmup", "-1"], "--warmup -1: must be at least 0"),
    (["--workers", "-2"], "--workers -2: must be at least 0"),
    (["--save-every", "0"], "--save-every 0: must be at least 1"),
    (["--log-every", "0"], "--log-every 0: must be at least 1"),
    (["--sample-every", "-1"], "--sample-every -1: must be at least 0"),
    (["--sample-steps", "0"], "--sample-steps 0: must be at least 1"),
    (["--image-size", "0"], "--image-size 0: must be at least 1"),
    (["--accumulate", "16"], "--batch-size 8 does not divide by 1 processes x --accumulate 16"),
    (["--data", __file__], "test_all.py: not a folder; --data takes cifar10"),
    (["--model-args", "image_size=24"], "image_size follows from the data"),
    (["--model-args", "heads=0"], "uvit_tiny: "),
    (["--model-args", "depth=foo"], "uvit_tiny: "),
    (["--model-args", "width=33"], "width 33 is not a multiple of heads"),
    (["--model-args", "skip=nope"], "skip 'nope' is none of"),
])
def test_train_says_what_is_wrong_in_one_line(run, change, message):
    """Bad names, sizes and another run's folder: exit code not 0, one line, the run untouched."""
    before = (run / "checkpoint.pt").read_bytes()
    error = command("train.py", *SMALL, "--out", run, *change)
    assert error.startswith("train.py: ") and message in error and "\n" not in error
    assert (run / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("script, arguments, message", [
    ("train.py", [*SMALL, "--steps", "many"], "argument --steps: invalid int value: 'many'"),
    ("train.py", [*SMALL, "--batch-size", "8.5"], "argument --batch-size: invalid int value: '8.5'"),
    ("train.py", [*SMALL, "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    ("train.py", [*SMALL, "--betas", "0.9"], "argument --betas: expected 2 arguments"),
    ("train.py", [*SMALL, "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    ("train.py", [*SMALL, "--amp", "fp8"], "argument --amp: invalid choice: 'fp8'"),
    ("train.py", [*SMALL, "--schedule", "cosine"], "argument --schedule: invalid choice: 'cosine'"),
    ("train.py", [*SMALL, "--sampler", "euler"], "argument --sampler: invalid choice: 'euler'"),
    ("train.py", [*SMALL, "--epochs", "3"], "unrecognized arguments: --epochs 3"),
    ("train.py", ["--model", "uvit_tiny"], "the following arguments are required: --data"),
    ("sample.py", ["--ckpt", "x", "--num", "1.5"], "argument --num: invalid int value: '1.5'"),
    ("sample.py", ["--ckpt", "x", "--cfg", "high"], "argument --cfg: invalid float value: 'high'"),
    ("sample.py", ["--ckpt", "x", "--sampler", "heun"], "argument --sampler: invalid choice: 'heun'"),
    ("sample.py", ["--ckpt", "x", "--walk", "far"], "argument --walk: invalid choice: 'far'"),
    ("sample.py", ["--ckpt", "x", "--sweep"], "argument --sweep: expected at least one argument"),
    ("sample.py", ["--ckpt", "x", "--verbose"], "unrecognized arguments: --verbose"),
    ("data.py", ["encode", "--images", "x"], "the following arguments are required: --out"),
    ("data.py", ["encode", "--images", "x", "--out", "y", "--image-size", "big"], "argument --image-size: invalid int value: 'big'"),
    ("data.py", ["encode", "--images", "x", "--out", "y", "--type", "int8"], "argument --type: invalid choice: 'int8'"),
    ("data.py", ["encode", "--images", "x", "--out", "y", "--fast"], "unrecognized arguments: --fast"),
    ("data.py", ["decode"], "invalid choice: 'decode'"),
])
def test_flags_of_wrong_names_and_types_are_named(tmp_path, monkeypatch, capsys, script, arguments, message):
    """An unknown flag, and a value of another type: exit code 2 and a line that names it, below the usage; no file is made."""
    monkeypatch.chdir(tmp_path)
    assert command(script, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and "Traceback" not in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("make, message", [
    (lambda root: root.mkdir(), "holds no image that Pillow reads"),
    (lambda root: (root / "empty").mkdir(parents=True), "empty: class folder without an image; remove it or fill it"),
    (lambda root: (write_images(root), write_images(root / "cats")), "holds images beside folders (cats, ..); keep either"),
    (lambda root: (write_images(root), (root / "4.png").touch()), "4.png: not a readable image"),
    (lambda root: (write_images(root), (root / "5.jpg").write_text("no picture")), "5.jpg: not a readable image"),
    (lambda root: (write_images(root), (root / "2.png").write_bytes((root / "2.png").read_bytes()[:-40])), "2.png: not a readable image"),
    (lambda root: (root.mkdir(), Image.new("RGB", (64, 64)).save(root / "6.jpg"), os.truncate(root / "6.jpg", 400)), "6.jpg: not a readable"),
    (lambda root: (root.mkdir(), (root / "encoding.json").write_text("{}")), "its encoding.json is not one of data.py encode"),
])
def test_training_names_what_it_can_not_read(tmp_path, make, message):
    """Empty folders, and files that are torn or no images: one line that names them, before anything is written."""
    make(tmp_path / "images")
    error = command("train.py", *SMALL, "--data", tmp_path / "images", "--image-size", "16", "--out", tmp_path / "out")
    assert error.startswith("train.py: ") and message in error and "\n" not in error and not (tmp_path / "out").exists()


def test_training_reads_odd_images(tmp_path):
    """One pixel, CMYK, 16 bits, transparency, an animation (its first picture), one row of pixels: all are images to train on."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (1, 1), "red").save(tmp_path / "images" / "pixel.png")
    Image.new("CMYK", (9, 7)).save(tmp_path / "images" / "print.jpg")
    Image.fromarray(np.full((9, 7), 65535, np.uint16)).save(tmp_path / "images" / "deep.png")
    Image.new("RGBA", (20, 20)).save(tmp_path / "images" / "clear.png")
    red, blue = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "images" / "moving.gif", save_all=True, append_images=[blue])
    Image.new("L", (200, 1)).save(tmp_path / "images" / "row.bmp")
    assert data.read_image(tmp_path / "images" / "moving.gif", 16)[:, 8, 8].tolist() == [255, 0, 0]
    assert command("train.py", *SMALL, "--steps", 1, "--data", tmp_path / "images", "--image-size", 16, "--out", tmp_path / "out") is None


@pytest.mark.parametrize("script, arguments", [("train.py", SMALL), ("sample.py", ["--num", 1, "--steps", 1, "--device", "cpu", "--ckpt"])])
def test_folders_that_can_not_be_written_are_named(run, tmp_path, script, arguments):
    """--out below a file, in a read-only file system, or a name that is taken: one line, and what is there stays. (Root may write anywhere else.)"""
    (tmp_path / "file").write_text("hours of work")
    for out in (tmp_path / "file", tmp_path / "file" / "x", "/proc/x"):
        error = command(script, *arguments, *[run / "checkpoint.pt"] * (script == "sample.py"), "--out", out)
        assert error.startswith(f"{script}: ") and str(out) in error and "\n" not in error
        assert "another --out" in error or "not an empty folder" in error
    assert (tmp_path / "file").read_text() == "hours of work"


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("optimizer"), "does not fit this version of uvit_tiny or train.py ('optimizer'); give another --out"),
    (lambda state: state["model"].pop("pos_embed"), 'Missing key(s) in state_dict: "pos_embed"'),
    (lambda state: state["ema"].update(pos_embed=torch.zeros(1, 3, 32)), "size mismatch for pos_embed"),
    (lambda state: state.pop("shape"), "not a checkpoint of train.py, or of another version"),
    (lambda state: state.update(code=Explosive()), "no checkpoint can be read"),
])
def test_checkpoint_of_another_version_is_not_continued(run, tmp_path, monkeypatch, change, message):
    """A checkpoint that lacks parts, of a network that has since changed, or with code in it: one line, and the code is not run."""
    monkeypatch.chdir(tmp_path)
    state = torch.load(run / "checkpoint.pt")
    change(state)
    torch.save(state, tmp_path / "checkpoint.pt")
    error = command("train.py", *SMALL, "--out", tmp_path)
    assert error.startswith("train.py: ") and message in error and "\n" not in error
    assert [p.suffix for p in tmp_path.iterdir()] in ([".pt"], [".damaged"])


def test_batch_that_processes_can_not_share_is_refused(tmp_path, monkeypatch):
    """Eight images do not divide by three processes, nor by sixteen."""
    for world in (3, 16):
        monkeypatch.setattr(train.Processes, "__init__", lambda self, device: vars(self).update(rank=0, world=world, device=torch.device(device)))
        with pytest.raises(ValueError, match=f"--batch-size 8 does not divide by {world} processes"):
            train.main([*SMALL, "--out", str(tmp_path)])


@slow
def test_more_processes_than_images(tmp_path):
    """Two processes train on one image, and draw one."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    result = shell(*torchrun, "train.py", *SMALL, "--data", write_images(tmp_path / "one", 1), "--image-size", 16, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    result = shell(*torchrun, "sample.py", "--ckpt", tmp_path / "run" / "checkpoint.pt", "--num", 1, "--steps", 2, "--device", "cpu",
                   "--out", tmp_path / "x.npz")
    assert result.returncode == 0, result.stderr
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (1, 16, 16, 3)


@slow
def test_two_processes_train_as_one(tmp_path):
    """20 steps of two processes, two passes each, have the losses of one process with the same batch and seed (1e-4)."""
    arguments = [*SMALL, "--steps", "20"]
    alone = shell("train.py", *arguments, "--out", tmp_path / "one")
    pair = shell("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *arguments,
                 "--accumulate", "2", "--out", tmp_path / "two")
    assert alone.returncode == pair.returncode == 0, pair.stderr
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, 21))
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(one, two)) < 1e-4


@slow
def test_compiled_training_is_the_same(run, tmp_path):
    """--compile, also under torchrun with accumulation, gives the losses of the same run without it (1e-4)."""
    alone = shell("train.py", *SMALL, "--compile", "--out", tmp_path / "one")
    pair = shell("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *SMALL, "--compile",
                 "--accumulate", "2", "--out", tmp_path / "two")
    assert alone.returncode == pair.returncode == 0, alone.stderr + pair.stderr
    for out in ("one", "two"):
        assert [line["loss"] for line in log_of(tmp_path / out)] == pytest.approx([line["loss"] for line in log_of(run)], rel=1e-4)


def learn_shapes(model, out, capsys):
    """Train a model on shapes by its recipe, and sample. Returns seconds to the first grid and to the end, right, clean of 100."""
    start = time.time()
    result = shell("train.py", "--model", model, "--data", "shapes", "--out", out, timeout=3000, OMP_NUM_THREADS=str(os.cpu_count()))
    assert result.returncode == 0, result.stderr
    first, seconds = min((out / "samples").glob("*.png")).stat().st_mtime - start, time.time() - start
    assert command("sample.py", "--ckpt", out / "checkpoint.pt", "--num", 100, "--seed", 1, "--out", out / "x.npz") is None
    with np.load(out / "x.npz") as file:
        images, asked = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2), torch.from_numpy(file["arr_1"])
    label, distance = data.nearest_shape(images)
    right, clean = (label == asked).sum(), ((label == asked) & (distance < 20)).sum()
    with capsys.disabled():
        print(f"\n{model}: first grid after {first:.0f} s, all after {seconds:.0f} s; {right} of 100 right, {clean} of them clean")
    return first, seconds, right, clean


@slow
def test_main_job_learns_shapes(tmp_path, capsys):
    """README's first command learns to draw ten classes of shapes: of 100 samples at least 80 are what was asked for.

    By the rule of data.nearest_shape; at least 60 are also clean, within 20 grey levels of a drawn one. README promises the
    first grid within two minutes and the end within ten on two idle cores; here twice that is allowed.
    """
    first, seconds, right, clean = learn_shapes("uvit_tiny", tmp_path, capsys)
    assert right >= 80 and clean >= 60
    assert first < 240 and seconds < 1200


@by_hand
@pytest.mark.parametrize("model", ["dit_tiny", "udit_tiny"])
def test_other_families_learn_shapes(tmp_path, capsys, model):
    """So do the tiny DiT and U-DiT, by the same rule, in twenty minutes each on two idle cores."""
    _, seconds, right, clean = learn_shapes(model, tmp_path, capsys)
    assert right >= 80 and clean >= 60 and seconds < 1200


def watched(progress, *arguments):
    """Run Python on one thread and look at it five times a second (Linux): arrays of its progress, MB of memory, open files and CPU seconds.

    The fifth array is the CPU time of a fixed piece of work done beside it: it tells how fast the machine was just then.
    """
    matrix = np.ones((256, 256))
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen, proc = [], Path(f"/proc/{process.pid}")
    while process.poll() is None:
        with contextlib.suppress(OSError):      # it has just ended
            pages = int((proc / "statm").read_text().split()[1])
            cpu = sum(map(int, (proc / "stat").read_text().rsplit(")")[-1].split()[11:13])) / os.sysconf("SC_CLK_TCK")
            began = time.thread_time()
            for _ in range(5):
                np.cumsum(np.sin(matrix))
            seen.append((progress(), pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir(proc / "fd")), cpu, time.thread_time() - began))
        time.sleep(0.2)
    assert process.returncode == 0
    return np.array(seen).T


@by_hand
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_soak(tmp_path, capsys):
    """20,000 steps and 20,000 images: memory and open files do not grow over the last half; the last tenth is as fast as the first, to 5 %.

    The network is narrowed to 32, the batch is the recipe's; a thousand reports, twenty checkpoints and grids. Speed is CPU time, in units of a fixed
    piece of work done beside it, because other programs slow both down. SOAK=1000 in the environment makes it a thousand of each.
    """
    number = int(os.environ.get("SOAK", 20_000))
    out, images, part = tmp_path / "run", tmp_path / "images", number // 1000
    training = watched(lambda: steps_logged(out) / 1000, "train.py", *SMALL[:7], "--steps", number, "--log-every", part, "--save-every", 50 * part,
                       "--sample-every", 50 * part, "--device", "cpu", "--out", out)
    sampling = watched(lambda: len(os.listdir(images)) / number if images.exists() else 0, "sample.py", "--ckpt", out / "checkpoint.pt",
                       "--num", number, "--steps", 20, "--sampler", "dpm_solver", "--device", "cpu", "--out", images)
    progress, _, _, cpu, unit = training
    tenths = [(progress >= begin) & (progress < begin + 0.1) for begin in (0.02, 0.9)]      # the first steps are a warm-up
    first, last = (np.ptp(cpu[tenth]) / np.ptp(progress[tenth]) for tenth in tenths)
    machine = np.mean(unit[tenths[1]]) / np.mean(unit[tenths[0]])
    slower = last / first / machine - 1
    lines = [f"last tenth against the first: {slower:+.1%} time ({last / first - 1:+.1%} of CPU, the machine itself {machine - 1:+.1%})"]
    for name, (progress, memory, files, *_) in (("steps", training), ("images", sampling)):
        middle, end = (progress >= 0.5) & (progress < 0.6), progress >= 0.9
        grown, opened = np.median(memory[end]) / np.median(memory[middle]) - 1, np.median(files[end]) - np.median(files[middle])
        lines.append(f"{number} {name}: {np.median(memory[end]):.0f} MB, {grown:+.2%} since the middle; "
                     f"{np.median(files[end]):.0f} files open, {opened:+.0f}")
        assert grown < 0.01 and opened <= 0, lines
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert slower < 0.05, lines


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


def sampled(run, out, *arguments):
    """Sample from a run into an npz, and read it: (images (N, H, W, C), labels)."""
    out.unlink(missing_ok=True)
    assert command("sample.py", "--ckpt", run / "checkpoint.pt", "--steps", 4, "--device", "cpu", "--out", out, *arguments) is None
    with np.load(out) as file:
        return file["arr_0"], file.get("arr_1")


def test_samples_do_not_depend_on_the_batch(run, tmp_path):
    """Image i is the same in batches of 7 and of 20, also with a sampler that adds noise; another seed gives others."""
    for sampler in ("dpm_solver", "euler_maruyama"):
        a, labels = sampled(run, tmp_path / "a.npz", "--num", 20, "--batch-size", 7, "--sampler", sampler)
        b, _ = sampled(run, tmp_path / "b.npz", "--num", 20, "--batch-size", 20, "--sampler", sampler)
        c, _ = sampled(run, tmp_path / "c.npz", "--num", 20, "--sampler", sampler, "--seed", 1)
        assert a.shape == (20, 16, 16, 3) and a.dtype == np.uint8 and labels.tolist() == [i % 10 for i in range(20)]
        assert abs(a.astype(int) - b).max() <= 1 and (a == b).mean() > 0.999      # one grey level, where rounding tips over
        assert (a != c).mean() > 0.5
    assert not list(tmp_path.glob("*.part*"))


def test_samples_of_labels_average_and_guidance(run, tmp_path):
    """--labels takes numbers or names in turn; --raw and --cfg change the images."""
    a, labels = sampled(run, tmp_path / "a.npz", "--num", 4, "--labels", "3,red disc")
    assert labels.tolist() == [3, 0, 3, 0]
    for change in (["--raw"], ["--cfg", 3], ["--no-clip-x0"], ["--labels", "4,5"]):
        b, _ = sampled(run, tmp_path / "b.npz", *["--num", 4, "--labels", "3,0"], *change)
        assert (a != b).any()


def test_samples_as_grid_and_folder(run, tmp_path):
    """A .png is a grid with a row for each label; any other name becomes a folder of PNGs, never mixed with what is there."""
    common = ["sample.py", "--ckpt", run / "checkpoint.pt", "--steps", 2, "--device", "cpu", "--num", 5, "--labels", "1,2"]
    assert command(*common, "--out", tmp_path / "grid.png") is None
    assert Image.open(tmp_path / "grid.png").size == (3 * 18 + 2, 2 * 18 + 2)
    assert command(*common, "--out", tmp_path / "folder") is None
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == [f"{i:06d}.png" for i in range(5)]
    assert "not an empty folder" in command(*common, "--out", tmp_path / "folder")
    (tmp_path / "x.npz").write_bytes(b"hours of work")
    assert "exists already" in command(*common, "--out", tmp_path / "x.npz")
    assert "ends in .png or .npz" in command(*common, "--out", tmp_path / "x.jpg")
    assert (tmp_path / "x.npz").read_bytes() == b"hours of work" and not (tmp_path / "x.jpg").exists()


def test_weights_load_in_every_wrapping(tmp_path):
    """A released file loads bare, under "ema" or "model", with prefixes of wrappers, with flags of DiT's kind beside it."""
    model = train.build("uvit_s2", dict(width=32, depth=2, heads=2))
    weights = fill(model.state_dict())
    for state, key in [(weights, "bare"), ({"ema": weights, "args": argparse.Namespace(lr=1)}, "ema"),
                       ({"model": {f"module._orig_mod.{k}": v for k, v in weights.items()}}, "model"),
                       ({"state_dict": {f"_orig_mod.module.{k}": v for k, v in weights.items()}}, "state_dict")]:
        torch.save(state, tmp_path / "w.pth")
        loaded, found = sample.read_weights(tmp_path / "w.pth")
        model.load_state_dict({name: torch.zeros_like(value) for name, value in weights.items()})
        sample.load_weights(model, loaded, "w.pth")
        assert found == key and same(model.state_dict(), weights)
    other = {k: v + 1 for k, v in weights.items()}
    torch.save({"ema": weights, "model": other}, tmp_path / "w.pth")
    assert same(sample.read_weights(tmp_path / "w.pth")[0], weights)
    assert same(sample.read_weights(tmp_path / "w.pth", raw=True)[0], other)


def test_released_uvit_weights_sample_by_their_recipe(tmp_path, monkeypatch):
    """--weights --model --data finds shape, classes, schedule and sampler by itself: here the layout of a released CIFAR10 file."""
    monkeypatch.setitem(uvit.MODELS, "uvit_s2", uvit.preset(patch_size=2, width=32, depth=2, heads=2))
    monkeypatch.setitem(train.MODELS, "uvit_s2", uvit.MODELS["uvit_s2"])
    torch.save(fill(uvit.MODELS["uvit_s2"]().state_dict()), tmp_path / "cifar10_uvit_small.pth")
    arguments = sample.parse(["--weights", str(tmp_path / "cifar10_uvit_small.pth"), "--model", "uvit_s2", "--data", "cifar10"])
    source = sample.open_source(arguments, torch.device("cpu"))
    assert (source.shape, source.num_classes, source.null) == ((3, 32, 32), 0, None)
    assert (source.settings["sampler"], source.settings["steps"], source.settings["w"]) == ("euler_maruyama", 1000, 1)
    assert isinstance(source.schedule, diffusion.VP)


@pytest.mark.parametrize("name, arguments", [
    ("dit_s2", dict(width=32, depth=1, heads=2)), ("udit_s", dict(width=16, depths=(1, 1, 1, 1, 1), heads=2))])
def test_released_dit_weights_sample_by_their_recipe(tmp_path, monkeypatch, name, arguments):
    """The layout of a released DiT or U-DiT file gives 1000 classes, the null label, learned variance and 250 DDPM steps."""
    network = train.NETWORKS[name.split("_")[0]]
    monkeypatch.setitem(train.MODELS, name, lambda **given: network(**{**arguments, **given}))
    torch.save(fill(network(**arguments, image_size=16, num_classes=1000).state_dict()), tmp_path / "w.pt")
    given = sample.parse(["--weights", str(tmp_path / "w.pt"), "--model", name, "--data", str(tmp_path), "--image-size", "32",
                          "--cfg", "1.5", "--cfg-channels", "3", "--steps", "2"])
    source = sample.open_source(given, torch.device("cpu"))
    assert (source.shape, source.num_classes, source.null) == ((4, 32, 32), 1000, 1000)
    assert source.settings["sampler"] == "ddpm" and isinstance(source.schedule, diffusion.DDPM)
    y = torch.tensor([207, 360])
    images = diffusion.generate(source.model, source.schedule, source.shape, range(2), y, source.null, **source.settings)
    assert images.shape == (2, 4, 32, 32) and images.isfinite().all()


class NoAutoencoder:
    """In place of the papers' autoencoder: only its name and scale are looked at."""

    def __init__(self, name, device, scale):
        self.decode = (name, scale)


@pytest.mark.parametrize("model, dataset, size, schedule, sampler, w, scale, rows", [
    ("uvit_h2", "imagenet256", 32, "SD", "dpm_solver++", 1.4, 0.18215, dict(num_classes=1000)),
    ("uvit_l2", "imagenet256", 32, "VP", "dpm_solver", 1.4, 0.18215, dict(num_classes=1000)),
    ("uvit_h4", "imagenet512", 64, "SD", "dpm_solver++", 1.7, 0.18215, dict(num_classes=1000)),
    ("uvit_s2", "mscoco256", 32, "SD", "dpm_solver++", 2.0, 0.23010, dict(text_dim=768, text_tokens=77)),
    ("dit_xl2", "imagenet512", 64, "DDPM", "ddpm", 1.5, 0.18215, dict(num_classes=1000))])
def test_released_latent_weights_sample_by_their_recipe(
        tmp_path, monkeypatch, model, dataset, size, schedule, sampler, w, scale, rows):
    """Released weights of latent models find their shape, classes or text, schedule, guidance and autoencoder by themselves."""
    network, patch = train.NETWORKS[model.split("_")[0]], int(model[-1])
    small = dict(patch_size=patch, width=32, depth=2, heads=2)
    monkeypatch.setitem(train.MODELS, model, lambda **given: network(**{**small, **given}))
    monkeypatch.setattr(data, "Autoencoder", NoAutoencoder)
    torch.save(fill(network(**small, image_size=size, in_channels=4, **rows).state_dict()), tmp_path / "w.pt")
    given = sample.parse(["--weights", str(tmp_path / "w.pt"), "--model", model, "--data", dataset])
    source = sample.open_source(given, torch.device("cpu"))
    assert source.shape == (4, size, size) and source.image_shape == (3, 8 * size, 8 * size)
    assert type(source.schedule).__name__ == schedule and source.decode == (data.AUTOENCODER, scale)
    assert (source.settings["sampler"], source.settings["w"]) == (sampler, w)
    assert source.text == ("text_dim" in rows) and source.num_classes == rows.get("num_classes", 0)
    if rows.get("num_classes"):
        assert source.null == 1000 and sample.parse_labels("golden retriever", source) == [207]
    else:
        assert source.null is None and source.encoding["clip"] == data.CLIP     # the empty text is encoded with the prompts


@pytest.mark.parametrize("name, arguments", [
    ("dit_tiny", ["width=32", "heads=2"]), ("udit_tiny", ["width=16", "heads=2"]),
    ("unet_tiny", ["learn_sigma=true", "--schedule", "ddpm"])])
def test_dit_and_udit_train_and_sample_in_the_same_harness(tmp_path, name, arguments):
    """A DiT, a U-DiT and a U-Net train on shapes with the hybrid loss (for the first two their recipe), and their checkpoints sample."""
    train.main([*SMALL, "--model", name, "--model-args", *arguments, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "config.json").read_text())["schedule"] == "ddpm"
    images, labels = sampled(tmp_path, tmp_path / "x.npz", "--num", 10, "--cfg", 2)
    assert images.shape == (10, 16, 16, 3) and labels.tolist() == list(range(10))


class StandInAutoencoder:
    """Decodes latents (n, C, s, s) by repeating each cell of three channels 8 x 8 times."""

    def __init__(self, name, device, scale):
        assert (name, scale) == ("none", 0.5)

    def decode(self, latents):
        return data.to_uint8(F.interpolate(latents[:, :3], scale_factor=8))


class StandInTextEncoder:
    """Features (n, 5, 16) that are a function of the text's bytes."""

    def __init__(self, name, device):
        assert name == "none"

    def __call__(self, texts):
        return torch.stack([torch.randn(5, 16, generator=torch.Generator().manual_seed(zlib.crc32(t.encode()))) for t in texts])


LATENTS = [*SMALL[:2], "--model-args", "patch_size=2", *SMALL[5:], "--sample-steps", "2", "--workers", "2", "--data"]


def test_latents_train_and_sample(tmp_path, monkeypatch):
    """A folder of latents trains with its labels by the recipe of imagenet256, draws a grid, and is decoded when sampled."""
    monkeypatch.setattr(data, "Autoencoder", StandInAutoencoder, raising=False)
    folder, out = write_latents(tmp_path / "latents", count=20, classes=3), tmp_path / "run"
    train.main([*LATENTS, str(folder), "--out", str(out), "--sample-every", "6"])
    config = json.loads((out / "config.json").read_text())
    assert (config["schedule"], config["sampler"], config["cfg"]) == ("sd", "dpm_solver++", 1.4)
    assert Image.open(out / "samples" / "0000006.png").size == (8 * 66 + 2, 3 * 66 + 2)
    images, labels = sampled(out, tmp_path / "x.npz", "--num", 5, "--labels", "n2,1")
    assert images.shape == (5, 64, 64, 3) and labels.tolist() == [2, 1, 2, 1, 2]
    assert (images[:, ::8, ::8] == images[:, 7::8, 7::8]).all()


def test_latents_without_labels_train_unconditionally(tmp_path):
    """A folder of latents with neither labels nor captions needs no flag."""
    train.main([*LATENTS, str(write_latents(tmp_path / "latents", classes=0)), "--out", str(tmp_path / "run")])
    assert train.read_checkpoint(tmp_path / "run" / "checkpoint.pt")["model_args"]["num_classes"] == 0


def test_latents_train_without_an_autoencoder(tmp_path, monkeypatch, capsys):
    """Where diffusers is not installed, a run on latents says so once, draws no grids, and trains."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    train.main([*LATENTS, str(write_latents(tmp_path / "latents")), "--out", str(tmp_path / "run"), "--sample-every", "3"])
    assert "no grids of samples" in (words := capsys.readouterr().err) and "pip install diffusers" in words
    assert len(log_of(tmp_path / "run")) == 6 and not (tmp_path / "run" / "samples").exists()


def test_captions_train_and_prompts_sample(tmp_path, monkeypatch):
    """Captions condition a U-ViT by their features; runs resume exactly; --prompt takes texts or a file of them."""
    monkeypatch.setattr(data, "Autoencoder", StandInAutoencoder, raising=False)
    monkeypatch.setattr(data, "TextEncoder", StandInTextEncoder, raising=False)
    folder, out = write_latents(tmp_path / "latents", count=20, text=(5, 16)), tmp_path / "run"
    arguments = [*LATENTS, str(folder), "--label-dropout", "0.4"]
    train.main([*arguments, "--out", str(out), "--sample-every", "6"])
    assert Image.open(out / "samples" / "0000006.png").size == (8 * 66 + 2, 8 * 66 + 2)     # a row for each of 8 captions
    for steps in "3", "6":
        train.main([*arguments, "--out", str(tmp_path / "twice"), "--steps", steps])
    one, two = (train.read_checkpoint(folder / "checkpoint.pt") for folder in (out, tmp_path / "twice"))
    assert same(one["model"], two["model"]) and one["model_args"]["text_tokens"] == 5
    assert torch.equal(one["null"], data.load(folder).null)

    a, labels = sampled(out, tmp_path / "a.npz", "--num", 4, "--prompt", "a red bus", "two cats")
    (tmp_path / "prompts.txt").write_text("a red bus\ntwo cats\n")
    b, _ = sampled(out, tmp_path / "b.npz", "--num", 4, "--prompt", tmp_path / "prompts.txt")
    c, _ = sampled(out, tmp_path / "c.npz", "--num", 4, "--prompt", "a red bus")
    assert labels is None and (a == b).all() and (a[[0, 2]] == c[[0, 2]]).all() and (a[1] != c[1]).any()
    for wrong, words in [([], "give --prompt"), (["--labels", "1"], "give --prompt")]:
        assert words in command("sample.py", "--ckpt", out / "checkpoint.pt", "--out", tmp_path / "x.png", *wrong)
    assert "takes no text" in command("train.py", *arguments, "--out", tmp_path / "d", "--model", "dit_tiny")


def tiles(path, side=16):
    """The pictures of a grid, uint8 (rows, columns, side, side, 3)."""
    grid = np.asarray(Image.open(path))[2:, 2:]
    rows, columns = grid.shape[0] // (side + 2), grid.shape[1] // (side + 2)
    return grid.reshape(rows, side + 2, columns, side + 2, 3).swapaxes(1, 2)[:, :, :side, :side]


@slow
def test_compiled_sampling_makes_the_same_images_from_one_graph(run, tmp_path):
    """--compile changes images by a grey level at most, and compiles once for all batches, the last and shorter one too."""
    common = ["--num", 7, "--batch-size", 4, "--cfg", 2]
    a, _ = sampled(run, tmp_path / "a.npz", *common)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    b, _ = sampled(run, tmp_path / "b.npz", *common, "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert abs(a.astype(int) - b).max() <= 1 and (a == b).mean() > 0.99


def test_guidance_sweep_is_a_row_for_each_weight(run, tmp_path):
    """--sweep draws the same noises and labels in every row, with that row's guidance weight."""
    common = ["sample.py", "--ckpt", run / "checkpoint.pt", "--steps", 4, "--num", 3, "--labels", "1,2,3", "--device", "cpu"]
    assert command(*common, "--sweep", 1, 4, "--out", tmp_path / "sweep.png") is None
    rows = tiles(tmp_path / "sweep.png")
    for w, row in zip((1, 4), rows):
        images, _ = sampled(run, tmp_path / "x.npz", "--num", 3, "--labels", "1,2,3", "--cfg", w)
        assert abs(row.astype(int) - images).max() <= 1
    assert (rows[0] != rows[1]).any()
    assert "ends in .png" in command(*common, "--sweep", 1, 4, "--out", tmp_path / "x.npz")


@pytest.mark.parametrize("sampler", ["dpm_solver", "ddpm"])
def test_walks_begin_and_end_at_samples(run, tmp_path, sampler):
    """A walk's ends are the samples of the two noises, or the two classes, also where a sampler adds noise on its way."""
    common = ["sample.py", "--ckpt", run / "checkpoint.pt", "--steps", 4, "--num", 5, "--sampler", sampler, "--device", "cpu"]
    images = {label: sampled(run, tmp_path / "x.npz", "--num", 4, "--labels", label, "--sampler", sampler)[0] for label in (2, 7)}

    assert command(*common, "--walk", "noise", "--labels", "2,7", "--out", tmp_path / "noise.png") is None
    for row, label in zip(tiles(tmp_path / "noise.png"), (2, 7)):
        assert abs(row[[0, -1]].astype(int) - images[label][:2]).max() <= 1
        assert (row[2] != row[0]).any() and (row[2] != row[-1]).any()

    assert command(*common, "--walk", "condition", "--labels", "2,7", "--out", tmp_path / "condition.png") is None
    for i, row in enumerate(tiles(tmp_path / "condition.png")):
        assert abs(row[0].astype(int) - images[2][i]).max() <= 1 and abs(row[-1].astype(int) - images[7][i]).max() <= 1
    assert "two" in command(*common, "--walk", "condition", "--labels", "2", "--out", tmp_path / "x.png")


def test_noise_on_a_walk_keeps_its_length():
    """Between two noises the walk stays on their sphere: at a straight line's middle, length would fall to 0.7."""
    walk = sample.Walk(0, 3, 4, torch.linspace(0, 1, 5))
    for _ in range(2):
        norms = walk(torch.empty(5, 3, 32, 32)).flatten(1).norm(dim=1)
        assert (norms / norms.mean() - 1).abs().max() < 0.05


def test_imagenet_classes_have_names():
    """Classes of ImageNet can be asked for by name: 207 is the golden retriever."""
    source = argparse.Namespace(num_classes=1000, class_names=data.imagenet_names(), path="x")
    assert sample.parse_labels("207,golden retriever, tench", source) == [207, 207, 0]


@pytest.mark.parametrize("arguments, message", [
    ([], "give either --ckpt"),
    (["--ckpt", "none.pt"], "none.pt: no such checkpoint"),
    (["--ckpt", "torn.pt"], "torn.pt: damaged, or not a checkpoint"),
    (["--ckpt", "bare.pth"], "bare.pth: not a checkpoint of train.py"),
    (["--ckpt", "good.pt", "--labels", "10"], "--labels 10: the model has classes 0 to 9, or red disc"),
    (["--ckpt", "good.pt", "--labels", "cat"], "--labels cat"),
    (["--ckpt", "good.pt", "--num", "0"], "--num 0: must be at least 1"),
    (["--ckpt", "good.pt", "--raw", "--steps", "0"], "must be at least 1"),
    (["--weights", "bare.pth"], "--weights needs --model and --data"),
    (["--weights", "bare.pth", "--model", "uvit_s9", "--data", "cifar10"], "unknown model 'uvit_s9'"),
    (["--weights", "bare.pth", "--model", "uvit_s2", "--data", "cifar10"], "does not fit the model: "),
    (["--weights", "bare.pth", "--model", "uvit_s2", "--data", "cifar"], "cifar: no such data set or folder"),
    (["--ckpt", "good.pt", "--seed", "-1"], "--seed -1: must be 0 to 9223372036854775807"),
    (["--ckpt", "good.pt", "--seed", str(2**63)], "must be 0 to 9223372036854775807"),
    (["--ckpt", "good.pt", "--cfg", "nan"], "--cfg nan: must be finite"),
    (["--ckpt", "good.pt", "--sweep", "1", "inf"], "--sweep [1.0, inf]: must be finite"),
    (["--ckpt", "good.pt", "--cfg", "2", "--cfg-channels", "0"], "--cfg-channels 0: must be at least 1"),
    (["--ckpt", "good.pt", "--cfg", "2", "--cfg-channels", "4"], "--cfg-channels 4: good.pt has 3 channels"),
    (["--ckpt", "good.pt", "--labels", "²"], "--labels ²: the model has classes 0 to 9"),
    (["--ckpt", "good.pt", "--labels", "1,,2"], "--labels : the model has classes 0 to 9"),
    (["--ckpt", "good.pt", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
    (["--ckpt", "good.pt", "--num", str(10**13)], "10000000000000 images take 15360000.0 GB while they are made, and "),
    (["--ckpt", "good.pt", "--prompt", "a cat"], "--prompt: good.pt takes no text"),
    (["--ckpt", "good.pt", "--walk", "condition"], "give two --labels or two texts"),
    (["--ckpt", "good.pt", "--sweep", "1", "--walk", "noise"], "give one of them"),
    (["--ckpt", "good.pt", "--weights", "bare.pth"], "give either --ckpt"),
    (["--ckpt", "."], "Is a directory: '.'"),
    (["--ckpt", "code.pth"], "code.pth: damaged, or not a checkpoint"),
    (["--ckpt", "old.pt"], "old.pt: not a checkpoint of train.py, or of another version"),
    (["--weights", "none.pth", "--model", "uvit_s2", "--data", "cifar10"], "none.pth: no such file of weights"),
    (["--weights", "bare.pth", "--model", "dit_s2", "--data", "cifar10"], "does not fit the model: "),
    (["--weights", "torn.pt", "--model", "uvit_s2", "--data", "cifar10"], "torn.pt: not a file of weights alone, or damaged"),
    (["--ckpt", "good.pt", "--sampler", "dpm_solver", "--num", "3", "--labels", "1,-2"], "--labels -2"),
    (["--ckpt", "good.pt", "--sampler", "ddpm", "--steps", "0"], "--steps 0: must be at least 1"),
    (["--weights", "code.pth", "--model", "uvit_s2", "--data", "cifar10"], "code.pth: not a file of weights alone"),
    (["--weights", "list.pth", "--model", "uvit_s2", "--data", "cifar10"], "list.pth: holds no state dict"),
])
def test_sample_says_what_is_wrong_in_one_line(run, tmp_path, monkeypatch, arguments, message):
    """Bad files, labels and numbers: exit code not 0, one line, no file left behind, and no code of a file run."""
    monkeypatch.chdir(tmp_path)
    Path("good.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    Path("torn.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:1000])
    torch.save(train.build("uvit_tiny", {}).state_dict(), "bare.pth")
    torch.save(Explosive(), "code.pth")
    torch.save([1, 2], "list.pth")
    torch.save({key: value for key, value in torch.load("good.pt").items() if key != "shape"}, "old.pt")
    before = set(tmp_path.iterdir())
    error = command("sample.py", *arguments, "--device", "cpu", "--out", tmp_path / "x.png")
    assert error.startswith("sample.py: ") and message in error and "\n" not in error
    assert set(tmp_path.iterdir()) == before


def test_full_disk_leaves_no_half_of_a_file_of_samples(run, tmp_path):
    """Where an .npz finds no room half-way, one line says so, and nothing is left of it."""
    with largest_file(20 * 16 * 16 * 3 + 200):
        error = command("sample.py", "--ckpt", run / "checkpoint.pt", "--steps", 1, "--device", "cpu", "--num", 20, "--out", tmp_path / "x.npz")
    assert error.startswith(f"sample.py: {tmp_path}/x.npz: could not be written ([Errno 27] File too large)") and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_guidance_needs_a_null_label(tmp_path):
    """--cfg on an unconditional run is refused in one line."""
    train.main([*SMALL, "--no-class-cond", "--steps", "1", "--out", str(tmp_path)])
    assert "has no null label" in command("sample.py", "--ckpt", tmp_path / "checkpoint.pt", "--cfg", 2, "--out", tmp_path / "x.png")
    assert "a model without classes" in command("sample.py", "--ckpt", tmp_path / "checkpoint.pt", "--labels", 2, "--out", tmp_path / "x.png")


@slow
def test_two_processes_sample_as_one(run, tmp_path):
    """Under torchrun two processes make the images that one makes."""
    arguments = ["sample.py", "--ckpt", run / "checkpoint.pt", "--num", 25, "--batch-size", 4, "--steps", 5, "--device", "cpu", "--sampler", "ddpm"]
    alone = shell(*arguments, "--out", tmp_path / "one.npz")
    pair = shell("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", *arguments, "--out", tmp_path / "two.npz")
    assert alone.returncode == pair.returncode == 0, pair.stderr
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert (one["arr_0"] == two["arr_0"]).all() and (one["arr_1"] == two["arr_1"]).all()


# ---------------------------------------------------------------------------------------------------------------------
# fid.py


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Inception with filled weights, their names and shapes, and the file that they are in."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "read_weights", lambda path: ({}, "bare"))
        patch.setattr(sample, "load_weights", lambda model, state, name: torch.save(fill_inception(model), path))
        fid.Inception("fid.py")
    return fid.Inception(path), {name: tuple(value.shape) for name, value in torch.load(path).items()}, path


def fill_inception(model):
    """As the ports were filled whose outputs are below: convolutions are sqrt(2) larger, lest the ReLUs wear a signal out."""
    state = model.state_dict()
    filled = fill({name: value for name, value in state.items() if value.is_floating_point()})
    for name in filled:
        if name.endswith("conv.weight"):
            filled[name] *= 2**0.5
        elif name.endswith("running_var"):
            filled[name] = 1 + filled[name].abs()
    return {**state, **filled}


def test_inception_has_the_released_names_and_shapes(inception):
    """All 566 names and shapes of pt_inception-2015-12-05-6726825d.pth, and no other."""
    lines = sorted(f"{name} {shape}" for name, shape in inception[1].items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == "760681d791cb624e" and len(lines) == 566


@pytest.mark.parametrize("resize, values", [
    ("tensorflow", dict(pool3=(0.407455076, [0.0, 0.117758, 0.482271, 0.002269, 0.0, 0.121353, 0.486992, 0.002043]),
                        spatial=(0.716274875, [0.53551, 0.435461, 0.0, 0.318718, 0.528145, 0.444277, 0.0, 0.05244]),
                        logits=(0.403988174, [0.30852, -0.557795, -0.305043, -0.431874, 0.311606, -0.562577, -0.310846, -0.435878]))),
    ("pytorch", dict(pool3=(0.407736909, [0.0, 0.114539, 0.486966, 0.002569, 0.0, 0.117431, 0.487794, 0.002126]))),
])
def test_inception_computes_what_the_ports_do(inception, resize, values):
    """For both resizes, eight numbers of each output and its norm are those of torch-fidelity and pytorch-fid, within 1e-4."""
    net = inception[0]
    net.made["resize"] = resize
    images = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 3, 32, 32)).astype(np.uint8))
    out = net(images)
    assert {name: tuple(v.shape) for name, v in out.items()} == dict(pool3=(2, 2048), spatial=(2, 2023), logits=(2, 1008))
    for name, (norm, few) in values.items():
        assert out[name].square().mean().sqrt().item() == pytest.approx(norm, rel=1e-4)
        assert relative(out[name][:, ::out[name].shape[1] // 4][:, :4].flatten(), few) < 1e-4
    for wrong in (images.float(), images[:, :1], images[0]):
        with pytest.raises(ValueError, match="expected uint8 images"):
            net(wrong)


def test_inception_folded_is_what_was_loaded(inception):
    """Batch norms folded into convolutions change nothing: a folded layer equals its convolution, norm and ReLU one by one."""
    weights, x = torch.load(inception[2]), inputs((2, 80, 9, 9))[0]
    w = {name.removeprefix("Conv2d_4a_3x3."): value for name, value in weights.items() if name.startswith("Conv2d_4a_3x3.")}
    plain = F.batch_norm(F.conv2d(x, w["conv.weight"]), w["bn.running_mean"], w["bn.running_var"], w["bn.weight"], w["bn.bias"], eps=1e-3)
    assert relative(inception[0].Conv2d_4a_3x3(x), plain.relu()) < 1e-5
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in inception[0].modules())


def test_resize_conventions():
    """TensorFlow 1 samples at i n / m from the first pixel; PyTorch between pixel centres; a constant image stays constant."""
    x = torch.tensor([0.0, 8, 4]).expand(1, 1, 3, 3)
    assert fid.resize(x, 6, centres=False)[0, 0, 0].tolist() == [0, 4, 8, 6, 4, 4]
    assert fid.resize(x, 6, centres=True)[0, 0, 0].tolist() == [0, 2, 6, 7, 5, 4]
    for shape in [(32, 32), (256, 200), (500, 7)]:
        x = inputs((1, 3, *shape))[0]
        assert relative(fid.resize(x, 299, centres=True), F.interpolate(x, (299, 299), mode="bilinear")) < 1e-4
        assert torch.equal(fid.resize(torch.full_like(x, 7), 299, centres=False), torch.full((1, 3, 299, 299), 7.0))


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


def vector_sets():
    """Two sets of correlated vectors, (1500, 48) and (1200, 48)."""
    rng = np.random.RandomState(0)
    a = rng.standard_normal((1500, 48)) @ rng.standard_normal((48, 48)) * 0.3
    return a, rng.standard_normal((1200, 48)) @ rng.standard_normal((48, 48)) * 0.3 + 0.2, rng


def test_frechet_distance_is_the_published_tools():
    """That of pytorch-fid 0.3.0, within 1e-9, and where covariances have no full rank within its own error of 1e-7."""
    a, b, _ = vector_sets()
    assert fid.frechet_distance(*moments(a), *moments(b)) == pytest.approx(107.91284986772422, rel=1e-9)
    assert fid.frechet_distance(*moments(a[:40]), *moments(b[:30])) == pytest.approx(183.3301718134664, rel=1e-7)


def test_frechet_distance_is_the_formula():
    """With the square root of the product taken by SciPy, as the formula is written, the distance is the same."""
    (m1, s1), (m2, s2) = (moments(x) for x in vector_sets()[:2])
    formula = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(formula, rel=1e-9)


def test_frechet_distance_where_it_is_known():
    """Zero between equals, of any rank; |m1 - m2|^2 + sum (s1 - s2)^2 where covariances commute, also with zeros; symmetric."""
    a, b, _ = vector_sets()
    for x in (a, a[:20]):
        assert 0 <= fid.frechet_distance(*moments(x), *moments(x)) < 1e-10
    q, s1, s2 = np.linalg.qr(a[:48])[0], np.r_[np.zeros(10), np.linspace(0, 3, 38)], np.r_[np.linspace(2, 0, 40), np.zeros(8)]
    known = 48 * 0.25 + ((s1 - s2) ** 2).sum()
    got = fid.frechet_distance(np.zeros(48), q * s1**2 @ q.T, np.full(48, 0.5), q * s2**2 @ q.T)
    assert got == pytest.approx(known, rel=1e-7)
    assert fid.frechet_distance(*moments(a), *moments(b)) == pytest.approx(fid.frechet_distance(*moments(b), *moments(a)), rel=1e-10)
    with pytest.raises(ValueError, match="do not fit together"):
        fid.frechet_distance(*moments(a), *moments(b[:, 1:]))
    with pytest.raises(ValueError, match="not finite"):
        fid.frechet_distance(np.full(48, np.nan), moments(a)[1], *moments(b))


def test_moments_add_up_from_parts():
    """Batches of any size give the mean and covariance of the whole, even far from zero, where E[x x^T] - m m^T loses all digits."""
    a, _, _ = vector_sets()
    x = torch.from_numpy(a) + 1e7
    parts = [fid.Moments(part) for part in x.split([1, 499, 700, 300])]
    total = parts[0].add(parts[1]).add(parts[2].add(parts[3]))
    mean, covariance = moments(a)
    assert total.n == 1500 and np.allclose(total.mean.numpy() - 1e7, mean, atol=1e-7)
    assert np.allclose(total.scatter.numpy() / 1499, covariance, atol=1e-6)
    assert not np.allclose((x.T @ x / 1499 - 1500 / 1499 * x.mean(0).outer(x.mean(0))).numpy(), covariance, atol=1e-2)


def test_inception_score_is_the_published_tools():
    """That of torch-fidelity 0.4.0; 1 where every image gets the same scores, and the number of classes where each is sure of its own."""
    _, _, rng = vector_sets()
    assert fid.inception_score(2 * rng.standard_normal((1000, 20)).astype(np.float32)) == pytest.approx((3.3609154765, 0.1320813473), rel=1e-8)
    assert fid.inception_score(torch.ones(100, 7)) == pytest.approx((1, 0))
    assert fid.inception_score(1e4 * torch.eye(5).repeat(20, 1)) == pytest.approx((5, 0))
    with pytest.raises(ValueError, match="9 images do not make 10 splits"):
        fid.inception_score(torch.ones(9, 7))


def test_precision_and_recall_are_the_published_tools():
    """Those of torch-fidelity 0.4.0, whatever the size of blocks, and on a line where they can be counted by hand."""
    a, b, _ = vector_sets()
    assert fid.precision_recall(b[:, :8], a[:, :8]) == pytest.approx((0.74, 0.8458333333))
    for block in (200, 10_000):
        assert fid.share_inside(torch.from_numpy(a[:, :8]), torch.from_numpy(b[:, :8]), 3, block=block) == pytest.approx(0.74)
    real, generated = torch.arange(10.0)[:, None], torch.tensor([[0.0], [1], [2], [3], [50]])    # radii: 3, 2, 2, 2 .. and 3, 2, 2, 3, 49
    assert fid.precision_recall(real, generated) == (4 / 5, 1.0)
    assert fid.precision_recall(real, generated[:4]) == (1.0, 7 / 10)
    with pytest.raises(ValueError, match="more than 3 images on both sides, here 3 real and 5 generated"):
        fid.precision_recall(real[:3], generated)


class Eye(torch.nn.Module):
    """A network of random convolutions, as --features wants one: what shapes look like, in 40 numbers."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = torch.nn.Parameter(torch.randn(16, 3, 3, 3, generator=generator) / 5)
        self.b = torch.nn.Parameter(torch.randn(40, 16, 3, 3, generator=generator) / 12)

    def forward(self, images):
        x = torch.nn.functional.conv2d(images.float() / 127.5 - 1, self.a, stride=2).relu()
        return torch.nn.functional.conv2d(x, self.b, stride=2).relu().mean((2, 3))


@pytest.fixture
def gallery(tmp_path, monkeypatch):
    """A working folder with an eye, images in several forms, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", "cache")
    torch.jit.script(Eye()).save("eye.pt")
    images = data.shapes(length=60).images.permute(0, 2, 3, 1).numpy()
    noisy = (images + np.random.RandomState(0).normal(0, 20, images.shape)).clip(0, 255).astype(np.uint8)
    np.savez("clean.npz", arr_0=images)
    np.savez("noisy.npz", arr_0=noisy, arr_1=np.arange(60))
    Path("noisy").mkdir()
    for i, image in enumerate(noisy):
        Image.fromarray(image).save(f"noisy/{i:03d}.png")
    return images, noisy


def measured(capsys, *arguments, features=("--features", "eye.pt")):
    """The JSON line of a call, which must succeed."""
    capsys.readouterr()
    assert command("fid.py", *arguments, *features, "--device", "cpu", "--json") is None
    return json.loads(capsys.readouterr().out)


def test_fid_of_every_kind_of_input(gallery, capsys):
    """Images in an npz or folder, in any batches, and statistics give the number that the formula gives for their vectors."""
    with torch.no_grad():
        real, noisy = (Eye()(torch.from_numpy(images).permute(0, 3, 1, 2)).double().numpy() for images in gallery)
    known = fid.frechet_distance(*moments(noisy), *moments(real))
    np.savez("statistics.npz", **dict(zip(("mu", "sigma"), moments(real))))
    np.savez("published.npz", **dict(zip(("mu", "sigma"), moments(real))), arr_0=gallery[0][:10])     # as guided-diffusion's
    for samples, ref, *flags in [("noisy.npz", "clean.npz"), ("noisy", "clean.npz", "--batch-size", 7), ("noisy", "statistics.npz"),
                                 ("noisy.npz", "published.npz")]:
        out = measured(capsys, samples, "--ref", ref, *flags)
        assert out["Frechet distance on eye.pt"] == pytest.approx(known, rel=1e-6)
        assert not {"FID", "sFID", "IS"} & out.keys() and (("precision" in out) == (ref != "statistics.npz"))
        assert out["samples"] == dict(n=60, source=samples, size="16x16") and out["network"]["network"] == "eye.pt"
    both = measured(capsys, "clean.npz", "--ref", "clean.npz")
    assert both["Frechet distance on eye.pt"] < 1e-6 and both["precision"] == both["recall"] == 1
    assert "precision" not in measured(capsys, "clean.npz", "--ref", "clean.npz", "--no-pr")
    assert measured(capsys, "statistics.npz", "--ref", "statistics.npz", features=())["FID"] < 1e-9


def test_fid_with_inception(gallery, inception, capsys, monkeypatch):
    """Of Inception there are six numbers, FID of 2048 features and sFID of 2023; it is said if its weights are not the released
    ones, that 5 images are few, and how all was made."""
    np.savez("few.npz", arr_0=gallery[0][:5])
    monkeypatch.setattr(fid, "frechet_distance", lambda *given: sum(len(part) for part in given))      # ten seconds less
    fid.main(["few.npz", "--ref", "few.npz", "--inception", str(inception[2]), "--resize", "pytorch", "--device", "cpu"])
    shown = capsys.readouterr()
    numbers = {name: float(x) for name, x in re.findall(r"^(FID|sFID|IS deviation|IS|precision|recall) +(\d\S+)$", shown.out, re.M)}
    assert len(numbers) == 6 and (numbers["FID"], numbers["sFID"]) == (4 * 2048, 4 * 2023)
    assert numbers["precision"] == numbers["recall"] == 1 and numbers["IS"] >= 1
    assert "source few.npz, size 16x16, n 5" in shown.out and "resize pytorch" in shown.out
    assert "5 samples: under 2048 images" in shown.err and "not the released weights" in shown.err


def test_fid_of_a_checkpoint_is_that_of_its_samples(run, gallery, capsys):
    """--ckpt samples what sample.py writes, without writing it, and says how: sampler, steps, w, weights, step."""
    flags = ["--ckpt", run / "checkpoint.pt", "--num", 30, "--sampler", "ddpm", "--steps", 3, "--seed", 2, "--batch-size", 8]
    assert command("sample.py", *flags, "--device", "cpu", "--out", "x.npz") is None
    straight, written = measured(capsys, *flags, "--ref", "clean.npz"), measured(capsys, "x.npz", "--ref", "clean.npz")
    assert straight["Frechet distance on eye.pt"] == pytest.approx(written["Frechet distance on eye.pt"], rel=1e-6)
    made = straight["samples"]
    assert [made[key] for key in ("n", "size", "step", "weights", "sampler", "steps", "w", "seed")] == [30, "16x16", 6, "EMA", "ddpm", 3, 1, 2]
    assert straight["reference"] == dict(n=60, source="clean.npz", size="16x16")


def test_reference_is_computed_once(gallery, capsys):
    """A reference's numbers are kept under everything they depend on: images, network, size; other files of the same images share them."""
    first = measured(capsys, "noisy.npz", "--ref", "clean.npz")
    kept = list(Path("cache").glob("**/*.npz"))
    assert len(kept) == 1
    np.savez("copy.npz", arr_0=gallery[0])
    assert measured(capsys, "noisy.npz", "--ref", "copy.npz")["recall"] == first["recall"]
    assert list(Path("cache").glob("**/*.npz")) == kept
    with np.load(kept[0]) as held:
        assert json.loads(str(held["made"]))["network"] == "eye.pt" and held["pool3"].shape == (60, 40)
        np.savez(kept[0], **{**held, "mu": held["mu"] + 1})
    shifted = measured(capsys, "noisy.npz", "--ref", "clean.npz")["Frechet distance on eye.pt"]
    assert shifted > first["Frechet distance on eye.pt"] + 10                   # it is read, not computed anew
    for i, change in enumerate([["--ref", "noisy.npz"], ["--ref", "noisy", "--size", "8"], ["--ref", "shapes"]]):
        measured(capsys, "noisy.npz", *change)
        assert len(list(Path("cache").glob("**/*.npz"))) == 2 + i
    other = Eye()
    other.b.data += 1
    torch.jit.script(other).save("eye.pt")
    assert measured(capsys, "clean.npz", "--ref", "clean.npz")["Frechet distance on eye.pt"] < 1e-6
    other = measured(capsys, kept[0], "--ref", kept[0], features=())          # what they are of is written in the file
    assert other["Frechet distance on eye.pt"] < 1e-6 and "FID" not in other
    assert "statistics of" in command("fid.py", "clean.npz", "--ref", kept[0], "--features", "eye.pt", "--device", "cpu")


def test_vectors_of_a_large_reference_are_spread_evenly(gallery, monkeypatch):
    """Precision and recall look at so many reference images at most, evenly spread: the first ones of a sorted set are of one class."""
    monkeypatch.setattr(fid, "VECTORS", 20)
    images = data.ImagesInMemory(torch.from_numpy(gallery[0]).permute(0, 3, 1, 2))
    args = argparse.Namespace(ref="x", batch_size=7, pr=True)
    numbers = fid.collect_reference(fid.Scripted("eye.pt"), images, args, train.Processes("cpu"))
    with torch.no_grad():
        vectors = Eye()(images.images)
    assert numbers["n"] == 60 and np.allclose(numbers["pool3"], vectors[::3].numpy(), atol=1e-5)
    assert np.allclose(numbers["mu"], vectors.double().mean(0).numpy(), atol=1e-6)


def test_distance_grows_with_noise():
    """The more noise on shapes, the farther they are from other shapes."""
    images, distances = data.shapes(length=600).images, []
    with torch.no_grad():
        real = moments(Eye()(images[:300]).numpy())
        for level in (0, 5, 10, 20, 40):
            noise = torch.from_numpy(np.random.RandomState(0).normal(0, level, (300, 3, 16, 16)))
            distances.append(fid.frechet_distance(*real, *moments(Eye()((images[300:] + noise).clamp(0, 255).byte()).numpy())))
    assert distances == sorted(distances) and distances[-1] > 10 * distances[0] > 0


@pytest.mark.parametrize("arguments, message", [
    (["none.npz", "--ref", "clean.npz"], "none.npz: no such file"),
    (["clean.npz", "--ref", "cifar"], "cifar: no such file, folder, or data set (cifar10"),
    (["text.npz", "--ref", "clean.npz"], "text.npz: not an npz (or a damaged one)"),
    (["torn.npz", "--ref", "clean.npz"], "torn.npz: "),
    (["flipped.npz", "--ref", "clean.npz"], "flipped.npz: Bad CRC-32"),
    (["names.npz", "--ref", "clean.npz"], "names.npz: neither arr_0 (images) nor mu and sigma (statistics) is in it, but images, labels"),
    (["float.npz", "--ref", "clean.npz"], "float.npz: arr_0 is float32 (60, 16, 16, 3); expected uint8"),
    (["nchw.npz", "--ref", "clean.npz"], "nchw.npz: arr_0 is uint8 (60, 3, 16, 16) (NCHW? transpose(0, 2, 3, 1)); expected"),
    (["objects.npz", "--ref", "clean.npz"], "objects.npz: Object arrays cannot be loaded"),
    (["one.npz", "--ref", "clean.npz"], "one.npz: 1 image(s); a covariance takes at least two"),
    (["clean.npz", "--ref", "empty.npz"], "empty.npz: 0 image(s)"),
    (["three.npz", "--ref", "clean.npz"], "precision and recall need more than 3 images on both sides, here 60 real and 3 generated (--no-pr"),
    (["mixed", "--ref", "clean.npz"], "square images of one size are needed; --size PIXELS"),
    (["corrupt", "--ref", "clean.npz"], "b.png"),
    (["torn", "--ref", "clean.npz"], "b.png: not a readable image"),
    (["nothing", "--ref", "clean.npz"], "nothing: holds no image"),
    (["clean.npz", "--ref", "statistics.npz"], "means and covariances do not fit together: (40,), (40, 40), (5,), (5, 5)"),
    (["clean.npz", "--ref", "nan.npz"], "means or covariances are not finite"),
    (["clean.npz", "--ref", "clean.npz", "--features", "none.pt"], "none.pt"),
    (["clean.npz", "--ref", "clean.npz", "--features", "text.npz"], "--features text.npz: "),
    (["clean.npz", "--ref", "clean.npz", "--features", "map.pt"], "map.pt: images (N, 3, H, W) do not become vectors (N, D)"),
    (["clean.npz", "--ref", "clean.npz", "--features", "fails.pt"], "--features fails.pt: "),
    (["clean.npz", "--ref", "clean.npz", "--inception", "none.pth"], "none.pth: no such file of weights"),
    (["clean.npz", "--ref", "clean.npz", "--inception", "eye.pth"], "eye.pth: does not fit the model: "),
    (["clean.npz", "--ref", "clean.npz", "--inception"], "the download failed"),
    (["--ref", "clean.npz"], "give either an npz (arr_0), a folder of images"),
    (["clean.npz", "--ref", "clean.npz", "--ckpt", "x.pt"], "or --ckpt or --weights, to sample from"),
    (["--ckpt", "x.pt", "--ref", "clean.npz"], "--num N: say how many"),
    (["--ckpt", "x.pt", "--ref", "clean.npz", "--num", "10"], "x.pt: no such checkpoint"),
    (["clean.npz", "--ref", "clean.npz", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
    (["noisy", "--ref", "clean.npz", "--size", "0"], "--size 0: must be at least 1"),
    (["clean.npz", "--ref", "cifar10", "--data-dir", "nowhere"], "--data-dir nowhere: no such folder"),
])
def test_fid_says_what_is_wrong_in_one_line(gallery, monkeypatch, arguments, message):
    """Bad files, networks and flags: exit code not 0 and one line that names what is wrong."""
    images, noisy = gallery
    np.savez("names.npz", images=images, labels=np.zeros(60))
    np.savez("float.npz", arr_0=images.astype(np.float32) / 255)
    np.savez("nchw.npz", arr_0=images.transpose(0, 3, 1, 2))
    np.savez("objects.npz", arr_0=np.array([images[0], None], dtype=object))
    for name, rows in [("one", 1), ("three", 3), ("empty", 0)]:
        np.savez(f"{name}.npz", arr_0=images[:rows])
    np.savez("statistics.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez("nan.npz", mu=np.full(40, np.nan), sigma=np.eye(40))
    whole = bytearray(Path("clean.npz").read_bytes())
    Path("torn.npz").write_bytes(whole[:-3000])
    whole[5000] ^= 255
    Path("flipped.npz").write_bytes(whole)
    Path("text.npz").write_text("no images")
    for name in ("mixed", "corrupt", "torn", "nothing"):
        Path(name).mkdir()
        if name != "nothing":
            Image.fromarray(noisy[0]).save(f"{name}/a.png")
    Image.fromarray(noisy[0][:8, :8]).save("mixed/b.png")
    Path("corrupt/b.png").write_bytes(b"no image at all")
    Path("torn/b.png").write_bytes(Path("torn/a.png").read_bytes()[:300])
    torch.save(Eye().state_dict(), "eye.pth")
    torch.jit.script(torch.nn.Identity()).save("map.pt")
    torch.jit.script(torch.nn.Linear(3, 3)).save("fails.pt")
    if arguments[-1] == "--inception":                  # as without a network
        arguments = arguments[:-1]
        monkeypatch.setattr(fid.torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("unreachable")))
    elif "--features" not in arguments and "--inception" not in arguments:
        arguments = [*arguments, "--features", "eye.pt"]
    error = command("fid.py", *arguments, "--device", "cpu")
    assert isinstance(error, str) and error.startswith("fid.py: ") and message in error and "\n" not in error


def test_mixed_sizes_are_scaled_where_asked(gallery, capsys):
    """--size makes a folder of mixed sizes comparable, as training does."""
    Image.new("RGB", (40, 24), (200, 30, 30)).save("noisy/wide.png")
    assert "040" not in str(command("fid.py", "noisy", "--ref", "clean.npz", "--features", "eye.pt", "--device", "cpu"))
    assert measured(capsys, "noisy", "--ref", "clean.npz", "--size", 16)["samples"] == dict(n=61, source="noisy", size="16x16")


def test_large_folders_are_measured_through_workers(gallery, capsys, monkeypatch):
    """A folder too large for memory is read by workers, to the same numbers, be it the samples' or the reference's."""
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    known = None
    for samples, ref in [("noisy", "clean.npz"), ("noisy.npz", "clean.npz"), ("clean.npz", "noisy"), ("clean.npz", "noisy.npz")]:
        out = measured(capsys, samples, "--ref", ref, "--batch-size", 25)
        numbers = [out["Frechet distance on eye.pt"], *sorted([out["precision"], out["recall"]])]
        known = known or numbers
        assert numbers == pytest.approx(known, rel=1e-6)


@slow
def test_distance_falls_as_training_goes_on(tmp_path, monkeypatch, capsys):
    """Samples come closer to shapes from checkpoint to checkpoint: 50, 200 and 800 steps."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.jit.script(Eye()).save(tmp_path / "eye.pt")
    distances = []
    for steps in (50, 200, 800):
        train.main(["--model", "uvit_tiny", "--data", "shapes", "--steps", str(steps), "--sample-every", "0", "--out", str(tmp_path)])
        out = measured(capsys, "--ckpt", tmp_path / "checkpoint.pt", "--num", 200, "--ref", "shapes", features=("--features", tmp_path / "eye.pt"))
        distances.append(next(iter(out.values())))
    assert distances[0] > 1.2 * distances[1] > 6 * distances[2]         # 0.616, 0.434, 0.029


@slow
def test_two_processes_measure_as_one(run, gallery):
    """Under torchrun two processes find the numbers that one finds, from files and from a checkpoint, whatever their shares."""
    flags = ["--ref", Path("clean.npz").resolve(), "--features", Path("eye.pt").resolve(), "--device", "cpu", "--json"]
    pair = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    for what in (["noisy.npz", "--batch-size", 8], ["noisy.npz", "--batch-size", 100],
                 ["--ckpt", run / "checkpoint.pt", "--num", 20, "--steps", 2, "--batch-size", 6]):
        what = [Path(what[0]).resolve() if what[0] == "noisy.npz" else what[0], *what[1:]]
        results = []
        for number, start in enumerate(([], pair)):
            ended = shell(*start, "fid.py", *what, *flags, TORCH_HOME=str(Path(f"cache{number}").resolve()))
            assert ended.returncode == 0, ended.stderr
            results.append(json.loads(ended.stdout.splitlines()[-1]))
        one, two = (next(iter(result.values())) for result in results)
        assert two == pytest.approx(one, rel=1e-6) and results[0]["precision"] == results[1]["precision"]


# ---------------------------------------------------------------------------------------------------------------------
# bench.py

BENCH = ["--model", "uvit_tiny", "--data", "shapes", "--width=32", "--heads=2", "--batch-size", "2", "--repeats", "2", "--evaluations", "2",
         "--device", "cpu"]


@pytest.fixture
def no_wait(monkeypatch):
    """Blocks of one call, and a small product for the ceiling: these tests are not about time."""
    monkeypatch.setattr(bench, "BLOCK", 1e-9)
    monkeypatch.setitem(bench.CEILING, "cpu", 64)


def benched(capsys, *arguments):
    """bench.py's JSON line, read."""
    capsys.readouterr()
    bench.main([*BENCH, *map(str, arguments), "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("name, dataset, parameters, gmacs", [
    ("uvit_s2", "cifar10", 44.26, 12.20), ("uvit_h4", "imagenet512", 500.94, 133.23), ("uvit_s2", "mscoco256", 44.69, 16.23),
    ("dit_s2", "imagenet256", 32.96 - 256 * 384e-6, 6.06), ("udit_s", "imagenet256", 58.90, 6.02)])
def test_bench_counts_what_is_published(name, dataset, parameters, gmacs):
    """Parameters (DiT's without its fixed table) and multiply-adds of a model on a data set are the published ones within 0.5 %."""
    config = bench.configure(bench.parse(["--model", name, "--data", dataset, "--batch-size", "7"]))
    assert config.parameters / 1e6 == pytest.approx(parameters, rel=5e-3)
    assert config.macs / 1e9 == pytest.approx(gmacs, rel=5e-3)


def test_bench_rows_of_the_papers_can_be_built(monkeypatch):
    """Every row of --papers names a model, data and flags that go together; a later flag overrides the row's."""
    monkeypatch.setattr(bench, "count", lambda model, config: (1, 1))       # the slow part
    for words, _ in bench.ON_GPU + bench.ON_CPU:
        config = bench.configure(bench.parse([*bench.flags(words), "--device", "cpu", "--batch-size", "3"]))
        assert config.batch_size == 3 and set(config.measure) <= bench.WORKS.keys()


def test_bench_json_is_one_line_and_consistent(capsys, no_wait):
    """Rates are counts over times, the share is of the product measured beside, and medians lie between the extremes."""
    report = benched(capsys)
    (result,) = report["results"]
    setting = result["settings"][""]
    assert setting["model"] == "uvit_tiny" and setting["arguments"]["width"] == 32 and setting["batch_size"] == 2
    assert [row["work"] for row in result["rows"][::2]] == ["forward", "step", "sampling"]
    for row, product, passes in zip(result["rows"][::2], result["rows"][1::2], (1, 3, 2)):
        assert row["images_per_sec"] * row["seconds"] == pytest.approx(2)
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["flops_per_sec"] * row["seconds"] == pytest.approx(2 * 2 * passes * setting["macs"])
        assert row["share"] * product["flops_per_sec"] == pytest.approx(row["flops_per_sec"])
        assert product["flops_per_sec"] * product["seconds"] == pytest.approx(2 * 64**3) and product["work"] == "product, off"


def test_bench_compares_two_settings(capsys, no_wait):
    """Each side has its own flags over the common ones, and B's row the ratio of both speeds."""
    (result,) = benched(capsys, "--measure", "forward", "--compare", "amp=off", "batch-size=4 skip=none no-fold")["results"]
    a, b = result["settings"]["A"], result["settings"]["B"]
    assert (a["batch_size"], b["batch_size"]) == (2, 4) and b["arguments"]["skip"] == "none" and a["fold"] and not b["fold"]
    assert b["parameters"] < a["parameters"]
    first, second, product = result["rows"]
    assert (first["work"], second["work"]) == ("A forward", "B forward") and "speed_ratio" not in first
    assert second["speed_ratio_min"] <= second["speed_ratio"] <= second["speed_ratio_max"]


def test_bench_works_take_turns():
    """Blocks run A B A B, each of its own number of calls; what prepares a block comes before each."""
    ran = []
    a = bench.Work(lambda: ran.append("a"), 1, 1, "off", calls=2)
    b = bench.Work(lambda: ran.append("b"), 1, 1, "off", before=lambda: ran.append("-"))
    seconds = bench.alternate([a, b], 3, torch.device("cpu"))
    assert "".join(ran) == 3 * "aa-b"
    assert [len(taken) for taken in seconds] == [3, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_bench_sees_the_peak():
    """The peak is what a work holds at most, not what is left of it, within a few MB."""
    work = bench.warm_up(lambda: bench.Work(lambda: torch.ones(25_000_000).sum(), 1, 1, "off"), torch.device("cpu"))
    assert work.peak == pytest.approx(100e6, abs=20e6)


def test_bench_goes_on_where_memory_does_not_suffice(capsys, no_wait, monkeypatch):
    """A work that runs out of memory is reported as such, and those after it are measured; other errors are not hidden."""
    def fails(error):
        def work(config, device):
            raise error
        return work

    monkeypatch.setitem(bench.WORKS, "step", fails(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")))
    rows = benched(capsys)["results"][0]["rows"]
    assert [(row["work"], row.get("error")) for row in rows if not row["work"].startswith("product")] == [
        ("forward", None), ("step", "out of memory"), ("sampling", None)]
    monkeypatch.setitem(bench.WORKS, "step", fails(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        bench.main(BENCH)


@pytest.mark.parametrize("in_memory", [True, False], ids=["memory", "workers"])
def test_bench_loop_reads_stored_images(tmp_path, capsys, no_wait, monkeypatch, in_memory):
    """--loop steps on random images and on a folder's, from memory or by workers, and reads alone."""
    for i in range(3):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
    if not in_memory:
        monkeypatch.setattr(data, "IN_MEMORY", 0)
    report = benched(capsys, "--data", tmp_path, "--image-size", 16, "--loop", "--workers", 1)
    rows = report["results"][0]["rows"]
    assert [row["work"] for row in rows] == ["step, random", "step, stored", "reading alone", "product, off"]
    assert rows[2]["share"] == 0 and all(row["images_per_sec"] > 0 for row in rows[:3])


def test_bench_prints_a_table(capsys, no_wait):
    """For people: the machine, the setting with its counts, and a line for each work."""
    bench.main([*BENCH, "--cfg", "2", "--grad-checkpoint", "--channels-last"])
    text = capsys.readouterr().out
    assert re.search(r"uvit_tiny, shapes 3x16x16: \d\.\d\d M parameters, .* batch 2, amp off, channels-last, grad-checkpoint 1, ", text)
    assert re.search(r"forward .*\n +product, off .*\n +step .*\n.*\n +sampling .*\n", text)


def test_bench_cka_knows_what_is_alike():
    """1 for a turned, scaled and shifted copy; about 0 for independent ones; and the value of the definition by kernels."""
    torch.manual_seed(0)
    a, b = torch.randn(2000, 8, dtype=torch.float64), torch.randn(2000, 5, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert bench.cka(a, 3 * a @ turn + 1) == pytest.approx(1)
    assert bench.cka(a, b) < 0.01
    b[:, :3] += a[:, :3]
    centre = torch.eye(2000, dtype=torch.float64) - 1 / 2000
    k, m = centre @ a @ a.T @ centre, centre @ b @ b.T @ centre
    assert bench.cka(a, b) == pytest.approx(((k * m).sum() / (k.norm() * m.norm())).item())


@pytest.mark.parametrize("model, blocks", [("uvit_tiny", ["in_blocks.0", "mid_block", "out_blocks.0"]), ("dit_tiny", 4)])
def test_bench_outputs_of_blocks_in_their_order(model, blocks):
    """The outputs of all blocks, the last of which is what the head of the network sees."""
    torch.manual_seed(0)
    net, seen = train.MODELS[model](image_size=16, in_channels=3), []
    head = net.norm if model == "uvit_tiny" else net.final_layer
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].flatten(0, -2)))
    found = bench.block_outputs(net, torch.randn(2, 3, 16, 16), torch.ones(2))
    assert list(found) == blocks if isinstance(blocks, list) else len(found) == blocks
    assert torch.equal(list(found.values())[-1], seen[0])
    hook.remove()
    assert not any(module._forward_hooks for module in net.modules())


def test_bench_cka_draws_and_prints_every_checkpoint(run, tmp_path, capsys):
    """A square of the blocks for each checkpoint, white on its diagonal; a network of another kind is refused."""
    bench.main(["--cka", *2 * [str(run / "checkpoint.pt")], "--batch-size", "8", "--out", str(tmp_path / "cka.png")])
    text, picture = capsys.readouterr().out, np.asarray(Image.open(tmp_path / "cka.png"))
    assert text.count("mid_block") == 2 and picture.shape == (24 + 3 * 24, 3 * 24 + 24 + 3 * 24)
    assert (picture[36::24, 12:72:24].diagonal() == 255).all() and picture[36, 60] < 250     # first block, last
    with pytest.raises(ValueError, match="only the blocks of a U-ViT or a DiT"):
        bench.block_outputs(unet.MODELS["unet_tiny"](image_size=16, in_channels=3), torch.zeros(1, 3, 16, 16), torch.ones(1))


def test_bench_papers_prints_every_row_beside_what_is_reported(capsys, no_wait, monkeypatch):
    """--papers runs each row of the table in its own setting, with other flags for all, and prints what was reported."""
    monkeypatch.setattr(bench, "ON_CPU", [("model=uvit_tiny data=shapes batch-size=3", "1 ms"), ("model=dit_tiny data=cifar10", "2 ms")])
    bench.main(["--papers", "--device", "cpu", "--measure", "forward", "--batch-size", "2", "--repeats", "1"])
    text = capsys.readouterr().out
    assert re.findall(r"^(\w+), (\w+) .* batch (\d)", text, re.M) == [("uvit_tiny", "shapes", "2"), ("dit_tiny", "cifar10", "2")]
    assert re.findall(r"two cores: (.*)", text) == ["1 ms", "2 ms"] and text.count("forward") == 2


@pytest.mark.parametrize("script, arguments", [
    ("train.py", [*SMALL, "--out", "run"]), ("sample.py", ["--ckpt", "a.pt"]), ("fid.py", ["a.npz", "--ref", "b.npz"]),
    ("bench.py", BENCH)])
def test_ctrl_c_before_the_work_begins_is_one_line(script, arguments, tmp_path, monkeypatch):
    """Interrupted where nothing catches the signal yet, every command ends with a line, not a stack trace."""
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "Processes", interrupt)      # what the other commands begin with
    monkeypatch.setattr(data, "load", interrupt)
    assert command(script, *arguments).startswith(f"{script}: interrupted")


@pytest.mark.parametrize("arguments, message", [
    ([], "give --model and --data, or --papers"),
    (["--model", "uvit_s9", "--data", "cifar10"], "unknown model 'uvit_s9'"),
    (["--model", "uvit_s2", "--data", "photos"], "--data photos: choose from shapes, cifar10, "),
    (["--model", "uvit_s2", "--data", "photos", "--loop"], "photos: no such data set or folder"),
    ([*BENCH, "--depht=3"], "unexpected keyword argument 'depht'; its arguments are image_size, "),
    ([*BENCH, "--depth=3"], "depth 3 is odd"),
    ([*BENCH, "--compare", "foo", ""], "--foo: neither a flag (see --help) nor KEY=VALUE"),
    ([*BENCH, "--compare", "", "batch-size=0"], "--batch-size 0: must be at least 1"),
    ([*BENCH, "--measure", "forward,speed"], "--measure forward,speed: choose from forward, step, sampling"),
    ([*BENCH, "--evaluations", "0"], "must be at least 1"),
    ([*BENCH, "--loop", "--papers"], "--loop stands alone"),
    (["--model", "uvit_s2", "--data", "cifar10", "--cfg", "2"], "--cfg 2.0: uvit_s2 learns no null label on cifar10"),
])
def test_bench_says_what_is_wrong_in_one_line(arguments, message):
    """Bad names, numbers and flags end with one line and exit code not 0."""
    error = command("bench.py", *arguments)
    assert error.startswith("bench.py: ") and message in error and "\n" not in error


# ---------------------------------------------------------------------------------------------------------------------
# README.md

README = (HERE / "README.md").read_text()


def blocks(language):
    """The contents of README's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_readme_links_lead_somewhere():
    """Every link to a file or a picture names one, and every link to a heading is what GitHub makes of one."""
    headings = {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)", README, re.M)}
    text = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert len(links) > 20
    assert [link for link in links if (link[1:] not in headings if link[0] == "#" else not (HERE / link).exists())] == []


def test_readme_quotes_code_as_it_stands():
    """A line of Python that stands alone is one of diffusion.py, letter by letter."""
    quoted = [block.strip() for block in blocks("python") if block.count("\n") == 1]
    lines = [line.strip() for line in (HERE / "diffusion.py").read_text().splitlines()]
    assert len(quoted) == 4
    for code in quoted:
        assert any(line.split("  #")[0].strip() == code for line in lines), code


def test_readme_examples_in_python_compile():
    for block in blocks("python"):
        compile(block, "README.md", "exec")


def test_readme_commands_are_understood(tmp_path, monkeypatch):
    """The shell runs every block, loops and all, with stand-ins for its programs; then each script reads its flags."""
    calls = tmp_path / "calls"
    stand_ins = "".join(f'{name}() {{ printf "%s\\0" {name} "$@" $\'\\n\' >> "{calls}"; }}; '
                        for name in ("python", "torchrun", "pip", "tensorboard"))
    shell = "\n".join(f"( {block}\n)" for block in blocks("sh"))
    subprocess.run(["bash", "-euc", stand_ins + 'timeout() { shift; "$@"; }\n' + shell], cwd=tmp_path, check=True)
    commands = [call.split("\0")[:-1] for call in calls.read_text().split("\n\0")[:-1]]
    parsers = {"train.py": train.parse, "sample.py": sample.parse, "fid.py": fid.parse, "bench.py": bench.parse}
    monkeypatch.setattr(data, "kind", lambda name: name if name in data.DATASETS else "folder")     # no such folders here
    understood = collections.Counter()
    for command in commands:
        script = next((word for word in command if word in parsers), None)
        if script:
            parsers[script](command[command.index(script) + 1:])
            understood[script] += 1
    assert understood.keys() == parsers.keys() and understood["train.py"] > 20, understood
