"""The page on untrusted images lists what there is."""

from __future__ import annotations

from pathlib import Path

import msgspec

from blocklayer import Policy
from blocklayer.api.inspection.report import FINDINGS

PAGE = (Path(__file__).parent.parent.parent / "docs" / "untrusted.md").read_text(encoding="utf-8")


def test_every_finding_is_documented() -> None:
    for id, (severity, meaning) in FINDINGS.items():
        assert f"| `{id}` | {severity} | {meaning} |" in PAGE


def test_every_member_of_a_policy_is_documented() -> None:
    for field in msgspec.structs.fields(Policy):
        assert f"| `{field.encode_name}` |" in PAGE
