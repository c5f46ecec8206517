"""What ``dicom-node init`` writes: node.toml, routes.toml, the spool and the ledger."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dicom_node.errors import ConfigurationError, PermanentError

# config/routes.toml is this text; a test keeps them equal.
DEFAULT_ROUTES = """\
# Which series are restored, and where the result goes.
#
# The first enabled route whose every test holds decides; a series that no route matches is
# acknowledged and ignored, with the reason in `dicom-node series list`. The original is never
# changed or withheld, whatever stands here. `dicom-node route explain PATH` shows every route,
# every value and why it matched or not.
#
#   name          appears in every reason
#   match         tests that must all hold: modality, called_ae, calling_ae, address, any DICOM
#                 keyword, also Sequence.Keyword, and quantities with their units: kvp, mas,
#                 ctdi_vol, slice_thickness, pixel_spacing, kernel, activity, activity_per_kg,
#                 dose_fraction, frame_duration, matrix, acquisition_matrix, echo_time,
#                 repetition_time, field_strength. "text" or 120 = equals; ["a", "b"] = one of;
#                 { regex = "…" }, { min = "80 kV", max = "120 kV" }, { range = [80, 120] },
#                 { not_in = ["…"] }, { exists = true }, { network = "10.1.0.0/16" }. Of an
#                 attribute with several values (ImageType), any one may satisfy the test.
#   task          ct_denoise | mri_sr | pet_synthesis | ignore
#   destinations  names from node.toml, or ["*"] for all of them
#   priority      a larger number is restored earlier (0)
#   strength      how much of the change is applied, above 0 up to 1 (1)
#   hours         { open = "22:00-06:00", days = "mon-fri", zone = "Europe/Berlin",
#                 closed = "wait" }: restored then; closed = "skip" leaves it to the next route
#   enabled       false switches the route off (true)
#   reason        what an ignored series is said to be (task = "ignore" only)
#
# Whoever is on the opt-out list is ignored before any route is asked. A value may be written as
# "sha256:…" of itself; a file has one value a line.
#
#   [opt_out]
#   PatientID = { file = "opt-out.txt" }
#   StudyInstanceUID = ["1.2.3"]
#
# Rules are tested by `dicom-node route test FIXTURE`: see the page on routing.

[[route]]
name = "localizer"
task = "ignore"
reason = "localizer"
match = { ImageType = ["LOCALIZER", "SCOUT", "SCANOGRAM"] }

[[route]]
name = "mr-map"
task = "ignore"
reason = "phase image or calculated map, not a magnitude image"
[route.match]
modality = "MR"
ImageType = [
    "P", "PHASE", "PHASE MAP", "R", "REAL", "I", "IMAGINARY", "VELOCITY MAP",
    "ADC", "ADC MAP", "FA", "TRACEW", "T1 MAP", "T2 MAP",
]

[[route]]
name = "ct"
task = "ct_denoise"
destinations = ["*"]
match = { modality = "CT" }

[[route]]
name = "mr"
task = "mri_sr"
destinations = ["*"]
match = { modality = "MR" }

[[route]]
name = "pet"
task = "pet_synthesis"
destinations = ["*"]
match = { modality = "PT" }

# Most sites restore only what was acquired at a low dose or a low resolution. Replace the three
# routes above by routes that know your protocols, for instance:
#
# [[route]]
# name = "ct-low-dose"
# task = "ct_denoise"
# destinations = ["pacs"]
# [route.match]
# modality = "CT"
# kvp = { max = "120 kV" }
# mas = { max = "60 mAs" }
# slice_thickness = { range = ["0.5 mm", "5 mm"] }
#
# [[route]]
# name = "ct-screening"
# task = "ct_denoise"
# destinations = ["pacs"]
# priority = 10
# strength = 0.8
# hours = { open = "19:00-07:00", closed = "wait" }
# [route.match]
# calling_ae = "CTSCREEN"
# ctdi_vol = { max = "3 mGy" }
# kernel = { not_in = ["BONE", "LUNG"] }
#
# [[route]]
# name = "pet-short-frames"
# task = "pet_synthesis"
# destinations = ["pacs"]
# [route.match]
# modality = "PT"
# Units = "BQML"
# frame_duration = { max = "60 s" }
# dose_fraction = { max = 0.5, of = "6 MBq*min/kg" }
#
# [[route]]
# name = "mr-t2-fast"
# task = "mri_sr"
# destinations = ["pacs"]
# [route.match]
# modality = "MR"
# echo_time = { min = "60 ms" }
# acquisition_matrix = { max = 192 }
# SeriesDescription = { regex = "(?i)t2.*fast" }
"""

_DESTINATION = re.compile(r"(?P<name>[^=]+)=(?P<ae_title>[^@]+)@(?P<host>.+):(?P<port>\d+)")


def parse_destination(text: str) -> tuple[str, dict[str, Any]]:
    """``NAME=AET@HOST:PORT`` as a destination's name and its table; ValueError otherwise."""
    found = _DESTINATION.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not NAME=AET@HOST:PORT")
    table = {key: found[key] for key in ("ae_title", "host")}
    return found["name"], {**table, "port": int(found["port"])}


def write_node(
    folder: Path,
    *,
    node: Mapping[str, Any],
    destinations: Mapping[str, Mapping[str, Any]],
    bundle: str | None,
) -> None:
    """Make *folder* a node that can be served.

    Nothing is left behind when a value is wrong, and nothing that exists is overwritten.

    Raises:
        ConfigurationError: with every wrong value.
        PermanentError: the folder holds a node already.
    """
    from dicom_node.ledger.tables import open_ledger
    from dicom_node.settings import load, render_toml

    for name in ("node.toml", "routes.toml"):
        if (folder / name).exists():
            raise PermanentError(f"{folder / name} exists; choose another folder or edit it")
    changes: dict[str, Any] = {"node": dict(node), "destinations": dict(destinations)}
    if bundle is not None:
        is_folder = Path(bundle).is_dir()
        changes["engine"] = {"bundle": str(Path(bundle).resolve()) if is_folder else bundle}
    text = render_toml(changes)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = folder / "node.toml.new"
    try:
        draft.write_text(text, encoding="utf-8")
        settings = load(draft, environ={})
    except ConfigurationError as error:
        problems = [problem.replace(f"{draft}: ", "") for problem in error.problems]
        raise ConfigurationError(problems) from error
    else:
        (folder / "routes.toml").write_text(DEFAULT_ROUTES, encoding="utf-8")
        os.replace(draft, folder / "node.toml")
    finally:
        draft.unlink(missing_ok=True)
    settings.spool.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    open_ledger(settings.ledger.url).dispose()
