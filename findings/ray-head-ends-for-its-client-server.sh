#!/usr/bin/env bash
# `ray start --head --block` where another program listens on port 10001 of 127.0.0.1, which no option here asks for.
#
# Guess, before it was run: the port of the Ray Client server is checked like the other ports, so the command either says at once
# that 10001 is in use, or runs without Ray Client, with a warning.
# Found with ray 2.60.0: neither. The command says that Ray runs and how to connect. A second later (once, on a busy
# machine, 25) the client server, a process that starts slowly, finds its port taken and exits, and then --block ends the whole head:
# "Some Ray subprocesses exited unexpectedly: ray_client_server", "Remaining processes will be killed", exit 1.
# `--ray-client-server-port=0`, "any port" for other ports, raises ValueError, and there is no option that leaves the server out.
# Why it matters here: `lmu-dist cluster up` gave it a port that was free when asked. Half a minute later somebody's connection had
# it, and the nodes waited three minutes for a head that was gone. Now it gets a port outside of those that Linux gives to
# connections, and `up` says what ended the head (lmu_dist/launch/local_commands.py, local.py).
#
# Run by hand, not in CI: bash findings/ray-head-ends-for-its-client-server.sh    Exit 0: as found; 1: it has changed. Without a GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check "ray[default]==2.60.0"
cat > head.py <<'PY'
import socket, subprocess, sys, time
from pathlib import Path

options = [f"--temp-dir={Path.cwd()}/r", "--node-ip-address=127.0.0.2", "--port=26379", "--include-dashboard=false", "--num-cpus=0"]
command = [f"{Path(sys.executable).parent}/ray", "start", "--head", "--block", "--object-store-memory=100000000", *options]
command.append("--disable-usage-stats")
for label, more in (("port 0", ["--ray-client-server-port=0"]), ("port 10001 is taken", [])):
    with socket.create_server(("127.0.0.1", 10001)):
        begin = time.monotonic()
        process = subprocess.Popen(command + more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            output, _ = process.communicate(timeout=120)
            end = f"exit {process.returncode}"
        except subprocess.TimeoutExpired:
            process.terminate()
            output, end = process.communicate()[0], "still runs"
        print(f"{label}: {end}", file=sys.stderr)
        print(f"after {time.monotonic() - begin:.0f} s", file=sys.stderr)
        for line in output.splitlines():
            for part in ("Ray runtime started", "ValueError", "ray_client_server [", "Failed to bind", "will be killed"):
                if part in line:
                    print("   ", line[:150], file=sys.stderr)
        print(f"{label}: {end}", "started" if "Ray runtime started" in output else "not started")
PY
RAY_AUTH_MODE=disabled env/bin/python head.py | tee seen
grep -qx "port 0: exit 1 not started" seen
grep -qx "port 10001 is taken: exit 1 started" seen
echo "as found"
