"""A round of gossip: what travels along a graph's edges, where it arrives, and with which weights it is mixed.

Rows hold z = x / w. Neighbours exchange z with their weight and the receiver forms z_i <- Σ_j P_ij w_j z_j / w_i: nothing is scaled
before it is sent, so there is no send buffer.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from slowmo.buckets import Segment
from slowmo.replicas import Replicas
from slowmo.topology import Graph, Weight


class Gossip:
    """graph: `step -> {offset: weight}`, see topology.py. comm_dtype: `bfloat16` or `float16`, what messages are rounded to, or None.

    regular: weights are plain numbers, so that all workers receive what they give, and w stays 1. ValueError for a graph of another
    size, and for another dtype.
    """

    def __init__(self, replicas: Replicas, graph: Graph, comm_dtype: str | None):
        m = replicas.cluster.num_workers
        if graph.size != m:
            raise ValueError(f"a graph of {graph.size} workers for a cluster of {m}: build it with the cluster's size")
        if comm_dtype not in (None, "bfloat16", "float16"):
            raise ValueError(f"comm_dtype={comm_dtype!r}: choose bfloat16, float16, or null for the rows' own dtype")
        self.cluster, self.graph = replicas.cluster, graph
        self.comm_dtype: torch.dtype | None = getattr(torch, comm_dtype) if comm_dtype else None
        size = replicas.segments[0].x.element_size()
        self.compression = self.comm_dtype.itemsize / size if self.comm_dtype else 1.0  # of a message, over the rows' own dtype
        self.regular = not any(isinstance(weight, tuple) for step in range(graph.cycle) for weight in graph(step).values())
        messages = [len(graph(step)) - 1 for step in range(graph.cycle)]
        self.mean_messages, self.most_messages = sum(messages) / len(messages), max(messages)  # of a row, per step
        self._inboxes: dict[tuple[Segment, str, int], torch.Tensor] = {}
        self._under_way: dict[Segment, dict[str, list[Callable[[], torch.Tensor]]]] = defaultdict(dict)

    def rounded(self, messages: int) -> float:
        """Rows that rounding takes: of each message what leaves and what arrives."""
        return 2 * messages * self.compression if self.comm_dtype else 0

    def send(self, step: int, segment: Segment, name: str, block: torch.Tensor, first: Callable[[], torch.Tensor] | None = None) -> None:
        """Start sending `block`, `[n, d]`, along this step's edges. first: gives the memory for the first arrival."""
        waits = self._under_way[segment][name] = []
        for k, offset in enumerate(offset for offset in self.graph(step) if offset):
            if k == 0 and first:
                inbox = first()
            elif (segment, name, k) in self._inboxes:
                inbox = self._inboxes[segment, name, k]
            else:
                inbox = self._inboxes[segment, name, k] = torch.empty_like(segment.x, requires_grad=False)
            waits.append(self.cluster.shift(block.detach(), offset, inbox, self.comm_dtype))

    def arrived(self, segment: Segment) -> dict[str, list[torch.Tensor]]:
        """Waits for what was sent to a segment: by name the arrivals, rows `[n, d]` for each edge. Once."""
        return {name: [wait() for wait in waits] for name, waits in self._under_way.pop(segment, {}).items()}

    def weights(self, step: int, w: torch.Tensor) -> tuple[Sequence[float | torch.Tensor], torch.Tensor]:
        """A round's (weights [kept, then one per arrival], new w): x_i <- Σ_j P_ij x_j written for z = x / w."""
        graph = self.graph(step)
        if self.regular:
            numbers = {offset: weight for offset, weight in graph.items() if not isinstance(weight, tuple)}  # that is all of them
            return [numbers.get(0, 0.0), *(weight for offset, weight in numbers.items() if offset)], w
        numerators = [self._of_senders(graph.get(0, 0.0), 0, w) * w]
        for offset, weight in graph.items():
            if offset:
                numerators.append(self._of_senders(weight, offset, w) * self.cluster.shift(w, offset, torch.empty_like(w))())
        total = sum(numerators, torch.zeros_like(w))
        return [numerator / total for numerator in numerators], total

    def _of_senders(self, weight: Weight, offset: int, like: torch.Tensor) -> torch.Tensor:
        """What each worker here gets from the worker `offset` before it, `[n, 1]`."""
        m = self.cluster.num_workers
        values = [weight[(i - offset) % m] if isinstance(weight, tuple) else weight for i in self.cluster.local_workers]
        return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def add(block: torch.Tensor, weight: float | torch.Tensor, arrival: torch.Tensor) -> None:
    """block += weight * arrival, without a temporary."""
    block.add_(arrival, alpha=weight) if not isinstance(weight, torch.Tensor) else block.addcmul_(arrival, weight)
