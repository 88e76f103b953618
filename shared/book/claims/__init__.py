"""What the texts say, held to the code, the results and each other."""
