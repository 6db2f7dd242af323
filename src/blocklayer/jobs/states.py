"""The life of a job as tables: which status may follow which, and which verb is taken when."""

from __future__ import annotations

import enum
from typing import Final


class Status(enum.StrEnum):
    """Where a job is in its life, by QMP's names."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


_S = Status

FOLLOWS: Final = {
    _S.UNDEFINED: {_S.CREATED},
    _S.CREATED: {_S.RUNNING, _S.ABORTING, _S.NULL},
    _S.RUNNING: {_S.PAUSED, _S.READY, _S.WAITING, _S.ABORTING},
    _S.PAUSED: {_S.RUNNING},
    _S.READY: {_S.STANDBY, _S.WAITING, _S.ABORTING},
    _S.STANDBY: {_S.READY},
    _S.WAITING: {_S.PENDING, _S.ABORTING},
    _S.PENDING: {_S.ABORTING, _S.CONCLUDED},
    _S.ABORTING: {_S.ABORTING, _S.CONCLUDED},
    _S.CONCLUDED: {_S.NULL},
    _S.NULL: set(),
}

_AT_WORK = {_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY}

TAKES: Final = {
    "cancel": _AT_WORK | {_S.WAITING, _S.PENDING},
    "pause": _AT_WORK,
    "resume": _AT_WORK,
    "set-speed": _AT_WORK,
    "change": _AT_WORK,
    "complete": {_S.READY, _S.STANDBY},
    "finalize": {_S.PENDING},
    "dismiss": {_S.CONCLUDED},
}
