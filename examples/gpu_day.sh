#!/usr/bin/env bash
# Measures, once a GPU is available, what could not be measured without one, the most important first.
#
#   DATA=DIR OUT=gpu_day examples/gpu_day.sh
#
# A call takes under ten minutes (LIMIT seconds) and must be repeated while the exit status is 3. A
# step that has ended is not run again; interrupted measurements restart, interrupted trainings resume.
# OUT receives a log for each step (a few kB; with the trained artifacts, all that is needed later) and
# NAME.done or NAME.failed. Nothing is run after a correctness step that fails. DATA is as for
# `ttt-plugins benchmark` and holds cifar10/ for the trainings; without it there are no trainings.
set -uo pipefail
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cuda} OUT=${OUT:-gpu_day} DATA=${DATA:-} LIMIT=${LIMIT:-540} PYTHON=${PYTHON:-python}
mkdir -p "$OUT"
failed=0

# step NAME SECONDS COMMAND...: a step that is started only if a call has as many seconds left.
step() {
  local name=$1 seconds=$2 left=$((LIMIT - SECONDS)) status
  shift 2
  [ -e "$OUT/$name.done" ] && return 0
  [ -e "$OUT/$name.failed" ] && { failed=1; return 1; }
  [ "$left" -lt "$seconds" ] && again "$name"
  echo "$name: $*"
  timeout --kill-after=20 "$left" "$PYTHON" "$@" >>"$OUT/$name.log" 2>&1
  status=$?
  if [ "$status" = 0 ]; then
    touch "$OUT/$name.done"
    return 0
  fi
  # Out of time: the next call resumes this step.
  [ "$status" = 124 ] || [ "$status" = 137 ] && again "$name"
  touch "$OUT/$name.failed"
  echo "$name failed, see $OUT/$name.log" >&2
  failed=1
  return 1
}

again() {
  echo "time ran out before $1 ended; call this script again"
  exit 3
}

# -- correctness -------------------------------------------------------------------------
step tests 60 -m pytest -q -n 0 tests/test_benchmark_protocols.py -k on_a_gpu || exit 1
step check 240 examples/device_check.py --device "$DEVICE" || exit 1

# -- the figures that README.md and RESULTS.md lack --------------------------------------
step step_cost 200 examples/step_cost.py --device "$DEVICE"
step per_image 400 examples/per_image_speed.py --device "$DEVICE" --images 64
for options in "" "--channels-last" "--autocast bfloat16"; do
  # Images per second do not depend on the number of cells.
  # shellcheck disable=SC2086
  step "full${options// /}" 400 examples/benchmark_speed.py full --device "$DEVICE" --cells 15 $options
done

# -- trainings, as the papers have them --------------------------------------------------
if [ -n "$DATA" ]; then
  common=(--device "$DEVICE" --resume)
  train() { # NAME ARGUMENTS...
    local name=$1
    shift
    step "train-$name" 60 -m ttt_plugins train "$@" --out "$OUT/$name" "${common[@]}"
  }
  train ttt ttt --arch ttt_resnet26 --data-dir "$DATA/cifar10"
  train byol mt3 --joint --data-dir "$DATA/cifar10" &&
    train mt3 mt3 --init "$OUT/byol" --data-dir "$DATA/cifar10"
  for network in resnet26bn vit-tiny; do
    train "mgg-$network" mgg --model "bundled:source-$network-cifar10" --data-dir "$DATA" \
      --validate-every 40
  done
fi
[ "$failed" = 0 ] && echo "all done"
exit "$failed"
