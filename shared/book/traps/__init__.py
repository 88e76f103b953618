"""Planted bugs: seeded ones, random ones, and a hunt for one."""
