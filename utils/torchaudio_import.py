"""torchaudio, even if its compiled extension doesn't fit the installed torch.

    from utils.torchaudio_import import torchaudio      # inside the function that needs it

The wheels on PyPI are built for CUDA: with a CPU-only torch, `import torchaudio` fails for lack of
a CUDA library, although its transforms are plain PyTorch. Only `forced_align`, which nothing here
uses, needs the extension.
"""

import importlib
import sys
import types

from utils.misc import UserError


def _import_torchaudio():
    try:
        return importlib.import_module("torchaudio")
    except ModuleNotFoundError as error:
        if error.name != "torchaudio":
            raise
        raise UserError("torchaudio is missing: pip install -r requirements.txt") from error
    except (OSError, ImportError, RuntimeError):  # no CUDA library, or one of another version
        return _import_without_extension()


def _import_without_extension():
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
        del sys.modules[name]  # what the first attempt left behind
    extension = types.ModuleType("torchaudio._extension")
    extension._IS_TORCHAUDIO_EXT_AVAILABLE = False
    extension._check_cuda_version = lambda: None
    extension.fail_if_no_align = _without_alignment
    sys.modules[extension.__name__] = extension
    return importlib.import_module("torchaudio")


def _without_alignment(function):
    def refuse(*_, **__):
        raise RuntimeError(f"{function.__name__} needs torchaudio's compiled extension")

    return refuse


torchaudio = _import_torchaudio()
