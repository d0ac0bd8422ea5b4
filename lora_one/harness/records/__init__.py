"""The run folder and who may write to it: record, attempts, lease, provenance."""
