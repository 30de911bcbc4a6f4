"""What a CUDA graph does, on a CPU: kernels are recorded with the memory that they read and write, and replayed without Python."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """`call()` is recorded and leaves no trace; `replay` launches its kernels again, in the same memory, unseen by autograd."""

    def __init__(self, call):
        super().__init__()
        self.calls, self.written = [], []
        with self:
            call()
        with torch.no_grad():
            for tensor, before in reversed(self.written):  # a capture runs nothing
                tensor.copy_(before.view_as(tensor))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        if torch.Tag.inplace_view in func.tags:  # no kernel
            return func(*args, **(kwargs or {}))
        schema = func._schema.arguments
        for argument, value in [*zip(schema, args), *((a, (kwargs or {}).get(a.name)) for a in schema[len(args) :])]:
            # batch norm's schema does not tell that it writes these
            silent = func is torch.ops.aten.native_batch_norm.default and argument.name in ("running_mean", "running_var")
            if silent or argument.alias_info is not None and argument.alias_info.is_write:
                self.written += [(tensor, tensor.clone()) for tensor in tree_leaves(value) if isinstance(tensor, torch.Tensor)]
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        written = tuple(tensor for tensor, _ in self.written)
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(written):
            for func, args, kwargs, out in self.calls:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new.reshape(old.shape))


class Cuda:
    """Stands in for the functions of torch.cuda that passes.py uses. events: (who, what) in order."""

    def __init__(self):
        self.events, self.now = [], self.Stream("main")
        self.streams = 0

    def install(self, monkeypatch):
        for name, value in {
            "Stream": lambda device=None: self.Stream(self._next(), self.events),
            "current_stream": lambda device=None: self.now,
            "stream": self.on,
            "graph_pool_handle": lambda: f"pool {self._next()}",
            "CUDAGraph": Graph,
            "graph": self.capture,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        self.now.events = self.events

    def _next(self):
        self.streams += 1
        return f"{self.streams}"

    class Stream:
        def __init__(self, name, events=None):
            self.name, self.events = name, events

        def wait_stream(self, other):
            self.events.append((self.name, f"waits for {other.name}"))

    @contextlib.contextmanager
    def on(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before

    @contextlib.contextmanager
    def capture(self, cuda_graph, pool=None, stream=None, capture_error_mode="global"):
        """Its call runs once in here, into nothing: what is to be replayed is put into `calls` by the test."""
        self.events.append((stream.name, f"captures into {pool}, {capture_error_mode}"))
        cuda_graph.cuda = self
        yield


class Graph:
    def replay(self):
        self.cuda.events.append((self.cuda.now.name, "replays"))
