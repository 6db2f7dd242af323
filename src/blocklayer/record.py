"""Declared on-disk and on-wire structures: fields in, `pack`, `unpack` and `SIZE` out.

A structure is declared once, as a class whose fields are annotated with the width they have in
the file or on the wire:

    class Extension(Record, byte_order=">"):
        type: U32
        length: U32

Public: `Record`, the field types `U8 U16 U32 U64 I8 I16 I32 I64`, and for fixed byte strings
`Annotated[bytes, "8s"]` spelled at the field. Class attributes and methods of a record:
`SIZE: int`, `pack() -> bytes`, `unpack(data, offset=0) -> Self`.

1. A record has no padding: fields lie one after another in the order they are declared.
2. `unpack(pack(r)) == r`, and `pack` refuses a value that does not fit its field instead of
   cutting it. A byte string shorter than its field is filled with zeros.
3. `unpack` looks at exactly `SIZE` bytes from `offset`; when they are not there it raises
   FormatError, never anything else.
"""

import struct
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeAlias,
    dataclass_transform,
    get_args,
    get_type_hints,
)

import msgspec

from blocklayer.errors import FormatError

U8: TypeAlias = Annotated[int, "B"]
U16: TypeAlias = Annotated[int, "H"]
U32: TypeAlias = Annotated[int, "I"]
U64: TypeAlias = Annotated[int, "Q"]
I8: TypeAlias = Annotated[int, "b"]
I16: TypeAlias = Annotated[int, "h"]
I32: TypeAlias = Annotated[int, "i"]
I64: TypeAlias = Annotated[int, "q"]

ByteOrder = Literal["<", ">"]


@dataclass_transform()
class _RecordMeta(msgspec.StructMeta):
    """Compiles the declared fields of a record into one `struct.Struct`."""

    def __new__(
        mcls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        byte_order: ByteOrder = ">",
        **keywords: Any,
    ) -> Any:
        cls: Any = super().__new__(mcls, name, bases, namespace, **keywords)
        hints = get_type_hints(cls, include_extras=True)
        codes = [get_args(hints[field])[1] for field in cls.__struct_fields__]
        layout = struct.Struct(byte_order + "".join(codes))
        cls.LAYOUT = layout
        cls._byte_widths = {
            index: int(code[:-1]) for index, code in enumerate(codes) if code.endswith("s")
        }
        cls.SIZE = layout.size
        return cls


class Record(msgspec.Struct, metaclass=_RecordMeta):
    """Base of every declared structure; subclass with `byte_order="<"` for little endian."""

    SIZE: ClassVar[int]
    LAYOUT: ClassVar[struct.Struct]
    """For loops in which a record per entry costs too much: the fields, as declared."""
    _byte_widths: ClassVar[dict[int, int]]

    def pack(self) -> bytes:
        """The record's `SIZE` bytes; ValueError when a value does not fit its field."""
        values = msgspec.structs.astuple(self)
        for index, width in self._byte_widths.items():
            if len(values[index]) > width:
                raise ValueError(
                    f"{type(self).__name__}.{self.__struct_fields__[index]}: "
                    f"{len(values[index])} bytes do not fit in {width}"
                )
        try:
            return self.LAYOUT.pack(*values)
        except struct.error as error:
            raise ValueError(f"{self!r} does not fit its fields: {error}") from error

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview, offset: int = 0) -> Self:
        """The record at `offset` of `data`; FormatError when `data` ends before it does."""
        if offset < 0 or len(data) - offset < cls.SIZE:
            raise FormatError(
                f"{cls.__name__} at offset {offset:#x} needs {cls.SIZE} bytes, "
                f"only {max(0, len(data) - offset)} are there"
            )
        return cls(*cls.LAYOUT.unpack_from(data, offset))
