"""The writing systems: who is in which split, balance, the files, and what happens when several make it or one is stopped.

Noto fonts are not everywhere, so two invented systems, small and capital Latin letters, are drawn with the font inside Pillow.
"""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import unicodedata

import numpy as np
import pytest
from PIL import Image, ImageFont

from experiments.data import glyphs
from experiments.tasks.torchvision_cpu import torchvision

CAPITAL, SMALL = "latin_capital_letter", "latin_small_letter"
COUNTS = {"train": 101, "validation": 24}


@pytest.fixture(autouse=True)
def invented(monkeypatch):
    monkeypatch.setattr(glyphs, "FONTS", {CAPITAL: "Capital-Regular.ttf", SMALL: "Small-Regular.ttf"})


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fonts")
    (folder / "deep").mkdir()
    for name in ("Capital", "deep/Small"):
        (folder / f"{name}-Regular.ttf").write_bytes(ImageFont.load_default(16).font_bytes)
    return folder


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def characters(folder):
    return {chr(int(path.name.split("_")[0], 16)) for path in folder.rglob("*.jpg")}


def nothing_left(root):
    return [path.name for path in root.iterdir() if path.name != "glyphs.lock"] == []


def test_loads_as_an_image_folder_balanced_and_disjoint(fonts, tmp_path):
    path = glyphs.make(tmp_path, fonts=fonts, **COUNTS)
    for side, count in zip(("train", "val"), COUNTS.values(), strict=True):
        data = torchvision.datasets.ImageFolder(path / side)
        assert data.classes == list(glyphs.FONTS) == sorted(glyphs.FONTS)
        assert np.bincount(data.targets).tolist() == [(count + 1) // 2, count // 2]
        assert all(image.size == (64, 64) and image.mode == "RGB" for image, _ in data)
        with Image.open(data.samples[0][0]) as image:
            assert image.format == "JPEG" and image.mode == "RGB"
    for name in glyphs.FONTS:
        train, validation = (characters(path / side / name) for side in ("train", "val"))
        assert len(train) > 15 and len(validation) == 5 and not train & validation
        assert all(unicodedata.name(c).startswith(name.upper().replace("_", " ")) for c in train | validation)
    about = json.loads((path / "about.json").read_text())
    assert about["classes"] == 2 and about["pictures"] == {"train": 101, "val": 24} and about["seed"] == 0
    assert about["letters"][SMALL]["val"] == 5


def test_same_bytes_twice_and_what_depends_on_what(fonts, tmp_path):
    first = glyphs.make(tmp_path / "not" / "there", fonts=fonts, **COUNTS)
    again = glyphs.make(tmp_path / "again", fonts=fonts, **COUNTS)
    assert first.name == again.name and files(first) == files(again)
    seed = glyphs.make(tmp_path, fonts=fonts, **COUNTS, seed=1)
    assert seed.name != first.name and not set(files(seed / "val").values()) & set(files(first / "val").values())
    assert characters(seed / "val") == characters(first / "val")  # no seed trains on another's validation letters
    shorter = glyphs.make(tmp_path, fonts=fonts, train=2, validation=24)
    assert shorter.name != first.name and files(shorter / "val") == files(first / "val")


def test_the_name_stands_for_the_fonts(fonts, tmp_path, monkeypatch):
    name = glyphs.make(tmp_path, fonts=fonts, **COUNTS).name
    monkeypatch.setattr(glyphs, "_write", lambda *_: pytest.fail("made anew"))
    assert glyphs.make(tmp_path, fonts=fonts, **COUNTS).name == name
    other = tmp_path / "other"
    other.mkdir()
    for file in glyphs.FONTS.values():
        (other / file).write_bytes(ImageFont.load_default(16).font_bytes + b"\0")
    with pytest.raises(pytest.fail.Exception, match="made anew"):
        glyphs.make(tmp_path, fonts=other, **COUNTS)


def test_letters_leave_out_what_is_not_drawn_or_drawn_twice(monkeypatch):
    drawn = {"\uffff": "box", "A": "box", "B": None, "O": "ring", "o": "ring", "P": "flag", "Q": "flag"}
    monkeypatch.setattr(glyphs, "_open", lambda path: path)
    monkeypatch.setattr(glyphs, "_drawing", lambda font, character: drawn.get(character, character))
    split = glyphs.letters(glyphs.FONTS)
    capital, small = ({c for part in split[name].values() for c in part} for name in glyphs.FONTS)
    assert not set("ABOQ") & capital and set("CDEP") <= capital
    assert "o" not in small and set("abpqz") <= small  # the two rings belong to two systems


def test_tuning_shows_no_validation_letter(fonts, tmp_path):
    usual, tuning = (glyphs.make(tmp_path, fonts=fonts, **COUNTS, heldout=split) for split in ("validation", "tuning"))
    assert usual != tuning and json.loads((tuning / "about.json").read_text())["heldout"] == "tuning"
    for name in glyphs.FONTS:
        (train, held), (others, tuned) = ([characters(path / side / name) for side in ("train", "val")] for path in (usual, tuning))
        assert not held & (others | tuned) and not others & tuned
        assert others | tuned == train and len(tuned) == len(held)
    with pytest.raises(ValueError, match="heldout=test: choose validation or tuning"):
        glyphs.make(tmp_path, fonts=fonts, **COUNTS, heldout="test")


def test_other_forms_of_a_letter_stay_on_its_side(monkeypatch):
    monkeypatch.setattr(glyphs, "_open", lambda path: path)
    monkeypatch.setattr(glyphs, "_drawing", lambda font, character: character)
    split = glyphs.letters(dict.fromkeys(("latin", "greek", "arabic", "cherokee", "deseret"), "font"))
    for form in ("aAáÅấ", "zZž", "αΑάἄ", "βΒ", "\u0628\ufe8f\ufe91", "\u13a0\uab70", "\U00010400\U00010428"):
        sides = {side for sides in split.values() for side in sides if set(form) & set(sides[side])}
        assert len(sides) == 1, form
    for name, sides in split.items():
        plain = {side: {unicodedata.normalize("NFKD", c).casefold()[0] for c in part} for side, part in sides.items()}
        assert not plain["train"] & plain["val"]
        assert len(plain["val"]) == round(sum(map(len, plain.values())) / 5), name


def test_pictures_vary_keep_their_letter_and_hide_their_class_from_colour(fonts):
    paths = glyphs._found(fonts)
    split, generator = glyphs.letters(paths), np.random.default_rng(0)
    images = np.array([[np.asarray(glyphs.picture(generator, glyphs._glyph(glyphs._open(path), c)))
                        for c in np.resize(split[name]["train"], 200)] for name, path in paths.items()])
    assert images.std((2, 3)).min() > 3  # none is empty
    means = images.mean((2, 3))  # [2, 200, 3]
    assert means.std(1).min() > 30
    centres = means[:, :100].mean(1)
    nearest = ((means[:, 100:, None] - centres) ** 2).sum(-1).argmin(-1)
    # Chance is 0.5 with a standard deviation of 0.035 for 200 pictures: three of them.
    assert abs((nearest == [[0], [1]]).mean() - 0.5) < 0.106


def test_a_glyph_stays_in_the_picture():
    generator = np.random.default_rng(0)
    for size in ((90, 90), (12, 128), (600, 40), (1, 1)):
        glyph = Image.new("L", size, 255)
        assert all(glyphs.picture(generator, glyph).size == (64, 64) for _ in range(20))


def stop_after(monkeypatch, count, stop):
    real, calls = glyphs.picture, []

    def picture(*arguments):
        calls.append(1)
        return stop() if len(calls) > count else real(*arguments)

    monkeypatch.setattr(glyphs, "picture", picture)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_middle_leaves_nothing(error, fonts, tmp_path, monkeypatch):
    def stop():
        raise error("in the middle")

    with monkeypatch.context() as patch:
        stop_after(patch, 30, stop)
        with pytest.raises(error, match="in the middle"):
            glyphs.make(tmp_path, fonts=fonts, **COUNTS)
    assert nothing_left(tmp_path)
    assert len(files(glyphs.make(tmp_path, fonts=fonts, **COUNTS))) == 126


def test_a_killed_making_is_not_taken_for_a_set(fonts, tmp_path, monkeypatch):
    def make_and_die():
        stop_after(monkeypatch, 30, lambda: os.kill(os.getpid(), signal.SIGKILL))
        glyphs.make(tmp_path, fonts=fonts, **COUNTS)

    process = multiprocessing.get_context("fork").Process(target=make_and_die)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    left, = tmp_path.glob("glyphs-*")
    assert left.suffix == ".partial" and len(files(left)) == 30
    path = glyphs.make(tmp_path, fonts=fonts, **COUNTS)
    assert list(tmp_path.glob("glyphs-*")) == [path] and len(files(path)) == 126


def test_several_processes_make_it_once(fonts, tmp_path, monkeypatch):
    real = glyphs._write

    def write(aside, *arguments):
        with open(tmp_path / "made", "a") as file:
            file.write("x")
        real(aside, *arguments)

    monkeypatch.setattr(glyphs, "_write", write)
    context = multiprocessing.get_context("fork")
    results, barrier = context.Queue(), context.Barrier(3)

    def make():
        barrier.wait(60)
        path = glyphs.make(tmp_path / "root", fonts=fonts, **COUNTS)
        results.put((str(path), len(files(path))))

    processes = [context.Process(target=make) for _ in range(3)]
    for process in processes:
        process.start()
    answers = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    (path, count), = answers
    assert count == 126 and (tmp_path / "made").read_text() == "x"
    assert [str(found) for found in (tmp_path / "root").glob("glyphs-*")] == [path]


def test_another_host_may_be_first_where_locks_do_not_work(fonts, tmp_path, monkeypatch):
    real, working = glyphs._write, tmp_path / "glyphs-of-another.host.1.partial"
    working.mkdir()

    def write(aside, *arguments):
        real(aside, *arguments)
        first = aside.with_name(aside.name.split(".")[0])
        first.mkdir()
        (first / "about.json").write_text("of the other host")

    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(glyphs, "_write", write)
    monkeypatch.setattr(fcntl, "lockf", lockf)
    path = glyphs.make(tmp_path, fonts=fonts, **COUNTS)
    assert files(path) == {"about.json": b"of the other host"}
    assert set(tmp_path.glob("glyphs-*")) == {path, working}


@pytest.mark.parametrize("counts, message", [({"train": 1}, "train=1 .* 2 classes.*train=2"), ({"validation": 0}, "validation=2"),
                                             ({"seed": -1}, "give 0 or more")])
def test_bad_arguments_name_the_remedy(counts, message, fonts, tmp_path):
    with pytest.raises(ValueError, match=message):
        glyphs.make(tmp_path, fonts=fonts, **counts)
    assert list(tmp_path.iterdir()) == []


def test_bad_fonts_name_the_remedy(fonts, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"Small-Regular\.ttf, not found in .*data\.fonts=FOLDER"):
        glyphs.make(tmp_path / "root", fonts=fonts / "nowhere", **COUNTS)
    for file in glyphs.FONTS.values():
        (tmp_path / file).write_bytes(b"no font")
    with pytest.raises(OSError, match=r"Capital-Regular\.ttf cannot be read as a font.*data\.fonts=FOLDER"):
        glyphs.make(tmp_path / "root", fonts=tmp_path, **COUNTS)
    assert nothing_left(tmp_path / "root")
    monkeypatch.setattr(glyphs, "FONTS", {"greek": "Capital-Regular.ttf"})
    with pytest.raises(ValueError, match="0 letters of greek.*data.fonts=FOLDER"):
        glyphs.make(tmp_path / "root", fonts=fonts, **COUNTS)
    assert nothing_left(tmp_path / "root")


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A function that puts a shell script in the place of a program; the fonts are not installed."""
    monkeypatch.setattr(glyphs, "INSTALLED", tmp_path / "not installed")
    (tmp_path / "bin").mkdir()

    def put(name, text):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    return put


def test_installed_fonts_are_taken_and_kept(fonts, tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "_unpacked", lambda folder: pytest.fail("downloaded"))
    monkeypatch.setattr(glyphs, "INSTALLED", fonts)
    path = glyphs.make(tmp_path, **COUNTS)
    assert path.name == glyphs.make(tmp_path / "other", fonts=fonts, **COUNTS).name
    monkeypatch.setattr(glyphs, "INSTALLED", tmp_path / "gone")
    assert glyphs.make(tmp_path, **COUNTS) == path


def test_fonts_are_downloaded_once_with_lists_of_our_own_where_the_system_has_none(fonts, tmp_path, programs, capsys):
    programs("apt-get", """case "$*" in
        *update) echo "$*" > updated;;
        *download*) [ -e updated ] || { echo 'E: Unable to locate package' >&2; exit 100; }; touch package.deb;;
    esac""")
    programs("dpkg-deb", f'[ -e "$2" ] && cp -r "{fonts}" "$3"')
    root = tmp_path / "root"
    (root / "glyphs-fonts").mkdir(parents=True)
    (root / "glyphs-fonts" / "Capital-Regular.ttf").write_bytes(b"of an earlier version with fewer classes")
    path = glyphs.make(root, **COUNTS)
    assert path.name == glyphs.make(tmp_path / "other", fonts=fonts, **COUNTS).name
    assert sorted(files(root / "glyphs-fonts")) == ["Capital-Regular.ttf", "Small-Regular.ttf"]
    assert "downloading" in capsys.readouterr().out
    programs("apt-get", "exit 1")
    assert glyphs.make(root, **COUNTS, seed=1) != path and "downloading" not in capsys.readouterr().out


def test_a_failed_download_says_what_apt_said_and_the_remedy(fonts, tmp_path, programs, monkeypatch):
    root = tmp_path / "root"
    programs("apt-get", "echo 'E: Could not resolve deb.debian.org' >&2; exit 100")
    with pytest.raises(FileNotFoundError, match=r"Could not resolve deb\.debian\.org.*fonts-noto-core.*data\.fonts=FOLDER"):
        glyphs.make(root, **COUNTS)
    programs("apt-get", "touch package.deb")
    programs("dpkg-deb", 'mkdir "$3"')
    with pytest.raises(FileNotFoundError, match=r"has no Capital-Regular\.ttf.*data\.fonts=FOLDER"):
        glyphs.make(root, **COUNTS)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"'apt-get'.*data\.fonts=FOLDER"):
        glyphs.make(root, **COUNTS)
    assert nothing_left(root)


def test_the_class_list():
    assert len(glyphs.CLASSES) == 88 == len(set(glyphs.CLASSES)) and list(glyphs.CLASSES) == sorted(glyphs.CLASSES)


@pytest.mark.download
def test_the_real_fonts(tmp_path, monkeypatch):
    monkeypatch.undo()  # the real FONTS
    assert tuple(glyphs.FONTS) == glyphs.CLASSES
    try:
        path = glyphs.make(tmp_path, train=200, validation=88)
    except FileNotFoundError as error:
        pytest.skip(f"no Noto fonts here and none to be had: {error}")
    assert len(torchvision.datasets.ImageFolder(path / "train")) == 200
    assert torchvision.datasets.ImageFolder(path / "val").classes == list(glyphs.CLASSES)
    paths = glyphs._found(tmp_path / "glyphs-fonts")
    split, users = glyphs.letters(paths), {}
    for name, sides in split.items():
        assert len(sides["train"]) >= 25 and len(sides["val"]) >= 7, name
        font = glyphs._open(paths[name])
        for character in sides["train"] + sides["val"]:
            users.setdefault(glyphs._drawing(font, character), []).append(character)
    assert None not in users and max(map(len, users.values())) == 1
