"""Checkpoints of a training run: written whole or not at all, so that a run can be killed at any moment.

A checkpoint is complete if it holds its state, which is written last and removed first. There is a complete one at all
times after the first: the next is written beside it, and removes it only when it is complete itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator

from decoding.checkpoint import first_line
from decoding.errors import RecordError

T = TypeVar("T")

CHECKPOINT, STATE = "checkpoint", "run.json"
_NEW = "checkpoint.new"


def save_checkpoint(accelerator: Accelerator, folder: Path, state: Mapping[str, Any]) -> None:
    """Write what accelerate holds, and how far the run has come, in place of the folder's last checkpoint."""
    new = folder / _NEW
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _remove(new)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(new))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        part = new / f"{STATE}.part"
        part.write_text(json.dumps(state, indent=2), encoding="utf-8")
        part.replace(new / STATE)
        _put_in_place(folder)
    accelerator.wait_for_everyone()


def saved_state(accelerator: Accelerator, folder: Path, read: Callable[[Any], T]) -> T | None:
    """How far the run had come at the folder's last complete checkpoint, as `read` makes it of what was saved; None if
    there is none. Raises RecordError if it is damaged."""
    file = folder / CHECKPOINT / STATE
    if accelerator.is_main_process and not file.exists() and (folder / _NEW / STATE).exists():
        _put_in_place(folder)  # it was killed while it did this
    accelerator.wait_for_everyone()
    if not file.exists():
        return None
    try:
        return read(json.loads(file.read_text(encoding="utf-8")))
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise _damaged(folder, error) from error


def load_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Load what accelerate held at the checkpoint that `saved_state` found. Raises RecordError if it is damaged."""
    try:
        accelerator.load_state(str(folder / CHECKPOINT))
    except Exception as error:  # whatever the readers of half a dozen files raise
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> RecordError:
    return RecordError(f"{folder / CHECKPOINT} is damaged ({first_line(error)}); delete it to start again.")


def _put_in_place(folder: Path) -> None:
    _remove(folder / CHECKPOINT)
    (folder / _NEW).rename(folder / CHECKPOINT)


def _remove(checkpoint: Path) -> None:
    (checkpoint / STATE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)
