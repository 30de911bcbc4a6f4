"""The LibreOffice pairs: cleaning, the split, the files as fairseq reads them, and where the packages come from."""

import itertools
import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest

from experiments.data import libreoffice

ROOT = Path(__file__).parents[2]
HELP, CATALOGUES = "usr/share/libreoffice/help", "usr/lib/libreoffice/program/resource/de/LC_MESSAGES"
absent = [module for module in libreoffice.MODULES if libreoffice.importlib.util.find_spec(module) is None]
needs_extra = pytest.mark.skipif(bool(absent), reason=f"the wmt16 extra is not installed ({absent})")
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")

VERBS = [("Opens", "Öffnet"), ("Closes", "Schließt"), ("Prints", "Druckt"), ("Shows", "Zeigt"), ("Hides", "Verbirgt"),
         ("Moves", "Verschiebt")]  # fmt: skip
NOUNS = [("table", "die Tabelle"), ("chart", "das Diagramm"), ("page", "die Seite"), ("key", "den Schlüssel"), ("window", "das Fenster")]
PLACES = [("menu", "Menü"), ("dialog", "Dialog"), ("header", "Seitenkopf"), ("footer", "Seitenfuß"), ("list", "Verzeichnis")]
SENTENCES = [(f"{verb[0]} the {noun[0]} of the {place[0]}.", f"{verb[1]} {noun[1]} aus „{place[1]}“.")
             for verb, noun, place in itertools.product(VERBS, NOUNS, PLACES)]  # fmt: skip
MESSAGES = [("STR_A\4~Open the key %1", "Schlüssel %1 ö~ffnen"), ("STR_B\4Open key %PRODUCTNAME now", "Den Schlüssel PLACEHOLDER öffnen"),
            ("a|b\4_Show key %2 now", "Schlüssel %2 ö_ffnen"), ("STR_C\4Do open the key $(ARG1)", "schlüssel $(ARG1) öffnen!")]  # fmt: skip


def catalogue(messages, order="<"):
    """The bytes of a gettext .mo file, as msgfmt writes it."""
    sides = [[text.encode() for text in side] for side in zip(*sorted([("", "Language: de\n"), *messages]), strict=True)]
    count, offset, tables, strings = len(messages) + 1, 28 + 16 * (len(messages) + 1), b"", b""
    for text in itertools.chain(*sides):
        tables += struct.pack(f"{order}2I", len(text), offset + len(strings))
        strings += text + b"\0"
    return struct.pack(f"{order}7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, offset) + tables + strings


def write_tree(folder, names=libreoffice.PACKAGES):
    """What is in the three packages, a folder each."""
    for package, language, side in (("libreoffice-help-en-us", "en-US", 0), ("libreoffice-help-de", "de", 1)):
        if package in names:
            for n in range(3):
                page = folder / package / HELP / language / f"text/swriter/{n:02}.html"
                page.parent.mkdir(parents=True, exist_ok=True)
                texts = "".join(f'<p id="par_id{i}" class="paragraph" dir="auto">{pair[side]}</p>\n'
                                for i, pair in enumerate(SENTENCES) if i % 3 == n)  # fmt: skip
                page.write_text(f"<html><body>{texts}</body></html>", encoding="utf-8")
    if "libreoffice-l10n-de" in names:
        path = folder / "libreoffice-l10n-de" / CATALOGUES / "sw.mo"
        path.parent.mkdir(parents=True)
        path.write_bytes(catalogue(MESSAGES))
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def debs(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("debs")
    for name in libreoffice.PACKAGES:
        content = folder / name
        shutil.copytree(tree / name, content)
        (content / "DEBIAN").mkdir()
        (content / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: 4:7.4.7-1\nArchitecture: all\nMaintainer: A B <a@b.c>\nDescription: a small one\n")
        subprocess.run(["dpkg-deb", "--root-owner-group", "--build", content, folder / f"{name}_4%3a7.4.7-1_all.deb"],
                       check=True, capture_output=True)  # fmt: skip
        shutil.rmtree(content)
    return folder


@pytest.fixture(scope="module")
def made(tree, tmp_path_factory):
    return libreoffice.make(tmp_path_factory.mktemp("made"), vocabulary=80, packages=str(tree))


@pytest.fixture
def quick(monkeypatch):
    """The set takes no time to make, and counts how often it was."""
    calls = []

    def write(out, scratch, folder, about):
        calls.append(about)
        (out / "data-bin").mkdir(parents=True)

    monkeypatch.setattr(libreoffice, "_make", write)
    monkeypatch.setattr(libreoffice, "MODULES", {})
    monkeypatch.setattr(libreoffice.importlib.metadata, "version", lambda name: "1.0")
    return calls


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_paragraphs():
    switch = ('<span id="s" class="switchinline"><span hidden="true" id="{0}1" class="{0}"><span class="keycode">Command</span>+F9</span>'
              '<span hidden="true" id="default1"><span class="keycode">Ctrl+F9</span></span></span>')  # fmt: skip
    page = f"""<title>Not this</title><h1 id="hd_1" dir="auto"><a name="x"></a>Keys &amp;
        more</h1><p id="1" class="paragraph">Press {switch.format("MAC")}, then&nbsp;<span class="emph">OK</span>.</p>
        <p id="2">In {switch.format("WRITER")} only.</p><p dir="auto">No id.</p><p id="code1" class="code">x = 1</p><pre>y</pre>
        <div><p id="3">Sei\u00ADten<br>zahl &uuml;ber u\u0308<img src="a.png"></p></div><p id="1">Again.</p><p id="4"></p>"""
    assert libreoffice.paragraphs(page) == {
        "hd_1": "Keys & more", "1": "Press Ctrl+F9, then OK.", "3": "Seiten zahl über ü", "4": ""}  # fmt: skip


@pytest.mark.parametrize(("context", "text", "expected"), [
    ("STR_X", "~Open Ob~ject", "Open Object"),
    ("STR_X", "Ig_nore ~~ here", "Ig_nore ~~ here"),
    ("menu|open", "Po_wer & _Änderung", "Po_wer & _Änderung"),  # two underscores: no mnemonic
    ("menu|open", "Größe _ändern", "Größe ändern"),
    ("menu|extended_tip|open", "An sal_Int8 or (_)", "An sal_Int8 or (_)"),
    ("", "&File in&out R & D", "File in&out R & D"),
    ("", "%PRODUCTNAME-Hilfe, %1 of %2%, '%NAME%', %{link}", "¤-Hilfe, ¤ of ¤, '¤', ¤"),
    ("", "$(ARG1) $1 $name$ '$#$' #lib# <wizard_name> %1custom%2", "¤ ¤ ¤ '¤' ¤ ¤ ¤custom¤"),
    ("", "50% is 20 % of #9 <All> C#", "50% is 20 % of #9 <All> C#"),
    ("", "Not created.<BR>Is there\n\tspace?", "Not created. Is there space?"),
])  # fmt: skip
def test_message(context, text, expected):
    assert libreoffice.message(text, context) == expected.replace("¤", "PLACEHOLDER")


@pytest.mark.parametrize("order", "<>")
def test_messages_of_a_catalogue(order):
    raw = catalogue([("c|d\4_Size\0_Sizes", "_Größe\0_Größen"), ("Plain text", "Reiner Text")], order)
    assert sorted(libreoffice.messages(raw)) == [("Plain text", "Reiner Text"), ("Size", "Größe")]
    for damaged in (raw[:40], b"no catalogue", raw[:28] + b"\xff" * 16 + raw[44:]):
        with pytest.raises(ValueError, match="a.mo is no gettext catalogue.*anew"):
            libreoffice.messages(damaged, "a.mo")


def test_normal():
    same = ["Öffnet 3.14 „Straße“!", "öffnet 27 STRASSE", "ÖFFNET 1 Straße."]
    assert {libreoffice.normal(text) for text in same} == {"öffnet 0 strasse"}
    assert libreoffice.normal("Table 1") != libreoffice.normal("Table")


@needs_extra
def test_clean():
    good = ("Open the file.", "Die Datei öffnen.")
    for bad in [("Open it", "Sie öffnen es"), ("Open the file", "Öffnen Sie"), ("word " * 13, "Wort " * 13), ("One two three", "Ein " * 8),
                ("=SUM(A1;2;34;56;7)", "=SUMME(A1;2;34;56;7)"), ("Copy and Paste", "copy AND paste!"), ("", "")]:  # fmt: skip
        assert not libreoffice.clean([bad]), bad
    kept = libreoffice.clean([good, ("OPEN the file!", "Öffnen der Datei."), ("Close the file.", good[1]), ("word " * 12, "Wort " * 12)])
    assert [pair[:2] for pair in kept[:2]] == [good, ("Close the file.", good[1])] and len(kept) == 3
    assert kept[0][2:] == ("Open the file .", "Die Datei öffnen .")  # Moses tokens
    assert libreoffice.clean([('Say "no" & go', 'Sagen Sie "nein" & los')])[0][2] == "Say &quot; no &quot; &amp; go"  # as Google's


def test_split_shares_no_text():
    pairs = [(f"source {a}{b}", f"Ziel {a}{'q' if b == 'z' else b}") for a in "abcdefgh" for b in "abcdefghpqrz"]  # z's and q's agree
    splits = libreoffice.split(pairs, 0)
    assert {name: len(part) for name, part in splits.items()} == {"train": len(pairs) - 8, "valid": 4, "test": 4}
    assert sorted(sum(splits.values(), [])) == sorted(pairs)
    for one, other in itertools.combinations(splits, 2):
        for side in (0, 1):
            left, right = ({libreoffice.normal(pair[side]) for pair in splits[name]} for name in (one, other))
            assert left and not left & right
    assert libreoffice.split(pairs, 0) == splits != libreoffice.split(pairs, 1)
    with pytest.raises(ValueError, match=r"too few(.|\n)*packages\.debian\.org"):
        libreoffice.split(pairs[:19], 0)


READ = """
import json, sys
from fairseq.data import Dictionary, data_utils
folder = sys.argv[1]
words = {language: Dictionary.load(f"{folder}/dict.{language}.txt") for language in ("en", "de")}
assert words["en"] == words["de"]
read = {"size": len(words["en"])}
for split in ("train", "valid", "test"):
    for language in words:
        data = data_utils.load_indexed_dataset(f"{folder}/{split}.en-de.{language}", words[language])
        assert all(row[-1] == words[language].eos() for row in data)
        read[f"{split}.{language}"] = [words[language].string(row) for row in data]
print(json.dumps(read))
"""


@needs_extra
@pytest.mark.slow
def test_fairseq_reads_the_set(made, tree):
    done = subprocess.run([sys.executable, "-c", READ, made], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout.splitlines()[-1])
    about = json.loads((made.parent / "about.json").read_text())
    assert about["dictionary"] == read["size"] and about["recipe"] == libreoffice.RECIPE and about["vocabulary"] == 80
    pairs = Counter()
    whole = {}
    for split in ("train", "valid", "test"):
        assert len(read[f"{split}.en"]) == len(read[f"{split}.de"]) == about["pairs"][split] == (140 if split == "train" else 7)
        plain = {language: [line.replace("@@ ", "") for line in read[f"{split}.{language}"]] for language in ("en", "de")}
        whole[split] = plain
        pairs.update(zip(plain["en"], plain["de"], strict=True))
        if split != "train":
            for side, language in enumerate(("en", "de")):
                raw = (made.parent / f"{split}.raw.{language}").read_text(encoding="utf-8").splitlines()
                tokenizer = libreoffice.importlib.import_module("sacremoses").MosesTokenizer(lang=language)
                # A character that is not in training becomes <unk>; there is none here.
                assert [" ".join(tokenizer.tokenize(line)) for line in raw] == plain[language]
                assert set(raw) <= {pair[side] for pair in SENTENCES} | {libreoffice.message(*reversed(text.rpartition("\4")[::2]))
                                                                         for pair in MESSAGES for text in pair}  # fmt: skip
    assert set(pairs.values()) == {1}
    assert pairs["Opens the page of the list .", "Öffnet die Seite aus „ Verzeichnis “ ."] == 1
    # Three messages have one target, so are in training; what the program fills in is one token, never cut.
    filled = [line for line in read["train.de"] if "PLACEHOLDER" in line]
    assert len(filled) >= 3 and all("PLACEHOLDER" in line.split() for line in filled)
    for language in ("en", "de"):
        held = {libreoffice.normal(line) for split in ("valid", "test") for line in whole[split][language]}
        assert len(held) == 14 and not held & {libreoffice.normal(line) for line in whole["train"][language]}
    tokens = {language: sum(len(line.split()) for line in read[f"train.{language}"]) for language in ("en", "de")}
    assert about["tokens"] == tokens
    assert any("@@" in line for line in read["train.de"]) and len((made.parent / "bpe.codes").read_text().splitlines()) == 81


@needs_extra
@needs_dpkg
@pytest.mark.slow
def test_same_bytes_twice_and_from_debs(made, tree, debs, tmp_path, capfd):
    again = libreoffice.make(tmp_path / "not" / "there", vocabulary=80, packages=str(debs))
    first, second = contents(made.parent), contents(again.parent)
    abouts = [json.loads(files.pop("about.json")) for files in (first, second)]
    assert first == second and len(first) == 2 + 12 + 1 + 4
    packages = [about.pop("packages") for about in abouts]
    assert abouts[0] == abouts[1] and list(packages[0]) == ["unpacked"]
    assert {name: about["version"] for name, about in packages[1].items()} == dict.fromkeys(libreoffice.PACKAGES, "4:7.4.7-1")
    left = sorted(path.name for path in again.parent.parent.iterdir())
    assert left == [again.parent.name, "libreoffice.lock"]  # nothing aside is left
    out, error = capfd.readouterr()
    assert error == "" and all(line.startswith("libreoffice: ") for line in out.splitlines())


def test_made_once_and_named_by_what_it_is_made_of(tree, quick, tmp_path):
    first = libreoffice.make(tmp_path, packages=str(tree))
    assert libreoffice.make(tmp_path, packages=str(tree)) == first and len(quick) == 1
    other = write_tree(tmp_path / "tree")
    path, = other.rglob("sw.mo")
    path.write_bytes(path.read_bytes().replace(b"jetzt", b"nun").replace(b"now", b"yes"))
    names = {first, libreoffice.make(tmp_path, packages=str(tree), seed=1), libreoffice.make(tmp_path, 5000, packages=str(tree)),
             libreoffice.make(tmp_path, packages=str(other))}  # fmt: skip
    assert len(names) == len(quick) == 4


@needs_extra
def test_a_failure_leaves_nothing(tree, tmp_path, monkeypatch):
    real = subprocess.run
    failing = [sys.executable, "-c", "import sys; sys.exit('no luck')"]
    monkeypatch.setattr(subprocess, "run", lambda command, **options: real(failing, **options))
    with pytest.raises(RuntimeError, match=r'fairseq-preprocess failed \(1\)(.|\n)*pip install -e "\.\[wmt16\]"(.|\n)*no luck'):
        libreoffice.make(tmp_path, vocabulary=80, packages=str(tree))
    assert [path.name for path in tmp_path.iterdir()] == ["libreoffice.lock"]


def test_what_a_killed_process_left_is_removed(tree, quick, tmp_path):
    final = libreoffice.make(tmp_path, packages=str(tree)).parent
    left, other = tmp_path / f"{final.name}.host.1.partial", tmp_path / "libreoffice-0123.host.1.partial"
    shutil.move(final, left)
    other.mkdir()
    assert libreoffice.make(tmp_path, packages=str(tree)).is_dir()
    assert not left.exists() and other.exists() and len(quick) == 2


def test_several_processes_make_it_once(tree, quick, tmp_path, monkeypatch):
    def write(out, scratch, folder, about):
        with open(tmp_path / "made", "a") as file:
            file.write("once\n")
        time.sleep(0.3)
        (out / "data-bin").mkdir(parents=True)

    monkeypatch.setattr(libreoffice, "_make", write)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=libreoffice.make, args=(tmp_path,), kwargs={"packages": str(tree)}) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0, 0] and (tmp_path / "made").read_text() == "once\n"


@pytest.mark.parametrize("arguments", [{"vocabulary": 0}, {"vocabulary": "many"}, {"seed": 0.5}])
def test_bad_arguments(arguments, tmp_path):
    with pytest.raises(ValueError, match=f"data.{next(iter(arguments))} must be"):
        libreoffice.make(tmp_path, **arguments)


@pytest.mark.parametrize("module", ["fairseq", "sacremoses", "subword_nmt"])
def test_missing_python_package_names_the_remedy(module, tmp_path, monkeypatch):
    monkeypatch.setattr(libreoffice.importlib.util, "find_spec", lambda name: None if name == module else 1)
    with pytest.raises(FileNotFoundError, match=rf'{libreoffice.MODULES[module]}; .*pip install -e "\.\[wmt16\]"'):
        libreoffice.make(tmp_path)


def test_missing_packages_name_the_remedy(quick, tmp_path):
    remedy = r"(.|\n)*".join(["", ", ".join(libreoffice.PACKAGES), r"packages\.debian\.org", r"data\.packages=FOLDER"])
    folder = tmp_path / "packages"
    with pytest.raises(FileNotFoundError, match="no folder .*packages" + remedy):
        libreoffice.make(tmp_path, packages=str(folder))
    folder.mkdir()
    for name in libreoffice.PACKAGES[:2]:
        (folder / f"{name}_1_all.deb").touch()
    with pytest.raises(FileNotFoundError, match=r"has no libreoffice-l10n-de_\*\.deb" + remedy):
        libreoffice.make(tmp_path, packages=str(folder))
    (folder / "libreoffice-l10n-de_1_all.deb").touch()
    (folder / "libreoffice-l10n-de_2_all.deb").touch()
    with pytest.raises(ValueError, match="2 versions of libreoffice-l10n-de; keep one"):
        libreoffice.make(tmp_path, packages=str(folder))


@needs_extra
def test_wrong_packages(tmp_path):
    (tmp_path / "empty").mkdir()
    help_only = write_tree(tmp_path / "help", libreoffice.PACKAGES[:2])
    mixed = write_tree(tmp_path / "mixed", libreoffice.PACKAGES[::2])
    for folder, found in ((tmp_path / "empty", "0 paragraphs.* 0 messages"), (help_only, "150 paragraphs.* 0 messages"),
                          (mixed, "0 paragraphs.* 4 messages")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{found}(.|\n)*packages\.debian\.org"):
            libreoffice.make(tmp_path / "root", packages=str(folder))
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["libreoffice.lock"]


@needs_extra
@needs_dpkg
def test_damaged_deb(debs, tmp_path, monkeypatch):
    folder = tmp_path / "debs"
    shutil.copytree(debs, folder)
    path, = folder.glob("libreoffice-help-de_*")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="libreoffice-help-de_.* does not unpack; remove it and fetch it anew"):
        libreoffice.make(tmp_path / "root", packages=str(folder))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="dpkg-deb, which unpacks.*not on this system"):
        libreoffice.make(tmp_path / "root", packages=str(folder))


def apt(folder, monkeypatch, script):
    """An apt-get that does what `script` says; its arguments are in $*."""
    path = folder / "bin" / "apt-get"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


@needs_dpkg
def test_packages_are_fetched_once(debs, quick, tmp_path, monkeypatch):
    (tmp_path / "root" / "libreoffice-packages.host.1.partial").mkdir(parents=True)  # of a process that was killed
    apt(tmp_path, monkeypatch, f"""echo "$*" >>{tmp_path}/calls
        case "$*" in
            *update) touch {tmp_path}/lists ;;
            *) [ -e {tmp_path}/lists ] || {{ echo "E: Unable to locate package" >&2; exit 100; }}; cp {debs}/*.deb . ;;
        esac""")  # fmt: skip
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(FileNotFoundError, match=r"E: Unable to locate package(.|\n)*apt-get update(.|\n)*data\.packages=FOLDER"):
        libreoffice.make(tmp_path / "root")
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["libreoffice.lock"]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    made = libreoffice.make(tmp_path / "root")
    calls = (tmp_path / "calls").read_text().splitlines()
    verbs = [next(word for word in call.split() if word in ("download", "update")) for call in calls]
    assert verbs == ["download", "download", "update", "download"]
    assert set(libreoffice.PACKAGES) <= set(calls[-1].split())
    names = sorted(unquote(path.name) for path in (tmp_path / "root" / "libreoffice-packages").iterdir())
    assert names == sorted(f"{name}_4:7.4.7-1_all.deb" for name in libreoffice.PACKAGES)
    assert libreoffice.make(tmp_path / "root") == made and libreoffice.make(tmp_path / "root", seed=1) != made
    assert len((tmp_path / "calls").read_text().splitlines()) == 4
    assert libreoffice.make(tmp_path / "root", packages=str(debs)) == made  # the same packages, wherever they lie


def test_without_apt(quick, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"apt-get.*did not start(.|\n)*data\.packages=FOLDER"):
        libreoffice.make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["libreoffice.lock"]


def test_import_is_cheap():
    code = ("import sys, experiments.data.libreoffice\n"
            "sys.exit(bool({'torch', 'fairseq', 'numpy', 'sacremoses', 'subword_nmt', 'hydra'} & set(sys.modules)))")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.download
@needs_extra
@needs_dpkg
def test_the_real_packages(tmp_path):
    made = libreoffice.make(tmp_path)
    about = json.loads((made.parent / "about.json").read_text())
    assert about["pairs"]["train"] > 25_000 and about["pairs"]["valid"] == about["pairs"]["test"] == 1000
    assert 4_000 < about["dictionary"] < 4_600 and min(about["tokens"].values()) > 500_000
    references = [(made.parent / f"valid.raw.{language}").read_text(encoding="utf-8").splitlines() for language in ("en", "de")]
    assert len(references[0]) == len(references[1]) == 1000
    assert sum(any(letter in line for letter in "äöüÄÖÜß") for line in references[1]) > 400
