#!/bin/sh
# Makes the virtual environment VENV with the packages of this checkout's extras, or repairs it.
#
#   tools/make_venv.sh VENV [EXTRA...]
#
# VENV/.complete-EXTRA holds the hash of the pyproject.toml that the extra was installed by: after a change of it
# the extra is installed again. VENV/.made-in names the checkout: in another one the environment is made anew.
# VENV/.unfinished stands while an install runs: one that was killed is not trusted, and the environment is made
# anew. A working environment that somebody else made is kept and added to.
set -eu

venv=$1
shift
cd "$(dirname "$0")/.."

fail() {
    printf '\n%s\n' "$*" >&2
    exit 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    for candidate in python3.12 python3 python python3.13 python3.14; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    found=$(python3 --version 2>&1 || echo "no python3 at all")
    fail "Python 3.12 or newer is missing: looked for python3.12, python3 and python on PATH; found $found.
Install it (python.org, pyenv, or your system's packages), or name an interpreter that already has the
packages: make test PYTHON=/path/to/python"
}

digest() {
    "$1" -c 'import hashlib, sys; print(hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest())'
}

[ -e "$venv/.unfinished" ] && rm -rf "$venv"
if [ -e "$venv" ] && ! { is_new_enough "$venv/bin/python" && "$venv/bin/python" -m pip --version; } >/dev/null 2>&1
then
    rm -rf "$venv" # its Python is gone, or it was never finished
fi
if [ -e "$venv/.made-in" ] && [ "$(cat "$venv/.made-in")" != "$PWD" ]; then
    rm -rf "$venv" # a copied or moved checkout: the scripts in it name the old place
fi
if [ ! -e "$venv" ]; then
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python lacks the modules venv and ensurepip. Debian and Ubuntu have them in python3.12-venv."
    echo "making $venv with $python"
    mkdir -p "$venv"
    : >"$venv/.unfinished"
    "$python" -m venv "$venv"
    printf '%s\n' "$PWD" >"$venv/.made-in"
    rm "$venv/.unfinished"
fi

want=$(digest "$venv/bin/python")
missing=
for extra in "$@"; do
    [ "$(cat "$venv/.complete-$extra" 2>/dev/null)" = "$want" ] || missing="$missing,$extra"
done
[ -z "$missing" ] && exit 0

missing=${missing#,}
echo "installing [$missing] into $venv"
: >"$venv/.unfinished"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[$missing]" ||
    fail "pip could not install the extras [$missing] of this package: its message is above. Without network,
name an interpreter that already has the packages: make test PYTHON=/path/to/python"
for extra in $(echo "$missing" | tr , ' '); do
    printf '%s\n' "$want" >"$venv/.complete-$extra"
done
rm "$venv/.unfinished"
