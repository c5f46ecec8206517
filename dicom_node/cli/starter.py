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
#   match         tests that must all hold: modality, called_ae, calling_ae, address, and any
#                 DICOM keyword. "text" or 120 = equals; ["a", "b"] = one of;
#                 { regex = "…" }, { min = 80, max = 120 }, { range = [80, 120] },
#                 { not_in = ["…"] }, { exists = true }. Of an attribute with several values
#                 (ImageType), any one may satisfy the test.
#   task          ct_denoise | mri_sr | pet_synthesis | ignore
#   destinations  names from node.toml, or ["*"] for all of them
#   priority      a larger number is restored earlier (0)
#   enabled       false switches the route off (true)
#   reason        what an ignored series is said to be (task = "ignore" only)

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
# KVP = { max = 120 }                      # kV
# Exposure = { max = 60 }                  # mAs
# SliceThickness = { range = [0.5, 5] }    # mm
#
# [[route]]
# name = "ct-screening"
# task = "ct_denoise"
# destinations = ["pacs"]
# priority = 10
# [route.match]
# calling_ae = "CTSCREEN"
# CTDIvol = { max = 3.0 }                  # mGy
# ConvolutionKernel = { not_in = ["BONE", "LUNG"] }
#
# [[route]]
# name = "pet-short-frames"
# task = "pet_synthesis"
# destinations = ["pacs"]
# [route.match]
# modality = "PT"
# Units = "BQML"
# ActualFrameDuration = { max = 60000 }    # ms
#
# [[route]]
# name = "mr-t2-fast"
# task = "mri_sr"
# destinations = ["pacs"]
# [route.match]
# modality = "MR"
# EchoTime = { min = 60 }                  # ms
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
