"""The long proofs: kills, restarts, two processes as one, compiled steps, running on and on, learning to a threshold.

    python -m pytest .ci/endure.py                  # about twelve minutes on two idle CPU cores
    LONG=1 python -m pytest .ci/endure.py           # about two hours: ten times the soak, and every family learns
"""
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data                                                                             # noqa: E402
import diffusion                                                                        # noqa: E402
import dit                                                                              # noqa: E402
import train                                                                            # noqa: E402
from test_all import EYE, HERE, SMALL, assert_same_run, every_network, fill, inputs     # noqa: E402
from test_all import log_of, nearest_shape, relative, sampled, shell, tiny              # noqa: E402
from test_all import pretrained, run, write_coco                                        # noqa: E402, F401 (fixtures)

LONG = bool(os.environ.get("LONG"))
PAIR = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
long = pytest.mark.skipif(not LONG, reason="minutes; set LONG=1")


def finished(*arguments, **options):
    """Run Python as `shell` does, to a success."""
    result = shell(*arguments, **options)
    assert result.returncode == 0, result.stderr
    return result


def begun(*arguments, stderr=subprocess.PIPE):
    """Start Python on one thread, in the repository's folder, in a process of its own that is not waited for."""
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=HERE, stdout=subprocess.DEVNULL, stderr=stderr,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)


def logged(out, key="loss"):
    return [line[key] for line in log_of(out)]


def steps_logged(out):
    """Whole lines in a run's log so far."""
    path = Path(out) / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(condition, runs, seconds=180):
    """Wait until a condition holds, while a process runs: runs() says whether it does."""
    deadline = time.time() + seconds
    while not condition():
        assert runs()
        assert time.time() < deadline
        time.sleep(0.001)


def below(pid):
    """Process ids of all that a process has started, and that they have started (Linux)."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [pid for child in children for pid in (child, *below(child))]


@pytest.fixture
def start(monkeypatch):
    """start(flags, out): a process that trains there, on one thread. It is forked from one that has imported torch."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])

    def start(flags, out):
        process = context.Process(target=train.main, args=([*flags, "--out", str(out)],))
        process.start()
        return process

    return start


def test_run_killed_twenty_times_ends_as_if_nothing_had_been(tmp_path, start):
    """kill -9 at 20 random moments, half of them in a checkpoint; the same command each time: bit for bit one run."""
    flags, random, out = [*SMALL, "--steps", "220"], np.random.default_rng(0), tmp_path / "killed"
    torn, whole = 0, start(flags, tmp_path / "whole")
    for kill in range(20):
        writing = kill % 2
        if writing:     # what is there is the half checkpoint of the kill before
            (out / "checkpoint.tmp").unlink(missing_ok=True)
        process = start(flags, out)
        reached = random.integers(10 * kill, 10 * kill + 10)
        wait_for(lambda: steps_logged(out) >= reached, process.is_alive)
        if writing:
            wait_for((out / "checkpoint.tmp").exists, process.is_alive)
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


@linux
def test_run_of_two_processes_survives_the_death_of_one(tmp_path, monkeypatch):
    """torchrun --max-restarts: rank 1, rank 0 and rank 1 again are killed, and the run ends as one left alone."""
    flags, out = ["train.py", *SMALL, "--steps", "90", "--out"], tmp_path / "killed"
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")       # else a restart may hang
    finished(*PAIR, *flags, tmp_path / "whole")
    process = begun(*PAIR, "--max-restarts=3", *flags, out)
    for rank, reached in ((b"RANK=1", 20), (b"RANK=0", 45), (b"RANK=1", 70)):
        wait_for(lambda: steps_logged(out) >= reached, lambda: process.poll() is None)
        victim, = (pid for pid in below(process.pid) if rank in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        os.kill(victim, signal.SIGKILL)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert_same_run(out, tmp_path / "whole", 90)


def contents(root):
    """The content of each file below a folder but the temporary ones, whose names are hidden."""
    files = [path for path in root.rglob("*") if path.is_file() and path.name[0] != "."]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@linux
def test_killed_encoding_continues_to_the_same_files(tmp_path, pretrained):             # noqa: F811
    """Two processes are killed (-9) in their midst, three continue: the files are those of one undisturbed process."""
    (flags, captions), whole, out = write_coco(tmp_path, 60), tmp_path / "whole", tmp_path / "out"
    flags = ["encode.py", *flags, *captions, *pretrained, "--batch-size", "2", "--out"]
    finished(*flags, whole)
    process = begun(*PAIR, *flags, out)
    wait_for(lambda: len(list(out.glob("moments/*.bin"))) >= 4, lambda: process.poll() is None)
    for pid in (process.pid, *below(process.pid)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert contents(out).items() < contents(whole).items()
    with pytest.raises(ValueError, match="is missing or damaged.; run the same command"):
        data.load(out)
    finished(*PAIR[:-1], "--nproc_per_node=3", *flags, out)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("number, processes", [(signal.SIGTERM, []), (signal.SIGHUP, PAIR)])
def test_stopped_sampling_leaves_no_file(run, tmp_path, number, processes):             # noqa: F811
    """A signal to sample.py, or to torchrun, removes all that was begun; until then no other writes that file."""
    flags = ["sample.py", "--ckpt", run / "checkpoint.pt", "--num-images", 100_000, "--device", "cpu", "--steps", 100,
             "--out", tmp_path / "x.npz"]
    process = begun(*processes, *flags)
    wait_for(lambda: list(tmp_path.glob("*.part")), lambda: process.poll() is None)
    assert f"sample.py: {tmp_path}/x.npz: process " in shell(*flags).stderr
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not list(tmp_path.iterdir())


def test_lock_dies_with_its_process(tmp_path):
    """A second process is told who holds a folder; a killed holder leaves it free, even while its workers live on."""
    def hold(ready):
        with data.lock(tmp_path):
            if os.fork() == 0:
                ready.set()
            time.sleep(3)
            os._exit(0)

    fork = multiprocessing.get_context("fork")
    holder = fork.Process(target=hold, args=(ready := fork.Event(),))
    holder.start()
    ready.wait()
    with pytest.raises(ValueError, match=rf"^{tmp_path}: process {holder.pid} on .* since .* writes there; wait until"):
        data.lock(tmp_path).__enter__()
    holder.kill()
    holder.join()
    with data.lock(tmp_path):
        assert os.listdir(tmp_path) == [".lock"]
    assert os.listdir(tmp_path) == []


def test_two_runs_at_once(run, tmp_path):                                               # noqa: F811
    """Of two commands with one --out, started together three times, one makes its images; the other says why not."""
    alone = {seed: sampled(run, tmp_path / f"{seed}.npz", "--num", 64, "--seed", seed)[0] for seed in (0, 1)}
    for attempt in range(3):
        flags = ["sample.py", "--ckpt", run / "checkpoint.pt", "--num", 64, "--steps", 4, "--device", "cpu",
                 "--out", tmp_path / f"x{attempt}.npz", "--seed"]
        commands = [begun(*flags, seed) for seed in (0, 1)]
        words = [command.communicate(timeout=120)[1] for command in commands]
        codes = [command.returncode for command in commands]
        assert sorted(codes) == [0, 1], words
        assert "writes there" in words[codes.index(1)] or "exists already" in words[codes.index(1)]
        assert (np.load(tmp_path / f"x{attempt}.npz")["arr_0"] == alone[codes.index(0)]).all()


def test_two_commands_do_not_share_a_folder(tmp_path):
    """A second torchrun into the same folder ends in one line, while the first goes on, until SIGTERM stops it."""
    flags = [*PAIR, "train.py", *SMALL, "--steps", "100000", "--save-every", "100000", "--out", tmp_path]
    first = begun(*flags)
    wait_for(lambda: steps_logged(tmp_path) > 0, lambda: first.poll() is None)
    second = shell(*flags)
    assert second.returncode == 1
    assert "writes there; wait until it ends" in second.stderr
    first.terminate()
    assert "stopped by SIGTERM after step" in first.communicate(timeout=60)[1]
    steps = train.read_checkpoint(tmp_path / "checkpoint.pt")["step"]
    assert logged(tmp_path, "step") == list(range(1, steps + 1))


def test_two_processes_train_as_one(tmp_path):
    """20 steps of two processes, in two or three passes each, have the losses of one process (1e-4), and its norms."""
    arguments = [*SMALL, "--steps", "20", "--out"]
    finished("train.py", *arguments, tmp_path / "1")
    for passes in (2, 3):
        finished(*PAIR, "train.py", "--accumulate", passes, *arguments, tmp_path / str(passes))
        for key, error in (("loss", 1e-4), ("grad_norm", 1e-3)):
            assert logged(tmp_path / str(passes), key) == pytest.approx(logged(tmp_path / "1", key), rel=error)


def test_two_processes_sample_as_one(run, tmp_path):                                    # noqa: F811
    """Under torchrun two processes make the images that one makes, to the last bit, even if it is a single one."""
    for name, number in (("x.npz", 25), ("x.png", 25), ("folder", 25), ("one.npz", 1)):
        flags = ["sample.py", "--ckpt", run / "checkpoint.pt", "--num-images", number, "--batch-size", 4, "--steps", 5,
                 "--device", "cpu", "--sampler", "ddpm", "--out"]
        finished(*flags, tmp_path / "1" / name)
        finished(*PAIR, *flags, tmp_path / "2" / name)
    assert len(contents(tmp_path / "1")) == 28
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def distances(folder, *flags, start=()):
    """fid.py's JSON line, from a process of its own or, with PAIR, from two: {name: number}, the distance first."""
    (folder / "eye.py").write_text(EYE)
    flags = [*flags, "--features", f"{folder / 'eye.py'}:eye", "--device", "cpu", "--json"]
    return json.loads(finished(*start, "fid.py", *flags).stdout.splitlines()[-1])


@pytest.mark.parametrize("samples", ["noisy.npz --batch-size 100", pytest.param(
    "--ckpt checkpoint.pt --num-images 20 --steps 2 --batch-size 6", marks=long)])
def test_two_processes_measure_as_one(run, tmp_path, samples):                          # noqa: F811
    """Under torchrun two processes find the numbers that one finds, whatever their shares, and save one reference."""
    images = data.shapes(length=60).images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "clean.npz", arr_0=images)
    np.savez(tmp_path / "noisy.npz", arr_0=images ^ 15)
    places = {"noisy.npz": tmp_path / "noisy.npz", "checkpoint.pt": run / "checkpoint.pt"}
    flags = [*(places.get(word, word) for word in samples.split()), "--ref", tmp_path / "clean.npz", "--save-ref"]
    one = distances(tmp_path, *flags, tmp_path / "1.npz")
    two = distances(tmp_path, *flags, tmp_path / "2.npz", start=PAIR)
    assert next(iter(two.values())) == pytest.approx(next(iter(one.values())), rel=1e-6)
    assert (two["precision"], two["recall"]) == (one["precision"], one["recall"])
    with np.load(tmp_path / "1.npz") as first, np.load(tmp_path / "2.npz") as second:
        assert np.allclose(first["sigma"], second["sigma"], rtol=1e-9, atol=1e-15)
        assert np.array_equal(first["pool3"], second["pool3"])


def test_compiled_is_as_written(tmp_path):
    """--compile, also under torchrun with accumulation, gives the losses without it (1e-4), and its images."""
    flags = [*SMALL, "--model-args", "depth=2"]
    for name, more in (("plain", []), ("one", ["--compile"]), ("two", ["--compile", "--accumulate", "2"])):
        finished(*(PAIR if name == "two" else []), "train.py", *flags, *more, "--out", tmp_path / name)
        assert logged(tmp_path / name) == pytest.approx(logged(tmp_path / "plain"), rel=1e-4)
    flags = ["sample.py", "--ckpt", tmp_path / "plain/checkpoint.pt", "--num-images", 7, "--batch-size", 4, "--cfg", 2,
             "--steps", 4, "--device", "cpu", "--out"]          # two batches, the second of them shorter
    finished(*flags, tmp_path / "a.npz")
    result = finished(*flags, tmp_path / "b.npz", "--compile", TORCH_LOGS="recompiles,graph_breaks")
    assert "Recompiling" not in result.stderr and "Graph break" not in result.stderr
    a, b = (np.load(tmp_path / name)["arr_0"].astype(int) for name in ("a.npz", "b.npz"))
    assert abs(a - b).max() <= 1
    assert (a == b).mean() > 0.99


@long
@every_network
@pytest.mark.filterwarnings("ignore")
def test_network_can_be_compiled_and_exported(family, variant):
    """torch.compile in one graph, torch.export with a dynamic batch and jit.trace give the network's outputs."""
    model, batch = tiny(family, variant)
    batch = [z for z in batch if z is not None]
    more = [torch.cat([z, z, z[:3]]) for z in batch]
    dynamic = ({0: torch.export.Dim("batch", max=64)},) * len(batch)
    for other in (torch.export.export(model, tuple(batch), dynamic_shapes=dynamic).module(),
                  torch.jit.trace(model, batch, check_trace=False),
                  torch.compile(model, fullgraph=True, backend="eager")):
        assert relative(other(*more), model(*more)) < 1e-5


def test_sit_is_dit_fed_with_its_time():
    """DiT-S/2 fed 1 - t, four of its eight channels guided on three: the released SiT-S/2, within 1e-5."""
    model = dit.MODELS["dit_s2"](image_size=32, in_channels=4, num_classes=1000).eval()
    model.load_state_dict(fill(model.state_dict(), keep=("pos_embed",)))
    x, time, y = inputs((2, 4, 32, 32), num_classes=1000, times=(0.15, 0.9), seed=23)
    flow = diffusion.Flow()
    with torch.no_grad():
        x0, noise, variance = diffusion.guide(model, flow, y[:1], 1000, 1.5, channels=3)(x[:1], 1 - time[0].item())
    released = torch.tensor([2.65172195, -0.713543773, -3.56388617, 2.12210441])        # of 3.94 at most
    assert variance is None
    assert (flow.velocity(x0, noise, 0.85)[0, :, 5, 7] - released).abs().max() < 3.94e-5


@pytest.mark.parametrize("flags", [
    "dit_tiny", "dit_tiny --schedule flow", "udit_tiny --model-args depths=1,1,1,1,1 width=16", "jit_tiny",
    "unet_tiny --schedule ddpm --model-args multipliers=1,1 attention=2 learn_sigma=yes"])
def test_every_family_trains_and_samples(tmp_path, flags):
    """A DiT, a SiT, a U-DiT, a JiT and a U-Net train on shapes, and their checkpoints sample with guidance."""
    common = f"--data shapes --batch-size 8 --steps 2 --sample-every 0 --device cpu --out {tmp_path}"
    train.main(f"--model {flags} {common}".split())
    images, labels = sampled(tmp_path, tmp_path / "x.npz", "--num", 10, "--cfg", 2)
    assert images.shape == (10, 16, 16, 3)
    assert labels.tolist() == list(range(10))


@pytest.mark.parametrize("flags", ["--model uvit_tiny", *(pytest.param(flags, marks=long) for flags in (
    "--model dit_tiny", "--model udit_tiny", "--model uvit_tiny --schedule flow", "--model jit_tiny",
    "--model dit_tiny --schedule flow"))])
def test_tiny_models_learn_shapes(tmp_path, capsys, flags):
    """By its recipe a tiny model learns ten classes: of 100 samples at least 80 show the one asked for, 60 cleanly.

    A sample is clean within 20 grey levels of a drawn shape. README promises the first command's first grid within two
    minutes and its end within ten, on two idle cores; twice that is allowed, and thrice for the others.
    """
    began, threads = time.time(), {"OMP_NUM_THREADS": str(os.cpu_count())}
    finished("train.py", *flags.split(), "--data", "shapes", "--out", tmp_path, timeout=3600, **threads)
    first = min((tmp_path / "samples").glob("*.png")).stat().st_mtime - began
    seconds = time.time() - began
    finished("sample.py", "--ckpt", tmp_path / "checkpoint.pt", "--num-images", 100, "--seed", 1,
             "--out", tmp_path / "x.npz", **threads)
    with np.load(tmp_path / "x.npz") as file:
        images, asked = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2), torch.from_numpy(file["arr_1"])
    label, distance = nearest_shape(images)
    right, clean = (label == asked).sum(), ((label == asked) & (distance < 20)).sum()
    with capsys.disabled():
        print(f"\n{flags}: first grid {first:.0f} s, end {seconds:.0f} s; of 100 {right} right, {clean} clean")
    assert right >= 80
    assert clean >= 60
    assert (first < 240 and seconds < 1200) if flags == "--model uvit_tiny" else seconds < 1800


@long
def test_distance_falls_as_training_goes_on(tmp_path):
    """Samples come closer to shapes from checkpoint to checkpoint: after 50, 200 and 800 steps of one run."""
    found = []
    for steps in (50, 200, 800):
        finished("train.py", *"--model uvit_tiny --data shapes --warmup 100 --sample-every 0 --steps".split(), steps,
                 "--out", tmp_path, timeout=1200)
        numbers = distances(tmp_path, "--ckpt", tmp_path / "checkpoint.pt", "--num-images", 200, "--ref", "shapes")
        found.append(next(iter(numbers.values())))
    assert found[0] > 1.2 * found[1] > 6 * found[2], found


def watched(progress, *arguments):
    """Run Python on one thread and look at it five times a second -> arrays (progress, MB, open files, CPU s, unit).

    unit is the CPU time of a fixed piece of work beside it, which tells how fast the machine was just then.
    """
    matrix = np.ones((256, 256))
    process = begun(*arguments, stderr=subprocess.DEVNULL)
    seen, proc = [], Path(f"/proc/{process.pid}")
    while process.poll() is None:
        with contextlib.suppress(OSError):      # it has just ended
            pages = int((proc / "statm").read_text().split()[1])
            ticks = sum(map(int, (proc / "stat").read_text().rsplit(")")[-1].split()[11:13]))
            began = time.thread_time()
            for _ in range(5):
                np.cumsum(np.sin(matrix))
            seen.append((progress(), pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir(proc / "fd")),
                         ticks / os.sysconf("SC_CLK_TCK"), time.thread_time() - began))
        time.sleep(0.2)
    assert process.returncode == 0
    return np.array(seen).T


@linux
def test_soak(tmp_path, capsys):
    """Over thousands of steps and images, memory and open files do not grow, and the end is as fast as the start.

    2,000 of each, or 20,000 with LONG=1. Speed is CPU time in units of a piece of work done beside it, since other
    programs slow both down; it may fall by 5 %, in the short run by 15 %.
    """
    number = 20_000 if LONG else 2000
    out, images, part = tmp_path / "run", tmp_path / "images", number // 1000
    training = watched(lambda: steps_logged(out) / 1000, "train.py", *SMALL[:7], "--steps", number, "--device", "cpu",
                       "--log-every", part, "--save-every", 50 * part, "--sample-every", 50 * part, "--out", out)
    sampling = watched(lambda: len(os.listdir(images)) / number if images.exists() else 0, "sample.py", "--ckpt",
                       out / "checkpoint.pt", "--num-images", number, "--steps", 20, "--sampler", "dpm_solver",
                       "--device", "cpu", "--out", images)
    progress, _, _, cpu, unit = training
    tenths = [(progress >= begin) & (progress < begin + 0.1) for begin in (0.02, 0.9)]      # the first steps warm up
    first, last = (np.ptp(cpu[tenth]) / np.ptp(progress[tenth]) for tenth in tenths)
    slower = last / first * np.mean(unit[tenths[0]]) / np.mean(unit[tenths[1]]) - 1
    lines = [f"last tenth against the first: {slower:+.1%} time"]
    for name, (progress, memory, files, *_) in (("steps", training), ("images", sampling)):
        middle, end = (progress >= 0.5) & (progress < 0.6), progress >= 0.9
        grown, opened = (np.median(x[end]) - np.median(x[middle]) for x in (memory, files))
        lines.append(f"{number} {name}: {np.median(memory[end]):.0f} MB, {grown:+.1f} MB since the middle; "
                     f"{np.median(files[end]):.0f} files open, {opened:+.0f}")
        assert grown < 0.01 * np.median(memory[middle]), lines
        assert opened <= 0, lines
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert slower < (0.05 if LONG else 0.15), lines
