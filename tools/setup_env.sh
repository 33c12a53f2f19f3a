#!/usr/bin/env bash
# Makes .venv in the repository with all that training needs, or the tests as well:
#   bash tools/setup_env.sh [--tests]
# A second run has nothing to do and takes no time. PYTHON names the interpreter to
# start from (default python3). A torch >= 2.6 that it has is kept.
# mmcv is compiled once: its wheel is kept for other clones in the folder that
# DEFORM_GQA_WHEELS names (default ~/.cache/deform_gqa/wheels).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH='torch==2.13.0' # only where there is none
OLDER_TRITON='triton==3.6.0' # of torch 2.11, for the tests of the compiled kernels
VENV=.venv
OLDER_TRITON_AT=$VENV/triton-3.6
LOG=$VENV/setup_env.log
STAMP=$VENV/setup_env.stamp
TESTS_STAMP=$VENV/setup_env.tests.stamp
WHEELS=${DEFORM_GQA_WHEELS:-${XDG_CACHE_HOME:-${HOME:-$PWD/$VENV}/.cache}/deform_gqa/wheels}
MMCV=$(grep -o 'onedl-mmcv[^ ]*' setup.cfg)
# Without these caps pip would install with mmcv what is newest, to replace it later.
mapfile -t CAPS < <(grep -oE '(numpy|opencv-python)<[^ ]+' setup.cfg)

say() { echo "[setup_env ${SECONDS}s] $*"; }

stop() {
    echo "setup_env.sh stopped: $*" >&2
    exit 1
}

# Tells now and then that a step is still running. Its sleep must not keep the output
# or the lock open when the step is over.
heartbeat() {
    while sleep 30 >/dev/null 2>&1 9>&-; do
        say "  still at it: $(tail -n 1 "$LOG" | cut -c 1-60)"
    done
}

# step TEXT ADVICE COMMAND...: runs the command with its output in the log.
step() {
    local text=$1 advice=$2 code=0
    shift 2
    say "$text"
    echo "### $*" >>"$LOG"
    heartbeat &
    beat=$!
    "$@" >>"$LOG" 2>&1 9>&- || code=$?
    quiet
    [ "$code" = 0 ] || stop "$advice (all output: $LOG)"
}

beat=''
quiet() {
    if [ -n "$beat" ]; then
        kill "$beat" 2>/dev/null || true
        wait "$beat" 2>/dev/null || true
        beat=''
    fi
}
trap quiet EXIT

# What the environment depends on, as one number.
wanted() { { pwd && cat setup.cfg tools/setup_env.sh; } | cksum; }

is_ready() {
    local stamp=$STAMP
    [ "$for_tests" = no ] || stamp=$TESTS_STAMP
    [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(wanted)" ]
}

# One setup at a time: a second one waits, and then finds everything ready.
take_lock() {
    if ! command -v flock >/dev/null; then
        return # not on every system; two setups at once are rare
    fi
    exec 9>.setup_env.lock
    if ! flock --nonblock 9; then
        say 'another setup is running; waiting for it'
        flock 9
    fi
}

make_venv() {
    local python=${PYTHON:-python3} options=()
    command -v "$python" >/dev/null ||
        stop "there is no '$python'; install Python >= 3.10 or set PYTHON."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        stop "$("$python" --version) is too old; install Python >= 3.10 or set PYTHON."
    if "$python" - 2>/dev/null <<<"$HAS_TORCH"; then
        say "keeping the torch of $python"
        options=(--system-site-packages)
    fi
    "$python" -m venv ${options[@]+"${options[@]}"} "$VENV" ||
        stop "'$python -m venv' failed; install Python's venv module (python3-venv)."
}

HAS_TORCH='
import sys, torch
sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6))
'

# mmcv must load beside this torch, and have CUDA operators where torch sees a GPU.
MMCV_WORKS='
import mmcv._ext, torch
from mmcv.ops import get_compiling_cuda_version
assert not torch.cuda.is_available() or (
    get_compiling_cuda_version() != "not available"
), "mmcv was built without CUDA"
'

install_torch() {
    if python -c 'import torch' 2>/dev/null; then
        python - <<<"$HAS_TORCH" ||
            stop "the torch in $VENV is older than 2.6; remove $VENV and run this again."
    else
        step "installing $TORCH" 'torch could not be installed; check the network.' \
            python -m pip install "$TORCH"
    fi
}

check_cuda_compiler() {
    python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
        2>>"$LOG" || return 0
    export FORCE_CUDA=1
    python - <<<'
import os, sys
from torch.utils.cpp_extension import CUDA_HOME
sys.exit(CUDA_HOME is None or not os.path.isfile(f"{CUDA_HOME}/bin/nvcc"))' ||
        stop 'this machine has a GPU but no nvcc, which mmcv needs; install the CUDA' \
            "toolkit that $(python -c 'import torch; print(torch.version.cuda)') names," \
            'or set CUDA_VISIBLE_DEVICES= to set up for the CPU.'
}

mmcv_works() { python - <<<"$MMCV_WORKS" >>"$LOG" 2>&1; }

# What a wheel of mmcv was compiled for, as the name of a folder.
BUILD_TAG='
import platform, sysconfig, torch
cuda = torch.version.cuda if torch.cuda.is_available() else None
print(sysconfig.get_config_var("SOABI"), "torch", torch.__version__,
      f"cuda{cuda}" if cuda else "cpu", *platform.libc_ver(), sep="-")
'

# The folder in which mmcv for this torch is kept; beside the environment if the wanted
# one cannot be written.
wheel_folder() {
    local folder
    folder=$WHEELS/${MMCV/'~='/-}-$(python - <<<"$BUILD_TAG")
    if ! mkdir -p "$folder" 2>>"$LOG" || ! [ -w "$folder" ]; then
        say "$folder cannot be written: mmcv is not kept for other clones" >&2
        folder=$PWD/$VENV/wheels
        mkdir -p "$folder"
    fi
    echo "$folder"
}

install_wheel() {
    step "installing ${1##*/}, which was compiled before" 'mmcv could not be installed.' \
        python -m pip install --force-reinstall --no-deps "$1"
    step 'installing what mmcv needs' 'check the network.' \
        python -m pip install "$MMCV" "${CAPS[@]}"
}

# build_wheel FOLDER [options of pip]: the wheel appears there when it is complete.
build_wheel() {
    local folder=$1 part=$1/.part-$$
    shift
    step "compiling $MMCV: 6 to 20 minutes" \
        'mmcv could not be built; it needs a C++ compiler.' \
        python -m pip wheel --no-build-isolation --no-deps --wheel-dir "$part" \
        "$@" "$MMCV"
    mv -f "$part"/*.whl "$folder/"
    rmdir "$part"
}

install_mmcv() {
    if mmcv_works; then
        return
    fi
    check_cuda_compiler
    local folder options
    folder=$(wheel_folder)
    # What was kept, what pip has kept (for whatever torch it was), and compiled anew.
    for options in kept '' --no-cache-dir; do
        if [ "$options" != kept ]; then
            build_wheel "$folder" ${options:+"$options"}
        fi
        for wheel in "$folder"/*.whl; do
            [ -e "$wheel" ] || continue
            install_wheel "$wheel"
            if mmcv_works; then
                return
            fi
        done
    done
    stop "mmcv does not load beside this torch; see the end of $LOG."
}

install_package() {
    local extras=mm
    [ "$for_tests" = no ] || extras=mm,dev,export,lm,search # projects are tested too
    # A triton that is there belongs to its torch.
    python -c 'import triton' 2>/dev/null || extras=$extras,triton
    step "installing deform_gqa with the extras $extras" \
        'the packages could not be installed; check the network.' \
        python -m pip install --no-build-isolation -e ".[$extras]"
    step 'checking that everything loads' 'a package does not load.' \
        python -c 'import mmdet.models, deform_gqa.engine'
}

# A second Triton, beside that of the environment: first on PYTHONPATH it takes its place.
install_older_triton() {
    if ! python -c 'import triton' 2>/dev/null ||
        PYTHONPATH=$OLDER_TRITON_AT python - "$OLDER_TRITON" <<<"$IS_TRITON" 2>/dev/null
    then
        return
    fi
    rm -rf "$OLDER_TRITON_AT"
    step "installing $OLDER_TRITON for the tests" \
        "$OLDER_TRITON could not be installed; check the network." \
        python -m pip install --no-deps --target "$OLDER_TRITON_AT" "$OLDER_TRITON"
}

IS_TRITON='
import sys, triton.compiler
sys.exit(sys.argv[1] != f"triton=={triton.__version__}")
'

case "$*" in
    '') for_tests=no ;;
    --tests) for_tests=yes ;;
    *) stop "unknown options '$*'; there is only --tests." ;;
esac
if is_ready; then
    exit 0
fi
take_lock
if is_ready; then
    exit 0
fi
[ -e "$VENV" ] || make_venv
"$VENV/bin/python" -c '' 2>/dev/null ||
    stop "the Python of $VENV does not run; remove $VENV and run this again."
export PATH="$PWD/$VENV/bin:$PATH"
export CFLAGS=${CFLAGS:--g0 -O2} # debug information would treble mmcv's build time
export PIP_COMPILE=0 # Python compiles what is imported when it is imported
export MAX_JOBS=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}
: >"$LOG"
step 'installing the build tools' 'pip cannot install; check the network.' \
    python -m pip install --upgrade pip setuptools wheel ninja
install_torch
install_mmcv
install_package
if [ "$for_tests" = yes ]; then
    install_older_triton
    wanted >"$TESTS_STAMP"
fi
wanted >"$STAMP"
say "ready: $VENV"
