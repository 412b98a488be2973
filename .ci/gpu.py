"""Everything that is to be known on the first GPU, in one command of at most eight minutes.

    python .ci/gpu.py                               # writes gpu/results.json and gpu/results.md
    python .ci/gpu.py --data-dir data               # where CIFAR10 lies; without it the training is of drawn shapes
    python .ci/gpu.py --parts checks,eager          # some parts
    python .ci/gpu.py --fake                        # on a CPU, with tiny networks: does this script itself work?
    python -m pytest .ci/gpu.py                     # the tests alone; skipped where there is no GPU

checks      networks as released, in float32 and bf16; training, resuming, fp16, --compile, NCCL, Inception as on a CPU
recipe      100 seconds of U-ViT-S/2's CIFAR10 recipe, compiled: its loss and images/s
eager       training steps of six networks with --grad-checkpoint 0, 1 and 2: images/s, share of the GPU's peak, memory
sampling    500 images with 50 evaluations
compiled    the training steps of eager with --compile, as many as there is time for

Each part is a process of its own with a time limit. What it found before it failed or ran out of time is kept. The exit
status is 1 where a part failed; memory that is not within 10 % of SIMULATED is a failure.
"""
import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")         # --deterministic needs it before the first product
FAKE = bool(os.environ.get("FAKE_GPU"))
HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import numpy as np
import pytest
import torch

import bench
import bookkeeping
import data
import recipes
import train
from test_all import DIRECTIONS, SMALL, assert_same_run, command, every_network, log_of
from test_all import relative, shell, tiny, trained
from test_all import inception      # a fixture

DEVICE = "cpu" if FAKE else "cuda"
PARTS = {"checks": 120, "recipe": 190, "eager": 110, "sampling": 40, "compiled": 480}       # seconds, at most
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}         # published, of dense bf16 products; operations a second
SIMULATED = {   # GB of a training step in bf16 with 128 images and checkpoint 0, 1, 2: of tensors without numbers
    "uvit_s2": (9.3, 2.5, 5.8), "uvit_l2": (32.6, 9.8, 20.6), "uvit_h2": (51.5, 15.4, 32.5),
    "dit_xl2": (59.3, 17.2, 38.0), "udit_b": (40.1, 10.9, 23.3), "jit_b16": (24.1, 5.7, 14.4)}
DATA = {"uvit_s2": "cifar10", "jit_b16": "folder"}              # else imagenet256
TINY = {"uvit_tiny": "shapes", "dit_tiny": "shapes", "jit_tiny": "shapes"}
RECIPE = ("--model uvit_s2 --batch-size 128 --lr 2e-4 --warmup 2500 --weight-decay 0.03 --betas 0.99 0.999 --sampler "
          "dpm_solver --sample-steps 50 --cfg 1 --no-class-cond --label-dropout 0 --no-clip-x0 --log-every 50 "
          "--save-every 100000 --sample-every 0 --steps 500000 --compile")


# ---------------------------------------------------------------------------------------------------------------------
# The tests. What they compare with was computed on a CPU, by test_all.py or here.

pytestmark = pytest.mark.skipif(not FAKE and not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """No TF32 in matrix products and convolutions; the commands turn it on again for themselves."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")
    if FAKE:
        monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    yield
    torch.use_deterministic_algorithms(False)


def on_device(batch):
    return [z if z is None else z.to(DEVICE) for z in batch]


@every_network
@torch.no_grad()
def test_network_computes_as_on_a_cpu(family, variant):
    """float32 within 1e-4 of a CPU's output, which test_all.py holds to the golden values, bf16 within 3 % of it."""
    model, batch = tiny(family, variant)
    exact, model = model(*batch), model.to(DEVICE)
    out = model(*on_device(batch)).cpu()
    assert relative(out, exact) < 1e-4
    with torch.autocast(DEVICE, torch.bfloat16):
        half = model(*on_device(batch)).float().cpu()
    assert (half - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("family", DIRECTIONS)
def test_training_is_that_of_a_cpu(family):
    """Four steps of AdamW from the same weights, times and noise: losses and gradients within 1e-3."""
    config = train.parse("--model uvit_tiny --data shapes --batch-size 4 --lr 1e-3 --warmup 1 --amp off".split())
    config.accumulate, schedule, found = 1, recipes.schedule_of({"schedule": "vp"}), []
    for device in ("cpu", DEVICE):
        model, (x, _, y) = tiny(family, **{} if family in ("uvit", "unet", "jit") else {"learn_sigma": False})
        here = SimpleNamespace(world=1, distributed=False, device=torch.device(device))
        learner, random = train.Learner(model.to(device), schedule, config, here), torch.manual_seed(0)
        for step in range(4):
            t, noise = torch.rand(4, generator=random, dtype=torch.float64), torch.randn(x.shape, generator=random)
            moved = [z if z is None else z.to(device) for z in (x, y, t, noise)]
            found.append([value.item() for value in learner.step(step, [moved])])
    assert np.array(found[4:]) == pytest.approx(np.array(found[:4]), rel=1e-3)


def test_resumed_run_is_bit_for_bit_the_same(tmp_path):
    """With --deterministic, 3 + 3 steps on a GPU equal 6, to the last bit, in bf16 too."""
    for amp in ("off", "bf16"):
        flags = ["--device", DEVICE, "--deterministic", "--amp", amp]
        trained(tmp_path / amp / "whole", *flags)
        for steps in (3, 6):
            trained(tmp_path / amp / "parts", *flags, "--steps", steps)
        assert_same_run(tmp_path / amp / "parts", tmp_path / amp / "whole")


def test_precision_and_compilation_change_little(tmp_path):
    """Losses of fp16 with its scaler, of bf16 and of --compile are within 3 % of float32's, and images alike."""
    runs = {"off": "", "fp16": "--amp fp16", "bf16": "--amp bf16", "compiled": "--compile --grad-checkpoint 2"}
    losses = {}
    for name, flags in runs.items():
        state, log = trained(tmp_path / name, "--device", DEVICE, "--amp", "off", *flags.split())
        losses[name] = [line["loss"] for line in log]
        assert name != "fp16" or state["scaler"]["scale"] >= 1024
    assert all(found == pytest.approx(losses["off"], rel=0.03) for found in losses.values())
    for more in ([], ["--compile"]):
        out = tmp_path / f"{len(more)}.npz"
        assert command("sample.py", "--ckpt", tmp_path / "off/checkpoint.pt", "--num-images", 20, "--batch-size", 8,
                       "--cfg", 2, "--steps", 4, "--device", DEVICE, "--out", out, *more) is None
    a, b = (np.load(tmp_path / f"{i}.npz")["arr_0"].astype(int) for i in (0, 1))
    assert abs(a - b).mean() < 1


def test_processes_train_as_one(tmp_path):
    """torchrun with as many processes as there are GPUs (NCCL): the losses of one process, within 1 %."""
    n = max(k for k in (1, 2, 4, 8) if k <= max(1, torch.cuda.device_count()))          # of a batch of 8
    _, log = trained(tmp_path / "one", "--device", DEVICE, "--amp", "off")
    result = shell("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "train.py", *SMALL,
                   "--device", DEVICE, "--amp", "off", "--out", tmp_path / "all")
    assert result.returncode == 0, result.stderr
    assert [line["loss"] for line in log_of(tmp_path / "all")] == pytest.approx([x["loss"] for x in log], rel=0.01)


def test_inception_computes_as_on_a_cpu(inception):                                         # noqa: F811
    """All three outputs within 1e-3 (of the largest number)."""
    images = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (4, 3, 32, 32)).astype(np.uint8))
    exact = inception(images)
    found = inception.to(DEVICE)(images.to(DEVICE))
    inception.cpu()
    assert all(relative(found[name].cpu(), exact[name]) < 1e-3 for name in exact)


# ---------------------------------------------------------------------------------------------------------------------
# The parts: functions of (args, tell), which call tell(row) for each result


class Told:
    """A plugin of pytest: one row for each test."""

    def __init__(self, tell):
        self.tell = tell

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed" and report.when == "setup":
            self.tell({"what": report.nodeid.split("::")[-1], "outcome": report.outcome, "seconds": report.duration})


def checks(args, tell):
    return int(pytest.main(["-q", "--tb=short", "-p", "no:cacheprovider", __file__], plugins=[Told(tell)]))


def recipe(args, tell):
    """train.py, stopped by a signal some time after its first report. Returns whether its loss has not fallen."""
    flags, seconds = RECIPE.split(), 100
    try:
        data.load("cifar10", args.data_dir)
        flags += ["--data", "cifar10", *(["--data-dir", args.data_dir] if args.data_dir else [])]
    except (ValueError, OSError, RuntimeError) as error:
        print(f"drawn shapes in place of CIFAR10: {data.one_line(error)}")
        flags += "--data shapes --image-size 32".split()
    if FAKE:
        flags, seconds = [*SMALL, "--steps", "10000"], 2
    out = args.out / f"run-{time.time():.0f}"
    process = subprocess.Popen([sys.executable, HERE / "train.py", *flags, "--device", DEVICE, "--out", out])
    while process.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.1)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    process.wait()
    first, *_, last = log_of(out)
    tell({"what": " ".join(flags), "steps": last["step"], "first loss": first["loss"], "last loss": last["loss"],
          "images/s": last["images_per_sec"], "GB": last["memory_gb"], "skipped": last["skipped"]})
    return not (FAKE or last["loss"] < first["loss"])


def measured(tell, flags, **facts):
    """A row of bench.py's. Returns it, or None where memory does not suffice."""
    config = bench.configure(bench.parse([*flags.split(), "--device", DEVICE]))
    row = next(bench.measure({"": config}, bookkeeping.Processes(DEVICE)))
    if "error" in row:
        return tell({"what": flags, "error": row["error"]})
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else ""
    peak = next((peak for name, peak in PEAK.items() if name in device), None)
    tell({"what": flags, "seconds": row["seconds"], "images/s": row["images_per_sec"], "share": row["share"],
          "MFU": peak and row["flops_per_sec"] / peak, "GB": (row["peak_bytes"] or 0) / 1e9, **facts})
    return row


def steps(tell, flags, checkpoints):
    """Training steps of all networks. Returns whether memory was as simulated."""
    fits = True
    for model in TINY if FAKE else SIMULATED:
        name = TINY[model] if FAKE else DATA.get(model, "imagenet256")
        for k in checkpoints:
            simulated = SIMULATED.get(model, (0, 0, 0))[k]
            if DEVICE == "cuda" and 1e9 * simulated > torch.cuda.get_device_properties(0).total_memory:
                tell({"what": f"{model} {flags} --grad-checkpoint {k}", "error": "too large for this GPU"})
                continue
            row = measured(tell, f"--model {model} --data {name} --measure step --batch-size {2 if FAKE else 128} "
                           f"--repeats {1 if FAKE else 3} --grad-checkpoint {k} {flags}", **{"simulated GB": simulated})
            fits &= FAKE or row is not None and abs(row["peak_bytes"] / 1e9 / simulated - 1) < 0.1
    return fits


def eager(args, tell):
    return not steps(tell, "--amp bf16", (0, 1, 2))


def compiled(args, tell):
    steps(tell, "--amp bf16" if FAKE else "--amp bf16 --compile", (0,))     # compiled code may need less memory


def sampling(args, tell):
    for model, name in (TINY if FAKE else {"uvit_s2": "cifar10", "uvit_h2": "imagenet256"}).items():
        size, repeats = (2, 1) if FAKE else (500, 2)
        measured(tell, f"--model {model} --data {name} --measure sampling --batch-size {size} --amp bf16 "
                 f"--repeats {repeats}")


# ---------------------------------------------------------------------------------------------------------------------


def run(name, seconds, args):
    """One part in a process of its own -> {status, seconds, rows}."""
    rows, start = args.out / f"{name}.jsonl", time.time()
    rows.unlink(missing_ok=True)
    argv = [sys.executable, __file__, "--part", name, "--out", args.out]
    argv += ["--data-dir", args.data_dir] if args.data_dir else []
    with open(args.out / f"{name}.txt", "w") as text:
        process = subprocess.Popen(argv, cwd=HERE, stdout=text, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
            status = "ok" if code == 0 else f"failed with {code}, see {name}.txt"
        except subprocess.TimeoutExpired:
            status = "ok, as far as time allowed" if name == "compiled" else f"no end after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)      # and whatever it has started
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    return {"status": status, "seconds": time.time() - start, "rows": found}


def table(report):
    """The report in Markdown: a table for each part."""
    def cell(value):
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")

    lines = [f"{report['device']}, torch {report['torch']}, {report['gpus']} GPUs, {report['seconds']:.0f} s in all"]
    for name, part in report["parts"].items():
        lines += ["", f"**{name}**: {part['status']}, {part['seconds']:.0f} s", ""]
        keys = list(dict.fromkeys(key for row in part["rows"] for key in row))
        if keys:
            lines += ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
        lines += ["| " + " | ".join(cell(row.get(key)) for key in keys) + " |" for row in part["rows"]]
    return "\n".join(lines) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the results (default gpu)")
    p.add_argument("--data-dir", help="where CIFAR10 lies (default data/)")
    p.add_argument("--parts", default=",".join(PARTS), help="some of the parts, with commas between")
    p.add_argument("--minutes", type=float, default=8, help="for all of it (default 8)")
    p.add_argument("--fake", action="store_true", help="on a CPU, tiny networks")
    p.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = p.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        if FAKE:
            bench.BLOCK, bench.CEILING["cpu"] = 1e-9, 64
        with open(args.out / f"{args.part}.jsonl", "w", buffering=1) as rows:
            sys.exit(int(globals()[args.part](args, lambda row: rows.write(json.dumps(row) + "\n") and None) or 0))
    if args.fake:
        os.environ["FAKE_GPU"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("gpu.py: no GPU is found; --fake tries this script on a CPU")
    start, parts = time.time(), {}
    report = dict(device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", torch=torch.__version__,
                  gpus=torch.cuda.device_count(), parts=parts)
    for name in args.parts.split(","):
        seconds = min(PARTS[name], 60 * args.minutes - (time.time() - start))
        parts[name] = run(name, seconds, args) if seconds > 5 else {"status": "no time", "seconds": 0, "rows": []}
        report["seconds"] = time.time() - start
        (args.out / "results.json").write_text(json.dumps(report, indent=1))
        (args.out / "results.md").write_text(table(report))
        print(f"{name}: {parts[name]['status']} ({parts[name]['seconds']:.0f} s)", flush=True)
    print(args.out / "results.md")
    sys.exit(any(not part["status"].startswith("ok") for part in parts.values()))


if __name__ == "__main__":
    main()
