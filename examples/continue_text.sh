#!/bin/sh
# Continues a text with a model: continue_text.sh MODEL_FOLDER TEXT
set -eu
mustafar generate -m "$1" -p "$2" -n 64 --temp 0 --kv lossless
