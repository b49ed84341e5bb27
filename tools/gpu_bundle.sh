#!/usr/bin/env bash
# Collects in one folder what a machine with a GPU needs to test and measure the CUDA backend without Rust or CUDA's
# toolkit: test and bench executables, stripped, the kernels, golden files, and a run.sh.
#
#   tools/gpu_bundle.sh OUTPUT_DIR
#
# There: OUTPUT_DIR/run.sh [FOLDER_FOR_RESULTS]. Kernels come from nvcc (NVCC, CUDA_HOME, PATH or tools/get_nvcc.sh).
set -euo pipefail

if [ $# -ne 1 ]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
cd "$(dirname "$0")/.."
output=$1
mkdir -p "$output/bin" "$output/tests"

tests=(parity_cuda cuda_gemm cuda_attention cuda_loss cuda_model cuda_streams)
# cargo's messages name each executable.
executables() {
  cargo "$@" --locked --message-format=json-render-diagnostics |
    python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable"): print(message["target"]["name"], message["executable"])'
}
{
  executables test --release --no-run "${tests[@]/#/--test=}"
  executables bench --no-run --bench=cuda
  executables build --release --example=finetune
} | while read -r name path; do
  strip -o "$output/bin/$name" "$path"
done

# The program says whether it has kernels: without a driver it complains about that first, so look at the pack itself.
pack=$(find target/release/build -path '*lowrank-*/out/kernels.pack' -size +0 -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2)
[ -n "$pack" ] || { echo "the kernels were not built: run tools/get_nvcc.sh first" >&2; exit 1; }
cp "$pack" "$output/kernels.pack"
cp -r tests/golden "$output/tests/golden"
cp tools/gpu_run.sh "$output/run.sh"
cp tools/gpu_7b_config.json "$output/config.json"
cp examples/finetune/demo/model/tokenizer.json examples/finetune/demo/model/tokenizer_config.json "$output/"
chmod +x "$output/run.sh"
du -sh "$output"
