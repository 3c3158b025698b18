"""Shared by every part of the program; imported first, to refuse systems it can't run on."""

import sys

try:
    import fcntl  # noqa: F401  # file locks; a system without them lacks other things as well
except ImportError:
    print("error: this runs on Linux and macOS; on Windows, use WSL", file=sys.stderr)
    sys.exit(2)
