"""Restored instances on their way to files: each flushed while the next is derived."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from dicom_node.dicom.derived import DerivedInstance
from dicom_node.ledger.queue import Output
from dicom_node.spool import StoredFile

# Flushes that wait at the same time: the file system commits them together.
_WRITERS = 4


def written(
    instances: Iterable[DerivedInstance],
    write: Callable[[DerivedInstance], StoredFile],
    onwards: Callable[[], None],
) -> list[Output]:
    """Write instances, each by a thread of its own; *onwards* is called before each of them.

    What *onwards* or *write* raises ends it; files that were written until then stay.
    """
    outputs: list[Output] = []
    waiting: deque[Future[Output]] = deque()
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="write") as writers:
        for instance in instances:
            onwards()
            waiting.append(writers.submit(_output, instance, write))
            if len(waiting) > 2 * _WRITERS:
                outputs.append(waiting.popleft().result())
        outputs += [each.result() for each in waiting]
    return outputs


def _output(instance: DerivedInstance, write: Callable[[DerivedInstance], StoredFile]) -> Output:
    stored = write(instance)
    return Output(
        sop_instance_uid=instance.sop_instance_uid,
        sop_class_uid=instance.sop_class_uid,
        source_sop_instance_uid=instance.source_sop_instance_uid,
        path=stored.path,
        sha256=stored.sha256,
        size=stored.size,
    )
