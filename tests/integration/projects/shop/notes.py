"""What tasks and callbacks saw: one JSON line, one write, so that a killed process tears nothing."""

import json
import os
from typing import Any

import billiard.process


def note(kind: str, **fields: Any) -> None:
    role = billiard.process.current_process()._name
    line = json.dumps({"kind": kind, "pid": os.getpid(), "ppid": os.getppid(), "role": role, **fields}, default=repr)
    descriptor = os.open(os.environ["SHOP_NOTES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, line.encode() + b"\n")
    finally:
        os.close(descriptor)
