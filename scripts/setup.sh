#!/bin/sh
# Make .venv and install the suite into it, with the versions of constraints.txt. Safe to repeat and to interrupt.
#
#     scripts/setup.sh run    what the quickstart needs: no compiler, no fairseq
#     scripts/setup.sh test   all of it, for the tests and for translation: compiles fairseq for two minutes
#
# torch is by far the largest download and the one that knows the GPU's driver, so a torch >= 2.6 that $PYTHON
# (default python3) already has is used where it lies and never replaced: .venv sees $PYTHON's packages through one
# .pth file, and pip is held to that torch's version instead of the pinned one. A .venv of your own making is kept too.
# --system-site-packages would not do: from inside a virtual environment it shows the base Python's packages, not its.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
ours=.venv/.torch-is-ours # this torch was installed here and follows constraints.txt

case ${1:-test} in
run) extras=quickstart ;;
test) extras=photos,results,notebooks,logging,examples,test,lint,docs,oracles,wmt16 ;;
*) echo "setup: run or test, not $1" >&2; exit 2 ;;
esac

fail() { echo "setup: $*" >&2; exit 1; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
has_pip() { .venv/bin/python -m pip --version >/dev/null 2>&1; }
torch_version() { # prints nothing for a torch that is absent, broken or before 2.6
    "$1" -c '
import importlib.metadata, torch
version = importlib.metadata.version("torch")
if tuple(int(n) for n in version.split(".")[:2]) >= (2, 6):
    print(version)' 2>/dev/null || true
}

if ! has_pip; then
    recent "$python" || fail "'$python' is not a Python 3.11 or later. Name one: PYTHON=python3.12 make run"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "'$python' cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv," \
             "or its version's, such as python3.12-venv"
    .venv/bin/python -m ensurepip >/dev/null 2>&1 || "$python" -m venv --clear .venv
fi
if [ $extras != quickstart ]; then
    headers=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -e "$headers/Python.h" ] || fail "fairseq is compiled, and $headers/Python.h is missing. On Debian and Ubuntu: apt install python3-dev"
    command -v c++ >/dev/null || fail "fairseq is compiled, and there is no C++ compiler. On Debian and Ubuntu: apt install g++"
fi
recent .venv/bin/python || fail ".venv holds a Python before 3.11. Start afresh: make clean"

found=
[ -e $ours ] || found=$(torch_version .venv/bin/python)
if [ ! -e $ours ] && [ -z "$found" ] && [ -n "$(torch_version "$python")" ]; then
    link=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outside.pth
    # What $PYTHON's site-packages add to its bare sys.path, their own .pth files included.
    "$python" -PS -c '
import site, sys
bare = set(sys.path)
site.main()
print(*(path for path in sys.path if path not in bare), sep="\n")' >"$link"
    found=$(torch_version .venv/bin/python)
    [ -n "$found" ] || rm "$link" # .venv holds another version of Python, say
fi

if [ -n "$found" ]; then
    echo "setup: torch $found is there already and stays"
    constraints=.venv/constraints.txt
    { echo "torch==$found"; grep -v '^torch' constraints.txt; } >$constraints
else
    echo "setup: torch comes from constraints.txt, by wherever pip is configured to look"
    constraints=constraints.txt
    touch $ours
fi

# Build environments are constrained as well (the second name is newer pips'); the caller's own constraints stay.
# Relative paths: these variables are split at spaces.
PIP_CONSTRAINT="${PIP_CONSTRAINT:+$PIP_CONSTRAINT }$constraints"
PIP_BUILD_CONSTRAINT="${PIP_BUILD_CONSTRAINT:+$PIP_BUILD_CONSTRAINT }$constraints"
export PIP_CONSTRAINT PIP_BUILD_CONSTRAINT
# fairseq compiles against torch: against the one above, not against a second one that an isolated build would fetch.
build="numpy setuptools>=77 wheel"
[ $extras = quickstart ] || build="$build cython"
.venv/bin/python -m pip install 'torch>=2.6' $build
.venv/bin/python -m pip install --no-build-isolation -e ".[$extras]"
