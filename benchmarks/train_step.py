"""Time and memory of a training step, part by part, and the least time that its arithmetic takes.

    python benchmarks/train_step.py [--configurations cpc,cpcctc] [--threads 2] [--json FILE]
    python benchmarks/train_step.py --configurations cpcctc-paper,no-ar --precision bf16 --compile

The steps are those of train.py, on noise from a small corpus in a temporary directory. Each
configuration runs in a new process; after a few steps to warm up, the figures are medians over
steps. The parts of a step add up to it (`heads and negatives`: predictions, drawing and scoring;
`optimiser`: with the gradient's norm; `rest`: seeding, running means and the like). With --compile
the model and the criterion, forward and backward, are one part, `passes`. `processors` is the time
that all threads together were busy, which other load disturbs less.

The floor is the time that the matrix products of a step take at the rate of one large product,
measured in the same process and precision; see `floating_point_operations`. (It doesn't include
segments.) It depends on the configuration and the machine, and on nothing in this program. A
recurrent network, whose steps wait for each other, can't come near it: so `AR alone` is the time of
its forward and backward pass, and `the rest / its floor` compares the other parts of the step with
the floor without it. Memory is that of the process (on a GPU: of the tensors there), at its peak
and how much of that the steps added. Rely on ratios: times depend on other load.
"""

import argparse
import contextlib
import functools
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import torch

import augmentation
from benchmarks.data import in_new_process, write_corpus
from criterion import soft_align
from dataset import build_sets, set_options
from model import CPCEncoder
from stats.stats_collector import StatsCollector
from train import build_forward_backward, build_networks, prepare_loaders, prepare_machine
from train import train_step as do_step
from transformers import SIZE_FEED_FORWARD
from utils.data import effects
from utils.data.batches import on_device
from utils.data.corpus import open_corpus, split_corpus
from utils.files import save_json
from utils.misc import SAMPLES_PER_FRAME
from utils.run.console import progress
from utils.run.distributed import World
from utils.run.flags import parse_arguments as parse_training_arguments
from utils.run.machine import autocast, device_from
from utils.run.resolve import resolve
from utils.run.state import RunState
from utils.run.stopping import StopSignals

EXAMPLE = (
    "--nPredicts 8 --CPCCTC --CPCCTCNumMatched 12 --CPCCTCSelfLoop --CPCCTCSkipBeg 1 "
    "--CPCCTCSkipEnd 2"
)
AUGMENTED = "--augment_past --augment_type pitch additive reverb"
CONFIGURATIONS = {  # the flags of train.py, beyond its defaults
    "cpc": "",
    "cpc-linear": "--rnnMode linear",
    "cpcctc": EXAMPLE,
    "cpcctc-linear": f"{EXAMPLE} --rnnMode linear",
    # Chorowski et al., "Aligned contrastive predictive coding" (2021)
    "cpcctc-paper": "--nPredicts 6 --CPCCTC --CPCCTCNumMatched 12 --nLevelsGRU 2 --dropout "
    "--limitNegsInBatch 8 --batchSizeGPU 32",
    # the same without a recurrent network, in batches that fill a GPU
    "no-ar": "--nPredicts 6 --CPCCTC --CPCCTCNumMatched 12 --arMode no_ar --dropout "
    "--limitNegsInBatch 8 --batchSizeGPU 256",
    # what `make demo` trains
    "demo": f"{EXAMPLE} --rnnMode linear --hiddenEncoder 64 --hiddenGar 96 --arMode GRU "
    "--sizeWindow 10240",
}
# Cuervo et al. (2021): cosine scores, and with them a level of segments
CONFIGURATIONS["acpc"] = f"{CONFIGURATIONS['cpcctc-paper']} --normalizeCPCScore"
CONFIGURATIONS["macpc"] = (
    f"{CONFIGURATIONS['acpc']} --multiLevel --nPredictsSegment 2 --CPCCTCNumMatchedSegment 4"
)
CONFIGURATIONS["hcpc"] = (  # Cuervo et al. (2022)
    f"{CONFIGURATIONS['cpcctc-paper']} --multiLevel --segmentationMode boundaryPredictor "
    "--nPredictsSegment 2 --adjacentNegatives --targetQuantizerSegment robustKmeans"
)
CONFIGURATIONS |= {  # contexts of augmented copies of all windows, or of half of them
    f"{name}-{suffix}": f"{CONFIGURATIONS[name]} {AUGMENTED} {share}".strip()
    for name in ("cpc", "cpcctc")
    for suffix, share in (("aug", ""), ("aug0.5", "--augment_prob 0.5"))
}
# configurations that are measured if they are asked for
ON_REQUEST = (
    "no-ar",
    "demo",
    "acpc",
    "macpc",
    "hcpc",
    *(name for name in CONFIGURATIONS if "-aug" in name),
)
PARTS = (
    "data",
    "augmentation",
    "passes",
    "encoder",
    "AR",
    "heads and negatives",
    "alignment",
    "segments",
    "backward",
    "optimiser",
    "rest",
)
ROWS = {  # key of a figure -> how the table calls it
    "step_ms": "step, ms",
    "processors_ms": "processors, ms",
    "floor_ms": "floor, ms",
    "ratio": "step / floor",
    "ar_alone_ms": "AR alone, ms",
    "ratio_of_rest": "the rest / its floor",
    "windows_per_s": "windows/s",
    "peak_mb": "peak memory, MB",
    "step_mb": "of which steps, MB",
}
N_FILES = 40  # of 12 s: several batches of 32 windows


def main(argv=None):
    args = parse_arguments(argv)
    results = {}
    with tempfile.TemporaryDirectory(prefix="cpc-benchmark-") as root:
        write_corpus(root, N_FILES)
        for name in progress(args.configurations, what="measuring", unit=" configurations"):
            results[name] = in_new_process(measure, name, root, args)
    print_table(results, args)
    if args.json:
        save_json(args.json, results)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--configurations",
        type=configuration_names,
        default=[name for name in CONFIGURATIONS if name not in ON_REQUEST],
        metavar="NAME,NAME",
        help=f"which of {', '.join(CONFIGURATIONS)} to measure (default: all but "
        f"{', '.join(ON_REQUEST)})",
    )
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each")
    parser.add_argument("--warm_up", type=int, default=5, help="steps before these")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="as of train.py")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(argv)


def configuration_names(text):
    names = text.split(",")
    for name in names:
        if name not in CONFIGURATIONS:
            raise argparse.ArgumentTypeError(f"{name}: there are {', '.join(CONFIGURATIONS)}")
    return names


def print_table(results, args):
    device = next(iter(results.values()))["device"]
    how = f"{args.precision}{', compiled' * args.compile}"
    print(f"torch {torch.__version__}, {args.threads} threads, {device}, {how}")
    print(f"{'':22}" + "".join(f"{name:>15}" for name in results))
    for key, title in ROWS.items():
        values = [result[key] for result in results.values()]
        print(f"{title:22}" + "".join(f"{v:15.2f}" if v < 10 else f"{v:15.0f}" for v in values))
    for part in PARTS:
        values = [result["parts"][part] for result in results.values()]
        if any(values):
            print(f"{'  ' + part + ', ms':22}" + "".join(f"{value:15.1f}" for value in values))
    for name, result in results.items():
        plain = results.get(name.split("-")[0])
        if "-aug" in name and plain:
            part = 100 * result["parts"]["augmentation"] / plain["step_ms"]
            times = result["step_ms"] / plain["step_ms"]
            print(f"{name}: {times:.2f} times the plain step, of which augmentation {part:.1f} %")


# ---------------------------------------------------------------- one configuration, in its process


def measure(name, root, options):
    """The figures of a configuration."""
    training = build_training(name, root, options, World(stop=StopSignals()))
    args, device = training.state.args, training.state.device
    watch = Stopwatch(device)
    ar_alone_ms = time_ar(training.state, watch)
    time_parts(training, watch)
    training.loader.dataset.only_pack()  # decoding isn't part of a step
    for room in range(args.room_scale_max + 1) if args.augment_type else ():
        effects.room_response(room, args.sizeWindow)  # as after the first hundred steps
    batches = all_batches(training)
    training.state.networks.train()
    level = memory(device)
    steps = [timed_step(training, batches, watch) for _ in range(options.warm_up + options.steps)]
    peak = memory(device, peak=True)
    parts, busy = zip(*steps[options.warm_up :], strict=True)
    step_ms = statistics.median(sum(times.values()) for times in parts)
    operations = floating_point_operations(args)
    rate = matrix_rate(device, args.precision)
    floors = {part: 1000 * number / rate for part, number in operations.items()}
    floor_ms = sum(floors.values())
    return {
        "step_ms": step_ms,
        "processors_ms": statistics.median(busy),
        "floor_ms": floor_ms,
        "ratio": step_ms / floor_ms,
        "ar_alone_ms": ar_alone_ms,
        "ratio_of_rest": (step_ms - ar_alone_ms) / (floor_ms - floors["AR"]),
        "windows_per_s": 1000 * args.batchSizeGPU / step_ms,
        "peak_mb": peak,
        "step_mb": peak - level,
        "parts": {part: statistics.median(times[part] for times in parts) for part in PARTS},
        "gflop": sum(operations.values()) / 1e9,
        "gflop_per_s": rate / 1e9,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


class Training:
    """A run that can do steps. state: RunState; loader: that of the training set."""

    def __init__(self, state, loader):
        self.state, self.loader = state, loader
        self.forward_backward = build_forward_backward(state)

    def step(self, position, batch):
        do_step(self.state, self.forward_backward, position, batch)


def build_training(name, root, options, world):
    """A new run with the flags of a configuration, and nothing printed."""
    flags = CONFIGURATIONS[name].split()
    flags += ["--pathDB", root, "--pathCheckpoint", os.path.join(root, "run")]
    flags += ["--device", options.device, "--threads", str(options.threads), "--random_seed", "0"]
    flags += ["--samplingType", "uniform"]  # every batch is full
    flags += ["--precision", options.precision] + ["--compile"] * options.compile
    state, train_loader, _ = new_run(flags, world)
    return Training(state, train_loader)


def new_run(flags, world):
    """(RunState, training loader, validation loader) of flags of train.py; prints nothing."""
    with contextlib.redirect_stdout(io.StringIO()):
        args, _ = resolve(*parse_training_arguments(flags))
        device, corpus = device_from(args.device), open_corpus(args)
        prepare_machine(args, world, device)
        sets = build_sets(corpus, split_corpus(args, corpus), **set_options(args))
        networks, _ = build_networks(args, corpus, None, None, StatsCollector())
        loaders = prepare_loaders(args, sets, world)
    return RunState(args, networks.to(device), *loaders, device), *loaders


def all_batches(training):
    """Batches without end, epoch after epoch."""
    epochs = map(training.loader.epoch, itertools.count())
    return on_device(itertools.chain.from_iterable(epochs), training.state.device)


def time_ar(state, watch, repeat=5):
    """Milliseconds of forward and backward pass of the context network alone, the median."""
    args, ar = state.args, frame_level(state.networks.model).gAR
    shape = args.batchSizeGPU, args.sizeWindow // SAMPLES_PER_FRAME, args.hiddenEncoder
    encoded = torch.randn(shape, device=state.device, requires_grad=True)
    times = []
    for _ in range(repeat):
        with watch.span("AR"), autocast(args, state.device):
            ar(encoded).sum().backward()
        times.append(watch.read()["AR"])
    state.optimizer.zero_grad()
    return statistics.median(times)


def frame_level(model):
    """The frame level of a model of two levels; a model of one level unchanged."""
    return getattr(model, "frameLevelModel", model)


def time_parts(training, watch):
    """Make the stopwatch time the functions that a step consists of."""
    state = training.state
    model, criterion = state.networks.model, state.networks.criterion
    if state.args.augment_type:
        watch.time("augmentation", training.loader.augmentation, "draw")
        watch.time("augmentation", augmentation, "augmented")
    if state.args.compile:  # nothing may come between what is compiled and recorded
        watch.time("passes", training, "forward_backward")
    else:
        watch.time("encoder", frame_level(model).gEncoder, "forward")
        watch.time("AR", frame_level(model).gAR, "forward")
        if state.args.multiLevel:
            watch.time("segments", model, "find_segments")
            watch.time("segments", criterion.segmentLevelCriterion, "forward")
            criterion = criterion.frameLevelCriterion
        watch.time("heads and negatives", criterion, "forward")
        watch.time("alignment", soft_align, "soft_align")
        watch.time("backward", torch.Tensor, "backward")
    watch.time("optimiser", torch.nn.utils, "get_total_norm")
    watch.time("optimiser", state.optimizer, "step")
    watch.time("optimiser", state.optimizer, "zero_grad")


def timed_step(training, batches, watch):
    """Milliseconds by part, and those of all processors together."""
    busy = time.process_time()
    with watch.span("rest"):
        with watch.span("data"):
            position, batch = next(batches)
        training.step(position, batch)
    return watch.read(), 1000 * (time.process_time() - busy)


class Stopwatch:
    """Adds up the time of named parts. A part that runs inside another is counted separately."""

    def __init__(self, device):
        self.on_cuda = device.type == "cuda"
        self.running, self.spans = [], []

    def time(self, part, owner, name):
        """From now on, time each call of the function `name` of `owner` as `part`."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args, **kwargs):
            with self.span(part):
                return function(*args, **kwargs)

        setattr(owner, name, timed)

    @contextlib.contextmanager
    def span(self, part):
        around = self.running[-1] if self.running else None
        self.running.append(part)
        start = self._now()
        yield
        self.spans.append((part, around, start, self._now()))
        self.running.pop()

    def _now(self):
        """Milliseconds, or on CUDA an event after all work queued so far."""
        if not self.on_cuda:
            return 1000 * time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self):
        """Milliseconds by part since the last reading; waits for the device."""
        if self.on_cuda:
            torch.cuda.synchronize()
        times = defaultdict(float)
        for part, around, start, end in self.spans:
            elapsed = start.elapsed_time(end) if self.on_cuda else end - start
            times[part] += elapsed
            if around:
                times[around] -= elapsed
        self.spans = []
        return times


def memory(device, peak=False):
    """MB in use now, or at the peak so far: on a CPU by this process, on CUDA by its tensors."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return used(device) / 2**20
    field = "VmHWM:" if peak else "VmRSS:"
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


def matrix_rate(device, precision, repeat=10):
    """Floating-point operations per second of a large matrix product, the best of several tries.

    The best, not the median, since the limit of the machine is wanted.
    """
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    watch, times = Stopwatch(device), []
    for _ in range(repeat):
        with watch.span("product"):
            matrix @ matrix
        times.append(watch.read()["product"])
    return 2 * size**3 / (min(times) / 1000)


def floating_point_operations(args):
    """Operations of the matrix products that a step needs by definition, for each of its parts.

    A product and a sum are two. Backward takes twice as many as forward, except for the waveform,
    which needs no gradient. A prediction is scored with its negatives and, in plain CPC, with its
    frame; in CPC-CTC, with every matched frame. Norms, activations and the like aren't counted.
    """
    dim, size_window, batch = args.hiddenEncoder, args.sizeWindow, args.batchSizeGPU
    n_frames, channels, convolutions = size_window, 1, []
    for stride, _ in CPCEncoder.STRIDES_AND_PADDINGS:
        n_frames //= stride
        convolutions.append(n_frames * 2 * stride * channels * dim)
        channels = dim
    assert n_frames == size_window // SAMPLES_PER_FRAME
    n_gates = {"LSTM": 4, "GRU": 3, "RNN": 1, "no_ar": 0}[args.arMode]
    widths = [dim] + [args.hiddenGar] * args.nLevelsGRU
    ar = n_frames * sum(n_gates * args.hiddenGar * (w + args.hiddenGar) for w in widths[:-1])
    n_future = args.CPCCTCNumMatched if args.CPCCTC else args.nPredicts
    n_anchors = n_frames - n_future
    head = n_anchors * args.hiddenGar * dim
    if args.rnnMode == "transformer":  # query, key, value, output; feed-forward; attention
        head = n_anchors * (4 * dim * dim + 2 * dim * SIZE_FEED_FORWARD + 3 * n_anchors * dim)
    n_predictions = args.nPredicts + args.CPCCTCSelfLoop
    n_candidates = args.negativeSamplingExt + (n_future if args.CPCCTC else 1)
    scores = n_anchors * n_predictions * n_candidates * dim
    encoded = batch * (1 + args.augment_prob * bool(args.augment_type))  # and those of the past
    return {
        "encoder": 2 * encoded * (3 * sum(convolutions) - convolutions[0]),
        "AR": 2 * batch * 3 * ar,
        "heads and negatives": 2 * batch * 3 * (args.nPredicts * head + scores),
    }


if __name__ == "__main__":
    main()
