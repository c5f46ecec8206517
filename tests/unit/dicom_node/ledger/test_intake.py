from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import Engine, select

from dicom_node.errors import LedgerError
from dicom_node.ledger import arrivals, intake, reports, tables
from dicom_node.ledger.tables import InstanceState, SeriesState, reading
from tests.unit.dicom_node.ledger.examples import NOW, SERIES, instance


def _progress(engine: Engine) -> intake.SeriesProgress:
    (progress,) = intake.series_progress(engine)
    return progress


def _associate(engine: Engine, calling_ae: str = "SCANNER", now: float = NOW) -> int:
    return intake.open_association(
        engine, calling_ae=calling_ae, called_ae="DIFFCODE", address="10.0.0.5", now=now
    )


def test_the_first_instance_opens_its_series(engine: Engine) -> None:
    association = _associate(engine)
    received = instance(1, association_id=association)
    assert intake.record_instance(engine, received, NOW) is InstanceState.RECEIVED
    assert _progress(engine) == intake.SeriesProgress(
        series_instance_uid=SERIES,
        study_instance_uid="1.2",
        modality="CT",
        state=SeriesState.RECEIVING,
        instances=1,
        last_received=NOW,
        open_associations=1,
        forced=False,
        calling_ae="SCANNER",
        called_ae="DIFFCODE",
        address="10.0.0.5",
        first_received=NOW,
    )


def test_the_same_instance_again_is_a_duplicate_and_no_new_work(engine: Engine) -> None:
    intake.record_instance(engine, instance(1), NOW)
    assert intake.record_instance(engine, instance(1), NOW + 5) is InstanceState.DUPLICATE
    assert len(intake.series_instances(engine, SERIES)) == 1
    assert _progress(engine).instances == 1


def test_a_duplicate_keeps_an_open_series_from_being_quiet(engine: Engine) -> None:
    intake.record_instance(engine, instance(1), NOW)
    intake.record_instance(engine, instance(1), NOW + 5)
    assert _progress(engine).last_received == NOW + 5


def test_a_duplicate_does_not_reopen_a_closed_series(
    engine: Engine, make_jobs: Callable[..., list[int]]
) -> None:
    make_jobs()
    intake.record_instance(engine, instance(1), NOW + 100)
    assert intake.series_progress(engine) == []


def test_other_bytes_under_a_known_uid_are_set_aside_and_the_first_stay(engine: Engine) -> None:
    intake.record_instance(engine, instance(1), NOW)
    other = instance(1, sha256="f" * 64, path="incoming/ff/f.dcm")
    assert intake.record_instance(engine, other, NOW) is InstanceState.CONFLICT
    assert intake.record_instance(engine, other, NOW) is InstanceState.CONFLICT
    (kept,) = intake.series_instances(engine, SERIES)
    assert kept.path == instance(1).path
    assert [row["state"] for row in reports.instances(engine)] == ["conflict", "received"]
    assert "incoming/ff/f.dcm" in intake.known_paths(engine)


def test_a_conflict_that_names_another_series_opens_none(engine: Engine) -> None:
    intake.record_instance(engine, instance(1), NOW)
    stranger = instance(1, sha256="f" * 64, series_instance_uid="9.9")
    assert intake.record_instance(engine, stranger, NOW) is InstanceState.CONFLICT
    assert [row["series_instance_uid"] for row in reports.series(engine)] == [SERIES]


def test_an_ignored_instance_is_recorded_with_its_reason_and_never_restored(
    engine: Engine,
) -> None:
    report = instance(1, ignored_reason="a dose report is no image")
    assert intake.record_instance(engine, report, NOW) is InstanceState.IGNORED
    assert intake.series_progress(engine) == []
    (series,) = reports.series(engine)
    assert (series["state"], series["reason"]) == ("ignored", "a dose report is no image")
    assert intake.series_instances(engine, SERIES) == []


def test_an_image_opens_a_series_of_which_only_ignored_objects_had_come(engine: Engine) -> None:
    intake.record_instance(engine, instance(1, ignored_reason="localizer"), NOW)
    intake.record_instance(engine, instance(2), NOW)
    assert _progress(engine).instances == 1


def test_a_late_slice_reopens_the_series(
    engine: Engine, make_jobs: Callable[..., list[int]]
) -> None:
    make_jobs()
    assert intake.series_progress(engine) == []
    intake.record_instance(engine, instance(3), NOW + 60)
    assert _progress(engine).instances == 3
    (late,) = intake.series_instances(engine, SERIES, only_unassigned=True)
    assert late.sop_instance_uid == f"{SERIES}.3"
    assert [row.assigned for row in intake.series_instances(engine, SERIES)] == [True, True, False]
    history = reports.one_series(engine, SERIES)["history"]
    assert history[-1]["reason"] == "late instance"


def test_the_same_instance_from_four_associations_at_once_is_received_once(
    engine: Engine,
) -> None:
    associations = [_associate(engine) for _ in range(4)]

    def store(association: int) -> list[InstanceState]:
        return [
            intake.record_instance(engine, instance(number, association_id=association), NOW)
            for number in range(20)
        ]

    with ThreadPoolExecutor(4) as pool:
        states = [state for found in pool.map(store, associations) for state in found]
    assert states.count(InstanceState.RECEIVED) == 20
    assert states.count(InstanceState.DUPLICATE) == 60
    assert _progress(engine).instances == 20
    assert _progress(engine).open_associations >= 1


def test_a_series_over_several_associations_counts_those_still_open(engine: Engine) -> None:
    first, second = _associate(engine), _associate(engine, "PACS", NOW + 1)
    intake.record_instance(engine, instance(1, association_id=first), NOW)
    intake.record_instance(engine, instance(2, association_id=second), NOW + 2)
    assert _progress(engine).open_associations == 2
    intake.close_association(engine, first, "aborted", NOW + 3)
    assert _progress(engine).open_associations == 1
    assert _progress(engine).calling_ae == "PACS"


def test_an_association_ends_once(engine: Engine) -> None:
    association = _associate(engine)
    intake.close_association(engine, association, "aborted", NOW + 1)
    intake.close_association(engine, association, "released", NOW + 2)
    with reading(engine) as connection:
        row = connection.execute(select(tables.associations)).one()
    assert (row.closed_at, row.outcome) == (NOW + 1, "aborted")


def test_associations_of_a_killed_process_are_closed_as_lost(engine: Engine) -> None:
    intake.record_instance(engine, instance(1, association_id=_associate(engine)), NOW)
    assert intake.close_lost_associations(engine, NOW + 9) == 1
    assert intake.close_lost_associations(engine, NOW + 9) == 0
    assert _progress(engine).open_associations == 0


def test_a_rejected_instance_leaves_its_uid_free(engine: Engine) -> None:
    uid = instance(1).sop_instance_uid
    for _ in range(2):
        intake.reject_instance(
            engine,
            sop_instance_uid=uid,
            path="quarantine/1.dcm",
            reason="the data set ends early",
            association_id=None,
            now=NOW,
        )
    assert intake.record_instance(engine, instance(1), NOW) is InstanceState.RECEIVED
    states = [row["state"] for row in reports.instances(engine)]
    assert states == ["received", "rejected", "rejected"]


def test_an_instance_without_uid_may_be_rejected(engine: Engine) -> None:
    intake.reject_instance(
        engine, sop_instance_uid=None, path=None, reason="no header", association_id=None, now=NOW
    )
    (row,) = reports.instances(engine, state="rejected")
    assert (row["sop_instance_uid"], row["reason"]) == (None, "no header")


def test_a_good_copy_may_follow_an_instance_that_did_not_decode(engine: Engine) -> None:
    intake.record_instance(engine, instance(1), NOW)
    uid, reason = instance(1).sop_instance_uid, "pixel data do not decode"
    moved = intake.quarantine_instance(engine, uid, path="quarantine/1.dcm", reason=reason, now=NOW)
    assert moved
    assert not intake.quarantine_instance(engine, uid, path="x", reason=reason, now=NOW)
    assert intake.series_instances(engine, SERIES) == []
    good = instance(1, sha256="e" * 64)
    assert intake.record_instance(engine, good, NOW) is InstanceState.RECEIVED
    assert _progress(engine).instances == 1


def test_a_series_without_a_rule_is_ignored_with_the_reason(engine: Engine) -> None:
    intake.record_instance(engine, instance(1), NOW)
    assert intake.ignore_series(engine, SERIES, "no rule matches", NOW + 10)
    assert not intake.ignore_series(engine, SERIES, "no rule matches", NOW + 10)
    (series,) = reports.series(engine, state="ignored")
    assert series["reason"] == "no rule matches"


def test_a_series_that_grew_meanwhile_is_not_ignored(engine: Engine) -> None:
    intake.record_instance(engine, instance(1), NOW)
    seen = _progress(engine).instances
    intake.record_instance(engine, instance(2), NOW)
    assert not intake.ignore_series(engine, SERIES, "no rule", NOW, instances_seen=seen)


def test_a_forced_series_is_open_and_says_so(engine: Engine) -> None:
    intake.record_instance(engine, instance(1), NOW)
    intake.ignore_series(engine, SERIES, "no rule matches", NOW)
    assert intake.force_series(engine, SERIES, reason="by hand", now=NOW + 1)
    assert _progress(engine).forced
    assert not intake.force_series(engine, "9.9", reason="by hand", now=NOW)


def test_a_modality_that_is_no_code_string_does_not_break_the_ledger(engine: Engine) -> None:
    odd = replace(instance(1), modality="COMPUTED TOMOGRAPHY OF THE CHEST")
    assert intake.record_instance(engine, odd, NOW) is InstanceState.RECEIVED


def test_a_failure_in_the_middle_records_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_the_connection(*_: object, **__: object) -> None:
        raise ConnectionError

    with monkeypatch.context() as broken:
        broken.setattr(arrivals, "_note_activity", lose_the_connection)
        with pytest.raises(ConnectionError):
            intake.record_instance(engine, instance(1), NOW)
    assert reports.instances(engine) == reports.series(engine) == []
    assert intake.record_instance(engine, instance(1), NOW) is InstanceState.RECEIVED


def test_one_failure_in_a_group_records_nothing_of_it(engine: Engine) -> None:
    group = [instance(1), instance(2, association_id=99), instance(3)]
    with pytest.raises(LedgerError):
        intake.record_instances(engine, group, NOW)
    assert reports.instances(engine) == []


def test_a_group_tells_new_again_and_other_bytes_apart_within_itself(engine: Engine) -> None:
    other = instance(1, sha256="other", path="incoming/ot/other.dcm")
    group = [instance(1), instance(2), instance(1), other, instance(2)]
    moved: list[str] = []

    def set_aside(path: str, reason: str) -> str:
        moved.append(path)
        return f"quarantine/{path.rpartition('/')[2]}"

    assert intake.record_instances(engine, group, NOW, set_aside) == [
        *("received", "received", "duplicate", "conflict", "duplicate")
    ]
    assert moved == ["incoming/ot/other.dcm"]
    (conflict,) = reports.instances(engine, state="conflict")
    assert conflict["path"] == "quarantine/other.dcm"
    (series,) = reports.series(engine)
    assert series["instances"] == 2


def test_an_unknown_association_is_an_error_of_the_ledger(engine: Engine) -> None:
    with pytest.raises(LedgerError):
        intake.record_instance(engine, instance(1, association_id=99), NOW)
