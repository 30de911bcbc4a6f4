"""Real gloo processes that live through many cases: starting them once costs seconds, a case milliseconds."""

import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import tempfile
import traceback

import torch
import torch.distributed as dist


class Pool:
    """`pool(case)` gives `function(case)` of each of `processes` ranks, in order; an AssertionError with their tracebacks if one raises.

    After a failure the ranks are out of step with each other: new ones are started for the next case, so that hypothesis can shrink.
    """

    def __init__(self, function, processes: int, patience: float = 60.0):
        self.function, self.processes, self.patience = function, processes, patience
        self.children, self.pipes, self.folder = [], [], None

    def __call__(self, case) -> list:
        if not self.children:
            self._start()
        answers = []
        try:
            for pipe in self.pipes:
                pipe.send(case)
            for pipe in self.pipes:
                # when one has failed the others may wait for it in vain
                failed = any(not fine for fine, _ in answers)
                if not pipe.poll(2.0 if failed else self.patience):
                    answers.append((False, "no answer"))
                    continue
                answers.append(pipe.recv())
        except (EOFError, OSError) as error:
            answers.append((False, f"a rank died: {error!r}"))
        if not all(fine for fine, _ in answers):
            self.close()
            raise AssertionError("\n".join(str(answer) for fine, answer in answers if not fine))
        return [answer for _, answer in answers]

    def close(self) -> None:
        for child in self.children:
            child.kill()
            child.join()
        for pipe in self.pipes:
            pipe.close()
        if self.folder:
            self.folder.cleanup()
        self.children, self.pipes, self.folder = [], [], None

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(self.processes):
            mine, theirs = context.Pipe()
            child = context.Process(target=self._serve, args=(rank, theirs, self.folder.name), daemon=True)
            child.start()
            theirs.close()
            self.children.append(child)
            self.pipes.append(mine)

    def _serve(self, rank, pipe, folder) -> None:
        torch.set_num_threads(1)
        faulthandler.disable()  # pytest's: a rank that gloo aborts would print the whole of pytest's stack
        store = f"file://{folder}/store"
        limit = datetime.timedelta(seconds=30)
        dist.init_process_group("gloo", store, rank=rank, world_size=self.processes, timeout=limit)
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while True:
                case = pipe.recv()
                try:
                    pipe.send((True, self.function(case)))
                except BaseException:
                    pipe.send((False, traceback.format_exc()))
        os._exit(0)  # gloo's threads now and then abort a regular exit
