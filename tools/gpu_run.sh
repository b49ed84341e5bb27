#!/usr/bin/env bash
# Tests and measures the CUDA backend of a bundle (tools/gpu_bundle.sh) on this machine's GPU. What matters most comes first;
# every step has a limit, and one that fails or hangs stops no other.
#
#   run.sh [--seconds N] [--only REGEX] [FOLDER_FOR_RESULTS]
#
# N seconds for all, 540 unless given: steps that no longer fit are left out. REGEX: of the steps' names. The folder (else OUT,
# else results/ here) gets report.md, written again after every step, and log.txt, what steps print. After a hang the portable
# kernels alone are tested. LOWRANK_RUN_65B=1 adds a model of that size.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
seconds=540 only=.
while [[ ${1:-} == --* ]]; do
  case $1 in
    --seconds) seconds=$2 ;;
    --only) only=$2 ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
  shift 2
done
results=${1:-${OUT:-$here/results}}
log=$results/log.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$results"
: >"$log"
# Where containers get the driver by a mount, no path may lead to it.
[ ! -d /usr/local/nvidia/lib64 ] || export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/nvidia/lib64
export LOWRANK_CUDA_KERNELS=$here/kernels.pack LOWRANK_TEST_ROOT=$here LOWRANK_CUDA_TESTS=device
failed=0
rows=('| step | result | time |' '|---|---|---|')

report() {
  {
    printf '%s\n' "$device" '' "${rows[@]}" ''
    # Of kernels that do not serve, and what was measured.
    grep -aoE 'warning: .* the portable kernels serve .*' "$log" | sort | uniq -c
    grep -aE 'tokens/s|^[a-z].*(time|thrpt): +\[|^ +(time|thrpt): +\[' "$log"
    # Where a training step's time goes.
    grep -aE '^\| (kernel|[a-z0-9_]+( \([A-Z][a-z]+\))?) \| (grid|[0-9]+,)' "$log" | awk 'NR == 2 { print "|---|---|---|---|---|---|---|---|---|" } { print }' | head -n 42
  } >"$results/report.md"
}

row() {
  rows+=("| $1 | $2 | $3 s |")
  printf '%s\n' "${rows[-1]}"
  report
}

# NAME LIMIT COMMAND...: runs it for at most so many seconds.
step() {
  local name=$1 limit=$2 start=$SECONDS status=0 left=$((seconds - SECONDS)) from why
  shift 2
  [[ $name =~ $only ]] || return 0
  if ((left < 10)); then
    row "$name" "not run: no time is left" 0
    return 0
  fi
  printf '\n==== %s: %s\n' "$name" "$*" >>"$log"
  from=$(stat -c %s "$log")
  timeout -k 5 $((limit < left ? limit : left)) "$@" >>"$log" 2>&1 || status=$?
  if [ $status = 0 ]; then
    row "$name" passed $((SECONDS - start))
    return 0
  fi
  failed=1
  tail -c +$((from + 1)) "$log" | tail -n 30
  if [ $status = 124 ] || [ $status = 137 ]; then
    row "$name" "STOPPED: it took too long, in $(tail -c +$((from + 1)) "$log" | grep -a '^test ' | tail -n 1 | cut -c1-80)" \
      $((SECONDS - start))
    export LOWRANK_CUDA_PORTABLE=1
    return 1
  fi
  # The tests that failed by name, else the last line.
  why=$(tail -c +$((from + 1)) "$log" | grep -aE '^    [a-z0-9_:]+$' | sort -u | tr -s ' \n' ' ')
  row "$name" "FAILED ($status):${why:- $(tail -n 1 "$log" | cut -c1-120)}" $((SECONDS - start))
  return 1
}

# NAME LIMIT BINARY [FILTER...]: a test executable that is in the bundle.
tests() {
  local name=$1 limit=$2 binary=$here/bin/$3
  shift 3
  [ ! -x "$binary" ] || step "$name" "$limit" "$binary" --test-threads=1 --nocapture "$@"
}

# NAME LIMIT LAYERS HIDDEN INTERMEDIATE HEADS [FLAG...] of a Llama with random weights: steps of 512 tokens.
dummy() {
  local name=$1 limit=$2 folder=$work/$1 run
  mkdir -p "$folder"
  cp "$here"/tokenizer*.json "$folder/"
  sed -e "s/\(\"num_hidden_layers\": \)[0-9]*/\1$3/" -e "s/\(\"hidden_size\": \)[0-9]*/\1$4/" \
    -e "s/\(\"intermediate_size\": \)[0-9]*/\1$5/" -e "s/\(\"num_[a-z_]*heads\": \)[0-9]*/\1$6/" \
    "$here/config.json" >"$folder/config.json"
  for _ in $(seq 16); do printf '{"text": "%s"}\n' "$(head -c 4096 /dev/zero | tr '\0' 'a')"; done >"$folder/data.jsonl"
  run=(--model "$folder" --load-format dummy --device cuda --dtype bf16 --quant nf4 --max-length 512 --gradient-checkpointing
    --target-modules all-linear --r 16 --per-device-train-batch-size 1 "${@:7}")
  step "estimate_$name" 30 "$here/bin/finetune" estimate "${run[@]}"
  step "train_$name" "$limit" "$here/bin/finetune" train "${run[@]}" --data "$folder/data.jsonl" --output "$folder/out" \
    --max-steps 12 --logging-steps 1 --save-strategy no
}

device=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1)
printf '%s\n' "$device" "$(uname -srm)" "$(ldd --version 2>&1 | head -n 1)" | tee -a "$log"
report

# Without kernels for one chip alone and without graphs, then with both.
LOWRANK_CUDA_PORTABLE=1 LOWRANK_CUDA_GRAPHS=0 tests parity_portable 90 parity_cuda
tests parity_cuda 60 parity_cuda
tests cuda_gemm 90 cuda_gemm
tests cuda_attention 60 cuda_attention
tests cuda_loss 60 cuda_loss
dummy 7b 120 32 4096 11008 32 || LOWRANK_CUDA_PORTABLE=1 dummy 7b_portable 120 32 4096 11008 32
# The same by kernel: a table on stderr, of steps whose kernels start one by one.
LOWRANK_CUDA_PROFILE=1 dummy 7b_profile 120 32 4096 11008 32
bench() { step "$1" "$2" "$here/bin/cuda" --bench --quick "${@:3}"; }
bench bench_short 120 '^(copy|gemm bf16|gemm nf4 4096x4096|attention|linear cross-entropy 32000)'
tests cuda_model 120 cuda_model
tests cuda_streams 60 cuda_streams
if command -v compute-sanitizer >/dev/null; then
  sanitize() { step "$1" "$2" compute-sanitizer --tool "$1" --error-exitcode 9 "$here/bin/$3" --test-threads=1 "${@:4}"; }
  sanitize memcheck 90 parity_cuda bf16_operations
  sanitize racecheck 90 cuda_attention every_kernel_of_a_chip_has_the_same_bits
  sanitize synccheck 60 cuda_attention every_kernel_of_a_chip_has_the_same_bits
else
  row compute-sanitizer "not on this machine" 0
fi
bench bench 300
[ -z "${LOWRANK_RUN_65B:-}" ] || dummy 65b 600 80 8192 22016 64 --memory-limit 40GB
printf '\n'
cat "$results/report.md"
exit $failed
