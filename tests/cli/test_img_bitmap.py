"""`blk img bitmap`, and bitmaps in convert, measure, info: beside the real qemu-img."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cli.runs import Outcome, ours, theirs
from oracles import Oracle

LONG = "x" * 1023
SCRIPTS = {
    "adding": f"""
        bitmap --add a b0
        bitmap --add a b0
        bitmap --add a ''
        bitmap --add a {LONG}
        bitmap --add -g 1000 a b1
        bitmap --add -g 256 a b1
        bitmap --add -g 4G a b1
        bitmap --add -g 2G a b1
        bitmap --add -g 0 a b2
        bitmap --add -g -1 a b3
        bitmap --add -g xx a b3
        bitmap --add -f qcow2 --image-opts a h
        bitmap --add --image-opts driver=qcow2,file.filename=a h
        bitmap --add nofile h
        bitmap --remove v2 h
    """,
    "unknown names": """
        bitmap --remove a none
        bitmap --clear a none
        bitmap --enable a none
        bitmap --disable a none
        bitmap --merge none a none
        bitmap --clear -f raw raw none
    """,
    "command lines": """
        bitmap
        bitmap a b0
        bitmap --add a
        bitmap --add a b c
        bitmap -g 64k --clear a b0
        bitmap --add -b a a b5
        bitmap --merge b0 -F qcow2 a b1
        bitmap --bogus a b0
        bitmap --merge
        bitmap -q a b0
    """,
    "steps": """
        bitmap --add --disable --clear --enable a c
        bitmap --disable --add a d
        bitmap --add --remove --add a e
        bitmap --add --remove a f
        bitmap --add --add a f
        bitmap --add -g 4k --merge c --merge e a g
        bitmap --merge g --merge nosuch a e
        bitmap --remove --merge c a g
    """,
    "other files": """
        bitmap --add small s
        bitmap --add a t
        bitmap --merge s -b small -F qcow2 a t
        bitmap --merge s -b small -F raw a t
        bitmap --merge s -b nofile -F raw a t
        bitmap --merge s -b small a t
        bitmap --add b t -g 512
        bitmap --merge t -b b a t
        bitmap --merge t -b b --clear a t
    """,
    "broken": """
        bitmap --clear crashed on
        bitmap --enable crashed on
        bitmap --disable crashed off
        bitmap --merge off crashed on
        bitmap --add --merge on crashed new
        bitmap --add crashed on
        resize crashed 12M
        resize --shrink crashed 8M
        measure -O qcow2 crashed
        convert -O qcow2 --bitmaps crashed out
        convert -O qcow2 --bitmaps --skip-broken-bitmaps crashed out
        bitmap --remove crashed on
        check crashed
        bitmap --remove crashed off
        resize crashed 12M
        check crashed
    """,
    "copies": """
        bitmap --add a b0
        bitmap --add --disable -g 4k a b1
        convert -O qcow2 --bitmaps a out
        convert -O qcow2 --bitmaps -c a out2
        convert -n -O qcow2 --bitmaps a out2
        convert -n -O qcow2 --bitmaps a big
        convert -O qcow2 --skip-broken-bitmaps a out3
        convert -O qcow2 --bitmaps a small out3
        convert -O qcow2 --bitmaps -f raw raw out3
        convert -O raw --bitmaps a out3
        convert -n -O raw --bitmaps a raw
        convert -O qcow2 --bitmaps v2 out3
        measure -O qcow2 a
        measure -O qcow2 --output=json a
        measure -O qcow2 -o compat=0.10 a
        measure -O raw a
        measure -O qcow2 v2
    """,
    "snapshots": """
        snapshot -c one a
        bitmap --add a b0
        snapshot -c two a
        snapshot -a one a
        snapshot -d two a
        check a
        convert -O qcow2 --bitmaps -l one a out
        bitmap --remove a b0
        snapshot -a one a
        check a
    """,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, qemu_img: Oracle, qemu_io: Oracle) -> Path:
    folder = tmp_path_factory.mktemp("bitmaps")

    def img(line: str) -> None:
        qemu_img(*line.split(), cwd=folder)

    for name in ("a", "b", "crashed"):
        img(f"create -q -f qcow2 {name} 10M")
        qemu_io("-f", "qcow2", "-c", "write 1M 300k", name, cwd=folder)
    img("create -q -f qcow2 small 5M")
    img("create -q -f qcow2 big 20M")
    img("create -q -f qcow2 -o compat=0.10 v2 10M")
    img("create -q -f raw raw 10M")
    img("bitmap --add crashed on")
    img("bitmap --add --disable crashed off")
    qemu_io("-f", "qcow2", "-c", "write 3M 1M", "-c", "abort", "crashed", cwd=folder, check=False)
    return folder


def _comparable(done: Outcome) -> Outcome:
    """Without what we say besides, and where files end."""
    err = [line for line in done.err.splitlines() if "warning: not finished" not in line]
    out = [line for line in done.out.splitlines() if "end offset" not in line]
    return Outcome(done.code, "\n".join(out), "\n".join(err))


@pytest.mark.parametrize("name", SCRIPTS)
def test_as_the_real_tool(
    name: str, made: Path, tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle
) -> None:
    mine, real = tmp_path / "ours", tmp_path / "theirs"
    shutil.copytree(made, mine)
    shutil.copytree(made, real)
    for line in SCRIPTS[name].split("\n"):
        if not line.strip():
            continue
        mine_said = _comparable(ours(line.strip(), mine))
        assert mine_said == _comparable(theirs(qemu_img, line.strip(), real)), line
        for image in {"a", "b", "small", "crashed", "out", "out2"} & set(line.split()):
            assert (mine / image).exists() == (real / image).exists(), (line, image)
            if (mine / image).exists():
                assert _bitmaps(qemu_img, mine / image) == _bitmaps(qemu_img, real / image), line
                found = qemu_img("check", "-f", "qcow2", mine / image, check=False)
                assert found.returncode == 0, (line, found.stdout)


def _bitmaps(qemu_img: Oracle, image: Path) -> object:
    info = qemu_img.json("info", "--output=json", image)
    if info["format"] != "qcow2":
        return None
    found = info["format-specific"]["data"].get("bitmaps", [])
    return sorted(found, key=lambda bitmap: str(bitmap["name"]))


def test_info_shows_them(made: Path, tmp_path: Path, qemu_img: Oracle) -> None:
    folder = tmp_path / "images"
    shutil.copytree(made, folder)
    ours("bitmap --add a b0", folder)
    ours("bitmap --add --disable -g 512 a b1", folder)
    for line in ("info a", "info --output=json a", "info crashed", "info --output=json crashed"):
        assert ours(line, folder) == theirs(qemu_img, line, folder)


def test_where_nothing_can_be_kept(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(made, folder)
    done = ours("bitmap --add v2 b", folder)
    assert done.code == 1
    assert "Cannot store dirty bitmaps in qcow2 v2 files" in done.err
    done = ours("bitmap --add -f raw raw b", folder)
    assert "Can't store persistent bitmaps to 'raw': Operation not supported" in done.err
    assert "Bitmap name too long: xxx" in ours(f"bitmap --add a {LONG}x", folder).err
    assert ours("create -q -f qcow2 empty 0", folder).code == 0
    done = ours("bitmap --add empty b", folder)
    assert "the disk has a size of 0 bytes" in done.err
    assert ours("bitmap --add a b", folder).code == 0
    done = ours("amend -o compat=0.10 a", folder)
    assert "Persistent bitmaps prevent downgrade" in done.err


def test_a_foreign_writer_is_reported(made: Path, tmp_path: Path, qemu_img: Oracle) -> None:
    """Whoever does not know bitmaps clears the bit that vouches for them."""
    folder = tmp_path / "images"
    shutil.copytree(made, folder)
    ours("bitmap --add a b", folder)
    with (folder / "a").open("r+b") as file:
        file.seek(88)
        file.write(bytes(8))
    for line in ("info a", "bitmap --clear a b", "check a"):
        done = ours(line, folder)
        assert "a program without support for them has changed the image" in done.err
        assert "bitmaps:" not in done.out
    assert ours("check a", folder).code == 3
    assert ours("bitmap --add a b", folder).code == 0
    assert len(_bitmaps(qemu_img, folder / "a")) == 1  # type: ignore[arg-type]
    assert ours("check -r leaks a", folder).code == 0
    assert qemu_img("check", "a", cwd=folder).returncode == 0
    assert len(_bitmaps(qemu_img, folder / "a")) == 1  # type: ignore[arg-type]
