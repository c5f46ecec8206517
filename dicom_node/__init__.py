"""A DICOM node that restores series on their way to the archive."""

__version__ = "0.1.0"
