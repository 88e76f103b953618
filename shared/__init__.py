"""What is not the lesson: the oracle, the models, the workloads and the tools. A chapter never imports it."""
