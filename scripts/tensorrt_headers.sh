#!/usr/bin/env bash
# Put TensorRT's headers, without TensorRT, into a folder: tensorrt_headers.sh FOLDER. Then FOLDER/include/tensorrt holds
# them and TENSORRT_ROOT=FOLDER builds the plugin. They are TensorRT 10.14's, from a wheel on PyPI of 0.2 MB that ships
# them; nothing of it is installed. Where TensorRT itself is installed, name its folder as TENSORRT_ROOT instead.
set -euo pipefail
folder=${1:?usage: tensorrt_headers.sh FOLDER}
wheel="kernel-lens==2.0.1"
if [ -e "$folder/include/tensorrt/NvInferRuntime.h" ]; then exit 0; fi
mkdir -p "$folder"
work=$(mktemp -d "$folder/.XXXXXX")
trap 'rm -rf "$work"' EXIT
if ! python3 -m pip download -q --no-deps --only-binary :all: -d "$work" "$wheel" > "$work/log" 2>&1; then
    echo "TensorRT headers: could not download $wheel: $(tail -n 1 "$work/log"); set TENSORRT_ROOT to a TensorRT folder" >&2
    exit 1
fi
python3 - "$work" << 'PYTHON'
import pathlib, sys, zipfile
work = pathlib.Path(sys.argv[1])
(wheel,) = work.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    names = [name for name in archive.namelist() if "/include/tensorrt/" in name and name.endswith(".h")]
    if not any(name.endswith("/NvInferRuntime.h") for name in names):
        sys.exit(f"TensorRT headers: {wheel.name} does not hold them; set TENSORRT_ROOT to a TensorRT folder")
    target = work / "include" / "tensorrt"
    target.mkdir(parents=True)
    for name in names:
        (target / name.rsplit("/", 1)[1]).write_bytes(archive.read(name))
PYTHON
rm -rf "$folder/include"
mv "$work/include" "$folder/include"
