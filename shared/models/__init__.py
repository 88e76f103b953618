"""The embedded models, the text they were trained on, and how."""
