"""Rules are data: what they match, what they say about it, and what a bad table is told."""

from __future__ import annotations

import tomllib
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
        "KVP in range 80..120: 140 → no",
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
