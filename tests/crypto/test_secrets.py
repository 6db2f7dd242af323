"""Secret objects: every way of giving one, beside the real tool, and that none of them leaks."""

from __future__ import annotations

import base64
import os
import secrets
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

import blocklayer
from blocklayer.errors import BlockError, UsageError
from blocklayer.graph.objects import Objects
from cli.runs import ours, theirs
from crypto.volumes import create, create_qcow2, luks, qcow2
from oracles import Oracle

REFUSED = [
    "secret",
    "secret,id=x",
    "secret,id=x,data=a,file=b",
    "foo,id=x",
    "id=x",
    '{"qom-type":"secret","id":"x","dat":"y"}',
    "secret,id=x,data=%%%,format=base64",
    "secret,id=x,data=YQ==,format=base64,keyid=nope,iv=AAAA",
    "secret,id=1x,data=a",
    "secret,id=x,data=a,format=foo",
]


@pytest.mark.parametrize("text", REFUSED)
def test_same_refusals(text: str, tmp_path: Path, qemu_img: Oracle) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(512))
    line = ["info", "--object", text, "-f", "raw", "a.raw"]
    mine, their = ours(line, tmp_path), theirs(qemu_img, line, tmp_path)
    assert mine == their


def encrypted(plain: bytes, key: bytes, iv: bytes) -> bytes:
    padding = 16 - len(plain) % 16
    encryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
    return encryptor.update(plain + bytes([padding]) * padding)


@pytest.mark.parametrize("form", ["data", "file", "base64", "file-base64", "encrypted", "json"])
def test_every_form(form: str, tmp_path: Path, qemu_io: Oracle) -> None:
    passphrase = "schöne, lange Passphrase"
    key, iv = secrets.token_bytes(32), secrets.token_bytes(16)
    coded = base64.b64encode(passphrase.encode()).decode()
    (tmp_path / "plain").write_text(passphrase)
    (tmp_path / "coded").write_text(coded + "\n")
    (tmp_path / "key").write_bytes(base64.b64encode(key))
    hidden = base64.b64encode(encrypted(passphrase.encode(), key, iv)).decode()
    texts = {
        "data": [f"secret,id=s,data={passphrase.replace(',', ',,')}"],
        "file": ["secret,id=s,file=plain"],
        "base64": [f"secret,id=s,format=base64,data={coded}"],
        "file-base64": ["secret,id=s,format=base64,file=coded"],
        "encrypted": [
            "secret,id=k,format=base64,file=key",
            f"secret,id=s,format=base64,keyid=k,iv={base64.b64encode(iv).decode()},data={hidden}",
        ],
        "json": [f'{{"qom-type": "secret", "id": "s", "data": "{passphrase}"}}'],
    }[form]
    objects = [part for text in texts for part in ("--object", text)]
    line = ["create", "-q", *objects, "-f", "luks", "-o", "key-secret=s,iter-time=1", "a", "1M"]
    assert ours(line, tmp_path) == (0, "", "")
    blocklayer.open(luks(tmp_path / "a", "s"), secrets={"s": passphrase.encode()}).close()
    options = "driver=luks,key-secret=s,file.filename=a"
    qemu_io(*objects, "-c", "read 0 512", "--image-opts", options, cwd=tmp_path)


def test_objects_have_unique_ids_and_can_go() -> None:
    objects = Objects()
    objects.define("secret,id=a,data=x")
    with pytest.raises(UsageError, match="duplicate"):
        objects.define("secret,id=a,data=y")
    assert objects.secret("a").data == b"x"
    objects.remove("a")
    with pytest.raises(UsageError, match="No secret with id 'a'"):
        objects.secret("a")
    with pytest.raises(UsageError, match="not found"):
        objects.remove("a")


def test_objects_do_not_outlive_their_command(tmp_path: Path) -> None:
    create(tmp_path / "a")
    options = "driver=luks,key-secret=one,file.filename=a"
    with_it = ["map", "--object", "secret,id=one,data=first passphrase", "--image-opts", options]
    assert ours(with_it, tmp_path).code == 1  # the human form has no words for encrypted data
    without = ours(["map", "--image-opts", options], tmp_path)
    assert "No secret with id 'one'" in without.err


@pytest.mark.parametrize("format", ["luks", "qcow2"])
def test_secrets_are_shown_nowhere(format: str, tmp_path: Path) -> None:
    marker = "geheim7f3a"
    path = tmp_path / "a"
    (create if format == "luks" else create_qcow2)(path)
    options = (luks if format == "luks" else qcow2)(path)
    seen = []
    for data in (marker.encode(), marker.encode() + b"\xff"):
        with pytest.raises(BlockError) as caught:
            blocklayer.open(options, secrets={"one": data})
        seen.append(f"{caught.value!r} {caught.value} {caught.value.__context__!r}")
    wrong = (f"secret,id=one,data={marker},nope=1", f'{{"id": "{marker}')
    seen += [str(ours(["info", "--object", text, str(path)], tmp_path)) for text in wrong]
    objects = ["--object", f"secret,id=one,data={marker}"]
    seen.append(str(ours(["info", *objects, str(path)], tmp_path)))
    made = [*objects, "-f", "luks", "-o", "key-secret=one,iter-time=1", "b", "1M"]
    seen.append(str(ours(["create", *made], tmp_path)))
    with blocklayer.open(luks(tmp_path / "b"), secrets={"one": marker.encode()}) as disk:
        node = disk.aio.root.node
        seen.append(f"{node.filename} {vars(node)!r} {node.graph.objects.secret('one')!r}")
    assert marker not in " ".join(seen)
    assert marker.encode() not in (tmp_path / "b").read_bytes()


def test_a_missing_secret_costs_no_file(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"data")
    for format, name in (("luks", "key-secret"), ("qcow2", "encrypt.key-secret")):
        options = f"{name}=nosuch" + (",encrypt.format=luks" if format == "qcow2" else "")
        found = ours(["create", "-f", format, "-o", options, "precious", "1M"], tmp_path)
        assert found == (1, "", "qemu-img: precious: No secret with id 'nosuch'\n")
    assert (tmp_path / "precious").read_bytes() == b"data"
    assert os.listdir(tmp_path) == ["precious"]
