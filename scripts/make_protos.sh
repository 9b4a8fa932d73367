#!/usr/bin/env bash
# Generates protos/*_pb2.py, *_pb2.pyi and *_pb2_grpc.py from protos/*.proto.
# Code made by a newer protobuf refuses to load on an older one, so the oldest supported compiler makes it, in an
# environment of its own: it cannot share one with the newest runtime.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.protoc
if [ ! -x $venv/bin/python ] || [ ! -f $venv/.stamp ]; then
    "${PYTHON:-python3}" -m venv $venv
    $venv/bin/python -m pip install --quiet --disable-pip-version-check 'grpcio-tools==1.62.3' 'setuptools<81'
    touch $venv/.stamp
fi
$venv/bin/python -W ignore -m grpc_tools.protoc -Isrc --python_out=src --pyi_out=src \
    --grpc_python_out=src src/scission/protos/*.proto
# no service, no stubs
for file in protos/*_pb2_grpc.py; do
    grep -q 'class .*Stub' "$file" || rm "$file"
done
