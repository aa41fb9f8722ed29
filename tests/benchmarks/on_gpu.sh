#!/usr/bin/env bash
# What this project checks and measures on a GPU, the most wanted first, with a limit for each part: 14 minutes at most.
#   bash tests/benchmarks/on_gpu.sh [PYTHON [PART ...]]      parts: step inference tests modes; none named: all
# Figures are printed as they are there. Exit code 1 where a test fails, a limit is missed or a part's time was over.
set -uo pipefail
python=${1:-python} failed=0
parts=("${@:2}")
[ ${#parts[@]} -gt 0 ] || parts=(step inference tests modes)
[[ $python == /* || $python != */* ]] || python=$PWD/$python
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

limited() { # seconds, command. INT: pytest then says what has failed so far, hrnet what is measured.
    local limit=$1 begun=$SECONDS code=0
    shift
    echo "--- $*"
    timeout --signal=INT --kill-after=10 "$limit" "$@" || code=$?
    [[ $code == 124 || $code == 137 ]] && echo "not through after $limit s"
    [ "$code" = 0 ] || failed=1
    echo "--- ended with $code after $((SECONDS - begun)) s"
}

step() { # images/s of W32, compiled and recorded, resident and in the loop; W48; what they are held against
    limited 360 "$python" tests/benchmarks/bench_train.py --device cuda --seconds 290
}

inference() { # people/s of W32 from host to host
    limited 120 "$python" tests/benchmarks/bench_inference.py --device cuda --mode compiled_bfloat16
}

tests() { # with the slow one, which compiles
    limited 180 "$python" -m pytest -v -p no:cacheprovider -m "" --durations=5 tests/test_cuda_training.py tests/test_cuda_passes.py
}

modes() { # p50 and p99
    local network
    for network in w32_256x192 w48_384x288; do
        limited 90 "$python" -m pipelines.cli benchmark "$network" --device cuda --modes bfloat16 compiled_bfloat16 \
            --batch-sizes 1 16 64 256
    done
}

for part in "${parts[@]}"; do
    case $part in
        step | inference | tests | modes) ;;
        *)
            echo "no part is called $part: step, inference, tests, modes" >&2
            exit 2
            ;;
    esac
done
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "no GPU that torch can use" >&2
    exit 1
}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
for part in "${parts[@]}"; do "$part"; done
exit $failed
