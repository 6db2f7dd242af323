"""What inspection says of an image: typed results, and every finding there is.

1. The identifiers of findings never change their meaning; new ones may come.
2. A finding's severity follows from its identifier: ``note`` (worth knowing), ``suspicious`` (rare
   in honest images), ``unsafe`` (opening the image as it is would reach outside it, or read what is
   not there).
3. Text that the image chose stands in results as it is: who prints it escapes it.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

Severity = Literal["note", "suspicious", "unsafe"]
SEVERITIES: Final[tuple[Severity, ...]] = ("note", "suspicious", "unsafe")

FINDINGS: Final[dict[str, tuple[Severity, str]]] = {
    "backing-file": ("unsafe", "the disk shows another file where it holds nothing itself"),
    "data-file": ("unsafe", "the guest's data are in another file"),
    "extent-file": ("unsafe", "the disk is made of other files"),
    "reference-absolute": ("unsafe", "a file is named by its absolute path"),
    "reference-device": ("unsafe", "a device or a file of the kernel is named"),
    "reference-parent": ("unsafe", "a file outside the image's folder is named"),
    "reference-protocol": ("unsafe", "storage is named by options or an address"),
    "backing-format-missing": ("suspicious", "the backing file's format would be guessed"),
    "unknown-incompatible": ("unsafe", "features are used without which it cannot be read"),
    "unknown-autoclear": ("suspicious", "unknown features that a writer has to clear"),
    "unknown-compatible": ("note", "unknown features that may be ignored"),
    "unknown-extension": ("note", "header extensions that may be ignored"),
    "invalid-header": ("unsafe", "the header contradicts itself or the format"),
    "rare-format": ("suspicious", "a format that is seldom met in honest uploads"),
    "unsupported": ("suspicious", "a variant that this program does not open"),
    "several-formats": ("unsafe", "the file is an image in more than one format"),
    "nested-format": ("unsafe", "the disk begins like an image: as a raw file it would be one"),
    "end-only": ("suspicious", "only the end of the file tells the format: others see a raw disk"),
    "footer-mismatch": ("unsafe", "header and footer disagree"),
    "shared-tables": ("unsafe", "one table maps several parts of the disk"),
    "shared-clusters": ("unsafe", "one piece of the file is several parts of the disk"),
    "compression-bomb": ("suspicious", "compressed data expand beyond what data do"),
    "past-end": ("suspicious", "tables or data are said to lie past the end of the file"),
    "absurd-size": ("suspicious", "the disk is larger than any storage"),
    "too-large": ("unsafe", "the disk is larger than the caller allows"),
    "expensive": ("suspicious", "opening it takes much metadata or time"),
    "unreadable": ("suspicious", "the start of the disk cannot be read"),
    "dirty": ("suspicious", "the image was not closed: its reference counts are not to be trusted"),
    "corrupt": ("suspicious", "the image is marked as corrupt"),
    "log-pending": ("suspicious", "changes in a log are yet to be made before it can be read"),
    "internal-snapshots": ("suspicious", "the file holds other disks than the one it shows"),
    "encrypted": ("suspicious", "what the disk holds cannot be looked at"),
}
"""Identifier: its severity, and what it means."""

UNSAFE_SIZE: Final = 1 << 50
"""Disks larger than this are absurd."""


class Finding(msgspec.Struct, frozen=True):
    """One thing to know before opening the image; ``message`` is a sentence."""

    id: str
    severity: Severity
    message: str


class NamedFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Storage outside the file that the image names; ``role``: backing-file, data-file, extent."""

    role: str
    name: str
    format: str | None = None


class Features(msgspec.Struct, kw_only=True):
    """The feature bits that are set, by name; ``bit N`` where nobody has a name for it."""

    incompatible: list[str] = []
    compatible: list[str] = []
    autoclear: list[str] = []


class Inspection(msgspec.Struct, kw_only=True, rename="kebab", omit_defaults=True):
    """What an image's headers say. Sizes in bytes; None: not known, or the format has none."""

    filename: str
    format: str
    """The format that the first bytes tell, as a driver's name."""
    formats: list[str]
    """Every format that the file could be taken for; ``["raw"]`` if it is no image."""
    variant: str | None = None
    """Version or subformat."""
    virtual_size: int | None = None
    file_size: int
    actual_size: int | None = None
    cluster_size: int | None = None
    encryption: str | None = None
    references: list[NamedFile] = []
    features: Features | None = None
    content: list[str] = []
    """What the disk itself begins with: ``mbr``, ``gpt``, ``iso``, or an image format."""
    findings: list[Finding] = []

    @property
    def verdict(self) -> Literal["clean", "suspicious", "unsafe"]:
        """The worst of the findings; notes are clean."""
        found = {finding.severity for finding in self.findings}
        return "unsafe" if "unsafe" in found else "suspicious" if "suspicious" in found else "clean"

    def has(self, id: str) -> bool:
        """Whether this was found."""
        return any(finding.id == id for finding in self.findings)

    def add(self, id: str, message: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(id, FINDINGS[id][0], message))

    def refer(self, role: str, name: str, format: str | None = None) -> None:
        """Note storage that the image names, and what is wrong with its name."""
        self.references.append(NamedFile(role=role, name=name, format=format))
        what = role.replace("-", " ")
        for id, message in _name_problems(name):
            self.add(id, f"The {what} '{name}' {message}.")


_KERNEL = ("/dev/", "/proc/", "/sys/")


def _name_problems(name: str) -> list[tuple[str, str]]:
    path = name.replace("\\", "/")
    head, colon, _ = path.partition(":")
    if colon and "/" not in head and len(head) > 1:
        return [("reference-protocol", "is no plain file name")]
    found: list[tuple[str, str]] = []
    if path.startswith("/") or colon:
        found.append(("reference-absolute", "is an absolute path"))
    if path.startswith(_KERNEL):
        found.append(("reference-device", "is where the host's devices and kernel files are"))
    if ".." in path.split("/"):
        found.append(("reference-parent", "leads out of the image's folder"))
    return found
