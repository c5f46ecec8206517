"""What was made of slices before their job, as the job finds it: names, and how each is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping

from dicom_node import __version__
from dicom_node.early_results import EarlyResults
from dicom_node.inference import Engine
from dicom_node.restoring import parameters_hash

__all__ = ["BESIDE", "IMAGE", "PLANE", "STORED", "TWICE", "KeptSlices", "key_of"]

# Behind the key of a result: the same facts with those of a second look, the restored pixels, and
# of the image that is derived of them all but the pixels, and those.
TWICE = "-twice"
PLANE, IMAGE, STORED = BESIDE = ("-plane", "-image", "-stored")
KeyOf = Callable[[str, int], str]


def key_of(engine: Engine, task: str, strength: float) -> KeyOf | None:
    """Name the result of a slice by (digest of its file, seed); None where none is made early.

    Everything else that its bits rest on is in the name too: weights, parameters, the way that this
    machine computes, and the program.
    """
    basis = engine.basis(task)
    if basis is None:
        return None
    rest = {
        "task": task,
        "model": engine.model.sha256,
        "parameters": parameters_hash(task, engine.parameters(task), strength),
        "basis": basis,
        "node": __version__,
    }

    def key(sha256: str, seed: int) -> str:
        named = json.dumps({**rest, "file": sha256, "seed": seed}, sort_keys=True)
        return hashlib.sha256(named.encode()).hexdigest()

    return key


class KeptSlices:
    """The early results that a job may use, by SOP Instance UID and seed."""

    def __init__(
        self, results: EarlyResults, series_uid: str, key: KeyOf, files: Mapping[str, str]
    ) -> None:
        """*files* are the digests of the received files by SOP Instance UID."""
        self._results = results
        self._series = series_uid
        self._key = key
        self._files = files
        self._asked: set[str] = set()
        self.found = 0

    def has(self, sop_instance_uid: str, seed: int) -> bool:
        """Whether something was made of the instance, damaged or not."""
        return self._results.has(self._series, self._key(self._files[sop_instance_uid], seed))

    def facts(self, sop_instance_uid: str, seed: int) -> bytes | None:
        """Of what the engine made of it."""
        key = self._key(self._files[sop_instance_uid], seed)
        self._asked |= {key, key + TWICE, *(key + end for end in BESIDE)}
        octets = self._results.read(self._series, key + TWICE)
        if octets is None:
            octets = self._results.read(self._series, key)
        self.found += octets is not None
        return octets

    def plane(self, sop_instance_uid: str, seed: int) -> bytes | None:
        """Of the same, its pixels."""
        return self._read(sop_instance_uid, seed, PLANE)

    def image(self, sop_instance_uid: str, seed: int) -> bytes | None:
        """Of its derived image."""
        return self._read(sop_instance_uid, seed, IMAGE)

    def stored(self, sop_instance_uid: str, seed: int) -> bytes | None:
        """Of the same, its pixels."""
        return self._read(sop_instance_uid, seed, STORED)

    def _read(self, sop_instance_uid: str, seed: int, end: str) -> bytes | None:
        key = self._key(self._files[sop_instance_uid], seed)
        return self._results.read(self._series, key + end)

    def forget(self) -> None:
        """Remove what the job has asked for: it has ended."""
        self._results.remove(self._series, self._asked)
