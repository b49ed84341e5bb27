#!/usr/bin/env bash
# Tests and measures the CUDA backend of a bundle (tools/gpu_bundle.sh) on this machine's GPU; prints one table.
#
#   run.sh [FOLDER_FOR_RESULTS]
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
results=${1:-$here/results}
mkdir -p "$results"
export LOWRANK_CUDA_KERNELS=$here/kernels.pack LOWRANK_TEST_ROOT=$here LOWRANK_CUDA_TESTS=device
failed=0
rows=()

# NAME COMMAND...: runs it, keeps what it prints, adds a row.
step() {
  local name=$1 start=$SECONDS status=0
  shift
  "$@" >"$results/$name.txt" 2>&1 || status=$?
  if [ $status = 0 ]; then rows+=("| $name | passed | $((SECONDS - start)) s |"); else
    rows+=("| $name | FAILED ($status): $(tail -n 1 "$results/$name.txt" | cut -c1-100) | $((SECONDS - start)) s |")
    failed=1
  fi
}

command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
for test in parity_cuda cuda_gemm cuda_model; do
  step "$test" "$here/bin/$test" --test-threads=1
done
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$here/bin/parity_cuda" --test-threads=1
  done
else
  rows+=("| compute-sanitizer | not on this machine | |")
fi
step bench "$here/bin/cuda" --bench
mkdir -p "$results/7b"
cp "$here/config.json" "$results/7b/config.json"
printf '{"text": "%s"}\n' "$(head -c 4096 /dev/zero | tr '\0' 'a')" >"$results/7b/data.jsonl"
step estimate_7b "$here/bin/finetune" estimate --model "$results/7b" --load-format dummy --device cuda --dtype bf16 \
  --quant nf4 --max-length 512 --gradient-checkpointing
printf '\n| step | result | time |\n|---|---|---|\n'
printf '%s\n' "${rows[@]}"
cat "$results/bench.txt" 2>/dev/null
exit $failed
