"""The processes of a run: which one this is, and all messages between them.

`python train.py --nGPU N` starts them on one machine (utils/run/launch.py), torchrun or Slurm's
srun on several (utils/run/place.py). Each trains on its own batches. PyTorch's
DistributedDataParallel averages their gradients (Li et al., "PyTorch Distributed", VLDB 2020).
Whatever else they have to agree on goes through the methods of `World`, which all processes must
call in the same order.
"""

import contextlib
import ipaddress
import os
import socket
import sys
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from utils.misc import ReportedElsewhere, UserError, first_few
from utils.run import console
from utils.run.machine import affinity
from utils.run.place import find_place, is_task_of_srun
from utils.run.stopping import Stopped, let_signals_in

FIRST_MEETING = timedelta(minutes=2)  # until all processes are there, and again until connected
SECONDS_OF_A_CALL = 5  # until rank 0 is called again
LONGEST_PROBE = timedelta(days=30)  # how long the other ranks wait for the one that trains it
INTERFACE = "GLOO_SOCKET_IFNAME"  # the variable that names the network between machines
# Freeing a wrapped network can hang: it waits, holding the GIL, for a thread of the process group,
# which may itself wait for the GIL to free the last gradients.
_never_freed = []
SHARED_MEMORY = "/dev/shm"


class World:
    """All processes of a run, as one of them sees them; without `group`, a single process.

    rank, size: the number of this process, and how many there are
    local_rank, local_size: the same on this machine, whose number is `machine`
    n_sharing: how many of these may run on the same processors; Slurm may give each task its own
    stop: the StopSignals in force
    group: the processes' own group for messages (gloo, on the CPU)
    """

    def __init__(
        self, rank=0, size=1, local_rank=0, local_size=1, machine=0, stop=None, group=None
    ):
        self.rank, self.size, self.machine = rank, size, machine
        self.local_rank, self.local_size = local_rank, local_size
        self.n_sharing, self.stop, self.group = local_size, stop, group

    @property
    def is_rank_zero(self):
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    # ------------------------------------------------------------------------------------ messages

    def all_gather(self, value):
        """The values of all ranks, in order of rank."""
        if self.group is None:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def all_reduce(self, tensor):
        """Sum of the ranks' CPU tensors; some may have None instead."""
        return sum(part for part in self.all_gather(tensor) if part is not None)

    def raise_everywhere(self, error=None):
        """Raise on every rank the error of the lowest rank that has one.

        error: None, a UserError or a Stopped. Only the rank it comes from reports it to the user.
        """
        for rank, found in enumerate(self.all_gather(error and _as_message(error))):
            if found is not None:
                error = error if rank == self.rank else _as_error(found)
                error.is_everywhere = True
                raise error

    def check_same(self, value, reason):
        """Raise a UserError with this reason on every rank unless all have the same value."""
        values = self.all_gather(value)
        differ = any(other != value for other in values)
        self.raise_everywhere(UserError(reason) if differ else None)

    def stop_if_asked(self, wish=None):
        """Raise Stopped on every rank if any of several was asked to stop.

        Returns the `wish` of rank 0, which comes with the same message.
        """
        if self.group is None:
            return wish
        requests, wishes = zip(*self.all_gather((self.stop.requested, wish)), strict=True)
        for number in requests:
            if number is not None:
                stopped = Stopped(number)
                stopped.is_everywhere = True
                raise stopped
        return wishes[0]

    @contextlib.contextmanager
    def shared_errors(self):
        """A block that fails on every rank if it fails on one.

        Inside it, a rank must not wait for others, except in `on_rank_zero`; so it may end at any
        time, and does so at once when asked to stop.
        """
        if self.group is None:
            yield
            return
        error = None
        try:
            with self.stop.at_once():
                yield
        except (UserError, Stopped) as raised:
            if getattr(raised, "is_everywhere", False):
                raise
            error = raised
        self.raise_everywhere(error)

    def on_rank_zero(self, work):
        """Call `work` on rank 0 alone; every rank gets its result, or its error."""
        if self.group is None:
            return work()
        with self.stop.deferred():
            with self.shared_errors():
                found = [work() if self.is_rank_zero else None]
            dist.broadcast_object_list(found, group=self.group, group_src=0)
        return found[0]

    # ------------------------------------------------------------------------------------ training

    def wrap(self, network):
        """The network to train: its backward pass leaves the mean of all processes' gradients."""
        if self.group is None:
            return network
        wrapped = DistributedDataParallel(network, static_graph=True, gradient_as_bucket_view=True)
        # Not before every step: most are constants, and copy_buffers is for the others. PyTorch
        # 2.13 warns of this as an argument, and 2.11 has no other.
        wrapped.broadcast_buffers = False
        _never_freed.append(wrapped)
        return wrapped

    def copy_buffers(self, network):
        """Give all processes the buffers (such as the means of a batch norm) of the first."""
        for buffer in network.buffers() if self.group else ():
            held = buffer.to("cpu", copy=True)
            dist.broadcast(held, group=self.group, group_src=0)
            buffer.copy_(held)

    # ------------------------------------------------------------------------------- shared memory

    def shared_tensor(self, size, dtype):
        """A tensor of zeros, (size,), that the processes of this machine share.

        Its file is unlinked before this returns: the memory is free as soon as no process uses it,
        however they end. Raises UserError if there is no room.
        """
        self.all_gather(None)  # all are here: none waits while the file has a name
        path = error = None
        try:
            if self.local_rank == 0:
                try:
                    path = _reserve(size * dtype.itemsize)
                except UserError as raised:
                    error = raised
            self.raise_everywhere(error)
            paths = dict(filter(None, self.all_gather(path and (self.machine, path))))
            tensor = torch.from_file(paths[self.machine], shared=True, size=size, dtype=dtype)
            self.all_gather(None)  # all have opened it
            return tensor
        finally:
            if path:
                os.unlink(path)


def _as_message(error):
    return error.number if isinstance(error, Stopped) else str(error)


def _as_error(message):
    return Stopped(message) if isinstance(message, int) else ReportedElsewhere(message)


def _reserve(n_bytes):
    """Path of a new file of this size: in memory, or else in the folder for temporary files."""
    reasons = []
    for directory in (SHARED_MEMORY, tempfile.gettempdir()):
        try:
            handle, path = tempfile.mkstemp(prefix="cpc-pack-", dir=directory)
        except OSError as error:
            reasons.append(f"{directory}: {error.strerror}")
            continue
        try:
            # Without this, a full disk would cause a crash while the audio is written.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, max(1, n_bytes))
            if reasons:
                print(
                    f"note: {reasons[0]}: the {n_bytes / 1e9:.1f} GB of audio that processes "
                    f"share are in a file in {directory}, which is slower if that is on a disk; "
                    "containers have --shm-size, and a smaller --max_size_loaded needs less",
                    file=sys.stderr,  # on all machines: ranks but the first are silent
                )
            return path
        except OSError as error:
            reasons.append(f"{directory}: {error.strerror}")
            os.unlink(path)
        finally:
            os.close(handle)
    raise UserError(
        f"no room for {n_bytes / 1e9:.1f} GB of audio that processes share ({first_few(reasons)}); "
        "a smaller --max_size_loaded needs less"
    )


ALONE = World()


# For tensors on the ranks' devices, in a training step. All ranks must call these.
def mean_over_ranks(tensor):
    """The mean of the ranks' tensors, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def from_rank_zero(tensor):
    """The tensor of rank 0, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


@contextlib.contextmanager
def joined_world(stop, device):
    """The World of this process, for the duration of a block.

    A process that was started as one of several (by utils/run/launch.py, torchrun or srun) joins
    the others; all but rank 0 are silent. stop: the StopSignals in force; device: a device of the
    type that every process has. Raises UserError if the processes can't reach each other.
    """
    place = find_place()
    if place.size == 1:
        yield World(stop=stop)
        return
    cuda = device.type == "cuda"
    if cuda:
        _take_gpu(place.local_rank)
    if place.rank:
        console.silence()
    with stop.deferred():  # none of several processes stops before all agree on it
        store, _connections = _meet(place)
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size)
        group = dist.new_group(backend="gloo", timeout=LONGEST_PROBE)
        let_signals_in()
        world = World(*place, stop, group)
        world.n_sharing = processes_on(affinity(), world)
        yield world
    dist.destroy_process_group()  # after an error it might wait for a process that is gone


def processes_on(processors, world):
    """How many processes of this machine may run on exactly these processors."""
    own = world.machine, processors
    return world.all_gather(own).count(own)


def _meet(place):
    """The processes' common store, once each has reached every other, and these connections.

    Groups with a longer time-out would wait that long for a process that can't be reached.
    """
    if place.size > place.local_size:
        _check_host_name()
    try:
        if place.rank:
            _wait_for_first()
        store, *_ = next(dist.rendezvous("env://", timeout=FIRST_MEETING))
        meeting = dist.PrefixStore("meeting", store)
        names = [f"process {rank}" for rank in range(place.size)]
        meeting.set(names[place.rank], "is here")
        meeting.wait(names, FIRST_MEETING)
        gloo_timeout = FIRST_MEETING / 5  # five times that is how long Gloo waits to be called
        connections = dist.ProcessGroupGloo(meeting, place.rank, place.size, gloo_timeout)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"process {place.rank} of {place.size} can't reach all others, the first one at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"({str(error).splitlines()[0]}); if its port is in use, set "
            f"another MASTER_PORT; if all were started, {_how_to_choose_interface()}"
        ) from error
    store.set_timeout(dist.constants.default_pg_timeout)
    return store, connections


def _wait_for_first():
    """Wait until rank 0 can be called: PyTorch would print a page for each call that fails."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + FIRST_MEETING.total_seconds()
    while True:
        try:
            socket.create_connection(address, SECONDS_OF_A_CALL).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _check_host_name():
    """Raise UserError if other machines would get an address that only works on this one.

    Gloo gives them the address of the host name, for which Debian has 127.0.1.1 in /etc/hosts.
    """
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError:
        address = "127.0.0.1"  # as Gloo does
    if INTERFACE not in os.environ and ipaddress.ip_address(address).is_loopback:
        raise UserError(
            f"the name of this machine, {name}, stands for {address}, where no other machine can "
            f"reach it; {_how_to_choose_interface()}"
        )


def _how_to_choose_interface():
    names = [name for _, name in socket.if_nameindex() if name != "lo"]
    return (
        f"set {INTERFACE}, on GPUs NCCL_SOCKET_IFNAME as well, to the network interface between "
        f"the machines (this one has {first_few(names) or 'none'})"
    )


def _take_gpu(local_rank):
    n_gpus = torch.cuda.device_count()
    if n_gpus == 1 and is_task_of_srun():  # which may show each task its own GPU
        local_rank = 0
    if local_rank >= n_gpus:
        raise UserError(
            f"process {local_rank} of this machine has no GPU, it sees {n_gpus}: start fewer "
            "processes, or let each see all GPUs of its machine"
        )
    torch.cuda.set_device(local_rank)
