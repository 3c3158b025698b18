"""Entry point for torch.hub.

    model = torch.hub.load("path/to/this/directory", "CPC_audio", source="local")
    model = torch.hub.load(..., pretrained=True)                       # downloaded, once
    context, encoded = model(waveform)      # (B, 1, L) -> (B, L // 160, A), (B, L // 160, E)

torch.hub runs this file inside other programs, which may have their own modules called `utils`,
`model` or `transformers`, and removes its directory from the import path right afterwards. So the
modules of this program are imported as submodules of a uniquely named package, in which they find
each other at any time.
"""

import builtins
import importlib
import os
import sys
import types
import zlib
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path

import torch

HOME = Path(__file__).resolve().parent
PACKAGE = f"cpc_audio_{zlib.crc32(os.fsencode(HOME)):08x}"  # unique to this copy
PRETRAINED = "https://dl.fbaipublicfiles.com/librilight/CPC_checkpoints/60k_epoch4-d0f474de.pt"

dependencies = ["numpy", "soundfile", "torch", "tqdm"]  # torch.hub checks for these


def CPC_audio(
    pretrained: bool = False, url: str = PRETRAINED, progress: bool = True, **flags: object
) -> torch.nn.Module:
    """A CPC model: waveform (B, 1, L) at 16 kHz -> context (B, S, A) and encoded (B, S, E).

    pretrained: the model trained on 60,000 hours of Libri-Light (Kahn et al. 2020), downloaded
        from `url` into torch.hub's directory; `progress`: show the download
    flags: without `pretrained`, architecture flags of train.py, such as `hiddenEncoder=512` or
        `arMode="GRU"`; the others keep their defaults

    Raises an exception with the reason if a flag is unknown or the download fails.
    """
    _install_package()
    misc = _own("utils.misc")
    if pretrained:
        if flags:
            raise misc.UserError(
                f"{', '.join(flags)}: not with pretrained=True, whose model has its own flags"
            )
        model, *_ = _own("feature_loader").load_model([_download(url, progress, misc.UserError)])
        return model
    arguments = _own("utils.run.flags")
    unknown = sorted(flags.keys() - _own("utils.run.checkpoint").MODEL_FLAGS)
    if unknown:
        raise misc.UserError(f"{', '.join(unknown)}: not an architecture flag")
    return _own("model").build_model(
        arguments.stored_arguments({"initialisation": "lecun"} | flags, "CPC_audio")
    )


def _download(url, progress, error_type):
    """The path of the local copy of a file, downloaded if necessary."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=progress)
        except (OSError, ValueError) as error:
            raise error_type(f"{url}: can't be downloaded ({error})") from error
    return path


# ------------------------------------------------------------- a private package for our modules


def _own(name):
    """This program's own module `name`."""
    return importlib.import_module(f"{PACKAGE}.{name}")


def _is_own(name):
    top = HOME / name.partition(".")[0]
    return top.with_suffix(".py").is_file() or (top / "__init__.py").is_file()


def _import(name, globals=None, locals=None, fromlist=(), level=0):
    """`__import__` for our modules: names of this program's modules refer to its own."""
    if level == 0 and _is_own(name):
        module = builtins.__import__(f"{PACKAGE}.{name}", globals, locals, fromlist)
        return module if fromlist else _own(name.partition(".")[0])
    return builtins.__import__(name, globals, locals, fromlist, level)


class _Loader(SourceFileLoader):
    def exec_module(self, module):
        module.__builtins__ = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


class _Finder:
    """Loads the modules of `PACKAGE` with `_Loader`; all others are left to Python."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path) if name.startswith(PACKAGE + ".") else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def _install_package():
    if PACKAGE in sys.modules:
        return
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(HOME)]
    sys.modules[PACKAGE] = package
    sys.meta_path.insert(0, _Finder)
