"""Every test: what the files of this project compute, and what they refuse.

    python -m pytest test_all.py        # one to two minutes on two idle CPU cores

Each test says in one line which property it holds. "As released" means: as the released code of the papers computed
it, from weights and inputs that are functions of names and seeds (`fill`, `inputs`), so that a few numbers carried over
here pin down a whole network or sampler. What is slow or needs other packages: .ci/endure.py.
"""
import argparse
import collections
import copy
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import bench
import bookkeeping
import convnext
import data
import diffusion
import dit
import encode
import fid
import jit
import objectives
import recipes
import sample
import train
import udit
import unet
import uvit

HERE = Path(__file__).parent
SMALL = ("--model uvit_tiny --data shapes --schedule vp --model-args width=32 heads=2 depth=2 "
         "--batch-size 8 --steps 6 --warmup 2 --lr-schedule constant --log-every 1 --save-every 3 --sample-every 0 "
         "--device cpu").split()


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


def inputs(shape, num_classes=0, text=None, times=(0.0, 1.0), seed=0):
    """x ~ N(0, 1) of this shape, times evenly spaced, and labels or text features or None."""
    rng = np.random.RandomState(seed)
    x = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    t = torch.from_numpy(np.linspace(*times, shape[0]).astype(np.float32))
    y = torch.from_numpy(rng.randint(0, num_classes, shape[0])) if num_classes else None
    return x, t, torch.from_numpy(rng.standard_normal((shape[0], *text)).astype(np.float32)) if text else y


def relative(a, b):
    """Largest difference over the largest value."""
    b = torch.as_tensor(b, dtype=torch.float64)
    return ((a.double() - b).abs().max() / b.abs().max()).item()


def same(a, b):
    """Do two state dicts hold the same numbers, to the last bit?"""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def command(script, *arguments):
    """Run a script as the command line does, in this process. Returns its exit message, or None where it succeeded."""
    argv = sys.argv
    sys.argv = [script, *map(str, arguments)]
    try:
        runpy.run_path(str(HERE / script), run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv


def shell(*arguments, timeout=600, **environment):
    """Run Python in a process of its own, in the repository's folder, on one thread unless told otherwise."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=HERE, capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def refuses(words, function, *arguments, error=ValueError, **options):
    """Assert that this call raises a ValueError (or another error) of one line, in which the words match."""
    with pytest.raises(error, match=rf"^.*({words}).*\Z"):
        function(*arguments, **options)


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def trained(out, *flags):
    """Train the smallest network for six steps, or as the flags say -> (its checkpoint, the rows of its log)."""
    train.main([*SMALL, *map(str, flags), "--out", str(out)])
    return bookkeeping.read_checkpoint(Path(out) / "checkpoint.pt"), log_of(out)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run of six steps. Tests read it, and copy it before they change anything."""
    out = tmp_path_factory.mktemp("run") / "whole"
    trained(out)
    return out


# What each command refuses: {script: [(flags, words of the message), or (flags, words, function that makes files)]}.
# Flags are one string or a list, in which {run} is a finished run; the function gets the folder where the command runs.
REFUSALS = collections.defaultdict(list)


# ---------------------------------------------------------------------------------------------------------------------
# The networks: each property once for all families, then what one family alone has

NETWORKS = {    # family: (class, arguments of a small network for images of 8 x 16, {variant: more arguments})
    "uvit": (uvit.UViT, dict(width=32, depth=2, heads=2), {
        "labels": dict(num_classes=5), "text": dict(text_dim=12, text_tokens=3), "adaln": dict(time="adaln"),
        "add": dict(skip="add"), "genvit": dict(skip="none", conv=False, time="adaln")}),
    "dit": (dit.DiT, dict(in_channels=3, width=64, depth=2, heads=4, num_classes=5), {
        **{block: dict(block=block) for block in ("adaln_zero", "adaln", "cross", "in_context")},
        "unconditional": dict(num_classes=0)}),
    "udit": (udit.UDiT, dict(in_channels=3, width=16, depths=(1, 0, 1, 0, 0), heads=2), {
        "full": dict(num_classes=5), "vanilla": udit.VANILLA, "dit-unet": dict(downsample="none", **udit.VANILLA),
        "kv": dict(downsample="kv"), "shuffle": dict(downsampler="shuffle"), "no-ffn-conv": dict(ffn_conv=False),
        "folded": dict(reparam=False, downsampler="conv", learn_sigma=False)}),
    "unet": (unet.UNet, dict(channels=32, multipliers=(1, 2), blocks=1, attention=(2,), head_channels=32), {
        "iddpm": dict(num_classes=5), "ldm": dict(text_dim=12, text_tokens=3, scale_shift=False), "unconditional": {},
        "adm": dict(num_classes=5, resample="block", blocks=2, attention=(1, 2), learn_sigma=True)}),
    "jit": (jit.JiT, dict(patch_size=2, width=32, depth=4, heads=2, bottleneck=8, context_tokens=3, context_start=2), {
        "labels": dict(num_classes=5), "unconditional": {}, "as-dit": dict(
            num_classes=5, norm="layer", mlp="gelu", rotary=False, qk_norm=False, bottleneck=0, context_tokens=0)}),
}
every_network = pytest.mark.parametrize(
    "family, variant", [(family, variant) for family, (_, _, variants) in NETWORKS.items() for variant in variants])


def tiny(family, variant=None, filled=True, **arguments):
    """A small network, of the first variant by default, with filled or new weights, and a batch (x, t, y) of four."""
    kind, small, variants = NETWORKS[family]
    torch.manual_seed(0)
    model = kind(**{"image_size": (8, 16), **small, **variants[variant or next(iter(variants))], **arguments})
    if filled:
        model.load_state_dict(fill(model.state_dict()))
    text = getattr(model, "text_shape", None)
    return model, inputs((4, model.in_channels, *model.image_size), model.label_rows, text, times=(0, 999))


NARROW = dict(width=128, depth=4, heads=4)
LATENT = dict(in_channels=4, num_classes=1000)
TEXT = dict(in_channels=4, text_dim=768)
LABELLED = dict(shape=(2, 4, 32, 32), num_classes=1000, times=(0, 999))


@pytest.mark.parametrize("name, arguments, given, norm, values", [
    ("uvit_h2", dict(LATENT, **NARROW), dict(shape=(2, 4, 32, 32), num_classes=1001, times=(1, 1000)),
     1.011075, [0.6560059, -0.295461]),
    ("uvit_s4", dict(NARROW, skip="none"), dict(shape=(2, 3, 32, 32), times=(1, 998)), 0.9151295, [0.021949, 0.301134]),
    ("uvit_s2", dict(TEXT, **NARROW), dict(shape=(2, 4, 32, 32), text=(77, 768), times=(1, 1000)),
     0.9539973, [0.04807537, 0.6445962]),
    ("dit_s2", LATENT, LABELLED, 1.123117, [-0.0562032, -0.7029108]),
    ("udit_s", LATENT, LABELLED, 1.055047, [0.1152816, 0.2458447]),
    ("jit_tiny", dict(width=128, bottleneck=16, num_classes=10), dict(shape=(4, 3, 32, 32), num_classes=11, seed=3),
     1.020194, [0.7427914, -0.9262719])])
@torch.no_grad()
def test_network_computes_what_the_released_one_does(name, arguments, given, norm, values):
    """Two numbers of the output and its norm are as released, within 1e-5 (of the largest number of the output)."""
    model = recipes.MODELS[name](**arguments)
    model.load_state_dict(fill(model.state_dict()))
    out = model(*inputs(**given))
    assert (out.flatten()[::out.numel() // 2] - torch.tensor(values)).abs().max() < 1e-5 * out.abs().max()
    assert out.square().mean().sqrt().item() == pytest.approx(norm, rel=1e-5)


# For each variant: its output along a fixed direction, plus the same with small weights at the end of each branch (what
# enters a norm is then small, in JiT also queries and keys, so that its eps counts) and with U-DiT's cosines scaled by
# more than the 100 it allows. Taken when the parts of U-Net, U-DiT and JiT equalled their formulas.
ENDS = r"bias|pos_emb|label_emb|(patch|context)_embed|x_embedder|stem|conv2|proj_in|to_out|fc2|w3|_out\."
DIRECTIONS = {
    "uvit": dict(labels=1.120964, text=0.990622, adaln=0.146498, add=0.323717, genvit=0.176914),
    "dit": dict(adaln_zero=-1.417273, adaln=-0.512550, cross=-0.697741, in_context=-0.323446, unconditional=-1.233132),
    "udit": {"full": -2.472040, "vanilla": -2.634199, "dit-unet": -1.726047, "kv": -1.926147, "shuffle": -2.016352,
             "no-ffn-conv": -2.553306, "folded": -2.120649},
    "unet": dict(iddpm=0.143019, ldm=-0.016478, unconditional=0.184436, adm=-1.078654),
    "jit": {"labels": 0.289562, "unconditional": 0.108231, "as-dit": -0.003838},
}


@every_network
@torch.no_grad()
def test_network_computes_what_it_did(family, variant):
    """Each variant's output, projected on a fixed direction, is what it was, also if little enters the norms."""
    (model, batch), found = tiny(family, variant), 0
    small = ENDS + ("|qkv" if family == "jit" else r"|attn.?\.proj")
    for factor, scale in (1, 1), (3e-3, 3):
        for name, p in model.state_dict().items():
            p *= factor if re.search(small, name) else scale if name.endswith("logit_scale") else 1
        out = model(*batch).flatten()
        found += (out @ torch.arange(len(out)).sin() / out.norm()).item()
    assert found == pytest.approx(DIRECTIONS[family][variant], abs=2e-5)      # processors round differently


LARGE = dict(LATENT, image_size=64)
RELEASED = [    # name, arguments, hash of names and shapes (if weights are released), M parameters, GMACs of one image
    ("uvit_s2", {}, "b38ffe35bab000aa", 44.26, 12.2), ("uvit_s4", dict(image_size=64), "ecb30627c7534fdf", 44.29, None),
    ("uvit_m4", dict(image_size=64, num_classes=1000, null_class=False), "928cf19184638c83", 130.94, None),
    ("uvit_l4", dict(image_size=64, num_classes=1000, null_class=False), "b51cfc0d8100fbf5", 286.83, None),
    ("uvit_l2", LATENT, "da42ca0b04b6afc3", 286.76, None), ("uvit_h2", LATENT, "74dc6939adec520f", 500.83, None),
    ("uvit_l4", LARGE, "fe701646042735c4", 286.86, None), ("uvit_h4", LARGE, "17c4d0081842ef08", 500.94, None),
    ("uvit_s2", TEXT, "146261d6158fe797", 44.69, 16.23), ("uvit_s2_deep", TEXT, "bb3aa5b9bfa1c6bd", 58.35, None),
    ("uvit_s4", dict(skip="none", conv=False, time="adaln"), None, 54.68, None),                    # GenViT
    ("dit_xl2", LATENT, "af6f07b0d6cf8bb4", 675.13, None), ("dit_xl2", LARGE, "4ee12bdf2bce8ddc", 676.01, None),
    *[(f"dit_{size}", LATENT, None, *counts) for size, *counts in [
        ("s2", 32.96, 6.06), ("s4", 32.95, 1.41), ("s8", 33.15, None), ("b2", 130.51, None), ("l2", 458.10, None)]],
    *[("dit_xl2", dict(LATENT, block=block), None, millions, None) for block, millions in [
        ("adaln", 600.67), ("cross", 598.31), ("in_context", 449.49)]],         # published: 600, 598 and 449 M
    ("udit_s", LATENT, "92e63b82eccc5772", 58.90, None), ("udit_b", LATENT, "5f69ac40bc6bf660", 231.25, None),
    ("udit_l", LATENT, "f191634b70ab9866", 916.34, None),
    ("udit_s", dict(LATENT, reparam=False, downsampler="conv"), None, 52.05, 6.02),                # after fold()
    *[("udit_tiny", dict(udit.VANILLA, downsample=way, image_size=64), None, None, gmacs) for way, gmacs in [
        ("tokens", 2.70688), ("kv", 2.70688), ("none", 7.93869)]],              # the first two cost the same
    ("unet_cifar", {}, None, 52.53, None), ("unet_ldm_text", {}, None, 52.97, None),            # published: 53 M each
    ("unet_adm", LATENT, None, 645.90, 135.37),                                # published: 646 M, 135 GMACs
    *[(f"jit_{size}", dict(num_classes=1000), *row) for size, *row in [
        ("b16", "4f31701b4a371ac4", 131.32, 25.22), ("l16", "946ec9ab4963c5a9", 459.14, 87.94),
        ("h16", "a7ad504f8b19f50a", 952.84, 181.95), ("g16", None, 2007.56, 383.74), ("b32", None, 133.39, None)]],
]


@pytest.mark.parametrize("name, arguments, names_hash, millions, gmacs", RELEASED)
@torch.no_grad()
def test_network_has_the_released_names_shapes_and_size(name, arguments, names_hash, millions, gmacs):
    """A released checkpoint has these names and shapes, so it loads strictly; the counts are as published."""
    with torch.device("meta"):      # shapes alone: nothing is allocated or computed
        model = recipes.MODELS[name](**arguments)
        x, text = torch.zeros(1, model.in_channels, *model.image_size), getattr(model, "text_shape", None)
        y = torch.zeros(1, *text) if text else torch.zeros(1, dtype=torch.int64) if model.label_rows else None
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    lines = sorted(f"{key} {shape}" for key, shape in shapes.items())
    assert names_hash in (None, hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16])
    assert millions in (None, pytest.approx(sum(map(math.prod, shapes.values())) / 1e6, rel=2e-4))
    if gmacs:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model(x, x[:, 0, 0, 0], y)
        assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=5e-4, abs=5e-3)


@every_network
def test_network_learns(family, variant):
    """A network starts as zero (U-ViT does not), learns to copy its input, and every parameter gets a gradient."""
    (model, batch), losses = tiny(family, variant, filled=False), []
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=8e-3, fused=True)
    assert family == "uvit" or not model(*batch).any()
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.mse_loss(model(*batch)[:, :3], batch[0])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert [name for name, p in weights.items() if not (p.grad.isfinite().all() and p.grad.any())] == []


@every_network
def test_network_listens(family, variant):
    """An image's output depends on its time and on its label (the null label too) or text, and on no other image."""
    model, (x, _, y) = tiny(family, variant)
    n = model.label_rows or 4
    x, t, y = x[:1].repeat(n, 1, 1, 1), torch.full((n,), 500.0), torch.arange(n) if model.label_rows else y
    out, later = model(x, t, y), model(x, t + 100 * torch.eye(n)[1], y)
    assert [(later[i] - out[i]).abs().max() > 1e-3 for i in range(n)] == [i == 1 for i in range(n)]
    assert relative(model(x[-1:], t[-1:], y if y is None else y[-1:]), out[-1:]) < 1e-5
    assert not model.label_rows or tiny(family, variant, null_class=False)[0].label_rows == n - 1
    if y is not None:
        assert min((out[i] - out[j]).abs().max() for i in range(n) for j in range(i)) > 1e-3


@pytest.mark.parametrize("family, arguments", [*((family, {}) for family in NETWORKS), ("jit", dict(dropout=0.3))])
def test_checkpointing_changes_no_gradient(family, arguments):
    """checkpoint=k runs every k-th block's forward twice and gives the same gradients, bit for bit."""
    gradients = []
    for checkpoint in (False, True, 2):
        model, batch = tiny(family, checkpoint=checkpoint, **arguments)         # and the seed
        blocks, calls = [module for module in model.modules() if hasattr(module, "recomputed")], []
        for block in blocks:
            block.register_forward_pre_hook(lambda module, given: calls.append(module))
        model(*batch).square().mean().backward()
        assert len(calls) == len(blocks) + (len(blocks[::int(checkpoint)]) if checkpoint else 0)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        assert same(gradients[-1], gradients[0])


@every_network
def test_network_runs_in_other_types(family, variant):
    """float64 and channels-last are within 1e-5 of float32, bfloat16 within 3 %, by autocast or .bfloat16()."""
    model, (x, t, y) = tiny(family, variant)
    exact, attention = model(x, t, y), F.scaled_dot_product_attention
    with torch.autocast("cpu", torch.bfloat16), mock.patch.object(F, attention.__name__, wraps=attention) as spy:
        assert (model(x, t, y) - exact).norm() < 0.03 * exact.norm()
    assert {call.args[2].dtype for call in spy.call_args_list} == {torch.bfloat16}      # the values of attention
    assert relative(model.to(memory_format=torch.channels_last)(x, t, y), exact) < 1e-5
    for dtype, bound in [(torch.float64, 1e-5), (torch.bfloat16, 0.03)]:
        features = y.to(dtype) if y is not None and y.is_floating_point() else y
        out = model.to(dtype)(x.to(dtype), t, features)
        assert out.dtype == dtype
        assert (out.double() - exact).norm() < bound * exact.norm()


REFUSED = {     # family: arguments that do not fit; the message names the last one of each, and its value
    "uvit": [dict(image_size=9), dict(width=33), dict(depth=3), dict(skip="film"), dict(time="film"),
             dict(num_classes=2, text_dim=2)],
    "dit": [dict(image_size=9), dict(heads=5), dict(width=66, heads=3), dict(block="zero")],
    "udit": [dict(image_size=20), dict(heads=3), dict(width=36, heads=6), dict(depths=(1, 1, 1)),
             dict(downsample="half"), dict(downsampler="pool")],
    "unet": [dict(image_size=9), dict(channels=48), dict(multipliers=()), dict(multipliers=(1, 0)), dict(blocks=0),
             dict(attention=(4,)), dict(head_channels=48), dict(resample="pool"), dict(num_classes=2, text_dim=2)],
    "jit": [dict(image_size=9), dict(heads=5), dict(width=66, heads=3), dict(width=36, heads=6),
            dict(context_start=4), dict(norm="film"), dict(mlp="film")],
}


@pytest.mark.parametrize("family, arguments", [(family, wrong) for family in REFUSED for wrong in REFUSED[family]])
def test_network_refuses_arguments_that_do_not_fit(family, arguments):
    """A wrong argument is named in one line of a ValueError."""
    name, value = list(arguments.items())[-1]
    refuses(rf"^{NETWORKS[family][0].__name__}: .*\b{name}\b.*{str(value).strip('()')}", tiny, family, **arguments)


@every_network
def test_network_refuses_inputs_that_do_not_fit(family, variant):
    """A wrong shape, and a missing, superfluous, short or float condition raise ValueError in one line."""
    model, (x, t, y) = tiny(family, variant)
    wrong = [((x[:, :2], t, y), r"expected \(N, 3, 8, 16\)"), ((x.transpose(2, 3), t, y), r"shape \(4, 3, 16, 8\)"),
             ((x, t[:1], y), r"t has shape \(1,\)")]
    if y is None:
        wrong += [((x, t, torch.zeros(4, dtype=torch.int64)), "the model is unconditional")]
    else:
        wrong += [((x, t, None), "got none"), ((x, t, y[:1]), r"got shape \(1,"), ((x, t, y[:, None]), "got shape")]
    if model.label_rows:
        wrong += [((x, t, y.float()), "of torch.float32")]
    for batch, words in wrong:
        refuses(f"^{type(model).__name__}: .*{words}", model, *batch)


INITIAL = [     # family, arguments, {pattern: (distribution, value or deviation)}; the first that a name matches counts
    ("uvit", dict(num_classes=50), {
        "norm.*weight": ("constant", 1), "patch_embed|final_layer": ("default", None), "bias": ("constant", 0),
        "label_emb": ("normal", 1), "": ("normal", 0.02)}),
    *[(family, arguments, {
        "norm.*weight": ("constant", 1), "x_embedder.*weight": ("xavier of a Linear", None),
        "logit_scale": ("constant", math.log(10)), zero: ("constant", 0), "embedder|in_context": ("normal", 0.02),
        "": ("xavier", None)}) for family, arguments, zero in [
            ("dit", {}, "bias|adaLN|final_layer"), ("dit", dict(block="adaln"), "bias|final_layer.linear"),
            ("udit", {}, "bias|adaLN|final_layer"), ("jit", {}, "bias|adaLN|final_layer")]],
    ("unet", dict(num_classes=50), {
        "norm.*weight": ("constant", 1), "norm.*bias|conv2|attn.proj|head": ("constant", 0), "label_emb": ("normal", 1),
        "": ("default", None)}),
]


@pytest.mark.parametrize("family, arguments, table", INITIAL)
def test_weights_start_from_their_distributions(family, arguments, table):
    """Each tensor starts from its distribution: its kind, mean and deviation, and the bound of a uniform one."""
    named = tiny(family, filled=False, **arguments)[0].named_parameters()
    weights = {name: p for name, p in named if p.requires_grad}
    for name, p in weights.items():
        kind, value = next(row for pattern, row in table.items() if re.search(pattern, name))
        if kind == "constant":
            assert torch.equal(p, torch.full_like(p, value)), name
            continue
        matrix = weights[name.replace("bias", "weight")]                        # whose fans a default bias takes
        fan_in, out, kernel = matrix[0].numel(), len(matrix), math.prod(matrix.shape[2:])
        bound = {"default": fan_in**-0.5, "xavier": math.sqrt(6 / (fan_in + out * kernel)),
                 "xavier of a Linear": math.sqrt(6 / (fan_in + out))}.get(kind)
        deviation, n, largest = value or bound / math.sqrt(3), p.numel(), p.abs().max().item()
        assert abs(p.mean().item()) < 5 * deviation / math.sqrt(n), name
        assert p.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(n)), name
        assert largest > 2 * value if kind == "normal" else bound * (1 - 10 / n) < largest <= bound, name


@pytest.mark.parametrize("family, variant", [("uvit", "adaln"), ("dit", None), ("udit", None), ("jit", None)])
def test_modulation_is_in_the_type_of_the_next_layer(family, variant):
    """Under autocast, modulation takes bfloat16 from the norm: the backward pass keeps half as much."""
    (model, batch), original = tiny(family, variant), torch.addcmul
    with torch.autocast("cpu", torch.bfloat16), mock.patch.object(torch, "addcmul", wraps=original) as spy:
        model(*batch)
    assert {x.dtype for call in spy.call_args_list for x in call.args} == {torch.bfloat16}


def test_uvit_skips_are_cast_before_they_are_concatenated():
    """Under autocast the concatenation of a later out-block is bfloat16: half of the memory that float32 takes."""
    (model, batch), seen = tiny("uvit", depth=4), []
    model.out_blocks[1].skip_linear.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("family, size", [*itertools.product(["dit", "jit"], [16, (4, 32)])])   # more, or as many
def test_network_loads_weights_of_another_image_size(family, size):
    """A model takes the weights but keeps its own positions. The caller's dict is left alone. A lack is an error."""
    weights, model = tiny(family)[0].state_dict(), tiny(family, image_size=size)[0]
    given, own = dict(weights), dict(weights, pos_embed=model.pos_embed.clone())
    model.load_state_dict(weights)
    assert same(model.state_dict(), own)
    assert same(weights, given)
    del weights["pos_embed"]
    with pytest.raises(RuntimeError, match="pos_embed"):
        model.load_state_dict(weights)


@pytest.mark.parametrize("variant", ["full", "kv", "shuffle", "no-ffn-conv"])
def test_udit_folds_without_a_change(variant):
    """fold() computes the same to 1e-5, changes no weight of the original, and gives a plain U-DiT's state dict."""
    model, batch = tiny("udit", variant)
    before, out, folded = copy.deepcopy(model.state_dict()), model(*batch), model.fold()
    assert relative(folded(*batch), out) < 1e-5
    assert torch.equal(model.eval()(*batch), out)                               # eval() folds nothing
    assert same(model.state_dict(), before)
    plain, _ = tiny("udit", variant, reparam=False, downsampler="shuffle" if variant == "shuffle" else "conv")
    plain.load_state_dict(folded.state_dict())
    assert torch.equal(plain(*batch), folded(*batch))
    assert same(folded.fold().state_dict(), folded.state_dict())


def test_jit_without_its_parts_is_dit():
    """DiT's seed gives its weights, and its weights give its output, to the last bit."""
    ours, batch = tiny("jit", "as-dit", filled=False)
    torch.manual_seed(0)
    theirs = dit.DiT((8, 16), in_channels=3, width=32, depth=4, heads=2, num_classes=5, learn_sigma=False)
    assert same(ours.state_dict(), theirs.state_dict())
    for model in (ours, theirs):
        model.load_state_dict(fill(model.state_dict()))
    assert torch.equal(ours(*batch), theirs(*batch))


def test_jit_dropout_acts_in_the_middle_half_of_the_blocks():
    """It comes after attention's last Linear and before the MLP's, in training alone."""
    x, mlp, (model, batch) = torch.randn(2, 5, 8), jit.SwiGLU(8, dropout=1.0), tiny("jit", dropout=0.3)
    assert not jit.Attention(8, 2, qk_norm=True, dropout=1.0)(x, None).any()
    assert torch.equal(mlp(x), mlp.w3.bias.expand_as(x))
    assert [block.mlp.dropout.p for block in model.blocks] == [0, 0.3, 0.3, 0]
    assert torch.equal(model.eval()(*batch), tiny("jit")[0](*batch))


# ---------------------------------------------------------------------------------------------------------------------
# ConvNeXt V2 and FCMAE


def sparse(net):
    """Names and shapes of the released sparse class, {name: tensor without memory}, for an FCMAE of this project."""
    out = {}
    for name, p in net.state_dict().items():
        if name.startswith("encoder.") and "layers.0." not in name:
            if ".grn." in name or re.search(r"(dwconv|layers\..\.1)\.bias", name):
                p = p.view(1, -1)
            elif p.ndim == 4:
                name, p = name[:-6] + "kernel", p.permute(2, 3, 1, 0).flatten(0, 2 if "dwconv" in name else 1)
            name = re.sub(r"(pwconv.)", r"\1.linear", re.sub(r"(\.norm|layers\..\.0)", r"\1.ln", name))
        out[name] = p.to("meta")
    return out


def test_convnext_and_fcmae_compute_what_the_released_networks_do():
    """FCMAE's prediction, losses and gradient, GRN over each image; logits of weights that `dense` converted."""
    net, x = convnext.MODELS["fcmae_atto"](image_size=128), inputs((2, 3, 128, 128), seed=21)[0]
    state = fill({name: torch.empty(p.shape) for name, p in sparse(net).items()})
    state.update({"encoder." + name: p for name, p in convnext.dense(state).items()})
    net.load_state_dict({name: state[name] for name in net.state_dict()})
    mask = torch.ones(2, 16).scatter(1, torch.tensor([[5, 6, 10, 11, 13, 15], [1, 2, 5, 7, 8, 11]]), 0)
    loss, prediction = net(x, mask)
    assert relative(prediction[:, :, ::8].mT.flatten()[::6800], [-0.474664, -0.715557]) < 1e-5
    assert loss.tolist() == pytest.approx([1.4741547, 1.4617668], rel=1e-6)
    loss.mean().backward()
    assert sum(p.grad.double().square().sum() for p in net.parameters()).item() == pytest.approx(2.7413826, rel=1e-4)
    net.norm_pix = False
    assert net(x, mask)[0].tolist() == pytest.approx([1.4800828, 1.4661759], rel=1e-6)
    net, x = convnext.MODELS["convnextv2_atto"](image_size=64, num_classes=10), inputs((2, 3, 64, 64), seed=31)[0]
    net.load_state_dict({**fill(net.state_dict()), **convnext.dense(state)})
    assert relative(net(x).flatten()[::4], [-0.555144, -1.765033, 2.641536, -0.883258, -1.933374]) < 1e-5
    for name, p in net.state_dict().items():                                    # little enters the norms: eps counts
        p *= 3e-3 if re.search(r"downsample_layers\.(0\.0|.\.1)|pwconv2|bias", name) else 1
    assert relative(net(x).flatten()[::4], [-0.639138, -1.057793, 0.224251, -0.406823, -0.685510]) < 1e-5
    grn, x = convnext.GRN(8), 1e-6 * torch.randn(2, 5, 8)
    torch.nn.init.ones_(grn.gamma)
    g = x.norm(dim=1, keepdim=True)
    assert relative(grn(x), x + x * g / (g.mean(dim=2, keepdim=True) + 1e-6)) < 1e-5


def test_convnext_has_the_released_names_and_shapes():
    """Those of classifiers and FCMAEs; `dense` makes a classifier's of an FCMAE's, with and without `encoder.`."""
    lines = []
    for size in convnext.SIZES:
        with torch.device("meta"):
            net, fcmae = convnext.MODELS[f"convnextv2_{size}"](), convnext.MODELS[f"fcmae_{size}"]()
        shapes = {name: p.shape for name, p in net.state_dict().items()}
        for state in (net.state_dict(), sparse(fcmae)):
            lines += [f"{name} {tuple(state[name].shape)}" for name in sorted(state)]
        for state in (sparse(fcmae), fcmae.state_dict(), fcmae.encoder.state_dict()):
            own = {name: p.shape for name, p in convnext.dense(state).items()}
            assert {**own, **{name: shapes[name] for name in shapes if re.match(r"(norm|head)\.", name)}} == shapes
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == "e7a676463b28a11f"


@pytest.mark.parametrize("grn", [True, False])
@torch.no_grad()
def test_fcmae_never_sees_a_removed_pixel(grn):
    """Not even NaN there changes a bit of the prediction; int(0.4 L) patches stay, all equally often; a rectangle."""
    net = convnext.MODELS["fcmae_mini"](image_size=(16, 40), width=16, grn=grn)
    assert any("grn" in name for name in net.state_dict()) == grn
    net.load_state_dict(fill(net.state_dict()))
    x, mask = torch.randn(3, 3, 16, 40), net.draw_mask(3)
    removed = convnext.unpatchify(mask[..., None].expand(-1, -1, 192), (2, 5), 8).bool()
    out = net(x, mask)[1]
    assert torch.equal(net(x.masked_fill(removed, math.nan), mask)[1], out)
    assert torch.equal(net.encode(x, mask).flatten(2).any(dim=1), mask == 0)
    patches, mean, deviation = net.target(x)
    assert relative(net.reconstruct(x, mask, (patches - mean) / deviation), x) < 1e-6
    assert torch.equal(net.reconstruct(x, mask, out) == x, ~removed)
    assert net.draw_mask(2000).mean(0).tolist() == pytest.approx([0.6] * 10, abs=0.05)
    assert convnext.MODELS["fcmae_atto"](image_size=224).draw_mask(2).sum(1).tolist() == [30, 30]


@pytest.mark.parametrize("size, decay, kind, layers", [
    ("atto", 0.9, "single", [12, 12, 9, 8, 6, 5, 2, 1, 0]), ("base", 0.6, "group", [13, 12, 11, 10, 10, 9, 1, 1, 0])])
def test_convnext_rates_fall_towards_the_input(size, decay, kind, layers):
    """The factor of the learning rate is decay^(layers behind); a layer is a block, or three of base and large."""
    with torch.device("meta"):
        factors = convnext.rates(convnext.MODELS[f"convnextv2_{size}"](), decay, kind)
    names = ["downsample_layers.0.0", "stages.0.0.norm", "stages.1.1.dwconv", "downsample_layers.2.0",
             "stages.2.2.norm", "stages.2.3.norm", "downsample_layers.3.1", "stages.3.1.norm", "head"]
    assert [factors[name + ".bias"] for name in names] == pytest.approx([decay**layer for layer in layers], rel=1e-9)


def test_convnext_decayed_parameters_and_first_weights():
    """Matrices are decayed, in pre-training also GRN and the mask token; weights start at 0.02, the head scaled."""
    net, fcmae = convnext.MODELS["convnextv2_mini"](head_init_scale=0.5), convnext.MODELS["fcmae_mini"]()
    assert {name for name in convnext.decayed(net) if name.startswith("stages.0.0")} == {
        f"stages.0.0.{name}.weight" for name in ("dwconv", "pwconv1", "pwconv2")}
    assert {"mask_token", "decoder.0.grn.gamma", "encoder.stages.0.0.grn.beta"} < convnext.decayed(fcmae)
    for p in (fcmae.mask_token, fcmae.pred.weight, fcmae.encoder.stages[1][0].dwconv.weight, 2 * net.head.weight):
        assert p.std().item() == pytest.approx(0.02, rel=0.15)


def test_convnext_stochastic_depth_drops_whole_branches():
    """In training, of `rate` of the images, rising with depth; the mean stays; recomputed blocks draw the same."""
    kept, grads = convnext.StochasticDepth(0.25)(torch.ones(4000, 2, 3)).flatten(1), []
    assert ((kept == 0).all(1) | (kept == 1 / 0.75).all(1)).all()
    assert kept.mean().item() == pytest.approx(1, abs=0.05)
    for checkpoint in (False, 2):
        torch.manual_seed(0)
        net = convnext.MODELS["convnextv2_mini"](width=8, drop_path=0.7, checkpoint=checkpoint)
        net(inputs((4, 3, 32, 32))[0]).square().mean().backward()
        grads.append({name: p.grad for name, p in net.named_parameters()})
    assert same(*grads)
    assert [block.drop_path.rate for stage in net.stages for block in stage] == pytest.approx(np.arange(8) / 10)
    assert torch.equal(*(net.eval()(inputs((4, 3, 32, 32))[0]) for _ in range(2)))


@pytest.mark.parametrize("name, arguments, given, words", [
    ("fcmae_mini", dict(image_size=36), [], "(36, 36) is not a multiple of the patch size 8"),
    ("convnextv2_mini", dict(num_classes=0), [], "needs labels"),
    ("convnextv2_mini", dict(drop_path=1.0), [], "1.0 is not in [0, 1)"),
    ("fcmae_mini", dict(mask_ratio=0.95), [], "keeps 0 of 16"), ("fcmae_mini", dict(mask_ratio=0), [], "keeps 16"),
    ("convnextv2_mini", {}, [torch.zeros(2, 3, 32, 24)], "x has shape (2, 3, 32, 24)"),
    *[("fcmae_mini", {}, [torch.zeros(2, 3, 32, 32), mask], words) for mask, words in [
        (torch.zeros(2, 49), "mask has shape (2, 49)"), (torch.zeros(2, 16), "it must remove some"),
        (torch.ones(2, 16), "not all"), (torch.ones(2, 16).tril(3), "as many of every image")]]])
def test_convnext_says_what_does_not_fit(name, arguments, given, words):
    """Images that are no whole patches, missing labels, masks of all or nothing, other shapes: one line each."""
    refuses(f"^(ConvNeXt|FCMAE): .*{re.escape(words)}", lambda: convnext.MODELS[name](**arguments)(*given))


# ---------------------------------------------------------------------------------------------------------------------
# diffusion.py

VP, SD, DDPM, FLOW, GVP = (make() for make in diffusion.SCHEDULES.values())
JIT, JIT_2 = (diffusion.Flow("data", "velocity", noise_scale=scale) for scale in (1.0, 2.0))
float64 = partial(torch.tensor, dtype=torch.float64)


def batch(rng, t, y):
    """Images of the data that `network` knows, limited to [-1, 1]; labels and times for them; and noise like them."""
    shape = len(t), 3, 8, 8
    x0 = (0.6 * rng.choice([-1, 1], shape) + 0.25 * rng.standard_normal(shape)).clip(-1, 1)
    return torch.from_numpy(x0), torch.tensor(y), float64(t), torch.from_numpy(rng.standard_normal(shape))


# The images, noise and starts of the released numbers
R4, R5, R6, R2511 = map(np.random.RandomState, (4, 5, 6, 2511))
SIT_X0 = torch.from_numpy(0.6 * np.sign(R4.random_sample((5, 3, 4, 4)) - 0.5) + 0.25 * R4.standard_normal((5, 3, 4, 4)))
SIT_BATCH = SIT_X0, None, float64([0.02, 0.1, 0.35, 0.8, 0.97]), torch.from_numpy(R4.standard_normal((5, 3, 4, 4)))
JIT_BATCH = batch(R2511, [0.98, 0.8, 0.69, 0.5, 0.2, 0.06, 0.03, 0.001], [1, -1, 0, 1, -1, 0, 1, -1])
DIT_BATCH = batch(R6, [0.001, 0.002, 0.051, 0.401, 0.801, 1.0], [0] * 6)
SIT_X_T, X_T = (torch.from_numpy(r.standard_normal((n, 3, 8, 8))) for r, n in ((R4, 2), (R5, 4)))
JIT_X_T = torch.from_numpy(R2511.standard_normal(804)[36:].reshape(4, 3, 8, 8))


def ideal(schedule, std=0.25):
    """A network without error, for pixels from N(-0.6, std^2) and N(0.6, std^2); labels -1, 1: from one of them."""
    def forward(x, time, y=None):
        t = (time.to(x) - schedule.fed[1]) / schedule.fed[0]
        alpha, sigma = (a.view(-1, 1, 1, 1) for a in schedule.alpha_sigma(t))
        v = alpha**2 * std**2 + sigma**2
        mode = torch.tanh(alpha * 0.6 * x / v)
        mode = mode if y is None else torch.where(y.view(-1, 1, 1, 1) == 0, mode, y.view(-1, 1, 1, 1))
        x0 = 0.6 * mode * sigma**2 / v + alpha * std**2 / v * x
        noise = sigma / v * (x - alpha * 0.6 * mode)                        # E[eps | x_t = x]; x0 is E[x_0 | x_t = x]
        answer = {"data": x0, "noise": noise, "velocity": schedule.velocity(x0, noise, t)}[schedule.predict]
        variance = [torch.tanh(0.5 * x)] if isinstance(schedule, (diffusion.DDPM, diffusion.Flow)) else []
        return torch.cat([answer, *variance], dim=1)        # SiT's networks have DiT's channels for a variance
    return forward


@pytest.mark.parametrize("schedule, times, alpha_bar", [
    (VP, [0.5005, 1.0], [0.0786673176458, 4.3185749e-05]), (SD, [0.002, 0.5], [0.998296027838, 0.277669650456]),
    (DDPM, [0.011, 0.501, 1.0], [0.997806572507, 0.077796658365, 4.0358298e-05]), (FLOW, [0.25], [0.5625]),
    (GVP, [0.05, 0.8], [0.9938441702976, 0.0954915028125])])
def test_schedule_is_the_released_one(schedule, times, alpha_bar):
    """alpha^2 is as released, the log-SNR falls strictly, time() undoes it, slopes are derivatives, all in float64."""
    assert relative(schedule.alpha_sigma(float64(times))[0] ** 2, alpha_bar) < 1e-7
    assert schedule.alpha_sigma(0.0) == (1, 0)
    t = torch.linspace(schedule.t_min, schedule.t_max, 2001, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    assert schedule is FLOW or (alpha**2 + sigma**2 - 1).abs().max() < 1e-15
    assert (schedule.half_log_snr(t).diff() < 0).all()
    assert (schedule.time(schedule.half_log_snr(t)) - t).abs().max() < 1e-13
    t, step = torch.linspace(0.05, 0.95, 7, dtype=torch.float64) + 1e-4, 1e-6
    for before, after, slope in zip(schedule.alpha_sigma(t - step), schedule.alpha_sigma(t + step), schedule.slopes(t)):
        assert relative(slope, (after - before) / (2 * step)) < 1e-6


def test_schedule_feeds_networks_what_they_were_trained_on():
    """Networks see 999 t, n in 1..1000, n - 1 in 0..999 or 1 - t; training times are as released."""
    assert [s.model_time(0.25).item() for s in (VP, SD, DDPM, FLOW, GVP)] == [249.75, 250, 249, 0.75, 0.75]
    u = float64([0.0, 0.0009, 0.001, 0.9999])
    assert VP.training_time(u).equal(u) and FLOW.training_time(u).equal(u)
    assert DDPM.model_time(DDPM.training_time(u)).round().tolist() == [0, 0, 1, 999]
    assert diffusion.SD(times=(0.0, 9.0)).training_time(1 - float64([1e-16])) == 1
    assert relative(diffusion.Flow("noise").training_time(u), 0.001 + 0.998 * u) < 1e-15
    z = float64([0.304731677, -0.633255857, -3.00781486, 0.692784338])      # JiT: sigmoid(-0.8 + 0.8 z), t backwards
    t = diffusion.Flow(times=(0.8, 0.8)).training_time(torch.special.ndtr(-z))
    assert relative(1 - t, [0.364423766, 0.213055558, 0.0389311298, 0.438864296]) < 1e-8


@pytest.mark.parametrize("sampler, schedule, steps, values", [
    ("dpm_solver", VP, 50, [0.497618173, -0.439106046]), ("dpm_solver++", SD, 10, [0.491688448, -0.420155348]),
    ("dpm_solver++2m", SD, 9, [0.471251363, -0.395551851]), ("dpm_solver++2m", SD, 37, [0.502000597, -0.448950408]),
    ("euler_ode", VP, 50, [0.498988537, -0.439292594]), ("euler_maruyama", VP, 50, [1.13443762, -0.365370538]),
    ("ddpm", DDPM, 50, [1.06810793, -0.396737045]), ("ddim", DDPM, 50, [0.489710077, -0.431921972]),
    ("ddpm", SD, 50, [0.896977345, -0.560207049]),          # without a learned variance: beta~
    ("ddim", FLOW, 10, [0.684357508, -0.103801979]),        # Euler's method, on flow
    ("heun", FLOW, 5, [0.75318113, -0.103767133]), ("heun", diffusion.Flow("noise"), 10, [0.744554411, -0.143029299]),
    ("euler_maruyama", FLOW, 50, [0.930484527, -0.52727547]), ("euler_maruyama", GVP, 20, [0.687611795, -1.04610812])])
def test_sampler_walks_as_the_released_one(sampler, schedule, steps, values):
    """From the same noise, with a network without error, it ends where the released code or (2M) diffusers does."""
    denoise = mock.Mock(side_effect=diffusion.guide(ideal(schedule), schedule))
    torch.manual_seed(0)
    x = diffusion.SAMPLERS[sampler](denoise, schedule, SIT_X_T if isinstance(schedule, diffusion.Flow) else X_T, steps)
    assert relative(x[0, 0, 0, :2], values) < 1e-5
    assert denoise.call_count == steps * (1 + (sampler == "heun"))


@pytest.mark.parametrize("schedule, interval, values", [
    (JIT, (0.23, 0.87), [0.877001119, -0.460857441]), (JIT_2, (0, 0.9), [0.899773188, -0.458819797])])
def test_jit_samples_as_released(schedule, interval, values):
    """Data predicted, guided in an interval, 1 / t held at 1 / 0.05, the noise scaled: as released, within 1e-6."""
    x = diffusion.generate(ideal(schedule), schedule, (3, 8, 8), range(4), JIT_BATCH[1][:4], 0, w=3.0,
                           sampler="heun", steps=50, interval=interval, noise=lambda x: JIT_X_T)
    assert relative(x[::2, 0, 0, 0], values) < 1e-6        # with a label, and without one


@pytest.mark.parametrize("schedule, given, released", [
    (diffusion.VP("velocity"), SIT_BATCH, [9.10152806, 5.58555549, 2.76693478, 0.0389630341, 0.00295753872]),
    (FLOW, SIT_BATCH, [0.855797344, 0.901753544, 1.36256899, 0.634901785, 0.426780661]),
    (GVP, SIT_BATCH, [2.06956138, 1.59045634, 1.8063678, 1.1217619, 0.990317938]),
    (JIT_2, JIT_BATCH, [0.87268073, 1.2525971, 0.86752401, 2.6924319, 12.065845, 4.0219621, 2.3587109, 0.0016310784]),
    (DDPM, DIT_BATCH, [3.385567185, 1.434882035, 0.7623813516, 0.08214278905, 6.186060562e-4, 1.684137092e-5])])
def test_loss_is_the_released_one(schedule, given, released):
    """SiT's; JiT's with doubled noise, 1 / t held at 1 / 0.05 at two times; DiT's with the bound in bits, n = 1 too."""
    assert relative(schedule.loss(ideal(schedule), *given) / float64(released), torch.ones(len(released))) < 1e-6


@pytest.mark.parametrize("name, predict", [*itertools.product(["vp", "flow", "gvp"], ["noise", "data", "velocity"])])
def test_three_predictions_say_the_same(name, predict):
    """Networks that know the same, and answer eps, x_0 or u, give the same Denoised and the same loss in velocity."""
    schedule, other = (diffusion.SCHEDULES[name](kind, "velocity") for kind in (predict, "velocity"))
    schedule.hold, (x, _, t, _) = 0, SIT_BATCH
    assert relative(*(s.loss(ideal(s), *SIT_BATCH) for s in (schedule, other))) < 1e-10
    for ours, others in zip(*(s.denoised(ideal(s)(x, s.model_time(t)), x, t)[:2] for s in (schedule, other))):
        assert relative(ours, others) < 1e-10


@pytest.mark.parametrize("schedule", [VP, FLOW, GVP, JIT, diffusion.Flow("noise", "velocity")])
def test_denoised_is_finite_and_can_be_clamped(schedule):
    """No conversion divides by 0, at any t. clamp_x0 limits x_0, and moves eps so that both still add up to x."""
    free = diffusion.guide(ideal(schedule), schedule)
    for t, denoise in itertools.product((0.0, 0.1, 1.0), (free, diffusion.clamp_x0(free, schedule))):
        alpha, sigma = schedule.alpha_sigma(schedule.held(t))
        x0, noise, _ = denoise(X_T, t)
        assert noise.isfinite().all()
        assert t == 0 or relative(alpha * x0 + sigma * noise, X_T) < 1e-14
        assert denoise is free or torch.equal(x0, free(X_T, t).x0.clamp(-1, 1))


@pytest.mark.parametrize("name, predict", [*itertools.product(diffusion.SCHEDULES, ["noise", "data", "velocity"])])
def test_sampler_returns_the_data_on_every_schedule(name, predict):
    """If the data is 0.6 or -0.6, every sampler on every schedule, whatever is predicted, comes back to it."""
    schedule, y = diffusion.SCHEDULES[name](predict, noise_scale=2.0 if name == "flow" else 1.0), torch.tensor([1, -1])
    for sampler in diffusion.SAMPLERS:
        x = diffusion.generate(ideal(schedule, 0.001), schedule, (3, 8, 8), range(2), y, sampler=sampler, steps=60)
        assert (x - 0.6 * y.view(2, 1, 1, 1)).abs().mean() < 0.08           # the solvers leave the noise of t_min


def test_variational_bound_trains_the_variance_alone():
    """It gives the predicted noise no gradient, and the variance one at every time."""
    change, gradients = torch.zeros(6, 6, 8, 8, requires_grad=True), {}
    for channels in (3, 6):
        loss = DDPM.loss(lambda x, time, y: (ideal(DDPM)(x, time, y) + change)[:, :channels], *DIT_BATCH)
        gradients[channels], = torch.autograd.grad(loss.sum(), change)
    assert torch.equal(gradients[6][:, :3], gradients[3][:, :3])
    assert gradients[6][:, 3:].flatten(1).norm(dim=1).min() > 0


@pytest.mark.parametrize("words, call", [
    ("learn_sigma=False", lambda: VP.loss(lambda x, t, y: torch.cat([x, x], 1), X_T)),
    ("expected 3 or 6 channels", lambda: VP.loss(lambda x, t, y: x[:, :1], X_T)),
    ("choose from noise, data, velocity", lambda: diffusion.VP("x0")), ("has 1 to", lambda: DDPM.times(1001, "chain")),
    ("schedule \"flow\"", lambda: diffusion.GVP(noise_scale=2.0)),
    ("needs at least 1", lambda: diffusion.dpm_solver(None, VP, None, 0)),
    ("unknown sampler", lambda: diffusion.generate(None, VP, (3, 8, 8), [0], sampler="euler")),
    ("guidance w = 2", lambda: diffusion.guide(None, VP, torch.tensor([1]), w=2.0))])
def test_diffusion_refuses_in_one_line(words, call):
    """What can not be computed raises ValueError, which names the reason."""
    refuses(words, call)


@pytest.mark.parametrize("t, options, first, last, asked", [
    (0.5, dict(w=1.0), [1, 2], [1, 2], [1, 2]),
    (0.5, dict(channels=3), [-17, -14], [1, 2], [1, 2, 10, 10]),
    (0.5, dict(weak=lambda x, t, y: torch.zeros(len(x), 8, 2, 2)), [3, 6], [3, 6], [1, 2]),
    (0.5, dict(y=float64([[[1]], [[2]]]), null=float64([[10]])), [-17, -14], [-17, -14], [1, 2, 10, 10]),     # text
    (0.0, {}, [-17, -14], [-17, -14], [1, 2, 10, 10]), (1.0, {}, [-17, -14], [-17, -14], [1, 2, 10, 10]),   # all times
    (0.2, dict(interval=(0.2, 0.8)), [1, 2], [1, 2], [1, 2]), (0.8, dict(interval=(0.2, 0.8)), [1, 2], [1, 2], [1, 2])])
def test_guidance_mixes_both_halves_in_one_call(t, options, first, last, asked):
    """eps = eps_u + w (eps_c - eps_u) on the chosen channels where low < t < high; variance from the condition."""
    def model(x, time, y):
        assert y.flatten().tolist() == asked
        return y.view(-1, 1, 1, 1) * torch.ones(len(x), 8, 2, 2)

    denoise = diffusion.guide(model, DDPM, **{"y": torch.tensor([1, 2]), "null": 10, "w": 3.0, **options})
    _, noise, variance = denoise(torch.zeros(2, 4, 2, 2), t)
    assert noise[:, [0, 3], 0, 0].T.tolist() == [first, last]
    assert variance[:, 0, 0, 0].tolist() == [1, 2]


def test_image_noise_depends_on_seed_and_index_alone():
    """Whatever the batch it is drawn in, image 7 gets the same numbers, fresh ones at each call."""
    one, other = diffusion.ImageNoise(0, [5, 7, 9]), diffusion.ImageNoise(0, [7])
    first, second, seed_1 = one(X_T[:3]), one(X_T[:3]), diffusion.ImageNoise(1, [5, 7, 9])(X_T[:3])
    assert torch.equal(torch.stack([first[1], second[1]]), torch.cat([other(X_T[:1]), other(X_T[:1])]))
    assert len(torch.cat([first, second, seed_1])[:, 0, 0, 0].unique()) == 9


# ---------------------------------------------------------------------------------------------------------------------
# data.py


def write_images(root, *names, size=(20, 12)):
    """A random image, as PNG, in each of these files below a folder. Returns the folder."""
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(root / name, "PNG")
    return root


def test_shapes_and_their_order_are_those_of_every_run():
    """Image i shows class i % 10, the same as in README's runs; each epoch has another order; any part can be had."""
    whole, few = data.shapes(), data.shapes(length=30)
    assert hashlib.sha256(whole.images.numpy().tobytes()).hexdigest().startswith("b2c75930cf4c3a75")
    assert torch.equal(few.images, whole.images[:30])
    assert (few.labels.tolist(), few.shape, few.class_names[3]) == ([*range(10)] * 3, (3, 16, 16), "green plus")
    stream = data.shuffled(5, seed=3, start=0, count=10)
    assert stream[:, 0].tolist() == [4, 2, 1, 3, 0, 1, 4, 0, 2, 3]
    assert stream[3:6, 1].tolist() == [1250183452, 84608903, 323855431]
    assert (data.shuffled(5, 3, 2, 7) == stream[2:9]).all()


def test_folders_are_flat_or_hold_classes(tmp_path, capsys):
    """Sub-folders are classes, sorted by name, without hidden and other files; paths and sizes are the identity."""
    flat, root = write_images(tmp_path / "flat", "a.png", "b.png"), tmp_path / "splits" / "train"
    dataset, sizes = data.load(flat, image_size=8), [os.path.getsize(flat / name) for name in ("a.png", "b.png")]
    assert (dataset.shape, len(dataset), dataset.labels, dataset.num_classes) == ((3, 8, 8), 2, None, 0)
    checksum = hashlib.sha256(f"/a.png {sizes[0]}\n/b.png {sizes[1]}\n".encode()).hexdigest()
    assert dataset.identity() == {"count": 2, "class_names": [], "files": checksum}
    write_images(root, "2/0.JPEG", "10/deeper/0.Png", "10/.hidden/0.png", "10/.0.png", "10/0.mpg", "../val/2/0.png")
    (root / "2" / "link").symlink_to(flat)
    classes = data.load(root.parent, image_size=8)
    assert (classes.class_names, classes.labels.tolist()) == (("10", "2"), [0, 1, 1, 1])
    assert f"{root}: 4 images, 2 classes" in capsys.readouterr().err


def test_pixels_become_x0_and_pictures(tmp_path):
    """prepare scales 0..255 to [-1, 1] and mirrors where it is told to, if `flip`; a grid has a row for each label."""
    dataset, mirror = data.ImagesInMemory(torch.tensor([[[[0, 255, 51]]]]).byte()), torch.tensor([False, True])
    (images, labels), = dataset.batches([np.array([[0, 0], [0, 0]])], "cpu")
    x = dataset.prepare(images, mirror)
    assert torch.allclose(x.flatten(1), torch.tensor([[-1, 1, -0.6], [-0.6, 1, -1]]))
    dataset.flip = False
    assert torch.equal(dataset.prepare(images, mirror), x[[0, 0]])
    images = torch.arange(0, 50, 10).byte().view(5, 1, 1, 1).expand(5, 3, 4, 4)
    data.save_grid(images, tmp_path / "x.png", rows=2)
    assert np.asarray(Image.open(tmp_path / "x.png"))[3::6, 3::6, 0].tolist() == [[0, 20, 40], [10, 30, 255]]


RAMP = np.arange(0, 250, 10, dtype=np.uint8).reshape(5, 5)
GREY, BLACK, WHITE = Image.fromarray(RAMP), Image.new("L", (5, 5)), Image.new("L", (5, 5), 255)


@pytest.mark.parametrize("image, name, expected", [
    (GREY, "grey.png", RAMP), (GREY, "turned.png", np.rot90(RAMP, -1)), (GREY.convert("P"), "palette.gif", RAMP),
    (Image.fromarray(RAMP * np.uint16(257)), "16.png", RAMP), (Image.merge("LA", [BLACK, GREY]), "la.png", 255 - RAMP),
    (Image.merge("RGBA", [WHITE, BLACK, BLACK, GREY]), "rgba.png", [255 + 0 * RAMP, 255 - RAMP, 255 - RAMP])])
def test_every_kind_of_image_becomes_rgb(tmp_path, image, name, expected):
    """Grey, palette and 16-bit pixels keep their value; transparent ones lie on white; EXIF turns them."""
    exif = Image.Exif()
    exif[274] = 6 if name == "turned.png" else 1        # 6: the camera was held on its side
    image.save(tmp_path / name, exif=exif)
    pixels = data.read_image(tmp_path / name, 5)
    assert np.abs(pixels.numpy() - np.broadcast_to(expected, (3, 5, 5)).astype(int)).max() <= 1


def adm_crop(image, size):
    """ADM's centre crop: halve the image while it stays large enough, scale its short side, cut out the middle."""
    width, height = image.size
    if min(width, height) >= 2 * size:
        return adm_crop(image.resize((width // 2, height // 2), Image.Resampling.BOX), size)
    width, height = (round(side * (size / min(width, height))) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def test_images_are_scaled_as_in_the_papers(tmp_path):
    """read_image is ADM's crop, read_square cuts first and scales once (Lanczos), read_face is U-ViT's for CelebA."""
    for width, height, size in [(6, 4, 3), *np.random.default_rng(0).integers(1, (120, 120, 40), (60, 3)).tolist()]:
        image = Image.open(path := write_images(tmp_path, "x.png", size=(width, height)) / "x.png")
        assert torch.equal(data.read_image(path, size), data.pil_to_tensor(adm_crop(image, size)))
        square = adm_crop(image, min(width, height)).resize((size, size), Image.Resampling.LANCZOS)
        assert torch.equal(data.read_square(path, size), data.pil_to_tensor(square))
    face = Image.open(write_images(tmp_path, "x.png", size=(178, 218)) / "x.png").crop((25, 57, 153, 185))
    assert torch.equal(data.read_face(path, 64), data.pil_to_tensor(face.resize((64, 64), Image.Resampling.BILINEAR)))


def test_named_sets_are_those_of_the_papers(tmp_path, monkeypatch):
    """CIFAR10 comes from torchvision (here a stand-in) or from folders; CelebA is cut to its training split."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    cifar10 = mock.Mock(return_value=SimpleNamespace(data=pixels, targets=[3, 7]))
    monkeypatch.setattr(data.torchvision, "datasets", SimpleNamespace(CIFAR10=cifar10))
    dataset, small = data.load("cifar10", tmp_path), data.load("cifar10", tmp_path, 16)
    assert (dataset.labels.tolist(), dataset.class_names[3]) == ([3, 7], "cat")
    assert (dataset.images.permute(0, 2, 3, 1).numpy() == pixels).all()
    data.load("cifar10", tmp_path, split="test")
    assert [call.kwargs["train"] for call in cifar10.call_args_list] == [True, True, False]
    assert (small.shape, small.images[0, 1, 0, 2]) == ((3, 16, 16), pixels[0, :2, 4:6, 1].mean().round())
    write_images(tmp_path / "train", *(f"{name}/0.png" for name in data.CIFAR10_CLASSES))
    for name, size in ("cifar10", 32), ("imagenet64", 64):
        found = data.load(name, tmp_path)
        assert (found.shape, found.class_names, *found.labels) == ((3, size, size), data.CIFAR10_CLASSES, *range(10))
    write_images(tmp_path / "test", *(f"{name}/1.png" for name in data.CIFAR10_CLASSES))
    assert data.load("cifar10", tmp_path, split="test").files[9] == str(tmp_path / "test" / "truck" / "1.png")
    monkeypatch.setattr(data, "list_images", lambda *_, **__: (["x"] * 202_599, None, ()))
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    faces = data.load("celeba64", tmp_path)
    assert (len(faces), faces.shape, faces.read_file) == (162_770, (3, 64, 64), data.read_face)


def test_split_test_holds_other_images_of_the_same_classes(tmp_path):
    """It is a folder beside train/ (val/ before test/), or shapes' further images; one line says if there is none."""
    assert torch.equal(data.load("shapes", split="test").images[:9], data.shapes(length=10_009).images[10_000:])
    write_images(tmp_path, "train/a/0.png", "train/b/0.png", "val/a/1.png", "val/b/2.png", "test/a/3.png")
    test = data.load(tmp_path, split="test")
    assert ([file[-11:] for file in test.files], test.labels.tolist()) == (["val/a/1.png", "val/b/2.png"], [0, 1])
    shutil.rmtree(tmp_path / "val")
    for name, split, words in [
            (tmp_path, "test", "test: its class folders are not those of "), ("celeba64", "test", "has no test split"),
            (tmp_path / "train", "test", "has no test split"), ("shapes", "val", "must be train or test"),
            (write_latents(tmp_path / "latents"), "test", "latents have no test split")]:
        with pytest.raises(ValueError, match=words):
            data.load(name, split=split)


@pytest.mark.parametrize("flags, good, bad", [
    ("steps sample_steps accumulate log_every save_every num_images cfg_channels k repeats batch_size size", 1, 0),
    ("lr warmup weight_decay clip_grad sample_every grad_checkpoint workers seed label_dropout time ema betas", 0, -1),
    ("batch_size", 2**20, [10**400]), ("image_size size", 2**14, 10**6), ("seed", 1, 2**63), ("workers", 0, 1025),
    ("label_dropout cfg_interval time", [0.1, 1.0], [0.1, 1.1]), ("ema betas", [0.0, 0.99], [0.9, 1.0]),
    ("scale noise_scale", 0.1, 0.0), ("scale lr", None, math.inf), ("cfg times", ["x", -0.4], ["x", math.nan])])
def test_numbers_are_checked_by_one_table(flags, good, bad):
    """check passes the numbers that make sense, text and None, and names flag and number of the others."""
    for flag in flags.split():
        bookkeeping.check({flag: good})
        refuses(f"^--{flag.replace('_', '-')} .*: must be ", bookkeeping.check, {flag: bad})


DATA = " ".join(SMALL) + " --out run --data "
REFUSALS["train.py"] += [
    (DATA + ".", "a: class folder without an image; remove it", lambda here: (here / "a").mkdir()),
    (DATA + ".", ".: holds images beside folders (a, ..)", lambda here: write_images(here, "x.png", "a/x.png")),
    (DATA + ".", "x.tif: not a readable image (32-bit", lambda here: BLACK.convert("F").save(here / "x.tif")),
    (DATA + ".", "x.tif: not a readable image (32-bit", lambda here: BLACK.convert("I").save(here / "x.tif")),
    (DATA + "cifar10 --image-size 5", "its images are 32x32, and can be 16x16 or 8x8"),
    (DATA + "cifar10 --data-dir .", "not CIFAR10's classes", lambda here: write_images(here, "airplane/0.png")),
    (DATA + "celeba64 --data-dir .", "x.png: 20x12, not an aligned", lambda here: write_images(here, "x.png")),
    (" ".join(SMALL) + " --out /sys/x", "/sys/x'); give another --out"),        # and not: make room
    (DATA + "celeba64", "data/celeba: no such folder; unpack img_align_celeba.zip there (https"),
    (DATA + "cifar10", "not in data, and the download failed (", lambda here: (here / "data").write_text("no folder")),
    (DATA + "imagenet64 --data-dir .", "not a folder for each class", lambda here: write_images(here, "x.png")),
    (DATA + "imagenet64", "data/imagenet: no such folder; put ImageNet's class folders there"),
    (DATA + "imagenet256", "no latents in data/imagenet256; this makes them: python encode.py --images imagenet/train")]


# ---------------------------------------------------------------------------------------------------------------------
# encode.py, and the latents that data.py reads


def write_latents(root, count=6, classes=2, text=None):
    """A small encoded folder: random moments, and labels 0, 1, 0, .., or image i with 1 + i % 3 captions."""
    rng, captions = np.random.default_rng(0), np.cumsum([0, *(1 + np.arange(count) % 3)])
    tables, arrays = {"moments": [count, 1 if text else 2, 8, 8, 8]}, {"labels": np.arange(count) % max(1, classes)}
    if text:
        tables["text"], arrays = [int(captions[-1]), *text], {"captions": captions, "null": rng.standard_normal(text)}
    names = [f"n{i}" for i in range(0 if text else classes)]
    encoding = dict(autoencoder="none", clip="none", scale=0.5, image_size=64, batch_size=100, type="float16", files="",
                    count=count, shape=[4, 8, 8], text=text, class_names=names, tables=tables)
    encode.begin(root, encoding, arrays)
    for name, size in tables.items():
        rows = torch.from_numpy(rng.standard_normal(size)).half()
        encode.write_missing(root, name, encoding, lambda spans: [rows], 0, 1)
    return root


def damage(name, change, here):
    """Write a folder of latents, then other content into one of its files, or other values into encoding.json."""
    path = write_latents(here / "latents", text=(5, 3)) / name
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))


SENSELESS = "a count, shape, scale or other value makes no sense"
REFUSALS["train.py"] += [
    (DATA + "latents", "not all is encoded (text/000000000.bin is missing", partial(damage, "text/000000000.bin", "x")),
    (DATA + "latents", "captions.npy is missing, damaged or not of length 7; ", partial(damage, "captions.npy", "")),
    (DATA + ".", "labels.npy is missing, damaged or", lambda here: np.save(write_latents(here) / "labels.npy", [0])),
    (DATA + "latents", "encoding.json is not one of encode.py", partial(damage, "encoding.json", "[]")),
    (DATA + "latents --image-size 8", "encoded at image size 64, not 8", partial(damage, "encoding.json", {})),
    *[(DATA + "latents", SENSELESS, partial(damage, "encoding.json", change)) for change in (
        dict(count=7), dict(scale=math.nan), dict(batch_size=0), dict(type="int8"), dict(image_size=63))]]
CAPTIONS = "--images . --captions x.json --out out --device cpu"
REFUSALS["encode.py"] += [
    ("--images nowhere --out out", "nowhere: no such folder"), ("--images . --out out --scale nan", "nan: must be fin"),
    (CAPTIONS, "c.png: no such image, but x.json has", lambda here: (here / "x.json").write_text('{"c.png": ["x"]}')),
    *[(CAPTIONS, "x.json: not a file of captions, neither COCO's", lambda here, x=x: (here / "x.json").write_text(x))
      for x in ("{", "[]", "{}", '{"annotations": [{"id": 3}]}', '{"a/0.png": "not in a list"}')]]


# ---------------------------------------------------------------------------------------------------------------------
# train.py


@pytest.mark.parametrize("flags, values", [
    # the papers' tables (for cifar10 every value), then our own rows
    ("uvit_s2 --data cifar10", "batch_size=128 steps=500000 warmup=2500 lr=0.0002 weight_decay=0.03 betas=[0.99,0.999] "
     "schedule=vp ema=[0.9999] ema_warmup=True clip_grad=0.0 label_dropout=0.0 class_cond=False cfg=1.0 flip=True "
     "sampler=euler_maruyama sample_steps=1000 clip_x0=False save_every=5000 sample_every=10000 log_every=100"),
    ("uvit_s4 --data celeba64", "batch_size=128 steps=500000 warmup=5000 betas=[0.99,0.99] schedule=vp"),
    ("uvit_m4 --data imagenet64", "batch_size=1024 steps=300000 lr=0.0003 sampler=dpm_solver label_dropout=0.0"),
    ("uvit_h2 --data imagenet256", "batch_size=1024 steps=500000 lr=0.0002 schedule=sd sampler=dpm_solver++ cfg=1.4"),
    ("uvit_l2 --data imagenet256", "steps=300000 schedule=vp sampler=dpm_solver label_dropout=0.15 cfg=1.4"),
    ("uvit_l4 --data imagenet512", "steps=500000 schedule=vp label_dropout=0.15 cfg=1.7"),
    ("uvit_s2_deep --data mscoco256", "batch_size=256 steps=1000000 betas=[0.9,0.9] schedule=sd cfg=2.0 flip=False"),
    ("dit_xl2 --data imagenet256", "batch_size=256 lr=0.0001 weight_decay=0.0 sampler=ddpm cfg=1.5 sample_steps=250"),
    ("udit_b --data imagenet256", "batch_size=256 steps=400000 schedule=ddpm betas=[0.9,0.999] clip_x0=False"),
    ("dit_xl2 --data imagenet256 --schedule flow", "schedule=flow sampler=euler_maruyama sample_steps=250"),     # SiT
    ("jit_b32 --data {folder}", "batch_size=1024 steps=750600 warmup=6255 lr=0.0002 betas=[0.9,0.95] schedule=flow "
     "predict=data compare=velocity times=['logit-normal',0.8,0.8] ema=[0.9999,0.9996] ema_warmup=False cfg=3.0 "
     "cfg_interval=[0.0,0.9] noise_scale=2.0 sampler=heun sample_steps=50 clip_x0=False"),
    ("dit_tiny --data cifar10", "batch_size=64 steps=10000 lr=0.002 clip_x0=True"),         # a folder's row
    ("dit_s2 --data cifar10", "batch_size=256 warmup=0 class_cond=None label_dropout=0.1 clip_x0=True"),
    ("unet_adm --data imagenet512", "schedule=ddpm clip_x0=False"),
    ("dit_tiny --data shapes --schedule gvp", "schedule=gvp predict=None sampler=ddpm clip_x0=True"),
    ("uvit_s2 --data {folder}", "warmup=2500 label_dropout=0.1 sampler=ddpm sample_steps=100 clip_x0=True"),
    ("uvit_tiny --data {folder}", "steps=10000 warmup=100 lr=0.002 sampler=ddpm clip_x0=True schedule=vp"),
    ("fcmae_base --data {folder}", "batch_size=4096 steps=499200 warmup=12480 lr=0.0024 lr_schedule=cosine "
     "min_lr=0.0 weight_decay=0.05 betas=[0.9,0.95] crop=0.2 flip=True clip_grad=0.0"),
    ("convnextv2_atto --data {folder}", "batch_size=1024 steps=750600 warmup=0 lr=0.0008 lr_schedule=cosine "
     "min_lr=1e-06 weight_decay=0.3 betas=[0.9,0.999] layer_decay=0.9 layer_groups=False drop_path=0.1 crop=0.08 "
     "rand_augment=9 erasing=0.25 mixup=0.0 cutmix=0.0 smoothing=0.2 model_args=['head_init_scale=0.001']"),
    ("convnextv2_femto --data {folder}", "lr=0.0008 weight_decay=0.05 drop_path=0.0 smoothing=0.2 mixup=0.3"),
    ("convnextv2_pico --data {folder}", "lr=0.0008 weight_decay=0.3 drop_path=0.0 smoothing=0.2 mixup=0.3 cutmix=0.3"),
    ("convnextv2_nano --data {folder}", "lr=0.0008 weight_decay=0.3 drop_path=0.1 smoothing=0.2 mixup=0.5 cutmix=0.5"),
    ("convnextv2_tiny --data {folder}", "steps=375300 warmup=50040 lr=0.0032 weight_decay=0.05 layer_decay=0.9 "
     "layer_groups=False drop_path=0.2 smoothing=0.1 mixup=0.8 cutmix=1.0"),
    ("convnextv2_large --data {folder}", "steps=125100 warmup=25020 lr=0.0025 layer_decay=0.6 layer_groups=True"),
    ("convnextv2_huge --data {folder}", "steps=62550 warmup=12510 lr=0.005 layer_decay=0.75 drop_path=0.3"),
    # shorter than the recipe's: warm-up and intervals shrink, unless they are given
    ("uvit_s2 --data cifar10 --steps 40 --save-every 7", "warmup=4 save_every=7 sample_every=10 lr=0.0002"),
    ("uvit_s2 --data cifar10 --steps 400000 --model-args a=1 --model-args b=2", "warmup=2500 model_args=['a=1','b=2']"),
])
def test_recipes_are_the_rows_of_the_papers_tables(tmp_path, capsys, flags, values):
    """Each row of the papers' tables is one command, and so are our rows. What was scaled to a short run is printed."""
    config = vars(train.parse(("--model " + flags.format(folder=tmp_path)).split()))
    keys = [item.split("=")[0] for item in values.split()]
    assert values.split() == [f"{key}={config[key]}".replace(" ", "") for key in keys]
    assert ("--warmup 2500 -> 4" in capsys.readouterr().out) == values.startswith("warmup=4 ")


def test_text_becomes_values():
    """KEY=VALUE has the type of the constructor's default; a schedule is what its flags say, and old runs lack some."""
    known = inspect.signature(lambda conv=True, skip="cat", depth=12, mlp_ratio=4.0, mult=(1, 2): None).parameters
    items = ["conv=off", "conv=YES", "skip=no", "depth=2", "mlp_ratio=2", "mult=(1,2,3)"]
    assert repr([recipes.parse_argument(item, known)[1] for item in items]) == "[False, True, 'no', 2, 2.0, (1, 2, 3)]"
    assert recipes.schedule_of({"schedule": "vp"}).predict == "noise"
    schedule = recipes.schedule_of(vars(train.parse(["--model", "jit_b32", "--data", "."])))
    assert (schedule.predict, schedule.compare, schedule.noise_scale) == ("data", "velocity", 2)
    assert schedule.training_time(torch.tensor(0.5)) == pytest.approx(1 / (1 + math.exp(-0.8)))


def test_run_leaves_what_it_promises(run):
    """config.json has every flag, log.jsonl a line for each report."""
    assert json.loads((run / "config.json").read_text()).keys() == vars(train.parse(SMALL)).keys()
    log = log_of(run)
    assert log[0].keys() == {"step", "loss", "lr", "grad_norm", "images_per_sec", "memory_gb", "skipped"}
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["skipped"] == 0 for line in log)
    assert [line["lr"] for line in log[:3]] == [0.002, 0.004, 0.004]       # the warm-up of two steps


def assert_same_run(out, whole, steps=6):
    """Weights, average, optimiser and losses of two runs are equal bit for bit; the log has every step once."""
    a, b = (bookkeeping.read_checkpoint(folder / "checkpoint.pt") for folder in (out, whole))
    assert all(same(a[key], b[key]) for key in ("model", "ema"))
    assert all(same(a["optimizer"]["state"][i], state) for i, state in b["optimizer"]["state"].items())
    assert [line["step"] for line in log_of(out)] == list(range(1, steps + 1))
    assert [line["loss"] for line in log_of(out)] == [line["loss"] for line in log_of(whole)]


def test_stopped_and_resumed_equals_uninterrupted(run, tmp_path, request):
    """3 + 3 steps are 6, to the last bit: after a kill between two renames, of an older version, with an edited log."""
    state, _ = trained(tmp_path, "--steps", 3)
    (tmp_path / "checkpoint.pt").unlink()
    config = {key: value for key, value in state["config"].items() if key not in ("predict", "times", "flip")}
    old = {key: value for key, value in state.items() if key not in ("averages", "identity")}
    torch.save({**old, "config": {**config, "ema": 0.9999}}, tmp_path / "previous.pt")
    with open(tmp_path / "log.jsonl", "ab") as log:
        log.write(b'a note\n{"note": 1}\n[2]\n{"step": "x"}\n{"step": 5, "loss": 0}\n\xff{"step"')
    request.addfinalizer(partial(torch.use_deterministic_algorithms, False))
    trained(tmp_path, "--deterministic")
    assert torch.are_deterministic_algorithms_enabled()
    assert not (tmp_path / "log.old.jsonl").exists()        # it was not begun anew
    assert_same_run(tmp_path, run)


@pytest.mark.parametrize("flags, passes, error", [("--accumulate 4 --grad-checkpoint", 4, 1e-4), ("", 3, 1e-4),
                                                  ("--accumulate 1", 1, 0), ("--accumulate 1 --amp bf16", 1, 0.02)])
def test_only_precision_changes_the_numbers(run, tmp_path, monkeypatch, flags, passes, error):
    """Equal passes, unequal ones by PASS, and checkpointing end as one pass does, bf16 nearly; grids change nothing."""
    monkeypatch.setattr(train, "PASS", 3)
    state, log = trained(tmp_path, *flags.split(), *"--sampler dpm_solver --sample-steps 2 --sample-every 3".split())
    assert state["config"]["accumulate"] == passes
    for key in ("loss", "grad_norm"):
        found, expected = ([line[key] for line in lines] for lines in (log, log_of(run)))
        assert found == pytest.approx(expected, rel=error)
        assert (found == expected) == (error == 0)
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == ["0000003.png", "0000006.png"]
    assert Image.open(tmp_path / "samples" / "0000003.png").size == (8 * 18 + 2, 10 * 18 + 2)


@pytest.mark.parametrize("flags, pixels, chosen", [
    ("uvit_tiny --data shapes --sample-steps 20", True, ("ddpm", 20, True)),
    ("uvit_s2 --data cifar10", True, ("ddpm", 100, True)),                              # a preview of 1000 steps
    ("dit_tiny --data shapes --schedule flow --sample-steps 500 --no-clip-x0", True, ("heun", 25, False)),
    ("dit_xl2 --data imagenet256", False, ("dpm_solver", 50, False))])
def test_grids_cost_seconds(flags, pixels, chosen):
    """A grid is drawn by the run's own sampler if that is short; else by one that shows an early network's colours."""
    assert objectives.preview(train.parse(["--model", *flags.split()]), pixels) == chosen


@pytest.mark.parametrize("steps, flags", [(30, "--no-ema-warmup --no-flip"), (12, "--clip-grad 0.1")])
def test_replay_by_the_released_formulas(tmp_path, steps, flags):
    """Steps written out as the papers do (but the rate is a step ahead) end at the same weights and averages: 1e-6."""
    flags += f" --steps {steps} --warmup 10 --lr 2e-4 --ema 0.999 0.9 --seed 3 --label-dropout 0.3"
    (state, _), warm = trained(tmp_path, *flags.split()), "clip" in flags
    torch.manual_seed(3)
    net = uvit.MODELS["uvit_tiny"](image_size=16, num_classes=10, width=32, depth=2, heads=2)
    images, averages = data.shapes().images, {"0.999": copy.deepcopy(net), "0.9": copy.deepcopy(net)}
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), eps=1e-8, weight_decay=0.03)
    for k in range(steps):
        random = torch.Generator().manual_seed(int(np.random.SeedSequence([3, k]).generate_state(1, np.uint64)[0]))
        t = torch.rand(8, generator=random, dtype=torch.float64)
        eps = torch.randn(8, 3, 16, 16, generator=random)
        drop, mirror = (torch.rand(8, generator=random) < p for p in (0.3, 0.5 if warm else 0))
        index = torch.from_numpy(data.shuffled(10_000, 3, 8 * k, 8)[:, 0])
        x0 = images[index] / 127.5 - 1
        x0[mirror] = x0[mirror].flip(3)
        abar = torch.exp(-(0.1 * t + 19.9 * t**2 / 2))[:, None, None, None]
        x_t = abar.sqrt().float() * x0 + (1 - abar).sqrt().float() * eps
        out = net(x_t, (999 * t).float(), torch.where(drop, 10, index % 10))
        optimizer.zero_grad()
        (out - eps).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1 if warm else math.inf)
        optimizer.param_groups[0]["lr"] = 2e-4 * min(1, (k + 1) / 10)
        optimizer.step()
        for decay, average in averages.items():
            decay = min(float(decay), (1 + k) / (10 + k)) if warm else float(decay)
            for p, q in zip(average.parameters(), net.parameters()):
                p.data = decay * p.data + (1 - decay) * q.data
    for ours, replayed in [(state["model"], net), *((state["averages"][decay], averages[decay]) for decay in averages)]:
        ours, replayed = (torch.cat([p.flatten() for p in part.values()]) for part in (ours, replayed.state_dict()))
        assert (ours - replayed).norm() / replayed.norm() < 1e-6
    assert state["ema"]["pos_embed"].data_ptr() == state["averages"]["0.999"]["pos_embed"].data_ptr()   # stored once


def test_log_becomes_a_picture_and_a_run_a_page(run, tmp_path):
    """log.png has a panel for each number, where 2^-step is a straight line if it is a loss. Gaps are left out.

    index.html shows it, the grids, the newest first, and the configuration as text.
    """
    assert Image.open(run / "log.png").size == (840, 420)               # loss, lr, grad_norm, images_per_sec
    rows = [{"step": k, "loss": 2.0**-k if k != 4 else None, "accuracy": k, "skipped": 0} for k in range(1, 9)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{torn")
    bookkeeping.draw_log(tmp_path / "log.jsonl", tmp_path / "log.png")
    blue = (np.asarray(Image.open(tmp_path / "log.png")) == (65, 105, 225)).all(2)
    for panel, first, last in [(blue[:, :420], 30, 180), (blue[:, 420:], 161, 30)]:     # accuracy begins at 1 of 8
        heights = [column.nonzero()[0].mean() for column in panel.T if column.any()]
        assert len(heights) > 300 and heights == pytest.approx(list(np.linspace(first, last, len(heights))), abs=2)
    write_images(tmp_path / "samples", "0000002.png", "0000010.png", "2-best.png")
    (tmp_path / "config.json").write_text(json.dumps({"data": "<b>"}))
    bookkeeping.draw_page(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert re.findall('src="(.*?)"', page) == ["log.png", "samples/0000010.png", "samples/0000002.png"]
    assert "<td>data</td><td>&lt;b&gt;</td>" in page and "step 10<" in page and (run / "index.html").exists()


# ConvNeXt V2: masked autoencoding and classification, the other two objectives


def convnet(out, model, *flags):
    """Train a small network of convnext.py on shapes for six steps, or as the flags say -> (checkpoint, log)."""
    train.main(["--model", model, *SMALL[2:4], *SMALL[10:], "--model-args", "width=8", "depths=1,1", *flags,
                "--out", str(out)])
    return bookkeeping.read_checkpoint(out / "checkpoint.pt"), log_of(out)


CHANGES = "--rand-augment 9 --erasing 1 --mixup 0.8 --cutmix 1 --drop-path 0.5 --layer-decay 0.8 --crop 0.5".split()


def test_autoencoder_and_classifier_learn(tmp_path, capsys):
    """FCMAE's loss falls, and it shows ten images; fine-tuned on 20 images of a class, it names held-out ones."""
    flags = "--batch-size 32 --steps 40 --log-every 5 --sample-every 20 --save-every 40 --lr 0.01".split()
    _, log = convnet(tmp_path / "pre", "fcmae_mini", *flags)
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert Image.open(tmp_path / "pre" / "samples" / "0000040.png").size == (10 * 18 + 2, 3 * 18 + 2)
    _, log = convnet(tmp_path / "fine", "convnextv2_mini", *flags, "--init", str(tmp_path / "pre" / "checkpoint.pt"),
                     "--labels-per-class", "20")
    assert log[-1]["accuracy"] > 0.8 and sum("accuracy" in line for line in log) == 2
    assert "shapes: 200 images" in capsys.readouterr().out
    assert Image.open(tmp_path / "fine" / "samples" / "0000020.png").size == (8 * 18 + 2, 10 * 18 + 2)


def test_images_change_by_their_seeds():
    """What happens to an image is a function of its seed, not of the rows beside it; of the batch's, how all mix."""
    dataset, config = data.shapes(), train.parse(["--model", "convnextv2_mini", "--data", "shapes", *CHANGES])
    where, labels = dict(generator=torch.Generator().manual_seed(0)), torch.arange(10)
    x, augment = dataset.prepare(dataset.images[:10], torch.zeros(10).bool()), objectives.Augment(config, dataset)
    (seeds, batch), (others, _), state = augment.draw(10, where), augment.draw(10, where), torch.get_rng_state()
    mixed = augment(x, labels, seeds, batch)[1]
    assert torch.equal(augment(x, labels, others, batch)[1], mixed) and torch.equal(state, torch.get_rng_state())
    assert mixed.sum(1).tolist() == pytest.approx([1] * 10) and ((mixed > 0).sum(1) == 2).all()
    augment.mix = lambda *xy: xy
    whole, part, other = (augment(x[-n:], labels, s[-n:], batch)[0] for n, s in ((10, seeds), (4, seeds), (10, others)))
    assert torch.equal(whole[-4:], part) and (whole != other).flatten(1).any(1).all()
    assert relative(augment.inverse(augment.plain(dataset.images[:10])), dataset.images[:10] / 255) < 1e-6


@pytest.mark.parametrize("size, rates", [       # at these epochs; those of the warm-up are reached a step earlier
    ("atto", {0: 8e-4, 5: 7.998631013e-4, 40: 7.912699665e-4, 300: 4.005e-4, 599.99: 1.0000005476e-6}),
    ("tiny", {5: 4e-4, 20: 1.6e-3, 40: 3.2e-3, 150: 1.983285405e-3, 299.99: 1.0000116764e-6})])
def test_learning_rate_and_decay_are_the_released_ones(size, rates):
    """Linear warm-up, then half a cosine to 1e-6; layers have their factors, vectors and GRN do not decay."""
    config = train.parse(["--model", f"convnextv2_{size}", "--data", "."])
    found = [train.learning_rate(config, round(1251 * at) - (0 < at < 40 == config.warmup / 1251)) for at in rates]
    assert found == pytest.approx(list(rates.values()), rel=1e-8)
    net = convnext.MODELS["convnextv2_mini"](width=8)
    factors, decays = convnext.rates(net, 0.9), {name: config.weight_decay for name in convnext.decayed(net)}
    found = {id(p): (g["factor"], g["weight_decay"]) for g in train.groups(net, config) for p in g["params"]}
    assert found == {id(p): (factors[name], decays.get(name, 0)) for name, p in net.named_parameters()}


def test_weights_that_fit_are_taken_and_the_others_named(tmp_path, capsys):
    """--init: an FCMAE's encoder, a DiT without its label table; read at the start alone; --freeze: the head learns."""
    before, _ = convnet(tmp_path / "pre", "fcmae_mini", "--steps", "1")
    file = (tmp_path / "pre" / "checkpoint.pt").rename(tmp_path / "weights.pt")
    flags = ["convnextv2_mini", "--freeze", "--init", str(file), "--save-every", "1", "--steps"]
    convnet(tmp_path / "fine", *flags, "1")
    assert ("took 28 of 32 tensors; new: norm.weight (16,), norm.bias (16,), head.weight (10, 16), head.bias (10,); "
            "not used: none") in capsys.readouterr().out
    file.unlink()
    after, _ = convnet(tmp_path / "fine", *flags, "2")
    assert all(torch.equal(p, after["model"][name]) for name, p in convnext.dense(before["ema"]).items())
    assert after["model"]["head.weight"].abs().max() > 1e-3
    flags = ["--model", "dit_tiny", *SMALL[2:4], *SMALL[10:], "--steps", "1"]
    train.main([*flags, "--out", str(tmp_path / "dit")])
    train.main([*flags, "--out", str(tmp_path / "own"), "--no-class-cond", "--lr", "0",
                "--init", str(tmp_path / "dit" / "checkpoint.pt")])
    assert "new: none; not used: y_embedder.embedding_table.weight (11, " in capsys.readouterr().out
    a, b = (bookkeeping.read_checkpoint(tmp_path / name / "checkpoint.pt")["ema"] for name in ("dit", "own"))
    assert all(torch.equal(a[name], b[name]) for name in b)


REFUSALS["train.py"] += [(f"--data shapes --device cpu --out x --model {flags}", words) for flags, words in [
    ("fcmae_mini --mixup 1", "--mixup: fcmae_mini has no use for it"),
    ("convnextv2_mini --schedule vp", "--schedule: convnextv2_mini has no use for it"),
    ("dit_tiny --layer-decay 0.9", "--layer-decay: dit_tiny has no use for it"),
    ("convnextv2_mini --crop 0", "--crop 0.0: must be more than 0, at most 1"),
    ("convnextv2_mini --no-class-cond", "--class-cond: convnextv2_mini has no use for it"),
    ("convnextv2_mini --image-size 20", "(20, 20) is not a multiple of the patch size 8"),
    ("convnextv2_mini --init {run}/checkpoint.pt", "nothing in it fits the network"),
    ("convnextv2_mini --init nowhere.pt", "nowhere.pt: no such file of weights")]]
REFUSALS["train.py"] += [(" ".join(SMALL) + " --out {run} " + flags, words) for flags, words in [
    ("--model uvit_s3", "unknown model 'uvit_s3'"), ("--data {run}/log.jsonl", "log.jsonl: not a folder; --data ta"),
    ("--model-args widht=32", "uvit_tiny: UViT.__init__() got an unexpected keyword argument 'widht'"),
    ("--model-args width", "expected KEY=VALUE"), ("--model-args num_classes=5", "num_classes follows from the data"),
    ("--model-args patch_size=0", "by zero; its arguments are"), ("--model-args width=0", "would have no elements"),
    ("--model-args width=abc", "width=abc: expected a value like width=512"), ("--model-args depth=-2", "depth=-2: ex"),
    ("--model-args conv=perhaps", "conv=perhaps: expected a"), ("--model-args width=64", "its width is 32, here 64"),
    ("--schedule flow", "run: its schedule is vp, here flow"), ("--predict data", "its predict is None, here data"),
    ("--times normal 1 2", "--times normal 1 2: must be uniform, or logit-normal MEAN STD"),
    ("--accumulate 16", "--accumulate 16: a process has only 8 images"), ("--betas 1 1", "--betas 1.0: must be"),
    ("--cfg 2 --label-dropout 0", "--cfg 2.0: guidance needs labels"), ("--out {run}/log.jsonl", "another --out")]]


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


def draw(run, out, *flags):
    """Run sample.py on a run's checkpoint, in four steps. Returns its message, or None where it succeeded."""
    return command("sample.py", "--ckpt", run / "checkpoint.pt", "--steps", 4, "--device", "cpu", "--out", out, *flags)


def sampled(run, out, *flags):
    """Sample from a run into an npz, and read it: (images (N, H, W, C), labels or None)."""
    assert draw(run, out, *flags) is None
    with np.load(out) as file:
        return file["arr_0"], file.get("arr_1")


@pytest.mark.parametrize("flags, weights, settings", [
    ("", "ema", {}), ("--raw --no-clip-x0 --sampler ddim --seed 5", "model", dict(clip=False, sampler="ddim", seed=5)),
    ("--ema 0.5 --cfg 3 --cfg-channels 1 --cfg-interval 0 0.6", "0.5", dict(w=3.0, channels=1, interval=(0.0, 0.6))),
    ("--cfg 3 --guide-with weak.pt", "ema", dict(w=3.0, weak="model"))])
def test_samples_are_those_of_generate(run, tmp_path, monkeypatch, flags, weights, settings):
    """In batches of two, image i is generate's i-th, of the weights, settings and labels that the flags ask for."""
    state, known = bookkeeping.read_checkpoint(run / "checkpoint.pt"), {}
    for factor, name in (1.0, "0.5"), (0.7, "ema"), (0.5, "model"):     # three networks that answer strongly to labels
        known[name] = {key: factor * value for key, value in fill(state["ema"]).items()}
    torch.save({**state, **known, "averages": {"0.5": known["0.5"]}}, tmp_path / "checkpoint.pt")
    torch.save({**state, "ema": known["model"]}, tmp_path / "weak.pt")
    monkeypatch.chdir(tmp_path)
    nets = {name: recipes.build("uvit_tiny", state["model_args"]).eval() for name in known}
    for name, net in nets.items():
        net.load_state_dict(known[name])
    model, settings = nets[weights], dict(settings, weak=nets.get(settings.get("weak")))
    x0 = diffusion.generate(model, diffusion.SCHEDULES["vp"](), (3, 16, 16), range(5), torch.tensor([3, 0, 3, 0, 3]),
                            null=10, **{**dict(sampler="ddpm", steps=4, clip=True), **settings})
    images, labels = sampled(tmp_path, tmp_path / "x.npz", *f"--num 5 --labels 3,0 --batch-size 2 {flags}".split())
    assert labels.tolist() == [3, 0, 3, 0, 3]
    assert abs(images.astype(int) - data.to_uint8(x0).permute(0, 2, 3, 1).numpy()).max() <= 1


def test_suffix_decides_the_form(run, tmp_path):
    """A .NPZ is that very file; no suffix makes a folder; a grid has a row for each label, or guidance weight."""
    def tiles(*flags):      # (rows, columns, 16, 16, 3)
        assert draw(run, tmp_path / "x.png", *flags) is None
        grid = np.asarray(Image.open(tmp_path / "x.png"))[2:, 2:]
        return grid.reshape(len(grid) // 18, 18, -1, 18, 3).swapaxes(1, 2)[:, :, :16, :16]

    three, six = ["--num", 3, "--labels", "7,2"], ["--num", 6, "--labels", "7,2"]
    images, _ = sampled(run, tmp_path / "X.NPZ", *six)
    guided, _ = sampled(run, tmp_path / "4.npz", *three, "--cfg", 4)
    assert draw(run, tmp_path / "new" / "folder", *six) is None
    files = [tmp_path / "new" / "folder" / f"{i:06d}.png" for i in range(6)]
    assert (images == np.stack([Image.open(file) for file in files])).all()
    assert (tiles(*six) == np.stack([images[0::2], images[1::2]])).all()
    assert (tiles(*three, "--sweep", 1, 4) == np.stack([images[:3], guided])).all()
    assert tiles().shape[:2] == (10, 8)
    assert sorted(files[0].parent.iterdir()) == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4.npz", "X.NPZ", "new", "x.png"]


@pytest.mark.parametrize("keys, found, raw", [
    (["model", "ema"], "ema", "model"), (["model", "model_ema1"], "model_ema1", "model"),
    (["state_dict", "model"], "model", "model"), (["state_dict"], "state_dict", "state_dict"), ([], "bare", "bare")])
def test_weights_load_in_every_wrapping(tmp_path, keys, found, raw):
    """Weights are found bare or under a key; prefixes of wrappers, and flags beside them (DiT), do not matter."""
    state = {key: {f"module._orig_mod.net.{key}": torch.ones(2)} for key in keys}
    torch.save({**state, "args": argparse.Namespace(lr=1)} if keys else {"net.bare": torch.ones(2)}, tmp_path / "w.pt")
    for key, prefer_raw in (found, False), (raw, True):
        weights, name = recipes.read_weights(tmp_path / "w.pt", prefer_raw)
        assert [*weights, name] == [key, key]


@pytest.fixture
def autoencoder(monkeypatch):
    """In place of both encoders: makes 8 x 8 pixels of each cell of latents, and 5 x 16 features of each text."""
    encoder = mock.Mock(side_effect=lambda texts: torch.stack([inputs((5, 16), seed=len(t))[0] for t in texts]))
    encoder.decode = lambda latents: data.to_uint8(F.interpolate(latents[:, :3], scale_factor=8))
    monkeypatch.setattr(encode, "Autoencoder", mock.Mock(return_value=encoder))
    monkeypatch.setattr(encode, "TextEncoder", mock.Mock(return_value=encoder))
    return encode.Autoencoder


@pytest.mark.parametrize("flags, tensors, recipe, null", [
    ("uvit_s2 --data cifar10", "", "vp euler_maruyama 1000 1.0", None),
    ("uvit_m4 --data imagenet64", "num_classes=1000 null_class=no", "vp dpm_solver 50 1.0", None),
    ("uvit_l2 --data imagenet256", "num_classes=1000", "vp dpm_solver 50 1.4", 1000),
    ("uvit_s2 --data mscoco256", "text_dim=16 text_tokens=5", "sd dpm_solver++ 50 2.0", inputs((5, 16))[0]),
    ("dit_xl2 --data imagenet512 --schedule flow", "num_classes=1000", "flow euler_maruyama 250 1.5", 1000),
    ("udit_tiny --data imagenet256 --model-args null_class=0", "num_classes=7 null_class=0", "ddpm ddpm 250 1.5", None),
    ("unet_adm --data imagenet256 --model-args num_classes=7", "num_classes=7", "sd dpm_solver++ 50 1.4", 7)])
def test_released_weights_sample_by_their_recipe(tmp_path, autoencoder, flags, tensors, recipe, null):
    """File, --model and --data tell shape, classes or text, null label, schedule, sampler, guidance and autoencoder."""
    small = "channels=32 head_channels=32" if "unet" in flags else "width=32 heads=2"
    args = sample.parse(f"--model {flags} --model-args {small} --weights {tmp_path}/w.pt --prompt cat".split())
    size, encoding = data.IMAGE_SIZE[args.data], encode.released_encoding(args.model, args.data)
    shape = (4, size // 8, size // 8) if encoding else (3, size, size)
    known = inspect.signature(recipes.NETWORKS[recipes.family(args.model)]).parameters
    given = dict(recipes.parse_argument(item, known) for item in f"{small} {tensors}".split())
    net = recipes.build(args.model, dict(given, in_channels=shape[0], image_size=shape[1]))
    torch.save(net.state_dict(), args.weights)
    source, classes = sample.open_source(args, torch.device("cpu")), given.get("num_classes", 0)
    assert type(source.schedule) is diffusion.SCHEDULES[recipe.split()[0]]
    assert "{sampler} {steps} {w:.1f}".format(**source.settings) == recipe.split(maxsplit=1)[1]
    assert (source.shape, source.image_shape, source.num_classes) == (shape, (3, size, size), classes)
    assert [call.args[0] for call in autoencoder.call_args_list] == ([encoding["autoencoder"]] if encoding else [])
    assert source.class_names[207:208] == (("golden retriever",) if classes == 1000 else ())
    assert np.array_equal(source.null, null)


def test_labels_are_numbers_or_names():
    """--labels takes numbers and names; where a class is named by a number, as folders 1, 2, 10 are, names alone."""
    for names, text, labels in (["cat", "dog"], "1,cat, dog", [1, 0, 1]), (["1", "10", "2"], "1,2", [0, 2]):
        assert sample.parse_labels(text, SimpleNamespace(num_classes=len(names), class_names=names)) == labels


def test_latents_train_and_sample(tmp_path, autoencoder, capsys):
    """A U-ViT learns latents by captions, and draws texts; without labels or autoencoder, it trains without grids."""
    flags = ("--schedule sd --model-args patch_size=2 --sample-steps 2 --workers 0 --sample-every 6 "
             "--label-dropout 0.4 --data").split()
    state, _ = trained(tmp_path, *flags, write_latents(tmp_path / "latents", count=20, text=(5, 16)))
    assert torch.equal(state["null"], data.load(tmp_path / "latents").null)
    assert Image.open(tmp_path / "samples" / "0000006.png").size == (8 * 66 + 2, 8 * 66 + 2)    # a row for each caption
    (tmp_path / "texts").write_text("a red bus\n\ntwo cats in a garden\n")
    a, labels = sampled(tmp_path, tmp_path / "a.npz", "--num", 4, "--prompt", "a red bus", "two cats in a garden")
    b, _ = sampled(tmp_path, tmp_path / "b.npz", "--num", 4, "--prompts", tmp_path / "texts")
    c, _ = sampled(tmp_path, tmp_path / "c.npz", "--num", 4, "--prompt", "a red bus")
    assert (a.shape, labels) == ((4, 64, 64, 3), None)
    assert (a == b).all()
    assert (a != c).any((1, 2, 3)).tolist() == [False, True, False, True]
    assert "give --prompt" in draw(tmp_path, tmp_path / "x.png")
    assert "a model without classes" in draw(tmp_path, tmp_path / "x.png", "--prompt", "a cat", "--labels", "1")
    autoencoder.side_effect = ValueError("diffusers is missing")
    state, _ = trained(tmp_path / "run", *flags, write_latents(tmp_path / "unlabelled", classes=0))
    assert (state["model_args"]["num_classes"], state["step"]) == (0, 6)
    assert capsys.readouterr().err.count("nothing to show: diffusers is missing") == 1


def bad_files(folder):
    """What holds no weights, or weights that do not fit; the same bytes hold no text."""
    net = recipes.build("dit_tiny", dict(image_size=16, num_classes=10, null_class=False))
    odd = {"label_emb.weight": torch.tensor(1.0), **net.state_dict(), "final_layer.linear.bias": torch.zeros(1)}
    odd["x_embedder.proj.bias"] = math.nan * odd.pop("t_embedder.mlp.0.bias")
    files = dict(list=[1], number={1: torch.ones(2)}, sparse={"x": torch.eye(3).to_sparse()}, code={"x": os.system})
    for name, content in dict(files, odd=odd).items():
        torch.save(content, folder / name)


RUN, RELEASED = "--ckpt {run}/checkpoint.pt", "--model dit_tiny --data shapes --weights"
REFUSALS["sample.py"] += [
    ("", "give either --ckpt"), ("--weights list", "--weights needs --model and --data", bad_files),
    ("--weights dit_xl2", "dit_xl2: no such file of weights, nor the name of"),
    ("--weights convnextv2_atto", "--weights convnextv2_atto: draws no images"),
    (f"{RUN} --export x.pt", "--export x.pt: give a name that ends in .safetensors"),
    (f"{RUN} --guide-with {{run}}/checkpoint.pt", "--guide-with: give a guidance weight too"),
    (f"{RUN} --schedule flow", "--schedule goes with --weights only"), (f"{RUN} --ema 0.5", "has the averages 0.9999"),
    (f"{RELEASED} list --ema 0.9", "--ema goes with --ckpt"), (f"{RELEASED} code", "code: not a file of w", bad_files),
    *[(f"{RELEASED} {name}", f"{name}: holds no state dict", bad_files) for name in ("list", "number", "sparse")],
    (f"{RELEASED} odd", "1 missing (t_embedder.mlp.0.bias); 1 unexpected (label_emb.weight); 1 of another shape "
     "(final_layer.linear.bias (1,), here (128,)); 1 with NaN or infinite numbers (x_embedder.proj.bias)", bad_files),
    ("--model fcmae_mini --data shapes --weights odd", "odd: fcmae_mini does not generate images", bad_files),
    ("--model dit_tiny --data celeba64 --weights odd", "has 10 rows, and the data 0 classes; say", bad_files),
    (f"{RUN} --cfg 2 --cfg-channels 4", "checkpoint.pt has 3 channels"), (f"{RUN} --prompt cat", "takes no text"),
    (f"{RUN} --sweep 1 inf", "inf: must be finite"), (f"{RUN} --sweep 1 2 --out y.npz", "an --out that ends in .png"),
    (f"{RUN} --num 10000000000000", "take 15360000.0 GB"), (f"{RUN} --labels 1,-2", "has classes 0 to 9, or red disc"),
    (f"{RUN} --prompts list", "list: holds no text in UTF-8", bad_files), (f"{RUN} --out x.jpg", "ends in .png or .np"),
    (f"{RUN} --out {HERE}", "exists and is not an empty"), (f"{RUN} --out /proc/x", "/proc/x: could not be written")]


def test_released_names_stand_for_recipes():
    """Each name has a file of its own. The flags that it stands for make a recipe: JiT's has noise for its size."""
    assert len({file for file, _, _ in recipes.RELEASED.values()}) == len(recipes.RELEASED) == 51
    for name in (name for name, (_, _, flags) in recipes.RELEASED.items() if flags):
        args = sample.parse(["--weights", name])
        scale = recipes.recipe(args.model, data.kind(args.data), args.schedule)["noise_scale"]
        assert (scale, args.cfg_channels) == (1 + (name[-2:] == "32"), 3 if name[:3] in ("dit", "sit") else None)


@pytest.mark.parametrize("part, change, words", [
    ("config", dict(schedule="sd"), "schedule is sd"), ("config", dict(data="cifar10"), "data is cifar10"),
    ("config", dict(predict="data"), "predict is data"), ("model_args", dict(num_classes=9), "num_classes is 9")])
def test_only_a_network_for_the_same_task_guides(run, tmp_path, part, change, words):
    """--guide-with refuses other data, another schedule, another prediction and other classes."""
    state = bookkeeping.read_checkpoint(run / "checkpoint.pt")
    torch.save({**state, part: {**state[part], **change}}, tmp_path / "weak.pt")
    assert f"its {words}, that of " in draw(run, tmp_path / "x.npz", "--cfg", 2, "--guide-with", tmp_path / "weak.pt")


# ---------------------------------------------------------------------------------------------------------------------
# fid.py

EYE = """import os, torch
from torch.nn.functional import conv2d, dropout, relu
class Eye(torch.nn.Module):     # two random convolutions: what shapes look like, in 40 numbers
    def __init__(self):
        super().__init__()
        torch.manual_seed(os.path.exists("other"))
        self.a = torch.nn.Parameter(torch.randn(16, 3, 3, 3) / 5)
        self.b = torch.nn.Parameter(torch.randn(40, 16, 3, 3) / 12)

    def forward(self, images):
        x = relu(conv2d(images / 127.5 - 1, self.a, stride=2))
        return relu(conv2d(dropout(x, training=self.training), self.b, stride=2)).mean((2, 3))
eye = Eye().eval()
blind = lambda images: eye(images) * float("nan")
"""


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Inception with filled weights, whose 566 names and shapes are those of pt_inception-2015-12-05-6726825d.pth."""
    with torch.device("meta"):
        weights = fill(torchvision.models.Inception3(1008, aux_logits=False, init_weights=False).state_dict())
    shapes = "\n".join(sorted(f"{name} {tuple(value.shape)}" for name, value in weights.items()))
    assert hashlib.sha256(shapes.encode()).hexdigest()[:16] == "760681d791cb624e"
    weights |= {name: 2**0.5 * value for name, value in weights.items() if name.endswith("conv.weight")}    # a signal
    weights |= {name: 1 + value.abs() for name, value in weights.items() if name.endswith("running_var")}
    torch.save(weights, path := tmp_path_factory.mktemp("inception") / "weights.pth")
    return fid.Inception(path)


@pytest.mark.parametrize("resize, name, norm, few", [
    ("tensorflow", "pool3", 0.407455076, [0, 0.117758, 0.482271, 0.002269]),
    ("tensorflow", "spatial", 0.716274875, [0.53551, 0.435461, 0, 0.318718]),
    ("tensorflow", "logits", 0.403988174, [0.30852, -0.557795, -0.305043, -0.431874]),
    ("pytorch", "pool3", 0.407736909, [0, 0.114539, 0.486966, 0.002569])])
def test_inception_computes_what_the_ports_do(inception, monkeypatch, resize, name, norm, few):
    """The norm of each output and four of its numbers are torch-fidelity's and pytorch-fid's, within 1e-4."""
    monkeypatch.setitem(inception.made, "resize", resize)
    out = inception(torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 3, 32, 32)).astype(np.uint8)))[name]
    assert out.square().mean().sqrt().item() == pytest.approx(norm, rel=1e-4)
    assert relative(out[0, ::out.shape[1] // 4][:4], few) < 1e-4
    assert fid.resize(torch.tensor([[[[0.0, 8, 4]]]]), 6)[0, 0].tolist() == 6 * [[0, 4, 8, 6, 4, 4]]
    refuses("expected uint8 images", inception, torch.zeros(1, 3, 8, 8))


def gauss(x):
    return x.mean(0), np.cov(x, rowvar=False)


def test_numbers_are_those_of_the_published_tools():
    """pytorch-fid 0.3.0 (1e-9; 1e-7, its own error, without full rank) and torch-fidelity 0.4.0, in blocks or not."""
    rng = np.random.RandomState(0)
    a = rng.standard_normal((1500, 48)) @ rng.standard_normal((48, 48)) * 0.3
    b = rng.standard_normal((1200, 48)) @ rng.standard_normal((48, 48)) * 0.3 + 0.2
    logits = 2 * rng.standard_normal((1000, 20)).astype(np.float32)
    sides = [dict(zip(("mu", "sigma"), gauss(x)), pool3=x[:, :8]) for x in (a, b)]
    numbers = {"FID": 107.91284986772422, "precision": 0.74, "recall": 0.8458333333}
    assert fid.compare(*sides, {}, "cpu") == pytest.approx(numbers, rel=1e-9)
    assert fid.frechet_distance(*gauss(a[:40]), *gauss(b[:30])) == pytest.approx(183.3301718134664, rel=1e-7)
    own = [fid.frechet_distance(*gauss(a[:n]), *gauss(a[:n])) for n in range(10, 20)]
    assert 0 <= min(own) <= max(own) < 1e-10
    refuses("not finite", fid.frechet_distance, np.full(48, np.nan), np.eye(48), np.zeros(48), np.eye(48))
    assert fid.inception_score(logits) == pytest.approx((3.3609154765, 0.1320813473), rel=1e-8)
    refuses("9 images do not make 10 splits", fid.inception_score, logits[:9])
    assert fid.share_inside(*(torch.from_numpy(x[:, :8]) for x in (a, b)), 3, block=200) == pytest.approx(0.74)
    real, generated = torch.arange(10.0)[:, None], torch.tensor([[0.0], [1], [2], [3]])     # radii 3, 2, 2, 3
    assert fid.precision_recall(real, generated) == (1, 7 / 10)
    parts = [fid.moments(part) for part in (torch.from_numpy(a) + 1e7).split([1, 499, 700, 300])]
    n, mean, scatter = functools.reduce(fid.merged, parts)      # E[x x^T] - mean mean^T would lose all digits
    assert np.allclose(mean - 1e7, gauss(a)[0], atol=1e-7)
    assert np.allclose(scatter / (n - 1), gauss(a)[1], atol=1e-6)


def write_files(folder):
    """Images in several forms, good and bad, and an eye -> what it sees in clean and noisy images, (60, 40) each."""
    images = data.shapes(length=60).images.permute(0, 2, 3, 1).numpy()
    noisy = (images + np.random.RandomState(0).normal(0, 20, images.shape)).clip(0, 255).astype(np.uint8)
    for name, arrays in {
            "clean": dict(arr_0=images), "noisy": dict(arr_1=np.arange(60), arr_0=np.asfortranarray(noisy)),
            "names": dict(images=images), "nchw": dict(arr_0=images.transpose(0, 3, 1, 2)),
            "one": dict(arr_0=images[:1]), "three": dict(arr_0=images[:3]), "few": dict(arr_0=images[:5]),
            "five": dict(mu=np.zeros(5), sigma=np.eye(5)), "saved": dict(mu=np.zeros(40), sigma=np.eye(40), size="8x8"),
            "nan": dict(mu=[np.nan], sigma=[[1]]), "text": dict(mu="a", sigma="b")}.items():
        np.savez(f"{name}.npz", **arrays)
    np.savez_compressed("packed.npz", arr_0=noisy)
    Path("flipped.npz").write_bytes(Path("clean.npz").read_bytes().replace(bytes(images[0, 0, 0]), b"???", 1))
    for name in ("noisy", "mixed", "bomb"):
        Path(name).mkdir()
    for i, image in enumerate(noisy):
        Image.fromarray(image).save(f"noisy/{i:03d}.png")
    for name, size in ("mixed/a", b"8 8"), ("mixed/b", b"4 4"), ("bomb/b", b"99999 9999"):
        Path(f"{name}.ppm").write_bytes(b"P6 " + size + b" 255\n" + bytes(192))
    Path("words.pt2").write_text("no network")
    Path("eye.py").write_text(EYE)
    eye = runpy.run_path("eye.py")["eye"].requires_grad_(False)
    return [eye(torch.from_numpy(x).permute(0, 3, 1, 2)).double().numpy() for x in (images, noisy)]


@pytest.fixture
def gallery(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_files(tmp_path)


def measured(capsys, *flags, features="eye.py:Eye"):
    """fid.py's JSON line -> (its distance, all that it holds)."""
    fid.main([*map(str, flags), *(["--features", features] if features else []), "--device", "cpu", "--json"])
    shown = capsys.readouterr()
    assert ("fid.py: executes eye.py\n" in shown.err) == ("eye.py" in f"{features} {flags}")
    found = json.loads(shown.out.splitlines()[-1])
    assert next(iter(found)) == f"Frechet distance on {found['network']['network']}"
    return next(iter(found.values())), found


@pytest.mark.parametrize("samples, ref, flags", [
    ("noisy.npz", "clean.npz", "eye.py:eye"), ("packed.npz", "clean.npz", "eye.py:Eye --no-pr"),
    ("noisy", "clean.npz", "eye.pt2 --batch-size 7"), ("noisy", "statistics.npz", "eye.py:Eye"),
    ("noisy.npz", "published.npz", "eye.py:Eye"), ("noisy", "published.npz", "eye.py:Eye --size 16")])
def test_distance_of_every_kind_of_input(gallery, capsys, monkeypatch, samples, ref, flags):
    """Images of an npz or a folder, in any batches, statistics, any kind of network: the number of the formula."""
    monkeypatch.setattr(data, "IN_MEMORY", 0 if "--size" in flags else data.IN_MEMORY)      # read by workers
    mu, sigma = gauss(gallery[0])
    np.savez("statistics.npz", mu=mu, sigma=sigma)
    np.savez("published.npz", mu=mu, sigma=sigma, arr_0=np.load("few.npz")["arr_0"])        # as guided-diffusion's
    if "eye.pt2" in flags:
        eye, images = runpy.run_path("eye.py")["eye"], torch.zeros(4, 3, 16, 16).byte()
        torch.export.save(torch.export.export(eye, (images,), dynamic_shapes=({0: torch.export.Dim("n")},)), "eye.pt2")
    distance, found = measured(capsys, samples, "--ref", ref, "--features", *flags.split(), features=None)
    assert distance == pytest.approx(fid.frechet_distance(*gauss(gallery[1]), mu, sigma), rel=1e-6)
    assert ("precision" in found) == (ref != "statistics.npz" and "--no-pr" not in flags)
    assert found["samples"] == dict(source=samples, size="16x16", n=60)
    assert isinstance(fid.read_npz("noisy.npz")[0], np.memmap)      # takes no memory until a batch is needed


def test_distance_of_a_checkpoint_is_that_of_its_samples(run, gallery, capsys):
    """--ckpt measures what sample.py would write with the same flags, and says how it was sampled."""
    flags = ["--ckpt", run / "checkpoint.pt", *"--num-images 30 --sampler ddpm --steps 3 --seed 2 --labels 3,5".split()]
    assert command("sample.py", *flags, "--device", "cpu", "--out", "x.npz") is None
    distance, found = measured(capsys, *flags, "--batch-size", 8, "--ref", "clean.npz")
    assert distance == pytest.approx(measured(capsys, "x.npz", "--ref", "clean.npz")[0], rel=1e-6)
    made = dict(n=30, size="16x16", step=6, sampler="ddpm", steps=3, w=1, seed=2, labels="3,5")
    assert made.items() <= found["samples"].items()


def test_saved_reference_is_read(gallery, capsys, monkeypatch):
    """--save-ref keeps what --ref needs. Vectors are evenly spaced: the first are of one class."""
    monkeypatch.setattr(fid, "VECTORS", 20)
    before = set(Path().rglob("*"))
    distance, found = measured(capsys, "noisy", "--ref", "clean.npz", "--batch-size", 7, "--save-ref", "ref.npz")
    found["reference"] = dict(source="ref.npz", size="16x16", n=60, vectors=20)
    assert measured(capsys, "noisy", "--ref", "ref.npz", "--batch-size", 7) == (distance, found)
    assert np.allclose(np.load("ref.npz")["pool3"], gallery[0][::3], atol=1e-6)
    assert measured(capsys, "ref.npz", "--ref", "ref.npz", features=None)[1]["network"]["network"] == "eye.py:Eye"
    assert set(Path().rglob("*")) - before == {Path("ref.npz")}
    for changed, content in ("eye.py", EYE + "\n"), ("other", ""):           # other code, then other weights
        Path("eye.py").write_text(EYE)
        Path(changed).write_text(content)
        refuses("ref.npz: statistics of .*eye.py:Eye.*, not of", measured, capsys, "noisy.npz", "--ref", "ref.npz")


REFUSALS["fid.py"] += [(f"--ref clean.npz --features eye.py:eye {flags}", words, write_files) for flags, words in [
    ("none.npz --ref cifar10", "none.npz: no such file, folder, or data set (cifar10"),     # and no download
    ("words.pt2", "words.pt2: not an npz (or a damaged one)"), ("text.npz", "text.npz: "),
    ("flipped.npz", "flipped.npz: the checksum of arr_0.npy is wrong"), ("nan.npz", "nan.npz: mu is not finite"),
    ("names.npz", "names.npz: neither arr_0 (images) nor mu and"), ("one.npz", "one.npz: 1 image(s); a covariance"),
    ("nchw.npz", "arr_0 is uint8 (60, 3, 16, 16) (NCHW? transpose(0, 2"), ("", "give either an npz (arr_0), a fol"),
    ("bomb", "b.ppm: not a readable image"), ("mixed", "square images of one size are needed; --size PIXELS"),
    ("--ckpt x.pt", "--num-images N: say how many"), ("clean.npz --num-images 9", "-images: clean.npz is there alre"),
    ("clean.npz --size 8", "--size 8 8x8, clean.npz 16x16"), ("clean.npz --ref saved.npz", "npz 16x16, saved.npz 8x8"),
    ("clean.npz --ref five.npz", "do not fit together: (40,)"), ("clean.npz --ref three.npz", "here 3 real and 60 gen"),
    ("five.npz --ref five.npz --features=", "five.npz: mu has shape (5,); Inception's has 2048 numbers"),
    ("clean.npz --ref cifar10 --data-dir no", "-dir no: no such folder"), ("clean.npz --save-ref a/b.npz", "could not"),
    ("clean.npz --save-ref one.npz", "give the name of a"), ("clean.npz --ref saved.npz --save-ref x.npz", "already"),
    ("clean.npz --features eye.py:ear", "ear: KeyError: 'ear'"), ("clean.npz --features words.pt2", "not there, or"),
    ("clean.npz --features eye.py:relu", "do not become vectors"), ("clean.npz --features eye.py:blind", "not finite")]]


# ---------------------------------------------------------------------------------------------------------------------
# bench.py


@pytest.fixture
def benched(monkeypatch, capsys):
    """A function of flags that runs bench.py, with blocks of one call and small products -> its JSON line, read."""
    monkeypatch.setattr(bench, "BLOCK", 1e-9)
    monkeypatch.setitem(bench.CEILING, "cpu", 64)
    monkeypatch.setitem(bench.EVALUATIONS, "cpu", 2)
    monkeypatch.setattr(bench.gc, "collect", lambda: None)      # half a second each in a process full of tests
    tiny = "--model uvit_tiny --data shapes --width=32 --heads=2 --batch-size 2 --repeats 2 --json"

    def measure(*flags):
        bench.main([*tiny.split(), *map(str, flags), "--device", "cpu"])
        return json.loads(capsys.readouterr().out)["results"][0]
    return measure


@pytest.mark.parametrize("network, published", [
    ("uvit_s2 --data mscoco256", [44.69, 16.23]), ("udit_s --data imagenet256", [58.90, 6.02])])
def test_bench_counts_what_is_published(network, published):
    """Parameters and multiply-adds (convolutions merged) are the published ones within 0.5 %, at any batch size."""
    config = bench.configure(bench.parse(["--batch-size", "7", "--model", *network.split()]))
    assert [config.parameters / 1e6, config.macs / 1e9] == pytest.approx(published, rel=5e-3)


@pytest.mark.parametrize("words", [words for words, _ in bench.PAPERS])
def test_bench_has_rows_that_go_together(words):
    """Each row of the papers names a model, data and arguments that fit; flags given beside it win."""
    with mock.patch("bench.count", return_value=(1, 1)):
        assert bench.configure(bench.parse([*bench.flags(words), "--batch-size", "3"])).batch_size == 3


REFUSALS["bench.py"] += [(f"--model uvit_s2 {flags}", message) for flags, message in [
    ("--data photos", "--data photos: choose from cifar10, "), ("--papers --loop", "--loop stands alone"),
    ("--papers --compare a a", "--a: neither a flag (see --help) nor"), ("", "give --model and --data, or --papers"),
    ("--data cifar10 --measure speed", "choose from forward, step"), ("--papers --repeats 0", "--repeats 0: m"),
    ("--data shapes --model fcmae_mini", "--model fcmae_mini: bench.py measures diffusion networks"),
    ("--papers --batch-size 0", "--batch-size 0: must"), ("--data cifar10 --cfg 2", "--cfg 2.0: uvit_s2 learns no nu")]]


# ---------------------------------------------------------------------------------------------------------------------
# The pages: README.md, TUTORIAL.md and RESULTS.md; and what the commands refuse

PAGES = {name: (HERE / name).read_text() for name in ("README.md", "TUTORIAL.md", "RESULTS.md")}
PROSE = {name: re.sub(r"^```.*?^```", "", text, flags=re.M | re.S) for name, text in PAGES.items()}
PARSERS = {"train.py": train.parse, "sample.py": sample.parse, "encode.py": encode.main, "fid.py": fid.parse,
           "bench.py": bench.parse}
FOREIGN = {"--index-url", "--force-reinstall", "--logdir", "--max-restarts"}       # pip's, tensorboard's, torchrun's


def blocks(language):
    """(page and number, code, the output shown below it or "") of each code block in a language."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?", re.M | re.S)
    return [(f"{page}-{i}", *block) for page, text in PAGES.items() for i, block in enumerate(pattern.findall(text))]


EXAMPLES = [block for block in blocks("python") if "import " in block[1] or "# continues" in block[1]]
STARTS = [i for i, (_, code, _) in enumerate(EXAMPLES) if "# continues" not in code]
STORIES = [EXAMPLES[start:end] for start, end in itertools.pairwise([*STARTS, len(EXAMPLES)])]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Every link inside the project names a file, and a heading as GitHub writes it where it names one."""
    links = [link for link in re.findall(r"\]\(([^)]*)\)", PROSE[page]) if not link.startswith("https://")]
    assert len(links) > 10
    for name, _, anchor in (link.partition("#") for link in links):
        assert (HERE / (name or page)).is_file(), name
        titles = re.findall(r"^#+ (.*)", PROSE.get(name or page, ""), re.M)
        assert anchor in ["", *(re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles)]


def test_quoted_lines_stand_in_the_code():
    """A block of Python that is no example is a quotation: each of its lines stands so in diffusion.py."""
    lines = {line.split("  #")[0].strip() for line in (HERE / "diffusion.py").read_text().splitlines()}
    quoted = [line.strip() for block in blocks("python") if block not in EXAMPLES for line in block[1].splitlines()]
    assert len(quoted) > 8
    assert [line for line in quoted if line not in lines] == []


def test_commands_are_understood(tmp_path, monkeypatch):
    """The shell runs every block, loops and all, with stand-ins for its programs; then each script reads its flags."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    stand_in = '{ printf "%s\\0" "$@" $\'\\n\' >> calls; }; '
    script = "".join(f"{name}() {stand_in}" for name in ("python", "torchrun", "pip", "tensorboard"))
    script += 'timeout() { shift; "$@"; }\n' + "\n".join(f"( {code}\n)" for _, code, _ in blocks("sh"))
    subprocess.run(["bash", "-euc", script], check=True)
    monkeypatch.setattr(encode, "encode", lambda flags: None)
    monkeypatch.setattr(data, "kind", lambda name: name if name in data.DATASETS else "folder")     # most are not here
    understood = collections.Counter()
    for words in (call.split("\0") for call in Path("calls").read_text().split("\0\n\0")[:-1]):
        for name in PARSERS.keys() & set(words):
            PARSERS[name](words[words.index(name) + 1:])
            understood[name] += 1
    assert understood.keys() == PARSERS.keys()
    assert understood["train.py"] > 20


def test_flags_in_the_text_are_known(capsys):
    """Every --flag that a sentence names is one of the scripts', or of the script that is named with it."""
    known = {}
    for name, parse in PARSERS.items():
        refuses("0", parse, ["--help"], error=SystemExit)
        known[name] = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    for code in re.findall(r"`([^`]+)`", "".join(PROSE.values())):
        scripts = [name for name in PARSERS if name in code] or PARSERS
        options = set.union(FOREIGN, *(known[name] for name in scripts))
        assert set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]+(?!\w)", code)) <= options, code


@pytest.mark.parametrize("story", STORIES, ids=[story[0][0] for story in STORIES])
def test_examples_run(story, run, tmp_path, monkeypatch, capsys):
    """Every example runs, and prints what the page shows. Where it reads runs, they are the smallest finished run."""
    if needs := re.search(r"# needs (matplotlib|efficientnet_lite_pytorch)", story[0][1]):
        pytest.importorskip(needs[1])
    monkeypatch.chdir(tmp_path)
    few = mock.MagicMock(classes=data.CIFAR10_CLASSES)      # in place of 50,000 images that would be downloaded
    few.__iter__.return_value = [(Image.new("RGB", (32, 32)), label) for label in range(10)]
    monkeypatch.setattr("torchvision.datasets.CIFAR10", lambda *arguments, **options: few)
    Path("pictures").mkdir()
    distances = mock.mock_open(read_data="Frechet distance on features.py:Features 950.7")      # of the page's loops
    namespace = {"open": distances} if "runs/ladder" in story[0][1] else {}
    if "runs/predict" in story[0][1]:
        monkeypatch.setattr(np, "load", lambda file: {"arr_0": np.zeros((6, 16, 16, 3), np.uint8)})
    for _, code, output in story:
        for folder in re.findall(r"runs/[\w/-]+?(?=/\w+\.|\")", code):
            Path(folder).parent.mkdir(parents=True, exist_ok=True)
            if "masked" in folder:
                convnet(Path(folder), "fcmae_mini" if "pre" in folder else "convnextv2_mini", "--steps", "1")
            else:
                Path(folder).symlink_to(run)
        capsys.readouterr()
        exec(code, namespace)
        assert output in ("", capsys.readouterr().out)


def test_notebook_is_the_tutorial():
    """tutorial.ipynb is what .ci/notebook.py makes of TUTORIAL.md: each example and each command is a cell of code."""
    page, made = PAGES["TUTORIAL.md"], (HERE / "tutorial.ipynb").read_text()
    assert made == runpy.run_path(str(HERE / ".ci" / "notebook.py"))["notebook"](page), "run python .ci/notebook.py"
    cells = ["".join(cell["source"]) for cell in json.loads(made)["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 1 + page.count("```sh") + sum(name.startswith("TUTORIAL") for name, _, _ in EXAMPLES)
    assert re.match("%run train.py .*[^ ]$", cells[2]) and cells[-1].endswith('Image("runs/film.gif")')


def test_every_command_says_what_is_wrong(run, tmp_path, monkeypatch):
    """Each row of REFUSALS ends in one line that begins with the script's name and holds the words."""
    wrong = []
    for number, (script, (flags, words, *make)) in enumerate((s, row) for s, rows in REFUSALS.items() for row in rows):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        for function in make:
            function(Path.cwd())
        flags = flags.split() if isinstance(flags, str) else flags
        message = command(script, *(str(flag).replace("{run}", str(run)) for flag in flags))
        if not re.fullmatch(f"{re.escape(script)}: .*{re.escape(words)}.*", str(message)):
            wrong.append((script, words, message))
    assert wrong == []
