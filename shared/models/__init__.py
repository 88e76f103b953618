"""The bundled models, the text they were trained on, and the training."""
