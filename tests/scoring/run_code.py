"""Runs a program that a model wrote, and its tests, in a fresh Python process: pass or fail.

The process starts in an empty folder, which is deleted, without environment or input, and with
limits on time and memory; each process that it starts may use as much memory again. It passes by
writing a secret, which it knows but the program is not told, after the last test: printing a word,
or leaving early, is no pass. That guards against accidents, not against malice: it is no sandbox,
the program can read files and reach the network.
"""

import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import types

SECONDS = 10
MEGABYTES = 1024


def passes(sources, seconds=SECONDS, megabytes=MEGABYTES):
    """Whether all the sources run, one after the other in one module, within the limits."""
    return run(sources, seconds, megabytes)[0]


@functools.cache
def require_python(seconds=SECONDS, megabytes=MEGABYTES):
    """ValueError with the reason where not even an empty program passes; asked once."""
    try:
        passed, said = run([], seconds, megabytes)
    except OSError as error:
        passed, said = False, str(error)
    if not passed:
        limits = f"without environment, in {seconds} s and {megabytes} MiB"
        raise ValueError(f"no program can pass: {sys.executable} {limits} ends with {said}")


def run(sources, seconds, megabytes):
    """Whether the sources pass, and what Python said before it began, else its exit status."""
    secret = secrets.token_hex(16)
    order = {"sources": sources, "secret": secret, "seconds": seconds, "megabytes": megabytes}
    command = [sys.executable, "-I", "-X", "utf8", os.path.abspath(__file__)]

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with tempfile.TemporaryFile() as verdict, tempfile.TemporaryFile() as complaint:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={},
                stdin=subprocess.PIPE,
                stdout=verdict,
                stderr=complaint,
                start_new_session=True,
            )
            try:
                process.communicate(json.dumps(order).encode(), timeout=seconds)
            except subprocess.TimeoutExpired:
                pass
            finally:
                kill_group(process)
            verdict.seek(0)
            complaint.seek(0)
            said = complaint.read(10000).decode(errors="replace").strip().splitlines()
            passed = verdict.read(1000) == secret.encode()
    return passed, said[-1] if said else f"exit status {process.returncode}"


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
    limit(order["seconds"], order["megabytes"])
    out = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)

    # The name keeps what stands under `if __name__ == "__main__"` from running. Programs look
    # themselves up under it: dataclasses, pickle, typing.get_type_hints.
    module = types.ModuleType("program")
    sys.modules["program"] = module
    for source in order["sources"]:  # apart: no test ends up in a string
        exec(compile(source, "program", "exec"), vars(module))
    write(out, order["secret"].encode())
    leave(0)


if __name__ == "__main__":
    main()
