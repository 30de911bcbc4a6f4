"""README.md and docs/ keep their word: programs run, commands are ones that these parsers and configs accept, links lead somewhere."""

import argparse
import ast
import importlib
import importlib.util
import inspect
import os
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from pathlib import Path

import hydra
import pytest
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from processes import spawn

import slowmo
from experiments.runner import cli, config

ROOT = Path(__file__).parent.parent
OWN = ROOT / "examples" / "own"
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
LIBRARY = (ROOT / "docs" / "library.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
PROGRAMS = {
    f"{page.stem} {k}": text
    for page in PAGES
    for k, text in enumerate((text for kind, text in FENCE.findall(page.read_text()) if kind == "python"), 1)
}
COMMANDS = {
    f"{page.name}: {line}": line
    for page in TEXTS for kind, text in FENCE.findall(page.read_text()) if kind == "bash" for line in text.splitlines()
}  # fmt: skip
COMMANDS |= {
    f"{page.name}: {line}": line
    for page in TEXTS for line in re.findall(r"`((?:python|make|\.venv/bin|scripts/\S+\.sh) [^`]+)`", FENCE.sub("", page.read_text()))
    if "NAME" not in line and "key=value" not in line
}  # fmt: skip
# what somebody who uses slowmo.SlowMo, or the objects underneath, may meet
MODULES = ("optimizer", "inner", "replicas", "buckets", "base", "engine", "gossip", "outer", "cluster", "topology", "state")


# ---- programs


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs(name, ranks, tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(PROGRAMS[name])
    if ranks > 1:
        assert spawn(run_in, ranks, tmp_path) == [None] * ranks
        return
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        runpy.run_path("program.py")


def run_in(folder):
    os.chdir(folder)
    runpy.run_path("program.py")


def test_every_block_is_checked():
    """Python, commands, or plain text that nobody is to type."""
    kinds = {(page.name, kind) for page in TEXTS for kind, _ in FENCE.findall(page.read_text())}
    assert {kind for _, kind in kinds} <= {"python", "bash", "text", "bibtex"}
    assert {page for page, kind in kinds if kind == "python"} == {"README.md", "library.md"}  # the README's: see test_readme.py
    assert len(PROGRAMS) == 3 and len(COMMANDS) > 50


# ---- commands


class Accepted(Exception):
    """A parser has taken the words; nothing is done with them."""


@pytest.mark.parametrize("name", COMMANDS, ids=str)
def test_a_command_is_accepted(name, monkeypatch):
    def parse(parser, words=None, namespace=None):
        whole(parser, words, namespace)
        raise Accepted

    whole = argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "path", [str(ROOT), str(OWN), *sys.path])
        line = COMMANDS[name]
        found = re.fullmatch(r'eval "\$\((.*)\)"', line)
        for part in (found[1] if found else line).split(" && "):
            accept(shlex.split(part, comments=True), patch)


def accept(words, patch):
    """AssertionError, or the parser's own end, for what nobody could run."""
    words = words[words[:1] == ["sudo"] :]
    match words:
        case ["python", "run.py", *rest]:
            compose(rest)
        case ["torchrun", *rest]:
            compose(rest[rest.index("run.py") + 1 :])
        case ["python", "-m", "benchmarks.table2", *rest]:
            with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
                hydra.compose("table2", rest)
        case ["python", "-m", module, *rest]:
            package = importlib.util.find_spec(module).submodule_search_locations
            parsed(importlib.import_module(f"{module}.__main__" if package else module), rest, patch)
        case ["python", script, *rest]:
            specification = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
            module = importlib.util.module_from_spec(specification)
            patch.setitem(sys.modules, module.__name__, module)
            specification.loader.exec_module(module)
            parsed(module, rest, patch)
        case [".venv/bin/python", "-m", "pytest", *rest]:
            known = {text.partition(":")[0] for text in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
            assert not rest or "-m" not in rest or rest[rest.index("-m") + 1] in known
            assert all((ROOT / word).exists() for word in rest if word.startswith("tests/"))
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
        case ["pip", "install", *rest]:
            extras = [extra for word in rest for extra in re.findall(r"\[([\w,]+)\]", word)]
            assert {name for extra in extras for name in extra.split(",")} <= set(PYPROJECT["project"]["optional-dependencies"])
        case [script, *_] if script.endswith(".sh"):
            assert os.access(ROOT / script, os.X_OK)
        case ["export", assignment]:
            assert assignment == f"PYTHONPATH={OWN.relative_to(ROOT)}"
        case ["jupyter-execute", "--inplace", pattern]:
            assert list(ROOT.glob(pattern))
        case ["git", "clone", *_] | ["cd", _] | ["source", ".venv/bin/activate"] | ["conda", "env", "create", "-f", "environment.yml"]:
            pass
        case _:
            raise AssertionError(f"nobody checks {' '.join(words)}")


def parsed(module, words, patch):
    patch.setattr(sys, "argv", ["program", *words])
    if "argparse" in module.__dict__:
        with pytest.raises(Accepted):
            module.main()
    else:
        assert not words


def compose(words):
    """As run.py does it, short of building anything: the first and the last job of a sweep."""
    args = get_args_parser().parse_intermixed_args(words)
    if not words or args.help or args.shell_completion:
        return
    assert args.config_dir is None or (ROOT / args.config_dir).is_dir()
    jobs = cli.expand(words) or [args.overrides]
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        if args.config_dir:
            GlobalHydra.instance().config_loader().get_search_path().prepend("own", f"file://{ROOT / args.config_dir}")
        for job in (jobs[0], jobs[-1]):
            config.check(config.compose([word for word in job if not word.startswith("--")]))


# ---- what pages say about the code


def messages() -> list[str]:
    """Of each error that these modules raise: its text, with `...` where values stand."""
    found = []
    for module in MODULES:
        for node in ast.walk(ast.parse((ROOT / "slowmo" / f"{module}.py").read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                (text,) = node.exc.args
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                found.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in parts))
    return found


def test_every_error_is_listed_and_every_listed_error_exists():
    section = re.search(r"## Errors\n(.*?)\n## ", LIBRARY, re.S)[1]
    told = [part for line in section.splitlines() if line.startswith("- ") for part in re.findall(r"`([^`]+)`", line.split(": ")[0])]
    told += [part for line in section.splitlines() for part in re.findall(r"\. (?:[A-Z][a-z ]+: )?`([^`]+)`", line)]
    raised = messages()
    assert len(raised) > 40
    assert not [text for text in raised if not any(part in text for part in told)]
    assert not [part for part in told if not any(part in text for text in raised)]


def first_cells(page: str, head: str) -> list[list[str]]:
    """Of the table below `head`: the words in backticks of each line's first cell."""
    table = re.search(rf"\| {re.escape(head)} \|.*?\n\n", (ROOT / "docs" / page).read_text(), re.S)[0]
    return [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in table.splitlines()[2:] if line]


def test_the_table_has_every_parameter():
    names = [name for name in inspect.signature(slowmo.SlowMo).parameters if name not in ("model", "optimizer")]
    assert sum(first_cells("library.md", "parameter"), []) == names


def test_every_family_of_experiments_is_described():
    shapes = {f"{path.stem}_*" for path in (ROOT / "configs/experiment/shape").glob("*.yaml")}
    assert set(sum(first_cells("experiments.md", "family"), [])) == shapes


def test_every_option_and_only_real_keys_are_described():
    text = (ROOT / "docs/configuration.md").read_text()
    for group in ("base", "base/graph", "outer", "optimizer", "schedule", "launch", "logger", "task"):
        (line,) = (line for line in text.splitlines() if re.match(rf"\| `{group}`[, ].*\|", line))
        options = {path.stem for path in (ROOT / "configs" / group).glob("*.yaml")}
        assert options <= set(re.findall(r"`([^`]+)`", line)), group
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        known = config.flat(config.compose(["base=sgp", "task=cifar10", "steps=1"]).cfg)
    assert not [key for key in sum(first_cells("configuration.md", "key"), []) if key not in known]


def test_every_marker_is_described():
    markers = {text.partition(":")[0] for text in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert set(sum(first_cells("development.md", "marker"), [])) == markers


# ---- links and files


def headings(page: Path) -> set[str]:
    """The anchors of a page, as code hosts and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_every_page_is_found_from_the_first():
    linked = set(re.findall(r"\]\((\S+\.md)\)", (ROOT / "docs/index.md").read_text()))
    assert linked == {page.name for page in PAGES if page.name != "index.md"}
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert all(page.name in navigation for page in PAGES)


def test_the_site_is_built_without_a_warning(tmp_path):
    build, load = (pytest.importorskip(f"mkdocs.{name}") for name in ("commands.build", "config"))
    loaded = load.load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path))
    loaded.plugins.on_startup(command="build", dirty=False)
    build.build(loaded)  # raises for a warning
    loop = (tmp_path / "library/index.html").read_text()
    assert "repository/examples/loop.py.txt" in loop and (tmp_path / "repository/examples/loop.py.txt").exists()
    assert "push-sum" in (tmp_path / "api/index.html").read_text()  # docstrings are there


def test_the_citation_is_whole():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert found["version"] == PYPROJECT["project"]["version"] and found["cff-version"] == "1.2.0"
    paper = found["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Wang", "Tantia", "Ballas", "Rabbat"] and paper["year"] == 2020
