"""One load on one NBD server: `python -m bench.nbd SERVER IMAGE RW BS DEPTH COUNT` prints seconds.

SERVER is `blk` or `qemu-nbd`; fio's nbd engine is the client of both. What is timed is fio's own
time for COUNT requests; the server's start is not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.measure import BLK

SERVERS = {"blk": (BLK, "nbd"), "qemu-nbd": ("qemu-nbd",)}


def main(server: str, image: str, pattern: str, block: str, depth: str, count: str) -> None:
    """Start the server, run fio, and print how many seconds fio measured."""
    with tempfile.TemporaryDirectory() as folder:
        path, pid = Path(folder, "nbd.sock"), Path(folder, "pid")
        form = "qcow2" if image.endswith(".qcow2") else "raw"
        # -t: the client that fio's check makes must not be the last one.
        options = ("-t", "-e", "0", "-f", form, "-k", path, "--fork", "--pid-file", pid, image)
        subprocess.run([*SERVERS[server], *map(str, options)], check=True)
        try:
            job = [
                *("fio", "--name=load", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={path}"),
                *(f"--rw={pattern}", f"--bs={block}", f"--iodepth={depth}", "--randseed=1"),
                *(f"--number_ios={count}", "--size=64M", "--io_size=100G", "--norandommap"),
                "--output-format=json",
            ]
            done = subprocess.run(job, check=True, capture_output=True, text=True, cwd=folder)
        finally:
            subprocess.run(["kill", pid.read_text().strip()], check=True)
    result = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    sys.stdout.write(f"{max(result[way]['runtime'] for way in ('read', 'write')) / 1000}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
