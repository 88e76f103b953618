"""Generate the texts' code, diffs and tables, and check the texts against code and results."""
