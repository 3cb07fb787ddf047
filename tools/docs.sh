#!/bin/bash
# The documentation site, in build/site: tools/docs.sh, after a build of the package.
#
# Needs the package and the command, of build/cpu-test or of .venv, and no network once mkdocs is
# there (pip install '.[docs]', or by itself into build/docs-venv).
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -x build/cpu-test/cpp/mustafar ]; then
  export PATH=$PWD/build/cpu-test/cpp:$PATH PYTHONPATH=$PWD/build/cpu-test/python
fi
export PATH=$PATH:$PWD/.venv/bin
python=${PYTHON:-$(command -v python || command -v python3)}
if ! "$python" -c 'import mkdocs, mkdocstrings_handlers.python, material' 2>/dev/null; then
  [ -x build/docs-venv/bin/python ] ||
    "$python" -m venv build/docs-venv
  # What the extra [docs] pins, and what the package needs.
  build/docs-venv/bin/python - <<'EOF' | xargs build/docs-venv/bin/pip install -q --disable-pip-version-check
import tomllib

print("numpy", *tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])
EOF
  python=build/docs-venv/bin/python
fi
NO_MKDOCS_2_WARNING=1 "$python" -m mkdocs build --strict --quiet -f tools/docs/mkdocs.yml
echo "build/site/index.html"
