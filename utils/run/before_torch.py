"""Imported by every command before PyTorch: threads that wait for others sleep instead of spinning.

OpenMP's threads wait for each other hundreds of times in a step. By default they spin for
milliseconds, on processors that other programs, or the very threads they wait for, could use: one
other busy program makes a step several times slower. OpenMP reads its variables once, when PyTorch
loads it. If the user has set one of them, nothing is changed.

Only commands import this, and the linter keeps it above everything that could import PyTorch. A
program that imports `feature_loader`, `hubconf` or another module as a library keeps its own
environment.
"""

import os
import sys

# PASSIVE is for every OpenMP (Intel's then sleeps at once), the count only for libgomp: a short
# spin costs others little, and saves an undisturbed step wake-ups (benchmarks/contention.py).
SETTINGS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
CHOICES = (*SETTINGS, "KMP_BLOCKTIME")

if "torch" not in sys.modules and not any(name in os.environ for name in CHOICES):
    os.environ |= SETTINGS
