"""The tools that keep the chapters, which are copies of each other, and their texts consistent."""
