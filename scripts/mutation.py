"""Break each statement of the engine (outer, base, engine, gossip, buckets, inner) in turn; a test must notice.

    python scripts/mutation.py [--jobs 1] [--only outer.py:40 ...] [--start 1] [--every 1] [--all]

A mutant removes a statement, negates a condition or returns None; with --all also swaps + and -, * and /, < and <=, negates a truth
value or adds 1 to a number. First the quick tests run once and coverage.py writes down which lines each of them reaches. A mutant then
meets the tests that reach its statement, the fastest first, and last those that start processes, whose lines are not seen; the first
failure ends it. Each meets them in a fork of one process that has collected all tests, with the broken function's code in the place of
the whole one. Statements of a module, outside functions and classes, are left out: nothing can be imported without them. Prints the
survivors and the count.
"""

import argparse
import ast
import contextlib
import copy
import importlib
import inspect
import json
import os
import signal
import sys
import tempfile
import time
import types
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = ("outer.py", "base.py", "engine.py", "gossip.py", "buckets.py", "inner.py")
STATEMENTS = ("removed", "returns None", "condition negated")
LONG = ["test_optimizer_overlap.py", "test_overlap.py", "test_layouts.py"]  # they all start processes
STARTS = "processes.py"  # of tests/support, which starts them
BROKEN = 3  # the exit code where a mutant could not be planted
SECONDS = 300  # a test that takes longer hangs, and has noticed; of one whose time is known, TIMES that and ten seconds
TIMES = 20
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Mod: ast.Mult,
         ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}  # fmt: skip


def places(tree: ast.AST):
    """(kind, lines of the statement, line, node, change) of every mutant: the node by its place in ast.walk, the change to make to it in a
    copy of the tree."""
    lines = {}
    for node in ast.walk(tree):  # from the outside in
        if isinstance(node, ast.stmt):
            last = node.body[0].lineno - 1 if hasattr(node, "body") else node.end_lineno
            lines |= {id(part): range(node.lineno, max(last, node.lineno) + 1) for part in ast.walk(node)}
    for index, node in enumerate(ast.walk(tree)):
        own, line = lines.get(id(node), ()), getattr(node, "lineno", 0)
        call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        annotated = isinstance(node, ast.AnnAssign) and node.value is not None
        if call or annotated or isinstance(node, (ast.Assign, ast.AugAssign, ast.Raise)):
            yield "removed", own, line, index, _blank
        elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) not in ("None", "False"):  # one condition
            yield "returns None", own, line, index, _none
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
            yield "condition negated", own, line, index, lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
            yield "operator swapped", own, line, index, lambda n: setattr(n, "op", SWAPS[type(n.op)]())
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            yield "comparison swapped", own, line, index, lambda n: n.ops.__setitem__(0, SWAPS[type(n.ops[0])]())
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield "number + 1", own, line, index, lambda n: setattr(n, "value", n.value + 1)
        elif isinstance(node, ast.Constant) and type(node.value) is bool:
            yield "boolean negated", own, line, index, lambda n: setattr(n, "value", not n.value)


def _never(value: ast.expr) -> ast.Lambda:
    """A function that nobody calls: the value's names stay, so that the code still fits into its function's closure."""
    return ast.Lambda(ast.arguments([], [], None, [], [], None, []), value)


def _none(node: ast.Return) -> None:
    node.value = ast.BoolOp(ast.And(), [_never(node.value), ast.Constant(None)])


def _blank(node):
    """An expression without effect in the statement's place."""
    value = (node.exc if isinstance(node, ast.Raise) else node.value) or ast.Constant(0)
    place = {k: v for k, v in node.__dict__.items() if k.endswith(("lineno", "offset"))}
    node.__class__, node.__dict__ = ast.Expr, place | {"value": _never(value)}


def mutants(name: str):
    """(its text for people, the file, the statement's lines, the broken tree)."""
    source = (ROOT / "slowmo" / name).read_text()
    tree = ast.parse(source)
    inside = {
        line
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        for line in range(node.lineno, node.end_lineno + 1)
    }
    for kind, lines, line, index, change in places(tree):
        if line in inside:
            broken = copy.deepcopy(tree)
            change(list(ast.walk(broken))[index])
            text = f"{name}:{line} {kind}: {source.splitlines()[line - 1].strip()[:90]}"
            yield text, name, lines, ast.fix_missing_locations(broken)


def plant(name: str, lines, tree: ast.AST) -> None:
    """Put the broken code into the module as it is imported: into the function that holds these lines, or take a class's attribute away."""
    owner, body, path = importlib.import_module(f"slowmo.{name[:-3]}"), tree.body, []
    while True:
        node = next(node for node in body if lines[0] in range(_first(node), node.end_lineno + 1))
        if not isinstance(node, ast.ClassDef):
            break
        owner, body, path = getattr(owner, node.name), node.body, [*path, node.name]
    if isinstance(node, ast.FunctionDef):
        whole = inspect.getattr_static(owner, node.name)
        whole = inspect.unwrap(whole.fget if isinstance(whole, property) else whole)
        whole.__code__ = _code(compile(tree, whole.__code__.co_filename, "exec"), ".".join([*path, node.name]))
    else:  # a statement of a class, of which the tree has kept the place alone
        whole = ast.walk(ast.parse((ROOT / "slowmo" / name).read_text()))
        taken = next(part for part in whole if isinstance(part, (ast.Assign, ast.AnnAssign)) and part.lineno == node.lineno)
        delattr(owner, ast.unparse(taken.targets[0] if isinstance(taken, ast.Assign) else taken.target))


def _first(node) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])


def _code(code: types.CodeType, qualname: str) -> types.CodeType | None:
    """The code object of this name, somewhere inside."""
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            found = part if part.co_qualname == qualname else _code(part, qualname)
            if found:
                return found
    return None


class Mutation:
    """A plugin of pytest that meets mutants instead of running what was collected."""

    def __init__(self, found: list, before: int, jobs: int):
        self.found, self.before, self.jobs, self.alive, self.limits = found, before, jobs, [], {}

    def pytest_runtestloop(self, session) -> bool:
        long = [item for item in session.items if item.path.name in LONG]
        quick = {item.nodeid: item for item in session.items if item.path.name not in LONG}
        tests, starting = self._reached(list(quick.values()))
        total, reaching = self.before + len(self.found), {test for some in tests.values() for test in some}
        print(f"{total} mutants; {len(reaching)} tests reach the engine, {len(starting) + len(long)} start processes", flush=True)
        waiting, running = list(enumerate(self.found, self.before + 1)), {}
        while waiting or running:
            while waiting and len(running) < self.jobs:
                number, mutant = waiting.pop(0)
                _, name, lines, _ = mutant
                order = [test for line in lines for test in tests[name, line]] or [*quick]  # of a class: read at import
                items = [*(quick[test] for test in dict.fromkeys([*order, *starting])), *long]
                child = fork(lambda items=items, broken=mutant[1:]: _meets(items, self.limits, *broken))
                running[child] = number, mutant
            time.sleep(0.01)
            for child, (number, mutant) in list(running.items()):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    del running[child]
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child, signal.SIGKILL)  # what a test has started
                    survived = status == 0
                    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == BROKEN:
                        sys.exit(f"error: this mutant does not fit into its module: {mutant[0]}")
                    print(f"{number}/{total} {'SURVIVED' if survived else 'noticed '} {mutant[0]}", flush=True)
                    self.alive += [mutant[0]] if survived else []
        return True

    def _reached(self, items: list) -> tuple[dict[tuple[str, int], list[str]], list[str]]:
        """(of each line of the engine the quick tests that reach it, those that start processes), the fastest first."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "reached.json"
            _, status = os.waitpid(fork(lambda: 0 * path.write_text(json.dumps(_watched(items)))), 0)
            if status:
                sys.exit("error: the tests fail as they are: pytest tests/slowmo")
            found = json.loads(path.read_text())
        self.limits = {test: 10 + int(TIMES * facts["seconds"]) for test, facts in found.items()}
        tests, order = defaultdict(list), sorted(found, key=lambda test: found[test]["seconds"])
        for test in order:
            for name, lines in found[test]["lines"].items():
                for line in lines:
                    tests[name, line].append(test)
        return tests, [test for test in order if STARTS in found[test]["lines"]]


def fork(work) -> int:
    """A silent child in a process group of its own that ends with the exit code `work()`, or 1 where that raises."""
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setpgrp()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            code = work()
        finally:
            os._exit(code)
    return child


def _meets(items: list, limits: dict[str, int], name: str, lines, tree: ast.AST) -> int:
    """0 where every test passes with this mutant."""
    try:
        plant(name, lines, tree)
    except Exception:
        return BROKEN
    return 0 if _pass(items, limits) else 1


def _pass(items: list, limits: dict[str, int]) -> bool:
    from _pytest.runner import runtestprotocol

    for item, following in zip(items, [*items[1:], None]):
        signal.alarm(limits.get(item.nodeid, SECONDS))  # which ends this process
        if any(report.failed for report in runtestprotocol(item, log=False, nextitem=following)):
            return False
    return True


def _watched(items: list) -> dict[str, dict]:
    import coverage

    seen = [f"{ROOT}/slowmo/{name}" for name in FILES] + [f"{ROOT}/tests/support/{STARTS}"]
    watch, found = coverage.Coverage(data_file=None, config_file=False, include=seen), {}
    for item in items:
        begun = time.monotonic()
        watch.erase()
        watch.start()
        passes = _pass([item], {})
        watch.stop()
        if not passes:
            raise AssertionError(item.nodeid)
        data = watch.get_data()
        lines = {Path(path).name: data.lines(path) for path in data.measured_files()}
        found[item.nodeid] = {"seconds": time.monotonic() - begun, "lines": lines}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[""], help="mutants whose name starts so")
    parser.add_argument("--start", type=int, default=1, help="go on from this number of the list")
    parser.add_argument("--every", type=int, default=1, help="each k-th of them: a sample")
    parser.add_argument("--all", action="store_true", help="operators and numbers too, not statements alone")
    options = parser.parse_args()
    import pytest

    os.chdir(ROOT)
    found = [mutant for name in FILES for mutant in mutants(name) if mutant[0].startswith(tuple(options.only))]
    found = [mutant for mutant in found if options.all or any(f" {kind}:" in mutant[0] for kind in STATEMENTS)]
    found = found[:: options.every]
    before, found = options.start - 1, found[options.start - 1 :]
    plugin = Mutation(found, before, options.jobs)
    pytest.main(["-q", "-n", "0", "-s", "-p", "no:cacheprovider", "tests/slowmo"], [plugin])
    print(f"{len(found) - len(plugin.alive)} of {len(found)} mutants noticed")
    print(*plugin.alive, sep="\n")


if __name__ == "__main__":
    main()
