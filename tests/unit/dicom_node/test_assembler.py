"""When a series counts as complete, and what the headers make of it, on a real ledger and spool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, update

from dicom_node import assembler
from dicom_node.assembler import Assembler, readiness
from dicom_node.ledger import intake, queue, reports
from dicom_node.ledger.intake import Sender, SeriesProgress
from dicom_node.ledger.tables import Entity, JobState, SeriesState, instances, move, writing
from dicom_node.planning import plan, why_sent_back
from dicom_node.query_scu import SourceCount
from dicom_node.routing import Routes, Titles, parse_routes
from dicom_node.settings import NodeSettings, PolicySettings, SourceQuery
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
    assembly = {"quiet_s": 10.0, "quiet_by_modality_s": {"PT": 60.0}}
    settings = NodeSettings.model_validate({"assembly": assembly})
    assert (readiness(progress(**changes), [], settings, now) is not None) is quiet


CT1 = {"calling_ae": "CT1", "quiet_s": 30.0, "quiet_by_modality_s": {"PT": 90.0}}
WARD = {"address": "10.2.0.0/16", "quiet_s": 45.0}


def sender(
    title: str = "CT1", address: str = "10.0.0.7", outcome: str | None = "released", n: int = 3
) -> Sender:
    return Sender(title, "DIFFCODE", address, outcome, n)


@pytest.mark.parametrize(
    ("senders", "modality", "wait"),
    [
        ([sender("MR9")], "CT", 10.0),  # no source of ours: [assembly]
        ([sender("CT1")], "CT", 30.0),
        ([sender("CT1")], "PT", 90.0),
        ([sender("MR9", "10.2.3.4")], "CT", 45.0),
        ([sender("CT1"), sender("MR9", "10.2.3.4")], "CT", 45.0),  # the longer of two
        ([sender("CT1"), sender("MR9", "10.2.3.4")], "PT", 90.0),
    ],
)
def test_the_quiet_time_is_that_of_the_source_and_of_the_modality(
    senders: list[Sender], modality: str, wait: float
) -> None:
    settings = NodeSettings.model_validate({"sources": {"ct1": CT1, "ward": WARD}})
    series = progress(modality=modality)
    assert readiness(series, senders, settings, 100.0 + wait) is not None
    before = readiness(series, senders, settings, 100.0 + wait - 0.1)
    assert before is None or before.only_if_whole


def test_a_series_that_is_sent_for_ever_is_concluded_as_incomplete() -> None:
    settings = NodeSettings.model_validate({"assembly": {"longest_s": 600.0}})
    series = progress(open_associations=1, last_received=699.0)
    assert readiness(series, [sender()], settings, 699.9, open_since=100.0) is None
    ready = readiness(series, [sender(outcome=None)], settings, 700.0, open_since=100.0)
    assert ready is not None
    assert [(each.signal, each.verdict) for each in ready.evidence] == [
        ("overdue", "short"),
        ("association", "unproven"),
    ]


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


def test_an_open_series_is_asked_about_again_only_where_something_has_changed(
    node: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node with many open series looks each second, in the process that receives."""
    asked: list[str] = []
    senders = intake.series_senders

    def noting(ledger: Engine, uid: str) -> list[Sender]:
        asked.append(uid)
        return senders(ledger, uid)

    monkeypatch.setattr(intake, "series_senders", noting)
    sent = make_series("CT", slices=4)
    bring(node, sent[:2])
    assert [node.tick(1.0) for _ in range(5)] == [0] * 5
    assert len(asked) == 1
    bring(node, sent[2:])
    assert [node.tick(1.0) for _ in range(5)] == [0] * 5
    assert len(asked) == 2
    node.clock.advance(-60.0)
    assert node.tick(0.0) == 0
    assert len(asked) == 3
    assert node.tick(QUIET) == 1


def test_headers_are_read_ahead_while_little_comes_and_those_of_a_burst_when_it_is_over(
    node: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembler, "_LITTLE", 3)
    sent = make_series("CT", slices=10)
    uid = str(sent[0].SeriesInstanceUID)
    looks = []
    monkeypatch.setattr(assembler, "_AT_ONCE", 4)
    for part in (sent[:3], sent[3:8], [], sent[8:], []):
        node.receive(part)
        node.tick(0.1)
        looks.append(len(node.assembler._ahead.of(uid)))
    assert looks == [3, 3, 7, 10, 10]
    assert node.tick() == 1
    assert node.sources(node.job()) == uids(sent)


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


@pytest.mark.parametrize("value", ["../../x", "nan", "ORIGINAL", "1.2.3"])
def test_a_multi_frame_image_with_text_for_a_number_is_refused(node: Bench, value: str) -> None:
    image = make_enhanced("CT", slices=3, rows=8)
    for item in image.PerFrameFunctionalGroupsSequence:
        item.FrameContentSequence[0].add_new("FrameAcquisitionNumber", "LO", value)
    node.receive([image])
    node.tick()
    assert node.job()["state"] == "refused"
    assert node.job()["reason"] == "AcquisitionNumber of a frame has a value that is none"


def test_a_series_that_trips_over_a_mistake_of_ours_is_set_aside_and_holds_up_no_other(
    node: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the process would die of it, and each after it."""
    stumbled: list[str] = []
    plain = assembler.plan

    def stumbles(titles: Any, headers: Any, **given: Any) -> Any:
        if not stumbled:
            stumbled.append(next(iter(headers)))
            raise ValueError("could not convert string to float: 'DOE^JANE'")
        return plain(titles, headers, **given)

    monkeypatch.setattr(assembler, "plan", stumbles)
    node.receive([*make_series("CT", slices=3), *make_series("MR", slices=3)])
    node.tick()
    assert [job["state"] for job in node.jobs()] == ["queued"]
    (aside,) = [row for row in reports.series(node.ledger) if row["state"] == "ignored"]
    assert aside["reason"].startswith("unexpected ValueError at test_assembler.py:")
    assert "DOE" not in caplog.text
    node.tick()
    assert len(node.jobs()) == 1
    assert intake.force_series(
        node.ledger, aside["series_instance_uid"], reason="by hand", now=node.clock()
    )
    node.tick()
    assert len(node.jobs()) == 2


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
    assert "2 of 6 images missing by Image Index: 5-6" in node.series()["reason"]


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


# Associations as evidence -----------------------------------------------------------------------


def bring(node: Bench, datasets: Any, outcome: Any = "released", title: str = "CT1") -> None:
    """Receive over an association of its own that ends as given."""
    node.association = intake.open_association(
        node.ledger, calling_ae=title, called_ae="DIFFCODE", address="10.0.0.7", now=node.clock()
    )
    node.receive(datasets)
    intake.close_association(node.ledger, node.association, outcome, node.clock())


def signals(row: dict[str, Any]) -> dict[str, str]:
    return {each["signal"]: each["verdict"] for each in row["evidence"]}


def by_position(datasets: Any) -> list[Any]:
    return sorted(datasets, key=lambda each: float(each.ImagePositionPatient[2]))


def test_a_series_that_was_broken_off_is_incomplete_until_the_rest_has_come(node: Bench) -> None:
    sent = by_position(make_series("CT", slices=6))
    bring(node, sent[:3], "aborted")
    node.tick()
    assert node.series()["state"] == "incomplete"
    assert node.series()["reason"].startswith("the last association was aborted: CT1@10.0.0.7")
    bring(node, sent)
    node.tick()
    assert (node.series()["state"], node.series()["reason"]) == ("complete", None)
    assert [len(node.sources(job)) for job in node.jobs()] == [3, 3]


def test_a_count_that_is_reached_outweighs_that_the_sender_broke_off(node: Bench) -> None:
    bring(node, make_series("PT", slices=5), "aborted")
    node.tick()
    assert node.series()["state"] == "complete"
    assert signals(node.series())["image_index"] == "whole"
    assert signals(node.series())["association"] == "short"


def test_a_pet_series_of_which_all_is_there_is_not_waited_for(node: Bench) -> None:
    sent = make_series("PT", slices=5)
    bring(node, sent[:4])
    assert node.tick(0.0) == 0
    bring(node, sent[4:])
    assert node.tick(0.0) == 1
    assert node.series()["state"] == "complete"
    assert [len(node.sources(job)) for job in node.jobs()] == [5]


def test_a_ct_series_is_waited_for_as_nothing_counts_it(node: Bench) -> None:
    bring(node, make_series("CT", slices=5))
    assert node.tick(0.0) == 0
    assert node.tick(QUIET) == 1


def test_the_evidence_is_kept_with_the_series_and_its_jobs(node: Bench) -> None:
    bring(node, make_series("CT", slices=8, missing=[3]))
    node.tick()
    assert signals(node.series()) == {
        "quiet": "unproven",
        "association": "unproven",
        "slice_position": "short",
    }
    assert signals(node.job()) == signals(node.series())
    words = {each["signal"]: each["words"] for each in node.job()["evidence"]}
    assert words["association"] == "CT1@10.0.0.7 released, 7 instances"
    assert words["quiet"] == "quiet for 10 s of 10 s (any source)"


def test_a_clock_that_goes_back_does_not_hold_a_series_up(node: Bench) -> None:
    node.receive(make_series("CT", slices=3))
    node.clock.advance(-86_400.0)
    assert node.tick(0.0) == 0
    assert node.tick(QUIET) == 1


def test_the_sender_of_most_instances_is_the_one_that_the_routes_see(node: Bench) -> None:
    test = {
        "name": "ct1",
        "task": "ct_denoise",
        "destinations": ["*"],
        "match": {"calling_ae": "CT1"},
    }
    node.assembler.routes = parse_routes({"route": [test]}, ["pacs"])
    sent = make_series("CT", slices=6)
    bring(node, sent[:4], title="CT1")
    bring(node, sent, title="PACS2")
    node.tick()
    assert [job["route"] for job in node.jobs()] == ["ct1"]
    assert [len(node.sources(job)) for job in node.jobs()] == [6]


# What is missing, and comes ---------------------------------------------------------------------


@pytest.mark.parametrize("incomplete", ["hold", "refuse"])
def test_what_was_kept_back_for_missing_slices_is_restored_with_them(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock, incomplete: str
) -> None:
    node = bench(tmp_path, bench_ledger, clock, policy={"incomplete": incomplete})
    sent = by_position(make_series("CT", slices=6))
    node.receive([*sent[:3], *sent[4:]])
    node.tick()
    (kept,) = node.jobs()
    assert (kept["state"], len(node.sources(kept))) == (
        {"hold": "held", "refuse": "refused"}[incomplete], 5,
    )  # fmt: skip
    node.receive([sent[3]])
    node.tick()
    first, second = node.jobs()
    assert first["state"] == {"hold": "cancelled", "refuse": "refused"}[incomplete]
    assert (second["state"], node.sources(second)) == ("queued", uids(sent))
    assert node.series()["state"] == "complete"


def test_a_person_may_take_an_incomplete_series_as_it_is(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock
) -> None:
    node = bench(tmp_path, bench_ledger, clock, policy={"incomplete": "hold"})
    node.receive(make_series("CT", slices=8, missing=[3]))
    node.tick()
    uid = node.series()["series_instance_uid"]
    intake.force_series(node.ledger, uid, reason="the scanner lost it", now=node.clock())
    node.tick(0.0)
    held, forced = node.jobs()
    assert (held["state"], forced["state"]) == ("cancelled", "queued")
    assert "superseded by revision 2" in held["reason"]
    assert node.series()["state"] == "incomplete"
    assert node.series()["evidence"][0]["words"] == (
        "taken as it is by a person: the scanner lost it"
    )


def test_a_job_that_a_person_released_meanwhile_is_not_made_twice(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = bench(tmp_path, bench_ledger, clock, policy={"incomplete": "hold"})
    sent = by_position(make_series("CT", slices=6))
    node.receive([*sent[:3], *sent[4:]])
    node.tick()
    node.receive([sent[3]])
    enqueue = queue.enqueue

    def released_first(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.undo()
        (held,) = node.jobs()
        with writing(node.ledger) as connection:
            assert move(
                connection, Entity.JOB, held["id"], "queued", reason="released", now=node.clock()
            )
        assert queue.claim(node.ledger, "restore-0", lease_s=60, now=node.clock()) is not None
        return enqueue(*args, **kwargs)

    monkeypatch.setattr(queue, "enqueue", released_first)
    assert node.tick() == 0
    assert node.tick() == 1
    assert [len(node.sources(job)) for job in node.jobs()] == [5, 1]


def test_late_slices_follow_their_volume_whatever_the_routes_say_now(node: Bench) -> None:
    sent = make_series("MR", slices=5)
    node.receive(sent[:4])
    node.tick()
    changed = {
        "name": "new",
        "task": "mri_sr",
        "destinations": ["*"],
        "strength": 0.5,
        "priority": 3,
    }
    node.assembler.routes = parse_routes({"route": [changed]}, ["elsewhere"])
    node.receive(sent[4:])
    node.tick()
    first, second = node.jobs()
    for key in ("route", "strength", "priority", "task"):
        assert second[key] == first[key], key


def test_a_pet_revision_takes_the_place_of_one_that_has_not_begun(node: Bench) -> None:
    sent = make_series("PT", slices=5)
    node.receive(sent[:4])
    node.tick()
    node.receive(sent[4:])
    node.tick()
    first, second = node.jobs()
    assert (first["state"], second["state"], second["revision"]) == ("cancelled", "queued", 2)
    assert second["note"].startswith("revision with 5 instances of a series when it had 4")


def test_a_second_volume_that_comes_late_leaves_the_first_alone(node: Bench) -> None:
    first, second = (
        make_series("PT", slices=4, FrameReferenceTime=str(60000 * i), seed=i) for i in (1, 2)
    )
    for dataset in second:
        dataset.SeriesInstanceUID = first[0].SeriesInstanceUID
    node.receive(first)
    node.tick()
    node.receive(second)
    node.tick()
    assert [node.sources(job) for job in node.jobs()] == [uids(first), uids(second)]


def test_a_late_slice_of_a_refused_series_is_refused_with_it(node: Bench) -> None:
    axial = make_series("MR", slices=3)
    coronal = make_series("MR", slices=3, plane="coronal", seed=1)
    for dataset in coronal:
        dataset.SeriesInstanceUID = axial[0].SeriesInstanceUID
    node.receive([*axial, *coronal[:2]])
    node.tick()
    node.receive(coronal[2:])
    node.tick()
    assert [job["state"] for job in node.jobs()] == ["refused", "refused"]


# What the source says ---------------------------------------------------------------------------


def asking(node: Bench, told: SourceCount, asked: list[tuple[str, str]] | None = None) -> Assembler:
    find = {"ae_title": "CT1", "host": "10.0.0.7", "port": 104}
    sources = {"ct1": {"calling_ae": "CT1", "find": find}}
    settings = NodeSettings.model_validate({**node.settings.model_dump(), "sources": sources})

    def ask(query: SourceQuery, study_uid: str, series_uid: str) -> SourceCount:
        assert query.ae_title == "CT1"
        if asked is not None:
            asked.append((study_uid, series_uid))
        return told

    return Assembler(settings, node.spool, node.ledger, ROUTES, ask)


@pytest.mark.parametrize(
    ("told", "state", "verdict"),
    [
        (SourceCount("ct1", 5), "complete", "whole"),
        (SourceCount("ct1", 7), "incomplete", "short"),
        (SourceCount("ct1", 1, frozenset({"1.2.3"})), "incomplete", "short"),
        (SourceCount("ct1", None, trouble="does not answer"), "complete", "unproven"),
    ],
)
def test_the_source_is_asked_how_many_there_are(
    node: Bench, told: SourceCount, state: str, verdict: str
) -> None:
    sent = make_series("CT", slices=5)
    asked: list[tuple[str, str]] = []
    node.assembler = asking(node, told, asked)
    bring(node, sent)
    node.tick()
    assert asked == [(str(sent[0].StudyInstanceUID), str(sent[0].SeriesInstanceUID))]
    assert node.series()["state"] == state
    assert signals(node.series())["c_find"] == verdict


def test_a_source_that_is_silent_is_left_alone_for_a_while(node: Bench) -> None:
    asked: list[tuple[str, str]] = []
    node.assembler = asking(node, SourceCount("ct1", None, trouble="no answer"), asked)
    for number in range(3):
        bring(node, make_series("CT", slices=2, seed=number))
        node.tick()
    assert len(asked) == 1
    node.clock.advance(60.0)
    bring(node, make_series("CT", slices=2, seed=9))
    node.tick()
    assert len(asked) == 2


def test_only_a_source_that_says_where_is_asked(node: Bench) -> None:
    asked: list[tuple[str, str]] = []
    node.assembler = asking(node, SourceCount("ct1", 1), asked)
    bring(node, make_series("CT", slices=2), title="OTHER")
    node.tick()
    assert asked == []


# What has left the spool ------------------------------------------------------------------------


def purge(node: Bench) -> None:
    """Take the files of all instances away, as retention does."""
    with writing(node.ledger) as connection:
        connection.execute(update(instances).values(purged_at=node.clock()))


def test_a_late_ct_slice_follows_its_volume_when_the_others_have_left_the_spool(
    node: Bench,
) -> None:
    sent = make_series("CT", slices=5)
    node.receive(sent[:4])
    node.tick()
    purge(node)
    node.assembler.routes = Routes(())
    node.receive(sent[4:])
    node.tick()
    first, second = node.jobs()
    assert (second["state"], second["route"]) == ("queued", first["route"])
    assert second["note"].startswith("late, apart from 4 earlier instances")


def test_a_late_pet_slice_is_refused_when_the_others_have_left_the_spool(node: Bench) -> None:
    sent = make_series("PT", slices=5)
    node.receive(sent[:4])
    node.tick()
    purge(node)
    node.receive(sent[4:])
    node.tick()
    _, second = node.jobs()
    assert second["state"] == "refused"
    assert "send the whole series again" in second["reason"]
