"""The main job from end to end: series go in, restored series arrive in an archive.

A destination (Orthanc where it is installed, else a storage SCP of this program), the node and a
sender run as separate programs on this machine's loopback interface and talk DICOM. What the table
shows is read back from the destination.
"""
