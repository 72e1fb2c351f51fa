"""Runs a program that a model wrote, and its tests, in a fresh Python process: pass or fail.

The process starts in an empty folder, which is deleted, without environment or input, and with
limits on time and memory. It passes by writing a secret, which it knows but the program is not
told, after the last test: printing a word, or leaving early, is no pass. That guards against
accidents, not against malice: it is no sandbox, the program can read files and reach the network.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile

SECONDS = 10
MEGABYTES = 1024


def passes(program, tests, seconds=SECONDS, megabytes=MEGABYTES):
    """Whether the source `program` runs, and then each source of `tests`, within the limits."""
    secret = secrets.token_hex(16)
    order = {"program": program, "tests": list(tests), "secret": secret}
    order |= {"seconds": seconds, "megabytes": megabytes}
    command = [sys.executable, "-I", "-X", "utf8", os.path.abspath(__file__)]

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with tempfile.TemporaryFile() as verdict:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={},
                stdin=subprocess.PIPE,
                stdout=verdict,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                process.communicate(json.dumps(order).encode(), timeout=seconds)
            except subprocess.TimeoutExpired:
                pass
            finally:
                kill_group(process)
            verdict.seek(0)
            return verdict.read(1000) == secret.encode()


def kill_group(process):
    """End a process and those that it started, unless they left its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def limit(seconds, megabytes):
    """Bound what this process may use from here on."""
    import resource  # no Windows has it

    mebibyte = 2**20
    limits = {
        resource.RLIMIT_AS: megabytes * mebibyte,
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_FSIZE: 16 * mebibyte,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))


def main():
    """The fresh process: an order on stdin; the secret goes to stdout if all of it runs."""
    order = json.loads(sys.stdin.buffer.read())
    write, leave = os.write, os._exit  # before the program can change what they mean
    out = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)

    limit(order["seconds"], order["megabytes"])
    # The name keeps what stands under `if __name__ == "__main__"` from running.
    space = {"__name__": "program"}
    for source in [order["program"], *order["tests"]]:  # apart: no test ends up in a string
        exec(compile(source, "program", "exec"), space)
    write(out, order["secret"].encode())
    leave(0)


if __name__ == "__main__":
    main()
