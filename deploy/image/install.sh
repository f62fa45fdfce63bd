#!/bin/sh
# Installs constellation from a checkout into a prefix that needs neither compiler nor checkout any more.
#
#     deploy/image/install.sh SOURCE PREFIX [cpu|cuda]
#
# The Dockerfile runs this in its first stage, a test in an empty folder. TORCH_INDEX is where wheels of torch without
# CUDA come from (those of PyPI bring CUDA and what it needs); set to nothing it asks the ordinary index alone.
set -eu

source=$(cd "$1" && pwd) prefix=$2 device=${3:-cpu}
case $device in
    cpu) index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu} ;;
    cuda) index= ;;
    *) echo "$0: device '$device'; cpu or cuda is wanted" >&2; exit 2 ;;
esac

${PYTHON:-python3} -m venv "$prefix"
"$prefix/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-compile \
    ${index:+--extra-index-url "$index"} --constraint "$source/constraints.txt" "$source[serve,rayserve]"
"$prefix/bin/python" -m constellation.decoding.built "$prefix/lib/constellation"
