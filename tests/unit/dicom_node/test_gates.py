"""What a site does about what the gates measured, for each destination."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dicom_node.gates import UNJUDGED, Judgement, judge, silent_rules
from dicom_node.ledger.states import Verdict
from dicom_node.ledger.verdicts import NOWHERE
from dicom_node.readings import GateReading, Level
from dicom_node.settings import NodeSettings
from restoration.fidelity.catalogue import GATES as MODEL_GATES
from tests.unit.dicom_node.bench import reading

PEER = {"ae_title": "PEER", "host": "127.0.0.1", "port": 104}


def settings(**tables: Any) -> NodeSettings:
    destinations = {"pacs": PEER, "research": PEER}
    return NodeSettings.model_validate({"destinations": destinations, **tables})


def judged(*readings: GateReading, calibrated: bool = True, **options: Any) -> Judgement:
    given = options.pop("settings", settings())
    return judge(
        readings,
        calibrated=calibrated,
        modality=options.get("modality", "CT"),
        destinations=options.get("destinations", ("pacs",)),
        settings=given,
    )


def test_what_all_gates_pass_goes_out_without_a_word() -> None:
    found = judged(reading("gain"), reading("range"))
    assert (found.verdicts, found.reasons, found.failed) == ({"pacs": Verdict.PASS}, (), False)
    assert not found.suffix_due


def test_a_warning_goes_out_with_its_reason() -> None:
    found = judged(reading("gain", Level.WARN, 1.5))
    assert found.worst is Verdict.WARN
    assert found.suffix_due
    assert not found.failed
    assert found.reasons == ("gate gain warns: is 1.5 (allowed at most 1)",)


def test_a_failure_is_held_and_says_what_where_and_what_was_allowed() -> None:
    slices = GateReading(
        "hu_bias_soft",
        "HU",
        (0.5, -7.25),
        (3, 4),
        (Level.PASS, Level.FAIL),
        (-2.0, 2.0),
        (-5.0, 5.0),
        4,
    )
    found = judged(slices)
    assert found.verdicts == {"pacs": Verdict.HOLD}
    assert found.failed
    assert found.reason == "gate hu_bias_soft failed: is -7.25 HU in slice 5 (allowed -5 ... 5)"


def test_the_destination_s_word_comes_before_the_modality_s_and_the_gate_s() -> None:
    gates = {
        "on_fail": "hold",
        "actions": {"gain": "warn"},
        "by_modality": {"CT": {"gain": "refuse"}},
        "by_destination": {"research": {"gain": "pass"}},
    }
    failed = reading("gain", Level.FAIL, 3.0)
    both = ("pacs", "research")
    found = judged(failed, destinations=both, settings=settings(gates=gates))
    assert found.verdicts == {"pacs": Verdict.REFUSE, "research": Verdict.PASS}
    other = judged(failed, modality="MR", destinations=both, settings=settings(gates=gates))
    assert other.verdicts == {"pacs": Verdict.WARN, "research": Verdict.PASS}
    assert found.failed, "what the site makes of it does not change what was measured"


def test_the_gravest_gate_decides_and_is_named_first() -> None:
    gates = {"actions": {"range": "refuse"}}
    found = judged(
        reading("gain", Level.WARN, 1.5),
        reading("range", Level.FAIL, 9.0),
        reading("structure", Level.FAIL, 9.0),
        settings=settings(gates=gates),
    )
    assert found.worst is Verdict.REFUSE
    assert [words.split()[1] for words in found.reasons] == ["range", "structure", "gain"]
    assert not found.sendable


@pytest.mark.parametrize("readings", [(), (reading("latent", Level.NOT_APPLICABLE),)])
def test_what_no_gate_could_judge_is_held(readings: tuple[GateReading, ...]) -> None:
    found = judged(*readings)
    assert found.worst is Verdict.HOLD
    assert UNJUDGED in found.reasons


def test_levels_that_were_never_learnt_are_said() -> None:
    found = judged(reading("gain"), calibrated=False)
    assert found.worst is Verdict.WARN
    assert "not learnt" in (found.reason or "")
    quiet = settings(gates={"uncalibrated": "pass"})
    assert judged(reading("gain"), calibrated=False, settings=quiet).reasons == ()


def test_input_that_needs_no_restoration_is_refused_by_default() -> None:
    assert judged(reading("noise_level", Level.FAIL, 3.0)).worst is Verdict.REFUSE


def test_an_mr_series_whose_k_space_is_full_waits_for_a_person() -> None:
    full = reading("empty_band", Level.FAIL, 1.0)
    for given in (settings(), settings(gates={"on_fail": "warn"})):
        assert judged(full, settings=given).worst is Verdict.HOLD
    own = settings(gates={"by_modality": {"MR": {"empty_band": "refuse"}}})
    assert judged(full, modality="MR", settings=own).worst is Verdict.REFUSE


@pytest.mark.parametrize(("policy", "verdict"), [("refuse", "refuse"), ("warn", "warn")])
def test_the_domain_gate_follows_the_policy_on_the_domain(policy: str, verdict: str) -> None:
    given = settings(policy={"domain": policy})
    assert judged(reading("domain", Level.FAIL, 1.0), settings=given).worst == verdict


def test_a_job_without_a_destination_is_judged_all_the_same() -> None:
    found = judged(reading("gain", Level.FAIL, 3.0), destinations=())
    assert found.verdicts == {NOWHERE: Verdict.HOLD}


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"gates": {"actions": {"vibes": "hold"}}}, "is not a gate"),
        ({"gates": {"by_destination": {"nobody": {"gain": "pass"}}}}, "no destination: nobody"),
        ({"gates": {"on_fail": "ignore"}}, "on_fail"),
        ({"breaker": {"lowest": 0.5, "highest": 0.1}}, "not below"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tables: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        settings(**tables)


def test_the_site_can_name_every_gate_of_the_model() -> None:
    for gate in MODEL_GATES:
        settings(gates={"actions": {gate.name: "hold"}})


@pytest.mark.parametrize(
    ("gates", "silent"),
    [
        ({}, ()),
        ({"on_fail": "warn", "actions": {"gain": "hold"}}, ()),
        ({"on_fail": "pass"}, ("on_fail",)),
        (
            {
                "actions": {"gain": "pass", "range": "hold"},
                "by_modality": {"CT": {"structure": "pass"}},
                "by_destination": {"research": {"latent": "pass"}},
            },
            ("actions.gain", "by_modality.CT.structure", "by_destination.research.latent"),
        ),
    ],
)
def test_a_policy_by_which_a_failure_is_sent_without_a_word_is_named(
    gates: dict[str, Any], silent: tuple[str, ...]
) -> None:
    assert silent_rules(settings(gates=gates)) == silent
