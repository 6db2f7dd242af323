"""Images whose guest data live in another file, against plain bytes and the real tools.

After every life of an image qemu-img finds nothing wrong with it and the model's bytes in it; a
data file that is called raw holds just these bytes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.api.disk import Disk, create
from blocklayer.errors import BlockError, PolicyError, UnsupportedError, UsageError
from blocklayer.graph.gate import Policy
from effort import examples
from oracles import Oracle
from proof.chains import blk, blk_json
from qcow2.images import opened, run
from qcow2.test_differential import LENGTHS, MIB, SIZES, VERBS, live, verify

FITTING = [verb for verb in VERBS if verb != "compress"]
requests = st.lists(
    st.tuples(st.sampled_from(FITTING), st.integers(0, 1 << 30), st.sampled_from(LENGTHS)),
    min_size=1,
    max_size=20,
)
options = st.fixed_dictionaries(
    {},
    optional={
        "l2_cache_size": st.just(1024),
        "l2_cache_entry_size": st.just(512),
        "pass_discard_request": st.booleans(),
        "discard_no_unref": st.booleans(),
        "lazy_refcounts": st.booleans(),
    },
)


def judge(path: Path, model: bytearray, raw: bool, qemu_img: Oracle) -> None:
    verify(path, model, qemu_img)
    found = blk_json("check", "--output=json", path)
    assert not found.get("corruptions")
    assert not found.get("leaks")
    if raw:
        assert path.with_name("data").read_bytes()[: len(model)] == model


@settings(max_examples=examples(12))
@given(
    st.booleans(),
    st.booleans(),
    st.sampled_from(((512, False), (4096, False), (65536, False), (16384, True), (65536, True))),
    st.sampled_from(SIZES),
    options,
    requests,
    requests,
)
def test_two_lives(
    qemu_img: Oracle,
    qemu_io: Oracle,
    theirs: bool,
    raw: bool,
    units: tuple[int, bool],
    size: int,
    given: dict[str, Any],
    first: list[Any],
    second: list[Any],
) -> None:
    """Made by either tool, written by ours, by theirs, and by ours again."""
    cluster_size, extended = units
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.qcow2"
        if theirs:
            text = f"cluster_size={cluster_size},extended_l2={'on' if extended else 'off'},"
            text += f"data_file={folder}/data,data_file_raw={'on' if raw else 'off'}"
            qemu_img("create", "-q", "-f", "qcow2", "-o", text, path, str(size))
        else:
            made = {"cluster_size": cluster_size, "extended_l2": extended, "data_file_raw": raw}
            run(create(path, size, data_file=f"{folder}/data", **made))
        model = bytearray(size)
        run(live(path, model, first, cluster_size, given))
        judge(path, model, raw, qemu_img)
        at, half = len(model) // 3 // 512 * 512, len(model) // 2 // 512 * 512
        length = min(70000, len(model) - at) // 512 * 512
        commands = ("-c", f"write -P 9 {at} {length}", "-c", f"write -z {half} 512")
        qemu_io("-f", "qcow2", *commands, path)
        model[at : at + length] = b"\x09" * length
        model[half : half + 512] = bytes(min(512, len(model) - half))
        run(live(path, model, second, cluster_size, given))
        judge(path, model, raw, qemu_img)


@settings(max_examples=examples(8))
@given(st.booleans(), st.booleans(), st.sampled_from(SIZES), st.sampled_from(SIZES), requests)
def test_over_a_base_with_a_data_file(
    qemu_img: Oracle,
    qemu_io: Oracle,
    raw: bool,
    extended: bool,
    below: int,
    size: int,
    steps: list[Any],
) -> None:
    """Committed by ours: the base's data file takes it."""
    with tempfile.TemporaryDirectory() as folder:
        base, path = Path(folder) / "base.qcow2", Path(folder) / "a.qcow2"
        text = f"data_file={folder}/data,data_file_raw={'on' if raw else 'off'}"
        qemu_img("create", "-q", "-f", "qcow2", "-o", text, base, str(below))
        qemu_io("-f", "qcow2", "-c", "write -P 1 0 100k", "-c", "write -P 2 512k 400k", base)
        model = bytearray(below)
        model[: 100 << 10] = b"\x01" * (100 << 10)
        model[512 << 10 : 912 << 10] = b"\x02" * (400 << 10)
        units = "cluster_size=16k,extended_l2=on" if extended else "cluster_size=4k"
        text = f"{units},data_file={folder}/top"
        where = ("-o", text, "-b", base, "-F", "qcow2", path, str(size))
        qemu_img("create", "-q", "-f", "qcow2", *where)
        model = model[:size] + bytes(max(0, size - below))
        run(live(path, model, steps, 16384 if extended else 4096, {}))
        verify(path, model, qemu_img)
        blk("img", "commit", "-q", path)
        verify(path, model, qemu_img)
        assert "No errors" in qemu_img("check", base).stdout
        if len(model) >= below:
            verify(base, model, qemu_img)


COMMANDS = (
    "write -P 1 0 1M",
    "write -z 128k 64k",
    "write -z -u 256k 64k",
    "discard 320k 64k",
    "write -P 4 1200k 10k",
    "write -z 1400k 30k",
)


@pytest.mark.parametrize("extended", ["off", "on"])
@pytest.mark.parametrize("raw", ["off", "on"])
def test_the_same_commands_leave_the_same(
    qemu_img: Oracle, qemu_io: Oracle, tmp_path: Path, raw: str, extended: str
) -> None:
    """`map`, `info` and `measure` of either image by either tool; a raw one differs in flags."""
    commands = [part for command in COMMANDS for part in ("-c", command)]
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        image = tmp_path / name / "image"
        text = f"data_file={tmp_path}/{name}/data,data_file_raw={raw},extended_l2={extended}"
        create_arguments = ("create", "-q", "-f", "qcow2", "-o", text, image, "3M")
        if name == "ours":
            blk("img", *create_arguments)
            blk("io", *commands, image)
        else:
            qemu_img(*create_arguments)
            qemu_io("-f", "qcow2", *commands, image)
        assert blk_json("measure", "--output=json", "-O", "raw", image)["required"] > 0
        for arguments in (("info", "--output=json"), ("map", "--output=json"), ("map",)):
            if raw == "on" and arguments[0] == "map":
                continue
            _, ours, _ = blk("img", *arguments, image)
            assert ours == qemu_img(*arguments, image).stdout
    maps = [
        qemu_img.json("map", "--output=json", tmp_path / name / "image")
        for name in ("ours", "theirs")
    ]
    if raw == "off":
        assert maps[0] == maps[1]
    data = [(tmp_path / name / "data").read_bytes() for name in ("ours", "theirs")]
    if raw == "on":
        assert data[0] == data[1]


def fails(qemu_img: Oracle, *arguments: Any, text: str) -> None:
    """Both tools refuse, and say so."""
    theirs = qemu_img(*arguments, check=False)
    assert theirs.returncode == 1
    assert text in theirs.stderr
    code, _, said = blk("img", *arguments, check=False)
    assert code == 1
    assert text in said


def make(folder: Path, **more: Any) -> Path:
    path = folder / "image"
    run(create(path, MIB, data_file=str(folder / "data"), **more))
    return path


REFUSED = (
    ("data_file_raw=on", "data-file-raw requires data-file"),
    (
        "data_file=x.data,compat=0.10",
        "External data files are only supported with compatibility level 1.1 and above "
        "(use version=v3 or greater)",
    ),
    (
        "data_file=x.data,data_file_raw=on,backing_file=base,backing_fmt=raw",
        "Backing file and data-file-raw cannot be used at the same time",
    ),
)


@pytest.mark.parametrize(("given", "text"), REFUSED)
def test_what_cannot_be_made(
    qemu_img: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, text: str
) -> None:
    (tmp_path / "base").write_bytes(bytes(MIB))
    monkeypatch.chdir(tmp_path)
    fails(qemu_img, "create", "-f", "qcow2", "-o", given, "image", "1M", text=text)
    assert not (tmp_path / "x.data").exists()


def test_nothing_is_left_of_a_failed_creation(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    with pytest.raises(BlockError):
        make(tmp_path)
    assert not (tmp_path / "data").exists()


def test_the_image_cannot_be_its_own_data_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="both the image and its data file"):
        run(create(tmp_path / "image", MIB, data_file=str(tmp_path / "image")))


def test_snapshots_and_compression_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path)

    async def main() -> None:
        async with opened(path) as root:
            with pytest.raises(UnsupportedError, match="internal snapshots"):
                await root.node.driver.snapshot_create("one")  # type: ignore[attr-defined]
            with pytest.raises(UnsupportedError, match="compressed clusters"):
                await root.write_compressed(0, bytes(65536))

    run(main())


def test_a_raw_one_takes_no_backing_file(qemu_img: Oracle, tmp_path: Path) -> None:
    path = make(tmp_path, data_file_raw=True)
    (tmp_path / "base").write_bytes(bytes(MIB))
    base = tmp_path / "base"
    fails(qemu_img, "rebase", "-u", "-b", base, "-F", "raw", path, text="Invalid argument")


def test_the_policy_is_asked(tmp_path: Path) -> None:
    """The name in the header is a path, whatever it looks like, and passes the gate."""
    path = make(tmp_path)

    async def main() -> None:
        for policy in (Policy(references=False), Policy(allow=(str(tmp_path / "elsewhere"),))):
            with pytest.raises(PolicyError, match="data file"):
                await Disk.open(path, policy=policy)
        disk = await Disk.open(path, policy=Policy(allow=(str(tmp_path / "data"),)))
        await disk.close()
        # Of itself the image says all it has to say without a look at the data file.
        disk = await Disk.open(path, policy=Policy(references=False), metadata_only=True)
        with pytest.raises(UsageError, match="left closed"):
            await disk.read(0, 512)
        await disk.close()

    run(main())


@pytest.mark.parametrize("name", ['json:{"driver":"null-co"}', "nbd://localhost/x", "file:data"])
def test_a_name_is_no_protocol(tmp_path: Path, name: str) -> None:
    path = make(tmp_path)

    async def main() -> None:
        disk = await Disk.open(path, writable=True)
        await disk.amend(data_file=name)
        await disk.close()
        with pytest.raises(BlockError, match="No such file"):
            await Disk.open(path)

    run(main())


def test_a_relative_name_starts_at_the_current_folder(
    qemu_img: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the image's, as it does in QEMU; the error tells if the file is there."""
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    blk("img", "create", "-q", "-f", "qcow2", "-o", "data_file=data", "folder/image", "1M")
    assert (tmp_path / "data").stat().st_size == MIB
    assert blk_json("map", "--output=json", "folder/image")[0]["present"] is False
    assert "No errors" in qemu_img("check", "folder/image").stdout
    (tmp_path / "data").rename(tmp_path / "folder" / "data")
    _, _, said = blk("img", "map", "folder/image", check=False)
    assert "'data'" in said
    assert "data-file.filename=folder/data" in said


def test_the_policy_sees_what_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative name is judged as the file that it leads to."""
    for name in ("folder", "current"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "current")
    path = tmp_path / "folder" / "image"

    async def main() -> None:
        await create(path, MIB, data_file="data")
        with pytest.raises(PolicyError, match="data file"):
            await Disk.open(path, policy=Policy(allow=(str(tmp_path / "folder"),)))
        disk = await Disk.open(path, policy=Policy(allow=(str(tmp_path / "current"),)))
        await disk.close()

    run(main())


def test_amend(qemu_img: Oracle, tmp_path: Path) -> None:
    """The name changes, the file does not; raw can be given up, and not be taken back."""
    path = make(tmp_path, data_file_raw=True)
    blk("img", "amend", "-o", f"data_file={tmp_path}/moved,data_file_raw=off", path)
    info = qemu_img.json("info", "--output=json", path)["format-specific"]["data"]
    assert info["data-file"] == f"{tmp_path}/moved"
    assert info["data-file-raw"] is False
    (tmp_path / "data").rename(tmp_path / "moved")
    text = "data-file-raw cannot be set on existing images"
    fails(qemu_img, "amend", "-o", "data_file_raw=on", path, text=text)
    plain = tmp_path / "plain"
    run(create(plain, MIB))
    text = "data-file can only be set for images that use an external data file"
    fails(qemu_img, "amend", "-o", "data_file=x", plain, text=text)


def test_a_node_comes_before_the_name(tmp_path: Path) -> None:
    path = make(tmp_path)
    other = tmp_path / "other"
    other.write_bytes(bytes(MIB))

    async def main() -> None:
        given = {"driver": "file", "filename": str(other)}
        async with opened(path, data_file=given) as root:
            await root.write(0, b"\x07" * 65536)
            assert await root.read(0, 65536) == b"\x07" * 65536
        plain = tmp_path / "plain"
        await create(plain, MIB)
        with pytest.raises(UsageError, match="can only be set for images with an external"):
            async with opened(plain, data_file=given):
                pass

    run(main())
    assert other.read_bytes()[:65536] == b"\x07" * 65536
    assert not any((tmp_path / "data").read_bytes())


def test_locks(qemu_io: Oracle, tmp_path: Path) -> None:
    """Nobody else writes the data file while the image is in use, or reads what is being written
    without saying so.
    """
    path = make(tmp_path)

    async def main() -> None:
        async with opened(path) as root:
            await root.write(0, b"\x07" * 512)
            data = tmp_path / "data"
            found = qemu_io("-f", "raw", "-c", "truncate 2M", data, check=False)
            assert "lock" in found.stderr + found.stdout

    run(main())


def corruptions(path: Path) -> int:
    code, out, _ = blk("img", "check", "--output=json", path, check=False)
    assert code == 2
    return int(json.loads(out)["corruptions"])


@pytest.mark.parametrize(
    "entry", [1 << 63 | 0x30000, 0x20000, 1 << 63 | 0x10200, 1 << 62 | 0x10000]
)
def test_check_finds_broken_entries(qemu_img: Oracle, tmp_path: Path, entry: int) -> None:
    path = make(tmp_path, data_file_raw=True)
    with path.open("r+b") as file:
        file.seek(0x40000 + 8)
        file.write(entry.to_bytes(8, "big"))
    assert corruptions(path) == 1 + (entry == 0x20000)
    if entry == 0x20000:
        blk("img", "check", "-r", "all", path, check=False)
        assert corruptions(path) == 1, "the flag is mended, the place is not"
    mended = qemu_img("check", path, check=False).returncode == 0
    assert mended is (entry in (1 << 63 | 0x30000, 0x20000)), "QEMU looks at no places"


def test_check_says_that_the_data_file_is_short(tmp_path: Path) -> None:
    path = make(tmp_path, data_file_raw=True)
    with (tmp_path / "data").open("r+b") as file:
        file.truncate(102_400)
    assert "has 102400 bytes" in blk("img", "check", path)[2]
