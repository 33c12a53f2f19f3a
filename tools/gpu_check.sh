#!/usr/bin/env bash
# Tests and measures the kernels on a machine with an NVIDIA GPU:
#   bash tools/gpu_check.sh [FOLDER]          (default: work_dirs/gpu_check)
#   bash tools/gpu_check.sh --list            (prints the commands, runs none)
# Needs torch, triton and pytest (matplotlib for pictures), no mm package. Takes at
# most 8 minutes. Everything goes to FOLDER, and packed to FOLDER.tar.gz. What fails
# does not stop the rest: the suites compare with naive before they measure, and leave
# out what is wrong. PYTHON names the interpreter (default: python). A copy without
# .git can be given its commit in DEFORM_GQA_COMMIT.
#
# The tests alone compile for ten minutes. Where pytest-xdist is installed they run in
# as many processes as there are cores, and kernels compiled beforehand, on any machine,
# are taken from work_dirs/kernel_cache.tar.gz: tools/warm_kernel_cache.py writes it.
set -uo pipefail

LIST_ONLY=no
if [ "${1:-}" = --list ]; then
    LIST_ONLY=yes
    shift
fi
OUT=${1:-work_dirs/gpu_check}
if [ "$LIST_ONLY" = no ]; then
    mkdir -p "$OUT" || exit 2
    OUT=$(cd "$OUT" && pwd)
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
KERNEL_CACHE=work_dirs/kernel_cache
BUDGET_S=${BUDGET_S:-460} # 20 s of the 8 minutes are for packing
TESTS_S=${TESTS_S:-110}   # for each half
SANITIZER_S=60            # for each tool
MOST_WORKERS=16           # each takes half a GiB of the GPU
failures=0

say() { echo "[gpu_check ${SECONDS}s] $*"; }

left() { echo $((BUDGET_S - SECONDS)); }

# step NAME SECONDS COMMAND...: runs it within the time that is left, logs to
# NAME.log, notes the outcome in summary.txt.
step() {
    local name=$1 limit=$2 code=0 begin=$SECONDS
    shift 2
    if [ "$LIST_ONLY" = yes ]; then
        echo "$*"
        return 0
    fi
    [ "$limit" -le "$(left)" ] || limit=$(left)
    if [ "$(left)" -le 5 ]; then
        echo "$name: skipped, no time left" | tee -a "$OUT/summary.txt"
        failures=$((failures + 1))
        return 1
    fi
    say "$name (at most ${limit}s)"
    # At an interrupt pytest still writes what it has found.
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || code=$?
    local outcome=passed
    [ "$code" = 0 ] || outcome="FAILED (exit code $code)"
    [ "$code" != 124 ] && [ "$code" != 137 ] || outcome="FAILED (more than ${limit}s)"
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
    if [ "$LIST_ONLY" = yes ]; then
        return 0 # its kernels are those of the ops
    fi
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

# run_tests NAME FILES...: the tests in them that need a GPU, whatever fails.
run_tests() {
    local name=$1 parallel=()
    shift
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then
        local workers
        workers=$(getconf _NPROCESSORS_ONLN)
        parallel=(-n $((workers < MOST_WORKERS ? workers : MOST_WORKERS)))
    fi
    step "$name" "$TESTS_S" env OMP_NUM_THREADS=1 "$PYTHON" -m pytest -m cuda -q -ra \
        -p no:cacheprovider --junitxml="$OUT/$name.xml" ${parallel[@]+"${parallel[@]}"} "$@"
    if [ -f "$OUT/$name.log" ]; then
        grep -hE '^(FAILED|ERROR) ' "$OUT/$name.log" >>"$OUT/failed_tests.txt"
    fi
}

# The files in which tests carry the marker; those of deform_attn, or all others.
cuda_tests() {
    local files
    files=$(grep -rlE 'mark\.cuda' --include='test_*.py' tests/test_ops | sort)
    case $1 in
    deform_attn) grep test_deform_attn/ <<<"$files" ;;
    others) grep -v test_deform_attn/ <<<"$files" ;;
    esac
}

# Small maps under each tool; without torch's caching, memcheck sees every array end.
run_sanitizer() {
    if [ "$LIST_ONLY" = no ] && ! command -v compute-sanitizer >/dev/null; then
        echo 'sanitizer: skipped, compute-sanitizer is not on PATH' |
            tee -a "$OUT/summary.txt"
        return 0
    fi
    local tool
    for tool in memcheck racecheck; do
        step "sanitizer_$tool" "$SANITIZER_S" \
            env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$PYTHON" tools/benchmark.py op deform_attn deform_sdpa \
            neighborhood_attn ms_deform_attn --device cuda --dtype bf16 --gate-only --backends triton --batch-sizes 1 \
            --sizes 60x92 --stages 1 2 --kv-heads full \
            --maps 7x9 --heads 4 --views 2 --points 3
    done
}

pack() {
    tar -czf "$OUT.tar.gz" -C "$(dirname "$OUT")" "$(basename "$OUT")"
    say "$OUT.tar.gz holds everything; the outcome:"
    cat "$OUT/summary.txt"
    [ "$failures" = 0 ] || echo "gpu_check.sh: $failures steps failed" >&2
    exit $((failures > 0))
}

# What an earlier run left would be packed as if it were of this one.
clean() {
    local name
    for name in device tests_{deform_attn,others} sanitizer_{memcheck,racecheck} \
        deform_attn{_peers,} deform_sdpa_{fp32,bf16} neighborhood_attn ms_deform_attn \
        backbone{,_224} breakdown layer detector gqa_sweep_{deform_sdpa,deform_attn}; do
        rm -rf "${OUT:?}/$name" "$OUT/$name.log" "$OUT/$name.xml"
    done
    : >"$OUT/summary.txt"
    : >"$OUT/failed_tests.txt"
}

unpack_kernels() {
    if [ -f "$KERNEL_CACHE.tar.gz" ]; then
        export TRITON_CACHE_DIR=$PWD/$KERNEL_CACHE
        step kernel_cache 30 "$PYTHON" tools/warm_kernel_cache.py \
            --unpack "$KERNEL_CACHE.tar.gz"
    fi
}

if [ "$LIST_ONLY" = no ]; then
    clean
    nvidia-smi >"$OUT/nvidia_smi.txt" 2>&1 || echo 'no nvidia-smi' >"$OUT/nvidia_smi.txt"
    step device 60 "$PYTHON" -m deform_gqa.profiling.environment cuda || pack
    unpack_kernels
fi
# First what the targets are about, tests and peers at one batch size.
# shellcheck disable=SC2046 # one argument a file
run_tests tests_deform_attn $(cuda_tests deform_attn)
suite deform_attn_peers 90 op deform_attn --dtype bf16 --sizes 800x1333 \
    --batch-sizes 2 --kv-heads full
# shellcheck disable=SC2046
run_tests tests_others $(cuda_tests others)
run_sanitizer
# Published inputs, 2 to 12 views and points, and all numbers of kv heads.
for dtype in fp32 bf16; do
    suite "deform_sdpa_$dtype" 50 op deform_sdpa --dtype "$dtype" --kv-heads full \
        --backends naive torch triton
done
suite neighborhood_attn 45 op neighborhood_attn --dtype bf16 --sizes 800x1333 \
    --batch-sizes 2 --kv-heads full one
suite ms_deform_attn 45 op ms_deform_attn --dtype bf16 --sizes 800x1333 \
    --batch-sizes 2 --kv-heads full one --backends naive triton mmcv
model_suites
for target in deform_sdpa deform_attn; do
    suite "gqa_sweep_$target" 25 gqa-sweep "$target" --amp bf16
done
suite deform_attn 60 op deform_attn --dtype bf16 --backends naive triton
[ "$LIST_ONLY" = yes ] || pack
