"""The benchmarks, and what they compare the chapters with."""
