"""A trained model as a folder for the Hugging Face hub, which needs nothing of this program.

    python eval/export.py RUN OUT --onnx

OUT then holds config.json, preprocessor_config.json, model.safetensors, the modelling code
(modeling_cpc.py, and cpc_layers.py in plain PyTorch) and a model card, README.md: read it and set
its licence. Hugging Face's library, started anywhere but in this project's folder, opens it:

    AutoModel.from_pretrained(OUT, trust_remote_code=True)

--onnx adds model.onnx, from waveforms of any length to contexts and encoded frames. Every export is
compared with the model it comes from. Needed: `pip install safetensors`, for --onnx also `pip
install onnx onnxruntime` (pinned in requirements-extras.txt); transformers only to open the folder.
"""

import copy
import importlib
import os
import shutil
import sys
import warnings
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import torch

from eval.export_model.card import write_card
from eval.export_model.cpc_layers import CPCNetwork
from feature_loader import load_model
from model import CPCAR, CPCEncoder, CPCModel, NoAR
from utils.files import atomic_path, save_json, writing_to
from utils.misc import SAMPLE_RATE, UserError
from utils.run.checkpoint import open_checkpoint
from utils.run.command import CommandLine, command
from utils.run.machine import set_threads

CODE = ("modeling_cpc.py", "cpc_layers.py")  # in eval/export_model/, copied as they are
SAME = 1e-8  # largest difference of the plain layers from the model, in double precision
CLOSE = 1e-4  # of ONNX from the plain layers: rounding, in single precision
LENGTHS = (2 * SAMPLE_RATE, 320, 5000, 40_159)  # samples: ONNX is traced with the first


@command
def main(argv=None):
    args = parse_arguments(argv)
    set_threads(torch.device("cpu"))
    safetensors = library("safetensors.torch")
    for name in ("onnx", "onnxruntime") if args.onnx else ():
        library(name)
    checkpoint = open_checkpoint(args.run)
    model, *_ = load_model(checkpoint, load_best=args.best)
    network, config = plain_network(model.eval(), checkpoint.path)
    with writing_to(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        write_weights(network, args.out / "model.safetensors", safetensors)
        for name in CODE:
            shutil.copyfile(Path(__file__).with_name("export_model") / name, args.out / name)
        if args.onnx:
            export_onnx(network, args.out / "model.onnx")
        write_card(args.out / "README.md", checkpoint, config, args)
        save_json(args.out / "preprocessor_config.json", PREPROCESSOR)
        save_json(args.out / "config.json", config)
    print(
        f"{args.out}: the model of {checkpoint.path}; read its README.md and set the licence there"
    )


def parse_arguments(argv):
    """The arguments, checked and completed. Raises UserError for those that can't work."""
    parser = CommandLine(prog="export.py", description=__doc__)
    add = parser.add_argument
    add("run", help="checkpoint, or a run's directory for the newest in it")
    add("out", type=Path, help="folder to write, new or empty")
    add("--best", action="store_true", help="the weights of the best epoch instead of the last")
    add("--onnx", action="store_true", help="write model.onnx, too")
    args = parser.parse_args(argv)
    if args.out.is_dir() and any(args.out.iterdir()):
        raise UserError(f"{args.out}: isn't empty: name another folder")
    return args


def library(name):
    """An optional library. Raises UserError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f"{package} isn't installed: python -m pip install {package}") from error


# ------------------------------------------------------------------------------------- the model

PREPROCESSOR = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "sampling_rate": SAMPLE_RATE,
    "do_normalize": False,
}


@torch.no_grad()
def plain_network(model, source):
    """The model as a CPCNetwork in eval mode, and the content of its config.json.

    Raises UserError, naming `source`, if it can't be one.
    """
    if reason := not_covered(model):
        raise UserError(f"{source}: can't be exported: {reason}")
    flags = model.arguments[0]
    shape = {
        "norm": flags.normMode,
        "linear_output": flags.linearOutput,
        "ar_mode": flags.arMode,
        "num_ar_layers": flags.nLevelsGRU,
    }
    network = CPCNetwork(model.dim_encoded, model.dim_context, **shape).eval()
    network.load_state_dict(model.state_dict())
    exact, exact_network = copy.deepcopy(model).double(), copy.deepcopy(network).double()
    for waveform in (noise(size).double() for size in LENGTHS):
        expected = exact(waveform[None], torch.tensor([False]))  # from the zero state
        compare(exact_network(waveform), expected, SAME, f"{source}: the plain layers")
    return network, {
        "architectures": ["CPCModel"],
        "auto_map": {
            "AutoConfig": "modeling_cpc.CPCConfig",
            "AutoModel": "modeling_cpc.CPCModel",
        },
        "model_type": "cpc",
        "dtype": "float32",
        "conv_dim": model.dim_encoded,
        "hidden_size": model.dim_context,
        "sampling_rate": SAMPLE_RATE,
        **shape,
    }


def not_covered(model):
    """Why a model can't be exported; "" if it can."""
    if type(model) is not CPCModel:
        return f"a {type(model).__name__}; only single CPC models with one level are covered"
    encoder, context_network = type(model.gEncoder), type(model.gAR)
    if encoder is not CPCEncoder:
        return f"--encoder_type {model.arguments[0].encoder_type}; only cpc is covered"
    if context_network not in (CPCAR, NoAR):
        return f"--arMode {model.arguments[0].arMode}; LSTM, GRU, RNN and no_ar are covered"
    if getattr(model.gAR, "reverse", False):
        return "--cpc_mode reverse; its contexts run backwards"
    return ""


def noise(size):
    """A waveform (1, size), as loud as speech."""
    return 0.1 * torch.randn(1, size, generator=torch.Generator().manual_seed(size))


def compare(outputs, expected, limit, what):
    """The largest difference of contexts and encoded frames. Raises UserError if above `limit`."""
    pairs = zip(outputs, expected, strict=True)
    largest = torch.stack([(output - wanted).abs().max() for output, wanted in pairs]).max().item()
    if not largest <= limit:
        raise UserError(f"{what} differ from the model by {largest:.1g}: not exported")
    return largest


def write_weights(network, path, safetensors):
    """Write the weights under the names that modeling_cpc.py gives them."""
    weights = {f"cpc.{key}": value.contiguous() for key, value in network.state_dict().items()}
    with atomic_path(path) as temporary:
        Path(temporary).write_bytes(safetensors.save(weights, metadata={"format": "pt"}))


@torch.no_grad()
def export_onnx(network, path):
    """Write and check an ONNX file: waveform (batch, samples) -> contexts, encoded.

    The older of PyTorch's two exporters: it keeps an LSTM in one operator and needs fewer packages.
    """
    axes = {"contexts": {0: "batch", 1: "frames"}, "encoded": {0: "batch", 1: "frames"}}
    with atomic_path(path) as temporary:
        with warnings.catch_warnings():  # that it is the older; and of batches, which are checked
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network,
                (noise(LENGTHS[0]),),
                temporary,
                dynamo=False,
                input_names=["waveform"],
                output_names=list(axes),
                dynamic_axes={"waveform": {0: "batch", 1: "samples"}, **axes},
            )
        session = library("onnxruntime").InferenceSession(temporary)
        differences = []
        for size in LENGTHS[1:]:
            waveform = noise(3 * size).view(3, size)
            outputs = map(torch.from_numpy, session.run(None, {"waveform": waveform.numpy()}))
            differences.append(compare(outputs, network(waveform), CLOSE, f"{path}: its outputs"))
    print(f"{path}: in onnxruntime, contexts and frames differ by {max(differences):.1g} at most")


if __name__ == "__main__":
    main()
