"""Break each statement of the engine (outer.py, base.py, buckets.py, inner.py) in turn; a test must notice.

    python scripts/mutation.py [--jobs 1] [--only outer.py:40] [--start 1] [--every 1] [--all]

A mutant removes a statement, negates a condition or returns None; with --all also swaps + and -, * and /, < and <=, negates a truth
value or adds 1 to a number. First the quick tests run once and coverage.py writes down which lines each of them reaches. A mutant then
meets the tests that reach its statement, the fastest first, and last the tests of several processes, whose lines are not seen; the first
failure ends it. Prints the survivors and the count.
"""

import argparse
import ast
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = ("outer.py", "base.py", "buckets.py", "inner.py")
STATEMENTS = ("removed", "returns None", "condition negated")
SEVERAL = ["test_optimizer_overlap.py", "test_overlap.py", "test_layouts.py"]
QUICK = [path.name for path in sorted((ROOT / "tests/slowmo").glob("test_*.py")) if path.name not in SEVERAL]
FEW = 15  # tests that a mutant meets first: pytest imports all files of a call before it runs one
SECONDS = 300  # a call of pytest that takes longer hangs
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
        if call or isinstance(node, (ast.Assign, ast.AugAssign, ast.Raise)):
            yield "removed", own, line, index, _blank
        elif isinstance(node, ast.Return) and node.value is not None:
            yield "returns None", own, line, index, lambda n: setattr(n, "value", ast.Constant(None))
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


def _blank(node):
    """An expression without effect in the statement's place."""
    place = {k: v for k, v in node.__dict__.items() if k.endswith(("lineno", "offset"))}
    node.__class__, node.__dict__ = ast.Expr, place | {"value": ast.Constant(0)}


def mutants(name: str):
    """(its text for people, the file, the statement's lines, the broken source)."""
    source = (ROOT / "slowmo" / name).read_text()
    tree = ast.parse(source)
    for kind, lines, line, index, change in places(tree):
        broken = copy.deepcopy(tree)
        change(list(ast.walk(broken))[index])
        text = ast.unparse(ast.fix_missing_locations(broken))
        if text != ast.unparse(tree):
            yield f"{name}:{line} {kind}: {source.splitlines()[line - 1].strip()[:90]}", name, lines, text


def copied(folder: Path) -> None:
    """What git knows of, as it is now."""
    for path in subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)


def reached() -> dict[tuple[str, int], list[str]]:
    """Of each line of the engine the quick tests that reach it, the fastest first."""
    with tempfile.TemporaryDirectory() as folder:
        copied(Path(folder))
        child = get_context("fork").Process(target=_watch, args=(folder,))
        child.start()
        child.join()
        if child.exitcode:
            sys.exit("error: the tests fail as they are: pytest tests/slowmo")
        found = json.loads((Path(folder) / "reached.json").read_text())
    tests = defaultdict(list)
    for test in sorted(found, key=lambda test: found[test]["seconds"]):
        for name, lines in found[test]["lines"].items():
            for line in lines:
                tests[name, line].append(test)
    return tests


def _watch(folder: str) -> None:
    import coverage
    import pytest

    watch, found = coverage.Coverage(data_file=None, config_file=False, include=[f"{folder}/slowmo/{name}" for name in FILES]), {}

    class Each:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item, nextitem):
            begun = time.monotonic()
            watch.erase()
            watch.start()
            result = yield
            watch.stop()
            data = watch.get_data()
            lines = {Path(path).name: data.lines(path) for path in data.measured_files()}
            found[item.nodeid] = {"seconds": time.monotonic() - begun, "lines": lines}
            return result

    code = _pytest(folder, [f"tests/slowmo/{name}" for name in QUICK], [Each()])
    (Path(folder) / "reached.json").write_text(json.dumps(found))
    os._exit(int(code))


def survives(mutant, tests: list[str]) -> bool:
    """Whether every test passes with this mutant in place of its file. tests: those that reach it."""
    _, name, _, text = mutant
    with tempfile.TemporaryDirectory() as folder:
        copied(Path(folder))
        (Path(folder) / "slowmo" / name).write_text(text)
        for suite in (tests[:FEW], tests[FEW:], [f"tests/slowmo/{other}" for other in SEVERAL]):
            if not suite:
                continue
            child = get_context("fork").Process(target=lambda suite=suite: os._exit(int(_pytest(folder, suite))))
            child.start()
            child.join(SECONDS)  # a mutant that hangs is noticed
            if child.is_alive():
                child.kill()
                child.join()
            if child.exitcode:
                return False
        return True


def _pytest(folder: str, suite: list[str], plugins=()) -> int:
    os.chdir(folder)
    sys.path[:] = [folder, *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "scripts"))]
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    import pytest

    return pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *suite], plugins)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="mutants whose name starts so")
    parser.add_argument("--start", type=int, default=1, help="go on from this number of the list")
    parser.add_argument("--every", type=int, default=1, help="each k-th of them: a sample")
    parser.add_argument("--all", action="store_true", help="operators and numbers too, not statements alone")
    options = parser.parse_args()
    # what the tests import and the mutants do not touch, once for all children
    import hydra  # noqa: F401
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch.distributed.checkpoint.state_dict  # noqa: F401

    torch.set_num_threads(1)
    found = [mutant for name in FILES for mutant in mutants(name) if mutant[0].startswith(options.only)]
    found = [mutant for mutant in found if options.all or any(f" {kind}:" in mutant[0] for kind in STATEMENTS)]
    found = found[:: options.every]
    total, found = len(found), found[options.start - 1 :]
    tests = reached()
    print(f"{total} mutants; {len({test for some in tests.values() for test in some})} tests reach the engine", flush=True)

    def noticed(mutant) -> bool:
        _, name, lines, _ = mutant
        order = dict.fromkeys(test for line in lines for test in tests[name, line])
        return not survives(mutant, list(order))

    alive = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for number, (mutant, good) in enumerate(zip(found, pool.map(noticed, found)), total - len(found) + 1):
            print(f"{number}/{total} {'noticed ' if good else 'SURVIVED'} {mutant[0]}", flush=True)
            alive += [] if good else [mutant[0]]
    print(f"{len(found) - len(alive)} of {len(found)} mutants noticed")
    print(*alive, sep="\n")


if __name__ == "__main__":
    main()
