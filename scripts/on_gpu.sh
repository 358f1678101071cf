#!/usr/bin/env bash
# What only a GPU can show: the suite on it, equality, speed with and without CUDA graphs, and a profile. Pieces of less
# than ten minutes each; what is done is kept in WORK, and the next call goes on. Figures go to benchmarks/gpu-*.json.
#
#   scripts/on_gpu.sh                  everything that is left
#   scripts/on_gpu.sh --seconds 500    begin no piece after so long, for machines that are lent by the piece
#   scripts/on_gpu.sh --list           what is done, what is left
#
# From the environment: DEVICE (cuda), SIZES ("1.5b 7b"), ROWS ("1 8 32 64 128 256"), WORK (.on_gpu), PYTHON (python3, with
# torch for the GPU), SMALL (a policy of scripts/make_reference_policy.py; without it one is trained).
# Tried without a GPU as: DEVICE=cpu SIZES= ROWS=8 scripts/on_gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cuda} SIZES=${SIZES-1.5b 7b} ROWS=${ROWS:-1 8 32 64 128 256}
WORK=${WORK:-.on_gpu} PYTHON=${PYTHON:-python3} LIMIT=590 UNTIL=1000000 LIST=
while [ $# -gt 0 ]; do
    case $1 in
        --seconds) UNTIL=$2; shift ;;
        --list) LIST=yes ;;
        *) echo "$0: $1 is not an option: --seconds N, --list" >&2; exit 2 ;;
    esac
    shift
done
WORK=$(realpath -m "$WORK")
mkdir -p "$WORK/done" "$WORK/logs" benchmarks
export XDG_CACHE_HOME="$WORK/cache" HF_HUB_OFFLINE=1
RUN="$PYTHON -m spec_rollout.cli" NAME=$DEVICE
[ "$DEVICE" = cuda ] && NAME=gpu
failed=0

piece() { # NAME COMMAND...: once, unless it is done
    local name=$1; shift
    [ -e "$WORK/done/$name" ] && { [ -n "$LIST" ] && echo "done    $name"; return; }
    [ -n "$LIST" ] && { echo "left    $name"; return; }
    [ "$SECONDS" -ge "$UNTIL" ] && { echo "later   $name"; return; }
    local began=$SECONDS
    if timeout "$LIMIT" "$@" > "$WORK/logs/$name.log" 2>&1; then
        touch "$WORK/done/$name"
        echo "done    $name ($((SECONDS - began)) s)"
    else
        failed=$((failed + 1))
        echo "FAILED  $name, status $?: $WORK/logs/$name.log ends in"
        tail -n 5 "$WORK/logs/$name.log"
    fi
}

piece machine "$PYTHON" -m spec_rollout.cli doctor
for test in equality ends bad_input broken_policy compiled delta_rule gumbel_max kv_cache law noise; do # none of whose tensors is left on the CPU
    piece "suite-$test" "$PYTHON" -m pytest -q --device "$DEVICE" "tests/engine/test_$test.py"
done
piece suite-training "$PYTHON" -m pytest -q -n 4 tests/training

small=${SMALL:-$WORK/policies/small}
[ -n "${SMALL:-}" ] || piece policy "$PYTHON" scripts/make_reference_policy.py --out "$small"
piece check $RUN check --policy "$small" --json "benchmarks/$NAME-small-check.json"
piece profile $RUN profile --policy "$small" --out "$WORK/profile" --trace --json "benchmarks/$NAME-small-profile.json"

for size in small $SIZES; do
    policy=$WORK/policies/$size dtype=bfloat16
    [ "$size" = small ] && policy=$small dtype=float32
    [ "$size" = small ] || piece "inflate-$size" "$PYTHON" scripts/inflate_policy.py --policy "$small" --to "$size" --out "$policy"
    for rows in $ROWS; do
        for way in eager graphs; do
            options=(); [ "$way" = graphs ] && options=(--compile-passes)
            piece "bench-$size-$rows-$way" $RUN bench --policy "$policy" --dtype $dtype --batch-sizes "$rows" --repeats 3 \
                "${options[@]}" --json "benchmarks/$NAME-$size-$rows-$way.json"
        done
    done
done
exit $((failed > 0))
