"""Durable checkpoints of a training: one file a step, whole or not there, on a local path or any ``pyarrow.fs`` URI.

A file is the SHA-256 of its payload and the payload, ``torch.save`` of plain data and tensors (read back with
``weights_only``). It is written under a temporary name and renamed; a torn or foreign file is passed over with its
reason, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import pyarrow as pa
import torch
from pyarrow import fs
from torch import Tensor

_NAME = re.compile(r"step-(\d{9})\.ckpt")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Checkpoint:
    """What lasts of a training.

    Args:
        step: steps applied.
        question: says what is trained, and how: only a training of the same question may go on from it.
        state: every tensor, in the order of ``ShardedTraining.state``.
        run: the run that wrote it.
    """

    step: int
    question: str
    state: list[Tensor]
    run: str = ""


def folder_for(root: str, question: str, run: str, *, resume: bool, say: Callable[[str], None] = print) -> str:
    """Where a training writes its checkpoints, so that those of another stay: ``root`` where there is nothing yet, else
    a folder of the run's own in it. One that resumes goes on in the folder that has the newest of its question.

    Args:
        run: the folder's name.
    """
    top = CheckpointFolder(root)
    if resume:
        found = {folder: CheckpointFolder(folder).latest(question, say) for folder in top.folders()}
        steps = {folder: checkpoint.step for folder, checkpoint in found.items() if checkpoint}
        if steps:
            return max(steps, key=lambda folder: steps[folder])
    if not top.exists:
        return root
    say(f"checkpoints go to {root}/{run}: those of another training in {root} stay as they are")
    return f"{root}/{run}"


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written; the message says where and why."""


class CheckpointFolder:
    """The checkpoints of one training; the last ``keep`` of them stay.

    Args:
        root: a local path or a URI of ``pyarrow.fs``.
        keep: how many files stay.
    """

    def __init__(self, root: str, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        local = "://" not in root
        try:
            self._fs, self._path = fs.FileSystem.from_uri(os.path.abspath(root) if local else root)
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"checkpoints must go to a local path or a pyarrow.fs URI, got {root!r}: {error}"
            ) from error
        self._root, self._keep = root.rstrip("/"), keep

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint; of it and those of earlier steps, drops the oldest beyond ``keep``.

        What a writer that died left half-written goes too: a folder has one writer.

        Raises:
            CheckpointNotWritten: the disk is full, the folder cannot be written or the like. Earlier ones stay.
        """
        buffer = io.BytesIO()
        state = [x.detach().cpu() for x in checkpoint.state]
        head = {"step": checkpoint.step, "question": checkpoint.question, "run": checkpoint.run}
        torch.save({**head, "state": state}, buffer)
        payload = buffer.getvalue()
        try:
            self._write(f"step-{checkpoint.step:09d}.ckpt", hashlib.sha256(payload).digest() + payload)
            for step in [step for step in self.steps() if step <= checkpoint.step][: -self._keep]:
                self._fs.delete_file(f"{self._path}/step-{step:09d}.ckpt")
        except OSError as error:
            raise CheckpointNotWritten(
                f"the checkpoint of step {checkpoint.step} could not be written to {self._root!r}: {error}"
            ) from error

    def steps(self) -> list[int]:
        """The steps at hand, ascending."""
        files = self._fs.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
        return sorted(int(match[1]) for file in files if (match := _NAME.fullmatch(file.base_name)))

    def latest(self, question: str, say: Callable[[str], None] = print, *, run: str | None = None) -> Checkpoint | None:
        """The newest checkpoint of this question, and of this run where one is named, that is whole; None where there
        is none. ``say`` hears of others."""
        for step in reversed(self.steps()):
            name = f"{self._path}/step-{step:09d}.ckpt"
            try:
                checkpoint = self._read(name)
            except ValueError as error:
                say(f"checkpoint {name} is passed over: {error}")
                continue
            if checkpoint.question != question:
                say(
                    f"checkpoint {name} is passed over: it belongs to question {checkpoint.question}, not to {question}"
                )
            elif run is not None and checkpoint.run != run:
                say(f"checkpoint {name} is passed over: an earlier run left it")
            else:
                return checkpoint
        return None

    def folders(self) -> list[str]:
        """This folder and those in it, as paths or URIs: each may hold the checkpoints of one training."""
        entries = self._fs.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
        names = sorted(entry.base_name for entry in entries if entry.type == fs.FileType.Directory)
        return [self._root, *(f"{self._root}/{name}" for name in names if not name.startswith("."))]

    @property
    def exists(self) -> bool:
        return self._fs.get_file_info(self._path).type != fs.FileType.NotFound

    def _write(self, name: str, content: bytes) -> None:
        self._fs.create_dir(self._path, recursive=True)
        for file in self._fs.get_file_info(fs.FileSelector(self._path)):
            if _TEMPORARY.fullmatch(file.base_name):
                self._fs.delete_file(file.path)
        temporary = f"{self._path}/.{uuid.uuid4().hex}.tmp"
        try:
            with self._fs.open_output_stream(temporary) as stream:
                stream.write(content)
            self._fs.move(temporary, f"{self._path}/{name}")
        except OSError:
            with suppress(OSError):  # what is half-written takes the room that others need
                self._fs.delete_file(temporary)
            raise

    def _read(self, name: str) -> Checkpoint:
        with self._fs.open_input_file(name) as stream:
            content = stream.read()
        digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            raise ValueError(f"it is torn ({len(content)} bytes)")
        data = torch.load(io.BytesIO(payload), weights_only=True)
        return Checkpoint(data["step"], data["question"], data["state"], data.get("run", ""))
