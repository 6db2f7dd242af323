"""Second opinions on images: the libyal readers, each in a process of its own.

They are native code that reads files made to be odd: what ends them must not end the tests.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from oracles import HANG_TIMEOUT_S, miss

_VHDI = """
import sys, pyvhdi
files = [pyvhdi.file() for _ in sys.argv[1:]]
for file, path in zip(files, sys.argv[1:]):
    file.open(path)
if len(files) > 1:
    files[0].set_parent(files[1])
sys.stdout.buffer.write(files[0].read_buffer_at_offset(files[0].get_media_size(), 0))
"""

_VMDK = """
import sys, pyvmdk
handle = pyvmdk.handle()
handle.open(sys.argv[1])
handle.open_extent_data_files()
sys.stdout.buffer.write(handle.read_buffer_at_offset(handle.get_media_size(), 0))
"""

_PHDI = """
import sys, pyphdi
handle = pyphdi.handle()
handle.open(sys.argv[1])
handle.open_extent_data_files()
sys.stdout.buffer.write(handle.read_buffer_at_offset(handle.get_media_size(), 0))
"""


def read_vhd(*paths: Path) -> bytes:
    """What libvhdi finds in a VHD or VHDX image; its parent may follow."""
    return _run("pyvhdi", _VHDI, *paths)


def read_vmdk(path: Path) -> bytes:
    """What libvmdk finds."""
    return _run("pyvmdk", _VMDK, path)


def read_parallels(path: Path) -> bytes:
    """What libphdi finds in the disk that a ``DiskDescriptor.xml`` describes."""
    return _run("pyphdi", _PHDI, path)


def _run(module: str, script: str, *paths: Path) -> bytes:
    if importlib.util.find_spec(module) is None:
        miss(f"oracle {module} is not installed (scripts/setup installs it)")
    command = [sys.executable, "-c", script, *map(str, paths)]
    return subprocess.run(command, check=True, capture_output=True, timeout=HANG_TIMEOUT_S).stdout
