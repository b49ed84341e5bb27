#!/usr/bin/env bash
# Makes the Rust bindings of cpu/kernels.h and cuda/params.h with bindgen; with --check, proves that the committed files
# are what it would make. libclang comes from its PyPI package, in a virtual environment under target/.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=target/libclang
if [ ! -d "$venv" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check libclang==18.1.1
fi
LIBCLANG_PATH=$(cd "$venv"/lib/python3*/site-packages/clang/native && pwd)
export LIBCLANG_PATH
BINDGEN_EXTRA_CLANG_ARGS="-isystem $(gcc -print-file-name=include)"
export BINDGEN_EXTRA_CLANG_ARGS
check=${1:-}

# HEADER OUTPUT
regenerate() {
    local header=$1 committed=$2 made=$2
    [ "$check" != --check ] || made=target/bindings.rs
    CARGO_TARGET_DIR=target/bindings cargo run --quiet --release --locked --manifest-path tools/bindings/Cargo.toml -- "$header" "$made"
    rustfmt --edition 2024 "$made"
    if [ "$made" != "$committed" ]; then
        diff -u "$committed" "$made" || { echo "$committed is stale: run tools/regenerate_bindings.sh" >&2; exit 1; }
    fi
}

regenerate cpu/kernels.h src/backend/cpu/bindings.rs
regenerate cuda/params.h src/backend/cuda/bindings.rs
