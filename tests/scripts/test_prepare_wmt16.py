"""scripts/prepare_wmt16.sh on a tiny archive of the real one's form."""

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_wmt16.sh"
TRAIN, VALID, TEST = "train.tok.clean.bpe.32000", "newstest2013.tok.bpe.32000", "newstest2014.tok.bpe.32000"
LINES = {"en": "Open the wind@@ ow &quot; now &quot; .\n", "de": "Öffnen Sie das Fen@@ ster jetzt .\n"}
needs_fairseq = pytest.mark.skipif(importlib.util.find_spec("fairseq") is None, reason="the wmt16 extra is not installed")


def archive(path, *left_out, prefix="", raw=True, lines=LINES):
    """A wmt16_en_de.tar.gz of few lines, with more files than are needed."""
    names = [TRAIN, VALID, TEST, "newstest2012.tok.bpe.32000", *(["newstest2013", "newstest2014"] if raw else [])]
    with tarfile.open(path, "w:gz") as tar:
        for language, line in lines.items():
            for name in names:
                if name not in left_out:
                    data = (line * (40 if name == TRAIN else 3)).encode()
                    member = tarfile.TarInfo(f"{prefix}{name}.{language}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return path


def fake_python(folder, preprocess):
    """A Python that has fairseq, whose fairseq-preprocess is the shell code `preprocess`, with the destination in $destination."""
    path = folder / "python"
    path.write_text(f"""#!/bin/sh
        case "$*" in *find_spec*) exit 0 ;; *fairseq_cli.preprocess*) ;; *) exec {sys.executable} "$@" ;; esac
        echo "$*" >>{folder}/calls
        while [ "$1" != --destdir ]; do shift; done
        destination=$2
        mkdir -p "$destination"
        {preprocess}
        """)
    path.chmod(0o755)
    return path


def prepare(*arguments, python=sys.executable, **environment):
    return subprocess.run(["sh", str(SCRIPT), *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "PYTHON": str(python), "WORKERS": "1", **environment})  # fmt: skip


def refused(done, *words):
    assert done.returncode == 1 and done.stderr.startswith("prepare_wmt16: "), (done.returncode, done.stdout, done.stderr)
    assert all(word in done.stderr for word in words), done.stderr


@needs_fairseq
@pytest.mark.slow
def test_the_whole_way(tmp_path):
    done = prepare(archive(tmp_path / "a.tar.gz"), tmp_path / "wmt16")
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "wmt16/preprocess.log").read_text()
    made = tmp_path / "wmt16" / "data-bin"
    assert done.stdout.splitlines()[-1] == f"prepare_wmt16: done: python run.py experiment=wmt16_slowmo_sgp data.root={made}"
    for split in ("train", "valid", "test"):
        for language in ("en", "de"):
            assert all((made / f"{split}.en-de.{language}.{ending}").stat().st_size for ending in ("bin", "idx"))
    words = (made / "dict.en.txt").read_text()
    assert words == (made / "dict.de.txt").read_text() and "Fen@@ 40\n" in words and "&quot; 80\n" in words
    assert (tmp_path / "wmt16/test.raw.de").read_text() == 3 * LINES["de"]
    assert sorted(path.name for path in (tmp_path / "wmt16").iterdir()) == [
        "archive.sha256", "data-bin", "preprocess.log", "test.raw.de", "test.raw.en", "text", "valid.raw.de", "valid.raw.en"]  # fmt: skip


def test_the_papers_flags_and_finished_steps_are_skipped(tmp_path):
    python = fake_python(tmp_path, "exit 0")
    source = archive(tmp_path / "a.tar.gz", prefix="./", raw=False)
    first = prepare(source, tmp_path / "wmt16", python=python, WORKERS="3")
    assert first.returncode == 0, first.stderr
    call, = (tmp_path / "calls").read_text().splitlines()
    assert call == (f"-m fairseq_cli.preprocess --source-lang en --target-lang de --trainpref text/{TRAIN} --validpref text/{VALID} "
                    f"--testpref text/{TEST} --destdir data-bin.tmp --nwordssrc 32768 --nwordstgt 32768 --joined-dictionary "
                    "--workers 3")  # fmt: skip
    assert len(list((tmp_path / "wmt16/text").iterdir())) == 6 and not list((tmp_path / "wmt16").glob("*.raw.*"))
    again = prepare(source, tmp_path / "wmt16", python=python)
    source.unlink()  # nor is the archive needed any more
    assert again.returncode == prepare(source, tmp_path / "wmt16", python=python).returncode == 0
    assert "text is there" in again.stdout and "data-bin is there" in again.stdout
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    shutil.rmtree(tmp_path / "wmt16/data-bin")
    assert prepare(source, tmp_path / "wmt16", python=python).returncode == 0 and (tmp_path / "wmt16/data-bin").is_dir()


@pytest.mark.parametrize(("end", "code"), [
    ("kill -9 $PPID", -9), ("kill $PPID; sleep 0.2; exit 1", 143), ("kill -INT $PPID", 130), ("exit 7", 1)])  # fmt: skip
def test_an_end_in_the_middle_is_resumed(end, code, tmp_path):
    source = archive(tmp_path / "a.tar.gz")
    done = prepare(source, tmp_path / "wmt16", python=fake_python(tmp_path, f"echo half >$destination/half; {end}"))
    assert done.returncode == code, done.stderr
    assert (tmp_path / "wmt16/text").is_dir() and not (tmp_path / "wmt16/data-bin").exists()
    assert (tmp_path / "wmt16/data-bin.tmp").exists() == (code == -9)  # what could not be removed then is removed now
    (tmp_path / "wmt16/text.tmp").mkdir()
    done = prepare(source, tmp_path / "wmt16", python=fake_python(tmp_path, "echo whole >$destination/whole"))
    assert done.returncode == 0 and "text is there" in done.stdout
    assert [path.name for path in (tmp_path / "wmt16/data-bin").iterdir()] == ["whole"] and not list((tmp_path / "wmt16").glob("*.tmp"))


def test_failures_name_the_remedy(tmp_path):
    python = fake_python(tmp_path, "echo out of memory; exit 1")
    target = tmp_path / "wmt16"
    refused(prepare(python=python), "usage:", "drive.google.com")
    refused(prepare("a", "b", "c", python=python), "usage:")
    refused(prepare(tmp_path / "none.tar.gz", target, python=python), "no file", "Download wmt16_en_de.tar.gz", "drive.google.com")
    (tmp_path / "page.tar.gz").write_text("<html>Google Drive can't scan this file for viruses</html>")
    refused(prepare(tmp_path / "page.tar.gz", target, python=python), "does not read as a tar archive", "Download it again, in a browser")
    whole = archive(tmp_path / "a.tar.gz")
    (tmp_path / "half.tar.gz").write_bytes(whole.read_bytes()[:300])
    refused(prepare(tmp_path / "half.tar.gz", target, python=python), "not to its end", "Download it again")
    refused(prepare(archive(tmp_path / "other.tar.gz", VALID), target, python=python), f"no {VALID}.en", "another archive")
    uneven = archive(tmp_path / "uneven.tar.gz", lines={"en": LINES["en"], "de": LINES["de"] * 2})
    refused(prepare(uneven, target, python=python), f"{TRAIN} has 40 English and 80 German lines", "Download it again")
    refused(prepare(whole, target, python=python, WORKERS="many"), "WORKERS")
    refused(prepare(whole, target, python="no-such-python"), "has no fairseq", "pip install -e '.[wmt16]'")
    (tmp_path / "file").touch()
    refused(prepare(whole, tmp_path / "file" / "wmt16", python=python), "Name another folder")
    assert list(target.iterdir()) == []  # nothing so far was kept
    refused(prepare(whole, target, python=python), "preprocess.log", "WORKERS=1", "run this again")
    assert (target / "preprocess.log").read_text() == "out of memory\n"
    other = prepare(archive(tmp_path / "b.tar.gz", raw=False), target, python=python)
    refused(other, "is not the archive this folder was made from", "start afresh")


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    archive(tmp_path / "a.tar.gz")
    done = prepare("a.tar.gz", "in here", python=fake_python(tmp_path, "exit 0"))
    assert done.returncode == 0 and (tmp_path / "in here/data-bin").is_dir() and f"data.root={tmp_path}/in here/data-bin" in done.stdout
