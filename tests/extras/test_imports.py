"""Optional libraries are imported where they are needed, and nowhere else."""

import sysconfig
from pathlib import Path

import pytest
import torch

from tests.common import ROOT

EXTRAS = Path(sysconfig.get_path("purelib"))
IMPORTED = """
import sys
sys.path.insert(0, {root!r})
import train
print(*(str(getattr(module, "__file__", "")) for module in list(sys.modules.values())), sep="\\n")
"""


@pytest.mark.skipif(
    EXTRAS in Path(torch.__file__).parents, reason="optional libraries have no folder of their own"
)
def test_training_imports_no_optional_library(run_outside):
    files = run_outside("-c", IMPORTED.format(root=str(ROOT))).splitlines()
    assert str(ROOT / "train.py") in files
    assert [file for file in files if file.startswith(str(EXTRAS))] == []
