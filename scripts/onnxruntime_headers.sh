#!/usr/bin/env bash
# Put ONNX Runtime's C and C++ headers, without ONNX Runtime, into a folder: onnxruntime_headers.sh FOLDER. Then
# FOLDER/include holds them and ONNXRUNTIME_ROOT=FOLDER builds the operator. They come from the project's own release
# archive on GitHub or, where that cannot be reached and there is an apt, from Debian 13's package libonnxruntime-dev,
# with apt's lists in a folder of their own; nothing is installed. Both releases suit every runtime from 1.22 on.
set -euo pipefail
folder=${1:?usage: onnxruntime_headers.sh FOLDER}
release=1.22.0
url="https://github.com/microsoft/onnxruntime/releases/download/v$release/onnxruntime-linux-x64-$release.tgz"
if [ -e "$folder/include/onnxruntime_cxx_api.h" ]; then exit 0; fi
mkdir -p "$folder"
work=$(cd "$(mktemp -d "$folder/.XXXXXX")" && pwd)
trap 'rm -rf "$work"' EXIT

from_github() {
    python3 - "$url" "$work" << 'PYTHON'
import io, pathlib, sys, tarfile, urllib.request
url, work = sys.argv[1], pathlib.Path(sys.argv[2])
try:
    with urllib.request.urlopen(url, timeout=60) as answer:
        archive = tarfile.open(fileobj=io.BytesIO(answer.read()))
except (OSError, tarfile.TarError) as error:
    sys.exit(f"{url}: {error}")
(work / "include").mkdir()
for member in archive:
    if member.isfile() and "/include/" in member.name and member.name.endswith(".h"):
        (work / "include" / member.name.rsplit("/", 1)[1]).write_bytes(archive.extractfile(member).read())
PYTHON
}

from_debian() {
    local keys=/usr/share/keyrings/debian-archive-keyring.gpg
    if ! command -v apt-get > /dev/null || ! command -v dpkg-deb > /dev/null || [ ! -e "$keys" ]; then
        echo "Debian package: needs apt-get, dpkg-deb and $keys (package debian-archive-keyring)" >&2
        return 1
    fi
    mkdir -p "$work/apt/lists/partial" "$work/apt/cache/archives/partial" "$work/apt/parts"
    echo "deb [signed-by=$keys] http://deb.debian.org/debian trixie main" > "$work/apt/trixie.list"
    local options=(-qq -o Dir::Etc::SourceList="$work/apt/trixie.list" -o Dir::Etc::SourceParts="$work/apt/parts"
        -o Dir::State::Lists="$work/apt/lists" -o Dir::Cache="$work/apt/cache" -o APT::Sandbox::User=)
    (cd "$work/apt" && apt-get "${options[@]}" update && apt-get "${options[@]}" download libonnxruntime-dev) >&2 &&
        dpkg-deb -x "$work"/apt/libonnxruntime-dev_*.deb "$work/apt/package" &&
        mv "$work/apt/package/usr/include/onnxruntime" "$work/include"
}

for source in from_github from_debian; do
    if "$source" 2>> "$work/log" && [ -e "$work/include/onnxruntime_cxx_api.h" ]; then
        rm -rf "$folder/include"
        mv "$work/include" "$folder/include"
        exit 0
    fi
    rm -rf "$work/include"
done
echo "ONNX Runtime headers: could not be downloaded; set ONNXRUNTIME_ROOT to a folder with include/onnxruntime_cxx_api.h:" >&2
cat "$work/log" >&2
exit 1
