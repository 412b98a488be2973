"""What every command does besides its task: numbers, locks, checkpoints, logs, and errors of one line.

    here = Processes("cuda")                            # rank, world size and device, under torchrun or alone
    with lock(out): ..                                  # no second command writes there meanwhile
    state = read_checkpoint("runs/x/checkpoint.pt")     # checksums verified, no code in it executed
    log = Log(out, config, here, step, skipped)         # a progress bar, log.jsonl, TensorBoard; log.png and index.html
    command("train.py", main, "interrupted")            # what a user can mend ends with one line, not a stack trace

Nothing here knows about networks or diffusion.
"""
import contextlib
import errno
import fcntl
import html
import json
import math
import os
import resource
import signal
import socket
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
from data import one_line, say

# ---------------------------------------------------------------------------------------------------------------------
# Numbers, locks and errors

BOUNDS = [      # of the numbers on the command lines: smallest, largest, in words, flags
    (1, math.inf, "at least 1", "steps sample_steps accumulate log_every save_every num_images cfg_channels k repeats"),
    (1, 2**20, "1 to 1048576", "batch_size"),
    (1, 2**14, "1 to 16384", "image_size size"),
    (0, math.inf, "at least 0",
     "lr min_lr warmup weight_decay clip_grad sample_every grad_checkpoint mixup cutmix labels_per_class"),
    (0, 10, "0 to 10", "rand_augment"),
    (0, 1, "0 to 1", "erasing smoothing"),
    (math.nextafter(0, 1), 1, "more than 0, at most 1", "crop layer_decay"),
    (0, math.nextafter(1, 0), "at least 0 and less than 1", "drop_path"),
    (0, 1024, "0 to 1024", "workers"),
    (0, 1, "0 to 1", "label_dropout cfg_interval time"),
    (0, math.nextafter(1, 0), "at least 0 and less than 1", "ema betas"),
    (math.nextafter(0, 1), math.inf, "more than 0", "scale noise_scale"),
    (0, 2**63 - 1, "0 to 2**63 - 1", "seed"),
]


def check(values):
    """Raise ValueError where a number of {flag: value} is not finite or out of BOUNDS. Every command calls this.

    Each number of a list is checked. None and text pass: what a text means is for its reader to check.
    """
    bounds = {flag: row for *row, flags in BOUNDS for flag in flags.split()}
    for flag, value in values.items():
        low, high, words = bounds.get(flag, (-math.inf, math.inf, "finite"))
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and not (low <= number <= high and abs(number) < math.inf):
                raise ValueError(f"--{flag.replace('_', '-')} {number}: must be "
                                 f"{words if abs(number) < math.inf else 'finite'}")


@contextlib.contextmanager
def lock(path):
    """Hold `path`, a folder or a file that this process (rank 0 of a command) writes, until the block ends.

    The lock is the kernel's (flock), on a hidden file: .lock in a folder, .<name>.lock beside a file. It ends with the
    process, however that dies. Raises ValueError, which names the holder, where another process has it. A network file
    system may hold such a lock for one machine only. One without locks gets a warning.
    """
    path = Path(path)
    name = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    with writing(path):
        name.parent.mkdir(parents=True, exist_ok=True)
        file = open(name, "a+")
    os.register_at_fork(after_in_child=file.close)      # a worker that outlives this process must not hold the lock
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(name)):
                raise BlockingIOError       # since we opened it, its holder removed it, and another made a new one
        except (BlockingIOError, FileNotFoundError):
            file.seek(0)
            raise ValueError(f"{path}: {one_line(file.read(), 400) or 'another process'} writes there; wait until it "
                             "ends, stop it, or give another --out") from None
        except OSError as error:
            say(f"{path}: this file system has no locks ({error}); start no second command there")
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()} ({' '.join(sys.argv)[:200]}, since {time.ctime()})",
              file=file, flush=True)
        try:
            yield
        finally:
            name.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path):
    """Turn an error of the block, a full disk or a read-only folder, into one line that says what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError):     # torch's own, raised while it handled the system's
            error = error.__context__ or error
        room = "" if getattr(error, "errno", 0) in (errno.EACCES, errno.EPERM, errno.EROFS) else "make room or "
        raise OSError(f"{path}: could not be written ({error}); {room}give another --out") from None


def command(script, main, interrupted):
    """Run a script's main(). What a user can mend ends it with one line, "script: what is wrong", not a stack trace.

    interrupted   what to say after ctrl-C, SIGTERM or SIGHUP (a closed terminal)
    A reader that has read enough (`| head -1`) ends it quietly.
    """
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]     # as nohup does
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # else Python complains as it ends
        sys.exit(1)
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(f"{script}: {one_line(error, None) or 'out of memory'}")
    except RuntimeError as error:
        if "by peer" not in str(error):     # gloo: connection closed, or reset, by peer
            raise
        sys.exit(f"{script}: process {os.environ.get('RANK')} ends, since another has ended")
    except KeyboardInterrupt:
        sys.exit(f"{script}: {interrupted}")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


class Processes:
    """Where this process stands: rank and world size (0 of 1 without torchrun), its device, and the last signal."""

    def __init__(self, device):
        self.distributed = "RANK" in os.environ
        if self.distributed and not {"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise ValueError("RANK is set without WORLD_SIZE, MASTER_ADDR, MASTER_PORT: use torchrun, or unset RANK")
        self.rank, self.world = (int(os.environ[v]) for v in ("RANK", "WORLD_SIZE")) if self.distributed else (0, 1)
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cpu")
        if device == "cuda":
            if self.local >= torch.cuda.device_count():
                raise ValueError(f"process {self.local} of this machine has no GPU: {torch.cuda.device_count()} found; "
                                 "start fewer processes, or use --device cpu")
            self.device = torch.device("cuda", self.local)
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")      # TF32 where float32 remains
        if self.distributed:        # two hours: the others wait while one lists or downloads the data
            gpu = dict(backend="cpu:gloo,cuda:nccl", device_id=self.device) if device == "cuda" else {}
            dist.init_process_group(**{"backend": "gloo", **gpu}, timeout=timedelta(hours=2))
        self.signal = 0

    @contextlib.contextmanager
    def catching_signals(self):
        """SIGTERM, SIGHUP and ctrl-C only set a flag, so that a step can end; ctrl-C twice still ends at once."""
        def remember(number, frame):
            if self.signal == number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = number
        found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
        try:
            for number, handler in found.items():
                if handler != signal.SIG_IGN:       # nohup ignores SIGHUP
                    signal.signal(number, remember)
            yield
        finally:
            for number, handler in found.items():
                signal.signal(number, handler)

    def highest(self, number=0):
        """The highest of all processes' numbers, the same on each. All wait here for the last (but not for a GPU)."""
        highest = torch.tensor(number)          # on the CPU, over gloo
        if self.distributed:
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    def ask(self):
        """Ask all processes for their signals -> a function that returns the highest, the same on each.

        The answer travels while a step runs. So a signal that comes in a step stops several processes after the next.
        """
        if not self.distributed:
            return lambda: self.signal
        highest = torch.tensor(self.signal)     # on the CPU, over gloo
        work = dist.all_reduce(highest, dist.ReduceOp.MAX, async_op=True)
        return lambda: work.wait() and int(highest)

    @contextlib.contextmanager
    def first(self):
        """Let one process of each machine through ahead of the others, to download what all need."""
        if self.local:
            self.highest()
        yield
        if not self.local:
            self.highest()

    def close(self):
        self.highest()      # nobody leaves while another still writes: torchrun would end it
        if self.distributed:
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def write_checkpoint(state, path):
    """Write to a temporary file, then rename: at every moment a whole checkpoint.pt or previous.pt exists."""
    temporary = path.with_suffix(".tmp")
    try:
        with writing(path), open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{error}{'; the checkpoint before it is whole' if path.exists() else ''}") from None
    if path.exists():
        os.replace(path, path.with_name("previous.pt"))
    os.replace(temporary, path)


class Damaged(ValueError):
    """A checkpoint that is torn or altered."""


def read_checkpoint(path):
    """A checkpoint of train.py, after its checksums were verified. Its tensors are the file's pages, on the CPU.

    Raises FileNotFoundError, Damaged where it is torn or altered, ValueError where it is not a checkpoint of train.py.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (MemoryError, OSError):      # the machine's fault, not the file's
        raise
    except Exception as error:      # whatever zipfile, pickle and torch make of arbitrary bytes
        raise Damaged(f"{path}: damaged, or not a checkpoint ({one_line(error) or repr(error)})") from None
    parts = state if isinstance(state, dict) else {}
    for part, keys in [(parts, "model ema step config model_args shape class_names encoding null"),
                       (parts.get("config"), "model data schedule sampler sample_steps cfg clip_x0"),
                       (parts.get("model_args"), "image_size in_channels")]:
        if not isinstance(part, dict) or not set(keys.split()) <= part.keys():
            raise ValueError(f"{path}: not a checkpoint of train.py, or of another version of it; give a file of "
                             "weights alone to sample.py --weights")
    return state


def resume(out, config, arguments, identity, older, lead):
    """The state to continue from, or None in a new folder. A damaged checkpoint is named, put aside, and not used.

    older are values of flags that a checkpoint of an earlier version lacks.
    What changed since, in the configuration and the data (see Images.identity), is printed. Raises ValueError where the
    folder holds a run of another model, schedule or classes, or damaged checkpoints alone.
    """
    damaged = list(out.glob("*.damaged"))
    for path in (out / "checkpoint.pt", out / "previous.pt"):
        try:
            state = read_checkpoint(path)
            break
        except FileNotFoundError:
            pass
        except Damaged as error:
            damaged.append(path.with_suffix(".damaged"))
            if lead:
                print(f"{error}; kept as {damaged[-1].name}, trying the one before it", file=sys.stderr)
                os.replace(path, damaged[-1])
    else:
        if damaged:
            raise ValueError(f"{out}: no checkpoint can be read; remove it to start anew, or give another --out")
        return None
    before = {**older, **state["config"], **state["model_args"], "class_names": state["class_names"]}
    now = {**vars(config), **arguments, "class_names": identity["class_names"]}
    for key in ("model", "schedule", "predict", "noise_scale", "class_names", "layer_decay", "layer_groups", "freeze",
                *state["model_args"], *arguments):
        if before.get(key) != now.get(key):
            raise ValueError(f"{path} is of another run: its {key} is {before.get(key)}, here {now.get(key)}; "
                             f"give another --out, or remove {out}")
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in vars(config) if now[key] != before.get(key)]
    if (old := state.get("identity", identity)) != identity:
        changed.append(f"the data: {old['count']} images -> {identity['count']}, not all the same")
    if changed and lead:
        print(f"changed since step {state['step']}: {', '.join(changed)}")
    return state


# ---------------------------------------------------------------------------------------------------------------------
# The log and its picture


class Log:
    """What a run reports: a progress bar, lines of JSON in log.jsonl, and TensorBoard's file if that is installed.

    Losses of good steps, and how many were bad, stay on the device between reports, since reading waits for it.
    """

    def __init__(self, out, config, here, step, skipped):
        self.path, self.config, self.here, self.step, self.skipped = out / "log.jsonl", config, here, step, skipped
        self.loss, self.bad, self.bad_in_a_row = torch.zeros(3, device=here.device)
        self.bar = tqdm(total=config.steps, initial=step, unit="step", disable=here.rank > 0,
                        mininterval=1 if sys.stderr.isatty() else 30)
        self.clock, self.board = time.perf_counter(), None
        if here.rank > 0:
            return
        if self.path.exists() and not step:
            os.replace(self.path, out / "log.old.jsonl")
        elif self.path.exists():        # reports of steps that will be taken again go, and lines that are none
            lines = self.path.read_text(errors="replace").splitlines()
            (out / "log.tmp").write_text("".join(line + "\n" for line in lines if 0 < step_of(line) <= step))
            os.replace(out / "log.tmp", self.path)
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(out, purge_step=step + 1)

    def add(self, loss, bad):
        """Count one more step: its loss, and 1 where it was bad."""
        self.loss = self.loss + torch.where(bad > 0, 0, loss)
        self.bad, self.bad_in_a_row = self.bad + bad, (self.bad_in_a_row + bad) * bad
        self.bar.update()

    def report(self, step, lr, grad_norm):
        """Report the mean loss of the good steps since the last report. Raises ValueError after ten bad ones."""
        if self.here.distributed:
            dist.all_reduce(self.loss)
        steps, bad, device = step - self.step, int(self.bad), self.here.device
        loss = self.loss.item() / self.here.world / (steps - bad) if steps > bad else math.nan
        rate = self.config.batch_size * steps / (time.perf_counter() - self.clock)
        self.step, self.skipped = step, self.skipped + bad
        values = dict(loss=loss, lr=lr, grad_norm=grad_norm.item(), images_per_sec=rate, memory_gb=memory_gb(device),
                      skipped=self.skipped)
        self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
        if self.here.rank == 0:
            self.write(step, values)
        if self.bad_in_a_row >= 10:
            folder = self.path.parent
            kept = f"; {folder} holds the checkpoint before" if (folder / "checkpoint.pt").exists() else ""
            raise ValueError(f"step {step}: the gradient was not finite ten times in a row (learning rate {lr:.1e}); "
                             f"try a lower --lr, --clip-grad 1, or --amp off{kept}")
        self.loss, self.bad = torch.zeros(2, device=self.here.device)

    def write(self, step, values):
        """A line of log.jsonl for {name: number}, and the same in TensorBoard's file."""
        finite = {name: x if math.isfinite(x) else None for name, x in values.items()}      # JSON has no NaN
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()

    def show(self, step, images, rows, values):
        """A picture of uint8 images in rows (see `data.save_grid`), samples/<step>.png, and a line for its values."""
        path = self.path.parent / "samples" / f"{step:07d}.png"
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            data.save_grid(images, path, rows)
        if values:
            self.write(step, values)
            self.bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))


def step_of(line):
    """The step that a line of log.jsonl reports; 0 where it is no report: torn by a crash, or edited."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return 0


def memory_gb(device):
    """Most memory used so far, in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def draw_log(log, path):
    """A picture of log.jsonl: each number over the steps, those of losses and norms on a log scale."""
    curves = {}
    for row in map(json.loads, filter(step_of, log.read_text().splitlines())):
        for name, value in row.items():
            if name not in ("step", "memory_gb", "skipped") and isinstance(value, (int, float)):
                curves.setdefault(name, []).append((row["step"], value))
    width, height, last = 350, 150, row["step"]
    picture = Image.new("RGB", (2 * width + 140, (height + 60) * math.ceil(len(curves) / 2)), "white")
    pen = ImageDraw.Draw(picture)
    for i, (name, points) in enumerate(curves.items()):
        left, bottom = 55 + i % 2 * (width + 70), height + 30 + i // 2 * (height + 60)
        low, high = min(value for _, value in points), max(value for _, value in points)
        logarithmic = low > 0 and name.endswith(("loss", "norm"))
        low, scale = (low, math.log) if logarithmic else (min(low, 0), float)
        span = scale(high) - scale(low) or 1

        def place(step, value):
            return left + step / last * width, bottom - (scale(value) - scale(low)) / span * height

        marks = [k * 10.0**e for e in range(-40, 40) for k in ((1, 2, 5) if span < 6 else (1,))]
        marks = [mark for mark in marks if low <= mark <= high] if logarithmic else []
        for mark in marks[::len(marks) // 10 + 1] if len(marks) > 1 else round_numbers(low, high):
            y = place(0, mark)[1]
            pen.line([(left, y), (left + width, y)], "lightgray")
            pen.text((left - 5, y), f"{mark:g}", "black", anchor="rm", font_size=11)
        for mark in round_numbers(0, last):
            pen.text((place(mark, high)[0], bottom + 5), f"{mark:g}", "black", anchor="mt", font_size=11)
        title = f"{name} {points[-1][1]:.4g} at step {points[-1][0]}{', on a log scale' * logarithmic}"
        pen.text((left, bottom - height - 8), title, "black", anchor="lb", font_size=13)
        pen.line([(left, bottom - height), (left, bottom), (left + width, bottom)], "black")
        pen.line([place(*point) for point in points], "royalblue", 2)
    with writing(path):
        picture.save(path.with_suffix(".tmp"), "PNG")
        os.replace(path.with_suffix(".tmp"), path)


PAGE = """<!doctype html><meta charset="utf-8"><title>{name}</title><style>body {{font: 14px sans-serif; margin: 2em}}
figure {{display: inline-block; margin: 0 1em 1em 0}} td {{padding-right: 2em}}
figure img {{height: 240px; image-rendering: pixelated}}</style>
<h1>{name}</h1><img src="log.png" alt="loss, learning rate and speed over the steps"><h2>Grids, the newest first</h2>
{figures}<h2>Configuration</h2><table>{rows}</table>
"""


def draw_page(out):
    """index.html of a run's folder: its curves, its grids and its configuration, for any browser, without a server."""
    figures = [f'<figure><a href="samples/{grid.name}"><img src="samples/{grid.name}" alt="grid"></a>'
               f'<figcaption>step {int(grid.stem)}</figcaption></figure>'
               for grid in sorted(out.glob("samples/*.png"), reverse=True) if grid.stem.isdecimal()]    # else: a user's
    config = json.loads((out / "config.json").read_text())
    rows = [f"<tr><td>{key}</td><td>{html.escape(str(value))}</td></tr>" for key, value in config.items()]
    with writing(out / "index.html"):
        (out / "index.html").write_text(PAGE.format(name=html.escape(str(out)), figures="".join(figures),
                                                    rows="".join(rows)))


def round_numbers(low, high):
    """Up to five round numbers from low to high, at equal distances: 0, 2000, 4000 for 0 and 5000."""
    step = next(k * 10.0**e for e in range(-40, 40) for k in (1, 2, 5) if high - low < 5 * k * 10.0**e)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
