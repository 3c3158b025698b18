"""How much of each layer's energy differs from frame to frame, over the first steps of training.

    python benchmarks/first_steps.py OUT.png [--steps 200] [--starts original,lecun] FLAGS

FLAGS are those of train.py: at least `--pathDB AUDIO`. From each initialisation, with the same seed
and batches, the network is trained for some steps, and evaluated now and then on a batch that it
isn't trained on. The encoder's layers (each after its norm and ReLU) are the first five curves; if
all frames look alike, negatives look like positives. Writes a picture with the training losses, and
prints the fractions.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils.run.before_torch  # noqa: F401

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from benchmarks.train_step import new_run
from eval.starts import varying_energy
from model import preserved_state
from train import build_forward_backward, train_step
from utils.misc import UserError, mean
from utils.report.plots import save_figure
from utils.run.command import CommandLine, at_least, command
from utils.run.distributed import World
from utils.run.stopping import StopSignals

LAYERS = (*(f"layer {i}" for i in range(5)), "context")


@command
def main(argv=None):
    args, flags = parse_arguments(argv)
    curves = {start: first_steps(start, flags, args.steps) for start in args.starts}
    for start, (shares, losses) in curves.items():
        print(f"{start}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        print(f"{'step':>10}" + "".join(f"{layer:>10}" for layer in LAYERS))
        for step, values in shares.items():
            print(f"{step:>10}" + "".join(f"{values[layer]:>10.3f}" for layer in LAYERS))
    draw(args.out, curves)


def parse_arguments(argv):
    parser = CommandLine(
        description=__doc__.split("\n")[0],
        usage="first_steps.py OUT.png [--steps N] [--starts NAME,NAME] [flags of train.py]",
    )
    parser.add_argument("out", metavar="OUT.png")
    parser.add_argument("--steps", type=at_least(1), default=200)
    parser.add_argument(
        "--starts", type=lambda text: text.split(","), default=["original", "lecun"]
    )
    return argparse.ArgumentParser.parse_known_args(parser, argv)


def first_steps(start, flags, n_steps):
    """({step: {layer: fraction}}, losses) of a run from an initialisation."""
    flags = [*flags, "--initialisation", start, "--pathCheckpoint", "first_steps", "--nGPU", "1"]
    state, train_loader, val_loader = new_run(flags, World(stop=StopSignals()))
    if state.args.encoder_type != "cpc":
        raise UserError(f"--encoder_type {state.args.encoder_type}: only cpc has such layers")
    _, looked_at = next(val_loader.epoch(0))
    looked_at = looked_at.to(state.device)
    forward_backward, shares, losses = build_forward_backward(state), {}, []
    batches = itertools.chain.from_iterable(map(train_loader.epoch, itertools.count()))
    for step, (position, batch) in enumerate(itertools.islice(batches, n_steps + 1)):
        if step in (0, n_steps) or str(step).strip("0") in ("1", "2", "5"):
            shares[step] = varying_by_layer(state.networks.model, looked_at.waveform)
        state.networks.train()
        train_step(state, forward_backward, position, batch.to(state.device))
        losses.append(mean(state.epoch_means.means_since_mark()[0]))
    return shares, losses


@torch.no_grad()
def varying_by_layer(model, waveform):
    """{layer: fraction of the energy that varies} on a batch of waveforms."""
    found, encoder = {}, model.gEncoder

    def look(layer):
        return lambda module, inputs, output: found.update(
            {layer: varying_energy(F.relu(output).flatten(0, 1))}
        )

    norms = [getattr(encoder, f"batchNorm{i}") for i in range(5)]
    handles = [n.register_forward_hook(look(name)) for n, name in zip(norms, LAYERS, strict=False)]
    with preserved_state(model):
        context, _ = model.eval()(waveform)
    for handle in handles:
        handle.remove()
    return found | {"context": varying_energy(context.flatten(0, 1))}


def draw(path, curves):
    """A panel for each start and one of the losses."""
    figure = Figure(figsize=(4 * (len(curves) + 1), 3.4), layout="constrained")
    *panels, last = figure.subplots(1, len(curves) + 1)
    for axes, (start, (shares, losses)) in zip(panels, curves.items(), strict=True):
        for i, layer in enumerate(LAYERS):
            color = f"{0.75 - 0.15 * i:.2f}" if layer != "context" else "C1"
            values = [of_layers[layer] for of_layers in shares.values()]
            axes.plot(list(shares), values, color=color, label=layer)
        axes.set(title=f"--initialisation {start}", ylim=(0, 1), xlabel="step")
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(0, max(shares))
        last.plot(losses, label=start)
    panels[0].set_ylabel("energy that varies from frame to frame")
    panels[-1].legend(fontsize="small")
    last.set(title="training loss", xlabel="step")
    last.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
