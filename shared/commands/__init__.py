"""The commands behind a reader's make targets."""
