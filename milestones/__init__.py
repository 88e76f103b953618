"""The chapters: each package here is one complete inference engine."""
