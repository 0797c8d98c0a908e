#!/usr/bin/env bash
# Writes the Python stubs for protos/ into client/tinkerbell/v1, or into the folder given as $1.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-client}
.venv/bin/python -m grpc_tools.protoc -I protos \
  --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" protos/tinkerbell/v1/*.proto
rm -f "$out/tinkerbell/v1/common_pb2_grpc.py" # no service in it
