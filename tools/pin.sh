#!/bin/bash
# Writes tests/requirements.txt: what tools/test.sh installs (the extras test and docs, and what the
# wheel is built with), every package with its version and the hashes of its files. To be run, and its
# result committed, when pyproject.toml asks for something else, or to move all to newer versions:
#
#   tools/pin.sh              what is written stays unless pyproject.toml forbids it
#   tools/pin.sh --upgrade    the newest that pyproject.toml allows
#
# Then pip-audit says what is known to be wrong with them. PyTorch is pinned by pyproject.toml and
# has no hash: which build of a version pip takes (with CUDA or without) depends on the machine.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=build/pin-tools
[ -x $tools/bin/python ] || python3 -m venv $tools
$tools/bin/pip install -q --disable-pip-version-check pip-tools==7.6.2 pip-audit==2.10.1

CUSTOM_COMPILE_COMMAND=tools/pin.sh $tools/bin/pip-compile -q --generate-hashes --strip-extras \
  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --extra test --extra docs \
  --all-build-deps --unsafe-package torch --no-allow-unsafe -o tests/requirements.txt "$@" pyproject.toml
$tools/bin/pip-audit --disable-pip --require-hashes -r tests/requirements.txt
