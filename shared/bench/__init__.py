"""Everything that is measured: one timer, and what it is held to."""
