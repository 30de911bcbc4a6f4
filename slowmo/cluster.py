"""Where workers live: the only module that talks to torch.distributed.

m workers are spread over P ranks. What belongs to workers is a tensor `[n, ...]`, one row for each of the n workers that this rank
hosts; what is global is `[1, ...]`. Four layouts, one code:

    P = 1       all workers on this rank, nothing is sent
    P = m       one worker per rank
    1 < P < m   n = m / P workers per rank, P divides m
    P = m g     a worker is g ranks that hold the same row: each of them carries 1/g of every message between workers, and the
                parts are put together inside the worker
"""

import atexit
import dataclasses
import datetime
import os
import socket
from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Pending:
    """Messages under way: a call waits for them, `is_completed()` only asks. Without arguments: nothing to wait for."""

    wait: Callable[[], None] = lambda: None
    is_completed: Callable[[], bool] = lambda: True

    def __call__(self) -> None:
        self.wait()


def layout(num_workers: int, world_size: int) -> tuple[int, int]:
    """Workers per rank and ranks per worker, `(n, g)`; at least one of the two is 1. ValueError when neither divides the other."""
    if num_workers < 1:
        raise ValueError(f"{num_workers} workers: at least one is needed, set workers=1 or more")
    if num_workers % world_size == 0:
        return num_workers // world_size, 1
    if world_size % num_workers == 0:
        return 1, world_size // num_workers
    divisors = [p for p in range(1, num_workers + 1) if num_workers % p == 0]
    raise ValueError(
        f"{num_workers} workers do not fit on {world_size} ranks: start a divisor of {num_workers} {divisors}, "
        f"or a multiple of {num_workers} (a worker is then several ranks)"
    )


class Cluster:
    """m workers on the ranks of a process group.

    num_workers: m; default one per rank. device: where rows live. Under torchrun (or any launcher that sets RANK, WORLD_SIZE,
    MASTER_ADDR, MASTER_PORT) the default process group is started here when nobody has: gloo for a CPU, nccl for a GPU. A group that
    exists is not touched: messages go through a group of our own. After `timeout` seconds a silent peer is an error instead of a hang,
    in either case. Without a launcher P = 1 and nothing is sent.

    Attributes: num_workers (m), local_workers (range of the workers hosted here, one row each), rank and world_size (P), is_main (rank 0,
    the one that prints and writes what is global), worker_size (g, ranks per worker) and worker_rank (this rank's place in its worker).
    Raises ValueError when m and P do not fit, ConnectionError when the ranks do not meet.
    """

    def __init__(self, num_workers: int | None = None, device: str | torch.device = "cpu", timeout: float = 600.0):
        self.device, self.timeout = torch.device(device), timeout
        if self.device.type == "cuda":
            if self.device.index is None:
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
            torch.cuda.set_device(self.device)  # nccl and pickled objects go by the current device
        limit = datetime.timedelta(seconds=timeout)
        self._started_here, self._group = False, None
        if dist.is_initialized():
            self._group = dist.new_group(timeout=limit)
        elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
            if num_workers is not None:
                layout(num_workers, int(os.environ["WORLD_SIZE"]))  # refuse before anybody waits for anybody
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            try:
                dist.init_process_group(backend, timeout=limit)
            except (dist.DistError, RuntimeError) as error:
                where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                raise ConnectionError(
                    f"rank {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']} on {socket.gethostname()} did not meet the others at "
                    f"{where} ({error}): is that host up, its port open, the network interface the right one (GLOO_SOCKET_IFNAME)?"
                ) from error
            self._started_here = True
            # gloo's threads abort the interpreter if they outlive its last moments (PyTorch issue 190489)
            atexit.register(self.close)
        grouped = dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        self.num_workers = self.world_size if num_workers is None else num_workers
        rows, self.worker_size = layout(self.num_workers, self.world_size)
        self.worker_rank = self.rank % self.worker_size
        first = self.rank // self.worker_size * rows
        self.local_workers = range(first, first + rows)
        self.is_main = self.rank == 0
        self._inside = self._across = None
        if self.worker_size > 1:  # every rank makes every group, in the same order
            for first in range(0, self.world_size, self.worker_size):
                group = dist.new_group(range(first, first + self.worker_size), timeout=limit)
                self._inside = group if first <= self.rank < first + self.worker_size else self._inside
            for place in range(self.worker_size):
                group = dist.new_group(range(place, self.world_size, self.worker_size), timeout=limit)
                self._across = group if place == self.worker_rank else self._across

    @overload
    def mean(self, rows: torch.Tensor, wait: Literal[True] = True) -> torch.Tensor: ...

    @overload
    def mean(self, rows: torch.Tensor, wait: Literal[False]) -> Callable[[], torch.Tensor]: ...

    def mean(self, rows: torch.Tensor, wait: bool = True) -> torch.Tensor | Callable[[], torch.Tensor]:
        """Exact mean over all m workers: `[n, d]` -> `[1, d]`, the same bits everywhere. Allocates its result and nothing more.

        wait=False starts it and gives a function that waits and returns the mean; `rows` may change meanwhile.
        """
        total = rows.sum(0, keepdim=True)
        part = self._part(total)
        group = self._across if self.worker_size > 1 else self._group
        alone = self.world_size == self.worker_size or not part.numel()
        handle = None if alone else dist.all_reduce(part, group=group, async_op=True)

        def finish() -> torch.Tensor:
            self._wait(handle)
            if self.worker_size > 1:
                self._share(total)
            return total.div_(self.num_workers)

        return finish() if wait else finish

    def shift(self, rows: torch.Tensor, offset: int, out: torch.Tensor, dtype: torch.dtype | None = None) -> Callable[[], torch.Tensor]:
        """Start sending worker i's row to worker i + offset (mod m). Returns `receive()`, which waits and gives the arrivals `[n, d]`.

        `out` `[n, d]` takes the arrivals. Neither `rows` may change nor `out` be read before `receive()` has returned. dtype: what is
        sent is rounded to it, wherever the receiver lives, so that every layout gives the same arrivals.
        """
        if dtype not in (None, rows.dtype):
            arrive = self.shift(rows.to(dtype), offset, torch.empty_like(out, dtype=dtype))
            return lambda: out.copy_(arrive())
        n = len(self.local_workers)
        peers = self.world_size // self.worker_size
        # rows [0, n - r) go to the rank q further on, where they are rows [r, n); the last r rows to the one after it
        q, r = divmod(offset % self.num_workers, n)
        operations = []
        for distance, source, target in ((q, slice(0, n - r), slice(r, n)), (q + 1, slice(n - r, n), slice(0, r))):
            outgoing, incoming = rows[source], out[target]
            if not len(outgoing):
                continue
            if distance % peers == 0:
                incoming.copy_(outgoing)
                continue
            to, at = ((self.rank + sign * distance * self.worker_size) % self.world_size for sign in (1, -1))
            outgoing, incoming = self._part(outgoing), self._part(incoming)
            if outgoing.numel():
                # gloo: the receive first; the other order takes twice as long between the same two ranks
                operations.append(dist.P2POp(dist.irecv, incoming, at, self._group))
                operations.append(dist.P2POp(dist.isend, outgoing, to, self._group))
        handles = dist.batch_isend_irecv(operations) if operations else []

        def receive() -> torch.Tensor:
            for handle in handles:
                self._wait(handle)
            if self.worker_size > 1 and peers > 1:
                self._share(out)
            return out

        return receive

    def all_reduce(self, values: torch.Tensor, op: str = "sum", inside: bool = False, wait: bool = True) -> Pending:
        """Sum, min or max of `values` over all ranks (`inside`: over this worker's), in place.

        Gives a function that waits, and with wait=True has waited already.
        """
        if (self.worker_size if inside else self.world_size) == 1:
            return Pending()
        group = self._inside if inside else self._group
        handle = dist.all_reduce(values, getattr(dist.ReduceOp, op.upper()), group=group, async_op=True)
        if wait:
            self._wait(handle)
            return Pending()
        return Pending(lambda: self._wait(handle), handle.is_completed)

    def all_reduce_max(self, flag: int) -> int:
        """The largest `flag` of all ranks: one answer for all. Costs one tiny all-reduce; nothing when P = 1."""
        if self.world_size == 1:
            return flag
        values = torch.tensor([flag], device=self.device)
        self.all_reduce(values, "max")
        return int(values)

    def broadcast(self, values: torch.Tensor) -> None:
        """Rank 0's `values` everywhere, in place; on any device, with any strides."""
        if self.world_size > 1:
            sent = values.detach().to(self.device).contiguous()  # nccl knows no CPU
            # as bytes: not every backend of every torch knows every dtype
            self._wait(dist.broadcast(sent.reshape(-1).view(torch.uint8), 0, group=self._group, async_op=True))
            if sent.data_ptr() != values.data_ptr():
                values.detach().copy_(sent)

    def broadcast_object(self, value: T) -> T:
        """Rank 0's small Python object everywhere (between ranks of one run; never from a file)."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, 0, group=self._group, device=self.device)
        return box[0]

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's small Python object, in order of rank, everywhere."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def all_gather_in_worker(self, values: torch.Tensor) -> torch.Tensor:
        """`[...]`, different on each rank of a worker -> `[g, ...]`, the same on all of them."""
        if self.worker_size == 1:
            return values.unsqueeze(0)
        values = values.to(self.device).contiguous()  # nccl knows no CPU
        parts = [torch.empty_like(values) for _ in range(self.worker_size)]
        dist.all_gather(parts, values, group=self._inside)
        return torch.stack(parts)

    def barrier(self) -> None:
        """Wait for every rank."""
        self.all_reduce_max(0)  # an all-reduce, so that the process group's timeout names a missing peer

    def close(self) -> None:
        """End the process group if this object started it."""
        if self._started_here and dist.is_initialized():
            dist.destroy_process_group()

    def _wait(self, handle: Any) -> None:
        """RuntimeError that says what a user can do where a peer has gone or is silent."""
        if handle is None:
            return
        try:
            handle.wait()
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} lost a peer or waited {self.timeout:.0f} s for one: see the other ranks' messages first; every rank "
                f"must take the same number of steps, each with a backward pass ({error})"
            ) from error

    def _part(self, rows: torch.Tensor) -> torch.Tensor:
        """This rank's share of a message: everything, or one of g column slices (then there is one row)."""
        return rows if self.worker_size == 1 else rows[0].tensor_split(self.worker_size)[self.worker_rank]

    def _share(self, rows: torch.Tensor) -> None:
        """Inside a worker, every rank gives its slice to the others."""
        first = self.rank - self.worker_rank
        handles = [
            dist.broadcast(part, first + place, group=self._inside, async_op=True)
            for place, part in enumerate(rows[0].tensor_split(self.worker_size))
            if part.numel()
        ]
        for handle in handles:
            self._wait(handle)
