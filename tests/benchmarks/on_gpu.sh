#!/usr/bin/env bash
# What this project checks and measures on a GPU, the most wanted first, with a limit for each part: 14 minutes at most.
#   bash tests/benchmarks/on_gpu.sh [PYTHON]
# Figures are printed as they are there. Exit code 1 where a test fails, a limit is missed or a part's time was over.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python} failed=0

part() { # seconds, command
    local limit=$1 begun=$SECONDS code=0
    shift
    echo "--- $*"
    PYTHONPATH=$PWD timeout --kill-after=10 "$limit" "$@" || code=$?
    [ "$code" = 124 ] && echo "not through after $limit s"
    [ "$code" = 0 ] || failed=1
    echo "--- ended with $code after $((SECONDS - begun)) s"
}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "no GPU that torch can use" >&2
    exit 1
}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
part 200 "$python" -m pytest -q -p no:cacheprovider tests/test_cuda_training.py tests/test_cuda_passes.py
part 240 "$python" tests/benchmarks/bench_train.py --device cuda --only loop table --seconds 180
part 200 "$python" tests/benchmarks/bench_inference.py --device cuda --mode compiled_bfloat16 --only host decode
part 180 "$python" -m pipelines.cli benchmark w48_384x288 --device cuda --modes bfloat16 compiled_bfloat16 --batch-sizes 1 64 256
exit $failed
