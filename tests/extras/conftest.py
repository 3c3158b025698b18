"""Tests of optional libraries (requirements-extras.txt), each skipped where its library is absent.

`make test-extras` runs them in an environment that has all of them.
"""

import os
import subprocess
import sys

import pytest

OFFLINE = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
CACHES = "HF_HOME", "TORCH_HOME", "XDG_CACHE_HOME"


@pytest.fixture
def run_outside(tmp_path):
    """`run_outside("-c", code)` or `run_outside(script, ...)`: Python, started in `tmp_path`.

    In the project's root, transformers.py would hide the library of that name. The process is
    offline, and its caches are in `tmp_path`. Returns what it printed.
    """
    environment = os.environ | OFFLINE | {name: str(tmp_path / "caches") for name in CACHES}
    environment.pop("PYTHONPATH", None)

    def run(*words):
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
