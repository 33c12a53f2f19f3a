#!/usr/bin/env bash
# Tests and measures the kernels on a machine with an NVIDIA GPU:
#   bash tools/gpu_check.sh [FOLDER]          (default: work_dirs/gpu_check)
# Needs torch, triton and pytest (matplotlib for pictures), no mm package. Takes at
# most 8 minutes. Everything goes to FOLDER, and packed to FOLDER.tar.gz. Measures
# only after the tests passed. PYTHON names the interpreter (default: python).
# A copy without .git can be given its commit in DEFORM_GQA_COMMIT.
set -uo pipefail

OUT=${1:-work_dirs/gpu_check}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
BUDGET_S=460     # 20 s of the 8 minutes are for packing
TESTS_S=200
SANITIZER_S=60   # for each tool
failures=0

say() { echo "[gpu_check ${SECONDS}s] $*"; }

left() { echo $((BUDGET_S - SECONDS)); }

# step NAME SECONDS COMMAND...: runs it within the time that is left, logs to
# NAME.log, notes the outcome in summary.txt.
step() {
    local name=$1 limit=$2 code=0 begin=$SECONDS
    shift 2
    [ "$limit" -le "$(left)" ] || limit=$(left)
    if [ "$limit" -le 5 ]; then
        echo "$name: skipped, no time left" | tee -a "$OUT/summary.txt"
        failures=$((failures + 1))
        return 1
    fi
    say "$name (at most ${limit}s)"
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || code=$?
    local outcome=passed
    [ "$code" = 0 ] || outcome="FAILED (exit code $code)"
    [ "$code" != 124 ] || outcome="FAILED (more than ${limit}s)"
    echo "$name: $outcome, $((SECONDS - begin))s" | tee -a "$OUT/summary.txt"
    [ "$code" = 0 ] || failures=$((failures + 1))
    return "$code"
}

# suite NAME SECONDS SUITE OPTIONS...: a run of the benchmark, written to its own folder.
# It stops measuring before the step would be killed, and reports what it has.
suite() {
    local name=$1 limit=$2
    shift 2
    [ "$limit" -le "$(left)" ] || limit=$(left)
    step "$name" "$limit" "$PYTHON" tools/benchmark.py "$@" \
        --device cuda --min-time-s 0.1 \
        --time-limit-s $((limit > 60 ? limit - 30 : (limit + 1) / 2)) --out "$OUT/$name"
}

# Layers, backbones and detectors need the mm packages.
model_suites() {
    if ! "$PYTHON" -c 'import mmengine, mmcv.cnn, mmdet.registry' 2>/dev/null; then
        echo 'layer, backbone, detector: skipped, the mm packages are not installed' |
            tee -a "$OUT/summary.txt"
        return 0
    fi
    local common=(--amp bf16 --batch-sizes 2 --backends naive auto)
    suite backbone 60 backbone t++ --sizes 800x1333 "${common[@]}"
    suite breakdown 50 backbone t++ --sizes 800x1333 --breakdown "${common[@]}"
    suite backbone_224 40 backbone t++ t --sizes 224x224 --amp bf16 --batch-sizes 64 \
        --backends auto
    suite layer 40 layer --sizes 800x1333 "${common[@]}"
    if ! "$PYTHON" -c 'import mmdet.models' 2>/dev/null; then
        echo "detector: skipped, mmcv's ops are not built" | tee -a "$OUT/summary.txt"
        return 0
    fi
    suite detector 40 detector configs/dat_gqa/retinanet_dat-t-pp-gqa_fpn_1x_coco.py \
        --amp fp16 --batch-sizes 2 --backends naive auto
}

run_tests() {
    local files
    files=$(grep -rlE 'mark\.cuda' --include='test_*.py' tests/test_ops)
    if [ -z "$files" ]; then
        echo 'no test in tests/test_ops carries the marker cuda' >"$OUT/tests.log"
        echo 'tests: FAILED, there are none' | tee -a "$OUT/summary.txt"
        failures=$((failures + 1))
        return 1
    fi
    # shellcheck disable=SC2086 # one argument a file
    step tests "$TESTS_S" "$PYTHON" -m pytest -m cuda -q -ra -p no:cacheprovider $files
}

# Small maps under each tool; without torch's caching, memcheck sees every array end.
run_sanitizer() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo 'sanitizer: skipped, compute-sanitizer is not on PATH' |
            tee -a "$OUT/summary.txt"
        return 0
    fi
    local tool code=0
    for tool in memcheck racecheck; do
        step "sanitizer_$tool" "$SANITIZER_S" \
            env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$PYTHON" tools/benchmark.py op deform_attn deform_sdpa \
            neighborhood_attn --device cuda --dtype bf16 --gate-only --backends triton --batch-sizes 1 \
            --sizes 60x92 --stages 1 2 --kv-heads full \
            --maps 7x9 --heads 4 --views 2 --points 3 || code=1
    done
    return "$code"
}

pack() {
    tar -czf "$OUT.tar.gz" -C "$(dirname "$OUT")" "$(basename "$OUT")"
    say "$OUT.tar.gz holds everything; the outcome:"
    cat "$OUT/summary.txt"
    [ "$failures" = 0 ] || echo "gpu_check.sh: $failures steps failed" >&2
    exit $((failures > 0))
}

# What an earlier run left would be packed as if it were of this one.
for name in device tests sanitizer_{memcheck,racecheck} deform_attn{_peers,} \
    deform_sdpa_{fp32,bf16} neighborhood_attn backbone{,_224} breakdown layer detector \
    gqa_sweep_{deform_sdpa,deform_attn}; do
    rm -rf "${OUT:?}/$name" "$OUT/$name.log"
done
: >"$OUT/summary.txt"
nvidia-smi >"$OUT/nvidia_smi.txt" 2>&1 || echo 'no nvidia-smi' >"$OUT/nvidia_smi.txt"
step device 60 "$PYTHON" -m deform_gqa.profiling.environment cuda || pack
run_tests || pack
run_sanitizer || pack
# First what the targets are about: the peers at one batch size, then the models.
suite deform_attn_peers 90 op deform_attn --dtype bf16 --sizes 800x1333 \
    --batch-sizes 2 --kv-heads full
# Published inputs, 2 to 12 views and points, and all numbers of kv heads.
for dtype in fp32 bf16; do
    suite "deform_sdpa_$dtype" 50 op deform_sdpa --dtype "$dtype" --kv-heads full \
        --backends naive torch triton
done
suite neighborhood_attn 45 op neighborhood_attn --dtype bf16 --sizes 800x1333 \
    --batch-sizes 2 --kv-heads full one
model_suites
for target in deform_sdpa deform_attn; do
    suite "gqa_sweep_$target" 25 gqa-sweep "$target" --amp bf16
done
suite deform_attn 60 op deform_attn --dtype bf16 --backends naive triton
pack
