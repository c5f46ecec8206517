"""The report on one result for the person who reviews it: one HTML file and one picture.

Input, restored and difference of the worst slice and of some others, and every gate over the
slices. The file needs nothing but itself, and names nobody: job and UIDs, and what else the site
allows (`review.identifiers`).
"""

from __future__ import annotations

from dicom_node.review.page import rendered
from dicom_node.review.sheet import Picture, Sheet, is_wanted, pictures

__all__ = ["Picture", "Sheet", "is_wanted", "pictures", "rendered"]
