"""The site, its pictures and films."""
