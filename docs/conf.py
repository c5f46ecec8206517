"""Sphinx settings of the documentation."""

from dicom_node import __version__

project = "DiffCode node"
author = "the DiffCode node contributors"
version = release = __version__
extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"DiffCode node {__version__}"
