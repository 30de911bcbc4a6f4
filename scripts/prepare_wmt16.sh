#!/bin/sh
# WMT16 En-De for fairseq, from the archive Google preprocessed (Moses tokens, joint BPE of 32k):
#
#     scripts/prepare_wmt16.sh ARCHIVE [FOLDER=data/wmt16]
#
# ARCHIVE is wmt16_en_de.tar.gz, which you download yourself, in a browser, as fairseq's recipe for "Scaling Neural Machine
# Translation" says (examples/scaling_nmt): https://drive.google.com/uc?export=download&id=0B_bZck-ksdkpM25jRUN2X2UxMm8
# What is run is that recipe's fairseq-preprocess. Environment: PYTHON (default .venv's), WORKERS (default: all cores).
#
# FOLDER gets text (newstest2013 is validation, newstest2014 test), data-bin and archive.sha256. Safe to repeat and to
# interrupt: a finished step is skipped, and nothing half-made has a final name. For sacrebleu the references are
# valid.raw.* and test.raw.*, where the archive has them; `sacrebleu --test-set wmt13` and `wmt14/full`, with
# `--language-pair en-de`, know them anyway.
set -eu

fail() { echo "prepare_wmt16: $*" >&2; exit 1; }
say() { echo "prepare_wmt16: $*"; }
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
url='https://drive.google.com/uc?export=download&id=0B_bZck-ksdkpM25jRUN2X2UxMm8'

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    fail "usage: scripts/prepare_wmt16.sh ARCHIVE [FOLDER=data/wmt16], where ARCHIVE is wmt16_en_de.tar.gz from $url"
fi
home=$(cd "$(dirname "$0")/.." && pwd)
archive=$(absolute "$1")
folder=$(absolute "${2:-$home/data/wmt16}")
python=${PYTHON:-$home/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
workers=${WORKERS:-$(getconf _NPROCESSORS_ONLN)}
case $workers in '' | *[!0-9]* | 0*) fail "WORKERS must be a number of processes, not '$workers'" ;; esac
"$python" -c '
import importlib.util, sys
sys.exit(importlib.util.find_spec("fairseq_cli") is None)' 2>/dev/null ||
    fail "'$python' has no fairseq. Install it: $python -m pip install -e '.[wmt16]', or name another: PYTHON=..."

error=$(mkdir -p "$folder" 2>&1) || fail "$error. Name another folder: scripts/prepare_wmt16.sh ARCHIVE FOLDER"
cd "$folder"
trap 'rm -rf text.tmp data-bin.tmp' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
rm -rf text.tmp data-bin.tmp # of a run that was killed

# The step that needs the archive. No checksum of it is published; one that changes between two runs is still worth a word.
if [ -e "$archive" ] || [ ! -d text ]; then
    [ -f "$archive" ] || fail "there is no file $archive. Download wmt16_en_de.tar.gz in a browser: $url"
    sum=$("$python" -c '
import hashlib, sys
with open(sys.argv[1], "rb") as file:
    print(hashlib.file_digest(file, "sha256").hexdigest())' "$archive")
    if [ -e archive.sha256 ] && [ "$sum" != "$(cat archive.sha256)" ]; then
        fail "$archive (sha256 $sum) is not the archive this folder was made from ($(cat archive.sha256))." \
             "Give that one, or another folder, or remove $folder to start afresh"
    fi
fi
if [ -d text ]; then
    say "text is there"
else
    # Google Drive may have answered with a page of HTML, and a download may have stopped early.
    names=$(tar -tf "$archive" 2>&1) ||
        fail "$archive does not read as a tar archive, or not to its end: $(echo "$names" | tail -n 1)." \
             "Download it again, in a browser: $url"
    member() { echo "$names" | grep -x -F -e "$1" -e "./$1" | head -n 1; }
    say "unpacking"
    mkdir text.tmp
    set -- # the members to unpack
    for name in train.tok.clean.bpe.32000 newstest2013.tok.bpe.32000 newstest2014.tok.bpe.32000 newstest2013 newstest2014; do
        for language in en de; do
            found=$(member "$name.$language")
            if [ -n "$found" ]; then
                set -- "$@" "$found"
            elif [ "$name" != "${name%.32000}" ]; then
                fail "$archive has no $name.$language: it is another archive. Download wmt16_en_de.tar.gz: $url"
            fi
        done
    done
    tar -xf "$archive" -C text.tmp "$@" || fail "unpacking failed; is the disk full? Then run this again"
    for name in train.tok.clean.bpe.32000 newstest2013.tok.bpe.32000 newstest2014.tok.bpe.32000; do
        en=$(wc -l <"text.tmp/$name.en") de=$(wc -l <"text.tmp/$name.de")
        { [ "$en" -eq "$de" ] && [ "$en" -gt 0 ]; } ||
            fail "$archive: $name has $((en)) English and $((de)) German lines, which do not pair. Download it again: $url"
    done
    echo "$sum" >archive.sha256
    mv text.tmp text
fi
for language in en de; do
    [ ! -e "text/newstest2013.$language" ] || ln -sf "text/newstest2013.$language" "valid.raw.$language"
    [ ! -e "text/newstest2014.$language" ] || ln -sf "text/newstest2014.$language" "test.raw.$language"
done

if [ -d data-bin ]; then
    say "data-bin is there"
else
    say "fairseq-preprocess, $workers processes; some minutes"
    "$python" -m fairseq_cli.preprocess --source-lang en --target-lang de \
        --trainpref text/train.tok.clean.bpe.32000 --validpref text/newstest2013.tok.bpe.32000 \
        --testpref text/newstest2014.tok.bpe.32000 --destdir data-bin.tmp --nwordssrc 32768 --nwordstgt 32768 \
        --joined-dictionary --workers "$workers" >preprocess.log 2>&1 ||
        fail "fairseq-preprocess failed, see $folder/preprocess.log. Killed means too little memory: WORKERS=1. Then run this again"
    mv data-bin.tmp data-bin
fi
say "done: python run.py experiment=wmt16_slowmo_sgp data.root=$folder/data-bin"
