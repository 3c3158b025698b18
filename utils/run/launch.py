"""Starting the processes of a run on this machine, and ending them together."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing import resource_tracker
from multiprocessing.connection import wait

import torch
from torch.distributed import TCPStore

from utils.misc import UserError
from utils.run.command import EXIT_BROKEN_PIPE, EXIT_USER_ERROR
from utils.run.place import is_one_of_several
from utils.run.stopping import SIGNALS, signals_held_back

DELAY = 3.0  # seconds that an unexplained failure waits for another process to explain it
FAREWELL = 1.5  # seconds for processes that know of another's error to report it and clean up


def processes_to_start(args):
    """How many processes this program has to start: 0 if it does the work itself.

    It does if torchrun or srun started it (a note is printed if `--nGPU` differs), or if one
    process is enough. `--nGPU -1` means one for each GPU, and a single one on a CPU.
    """
    if args.only_classif_metric:
        return 0
    if is_one_of_several():
        started = os.environ.get("LOCAL_WORLD_SIZE", "1")
        if str(args.nGPU) not in ("-1", started) and os.environ.get("RANK", "0") == "0":
            print(
                f"note: --nGPU {args.nGPU} has no effect: the environment sets the number of "
                f"processes (LOCAL_WORLD_SIZE) to {started}"
            )
        return 0
    n_devices = torch.cuda.device_count() if args.device != "cpu" else 0
    size = args.nGPU if args.nGPU > 0 else max(1, n_devices)
    return size if size > 1 else 0


def launch(size, main, argv):
    """Run `main(argv)` in `size` processes; returns the exit status.

    Stop signals are passed on. When a process dies, the others are ended at once, since they
    couldn't continue; after an error they first have a moment to end on their own. Raises UserError
    if one was killed, naming it and the signal.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_run, args=(main, argv, rank, size, store.port))
        for rank in range(size)
    ]
    with _forwarded_signals(processes):
        try:
            _start(processes)
            return _wait_for(processes)
        finally:
            for process in processes:
                if process.pid:
                    process.kill()
                    process.join()


def _start(processes):
    """Start them all. They accept stop signals once they have met (`joined_world`).

    One that stopped before would leave the others waiting for it.
    """
    resource_tracker.ensure_running()  # started with the first process, it would let signals in
    with signals_held_back():
        for process in processes:
            process.start()


class _forwarded_signals:
    """A block in which the first stop signal goes to all processes; a second one ends it."""

    def __init__(self, processes):
        self.processes, self.previous, self.requested = processes, {}, False

    def __enter__(self):
        self.previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame):
        if self.requested:
            raise SystemExit(128 + number)
        self.requested = True
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)


def _wait_for(processes):
    """Wait until all processes have ended, or one has failed; returns the exit status."""
    status, left = 0, list(processes)
    while left:
        wait([process.sentinel for process in left])
        ended = [process for process in left if process.exitcode is not None]
        left = [process for process in left if process not in ended]
        for process in ended:
            if process.exitcode < 0:
                raise UserError(
                    f"process {processes.index(process)} of {len(processes)} was ended by "
                    f"{signal.Signals(-process.exitcode).name}, and the run with it (the system "
                    "sends SIGKILL when memory runs out); the same command resumes from the last "
                    "save"
                )
            if process.exitcode == EXIT_USER_ERROR:
                _let_end(left)
            if 0 < process.exitcode < 128 or process.exitcode == EXIT_BROKEN_PIPE:
                return process.exitcode
            status = max(status, process.exitcode)  # above 128: asked to stop, as all others are
    return status


def _let_end(processes):
    end = time.monotonic() + FAREWELL
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))


def _run(main, argv, rank, size, port):
    """Run `main` in each process, in an environment like torchrun's."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the launching process holds the store
    }
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # or this host's name would be looked up
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    _leave_after(main, argv)


def run_program(main):
    """`sys.exit(main())`; but one of several processes exits at once, whoever started it."""
    if is_one_of_several():
        _leave_after(main, sys.argv[1:])
    sys.exit(main())


def _leave_after(main, argv):
    """Call `main(argv)` and exit with its status, without freeing anything (distributed.py)."""
    try:
        status = main(argv) or 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        # When another process dies, a connection breaks here first. The launching process, or
        # torchrun, then ends this one: if it is still here later, the error is its own.
        time.sleep(DELAY)
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _stop_with_parent():
    wait([multiprocessing.parent_process().sentinel])
    if not torch.distributed.is_initialized():  # nor will it be: the others can't be found now
        os._exit(128 + signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
