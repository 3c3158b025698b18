"""The model card of an exported model, from its checkpoint: card.md with its blanks filled in."""

import shlex
from pathlib import Path
from string import Template

from utils.files import write_lines
from utils.report.summary import probe_rows, validation_rows
from utils.report.values import best_epoch, without_accuracies
from utils.run.flags import CAPTURE_GROUP, LISTS, PATHS, PROBE_GROUP, build_parser, stored_arguments

TEMPLATE = Path(__file__).with_name("card.md")
ONNX = """
`model.onnx` needs neither PyTorch nor this folder's code:

```python
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
contexts, encoded = session.run(None, {"waveform": audio[None].astype("float32")})
```
"""
INSTANCE_NORM = """

Instance norm normalises over the whole recording, padding included: don't pad, and give it at least
320 samples."""


def write_card(path, checkpoint, config, options):
    """Write README.md for a Checkpoint; options: the arguments of eval/export.py."""
    flags = stored_arguments(checkpoint.state["args"], checkpoint.path)
    logs = logs_until(checkpoint.state["logs"], options.best)
    corpus = Path(flags.pathDB or "unknown").name
    facts = {
        "corpus": corpus,
        "epochs of training": logs["epoch"][-1] + 1 if logs.get("epoch") else "not recorded",
        "weights": "of the best epoch" if options.best else "of the last epoch",
        "encoder": f"5 convolutions, {config['conv_dim']} channels, {config['norm']}",
        "context network": f"{config['ar_mode']}, {config['hidden_size']} values",
    }
    if flags.supervised and flags.CTC:
        logs = without_accuracies(logs)
    name, how = method(flags)
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        config,
        title=f"{name} model of speech, trained on {corpus}",
        method=how,
        norm_note=INSTANCE_NORM if config["norm"] == "instanceNorm" else "",
        onnx=ONNX if options.onnx else "",
        training=table(facts.items()),
        flags="\n".join(changed_flags(flags)) or "(none)",
        results=results(logs),
    )
    write_lines(path, text.splitlines())


def method(flags):
    """The criterion that trained the model: its name, and the rest of a sentence about it."""
    if flags.supervised:
        return "Supervised", "learned from labels, by the network of contrastive predictive coding"
    if flags.CPCCTC:
        return "CPC-CTC", (
            "learned without labels by CPC-CTC, aligned contrastive predictive coding\n"
            "([Chorowski et al., 2021](https://arxiv.org/abs/2104.11946))"
        )
    return "CPC", (
        "learned without labels by contrastive predictive coding\n"
        "([van den Oord et al., 2018](https://arxiv.org/abs/1807.03748);\n"
        "[Rivière et al., 2020](https://arxiv.org/abs/2002.02848))"
    )


def logs_until(logs, best):
    """The logs of all epochs or, with `best`, of those up to the best one."""
    epoch = best_epoch(logs) if best and logs.get("epoch") else None
    if epoch is None:
        return logs
    n = logs["epoch"].index(epoch) + 1
    return {key: value[:n] if isinstance(value, list) else value for key, value in logs.items()}


def changed_flags(flags):
    """Yield flags of the training with another value than the default, one per line."""
    for name, default in vars(build_parser().parse_args([])).items():
        value = getattr(flags, name)
        if value == default or name in PATHS | PROBE_GROUP | CAPTURE_GROUP:
            continue
        values = value if name in LISTS else [value]
        yield f"--{name}" if value is True else shlex.join([f"--{name}", *map(str, values)])


def results(logs):
    """Validation and probes before and after training, as a table."""
    if not logs.get("epoch"):
        return "The checkpoint holds no figures."
    rows = validation_rows(logs) + probe_rows(logs, {})
    head = "| | before training | after |\n|---|---|---|\n"
    return head + table((name.strip(), *values) for name, *values in rows)


def table(rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
