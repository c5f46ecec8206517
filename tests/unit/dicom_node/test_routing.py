"""Rules are data: what they match, what they say about it, and what a bad table is told."""

from __future__ import annotations

import tomllib
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from dicom_node.cli.starter import DEFAULT_ROUTES
from dicom_node.dicom.acceptance import TASK_MODALITY
from dicom_node.errors import ConfigurationError
from dicom_node.routing import Routes, Titles, decide, header_values, load_routes, parse_routes

TITLES = Titles(calling_ae="CT1", called_ae="DIFFCODE", address="10.0.0.7")


def header(**values: Any) -> Dataset:
    made = Dataset()
    made.Modality = "CT"
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


def routes(text: str, destinations: tuple[str, ...] = ("pacs", "backup")) -> Routes:
    return parse_routes(tomllib.loads(text), destinations)


def one(match: str, task: str = "ct_denoise") -> Routes:
    return routes(
        f'[[route]]\nname = "r"\ntask = "{task}"\ndestinations = ["pacs"]\nmatch = {{ {match} }}'
    )


PHARMA = "RadiopharmaceuticalInformationSequence"


def injected(becquerel: str) -> list[Dataset]:
    item = Dataset()
    item.RadionuclideTotalDose = becquerel
    return [item]


def private(number: int) -> Dataset:
    made = header()
    block = made.private_block(0x0019, "OURS 1", create=True)
    block.add_new(0x02, "IS", str(number))
    return made


MATCHES = [
    # rule, header, holds
    ('modality = "CT"', header(), True),
    ('modality = "MR"', header(), False),
    ("KVP = 120", header(KVP="120"), True),  # DS "120" equals the number 120
    ("KVP = 120", header(KVP="120.0"), True),
    ("KVP = 120", header(), False),  # absent is not equal to anything
    ("KVP = { min = 80, max = 120 }", header(KVP="80"), True),  # both ends belong to a range
    ("KVP = { min = 80, max = 120 }", header(KVP="120"), True),
    ("KVP = { min = 80, max = 120 }", header(KVP="120.1"), False),
    ("KVP = { range = [80, 120] }", header(KVP="100"), True),
    ("KVP = { max = 120 }", header(KVP="-5"), True),  # open below
    ("KVP = [80, 100]", header(KVP="100"), True),
    ("KVP = [80, 100]", header(KVP="90"), False),
    ('ConvolutionKernel = "B31f"', header(ConvolutionKernel="B31f"), True),
    ('ConvolutionKernel = "Br38f"', header(ConvolutionKernel=["Br38f", "3"]), True),  # any value
    ('ConvolutionKernel = { not_in = ["BONE"] }', header(ConvolutionKernel="SOFT"), True),
    ('ConvolutionKernel = { not_in = ["3"] }', header(ConvolutionKernel=["Br38f", "3"]), False),
    ('ConvolutionKernel = { not_in = ["BONE"] }', header(), True),  # absent is not in the list
    ('ImageType = ["LOCALIZER"]', header(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), True),
    ('ImageType = ["LOCALIZER"]', header(ImageType=["ORIGINAL", "PRIMARY", "AXIAL"]), False),
    ("SeriesDescription = { regex = '(?i)low' }", header(SeriesDescription="CT LOW DOSE"), True),
    ("SeriesDescription = { regex = '^low' }", header(SeriesDescription="CT low dose"), False),
    ("ContrastBolusAgent = { exists = false }", header(), True),
    ("ContrastBolusAgent = { exists = true }", header(ContrastBolusAgent="Iodine"), True),
    ("ContrastBolusAgent = { exists = true }", header(ContrastBolusAgent=""), False),  # empty
    ('calling_ae = "CT1"', header(), True),
    ('calling_ae = ["CT2", "CT3"]', header(), False),
    ("address = { regex = '^10\\.' }", header(), True),
    ('called_ae = "DIFFCODE"', header(), True),
    ("", header(), True),  # a route without tests takes everything
    # a number with its unit, in any unit of the kind
    ('KVP = "120 kV"', header(KVP="120"), True),
    ('KVP = { max = "100000 V" }', header(KVP="101"), False),
    ('SliceThickness = { range = ["0.5 mm", "0.3 cm"] }', header(SliceThickness="3.0"), True),
    ('EchoTime = { min = "0.06 s" }', header(EchoTime="90"), True),
    # quantities, whatever attribute tells them
    ('kvp = { max = "100 kV" }', header(KVP="100"), True),
    ('mas = { max = "30 mAs" }', header(Exposure="25"), True),
    ('mas = { max = "30 mAs" }', header(ExposureInuAs="31000"), False),
    ('mas = { max = "30 mAs" }', header(XRayTubeCurrent="100", ExposureTime="250"), True),  # 25
    ('mas = { max = "30 mAs" }', header(), False),
    ('ctdi_vol = { max = "3 mGy" }', header(CTDIvol=2.5), True),
    ('ctdi_vol = { max = "0.3 cGy" }', header(CTDIvol=3.5), False),
    ('slice_thickness = { min = "2 mm" }', header(SliceThickness="1"), False),
    ('kernel = { regex = "^B3" }', header(ConvolutionKernel="B31f"), True),
    ('pixel_spacing = { min = "1.2 mm" }', header(PixelSpacing=["0.9", "1.3"]), True),
    ("matrix = { max = 256 }", header(Rows=256, Columns=192), True),
    ("matrix = { max = 256 }", header(Rows=192, Columns=320), False),
    ("acquisition_matrix = { max = 160 }", header(AcquisitionMatrix=[0, 160, 128, 0]), True),
    ('echo_time = { min = "60 ms" }', header(EchoTime="90"), True),
    ('field_strength = { range = ["1.4 T", "1.6 T"] }', header(MagneticFieldStrength="1.5"), True),
    ('activity = { max = "100 MBq" }', header(**{PHARMA: injected("74000000")}), True),
    ('activity = { max = "1 mCi" }', header(**{PHARMA: injected("74000000")}), False),  # 37 MBq
    (
        'activity_per_kg = { max = "1 MBq/kg" }',
        header(PatientWeight="80", **{PHARMA: injected("74000000")}),  # 0.925
        True,
    ),
    # a share of a reference that the rule names
    ('dose_fraction = { max = 0.3, of = "10 mGy" }', header(CTDIvol=2.9), True),
    ('dose_fraction = { max = 0.3, of = "1 cGy" }', header(CTDIvol=3.1), False),
    (
        'dose_fraction = { max = 0.5, of = "6 MBq*min/kg" }',  # 0.925 · 2 min / 6 = 0.308
        header(PatientWeight="80", ActualFrameDuration="120000", **{PHARMA: injected("74e6")}),
        True,
    ),
    # within sequences, by tag, and private
    (
        f'{PHARMA}.RadionuclideTotalDose = {{ max = "100 MBq" }}',
        header(**{PHARMA: injected("74000000")}),
        True,
    ),
    (f'"{PHARMA}.RadionuclideTotalDose" = {{ exists = true }}', header(), False),
    ('"(0018,0060)" = 120', header(KVP="120"), True),
    ("'(0019,\"OURS 1\",02)' = 7", private(7), True),
    ("'(0019,\"OURS 1\",02)' = { min = 8 }", private(7), False),
    ("'(0019,\"THEIRS\",02)' = { exists = true }", private(7), False),
    ('address = { network = "10.0.0.0/8" }', header(), True),
    ('address = { network = "192.168.0.0/16" }', header(), False),
]


@pytest.mark.parametrize(("match", "dataset", "holds"), MATCHES, ids=[m for m, _, _ in MATCHES])
def test_a_test_holds_as_its_operator_says(match: str, dataset: Dataset, holds: bool) -> None:
    decision = decide(TITLES, dataset, one(match))
    assert (decision.task == "ct_denoise") is holds


def test_every_test_of_a_route_must_hold() -> None:
    table = one('modality = "CT", KVP = { max = 100 }')
    assert decide(TITLES, header(KVP="80"), table).route == "r"
    assert decide(TITLES, header(KVP="140"), table).route is None


def test_the_first_route_that_matches_decides_and_the_rest_say_so() -> None:
    table = routes(
        """
        [[route]]
        name = "off"
        task = "ct_denoise"
        destinations = ["pacs"]
        enabled = false
        [[route]]
        name = "first"
        task = "ct_denoise"
        destinations = ["backup"]
        priority = 7
        [[route]]
        name = "second"
        task = "mri_sr"
        destinations = ["pacs"]
        """
    )
    decision = decide(TITLES, header(), table)
    assert (decision.route, decision.destinations, decision.priority) == ("first", ("backup",), 7)
    skipped = {trace.rule: trace.skipped for trace in decision.explanation}
    assert skipped == {"off": "disabled", "first": None, "second": "'first' matched before"}


def test_a_series_that_no_route_matches_is_told_its_modality() -> None:
    decision = decide(TITLES, header(Modality="US"), one('modality = "CT"'))
    assert decision.task is None
    assert decision.reason == "no route matches (modality US)"


def test_an_ignoring_route_gives_its_reason() -> None:
    table = routes('[[route]]\nname = "opt out"\ntask = "ignore"\nreason = "not asked for"')
    decision = decide(TITLES, header(), table)
    assert (decision.task, decision.reason) == (None, "not asked for")


def test_the_explanation_shows_each_value_and_whether_it_held() -> None:
    table = one("KVP = { range = [80, 120] }, ConvolutionKernel = { exists = true }")
    (trace,) = decide(TITLES, header(KVP="140"), table).explanation
    assert [str(each) for each in trace.conditions] == [
        "KVP in range 80..120 kV: 140 kV → no",
        "ConvolutionKernel present: (absent) → no",
    ]


def test_a_star_means_every_destination_of_the_node() -> None:
    table = routes('[[route]]\nname = "r"\ntask = "mri_sr"\ndestinations = ["*"]')
    assert table.rules[0].destinations == ("pacs", "backup")


def test_a_node_without_destinations_can_still_restore() -> None:
    table = routes('[[route]]\nname = "r"\ntask = "mri_sr"\ndestinations = ["*"]', ())
    assert table.rules[0].destinations == ()


def test_a_value_that_does_not_parse_counts_as_absent() -> None:
    broken = header(KVP="120")
    broken["KVP"]._value = "***"
    assert header_values(broken, "KVP") == ()
    assert decide(TITLES, broken, one("KVP = { max = 120 }")).task is None


def test_every_mistake_of_a_table_is_reported_at_once_with_its_place() -> None:
    text = """
        colour = "blue"
        [[route]]
        name = "a"
        task = "denoise"
        destinations = ["pacs", "nowhere"]
        weight = 3
        [route.match]
        Modalty = "CT"
        KVP = "high"
        SeriesDescription = { range = [1, 2] }
        PatientName = { regex = "(" }
        SliceThickness = { range = [5, 1] }
        ConvolutionKernel = { like = "B*" }
        PixelData = { exists = true }
        Exposure = { in = [] }
        [[route]]
        name = "a"
        task = "mri_sr"
        enabled = "yes"
    """
    with pytest.raises(ConfigurationError) as caught:
        routes(text)
    places = sorted(problem.split(": ")[1] for problem in caught.value.problems)
    assert places == sorted(
        [
            "colour",
            "route[0].weight",
            "route[0].task",
            "route[0].destinations",
            "route[0].match.Modalty",
            "route[0].match.KVP.equals",
            "route[0].match.SeriesDescription.range",
            "route[0].match.PatientName.regex",
            "route[0].match.SliceThickness.range",
            "route[0].match.ConvolutionKernel.like",
            "route[0].match.PixelData",
            "route[0].match.Exposure.in",
            "route[1].name",
            "route[1].enabled",
            "route[1].destinations",
        ]
    )


@pytest.mark.parametrize(
    ("line", "place", "says"),
    [
        ("kvp = 120", "route[0].match.kvp.equals", 'needs its unit, as "120 kV"'),
        ('kvp = "120 mAs"', "route[0].match.kvp.equals", "is in kV, a voltage; mAs is a charge"),
        ('kvp = "120 kVp"', "route[0].match.kvp.equals", "'kVp' is no unit that is known"),
        ('kvp = "high"', "route[0].match.kvp.equals", "'high' is no number with a unit"),
        ('Rows = "256 mm"', "route[0].match.Rows.equals", "must be a number, not '256 mm'"),
        ("dose_fraction = { max = 0.5 }", "route[0].match.dose_fraction.of", "is missing"),
        (
            'dose_fraction = { max = 0.5, of = "3 mm" }',
            "route[0].match.dose_fraction.of",
            "must be above 0 in one of mGy",
        ),
        ('KVP = { max = 1, of = "3 mGy" }', "route[0].match.KVP.of", "only dose_fraction"),
        ('calling_ae = { network = "10.0.0.0/8" }', "route[0].match.calling_ae.network", "unknown"),
        ('address = { network = "10.0.0/8" }', "route[0].match.address.network", "10.0.0/8"),
        ("Modality.KVP = 3", "route[0].match.Modality.KVP", "Modality is no DICOM sequence"),
    ],
)
def test_a_mistake_names_the_file_the_line_the_key_and_what_is_wrong(
    tmp_path: Path, line: str, place: str, says: str
) -> None:
    path = tmp_path / "routes.toml"
    path.write_text(
        '# one route\n\n[[route]]\nname = "r"\ntask = "ct_denoise"\ndestinations = ["*"]\n'
        f'[route.match]\nmodality = [\n    "CT",\n]\n{line}\n'
    )
    with pytest.raises(ConfigurationError) as caught:
        load_routes(path, [])
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}:11: {place}: ")
    assert says in problem


NIGHT = (
    'hours = { open = "22:00-06:00", days = "mon-fri", zone = "Europe/Berlin", closed = "CLOSED" }'
)


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def night(closed: str) -> Routes:
    first = '[[route]]\nname = "night"\ntask = "ct_denoise"\ndestinations = ["pacs"]\n'
    second = '[[route]]\nname = "day"\ntask = "ct_denoise"\ndestinations = ["backup"]\n'
    return routes(first + NIGHT.replace("CLOSED", closed) + "\n" + second)


def test_a_route_that_waits_takes_the_series_for_when_it_opens() -> None:
    noon, evening = at("2026-01-28T12:00:00+01:00"), at("2026-01-28T22:00:00+01:00")
    decision = decide(TITLES, header(), night("wait"), noon)
    assert (decision.route, decision.not_before) == ("night", evening)
    assert decide(TITLES, header(), night("wait"), evening + 60).not_before == evening + 60


def test_a_route_that_is_closed_leaves_the_series_to_the_next() -> None:
    noon = at("2026-01-28T12:00:00+01:00")
    decision = decide(TITLES, header(), night("skip"), noon)
    assert (decision.route, decision.not_before) == ("day", 0.0)
    (trace, _) = decision.explanation
    assert (trace.matched, trace.hours) == (
        False,
        "22:00-06:00 on mon, tue, wed, thu, fri (Europe/Berlin): closed, the next route is tried",
    )


@pytest.mark.parametrize(
    ("line", "key", "says"),
    [
        ('hours = { open = "22-6" }', "hours.open", "no span of the day"),
        ('hours = { open = "06:00-06:00" }', "hours.open", "begins when it ends"),
        ("hours = { days = ['mon'] }", "hours.open", "is empty"),
        ('hours = { open = "01:00-02:00", days = "someday" }', "hours.days", "no day of the week"),
        ('hours = { open = "01:00-02:00", zone = "Mars" }', "hours.zone", "is no time zone"),
        ('hours = { open = "01:00-02:00", closed = "no" }', "hours.closed", 'must be "wait"'),
        ('hours = "night"', "hours", "must be a table"),
        ("strength = 0", "strength", "above 0 and up to 1"),
        ("strength = 1.2", "strength", "above 0 and up to 1"),
        ("strength = true", "strength", "above 0 and up to 1"),
    ],
)
def test_hours_and_strength_are_checked_when_the_table_is_read(
    line: str, key: str, says: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        routes(f'[[route]]\nname = "r"\ntask = "mri_sr"\ndestinations = ["*"]\n{line}')
    assert any(f"route[0].{key}: " in problem for problem in caught.value.problems)
    assert says in str(caught.value)


def test_a_route_gives_its_strength() -> None:
    table = routes('[[route]]\nname = "r"\ntask = "mri_sr"\ndestinations = ["*"]\nstrength = 0.6')
    assert decide(TITLES, header(), table).strength == 0.6
    assert decide(TITLES, header(), one("")).strength == 1.0


def test_who_is_on_the_opt_out_list_is_ignored_without_a_word_of_who_it_is(tmp_path: Path) -> None:
    hashed = sha256(b"P-3").hexdigest()
    (tmp_path / "opt-out.txt").write_text(f"# asked on paper\nP-1\n\nsha256:{hashed}\n")
    path = tmp_path / "routes.toml"
    path.write_text(
        '[opt_out]\nPatientID = { file = "opt-out.txt" }\nStudyInstanceUID = ["1.2.3"]\n'
        '[[route]]\nname = "all"\ntask = "ct_denoise"\ndestinations = ["*"]\n'
    )
    table = load_routes(path, ["pacs"])
    for values in ({"PatientID": "P-1"}, {"PatientID": "P-3"}, {"StudyInstanceUID": "1.2.3"}):
        decision = decide(TITLES, header(**values), table)
        (key,) = values
        assert (decision.task, decision.reason) == (None, f"on the opt-out list by {key}")
        assert [trace.skipped for trace in decision.explanation] == [
            None, "'opt_out' matched before",
        ]  # fmt: skip
    assert decide(TITLES, header(PatientID="P-2"), table).task == "ct_denoise"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[opt_out]\nPatientID = { file = "absent.txt" }', "opt_out.PatientID.file"),
        ("[opt_out]\nPatientID = 7", "opt_out.PatientID"),
        ('[opt_out]\nPatientId = ["x"]', "opt_out.PatientId"),
        ('[opt_out]\nKVP = ["120"]', "opt_out.KVP"),
        ('[opt_out]\nPatientID = ["sha256:123"]', "opt_out.PatientID"),
        ("opt_out = 3", "opt_out"),
    ],
)
def test_a_mistake_in_the_opt_out_list_is_never_passed_over(text: str, place: str) -> None:
    table = '[[route]]\nname = "r"\ntask = "mri_sr"\ndestinations = ["*"]\n'
    with pytest.raises(ConfigurationError) as caught:
        routes(f"{text}\n{table}")
    assert any(f"{place}: " in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no [[route]]"),
        ("[route]\nname = 'x'", "must be [[route]] tables"),
        ("[[route]]\ntask = 'mri_sr'\ndestinations = ['*']", "needs a name"),
        ("[[route]]\nname = 'x'\ndestinations = ['*']", "is missing (known: "),
    ],
)
def test_a_table_that_could_never_decide_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match="route") as caught:
        routes(text)
    assert says in str(caught.value)


def test_a_file_that_is_no_toml_names_itself_and_the_line(tmp_path: Path) -> None:
    path = tmp_path / "routes.toml"
    path.write_text("[[route]\n")
    with pytest.raises(ConfigurationError, match=r"routes\.toml: not valid TOML.*line 1"):
        load_routes(path, [])
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_routes(tmp_path / "absent.toml", [])


def test_the_shipped_table_is_the_one_that_init_writes(repository: Path) -> None:
    assert (repository / "config" / "routes.toml").read_text(encoding="utf-8") == DEFAULT_ROUTES


def test_the_commented_examples_of_the_shipped_table_are_valid() -> None:
    examples = DEFAULT_ROUTES[DEFAULT_ROUTES.index("# [[route]]") :]
    text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in examples.splitlines())
    assert {rule.name for rule in routes(text).rules} == {
        "ct-low-dose",
        "ct-screening",
        "pet-short-frames",
        "mr-t2-fast",
    }


@pytest.mark.parametrize(
    ("dataset", "task"),
    [
        (header(), "ct_denoise"),
        (header(Modality="MR", ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "NORM"]), "mri_sr"),
        (header(Modality="PT"), "pet_synthesis"),
        (header(Modality="MR", ImageType=["ORIGINAL", "PRIMARY", "P", "ND"]), None),
        (header(Modality="MR", ImageType=["DERIVED", "PRIMARY", "DIFFUSION", "ADC"]), None),
        (header(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), None),
        (header(Modality="US"), None),
    ],
)
def test_the_shipped_table_restores_each_modality_and_leaves_maps_alone(
    dataset: Dataset, task: str | None
) -> None:
    table = routes(DEFAULT_ROUTES)
    decision = decide(TITLES, dataset, table)
    assert decision.task == task
    assert task is None or decision.destinations == ("pacs", "backup")


def test_the_tasks_are_those_of_the_model() -> None:
    from restoration.tasks import RestorationTask

    assert {task.value for task in RestorationTask} == set(TASK_MODALITY)


@given(
    low=st.floats(-1e6, 1e6),
    width=st.floats(0, 1e6),
    value=st.decimals(-1000, 1000, places=3, allow_nan=False),
)
def test_a_range_holds_exactly_when_the_value_lies_between_its_ends(
    low: float, width: float, value: Any
) -> None:
    high = low + width
    table = parse_routes(
        {
            "route": [
                {
                    "name": "r",
                    "task": "ct_denoise",
                    "destinations": ["*"],
                    "match": {"KVP": {"range": [low, high]}},
                }
            ]
        },
        [],
    )
    decision = decide(TITLES, header(KVP=str(value)), table)
    assert (decision.task is not None) is (low <= float(value) <= high)
