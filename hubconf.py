"""Entry for torch.hub.

    model = torch.hub.load("path/to/this/directory", "CPC_audio", source="local")
    model = torch.hub.load(..., pretrained=True)                       # downloaded, once
    context, encoded = model(waveform)      # (B, 1, L) -> (B, L // 160, A), (B, L // 160, E)

torch.hub runs this file inside other programs, which may have modules called `utils`, `model` or
`transformers` of their own, and forgets its directory right after. So the modules of this program
are imported here as parts of a package with a name that nobody else uses, and an import in one of
them finds the others whenever it is executed.
"""

import builtins
import importlib
import os
import sys
import types
import zlib
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path

HOME = Path(__file__).resolve().parent
PACKAGE = f"cpc_audio_{zlib.crc32(os.fsencode(HOME)):08x}"  # another copy has another name
PRETRAINED = "https://dl.fbaipublicfiles.com/librilight/CPC_checkpoints/60k_epoch4-d0f474de.pt"

dependencies = ["numpy", "soundfile", "torch", "tqdm"]  # torch.hub looks whether they are there


def CPC_audio(pretrained=False, url=PRETRAINED, progress=True, **flags):
    """A CPC model: waveform (B, 1, L) at 16 kHz -> context (B, S, A) and encoded (B, S, E).

    pretrained: trained on 60,000 hours of Libri-Light (Kahn et al. 2020), from `url`, kept in
        torch.hub's directory; `progress` shows the download
    flags: without `pretrained`, architecture flags of train.py, such as `hiddenEncoder=512` or
        `arMode="GRU"`; others have their defaults

    Raises an exception with the reason if a flag isn't known or the download fails.
    """
    _install_package()
    misc = _own("utils.misc")
    if pretrained:
        if flags:
            raise misc.UserError(
                f"{', '.join(flags)}: the pretrained model has flags of its own; leave these out"
            )
        model, *_ = _own("feature_loader").load_model([_download(url, progress, misc.UserError)])
        return model
    arguments = _own("utils.run.flags")
    unknown = sorted(flags.keys() - _own("utils.run.checkpoint").MODEL_FLAGS)
    if unknown:
        raise misc.UserError(f"{', '.join(unknown)}: not a flag of the architecture")
    return _own("model").build_model(arguments.stored_arguments(flags, "CPC_audio"))


def _download(url, progress, error_type):
    """The local copy of a file, downloaded unless it is there. Returns its path."""
    import torch

    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=progress)
        except (OSError, ValueError) as error:
            raise error_type(f"{url}: can't be downloaded ({error})") from error
    return path


# --------------------------------------------------------------- a private place for our modules


def _own(name):
    """The module that this program calls `name`."""
    return importlib.import_module(f"{PACKAGE}.{name}")


def _is_own(name):
    top = HOME / name.partition(".")[0]
    return top.with_suffix(".py").is_file() or (top / "__init__.py").is_file()


def _import(name, globals=None, locals=None, fromlist=(), level=0):
    """What `import` does in our modules: names of this program mean its own modules."""
    if level == 0 and _is_own(name):
        module = builtins.__import__(f"{PACKAGE}.{name}", globals, locals, fromlist)
        return module if fromlist else _own(name.partition(".")[0])
    return builtins.__import__(name, globals, locals, fromlist, level)


class _Loader(SourceFileLoader):
    def exec_module(self, module):
        module.__builtins__ = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


class _Finder:
    """Loads the modules of `PACKAGE` by `_Loader`, and leaves all others to Python."""

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
