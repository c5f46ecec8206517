"""The ledger: what happened to each association, instance, series, job and delivery.

`tables` holds the schema and the states, `intake` and `queue` write, `reports` reads.
"""
