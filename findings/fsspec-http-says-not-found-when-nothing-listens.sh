#!/usr/bin/env bash
# fsspec's HTTP file system, when no server listens at the address.
#
# Guess, before it was run: opening or describing the file raises a connection error (ConnectionError, or aiohttp's own), as it
# says nothing about whether the file exists; a caller can then try again later. A server that answers 404 gives FileNotFoundError.
# Found with fsspec 2026.9.0 and aiohttp 3.14.3: both cases give FileNotFoundError with the URL as the only message. The refused
# connection is in __cause__ only, and exists() and isfile() answer False instead of raising.
# Why it matters here: a corpus at a URL whose server is down for a minute must not be reported as a file that does not exist, nor
# be taken for another corpus (lmu_dist/data/paths.py looks at the cause).
#
# Run by hand, not in CI: bash findings/fsspec-http-says-not-found-when-nothing-listens.sh    Exit 0: as found; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check fsspec==2026.9.0 aiohttp==3.14.3
cat > ask.py <<'PY'
import http.server
import socket
import threading

import fsspec


def ask(what, url):
    files = fsspec.filesystem("http")
    for name, call in (("info", files.info), ("open", files.open)):
        try:
            call(url)
            print(f"{what}: {name}: no error")
        except Exception as e:
            print(f"{what}: {name}: {type(e).__name__}, cause {type(e.__cause__).__name__}")
    print(f"{what}: exists: {files.exists(url)}")


with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
ask("no server", f"http://127.0.0.1:{port}/corpus.jsonl")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


server = http.server.HTTPServer(("127.0.0.1", 0), Quiet)
threading.Thread(target=server.serve_forever, daemon=True).start()
ask("no file", f"http://127.0.0.1:{server.server_port}/corpus.jsonl")
server.shutdown()
PY
env -u http_proxy -u https_proxy -u HTTP_PROXY -u HTTPS_PROXY env/bin/python ask.py | tee out
grep -q "no server: info: FileNotFoundError, cause ClientConnectorError" out
grep -q "no server: open: FileNotFoundError, cause ClientConnectorError" out
grep -q "no server: exists: False" out
grep -q "no file: info: FileNotFoundError" out
echo "as found"
