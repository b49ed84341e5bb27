#!/usr/bin/env bash
# Installs CUDA's compiler, without root, from its PyPI wheels in pinned versions (NVIDIA's licence applies), and prints the
# folder that has bin/nvcc. nvcc also needs g++.
#
#   tools/get_nvcc.sh [--disassembler] [FOLDER]
#
# FOLDER is target/nvcc unless given; build.rs looks there. --disassembler adds cuobjdump and nvdisasm.
set -euo pipefail

disassembler=
while [[ ${1:-} == --* ]]; do
  [ "$1" = --disassembler ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
  disassembler=1
  shift
done
top=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$top/target/nvcc}

# All five: nvcc's wheel would take newer ones of the others.
packages=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96
  nvidia-cuda-cccl==13.0.85)
# Older versions of these two are not on PyPI; they read what nvcc 13.0 writes.
[ -z "$disassembler" ] || packages+=(nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.2.86)

python=$folder/venv/bin/python
[ -x "$python" ] || python3 -m venv "$folder/venv"
"$python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
for part in "$folder"/venv/lib/python3*/site-packages/nvidia/cu13/*; do
  ln -sfn "${part#"$folder"/}" "$folder/$(basename "$part")"
done
"$folder/bin/nvcc" --version >/dev/null
touch "$top/build.rs" # so that cargo looks for it again
echo "$folder"
