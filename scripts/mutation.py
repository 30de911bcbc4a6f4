"""Break each statement of the engine (outer.py, base.py, buckets.py, inner.py) in turn; a test must notice.

    python scripts/mutation.py [--jobs 1] [--only outer.py:40] [--start 1] [--every 1] [--all]

A mutant removes a statement, negates a condition or returns None; with --all also swaps + and -, * and /, < and <=, negates a truth
value or adds 1 to a number. The quick tests run first, the first failure ends a mutant. Prints the survivors and the count.
"""

import argparse
import ast
import copy
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = ("outer.py", "base.py", "buckets.py", "inner.py")
STATEMENTS = ("removed", "returns None", "condition negated")
# what finds most of a file's mutants comes first, on its own: pytest imports all files of a call before it runs one. Then the others
FIRST = {
    "outer.py": ["test_lean.py", "test_outer.py"],
    "base.py": ["test_lean.py", "test_base.py"],
    "buckets.py": ["test_lean.py", "test_buckets.py"],
    "inner.py": ["test_lean.py", "test_inner.py"],
}
THEN = (
    ["test_golden.py", "test_outer.py", "test_base.py", "test_inner.py"],
    ["test_buckets.py", "test_overlap.py", "test_replicas.py", "test_state.py", "test_layouts.py"],
    ["test_optimizer_silent.py", "test_optimizer.py", "test_optimizer_overlap.py"],
)
SECONDS = 300  # a call of pytest that takes longer hangs; the longest took 170 on two busy cores
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Mod: ast.Mult,
         ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}  # fmt: skip


def places(tree: ast.AST):
    """(kind, line, node, change) of every mutant: the node by its place in ast.walk, the change to make to it in a copy of the tree."""
    for index, node in enumerate(ast.walk(tree)):
        line = getattr(node, "lineno", 0)
        call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        if call or isinstance(node, (ast.Assign, ast.AugAssign, ast.Raise)):
            yield "removed", line, index, _blank
        elif isinstance(node, ast.Return) and node.value is not None:
            yield "returns None", line, index, lambda n: setattr(n, "value", ast.Constant(None))
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
            yield "condition negated", line, index, lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
            yield "operator swapped", line, index, lambda n: setattr(n, "op", SWAPS[type(n.op)]())
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            yield "comparison swapped", line, index, lambda n: n.ops.__setitem__(0, SWAPS[type(n.ops[0])]())
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield "number + 1", line, index, lambda n: setattr(n, "value", n.value + 1)
        elif isinstance(node, ast.Constant) and type(node.value) is bool:
            yield "boolean negated", line, index, lambda n: setattr(n, "value", not n.value)


def _blank(node):
    """An expression without effect in the statement's place."""
    place = {k: v for k, v in node.__dict__.items() if k.endswith(("lineno", "offset"))}
    node.__class__, node.__dict__ = ast.Expr, place | {"value": ast.Constant(0)}


def mutants(name: str):
    source = (ROOT / "slowmo" / name).read_text()
    tree = ast.parse(source)
    for kind, line, index, change in places(tree):
        broken = copy.deepcopy(tree)
        change(list(ast.walk(broken))[index])
        text = ast.unparse(ast.fix_missing_locations(broken))
        if text != ast.unparse(tree):
            yield f"{name}:{line} {kind}: {source.splitlines()[line - 1].strip()[:90]}", name, text


def survives(mutant) -> bool:
    """Whether every test passes with this mutant in place of its file."""
    _, name, text = mutant
    with tempfile.TemporaryDirectory() as folder:
        for part in ("slowmo", "experiments", "tests", "configs"):
            shutil.copytree(ROOT / part, Path(folder) / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "run.py", folder)
        shutil.copy(ROOT / "pyproject.toml", folder)
        (Path(folder) / "slowmo" / name).write_text(text)
        first = FIRST[name]
        for suite in (first, *([test for test in part if test not in first] for part in THEN)):
            child = get_context("fork").Process(target=_test, args=(folder, suite))
            child.start()
            child.join(SECONDS)  # a mutant that hangs is noticed
            if child.is_alive():
                child.kill()
                child.join()
            if child.exitcode:
                return False
        return True


def _test(folder, suite):
    os.chdir(folder)
    sys.path[:] = [folder, *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "scripts"))]
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    import pytest

    code = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *(f"tests/slowmo/{name}" for name in suite)])
    os._exit(int(code))


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

    torch.set_num_threads(1)
    found = [mutant for name in FILES for mutant in mutants(name) if mutant[0].startswith(options.only)]
    found = [mutant for mutant in found if options.all or any(f" {kind}:" in mutant[0] for kind in STATEMENTS)]
    found = found[:: options.every]
    total, found = len(found), found[options.start - 1 :]
    alive = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for number, (mutant, survived) in enumerate(zip(found, pool.map(survives, found)), options.start):
            print(f"{number}/{total} {'SURVIVED' if survived else 'noticed '} {mutant[0]}", flush=True)
            alive += [mutant[0]] * survived
    print(f"{len(found) - len(alive)} of {len(found)} mutants noticed")
    print(*alive, sep="\n")


if __name__ == "__main__":
    main()
