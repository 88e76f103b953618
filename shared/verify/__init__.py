"""What chapters are tested against: Hugging Face as the reference, soak and kill tests, a simulated GPU."""
