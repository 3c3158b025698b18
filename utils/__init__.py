"""Shared by every part of the program; imported first, to refuse systems that it can't run on."""

import sys

try:
    import fcntl  # noqa: F401  # locks; where it is missing, so are other things
except ImportError:
    print("error: this runs on Linux and macOS; on Windows, use WSL", file=sys.stderr)
    sys.exit(2)
