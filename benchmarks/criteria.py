"""Time and memory of the inner loops of the criteria, compared with straightforward versions.

    python benchmarks/criteria.py [--batch 8] [--repeat 5] [--threads 2] [--json FILE]
    python benchmarks/criteria.py --device cuda [--batch 32] [--repeat 20]

scores: scores of predictions against their frame and the negatives, forward and backward; the plain
version gathers the negatives and multiplies them elementwise, once per prediction.
alignment: the sum over all alignments and the posterior; the plain version calls `F.ctc_loss` in an
autograd function. Sizes are the program's defaults (scores) and those of a typical CPC-CTC run
(alignment: 8 predictions and a self loop for 12 frames, skips of 1 and 2). With --device cuda, the
row "fused" compares the kernels of `criterion/fused_scores.py` (ours) with "scores" in PyTorch
alone (plain).

Results are checked first. Times are medians of alternating runs; memory is what one run in a new
process adds to the peak (Linux only), on a GPU what it adds to the memory of tensors. Rely on the
ratios, since times depend on other load.
"""

import argparse
import importlib.util
import math
import multiprocessing
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import torch
import torch.nn.functional as F

from criterion import sampling
from criterion.soft_align import FORBIDDEN, soft_align
from utils.files import save_json
from utils.run.machine import keep_freed_memory

N_FRAMES, DIM, N_PREDICTIONS, N_NEGATIVES = 128, 256, 12, 128
N_MATCHED, N_SYMBOLS, SKIPS = 12, 9, (1, 2)


def main(argv=None):
    args = parse_arguments(argv)
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    runs_on = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads"
    print(f"torch {torch.__version__}, {runs_on}, batch of {args.batch}")
    print(f"{'':10}{'ours':>12}{'':>10}{'plain':>12}{'':>10}{'time':>9}{'memory':>9}")
    names = [name for name in WAYS if name != "fused" or can_fuse(args.device)]
    results = {name: compare(name, args) for name in names}
    if args.json:
        save_json(args.json, {"torch": torch.__version__, **vars(args), "results": results})


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="windows of 128 frames")
    parser.add_argument("--repeat", type=int, default=5, help="timed runs of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    return args


def can_fuse(device):
    return device == "cuda" and importlib.util.find_spec("triton") is not None


def compare(name, args):
    """Time and memory of both versions; prints a row of the table."""
    inputs = inputs_on(args.device, name, args.batch)
    for ours, plain in zip(*(run(way, inputs) for way in WAYS[name]), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-6)
    milliseconds = time_in_turn([partial(run, way, inputs) for way in WAYS[name]], args.repeat)
    megabytes = [peak_memory(name, index, args) for index in range(2)]
    # A small batch may add no page of memory.
    faster, smaller = (plain / (ours or math.nan) for ours, plain in (milliseconds, megabytes))
    print(
        f"{name:10}"
        + "".join(
            f"{ms:9.1f} ms{mb:7.0f} MB" for ms, mb in zip(milliseconds, megabytes, strict=True)
        )
        + f"{faster:8.1f}x{smaller:8.1f}x",
        flush=True,
    )
    names = ("ours", "plain")
    return {
        "milliseconds": dict(zip(names, milliseconds, strict=True)),
        "megabytes": dict(zip(names, megabytes, strict=True)),
    }


def inputs_on(device, name, batch):
    return [
        values.detach().to(device).requires_grad_(values.requires_grad)
        for values in INPUTS[name](batch)
    ]


def run(way, inputs):
    """Loss and gradients; waits until the device has computed them."""
    loss = way(*inputs)
    leaves = [value for value in inputs if value.requires_grad]
    gradients = torch.autograd.grad(loss, leaves)
    if loss.is_cuda:
        torch.cuda.synchronize()
    return loss.detach(), *gradients


def time_in_turn(steps, repeat):
    """Median milliseconds of each step, run in alternation so that other load affects all."""
    times = [[] for _ in steps]
    for _ in range(repeat):
        for step, found in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            found.append(1000 * (time.perf_counter() - start))
    return [statistics.median(found) for found in times]


def peak_memory(name, index, args):
    """Megabytes that one run adds to the memory in use, on a CPU in a new process."""
    if args.device == "cuda":
        return _peak_memory_on_gpu(WAYS[name][index], inputs_on("cuda", name, args.batch))
    if not sys.platform.startswith("linux"):
        return math.nan
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory_here, (name, index, args.batch, args.threads))


def _peak_memory_on_gpu(way, inputs):
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(way, inputs)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _peak_memory_here(name, index, batch, threads):
    torch.set_num_threads(threads)
    run(WAYS[name][index], INPUTS[name](1))  # warm up: loads libraries
    inputs = INPUTS[name](batch)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is in use
    before = _peak_megabytes()
    run(WAYS[name][index], inputs)
    return _peak_megabytes() - before


def _peak_megabytes():
    status = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
    return int(kilobytes) / 1000


def score_inputs(batch):
    generator = torch.Generator().manual_seed(0)
    sizes = batch, N_FRAMES, N_FRAMES - N_PREDICTIONS
    pool = torch.randn(batch * N_FRAMES, DIM, generator=generator)
    predictions = torch.randn(batch * sizes[2], N_PREDICTIONS, DIM, generator=generator)
    positives = sampling.following_frames(*sizes, N_PREDICTIONS, "cpu")
    negatives = sampling.draw_negatives(*sizes, N_NEGATIVES, device="cpu", generator=generator)
    candidates = torch.cat([positives, negatives], dim=2).flatten(0, 1)
    return pool.requires_grad_(), predictions.requires_grad_(), candidates


def score_in_chunks(pool, predictions, candidates, fused=False):
    scores = sampling.score_candidates(pool, predictions, candidates, N_PREDICTIONS, fused=fused)
    positives = scores.positives.diagonal(dim1=1, dim2=2)
    return -F.logsigmoid(positives - scores.negatives).mean(0).sum()


def score_in_kernels(pool, predictions, candidates):
    return score_in_chunks(pool, predictions, candidates, fused=True)


def score_copies(pool, predictions, candidates):
    """One copy of the negatives per prediction, with its positive in front."""
    vectors = pool.index_select(0, candidates.flatten()).view(*candidates.shape, DIM)
    positives, negatives = vectors[:, :N_PREDICTIONS], vectors[:, N_PREDICTIONS:]
    target = torch.zeros(len(candidates), dtype=torch.long, device=pool.device)
    loss = 0
    for k in range(N_PREDICTIONS):
        copies = torch.cat([positives[:, k : k + 1], negatives], dim=1)
        scores = (predictions[:, k : k + 1] * copies).mean(dim=2)
        loss = loss + F.cross_entropy(scores, target)
    return loss


def alignment_inputs(batch):
    generator = torch.Generator().manual_seed(0)
    n_anchors = batch * (N_FRAMES - N_MATCHED)
    scores = torch.randn(n_anchors, N_MATCHED, N_SYMBOLS, generator=generator)
    return (F.logsigmoid(scores - 4).requires_grad_(),)


def align_by_recursion(log_probs):
    return soft_align(log_probs, *SKIPS)[0].mean()


def align_by_ctc_loss(log_probs):
    return _InnerCTC.apply(log_probs).mean()


class _InnerCTC(torch.autograd.Function):
    """CTC with a blank that is never used; its gradient, the posterior, is computed in forward."""

    @staticmethod
    def forward(ctx, log_probs):
        n_anchors = len(log_probs)
        with torch.enable_grad():
            leaf = log_probs.detach().requires_grad_()
            emissions = F.pad(F.pad(leaf, (0, 0, *SKIPS)), (1, 0), value=FORBIDDEN)
            cost = F.ctc_loss(
                emissions.log_softmax(dim=2).transpose(0, 1),
                torch.arange(1, N_SYMBOLS + 1, device=leaf.device).expand(n_anchors, -1),
                torch.full((n_anchors,), emissions.size(1)),
                torch.full((n_anchors,), N_SYMBOLS),
                reduction="none",
            ) - emissions.logsumexp(dim=2).sum(dim=1)
            (gradient,) = torch.autograd.grad(cost.sum(), leaf)
        gradient.argmin(dim=2)  # the alignment
        ctx.save_for_backward(gradient)
        return cost.detach()

    @staticmethod
    def backward(ctx, cost_gradient):
        (gradient,) = ctx.saved_tensors
        return cost_gradient[:, None, None] * gradient


INPUTS = {"scores": score_inputs, "alignment": alignment_inputs, "fused": score_inputs}
WAYS = {  # ours, plain
    "scores": (score_in_chunks, score_copies),
    "alignment": (align_by_recursion, align_by_ctc_loss),
    "fused": (score_in_kernels, score_in_chunks),
}

if __name__ == "__main__":
    main()
