"""What a chapter is held against: the oracle, soaks, a pretended GPU."""
