#!/usr/bin/env bash
# Tests and measures the CUDA backend of a bundle (tools/gpu_bundle.sh) on this machine's GPU; prints one table.
#
#   [LOWRANK_RUN_65B=1] run.sh [FOLDER_FOR_RESULTS]
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
for test in parity_cuda cuda_gemm cuda_attention cuda_model; do
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

# NAME LAYERS HIDDEN INTERMEDIATE HEADS of a Llama with random weights: its plan, then steps of 512 tokens. Flags follow.
dummy() {
  local name=$1 folder=$results/$1 run
  mkdir -p "$folder"
  cp "$here"/tokenizer*.json "$folder/"
  sed -e "s/\(\"num_hidden_layers\": \)[0-9]*/\1$2/" -e "s/\(\"hidden_size\": \)[0-9]*/\1$3/" \
    -e "s/\(\"intermediate_size\": \)[0-9]*/\1$4/" -e "s/\(\"num_[a-z_]*heads\": \)[0-9]*/\1$5/" \
    "$here/config.json" >"$folder/config.json"
  for row in $(seq 16); do printf '{"text": "%s"}\n' "$(head -c 4096 /dev/zero | tr '\0' 'a')"; done >"$folder/data.jsonl"
  run=(--model "$folder" --load-format dummy --device cuda --dtype bf16 --quant nf4 --max-length 512 --gradient-checkpointing
    --target-modules all-linear --r 16 --per-device-train-batch-size 1 "${@:6}")
  step "estimate_$name" "$here/bin/finetune" estimate "${run[@]}"
  step "train_$name" "$here/bin/finetune" train "${run[@]}" --data "$folder/data.jsonl" --output "$folder/out" --max-steps 12 \
    --logging-steps 1 --save-strategy no
  grep 'tokens/s' "$results/train_$name.txt"
}
dummy 7b 32 4096 11008 32
# Making 65 billion random weights takes long, so only if asked for.
[ -z "${LOWRANK_RUN_65B:-}" ] || dummy 65b 80 8192 22016 64 --memory-limit 40GB
printf '\n| step | result | time |\n|---|---|---|\n'
printf '%s\n' "${rows[@]}"
cat "$results/bench.txt" 2>/dev/null
exit $failed
