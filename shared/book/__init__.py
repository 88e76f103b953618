"""The tools that keep a book of copies true: each compares, writes or plants, and none is part of a chapter."""
