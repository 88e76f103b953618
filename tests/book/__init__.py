"""Tests of the book's tools, on small books made for the purpose."""
