from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
from prometheus_client import REGISTRY
from pydicom.dataset import Dataset
from pydicom.uid import UID

from dicom_node import observability
from dicom_node.errors import RefusedError
from dicom_node.observability import configure, get_logger

NAME = "Test^Name"
Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """Configure logging into memory; returns what was logged so far."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in observability._LIBRARY_LEVELS}
    stream = io.StringIO()
    configure(level="INFO", format="json", stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logging.captureWarnings(False)
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, earlier in levels.items():
        logging.getLogger(name).setLevel(earlier)


def test_a_line_has_text_fields_level_and_time(lines: Lines) -> None:
    get_logger("dicom_node.test").info("instance received", action="store", size=3)
    (line,) = lines()
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "instance received",
        "action": "store",
        "size": 3,
        "level": "info",
        "logger": "dicom_node.test",
    }


def test_lines_below_the_level_are_not_written(lines: Lines) -> None:
    get_logger("dicom_node.test").debug("detail")
    assert lines() == []


def _dataset() -> Dataset:
    dataset = Dataset()
    dataset.PatientName = NAME
    return dataset


@pytest.mark.parametrize(
    "fields",
    [
        {"PatientName": NAME},
        {"patient_name": NAME},
        {"patientId": NAME},
        {"PatientBirthDate": NAME},
        {"birth_date": NAME},
        {"OtherPatientIDs": NAME},
        {"accession_number": NAME},
        {"header": {"PatientName": NAME}},
        {"headers": [{"ReferringPhysicianName": NAME}]},
        {"dataset": _dataset()},
        {"datasets": [_dataset()]},
        {"element": _dataset()["PatientName"]},
        {"value": _dataset().PatientName},
        {"raw": NAME.encode()},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_patient_data_are_withheld(lines: Lines, fields: dict[str, object]) -> None:
    get_logger("dicom_node.test").warning("odd header", **fields)
    (line,) = lines()
    assert NAME not in json.dumps(line)
    assert "[withheld]" in json.dumps(line)


def test_a_uid_is_not_withheld(lines: Lines) -> None:
    get_logger("dicom_node.test").info("stored", sop_instance_uid=UID("1.2.3"), uids=(UID("1.2"),))
    (line,) = lines()
    assert (line["sop_instance_uid"], line["uids"]) == ("1.2.3", ["1.2"])


def _raise(error: Exception) -> None:
    try:
        raise ValueError(f"could not convert {NAME}")
    except ValueError as cause:
        raise error from cause


def test_an_exception_keeps_places_but_not_the_words_of_libraries(lines: Lines) -> None:
    try:
        _raise(RefusedError("reformatted"))
    except RefusedError:
        get_logger("dicom_node.test").exception("job failed")
        logging.getLogger("library").exception("trouble")
    for line in lines():
        assert "RefusedError: reformatted" in line["exception"]
        assert "ValueError\n" in line["exception"]
        assert "in _raise" in line["exception"]
        assert NAME not in json.dumps(line)


def test_libraries_log_through_the_same_door(lines: Lines) -> None:
    logging.getLogger("another.package").warning("disk is %s", "slow")
    (line,) = lines()
    assert (line["event"], line["logger"], line["level"]) == (
        "disk is slow",
        "another.package",
        "warning",
    )


@pytest.mark.parametrize("name", ["pynetdicom.assoc", "pydicom", "alembic.runtime", "sqlalchemy"])
def test_libraries_print_no_dumps(lines: Lines, name: str) -> None:
    logging.getLogger(name).info("dump of %s", NAME)
    logging.getLogger(name).debug("dump of %s", NAME)
    assert lines() == []


def test_a_warning_of_a_dicom_library_is_not_quoted(lines: Lines) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        # catch_warnings has put the interpreter's own printer back.
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        where = "/lib/python3/site-packages/pydicom/valuerep.py"
        warnings.warn_explicit(f"Invalid value: {NAME}", UserWarning, where, 1)
        warnings.warn_explicit("deprecated", UserWarning, "/lib/python3/other.py", 1)
        logging.captureWarnings(False)
    (line,) = lines()
    assert "deprecated" in line["event"]


def test_people_get_a_readable_line(lines: Lines) -> None:
    stream = io.StringIO()
    configure(format="console", stream=stream)
    get_logger("dicom_node.test").info("instance received", patient_name=NAME, size=3)
    assert "instance received" in stream.getvalue()
    assert "size=3" in stream.getvalue()
    assert NAME not in stream.getvalue()


def test_without_a_terminal_the_lines_are_json(lines: Lines) -> None:
    stream = io.StringIO()
    configure(format="auto", stream=stream)
    get_logger("dicom_node.test").info("ready")
    assert json.loads(stream.getvalue())["event"] == "ready"


def test_the_context_of_an_association_is_on_each_line(lines: Lines) -> None:
    with structlog.contextvars.bound_contextvars(association=7):
        get_logger("dicom_node.test").info("stored")
    assert lines()[0]["association"] == 7


def test_metrics_are_registered_under_their_names() -> None:
    observability.STATES.labels(entity="job", state="test").inc()
    found = REGISTRY.get_sample_value("dicom_node_states_total", {"entity": "job", "state": "test"})
    assert found == 1
