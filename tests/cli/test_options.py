"""The declarative option table: parsing as GNU getopt_long does."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import pytest

from blocklayer.cli.help import help_text
from blocklayer.cli.options import Command, CommandLineError, HelpRequest, Option, parse


class Sample(Command):
    """Do something"""

    OPERANDS = (("FILE", "a file"),)
    EXAMPLE = ("-q a.file", "does it quietly")

    flag: Annotated[bool, Option("a flag", "q")] = False
    other: Annotated[bool, Option("another flag", "u")] = False
    format: Annotated[str | None, Option("a value", "fF", "FMT")] = None
    format_other: Annotated[str | None, Option("a longer name", value="FMT")] = None
    options: Annotated[list[str], Option("many values", "o", "OPTS")] = msgspec.field(
        default_factory=list
    )
    repair: Annotated[str | None, Option("a choice", "r", "a|b", choices=("a", "b"))] = None
    progress: Annotated[str | None, Option("may have a value", "p", "json", implied="bar")] = None
    unseen: int = 0


class Sized(Command):
    """Do something to a size"""

    ENDS_IN_NUMBER = True

    flag: Annotated[bool, Option("a flag", "q")] = False


GOOD: list[tuple[list[str], dict[str, Any]]] = [
    ([], {}),
    (["x", "y"], {"operands": ["x", "y"]}),
    (["-q", "x", "-u"], {"flag": True, "other": True, "operands": ["x"]}),
    (["-qu"], {"flag": True, "other": True}),
    (["-qfraw"], {"flag": True, "format": "raw"}),
    (["-quf", "raw"], {"flag": True, "other": True, "format": "raw"}),
    (["-Fraw"], {"format": "raw"}),
    (["-f", "-q"], {"format": "-q"}),
    (["--format=raw"], {"format": "raw"}),
    (["--format", "raw"], {"format": "raw"}),
    (["--format="], {"format": ""}),
    (["--format-o=raw"], {"format_other": "raw"}),
    (["--fl"], {"flag": True}),
    (["-f", "a", "-f", "b"], {"format": "b"}),
    (["-o", "a", "--opt", "b", "-oc"], {"options": ["a", "b", "c"]}),
    (["--", "-q", "--"], {"operands": ["-q", "--"]}),
    (["-"], {"operands": ["-"]}),
    (["-p", "json"], {"progress": "bar", "operands": ["json"]}),
    (["--progress"], {"progress": "bar"}),
    (["--progress=json"], {"progress": "json"}),
    (["-pq"], {"progress": "bar", "flag": True}),
    (["-ra"], {"repair": "a"}),
]


@pytest.mark.parametrize(("arguments", "fields"), GOOD)
def test_understood(arguments: list[str], fields: dict[str, Any]) -> None:
    found = parse(Sample, arguments, "tool sample")
    assert found == Sample(**fields, uses=found.uses)


def test_uses_are_noted_in_order() -> None:
    found = parse(Sample, ["-qfa", "x", "--format", "b", "-oc", "-q"], "tool sample")
    wanted = [("flag", True), ("format", "a"), ("format", "b"), ("options", "c"), ("flag", True)]
    assert found.uses == wanted


BAD = [
    (["-x"], "invalid option -- 'x'"),
    (["-qx"], "invalid option -- 'x'"),
    (["-1M", "x"], "invalid option -- '1'"),
    (["x", "-1M"], "invalid option -- '1'"),
    (["--nothing"], "unrecognized option '--nothing'"),
    (["--unseen=1"], "unrecognized option '--unseen'"),
    (["-f"], "option requires an argument -- 'f'"),
    (["--format-other"], "option '--format-other' requires an argument"),
    (["--flag=1"], "option '--flag' doesn't allow an argument"),
    (["--fla=1"], "option '--flag' doesn't allow an argument"),
    (["--f"], "option '--f' is ambiguous; possibilities: '--flag' '--format' '--format-other'"),
    (["-r", "c"], "--repair (-r) expects 'a' or 'b' not 'c'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(CommandLineError) as caught:
        parse(Sample, arguments, "tool sample")
    assert str(caught.value) == message


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["x", "--he"]])
def test_help_is_asked_for(arguments: list[str]) -> None:
    with pytest.raises(HelpRequest):
        parse(Sample, arguments, "tool sample")


def test_a_last_number_may_be_negative_where_that_is_declared() -> None:
    found = parse(Sized, ["-q", "x", "-1M"], "tool sized")
    assert (found.flag, found.operands) == (True, ["x", "-1M"])
    with pytest.raises(CommandLineError, match="invalid option -- '1'"):
        parse(Sized, ["-1M", "x"], "tool sized")


def test_help_text() -> None:
    assert help_text(Sample, "tool sample") == HELP


HELP = """\
Do something.

Usage: tool sample [OPTION...] FILE

  FILE                      a file

Options:
  -q, --flag                a flag
  -u, --other               another flag
  -f, --format FMT          a value
  --format-other FMT        a longer name
  -o, --options OPTS        many values
  -r, --repair a|b          a choice
  -p, --progress[=json]     may have a value
  --object OBJDEF           define an object that others may refer to, as
                            secret,id=ID,file=PATH or in JSON (repeatable)

Output:
  -h, --help                print this help and exit

Example:
  tool sample -q a.file
      does it quietly

Exit codes:
  0   done
  1   refused or failed; standard error says why
  130 interrupted by Ctrl-C or SIGTERM
"""
