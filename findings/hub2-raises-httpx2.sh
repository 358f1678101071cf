#!/usr/bin/env bash
# One would expect: code that catches httpx's errors around huggingface_hub's calls, as fits huggingface_hub 1, goes on
# working while httpx is installed.
#
# What happens: huggingface_hub 2 sends its requests by httpx2, another package with classes of the same names. Its
# `httpx2.ConnectError` is no `httpx.ConnectError`, so `except httpx.HTTPError` lets it through, in silence until the
# first time that the Hub cannot be reached. Where nothing else brings httpx, `import httpx` fails, and is noticed.
# `huggingface_hub.utils.httpx` is, in both, the package that the client raises from: httpx in version 1, httpx2 in 2.
#
# Seen with: huggingface_hub 1.33.0 and 2.4.0, httpx 0.28.1, httpx2 2.16.2, Python 3.11, on Linux, 2026-11-28.
# The address that is asked is a port of this machine on which nobody listens; no network is used but by pip.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/ask.py" <<'PY'
import socket
from importlib.metadata import version

import httpx
from huggingface_hub import get_hf_file_metadata
from huggingface_hub.utils import httpx as of_the_hub

with socket.socket() as closed:
    closed.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{closed.getsockname()[1]}/policy/resolve/main/config.json"


def caught_by(library) -> str:
    try:
        get_hf_file_metadata(url)
    except library.HTTPError as error:
        return f"caught {type(error).__module__}.{type(error).__name__}"
    except Exception as error:
        return f"missed {type(error).__module__}.{type(error).__name__}"
    return "no error"


print(f"huggingface_hub {version('huggingface_hub')}, httpx {version('httpx')}")
print(f"except httpx.HTTPError: {caught_by(httpx)}")
print(f"except huggingface_hub.utils.httpx.HTTPError: {caught_by(of_the_hub)}")
PY

# environment NAME PACKAGE…
environment() {
    "${PYTHON:-python3}" -m venv "$folder/$1"
    "$folder/$1/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}"
}

environment one huggingface_hub==1.33.0 httpx==0.28.1
environment two huggingface_hub==2.4.0 httpx2==2.16.2 httpx==0.28.1
environment alone huggingface_hub==2.4.0 httpx2==2.16.2
export NO_PROXY=127.0.0.1 HF_HUB_OFFLINE=0

{
    for name in one two; do
        "$folder/$name/bin/python" "$folder/ask.py"
    done
    echo "huggingface_hub 2.4.0 alone:" \
        "$("$folder/alone/bin/python" -c 'import huggingface_hub, httpx' 2>&1 | tail -n 1)"
} | tee "$folder/seen"

cat > "$folder/stated" <<'TEXT'
huggingface_hub 1.33.0, httpx 0.28.1
except httpx.HTTPError: caught httpx.ConnectError
except huggingface_hub.utils.httpx.HTTPError: caught httpx.ConnectError
huggingface_hub 2.4.0, httpx 0.28.1
except httpx.HTTPError: missed httpx2.ConnectError
except huggingface_hub.utils.httpx.HTTPError: caught httpx2.ConnectError
huggingface_hub 2.4.0 alone: ModuleNotFoundError: No module named 'httpx'
TEXT

if ! diff "$folder/stated" "$folder/seen"; then
    echo "The finding no longer holds as stated: < was stated, > was seen." >&2
    exit 1
fi
echo "The finding holds."
