"""DICOM as data: headers, geometry, physical units, derived instances. No sockets, no SQL."""
