"""The site and its films."""
