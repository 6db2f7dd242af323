"""What the human monitor changes: commands of QMP in the words of people.

Each handler says which command of QMP it stands for, and with which arguments; what that refuses is
what is printed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blocklayer.daemon import drives
from blocklayer.errors import UsageError
from blocklayer.graph.options import parse_pairs, unflatten
from blocklayer.qmp.human import HUMAN_COMMANDS
from blocklayer.qmp.local import execute, execute_text

if TYPE_CHECKING:
    from blocklayer.qmp.server import Server


def _given(**arguments: Any) -> dict[str, Any]:
    """Arguments by QMP's names (``_`` stands for ``-``), without those that were not given."""
    return {name.replace("_", "-"): value for name, value in arguments.items() if value is not None}


@HUMAN_COMMANDS.command("stop", "", "pause the machine", also=("s",))
async def stop(server: Server, arguments: dict[str, Any]) -> str:
    """``stop``"""
    await execute(server, "stop", {})
    return ""


@HUMAN_COMMANDS.command("cont", "", "let the machine go on", also=("c",))
async def cont(server: Server, arguments: dict[str, Any]) -> str:
    """``cont``"""
    await execute(server, "cont", {})
    return ""


@HUMAN_COMMANDS.command("block_resize", "DEVICE SIZE:size", "change the size of a disk")
async def block_resize(server: Server, arguments: dict[str, Any]) -> str:
    """``block_resize``"""
    await execute(server, "block_resize", _given(**arguments))
    return ""


@HUMAN_COMMANDS.command(
    "block_stream", "DEVICE [SPEED:int] [BASE]", "copy what lies below into a disk's top layer"
)
async def block_stream(server: Server, arguments: dict[str, Any]) -> str:
    """``block-stream``"""
    device, base = arguments["device"], arguments["base"]
    await execute(
        server,
        "block-stream",
        _given(device=device, job_id=device, base=base, speed=arguments["speed"]),
    )
    return ""


@HUMAN_COMMANDS.command(
    "block_set_io_throttle",
    "DEVICE BPS:int BPS_RD:int BPS_WR:int IOPS:int IOPS_RD:int IOPS_WR:int",
    "limit what a disk reads and writes a second (0: no limit)",
)
async def block_set_io_throttle(server: Server, arguments: dict[str, Any]) -> str:
    """``block_set_io_throttle``"""
    await execute(server, "block_set_io_throttle", arguments)
    return ""


@HUMAN_COMMANDS.command("block_job_set_speed", "DEVICE SPEED:size", "limit a job's speed")
async def block_job_set_speed(server: Server, arguments: dict[str, Any]) -> str:
    """``block-job-set-speed``"""
    await execute(server, "block-job-set-speed", _given(**arguments))
    return ""


@HUMAN_COMMANDS.command("block_job_cancel", "[-f] DEVICE", "cancel a job (-f: at once)")
async def block_job_cancel(server: Server, arguments: dict[str, Any]) -> str:
    """``block-job-cancel``"""
    await execute(
        server, "block-job-cancel", {"device": arguments["device"], "force": arguments["f"]}
    )
    return ""


@HUMAN_COMMANDS.command("block_job_complete", "DEVICE", "let a ready job take effect")
async def block_job_complete(server: Server, arguments: dict[str, Any]) -> str:
    """``block-job-complete``"""
    await execute(server, "block-job-complete", _given(**arguments))
    return ""


@HUMAN_COMMANDS.command("block_job_pause", "DEVICE", "pause a job")
async def block_job_pause(server: Server, arguments: dict[str, Any]) -> str:
    """``block-job-pause``"""
    await execute(server, "block-job-pause", _given(**arguments))
    return ""


@HUMAN_COMMANDS.command("block_job_resume", "DEVICE", "let a paused job go on")
async def block_job_resume(server: Server, arguments: dict[str, Any]) -> str:
    """``block-job-resume``"""
    await execute(server, "block-job-resume", _given(**arguments))
    return ""


@HUMAN_COMMANDS.command(
    "snapshot_blkdev", "[-n] DEVICE [FILE] [FORMAT]", "put an overlay above (-n: existing)"
)
async def snapshot_blkdev(server: Server, arguments: dict[str, Any]) -> str:
    """``blockdev-snapshot-sync``"""
    if arguments["file"] is None:
        raise UsageError("Parameter 'snapshot-file' is missing")
    await execute(
        server,
        "blockdev-snapshot-sync",
        _given(
            device=arguments["device"],
            snapshot_file=arguments["file"],
            format=arguments["format"],
            mode="existing" if arguments["n"] else "absolute-paths",
        ),
    )
    return ""


@HUMAN_COMMANDS.command("snapshot_blkdev_internal", "DEVICE NAME", "take an internal snapshot")
async def snapshot_blkdev_internal(server: Server, arguments: dict[str, Any]) -> str:
    """``blockdev-snapshot-internal-sync``"""
    await execute(server, "blockdev-snapshot-internal-sync", _given(**arguments))
    return ""


@HUMAN_COMMANDS.command(
    "snapshot_delete_blkdev_internal", "DEVICE NAME [ID]", "delete an internal snapshot"
)
async def snapshot_delete_blkdev_internal(server: Server, arguments: dict[str, Any]) -> str:
    """``blockdev-snapshot-delete-internal-sync``"""
    await execute(server, "blockdev-snapshot-delete-internal-sync", _given(**arguments))
    return ""


@HUMAN_COMMANDS.command(
    "drive_mirror",
    "[-n] [-f] DEVICE TARGET [FORMAT]",
    "mirror a disk (-n: onto an existing image, -f: all of it)",
)
async def drive_mirror(server: Server, arguments: dict[str, Any]) -> str:
    """``drive-mirror``"""
    await execute(server, "drive-mirror", _copy(arguments))
    return ""


@HUMAN_COMMANDS.command(
    "drive_backup",
    "[-n] [-f] [-c] DEVICE TARGET [FORMAT]",
    "back a disk up (-n: into an existing image, -f: all of it, -c: compressed)",
)
async def drive_backup(server: Server, arguments: dict[str, Any]) -> str:
    """``drive-backup``"""
    await execute(server, "drive-backup", {**_copy(arguments), "compress": arguments["c"]})
    return ""


def _copy(arguments: dict[str, Any]) -> dict[str, Any]:
    return _given(
        device=arguments["device"],
        job_id=arguments["device"],
        target=arguments["target"],
        format=arguments["format"],
        sync="full" if arguments["f"] else "top",
        mode="existing" if arguments["n"] else "absolute-paths",
    )


@HUMAN_COMMANDS.command("drive_add", "[-n] ADDRESS OPTIONS", "open a drive (-n: a node)")
async def drive_add(server: Server, arguments: dict[str, Any]) -> str:
    """As ``-drive`` with ``if=none``, or ``-blockdev``."""
    options = unflatten(parse_pairs(arguments["options"]))
    if arguments["n"]:
        await execute_text(server, "blockdev-add", options)
        return ""
    if options.get("if", "none") != "none":
        raise UsageError("Can't hot-add drive to type other than 'none'")
    await drives.add(server.daemon, {**options, "if": "none"})
    return "OK\n"


@HUMAN_COMMANDS.command("drive_del", "ID", "take a drive away, also while it is used")
async def drive_del(server: Server, arguments: dict[str, Any]) -> str:
    """The drive's medium goes; a device around it stays, and is empty."""
    await drives.remove(server.daemon, arguments["id"])
    return ""


@HUMAN_COMMANDS.command("device_add", "OPTIONS", "plug a device in (DRIVER,id=ID,drive=NODE…)")
async def device_add(server: Server, arguments: dict[str, Any]) -> str:
    """``device_add``"""
    options = parse_pairs(arguments["options"], implied="driver")
    await execute(server, "device_add", options)
    return ""


@HUMAN_COMMANDS.command("device_del", "ID", "unplug a device")
async def device_del(server: Server, arguments: dict[str, Any]) -> str:
    """``device_del``"""
    await execute(server, "device_del", _given(**arguments))
    return ""


@HUMAN_COMMANDS.command("object_add", "OPTIONS", "make an object (TYPE,id=ID,…)")
async def object_add(server: Server, arguments: dict[str, Any]) -> str:
    """``object-add``"""
    options = unflatten(parse_pairs(arguments["options"], implied="qom-type"))
    await execute_text(server, "object-add", options)
    return ""


@HUMAN_COMMANDS.command("object_del", "ID", "forget an object")
async def object_del(server: Server, arguments: dict[str, Any]) -> str:
    """``object-del``"""
    await execute(server, "object-del", _given(**arguments))
    return ""


@HUMAN_COMMANDS.command("eject", "[-f] DEVICE", "take the medium out of a drive")
async def eject(server: Server, arguments: dict[str, Any]) -> str:
    """``eject``"""
    await execute(server, "eject", {"device": arguments["device"], "force": arguments["f"]})
    return ""


@HUMAN_COMMANDS.command(
    "change", "DEVICE [-f] FILE [FORMAT] [READ-ONLY-MODE]", "put another image into a drive"
)
async def change(server: Server, arguments: dict[str, Any]) -> str:
    """``blockdev-change-medium``"""
    await execute(
        server,
        "blockdev-change-medium",
        _given(
            device=arguments["device"],
            filename=arguments["file"],
            format=arguments["format"],
            force=arguments["f"],
            read_only_mode=arguments["read-only-mode"],
        ),
    )
    return ""


@HUMAN_COMMANDS.command("commit", "DEVICE", "write a disk's top layer into the one below (or all)")
async def commit(server: Server, arguments: dict[str, Any]) -> str:
    """The disk's top layer is emptied: what it held is in the layer below."""
    from blocklayer.daemon import committing

    await committing.commit(server.daemon, arguments["device"])
    return ""


@HUMAN_COMMANDS.command(
    "nbd_server_start", "[-a] [-w] ADDRESS", "serve disks by NBD (-a: all devices, -w: writable)"
)
async def nbd_server_start(server: Server, arguments: dict[str, Any]) -> str:
    """``nbd-server-start``"""
    host, colon, port = arguments["address"].rpartition(":")
    if not colon:
        raise UsageError("The address is HOST:PORT")
    if host == "unix":
        address: dict[str, Any] = {"type": "unix", "data": {"path": port}}
    else:
        address = {"type": "inet", "data": {"host": host, "port": port}}
    await execute(server, "nbd-server-start", {"addr": address})
    if arguments["a"]:
        for device in server.daemon.devices:
            if device.node is not None:
                writable = arguments["w"] and not device.node.read_only
                await execute(
                    server, "nbd-server-add", {"device": device.name, "writable": writable}
                )
    return ""


@HUMAN_COMMANDS.command("nbd_server_add", "[-w] DEVICE [NAME]", "serve a disk (-w: writable)")
async def nbd_server_add(server: Server, arguments: dict[str, Any]) -> str:
    """``nbd-server-add``"""
    await execute(
        server,
        "nbd-server-add",
        _given(device=arguments["device"], name=arguments["name"], writable=arguments["w"]),
    )
    return ""


@HUMAN_COMMANDS.command("nbd_server_remove", "[-f] NAME", "serve a disk no longer")
async def nbd_server_remove(server: Server, arguments: dict[str, Any]) -> str:
    """``nbd-server-remove``"""
    mode = "hard" if arguments["f"] else "safe"
    await execute(server, "nbd-server-remove", {"name": arguments["name"], "mode": mode})
    return ""


@HUMAN_COMMANDS.command("nbd_server_stop", "", "serve nothing any more")
async def nbd_server_stop(server: Server, arguments: dict[str, Any]) -> str:
    """``nbd-server-stop``"""
    await execute(server, "nbd-server-stop", {})
    return ""
