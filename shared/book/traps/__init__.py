"""Bugs that are planted: by hand, by chance, to be found."""
