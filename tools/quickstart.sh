#!/usr/bin/env bash
# From a fresh clone to a trained detector, pictures and a benchmark table:
#   bash tools/quickstart.sh [options of tools/train.py]
# For example `bash tools/quickstart.sh --resume` goes on after an interruption, and
# `bash tools/quickstart.sh --cfg-options train_cfg.max_epochs=1` is over sooner.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CONFIG=configs/quickstart/retinanet_dat-gqa-mini_fpn_shapes.py
DATA=data/shapes
WORK_DIR=work_dirs/quickstart

say() { echo "[quickstart ${SECONDS}s] $*"; }

advice=''
trap '[ $? = 0 ] || echo "quickstart.sh stopped: $advice" >&2' EXIT

advice='the environment is not complete; the reason is above.'
say 'environment'
bash tools/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"

advice="the data could not be made; remove $DATA and run this again."
say "synthetic shapes in $DATA"
python tools/dataset_converters/make_shapes.py --out-dir "$DATA"

advice='training stopped; to go on, run: bash tools/quickstart.sh --resume'
say "training (interrupt it at will; with --resume it goes on): $CONFIG"
python tools/train.py "$CONFIG" "$@" --work-dir "$WORK_DIR"

advice='testing stopped; the reason is above.'
checkpoint=$(cat "$WORK_DIR/last_checkpoint")
say "testing $checkpoint"
python tools/test.py "$CONFIG" "$checkpoint" --work-dir "$WORK_DIR/test" \
    --show-dir pictures

newest=$(ls -td "$WORK_DIR"/test/*/ | head -n 1)
advice='the pictures could not be drawn; the reason is above.'
python tools/draw_run.py "$WORK_DIR" --pictures "$newest"

advice='the benchmark stopped; the reason is above.'
say 'benchmark of the attention operators'
python tools/benchmark.py op --quick --out "$WORK_DIR/benchmark"

cat <<EOF

Done in ${SECONDS}s.
  checkpoint       $checkpoint
  metrics          $(ls "$newest"*.json)
  pictures         ${newest}pictures
                   $WORK_DIR/predictions.png, $WORK_DIR/training.png
  benchmark table  $WORK_DIR/benchmark
EOF
