"""When a series counts as complete, and what the headers make of it, on a real ledger and spool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from dicom_node.assembler import is_quiet, plan, why_sent_back
from dicom_node.ledger import intake, queue, reports
from dicom_node.ledger.intake import SeriesProgress
from dicom_node.ledger.tables import JobState, SeriesState
from dicom_node.routing import Routes, Titles, parse_routes
from dicom_node.settings import AssemblySettings, NodeSettings, PolicySettings
from tests.conftest import ManualClock
from tests.factories import make_series
from tests.multiframe import make_enhanced
from tests.unit.dicom_node.bench import QUIET, ROUTES, Bench, bench, uids


def progress(**changes: Any) -> SeriesProgress:
    usual = {
        "series_instance_uid": "1.2",
        "study_instance_uid": "1",
        "modality": "CT",
        "state": SeriesState.RECEIVING,
        "instances": 3,
        "last_received": 100.0,
        "open_associations": 0,
        "forced": False,
        "calling_ae": "CT1",
        "called_ae": "DIFFCODE",
        "address": "10.0.0.7",
    }
    return SeriesProgress(**{**usual, **changes})


@pytest.mark.parametrize(
    ("changes", "now", "quiet"),
    [
        ({}, 109.9, False),
        ({}, 110.0, True),  # 100 + 10
        ({"modality": "PT"}, 110.0, False),
        ({"modality": "PT"}, 160.0, True),  # 100 + 60
        ({"open_associations": 1}, 1000.0, False),
        ({"open_associations": 1, "forced": True}, 100.0, True),
    ],
)
def test_a_series_is_quiet_by_modality_once_no_association_is_open(
    changes: dict[str, Any], now: float, quiet: bool
) -> None:
    assembly = AssemblySettings(quiet_s=10.0, quiet_by_modality_s={"PT": 60.0})
    assert is_quiet(progress(**changes), assembly, now) is quiet


def test_a_quiet_series_becomes_one_job_with_all_its_instances(node: Bench) -> None:
    sent = make_series("CT", slices=5)
    node.receive(sent)
    assert node.tick(QUIET - 0.1) == 0
    assert node.tick(0.1) == 1
    (job,) = node.jobs()
    assert (job["state"], job["task"], job["route"]) == ("queued", "ct_denoise", "ct")
    assert node.sources(job) == uids(sent)
    assert (node.series()["state"], node.series()["reason"]) == ("complete", None)
    assert node.tick() == 0


def test_a_series_waits_for_its_association_to_end(node: Bench) -> None:
    opened = intake.open_association(
        node.ledger,
        calling_ae="CT1",
        called_ae="DIFFCODE",
        address="127.0.0.1",
        now=node.clock(),
    )
    node.association = opened
    node.receive(make_series("CT", slices=2))
    assert node.tick(1000.0) == 0
    intake.close_association(node.ledger, opened, "aborted", node.clock())
    assert node.tick(0.0) == 1


def test_a_series_split_over_associations_within_the_quiet_time_is_one_job(
    node: Bench,
) -> None:
    sent = make_series("MR", slices=6)
    node.receive(sent[:2])
    assert node.tick(QUIET / 2) == 0
    node.receive(sent[2:4])
    assert node.tick(QUIET / 2) == 0
    node.receive(sent[4:])
    assert node.tick() == 1
    assert [node.sources(job) for job in node.jobs()] == [uids(sent)]


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_a_late_slice_of_ct_or_mr_is_restored_alone(node: Bench, modality: Any) -> None:
    sent = make_series(modality, slices=5)
    node.receive(sent[:4])
    node.tick()
    node.receive(sent[4:])
    assert node.series()["state"] == "receiving"
    node.tick()
    first, second = node.jobs()
    assert node.sources(first) == uids(sent[:4])
    assert node.sources(second) == uids(sent[4:])
    assert "late, apart from 4 earlier instances" in second["note"]


def test_a_late_slice_of_pet_makes_a_new_revision_of_the_whole(node: Bench) -> None:
    sent = make_series("PT", slices=5)
    node.receive(sent[:4])
    node.tick()
    node.receive(sent[4:])
    node.tick()
    first, second = node.jobs()
    assert (first["revision"], second["revision"]) == (1, 2)
    assert node.sources(second) == uids(sent)


def test_a_late_slice_goes_to_the_volume_that_it_belongs_to(node: Bench) -> None:
    first, second = (make_series("MR", slices=4, EchoTime=te, seed=i) for i, te in enumerate("18"))
    for dataset in second:
        dataset.SeriesInstanceUID = first[0].SeriesInstanceUID
    node.receive([*first, *second[:3]])
    node.tick()
    node.receive(second[3:])
    node.tick()
    jobs = {job["volume"]: [] for job in node.jobs()}
    for job in node.jobs():
        jobs[job["volume"]].append(len(node.sources(job)))
    assert jobs == {"echo_time=1": [4], "echo_time=8": [3, 1]}


def test_a_multi_frame_image_is_one_job_judged_by_its_frames(node: Bench) -> None:
    node.receive([make_enhanced("MR", slices=3, rows=8, volumes=2)])
    assert node.tick() == 1
    job = node.job()
    assert (job["task"], job["state"], job["instances"], job["volume"]) == (
        "mri_sr", "queued", 1, "whole",
    )  # fmt: skip


def test_a_multi_frame_image_of_which_nothing_may_be_restored_is_refused(node: Bench) -> None:
    image = make_enhanced("CT", slices=3, rows=8)
    image.SharedFunctionalGroupsSequence[0].CTImageFrameTypeSequence[0].FrameType = [
        "DERIVED", "PRIMARY", "PERFUSION", "RCBF",
    ]  # fmt: skip
    node.receive([image])
    node.tick()
    assert node.job()["state"] == "refused"
    assert "PERFUSION" in node.job()["reason"]


def test_a_route_may_test_what_stands_in_the_functional_groups() -> None:
    match = {"modality": "CT", "ConvolutionKernel": {"regex": "^B3"}}
    route = {"name": "soft", "match": match, "task": "ct_denoise", "destinations": ["pacs"]}
    routes = parse_routes({"route": [route]}, ["pacs"])
    image = make_enhanced("CT", slices=3, rows=8)
    decided = plan(
        Titles(), {str(image.SOPInstanceUID): image}, routes=routes, policy=PolicySettings()
    )
    assert [job.route for job in decided.jobs] == ["soft"]


DERIVED = ["DERIVED", "SECONDARY", "AXIAL"]
ORIGINAL = ["ORIGINAL", "PRIMARY", "AXIAL"]


@pytest.mark.parametrize(
    ("rule", "sender", "address", "kind", "ignored"),
    [
        ("originals", "PACS", "127.0.0.1", DERIVED, "a derived image, sent by one of our"),
        ("originals", "PACS", "127.0.0.1", ORIGINAL, None),
        ("originals", "PACS", "10.0.0.9", DERIVED, None),
        ("originals", "SCANNER", "127.0.0.1", DERIVED, None),
        ("ignore", "PACS", "127.0.0.1", ORIGINAL, "sent by one of our destinations"),
        ("restore", "PACS", "127.0.0.1", DERIVED, None),
    ],
)
def test_what_a_destination_returns_is_left_alone_as_the_policy_says(
    rule: str, sender: str, address: str, kind: list[str], ignored: str | None
) -> None:
    settings = NodeSettings.model_validate(
        {
            "policy": {"from_destinations": rule},
            "destinations": {"pacs": {"ae_title": "PACS", "host": "127.0.0.1", "port": 104}},
        }
    )
    (header,) = make_series("CT", slices=1, ImageType=kind)
    why = why_sent_back(header, titles=Titles(sender, "NODE", address), settings=settings)
    assert why is None if ignored is None else str(why).startswith(ignored)


def test_a_destination_that_is_known_by_name_is_known_by_its_title() -> None:
    settings = NodeSettings.model_validate(
        {"destinations": {"pacs": {"ae_title": "PACS", "host": "pacs.example", "port": 104}}}
    )
    (header,) = make_series("CT", slices=1, ImageType=DERIVED)
    assert why_sent_back(header, titles=Titles("PACS", "", "10.0.0.9"), settings=settings)


def test_a_series_that_a_destination_returns_is_ignored_with_the_reason(node: Bench) -> None:
    node.association = intake.open_association(
        node.ledger, calling_ae="PACS", called_ae="NODE", address="127.0.0.1", now=node.clock()
    )
    node.receive(make_series("CT", slices=3, ImageType=DERIVED))
    intake.close_association(node.ledger, node.association, "released", node.clock())
    node.tick()
    assert node.jobs() == []
    assert node.series()["reason"] == "a derived image, sent by one of our destinations"


def test_the_same_instances_again_make_no_second_job(node: Bench) -> None:
    sent = make_series("CT", slices=3)
    node.receive(sent)
    node.tick()
    node.receive(sent)
    node.tick()
    assert len(node.jobs()) == 1


def test_two_echoes_in_one_series_are_two_jobs(node: Bench) -> None:
    early = make_series("MR", slices=3, EchoTime="11")
    late = make_series("MR", slices=3, EchoTime="92", seed=1)
    for dataset in late:
        dataset.SeriesInstanceUID = early[0].SeriesInstanceUID
    node.receive([*early, *late])
    node.tick()
    assert sorted(len(node.sources(job)) for job in node.jobs()) == [3, 3]
    assert {frozenset(node.sources(job)) for job in node.jobs()} == {
        frozenset(uids(early)),
        frozenset(uids(late)),
    }


def test_what_no_route_wants_is_ignored_with_the_reason(node: Bench) -> None:
    phase = ["ORIGINAL", "PRIMARY", "P", "ND"]
    node.receive(make_series("MR", slices=3, ImageType=phase))
    assert node.tick() == 1
    assert node.jobs() == []
    assert node.series()["state"] == "ignored"
    assert "phase image" in node.series()["reason"]


def test_an_ignored_series_can_be_forced_when_the_routes_have_changed(node: Bench) -> None:
    node.assembler.routes = Routes(())
    node.receive(make_series("CT", slices=3))
    node.tick()
    assert node.series()["reason"] == "no route matches (modality CT)"
    node.assembler.routes = ROUTES
    uid = node.series()["series_instance_uid"]
    intake.force_series(node.ledger, uid, reason="routes changed", now=node.clock())
    assert node.tick(0.0) == 1
    assert len(node.jobs()) == 1


def test_forcing_a_complete_series_repeats_nothing(node: Bench) -> None:
    node.receive(make_series("CT", slices=3))
    node.tick()
    uid = node.series()["series_instance_uid"]
    intake.force_series(node.ledger, uid, reason="impatience", now=node.clock())
    node.tick(0.0)
    assert (len(node.jobs()), node.series()["state"]) == (1, "complete")


def test_a_reformatted_ct_is_refused_at_once(node: Bench) -> None:
    node.receive(make_series("CT", slices=4, plane="coronal"))
    node.tick()
    (job,) = node.jobs()
    assert job["state"] == "refused"
    assert "coronal" in job["reason"]


@pytest.mark.parametrize(
    ("incomplete", "state"), [("restore", "queued"), ("hold", "held"), ("refuse", "refused")]
)
def test_a_gap_follows_the_policy_for_incomplete_series(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock, incomplete: str, state: str
) -> None:
    node = bench(tmp_path, bench_ledger, clock, policy={"incomplete": incomplete})
    node.receive(make_series("CT", slices=8, missing=[3]))
    node.tick()
    (job,) = node.jobs()
    assert job["state"] == state
    assert "slices are missing" in job["note"]
    assert node.series()["state"] == "incomplete"


def test_fewer_slices_than_a_pet_announces_are_incomplete(node: Bench) -> None:
    node.receive(make_series("PT", slices=6, missing=[4, 5]))
    node.tick()
    assert node.series()["state"] == "incomplete"
    assert "4 of the 6 slices" in node.series()["reason"]


def test_an_instance_whose_file_was_damaged_is_put_aside_and_the_rest_goes_on(
    node: Bench,
) -> None:
    sent = make_series("CT", slices=4)
    node.receive(sent)
    rows = intake.series_instances(node.ledger, node.series()["series_instance_uid"])
    node.spool.resolve(rows[0].path).write_bytes(b"damaged")
    node.spool.resolve(rows[1].path).unlink()
    node.tick()
    node.tick()
    (job,) = node.jobs()
    assert node.sources(job) == uids(sent) - {row.sop_instance_uid for row in rows[:2]}
    assert len(reports.instances(node.ledger, state="rejected")) == 2


def test_an_instance_that_comes_in_between_is_seen_by_the_next_look(
    node: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = make_series("CT", slices=4)
    node.receive(sent[:3])
    enqueue = queue.enqueue

    def slow_enqueue(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.undo()
        node.receive(sent[3:])
        return enqueue(*args, **kwargs)

    monkeypatch.setattr(queue, "enqueue", slow_enqueue)
    node.tick()
    assert node.jobs() == []
    node.tick()
    assert [node.sources(job) for job in node.jobs()] == [uids(sent)]


def test_titles_of_the_sender_reach_the_routes(node: Bench) -> None:
    node.assembler.routes = parse_routes(
        {
            "route": [
                {
                    "name": "screening",
                    "task": "ct_denoise",
                    "destinations": ["*"],
                    "priority": 9,
                    "match": {"calling_ae": "CT1", "address": "127.0.0.1"},
                }
            ]
        },
        ["pacs"],
    )
    node.association = intake.open_association(
        node.ledger,
        calling_ae="CT1",
        called_ae="DIFFCODE",
        address="127.0.0.1",
        now=node.clock(),
    )
    node.receive(make_series("CT", slices=2))
    intake.close_association(node.ledger, node.association, "released", node.clock())
    node.tick()
    (job,) = node.jobs()
    assert (job["route"], job["priority"]) == ("screening", 9)


def test_a_plan_of_own_output_is_to_leave_it_alone() -> None:
    own = make_series("CT", slices=2, Manufacturer="DiffCode")
    for dataset in own:
        dataset.ManufacturerModelName = "DiffCode DICOM node"
    headers = {str(dataset.SOPInstanceUID): dataset for dataset in own}
    decided = plan(Titles(), headers, routes=ROUTES, policy=PolicySettings())
    assert (decided.state, decided.jobs) == (SeriesState.IGNORED, ())
    assert "our own output" in (decided.reason or "")


def test_a_magnitude_volume_beside_an_ignored_phase_volume_says_both() -> None:
    magnitude = make_series("MR", slices=3, ImageType=["ORIGINAL", "PRIMARY", "M"])
    phase = make_series("MR", slices=3, seed=1, ImageType=["ORIGINAL", "PRIMARY", "P"])
    for dataset in phase:
        dataset.SeriesInstanceUID = magnitude[0].SeriesInstanceUID
    headers = {str(dataset.SOPInstanceUID): dataset for dataset in [*magnitude, *phase]}
    decided = plan(Titles(), headers, routes=ROUTES, policy=PolicySettings())
    (job,) = decided.jobs
    assert (job.state, set(job.instance_uids)) == (JobState.QUEUED, uids(magnitude))
    assert "phase image" in (decided.reason or "")
