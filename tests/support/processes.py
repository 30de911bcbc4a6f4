"""Real gloo processes for tests: forked after torch is imported, so that many start in seconds."""

import datetime
import multiprocessing
import os
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist


def spawn(function, processes: int, *arguments, timeout: float = 120.0) -> list:
    """`function(*arguments)` in each of `processes` ranks of a fresh gloo group; their results, in order. A failure is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=_child, args=(folder, r, processes, function, arguments)) for r in range(processes)]
        for child in children:
            child.start()
        try:
            for child in children:
                child.join(timeout)
            outputs = [Path(folder) / f"{rank}.out" for rank in range(processes)]
            failures = [path.with_suffix(".error").read_text() for path in outputs if path.with_suffix(".error").exists()]
            assert not failures, "\n".join(failures)
            assert all(path.exists() for path in outputs), f"a process hung or died: {[child.exitcode for child in children]}"
            # written a moment ago by our own children
            return [torch.load(path, weights_only=False) for path in outputs]
        finally:
            for child in children:
                if child.is_alive():
                    child.kill()
                child.join()


def _child(folder, rank, processes, function, arguments):
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=processes, timeout=datetime.timedelta(seconds=60))
        result = function(*arguments)
        aside = Path(folder) / f"{rank}.partial"
        torch.save(result, aside)
        os.replace(aside, Path(folder) / f"{rank}.out")
        dist.barrier()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
    os._exit(0)  # gloo's threads now and then abort a regular exit
