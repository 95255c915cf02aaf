#!/bin/sh
# Whether jax with its CUDA plugins and PyTorch can be installed together, as this checkout asks for them:
# the newest releases, and the oldest supported ones. Resolves only: reads metadata, installs and writes
# nothing.
#
#   tools/check_resolves.sh PYTHON     (an interpreter with the package uv)
set -eu

python=$1
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

resolve() {
    printf '%s\n' "$@" >"$work/constraints"
    "$python" -m uv --quiet pip compile --extra cuda13 --extra torch --python-version 3.12 \
        --python-platform x86_64-manylinux_2_28 --no-annotate --no-header \
        --constraint "$work/constraints" --output-file "$work/found" pyproject.toml || {
        echo "no releases fit together: moe-align-jax[cuda13,torch] with ${*:-no constraint}" >&2
        exit 1
    }
    for name in jax-cuda13-plugin jax-cuda13-pjrt torch nvidia-cudnn-cu13; do
        grep -q "^$name==" "$work/found" || {
            echo "resolved without $name, with ${*:-no constraint}" >&2
            exit 1
        }
    done
    echo "together: $(grep -E '^(jax|jaxlib|torch|cuda-toolkit|nvidia-cudnn-cu13)==' "$work/found" | tr '\n' ' ')"
}

resolve
resolve 'jax==0.11.2' 'torch==2.11.*'
resolve 'jax==0.12.*' 'torch==2.11.*'
