"""Everything that is not a lesson: the reference, the models, the workloads and the tools. Chapters never import it."""
