"""Where workers live: the only module that talks to torch.distributed.

m workers are spread over P processes. What belongs to workers is a block `[n, ...]`, one row for each of the n workers that
this process hosts; what is global is `[1, ...]`. Four foldings, one code:

    P = 1       all workers in this process, nothing is sent
    P = m       one worker a process
    1 < P < m   n = m / P workers a process, P divides m
    P = m g     a worker is a node of g processes that hold the same row: each process carries 1/g of every message
                between nodes, and the parts are put together inside the node
"""

import atexit
import datetime
import os
import socket

import torch
import torch.distributed as dist


def fold(size: int, processes: int) -> tuple[int, int]:
    """Rows a process hosts and processes a worker has, `(n, g)`; at least one of the two is 1. ValueError when they do not fold."""
    if size < 1:
        raise ValueError(f"{size} workers: at least one is needed, set workers=1 or more")
    if size % processes == 0:
        return size // processes, 1
    if processes % size == 0:
        return 1, processes // size
    divisors = [p for p in range(1, size + 1) if size % p == 0]
    raise ValueError(
        f"{size} workers do not fold onto {processes} processes: start a divisor of {size} {divisors}, "
        f"or a multiple of {size} (a worker is then a node of several processes)"
    )


class Cluster:
    """m workers on the processes of the default process group.

    size: m; default one worker a process. device: where rows live. Under torchrun (or any launcher that sets RANK, WORLD_SIZE,
    MASTER_ADDR, MASTER_PORT) the process group is started here when nobody has: gloo for a CPU, nccl for a GPU, with `timeout`
    seconds after which a silent peer is an error instead of a hang. Without such a launcher P = 1.

    Attributes: size (m), ranks (range of the workers hosted here), node (g, processes a worker has), lane (this process's place
    in its node), process and processes (p and P), leader (process 0: the one that prints and writes what is global).
    Raises ValueError when m and P do not fold, ConnectionError when the processes do not meet.
    """

    def __init__(self, size: int | None = None, device: str | torch.device = "cpu", timeout: float = 600.0):
        self.device = torch.device(device)
        if self.device.type == "cuda":
            if self.device.index is None:
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
            torch.cuda.set_device(self.device)  # nccl and pickled objects go by the current device
        self._started_here = False
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            if size is not None:
                fold(size, int(os.environ["WORLD_SIZE"]))  # refuse before anybody waits for anybody
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            try:
                dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
            except (dist.DistError, RuntimeError) as error:
                where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                raise ConnectionError(
                    f"process {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']} on {socket.gethostname()} did not meet the others at "
                    f"{where} ({error}): is that host up, its port open, the network interface the right one (GLOO_SOCKET_IFNAME)?"
                ) from error
            self._started_here = True
            # gloo's threads abort the interpreter if they outlive its last moments (PyTorch issue 190489)
            atexit.register(self.close)
        grouped = dist.is_initialized()
        self.process, self.processes = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        self.size = self.processes if size is None else size
        rows, self.node = fold(self.size, self.processes)
        self.lane = self.process % self.node
        first = self.process // self.node * rows
        self.ranks = range(first, first + rows)
        self.leader = self.process == 0
        self._inside = self._across = None
        if self.node > 1:  # every process makes every group, in the same order
            for first in range(0, self.processes, self.node):
                group = dist.new_group(range(first, first + self.node), timeout=datetime.timedelta(seconds=timeout))
                self._inside = group if first <= self.process < first + self.node else self._inside
            for lane in range(self.node):
                group = dist.new_group(range(lane, self.processes, self.node), timeout=datetime.timedelta(seconds=timeout))
                self._across = group if lane == self.lane else self._across

    def mean(self, rows: torch.Tensor) -> torch.Tensor:
        """Exact mean over all m workers: `[n, d]` -> `[1, d]`, the same bits everywhere. Allocates its result and nothing more."""
        total = rows.sum(0, keepdim=True)
        if self.node == 1:
            self.reduce(total)
        else:
            if (part := self._part(total)).numel():
                dist.all_reduce(part, group=self._across)
            self._share(total)
        return total.div_(self.size)

    def shift(self, rows: torch.Tensor, hop: int, out: torch.Tensor, dtype: torch.dtype | None = None):
        """Start sending worker i's row to worker i + hop (mod m). Returns `receive()`, which waits and gives the arrivals `[n, d]`.

        `out` `[n, d]` takes the arrivals. Neither `rows` may change nor `out` be read before `receive()` has returned. dtype: what is
        sent is rounded to it, wherever the receiver lives, so that every folding gives the same arrivals.
        """
        if dtype not in (None, rows.dtype):
            arrive = self.shift(rows.to(dtype), hop, torch.empty_like(out, dtype=dtype))
            return lambda: out.copy_(arrive())
        n = len(self.ranks)
        processes = self.processes // self.node
        # rows [0, n - r) go to the process q further on, where they are rows [r, n); the last r rows to the one after it
        q, r = divmod(hop % self.size, n)
        operations = []
        for distance, source, target in ((q, slice(0, n - r), slice(r, n)), (q + 1, slice(n - r, n), slice(0, r))):
            outgoing, incoming = rows[source], out[target]
            if not len(outgoing):
                continue
            if distance % processes == 0:
                incoming.copy_(outgoing)
                continue
            to, at = ((self.process + sign * distance * self.node) % self.processes for sign in (1, -1))
            outgoing, incoming = self._part(outgoing), self._part(incoming)
            if outgoing.numel():
                # gloo: the receive first; the other order takes twice as long between the same two processes
                operations.append(dist.P2POp(dist.irecv, incoming, at))
                operations.append(dist.P2POp(dist.isend, outgoing, to))
        handles = dist.batch_isend_irecv(operations) if operations else []

        def receive() -> torch.Tensor:
            for handle in handles:
                handle.wait()
            if self.node > 1 and processes > 1:
                self._share(out)
            return out

        return receive

    def reduce(self, values: torch.Tensor, op: str = "sum", inside: bool = False, wait: bool = True):
        """Sum, min or max of `values` over all processes (`inside`: over this node's), in place. wait=False gives a handle or None."""
        if (self.node if inside else self.processes) == 1:
            return None
        group = self._inside if inside else None
        return dist.all_reduce(values, getattr(dist.ReduceOp, op.upper()), group=group, async_op=not wait)

    def max_flag(self, flag: int) -> int:
        """The largest `flag` of all processes: one answer for all. Costs one tiny all-reduce; nothing when P = 1."""
        if self.processes == 1:
            return flag
        values = torch.tensor([flag], device=self.device)
        self.reduce(values, "max")
        return int(values)

    def broadcast(self, values: torch.Tensor) -> None:
        """Process 0's `values` everywhere, in place."""
        if self.processes > 1:
            dist.broadcast(values, 0)

    def broadcast_object(self, value):
        """Process 0's small Python object everywhere (between processes of one run; never from a file)."""
        box = [value]
        if self.processes > 1:
            dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    def gather(self, value) -> list:
        """Every process's small Python object, in order of process, everywhere."""
        values = [value]
        if self.processes > 1:
            values = [None] * self.processes
            dist.all_gather_object(values, value)
        return values

    def gather_inside(self, rows: torch.Tensor) -> torch.Tensor:
        """`[n, k]`, different in each process of a node -> `[n, g, k]`, the same in all of them."""
        if self.node == 1:
            return rows.unsqueeze(1)
        parts = [torch.empty_like(rows) for _ in range(self.node)]
        dist.all_gather(parts, rows.contiguous(), group=self._inside)
        return torch.stack(parts, 1)

    def barrier(self) -> None:
        """Wait for every process."""
        self.max_flag(0)  # an all-reduce, so that the process group's timeout names a missing peer

    def close(self) -> None:
        """End the process group if this object started it."""
        if self._started_here and dist.is_initialized():
            dist.destroy_process_group()

    def _part(self, rows: torch.Tensor) -> torch.Tensor:
        """This process's share of a message: everything, or the lane-th of g column slices (then there is one row)."""
        return rows if self.node == 1 else rows[0].tensor_split(self.node)[self.lane]

    def _share(self, rows: torch.Tensor) -> None:
        """Inside a node, everybody gives its slice to the others."""
        first = self.process - self.lane
        handles = [
            dist.broadcast(part, first + lane, group=self._inside, async_op=True)
            for lane, part in enumerate(rows[0].tensor_split(self.node))
            if part.numel()
        ]
        for handle in handles:
            handle.wait()
