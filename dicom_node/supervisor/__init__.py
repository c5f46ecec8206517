"""The composition root: builds the services of each role and keeps them running until told to stop.

`parent.run_all` starts one process for each role and restarts the dead; `roles.run_role` is such a
process, or the whole of a systemd unit. They meet in the ledger and the spool only. Of a child the
parent knows what systemd would: it lives, it has said READY=1, or it ended and why.
"""
