"""The rows of a run: prepared on a login node, loaded, selected, encoded, accounted for."""
